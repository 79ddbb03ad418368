//! Initramfs archives: the `newc` cpio format of the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`, uncompressed.
//!
//! Own code because it is 60 lines; uncompressed because unpacking costs more in the lab than
//! reading.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use object::Architecture;
use object::elf::PT_DYNAMIC;
use object::read::elf::{ElfFile64, ProgramHeader};
use object::{LittleEndian, Object};

use super::command;

/// Type bits of a mode, and those of a folder.
const TYPE: u32 = 0o170_000;
const FOLDER: u32 = 0o040_000;

/// An archive that grows file by file. Parent folders are added by themselves.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    inode: u32,
    /// Path and mode of each entry.
    present: BTreeMap<String, u32>,
}

impl Initramfs {
    /// Adds a folder and its parents.
    pub fn folder(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.present.contains_key(path) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.folder(parent);
        }
        self.entry(path, 0o040_755, &[], (0, 0));
    }

    /// Adds a file; one that is there already stays.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.leaf(path, 0o100_000 | mode, data, (0, 0));
    }

    /// Lets the next entry at `path`, a folder or not, take the place of what is there, or says why it cannot:
    /// the kernel drops without a word what it cannot unpack.
    pub fn make_way(&mut self, path: &str, folder: bool) -> Result<()> {
        let path = path.trim_matches('/');
        for (end, _) in path.match_indices('/') {
            let parent = path.get(..end).unwrap_or_default();
            if self.mode(parent).is_some_and(|mode| mode & TYPE != FOLDER) {
                bail!("/{parent} is a file in the lab");
            }
        }
        match (self.mode(path).map(|mode| mode & TYPE == FOLDER), folder) {
            (Some(true), false) => {
                bail!("/{path} is a folder in the lab; /{path}/ names a place in it")
            }
            (Some(false), true) => bail!("/{path} is a file in the lab"),
            // A later entry of a path replaces an earlier one.
            (Some(false), false) => {
                self.present.remove(path);
            }
            (Some(true), true) | (None, _) => {}
        }
        Ok(())
    }

    fn mode(&self, path: &str) -> Option<u32> {
        self.present.get(path).copied()
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.leaf(path, 0o120_777, target.as_bytes(), (0, 0));
    }

    /// Adds `/dev/console`, which the kernel opens for init before any /dev is mounted.
    pub fn console(&mut self) {
        self.leaf("dev/console", 0o020_600, &[], (5, 1));
    }

    /// Copies a file of this machine.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        if u32::try_from(data.len()).is_err() {
            bail!("{} is too large: at most 4 GiB", from.display());
        }
        let mode = fs::metadata(from)?.permissions().mode() & 0o777;
        self.file(path, mode, &data);
        Ok(())
    }

    /// Copies a program and the libraries that it needs, found in `tree` or on this machine.
    pub fn program(&mut self, path: &str, from: &Path, tree: Option<&Path>) -> Result<()> {
        self.copy(path, from)?;
        if !needs_libraries(from)? {
            return Ok(());
        }
        for (name, library) in libraries(from, tree)? {
            self.copy(&name, &library)?;
        }
        Ok(())
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn leaf(&mut self, path: &str, mode: u32, data: &[u8], device: (u32, u32)) {
        let path = path.trim_matches('/');
        if self.present.contains_key(path) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.folder(parent);
        }
        self.entry(path, mode, data, device);
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8], (major, minor): (u32, u32)) {
        self.present.insert(path.to_owned(), mode);
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            major,
            minor,
            path.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Whether a file is a program or library of this machine's kind that is linked to libraries.
fn needs_libraries(path: &Path) -> Result<bool> {
    let data = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let Ok(elf) = ElfFile64::<LittleEndian>::parse(&*data) else {
        return Ok(false);
    };
    let mut headers = elf.elf_program_headers().iter();
    let dynamic = headers.any(|header| header.p_type(LittleEndian) == PT_DYNAMIC);
    Ok(dynamic && elf.architecture() == Architecture::X86_64)
}

/// Where the loader will look for each library, and where it is now.
fn libraries(program: &Path, tree: Option<&Path>) -> Result<Vec<(String, PathBuf)>> {
    let mut ldd = Command::new("ldd");
    ldd.arg(program);
    if let Some(tree) = tree {
        super::packages::use_tree(&mut ldd, tree);
    }
    let text = command::output(&mut ldd)
        .with_context(|| format!("cannot list the libraries of {}", program.display()))?;
    parse_ldd(&String::from_utf8_lossy(&text))
        .with_context(|| format!("{} lacks a library", program.display()))
}

/// `name => /path (0x...)` and `/lib64/ld-linux-x86-64.so.2 (0x...)` lines.
fn parse_ldd(text: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        let path = match line.split_once(" => ") {
            Some((name, rest)) => {
                let path = rest.split(" (").next().unwrap_or_default();
                anyhow::ensure!(path.starts_with('/'), "{name}: {rest}");
                path
            }
            None if line.starts_with('/') => line.split(" (").next().unwrap_or_default(),
            None => continue,
        };
        let file = Path::new(path).file_name().unwrap_or_default();
        let place = match path {
            path if path.starts_with("/lib64/") => "lib64",
            _ => "lib/x86_64-linux-gnu",
        };
        found.push((
            format!("{place}/{}", file.to_string_lossy()),
            PathBuf::from(path),
        ));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_laid_out_as_newc() {
        let mut archive = Initramfs::default();
        archive.file("etc/a", 0o644, b"hello");
        archive.file("etc/a", 0o644, b"again");
        archive.link("b", "etc/a");
        let bytes = archive.finish();
        let names: Vec<&str> = std::str::from_utf8(&bytes)
            .unwrap()
            .split("070701")
            .skip(1)
            .map(|entry| entry[104..].split('\0').next().unwrap())
            .collect();
        assert_eq!(names, ["etc", "etc/a", "b", "TRAILER!!!"]);
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains("hello") && !text.contains("again"));
    }

    #[test]
    fn ldd_is_parsed() {
        let text = "\tlinux-vdso.so.1 (0x00007f)\n\
            \tlibpci.so.3 => /t/usr/lib/x86_64-linux-gnu/libpci.so.3 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = parse_ldd(text).unwrap();
        assert_eq!(found[0].0, "lib/x86_64-linux-gnu/libpci.so.3");
        assert_eq!(found[1].0, "lib64/ld-linux-x86-64.so.2");
        assert!(parse_ldd("libx.so => not found").is_err());
        assert!(parse_ldd("\tnot a dynamic executable").unwrap().is_empty());
    }
}
