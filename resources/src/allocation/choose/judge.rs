//! Why a device does not match a request, or is not available.

use std::collections::BTreeSet;

use super::{Choice, RequestedDevices};
use crate::inventory::card::{Allow, Card, lacks};
use crate::inventory::device::{DeviceType, HostDevice};
use crate::inventory::unavailable::{CandidateFilter, Unavailable, UnavailableDevice};
use crate::pools::group::{Groups, ResourceGroup, Tags};
use crate::pools::nova::{self, Alias, NumaPolicy};
use crate::pools::request::DeviceRequest;

/// The result of a request for a card, or for one of its functions.
pub(super) enum Verdict<T> {
    /// It does not match the request.
    Other(CandidateFilter),
    /// It matches, but is not available.
    Unavailable(UnavailableDevice),
    Free(T),
}

impl<'a> Choice<'a, '_> {
    /// A card with its functions that match. It is free if all of them are.
    pub(super) fn card(
        &self,
        request: &DeviceRequest,
        meant: &RequestedDevices<'_>,
        policy: Option<NumaPolicy>,
        card: &Card<'a>,
    ) -> Verdict<Card<'a>> {
        let mut free = BTreeSet::new();
        let mut other = CandidateFilter::Group;
        for device in card.functions() {
            match self.verdict(request, meant, policy, device) {
                Verdict::Other(filter) => other = filter,
                Verdict::Unavailable(blocked) => return Verdict::Unavailable(blocked),
                Verdict::Free(()) => drop(free.insert(device.bdf)),
            }
        }
        let card = card.only(|device| free.contains(&device.bdf));
        card.map_or(Verdict::Other(other), Verdict::Free)
    }

    fn verdict(
        &self,
        request: &DeviceRequest,
        meant: &RequestedDevices<'_>,
        policy: Option<NumaPolicy>,
        device: &HostDevice,
    ) -> Verdict<()> {
        let groups = &self.look.groups;
        let why = match meant {
            RequestedDevices::Group(group) if !group.matches(device) => {
                match group.misses_former(device) {
                    true => Some(Unavailable::Changed { is: device.id }),
                    false => return Verdict::Other(CandidateFilter::Group),
                }
            }
            RequestedDevices::Group(group) => other_owner(groups, group, device),
            RequestedDevices::Alias(_) if !groups.exposes(device) => {
                return Verdict::Other(CandidateFilter::Exposed);
            }
            RequestedDevices::Alias(alternatives) => {
                let tags = groups.tags(device);
                let right = alternatives.iter();
                let mut right = right.filter_map(|alias| {
                    let function = alias.meant(device)?;
                    Some(misses(alias, function, &tags))
                });
                match right.next() {
                    None => return Verdict::Other(CandidateFilter::Ids),
                    Some(None) => None,
                    Some(first) if right.all(|other| other.is_some()) => first,
                    Some(_) => None,
                }
            }
        };
        let bdf = device.bdf;
        let blocked = match why {
            Some(why) => Some(UnavailableDevice { bdf, why }),
            None => self.against(request, policy, device),
        };
        blocked.map_or(Verdict::Free(()), Verdict::Unavailable)
    }

    /// Why the VM cannot get a device, for any request. A capability that the device lacks comes first: it does not
    /// change when another VM ends.
    pub(super) fn judge(&self, device: &HostDevice, allow: Allow) -> Option<UnavailableDevice> {
        lacks(device, &self.look.devices, allow).or_else(|| {
            let (bdf, why) = (device.bdf, self.in_use(device)?);
            Some(UnavailableDevice { bdf, why })
        })
    }

    /// Why no VM can use a device.
    fn in_use(&self, device: &HostDevice) -> Option<Unavailable> {
        if let Some(holder) = self.look.attached.get(&device.bdf) {
            let holder = holder.clone();
            return Some(Unavailable::Leased { holder });
        }
        if device.vgpu.is_some() {
            return self.pool.unavailable_as_vgpu(device);
        }
        let first = if self.look.groups.tags(device).on_demand {
            self.pool.unavailable_on_demand(device, &self.look.guarded)
        } else {
            self.pool.unavailable(device)
        };
        first.or_else(|| self.of_card(device))
    }

    /// Why a matching device is not available.
    fn against(
        &self,
        request: &DeviceRequest,
        policy: Option<NumaPolicy>,
        device: &HostDevice,
    ) -> Option<UnavailableDevice> {
        let bdf = device.bdf;
        let blocked = |why| Some(UnavailableDevice { bdf, why });
        let wanted: Vec<&str> = request.traits.names().collect();
        if !wanted.is_empty() || request.resource_class.is_some() {
            let tags = self.look.groups.tags(device);
            if let Some(why) = untagged(request.resource_class.as_deref(), &wanted, &tags) {
                return blocked(why);
            }
        }
        if self.taken.contains(&device.bdf) {
            return blocked(Unavailable::AskedFor);
        }
        if let Some(judged) = self.judge(device, request.allow) {
            return Some(judged);
        }
        let node = device.numa_node;
        let near = self.near.admits(policy, device, &self.look.sockets);
        (!near)
            .then(|| blocked(Unavailable::Numa { node }))
            .flatten()
    }
}

/// Why no VM of the host can get a device: it is a bridge, or a tenant's.
pub(super) fn owned(groups: &Groups, device: &HostDevice) -> Option<Unavailable> {
    if device.is_bridge() {
        return Some(Unavailable::Bridge);
    }
    let tenant = groups.tenant_of(device)?.to_owned();
    Some(Unavailable::OfTenant { tenant })
}

/// A group that is defined earlier and has the device.
fn other_owner(groups: &Groups, group: &ResourceGroup, device: &HostDevice) -> Option<Unavailable> {
    if let Some(why) = owned(groups, device) {
        return Some(why);
    }
    let owner = groups.group_of(device)?;
    (owner.name != group.name).then(|| Unavailable::OtherGroup {
        owner: owner.name.clone(),
    })
}

/// Why a device with the alias's ids does not match.
fn misses(alias: &Alias, device: &HostDevice, tags: &Tags) -> Option<Unavailable> {
    if !alias.has_type(device) {
        return Some(Unavailable::DeviceType {
            is: DeviceType::of(device),
            wanted: alias.device_type,
        });
    }
    if let Some(nova::Flag(wanted)) = alias.live_migratable
        && wanted != tags.live_migratable
    {
        return Some(Unavailable::Migratable { wanted });
    }
    let traits: Vec<&str> = alias
        .traits
        .iter()
        .flat_map(|traits| traits.names())
        .collect();
    untagged(alias.resource_class.as_deref(), &traits, tags)
}

/// Traits or a resource class that the device's group or device spec does not name.
fn untagged(class: Option<&str>, traits: &[&str], tags: &Tags) -> Option<Unavailable> {
    if class.is_some_and(|class| nova::resource_class(class) != tags.resource_class) {
        return Some(Unavailable::ResourceClass {
            is: tags.resource_class.clone(),
        });
    }
    let missing: Vec<String> = traits
        .iter()
        .filter(|wanted| !tags.traits.iter().any(|own| own == *wanted))
        .map(|wanted| (*wanted).to_owned())
        .collect();
    (!missing.is_empty()).then_some(Unavailable::Traits { missing })
}
