//! Cases about the API: a real VM driven by the client of another VMM, and by `gantry vm`.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_client::apis::DefaultApi;
use cloud_hypervisor_client::models::{self, VmState};
use cloud_hypervisor_client::{SocketBasedApiClient, socket_based_api_client};
use gantry_tests::lab::Host;
use gantry_tests::lab::channel::Event;
use serde_json::{Value, json};

use crate::pool::{FIRST, Pool, free, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

pub const CASES: &[Case] = cases![
    an_unchanged_client_drives_a_vm,
    a_vm_is_created_over_its_socket,
    why_a_guest_died_is_told_as_long_as_gantry_stays,
    a_paused_guest_does_nothing,
    a_guest_hears_its_power_button,
    commands_find_the_vm_by_its_name,
    a_second_vm_of_a_name_is_refused,
    the_socket_of_a_killed_vm_goes_and_no_other,
    bad_clients_do_not_disturb_the_guest,
];

/// Cases that give devices to running VMs, and take them away.
pub const HOTPLUG: &[Case] = cases![
    a_disk_is_attached_and_detached,
    an_unchanged_client_attaches_and_detaches,
    a_guest_that_does_not_answer_is_forced,
    what_cannot_be_attached_is_told,
    a_kill_at_any_moment_of_an_attach_leaves_nothing,
];

/// Where the VM called `vm` listens.
const SOCKET: &str = "/run/gantry/vm.sock";

/// Runs `test` with a client of the socket at `path` in the lab. The client is outside: what it writes
/// goes through the lab's channel.
pub fn with_client(
    host: &Host,
    path: &str,
    test: impl AsyncFnOnce(SocketBasedApiClient) -> Result<()>,
) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let outside = folder.path().join("socket");
    let listener = UnixListener::bind(&outside)?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                scope.spawn(|| relay(host, path, stream));
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let result = runtime.block_on(test(socket_based_api_client(&outside)));
        drop(runtime);
        over.store(true, Ordering::Relaxed);
        UnixStream::connect(&outside)?;
        result
    })
}

/// Passes one connection on, until either side ends it.
fn relay(host: &Host, path: &str, stream: UnixStream) -> Result<()> {
    let mut process = host.command(["lab-agent", "relay", path]).start()?;
    let control = process.control();
    let mut from = stream.try_clone()?;
    let mut to = stream;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                if control.write(&buffer[..read]).is_err() {
                    break;
                }
            }
            control.close()
        });
        loop {
            match process.next(None)? {
                Event::Stdout(data) => to.write_all(&data)?,
                Event::Exit(_) => break,
                _ => {}
            }
        }
        Ok(to.shutdown(std::net::Shutdown::Both)?)
    })
}

fn an_unchanged_client_drives_a_vm(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = Vm::new("shell").cpus(2).devices("nvme", 1).start(host)?;
    running.until("guest: init")?;
    with_client(host, SOCKET, async |client| {
        let info = client.vm_info_get().await?;
        ensure!(info.state == VmState::Running, "{info:?}");
        ensure!(
            info.config.payload.kernel.as_deref() == Some("/lab/vmlinux"),
            "{info:?}"
        );
        ensure!(info.memory_actual_size == Some(256 << 20), "{info:?}");
        client.pause_vm().await?;
        ensure!(client.vm_info_get().await?.state == VmState::Paused);
        client.resume_vm().await?;
        ensure!(client.vm_info_get().await?.state == VmState::Running);
        client.vm_counters_get().await?;
        client.reboot_vm().await?;
        Ok(())
    })?;
    running.until("guest: init")?;
    running.until("guest: cpus=2")?;
    with_client(host, SOCKET, async |client| {
        Ok(client.shutdown_vmm().await?)
    })?;
    let ended = running.end()?.powered_off()?;
    ensure!(ended.said.matches("guest: cpus=2").count() == 2, "{ended}");
    no_socket(host)
}

fn a_vm_is_created_over_its_socket(host: &Host) -> Result<()> {
    let vm = Vm::new("none").named("late");
    let config: models::VmConfig = serde_json::from_value({
        let mut file = vm.file.clone();
        file["cpus"]["max_vcpus"] = file["cpus"]["boot_vcpus"].clone();
        file["memory"]["size"] = (256 << 20).into();
        file
    })?;
    let start = "exec gantry run --api-socket /tmp/late.sock";
    let mut running = Running::of(host.sh(start).start()?);
    host.sh("while ! [ -e /tmp/late.sock ]; do sleep 0.01; done")
        .output()?
        .success()?;
    with_client(host, "/tmp/late.sock", async |client| {
        ensure!(client.vm_info_get().await.is_err(), "there is no VM yet");
        client.create_vm(config).await?;
        ensure!(client.vm_info_get().await?.state == VmState::Created);
        client.boot_vm().await?;
        Ok(())
    })?;
    running.until("guest: done")?;
    // The VM ends, gantry stays, and the VM can be booted again.
    with_client(host, "/tmp/late.sock", async |client| {
        let deadline = Instant::now() + Duration::from_secs(120);
        while client.vm_info_get().await?.state != VmState::Shutdown {
            ensure!(Instant::now() < deadline, "the VM never ends");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        client.boot_vm().await?;
        Ok(())
    })?;
    running.until("guest: done")?;
    with_client(host, "/tmp/late.sock", async |client| {
        Ok(client.shutdown_vmm().await?)
    })?;
    running.end()?.exits(0)?;
    let left = host.sh("ls /tmp/*.sock 2>/dev/null").output()?.text();
    ensure!(left.is_empty(), "its socket stays: {left}");
    Ok(())
}

fn why_a_guest_died_is_told_as_long_as_gantry_stays(host: &Host) -> Result<()> {
    let mut file = Vm::new("reboot").append("reboot=t").file;
    file["cpus"]["max_vcpus"] = json!(1);
    file["memory"]["size"] = (256 << 20).into();
    let config: models::VmConfig = serde_json::from_value(file)?;
    let start = "exec gantry run --api-socket /run/gantry/late.sock";
    let running = Running::of(host.sh(start).start()?);
    host.sh("while ! [ -e /run/gantry/late.sock ]; do sleep 0.01; done")
        .output()?
        .success()?;
    with_client(host, "/run/gantry/late.sock", async |client| {
        client.create_vm(config).await?;
        client.boot_vm().await?;
        Ok(())
    })?;
    let over = "for n in $(seq 600); do gantry vm info late | grep -q 'shut down' && exit; sleep 0.1; done; exit 1";
    host.sh(over).output()?.success()?;
    let info = gantry(host, "vm info late")?;
    let told = "the guest died: vCPU 0 of the guest had a triple fault";
    ensure!(info.contains(&format!("ended    {told}")), "{info}");
    gantry(host, "vm shutdown late --process")?;
    let ended = running.end()?.exits(0)?;
    ensure!(ended.errors.contains(told), "{ended}");
    Ok(())
}

fn a_paused_guest_does_nothing(host: &Host) -> Result<()> {
    let mut running = Vm::new("shell").start(host)?;
    running.types("while :; do echo guest: tick; sleep 0.2; done")?;
    running.until("guest: tick")?;
    gantry(host, "vm pause vm")?;
    let counted = || -> Result<u64> {
        let text =
            host.sh("cat /proc/$(pidof gantry | tr ' ' '\\n' | sort -n | head -n1)/task/*/stat | awk '$2 ~ /vcpu/ {print $14+$15}'");
        Ok(text
            .output()?
            .text()
            .lines()
            .filter_map(|line| line.parse::<u64>().ok())
            .sum())
    };
    let before = counted()?;
    thread::sleep(Duration::from_secs(1));
    ensure!(counted()? == before, "its vCPU runs");
    let info: Value = serde_json::from_str(&gantry(host, "vm info vm --json")?)?;
    ensure!(info["state"] == "Paused", "{info}");
    gantry(host, "vm resume vm")?;
    running.until("guest: tick")?;
    gantry(host, "vm pause vm")?;
    gantry(host, "vm reboot vm")?;
    running.until("guest: init")?;
    let info: Value = serde_json::from_str(&gantry(host, "vm info vm --json")?)?;
    ensure!(info["state"] == "Running", "{info}");
    gantry(host, "vm shutdown vm")?;
    running.end()?.powered_off()?;
    no_socket(host)
}

fn a_guest_hears_its_power_button(host: &Host) -> Result<()> {
    let mut running = Vm::new("shell").start(host)?;
    // What is pressed waits for its reader from when the button is open.
    running.types(
        "exec 3</dev/input/event0; echo guest: listens; head -c 24 <&3 >/dev/null; poweroff -f",
    )?;
    running.until("guest: listens\r")?;
    gantry(host, "vm power-button vm --wait=60")?;
    running.end()?.powered_off()?;
    Ok(())
}

fn commands_find_the_vm_by_its_name(host: &Host) -> Result<()> {
    let mut running = Vm::new("shell").named("web-1").start(host)?;
    running.until("guest: init")?;
    let list = gantry(host, "vm list")?;
    ensure!(list.contains("web-1") && list.contains("running"), "{list}");
    let mode = host
        .sh("stat -c %a /run/gantry/web-1.sock")
        .output()?
        .text();
    ensure!(mode == "600", "{mode}");
    let unknown = host.sh("gantry vm info web-2").output()?.exits(1)?;
    ensure!(unknown.errors().contains("these run: web-1"), "{unknown}");
    let metrics = gantry(host, "vm metrics web-1")?;
    let line = "gantry_vm_state{vm=\"web-1\",state=\"running\"} 1";
    ensure!(metrics.lines().any(|found| found == line), "{metrics}");
    let events = host.sh("gantry vm events web-1 --json").start()?;
    let mut events = Running::of(events);
    events.until("\"Running\"")?;
    gantry(host, "vm reboot web-1")?;
    events.until("\"reboot\"")?;
    running.until("guest: init")?;
    gantry(host, "vm shutdown web-1")?;
    running.end()?.powered_off()?;
    events.end()?.exits(0)?;
    ensure!(gantry(host, "vm list")? == "No VM runs.");
    Ok(())
}

fn a_second_vm_of_a_name_is_refused(host: &Host) -> Result<()> {
    let mut first = Vm::new("shell").start(host)?;
    first.until("guest: init")?;
    let pid = host.sh("pidof gantry | tr ' ' '\\n' | sort -n | head -n1");
    let pid = pid.output()?.text();
    let second = Vm::new("none").run(host)?.exits(1)?;
    for words in [
        &format!("a VM \"vm\" runs already, as process {pid}"),
        "`gantry vm shutdown vm` ends the other",
    ] {
        ensure!(second.errors.contains(words), "{second}");
    }
    // As it was told: under another name, and once the first has ended.
    let mut other = Vm::new("none");
    other.flags = "--name other";
    other.run(host)?.powered_off()?;
    gantry(host, "vm shutdown vm")?;
    first.end()?.powered_off()?;
    Vm::new("none").run(host)?.powered_off()?;
    no_socket(host)
}

fn the_socket_of_a_killed_vm_goes_and_no_other(host: &Host) -> Result<()> {
    let mut other = Vm::new("shell");
    other.flags = "--name other";
    let mut other = other.start(host)?;
    other.until("guest: init")?;
    let mut running = Vm::new("shell").start(host)?;
    running.until("guest: init")?;
    running.signal(nix::sys::signal::Signal::SIGKILL)?;
    running.end()?;
    let gone =
        "for n in $(seq 100); do [ -e /run/gantry/vm.sock ] || exit 0; sleep 0.1; done; exit 1";
    host.sh(gone).output()?.success()?;
    gantry(host, "vm shutdown other")?;
    other.end()?.powered_off()?;
    let mut running = Vm::new("shell").start(host)?;
    running.until("guest: init")?;
    let explicit = "gantry run --api-socket /run/gantry/vm.sock /tmp/vms/vm.json";
    let refused = host.sh(explicit).output()?.exits(1)?;
    ensure!(refused.errors().contains("listens on"), "{refused}");
    gantry(host, "vm shutdown vm")?;
    running.end()?.powered_off()?;
    no_socket(host)
}

fn bad_clients_do_not_disturb_the_guest(host: &Host) -> Result<()> {
    let mut running = Vm::new("shell").start(host)?;
    running.types("while :; do echo guest: tick; sleep 0.2; done")?;
    running.until("guest: tick")?;
    // Nonsense, silence, half a request, and much too much of one.
    let script = r"
        relay='lab-agent relay /run/gantry/vm.sock'
        for n in $(seq 20); do
            head -c 2000 /dev/urandom | $relay >/dev/null 2>&1 &
            printf 'PUT /api/v1/vm.create HTTP/1.1\r\ncontent-length: 9999\r\n\r\n{' | $relay >/dev/null &
            sleep 3 | $relay >/dev/null &
        done
        { printf 'PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: 104857600\r\n\r\n'
          head -c 104857600 /dev/zero; } | $relay | head -n 1
        wait";
    let answer = host.sh(script).output()?.text();
    ensure!(answer.contains("413"), "{answer}");
    running.until("guest: tick")?;
    gantry(host, "vm info vm")?;
    gantry(host, "vm shutdown vm")?;
    running.end()?.powered_off()?;
    no_socket(host)
}

/// A VM with slots, at its shell.
fn with_slots(host: &Host) -> Result<Running> {
    let mut vm = Vm::new("shell").cpus(2);
    vm.file["hotplug"] = json!({"slots": 4, "groups": ["nvme"]});
    vm.start(host)
}

/// The checksum of the guest's only disk, which it reads itself: some time after its driver has switched
/// the disk on.
fn checksum(running: &mut Running) -> Result<()> {
    running.types("until [ -b /dev/nvme?n1 ]; do sleep 0.1; done")?;
    running
        .types("echo guest: sum=$(dd if=$(echo /dev/nvme?n1) bs=1M iflag=direct | sha256sum)")?;
    running.until(&format!("guest: sum={}", FIRST.checksum()))
}

fn a_disk_is_attached_and_detached(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = with_slots(host)?;
    running.until("guest: init")?;
    ensure!(free(host, "nvme")? == 1);
    for round in 0..2 {
        let attached = host
            .sh("gantry vm attach vm --group nvme")
            .output()?
            .success()?;
        let said = attached.text();
        ensure!(
            said.contains(FIRST.bdf) && said.contains("is enabled by the guest in vm"),
            "{round}: {said}"
        );
        let told = attached.errors();
        ensure!(told.contains("is plugged in after "), "{told}");
        ensure!(free(host, "nvme")? == 0, "the group's counts are wrong");
        checksum(&mut running)?;
        let metrics = gantry(host, "vm metrics vm")?;
        let bus = |line: &str| {
            let number = line.rsplit(' ').next().and_then(|n| n.parse::<u64>().ok());
            line.starts_with("gantry_device_interrupts_total{") && number > Some(0)
        };
        ensure!(metrics.lines().any(bus), "no interrupts: {metrics}");
        let said = gantry(host, &format!("vm detach vm {}", FIRST.bdf))?;
        ensure!(said.contains("given back"), "{said}");
        ensure!(free(host, "nvme")? == 1, "the lease is not given back");
    }
    running.types("ls /dev/nvme* 2>/dev/null; echo guest: gone; poweroff -f")?;
    running.until("guest: gone\r")?;
    let ended = running.end()?.powered_off()?;
    ended.no_warnings()
}

fn an_unchanged_client_attaches_and_detaches(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = with_slots(host)?;
    running.until("guest: init")?;
    with_client(host, SOCKET, async |client| {
        let path = format!("/sys/bus/pci/devices/{}", FIRST.bdf);
        let mut device = models::DeviceConfig::new(path.clone());
        device.id = Some("disk".to_owned());
        let added = client.vm_add_device_put(device).await?;
        ensure!(added.id == "disk", "{added:?}");
        let info = client.vm_info_get().await?;
        let devices = info.config.devices.unwrap_or_default();
        ensure!(devices.len() == 1 && devices[0].path == path, "{devices:?}");
        Ok(())
    })?;
    checksum(&mut running)?;
    with_client(host, SOCKET, async |client| {
        let counters = client.vm_counters_get().await?;
        ensure!(counters["disk"]["interrupts"] > 0, "{counters:?}");
        let id = Some("disk".to_owned());
        client
            .vm_remove_device_put(models::VmRemoveDevice { id })
            .await?;
        Ok(())
    })?;
    host.sh("until gantry vm info vm | grep -q 'slots *4 free'; do sleep 0.1; done")
        .output()?
        .success()?;
    gantry(host, "vm shutdown vm")?;
    running.end()?.powered_off()?;
    Ok(())
}

fn a_guest_that_does_not_answer_is_forced(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = with_slots(host)?;
    running.until("guest: init")?;
    gantry(host, "vm attach vm --group nvme --id disk")?;
    gantry(host, "vm pause vm")?;
    let late = host
        .sh("gantry vm detach vm disk --timeout 1")
        .output()?
        .exits(1)?;
    ensure!(late.errors().contains("has not released disk"), "{late}");
    ensure!(free(host, "nvme")? == 0);
    let said = gantry(host, "vm detach vm disk --force-after 0.5")?;
    ensure!(said.contains("taken from the guest"), "{said}");
    ensure!(free(host, "nvme")? == 1);
    gantry(host, "vm shutdown vm")?;
    running.end()?.exits(0)?;
    Ok(())
}

fn what_cannot_be_attached_is_told(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = with_slots(host)?;
    running.until("guest: init")?;
    gantry(host, "vm attach vm --group nvme --id disk")?;
    for (words, status, said) in [
        ("attach vm --group nvme", 75, "No valid host was found"),
        ("attach vm --group nic", 1, "`hotplug.groups`"),
        ("attach vm --group nowhere", 1, "`hotplug.groups`"),
        ("detach vm nothing", 1, "it has disk"),
    ] {
        let output = host.sh(&format!("gantry vm {words}")).output()?;
        let output = output.exits(status)?;
        ensure!(output.errors().contains(said), "{words}: {output}");
    }
    let mut none = Vm::new("shell").named("none").start(host)?;
    none.until("guest: init")?;
    let output = host
        .sh("gantry vm attach none --group nvme")
        .output()?
        .exits(1)?;
    ensure!(output.errors().contains("no slots"), "{output}");
    for name in ["vm", "none"] {
        gantry(host, &format!("vm shutdown {name}"))?;
    }
    none.end()?.powered_off()?;
    running.end()?.exits(0)?;
    ensure!(free(host, "nvme")? == 1);
    Ok(())
}

/// A disk is attached, and works.
fn checksum_of_attached(host: &Host, running: &mut Running) -> Result<()> {
    gantry(host, "vm attach vm --group nvme")?;
    checksum(running)
}

fn a_kill_at_any_moment_of_an_attach_leaves_nothing(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    for delay in ["0.02", "0.1", "0.3", "1"] {
        let mut running = with_slots(host)?;
        running.until("guest: init")?;
        let script = format!("gantry vm attach vm --group nvme >/dev/null 2>&1 & sleep {delay}");
        host.sh(&script).output()?.success()?;
        running.signal(nix::sys::signal::Signal::SIGKILL)?;
        running.end()?;
        let freed = "for n in $(seq 300); do pidof gantry || exit 0; sleep 0.1; done; exit 1";
        host.sh(freed)
            .output()?
            .success()
            .context("its helper stays")?;
        ensure!(
            free(host, "nvme")? == 1,
            "after {delay} s the disk is not free"
        );
        nothing_is_held(host)?;
    }
    let mut running = with_slots(host)?;
    running.until("guest: init")?;
    checksum_of_attached(host, &mut running)?;
    gantry(host, "vm shutdown vm")?;
    running.end()?.powered_off()?;
    Ok(())
}

fn gantry(host: &Host, words: &str) -> Result<String> {
    let output = host.sh(&format!("gantry {words}")).output()?;
    Ok(output.success()?.text())
}

fn no_socket(host: &Host) -> Result<()> {
    let left = host.sh("find /run/gantry -type s").output()?.text();
    ensure!(left.is_empty(), "a socket stays: {left}");
    Ok(())
}
