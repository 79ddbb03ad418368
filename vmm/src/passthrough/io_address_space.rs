//! The DMA address space of a VM: IOMMU groups, and RAM that is mapped once for all devices.
//!
//! Only this file knows that it is a VFIO type 1 container.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use gantry_devices::mapping::HostMapping;
use gantry_resources::base::DeviceName;
use gantry_resources::opener::BUSY_PATIENCE;
use gantry_vfio::host::{Container, DmaMapping, DmaSpace, Group};

use super::error::DeviceError;
use crate::kvm::VfioObserver;

/// Guest RAM for DMA: first address and memory of each range.
pub type RamRanges = Arc<[(u64, Arc<HostMapping>)]>;

/// The DMA address space of a VM while it has devices. Each device holds a reference. When the last one goes,
/// RAM is unmapped; a later device makes a new address space.
pub struct IoAddressSpace {
    // Dropped before the container, and after the devices and their groups.
    mappings: Mutex<Vec<DmaMapping>>,
    groups: Mutex<BTreeMap<u32, Weak<Group>>>,
    devices: Mutex<BTreeSet<DeviceName>>,
    dma: DmaSpace,
    container: Arc<Container>,
    observer: Arc<VfioObserver>,
}

impl IoAddressSpace {
    /// An address space without groups. Opens its node in the device directory `nodes`, unless the opener has
    /// (`node`). KVM is told of the groups through `observer`.
    ///
    /// # Errors
    /// The node is missing or not permitted, or the kernel has no such IOMMU.
    pub fn open(
        nodes: &Path,
        node: Option<File>,
        observer: &Arc<VfioObserver>,
    ) -> Result<Arc<Self>, DeviceError> {
        let container = match node {
            Some(file) => Container::new(file, &nodes.join("vfio"))?,
            None => Container::open(nodes)?,
        };
        let container = Arc::new(container);
        Ok(Arc::new(Self {
            mappings: Mutex::default(),
            groups: Mutex::default(),
            devices: Mutex::default(),
            dma: DmaSpace::new(container.clone()),
            container,
            observer: Arc::clone(observer),
        }))
    }

    /// The groups that are in it. The kernel keeps the address space while somebody keeps one of them.
    pub fn groups(&self) -> Vec<Arc<Group>> {
        self.lock().values().filter_map(Weak::upgrade).collect()
    }

    /// The numbers of the groups that are in it.
    pub fn group_numbers(&self) -> Vec<u32> {
        let groups = self.lock();
        let present = groups.iter().filter(|(_, group)| group.strong_count() > 0);
        present.map(|(number, _)| *number).collect()
    }

    /// A group that is in it.
    pub fn group(&self, number: u32) -> Option<Arc<Group>> {
        self.lock().get(&number)?.upgrade()
    }

    /// The devices that are in it.
    pub fn devices(&self) -> BTreeSet<DeviceName> {
        self.lock_devices().clone()
    }

    /// Lets a device in, which leaves with the returned value.
    pub fn admit(self: &Arc<Self>, device: DeviceName) -> Member {
        self.lock_devices().insert(device);
        Member {
            space: Arc::clone(self),
            device,
        }
    }

    /// Puts a group in. Opens its node in the device directory `nodes`, unless the opener has (`node`).
    ///
    /// # Errors
    /// The node is missing or not permitted, the group stays busy or is not whole, or the kernel
    /// refused.
    pub fn add(
        &self,
        number: u32,
        nodes: &Path,
        node: Option<File>,
    ) -> Result<Arc<Group>, DeviceError> {
        let container = Arc::clone(&self.container);
        let mut group = match node {
            Some(node) => Group::join(node, number, container, Instant::now() + BUSY_PATIENCE)?,
            None => Group::open(nodes, number, container, BUSY_PATIENCE)?,
        };
        group.announce(self.observer.clone())?;
        let group = Arc::new(group);
        self.lock().insert(number, Arc::downgrade(&group));
        Ok(group)
    }

    /// The ranges that the IOMMU can map; empty if nothing restricts it. There must be a group.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>, DeviceError> {
        Ok(self.dma.iova_ranges()?)
    }

    /// Makes RAM present and maps it, once for all present and later devices. Ends early once `cancelled` is
    /// true.
    ///
    /// # Errors
    /// The kernel refused a range, or the mapping was cancelled. Nothing stays mapped then.
    pub fn map(&self, ram: &RamRanges, cancelled: impl Fn() -> bool) -> Result<(), DeviceError> {
        let mapped = ram
            .iter()
            .map(|(iova, memory)| self.dma.map(*iova, memory, &cancelled))
            .collect::<Result<Vec<_>, _>>()?;
        *self.mappings.lock().unwrap_or_else(PoisonError::into_inner) = mapped;
        Ok(())
    }

    fn lock_devices(&self) -> MutexGuard<'_, BTreeSet<DeviceName>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Weak<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device that is in an address space.
pub struct Member {
    space: Arc<IoAddressSpace>,
    device: DeviceName,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.space.lock_devices().remove(&self.device);
    }
}
