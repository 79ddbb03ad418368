//! The demo's VM: gantry in the lab host, its console line by line, timed there.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::lab::channel::{Event, Process};
use crate::lab::{Host, command};
use crate::protocol::Exit;

/// The VM's whole life takes 5 s on an idle machine.
const PATIENCE: Duration = Duration::from_secs(150);

/// Runs gantry and notes the host's clock (`/proc/uptime`, in steps of 10 ms) at its start and when
/// the guest's init says its first word: the wire to this end is not part of the time.
const SCRIPT: &str = r#"
set -o pipefail
read -r started _ </proc/uptime
gantry run vm.json | {
    while IFS= read -r line; do
        printf '%s\n' "$line"
        case $line in "guest: init"*)
            read -r now _ </proc/uptime
            echo "host: $started $now"
            break ;;
        esac
    done
    cat
}"#;

/// How a command ended.
pub fn in_words(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("status {code}"),
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::NotStarted(why) => format!("not started, {why}"),
    }
}

/// What is heard next.
#[derive(Debug)]
pub enum Heard {
    /// A line of the guest's console.
    Line(String),
    /// gantry is over.
    Ended(Exit),
}

/// A VM that runs; dropping it kills it.
pub struct Vm<'h> {
    host: &'h Host,
    process: Process,
    console: PathBuf,
    log: File,
    waiting: Vec<u8>,
    errors: Vec<u8>,
    deadline: Instant,
}

impl<'h> Vm<'h> {
    /// Starts it; all that its console says is kept in the file `console`.
    pub fn start(host: &'h Host, console: &Path) -> Result<Self> {
        let log = File::create(console)
            .with_context(|| format!("cannot create {}", console.display()))?;
        Ok(Self {
            host,
            process: host.sh(SCRIPT).start()?,
            console: console.to_owned(),
            log,
            waiting: Vec::new(),
            errors: Vec::new(),
            deadline: Instant::now() + PATIENCE,
        })
    }

    /// Waits for the next line, or the end.
    pub fn next(&mut self) -> Result<Heard> {
        loop {
            if let Some(end) = self.waiting.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.waiting.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                return Ok(Heard::Line(line.trim_end().to_owned()));
            }
            match self.process.next(Some(self.deadline)) {
                Ok(Event::Stdout(data)) => {
                    self.log.write_all(&data)?;
                    self.waiting.extend(data);
                }
                Ok(Event::Stderr(data)) => self.errors.extend(data),
                Ok(Event::Hello) => {}
                Ok(Event::Exit(Exit::Code(0))) => return Ok(Heard::Ended(Exit::Code(0))),
                Ok(Event::Exit(exit)) => {
                    return Err(self.failure(&format!("`gantry run` ended: {}", in_words(&exit))));
                }
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                    return Err(self.failure(&format!("the VM is not over after {PATIENCE:?}")));
                }
                Err(_) => {
                    let words = self.host.last_words();
                    return Err(self.failure(&format!("the lab host is gone\n{words}")));
                }
            }
        }
    }

    /// Types a line end on the guest's console.
    pub fn press_enter(&self) -> Result<()> {
        let control = self.process.control();
        control.write(b"\n").context("the lab host is gone")
    }

    /// An error that quotes what gantry and the guest said last.
    pub fn failure(&self, what: &str) -> anyhow::Error {
        let errors = String::from_utf8_lossy(&self.errors);
        let mut text = format!("{what}\n{errors}");
        let console = command::tail(&self.console);
        if !console.is_empty() {
            text.push_str("The guest's console ends:\n");
            text.push_str(&console);
        }
        anyhow!("{}", text.trim_end())
    }
}
