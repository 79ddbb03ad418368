//! The devices of a VM for tests.

use std::path::Path;
use std::sync::{Arc, Mutex};

use gantry_devices::events::PlatformEvents;
use gantry_devices::pci::PciSegment;
use gantry_devices::virtio::block::Rings;
use gantry_resources::base::HostPaths;
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceContext, HostDevices, SlotDevice};
use crate::info::VmEvent;
use crate::machine::{NoSpace, SlotTable};
use crate::passthrough::AttachedDevice;
use crate::process::sandbox::{Sandbox, SeccompMode};

/// The events that clients were sent.
pub type Told = Arc<Mutex<Vec<VmEvent>>>;

/// Plugs in devices of the host.
pub fn plug(devices: &mut HostDevices, passed: impl IntoIterator<Item = AttachedDevice>) {
    let all = passed.into_iter().map(SlotDevice::Passed);
    devices.plug_at_boot(all.collect()).unwrap();
}

/// A VM without devices and with two slots, where nothing can be attached later.
pub fn two_slots() -> (HostDevices, Arc<PciSegment>, Arc<PlatformEvents>, Told) {
    let mut pci = PciSegment::new([0..=2]).unwrap();
    let ports = [(); 2].map(|()| pci.add_root_port(0).unwrap());
    let pci = Arc::new(pci);
    let events = Arc::new(PlatformEvents::new(ports, EventFd::new(0).unwrap()));
    let told = Told::default();
    let all = Arc::clone(&told);
    let context = DeviceContext {
        host: HostPaths::under(Path::new("/nowhere")),
        sandbox: Arc::new(Sandbox::new(SeccompMode::Off).unwrap()),
        events: Arc::new(move |event| all.lock().unwrap().push(event)),
        status: Arc::default(),
        notify: Arc::new(|_, _| {}),
        rings: Rings::default(),
    };
    let slots = SlotTable::new(ports, &pci, Arc::new(NoSpace), &events);
    let devices = HostDevices::new(&slots, context).unwrap();
    (devices, pci, events, told)
}
