//! `gantry tenant`: users who own devices and run VMs with them, unprivileged.

use clap::{Args, Subcommand};
use gantry_resources::{
    ChildWriter, DeviceName, DeviceState, Grant, Granted, HostAccess, HostBdf, HostDevice,
    HostPaths, MdevDevice, Mdevs, Netlink, PciId, Tenant, TenantFile, Tenants, Uuid, create_tenant,
    delete_tenant, edit_tenant, grant, revoke, revoke_mdevs, scan,
};
use nix::unistd::{User, geteuid};
use serde::Serialize;

use super::device::state_word;
use crate::output::{print, print_json};
use crate::report::{Failure, USAGE};
use crate::signals::SignalsHeld;
use crate::table::{Column, Give, Table, column, terminal_width};

#[derive(Debug, Subcommand)]
#[command(after_help = "\
A tenant's devices are its own whether it uses them or not: no VM of another gets them. They stay with \
vfio-pci, and their nodes and locks belong to the tenant's user, who sees these devices alone and runs \
VMs with them without being root. `gantry boot` puts that right again after a reboot.

Mediated devices (vGPUs) can be granted where a group of the host's makes them ahead, by their \
\"uuids\"; virtual functions keep the settings that their group gave them, and what a trusted guest changes of these \
is put back by `gantry boot` and other commands of root's, once no VM has the device. Settings that the group \
gets later come to them with `gantry boot`, or when they are granted again.

A device that is granted comes into a group of the tenant's name, or into the one that --group names; the \
VMs of the tenant ask for it there. The definitions lie in tenants/NAME below the configuration directory. \
A user of several tenants says which with --tenant NAME; root works with none, and sees all with `gantry \
tenant list` and `show`.

Examples:
  gantry tenant create lab --user alice
  gantry tenant grant lab 0b:00.0 0c:00.0
  sudo -u alice gantry run vm.json       its \"devices\": [{\"group\": \"lab\"}]
  gantry tenant revoke lab 0c:00.0")]
pub enum TenantCommand {
    /// Make a tenant that owns nothing yet
    Create(CreateArgs),
    /// List the tenants with what they own
    List(ListArgs),
    /// Show one tenant with its devices
    Show(ShowArgs),
    /// Change a tenant's user or description
    Edit(EditArgs),
    /// Delete a tenant that owns nothing and runs no VM
    Delete(NameArgs),
    /// Give devices to a tenant, with all of their IOMMU groups
    Grant(GrantArgs),
    /// Take devices back from a tenant, to the drivers that they had
    Revoke(RevokeArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example: gantry tenant create lab --user alice --description 'The lab upstairs'"
)]
pub struct CreateArgs {
    /// The tenant
    name: String,
    /// Who runs its VMs [default: the user of the tenant's name]
    #[arg(long)]
    user: Option<String>,
    /// Words for people
    #[arg(long, default_value_t, hide_default_value = true)]
    description: String,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant edit lab --user bob")]
pub struct EditArgs {
    /// The tenant
    name: String,
    /// Who runs its VMs
    #[arg(long)]
    user: Option<String>,
    /// Words for people
    #[arg(long)]
    description: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant list --sort devices")]
pub struct ListArgs {
    /// Show all there is to know as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort by
    #[arg(long, value_name = "COLUMN", ignore_case = true, value_parser = column(&COLUMNS))]
    sort: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant show lab")]
pub struct ShowArgs {
    /// The tenant
    name: String,
    /// Show all there is to know as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant delete lab")]
pub struct NameArgs {
    /// The tenant
    name: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry tenant grant lab 0b:00.0
  gantry tenant grant lab 0b:00.0 --group gpus
  gantry tenant grant lab 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001
  gantry tenant grant lab --from gpus --count 2")]
pub struct GrantArgs {
    /// The tenant
    name: String,
    /// PCI addresses, such as 01:00.0, or identifiers of mediated devices
    #[arg(
        value_name = "DEVICE",
        required_unless_present = "from",
        conflicts_with = "from"
    )]
    devices: Vec<DeviceName>,
    /// Devices of this group of the host's that are not in use
    #[arg(long, value_name = "GROUP")]
    from: Option<String>,
    /// How many of that group
    #[arg(long, requires = "from", default_value_t = 1)]
    count: usize,
    /// The tenant's group that they come into [default: one of the tenant's name]
    #[arg(long)]
    group: Option<String>,
    /// Give this device away although the host uses it; whatever uses it loses it
    #[arg(long = "override", value_name = "BDF")]
    overrides: Vec<HostBdf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry tenant revoke lab 0b:00.0
  gantry tenant revoke lab --all")]
pub struct RevokeArgs {
    /// The tenant
    name: String,
    /// PCI addresses, such as 01:00.0, or identifiers of mediated devices
    #[arg(
        value_name = "DEVICE",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    devices: Vec<DeviceName>,
    /// All that the tenant owns
    #[arg(long)]
    all: bool,
}

const fn full(title: &'static str) -> Column {
    let give = Give::Nothing;
    Column { title, give }
}

const COLUMNS: [Column; 5] = [
    full("NAME"),
    full("USER"),
    full("DEVICES"),
    full("USED"),
    Column {
        title: "DESCRIPTION",
        give: Give::Width(12),
    },
];

/// A tenant with its devices.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'a str,
    #[serde(flatten)]
    file: &'a TenantFile,
    used: usize,
    devices: Vec<Owned>,
}

/// A device of a tenant.
#[derive(Debug, Serialize)]
struct Owned {
    #[serde(skip_serializing_if = "Option::is_none")]
    bdf: Option<HostBdf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<Uuid>,
    /// None where the device is gone.
    id: Option<PciId>,
    name: Option<&'static str>,
    #[serde(flatten)]
    state: Option<DeviceState>,
    group: Option<String>,
}

impl<'a> Row<'a> {
    fn new(tenant: &'a Tenant, all: &[HostDevice], mdevs: &Mdevs) -> Self {
        let functions = tenant.devices().into_iter().map(|bdf| {
            let device = all.iter().find(|device| device.bdf == bdf);
            let group = device.and_then(|device| tenant.groups().group_of(device));
            Owned {
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
            Owned {
                bdf: None,
                uuid: Some(uuid),
                id: None,
                name: None,
                state: device.map(MdevDevice::state),
                group: group.map(|group| group.name.clone()),
            }
        });
        let devices: Vec<Owned> = functions.chain(mdevs).collect();
        let used = |one: &&Owned| matches!(one.state, Some(DeviceState::Assigned { .. }));
        Self {
            name: &tenant.name,
            file: &tenant.file,
            used: devices.iter().filter(used).count(),
            devices,
        }
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_owned(),
            self.file.user.clone(),
            self.devices.len().to_string(),
            self.used.to_string(),
            match self.file.description.as_str() {
                "" => "-".to_owned(),
                text => text.to_owned(),
            },
        ]
    }
}

pub fn tenant(command: TenantCommand, paths: &HostPaths) -> Result<(), Failure> {
    match command {
        TenantCommand::List(args) => list(&args, paths),
        TenantCommand::Show(args) => show(&args, paths),
        TenantCommand::Create(args) => {
            let file = TenantFile {
                user: args.user.unwrap_or_else(|| args.name.clone()),
                description: args.description,
            };
            let path = create_tenant(paths, &args.name, &file).map_err(Failure::host)?;
            print(|out| {
                let (user, path) = (&file.user, path.display());
                writeln!(
                    out,
                    "tenant {}: created for user {user} (in {path})",
                    args.name
                )?;
                writeln!(
                    out,
                    "  `gantry tenant grant {} BDF` gives it a device",
                    args.name
                )
            })
        }
        TenantCommand::Edit(args) => edit(args, paths),
        TenantCommand::Delete(args) => {
            delete_tenant(paths, &args.name).map_err(Failure::host)?;
            print(|out| writeln!(out, "tenant {}: deleted", args.name))
        }
        TenantCommand::Grant(args) => give(&args, paths),
        TenantCommand::Revoke(args) => take(args, paths),
    }
}

fn edit(args: EditArgs, paths: &HostPaths) -> Result<(), Failure> {
    let tenants = Tenants::load(paths).map_err(Failure::host)?;
    let now = &tenants.find(&args.name).map_err(Failure::host)?.file;
    let file = TenantFile {
        user: args.user.unwrap_or_else(|| now.user.clone()),
        description: args.description.unwrap_or_else(|| now.description.clone()),
    };
    let path = edit_tenant(paths, &args.name, &file).map_err(Failure::host)?;
    print(|out| {
        let (name, path) = (&args.name, path.display());
        writeln!(out, "tenant {name}: its user is {} (in {path})", file.user)
    })
}

fn give(args: &GrantArgs, paths: &HostPaths) -> Result<(), Failure> {
    let (functions, mdevs) = parted(&args.devices);
    let devices = match &args.from {
        Some(from) => Granted::Free {
            from,
            count: args.count,
        },
        None if mdevs.is_empty() => Granted::Functions(&functions),
        None if functions.is_empty() => Granted::Mdevs(&mdevs),
        // One group takes one kind of them: the second would fail when the first has moved.
        None => {
            return Err(Failure::new(
                USAGE,
                "PCI functions and mediated devices do not go into one group of the tenant",
            )
            .help("grant them one kind after the other, with a --group for each"));
        }
    };
    let wanted = Grant {
        devices,
        group: args.group.as_deref(),
        overrides: &args.overrides,
    };
    // A ctrl-c between two steps would leave a device with nobody.
    let _whole = SignalsHeld::new();
    let links = Netlink::new(paths);
    let host = HostAccess {
        writer: &ChildWriter::default(),
        links: &links,
    };
    let given = grant(paths, host, &args.name, &wanted);
    let given = given.map_err(Failure::host)?;
    let tenant = &args.name;
    print(|out| {
        let mut given = given.iter();
        given.try_for_each(|device| writeln!(out, "{device}: belongs to tenant {tenant}"))
    })
}

/// PCI functions and mediated devices go different ways.
fn parted(devices: &[DeviceName]) -> (Vec<HostBdf>, Vec<Uuid>) {
    let functions = devices.iter().filter_map(|name| name.pci());
    let mdevs = devices.iter().filter_map(|name| name.mdev());
    (functions.collect(), mdevs.collect())
}

fn take(args: RevokeArgs, paths: &HostPaths) -> Result<(), Failure> {
    let devices = match args.all {
        false => args.devices,
        true => {
            let tenants = Tenants::load(paths).map_err(Failure::host)?;
            let tenant = tenants.find(&args.name).map_err(Failure::host)?;
            let functions = tenant.devices().into_iter().map(DeviceName::from);
            let mdevs = tenant.mdevs().into_iter().map(DeviceName::from);
            functions.chain(mdevs).collect()
        }
    };
    let (functions, mdevs) = parted(&devices);
    let _whole = SignalsHeld::new();
    let links = Netlink::new(paths);
    let host = HostAccess {
        writer: &ChildWriter::default(),
        links: &links,
    };
    let mut taken: Vec<DeviceName> = Vec::new();
    if !mdevs.is_empty() {
        revoke_mdevs(paths, &args.name, &mdevs).map_err(Failure::host)?;
        taken.extend(mdevs.into_iter().map(DeviceName::from));
    }
    if !functions.is_empty() {
        let back = revoke(paths, host, &args.name, &functions).map_err(Failure::host)?;
        taken.extend(back.into_iter().map(DeviceName::from));
    }
    print(|out| {
        let mut taken = taken.iter();
        taken.try_for_each(|device| writeln!(out, "{device}: taken back from tenant {}", args.name))
    })
}

fn list(args: &ListArgs, paths: &HostPaths) -> Result<(), Failure> {
    let tenants = Tenants::load(paths).map_err(Failure::host)?;
    let all = scan(paths).map_err(Failure::host)?;
    let mdevs = Mdevs::read(paths).map_err(Failure::host)?;
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
    let table = Table::new(&COLUMNS, rows.iter().map(Row::cells).collect());
    let table = table.sorted(args.sort.as_deref()).fit(terminal_width());
    print(|out| write!(out, "{table}"))
}

fn show(args: &ShowArgs, paths: &HostPaths) -> Result<(), Failure> {
    let tenants = Tenants::load(paths).map_err(Failure::host)?;
    let tenant = tenants.find(&args.name).map_err(Failure::host)?;
    let mdevs = Mdevs::read(paths).map_err(Failure::host)?;
    let row = Row::new(tenant, &scan(paths).map_err(Failure::host)?, &mdevs);
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

/// Nobody but its user works as a tenant. In its directories lies what the tenant put there, links among it,
/// which root must not follow.
fn not_its_user(tenant: &Tenant, is_root: bool) -> Failure {
    let (name, user) = (&tenant.name, &tenant.file.user);
    let what = match is_root {
        true => format!("root does not work in the directories of tenant \"{name}\""),
        false => format!("you are not tenant \"{name}\", whose user is {user}"),
    };
    Failure::new(USAGE, what).help(format!(
        "run it as its user, as in `sudo -u {user} gantry device list`; `gantry tenant show {name}` lists what it owns"
    ))
}

/// The host as a tenant sees it: the one asked for, or that of an ordinary user who runs this.
pub fn scope(host: HostPaths, name: Option<&str>) -> Result<HostPaths, Failure> {
    let user = geteuid();
    if name.is_none() && user.is_root() {
        return Ok(host);
    }
    let tenants = Tenants::load(&host).map_err(Failure::host)?;
    let is_root = user.is_root();
    let user = User::from_uid(user).ok().flatten();
    let user = user.map(|user| user.name).unwrap_or_default();
    if let Some(name) = name {
        let tenant = tenants.find(name).map_err(Failure::host)?;
        return match tenant.file.user == user {
            true => Ok(tenant.scope(&host)),
            false => Err(not_its_user(tenant, is_root)),
        };
    }
    let mut own = tenants.of_user(&user);
    match (own.next(), own.next()) {
        (None, _) => Ok(host),
        (Some(tenant), None) => Ok(tenant.scope(&host)),
        (Some(one), Some(other)) => {
            let what = format!(
                "{user} is the user of several tenants, such as {} and {}",
                one.name, other.name
            );
            Err(Failure::new(USAGE, what).help("say which one with --tenant NAME"))
        }
    }
}
