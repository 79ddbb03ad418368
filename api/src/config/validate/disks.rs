//! The disks of a VM.

use std::path::{Path, PathBuf, absolute};

use gantry_resources::base::json::join;
use gantry_resources::pools::{DeviceRequest, check_device_id};
use gantry_vmm::{CloudInit, DiskConfig, Folders, Queues, SERIAL_LEN, open_disk};

use super::{Context, Invalid, Mistakes, invalid, model};

/// The most disks: each takes a root port.
const MAX_DISKS: usize = 32;
const QUEUE_SIZE: u16 = 128;
const QUEUE_SIZES: std::ops::RangeInclusive<u64> = 2..=1024;
const MAX_QUEUES: u64 = 64;

/// The disks that a file names. Each is opened once, so that what is wrong with it is told with its key.
pub fn disks(
    configs: Vec<model::DiskConfig>,
    devices: &[DeviceRequest],
    context: &Context,
    mistakes: &mut Mistakes,
) -> Vec<DiskConfig> {
    if configs.len() > MAX_DISKS {
        let what = format!("{} are too many: at most {MAX_DISKS}", configs.len());
        let help = "join some into one";
        mistakes.keep::<()>(Err(invalid("disks", what, help)));
        return Vec::new();
    }
    let mut names: Vec<String> = devices.iter().flat_map(DeviceRequest::names).collect();
    // Kept free for the disk that gantry itself makes.
    names.push(CloudInit::DISK.to_owned());
    let mut all: Vec<DiskConfig> = Vec::new();
    for (index, mut config) in configs.into_iter().enumerate() {
        let key = format!("disks[{index}]");
        config.id.get_or_insert_with(|| format!("disk{index}"));
        let disk = mistakes.keep(disk(&key, config, context.folder, context.folders));
        let Some(disk) = disk else { continue };
        if names.contains(&disk.id) {
            let what = format!("another disk or device of the VM is called \"{}\"", disk.id);
            let twice = invalid(&format!("{key}.id"), what, "choose another id");
            mistakes.keep::<()>(Err(twice));
        }
        if let Some(earlier) = all.iter().position(|other| other.path == disk.path) {
            let what = format!("`disks[{earlier}]` is this file already");
            let twice = invalid(&format!("{key}.path"), what, "remove one of the two");
            mistakes.keep::<()>(Err(twice));
        } else if let Err(problem) = open_disk(&disk, context.folders) {
            let path = format!("{key}.path");
            let what = problem.to_string();
            mistakes.keep::<()>(Err(Invalid { path, what }));
        }
        names.push(disk.id.clone());
        all.push(disk);
    }
    all
}

/// The disk that is written at `key`, with its path below `folders`, or relative to `folder`.
///
/// # Errors
/// One of its values makes no disk.
pub fn disk(
    key: &str,
    config: model::DiskConfig,
    folder: &Path,
    folders: Option<&Folders>,
) -> Result<DiskConfig, Invalid> {
    if let Some(Err(what)) = config.id.as_deref().map(|id| check_device_id(id, None)) {
        let path = join(key, "id");
        return Err(Invalid { path, what });
    }
    let serial = config.serial.unwrap_or_default();
    if serial.len() > SERIAL_LEN || !serial.chars().all(|char| char.is_ascii_graphic()) {
        let help = format!("use at most {SERIAL_LEN} letters, digits and signs");
        let what = "it is no serial number of a disk";
        return Err(invalid(&join(key, "serial"), what, help));
    }
    let read_only = config.readonly.unwrap_or(false);
    let folder = match folders {
        None => folder,
        Some(Folders { payload, .. }) if read_only => payload,
        Some(Folders {
            output: Some(output),
            ..
        }) => output,
        Some(_) => {
            let what = "clients of this socket may name no file to write to";
            let help = "start gantry with --output-dir, or set \"readonly\": true";
            return Err(invalid(&join(key, "path"), what, help));
        }
    };
    Ok(DiskConfig {
        id: config.id.unwrap_or_default(),
        path: folder.join(config.path),
        read_only,
        direct: config.direct.unwrap_or(false),
        io_uring: !config.disable_io_uring.unwrap_or(false),
        serial,
        queues: Queues {
            count: queues(key, config.num_queues)?,
            size: queue_size(key, config.queue_size)?,
        },
    })
}

/// Where disks may come from that are attached later.
///
/// # Errors
/// A name leads to nothing, or clients of this socket may not say.
pub fn later(named: Option<Vec<PathBuf>>, context: &Context) -> Result<Vec<PathBuf>, Invalid> {
    let Some(named) = named else {
        return Ok(context.later_disks.to_vec());
    };
    let numbered = named.into_iter().enumerate();
    let checked = numbered.map(|(index, path)| {
        let key = format!("hotplug.disks[{index}]");
        if context.folders.is_some() {
            let what = "clients of this socket may not say where disks come from";
            return Err(invalid(&key, what, "remove the key"));
        }
        let path = absolute(context.folder.join(path));
        let there = path.and_then(|path| path.metadata().map(|_| path));
        there.map_err(|error| {
            let help = "name an image, a block device, or a folder that is there";
            invalid(&key, error, help)
        })
    });
    checked.collect()
}

fn queues(key: &str, count: Option<u64>) -> Result<u16, Invalid> {
    match count.unwrap_or(1) {
        count @ 1..=MAX_QUEUES => Ok(count as u16),
        count => {
            let what = format!("a disk cannot have {count} queues");
            let help = format!("use 1 to {MAX_QUEUES}");
            Err(invalid(&join(key, "num_queues"), what, help))
        }
    }
}

fn queue_size(key: &str, size: Option<u64>) -> Result<u16, Invalid> {
    match size.unwrap_or(QUEUE_SIZE.into()) {
        size if QUEUE_SIZES.contains(&size) && size.is_power_of_two() => Ok(size as u16),
        size => {
            let what = format!("a queue cannot have {size} entries");
            let (least, most) = (QUEUE_SIZES.start(), QUEUE_SIZES.end());
            let help = format!("use a power of two, {least} to {most}");
            Err(invalid(&join(key, "queue_size"), what, help))
        }
    }
}
