//! Whether a function answers on its bus.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;

/// The offset of revision and class. A virtual function has no vendor and device id of its own.
const CLASS: u64 = 0x08;

/// The configuration space of a function, open.
#[derive(Debug)]
pub(crate) struct ConfigSpace(File);

impl ConfigSpace {
    /// Opens the configuration space of a function; none if it cannot be opened.
    pub(crate) fn open(paths: &HostPaths, bdf: HostBdf) -> Option<Self> {
        let file = File::open(paths.pci_device(bdf).join("config"));
        file.ok().map(Self)
    }

    /// Whether the function does not answer: a device that is off the bus reads all-ones (PCIe 2.3.2,
    /// completion with an error). A function that the kernel has removed does not count as dead.
    ///
    /// The kernel first wakes a sleeping function, and may wait a minute for one that does not wake.
    pub(crate) fn is_dead(&self) -> bool {
        let mut class = [0; 4];
        self.0.read_exact_at(&mut class, CLASS).is_ok() && class == [0xff; 4]
    }
}
