//! The simulated machine: what it is made of, its QEMU command line, its process.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::packages;
use crate::cleanup::OwnedChild;
use crate::protocol::PORT_NAME;

/// A device of the lab host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// An NVMe disk of 8 MiB behind a root port of its own; see [`super::disk`] for its contents.
    Nvme {
        /// At most 20 characters.
        serial: String,
    },
    /// An NVMe disk as [`Device::Nvme`], below a host bridge of its own on a NUMA node: at 21:00.0 on
    /// node 0, at 41:00.0 on node 1. The machine has two nodes then, each with half of its memory, and
    /// node 0 with one processor.
    NvmeOnNode {
        /// 0 or 1.
        node: u8,
        /// At most 20 characters.
        serial: String,
    },
    /// An SR-IOV network card (8086:10c9) behind a root port of its own, with the expansion ROM [`NIC_ROM`];
    /// cards on one hub talk.
    Igb {
        /// Number of the hub.
        hub: u8,
    },
    /// A network card of VMware's (15ad:07b0) behind a root port of its own; Debian's kernel has its
    /// driver as a module.
    Vmxnet {
        /// Number of the hub.
        hub: u8,
    },
    /// A virtio network card (1af4:1041) behind a root port of its own. Of all that is here it alone can
    /// report PCI Express errors: the others lack the capability, or its switches.
    VirtioNet {
        /// Number of the hub.
        hub: u8,
    },
    /// A display (1234:1111, function 0) and an audio controller (8086:2668, function 1) in one
    /// slot of the root complex: one IOMMU group, as a GPU with its audio.
    Gpu,
    /// A display and an audio controller as [`Device::Gpu`], but behind a root port of their own: neither has a
    /// reset of its own, and their bus can be reset.
    GpuOnBus,
    /// The display that the firmware starts (1234:1111, class 0300) and an audio controller, in one
    /// slot as [`Device::Gpu`].
    Console,
    /// A USB controller (1b36:000d) with a stick, whose serial number is this, and a keyboard.
    Usb {
        /// Of the stick.
        serial: String,
    },
    /// A USB controller without MSI-X (1033:0194) and a stick of 8 MiB, in the root complex; see
    /// [`super::disk`] for its contents.
    UsbWithoutMsix {
        /// Of the stick; at most 20 characters.
        serial: String,
        /// Whether it has MSI beside INTx.
        msi: bool,
    },
    /// The teaching device (1234:11e8) with DMA, MSI and INTx, in the root complex.
    Edu,
    /// A device (1b36:0005) with a prefetchable BAR of this many MiB, in the root complex.
    BigBar {
        /// A power of two.
        mib: u64,
    },
}

impl Device {
    /// An NVMe disk with this serial.
    pub fn nvme(serial: &str) -> Self {
        Self::Nvme {
            serial: serial.to_owned(),
        }
    }

    /// The devices of the usual lab: two disks (01:00.0 and 02:00.0), two network cards on one
    /// hub, a display with its audio, a teaching device, and one with a BAR of 8 GiB.
    pub fn usual() -> Vec<Self> {
        vec![
            Self::nvme("GANTRY-NVME0001"),
            Self::nvme("GANTRY-NVME0002"),
            Self::Igb { hub: 0 },
            Self::Igb { hub: 0 },
            Self::Gpu,
            Self::Edu,
            Self::BigBar { mib: 8 << 10 },
        ]
    }

    /// The usual ones and a display of the firmware's, with its audio: 00:17.0 and 00:17.1.
    pub fn with_console() -> Vec<Self> {
        let mut devices = Self::usual();
        devices.push(Self::Console);
        devices
    }

    /// Three of VMware's network cards (01:00.0 to 03:00.0) and a virtio one (04:00.0), on one hub; and a display
    /// with its audio (05:00.0 and 05:00.1).
    pub fn only_cards() -> Vec<Self> {
        let mut devices = vec![Self::Vmxnet { hub: 0 }; 3];
        devices.extend([Self::VirtioNet { hub: 0 }, Self::GpuOnBus]);
        devices
    }

    /// USB controllers with a stick each, one with a keyboard, and a device with a BAR of 64 GiB: 00:13.0.
    pub fn only_usb() -> Vec<Self> {
        let serial = |number: u8| format!("GANTRY-USB000{number}");
        let without_msix = |number, msi| Self::UsbWithoutMsix {
            serial: serial(number),
            msi,
        };
        vec![
            Self::Usb { serial: serial(1) },
            without_msix(2, true),
            without_msix(3, false),
            Self::BigBar { mib: 64 << 10 },
        ]
    }

    /// Two disks, each on a NUMA node of its own.
    pub fn on_two_nodes() -> Vec<Self> {
        let disk = |node, serial: &str| Self::NvmeOnNode {
            node,
            serial: serial.to_owned(),
        };
        vec![disk(0, "GANTRY-NVME0001"), disk(1, "GANTRY-NVME0002")]
    }

    /// The serial number of the disk that it is.
    pub fn disk(&self) -> Option<&str> {
        match self {
            Self::Nvme { serial }
            | Self::NvmeOnNode { serial, .. }
            | Self::UsbWithoutMsix { serial, .. } => Some(serial),
            _ => None,
        }
    }

    /// The name of the expansion ROM that it has.
    pub fn rom(&self) -> Option<&str> {
        matches!(self, Self::Igb { .. }).then_some(NIC_ROM)
    }

    /// QEMU's arguments for the device as number `index` of the machine.
    fn arguments(&self, index: usize, folder: &Path) -> Vec<String> {
        let slot = index + 0x10;
        let port = format!(
            "pcie-root-port,id=port{index},bus=pcie.0,chassis={index},slot={index},addr={slot:#x}"
        );
        let rom = self.rom().map(|name| rom_path(folder, name));
        let rom = format!("romfile={}", rom.unwrap_or_default().display());
        let nvme = |serial: &str| {
            vec![
                // Unlike a -drive, it stays when the device is unplugged.
                "-blockdev".into(),
                format!(
                    "driver=raw,node-name=disk{index},file.driver=file,file.filename={}",
                    disk_path(folder, serial).display()
                ),
                "-device".into(),
                format!("nvme,id=dev{index},bus=port{index},drive=disk{index},serial={serial}"),
            ]
        };
        match self {
            Self::Nvme { serial } => [vec!["-device".into(), port], nvme(serial)].concat(),
            Self::NvmeOnNode { node, serial } => {
                let bus = BUSES_OF_NODE * (node + 1);
                let bridge =
                    format!("pxb-pcie,id=host{index},bus=pcie.0,bus_nr={bus},numa_node={node}");
                let port = format!(
                    "pcie-root-port,id=port{index},bus=host{index},chassis={index},slot={index}"
                );
                let above = ["-device", &bridge, "-device", &port].map(str::to_owned);
                [above.to_vec(), nvme(serial)].concat()
            }
            Self::Igb { hub } => card(&format!("igb,{rom}"), index, port, *hub),
            Self::Vmxnet { hub } => card(&format!("vmxnet3,{rom}"), index, port, *hub),
            Self::VirtioNet { hub } => card(&format!("{VIRTIO_NET},{rom}"), index, port, *hub),
            Self::Gpu => gpu(
                index,
                &format!("addr={slot:#x}"),
                "bochs-display",
                ",romfile=",
            ),
            Self::GpuOnBus => {
                let place = format!("bus=port{index},addr=0");
                let card = gpu(index, &place, "bochs-display", ",romfile=");
                [vec!["-device".into(), port], card].concat()
            }
            Self::Console => gpu(index, &format!("addr={slot:#x}"), "VGA", ""),
            Self::Usb { serial } => vec![
                "-device".into(),
                format!("qemu-xhci,id=dev{index},addr={slot:#x}"),
                "-blockdev".into(),
                format!("driver=null-co,node-name=stick{index},size=1048576"),
                "-device".into(),
                format!("usb-storage,bus=dev{index}.0,drive=stick{index},serial={serial}"),
                "-device".into(),
                format!("usb-kbd,bus=dev{index}.0"),
            ],
            Self::UsbWithoutMsix { serial, msi } => {
                let stick = disk_path(folder, serial);
                usb_without_msix(index, serial, *msi, &stick)
            }
            Self::Edu => vec![
                "-device".into(),
                format!("edu,id=dev{index},addr={slot:#x},dma_mask=0xffffffffffff"),
            ],
            Self::BigBar { mib } => vec![
                "-device".into(),
                format!("pci-testdev,id=dev{index},addr={slot:#x},membar={mib}M"),
            ],
        }
    }
}

/// A display of this `model` and its audio controller as number `index` of the machine, as two functions at a
/// `place`.
fn gpu(index: usize, place: &str, model: &str, more: &str) -> Vec<String> {
    vec![
        "-device".into(),
        format!("{model},id=dev{index},{place}.0,multifunction=on{more}"),
        "-device".into(),
        format!("intel-hda,id=dev{index}b,{place}.1"),
    ]
}

/// A USB controller as number `index` of the machine, and a stick with this serial and file.
fn usb_without_msix(index: usize, serial: &str, msi: bool, stick: &Path) -> Vec<String> {
    let slot = index + 0x10;
    let msi = if msi { "on" } else { "off" };
    vec![
        "-device".into(),
        format!("nec-usb-xhci,id=dev{index},addr={slot:#x},msix=off,msi={msi}"),
        "-blockdev".into(),
        format!(
            "driver=raw,node-name=stick{index},file.driver=file,file.filename={}",
            stick.display()
        ),
        "-device".into(),
        format!("usb-storage,bus=dev{index}.0,drive=stick{index},serial={serial}"),
    ]
}

/// How many bus numbers the host bridge of a NUMA node has; the first are those of the usual one.
const BUSES_OF_NODE: u8 = 0x20;

/// Through the IOMMU, as what is passed on has to be.
const VIRTIO_NET: &str = "virtio-net-pci,disable-legacy=on,iommu_platform=on,aer=on";

/// A network card of this model, with its settings, behind `port` and on a hub.
fn card(model: &str, index: usize, port: String, hub: u8) -> Vec<String> {
    vec![
        "-device".into(),
        port,
        "-netdev".into(),
        format!("hubport,id=net{index},hubid={hub}"),
        "-device".into(),
        format!("{model},id=dev{index},bus=port{index},netdev=net{index}"),
    ]
}

/// QEMU itself, among its unpacked packages.
pub fn program(tree: &Path) -> Result<PathBuf> {
    packages::find_in(tree, &["usr/bin/qemu-system-x86_64"])
}

/// The expansion ROM of the network cards that have one.
pub const NIC_ROM: &str = "GANTRY-NIC";

/// Where the expansion ROM of this name lies.
pub fn rom_path(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.rom"))
}

/// Where the disk with this serial lies.
pub fn disk_path(folder: &Path, serial: &str) -> PathBuf {
    folder.join(format!("{serial}.raw"))
}

/// Everything that makes one machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Unpacked packages that hold QEMU and its firmware.
    pub qemu: PathBuf,
    /// Kernel image of the lab host.
    pub kernel: PathBuf,
    /// Added to the kernel's command line.
    pub append: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u8,
    /// Whether the processors run beside each other; else they take turns.
    pub parallel: bool,
    /// Devices, in the order of their slots.
    pub devices: Vec<Device>,
    /// More arguments, after all others.
    pub more: Vec<String>,
    /// Folder of the initramfs (`initrd`), the disks, the console's log and QEMU's own.
    pub folder: PathBuf,
}

impl Machine {
    /// The kernel console's log.
    pub fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// QEMU's messages.
    pub fn messages(&self) -> PathBuf {
        self.folder.join("qemu.log")
    }

    fn arguments(&self) -> Vec<String> {
        let share = |place: &str| self.qemu.join(place).display().to_string();
        let mut arguments: Vec<String> = [
            "-L",
            &share("usr/share/qemu"),
            "-L",
            &share("usr/share/seabios"),
            "-M",
            "q35,kernel-irqchip=split",
            "-accel",
            match self.parallel {
                true => "tcg,thread=multi",
                false => "tcg,thread=single",
            },
            "-cpu",
            "max,+svm,+npt",
            "-smp",
            &self.cpus.to_string(),
            "-m",
            &format!("{}M", self.memory_mib),
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            &format!("file:{}", self.console().display()),
            // The agent's wire is QEMU's standard input, the monitor's its standard output: two
            // inherited sockets, so there is no path to agree on and nothing to clean up.
            "-chardev",
            "socket,id=agent,fd=0",
            "-chardev",
            "socket,id=monitor,fd=1",
            "-mon",
            "chardev=monitor,mode=control",
            "-device",
            "intel-iommu,intremap=on,aw-bits=48",
            "-device",
            "virtio-serial-pci,id=wire,addr=0x2",
            "-device",
            &format!("virtserialport,chardev=agent,name={PORT_NAME}"),
            "-kernel",
            &self.kernel.display().to_string(),
            "-initrd",
            &self.folder.join("initrd").display().to_string(),
            "-append",
            &format!(
                // Linux counts timer interrupts while it spins for 10 ticks, and panics for want of
                // four: on a machine with other work to do there may be fewer.
                "console=ttyS0 intel_iommu=on no_timer_check panic=-1 quiet rdinit=/init {}",
                self.append
            ),
        ]
        .map(str::to_owned)
        .to_vec();
        let on_node = |device: &Device| matches!(device, Device::NvmeOnNode { .. });
        if self.devices.iter().any(on_node) {
            arguments.extend(self.two_nodes());
        }
        for (index, device) in self.devices.iter().enumerate() {
            arguments.extend(device.arguments(index, &self.folder));
        }
        arguments.extend_from_slice(&self.more);
        arguments
    }

    /// Two NUMA nodes, the first with one processor.
    fn two_nodes(&self) -> Vec<String> {
        let half = self.memory_mib / 2;
        let node = |number: u8, cpus: String| {
            [
                "-object".to_owned(),
                format!("memory-backend-ram,id=ram{number},size={half}M"),
                "-numa".to_owned(),
                format!("node,nodeid={number},cpus={cpus},memdev=ram{number}"),
            ]
        };
        let others = format!("1-{}", self.cpus.saturating_sub(1));
        [node(0, "0".to_owned()), node(1, others)].concat()
    }

    /// Starts QEMU. The process dies with the returned value, and with this process.
    pub fn start(&self) -> Result<Running> {
        let (agent, theirs_agent) = UnixStream::pair()?;
        let (monitor, theirs_monitor) = UnixStream::pair()?;
        let binary = program(&self.qemu)?;
        // setpriv is part of every Debian: QEMU goes when we do, even by SIGKILL.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .args(packages::loader(&self.qemu)?)
            .arg(&binary)
            .args(self.arguments())
            .stdin(OwnedFd::from(theirs_agent))
            .stdout(OwnedFd::from(theirs_monitor))
            .stderr(fs::File::create(self.messages())?);
        let child = OwnedChild::spawn(&mut command)
            .with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(Running {
            child,
            agent,
            monitor,
        })
    }
}

/// A started machine.
#[derive(Debug)]
pub struct Running {
    /// QEMU.
    pub child: OwnedChild,
    /// The agent's wire.
    pub agent: UnixStream,
    /// The monitor's wire, which speaks QMP.
    pub monitor: UnixStream,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_slots_of_their_own() {
        let machine = Machine {
            qemu: "/q".into(),
            kernel: "/k".into(),
            append: "a=b".into(),
            memory_mib: 1024,
            cpus: 2,
            parallel: false,
            devices: Device::usual(),
            more: vec!["-device".into(), "e1000e".into()],
            folder: "/f".into(),
        };
        let arguments = machine.arguments();
        let all = arguments.join(" ");
        assert!(all.contains("bus=pcie.0,chassis=0,slot=0,addr=0x10"));
        assert!(all.contains("drive=disk1,serial=GANTRY-NVME0002"));
        assert!(all.contains("file.filename=/f/GANTRY-NVME0001.raw"));
        assert!(all.contains("bochs-display,id=dev4,addr=0x14.0,multifunction=on"));
        assert!(all.contains("rdinit=/init a=b"));
        assert!(all.ends_with("-device e1000e"));
        assert!(all.contains("-accel tcg,thread=single"));
        let parallel = Machine {
            parallel: true,
            ..machine
        };
        let parallel = parallel.arguments().join(" ");
        assert!(parallel.contains("-accel tcg,thread=multi"));
        // The IOMMU has to come before every device that it is to translate for.
        let position = |what: &str| arguments.iter().position(|a| a.starts_with(what)).unwrap();
        assert!(position("intel-iommu") < position("virtio-serial-pci"));
        assert!(position("intel-iommu") < position("nvme"));
    }
}
