//! Virtual GPUs that the kernel never finished creating or removing: each takes an instance from its parent.

use super::{Finding, Level};
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::facts::open_files;
use crate::holding::restore::Change;
use crate::holding::vgpu_records;

/// A mediated device that the kernel has not finished.
#[derive(Clone, Debug)]
pub(super) struct HungVgpu {
    name: DeviceName,
    /// The process that has it open.
    by: String,
}

impl HungVgpu {
    pub(super) fn read(paths: &HostPaths) -> Vec<Self> {
        let all = Change::Vgpu.recorded(paths).into_iter();
        let one = |name| {
            let dir = match name {
                DeviceName::Pci(bdf) => paths.pci_device(bdf),
                DeviceName::Mdev(uuid) => paths.mdev(uuid),
            };
            let by = open_files::words(&paths.proc, &dir.join("remove"));
            Self { name, by }
        };
        all.filter(|name| vgpu_records::hangs(paths, *name))
            .map(one)
            .collect()
    }
}

pub(super) fn judge(hanging: &[HungVgpu]) -> Option<Finding> {
    if hanging.is_empty() {
        return None;
    }
    let names: Vec<String> = hanging
        .iter()
        .map(|one| format!("{}{}", one.name, one.by))
        .collect();
    let reason = format!(
        "the kernel has not finished creating or removing {}: until then no VM can use its place on the card",
        names.join("; ")
    );
    let finding = Finding::new("vgpus", "Virtual GPUs", Level::Warn, reason);
    Some(finding.lines(
        "end whatever has one open; the driver's complaint is in the log, and a boot of the host ends it at the \
         latest. Once the kernel is through, the next command that moves devices forgets it, as this one does:",
        ["dmesg | tail -n 50", "gantry boot"],
    ))
}
