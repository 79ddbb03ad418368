//! Tenants: their users, and the devices that their groups name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::base::config::{self, ConfigError};
use crate::base::host::{HostPaths, TENANTS};
use crate::base::json::{near_or_list, nearest};
use crate::base::name::{DeviceName, is_name};
use crate::base::sysfs;
use crate::base::uuid::Uuid;
use crate::facts::ids::PciId;
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::pools::group::{GroupError, Groups};
use crate::pools::rule::Rule;

/// The definition of a tenant.
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

/// A tenant with its devices.
#[derive(Clone, Debug)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Its definition.
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

    /// The mediated devices that its groups name.
    pub fn mdevs(&self) -> BTreeSet<Uuid> {
        let specs = self.groups.iter().filter_map(|group| group.vgpu.as_ref());
        specs.flat_map(|spec| &spec.uuids).copied().collect()
    }

    /// All its devices.
    pub fn names(&self) -> BTreeSet<DeviceName> {
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

    /// Whether the tenant owns the device, by its address and its ids.
    pub fn owns(&self, device: &HostDevice) -> bool {
        let mut rules = self.groups.iter().flat_map(|group| &group.rules);
        rules.any(|rule| rule.only_slot() == Some(device.bdf) && rule.matches(device))
    }

    /// Refuses an address with other hardware than was granted, or whose IOMMU group has a new device. `all` are
    /// the devices of the host.
    pub fn may_have(&self, bdf: HostBdf, all: &[HostDevice]) -> Result<(), OtherHardware> {
        let Some(device) = all.iter().find(|device| device.bdf == bdf) else {
            return Ok(());
        };
        let beside = |other: &&HostDevice| {
            let shared = other.iommu_group.is_some() && other.iommu_group == device.iommu_group;
            other.bdf == bdf || shared && !other.is_bridge()
        };
        match all.iter().filter(beside).find(|other| !self.owns(other)) {
            None => Ok(()),
            Some(other) => Err(OtherHardware {
                bdf,
                name: self.name.clone(),
                other: other.bdf,
                id: other.id,
            }),
        }
    }

    /// The host as the tenant sees it: the tenant's definitions, locks, state and devices only.
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

/// A tenant's directories, with all devices visible.
pub(crate) fn dirs(host: &HostPaths, name: &str) -> HostPaths {
    HostPaths {
        run: host.run.join(TENANTS).join(name),
        config: host.config.join(TENANTS).join(name),
        state: host.state.join(TENANTS).join(name),
        ..host.clone()
    }
}

/// A tenant's definitions, which only root changes, under the host's locks: root opens nothing in the tenant's own
/// directories.
pub(crate) fn definitions(host: &HostPaths, name: &str) -> HostPaths {
    HostPaths {
        config: dirs(host, name).config,
        ..host.clone()
    }
}

pub(crate) fn definition(host: &HostPaths, name: &str) -> PathBuf {
    dirs(host, name).config.join("tenant.json")
}

/// There is no such tenant.
#[derive(Debug, Error)]
#[error("there is no tenant \"{name}\"{}", near_or_list(.near, "gantry tenant list"))]
pub struct UnknownTenant {
    /// The name.
    pub name: String,
    /// The most similar name.
    pub near: Option<String>,
}

/// There is other hardware at a tenant's address, or beside it in its IOMMU group.
#[derive(Debug, Error)]
#[error(
    "{bdf} is not given to tenant \"{name}\": {other} ({id}) is not what it was granted: `gantry tenant revoke {name} {bdf}`, and grant it again if it is to be the tenant's"
)]
pub struct OtherHardware {
    /// The tenant's address.
    pub bdf: HostBdf,
    /// The tenant.
    pub name: String,
    /// The device, of the same IOMMU group.
    pub other: HostBdf,
    /// What it is.
    pub id: PciId,
}

impl Groups {
    /// Reads `groups.json`, then `groups.d/*.json` in the order of their names, then `device_spec.json`
    /// and `alias.json`, which hold what Nova's options of these names hold. None need exist.
    ///
    /// Devices of tenants are left out of all of them.
    pub fn load(paths: &HostPaths) -> Result<Self, GroupError> {
        let owners = Tenants::load(paths)?.owners();
        Ok(Self::load_own(paths)?.without(owners))
    }
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
    pub fn find(&self, name: &str) -> Result<&Tenant, UnknownTenant> {
        let found = self.0.iter().find(|tenant| tenant.name == name);
        found.ok_or_else(|| UnknownTenant {
            name: name.to_owned(),
            near: nearest(name, self.0.iter().map(|tenant| tenant.name.as_str()))
                .map(str::to_owned),
        })
    }

    /// Every device of a tenant, with its tenant.
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

    /// The tenants of a user.
    pub fn of_user<'a>(&'a self, user: &'a str) -> impl Iterator<Item = &'a Tenant> {
        self.0.iter().filter(move |tenant| tenant.file.user == user)
    }
}
