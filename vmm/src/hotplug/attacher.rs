//! Leases and opens devices for a VM that runs.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use gantry_devices::virtio::VirtioHost;
use gantry_resources::facts::VfioBackEnd;
use gantry_resources::opener::Opener;
use gantry_resources::pools::DeviceRequest;
use gantry_vfio::pci::Rom;

use super::job::{AttachJob, AttachSteps};
use super::ranges::GuestRanges;
use super::{DeviceContext, SlotDevice};
use crate::command::Attach;
use crate::config::DiskConfig;
use crate::disks::{self, OpenDisk};
use crate::error::Error;
use crate::host::preflight;
use crate::kvm::VfioObserver;
use crate::passthrough::{
    AcquiredDevices, Acquirer, DeviceError, IoAddressSpace, Lessor, Prefault, RomFiles, SentDevice,
};
use crate::process::error::cannot;
use crate::process::sandbox::Role;
use crate::process::threads::{self, Task};
use crate::virtio::VirtioDevice;

/// How often devices are leased again because their IOMMU group left the address space meanwhile.
const ACQUIRE_TRIES: u32 = 3;

/// Leases and opens devices while the guest runs.
pub struct Attacher {
    /// Who leases and opens.
    pub opener: Opener,
    /// The address space of the devices, as long as there are any.
    pub space: Weak<IoAddressSpace>,
    /// The kernel interface for devices.
    pub back_end: VfioBackEnd,
    /// Tells KVM of them.
    pub observer: Arc<VfioObserver>,
    /// RAM, which is mapped for the first device, and interrupts.
    pub guest: VirtioHost,
    /// The guest addresses that no device may reserve.
    pub ranges: GuestRanges,
    /// Bytes that the process may pin; none if there is no limit.
    pub memlock: Option<u64>,
    /// How many threads make RAM present for the first device.
    pub threads: usize,
    /// Whether the VM's file names the groups of later devices: RAM is prefaulted at boot then.
    pub declared: bool,
    /// The ROM files that devices can have.
    pub roms: RomFiles,
    /// What it needs of the process.
    pub context: DeviceContext,
}

impl Attacher {
    /// Leases and opens the devices of a job, and maps RAM for the first ones.
    ///
    /// # Errors
    /// A device is unavailable, or its IOMMU reserves guest addresses, or the VM is `ending`. No device is held
    /// then.
    pub fn attach(
        &mut self,
        job: &AttachJob,
        steps: &mut AttachSteps,
        ending: &Arc<AtomicBool>,
    ) -> Result<Vec<SlotDevice>, Error> {
        let cancelled = || ending.load(Ordering::Acquire);
        let (requests, sent) = match &job.attach {
            Attach::Devices(request) => (vec![request.clone()], None),
            Attach::Plan { name, .. } => {
                let planned = self.opener.plan(name).map_err(DeviceError::from)?;
                (planned, None)
            }
            Attach::Sent(_) if self.back_end != VfioBackEnd::Iommufd => {
                return Err(DeviceError::SentToContainer.into());
            }
            Attach::Sent(sent) => (vec![sent.request(&self.opener)?], Some(sent)),
            Attach::Disk { id, disk } => {
                let disk = DiskConfig {
                    id: id.clone().unwrap_or_default(),
                    ..disk.clone()
                };
                let device = self.disk(&disk, &cancelled)?;
                steps.done("open");
                return Ok(vec![SlotDevice::Virtio(device)]);
            }
        };
        self.opener.slots(job.slots).map_err(DeviceError::from)?;
        let roms = self.roms.of(&requests)?;
        let prefault = OnceCell::new();
        let on_new_space = || {
            prefault.get_or_init(|| self.prefault(ending));
        };
        let mut acquired = self.acquire(&requests, &roms, sent, &on_new_space, &cancelled)?;
        if let Some(id) = job.attach.id() {
            acquired.name_all(id);
        }
        steps.done("lease");
        self.check_reserved(&acquired)?;
        let space = acquired.space().cloned();
        let first = !space
            .as_ref()
            .is_some_and(|space| Arc::downgrade(space).ptr_eq(&self.space));
        let mapping = match space.as_ref().filter(|_| first) {
            Some(space) => {
                let begun = prefault.into_inner();
                let prefault = begun.unwrap_or_else(|| self.prefault(ending))?;
                Some(self.map(space, prefault, ending)?)
            }
            None => None,
        };
        let context = &self.context;
        let opening = acquired.open(&self.guest.router, &context.notify, &context.sandbox)?;
        let devices = opening.wait(&context.sandbox, cancelled);
        steps.done("open");
        let mapped = mapping.map_or(Ok(()), Task::join);
        steps.done("map");
        steps.mapped_late = first && !self.declared;
        let devices = devices?;
        mapped?;
        self.space = space.as_ref().map_or_else(Weak::new, Arc::downgrade);
        Ok(devices.into_iter().map(SlotDevice::Passed).collect())
    }

    /// Has a disk opened, and makes a device of it.
    fn disk(
        &self,
        config: &DiskConfig,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<VirtioDevice, Error> {
        let flags = disks::flags(config).bits();
        let opened = self.opener.file(&config.path, flags, cancelled);
        let disk = OpenDisk::later(config, opened.map_err(DeviceError::from)?)?;
        let context = self.context.virtio(self.guest.clone());
        Ok(disk.device(&context)?)
    }

    /// Leases the devices. They join the present address space, or a new one.
    fn acquire(
        &self,
        requests: &[DeviceRequest],
        roms: &[Rom],
        sent: Option<&SentDevice>,
        on_new_space: &dyn Fn(),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<AcquiredDevices, DeviceError> {
        let acquirer = Acquirer {
            lessor: Lessor::Opener(&self.opener),
            back_end: self.back_end,
            sent,
            on_new_space,
            observer: &self.observer,
            host: &self.context.host,
            sandbox: &self.context.sandbox,
        };
        let mut tries = 0;
        loop {
            match acquirer.acquire(requests, roms, self.space.upgrade(), cancelled) {
                // A group has left the address space meanwhile, with its last device.
                Err(DeviceError::NoIommuGroup { .. }) if tries < ACQUIRE_TRIES => tries += 1,
                acquired => return acquired,
            }
        }
    }

    fn check_reserved(&self, acquired: &AcquiredDevices) -> Result<(), DeviceError> {
        let Some(range) = self.ranges.conflict(acquired.reserved()) else {
            return Ok(());
        };
        let (start, last) = (*range.start(), *range.end());
        Err(match acquired.names().first().copied() {
            Some(device) => DeviceError::Clash {
                device,
                start,
                last,
            },
            None => DeviceError::Unmappable { start, last },
        })
    }

    /// Begins to make RAM present for the first device.
    fn prefault(&self, ending: &Arc<AtomicBool>) -> Result<Prefault, Error> {
        let ram = self.guest.ram.ranges();
        let bytes = ram.iter().map(|(_, memory)| memory.size() as u64);
        preflight::check_pinned(bytes.sum(), self.memlock)?;
        let sandbox = &self.context.sandbox;
        Ok(Prefault::start(ram, self.threads, ending, sandbox)?)
    }

    /// Begins to map RAM, which is made present, for the first device.
    fn map(
        &self,
        space: &Arc<IoAddressSpace>,
        prefault: Prefault,
        ending: &Arc<AtomicBool>,
    ) -> Result<Task<Result<(), DeviceError>>, Error> {
        let iova = space.iova_ranges()?;
        if let Some(ram) = self.ranges.unmappable(&iova) {
            return Err(DeviceError::Unmappable {
                start: *ram.start(),
                last: *ram.end(),
            }
            .into());
        }
        let sandbox = &self.context.sandbox;
        let (space, ram) = (Arc::clone(space), Arc::clone(self.guest.ram.ranges()));
        let ending = Arc::clone(ending);
        let map = move || {
            prefault.finish();
            space.map(&ram, || ending.load(Ordering::Acquire))
        };
        Ok(threads::spawn(Role::Dma, sandbox, map).map_err(cannot("spawn a thread"))?)
    }
}
