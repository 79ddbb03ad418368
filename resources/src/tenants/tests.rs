//! Tests: thick provisioning, and what stands between tenants.

mod vgpus;

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::allocation::allocate;
use crate::fixture::{Fake, FakeHost, FakeKernel, bdf, ungrouped};
use crate::holding::lock_file::lock_path;
use crate::holding::maintenance::running_vms;
use crate::holding::record::Holder;
use crate::inventory::device::HostDevice;
use crate::moving::bind::{BindRequest, reattach};
use crate::pools::group::Groups;
use crate::pools::request::DeviceRequest;
use std::collections::BTreeSet;

/// Three disks with the host, two of them neighbours; a group takes them all.
fn host() -> FakeHost {
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 1).driver("nvme"),
        Fake::nvme("02:00.0", 2).driver("nvme"),
        Fake::nvme("02:00.1", 2).driver("nvme"),
    ]);
    host.groups(r#"{"groups": [{"name": "disks", "rules": [{"class": "0108"}]}]}"#);
    host
}

/// This user, who needs no rights to own what it makes.
fn user() -> TenantFile {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid());
    TenantFile {
        user: user.unwrap().unwrap().name,
        description: String::new(),
    }
}

fn give(host: &FakeHost, kernel: &FakeKernel<'_>, name: &str, device: &str) -> String {
    let wanted = Grant {
        devices: GrantedDevices::Named(&[bdf(device).into()]),
        group: None,
        overrides: &[],
    };
    match grant(&host.paths, kernel.access(), name, &wanted) {
        Ok(given) => format!("{} given", given.len()),
        Err(error) => error.to_string(),
    }
}

fn holder_of(vm: &str, pid: u32) -> Holder {
    let vm = vm.to_owned();
    Holder { vm, pid }
}

fn scope(host: &FakeHost, name: &str) -> HostPaths {
    let tenants = Tenants::load(&host.paths).unwrap();
    tenants.find(name).unwrap().scope(&host.paths)
}

fn taken(paths: &HostPaths, group: &str) -> Result<Vec<crate::allocation::Lease>, String> {
    let holder = holder_of(&format!("vm of {group}"), std::process::id());
    allocate(paths, &[DeviceRequest::group(group, 1)], &holder).map_err(|error| error.to_string())
}

#[test]
fn free_devices_are_counted_and_given_as_cards() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    let free = |count| {
        let wanted = Grant {
            devices: GrantedDevices::Free {
                from: "disks",
                count,
            },
            group: None,
            overrides: &[],
        };
        grant(&host.paths, kernel.access(), "a", &wanted).map_err(|error| error.to_string())
    };
    // Two of the three functions are one card.
    let refused = free(3).unwrap_err();
    assert!(refused.contains("only 2 free"), "{refused}");
    assert_eq!(free(2).unwrap().len(), 3);
    let refused = free(1).unwrap_err();
    assert!(refused.contains("no free device"), "{refused}");
}

#[test]
fn a_tenants_devices_are_its_own_idle_or_not() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    create_tenant(&host.paths, "b", &user()).unwrap();
    assert_eq!(give(&host, &kernel, "a", "01:00.0"), "1 given");
    assert_eq!(
        give(&host, &kernel, "a", "01:00.0"),
        "1 given",
        "again is no harm"
    );
    // Neighbours go together.
    assert_eq!(give(&host, &kernel, "b", "02:00.1"), "2 given");
    let said = give(&host, &kernel, "b", "01:00.0");
    assert!(
        said.contains("0000:01:00.0 belongs to tenant \"a\""),
        "{said}"
    );

    let groups = Groups::load(&host.paths).unwrap();
    let devices = host.scan();
    assert!(
        devices
            .iter()
            .all(|device| groups.group_of(device).is_none())
    );
    assert_eq!(groups.tenant_of(&devices[0]), Some("a"));
    let refused = taken(&host.paths, "disks").unwrap_err();
    assert!(
        refused.contains("of 2 devices dropped: 2 that belong to tenants"),
        "{refused}"
    );
    assert!(
        refused.contains("gantry tenant revoke a 0000:01:00.0"),
        "{refused}"
    );
    let exact = [ungrouped(bdf("01:00.0"))];
    let holder = holder_of("x", 1);
    assert!(allocate(&host.paths, &exact, &holder).is_err());
    let device = [bdf("01:00.0")];
    let kept = reattach(&host.paths, &kernel, &BindRequest::of(&device))
        .unwrap_err()
        .to_string();
    assert!(kept.contains("belongs to tenant \"a\""), "{kept}");

    let (a, b) = (scope(&host, "a"), scope(&host, "b"));
    let seen = |paths: &HostPaths| -> Vec<String> {
        let all = scan(paths).unwrap();
        all.iter().map(|device| device.bdf.to_string()).collect()
    };
    assert_eq!(seen(&a), ["0000:01:00.0"]);
    assert_eq!(seen(&b), ["0000:02:00.0", "0000:02:00.1"]);
    assert!(HostDevice::read(&a, bdf("02:00.0")).is_err());
    let lease = taken(&a, "a").unwrap();
    assert_eq!(lease[0].name(), bdf("01:00.0"));
    // The host sees who has it, in the one place where leases are.
    assert!(host.read("01:00.0").lease.is_held());
    let said = revoke(&host.paths, kernel.access(), "a", &[bdf("01:00.0")]).unwrap_err();
    assert!(
        said.to_string().contains("held by VM \"vm of a\""),
        "{said}"
    );
}

#[test]
fn what_is_taken_back_is_as_it_was() {
    let host = host();
    let before = host.bindings();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    for device in ["01:00.0", "02:00.0"] {
        give(&host, &kernel, "a", device);
    }
    let said = delete_tenant(&host.paths, "a").unwrap_err().to_string();
    assert!(said.contains("still owns 0000:01:00.0"), "{said}");
    let old = fs::metadata(lock_path(&host.paths, bdf("01:00.0")))
        .unwrap()
        .ino();
    let all = scope(&host, "a").only.unwrap().into_iter();
    let all: Vec<HostBdf> = all.filter_map(DeviceName::pci).collect();
    assert_eq!(
        revoke(&host.paths, kernel.access(), "a", &all).unwrap(),
        all
    );
    assert_eq!(host.bindings(), before);
    // The file is another one where it had to change hands; here it was this user's all the time.
    let new = fs::metadata(lock_path(&host.paths, bdf("01:00.0")))
        .unwrap()
        .ino();
    assert_eq!(old, new);
    delete_tenant(&host.paths, "a").unwrap();
    assert!(Tenants::load(&host.paths).unwrap().iter().next().is_none());
    for dir in [&host.paths.run, &host.paths.config, &host.paths.state] {
        assert!(!dir.join("tenants/a").exists(), "{}", dir.display());
    }
    assert!(
        taken(&host.paths, "disks").is_err(),
        "they are with the host"
    );
}

#[test]
fn a_grant_that_fails_anywhere_can_be_done_again_or_undone() {
    for at in 0..6 {
        let host = host();
        let before = host.bindings();
        let kernel = FakeKernel::new(&host).with_fault(at, crate::fixture::Fault::Refuses);
        create_tenant(&host.paths, "a", &user()).unwrap();
        let said = give(&host, &kernel, "a", "02:00.0");
        assert_ne!(said, "2 given", "each device takes three writes");
        assert_eq!(host.bindings(), before, "{at}: {said}");
        assert!(scope(&host, "a").only.unwrap().is_empty());
        assert_eq!(give(&host, &kernel, "a", "02:00.0"), "2 given");
    }
}

#[test]
fn a_boot_puts_nodes_and_files_right() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    give(&host, &kernel, "a", "01:00.0");
    fs::remove_dir_all(&host.paths.run).unwrap();
    let tenants = Tenants::load(&host.paths).unwrap();
    restore(&host.paths, &tenants).unwrap();
    assert!(
        host.paths.run.join("tenants/a/leases").is_dir(),
        "a link to the host's"
    );
    assert!(taken(&scope(&host, "a"), "a").is_ok());
    assert_eq!(running_vms(&host.paths).unwrap(), []);
}

#[test]
fn users_of_tenants_with_devices_open_iommufd_and_nobody_else() {
    use crate::base::acl;
    use std::os::unix::fs::PermissionsExt;
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    assert_eq!(give(&host, &kernel, "a", "01:00.0"), "1 given");
    host.file("dev/iommu", "iommufd");
    let iommufd = host.paths.dev.join("iommu");
    let close = || fs::set_permissions(&iommufd, fs::Permissions::from_mode(0o600)).unwrap();
    let users = || {
        assert_eq!(fs::metadata(&iommufd).unwrap().mode() & 0o007, 0);
        acl::users(&iommufd)
    };
    let own = [nix::unistd::geteuid().as_raw()];
    close();
    let tenants = Tenants::load(&host.paths).unwrap();
    restore(&host.paths, &tenants).unwrap();
    assert_eq!(users(), own, "after a boot");
    close();
    assert_eq!(give(&host, &kernel, "a", "02:00.0"), "2 given");
    assert_eq!(users(), own);
    for (left, device) in [(1, "01:00.0"), (0, "02:00.0")] {
        revoke(&host.paths, kernel.access(), "a", &[bdf(device)]).unwrap();
        assert_eq!(users().len(), left);
    }
}

/// The other process of the next test, which has root's umask of 077.
#[test]
#[ignore = "run by what_tenants_need_is_open_to_them_whatever_the_umask"]
fn make_everything_anew() {
    use crate::holding::quarantine::{Until, quarantine};
    let disk = Fake::nvme("01:00.0", 1).driver("nvme");
    let host = FakeHost::new(&[disk]);
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    assert_eq!(give(&host, &kernel, "a", "01:00.0"), "1 given");
    let disk = host.read("01:00.0");
    quarantine(&host.paths, disk.bdf, disk.id, "it hangs", Until::Boot).unwrap();
    let HostPaths {
        run, config, state, ..
    } = &host.paths;
    for (root, path, mode) in [
        (run, "", 0o755),
        (run, "leases", 0o755),
        (run, "leases/0000:01:00.0.lock", 0o600),
        (run, "restore/driver", 0o755),
        (run, "restore/driver/0000:01:00.0", 0o644),
        (run, "tenants", 0o755),
        (run, "tenants/a", 0o700),
        (config, "", 0o755),
        (config, "tenants", 0o755),
        (config, "tenants/a", 0o755),
        (config, "tenants/a/tenant.json", 0o644),
        (config, "tenants/a/groups.json", 0o644),
        (state, "", 0o755),
        (state, "tenants", 0o755),
        (state, "tenants/a", 0o700),
        (state, "quarantine", 0o755),
        (state, "quarantine/0000:01:00.0.boot.json", 0o644),
    ] {
        let path = root.join(path);
        let found = fs::metadata(&path).unwrap().mode() & 0o777;
        assert_eq!(found, mode, "{}: {found:o}", path.display());
    }
}

#[test]
fn what_tenants_need_is_open_to_them_whatever_the_umask() {
    let name = "tenants::tests::make_everything_anew";
    let run = std::process::Command::new("sh")
        .args(["-c", r#"umask 077; exec "$0" "$@""#])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", name])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn a_tenant_whose_vm_runs_stays() {
    let host = host();
    create_tenant(&host.paths, "a", &user()).unwrap();
    let vm = |pid| holder_of("x", pid);
    let _hosts = crate::holding::maintenance::announce(&host.paths, &vm(7)).unwrap();
    let running = crate::holding::maintenance::announce(&scope(&host, "a"), &vm(8)).unwrap();
    // The record is the tenant's own, and may name anybody's process.
    let delete = || delete_tenant(&host.paths, "a").unwrap_err().to_string();
    let said = delete();
    assert!(
        said.starts_with("tenant \"a\" says that its VM \"x\" runs"),
        "{said}"
    );
    assert!(!said.contains("pid"), "{said}");
    host.file("proc/8/stat", "");
    assert_eq!(delete(), "VM \"x\" (pid 8) of tenant a runs: end it first");
    assert!(scope(&host, "a").config.join("tenant.json").exists());
    // Nor does it become another user's, who could neither see nor end the VM.
    let definition = |user: &str, description: &str| TenantFile {
        user: user.to_owned(),
        description: description.to_owned(),
    };
    let own = user().user;
    let edit = |file: &TenantFile| edit_tenant(&host.paths, "a", file);
    let said = edit(&definition("daemon", "")).unwrap_err().to_string();
    assert_eq!(said, "VM \"x\" (pid 8) of tenant a runs: end it first");
    edit(&definition(&own, "upstairs")).unwrap();
    let tenants = Tenants::load(&host.paths).unwrap();
    assert_eq!(
        tenants.find("a").unwrap().file,
        definition(&own, "upstairs")
    );
    drop(running);
    delete_tenant(&host.paths, "a").unwrap();
}

/// Whoever has a node open keeps the device, whoever may open it later.
#[test]
fn what_a_process_has_open_changes_no_hands() {
    use std::os::unix::fs::symlink;
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    give(&host, &kernel, "a", "01:00.0");
    let opens = |group: u32| {
        host.file("proc/77/comm", "dd\u{1b}[2J\n");
        host.file("proc/77/stat", "77 (dd) S 1 77 77 0 -1 0 0\n");
        let fd = host.paths.proc.join("77/fd");
        fs::create_dir_all(&fd).unwrap();
        symlink(format!("/dev/vfio/{group}"), fd.join("5")).unwrap();
    };
    let ends = || fs::remove_dir_all(host.paths.proc.join("77")).unwrap();
    opens(1);
    let other = TenantFile {
        user: "daemon".to_owned(),
        description: String::new(),
    };
    let said = [
        edit_tenant(&host.paths, "a", &other).map(drop),
        revoke(&host.paths, kernel.access(), "a", &[bdf("01:00.0")]).map(drop),
    ];
    for said in said {
        let said = said.unwrap_err().to_string();
        let words = "0000:01:00.0 cannot get another owner: process 77 (dd[2J) has it open";
        assert!(said.starts_with(words), "{said}");
    }
    let tenants = Tenants::load(&host.paths).unwrap();
    assert_eq!(tenants.find("a").unwrap().file, user());
    assert!(
        scope(&host, "a")
            .only
            .unwrap()
            .contains(&bdf("01:00.0").into())
    );
    ends();
    revoke(&host.paths, kernel.access(), "a", &[bdf("01:00.0")]).unwrap();
    // Nor does a tenant get what a process of the host's has open.
    let device = [bdf("02:00.0")];
    crate::moving::bind::detach(&host.paths, &kernel, &BindRequest::of(&device)).unwrap();
    opens(2);
    let said = give(&host, &kernel, "a", "02:00.0");
    assert!(said.contains("process 77"), "{said}");
    assert!(scope(&host, "a").only.unwrap().is_empty());
    ends();
    assert_eq!(give(&host, &kernel, "a", "02:00.0"), "2 given");
}

#[test]
fn what_is_in_quarantine_or_somebodys_stays_with_whom_it_is() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    let record = r#"{"id": "1b36:0010", "reason": "it hung", "until": "released", "boot": null}"#;
    host.file("var/quarantine/0000:01:00.0.json", record);
    let said = give(&host, &kernel, "a", "01:00.0");
    assert!(said.contains("is in quarantine: it hung"), "{said}");
    assert_eq!(give(&host, &kernel, "a", "02:00.0"), "2 given");
    let _held = taken(&scope(&host, "a"), "a").unwrap();
    let other = TenantFile {
        user: "daemon".to_owned(),
        description: String::new(),
    };
    let edit = edit_tenant(&host.paths, "a", &other).unwrap_err();
    assert!(edit.to_string().contains("is held by VM"), "{edit}");
    assert!(edit.to_string().contains("`gantry vm detach "), "{edit}");
    let tenants = Tenants::load(&host.paths).unwrap();
    assert_eq!(tenants.find("a").unwrap().file, user());
}

#[test]
fn mistakes_are_named() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    let nobody = TenantFile {
        user: "no such user".to_owned(),
        description: String::new(),
    };
    create_tenant(&host.paths, "lab", &user()).unwrap();
    host.file(
        "etc/tenants/odd/tenant.json",
        r#"{"user": "root", "colour": 1}"#,
    );
    let odd = Tenants::load(&host.paths).unwrap_err().to_string();
    assert!(
        odd.contains("odd/tenant.json:1:") && odd.contains("colour"),
        "{odd}"
    );
    fs::remove_dir_all(host.paths.config.join("tenants/odd")).unwrap();
    for (said, expected) in [
        (
            create_tenant(&host.paths, "lab", &user()).map(drop),
            "already a tenant named \"lab\"",
        ),
        (
            create_tenant(&host.paths, "../x", &user()).map(drop),
            "cannot name a tenant",
        ),
        (
            create_tenant(&host.paths, "b", &nobody).map(drop),
            "there is no user \"no such user\"",
        ),
        (
            edit_tenant(&host.paths, "lbb", &user()).map(drop),
            "did you mean \"lab\"?",
        ),
        (delete_tenant(&host.paths, "zzz"), "gantry tenant list"),
        (
            revoke(&host.paths, kernel.access(), "lab", &[bdf("01:00.0")]).map(drop),
            "0000:01:00.0 does not belong to tenant \"lab\"",
        ),
    ] {
        let said = said.unwrap_err().to_string();
        assert!(said.contains(expected) && !said.contains('\n'), "{said}");
    }
}

/// A tenant may put anything into its directory; root neither follows nor waits.
#[test]
fn what_a_tenant_puts_into_its_directory_harms_nobody() {
    use std::os::unix::fs::symlink;
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    give(&host, &kernel, "a", "01:00.0");
    let run = host.paths.run.join("tenants/a");
    host.file("shadow", "secret");
    let shadow = host.paths.run.with_file_name("shadow");
    let pipe = |path: &Path| {
        let _ = fs::remove_file(path);
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    };
    // A link to a file of root's: left alone.
    let before = fs::metadata(&shadow).unwrap();
    let lock = run.join("allocate.lock");
    let _ = fs::remove_file(&lock);
    symlink(&shadow, &lock).unwrap();
    let tenants = Tenants::load(&host.paths).unwrap();
    restore(&host.paths, &tenants).unwrap();
    let after = fs::metadata(&shadow).unwrap();
    let changed = |meta: &fs::Metadata| (meta.ctime(), meta.ctime_nsec());
    assert_eq!(changed(&after), changed(&before), "nobody has chowned it");
    // A pipe for the lock: nobody waits at it.
    pipe(&lock);
    assert_eq!(give(&host, &kernel, "a", "02:00.0"), "2 given");
    revoke(&host.paths, kernel.access(), "a", &[bdf("02:00.0")]).unwrap();
    // One VM under many names.
    let running =
        crate::holding::maintenance::announce(&scope(&host, "a"), &holder_of("x", 7)).unwrap();
    let vms = run.join("vms");
    for index in 0..400 {
        fs::hard_link(vms.join("7.lock"), vms.join(format!("{index}"))).unwrap();
    }
    let seen = running_vms(&host.paths).unwrap();
    assert_eq!((seen.len(), seen[0].record.name.as_str()), (1, "x"));
    // And so many files that not all are looked at.
    for index in 0..2000 {
        fs::write(vms.join(format!("file-{index}")), "").unwrap();
    }
    assert!(running_vms(&host.paths).unwrap().len() <= 1);
    drop(running);
    fs::remove_dir_all(&vms).unwrap();
    // Pipes among the VMs, and a link in the place of their directory.
    fs::create_dir(&vms).unwrap();
    pipe(&vms.join("7.lock"));
    assert_eq!(running_vms(&host.paths).unwrap(), []);
    fs::remove_dir_all(&vms).unwrap();
    let _running = crate::holding::maintenance::announce(&host.paths, &holder_of("x", 1)).unwrap();
    symlink(host.paths.run.join("vms"), &vms).unwrap();
    assert_eq!(running_vms(&host.paths).unwrap().len(), 1, "not seen twice");
}

#[test]
fn other_hardware_at_a_tenants_address_is_nobodys() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    give(&host, &kernel, "a", "01:00.0");
    let tenants = || Tenants::load(&host.paths).unwrap();
    restore(&host.paths, &tenants()).unwrap();
    // Another device has come into the IOMMU group.
    host.add(&Fake::nvme("01:00.1", 1));
    let said = restore(&host.paths, &tenants()).unwrap_err().to_string();
    assert!(
        said.contains("0000:01:00.1 (1b36:0010) is not what it was"),
        "{said}"
    );
    host.remove(bdf("01:00.1"));
    restore(&host.paths, &tenants()).unwrap();
    // The disk is replaced by another device.
    let modalias = crate::fixture::modalias((0x8086, 0x1533), (0, 0), 0x01_08_02);
    fs::write(host.dir(bdf("01:00.0")).join("modalias"), modalias).unwrap();
    let said = restore(&host.paths, &tenants()).unwrap_err().to_string();
    assert!(
        said.contains("0000:01:00.0 is not given to tenant \"a\"") && said.contains("8086:1533"),
        "{said}"
    );
    assert_eq!(scope(&host, "a").only, Some(BTreeSet::new()));
}

#[test]
fn a_wrong_group_is_named_before_a_device_moves() {
    let host = host();
    let before = host.bindings();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    let wanted = Grant {
        devices: GrantedDevices::Named(&[bdf("01:00.0").into()]),
        group: Some("no/name"),
        overrides: &[],
    };
    grant(&host.paths, kernel.access(), "a", &wanted).unwrap_err();
    assert_eq!(host.bindings(), before);
}

#[test]
fn two_grants_at_once_give_a_device_once() {
    let host = host();
    for name in ["a", "b"] {
        create_tenant(&host.paths, name, &user()).unwrap();
    }
    let first = lock_owners(&host.paths).unwrap();
    let said = std::thread::scope(|scope| {
        let second = scope.spawn(|| give(&host, &FakeKernel::new(&host), "b", "01:00.0"));
        // Long enough for the second one to have looked, if it did not wait.
        std::thread::sleep(std::time::Duration::from_millis(300));
        host.file(
            "etc/tenants/a/groups.json",
            r#"{"groups": [{"name": "a", "rules": [{"slot": "0000:01:00.0"}]}]}"#,
        );
        drop(first);
        second.join().unwrap()
    });
    assert!(said.contains("belongs to tenant \"a\""), "{said}");
}

/// A boot takes long: whose devices are is looked up when it is its turn.
#[test]
fn a_boot_gives_nobody_what_was_taken_back_meanwhile() {
    let host = host();
    create_tenant(&host.paths, "a", &user()).unwrap();
    let owns = |rules: &str| {
        let groups = format!(r#"{{"groups": [{{"name": "a", "rules": [{rules}]}}]}}"#);
        host.file("etc/tenants/a/groups.json", &groups);
    };
    let given = |device| lock_path(&host.paths, bdf(device)).exists();
    owns(r#"{"slot": "0000:01:00.0"}"#);
    let first = lock_owners(&host.paths).unwrap();
    std::thread::scope(|scope| {
        let boot = scope.spawn(|| restore_tenants(&host.paths).unwrap());
        // Long enough for the boot to have looked, if it did not wait.
        std::thread::sleep(std::time::Duration::from_millis(300));
        owns(r#"{"slot": "0000:02:00.0"}, {"slot": "0000:02:00.1"}"#);
        drop(first);
        boot.join().unwrap();
    });
    assert!(!given("01:00.0") && given("02:00.0") && given("02:00.1"));
}

/// Free devices are chosen when it is one's turn, and not before: what fits together is granted.
#[test]
fn two_grants_out_of_a_group_at_once_get_other_devices() {
    let host = FakeHost::new(&[
        Fake::nvme("01:00.0", 1).driver("nvme"),
        Fake::nvme("02:00.0", 2).driver("nvme"),
    ]);
    host.groups(r#"{"groups": [{"name": "disks", "rules": [{"class": "0108"}]}]}"#);
    for name in ["a", "b"] {
        create_tenant(&host.paths, name, &user()).unwrap();
    }
    let free = |name| {
        let wanted = Grant {
            devices: GrantedDevices::Free {
                from: "disks",
                count: 1,
            },
            group: None,
            overrides: &[],
        };
        grant(&host.paths, FakeKernel::new(&host).access(), name, &wanted)
    };
    let first = lock_owners(&host.paths).unwrap();
    let given = std::thread::scope(|scope| {
        let both = ["a", "b", "a"].map(|name| scope.spawn(move || free(name)));
        // Long enough for both to have chosen, if they did not wait.
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(first);
        both.map(|one| one.join().unwrap())
    });
    let (given, refused): (Vec<_>, Vec<_>) = given.into_iter().partition(Result::is_ok);
    let mut given: Vec<DeviceName> = given.into_iter().flat_map(Result::unwrap).collect();
    given.sort();
    assert_eq!(given, ["01:00.0", "02:00.0"].map(bdf));
    let refused = refused.into_iter().next().unwrap().unwrap_err().to_string();
    assert_eq!(refused, "group \"disks\" has no free device (1 asked for)");
}

#[test]
fn a_device_of_two_tenants_is_refused_with_file_line_and_key() {
    let host = host();
    for name in ["a", "b"] {
        create_tenant(&host.paths, name, &user()).unwrap();
        host.file(
            &format!("etc/tenants/{name}/groups.json"),
            "{\"groups\": [{\"name\": \"x\", \"rules\": [\n{\"class\": \"0108\"},\n\
             {\"slot\": \"0000:01:00.0\"}]}]}",
        );
    }
    let said = Tenants::load(&host.paths).unwrap_err().to_string();
    for words in [
        "tenants/b/groups.json:3:",
        "group \"x\": `rules[1].slot`: 0000:01:00.0 belongs to tenant \"a\" too",
    ] {
        assert!(said.contains(words), "{said}");
    }
    assert!(
        taken(&host.paths, "disks")
            .unwrap_err()
            .contains("b/groups.json")
    );
}

#[test]
fn a_user_who_is_not_there_is_named_with_the_line() {
    let host = host();
    create_tenant(&host.paths, "a", &user()).unwrap();
    host.file(
        "etc/tenants/a/tenant.json",
        "{\n  \"user\": \"no such user\"}",
    );
    let tenants = Tenants::load(&host.paths).unwrap();
    let said = restore(&host.paths, &tenants).unwrap_err().to_string();
    assert!(said.contains("a/tenant.json:2:"), "{said}");
}

#[test]
fn what_is_in_quarantine_for_a_tenant_is_for_the_host_and_the_other_way_round() {
    use crate::holding::quarantine::quarantine;
    use crate::inventory::release::release_quarantine;
    let until = crate::holding::quarantine::Until::Released;
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    give(&host, &kernel, "a", "01:00.0");
    let tenant = scope(&host, "a");
    let device = host.read("01:00.0");
    let state = |paths: &HostPaths| HostDevice::read(paths, bdf("01:00.0")).unwrap().quarantine;
    for (one, other) in [(&tenant, &host.paths), (&host.paths, &tenant)] {
        quarantine(one, device.bdf, device.id, "it hangs", until).unwrap();
        assert_eq!(state(other).as_deref(), Some("it hangs"));
        assert_eq!(
            scan(other).unwrap()[0].quarantine.as_deref(),
            Some("it hangs")
        );
        assert!(taken(&tenant, "a").unwrap_err().contains("quarantine"));
        release_quarantine(&host.paths, bdf("01:00.0")).unwrap();
        assert_eq!((state(one), state(other)), (None, None));
    }
    // What a tenant says of devices that are not its user's is nothing to the host; here all files are
    // one user's, so that it takes one without a lease.
    let other = host.read("02:00.0");
    quarantine(&tenant, other.bdf, other.id, "mine now", until).unwrap();
    let lock = lock_path(&host.paths, other.bdf);
    let _ = fs::remove_file(&lock);
    assert_eq!(host.read("02:00.0").quarantine, None);
    // It stays known when the device goes back, in words that a terminal takes.
    quarantine(&tenant, device.bdf, device.id, "it\u{1b} hangs", until).unwrap();
    assert_eq!(state(&host.paths).as_deref(), Some("it hangs"));
    revoke(&host.paths, kernel.access(), "a", &[bdf("01:00.0")]).unwrap();
    delete_tenant(&host.paths, "a").unwrap();
    assert_eq!(state(&host.paths).as_deref(), Some("it hangs"));
}

#[test]
fn a_device_that_hangs_is_taken_back_and_left_alone() {
    use crate::holding::quarantine::{Until, hung, quarantine};
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    for device in ["01:00.0", "02:00.0"] {
        give(&host, &kernel, "a", device);
    }
    let stuck = host.read("02:00.1");
    let tenant = scope(&host, "a");
    quarantine(&tenant, stuck.bdf, stuck.id, "it hangs", Until::Boot).unwrap();
    let all = ["01:00.0", "02:00.0", "02:00.1"].map(bdf);
    assert_eq!(
        revoke(&host.paths, kernel.access(), "a", &all).unwrap(),
        all
    );
    let driver = |device| host.read(device).driver;
    assert_eq!(driver("01:00.0").as_deref(), Some("nvme"));
    for neighbour in ["02:00.0", "02:00.1"] {
        assert_eq!(driver(neighbour).as_deref(), Some("vfio-pci"));
    }
    assert_eq!(
        hung(&host.paths, stuck.bdf, stuck.id).as_deref(),
        Some("it hangs")
    );
    delete_tenant(&host.paths, "a").unwrap();
}

#[test]
fn what_is_revoked_and_not_reattached_is_said_to_be_just_that() {
    for at in 0..6 {
        let host = host();
        let before = host.bindings();
        let kernel = FakeKernel::new(&host);
        create_tenant(&host.paths, "a", &user()).unwrap();
        assert_eq!(give(&host, &kernel, "a", "02:00.0"), "2 given");
        let given = host.bindings();
        let faulty = FakeKernel::new(&host).with_fault(at, crate::fixture::Fault::Refuses);
        let both = ["02:00.0", "02:00.1"].map(bdf);
        let failed = revoke(&host.paths, faulty.access(), "a", &both).unwrap_err();
        let source = std::error::Error::source(&failed).unwrap().to_string();
        let said = format!("{failed}: {source}");
        for part in [
            "0000:02:00.0 0000:02:00.1 no longer of tenant \"a\"",
            "`gantry device reattach 0000:02:00.0 0000:02:00.1`",
            "each device has the driver that it had before",
        ] {
            assert!(said.contains(part), "{at}: {said}");
        }
        assert!(scope(&host, "a").only.unwrap().is_empty());
        assert_eq!(host.bindings(), given, "{at}: both are with vfio-pci");
        let request = BindRequest::of(&both);
        reattach(&host.paths, &kernel, &request).unwrap();
        assert_eq!(host.bindings(), before, "{at}");
    }
}

#[test]
fn a_link_in_the_place_of_a_tenants_records_leads_nowhere() {
    let host = host();
    let kernel = FakeKernel::new(&host);
    create_tenant(&host.paths, "a", &user()).unwrap();
    give(&host, &kernel, "a", "01:00.0");
    let name = "0000:01:00.0.json";
    host.file(&format!("elsewhere/{name}"), "{");
    let elsewhere = host.paths.state.with_file_name("elsewhere");
    let own = host.paths.state.join("tenants/a/quarantine");
    std::os::unix::fs::symlink(&elsewhere, &own).unwrap();
    assert_eq!(host.read("01:00.0").quarantine, None);
    fs::remove_file(&own).unwrap();
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::symlink(elsewhere.join(name), own.join(name)).unwrap();
    assert_eq!(host.read("01:00.0").quarantine, None);
}
