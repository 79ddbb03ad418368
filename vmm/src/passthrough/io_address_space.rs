//! The DMA address space of a VM, and RAM that is mapped once for all devices.
//!
//! Only this file knows whether it is a VFIO type1 container or an IOAS of iommufd.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use gantry_devices::mapping::HostMapping;
use gantry_resources::base::{DeviceName, HostPaths};
use gantry_resources::facts::{VfioBackEnd, cdev};
use gantry_resources::opener::BUSY_PATIENCE;
use gantry_vfio::host::{
    Attachment, Cdev, CdevBinder, Container, DmaMapping, DmaSpace, FileObserver, Group, Ioas,
    UnboundCdev,
};

use super::error::DeviceError;
use crate::kvm::VfioObserver;

/// Guest RAM for DMA: first address and memory of each range.
pub type RamRanges = Arc<[(u64, Arc<HostMapping>)]>;

/// The DMA address space of a VM while it has devices. Each device holds a reference. When the last one goes,
/// RAM is unmapped; a later device makes a new address space.
pub struct IoAddressSpace {
    // Dropped before what it is mapped in, and after the devices and their groups.
    mappings: Mutex<Vec<DmaMapping>>,
    devices: Mutex<BTreeSet<DeviceName>>,
    dma: DmaSpace,
    kernel: Kernel,
    observer: Arc<VfioObserver>,
}

/// The kernel's side.
enum Kernel {
    /// A container and the groups that have joined it. It is spent when its last group leaves.
    Container(Arc<Container>, Mutex<BTreeMap<u32, Weak<Group>>>),
    /// An IOAS, which cdevs are attached to.
    Ioas(Arc<Ioas>),
}

/// What an [`IoAddressSpace`] must know of a device.
pub struct DeviceNode<'a> {
    /// The device.
    pub name: DeviceName,
    /// Its IOMMU group.
    pub group: u32,
    /// The token that it must be opened with.
    pub token: Option<String>,
    /// Its cdev, if the opener has opened it.
    pub cdev: Option<File>,
    /// Where the host keeps things.
    pub host: &'a HostPaths,
}

/// A device's way into an address space.
pub enum Entry {
    /// Its group has joined.
    Joined(Attachment),
    /// Its cdev is open.
    Cdev {
        /// The cdev.
        cdev: UnboundCdev,
        /// What it is bound and attached to.
        binder: Arc<dyn CdevBinder>,
        /// Tells KVM of it.
        observer: Arc<dyn FileObserver>,
        /// How long it may stay in use by a process that leaves it.
        patience: Duration,
    },
}

impl Entry {
    /// Puts the device into the address space. With a cdev, the kernel opens and resets the device.
    ///
    /// # Errors
    /// The device stays in use, or the kernel refuses.
    pub fn attach(self) -> gantry_vfio::Result<Attachment> {
        match self {
            Self::Joined(attachment) => Ok(attachment),
            Self::Cdev {
                cdev,
                binder,
                observer,
                patience,
            } => Cdev::attach(cdev, binder, observer, patience).map(Attachment::Cdev),
        }
    }
}

impl IoAddressSpace {
    /// An address space without devices. Opens its node, unless the opener has (`node`). KVM is told of the devices
    /// through `observer`.
    ///
    /// # Errors
    /// The node is missing or not permitted, or the kernel has no such IOMMU.
    pub fn open(
        back_end: VfioBackEnd,
        host: &HostPaths,
        node: Option<File>,
        observer: &Arc<VfioObserver>,
    ) -> Result<Arc<Self>, DeviceError> {
        let path = back_end.node(host);
        let file = node.map_or_else(|| open_node(&path), Ok)?;
        let (dma, kernel) = match back_end {
            VfioBackEnd::Container => {
                let container = Arc::new(Container::new(file, &path)?);
                let dma = DmaSpace::new(container.clone());
                (dma, Kernel::Container(container, Mutex::default()))
            }
            VfioBackEnd::Iommufd => {
                let ioas = Arc::new(Ioas::new(file)?);
                (DmaSpace::new(ioas.clone()), Kernel::Ioas(ioas))
            }
        };
        Ok(Arc::new(Self {
            mappings: Mutex::default(),
            devices: Mutex::default(),
            dma,
            kernel,
            observer: Arc::clone(observer),
        }))
    }

    /// References that keep the address space usable while devices leave it; `None` if its last group has left, and
    /// it takes no more.
    pub fn keep(&self) -> Option<Vec<Arc<Group>>> {
        let Kernel::Container(_, groups) = &self.kernel else {
            return Some(Vec::new());
        };
        let groups = lock(groups);
        let present: Vec<_> = groups.values().filter_map(Weak::upgrade).collect();
        Some(present).filter(|groups| !groups.is_empty())
    }

    /// The numbers of the groups that have joined it.
    pub fn group_numbers(&self) -> Vec<u32> {
        let Kernel::Container(_, groups) = &self.kernel else {
            return Vec::new();
        };
        let groups = lock(groups);
        let present = groups.iter().filter(|(_, group)| group.strong_count() > 0);
        present.map(|(number, _)| *number).collect()
    }

    /// The devices that are in it.
    pub fn devices(&self) -> BTreeSet<DeviceName> {
        lock(&self.devices).clone()
    }

    /// Lets a device in, which leaves with the returned value.
    pub fn admit(self: &Arc<Self>, device: DeviceName) -> Member {
        lock(&self.devices).insert(device);
        Member {
            space: Arc::clone(self),
            device,
        }
    }

    /// Has a group join, if groups join it. Opens the group's node, unless the opener has (`node`).
    ///
    /// # Errors
    /// The node is missing or not permitted, the group stays busy or is not whole, or the kernel
    /// refused.
    pub fn add(
        &self,
        number: u32,
        host: &HostPaths,
        node: Option<File>,
    ) -> Result<Option<Arc<Group>>, DeviceError> {
        let Kernel::Container(container, groups) = &self.kernel else {
            return Ok(None);
        };
        let container = Arc::clone(container);
        let mut group = match node {
            Some(node) => Group::join(node, number, container, Instant::now() + BUSY_PATIENCE)?,
            None => Group::open(&host.dev.join("vfio"), number, container, BUSY_PATIENCE)?,
        };
        group.announce(self.observer.clone())?;
        let group = Arc::new(group);
        lock(groups).insert(number, Arc::downgrade(&group));
        Ok(Some(group))
    }

    /// A device's way in. Its group must have joined, if groups join.
    ///
    /// # Errors
    /// Its group has left, or its cdev is missing or not permitted.
    pub fn entry(&self, device: DeviceNode<'_>) -> Result<Entry, DeviceError> {
        match &self.kernel {
            Kernel::Container(_, groups) => {
                let group = lock(groups).get(&device.group).and_then(Weak::upgrade);
                let group = group.ok_or(DeviceError::NoIommuGroup {
                    device: device.name,
                })?;
                let token = device.token;
                Ok(Entry::Joined(Attachment::Group { group, token }))
            }
            Kernel::Ioas(ioas) => {
                let file = match device.cdev {
                    Some(file) => file,
                    None => open_node(&cdev(device.host, device.name)?)?,
                };
                let cdev = UnboundCdev {
                    device: device.name.to_string(),
                    group: device.group,
                    file,
                    token: device.token,
                };
                Ok(Entry::Cdev {
                    cdev,
                    binder: ioas.clone(),
                    observer: self.observer.clone(),
                    patience: BUSY_PATIENCE,
                })
            }
        }
    }

    /// The ranges that the IOMMU can map; empty if nothing restricts it. There must be a device.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>, DeviceError> {
        Ok(self.dma.iova_ranges()?)
    }

    /// The address space as such, for memory that is not the guest's.
    pub(super) fn dma(&self) -> &DmaSpace {
        &self.dma
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
        *lock(&self.mappings) = mapped;
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_node(path: &Path) -> Result<File, gantry_vfio::Error> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|source| gantry_vfio::Error::Open {
        path: path.to_owned(),
        source,
    })
}

/// A device that is in an address space.
pub struct Member {
    space: Arc<IoAddressSpace>,
    device: DeviceName,
}

impl Drop for Member {
    fn drop(&mut self) {
        lock(&self.space.devices).remove(&self.device);
    }
}
