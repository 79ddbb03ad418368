//! The bodies of the API as JSON: the names of Cloud Hypervisor's OpenAPI document, and what is added.

mod disk;
mod event;
mod net;
mod place;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use gantry_resources::base::DeviceName;
use gantry_resources::facts::VfioBackEnd;
use gantry_resources::pools::{DeviceRequest, DeviceSource};
use gantry_vmm::{NumaPolicy, SerialMode, command};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use disk::{CloudInit, Disk, ResizeDisk};
pub use event::{Event, EventLine};
pub use net::{Net, Rng, Vsock};
pub use place::{Affinity, Placement};

/// Answer to `vmm.ping`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct VmmPing {
    /// Name and version of the build.
    pub build_version: String,
    /// Version of gantry.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// What the build holds.
    pub features: Vec<String>,
    /// Name of the VM.
    #[serde(default)]
    pub name: String,
}

/// State of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmState {
    /// It has a configuration, and nothing runs.
    Created,
    /// Its guest runs.
    Running,
    /// Its vCPUs wait.
    Paused,
    /// It was shut down and can be booted again.
    Shutdown,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutdown => "shut down",
        })
    }
}

impl From<command::VmState> for VmState {
    fn from(state: command::VmState) -> Self {
        match state {
            command::VmState::Created => Self::Created,
            command::VmState::Running => Self::Running,
            command::VmState::Paused => Self::Paused,
            command::VmState::Shutdown => Self::Shutdown,
        }
    }
}

/// Answer to `vm.info`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct VmInfo {
    /// What it was created from, or would be again: while it runs, with the devices that it has now.
    pub config: Config,
    /// Its state.
    pub state: VmState,
    /// Seconds since its vCPUs started, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime: Option<f64>,
    /// Why it was shut down, in words for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// Bytes of RAM that its guest has.
    pub memory_actual_size: u64,
    /// Where it is on the host, if it is kept anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// Its devices by their names.
    pub device_tree: BTreeMap<String, DeviceNode>,
    /// Name of the VM.
    pub name: String,
    /// Its devices in slots, passed ones and disks, with what the device tree lacks.
    pub devices: Vec<Device>,
    /// Slots that devices can be attached in, taken or not.
    pub slots: usize,
    /// Slots without a device.
    pub free_slots: usize,
}

/// A VM's whole configuration.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Config {
    /// What it boots.
    pub payload: Payload,
    /// Its processors.
    pub cpus: Cpus,
    /// Its memory.
    pub memory: Memory,
    /// Its passed devices.
    pub devices: Vec<DeviceRequest>,
    /// The NUMA nodes of the host that it is bound to, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_nodes: Option<Vec<u32>>,
    /// Its slots for devices to come.
    #[serde(default)]
    pub hotplug: Hotplug,
    /// Its disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// The files of cloud-init in the guest, if it has a disk with them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Its networks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<Net>,
    /// Its sockets to the host, if it has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// Its random numbers of the host, if it has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rng: Option<Rng>,
    /// Its serial port.
    pub serial: Serial,
    /// Its console, which gantry does not have.
    pub console: Serial,
    /// Whether it has a register by which its kernel says that it has panicked.
    #[serde(default = "present")]
    pub pvpanic: bool,
    /// What of the host's platform it uses, as far as that was said.
    #[serde(default)]
    pub platform: Platform,
}

/// The default of `pvpanic`.
fn present() -> bool {
    true
}

/// What of the host's platform a VM uses.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Platform {
    /// Whether its devices come through iommufd (`true`) or a VFIO container (`false`), if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommufd: Option<bool>,
}

/// Slots for devices to come.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Hotplug {
    /// How many, beside those of the devices that the VM started with.
    pub slots: u8,
    /// Groups that these devices come from; those of the devices that the VM started with if none is named.
    pub groups: Vec<String>,
    /// Whether devices that are in no group can be attached too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ungrouped: bool,
    /// Bytes of addresses that each slot has for large BARs, if that was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<u64>,
    /// Files with expansion ROMs that these devices can have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roms: Vec<PathBuf>,
    /// The disks that can come, and folders that disks can come from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<PathBuf>,
}

impl From<&gantry_vmm::Hotplug> for Hotplug {
    fn from(hotplug: &gantry_vmm::Hotplug) -> Self {
        Self {
            slots: hotplug.slots,
            groups: hotplug
                .from
                .iter()
                .filter_map(DeviceSource::pool)
                .map(str::to_owned)
                .collect(),
            ungrouped: hotplug.ungrouped,
            window: hotplug.window,
            roms: hotplug.roms.clone(),
            disks: hotplug.disks.clone(),
        }
    }
}

/// What a VM boots.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Payload {
    /// The kernel's file, if the VM boots one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The firmware's file, if the VM boots one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// The initial RAM file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl From<&gantry_vmm::Payload> for Payload {
    fn from(payload: &gantry_vmm::Payload) -> Self {
        let image =
            |firmware| Some(payload.kernel.clone()).filter(|_| payload.is_firmware == firmware);
        Self {
            kernel: image(false),
            firmware: image(true),
            initramfs: payload.initramfs.clone(),
            cmdline: payload.cmdline.clone(),
        }
    }
}

/// Processors.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Cpus {
    /// At boot.
    pub boot_vcpus: u8,
    /// At most.
    pub max_vcpus: u8,
    /// How they make up cores, dies and packages, if not one package of single-threaded cores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// Whether the guest can run VMs itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nested: bool,
    /// Bits of a guest-physical address, at most, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_phys_bits: Option<u8>,
    /// Processors of the host for single vCPUs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub affinity: Vec<Affinity>,
}

/// How processors make up cores, dies and packages.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Topology {
    /// Threads of a core.
    pub threads_per_core: u8,
    /// Cores of a die.
    pub cores_per_die: u8,
    /// Dies of a package.
    pub dies_per_package: u8,
    /// Packages, or sockets.
    pub packages: u8,
}

impl From<&gantry_vmm::Topology> for Topology {
    fn from(topology: &gantry_vmm::Topology) -> Self {
        Self {
            threads_per_core: topology.threads_per_core,
            cores_per_die: topology.cores_per_die,
            dies_per_package: topology.dies_per_package,
            packages: topology.packages,
        }
    }
}

/// Memory.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Memory {
    /// Bytes.
    pub size: u64,
}

/// A serial port or console.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Serial {
    /// Where it leads.
    pub mode: String,
    /// With mode `File`, the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

impl From<&SerialMode> for Serial {
    fn from(mode: &SerialMode) -> Self {
        let (mode, file) = match mode {
            SerialMode::Off => ("Off", None),
            SerialMode::Null => ("Null", None),
            SerialMode::Tty => ("Tty", None),
            SerialMode::File(file) => ("File", Some(file.clone())),
        };
        Self {
            mode: mode.to_owned(),
            file,
        }
    }
}

/// A device in the device tree.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct DeviceNode {
    /// Its name.
    pub id: String,
    /// Its resources; always empty in gantry.
    pub resources: Vec<serde_json::Value>,
    /// Devices below it.
    pub children: Vec<String>,
    /// Its address in the guest.
    pub pci_bdf: String,
}

/// State of a device in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// It was announced to the guest.
    Announced,
    /// The guest has enabled its memory or I/O ports.
    Enabled,
    /// The guest was asked to release it.
    Detaching,
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Announced => "announced",
            Self::Enabled => "enabled",
            Self::Detaching => "detaching",
        })
    }
}

impl From<command::DeviceState> for DeviceState {
    fn from(state: command::DeviceState) -> Self {
        match state {
            command::DeviceState::Announced => Self::Announced,
            command::DeviceState::Enabled => Self::Enabled,
            command::DeviceState::Detaching => Self::Detaching,
        }
    }
}

/// A device in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Device {
    /// Its name in the VM.
    pub id: String,
    /// Its address in the host, if it is a passed device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<DeviceName>,
    /// Its image or block device, if it is a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Its address in the guest, as in `device_tree`.
    pub pci_bdf: String,
    /// The group that it is of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Its state.
    pub state: DeviceState,
    /// The other functions of the same device by their names in the VM: they share its slot, and go when it
    /// goes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub together_with: Vec<String>,
}

impl From<&command::DeviceInfo> for Device {
    fn from(device: &command::DeviceInfo) -> Self {
        Self {
            id: device.id.clone(),
            host: device.kind.passed().map(|passed| passed.name),
            path: device.kind.disk().map(|disk| disk.path.clone()),
            pci_bdf: device.guest.to_string(),
            group: device.kind.passed().and_then(|passed| passed.group.clone()),
            state: device.state.into(),
            together_with: device.together_with.clone(),
        }
    }
}

impl From<&command::VmInfo> for VmInfo {
    fn from(info: &command::VmInfo) -> Self {
        let node = |device: &command::DeviceInfo| {
            let node = DeviceNode {
                id: device.id.clone(),
                resources: Vec::new(),
                children: Vec::new(),
                pci_bdf: device.guest.to_string(),
            };
            (device.id.clone(), node)
        };
        Self {
            state: info.state.into(),
            uptime: info.uptime.map(|uptime| uptime.as_secs_f64()),
            ended: info.ended.clone(),
            memory_actual_size: info.config.memory.bytes(),
            placement: Placement::of(info),
            device_tree: info.devices.iter().map(node).collect(),
            name: info.config.name.clone(),
            devices: info.devices.iter().map(Device::from).collect(),
            slots: info.slots,
            free_slots: info.free_slots,
            config: Config::from(info),
        }
    }
}

impl From<&command::VmInfo> for Config {
    fn from(info: &command::VmInfo) -> Self {
        let config = &info.config;
        let runs = match info.state {
            command::VmState::Running | command::VmState::Paused => true,
            command::VmState::Created | command::VmState::Shutdown => false,
        };
        let (devices, disks) = devices_and_disks(info);
        let has = |id: &str| !runs || info.devices.iter().any(|device| device.id == id);
        let nets = config.nets.iter().filter(|net| has(&net.id));
        let vsock = config.vsock.as_ref().filter(|vsock| has(&vsock.id));
        let rng = config.rng.as_ref().filter(|rng| has(&rng.id));
        let vcpus = config.vcpus.get();
        Self {
            payload: Payload::from(&config.payload),
            cpus: Cpus {
                boot_vcpus: vcpus,
                max_vcpus: vcpus,
                topology: Some(&config.topology)
                    .filter(|topology| **topology != gantry_vmm::Topology::flat(vcpus))
                    .map(Topology::from),
                nested: config.cpu.nested,
                max_phys_bits: config.cpu.max_phys_bits,
                affinity: config.affinity.iter().map(Affinity::from).collect(),
            },
            memory: Memory {
                size: config.memory.bytes(),
            },
            devices,
            numa_nodes: match &config.nodes {
                NumaPolicy::NearDevices => None,
                NumaPolicy::Any => Some(Vec::new()),
                NumaPolicy::Only(nodes) => Some(nodes.iter().collect()),
            },
            hotplug: Hotplug::from(&config.hotplug),
            disks,
            cloud_init: config.cloud_init.as_ref().map(CloudInit::from),
            net: nets.map(Net::from).collect(),
            vsock: vsock.map(Vsock::from),
            rng: rng.map(Rng::from),
            serial: Serial::from(&config.serial),
            console: Serial::from(&SerialMode::Off),
            pvpanic: config.pvpanic,
            platform: Platform {
                iommufd: config.back_end.map(|one| one == VfioBackEnd::Iommufd),
            },
        }
    }
}

/// The devices and disks that a VM has, or will have when it is booted.
fn devices_and_disks(info: &command::VmInfo) -> (Vec<DeviceRequest>, Vec<Disk>) {
    let passed = |device: &command::DeviceInfo| {
        let passed = device.kind.passed()?;
        Some(DeviceRequest {
            id: Some(device.id.clone()),
            allow: passed.allow,
            on_error: passed.on_error,
            rom: passed.rom.clone(),
            ..DeviceRequest::device(passed.name)
        })
    };
    let disk = |device: &command::DeviceInfo| device.kind.disk().map(Disk::from);
    let (config, plugged) = (&info.config, info.devices.iter());
    match info.state {
        command::VmState::Running | command::VmState::Paused => (
            plugged.clone().filter_map(passed).collect(),
            plugged.filter_map(disk).collect(),
        ),
        command::VmState::Created | command::VmState::Shutdown => (
            config.devices.clone(),
            config.disks.iter().map(Disk::from).collect(),
        ),
    }
}

/// Answer to `vm.add-disk`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct AddedDisk {
    /// Its name in the VM.
    pub id: String,
    /// Its address in the guest.
    pub bdf: String,
}

impl From<&command::DeviceInfo> for AddedDisk {
    fn from(disk: &command::DeviceInfo) -> Self {
        Self {
            id: disk.id.clone(),
            bdf: disk.guest.to_string(),
        }
    }
}

/// Answer to `vm.add-device`: the first device, and all of them.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct AddedDevices {
    /// Name of the first device in the VM.
    pub id: String,
    /// Address of the first device in the guest.
    pub bdf: String,
    /// Each device, the first included.
    pub devices: Vec<Device>,
}

/// Body of `vm.remove-device`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoveDevice {
    /// Name of the device in the VM.
    pub id: String,
    /// Remove the device by force after this many seconds if the guest has not released it. 0 takes
    /// it away at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub force_after: Option<f64>,
}

/// Answer to `vm.counters`: numbers by device and name.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// The counters of each device, flat as the API's clients know them.
pub fn counters(devices: &[command::DeviceCounters]) -> Counters {
    let flat = |device: &command::DeviceCounters| {
        let mut flat = BTreeMap::from([
            ("errors".to_owned(), device.errors),
            ("interrupts".to_owned(), device.interrupts.values().sum()),
            ("mapped_bytes".to_owned(), device.bytes_mapped),
            ("resets".to_owned(), device.resets),
        ]);
        let vectors = device.interrupts.iter();
        flat.extend(vectors.map(|(vector, count)| (format!("interrupts.{vector}"), *count)));
        let requests = device.requests.iter();
        flat.extend(requests.map(|(name, count)| ((*name).to_owned(), *count)));
        let reads = device.trapped_reads.iter();
        flat.extend(reads.map(|(region, count)| (format!("trapped_reads.{region}"), *count)));
        let writes = device.trapped_writes.iter();
        flat.extend(writes.map(|(region, count)| (format!("trapped_writes.{region}"), *count)));
        let micros = |took: &std::time::Duration| u64::try_from(took.as_micros());
        let steps = device.attach.iter();
        flat.extend(steps.map(|(step, took)| {
            let micros = micros(took).unwrap_or(u64::MAX);
            (format!("attach_us.{step}"), micros)
        }));
        (device.id.clone(), flat)
    };
    devices.iter().map(flat).collect()
}
