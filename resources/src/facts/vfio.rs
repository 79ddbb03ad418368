//! VFIO's two back ends: type1 containers with IOMMU groups, and iommufd with a cdev for each device.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::sysfs;

/// The kernel interface through which a VM gets its devices and maps its RAM for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VfioBackEnd {
    /// A type1 container, which IOMMU groups join.
    Container,
    /// iommufd, to which cdevs are bound.
    Iommufd,
}

impl VfioBackEnd {
    /// The back end of a VM that asks for none: the container if the host has both. If devices have cdevs and no IOMMU
    /// group has a node, the container reaches no device: a kernel may be built so, and a namespace that gantry runs
    /// in may have nodes of somebody's choice.
    pub fn of_host(paths: &HostPaths) -> Self {
        let has = |back_end: Self| back_end.node(paths).exists();
        let container = has(Self::Container) && !only_cdevs(paths);
        match !container && has(Self::Iommufd) {
            true => Self::Iommufd,
            false => Self::Container,
        }
    }

    /// The node that gives a new DMA address space when it is opened.
    pub fn node(self, paths: &HostPaths) -> PathBuf {
        match self {
            Self::Container => paths.dev.join("vfio/vfio"),
            Self::Iommufd => paths.dev.join("iommu"),
        }
    }
}

impl fmt::Display for VfioBackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Container => "VFIO container",
            Self::Iommufd => "iommufd",
        })
    }
}

/// A device has no cdev.
#[derive(Debug, Error)]
pub enum CdevError {
    /// The device is bound to no VFIO driver, or the kernel makes no cdevs.
    #[error(
        "{device} has no VFIO cdev, which iommufd needs: its driver is not a VFIO driver, or the kernel has no \
         CONFIG_VFIO_DEVICE_CDEV\nuse its IOMMU group instead: set \"iommufd\": false under \"platform\" in the VM's \
         file"
    )]
    None {
        /// The device.
        device: DeviceName,
    },
    /// A character device is no device's cdev.
    #[error(
        "the descriptor is of character device {major}:{minor}, which is no VFIO cdev: send that of \
         /dev/vfio/devices/vfio*, not of a group"
    )]
    Other {
        /// Its numbers.
        major: u32,
        /// See there.
        minor: u32,
    },
    /// sysfs cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Whether there are cdevs, and no IOMMU group's node.
fn only_cdevs(paths: &HostPaths) -> bool {
    let names = |dir: PathBuf| sysfs::entries(&dir).unwrap_or_default();
    let is_group = |name: &String| name.parse::<u32>().is_ok();
    let nodes = paths.dev.join("vfio");
    !names(nodes.join("devices")).is_empty() && !names(nodes).iter().any(is_group)
}

/// The device whose cdev has this number.
///
/// # Errors
/// No device's cdev has it.
pub(crate) fn device_of_cdev(
    paths: &HostPaths,
    major: u32,
    minor: u32,
) -> Result<DeviceName, CdevError> {
    let node = paths.sysfs.join(format!("dev/char/{major}:{minor}"));
    let device = fs::canonicalize(node).ok().and_then(|node| {
        let mut up = node.ancestors().skip(1);
        let class = up.next()?.file_name()?;
        let device = up.next()?.file_name()?.to_str()?;
        device.parse().ok().filter(|_| class == "vfio-dev")
    });
    device.ok_or(CdevError::Other { major, minor })
}

/// Whether the kernel makes cdevs; none if no device is bound to VFIO, as only such a device shows it.
pub(crate) fn makes_cdevs(paths: &HostPaths) -> Option<bool> {
    let class = paths.sysfs.join("class/vfio-dev");
    let devices = sysfs::entries(&class).unwrap_or_default();
    let has_number = |name: &String| class.join(name).join("dev").exists();
    (!devices.is_empty()).then(|| devices.iter().any(has_number))
}

/// The cdev's node of a device (Documentation/driver-api/vfio.rst).
///
/// # Errors
/// It has none, or sysfs cannot be read.
pub fn cdev(paths: &HostPaths, device: DeviceName) -> Result<PathBuf, CdevError> {
    let directory = match device {
        DeviceName::Pci(bdf) => paths.pci_device(bdf),
        DeviceName::Mdev(uuid) => paths.mdev(uuid),
    };
    let directory = directory.join("vfio-dev");
    let names = sysfs::entries(&directory).map_err(|source| CdevError::Read {
        path: directory.clone(),
        source,
    })?;
    // Without cdevs the kernel has the directory, and no device number in it.
    let mut names = names.iter();
    let name = names.find(|name| directory.join(name).join("dev").exists());
    let node = name.map(|name| paths.dev.join("vfio/devices").join(name));
    node.ok_or(CdevError::None { device })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> (tempfile::TempDir, HostPaths) {
        let root = tempfile::tempdir().unwrap();
        let paths = HostPaths::under(root.path());
        (root, paths)
    }

    #[test]
    fn the_container_is_taken_where_there_is_one() {
        let (_root, paths) = host();
        let chosen = || VfioBackEnd::of_host(&paths);
        assert_eq!(chosen(), VfioBackEnd::Container, "to be missed by name");
        fs::create_dir_all(paths.dev.join("vfio")).unwrap();
        fs::write(paths.dev.join("iommu"), "").unwrap();
        assert_eq!(chosen(), VfioBackEnd::Iommufd);
        fs::write(paths.dev.join("vfio/vfio"), "").unwrap();
        assert_eq!(chosen(), VfioBackEnd::Container);
        // Container runtimes and schedulers give a device by its group or by its cdev, never by both.
        fs::create_dir(paths.dev.join("vfio/devices")).unwrap();
        assert_eq!(chosen(), VfioBackEnd::Container, "no device yet");
        fs::write(paths.dev.join("vfio/devices/vfio0"), "").unwrap();
        assert_eq!(chosen(), VfioBackEnd::Iommufd);
        fs::write(paths.dev.join("vfio/14"), "").unwrap();
        assert_eq!(chosen(), VfioBackEnd::Container, "both");
        fs::remove_file(paths.dev.join("iommu")).unwrap();
        fs::remove_file(paths.dev.join("vfio/14")).unwrap();
        assert_eq!(chosen(), VfioBackEnd::Container, "no iommufd");
    }

    #[test]
    fn devices_that_are_bound_show_whether_there_are_cdevs() {
        let (_root, paths) = host();
        assert_eq!(makes_cdevs(&paths), None);
        let device = paths.sysfs.join("class/vfio-dev/vfio0");
        fs::create_dir_all(&device).unwrap();
        assert_eq!(makes_cdevs(&paths), Some(false));
        fs::write(device.join("dev"), "511:0").unwrap();
        assert_eq!(makes_cdevs(&paths), Some(true));
    }

    #[test]
    fn a_cdev_is_found_by_its_device_number() {
        let (_root, paths) = host();
        let device: DeviceName = "01:00.0".parse().unwrap();
        let sysfs = paths
            .sysfs
            .join("bus/pci/devices/0000:01:00.0/vfio-dev/vfio3");
        let none = cdev(&paths, device).unwrap_err().to_string();
        assert!(none.contains("0000:01:00.0 has no VFIO cdev"), "{none}");
        fs::create_dir_all(&sysfs).unwrap();
        assert!(matches!(cdev(&paths, device), Err(CdevError::None { .. })));
        fs::write(sysfs.join("dev"), "511:3").unwrap();
        let node = cdev(&paths, device).unwrap();
        assert_eq!(node, paths.dev.join("vfio/devices/vfio3"));
        let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        let sysfs = paths.sysfs.join("bus/mdev/devices").join(uuid);
        fs::create_dir_all(sysfs.join("vfio-dev/vfio4")).unwrap();
        fs::write(sysfs.join("vfio-dev/vfio4/dev"), "511:4").unwrap();
        let node = cdev(&paths, uuid.parse().unwrap()).unwrap();
        assert_eq!(node, paths.dev.join("vfio/devices/vfio4"));
    }

    #[test]
    fn a_cdev_is_known_by_its_number_and_nothing_else_is_one() {
        let (_root, paths) = host();
        let numbers = paths.sysfs.join("dev/char");
        fs::create_dir_all(&numbers).unwrap();
        for (number, node) in [
            ("511:3", "devices/pci0000:00/0000:01:00.0/vfio-dev/vfio3"),
            (
                "511:4",
                "devices/virtual/mtty/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/vfio-dev/vfio4",
            ),
            ("240:1", "devices/virtual/vfio/14"),
        ] {
            let node = paths.sysfs.join(node);
            fs::create_dir_all(&node).unwrap();
            std::os::unix::fs::symlink(node, numbers.join(number)).unwrap();
        }
        let device = |major, minor| device_of_cdev(&paths, major, minor);
        assert_eq!(device(511, 3).unwrap().to_string(), "0000:01:00.0");
        assert!(matches!(device(511, 4).unwrap(), DeviceName::Mdev(_)));
        for (major, minor) in [(240, 1), (1, 3)] {
            let refused = device(major, minor).unwrap_err().to_string();
            assert!(refused.contains("no VFIO cdev"), "{refused}");
        }
    }
}
