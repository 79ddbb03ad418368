//! QEMU's monitor (QMP, `docs/interop/qmp-spec.rst`): faults and hot-plug from outside the host.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// The monitor, ready for commands.
#[derive(Debug)]
pub struct Monitor {
    input: BufReader<UnixStream>,
}

impl Monitor {
    /// Takes over the wire and leaves the greeting behind.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self {
            input: BufReader::new(stream),
        };
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Why QEMU ended, in the word of its event SHUTDOWN (`guest-shutdown`, `guest-reset` ...), once it has;
    /// nothing if it was killed.
    pub fn last_reason(&mut self) -> Option<String> {
        let mut reason = None;
        let mut line = String::new();
        while self.input.read_line(&mut line).is_ok_and(|read| read > 0) {
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event.get("event").and_then(Value::as_str) == Some("SHUTDOWN") {
                let told = event.pointer("/data/reason").and_then(Value::as_str);
                reason = told.map(str::to_owned);
            }
            line.clear();
        }
        reason
    }

    /// Runs `command` and returns what it says; events and the greeting are skipped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.input.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut line = String::new();
            let read = self
                .input
                .read_line(&mut line)
                .with_context(|| format!("QEMU does not answer to {command}"))?;
            if read == 0 {
                bail!("QEMU is gone");
            }
            let mut answer: Value = serde_json::from_str(&line)
                .with_context(|| format!("QEMU answers nonsense: {line}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_events() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .write_all(
                b"{\"QMP\": {}}\n{\"return\": {}}\n{\"event\": \"STOP\"}\n{\"return\": 7}\n\
                  {\"error\": {\"desc\": \"no\"}}\n",
            )
            .unwrap();
        let mut monitor = Monitor::new(ours).unwrap();
        assert_eq!(monitor.execute("a", json!({})).unwrap(), json!(7));
        let error = monitor.execute("b", json!({})).unwrap_err();
        assert!(error.to_string().contains("refuses b"), "{error}");
        drop(theirs);
        assert!(monitor.execute("c", json!({})).is_err());
    }

    #[test]
    fn the_reason_of_the_end_is_told() {
        let end = |last: &str| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let said = format!("{{\"QMP\": {{}}}}\n{{\"return\": {{}}}}\n{last}");
            theirs.write_all(said.as_bytes()).unwrap();
            let mut monitor = Monitor::new(ours).unwrap();
            drop(theirs);
            monitor.last_reason()
        };
        let off = "{\"event\": \"STOP\"}\n\
            {\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-shutdown\"}}\n";
        assert_eq!(end(off).as_deref(), Some("guest-shutdown"));
        assert_eq!(end(""), None, "killed");
    }
}
