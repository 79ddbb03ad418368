//! `gantry vm` before a VM that is played: what people see, and the exit codes.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use gantry_vmm::command::VmEvent;
use serde_json::Value;

use crate::fake::{Bed, LAZY, WHOLE};

fn command(run_dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
    command.arg("--run-dir").arg(run_dir).arg("vm").args(args);
    command.env_remove("CLICOLOR_FORCE").stdin(Stdio::null());
    command
}

fn gantry(bed: &Bed, args: &[&str]) -> Output {
    command(bed.folder.path(), args).output().unwrap()
}

fn ok(bed: &Bed, args: &[&str]) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = gantry(bed, args);
    let said = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{args:?}: {said}");
    String::from_utf8(stdout).unwrap()
}

fn fails(bed: &Bed, args: &[&str]) -> String {
    fails_with(1, bed, args)
}

fn fails_with(code: i32, bed: &Bed, args: &[&str]) -> String {
    let output = gantry(bed, args);
    assert_eq!(output.status.code(), Some(code), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn vms_are_listed_by_their_sockets() {
    let bed = Bed::new();
    let list = ok(&bed, &["list"]);
    let row = list.lines().nth(1).unwrap();
    let cells: Vec<&str> = row.split_whitespace().collect();
    let pid = std::process::id().to_string();
    assert_eq!(cells, ["vm", &pid, "no", "VM", "-", "-", "-", "-", "-"]);
    bed.boot();
    let list = ok(&bed, &["list"]);
    let cells: Vec<&str> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(
        cells,
        [
            "vm", &pid, "running", "1m", "30s", "2", "128", "MiB", "4", "free,", "0", "taken", "-"
        ]
    );
    let list: Value = serde_json::from_str(&ok(&bed, &["list", "--json"])).unwrap();
    assert_eq!(list[0]["info"]["state"], "Running");
    assert_eq!(list[0]["state"], list[0]["info"]["state"]);
}

#[test]
fn stale_sockets_go_when_somebody_looks() {
    let mut bed = Bed::new();
    let stale = bed.folder.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(!ok(&bed, &["list"]).contains("dead"));
    assert!(!stale.exists());
    bed.stop();
    assert_eq!(ok(&bed, &["list"]), "No VM runs.\n");
}

#[test]
fn a_process_that_is_stopped_is_listed_once_and_told_of() {
    let run = tempfile::tempdir().unwrap();
    let socket = run.path().join("vm.sock");
    let mut gantry = Command::new(env!("CARGO_BIN_EXE_gantry"));
    gantry.arg("--run-dir").arg(run.path());
    gantry.arg("run").arg("--api-socket").arg(&socket);
    let mut gantry = gantry.stdin(Stdio::null()).spawn().unwrap();
    let pid = gantry.id().to_string();
    let ping = ["info", "vm"];
    let created = || {
        let said = command(run.path(), &ping).output().unwrap().stderr;
        String::from_utf8(said).unwrap().contains("create one")
    };
    while !created() {
        assert_eq!(gantry.try_wait().unwrap(), None);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let signal = |name: &str| {
        let kill = Command::new("kill").args([name, &pid]).status();
        assert!(kill.unwrap().success());
    };
    signal("-STOP");
    // Each of its threads stops when it next comes by.
    let stopped = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let stat = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("stat"));
        tasks
            .flatten()
            .all(|task| stat(task).unwrap().contains(") T "))
    };
    while !stopped() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let list = command(run.path(), &["list"]).output().unwrap();
    let shutdown = command(run.path(), &["shutdown", "vm"]).output().unwrap();
    signal("-KILL");
    gantry.wait().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let rows: Vec<&str> = list.lines().skip(1).collect();
    let cells: Vec<Vec<&str>> = rows
        .iter()
        .map(|row| row.split_whitespace().take(3).collect())
        .collect();
    assert_eq!(cells, [["vm", &pid, "stopped"]], "{list}");
    let said = String::from_utf8(shutdown.stderr).unwrap();
    assert!(said.contains(&format!("`kill -CONT {pid}`")), "{said}");
}

#[test]
fn a_vm_that_does_not_run_is_answered_with_those_that_do() {
    let bed = Bed::new();
    let said = fails(&bed, &["pause", "wm"]);
    assert!(
        said.contains("no VM \"wm\" runs") && said.contains("these run: vm"),
        "{said}"
    );
    let empty = tempfile::tempdir().unwrap();
    let output = command(empty.path(), &["pause", "wm"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("`gantry run` starts one"), "{said}");
}

#[test]
fn states_change_and_refusals_are_told() {
    let bed = Bed::new();
    let said = fails(&bed, &["pause", "vm"]);
    assert!(said.contains("create one first"), "{said}");
    bed.boot();
    assert_eq!(ok(&bed, &["pause", "vm"]), "vm is paused\n");
    let socket = bed.socket();
    assert!(ok(&bed, &["info", socket.to_str().unwrap()]).contains("state    paused"));
    assert_eq!(ok(&bed, &["resume", "vm"]), "vm runs again\n");
    assert!(fails(&bed, &["resume", "vm"]).contains("not paused"));
    assert_eq!(ok(&bed, &["reboot", "vm"]), "vm boots again\n");
    let told = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&ok(&bed, &[args, &["--json"]].concat())).unwrap()
    };
    let done = |done: &str| serde_json::json!({"vm": "vm", "done": done});
    assert_eq!(told(&["pause", "vm"]), done("paused"));
    assert_eq!(told(&["resume", "vm"]), done("resumed"));
    assert_eq!(told(&["reboot", "vm"]), done("rebooted"));
    assert_eq!(told(&["power-button", "vm"]), done("asked"));
    ok(&bed, &["shutdown", "vm"]);
    let info = ok(&bed, &["info", "vm"]);
    let why = "state    shut down\nended    the guest died: at once\n         too little memory\n";
    assert!(info.contains(why), "{info}");
    let said = fails(&bed, &["shutdown", "vm"]);
    assert!(said.contains("`gantry vm shutdown vm --process`"), "{said}");
    assert_eq!(
        told(&["shutdown", "vm", "--process"]),
        done("process-ended")
    );
}

#[test]
fn the_end_of_a_guest_is_waited_for() {
    let bed = Bed::new();
    bed.boot();
    let said = fails(&bed, &["power-button", "vm", "--wait=0"]);
    assert!(said.contains("did not power off in 0 s"), "{said}");
    let waiting = command(bed.folder.path(), &["power-button", "vm", "--wait"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut waiting = waiting.unwrap();
    let mut words = BufReader::new(waiting.stderr.take().unwrap()).lines();
    assert!(words.next().unwrap().unwrap().contains("waiting for"));
    assert_eq!(bed.put("vm.shutdown", "").0, 204);
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"vm has ended\n");
}

#[test]
fn devices_are_attached_and_their_drivers_waited_for() {
    let bed = Bed::new();
    bed.boot();
    let said = ok(&bed, &["attach", "vm", "--group", "nvme", "--count", "2"]);
    assert_eq!(
        said,
        "dev0 (0000:01:00.0) is enabled by the guest in vm: guest address 0000:01:00.0\n\
         dev1 (0000:02:00.0) is enabled by the guest in vm: guest address 0000:02:00.0\n"
    );
    let said = fails(
        &bed,
        &[
            "attach",
            "vm",
            "--device",
            "03:00.0",
            "--id",
            LAZY,
            "--timeout",
            "0",
        ],
    );
    assert!(
        said.contains("has not enabled lazy in 0 s") && said.contains("`gantry vm detach vm lazy`"),
        "{said}"
    );
    let args = [
        "attach",
        "vm",
        "--group",
        "nvme",
        "--id",
        "x",
        "--no-wait",
        "--json",
    ];
    let devices: Value = serde_json::from_str(&ok(&bed, &args)).unwrap();
    assert_eq!(devices[0]["state"], "announced");
    assert!(fails_with(75, &bed, &["attach", "vm", "--group", "nvme"]).contains("all 4 slots"));
    let info = ok(&bed, &["info", "vm"]);
    assert!(
        info.contains("slots    0 free, 4 taken") && info.contains("lazy"),
        "{info}"
    );
    let counted = gantry(&bed, &["attach", "vm", "--alias", "disk:1"]);
    let said = String::from_utf8(counted.stderr).unwrap();
    assert!(said.contains("`--alias disk --count 1`"), "{said}");
    let both = gantry(&bed, &["attach", "vm", "--group", "a", "--alias", "b"]);
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn a_plans_devices_are_attached_together() {
    let bed = Bed::new();
    bed.boot();
    let attach = ["attach", "vm", "--plan", "two", "--json"];
    let devices: Value = serde_json::from_str(&ok(&bed, &attach)).unwrap();
    assert_eq!(devices.as_array().unwrap().len(), 2);
    ok(&bed, &["attach", "vm", "--group", "nvme"]);
    // One slot stays, and one device alone is not what the plan says.
    assert!(fails_with(75, &bed, &attach).contains("all 4 slots"));
    assert!(ok(&bed, &["info", "vm"]).contains("slots    1 free, 3 taken"));
    let counted = gantry(&bed, &["attach", "vm", "--plan", "two", "--count", "2"]);
    assert_eq!(counted.status.code(), Some(2));
}

#[test]
fn a_vm_that_is_not_booted_has_no_guest_to_wait_for() {
    let bed = Bed::new();
    assert_eq!(bed.put("vm.create", &bed.config()).0, 204);
    let said = ok(&bed, &["detach", "vm", "02:00.0"]);
    assert_eq!(said, "0000:02:00.0: vm will not have it when it boots\n");
    let said: Value =
        serde_json::from_str(&ok(&bed, &["detach", "vm", "02:00.0", "--json"])).unwrap();
    assert_eq!(said["gone"], true);
}

#[test]
fn devices_are_detached_and_their_guests_waited_for() {
    let bed = Bed::new();
    bed.boot();
    ok(&bed, &["attach", "vm", "--group", "nvme"]);
    ok(
        &bed,
        &[
            "attach",
            "vm",
            "--device",
            "02:00.0",
            "--id",
            LAZY,
            "--no-wait",
        ],
    );
    // By its address on the host.
    assert_eq!(
        ok(&bed, &["detach", "vm", "0000:01:00.0"]),
        "dev0 is given back\n"
    );
    let said = fails(&bed, &["detach", "vm", "dev0"]);
    assert!(said.contains("no device \"dev0\": it has lazy"), "{said}");
    let said = fails(&bed, &["detach", "vm", LAZY, "--timeout", "0"]);
    assert!(
        said.contains("has not released lazy in 0 s") && said.contains("--force-after"),
        "{said}"
    );
    let args = ["detach", "vm", LAZY, "--force-after", "0", "--json"];
    let came: Value = serde_json::from_str(&ok(&bed, &args)).unwrap();
    assert_eq!(
        came,
        serde_json::json!({"id": LAZY, "together_with": [], "gone": true, "forced": true})
    );
}

#[test]
fn what_goes_along_with_a_device_is_named() {
    let bed = Bed::new();
    bed.boot();
    let attach = ["attach", "vm", "--plan", WHOLE];
    ok(&bed, &attach);
    let info = ok(&bed, &["info", "vm"]);
    let words = "dev0 and dev1 are one device: they are detached together";
    assert_eq!(info.matches(words).count(), 1, "{info}");
    assert_eq!(info.matches("together").count(), 1, "{info}");
    assert_eq!(
        ok(&bed, &["detach", "vm", "dev1"]),
        "dev1 and dev0 are given back\n"
    );
    ok(&bed, &attach);
    let came = ok(&bed, &["detach", "vm", "01:00.0", "--json"]);
    let came: Value = serde_json::from_str(&came).unwrap();
    assert_eq!(came["together_with"], serde_json::json!(["dev1"]));
}

#[test]
fn who_waits_for_a_paused_guest_is_told() {
    let bed = Bed::new();
    bed.boot();
    ok(&bed, &["pause", "vm"]);
    let lazy = ["--id", LAZY, "--timeout", "0"];
    let attach = [&["attach", "vm", "--group", "nvme"], &lazy[..]].concat();
    let button: &[&str] = &["power-button", "vm", "--wait=0"];
    let detach: &[&str] = &["detach", "vm", LAZY, "--timeout", "0"];
    for args in [&attach, button, detach] {
        let said = fails(&bed, args);
        let words = "is paused: its guest does nothing until `gantry vm resume vm`";
        // Before the wait, and after it.
        assert_eq!(said.matches(words).count(), 2, "{args:?}: {said}");
    }
    ok(&bed, &["resume", "vm"]);
    assert!(!fails(&bed, detach).contains("paused"));
}

#[test]
fn events_are_followed_to_the_end() {
    let mut bed = Bed::new();
    let watching = |more: &[&str]| {
        let args = [&["events", "vm"], more].concat();
        let child = command(bed.folder.path(), &args)
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map(Result::unwrap);
        let first = lines.next().unwrap();
        (child, first, lines)
    };
    let (mut people, first, words) = watching(&[]);
    assert!(first.ends_with("there is no VM yet"), "{first}");
    let (mut program, first, lines) = watching(&["--json"]);
    let first: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(first["event"], "state");
    bed.boot();
    bed.put("vm.pause", "");
    bed.vm.events.publish(VmEvent::Exit { status: 3 });
    bed.stop();
    let words: Vec<String> = words.collect();
    assert!(words[0].ends_with("the VM is running"), "{words:?}");
    assert!(words[1].ends_with("the VM is paused"), "{words:?}");
    assert!(
        words[2].ends_with("gantry ends with exit status 3"),
        "{words:?}"
    );
    let last: Value = serde_json::from_str(&lines.last().unwrap()).unwrap();
    assert_eq!(
        (&last["event"], &last["status"]),
        (&"exit".into(), &3.into())
    );
    assert!(people.wait().unwrap().success() && program.wait().unwrap().success());
}

#[test]
fn a_stream_of_events_that_breaks_off_is_told_from_an_end() {
    let mut bed = Bed::new();
    let child = command(bed.folder.path(), &["events", "vm"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    bed.stop();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the events of vm broke off"), "{said}");
}

#[test]
fn metrics_are_passed_on() {
    let bed = Bed::new();
    bed.boot();
    assert!(ok(&bed, &["metrics", "vm"]).contains("gantry_vm_state"));
}
