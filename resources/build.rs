//! Writes the names of pci.ids into two files without a pointer in them: one text, and a sorted
//! table of where each name lies in it.
//!
//! The crate's own tables are made of string references, which a position-independent program must
//! relocate, and so make its own, whenever it starts: 1.4 MiB of memory in every VMM.

use std::collections::BTreeMap;
use std::{env, fs, io, path::Path};

#[path = "src/facts/names/key.rs"]
mod key;

use key::{Key, record};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/facts/names/key.rs");
    let mut names: BTreeMap<u64, &'static str> = BTreeMap::new();
    for vendor in pci_ids::Vendors::iter() {
        names.insert(Key::Vendor(vendor.id()).code(), vendor.name());
        for device in vendor.devices() {
            names.insert(Key::Device(vendor.id(), device.id()).code(), device.name());
        }
    }
    for class in pci_ids::Classes::iter() {
        names.insert(Key::Class(class.id()).code(), class.name());
        for subclass in class.subclasses() {
            names.insert(
                Key::Subclass(class.id(), subclass.id()).code(),
                subclass.name(),
            );
        }
    }
    let (mut text, mut table) = (String::new(), Vec::new());
    for (code, name) in names {
        let start = u32::try_from(text.len()).map_err(io::Error::other)?;
        let len = u32::try_from(name.len()).map_err(io::Error::other)?;
        table.extend(record(code, start, len));
        text.push_str(name);
    }
    let out = env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?;
    fs::write(Path::new(&out).join("names.txt"), text)?;
    fs::write(Path::new(&out).join("names.table"), table)
}
