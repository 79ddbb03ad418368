//! The facts of the check, read once and without changing anything.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, eaccess};

use super::CheckError;
use super::boot::Boot;
use super::cmdline::{CommandLine, is_yes};
use super::cpu::Cpu;
use super::iommu::Iommu;
use super::memory::Memory;
use super::modprobe::{Modprobe, Modules};
use super::vgpu::HungVgpu;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::facts::reserved::{ReservedRegion, reserved_regions};
use crate::facts::vfio::{VfioBackEnd, makes_cdevs};
use crate::holding::maintenance::maintenance;
use crate::inventory::device::{HostDevice, NodeAccess};
use crate::inventory::error::InventoryError;
use crate::inventory::guard::{Guarded, host_uses};
use crate::inventory::modules::loaded_module;
use crate::inventory::scan::{Detail, scan_with};
use crate::pools::group::Groups;

/// The host as the check sees it.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) cmdline: CommandLine,
    /// The kernel's release, such as `6.1.0-32-amd64`.
    pub(super) release: String,
    pub(super) config: KernelConfig,
    /// Vendor and product of the machine, as its firmware says (DMI).
    pub(super) machine: Option<String>,
    /// Name of the user who runs the check, if known.
    pub(super) user: String,
    pub(super) cpu: Cpu,
    pub(super) kvm: NodeAccess,
    /// Whether KVM allows nested VMs; none if KVM is not loaded.
    pub(super) nested: Option<bool>,
    pub(super) iommu: Iommu,
    pub(super) modules: Modules,
    /// The node that every VFIO container is opened by.
    pub(super) vfio: NodeAccess,
    /// The node of iommufd; missing too if the kernel makes no cdevs.
    pub(super) iommufd: NodeAccess,
    pub(super) modprobe: Modprobe,
    /// Unsafe parameters of loaded modules that are switched on.
    pub(super) unsafe_parameters: Vec<PathBuf>,
    pub(super) devices: Devices,
    /// Virtual GPUs for which the kernel has not returned.
    pub(super) hanging: Vec<HungVgpu>,
    pub(super) memory: Memory,
    pub(super) boot: Boot,
    /// Why no VM starts at present (maintenance).
    pub(super) maintenance: Option<String>,
}

/// The configuration of the running kernel, if /boot has it.
#[derive(Clone, Debug, Default)]
pub(super) struct KernelConfig(pub(super) Option<String>);

impl KernelConfig {
    fn read(root: &Path, release: &str) -> Self {
        let config = sysfs::table(&root.join("boot").join(format!("config-{release}")));
        Self(config.ok().filter(|text| !text.is_empty()))
    }

    /// Whether the kernel's image has the option.
    pub(super) fn builds(&self, option: &str) -> Option<bool> {
        let yes = format!("{option}=y");
        let config = self.0.as_ref()?;
        Some(config.lines().any(|line| line == yes))
    }

    /// Whether the option was left out; an option that this version of Linux does not know was not.
    pub(super) fn leaves_out(&self, option: &str) -> bool {
        let no = format!("# {option} is not set");
        let config = self.0.as_deref().unwrap_or_default();
        config.lines().any(|line| line == no)
    }
}

/// The devices to check.
#[derive(Clone, Debug)]
pub(super) struct Devices {
    pub(super) all: Vec<HostDevice>,
    /// The groups, or why they cannot be read.
    pub(super) groups: Result<Groups, String>,
    /// Devices of groups and device specs, and those that the command names.
    pub(super) wanted: BTreeSet<HostBdf>,
    /// Of these, the ones that are bound when a VM starts.
    pub(super) on_demand: BTreeSet<HostBdf>,
    /// The host's uses of the wanted devices and of the other devices in their IOMMU groups, or why they are
    /// unknown.
    pub(super) uses: Result<Vec<Guarded>, String>,
    /// The module that each driver comes from; drivers of the kernel's image have none.
    pub(super) driver_modules: BTreeMap<String, String>,
    /// Reserved ranges of the wanted devices' IOMMU groups.
    pub(super) reserved: BTreeMap<u32, Vec<ReservedRegion>>,
}

impl Facts {
    pub(super) fn read(paths: &HostPaths, wanted: &[HostBdf]) -> Result<Self, CheckError> {
        let root = root(paths);
        let release = text(&paths.proc.join("sys/kernel/osrelease"));
        let module = paths.sysfs.join("module");
        let unsafe_parameters = [
            "vfio/parameters/enable_unsafe_noiommu_mode",
            "vfio_iommu_type1/parameters/allow_unsafe_interrupts",
            "iommufd/parameters/allow_unsafe_interrupts",
        ];
        let cmdline = CommandLine::parse(&text(&paths.proc.join("cmdline")));
        Ok(Self {
            machine: machine(&paths.sysfs.join("class/dmi/id")),
            user: user(paths, &root),
            config: KernelConfig::read(&root, &release),
            cpu: Cpu::parse(&sysfs::table(&paths.proc.join("cpuinfo")).unwrap_or_default()),
            kvm: access(&paths.dev.join("kvm")),
            nested: nested(&module),
            iommu: Iommu::read(paths),
            modules: Modules::read(&paths.sysfs, &root, &release),
            vfio: access(&VfioBackEnd::Container.node(paths)),
            iommufd: iommufd(paths),
            modprobe: Modprobe::read(&root),
            unsafe_parameters: unsafe_parameters
                .map(|name| module.join(name))
                .into_iter()
                .filter(|path| is_yes(&text(path)))
                .collect(),
            devices: Devices::read(paths, wanted)?,
            hanging: HungVgpu::read(paths),
            memory: Memory::read(paths),
            boot: Boot::read(paths, &root, &cmdline),
            cmdline,
            maintenance: maintenance(paths).ok().flatten().map(|on| on.reason),
            release,
        })
    }
}

impl Devices {
    fn read(paths: &HostPaths, named: &[HostBdf]) -> Result<Self, CheckError> {
        let groups = Groups::load(paths);
        let detail = match &groups {
            Ok(groups) => groups.detail(),
            Err(_) => Detail::ForChoice,
        };
        let all = scan_with(paths, detail)?;
        let missing = |bdf: &&HostBdf| !all.iter().any(|device| device.bdf == **bdf);
        if let Some(&bdf) = named.iter().find(missing) {
            return Err(InventoryError::NoSuchDevice { bdf }.into());
        }
        let pooled = all.iter().filter(|device| {
            let group = groups.as_ref().ok();
            !device.is_bridge() && group.is_some_and(|groups| groups.exposes(device))
        });
        let mut wanted: BTreeSet<HostBdf> = pooled.map(|device| device.bdf).collect();
        let on_demand = all.iter().filter(|device| {
            let tags = groups.as_ref().map(|groups| groups.tags(device));
            wanted.contains(&device.bdf)
                && !named.contains(&device.bdf)
                && tags.is_ok_and(|tags| tags.on_demand)
        });
        let on_demand = on_demand.map(|device| device.bdf).collect();
        wanted.extend(named);
        let iommu_groups: BTreeSet<u32> = all
            .iter()
            .filter(|device| wanted.contains(&device.bdf))
            .filter_map(|device| device.iommu_group)
            .collect();
        let concerned = all.iter().filter(|device| {
            let neighbour = device
                .iommu_group
                .is_some_and(|group| iommu_groups.contains(&group));
            neighbour || wanted.contains(&device.bdf)
        });
        let concerned: Vec<HostDevice> = concerned.cloned().collect();
        let reserved = iommu_groups
            .iter()
            .filter_map(|&group| Some((group, reserved_regions(paths, group).ok()?)));
        Ok(Self {
            uses: host_uses(paths, &concerned).map_err(|error| error.to_string()),
            reserved: reserved.collect(),
            driver_modules: driver_modules(paths, &all),
            groups: groups.map_err(|error| error.to_string()),
            wanted,
            on_demand,
            all,
        })
    }
}

/// The root directory that this process sees. It is found through procfs, so that a recorded host can
/// have one: everything else is read below the directories of [`HostPaths`].
fn root(paths: &HostPaths) -> PathBuf {
    paths.proc.join("self/root")
}

/// An attribute's text; empty if it cannot be read.
pub(super) fn text(path: &Path) -> String {
    sysfs::text(path).ok().flatten().unwrap_or_default()
}

pub(super) fn access(node: &Path) -> NodeAccess {
    match eaccess(node, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) => NodeAccess::Ready,
        Err(Errno::ENOENT | Errno::ENOTDIR) => NodeAccess::Missing,
        Err(_) => NodeAccess::Denied,
    }
}

fn iommufd(paths: &HostPaths) -> NodeAccess {
    match makes_cdevs(paths) {
        Some(false) => NodeAccess::Missing,
        Some(true) | None => access(&VfioBackEnd::Iommufd.node(paths)),
    }
}

fn nested(module: &Path) -> Option<bool> {
    let mut modules = ["kvm_intel", "kvm_amd"].into_iter();
    modules.find_map(|name| {
        let value = text(&module.join(name).join("parameters/nested"));
        (!value.is_empty()).then(|| is_yes(&value))
    })
}

fn machine(dmi: &Path) -> Option<String> {
    let names = [
        text(&dmi.join("sys_vendor")),
        text(&dmi.join("product_name")),
    ]
    .join(" ");
    let names = names.trim();
    (!names.is_empty()).then(|| names.to_owned())
}

/// The name of the effective user, or a placeholder.
fn user(paths: &HostPaths, root: &Path) -> String {
    let status = sysfs::table(&paths.proc.join("self/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let id = ids.and_then(|ids| ids.split_whitespace().nth(1));
    let passwd = sysfs::table(&root.join("etc/passwd")).unwrap_or_default();
    let named = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1) == id && id.is_some()).then(|| name.to_owned())
    });
    named.unwrap_or_else(|| "USER".to_owned())
}

fn driver_modules(paths: &HostPaths, devices: &[HostDevice]) -> BTreeMap<String, String> {
    let drivers: BTreeSet<&String> = devices
        .iter()
        .filter_map(|device| device.driver.as_ref())
        .collect();
    drivers
        .into_iter()
        .filter_map(|driver| Some((driver.clone(), loaded_module(paths, driver)?)))
        .collect()
}
