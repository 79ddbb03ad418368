//! Counters of a device: accesses, resets and failures.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gantry_devices::mapping::HostMapping;
use gantry_devices::pci::registers::{COMMAND, COMMAND_IO, COMMAND_MEMORY};
use gantry_devices::pci::{BarSpace, PciDevice};
use gantry_vfio::host::{DeviceIo, Irq, IrqInfo, MmapArea, Region, RegionInfo};
use gantry_vfio::pci::PassthroughDevice;
use vmm_sys_util::eventfd::EventFd;

use super::events::DeviceEvent;
use crate::info::DeviceCounters;

/// The counters of one device.
#[derive(Default)]
pub struct AccessCounters {
    reads: [AtomicU64; Region::COUNT],
    writes: [AtomicU64; Region::COUNT],
    mapped: AtomicU64,
    resets: AtomicU64,
    errors: AtomicU64,
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl AccessCounters {
    /// Counts an error that the device itself has reported.
    pub fn failed(&self) {
        add(&self.errors, 1);
    }

    /// Fills in what was counted.
    pub fn read(&self, into: &mut DeviceCounters) {
        let by_region = |counters: &[AtomicU64; Region::COUNT]| -> BTreeMap<String, u64> {
            let counted = Region::all().zip(counters);
            let counted = counted.map(|(region, count)| (region, count.load(Ordering::Relaxed)));
            counted
                .filter(|(_, count)| *count > 0)
                .map(|(region, count)| (region.to_string(), count))
                .collect()
        };
        into.trapped_reads = by_region(&self.reads);
        into.trapped_writes = by_region(&self.writes);
        into.bytes_mapped = self.mapped.load(Ordering::Relaxed);
        into.resets = self.resets.load(Ordering::Relaxed);
        into.errors = self.errors.load(Ordering::Relaxed);
    }
}

/// A device whose regions are reached through counters. [`CountingFunction`] counts accesses to the
/// configuration space, as most of them do not reach the device.
pub struct CountingIo {
    io: Box<dyn DeviceIo>,
    counters: Arc<AccessCounters>,
}

impl CountingIo {
    /// AccessCounters what goes to `io`.
    pub fn new(io: impl DeviceIo + 'static, counters: &Arc<AccessCounters>) -> Self {
        let counters = Arc::clone(counters);
        Self {
            io: Box::new(io),
            counters,
        }
    }

    /// Counts a reset, unless there was none.
    fn reset_once(&self, reset: gantry_vfio::Result<()>) -> gantry_vfio::Result<()> {
        if !matches!(&reset, Err(error) if error.is_unsupported()) {
            add(&self.counters.resets, 1);
        }
        self.failed(reset)
    }

    fn failed<T>(&self, result: gantry_vfio::Result<T>) -> gantry_vfio::Result<T> {
        result.inspect_err(|error| {
            if !error.is_unsupported() {
                add(&self.counters.errors, 1);
            }
        })
    }
}

fn count(counters: &[AtomicU64; Region::COUNT], region: Region) {
    if region == Region::CONFIG {
        return;
    }
    if let Some(counter) = counters.get(region.index()) {
        add(counter, 1);
    }
}

impl DeviceIo for CountingIo {
    fn name(&self) -> &str {
        self.io.name()
    }

    fn region(&self, region: Region) -> &RegionInfo {
        self.io.region(region)
    }

    fn irq(&self, irq: Irq) -> IrqInfo {
        self.io.irq(irq)
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> gantry_vfio::Result<()> {
        count(&self.counters.reads, region);
        self.failed(self.io.read(region, offset, data))
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> gantry_vfio::Result<()> {
        count(&self.counters.writes, region);
        self.failed(self.io.write(region, offset, data))
    }

    fn map(&self, region: Region, part: MmapArea) -> gantry_vfio::Result<Arc<HostMapping>> {
        let mapped = self.failed(self.io.map(region, part))?;
        add(&self.counters.mapped, part.len);
        Ok(mapped)
    }

    fn set_irqs(
        &self,
        irq: Irq,
        start: u32,
        triggers: &[Option<&EventFd>],
    ) -> gantry_vfio::Result<()> {
        self.failed(self.io.set_irqs(irq, start, triggers))
    }

    fn unmask_by(&self, irq: Irq, resample: &EventFd) -> gantry_vfio::Result<()> {
        self.failed(self.io.unmask_by(irq, resample))
    }

    fn disable_irqs(&self, irq: Irq) -> gantry_vfio::Result<()> {
        self.failed(self.io.disable_irqs(irq))
    }

    fn reset(&self) -> gantry_vfio::Result<()> {
        self.reset_once(self.io.reset())
    }

    fn on_bus(&self) -> &[String] {
        self.io.on_bus()
    }

    fn reset_bus(&self) -> gantry_vfio::Result<()> {
        self.reset_once(self.io.reset_bus())
    }
}

/// A function with its configuration accesses counted. Reports when the guest enables it, and when it falls silent.
pub struct CountingFunction {
    function: Arc<PassthroughDevice>,
    counters: Arc<AccessCounters>,
    notify: Box<dyn Fn(DeviceEvent) + Send + Sync>,
}

impl CountingFunction {
    /// Watches `function`, and calls `notify` each time it begins to decode or falls silent.
    pub fn new(
        function: Arc<PassthroughDevice>,
        counters: &Arc<AccessCounters>,
        notify: impl Fn(DeviceEvent) + Send + Sync + 'static,
    ) -> Self {
        Self {
            function,
            counters: Arc::clone(counters),
            notify: Box::new(notify),
        }
    }

    /// The function itself.
    pub fn function(&self) -> &PassthroughDevice {
        &self.function
    }

    /// What was counted.
    pub fn counters(&self) -> &AccessCounters {
        &self.counters
    }

    fn tell_of_silence(&self) {
        if self.function.has_fallen_silent() {
            (self.notify)(DeviceEvent::Silent);
        }
    }

    fn decodes(&self) -> bool {
        let mut command = [0; 2];
        self.function.read_config(COMMAND, &mut command);
        u16::from_le_bytes(command) & (COMMAND_MEMORY | COMMAND_IO) != 0
    }
}

impl PciDevice for CountingFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if let Some(counter) = self.counters.reads.get(Region::CONFIG.index()) {
            add(counter, 1);
        }
        self.function.read_config(offset, data);
        self.tell_of_silence();
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        if let Some(counter) = self.counters.writes.get(Region::CONFIG.index()) {
            add(counter, 1);
        }
        // The register's first byte has the bits; writes are aligned and at most four bytes.
        if offset != COMMAND {
            return self.function.write_config(offset, data);
        }
        let before = self.decodes();
        let remap = self.function.write_config(offset, data);
        if !before && self.decodes() {
            (self.notify)(DeviceEvent::Enabled);
        }
        remap
    }

    fn remap(&self, space: &dyn BarSpace) {
        self.function.remap(space);
    }

    fn reset(&self, space: &dyn BarSpace) -> io::Result<()> {
        let reset = self.function.reset(space);
        self.tell_of_silence();
        reset
    }
}

/// Interrupts by vector of each device, from `/proc/interrupts` (Linux: vfio-pci names its handlers
/// `vfio-msix[3](0000:01:00.0)`).
pub fn interrupts(text: &str) -> BTreeMap<String, BTreeMap<u16, u64>> {
    let mut devices: BTreeMap<String, BTreeMap<u16, u64>> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let handler = words.clone().next_back();
        let Some((vector, device)) = handler.and_then(handler_of) else {
            continue;
        };
        words.next();
        let counters = words.map_while(|word| word.parse::<u64>().ok());
        devices
            .entry(device.to_owned())
            .or_default()
            .insert(vector, counters.sum());
    }
    devices
}

fn handler_of(word: &str) -> Option<(u16, &str)> {
    let word = word.strip_prefix("vfio-")?;
    if let Some(device) = word.strip_prefix("intx(") {
        return Some((0, device.strip_suffix(')')?));
    }
    let word = word.strip_prefix("msi")?;
    let word = word.strip_prefix('x').unwrap_or(word);
    let (vector, device) = word.strip_prefix('[')?.split_once("](")?;
    Some((vector.parse().ok()?, device.strip_suffix(')')?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_summed_over_the_processors() {
        let text = "\
           CPU0       CPU1
  1:          9          0  IO-APIC    1-edge      i8042
 24:         12          3  IR-PCI-MSIX-0000:01:00.0    0-edge      vfio-msix[0](0000:01:00.0)
 25:          0         67  IR-PCI-MSIX-0000:01:00.0    1-edge      vfio-msix[1](0000:01:00.0)
 26:          1          0  IR-PCI-MSIX-0000:02:00.0    0-edge      vfio-msix[x](0000:02:00.0)
 27:          3          1  IR-PCI-MSI-0000:03:00.0    0-edge      vfio-msi[0](0000:03:00.0)
 28:          0          6  IR-IO-APIC   16-fasteoi   vfio-intx(0000:04:00.0)
NMI:          0          0   Non-maskable interrupts
";
        let first = BTreeMap::from([(0, 15), (1, 67)]);
        assert_eq!(
            interrupts(text),
            BTreeMap::from([
                ("0000:01:00.0".to_owned(), first),
                ("0000:03:00.0".to_owned(), BTreeMap::from([(0, 4)])),
                ("0000:04:00.0".to_owned(), BTreeMap::from([(0, 6)])),
            ])
        );
    }
}
