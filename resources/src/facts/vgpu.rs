//! SR-IOV virtual GPUs as NVIDIA's driver shows them: a type set on a virtual function, and 0 for none.

use std::path::Path;

use serde::Serialize;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;

/// The only vendor whose driver has these files.
pub(crate) const NVIDIA: u16 = 0x10de;

/// A type that a virtual function could have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VendorType {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub title: String,
}

/// The virtual GPU that a virtual function is or can be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VendorVgpu {
    /// The number of its type; 0 for none.
    pub current: u32,
    /// The types that it can get now.
    pub creatable: Vec<VendorType>,
}

impl VendorVgpu {
    /// Reads the files in a function's directory; none if there are none.
    pub(crate) fn read(dir: &Path) -> Option<Self> {
        let dir = dir.join("nvidia");
        let current = sysfs::decimal(&dir.join("current_vgpu_type")).ok()??;
        let creatable = sysfs::text(&dir.join("creatable_vgpu_types")).ok()?;
        Some(Self {
            current,
            creatable: types(&creatable.unwrap_or_default()),
        })
    }
}

/// The file to write a type to.
pub(crate) fn current(paths: &HostPaths, bdf: HostBdf) -> std::path::PathBuf {
    paths.pci_device(bdf).join("nvidia/current_vgpu_type")
}

/// Reads a title, then lines with number, colon and name.
fn types(text: &str) -> Vec<VendorType> {
    let one = |line: &str| {
        let (id, title) = line.split_once(':')?;
        Some(VendorType {
            id: id.trim().parse().ok()?,
            title: title.trim().to_owned(),
        })
    };
    text.lines().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_types_is_read() {
        let text = "ID    : vGPU Name\n557   : NVIDIA A40-1B\n558   : NVIDIA A40-2B\n";
        let found = types(text);
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[1].id, found[1].title.as_str()),
            (558, "NVIDIA A40-2B")
        );
        assert_eq!(types(""), []);
    }
}
