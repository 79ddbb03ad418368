//! Which NUMA nodes share a processor socket.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::host::HostPaths;
use crate::sysfs;

/// The socket of each NUMA node with processors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sockets(BTreeMap<u32, u32>);

impl Sockets {
    /// Reads the first processor of each node, and its socket.
    pub(crate) fn read(paths: &HostPaths) -> io::Result<Self> {
        let system = paths.sysfs.join("devices/system");
        let mut sockets = BTreeMap::new();
        for name in sysfs::entries(&system.join("node"))? {
            let Some(node) = name.strip_prefix("node").and_then(|n| n.parse().ok()) else {
                continue;
            };
            let list = sysfs::text(&system.join("node").join(&name).join("cpulist"))?;
            let digits = |c: char| c.is_ascii_digit();
            let first = list.as_deref().unwrap_or_default();
            let first = &first[..first.find(|c| !digits(c)).unwrap_or(first.len())];
            let package = system.join(format!("cpu/cpu{first}/topology/physical_package_id"));
            if let Some(socket) = sysfs::decimal(&package)? {
                sockets.insert(node, socket);
            }
        }
        Ok(Self(sockets))
    }

    /// Whether a node shares a socket with one of some nodes.
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
}
