//! The host's uses of block devices and other device nodes.

use std::io;
use std::path::{Path, PathBuf};

use super::blocks::Blocks;
use super::claim::claim;
use super::mounts::Mounts;
use super::nodes::{self, Node};
use super::served::{Served, served};
use super::uses::{HostUse, OnBlock};
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;

/// The block devices of the host, its other nodes, and their uses.
pub(super) struct Storage {
    blocks: Blocks,
    mounts: Mounts,
    served: Vec<Served>,
    nodes: Vec<Node>,
}

impl Storage {
    pub(super) fn read(paths: &HostPaths) -> io::Result<Self> {
        let blocks = Blocks::read(paths)?;
        Ok(Self {
            mounts: Mounts::read(paths, &blocks)?,
            served: served(paths),
            nodes: nodes::read(paths)?,
            blocks,
        })
    }

    /// The uses of a device's nodes. `device` is its path in the device tree.
    pub(super) fn uses(&self, paths: &HostPaths, device: &Path) -> Vec<HostUse> {
        let blocks = self.blocks.below(device);
        let mut uses: Vec<HostUse> = blocks
            .flat_map(|name| self.block_uses(paths, name))
            .collect();
        for node in self
            .nodes
            .iter()
            .filter(|node| node.is_below(device) && !node.is_block)
        {
            let path = format!("/dev/{}", node.name);
            let (block, of) = (node.name.clone(), None);
            let on = OnBlock { block, of };
            let served = self.served.iter().find(|one| one.node == path);
            uses.extend(served.map(|one| one.host_use(&on)));
        }
        uses
    }

    /// The uses of a block device and of those built on it.
    fn block_uses(&self, paths: &HostPaths, name: &str) -> Vec<HostUse> {
        let block = name.to_owned();
        let mut uses = self.own_uses(name, &OnBlock { block, of: None });
        let above = self.blocks.built_above(name);
        for upper in &above {
            let (block, of) = (name.to_owned(), Some(self.blocks.label(upper)));
            uses.extend(self.own_uses(upper, &OnBlock { block, of }));
        }
        if let (Some(nearest), true) = (above.first(), uses.is_empty()) {
            let (block, of) = (name.to_owned(), self.blocks.label(nearest));
            uses.push(HostUse::Member { block, of });
        }
        if uses.is_empty() {
            uses.extend(claim(&paths.dev.join(Blocks::node(name)), name));
        }
        uses
    }

    /// The uses of a block device itself, which is `on` or is built on it.
    fn own_uses(&self, name: &str, on: &OnBlock) -> Vec<HostUse> {
        let mut uses = self.mounts.uses(&self.blocks, name, on);
        let is_it = |one: &&Served| self.blocks.named(&one.node).as_deref() == Some(name);
        uses.extend(self.served.iter().find(is_it).map(|one| one.host_use(on)));
        uses
    }

    /// Which of these devices, given by their paths in the device tree, processes keep open.
    pub(super) fn kept_open(
        &self,
        paths: &HostPaths,
        devices: &[(HostBdf, PathBuf)],
    ) -> impl Iterator<Item = (HostBdf, HostUse)> {
        let of = |node: &Node| devices.iter().find(|(_, dir)| node.is_below(dir));
        let nodes: Vec<&Node> = self
            .nodes
            .iter()
            .filter(|node| of(node).is_some())
            .collect();
        let open = nodes::kept_open(paths, &nodes).into_iter();
        let open = open.filter_map(|(node, host_use)| Some((of(node)?.0, host_use)));
        open.collect::<Vec<_>>().into_iter()
    }
}
