//! The devices of a VM with their locks. Dropping a lease gives its device back.

use std::fs::File;
use std::sync::{Arc, Weak};

use crate::base::name::DeviceName;
use crate::base::uuid::Uuid;
use crate::facts::alive::ConfigSpace;
use crate::holding::device_lock::DeviceLock;
use crate::inventory::card::Terms;
use crate::inventory::device::HostDevice;
use crate::inventory::mdev::MdevDevice;
use crate::making::demand::HelperPipe;

/// The reason of quarantine for a device that does not answer when its lease ends.
const DEAD: &str = "it did not answer when it was given back (it read all-ones): reset or power-cycle it, or reboot the host";

/// A device held for a VM; dropping it gives the device back.
///
/// An IOMMU group is never split between VMs, so all endpoints of the device's group are locked with
/// it. The leases of one VM on devices of one group share those locks; the last one dropped frees them.
#[derive(Debug)]
pub struct Lease {
    device: Leased,
    group: Arc<[DeviceLock]>,
    /// For a PCI function: the device is checked when the lease ends.
    config: Option<ConfigSpace>,
    /// For a device that goes back to the host.
    watch: Option<Arc<HelperPipe>>,
    /// The token that opens it.
    token: Option<Uuid>,
    terms: Terms,
}

/// What is leased.
#[derive(Debug)]
enum Leased {
    Pci(Box<HostDevice>),
    Mdev(MdevDevice),
}

impl Lease {
    pub(crate) fn new(
        device: HostDevice,
        group: Arc<[DeviceLock]>,
        config: Option<ConfigSpace>,
    ) -> Self {
        let mut lease = Self::of(Leased::Pci(Box::new(device)), group);
        lease.config = config;
        lease
    }

    /// The lease on a mediated device, which is alone in its IOMMU group.
    pub(crate) fn mdev(
        device: MdevDevice,
        lock: DeviceLock,
        watch: Option<Arc<HelperPipe>>,
    ) -> Self {
        let mut lease = Self::of(Leased::Mdev(device), [lock].into());
        lease.watch = watch;
        lease
    }

    fn of(device: Leased, group: Arc<[DeviceLock]>) -> Self {
        Self {
            device,
            group,
            config: None,
            watch: None,
            token: None,
            terms: Terms::default(),
        }
    }

    /// The lease on a device that is given on these terms.
    pub(crate) fn on_terms(mut self, terms: Terms) -> Self {
        self.terms = terms;
        self
    }

    /// On which terms the device is given.
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// The lease on a function of a card that others have functions of.
    pub(crate) fn with_token(mut self, token: Option<Uuid>) -> Self {
        self.token = token;
        self
    }

    /// The token that the device must be opened with.
    pub fn token(&self) -> Option<Uuid> {
        self.token
    }

    /// The lease on a device that goes back to the host with it.
    pub(crate) fn on_demand(mut self, device: HostDevice, watch: &Arc<HelperPipe>) -> Self {
        self.device = Leased::Pci(Box::new(device));
        self.watch = Some(Arc::clone(watch));
        self
    }

    /// The PCI function as it was when it was leased; none for a mediated device.
    pub fn device(&self) -> Option<&HostDevice> {
        match &self.device {
            Leased::Pci(device) => Some(device),
            Leased::Mdev(_) => None,
        }
    }

    /// The name by which VFIO opens the device.
    pub fn name(&self) -> DeviceName {
        match &self.device {
            Leased::Pci(device) => device.bdf.into(),
            Leased::Mdev(device) => device.uuid.into(),
        }
    }

    /// Whether it is a virtual function of a card: a device of its own, whatever its address.
    pub fn is_virtual_function(&self) -> bool {
        self.device().is_some_and(|device| device.physfn.is_some())
    }

    /// The IOMMU group; none if the device has none.
    pub fn iommu_group(&self) -> Option<u32> {
        match &self.device {
            Leased::Pci(device) => device.iommu_group,
            Leased::Mdev(device) => device.iommu_group,
        }
    }

    /// Puts the device into quarantine when the lease ends: no VM gets it until it is released, or the
    /// host boots.
    ///
    /// A confined process can do this: the reason stays in the lock file as a note, and the next command that
    /// moves the device stores it as a record.
    pub fn set_aside(&self, reason: &str) {
        // A mediated device is removed with its lease, in any state.
        let Some(device) = self.device() else {
            return;
        };
        let mut locks = self.group.iter();
        if let Some(lock) = locks.find(|lock| lock.name() == device.bdf) {
            lock.leave_quarantine(device.id, reason);
        }
    }

    /// What another allocation for the same VM needs to know of the lease.
    pub(crate) fn as_own(&self) -> OwnLease {
        OwnLease {
            name: self.name(),
            iommu_group: self.iommu_group(),
            locks: Arc::downgrade(&self.group),
            locked: self.locked().collect(),
        }
    }

    /// The files of its locks. A lock holds as long as any process has its file open.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = &File> {
        self.group.iter().map(DeviceLock::file)
    }

    /// Every function that this lease keeps from others: the endpoints of the IOMMU group.
    pub fn locked(&self) -> impl Iterator<Item = DeviceName> {
        self.group.iter().map(DeviceLock::name)
    }
}

/// A lease of the VM that more devices are allocated for. It keeps nothing: the lease may end meanwhile.
#[derive(Clone, Debug)]
pub(crate) struct OwnLease {
    /// The device.
    pub(crate) name: DeviceName,
    /// Its IOMMU group.
    pub(crate) iommu_group: Option<u32>,
    locks: Weak<[DeviceLock]>,
    /// Every function that it keeps from others, or kept if it has ended since.
    pub(crate) locked: Vec<DeviceName>,
}

impl OwnLease {
    /// Its locks, for a lease on another device of the same IOMMU group; none once it has ended.
    pub(crate) fn locks(&self) -> Option<Arc<[DeviceLock]>> {
        self.locks.upgrade()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Its last user has closed the device, which resets it; some devices do not answer after that.
        if self.config.as_ref().is_some_and(ConfigSpace::is_dead) {
            self.set_aside(DEAD);
        }
        // The notified process waits for the locks, which are freed next.
        if let Some(watch) = &self.watch {
            watch.released(self.name());
        }
    }
}
