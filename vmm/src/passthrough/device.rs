//! A device of the host as a function of the guest.

use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use gantry_devices::pci::firmware::{self, BarRequest};
use gantry_devices::pci::{MsiRouter, PciSegment, PortIndex, SegmentError, SlotGuard};
use gantry_resources::base::DeviceName;
use gantry_vfio::host::DeviceIo;
use gantry_vfio::pci::{PassthroughDevice, PassthroughOptions, Rom};

use super::counters::{AccessCounters, CountingFunction, CountingIo};
use super::error::DeviceError;
use super::events::{DeviceEventFds, DeviceKey, DeviceNotify};
use super::lease::{DeviceLabel, FunctionId, LeasedDevice};
use crate::layout::intx_gsi;

/// How long a vCPU may stay in a device that is to be closed before a warning. It leaves within microseconds,
/// unless the device does not answer.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// One host device, open, and its lease.
///
/// Dropping it takes it out of its slot, closes it, and gives the lease back, in this order.
pub struct AttachedDevice {
    slot: Option<SlotGuard>,
    function: DrainOnDrop<CountingFunction>,
    // The trapped parts of its BARs lead here, too.
    _io: DrainOnDrop<CountingIo>,
    events: DeviceEventFds,
    key: DeviceKey,
    /// Why it goes into quarantine after this VM, if it does.
    quarantine: OnceLock<String>,
    leased: LeasedDevice,
}

/// A value that vCPUs may still use, though no further vCPU can reach it. Dropping it waits until all have
/// left: the last user closes the device, and that must not be a vCPU.
struct DrainOnDrop<T>(Arc<T>);

impl<T> DrainOnDrop<T> {
    fn wait(&self) {
        let begun = Instant::now();
        let mut told = false;
        while Arc::strong_count(&self.0) > 1 {
            sleep(Duration::from_millis(1));
            if !told && begun.elapsed() > LEAVE_TIMEOUT {
                told = true;
                tracing::warn!(
                    "a vCPU waits for a device that is to be closed and does not answer"
                );
            }
        }
    }
}

impl<T> Drop for DrainOnDrop<T> {
    fn drop(&mut self) {
        self.wait();
    }
}

impl AttachedDevice {
    /// Makes a function of the guest of the open device behind `io`, which has the expansion ROM `rom` and
    /// interrupts through `router`.
    ///
    /// # Errors
    /// The device cannot be reached, or has no interrupts and needs some. It is closed before its lease ends.
    pub fn new(
        // Parameters are dropped from the last to the first.
        leased: LeasedDevice,
        io: impl DeviceIo + 'static,
        rom: Rom,
        router: Arc<dyn MsiRouter>,
        notify: DeviceNotify,
    ) -> Result<Self, DeviceError> {
        let events = DeviceEventFds::register(&io);
        let counters = Arc::new(AccessCounters::default());
        let io = Arc::new(CountingIo::new(io, &counters));
        let options = PassthroughOptions {
            no_interrupts: leased.label.allow.no_interrupts,
            rom,
        };
        let function = PassthroughDevice::with(io.clone(), router, options)?;
        let key = DeviceKey::unique();
        let notify = move |event| notify(key, event);
        let function = CountingFunction::new(function, &counters, notify);
        Ok(Self {
            slot: None,
            function: DrainOnDrop(Arc::new(function)),
            _io: DrainOnDrop(io),
            events,
            key,
            quarantine: OnceLock::new(),
            leased,
        })
    }

    /// Puts the device behind a root port, as function number `function`.
    ///
    /// # Errors
    /// There is no such port, or it is taken.
    pub fn plug(
        &mut self,
        pci: &Arc<PciSegment>,
        port: PortIndex,
        function: u8,
    ) -> Result<(), SegmentError> {
        let mut ports = pci.ports();
        if let Some((_, at, _)) = ports.find(|(index, ..)| *index == port) {
            // A root port passes the pins of its device 0 on as its own. The line comes first: a guest that
            // scans the bus finds the function as soon as it is plugged, and may enable it.
            let line = |pin| intx_gsi(at.device(), pin);
            self.function.0.function().set_line(line);
        }
        self.slot = Some(pci.plug(port, function, self.function.0.clone())?);
        Ok(())
    }

    /// Takes the device out of its slot: no vCPU finds it in configuration space any more. Accesses no hardware.
    pub fn unplug(&mut self) {
        self.slot = None;
    }

    /// Takes the device away from the guest: stops its DMA and interrupts, and unmaps its BARs. It stays open.
    /// Waits for the hardware, and for a vCPU that accesses it.
    pub fn retire(&self) {
        self.announce_quarantine();
        if let Err(error) = self.function.0.function().retire() {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(device = %self.name(), error, "the device may not have stopped");
        }
        if self.function.0.function().is_silent() {
            self.quarantine("it does not answer (it reads all-ones)");
        }
    }

    /// Its function, to be reset on another thread.
    pub(super) fn to_reset(&self) -> Arc<CountingFunction> {
        Arc::clone(&self.function.0)
    }

    /// What it is called on the host.
    pub fn name(&self) -> DeviceName {
        self.leased.function.name
    }

    /// What tells which functions share its slot.
    pub fn function(&self) -> FunctionId {
        self.leased.function
    }

    /// What the VM calls it.
    pub fn label(&self) -> &DeviceLabel {
        &self.leased.label
    }

    /// Its number, which its events carry.
    pub fn key(&self) -> DeviceKey {
        self.key
    }

    /// Where the kernel tells of its events.
    pub fn events(&self) -> &DeviceEventFds {
        &self.events
    }

    /// The BARs that it needs addresses for as function number `function`. Its decoding is off
    /// afterwards: the guest must not have it yet.
    pub fn bars(&self, function: u8) -> Vec<BarRequest> {
        firmware::probe(function, &*self.function.0)
    }

    /// Puts the device into quarantine after this VM, for this reason unless there is one.
    pub fn quarantine(&self, why: &str) {
        let _ = self.quarantine.set(why.to_owned());
    }

    /// Why it goes into quarantine after this VM, if it does. After a failed reset its state is unknown.
    pub fn quarantine_reason(&self) -> Option<String> {
        let failed = self.function.0.function().reset_failed();
        let failed = failed.then(|| "its reset failed".to_owned());
        failed.or_else(|| self.quarantine.get().cloned())
    }

    /// Tells the lease if the device goes into quarantine.
    fn announce_quarantine(&self) {
        if let Some(why) = self.quarantine_reason() {
            self.leased.lease.quarantine(&why);
        }
    }

    /// What it did so far.
    pub fn counters(&self) -> &AccessCounters {
        self.function.0.counters()
    }
}

impl Drop for AttachedDevice {
    fn drop(&mut self) {
        self.slot = None;
        // Before the close, which may hang, and again, as the close may fail a reset.
        self.announce_quarantine();
        self.function.wait();
        self.announce_quarantine();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread::{self, ThreadId};

    use gantry_devices::pci::GuestBdf;

    use super::super::events::DeviceEvent;
    use super::super::testing::attached_telling;
    use super::*;

    struct Closed(Arc<Mutex<Option<ThreadId>>>);

    impl Drop for Closed {
        fn drop(&mut self) {
            *self.0.lock().unwrap() = Some(thread::current().id());
        }
    }

    #[test]
    fn a_guest_that_finds_its_device_dead_has_it_told_of_once() {
        let gate = Arc::default();
        let told: Arc<Mutex<Vec<DeviceEvent>>> = Arc::default();
        let events = Arc::clone(&told);
        let notify = Arc::new(move |_, event| events.lock().unwrap().push(event));
        let mut device = attached_telling("01:00.0", &gate, notify);
        let mut segment = PciSegment::new([0..=0xff]).unwrap();
        let port = segment.add_root_port(0).unwrap();
        let pci = Arc::new(segment);
        device.plug(&pci, port, 0).unwrap();
        let reads = || {
            let mut data = [0; 4];
            pci.read_config(GuestBdf::new(1, 0, 0).unwrap(), 8, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!((reads(), told.lock().unwrap().len()), (0, 0));
        gate.die();
        assert_eq!([reads(), reads()], [u32::MAX; 2]);
        assert_eq!(*told.lock().unwrap(), [DeviceEvent::Silent]);
    }

    #[test]
    fn the_owner_of_a_device_closes_it_and_not_a_vcpu() {
        let by = Arc::default();
        let device = Arc::new(Closed(Arc::clone(&by)));
        let vcpu = Arc::clone(&device);
        let slow = LEAVE_TIMEOUT + Duration::from_millis(100);
        let vcpu = thread::spawn(move || {
            sleep(slow);
            drop(vcpu);
        });
        drop(DrainOnDrop(device));
        let closed = *by.lock().unwrap();
        assert_eq!(closed, Some(thread::current().id()));
        vcpu.join().unwrap();
    }
}
