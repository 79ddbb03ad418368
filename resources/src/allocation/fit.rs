//! The result of a request: the devices that it gets, and how many each filter dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::base::bdf::HostBdf;
use crate::inventory::unavailable::{CandidateFilter, UnavailableDevice};
use crate::pools::request::{DeviceRequest, DeviceSource};
use crate::pools::vgpu::Instance;

/// The most devices that an error lists, so that it fits the screen.
pub(super) const SHOWN: usize = 12;

/// The devices that all requests of a VM would get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// Whether every request would get all it asks for.
    pub fits: bool,
    /// The NUMA nodes that devices with a NUMA policy were chosen for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_nodes: Option<BTreeSet<u32>>,
    /// The requests, in their order.
    pub requests: Vec<RequestFit>,
}

/// What one request would get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RequestFit {
    /// Where its devices come from; none for a device named by its address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<DeviceSource>,
    /// How many it asks for.
    pub wanted: u32,
    /// How many it could have.
    pub free: usize,
    /// How many cards it would get.
    pub cards: usize,
    /// All functions of these cards.
    pub devices: Vec<HostBdf>,
    /// The mediated devices that it would get.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub instances: Vec<Instance>,
    /// How many devices of the host were looked at.
    pub considered: usize,
    /// How many devices each filter dropped.
    pub dropped: BTreeMap<CandidateFilter, usize>,
    /// Matching devices that are not available, with the reasons.
    pub blocked: Vec<UnavailableDevice>,
    /// The group whose virtual functions do not exist yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inactive: Option<String>,
}

impl RequestFit {
    pub(super) fn new(wish: &DeviceRequest) -> Self {
        Self {
            from: Some(wish.from.clone()),
            wanted: wish.count,
            free: 0,
            cards: 0,
            devices: Vec::new(),
            instances: Vec::new(),
            considered: 0,
            dropped: BTreeMap::new(),
            blocked: Vec::new(),
            inactive: None,
        }
    }

    pub(super) fn exact(bdf: HostBdf) -> Self {
        Self {
            from: None,
            wanted: 1,
            free: 1,
            cards: 1,
            devices: vec![bdf],
            instances: Vec::new(),
            considered: 1,
            dropped: BTreeMap::new(),
            blocked: Vec::new(),
            inactive: None,
        }
    }

    pub(super) fn exact_mdev(instance: &Instance) -> Self {
        Self {
            from: None,
            wanted: 1,
            free: 1,
            cards: 0,
            devices: Vec::new(),
            instances: vec![instance.clone()],
            considered: 1,
            dropped: BTreeMap::new(),
            blocked: Vec::new(),
            inactive: None,
        }
    }

    pub(super) fn drop(&mut self, filter: CandidateFilter) {
        *self.dropped.entry(filter).or_default() += 1;
    }

    pub(super) fn block(&mut self, blocked: UnavailableDevice) {
        self.drop(blocked.why.dropped_by());
        self.blocked.push(blocked);
    }

    /// Whether the request gets all it asks for.
    pub fn is_enough(&self) -> bool {
        u32::try_from(self.cards + self.instances.len()).is_ok_and(|count| count >= self.wanted)
    }

    /// Whether it would get all its devices once others release theirs.
    pub fn is_temporary(&self) -> bool {
        let held = self.blocked.iter();
        let held = held.filter(|blocked| blocked.why.is_temporary()).count();
        !self.is_enough() && self.free + held >= self.wanted as usize
    }

    /// How many devices each filter dropped, in words; empty if none did.
    pub fn drops(&self) -> String {
        let drops = self.dropped.iter();
        let drops: Vec<String> = drops
            .map(|(filter, count)| format!("{count} {filter}"))
            .collect();
        drops.join(", ")
    }
}

/// Why the request does not get its devices: the counts, then one device a line, as many as fit.
impl fmt::Display for RequestFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.from {
            Some(from) => write!(f, "{from} has ")?,
            None => f.write_str("there is ")?,
        }
        match self.free {
            0 => f.write_str("no free device")?,
            1 => f.write_str("only 1 free device")?,
            free => write!(f, "only {free} free devices")?,
        }
        write!(f, " ({} asked for)", self.wanted)?;
        if self.dropped.is_empty() {
            write!(f, "; this host has {} devices", self.considered)?;
        } else {
            write!(
                f,
                "; of {} devices dropped: {}",
                self.considered,
                self.drops()
            )?;
        }
        if let Some(group) = &self.inactive {
            write!(
                f,
                "\n  its virtual functions are not there: `gantry group activate {group}` makes them"
            )?;
        }
        for blocked in self.blocked.iter().take(SHOWN) {
            write!(f, "\n  {blocked}")?;
        }
        match self.blocked.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more (`gantry device list`)"),
        }
    }
}
