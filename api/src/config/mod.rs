//! A VM's JSON file: read, and validated into the VMM's own terms.

mod inert;
mod model;
mod schema;
#[cfg(test)]
mod tests;
mod validate;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use gantry_resources::base::json::{Document, JsonError};
use gantry_resources::base::{HostPaths, label_flaw, read_text};
use gantry_resources::pools::{
    DeviceRequest, DeviceSource, GroupError, Groups, SentRequest, check_device_id,
};
use gantry_vmm::command::Attach;
use gantry_vmm::{Folders, NumaPolicy};
pub use model::{DiskConfig, PlanDevices};
pub use schema::{add_inert, schema};
use validate::Context;
pub use validate::SLOTS;

/// Why there is no [`gantry_vmm::VmConfig`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read at all.
    #[error("cannot read {what}")]
    Read {
        /// The file, as the user named it.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The name that the VM would have cannot be used.
    #[error("\"{name}\" cannot be a VM's name: {why}: give it another name with --name")]
    Name {
        /// The name.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Something in the file is wrong.
    #[error(transparent)]
    Invalid(#[from] JsonError),
}

/// Where a VM's file comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Standard input, written `-`.
    Stdin,
    /// A file.
    File(PathBuf),
}

impl From<PathBuf> for Source {
    fn from(path: PathBuf) -> Self {
        if path == Path::new("-") {
            Self::Stdin
        } else {
            Self::File(path)
        }
    }
}

impl Source {
    /// The name of the VM: `given`, or that of its file.
    pub fn name(&self, given: Option<&str>) -> String {
        match (given, self) {
            (Some(name), _) => name.to_owned(),
            (None, Self::Stdin) => "stdin".to_owned(),
            (None, Self::File(path)) => stem(path),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("<stdin>"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Options of the command line for a VM's file.
#[derive(Debug, Default)]
pub struct LoadOptions {
    /// Name of the VM; the file's stem if absent.
    pub name: Option<String>,
    /// Devices named by path may be in no group.
    pub allow_ungrouped: bool,
    /// Where the host keeps its service plans.
    pub host: HostPaths,
    /// Slots for devices to come, where the file does not say.
    pub slots: u8,
    /// Where the files that are named must lie; anywhere if absent.
    pub folders: Option<Folders>,
    /// Where disks may come from that are attached later, where the file does not say.
    pub later_disks: Vec<PathBuf>,
}

impl LoadOptions {
    fn context<'a>(&'a self, name: &'a str, folder: &'a Path) -> Context<'a> {
        Context {
            name,
            folder,
            allow_ungrouped: self.allow_ungrouped,
            host: &self.host,
            slots: self.slots,
            folders: self.folders.as_ref(),
            later_disks: &self.later_disks,
        }
    }
}

/// Reads and validates a VM's file. Of the host, only the payload's files are checked.
pub fn load(source: &Source, extras: &LoadOptions) -> Result<gantry_vmm::VmConfig, Error> {
    let text = read(source)?;
    let name = source.name(extras.name.as_deref());
    let folder = match source {
        Source::Stdin => None,
        Source::File(path) => path.parent(),
    };
    let written = SourceText {
        text: &text,
        file: &source.to_string(),
        folder: folder.unwrap_or(Path::new("")),
    };
    parse(&written, &name, extras)
}

/// The groups in `hotplug.groups` that there are not. Such a group may be made while the VM runs: it is no mistake of the
/// file. An attach reports groups that cannot be read.
pub fn unknown_groups(config: &gantry_vmm::VmConfig, host: &HostPaths) -> Vec<GroupError> {
    let Ok(groups) = Groups::load(host) else {
        return Vec::new();
    };
    let unknown = config.hotplug.from.iter().filter_map(|from| match from {
        DeviceSource::Group(name) => groups.find(name).err(),
        DeviceSource::Alias(_) | DeviceSource::Device(_) => None,
    });
    unknown.collect()
}

/// Warns of [`unknown_groups`].
pub fn warn_of_groups(config: &gantry_vmm::VmConfig, host: &HostPaths) {
    for error in unknown_groups(config, host) {
        tracing::warn!("hotplug.groups: {error}");
    }
}

/// JSON with the name of its file.
#[derive(Debug)]
pub struct SourceText<'a> {
    /// JSON.
    pub text: &'a str,
    /// Where it comes from, for errors.
    pub file: &'a str,
    /// Folder that relative paths start at.
    pub folder: &'a Path,
}

/// Validates a VM's JSON.
pub fn parse(
    written: &SourceText,
    name: &str,
    extras: &LoadOptions,
) -> Result<gantry_vmm::VmConfig, Error> {
    check_name(name)?;
    let context = extras.context(name, written.folder);
    Ok(compile(written, |model| {
        validate::convert(model, &context)
    })?)
}

/// The devices that a VM's file, or a part of one, asks for, and the NUMA nodes that they must be near to.
///
/// # Errors
/// Its keys or values are wrong.
pub fn requests(
    written: &SourceText,
    extras: &LoadOptions,
) -> Result<(Vec<DeviceRequest>, NumaPolicy), JsonError> {
    let context = extras.context("", written.folder);
    compile(written, |model| validate::requests(model, &context))
}

/// The request in the body of `vm.add-device`.
///
/// # Errors
/// The body is no JSON, has an unknown or unsupported key, or a wrong value.
pub fn attach(body: &str, allow_ungrouped: bool) -> Result<Attach, JsonError> {
    let mut document = Document::parse(Path::new("the body"), body)?;
    inert::strip(&mut document, DEVICES);
    let others = |path: &str| inert::keys_of(DEVICES, path);
    let attach = if document.root.entry("plan").is_some() {
        let planned = document.decode_beside(&others);
        planned.map(|PlanDevices { plan, id }| {
            let checked = id.as_deref().map_or(Ok(()), |id| check_device_id(id, None));
            if let Err(what) = checked {
                document.mistake("id", what);
            }
            Attach::Plan { name: plan, id }
        })
    } else {
        let request = document.decode_beside(&others);
        request.map(|request: DeviceRequest| {
            Attach::Devices(DeviceRequest {
                allow_ungrouped,
                ..request
            })
        })
    };
    document.finish(attach)
}

/// The body of a request to attach the device that comes with it as a descriptor.
///
/// # Errors
/// It is no JSON, or has keys that are unknown or choose a device.
pub fn sent(body: &str) -> Result<SentRequest, JsonError> {
    let mut document = Document::parse(Path::new("the body"), body)?;
    inert::strip(&mut document, DEVICES);
    let request = document.decode_beside(&|path: &str| inert::keys_of(DEVICES, path));
    document.finish(request)
}

/// The disk that the body of `vm.add-disk` asks for. Its file must lie in `folders`, if there are any.
///
/// # Errors
/// The body is no JSON, has a key that is not known or asks for what there is not, or makes no sense.
pub fn attach_disk(body: &str, folders: Option<&Folders>) -> Result<Attach, JsonError> {
    let mut document = Document::parse(Path::new("the body"), body)?;
    inert::strip(&mut document, DISKS);
    let model = document.decode_beside(&|path| inert::keys_of(DISKS, path));
    let attach = model.and_then(|model: DiskConfig| {
        let id = model.id.clone();
        match validate::disk("", model, Path::new(""), folders) {
            Ok(disk) => Some(Attach::Disk { id, disk }),
            Err(validate::Invalid { path, what }) => {
                document.mistake(&path, what);
                None
            }
        }
    });
    document.finish(attach)
}

/// The places of the keys of a device and of a disk in the table of inert keys.
const DEVICES: &str = "devices[]";
const DISKS: &str = "disks[]";

/// Reads a text into a validated value.
fn compile<T>(
    written: &SourceText,
    convert: impl FnOnce(model::VmConfig) -> Result<T, Vec<validate::Invalid>>,
) -> Result<T, JsonError> {
    let mut document = Document::parse(Path::new(written.file), written.text)?;
    inert::strip(&mut document, "");
    let model = document.decode_beside(&|path| inert::keys_of("", path));
    let value = model.and_then(|model| {
        let mistakes = match convert(model) {
            Ok(value) => return Some(value),
            Err(mistakes) => mistakes,
        };
        for validate::Invalid { path, what } in mistakes {
            document.mistake(&path, what);
        }
        None
    });
    document.finish(value)
}

/// The longest file that describes a VM.
pub const LONGEST: u64 = 1 << 20;

fn read(source: &Source) -> Result<String, Error> {
    let text = match source {
        Source::Stdin => read_text(std::io::stdin().lock(), LONGEST),
        // The file may be a pipe, as a shell makes for `<(...)`: reading waits for its writer.
        Source::File(path) => File::open(path).and_then(|file| read_text(file, LONGEST)),
    };
    text.map_err(|error| Error::Read {
        what: source.to_string(),
        source: error,
    })
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// A name appears in lock files, logs and tables.
fn check_name(name: &str) -> Result<(), Error> {
    match label_flaw(name) {
        None => Ok(()),
        Some(why) => Err(Error::Name {
            name: name.escape_debug().to_string(),
            why,
        }),
    }
}
