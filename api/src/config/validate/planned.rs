//! The values of a service plan for keys that a VM's file leaves out.

use gantry_resources::pools::{Plan, Plans};
use gantry_vmm::{MemorySize, VcpuCount};

use super::{Context, Invalid, invalid, model};

/// The plan that a file names.
pub fn named(name: Option<&str>, context: &Context) -> Result<Option<Plan>, Invalid> {
    let Some(name) = name else {
        return Ok(None);
    };
    let plans = Plans::load(context.host);
    let plan = plans.and_then(|plans| plans.find(name).cloned());
    let help = "name one of this host's, or make it with `gantry plan create`";
    plan.map(Some).map_err(|error| invalid("plan", error, help))
}

/// The processors of a plan, or the default.
pub fn vcpus(plan: Option<&Plan>) -> Result<VcpuCount, Invalid> {
    match plan.and_then(|plan| Some((plan, plan.vcpus?))) {
        None => super::vcpus(&model::CpusConfig::default()),
        Some((plan, boot_vcpus)) => {
            let config = model::CpusConfig {
                boot_vcpus,
                ..model::CpusConfig::default()
            };
            super::vcpus(&config).map_err(|error| wrong(plan, &error.what))
        }
    }
}

/// The memory of a plan, or the default.
pub fn memory(plan: Option<&Plan>) -> Result<MemorySize, Invalid> {
    match plan.and_then(|plan| Some((plan, plan.memory?))) {
        None => super::memory(&model::MemoryConfig::default()),
        Some((plan, size)) => {
            super::memory(&model::MemoryConfig { size }).map_err(|error| wrong(plan, &error.what))
        }
    }
}

fn wrong(plan: &Plan, what: &str) -> Invalid {
    let what = format!("plan \"{}\" in {}: {what}", plan.name, plan.file.display());
    invalid("plan", what, "correct the plan, or set it in this file")
}
