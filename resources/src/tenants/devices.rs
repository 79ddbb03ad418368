//! The devices of one grant: how they are read, checked, detached and put into a tenant's group.

use super::TenantError;
use super::hand_over::is_closed;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::holding::lock_file::holder;
use crate::inventory::device::HostDevice;
use crate::inventory::mdev::{MdevDevice, Mdevs};
use crate::inventory::scan::scan;
use crate::inventory::unavailable::{Unavailable, UnavailableDevice};
use crate::making::sriov::HostAccess;
use crate::making::vgpu::VgpuError;
use crate::moving::bind::{BindRequest, detach, members};
use crate::pools::group::{Bind, GroupChange, GroupFiles, GroupType, ResourceGroup};
use crate::pools::tenant::Tenants;
use crate::pools::vgpu::VgpuSpec;

/// The devices of one grant, of one kind, as they were before it.
pub(super) enum Devices {
    /// PCI functions with all endpoints of their IOMMU groups.
    Functions(Vec<HostDevice>),
    /// Mediated devices that a host group makes ahead: others are removed with the VM that they were made for.
    Mdevs(Vec<MdevDevice>),
}

/// Refuses PCI functions and mediated devices together: a group of a tenant holds one kind.
pub(super) fn are_of_one_kind(names: &[DeviceName]) -> Result<(), TenantError> {
    let is_pci = |name: &DeviceName| name.pci().is_some();
    match names.iter().all(is_pci) || !names.iter().any(is_pci) {
        true => Ok(()),
        false => Err(TenantError::MixedKinds),
    }
}

impl Devices {
    /// Reads the devices of these names, which are of one kind.
    pub(super) fn read(host: &HostPaths, names: &[DeviceName]) -> Result<Self, TenantError> {
        let functions: Vec<HostBdf> = names.iter().filter_map(|name| name.pci()).collect();
        if functions.len() == names.len() {
            return Ok(Self::Functions(members(&scan(host)?, &functions)?));
        }
        let mdevs = Mdevs::read(host)?;
        let one = |uuid| {
            let mut stay = mdevs
                .devices
                .iter()
                .filter(|one| !mdevs.is_claimed(one.uuid));
            let device = stay.find(|one| one.uuid == uuid).cloned();
            device.ok_or_else(|| VgpuError::NoSuch { uuid }.into())
        };
        let uuids = names.iter().filter_map(|name| name.mdev());
        uuids.map(one).collect::<Result<_, _>>().map(Self::Mdevs)
    }

    /// The PCI functions.
    pub(super) fn functions(&self) -> &[HostDevice] {
        match self {
            Self::Functions(devices) => devices,
            Self::Mdevs(_) => &[],
        }
    }

    pub(super) fn names(&self) -> Vec<DeviceName> {
        match self {
            Self::Functions(devices) => devices.iter().map(|one| one.bdf.into()).collect(),
            Self::Mdevs(devices) => devices.iter().map(|one| one.uuid.into()).collect(),
        }
    }

    /// Refuses devices that are leased, in quarantine, or open in a process.
    pub(super) fn are_available(
        &self,
        host: &HostPaths,
        tenants: &Tenants,
    ) -> Result<(), TenantError> {
        if let Self::Mdevs(devices) = self {
            return devices.iter().try_for_each(is_free);
        }
        let leased = |device: &HostDevice| {
            let is_held = device.lease.is_held();
            is_held.then(|| UnavailableDevice::leased(device.bdf, &device.lease))
        };
        let quarantined = |device: &HostDevice| {
            let (bdf, why) = (device.bdf, device.quarantine.clone()?);
            let why = Unavailable::Quarantined { why };
            Some(UnavailableDevice { bdf, why })
        };
        let devices = self.functions();
        let unavailable = devices.iter().find_map(leased);
        if let Some(unavailable) = unavailable.or_else(|| devices.iter().find_map(quarantined)) {
            return Err(TenantError::InUse(unavailable));
        }
        let is_new = |one: &&HostDevice| one.on_vfio() && tenants.owner_of(one.bdf).is_none();
        let mut new = devices.iter().filter(is_new);
        new.try_for_each(|device| is_closed(host, device.bdf.into()))
    }

    /// Binds PCI functions to vfio-pci: those `named`, with the other endpoints of their IOMMU groups.
    pub(super) fn detach(
        &self,
        host: &HostPaths,
        access: HostAccess<'_>,
        named: &[DeviceName],
        overrides: &[HostBdf],
    ) -> Result<(), TenantError> {
        if let Self::Mdevs(_) = self {
            return Ok(());
        }
        let devices: Vec<HostBdf> = named.iter().filter_map(|name| name.pci()).collect();
        let request = BindRequest {
            devices: &devices,
            overrides,
            dry_run: false,
        };
        detach(host, access.writer, &request)?;
        Ok(())
    }

    /// The tenant's group files with these devices in a group, not yet written.
    pub(super) fn add_to(&self, scope: &HostPaths, group: &str) -> Result<GroupFiles, TenantError> {
        let mut files = GroupFiles::open(scope)?;
        let existing = files.groups()?.get(group).cloned();
        if existing.is_none() {
            files.create(ResourceGroup::named(group))?;
        }
        let bind = GroupChange {
            bind: Some(Bind::Boot),
            ..GroupChange::default()
        };
        match self {
            Self::Functions(devices) => {
                files.change(group, bind)?;
                files.add(group, devices)?;
            }
            Self::Mdevs(devices) => {
                let first = || devices.first().map(|one| VgpuSpec::of_kind(&one.kind));
                let spec = existing.map_or_else(first, |existing| existing.vgpu);
                let change = GroupChange {
                    kind: Some(GroupType::Vgpu),
                    vgpu: Some(spec_with(spec, scope, group, devices)?),
                    ..bind
                };
                files.change(group, change)?;
            }
        }
        Ok(files)
    }
}

fn is_free(device: &MdevDevice) -> Result<(), TenantError> {
    match device.lease.is_held() {
        true => Err(VgpuError::held(device.uuid, &device.lease).into()),
        false => Ok(()),
    }
}

/// The mediated devices that a group names, with these too. The group files are open, so that nobody removes one of
/// them after this check.
fn spec_with(
    mut spec: Option<VgpuSpec>,
    scope: &HostPaths,
    group: &str,
    devices: &[MdevDevice],
) -> Result<Option<VgpuSpec>, TenantError> {
    for device in devices {
        let uuid = device.uuid;
        // A deactivation locks a device before it waits for the group files.
        let lease = holder(scope, uuid);
        if lease.is_held() {
            return Err(VgpuError::held(uuid, &lease).into());
        }
        if MdevDevice::read(scope, uuid)?.is_none() {
            return Err(VgpuError::NoSuch { uuid }.into());
        }
        match spec.as_mut().filter(|spec| spec.kind == device.kind) {
            Some(spec) if spec.uuids.contains(&uuid) => {}
            Some(spec) => spec.uuids.push(uuid),
            None => {
                return Err(TenantError::OtherKind {
                    group: group.to_owned(),
                    kind: device.kind.clone(),
                });
            }
        }
    }
    Ok(spec)
}
