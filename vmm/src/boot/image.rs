//! A file that is loaded into guest memory.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use super::BootError;
use super::identify::{self, Kind, identify};

/// A file to load, and its name for error messages.
#[derive(Debug)]
pub struct Image<'a> {
    /// Where the user said it is.
    pub path: &'a Path,
    /// The file, open for reading.
    pub file: &'a mut File,
}

impl Image<'_> {
    /// The kind of kernel that the file is.
    pub fn kind(&mut self) -> Result<Kind, BootError> {
        self.seek(0)?;
        let mut head = Vec::with_capacity(identify::HEAD);
        let read = (&mut *self.file)
            .take(identify::HEAD as u64)
            .read_to_end(&mut head);
        read.map_err(|source| self.unreadable(source))?;
        Ok(identify(&head))
    }

    /// Bytes of the file.
    pub fn size(&mut self) -> Result<u64, BootError> {
        self.file
            .seek(SeekFrom::End(0))
            .map_err(|source| self.unreadable(source))
    }

    /// Fills `buffer` from `offset` of the file on.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), BootError> {
        self.seek(offset)?;
        match self.file.read_exact(buffer) {
            Ok(()) => Ok(()),
            Err(short) if short.kind() == ErrorKind::UnexpectedEof => Err(BootError::Truncated {
                path: self.path.to_owned(),
                needed: offset + buffer.len() as u64,
                size: self.size()?,
            }),
            Err(source) => Err(self.unreadable(source)),
        }
    }

    /// Goes to `offset` of the file.
    pub fn seek(&mut self, offset: u64) -> Result<(), BootError> {
        let sought = self.file.seek(SeekFrom::Start(offset));
        sought.map(drop).map_err(|source| self.unreadable(source))
    }

    fn unreadable(&self, source: std::io::Error) -> BootError {
        BootError::Read {
            path: self.path.to_owned(),
            source,
        }
    }
}
