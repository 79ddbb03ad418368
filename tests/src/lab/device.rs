//! The devices of the simulated machine, and their QEMU command line.

use std::path::{Path, PathBuf};

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
    /// An NVMe disk as [`Device::Nvme`], behind a switch (104c:8232 and 104c:8233) behind a root port of its own.
    SwitchedNvme {
        /// At most 20 characters.
        serial: String,
    },
    /// A network card with INTx only (8086:100e), in the root complex.
    E1000 {
        /// Number of the hub.
        hub: u8,
    },
    /// A SATA controller with MSI (8086:2922) and a disk of 8 MiB, in the root complex; see [`super::disk`] for its
    /// contents.
    Ahci {
        /// Of the disk; at most 20 characters.
        serial: String,
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

    /// One of each kind that guests drive: disks at 01:00.0 and, behind a switch, 07:00.0, SR-IOV cards at 02:00.0
    /// and 03:00.0, a virtio one at 04:00.0, and from 00:15.0 on, each in a slot, what has no root port.
    pub fn of_each_kind() -> Vec<Self> {
        let serial = |number: u8| format!("GANTRY-DISK000{number}");
        let mut devices = vec![Self::nvme(&serial(1))];
        devices.extend([Self::Igb { hub: 0 }, Self::Igb { hub: 0 }]);
        devices.push(Self::VirtioNet { hub: 0 });
        devices.push(Self::SwitchedNvme { serial: serial(2) });
        devices.push(Self::E1000 { hub: 0 });
        devices.push(Self::Ahci { serial: serial(3) });
        devices.push(Self::UsbWithoutMsix {
            serial: serial(4),
            msi: true,
        });
        devices.extend([Self::Gpu, Self::Edu]);
        devices.extend([8, 64].map(|gib| Self::BigBar { mib: gib << 10 }));
        devices
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
            | Self::SwitchedNvme { serial }
            | Self::Ahci { serial }
            | Self::UsbWithoutMsix { serial, .. } => Some(serial),
            _ => None,
        }
    }

    /// The name of the expansion ROM that it has.
    pub fn rom(&self) -> Option<&str> {
        matches!(self, Self::Igb { .. }).then_some(NIC_ROM)
    }

    /// QEMU's arguments for what is behind the device as number `index` of the machine: a disk's file, a hub.
    pub(super) fn backend(&self, index: usize, folder: &Path) -> Vec<String> {
        let disk = |driver: &str| {
            let disk = format!("driver={driver},node-name=disk{index}");
            vec!["-blockdev".to_owned(), disk]
        };
        match self {
            // Unlike a -drive, it stays when the device is unplugged.
            Self::Nvme { serial }
            | Self::NvmeOnNode { serial, .. }
            | Self::SwitchedNvme { serial }
            | Self::Ahci { serial }
            | Self::UsbWithoutMsix { serial, .. } => {
                let file = disk_path(folder, serial);
                let file = file.display();
                disk(&format!("raw,file.driver=file,file.filename={file}"))
            }
            Self::Usb { .. } => disk("null-co,size=1048576"),
            Self::Igb { hub }
            | Self::Vmxnet { hub }
            | Self::VirtioNet { hub }
            | Self::E1000 { hub } => {
                let hub = format!("hubport,id=net{index},hubid={hub}");
                vec!["-netdev".to_owned(), hub]
            }
            Self::Gpu | Self::GpuOnBus | Self::Console | Self::Edu | Self::BigBar { .. } => {
                Vec::new()
            }
        }
    }

    /// QEMU's arguments for the device as number `index` of the machine.
    pub(super) fn arguments(&self, index: usize, folder: &Path) -> Vec<String> {
        let slot = index + 0x10;
        let port = format!(
            "pcie-root-port,id=port{index},bus=pcie.0,chassis={index},slot={index},addr={slot:#x}"
        );
        let rom = self.rom().map(|name| rom_path(folder, name));
        let rom = format!("romfile={}", rom.unwrap_or_default().display());
        let in_slot = |model: &str| format!("{model},id=dev{index},addr={slot:#x}");
        let nvme = |bus: &str| {
            let serial = self.disk().unwrap_or_default();
            format!("nvme,id=dev{index},bus={bus}{index},drive=disk{index},serial={serial}")
        };
        let card =
            |model: &str| format!("{model},id=dev{index},bus=port{index},netdev=net{index},{rom}");
        match self {
            Self::Nvme { .. } => devices([port, nvme("port")]),
            Self::NvmeOnNode { node, .. } => {
                let bus = BUSES_OF_NODE * (node + 1);
                devices([
                    format!("pxb-pcie,id=host{index},bus=pcie.0,bus_nr={bus},numa_node={node}"),
                    format!(
                        "pcie-root-port,id=port{index},bus=host{index},chassis={index},slot={index}"
                    ),
                    nvme("port"),
                ])
            }
            Self::SwitchedNvme { .. } => {
                [behind_switch(index, port), devices([nvme("down")])].concat()
            }
            Self::Igb { .. } => devices([port, card("igb")]),
            Self::Vmxnet { .. } => devices([port, card("vmxnet3")]),
            Self::VirtioNet { .. } => devices([port, card(VIRTIO_NET)]),
            Self::E1000 { .. } => devices([in_slot(&format!("e1000,netdev=net{index},{rom}"))]),
            Self::Ahci { serial } => devices([
                in_slot("ich9-ahci"),
                format!("ide-hd,bus=dev{index}.0,drive=disk{index},serial={serial}"),
            ]),
            Self::Gpu => gpu(
                index,
                &format!("addr={slot:#x}"),
                "bochs-display",
                ",romfile=",
            ),
            Self::GpuOnBus => {
                let card = gpu(
                    index,
                    &format!("bus=port{index},addr=0"),
                    "bochs-display",
                    ",romfile=",
                );
                [devices([port]), card].concat()
            }
            Self::Console => gpu(index, &format!("addr={slot:#x}"), "VGA", ""),
            Self::Usb { serial } => devices([
                in_slot("qemu-xhci"),
                format!("usb-storage,bus=dev{index}.0,drive=disk{index},serial={serial}"),
                format!("usb-kbd,bus=dev{index}.0"),
            ]),
            Self::UsbWithoutMsix { serial, msi } => {
                let msi = if *msi { "on" } else { "off" };
                devices([
                    in_slot(&format!("nec-usb-xhci,msix=off,msi={msi}")),
                    format!("usb-storage,bus=dev{index}.0,drive=disk{index},serial={serial}"),
                ])
            }
            Self::Edu => devices([in_slot("edu,dma_mask=0xffffffffffff")]),
            Self::BigBar { mib } => devices([in_slot(&format!("pci-testdev,membar={mib}M"))]),
        }
    }
}

/// A switch below the root port number `index` of the machine.
fn behind_switch(index: usize, port: String) -> Vec<String> {
    let upstream = format!("x3130-upstream,id=up{index},bus=port{index}");
    let slot = format!("chassis={},slot={index}", index + 0x10);
    let downstream = format!("xio3130-downstream,id=down{index},bus=up{index},{slot}");
    devices([port, upstream, downstream])
}

/// A display of this `model` and its audio controller as number `index` of the machine, as two functions at a
/// `place`.
fn gpu(index: usize, place: &str, model: &str, more: &str) -> Vec<String> {
    devices([
        format!("{model},id=dev{index},{place}.0,multifunction=on{more}"),
        format!("intel-hda,id=dev{index}b,{place}.1"),
    ])
}

/// QEMU's arguments for these devices.
fn devices<const N: usize>(devices: [String; N]) -> Vec<String> {
    devices.map(|one| ["-device".to_owned(), one]).concat()
}

/// How many bus numbers the host bridge of a NUMA node has; the first are those of the usual one.
const BUSES_OF_NODE: u8 = 0x20;

/// Through the IOMMU, as what is passed on has to be.
const VIRTIO_NET: &str = "virtio-net-pci,disable-legacy=on,iommu_platform=on,aer=on";

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
