//! Detaching devices from the host and giving them back, whole IOMMU groups at a time.

mod error;

use std::collections::BTreeSet;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::holding::device_lock::DeviceLock;
use crate::holding::lock_file::holder;
use crate::holding::passing::under_lock;
use crate::holding::quarantine::hung;
use crate::holding::record::LeaseRecord;
use crate::holding::restore::Change;
use crate::inventory::device::{HostDevice, is_vfio_driver};
use crate::inventory::driver_record::DriverRecord;
use crate::inventory::error::InventoryError;
use crate::inventory::guard::{doubts, host_uses};
use crate::inventory::scan::{Detail, scan_with};
use crate::inventory::unavailable::{IommuGroups, Unavailable, UnavailableDevice};
use crate::moving::moves::{Move, MoveError, Mover, Target, VFIO_PCI};
use crate::moving::writer::{SysfsWrite, SysfsWriter};
use crate::pools::tenant::Tenants;
pub use error::BindError;

/// Which devices to move.
#[derive(Clone, Copy, Debug)]
pub struct BindRequest<'a> {
    /// The devices. All endpoints of their IOMMU groups move with them.
    pub devices: &'a [HostBdf],
    /// Devices that are detached although the host uses them, each named exactly.
    pub overrides: &'a [HostBdf],
    /// Change nothing, only report the writes.
    pub dry_run: bool,
}

impl<'a> BindRequest<'a> {
    /// Moves these devices, unless the host uses them.
    pub fn of(devices: &'a [HostBdf]) -> Self {
        Self {
            devices,
            overrides: &[],
            dry_run: false,
        }
    }
}

/// The result of a move, or of its dry run.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BindReport {
    /// Devices whose driver changed.
    pub moved: Vec<HostBdf>,
    /// Devices asked for that already had the driver wanted.
    pub unchanged: Vec<HostBdf>,
    /// The writes, in order.
    pub writes: Vec<SysfsWrite>,
}

/// Binds devices to vfio-pci, with all endpoints of their IOMMU groups: all, or none after a failure. A device that
/// is bound already is a success. Refused for devices that the host uses.
pub fn detach(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    request: &BindRequest<'_>,
) -> Result<BindReport, BindError> {
    Direction::Detach.carry_out(paths, writer, request)
}

/// Gives devices back to the host's drivers, with all endpoints of their IOMMU groups: to the recorded driver of
/// each, or else to the one that the kernel chooses. Refused while one of them is leased.
pub fn reattach(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    request: &BindRequest<'_>,
) -> Result<BindReport, BindError> {
    Direction::Reattach.carry_out(paths, writer, request)
}

/// [`detach`] for a VM of this process, which holds the locks of all devices concerned: their
/// records say that a VM took them.
pub(crate) fn detach_held(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    devices: &[HostBdf],
) -> Result<BindReport, BindError> {
    Direction::Lend.carry_out_held(paths, writer, devices)
}

/// [`reattach`] for those of some devices whose records say that a VM took them, by a process that holds
/// the locks of all devices concerned.
pub(crate) fn give_back(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    devices: &[HostBdf],
) -> Result<BindReport, BindError> {
    Direction::Return.carry_out_held(paths, writer, devices)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Detach,
    Reattach,
    /// To vfio-pci for as long as a VM runs.
    Lend,
    /// Back when it has ended.
    Return,
}

/// The plan for a request.
#[derive(Debug, Default)]
struct Plan {
    /// Endpoints of the IOMMU groups concerned.
    members: Vec<HostDevice>,
    /// Those that must move.
    moves: Vec<Move>,
    /// Those asked for that need no move.
    unchanged: Vec<HostBdf>,
}

impl Direction {
    fn carry_out(
        self,
        paths: &HostPaths,
        writer: &dyn SysfsWriter,
        request: &BindRequest<'_>,
    ) -> Result<BindReport, BindError> {
        if request.dry_run {
            let plan = self.plan(paths, request)?;
            let writes = plan
                .moves
                .iter()
                .flat_map(|one| one.writes(paths, &one.device))
                .collect();
            return Ok(plan.report(writes));
        }
        let record = LeaseRecord::task(self.command());
        // From here on the devices' own locks are enough: a write that hangs delays no other command.
        let (plan, _locks) = under_lock(paths, &record, BindError::in_the_way, || {
            let plan = self.plan(paths, request)?;
            let locks = plan.lock(paths, &record)?;
            Ok::<_, BindError>((plan, locks))
        })?;
        if self == Self::Detach {
            plan.members
                .iter()
                .for_each(|member| DriverRecord::keep_detached(paths, member));
        }
        let mut mover = Mover {
            paths,
            writer,
            writes: Vec::new(),
        };
        self.apply(&mut mover, &plan.moves)?;
        Ok(plan.report(mover.writes))
    }

    fn carry_out_held(
        self,
        paths: &HostPaths,
        writer: &dyn SysfsWriter,
        devices: &[HostBdf],
    ) -> Result<BindReport, BindError> {
        let request = BindRequest::of(devices);
        let mut plan = self.plan(paths, &request)?;
        if self == Self::Return {
            plan.moves
                .retain(|one| DriverRecord::of_lent(paths, &one.device).is_some());
        }
        let mut mover = Mover {
            paths,
            writer,
            writes: Vec::new(),
        };
        self.apply(&mut mover, &plan.moves)?;
        Ok(plan.report(mover.writes))
    }

    fn command(self) -> &'static str {
        match self {
            Self::Detach | Self::Lend => "gantry device detach",
            Self::Reattach | Self::Return => "gantry device reattach",
        }
    }

    /// Whether devices leave the host.
    fn leaves_host(self) -> bool {
        matches!(self, Self::Detach | Self::Lend)
    }

    /// Whether this process holds the devices' locks already.
    fn is_held(self) -> bool {
        matches!(self, Self::Lend | Self::Return)
    }

    fn plan(self, paths: &HostPaths, request: &BindRequest<'_>) -> Result<Plan, BindError> {
        // Reading the override of a device that hangs would block while others wait for the lock that is
        // held here: only the override of devices that move is read.
        let devices = scan_with(paths, Detail::ForChoice)?;
        let whole = |device: HostDevice| HostDevice::read(paths, device.bdf);
        let members = members(&devices, request.devices)?;
        let mut plan = Plan {
            members: members.into_iter().map(whole).collect::<Result<_, _>>()?,
            ..Plan::default()
        };
        for member in &plan.members {
            match self.move_for(paths, member, request.devices) {
                Some(one) => plan.moves.push(one),
                None if request.devices.contains(&member.bdf) => plan.unchanged.push(member.bdf),
                None => {}
            }
        }
        if plan.moves.is_empty() {
            return Ok(plan);
        }
        if self == Self::Reattach {
            let tenants = Tenants::load(paths).map_err(BindError::Tenants)?;
            let owned = |one: &Move| Some((one.device.bdf, tenants.owner_of(one.device.bdf)?));
            if let Some((bdf, tenant)) = plan.moves.iter().find_map(owned) {
                let tenant = tenant.name.clone();
                let why = Unavailable::OfTenant { tenant };
                return Err(BindError::Unavailable(UnavailableDevice { bdf, why }));
            }
        }
        let held = |device: &&HostDevice| device.lease.is_held();
        if let Some(device) = plan.members.iter().find(held).filter(|_| !self.is_held()) {
            return Err(BindError::Unavailable(UnavailableDevice::leased(
                device.bdf,
                &device.lease,
            )));
        }
        // A write to a device that hangs would hang too, and delay the move of its neighbours.
        let stuck = |device: &HostDevice| Some((device.bdf, hung(paths, device.bdf, device.id)?));
        if let Some((bdf, why)) = plan.members.iter().find_map(stuck) {
            let why = Unavailable::Quarantined { why };
            return Err(BindError::Unavailable(UnavailableDevice { bdf, why }));
        }
        if self.leaves_host() {
            may_leave_host(paths, &devices, &plan, request.overrides)?;
        }
        Ok(plan)
    }

    /// The move that a device needs, if it needs one.
    fn move_for(self, paths: &HostPaths, device: &HostDevice, wanted: &[HostBdf]) -> Option<Move> {
        let host_driver = device
            .driver
            .as_deref()
            .filter(|driver| !is_vfio_driver(driver));
        let (to, driver_override) = match self {
            // A neighbour with pci-stub is harmless.
            Self::Detach | Self::Lend
                if host_driver == Some("pci-stub") && !wanted.contains(&device.bdf) =>
            {
                return None;
            }
            Self::Detach | Self::Lend if device.on_vfio() => return None,
            Self::Detach | Self::Lend => (Target::Vfio, Some(VFIO_PCI.to_owned())),
            Self::Reattach | Self::Return => {
                match (DriverRecord::of_moved(paths, device), host_driver) {
                    // Detaching was cut short, or a user bound it to another driver: only the override is
                    // ours.
                    (Some(former), Some(driver)) => {
                        (Target::Driver(driver.to_owned()), former.driver_override)
                    }
                    // A device that had no driver gets none.
                    (
                        Some(DriverRecord {
                            driver: None,
                            driver_override,
                            ..
                        }),
                        None,
                    ) if self == Self::Return => (Target::Nothing, driver_override),
                    (Some(former), None) => (
                        former.driver.map_or(Target::Natural, Target::Driver),
                        former.driver_override,
                    ),
                    (None, Some(_)) => return None,
                    (None, None) => (Target::Natural, None),
                }
            }
        };
        // An older override to vfio-pci would bind the device to vfio-pci again.
        let driver_override =
            driver_override.filter(|name| self.leaves_host() || !is_vfio_driver(name));
        Some(Move {
            device: device.clone(),
            to,
            driver_override,
        })
    }

    fn apply(self, mover: &mut Mover<'_>, moves: &[Move]) -> Result<(), BindError> {
        for (index, one) in moves.iter().enumerate() {
            let Err(source) = self.step(mover, one) else {
                continue;
            };
            // A device that hangs is left alone: another write would hang too.
            let touched = if source.is_hung() {
                &moves[..index]
            } else {
                &moves[..=index]
            };
            let mut left = mover.undo(touched);
            if self.leaves_host() {
                let restored = touched
                    .iter()
                    .map(|one| &one.device)
                    .filter(|device| !left.contains(&device.bdf));
                restored.for_each(|device| DriverRecord::forget_unless_older(mover.paths, device));
            }
            if source.is_hung() {
                left.push(one.device.bdf);
                mover.set_aside_if_hung(&one.device, &source);
            }
            return Err(BindError::Failed {
                bdf: one.device.bdf,
                left,
                source,
            });
        }
        if !self.leaves_host() {
            moves
                .iter()
                .for_each(|one| Change::Driver.forget(mover.paths, one.device.bdf));
        }
        Ok(())
    }

    fn step(self, mover: &mut Mover<'_>, one: &Move) -> Result<(), MoveError> {
        if self.leaves_host() {
            one.remember(mover.paths, self == Self::Lend)?;
        }
        mover.make(one)
    }
}

impl Plan {
    fn report(self, writes: Vec<SysfsWrite>) -> BindReport {
        let moved = self.moves.into_iter().map(|one| one.device.bdf).collect();
        BindReport {
            moved,
            unchanged: self.unchanged,
            writes,
        }
    }

    /// Keeps the devices from being leased while they move.
    fn lock(&self, paths: &HostPaths, record: &LeaseRecord) -> Result<Vec<DeviceLock>, BindError> {
        let mut locks = Vec::new();
        if self.moves.is_empty() {
            return Ok(locks);
        }
        for &HostDevice { bdf, .. } in &self.members {
            match DeviceLock::take(paths, bdf, record)? {
                Some(lock) => locks.push(lock),
                None => {
                    return Err(BindError::Unavailable(UnavailableDevice::leased(
                        bdf,
                        &holder(paths, bdf),
                    )));
                }
            }
        }
        Ok(locks)
    }
}

/// All endpoints of the IOMMU groups of the devices asked for, in the order of their addresses.
pub(crate) fn members(
    devices: &[HostDevice],
    wanted: &[HostBdf],
) -> Result<Vec<HostDevice>, BindError> {
    let mut groups = BTreeSet::new();
    for &bdf in wanted {
        let device = devices.iter().find(|device| device.bdf == bdf);
        let device = device.ok_or(InventoryError::NoSuchDevice { bdf })?;
        if device.is_bridge() {
            return Err(BindError::Unavailable(UnavailableDevice {
                bdf,
                why: Unavailable::Bridge,
            }));
        }
        let Some(group) = device.iommu_group else {
            return Err(BindError::Unavailable(UnavailableDevice {
                bdf,
                why: Unavailable::NoIommuGroup,
            }));
        };
        groups.insert(Some(group));
    }
    let members = devices
        .iter()
        .filter(|device| groups.contains(&device.iommu_group) && !device.is_bridge());
    Ok(members.cloned().collect())
}

/// Refuses to bind devices to a driver that is not there.
pub(crate) fn has_vfio_pci(paths: &HostPaths) -> Result<(), BindError> {
    match paths.sysfs.join("bus/pci/drivers").join(VFIO_PCI).exists() {
        true => Ok(()),
        false => Err(BindError::NoVfioPci),
    }
}

/// Refuses devices that the host needs, and IOMMU groups that VFIO cannot use.
fn may_leave_host(
    paths: &HostPaths,
    devices: &[HostDevice],
    plan: &Plan,
    overrides: &[HostBdf],
) -> Result<(), BindError> {
    has_vfio_pci(paths)?;
    let pool = IommuGroups::new(devices);
    for Move { device, .. } in &plan.moves {
        if let Some(sriov) = device.sriov.filter(|sriov| sriov.active > 0) {
            return Err(BindError::HasVirtualFunctions {
                bdf: device.bdf,
                count: sriov.active,
            });
        }
        let Some(group) = device.iommu_group else {
            continue;
        };
        let spoiling = pool
            .members(group)
            .iter()
            .find(|member| member.is_bridge() && !member.leaves_group_viable());
        if let Some(bridge) = spoiling {
            let driver = bridge.driver.clone().unwrap_or_default();
            return Err(BindError::HostBridge {
                group,
                bridge: bridge.bdf,
                driver,
            });
        }
    }
    let leaving: Vec<HostDevice> = plan.moves.iter().map(|one| one.device.clone()).collect();
    let mut guarded = host_uses(paths, &leaving).map_err(BindError::Guard)?;
    guarded.retain(|guarded| !overrides.contains(&guarded.bdf));
    if !guarded.is_empty() {
        return Err(BindError::Guarded(guarded));
    }
    for doubt in doubts(paths, &leaving).map_err(BindError::Guard)? {
        tracing::warn!("{doubt}");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
