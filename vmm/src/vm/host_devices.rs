//! The VM's side of its host devices: leases, IOMMU groups, DMA, and the functions themselves.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use gantry_devices::pci::{MsiRouter, PciSegment, PortIndex, SegmentError};
use gantry_resources::{HostDevice, HostPaths, Lease, ReservedKind, ReservedRegion};
use gantry_vfio::host::{Container, DmaMapping, DmaSpace, Group, VfioDevice};
use gantry_vfio::pci::PassthroughDevice;

use crate::control::Signals;
use crate::error::Error;
use crate::kvm::{Machine, VfioObserver};
use crate::memory::GuestRam;
use crate::sandbox::Sandbox;
use crate::threads::{self, Role, Task};

/// How long a group may stay busy after its device was leased: a holder that was killed keeps it
/// until the kernel has reset the device.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);

/// What a VM has of the host before it is built: leases, and groups joined in one container.
pub struct Claimed {
    // Dropped in this order: groups leave the container before others may lease the devices.
    joined: Option<Joined>,
    leases: Vec<Lease>,
    reserved: Vec<RangeInclusive<u64>>,
}

struct Joined {
    groups: BTreeMap<u32, Arc<Group>>,
    dma: DmaSpace,
}

/// A task that makes RAM present and maps it for the devices.
pub type DmaTask = Task<Result<Vec<DmaMapping>, gantry_vfio::Error>>;

/// One host device, open, and the lease under which it is.
///
/// Dropping it takes it out of its slot, closes it, and gives the lease back, in this order.
pub struct AttachedDevice {
    slot: Option<Slot>,
    function: Arc<PassthroughDevice>,
    lease: Lease,
}

/// Where a device is plugged in; dropping it unplugs the device.
struct Slot {
    pci: Arc<PciSegment>,
    port: PortIndex,
}

impl AttachedDevice {
    /// Puts the device behind a root port.
    ///
    /// # Errors
    /// There is no such port, or it is taken.
    pub fn plug(&mut self, pci: &Arc<PciSegment>, port: PortIndex) -> Result<(), SegmentError> {
        pci.attach(port, 0, self.function.clone())?;
        self.slot = Some(Slot {
            pci: Arc::clone(pci),
            port,
        });
        Ok(())
    }
}

impl Drop for AttachedDevice {
    fn drop(&mut self) {
        if self.function.reset_failed() {
            self.lease.set_aside("its reset failed");
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pci.detach(self.port, 0);
    }
}

type OpenTask = Task<Result<AttachedDevice, Error>>;

impl Claimed {
    /// Joins the groups of the leased devices in one container, known to KVM.
    ///
    /// # Errors
    /// A node is missing or not permitted, a group stays busy or is not whole, or the kernel refused.
    pub fn new(leases: Vec<Lease>, host: &HostPaths, machine: &Machine) -> Result<Self, Error> {
        let mut reserved = Vec::new();
        let mut numbers = Vec::new();
        for lease in &leases {
            let group = group_of(lease.device())?;
            if !numbers.contains(&group) {
                numbers.push(group);
                let regions = gantry_resources::reserved_regions(host, group)?;
                reserved.extend(regions.iter().filter_map(forbidden));
            }
        }
        let joined = if numbers.is_empty() {
            None
        } else {
            Some(join(&numbers, host, machine).inspect_err(|error| set_aside(&leases, error))?)
        };
        Ok(Self {
            joined,
            leases,
            reserved,
        })
    }

    /// How many devices there are.
    pub fn device_count(&self) -> usize {
        self.leases.len()
    }

    /// What must be neither RAM nor BAR.
    pub fn reserved(&self) -> &[RangeInclusive<u64>] {
        &self.reserved
    }

    /// What the IOMMU can map; empty where nothing restricts it.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>, Error> {
        match &self.joined {
            Some(joined) => Ok(joined
                .dma
                .container()
                .info()?
                .iova_ranges
                .unwrap_or_default()),
            None => Ok(Vec::new()),
        }
    }

    /// Begins to map all of RAM, once, for every device there is and will be. Ends early once a signal
    /// has come.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn map_ram(
        &self,
        ram: &GuestRam,
        sandbox: &Sandbox,
        signals: &Arc<Signals>,
    ) -> Result<Option<DmaTask>, Error> {
        let Some(joined) = &self.joined else {
            return Ok(None);
        };
        let dma = joined.dma.clone();
        let regions: Vec<_> = ram
            .regions()
            .iter()
            .map(|region| (region.guest, Arc::clone(&region.mapping)))
            .collect();
        let signals = Arc::clone(signals);
        let map = move || {
            let unwanted = || signals.check().is_err();
            regions
                .iter()
                .map(|(iova, memory)| dma.map(*iova, memory, unwanted))
                .collect()
        };
        threads::spawn(Role::Dma, sandbox, map)
            .map(Some)
            .map_err(Error::host("spawn a thread"))
    }

    /// Opens every device, side by side: the kernel resets each as it is opened, which takes a
    /// tenth of a second. In the order of the leases.
    ///
    /// # Errors
    /// No thread could be made. What opening itself has to say comes with each task.
    pub fn open(
        self,
        router: &Arc<dyn MsiRouter>,
        sandbox: &Sandbox,
    ) -> Result<Vec<OpenTask>, Error> {
        let Some(joined) = &self.joined else {
            return Ok(Vec::new());
        };
        let mut tasks = Vec::new();
        for lease in self.leases {
            let number = group_of(lease.device())?;
            let group = joined.groups.get(&number).map(Arc::clone);
            let group = group.ok_or(Error::NoIommuGroup {
                device: lease.device().bdf,
            })?;
            let router = Arc::clone(router);
            let open = move || {
                let io = VfioDevice::open(group, &lease.device().bdf.to_string())?;
                let function = PassthroughDevice::new(Arc::new(io), router)?;
                Ok(AttachedDevice {
                    slot: None,
                    function,
                    lease,
                })
            };
            let task = threads::spawn(Role::Device, sandbox, open);
            tasks.push(task.map_err(Error::host("spawn a thread"))?);
        }
        Ok(tasks)
    }
}

/// What a reserved region keeps from the guest. A relaxable one binds the host's own drivers only.
fn forbidden(region: &ReservedRegion) -> Option<RangeInclusive<u64>> {
    (region.kind != ReservedKind::DirectRelaxable).then_some(region.start..=region.end)
}

/// Closes devices side by side: the kernel resets each as it is closed.
pub fn close(devices: Vec<AttachedDevice>, sandbox: &Sandbox) {
    let closing: Vec<_> = devices
        .into_iter()
        // Without a thread the device has been dropped, hence closed, here.
        .filter_map(|device| threads::spawn(Role::Device, sandbox, move || drop(device)).ok())
        .collect();
    drop(closing);
}

fn group_of(device: &HostDevice) -> Result<u32, Error> {
    device
        .iommu_group
        .ok_or(Error::NoIommuGroup { device: device.bdf })
}

/// A group that stays busy after its device was leased is held by a process that the kernel cannot end,
/// or by one that keeps to no lease: none of its devices is fit for another VM.
fn set_aside(leases: &[Lease], error: &Error) {
    let Error::Vfio(gantry_vfio::Error::GroupInUse { group, .. }) = error else {
        return;
    };
    let of_group = leases
        .iter()
        .filter(|lease| lease.device().iommu_group == Some(*group));
    for lease in of_group {
        lease.set_aside(&error.to_string());
    }
}

fn join(numbers: &[u32], host: &HostPaths, machine: &Machine) -> Result<Joined, Error> {
    let observer = Arc::new(VfioObserver::new(machine.vm())?);
    let nodes = host.dev.join("vfio");
    let container = Arc::new(Container::open(&nodes)?);
    let mut groups = BTreeMap::new();
    for &number in numbers {
        let mut group = Group::open(&nodes, number, Arc::clone(&container), BUSY_PATIENCE)?;
        group.announce(observer.clone())?;
        groups.insert(number, Arc::new(group));
    }
    Ok(Joined {
        groups,
        dma: DmaSpace::new(container),
    })
}
