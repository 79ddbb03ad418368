//! What a device does, measured through VFIO: the same code on the host, and in a guest that has the device.
//!
//! A [`Subject`] is an open device with memory for its DMA. [`measure`] runs the tests of its kind and reports a
//! [`Figure`] for each, or why there is none.

mod any;
mod clock;
mod dma;
mod edu;
mod interrupt;
mod no_iommu;
mod nvme;
mod registers;
mod sysfs;

use std::time::Duration;

pub use clock::Samples;
pub use dma::DmaPages;
pub use no_iommu::open_without_iommu;
pub use sysfs::SysfsDevice;

use crate::host::{DeviceIo, Region};
use crate::{Error, Result};

/// An open device that is measured.
pub struct Subject<'a> {
    /// The device.
    pub io: &'a dyn DeviceIo,
    /// Memory that it can reach.
    pub memory: &'a DmaPages,
    /// How long each test takes.
    pub per_test: Duration,
}

/// What a device is, to its tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An NVMe controller.
    Nvme,
    /// A network controller.
    Nic,
    /// A display controller or a processing accelerator.
    Gpu,
    /// QEMU's device for teaching, which interrupts when it is told to.
    Edu,
    /// Any other.
    Other,
}

impl Kind {
    /// From the vendor and device ids and the class code (class, subclass, interface).
    pub fn of(vendor: u16, device: u16, class: u32) -> Self {
        match (vendor, device, class >> 16, class) {
            (0x1234, 0x11e8, ..) => Self::Edu,
            (.., 0x01_0802) => Self::Nvme,
            (_, _, 0x02, _) => Self::Nic,
            (_, _, 0x03 | 0x12, _) => Self::Gpu,
            _ => Self::Other,
        }
    }
}

/// What the numbers of a figure are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Of one operation; less is better.
    Nanoseconds,
    /// Operations in a second; more is better.
    PerSecond,
    /// Bytes in a second; more is better.
    BytesPerSecond,
}

/// What a test found.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// The test.
    pub test: String,
    /// Of its samples.
    pub unit: Unit,
    /// The samples.
    pub samples: Samples,
}

/// What a test reports.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// It has measured.
    Figure(Figure),
    /// There is nothing to measure.
    Lacking {
        /// The test.
        test: String,
        /// Why.
        why: String,
    },
}

/// Why there is no figure of interrupts.
const NOT_CONNECTED: &str = "neither MSI-X nor MSI of it can be connected";

/// Takes what the tests report, one after the other.
pub type Sink<'a> = dyn FnMut(Report) + 'a;

impl Subject<'_> {
    /// A number of 8, 16 or 32 bits in the configuration space, in little-endian order.
    fn config<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.io.read(Region::CONFIG, offset, &mut bytes)?;
        Ok(bytes)
    }

    /// What the device is.
    ///
    /// # Errors
    /// Its configuration space cannot be read.
    pub fn kind(&self) -> Result<Kind> {
        let [vendor, vendor_high, device, device_high] = self.config(0)?;
        let class = u32::from_le_bytes(self.config(8)?) >> 8;
        let vendor = u16::from_le_bytes([vendor, vendor_high]);
        Ok(Kind::of(
            vendor,
            u16::from_le_bytes([device, device_high]),
            class,
        ))
    }

    /// Has the device answer on its BARs and reach memory.
    fn enable(&self) -> Result<()> {
        const COMMAND: u64 = 4;
        const MEMORY_AND_MASTER: u8 = 0b110;
        let [low, high] = self.config(COMMAND)?;
        self.io
            .write(Region::CONFIG, COMMAND, &[low | MEMORY_AND_MASTER, high])
    }

    fn unusable(&self, why: impl Into<String>) -> Error {
        Error::Unusable {
            device: self.io.name().to_owned(),
            why: why.into(),
        }
    }
}

/// Runs the tests of the device's kind.
///
/// # Errors
/// The device or the kernel refused something that every device has.
pub fn measure(subject: &Subject<'_>, sink: &mut Sink<'_>) -> Result<()> {
    subject.enable()?;
    let kind = subject.kind()?;
    any::measure(subject, kind, sink)?;
    match kind {
        Kind::Nvme => or_lacking("read 4 KiB", nvme::measure(subject, sink), sink),
        Kind::Edu => or_lacking("interrupt", edu::measure(subject, sink), sink),
        Kind::Nic | Kind::Gpu | Kind::Other => {}
    }
    any::reset(subject, sink)
}

/// How many tests a device of a kind has, about: what progress is counted by.
pub fn tests_of(kind: Kind) -> u32 {
    match kind {
        Kind::Nvme => 11,
        Kind::Edu | Kind::Gpu => 8,
        Kind::Nic | Kind::Other => 5,
    }
}

/// Reports a failure as the reason that there is nothing to measure: the other tests go on.
fn or_lacking(test: &str, measured: Result<()>, sink: &mut Sink<'_>) {
    if let Err(error) = measured {
        let why = match (&error, std::error::Error::source(&error)) {
            (Error::Unusable { why, .. }, _) => why.clone(),
            (_, Some(source)) => format!("{error}: {source}"),
            (_, None) => error.to_string(),
        };
        lacking(test, why, sink);
    }
}

fn lacking(test: &str, why: impl Into<String>, sink: &mut Sink<'_>) {
    sink(Report::Lacking {
        test: test.to_owned(),
        why: why.into(),
    });
}

fn figure(test: impl Into<String>, unit: Unit, samples: Samples, sink: &mut Sink<'_>) {
    sink(Report::Figure(Figure {
        test: test.into(),
        unit,
        samples,
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_follows_from_ids_and_class() {
        for (vendor, device, class, kind) in [
            (0x1b36, 0x0010, 0x01_0802, Kind::Nvme),
            (0x8086, 0x10c9, 0x02_0000, Kind::Nic),
            (0x10de, 0x2330, 0x03_0200, Kind::Gpu),
            (0x1002, 0x74a1, 0x12_0000, Kind::Gpu),
            (0x1234, 0x11e8, 0x00_ff00, Kind::Edu),
            (0x8086, 0x2922, 0x01_0601, Kind::Other),
        ] {
            assert_eq!(Kind::of(vendor, device, class), kind, "{class:#x}");
        }
    }
}
