//! The validated configuration of a VM, in the VMM's own terms.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use gantry_devices::virtio::block::Queues;
use gantry_devices::virtio::net::{NetSpec, Offloads};
use gantry_resources::base::{HostPaths, Numbers};
use gantry_resources::facts::VfioBackEnd;
use gantry_resources::pools::{DeviceRequest, DeviceSource};

use crate::topology::Topology;

/// The configuration of a VM. It is consistent in itself; only the host may still refuse it.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// Name of the VM, for leases, logs and error messages.
    pub name: String,
    /// What it boots.
    pub payload: Payload,
    /// Number of vCPUs.
    pub vcpus: VcpuCount,
    /// How they make up cores, dies and packages.
    pub topology: Topology,
    /// The CPU features that the guest is offered.
    pub cpu: CpuConfig,
    /// The host's CPUs that a vCPU may run on, for vCPUs with an affinity of their own.
    pub affinity: BTreeMap<u8, Numbers>,
    /// Guest RAM.
    pub memory: MemorySize,
    /// The NUMA nodes of the host for RAM and vCPUs.
    pub nodes: NumaPolicy,
    /// Host devices it takes, in the order of their slots.
    pub devices: Vec<DeviceRequest>,
    /// Disks that are files or block devices of the host, in the order of their ports.
    pub disks: Vec<DiskConfig>,
    /// The files of one more disk, the last one, for cloud-init in the guest.
    pub cloud_init: Option<CloudInit>,
    /// Networks, in the order of their ports.
    pub nets: Vec<NetConfig>,
    /// Sockets between guest and host.
    pub vsock: Option<VsockConfig>,
    /// Random numbers of the host.
    pub rng: Option<RngConfig>,
    /// Where its serial port leads.
    pub serial: SerialMode,
    /// Whether it has a register by which its kernel reports a panic (`pvpanic`).
    pub pvpanic: bool,
    /// Slots for devices that come while it runs.
    pub hotplug: Hotplug,
    /// The kernel interface for its devices; as the host has it if absent.
    pub back_end: Option<VfioBackEnd>,
    /// Where its files must lie; anywhere if absent.
    pub folders: Option<Folders>,
}

/// The folders in which clients may name files. No link may lead out of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders {
    /// Where kernels and initramfs files are.
    pub payload: PathBuf,
    /// Where a serial port's output may go; nowhere if absent.
    pub output: Option<PathBuf>,
}

/// Files, and folders with files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileSet {
    /// Those that are read.
    pub read: Vec<PathBuf>,
    /// Those that are read and written.
    pub write: Vec<PathBuf>,
}

impl VmConfig {
    /// Where disks are that come while the VM runs.
    pub fn later_disks(&self) -> FileSet {
        match &self.folders {
            _ if self.hotplug.slots == 0 => FileSet::default(),
            Some(folders) => FileSet {
                read: vec![folders.payload.clone()],
                write: folders.output.iter().cloned().collect(),
            },
            None => FileSet {
                read: self.hotplug.disks.clone(),
                write: self.hotplug.disks.clone(),
            },
        }
    }

    /// Whether devices need all of its RAM pinned, now or later.
    pub fn is_pinned(&self) -> bool {
        !self.devices.is_empty() || !self.hotplug.from.is_empty()
    }

    /// The kernel interface for its devices on a host.
    pub fn back_end_on(&self, host: &HostPaths) -> VfioBackEnd {
        let chosen = self.back_end;
        chosen.unwrap_or_else(|| VfioBackEnd::of_host(host))
    }

    /// The names of its devices, virtual ones included.
    pub fn names(&self) -> Vec<String> {
        let devices = self.devices.iter().flat_map(DeviceRequest::names);
        let disks = self.disks.iter().map(|disk| &disk.id);
        let nets = self.nets.iter().map(|net| &net.id);
        let vsock = self.vsock.iter().map(|vsock| &vsock.id);
        let rng = self.rng.iter().map(|rng| &rng.id);
        let others = disks.chain(nets).chain(vsock).chain(rng).cloned();
        devices.chain(others).collect()
    }

    /// How many virtual devices it has behind root ports.
    pub fn virtual_devices(&self) -> usize {
        let single = [
            self.cloud_init.is_some(),
            self.vsock.is_some(),
            self.rng.is_some(),
        ];
        let single = single.into_iter().filter(|there| *there);
        self.disks.len() + self.nets.len() + single.count()
    }

    /// Whether it has devices, now or later.
    pub fn takes_devices(&self) -> bool {
        !self.devices.is_empty() || self.hotplug.slots > 0
    }
}

#[cfg(test)]
impl VmConfig {
    /// A small VM without devices, for tests.
    pub fn small() -> Self {
        Self {
            name: "one".to_owned(),
            payload: Payload {
                kernel: "vmlinux".into(),
                is_firmware: false,
                initramfs: None,
                cmdline: String::new(),
            },
            vcpus: VcpuCount::new(2).unwrap(),
            topology: Topology::flat(2),
            cpu: CpuConfig::default(),
            affinity: BTreeMap::new(),
            memory: MemorySize::new(64 << 20).unwrap(),
            nodes: NumaPolicy::default(),
            devices: Vec::new(),
            disks: Vec::new(),
            cloud_init: None,
            nets: Vec::new(),
            vsock: None,
            rng: None,
            serial: SerialMode::Off,
            pvpanic: true,
            hotplug: Hotplug::default(),
            back_end: None,
            folders: None,
        }
    }
}

/// What of the host's processors a guest is offered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuConfig {
    /// VMX or SVM, so that the guest can run VMs itself.
    pub nested: bool,
    /// Bits of a guest-physical address, at most; those of the host if absent.
    pub max_phys_bits: Option<u8>,
}

/// The NUMA nodes of the host that a VM is on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NumaPolicy {
    /// Those of the devices that it starts with, as far as there is room.
    #[default]
    NearDevices,
    /// Whichever the host's kernel chooses.
    Any,
    /// Only these nodes.
    Only(Numbers),
}

/// Slots for devices that come while the VM runs. By default there are none: each costs the guest
/// time at boot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hotplug {
    /// How many, beside those of the devices that the VM starts with.
    pub slots: u8,
    /// The groups of the devices; those of the devices at boot if empty. RAM is laid out so that the devices
    /// can reach it, and populated in the background once the guest runs, so that the first attachment is fast.
    pub from: Vec<DeviceSource>,
    /// Whether devices may come that are in no group.
    pub ungrouped: bool,
    /// Bytes of 64-bit prefetchable addresses of each slot, for devices with large BARs; an even share if
    /// absent.
    pub window: Option<u64>,
    /// The ROM files that devices can have that come while the VM runs.
    pub roms: Vec<PathBuf>,
    /// The disks that can come, and the folders that they can come from; see also [`VmConfig::folders`].
    pub disks: Vec<PathBuf>,
}

/// What a VM boots. The files are opened once and read again at every reboot of the guest.
#[derive(Debug, Clone)]
pub struct Payload {
    /// `vmlinux` with a PVH entry, or `bzImage`; or a firmware.
    pub kernel: PathBuf,
    /// Whether it is a firmware, an ELF file with a PVH entry, which finds what to boot on the disks.
    pub is_firmware: bool,
    /// Initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
}

impl Payload {
    /// The key of the VM's file that names what is loaded.
    pub fn key(&self) -> &'static str {
        match self.is_firmware {
            true => "payload.firmware",
            false => "payload.kernel",
        }
    }
}

/// Where the guest's serial port (16550 at I/O port 0x3f8, IRQ 4) leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialMode {
    /// No port at all.
    Off,
    /// A port whose output is thrown away.
    Null,
    /// Standard input and output; a terminal is put into raw mode while the VM runs.
    Tty,
    /// Output to a file, truncated at start.
    File(PathBuf),
}

impl SerialMode {
    /// Whether clients can read and type along.
    pub fn is_console(&self) -> bool {
        match self {
            Self::Off | Self::Null => false,
            Self::Tty | Self::File(_) => true,
        }
    }
}

/// A disk of the guest that is a file or a block device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its name in the VM.
    pub id: String,
    /// The raw image, or the block device.
    pub path: PathBuf,
    /// Whether the guest may not write to it.
    pub read_only: bool,
    /// Whether accesses go past the host's page cache.
    pub direct: bool,
    /// Whether requests may be done side by side, by io_uring.
    pub io_uring: bool,
    /// Its serial number in the guest, at most [`SERIAL_LEN`](gantry_devices::virtio::block::SERIAL_LEN) bytes.
    pub serial: String,
    /// Its queues.
    pub queues: Queues,
}

/// What cloud-init in the guest is to do, in files of its own formats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudInit {
    /// What to set up.
    pub user_data: PathBuf,
    /// Which instance the guest is.
    pub meta_data: PathBuf,
    /// How to set up its network.
    pub network_config: Option<PathBuf>,
}

impl CloudInit {
    /// The name of the disk with the files in the VM, which is also its label.
    pub const DISK: &str = "cidata";

    /// The files by the names that they have on the disk.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &PathBuf)> {
        let files = [
            Some(("user-data", &self.user_data)),
            Some(("meta-data", &self.meta_data)),
            self.network_config
                .as_ref()
                .map(|file| ("network-config", file)),
        ];
        files.into_iter().flatten()
    }
}

#[cfg(test)]
impl DiskConfig {
    /// A disk with one queue, for tests.
    pub fn small() -> Self {
        Self {
            id: "disk0".to_owned(),
            path: "disk.raw".into(),
            read_only: false,
            direct: false,
            io_uring: true,
            serial: String::new(),
            queues: Queues {
                count: 1,
                size: 128,
            },
        }
    }
}

/// A network of the guest: packets come and go by a tap of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// Its name in the VM.
    pub id: String,
    /// Its tap.
    pub tap: TapConfig,
    /// Its address in the guest.
    pub mac: [u8; 6],
    /// Bytes of the largest packet; that of the tap if absent.
    pub mtu: Option<u16>,
    /// How many pairs of queues it has.
    pub pairs: u16,
    /// The size of each queue: a power of two.
    pub queue_size: u16,
    /// What the guest's driver need not do itself.
    pub offloads: Offloads,
}

/// The tap of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapConfig {
    /// One that the host has, by its name.
    Named(String),
    /// One that gantry makes, and that ends with the VM.
    Made {
        /// The host's address on it, and the length of the network's prefix.
        address: Option<(Ipv4Addr, u8)>,
    },
}

impl NetConfig {
    /// What its driver is told, where packets have `mtu` bytes at most.
    pub fn spec(&self, mtu: u16) -> NetSpec {
        NetSpec {
            mac: self.mac,
            mtu,
            pairs: self.pairs,
            queue_size: self.queue_size,
            offloads: self.offloads,
        }
    }
}

/// Sockets between guest and host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockConfig {
    /// Its name in the VM.
    pub id: String,
    /// The guest's context id, 3 or more.
    pub cid: u32,
}

/// Random numbers of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngConfig {
    /// Its name in the VM.
    pub id: String,
    /// The file that they are read from.
    pub source: PathBuf,
}

/// Number of vCPUs, 1 to [`VcpuCount::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuCount(u8);

impl VcpuCount {
    /// Local APIC ids up to 254 need no interrupt remapping in the guest.
    pub const MAX: u8 = 254;

    /// `None` outside 1 to [`Self::MAX`].
    pub fn new(count: u64) -> Option<Self> {
        u8::try_from(count)
            .ok()
            .filter(|count| (1..=Self::MAX).contains(count))
            .map(Self)
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

/// Guest RAM in bytes: at least [`MemorySize::MIN`], in multiples of [`MemorySize::ALIGN`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize(u64);

impl MemorySize {
    /// Guest RAM is made of 2 MiB pages wherever the host has them.
    pub const ALIGN: u64 = 2 << 20;
    /// No Linux kernel starts in less.
    pub const MIN: u64 = 32 << 20;

    /// `None` where `bytes` is too small or unaligned.
    pub fn new(bytes: u64) -> Option<Self> {
        (bytes >= Self::MIN && bytes.is_multiple_of(Self::ALIGN)).then_some(Self(bytes))
    }

    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}
