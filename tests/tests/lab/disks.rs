//! Cases about disks that are files or block devices of the host.

use std::time::Duration;

use anyhow::{Result, ensure};
use cloud_hypervisor_client::apis::DefaultApi;
use cloud_hypervisor_client::models;
use gantry_tests::lab::Host;
use serde_json::json;

use crate::api::with_client;
use crate::passthrough::count_exits;
use crate::pool::{FIRST, Pool, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For every host kernel.
pub const CASES: &[Case] = cases![
    a_file_is_a_disk,
    reading_a_file_causes_no_exit_to_user_space,
    what_is_no_raw_disk_of_its_own_is_refused,
    a_disk_of_the_host_is_a_disk,
    a_disk_works_beside_a_passed_device_and_after_a_reboot,
    a_disk_comes_and_goes_while_the_guest_runs,
    an_unchanged_client_attaches_a_disk,
    a_guest_sees_its_disk_grow,
    a_disk_is_accessed_past_the_cache_and_by_several_queues,
];

const IMAGE: &str = "/tmp/disk.img";

/// Makes an image of random bytes; what `sha256sum` says of it.
fn image(host: &Host) -> Result<String> {
    random(host, IMAGE, 8)
}

/// Makes a file of so many MiB of random bytes; what `sha256sum` says of it.
fn random(host: &Host, path: &str, mib: u8) -> Result<String> {
    let make = format!("dd if=/dev/urandom of={path} bs=1M count={mib} 2>/dev/null");
    let script = format!("{make}; echo $(sha256sum <{path})");
    Ok(host.sh(&script).output()?.success()?.text())
}

/// A VM with the image as its disk.
fn with_image() -> Vm {
    let mut vm = Vm::new("shell");
    vm.file["disks"] = json!([{"path": IMAGE, "serial": "GANTRY-1"}]);
    vm
}

fn a_file_is_a_disk(host: &Host) -> Result<()> {
    let sum = image(host)?;
    let mut vm = with_image().cpus(2);
    vm.file["disks"][0]["num_queues"] = json!(2);
    let other = random(host, "/tmp/other.img", 1)?;
    let second = json!({"path": "/tmp/other.img", "readonly": true});
    vm.file["disks"] = json!([vm.file["disks"][0], second]);
    let mut running = vm.start(host)?;
    running.types("echo guest: sum=$(sha256sum </dev/vda)")?;
    running.types("echo guest: other=$(sha256sum </dev/vdb)")?;
    running.types("B=/sys/block; echo guest: serial=$(cat $B/vda/serial) ro=$(cat $B/vd?/ro)")?;
    running.types(
        "dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync && echo guest: written=vdb",
    )?;
    running.types(
        "dd if=/dev/zero of=/dev/vda bs=64k seek=1 count=2 conv=fsync && echo guest: written=vda",
    )?;
    running.until("guest: written=vda\r\n")?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ensure!(
        ended.value("sum")? == sum && ended.value("other")? == other,
        "{ended}"
    );
    ensure!(ended.value("serial")? == "GANTRY-1 ro=0 1", "{ended}");
    ensure!(ended.values("written").eq(["vda"]), "{ended}");
    let expected = format!(
        "dd if={IMAGE} bs=64k skip=1 count=2 2>/dev/null | od | head -n 1 | grep ' 000000 000000 '"
    );
    host.sh(&expected).output()?.success()?;
    nothing_is_held(host)
}

fn reading_a_file_causes_no_exit_to_user_space(host: &Host) -> Result<()> {
    image(host)?;
    let mut running = with_image().start(host)?;
    running.types(
        "echo guest: reads; sh -c 'while :; do dd if=/dev/vda of=/dev/null bs=16k count=20 iflag=direct \
         2>/dev/null; done'",
    )?;
    running.until("guest: reads\r\n")?;
    // Then the terminal, which is no part of what is counted, is quiet.
    until_read(host, 20 * BLOCK)?;
    count_exits(host, true)?;
    until_read(host, 400 * BLOCK)?;
    let exits = count_exits(host, false)?;
    ensure!(exits == 0, "{exits} exits while 400 blocks were read");
    running.keys("\x03")?;
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}

/// Bytes of a read of the guest.
const BLOCK: u64 = 16 << 10;

/// Waits until gantry has read so many bytes more.
fn until_read(host: &Host, bytes: u64) -> Result<()> {
    let script = format!(
        "seen() {{ awk '/^rchar/ {{ print $2 }}' /proc/$(pidof gantry)/io; }}; end=$(( $(seen) + {bytes} ))
         while [ $(seen) -lt $end ]; do sleep 0.05; done"
    );
    host.sh(&script).output()?.success()?;
    Ok(())
}

fn what_is_no_raw_disk_of_its_own_is_refused(host: &Host) -> Result<()> {
    image(host)?;
    let running = with_image().named("first").start(host)?;
    host.sh("until gantry vm info first >/dev/null 2>&1; do sleep 0.1; done")
        .output()?
        .success()?;
    let refusals = [
        ("locked", IMAGE, "another process has locked /tmp/disk.img"),
        ("missing", "/tmp/none.img", "truncate -s 10G disk.raw"),
        ("qcow2", "/tmp/qcow2.img", "is a qcow2 image"),
        ("odd", "/tmp/odd.img", "is 513 bytes long"),
        (
            "pipe",
            "/tmp/pipe",
            "neither a regular file nor a block device",
        ),
        ("mounted", "/dev/loop0", "the host uses /dev/loop0"),
    ];
    let made = "printf 'QFI\\373' >/tmp/qcow2.img; truncate -s 1M /tmp/qcow2.img; truncate -s 513 /tmp/odd.img
                rm -f /tmp/pipe; mkfifo /tmp/pipe
                truncate -s 8M /tmp/fs.img; losetup /dev/loop0 /tmp/fs.img; mke2fs -q /dev/loop0
                mkdir -p /tmp/mnt; mount /dev/loop0 /tmp/mnt";
    host.sh(made).output()?.success()?;
    let mut said = Vec::new();
    for (name, path, words) in refusals {
        let mut vm = Vm::new("none").named(name);
        vm.file["disks"] = json!([{"path": path}]);
        let ended = vm.run(host)?;
        said.push((name, words, ended));
    }
    host.sh("umount /tmp/mnt; losetup -d /dev/loop0; rm /tmp/pipe")
        .output()?
        .success()?;
    for (name, words, ended) in said {
        ensure!(
            ended.errors.contains("`disks[0].path`: "),
            "{name}: {ended}"
        );
        ensure!(ended.errors.contains(words), "{name}: {ended}");
        ensure!(
            ended.exit != gantry_tests::protocol::Exit::Code(0),
            "{ended}"
        );
    }
    let mut running = running;
    running.types("poweroff -f")?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}

fn a_disk_of_the_host_is_a_disk(host: &Host) -> Result<()> {
    let find = format!(
        "basename $(dirname $(grep -l {} /sys/class/nvme/*/serial))",
        FIRST.serial
    );
    let disk = host.sh(&find).output()?.success()?.text();
    let mut vm = Vm::new("shell");
    vm.file["disks"] = json!([{"path": format!("/dev/{disk}n1"), "readonly": true}]);
    let mut running = vm.start(host)?;
    running.types("echo guest: sum=$(sha256sum </dev/vda); poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ensure!(
        ended.value("sum")? == format!("{} -", FIRST.checksum()),
        "{ended}"
    );
    nothing_is_held(host)
}

fn a_disk_works_beside_a_passed_device_and_after_a_reboot(host: &Host) -> Result<()> {
    let sum = image(host)?;
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut running = with_image().devices("nvme", 1).start(host)?;
    let sums = "echo guest: sum=$(sha256sum </dev/vda) $(sha256sum </dev/nvme0n1)";
    running.types(sums)?;
    running.types("reboot -f")?;
    running.types(sums)?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let expected = format!("{sum} {} -", FIRST.checksum());
    ensure!(ended.values("sum").eq([&*expected, &*expected]), "{ended}");
    nothing_is_held(host)
}

/// Where disks may come from, and one of them.
const FOLDER: &str = "/tmp/images";
const LATER: &str = "/tmp/images/later.img";

/// A guest that disks can be attached to, and what `sha256sum` says of the first.
fn with_slots(host: &Host) -> Result<(Running, String)> {
    let sum = random(host, LATER, 8)?;
    let mut vm = with_image();
    vm.file["hotplug"] = json!({"slots": 4, "disks": [FOLDER]});
    Ok((vm.start(host)?, sum))
}

fn gantry(host: &Host, words: &str) -> Result<String> {
    let output = host.sh(&format!("gantry vm {words}")).output()?;
    Ok(output.success()?.text())
}

/// What gantry says of a command that it refuses.
fn refusal(host: &Host, words: &str) -> Result<String> {
    let output = host.sh(&format!("gantry vm {words} 2>&1")).output()?;
    ensure!(output.clone().success().is_err(), "{words} is obeyed");
    Ok(output.text())
}

fn a_disk_comes_and_goes_while_the_guest_runs(host: &Host) -> Result<()> {
    host.sh(&format!("mkdir -p {FOLDER}")).output()?.success()?;
    image(host)?;
    let (mut running, sum) = with_slots(host)?;
    running.until("/ # ")?;
    for (path, words) in [
        ("/tmp/disk.img", "`hotplug.disks`"),
        ("/tmp/images/../disk.img", "it is not in /tmp/images"),
        ("/tmp/images/none.img", "truncate -s 10G"),
        ("/tmp/images/link.img", "/tmp/images"),
        ("/tmp/images/qcow2.img", "is a qcow2 image"),
        ("/tmp/images/odd.img", "is 513 bytes long"),
    ] {
        host.sh(
            "cd /tmp/images; ln -sf ../disk.img link.img; truncate -s 513 odd.img
            printf 'QFI\\373' >qcow2.img; truncate -s 1M qcow2.img",
        )
        .output()?
        .success()?;
        let said = refusal(host, &format!("attach-disk vm {path}"))?;
        ensure!(said.contains(words), "{path}: {said}");
    }
    gantry(
        host,
        &format!("attach-disk vm {LATER} --id data --serial LATER-1"),
    )?;
    let twice = refusal(host, &format!("attach-disk vm {LATER} --id other"))?;
    ensure!(twice.contains("another process has locked"), "{twice}");
    let taken = refusal(host, &format!("attach-disk vm {LATER} --id data"))?;
    ensure!(taken.contains("has a device \"data\" already"), "{taken}");
    let mut second = Vm::new("none").named("second");
    second.file["disks"] = json!([{"path": LATER}]);
    let second = second.run(host)?;
    ensure!(
        second.errors.contains("another process has locked"),
        "{second}"
    );
    running.keys("echo guest: sum=$(sha256sum </dev/vdb) $(cat /sys/block/vdb/serial)\n")?;
    running.types("reboot -f")?;
    running.types("echo guest: sum=$(sha256sum </dev/vdb) $(cat /sys/block/vdb/serial)")?;
    running.types(
        "dd if=/dev/zero of=/dev/vdb bs=64k count=1 conv=fsync && echo guest: written=vdb",
    )?;
    running.until("guest: written=vdb\r\n")?;
    let told = gantry(host, "info vm")?;
    ensure!(told.contains(LATER) && told.contains("3 free"), "{told}");
    gantry(host, "detach vm data")?;
    running.types("echo guest: gone=$(ls /sys/block | grep -c vdb)")?;
    host.sh(&format!(
        "dd if={LATER} bs=64k count=1 2>/dev/null | cmp -n 65536 - /dev/zero"
    ))
    .output()?
    .success()?;
    // One of those that the VM started with goes, too, and what is given back can come again.
    let sum_again = random(host, LATER, 8)?;
    gantry(host, "detach vm disk0")?;
    gantry(host, &format!("attach-disk vm {LATER} --readonly"))?;
    running.types("echo guest: again=$(sha256sum </dev/vda) $(cat /sys/block/vda/ro)")?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    let expected = format!("{sum} LATER-1");
    ensure!(ended.values("sum").eq([&*expected, &*expected]), "{ended}");
    ensure!(ended.value("gone")? == "0", "{ended}");
    ensure!(ended.value("again")? == format!("{sum_again} 1"), "{ended}");
    ended.no_warnings()?;
    nothing_is_held(host)
}

fn an_unchanged_client_attaches_a_disk(host: &Host) -> Result<()> {
    host.sh(&format!("mkdir -p {FOLDER}")).output()?.success()?;
    let sum = random(host, LATER, 8)?;
    let socket = "/tmp/disks.sock";
    let start = format!("exec gantry run --api-socket {socket}");
    let mut running = Running::of(host.sh(&start).start()?);
    host.sh(&format!("while ! [ -e {socket} ]; do sleep 0.01; done"))
        .output()?
        .success()?;
    let mut file = Vm::new("shell").file;
    file["memory"]["size"] = (256 << 20).into();
    file["cpus"]["max_vcpus"] = 1.into();
    let config: models::VmConfig = serde_json::from_value(file)?;
    with_client(host, socket, async |client| {
        client.create_vm(config).await?;
        client.boot_vm().await?;
        Ok(())
    })?;
    running.until("/ # ")?;
    with_client(host, socket, async |client| {
        let disk = models::DiskConfig {
            path: Some(LATER.to_owned()),
            id: Some("data".to_owned()),
            ..models::DiskConfig::new()
        };
        let added = client.vm_add_disk_put(disk).await?;
        ensure!(added.id == "data", "{added:?}");
        let info = client.vm_info_get().await?;
        let disks = info.config.disks.unwrap_or_default();
        ensure!(disks.len() == 1, "{disks:?}");
        ensure!(disks[0].path.as_deref() == Some(LATER), "{disks:?}");
        Ok(())
    })?;
    running.keys(
        "while ! [ -e /dev/vda ]; do sleep 0.1; done; echo guest: sum=$(sha256sum </dev/vda)\n",
    )?;
    running.until(&format!("guest: sum={sum}\r\n"))?;
    with_client(host, socket, async |client| {
        let id = Some("data".to_owned());
        client
            .vm_remove_device_put(models::VmRemoveDevice { id })
            .await?;
        let gone = async {
            while !client
                .vm_info_get()
                .await?
                .config
                .disks
                .unwrap_or_default()
                .is_empty()
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(60), gone).await??;
        Ok(client.shutdown_vmm().await?)
    })?;
    running.end()?.powered_off()?;
    nothing_is_held(host)
}

fn a_guest_sees_its_disk_grow(host: &Host) -> Result<()> {
    image(host)?;
    let mut running = with_image().start(host)?;
    running.until("/ # ")?;
    for (size, words) in [("4M", "stays as it is"), ("8388609", "a multiple of 512")] {
        let said = refusal(host, &format!("resize-disk vm disk0 {size}"))?;
        ensure!(said.contains(words), "{said}");
    }
    let said = refusal(host, "resize-disk vm disk7 16M")?;
    ensure!(
        said.contains("has no device \"disk7\": it has disk0"),
        "{said}"
    );
    gantry(host, "resize-disk vm disk0 16M")?;
    running.keys("echo guest: sectors=$(cat /sys/block/vda/size)\n")?;
    running.types(
        "dd if=/dev/zero of=/dev/vda bs=1M seek=15 count=1 conv=fsync && echo guest: written=end",
    )?;
    // What has grown by itself is taken over.
    host.sh(&format!("truncate -s 24M {IMAGE}"))
        .output()?
        .success()?;
    with_client(host, "/run/gantry/vm.sock", async |client| {
        let (id, desired_size) = (Some("disk0".to_owned()), Some(24 << 20));
        let resize = models::VmResizeDisk { id, desired_size };
        Ok(client.vm_resize_disk_put(resize).await?)
    })?;
    running.types("echo guest: sectors=$(cat /sys/block/vda/size); poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ensure!(ended.values("sectors").eq(["32768", "49152"]), "{ended}");
    ensure!(ended.value("written")? == "end", "{ended}");
    nothing_is_held(host)
}

fn a_disk_is_accessed_past_the_cache_and_by_several_queues(host: &Host) -> Result<()> {
    // A block device, as the file system in memory may know no direct accesses.
    let path = "/dev/loop0";
    host.sh("truncate -s 16M /tmp/loop.img; losetup /dev/loop0 /tmp/loop.img")
        .output()?
        .success()?;
    let sum = random(host, path, 16)?;
    for disable_io_uring in [false, true] {
        let mut vm = Vm::new("shell").cpus(2);
        vm.file["disks"] = json!([{
            "path": path, "direct": true, "num_queues": 2, "queue_size": 64,
            "disable_io_uring": disable_io_uring,
        }]);
        let mut running = vm.start(host)?;
        let reads = "for at in 0 4 8 12; do dd if=/dev/vda bs=1M skip=$at count=4 2>/dev/null >/tmp/$at & done; wait";
        running.types(reads)?;
        running.types("echo guest: sum=$(cat /tmp/0 /tmp/4 /tmp/8 /tmp/12 | sha256sum)")?;
        running.types("echo guest: queues=$(ls /sys/block/vda/mq | wc -l)")?;
        running.types("dd if=/dev/vda of=/dev/vda bs=64k count=4 conv=notrunc,fsync 2>/dev/null && echo guest: written=yes")?;
        running.until("guest: written=yes\r\n")?;
        let counted = host.sh("gantry vm metrics vm").output()?.success()?.text();
        let has = |what: &str, count: &str| {
            let mut lines = counted.lines();
            lines.any(|line| line.contains(what) && line.ends_with(count))
        };
        let engine = if disable_io_uring { " 0" } else { " 1" };
        ensure!(has("what=\"io_uring\"", engine), "{counted}");
        ensure!(
            !has("what=\"read_ops\"", " 0") && has("what=\"failed_ops\"", " 0"),
            "{counted}"
        );
        running.types("poweroff -f")?;
        let ended = running.end()?.powered_off()?;
        ensure!(ended.value("sum")? == sum, "{ended}");
        ensure!(ended.value("queues")? == "2", "{ended}");
    }
    let after = host.sh(&format!("echo $(sha256sum <{path}); losetup -d {path}"));
    ensure!(after.output()?.success()?.text() == sum);
    nothing_is_held(host)
}
