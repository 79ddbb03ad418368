//! The questions of `gantry init`.

use std::io;
use std::path::PathBuf;

use dialoguer::{Confirm, Input, Select};
use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{Card, cards, scan};
use gantry_resources::moving::{self, BindRequest, ChildWriter};

use super::{InitArgs, newest_kernel};
use crate::report::Failure;

/// Asks for what the VM is to have and was not named.
pub fn missing(mut args: InitArgs, paths: &HostPaths) -> Result<InitArgs, Failure> {
    if args.devices.is_empty() && args.group.is_none() {
        args.devices = device(paths)?;
    }
    if args.kernel.is_none() {
        let (kernel, initramfs) = newest_kernel("/boot".as_ref()).unzip();
        let mut input = Input::<String>::new().with_prompt("Kernel");
        if let Some(kernel) = &kernel {
            input = input.default(kernel.display().to_string());
        }
        let chosen = PathBuf::from(input.interact_text().map_err(failed)?);
        // The initramfs goes with the kernel that was offered.
        if kernel.as_ref() == Some(&chosen) {
            args.initramfs = args.initramfs.or(initramfs.flatten());
        }
        args.kernel = Some(chosen);
    }
    if args.disk.is_none() {
        let disk = Input::<String>::new()
            .with_prompt("Disk for its root (a raw image or a block device; empty for none)")
            .allow_empty(true);
        let disk = disk.interact_text().map_err(failed)?;
        args.disk = (!disk.is_empty()).then(|| disk.into());
    }
    Ok(args)
}

/// Asks for a device among those that the host does not use.
fn device(paths: &HostPaths) -> Result<Vec<gantry_resources::base::HostBdf>, Failure> {
    let all = scan(paths)?;
    let free = |card: &Card| {
        let request = BindRequest {
            devices: &[card.first().bdf],
            overrides: &[],
            dry_run: true,
        };
        moving::detach(paths, &ChildWriter::default(), &request).is_ok()
    };
    let functions = all.iter().filter(|device| !device.is_bridge());
    let cards: Vec<Card> = cards(functions).into_iter().filter(free).collect();
    let mut items: Vec<String> = cards.iter().map(words).collect();
    items.push("none".to_owned());
    let chosen = Select::new()
        .with_prompt("Device for the VM (those that the host itself uses are left out)")
        .items(&items)
        .default(0)
        .interact()
        .map_err(failed)?;
    let card = cards.get(chosen);
    Ok(card.map(|card| card.first().bdf).into_iter().collect())
}

/// `0000:01:00.0 NVMe SSD Controller (nvme)`
fn words(card: &Card) -> String {
    let device = card.first();
    let name = device.device_name().or(device.class_name());
    let driver = device.driver.as_deref().unwrap_or("no driver");
    format!("{} {} ({driver})", device.bdf, name.unwrap_or("device"))
}

/// Asks whether to do it.
pub fn confirm() -> Result<bool, Failure> {
    let question = Confirm::new().with_prompt("Do it?");
    question.default(false).interact().map_err(failed)
}

fn failed(error: dialoguer::Error) -> Failure {
    let dialoguer::Error::IO(error) = error;
    match error.kind() {
        io::ErrorKind::Interrupted => Failure::host("nothing was done"),
        _ => Failure::host(format!("cannot ask: {error}")),
    }
}
