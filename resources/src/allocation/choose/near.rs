//! The assumed NUMA nodes of a VM, and the devices near to them.

use std::collections::BTreeSet;

use crate::allocation::host_view::HostView;
use crate::facts::topology::Sockets;
use crate::inventory::device::HostDevice;
use crate::pools::group::Groups;
use crate::pools::nova::NumaPolicy;
use crate::pools::request::{DeviceRequest, DeviceSource, Placement};

/// The sets of nodes that the VM could be on, if that matters.
pub(super) fn nodes_to_try(
    look: &HostView,
    requests: &[DeviceRequest],
    placement: &Placement,
) -> Vec<Option<BTreeSet<u32>>> {
    if let Some(nodes) = placement.nodes() {
        return vec![Some(nodes.clone())];
    }
    let matters = |request: &DeviceRequest| {
        !matches!(
            policy(&look.groups, request),
            None | Some(NumaPolicy::Legacy)
        )
    };
    let nodes: BTreeSet<u32> = look
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
pub(super) fn policy(groups: &Groups, request: &DeviceRequest) -> Option<NumaPolicy> {
    request.numa_policy.or(match &request.from {
        DeviceSource::Group(_) | DeviceSource::Device(_) => None,
        DeviceSource::Alias(name) => groups
            .alias(name)
            .iter()
            .find_map(|alias| alias.numa_policy)
            .or(Some(NumaPolicy::Legacy)),
    })
}

/// The assumed NUMA nodes of the VM.
#[derive(Clone, Copy)]
pub(super) struct Near<'n> {
    pub(super) nodes: Option<&'n BTreeSet<u32>>,
    pub(super) bound: bool,
}

impl Near<'_> {
    pub(super) fn has(&self, device: &HostDevice) -> bool {
        match (self.nodes, device.numa_node) {
            (Some(nodes), Some(node)) => nodes.contains(&node),
            (None, _) => true,
            (Some(_), None) => false,
        }
    }

    /// Whether a policy allows a device's NUMA node.
    pub(super) fn admits(
        &self,
        policy: Option<NumaPolicy>,
        device: &HostDevice,
        sockets: &Sockets,
    ) -> bool {
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
