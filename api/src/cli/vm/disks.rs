//! `gantry vm attach-disk` and `gantry vm resize-disk`: disks of a VM that are files or block devices.

use std::path::{PathBuf, absolute};
use std::time::Duration;

use clap::Args;
use gantry_resources::base::{ByteSize, HostPaths};
use serde::Serialize;

use super::devices::wait_until_enabled;
use super::find;
use crate::http::wire::{AddedDisk, Device, DeviceState, ResizeDisk};
use crate::output::{print, print_json};
use crate::report::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
The VM's file names the images that can be attached, or their folders, and has a slot for each: `\"hotplug\": \
{\"slots\": 8, \"disks\": [\"/srv/images\"]}`. `gantry vm detach` takes a disk back.

Examples:
  gantry vm attach-disk web-1 /srv/images/data.raw
  gantry vm attach-disk web-1 /dev/vg0/data --id data --readonly")]
pub struct AttachDiskArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    /// Raw image or block device
    #[arg(value_name = "FILE")]
    path: PathBuf,
    /// The guest may not write to it
    #[arg(long)]
    readonly: bool,
    /// Access it past the host's page cache
    #[arg(long)]
    direct: bool,
    /// Serial number that the guest sees
    #[arg(long)]
    serial: Option<String>,
    /// Name that the disk gets in the VM [default: disk0, disk1 ...]
    #[arg(long)]
    id: Option<String>,
    /// How long to wait for the guest, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u32,
    /// Do not wait for the guest's driver
    #[arg(long)]
    no_wait: bool,
    /// Show the disk as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
An image grows as far as the disk does. A block device is made larger first, as with `lvextend`, and its guest told by \
this command. A disk is never made smaller while its VM runs.

Example: gantry vm resize-disk web-1 disk0 20G")]
pub struct ResizeDiskArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    /// Name of the disk in the VM; `gantry vm info` shows them
    #[arg(value_name = "DISK")]
    id: String,
    /// Its new size: a number of bytes, or one such as 20G
    #[arg(value_name = "SIZE")]
    size: ByteSize,
    /// Print the request as JSON once it is done
    #[arg(long)]
    json: bool,
}

pub fn resize(args: &ResizeDiskArgs, paths: &HostPaths) -> Result<(), Failure> {
    let ByteSize(desired_size) = args.size;
    let request = ResizeDisk {
        id: args.id.clone(),
        desired_size,
    };
    find::vm(&args.vm, paths)?.put_json::<()>("vm.resize-disk", &request)?;
    if args.json {
        return print_json(&request);
    }
    print(|out| writeln!(out, "{} has {} now", args.id, args.size))
}

/// The body of `vm.add-disk`.
#[derive(Debug, Serialize)]
struct Request {
    path: PathBuf,
    readonly: bool,
    direct: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

pub fn attach(args: AttachDiskArgs, paths: &HostPaths) -> Result<(), Failure> {
    let client = find::vm(&args.vm, paths)?;
    let mut events = client.events()?;
    let path = absolute(&args.path).unwrap_or(args.path);
    let request = Request {
        path: path.clone(),
        readonly: args.readonly,
        direct: args.direct,
        serial: args.serial,
        id: args.id,
    };
    let added: Option<AddedDisk> = client.put_json("vm.add-disk", &request)?;
    let mut disks: Vec<Device> = Vec::from_iter(added.map(|AddedDisk { id, bdf }| Device {
        id,
        host: None,
        path: Some(path),
        pci_bdf: bdf,
        group: None,
        state: DeviceState::Announced,
        together_with: Vec::new(),
    }));
    if !args.no_wait {
        let wait = Duration::from_secs(args.timeout.into());
        wait_until_enabled((&client, &args.vm), &mut events, &mut disks, wait)?;
    }
    if args.json {
        return print_json(&disks);
    }
    let vm = &args.vm;
    print(|out| match disks.first() {
        None => writeln!(out, "{vm} will have it when it boots"),
        Some(disk) => writeln!(
            out,
            "{} is attached to {vm}, there as {}",
            disk.id, disk.pci_bdf
        ),
    })
}
