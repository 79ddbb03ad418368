//! A VMM under measurement: a process on a terminal of its own, whose every line has its time.

use std::fs::{self, File};
use std::io::Read;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use super::{memory, now};

/// Where the VMM's own messages go.
const MESSAGES: &str = "/tmp/vmm-messages";
/// How long a VMM may take to end after SIGTERM.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// What the kernel still has to free after a VMM's end is freed by then.
const SETTLE: Duration = Duration::from_millis(200);

/// A line of the terminal, and when its end was seen.
struct Line {
    at: Duration,
    text: String,
}

/// The process. Dropping it kills it.
pub struct Vmm {
    child: Child,
    started: Duration,
    lines: Receiver<Line>,
    said: Vec<String>,
}

impl Vmm {
    /// Starts `argv` with a terminal as its standard input and output.
    pub fn start(argv: &[String]) -> Result<Self> {
        let (program, arguments) = argv.split_first().context("no program to measure")?;
        let pty = openpty(None, None).context("cannot open a terminal")?;
        let (sender, lines) = channel();
        let master = File::from(pty.master);
        thread::spawn(move || read_lines(master, &sender));
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(pty.slave.try_clone()?)
            .stdout(pty.slave)
            .stderr(File::create(MESSAGES)?);
        let started = now()?;
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        // With it go our copies of the terminal's far side.
        drop(command);
        Ok(Self {
            child,
            started,
            lines,
            said: Vec::new(),
        })
    }

    /// When it was started.
    pub fn started(&self) -> Duration {
        self.started
    }

    /// Waits for a line that contains `text`; when it came.
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> Result<Duration> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let found = line.text.contains(text);
                    self.said.push(line.text);
                    if found {
                        return Ok(line.at);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no \"{text}\" within {patience:?}\n{}", self.last_words())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait()?;
                    bail!(
                        "it ended ({status}) before \"{text}\"\n{}",
                        self.last_words()
                    )
                }
            }
        }
    }

    /// The last line that was waited for.
    pub fn last_line(&self) -> &str {
        self.said.last().map_or("", String::as_str)
    }

    /// Processor time so far, user and system, of the process and its children.
    pub fn cpu_time(&self) -> Result<Duration> {
        let mut total = Duration::ZERO;
        for pid in self.processes() {
            let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))
                .with_context(|| format!("process {pid} has no clock"))?;
            total += Duration::from(clock_gettime(clock).context("cannot read a CPU clock")?);
        }
        Ok(total)
    }

    /// PSS of the process and its children without the guest's RAM of `ram` KiB, in KiB.
    pub fn memory_beyond(&self, ram: u64) -> Result<u64> {
        let mut sum = 0;
        for pid in self.processes() {
            let path = format!("/proc/{pid}/smaps");
            let smaps = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            let mappings = memory::parse(&smaps);
            let beyond = memory::beyond_ram(&mappings, ram);
            // A child that has been exec'd has no RAM of the guest.
            let child = pid != self.child.id();
            sum += beyond
                .or_else(|| child.then(|| memory::total(&mappings)))
                .with_context(|| format!("no mappings of {path} add up to the RAM's {ram} KiB"))?;
        }
        Ok(sum)
    }

    /// PSS of the processes that it has started, in KiB.
    pub fn helpers_memory(&self) -> Result<u64> {
        let helpers = self.processes().into_iter().skip(1);
        helpers
            .map(|pid| {
                let path = format!("/proc/{pid}/smaps");
                let smaps =
                    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
                Ok(memory::total(&memory::parse(&smaps)))
            })
            .sum()
    }

    /// Ends it, by force if it must be.
    pub fn end(mut self) -> Result<()> {
        // Fails only when it has ended by itself.
        let _ = kill(
            Pid::from_raw(self.child.id().cast_signed()),
            Signal::SIGTERM,
        );
        let deadline = Instant::now() + END_PATIENCE;
        while Instant::now() < deadline {
            if self.child.try_wait()?.is_some() {
                thread::sleep(SETTLE);
                return Ok(());
            }
            thread::sleep(Duration::from_millis(5));
        }
        bail!(
            "it did not end within {END_PATIENCE:?}\n{}",
            self.last_words()
        )
    }

    /// The process and all below it.
    fn processes(&self) -> Vec<u32> {
        let mut found = vec![self.child.id()];
        let mut next = 0;
        while let Some(pid) = found.get(next).copied() {
            let tasks = fs::read_dir(format!("/proc/{pid}/task"));
            for task in tasks.into_iter().flatten().flatten() {
                let children = fs::read_to_string(task.path().join("children"));
                let children = children.unwrap_or_default();
                found.extend(
                    children
                        .split_whitespace()
                        .filter_map(|pid| pid.parse::<u32>().ok()),
                );
            }
            next += 1;
        }
        found
    }

    /// What its threads do, and the end of what it and its guest said.
    fn last_words(&self) -> String {
        let messages = fs::read_to_string(MESSAGES).unwrap_or_default();
        let said = self.said.iter().map(|line| line.trim_end());
        format!(
            "its threads:\n{}its messages:\n{}its guest's last lines:\n{}",
            self.threads(),
            tail(messages.lines()),
            tail(said)
        )
    }

    /// A line for each thread: its name, its state, its system call's number and arguments, and the
    /// innermost function of the kernel that it is in.
    fn threads(&self) -> String {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let mut lines = Vec::new();
        for task in tasks.into_iter().flatten().flatten() {
            let read = |file: &str| {
                let text = fs::read_to_string(task.path().join(file)).unwrap_or_default();
                text.lines().next().unwrap_or_default().to_owned()
            };
            let stat = read("stat");
            let state = stat
                .rsplit(") ")
                .next()
                .and_then(|rest| rest.chars().next());
            lines.push(format!(
                "{} {} {} {}",
                read("comm"),
                state.unwrap_or('?'),
                read("syscall"),
                read("stack")
            ));
        }
        tail(lines.iter().map(String::as_str))
    }
}

/// The last few lines, indented.
fn tail<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    const MOST: usize = 12;
    let lines: Vec<&str> = lines.collect();
    let from = lines.len().saturating_sub(MOST);
    let last = lines.iter().skip(from);
    last.map(|line| format!("  | {line}\n")).collect()
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Fails only when it is gone and waited for.
        let _ = self.child.kill();
        let deadline = Instant::now() + END_PATIENCE;
        // Not for ever: one that is stuck in the kernel must not take the report with it.
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Sends each line with the time of its end, until the terminal's last user is gone.
fn read_lines(mut from: File, to: &Sender<Line>) {
    let mut buffer = [0; 4096];
    let mut line = Vec::new();
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let Ok(at) = now() else { return };
        for byte in buffer.iter().take(read) {
            line.push(*byte);
            if *byte == b'\n' {
                let text = String::from_utf8_lossy(&line).into_owned();
                line.clear();
                if to.send(Line { at, text }).is_err() {
                    return;
                }
            }
        }
    }
}
