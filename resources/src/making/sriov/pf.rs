//! A physical function in sysfs: its interface, its virtual functions, and their users.

use std::io;
use std::path::{Path, PathBuf};

use super::links::Interface;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::facts::open_files::{User, is_open, users};
use crate::facts::process::is_ending;
use crate::holding::record::{LeaseRecord, LeaseStatus};
use crate::inventory::device::HostDevice;
use crate::inventory::error::InventoryError;
use crate::inventory::guard::host_uses;

/// `IFF_UP` of netdevice(7).
const IFF_UP: u32 = 1;

/// A physical function, as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Pf {
    pub(crate) device: HostDevice,
    /// None if it is no network card, or has no network driver.
    pub(crate) interface: Option<Interface>,
    /// Its virtual functions, by their numbers from 0.
    pub(crate) vfs: Vec<HostBdf>,
    /// Whether the kernel binds new functions to host drivers; none where that is unknown.
    pub(crate) autoprobe: Option<bool>,
    layout: Option<(u16, u16)>,
    dir: PathBuf,
}

impl Pf {
    pub(crate) fn read(paths: &HostPaths, bdf: HostBdf) -> Result<Self, InventoryError> {
        let device = HostDevice::read(paths, bdf)?;
        let dir = paths.pci_device(bdf);
        Self::of(device, &dir).map_err(|source| InventoryError::Sysfs { path: dir, source })
    }

    fn of(device: HostDevice, dir: &Path) -> io::Result<Self> {
        let mut vfs = Vec::new();
        while let Some(name) = sysfs::link_name(&dir.join(format!("virtfn{}", vfs.len())))? {
            match name.parse() {
                Ok(bdf) => vfs.push(bdf),
                Err(_) => break,
            }
        }
        let autoprobe = sysfs::decimal::<u8>(&dir.join("sriov_drivers_autoprobe"))?;
        let offset = sysfs::decimal(&dir.join("sriov_offset"))?;
        let stride = sysfs::decimal(&dir.join("sriov_stride"))?;
        Ok(Self {
            device,
            interface: interface(dir)?,
            vfs,
            autoprobe: autoprobe.map(|value| value != 0),
            layout: offset.zip(stride),
            dir: dir.to_owned(),
        })
    }

    /// An attribute's path.
    pub(crate) fn attribute(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Whether its interface has a link; one that is down has none.
    pub(crate) fn has_link(&self) -> bool {
        let name = self.interface.as_ref().map(|interface| &interface.name);
        let carrier = name.map(|name| self.dir.join("net").join(name).join("carrier"));
        let text = carrier.map(|carrier| sysfs::text(&carrier).unwrap_or_default());
        text.flatten().as_deref() == Some("1")
    }

    /// The address of a function that exists or will (PCIe 9.2.1.2); none if that is unknown.
    pub(crate) fn address(&self, index: u16) -> Option<HostBdf> {
        if let Some(bdf) = self.vfs.get(usize::from(index)) {
            return Some(*bdf);
        }
        let (offset, stride) = self.layout?;
        let pf = self.device.bdf;
        let own = u16::from(pf.bus()) << 8 | u16::from(pf.device()) << 3 | u16::from(pf.function());
        let routing = stride
            .checked_mul(index)?
            .checked_add(offset)?
            .checked_add(own)?;
        let [bus, rest] = routing.to_be_bytes();
        HostBdf::new(pf.domain(), bus, rest >> 3, rest & 7)
    }
}

/// The interface below a function, except those that represent its virtual functions (switchdev).
fn interface(dir: &Path) -> io::Result<Option<Interface>> {
    for name in sysfs::entries(&dir.join("net"))? {
        let of = dir.join("net").join(&name);
        // Interfaces without a port name return an error for it.
        let port = sysfs::text(&of.join("phys_port_name")).unwrap_or_default();
        if port.is_some_and(|port| port.contains("vf")) {
            continue;
        }
        if let Some(index) = sysfs::decimal(&of.join("ifindex"))? {
            return Ok(Some(Interface { name, index }));
        }
    }
    Ok(None)
}

/// A virtual function that must stay unchanged, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct VfInUse {
    /// The function.
    pub bdf: HostBdf,
    /// Its use, in words.
    pub why: String,
    /// The lease, if that is the reason; without a record where a killed process has released its lock, but not
    /// yet the device.
    #[serde(skip)]
    pub lease: Option<LeaseStatus>,
}

/// The functions that a VM, the host or another program uses. The holder `own` is this process.
pub(crate) fn live(
    paths: &HostPaths,
    vfs: &[HostBdf],
    own: &LeaseRecord,
) -> Result<Vec<VfInUse>, InventoryError> {
    let mut live = Vec::new();
    let mut idle = Vec::new();
    for &bdf in vfs {
        let device = match HostDevice::read(paths, bdf) {
            Ok(device) => device,
            Err(InventoryError::NoSuchDevice { .. }) => continue,
            Err(error) => return Err(error),
        };
        let used = used(paths, &device, own).map_err(|source| InventoryError::Sysfs {
            path: paths.pci_device(bdf),
            source,
        })?;
        match used {
            Some((why, lease)) => live.push(VfInUse { bdf, why, lease }),
            None if device.on_vfio() => {}
            None => idle.push(device),
        }
    }
    // Read at once for all of them: the host's uses are read for the whole host.
    let uses = match idle.as_slice() {
        [] => Vec::new(),
        idle => host_uses(paths, idle).map_err(|source| InventoryError::Sysfs {
            path: paths.sysfs.clone(),
            source,
        })?,
    };
    for one in uses {
        if !live.iter().any(|known| known.bdf == one.bdf) {
            let (bdf, why, lease) = (one.bdf, one.to_string(), None);
            live.push(VfInUse { bdf, why, lease });
        }
    }
    live.sort_by_key(|one| vfs.iter().position(|vf| *vf == one.bdf));
    Ok(live)
}

/// A use of a function, in words, and the lease that is the reason.
type Use = (String, Option<LeaseStatus>);

/// The use of the function itself.
fn used(paths: &HostPaths, device: &HostDevice, own: &LeaseRecord) -> io::Result<Option<Use>> {
    if let Some(why) = crate::holding::quarantine::hung(paths, device.bdf, device.id) {
        return Ok(Some((format!("in quarantine: {why}"), None)));
    }
    let foreign = device.lease.is_held() && device.lease.record() != Some(own);
    if foreign {
        let who = device.lease.record();
        let who = who.map_or_else(|| "an unknown process".to_owned(), ToString::to_string);
        return Ok(Some((format!("held by {who}"), Some(device.lease.clone()))));
    }
    if device.on_vfio() {
        let group = device.iommu_group.map(|group| paths.vfio_group(group));
        let open = group.filter(|node| is_open(node));
        return Ok(open.map(|node| in_use(paths, device, &node)));
    }
    let net = paths.pci_device(device.bdf).join("net");
    for name in sysfs::entries(&net)? {
        let flags = sysfs::text(&net.join(&name).join("flags"))?;
        let flags = flags.and_then(|text| {
            u32::from_str_radix(text.strip_prefix("0x").unwrap_or(&text), 16).ok()
        });
        if flags.is_some_and(|flags| flags & IFF_UP != 0) {
            return Ok(Some((format!("the host's {name}, which is up"), None)));
        }
    }
    Ok(None)
}

/// The kernel frees the locks of a process that was killed before it closes its devices.
fn in_use(paths: &HostPaths, device: &HostDevice, node: &Path) -> Use {
    let users = users(&paths.proc, &paths.pci_device(device.bdf).join("driver"));
    let stays = |user: &&User| is_ending(&paths.proc, user.pid) == Some(false);
    let who = users.iter().find(stays);
    let words = who.or(users.first()).map(User::to_string);
    let words = words.unwrap_or_else(|| "another program".to_owned());
    let lease = who.is_none().then_some(LeaseStatus::Unrecorded);
    (format!("{words} has {} open", node.display()), lease)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fake, FakeHost, bdf};
    use std::fs;

    #[test]
    fn who_has_a_function_open_is_waited_for_only_if_it_may_be_ending() {
        let host = FakeHost::new(&[Fake::nvme("03:10.0", 14)]);
        let device = host.read("03:10.0");
        let node = Path::new("/dev/vfio/14");
        let said = || in_use(&host.paths, &device, node);
        let passing = Some(LeaseStatus::Unrecorded);
        let open = "has /dev/vfio/14 open";
        assert_eq!(said(), (format!("another program {open}"), passing.clone()));
        for (pid, flags) in [(7, 4), (8, 0)] {
            host.file(&format!("proc/{pid}/comm"), "vmm\n");
            host.file(
                &format!("proc/{pid}/stat"),
                &format!("{pid} (vmm) R 1 {pid} {pid} 0 -1 {flags} 0\n"),
            );
            let fd = host.paths.proc.join(pid.to_string()).join("fd");
            fs::create_dir(&fd).unwrap();
            std::os::unix::fs::symlink(node, fd.join("5")).unwrap();
            let lease = passing.clone().filter(|_| flags != 0);
            assert_eq!(said(), (format!("process {pid} (vmm) {open}"), lease));
        }
    }

    #[test]
    fn addresses_follow_from_offset_and_stride() {
        let host = FakeHost::new(&[
            Fake::nvme("03:00.0", 1)
                .with("sriov_offset", "384")
                .with("sriov_stride", "2")
                .with("sriov_drivers_autoprobe", "1")
                .with("net/eth7/ifindex", "9")
                .with("net/eth5/ifindex", "8")
                .with("net/eth5/phys_port_name", "pf0vf1"),
            Fake::nvme("04:00.0", 2),
        ]);
        let pf = Pf::read(&host.paths, bdf("03:00.0")).unwrap();
        assert_eq!(pf.address(0), Some(bdf("04:10.0")));
        assert_eq!(pf.address(3), Some(bdf("04:10.6")));
        assert_eq!(pf.address(u16::MAX), None);
        assert_eq!(pf.autoprobe, Some(true));
        let interface = pf.interface.unwrap();
        assert_eq!((interface.name.as_str(), interface.index), ("eth7", 9));
        let plain = Pf::read(&host.paths, bdf("04:00.0")).unwrap();
        assert_eq!((plain.address(0), plain.interface), (None, None));
    }
}
