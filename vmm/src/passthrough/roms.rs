//! The expansion ROMs of devices, as their requests say.

use std::collections::BTreeMap;
use std::path::PathBuf;

use gantry_resources::pools::{DeviceRequest, RomSource};
use gantry_vfio::pci::{Rom, RomImage};

use super::error::DeviceError;

/// The ROM files that the VM's file names. They are read when the VM is built: no file is opened while it runs.
#[derive(Debug, Clone, Default)]
pub struct RomFiles(BTreeMap<PathBuf, RomImage>);

impl FromIterator<(PathBuf, RomImage)> for RomFiles {
    fn from_iter<T: IntoIterator<Item = (PathBuf, RomImage)>>(files: T) -> Self {
        Self(files.into_iter().collect())
    }
}

impl RomFiles {
    /// The ROM of each request's devices.
    ///
    /// # Errors
    /// A request names another file.
    pub fn of(&self, requests: &[DeviceRequest]) -> Result<Vec<Rom>, DeviceError> {
        let rom = |request: &DeviceRequest| match &request.rom {
            RomSource::Device => Ok(Rom::Device),
            RomSource::None => Ok(Rom::None),
            RomSource::File(path) => match self.0.get(path) {
                Some(image) => Ok(Rom::Image(image.clone())),
                None => Err(DeviceError::RomFile { path: path.clone() }),
            },
        };
        requests.iter().map(rom).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_rom_that_it_names_and_no_file_but_those_that_were_read() {
        let image = RomImage::new(vec![0x55, 0xaa]).unwrap();
        let files = RomFiles::from_iter([("/gpu.rom".into(), image)]);
        let asks = |rom: RomSource| {
            files.of(&[DeviceRequest {
                rom,
                ..DeviceRequest::group("gpu", 1)
            }])
        };
        let given = asks(RomSource::File("/gpu.rom".into())).unwrap();
        assert!(matches!(given[..], [Rom::Image(_)]));
        assert!(matches!(asks(RomSource::None).unwrap()[..], [Rom::None]));
        assert!(matches!(
            asks(RomSource::Device).unwrap()[..],
            [Rom::Device]
        ));
        let refused = asks(RomSource::File("/other.rom".into())).unwrap_err();
        let said = refused.to_string();
        assert!(
            said.contains("/other.rom") && said.contains("`hotplug.roms`"),
            "{said}"
        );
    }
}
