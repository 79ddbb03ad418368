//! Checks before a group or its devices are removed: VMs that have the devices, and virtual functions and vGPUs
//! that exist.

use super::{EditError, GroupChange, GroupFiles, ResourceGroup};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::holding::record::LeaseStatus;
use crate::inventory::mdev::Mdevs;
use crate::inventory::scan::{Detail, scan_with};
use crate::pools::sriov::SriovSpec;
use crate::pools::vgpu::VgpuSpec;

impl GroupFiles {
    /// Refuses while a device of the group, or of those that are `leaving` it, is leased. The open files keep
    /// others from leasing one after this check.
    pub fn is_idle(
        &self,
        paths: &HostPaths,
        name: &str,
        leaving: Option<&[HostBdf]>,
    ) -> Result<(), EditError> {
        let groups = self.groups()?;
        let (devices, mdevs) = (scan_with(paths, groups.detail())?, Mdevs::read(paths)?);
        let is = |owner: Option<&ResourceGroup>| owner.is_some_and(|owner| owner.name == name);
        let leaves = |bdf: &HostBdf| leaving.is_none_or(|leaving| leaving.contains(bdf));
        let functions = devices
            .iter()
            .filter(|device| leaves(&device.bdf) && is(groups.group_of(device)))
            .map(|device| (DeviceName::from(device.bdf), &device.lease));
        let mdevs = mdevs
            .devices
            .iter()
            .filter(|device| leaving.is_none() && is(groups.group_of_mdev(device)))
            .map(|device| (DeviceName::from(device.uuid), &device.lease));
        let mut held = functions.chain(mdevs).filter(|(_, lease)| lease.is_held());
        held.next()
            .map_or(Ok(()), |(device, lease)| Err(in_use(name, device, lease)))
    }

    /// Refuses a change after which the group no longer defines virtual functions or vGPUs that exist.
    pub fn check_made_stays_defined(
        &self,
        paths: &HostPaths,
        name: &str,
        change: &GroupChange,
    ) -> Result<(), EditError> {
        let groups = self.groups()?;
        let group = groups.find(name)?;
        let functions = |spec: &SriovSpec| (spec.pf, spec.count);
        let same_functions = change
            .sriov
            .as_ref()
            .is_none_or(|new| new.as_ref().map(functions) == group.sriov.as_ref().map(functions));
        let same_devices = change.vgpu.as_ref().is_none_or(|new| {
            let still = |old: &VgpuSpec| {
                let new = new.as_ref().filter(|new| new.kind == old.kind);
                let stays = |uuid| new.is_some_and(|new| new.uuids.contains(uuid));
                old.uuids.iter().all(stays)
            };
            group.vgpu.as_ref().is_none_or(still)
        });
        match same_functions && same_devices {
            true => Ok(()),
            false => self.check_nothing_made(paths, name),
        }
    }

    /// Refuses a group whose virtual functions or vGPUs exist: without it they would belong to no group.
    pub fn check_nothing_made(&self, paths: &HostPaths, name: &str) -> Result<(), EditError> {
        let groups = self.groups()?;
        let (devices, mdevs) = (scan_with(paths, Detail::ForChoice)?, Mdevs::read(paths)?);
        let Some(group) = groups.get(name) else {
            return Err(groups.unknown(name).into());
        };
        let pf = group.sriov.as_ref().map(|spec| spec.pf);
        let functions = devices
            .iter()
            .filter(|device| pf.is_some() && device.physfn == pf)
            .count();
        let ahead = group.vgpu.as_ref().map_or(&[][..], |spec| &spec.uuids);
        let made = mdevs
            .devices
            .iter()
            .filter(|device| ahead.contains(&device.uuid))
            .count();
        let made = match (functions, made) {
            (0, 0) => return Ok(()),
            (0, made) => format!("{made} mediated devices"),
            (functions, _) => format!("{functions} virtual functions"),
        };
        let group = name.to_owned();
        Err(EditError::HasMade { group, made })
    }
}

fn in_use(group: &str, device: DeviceName, lease: &LeaseStatus) -> EditError {
    let holder = lease.record().map(ToString::to_string);
    EditError::InUse {
        group: group.to_owned(),
        device,
        holder: holder.unwrap_or_else(|| "an unknown process".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::allocate;
    use crate::fixture::{Fake, FakeHost, FakeKernel, bdf, vm};
    use crate::making::vgpu::make_ahead;
    use crate::pools::group::Groups;
    use crate::pools::request::DeviceRequest;

    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

    fn host() -> FakeHost {
        let host = FakeHost::new(&[Fake::nvme("01:00.0", 1), Fake::nvme("02:00.0", 2)]);
        host.mdev_parent("mtty", "mtty-2", "Dual port serial", 1);
        let groups = format!(
            r#"{{"groups": [{{"name": "disks", "rules": [{{"class": "0108"}}]}},
                {{"name": "vgpus", "type": "vgpu", "vgpu": {{"type": "mtty-2", "uuids": ["{UUID}"]}}}}]}}"#
        );
        host.groups(&groups);
        host
    }

    fn said(host: &FakeHost, name: &str, leaving: Option<&[HostBdf]>) -> String {
        let files = GroupFiles::open(&host.paths).unwrap();
        let result = files.is_idle(&host.paths, name, leaving);
        result.map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn a_vms_devices_stay_in_their_group() {
        let host = host();
        let kernel = FakeKernel::new(&host);
        let groups = Groups::load(&host.paths).unwrap();
        make_ahead(&host.paths, &kernel, groups.get("vgpus").unwrap(), false).unwrap();
        assert_eq!(said(&host, "vgpus", None), "");
        let holder = vm("a");
        let wishes = [
            DeviceRequest::group("disks", 1),
            DeviceRequest::group("vgpus", 1),
        ];
        let leases = allocate(&host.paths, &wishes, &holder).unwrap();
        let disk = "0000:01:00.0 is held by VM \"a\" (pid 123)";
        assert!(said(&host, "disks", None).contains(disk));
        assert!(said(&host, "disks", Some(&[bdf("01:00.0")])).contains(disk));
        assert_eq!(said(&host, "disks", Some(&[bdf("02:00.0")])), "");
        let vgpu = format!("{UUID} is held by VM \"a\" (pid 123): end it first, or give --force");
        assert!(said(&host, "vgpus", None).contains(&vgpu));
        drop(leases);
        assert_eq!(said(&host, "disks", None), "");
    }

    #[test]
    fn what_was_made_for_a_group_is_not_left_behind() {
        let host = host();
        let kernel = FakeKernel::new(&host);
        let made = || {
            let files = GroupFiles::open(&host.paths).unwrap();
            let result = files.check_nothing_made(&host.paths, "vgpus");
            result.map_err(|error| error.to_string())
        };
        assert_eq!(made(), Ok(()));
        let groups = Groups::load(&host.paths).unwrap();
        make_ahead(&host.paths, &kernel, groups.get("vgpus").unwrap(), false).unwrap();
        let said = made().unwrap_err();
        assert!(
            said.contains("has 1 mediated devices") && said.contains("deactivate vgpus"),
            "{said}"
        );
    }

    #[test]
    fn what_was_made_is_still_asked_for_after_a_change() {
        let host = host();
        let kernel = FakeKernel::new(&host);
        let groups = Groups::load(&host.paths).unwrap();
        make_ahead(&host.paths, &kernel, groups.get("vgpus").unwrap(), false).unwrap();
        let may = |vgpu: Option<&str>| {
            let vgpu = vgpu.map(|text| serde_json::from_str(text).unwrap());
            let change = GroupChange {
                description: Some("x".to_owned()),
                vgpu: Some(vgpu),
                ..GroupChange::default()
            };
            let files = GroupFiles::open(&host.paths).unwrap();
            files.check_made_stays_defined(&host.paths, "vgpus", &change)
        };
        let more = format!(
            r#"{{"type": "mtty-2", "uuids": ["{UUID}", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"]}}"#
        );
        assert!(may(Some(&more)).is_ok());
        assert!(may(Some(&more.replace("mtty-2", "mtty-1"))).is_err());
        assert!(may(Some(r#"{"type": "mtty-2"}"#)).is_err());
        assert!(may(None).is_err());
    }
}
