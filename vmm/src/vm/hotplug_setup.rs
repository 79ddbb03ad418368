//! What a VM needs for devices that are attached later: the opener, its limit, and the attach worker.

use std::num::NonZeroUsize;
use std::sync::{Arc, Weak};
use std::thread::available_parallelism;

use gantry_devices::virtio::VirtioHost;
use gantry_resources::base::HostPaths;
use gantry_resources::facts::memlock_limit;
use gantry_resources::holding::Holder;
use gantry_resources::opener::{Limit, Opener};

use super::{Event, VmContext};
use crate::config::VmConfig;
use crate::error::Error;
use crate::host::placement::VmPlacement;
use crate::hotplug::{AttachWorker, Attacher, GuestRanges};
use crate::kvm::{KvmVm, VfioObserver};
use crate::layout::Layout;
use crate::passthrough::{DeviceError, IoAddressSpace, RomFiles};
use crate::process::error::HostError;

/// More threads than this slow each other down when they populate memory.
const POPULATE_THREADS: usize = 4;
/// Processors that the populating threads leave free: for the guest, and for the thread that maps memory.
const OTHER_THREADS: usize = 2;
/// The functions that one slot can hold.
const FUNCTIONS: usize = 8;

/// What it takes to attach devices later.
pub struct HotplugSetup {
    /// Leases and opens the devices of the VM.
    pub opener: Opener,
    /// Tells KVM of them.
    pub observer: Arc<VfioObserver>,
    /// The ROM files that they can have.
    pub roms: RomFiles,
}

impl HotplugSetup {
    /// Starts the opener.
    ///
    /// # Errors
    /// The opener cannot be started, or KVM refused.
    pub fn new(
        host: &HostPaths,
        holder: &Holder,
        kvm: &KvmVm,
        roms: RomFiles,
    ) -> Result<Self, Error> {
        Ok(Self {
            opener: Opener::start(host, holder).map_err(DeviceError::from)?,
            observer: Arc::new(VfioObserver::new(kvm.vm())?),
            roms,
        })
    }

    /// Later devices are chosen for the VM's placement and within the limit.
    ///
    /// # Errors
    /// The opener does not answer.
    pub fn confine(&self, placement: &VmPlacement, limit: Limit) -> Result<(), DeviceError> {
        self.opener.place(placement.for_devices())?;
        Ok(self.opener.limit(limit)?)
    }

    /// Starts the attach worker. Devices join the address space `space`, if there is one.
    ///
    /// # Errors
    /// The kernel makes no thread.
    pub fn worker(
        self,
        space: Option<&Arc<IoAddressSpace>>,
        config: &VmConfig,
        guest: VirtioHost,
        layout: &Layout,
        context: &VmContext,
    ) -> Result<AttachWorker, HostError> {
        let attacher = Attacher {
            opener: self.opener,
            back_end: config.back_end_on(&context.host),
            observer: self.observer,
            guest,
            space: space.map_or_else(Weak::new, Arc::downgrade),
            ranges: guest_ranges(layout),
            memlock: memlock_limit(&context.host),
            threads: populate_threads(available_parallelism().map_or(1, NonZeroUsize::get)),
            declared: !config.hotplug.from.is_empty(),
            roms: self.roms,
            context: context.for_devices(),
        };
        let mailbox = Arc::clone(&context.mailbox);
        AttachWorker::start(attacher, move || mailbox.post(Event::AttachDone))
    }
}

/// How many threads populate memory beside the one that maps it.
fn populate_threads(processors: usize) -> usize {
    processors
        .saturating_sub(OTHER_THREADS)
        .min(POPULATE_THREADS)
}

/// What may be attached while the VM runs. `ports` is the number of slots that are taken at boot.
pub fn limit(config: &VmConfig, ports: usize) -> Limit {
    let slots = ports + usize::from(config.hotplug.slots);
    let files = config.later_disks();
    Limit {
        from: config.hotplug.from.clone(),
        ungrouped: config.hotplug.ungrouped,
        most: slots * FUNCTIONS,
        read: files.read,
        write: files.write,
    }
}

/// The guest addresses that later devices must not reserve.
fn guest_ranges(layout: &Layout) -> GuestRanges {
    let ram = layout.ram.iter();
    let bridges = layout.bridges.iter();
    GuestRanges {
        ram: ram.map(|range| range.start..=range.end() - 1).collect(),
        windows: bridges
            .flat_map(|bridge| [bridge.mem32.clone(), bridge.mem64.clone()])
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_made_present_by_processors_that_have_nothing_else_to_do() {
        let threads = [1, 2, 3, 6, 64].map(populate_threads);
        assert_eq!(threads, [0, 0, 1, 4, 4]);
    }
}
