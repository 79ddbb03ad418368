//! The interrupts of a device as VFIO has them: the backend of the guest's messages, and the line of its pin.
//!
//! The guest never writes the hardware's own table and control register: VFIO owns them. A masked vector
//! keeps its place in VFIO, while its route holds back what the device raises.

use std::error::Error;
use std::sync::Arc;

use gantry_devices::pci::interrupts::{
    BackendError, ConnectError, MessageInterrupts, MessageKind, MsiLayout, MsixLayout,
    MsixStructures, OutsideBar, Triggers, VectorBackend,
};
use gantry_devices::pci::{IntxLine, MsiRouter};
use gantry_devices::warn_limited;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::host::{DeviceIo, Irq, Region};

/// The interrupts of a passed-through function.
pub(super) type Interrupts = MessageInterrupts<VfioVectors>;

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
    let backend = VfioVectors {
        io: Arc::clone(io),
        router: Arc::clone(&router),
        mode: Mode::Off,
        allocated: 0,
        pin: None,
        stuck: None,
    };
    Ok(Arc::new(Interrupts::new(msix, msi, backend, router)))
}

/// What the guest has enabled in a device. VFIO has one kind at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// No messages.
    Off,
    /// Message-signalled interrupts, of which the guest uses up to so many.
    Messages(Irq, u16),
}

/// The vectors that VFIO has for a device.
pub(super) struct VfioVectors {
    io: Arc<dyn DeviceIo>,
    router: Arc<dyn MsiRouter>,
    mode: Mode,
    /// How many vectors VFIO has allocated, from vector 0 on; 0 while the mode is off in the device.
    allocated: u16,
    /// The line that the interrupt pin is connected to.
    pin: Option<Box<dyn IntxLine>>,
    /// A kind that could not be disabled in the device. That is tried again before another is enabled.
    stuck: Option<Irq>,
}

impl VfioVectors {
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
        self.enable_intx(&trigger, &resample)?;
        self.io.disable_irqs(Irq::Intx)
    }

    /// Connects the interrupt pin to the line `gsi` of the interrupt controller, if it is not connected. The
    /// function has no messages: VFIO has one kind of interrupt at a time. Returns whether it is connected.
    pub fn connect_pin(&mut self, gsi: u32) -> bool {
        if self.pin.is_none() {
            match self.connect_line(gsi) {
                Ok(line) => self.pin = Some(line),
                Err(error) => {
                    let error = error.as_ref() as &dyn Error;
                    warn_limited!(device = self.io.name(), error, "INTx cannot be enabled");
                }
            }
        }
        self.pin.is_some()
    }

    /// Disconnects the interrupt pin.
    pub fn disconnect_pin(&mut self) {
        if let Some(_line) = self.pin.take() {
            self.disable_irqs(Irq::Intx);
        }
    }

    fn connect_line(&mut self, gsi: u32) -> Result<Box<dyn IntxLine>, BackendError> {
        self.release()?;
        let line = self.router.line(gsi)?;
        self.enable_intx(line.trigger(), line.resample())?;
        Ok(line)
    }

    fn enable_intx(&mut self, trigger: &EventFd, resample: &EventFd) -> crate::Result<()> {
        self.io.set_irqs(Irq::Intx, 0, &[Some(trigger)])?;
        let unmasked = self.io.unmask_by(Irq::Intx, resample);
        if unmasked.is_err() {
            self.disable_irqs(Irq::Intx);
        }
        unmasked
    }

    fn disable_irqs(&mut self, irq: Irq) {
        if let Err(error) = self.io.disable_irqs(irq) {
            self.stuck = Some(irq);
            warn_limited!(
                error = &error as &dyn Error,
                "{irq} stays enabled in the device"
            );
        }
    }

    /// Disables a kind that stayed enabled in the device.
    fn release(&mut self) -> crate::Result<()> {
        if let Some(irq) = self.stuck {
            self.io.disable_irqs(irq)?;
            self.stuck = None;
        }
        Ok(())
    }

    /// Enables the mode in the device with no vector connected, if it is not enabled.
    fn allocate(&mut self) -> crate::Result<()> {
        let Mode::Messages(irq, vectors) = self.mode else {
            return Ok(());
        };
        if self.allocated > 0 {
            return Ok(());
        }
        self.release()?;
        if irq == Irq::Msi {
            return self.allocate_msi(vectors);
        }
        self.io.set_irqs(irq, 0, &[None])?;
        self.allocated = 1;
        Ok(())
    }

    /// The vectors of MSI are consecutive, so the host allocates all at once. If it has not as many, the
    /// device gets the largest power of two, and raises the others with one of these.
    fn allocate_msi(&mut self, vectors: u16) -> crate::Result<()> {
        let mut count = vectors;
        loop {
            let none = vec![None; count.into()];
            match self.io.set_irqs(Irq::Msi, 0, &none) {
                Err(_) if count > 1 => count /= 2,
                result => {
                    result?;
                    self.allocated = count;
                    return Ok(());
                }
            }
        }
    }

    /// Allocates more vectors on a kernel that gives all at once: all are given up and connected again.
    fn grow(
        &mut self,
        irq: Irq,
        most: u16,
        new: (u16, &EventFd),
        connected: &Triggers,
    ) -> Result<(), ConnectError> {
        let before = self.allocated;
        self.io.disable_irqs(irq).map_err(one)?;
        self.allocated = 0;
        // Drivers unmask one vector after the other: with room for twice as many, the number of times that
        // all are given up grows only with the logarithm.
        let (vector, _) = new;
        let roomy = vector.saturating_add(1).next_power_of_two().min(most);
        let grown = self
            .connect_all(irq, roomy, Some(new), connected)
            .or_else(|_| self.connect_all(irq, vector + 1, Some(new), connected));
        if grown.is_err() {
            self.connect_all(irq, before, None, connected)
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
        irq: Irq,
        count: u16,
        new: Option<(u16, &EventFd)>,
        connected: &Triggers,
    ) -> crate::Result<()> {
        let trigger = |vector| match new {
            Some((number, trigger)) if number == vector => Some(trigger),
            _ => connected.get(vector),
        };
        let triggers: Vec<_> = (0..count).map(trigger).collect();
        self.io.set_irqs(irq, 0, &triggers)?;
        self.allocated = count;
        Ok(())
    }
}

impl VectorBackend for VfioVectors {
    fn name(&self) -> &str {
        self.io.name()
    }

    fn enable(&mut self, kind: MessageKind, vectors: u16) -> Result<(), BackendError> {
        let irq = match kind {
            MessageKind::Msi => Irq::Msi,
            MessageKind::Msix => Irq::Msix,
        };
        self.mode = Mode::Messages(irq, vectors);
        Ok(self.allocate()?)
    }

    fn connect(
        &mut self,
        vector: u16,
        trigger: &EventFd,
        connected: &Triggers,
    ) -> Result<(), ConnectError> {
        let Mode::Messages(irq, most) = self.mode else {
            return Err(ConnectError::One("interrupts are disabled".into()));
        };
        self.allocate().map_err(one)?;
        if vector < self.allocated || !self.io.irq(irq).fixed {
            let triggers = [Some(trigger)];
            return self.io.set_irqs(irq, vector.into(), &triggers).map_err(one);
        }
        if irq == Irq::Msi {
            let why = format!("the host has only {} MSI vectors for it", self.allocated);
            return Err(ConnectError::One(why.into()));
        }
        self.grow(irq, most, (vector, trigger), connected)
    }

    fn disable(&mut self) {
        if let Mode::Messages(irq, _) = self.mode
            && self.allocated > 0
        {
            self.disable_irqs(irq);
        }
        self.mode = Mode::Off;
        self.allocated = 0;
    }
}

fn one(error: crate::Error) -> ConnectError {
    ConnectError::One(error.into())
}

#[cfg(test)]
mod tests;
