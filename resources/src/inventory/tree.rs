//! The tree of the host's PCI functions: which port or bridge leads to which device.

use std::collections::BTreeMap;
use std::fs;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::inventory::device::HostDevice;

/// A function with the functions behind it, in the order of their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeNode<'a> {
    /// The function.
    pub device: &'a HostDevice,
    /// The functions on its secondary bus; of a physical function, its virtual functions.
    pub children: Vec<TreeNode<'a>>,
}

/// The functions on the host's root buses, each with those behind it. In sysfs, a device's directory is in that of
/// its bridge. Virtual functions are below their physical function.
pub fn tree<'a>(paths: &HostPaths, devices: &'a [HostDevice]) -> Vec<TreeNode<'a>> {
    let mut below: BTreeMap<Option<HostBdf>, Vec<&HostDevice>> = BTreeMap::new();
    for device in devices {
        let parent = device.physfn.or_else(|| parent(paths, device.bdf));
        let parent = parent.filter(|parent| known(devices, *parent));
        below.entry(parent).or_default().push(device);
    }
    nodes(&mut below, None)
}

fn nodes<'a>(
    below: &mut BTreeMap<Option<HostBdf>, Vec<&'a HostDevice>>,
    parent: Option<HostBdf>,
) -> Vec<TreeNode<'a>> {
    // Taken out, so that a circle ends.
    let devices = below.remove(&parent).unwrap_or_default();
    let node = |device: &'a HostDevice| TreeNode {
        device,
        children: nodes(below, Some(device.bdf)),
    };
    devices.into_iter().map(node).collect()
}

fn parent(paths: &HostPaths, bdf: HostBdf) -> Option<HostBdf> {
    let dir = fs::canonicalize(paths.pci_device(bdf)).ok()?;
    HostBdf::from_sysfs_path(dir.parent()?).ok()
}

fn known(devices: &[HostDevice], bdf: HostBdf) -> bool {
    devices
        .binary_search_by_key(&bdf, |device| device.bdf)
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};
    use std::os::unix::fs::symlink;

    fn below(host: &FakeHost, parent: &str, child: &str) {
        let link = host.paths.pci_device(bdf(child));
        let dir = host.dir(bdf(parent)).join(bdf(child).to_string());
        fs::rename(host.dir(bdf(child)), &dir).unwrap();
        fs::remove_file(&link).unwrap();
        symlink(dir, link).unwrap();
    }

    #[test]
    fn virtual_functions_are_below_their_card() {
        let host = FakeHost::new(&[
            Fake::nvme("03:00.0", 1),
            Fake::nvme("03:10.0", 2),
            Fake::nvme("04:00.0", 3),
        ]);
        symlink(
            host.dir(bdf("03:00.0")),
            host.dir(bdf("03:10.0")).join("physfn"),
        )
        .unwrap();
        assert_eq!(shape(&tree(&host.paths, &host.scan())), "3(3) 4");
    }

    fn shape(nodes: &[TreeNode<'_>]) -> String {
        let one = |node: &TreeNode<'_>| {
            let bus = node.device.bdf.bus();
            match node.children.as_slice() {
                [] => bus.to_string(),
                children => format!("{bus}({})", shape(children)),
            }
        };
        nodes.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn devices_hang_behind_their_bridges() {
        let port = |address| Fake::nvme(address, 1).class(0x06_04_00).driver("pcieport");
        let host = FakeHost::new(&[
            port("00:01.0"),
            port("01:00.0"),
            Fake::nvme("02:00.0", 2),
            Fake::nvme("03:00.0", 3),
        ]);
        assert_eq!(shape(&tree(&host.paths, &host.scan())), "0 1 2 3");
        below(&host, "01:00.0", "02:00.0");
        let devices = host.scan();
        assert_eq!(shape(&tree(&host.paths, &devices)), "0 1(2) 3");
    }
}
