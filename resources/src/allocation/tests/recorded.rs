//! Tests: choices on hosts as the field has them, and what no sequence of requests may do.

use std::collections::BTreeSet;

use crate::allocation::choose::{Chosen, Pick, choose, survey};
use crate::allocation::host_view::HostView;
use crate::base::bdf::HostBdf;
use crate::facts::topology::Sockets;
use crate::fixture::hosts;
use crate::holding::record::LeaseStatus;
use crate::inventory::card::{Card, cards};
use crate::inventory::device::HostDevice;
use crate::inventory::unavailable::CandidateFilter;
use crate::pools::group::Groups;
use crate::pools::nova::NumaPolicy;
use crate::pools::request::{Aliases, DeviceRequest, DeviceSource, Placement};
use proptest::prelude::*;

const CONFIG: &str = r#"{
    "groups": [
        {"name": "gpus", "class": "gpu", "traits": "HW_GPU", "rules": [{"vendor": "10de", "class": "03"}]},
        {"name": "switches", "rules": [{"id": "10de:22a3"}]},
        {"name": "vfs", "type": "sriov-nic", "rules": [{"class": "0200", "pf": "*"}]},
        {"name": "disks", "type": "nvme", "rules": [{"class": "0108"}]}
    ],
    "device_spec": [{"vendor_id": "8086", "product_id": "37c9"}, {"vendor_id": "8086", "product_id": "37c8"},
        {"vendor_id": "10de", "product_id": "1c30", "resource_class": "quadro", "traits": "green"}],
    "alias": [
        {"vendor_id": "10de", "product_id": "1c30", "device_type": "type-PCI", "name": "p2000"},
        {"vendor_id": "10de", "product_id": "1eb8", "name": "gpu", "numa_policy": "preferred"},
        {"name": "quadro", "resource_class": "CUSTOM_QUADRO", "traits": "CUSTOM_GREEN"},
        {"name": "red", "resource_class": "CUSTOM_QUADRO", "traits": "CUSTOM_RED"},
        {"vendor_id": "8086", "product_id": "37c8", "name": "qat-card"}
    ]
}"#;

fn aliases(text: &str) -> Result<Vec<DeviceRequest>, String> {
    text.parse().map(|Aliases(requests)| requests)
}

fn groups() -> Groups {
    let host = crate::fixture::FakeHost::new(&[]);
    host.groups(CONFIG);
    Groups::load(&host.paths).unwrap()
}

fn sockets() -> Sockets {
    [(0, 0), (1, 1)].into_iter().collect()
}

fn wish(group: &str, count: u32, policy: NumaPolicy) -> DeviceRequest {
    DeviceRequest {
        numa_policy: Some(policy),
        ..DeviceRequest::new(DeviceSource::Group(group.to_owned()), count)
    }
}

/// Runs a test on what requests would get.
fn on(
    devices: &[HostDevice],
    requests: &[DeviceRequest],
    nodes: &[u32],
    test: impl FnOnce(Chosen<'_>),
) {
    let look = HostView::over(devices.to_vec(), groups(), sockets());
    let placement = Placement::bound(nodes.iter().copied().collect());
    test(survey(&look, requests, &placement).unwrap());
}

fn nodes_of(chosen: &Chosen<'_>) -> BTreeSet<Option<u32>> {
    let devices = chosen.picked.iter().flat_map(|one| &one.devices);
    devices.map(|device| device.numa_node).collect()
}

#[test]
fn devices_with_a_policy_come_from_one_node() {
    let host = hosts::nvswitch_server();
    let requests = [
        wish("gpus", 4, NumaPolicy::Required),
        wish("vfs", 2, NumaPolicy::Required),
    ];
    on(&host, &requests, &[], |chosen| {
        assert!(chosen.picked.iter().all(|one| one.fit.is_enough()));
        assert_eq!(nodes_of(&chosen), BTreeSet::from([Some(0)]));
        assert_eq!(chosen.nodes, Some(BTreeSet::from([0])));
    });
    on(&host, &requests, &[1], |chosen| {
        assert_eq!(nodes_of(&chosen), BTreeSet::from([Some(1)]));
    });
    on(
        &host,
        &[wish("gpus", 5, NumaPolicy::Required)],
        &[],
        |chosen| {
            let fit = &chosen.picked[0].fit;
            assert!(!fit.is_enough());
            assert_eq!(fit.dropped[&CandidateFilter::Numa], 4);
            assert_eq!(fit.free, 4);
        },
    );
    on(
        &host,
        &[wish("gpus", 5, NumaPolicy::Preferred)],
        &[1],
        |chosen| {
            let near = chosen.picked[0]
                .devices
                .iter()
                .filter(|one| one.numa_node == Some(1));
            assert_eq!((near.count(), chosen.picked[0].devices.len()), (4, 5));
        },
    );
    on(
        &host,
        &[wish("gpus", 5, NumaPolicy::Socket)],
        &[0],
        |chosen| {
            assert_eq!(chosen.picked[0].fit.dropped[&CandidateFilter::Numa], 4);
        },
    );
}

#[test]
fn a_busy_node_is_passed_over() {
    let mut host = hosts::nvswitch_server();
    let first = host
        .iter_mut()
        .find(|one| one.class.base() == 0x03)
        .unwrap();
    first.lease = LeaseStatus::Unrecorded;
    on(
        &host,
        &[wish("gpus", 4, NumaPolicy::Required)],
        &[],
        |chosen| {
            assert_eq!(chosen.nodes, Some(BTreeSet::from([1])));
            assert!(chosen.picked[0].fit.is_enough());
        },
    );
}

#[test]
fn novas_samples_are_served() {
    on(
        &hosts::workstation(),
        &aliases("p2000").unwrap(),
        &[],
        |chosen| {
            assert_eq!(chosen.picked[0].fit.devices[0].to_string(), "0000:0b:00.0");
        },
    );
    let requests = aliases("gpu:1, qat-c62x-vf:2").unwrap();
    on(&hosts::quickassist(), &requests, &[], |chosen| {
        let got = |index: usize| chosen.picked[index].fit.devices.len();
        assert_eq!((got(0), got(1)), (1, 2));
        assert!(
            chosen.picked[1]
                .devices
                .iter()
                .all(|one| one.physfn.is_some())
        );
    });
    on(
        &hosts::quickassist(),
        &aliases("qat-vf:48").unwrap(),
        &[],
        |chosen| {
            assert!(chosen.picked[0].fit.is_enough());
        },
    );
    on(
        &hosts::workstation(),
        &aliases("qat-c62x-vf:2").unwrap(),
        &[],
        |chosen| {
            let fit = &chosen.picked[0].fit;
            assert_eq!(
                fit.dropped,
                [(CandidateFilter::Ids, 2)].into(),
                "a card is one"
            );
        },
    );
}

#[test]
fn a_device_type_that_mismatches_is_told_with_the_right_one() {
    on(
        &hosts::quickassist(),
        &aliases("qat-card:1").unwrap(),
        &[],
        |chosen| {
            let fit = &chosen.picked[0].fit;
            assert_eq!(fit.dropped[&CandidateFilter::DeviceType], 3);
            let said = fit.to_string();
            assert!(said.contains("3 with another device_type"), "{said}");
            assert!(
                said.contains(r#"set "device_type": "type-PF" in the alias"#),
                "{said}"
            );
        },
    );
}

#[test]
fn resource_classes_and_traits_select() {
    for (alias, dropped) in [("quadro", None), ("red", Some(CandidateFilter::Traits))] {
        on(
            &hosts::workstation(),
            &[DeviceRequest::alias(alias, 1)],
            &[],
            |chosen| {
                let fit = &chosen.picked[0].fit;
                assert_eq!(fit.is_enough(), dropped.is_none(), "{fit}");
                if let Some(filter) = dropped {
                    assert_eq!(fit.dropped[&filter], 1);
                }
            },
        );
    }
    for (name, fits) in [("hw_gpu", true), ("HW_TPU", false)] {
        let wish = DeviceRequest {
            traits: [name].into_iter().collect(),
            ..DeviceRequest::new(DeviceSource::Group("gpus".to_owned()), 1)
        };
        on(&hosts::nvswitch_server(), &[wish], &[], |chosen| {
            assert_eq!(chosen.picked[0].fit.is_enough(), fits, "{name}");
        });
    }
}

#[test]
fn virtual_functions_can_be_asked_for_across_physical_ones() {
    let wish = |count| DeviceRequest {
        isolate: true,
        ..DeviceRequest::new(DeviceSource::Group("vfs".to_owned()), count)
    };
    on(&hosts::paired_gpus(), &[wish(2)], &[], |chosen| {
        let pfs: BTreeSet<_> = chosen.picked[0]
            .devices
            .iter()
            .map(|one| one.physfn)
            .collect();
        assert_eq!(pfs.len(), 2);
    });
    on(&hosts::paired_gpus(), &[wish(3)], &[], |chosen| {
        let fit = &chosen.picked[0].fit;
        assert_eq!(
            (fit.free, fit.dropped[&CandidateFilter::Isolation]),
            (2, 254)
        );
    });
}

#[test]
fn without_an_iommu_nothing_fits_and_that_is_said() {
    on(
        &hosts::no_iommu(),
        &[DeviceRequest::group("gpus", 1)],
        &[],
        |chosen| {
            assert_eq!(
                chosen.picked[0].fit.dropped[&CandidateFilter::IommuGroup],
                1
            );
        },
    );
}

#[test]
fn nvswitches_are_devices_and_ports_are_none() {
    on(
        &hosts::nvswitch_server(),
        &[DeviceRequest::group("switches", 4)],
        &[],
        |chosen| {
            assert!(chosen.picked[0].fit.is_enough());
            assert_eq!(chosen.picked[0].fit.considered, 8 + 4 + 2 * 129 + 2);
        },
    );
}

/// Which GPUs can form a partition of the NVSwitches, the fabric manager alone knows: each partition is a group.
#[test]
fn gpus_of_a_partition_come_together_or_not_at_all() {
    let host = crate::fixture::FakeHost::new(&[]);
    let mut devices = hosts::nvswitch_server();
    let gpus = devices.iter().filter(|one| one.class.base() == 0x03);
    let gpus: Vec<HostBdf> = gpus.map(|one| one.bdf).collect();
    // Not those of one NUMA node, and not in the order of their addresses.
    let partition = |of: [usize; 4]| of.map(|index| gpus[index]);
    let (even, odd) = (partition([6, 0, 2, 4]), partition([1, 3, 5, 7]));
    let group = |name: &str, gpus: [HostBdf; 4]| {
        let rules = gpus.map(|gpu| serde_json::json!({"slot": gpu.to_string()}));
        serde_json::json!({"name": name, "rules": rules})
    };
    let groups = serde_json::json!({"groups": [group("even", even), group("odd", odd)]});
    host.groups(&groups.to_string());
    let wanted = [DeviceRequest::group("even", 4)];
    let chosen = |devices: &[HostDevice]| {
        let groups = Groups::load(&host.paths).unwrap();
        let look = HostView::over(devices.to_vec(), groups, sockets());
        let chosen = choose(&look, &wanted, &Placement::default());
        chosen.map(|chosen| {
            let picked = chosen.iter().filter_map(Pick::device);
            picked.map(|one| one.bdf).collect::<BTreeSet<_>>()
        })
    };
    assert_eq!(chosen(&devices).unwrap(), BTreeSet::from(even));
    let taken = devices.iter_mut().find(|one| one.bdf == even[1]).unwrap();
    taken.lease = LeaseStatus::Unrecorded;
    assert!(chosen(&devices).is_err(), "not one of the other partition");
}

#[test]
fn other_hardware_at_an_address_is_named() {
    let host = crate::fixture::FakeHost::new(&[]);
    let mut devices = hosts::workstation();
    let rule = crate::pools::rule::Rule::of_device(&devices[2]);
    let text = serde_json::json!({"groups": [{"name": "one", "rules": [rule]}]}).to_string();
    host.groups(&text);
    devices[2].id.device = 0x1c31;
    let groups = Groups::load(&host.paths).unwrap();
    let look = HostView::over(devices, groups, sockets());
    let requests = [DeviceRequest::group("one", 1)];
    let error = choose(&look, &requests, &Placement::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("1 replaced by other hardware"), "{error}");
    assert!(error.contains("0000:0b:00.0 is 10de:1c31 now"), "{error}");
}

fn requests() -> impl Strategy<Value = Vec<DeviceRequest>> {
    let policy = prop::option::of(prop::sample::select(vec![
        NumaPolicy::Required,
        NumaPolicy::Preferred,
        NumaPolicy::Legacy,
        NumaPolicy::Socket,
    ]));
    let source = prop::sample::select(vec![
        DeviceSource::Group("gpus".to_owned()),
        DeviceSource::Group("vfs".to_owned()),
        DeviceSource::Alias("qat-vf".to_owned()),
        DeviceSource::Alias("p2000".to_owned()),
    ]);
    let wish =
        (source, 0u32..6, policy, any::<bool>()).prop_map(|(from, count, numa_policy, isolate)| {
            DeviceRequest {
                numa_policy,
                isolate,
                ..DeviceRequest::new(from, count)
            }
        });
    prop::collection::vec(wish, 1..4)
}

/// What happens to a host: a VM asks, one ends, one is killed while it starts.
#[derive(Clone, Debug)]
enum Event {
    Start(Vec<DeviceRequest>),
    End(prop::sample::Index),
    Killed(Vec<DeviceRequest>),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        3 => requests().prop_map(Event::Start),
        2 => any::<prop::sample::Index>().prop_map(Event::End),
        1 => requests().prop_map(Event::Killed),
    ];
    prop::collection::vec(event, 1..16)
}

/// The locks that the kernel keeps for VMs: all endpoints of the IOMMU groups of their devices.
fn lock(devices: &mut [HostDevice], chosen: &[HostBdf], lease: &LeaseStatus) {
    let groups: BTreeSet<_> = devices
        .iter()
        .filter(|one| chosen.contains(&one.bdf))
        .map(|one| one.iommu_group)
        .collect();
    for device in devices
        .iter_mut()
        .filter(|one| !one.is_bridge() && groups.contains(&one.iommu_group))
    {
        device.lease = lease.clone();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_gives_a_device_or_its_iommu_group_twice(
        name in prop::sample::select(vec!["nvswitch", "paired", "workstation", "quickassist", "no-iommu"]),
        events in events(),
    ) {
        let devices = hosts::all().remove(name).unwrap();
        let mut look = HostView::over(devices, groups(), sockets());
        let mut vms: Vec<Vec<HostBdf>> = Vec::new();
        for event in events {
            let asked = match event {
                Event::End(which) if !vms.is_empty() => {
                    let gone = vms.swap_remove(which.index(vms.len()));
                    lock(&mut look.devices, &gone, &LeaseStatus::Free);
                    continue;
                }
                Event::End(_) => continue,
                // Whoever is killed while choosing has locked nothing that the kernel keeps.
                Event::Killed(requests) => (requests, false),
                Event::Start(requests) => (requests, true),
            };
            let Ok(chosen) = choose(&look, &asked.0, &Placement::default()) else { continue };
            let chosen: Vec<&HostDevice> = chosen.iter().filter_map(Pick::device).collect();
            let wanted: u32 = asked.0.iter().map(|request| request.count).sum();
            let firsts: Vec<&HostDevice> = cards(chosen.iter().copied()).iter().map(Card::first).collect();
            prop_assert_eq!(firsts.len(), wanted as usize);
            let distinct: BTreeSet<HostBdf> = chosen.iter().map(|one| one.bdf).collect();
            prop_assert_eq!(distinct.len(), chosen.len());
            let near: Vec<_> = near_devices(&asked.0, &firsts);
            prop_assert!(near.windows(2).all(|pair| pair[0] == pair[1]), "required devices on two nodes");
            for device in &chosen {
                prop_assert!(device.on_vfio() && !device.lease.is_held() && device.iommu_group.is_some());
                let mine = |other: &&HostDevice| other.iommu_group == device.iommu_group;
                prop_assert!(look.devices.iter().filter(mine).all(|other| !other.lease.is_held()));
            }
            let chosen: Vec<HostBdf> = distinct.into_iter().collect();
            if asked.1 {
                lock(&mut look.devices, &chosen, &LeaseStatus::Unrecorded);
                vms.push(chosen);
            }
        }
        let held: Vec<HostBdf> = vms.concat();
        let distinct: BTreeSet<HostBdf> = held.iter().copied().collect();
        prop_assert_eq!(held.len(), distinct.len(), "two VMs share a device");
        for gone in vms {
            lock(&mut look.devices, &gone, &LeaseStatus::Free);
        }
        prop_assert_eq!(look.devices, hosts::all().remove(name).unwrap(), "a device leaked");
    }
}

/// The nodes of the devices that must be on the VM's node.
fn near_devices(requests: &[DeviceRequest], chosen: &[&HostDevice]) -> Vec<Option<u32>> {
    let mut rest = chosen;
    let mut nodes = Vec::new();
    for request in requests {
        let (own, others) = rest.split_at(request.count as usize);
        rest = others;
        if request.numa_policy == Some(NumaPolicy::Required) {
            nodes.extend(own.iter().map(|device| device.numa_node));
        }
    }
    nodes
}
