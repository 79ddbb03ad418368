//! A virtio device in the guest: its function, and the thread that serves it; and what the kernel serves in its place.

mod net;
mod open;
mod tap;
mod vhost;
mod vsock;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_devices::pci::firmware::{self, BarRequest};
use gantry_devices::pci::{PciSegment, PortIndex, SegmentError, SlotGuard};
use gantry_devices::virtio::block::{Disk, ResizeError, Rings};
use gantry_devices::virtio::{VirtioBackend, VirtioError, VirtioFunction, VirtioHost};

use crate::info::DeviceKind;
use crate::passthrough::{DeviceEvent, DeviceKey, DeviceNotify};
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads::{self, Task};
pub use open::{OpenDevices, OpenError};
pub use tap::interface_name_flaw;

/// How long the host may take to end what the thread has under way.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// What virtio devices need of the VM and of the process.
#[derive(Clone)]
pub struct VirtioContext {
    /// The VM.
    pub host: VirtioHost,
    /// The filters of their threads.
    pub sandbox: Arc<Sandbox>,
    /// Where their events go.
    pub notify: DeviceNotify,
    /// For disks.
    pub rings: Rings,
}

/// What the thread of a device runs, and in which role. It ends when the device's backend is dropped.
pub type Service = (Role, Box<dyn FnOnce() + Send>);

/// Why there is no such device.
#[derive(Debug, thiserror::Error)]
pub enum VirtioDeviceError {
    /// No descriptor or thread is left.
    #[error("no thread or eventfd can be made for it")]
    Host(#[from] io::Error),
    /// It is no virtio device that can be.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
}

/// A virtio device. Dropping it takes it out of its slot and ends its thread.
pub struct VirtioDevice {
    // Dropped in this order: the guest reaches the function no more, then the thread's work ends, then the thread.
    slot: Option<SlotGuard>,
    function: Arc<VirtioFunction>,
    _thread: Option<ServingThread>,
    key: DeviceKey,
    id: String,
    kind: DeviceKind,
    disk: Option<Arc<Disk>>,
}

/// The thread of a device. Dropping it waits until the thread has ended, and leaves one behind that the kernel keeps:
/// guest RAM and the files of the device stay as they are until it returns.
struct ServingThread {
    id: String,
    task: Option<Task<()>>,
}

impl Drop for ServingThread {
    fn drop(&mut self) {
        let deadline = Instant::now() + END_TIMEOUT;
        if let Some(Err(thread)) = self.task.take().map(|task| task.join_until(deadline)) {
            let device = self.id.as_str();
            tracing::error!(device, "the host does not answer: a thread is left behind");
            thread.abandon();
        }
    }
}

impl VirtioDevice {
    /// Makes a function of the guest of `backend`, and starts its thread if it has one.
    ///
    /// # Errors
    /// The process has no descriptors or threads left, or the backend is none that fits.
    pub fn new(
        id: &str,
        kind: DeviceKind,
        backend: Arc<dyn VirtioBackend>,
        service: Option<Service>,
        context: &VirtioContext,
    ) -> Result<Self, VirtioDeviceError> {
        let key = DeviceKey::unique();
        let notify = Arc::clone(&context.notify);
        let on_ready = move || notify(key, DeviceEvent::Enabled);
        let function = VirtioFunction::new(id, backend, context.host.clone(), on_ready)?;
        // The thread is last: where something fails, nothing waits for it.
        let thread = service.map(|(role, run)| threads::spawn(role, &context.sandbox, run));
        Ok(Self {
            slot: None,
            function,
            _thread: thread.transpose()?.map(|task| ServingThread {
                id: id.to_owned(),
                task: Some(task),
            }),
            key,
            id: id.to_owned(),
            kind,
            disk: None,
        })
    }

    /// The device, which is a disk whose size can change.
    pub fn with_disk(self, disk: Arc<Disk>) -> Self {
        let disk = Some(disk);
        Self { disk, ..self }
    }

    /// What makes the disk larger and tells the guest, elsewhere: the host's disk may take its time. `None` if it is
    /// no disk.
    pub fn resizer(&self, bytes: u64) -> Option<impl FnOnce() -> Result<(), ResizeError> + use<>> {
        let (disk, function) = (Arc::clone(self.disk.as_ref()?), Arc::clone(&self.function));
        Some(move || {
            disk.resize(bytes)?;
            function.config_changed();
            Ok(())
        })
    }

    /// Puts the device behind a root port.
    ///
    /// # Errors
    /// There is no such port, or it is taken.
    pub fn plug(&mut self, pci: &Arc<PciSegment>, port: PortIndex) -> Result<(), SegmentError> {
        self.slot = Some(pci.plug(port, 0, self.function.clone())?);
        Ok(())
    }

    /// Takes the device out of its slot.
    pub fn unplug(&mut self) {
        self.slot = None;
    }

    /// Takes the device, which is out of its slot, away from the guest. Waits until it has left guest RAM.
    pub fn retire(&self) {
        if let Err(error) = self.function.retire() {
            tracing::warn!(device = self.id, %error, "the device has not stopped");
        }
    }

    /// Has the device leave guest RAM: [`Self::reset`] waits for it.
    pub fn stop(&self) {
        self.function.stop();
    }

    /// What the device did so far, by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.function.counters()
    }

    /// Resets the device for the guest's reboot.
    ///
    /// # Errors
    /// It does not leave guest RAM in time.
    pub fn reset(&self) -> io::Result<()> {
        self.function.power_cycle()
    }

    /// The BARs that it needs addresses for. Its decoding is off afterwards: the guest must not have it yet.
    pub fn bars(&self) -> Vec<BarRequest> {
        firmware::probe(0, &*self.function)
    }

    /// What the VM calls it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its number, which its events carry.
    pub fn key(&self) -> DeviceKey {
        self.key
    }

    /// What it is.
    pub fn kind(&self) -> &DeviceKind {
        &self.kind
    }
}
