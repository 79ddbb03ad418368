//! `gantry vm logs`: what a VM in the background has said.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anstream::adapter::strip_bytes;
use clap::Args;
use gantry_resources::base::{HostPaths, harmless};
use gantry_resources::holding::running_vms;

use crate::output::{print, print_while_read};
use crate::report::Failure;
use crate::vm_log::path_of;

/// How often a log is looked at for more.
const INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
#[command(after_help = "\
What gantry and the guest's serial port have said since `gantry run -d`, the latest 1 MiB at most. It is kept \
when the VM ends, until a VM of that name is started again. Controls of the terminal are left out.

Examples:
  gantry vm logs web-1
  gantry vm logs web-1 -n 20 -f")]
pub struct LogsArgs {
    /// Name of the VM
    #[arg(value_name = "VM")]
    vm: String,
    /// Go on until the VM ends
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "COUNT")]
    lines: Option<usize>,
}

pub fn logs(args: &LogsArgs, paths: &HostPaths) -> Result<(), Failure> {
    let path = path_of(&paths.run, &args.vm);
    let mut file = File::open(&path).map_err(|error| no_log(&args.vm, &path, &error))?;
    let failed = |error| Failure::host(format!("cannot read {}: {error}", path.display()));
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(failed)?;
    let clean = clean(&text);
    let shown = last(&clean, args.lines);
    print(|out| write!(out, "{shown}"))?;
    if !args.follow {
        return Ok(());
    }
    loop {
        // Asked before the last look: what it says at its end is shown.
        let ended = !is_running(&args.vm, paths);
        let log = file.metadata().map_err(failed)?;
        if log.len() < file.stream_position().map_err(failed)? {
            // The older half was removed.
            file.seek(SeekFrom::End(0)).map_err(failed)?;
        }
        text.clear();
        file.read_to_end(&mut text).map_err(failed)?;
        let clean = self::clean(&text);
        if !print_while_read(|out| write!(out, "{clean}"))? || ended || log.nlink() == 0 {
            return Ok(());
        }
        sleep(INTERVAL);
    }
}

fn is_running(name: &str, paths: &HostPaths) -> bool {
    let mut running = running_vms(paths).unwrap_or_default().into_iter();
    running.any(|vm| vm.tenant.is_none() && vm.record.name == name)
}

fn no_log(name: &str, path: &Path, error: &std::io::Error) -> Failure {
    let failure = Failure::host(format!("there is no log {}: {error}", path.display()));
    match error.kind() {
        ErrorKind::NotFound => failure.help(format!(
            "`gantry run -d` keeps one; what other VMs say is on the terminal of their `gantry run`, or in \
             the journal: `journalctl -u gantry@{name}`"
        )),
        _ => failure,
    }
}

/// Output of a guest without what controls a terminal.
fn clean(output: &[u8]) -> String {
    let text = strip_bytes(output).into_vec();
    let text = String::from_utf8_lossy(&text);
    harmless(&text.replace('\r', ""))
}

/// The last `count` lines, or all.
fn last(text: &str, count: Option<usize>) -> &str {
    let Some(count) = count else { return text };
    let mut begins = text.match_indices('\n').map(|(at, _)| at + 1);
    let begins = begins.by_ref().filter(|begin| *begin < text.len());
    let begins: Vec<usize> = std::iter::once(0).chain(begins).collect();
    let first = begins.len().saturating_sub(count);
    let at = begins.get(first).copied().unwrap_or(text.len());
    text.get(at..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_control_the_readers_terminal() {
        let text = clean(b"\x1b]0;title\x07\x1b[31mred\x1b[0m\r\nlogin: \x07");
        assert_eq!(text, "red\nlogin: ");
    }

    #[test]
    fn the_last_lines_are_counted_with_an_unfinished_one() {
        assert_eq!(last("a\nb\nc\n", None), "a\nb\nc\n");
        assert_eq!(last("a\nb\nc\n", Some(2)), "b\nc\n");
        assert_eq!(last("a\nb\nlogin: ", Some(2)), "b\nlogin: ");
        assert_eq!(last("a\n", Some(5)), "a\n");
        assert_eq!(last("a\n", Some(0)), "");
    }
}
