//! Allocation: all or nothing, first fit in the order of addresses, with reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use crate::config::nearest;
use crate::group::{GroupError, Groups, ResourceGroup};
use crate::host::{HostBdf, HostPaths};
use crate::inventory::{Detail, HostDevice, InventoryError, scan_with};
use crate::lease::{
    ALLOCATION_DEADLINE, AllocationLock, DeviceLock, Holder, Lease, LeaseError, LeaseRecord, holder,
};
use crate::obstacle::{Blocked, Obstacle, Pool};

/// Of a long list of devices, so many are shown: an error fits the screen.
const SHOWN: usize = 12;

/// What a VM asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// So many free devices of a group.
    Group {
        /// The group's name.
        name: String,
        /// How many.
        count: u32,
    },
    /// This device and no other.
    Device {
        /// Its address.
        bdf: HostBdf,
        /// Take it even if it is in no group.
        allow_ungrouped: bool,
    },
}

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
    /// A group has not as many free devices as asked for.
    #[error("{wanted} of group \"{group}\" asked for, {free} free{}", Lines(.blocked))]
    TooFew {
        /// The group.
        group: String,
        /// How many were asked for.
        wanted: u32,
        /// How many are free.
        free: u32,
        /// The others, and why they are not free.
        blocked: Vec<Blocked>,
    },
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
    Unavailable(Blocked),
    /// A device is asked for twice.
    #[error("{bdf} is asked for twice: name it once")]
    AskedTwice {
        /// Its address.
        bdf: HostBdf,
    },
    /// The groups cannot be read.
    #[error(transparent)]
    Groups(#[from] GroupError),
    /// The inventory cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

/// Leases devices for a VM: all that is asked for or nothing, in the order of the requests.
///
/// Devices asked for by address are settled first, then groups pick what is free in the order of
/// addresses. With each device the other endpoints of its IOMMU group are locked too, so no other VM
/// gets them. Contenders take turns, so of several that cannot all be served, one is.
pub fn allocate(
    paths: &HostPaths,
    requests: &[Request],
    holder: &Holder,
) -> Result<Vec<Lease>, AllocateError> {
    if requests.is_empty() {
        return Ok(Vec::new());
    }
    let groups = Groups::load(paths)?;
    let detail = if groups.ask_for_serials() {
        Detail::Full
    } else {
        Detail::WithoutSerials
    };
    let record = LeaseRecord::vm(holder);
    let _choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
    let devices = scan_with(paths, detail)?;
    let chosen = choose(&devices, &groups, requests)?;
    lock(paths, &devices, &chosen, &record)
}

/// Which devices the requests get, in their order. Pure: it looks at nothing but its arguments.
pub(crate) fn choose<'a>(
    devices: &'a [HostDevice],
    groups: &Groups,
    requests: &[Request],
) -> Result<Vec<&'a HostDevice>, AllocateError> {
    let mut choice = Choice {
        devices,
        groups,
        pool: Pool::new(devices),
        taken: BTreeSet::new(),
    };
    let mut chosen: Vec<Vec<&HostDevice>> = vec![Vec::new(); requests.len()];
    for (request, place) in requests.iter().zip(&mut chosen) {
        if let Request::Device {
            bdf,
            allow_ungrouped,
        } = request
        {
            place.push(choice.exact(*bdf, *allow_ungrouped)?);
        }
    }
    for (request, place) in requests.iter().zip(&mut chosen) {
        if let Request::Group { name, count } = request {
            *place = choice.pick(name, *count)?;
        }
    }
    Ok(chosen.concat())
}

/// A choice in progress.
struct Choice<'a, 'g> {
    devices: &'a [HostDevice],
    groups: &'g Groups,
    pool: Pool<'a>,
    taken: BTreeSet<HostBdf>,
}

impl<'a> Choice<'a, '_> {
    fn exact(
        &mut self,
        bdf: HostBdf,
        allow_ungrouped: bool,
    ) -> Result<&'a HostDevice, AllocateError> {
        let device = self.devices.iter().find(|device| device.bdf == bdf);
        let device = device.ok_or(AllocateError::NoSuchDevice { bdf })?;
        if !allow_ungrouped && !device.is_bridge() && self.groups.group_of(device).is_none() {
            return Err(AllocateError::Ungrouped { bdf });
        }
        if let Some(obstacle) = self.pool.obstacle(device) {
            return Err(AllocateError::Unavailable(Blocked { bdf, obstacle }));
        }
        if !self.taken.insert(bdf) {
            return Err(AllocateError::AskedTwice { bdf });
        }
        Ok(device)
    }

    fn pick(&mut self, name: &str, count: u32) -> Result<Vec<&'a HostDevice>, AllocateError> {
        let group = self.groups.get(name).ok_or_else(|| self.unknown(name))?;
        let mut free = Vec::new();
        let mut blocked = Vec::new();
        for device in self.devices.iter().filter(|device| group.matches(device)) {
            match self.against(group, device) {
                None => free.push(device),
                Some(obstacle) => blocked.push(Blocked {
                    bdf: device.bdf,
                    obstacle,
                }),
            }
        }
        let wanted = usize::try_from(count).unwrap_or(usize::MAX);
        if free.len() < wanted {
            let (group, free) = (
                name.to_owned(),
                u32::try_from(free.len()).unwrap_or(u32::MAX),
            );
            return Err(AllocateError::TooFew {
                group,
                wanted: count,
                free,
                blocked,
            });
        }
        free.truncate(wanted);
        self.taken.extend(free.iter().map(|device| device.bdf));
        Ok(free)
    }

    fn against(&self, group: &ResourceGroup, device: &HostDevice) -> Option<Obstacle> {
        if let Some(owner) = self
            .groups
            .group_of(device)
            .filter(|owner| owner.name != group.name)
        {
            return Some(Obstacle::OtherGroup {
                owner: owner.name.clone(),
            });
        }
        if self.taken.contains(&device.bdf) {
            return Some(Obstacle::AskedFor);
        }
        self.pool.obstacle(device)
    }

    fn unknown(&self, name: &str) -> AllocateError {
        let known: Vec<String> = self.groups.iter().map(|group| group.name.clone()).collect();
        let near = nearest(name, known.iter().map(String::as_str)).map(str::to_owned);
        AllocateError::UnknownGroup {
            name: name.to_owned(),
            near,
            known,
        }
    }
}

/// Locks what was chosen, IOMMU group by IOMMU group. On failure the locks taken so far are dropped.
fn lock(
    paths: &HostPaths,
    devices: &[HostDevice],
    chosen: &[&HostDevice],
    record: &LeaseRecord,
) -> Result<Vec<Lease>, AllocateError> {
    let pool = Pool::new(devices);
    let mut groups: BTreeMap<u32, Arc<[DeviceLock]>> = BTreeMap::new();
    let mut leases = Vec::new();
    for &device in chosen {
        let bdf = device.bdf;
        let Some(group) = device.iommu_group else {
            return Err(AllocateError::Unavailable(Blocked {
                bdf,
                obstacle: Obstacle::NoIommuGroup,
            }));
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
    let mut locks = Vec::new();
    for member in members.iter().filter(|member| !member.is_bridge()) {
        match DeviceLock::take(paths, member.bdf, record)? {
            Some(lock) => locks.push(lock),
            // Only somebody who does not keep to the allocation lock can have come in between.
            None => {
                let obstacle = Obstacle::Leased {
                    holder: holder(paths, member.bdf)?.record().cloned(),
                };
                return Err(AllocateError::Unavailable(Blocked {
                    bdf: member.bdf,
                    obstacle,
                }));
            }
        }
    }
    Ok(locks.into())
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

/// One reason a line, as many as fit.
struct Lines<'a>(&'a [Blocked]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return write!(
                f,
                ": no other device of this host matches its rules (`gantry group list`)"
            );
        }
        write!(f, ":")?;
        for blocked in self.0.iter().take(SHOWN) {
            write!(f, "\n  {blocked}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more (`gantry device list`)"),
        }
    }
}

#[cfg(test)]
mod tests;
