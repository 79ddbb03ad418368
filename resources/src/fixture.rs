//! A host made of files: a sysfs tree in a temporary directory, and a kernel that binds its drivers.

pub(crate) mod hosts;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::inventory::device::HostDevice;
use crate::inventory::scan::scan;
use crate::making::sriov::{HostAccess, Interface, LinkError, LinkWrite, Pf, VfLinks};
use crate::moving::writer::{SysfsWrite, SysfsWriter, Unfinished, WriteError};
use crate::pools::vf_settings::{Mac, VfSetting, VfState};

pub(crate) fn bdf(text: &str) -> HostBdf {
    text.parse().unwrap()
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

/// The fault that a [`FakeKernel`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Refuses,
    Hangs,
    /// Takes the write and does nothing.
    Ignores,
    /// Asks to be told again, once: what writes sysfs has done so already when the write comes here.
    Again,
    /// Takes no write any more: as if the writing process had been killed.
    Dead,
}

/// Does to the fake host what the kernel does when a driver attribute is written.
pub(crate) struct FakeKernel<'a> {
    host: &'a FakeHost,
    /// Which driver claims a device by its ids.
    pub(crate) claims: BTreeMap<HostBdf, String>,
    /// The write, counted from 0, at which the fault shows, and the fault.
    pub(crate) fault: Option<(usize, Fault)>,
    pub(crate) written: RefCell<Vec<(PathBuf, String)>>,
    /// What virtual functions have: interface, number.
    pub(crate) functions: RefCell<BTreeMap<(u32, u16), VfState>>,
    stuck: Cell<Option<HostBdf>>,
    /// Takes no MAC address of zeroes, as some drivers do.
    pub(crate) wants_macs: Cell<bool>,
    /// What a write that hangs keeps open.
    pub(crate) kept: RefCell<Vec<File>>,
}

impl<'a> FakeKernel<'a> {
    /// Every device is claimed by the driver it has now.
    pub(crate) fn new(host: &'a FakeHost) -> Self {
        let drivers = host
            .scan()
            .into_iter()
            .filter_map(|device| Some((device.bdf, device.driver?)));
        Self {
            host,
            claims: drivers.collect(),
            fault: None,
            written: RefCell::default(),
            functions: RefCell::default(),
            stuck: Cell::new(None),
            wants_macs: Cell::new(false),
            kept: RefCell::default(),
        }
    }

    pub(crate) fn with_fault(self, at: usize, fault: Fault) -> Self {
        Self {
            fault: Some((at, fault)),
            ..self
        }
    }

    /// As what changes the host.
    pub(crate) fn access(&self) -> HostAccess<'_> {
        HostAccess {
            writer: self,
            links: self,
        }
    }

    /// The kernel is through with the write that hung.
    pub(crate) fn come_back(&self) {
        for file in self.kept.borrow_mut().drain(..) {
            // By name, as a child that another test is starting has a copy for a moment.
            crate::holding::lock_file::unlock(&file).unwrap();
        }
    }

    /// Notes a write and shows the fault that it meets.
    fn fault(&self, path: &Path, value: &str) -> Option<Fault> {
        let count = self.written.borrow().len();
        self.written
            .borrow_mut()
            .push((path.to_owned(), value.to_owned()));
        self.fault
            .filter(|(at, fault)| *at == count || (*fault == Fault::Dead && count > *at))
            .map(|(_, fault)| fault)
    }

    /// Makes a mediated device out of a type's room, as its driver does.
    fn make_mdev(&self, kind: &Path, uuid: &str) -> io::Result<()> {
        let room = kind.join("available_instances");
        let left: u32 = fs::read_to_string(&room)?.trim().parse().unwrap();
        let left = left.checked_sub(1);
        let left = left.ok_or_else(|| io::Error::from_raw_os_error(nix::libc::EUSERS))?;
        fs::write(&room, left.to_string())?;
        let kind = fs::canonicalize(kind)?;
        let dir = kind.parent().unwrap().parent().unwrap().join(uuid);
        fs::create_dir_all(&dir)?;
        symlink(&kind, dir.join("mdev_type"))?;
        let number = 200 + uuid.bytes().map(u32::from).sum::<u32>();
        let group = format!("kernel/iommu_groups/{number}");
        symlink(self.host.paths.sysfs.join(group), dir.join("iommu_group"))?;
        let node = self.host.paths.vfio_group(number);
        fs::create_dir_all(node.parent().unwrap())?;
        fs::write(node, "")?;
        let link = self.host.paths.sysfs.join("bus/mdev/devices").join(uuid);
        symlink(&dir, link)
    }

    fn remove_mdev(&self, dir: &Path) -> io::Result<()> {
        let room = dir.join("mdev_type/available_instances");
        let left: u32 = fs::read_to_string(&room)?.trim().parse().unwrap();
        fs::write(room, (left + 1).to_string())?;
        fs::remove_dir_all(fs::canonicalize(dir)?)?;
        fs::remove_file(dir)
    }

    /// Makes or destroys virtual functions, as a driver does: it knows no other change.
    fn resize(&self, pf: HostBdf, value: &str) -> io::Result<()> {
        let wanted: u16 = value.parse().map_err(io::Error::other)?;
        let now = Pf::read(&self.host.paths, pf).unwrap();
        if wanted != 0 && !now.vfs.is_empty() {
            return Err(io::Error::from_raw_os_error(nix::libc::EBUSY));
        }
        let dir = self.host.dir(pf);
        for (index, vf) in now.vfs.iter().enumerate() {
            fs::remove_file(dir.join(format!("virtfn{index}")))?;
            self.host.remove(*vf);
        }
        self.functions.borrow_mut().clear();
        for index in 0..wanted {
            let vf = now.address(index).unwrap();
            let fake = Fake {
                id: (0x8086, 0x10ca),
                ..Fake::nvme(&vf.to_string(), 100 + u32::from(index))
            };
            self.host.add(&fake.class(0x02_00_00).unbound());
            let there = self.host.dir(vf);
            symlink(&dir, there.join("physfn"))?;
            symlink(&there, dir.join(format!("virtfn{index}")))?;
            if now.autoprobe == Some(true) {
                self.host.bind(vf, Some("igbvf"));
            }
        }
        fs::write(dir.join("sriov_numvfs"), format!("{wanted}\n"))
    }

    fn obey(&self, path: &Path, value: &str) -> io::Result<()> {
        let refused = || io::Error::from_raw_os_error(nix::libc::ENODEV);
        match path.file_name().and_then(|name| name.to_str()) {
            Some("driver_override") => fs::write(
                path,
                if value == "\n" {
                    "(null)\n".to_owned()
                } else {
                    format!("{value}\n")
                },
            ),
            Some("unbind") => {
                let bdf = value.parse().map_err(|_| refused())?;
                assert_eq!(path.parent().unwrap().file_name().unwrap(), "driver");
                if self.host.read(value).driver.is_none() {
                    return Err(refused());
                }
                self.host.bind(bdf, None);
                Ok(())
            }
            Some("drivers_probe") => {
                let device = self.host.read(value);
                if device.driver.is_none() {
                    let own = self.host.dir(device.bdf).join("driver_override");
                    let own = fs::read_to_string(own).map(|text| text.trim().to_owned());
                    let claim = own
                        .ok()
                        .filter(|name| name != "(null)")
                        .or_else(|| self.claims.get(&device.bdf).cloned());
                    let loaded = |name: &String| {
                        self.host
                            .paths
                            .sysfs
                            .join("bus/pci/drivers")
                            .join(name)
                            .exists()
                    };
                    self.host.bind(device.bdf, claim.filter(loaded).as_deref());
                }
                Ok(())
            }
            Some("create") => self.make_mdev(path.parent().unwrap(), value),
            Some("remove") => self.remove_mdev(path.parent().unwrap()),
            Some("current_vgpu_type") => fs::write(path, format!("{value}\n")),
            Some("sriov_drivers_autoprobe") => fs::write(path, format!("{value}\n")),
            Some("sriov_numvfs") => {
                let pf = HostBdf::from_sysfs_path(path.parent().unwrap());
                self.resize(pf.map_err(|_| refused())?, value)
            }
            _ => panic!("nothing should write {}", path.display()),
        }
    }
}

/// The kernel does not come back from a write.
pub(crate) fn hung(path: &Path, value: &str) -> WriteError {
    let (path, value) = (path.to_owned(), value.to_owned());
    WriteError::Hung(Box::new(Unfinished {
        write: SysfsWrite { path, value },
        after: Duration::from_secs(30),
        by: String::new(),
    }))
}

impl SysfsWriter for FakeKernel<'_> {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        let about = value
            .parse()
            .or_else(|_| HostBdf::from_sysfs_path(path.parent().unwrap()))
            .ok();
        assert!(
            about.is_none() || self.stuck.get() != about,
            "{value} was written to a device that hangs"
        );
        let (path_buf, text) = (path.to_owned(), value.to_owned());
        let refused = |source| WriteError::Refused {
            path: path_buf.clone(),
            value: text.clone(),
            source,
        };
        match self.fault(path, value) {
            Some(Fault::Refuses | Fault::Dead) => {
                Err(refused(io::Error::from_raw_os_error(nix::libc::EIO)))
            }
            Some(Fault::Hangs) => {
                self.stuck.set(about);
                Err(hung(path, value))
            }
            Some(Fault::Ignores) => Ok(()),
            Some(Fault::Again) | None => self.obey(path, value).map_err(refused),
        }
    }
    fn write_keeping(&self, path: &Path, value: &str, kept: &File) -> Result<(), WriteError> {
        let written = self.write(path, value);
        if matches!(written, Err(WriteError::Hung { .. })) {
            self.kept.borrow_mut().push(kept.try_clone().unwrap());
        }
        written
    }
}

impl VfLinks for FakeKernel<'_> {
    fn read(&self, interface: &Interface) -> Result<BTreeMap<u16, VfState>, LinkError> {
        let known = self.functions.borrow();
        let all = self.host.scan().into_iter();
        let pfs = all.filter_map(|device| Pf::read(&self.host.paths, device.bdf).ok());
        let pf = pfs
            .into_iter()
            .find(|pf| pf.interface.as_ref() == Some(interface));
        let count = pf.map_or(0, |pf| pf.vfs.len() as u16);
        let fresh = || {
            serde_json::from_str(
                r#"{"mac": "00:00:00:00:00:00", "vlan": 0, "qos": 0, "spoof_check": true,
                    "trust": false, "min_rate": 0, "max_rate": 0, "link_state": "auto"}"#,
            )
        };
        let state = |vf| known.get(&(interface.index, vf)).cloned();
        Ok((0..count)
            .map(|vf| (vf, state(vf).unwrap_or_else(|| fresh().unwrap())))
            .collect())
    }

    fn set(&self, write: &LinkWrite) -> Result<(), LinkError> {
        let refused = |errno| LinkError::Refused {
            write: write.clone(),
            source: io::Error::from_raw_os_error(errno),
        };
        match self.fault(Path::new(&write.interface.name), &write.to_string()) {
            Some(Fault::Ignores) => return Ok(()),
            Some(Fault::Again) => return Err(refused(nix::libc::EAGAIN)),
            Some(_) => return Err(refused(nix::libc::EOPNOTSUPP)),
            None => {}
        }
        if self.wants_macs.get() && write.setting == VfSetting::Mac(Mac([0; 6])) {
            return Err(refused(nix::libc::EINVAL));
        }
        let mut state = self.read(&write.interface)?.remove(&write.vf);
        let state = state.as_mut().ok_or_else(|| refused(nix::libc::EINVAL))?;
        match write.setting {
            VfSetting::Mac(mac) => state.mac = Some(mac),
            VfSetting::Vlan { vlan, qos } => (state.vlan, state.qos) = (Some(vlan), Some(qos)),
            VfSetting::SpoofCheck(on) => state.spoof_check = Some(on),
            VfSetting::Trust(on) => state.trust = Some(on),
            VfSetting::Rate { min, max } => {
                (state.min_rate, state.max_rate) = (Some(min), Some(max));
            }
            VfSetting::LinkState(link) => state.link_state = Some(link),
        }
        let key = (write.interface.index, write.vf);
        self.functions.borrow_mut().insert(key, state.clone());
        Ok(())
    }
}
