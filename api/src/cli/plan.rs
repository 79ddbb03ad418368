//! `gantry plan`: processors, memory and devices under a name.

use std::path::Path;

use clap::{Args, Subcommand};
use gantry_resources::base::{ByteSize, HostPaths};
use gantry_resources::pools::{
    Aliases, DeviceRequest, DeviceSource, Groups, Plan, Plans, change_plan, create_plan,
    delete_plan,
};
use serde::Serialize;

use super::grammar::OrNone;
use crate::output::{OutputArgs, print, print_json};
use crate::report::{Failure, USAGE};
use crate::table::{Column, Shrink, cell, column, print_table};

#[derive(Debug, Subcommand)]
#[command(after_help = "\
A VM's file with \"plan\": \"gpu2\" takes its processors, memory and devices from the plan; keys of the file win.

Examples:
  gantry plan create gpu2 --vcpus 4 --memory 8GiB --device gpus:2
  gantry plan edit gpu2 --vcpus 8
  gantry plan list")]
pub enum PlanCommand {
    /// List the plans
    List(ListArgs),
    /// Show one plan
    #[command(after_help = "Example: gantry plan show gpu2")]
    Show(NameArgs),
    /// Make a plan
    #[command(after_help = "\
Examples:
  gantry plan create gpu2 --vcpus 4 --memory 8GiB --device gpus:2
  gantry plan create crypto --alias qat-c62x-vf:2 --description 'No GPU'")]
    Create(WriteArgs),
    /// Change a plan; VMs that run are not touched
    #[command(after_help = "\
Each option replaces a part of the plan; '' removes a description or aliases.

Examples:
  gantry plan edit gpu2 --memory 16GiB
  gantry plan edit gpu2 --device gpus:4 --device disks:1")]
    Edit(WriteArgs),
    /// Delete a plan; VMs that run are not touched
    #[command(after_help = "Example: gantry plan delete gpu2")]
    Delete(DeleteArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry plan list --json")]
pub struct ListArgs {
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort by
    #[arg(long, value_name = "COLUMN", value_parser = column(&COLUMNS))]
    sort: Option<String>,
}

#[derive(Debug, Args)]
pub struct NameArgs {
    /// The plan
    name: String,
}

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The plan
    name: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// A change of a plan, as JSON.
#[derive(Debug, Serialize)]
struct ChangeReport<'a> {
    plan: &'a str,
    done: &'static str,
    files: [&'a Path; 1],
}

#[derive(Debug, Args)]
pub struct WriteArgs {
    /// The plan, as VMs ask for it
    name: String,
    #[command(flatten)]
    fields: PlanFields,
    #[command(flatten)]
    output: OutputArgs,
}

/// The fields of a plan.
#[derive(Debug, Args)]
struct PlanFields {
    /// A description
    #[arg(long)]
    description: Option<String>,
    /// Number of processors
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=254))]
    vcpus: Option<u64>,
    /// Size of the RAM, such as 512M or 4GiB
    #[arg(long)]
    memory: Option<ByteSize>,
    /// Devices of a group, with their count; may be given several times
    #[arg(long = "device", value_name = "GROUP:COUNT", value_parser = request)]
    devices: Vec<DeviceRequest>,
    /// Devices by aliases with counts, such as 'gpu:1, qat-c62x-vf:2'
    #[arg(long = "alias", value_name = "ALIASES", value_parser = aliases)]
    aliases: Option<OrNone<Aliases>>,
}

impl PlanFields {
    /// Whether nothing but a description is given.
    fn is_empty(&self) -> bool {
        let no_aliases = matches!(self.aliases, None | Some(OrNone(None)));
        self.vcpus.is_none() && self.memory.is_none() && self.devices.is_empty() && no_aliases
    }

    /// Replaces what is given.
    fn replace(self, plan: &mut Plan) {
        plan.description = self
            .description
            .unwrap_or(std::mem::take(&mut plan.description));
        plan.vcpus = self.vcpus.or(plan.vcpus);
        plan.memory = self.memory.or(plan.memory);
        if !self.devices.is_empty() {
            plan.devices = self.devices;
        }
        if let Some(OrNone(aliases)) = self.aliases {
            plan.aliases = aliases;
        }
    }
}

fn request(text: &str) -> Result<DeviceRequest, String> {
    let (group, count) = text.split_once(':').unwrap_or((text, "1"));
    let count: u32 = count.parse().unwrap_or(0);
    if group.is_empty() || count == 0 {
        return Err("write a group and a count, such as gpus:2".to_owned());
    }
    Ok(DeviceRequest::group(group, count))
}

fn aliases(text: &str) -> Result<OrNone<Aliases>, String> {
    OrNone::parse(text, str::parse)
}

const COLUMNS: [Column; 5] = [
    Column::full("name"),
    Column::full("vcpus"),
    Column::full("memory"),
    Column::new("devices", Shrink::Cut(12)),
    Column::new("description", Shrink::Cut(12)),
];

pub fn plan(command: PlanCommand, paths: &HostPaths) -> Result<(), Failure> {
    match command {
        PlanCommand::List(args) => list(&args, paths),
        PlanCommand::Show(args) => show(&args.name, paths),
        PlanCommand::Create(args) if args.fields.is_empty() => {
            let what = format!("plan {} would be empty", args.name);
            let help = "give it --vcpus, --memory, --device or --alias";
            Err(Failure::new(USAGE, what).help(help))
        }
        PlanCommand::Create(args) => {
            let mut plan = Plan::named(&args.name);
            args.fields.replace(&mut plan);
            let file = create_plan(paths, plan)?;
            written(&args.name, "created", &file, args.output, paths)
        }
        PlanCommand::Edit(args) => {
            let change = |plan: &mut Plan| args.fields.replace(plan);
            let file = change_plan(paths, &args.name, change)?;
            written(&args.name, "changed", &file, args.output, paths)
        }
        PlanCommand::Delete(args) => {
            let file = delete_plan(paths, &args.name)?;
            print_change(&args.name, "deleted", "from", &file, args.output)
        }
    }
}

/// Warns of groups that the plan names and the host lacks.
fn warn_of_groups(plan: &str, paths: &HostPaths) -> Result<(), Failure> {
    let plans = Plans::load(paths)?;
    let groups = Groups::load(paths)?;
    let named = plans.find(plan)?.groups();
    for error in named.filter_map(|group| groups.find(group).err()) {
        tracing::warn!("plan {plan}: {error}");
    }
    Ok(())
}

/// Prints what changed in a plan, and warns of groups that the host lacks.
fn written(
    name: &str,
    what: &'static str,
    file: &Path,
    args: OutputArgs,
    paths: &HostPaths,
) -> Result<(), Failure> {
    warn_of_groups(name, paths)?;
    print_change(name, what, "in", file, args)
}

fn print_change(
    plan: &str,
    done: &'static str,
    place: &str,
    file: &Path,
    args: OutputArgs,
) -> Result<(), Failure> {
    let files = [file];
    args.print(&ChangeReport { plan, done, files }, |out| {
        writeln!(out, "plan {plan}: {done} ({place} {})", file.display())
    })
}

fn show(name: &str, paths: &HostPaths) -> Result<(), Failure> {
    let plans = Plans::load(paths)?;
    print_json(plans.find(name)?)
}

fn list(args: &ListArgs, paths: &HostPaths) -> Result<(), Failure> {
    let plans = Plans::load(paths)?;
    if args.json {
        return print_json(&plans.iter().collect::<Vec<_>>());
    }
    let rows: Vec<Vec<String>> = plans.iter().map(cells).collect();
    if rows.is_empty() {
        return print(|out| writeln!(out, "There are no plans: `gantry plan create` makes one"));
    }
    print_table(&COLUMNS, rows, args.sort.as_deref())
}

fn cells(plan: &Plan) -> Vec<String> {
    let devices = plan.devices.iter().map(|request| match &request.from {
        DeviceSource::Group(name) | DeviceSource::Alias(name) => {
            format!("{name}:{}", request.count)
        }
        DeviceSource::Device(name) => name.to_string(),
    });
    let aliases = plan.aliases.iter().map(Aliases::to_string);
    let devices: Vec<String> = devices.chain(aliases).collect();
    vec![
        plan.name.clone(),
        cell(plan.vcpus),
        cell(plan.memory),
        cell(Some(devices.join(", "))),
        cell(Some(&plan.description)),
    ]
}
