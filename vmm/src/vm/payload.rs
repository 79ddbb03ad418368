//! The files a VM boots: opened once, read at every boot of the guest.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::board::Board;
use crate::boot::{self, Entry, Image, acpi};
use crate::config::{Payload, VcpuCount};
use crate::error::Error;
use crate::layout::Layout;

/// A file of the payload cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// It cannot be opened.
    #[error("{key}: cannot open {}", path.display())]
    Open {
        /// The key of the VM's file that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is a directory or a device.
    #[error("{key}: {} is not a regular file", path.display())]
    NotAFile {
        /// The key of the VM's file that names it.
        key: &'static str,
        /// What is no file.
        path: PathBuf,
    },
}

/// The open files of a [`Payload`].
pub struct OpenPayload {
    kernel: (PathBuf, File),
    initramfs: Option<(PathBuf, File)>,
    cmdline: String,
}

impl OpenPayload {
    /// Opens the files.
    ///
    /// # Errors
    /// One is missing, not permitted, or no regular file.
    pub fn open(payload: &Payload) -> Result<Self, PayloadError> {
        let initramfs = payload.initramfs.as_deref();
        Ok(Self {
            kernel: open("payload.kernel", &payload.kernel)?,
            initramfs: initramfs
                .map(|path| open("payload.initramfs", path))
                .transpose()?,
            cmdline: payload.cmdline.clone(),
        })
    }

    /// Writes all that the guest finds in its RAM when it starts: ACPI tables, kernel, initramfs,
    /// command line.
    ///
    /// # Errors
    /// The kernel is none, or something does not fit.
    pub fn load(
        &mut self,
        board: &Board,
        layout: &Layout,
        vcpus: VcpuCount,
    ) -> Result<Entry, Error> {
        let memory = board.ram.memory();
        let (cpus, serial) = (vcpus.get().into(), board.serial.is_some());
        let rsdp = acpi::build(
            memory,
            &acpi::AcpiInputs {
                layout,
                cpus,
                serial,
            },
        )?;
        let mut kernel = image(&mut self.kernel);
        let mut initramfs = self.initramfs.as_mut().map(image);
        let initramfs = initramfs.as_mut();
        Ok(boot::load(
            memory,
            layout,
            &mut kernel,
            initramfs,
            &self.cmdline,
            rsdp,
        )?)
    }
}

fn image((path, file): &mut (PathBuf, File)) -> Image<'_> {
    Image { path, file }
}

fn open(key: &'static str, path: &Path) -> Result<(PathBuf, File), PayloadError> {
    let failed = |source| PayloadError::Open {
        key,
        path: path.to_owned(),
        source,
    };
    // Asked before it is opened: opening a pipe would wait for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(PayloadError::NotAFile {
            key,
            path: path.to_owned(),
        });
    }
    let file = File::open(path).map_err(failed)?;
    Ok((path.to_owned(), file))
}
