//! `gantry device list`: every PCI device of the host, and its holder.

use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{
    DeviceState, HostDevice, KernelModules, Mdevs, is_reset, own_resets, scan,
};
use gantry_resources::pools::Groups;
use serde::Serialize;

use super::{mdev, nvme, usb};
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{
    Column, Shrink, Table, cell, column, has_column, print_table, sort_rows, terminal_width,
    write_table_within,
};

#[derive(Debug, Args)]
#[command(after_help = "\
States:
  attached     a driver of the host is bound to it
  detached     vfio-pci is bound to it: free for a VM
  assigned     a VM has it
  unbound      no driver is bound to it
  quarantined  it hung, or was for one use: `device release-quarantine`

RESET shows how the kernel can reset a device (`reset_method`); \"card\" if only a reset of its bus does, which \
resets all its functions; \"never\" if it must not be reset (`gantry check` says why). A device with \"none\" or \"never\" is \
passed to a VM only if its entry has \"allow_no_reset\". \
IRQ shows the interrupts that it has, which only root can read.

VFS shows how many virtual functions a physical function has, and how many it can have.

Examples:
  gantry device list --sort iommu
  gantry device list --type usb --sort speed
  gantry device list --json")]
pub struct ListArgs {
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Show every column in full, however narrow the terminal is
    #[arg(long)]
    wide: bool,
    /// Column to sort by, of the table shown
    #[arg(long, value_name = "COLUMN", value_parser = sort_by())]
    sort: Option<String>,
    /// Only devices of this type, with columns of their own
    #[arg(long = "type", value_enum)]
    kind: Option<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// NVMe controllers: model, serial number, firmware, size
    Nvme,
    /// USB devices: port, serial number, speed
    Usb,
}

const COLUMNS: [Column; 14] = [
    Column::full("address"),
    Column::new("id", Shrink::Drop(4)),
    Column::new("name", Shrink::Cut(16)),
    Column::new("class", Shrink::CutThenDrop(12, 3)),
    Column::full("driver"),
    Column::new("modules", Shrink::Drop(0)),
    Column::full("iommu"),
    Column::new("numa", Shrink::Drop(1)),
    Column::new("vfs", Shrink::Drop(2)),
    Column::new("reset", Shrink::Drop(2)),
    Column::new("irq", Shrink::Drop(1)),
    Column::full("state"),
    Column::full("group"),
    Column::full("vm"),
];

/// A device with its name and group.
#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    device: &'a HostDevice,
    vendor_name: Option<&'a str>,
    device_name: Option<&'a str>,
    class_name: Option<&'a str>,
    /// Modules of the kernel that could drive it.
    modules: Vec<&'a str>,
    /// `state`, and `vm` where it is assigned.
    #[serde(flatten)]
    state: DeviceState,
    group: Option<&'a str>,
    /// Whether it is reset between two VMs.
    is_reset: bool,
    /// How the kernel resets it alone.
    #[serde(skip)]
    own_resets: String,
    /// The tenant that the device belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<&'a str>,
}

/// Takes a column of one of the tables.
fn sort_by() -> PossibleValuesParser {
    column(
        &[
            COLUMNS.as_slice(),
            &nvme::COLUMNS,
            &usb::COLUMNS,
            &mdev::DEVICES,
        ]
        .concat(),
    )
}

pub fn list(args: &ListArgs, paths: &HostPaths) -> Result<(), Failure> {
    let sort = args.sort.as_deref();
    if args.kind == Some(Kind::Usb) {
        return usb::list(paths, sort, args.json);
    }
    let devices = scan(paths)?;
    let groups = Groups::load(paths)?;
    let modules = KernelModules::read(paths);
    let mut rows: Vec<Row> = devices
        .iter()
        .map(|device| Row::new(device, &devices, &groups, &modules))
        .collect();
    if args.kind == Some(Kind::Nvme) {
        rows.retain(|row| row.device.is_nvme());
        return list_nvme(&rows, sort, args.json);
    }
    has_column(&COLUMNS, sort)?;
    sort_rows(&mut rows, &COLUMNS, sort, |row| row.cells(row.name()));
    let mdevs = Mdevs::read(paths)?;
    let mdevs = mdev::rows(&mdevs, &groups);
    if args.json {
        let entries = rows
            .iter()
            .map(Entry::Pci)
            .chain(mdevs.iter().map(Entry::Mdev));
        return print_json(&entries.collect::<Vec<_>>());
    }
    print(|out| {
        let width = match args.wide {
            true => usize::MAX,
            false => terminal_width(),
        };
        write_table_within(width, out, &COLUMNS, cells(&rows, width), sort)?;
        match mdevs.as_slice() {
            [] => Ok(()),
            mdevs => {
                writeln!(out)?;
                mdev::table(out, mdevs, sort)
            }
        }
    })
}

fn list_nvme(rows: &[Row], sort: Option<&str>, json: bool) -> Result<(), Failure> {
    if json {
        return print_json(&rows);
    }
    let cells = rows
        .iter()
        .map(|row| nvme::cells(row.device, row.owner().as_deref(), row.vm()));
    print_devices(&nvme::COLUMNS, cells.collect(), sort)
}

/// Prints devices, or that there are none.
pub fn print_devices(
    columns: &[Column],
    rows: Vec<Vec<String>>,
    sort: Option<&str>,
) -> Result<(), Failure> {
    has_column(columns, sort)?;
    match rows.is_empty() {
        true => print(|out| writeln!(out, "This host has none.")),
        false => print_table(columns, rows, sort),
    }
}

/// An element of the JSON list: PCI functions come first.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Entry<'a> {
    Pci(&'a Row<'a>),
    Mdev(&'a mdev::Row<'a>),
}

/// The cells of all rows, with vendor names if the terminal is wide enough.
fn cells<'a>(rows: &[Row<'a>], width: usize) -> Vec<Vec<String>> {
    let named =
        |name: fn(&Row<'a>) -> String| rows.iter().map(|row| row.cells(name(row))).collect();
    let full = Table::new(&COLUMNS, named(Row::name));
    match full.width() <= width {
        true => full.into_rows(),
        false => named(Row::short_name),
    }
}

impl<'a> Row<'a> {
    fn new(
        device: &'a HostDevice,
        all: &[HostDevice],
        groups: &'a Groups,
        modules: &'a KernelModules,
    ) -> Self {
        Self {
            is_reset: is_reset(device, all),
            own_resets: own_resets(device, all).collect::<Vec<_>>().join(" "),
            device,
            vendor_name: device.vendor_name(),
            device_name: device.device_name(),
            class_name: device.class_name(),
            modules: modules.of(device),
            state: device.state(),
            group: groups.group_of(device).map(|group| group.name.as_str()),
            tenant: groups.tenant_of(device),
        }
    }

    /// The tenant that owns the device, or its group.
    fn owner(&self) -> Option<String> {
        let tenant = self.tenant.map(|name| format!("tenant {name}"));
        tenant.or(self.group.map(str::to_owned))
    }

    /// Vendor and device name as far as they are known.
    fn name(&self) -> String {
        let names = [self.vendor_name, self.device_name];
        match names.into_iter().flatten().collect::<Vec<_>>().join(" ") {
            none if none.is_empty() => self.kind(),
            names => names,
        }
    }

    /// The device's name, or else its vendor's, or else its class.
    fn short_name(&self) -> String {
        let known = self.device_name.or(self.vendor_name);
        known.map_or_else(|| self.kind(), str::to_owned)
    }

    /// Its class, for a device without a name.
    fn kind(&self) -> String {
        let class = self.class_name.unwrap_or("device");
        format!("({})", class.to_lowercase())
    }

    /// Number of virtual functions and the most there can be; for a virtual function, its physical function.
    fn functions(&self) -> String {
        match (self.device.sriov, self.device.physfn) {
            (Some(sriov), _) => format!("{}/{}", sriov.active, sriov.total),
            (None, pf) => cell(pf.map(|pf| format!("of {pf}"))),
        }
    }

    /// How it is reset.
    fn reset(&self) -> String {
        match (&self.own_resets, self.is_reset) {
            _ if self.device.must_not_reset.is_some() => "never".to_owned(),
            (methods, _) if !methods.is_empty() => methods.clone(),
            (_, true) => "card".to_owned(),
            (_, false) if self.device.is_bridge() => "-".to_owned(),
            (_, false) => "none".to_owned(),
        }
    }

    /// The kinds of interrupt that it has.
    fn interrupts(&self) -> String {
        let kinds = self.device.interrupts;
        cell(kinds.map(|kinds| kinds.to_string().replace(" and ", " ")))
    }

    fn vm(&self) -> Option<&str> {
        match &self.state {
            DeviceState::Assigned { vm } => vm.as_deref(),
            _ => None,
        }
    }

    fn cells(&self, name: String) -> Vec<String> {
        vec![
            self.device.bdf.to_string(),
            self.device.id.to_string(),
            name,
            self.class_name
                .map_or_else(|| self.device.class.to_string(), str::to_owned),
            cell(self.device.driver.as_deref()),
            cell(Some(self.modules.join(" "))),
            cell(self.device.iommu_group),
            cell(self.device.numa_node),
            self.functions(),
            self.reset(),
            self.interrupts(),
            state_word(&self.state).to_owned(),
            cell(self.owner()),
            cell(self.vm()),
        ]
    }
}

/// The word for a state.
pub fn state_word(state: &DeviceState) -> &'static str {
    match state {
        DeviceState::Attached => "attached",
        DeviceState::Detached => "detached",
        DeviceState::Assigned { .. } => "assigned",
        DeviceState::Unbound => "unbound",
        DeviceState::Quarantined { .. } => "quarantined",
    }
}
