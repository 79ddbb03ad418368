//! External programs of the set-up (apt, make, cargo): run, logged, and quoted when they fail.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cleanup::OwnedChild;

/// How many lines of a log an error quotes.
const TAIL: usize = 15;

/// Runs `command` to its end with all its output in `log`; `watch` is called every 200 ms with the
/// log's path.
pub fn logged(command: &mut Command, log: &Path, watch: impl Fn(&Path)) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stderr(out.try_clone()?)
        .stdout(out);
    let child = OwnedChild::spawn(command).with_context(|| format!("cannot start {name}"))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        watch(log);
        std::thread::sleep(std::time::Duration::from_millis(200));
    };
    if !status.success() {
        bail!("{name} failed ({status}):\n{}", tail(log));
    }
    Ok(())
}

/// Runs `command` and returns its standard output.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{name} failed ({}):\n{}",
            output.status,
            last_lines(&errors)
        );
    }
    Ok(output.stdout)
}

/// The last lines of a file, indented; empty if it cannot be read.
pub fn tail(path: &Path) -> String {
    last_lines(&String::from_utf8_lossy(
        &fs::read(path).unwrap_or_default(),
    ))
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let from = lines.len().saturating_sub(TAIL);
    lines
        .iter()
        .skip(from)
        .map(|line| format!("  | {line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_quotes_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; exit 3"]);
        let error = logged(&mut command, &folder.path().join("log"), |_| {}).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("one") && text.contains("two"), "{text}");
        assert!(text.contains("exit status: 3"), "{text}");
    }
}
