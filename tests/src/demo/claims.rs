//! What the demo claims, each claim held against what is known from elsewhere.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::guest::Words;
use super::story::{DISK, SERIAL};
use super::vm::in_words;
use crate::protocol::Exit;

/// Counts of a group's devices, as `gantry group list --json` gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Pool {
    total: usize,
    used: usize,
    free: usize,
}

/// What was seen.
#[derive(Debug)]
pub struct Facts {
    /// What the guest said.
    pub words: Words,
    /// SHA-256 of the disk, computed outside the lab.
    pub checksum: String,
    /// How gantry ended.
    pub exit: Exit,
    /// The pool before, while and after the VM ran.
    pub pools: [Pool; 3],
    /// How many leases were held while and after it ran.
    pub locks: [usize; 2],
    /// The disk's driver at first and at last.
    pub drivers: [String; 2],
}

impl Facts {
    /// Fails at the first claim that does not hold; what was found about each.
    pub fn check(&self) -> Result<Vec<(&'static str, String)>> {
        Ok(vec![
            ("serial", self.serial()?),
            ("sha256", self.contents()?),
            ("msix", self.interrupts()?),
            ("exit", self.end()?),
            ("group", self.pool()?),
            ("driver", self.driver()?),
        ])
    }

    /// The last line, for scripts. `total` is the time of the whole demo in seconds.
    pub fn verdict(&self, total: f64) -> String {
        format!(
            "demo: ok device={DISK} sha256=match msix={} boot_ms={} total_s={total}",
            self.words.msix(),
            self.words.boot_ms().unwrap_or_default(),
        )
    }

    fn serial(&self) -> Result<String> {
        let found = self.words.answer("cat /sys/class/nvme");
        let found = found.context("the guest tells no serial number: it saw no NVMe disk")?;
        ensure!(
            found == SERIAL,
            "the guest's disk is {found}, QEMU was given {SERIAL}"
        );
        Ok(format!("the guest's disk is {found}, as QEMU was told"))
    }

    fn contents(&self) -> Result<String> {
        let found = self.words.answer("sha256sum");
        let found = found.context("the guest tells no checksum: it cannot read its disk")?;
        let known = &self.checksum;
        ensure!(
            found == known,
            "the guest reads a disk with SHA-256 {found}, outside it has {known}"
        );
        let begin: String = known.chars().take(12).collect();
        Ok(format!(
            "the guest read what lies in the disk's file outside: {begin}..."
        ))
    }

    fn interrupts(&self) -> Result<String> {
        let count = self.words.msix();
        ensure!(count > 0, "no MSI-X interrupt reached the guest");
        Ok(format!(
            "{count} interrupts went from the disk to the guest"
        ))
    }

    fn end(&self) -> Result<String> {
        ensure!(
            self.exit == Exit::Code(0),
            "`gantry run` ended: {}",
            in_words(&self.exit)
        );
        ensure!(
            self.words.boot_ms().is_some(),
            "the time of the guest's init was not noted"
        );
        Ok("the guest powered off, and gantry ended with status 0".into())
    }

    fn pool(&self) -> Result<String> {
        let [before, during, after] = self.pools;
        ensure!(
            before.used == 0 && before.free > 0 && before == after,
            "the pool was {before:?} before the VM and is {after:?} after it"
        );
        ensure!(
            during.used == 1 && during.free + 1 == before.free,
            "while the VM ran the pool was {during:?}"
        );
        let [held, left] = self.locks;
        ensure!(held > 0, "no lease was held while the VM ran");
        ensure!(left == 0, "{left} leases are still held");
        Ok(format!(
            "{} free before, {} while the VM ran, {} after; nothing is leased",
            before.free, during.free, after.free
        ))
    }

    fn driver(&self) -> Result<String> {
        let [before, after] = &self.drivers;
        ensure!(
            before == after && !after.is_empty(),
            "the disk had the driver {before:?} and now has {after:?}"
        );
        Ok(format!("the host's {after} driver has the disk again"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUM: &str = "4b476bd0fa5f";

    fn facts() -> Facts {
        facts_of(SERIAL, SUM, 2)
    }

    fn facts_of(serial: &str, checksum: &str, interrupts: u64) -> Facts {
        let mut words = Words::default();
        for line in [
            "host: 1.00 3.50",
            "guest# cat /sys/class/nvme/nvme0/serial",
            serial,
            "guest# sha256sum /dev/nvme0n1",
            checksum,
            "guest# grep nvme /proc/interrupts",
            &format!(" 25:  0  {interrupts}  PCI-MSIX-0000:01:00.0  0-edge  nvme0q0"),
        ] {
            words.hear(line);
        }
        let pool = |used| Pool {
            total: 1,
            used,
            free: 1 - used,
        };
        Facts {
            words,
            checksum: SUM.to_owned(),
            exit: Exit::Code(0),
            pools: [pool(0), pool(1), pool(0)],
            locks: [1, 0],
            drivers: ["nvme".into(), "nvme".into()],
        }
    }

    #[test]
    fn what_is_true_gives_the_verdict() {
        assert_eq!(facts().check().unwrap().len(), 6);
        assert_eq!(
            facts().verdict(31.0),
            "demo: ok device=0000:01:00.0 sha256=match msix=2 boot_ms=2500 total_s=31"
        );
    }

    #[test]
    fn nothing_false_passes() {
        type Change = fn(&mut Facts);
        let changes: [(&str, Change); 8] = [
            ("no serial number", |facts| facts.words = Words::default()),
            ("status 1", |facts| facts.exit = Exit::Code(1)),
            ("before the VM", |facts| facts.pools[2] = facts.pools[1]),
            ("before the VM", |facts| facts.pools[0] = facts.pools[1]),
            ("while the VM", |facts| facts.pools[1] = facts.pools[0]),
            ("no lease", |facts| facts.locks[0] = 0),
            ("still held", |facts| facts.locks[1] = 1),
            ("vfio-pci", |facts| facts.drivers[1] = "vfio-pci".into()),
        ];
        for (what, change) in changes {
            let mut facts = facts();
            change(&mut facts);
            let error = facts.check().unwrap_err().to_string();
            assert!(error.contains(what), "{what}: {error}");
        }
    }

    #[test]
    fn the_guest_is_not_believed() {
        for (facts, what) in [
            (facts_of("OTHER", SUM, 2), "disk is OTHER"),
            (facts_of(SERIAL, "0123456789ab", 2), "SHA-256"),
            (facts_of(SERIAL, SUM, 0), "no MSI-X"),
        ] {
            let error = facts.check().unwrap_err().to_string();
            assert!(error.contains(what), "{what}: {error}");
        }
    }
}
