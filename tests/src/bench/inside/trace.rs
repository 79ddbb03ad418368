//! The kernel's tracepoints, through tracefs (`Documentation/trace/events.rst`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

const ROOT: &str = "/sys/kernel/tracing";

/// The first `kvm_exit` ends the recording of `kvm_entry`: one is recorded, and all later ones cost
/// next to nothing. (A trigger of its own would act before the first is written.)
const ONCE: &str = "disable_event:kvm:kvm_entry:1";
const ONCE_FILE: &str = "events/kvm/kvm_exit/trigger";

/// A tracepoint that was hit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// When, on CLOCK_MONOTONIC.
    pub at: Duration,
    /// What it says.
    pub text: String,
}

/// Records one event until it is stopped or dropped.
#[derive(Debug)]
pub struct Tracer {
    event: &'static str,
    once: bool,
}

impl Tracer {
    /// Records the first `kvm_entry` from now on, cheaply enough for a timed run.
    pub fn first_entry() -> Result<Self> {
        Self::start("kvm_entry", true, 64)
    }

    /// Records every `kvm_userspace_exit` from now on.
    pub fn exits() -> Result<Self> {
        Self::start("kvm_userspace_exit", false, 8 << 10)
    }

    fn start(event: &'static str, once: bool, buffer_kib: u32) -> Result<Self> {
        let tracer = Self { event, once };
        set("tracing_on", "0")?;
        set("trace_clock", "mono")?;
        set("buffer_size_kb", &buffer_kib.to_string())?;
        // When it is full, what came first is kept.
        set("options/overwrite", "0")?;
        set("trace", "")?;
        if once {
            set(ONCE_FILE, ONCE)?;
        }
        set(&tracer.enable(), "1")?;
        set("tracing_on", "1")?;
        Ok(tracer)
    }

    /// Ends the recording; everything that was recorded, oldest first.
    pub fn stop(self) -> Result<Vec<Hit>> {
        set("tracing_on", "0")?;
        let lost = lost()?;
        if lost > 0 {
            bail!(
                "{lost} events of {} did not fit the trace buffer",
                self.event
            );
        }
        let trace = read(&Path::new(ROOT).join("trace"))?;
        Ok(trace
            .lines()
            .filter_map(|line| parse(line, self.event))
            .collect())
    }

    fn enable(&self) -> String {
        format!("events/kvm/{}/enable", self.event)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // Each fails only where `start` has failed before.
        let _ = set("tracing_on", "0");
        let _ = set(&self.enable(), "0");
        if self.once {
            let _ = set(ONCE_FILE, &format!("!{ONCE}"));
        }
    }
}

/// The reason in a `kvm_userspace_exit`, as in `reason KVM_EXIT_IO (2)`.
pub fn reason(text: &str) -> String {
    let word = text.split_whitespace().nth(1).unwrap_or(text);
    word.strip_prefix("KVM_EXIT_")
        .unwrap_or(word)
        .to_lowercase()
}

/// `  vcpu 0-117   [001] d..1.   12.345678: kvm_entry: vcpu 0, rip 0xfff0`
fn parse(line: &str, event: &str) -> Option<Hit> {
    let (before, text) = line.split_once(&format!(": {event}: "))?;
    let seconds = before.split_whitespace().last()?;
    Some(Hit {
        at: Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?,
        text: text.to_owned(),
    })
}

/// How many events were not recorded, over all processors.
fn lost() -> Result<u64> {
    let mut lost = 0;
    for entry in fs::read_dir(Path::new(ROOT).join("per_cpu"))? {
        let stats = read(&entry?.path().join("stats"))?;
        lost += stats
            .lines()
            .filter_map(|line| line.split_once(": "))
            .filter(|(key, _)| ["overrun", "dropped events"].contains(key))
            .filter_map(|(_, count)| count.trim().parse::<u64>().ok())
            .sum::<u64>();
    }
    Ok(lost)
}

fn set(file: &str, value: &str) -> Result<()> {
    let path: PathBuf = Path::new(ROOT).join(file);
    fs::write(&path, value)
        .with_context(|| format!("cannot write \"{value}\" to {}", path.display()))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_parsed() {
        let line = "   a name: x-117  [001] d..1.   12.345678: kvm_entry: vcpu 0, rip 0xfff0";
        let hit = parse(line, "kvm_entry").unwrap();
        assert_eq!(hit.at, Duration::from_micros(12_345_678));
        assert_eq!(hit.text, "vcpu 0, rip 0xfff0");
        assert!(parse("# entries-in-buffer/entries-written: 1/1", "kvm_entry").is_none());
        assert!(parse(line, "kvm_exit").is_none());
    }

    #[test]
    fn reasons_are_named() {
        assert_eq!(reason("reason KVM_EXIT_MMIO (6)"), "mmio");
        assert_eq!(reason("reason restart (4)"), "restart");
    }
}
