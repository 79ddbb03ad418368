//! Taps: interfaces of the host whose other end is a descriptor (Documentation/networking/tuntap.rst).
#![allow(unsafe_code)] // The requests of /dev/net/tun.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use gantry_resources::base::HostPaths;
use gantry_resources::base::rtnetlink;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use crate::config::{NetConfig, TapConfig};

/// The name of a tap that gantry makes: the kernel puts a number in.
const PATTERN: &str = "gantry%d";
/// Bytes of the header before each packet: that of virtio 1.
const HEADER: libc::c_int = 12;
/// `IFF_UP` (netdevice(7)).
const UP: u32 = libc::IFF_UP as u32;
/// What our taps are: no bytes but the packet's before it, and those of virtio.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// Bytes of an interface's name, with its end mark.
const NAME_LEN: usize = libc::IFNAMSIZ;

/// Why a VM cannot have a tap, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is no such interface.
    #[error(
        "tap: the host has no interface {name}: make it with `ip tuntap add {name} mode tap{}` (and `user USER` for a \
         VM that root does not run), then `ip link set {name} up` and `ip link set {name} master BRIDGE`; without the \
         key `tap`, gantry makes one", multi_queue(*several)
    )]
    Missing {
        /// The interface.
        name: String,
        /// Whether it is to have several queues.
        several: bool,
    },
    /// It is another kind of interface.
    #[error("tap: {name} is no tap: name an interface that `ip tuntap add NAME mode tap` has made")]
    Kind {
        /// The interface.
        name: String,
    },
    /// It has one queue only.
    #[error(
        "num_queues: {name} was made with one queue in each direction: make it with `ip tuntap add {name} mode tap \
         multi_queue`, or use 2"
    )]
    OneQueue {
        /// The interface.
        name: String,
    },
    /// Somebody else has it.
    #[error(
        "tap: {name} is in use by another process, most likely a VM that runs (`gantry vm list`): name another"
    )]
    InUse {
        /// The interface.
        name: String,
    },
    /// It is another user's.
    #[error(
        "tap: this user may not open {name}: make it with `ip tuntap add {name} mode tap user USER`, as root"
    )]
    NotPermitted {
        /// The interface.
        name: String,
    },
    /// Only root may make one.
    #[error(
        "only root may make a tap: as root, `ip tuntap add tap0 mode tap user USER && ip link set tap0 up`, and add \
         `\"tap\": \"tap0\"`"
    )]
    MayNotMake,
    /// It is down.
    #[error(
        "tap: {name} is down, and this user may not change that: `ip link set {name} up`, as root"
    )]
    Down {
        /// The interface.
        name: String,
    },
    /// The guest would send packets that it does not take.
    #[error(
        "mtu: {name} takes packets of {has} bytes at most: `ip link set {name} mtu {wanted}`, or use less"
    )]
    Mtu {
        /// The interface.
        name: String,
        /// Its MTU.
        has: u32,
        /// That of the guest.
        wanted: u16,
    },
    /// The node of all taps cannot be opened.
    #[error("cannot open {}: {source}: {}", path.display(), node_help(source))]
    Node {
        /// The node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("cannot {what} {name}: {source}")]
    Refused {
        /// The interface.
        name: String,
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn multi_queue(several: bool) -> &'static str {
    if several { " multi_queue" } else { "" }
}

fn node_help(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            "let this user open it: `chmod 666 /dev/net/tun`, as on any Debian"
        }
        _ => "load its module with `modprobe tun`",
    }
}

/// What is wrong with a name of an interface, if anything (`dev_valid_name` in the kernel).
pub fn interface_name_flaw(name: &str) -> Option<&'static str> {
    let odd = |char: char| char == '/' || char == ':' || char == '%' || char.is_whitespace();
    match name {
        "" => Some("it is empty"),
        "." | ".." => Some("no interface is called so"),
        name if name.len() >= NAME_LEN => Some("it has more than 15 bytes"),
        name if name.contains(odd) => Some("it has a character that no interface's name has"),
        _ => None,
    }
}

/// An open tap: an interface of the host, which is up.
#[derive(Debug)]
pub struct Tap {
    /// One for each of its queues.
    queues: Vec<File>,
    mtu: u16,
}

impl Tap {
    /// Opens the tap of a network, or makes one, which ends with the last descriptor of it.
    ///
    /// # Errors
    /// It is missing, not permitted, in use, or not as the network needs it.
    pub fn open(config: &NetConfig, host: &HostPaths) -> Result<Self, TapError> {
        let several = config.pairs > 1;
        let (pattern, has_several) = match &config.tap {
            TapConfig::Named(name) => (&**name, look_at(name, several, host)?),
            TapConfig::Made { .. } => (PATTERN, several),
        };
        let made = matches!(config.tap, TapConfig::Made { .. });
        let mut name = pattern.to_owned();
        let mut queues = Vec::new();
        for _ in 0..config.pairs {
            let (queue, called) = open_queue(&name, has_several, made, host)?;
            queues.push(queue);
            name = called;
        }
        let interface = Interface::of(name, host);
        let mtu = match &config.tap {
            TapConfig::Named(_) => interface.as_it_is(config.mtu)?,
            TapConfig::Made { address } => {
                interface.set_up(config.mtu)?;
                if let Some((address, prefix)) = *address {
                    let given = rtnetlink::add_address(interface.index()?, address, prefix);
                    given.map_err(interface.refused("give an address to"))?;
                }
                config.mtu.unwrap_or(interface.mtu()?)
            }
        };
        Ok(Self { queues, mtu })
    }

    /// Its queues, one for each pair of the guest's.
    pub fn queues(&self) -> &[File] {
        &self.queues
    }

    /// Bytes of the largest packet.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Has the host's side send what a driver with these features can take.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let flags = offload_flags(features);
        let Some(queue) = self.queues.first() else {
            return Ok(());
        };
        // SAFETY: the request takes its argument as a number; the descriptor is open.
        let set = unsafe { ioctl_with_val(queue, libc::TUNSETOFFLOAD, flags.into()) };
        checked(set)
    }

    /// Has a queue take packets, or not.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn attach(&self, queue: usize, attached: bool) -> io::Result<()> {
        let Some(queue) = self.queues.get(queue) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let mut request = Request::new("");
        request.flags = match attached {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        } as libc::c_short;
        // SAFETY: the kernel reads a `struct ifreq`, which the request is as large as; the descriptor is open.
        let set = unsafe { ioctl_with_ref(queue, libc::TUNSETQUEUE, &request) };
        checked(set)
    }
}

/// The `TUN_F_*` flags that go with a driver's features.
fn offload_flags(features: u64) -> libc::c_uint {
    let flags = [
        (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    ];
    let accepted = flags.iter().filter(|(bit, _)| features & 1 << bit != 0);
    accepted.fold(0, |flags, (_, flag)| flags | flag)
}

/// `struct ifreq`, as far as taps need it.
#[repr(C)]
struct Request {
    name: [u8; NAME_LEN],
    flags: libc::c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

impl Request {
    /// For the interface of this name, which is cut to the length of one.
    fn new(name: &str) -> Self {
        let mut bytes = [0; NAME_LEN];
        for (byte, char) in bytes.iter_mut().take(NAME_LEN - 1).zip(name.bytes()) {
            *byte = char;
        }
        Self {
            name: bytes,
            flags: 0,
            rest: [0; 22],
        }
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0);
        let name = self.name.get(..end.unwrap_or(NAME_LEN)).unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    match result {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// What is wrong with an interface as the tap of a network. Returns whether it was made for several queues.
fn look_at(name: &str, several: bool, host: &HostPaths) -> Result<bool, TapError> {
    let interface = Interface::of(name.to_owned(), host);
    let name = || name.to_owned();
    if !interface.folder.exists() {
        let name = name();
        return Err(TapError::Missing { name, several });
    }
    let flags = interface.number("tun_flags").unwrap_or(0) as libc::c_int;
    if flags & libc::IFF_TAP == 0 {
        return Err(TapError::Kind { name: name() });
    }
    let has_several = flags & libc::IFF_MULTI_QUEUE != 0;
    if several && !has_several {
        return Err(TapError::OneQueue { name: name() });
    }
    // One with several queues would take ours beside those of another process.
    match interface.number("carrier") {
        Some(1) => Err(TapError::InUse { name: name() }),
        _ => Ok(has_several),
    }
}

/// Opens one queue; the queue, and the name of the interface.
fn open_queue(
    name: &str,
    several: bool,
    make: bool,
    host: &HostPaths,
) -> Result<(File, String), TapError> {
    let path = host.dev.join("net/tun");
    let opened = File::options().read(true).write(true).open(&path);
    let queue = opened.map_err(|source| TapError::Node { path, source })?;
    let mut request = Request::new(name);
    let flags = match several {
        true => FLAGS | libc::IFF_MULTI_QUEUE,
        false => FLAGS,
    };
    request.flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes a `struct ifreq`, which the request is as large as; the descriptor is open.
    let set = unsafe { ioctl_with_mut_ref(&queue, libc::TUNSETIFF, &mut request) };
    let name = request.name();
    checked(set).map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::InUse { name: name.clone() },
        Some(libc::EPERM) if make => TapError::MayNotMake,
        Some(libc::EPERM) => TapError::NotPermitted { name: name.clone() },
        _ => TapError::Refused {
            name: name.clone(),
            what: "open a queue of",
            source,
        },
    })?;
    // SAFETY: the kernel reads an int; the descriptor is open.
    let set = unsafe { ioctl_with_ref(&queue, libc::TUNSETVNETHDRSZ, &HEADER) };
    checked(set).map_err(|source| TapError::Refused {
        name: name.clone(),
        what: "set the length of virtio's header on",
        source,
    })?;
    Ok((queue, name))
}

/// An interface of the host.
struct Interface {
    name: String,
    folder: PathBuf,
}

impl Interface {
    fn of(name: String, host: &HostPaths) -> Self {
        let folder = host.sysfs.join("class/net").join(&name);
        Self { name, folder }
    }

    /// A number that sysfs has of it, decimal or hexadecimal.
    fn number(&self, attribute: &str) -> Option<u32> {
        let text = fs::read_to_string(self.folder.join(Path::new(attribute))).ok()?;
        match text.trim().strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => text.trim().parse().ok(),
        }
    }

    fn index(&self) -> Result<u32, TapError> {
        let gone = || self.refused("find")(io::ErrorKind::NotFound.into());
        self.number("ifindex").ok_or_else(gone)
    }

    /// Its MTU, as a guest can be told of it.
    fn mtu(&self) -> Result<u16, TapError> {
        let gone = || self.refused("find")(io::ErrorKind::NotFound.into());
        let mtu = self.number("mtu").ok_or_else(gone)?;
        Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
    }

    fn refused(&self, what: &'static str) -> impl FnOnce(io::Error) -> TapError + use<> {
        let name = self.name.clone();
        move |source| TapError::Refused { name, what, source }
    }

    fn set_up(&self, mtu: Option<u16>) -> Result<(), TapError> {
        let set = rtnetlink::set_up(self.index()?, mtu);
        set.map_err(self.refused("set up"))
    }

    /// Leaves it as somebody has made it, but up. Returns the guest's MTU, which is `wanted` or its own.
    fn as_it_is(&self, wanted: Option<u16>) -> Result<u16, TapError> {
        let has = self.mtu()?;
        if let Some(wanted) = wanted.filter(|wanted| *wanted > has) {
            return Err(TapError::Mtu {
                name: self.name.clone(),
                has: has.into(),
                wanted,
            });
        }
        if self.number("flags").is_none_or(|flags| flags & UP == 0) {
            rtnetlink::set_up(self.index()?, None).map_err(|source| match source.kind() {
                io::ErrorKind::PermissionDenied => TapError::Down {
                    name: self.name.clone(),
                },
                _ => self.refused("set up")(source),
            })?;
        }
        Ok(wanted.unwrap_or(has))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What sysfs says of interfaces.
    fn host() -> (tempfile::TempDir, HostPaths) {
        let folder = tempfile::tempdir().unwrap();
        let host = HostPaths::under(folder.path());
        for (name, attributes) in [
            ("eth0", &[("mtu", "1500")][..]),
            ("tun0", &[("tun_flags", "0x5001")]),
            ("tap0", &[("tun_flags", "0x1002"), ("carrier", "0")]),
            ("tap1", &[("tun_flags", "0x5102")]),
            ("tap2", &[("tun_flags", "0x5102"), ("carrier", "1")]),
            (
                "tap3",
                &[("mtu", "1500"), ("flags", "0x1003"), ("ifindex", "3")],
            ),
        ] {
            let interface = host.sysfs.join("class/net").join(name);
            fs::create_dir_all(&interface).unwrap();
            for (attribute, text) in attributes {
                fs::write(interface.join(attribute), format!("{text}\n")).unwrap();
            }
        }
        (folder, host)
    }

    #[test]
    fn what_is_no_tap_for_a_vm_is_told_with_its_remedy() {
        let (_folder, host) = host();
        let look = |name, several| look_at(name, several, &host).map_err(|error| error.to_string());
        assert_eq!(look("tap0", false), Ok(false));
        assert_eq!(look("tap1", true), Ok(true));
        assert_eq!(look("tap1", false), Ok(true));
        for (name, several, words) in [
            ("none", false, "`ip tuntap add none mode tap` (and"),
            (
                "none",
                true,
                "`ip tuntap add none mode tap multi_queue` (and",
            ),
            ("eth0", false, "tap: eth0 is no tap"),
            ("tun0", false, "tap: tun0 is no tap"),
            ("tap0", true, "num_queues: tap0 was made with one queue"),
            ("tap2", true, "tap: tap2 is in use by another process"),
        ] {
            let said = look(name, several).unwrap_err();
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn a_guest_has_the_mtu_of_its_tap_or_a_smaller_one() {
        let (_folder, host) = host();
        let tap = Interface::of("tap3".to_owned(), &host);
        assert_eq!(tap.as_it_is(None).unwrap(), 1500);
        assert_eq!(tap.as_it_is(Some(1400)).unwrap(), 1400);
        let said = tap.as_it_is(Some(9000)).unwrap_err().to_string();
        assert!(said.contains("`ip link set tap3 mtu 9000`"), "{said}");
    }

    #[test]
    fn names_of_interfaces_are_those_that_the_kernel_takes() {
        for name in ["tap0", "vm-web.1", "fifteen-letters"] {
            assert_eq!(interface_name_flaw(name), None);
        }
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a:b",
            "tap%d",
            "sixteen-letters-",
        ] {
            assert!(interface_name_flaw(name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_driver_without_offloads_gets_none() {
        assert_eq!(offload_flags(0), 0);
        assert_eq!(
            offload_flags(1 << VIRTIO_NET_F_GUEST_CSUM),
            libc::TUN_F_CSUM
        );
        assert_eq!(offload_flags(u64::MAX), 0x1f);
    }
}
