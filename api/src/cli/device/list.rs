//! `gantry device list`: every PCI device of the host, and its holder.

use std::cmp::Ordering;

use clap::{Args, ValueEnum};
use gantry_resources::base::HostPaths;
use gantry_resources::inventory::{DeviceState, HostDevice, KernelModules, Mdevs, is_reset, scan};
use gantry_resources::pools::Groups;
use serde::Serialize;
use serde::ser::SerializeSeq;

use super::{mdev, nvme, usb};
use crate::output::{print, print_json};
use crate::report::{Failure, USAGE};
use crate::table::{Column, Shrink, Table, terminal_width};

#[derive(Debug, Args)]
#[command(after_help = "\
States:
  attached     a driver of the host has it
  detached     vfio-pci has it: free for a VM
  assigned     a VM has it
  unbound      no driver has it
  quarantined  it hung, or was for one use: `device release-quarantine`

RESET shows how the kernel can reset a device (`reset_method`); \"card\" if only a reset of its bus does, which \
takes all its functions. A device with \"none\" is passed to a VM only if its entry has \"allow_no_reset\". \
IRQ shows the interrupts that it has, which only root can read.

VFS shows a physical function's virtual ones, those there are and those it could have.

Examples:
  gantry device list --sort iommu
  gantry device list --type usb --sort speed
  gantry device list --json")]
pub struct ListArgs {
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort by, of the table shown
    #[arg(long, value_name = "COLUMN", value_enum)]
    sort: Option<Key>,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Key {
    Address,
    Id,
    Name,
    Class,
    Driver,
    Modules,
    Iommu,
    Numa,
    Vfs,
    Reset,
    Irq,
    State,
    Group,
    Vm,
    Model,
    Serial,
    Firmware,
    Gb,
    Disks,
    Port,
    Bus,
    Speed,
    Controller,
}

impl Key {
    /// The column's title.
    fn title(self) -> String {
        let name = self.to_possible_value();
        name.map_or_else(String::new, |name| name.get_name().to_uppercase())
    }
}

const COLUMNS: [Column; 14] = [
    Column {
        title: "ADDRESS",
        shrink: Shrink::Never,
    },
    Column {
        title: "ID",
        shrink: Shrink::Drop(4),
    },
    Column {
        title: "NAME",
        shrink: Shrink::Cut(16),
    },
    Column {
        title: "CLASS",
        shrink: Shrink::CutThenDrop(12, 3),
    },
    Column {
        title: "DRIVER",
        shrink: Shrink::Never,
    },
    Column {
        title: "MODULES",
        shrink: Shrink::Drop(0),
    },
    Column {
        title: "IOMMU",
        shrink: Shrink::Never,
    },
    Column {
        title: "NUMA",
        shrink: Shrink::Drop(1),
    },
    Column {
        title: "VFS",
        shrink: Shrink::Drop(2),
    },
    Column {
        title: "RESET",
        shrink: Shrink::Drop(2),
    },
    Column {
        title: "IRQ",
        shrink: Shrink::Drop(1),
    },
    Column {
        title: "STATE",
        shrink: Shrink::Never,
    },
    Column {
        title: "GROUP",
        shrink: Shrink::Never,
    },
    Column {
        title: "VM",
        shrink: Shrink::Never,
    },
];

/// A device with what is known about it from elsewhere.
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
    /// The tenant that the device belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<&'a str>,
}

pub fn list(args: &ListArgs, paths: &HostPaths) -> Result<(), Failure> {
    let sort = args.sort.map(Key::title);
    match args.kind {
        None => {}
        Some(Kind::Usb) => return usb::list(paths, sort.as_deref(), args.json),
        Some(Kind::Nvme) => return list_nvme(paths, sort.as_deref(), args.json),
    }
    has_column(&COLUMNS, sort.as_deref())?;
    let devices = scan(paths).map_err(Failure::host)?;
    let groups = Groups::load(paths).map_err(Failure::host)?;
    let modules = KernelModules::read(paths);
    let mut rows: Vec<Row> = devices
        .iter()
        .map(|device| Row::new(device, &devices, &groups, &modules))
        .collect();
    // Stable: devices that are equal here stay in the order of their addresses.
    rows.sort_by(|a, b| a.compare(b, args.sort.unwrap_or(Key::Address)));
    let mdevs = Mdevs::read(paths).map_err(Failure::host)?;
    let mdevs = mdev::rows(&mdevs, &groups);
    if args.json {
        return print_json(&All(&rows, &mdevs));
    }
    let table = table(&rows, terminal_width());
    print(|out| {
        write!(out, "{table}")?;
        match table.left_out() {
            [] => {}
            titles => writeln!(out, "Not shown for want of width: {}", titles.join(", "))?,
        }
        match mdevs.as_slice() {
            [] => Ok(()),
            mdevs => {
                writeln!(out)?;
                mdev::table(out, mdevs, sort.as_deref())
            }
        }
    })
}

fn list_nvme(paths: &HostPaths, sort: Option<&str>, json: bool) -> Result<(), Failure> {
    let devices = scan(paths).map_err(Failure::host)?;
    let groups = Groups::load(paths).map_err(Failure::host)?;
    let modules = KernelModules::read(paths);
    let rows: Vec<Row> = devices
        .iter()
        .filter(|one| one.is_nvme())
        .map(|one| Row::new(one, &devices, &groups, &modules))
        .collect();
    if json {
        return print_json(&rows);
    }
    let cells = rows
        .iter()
        .map(|row| nvme::cells(row.device, row.whose().as_deref(), row.vm()));
    shown(&nvme::COLUMNS, cells.collect(), sort)
}

/// Refuses to sort by a column that the table does not have.
pub fn has_column(columns: &[Column], sort: Option<&str>) -> Result<(), Failure> {
    let titles: Vec<&str> = columns.iter().map(|column| column.title).collect();
    let has = |sort: &str| titles.iter().any(|title| title.eq_ignore_ascii_case(sort));
    match sort.filter(|sort| !has(sort)) {
        None => Ok(()),
        Some(sort) => {
            let what = format!("this table has no column {sort}: {}", titles.join(", "));
            Err(Failure::new(USAGE, what.to_lowercase()))
        }
    }
}

/// Prints rows in the order of a column, narrowed to the terminal.
pub fn shown(
    columns: &[Column],
    rows: Vec<Vec<String>>,
    sort: Option<&str>,
) -> Result<(), Failure> {
    has_column(columns, sort)?;
    if rows.is_empty() {
        return print(|out| writeln!(out, "This host has none."));
    }
    let table = Table::new(columns, rows).sorted(sort).fit(terminal_width());
    print(|out| {
        write!(out, "{table}")?;
        match table.left_out() {
            [] => Ok(()),
            titles => writeln!(out, "Not shown for want of width: {}", titles.join(", ")),
        }
    })
}

/// PCI functions, and mediated devices after them, in one list.
struct All<'a>(&'a [Row<'a>], &'a [mdev::Row<'a>]);

impl Serialize for All<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len() + self.1.len()))?;
        self.0
            .iter()
            .try_for_each(|row| list.serialize_element(row))?;
        self.1
            .iter()
            .try_for_each(|row| list.serialize_element(row))?;
        list.end()
    }
}

/// Vendors are named where there is room for them.
fn table<'a>(rows: &[Row<'a>], width: usize) -> Table {
    let of = |name: fn(&Row<'a>) -> String| {
        Table::new(
            &COLUMNS,
            rows.iter().map(|row| row.cells(name(row))).collect(),
        )
    };
    let full = of(Row::name);
    if full.width() <= width {
        full
    } else {
        of(Row::short_name).fit(width)
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

    /// The group, or whose the device is.
    fn whose(&self) -> Option<String> {
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

    /// The device's name, or its vendor's where that is all that is known, or what it is.
    fn short_name(&self) -> String {
        let known = self.device_name.or(self.vendor_name);
        known.map_or_else(|| self.kind(), str::to_owned)
    }

    /// What it is, where it has no name.
    fn kind(&self) -> String {
        let class = self.class_name.unwrap_or("device");
        format!("({})", class.to_lowercase())
    }

    /// Virtual functions there are and could be; of one of them, its physical function.
    fn functions(&self) -> String {
        match (self.device.sriov, self.device.physfn) {
            (Some(sriov), _) => format!("{}/{}", sriov.active, sriov.total),
            (None, Some(pf)) => format!("of {pf}"),
            (None, None) => "-".to_owned(),
        }
    }

    /// How it is reset.
    fn reset(&self) -> String {
        match (self.device.reset_methods.join(" "), self.is_reset) {
            (methods, _) if !methods.is_empty() => methods,
            (_, true) => "card".to_owned(),
            (_, false) if self.device.is_bridge() => "-".to_owned(),
            (_, false) => "none".to_owned(),
        }
    }

    /// The kinds of interrupt that it has.
    fn interrupts(&self) -> String {
        let interrupts = self
            .device
            .interrupts
            .map(|has| has.to_string().replace(" and ", " "));
        interrupts.unwrap_or_else(|| "-".to_owned())
    }

    fn vm(&self) -> Option<&str> {
        match &self.state {
            DeviceState::Assigned { vm } => vm.as_deref(),
            _ => None,
        }
    }

    fn cells(&self, name: String) -> Vec<String> {
        let text = |value: Option<&str>| value.unwrap_or("-").to_owned();
        let number = |value: Option<u32>| value.map_or("-".to_owned(), |value| value.to_string());
        vec![
            self.device.bdf.to_string(),
            self.device.id.to_string(),
            name,
            self.class_name
                .map_or_else(|| self.device.class.to_string(), str::to_owned),
            text(self.device.driver.as_deref()),
            match self.modules.join(" ") {
                none if none.is_empty() => "-".to_owned(),
                modules => modules,
            },
            number(self.device.iommu_group),
            number(self.device.numa_node),
            self.functions(),
            self.reset(),
            self.interrupts(),
            state_word(&self.state).to_owned(),
            text(self.whose().as_deref()),
            text(self.vm()),
        ]
    }

    fn compare(&self, other: &Self, key: Key) -> Ordering {
        let (a, b) = (self.device, other.device);
        match key {
            Key::Address => a.bdf.cmp(&b.bdf),
            Key::Id => a.id.cmp(&b.id),
            Key::Name => self.name().cmp(&other.name()),
            Key::Class => a.class.cmp(&b.class),
            Key::Driver => last_if_none(&a.driver, &b.driver),
            Key::Modules => self.modules.cmp(&other.modules),
            Key::Iommu => last_if_none(&a.iommu_group, &b.iommu_group),
            Key::Numa => last_if_none(&a.numa_node, &b.numa_node),
            Key::Vfs => {
                let functions = |row: &Self| Some(row.functions()).filter(|text| text != "-");
                last_if_none(&functions(self), &functions(other))
            }
            Key::Reset => self.reset().cmp(&other.reset()),
            Key::Irq => self.interrupts().cmp(&other.interrupts()),
            Key::State => self.state.cmp(&other.state),
            Key::Group => last_if_none(&self.whose(), &other.whose()),
            Key::Vm => last_if_none(&self.vm(), &other.vm()),
            // Of other tables: asked for and refused before.
            _ => Ordering::Equal,
        }
    }
}

/// What devices have is worth more than what they lack.
fn last_if_none<T: Ord>(a: &Option<T>, b: &Option<T>) -> Ordering {
    (a.is_none(), a).cmp(&(b.is_none(), b))
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
