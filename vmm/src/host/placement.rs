//! The placement of a VM on the host: the NUMA nodes of its RAM, and the CPUs of its vCPUs.
//!
//! The VM's file decides. Without a setting there, the VM is placed near its devices, as far as there is room.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::sync::Arc;

use gantry_resources::base::{HostPaths, Numbers};
use gantry_resources::facts::{HostNode, host_nodes, online_cpus};
use gantry_resources::pools::Placement;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::config::{NumaPolicy, VmConfig};

/// The placement that the VM's file asks for is impossible.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlacementError {
    /// The host has none.
    #[error("numa_nodes: this host has no NUMA nodes\nremove the key")]
    NoNodes,
    /// There is no such node.
    #[error(
        "numa_nodes: this host has no NUMA node {node}, only {have}\nname one of these; `lscpu` shows them"
    )]
    NoSuchNode {
        /// The node.
        node: u32,
        /// Those that there are.
        have: Numbers,
    },
    /// The process may not use a node's memory.
    #[error(
        "numa_nodes: this process may not use memory of NUMA node {node}, only of {allowed}\n\
         name another node, or start gantry in a cpuset that has it"
    )]
    MemoryForbidden {
        /// The node.
        node: u32,
        /// The nodes whose memory it may use.
        allowed: Numbers,
    },
    /// The process may use none of the nodes' processors.
    #[error(
        "numa_nodes: this process may use no CPU of NUMA node {nodes}, only CPUs {allowed}\n\
         name other nodes, or start gantry without `taskset`, or in a cpuset that has them"
    )]
    CpusForbidden {
        /// The nodes.
        nodes: Numbers,
        /// The CPUs that it may use.
        allowed: Numbers,
    },
    /// The nodes have not so much memory.
    #[error(
        "memory.size: {asked} MiB is more than NUMA node {nodes} has ({total} MiB)\n\
         give the VM less memory, or more nodes in `numa_nodes`"
    )]
    TooLittleMemory {
        /// MiB asked for.
        asked: u64,
        /// The nodes.
        nodes: Numbers,
        /// MiB that they have.
        total: u64,
    },
    /// The nodes have not so much memory free, and all of it must be pinned.
    #[error(
        "memory.size: a VM with devices needs all of its {asked} MiB at once, since devices may write \
         anywhere in it, but only {available} MiB of NUMA node {nodes} are free\n\
         give the VM less memory, more nodes in `numa_nodes`, or stop something else"
    )]
    TooLittleFree {
        /// MiB asked for.
        asked: u64,
        /// The nodes.
        nodes: Numbers,
        /// MiB that are free, caches of files included.
        available: u64,
    },
    /// A vCPU is to run where it cannot.
    #[error(
        "cpus.affinity: vCPU {vcpu} is pinned to CPU {cpu}, but this process may use only CPUs {allowed}\n\
         pin it to one of these"
    )]
    NoSuchCpu {
        /// The vCPU.
        vcpu: u8,
        /// The processor of the host.
        cpu: u32,
        /// The CPUs that this process may use.
        allowed: Numbers,
    },
}

/// What of the host this process may use.
#[derive(Debug, Default)]
struct HostTopology {
    nodes: Vec<HostNode>,
    /// Processors.
    cpus: Numbers,
    /// Nodes, by their memory.
    memory: Numbers,
}

impl HostTopology {
    /// A kernel without cpusets does not say what the process may use: then it may use everything.
    fn read(host: &HostPaths) -> Self {
        let status = fs::read_to_string(host.proc.join("thread-self/status"));
        let status = status.unwrap_or_default();
        let list = |name: &str| -> Option<Numbers> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|list| list.parse().ok())
        };
        let nodes = host_nodes(host).unwrap_or_else(|error| {
            tracing::warn!("cannot tell which NUMA nodes the host has: {error}");
            Vec::new()
        });
        let all = || nodes.iter().flat_map(|node| node.cpus.iter()).collect();
        let allowed = list("Cpus_allowed_list:").unwrap_or_else(all);
        Self {
            // A process may be allowed CPUs that are offline.
            cpus: match online_cpus(host) {
                Some(online) => &online & &allowed,
                None => allowed,
            },
            memory: list("Mems_allowed_list:")
                .unwrap_or_else(|| nodes.iter().map(|node| node.number).collect()),
            nodes,
        }
    }

    fn numbers(&self) -> Numbers {
        self.nodes.iter().map(|node| node.number).collect()
    }

    fn of<'a>(&'a self, nodes: &'a Numbers) -> impl Iterator<Item = &'a HostNode> {
        let all = self.nodes.iter();
        all.filter(|node| nodes.contains(node.number))
    }

    /// Processors of some nodes, whether this process may use them or not.
    fn cpus_of(&self, nodes: &Numbers) -> Numbers {
        self.of(nodes).flat_map(|node| node.cpus.iter()).collect()
    }
}

/// Where a VM is on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmPlacement {
    /// The NUMA nodes that its RAM comes from; the kernel's choice if there is none.
    pub nodes: Numbers,
    /// No other nodes, even if these have no memory left.
    pub strict: bool,
    /// The CPUs of all vCPUs without an affinity of their own; any if empty.
    pub cpus: Numbers,
}

impl VmPlacement {
    /// The placement of a VM whose devices are on these `nodes` of the host.
    ///
    /// # Errors
    /// The placement that the VM's file asks for is impossible.
    pub fn find(
        config: &VmConfig,
        nodes: &Numbers,
        host: &HostPaths,
    ) -> Result<Self, PlacementError> {
        let silent = nodes.is_empty() && !matches!(config.nodes, NumaPolicy::Only(_));
        if silent && config.affinity.is_empty() {
            return Ok(Self::default());
        }
        Self::resolve(config, nodes, &HostTopology::read(host))
    }

    fn resolve(
        config: &VmConfig,
        devices: &Numbers,
        topology: &HostTopology,
    ) -> Result<Self, PlacementError> {
        check_affinity(config, topology)?;
        match &config.nodes {
            NumaPolicy::Any => Ok(Self::default()),
            NumaPolicy::Only(nodes) => Self::bound(config, nodes, topology),
            NumaPolicy::NearDevices => Ok(Self::near(config, devices, topology)),
        }
    }

    fn bound(
        config: &VmConfig,
        nodes: &Numbers,
        topology: &HostTopology,
    ) -> Result<Self, PlacementError> {
        let have = topology.numbers();
        if have.is_empty() {
            return Err(PlacementError::NoNodes);
        }
        if let Some(node) = nodes.iter().find(|node| !have.contains(*node)) {
            return Err(PlacementError::NoSuchNode { node, have });
        }
        let allowed = topology.memory.clone();
        if let Some(node) = nodes.iter().find(|node| !allowed.contains(*node)) {
            return Err(PlacementError::MemoryForbidden { node, allowed });
        }
        check_memory(config, nodes, topology)?;
        let all = topology.cpus_of(nodes);
        let cpus = &all & &topology.cpus;
        // A node may be memory only.
        if cpus.is_empty() && !all.is_empty() {
            return Err(PlacementError::CpusForbidden {
                nodes: nodes.clone(),
                allowed: topology.cpus.clone(),
            });
        }
        Ok(Self {
            nodes: nodes.clone(),
            strict: true,
            cpus,
        })
    }

    /// A host with one node leaves no choice. Fewer CPUs than vCPUs would slow the guest down.
    fn near(config: &VmConfig, devices: &Numbers, topology: &HostTopology) -> Self {
        let nodes = devices & &topology.memory;
        if nodes.is_empty() || nodes == topology.numbers() {
            return Self::default();
        }
        let cpus = &topology.cpus_of(&nodes) & &topology.cpus;
        let enough = cpus.len() >= usize::from(config.vcpus.get());
        Self {
            nodes,
            strict: false,
            cpus: if enough { cpus } else { Numbers::default() },
        }
    }

    /// Where devices are chosen that come later.
    pub fn for_devices(&self) -> Placement {
        let nodes: BTreeSet<u32> = self.nodes.iter().collect();
        match self.strict {
            _ if nodes.is_empty() => Placement::Anywhere,
            true => Placement::Bound(nodes),
            false => Placement::Near(nodes),
        }
    }

    /// Where each vCPU may run.
    pub fn affinities(&self, config: &VmConfig) -> Vec<CpuAffinity> {
        let shared = CpuAffinity {
            cpus: Arc::new(self.cpus.clone()),
            ordered: self.strict,
        };
        let own = |cpus: &Numbers| CpuAffinity {
            cpus: Arc::new(cpus.clone()),
            ordered: true,
        };
        let vcpus = 0..config.vcpus.get();
        vcpus
            .map(|vcpu| config.affinity.get(&vcpu).map_or(shared.clone(), own))
            .collect()
    }
}

fn check_memory(
    config: &VmConfig,
    nodes: &Numbers,
    topology: &HostTopology,
) -> Result<(), PlacementError> {
    let bytes = config.memory.bytes();
    let (asked, nodes_of) = (bytes >> 20, || nodes.clone());
    let total: Option<u64> = topology.of(nodes).map(|node| node.memory).sum();
    if let Some(total) = total.filter(|total| *total < bytes) {
        return Err(PlacementError::TooLittleMemory {
            asked,
            nodes: nodes_of(),
            total: total >> 20,
        });
    }
    // The kernel would kill processes to make room for more pinned memory.
    let free: Option<u64> = topology.of(nodes).map(|node| node.available).sum();
    match free.filter(|free| config.is_pinned() && *free < bytes) {
        Some(free) => Err(PlacementError::TooLittleFree {
            asked,
            nodes: nodes_of(),
            available: free >> 20,
        }),
        None => Ok(()),
    }
}

fn check_affinity(config: &VmConfig, topology: &HostTopology) -> Result<(), PlacementError> {
    for (vcpu, cpus) in &config.affinity {
        if let Some(cpu) = cpus.iter().find(|cpu| !topology.cpus.contains(*cpu)) {
            return Err(PlacementError::NoSuchCpu {
                vcpu: *vcpu,
                cpu,
                allowed: topology.cpus.clone(),
            });
        }
    }
    Ok(())
}

/// The CPUs that a vCPU may run on; any if empty.
#[derive(Debug, Clone, Default)]
pub struct CpuAffinity {
    cpus: Arc<Numbers>,
    /// Whether the VM's file asks for it; otherwise it is optional.
    ordered: bool,
}

impl CpuAffinity {
    /// Keeps the calling thread on these CPUs (sched_setaffinity(2)). Only warns if an optional affinity fails.
    ///
    /// # Errors
    /// None of the requested CPUs is available.
    pub fn apply(&self) -> io::Result<()> {
        if self.cpus.is_empty() {
            return Ok(());
        }
        let mut set = CpuSet::new();
        for cpu in self.cpus.iter() {
            // CPUs with numbers beyond the size of a set are left out.
            let _ = set.set(cpu as usize);
        }
        match sched_setaffinity(Pid::from_raw(0), &set) {
            Err(error) if self.ordered => Err(error.into()),
            Err(error) => {
                tracing::warn!("cannot keep a vCPU near the devices: {error}");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
