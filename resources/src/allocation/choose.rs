//! Which devices a VM gets: a pure choice over one look at the host, first fit in the order of addresses.

mod made;

use std::collections::{BTreeMap, BTreeSet};

use super::{AllocateError, RequestFit};
use crate::base::bdf::HostBdf;
use crate::base::json::nearest;
use crate::base::name::DeviceName;
use crate::facts::topology::Sockets;
use crate::holding::record::LeaseRecord;
use crate::inventory::card::{Allow, Card, Terms, cards, lacks};
use crate::inventory::device::DeviceType;
use crate::inventory::device::HostDevice;
use crate::inventory::guard::Guarded;
use crate::inventory::mdev::Mdevs;
use crate::inventory::unavailable::{CandidateFilter, IommuGroups, Unavailable, UnavailableDevice};
use crate::pools::group::{GroupType, Groups, ResourceGroup, Tags};
use crate::pools::nova;
use crate::pools::nova::{Alias, NumaPolicy};
use crate::pools::request::{DeviceRequest, DeviceSource, Placement};
use crate::pools::vgpu::{Instance, TakenInstances};

/// One look at the host.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) devices: &'a [HostDevice],
    pub(crate) groups: &'a Groups,
    pub(crate) sockets: &'a Sockets,
    /// What the host needs of the devices that could be taken on demand.
    pub(crate) guarded: &'a [Guarded],
    /// What the VM has already, and with which record.
    pub(crate) attached: &'a BTreeMap<HostBdf, Option<LeaseRecord>>,
    pub(crate) mdevs: &'a Mdevs,
}

/// One thing that a VM gets, and on which terms.
#[derive(Clone, Debug)]
pub(crate) struct Pick<'a> {
    pub(crate) thing: Thing<'a>,
    pub(crate) terms: Terms,
}

#[derive(Clone, Debug)]
pub(crate) enum Thing<'a> {
    Device(&'a HostDevice),
    Instance(Instance),
}

impl<'a> Pick<'a> {
    /// The PCI function, if it is one.
    pub(crate) fn device(&self) -> Option<&'a HostDevice> {
        match &self.thing {
            Thing::Device(device) => Some(device),
            Thing::Instance(_) => None,
        }
    }
}

/// What a request gets.
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

/// Which devices the requests get, if all get theirs.
pub(crate) fn choose<'a>(
    view: View<'a>,
    requests: &[DeviceRequest],
    placement: &Placement,
) -> Result<Vec<Pick<'a>>, AllocateError> {
    let chosen = survey(view, requests, placement)?;
    let mut picks = Vec::new();
    for (index, (picked, request)) in chosen.picked.into_iter().zip(requests).enumerate() {
        if !picked.fit.is_enough() {
            return Err(AllocateError::NoFit(Box::new(picked.fit)));
        }
        let terms = Terms {
            request: index,
            allow: request.allow,
        };
        let devices = picked.devices.into_iter().map(Thing::Device);
        let things = devices.chain(picked.instances.into_iter().map(Thing::Instance));
        picks.extend(things.map(|thing| Pick { thing, terms }));
    }
    Ok(picks)
}

/// What each request would get, enough or not. An error is one that no other device could heal.
///
/// A VM that is bound to no node gets the devices with a NUMA policy together on one node: the first
/// on which most of them are.
pub(crate) fn survey<'a>(
    view: View<'a>,
    requests: &[DeviceRequest],
    placement: &Placement,
) -> Result<Chosen<'a>, AllocateError> {
    let mut best: Option<(usize, Chosen)> = None;
    for nodes in nodes_to_try(view, requests, placement) {
        let near = Near {
            nodes: nodes.as_ref(),
            bound: matches!(placement, Placement::Bound(_)),
        };
        let picked = run(view, requests, near)?;
        let missing = picked.iter().filter(|one| !one.fit.is_enough()).count();
        let chosen = picked.iter().flat_map(|one| &one.devices);
        let far = chosen.filter(|device| !near.has(device)).count();
        let cost = missing * view.devices.len() + far;
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

/// The sets of nodes that the VM could be on, if that matters.
fn nodes_to_try(
    view: View<'_>,
    requests: &[DeviceRequest],
    placement: &Placement,
) -> Vec<Option<BTreeSet<u32>>> {
    if let Some(nodes) = placement.nodes() {
        return vec![Some(nodes.clone())];
    }
    let matters = |request: &DeviceRequest| {
        !matches!(
            policy(view.groups, request),
            None | Some(NumaPolicy::Legacy)
        )
    };
    let nodes: BTreeSet<u32> = view
        .devices
        .iter()
        .filter(|device| !device.is_bridge())
        .filter_map(|device| device.numa_node)
        .collect();
    if nodes.is_empty() || !requests.iter().any(matters) {
        return vec![None];
    }
    nodes
        .into_iter()
        .map(|node| Some(BTreeSet::from([node])))
        .collect()
}

/// The NUMA policy of a request: its own, or that of its alias, for which Nova's default holds.
fn policy(groups: &Groups, request: &DeviceRequest) -> Option<NumaPolicy> {
    request.numa_policy.or(match &request.from {
        DeviceSource::Group(_) | DeviceSource::Device(_) => None,
        DeviceSource::Alias(name) => groups
            .alias(name)
            .iter()
            .find_map(|alias| alias.numa_policy)
            .or(Some(NumaPolicy::Legacy)),
    })
}

/// Devices asked for by address are settled first, then the others pick in the order of the requests.
fn run<'a>(
    view: View<'a>,
    requests: &[DeviceRequest],
    near: Near<'_>,
) -> Result<Vec<Picked<'a>>, AllocateError> {
    let mut choice = Choice {
        view,
        near,
        pool: IommuGroups::new(view.devices),
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

/// Where the VM is taken to be.
#[derive(Clone, Copy)]
struct Near<'n> {
    nodes: Option<&'n BTreeSet<u32>>,
    bound: bool,
}

impl Near<'_> {
    fn has(&self, device: &HostDevice) -> bool {
        match (self.nodes, device.numa_node) {
            (Some(nodes), Some(node)) => nodes.contains(&node),
            (None, _) => true,
            (Some(_), None) => false,
        }
    }

    /// Whether a policy lets a device be where it is.
    fn admits(&self, policy: Option<NumaPolicy>, device: &HostDevice, sockets: &Sockets) -> bool {
        let Some(nodes) = self.nodes else {
            return true;
        };
        match policy {
            None | Some(NumaPolicy::Preferred) => true,
            Some(NumaPolicy::Required) => self.has(device),
            Some(NumaPolicy::Legacy) => {
                !self.bound || device.numa_node.is_none() || self.has(device)
            }
            Some(NumaPolicy::Socket) => device
                .numa_node
                .is_some_and(|node| sockets.share(node, nodes)),
        }
    }
}

/// What becomes of a card, or of one of its functions, that a request looks at.
enum Verdict<T> {
    /// It is none of those meant.
    Other(CandidateFilter),
    /// It is one, but it cannot be had.
    Unavailable(UnavailableDevice),
    Free(T),
}

/// The devices that a request means.
enum Meant<'g> {
    Group(&'g ResourceGroup),
    Alias(Vec<Alias>),
}

/// As many mediated devices are counted; no host can make more.
const MOST_INSTANCES: usize = 4096;

/// A choice in progress.
struct Choice<'a, 'n> {
    view: View<'a>,
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
        let device = self.view.devices.iter().find(|device| device.bdf == bdf);
        let device = device.ok_or(AllocateError::NoSuchDevice { bdf })?;
        let groups = self.view.groups;
        if let Some(why) = of_tenant(groups, device) {
            return Err(AllocateError::Unavailable(Box::new(UnavailableDevice {
                bdf,
                why,
            })));
        }
        if !request.allow_ungrouped && !device.is_bridge() && !groups.exposes(device) {
            return Err(AllocateError::Ungrouped { bdf });
        }
        let blocked = self.lacking(device, request.allow).or_else(|| {
            let why = self.unavailable(device)?;
            Some(UnavailableDevice { bdf, why })
        });
        if let Some(blocked) = blocked {
            return Err(AllocateError::Unavailable(Box::new(blocked)));
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
        meant: &Meant<'a>,
    ) -> Result<Picked<'a>, AllocateError> {
        if let Meant::Group(group) = meant
            && group.kind == GroupType::Usb
        {
            let name = group.name.clone();
            return Err(AllocateError::Usb { name });
        }
        let policy = policy(self.view.groups, request);
        let mut fit = RequestFit::new(request);
        if let Meant::Group(group) = meant {
            fit.from = Some(DeviceSource::Group(group.name.clone()));
        }
        let mut free = Vec::new();
        let devices = self.view.devices.iter();
        for card in cards(devices.filter(|device| !device.is_bridge())) {
            fit.considered += 1;
            match self.card(request, meant, policy, &card) {
                Verdict::Other(filter) => fit.drop(filter),
                Verdict::Unavailable(blocked) => fit.block(blocked),
                Verdict::Free(card) => free.push(card),
            }
        }
        // Stable: elsewhere, and where nothing is known, addresses decide.
        free.sort_by_key(|card| !self.near.has(card.first()));
        if request.isolate {
            free = isolated(free, &mut fit);
        }
        if let Meant::Group(group) = meant
            && let Some(spec) = &group.sriov
        {
            let one = |device: &HostDevice| device.physfn == Some(spec.pf);
            let none = !self.view.devices.iter().any(one);
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
    fn meant(&self, from: &DeviceSource) -> Result<Option<Meant<'a>>, AllocateError> {
        let groups = self.view.groups;
        Ok(Some(match from {
            DeviceSource::Device(_) => return Ok(None),
            DeviceSource::Group(name) => match groups.get(name) {
                Some(group) => Meant::Group(group),
                None => return Err(unknown(groups, name)),
            },
            DeviceSource::Alias(name) => match (groups.alias(name), groups.get(name)) {
                (alternatives, _) if !alternatives.is_empty() => Meant::Alias(alternatives),
                (_, Some(group)) => Meant::Group(group),
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

    /// A card with those of its functions that are meant: it is free if all of these are.
    fn card(
        &self,
        request: &DeviceRequest,
        meant: &Meant<'_>,
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
        meant: &Meant<'_>,
        policy: Option<NumaPolicy>,
        device: &HostDevice,
    ) -> Verdict<()> {
        let groups = self.view.groups;
        let why = match meant {
            Meant::Group(group) if !group.matches(device) => match group.misses_former(device) {
                true => Some(Unavailable::Changed { is: device.id }),
                false => return Verdict::Other(CandidateFilter::Group),
            },
            Meant::Group(group) => other_owner(groups, group, device),
            Meant::Alias(_) if !groups.exposes(device) => {
                return Verdict::Other(CandidateFilter::Exposed);
            }
            Meant::Alias(alternatives) => {
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

    /// What a device lacks that the request does not allow. A bridge is never given, whatever it lacks.
    fn lacking(&self, device: &HostDevice, allow: Allow) -> Option<UnavailableDevice> {
        let given = !device.is_bridge();
        given
            .then(|| lacks(device, self.view.devices, allow))
            .flatten()
    }

    /// What stands against any use of a device.
    fn unavailable(&self, device: &HostDevice) -> Option<Unavailable> {
        if let Some(holder) = self.view.attached.get(&device.bdf) {
            let holder = holder.clone();
            return Some(Unavailable::Leased { holder });
        }
        if device.vgpu.is_some() {
            return self.pool.unavailable_as_vgpu(device);
        }
        let first = if self.view.groups.tags(device).on_demand {
            self.pool.unavailable_on_demand(device, self.view.guarded)
        } else {
            self.pool.unavailable(device)
        };
        first.or_else(|| self.of_card(device))
    }

    /// What stands against a device that is one of those meant.
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
            let tags = self.view.groups.tags(device);
            if let Some(why) = untagged(request.resource_class.as_deref(), &wanted, &tags) {
                return blocked(why);
            }
        }
        if self.taken.contains(&device.bdf) {
            return blocked(Unavailable::AskedFor);
        }
        if let Some(lacking) = self.lacking(device, request.allow) {
            return Some(lacking);
        }
        let node = device.numa_node;
        let far = || !self.near.admits(policy, device, self.view.sockets);
        let why = self.unavailable(device);
        blocked(why.or_else(|| far().then_some(Unavailable::Numa { node }))?)
    }
}

/// A tenant's device is nobody else's.
fn of_tenant(groups: &Groups, device: &HostDevice) -> Option<Unavailable> {
    let tenant = groups.tenant_of(device)?.to_owned();
    Some(Unavailable::OfTenant { tenant })
}

/// The group that comes before the one asked for.
fn other_owner(groups: &Groups, group: &ResourceGroup, device: &HostDevice) -> Option<Unavailable> {
    if let Some(why) = of_tenant(groups, device) {
        return Some(why);
    }
    let owner = groups.group_of(device)?;
    (owner.name != group.name).then(|| Unavailable::OtherGroup {
        owner: owner.name.clone(),
    })
}

/// What a device with the alias's ids lacks.
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

/// What is not said of a device by its group or device spec.
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

/// The first device of each physical function; one that is not virtual counts by itself.
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
