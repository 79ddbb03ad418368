//! `gantry tenant`: users who own devices and run VMs with them, unprivileged.

mod change;
mod owned;

use clap::Subcommand;
use gantry_resources::base::HostPaths;
use gantry_resources::pools::{Tenant, Tenants};
use nix::unistd::{User, geteuid};

use crate::report::{Failure, USAGE};

#[derive(Debug, Subcommand)]
#[command(after_help = "\
A tenant owns devices, whether its VMs use them or not: only its VMs can get them. They stay bound to \
vfio-pci. Their device nodes and locks belong to the tenant's user, who sees only these devices and runs VMs \
with them without root. After a reboot, `gantry boot` restores this.

A granted device is put into a group with the tenant's name, or into the one that --group names. The tenant's \
VMs ask for that group. The definitions are in tenants/NAME below the configuration directory. A user of \
several tenants chooses one with --tenant NAME. Root is in no tenant, and sees all of them with `gantry tenant \
list` and `gantry tenant show`.

A mediated device (vGPU) can be granted if its group lists it in \"uuids\", so that it exists before a VM \
starts. A virtual function keeps the settings of its group. If a trusted guest changes them, `gantry boot` and \
other commands of root put them back when no VM has the function. Settings that the group gets later are \
applied by `gantry boot`, or when the function is granted again.

Examples:
  gantry tenant create lab --user alice
  gantry tenant grant lab 0b:00.0 0c:00.0
  sudo -u alice gantry run vm.json       its \"devices\": [{\"group\": \"lab\"}]
  gantry tenant revoke lab 0c:00.0")]
pub enum TenantCommand {
    /// Make a tenant that owns nothing yet
    Create(change::CreateArgs),
    /// List the tenants with their devices
    List(owned::ListArgs),
    /// Show one tenant with its devices
    Show(owned::ShowArgs),
    /// Change a tenant's user or description
    Edit(change::EditArgs),
    /// Delete a tenant that owns nothing and runs no VM
    Delete(change::DeleteArgs),
    /// Grant devices to a tenant, each with its whole IOMMU group
    Grant(change::GrantArgs),
    /// Take devices back from a tenant, and rebind them to the drivers that they had
    Revoke(change::RevokeArgs),
}

pub fn tenant(command: TenantCommand, paths: &HostPaths) -> Result<(), Failure> {
    match command {
        TenantCommand::List(args) => owned::list(&args, paths),
        TenantCommand::Show(args) => owned::show(&args, paths),
        TenantCommand::Create(args) => change::create(args, paths),
        TenantCommand::Edit(args) => change::edit(args, paths),
        TenantCommand::Delete(args) => change::delete(&args, paths),
        TenantCommand::Grant(args) => change::grant_devices(&args, paths),
        TenantCommand::Revoke(args) => change::revoke_devices(args, paths),
    }
}

/// The error for a user other than the tenant's. The tenant's directories may hold links, which root must not
/// follow.
fn not_its_user(tenant: &Tenant, is_root: bool) -> Failure {
    let (name, user) = (&tenant.name, &tenant.file.user);
    let what = match is_root {
        true => format!("root does not work in the directories of tenant \"{name}\""),
        false => format!("you are not tenant \"{name}\", whose user is {user}"),
    };
    Failure::new(USAGE, what).help(format!(
        "run it as the tenant's user, as in `sudo -u {user} gantry device list`; `gantry tenant show {name}` lists what it owns"
    ))
}

/// The host as a tenant sees it: the tenant of --tenant, or that of the unprivileged user.
pub fn scope(host: HostPaths, name: Option<&str>) -> Result<HostPaths, Failure> {
    let user = geteuid();
    if name.is_none() && user.is_root() {
        return Ok(host);
    }
    let tenants = Tenants::load(&host)?;
    let is_root = user.is_root();
    let user = User::from_uid(user).ok().flatten();
    let user = user.map(|user| user.name).unwrap_or_default();
    if let Some(name) = name {
        let tenant = tenants.find(name)?;
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
            Err(Failure::new(USAGE, what).help("name one with --tenant NAME"))
        }
    }
}
