//! `gantry tenant create`, `edit`, `delete`, `grant` and `revoke`: what they do and say.

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
    /// Who runs its VMs [default: the user of the tenant's name]
    #[arg(long)]
    user: Option<String>,
    /// A description
    #[arg(long, default_value_t, hide_default_value = true)]
    description: String,
    #[command(flatten)]
    tell: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant edit lab --user bob")]
pub struct EditArgs {
    /// The tenant
    name: String,
    /// Who runs its VMs
    #[arg(long)]
    user: Option<String>,
    /// A description
    #[arg(long)]
    description: Option<String>,
    #[command(flatten)]
    tell: OutputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry tenant delete lab")]
pub struct DeleteArgs {
    /// The tenant
    name: String,
    #[command(flatten)]
    tell: OutputArgs,
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
    /// Give this device away even if the host uses it; whatever uses it loses it
    #[arg(long = "override", value_name = "BDF")]
    overrides: Vec<HostBdf>,
    #[command(flatten)]
    tell: OutputArgs,
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
    #[command(flatten)]
    tell: OutputArgs,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Done {
    Created,
    Changed,
    Deleted,
    Granted,
    Revoked,
}

/// A tenant that was changed.
#[derive(Debug, Serialize)]
struct Changed<'a> {
    tenant: &'a str,
    done: Done,
    #[serde(flatten)]
    file: Option<&'a TenantFile>,
    /// The tenant's group that the devices came into.
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    added: Option<&'a [DeviceName]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<&'a [DeviceName]>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    files: &'a [PathBuf],
}

impl<'a> Changed<'a> {
    const fn new(tenant: &'a str, done: Done) -> Self {
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
    let changed = Changed {
        file: Some(&file),
        files: slice::from_ref(&path),
        ..Changed::new(name, Done::Created)
    };
    args.tell.tell(&changed, |out| {
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
    let changed = Changed {
        file: Some(&file),
        files: slice::from_ref(&path),
        ..Changed::new(name, Done::Changed)
    };
    args.tell.tell(&changed, |out| {
        let (user, path) = (&file.user, path.display());
        writeln!(out, "tenant {name}: its user is {user} (in {path})")
    })
}

pub fn delete(args: &DeleteArgs, paths: &HostPaths) -> Result<(), Failure> {
    delete_tenant(paths, &args.name)?;
    let changed = Changed::new(&args.name, Done::Deleted);
    args.tell.tell(&changed, |out| {
        writeln!(out, "tenant {}: deleted", args.name)
    })
}

pub fn give(args: &GrantArgs, paths: &HostPaths) -> Result<(), Failure> {
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
    let given = grant(paths, host, &args.name, &wanted);
    let given = given?;
    let tenant = &args.name;
    let changed = Changed {
        group: Some(args.group.as_ref().unwrap_or(tenant)),
        added: Some(&given),
        ..Changed::new(tenant, Done::Granted)
    };
    args.tell.tell(&changed, |out| {
        let mut given = given.iter();
        given.try_for_each(|device| writeln!(out, "{device}: belongs to tenant {tenant}"))
    })
}

pub fn take(args: RevokeArgs, paths: &HostPaths) -> Result<(), Failure> {
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
    let taken = revoke(paths, host, tenant, &devices)?;
    let changed = Changed {
        removed: Some(&taken),
        ..Changed::new(tenant, Done::Revoked)
    };
    args.tell.tell(&changed, |out| {
        let mut taken = taken.iter();
        taken.try_for_each(|device| writeln!(out, "{device}: taken back from tenant {tenant}"))
    })
}
