//! Opening devices in parallel: the kernel resets each that has a reset of its own as it is opened, which takes a
//! tenth of a second.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_devices::pci::MsiRouter;
use gantry_resources::base::{DeviceName, Uuid};
use gantry_vfio::host::{Attachment, Group, VfioDevice};
use gantry_vfio::pci::Rom;

use super::device::AttachedDevice;
use super::error::DeviceError;
use super::events::DeviceNotify;
use super::lease::LeasedDevice;
use super::resets::reset_buses;
use crate::process::error::cannot;
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads::{self, Task};

/// How long the kernel may take to open a device. Its reset takes a tenth of a second, or some seconds if the
/// device comes back slowly.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// A device that is leased and not open yet. Its IOMMU group is in the VM's address space.
pub struct UnopenedDevice {
    // Dropped in this order: the group leaves the address space before others may lease the device.
    pub(super) iommu_group: Arc<Group>,
    /// The token that it must be opened with.
    pub(super) token: Option<Uuid>,
    /// Whether it must not be reset.
    pub(super) must_not_reset: bool,
    /// Its expansion ROM.
    pub(super) rom: Rom,
    pub(super) leased: LeasedDevice,
}

impl UnopenedDevice {
    /// Opens the device and makes a function of the guest of it.
    ///
    /// # Errors
    /// VFIO refused, or the device has no interrupts and needs some.
    fn open(
        self,
        router: Arc<dyn MsiRouter>,
        notify: DeviceNotify,
    ) -> Result<AttachedDevice, DeviceError> {
        let name = self.leased.function.name.to_string();
        let token = self.token.map(|token| token.to_string());
        let mut io =
            VfioDevice::open(Attachment::Group(self.iommu_group), &name, token.as_deref())?;
        if self.must_not_reset {
            io.forbid_resets();
        }
        AttachedDevice::new(self.leased, io, self.rom, router, notify)
    }
}

/// Devices that are being opened, each on a thread of its own.
pub struct Opening {
    tasks: Vec<(DeviceName, Task<Result<AttachedDevice, DeviceError>>)>,
    /// The devices that the VM has besides.
    others: BTreeSet<DeviceName>,
}

impl Opening {
    pub(super) fn start(
        devices: Vec<UnopenedDevice>,
        others: BTreeSet<DeviceName>,
        router: &Arc<dyn MsiRouter>,
        notify: &DeviceNotify,
        sandbox: &Sandbox,
    ) -> Result<Self, DeviceError> {
        let open = |device: UnopenedDevice| {
            let name = device.leased.function.name;
            let (router, notify) = (Arc::clone(router), Arc::clone(notify));
            let body = move || device.open(router, notify);
            let task = threads::spawn(Role::Device, sandbox, body);
            Ok((name, task.map_err(cannot("spawn a thread"))?))
        };
        let tasks = devices.into_iter().map(open);
        Ok(Self {
            tasks: tasks.collect::<Result<_, DeviceError>>()?,
            others,
        })
    }

    /// Waits for the devices, until a deadline or until `cancelled` is true. A device in whose open the kernel
    /// hangs is abandoned: its lease ends when the kernel returns. Then the buses are reset of those devices that
    /// have no reset of their own.
    ///
    /// # Errors
    /// The first device that could not be opened, or whose bus could not be reset. The others are closed then.
    pub fn wait(
        self,
        sandbox: &Sandbox,
        cancelled: impl Fn() -> bool,
    ) -> Result<Vec<AttachedDevice>, DeviceError> {
        let begun = Instant::now();
        let deadline = begun + OPEN_TIMEOUT;
        let wanted = || !cancelled();
        // Waits for all even if one fails: the open ones are closed here.
        let opened = self.tasks.into_iter().map(|(device, task)| {
            task.join_while(deadline, wanted).unwrap_or_else(|task| {
                task.abandon();
                let seconds = begun.elapsed().as_secs();
                Err(DeviceError::Stuck { device, seconds })
            })
        });
        let opened: Vec<_> = opened.collect();
        let devices = opened.into_iter().collect::<Result<Vec<_>, _>>()?;
        reset_buses(devices, &self.others, sandbox)
    }
}
