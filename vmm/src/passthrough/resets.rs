//! Resetting devices in parallel, those on one bus together. A host device takes a tenth of a second, a bus a
//! whole one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use gantry_resources::base::DeviceName;
use gantry_vfio::pci::{ResetScope, reset_scopes};

use super::device::AttachedDevice;
use super::error::DeviceError;
use crate::process::error::{HostError, cannot};
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads::{self, Task};

/// How long a reset may take. The kernel waits for some seconds at most, unless the device does not come back.
pub const RESET_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for devices to be closed after a reset failed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A reset that is to be done, and the devices that it resets.
pub struct Reset {
    /// Their places among the devices that were asked for.
    pub devices: Vec<usize>,
    /// Resets them.
    pub run: Box<dyn FnOnce() -> gantry_vfio::Result<()> + Send>,
}

/// The resets that reset all these devices of one VM.
pub fn resets_of(devices: &[&AttachedDevice]) -> Vec<Reset> {
    let functions: Vec<_> = devices.iter().map(|device| device.to_reset()).collect();
    let all: Vec<_> = functions.iter().map(|one| one.function()).collect();
    let scopes = reset_scopes(&all).into_iter();
    let reset = |devices: Vec<usize>| {
        let functions = devices.iter().filter_map(|index| functions.get(*index));
        let functions: Vec<_> = functions.cloned().collect();
        let run = move || {
            let functions = functions.iter().map(|one| one.function());
            ResetScope::new(functions).reset()
        };
        let run = Box::new(run);
        Reset { devices, run }
    };
    scopes.map(reset).collect()
}

/// Runs resets in parallel. Returns the places of the devices whose reset failed or took longer than `timeout`.
///
/// # Errors
/// No thread could be made.
pub fn reset_all(
    resets: Vec<Reset>,
    sandbox: &Sandbox,
    timeout: Duration,
) -> Result<Vec<usize>, HostError> {
    let mut tasks: Vec<(Vec<usize>, Task<_>)> = Vec::new();
    for Reset { devices, run } in resets {
        match threads::spawn(Role::Device, sandbox, run) {
            Ok(task) => tasks.push((devices, task)),
            Err(error) => {
                // Joining them would wait for resets without a deadline.
                tasks.into_iter().for_each(|(_, task)| task.abandon());
                return Err(cannot("spawn a thread")(error));
            }
        }
    }
    let deadline = Instant::now() + timeout;
    let mut failed = Vec::new();
    for (devices, task) in tasks {
        match task.join_until(deadline) {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "a device could not be reset");
            }
            Err(task) => task.abandon(),
        }
        failed.extend(devices);
    }
    Ok(failed)
}

/// Resets the buses of devices that have no reset of their own and have just been opened: unlike the others, the
/// kernel has not reset them. A bus stays as it is while the VM uses `others` on it.
///
/// # Errors
/// A reset failed or took too long. The devices are closed then, except those that do not come back in time.
pub fn reset_buses(
    devices: Vec<AttachedDevice>,
    others: &BTreeSet<DeviceName>,
    sandbox: &Sandbox,
) -> Result<Vec<AttachedDevice>, DeviceError> {
    let on_bus = |device: &AttachedDevice| -> Vec<DeviceName> {
        let function = device.to_reset();
        let names = function.function().on_bus().iter();
        names.filter_map(|name| name.parse().ok()).collect()
    };
    let opened: Vec<&AttachedDevice> = devices.iter().collect();
    let mut resets = resets_of(&opened);
    resets.retain(|reset| {
        let devices = reset.devices.iter().filter_map(|index| opened.get(*index));
        let on_bus: Vec<_> = devices.flat_map(|device| on_bus(device)).collect();
        !on_bus.is_empty() && !on_bus.iter().any(|name| others.contains(name))
    });
    let failed = reset_all(resets, sandbox, RESET_TIMEOUT)?;
    for index in &failed {
        if let Some(device) = devices.get(*index) {
            device.quarantine("its bus could not be reset");
        }
    }
    let first = failed.first().and_then(|index| devices.get(*index));
    match first.map(AttachedDevice::name) {
        Some(device) => {
            close(devices, sandbox);
            Err(DeviceError::BusReset { device })
        }
        None => Ok(devices),
    }
}

/// Closes devices on threads of their own, and does not wait for one whose reset hangs.
fn close(devices: Vec<AttachedDevice>, sandbox: &Sandbox) {
    let close = |device| threads::spawn(Role::Device, sandbox, move || drop(device));
    // Without a thread the device has been dropped, hence closed, here.
    let closing: Vec<_> = devices.into_iter().flat_map(close).collect();
    let deadline = Instant::now() + CLOSE_TIMEOUT;
    for late in closing.into_iter().map(|task| task.join_until(deadline)) {
        if let Err(task) = late {
            task.abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Mutex};

    use super::super::testing::{attached, attached_on_bus};
    use super::*;
    use crate::process::sandbox::SeccompMode;

    fn refused() -> gantry_vfio::Error {
        gantry_vfio::Error::Unusable {
            device: "01:00.0".to_owned(),
            why: "it does not come back".to_owned(),
        }
    }

    #[test]
    fn a_device_whose_reset_fails_or_hangs_is_named_and_the_others_are_reset() {
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let (let_go, stuck) = channel::<()>();
        let done = Arc::new(Mutex::new(false));
        let good = Arc::clone(&done);
        let reset = |devices, run| Reset { devices, run };
        let resets = vec![
            reset(
                vec![0, 3],
                Box::new(move || {
                    let _ = stuck.recv();
                    Ok(())
                }),
            ),
            reset(vec![1], Box::new(|| Err(refused()))),
            reset(
                vec![2],
                Box::new(move || {
                    *good.lock().unwrap() = true;
                    Ok(())
                }),
            ),
        ];
        // Long enough for the two that answer.
        let timeout = Duration::from_secs(2);
        let failed = reset_all(resets, &sandbox, timeout).unwrap();
        assert_eq!(failed, [0, 3, 1]);
        assert!(*done.lock().unwrap());
        drop(let_go);
    }

    #[test]
    fn the_bus_of_opened_devices_is_reset_unless_the_vm_uses_other_functions_on_it() {
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let bus = ["01:00.0", "01:00.1", "01:00.2"];
        let resets: Arc<Mutex<Vec<&str>>> = Arc::default();
        let reset = |name| {
            let resets = Arc::clone(&resets);
            move || {
                resets.lock().unwrap().push(name);
                Ok(())
            }
        };
        let opened = || {
            let (alone, _) = attached("02:00.0", reset("own"));
            let (first, _) = attached_on_bus("01:00.0", &bus, reset("bus"));
            let (second, _) = attached_on_bus("01:00.1", &bus, reset("bus"));
            vec![alone, first, second]
        };
        let others = |name: &str| BTreeSet::from([name.parse::<DeviceName>().unwrap()]);
        let seen = |others| {
            reset_buses(opened(), &others, &sandbox).unwrap();
            std::mem::take(&mut *resets.lock().unwrap())
        };
        // The kernel has reset the one that has a reset of its own.
        assert_eq!(seen(BTreeSet::new()), ["bus"]);
        assert_eq!(seen(others("03:00.0")), ["bus"]);
        assert!(seen(others("01:00.2")).is_empty());
    }

    #[test]
    fn a_device_whose_bus_cannot_be_reset_is_not_given_to_a_guest() {
        let sandbox = Sandbox::new(SeccompMode::Off).unwrap();
        let (device, reasons) = attached_on_bus("01:00.0", &["01:00.0"], || Err(refused()));
        let error = reset_buses(vec![device], &BTreeSet::new(), &sandbox);
        let error = error.err().unwrap();
        let said = error.to_string();
        assert!(said.contains("the bus of 0000:01:00.0"), "{said}");
        let late = Duration::from_secs(60);
        assert_eq!(reasons.recv_timeout(late).unwrap(), "its reset failed");
    }
}
