//! The placement of a VM on the host: the processors of its vCPUs, and its NUMA nodes; and their topology.

use std::collections::BTreeMap;

use gantry_resources::base::Numbers;
use gantry_vmm::{NumaPolicy, Topology, VcpuCount};

use super::{Invalid, invalid, model};

/// The processors of each vCPU with an affinity.
pub fn affinity(configs: &[model::AffinityConfig]) -> Result<BTreeMap<u8, Numbers>, Invalid> {
    let mut affinity = BTreeMap::new();
    for (index, config) in configs.iter().enumerate() {
        let key = format!("cpus.affinity[{index}]");
        let vcpu = u8::try_from(config.vcpu).map_err(|_| no_such(&key, config.vcpu))?;
        if config.host_cpus.is_empty() {
            let help = "name CPUs of the host, or remove the entry";
            return Err(invalid(
                &format!("{key}.host_cpus"),
                "the list is empty",
                help,
            ));
        }
        let cpus = config.host_cpus.iter().copied().collect();
        if affinity.insert(vcpu, cpus).is_some() {
            let what = format!("vCPU {vcpu} is named twice");
            return Err(invalid(
                &format!("{key}.vcpu"),
                what,
                "name each vCPU once, with all its `host_cpus`",
            ));
        }
    }
    Ok(affinity)
}

/// Checks that the VM has the named vCPUs.
pub fn check(affinity: &BTreeMap<u8, Numbers>, vcpus: VcpuCount) -> Result<(), Invalid> {
    match affinity.keys().find(|vcpu| **vcpu >= vcpus.get()) {
        Some(vcpu) => Err(no_such("cpus.affinity", u64::from(*vcpu))),
        None => Ok(()),
    }
}

fn no_such(key: &str, vcpu: u64) -> Invalid {
    let what = format!("there is no vCPU {vcpu}");
    invalid(key, what, "use 0 up to one less than `boot_vcpus`")
}

/// How the vCPUs make up cores, dies and packages.
pub fn topology(
    config: Option<&model::TopologyConfig>,
    vcpus: VcpuCount,
) -> Result<Topology, Invalid> {
    let Some(config) = config else {
        return Ok(Topology::flat(vcpus.get()));
    };
    let topology = Topology {
        threads_per_core: config.threads_per_core,
        cores_per_die: config.cores_per_die,
        dies_per_package: config.dies_per_package,
        packages: config.packages,
    };
    let checked = topology.check(vcpus.get());
    let help = "let the product of its numbers be `boot_vcpus`, with powers of two below the highest level";
    checked.map_err(|problem| invalid("cpus.topology", problem, help))?;
    Ok(topology)
}

/// The NUMA nodes of the VM.
pub fn nodes(numbers: Option<Vec<u32>>) -> NumaPolicy {
    match numbers {
        None => NumaPolicy::NearDevices,
        Some(none) if none.is_empty() => NumaPolicy::Any,
        Some(numbers) => NumaPolicy::Only(numbers.into_iter().collect()),
    }
}
