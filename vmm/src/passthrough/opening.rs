//! Attaching and opening devices in parallel: the kernel resets each that has a reset of its own on the way, which
//! takes a tenth of a second.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_devices::pci::MsiRouter;
use gantry_resources::base::DeviceName;
use gantry_vfio::host::{Attachment, VfioDevice};
use gantry_vfio::pci::Rom;

use super::device::AttachedDevice;
use super::error::DeviceError;
use super::events::DeviceNotify;
use super::io_address_space::Entry;
use super::lease::LeasedDevice;
use super::resets::reset_buses;
use crate::process::error::cannot;
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads::{self, Task};

/// How long the kernel may take to open a device. Its reset takes a tenth of a second, or some seconds if the
/// device comes back slowly.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// How a device is opened.
pub struct OpeningTerms {
    /// Its expansion ROM.
    pub(super) rom: Rom,
    /// Whether it must not be reset.
    pub(super) must_not_reset: bool,
}

/// A device that is leased, on its way into the VM's address space.
pub struct EnteringDevice {
    // Dropped in this order: the device leaves the address space before others may lease it.
    pub(super) entry: Entry,
    /// A client has sent it.
    pub(super) sent: bool,
    pub(super) opening: OpeningTerms,
    pub(super) leased: LeasedDevice,
}

/// A device that is leased and in the VM's address space, and has no function yet.
pub struct UnopenedDevice {
    // Dropped in this order: the device leaves the address space before others may lease it.
    attachment: Attachment,
    opening: OpeningTerms,
    pub(super) leased: LeasedDevice,
}

impl EnteringDevice {
    /// Quarantines a device that stays in use although it is leased: a process that the kernel cannot end has it
    /// open, or one that ignores leases. Not one that a client has sent, whose mistake that may be.
    ///
    /// # Errors
    /// The device stays in use, or the kernel refuses.
    pub(super) fn attach(self) -> Result<UnopenedDevice, DeviceError> {
        let device = self.leased.function.name;
        let attached = self.entry.attach().map_err(|error| match error {
            gantry_vfio::Error::DeviceInUse { .. } if self.sent => {
                DeviceError::SentInUse { device }
            }
            gantry_vfio::Error::DeviceInUse { .. } => {
                self.leased.lease.quarantine(&error.to_string());
                error.into()
            }
            error => error.into(),
        });
        Ok(UnopenedDevice {
            attachment: attached?,
            opening: self.opening,
            leased: self.leased,
        })
    }
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
        let rom = self.opening.rom.clone();
        let (io, leased) = self.open_io()?;
        AttachedDevice::new(leased, io, rom, router, notify)
    }

    /// Opens the device for this process itself. Close it before its lease ends.
    ///
    /// # Errors
    /// VFIO refused.
    pub(super) fn open_io(self) -> Result<(VfioDevice, LeasedDevice), DeviceError> {
        let name = self.leased.function.name.to_string();
        let mut io = VfioDevice::open(self.attachment, &name)?;
        if self.opening.must_not_reset {
            io.forbid_resets();
        }
        Ok((io, self.leased))
    }
}

/// Devices that enter the address space or are opened, each on a thread of its own.
pub struct Underway<T>(Vec<(DeviceName, Task<Result<T, DeviceError>>)>);

/// Devices that are being opened.
pub struct Opening {
    devices: Underway<AttachedDevice>,
    /// The devices that the VM has besides.
    others: BTreeSet<DeviceName>,
}

impl Opening {
    /// Opens devices.
    ///
    /// # Errors
    /// No thread could be made.
    pub(super) fn start(
        devices: Vec<UnopenedDevice>,
        others: BTreeSet<DeviceName>,
        router: &Arc<dyn MsiRouter>,
        notify: &DeviceNotify,
        sandbox: &Sandbox,
    ) -> Result<Self, DeviceError> {
        let tasks = devices.into_iter().map(|device| {
            let (router, notify) = (Arc::clone(router), Arc::clone(notify));
            let name = device.leased.function.name;
            spawn(name, sandbox, move || device.open(router, notify))
        });
        Ok(Self {
            devices: Underway(tasks.collect::<Result<_, DeviceError>>()?),
            others,
        })
    }

    /// Waits for the devices as [`Underway::wait`] does. Then the buses are reset of those devices that have no reset
    /// of their own.
    ///
    /// # Errors
    /// The first device that could not be opened, or whose bus could not be reset. The others are closed then.
    pub fn wait(
        self,
        sandbox: &Sandbox,
        cancelled: impl Fn() -> bool,
    ) -> Result<Vec<AttachedDevice>, DeviceError> {
        reset_buses(self.devices.wait(cancelled)?, &self.others, sandbox)
    }
}

impl Underway<UnopenedDevice> {
    /// Has devices enter the address space.
    ///
    /// # Errors
    /// No thread could be made.
    pub(super) fn enter(
        devices: Vec<EnteringDevice>,
        sandbox: &Sandbox,
    ) -> Result<Self, DeviceError> {
        let tasks = devices.into_iter().map(|device| {
            let name = device.leased.function.name;
            spawn(name, sandbox, move || device.attach())
        });
        tasks.collect::<Result<_, DeviceError>>().map(Self)
    }
}

/// Runs `body` on a thread for the device `name`.
fn spawn<T: Send + 'static>(
    name: DeviceName,
    sandbox: &Sandbox,
    body: impl FnOnce() -> Result<T, DeviceError> + Send + 'static,
) -> Result<(DeviceName, Task<Result<T, DeviceError>>), DeviceError> {
    let task = threads::spawn(Role::Device, sandbox, body);
    Ok((name, task.map_err(cannot("spawn a thread"))?))
}

impl<T> Underway<T> {
    /// Waits for the devices, until a deadline or until `cancelled` is true. A device in whose open the kernel
    /// hangs is abandoned: its lease ends when the kernel returns.
    ///
    /// # Errors
    /// The first device that could not be opened. The others are closed then.
    pub fn wait(self, cancelled: impl Fn() -> bool) -> Result<Vec<T>, DeviceError> {
        let begun = Instant::now();
        let deadline = begun + OPEN_TIMEOUT;
        let wanted = || !cancelled();
        // Waits for all even if one fails: the open ones are closed here.
        let opened = self.0.into_iter().map(|(device, task)| {
            task.join_while(deadline, wanted).unwrap_or_else(|task| {
                task.abandon();
                let seconds = begun.elapsed().as_secs();
                Err(DeviceError::Stuck { device, seconds })
            })
        });
        let opened: Vec<_> = opened.collect();
        opened.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::os::fd::BorrowedFd;

    use gantry_vfio::host::{CdevBinder, FileObserver, UnboundCdev};

    use super::super::testing::leased;
    use super::*;
    use crate::process::sandbox::SeccompMode;

    /// A kernel that answers a bind with an errno, or with success if that is 0.
    #[derive(Debug)]
    struct Kernel(i32);

    impl CdevBinder for Kernel {
        fn bind(&self, _: BorrowedFd<'_>, _: Option<&[u8; 16]>) -> io::Result<()> {
            match self.0 {
                0 => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }

        fn attach(&self, _: BorrowedFd<'_>) -> io::Result<()> {
            Ok(())
        }

        fn detach(&self, _: BorrowedFd<'_>) -> io::Result<()> {
            Ok(())
        }
    }

    impl FileObserver for Kernel {
        fn added(&self, _: BorrowedFd<'_>) -> io::Result<()> {
            Ok(())
        }

        fn removed(&self, _: BorrowedFd<'_>) {}
    }

    #[test]
    fn a_device_that_stays_in_use_goes_into_quarantine_and_keeps_the_others_out() {
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let (mut devices, mut reasons) = (Vec::new(), Vec::new());
        for (name, errno) in [
            ("01:00.0", 0),
            ("02:00.0", libc::EBUSY),
            ("03:00.0", libc::EPERM),
        ] {
            let (leased, reason) = leased(name);
            let kernel = Arc::new(Kernel(errno));
            reasons.push(reason);
            devices.push(EnteringDevice {
                sent: false,
                entry: Entry::Cdev {
                    cdev: UnboundCdev {
                        device: leased.function.name.to_string(),
                        group: 7,
                        file: File::open("/dev/null").unwrap(),
                        token: None,
                    },
                    binder: kernel.clone(),
                    observer: kernel,
                    patience: Duration::ZERO,
                },
                opening: OpeningTerms {
                    rom: Rom::Device,
                    must_not_reset: false,
                },
                leased,
            });
        }
        let underway = Underway::enter(devices, &sandbox).unwrap();
        let error = underway.wait(|| false).err().unwrap().to_string();
        assert!(error.contains("0000:02:00.0 is in use"), "{error}");
        // Each lease has ended.
        let quarantined: Vec<usize> = reasons.iter().map(|one| one.iter().count()).collect();
        assert_eq!(quarantined, [0, 1, 0]);
    }
}
