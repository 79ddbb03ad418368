//! Plans, tenants, maintenance, VM files and schemas.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use gantry_resources::base::HostPaths;
use gantry_resources::holding::{Holder, announce};
use serde_json::Value;

use crate::host::{Done, Host, first_words};

#[test]
fn what_would_only_fail_later_is_told_at_once() {
    let host = Host::new();
    let create =
        |name: &str, more: &[&str]| host.gantry(&[&["group", "create", name][..], more].concat());
    let functions = |count: u32| format!(r#"{{"pf": "00:03.0", "count": {count}}}"#);
    let none = create("vfs", &["--sriov", &functions(2)]).failed(1);
    assert!(none.contains("has no SR-IOV"), "{none}");
    let card = host.path("sys/bus/pci/devices/0000:00:03.0");
    fs::write(card.join("sriov_totalvfs"), "8\n").unwrap();
    create("vfs", &["--sriov", &functions(2)]).ok();
    let edit = ["group", "edit", "vfs", "--sriov", &functions(9)];
    let many = host.gantry(&edit).failed(1);
    assert!(many.contains("8 virtual functions at most"), "{many}");
    let typeless = create("vgpus", &["--type", "vgpu"]).failed(1);
    assert!(typeless.contains("give it a type"), "{typeless}");
    let foreign = create(
        "vgpus",
        &["--type", "vgpu", "--vgpu", r#"{"type": "nvidia-1"}"#],
    );
    let said = "nothing on this host makes a vGPU of type \"nvidia-1\"";
    assert!(
        foreign.code == Some(0) && foreign.err.contains(said),
        "{foreign:?}"
    );

    let plan = host.gantry(&[
        "plan", "create", "p", "--device", "disk:1", "--device", "vfs:1",
    ]);
    let said = "plan p: there is no group \"disk\": did you mean \"disks\"?";
    assert!(plan.code == Some(0) && plan.err.contains(said), "{plan:?}");
    assert!(!plan.err.contains("vfs"), "{plan:?}");
    let gone = host.gantry(&["group", "delete", "vfs"]);
    let said = "plan p asks for group vfs: `gantry plan edit p` changes that";
    assert!(gone.code == Some(0) && gone.err.contains(said), "{gone:?}");

    let nothing = host.gantry(&["group", "fit", "{}"]).ok();
    assert_eq!(nothing, "The request asks for no devices.\n");
    let unknown = host.gantry(&["group", "fit", r#"{"x": 1}"#]).failed(2);
    assert!(
        unknown.contains("unknown key `x`: the keys here are"),
        "{unknown}"
    );

    fs::write(host.path("kernel"), "").unwrap();
    let vm = r#"{"payload": {"kernel": "kernel"}, "hotplug": {"groups": ["disk", "disks"]}}"#;
    fs::write(host.path("vm.json"), vm).unwrap();
    let run = host.gantry(&["run", host.path("vm.json").to_str().unwrap()]);
    let said = "hotplug.groups: there is no group \"disk\"";
    assert!(
        run.err.matches("hotplug.groups").count() == 1 && run.err.contains(said),
        "{run:?}"
    );
}

#[test]
fn a_tenants_card_counts_as_one() {
    let host = Host::new();
    for (function, class) in [(0, "0x030000"), (1, "0x040300")] {
        let bdf = format!("0000:0b:00.{function}");
        host.device(&bdf, ["0x10de", "0x1e87", class], "vfio-pci", 20);
    }
    let write = |path: &str, text: &str| {
        let path = host.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("etc/tenants/lab/tenant.json", r#"{"user": "root"}"#);
    let rules = r#"[{"slot": "0000:0b:00.0"}, {"slot": "0000:0b:00.1"}]"#;
    let groups = format!(r#"{{"groups": [{{"name": "lab", "rules": {rules}}}]}}"#);
    write("etc/tenants/lab/groups.json", &groups);
    let text = host.gantry(&["tenant", "list", "--json"]).ok();
    let tenant = &serde_json::from_str::<Value>(&text).unwrap()[0];
    assert_eq!((&tenant["total"], &tenant["used"]), (&1.into(), &0.into()));
    assert_eq!(tenant["devices"].as_array().unwrap().len(), 2);
}

#[test]
fn a_tenants_vm_is_named_with_its_tenant() {
    let host = Host::new();
    let definition = host.path("etc/tenants/lab/tenant.json");
    fs::create_dir_all(definition.parent().unwrap()).unwrap();
    fs::write(&definition, r#"{"user": "nobody"}"#).unwrap();
    let mut paths = HostPaths::under(&host.path(""));
    paths.run = host.path("run/tenants/lab");
    let holder = Holder {
        vm: "al".to_owned(),
        pid: 7,
    };
    let running = announce(&paths, &holder).unwrap();
    let list = host.gantry(&["vm", "list"]).ok();
    assert!(list.contains("al    7    tenant lab"), "{list}");
    let json: Value = serde_json::from_str(&host.gantry(&["vm", "list", "--json"]).ok()).unwrap();
    assert_eq!(json[0]["tenant"], "lab");
    let error = host.gantry(&["vm", "info", "al"]).failed(1);
    let said = "VM \"al\" (pid 7) of tenant lab is not yours";
    assert!(error.contains(said), "{error}");
    assert!(
        error.contains("sudo -u nobody gantry vm info al"),
        "{error}"
    );
    let error = host.gantry(&["tenant", "delete", "lab"]).failed(1);
    // The tenant names the process, which is not the tenant's.
    let said = "tenant \"lab\" says that its VM \"al\" runs, but not as which process";
    assert!(error.contains(said), "{error}");
    drop(running);
    paths.run = host.path("run");
    let _running = announce(&paths, &holder).unwrap();
    let error = host.gantry(&["vm", "info", "al"]).failed(1);
    assert!(error.contains("VM \"al\" (pid 7) has no socket"), "{error}");
    let error = host.gantry(&["vm", "info", "el"]).failed(1);
    assert!(error.contains("no VM \"el\" runs"), "{error}");
}

#[test]
fn a_wrong_file_is_told_on_one_screen() {
    let host = Host::new();
    let file = host.path("vm.json");
    fs::write(
        &file,
        "{\n  \"cpus\": {\n    \"boot_vcpu\": 1},\n\"memory\": {\"size\": 1}}",
    )
    .unwrap();
    let name = file.display().to_string();
    let error = host.gantry(&["run", &name]).failed(2);
    let expected = [
        "error: NAME:1:1: `payload`: this key is missing: add \"payload\": ...\n",
        "  NAME:3:5: unknown key `cpus.boot_vcpu`: did you mean `boot_vcpus`?\n",
        "  NAME:4:20: `memory.size`: 1 bytes is too small: use 32 MiB or more\n",
    ];
    assert_eq!(error, expected.concat().replace("NAME", &name));
    let error = host.gantry(&["run", "none.json"]).failed(2);
    assert!(
        error.starts_with("error: cannot read none.json\n  because: No such file"),
        "{error}"
    );
}

#[test]
fn a_vm_that_cannot_be_built_is_told_on_one_screen() {
    let host = Host::new();
    fs::write(host.path("vmlinux"), "no kernel").unwrap();
    fs::write(
        host.path("vm.json"),
        r#"{"payload": {"kernel": "vmlinux"}, "serial": {"mode": "Null"}}"#,
    )
    .unwrap();
    let file = host.path("vm.json").display().to_string();
    // Where this runs, KVM may be missing or not permitted; that is told before.
    let error = host.gantry(&["run", &file]).failed(1);
    let named = error.contains("vmlinux is not a kernel") || error.contains("/dev/kvm");
    assert!(error.starts_with("error: ") && named, "{error}");
    assert!(error.lines().count() < 10, "{error}");
}

#[test]
fn a_check_of_a_vm_finds_that_its_kernel_cannot_be_booted() {
    let host = Host::new();
    fs::write(
        host.path("vm.json"),
        r#"{"payload": {"kernel": "vmlinux"}}"#,
    )
    .unwrap();
    let file = host.path("vm.json").display().to_string();
    for (kernel, words) in [("no kernel", "is not a kernel"), ("", "an empty file")] {
        fs::write(host.path("vmlinux"), kernel).unwrap();
        let said = host.gantry(&["run", "--check", &file]);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.err.contains("vmlinux"), "{said:?}");
        assert!(said.err.contains(words), "{said:?}");
        assert!(!said.out.contains("nothing is wrong"), "{said:?}");
    }
}

#[test]
fn a_check_of_a_vm_finds_what_the_host_does_not_have() {
    let host = Host::new();
    fs::create_dir_all(host.path("proc")).unwrap();
    fs::write(host.path("proc/meminfo"), "MemTotal: 8388608 kB\n").unwrap();
    fs::write(host.path("vmlinux"), bzimage()).unwrap();
    let file = host.path("vm.json").display().to_string();
    let check = |more: &str| {
        let text = format!(r#"{{"payload": {{"kernel": "vmlinux"}}{more}}}"#);
        fs::write(&file, text).unwrap();
        host.gantry(&["run", "--check", &file])
    };
    let said = check("").ok();
    assert!(said.contains("nothing is wrong"), "{said}");
    for (more, words) in [
        (r#", "memory": {"size": "900G"}"#, "memory.size: 921600 MiB"),
        (
            r#", "numa_nodes": [5]"#,
            "numa_nodes: this host has no NUMA node",
        ),
        (
            r#", "memory": {"size": "32M"}"#,
            "does not fit into guest memory",
        ),
    ] {
        let said = check(more);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.err.contains(words), "{said:?}");
    }
}

/// The header of a bzImage with a 64-bit entry, of a kernel that takes 64 MiB while it unpacks itself, and no
/// code.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 5 * 512];
    for (offset, bytes) in [
        (0x1f1, &[4][..]),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS"),
        (0x206, &0x20f_u16.to_le_bytes()),
        (0x211, &[1]),
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()),
        (0x236, &1_u16.to_le_bytes()),
        (0x238, &2047_u32.to_le_bytes()),
        (0x258, &0x100_0000_u64.to_le_bytes()),
        (0x260, &0x400_0000_u32.to_le_bytes()),
    ] {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    file
}

#[test]
fn standard_input_is_named_so() {
    let host = Host::new();
    let mut child = host
        .command(&["run", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"{}").unwrap();
    let error = Done::from(child.wait_with_output().unwrap()).failed(2);
    assert!(
        error.starts_with("error: <stdin>:1:1: `payload`: this key is missing: "),
        "{error}"
    );
}

#[test]
fn schemas_are_json() {
    let host = Host::new();
    for (file, key) in [("vm", "payload"), ("groups", "groups")] {
        let schema: Value = serde_json::from_str(&host.gantry(&["schema", file]).ok()).unwrap();
        assert!(schema["properties"][key].is_object(), "{file}");
    }
}

#[test]
fn plans_are_made_used_and_deleted() {
    let host = Host::new();
    host.node(11);
    host.gantry(&["plan", "list"]).ok();
    let args = ["plan", "create", "fast", "--vcpus", "2", "--memory", "1GiB"];
    host.gantry(&[&args[..], &["--device", "disks:1"]].concat())
        .ok();
    assert_eq!(first_words(&host.gantry(&["plan", "list"]).ok()), ["fast"]);
    let fit = host.gantry(&["group", "fit", r#"{"plan": "fast"}"#]).ok();
    assert!(
        fit.contains("group \"disks\": 1 of 1: 0000:01:00.0"),
        "{fit}"
    );
    host.gantry(&[&args[..]].concat()).failed(1);
    host.gantry(&["plan", "create", "odd", "--memory", "big"])
        .failed(2);
    let shown = host.gantry(&["plan", "show", "fast"]).ok();
    assert!(shown.contains("\"vcpus\": 2"), "{shown}");
    host.gantry(&["plan", "delete", "fast"]).ok();
    let error = host.gantry(&["plan", "show", "fast"]).failed(2);
    assert!(error.contains("no plan \"fast\""), "{error}");
}

#[test]
fn a_change_of_a_tenant_or_plan_is_told_to_programs() {
    let host = Host::new();
    let told = |args: &[&str]| -> Value {
        let args = [args, &["--json"]].concat();
        serde_json::from_str(&host.gantry(&args).ok()).unwrap()
    };
    let file = host.path("etc/tenants/lab/tenant.json");
    let created = told(&["tenant", "create", "lab", "--user", "root"]);
    assert_eq!(
        created,
        serde_json::json!({
            "tenant": "lab", "done": "created", "user": "root", "description": "", "files": [file],
        })
    );
    let changed = told(&["tenant", "edit", "lab", "--description", "upstairs"]);
    assert_eq!(changed["done"], "changed");
    assert_eq!(changed["description"], "upstairs");
    let deleted = told(&["tenant", "delete", "lab"]);
    assert_eq!(
        deleted,
        serde_json::json!({"tenant": "lab", "done": "deleted"})
    );
    let file = host.path("etc/plans.json");
    let created = told(&["plan", "create", "fast", "--vcpus", "2"]);
    assert_eq!(
        created,
        serde_json::json!({"plan": "fast", "done": "created", "files": [file]})
    );
    let deleted = told(&["plan", "delete", "fast"]);
    assert_eq!(
        deleted,
        serde_json::json!({"plan": "fast", "done": "deleted", "files": [file]})
    );
}

#[test]
fn no_vm_starts_in_maintenance() {
    let host = Host::new();
    fs::write(host.path("kernel"), "no kernel").unwrap();
    fs::write(host.path("vm.json"), r#"{"payload": {"kernel": "kernel"}}"#).unwrap();
    let vm = host.path("vm.json");
    let vm = vm.to_str().unwrap();
    let on = host
        .gantry(&["maintenance", "on", "--reason", "new disks"])
        .ok();
    assert_eq!(on, "maintenance is on: new disks\nno VM runs\n");
    assert_eq!(host.gantry(&["maintenance", "on"]).ok(), on);
    let error = host.gantry(&["run", vm]).failed(75);
    assert!(
        error.contains("in maintenance") && error.contains("new disks"),
        "{error}"
    );
    let off = host.gantry(&["maintenance", "off"]).ok();
    assert_eq!(off, "maintenance is off\nno VM runs\n");
    let off = host.gantry(&["maintenance", "off", "--json"]).ok();
    let off: Value = serde_json::from_str(&off).unwrap();
    assert_eq!(off, serde_json::json!({"maintenance": null, "running": []}));
    let error = host.gantry(&["run", vm]).failed(1);
    assert!(!error.contains("in maintenance"), "{error}");
}

#[test]
fn a_vms_file_is_checked_and_nothing_is_taken() {
    let host = Host::new();
    host.node(11);
    let file = host.path("vm.json");
    let path = file.to_str().unwrap();
    let write = |kernel: &str, count: u32| {
        let text = format!(
            r#"{{"payload": {{"kernel": "{kernel}"}}, "devices": [{{"group": "disks", "count": {count}}}]}}"#
        );
        fs::write(&file, text).unwrap();
    };
    fs::write(host.path("kernel"), bzimage()).unwrap();
    for args in [&["run", "--check"][..], &["group", "fit"]] {
        let args = [args, &[path]].concat();
        write("kernel", 1);
        let said = host.gantry(&args).ok();
        assert!(
            said.contains("group \"disks\": 1 of 1: 0000:01:00.0"),
            "{said}"
        );
        write("kernel", 2);
        let done = host.gantry(&args);
        assert_eq!(done.code, Some(1), "{}", done.err);
        assert!(
            done.err
                .contains("group \"disks\" has only 1 free device (2 asked for)"),
            "{}",
            done.err
        );
        write("none", 1);
        let done = host.gantry(&args);
        assert!(
            done.code != Some(0) && done.err.contains("payload.kernel"),
            "{}",
            done.err
        );
    }
    let said = host.gantry(&["plan", "create", "p"]).failed(2);
    assert!(said.contains("plan p would be empty"), "{said}");
}

#[test]
fn a_command_of_another_tool_is_pointed_to_the_one_here() {
    let host = Host::new();
    for (command, pointer) in [
        ("ls", "gantry vm list"),
        ("ps", "gantry vm list"),
        ("start", "gantry run vm.json"),
        ("serial", "gantry vm console NAME"),
        ("vm start", "gantry run vm.json"),
        ("vm stop", "'shutdown'"),
        ("device bind", "gantry device detach"),
        ("device show", "gantry device list"),
        ("group ls", "'list'"),
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        let said = host.gantry(&words).failed(2);
        assert!(said.contains(pointer), "{command}: {said}");
    }
}

#[test]
fn a_dash_is_standard_output_or_refused() {
    let host = Host::new();
    let svg = host.gantry(&["device", "tree", "--svg", "-"]).ok();
    assert!(svg.starts_with("<svg "), "{svg}");
    let said = host.gantry(&["man", "-"]).failed(2);
    assert!(said.contains("a directory"), "{said}");
    let said = host.gantry(&["run", "--api-socket", "-"]).failed(2);
    assert!(said.contains("a socket has a path"), "{said}");
    let metrics = host.gantry(&["metrics", "--textfile", "-"]).ok();
    assert!(metrics.contains("gantry_group_devices"), "{metrics}");
}

#[test]
fn only_a_file_is_replaced_by_metrics_and_no_link_is_followed() {
    let host = Host::new();
    let textfile = host.path("gantry.prom");
    let name = textfile.to_str().unwrap();
    let metrics = |name: &str| host.gantry(&["metrics", "--textfile", name]);
    fs::write(&textfile, "old").unwrap();
    metrics(name).ok();
    let text = fs::read_to_string(&textfile).unwrap();
    assert!(text.contains("gantry_group_devices"), "{text}");
    let precious = host.path("precious");
    fs::write(&precious, "text").unwrap();
    fs::remove_file(&textfile).unwrap();
    std::os::unix::fs::symlink(&precious, &textfile).unwrap();
    let said = metrics(name).failed(1);
    assert!(said.contains("not a regular file"), "{said}");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "text");
    assert!(textfile.is_symlink());
}

#[test]
fn a_full_disk_is_no_lack_of_rights() {
    let host = Host::new();
    fs::remove_file(host.path("etc/groups.json")).unwrap();
    fs::remove_dir(host.path("etc")).unwrap();
    fs::write(host.path("etc"), "no directory").unwrap();
    for args in [
        &["group", "create", "a"][..],
        &["plan", "create", "a", "--vcpus", "1"],
        &["tenant", "create", "a", "--user", "root"],
    ] {
        let said = host.gantry(args).failed(1);
        assert!(
            said.contains("cannot ") && !said.contains("run as"),
            "{args:?}: {said}"
        );
    }
}

#[test]
fn a_wrong_file_of_the_host_is_a_mistake_whoever_reads_it() {
    let host = Host::new();
    fs::write(
        host.path("etc/groups.json"),
        r#"{"groups": [{"nam": "a"}]}"#,
    )
    .unwrap();
    fs::write(
        host.path("vm.json"),
        r#"{"payload": {"kernel": "/bin/true"}, "devices": [{"group": "a"}]}"#,
    )
    .unwrap();
    let vm = host.path("vm.json").display().to_string();
    for args in [
        &["group", "list"][..],
        &["group", "edit", "a", "--description", "b"],
        &["group", "fit", "a"],
        &["device", "list"],
        &["metrics"],
        &["run", "--check", &vm],
    ] {
        let said = host.gantry(args);
        assert_eq!(said.code, Some(2), "{args:?}: {said:?}");
        assert!(said.err.contains("groups.json:1:"), "{said:?}");
    }
    let host = Host::new();
    let said = host.gantry(&["group", "create", "a b"]).failed(2);
    assert!(said.contains("cannot name a group"), "{said}");
    for list in ["[]", "[\"10de\"]"] {
        let said = host.gantry(&["group", "device-spec", list]).failed(2);
        assert!(said.contains("write a JSON object"), "{said}");
    }
}

#[test]
fn a_vms_file_is_written_with_a_device_that_the_host_does_not_use() {
    let host = Host::new();
    let file = host.path("new.json");
    let file = file.to_str().unwrap();
    fs::write(host.path("kernel"), "").unwrap();
    let kernel = host.path("kernel");
    let kernel = ["--kernel", kernel.to_str().unwrap()];
    let init = |args: &[&str]| host.gantry(&[&["init", file], &kernel[..], args].concat());
    let asks = init(&["--device", "01:00.0"]).failed(2);
    assert!(asks.contains("--yes"), "{asks}");
    let none = init(&["--device", "07:00.0", "--yes"]).failed(2);
    assert!(none.contains("no device 0000:07:00.0"), "{none}");
    let unknown = init(&["--group", "disk", "--yes"]).failed(2);
    assert!(unknown.contains("did you mean \"disks\"?"), "{unknown}");
    let wrong = init(&["--memory", "much", "--yes"]).failed(2);
    assert!(wrong.contains("memory.size"), "{wrong}");
    assert!(!host.path("new.json").exists());

    // It is with vfio-pci and in a group: nothing is to be moved.
    host.node(11);
    let done = init(&["--device", "01:00.0", "--yes"]).ok();
    assert!(!done.contains("taken from the host"), "{done}");
    let text = fs::read_to_string(host.path("new.json")).unwrap();
    let vm: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(vm["devices"], serde_json::json!([{"group": "disks"}]));
    assert_eq!(vm["payload"]["cmdline"], "console=ttyS0");
    let again = init(&["--yes"]).failed(1);
    assert!(again.contains("left as it is"), "{again}");
    assert_eq!(fs::read_to_string(host.path("new.json")).unwrap(), text);
}

#[test]
fn a_vms_file_asks_for_cards_and_not_for_their_functions() {
    let host = Host::new();
    for (function, class) in [(0, "0x030000"), (1, "0x040300")] {
        let bdf = format!("0000:0b:00.{function}");
        host.device(&bdf, ["0x10de", "0x1e87", class], "vfio-pci", 20);
    }
    host.node(20);
    host.gantry(&["group", "create", "gpus", "--rule", r#"{"class": "03"}"#])
        .ok();
    fs::write(host.path("kernel"), "").unwrap();
    let (file, kernel) = (host.path("new.json"), host.path("kernel"));
    let both = ["--device", "0b:00.1", "--device", "0b:00.0", "--yes"];
    let named = [
        "init",
        file.to_str().unwrap(),
        "--kernel",
        kernel.to_str().unwrap(),
    ];
    let said = host.gantry(&[&named[..], &both].concat()).ok();
    assert!(said.contains("1 of 1: 0000:0b:00.0 0000:0b:00.1"), "{said}");
    let vm: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(vm["devices"][0]["count"], Value::Null, "{vm}");
}

#[test]
fn a_check_tells_all_that_is_wrong_at_once() {
    let host = Host::new();
    fs::write(host.path("kernel"), "no kernel").unwrap();
    let vm = r#"{"payload": {"kernel": "kernel"}, "devices": [{"group": "disks", "count": 2}],
        "hotplug": {"groups": ["disk"]}}"#;
    fs::write(host.path("vm.json"), vm).unwrap();
    let path = host.path("vm.json");
    let said = host.gantry(&["run", "--check", path.to_str().unwrap()]);
    assert!(said.code != Some(0), "{said:?}");
    for words in [
        "hotplug.groups: there is no group \"disk\"",
        "group \"disks\" has no free device (2 asked for)",
        "kernel is not a kernel that can be booted",
    ] {
        assert!(said.err.contains(words), "{words}: {}", said.err);
    }
    assert_eq!(said.err.matches("error: ").count(), 3, "{}", said.err);
    assert!(!said.out.contains("nothing is wrong"), "{}", said.out);
    let none = host.gantry(&["run"]).failed(2);
    assert!(none.contains("--api-socket"), "{none}");
    let missing = host.gantry(&["run", "none.json"]).failed(2);
    assert!(missing.contains("gantry init"), "{missing}");
}

#[test]
fn a_group_without_a_free_device_says_why() {
    let host = Host::new();
    let list = host.gantry(&["group", "list"]).ok();
    assert!(!list.contains("none is free"), "{list}");
    let groups = r#"{"groups": [{"name": "rest", "rules": [{"slot": "0000:02:00.0"}]},
        {"name": "empty", "rules": [{"vendor": "10de"}]}]}"#;
    fs::write(host.path("etc/groups.json"), groups).unwrap();
    let list = host.gantry(&["group", "list"]).ok();
    for words in [
        "rest: none is free: 1 not bound to vfio-pci (`gantry device detach 0000:02:00.0`)",
        "empty: none is free: it has no device; `gantry group show empty`",
    ] {
        assert!(list.contains(words), "{list}");
    }
}
