//! A VM's JSON file: read, decoded with places, validated into the VMM's own terms.

mod decode;
mod document;
mod error;
mod inert;
mod model;
mod schema;
#[cfg(test)]
mod tests;
mod validate;
mod wording;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use document::{Node, Value};
pub use error::Error;
use error::Fault;
use gantry_resources::{HostPaths, read_text};
use gantry_vmm::command::{Attach, DeviceSelector};
pub use model::{AddDevice, DeviceConfig, PlanDevices};
pub use schema::{add_inert, schema};
pub use validate::SLOTS;
use validate::{Context, Invalid};

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

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("<stdin>"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// What the command line says beside the file.
#[derive(Debug, Default)]
pub struct Extras {
    /// Name of the VM; the file's stem if absent.
    pub name: Option<String>,
    /// Devices named by path may be in no group.
    pub allow_ungrouped: bool,
    /// Where the host keeps its service plans.
    pub host: HostPaths,
    /// Slots for devices to come, where the file does not say.
    pub slots: u8,
    /// Where the files that are named must lie; anywhere if absent.
    pub folders: Option<gantry_vmm::Folders>,
}

/// The bytes that a size such as `512M` means.
pub fn bytes(text: &str) -> Option<u64> {
    let plain = text.parse().ok();
    plain.or_else(|| model::ByteSize::parse(text).map(|size| size.0))
}

/// A size for one that cannot be read, if it is plain what was meant.
pub fn meant_size(text: &str) -> Option<String> {
    model::ByteSize::meant(text)
}

/// Bytes as people write them.
pub fn size(bytes: u64) -> String {
    model::ByteSize(bytes).to_string()
}

/// Reads and validates a VM's file. Nothing is checked against the host but that the payload's
/// files can be opened.
pub fn load(source: &Source, extras: &Extras) -> Result<gantry_vmm::VmConfig, Error> {
    let text = read(source)?;
    let name = match (&extras.name, source) {
        (Some(name), _) => name.clone(),
        (None, Source::Stdin) => "stdin".to_owned(),
        (None, Source::File(path)) => stem(path),
    };
    let folder = match source {
        Source::Stdin => None,
        Source::File(path) => path.parent(),
    };
    let written = Written {
        text: &text,
        file: &source.to_string(),
        folder: folder.unwrap_or(Path::new("")),
    };
    parse(&written, &name, extras)
}

/// What describes a VM.
#[derive(Debug)]
pub struct Written<'a> {
    /// JSON.
    pub text: &'a str,
    /// Where it comes from, for errors.
    pub file: &'a str,
    /// Folder that relative paths start at.
    pub folder: &'a Path,
}

/// Validates a VM's JSON.
pub fn parse(
    written: &Written,
    name: &str,
    extras: &Extras,
) -> Result<gantry_vmm::VmConfig, Error> {
    check_name(name)?;
    let context = Context {
        name,
        folder: written.folder,
        allow_ungrouped: extras.allow_ungrouped,
        host: &extras.host,
        slots: extras.slots,
        folders: extras.folders.as_ref(),
    };
    compile(written.text, &context).map_err(|fault| fault.in_file(written.file, written.text))
}

/// What the body of `vm.add-device` asks for.
///
/// # Errors
/// The body is no JSON, has a key that is not known or asks for what there is not, or makes no sense.
pub fn attach(body: &str, allow_ungrouped: bool) -> Result<Attach, Error> {
    attach_of(body, allow_ungrouped).map_err(|fault| fault.in_file("the body", body))
}

fn attach_of(body: &str, allow_ungrouped: bool) -> Result<Attach, Fault> {
    let mut root = document::parse(body)?;
    inert::strip(&mut root, "devices[]")?;
    let misplaced = |Invalid { path, what, help }: Invalid| {
        Fault::new(locate(&root, &path), told(&path, &what)).help(help)
    };
    let planned =
        matches!(&root.value, Value::Map(entries) if entries.iter().any(|e| e.key == "plan"));
    if planned {
        let PlanDevices { plan, id } = decode::decode(&root).map_err(wording::misfit)?;
        if let Some(id) = &id {
            validate::check_id("id", id, None).map_err(misplaced)?;
        }
        let wanted = DeviceSelector::Plan(plan);
        return Ok(Attach { id, wanted });
    }
    let device = decode::decode(&root).map_err(wording::misfit)?;
    let asked = validate::device("", device, allow_ungrouped).map_err(misplaced)?;
    Ok(Attach {
        id: asked.id,
        wanted: DeviceSelector::Request(asked.request),
    })
}

/// What is wrong with the value at a path; the empty path is the whole text.
fn told(path: &str, what: &str) -> String {
    match path {
        "" => what.to_owned(),
        path => format!("`{path}`: {what}"),
    }
}

/// The whole way from text to a validated VM.
fn compile(text: &str, context: &Context) -> Result<gantry_vmm::VmConfig, Fault> {
    let mut root = document::parse(text)?;
    inert::strip(&mut root, "")?;
    let model = decode::decode(&root).map_err(wording::misfit)?;
    validate::convert(model, context).map_err(|Invalid { path, what, help }| {
        Fault::new(locate(&root, &path), told(&path, &what)).help(help)
    })
}

/// The longest file that describes a VM.
pub const LONGEST: u64 = 1 << 20;

fn read(source: &Source) -> Result<String, Error> {
    let text = match source {
        Source::Stdin => read_text(std::io::stdin().lock(), LONGEST),
        // A pipe is waited for: whoever runs gantry may name one, as a shell does for `<(...)`.
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
    match flaw(name) {
        None => Ok(()),
        Some(why) => Err(Error::Name {
            name: name.escape_debug().to_string(),
            why,
        }),
    }
}

/// What makes a text no name.
fn flaw(name: &str) -> Option<&'static str> {
    Some(match name {
        "" => "it is empty",
        name if name.len() > 64 => "it is longer than 64 bytes",
        name if name.chars().any(|c| c.is_control() || c == '/') => {
            "it holds a slash or a control character"
        }
        _ => return None,
    })
}

/// Byte offset of the value at a key path, or of the nearest value around it that is there.
fn locate(node: &Node, path: &str) -> usize {
    let (step, rest) = match path.strip_prefix('[') {
        Some(path) => path.split_once(']').unwrap_or((path, "")),
        None => path.split_at(path.find(['.', '[']).unwrap_or(path.len())),
    };
    let child = match &node.value {
        Value::Map(entries) => entries
            .iter()
            .find(|e| e.key == step)
            .map(|entry| &entry.node),
        Value::List(items) => step.parse().ok().and_then(|index: usize| items.get(index)),
        _ => None,
    };
    child.map_or(node.at, |child| {
        locate(child, rest.strip_prefix('.').unwrap_or(rest))
    })
}
