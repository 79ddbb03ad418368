//! Devices that this process leases as a VM does and measures itself, without a guest.

use std::sync::Arc;
use std::time::Duration;

use gantry_resources::base::HostPaths;
use gantry_resources::facts::VfioBackEnd;
use gantry_resources::holding::Holder;
use gantry_resources::pools::{DeviceRequest, Placement};
use gantry_vfio::host::DeviceIo;
use gantry_vfio::measure::{self, DmaPages, Kind, Sink, Subject, SysfsDevice, open_without_iommu};

use super::acquire::{Acquirer, Lessor};
use super::error::DeviceError;
use super::io_address_space::IoAddressSpace;
use super::lease::LeasedDevice;
use crate::kvm::{KvmVm, VfioObserver};
use crate::process::error::cannot;
use crate::process::sandbox::{Sandbox, SeccompMode};

/// Open devices with memory for their DMA. Dropping it gives them back.
pub struct MeasuredDevices {
    // Dropped in this order: devices are closed before their memory goes, and that before the leases end.
    devices: Vec<Open>,
    memory: DmaPages,
    _space: Option<Arc<IoAddressSpace>>,
    _leases: Vec<LeasedDevice>,
}

struct Open {
    io: Box<dyn DeviceIo>,
    name: String,
}

impl MeasuredDevices {
    /// Leases the devices and opens them, through the same acquisition as for a VM.
    ///
    /// # Errors
    /// A device is unavailable, or the kernel refuses.
    pub fn acquire(
        host: &HostPaths,
        requests: &[DeviceRequest],
        holder: &Holder,
    ) -> Result<Self, DeviceError> {
        let kvm = KvmVm::new()?;
        let observer = Arc::new(VfioObserver::new(kvm.vm())?);
        let sandbox = Sandbox::new(SeccompMode::Off).map_err(cannot("compile filters"))?;
        let acquirer = Acquirer {
            lessor: Lessor::Process(&Placement::Anywhere, holder),
            sent: None,
            on_new_space: &|| {},
            back_end: VfioBackEnd::of_host(host),
            observer: &observer,
            host,
            sandbox: &sandbox,
        };
        let (devices, space) = acquirer
            .acquire(requests, &[], None, &|| false)?
            .open_here()?;
        let opened = devices.into_iter().map(|(io, leased)| {
            let name = leased.function.name.to_string();
            let io = Box::new(io);
            (Open { io, name }, leased)
        });
        let (devices, leases) = opened.unzip();
        let dma = space.as_ref().map(|space| space.dma());
        let memory = match dma {
            Some(dma) => DmaPages::mapped(dma)?,
            None => DmaPages::physical()?,
        };
        Ok(Self {
            devices,
            memory,
            _space: space,
            _leases: leases,
        })
    }

    /// Opens devices of this machine, which is a guest without an IOMMU: through VFIO, to which they are bound then, or
    /// through sysfs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn in_guest(host: &HostPaths, vfio: bool, names: &[String]) -> Result<Self, DeviceError> {
        let devices = names.iter().map(|name| {
            let (sys, name) = (&host.sysfs, name.clone());
            let io: Box<dyn DeviceIo> = match vfio {
                true => Box::new(open_without_iommu(sys, &host.dev, &name)?),
                false => Box::new(SysfsDevice::open(sys, &name)?),
            };
            Ok(Open { io, name })
        });
        Ok(Self {
            devices: devices.collect::<Result<_, DeviceError>>()?,
            memory: DmaPages::physical()?,
            _space: None,
            _leases: Vec::new(),
        })
    }

    /// Their addresses, in the order in which a guest has them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.devices.iter().map(|device| &*device.name)
    }

    /// Measures each device, one after the other, `per_test` for each test. The sink gets the index of the device.
    ///
    /// # Errors
    /// A device or the kernel refused something that every device has.
    pub fn measure(
        &self,
        per_test: Duration,
        sink: &mut dyn FnMut(usize, measure::Report),
    ) -> Result<(), DeviceError> {
        for (index, device) in self.devices.iter().enumerate() {
            let sink: &mut Sink<'_> = &mut |report| sink(index, report);
            measure::measure(&self.subject(device, per_test), sink)?;
        }
        Ok(())
    }

    /// What each device is.
    ///
    /// # Errors
    /// A configuration space cannot be read.
    pub fn kinds(&self) -> Result<Vec<Kind>, DeviceError> {
        let devices = self.devices.iter();
        let kinds = devices.map(|device| self.subject(device, Duration::ZERO).kind());
        Ok(kinds.collect::<Result<_, _>>()?)
    }

    fn subject<'a>(&'a self, device: &'a Open, per_test: Duration) -> Subject<'a> {
        Subject {
            io: &*device.io,
            memory: &self.memory,
            per_test,
        }
    }
}

impl std::fmt::Debug for MeasuredDevices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
