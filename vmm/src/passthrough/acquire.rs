//! How a VM acquires host devices: this process or its opener leases them, and they enter the VM's DMA address space.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::RangeInclusive;
use std::sync::Arc;

use gantry_devices::pci::MsiRouter;
use gantry_resources::allocation::{Lease, allocate_near};
use gantry_resources::base::{DeviceName, HostPaths, Uuid};
use gantry_resources::facts::{ReservedKind, ReservedRegion, VfioBackEnd, reserved_regions};
use gantry_resources::holding::Holder;
use gantry_resources::inventory::Terms;
use gantry_resources::opener::{Nodes, Opened, Opener, pool_of};
use gantry_resources::pools::{DeviceRequest, Placement, RomSource, nth_id};

use gantry_vfio::host::{Group, VfioDevice};
use gantry_vfio::pci::Rom;

use super::error::DeviceError;
use super::events::DeviceNotify;
use super::io_address_space::{DeviceNode, IoAddressSpace};
use super::lease::{DeviceLabel, DeviceLease, FunctionId, LeasedDevice};
use super::opening::{EnteringDevice, Opening, OpeningTerms, Underway, UnopenedDevice};
use super::sent::SentDevice;
use crate::kvm::VfioObserver;
use crate::process::error::{HostError, cannot};
use crate::process::sandbox::Sandbox;

/// Devices that are leased and in one address space.
#[derive(Default)]
pub struct AcquiredDevices {
    // Dropped first: devices leave the address space before others may lease them.
    devices: Vec<UnopenedDevice>,
    space: Option<Arc<IoAddressSpace>>,
    reserved: Vec<RangeInclusive<u64>>,
}

/// Devices that this process has opened for itself, and their address space.
pub(super) type OpenedHere = (Vec<(VfioDevice, LeasedDevice)>, Option<Arc<IoAddressSpace>>);

/// Who leases devices for a VM.
pub enum Lessor<'a> {
    /// This process.
    Process(&'a Placement, &'a Holder),
    /// The opener. It must know all devices of a VM with hot-plug slots.
    Opener(&'a Opener),
}

/// What a lessor gives.
struct Granted {
    // Dropped in this order.
    /// The node of a new DMA address space, if the opener has opened it.
    address_space: Option<File>,
    groups: Vec<GrantedGroup>,
    devices: Vec<GrantedDevice>,
}

struct GrantedGroup {
    number: u32,
    reserved: Vec<ReservedRegion>,
    /// Its node, if the opener has opened it.
    node: Option<File>,
}

struct GrantedDevice {
    // Dropped before the lease.
    /// Its cdev, if the opener has opened it.
    cdev: Option<File>,
    function: FunctionId,
    iommu_group: u32,
    token: Option<Uuid>,
    pool: Option<String>,
    terms: Terms,
    lease: Box<dyn DeviceLease>,
}

/// Acquires devices for one VM.
pub struct Acquirer<'a> {
    /// Who leases them.
    pub lessor: Lessor<'a>,
    /// The kernel interface for them.
    pub back_end: VfioBackEnd,
    /// What a client has opened, in place of the only device's node and the address space's.
    pub sent: Option<&'a SentDevice>,
    /// Called once the devices are leased that a new address space is made for. With iommufd the kernel then resets
    /// them before RAM can be mapped, and RAM can be made present meanwhile.
    pub on_new_space: &'a dyn Fn(),
    /// Tells KVM of them.
    pub observer: &'a Arc<VfioObserver>,
    /// Where the host keeps things.
    pub host: &'a HostPaths,
    /// The filters of the threads that wait for them.
    pub sandbox: &'a Sandbox,
}

impl Acquirer<'_> {
    /// Leases all requested devices, or none; `roms` has the expansion ROM of each request. They enter the VM's address
    /// space `space`, or a new one if `space` has lost its last group. Gives up once `cancelled` is true.
    ///
    /// # Errors
    /// A device is unavailable, a node is missing or not permitted, a group or device stays busy, a group is not
    /// viable, or the kernel refused.
    pub fn acquire(
        &self,
        requests: &[DeviceRequest],
        roms: &[Rom],
        space: Option<Arc<IoAddressSpace>>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<AcquiredDevices, DeviceError> {
        if requests.is_empty() {
            return Ok(AcquiredDevices::default());
        }
        let granted = match &self.lessor {
            Lessor::Process(placement, holder) => {
                let leases = allocate_near(self.host, requests, placement, holder)?;
                Granted::in_process(leases, self.host)?
            }
            Lessor::Opener(opener) => {
                let held = space.as_ref().map(|space| space.group_numbers());
                let nodes = Nodes {
                    back_end: self.back_end,
                    // A container may lose its last group meanwhile.
                    address_space: self.sent.is_none_or(|sent| sent.iommufd.is_none())
                        && (space.is_none() || self.back_end == VfioBackEnd::Container),
                    sent: self.sent.is_some(),
                    held: held.unwrap_or_default(),
                };
                let granted = Granted::from(opener.open(requests, &nodes, cancelled)?);
                match self.sent {
                    Some(sent) => granted.with(sent)?,
                    None => granted,
                }
            }
        };
        self.enter(granted, requests, roms, space, cancelled)
    }

    /// Puts the devices into the address space.
    fn enter(
        &self,
        granted: Granted,
        requests: &[DeviceRequest],
        roms: &[Rom],
        space: Option<Arc<IoAddressSpace>>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<AcquiredDevices, DeviceError> {
        // Other devices may be closed meanwhile, and a container that loses its last group cannot be used again:
        // these references keep the present groups in it until the new ones have joined.
        let _present = space.as_ref().and_then(|space| space.keep());
        let space = match space.filter(|_| _present.is_some()) {
            Some(space) => space,
            None => {
                (self.on_new_space)();
                let node = granted.address_space;
                IoAddressSpace::open(self.back_end, self.host, node, self.observer)?
            }
        };
        let regions = granted.groups.iter().flat_map(|group| &group.reserved);
        let reserved = regions.filter_map(forbidden).collect();
        // Kept until each device has a reference to its group.
        let _added = self.add_groups(&space, granted.groups, &granted.devices)?;
        let mut labels = Labels::new(requests);
        let entering = granted.devices.into_iter().map(|device| {
            let label = labels.next(device.function, device.terms, device.pool);
            let opening = OpeningTerms {
                must_not_reset: device.terms.must_not_reset,
                rom: match label.rom {
                    RomSource::Device => Rom::Device,
                    _ => roms.get(device.terms.request).cloned().unwrap_or_default(),
                },
            };
            let leased = LeasedDevice {
                function: device.function,
                label,
                _space: Arc::new(space.admit(device.function.name)),
                lease: device.lease,
            };
            let entry = space.entry(DeviceNode {
                name: device.function.name,
                group: device.iommu_group,
                token: device.token.map(|token| token.to_string()),
                cdev: device.cdev,
                host: self.host,
            })?;
            Ok(EnteringDevice {
                entry,
                sent: self.sent.is_some(),
                opening,
                leased,
            })
        });
        let entering = entering.collect::<Result<Vec<_>, DeviceError>>()?;
        let devices = match self.back_end {
            // The groups have joined: nothing waits for a device.
            VfioBackEnd::Container => {
                let entered = entering.into_iter().map(EnteringDevice::attach);
                entered.collect::<Result<_, _>>()?
            }
            VfioBackEnd::Iommufd => Underway::enter(entering, self.sandbox)?.wait(cancelled)?,
        };
        Ok(AcquiredDevices {
            devices,
            space: Some(space),
            reserved,
        })
    }

    /// Quarantines the devices of a group that stays busy although they are leased: a process that the kernel
    /// cannot end holds the group, or one that ignores leases.
    fn add_groups(
        &self,
        space: &IoAddressSpace,
        groups: Vec<GrantedGroup>,
        devices: &[GrantedDevice],
    ) -> Result<Vec<Option<Arc<Group>>>, DeviceError> {
        let add = |group: GrantedGroup| {
            let added = space.add(group.number, self.host, group.node);
            added.inspect_err(|error| {
                if matches!(
                    error,
                    DeviceError::Vfio(gantry_vfio::Error::GroupInUse { .. })
                ) {
                    let of_group = |device: &&GrantedDevice| device.iommu_group == group.number;
                    let leases = devices.iter().filter(of_group).map(|device| &device.lease);
                    leases.for_each(|lease| lease.quarantine(&error.to_string()));
                }
            })
        };
        groups.into_iter().map(add).collect()
    }
}

impl Granted {
    /// With copies of the descriptors that a client has sent.
    ///
    /// # Errors
    /// No descriptors are left.
    fn with(mut self, sent: &SentDevice) -> Result<Self, HostError> {
        let copy = |file: &File| file.try_clone().map_err(cannot("copy a descriptor"));
        if let Some(iommufd) = &sent.iommufd {
            self.address_space = Some(copy(iommufd)?);
        }
        for device in &mut self.devices {
            device.cdev = Some(copy(&sent.cdev)?);
        }
        Ok(self)
    }

    /// # Errors
    /// A device is in no IOMMU group, or what its group reserves is not known.
    fn in_process(leases: Vec<Lease>, host: &HostPaths) -> Result<Self, DeviceError> {
        let mut granted = Self {
            address_space: None,
            groups: Vec::new(),
            devices: Vec::new(),
        };
        for lease in leases {
            let device = lease.name();
            let number = lease.iommu_group();
            let number = number.ok_or(DeviceError::NoIommuGroup { device })?;
            if granted.groups.iter().all(|group| group.number != number) {
                granted.groups.push(GrantedGroup {
                    number,
                    reserved: reserved_regions(host, number)?,
                    node: None,
                });
            }
            granted.devices.push(GrantedDevice {
                cdev: None,
                function: FunctionId {
                    name: device,
                    virtual_function: lease.is_virtual_function(),
                },
                iommu_group: number,
                token: lease.token(),
                pool: pool_of(host, device),
                terms: lease.terms(),
                lease: Box::new(lease),
            });
        }
        Ok(granted)
    }
}

impl From<Opened> for Granted {
    fn from(opened: Opened) -> Self {
        let groups = opened.groups.into_iter().map(|group| GrantedGroup {
            number: group.number,
            reserved: group.reserved,
            node: group.node,
        });
        let devices = opened.devices.into_iter().map(|device| GrantedDevice {
            cdev: device.cdev,
            function: FunctionId {
                name: device.name,
                virtual_function: device.virtual_function,
            },
            iommu_group: device.group,
            token: device.token,
            pool: device.pool,
            terms: device.terms,
            lease: Box::new(device.lease),
        });
        Self {
            address_space: opened.address_space,
            groups: groups.collect(),
            devices: devices.collect(),
        }
    }
}

impl AcquiredDevices {
    /// What the devices are called on the host.
    pub fn names(&self) -> Vec<DeviceName> {
        self.functions()
            .iter()
            .map(|function| function.name)
            .collect()
    }

    /// What tells which devices share a slot.
    pub fn functions(&self) -> Vec<FunctionId> {
        let devices = self.devices.iter();
        devices.map(|device| device.leased.function).collect()
    }

    /// Calls the devices `id`, `id-1`, `id-2` and so on.
    pub fn name_all(&mut self, id: &str) {
        for (index, device) in self.devices.iter_mut().enumerate() {
            device.leased.label.id = nth_id(id, index);
        }
    }

    /// An id that two of the devices have, if any: a card may have more functions than were asked for.
    pub fn duplicate_id(&self) -> Option<&str> {
        duplicate_of(self.devices.iter().map(|device| &device.leased.label))
    }

    /// Addresses that must be neither RAM nor BAR.
    pub fn reserved(&self) -> &[RangeInclusive<u64>] {
        &self.reserved
    }

    /// The address space of the devices; `None` without devices.
    pub fn space(&self) -> Option<&Arc<IoAddressSpace>> {
        self.space.as_ref()
    }

    /// The ranges that the IOMMU can map; empty if nothing restricts it.
    ///
    /// # Errors
    /// The kernel refused to say.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>, DeviceError> {
        let ranges = self.space.as_ref().map(|space| space.iova_ranges());
        ranges.unwrap_or_else(|| Ok(Vec::new()))
    }

    /// Opens every device for this process itself, in the order of the leases, and the address space of them all.
    ///
    /// # Errors
    /// VFIO refused.
    pub(super) fn open_here(self) -> Result<OpenedHere, DeviceError> {
        let opened = self.devices.into_iter().map(UnopenedDevice::open_io);
        Ok((opened.collect::<Result<_, _>>()?, self.space))
    }

    /// Begins to open every device, in the order of the leases.
    ///
    /// # Errors
    /// No thread could be made.
    pub fn open(
        self,
        router: &Arc<dyn MsiRouter>,
        notify: &DeviceNotify,
        sandbox: &Sandbox,
    ) -> Result<Opening, DeviceError> {
        let mut others = self.space.map(|space| space.devices()).unwrap_or_default();
        for device in &self.devices {
            others.remove(&device.leased.function.name);
        }
        Opening::start(self.devices, others, router, notify, sandbox)
    }
}

fn duplicate_of<'a>(labels: impl Iterator<Item = &'a DeviceLabel>) -> Option<&'a str> {
    let mut seen = BTreeSet::new();
    let mut ids = labels.map(|label| label.id.as_str());
    ids.find(|id| !seen.insert(*id))
}

/// Names devices in the order in which they were leased.
struct Labels<'a> {
    requests: &'a [DeviceRequest],
    /// How many devices each request has got: a card has several functions.
    counts: BTreeMap<usize, usize>,
}

impl<'a> Labels<'a> {
    fn new(requests: &'a [DeviceRequest]) -> Self {
        Self {
            requests,
            counts: BTreeMap::new(),
        }
    }

    fn next(&mut self, function: FunctionId, terms: Terms, pool: Option<String>) -> DeviceLabel {
        let count = self.counts.entry(terms.request).or_default();
        let request = self.requests.get(terms.request);
        let id = request.and_then(|request| request.id.as_ref());
        let label = DeviceLabel {
            id: id.map_or_else(|| function.name.to_string(), |id| nth_id(id, *count)),
            group: request
                .and_then(|request| request.from.pool())
                .map(str::to_owned)
                .or(pool),
            allow: terms.allow,
            on_error: request.map(|request| request.on_error).unwrap_or_default(),
            rom: request.map_or(RomSource::Device, |request| rom_of(request, function)),
        };
        *count += 1;
        label
    }
}

/// Where the expansion ROM of a function comes from. A file is the first function's of a card.
fn rom_of(request: &DeviceRequest, function: FunctionId) -> RomSource {
    match &request.rom {
        RomSource::File(_) if request.from.device().is_none() && !function.is_first() => {
            RomSource::Device
        }
        rom => rom.clone(),
    }
}

/// The addresses that a reserved region forbids to the guest. A relaxable region concerns only the host's
/// drivers.
pub fn forbidden(region: &ReservedRegion) -> Option<RangeInclusive<u64>> {
    (region.kind != ReservedKind::DirectRelaxable).then_some(region.start..=region.end)
}

#[cfg(test)]
mod tests {
    use gantry_resources::base::HostBdf;

    use super::*;

    #[test]
    fn a_function_of_a_card_and_a_named_device_cannot_have_one_name() {
        let devices = [("01:00.0", 0), ("01:00.1", 0), ("02:00.0", 1)];
        let duplicate = |ids: [Option<&str>; 2]| {
            let requests = ids.map(|id| DeviceRequest {
                id: id.map(str::to_owned),
                ..DeviceRequest::group("gpus", 1)
            });
            let mut labels = Labels::new(&requests);
            let labels = devices.map(|(bdf, request)| {
                let function = FunctionId {
                    name: bdf.parse::<HostBdf>().unwrap().into(),
                    virtual_function: false,
                };
                let terms = Terms {
                    request,
                    ..Terms::default()
                };
                let label = labels.next(function, terms, None);
                assert_eq!(label.group.as_deref(), Some("gpus"));
                label
            });
            duplicate_of(labels.iter()).map(str::to_owned)
        };
        let gpu = duplicate([Some("gpu"), Some("gpu-1")]);
        assert_eq!(gpu.as_deref(), Some("gpu-1"));
        let address = duplicate([None, Some("0000:01:00.1")]);
        assert_eq!(address.as_deref(), Some("0000:01:00.1"));
        assert_eq!(duplicate([Some("gpu"), Some("gpu-2")]), None);
        assert_eq!(duplicate([None, None]), None);
    }
}
