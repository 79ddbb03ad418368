//! Tenants: users who own devices, whether they use them or not, and run VMs with them unprivileged.
//!
//! A tenant is a directory of definitions of its own, `tenants/NAME` of the configuration directory: who
//! it is (`tenant.json`), and its groups. A device that a tenant's groups name belongs to it: nobody else
//! gets it, and the tenant gets no other. It stays bound to vfio-pci; its VFIO nodes and the file of its
//! lease are the user's, so that the kernel keeps tenants apart. A boot of the host gives nodes and files
//! back to their makers: [`put_tenants_right`] says again whose they are.

mod error;
mod granting;
mod hand_over;
mod removal;
mod vgpus;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::bdf::HostBdf;
use crate::base::config::{self, ConfigError};
use crate::base::host::{HostPaths, TENANTS};
use crate::base::json::nearest;
use crate::base::name::DeviceName;
use crate::base::sysfs;
use crate::holding::host_lock::{LeaseError, OwnersLock};
use crate::holding::maintenance::{RunningVm, running_vms};
use crate::holding::quarantine::adopt;
use crate::holding::record::LeaseRecord;
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::inventory::scan::scan;
use crate::making::sriov::{Netlink, VfLinks, granted};
use crate::pools::group::{GroupError, Groups, is_name};
use crate::pools::rule::Rule;
pub use error::TenantError;
pub use granting::{Grant, Granted, grant, revoke};
use hand_over::Owner;
use removal::Former;
pub use vgpus::revoke_mdevs;

/// Who a tenant is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "gantry tenant")]
pub struct TenantFile {
    /// The user who runs the tenant's VMs.
    pub user: String,
    /// A description.
    #[serde(default)]
    pub description: String,
}

/// A tenant with what it owns.
#[derive(Clone, Debug)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Who it is.
    pub file: TenantFile,
    groups: Groups,
}

/// All tenants of the host, in the order of their names.
#[derive(Clone, Debug, Default)]
pub struct Tenants(Vec<Tenant>);

impl Tenant {
    /// The addresses that its groups name.
    pub fn devices(&self) -> BTreeSet<HostBdf> {
        let rules = self.groups.iter().flat_map(|group| &group.rules);
        rules.filter_map(|rule| rule.only_slot()).collect()
    }

    /// All that it owns.
    fn names(&self) -> BTreeSet<DeviceName> {
        let functions = self.devices().into_iter().map(DeviceName::from);
        functions
            .chain(self.mdevs().into_iter().map(DeviceName::from))
            .collect()
    }

    /// Its groups.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Refuses a device that another tenant's groups name too.
    fn apart_from(&self, other: &Self) -> Result<(), GroupError> {
        let theirs = other.devices();
        for group in self.groups.iter() {
            let slots = group.rules.iter().map(Rule::only_slot);
            for (index, bdf) in slots.enumerate() {
                if let Some(bdf) = bdf.filter(|bdf| theirs.contains(bdf)) {
                    let problem = format!(
                        "{bdf} belongs to tenant \"{}\" too: take the rule out of one of them",
                        other.name
                    );
                    return Err(group.wrong(&format!("rules[{index}].slot"), problem));
                }
            }
            let spec = group.vgpu.as_ref();
            let mut uuids = spec.iter().flat_map(|spec| &spec.uuids);
            if let Some(uuid) = uuids.find(|uuid| other.mdevs().contains(uuid)) {
                let other = &other.name;
                let problem =
                    format!("{uuid} belongs to tenant \"{other}\" too: take it out of one of them");
                return Err(group.wrong("vgpu.uuids", problem));
            }
        }
        Ok(())
    }

    /// Whether the device is the tenant's, by what it is and not only by where it is.
    pub fn owns(&self, device: &HostDevice) -> bool {
        let mut rules = self.groups.iter().flat_map(|group| &group.rules);
        rules.any(|rule| rule.only_slot() == Some(device.bdf) && rule.matches(device))
    }

    /// Refuses an address where other hardware is by now, or in whose IOMMU group another device has
    /// come: nobody granted that. `all` are the devices of the host.
    pub fn may_have(&self, bdf: HostBdf, all: &[HostDevice]) -> Result<(), TenantError> {
        let Some(device) = all.iter().find(|device| device.bdf == bdf) else {
            return Ok(());
        };
        let beside = |other: &&HostDevice| {
            let shared = other.iommu_group.is_some() && other.iommu_group == device.iommu_group;
            other.bdf == bdf || shared && !other.is_bridge()
        };
        match all.iter().filter(beside).find(|other| !self.owns(other)) {
            None => Ok(()),
            Some(other) => Err(TenantError::OtherHardware {
                bdf,
                name: self.name.clone(),
                other: other.bdf,
                id: other.id,
            }),
        }
    }

    /// The host as the tenant sees it: its own definitions, locks and state, and no devices but its own.
    pub fn scope(&self, host: &HostPaths) -> HostPaths {
        let own = |bdf: &HostBdf| match HostDevice::read(host, *bdf) {
            Ok(device) => self.owns(&device),
            Err(InventoryError::NoSuchDevice { .. }) => true,
            Err(_) => false,
        };
        HostPaths {
            only: Some(
                self.devices()
                    .into_iter()
                    .filter(own)
                    .map(DeviceName::from)
                    .chain(self.mdevs().into_iter().map(DeviceName::from))
                    .collect(),
            ),
            ..dirs(host, &self.name)
        }
    }
}

/// A tenant's directories, with all devices in sight.
fn dirs(host: &HostPaths, name: &str) -> HostPaths {
    HostPaths {
        run: host.run.join(TENANTS).join(name),
        config: host.config.join(TENANTS).join(name),
        state: host.state.join(TENANTS).join(name),
        ..host.clone()
    }
}

/// A tenant's definitions, which only root changes: under the host's locks, as the tenant's own lie where
/// root opens nothing.
fn definitions(host: &HostPaths, name: &str) -> HostPaths {
    HostPaths {
        config: dirs(host, name).config,
        ..host.clone()
    }
}

fn definition(host: &HostPaths, name: &str) -> PathBuf {
    dirs(host, name).config.join("tenant.json")
}

impl Tenants {
    /// Reads `tenants/*/tenant.json` with the groups beside each. None need exist.
    pub fn load(host: &HostPaths) -> Result<Self, GroupError> {
        let dir = host.config.join(TENANTS);
        let names = sysfs::entries(&dir).map_err(|source| ConfigError::Read {
            path: dir.clone(),
            source,
        })?;
        let mut tenants = Vec::new();
        for name in names.into_iter().filter(|name| is_name(name)) {
            let path = definition(host, &name);
            let Some(text) = config::read(&path)? else {
                continue;
            };
            let file = config::parse(&path, &text)?;
            let groups = Groups::load_own(&dirs(host, &name))?;
            let tenant = Tenant { name, file, groups };
            tenants
                .iter()
                .try_for_each(|other| tenant.apart_from(other))?;
            tenants.push(tenant);
        }
        Ok(Self(tenants))
    }

    /// The tenants.
    pub fn iter(&self) -> impl Iterator<Item = &Tenant> {
        self.0.iter()
    }

    /// The tenant of that name.
    pub fn find(&self, name: &str) -> Result<&Tenant, TenantError> {
        let found = self.0.iter().find(|tenant| tenant.name == name);
        found.ok_or_else(|| TenantError::Unknown {
            name: name.to_owned(),
            near: nearest(name, self.0.iter().map(|tenant| tenant.name.as_str()))
                .map(str::to_owned),
        })
    }

    /// Every device of a tenant, and whose it is.
    pub(crate) fn owners(&self) -> BTreeMap<DeviceName, String> {
        let owned = |tenant: &Tenant| {
            let name = tenant.name.clone();
            let all = tenant.names().into_iter();
            all.map(move |device| (device, name.clone()))
        };
        self.0.iter().flat_map(owned).collect()
    }

    /// The tenant that a device belongs to.
    pub fn owner_of(&self, name: impl Into<DeviceName>) -> Option<&Tenant> {
        let name = name.into();
        self.0.iter().find(|tenant| tenant.names().contains(&name))
    }

    /// The tenants whose VMs a user runs.
    pub fn of_user<'a>(&'a self, user: &'a str) -> impl Iterator<Item = &'a Tenant> {
        self.0.iter().filter(move |tenant| tenant.file.user == user)
    }

    /// [`put_tenants_right`] by whoever has the owners' lock, and has loaded these under it.
    fn put_right(&self, host: &HostPaths) -> Result<(), TenantError> {
        self.put_right_with(host, &Netlink::new(host))
    }

    pub(crate) fn put_right_with(
        &self,
        host: &HostPaths,
        links: &dyn VfLinks,
    ) -> Result<(), TenantError> {
        let all = scan(host)?;
        let put_right = |tenant: &Tenant| {
            let owner = Owner::of(host, tenant)?;
            owner.make_dirs(host, &tenant.name)?;
            let mut there = Vec::new();
            let mut give = |bdf: HostBdf| {
                tenant.may_have(bdf, &all)?;
                owner.take_over(host, bdf.into())?;
                let device = all.iter().find(|device| device.bdf == bdf);
                there.extend(device.map(|device| device.bdf));
                Ok(())
            };
            let given: Vec<_> = tenant.devices().into_iter().map(&mut give).collect();
            granting::keep_settings(host, links, &there);
            // Those that no group of the host's makes are not there.
            let mdevs = tenant.mdevs().into_iter();
            let mdevs = mdevs.filter(|uuid| host.mdev(*uuid).exists());
            let mdevs = mdevs.map(|uuid| owner.take_over(host, uuid.into()));
            // One that cannot be had keeps no other one away.
            all_of(given.into_iter().chain(mdevs))
        };
        let done = all_of(self.0.iter().map(put_right));
        granted::mend(host, links);
        done
    }
}

/// Gives every tenant its directories, nodes and lock files: what a boot of the host, or a driver
/// bound anew, has undone. Devices must be with vfio-pci already. Whose they are is looked up when it is this
/// command's turn: another one may just have changed it.
pub fn put_tenants_right(host: &HostPaths) -> Result<(), TenantError> {
    let _alone = alone(host)?;
    Tenants::load(host)?.put_right(host)
}

/// Of two commands that change whose devices are, the second one sees what the first one did.
fn alone(host: &HostPaths) -> Result<OwnersLock, LeaseError> {
    OwnersLock::acquire(host, &LeaseRecord::task("gantry tenant"))
}

/// Makes a tenant that owns nothing yet.
pub fn create_tenant(
    host: &HostPaths,
    name: &str,
    file: &TenantFile,
) -> Result<PathBuf, TenantError> {
    if !is_name(name) {
        return Err(TenantError::Name(name.to_owned()));
    }
    let _alone = alone(host)?;
    let path = definition(host, name);
    if path.exists() {
        let name = name.to_owned();
        return Err(TenantError::Duplicate { name, path });
    }
    Owner::named(&file.user, &path)?;
    config::write(&path, file)?;
    Ok(path)
}

/// Changes who a tenant is. The new user gets its nodes and files.
pub fn edit_tenant(
    host: &HostPaths,
    name: &str,
    file: &TenantFile,
) -> Result<PathBuf, TenantError> {
    let alone = alone(host)?;
    let tenants = Tenants::load(host)?;
    let tenant = tenants.find(name)?;
    let path = definition(host, name);
    Owner::named(&file.user, &path)?;
    if tenant.file.user == file.user {
        config::write(&path, file)?;
        return Ok(path);
    }
    // What runs would belong to a user who is nobody any more.
    runs_no_vm(host, tenant)?;
    for device in tenant.names() {
        hand_over::is_free(host, device)?;
        hand_over::is_closed(host, device)?;
    }
    // What the former user's VMs found out about devices stays known.
    for bdf in tenant.devices() {
        adopt(host, bdf).map_err(failed(&host.state))?;
    }
    // The former user opens nothing from here on, whatever becomes of this command.
    let mut names = tenant.names().into_iter();
    let taken = names.try_for_each(|device| Owner::host().take_over(host, device));
    let changed = taken.and_then(|()| Ok(config::write(&path, file)?));
    if let Err(error) = changed {
        tenants.put_right(host)?;
        return Err(error);
    }
    // Nor may it have a hand in the new user's directories.
    let former = Former::of(host, name);
    let given = Tenants::load(host)?.put_right(host);
    drop(alone);
    former.remove();
    given.map(|()| path)
}

/// Refuses what a tenant's VM that runs would not survive.
fn runs_no_vm(host: &HostPaths, tenant: &Tenant) -> Result<(), TenantError> {
    let is_own = |vm: &RunningVm| vm.tenant.as_ref() == Some(&tenant.name);
    let Some(vm) = running_vms(host)?.into_iter().find(is_own) else {
        return Ok(());
    };
    let runs =
        |pid: NonZeroU32| Owner::of(host, tenant).is_ok_and(|owner| owner.runs(host, pid.get()));
    Err(match vm.record.pid.is_some_and(runs) {
        true => TenantError::Running(vm),
        false => TenantError::SaysItRuns {
            name: tenant.name.clone(),
            vm: vm.record.name,
            user: tenant.file.user.clone(),
        },
    })
}

/// Deletes a tenant that owns nothing, and none of whose VMs runs.
pub fn delete_tenant(host: &HostPaths, name: &str) -> Result<(), TenantError> {
    let alone = alone(host)?;
    let tenants = Tenants::load(host)?;
    let tenant = tenants.find(name)?;
    let owned = tenant.names();
    runs_no_vm(host, tenant)?;
    if !owned.is_empty() {
        let devices: Vec<String> = owned.iter().map(DeviceName::to_string).collect();
        return Err(TenantError::NotEmpty {
            name: name.to_owned(),
            devices: devices.join(", "),
        });
    }
    let HostPaths { config, .. } = dirs(host, name);
    // The definition first: what is left of a tenant without one is nobody's.
    let definition = config.join("tenant.json");
    for path in [&definition, &config] {
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(path),
            false => fs::remove_file(path),
        };
        removed.or_else(absent_is_fine).map_err(failed(path))?;
    }
    let former = Former::of(host, name);
    // Nobody waits for that.
    drop(alone);
    former.remove();
    Ok(())
}

/// Does all of them; the last failure, where some fail, with the others in the log.
fn all_of(steps: impl Iterator<Item = Result<(), TenantError>>) -> Result<(), TenantError> {
    let mut failed: Vec<TenantError> = steps.filter_map(Result::err).collect();
    let last = failed.pop();
    failed.iter().for_each(|error| tracing::error!("{error}"));
    last.map_or(Ok(()), Err)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> TenantError {
    let path = path.to_owned();
    |source| TenantError::File { path, source }
}

fn absent_is_fine(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests;
