//! `gantry tenant create`, `edit`, `delete`, `grant` and `revoke`.

use std::path::PathBuf;
use std::slice;

use clap::Args;
use gantry_resources::base::{DeviceName, HostBdf, HostPaths};
use gantry_resources::making::{HostAccess, Netlink};
use gantry_resources::moving::ChildWriter;
use gantry_resources::pools::{TenantFile, Tenants};
use gantry_resources::tenants::{
    Grant, GrantedDevices, create_tenant, delete_tenant, edit_tenant, grant, revoke,
};
use serde::Serialize;

use crate::output::OutputArgs;
use crate::report::Failure;
use crate::signals::SignalsHeld;

#[derive(Debug, Args)]
#[command(
    after_help = "Example: gantry tenant create lab --user alice --description 'The lab upstairs'"
)]
pub struct CreateArgs {
    /// The tenant
    name: String,
    /// User who runs its VMs [default: the user of the tenant's name]
    #[arg(long)]
    user: Option<String>,
    /// A description
    #[arg(long, default_value_t, hide_default_value = true)]
    description: String,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant edit lab --user bob")]
pub struct EditArgs {
    /// The tenant
    name: String,
    /// User who runs its VMs
    #[arg(long)]
    user: Option<String>,
    /// A description
    #[arg(long)]
    description: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant delete lab")]
pub struct DeleteArgs {
    /// The tenant
    name: String,
    #[command(flatten)]
    output: OutputArgs,
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
    /// Grant free devices of this host group
    #[arg(long, value_name = "GROUP")]
    from: Option<String>,
    /// Number of devices of that group
    #[arg(long, requires = "from", default_value_t = 1)]
    count: usize,
    /// Tenant's group to add the devices to [default: one of the tenant's name]
    #[arg(long)]
    group: Option<String>,
    /// Give this device away even if the host uses it; whatever uses it loses it
    #[arg(long = "override", value_name = "BDF")]
    overrides: Vec<HostBdf>,
    #[command(flatten)]
    output: OutputArgs,
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
    /// Revoke all devices of the tenant
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Action {
    Created,
    Changed,
    Deleted,
    Granted,
    Revoked,
}

/// A change of a tenant.
#[derive(Debug, Serialize)]
struct ChangeReport<'a> {
    tenant: &'a str,
    done: Action,
    #[serde(flatten)]
    file: Option<&'a TenantFile>,
    /// The tenant's group that the devices were added to.
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    added: Option<&'a [DeviceName]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<&'a [DeviceName]>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    files: &'a [PathBuf],
}

impl<'a> ChangeReport<'a> {
    const fn new(tenant: &'a str, done: Action) -> Self {
        Self {
            tenant,
            done,
            file: None,
            group: None,
            added: None,
            removed: None,
            files: &[],
        }
    }
}

pub fn create(args: CreateArgs, paths: &HostPaths) -> Result<(), Failure> {
    let name = &args.name;
    let file = TenantFile {
        user: args.user.unwrap_or_else(|| name.clone()),
        description: args.description,
    };
    let path = create_tenant(paths, name, &file)?;
    let changed = ChangeReport {
        file: Some(&file),
        files: slice::from_ref(&path),
        ..ChangeReport::new(name, Action::Created)
    };
    args.output.print(&changed, |out| {
        let (user, path) = (&file.user, path.display());
        writeln!(out, "tenant {name}: created for user {user} (in {path})")?;
        writeln!(out, "  `gantry tenant grant {name} BDF` gives it a device")
    })
}

pub fn edit(args: EditArgs, paths: &HostPaths) -> Result<(), Failure> {
    let name = &args.name;
    let tenants = Tenants::load(paths)?;
    let now = &tenants.find(name)?.file;
    let file = TenantFile {
        user: args.user.unwrap_or_else(|| now.user.clone()),
        description: args.description.unwrap_or_else(|| now.description.clone()),
    };
    let path = edit_tenant(paths, name, &file)?;
    let changed = ChangeReport {
        file: Some(&file),
        files: slice::from_ref(&path),
        ..ChangeReport::new(name, Action::Changed)
    };
    args.output.print(&changed, |out| {
        let (user, path) = (&file.user, path.display());
        writeln!(out, "tenant {name}: its user is {user} (in {path})")
    })
}

pub fn delete(args: &DeleteArgs, paths: &HostPaths) -> Result<(), Failure> {
    delete_tenant(paths, &args.name)?;
    let changed = ChangeReport::new(&args.name, Action::Deleted);
    args.output.print(&changed, |out| {
        writeln!(out, "tenant {}: deleted", args.name)
    })
}

pub fn grant_devices(args: &GrantArgs, paths: &HostPaths) -> Result<(), Failure> {
    let devices = match &args.from {
        Some(from) => GrantedDevices::Free {
            from,
            count: args.count,
        },
        None => GrantedDevices::Named(&args.devices),
    };
    let wanted = Grant {
        devices,
        group: args.group.as_deref(),
        overrides: &args.overrides,
    };
    // A ctrl-c between two steps would leave a device without an owner.
    let _whole = SignalsHeld::new();
    let links = Netlink::new(paths);
    let host = HostAccess {
        writer: &ChildWriter::default(),
        links: &links,
    };
    let granted = grant(paths, host, &args.name, &wanted);
    let granted = granted?;
    let tenant = &args.name;
    let changed = ChangeReport {
        group: Some(args.group.as_ref().unwrap_or(tenant)),
        added: Some(&granted),
        ..ChangeReport::new(tenant, Action::Granted)
    };
    args.output.print(&changed, |out| {
        let mut granted = granted.iter();
        granted.try_for_each(|device| writeln!(out, "{device}: belongs to tenant {tenant}"))
    })
}

pub fn revoke_devices(args: RevokeArgs, paths: &HostPaths) -> Result<(), Failure> {
    let devices = match args.all {
        false => args.devices,
        true => {
            let tenants = Tenants::load(paths)?;
            let tenant = tenants.find(&args.name)?;
            tenant.names().into_iter().collect()
        }
    };
    let _whole = SignalsHeld::new();
    let links = Netlink::new(paths);
    let host = HostAccess {
        writer: &ChildWriter::default(),
        links: &links,
    };
    let tenant = &args.name;
    let revoked = revoke(paths, host, tenant, &devices)?;
    let changed = ChangeReport {
        removed: Some(&revoked),
        ..ChangeReport::new(tenant, Action::Revoked)
    };
    args.output.print(&changed, |out| {
        let mut revoked = revoked.iter();
        revoked.try_for_each(|device| writeln!(out, "{device}: taken back from tenant {tenant}"))
    })
}
