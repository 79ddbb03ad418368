//! What users write, and what they are told: one row for each mistake.

mod any_json;
mod virtio;

use std::path::{Path, PathBuf};

use gantry_resources::base::HostBdf;
use gantry_resources::facts::VfioBackEnd;
use gantry_resources::pools::{DeviceRequest, OnError, RomSource};
use gantry_vmm::{NumaPolicy, SerialMode, VmConfig};

use super::{Error, LoadOptions, Source, load};

/// A folder with a kernel, an initramfs and a VM's file.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("vmlinux"), "kernel").unwrap();
        std::fs::write(folder.path().join("initrd.img"), "initramfs").unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn load(&self, text: &str) -> Result<VmConfig, Error> {
        std::fs::write(self.path("vm.json"), text).unwrap();
        load(&Source::File(self.path("vm.json")), &LoadOptions::default())
    }

    /// The error for a text, with the folder's name taken out.
    fn refusal(&self, text: &str) -> String {
        let error = self.load(text).expect_err(text);
        let folder = format!("{}/", self.0.path().display());
        error.to_string().replace(&folder, "")
    }
}

/// A file that is right but for `members`, which start at line 2, column 1.
fn file(members: &str) -> String {
    format!("{{\"payload\": {{\"kernel\": \"vmlinux\"}},\n{members}}}")
}

#[test]
fn the_least_file_is_enough() {
    let folder = Folder::new();
    let config = folder
        .load(r#"{"payload": {"kernel": "vmlinux"}}"#)
        .unwrap();
    assert_eq!(config.name, "vm");
    assert_eq!(config.payload.kernel, folder.path("vmlinux"));
    assert_eq!(config.payload.initramfs, None);
    assert_eq!(config.payload.cmdline, "");
    assert_eq!(config.vcpus.get(), 1);
    assert_eq!(config.memory.bytes(), 512 << 20);
    assert!(config.devices.is_empty());
    assert_eq!(config.serial, SerialMode::Tty);
}

#[test]
fn a_full_file_means_what_it_says() {
    let folder = Folder::new();
    let text = r#"{
        "payload": {"kernel": "vmlinux", "initramfs": "initrd.img", "cmdline": "console=ttyS0"},
        "cpus": {"boot_vcpus": 4, "max_vcpus": 4, "topology": null, "nested": true},
        "memory": {"size": 1073741824, "shared": false, "thp": true},
        "devices": [
            {"group": "nvme", "count": 2},
            {"group": "gpu"},
            {"path": "/sys/bus/pci/devices/0000:01:00.0", "iommu": false, "id": null}
        ],
        "serial": {"mode": "File", "file": "out.log"},
        "console": {"mode": "Off"},
        "rng": {"src": "/dev/urandom"},
        "disks": [], "net": null, "iommu": false, "platform": {"num_pci_segments": 1}
    }"#;
    let config = folder.load(text).unwrap();
    assert_eq!(config.payload.initramfs, Some(folder.path("initrd.img")));
    assert_eq!(config.payload.cmdline, "console=ttyS0");
    assert_eq!(config.vcpus.get(), 4);
    assert!(config.cpu.nested, "asked for");
    assert_eq!(config.memory.bytes(), 1 << 30);
    assert_eq!(config.serial, SerialMode::File(folder.path("out.log")));
    let group = |name: &str, count| DeviceRequest::group(name, count);
    let bdf: HostBdf = "0000:01:00.0".parse().unwrap();
    let device = DeviceRequest::device(bdf);
    assert_eq!(config.devices, [group("nvme", 2), group("gpu", 1), device]);
}

#[test]
fn what_a_guest_is_offered_is_what_the_file_says() {
    let folder = Folder::new();
    let of = |members: &str| folder.load(&file(members)).unwrap();
    let plain = of(r#""cpus": {"boot_vcpus": 1}"#);
    assert!(!plain.cpu.nested && plain.cpu.max_phys_bits.is_none() && plain.pvpanic);
    let said =
        of(r#""cpus": {"boot_vcpus": 1, "nested": false, "max_phys_bits": 46}, "pvpanic": false"#);
    assert!(!said.cpu.nested && !said.pvpanic);
    assert_eq!(said.cpu.max_phys_bits, Some(46));
    for (iommufd, back_end) in [
        ("null", None),
        ("true", Some(VfioBackEnd::Iommufd)),
        ("false", Some(VfioBackEnd::Container)),
    ] {
        let said = of(&format!(r#""platform": {{"iommufd": {iommufd}}}"#));
        assert_eq!(said.back_end, back_end);
    }
    assert_eq!(plain.back_end, None);
    // What gantry does not do is refused even where it is another VMM's default.
    for (members, key) in [
        (
            r#""platform": {"vfio_p2p_dma": true}"#,
            "platform.vfio_p2p_dma",
        ),
        (
            r#""cpus": {"boot_vcpus": 1, "core_scheduling": "Vm"}"#,
            "cpus.core_scheduling",
        ),
        (
            r#""cpus": {"boot_vcpus": 1, "max_phys_bits": 64}"#,
            "cpus.max_phys_bits",
        ),
        (r#""rng": {"src": "/dev/zero"}"#, "rng.src"),
    ] {
        let error = folder.load(&file(members)).unwrap_err().to_string();
        assert!(error.contains(key), "{members}: {error}");
    }
}

#[test]
fn a_device_that_lacks_something_is_taken_as_its_entry_says() {
    let folder = Folder::new();
    let allow = |entry: &str| {
        let config = folder
            .load(&file(&format!(r#""devices": [{entry}]"#)))
            .unwrap();
        let allow = config.devices[0].allow;
        (allow.no_interrupts, allow.no_reset)
    };
    assert_eq!(allow(r#"{"group": "g"}"#), (false, false));
    assert_eq!(
        allow(r#"{"group": "g", "interrupts": "msix"}"#),
        (false, false)
    );
    assert_eq!(
        allow(r#"{"group": "g", "interrupts": "none"}"#),
        (true, false)
    );
    assert_eq!(
        allow(r#"{"alias": "g", "allow_no_reset": true}"#),
        (false, true)
    );
    let path = r#""path": "/sys/bus/pci/devices/0000:01:00.0""#;
    let both = format!(r#"{{{path}, "interrupts": "none", "allow_no_reset": true}}"#);
    assert_eq!(allow(&both), (true, true));
    let wrong = file(r#""devices": [{"group": "g", "interrupts": "msi"}]"#);
    assert!(
        folder
            .load(&wrong)
            .unwrap_err()
            .to_string()
            .contains("interrupts")
    );
}

#[test]
fn a_file_says_where_the_vm_is() {
    let folder = Folder::new();
    let at = |members: &str| folder.load(&file(members)).unwrap();
    assert_eq!(
        at(r#""cpus": {"boot_vcpus": 1}"#).nodes,
        NumaPolicy::NearDevices
    );
    assert_eq!(at(r#""numa_nodes": []"#).nodes, NumaPolicy::Any);
    let these = NumaPolicy::Only([0, 2].into_iter().collect());
    assert_eq!(at(r#""numa_nodes": [2, 0]"#).nodes, these);
    let cpus = r#""cpus": {"boot_vcpus": 2, "affinity": [{"vcpu": 1, "host_cpus": [3, 2]}]}"#;
    let affinity = at(cpus).affinity;
    assert_eq!(affinity, [(1, [2, 3].into_iter().collect())].into());
}

#[test]
fn sizes_may_be_written_with_units() {
    let folder = Folder::new();
    for (size, bytes) in [
        ("\"512M\"", 512 << 20),
        ("\"4GiB\"", 4u64 << 30),
        ("\"67108864\"", 64 << 20),
    ] {
        let config = folder
            .load(&file(&format!(r#""memory": {{"size": {size}}}"#)))
            .unwrap();
        assert_eq!(config.memory.bytes(), bytes, "{size}");
    }
}

#[test]
fn the_command_line_names_the_vm_and_allows_the_ungrouped() {
    let folder = Folder::new();
    let text = file(r#""devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0"}]"#);
    std::fs::write(folder.path("vm.json"), text).unwrap();
    let source = Source::File(folder.path("vm.json"));
    let named = |name: &str| {
        load(
            &source,
            &LoadOptions {
                name: Some(name.to_owned()),
                allow_ungrouped: true,
                ..LoadOptions::default()
            },
        )
    };
    let config = named("web 1").unwrap();
    assert_eq!(config.name, "web 1");
    assert!(config.devices[0].allow_ungrouped);
    for bad in ["", "a/b", "a\nb", &"x".repeat(65)] {
        let error = named(bad).unwrap_err();
        assert!(
            error.to_string().contains("cannot be a VM's name"),
            "{error}"
        );
        assert!(error.to_string().contains("--name"));
    }
}

/// `members` of an otherwise right file, then what the error says first and what its help says.
type Mistake = (&'static str, &'static str, &'static str);

const PLACES: &[Mistake] = &[
    (
        r#""numa_nodes": 1"#,
        "2:15: `numa_nodes`: expected a list, found the number 1",
        "",
    ),
    (
        r#""cpus": {"boot_vcpus": 2, "affinity": [{"vcpu": 2, "host_cpus": [0]}]}"#,
        "2:39: `cpus.affinity`: there is no vCPU 2",
        "one less than `boot_vcpus`",
    ),
    (
        r#""cpus": {"boot_vcpus": 2, "affinity": [{"vcpu": 256, "host_cpus": [0]}]}"#,
        "2:40: `cpus.affinity[0]`: there is no vCPU 256",
        "one less than `boot_vcpus`",
    ),
    (
        r#""cpus": {"boot_vcpus": 2, "affinity": [{"vcpu": 0, "host_cpus": []}]}"#,
        "2:65: `cpus.affinity[0].host_cpus`: the list is empty",
        "name CPUs",
    ),
    (
        r#""cpus": {"boot_vcpus": 2, "affinity": [{"vcpu": 0, "host_cpus": [0]}, {"vcpu": 0, "host_cpus": [1]}]}"#,
        "2:80: `cpus.affinity[1].vcpu`: vCPU 0 is named twice",
        "name each vCPU once",
    ),
];

const KEYS: &[Mistake] = &[
    (
        r#""cpus": {"boot_vcpu": 1}"#,
        "2:10: unknown key `cpus.boot_vcpu`",
        "did you mean `boot_vcpus`?",
    ),
    (
        r#""mem": {}"#,
        "2:1: unknown key `mem`",
        "did you mean `memory`?",
    ),
    (
        r#""disk": []"#,
        "2:1: unknown key `disk`",
        "did you mean `disks`?",
    ),
    (
        r#""colour": 1"#,
        "2:1: unknown key `colour`",
        "the keys here are payload, plan, cpus, memory, numa_nodes, devices, pci_passthrough:alias, disks",
    ),
    (
        r#""devices": [{"groop": "nvme"}]"#,
        "2:14: unknown key `devices[0].groop`",
        "did you mean `group`?",
    ),
    (
        r#""devices": [{"group": "a", "iomu": true}]"#,
        "2:28: unknown key `devices[0].iomu`",
        "did you mean `iommu`?",
    ),
    (
        r#""platform": {"iommu_fd": true}"#,
        "2:14: unknown key `platform.iommu_fd`",
        "did you mean `iommufd`?",
    ),
    (
        r#""platform": {"colour": 1}"#,
        "2:14: unknown key `platform.colour`",
        "the keys here are iommufd",
    ),
    (
        r#""cpus": {}"#,
        "2:9: `cpus.boot_vcpus`: this key is missing",
        "add \"boot_vcpus\"",
    ),
    (
        r#""payload": {}"#,
        "2:1: key `payload` stands twice",
        "remove one of them",
    ),
    (
        r#""fs": [{"tag": "a"}]"#,
        "2:1: `fs`: [...] is not supported yet",
        "remove the key",
    ),
    (
        r#""vsock": {"cid": 3, "socket": "/tmp/s"}"#,
        "2:31: `vsock.socket`: the guest's sockets are sockets of the host's kernel here",
        "by AF_VSOCK",
    ),
    (
        r#""console": {"mode": "Tty"}"#,
        "2:13: `console.mode`: \"Tty\" is not supported yet",
        "remove the key, or write \"Off\"",
    ),
    (
        r#""devices": [{"group": "b"}, {"group": "a", "iommu": true}]"#,
        "2:44: `devices[1].iommu`: true is not supported yet",
        "remove the key, or write false",
    ),
    (
        r#""console": []"#,
        "2:12: `console`: expected an object, found a list",
        "",
    ),
];

const TYPES: &[Mistake] = &[
    (
        r#""cpus": 4"#,
        "2:9: `cpus`: expected an object, found the number 4",
        "",
    ),
    (
        r#""cpus": {"boot_vcpus": "4"}"#,
        "2:24: `cpus.boot_vcpus`: expected a whole number, 0 or more, found the string \"4\"",
        "",
    ),
    (
        r#""cpus": {"boot_vcpus": 1.5}"#,
        "2:24: `cpus.boot_vcpus`: expected a whole number, 0 or more, found the number 1.5",
        "",
    ),
    (
        r#""cpus": {"boot_vcpus": -1}"#,
        "2:24: `cpus.boot_vcpus`: expected a whole number, 0 or more, found the number -1",
        "",
    ),
    (
        r#""memory": {"size": "a lot"}"#,
        "2:20: `memory.size`: expected a number of bytes or a string such as \"512M\" or \"4GiB\", found the string \"a lot\"",
        "",
    ),
    (
        r#""memory": {"size": "4GB"}"#,
        "2:20: `memory.size`: \"4GB\" is no size: did you mean \"4G\"?",
        "",
    ),
    (
        r#""memory": {"size": [1]}"#,
        "2:20: `memory.size`: expected a number of bytes or a string such as \"512M\" or \"4GiB\", found a list",
        "",
    ),
    (
        r#""devices": {"group": "a"}"#,
        "2:12: `devices`: expected a list, found an object",
        "",
    ),
    (
        r#""devices": ["a"]"#,
        "2:13: `devices[0]`: expected an object, found the string \"a\"",
        "",
    ),
    (
        r#""devices": [{"path": 1}]"#,
        "2:22: `devices[0].path`: expected a string, found the number 1",
        "",
    ),
    (
        r#""serial": {"mode": "tty"}"#,
        "2:20: `serial.mode`: \"tty\" is unknown",
        "did you mean \"Tty\"?",
    ),
    (
        r#""serial": {"mode": "Pty"}"#,
        "2:20: `serial.mode`: \"Pty\" is unknown",
        "use one of Off, Null, Tty, File",
    ),
    (
        r#""serial": {"mode": 1}"#,
        "2:20: `serial.mode`: expected a string, found the number 1",
        "",
    ),
    (
        r#""serial": {"mode": null}"#,
        "2:20: `serial.mode`: expected a string, found null",
        "",
    ),
];

const VALUES: &[Mistake] = &[
    (
        r#""cpus": {"boot_vcpus": 0}"#,
        "2:24: `cpus.boot_vcpus`: a VM cannot have 0 vCPUs",
        "use 1 to 254",
    ),
    (
        r#""cpus": {"boot_vcpus": 10000}"#,
        "2:24: `cpus.boot_vcpus`: a VM cannot have 10000 vCPUs",
        "use 1 to 254",
    ),
    (
        r#""cpus": {"boot_vcpus": 2, "max_vcpus": 4}"#,
        "2:40: `cpus.max_vcpus`: it differs from `boot_vcpus`",
        "leave it out",
    ),
    (
        r#""memory": {"size": 0}"#,
        "2:20: `memory.size`: 0 bytes is too small",
        "use 32 MiB or more",
    ),
    (
        r#""memory": {"size": 1000000000}"#,
        "2:20: `memory.size`: 1000000000 bytes is not a multiple of 2 MiB",
        "the nearest sizes are 952 MiB and 954 MiB",
    ),
    (
        r#""memory": {"size": 18446744073709551615}"#,
        "2:20: `memory.size`: 18446744073709551615 bytes is not a multiple",
        "the nearest sizes are",
    ),
    (
        r#""devices": [{"count": 1}]"#,
        "2:13: `devices[0]`: it has neither `group` nor `alias` nor `path`",
        "gantry group list",
    ),
    (
        r#""devices": [{"group": "a", "path": "/sys/bus/pci/devices/0000:01:00.0"}]"#,
        "2:13: `devices[0]`: it has more than one of `group`, `alias` and `path`",
        "keep one",
    ),
    (
        r#""devices": [{"group": "a", "count": 0}]"#,
        "2:37: `devices[0].count`: 0 is too few",
        "use 1 or more",
    ),
    (
        r#""devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0", "count": 1}]"#,
        "2:68: `devices[0].count`: a path names exactly one device",
        "remove `count`",
    ),
    (
        r#""devices": [{"path": "/dev/nvme0"}]"#,
        "2:22: `devices[0].path`: \"/dev/nvme0\" is no PCI device's sysfs path",
        "/sys/bus/pci/devices/0000:01:00.0",
    ),
    (
        r#""devices": [{"path": "/a/01:00.0"}, {"path": "/a/0000:01:00.0"}]"#,
        "2:37: `devices[1]`: this device is in the list already",
        "remove one",
    ),
    (
        r#""serial": {"mode": "File"}"#,
        "2:20: `serial.mode`: mode \"File\" needs a file",
        "\"file\": \"PATH\"",
    ),
    (
        r#""serial": {"mode": "Tty", "file": "a"}"#,
        "2:35: `serial.file`: only mode \"File\" has a file",
        "remove `file`",
    ),
];

#[test]
fn every_mistake_is_told_with_its_place_and_what_to_do() {
    let folder = Folder::new();
    for (members, what, help_wanted) in [PLACES, KEYS, TYPES, VALUES].concat() {
        let refusal = folder.refusal(&file(members));
        let help = refusal.strip_prefix(&format!("vm.json:{what}"));
        let help_told = help.is_some_and(|said| said.contains(help_wanted));
        assert!(help_told, "{members}\n{refusal}");
        assert_eq!(refusal.lines().count(), 1, "{refusal}");
    }
}

/// Whole files, then what the error says first and what its help says.
const WHOLE: &[Mistake] = &[
    (
        "{}",
        "vm.json:1:1: `payload`: this key is missing",
        "add \"payload\"",
    ),
    ("[]", "vm.json:1:1: expected an object, found a list", ""),
    ("", "vm.json:1:1: not valid JSON: EOF", ""),
    (
        "{\"payload\": }",
        "vm.json:1:13: `payload`: not valid JSON: expected value",
        "",
    ),
    (
        r#"{"payload": {}}"#,
        "vm.json:1:13: `payload.kernel`: this key is missing",
        "add \"kernel\"",
    ),
    (
        r#"{"payload": {"kernal": "vmlinux"}}"#,
        "vm.json:1:14: unknown key `payload.kernal`",
        "did you mean `kernel`?",
    ),
    (
        r#"{"payload": {"kernel": "vmlinux", "initrd": "x"}}"#,
        "vm.json:1:35: unknown key `payload.initrd`",
        "did you mean `initramfs`?",
    ),
    (
        r#"{"payload": {"kernel": "vmlinux", "firmware": "x"}}"#,
        "vm.json:1:47: `payload.firmware`: a VM boots a kernel or a firmware",
        "remove one of the two",
    ),
    (
        r#"{"payload": {"firmware": "none"}}"#,
        "vm.json:1:26: `payload.firmware`: cannot read none: No such file",
        "",
    ),
    (
        r#"{"payload": {"firmware": "vmlinux", "initramfs": "x"}}"#,
        "vm.json:1:50: `payload.initramfs`: a firmware takes none",
        "remove the key",
    ),
    (
        r#"{"payload": {"firmware": "vmlinux", "cmdline": "x"}}"#,
        "vm.json:1:48: `payload.cmdline`: a firmware takes none",
        "remove the key",
    ),
    (
        r#"{"payload": {"kernel": "none"}}"#,
        "vm.json:1:24: `payload.kernel`: cannot read none: No such file",
        "starts at the folder",
    ),
    (
        r#"{"payload": {"kernel": "boot"}}"#,
        "vm.json:1:24: `payload.kernel`: cannot read boot: it is a directory, not a regular file",
        "",
    ),
    (
        r#"{"payload": {"kernel": "vmlinux", "initramfs": "/none"}}"#,
        "vm.json:1:48: `payload.initramfs`: cannot read /none: No such file",
        "",
    ),
    (
        r#"{"payload": {"kernel": "vmlinux", "cmdline": "a\u0000"}}"#,
        "vm.json:1:46: `payload.cmdline`: it holds a NUL",
        "",
    ),
];

#[test]
fn payload_mistakes_are_told_too() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("boot")).unwrap();
    for (text, what, help) in WHOLE {
        let refusal = folder.refusal(text);
        assert!(refusal.starts_with(what), "{text}\n{refusal}");
        assert!(refusal.contains(help), "{text}\n{refusal}");
    }
}

#[test]
fn files_that_are_no_regular_ones_are_refused_and_not_waited_for() {
    let folder = Folder::new();
    let mode = nix::sys::stat::Mode::S_IRWXU;
    nix::unistd::mkfifo(&folder.path("pipe"), mode).unwrap();
    for (text, key) in [
        (r#"{"payload": {"kernel": "pipe"}}"#, "payload.kernel"),
        (
            r#"{"payload": {"kernel": "vmlinux", "initramfs": "pipe"}}"#,
            "payload.initramfs",
        ),
        (
            r#"{"payload": {"kernel": "vmlinux"}, "serial": {"mode": "File", "file": "pipe"}}"#,
            "serial.file",
        ),
    ] {
        let refusal = folder.refusal(text);
        assert!(refusal.contains(&format!("`{key}`: cannot ")), "{refusal}");
        assert!(refusal.contains("pipe: it is a named pipe"), "{refusal}");
    }
}

#[test]
fn disks_are_opened_when_the_file_is_read() {
    let folder = Folder::new();
    std::fs::write(folder.path("a.raw"), [0; 512]).unwrap();
    std::fs::write(folder.path("b.raw"), [0; 1024]).unwrap();
    std::fs::write(folder.path("c.img"), b"QFI\xfb").unwrap();
    let disks = |text: &str| file(&format!("\"disks\": {text}"));
    let two = r#"[{"path": "a.raw"}, {"path": "b.raw", "id": "data", "readonly": true, "direct": false}]"#;
    let config = folder.load(&disks(two)).unwrap();
    assert_eq!(config.disks[0].path, folder.path("a.raw"));
    assert_eq!(
        (&*config.disks[0].id, &*config.disks[1].id),
        ("disk0", "data")
    );
    assert!(!config.disks[0].read_only && config.disks[1].read_only);
    assert!(folder.load(&disks("[]")).unwrap().disks.is_empty());
    for (text, expected) in [
        (
            r#"[{"path": "none.raw"}]"#,
            "`disks[0].path`: cannot open none.raw: ",
        ),
        (
            r#"[{"path": "c.img"}]"#,
            "`disks[0].path`: c.img is a qcow2 image",
        ),
        (
            r#"[{"path": "a.raw"}, {"path": "a.raw"}]"#,
            "`disks[1].path`: `disks[0]` is this file already",
        ),
        (
            r#"[{"path": "a.raw", "id": "x"}, {"path": "b.raw", "id": "x"}]"#,
            "`disks[1].id`: another disk or device of the VM is called \"x\"",
        ),
        (
            r#"[{"path": "a.raw", "num_queues": 0}]"#,
            "`disks[0].num_queues`: a disk cannot have 0 queues",
        ),
        (
            r#"[{"path": "a.raw", "queue_size": 100}]"#,
            "`disks[0].queue_size`: a queue cannot have 100 entries",
        ),
        (
            r#"[{"path": "a.raw", "serial": "a b"}]"#,
            "`disks[0].serial`: it is no serial number",
        ),
        (
            r#"[{"path": "a.raw", "vhost_user": true}]"#,
            "`disks[0].vhost_user`: true is not supported yet",
        ),
        (r#"[{"readonly": true}]"#, "path"),
    ] {
        let refusal = folder.refusal(&disks(text));
        assert!(refusal.contains(expected), "{refusal}");
        assert!(refusal.starts_with("vm.json:2:"), "{refusal}");
    }
}

#[test]
fn a_topology_makes_up_all_vcpus() {
    let folder = Folder::new();
    let cpus = |count, [threads, cores, dies, packages]: [u8; 4]| {
        let levels = format!(
            r#"{{"threads_per_core": {threads}, "cores_per_die": {cores}, "dies_per_package": {dies}, "packages": {packages}}}"#
        );
        file(&format!(
            r#""cpus": {{"boot_vcpus": {count}, "topology": {levels}}}"#
        ))
    };
    let config = folder.load(&cpus(8, [2, 2, 1, 2])).unwrap();
    assert_eq!(
        (config.topology.threads_per_core, config.topology.packages),
        (2, 2)
    );
    let plain = folder.load(&file(r#""cpus": {"boot_vcpus": 3}"#)).unwrap();
    assert_eq!(plain.topology.cores_per_die, 3);
    for (text, expected) in [
        (cpus(8, [2, 2, 1, 1]), "`cpus.topology`: it makes 4 vCPUs"),
        (
            cpus(6, [1, 3, 1, 2]),
            "`cpus.topology`: 3 is not a power of two",
        ),
        (cpus(0, [1, 1, 1, 1]), "a VM cannot have 0 vCPUs"),
    ] {
        let refusal = folder.refusal(&text);
        assert!(refusal.contains(expected), "{refusal}");
    }
}

#[test]
fn the_files_of_cloud_init_are_named_with_their_keys() {
    let folder = Folder::new();
    std::fs::write(folder.path("user.yaml"), "#cloud-config\n").unwrap();
    std::fs::write(folder.path("meta.yaml"), "instance-id: one\n").unwrap();
    let files = |more: &str| {
        let both = r#""user_data": "user.yaml", "meta_data": "meta.yaml""#;
        file(&format!("\"cloud_init\": {{{both}{more}}}"))
    };
    let config = folder.load(&files("")).unwrap();
    let seed = config.cloud_init.unwrap();
    assert_eq!(seed.user_data, folder.path("user.yaml"));
    assert_eq!(seed.meta_data, folder.path("meta.yaml"));
    assert_eq!(seed.network_config, None);
    let refusal = folder.refusal(&files(r#", "network_config": "none.yaml""#));
    let expected = "`cloud_init.network_config`: cannot read none.yaml: ";
    assert!(refusal.contains(expected), "{refusal}");
    for (members, expected) in [
        (r#""cloud_init": {"user_data": "user.yaml"}"#, "meta_data"),
        (
            r#""cloud_init": {"user_data": "user.yaml", "meta_data": "m", "user-data": "x"}"#,
            "user-data",
        ),
        (
            r#""disks": [{"path": "/dev/zero", "id": "cidata"}]"#,
            "another disk or device of the VM is called \"cidata\"",
        ),
    ] {
        let refusal = folder.refusal(&file(members));
        assert!(refusal.contains(expected), "{refusal}");
        assert!(refusal.starts_with("vm.json:2:"), "{refusal}");
    }
}

#[test]
fn a_command_line_is_as_long_as_a_kernel_takes() {
    let folder = Folder::new();
    let file = |length| {
        let cmdline = "x".repeat(length);
        format!(r#"{{"payload": {{"kernel": "vmlinux", "cmdline": "{cmdline}"}}}}"#)
    };
    let refusal = folder.refusal(&file(2048));
    let what = "vm.json:1:46: `payload.cmdline`: 2048 bytes are too many: at most 2047";
    assert!(
        refusal.starts_with(what) && refusal.contains("2047"),
        "{refusal}"
    );
    assert_eq!(
        folder.load(&file(2047)).unwrap().payload.cmdline.len(),
        2047
    );
}

#[test]
fn an_unreadable_file_is_named() {
    let error = load(
        &Source::File("/none/vm.json".into()),
        &LoadOptions::default(),
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "cannot read /none/vm.json");
    assert!(
        std::error::Error::source(&error)
            .unwrap()
            .to_string()
            .contains("No such file")
    );
}

#[test]
fn the_schema_knows_every_key() {
    let schema = super::schema();
    let at = |pointer: &str| {
        schema
            .pointer(pointer)
            .unwrap_or_else(|| panic!("no {pointer}"))
    };
    assert_eq!(at("/required"), &serde_json::json!(["payload"]));
    assert_eq!(at("/additionalProperties"), false);
    assert_eq!(at("/properties/cpus/properties/boot_vcpus/maximum"), 254);
    assert!(
        at("/properties/memory/properties/size/description")
            .as_str()
            .unwrap()
            .contains("512M")
    );
    assert!(at("/properties/devices/items/properties/group/description").is_string());
    for (path, _) in super::inert::KEYS {
        let pointer = path.replace("[]", "/items").replace('.', "/properties/");
        assert!(
            at(&format!("/properties/{pointer}"))
                .get("description")
                .is_some(),
            "{path}"
        );
    }
    assert_eq!(at("/properties/fs/enum"), &serde_json::json!([[], null]));
    assert_eq!(at("/properties/payload/additionalProperties"), false);
}

#[test]
fn a_device_is_called_by_a_name_that_can_be_shown() {
    let folder = Folder::new();
    let load = |devices: &str| folder.load(&file(&format!("\"devices\": [{devices}]")));
    let group = |id: &str| {
        let id = serde_json::to_string(id).unwrap();
        format!("{{\"group\": \"gpu\", \"id\": {id}}}")
    };
    for id in ["gpu0", "Karte 1"] {
        assert_eq!(load(&group(id)).unwrap().devices[0].id.as_deref(), Some(id));
        let attach = super::attach(&group(id), false).unwrap();
        assert_eq!(attach.id(), Some(id));
    }
    for id in ["", "a/b", "\u{1b}[2J", &"x".repeat(65), "0000:01:00.0"] {
        let said = load(&group(id)).unwrap_err().to_string();
        assert!(
            said.contains("`devices[0].id`: ") && !said.contains('\u{1b}'),
            "{said}"
        );
        let said = super::attach(&group(id), false).unwrap_err().to_string();
        assert!(
            said.contains("`id`: ") && !said.contains('\u{1b}'),
            "{said}"
        );
    }
    let own = |id: &str| format!("{{\"path\": \"01:00.0\", \"id\": \"{id}\"}}");
    load(&own("0000:01:00.0")).unwrap();
    load(&own("0000:02:00.0")).unwrap_err();
}

#[test]
fn no_two_devices_have_one_name() {
    let folder = Folder::new();
    let load = |devices: &str| folder.load(&file(&format!("\"devices\": [{devices}]")));
    let two = r#"{"group": "gpu", "count": 2, "id": "gpu"}"#;
    load(&format!(r#"{two}, {{"group": "gpu", "id": "gpu-2"}}"#)).unwrap();
    for twice in ["gpu", "gpu-1"] {
        let said = load(&format!(r#"{two}, {{"group": "nic", "id": "{twice}"}}"#));
        let said = said.unwrap_err().to_string();
        assert!(said.contains("`devices[1].id`"), "{said}");
        assert!(said.contains(&format!("called \"{twice}\"")), "{said}");
    }
}

#[test]
fn a_path_may_be_an_address() {
    let folder = Folder::new();
    for path in [
        "00:02.0",
        "0000:00:02.0",
        "/sys/bus/pci/devices/0000:00:02.0",
    ] {
        let devices = format!(r#""devices": [{{"path": "{path}"}}]"#);
        let requests = folder.load(&file(&devices)).unwrap().devices;
        let bdf: HostBdf = "0000:00:02.0".parse().unwrap();
        assert_eq!(requests, [DeviceRequest::device(bdf)], "{path}");
    }
}

#[test]
fn a_key_that_is_null_is_one_that_is_absent() {
    let folder = Folder::new();
    let schema = super::schema();
    let mut body: serde_json::Value = serde_json::from_str(&file("\"devices\": [{}]")).unwrap();
    body["devices"][0]["group"] = "nvme".into();
    // Every key of every object, with null where nothing is said.
    fill(&mut body, &schema);
    assert!(
        body["cpus"].is_null() && body["sgx_epc"].is_null(),
        "{body}"
    );
    assert!(body["devices"][0]["pci_segment"].is_null(), "{body}");
    let config = folder.load(&body.to_string()).unwrap();
    assert_eq!(config.devices, [DeviceRequest::group("nvme", 1)]);
    let device = &mut body["devices"][0];
    super::attach(&device.to_string(), false).unwrap();
    // And with the objects spelled out.
    for key in [
        "cpus", "memory", "serial", "hotplug", "console", "platform", "rng",
    ] {
        body[key] = serde_json::json!({});
    }
    body["cpus"]["boot_vcpus"] = 1.into();
    body["memory"]["size"] = "64M".into();
    body["serial"]["mode"] = "Null".into();
    fill(&mut body, &schema);
    assert!(body["memory"]["zones"].is_null(), "{body}");
    folder.load(&body.to_string()).unwrap();
}

/// Adds a null for each key of a schema that an object lacks.
fn fill(value: &mut serde_json::Value, schema: &serde_json::Value) {
    use serde_json::Value;
    match value {
        Value::Object(members) => {
            for (key, schema) in schema["properties"].as_object().into_iter().flatten() {
                fill(members.entry(key).or_insert(Value::Null), schema);
            }
        }
        Value::Array(items) => items
            .iter_mut()
            .for_each(|item| fill(item, &schema["items"])),
        _ => {}
    }
}

#[test]
fn an_entry_says_what_follows_an_error_of_its_device() {
    let folder = Folder::new();
    let of = |more: &str| {
        let device = format!(r#""devices": [{{"group": "g"{more}}}]"#);
        folder.load(&file(&device)).unwrap().devices[0].on_error
    };
    assert_eq!(of(""), OnError::Report);
    assert_eq!(of(r#", "on_error": "unplug""#), OnError::Unplug);
    assert_eq!(of(r#", "on_error": "stop""#), OnError::Stop);
}

#[test]
fn slots_are_there_where_they_are_asked_for() {
    let folder = Folder::new();
    let hotplug = |members: &str| folder.load(&file(members)).unwrap().hotplug;
    assert_eq!(hotplug("\"memory\": {\"size\": \"64M\"}").slots, 0);
    assert_eq!(hotplug("\"hotplug\": {}").slots, super::SLOTS);
    let whole = hotplug("\"hotplug\": {\"slots\": 4, \"groups\": [\"gpu\"], \"window\": \"128G\"}");
    assert_eq!((whole.slots, whole.window), (4, Some(128 << 30)));
    assert_eq!(
        whole.from,
        [gantry_resources::pools::DeviceSource::Group(
            "gpu".to_owned()
        )]
    );
    for (members, words) in [
        ("\"slots\": 97", "97 is too many: at most 96"),
        ("\"window\": \"3G\"", "power of two"),
        ("\"window\": 4096", "1 MiB or more"),
        ("\"group\": \"gpu\"", "groups"),
    ] {
        let said = folder.refusal(&file(&format!("\"hotplug\": {{{members}}}")));
        assert!(said.contains("`hotplug.") && said.contains(words), "{said}");
    }
    let text = r#"{"payload": {"kernel": "vmlinux"}}"#;
    std::fs::write(folder.path("vm.json"), text).unwrap();
    let extras = LoadOptions {
        slots: 32,
        ..LoadOptions::default()
    };
    let config = load(&Source::File(folder.path("vm.json")), &extras).unwrap();
    assert_eq!(config.hotplug.slots, 32);
}

#[test]
fn disks_that_are_attached_later_come_from_where_the_file_says() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("images")).unwrap();
    let named = |disks: &str| {
        file(&format!(
            "\"hotplug\": {{\"slots\": 1, \"disks\": {disks}}}"
        ))
    };
    let later = folder.load(&named("[\"images\"]")).unwrap().hotplug.disks;
    assert_eq!(later, [folder.path("images")]);
    assert!(
        folder
            .load(&file("\"hotplug\": {}"))
            .unwrap()
            .hotplug
            .disks
            .is_empty()
    );
    let said = folder.refusal(&named("[\"images\", \"none\"]"));
    assert!(said.contains("`hotplug.disks[1]`"), "{said}");
    let kept = gantry_vmm::Folders {
        payload: folder.path("images"),
        output: None,
    };
    let attach =
        |body: &str, folders| super::attach_disk(body, folders).map_err(|error| error.to_string());
    let Ok(gantry_vmm::command::Attach::Disk { id: None, disk }) = attach(
        r#"{"path": "a", "readonly": true, "direct": true}"#,
        Some(&kept),
    ) else {
        panic!("it is a disk");
    };
    assert_eq!(disk.path, folder.path("images/a"));
    assert!(disk.direct && disk.io_uring);
    for (body, words) in [
        (r#"{"path": "a"}"#, "`path`: clients of this socket"),
        (r#"{"readonly": true}"#, "`path`"),
        (
            r#"{"path": "a", "readonly": true, "queue_size": 3}"#,
            "`queue_size`",
        ),
        (
            r#"{"path": "a", "readonly": true, "iommu": true}"#,
            "`iommu`",
        ),
        (r#"{"path": "a", "readonly": true, "id": "a/b"}"#, "`id`"),
        (r#"{"path": "a", "size": 3}"#, "unknown key `size`"),
    ] {
        let said = attach(body, Some(&kept)).unwrap_err();
        assert!(said.contains(words), "{body}: {said}");
    }
}

#[test]
fn a_rom_file_is_found_beside_the_file_and_named_where_it_is_not_there() {
    let folder = Folder::new();
    std::fs::write(folder.path("gpu.rom"), [0x55, 0xaa]).unwrap();
    let file = |rom: &str| {
        let devices = format!(r#"[{{"group": "g", "rom": {rom}}}]"#);
        format!(r#"{{"payload": {{"kernel": "vmlinux"}}, "devices": {devices}}}"#)
    };
    let rom = |rom: &str| folder.load(&file(rom)).unwrap().devices[0].rom.clone();
    assert_eq!(rom("\"gpu.rom\""), RomSource::File(folder.path("gpu.rom")));
    assert_eq!(
        (rom("false"), rom("true")),
        (RomSource::None, RomSource::Device)
    );
    let text = file("false").replace(
        "\"devices\"",
        "\"hotplug\": {\"roms\": [\"gpu.rom\"]}, \"devices\"",
    );
    let later = folder.load(&text).unwrap().hotplug.roms;
    assert_eq!(later, [folder.path("gpu.rom")]);
    let said = folder.refusal(&text.replace("gpu.rom", "none.rom"));
    assert!(said.contains("`hotplug.roms[0]`"), "{said}");
    for wrong in ["\"none.rom\"", "\".\"", "7"] {
        let said = folder.refusal(&file(wrong));
        assert!(said.contains("`devices[0].rom`"), "{said}");
    }
}

#[test]
fn clients_that_are_kept_to_folders_name_no_file_elsewhere() {
    let folder = Folder::new();
    for dir in ["kernels", "logs"] {
        std::fs::create_dir(folder.path(dir)).unwrap();
    }
    std::fs::write(folder.path("kernels/vmlinuz"), "x").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", folder.path("kernels/link")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", folder.path("logs/link")).unwrap();
    let kept = |kernel: &str, members: &str, output: Option<&str>| {
        let extras = LoadOptions {
            folders: Some(gantry_vmm::Folders {
                payload: folder.path("kernels"),
                output: output.map(|dir| folder.path(dir)),
            }),
            ..LoadOptions::default()
        };
        let text = format!(r#"{{"payload": {{"kernel": "{kernel}"}}{members}}}"#);
        let written = super::SourceText {
            text: &text,
            file: "the body",
            folder: Path::new(""),
        };
        super::parse(&written, "web", &extras).map_err(|error| error.to_string())
    };
    let log = |file: &str| format!(r#", "serial": {{"mode": "File", "file": "{file}"}}"#);
    let vm = kept("vmlinuz", &log("new.log"), Some("logs")).unwrap();
    assert_eq!(vm.payload.kernel, folder.path("kernels/vmlinuz"));
    assert_eq!(vm.serial, SerialMode::File(folder.path("logs/new.log")));
    let inside = folder.path("kernels/vmlinuz");
    kept(inside.to_str().unwrap(), "", None).unwrap();
    for outside in ["/etc/passwd", "link", "../vmlinux"] {
        let said = kept(outside, "", None).unwrap_err();
        assert!(
            said.contains("`payload.kernel`") && said.contains("it is not in"),
            "{said}"
        );
    }
    for outside in ["/etc/passwd", "link", "../new.log"] {
        let said = kept("vmlinuz", &log(outside), Some("logs")).unwrap_err();
        assert!(
            said.contains("`serial.file`") && said.contains("it is not in"),
            "{said}"
        );
    }
    let said = kept("vmlinuz", &log("new.log"), None).unwrap_err();
    assert!(said.contains("may name no file to write to"), "{said}");
    for (key, value) in [("vsock", r#"{"cid": 3}"#), ("net", "[{}]")] {
        let said = kept("vmlinuz", &format!(r#", "{key}": {value}"#), None).unwrap_err();
        assert!(said.contains(&format!("`{key}`")), "{said}");
        assert!(
            said.contains("clients of this socket may have no"),
            "{said}"
        );
    }
}

#[test]
fn a_relative_path_starts_at_the_file() {
    let folder = Folder::new();
    let config = folder
        .load(r#"{"payload": {"kernel": "./vmlinux"}}"#)
        .unwrap();
    assert!(config.payload.kernel.starts_with(folder.0.path()));
    assert_eq!(super::stem(Path::new("/a/web-1.vm.json")), "web-1.vm");
}

#[test]
fn a_plan_says_what_the_file_does_not() {
    let folder = Folder::new();
    std::fs::create_dir_all(folder.path("etc")).unwrap();
    let plans = r#"{"plans": [
        {"name": "gpu2", "vcpus": 4, "memory": "1GiB", "devices": [{"group": "gpus", "count": 2}],
         "pci_passthrough:alias": "qat-vf:1"},
        {"name": "odd", "memory": "1000"}]}"#;
    std::fs::write(folder.path("etc/plans.json"), plans).unwrap();
    let loaded = |members: &str| {
        std::fs::write(folder.path("vm.json"), file(members)).unwrap();
        let extras = LoadOptions {
            host: gantry_resources::base::HostPaths::under(folder.0.path()),
            ..LoadOptions::default()
        };
        load(&Source::File(folder.path("vm.json")), &extras)
    };
    let planned = vec![
        DeviceRequest::group("gpus", 2),
        DeviceRequest::alias("qat-vf", 1),
    ];
    let own = vec![DeviceRequest::group("disks", 1)];
    for (members, vcpus, mib, devices) in [
        (r#""plan": "gpu2""#, 4, 1024, &planned),
        (
            r#""plan": "gpu2", "cpus": {"boot_vcpus": 2}"#,
            2,
            1024,
            &planned,
        ),
        (
            r#""plan": "gpu2", "memory": {"size": "2G"}"#,
            4,
            2048,
            &planned,
        ),
        (
            r#""plan": "gpu2", "devices": [{"group": "disks"}]"#,
            4,
            1024,
            &own,
        ),
        (r#""plan": "gpu2", "devices": []"#, 4, 1024, &Vec::new()),
    ] {
        let config = loaded(members).unwrap();
        assert_eq!(u64::from(config.vcpus.get()), vcpus, "{members}");
        assert_eq!(config.memory.bytes(), mib << 20, "{members}");
        assert_eq!(&config.devices, devices, "{members}");
    }
    for (members, said) in [
        (
            r#""plan": "gpu""#,
            "2:9: `plan`: there is no plan \"gpu\": did you mean \"gpu2\"?",
        ),
        (r#""plan": "odd""#, "`plan`: plan \"odd\" in "),
    ] {
        let error = loaded(members).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}
