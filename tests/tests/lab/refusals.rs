//! Cases about refusals: each names the key or device, says what to do, fits a screen, and leaves
//! nothing behind.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::pool::{AUDIO, DISPLAY, FIRST, Pool, SECOND, device, free, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Ended, Vm};

/// For every host kernel.
pub const CASES: &[Case] = cases![
    wrong_keys,
    wrong_numbers_of_vcpus,
    wrong_sizes_of_memory,
    files_that_are_no_kernels,
    unknown_groups,
    too_few_free_devices,
    devices_in_use_by_the_host,
    a_group_owned_in_part,
    kvm_missing_or_not_permitted,
    vfio_missing_or_not_permitted,
    a_low_memlock_limit,
    an_ordinary_user_may_run_a_vm,
];

/// For host kernels without iommufd.
pub const NO_IOMMUFD: &[Case] = cases![a_back_end_that_the_host_lacks_is_refused];

/// For host kernels with containers and iommufd.
pub const BOTH: &[Case] = cases![a_host_without_one_back_end_has_the_other];

/// Lines of an error that fit any terminal.
const SCREEN: usize = 20;

/// Fails unless `ended` is a refusal with this exit status and these words, with nothing held.
fn is_refused(host: &Host, ended: Ended, code: i32, words: &[&str]) -> Result<()> {
    let ended = ended.exits(code)?;
    ensure!(ended.errors.starts_with("error: "), "{ended}");
    ensure!(ended.errors.lines().count() <= SCREEN, "{ended}");
    ensure!(ended.said.is_empty(), "{ended}");
    for word in words {
        ensure!(ended.errors.contains(word), "no {word:?}: {ended}");
    }
    nothing_is_held(host)
}

/// Runs a VM that has one free disk, and is to be refused.
fn refused(host: &Host, vm: &Vm, code: i32, words: &[&str]) -> Result<()> {
    is_refused(host, vm.run(host)?, code, words)?;
    ensure!(free(host, "nvme")? == 1, "the disk is not free");
    Ok(())
}

/// The usual VM with a disk, with `value` at a key of its file such as `cpus.boot_vcpus`.
fn with(key: &str, value: Value) -> Vm {
    let mut vm = Vm::new("none").devices("nvme", 1);
    let place = key
        .split('.')
        .fold(&mut vm.file, |place, word| &mut place[word]);
    *place = value;
    vm
}

fn wrong_keys(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let unknown = with("memory.sise", json!("1G"));
    refused(host, &unknown, 2, &["memory.sise", "did you mean `size`?"])?;
    let unknown = with("device", json!([]));
    refused(host, &unknown, 2, &["`device`", "did you mean `devices`?"])?;
    let unknown = with("payload.qqq", json!(1));
    refused(host, &unknown, 2, &["payload.qqq", "kernel, "])?;
    let of_type = with("cpus.boot_vcpus", json!("two"));
    refused(
        host,
        &of_type,
        2,
        &["cpus.boot_vcpus", "\"two\"", "vm.json:1:"],
    )?;
    let of_type = with("devices", json!({"group": "nvme"}));
    refused(host, &of_type, 2, &["`devices`", "expected"])?;
    let word = with("serial.mode", json!("Pty"));
    refused(host, &word, 2, &["serial.mode", "Pty", "Tty"])?;
    let missing = with("payload", json!({}));
    refused(host, &missing, 2, &["payload.kernel", "missing"])
}

fn wrong_numbers_of_vcpus(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    for count in [0, 10000] {
        let vm = with("cpus.boot_vcpus", json!(count));
        refused(host, &vm, 2, &["cpus.boot_vcpus", "use 1 to 254"])?;
    }
    Ok(())
}

fn wrong_sizes_of_memory(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let size = |size: &str| with("memory.size", json!(size));
    refused(host, &size("0"), 2, &["memory.size", "or more"])?;
    refused(host, &size("300000K"), 2, &["memory.size", "nearest sizes"])?;
    refused(host, &size("64G"), 1, &["memory.size", "65536 MiB", "less"])?;
    // It fits the machine, but not beside what is there.
    let total = host.sh("awk '/^MemTotal:/ { print int($2 / 2048) * 2 }' /proc/meminfo");
    let all = format!("{}M", total.output()?.success()?.text());
    let words = ["memory.size", "MiB of this host are free"];
    refused(host, &size(&all), 1, &words)
}

fn files_that_are_no_kernels(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let kernel = |path: &str| with("payload.kernel", json!(path));
    let missing = kernel("/no/such/kernel");
    refused(
        host,
        &missing,
        2,
        &["payload.kernel", "/no/such/kernel", "No such file"],
    )?;
    refused(
        host,
        &kernel("/tmp"),
        2,
        &["payload.kernel", "/tmp", "directory"],
    )?;
    refused(
        host,
        &kernel("/dev/null"),
        2,
        &["payload.kernel", "/dev/null", "a device"],
    )?;
    let script = "
        mkdir -p /tmp/vms && cd /tmp/vms && : >empty && gzip -c /etc/profile >gzip
        head -c 300 /dev/zero >short && head -c 2000000 /lab/bzImage-debian >cut
        head -c 4000000 /lab/vmlinux >cut-elf";
    host.sh(script).output()?.success()?;
    for (path, words) in [
        ("/etc/profile", "text"),
        ("/tmp/vms/gzip", "gzip"),
        ("/tmp/vms/empty", "empty"),
        ("/tmp/vms/short", "not a kernel"),
        ("/bin/busybox", "PVH"),
        ("/tmp/vms/cut", "cut short"),
        ("/tmp/vms/cut-elf", "cut short"),
    ] {
        refused(host, &kernel(path), 1, &[path, words])?;
    }
    let initramfs = with("payload.initramfs", json!("/no/initramfs"));
    refused(host, &initramfs, 2, &["payload.initramfs", "/no/initramfs"])
}

fn unknown_groups(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("none").devices("nvne", 1);
    refused(host, &vm, 2, &["\"nvne\"", "did you mean \"nvme\"?"])?;
    let vm = Vm::new("none").devices("zzzzz", 1);
    refused(host, &vm, 2, &["\"zzzzz\"", "nvme", "nic"])
}

fn too_few_free_devices(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("sleep").named("first").devices("nvme", 1);
    let mut holder = vm.start(host)?;
    holder.until("guest: init")?;
    let second = Vm::new("none").named("second").devices("nvme", 2);
    let refused = second.run(host)?.exits(1)?;
    for words in [
        "group \"nvme\" has no free device (2 asked for)",
        &format!("{} is held by VM \"first\" (pid", FIRST.bdf),
        &format!("{} is bound to nvme", SECOND.bdf),
        &format!("gantry device detach {}", SECOND.bdf),
    ] {
        ensure!(refused.errors.contains(words), "no {words:?}: {refused}");
    }
    ensure!(refused.errors.lines().count() <= SCREEN, "{refused}");
    let mut by_path = Vm::new("none");
    by_path.file["devices"] = json!([{"path": format!("/sys/bus/pci/devices/{}", FIRST.bdf)}]);
    let refused = by_path.run(host)?.exits(75)?;
    ensure!(refused.errors.contains("held by VM \"first\""), "{refused}");
    holder.signal(Signal::SIGTERM)?;
    holder.end()?.exits(143)?;
    nothing_is_held(host)?;
    ensure!(free(host, "nvme")? == 1, "the disk is not free");
    Ok(())
}

fn devices_in_use_by_the_host(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let path = |bdf: &str| json!([{"path": format!("/sys/bus/pci/devices/{bdf}")}]);
    let detach = format!("gantry device detach {}", SECOND.bdf);
    let bound = with("devices", path(SECOND.bdf));
    refused(host, &bound, 1, &[SECOND.bdf, "bound to nvme", &detach])?;
    let nowhere = with("devices", path("0000:77:00.0"));
    refused(host, &nowhere, 1, &["0000:77:00.0", "gantry device list"])?;
    let bridge = with("devices", path("0000:00:10.0"));
    refused(host, &bridge, 1, &["0000:00:10.0", "bridge"])?;
    ensure!(
        device(host, SECOND.bdf)?["driver"] == "nvme",
        "it was unbound"
    );
    Ok(())
}

fn a_group_owned_in_part(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    // The audio controller by hand; the display stays with the host, or has no driver.
    let bind = format!(
        "cd /sys/bus/pci/devices/{AUDIO} && echo vfio-pci >driver_override &&
         echo {AUDIO} >/sys/bus/pci/drivers_probe && ls -l driver"
    );
    host.sh(&bind).output()?.success()?;
    let result = match device(host, DISPLAY)?["driver"].is_string() {
        true => {
            let vm = Vm::new("none").lacking_path(AUDIO);
            let detach = format!("gantry device detach {AUDIO}");
            refused(host, &vm, 1, &[AUDIO, DISPLAY, "IOMMU group", &detach])
        }
        // A group is whole if all its other devices have no driver.
        false => {
            let vm = Vm::new("none").lacking_path(AUDIO);
            vm.run(host).and_then(Ended::powered_off).map(drop)
        }
    };
    let unbind = format!(
        "cd /sys/bus/pci/devices/{AUDIO} && echo >driver_override && echo {AUDIO} >driver/unbind"
    );
    host.sh(&unbind).output()?.success()?;
    result
}

/// Does `during` with a file renamed, and puts it back.
fn without(host: &Host, path: &str, during: impl FnOnce() -> Result<()>) -> Result<()> {
    host.sh(&format!("mv {path} {path}.away"))
        .output()?
        .success()?;
    let result = during();
    host.sh(&format!("mv {path}.away {path}"))
        .output()?
        .success()?;
    result
}

/// Runs `command` as a user without rights, who may keep leases in a folder of their own.
fn as_nobody(host: &Host, vm: &Vm, limit: &str) -> Result<Ended> {
    let command = vm.command(host)?;
    let set_up = "
        grep -q nobody /etc/passwd || echo nobody:x:65534:65534::/tmp:/bin/sh >>/etc/passwd
        mkdir -p /tmp/nobody && chown 65534:65534 /tmp/nobody && chmod 755 /tmp /tmp/vms /lab";
    host.sh(set_up).output()?.success()?;
    let command = format!(
        "{limit}; su nobody -s /bin/sh -c 'exec {command} --run-dir /tmp/nobody' </dev/null"
    );
    Ok(Ended::of(host.sh(&command).output()?))
}

/// Does `during` while the disk's VFIO group belongs to nobody, the user, and KVM to everybody.
fn given_to_nobody(host: &Host, during: impl FnOnce() -> Result<()>) -> Result<()> {
    let node = group_node(host)?;
    let give = format!("chmod 666 /dev/kvm && chown 65534 {node}");
    host.sh(&give).output()?.success()?;
    let result = during();
    let take = format!("chmod 600 /dev/kvm && chown 0 {node}");
    host.sh(&take).output()?.success()?;
    result
}

fn group_node(host: &Host) -> Result<String> {
    let script = format!(
        "echo /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{}/iommu_group))",
        FIRST.bdf
    );
    Ok(host.sh(&script).output()?.success()?.text())
}

fn kvm_missing_or_not_permitted(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("none").devices("nvme", 1);
    without(host, "/dev/kvm", || {
        refused(host, &vm, 1, &["/dev/kvm", "modprobe", "BIOS"])
    })?;
    given_to_nobody(host, || {
        host.sh("chmod 600 /dev/kvm").output()?.success()?;
        let ended = as_nobody(host, &vm, "ulimit -l unlimited")?;
        is_refused(host, ended, 1, &["/dev/kvm", "root", "group"])
    })
}

fn vfio_missing_or_not_permitted(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("none").devices("nvme", 1);
    let node = group_node(host)?;
    let container = with("platform.iommufd", json!(false));
    without(host, &node, || {
        let words = [&*node, "modprobe"];
        is_refused(host, container.run(host)?, 1, &words)
    })?;
    without(host, "/dev/vfio/vfio", || {
        let words = ["/dev/vfio/vfio", "modprobe vfio_iommu_type1"];
        is_refused(host, container.run(host)?, 1, &words)
    })?;
    given_to_nobody(host, || {
        host.sh(&format!("chown 0 {node}")).output()?.success()?;
        let ended = as_nobody(host, &vm, "ulimit -l unlimited")?;
        is_refused(host, ended, 1, &[FIRST.bdf, &format!("chown USER {node}")])
    })
}

fn a_back_end_that_the_host_lacks_is_refused(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let words = ["platform.iommufd", "/dev/iommu", "modprobe iommufd"];
    refused(host, &with("platform.iommufd", json!(true)), 1, &words)
}

fn a_host_without_one_back_end_has_the_other(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let reads = |vm: &Vm| -> Result<()> {
        let ended = vm.run(host)?.powered_off()?;
        ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
        nothing_is_held(host)
    };
    let vm = Vm::new("nvme").devices("nvme", 1);
    without(host, "/dev/vfio/vfio", || {
        // It warns of devices that are with the host.
        let check = host.sh("gantry check").output()?.exits(5)?.text();
        let mut lines = check.lines().map(str::trim_end);
        let row = lines.find(|line| line.contains("VFIO back ends"));
        let only = |row: &str| row.starts_with("ok ") && row.ends_with("  iommufd");
        ensure!(row.is_some_and(only), "{check}");
        reads(&vm)
    })?;
    without(host, &group_node(host)?, || reads(&vm))?;
    without(host, "/dev/iommu", || {
        reads(&vm)?;
        let words = ["platform.iommufd", "/dev/iommu"];
        refused(host, &with("platform.iommufd", json!(true)), 1, &words)
    })
}

/// KiB that an ordinary user's VM of 256 MiB must be allowed to lock, as the refusal says.
const LIMIT: &str = "ulimit -l 327680";

fn a_low_memlock_limit(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("none").devices("nvme", 1);
    given_to_nobody(host, || {
        let ended = as_nobody(host, &vm, "ulimit -l 1024")?;
        is_refused(host, ended, 1, &["memlock", "256 MiB", "1 MiB", LIMIT])
    })
}

fn an_ordinary_user_may_run_a_vm(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("nvme").devices("nvme", 1);
    given_to_nobody(host, || {
        let ended = as_nobody(host, &vm, LIMIT)?.powered_off()?;
        ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
        nothing_is_held(host)
    })
}
