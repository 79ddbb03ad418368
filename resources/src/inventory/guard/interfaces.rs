//! The network interfaces of this network namespace, and the connections between them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::graph;
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// The interfaces, by name.
pub(super) struct Interfaces(BTreeMap<String, Interface>);

/// An interface and its neighbours. A neighbour may be outside of this namespace.
#[derive(Default)]
struct Interface {
    /// Its path in the device tree; none if only other interfaces name it.
    dir: Option<PathBuf>,
    /// What it is a port or a lower device of: bridge, bond, team, VLAN, macvlan, VRF, Open vSwitch.
    uppers: BTreeSet<String>,
    lowers: BTreeSet<String>,
    /// The other end of a veth pair.
    peers: BTreeSet<String>,
    /// Programs exchange packets through it: a tap or tun device, or a macvtap.
    is_tap: bool,
    index: Option<u32>,
}

impl Interfaces {
    pub(super) fn read(paths: &HostPaths) -> io::Result<Self> {
        let class = paths.sysfs.join("class/net");
        let mut all = Self(BTreeMap::new());
        let mut links = BTreeMap::new();
        for name in sysfs::entries(&class)? {
            // An interface may vanish while it is read, and `bonding_masters` is none.
            let dir = fs::canonicalize(class.join(&name));
            let Some(dir) = dir.ok().filter(|dir| dir.is_dir()) else {
                continue;
            };
            all.read_neighbours(&name, &dir)?;
            let number = |file: &str| sysfs::decimal::<u32>(&dir.join(file)).ok().flatten();
            let index = number("ifindex");
            if let (Some(own), Some(link)) = (index, number("iflink")) {
                links.insert(own, (link, name.clone()));
            }
            let own = all.0.entry(name).or_default();
            own.is_tap = dir.join("tun_flags").exists() || dir.join("macvtap").exists();
            own.index = index;
            own.dir = Some(dir);
        }
        // `iflink` may be a number in another network namespace, unless the two name each other.
        for (own, (link, name)) in &links {
            if let Some((back, peer)) = links.get(link)
                && back == own
                && link != own
            {
                let one = all.0.entry(name.clone()).or_default();
                one.peers.insert(peer.clone());
            }
        }
        Ok(all)
    }

    /// The kernel shows most relations at both ends, and some at one only: ports of Open vSwitch and of
    /// old bridges, child interfaces of InfiniBand.
    fn read_neighbours(&mut self, name: &str, dir: &Path) -> io::Result<()> {
        for entry in sysfs::entries(dir)? {
            if let Some(upper) = entry.strip_prefix("upper_") {
                self.put(name, upper);
            } else if let Some(lower) = entry.strip_prefix("lower_") {
                self.put(lower, name);
            }
        }
        for link in ["master", "brport/bridge"] {
            if let Some(master) = sysfs::link_name(&dir.join(link))? {
                self.put(name, &master);
            }
        }
        let slaves = sysfs::text(&dir.join("bonding/slaves")).ok().flatten();
        for slave in slaves.iter().flat_map(|names| names.split_whitespace()) {
            self.put(slave, name);
        }
        for port in sysfs::entries(&dir.join("brif"))? {
            self.put(&port, name);
        }
        if let Some(parent) = sysfs::text(&dir.join("parent")).ok().flatten() {
            self.put(&parent, name);
        }
        Ok(())
    }

    fn put(&mut self, lower: &str, upper: &str) {
        let below = self.0.entry(lower.to_owned()).or_default();
        below.uppers.insert(upper.to_owned());
        let above = self.0.entry(upper.to_owned()).or_default();
        above.lowers.insert(lower.to_owned());
    }

    /// The interfaces of a device, which has this path in the device tree.
    pub(super) fn below(&self, device: &Path) -> impl Iterator<Item = &str> {
        let is_below =
            move |one: &Interface| one.dir.as_ref().is_some_and(|dir| dir.starts_with(device));
        let below = self.0.iter().filter(move |(_, one)| is_below(one));
        below.map(|(name, _)| name.as_str())
    }

    pub(super) fn index(&self, name: &str) -> Option<u32> {
        self.0.get(name)?.index
    }

    pub(super) fn is_tap(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|one| one.is_tap)
    }

    /// The interfaces whose port or lower device this one is.
    pub(super) fn uppers(&self, name: &str) -> impl Iterator<Item = &String> {
        self.0.get(name).into_iter().flat_map(|one| &one.uppers)
    }

    /// All interfaces connected to this one by traffic, with the paths to them.
    pub(super) fn connected(&self, name: &str) -> Vec<Vec<String>> {
        graph::paths_from(name, |name| {
            let one = self.0.get(name).into_iter();
            one.flat_map(|one| one.uppers.iter().chain(&one.lowers).chain(&one.peers))
                .cloned()
                .collect()
        })
    }
}
