//! A VMM without a VM, and what clients may ask of it.

use std::path::Path;

use super::*;

fn config() -> DeferredConfig {
    DeferredConfig(Box::new(|| Ok(VmConfig::small())))
}

fn refused(deed: Action) -> CommandError {
    match deed {
        Action::Answer(Err(error)) => error,
        _ => panic!("it was done"),
    }
}

fn done(deed: Action) -> Answer {
    match deed {
        Action::Answer(Ok(answer)) => answer,
        _ => panic!("it was not done"),
    }
}

#[test]
fn nothing_can_be_asked_of_a_vm_that_is_not_there() {
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    for command in [
        Command::Boot,
        Command::Counters,
        Command::Shutdown,
        Command::Nmi,
    ] {
        assert!(matches!(
            refused(stopped.handle(command)),
            CommandError::NotCreated
        ));
    }
    done(stopped.handle(Command::Delete));
    assert!(matches!(stopped.handle(Command::Quit), Action::Quit));
}

#[test]
fn what_describes_no_vm_creates_none() {
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    let wrong = DeferredConfig(Box::new(|| Err(CommandError::Invalid("no kernel".into()))));
    let error = refused(stopped.handle(Command::Create(wrong)));
    assert!(matches!(error, CommandError::Invalid(_)), "{error}");
    assert!(matches!(
        refused(stopped.handle(Command::Counters)),
        CommandError::NotCreated
    ));
}

#[test]
fn a_vm_is_created_once_booted_and_deleted() {
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    done(stopped.handle(Command::Create(config())));
    let again = refused(stopped.handle(Command::Create(config())));
    assert!(matches!(again, CommandError::AlreadyCreated));
    let early = refused(stopped.handle(Command::Pause));
    assert!(matches!(early, CommandError::NotBooted));
    let status = SharedStatus::default();
    let state = |stopped: &StoppedVm| {
        stopped.publish(&status);
        status.info().map(|info| info.state)
    };
    assert_eq!(state(&stopped), Some(VmState::Created));
    assert!(matches!(stopped.handle(Command::Boot), Action::Boot));
    stopped.ended = Some("the guest powered off".to_owned());
    assert_eq!(state(&stopped), Some(VmState::Shutdown));
    assert!(matches!(stopped.handle(Command::Boot), Action::Boot));
    done(stopped.handle(Command::Delete));
    assert_eq!(state(&stopped), None);
    done(stopped.handle(Command::Create(config())));
    assert_eq!(state(&stopped), Some(VmState::Created));
}

#[test]
fn a_state_is_told_of_once() {
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let events: EventSink = {
        let told = Arc::clone(&told);
        Arc::new(move |event| told.lock().unwrap().push(event))
    };
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    stopped.tell(&events);
    done(stopped.handle(Command::Create(config())));
    stopped.tell(&events);
    stopped.tell(&events);
    stopped.ended = Some("the guest powered off".to_owned());
    stopped.tell(&events);
    let expected = [VmState::Created, VmState::Shutdown].map(VmEvent::State);
    assert_eq!(*told.lock().unwrap(), expected);
}

#[test]
fn a_vm_that_ends_twice_is_told_of_twice() {
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let events: EventSink = {
        let told = Arc::clone(&told);
        Arc::new(move |event| told.lock().unwrap().push(event))
    };
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    done(stopped.handle(Command::Create(config())));
    for _ in 0..2 {
        stopped.ran("the guest powered off".to_owned());
        stopped.tell(&events);
    }
    let expected = [VmState::Shutdown; 2].map(VmEvent::State);
    assert_eq!(*told.lock().unwrap(), expected);
}

#[test]
fn a_plans_devices_may_come_before_the_vm_is_booted() {
    let folder = tempfile::tempdir().unwrap();
    let host = HostPaths::under(folder.path());
    std::fs::create_dir_all(&host.config).unwrap();
    let plans = r#"{"plans": [{"name": "two", "devices": [{"group": "gpu", "count": 2}]}]}"#;
    std::fs::write(host.config.join("plans.json"), plans).unwrap();
    let mut stopped = StoppedVm::new(&host);
    done(stopped.handle(Command::Create(config())));
    let attach = |plan: &str| {
        Command::Attach(Attach::Plan {
            name: plan.to_owned(),
            id: None,
        })
    };
    let unknown = refused(stopped.handle(attach("three")));
    assert!(matches!(unknown, CommandError::Invalid(_)), "{unknown}");
    done(stopped.handle(attach("two")));
    let devices = &stopped.created.as_ref().unwrap().devices;
    assert_eq!(*devices, [DeviceRequest::group("gpu", 2)]);
}

#[test]
fn a_device_may_come_before_the_vm_is_booted() {
    let attach = |id: Option<&str>| {
        Command::Attach(Attach::Devices(DeviceRequest {
            id: id.map(str::to_owned),
            ..DeviceRequest::device(
                "0000:01:00.0"
                    .parse::<gantry_resources::base::DeviceName>()
                    .unwrap(),
            )
        }))
    };
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    let early = refused(stopped.handle(attach(None)));
    assert!(matches!(early, CommandError::NotCreated));
    done(stopped.handle(Command::Create(config())));
    assert!(matches!(done(stopped.handle(attach(None))), Answer::Done));
    for id in [None, Some("disk")] {
        let twice = refused(stopped.handle(attach(id)));
        assert!(matches!(twice, CommandError::DuplicateId(_)), "{twice}");
    }
    let created = stopped.created.as_ref().unwrap();
    assert_eq!(created.devices.len(), 1);
    let detach = |id: &str| {
        Command::Detach(Detach {
            id: id.to_owned(),
            force_after: None,
        })
    };
    let other = refused(stopped.handle(detach("0000:02:00.0"))).to_string();
    assert!(other.contains("it has 0000:01:00.0"), "{other}");
    done(stopped.handle(detach("0000:01:00.0")));
    assert!(stopped.created.as_ref().unwrap().devices.is_empty());
    let counters = done(stopped.handle(Command::Counters));
    assert!(matches!(counters, Answer::Counters(devices) if devices.is_empty()));
}

/// That it is in no group is said when it is asked for, and not when the VM boots.
#[test]
fn a_device_in_no_group_is_refused_at_once_unless_the_file_allows_it() {
    let folder = tempfile::tempdir().unwrap();
    let host = HostPaths::under(folder.path());
    let device = host.pci_device("0000:01:00.0".parse().unwrap());
    std::fs::create_dir_all(&device).unwrap();
    let modalias = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02";
    std::fs::write(device.join("modalias"), modalias).unwrap();
    std::fs::write(device.join("reset_method"), "flr").unwrap();
    let attach = || {
        Command::Attach(Attach::Devices(DeviceRequest {
            allow_ungrouped: true,
            ..DeviceRequest::device(
                "0000:01:00.0"
                    .parse::<gantry_resources::base::DeviceName>()
                    .unwrap(),
            )
        }))
    };
    for allowed in [false, true] {
        let mut stopped = StoppedVm::new(&host);
        done(stopped.handle(Command::Create(config())));
        let created = stopped.created.as_mut().unwrap();
        std::sync::Arc::make_mut(created).hotplug.ungrouped = allowed;
        match allowed {
            true => drop(done(stopped.handle(attach()))),
            false => {
                let said = refused(stopped.handle(attach())).to_string();
                assert!(said.contains("\"ungrouped\": true"), "{said}");
            }
        }
        let devices = stopped.created.as_ref().unwrap().devices.len();
        assert_eq!(devices, usize::from(allowed));
    }
}

#[test]
fn devices_have_names_before_the_vm_is_booted() {
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    done(stopped.handle(Command::Create(config())));
    let attach = |id: Option<&str>, count| {
        Command::Attach(Attach::Devices(DeviceRequest {
            id: id.map(str::to_owned),
            ..DeviceRequest::group("nvme", count)
        }))
    };
    done(stopped.handle(attach(Some("disk"), 2)));
    done(stopped.handle(attach(None, 1)));
    for (id, count, taken) in [("disk", 1, "disk"), ("disk-1", 1, "disk-1")] {
        let twice = refused(stopped.handle(attach(Some(id), count)));
        assert!(
            matches!(&twice, CommandError::DuplicateId(name) if name == taken),
            "{twice}"
        );
    }
    let detach = |id: &str| {
        Command::Detach(Detach {
            id: id.to_owned(),
            force_after: None,
        })
    };
    let other = refused(stopped.handle(detach("nic"))).to_string();
    assert!(other.contains("it has disk, disk-1"), "{other}");
    done(stopped.handle(detach("disk")));
    let devices = &stopped.created.as_ref().unwrap().devices;
    assert_eq!(*devices, [DeviceRequest::group("nvme", 1)]);
}

#[test]
fn why_a_vm_has_ended_is_shown_until_there_is_another() {
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    let status = SharedStatus::default();
    let seen = |stopped: &StoppedVm| {
        stopped.publish(&status);
        status.info().and_then(|info| info.ended)
    };
    done(stopped.handle(Command::Create(config())));
    assert_eq!(seen(&stopped), None);
    stopped.ran("the guest died: a triple fault".to_owned());
    assert_eq!(
        seen(&stopped).as_deref(),
        Some("the guest died: a triple fault")
    );
    done(stopped.handle(Command::Delete));
    done(stopped.handle(Command::Create(config())));
    assert_eq!(seen(&stopped), None);
}

#[test]
fn a_disk_may_come_before_the_vm_is_booted_under_a_name_of_its_own() {
    let mut stopped = StoppedVm::new(&HostPaths::under(Path::new("/nowhere")));
    done(stopped.handle(Command::Create(config())));
    let attach = |id: Option<&str>| {
        let id = id.map(str::to_owned);
        let disk = DiskConfig::small();
        Command::Attach(Attach::Disk { id, disk })
    };
    for id in [Some("disk1"), None, None] {
        done(stopped.handle(attach(id)));
    }
    let names = |stopped: &StoppedVm| stopped.created.as_ref().unwrap().names();
    assert_eq!(names(&stopped), ["disk1", "disk0", "disk2"]);
    let twice = refused(stopped.handle(attach(Some("disk0"))));
    assert!(matches!(twice, CommandError::DuplicateId(id) if id == "disk0"));
    let detach = |id: &str| {
        let (id, force_after) = (id.to_owned(), None);
        Command::Detach(Detach { id, force_after })
    };
    done(stopped.handle(detach("disk0")));
    assert_eq!(names(&stopped), ["disk1", "disk2"]);
    let gone = refused(stopped.handle(detach("disk0")));
    assert!(matches!(gone, CommandError::NoSuchDevice { .. }), "{gone}");
    let (id, bytes) = ("disk1".to_owned(), 1 << 20);
    let early = refused(stopped.handle(Command::ResizeDisk { id, bytes }));
    assert!(matches!(early, CommandError::NotBooted), "{early}");
}
