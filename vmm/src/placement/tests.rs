//! Where VMs are put on made-up hosts, and what is refused.

use super::*;
use crate::config::MemorySize;

fn numbers(list: &str) -> Numbers {
    list.parse().unwrap()
}

/// Two nodes with processors, and one that is memory only.
fn site(cpus: &str, memory: &str) -> Site {
    let node = |number, cpus| HostNode {
        number,
        cpus: numbers(cpus),
        memory: Some(1 << 30),
        available: Some(512 << 20),
    };
    Site {
        nodes: vec![node(0, "0-3"), node(1, "4-7"), node(2, "")],
        cpus: numbers(cpus),
        memory: numbers(memory),
    }
}

fn whole() -> Site {
    site("0-7", "0-2")
}

fn on(nodes: Nodes) -> VmConfig {
    VmConfig {
        nodes,
        ..VmConfig::small()
    }
}

fn these(nodes: &str) -> VmConfig {
    on(Nodes::These(numbers(nodes)))
}

fn settle(config: &VmConfig, devices: &str, site: &Site) -> Home {
    Home::settle(config, &numbers(devices), site).unwrap()
}

fn refused(config: &VmConfig, site: &Site) -> String {
    let refused = Home::settle(config, &Numbers::default(), site);
    refused.unwrap_err().to_string()
}

fn home(nodes: &str, strict: bool, cpus: &str) -> Home {
    Home {
        nodes: numbers(nodes),
        strict,
        cpus: numbers(cpus),
    }
}

#[test]
fn a_vm_is_where_its_devices_are() {
    let vm = on(Nodes::OfDevices);
    assert_eq!(settle(&vm, "1", &whole()), home("1", false, "4-7"));
    assert_eq!(settle(&vm, "0-1", &whole()), home("0-1", false, "0-7"));
    assert_eq!(settle(&vm, "", &whole()), Home::default());
    assert_eq!(settle(&vm, "0-2", &whole()), Home::default());
    assert_eq!(settle(&on(Nodes::Any), "1", &whole()), Home::default());
}

#[test]
fn near_devices_there_must_be_room() {
    let vm = on(Nodes::OfDevices);
    let few = site("0-4", "0-2");
    assert_eq!(settle(&vm, "1", &few), home("1", false, ""));
    let elsewhere = site("0-7", "0");
    assert_eq!(settle(&vm, "1", &elsewhere), Home::default());
}

#[test]
fn a_vm_is_bound_to_the_nodes_of_its_file() {
    assert_eq!(settle(&these("0"), "1", &whole()), home("0", true, "0-3"));
    let few = site("3-4", "0-2");
    assert_eq!(settle(&these("0"), "", &few), home("0", true, "3"));
    assert_eq!(settle(&these("2"), "", &whole()), home("2", true, ""));
}

#[test]
fn nodes_that_are_not_to_be_had_are_refused() {
    let text = refused(&these("1,7"), &whole());
    assert!(
        text.contains("no NUMA node 7") && text.contains("0-2"),
        "{text}"
    );
    let text = refused(&these("0-1"), &site("0-7", "0"));
    assert!(text.contains("memory of NUMA node 1"), "{text}");
    let text = refused(&these("0"), &site("4-7", "0-2"));
    assert!(text.contains("no CPU of NUMA node 0"), "{text}");
    let large = VmConfig {
        memory: MemorySize::new(2 << 30).unwrap(),
        ..these("0")
    };
    let text = refused(&large, &whole());
    assert!(
        text.contains("2048 MiB") && text.contains("1024 MiB"),
        "{text}"
    );
    let wide = VmConfig {
        nodes: Nodes::These(numbers("0-1")),
        ..large
    };
    assert!(Home::settle(&wide, &Numbers::default(), &whole()).is_ok());
    let pinned = VmConfig {
        devices: vec![gantry_resources::Request::group("gpu", 1).into()],
        ..wide
    };
    let text = refused(&pinned, &whole());
    assert!(
        text.contains("only 1024 MiB of NUMA node 0-1 are free"),
        "{text}"
    );
    let text = refused(&these("0"), &Site::default());
    assert!(text.contains("no NUMA nodes"), "{text}");
}

#[test]
fn a_vcpu_with_processors_of_its_own_is_there() {
    let vm = VmConfig {
        affinity: [(1, numbers("2,5"))].into(),
        ..these("0")
    };
    let affinities = settle(&vm, "", &whole()).affinities(&vm);
    let at: Vec<String> = affinities
        .iter()
        .map(|affinity| affinity.cpus.to_string())
        .collect();
    assert_eq!(at, ["0-3", "2,5"]);
    let text = refused(&vm, &site("0-4", "0-2"));
    assert!(text.contains("vCPU 1") && text.contains("CPU 5"), "{text}");
}

#[test]
fn later_devices_are_chosen_near() {
    let nodes = || BTreeSet::from([1]);
    assert_eq!(home("1", true, "").placement(), Placement::Bound(nodes()));
    assert_eq!(home("1", false, "").placement(), Placement::Near(nodes()));
    assert_eq!(Home::default().placement(), Placement::Anywhere);
}

#[test]
fn a_thread_stays_on_its_processors() {
    let here = Site::read(&HostPaths::default());
    let cpu = here.cpus.first().unwrap();
    let on = |cpus: &[u32], ordered| CpuAffinity {
        cpus: Arc::new(cpus.iter().copied().collect()),
        ordered,
    };
    let affinity = on(&[cpu, 5000], true);
    let thread = std::thread::spawn(move || {
        affinity.apply().unwrap();
        Site::read(&HostPaths::default()).cpus
    });
    assert_eq!(thread.join().unwrap(), [cpu].into_iter().collect());
    assert!(on(&[5000], true).apply().is_err());
    assert!(on(&[5000], false).apply().is_ok());
    assert!(CpuAffinity::default().apply().is_ok());
}
