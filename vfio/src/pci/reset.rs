//! Which functions are reset together, and in which order.

use gantry_devices::warn_limited;

use super::device::PassthroughDevice;
use crate::Result;

/// Functions of one VM that are reset together: now always one, with a function-level reset. The functions of a
/// bus will be more.
pub(super) struct ResetScope<'a>(Vec<&'a PassthroughDevice>);

impl<'a> ResetScope<'a> {
    pub fn new(functions: impl IntoIterator<Item = &'a PassthroughDevice>) -> Self {
        Self(functions.into_iter().collect())
    }

    /// Stops all functions, then resets them, then makes all ready for the guest. Every step is tried for
    /// every function.
    ///
    /// # Errors
    /// The first that occurred: a function did not stop, could not be reset, or is not ready.
    pub fn reset(&self) -> Result<()> {
        let stopped = self.each(PassthroughDevice::stop);
        let reset = self.each(|function| match function.reset_device() {
            Err(error) if error.is_unsupported() => {
                warn_limited!(
                    device = function.name(),
                    "the device has no reset of its own: the guest finds it as the guest left it"
                );
                Ok(())
            }
            reset => reset,
        });
        let ready = self.each(PassthroughDevice::restart);
        stopped.and(reset).and(ready)
    }

    fn each(&self, step: impl Fn(&PassthroughDevice) -> Result<()>) -> Result<()> {
        let done: Vec<_> = self.0.iter().map(|function| step(function)).collect();
        done.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::{CMD, FakeDevice, FakeRouter, FakeSpace, Trace, write_config};

    #[test]
    fn all_functions_stop_before_any_is_reset_and_are_ready_after_all_are() {
        let trace = Arc::new(Trace::default());
        let functions = [(); 2].map(|()| {
            let mut device = FakeDevice::new();
            device.trace = Arc::clone(&trace);
            let device = Arc::new(device);
            let router = Arc::new(FakeRouter::new(&trace, 1));
            let function = PassthroughDevice::new(device.clone(), router).unwrap();
            write_config(function.as_ref(), &FakeSpace(&device), CMD, &[4]);
            function
        });
        let scope = ResetScope::new(functions.iter().map(AsRef::as_ref));
        trace.take();
        scope.reset().unwrap();
        let off = [
            "write configuration space 0x44 [00]",
            "write configuration space 0x4 [00, 04]",
        ];
        assert_eq!(
            trace.take(),
            [&off[..], &off, &["reset", "reset"], &off, &off].concat()
        );

        trace.fail_after(0);
        ResetScope::new(functions.iter().map(AsRef::as_ref))
            .reset()
            .unwrap_err();
        let resets = trace.take().into_iter().filter(|event| event == "reset");
        assert!(
            resets.count() >= 1,
            "the other function is reset all the same"
        );
    }
}
