//! The PCI functions of the host, read when they are asked for.
//!
//! This joins the facts of a function with its holder, its quarantine and its driver record.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::facts::attributes::{Attributes, Identity};
use crate::facts::dsn;
use crate::facts::ids::{PciClass, PciId};
use crate::facts::interrupts::Interrupts;
use crate::facts::no_reset::NoReset;
use crate::facts::nvme;
use crate::facts::vfio::{VfioBackEnd, cdev};
use crate::facts::vgpu::{NVIDIA, VendorVgpu};
use crate::holding::lock_file::holder;
use crate::holding::quarantine::{self, Until};
use crate::holding::record::{LeaseKind, LeaseStatus};
use crate::holding::restore::Change;
use crate::inventory::device::{HostDevice, NodeAccess, Sriov};
use crate::inventory::driver_record::DriverRecord;
use crate::inventory::error::InventoryError;

/// The base class of displays: only for these the kernel shows whether the firmware started them.
const DISPLAY: u8 = 0x03;

/// How much of a device is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detail {
    /// Everything. Reading a serial number touches the hardware: it wakes a sleeping device and waits for one
    /// that is being reset. Reading an override waits for a process that moves the device.
    Full,
    /// The facts for a choice of devices: all but serial numbers, overrides and revisions.
    ForChoice,
}

/// Every PCI function of the host, in the order of their addresses.
///
/// A device that disappears during the scan is left out.
pub fn scan(paths: &HostPaths) -> Result<Vec<HostDevice>, InventoryError> {
    scan_with(paths, Detail::Full)
}

pub(crate) fn scan_with(
    paths: &HostPaths,
    detail: Detail,
) -> Result<Vec<HostDevice>, InventoryError> {
    let source = Source::open(paths, detail)?;
    let listing = std::fs::read_dir(&source.dir).map_err(source.unreadable())?;
    let mut addresses = Vec::new();
    for entry in listing {
        let name = entry.map_err(source.unreadable())?.file_name();
        if let Some(bdf) = name.to_str().and_then(|name| name.parse::<HostBdf>().ok()) {
            addresses.push(bdf);
        }
    }
    addresses.retain(|bdf| paths.shows(*bdf));
    addresses.sort();
    let mut devices = Vec::with_capacity(addresses.len());
    for bdf in addresses {
        let device = source.read(bdf, &devices)?;
        devices.extend(device);
    }
    Ok(devices)
}

impl HostDevice {
    /// Reads one device.
    pub fn read(paths: &HostPaths, bdf: HostBdf) -> Result<Self, InventoryError> {
        let source = Source::open(paths, Detail::Full)?;
        let device = source.read(bdf, &[])?;
        let mut device = device.ok_or(InventoryError::NoSuchDevice { bdf })?;
        device.lead = source.read_lead(&device)?.map(Arc::new);
        Ok(device)
    }
}

impl From<&HostDevice> for Identity {
    fn from(device: &HostDevice) -> Self {
        Self {
            id: device.id,
            subsystem: device.subsystem,
            class: device.class,
        }
    }
}

/// What devices are read from.
struct Source<'a> {
    paths: &'a HostPaths,
    detail: Detail,
    /// The directory of all devices.
    dir: PathBuf,
    devices: File,
    leases: Listed,
    quarantine: Vec<Listed>,
    former: Listed,
    no_reset: NoReset,
    /// Whether any device can create mediated devices.
    mdev: bool,
}

/// Names of the files of a directory, so that no missing file is opened; none if they cannot be listed: then every
/// file is tried.
struct Listed(Option<BTreeSet<String>>);

impl Listed {
    fn of(dir: &Path) -> Self {
        Self::all(sysfs::entries(dir).ok())
    }

    fn all(names: Option<Vec<String>>) -> Self {
        Self(names.map(|names| names.into_iter().collect()))
    }

    fn may_have(&self, name: impl FnOnce() -> String) -> bool {
        match &self.0 {
            Some(names) => !names.is_empty() && names.contains(&name()),
            None => true,
        }
    }
}

impl<'a> Source<'a> {
    fn open(paths: &'a HostPaths, detail: Detail) -> Result<Self, InventoryError> {
        let dir = paths.sysfs.join("bus/pci/devices");
        let devices = File::open(&dir).map_err(|source| InventoryError::Sysfs {
            path: dir.clone(),
            source,
        })?;
        Ok(Self {
            paths,
            detail,
            dir,
            devices,
            leases: Listed::of(&paths.run.join("leases")),
            quarantine: quarantine::record_dirs(paths)
                .iter()
                .map(|dir| Listed::all(dir.names()))
                .collect(),
            former: Listed::of(&Change::Driver.dir(paths)),
            no_reset: NoReset::load(paths)?,
            mdev: paths.sysfs.join("class/mdev_bus").exists(),
        })
    }

    fn unreadable(&self) -> impl FnOnce(io::Error) -> InventoryError + use<> {
        let path = self.dir.clone();
        |source| InventoryError::Sysfs { path, source }
    }

    /// Reads a device; none if it does not exist. `before` are the devices of lower addresses, as far as they
    /// were read.
    fn read(
        &self,
        bdf: HostBdf,
        before: &[HostDevice],
    ) -> Result<Option<HostDevice>, InventoryError> {
        let paths = self.paths;
        let unreadable = |source| InventoryError::Sysfs {
            path: paths.pci_device(bdf),
            source,
        };
        let attributes = Attributes::open(&self.devices, bdf).map_err(unreadable)?;
        let Some(attributes) = attributes.filter(|_| paths.shows(bdf)) else {
            return Ok(None);
        };
        let Some(mut device) = facts(&attributes, bdf, before, self.mdev).map_err(unreadable)?
        else {
            return Ok(None);
        };
        self.read_resets(&mut device, &attributes, before)
            .map_err(unreadable)?;
        device.on_root_bus = device.physfn.is_none()
            && Attributes::is_on_root_bus(&self.devices, bdf).map_err(unreadable)?;
        let leased = self.leases.may_have(|| format!("{bdf}.lock"));
        if leased {
            device.lease = holder(paths, bdf);
        }
        device.lead = lead_of(&device, before);
        let mut hung = false;
        let aside = |one: &Listed| {
            quarantine::names(bdf)
                .into_iter()
                .any(|name| one.may_have(|| name))
        };
        if leased || self.quarantine.iter().any(aside) {
            let found = quarantine::find(paths, bdf, device.id);
            hung = found
                .as_ref()
                .is_some_and(|found| found.until == Until::Boot);
            device.quarantine = found.map(|found| found.reason());
        }
        if device.physfn.is_some() && device.id.vendor == NVIDIA {
            device.vgpu = VendorVgpu::read(&paths.pci_device(bdf));
        }
        let busy = device.lease.is_held() || device.quarantine.is_some();
        let wanted = self.detail == Detail::Full || !busy;
        if wanted && !hung && !device.is_bridge() {
            device.interrupts = match sibling(before, device.physfn) {
                Some(like) if like.interrupts.is_some() => like.interrupts,
                _ => Interrupts::read(&paths.pci_device(bdf).join("config")),
            };
        }
        device.node = device
            .iommu_group
            .filter(|_| device.on_vfio())
            .map(|group| node_access(paths, group, bdf));
        if self.detail == Detail::Full {
            if !hung && !moves_elsewhere(&device) {
                let name = attributes.text("driver_override").map_err(unreadable)?;
                device.driver_override = name.filter(|name| !name.is_empty() && name != "(null)");
            }
            device.revision = match sibling(before, device.physfn) {
                Some(like) => like.revision,
                None => attributes.hex_byte("revision").map_err(unreadable)?,
            };
            self.read_serials(&mut device);
        }
        if self.former.may_have(|| bdf.to_string()) {
            device.former_driver = DriverRecord::driver_of(paths, &device);
        }
        Ok(Some(device))
    }

    /// The first function of a device's card, read for that alone; none if it is the device itself.
    fn read_lead(&self, device: &HostDevice) -> Result<Option<HostDevice>, InventoryError> {
        if !device.may_share_card() {
            return Ok(None);
        }
        let bdf = device.bdf;
        for function in 0..bdf.function() {
            let first = HostBdf::new(bdf.domain(), bdf.bus(), bdf.device(), function);
            let first = first.map(|first| self.read(first, &[])).transpose()?;
            if let Some(first) = first.flatten().filter(|first| first.shares_card(device)) {
                return Ok(Some(first));
            }
        }
        Ok(None)
    }

    /// A virtual function is reset like its siblings. It may be reset even if its card may not.
    fn read_resets(
        &self,
        device: &mut HostDevice,
        attributes: &Attributes,
        before: &[HostDevice],
    ) -> io::Result<()> {
        device.reset_methods = match sibling(before, device.physfn) {
            Some(like) => like.reset_methods.clone(),
            None => reset_methods(attributes)?,
        };
        if device.physfn.is_none() {
            device.must_not_reset = self.no_reset.reason(device.id, device.subsystem);
        }
        Ok(())
    }

    fn read_serials(&self, device: &mut HostDevice) {
        let dir = self.paths.pci_device(device.bdf);
        // A virtual function has the serial number of its physical function, or none.
        if device.physfn.is_none() {
            device.dsn = dsn::read(&dir.join("config"));
        }
        if device.is_nvme() {
            (device.serial, device.nvme) = nvme::read(&dir);
        }
        if device.serial.is_none() && self.former.may_have(|| device.bdf.to_string()) {
            let former = DriverRecord::of_detached(self.paths, device);
            let known = former.map(|former| (former.serial, former.nvme));
            (device.serial, device.nvme) = known.unwrap_or_default();
        }
    }
}

/// The first function of a device's card among those of lower addresses; none if that is the device itself.
fn lead_of(device: &HostDevice, before: &[HostDevice]) -> Option<Arc<HostDevice>> {
    let near = before.iter().rev();
    let mut near = near.take_while(|other| other.bdf.is_in_slot_of(device.bdf));
    let other = near.find(|other| other.shares_card(device))?;
    let lead = other.lead.clone();
    lead.or_else(|| Some(Arc::new(other.clone())))
}

/// The methods by which the kernel can reset a function. The attribute exists only if there are any; before Linux
/// 5.15 it does not name them.
fn reset_methods(attributes: &Attributes) -> io::Result<Vec<String>> {
    if let Some(methods) = attributes.text("reset_method")? {
        return Ok(methods.split_whitespace().map(str::to_owned).collect());
    }
    let has = attributes.has("reset")?;
    Ok(has.then(|| "unnamed".to_owned()).into_iter().collect())
}

/// Whether another process moves a device between drivers. It then holds the device's lock in the kernel, for which
/// a read of the override waits, possibly for ever.
fn moves_elsewhere(device: &HostDevice) -> bool {
    let own = [std::process::id(), parent_id()];
    match device.lease.record() {
        // The helper of a VM moves devices for it.
        Some(record) if record.pid.is_some_and(|pid| own.contains(&pid.get())) => false,
        Some(record) => record.kind == LeaseKind::Task || !device.on_vfio(),
        None => false,
    }
}

/// Whether this user can open a device: by its group's node, or by its cdev if VMs use iommufd, or if the user was
/// given only that.
fn node_access(paths: &HostPaths, group: u32, bdf: HostBdf) -> NodeAccess {
    let of_cdev = || cdev(paths, bdf.into()).map_or(NodeAccess::Missing, |node| of_node(&node));
    if VfioBackEnd::of_host(paths) == VfioBackEnd::Iommufd {
        return of_cdev();
    }
    match of_node(&paths.vfio_group(group)) {
        NodeAccess::Ready => NodeAccess::Ready,
        _ if of_cdev() == NodeAccess::Ready => NodeAccess::Ready,
        of_group => of_group,
    }
}

fn of_node(node: &Path) -> NodeAccess {
    match access(node, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) => NodeAccess::Ready,
        Err(Errno::ENOENT | Errno::ENOTDIR) => NodeAccess::Missing,
        Err(_) => NodeAccess::Denied,
    }
}

/// The facts of a device that cost nothing to read, without serial numbers, VFIO node and lease; none if it does
/// not exist.
fn facts(
    attributes: &Attributes,
    bdf: HostBdf,
    before: &[HostDevice],
    mdev: bool,
) -> io::Result<Option<HostDevice>> {
    let physfn = attributes
        .link("physfn")?
        .and_then(|name| name.parse().ok());
    let mut device = HostDevice {
        bdf,
        id: PciId {
            vendor: 0,
            device: 0,
        },
        subsystem: None,
        class: PciClass::new(0),
        revision: None,
        driver: attributes.link("driver")?,
        former_driver: None,
        driver_override: None,
        iommu_group: attributes
            .link("iommu_group")?
            .and_then(|name| name.parse().ok()),
        // A virtual function has the NUMA node of its physical function.
        numa_node: match physfn.and_then(|pf| found(before, pf)) {
            Some(card) => card.numa_node,
            None => attributes.decimal("numa_node")?,
        },
        sriov: match physfn {
            Some(_) => None,
            None => sriov(attributes)?,
        },
        physfn,
        serial: None,
        nvme: None,
        dsn: None,
        interrupts: None,
        reset_methods: Vec::new(),
        must_not_reset: None,
        on_root_bus: false,
        lead: None,
        boot_vga: false,
        mdev_types: Vec::new(),
        vgpu: None,
        node: None,
        lease: LeaseStatus::Free,
        quarantine: None,
    };
    // Read last, as every device has it: attributes of a device that disappeared in between would be read as
    // missing.
    let told = match sibling(before, physfn) {
        // The device still exists.
        Some(like) => attributes.link("physfn")?.map(|_| like.into()),
        None => attributes.identity()?,
    };
    let Some(Identity {
        id,
        subsystem,
        class,
    }) = told
    else {
        return Ok(None);
    };
    (device.id, device.subsystem, device.class) = (id, subsystem, class);
    if class.base() == DISPLAY {
        device.boot_vga = attributes.text("boot_vga")?.as_deref() == Some("1");
    }
    if mdev {
        device.mdev_types = attributes.entries("mdev_supported_types")?;
    }
    Ok(Some(device))
}

/// The virtual function before it, of the same physical function. The kernel reads the identity of the first one,
/// and assumes it for the others (pci_setup_device).
fn sibling(before: &[HostDevice], physfn: Option<HostBdf>) -> Option<&HostDevice> {
    let last = before.last().filter(|_| physfn.is_some());
    last.filter(|one| one.physfn == physfn)
}

fn found(sorted: &[HostDevice], bdf: HostBdf) -> Option<&HostDevice> {
    let index = sorted.binary_search_by_key(&bdf, |device| device.bdf);
    sorted.get(index.ok()?)
}

fn sriov(attributes: &Attributes) -> io::Result<Option<Sriov>> {
    let Some(total) = attributes.decimal("sriov_totalvfs")? else {
        return Ok(None);
    };
    let active = attributes.decimal("sriov_numvfs")?.unwrap_or(0);
    Ok(Some(Sriov { total, active }))
}

#[cfg(test)]
mod tests;
