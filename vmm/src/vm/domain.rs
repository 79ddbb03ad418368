//! The IOMMU's side of passthrough: one container, the groups in it, and RAM mapped once for all.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;
use std::{fs::File, path::Path};

use gantry_devices::mapping::HostMapping;
use gantry_resources::opener::BUSY_PATIENCE;
use gantry_vfio::host::{Container, DmaMapping, DmaSpace, Group};

use crate::error::Error;
use crate::kvm::VfioObserver;

/// Guest RAM as devices are to see it: first address, memory.
pub type RamRanges = Arc<[(u64, Arc<HostMapping>)]>;

/// What the devices of a VM share while there are any. Each device keeps it; with the last one RAM is
/// unmapped, and the next first device makes a new one.
pub struct Domain {
    // Dropped before the container, and after the devices and their groups.
    mappings: Mutex<Vec<DmaMapping>>,
    groups: Mutex<BTreeMap<u32, Weak<Group>>>,
    dma: DmaSpace,
    container: Arc<Container>,
    observer: Arc<VfioObserver>,
}

impl Domain {
    /// A domain without groups, of which KVM hears through `observer`.
    pub fn new(container: Container, observer: Arc<VfioObserver>) -> Arc<Self> {
        let container = Arc::new(container);
        Arc::new(Self {
            mappings: Mutex::default(),
            groups: Mutex::default(),
            dma: DmaSpace::new(container.clone()),
            container,
            observer,
        })
    }

    /// The numbers of the groups that are in it.
    pub fn held(&self) -> Vec<u32> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let held = groups.iter().filter(|(_, group)| group.strong_count() > 0);
        held.map(|(number, _)| *number).collect()
    }

    /// The groups that are in it. It is not spent while somebody has one of them.
    pub fn groups(&self) -> Vec<Arc<Group>> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.values().filter_map(Weak::upgrade).collect()
    }

    /// A group that is in it.
    pub fn group(&self, number: u32) -> Option<Arc<Group>> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.get(&number)?.upgrade()
    }

    /// Opens a group in the device directory `nodes` and puts it in.
    ///
    /// # Errors
    /// The node is missing or not permitted, the group stays busy or is not whole, or the kernel
    /// refused.
    pub fn open(&self, nodes: &Path, number: u32) -> Result<Arc<Group>, Error> {
        let container = Arc::clone(&self.container);
        self.add(
            number,
            Group::open(nodes, number, container, BUSY_PATIENCE)?,
        )
    }

    /// Puts a group in whose node somebody has opened.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn join(&self, node: File, number: u32) -> Result<Arc<Group>, Error> {
        let container = Arc::clone(&self.container);
        let deadline = Instant::now() + BUSY_PATIENCE;
        self.add(number, Group::join(node, number, container, deadline)?)
    }

    fn add(&self, number: u32, mut group: Group) -> Result<Arc<Group>, Error> {
        group.announce(self.observer.clone())?;
        let group = Arc::new(group);
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.insert(number, Arc::downgrade(&group));
        Ok(group)
    }

    /// What the IOMMU can map; empty where nothing restricts it. There must be a group.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>, Error> {
        Ok(self.dma.iova_ranges()?)
    }

    /// Makes RAM present and maps it, once, for every device there is and will be. Ends early once it
    /// is `unwanted`.
    ///
    /// # Errors
    /// The kernel refused a range, or it became unwanted. Nothing stays mapped then.
    pub fn map(&self, ram: &RamRanges, unwanted: impl Fn() -> bool) -> Result<(), Error> {
        let mapped = ram
            .iter()
            .map(|(iova, memory)| self.dma.map(*iova, memory, &unwanted))
            .collect::<Result<Vec<_>, _>>()?;
        *self.mappings.lock().unwrap_or_else(PoisonError::into_inner) = mapped;
        Ok(())
    }
}
