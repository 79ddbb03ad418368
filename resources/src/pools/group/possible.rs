//! Checks, when a group is defined, whether this host can create its virtual functions or vGPUs.

use super::{EditError, GroupFiles, GroupType, ResourceGroup};
use crate::base::host::HostPaths;
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::inventory::mdev::Mdevs;
use crate::inventory::scan::scan;
use crate::pools::vgpu::VgpuSpec;

impl GroupFiles {
    /// Refuses virtual functions that the card cannot have, and a vGPU group without a type. Returns a warning
    /// about hardware that is absent now.
    pub fn is_possible(&self, paths: &HostPaths, name: &str) -> Result<Option<String>, EditError> {
        let groups = self.groups()?;
        let group = groups.find(name)?;
        match (&group.sriov, &group.vgpu) {
            (Some(spec), _) => match HostDevice::read(paths, spec.pf) {
                Err(InventoryError::NoSuchDevice { bdf }) => {
                    Ok(Some(format!("there is no {bdf} on this host now")))
                }
                device => {
                    spec.check_capacity(&device?)?;
                    Ok(None)
                }
            },
            (None, Some(spec)) => lacking(paths, spec),
            (None, None) => check_type_given(group).map(|()| None),
        }
    }
}

fn check_type_given(group: &ResourceGroup) -> Result<(), EditError> {
    match group.kind == GroupType::Vgpu && group.rules.is_empty() {
        true => Err(EditError::NoVgpu(group.name.clone())),
        false => Ok(()),
    }
}

/// Words of a type that nothing on the host can make.
fn lacking(paths: &HostPaths, spec: &VgpuSpec) -> Result<Option<String>, EditError> {
    let mdevs = Mdevs::read(paths)?;
    let made = mdevs.devices.iter().any(|one| spec.names(one).is_some());
    let can = spec.can_be_made(&mdevs) || scan(paths)?.iter().any(|one| spec.takes(one));
    Ok((!made && !can).then(|| {
        let kind = &spec.kind;
        format!("nothing on this host makes a vGPU of type \"{kind}\" now: `gantry device mdev` lists what can be made")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost};

    fn said(host: &FakeHost, group: &str) -> String {
        host.groups(&format!(r#"{{"groups": [{group}]}}"#));
        let files = GroupFiles::open(&host.paths).unwrap();
        match files.is_possible(&host.paths, "g") {
            Ok(None) => "fine".to_owned(),
            Ok(Some(words)) => format!("warning: {words}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_card_can_have_what_is_asked_of_it() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 1),
            Fake::nvme("02:00.0", 2)
                .with("sriov_totalvfs", "7")
                .with("sriov_numvfs", "0"),
        ]);
        for (sriov, words) in [
            (r#""pf": "02:00.0", "count": 7"#, "fine"),
            (
                r#""pf": "02:00.0", "count": 8"#,
                "can have 7 virtual functions at most",
            ),
            (
                r#""pf": "02:00.0", "count": 7, "id": "8086:10c9""#,
                "is 1b36:0010 now",
            ),
            (r#""pf": "01:00.0", "count": 1"#, "has no SR-IOV"),
            (
                r#""pf": "09:00.0", "count": 1"#,
                "warning: there is no 0000:09:00.0",
            ),
        ] {
            let said = said(&host, &format!(r#"{{"name": "g", "sriov": {{{sriov}}}}}"#));
            assert!(said.contains(words), "{sriov}: {said}");
        }
    }

    #[test]
    fn a_vgpu_has_a_type_that_there_is() {
        let host = FakeHost::new(&[]);
        host.mdev_parent("mtty", "mtty-2", "Dual port serial", 1);
        for (more, words) in [
            ("", "does not say which: give it a type"),
            (r#", "vgpu": {"type": "mtty-2"}"#, "fine"),
            (r#", "vgpu": {"type": "Dual port serial"}"#, "fine"),
            (
                r#", "vgpu": {"type": "mtty-9"}"#,
                "warning: nothing on this host makes a vGPU of type \"mtty-9\"",
            ),
            (r#", "rules": [{"vendor": "10de"}]"#, "fine"),
        ] {
            let said = said(&host, &format!(r#"{{"name": "g", "type": "vgpu"{more}}}"#));
            assert!(said.contains(words), "{more}: {said}");
        }
    }
}
