//! `gantry vm logs`: what a VM in the background has said.

use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::thread::sleep;
use std::time::Duration;

use anstream::adapter::StripBytes;
use clap::Args;
use gantry_resources::base::{HostPaths, harmless};

use crate::output::{print, print_while_read};
use crate::report::Failure;
use crate::vm_log::{Logs, is_written};

/// Where a reader has missed something.
const MISSED: &str = "\n[output is missing here: it came too fast to be followed]\n";
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
    let name = &*args.vm;
    let opened = Logs::new(&paths.run).open(name);
    let mut file = opened.map_err(|error| no_log(name, &error))?;
    let failed = |error| Failure::host(format!("cannot read the log of {name}: {error}"));
    let mut cleaner = Cleaner::default();
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(failed)?;
    let clean = cleaner.clean(&text);
    let shown = last(&clean, args.lines);
    print(|out| write!(out, "{shown}"))?;
    if !args.follow {
        return Ok(());
    }
    loop {
        // Asked before the last look: what it says at its end is shown.
        let ended = !is_written(&file);
        let log = file.metadata().map_err(failed)?;
        let mut missed = "";
        if log.len() < file.stream_position().map_err(failed)? {
            // The older half was removed, and perhaps some of what was not shown yet.
            missed = MISSED;
            file.seek(SeekFrom::End(0)).map_err(failed)?;
        }
        text.clear();
        file.read_to_end(&mut text).map_err(failed)?;
        let clean = cleaner.clean(&text);
        if !print_while_read(|out| write!(out, "{missed}{clean}"))? || ended || log.nlink() == 0 {
            return Ok(());
        }
        sleep(INTERVAL);
    }
}

fn no_log(name: &str, error: &std::io::Error) -> Failure {
    let failure = Failure::host(format!("there is no log of {name}: {error}"));
    match error.kind() {
        ErrorKind::NotFound => failure.help(format!(
            "`gantry run -d` keeps one; what other VMs say is on the terminal of their `gantry run`, or in \
             the journal: `journalctl -u gantry@{name}`"
        )),
        _ => failure,
    }
}

/// Leaves out of a guest's output what controls a terminal.
#[derive(Debug, Default)]
struct Cleaner {
    /// Knows of a sequence whose end comes later.
    strip: StripBytes,
    /// The begin of a character whose end comes later.
    held: Vec<u8>,
}

impl Cleaner {
    /// The next part of the output.
    fn clean(&mut self, output: &[u8]) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.extend(self.strip.strip_next(output).flatten());
        let last = text.utf8_chunks().last();
        let invalid = last.map(|last| last.invalid()).unwrap_or_default();
        let is_begin = str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if is_begin {
            self.held = text.split_off(text.len() - invalid.len());
        }
        harmless(&String::from_utf8_lossy(&text).replace('\r', ""))
    }
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
        let text = Cleaner::default().clean(b"\x1b]0;title\x07\x1b[31mred\x1b[0m\r\nlogin: \x07");
        assert_eq!(text, "red\nlogin: ");
    }

    #[test]
    fn what_comes_in_parts_is_read_as_a_whole() {
        let whole = "a\x1b[31mr\u{e9}d\u{1f600}\x1b[0m\x1b]0;title\x07 b\n".as_bytes();
        for at in 0..=whole.len() {
            let (one, two) = whole.split_at(at);
            let mut cleaner = Cleaner::default();
            let text = cleaner.clean(one) + &cleaner.clean(two);
            assert_eq!(text, "ar\u{e9}d\u{1f600} b\n", "cut at {at}");
        }
        // A character that does not end does not hold up what follows it.
        let mut cleaner = Cleaner::default();
        let text = cleaner.clean(b"a\xc3") + &cleaner.clean(b"b");
        assert!(text.starts_with('a') && text.ends_with('b'), "{text:?}");
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
