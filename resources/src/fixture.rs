//! A host made of files: a sysfs tree in a temporary directory.

pub(crate) mod hosts;
mod kernel;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::allocation::{AllocateError, Lease, Recipient, allocate_with};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::holding::record::Holder;
use crate::inventory::device::HostDevice;
use crate::inventory::scan::scan;
use crate::making::demand::Binder;
use crate::making::sriov::HostAccess;
use crate::pools::request::{DeviceRequest, Placement};

pub(crate) use kernel::{FakeKernel, Fault, hung};

pub(crate) fn bdf(text: &str) -> HostBdf {
    text.parse().unwrap()
}

/// A VM that leases devices.
pub(crate) fn vm(name: &str) -> Holder {
    Holder {
        vm: name.to_owned(),
        pid: 123,
    }
}

/// Leases devices for VM "a", with a helper that gives nothing back.
pub(crate) fn lease(
    host: &FakeHost,
    access: HostAccess<'_>,
    requests: &[DeviceRequest],
) -> Result<Vec<Lease>, AllocateError> {
    let binder = Binder {
        host: access,
        helper: "/bin/true".as_ref(),
    };
    lease_with(host, &binder, requests)
}

/// Leases devices for VM "a" of this process, which may see how it moves them.
pub(crate) fn lease_with(
    host: &FakeHost,
    binder: &Binder<'_>,
    requests: &[DeviceRequest],
) -> Result<Vec<Lease>, AllocateError> {
    let holder = Holder {
        pid: std::process::id(),
        ..vm("a")
    };
    let near = Placement::default();
    let vm = Recipient::new(&holder, &near);
    allocate_with(&host.paths, requests, vm, binder)
}

/// A request for one device, whether it is in a group or not.
pub(crate) fn ungrouped(name: impl Into<DeviceName>) -> DeviceRequest {
    DeviceRequest {
        allow_ungrouped: true,
        ..DeviceRequest::device(name)
    }
}

/// What a device of the fake host is like.
#[derive(Clone, Debug)]
pub(crate) struct Fake {
    pub(crate) bdf: HostBdf,
    pub(crate) id: (u16, u16),
    pub(crate) class: u32,
    pub(crate) driver: Option<String>,
    pub(crate) group: Option<u32>,
    pub(crate) attributes: Vec<(String, String)>,
    /// Whether it has INTx, MSI and MSI-X.
    pub(crate) interrupts: bool,
}

impl Fake {
    /// An NVMe controller with vfio-pci.
    pub(crate) fn nvme(address: &str, group: u32) -> Self {
        Self {
            bdf: bdf(address),
            id: (0x1b36, 0x0010),
            class: 0x01_08_02,
            driver: Some("vfio-pci".to_owned()),
            group: Some(group),
            attributes: Vec::new(),
            interrupts: true,
        }
    }

    pub(crate) fn without_interrupts(self) -> Self {
        Self {
            interrupts: false,
            ..self
        }
    }

    pub(crate) fn class(self, class: u32) -> Self {
        Self { class, ..self }
    }

    pub(crate) fn driver(self, driver: &str) -> Self {
        Self {
            driver: Some(driver.to_owned()),
            ..self
        }
    }

    pub(crate) fn unbound(self) -> Self {
        Self {
            driver: None,
            ..self
        }
    }

    pub(crate) fn no_group(self) -> Self {
        Self {
            group: None,
            ..self
        }
    }

    /// One more file of the device's directory.
    pub(crate) fn with(mut self, name: &str, content: &str) -> Self {
        self.attributes.push((name.to_owned(), content.to_owned()));
        self
    }
}

/// A configuration space, with an interrupt pin, MSI and MSI-X if it has `interrupts`.
fn config(interrupts: bool) -> [u8; 256] {
    let mut config = [0; 256];
    config[0x06] = 1 << 4;
    config[0x34] = if interrupts { 0x40 } else { 0 };
    config[0x3d] = u8::from(interrupts);
    config[0x40..0x42].copy_from_slice(&[0x05, 0x50]);
    config[0x50] = 0x11;
    config
}

/// What the kernel says of a device in one line.
pub(crate) fn modalias(id: (u16, u16), subsystem: (u16, u16), class: u32) -> String {
    let ((vendor, device), (subvendor, subdevice)) = (id, subsystem);
    let (base, sub, interface) = (class >> 16, class >> 8 & 0xff, class & 0xff);
    format!(
        "pci:v{vendor:08X}d{device:08X}sv{subvendor:08X}sd{subdevice:08X}\
         bc{base:02X}sc{sub:02X}i{interface:02X}"
    )
}

pub(crate) struct FakeHost {
    root: TempDir,
    pub(crate) paths: HostPaths,
}

impl FakeHost {
    pub(crate) fn new(devices: &[Fake]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let paths = HostPaths::under(root.path());
        for dir in [
            "sys/bus/pci/devices",
            "sys/bus/pci/drivers/vfio-pci",
            "sys/class/block",
            "sys/class/net",
            "proc",
        ] {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        let host = Self { root, paths };
        host.file("proc/self/mountinfo", "");
        devices.iter().for_each(|device| host.add(device));
        host
    }

    pub(crate) fn add(&self, device: &Fake) {
        let dir = self.dir(device.bdf);
        fs::create_dir_all(&dir).unwrap();
        let name = device.bdf.to_string();
        let put = |attribute: &str, text: String| {
            let path = dir.join(attribute);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text + "\n").unwrap();
        };
        put(
            "modalias",
            modalias(device.id, (0x1af4, 0x1100), device.class),
        );
        put("reset_method", "flr bus".to_owned());
        fs::write(dir.join("config"), config(device.interrupts)).unwrap();
        put("revision", "0x02".to_owned());
        put("numa_node", "-1".to_owned());
        put("driver_override", "(null)".to_owned());
        for (attribute, text) in &device.attributes {
            put(attribute, text.clone());
            if attribute.starts_with("mdev_supported_types") {
                fs::create_dir_all(self.paths.sysfs.join("class/mdev_bus")).unwrap();
            }
        }
        symlink(&dir, self.paths.sysfs.join("bus/pci/devices").join(&name)).unwrap();
        if let Some(group) = device.group {
            let target = self
                .paths
                .sysfs
                .join(format!("kernel/iommu_groups/{group}"));
            fs::create_dir_all(&target).unwrap();
            symlink(&target, dir.join("iommu_group")).unwrap();
        }
        self.bind(device.bdf, device.driver.as_deref());
    }

    /// Binds a device to a driver or to none, and keeps the VFIO node in step.
    pub(crate) fn bind(&self, bdf: HostBdf, driver: Option<&str>) {
        let dir = self.dir(bdf);
        let _ = fs::remove_file(dir.join("driver"));
        if let Some(driver) = driver {
            let target = self.paths.sysfs.join("bus/pci/drivers").join(driver);
            fs::create_dir_all(&target).unwrap();
            symlink(&target, dir.join("driver")).unwrap();
        }
        if let (Ok(group), Some("vfio-pci")) = (fs::read_link(dir.join("iommu_group")), driver) {
            let node = self.paths.dev.join("vfio").join(group.file_name().unwrap());
            fs::create_dir_all(node.parent().unwrap()).unwrap();
            fs::write(node, "").unwrap();
        }
    }

    pub(crate) fn remove(&self, bdf: HostBdf) {
        fs::remove_file(self.paths.pci_device(bdf)).unwrap();
        fs::remove_dir_all(self.dir(bdf)).unwrap();
    }

    /// The directory that the links in `bus/pci/devices` point to.
    pub(crate) fn dir(&self, bdf: HostBdf) -> PathBuf {
        self.paths
            .sysfs
            .join("devices/pci0000:00")
            .join(bdf.to_string())
    }

    /// Writes a file below the root, such as `etc/groups.json` or `proc/swaps`.
    pub(crate) fn file(&self, path: &str, content: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Writes the file of groups.
    pub(crate) fn groups(&self, json: &str) {
        self.file("etc/groups.json", json);
    }

    /// What makes mediated devices: a type with so much room.
    pub(crate) fn mdev_parent(&self, name: &str, kind: &str, title: &str, room: u32) {
        let dir = self.paths.sysfs.join("devices/virtual").join(name);
        let kind = dir.join("mdev_supported_types").join(kind);
        fs::create_dir_all(&kind).unwrap();
        fs::write(kind.join("available_instances"), format!("{room}\n")).unwrap();
        fs::write(kind.join("name"), format!("{title}\n")).unwrap();
        let class = self.paths.sysfs.join("class/mdev_bus");
        fs::create_dir_all(&class).unwrap();
        fs::create_dir_all(self.paths.sysfs.join("bus/mdev/devices")).unwrap();
        if !class.join(name).exists() {
            symlink(&dir, class.join(name)).unwrap();
        }
    }

    /// A directory of a device's subtree, with a link to it elsewhere in sysfs.
    pub(crate) fn child(&self, of: HostBdf, path: &str, link: &str) -> PathBuf {
        let dir = self.dir(of).join(path);
        fs::create_dir_all(&dir).unwrap();
        symlink(&dir, self.paths.sysfs.join(link)).unwrap();
        dir
    }

    pub(crate) fn scan(&self) -> Vec<HostDevice> {
        scan(&self.paths).unwrap()
    }

    /// Addresses of leased devices.
    pub(crate) fn held(&self) -> Vec<String> {
        let held = self.scan().into_iter().filter(|one| one.lease.is_held());
        held.map(|device| device.bdf.to_string()).collect()
    }

    pub(crate) fn read(&self, address: &str) -> HostDevice {
        HostDevice::read(&self.paths, bdf(address)).unwrap()
    }

    /// Driver and override of every device: what binding changes.
    pub(crate) fn bindings(&self) -> BTreeMap<HostBdf, (Option<String>, Option<String>)> {
        self.scan()
            .into_iter()
            .map(|device| (device.bdf, (device.driver, device.driver_override)))
            .collect()
    }
}
