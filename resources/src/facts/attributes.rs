//! The attributes of one PCI function in sysfs, read with as few system calls as possible.
//!
//! A host may have thousands of functions. The directory is opened once, no value is read from two attributes, and
//! no attribute is read that a function cannot have.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::read;

use crate::base::bdf::{HostBdf, hex};
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::facts::ids::{PciClass, PciId};

/// Longer than any attribute that is read here: numbers, and the name of a driver.
const LONGEST: usize = 256;

/// A function's directory, open.
pub(crate) struct Attributes {
    dir: OwnedFd,
}

/// The content of `modalias`, which the kernel builds from what it read when it found the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) id: PciId,
    /// None where both ids are zero.
    pub(crate) subsystem: Option<PciId>,
    pub(crate) class: PciClass,
}

impl Attributes {
    /// The directory of a function below `devices`; none if there is no such function.
    pub(crate) fn open(devices: &File, bdf: HostBdf) -> io::Result<Option<Self>> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = openat(devices, bdf.to_string().as_str(), flags, Mode::empty());
        Ok(present(dir)?.map(|dir| Self { dir }))
    }

    /// The identity of the function; none if the function is gone.
    pub(crate) fn identity(&self) -> io::Result<Option<Identity>> {
        let Some(text) = self.text("modalias")? else {
            return Ok(None);
        };
        let wrong = || {
            let what = format!("\"{text}\" is no modalias of a PCI device");
            io::Error::new(io::ErrorKind::InvalidData, what)
        };
        identity(&text).map(Some).ok_or_else(wrong)
    }

    /// The text of an attribute without surrounding blanks; none if there is no such attribute.
    pub(crate) fn text(&self, name: &str) -> io::Result<Option<String>> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let Some(file) = present(openat(&self.dir, name, flags, Mode::empty()))? else {
            return Ok(None);
        };
        let mut page = [0; LONGEST];
        let Some(length) = present(read(&file, &mut page))? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&page[..length]);
        Ok(Some(text.trim().to_owned()))
    }

    /// Whether there is such an attribute, readable or not.
    pub(crate) fn has(&self, name: &str) -> io::Result<bool> {
        Ok(present(fstatat(&self.dir, name, AtFlags::empty()))?.is_some())
    }

    /// A decimal attribute; none if it is missing or is no unsigned number.
    pub(crate) fn decimal<T: std::str::FromStr>(&self, name: &str) -> io::Result<Option<T>> {
        Ok(self.text(name)?.and_then(|text| text.parse().ok()))
    }

    /// A hexadecimal attribute such as `0x02`.
    pub(crate) fn hex_byte(&self, name: &str) -> io::Result<Option<u8>> {
        let number = |text: String| hex(text.strip_prefix("0x")?, 2..=2);
        Ok(self.text(name)?.and_then(number).map(|number| number as u8))
    }

    /// Names of a directory's entries, sorted; empty if there is no directory.
    pub(crate) fn entries(&self, name: &str) -> io::Result<Vec<String>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let Some(dir) = present(Dir::openat(&self.dir, name, flags, Mode::empty()))? else {
            return Ok(Vec::new());
        };
        let mut names = Vec::new();
        for entry in dir {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether the function is on a root bus: its directory is in the host bridge's.
    pub(crate) fn is_on_root_bus(devices: &File, bdf: HostBdf) -> io::Result<bool> {
        let target = match readlinkat(devices, bdf.to_string().as_str()) {
            // It is no link: sysfs has one for each device.
            Err(Errno::EINVAL) => None,
            target => present(target)?,
        };
        let parent = target.as_deref().map(Path::new).and_then(Path::parent);
        Ok(parent.is_none_or(|dir| HostBdf::from_sysfs_path(dir).is_err()))
    }

    /// The last component of a link's target.
    pub(crate) fn link(&self, name: &str) -> io::Result<Option<String>> {
        let target = present(readlinkat(&self.dir, name))?;
        let last = |target| {
            let name = Path::new(&target).file_name()?;
            Some(name.to_string_lossy().into_owned())
        };
        Ok(target.and_then(last))
    }
}

/// A missing file is no error, also if it disappears while it is read.
fn present<T>(result: nix::Result<T>) -> io::Result<Option<T>> {
    match result.map_err(Errno::into) {
        Ok(value) => Ok(Some(value)),
        Err(error) if sysfs::is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads `pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02` (the kernel's modalias_show).
fn identity(modalias: &str) -> Option<Identity> {
    let mut rest = modalias.strip_prefix("pci:")?;
    let mut number = |tag: &str, digits: usize| {
        let text = rest.strip_prefix(tag)?;
        let (digits, after) = text.split_at_checked(digits)?;
        rest = after;
        hex(digits, 1..=8)
    };
    let id = PciId {
        vendor: number("v", 8)? as u16,
        device: number("d", 8)? as u16,
    };
    let subsystem = PciId {
        vendor: number("sv", 8)? as u16,
        device: number("sd", 8)? as u16,
    };
    let class = number("bc", 2)? << 16 | number("sc", 2)? << 8 | number("i", 2)?;
    Some(Identity {
        id,
        subsystem: Some(subsystem).filter(|id| id.vendor != 0 || id.device != 0),
        class: PciClass::new(class),
    })
}

/// The identity of the device at an address; none if there is none.
pub(crate) fn id_at(paths: &HostPaths, bdf: HostBdf) -> io::Result<Option<PciId>> {
    let devices = File::open(paths.sysfs.join("bus/pci/devices"))?;
    let identity = match Attributes::open(&devices, bdf)? {
        Some(attributes) => attributes.identity()?,
        None => None,
    };
    Ok(identity.map(|identity| identity.id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modalias_tells_what_the_device_is() {
        let said = identity("pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02").unwrap();
        assert_eq!(said.id.to_string(), "1b36:0010");
        assert_eq!(said.subsystem.unwrap().to_string(), "1af4:1100");
        assert_eq!(said.class.to_string(), "010802");
        let bare = identity("pci:v00008086d000029C0sv00000000sd00000000bc06sc00i00").unwrap();
        assert_eq!(bare.subsystem, None);
        for text in [
            "",
            "pci:",
            "usb:v1D6Bp0002",
            "pci:v00001B36d00000010sv00001AF4",
            "pci:vé",
        ] {
            assert_eq!(identity(text), None, "{text}");
        }
    }
}
