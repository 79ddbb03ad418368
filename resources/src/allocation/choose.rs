//! The choice of devices for a VM: a pure function over one read of the host, first fit in the order of addresses.

mod judge;
mod made;
mod near;

use std::collections::{BTreeMap, BTreeSet};

use super::error::AllocateError;
use super::fit::RequestFit;
use super::host_view::HostView;
use crate::base::bdf::HostBdf;
use crate::base::json::nearest;
use crate::base::name::DeviceName;
use crate::inventory::card::{Card, Terms, cards};
use crate::inventory::device::HostDevice;
use crate::inventory::unavailable::{IommuGroups, Unavailable, UnavailableDevice};
use crate::pools::group::{GroupType, Groups, ResourceGroup};
use crate::pools::nova::{self, Alias};
use crate::pools::request::{DeviceRequest, DeviceSource, Placement};
use crate::pools::vgpu::{Instance, TakenInstances};
use judge::{Verdict, owned};
use near::{Near, nodes_to_try, policy};

/// A device that a VM gets, with its terms.
#[derive(Clone, Debug)]
pub(crate) struct Pick<'a> {
    pub(crate) thing: PickedDevice<'a>,
    pub(crate) terms: Terms,
}

#[derive(Clone, Debug)]
pub(crate) enum PickedDevice<'a> {
    Device(&'a HostDevice),
    Instance(Instance),
}

impl<'a> Pick<'a> {
    /// The PCI function, if it is one.
    pub(crate) fn device(&self) -> Option<&'a HostDevice> {
        match &self.thing {
            PickedDevice::Device(device) => Some(device),
            PickedDevice::Instance(_) => None,
        }
    }
}

/// The devices that a request gets.
#[derive(Clone, Debug)]
pub(crate) struct Picked<'a> {
    /// All functions of its cards.
    pub(crate) devices: Vec<&'a HostDevice>,
    pub(crate) instances: Vec<Instance>,
    pub(crate) fit: RequestFit,
}

/// A choice for all requests, in their order.
#[derive(Clone, Debug)]
pub(crate) struct Chosen<'a> {
    pub(crate) picked: Vec<Picked<'a>>,
    /// The nodes that the devices with a NUMA policy were chosen for.
    pub(crate) nodes: Option<BTreeSet<u32>>,
}

/// The devices of each request, if all requests get theirs.
pub(crate) fn choose<'a>(
    look: &'a HostView,
    requests: &[DeviceRequest],
    placement: &Placement,
) -> Result<Vec<Pick<'a>>, AllocateError> {
    let chosen = survey(look, requests, placement)?;
    let mut picks = Vec::new();
    for (index, (picked, request)) in chosen.picked.into_iter().zip(requests).enumerate() {
        if !picked.fit.is_enough() {
            return Err(AllocateError::NoFit(Box::new(picked.fit)));
        }
        let terms = |thing: &PickedDevice<'_>| Terms {
            request: index,
            allow: request.allow,
            must_not_reset: match thing {
                PickedDevice::Device(device) => device.must_not_reset.is_some(),
                PickedDevice::Instance(_) => false,
            },
        };
        let devices = picked.devices.into_iter().map(PickedDevice::Device);
        let things = devices.chain(picked.instances.into_iter().map(PickedDevice::Instance));
        picks.extend(things.map(|thing| Pick {
            terms: terms(&thing),
            thing,
        }));
    }
    Ok(picks)
}

/// The devices that each request would get, enough or not. An error means that no other free device would help.
///
/// A VM that is bound to no node gets the devices with a NUMA policy together on one node: the first
/// on which most of them are.
pub(crate) fn survey<'a>(
    look: &'a HostView,
    requests: &[DeviceRequest],
    placement: &Placement,
) -> Result<Chosen<'a>, AllocateError> {
    let mut best: Option<(usize, Chosen)> = None;
    for nodes in nodes_to_try(look, requests, placement) {
        let near = Near {
            nodes: nodes.as_ref(),
            bound: matches!(placement, Placement::Bound(_)),
        };
        let picked = run(look, requests, near)?;
        let missing = picked.iter().filter(|one| !one.fit.is_enough()).count();
        let chosen = picked.iter().flat_map(|one| &one.devices);
        let far = chosen.filter(|device| !near.has(device)).count();
        let cost = missing * look.devices.len() + far;
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, Chosen { picked, nodes }));
        }
    }
    Ok(best.map_or_else(
        || Chosen {
            picked: Vec::new(),
            nodes: None,
        },
        |(_, chosen)| chosen,
    ))
}

/// Devices asked for by address are settled first, then the others pick in the order of the requests.
fn run<'a>(
    look: &'a HostView,
    requests: &[DeviceRequest],
    near: Near<'_>,
) -> Result<Vec<Picked<'a>>, AllocateError> {
    let mut choice = Choice {
        look,
        near,
        pool: IommuGroups::new(&look.devices),
        taken: BTreeSet::new(),
        instances: TakenInstances::default(),
    };
    let mut picked = BTreeMap::new();
    for (index, request) in requests.iter().enumerate() {
        let exact = match request.from.device() {
            Some(DeviceName::Pci(bdf)) => choice.exact(bdf, request)?,
            Some(DeviceName::Mdev(uuid)) => choice.exact_mdev(uuid, request.allow_ungrouped)?,
            None => continue,
        };
        picked.insert(index, exact);
    }
    for (index, request) in requests.iter().enumerate() {
        if let Some(meant) = choice.meant(&request.from)? {
            picked.insert(index, choice.pick(request, &meant)?);
        }
    }
    Ok(picked.into_values().collect())
}

/// The devices that a request matches.
enum RequestedDevices<'g> {
    Group(&'g ResourceGroup),
    Alias(Vec<Alias>),
}

/// The most mediated devices that are counted.
const MOST_INSTANCES: usize = 4096;

/// A choice in progress.
struct Choice<'a, 'n> {
    look: &'a HostView,
    near: Near<'n>,
    pool: IommuGroups<'a>,
    taken: BTreeSet<HostBdf>,
    instances: TakenInstances,
}

impl<'a> Choice<'a, '_> {
    fn exact(
        &mut self,
        bdf: HostBdf,
        request: &DeviceRequest,
    ) -> Result<Picked<'a>, AllocateError> {
        let device = self.look.devices.iter().find(|device| device.bdf == bdf);
        let device = device.ok_or(AllocateError::NoSuchDevice { bdf })?;
        let groups = &self.look.groups;
        let unavailable = |one| Err(AllocateError::Unavailable(Box::new(one)));
        if let Some(why) = owned(groups, device) {
            return unavailable(UnavailableDevice { bdf, why });
        }
        if !request.allow_ungrouped && !groups.exposes(device) {
            return Err(AllocateError::Ungrouped { bdf });
        }
        if let Some(judged) = self.judge(device, request.allow) {
            return unavailable(judged);
        }
        if !self.taken.insert(bdf) {
            return Err(AllocateError::AskedTwice { bdf });
        }
        Ok(Picked {
            devices: vec![device],
            instances: Vec::new(),
            fit: RequestFit::exact(bdf),
        })
    }

    fn pick(
        &mut self,
        request: &DeviceRequest,
        meant: &RequestedDevices<'a>,
    ) -> Result<Picked<'a>, AllocateError> {
        if let RequestedDevices::Group(group) = meant
            && group.kind == GroupType::Usb
        {
            let name = group.name.clone();
            return Err(AllocateError::Usb { name });
        }
        let policy = policy(&self.look.groups, request);
        let mut fit = RequestFit::new(request);
        if let RequestedDevices::Group(group) = meant {
            fit.from = Some(DeviceSource::Group(group.name.clone()));
        }
        let mut free = Vec::new();
        let devices = self.look.devices.iter();
        for card in cards(devices.filter(|device| !device.is_bridge())) {
            fit.considered += 1;
            match self.card(request, meant, policy, &card) {
                Verdict::Other(filter) => fit.drop(filter),
                Verdict::Unavailable(blocked) => fit.block(blocked),
                Verdict::Free(card) => free.push(card),
            }
        }
        // A stable sort: among equals, or if the nodes are unknown, addresses decide.
        free.sort_by_key(|card| !self.near.has(card.first()));
        if request.isolate {
            free = isolated(free, &mut fit);
        }
        if let RequestedDevices::Group(group) = meant
            && let Some(spec) = &group.sriov
        {
            let one = |device: &HostDevice| device.physfn == Some(spec.pf);
            let none = !self.look.devices.iter().any(one);
            fit.inactive = none.then(|| group.name.clone());
        }
        let wanted = usize::try_from(request.count).unwrap_or(usize::MAX);
        let mut instances = self.instances_of(meant, MOST_INSTANCES);
        fit.free = free.len() + instances.len();
        free.truncate(wanted);
        instances.truncate(wanted.saturating_sub(free.len()));
        fit.cards = free.len();
        let devices: Vec<&HostDevice> = free.iter().flat_map(Card::functions).collect();
        fit.devices = devices.iter().map(|device| device.bdf).collect();
        self.taken.extend(&fit.devices);
        self.instances.take(&instances);
        fit.instances = instances.clone();
        Ok(Picked {
            devices,
            instances,
            fit,
        })
    }

    /// The group or the alternatives of an alias; none where the device is named.
    fn meant(&self, from: &DeviceSource) -> Result<Option<RequestedDevices<'a>>, AllocateError> {
        let groups = &self.look.groups;
        Ok(Some(match from {
            DeviceSource::Device(_) => return Ok(None),
            DeviceSource::Group(name) => match groups.get(name) {
                Some(group) => RequestedDevices::Group(group),
                None => return Err(unknown(groups, name)),
            },
            DeviceSource::Alias(name) => match (groups.alias(name), groups.get(name)) {
                (alternatives, _) if !alternatives.is_empty() => {
                    RequestedDevices::Alias(alternatives)
                }
                (_, Some(group)) => RequestedDevices::Group(group),
                (_, None) => match nova::refused(name) {
                    Some(reason) => {
                        let name = name.clone();
                        return Err(AllocateError::RefusedAlias { name, reason });
                    }
                    None => return Err(unknown_alias(groups, name)),
                },
            },
        }))
    }
}

/// The first virtual function of each physical function; other devices count by themselves.
fn isolated<'a>(free: Vec<Card<'a>>, fit: &mut RequestFit) -> Vec<Card<'a>> {
    let mut used = BTreeSet::new();
    let mut keep = Vec::new();
    for card in free {
        let bdf = card.first().bdf;
        let pf = card.first().physfn.unwrap_or(bdf);
        if used.insert(pf) {
            keep.push(card);
        } else {
            let why = Unavailable::SamePf { pf };
            fit.block(UnavailableDevice { bdf, why });
        }
    }
    keep
}

fn unknown(groups: &Groups, name: &str) -> AllocateError {
    let known: Vec<String> = groups.iter().map(|group| group.name.clone()).collect();
    let near = nearest(name, known.iter().map(String::as_str)).map(str::to_owned);
    AllocateError::UnknownGroup {
        name: name.to_owned(),
        near,
        known,
    }
}

fn unknown_alias(groups: &Groups, name: &str) -> AllocateError {
    let known = groups.alias_names();
    let near = nearest(name, known.iter().map(String::as_str)).map(str::to_owned);
    AllocateError::UnknownAlias {
        name: name.to_owned(),
        near,
        known,
    }
}
