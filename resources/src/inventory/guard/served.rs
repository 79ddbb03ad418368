//! Block devices that the kernel offers to other machines or VMs, from configfs: no process has them open,
//! and most are not claimed.

use std::path::{Path, PathBuf};

use super::uses::{HostUse, OnBlock};
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// A kind of target.
struct Kind {
    /// Its name, for messages.
    title: &'static str,
    /// The path of its objects below configfs, `*` for any directory.
    at: &'static str,
    /// The component of the path, from the end, that is its name.
    name: usize,
    /// The attribute with the device's path.
    path: &'static str,
}

const KINDS: [Kind; 5] = [
    Kind {
        title: "LIO backstore",
        at: "target/core/*/*",
        name: 0,
        path: "udev_path",
    },
    // Objects that were made without targetcli have no `udev_path`: "... File: /dev/nvme0n1  Size: ...".
    Kind {
        title: "LIO backstore",
        at: "target/core/*/*",
        name: 0,
        path: "info",
    },
    Kind {
        title: "NVMe target",
        at: "nvmet/subsystems/*/namespaces/*",
        name: 2,
        path: "device_path",
    },
    Kind {
        title: "NVMe target",
        at: "nvmet/subsystems/*/passthru",
        name: 1,
        path: "device_path",
    },
    Kind {
        title: "USB gadget function",
        at: "usb_gadget/*/functions/*/*",
        name: 1,
        path: "file",
    },
];

/// A device node and the target that serves it.
pub(super) struct Served {
    pub(super) node: String,
    pub(super) by: String,
}

impl Served {
    pub(super) fn host_use(&self, on: &OnBlock) -> HostUse {
        HostUse::Served {
            on: on.clone(),
            by: self.by.clone(),
        }
    }
}

/// All targets. An object that is not enabled has not opened its device.
pub(super) fn served(paths: &HostPaths) -> Vec<Served> {
    let configfs = paths.sysfs.join("kernel/config");
    let mut found = Vec::new();
    for kind in &KINDS {
        for object in matching(&configfs, kind.at) {
            let text = |name: &str| sysfs::text(&object.join(name)).ok().flatten();
            if text("enable").as_deref() == Some("0") {
                continue;
            }
            let name = object.ancestors().nth(kind.name).and_then(Path::file_name);
            let name = name.map(|name| name.to_string_lossy().into_owned());
            let value = text(kind.path).unwrap_or_default();
            let nodes = value
                .split_whitespace()
                .filter(|word| word.starts_with("/dev/"));
            found.extend(nodes.map(|node| Served {
                node: node.to_owned(),
                by: format!("{} {}", kind.title, name.clone().unwrap_or_default()),
            }));
        }
    }
    found
}

/// The directories that match a pattern of names.
fn matching(root: &Path, pattern: &str) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned()];
    for part in pattern.split('/') {
        let below = |dir: &PathBuf| match part {
            "*" => {
                let names = sysfs::entries(dir).unwrap_or_default();
                names.iter().map(|name| dir.join(name)).collect()
            }
            part => vec![dir.join(part)],
        };
        found = found.iter().flat_map(below).collect();
        found.retain(|path| path.is_dir() && !path.is_symlink());
    }
    found
}
