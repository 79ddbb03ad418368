//! What is not in the other VMM's API: groups, events, metrics, the published document.

use std::io::{BufRead, BufReader, Write};

use serde_json::Value;

use crate::fake::Bed;

#[test]
fn devices_come_from_groups_and_aliases_in_numbers() {
    let bed = Bed::new();
    bed.boot();
    let (status, body) = bed.put("vm.add-device", r#"{"group": "nvme", "count": 2}"#);
    assert_eq!(status, 200);
    let added: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (&added["id"], &added["devices"][1]["id"]),
        (&"dev0".into(), &"dev1".into())
    );
    assert_eq!(added["devices"][1]["group"], "nvme");
    assert_eq!(bed.put("vm.add-device", r#"{"alias": "gpu"}"#).0, 200);
    assert_eq!(
        bed.put("vm.add-device", r#"{"group": "nvme", "count": 2}"#)
            .0,
        409
    );
    for (body, words) in [
        (r#"{}"#, "neither"),
        (r#"{"group": "a", "path": "/b"}"#, "more than one"),
        (r#"{"group": "a", "count": 0}"#, "count"),
        (r#"{"group": "a", "size": 3}"#, "size"),
        (r#"{"group": "a", "iommu": true}"#, "iommu"),
        (r#"{"plan": "a", "group": "b"}"#, "unknown key `group`"),
        (r#"{"group": "a", "id": "b/c"}"#, "`id`"),
        (r#"{"group": "#, "EOF"),
        ("", "EOF"),
    ] {
        let (status, answer) = bed.put("vm.add-device", body);
        assert_eq!(status, 400, "{body}");
        assert!(answer.contains(words), "{body}: {answer}");
    }
    for (body, words) in [
        (
            r#"{"id": "dev0", "force_after": -1}"#,
            "the body:1:31: `force_after`: ",
        ),
        (r#"["dev0", 1]"#, "expected an object, found a list"),
        (
            r#"{"id": "dev0", "force": 1}"#,
            "did you mean `force_after`?",
        ),
        (r#"{"id": "a", "id": "dev0"}"#, "`id` stands twice"),
    ] {
        let (status, answer) = bed.put("vm.remove-device", body);
        assert_eq!(status, 400, "{answer}");
        assert!(answer.contains(words), "{answer}");
    }
    let forced = r#"{"id": "dev0", "force_after": 1.5}"#;
    assert_eq!(bed.put("vm.remove-device", forced).0, 204);
}

#[test]
fn a_disk_is_added_and_made_larger() {
    let bed = Bed::new();
    bed.boot();
    let body = r#"{"path": "/srv/data.raw", "id": "data"}"#;
    let (status, answer) = bed.put("vm.add-disk", body);
    assert_eq!(status, 200, "{answer}");
    let added: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(
        added,
        serde_json::json!({"id": "data", "bdf": "0000:01:00.0"})
    );
    let info: Value = serde_json::from_str(&bed.get("/api/v1/vm.info").1).unwrap();
    assert_eq!(info["config"]["disks"][0]["path"], "/srv/data.raw");
    assert_eq!(info["devices"][0]["path"], "/srv/data.raw");
    let (status, answer) = bed.put("vm.add-disk", body);
    assert_eq!(status, 409, "{answer}");
    let larger = r#"{"id": "data", "desired_size": 1073741824}"#;
    assert_eq!(bed.put("vm.resize-disk", larger).0, 204);
    for (body, words) in [
        (r#"{"id": "data"}"#, "desired_size"),
        (r#"{"id": "data", "desired_size": -1}"#, "desired_size"),
        (
            r#"{"id": "data", "desired_size": 1, "force": true}"#,
            "force",
        ),
    ] {
        let (status, answer) = bed.put("vm.resize-disk", body);
        assert_eq!(status, 400, "{answer}");
        assert!(answer.contains(words), "{answer}");
    }
}

#[test]
fn slots_are_told_of() {
    let bed = Bed::new();
    let mut config: Value = serde_json::from_str(&bed.config()).unwrap();
    config["hotplug"] = serde_json::json!({"slots": 3, "groups": ["nvme"], "window": "1G"});
    assert_eq!(bed.put("vm.create", &config.to_string()).0, 204);
    let info: Value = serde_json::from_str(&bed.get("/api/v1/vm.info").1).unwrap();
    let told = serde_json::json!(
        {"slots": 3, "groups": ["nvme"], "window": 1 << 30, "disks": ["/"]}
    );
    assert_eq!(info["config"]["hotplug"], told, "{info}");
}

#[test]
fn what_a_vm_is_told_to_be_can_be_posted_back() {
    let bed = Bed::new();
    let mut config: Value = serde_json::from_str(&bed.config()).unwrap();
    config["numa_nodes"] = serde_json::json!([0, 1]);
    config["cpus"]["affinity"] = serde_json::json!([{"vcpu": 1, "host_cpus": [2, 3]}]);
    config["cpus"]["max_phys_bits"] = 40.into();
    config["pvpanic"] = false.into();
    config["platform"] = serde_json::json!({"iommufd": true});
    config["hotplug"] = serde_json::json!({"slots": 3, "groups": ["nvme"], "window": "1G"});
    config["devices"] = serde_json::json!([
        {"group": "nvme", "count": 2, "id": "disk", "numa_policy": "required"},
        {"alias": "gpu", "traits": "CUSTOM_A", "resource_class": "CUSTOM_B", "isolate": true},
        {"path": "01:00.0"},
    ]);
    let image = bed.folder.path().join("disk.raw");
    std::fs::write(&image, [0; 1024]).unwrap();
    config["disks"] = serde_json::json!([
        {"path": image, "readonly": true, "serial": "S1", "id": "root", "num_queues": 2, "queue_size": 64},
    ]);
    config["net"] = serde_json::json!([
        {"tap": "tap0", "mac": "52:54:00:00:00:01", "mtu": 9000, "num_queues": 4, "queue_size": 512, "id": "lan",
         "offload_csum": true, "offload_tso": false, "offload_ufo": true},
        {"ip": "10.0.0.1", "mask": "255.255.252.0", "mac": "52:54:00:00:00:02", "num_queues": 2, "queue_size": 256,
         "id": "net1", "offload_csum": false, "offload_tso": false, "offload_ufo": false},
    ]);
    config["vsock"] = serde_json::json!({"cid": 7, "id": "sock"});
    config["rng"] = serde_json::json!({"src": "/dev/hwrng", "id": "seed"});
    assert_eq!(bed.put("vm.create", &config.to_string()).0, 204);
    let told = || {
        let info: Value = serde_json::from_str(&bed.get("/api/v1/vm.info").1).unwrap();
        info["config"].clone()
    };
    let first = told();
    assert_eq!(first["devices"].as_array().unwrap().len(), 3, "{first}");
    assert_eq!(first["devices"][0], config["devices"][0]);
    assert_eq!(first["cpus"]["max_phys_bits"], 40);
    assert_eq!(first["pvpanic"], false);
    assert_eq!(first["platform"], config["platform"]);
    for key in ["disks", "net", "vsock", "rng"] {
        assert_eq!(first[key], config[key]);
    }
    let path = "/sys/bus/pci/devices/0000:01:00.0";
    assert_eq!(first["devices"][2]["path"], path);
    let again = |config: &Value| {
        assert_eq!(bed.put("vm.delete", "").0, 204);
        let (status, answer) = bed.put("vm.create", &config.to_string());
        assert_eq!(status, 204, "{answer}");
    };
    again(&first);
    assert_eq!(told(), first);
    // While it runs, its devices are those that it has.
    bed.put("vm.boot", "");
    let more = r#"{"group": "nvme", "id": "more", "interrupts": "none", "allow_no_reset": true}"#;
    let (status, answer) = bed.put("vm.add-device", more);
    assert_eq!(status, 200, "{answer}");
    let running = told();
    assert_eq!(running["devices"][0]["interrupts"], "none");
    assert_eq!(running["devices"][0]["allow_no_reset"], true);
    assert_eq!(running["devices"][0]["id"], "more", "{running}");
    again(&running);
    assert_eq!(told(), running);
}

#[test]
fn events_come_as_lines_until_the_end() {
    let mut bed = Bed::new();
    let mut stream = bed.connect();
    stream
        .write_all(b"GET /api/v1/events HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    let mut next = || {
        let objects = lines.by_ref().filter(|line| line.starts_with('{'));
        let mut objects = objects.map(|line| serde_json::from_str::<Value>(&line).unwrap());
        objects.next()
    };
    let first = next().unwrap();
    assert_eq!(
        (&first["event"], &first["state"]),
        (&"state".into(), &Value::Null)
    );
    assert!(first["time"].as_f64().unwrap() > 1.7e9);
    bed.boot();
    assert_eq!(next().unwrap()["state"], "Running");
    bed.put("vm.add-device", r#"{"group": "nvme"}"#);
    let attached = next().unwrap();
    assert_eq!(attached["event"], "attached");
    assert_eq!(attached["device"]["pci_bdf"], "0000:01:00.0");
    assert_eq!(next().unwrap()["event"], "enabled");
    bed.put("vm.remove-device", r#"{"id": "dev0"}"#);
    assert_eq!(next().unwrap()["event"], "detached");
    bed.stop();
    assert_eq!(next(), None);
}

#[test]
fn metrics_are_numbers_with_names() {
    let bed = Bed::new();
    let (status, text) = bed.get("/metrics");
    assert_eq!(status, 200);
    assert!(!text.contains("gantry_vm_state"), "{text}");
    bed.boot();
    bed.put("vm.add-device", r#"{"group": "nvme"}"#);
    let (_, text) = bed.get("/metrics");
    let device = r#"vm="fake",device="dev0",host="0000:01:00.0",group="nvme""#;
    for line in [
        r#"gantry_vm_state{vm="fake",state="running"} 1"#,
        r#"gantry_vm_slots_free{vm="fake"} 3"#,
        &format!(r#"gantry_device_interrupts_total{{{device},vector="2"}} 40"#),
        &format!(r#"gantry_device_trapped_reads_total{{{device},region="bar0"}} 7"#),
        &format!(r#"gantry_device_mapped_bytes{{{device}}} 16384"#),
        &format!(r#"gantry_device_attach_step_seconds{{{device},step="open"}} 0.107"#),
        r#"gantry_api_requests_total{vm="fake",path="/api/v1/vm.boot",status="204"} 1"#,
        "# EOF",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no {line} in\n{text}"
        );
    }
}

#[test]
fn the_api_tells_what_it_has() {
    let bed = Bed::new();
    let (status, text) = bed.get("/api/v1/openapi.json");
    assert_eq!(status, 200);
    let document: Value = serde_json::from_str(&text).unwrap();
    let add = &document["paths"]["/api/v1/vm.add-device"]["put"];
    assert!(add["responses"]["409"].is_object(), "{add}");
    let keys = &document["components"]["schemas"]["DeviceConfig"]["properties"];
    assert!(
        keys["group"].is_object() && keys["path"].is_object(),
        "{keys}"
    );
    let vm = &document["components"]["schemas"]["VmConfig"]["properties"];
    assert!(vm["payload"].is_object(), "{vm}");
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let bed = Bed::new();
    assert_eq!(bed.get("/api/v1/vm.fly").0, 404);
    assert_eq!(
        bed.get("/api/v1/vm.info?verbose=1").0,
        404,
        "no VM, but the path is known"
    );
    let (status, answer) = bed.get("/api/v1/vm.boot");
    assert!(
        status == 405 && answer.contains("takes PUT"),
        "{status} {answer}"
    );
    let answer = bed.raw(b"GET /api/v1/vm.boot HTTP/1.1\r\nconnection: close\r\n\r\n");
    assert!(answer.contains("Allow: PUT\r\n"), "{answer}");
}
