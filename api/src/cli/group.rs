//! `gantry group`: the named groups of devices that VMs take devices from.

pub mod activate;
mod alias;
mod edit;
pub mod fit;
mod list;
mod matching;
mod show;

use clap::{Subcommand, ValueEnum};
use gantry_resources::base::HostPaths;
use gantry_resources::base::json;
use gantry_resources::pools::GroupType;
use serde::de::DeserializeOwned;

use super::grammar::OrNone;
use crate::report::Failure;
pub use list::{Counts, counts};

#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  gantry group list
  gantry group create gpus --class gpu --device 0b:00.0 --device 0c:00.0")]
pub enum GroupCommand {
    /// List the groups with what they hold
    List(list::ListArgs),
    /// Show one group: its rules, and the devices they take
    Show(show::ShowArgs),
    /// Show what a rule or a group matches, without changing anything
    Match(matching::MatchArgs),
    /// Show what a request would get, without taking anything
    Fit(fit::FitArgs),
    /// List the aliases of devices, or define some in Nova's form
    Alias(alias::AliasArgs),
    /// List the devices that aliases may take besides those in groups, or define some in Nova's form
    DeviceSpec(alias::SpecArgs),
    /// Make the virtual functions or vGPUs of groups, with their settings
    Activate(activate::ActivateArgs),
    /// Destroy the virtual functions or vGPUs of groups
    Deactivate(activate::DeactivateArgs),
    /// Make a group, of rules or of chosen devices
    Create(Box<edit::CreateArgs>),
    /// Change a group's type, class, description or rules
    Edit(Box<edit::EditArgs>),
    /// Give a group another name
    Rename(edit::RenameArgs),
    /// Delete a group; its devices stay where they are
    Delete(edit::DeleteArgs),
    /// Put devices into a group, with a rule for each
    Add(edit::DevicesArgs),
    /// Take devices out of a group, with the rules that name them
    Remove(edit::RemoveArgs),
}

pub fn group(command: GroupCommand, paths: &HostPaths) -> Result<(), Failure> {
    match command {
        GroupCommand::List(args) => list::list(&args, paths),
        GroupCommand::Show(args) => show::show(&args, paths),
        GroupCommand::Match(args) => matching::matching(&args, paths),
        GroupCommand::Fit(args) => fit::show(&args, paths),
        GroupCommand::Alias(args) => alias::alias(args, paths),
        GroupCommand::DeviceSpec(args) => alias::device_spec(args, paths),
        GroupCommand::Activate(args) => activate::on(&args, paths),
        GroupCommand::Deactivate(args) => activate::off(&args, paths),
        GroupCommand::Create(args) => edit::create(*args, paths),
        GroupCommand::Edit(args) => edit::edit(*args, paths),
        GroupCommand::Rename(args) => edit::rename(args, paths),
        GroupCommand::Delete(args) => edit::delete(&args, paths),
        GroupCommand::Add(args) => edit::add(&args, paths),
        GroupCommand::Remove(args) => edit::remove(&args, paths),
    }
}

/// The types of groups on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    /// Any PCI function
    Pci,
    /// NVMe controllers
    Nvme,
    /// Virtual functions of network cards
    SriovNic,
    /// Mediated devices
    Vgpu,
    /// USB devices
    Usb,
}

impl From<Kind> for GroupType {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Pci => Self::Pci,
            Kind::Nvme => Self::Nvme,
            Kind::SriovNic => Self::SriovNic,
            Kind::Vgpu => Self::Vgpu,
            Kind::Usb => Self::Usb,
        }
    }
}

/// A JSON object on the command line.
fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    match text.trim().starts_with('{') {
        true => json::from_text(text).map_err(|error| error.to_string()),
        false => Err(
            "write a JSON object, such as '{\"vendor\": \"10de\"}', in single quotes".to_owned(),
        ),
    }
}

/// A JSON object on the command line that `''` removes.
fn json_or_none<T: DeserializeOwned>(text: &str) -> Result<OrNone<T>, String> {
    OrNone::parse(text, from_json)
}
