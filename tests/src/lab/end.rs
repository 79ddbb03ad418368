//! How a lab ended, in plain words.

use std::fmt;

/// What the host's console says when its kernel panics, and when its agent ends (see `lab/host-init.sh`).
const PANIC: &str = "Kernel panic";
const AGENT_ENDED: &str = "lab: the agent ended";

/// How a lab ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Somebody in it switched it off.
    PoweredOff,
    /// It died, and why.
    Lost(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PoweredOff => "it was powered off",
            Self::Lost(why) => why,
        })
    }
}

impl End {
    /// The end that these tell of: QEMU's exit status, the reason in its last event, the console's text.
    pub fn of(status: &str, reason: Option<&str>, console: &str) -> Self {
        let why = match reason {
            Some("guest-shutdown") => return Self::PoweredOff,
            Some("guest-reset") if console.contains(PANIC) => "its kernel panicked".to_owned(),
            Some("guest-reset") if console.contains(AGENT_ENDED) => {
                "a command detached the virtio console 0000:00:02.0, which the lab's agent needs, or \
                 ended the agent"
                    .to_owned()
            }
            Some("guest-reset") => "it was restarted, which ends a lab".to_owned(),
            Some(reason) => format!("QEMU ended: {reason}"),
            None => format!("QEMU ended: {status}"),
        };
        Self::Lost(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_in_plain_words() {
        let end = |reason, console| End::of("signal: 9 (SIGKILL)", reason, console);
        assert_eq!(end(Some("guest-shutdown"), ""), End::PoweredOff);
        let lost = |reason, console| match end(reason, console) {
            End::Lost(why) => why,
            End::PoweredOff => String::new(),
        };
        let panic = "[    9.0] Kernel panic - not syncing: sysrq triggered crash\n";
        assert!(lost(Some("guest-reset"), panic).contains("kernel panicked"));
        let agent = "[    9.0] lab: the agent ended with status 1\n";
        assert!(lost(Some("guest-reset"), agent).contains("virtio console 0000:00:02.0"));
        assert!(lost(Some("guest-reset"), "").contains("restarted"));
        assert!(lost(Some("host-signal"), "").contains("host-signal"));
        assert!(lost(None, "").contains("signal: 9"));
    }

    #[test]
    fn what_the_end_looks_for_is_what_init_says() {
        assert!(include_str!("../../lab/host-init.sh").contains(AGENT_ENDED));
    }
}
