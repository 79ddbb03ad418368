//! `gantry group create|edit|rename|delete|add|remove`: changes of the group files.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use gantry_resources::base::{BdfError, HostBdf, HostPaths};
use gantry_resources::inventory::{HostDevice, UsbDevice, scan_usb};
use gantry_resources::pools::{
    Bind, Chosen, EditError, GroupChange, GroupFiles, Plans, ResourceGroup, Rule, SriovSpec,
    VgpuSpec,
};

use super::Kind;
use crate::cli::grammar::OrNone;
use crate::cli::group_change::{GroupSnapshot, Hardware};
use crate::output::OutputArgs;
use crate::report::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry group create gpus --class gpu --device 0b:00.0 --device 0b:00.1
  gantry group create disks --type nvme --rule '{\"numa\": 0}'
  gantry group create vfs --type sriov-nic \\
      --sriov '{\"pf\": \"03:00.0\", \"count\": 4, \"vlan\": 100}'")]
pub struct CreateArgs {
    /// Name of the group, which VMs ask for
    name: String,
    /// What the group holds
    #[arg(long = "type", value_enum, default_value_t = Kind::Pci)]
    kind: Kind,
    /// What the devices are, for an icon only: gpu, network, storage, ...
    #[arg(long)]
    class: Option<String>,
    /// A description
    #[arg(long, default_value_t, hide_default_value = true)]
    description: String,
    #[command(flatten)]
    options: DeviceOptions,
    /// A rule that takes devices; may be given several times
    #[arg(long = "rule", value_name = "JSON", value_parser = super::from_json::<Rule>)]
    rules: Vec<Rule>,
    /// A device, by its address or USB port, for which a rule is made; may be given several times
    #[arg(long = "device", value_name = "DEVICE")]
    devices: Vec<DeviceAddress>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry group edit gpus --description 'Quadros of the lab'
  gantry group edit gpus --drop-rule 2 --rule '{\"vendor\": \"10de\"}'")]
pub struct EditArgs {
    /// The group
    name: String,
    /// What the group holds
    #[arg(long = "type", value_enum)]
    kind: Option<Kind>,
    /// What the devices are, for an icon only; '' takes it away
    #[arg(long)]
    class: Option<String>,
    /// A description
    #[arg(long)]
    description: Option<String>,
    #[command(flatten)]
    options: DeviceOptions,
    /// A rule to add; may be given several times
    #[arg(long = "rule", value_name = "JSON", value_parser = super::from_json::<Rule>)]
    rules: Vec<Rule>,
    /// Number of a rule to remove, as `gantry group show` counts them; may be given several times
    #[arg(long = "drop-rule", value_name = "NUMBER")]
    drop_rules: Vec<usize>,
    /// Change the group even if virtual functions or vGPUs exist that it would no longer define; they stay
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Properties of a group's devices.
#[derive(Debug, Args)]
struct DeviceOptions {
    /// When devices leave their host drivers
    #[arg(long, value_enum)]
    bind: Option<BindOption>,
    /// Keep a device out of the group after a VM has used it, until it is released
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    one_time_use: Option<bool>,
    /// Traits that a request may ask for, with commas between; '' takes them away
    #[arg(long, value_name = "NAMES")]
    traits: Option<String>,
    /// Resource class that an alias may ask for; '' takes it away
    #[arg(long, value_name = "NAME")]
    resource_class: Option<String>,
    /// Virtual functions that `gantry group activate` makes; '' takes them away
    #[arg(long, value_name = "JSON", value_parser = super::json_or_none::<SriovSpec>)]
    sriov: Option<OrNone<SriovSpec>>,
    /// Virtual GPUs, or other mediated devices, that VMs get; '' takes them away
    #[arg(long, value_name = "JSON", value_parser = super::json_or_none::<VgpuSpec>)]
    vgpu: Option<OrNone<VgpuSpec>>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BindOption {
    /// With `gantry device detach`
    Manual,
    /// When the host boots: see `gantry device persist`
    Boot,
    /// When a VM takes them; they go back when it ends
    Demand,
}

impl From<BindOption> for Bind {
    fn from(when: BindOption) -> Self {
        match when {
            BindOption::Manual => Self::Manual,
            BindOption::Boot => Self::Boot,
            BindOption::Demand => Self::Demand,
        }
    }
}

impl DeviceOptions {
    fn change(self) -> GroupChange {
        GroupChange {
            bind: self.bind.map(Into::into),
            one_time_use: self.one_time_use,
            traits: self.traits.map(|text| text.split(',').collect()),
            resource_class: self.resource_class,
            sriov: self.sriov.map(|OrNone(spec)| spec),
            vgpu: self.vgpu.map(|OrNone(spec)| spec),
            ..GroupChange::default()
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry group rename gpus quadros")]
pub struct RenameArgs {
    /// The group
    name: String,
    /// Its new name
    to: String,
    /// Rename the group even if a VM has a device of it
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry group delete gpus")]
pub struct DeleteArgs {
    /// The group
    name: String,
    /// Delete the group even if a VM has a device of it, or virtual functions or vGPUs of it exist; they stay
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry group remove gpus 0c:00.0")]
pub struct RemoveArgs {
    #[command(flatten)]
    common: DevicesArgs,
    /// Remove devices even if a VM has them; the VM keeps them
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry group add gpus 0b:00.0 0c:00.0
  gantry group add sticks 1-4.2")]
pub struct DevicesArgs {
    /// The group
    name: String,
    /// PCI addresses, such as 01:00.0, or ports of USB devices, such as 1-4.2
    #[arg(value_name = "DEVICE", required = true)]
    devices: Vec<DeviceAddress>,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn create(args: CreateArgs, paths: &HostPaths) -> Result<(), Failure> {
    let CreateArgs {
        name,
        kind,
        class,
        description,
        options,
        rules,
        devices,
        output,
    } = args;
    let devices = read(paths, &devices)?;
    let group = ResourceGroup {
        kind: kind.into(),
        description,
        class,
        rules,
        ..ResourceGroup::named(&name)
    };
    change(paths, output, [&name, &name], |files| {
        files.create(group)?;
        files.change(&name, options.change())?;
        files.add_chosen(&name, &devices.chosen())?;
        warn_of(files.is_possible(paths, &name)?, &name);
        Ok(())
    })
}

pub fn edit(args: EditArgs, paths: &HostPaths) -> Result<(), Failure> {
    let EditArgs {
        name,
        kind,
        class,
        description,
        options,
        rules,
        drop_rules,
        force,
        output,
    } = args;
    let wanted = GroupChange {
        name: None,
        kind: kind.map(Into::into),
        description,
        class,
        drop_rules,
        add_rules: rules,
        ..options.change()
    };
    change(paths, output, [&name, &name], |files| {
        if !force {
            files.check_made_stays_defined(paths, &name, &wanted)?;
        }
        let asks = wanted.kind.is_some() || wanted.sriov.is_some() || wanted.vgpu.is_some();
        files.change(&name, wanted)?;
        if asks {
            warn_of(files.is_possible(paths, &name)?, &name);
        }
        Ok(())
    })
}

/// Warns about what a group lacks for now.
fn warn_of(lacking: Option<String>, group: &str) {
    if let Some(lacking) = lacking {
        tracing::warn!("group {group}: {lacking}");
    }
}

/// Warns about plans that ask for a group which does not exist any more.
fn warn_of_plans(paths: &HostPaths, group: &str) {
    // The commands that use plans report those that cannot be read.
    let plans = Plans::load(paths).unwrap_or_default();
    for plan in plans
        .iter()
        .filter(|plan| plan.groups().any(|one| one == group))
    {
        tracing::warn!(
            "plan {0} asks for group {group}: `gantry plan edit {0}` changes that",
            plan.name
        );
    }
}

pub fn rename(args: RenameArgs, paths: &HostPaths) -> Result<(), Failure> {
    let RenameArgs {
        name,
        to,
        force,
        output,
    } = args;
    let wanted = GroupChange {
        name: Some(to.clone()),
        ..GroupChange::default()
    };
    change(paths, output, [&name, &to], |files| {
        if !force {
            files.is_idle(paths, &name, None)?;
        }
        files.change(&name, wanted)
    })?;
    warn_of_plans(paths, &name);
    Ok(())
}

pub fn delete(args: &DeleteArgs, paths: &HostPaths) -> Result<(), Failure> {
    let DeleteArgs {
        name,
        force,
        output,
    } = args;
    change(paths, *output, [name, name], |files| {
        if !force {
            files.is_idle(paths, name, None)?;
            files.check_nothing_made(paths, name)?;
        }
        files.delete(name)
    })?;
    warn_of_plans(paths, name);
    Ok(())
}

pub fn add(args: &DevicesArgs, paths: &HostPaths) -> Result<(), Failure> {
    let devices = read(paths, &args.devices)?;
    let name = &args.name;
    change(paths, args.output, [name, name], |files| {
        files.add_chosen(name, &devices.chosen())
    })
}

pub fn remove(args: &RemoveArgs, paths: &HostPaths) -> Result<(), Failure> {
    let RemoveArgs { common, force } = args;
    let leaving = read(paths, &common.devices)?;
    let name = &common.name;
    change(paths, common.output, [name, name], |files| {
        if !force {
            let functions: Vec<HostBdf> = leaving.pci.iter().map(|device| device.bdf).collect();
            files.is_idle(paths, name, Some(&functions))?;
        }
        files.remove(name, &leaving.chosen())
    })
}

/// The address of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
enum DeviceAddress {
    Pci(HostBdf),
    /// The bus, and the ports on the way.
    Usb(String),
}

impl FromStr for DeviceAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| !part.is_empty() && part.bytes().all(|one| one.is_ascii_digit());
        match text.split_once('-') {
            Some((bus, ports)) if number(bus) && ports.split('.').all(number) => {
                Ok(Self::Usb(text.to_owned()))
            }
            _ => text
                .parse()
                .map(Self::Pci)
                .map_err(|error: BdfError| format!("{error}, and a USB port like 1-4.2")),
        }
    }
}

/// Devices that the command line names.
struct NamedDevices {
    pci: Vec<HostDevice>,
    usb: Vec<UsbDevice>,
}

impl NamedDevices {
    fn chosen(&self) -> Vec<Chosen<'_>> {
        let usb = self.usb.iter().map(Chosen::Usb);
        self.pci.iter().map(Chosen::Pci).chain(usb).collect()
    }
}

fn read(paths: &HostPaths, places: &[DeviceAddress]) -> Result<NamedDevices, Failure> {
    let mut devices = NamedDevices {
        pci: Vec::new(),
        usb: Vec::new(),
    };
    for place in places {
        match place {
            DeviceAddress::Pci(bdf) => {
                let device = HostDevice::read(paths, *bdf)?;
                devices.pci.push(device);
            }
            DeviceAddress::Usb(port) => {
                let all = scan_usb(paths)?;
                let found = all.into_iter().find(|device| device.port == *port);
                devices.usb.push(found.ok_or_else(|| {
                    Failure::host(format!("there is no USB device at {port}"))
                        .help("`gantry device list --type usb` shows the ports")
                })?);
            }
        }
    }
    Ok(devices)
}

/// Changes a group as `wanted`, from its old name to its new one, and prints what changed.
fn change(
    paths: &HostPaths,
    output: OutputArgs,
    [before, after]: [&str; 2],
    wanted: impl FnOnce(&mut GroupFiles) -> Result<(), EditError>,
) -> Result<(), Failure> {
    let hardware = Hardware::read(paths)?;
    let mut files = GroupFiles::open(paths)?;
    let before = GroupSnapshot::of(before, &files, &hardware)?;
    wanted(&mut files)?;
    let changed = before.changed(after, &files, &hardware)?;
    let written = files.save()?;
    changed.print(written, output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_by_its_address_or_its_port() {
        let usb = |text: &str| Ok(DeviceAddress::Usb(text.to_owned()));
        assert_eq!("1-4.2".parse(), usb("1-4.2"));
        assert_eq!("2-1".parse(), usb("2-1"));
        assert!(matches!("01:00.0".parse(), Ok(DeviceAddress::Pci(_))));
        for wrong in ["1-", "-4", "1-4.", "1-a", "usb1", "1"] {
            let said = wrong.parse::<DeviceAddress>().unwrap_err();
            assert!(said.contains("1-4.2"), "{said}");
        }
    }
}
