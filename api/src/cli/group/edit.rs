//! `gantry group create|edit|rename|delete|add|remove`: changes of the group files.

use clap::Args;
use gantry_resources::{
    EditError, GroupChange, GroupFiles, HostBdf, HostDevice, HostPaths, ResourceGroup, Rule, scan,
};

use super::Kind;
use crate::output::print;
use crate::report::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry group create gpus --class gpu --device 0b:00.0 --device 0b:00.1
  gantry group create disks --type nvme --rule '{\"vendor\": \"144d\", \"numa\": 0}'")]
pub struct CreateArgs {
    /// What VMs ask for
    name: String,
    /// What kind of thing the group holds
    #[arg(long = "type", value_enum, default_value_t = Kind::Pci)]
    kind: Kind,
    /// What the devices are, for an icon only: gpu, network, storage, ...
    #[arg(long)]
    class: Option<String>,
    /// Words for people
    #[arg(long, default_value_t)]
    description: String,
    /// A rule that takes devices; may be given several times
    #[arg(long = "rule", value_name = "JSON", value_parser = super::rule)]
    rules: Vec<Rule>,
    /// A device, for which a rule is made; may be given several times
    #[arg(long = "device", value_name = "BDF")]
    devices: Vec<HostBdf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry group edit gpus --description 'Quadros of the lab'
  gantry group edit gpus --drop-rule 2 --rule '{\"vendor\": \"10de\"}'")]
pub struct EditArgs {
    /// The group
    name: String,
    /// What kind of thing the group holds
    #[arg(long = "type", value_enum)]
    kind: Option<Kind>,
    /// What the devices are, for an icon only; '' takes it away
    #[arg(long)]
    class: Option<String>,
    /// Words for people
    #[arg(long)]
    description: Option<String>,
    /// A rule to add; may be given several times
    #[arg(long = "rule", value_name = "JSON", value_parser = super::rule)]
    rules: Vec<Rule>,
    /// Number of a rule to remove, as `gantry group show` counts them; may be given several times
    #[arg(long = "drop-rule", value_name = "NUMBER")]
    drop_rules: Vec<usize>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry group rename gpus quadros")]
pub struct RenameArgs {
    /// The group
    name: String,
    /// Its new name
    to: String,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry group delete gpus")]
pub struct DeleteArgs {
    /// The group
    name: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry group add gpus 0b:00.0 0c:00.0
  gantry group remove gpus 0c:00.0")]
pub struct DevicesArgs {
    /// The group
    name: String,
    /// PCI addresses, such as 0000:01:00.0 or 01:00.0
    #[arg(value_name = "BDF", required = true)]
    devices: Vec<HostBdf>,
}

pub fn create(args: CreateArgs, paths: &HostPaths) -> Result<(), Failure> {
    let CreateArgs {
        name,
        kind,
        class,
        description,
        rules,
        devices,
    } = args;
    let devices = read(paths, &devices)?;
    let group = ResourceGroup {
        name: name.clone(),
        kind: kind.into(),
        description,
        class,
        rules,
        bind: Default::default(),
        traits: None,
        resource_class: None,
        one_time_use: false,
        file: Default::default(),
    };
    change(paths, |files| {
        files.create(group)?;
        files.add(&name, &devices)
    })
}

pub fn edit(args: EditArgs, paths: &HostPaths) -> Result<(), Failure> {
    let EditArgs {
        name,
        kind,
        class,
        description,
        rules,
        drop_rules,
    } = args;
    let wanted = GroupChange {
        name: None,
        kind: kind.map(Into::into),
        description,
        class,
        drop_rules,
        add_rules: rules,
    };
    change(paths, |files| files.change(&name, wanted))
}

pub fn rename(args: RenameArgs, paths: &HostPaths) -> Result<(), Failure> {
    let wanted = GroupChange {
        name: Some(args.to),
        ..GroupChange::default()
    };
    change(paths, |files| files.change(&args.name, wanted))
}

pub fn delete(args: &DeleteArgs, paths: &HostPaths) -> Result<(), Failure> {
    let devices = scan(paths).map_err(Failure::host)?;
    change(paths, |files| files.delete(&args.name, &devices))
}

pub fn add(args: &DevicesArgs, paths: &HostPaths) -> Result<(), Failure> {
    let devices = read(paths, &args.devices)?;
    change(paths, |files| files.add(&args.name, &devices))
}

pub fn remove(args: &DevicesArgs, paths: &HostPaths) -> Result<(), Failure> {
    let devices = read(paths, &args.devices)?;
    change(paths, |files| files.remove(&args.name, &devices))
}

fn read(paths: &HostPaths, devices: &[HostBdf]) -> Result<Vec<HostDevice>, Failure> {
    let one = |bdf: &HostBdf| HostDevice::read(paths, *bdf).map_err(Failure::host);
    devices.iter().map(one).collect()
}

fn change(
    paths: &HostPaths,
    wanted: impl FnOnce(&mut GroupFiles) -> Result<(), EditError>,
) -> Result<(), Failure> {
    let mut files = GroupFiles::open(paths).map_err(Failure::host)?;
    wanted(&mut files).map_err(Failure::host)?;
    let written = files.save().map_err(Failure::host)?;
    print(|out| {
        written
            .iter()
            .try_for_each(|path| writeln!(out, "{}: changed", path.display()))
    })
}
