//! Network interfaces that the host needs: those of default routes, of people logged in, of its addresses;
//! what they are made of, and cards that show none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::{HostUse, session};
use crate::host::HostPaths;
use crate::inventory::HostDevice;
use crate::sysfs;

/// What interfaces are used for, one use each, by their places in the device tree.
pub(super) struct Network(BTreeMap<PathBuf, HostUse>);

impl Network {
    /// Reads routes and sessions. `addressed` are the interfaces that are up with an address.
    pub(super) fn read(
        paths: &HostPaths,
        addressed: &BTreeMap<String, IpAddr>,
    ) -> io::Result<Self> {
        let table = |name: &str| sysfs::table(&paths.proc.join("net").join(name));
        let (ipv4, ipv6) = (table("route")?, table("ipv6_route")?);
        let default = default_routes_v4(&ipv4).chain(default_routes_v6(&ipv6));
        let default: BTreeSet<String> = default.collect();
        let sessions = session::interfaces(&table("tcp")?, &table("tcp6")?, &ipv4);
        let mut uses = BTreeMap::new();
        let mut mark = |names: &BTreeSet<String>,
                        used: &dyn Fn(String, Option<String>) -> HostUse| {
            for Interface { name, of, path } in made_of(paths, names)? {
                uses.entry(path).or_insert_with(|| used(name, of));
            }
            Ok::<(), io::Error>(())
        };
        mark(&default, &|interface, of| HostUse::DefaultRoute {
            interface,
            of,
        })?;
        mark(&sessions, &|interface, of| HostUse::Session {
            interface,
            of,
        })?;
        for (name, &address) in addressed {
            mark(&[name.clone()].into(), &|interface, of| HostUse::Address {
                interface,
                of,
                address,
            })?;
        }
        Ok(Self(uses))
    }

    /// What the interfaces of a device are used for.
    pub(super) fn below(&self, device: &Path) -> impl Iterator<Item = HostUse> {
        let below = self.0.iter();
        let below = below.filter(move |(path, _)| path.starts_with(device));
        below.map(|(_, host_use)| host_use.clone())
    }
}

/// An interface that something goes through.
struct Interface {
    name: String,
    /// The one that it goes through, where this is a part of it.
    of: Option<String>,
    /// Its place in the device tree.
    path: PathBuf,
}

/// These interfaces and those that they are made of (bridge, bond, VLAN).
fn made_of(paths: &HostPaths, names: &BTreeSet<String>) -> io::Result<Vec<Interface>> {
    let mut waiting: Vec<(String, Option<String>)> =
        names.iter().map(|name| (name.clone(), None)).collect();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    while let Some((name, of)) = waiting.pop() {
        let link = paths.sysfs.join("class/net").join(&name);
        if !seen.insert(name.clone()) {
            continue;
        }
        let top = of.as_ref().unwrap_or(&name);
        waiting.extend(
            sysfs::entries(&link)?
                .iter()
                .filter_map(|entry| entry.strip_prefix("lower_"))
                .map(|below| (below.to_owned(), Some(top.clone()))),
        );
        if let Ok(path) = fs::canonicalize(&link) {
            found.push(Interface { name, of, path });
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

/// Interfaces of /proc/net/route whose destination and mask are zero.
fn default_routes_v4(table: &str) -> impl Iterator<Item = String> {
    table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        default.then(|| fields.first().map(|name| (*name).to_owned()))?
    })
}

/// Interfaces of /proc/net/ipv6_route with a destination of no bits; `lo` has one that rejects.
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

/// The driver of a network card that shows no interface: sysfs shows those of one network namespace.
pub(super) fn out_of_sight(dir: &Path, device: &HostDevice) -> io::Result<Option<String>> {
    let is_network = matches!(
        (device.class.base(), device.class.sub()),
        (0x02, 0x00 | 0x80)
    );
    let driver = device.driver.clone();
    let Some(driver) = driver.filter(|_| is_network && !device.on_vfio()) else {
        return Ok(None);
    };
    // The interface of a virtio card hangs below its virtio device.
    let below = sysfs::entries(dir)?;
    let below = below.iter().filter(|name| name.starts_with("virtio"));
    for home in below.map(|name| dir.join(name)).chain([dir.to_owned()]) {
        if !sysfs::entries(&home.join("net"))?.is_empty() {
            return Ok(None);
        }
    }
    Ok(Some(driver))
}
