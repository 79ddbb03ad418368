//! Which functions are reset together, and in which order.

use std::cmp::Reverse;

use gantry_devices::warn_limited;

use super::device::PassthroughDevice;
use crate::Result;

/// Sorts functions of one VM into sets that are reset together, as their indexes: a function that is reset with
/// its bus, and all others on that bus; every other function alone.
pub fn reset_scopes(functions: &[&PassthroughDevice]) -> Vec<Vec<usize>> {
    let mut buses: Vec<&[String]> = functions.iter().map(|one| one.on_bus()).collect();
    // A bus below another one is reset with it.
    buses.sort_by_key(|bus| Reverse(bus.len()));
    let mut scopes: Vec<(Option<&[String]>, Vec<usize>)> = Vec::new();
    for (index, function) in functions.iter().enumerate() {
        let has = |bus: &&[String]| bus.iter().any(|name| name == function.name());
        let bus = buses.iter().copied().find(has);
        match scopes
            .iter_mut()
            .find(|(of, _)| bus.is_some() && *of == bus)
        {
            Some((_, scope)) => scope.push(index),
            None => scopes.push((bus, vec![index])),
        }
    }
    scopes.into_iter().map(|(_, scope)| scope).collect()
}

/// Functions of one VM that are reset together, as [`reset_scopes`] tells: one with a reset of its own, or those of
/// a bus.
pub struct ResetScope<'a>(Vec<&'a PassthroughDevice>);

impl<'a> ResetScope<'a> {
    /// Of these functions.
    pub fn new(functions: impl IntoIterator<Item = &'a PassthroughDevice>) -> Self {
        Self(functions.into_iter().collect())
    }

    /// Stops all functions, then resets them, then makes all ready for the guest. Every step is tried for
    /// every function. A function that cannot be reset stays as it is.
    ///
    /// # Errors
    /// The first that occurred: a function did not stop, a reset failed, or a function is not ready.
    pub fn reset(&self) -> Result<()> {
        let stopped = self.each(PassthroughDevice::stop);
        let reset = self.reset_hardware();
        let ready = self.each(PassthroughDevice::restart);
        stopped.and(reset).and(ready)
    }

    /// Resets the bus if a function needs that, else each function.
    fn reset_hardware(&self) -> Result<()> {
        let widest = self.0.iter().max_by_key(|one| one.on_bus().len());
        let bus = widest.filter(|one| !one.on_bus().is_empty());
        let Some(bus) = bus else {
            return self.each(reset_alone);
        };
        match bus.io().reset_bus() {
            // The others may have resets of their own.
            Err(error) if error.is_unsupported() => {
                let error = &error as &dyn std::error::Error;
                warn_limited!(device = bus.name(), error, "the bus is not reset");
                self.each(reset_alone)
            }
            Err(error) => {
                self.0.iter().for_each(|one| one.note_failed_reset());
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    fn each(&self, step: impl Fn(&PassthroughDevice) -> Result<()>) -> Result<()> {
        let done: Vec<_> = self.0.iter().map(|function| step(function)).collect();
        done.into_iter().collect()
    }
}

fn reset_alone(function: &PassthroughDevice) -> Result<()> {
    match function.reset_device() {
        Err(error) if error.is_unsupported() => {
            warn_limited!(
                device = function.name(),
                "the device has no reset: the guest finds it as it was left"
            );
            Ok(())
        }
        reset => reset,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::{CMD, FakeDevice, FakeRouter, FakeSpace, Trace, write_config};

    /// What ends a function's DMA, and what makes it ready.
    const OFF: [&str; 2] = [
        "write configuration space 0x44 [00]",
        "write configuration space 0x4 [00, 04]",
    ];

    /// Functions of one VM at these addresses; those of the second list have no reset of their own, and that of
    /// their bus resets the third.
    fn functions(
        trace: &Arc<Trace>,
        names: &[&str],
        of_bus: &[&str],
        on_bus: &[&str],
        shared: bool,
    ) -> Vec<Arc<PassthroughDevice>> {
        let function = |name: &&str| {
            let mut device = FakeDevice::new();
            device.trace = Arc::clone(trace);
            device.name = (*name).to_owned();
            if of_bus.contains(name) {
                device.resettable = false;
                device.on_bus = on_bus.iter().map(|name| (*name).to_owned()).collect();
                device.bus_shared = shared;
            }
            let device = Arc::new(device);
            let router = Arc::new(FakeRouter::new(trace, 1));
            let function = PassthroughDevice::new(device.clone(), router).unwrap();
            write_config(function.as_ref(), &FakeSpace(&device), CMD, &[4]);
            function
        };
        names.iter().map(function).collect()
    }

    fn resets(trace: &Trace) -> Vec<String> {
        let events = trace.take().into_iter();
        events.filter(|event| event.starts_with("reset")).collect()
    }

    #[test]
    fn functions_of_a_bus_are_reset_together_and_the_others_alone() {
        let trace = Arc::new(Trace::default());
        let scopes = |of_bus: &[&str], on_bus: &[&str]| {
            let names = ["0000:01:00.0", "0000:02:00.0", "0000:01:00.1"];
            let functions = functions(&trace, &names, of_bus, on_bus, false);
            reset_scopes(&functions.iter().map(AsRef::as_ref).collect::<Vec<_>>())
        };
        assert_eq!(scopes(&[], &[]), [vec![0], vec![1], vec![2]]);
        // One that has a reset of its own is on the bus all the same. Not all of the bus is this VM's.
        let bus = ["0000:01:00.0", "0000:01:00.1", "0000:01:00.2"];
        for of_bus in [&bus[..1], &bus[1..2], &bus[..2]] {
            assert_eq!(scopes(of_bus, &bus), [vec![0, 2], vec![1]], "{of_bus:?}");
        }
    }

    #[test]
    fn a_bus_is_reset_once_after_all_its_functions_have_stopped() {
        let trace = Arc::new(Trace::default());
        let names = ["0000:01:00.0", "0000:01:00.1"];
        let functions = functions(&trace, &names, &names[1..], &names, false);
        let scope = ResetScope::new(functions.iter().map(AsRef::as_ref));
        trace.take();
        scope.reset().unwrap();
        let reset = ["reset bus of 0000:01:00.1"];
        assert_eq!(trace.take(), [&OFF[..], &OFF, &reset, &OFF, &OFF].concat());
        assert!(functions.iter().all(|one| !one.reset_failed()));
        // The state of none is known after that.
        trace.fail_after(0);
        scope.reset().unwrap_err();
        assert_eq!(trace.failed().as_deref(), Some(reset[0]));
        assert!(functions.iter().all(|one| one.reset_failed()));
    }

    #[test]
    fn a_bus_that_others_have_functions_on_is_not_reset() {
        let trace = Arc::new(Trace::default());
        let names = ["0000:01:00.0", "0000:01:00.1"];
        let functions = functions(&trace, &names, &names[1..], &names, true);
        trace.take();
        let scope = ResetScope::new(functions.iter().map(AsRef::as_ref));
        scope.reset().unwrap();
        assert_eq!(resets(&trace), ["reset"], "the one that has a reset");
        assert!(functions.iter().all(|one| !one.reset_failed()));
    }

    #[test]
    fn all_functions_stop_before_any_is_reset_and_are_ready_after_all_are() {
        let trace = Arc::new(Trace::default());
        let names = ["0000:01:00.0", "0000:02:00.0"];
        let functions = functions(&trace, &names, &[], &[], false);
        let scope = ResetScope::new(functions.iter().map(AsRef::as_ref));
        trace.take();
        scope.reset().unwrap();
        assert_eq!(
            trace.take(),
            [&OFF[..], &OFF, &["reset", "reset"], &OFF, &OFF].concat()
        );

        trace.fail_after(0);
        scope.reset().unwrap_err();
        let resets = resets(&trace);
        assert!(
            !resets.is_empty(),
            "the other function is reset all the same"
        );
    }
}
