//! The initramfs of the measuring guest: this program as init, the libraries that it is linked to, and the kernel's
//! modules for VFIO.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::report::Failure;

/// The module that the guest's devices are bound to.
const DRIVER: &str = "vfio_pci";
/// Where the program is in the guest.
pub const PROGRAM: &str = "/gantry";
/// Where its libraries are: the kernel passes this variable on to init.
pub const ENVIRONMENT: &str = "LD_LIBRARY_PATH=/lib";
/// Where modules are, named in the order in which they are to be loaded.
pub const MODULES: &str = "/modules";

/// An archive in the `newc` format of cpio(5), which the kernel unpacks.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// Makes the initramfs. `modules` is the directory of the guest's kernel in /lib/modules.
///
/// # Errors
/// A file cannot be read.
pub fn image(modules: &Path) -> Result<Vec<u8>, Failure> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "lib", "lib64", "modules"] {
        archive.add(folder, 0o040_755, &[], (0, 0));
    }
    // The kernel opens it as init's standard output.
    archive.add("dev/console", 0o020_600, &[], (5, 1));
    archive.copy("gantry", Path::new("/proc/self/exe"))?;
    for library in libraries(&read_text(Path::new("/proc/self/maps"))?) {
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        // The loader's place is written in the program.
        let folder = match name.starts_with("ld-linux") {
            true => "lib64",
            false => "lib",
        };
        archive.copy(&format!("{folder}/{name}"), &library)?;
    }
    for (index, file) in needed(modules).into_iter().enumerate() {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        archive.copy(&format!("modules/{index:02}-{name}"), &file)?;
    }
    Ok(archive.finish())
}

/// The libraries of a process, from its memory map.
fn libraries(maps: &str) -> BTreeSet<PathBuf> {
    let paths = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]));
    let library = |path: &&str| {
        let name = path.rsplit('/').next().unwrap_or_default();
        name.contains(".so.") || name.ends_with(".so")
    };
    paths.filter(library).map(PathBuf::from).collect()
}

/// The files of the modules that [`DRIVER`] needs, in the order in which they are to be loaded; none if there is no
/// such module. It may be built in; without it the guest measures all but interrupts.
fn needed(modules: &Path) -> Vec<PathBuf> {
    let list = fs::read_to_string(modules.join("modules.dep")).unwrap_or_default();
    let files = order(&list, DRIVER).unwrap_or_default();
    files.into_iter().map(|file| modules.join(file)).collect()
}

/// The files of a module and of all that it needs, from `modules.dep`, in the order in which they are to be loaded.
fn order<'a>(list: &'a str, module: &str) -> Option<Vec<&'a str>> {
    let mut lines = list.lines().filter_map(|line| line.split_once(':'));
    let (file, needs) = lines.find(|(file, _)| name_of(file) == module)?;
    let mut files: Vec<&str> = needs.split_whitespace().collect();
    files.reverse();
    files.push(file);
    Some(files)
}

/// The name of a module, as the kernel has it, from its file's.
fn name_of(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or_default();
    let name = name.split(".ko").next().unwrap_or_default();
    name.replace('-', "_")
}

fn read_text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| unread(path, &error))
}

fn unread(path: &Path, error: &io::Error) -> Failure {
    Failure::host(format!("cannot read {}: {error}", path.display()))
}

impl Archive {
    fn copy(&mut self, name: &str, from: &Path) -> Result<(), Failure> {
        let data = fs::read(from).map_err(|error| unread(from, &error))?;
        self.add(name, 0o100_755, &data, (0, 0));
        Ok(())
    }

    fn add(&mut self, name: &str, mode: u32, data: &[u8], (major, minor): (u32, u32)) {
        self.entries += 1;
        let (size, name_size) = (data.len() as u32, name.len() as u32 + 1);
        // inode, mode, user, group, links, time, size, device, device of the node, size of the name, checksum
        let header = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in header {
            self.bytes.extend(format!("{field:08X}").into_bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        let len = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(len, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let list = "kernel/net/tun.ko.xz:\n\
                    kernel/drivers/vfio/pci/vfio-pci-core.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n\
                    kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/pci/vfio-pci-core.ko.xz \
                    kernel/drivers/vfio/vfio.ko.xz kernel/virt/lib/irqbypass.ko.xz\n";
        let names: Vec<String> = order(list, DRIVER)
            .unwrap()
            .into_iter()
            .map(name_of)
            .collect();
        assert_eq!(names, ["irqbypass", "vfio", "vfio_pci_core", "vfio_pci"]);
        assert_eq!(order(list, "absent"), None);
    }

    #[test]
    fn a_kernel_may_have_no_modules() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(needed(folder.path()), Vec::<PathBuf>::new());
        fs::write(folder.path().join("modules.dep"), "vfio_pci.ko: vfio.ko\n").unwrap();
        let files = ["vfio.ko", "vfio_pci.ko"].map(|file| folder.path().join(file));
        assert_eq!(needed(folder.path()), files);
    }

    #[test]
    fn the_libraries_are_those_that_are_mapped() {
        let maps = "00400000-00452000 r-xp 00000000 08:02 1 /usr/bin/gantry\n\
                    7f00-7f01 r-xp 0 08:02 2    /usr/lib/x86_64-linux-gnu/libc.so.6\n\
                    7f01-7f02 rw-p 0 08:02 2    /usr/lib/x86_64-linux-gnu/libc.so.6\n\
                    7f02-7f03 r--p 0 08:02 3    /usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2\n\
                    7ffe-7fff rw-p 0 00:00 0    [stack]\n";
        let libraries = libraries(maps);
        assert_eq!(libraries.len(), 2);
        assert!(libraries.contains(Path::new("/usr/lib/x86_64-linux-gnu/libc.so.6")));
    }

    #[test]
    fn an_archive_is_of_aligned_entries() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_755, b"hello", (0, 0));
        let bytes = archive.finish();
        assert!(bytes.len().is_multiple_of(4));
        assert!(bytes.starts_with(b"070701"));
        let end = bytes.windows(10).any(|part| part == b"TRAILER!!!");
        assert!(end);
    }
}
