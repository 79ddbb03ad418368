//! The expansion ROMs of devices, as their requests say.

use std::path::Path;

use gantry_resources::pools::{DeviceRequest, RomSource};
use gantry_vfio::pci::{Rom, RomImage};

/// The ROM of each request's devices. `read` reads the file of the request with this index.
///
/// # Errors
/// As `read`.
pub fn roms_of<E>(
    requests: &[DeviceRequest],
    read: impl Fn(usize, &Path) -> Result<RomImage, E>,
) -> Result<Vec<Rom>, E> {
    let roms = requests.iter().enumerate();
    let roms = roms.map(|(index, request)| match &request.rom {
        RomSource::Device => Ok(Rom::Device),
        RomSource::None => Ok(Rom::None),
        RomSource::File(path) => read(index, path).map(Rom::Image),
    });
    roms.collect()
}
