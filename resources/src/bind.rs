//! Detaching devices from the host and giving them back, whole IOMMU groups at a time.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io;

use thiserror::Error;

use crate::former::Former;
use crate::guard::{Guarded, host_uses};
use crate::host::{HostBdf, HostPaths};
use crate::inventory::{HostDevice, InventoryError, is_vfio_driver, scan};
use crate::lease::{
    ALLOCATION_DEADLINE, AllocationLock, DeviceLock, LeaseError, LeaseRecord, holder,
};
use crate::moves::{Move, MoveError, Mover, Target, VFIO_PCI};
use crate::obstacle::{Blocked, Obstacle, Pool};
use crate::writer::{SysfsWrite, SysfsWriter};

/// Which devices to move.
#[derive(Clone, Copy, Debug)]
pub struct BindRequest<'a> {
    /// The devices. All endpoints of their IOMMU groups move with them.
    pub devices: &'a [HostBdf],
    /// Devices that are detached although the host uses them, each named exactly.
    pub overrides: &'a [HostBdf],
    /// Change nothing, only say what would be written.
    pub dry_run: bool,
}

/// What a move did, or in a dry run would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BindReport {
    /// Devices that changed hands.
    pub moved: Vec<HostBdf>,
    /// Devices asked for that were already where they were wanted.
    pub unchanged: Vec<HostBdf>,
    /// The writes, in order.
    pub writes: Vec<SysfsWrite>,
}

/// A move was refused, or failed and was undone.
#[derive(Debug, Error)]
pub enum BindError {
    /// The inventory cannot be read, or a device does not exist.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The locks cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A device is a bridge, is held by somebody, or is in no IOMMU group.
    #[error("{0}")]
    Blocked(Blocked),
    /// The host needs a device, or one of its IOMMU group.
    #[error(
        "the host itself needs this:{}\nnothing was changed; to take it nevertheless, give{}",
        list("\n  ", .0),
        list(" --override ", .0.iter().map(|guarded| guarded.bdf).collect::<BTreeSet<_>>())
    )]
    Guarded(Vec<Guarded>),
    /// It cannot be told whether the host needs a device.
    #[error("cannot tell whether the host needs these devices")]
    Guard(#[source] io::Error),
    /// A bridge that the host drives is in the IOMMU group.
    #[error(
        "IOMMU group {group} holds the host's bridge {bridge} ({driver}): its devices cannot be detached"
    )]
    HostBridge {
        /// The IOMMU group.
        group: u32,
        /// The bridge.
        bridge: HostBdf,
        /// Its driver.
        driver: String,
    },
    /// A physical function has virtual functions, which would vanish with its driver.
    #[error(
        "{bdf} has {count} virtual functions, which would vanish: write 0 to its sriov_numvfs first"
    )]
    HasVirtualFunctions {
        /// The physical function.
        bdf: HostBdf,
        /// How many.
        count: u16,
    },
    /// The kernel has no vfio-pci.
    #[error("the kernel has no driver vfio-pci: `modprobe vfio-pci`")]
    NoVfioPci,
    /// A device did not get where it should. It and those moved before it were put back.
    #[error("{bdf} was not moved{}", aftermath(.left))]
    Failed {
        /// The device.
        bdf: HostBdf,
        /// Devices that could not be put back where they were.
        left: Vec<HostBdf>,
        /// Why.
        #[source]
        source: MoveError,
    },
}

/// Gives devices to vfio-pci with all endpoints of their IOMMU groups: all of them, or after a failure
/// none. A device that is there already is a success. Refused for what the host itself needs.
pub fn detach(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    request: &BindRequest<'_>,
) -> Result<BindReport, BindError> {
    Direction::Detach.carry_out(paths, writer, request)
}

/// Gives devices back to the host's drivers, with all endpoints of their IOMMU groups: to the driver
/// that each had when it was detached, or if that is not known to the one that the kernel chooses.
/// Refused if somebody holds one of them.
pub fn reattach(
    paths: &HostPaths,
    writer: &dyn SysfsWriter,
    request: &BindRequest<'_>,
) -> Result<BindReport, BindError> {
    Direction::Reattach.carry_out(paths, writer, request)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Detach,
    Reattach,
}

/// What a request comes to.
#[derive(Debug, Default)]
struct Plan {
    /// Endpoints of the IOMMU groups concerned.
    members: Vec<HostDevice>,
    /// Those that must move.
    moves: Vec<Move>,
    /// Those asked for that need not.
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
        let choosing = AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)?;
        let plan = self.plan(paths, request)?;
        // The devices' own locks are enough from here on: a kernel that hangs stops nobody else.
        let _locks = plan.lock(paths, &record)?;
        drop(choosing);
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
            Self::Detach => "gantry device detach",
            Self::Reattach => "gantry device reattach",
        }
    }

    fn plan(self, paths: &HostPaths, request: &BindRequest<'_>) -> Result<Plan, BindError> {
        let devices = scan(paths)?;
        let mut plan = Plan {
            members: members(&devices, request.devices)?,
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
        let held = |device: &&HostDevice| device.lease.is_held();
        if let Some(device) = plan.members.iter().find(held) {
            return Err(BindError::Blocked(Blocked::leased(
                device.bdf,
                &device.lease,
            )));
        }
        if self == Self::Detach {
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
            // A neighbour with pci-stub is out of the way already.
            Self::Detach if host_driver == Some("pci-stub") && !wanted.contains(&device.bdf) => {
                return None;
            }
            Self::Detach if device.on_vfio() => return None,
            Self::Detach => (Target::Vfio, Some(VFIO_PCI.to_owned())),
            Self::Reattach => match (Former::load(paths, device), host_driver) {
                // Detaching was cut short, or somebody rebound it by hand: only the override is ours.
                (Some(former), Some(driver)) => {
                    (Target::Driver(driver.to_owned()), former.driver_override)
                }
                (Some(former), None) => (
                    former.driver.map_or(Target::Natural, Target::Driver),
                    former.driver_override,
                ),
                (None, Some(_)) => return None,
                (None, None) => (Target::Natural, None),
            },
        };
        // An override to vfio-pci from before would only bring the device back there.
        let driver_override =
            driver_override.filter(|name| self == Self::Detach || !is_vfio_driver(name));
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
            // What hangs is left alone: another write would hang as well.
            let touched = if source.is_hung() {
                &moves[..index]
            } else {
                &moves[..=index]
            };
            let mut left = mover.undo(touched);
            if self == Self::Detach {
                let restored = touched
                    .iter()
                    .map(|one| &one.device)
                    .filter(|device| !left.contains(&device.bdf));
                restored.for_each(|device| Former::forget_unless_older(mover.paths, device));
            }
            left.extend(source.is_hung().then_some(one.device.bdf));
            return Err(BindError::Failed {
                bdf: one.device.bdf,
                left,
                source,
            });
        }
        if self == Self::Reattach {
            moves
                .iter()
                .for_each(|one| Former::forget(mover.paths, one.device.bdf));
        }
        Ok(())
    }

    fn step(self, mover: &mut Mover<'_>, one: &Move) -> Result<(), MoveError> {
        if self == Self::Detach {
            one.remember(mover.paths)?;
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
                    return Err(BindError::Blocked(Blocked::leased(
                        bdf,
                        &holder(paths, bdf)?,
                    )));
                }
            }
        }
        Ok(locks)
    }
}

/// All endpoints of the IOMMU groups of the devices asked for, in the order of their addresses.
fn members(devices: &[HostDevice], wanted: &[HostBdf]) -> Result<Vec<HostDevice>, BindError> {
    let mut groups = BTreeSet::new();
    for &bdf in wanted {
        let device = devices.iter().find(|device| device.bdf == bdf);
        let device = device.ok_or(InventoryError::NoSuchDevice { bdf })?;
        if device.is_bridge() {
            return Err(BindError::Blocked(Blocked {
                bdf,
                obstacle: Obstacle::Bridge,
            }));
        }
        let Some(group) = device.iommu_group else {
            return Err(BindError::Blocked(Blocked {
                bdf,
                obstacle: Obstacle::NoIommuGroup,
            }));
        };
        groups.insert(Some(group));
    }
    let members = devices
        .iter()
        .filter(|device| groups.contains(&device.iommu_group) && !device.is_bridge());
    Ok(members.cloned().collect())
}

/// Whether the host can do without these devices, and VFIO do with their groups.
fn may_leave_host(
    paths: &HostPaths,
    devices: &[HostDevice],
    plan: &Plan,
    overrides: &[HostBdf],
) -> Result<(), BindError> {
    if !paths.sysfs.join("bus/pci/drivers").join(VFIO_PCI).exists() {
        return Err(BindError::NoVfioPci);
    }
    let pool = Pool::new(devices);
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
    if guarded.is_empty() {
        Ok(())
    } else {
        Err(BindError::Guarded(guarded))
    }
}

fn list(separator: &str, items: impl IntoIterator<Item = impl Display>) -> String {
    items
        .into_iter()
        .map(|item| format!("{separator}{item}"))
        .collect()
}

fn aftermath(left: &[HostBdf]) -> String {
    match left {
        [] => ": everything is as it was before".to_owned(),
        left => format!(
            ": these could not be put back where they were:{}",
            list(" ", left)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::{Request, allocate};
    use crate::fixture::{Fake, FakeHost, FakeKernel, Fault, bdf};
    use crate::inventory::DeviceState;
    use crate::lease::Holder;
    use std::fs;

    /// A GPU with its audio function behind a bridge, a disk alone, and an unbound device.
    fn host() -> FakeHost {
        FakeHost::new(&[
            Fake::nvme("00:01.0", 7)
                .class(0x06_04_00)
                .driver("pcieport"),
            Fake::nvme("01:00.0", 7).class(0x03_02_00).driver("nouveau"),
            Fake::nvme("01:00.1", 7)
                .class(0x04_03_00)
                .driver("snd_hda_intel")
                .with("driver_override", "snd_hda_intel"),
            Fake::nvme("02:00.0", 2)
                .driver("nvme")
                .with("nvme/nvme0/serial", "GN-2"),
            Fake::nvme("03:00.0", 3).unbound(),
        ])
    }

    fn request<'a>(devices: &'a [HostBdf], overrides: &'a [HostBdf]) -> BindRequest<'a> {
        BindRequest {
            devices,
            overrides,
            dry_run: false,
        }
    }

    fn texts(error: &dyn std::error::Error) -> String {
        match error.source() {
            Some(source) => format!("{error}: {}", texts(source)),
            None => error.to_string(),
        }
    }

    fn refused(result: Result<BindReport, BindError>) -> String {
        texts(&result.unwrap_err())
    }

    fn drivers(host: &FakeHost) -> Vec<Option<String>> {
        host.scan()
            .into_iter()
            .map(|device| device.driver)
            .collect()
    }

    #[test]
    fn a_group_goes_as_a_whole_and_comes_back_as_it_was() {
        let host = host();
        let before = host.bindings();
        let kernel = FakeKernel::new(&host);
        let gpu = [bdf("01:00.0")];
        let report = detach(&host.paths, &kernel, &request(&gpu, &[])).unwrap();
        assert_eq!(report.moved, [bdf("01:00.0"), bdf("01:00.1")]);
        assert_eq!(report.writes.len(), 6);
        let vfio = Some("vfio-pci".to_owned());
        let bridge = Some("pcieport".to_owned());
        assert_eq!(drivers(&host)[..3], [bridge, vfio.clone(), vfio]);
        assert_eq!(host.read("01:00.1").state(), DeviceState::Detached);
        let again = detach(&host.paths, &kernel, &request(&gpu, &[])).unwrap();
        assert_eq!(
            (again.moved.len(), again.unchanged, again.writes.len()),
            (0, gpu.to_vec(), 0)
        );
        let report = reattach(&host.paths, &kernel, &request(&[bdf("01:00.1")], &[])).unwrap();
        assert_eq!(report.moved, [bdf("01:00.0"), bdf("01:00.1")]);
        assert_eq!(host.bindings(), before);
        assert!(
            fs::read_dir(host.paths.run.join("former"))
                .unwrap()
                .next()
                .is_none()
        );
        assert!(host.scan().iter().all(|device| !device.lease.is_held()));
    }

    #[test]
    fn no_id_is_ever_given_to_a_driver() {
        let host = host();
        let kernel = FakeKernel::new(&host);
        let all = [bdf("01:00.0"), bdf("02:00.0"), bdf("03:00.0")];
        detach(&host.paths, &kernel, &request(&all, &[])).unwrap();
        reattach(&host.paths, &kernel, &request(&all, &[])).unwrap();
        let written = kernel.written.borrow();
        let files: BTreeSet<&str> = written
            .iter()
            .filter_map(|(path, _)| path.file_name()?.to_str())
            .collect();
        assert_eq!(
            files,
            BTreeSet::from(["driver_override", "drivers_probe", "unbind"])
        );
    }

    #[test]
    fn a_fault_at_any_write_leaves_everything_as_it_was() {
        let all = [bdf("01:00.0"), bdf("02:00.0"), bdf("03:00.0")];
        for fault in [Fault::Refuses, Fault::Ignores] {
            for at in 0.. {
                let host = host();
                let before = host.bindings();
                let kernel = FakeKernel::new(&host).with_fault(at, fault);
                let result = detach(&host.paths, &kernel, &request(&all, &[]));
                if kernel.written.borrow().len() <= at {
                    assert!(result.is_ok() && at == 11, "{at}: {result:?}");
                    break;
                }
                let Err(BindError::Failed { left, .. }) = &result else {
                    // An override that was not taken is harmless where the kernel chooses vfio-pci anyway.
                    panic!("{fault:?} at {at}: {result:?}");
                };
                assert!(left.is_empty(), "{fault:?} at {at}: {result:?}");
                assert_eq!(host.bindings(), before, "{fault:?} at {at}");
                assert!(
                    fs::read_dir(host.paths.run.join("former"))
                        .unwrap()
                        .next()
                        .is_none()
                );
                assert!(refused(result).contains("everything is as it was before"));
            }
        }
    }

    #[test]
    fn a_fault_on_the_way_back_leaves_the_devices_detached() {
        let all = [bdf("01:00.0"), bdf("02:00.0")];
        for at in 0.. {
            let host = host();
            let claims = FakeKernel::new(&host).claims;
            detach(&host.paths, &FakeKernel::new(&host), &request(&all, &[])).unwrap();
            let detached = host.bindings();
            let mut kernel = FakeKernel::new(&host).with_fault(at, Fault::Refuses);
            kernel.claims = claims;
            let result = reattach(&host.paths, &kernel, &request(&all, &[]));
            if kernel.written.borrow().len() <= at {
                assert!(result.is_ok() && at == 11, "{at}: {result:?}");
                break;
            }
            assert!(
                matches!(&result, Err(BindError::Failed { left, .. }) if left.is_empty()),
                "{at}: {result:?}"
            );
            assert_eq!(host.bindings(), detached, "{at}");
            kernel.fault = None;
            reattach(&host.paths, &kernel, &request(&all, &[])).unwrap();
            assert_eq!(
                drivers(&host)[1..4],
                ["nouveau", "snd_hda_intel", "nvme"].map(|name| Some(name.to_owned()))
            );
        }
    }

    #[test]
    fn a_device_that_hangs_is_named_and_left_alone() {
        let all = [bdf("01:00.0"), bdf("02:00.0")];
        for at in 0..9 {
            let host = host();
            let before = host.bindings();
            let kernel = FakeKernel::new(&host).with_fault(at, Fault::Hangs);
            let error = detach(&host.paths, &kernel, &request(&all, &[])).unwrap_err();
            let BindError::Failed {
                bdf: hung, left, ..
            } = &error
            else {
                panic!("{error}")
            };
            assert_eq!(left, &[*hung]);
            assert!(
                texts(&error).contains("the device hangs"),
                "{}",
                texts(&error)
            );
            let mut after = host.bindings();
            after.insert(*hung, before[hung].clone());
            assert_eq!(after, before, "the others are back");
            assert!(!host.read(&hung.to_string()).lease.is_held());
        }
    }

    #[test]
    fn a_dry_run_says_every_write_and_makes_none() {
        let host = host();
        let before = host.bindings();
        let kernel = FakeKernel::new(&host);
        let gpu = [bdf("01:00.0")];
        let planned = detach(
            &host.paths,
            &kernel,
            &BindRequest {
                dry_run: true,
                ..request(&gpu, &[])
            },
        )
        .unwrap();
        assert!(kernel.written.borrow().is_empty() && !host.paths.run.exists());
        assert_eq!(host.bindings(), before);
        let done = detach(&host.paths, &kernel, &request(&gpu, &[])).unwrap();
        assert_eq!(planned, done);
        let planned = reattach(
            &host.paths,
            &kernel,
            &BindRequest {
                dry_run: true,
                ..request(&gpu, &[])
            },
        )
        .unwrap();
        assert_eq!(
            planned,
            reattach(&host.paths, &kernel, &request(&gpu, &[])).unwrap()
        );
    }

    #[test]
    fn a_leased_device_stays_with_its_vm() {
        let host = host();
        let kernel = FakeKernel::new(&host);
        detach(&host.paths, &kernel, &request(&[bdf("01:00.0")], &[])).unwrap();
        let gpu = Request::Device {
            bdf: bdf("01:00.0"),
            allow_ungrouped: true,
        };
        let leases = allocate(
            &host.paths,
            &[gpu],
            &Holder {
                vm: "a".to_owned(),
                pid: 123,
            },
        )
        .unwrap();
        let sound = [bdf("01:00.1")];
        for dry_run in [true, false] {
            let request = BindRequest {
                dry_run,
                ..request(&sound, &[])
            };
            let error = refused(reattach(&host.paths, &kernel, &request));
            assert!(error.contains("is held by VM 'a' (pid 123)"), "{error}");
        }
        assert_eq!(
            detach(&host.paths, &kernel, &request(&[bdf("01:00.0")], &[]))
                .unwrap()
                .moved,
            []
        );
        drop(leases);
        reattach(&host.paths, &kernel, &request(&[bdf("01:00.1")], &[])).unwrap();
    }

    #[test]
    fn devices_cannot_be_leased_while_they_move() {
        struct Spy<'a>(FakeKernel<'a>, &'a FakeHost);
        impl SysfsWriter for Spy<'_> {
            fn write(
                &self,
                path: &std::path::Path,
                value: &str,
            ) -> Result<(), crate::writer::WriteError> {
                for address in ["01:00.0", "01:00.1"] {
                    let lease = self.1.read(address).lease;
                    assert_eq!(lease.record().unwrap().name, "gantry device detach");
                }
                let other = Request::Device {
                    bdf: bdf("02:00.0"),
                    allow_ungrouped: true,
                };
                let error = allocate(
                    &self.1.paths,
                    &[other],
                    &Holder {
                        vm: "b".to_owned(),
                        pid: 1,
                    },
                )
                .unwrap_err();
                assert!(
                    error.to_string().contains("bound to nvme"),
                    "others are not held up: {error}"
                );
                self.0.write(path, value)
            }
        }
        let host = host();
        let spy = Spy(FakeKernel::new(&host), &host);
        detach(&host.paths, &spy, &request(&[bdf("01:00.0")], &[])).unwrap();
    }

    #[test]
    fn what_cannot_be_detached_is_said() {
        let host = FakeHost::new(&[
            Fake::nvme("00:01.0", 7)
                .class(0x06_04_00)
                .driver("pcieport"),
            Fake::nvme("00:1f.0", 8).class(0x06_01_00).driver("lpc_ich"),
            Fake::nvme("00:1f.3", 8)
                .class(0x04_03_00)
                .driver("snd_hda_intel"),
            Fake::nvme("01:00.0", 1).no_group().driver("nvme"),
            Fake::nvme("02:00.0", 2)
                .driver("igb")
                .with("sriov_totalvfs", "7")
                .with("sriov_numvfs", "2"),
        ]);
        let kernel = FakeKernel::new(&host);
        for (address, said) in [
            ("00:01.0", "0000:00:01.0 is a bridge"),
            (
                "00:1f.3",
                "IOMMU group 8 holds the host's bridge 0000:00:1f.0 (lpc_ich)",
            ),
            ("01:00.0", "0000:01:00.0 is in no IOMMU group"),
            ("02:00.0", "0000:02:00.0 has 2 virtual functions"),
            ("09:00.0", "no PCI device 0000:09:00.0"),
        ] {
            let error = refused(detach(&host.paths, &kernel, &request(&[bdf(address)], &[])));
            assert!(error.contains(said), "{error}");
        }
        let host = self::host();
        fs::remove_dir_all(host.paths.sysfs.join("bus/pci/drivers/vfio-pci")).unwrap();
        let error = refused(detach(
            &host.paths,
            &FakeKernel::new(&host),
            &request(&[bdf("02:00.0")], &[]),
        ));
        assert!(error.contains("`modprobe vfio-pci`"), "{error}");
        assert!(kernel.written.borrow().is_empty());
    }

    #[test]
    fn what_the_host_needs_goes_only_when_it_is_named() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 7)
                .class(0x03_00_00)
                .driver("nouveau")
                .with("boot_vga", "1"),
            Fake::nvme("01:00.1", 7)
                .class(0x04_03_00)
                .driver("snd_hda_intel"),
        ]);
        let kernel = FakeKernel::new(&host);
        let (display, sound) = (bdf("01:00.0"), bdf("01:00.1"));
        for overrides in [vec![], vec![sound]] {
            let error = refused(detach(&host.paths, &kernel, &request(&[sound], &overrides)));
            assert_eq!(
                error,
                "the host itself needs this:\n  0000:01:00.0 is the display that the firmware started (boot_vga)\n\
                 nothing was changed; to take it nevertheless, give --override 0000:01:00.0"
            );
        }
        assert!(kernel.written.borrow().is_empty());
        assert_eq!(
            detach(&host.paths, &kernel, &request(&[sound], &[display]))
                .unwrap()
                .moved,
            [display, sound]
        );
    }

    #[test]
    fn without_a_record_the_kernel_chooses() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 1).with("driver_override", "vfio-pci"),
            Fake::nvme("02:00.0", 2),
            Fake::nvme("03:00.0", 3).with("driver_override", "vfio-pci"),
        ]);
        let mut kernel = FakeKernel::new(&host);
        kernel.claims = [
            (bdf("01:00.0"), "nvme".to_owned()),
            (bdf("02:00.0"), "vfio-pci".to_owned()),
        ]
        .into();
        fs::create_dir_all(host.paths.sysfs.join("bus/pci/drivers/nvme")).unwrap();
        reattach(
            &host.paths,
            &kernel,
            &request(&[bdf("01:00.0"), bdf("03:00.0")], &[]),
        )
        .unwrap();
        assert_eq!(host.read("01:00.0").driver.as_deref(), Some("nvme"));
        assert_eq!(host.read("01:00.0").driver_override, None);
        assert_eq!(
            host.read("03:00.0").driver,
            None,
            "no driver of the host wants it"
        );
        let error = refused(reattach(
            &host.paths,
            &kernel,
            &request(&[bdf("02:00.0")], &[]),
        ));
        assert!(
            error.contains("its driver is vfio-pci afterwards") && error.contains("vfio-pci.ids"),
            "{error}"
        );
    }

    #[test]
    fn a_serial_number_is_remembered_while_its_driver_is_away() {
        let host = host();
        let kernel = FakeKernel::new(&host);
        detach(&host.paths, &kernel, &request(&[bdf("02:00.0")], &[])).unwrap();
        fs::remove_dir_all(host.dir(bdf("02:00.0")).join("nvme")).unwrap();
        assert_eq!(host.read("02:00.0").serial.as_deref(), Some("GN-2"));
        fs::write(host.dir(bdf("02:00.0")).join("driver_override"), "(null)\n").unwrap();
        assert_eq!(
            host.read("02:00.0").serial,
            None,
            "another device may have been put in"
        );
    }

    #[test]
    fn nothing_is_touched_when_the_former_driver_cannot_be_kept() {
        let host = host();
        let kernel = FakeKernel::new(&host);
        host.file("run/former", "a file, not a directory");
        let error = refused(detach(
            &host.paths,
            &kernel,
            &request(&[bdf("02:00.0")], &[]),
        ));
        assert!(
            error.contains("cannot keep its former driver in") && error.contains("run/former"),
            "{error}"
        );
        assert!(kernel.written.borrow().is_empty());
    }

    #[test]
    fn a_neighbour_with_pci_stub_is_out_of_the_way() {
        let host = FakeHost::new(&[
            Fake::nvme("01:00.0", 7).driver("nvme"),
            Fake::nvme("01:00.1", 7).driver("pci-stub"),
        ]);
        let report = detach(
            &host.paths,
            &FakeKernel::new(&host),
            &request(&[bdf("01:00.0")], &[]),
        )
        .unwrap();
        assert_eq!(report.moved, [bdf("01:00.0")]);
        let disk = Request::Device {
            bdf: bdf("01:00.0"),
            allow_ungrouped: true,
        };
        allocate(
            &host.paths,
            &[disk],
            &Holder {
                vm: "a".to_owned(),
                pid: 1,
            },
        )
        .unwrap();
    }

    #[test]
    fn a_death_at_any_write_can_be_made_good() {
        let all = [bdf("01:00.0"), bdf("02:00.0"), bdf("03:00.0")];
        for detach_again in [false, true] {
            for at in 0..11 {
                let host = host();
                let before = host.bindings();
                let mut kernel = FakeKernel::new(&host).with_fault(at, Fault::Dead);
                detach(&host.paths, &kernel, &request(&all, &[])).unwrap_err();
                kernel.fault = None;
                if detach_again {
                    detach(&host.paths, &kernel, &request(&all, &[])).unwrap();
                    assert!(all.iter().all(|bdf| host.read(&bdf.to_string()).on_vfio()));
                }
                reattach(&host.paths, &kernel, &request(&all, &[])).unwrap();
                assert_eq!(host.bindings(), before, "{at}, again: {detach_again}");
            }
        }
    }
}
