//! What the demo claims, each claim held against what is known from elsewhere.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::guest::Words;
use super::story::{DISK, SERIAL};
use super::vm::in_words;
use crate::lab::disk;
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
        let known = disk::checksum(SERIAL);
        ensure!(
            found == known,
            "the guest reads a disk with SHA-256 {found}, outside it has {known}"
        );
        let (begin, end) = (&known[..8], &known[56..]);
        Ok(format!(
            "the guest read what lies in the disk's file outside: {begin}...{end}"
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
