//! Bad input, one test each: the error is one line that says where and what, and nothing is changed.

// The workspace allows these in tests; clippy does not take a test's helper functions for tests.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A host of files: a disk with vfio-pci and one with nvme, and a group for both.
struct Host(tempfile::TempDir);

const GROUPS: &str = r#"{"groups": [{"name": "disks", "rules": [{"class": "0108"}]}]}"#;

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for (bdf, driver) in [("0000:01:00.0", "vfio-pci"), ("0000:02:00.0", "nvme")] {
            let dir = host.path("sys/bus/pci/devices").join(bdf);
            let drivers = host.path("sys/bus/pci/drivers").join(driver);
            let group = host.path("sys/kernel/iommu_groups").join(&bdf[5..7]);
            for dir in [&dir, &drivers, &group] {
                fs::create_dir_all(dir).unwrap();
            }
            let modalias = "pci:v00001B36d00000010sv00000000sd00000000bc01sc08i02\n";
            fs::write(dir.join("modalias"), modalias).unwrap();
            fs::write(dir.join("reset_method"), "flr\n").unwrap();
            symlink(drivers, dir.join("driver")).unwrap();
            symlink(group, dir.join("iommu_group")).unwrap();
        }
        for dir in ["dev", "proc/self", "run", "etc", "var"] {
            fs::create_dir_all(host.path(dir)).unwrap();
        }
        fs::write(host.path("proc/self/mountinfo"), "").unwrap();
        fs::write(host.path("etc/groups.json"), GROUPS).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("--host-root").arg(self.0.path()).args(args);
        command.env_clear().stdin(Stdio::null());
        command
    }

    /// The error of a command that must fail with `code` and change nothing.
    fn refused(&self, code: i32, args: &[&str]) -> String {
        self.refuses(
            self.command(Path::new(env!("CARGO_BIN_EXE_gantry")), args),
            code,
        )
    }

    fn refuses(&self, mut command: Command, code: i32) -> String {
        let before = self.definitions();
        let output = command.output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(output.stdout.is_empty(), "it says more than its error");
        assert!(error.starts_with("error: "), "{error}");
        assert_eq!(self.definitions(), before, "it changed something");
        error
    }

    /// Every file of the configuration and state directories.
    fn definitions(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        let mut dirs = vec![self.path("etc"), self.path("var")];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => dirs.push(path),
                    false => found.push((path.clone(), fs::read(path).unwrap())),
                }
            }
        }
        found.sort();
        found
    }

    /// The error about a file of the configuration directory, which must be of one line.
    fn file(&self, name: &str, text: &str) -> String {
        fs::create_dir_all(self.path("etc").join(name).parent().unwrap()).unwrap();
        fs::write(self.path("etc").join(name), text).unwrap();
        let error = self.refused(2, &["group", "list"]);
        one_line(&error, &[&format!("etc/{name}:")])
    }
}

fn one_line(error: &str, words: &[&str]) -> String {
    assert_eq!(error.lines().count(), 1, "{error}");
    for word in words {
        assert!(error.contains(word), "no {word:?} in {error}");
    }
    error.to_owned()
}

#[test]
fn a_malformed_rule() {
    let rule = "{\"groups\": [\n{\"name\": \"a\", \"rules\": [\n{\"vendr\": \"1b36\"}]}]}";
    let error = Host::new().file("groups.json", rule);
    one_line(
        &error,
        &[
            "groups.json:3:",
            "groups[0].rules[0].vendr",
            "did you mean `vendor`?",
        ],
    );
    let error = Host::new().refused(2, &["group", "create", "x", "--rule", "{\"class\": \"1\"}"]);
    assert!(
        error.contains("--rule") && error.contains("2, 4 or 6 hex digits"),
        "{error}"
    );
}

#[test]
fn a_malformed_regex() {
    let rule = "{\"groups\": [{\"name\": \"a\", \"rules\": [\n{\"name\": {\"regex\": \"(a\"}}]}]}";
    let error = Host::new().file("groups.d/10-a.json", rule);
    one_line(
        &error,
        &[
            "10-a.json:2:",
            "groups[0].rules[0].name",
            "\"(a\" is not a pattern",
        ],
    );
}

#[test]
fn a_malformed_glob() {
    let rule = "{\"groups\": [{\"name\": \"a\", \"rules\": [\n{\"slot\": \"01:[0\"}]}]}";
    let error = Host::new().file("groups.json", rule);
    one_line(
        &error,
        &[
            "groups.json:2:",
            "groups[0].rules[0].slot",
            "01:[0",
            "a pattern like 01:*",
        ],
    );
}

#[test]
fn malformed_json() {
    let error = Host::new().file("groups.json", "{\"groups\": [\n{\"name\": }]}");
    one_line(&error, &["groups.json:2:", "groups[0].name"]);
    let error = Host::new().file("alias.json", "[\n{\"name\": \"gpu\",}]");
    one_line(&error, &["alias.json:2:"]);
    let error = Host::new().file("tenants/lab/tenant.json", "{\n\"usr\": \"a\"}");
    one_line(&error, &["tenant.json:2:", "did you mean `user`?"]);
    let host = Host::new();
    fs::write(host.path("etc/plans.json"), "{\"plans\": [{\"name\": 1}]}").unwrap();
    let error = host.refused(2, &["plan", "list"]);
    one_line(&error, &["plans.json:1:", "plans[0].name"]);
}

#[test]
fn an_unknown_group() {
    let host = Host::new();
    for args in [
        &["group", "show", "disk"][..],
        &["group", "delete", "disk"],
        &["group", "add", "disk", "01:00.0"],
        &["group", "rename", "disk", "x"],
        &["group", "edit", "disk", "--class", "x"],
        &["group", "match", "disk"],
        &["group", "fit", "{\"devices\": [{\"group\": \"disk\"}]}"],
        &["device", "persist", "--group", "disk"],
    ] {
        one_line(
            &host.refused(2, args),
            &["\"disk\"", "did you mean \"disks\"?"],
        );
    }
    one_line(
        &host.refused(2, &["tenant", "show", "lab"]),
        &["no tenant \"lab\""],
    );
    one_line(&host.refused(2, &["plan", "show", "gpu2"]), &["\"gpu2\""]);
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid());
    let user = user.unwrap().unwrap().name;
    let create = ["tenant", "create", "lab", "--user", &user];
    let program = Path::new(env!("CARGO_BIN_EXE_gantry"));
    assert!(host.command(program, &create).status().unwrap().success());
    let grant = ["tenant", "grant", "lab", "--from", "disk"];
    one_line(
        &host.refused(2, &grant),
        &["\"disk\"", "did you mean \"disks\"?"],
    );
    let nobody = ["tenant", "create", "new", "--user", "no-such-user"];
    let words = ["`user`: there is no user \"no-such-user\"", "getent passwd"];
    one_line(&host.refused(2, &nobody), &words);
    let error = host.refused(1, &["group", "alias", "--remove", "gpu"]);
    one_line(&error, &["alias.json: there is no alias \"gpu\""]);
    let spec = "{\"vendor_id\": \"10de\"}";
    let error = host.refused(1, &["group", "device-spec", "--remove", spec]);
    one_line(&error, &["device_spec.json: there is no device_spec"]);
}

#[test]
fn a_duplicate_name() {
    let host = Host::new();
    let error = host.refused(1, &["group", "create", "disks"]);
    one_line(
        &error,
        &["etc/groups.json", "already a group named \"disks\""],
    );
    let error = Host::new().file("groups.d/a.json", GROUPS);
    one_line(
        &error,
        &["etc/groups.json", "already a group named \"disks\""],
    );
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid())
        .unwrap()
        .unwrap()
        .name;
    let create = ["tenant", "create", "lab", "--user", &user];
    let program = Path::new(env!("CARGO_BIN_EXE_gantry"));
    assert!(host.command(program, &create).status().unwrap().success());
    one_line(
        &host.refused(1, &create),
        &["already a tenant named \"lab\"", "tenant.json"],
    );
    let plan = ["plan", "create", "small", "--vcpus", "1"];
    assert!(host.command(program, &plan).status().unwrap().success());
    one_line(&host.refused(1, &plan), &["small", "plans.json"]);
}

#[test]
fn an_illegal_transition() {
    let host = Host::new();
    let error = host.refused(1, &["device", "release-quarantine", "01:00.0"]);
    one_line(&error, &["0000:01:00.0 is not in quarantine"]);
    let error = host.refused(1, &["device", "detach", "07:00.0"]);
    one_line(&error, &["there is no PCI device 0000:07:00.0"]);
    let error = host.refused(2, &["tenant", "revoke", "lab", "01:00.0"]);
    one_line(&error, &["no tenant \"lab\""]);
    let error = host.refused(1, &["device", "detach", "02:00.0", "--group", "other"]);
    one_line(&error, &["0000:02:00.0 belongs to group \"disks\""]);
    // A VM has the disk: its lock is held.
    let lock = host.path("run/leases/0000:01:00.0.lock");
    fs::create_dir_all(lock.parent().unwrap()).unwrap();
    let record = r#"{"kind": "vm", "name": "web", "pid": 1, "since": 0}"#;
    fs::write(&lock, record).unwrap();
    let file = fs::File::options().write(true).open(&lock).unwrap();
    let held = nix::fcntl::FcntlArg::F_OFD_SETLK(&nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    });
    nix::fcntl::fcntl(&file, held).unwrap();
    for args in [
        &["device", "reattach", "01:00.0"][..],
        &["group", "delete", "disks"],
    ] {
        one_line(
            &host.refused(1, args),
            &["0000:01:00.0 is held by VM \"web\" (pid 1)"],
        );
    }
}

/// A copy of the program that an ordinary user may run, wherever this tree lies.
fn of_nobody(host: &Host, args: &[&str]) -> Command {
    let program = host.path("gantry");
    // Not by this process, whose other tests start programs: those would have it open for writing.
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_gantry"))
        .arg(&program)
        .status();
    assert!(copied.unwrap().success());
    fs::set_permissions(host.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = host.command(&program, args);
    if nix::unistd::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    command
}

#[test]
fn a_missing_permission() {
    let host = Host::new();
    let groups = host.path("etc/groups.json");
    fs::set_permissions(&groups, fs::Permissions::from_mode(0o000)).unwrap();
    let error = host.refuses_for_nobody(&["group", "list"]);
    assert!(
        error.contains("groups.json") && error.contains("Permission denied"),
        "{error}"
    );
    fs::set_permissions(&groups, fs::Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(host.path("run"), fs::Permissions::from_mode(0o555)).unwrap();
    let error = host.refuses_for_nobody(&["device", "detach", "02:00.0"]);
    assert!(
        error.contains("allocate.lock") && error.contains("run as root, or as a tenant's user"),
        "{error}"
    );
    let definition = host.path("etc/tenants/lab/tenant.json");
    fs::create_dir_all(definition.parent().unwrap()).unwrap();
    fs::write(&definition, r#"{"user": "root"}"#).unwrap();
    let other = of_nobody(&host, &["--tenant", "lab", "vm", "list"]);
    let error = host.refuses(other, 2);
    let said = "you are not tenant \"lab\", whose user is root";
    assert!(error.contains(said), "{error}");
}

#[test]
fn a_read_only_directory() {
    let host = Host::new();
    for dir in ["run", "var"] {
        fs::set_permissions(host.path(dir), fs::Permissions::from_mode(0o777)).unwrap();
    }
    for dir in ["etc", "var"] {
        fs::set_permissions(host.path(dir), fs::Permissions::from_mode(0o555)).unwrap();
    }
    for (args, file) in [
        (&["group", "create", "x"][..], "etc/groups.json"),
        (
            &["group", "device-spec", "{\"vendor_id\": \"10de\"}"],
            "etc/device_spec.json",
        ),
        (&["plan", "create", "x", "--vcpus", "1"], "etc/plans.json"),
        (&["maintenance", "on"], "var/maintenance.json"),
    ] {
        let error = host.refuses_for_nobody(args);
        assert!(
            error.contains(file) && error.contains("Permission denied"),
            "{error}"
        );
    }
    for dir in ["etc", "var"] {
        fs::set_permissions(host.path(dir), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

impl Host {
    /// One line says what cannot be used, and the next what the kernel says.
    fn refuses_for_nobody(&self, args: &[&str]) -> String {
        let output = of_nobody(self, args).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(
            error.starts_with("error: ") && error.lines().count() <= 2,
            "{error}"
        );
        assert_eq!(
            fs::read_to_string(self.path("etc/groups.json")).unwrap_or(GROUPS.into()),
            GROUPS
        );
        assert_eq!(self.definitions_count(), 1, "it left a file");
        error
    }

    fn definitions_count(&self) -> usize {
        let etc = fs::read_dir(self.path("etc")).unwrap().count();
        etc + fs::read_dir(self.path("var")).unwrap().count()
    }
}
