//! `gantry device persist`: prints what binds devices to vfio-pci at boot.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use gantry_resources::base::{HostBdf, HostPaths};
use gantry_resources::inventory::scan;
use gantry_resources::moving::{PersistBy, Persistent, persist, persist_functions, persist_unit};
use gantry_resources::pools::{Bind, Groups, ResourceGroup};

use crate::output::{print, print_json};
use crate::report::{Failure, USAGE};

#[derive(Debug, Args)]
#[command(after_help = "\
Without addresses and groups: the devices of all groups that say \"bind\": \"boot\".

Examples:
  gantry device persist
  gantry device persist 0b:00.0 --output /etc/udev/rules.d/10-gantry.rules
  gantry device persist --group gpus --by modprobe
  gantry device persist --by systemd")]
pub struct PersistArgs {
    /// PCI addresses, such as 0000:01:00.0 or 01:00.0
    #[arg(value_name = "BDF")]
    devices: Vec<HostBdf>,
    /// All devices of a group; may be given several times
    #[arg(long = "group", value_name = "NAME")]
    groups: Vec<String>,
    /// What binds the devices at boot
    #[arg(long, value_enum, default_value_t = By::Udev)]
    by: By,
    /// Write this file instead of standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Include this device even if the host uses it now
    #[arg(long = "override", value_name = "BDF")]
    overrides: Vec<HostBdf>,
    /// Show the result as JSON
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum By {
    /// A udev rule for each address
    Udev,
    /// Options for modprobe, by vendor and device id
    Modprobe,
    /// A unit for systemd that runs `gantry boot`
    Systemd,
}

pub fn show(args: &PersistArgs, paths: &HostPaths) -> Result<(), Failure> {
    let gantry = std::env::current_exe().unwrap_or_else(|_| "/usr/local/bin/gantry".into());
    let made = match args.by {
        By::Udev => made(args, paths, PersistBy::Udev, &gantry)?,
        By::Modprobe => made(args, paths, PersistBy::Modprobe, &gantry)?,
        By::Systemd if !args.devices.is_empty() || !args.groups.is_empty() => {
            let what = "a unit names no devices: `gantry boot` looks at the groups at each boot";
            return Err(Failure::new(USAGE, what).help("`gantry group edit NAME --bind boot`"));
        }
        By::Systemd => persist_unit(&gantry),
    };
    if args.json {
        return print_json(&made);
    }
    for warning in &made.warnings {
        tracing::warn!("{warning}");
    }
    match &args.output {
        None => print(|out| {
            write!(out, "{}", made.text)?;
            writeln!(out, "# Save this as {}, then run: {}", made.file, made.then)
        }),
        Some(file) => {
            let written = made.save(file);
            written.map_err(|error| {
                Failure::host(format!("cannot write {}: {error}", file.display()))
            })?;
            print(|out| writeln!(out, "{}: written; now run: {}", file.display(), made.then))
        }
    }
}

/// Rules or options that name devices.
fn made(
    args: &PersistArgs,
    paths: &HostPaths,
    by: PersistBy,
    gantry: &Path,
) -> Result<Persistent, Failure> {
    let groups = Groups::load(paths)?;
    let (devices, functions) = chosen(args, &groups, paths)?;
    if !functions.is_empty() && matches!(args.by, By::Modprobe) {
        let what = "modprobe makes no virtual functions";
        return Err(Failure::new(USAGE, what).help("leave --by out: a udev rule activates groups"));
    }
    let mut made = persist(paths, &devices, &args.overrides, by)?;
    made.text += &persist_functions(&functions, gantry);
    Ok(made)
}

/// The devices to bind, and the groups whose virtual functions to create.
fn chosen<'g>(
    args: &PersistArgs,
    groups: &'g Groups,
    paths: &HostPaths,
) -> Result<(Vec<HostBdf>, Vec<&'g ResourceGroup>), Failure> {
    for name in &args.groups {
        groups.find(name)?;
    }
    let by_default = args.devices.is_empty() && args.groups.is_empty();
    let mut devices = args.devices.clone();
    let wanted = |group: &&ResourceGroup| {
        args.groups.contains(&group.name) || (by_default && group.bind == Bind::Boot)
    };
    let functions: Vec<_> = groups
        .iter()
        .filter(|group| wanted(group) && group.sriov.is_some())
        .collect();
    for device in scan(paths)? {
        let Some(group) = groups.group_of(&device) else {
            continue;
        };
        // Activation binds the functions that it creates.
        let made = group.sriov.as_ref().map(|spec| spec.pf);
        if wanted(&group) && (made.is_none() || device.physfn != made) {
            devices.push(device.bdf);
        }
    }
    if devices.is_empty() && functions.is_empty() {
        let what = "there is nothing to persist: no device is in a group with \"bind\": \"boot\"";
        return Err(Failure::new(USAGE, what)
            .help("name devices or groups, or `gantry group edit NAME --bind boot`"));
    }
    Ok((devices, functions))
}
