//! Cases about living with a VM: in the background, with its console and its log.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use gantry_tests::protocol::Size;
use serde_json::json;

use crate::pool::{FIRST, Pool, device, nothing_is_held, processes};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For one host kernel.
pub const CASES: &[Case] = cases![
    a_vm_in_the_background_is_used_and_ended,
    its_console_is_left_and_the_vm_runs_on,
    a_start_in_the_background_that_fails_says_why,
    a_name_that_is_taken_is_told_first,
    a_file_that_init_wrote_runs,
];

const RUN: &str = "gantry run -d";

/// Starts a VM whose guest has a shell in the background. What it printed.
fn start(host: &Host, vm: &Vm) -> Result<String> {
    let command = format!("{RUN} {}", vm.write(host)?);
    let output = host.sh(&command).output()?.success()?;
    ensure!(output.stderr.is_empty(), "{output}");
    Ok(output.text())
}

fn said(host: &Host, command: &str) -> Result<String> {
    Ok(host.sh(command).output()?.success()?.text())
}

fn console(host: &Host) -> Result<Running> {
    Ok(Running::of(host.sh("exec gantry vm console vm").start()?))
}

fn a_vm_in_the_background_is_used_and_ended(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let told = start(host, &Vm::new("shell").devices("nvme", 1))?;
    ensure!(told.contains("gantry vm console vm"), "{told}");
    let mut one = console(host)?;
    one.types("echo ready$((0))")?;
    one.until("ready0")?;
    let events = Running::of(host.sh("exec gantry vm events vm --json").start()?);
    let mut follower = Running::of(host.sh("exec gantry vm logs vm -f").start()?);
    let mut other = console(host)?;
    other.until("/ # ")?;
    one.types("echo one$((1))")?;
    for reader in [&mut one, &mut other, &mut follower] {
        reader.until("one1")?;
    }
    other.types("echo two$((2))")?;
    one.until("two2")?;
    let list: serde_json::Value = serde_json::from_str(&said(host, "gantry vm list --json")?)?;
    ensure!(list[0]["info"]["uptime"].as_f64() > Some(0.0), "{list}");
    one.types("poweroff -f")?;
    for reader in [one, other] {
        let ended = reader.end()?.exits(0)?;
        let told = "VM vm ended: the guest powered off";
        ensure!(ended.errors.contains(told), "{ended}");
    }
    let followed = follower.end()?.exits(0)?;
    let end = "VM vm ended: the guest powered off\n";
    ensure!(followed.said.ends_with(end), "{followed}");
    let last = events.end()?.exits(0)?;
    let last = last.said.lines().last().unwrap_or_default().to_owned();
    ensure!(last.contains(r#""event":"exit","status":0"#), "{last}");
    // It is kept, and the terminal is safe from it.
    let log = said(host, "gantry vm logs vm")?;
    ensure!(log == followed.said.trim_end(), "{log}");
    ensure!(
        log.contains("guest: init\n") && log.contains("two2\n"),
        "{log}"
    );
    let rights = said(host, "stat -c %a /run/gantry/vm.log")?;
    ensure!(rights == "600", "{rights}");
    nothing_is_held(host)
}

fn its_console_is_left_and_the_vm_runs_on(host: &Host) -> Result<()> {
    start(host, &Vm::new("shell"))?;
    let script = "echo before=$(stty -g); gantry vm console vm; echo status=$? after=$(stty -g)";
    for leave in ["\x01d", ""] {
        let terminal = host.sh(script).on_terminal(Size { rows: 24, cols: 80 });
        let mut running = Running::of(terminal.start()?);
        running.until("ctrl-a d detaches")?;
        running.keys("\n")?;
        running.types("echo ali''ve")?;
        running.until("alive")?;
        // Ctrl-a x ends a VM at its own terminal only.
        running.keys("\x01x")?;
        running.until("gantry vm shutdown vm")?;
        match leave {
            "" => {
                let newest = "$(pidof gantry | tr ' ' '\\n' | sort -n | tail -n1)";
                let kill = format!("kill -TERM {newest}");
                host.sh(&kill).output()?.success()?;
            }
            leave => running.keys(leave)?,
        }
        let ended = running.end()?.exits(0)?;
        let word = |key: &str| {
            let mut words = ended.said.split_whitespace();
            words.find_map(|word| word.strip_prefix(key))
        };
        let status = if leave.is_empty() { "143" } else { "0" };
        ensure!(word("status=") == Some(status), "{ended}");
        ensure!(word("before=").is_some(), "{ended}");
        ensure!(word("before=") == word("after="), "{ended}");
    }
    let mut again = console(host)?;
    again.keys("echo st''ill\n")?;
    again.until("still")?;
    host.sh("gantry vm shutdown vm").output()?.success()?;
    let ended = again.end()?.exits(0)?;
    ensure!(ended.errors.contains("ended: a client ended it"), "{ended}");
    nothing_is_held(host)
}

fn a_start_in_the_background_that_fails_says_why(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[])?;
    let mut vm = Vm::new("none").devices("nvme", 1);
    let failed = |vm: &Vm, code: i32, why: &str| -> Result<()> {
        let output = host.sh(&format!("{RUN} {}", vm.write(host)?)).output()?;
        let output = output.exits(code)?;
        ensure!(output.errors().contains(why), "{output}");
        ensure!(output.stdout.is_empty(), "{output}");
        let left = said(host, "ls /run/gantry | grep vm.log || :")?;
        ensure!(left.is_empty(), "{left}");
        ensure!(processes(host, "gantry run")?.is_empty(), "it still runs");
        nothing_is_held(host)
    };
    said(host, "rm -f /run/gantry/vm.log")?;
    failed(&vm, 1, "error: ")?;
    vm.file["devices"] = json!([]);
    vm.file["memory"]["size"] = json!("100000G");
    failed(&vm, 1, "memory")?;
    vm.file["cpus"]["boot_vcpus"] = json!(0);
    failed(&vm, 2, "boot_vcpus")?;
    // A start that is given up leaves no VM.
    let path = Vm::new("sleep").write(host)?;
    let script = format!(
        "{RUN} {path} & sleep 0.1; kill -9 $!; wait $!; while pidof gantry; do sleep 0.1; done"
    );
    host.sh(&script).output()?;
    nothing_is_held(host)
}

fn a_name_that_is_taken_is_told_first(host: &Host) -> Result<()> {
    said(host, "truncate -s 8M /tmp/disk.img")?;
    let mut vm = Vm::new("shell");
    vm.file["disks"] = json!([{"path": "/tmp/disk.img"}]);
    start(host, &vm)?;
    let log = said(host, "gantry vm logs vm")?;
    for command in ["gantry run", RUN] {
        let output = host
            .sh(&format!("{command} {} </dev/null", vm.write(host)?))
            .output()?;
        let output = output.exits(1)?;
        ensure!(
            output.errors().contains("a VM \"vm\" runs already"),
            "{output}"
        );
    }
    // The log is still that of the VM that runs.
    ensure!(
        said(host, "gantry vm logs vm")?.starts_with(&log),
        "another log"
    );
    host.sh("gantry vm shutdown vm").output()?.success()?;
    // The VM's process ends after the reply.
    host.sh("for try in $(seq 100); do pidof gantry >/dev/null || break; sleep 0.1; done")
        .output()?
        .success()?;
    nothing_is_held(host)
}

fn a_file_that_init_wrote_runs(host: &Host) -> Result<()> {
    let file = "/tmp/vms/vm.json";
    let bdf = FIRST.bdf;
    host.sh(&format!(
        "mkdir -p /tmp/vms; rm -f {file} /etc/gantry/groups.json"
    ))
    .output()?
    .success()?;
    let kernel = "--kernel /lab/vmlinux --initramfs /lab/initramfs-guest --memory 256M --cpus 1";
    let init = format!("gantry init {file} --device {bdf} {kernel} --yes");
    let said = host.sh(&init).output()?.success()?.text();
    ensure!(said.contains("for the group \"nvme\""), "{said}");
    ensure!(device(host, bdf)?["driver"] == "vfio-pci", "{said}");
    host.sh(&format!("{RUN} {file}")).output()?.success()?;
    let info = host
        .sh("gantry vm info vm --json")
        .output()?
        .success()?
        .text();
    ensure!(info.contains(bdf), "{info}");
    // It is never overwritten.
    let again = host.sh(&init).output()?.exits(1)?;
    ensure!(again.errors().contains("left as it is"), "{again}");
    let undo = format!(
        "gantry vm shutdown vm && gantry device reattach {bdf} && gantry group delete nvme"
    );
    host.sh(&undo).output()?.success()?;
    nothing_is_held(host)
}
