//! Where a VM is on the host, as JSON.

use gantry_resources::base::Numbers;
use gantry_vmm::command;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a VM is on the host.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Placement {
    /// The NUMA nodes that its memory comes from.
    pub numa_nodes: Vec<u32>,
    /// The processors that its vCPUs run on, but for those that have some of their own; any if there is
    /// none.
    pub host_cpus: Vec<u32>,
}

impl Placement {
    /// None for a VM that is kept nowhere.
    pub fn of(info: &command::VmInfo) -> Option<Self> {
        (!info.nodes.is_empty()).then(|| Self {
            numa_nodes: info.nodes.iter().collect(),
            host_cpus: info.cpus.iter().collect(),
        })
    }
}

/// Processors of the host for a vCPU.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Affinity {
    /// The vCPU.
    pub vcpu: u8,
    /// The processors.
    pub host_cpus: Vec<u32>,
}

impl From<(&u8, &Numbers)> for Affinity {
    fn from((vcpu, cpus): (&u8, &Numbers)) -> Self {
        Self {
            vcpu: *vcpu,
            host_cpus: cpus.iter().collect(),
        }
    }
}
