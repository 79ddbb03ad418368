//! `gantry group list`: lists the groups with their devices.

use clap::Args;
use gantry_resources::base::{HostBdf, HostPaths, Uuid};
use gantry_resources::inventory::{
    Card, DeviceState, HostDevice, MdevDevice, Mdevs, UsbDevice, cards, scan, scan_usb,
};
use gantry_resources::pools::{Bind, Groups, ResourceGroup};
use serde::Serialize;

use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{Column, Shrink, cell, column, print_table};

#[derive(Debug, Args)]
#[command(after_help = "\
TOTAL counts the devices that the group's rules match; a card with all its functions counts once. USED counts \
those that VMs have. FREE counts those that VMs can get: detached ones, or with `bind: demand` also those bound \
to a host driver. The others are still bound to a host driver: `gantry device detach` frees them.

Examples:
  gantry group list
  gantry group list --sort free
  gantry group list --json")]
pub struct ListArgs {
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort by
    #[arg(long, value_name = "COLUMN", value_parser = column(&COLUMNS))]
    sort: Option<String>,
}

const COLUMNS: [Column; 8] = [
    Column::full("name"),
    Column::full("type"),
    Column::new("class", Shrink::Drop(0)),
    Column::new("description", Shrink::Cut(12)),
    Column::full("total"),
    Column::full("used"),
    Column::full("free"),
    Column::new("devices", Shrink::Cut(12)),
];

/// A group with its devices.
#[derive(Debug, Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    group: &'a ResourceGroup,
    total: usize,
    used: usize,
    free: usize,
    quarantined: usize,
    devices: Vec<Member>,
    /// Ports of its USB devices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    usb: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mdevs: Vec<Uuid>,
}

/// A device of a group.
#[derive(Debug, Serialize)]
struct Member {
    bdf: HostBdf,
    #[serde(flatten)]
    state: DeviceState,
}

pub fn list(args: &ListArgs, paths: &HostPaths) -> Result<(), Failure> {
    let groups = Groups::load(paths)?;
    let rows = rows(&groups, paths)?;
    if args.json {
        return print_json(&rows);
    }
    if rows.is_empty() {
        let file = paths.config.join("groups.json");
        return print(|out| {
            writeln!(
                out,
                "There are no groups: `gantry group create` makes one, or define some in {}",
                file.display()
            )
        });
    }
    let cells = rows.iter().map(Row::cells).collect();
    print_table(&COLUMNS, cells, args.sort.as_deref())?;
    let none_free = rows.iter().filter(|row| row.free == 0);
    let mut reasons =
        none_free.map(|row| format!("{}: none is free: {}", row.group.name, row.why()));
    print(|out| reasons.try_for_each(|reason| writeln!(out, "{reason}")))
}

fn rows<'a>(groups: &'a Groups, paths: &HostPaths) -> Result<Vec<Row<'a>>, Failure> {
    let devices = scan(paths)?;
    let usb = scan_usb(paths)?;
    let mdevs = Mdevs::read(paths)?;
    let rows = groups
        .iter()
        .map(|group| Row::new(group, groups, &devices))
        .map(|row| row.with_usb(groups, &usb).with_mdevs(groups, &mdevs));
    Ok(rows.collect())
}

/// The numbers of a group's devices.
#[derive(Debug, Clone, Serialize)]
pub struct Counts {
    #[serde(skip)]
    pub group: String,
    #[serde(skip)]
    pub kind: &'static str,
    pub total: usize,
    pub used: usize,
    pub free: usize,
    pub quarantined: usize,
}

/// The counts of every group.
pub fn counts(groups: &Groups, paths: &HostPaths) -> Result<Vec<Counts>, Failure> {
    let counts = |row: Row| Counts {
        group: row.group.name.clone(),
        kind: row.group.kind.word(),
        total: row.total,
        used: row.used,
        free: row.free,
        quarantined: row.quarantined,
    };
    Ok(rows(groups, paths)?.into_iter().map(counts).collect())
}

/// The counts of one group.
pub fn counts_of(
    group: &ResourceGroup,
    groups: &Groups,
    paths: &HostPaths,
) -> Result<Option<Counts>, Failure> {
    let mut all = counts(groups, paths)?.into_iter();
    Ok(all.find(|counts| counts.group == group.name))
}

impl<'a> Row<'a> {
    fn new(group: &'a ResourceGroup, groups: &Groups, devices: &[HostDevice]) -> Self {
        let owned = |device: &&HostDevice| {
            groups
                .group_of(device)
                .is_some_and(|owner| owner.name == group.name)
        };
        let member = |device: &HostDevice| Member {
            bdf: device.bdf,
            state: device.state(),
        };
        let cards = cards(devices.iter().filter(owned));
        let on_demand = group.bind == Bind::Demand;
        let is_used = |device: &HostDevice| matches!(device.state(), DeviceState::Assigned { .. });
        let is_free = |device: &HostDevice| match device.state() {
            DeviceState::Detached => true,
            DeviceState::Attached | DeviceState::Unbound => on_demand,
            _ => false,
        };
        let is_out =
            |device: &HostDevice| matches!(device.state(), DeviceState::Quarantined { .. });
        let used = cards.iter().filter(|card| card.functions().any(is_used));
        let free = cards.iter().filter(|card| card.functions().all(is_free));
        Self {
            group,
            total: cards.len(),
            used: used.count(),
            free: free.count(),
            quarantined: cards
                .iter()
                .filter(|card| card.functions().any(is_out))
                .count(),
            devices: cards.iter().flat_map(Card::functions).map(member).collect(),
            usb: Vec::new(),
            mdevs: Vec::new(),
        }
    }

    /// The same with the USB devices of the group. No VM can have one yet.
    fn with_usb(mut self, groups: &Groups, devices: &[UsbDevice]) -> Self {
        let owned = |device: &&UsbDevice| {
            let owner = groups.group_of_usb(device);
            owner.is_some_and(|owner| owner.name == self.group.name)
        };
        let owned = devices.iter().filter(owned);
        self.usb = owned.map(|device| device.port.clone()).collect();
        self.total += self.usb.len();
        self
    }

    /// The same with the mediated devices of the group, and those that could be made for VMs.
    fn with_mdevs(mut self, groups: &Groups, mdevs: &Mdevs) -> Self {
        let Some(spec) = &self.group.vgpu else {
            return self;
        };
        let owned = |device: &&MdevDevice| {
            let owner = groups.group_of_mdev(device);
            owner.is_some_and(|owner| owner.name == self.group.name)
        };
        let there: Vec<&MdevDevice> = mdevs.devices.iter().filter(owned).collect();
        let used = there.iter().filter(|device| device.lease.is_held());
        let stuck = there.iter().filter(|device| device.quarantine.is_some());
        self.used += used.count();
        self.free += groups.free_mdevs(spec, mdevs);
        self.quarantined += stuck.count();
        self.total = self.used + self.free + self.quarantined;
        self.mdevs = there.iter().map(|device| device.uuid).collect();
        self
    }

    /// Why none of its devices is free.
    fn why(&self) -> String {
        let count = |is: &dyn Fn(&DeviceState) -> bool| {
            let members = self.devices.iter().filter(|member| is(&member.state));
            members
                .map(|member| member.bdf.to_string())
                .collect::<Vec<_>>()
        };
        let bound = count(&|state| matches!(state, DeviceState::Attached | DeviceState::Unbound));
        let mut why = Vec::new();
        if self.used > 0 {
            why.push(format!("VMs have {}", self.used));
        }
        if self.quarantined > 0 {
            let help = "`gantry device list` shows them";
            why.push(format!("{} in quarantine ({help})", self.quarantined));
        }
        if !bound.is_empty() && self.group.bind != Bind::Demand {
            why.push(format!(
                "{} not bound to vfio-pci (`gantry device detach {}`)",
                bound.len(),
                bound.join(" ")
            ));
        }
        if !self.usb.is_empty() {
            why.push("USB devices cannot be passed yet".to_owned());
        }
        match why.is_empty() {
            false => why.join(", "),
            true => format!(
                "it has no device; `gantry group show {}` shows its rules",
                self.group.name
            ),
        }
    }

    fn cells(&self) -> Vec<String> {
        let addresses = self.devices.iter().map(|member| member.bdf.to_string());
        let addresses = addresses.chain(self.usb.iter().cloned());
        let addresses = addresses.chain(self.mdevs.iter().map(Uuid::to_string));
        vec![
            self.group.name.clone(),
            self.group.kind.word().to_owned(),
            cell(self.group.class.as_ref()),
            cell(Some(&self.group.description)),
            self.total.to_string(),
            self.used.to_string(),
            self.free.to_string(),
            cell(Some(addresses.collect::<Vec<_>>().join(" "))),
        ]
    }
}
