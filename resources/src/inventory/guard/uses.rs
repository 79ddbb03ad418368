//! The host's uses of devices, as data and as sentences.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::base::bdf::HostBdf;

/// A use of a device by the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "use")]
pub enum HostUse {
    /// A file system on it is mounted.
    Mounted {
        /// The block device.
        #[serde(flatten)]
        on: OnBlock,
        /// Where it is mounted.
        at: String,
        /// At how many other places it is mounted.
        #[serde(skip_serializing_if = "is_zero")]
        others: usize,
    },
    /// The host swaps to it.
    Swap {
        /// The block device.
        #[serde(flatten)]
        on: OnBlock,
    },
    /// Another block device or a file system is built on it: LVM, md, dm-crypt, loop, btrfs.
    Member {
        /// The block device.
        block: String,
        /// What is built on it.
        of: String,
    },
    /// The host offers it to other machines or VMs: LIO, NVMe over Fabrics.
    Served {
        /// The block device, or the NVMe controller.
        #[serde(flatten)]
        on: OnBlock,
        /// What offers it.
        by: String,
    },
    /// A process has it open.
    Open {
        /// The device node's name below /dev.
        node: String,
        /// The process.
        pid: u32,
        /// Its name.
        process: String,
    },
    /// Something else has claimed it for itself (a ZFS pool, a program).
    Claimed {
        /// The block device.
        block: String,
    },
    /// Whether something has claimed it is unknown.
    Unsure {
        /// The block device.
        block: String,
        /// Why.
        why: String,
    },
    /// Its network interface is in another network namespace.
    OutOfSight {
        /// The driver.
        driver: String,
    },
    /// A default route goes through it.
    DefaultRoute {
        /// The network interface.
        #[serde(flatten)]
        via: Via,
    },
    /// A user is logged in over it (SSH).
    Session {
        /// The network interface.
        #[serde(flatten)]
        via: Via,
    },
    /// The host has an address on it.
    Address {
        /// The network interface.
        #[serde(flatten)]
        via: Via,
        /// The address.
        address: IpAddr,
    },
    /// A PPPoE session goes through it.
    Pppoe {
        /// The network interface.
        #[serde(flatten)]
        via: Via,
    },
    /// It carries the traffic of a tap device or a macvtap, as VMs have.
    Tap {
        /// The network interface.
        #[serde(flatten)]
        via: Via,
    },
    /// It is a port or a lower device of another interface: bridge, bond, VLAN, macvlan, Open vSwitch.
    Port {
        /// The network interface.
        interface: String,
        /// The other one.
        of: String,
    },
    /// It is the display that the firmware started.
    ConsoleDisplay,
    /// The console is drawn in its memory.
    Framebuffer,
    /// A console of the host is behind it.
    Console {
        /// The terminal.
        terminal: String,
    },
    /// The host has no other keyboard.
    Keyboard {
        /// The name in its descriptor.
        name: String,
    },
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// A block device of the device and, if the use is of another one that is built on it, that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OnBlock {
    /// The block device.
    pub block: String,
    /// The one that is used: a volume, a loop device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
}

impl fmt::Display for OnBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.of {
            Some(of) => write!(f, "{}; it backs {of}, which", self.block),
            None => write!(f, "{}, which", self.block),
        }
    }
}

/// A network interface of the device and, if the use is of another one that is connected to it, that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Via {
    /// The network interface.
    pub interface: String,
    /// The nearest interface on the path to the one with the use (bond, bridge), if that is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part_of: Option<String>,
    /// The interface with the use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
}

impl Via {
    /// The interface of a device, and the path from there to the one with the use.
    pub(super) fn new(interface: &str, path: &[String]) -> Self {
        Self {
            interface: interface.to_owned(),
            part_of: path.first().filter(|_| path.len() > 1).cloned(),
            of: path.last().cloned(),
        }
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let interface = &self.interface;
        match (&self.part_of, &self.of) {
            (Some(part_of), Some(of)) => {
                write!(f, "{interface}, part of {part_of}; {of}, connected to it,")
            }
            (_, Some(of)) => write!(f, "{interface}, part of {of}, which"),
            _ => write!(f, "{interface}, which"),
        }
    }
}

/// A device and its use by the host. Shown as a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Guarded {
    /// The device.
    pub bdf: HostBdf,
    /// The use.
    #[serde(flatten)]
    pub host_use: HostUse,
}

impl fmt::Display for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.bdf, self.host_use)
    }
}

impl fmt::Display for HostUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { on, at, others: 0 } => write!(f, "holds {on} is mounted at {at}"),
            Self::Mounted { on, at, others } => {
                write!(f, "holds {on} is mounted at {at} and {others} other places")
            }
            Self::Swap { on } => write!(f, "holds {on} the host swaps to"),
            Self::Member { block, of } => write!(f, "holds {block}, which backs {of}"),
            Self::Served { on, by } => write!(f, "holds {on} is served by {by}"),
            Self::Open { node, pid, process } => {
                write!(f, "holds {node}, which process {pid} ({process}) has open")
            }
            Self::Claimed { block } => write!(
                f,
                "holds {block}, which is in exclusive use: a file system, a pool, a volume or a program of \
                 the host has claimed it"
            ),
            Self::Unsure { block, why } => write!(
                f,
                "holds {block}, and gantry cannot tell whether the host uses it: {why}"
            ),
            Self::OutOfSight { driver } => write!(
                f,
                "is a network card ({driver}) whose interface is in another network namespace, as of a container"
            ),
            Self::DefaultRoute { via } => write!(f, "is {via} carries a default route"),
            Self::Session { via } => write!(f, "is {via} carries an SSH session"),
            Self::Address { via, address } => {
                write!(f, "is {via} is up with the address {address}")
            }
            Self::Pppoe { via } => write!(f, "is {via} carries a PPPoE session"),
            Self::Tap { via } => write!(f, "is {via} is a tap device, as VMs have"),
            Self::Port { interface, of } => write!(f, "is {interface}, part of {of}"),
            Self::ConsoleDisplay => {
                f.write_str("is the display that the firmware started (boot_vga)")
            }
            Self::Framebuffer => {
                f.write_str("holds the framebuffer that the console is drawn in (/proc/iomem)")
            }
            Self::Console { terminal } => write!(
                f,
                "is behind {terminal}, a console of the host (/sys/class/tty/console/active)"
            ),
            Self::Keyboard { name } => write!(f, "has the host's only keyboard, {name}"),
        }
    }
}
