//! The keys of a VM's JSON file that gantry acts on, under the names Cloud Hypervisor gives them.
//!
//! The documentation comments are the descriptions in the published schema.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use gantry_resources::base::ByteSize;
use gantry_resources::pools::{Aliases, DeviceRequest, Mac};
use schemars::JsonSchema;

/// A virtual machine, as written in the file given to `gantry run`.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What the guest boots.
    #[schemars(with = "PayloadConfig")]
    pub payload: Option<PayloadConfig>,
    /// Name of a service plan of the host, which says what this file does not: processors, memory,
    /// devices. `gantry plan list` shows them.
    pub plan: Option<String>,
    /// The guest's processors.
    pub cpus: Option<CpusConfig>,
    /// The guest's memory.
    pub memory: Option<MemoryConfig>,
    /// NUMA nodes of the host that the VM's processors and memory are on, and no others; `lscpu` shows
    /// them. Without this key they are on those of the devices that the VM starts with, or else of
    /// `hotplug.groups`, as far as there is room; `[]` leaves it to the host's kernel.
    pub numa_nodes: Option<Vec<u32>>,
    /// Host devices given to the guest, in the order of their slots.
    #[serde(default)]
    pub devices: Option<Vec<DeviceRequest>>,
    /// Host devices by aliases with counts, after those of `devices`: `"gpu:1, qat-c62x-vf:2"`.
    #[serde(default, rename = "pci_passthrough:alias")]
    pub aliases: Option<Aliases>,
    /// Disks that are files or block devices of the host, in the order of their slots after the devices. The
    /// guest sees them as `/dev/vda`, `/dev/vdb` and so on.
    pub disks: Option<Vec<DiskConfig>>,
    /// What cloud-init in the guest is to do. The guest gets the files on a further disk, after its other ones, with
    /// the label `cidata`.
    pub cloud_init: Option<CloudInitConfig>,
    /// Networks, in the order of their slots after the disks.
    pub net: Option<Vec<NetConfig>>,
    /// Sockets between guest and host (AF_VSOCK).
    pub vsock: Option<VsockConfig>,
    /// Random numbers of the host for the guest.
    pub rng: Option<RngConfig>,
    /// The guest's first serial port.
    pub serial: Option<SerialConfig>,
    /// Whether the guest has a register by which its kernel says that it has panicked; `true` if absent.
    pub pvpanic: Option<bool>,
    /// Slots for devices that are attached while the guest runs.
    pub hotplug: Option<HotplugConfig>,
    /// What of the host's platform the VM uses.
    pub platform: Option<PlatformConfig>,
}

/// What the guest boots. Relative paths start at the folder of the file they are written in, or at
/// the working directory when the configuration comes from standard input.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{"required": ["kernel"]}, {"required": ["firmware"]}]))]
pub struct PayloadConfig {
    /// Path of the kernel: a `vmlinux` with a PVH entry point, or a `bzImage`.
    pub kernel: Option<PathBuf>,
    /// Path of a firmware instead of a kernel, which boots what it finds on the disks: an ELF file with a PVH entry
    /// point, such as `hypervisor-fw`.
    pub firmware: Option<PathBuf>,
    /// Path of the initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line. A guest shows its boot messages with `console=ttyS0`.
    pub cmdline: Option<String>,
}

/// The guest's processors.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// Number of processors the guest starts with.
    #[schemars(range(min = 1, max = 254))]
    pub boot_vcpus: u64,
    /// Number of processors the guest may grow to. Processors cannot be added yet, so this is
    /// `boot_vcpus` or absent.
    #[schemars(range(min = 1, max = 254))]
    pub max_vcpus: Option<u64>,
    /// How the processors make up cores, dies and packages; one package of single-threaded cores if absent.
    pub topology: Option<TopologyConfig>,
    /// Whether the guest can run VMs itself (VMX or SVM); `false` if absent. The host's KVM must have that on.
    pub nested: Option<bool>,
    /// Bits of a guest-physical address, at most; as many as the host has if absent.
    #[schemars(range(min = 36, max = 52))]
    pub max_phys_bits: Option<u64>,
    /// Processors of the host for single vCPUs. The others run where `numa_nodes` or the devices are.
    pub affinity: Option<Vec<AffinityConfig>>,
}

/// How processors make up cores, dies and packages. The product is `boot_vcpus`; each number with more than one of
/// a level above it is a power of two.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TopologyConfig {
    /// Threads of a core.
    pub threads_per_core: u8,
    /// Cores of a die.
    pub cores_per_die: u8,
    /// Dies of a package.
    pub dies_per_package: u8,
    /// Packages, or sockets.
    pub packages: u8,
}

/// Processors of the host that a vCPU may run on.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AffinityConfig {
    /// Number of the vCPU; the first is 0.
    pub vcpu: u64,
    /// Numbers of the host's processors, as `lscpu --extended` shows them.
    pub host_cpus: Vec<u32>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: None,
            topology: None,
            nested: None,
            max_phys_bits: None,
            affinity: None,
        }
    }
}

/// The guest's memory.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size of the guest's RAM: a number of bytes, or a string such as `"512M"` or `"4GiB"`. A
    /// multiple of 2 MiB, at least 32 MiB.
    pub size: ByteSize,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: ByteSize(512 << 20),
        }
    }
}

/// Host devices for a running VM: those of a service plan, all of them or none.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize, serde::Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanDevices {
    /// Name of the service plan; `gantry plan list` shows them.
    pub plan: String,
    /// Name that the first device gets in the VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// Slots for devices that are attached while the guest runs.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HotplugConfig {
    /// How many, beside those of the devices that the VM starts with; 32 if absent. Each costs the guest
    /// some time at boot. A VM without `hotplug` has none, or 32 where `gantry run` is given
    /// `--api-socket`.
    #[schemars(range(min = 0, max = 96))]
    pub slots: Option<u64>,
    /// The groups whose devices can be attached; those of the devices that the VM starts with if none is
    /// named. The guest's memory is made ready for devices of groups that are named, once it runs, so that
    /// the first of them is not waited for.
    #[serde(default)]
    pub groups: Option<Vec<String>>,
    /// Whether devices that are in no group can be attached too, by their paths.
    pub ungrouped: Option<bool>,
    /// Addresses that each slot has for large BARs: a number of bytes, or a string such as `"128G"`; a
    /// share of what there is if absent.
    pub window: Option<ByteSize>,
    /// Files with expansion ROMs that devices can have that are attached later, by `rom` in `vm.add-device`. They
    /// are read when the VM starts.
    pub roms: Option<Vec<PathBuf>>,
    /// Images and block devices that can be attached as disks, by `vm.add-disk`, and folders with such images. None
    /// if absent; any where clients define the VM over a socket of their own.
    pub disks: Option<Vec<PathBuf>>,
}

/// What of the host's platform the VM uses.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlatformConfig {
    /// The kernel interface for the VM's devices: `true` for iommufd and a cdev for each device, `false` for a VFIO
    /// container and IOMMU groups. If absent, the container where the host has it, or else iommufd.
    pub iommufd: Option<bool>,
}

/// A virtio disk of the guest.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Path of a raw image or of a block device. A relative path starts at the folder of the file that it is
    /// written in. It is locked while the VM runs.
    pub path: PathBuf,
    /// Whether the guest may not write to it; `false` if absent. VMs can share a disk that all of them only read.
    pub readonly: Option<bool>,
    /// Whether accesses go past the host's page cache; `false` if absent.
    pub direct: Option<bool>,
    /// Whether requests are done one after the other, even where the host has io_uring; `false` if absent.
    pub disable_io_uring: Option<bool>,
    /// Serial number that the guest sees, at most 20 bytes of ASCII; none if absent.
    pub serial: Option<String>,
    /// Name of the disk in the VM; `disk` with its place in the list if absent.
    pub id: Option<String>,
    /// Number of its queues; one if absent.
    #[schemars(range(min = 1, max = 64))]
    pub num_queues: Option<u64>,
    /// Size of each queue, a power of two; 128 if absent.
    #[schemars(range(min = 2, max = 1024))]
    pub queue_size: Option<u64>,
}

/// The files of cloud-init's `NoCloud` data source. Relative paths start at the folder of the file that they are
/// written in.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CloudInitConfig {
    /// Path of the user data: users, passwords, keys, packages, commands.
    pub user_data: PathBuf,
    /// Path of the meta data. cloud-init sets the guest up once for each `instance-id` in it.
    pub meta_data: PathBuf,
    /// Path of the network configuration; if absent, cloud-init asks for addresses by DHCP.
    pub network_config: Option<PathBuf>,
}

/// A virtio network of the guest, whose packets the host's kernel moves (vhost-net) between the guest and a tap.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of a tap that the host has. If absent, gantry makes one, called `gantry` with a number behind it, which
    /// ends with the VM; only root may do that.
    pub tap: Option<String>,
    /// IPv4 address of the host on the tap that gantry makes; none if absent.
    pub ip: Option<Ipv4Addr>,
    /// Mask of the network that `ip` is in; 255.255.255.0 if absent.
    pub mask: Option<Ipv4Addr>,
    /// Address of the guest's interface. If absent, one that is made of the host's machine id and the names of the VM
    /// and the network, and thus stays.
    pub mac: Option<Mac>,
    /// Bytes of the largest packet, without its Ethernet header; those of the tap if absent.
    #[schemars(range(min = 68, max = 65521))]
    pub mtu: Option<u64>,
    /// Number of its queues, one for each direction and vCPU that is to use it; 2 if absent.
    #[schemars(range(min = 2, max = 64))]
    pub num_queues: Option<u64>,
    /// Size of each queue, a power of two; 256 if absent.
    #[schemars(range(min = 64, max = 1024))]
    pub queue_size: Option<u64>,
    /// Name of the network in the VM; `net` with its place in the list if absent.
    pub id: Option<String>,
    /// Whether checksums may be left to the other side; `true` if absent.
    pub offload_csum: Option<bool>,
    /// Whether segmentation of TCP may be left to the other side; as `offload_csum` if absent.
    pub offload_tso: Option<bool>,
    /// Whether fragmentation of UDP may be left to the other side; as `offload_csum` if absent.
    pub offload_ufo: Option<bool>,
}

/// Sockets between guest and host, served by the host's kernel (vhost-vsock).
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest: programs of the host reach it by AF_VSOCK and this number. No two VMs have the same.
    #[schemars(range(min = 3, max = 4294967294_u64))]
    pub cid: u64,
    /// Name of the device in the VM; `vsock` if absent.
    pub id: Option<String>,
    /// Always refused: another VMM's way to the guest.
    #[schemars(skip)]
    pub socket: Option<PathBuf>,
}

/// Random numbers of the host for the guest.
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Where they come from: `/dev/urandom`, `/dev/random` or `/dev/hwrng`; the first if absent.
    pub src: Option<PathBuf>,
    /// Name of the device in the VM; `rng` if absent.
    pub id: Option<String>,
}

/// The guest's first serial port (16550, COM1).
#[derive(Debug, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// Where it leads.
    pub mode: SerialMode,
    /// With mode `File`, the file that output goes to, truncated at start. It holds 64 MiB at most: when it is full,
    /// its older half is removed.
    pub file: Option<PathBuf>,
}

impl Default for SerialConfig {
    fn default() -> Self {
        Self {
            mode: SerialMode::Tty,
            file: None,
        }
    }
}

/// Where a serial port leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, JsonSchema)]
pub enum SerialMode {
    /// The guest has no such port.
    Off,
    /// The guest has the port; what it writes is thrown away.
    Null,
    /// Standard input and output.
    Tty,
    /// A file; nothing is ever read.
    File,
}
