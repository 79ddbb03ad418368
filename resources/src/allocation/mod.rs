//! Allocation: all or nothing, first fit in the order of addresses, with reasons.

mod choose;
mod error;
mod fit;
mod host_view;
mod lacks;
mod lease;
mod locks;
mod one_use;
mod prepare;
mod slots;

use std::path::Path;
use std::time::{Duration, Instant};

use crate::base::chain::chain;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock};
use crate::holding::passing::PASSING_PATIENCE;
use crate::holding::record::{Holder, LeaseRecord};
use crate::holding::restore::Change;
use crate::inventory::device::HostDevice;
use crate::making::demand::{Binder, restore};
use crate::making::sriov::{HostAccess, Netlink};
use crate::moving::writer::ChildWriter;
use crate::pools::request::{DeviceRequest, Placement};
use choose::{Pick, choose, survey};
pub use error::AllocateError;
pub use fit::{Fit, RequestFit};
use host_view::HostView;
use lacks::Shortage;
pub use lease::Lease;
pub(crate) use lease::OwnLease;
use locks::lock;
use one_use::{unused, use_once};
use prepare::{Preparation, activate_wanted, in_order};
use slots::have_slots;

/// The longest pause between two choices, each of which reads all of the host and keeps others from choosing.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

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
    /// The leases that it has: other devices of their IOMMU groups are available to it alone. A lease that ends
    /// meanwhile is not waited for.
    pub(crate) own: &'a [OwnLease],
    /// How many slots are free in it; none if each device gets a new one.
    pub(crate) slots: Option<usize>,
}

impl<'a> Recipient<'a> {
    /// A VM without leases.
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

/// [`allocate_for`] with another way to bind devices.
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
        let look = HostView::at(paths)?.beside(own);
        let lacks = match choose(&look, requests, placement) {
            Err(AllocateError::NoFit(fit)) => Shortage::of(&look, &fit),
            Err(AllocateError::Unavailable(blocked)) => Shortage::devices(&look, &[*blocked]),
            _ => Shortage::default(),
        };
        // Devices that were created for killed VMs use up instances.
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
            let restored = restore(paths, binder.host, &made, Duration::ZERO);
            for error in restored.err().into_iter().flatten() {
                tracing::warn!(
                    "cannot remove the virtual GPU of an ended VM: {}",
                    chain(&error)
                );
            }
        }
        reaped |= left;
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    };
    let picks = choose(&look, requests, placement)?;
    have_slots(&picks, slots)?;
    let chosen: Vec<&HostDevice> = picks.iter().filter_map(Pick::device).collect();
    let leases = lock(paths, &look.devices, &chosen, own, &record)?;
    let mut needs = Preparation::of(paths, &look.groups, binder, &record, &picks)?;
    let claimed = needs.claim()?;
    use_once(paths, &look.groups, &chosen, holder)?;
    // The devices' own locks suffice from here on: a slow driver delays no other allocation.
    drop(choosing);
    let made = needs.instances(claimed);
    let lent = made.and_then(|mdevs| Ok((needs.functions(leases)?, mdevs)));
    let (functions, mdevs) = lent.inspect_err(|_| {
        unused(paths, &look.groups, &chosen, holder);
    })?;
    Ok(in_order(&picks, functions, mdevs))
}

/// The devices that the requests would get now. It takes no lock, so that another allocation may come first.
pub fn fit(
    paths: &HostPaths,
    requests: &[DeviceRequest],
    placement: &Placement,
) -> Result<Fit, AllocateError> {
    let look = HostView::at(paths)?;
    let chosen = survey(&look, requests, placement)?;
    let requests: Vec<RequestFit> = chosen.picked.into_iter().map(|one| one.fit).collect();
    Ok(Fit {
        fits: requests.iter().all(RequestFit::is_enough),
        numa_nodes: chosen.nodes,
        requests,
    })
}

#[cfg(test)]
mod tests;
