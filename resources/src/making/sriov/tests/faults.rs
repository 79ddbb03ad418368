//! Faults, hangs and kills at any moment.

use super::*;
use crate::pools::vf_settings::VfSetting;

#[test]
fn a_fault_at_any_write_leaves_the_host_as_it_was() {
    for fault in [Fault::Refuses, Fault::Ignores] {
        for at in 0.. {
            let host = host("manual", SETTINGS);
            let kernel = FakeKernel::new(&host).with_fault(at, fault);
            let before = seen(&host, &kernel);
            let result = up(&host, &kernel);
            if kernel.written.borrow().len() <= at {
                assert!(result.is_ok() && at == 21, "{at}: {result:?}");
                break;
            }
            // A setting that is taken and not done is the driver's word against ours.
            if result.is_ok() {
                assert_eq!(fault, Fault::Ignores);
                continue;
            }
            assert!(
                matches!(result, Err(SriovError::Failed { ref left, .. }) if left.is_empty()),
                "{fault:?} at {at}: {result:?}"
            );
            assert_eq!(seen(&host, &kernel), before, "{fault:?} at {at}");
            assert!(host.scan().iter().all(|device| !device.lease.is_held()));
        }
    }
}

#[test]
fn a_function_in_reset_is_told_again() {
    for at in 0.. {
        let host = host("manual", SETTINGS);
        let kernel = FakeKernel::new(&host).with_fault(at, Fault::Again);
        up(&host, &kernel).unwrap();
        let made = seen(&host, &kernel);
        assert_eq!((made.functions.len(), made.states[2].vlan), (3, Some(100)));
        if kernel.written.borrow().len() <= at {
            break;
        }
    }
}

/// Two functions that somebody has set and bound, and a group that wants three.
fn used_host() -> FakeHost {
    let host = host("manual", r#", "mac": "52:54:00:00:09:00", "vlan": 7"#);
    let text = fs::read_to_string(host.paths.config.join("groups.json")).unwrap();
    let smaller = text.replace("\"count\": 3", "\"count\": 2");
    host.groups(&smaller);
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    // The second one is the host's, by hand, and idle.
    host.bind(bdf("03:10.2"), Some("igbvf"));
    let second = host.dir(bdf("03:10.2"));
    fs::write(second.join("driver_override"), "(null)\n").unwrap();
    Change::Driver.forget(&host.paths, bdf("03:10.2"));
    fs::create_dir_all(second.join("net/eth5")).unwrap();
    let wanted = text.replace("\"vlan\": 7", "\"vlan\": 100, \"trust\": true");
    host.groups(&wanted.replace("09:00", "01:00"));
    host
}

#[test]
fn functions_that_were_there_come_back_with_settings_and_drivers() {
    for fault in [Fault::Refuses, Fault::Ignores] {
        for at in 0.. {
            let host = used_host();
            let mut kernel = FakeKernel::new(&host);
            // What the functions were given before, by another kernel of the fake.
            for vf in 0..2 {
                let interface = Pf::read(&host.paths, bdf(PF)).unwrap().interface.unwrap();
                let mac = serde_json::from_str(&format!("\"52:54:00:00:09:0{vf}\"")).unwrap();
                for setting in [VfSetting::Mac(mac), VfSetting::Vlan { vlan: 7, qos: 0 }] {
                    let interface = interface.clone();
                    let write = LinkWrite {
                        interface,
                        vf,
                        setting,
                    };
                    kernel.set(&write).unwrap();
                }
            }
            kernel.written.borrow_mut().clear();
            kernel.fault = Some((at, fault));
            let before = seen(&host, &kernel);
            assert_eq!(before.states[1].vlan, Some(7));
            let drivers = [Some("vfio-pci".to_owned()), Some("igbvf".to_owned())];
            assert_eq!(before.drivers, drivers);
            let result = up(&host, &kernel);
            if kernel.written.borrow().len() <= at {
                assert!(result.is_ok(), "{at}: {result:?}");
                break;
            }
            if result.is_ok() {
                assert_eq!(fault, Fault::Ignores);
                continue;
            }
            let words = format!("{fault:?} at {at}: {result:?}");
            assert!(words.contains("left: \"\""), "{words}");
            assert_eq!(seen(&host, &kernel), before, "{words}");
        }
    }
}

#[test]
fn nothing_is_written_to_a_card_while_a_function_of_it_hangs() {
    let host = host("manual", "");
    // The first function is bound, the second refuses, and the first hangs on its way back.
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let at = kernel.written.borrow().len() - 4;
    down(&host, &kernel).unwrap();
    let kernel = FakeKernel::new(&host);
    let kernel = HangsThen(kernel.with_fault(at, Fault::Refuses), at + 1);
    let host_access = HostAccess {
        writer: &kernel,
        links: &kernel.0,
    };
    let error = activate(&host.paths, host_access, &group(&host), false).unwrap_err();
    assert!(error.to_string().contains("could not be undone"), "{error}");
    let written = kernel.0.written.borrow();
    let last = written
        .iter()
        .rposition(|(path, _)| path.ends_with("sriov_numvfs"));
    assert!(last.unwrap() < at, "{written:?}");
    // Nor is it by the next one, which names what hangs.
    let next = FakeKernel::new(&host);
    let error = down(&host, &next).unwrap_err().to_string();
    assert!(error.contains("in quarantine: it hung"), "{error}");
    assert!(next.written.borrow().is_empty());
}

/// A kernel that does not come back from a write, beside the fault that it has.
struct HangsThen<'a>(FakeKernel<'a>, usize);

impl SysfsWriter for HangsThen<'_> {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        if self.0.written.borrow().len() != self.1 {
            return self.0.write(path, value);
        }
        let _ = self.0.write(path, value);
        Err(hung(path, value))
    }

    fn write_keeping(&self, path: &Path, value: &str, _: &fs::File) -> Result<(), WriteError> {
        self.write(path, value)
    }
}

#[test]
fn a_card_in_quarantine_is_left_alone_with_its_functions() {
    let host = host("demand", "");
    let kernel = FakeKernel::new(&host);
    up(&host, &kernel).unwrap();
    let pf = host.read(PF);
    quarantine(&host.paths, pf.bdf, pf.id, "it hung", Until::Boot).unwrap();
    let kernel = FakeKernel::new(&host);
    for error in [up(&host, &kernel), down(&host, &kernel)] {
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("03:00.0 is in quarantine: it hung"),
            "{error}"
        );
    }
    let error = take(&host, &kernel, 1).unwrap_err().to_string();
    assert!(
        error.contains("03:10.0 is a function of 0000:03:00.0, which is in quarantine"),
        "{error}"
    );
    assert!(kernel.written.borrow().is_empty());
}

#[test]
fn killed_at_any_write_the_next_command_heals_it() {
    for at in 0..21 {
        let host = host("manual", SETTINGS);
        let kernel = FakeKernel::new(&host).with_fault(at, Fault::Dead);
        up(&host, &kernel).unwrap_err();
        let kernel = FakeKernel::new(&host);
        reap_with(&host.paths, kernel.access()).unwrap();
        let pf = Pf::read(&host.paths, bdf(PF)).unwrap();
        assert_eq!(pf.autoprobe, Some(true), "killed at {at}");
        up(&host, &kernel).unwrap();
        assert_eq!(take(&host, &kernel, 3).unwrap().len(), 3);
        down(&host, &kernel).unwrap();
    }
}

#[test]
fn a_kernel_that_hangs_is_left_alone() {
    let host = host("manual", SETTINGS);
    let kernel = FakeKernel::new(&host).with_fault(1, Fault::Hangs);
    let error = up(&host, &kernel).unwrap_err().to_string();
    assert!(error.contains("03:00.0 hangs"), "{error}");
    assert!(host.read(PF).quarantine.is_some());
    assert_eq!(kernel.written.borrow().len(), 2);
}
