//! The host's NUMA nodes: what each has, and which share a processor socket.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::numbers::Numbers;
use crate::base::sysfs;

/// A NUMA node of the host (Documentation/ABI/stable/sysfs-devices-node).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostNode {
    /// Its number.
    pub number: u32,
    /// Its processors; none in a node that is memory only.
    pub cpus: Numbers,
    /// Its memory in bytes; none where the kernel does not show it.
    pub memory: Option<u64>,
    /// Bytes that are free, or would be without the page cache.
    pub available: Option<u64>,
}

/// The nodes of the host, in their order.
///
/// # Errors
/// sysfs cannot be read.
pub fn host_nodes(paths: &HostPaths) -> io::Result<Vec<HostNode>> {
    let directory = paths.sysfs.join("devices/system/node");
    let mut nodes = Vec::new();
    for name in sysfs::entries(&directory)? {
        let Some(number) = name.strip_prefix("node").and_then(|n| n.parse().ok()) else {
            continue;
        };
        let node = directory.join(&name);
        let cpus = sysfs::text(&node.join("cpulist"))?.unwrap_or_default();
        let memory = Meminfo(sysfs::table(&node.join("meminfo"))?);
        nodes.push(HostNode {
            number,
            cpus: cpus.parse().map_err(io::Error::other)?,
            memory: memory.of("MemTotal"),
            available: memory.available(),
        });
    }
    nodes.sort_by_key(|node| node.number);
    Ok(nodes)
}

/// A node's `meminfo`, with lines such as `Node 0 MemTotal: 1024 kB`.
struct Meminfo(String);

impl Meminfo {
    /// A field in bytes.
    fn of(&self, name: &str) -> Option<u64> {
        let kib = self.0.lines().find_map(|line| {
            let (field, amount) = line.split_once(':')?;
            let named = field.rsplit(' ').next() == Some(name);
            let amount = named.then(|| amount.trim().strip_suffix("kB"))??;
            amount.trim().parse::<u64>().ok()
        });
        kib?.checked_mul(1024)
    }

    /// An estimate of the node's part of `MemAvailable`, which the kernel shows for the whole host only.
    fn available(&self) -> Option<u64> {
        let caches = ["Active(file)", "Inactive(file)", "SReclaimable"];
        let caches = caches.iter().filter_map(|name| self.of(name));
        Some(caches.fold(self.of("MemFree")?, u64::saturating_add))
    }
}

/// The online processors; none where the kernel does not show them.
pub fn online_cpus(paths: &HostPaths) -> Option<Numbers> {
    let online = sysfs::text(&paths.sysfs.join("devices/system/cpu/online"));
    online.ok().flatten()?.parse().ok()
}

/// The NUMA node of a device, for a mediated device that of its parent. None where the host does not show it.
pub fn node_of(paths: &HostPaths, device: DeviceName) -> Option<u32> {
    let owner = match device {
        DeviceName::Pci(bdf) => paths.pci_device(bdf),
        DeviceName::Mdev(uuid) => {
            let link = paths.mdev(uuid);
            link.canonicalize().ok()?.parent()?.to_owned()
        }
    };
    sysfs::decimal(&owner.join("numa_node")).ok().flatten()
}

/// The socket of each NUMA node with processors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sockets(BTreeMap<u32, u32>);

impl Sockets {
    /// Reads the socket of the first processor of each node.
    pub(crate) fn read(paths: &HostPaths) -> io::Result<Self> {
        let cpus = paths.sysfs.join("devices/system/cpu");
        let mut sockets = BTreeMap::new();
        for node in host_nodes(paths)? {
            let Some(first) = node.cpus.first() else {
                continue;
            };
            let package = cpus.join(format!("cpu{first}/topology/physical_package_id"));
            if let Some(socket) = sysfs::decimal(&package)? {
                sockets.insert(node.number, socket);
            }
        }
        Ok(Self(sockets))
    }

    /// Whether a node shares a socket with one of these nodes.
    pub(crate) fn share(&self, node: u32, nodes: &BTreeSet<u32>) -> bool {
        let socket = self.0.get(&node);
        nodes
            .iter()
            .any(|other| *other == node || (socket.is_some() && self.0.get(other) == socket))
    }
}

impl FromIterator<(u32, u32)> for Sockets {
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(nodes: I) -> Self {
        Self(nodes.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::FakeHost;

    #[test]
    fn nodes_of_one_socket_are_found() {
        let host = FakeHost::new(&[]);
        for (node, cpus, first, socket) in [
            (0, "0-15,64-79", 0, 0),
            (1, "16-31", 16, 0),
            (2, "32", 32, 1),
        ] {
            host.file(&format!("sys/devices/system/node/node{node}/cpulist"), cpus);
            let package = format!("sys/devices/system/cpu/cpu{first}/topology/physical_package_id");
            host.file(&package, &socket.to_string());
        }
        host.file("sys/devices/system/node/node3/cpulist", "\n");
        host.file("sys/devices/system/node/possible", "0-3");
        let sockets = Sockets::read(&host.paths).unwrap();
        assert_eq!(sockets, [(0, 0), (1, 0), (2, 1)].into_iter().collect());
        let shared = |node| sockets.share(node, &BTreeSet::from([0]));
        assert_eq!([0, 1, 2, 3].map(shared), [true, true, false, false]);
        assert!(sockets.share(3, &BTreeSet::from([3])));
    }

    #[test]
    fn nodes_say_what_they_have() {
        let host = FakeHost::new(&[]);
        let node = |number: u32, file: &str, text: &str| {
            host.file(
                &format!("sys/devices/system/node/node{number}/{file}"),
                text,
            );
        };
        node(10, "cpulist", "\n");
        node(2, "cpulist", "4-7\n");
        let meminfo = "\nNode 2 MemTotal:        2048 kB\nNode 2 MemFree:  1 kB\n\
            Node 2 Active(file): 20 kB\nNode 2 Active: 99 kB\nNode 2 SReclaimable: 3 kB\n";
        node(2, "meminfo", meminfo);
        host.file("sys/devices/system/node/has_cpu", "2");
        let nodes = host_nodes(&host.paths).unwrap();
        assert_eq!(
            nodes,
            [
                HostNode {
                    number: 2,
                    cpus: (4..8).collect(),
                    memory: Some(2 << 20),
                    available: Some((1 + 20 + 3) << 10),
                },
                HostNode {
                    number: 10,
                    cpus: Numbers::default(),
                    memory: None,
                    available: None,
                },
            ]
        );
        node(3, "cpulist", "4-");
        assert!(host_nodes(&host.paths).is_err());
    }
}
