//! Allocation: all or nothing, first fit in the order of addresses, with reasons.

mod choose;
mod fit;
mod lacks;
mod lease;
mod prepare;
mod slots;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::facts::topology::Sockets;
use crate::holding::device_lock::DeviceLock;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock, LeaseError};
use crate::holding::lock_file::holder;
use crate::holding::passing::{PASSING_PATIENCE, is_passing};
use crate::holding::quarantine::{QuarantineError, Until, forget_reason, quarantine};
use crate::holding::record::{Holder, LeaseRecord, LeaseStatus};
use crate::holding::restore::Change;
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::inventory::guard::{Guarded, host_uses};
use crate::inventory::mdev::Mdevs;
use crate::inventory::scan::scan_with;
use crate::inventory::unavailable::{IommuGroups, Unavailable, UnavailableDevice};
use crate::making::demand::{Binder, restore};
use crate::making::sriov::{HostAccess, Netlink, SriovError};
use crate::making::vgpu::VgpuError;
use crate::moving::bind::BindError;
use crate::moving::writer::ChildWriter;
use crate::pools::group::{GroupError, Groups, NO_USB};
use crate::pools::request::{DeviceRequest, Placement};
use choose::{Pick, View, choose, survey};
pub use fit::{Fit, RequestFit};
use lacks::Lacks;
pub use lease::Lease;
pub(crate) use lease::OwnLease;
use prepare::{Needs, activate_wanted, in_order};
use slots::have_slots;

/// Each look is one at all of the host, and keeps others from choosing.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How long a choice is held up by who came between it and the lock.
const MOMENT: Duration = Duration::from_secs(2);

/// Nothing was allocated.
#[derive(Debug, Error)]
pub enum AllocateError {
    /// There is no such group.
    #[error("there is no group \"{name}\"{}", others(.near, .known))]
    UnknownGroup {
        /// The name asked for.
        name: String,
        /// The most similar name.
        near: Option<String>,
        /// All names.
        known: Vec<String>,
    },
    /// The devices of a group cannot be passed yet.
    #[error("group \"{name}\": {NO_USB}")]
    Usb {
        /// The group.
        name: String,
    },
    /// There is no such alias.
    #[error("there is no alias \"{name}\", nor a group of that name{}", others(.near, .known))]
    UnknownAlias {
        /// The name asked for.
        name: String,
        /// The most similar name.
        near: Option<String>,
        /// All names.
        known: Vec<String>,
    },
    /// An alias that others know is not to be had.
    #[error("alias \"{name}\" is refused: {reason}")]
    RefusedAlias {
        /// The name asked for.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// There are not as many free devices as asked for.
    #[error("No valid host was found: {0}")]
    NoFit(Box<RequestFit>),
    /// A device exists no more, or never did.
    #[error("there is no PCI device {bdf} on this host: `gantry device list` shows what there is")]
    NoSuchDevice {
        /// Its address.
        bdf: HostBdf,
    },
    /// A device is in no group.
    #[error(
        "{bdf} is in no group: add a rule such as {{\"slot\": \"{bdf}\"}} to a group, or give --allow-ungrouped"
    )]
    Ungrouped {
        /// Its address.
        bdf: HostBdf,
    },
    /// A device asked for by its address is not free.
    #[error("{0}")]
    Unavailable(Box<UnavailableDevice>),
    /// A device is asked for twice.
    #[error("{bdf} is asked for twice: name it once")]
    AskedTwice {
        /// Its address.
        bdf: HostBdf,
    },
    /// The VM has too few slots for the devices.
    #[error(
        "the devices need {needed} slots and this VM has {free} free: ask for fewer, or detach a device first{}",
        each_takes_one(.alone)
    )]
    NoSlots {
        /// How many they need.
        needed: usize,
        /// How many are free.
        free: usize,
        /// Functions that could share a slot if function 0 of their device were among them.
        alone: Vec<HostBdf>,
    },
    /// The groups cannot be read.
    #[error(transparent)]
    Groups(#[from] GroupError),
    /// The inventory cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// A device cannot be taken from the host.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The process that gives devices back when a VM ends cannot be started.
    #[error("cannot start the process that gives devices back to the host when the VM ends")]
    Helper(#[source] io::Error),
    /// The use of a device that is for one use cannot be written down.
    #[error(transparent)]
    Quarantine(#[from] QuarantineError),
    /// Virtual functions cannot be made, or given their settings.
    #[error(transparent)]
    Sriov(#[from] SriovError),
    /// Virtual GPUs cannot be made.
    #[error(transparent)]
    Vgpu(#[from] VgpuError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

impl AllocateError {
    /// Whether the same request may succeed later: others hold what is asked for.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::NoFit(fit) => fit.is_temporary(),
            Self::Unavailable(blocked) => blocked.why.is_temporary(),
            Self::Sriov(error) => matches!(error, SriovError::Busy(_) | SriovError::Live { .. }),
            Self::Vgpu(error) => error.is_temporary(),
            _ => false,
        }
    }

    /// Whether it asks by a name that nothing on this host has, or a definition is wrong.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::Groups(error) => error.is_mistake(),
            Self::UnknownGroup { .. } | Self::UnknownAlias { .. } | Self::RefusedAlias { .. } => {
                true
            }
            _ => false,
        }
    }

    /// Whether the devices are not to be had as things are, rather than the host having failed.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::UnknownGroup { .. }
            | Self::Usb { .. }
            | Self::UnknownAlias { .. }
            | Self::RefusedAlias { .. }
            | Self::NoFit(_)
            | Self::NoSuchDevice { .. }
            | Self::Ungrouped { .. }
            | Self::Unavailable(_)
            | Self::AskedTwice { .. }
            | Self::NoSlots { .. } => true,
            Self::Inventory(error) => matches!(error, InventoryError::NoSuchDevice { .. }),
            Self::Bind(error) => error.is_refusal(),
            Self::Sriov(error) => matches!(error, SriovError::Busy(_) | SriovError::Live { .. }),
            Self::Vgpu(error) => error.is_refusal(),
            Self::Groups(_) | Self::Quarantine(_) | Self::Lease(_) | Self::Helper(_) => false,
        }
    }
}

/// Leases devices for a VM: all that is asked for or nothing, in the order of the requests.
///
/// Devices asked for by address are settled first, then groups pick what is free in the order of
/// addresses. With each device the other endpoints of its IOMMU group are locked too, so no other VM
/// gets them. Contenders take turns, so of several that cannot all be served, one is. What a killed
/// process still holds is waited for.
pub fn allocate(
    paths: &HostPaths,
    requests: &[DeviceRequest],
    holder: &Holder,
) -> Result<Vec<Lease>, AllocateError> {
    allocate_near(paths, requests, &Placement::default(), holder)
}

/// [`allocate`] for a VM whose processors and memory are bound to nodes of the host.
pub fn allocate_near(
    paths: &HostPaths,
    requests: &[DeviceRequest],
    placement: &Placement,
    holder: &Holder,
) -> Result<Vec<Lease>, AllocateError> {
    allocate_for(paths, requests, Recipient::new(holder, placement))
}

/// The VM that devices are allocated for.
#[derive(Clone, Copy)]
pub(crate) struct Recipient<'a> {
    pub(crate) holder: &'a Holder,
    pub(crate) placement: &'a Placement,
    /// The leases that it has: other devices of their IOMMU groups are kept from others for it, and free
    /// for it. One that ends meanwhile is waited for by nobody.
    pub(crate) own: &'a [OwnLease],
    /// How many slots are free in it; none where each device gets one that is made for it.
    pub(crate) slots: Option<usize>,
}

impl<'a> Recipient<'a> {
    /// A VM that has nothing yet.
    pub(crate) fn new(holder: &'a Holder, placement: &'a Placement) -> Self {
        Self {
            holder,
            placement,
            own: &[],
            slots: None,
        }
    }
}

/// [`allocate_near`] for a VM that may have devices already.
pub(crate) fn allocate_for(
    paths: &HostPaths,
    requests: &[DeviceRequest],
    vm: Recipient<'_>,
) -> Result<Vec<Lease>, AllocateError> {
    let links = Netlink::new(paths);
    let binder = Binder {
        host: HostAccess {
            writer: &ChildWriter::default(),
            links: &links,
        },
        helper: Path::new("/proc/self/exe"),
    };
    allocate_with(paths, requests, vm, &binder)
}

/// [`allocate_for`] with what binds devices.
pub(crate) fn allocate_with(
    paths: &HostPaths,
    requests: &[DeviceRequest],
    vm: Recipient<'_>,
    binder: &Binder<'_>,
) -> Result<Vec<Lease>, AllocateError> {
    let Recipient {
        holder,
        placement,
        own,
        slots,
    } = vm;
    if requests.is_empty() {
        return Ok(Vec::new());
    }
    activate_wanted(paths, requests, binder)?;
    let record = LeaseRecord::vm(holder);
    let deadline = Instant::now() + PASSING_PATIENCE;
    let mut reaped = false;
    let mut pause = Duration::from_millis(10);
    let (choosing, look) = loop {
        let choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
        let look = Look::at(paths)?.beside(own);
        let lacks = match choose(look.view(), requests, placement) {
            Err(AllocateError::NoFit(fit)) => Lacks::of(&look, &fit),
            Err(AllocateError::Unavailable(blocked)) => Lacks::devices(&look, &[*blocked]),
            _ => Lacks::default(),
        };
        // What killed VMs had made for them is in the way of making more.
        let left = lacks.made && look.has_left_vgpus() && !reaped;
        let waits = lacks.passes(paths, &look) || lacks.made && look.has_vgpus_under_way();
        if !(left || waits && Instant::now() < deadline) {
            break (choosing, look);
        }
        drop(choosing);
        if left {
            let made = Change::Vgpu.recorded(paths);
            let made: Vec<DeviceName> = made
                .into_iter()
                .filter(|one| one.mdev().is_some())
                .collect();
            if let Err(error) = restore(paths, binder.host, &made, Duration::ZERO) {
                let why = std::error::Error::source(&error).map(ToString::to_string);
                let why = why.unwrap_or_else(|| error.to_string());
                tracing::warn!("a virtual GPU of a VM that is gone stays: {why}");
            }
        }
        reaped |= left;
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    };
    let picks = choose(look.view(), requests, placement)?;
    have_slots(&picks, slots)?;
    let chosen: Vec<&HostDevice> = picks.iter().filter_map(Pick::device).collect();
    let leases = lock(paths, &look.devices, &chosen, own, &record)?;
    let mut needs = Needs::of(paths, &look.groups, binder, &record, &picks)?;
    let claimed = needs.claim()?;
    use_once(paths, &look.groups, &chosen, holder)?;
    // The devices' own locks are enough from here on: a driver that is slow to let go of one, or to make
    // one, stops nobody else.
    drop(choosing);
    let made = needs.instances(claimed);
    let lent = made.and_then(|mdevs| Ok((needs.functions(leases)?, mdevs)));
    let (functions, mdevs) = lent.inspect_err(|_| {
        unused(paths, &look.groups, &chosen, holder);
    })?;
    Ok(in_order(&picks, functions, mdevs))
}

/// What the requests would get now. Nothing is taken, and no lock either: others may be faster.
pub fn fit(
    paths: &HostPaths,
    requests: &[DeviceRequest],
    placement: &Placement,
) -> Result<Fit, AllocateError> {
    let look = Look::at(paths)?;
    let chosen = survey(look.view(), requests, placement)?;
    let requests: Vec<RequestFit> = chosen.picked.into_iter().map(|one| one.fit).collect();
    Ok(Fit {
        fits: requests.iter().all(RequestFit::is_enough),
        numa_nodes: chosen.nodes,
        requests,
    })
}

/// All that a choice looks at.
struct Look {
    devices: Vec<HostDevice>,
    groups: Groups,
    sockets: Sockets,
    guarded: Vec<Guarded>,
    /// What the VM has already.
    attached: BTreeMap<HostBdf, Option<LeaseRecord>>,
    mdevs: Mdevs,
}

impl Look {
    fn at(paths: &HostPaths) -> Result<Self, AllocateError> {
        let groups = Groups::load(paths)?;
        let devices = scan_with(paths, groups.detail())?;
        let guarded = guarded(paths, &groups, &devices)?;
        Ok(Self {
            mdevs: Mdevs::read(paths)?,
            sockets: sockets(paths),
            devices,
            groups,
            guarded,
            attached: BTreeMap::new(),
        })
    }

    /// The same for a VM that has leases: what they keep from others is not kept from it.
    fn beside(mut self, own: &[OwnLease]) -> Self {
        let locked = own.iter().flat_map(OwnLease::locked);
        let kept: BTreeSet<HostBdf> = locked.filter_map(DeviceName::pci).collect();
        let has = |bdf: &HostBdf| own.iter().any(|lease| lease.name == *bdf);
        for device in &mut self.devices {
            if kept.contains(&device.bdf) {
                let lease = std::mem::replace(&mut device.lease, LeaseStatus::Free);
                if has(&device.bdf) {
                    self.attached.insert(device.bdf, lease.record().cloned());
                }
            }
        }
        self
    }

    /// Whether killed VMs have left what takes the room of others.
    fn has_left_vgpus(&self) -> bool {
        self.mdevs.claims.iter().any(|claim| claim.left)
    }

    /// Whether others are being made or removed, so that their parents' rooms are not known.
    fn has_vgpus_under_way(&self) -> bool {
        let mut claims = self.mdevs.claims.iter();
        claims.any(|claim| claim.under_way && !claim.left)
    }

    fn view(&self) -> View<'_> {
        View {
            devices: &self.devices,
            groups: &self.groups,
            sockets: &self.sockets,
            guarded: &self.guarded,
            attached: &self.attached,
            mdevs: &self.mdevs,
        }
    }
}

/// What the host needs of the devices that a VM could take from it, and of their IOMMU groups.
fn guarded(
    paths: &HostPaths,
    groups: &Groups,
    devices: &[HostDevice],
) -> Result<Vec<Guarded>, AllocateError> {
    // What another has is out of the question, and it may be at the very same look.
    let on_host =
        |device: &&HostDevice| !device.on_vfio() && !device.is_bridge() && !device.lease.is_held();
    let concerned: BTreeSet<Option<u32>> = devices
        .iter()
        .filter(|device| device.iommu_group.is_some() && groups.tags(device).on_demand)
        .map(|device| device.iommu_group)
        .collect();
    let leaving: Vec<HostDevice> = devices
        .iter()
        .filter(|device| on_host(device) && concerned.contains(&device.iommu_group))
        .cloned()
        .collect();
    if leaving.is_empty() {
        return Ok(Vec::new());
    }
    host_uses(paths, &leaving).map_err(|error| AllocateError::Bind(BindError::Guard(error)))
}

/// Of chosen devices those that are for one use. The first function of a card stands for the others.
fn for_one_use<'a>(groups: &Groups, chosen: &[&'a HostDevice]) -> Vec<&'a HostDevice> {
    let first = |device: &HostDevice| {
        let lead = device.lead.as_ref();
        !lead.is_some_and(|lead| chosen.iter().any(|one| one.bdf == lead.bdf))
    };
    let once = |device: &HostDevice| groups.tags(device).one_time_use && first(device);
    chosen
        .iter()
        .copied()
        .filter(|device| once(device))
        .collect()
}

/// Writes down the use of devices that are for one use, before they are used.
fn use_once(
    paths: &HostPaths,
    groups: &Groups,
    chosen: &[&HostDevice],
    holder: &Holder,
) -> Result<(), AllocateError> {
    let reason = reason_of_use(holder);
    for device in for_one_use(groups, chosen) {
        if let Err(error) = quarantine(paths, device.bdf, device.id, &reason, Until::Released) {
            unused(paths, groups, chosen, holder);
            return Err(error.into());
        }
    }
    Ok(())
}

fn reason_of_use(holder: &Holder) -> String {
    format!("it was used by VM '{}' (one_time_use)", holder.vm)
}

/// Takes back what [`use_once`] wrote, and not what was written over it: a device that hung meanwhile.
fn unused(paths: &HostPaths, groups: &Groups, chosen: &[&HostDevice], holder: &Holder) {
    for device in for_one_use(groups, chosen) {
        if let Err(error) = forget_reason(paths, device.bdf, &reason_of_use(holder)) {
            tracing::error!("{} stays in quarantine: {error}", device.bdf);
        }
    }
}

/// A host that does not say which nodes share a socket has one socket a node.
fn sockets(paths: &HostPaths) -> Sockets {
    Sockets::read(paths).unwrap_or_else(|error| {
        tracing::warn!("cannot tell which NUMA nodes share a socket: {error}");
        Sockets::default()
    })
}

/// Locks what was chosen, IOMMU group by IOMMU group. On failure the locks taken so far are dropped.
fn lock(
    paths: &HostPaths,
    devices: &[HostDevice],
    chosen: &[&HostDevice],
    own: &[OwnLease],
    record: &LeaseRecord,
) -> Result<Vec<Lease>, AllocateError> {
    let pool = IommuGroups::new(devices);
    let shared = |lease: &OwnLease| Some((lease.iommu_group?, lease.locks()?));
    let mut groups: BTreeMap<u32, Arc<[DeviceLock]>> = own.iter().filter_map(shared).collect();
    let mut leases = Vec::new();
    for &device in chosen {
        let bdf = device.bdf;
        let Some(group) = device.iommu_group else {
            let why = Unavailable::NoIommuGroup;
            return Err(AllocateError::Unavailable(Box::new(UnavailableDevice {
                bdf,
                why,
            })));
        };
        let locks = match groups.get(&group) {
            Some(locks) => locks.clone(),
            None => lock_group(paths, pool.members(group), record)?,
        };
        groups.insert(group, locks.clone());
        leases.push(Lease::new(device.clone(), locks));
    }
    Ok(leases)
}

fn lock_group(
    paths: &HostPaths,
    members: &[&HostDevice],
    record: &LeaseRecord,
) -> Result<Arc<[DeviceLock]>, AllocateError> {
    let members = members.iter().filter(|member| !member.is_bridge());
    let locks: Result<Vec<DeviceLock>, AllocateError> = members
        .map(|member| lock_one(paths, member.bdf, record))
        .collect();
    Ok(locks?.into())
}

/// Only somebody who does not keep to the allocation lock can have come in between: for a tenant, a command of
/// root's that puts a function back, which takes a moment; or a lease of the same VM that is just ending.
fn lock_one(
    paths: &HostPaths,
    bdf: HostBdf,
    record: &LeaseRecord,
) -> Result<DeviceLock, AllocateError> {
    let deadline = Instant::now() + MOMENT;
    loop {
        if let Some(lock) = DeviceLock::take(paths, bdf, record)? {
            return Ok(lock);
        }
        let lease = holder(paths, bdf);
        let ours = |holder: &LeaseRecord| holder.name == record.name && holder.pid == record.pid;
        let passing = is_passing(paths, bdf, lease.record()) || lease.record().is_some_and(ours);
        if !passing || Instant::now() >= deadline {
            return Err(AllocateError::Unavailable(Box::new(
                UnavailableDevice::leased(bdf, &lease),
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn each_takes_one(functions: &[HostBdf]) -> String {
    let functions: Vec<String> = functions.iter().map(HostBdf::to_string).collect();
    match functions.is_empty() {
        true => String::new(),
        false => format!(
            "; without function 0 of their device, each of {} takes one",
            functions.join(", ")
        ),
    }
}

fn others(near: &Option<String>, known: &[String]) -> String {
    match near {
        _ if known.is_empty() => {
            ": no groups are defined; write them to groups.json, or see `gantry group`".to_owned()
        }
        Some(near) => format!(": did you mean \"{near}\"? There are: {}", known.join(", ")),
        None => format!(": there are: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod recorded;
#[cfg(test)]
mod tests;
