//! The limit for pinned memory, and huge pages.

use std::path::Path;

use super::facts::{Facts, text};
use super::{Finding, Level};
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::facts::memlock;

/// The memory that the kernel reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// Bytes that this user may pin; none without a limit.
    pub(super) memlock: Option<u64>,
    /// Bytes of RAM; none if the kernel does not show it.
    pub(super) total: Option<u64>,
    /// When the kernel uses transparent huge pages: `always`, `madvise` or `never`; none if it cannot.
    pub(super) transparent: Option<String>,
    /// Pools of huge pages: size of a page in KiB, number of pages, free pages.
    pub(super) pools: Vec<(u64, u64, u64)>,
}

const MIB: u64 = 1 << 20;
/// The memory that a VM needs beside its RAM, as the check before a start counts it.
const SLACK: u64 = 64 * MIB;
/// The least RAM of a VM that gets a device.
const SMALL_VM: u64 = 256 * MIB;

impl Memory {
    pub(super) fn read(paths: &HostPaths) -> Self {
        let table = |path: &Path| sysfs::table(path).unwrap_or_default();
        let limits = table(&paths.proc.join("self/limits"));
        let status = table(&paths.proc.join("self/status"));
        let pages = paths.sysfs.join("kernel/mm/hugepages");
        let pool = |name: String| {
            let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            let number = |file: &str| text(&pages.join(&name).join(file)).parse().unwrap_or(0);
            Some((
                size.parse().ok()?,
                number("nr_hugepages"),
                number("free_hugepages"),
            ))
        };
        Self {
            memlock: soft_limit(&limits).and_then(|soft| memlock::limit(&status, soft)),
            total: total(&table(&paths.proc.join("meminfo"))),
            transparent: chosen(&text(
                &paths.sysfs.join("kernel/mm/transparent_hugepage/enabled"),
            )),
            pools: sysfs::entries(&pages)
                .unwrap_or_default()
                .into_iter()
                .filter_map(pool)
                .collect(),
        }
    }
}

/// Reads `Max locked memory  8388608  8388608  bytes` of /proc/self/limits; none if unlimited.
fn soft_limit(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"));
    line?.split_whitespace().next()?.parse().ok()
}

/// Reads `MemTotal:       16283644 kB` of /proc/meminfo.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 = line?.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// The word in brackets of `always [madvise] never`.
fn chosen(choices: &str) -> Option<String> {
    let (_, rest) = choices.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    vec![memlock(facts), huge_pages(facts)]
}

fn memlock(facts: &Facts) -> Finding {
    let finding =
        |level, reason: String| Finding::new("memlock", "Memory lock limit", level, reason);
    let Some(limit) = facts.memory.memlock else {
        return finding(Level::Ok, "this user may pin any amount of memory".into());
    };
    let total = facts.memory.total.unwrap_or(u64::MAX);
    if limit >= total {
        return finding(
            Level::Ok,
            format!("{} MiB, as much as this host has", limit / MIB),
        );
    }
    let largest = limit.saturating_sub(SLACK);
    let (level, what) = if largest < SMALL_VM {
        (Level::Fail, "no VM with a device can start".to_owned())
    } else {
        (
            Level::Warn,
            format!(
                "VMs with devices may have up to {} MiB of RAM",
                largest / MIB
            ),
        )
    };
    let reason = format!(
        "{} may pin {} MiB: {what}, since all RAM of such a VM is pinned, and 64 MiB more",
        facts.user,
        limit / MIB
    );
    // The limit is all of the host's RAM: no VM reaches it before the RAM is used up.
    let amount = facts
        .memory
        .total
        .map_or("unlimited".to_owned(), |bytes| (bytes / 1024).to_string());
    finding(level, reason)
        .lines(
            "a line of /etc/security/limits.d/gantry.conf, and log in again:",
            [format!("{} - memlock {amount}", facts.user)],
        )
        .lines(
            "for a systemd unit instead:",
            [if amount == "unlimited" {
                "LimitMEMLOCK=infinity".to_owned()
            } else {
                format!("LimitMEMLOCK={amount}K")
            }],
        )
}

fn huge_pages(facts: &Facts) -> Finding {
    let memory = &facts.memory;
    let word = "transparent_hugepage=madvise";
    let finding = |level, reason: String| Finding::new("huge-pages", "Huge pages", level, reason);
    let pool = |(size, number, free): &(u64, u64, u64)| {
        format!("{free} of {number} free pages of {} MiB", size / 1024)
    };
    let filled = memory.pools.iter().filter(|(_, number, _)| *number > 0);
    let pools: Vec<String> = filled.map(pool).collect();
    let pools = if pools.is_empty() {
        "no pools".to_owned()
    } else {
        pools.join(", ")
    };
    match memory.transparent.as_deref() {
        Some(mode @ ("always" | "madvise")) => {
            finding(Level::Ok, format!("transparent huge pages ({mode}); {pools}"))
        }
        Some(mode) => {
            let off = finding(
                Level::Warn,
                format!("transparent huge pages are off ({mode}): mapping RAM for devices takes far longer; {pools}"),
            )
            .lines(
                "now:",
                ["echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"],
            );
            if facts.cmdline.has(word) {
                return off.fix(format!(
                    "{word} is on the kernel's command line: a service has switched them off since the boot (tuned, \
                     sysfs.conf, tmpfiles.d)"
                ));
            }
            off.fix(format!(
                "for each boot, {word} on the kernel's command line, as shown below"
            ))
            .add([word])
        }
        None => finding(
            Level::Warn,
            format!("this kernel has no transparent huge pages: mapping RAM for devices takes far longer; {pools}"),
        )
        .fix("boot a kernel that has CONFIG_TRANSPARENT_HUGEPAGE, or use pools of huge pages for VMs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max locked memory         8388608              unlimited            bytes\n";
        assert_eq!(soft_limit(limits), Some(8 << 20));
        assert_eq!(
            soft_limit("Max locked memory         unlimited            unlimited"),
            None
        );
        assert_eq!(
            total("MemTotal:       16283644 kB\nMemFree: 1 kB"),
            Some(16_283_644 << 10)
        );
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!((chosen(""), total(""), soft_limit("")), (None, None, None));
    }
}
