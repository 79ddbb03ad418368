//! `gantry tenant list` and `show`: tenants and their devices.

use clap::Args;
use gantry_resources::base::{DeviceName, HostBdf, HostPaths, Uuid};
use gantry_resources::facts::PciId;
use gantry_resources::inventory::{DeviceState, HostDevice, MdevDevice, Mdevs, cards, scan};
use gantry_resources::pools::{Tenant, TenantFile, Tenants};
use serde::Serialize;

use crate::cli::device::state_word;
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{Column, Shrink, cell, column, print_table};

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant list --sort devices")]
pub struct ListArgs {
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort by
    #[arg(long, value_name = "COLUMN", value_parser = column(&COLUMNS))]
    sort: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant show lab")]
pub struct ShowArgs {
    /// The tenant
    name: String,
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
}

const COLUMNS: [Column; 5] = [
    Column::full("name"),
    Column::full("user"),
    Column::full("devices"),
    Column::full("used"),
    Column::new("description", Shrink::Cut(12)),
];

/// A tenant with its devices.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'a str,
    #[serde(flatten)]
    file: &'a TenantFile,
    /// Number of devices; a card counts once.
    total: usize,
    used: usize,
    devices: Vec<TenantDevice>,
}

/// A device of a tenant.
#[derive(Debug, Serialize)]
struct TenantDevice {
    #[serde(skip_serializing_if = "Option::is_none")]
    bdf: Option<HostBdf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<Uuid>,
    /// None if the device is gone.
    id: Option<PciId>,
    name: Option<&'static str>,
    #[serde(flatten)]
    state: Option<DeviceState>,
    group: Option<String>,
}

/// All functions of a tenant's cards but the first of each card.
fn companions(tenant: &Tenant, all: &[HostDevice]) -> Vec<HostBdf> {
    let own = tenant.devices();
    let cards = cards(all.iter().filter(|device| own.contains(&device.bdf)));
    let others = cards.iter().flat_map(|card| card.functions().skip(1));
    others.map(|device| device.bdf).collect()
}

impl<'a> Row<'a> {
    fn new(tenant: &'a Tenant, all: &[HostDevice], mdevs: &Mdevs) -> Self {
        let functions = tenant.devices().into_iter().map(|bdf| {
            let device = all.iter().find(|device| device.bdf == bdf);
            let group = device.and_then(|device| tenant.groups().group_of(device));
            TenantDevice {
                bdf: Some(bdf),
                uuid: None,
                id: device.map(|device| device.id),
                name: device.and_then(HostDevice::device_name),
                state: device.map(HostDevice::state),
                group: group.map(|group| group.name.clone()),
            }
        });
        let mdevs = tenant.mdevs().into_iter().map(|uuid| {
            let device = mdevs.devices.iter().find(|device| device.uuid == uuid);
            let group = device.and_then(|device| tenant.groups().group_of_mdev(device));
            TenantDevice {
                bdf: None,
                uuid: Some(uuid),
                id: None,
                name: None,
                state: device.map(MdevDevice::state),
                group: group.map(|group| group.name.clone()),
            }
        });
        let devices: Vec<TenantDevice> = functions.chain(mdevs).collect();
        let others = companions(tenant, all);
        let counted = devices
            .iter()
            .filter(|one| one.bdf.is_none_or(|bdf| !others.contains(&bdf)));
        let used = |one: &&TenantDevice| matches!(one.state, Some(DeviceState::Assigned { .. }));
        Self {
            name: &tenant.name,
            file: &tenant.file,
            total: counted.clone().count(),
            used: counted.filter(used).count(),
            devices,
        }
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_owned(),
            self.file.user.clone(),
            self.total.to_string(),
            self.used.to_string(),
            cell(Some(&self.file.description)),
        ]
    }
}

pub fn list(args: &ListArgs, paths: &HostPaths) -> Result<(), Failure> {
    let tenants = Tenants::load(paths)?;
    let all = scan(paths)?;
    let mdevs = Mdevs::read(paths)?;
    let rows: Vec<Row> = tenants
        .iter()
        .map(|tenant| Row::new(tenant, &all, &mdevs))
        .collect();
    if args.json {
        return print_json(&rows);
    }
    if rows.is_empty() {
        return print(|out| {
            writeln!(
                out,
                "There are no tenants: `gantry tenant create` makes one"
            )
        });
    }
    let cells = rows.iter().map(Row::cells).collect();
    print_table(&COLUMNS, cells, args.sort.as_deref())
}

pub fn show(args: &ShowArgs, paths: &HostPaths) -> Result<(), Failure> {
    let tenants = Tenants::load(paths)?;
    let tenant = tenants.find(&args.name)?;
    let mdevs = Mdevs::read(paths)?;
    let row = Row::new(tenant, &scan(paths)?, &mdevs);
    if args.json {
        return print_json(&row);
    }
    print(|out| {
        writeln!(out, "name         {}", row.name)?;
        writeln!(out, "user         {}", row.file.user)?;
        if !row.file.description.is_empty() {
            writeln!(out, "description  {}", row.file.description)?;
        }
        for one in &row.devices {
            let state = one.state.as_ref().map_or("gone", state_word);
            let name = one.name.unwrap_or("-");
            let group = one.group.as_deref().unwrap_or("-");
            let device = one.bdf.map(DeviceName::from);
            let device = device.or(one.uuid.map(DeviceName::from));
            let device = device.map(|device| device.to_string()).unwrap_or_default();
            writeln!(out, "device       {device}  {state}  group {group}  {name}")?;
        }
        Ok(())
    })
}
