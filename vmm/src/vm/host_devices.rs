//! The VM's side of its host devices: leases, and the functions that they become.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use gantry_devices::pci::firmware::{self, BarRequest};
use gantry_devices::pci::{MsiRouter, PciSegment, PortIndex, SegmentError, SlotGuard};
use gantry_resources::allocation::Lease;
use gantry_resources::base::{DeviceName, HostBdf, HostPaths, Uuid};
use gantry_resources::facts::{ReservedKind, ReservedRegion};
use gantry_resources::inventory::Terms;
use gantry_resources::opener::{HeldLease, Opened, OpenerError};
use gantry_vfio::host::{Attachment, Container, Group, VfioDevice};
use gantry_vfio::pci::PassthroughDevice;

use super::alarms::Wires;
use super::closing::Retired;
use super::counted::{Counted, Counts, Watched};
use super::domain::Domain;
use crate::command::VmEvent;
use crate::control::{Event, Mailbox};
use crate::error::Error;
use crate::kvm::{KvmVm, VfioObserver};
use crate::sandbox::Sandbox;
use crate::threads::{self, Role, Task};
use crate::vmm::VmContext;

/// After how long it is said that a vCPU has not left a device that is to be closed. It takes
/// microseconds, unless the device does not answer.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);

/// How long the kernel may take to open a device. It resets the device, which takes a tenth of a second, and some
/// seconds where the device comes back slowly.
const OPEN_PATIENCE: Duration = Duration::from_secs(60);

/// What a VM has of the host before it is built: leases, and groups joined in one container.
pub struct Claimed {
    // Dropped in this order: groups leave the container before others may lease the devices.
    taken: Vec<Taken>,
    domain: Option<Arc<Domain>>,
    reserved: Vec<RangeInclusive<u64>>,
}

/// What tells whether a device is a part of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// What the device is called on the host.
    pub name: DeviceName,
    /// Whether it is a virtual function: a device of its own, though cards give them addresses that look
    /// like those of one device's functions.
    pub virtual_function: bool,
}

/// A device that is leased and whose group is open.
pub struct Taken {
    part: Part,
    token: Option<Uuid>,
    pool: Option<String>,
    terms: Terms,
    group: Arc<Group>,
    domain: Arc<Domain>,
    hold: Hold,
}

/// A lease, kept by this process or by its opener. Dropping it gives the device back.
pub enum Hold {
    /// By this process.
    Own(Box<Lease>),
    /// By the opener.
    Opener(HeldLease),
}

impl Hold {
    fn set_aside(&self, reason: &str) {
        match self {
            Self::Own(lease) => lease.set_aside(reason),
            Self::Opener(lease) => lease.set_aside(reason),
        }
    }
}

/// One host device, open, and the lease under which it is.
///
/// Dropping it takes it out of its slot, closes it, and gives the lease back, in this order.
pub struct AttachedDevice {
    slot: Option<SlotGuard>,
    function: Last<Watched>,
    // What is trapped of its BARs goes here, too.
    _io: Last<Counted<VfioDevice>>,
    // With the last device, RAM is unmapped.
    _domain: Arc<Domain>,
    part: Part,
    pool: Option<String>,
    terms: Terms,
    wires: Wires,
    /// Why nobody may have it after this VM, if that is so.
    unfit: Option<String>,
    hold: Hold,
}

/// What vCPUs may still be in, though none can get there any more. Dropping it waits until all have left:
/// the last one closes the device, and a vCPU may not.
struct Last<T>(Arc<T>);

impl<T> Last<T> {
    fn wait(&self) {
        let begun = Instant::now();
        let mut told = false;
        while Arc::strong_count(&self.0) > 1 {
            sleep(Duration::from_millis(1));
            if !told && begun.elapsed() > LEAVE_PATIENCE {
                told = true;
                tracing::warn!("a device that is to be closed does not answer a vCPU: waiting");
            }
        }
    }
}

impl<T> Drop for Last<T> {
    fn drop(&mut self) {
        self.wait();
    }
}

impl AttachedDevice {
    /// Puts the device behind a root port, as function number `function`.
    ///
    /// # Errors
    /// There is no such port, or it is taken.
    pub fn plug(
        &mut self,
        pci: &Arc<PciSegment>,
        port: PortIndex,
        function: u8,
    ) -> Result<(), SegmentError> {
        self.slot = Some(pci.plug(port, function, self.function.0.clone())?);
        Ok(())
    }

    /// Takes the device out of its slot: no vCPU finds it in configuration space any more. Accesses no hardware.
    pub fn unplug(&mut self) {
        self.slot = None;
    }

    /// Takes the device away from the guest: it neither writes to RAM nor interrupts any more, and its BARs
    /// are free for others. It stays open. Waits for the hardware, and for a vCPU that is in an access to it.
    fn retire(&self) {
        if let Err(error) = self.function.0.function().retire() {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(device = %self.part.name, error, "the device may not have stopped");
        }
    }

    /// What it is called on the host.
    pub fn name(&self) -> DeviceName {
        self.part.name
    }

    /// The resource group that it is in.
    pub fn pool(&self) -> Option<&str> {
        self.pool.as_deref()
    }

    /// What tells whether it belongs into a slot with others.
    pub fn part(&self) -> Part {
        self.part
    }

    /// On which terms it was leased.
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// What the host says of it comes through these.
    pub fn wires(&self) -> &Wires {
        &self.wires
    }

    /// The BARs that it needs addresses for as function number `function`. Its decoding is off
    /// afterwards: the guest must not have it yet.
    pub fn bars(&self, function: u8) -> Vec<BarRequest> {
        firmware::probe(function, &*self.function.0)
    }

    /// Nobody may have the device after this VM, for this reason.
    pub fn condemn(&mut self, why: &str) {
        self.unfit = Some(why.to_owned());
    }

    /// Why nobody may have it after this VM, if that is so: a reset that failed leaves it in a state that
    /// nobody knows.
    fn unfit(&self) -> Option<String> {
        let failed = self.function.0.function().reset_failed();
        let failed = failed.then(|| "its reset failed".to_owned());
        failed.or_else(|| self.unfit.clone())
    }

    /// Has the lease say so where nobody may have the device after this VM.
    fn set_aside(&self) {
        if let Some(why) = self.unfit() {
            self.hold.set_aside(&why);
        }
    }

    /// What it did so far.
    pub fn counts(&self) -> &Counts {
        self.function.0.counts()
    }
}

impl Drop for AttachedDevice {
    fn drop(&mut self) {
        self.slot = None;
        // Once before something may hang, and once for what it leads to.
        self.set_aside();
        self.function.wait();
        self.set_aside();
    }
}

/// Which devices go behind one port together, and as which function: those of one device of the host
/// keep their numbers if function 0 is among them. All others come alone, virtual functions always: who
/// has one slot emptied loses all that is in it.
pub fn arrange(devices: &[Part]) -> Vec<Vec<(usize, u8)>> {
    let place = |part: &Part| match part.name.pci() {
        Some(bdf) if !part.virtual_function => Ok((bdf.domain(), bdf.bus(), bdf.device())),
        _ => Err(part.name),
    };
    let number = |part: &Part| part.name.pci().map_or(0, HostBdf::function);
    let whole = |part: &Part| {
        devices
            .iter()
            .any(|other| place(other) == place(part) && number(other) == 0)
    };
    let mut slots: Vec<Vec<(usize, u8)>> = Vec::new();
    for (index, part) in devices.iter().enumerate() {
        let same = |slot: &&mut Vec<(usize, u8)>| {
            slot.iter().any(|(other, _)| {
                devices.get(*other).map(place) == Some(place(part))
                    && devices.get(*other).is_some_and(whole)
            })
        };
        match slots.iter_mut().find(same).filter(|_| whole(part)) {
            Some(slot) => slot.push((index, number(part))),
            None if whole(part) => slots.push(vec![(index, number(part))]),
            None => slots.push(vec![(index, 0)]),
        }
    }
    for slot in &mut slots {
        // A guest looks for other functions only where it finds function 0: that one comes last.
        slot.sort_by_key(|(_, function)| std::cmp::Reverse(*function));
    }
    slots
}

/// A device that is being opened.
pub type OpenTask = Task<Result<AttachedDevice, Error>>;

impl Claimed {
    /// No devices.
    pub fn none() -> Self {
        Self {
            taken: Vec::new(),
            domain: None,
            reserved: Vec::new(),
        }
    }

    /// Joins the groups of the leased devices in one container, known to KVM.
    ///
    /// # Errors
    /// A node is missing or not permitted, a group stays busy or is not whole, or the kernel refused.
    pub fn new(leases: Vec<Lease>, host: &HostPaths, kvm: &KvmVm) -> Result<Self, Error> {
        if leases.is_empty() {
            return Ok(Self::none());
        }
        let nodes = host.dev.join("vfio");
        let observer = Arc::new(VfioObserver::new(kvm.vm())?);
        let mut reserved = Vec::new();
        let mut numbers = Vec::new();
        for lease in &leases {
            let group = group_of(lease)?;
            if !numbers.contains(&group) {
                numbers.push(group);
                let regions = gantry_resources::facts::reserved_regions(host, group)?;
                reserved.extend(regions.iter().filter_map(forbidden));
            }
        }
        let domain = Domain::new(Container::open(&nodes)?, observer);
        let mut groups = Vec::new();
        for number in numbers {
            let group = domain.open(&nodes, number);
            groups.push(group.inspect_err(|error| set_aside(&leases, error))?);
        }
        let taken = leases.into_iter().map(|lease| {
            let missing = Error::NoIommuGroup {
                device: lease.name(),
            };
            let group = domain.group(group_of(&lease)?);
            Ok(Taken {
                part: Part {
                    name: lease.name(),
                    virtual_function: lease.is_virtual_function(),
                },
                token: lease.token(),
                pool: gantry_resources::opener::pool_of(host, lease.name()),
                terms: lease.terms(),
                group: group.ok_or(missing)?,
                domain: Arc::clone(&domain),
                hold: Hold::Own(Box::new(lease)),
            })
        });
        let taken = taken.collect::<Result<_, Error>>()?;
        Ok(Self {
            taken,
            domain: Some(domain),
            reserved,
        })
    }

    /// Joins what the opener leased and opened: in the `domain` there is, unless its last group has left, or in a
    /// new one of which KVM hears through `observer`. Devices of a group are in the domain before they get here.
    ///
    /// # Errors
    /// A group is not whole or stays busy, or the kernel refused.
    pub fn opened(
        opened: Opened,
        domain: Option<Arc<Domain>>,
        observer: &Arc<VfioObserver>,
        host: &HostPaths,
    ) -> Result<Self, Error> {
        // Devices are closed meanwhile, and with its last group a container is spent: these keep theirs until
        // others have joined it.
        let groups = domain.as_ref().map(|domain| domain.groups());
        let _anchor = groups.filter(|groups| !groups.is_empty());
        let domain = domain.filter(|_| _anchor.is_some());
        let reserved = opened.groups.iter().flat_map(|group| &group.reserved);
        let reserved = reserved.filter_map(forbidden).collect();
        let domain = match (domain, opened.container) {
            (None, Some(file)) => {
                let container = Container::new(file, &host.dev.join("vfio/vfio"))?;
                Some(Domain::new(container, Arc::clone(observer)))
            }
            (domain, _) => domain,
        };
        let Some(domain) = domain else {
            // One is asked for each time.
            let none = std::io::ErrorKind::InvalidData.into();
            return Err(OpenerError::Gone(none).into());
        };
        // Kept until the devices have them.
        let groups = opened.groups.into_iter();
        let groups = groups.map(|group| domain.join(group.node, group.number));
        let _groups = groups.collect::<Result<Vec<_>, _>>()?;
        let taken = opened.devices.into_iter().map(|device| {
            let missing = Error::NoIommuGroup {
                device: device.name,
            };
            Ok(Taken {
                part: Part {
                    name: device.name,
                    virtual_function: device.virtual_function,
                },
                token: device.token,
                pool: device.pool,
                terms: device.terms,
                group: domain.group(device.group).ok_or(missing)?,
                domain: Arc::clone(&domain),
                hold: Hold::Opener(device.lease),
            })
        });
        let taken = taken.collect::<Result<_, Error>>()?;
        Ok(Self {
            taken,
            domain: Some(domain),
            reserved,
        })
    }

    /// What the devices are called on the host.
    pub fn names(&self) -> Vec<DeviceName> {
        self.taken.iter().map(|taken| taken.part.name).collect()
    }

    /// For which of the requests each was leased, counted from 0.
    pub fn requests(&self) -> Vec<usize> {
        let terms = self.taken.iter().map(|taken| taken.terms);
        terms.map(|terms| terms.request).collect()
    }

    /// What tells which of them share a slot.
    pub fn parts(&self) -> Vec<Part> {
        self.taken.iter().map(|taken| taken.part).collect()
    }

    /// What must be neither RAM nor BAR.
    pub fn reserved(&self) -> &[RangeInclusive<u64>] {
        &self.reserved
    }

    /// The container and what is mapped there; `None` without devices.
    pub fn domain(&self) -> Option<&Arc<Domain>> {
        self.domain.as_ref()
    }

    /// What the IOMMU can map; empty where nothing restricts it.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>, Error> {
        match &self.domain {
            Some(domain) => domain.iova_ranges(),
            None => Ok(Vec::new()),
        }
    }

    /// Opens every device, side by side: the kernel resets each as it is opened, which takes a
    /// tenth of a second. In the order of the leases.
    ///
    /// # Errors
    /// No thread could be made. What opening itself has to say comes with each task.
    pub fn open(
        self,
        router: &Arc<dyn MsiRouter>,
        mailbox: &Arc<Mailbox>,
        sandbox: &Sandbox,
    ) -> Result<Vec<(DeviceName, OpenTask)>, Error> {
        let open = |taken: Taken| {
            let (router, mailbox) = (Arc::clone(router), Arc::clone(mailbox));
            let name = taken.part.name;
            threads::spawn(Role::Device, sandbox, move || taken.open(router, mailbox))
                .map(|task| (name, task))
                .map_err(Error::host("spawn a thread"))
        };
        self.taken.into_iter().map(open).collect()
    }
}

impl Taken {
    fn open(
        self,
        router: Arc<dyn MsiRouter>,
        mailbox: Arc<Mailbox>,
    ) -> Result<AttachedDevice, Error> {
        let counts = Arc::new(Counts::default());
        let io = VfioDevice::open(
            Attachment::Group(self.group),
            &self.part.name.to_string(),
            self.token.map(|token| token.to_string()).as_deref(),
        )?;
        let wires = Wires::lay(&io);
        let io = Arc::new(Counted::new(io, &counts));
        let name = self.part.name;
        let on_enable = move || mailbox.post(Event::Enabled(name));
        let function = match self.terms.allow.no_interrupts {
            true => PassthroughDevice::without_interrupts(io.clone(), router)?,
            false => PassthroughDevice::new(io.clone(), router)?,
        };
        let function = Watched::new(function, &counts, on_enable);
        Ok(AttachedDevice {
            slot: None,
            function: Last(Arc::new(function)),
            _io: Last(io),
            _domain: self.domain,
            part: self.part,
            pool: self.pool,
            terms: self.terms,
            wires,
            unfit: None,
            hold: self.hold,
        })
    }
}

/// What a reserved region keeps from the guest. A relaxable one binds the host's own drivers only.
pub fn forbidden(region: &ReservedRegion) -> Option<RangeInclusive<u64>> {
    (region.kind != ReservedKind::DirectRelaxable).then_some(region.start..=region.end)
}

/// Takes the devices of a slot away from the guest, says so by dropping `retired`, closes them, and tells of it.
/// `forced` says whether the guest was not asked; it is `None` for devices that nobody has heard of.
pub fn leave(
    devices: Vec<(String, AttachedDevice)>,
    forced: Option<bool>,
    context: &VmContext,
    retired: Retired,
) {
    for (_, device) in &devices {
        device.set_aside();
        device.retire();
    }
    drop(retired);
    for (id, device) in &devices {
        if let Some(why) = device.unfit() {
            (context.events)(VmEvent::DeviceError {
                id: id.clone(),
                error: format!("{why}: it goes into quarantine"),
            });
        }
    }
    let (ids, devices): (Vec<_>, Vec<_>) = devices.into_iter().unzip();
    close(devices, &context.sandbox);
    if let Some(forced) = forced {
        for id in ids {
            (context.events)(VmEvent::Detached { id, forced });
        }
    }
}

/// Closes devices side by side: the kernel resets each as it is closed.
fn close(devices: Vec<AttachedDevice>, sandbox: &Sandbox) {
    let closing: Vec<_> = devices
        .into_iter()
        // Without a thread the device has been dropped, hence closed, here.
        .filter_map(|device| threads::spawn(Role::Device, sandbox, move || drop(device)).ok())
        .collect();
    drop(closing);
}

/// Waits for devices that are being opened, each until the deadline or until they are unwanted. What the kernel
/// does not come back from is left to itself: its lease ends when the kernel does.
pub fn opened(
    opening: Vec<(DeviceName, OpenTask)>,
    wanted: impl Fn() -> bool,
) -> Result<Vec<AttachedDevice>, Error> {
    let begun = Instant::now();
    let deadline = begun + OPEN_PATIENCE;
    // All of them even if one fails: what is open is closed here.
    let opened = opening.into_iter().map(|(device, task)| {
        task.join_while(deadline, &wanted).unwrap_or_else(|task| {
            task.abandon();
            let seconds = begun.elapsed().as_secs();
            Err(Error::DeviceStuck { device, seconds })
        })
    });
    let opened: Vec<_> = opened.collect();
    opened.into_iter().collect()
}

fn group_of(lease: &Lease) -> Result<u32, Error> {
    let device = lease.name();
    lease.iommu_group().ok_or(Error::NoIommuGroup { device })
}

/// A group that stays busy after its device was leased is held by a process that the kernel cannot end,
/// or by one that keeps to no lease: none of its devices is fit for another VM.
fn set_aside(leases: &[Lease], error: &Error) {
    let Error::Vfio(gantry_vfio::Error::GroupInUse { group, .. }) = error else {
        return;
    };
    let of_group = leases
        .iter()
        .filter(|lease| lease.iommu_group() == Some(*group));
    for lease in of_group {
        lease.set_aside(&error.to_string());
    }
}

#[cfg(test)]
mod tests;
