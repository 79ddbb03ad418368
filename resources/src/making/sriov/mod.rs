//! Virtual functions of a group: created and set when it is activated, destroyed when it is deactivated. Their
//! number never changes while one is in use.
//!
//! In the kernel, `sriov_numvfs` creates and destroys all functions of a physical function at once
//! (Documentation/PCI/pci-iov-howto.rst), `sriov_drivers_autoprobe` keeps host drivers from them, and the driver of
//! the physical function takes their settings through rtnetlink.

mod activation;
pub(crate) mod autoprobe;
mod error;
pub(crate) mod granted;
mod links;
mod netlink;
mod pf;
pub(crate) mod token;
pub(crate) mod vf_restore;

use std::fmt::Display;
use std::time::{Duration, Instant};

use nix::libc;

use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::holding::device_lock::DeviceLock;
use crate::holding::lock_file::holder;
use crate::holding::passing::under_lock;
use crate::holding::quarantine::{Until, hung, quarantine};
use crate::holding::record::{LeaseKind, LeaseRecord};
use crate::holding::restore::Change;
use crate::inventory::device::HostDevice;
use crate::inventory::driver_record::DriverRecord;
use crate::inventory::modules::NoDriver;
use crate::inventory::unavailable::{Unavailable, UnavailableDevice};
use crate::moving::writer::{SysfsWrite, SysfsWriter, WriteError};
use crate::pools::group::{Bind, ResourceGroup};
use crate::pools::sriov::SriovSpec;
use crate::pools::tenant::Tenants;
use activation::Activation;
pub use error::SriovError;
#[cfg(test)]
pub(crate) use links::LinkError;
pub(crate) use links::{Interface, LinkWrite, VfLinks};
pub use netlink::Netlink;
pub(crate) use pf::{Pf, VfInUse};
use serde::Serialize;

/// How long a VM waits for another command that creates the functions it asks for.
const OTHERS_PATIENCE: Duration = Duration::from_secs(60);

/// What changes the host: writes to sysfs, and to network interfaces.
#[derive(Clone, Copy)]
pub struct HostAccess<'a> {
    /// Writes sysfs.
    pub writer: &'a dyn SysfsWriter,
    /// Reads and changes interfaces.
    pub links: &'a dyn VfLinks,
}

/// One write to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum HostWrite {
    /// To sysfs.
    Sysfs(SysfsWrite),
    /// To an interface.
    Link(LinkWrite),
}

impl Display for HostWrite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sysfs(SysfsWrite { path, value }) => {
                write!(f, "write {value:?} to {}", path.display())
            }
            Self::Link(write) => write.fmt(f),
        }
    }
}

/// The result of activating or deactivating a group, or of a dry run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SriovReport {
    /// The group.
    pub group: String,
    /// The physical function.
    pub pf: HostBdf,
    /// Its network interface.
    pub interface: Option<Interface>,
    /// How many functions there were.
    pub before: u16,
    /// How many there are.
    pub after: u16,
    /// The functions, by their numbers.
    pub functions: Vec<HostBdf>,
    /// Functions in use, whose settings and drivers were left as they are.
    pub left: Vec<VfInUse>,
    /// The writes, in order.
    pub writes: Vec<HostWrite>,
}

/// Creates a group's virtual functions, where their number differs, gives them their settings, and binds them to
/// vfio-pci unless VMs take them on demand. All of it or nothing. Functions in use are left unchanged; while there
/// are any, the number cannot change.
pub fn activate(
    paths: &HostPaths,
    host: HostAccess<'_>,
    group: &ResourceGroup,
    dry_run: bool,
) -> Result<SriovReport, SriovError> {
    let spec = spec(group)?;
    let record = LeaseRecord::task("gantry group activate");
    let look = || {
        let pf = Pf::read(paths, spec.pf)?;
        may_activate(paths, &pf, spec)?;
        check_not_hung(paths, &pf.device)?;
        let live = live(paths, &pf, &record)?;
        may_resize(&pf, spec.count, &live)?;
        let locks = lock(paths, &pf, spec.count, &live, &record, dry_run)?;
        let former = former(paths, &pf)?;
        Ok((pf, former, live, locks))
    };
    // From here on the devices' own locks are enough: a write that hangs delays no other command.
    let (pf, former, live, locks) = match dry_run {
        false => under_lock(paths, &record, SriovError::in_the_way, look)?,
        true => look()?,
    };
    let work = Activation {
        paths,
        host,
        group,
        spec,
        had_link: pf.has_link(),
        pf,
        former,
        live,
        resized: false,
        writes: Vec::new(),
        dry_run,
        locks,
    };
    work.carry_out()
}

/// Destroys a group's virtual functions. Refused while one is in use.
pub fn deactivate(
    paths: &HostPaths,
    host: HostAccess<'_>,
    group: &ResourceGroup,
    dry_run: bool,
) -> Result<SriovReport, SriovError> {
    let spec = spec(group)?;
    let record = LeaseRecord::task("gantry group deactivate");
    let (pf, _locks) = under_lock(paths, &record, SriovError::in_the_way, || {
        let pf = Pf::read(paths, spec.pf)?;
        spec.check_hardware(&pf.device)?;
        check_not_hung(paths, &pf.device)?;
        let live = live(paths, &pf, &record)?;
        may_resize(&pf, 0, &live)?;
        let locks = match pf.vfs.is_empty() {
            false => lock(paths, &pf, 0, &[], &record, dry_run)?,
            true => Vec::new(),
        };
        Ok::<_, SriovError>((pf, locks))
    })?;
    let mut report = report(group, &pf, 0);
    if pf.vfs.is_empty() {
        return Ok(report);
    }
    let none = SysfsWrite {
        path: pf.attribute("sriov_numvfs"),
        value: "0".to_owned(),
    };
    if !dry_run {
        if let Err(error) = host.writer.write(&none.path, &none.value) {
            let error = refused(&pf, error);
            set_aside_if_hung(paths, &pf, &error);
            return Err(error);
        }
        found(paths, &pf, 0)?;
        pf.vfs.iter().for_each(|bdf| forget(paths, *bdf));
    }
    report.writes.push(HostWrite::Sysfs(none));
    Ok(report)
}

/// Activates a group that a VM asks for, if it has no functions yet. Waits for another command that does.
pub(crate) fn activate_for_vm(
    paths: &HostPaths,
    host: HostAccess<'_>,
    group: &ResourceGroup,
) -> Result<(), SriovError> {
    let Some(spec) = group.sriov.as_ref().filter(|_| group.bind == Bind::Demand) else {
        return Ok(());
    };
    let deadline = Instant::now() + OTHERS_PATIENCE;
    loop {
        if !is_task(paths, spec.pf) {
            return match Pf::read(paths, spec.pf)?.vfs.as_slice() {
                [] => match activate(paths, host, group, false) {
                    // Another command was faster.
                    Err(SriovError::Busy(_)) if is_task(paths, spec.pf) => continue,
                    result => result.map(drop),
                },
                _ => Ok(()),
            };
        }
        if Instant::now() >= deadline {
            let lease = holder(paths, spec.pf);
            return Err(SriovError::Busy(UnavailableDevice::leased(spec.pf, &lease)));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a command works on a device, which does not take long.
fn is_task(paths: &HostPaths, bdf: HostBdf) -> bool {
    let lease = holder(paths, bdf);
    let record = lease.record();
    record.is_some_and(|record| record.kind == LeaseKind::Task)
}

fn spec(group: &ResourceGroup) -> Result<&SriovSpec, SriovError> {
    let none = || SriovError::NoSpec(group.name.clone());
    group.sriov.as_ref().ok_or_else(none)
}

/// The functions in use, and all functions of tenants.
fn live(paths: &HostPaths, pf: &Pf, own: &LeaseRecord) -> Result<Vec<VfInUse>, SriovError> {
    let mut live = pf::live(paths, &pf.vfs, own)?;
    let tenants = Tenants::load(paths)?;
    for &bdf in &pf.vfs {
        let known = live.iter().any(|one| one.bdf == bdf);
        if let Some(tenant) = tenants.owner_of(bdf).filter(|_| !known) {
            let why = format!("belongs to tenant \"{}\"", tenant.name);
            let lease = None;
            live.push(VfInUse { bdf, why, lease });
        }
    }
    Ok(live)
}

/// The functions of a physical function as they are, with their records.
fn former(
    paths: &HostPaths,
    pf: &Pf,
) -> Result<Vec<(HostDevice, Option<DriverRecord>)>, SriovError> {
    let one = |bdf: &HostBdf| {
        let device = HostDevice::read(paths, *bdf)?;
        let former = DriverRecord::of_moved(paths, &device);
        Ok((device, former))
    };
    pf.vfs.iter().map(one).collect()
}

/// Refuses a device for which a write has not returned: another write would hang as well.
fn check_not_hung(paths: &HostPaths, device: &HostDevice) -> Result<(), SriovError> {
    match hung(paths, device.bdf, device.id) {
        Some(why) => Err(SriovError::Busy(UnavailableDevice {
            bdf: device.bdf,
            why: Unavailable::Quarantined { why },
        })),
        None => Ok(()),
    }
}

fn check_functions_not_hung(paths: &HostPaths, pf: &Pf) -> Result<(), SriovError> {
    pf.vfs.iter().try_for_each(|bdf| {
        let function = HostDevice::read(paths, *bdf)?;
        check_not_hung(paths, &function)
    })
}

fn may_activate(paths: &HostPaths, pf: &Pf, spec: &SriovSpec) -> Result<(), SriovError> {
    spec.check_capacity(&pf.device)?;
    let bdf = spec.pf;
    if pf.device.driver.is_none() {
        let why = NoDriver::of(paths, &pf.device);
        return Err(SriovError::NoDriver { pf: bdf, why });
    }
    if pf.vfs.len() != usize::from(spec.count) {
        makes_functions(paths, pf)?;
    }
    let wanted = spec.wanted(0);
    match wanted.settings(&wanted).first() {
        Some(setting) if pf.interface.is_none() => Err(SriovError::NoInterface {
            pf: bdf,
            key: setting.key(),
        }),
        _ => Ok(()),
    }
}

/// Drivers that keep a device for programs or for nobody, and create no virtual functions.
const KEEPERS: [&str; 3] = ["pci-stub", "uio_pci_generic", "pciback"];

/// Refuses a driver that cannot create virtual functions. vfio-pci can where that is switched on.
fn makes_functions(paths: &HostPaths, pf: &Pf) -> Result<(), SriovError> {
    let driver = pf.device.driver.as_deref().unwrap_or_default();
    let switch = paths.sysfs.join("module/vfio_pci/parameters/enable_sriov");
    let switched_on = || sysfs::text(&switch).ok().flatten().as_deref() == Some("Y");
    if KEEPERS.contains(&driver) || pf.device.on_vfio() && !switched_on() {
        return Err(SriovError::of_driver(pf));
    }
    Ok(())
}

/// Why the kernel refused another number of functions.
fn refused(pf: &Pf, error: WriteError) -> SriovError {
    match &error {
        // The driver cannot do it (sriov_numvfs_store of the kernel's drivers/pci/iov.c), or vfio-pci may not.
        WriteError::Refused { source, .. } if source.raw_os_error() == Some(libc::ENOENT) => {
            SriovError::of_driver(pf)
        }
        _ => error.into(),
    }
}

fn may_resize(pf: &Pf, wanted: u16, live: &[VfInUse]) -> Result<(), SriovError> {
    if pf.vfs.len() == usize::from(wanted) || live.is_empty() {
        return Ok(());
    }
    Err(SriovError::Live {
        pf: pf.device.bdf,
        now: count(pf),
        wanted,
        live: live.to_vec(),
    })
}

fn count(pf: &Pf) -> u16 {
    u16::try_from(pf.vfs.len()).unwrap_or(u16::MAX)
}

fn report(group: &ResourceGroup, pf: &Pf, after: u16) -> SriovReport {
    SriovReport {
        group: group.name.clone(),
        pf: pf.device.bdf,
        interface: pf.interface.clone(),
        before: count(pf),
        after,
        functions: (0..after).filter_map(|index| pf.address(index)).collect(),
        left: Vec::new(),
        writes: Vec::new(),
    }
}

/// Locks the physical function, its functions except those in use, and the addresses of those to be created. A dry
/// run locks none, and is refused where one is held.
fn lock(
    paths: &HostPaths,
    pf: &Pf,
    wanted: u16,
    live: &[VfInUse],
    record: &LeaseRecord,
    dry_run: bool,
) -> Result<Vec<DeviceLock>, SriovError> {
    let functions = (0..wanted.max(count(pf))).filter_map(|index| pf.address(index));
    let mut locks = Vec::new();
    for bdf in [pf.device.bdf].into_iter().chain(functions) {
        if live.iter().any(|one| one.bdf == bdf) {
            continue;
        }
        if !dry_run && let Some(lock) = DeviceLock::take(paths, bdf, record)? {
            locks.push(lock);
            continue;
        }
        let lease = holder(paths, bdf);
        if !dry_run || lease.is_held() {
            return Err(SriovError::Busy(UnavailableDevice::leased(bdf, &lease)));
        }
    }
    Ok(locks)
}

/// Checks that the number of functions is the one wanted.
fn found(paths: &HostPaths, pf: &Pf, wanted: u16) -> Result<Pf, SriovError> {
    let now = Pf::read(paths, pf.device.bdf)?;
    if now.vfs.len() == usize::from(wanted) {
        return Ok(now);
    }
    Err(SriovError::Short {
        pf: pf.device.bdf,
        found: now.vfs.len(),
        wanted,
    })
}

/// Puts a device into quarantine if a write to it hangs.
fn set_aside_if_hung(paths: &HostPaths, pf: &Pf, why: &SriovError) {
    if why.is_hung() {
        set_aside(paths, &pf.device, why);
    }
}

fn set_aside(paths: &HostPaths, device: &HostDevice, why: &SriovError) {
    let reason = format!("it hung: {why}");
    if let Err(error) = quarantine(paths, device.bdf, device.id, &reason, Until::Boot) {
        tracing::error!("{} cannot be put into quarantine: {error}", device.bdf);
    }
}

/// Removes the records of a function that is gone.
fn forget(paths: &HostPaths, bdf: HostBdf) {
    for change in [Change::Driver, Change::VfSettings, Change::Granted] {
        change.forget(paths, bdf);
    }
}

#[cfg(test)]
mod tests;
