//! Network interfaces that the host needs: those of default routes, SSH sessions, its addresses and its VMs; ports
//! of other interfaces; and cards whose interfaces are in other network namespaces.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::Path;

use super::interfaces::Interfaces;
use super::session;
use super::uses::{HostUse, Via};
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// The interfaces and their uses.
pub(super) struct Network<'a> {
    interfaces: Interfaces,
    default: BTreeSet<String>,
    sessions: BTreeSet<String>,
    pppoe: BTreeSet<String>,
    addressed: &'a BTreeMap<String, IpAddr>,
}

impl<'a> Network<'a> {
    /// Reads interfaces, routes and sessions. `addressed` are the interfaces that are up with an address.
    pub(super) fn read(
        paths: &HostPaths,
        addressed: &'a BTreeMap<String, IpAddr>,
    ) -> io::Result<Self> {
        let table = |name: &str| sysfs::table(&paths.proc.join("net").join(name));
        let (ipv4, ipv6) = (table("route")?, table("ipv6_route")?);
        let default = default_routes_v4(&ipv4).chain(default_routes_v6(&ipv6));
        Ok(Self {
            interfaces: Interfaces::read(paths)?,
            default: default.collect(),
            sessions: session::interfaces(&table("tcp")?, &table("tcp6")?, &ipv4),
            pppoe: pppoe(&table("pppoe")?),
            addressed,
        })
    }

    /// The uses of a device's interfaces, one each.
    pub(super) fn uses(&self, device: &Path) -> impl Iterator<Item = HostUse> {
        let below = self.interfaces.below(device);
        below.filter_map(|interface| self.use_of(interface))
    }

    /// The most important use of an interface, or of one connected to it; among equally important uses, the
    /// nearest.
    fn use_of(&self, interface: &str) -> Option<HostUse> {
        let connected = self.interfaces.connected(interface);
        let own = self.own_use(interface, Via::new(interface, &[]));
        let others = connected.iter().filter_map(|path| {
            let name = path.last()?;
            self.own_use(name, Via::new(interface, path))
        });
        let used = own.into_iter().chain(others).min_by_key(rank);
        used.or_else(|| {
            let of = self.interfaces.uppers(interface).next()?.clone();
            let interface = interface.to_owned();
            Some(HostUse::Port { interface, of })
        })
    }

    /// The use of an interface itself.
    fn own_use(&self, name: &str, via: Via) -> Option<HostUse> {
        if self.default.contains(name) {
            Some(HostUse::DefaultRoute { via })
        } else if self.sessions.contains(name) {
            Some(HostUse::Session { via })
        } else if let Some(&address) = self.addressed.get(name) {
            Some(HostUse::Address { via, address })
        } else if self.pppoe.contains(name) {
            Some(HostUse::Pppoe { via })
        } else if self.interfaces.is_tap(name) {
            Some(HostUse::Tap { via })
        } else {
            None
        }
    }
}

/// The interfaces of a device whose packets programs receive (packet(7)): an intrusion detection system, a switch
/// in user space, but also lldpd on every interface. Not a use by itself.
pub(super) fn listened_to(paths: &HostPaths, device: &Path) -> io::Result<Vec<String>> {
    let table = sysfs::table(&paths.proc.join("net/packet"))?;
    let index = |line: &str| line.split_whitespace().nth(4)?.parse::<u32>().ok();
    let bound: BTreeSet<u32> = table.lines().skip(1).filter_map(index).collect();
    let interfaces = Interfaces::read(paths)?;
    let below = interfaces.below(device);
    let is_bound = |name: &&str| {
        interfaces
            .index(name)
            .is_some_and(|own| bound.contains(&own))
    };
    Ok(below.filter(is_bound).map(str::to_owned).collect())
}

/// The most important use of an interface has the lowest rank.
fn rank(host_use: &HostUse) -> u8 {
    match host_use {
        HostUse::DefaultRoute { .. } => 0,
        HostUse::Session { .. } => 1,
        HostUse::Address { .. } => 2,
        HostUse::Pppoe { .. } => 3,
        _ => 4,
    }
}

/// Interfaces of /proc/net/route whose destination and mask are zero.
fn default_routes_v4(table: &str) -> impl Iterator<Item = String> {
    table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        default.then(|| fields.first().map(|name| (*name).to_owned()))?
    })
}

/// Interfaces of /proc/net/ipv6_route with a destination of length 0; `lo` has one that rejects.
fn default_routes_v6(table: &str) -> impl Iterator<Item = String> {
    table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [destination, bits, .., name] = fields.as_slice() else {
            return None;
        };
        let default =
            destination.bytes().all(|digit| digit == b'0') && *bits == "00" && *name != "lo";
        default.then(|| (*name).to_owned())
    })
}

/// Interfaces of /proc/net/pppoe: `00000001 52:54:00:12:34:56     eth0`. The ppp interface has the address,
/// and nothing in sysfs connects the two.
fn pppoe(table: &str) -> BTreeSet<String> {
    let names = table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(2));
    names.map(str::to_owned).collect()
}

/// Whether a device has an interface in another network namespace. The kernel keeps the directory `net` for
/// it, and shows the interface in its own namespace only. A device without that directory has no interface:
/// its driver, or that of its virtio device, is not loaded or made none.
pub(super) fn is_elsewhere(dir: &Path) -> io::Result<bool> {
    let mut hidden = false;
    let children = sysfs::entries(dir)?;
    let homes = children
        .iter()
        .map(|name| dir.join(name))
        .filter(|child| !child.is_symlink());
    for home in homes.chain([dir.to_owned()]) {
        let net = home.join("net");
        if net.is_dir() {
            if !sysfs::entries(&net)?.is_empty() {
                return Ok(false);
            }
            hidden = true;
        }
    }
    Ok(hidden)
}
