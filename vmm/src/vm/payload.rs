//! The files a VM boots: opened once, read at every boot of the guest.

use std::fs::File;
use std::path::PathBuf;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::boot::{self, BootError, Entry, Image, acpi};
use crate::config::{VcpuCount, VmConfig};
use crate::error::Error;
use crate::host::files::{FileError, open};
use crate::layout::Layout;
use crate::machine::Machine;

/// The open files of a [`Payload`](crate::config::Payload).
pub struct OpenPayload {
    is_firmware: bool,
    kernel: (PathBuf, File),
    initramfs: Option<(PathBuf, File)>,
    cmdline: String,
}

impl OpenPayload {
    /// Opens the files.
    ///
    /// # Errors
    /// One is missing, not permitted, or no regular file.
    pub fn open(config: &VmConfig) -> Result<Self, FileError> {
        let payload = &config.payload;
        let below = config.folders.as_ref();
        let below = below.map(|folders| folders.payload.as_path());
        let open = |key, path: &PathBuf| Ok((path.clone(), open(key, path, below)?));
        let initramfs = payload.initramfs.as_ref();
        Ok(Self {
            is_firmware: payload.is_firmware,
            kernel: open(payload.key(), &payload.kernel)?,
            initramfs: initramfs
                .map(|path| open("payload.initramfs", path))
                .transpose()?,
            cmdline: payload.cmdline.clone(),
        })
    }

    /// Writes everything that the guest needs in RAM when it starts: ACPI tables, kernel, initramfs, command
    /// line.
    ///
    /// # Errors
    /// The file is no kernel, or something does not fit.
    pub fn load(
        &mut self,
        machine: &Machine,
        layout: &Layout,
        vcpus: VcpuCount,
    ) -> Result<Entry, Error> {
        let memory = machine.ram.memory();
        let (cpus, serial) = (vcpus.get(), machine.serial.is_some());
        let rsdp = acpi::build(
            memory,
            &acpi::AcpiInputs {
                layout,
                cpus,
                serial,
                pvpanic: machine.has_pvpanic(),
                slots: &machine.hot_slots,
            },
        )?;
        Ok(self.boot(memory, layout, rsdp)?)
    }

    /// Loads kernel, initramfs and command line.
    pub fn boot(
        &mut self,
        memory: &GuestMemoryMmap,
        layout: &Layout,
        rsdp: GuestAddress,
    ) -> Result<Entry, BootError> {
        let mut kernel = image(&mut self.kernel);
        if self.is_firmware {
            return boot::load_firmware(memory, layout, &mut kernel, rsdp);
        }
        let mut initramfs = self.initramfs.as_mut().map(image);
        let initramfs = initramfs.as_mut();
        boot::load(memory, layout, &mut kernel, initramfs, &self.cmdline, rsdp)
    }
}

fn image((path, file): &mut (PathBuf, File)) -> Image<'_> {
    Image { path, file }
}
