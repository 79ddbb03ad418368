//! Where VMs are put on made-up hosts, and what is refused.

use super::*;
use crate::config::MemorySize;

fn numbers(list: &str) -> Numbers {
    list.parse().unwrap()
}

/// Two nodes with processors, and one that is memory only.
fn topology(cpus: &str, memory: &str) -> HostTopology {
    let node = |number, cpus| HostNode {
        number,
        cpus: numbers(cpus),
        memory: Some(1 << 30),
        available: Some(512 << 20),
    };
    HostTopology {
        nodes: vec![node(0, "0-3"), node(1, "4-7"), node(2, "")],
        cpus: numbers(cpus),
        memory: numbers(memory),
    }
}

fn whole() -> HostTopology {
    topology("0-7", "0-2")
}

fn on(nodes: NumaPolicy) -> VmConfig {
    VmConfig {
        nodes,
        ..VmConfig::small()
    }
}

fn these(nodes: &str) -> VmConfig {
    on(NumaPolicy::Only(numbers(nodes)))
}

fn resolve(config: &VmConfig, devices: &str, topology: &HostTopology) -> VmPlacement {
    VmPlacement::resolve(config, &numbers(devices), topology).unwrap()
}

fn refused(config: &VmConfig, topology: &HostTopology) -> String {
    let refused = VmPlacement::resolve(config, &Numbers::default(), topology);
    refused.unwrap_err().to_string()
}

fn placed(nodes: &str, strict: bool, cpus: &str) -> VmPlacement {
    VmPlacement {
        nodes: numbers(nodes),
        strict,
        cpus: numbers(cpus),
    }
}

#[test]
fn a_vm_is_where_its_devices_are() {
    let vm = on(NumaPolicy::NearDevices);
    assert_eq!(resolve(&vm, "1", &whole()), placed("1", false, "4-7"));
    assert_eq!(resolve(&vm, "0-1", &whole()), placed("0-1", false, "0-7"));
    assert_eq!(resolve(&vm, "", &whole()), VmPlacement::default());
    assert_eq!(resolve(&vm, "0-2", &whole()), VmPlacement::default());
    assert_eq!(
        resolve(&on(NumaPolicy::Any), "1", &whole()),
        VmPlacement::default()
    );
}

#[test]
fn near_devices_there_must_be_room() {
    let vm = on(NumaPolicy::NearDevices);
    let few = topology("0-4", "0-2");
    assert_eq!(resolve(&vm, "1", &few), placed("1", false, ""));
    let elsewhere = topology("0-7", "0");
    assert_eq!(resolve(&vm, "1", &elsewhere), VmPlacement::default());
}

#[test]
fn a_vm_is_bound_to_the_nodes_of_its_file() {
    assert_eq!(
        resolve(&these("0"), "1", &whole()),
        placed("0", true, "0-3")
    );
    let few = topology("3-4", "0-2");
    assert_eq!(resolve(&these("0"), "", &few), placed("0", true, "3"));
    assert_eq!(resolve(&these("2"), "", &whole()), placed("2", true, ""));
}

#[test]
fn nodes_that_are_not_to_be_had_are_refused() {
    let text = refused(&these("1,7"), &whole());
    assert!(
        text.contains("no NUMA node 7") && text.contains("0-2"),
        "{text}"
    );
    let text = refused(&these("0-1"), &topology("0-7", "0"));
    assert!(text.contains("memory of NUMA node 1"), "{text}");
    let text = refused(&these("0"), &topology("4-7", "0-2"));
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
        nodes: NumaPolicy::Only(numbers("0-1")),
        ..large
    };
    assert!(VmPlacement::resolve(&wide, &Numbers::default(), &whole()).is_ok());
    let pinned = VmConfig {
        devices: vec![gantry_resources::pools::DeviceRequest::group("gpu", 1)],
        ..wide
    };
    let text = refused(&pinned, &whole());
    assert!(
        text.contains("only 1024 MiB of NUMA node 0-1 are free"),
        "{text}"
    );
    let text = refused(&these("0"), &HostTopology::default());
    assert!(text.contains("no NUMA nodes"), "{text}");
}

#[test]
fn a_vcpu_with_processors_of_its_own_is_there() {
    let vm = VmConfig {
        affinity: [(1, numbers("2,5"))].into(),
        ..these("0")
    };
    let affinities = resolve(&vm, "", &whole()).affinities(&vm);
    let at: Vec<String> = affinities
        .iter()
        .map(|affinity| affinity.cpus.to_string())
        .collect();
    assert_eq!(at, ["0-3", "2,5"]);
    let text = refused(&vm, &topology("0-4", "0-2"));
    assert!(text.contains("vCPU 1") && text.contains("CPU 5"), "{text}");
}

#[test]
fn later_devices_are_chosen_near() {
    let nodes = || BTreeSet::from([1]);
    assert_eq!(
        placed("1", true, "").for_devices(),
        Placement::Bound(nodes())
    );
    assert_eq!(
        placed("1", false, "").for_devices(),
        Placement::Near(nodes())
    );
    assert_eq!(VmPlacement::default().for_devices(), Placement::Anywhere);
}

#[test]
fn a_thread_stays_on_its_processors() {
    let here = HostTopology::read(&HostPaths::default());
    let cpu = here.cpus.first().unwrap();
    let on = |cpus: &[u32], ordered| CpuAffinity {
        cpus: Arc::new(cpus.iter().copied().collect()),
        ordered,
    };
    let affinity = on(&[cpu, 5000], true);
    let thread = std::thread::spawn(move || {
        affinity.apply().unwrap();
        HostTopology::read(&HostPaths::default()).cpus
    });
    assert_eq!(thread.join().unwrap(), [cpu].into_iter().collect());
    assert!(on(&[5000], true).apply().is_err());
    assert!(on(&[5000], false).apply().is_ok());
    assert!(CpuAffinity::default().apply().is_ok());
}
