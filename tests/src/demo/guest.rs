//! The guest's console, understood: what its init says at which of its commands.
//!
//! The other end is `show_disk` in `lab/guest-init.sh`: `guest# ` begins a command, `guest: ` a word
//! for programs, what follows a command is its output.

/// What one line of the console is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said<'a> {
    /// Init has begun, and the host's clock has been noted.
    Init,
    /// A command of the guest.
    Typed(&'a str),
    /// A line of its output.
    Printed(&'a str),
    /// The guest has said all and waits for a line.
    Waits,
    /// Nothing to show.
    Nothing,
}

/// All that was said.
#[derive(Debug, Default)]
pub struct Words {
    boot_ms: Option<u64>,
    /// Commands with their outputs.
    said: Vec<(String, Vec<String>)>,
}

impl Words {
    /// Takes the next line of the console.
    pub fn hear<'a>(&mut self, line: &'a str) -> Said<'a> {
        if let Some(clock) = line.strip_prefix("host: ") {
            self.boot_ms = elapsed(clock);
            return Said::Init;
        }
        if let Some(command) = line.strip_prefix("guest# ") {
            self.said.push((command.to_owned(), Vec::new()));
            return Said::Typed(command);
        }
        if line.starts_with("guest: waits") {
            return Said::Waits;
        }
        // The kernel writes to the console when it likes.
        let kernel = line.starts_with('[') && line.contains("] ");
        match self.said.last_mut() {
            Some((_, output)) if !kernel && !line.is_empty() && !line.starts_with("guest: ") => {
                output.push(line.to_owned());
                Said::Printed(line)
            }
            _ => Said::Nothing,
        }
    }

    /// From gantry's start to init, in ms, on the host's clock.
    pub fn boot_ms(&self) -> Option<u64> {
        self.boot_ms
    }

    /// First word that the command beginning with `command` printed.
    pub fn answer(&self, command: &str) -> Option<&str> {
        self.output(command)?.first()?.split_whitespace().next()
    }

    /// How many interrupts came by MSI-X: the sum over all vectors and processors.
    pub fn msix(&self) -> u64 {
        let lines = self
            .output("grep nvme /proc/interrupts")
            .unwrap_or_default();
        let counts = lines.iter().filter(|line| line.contains("MSIX"));
        counts.flat_map(|line| counters(line)).sum()
    }

    fn output(&self, command: &str) -> Option<&[String]> {
        let mut all = self.said.iter();
        let (_, output) = all.find(|(typed, _)| typed.starts_with(command))?;
        Some(output)
    }
}

/// `25:  10  0  PCI-MSIX-0000:01:00.0 ...`: the numbers after the vector's own.
fn counters(line: &str) -> impl Iterator<Item = u64> {
    line.split_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
}

/// Milliseconds between two times of `/proc/uptime`, `12.34 13.57`.
fn elapsed(times: &str) -> Option<u64> {
    let (from, to) = times.split_once(' ')?;
    let hundredths = |time: &str| {
        let (seconds, rest) = time.split_once('.')?;
        Some(seconds.parse::<u64>().ok()? * 100 + rest.parse::<u64>().ok()?)
    };
    Some(hundredths(to)?.checked_sub(hundredths(from)?)? * 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "\
[    1.000000] nvme nvme0: early
guest: init
host: 3.07 6.12
guest: cpus=2
guest# cat /sys/class/nvme/nvme0/serial
SERIAL1
[    4.100000] clocksource: late
guest# sha256sum /dev/nvme0n1
abc  /dev/nvme0n1
guest# grep nvme /proc/interrupts
 25:         10          2  PCI-MSIX-0000:01:00.0   0-edge      nvme0q0
 26:          0          7  PCI-MSIX-0000:01:00.0   1-edge      nvme0q1
 11:          5          5  IO-APIC   11-fasteoi   nvme0q0
guest: waits for a line
";

    #[test]
    fn a_console_is_understood() {
        let mut words = Words::default();
        let said: Vec<Said> = CONSOLE.lines().map(|line| words.hear(line)).collect();
        assert_eq!(
            said[..4],
            [Said::Nothing, Said::Nothing, Said::Init, Said::Nothing]
        );
        assert_eq!(said[5], Said::Printed("SERIAL1"));
        assert_eq!(said[6], Said::Nothing);
        assert_eq!(said.last(), Some(&Said::Waits));
        assert_eq!(words.boot_ms(), Some(3050));
        assert_eq!(words.answer("cat /sys"), Some("SERIAL1"));
        assert_eq!(words.answer("sha256sum"), Some("abc"));
        assert_eq!(words.answer("lspci"), None);
        assert_eq!(words.msix(), 19);
    }

    #[test]
    fn clocks_that_make_no_sense_give_no_time() {
        assert_eq!(elapsed("1.00 2.50"), Some(1500));
        assert_eq!(elapsed("2.00 1.00"), None);
        assert_eq!(elapsed("1 2"), None);
        assert_eq!(elapsed(""), None);
    }
}
