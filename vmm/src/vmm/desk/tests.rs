//! A VMM without a VM, and what clients may ask of it.

use std::path::Path;

use super::*;

fn config() -> Recipe {
    Recipe(Box::new(|| Ok(VmConfig::small())))
}

fn refused(deed: Deed) -> CommandError {
    match deed {
        Deed::Answer(Err(error)) => error,
        _ => panic!("it was done"),
    }
}

fn done(deed: Deed) -> Answer {
    match deed {
        Deed::Answer(Ok(answer)) => answer,
        _ => panic!("it was not done"),
    }
}

#[test]
fn nothing_can_be_asked_of_a_vm_that_is_not_there() {
    let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
    for command in [
        Command::Boot,
        Command::Counters,
        Command::Shutdown,
        Command::Nmi,
    ] {
        assert!(matches!(
            refused(desk.take(command)),
            CommandError::NotCreated
        ));
    }
    done(desk.take(Command::Delete));
    assert!(matches!(desk.take(Command::Quit), Deed::Quit));
}

#[test]
fn what_describes_no_vm_creates_none() {
    let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
    let wrong = Recipe(Box::new(|| Err(CommandError::Invalid("no kernel".into()))));
    let error = refused(desk.take(Command::Create(wrong)));
    assert!(matches!(error, CommandError::Invalid(_)), "{error}");
    assert!(matches!(
        refused(desk.take(Command::Counters)),
        CommandError::NotCreated
    ));
}

#[test]
fn a_vm_is_created_once_booted_and_deleted() {
    let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
    done(desk.take(Command::Create(config())));
    let again = refused(desk.take(Command::Create(config())));
    assert!(matches!(again, CommandError::AlreadyCreated));
    let stopped = refused(desk.take(Command::Pause));
    assert!(matches!(stopped, CommandError::NotBooted));
    let shown = Shown::default();
    let state = |desk: &Desk| {
        desk.show(&shown);
        shown.info().map(|info| info.state)
    };
    assert_eq!(state(&desk), Some(VmState::Created));
    assert!(matches!(desk.take(Command::Boot), Deed::Boot));
    desk.ended = Some("the guest powered off".to_owned());
    assert_eq!(state(&desk), Some(VmState::Shutdown));
    assert!(matches!(desk.take(Command::Boot), Deed::Boot));
    done(desk.take(Command::Delete));
    assert_eq!(state(&desk), None);
    done(desk.take(Command::Create(config())));
    assert_eq!(state(&desk), Some(VmState::Created));
}

#[test]
fn a_state_is_told_of_once() {
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let events: EventSink = {
        let told = Arc::clone(&told);
        Arc::new(move |event| told.lock().unwrap().push(event))
    };
    let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
    desk.tell(&events);
    done(desk.take(Command::Create(config())));
    desk.tell(&events);
    desk.tell(&events);
    desk.ended = Some("the guest powered off".to_owned());
    desk.tell(&events);
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
    let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
    done(desk.take(Command::Create(config())));
    for _ in 0..2 {
        desk.ran("the guest powered off".to_owned());
        desk.tell(&events);
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
    let mut desk = Desk::new(&host);
    done(desk.take(Command::Create(config())));
    let attach = |plan: &str| {
        Command::Attach(Attach {
            id: None,
            wanted: Wanted::Plan(plan.to_owned()),
        })
    };
    let unknown = refused(desk.take(attach("three")));
    assert!(matches!(unknown, CommandError::Invalid(_)), "{unknown}");
    done(desk.take(attach("two")));
    let devices = &desk.created.as_ref().unwrap().devices;
    assert_eq!(*devices, [Asked::from(Request::group("gpu", 2))]);
}

#[test]
fn a_device_may_come_before_the_vm_is_booted() {
    let attach = |id: Option<&str>| {
        Command::Attach(Attach {
            id: id.map(str::to_owned),
            wanted: Wanted::Request(Request::Device {
                bdf: "0000:01:00.0".parse().unwrap(),
                allow_ungrouped: false,
                allow: Default::default(),
            }),
        })
    };
    let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
    let early = refused(desk.take(attach(None)));
    assert!(matches!(early, CommandError::NotCreated));
    done(desk.take(Command::Create(config())));
    assert!(matches!(done(desk.take(attach(None))), Answer::Done));
    for id in [None, Some("disk")] {
        let twice = refused(desk.take(attach(id)));
        assert!(matches!(twice, CommandError::DuplicateId(_)), "{twice}");
    }
    let created = desk.created.as_ref().unwrap();
    assert_eq!(created.devices.len(), 1);
    let detach = |id: &str| {
        Command::Detach(Detach {
            id: id.to_owned(),
            force_after: None,
        })
    };
    let other = refused(desk.take(detach("0000:02:00.0"))).to_string();
    assert!(other.contains("it has 0000:01:00.0"), "{other}");
    done(desk.take(detach("0000:01:00.0")));
    assert!(desk.created.as_ref().unwrap().devices.is_empty());
    let counters = done(desk.take(Command::Counters));
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
        Command::Attach(Attach {
            id: None,
            wanted: Wanted::Request(Request::Device {
                bdf: "0000:01:00.0".parse().unwrap(),
                allow_ungrouped: true,
                allow: Default::default(),
            }),
        })
    };
    for allowed in [false, true] {
        let mut desk = Desk::new(&host);
        done(desk.take(Command::Create(config())));
        let created = desk.created.as_mut().unwrap();
        std::sync::Arc::make_mut(created).hotplug.ungrouped = allowed;
        match allowed {
            true => drop(done(desk.take(attach()))),
            false => {
                let said = refused(desk.take(attach())).to_string();
                assert!(said.contains("\"ungrouped\": true"), "{said}");
            }
        }
        let devices = desk.created.as_ref().unwrap().devices.len();
        assert_eq!(devices, usize::from(allowed));
    }
}

#[test]
fn devices_have_names_before_the_vm_is_booted() {
    let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
    done(desk.take(Command::Create(config())));
    let attach = |id: Option<&str>, count| {
        Command::Attach(Attach {
            id: id.map(str::to_owned),
            wanted: Wanted::Request(Request::group("nvme", count)),
        })
    };
    done(desk.take(attach(Some("disk"), 2)));
    done(desk.take(attach(None, 1)));
    for (id, count, taken) in [("disk", 1, "disk"), ("disk-1", 1, "disk-1")] {
        let twice = refused(desk.take(attach(Some(id), count)));
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
    let other = refused(desk.take(detach("nic"))).to_string();
    assert!(other.contains("it has disk, disk-1"), "{other}");
    done(desk.take(detach("disk")));
    let devices = &desk.created.as_ref().unwrap().devices;
    assert_eq!(*devices, [Asked::from(Request::group("nvme", 1))]);
}

#[test]
fn why_a_vm_has_ended_is_shown_until_there_is_another() {
    let mut desk = Desk::new(&HostPaths::under(Path::new("/nowhere")));
    let shown = Shown::default();
    let seen = |desk: &Desk| {
        desk.show(&shown);
        shown.info().and_then(|info| info.ended)
    };
    done(desk.take(Command::Create(config())));
    assert_eq!(seen(&desk), None);
    desk.ran("the guest died: a triple fault".to_owned());
    assert_eq!(
        seen(&desk).as_deref(),
        Some("the guest died: a triple fault")
    );
    done(desk.take(Command::Delete));
    done(desk.take(Command::Create(config())));
    assert_eq!(seen(&desk), None);
}
