//! `sriov_drivers_autoprobe` after a command that was killed while it made functions.

use super::*;
use crate::base::chain::chain;
use crate::base::name::DeviceName;
use crate::holding::device_lock::DeviceLock;
use crate::holding::record::LeaseRecord;
use crate::holding::restore::{Change, RestoreRecord};
use crate::making::demand::restore;
use crate::making::sriov::autoprobe::AutoprobeRecord;
use std::time::Duration;

/// A card whose new functions are kept from the host's drivers, by a command that is gone.
fn killed() -> FakeHost {
    let host = host("manual", "");
    let kernel = FakeKernel::new(&host).with_fault(1, Fault::Dead);
    up(&host, &kernel).unwrap_err();
    assert_eq!(probing(&host), (Some(false), true));
    host
}

/// Whether the host's drivers get new functions, and whether something is recorded.
fn probing(host: &FakeHost) -> (Option<bool>, bool) {
    let pf = Pf::read(&host.paths, bdf(PF)).unwrap();
    (
        pf.autoprobe,
        Change::Autoprobe.is_recorded(&host.paths, bdf(PF)),
    )
}

#[test]
fn a_card_that_is_kept_from_vms_is_restored_and_one_that_hangs_is_not() {
    for (until, after) in [
        (Until::Released, (Some(true), false)),
        (Until::Boot, (Some(false), true)),
    ] {
        let host = killed();
        let pf = host.read(PF);
        quarantine(&host.paths, pf.bdf, pf.id, "for a reason", until).unwrap();
        let kernel = FakeKernel::new(&host);
        reap_with(&host.paths, kernel.access()).unwrap();
        assert_eq!(probing(&host), after, "{until:?}");
    }
}

#[test]
fn a_vm_that_has_a_neighbour_keeps_no_setting_of_the_card() {
    let host = killed();
    host.add(&Fake::nvme("04:00.0", 2).driver("nvme"));
    let group = |address| host.read(address).iommu_group;
    assert_eq!(group("04:00.0"), group(PF));
    let record = LeaseRecord::restore();
    let neighbour = DeviceName::from(bdf("04:00.0"));
    let _vm = DeviceLock::take(&host.paths, neighbour, &record)
        .unwrap()
        .unwrap();
    let kernel = FakeKernel::new(&host);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(probing(&host), (Some(true), false));
}

#[test]
fn the_record_of_a_card_that_is_gone_or_replaced_is_forgotten() {
    let host = killed();
    let other = HostDevice {
        id: crate::facts::ids::PciId {
            vendor: 0x15b3,
            device: 1,
        },
        ..host.read(PF)
    };
    AutoprobeRecord::of(&other)
        .store(&host.paths, bdf(PF))
        .unwrap();
    AutoprobeRecord::of(&other)
        .store(&host.paths, bdf("05:00.0"))
        .unwrap();
    let kernel = FakeKernel::new(&host);
    reap_with(&host.paths, kernel.access()).unwrap();
    assert_eq!(probing(&host), (Some(false), false));
    assert!(Change::Autoprobe.recorded(&host.paths).is_empty());
    assert!(kernel.written.borrow().is_empty());
}

#[test]
fn each_failure_is_told_with_its_cause() {
    let host = killed();
    host.add(&Fake::nvme("05:00.0", 5).with("sriov_drivers_autoprobe", "0"));
    AutoprobeRecord::of(&host.read("05:00.0"))
        .store(&host.paths, bdf("05:00.0"))
        .unwrap();
    let kernel = FakeKernel::new(&host);
    let access = HostAccess {
        writer: &FailsAlways,
        links: &kernel,
    };
    let errors = reap_with(&host.paths, access).unwrap_err();
    let told: Vec<String> = errors.iter().map(|error| chain(error)).collect();
    assert_eq!(told.len(), 2, "{told:?}");
    for (said, card) in told.iter().zip([PF, "0000:05:00.0"]) {
        let what = format!("new virtual functions of {card} stay without host drivers: ");
        assert!(
            said.starts_with(&what) && said.contains("did not return"),
            "{said}"
        );
    }
}

/// A kernel that comes back from no write.
struct FailsAlways;

impl SysfsWriter for FailsAlways {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        Err(hung(path, value))
    }

    fn write_keeping(&self, path: &Path, value: &str, _: &fs::File) -> Result<(), WriteError> {
        self.write(path, value)
    }
}

/// A kernel whose every write fails, while another command undoes the change.
struct UndoneByOthers<'a>(&'a FakeHost);

impl SysfsWriter for UndoneByOthers<'_> {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        fs::write(path, value).unwrap();
        Change::Autoprobe.forget(&self.0.paths, bdf(PF));
        let path = path.to_owned();
        let source = std::io::Error::from_raw_os_error(16);
        let value = value.to_owned();
        Err(WriteError::Refused {
            path,
            value,
            source,
        })
    }

    fn write_keeping(&self, path: &Path, value: &str, _: &fs::File) -> Result<(), WriteError> {
        self.write(path, value)
    }
}

#[test]
fn a_failure_that_another_command_has_undone_is_none() {
    let host = killed();
    let kernel = FakeKernel::new(&host);
    let access = HostAccess {
        writer: &UndoneByOthers(&host),
        links: &kernel,
    };
    let patience = Duration::from_secs(60);
    restore(&host.paths, access, &[bdf(PF).into()], patience).unwrap();
    assert_eq!(probing(&host), (Some(true), false));
}
