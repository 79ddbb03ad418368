//! Cases about tenants: ordinary users who own devices, run VMs with them, and get at no others.

use anyhow::{Result, ensure};
use gantry_tests::lab::{Host, Output};
use serde_json::{Value, json};

use crate::pool::{FIRST, SECOND, device, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Ended, Running, Vm};

pub const CASES: &[Case] = cases![
    a_tenant_runs_a_vm_and_gets_at_no_others_device,
    a_boot_gives_tenants_their_devices_again,
    what_a_former_user_has_open_changes_no_hands,
    a_user_may_open_nothing_and_gets_what_root_has_opened,
];

/// What a VM of 256 MiB may have to lock, KiB.
pub const LIMIT: &str = "ulimit -l 327680";

fn gantry(host: &Host, words: &str) -> Result<Output> {
    host.sh(&format!("gantry {words}")).output()
}

/// A command of a tenant's user.
pub fn by(user: &str, limit: &str, command: &str) -> String {
    format!("{limit}; exec su {user} -s /bin/sh -c '{command}'")
}

fn says(host: &Host, user: &str, command: &str) -> Result<Output> {
    host.sh(&by(user, LIMIT, command)).output()
}

/// Lets a user of this name run VMs.
pub fn with_user(host: &Host, name: &str) -> Result<()> {
    let script = format!(
        "grep -q {name} /etc/passwd || {{
             id=$((1000 + $(wc -l </etc/passwd)))
             echo {name}:x:$id:$id::/tmp:/bin/sh >>/etc/passwd
         }}
         chmod 666 /dev/kvm; mkdir -p /tmp/vms; chmod 755 /tmp /tmp/vms /lab"
    );
    host.sh(&script).output()?.success()?;
    Ok(())
}

/// Tenants `alice` and `bob`, users of these names, with a disk each; everything is undone at the end.
fn with_tenants(host: &Host, during: impl FnOnce() -> Result<()>) -> Result<()> {
    let set_up = format!(
        "umask 077; gantry tenant create alice && gantry tenant create bob --description other &&
         gantry tenant grant alice {} && gantry tenant grant bob {}",
        FIRST.bdf, SECOND.bdf
    );
    with_user(host, "alice")?;
    with_user(host, "bob")?;
    let groups = json!({"groups": [{"name": "nvme", "rules": [{"class": "0108"}]}]});
    host.write("/etc/gantry/groups.json", groups.to_string())?;
    let result = host.sh(&set_up).output()?.success().and_then(|_| during());
    let clear = "for name in alice bob; do
             gantry tenant revoke $name --all && gantry tenant delete $name
         done; chmod 600 /dev/kvm";
    let cleared = host.sh(clear).output()?.success();
    result?;
    cleared?;
    let dirs = "ls /etc/gantry/tenants /run/gantry/tenants /var/lib/gantry/tenants | grep -v :";
    let left = host.sh(dirs).output()?.text();
    ensure!(left.trim().is_empty(), "{left}");
    for disk in [FIRST, SECOND] {
        ensure!(
            device(host, disk.bdf)?["driver"] == "nvme",
            "{} is not back",
            disk.bdf
        );
    }
    let owner = format!("stat -c %u /run/gantry/leases/{}.lock", FIRST.bdf);
    ensure!(
        host.sh(&owner).output()?.success()?.text() == "0",
        "its lock file is not"
    );
    Ok(())
}

fn a_tenant_runs_a_vm_and_gets_at_no_others_device(host: &Host) -> Result<()> {
    with_tenants(host, || {
        nobody_else_gets_an_idle_device(host)?;
        a_user_sees_its_own_alone(host)?;
        another_is_out_of_reach(host)?;
        a_low_limit_is_named(host)?;
        let vm = Vm::new("nvme").devices("alice", 1);
        let run = vm.command(host)?;
        let ended = Ended::of(
            host.sh(&format!("{} </dev/null", by("alice", LIMIT, &run)))
                .output()?,
        );
        let ended = ended.powered_off()?;
        ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
        while_it_is_used(host)?;
        nothing_is_held(host)
    })
}

/// Not even root's VM, and not by its address.
fn nobody_else_gets_an_idle_device(host: &Host) -> Result<()> {
    let refused = Vm::new("none").devices("nvme", 1).run(host)?.exits(1)?;
    ensure!(
        refused.errors.contains("belongs to tenant \"alice\""),
        "{refused}"
    );
    let mut by_path = Vm::new("none");
    by_path.flags = "--allow-ungrouped";
    by_path.file["devices"] = json!([{"path": format!("/sys/bus/pci/devices/{}", SECOND.bdf)}]);
    let refused = by_path.run(host)?.exits(1)?;
    ensure!(
        refused.errors.contains("belongs to tenant \"bob\""),
        "{refused}"
    );
    let kept = gantry(host, &format!("device reattach {}", FIRST.bdf))?.exits(1)?;
    ensure!(
        kept.errors().contains("gantry tenant revoke alice"),
        "{kept}"
    );
    let granted = gantry(host, &format!("tenant grant bob {}", FIRST.bdf))?.exits(1)?;
    ensure!(
        granted.errors().contains("belongs to tenant \"alice\""),
        "{granted}"
    );
    Ok(())
}

fn a_user_sees_its_own_alone(host: &Host) -> Result<()> {
    for (user, disk) in [("alice", FIRST), ("bob", SECOND)] {
        let list = says(host, user, "gantry device list --json")?.success()?;
        let list: Value = serde_json::from_str(&list.text())?;
        let seen: Vec<&Value> = list.as_array().into_iter().flatten().collect();
        ensure!(
            seen.len() == 1 && seen[0]["bdf"] == disk.bdf,
            "{user}: {list:#}"
        );
        ensure!(
            seen[0]["group"] == user && seen[0]["state"] == "detached",
            "{list:#}"
        );
        let groups = says(host, user, "gantry group list")?.success()?.text();
        ensure!(
            groups.contains(user) && !groups.contains("nvme "),
            "{groups}"
        );
    }
    Ok(())
}

/// Neither gantry nor the kernel gives alice what is bob's.
fn another_is_out_of_reach(host: &Host) -> Result<()> {
    let bobs = SECOND.bdf;
    let mut vm = Vm::new("none").named("thief");
    vm.file["devices"] = json!([{"path": format!("/sys/bus/pci/devices/{bobs}")}]);
    let run = vm.command(host)?;
    let sysfs = format!("/sys/bus/pci/devices/{bobs}");
    for (command, words) in [
        (run, "no PCI device"),
        (format!("gantry device reattach {bobs}"), "no PCI device"),
        (
            format!("gantry --tenant bob device reattach {bobs}"),
            "you are not tenant \"bob\"",
        ),
        (format!("gantry tenant revoke bob {bobs}"), ""),
        (format!("gantry tenant grant alice {bobs}"), ""),
        (
            format!("exec 3<>/dev/vfio/$(basename $(readlink {sysfs}/iommu_group))"),
            "ermission",
        ),
        (format!("echo 1 >{sysfs}/reset"), "ermission"),
        (format!("echo {bobs} >{sysfs}/driver/unbind"), "ermission"),
        (format!("cat /run/gantry/leases/{bobs}.lock"), "ermission"),
        ("ls /run/gantry/tenants/bob".to_owned(), "ermission"),
    ] {
        let refused = says(host, "alice", &command)?;
        let failed = refused.clone().success().is_err();
        ensure!(
            failed && refused.errors().contains(words),
            "{command}: {refused}"
        );
    }
    let bob = device(host, bobs)?;
    ensure!(
        bob["driver"] == "vfio-pci" && bob["tenant"] == "bob",
        "{bob:#}"
    );
    Ok(())
}

fn a_low_limit_is_named(host: &Host) -> Result<()> {
    let run = Vm::new("none").devices("alice", 1).command(host)?;
    let refused = host
        .sh(&by("alice", "ulimit -l 1024", &run))
        .output()?
        .exits(1)?;
    ensure!(refused.errors().contains(LIMIT), "{refused}");
    ensure!(
        refused.errors().contains("/etc/security/limits.d"),
        "{refused}"
    );
    Ok(())
}

fn while_it_is_used(host: &Host) -> Result<()> {
    let vm = Vm::new("sleep").named("hers").devices("alice", 1);
    let run = by("alice", LIMIT, &vm.command(host)?);
    let mut running = Running::of(host.sh(&run).start()?);
    running.until("guest: init")?;
    let disk = device(host, FIRST.bdf)?;
    ensure!(
        disk["state"] == "assigned" && disk["vm"] == "hers",
        "{disk:#}"
    );
    let kept = gantry(host, "tenant revoke alice --all")?.exits(1)?;
    ensure!(kept.errors().contains("VM \"hers\""), "{kept}");
    let seen = gantry(host, "maintenance status")?.success()?.text();
    ensure!(seen.contains("VM \"hers\""), "{seen}");
    gantry(host, "maintenance on --reason tests")?.success()?;
    let off = says(host, "alice", "gantry maintenance off")?.exits(1)?;
    ensure!(off.errors().contains("run as root"), "{off}");
    let seen = says(host, "alice", "gantry maintenance status")?.success()?;
    ensure!(seen.text().contains("maintenance is on: tests"), "{seen}");
    gantry(host, "maintenance off")?.success()?;
    let kept = gantry(host, "tenant edit alice --user bob")?.exits(1)?;
    ensure!(kept.errors().contains("VM \"hers\""), "{kept}");
    let list = gantry(host, "vm list")?.success()?.text();
    ensure!(list.contains("tenant alice"), "{list}");
    let control = gantry(host, "vm info hers")?.exits(1)?;
    ensure!(control.errors().contains("sudo -u alice"), "{control}");
    let kept = gantry(host, "tenant delete alice")?.exits(1)?;
    ensure!(kept.errors().contains("VM \"hers\""), "{kept}");
    let other = says(host, "bob", "gantry device list --json")?
        .success()?
        .text();
    ensure!(
        !other.contains(FIRST.bdf) && !other.contains("hers"),
        "{other}"
    );
    running.signal(nix::sys::signal::Signal::SIGTERM)?;
    running.end()?.exits(143)?;
    Ok(())
}

/// What a boot undoes: drivers, nodes and the run directory.
fn a_boot_gives_tenants_their_devices_again(host: &Host) -> Result<()> {
    with_tenants(host, || {
        let undo = format!(
            "cd /sys/bus/pci/devices/{0} && echo >driver_override && echo {0} >driver/unbind &&
             echo {0} >/sys/bus/pci/drivers_probe; rm -rf /run/gantry /var/lib/gantry",
            FIRST.bdf
        );
        host.sh(&undo).output()?.success()?;
        ensure!(
            device(host, FIRST.bdf)?["driver"] == "nvme",
            "no boot at all"
        );
        // Closed to all but root, if that had its way.
        let said = host.sh("umask 077; gantry boot").output()?;
        let said = said.success()?.text();
        ensure!(
            said.contains(&format!("{}: nvme -> vfio-pci", FIRST.bdf)),
            "{said}"
        );
        let run = Vm::new("nvme").devices("alice", 1).command(host)?;
        let ended = Ended::of(
            host.sh(&format!("{} </dev/null", by("alice", LIMIT, &run)))
                .output()?,
        );
        let ended = ended.powered_off()?;
        ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
        Ok(())
    })
}

fn what_a_former_user_has_open_changes_no_hands(host: &Host) -> Result<()> {
    with_tenants(host, || {
        let link = format!("/sys/bus/pci/devices/{}/iommu_group", FIRST.bdf);
        let group = host.sh(&format!("basename $(readlink {link})")).output()?;
        let node = format!("/dev/vfio/{}", group.success()?.text());
        let open = by("alice", LIMIT, &format!("exec 3<>{node}; exec sleep 600"));
        // The processes that have it open, once there are some.
        let who = format!(
            "for one in /proc/[0-9]*; do
                 [ \"$(readlink $one/fd/3)\" = {node} ] && echo ${{one#/proc/}}
             done"
        );
        let script = format!(
            "({open}) </dev/null >/dev/null 2>&1 &
             until [ -n \"$({who})\" ]; do sleep 0.1; done"
        );
        host.sh(&script).output()?.success()?;
        let owner = || -> Result<String> {
            let owner = host.sh(&format!("stat -c %U {node}")).output()?;
            Ok(owner.success()?.text())
        };
        for words in ["tenant edit alice --user bob", "tenant revoke alice --all"] {
            let kept = gantry(host, words)?.exits(1)?;
            let said = kept.errors();
            ensure!(said.contains("(sleep) has it open"), "{words}: {kept}");
            ensure!(owner()? == "alice", "{words}");
        }
        host.sh(&format!("kill $({who})")).output()?.success()?;
        gantry(host, "tenant edit alice --user bob")?.success()?;
        ensure!(owner()? == "bob");
        Ok(())
    })
}

/// The user's VM may open neither the cdev nor iommufd: root opens both, and sends them over the VM's socket.
fn a_user_may_open_nothing_and_gets_what_root_has_opened(host: &Host) -> Result<()> {
    const CLOSED: &str =
        "chown root: /dev/iommu /dev/vfio/devices/* && chmod 600 /dev/iommu /dev/vfio/devices/* &&
        rm -rf /tmp/alices && mkdir /tmp/alices && chown alice /tmp/alices";
    let attach = format!("vm attach /tmp/alices/vm --device {} --id disk", FIRST.bdf);
    with_tenants(host, || {
        // A grant lets alice open iommufd, and nobody who is no tenant.
        with_user(host, "carol")?;
        says(host, "alice", "exec 3<>/dev/iommu")?.success()?;
        let other = says(host, "carol", "exec 3<>/dev/iommu")?;
        ensure!(other.errors().contains("ermission denied"), "{other}");
        host.sh(CLOSED).output()?.success()?;
        let mut vm = Vm::new("shell");
        vm.flags = "--api-socket /tmp/alices/vm";
        vm.file["hotplug"] = json!({"slots": 4, "groups": ["alice"]});
        vm.file["platform"]["iommufd"] = json!(true);
        let run = by("alice", LIMIT, &vm.command(host)?);
        let mut running = Running::of(host.sh(&run).start()?);
        running.until("guest: init")?;
        let refused = gantry(host, &attach)?.exits(1)?;
        ensure!(
            refused.errors().contains("cannot open /dev/iommu"),
            "{refused}"
        );
        // The second time the VM has no DMA address space left of the first.
        for _ in 0..2 {
            gantry(host, &format!("{attach} --open"))?.success()?;
            running.types(
                "until [ -b /dev/nvme0n1 ]; do sleep 0.1; done; \
                 echo guest: sum=$(dd if=/dev/nvme0n1 bs=64k iflag=direct 2>/dev/null | sha256sum)",
            )?;
            running.line("guest: sum=")?;
            let held = device(host, FIRST.bdf)?;
            ensure!(held["state"] == "assigned", "{held:#}");
            let again = gantry(host, &format!("{attach}2 --open"))?.exits(75)?;
            ensure!(again.errors().contains("is held by VM \"vm\""), "{again}");
            gantry(host, "vm detach /tmp/alices/vm disk")?.success()?;
        }
        let foreign = attach.replace(FIRST.bdf, SECOND.bdf);
        let unsent = gantry(host, &format!("{foreign} --open"))?.exits(1)?;
        let not_sent = "0000:02:00.0 is not sent to user alice";
        ensure!(unsent.errors().contains(not_sent), "{unsent}");
        // Another tenant's it does not even see.
        let foreign = gantry(host, &foreign)?.exits(1)?;
        ensure!(
            foreign
                .errors()
                .contains("there is no PCI device 0000:02:00.0"),
            "{foreign}"
        );
        running.types("poweroff -f")?;
        let ended = running.end()?.powered_off()?;
        let sum = format!("{} -", FIRST.checksum());
        ensure!(ended.values("sum").eq([&*sum; 2]), "{ended}");
        ensure!(device(host, FIRST.bdf)?["state"] == "detached", "not free");
        nothing_is_held(host)
    })
}
