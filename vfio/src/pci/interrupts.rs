//! The interrupts of a device as VFIO has them: the backend of the guest's messages and of its pin.
//!
//! The guest never writes the hardware's own table and control register: VFIO owns them. A masked vector
//! keeps its place in VFIO, while its route holds back what the device raises.

use std::sync::Arc;

use gantry_devices::pci::interrupts::{
    self, BackendError, ConnectError, InterruptBackend, MessageKind, MsiLayout, MsixLayout,
    MsixStructures, OutsideBar, Triggers,
};
use gantry_devices::pci::{IntxLine, MsiRouter};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::host::{DeviceIo, Irq, Region};

/// The interrupts of a passed-through function.
pub(super) type Interrupts = interrupts::Interrupts<VfioInterrupts>;

/// The interrupts of the device behind `io` with these capabilities, delivered through `router`; disabled.
///
/// # Errors
/// The table lies outside of the device's BARs.
pub(super) fn new(
    io: &Arc<dyn DeviceIo>,
    router: Arc<dyn MsiRouter>,
    msix: Option<&MsixLayout>,
    msi: Option<MsiLayout>,
) -> Result<Arc<Interrupts>, OutsideBar> {
    let bar_size = |bar| Region::bar(bar).map_or(0, |region| io.region(region).size);
    let msix = msix.map(|layout| MsixStructures::new(layout, bar_size));
    let msix = msix.transpose()?;
    let backend = VfioInterrupts {
        io: Arc::clone(io),
        enabled: Enabled::Nothing,
    };
    Ok(Arc::new(Interrupts::new(msix, msi, backend, router)))
}

/// How many MSI vectors the host has for the device: less than the device can raise where the host does not
/// remap interrupts, or is short of them. MSI is enabled and disabled again, if that is in question.
///
/// # Errors
/// MSI cannot be disabled again.
pub(super) fn grantable_msi(io: &dyn DeviceIo) -> crate::Result<u16> {
    let most = io.irq(Irq::Msi).count.min(32) as u16;
    if most <= 1 {
        return Ok(most);
    }
    match enable_msi(io, most, |_| None) {
        Ok(granted) => io.disable_irqs(Irq::Msi).map(|()| granted),
        Err(_) => Ok(0),
    }
}

/// Enables MSI with as many of `vectors` vectors, a power of two, as the host has, and returns their number. The
/// vectors of MSI are consecutive, so the host allocates all at once.
fn enable_msi<'a>(
    io: &dyn DeviceIo,
    vectors: u16,
    trigger: impl Fn(u16) -> Option<&'a EventFd>,
) -> crate::Result<u16> {
    let mut count = vectors;
    loop {
        let triggers: Vec<_> = (0..count).map(&trigger).collect();
        match io.set_irqs(Irq::Msi, 0, &triggers) {
            Err(error) if count > 1 && error.is_vector_shortage() => count /= 2,
            result => return result.map(|()| count),
        }
    }
}

/// What VFIO has enabled in a device: one kind of interrupts at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Enabled {
    Nothing,
    /// A kind, with so many vectors allocated, from 0 on.
    Kind(Irq, u16),
    /// A kind that could not be disabled. That is tried again before another is enabled.
    Stuck(Irq),
}

/// The interrupts that VFIO has for a device.
pub(super) struct VfioInterrupts {
    io: Arc<dyn DeviceIo>,
    enabled: Enabled,
}

impl VfioInterrupts {
    /// Enables INTx in the device and disables it again: some devices cannot be unmasked by an eventfd, and the
    /// host may have no line for the device.
    ///
    /// # Errors
    /// The pin cannot be connected.
    pub fn probe_pin(&mut self) -> crate::Result<()> {
        let event = || {
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| crate::Error::Device {
                device: self.io.name().to_owned(),
                place: "making an eventfd for INTx".to_owned(),
                source,
            })
        };
        let (trigger, resample) = (event()?, event()?);
        let enabled = self.enable_intx(&trigger, &resample);
        let disabled = self.release();
        enabled.and(disabled)
    }

    fn enable_intx(&mut self, trigger: &EventFd, resample: &EventFd) -> crate::Result<()> {
        self.release()?;
        self.io.set_irqs(Irq::Intx, 0, &[Some(trigger)])?;
        self.enabled = Enabled::Kind(Irq::Intx, 1);
        self.io.unmask_by(Irq::Intx, resample)
    }

    /// Disables what is enabled in the device.
    fn release(&mut self) -> crate::Result<()> {
        if let Enabled::Kind(irq, _) | Enabled::Stuck(irq) = self.enabled {
            self.enabled = Enabled::Stuck(irq);
            self.io.disable_irqs(irq)?;
            self.enabled = Enabled::Nothing;
        }
        Ok(())
    }

    /// Allocates more vectors on a kernel that gives all at once: all are given up and connected again.
    fn grow(
        &mut self,
        before: u16,
        new: (u16, &EventFd),
        connected: &Triggers,
    ) -> Result<(), ConnectError> {
        let most = self.io.irq(Irq::Msix).count;
        self.io.disable_irqs(Irq::Msix).map_err(one)?;
        self.enabled = Enabled::Nothing;
        // Drivers unmask one vector after the other: with room for twice as many, the number of times that
        // all are given up grows only with the logarithm.
        let (vector, _) = new;
        let roomy = u32::from(vector + 1).next_power_of_two().min(most) as u16;
        let grown = self
            .connect_all(roomy, Some(new), connected)
            .or_else(|_| self.connect_all(vector + 1, Some(new), connected));
        if grown.is_err() {
            self.connect_all(before, None, connected)
                .map_err(|lost| ConnectError::All(lost.into()))?;
        }
        // Interrupts that arrived in between are lost; drivers cope with an interrupt too many.
        for trigger in connected.all() {
            trigger.write(1).ok();
        }
        grown.map_err(one)
    }

    fn connect_all(
        &mut self,
        count: u16,
        new: Option<(u16, &EventFd)>,
        connected: &Triggers,
    ) -> crate::Result<()> {
        let trigger = |vector| match new {
            Some((number, trigger)) if number == vector => Some(trigger),
            _ => connected.get(vector),
        };
        let triggers: Vec<_> = (0..count).map(trigger).collect();
        self.io.set_irqs(Irq::Msix, 0, &triggers)?;
        self.enabled = Enabled::Kind(Irq::Msix, count);
        Ok(())
    }
}

impl InterruptBackend for VfioInterrupts {
    fn name(&self) -> &str {
        self.io.name()
    }

    fn enable(
        &mut self,
        kind: MessageKind,
        vectors: u16,
        triggers: &Triggers,
    ) -> Result<u16, BackendError> {
        self.release()?;
        match kind {
            MessageKind::Msi => {
                let trigger = |vector| triggers.get(vector);
                let granted = enable_msi(self.io.as_ref(), vectors, trigger)?;
                self.enabled = Enabled::Kind(Irq::Msi, granted);
                Ok(granted)
            }
            MessageKind::Msix => {
                self.connect_all(1, None, triggers)?;
                Ok(vectors)
            }
        }
    }

    fn connect(
        &mut self,
        vector: u16,
        trigger: &EventFd,
        connected: &Triggers,
    ) -> Result<(), ConnectError> {
        match self.enabled {
            Enabled::Kind(irq, allocated) if vector < allocated || !self.io.irq(irq).fixed => {
                let triggers = [Some(trigger)];
                self.io.set_irqs(irq, vector.into(), &triggers).map_err(one)
            }
            Enabled::Kind(Irq::Msix, allocated) => {
                self.grow(allocated, (vector, trigger), connected)
            }
            _ => Err(ConnectError::One("the host has no such vector".into())),
        }
    }

    fn connect_pin(&mut self, line: &dyn IntxLine) -> Result<(), BackendError> {
        Ok(self.enable_intx(line.trigger(), line.resample())?)
    }

    fn disable(&mut self) -> Result<(), BackendError> {
        Ok(self.release()?)
    }
}

fn one(error: crate::Error) -> ConnectError {
    ConnectError::One(error.into())
}

#[cfg(test)]
mod tests;
