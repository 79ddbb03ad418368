//! Networks, sockets and random numbers in a VM's file.

use gantry_vmm::TapConfig;

use super::{Folder, file};

#[test]
fn networks_are_as_the_file_says() {
    let folder = Folder::new();
    let nets = |text: &str| file(&format!("\"net\": {text}"));
    let of = |text: &str| folder.load(&nets(text)).unwrap().nets;
    let made = |address| TapConfig::Made { address };
    let plain = of("[{}, {}]");
    assert_eq!((&*plain[0].id, &*plain[1].id), ("net0", "net1"));
    assert_eq!((plain[0].pairs, plain[0].queue_size), (1, 256));
    assert_eq!((plain[0].mtu, &plain[0].tap), (None, &made(None)));
    // Its own address stays, and is one of a single station.
    assert_eq!(plain, of("[{}, {}]"));
    assert_ne!(plain[0].mac, plain[1].mac);
    assert!(plain.iter().all(|net| net.mac[0] & 3 == 2));
    let full = of(
        r#"[{"tap": "tap0", "mac": "52:54:00:00:00:01", "mtu": 9000, "num_queues": 4,
        "queue_size": 512, "id": "lan", "offload_tso": false, "pci_segment": 0, "vhost_user": false, "fds": null}]"#,
    );
    assert_eq!(full[0].tap, TapConfig::Named("tap0".to_owned()));
    assert_eq!(full[0].mac, [0x52, 0x54, 0, 0, 0, 1]);
    assert_eq!((full[0].mtu, full[0].pairs), (Some(9000), 2));
    let offloads = full[0].offloads;
    assert!(offloads.checksum && !offloads.tcp && offloads.udp);
    let none = of(r#"[{"offload_csum": false}]"#)[0].offloads;
    assert!(!none.checksum && !none.tcp && !none.udp);
    for (text, prefix) in [("", 24), (r#", "mask": "255.255.252.0""#, 22)] {
        let net = of(&format!(r#"[{{"ip": "10.0.0.1"{text}}}]"#));
        assert_eq!(net[0].tap, made(Some(([10, 0, 0, 1].into(), prefix))));
    }
}

/// What follows `"net": `, and what is said of it.
const REFUSED: &[(&str, &str)] = &[
    (r#"[{"tap": "a/b"}]"#, "`net[0].tap`: it has a character"),
    (
        r#"[{"tap": "tap0", "ip": "10.0.0.1"}]"#,
        "`net[0].ip`: only a tap that gantry makes",
    ),
    (
        r#"[{"mask": "255.0.0.0"}]"#,
        "`net[0].mask`: it goes with `ip`",
    ),
    (
        r#"[{"ip": "10.0.0.1", "mask": "255.0.255.0"}]"#,
        "`net[0].mask`: 255.0.255.0 is no mask",
    ),
    (
        r#"[{"ip": "10.0.0.1", "mask": "0.0.0.0"}]"#,
        "`net[0].mask`: 0.0.0.0 is no mask",
    ),
    (r#"[{"ip": "10.0.0"}]"#, "net[0].ip"),
    (
        r#"[{"mac": "01:00:00:00:00:01"}]"#,
        "`net[0].mac`: no card can have the address",
    ),
    (r#"[{"mac": "1:2"}]"#, "is not a MAC address"),
    (
        r#"[{"mtu": 67}]"#,
        "`net[0].mtu`: a network cannot have an MTU of 67",
    ),
    (
        r#"[{"num_queues": 3}]"#,
        "`net[0].num_queues`: a network cannot have 3 queues",
    ),
    (
        r#"[{"num_queues": 0}]"#,
        "`net[0].num_queues`: a network cannot have 0 queues",
    ),
    (
        r#"[{"queue_size": 100}]"#,
        "`net[0].queue_size`: a queue of a network cannot have 100",
    ),
    (
        r#"[{"offload_csum": false, "offload_tso": true}]"#,
        "`net[0].offload_tso`: it needs",
    ),
    (
        r#"[{"tap": "t0"}, {"tap": "t0"}]"#,
        "`net[1].tap`: `net[0]` has this tap already",
    ),
    (
        r#"[{"mac": "02:00:00:00:00:01"}, {"mac": "02:00:00:00:00:01"}]"#,
        "`net[1].mac`: `net[0]` has this address already",
    ),
    (
        r#"[{"id": "a"}, {"id": "a"}]"#,
        "`net[1].id`: another device of the VM is called \"a\"",
    ),
    (
        r#"[{"pci_segment": 1}]"#,
        "`net[0].pci_segment`: 1 is not supported yet",
    ),
    (
        r#"[{"fds": [3]}]"#,
        "`net[0].fds`: [...] is not supported yet",
    ),
    (
        r#"[{"vhost_user": true}]"#,
        "`net[0].vhost_user`: true is not supported yet",
    ),
    (
        r#"[{}], "vsock": {"cid": 2}"#,
        "`vsock.cid`: no guest can have CID 2",
    ),
    (
        r#"[{}], "vsock": {"cid": 4294967295}"#,
        "`vsock.cid`: no guest can have CID",
    ),
    (
        r#"[{}], "rng": {"id": "net0"}"#,
        "`rng.id`: another device of the VM is called",
    ),
];

#[test]
fn networks_that_cannot_be_are_refused() {
    let folder = Folder::new();
    for (text, expected) in REFUSED {
        let refusal = folder.refusal(&file(&format!("\"net\": {text}")));
        assert!(refusal.contains(expected), "{refusal}");
        assert!(
            refusal.starts_with("vm.json:2:") || refusal.starts_with("vm.json:3:"),
            "{refusal}"
        );
    }
}

#[test]
fn sockets_and_random_numbers_are_as_the_file_says() {
    let folder = Folder::new();
    let config = folder
        .load(&file(r#""vsock": {"cid": 3}, "rng": {}"#))
        .unwrap();
    assert_eq!(config.vsock.map(|vsock| vsock.cid), Some(3));
    assert_eq!(
        config.rng.map(|rng| rng.source),
        Some("/dev/urandom".into())
    );
    let config = folder
        .load(&file(r#""rng": {"src": "/dev/hwrng", "id": "seed"}"#))
        .unwrap();
    let rng = config.rng.unwrap();
    assert_eq!((&*rng.id, rng.source), ("seed", "/dev/hwrng".into()));
    assert!(config.vsock.is_none());
}
