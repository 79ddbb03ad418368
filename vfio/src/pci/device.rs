//! The passed-through function: configuration space, BARs and interrupts of a host device.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_devices::pci::interrupts::InterruptMode;
use gantry_devices::pci::registers as reg;
use gantry_devices::pci::{Backing, BarSet, BarSpace, ConfigSpace, Decode, MsiRouter, PciDevice};
use gantry_devices::warn_limited;

use super::bars;
use super::config::{
    self, Deliverable, MsiCapability, POWER_STATE, Plan, PowerCapability, STATUS_INTX,
};
use super::control::{Control, Pin};
use super::hardware::{Hardware, read_config};
use super::interrupts::{self, Interrupts, VfioInterrupts};
use super::reset::ResetScope;
use super::rom::{self, Rom};
use crate::host::{DeviceIo, Irq};
use crate::{Error, Result};

/// The largest physical address width of an x86 guest; the owner of the guest's address space knows the
/// actual one.
const MAX_ADDRESS_BITS: u8 = 52;

/// A host device as a PCI function of the guest.
///
/// At first decoding, bus mastering and interrupts are off. The guest's writes to the command register and to
/// the power state, and its choice of interrupts, take effect in [`PciDevice::remap`], which
/// [`PciDevice::write_config`] asks for: so no vCPU reaches a BAR that the hardware no longer decodes, and one
/// place only sets Bus Master and Interrupt Disable in the hardware.
pub struct PassthroughDevice {
    // Dropped in this order: a mapped BAR keeps the device open, and with it the group. This lock is taken
    // before that of the interrupts.
    state: Mutex<State>,
    interrupts: Arc<Interrupts>,
    /// Offset of the message control register of MSI-X.
    msix_control: Option<u16>,
    msi: Option<MsiCapability>,
    /// The guest gets INTx.
    intx: bool,
    io: Arc<dyn DeviceIo>,
    power: Option<PowerCapability>,
    /// The configuration space after a reset.
    at_reset: ConfigSpace,
    /// A reset of the device has failed.
    reset_failed: AtomicBool,
}

/// Whether the device answers, as far as is known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
    Answers,
    /// It does not, which its owner has yet to be told.
    FellSilent,
    /// It does not, which its owner knows.
    Silent,
}

struct State {
    space: ConfigSpace,
    bars: BarSet,
    /// The registers that the hardware has; `None` if they are unknown.
    hardware: Option<Control>,
    presence: Presence,
    /// The function resets itself with the next write of its power state: its messages end then.
    resets_itself: bool,
    /// The function was taken away from the guest.
    retired: bool,
}

/// What a function may lack, and what of it comes from elsewhere.
#[derive(Debug, Clone, Default)]
pub struct PassthroughOptions {
    /// The device may have no interrupts.
    pub no_interrupts: bool,
    /// Its expansion ROM.
    pub rom: Rom,
}

impl PassthroughDevice {
    /// Makes a function of the device behind `io`, freshly opened and so reset, that interrupts
    /// through `router`.
    ///
    /// # Errors
    /// The device cannot be reached, is invalid, or has no interrupts.
    pub fn new(io: Arc<dyn DeviceIo>, router: Arc<dyn MsiRouter>) -> Result<Arc<Self>> {
        Self::with(io, router, PassthroughOptions::default())
    }

    /// As [`Self::new`], with options.
    ///
    /// # Errors
    /// The device cannot be reached, is invalid, or has no interrupts and needs some.
    pub fn with(
        io: Arc<dyn DeviceIo>,
        router: Arc<dyn MsiRouter>,
        options: PassthroughOptions,
    ) -> Result<Arc<Self>> {
        let unusable = |why: String| Error::Unusable {
            device: io.name().to_owned(),
            why,
        };
        let physical = read_config(io.as_ref())?;
        let has = |irq| io.irq(irq).count > 0;
        let deliverable = Deliverable {
            msi: interrupts::grantable_msi(io.as_ref())?,
            msix: has(Irq::Msix),
            intx: has(Irq::Intx),
        };
        let mut plan = config::plan(&physical, deliverable).map_err(|why| unusable(why.into()))?;
        let msix = plan.msix.as_ref().map(|msix| &msix.layout);
        let msi = plan.msi.map(|msi| msi.layout);
        let interrupts =
            interrupts::new(&io, router, msix, msi).map_err(|error| unusable(error.to_string()))?;
        let mut bars = bars::open(&io, &physical, &interrupts)?;
        bars.extend(rom::open(&io, options.rom));
        let bars = BarSet::new(io.name(), bars, MAX_ADDRESS_BITS)
            .map_err(|error| unusable(error.to_string()))?;
        let power = plan.power;
        Control::AT_RESET.write(io.as_ref(), power, Pin::Disabled)?;
        let refused = probe_pin(&mut plan, &interrupts);
        if !options.no_interrupts && plan.msix.is_none() && plan.msi.is_none() && !plan.intx {
            return Err(Error::NoInterrupts {
                device: io.name().to_owned(),
                source: refused.map(Box::new),
            });
        }
        if let Some(error) = &refused {
            let error = error as &dyn std::error::Error;
            tracing::info!(device = io.name(), error, "the guest gets no INTx");
        }
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                space: plan.space.clone(),
                bars,
                hardware: Some(Control::AT_RESET),
                presence: Presence::Answers,
                resets_itself: false,
                retired: false,
            }),
            io,
            interrupts,
            msix_control: plan.msix.map(|msix| msix.control),
            msi: plan.msi,
            intx: plan.intx,
            power,
            at_reset: plan.space,
            reset_failed: AtomicBool::new(false),
        }))
    }

    /// Sets the interrupt controller's line of the interrupt pin, if the guest gets INTx. `line` gives the line
    /// of each pin of the function's slot, 0 for INTA to 3 for INTD.
    pub fn set_line(&self, line: impl Fn(u8) -> u32) {
        let [pin]: [u8; 1] = self.lock().space.get(reg::INTERRUPT_PIN);
        self.interrupts.set_line(pin.checked_sub(1).map(line));
    }

    /// Whether a reset of the device has failed: its state is unknown then.
    pub fn reset_failed(&self) -> bool {
        self.reset_failed.load(Ordering::Relaxed)
    }

    /// Whether the device does not answer.
    pub fn is_silent(&self) -> bool {
        Hardware(self.io.as_ref()).is_silent()
    }

    /// Takes the function away from the guest for good: its mappings, interrupts and DMA have ended when this
    /// returns. Later writes of a vCPU to its configuration space have no effect.
    ///
    /// # Errors
    /// The device did not confirm that it has stopped, and could not be reset.
    pub fn retire(&self) -> Result<()> {
        let mut state = self.lock();
        state.retired = true;
        self.quiesce(&mut state)
            .or_else(|error| self.reset_device().map_err(|_| error))
    }

    /// Stops the function, and gives the guest its registers as they are after a reset. Bus mastering ends
    /// even where the device has no reset.
    pub(super) fn stop(&self) -> Result<()> {
        let mut state = self.lock();
        let quiesced = self.quiesce(&mut state);
        state.bars.unassign();
        state.space = self.at_reset.clone();
        quiesced
    }

    /// Makes the function ready for the guest after a reset, which may leave the command register as it was. Some
    /// devices do not come back from a reset.
    pub(super) fn restart(&self) -> Result<()> {
        let mut state = self.lock();
        state.hardware = None;
        let followed = self.follow(&mut state.hardware, Control::AT_RESET);
        state.presence = Presence::Answers;
        self.listen(&mut state.presence);
        if state.presence == Presence::Answers {
            return followed;
        }
        self.note_failed_reset();
        Err(Error::Silent {
            device: self.name().to_owned(),
        })
    }

    /// Finds out whether the device still answers. Once it does not, it is not asked again before it is reset.
    fn listen(&self, presence: &mut Presence) {
        if *presence == Presence::Answers && self.is_silent() {
            *presence = Presence::FellSilent;
        }
    }

    /// Whether the device has stopped to answer: it was removed, or has failed. True once for each time.
    pub fn has_fallen_silent(&self) -> bool {
        let mut state = self.lock();
        let fell = state.presence == Presence::FellSilent;
        if fell {
            state.presence = Presence::Silent;
        }
        fell
    }

    /// Resets the device.
    ///
    /// # Errors
    /// The device has no reset of its own, or the reset failed.
    pub(super) fn reset_device(&self) -> Result<()> {
        self.io.reset().inspect_err(|error| {
            if !error.is_unsupported() {
                self.note_failed_reset();
            }
        })
    }

    /// The state of the device is not known any more.
    pub(super) fn note_failed_reset(&self) {
        self.reset_failed.store(true, Ordering::Relaxed);
    }

    /// The device on the host.
    pub(super) fn io(&self) -> &dyn DeviceIo {
        self.io.as_ref()
    }

    /// The host addresses of the functions that are reset with its bus; none if it has a reset of its own, or its
    /// bus cannot be reset.
    pub fn on_bus(&self) -> &[String] {
        self.io.on_bus()
    }

    /// Ends mappings, bus mastering and interrupts. The device completes the write to the command register
    /// after all its earlier writes to memory (PCI Express Base Specification 6.0, 2.4.1).
    fn quiesce(&self, state: &mut State) -> Result<()> {
        state.bars.unmap();
        let followed = self.follow(&mut state.hardware, Control::AT_RESET);
        self.interrupts.reset();
        followed
    }

    /// The device's address on the host.
    pub fn name(&self) -> &str {
        self.io.name()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes a guest's write to its interrupt capabilities on.
    fn follow_interrupts(&self, space: &ConfigSpace, offset: u16, data: &[u8]) {
        if let Some(control) = self.msix_control
            && touches(offset, data, control..control + 2)
        {
            let control = u16::from_le_bytes(space.get(control));
            self.interrupts.write_msix_control(control);
        }
        if let Some(msi) = self.msi
            && touches(offset, data, msi.offset + 2..msi.offset + msi.layout.size())
        {
            self.interrupts.write_msi(&space.get(msi.offset));
        }
    }

    /// Sets the pending bits of MSI, if the guest is about to read them.
    fn update_pending(&self, space: &mut ConfigSpace, offset: u16, data: &[u8]) {
        if let Some(msi) = self.msi
            && let Some(pending) = msi.layout.pending().map(|pending| msi.offset + pending)
            && touches(offset, data, pending..pending + 4)
        {
            space.set(pending, &self.interrupts.msi_pending().to_le_bytes());
        }
    }

    /// Sets the INTx bit of the status register, if the guest is about to read it.
    fn update_status(&self, space: &mut ConfigSpace, offset: u16, data: &[u8]) {
        if self.intx && touches(offset, data, reg::STATUS..reg::STATUS + 1) {
            let mut hardware = [0];
            Hardware(self.io.as_ref()).read(reg::STATUS, &mut hardware);
            let [status]: [u8; 1] = space.get(reg::STATUS);
            let asserted = hardware[0] & STATUS_INTX;
            space.set(reg::STATUS, &[status & !STATUS_INTX | asserted]);
        }
    }

    /// The guest's settings. The pin is connected only while the guest has enabled the function.
    fn control(&self, space: &ConfigSpace) -> Control {
        const ENABLED: u16 = reg::COMMAND_IO | reg::COMMAND_MEMORY | reg::COMMAND_BUS_MASTER;
        let state = |power: PowerCapability| space.get::<1>(power.control)[0] & POWER_STATE;
        let command = u16::from_le_bytes(space.get(reg::COMMAND));
        Control {
            command,
            power: self.power.map_or(0, state),
            interrupts: self.interrupts.wanted(command & ENABLED != 0),
        }
    }

    /// Has the hardware follow the guest's settings, unless it has them already. If an interrupt mode cannot be
    /// entered, that is tried again at the guest's next write.
    fn follow(&self, hardware: &mut Option<Control>, control: Control) -> Result<()> {
        if *hardware == Some(control) {
            return Ok(());
        }
        *hardware = None;
        let io = self.io.as_ref();
        let before = self.interrupts.mode();
        if before != control.interrupts
            && let Some(pin) = Pin::before_leaving(before)
        {
            control.write(io, self.power, pin)?;
        }
        let entered = self.interrupts.switch(control.interrupts);
        let pin = match control.interrupts {
            InterruptMode::Intx(_) | InterruptMode::Messages(..) if entered => Pin::AsGuestSays,
            _ => Pin::Disabled,
        };
        control.write(io, self.power, pin)?;
        *hardware = entered.then_some(control);
        Ok(())
    }
}

/// Tries to connect the pin that the guest is to get. If it cannot be connected, the guest gets none. Returns
/// why.
fn probe_pin(plan: &mut Plan, interrupts: &Interrupts) -> Option<Error> {
    if !plan.intx {
        return None;
    }
    let refused = interrupts.with_backend(VfioInterrupts::probe_pin).err()?;
    plan.intx = false;
    plan.space.set(reg::INTERRUPT_PIN, &[0]);
    Some(refused)
}

impl Drop for PassthroughDevice {
    /// Takes a function that has not retired away from the guest; the last user closes the device.
    fn drop(&mut self) {
        let mut state = self.lock();
        if !state.retired
            && let Err(error) = self.quiesce(&mut state)
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the device may not have stopped");
        }
    }
}

impl PciDevice for PassthroughDevice {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.lock();
        if BarSet::handles(offset) {
            state.bars.read(offset, data);
        } else {
            self.update_pending(&mut state.space, offset, data);
            self.update_status(&mut state.space, offset, data);
            state.space.read(offset, data, &Hardware(self.io.as_ref()));
            if data.iter().all(|byte| *byte == u8::MAX) {
                self.listen(&mut state.presence);
            }
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> bool {
        let mut guard = self.lock();
        let State {
            space,
            bars,
            hardware,
            resets_itself,
            retired,
            ..
        } = &mut *guard;
        if *retired {
            return false;
        }
        let before = self.control(space);
        if BarSet::handles(offset) {
            bars.write(offset, data);
        } else {
            space.write(offset, data, &Hardware(self.io.as_ref()));
        }
        let power = self.control(space).power;
        if let Some(capability) = self.power.filter(|capability| !capability.supports(power)) {
            // The guest cannot enter a power state that the function does not have.
            let [low]: [u8; 1] = space.get(capability.control);
            space.set(capability.control, &[low & !POWER_STATE | before.power]);
        }
        self.follow_interrupts(space, offset, data);
        let after = self.control(space).power;
        if let Some(power) = self.power
            && power.resets(before.power, after)
        {
            // VFIO restores the hardware's registers; the guest finds them as after any reset.
            bars.unassign();
            *space = self.at_reset.clone();
            *resets_itself = true;
        }
        let control = self.control(space);
        *hardware != Some(control) || bars.is_stale(control.decode())
    }

    /// A BAR is mapped only while the hardware decodes it: an access to any other ends the VM. BARs that the
    /// hardware decodes before and after are remapped first, the others after the hardware has followed.
    fn remap(&self, target: &dyn BarSpace) {
        let mut guard = self.lock();
        let State {
            space,
            bars,
            hardware,
            resets_itself,
            retired,
            ..
        } = &mut *guard;
        if *retired {
            return;
        }
        let control = self.control(space);
        let decode = control.decode();
        if *hardware != Some(control) {
            let before = hardware.map_or(Decode::NONE, Control::decode);
            let throughout = Decode {
                memory: before.memory && decode.memory,
                io: before.io && decode.io,
            };
            bars.remap(throughout, target, || ());
            let followed = self.follow(hardware, control).and_then(|()| {
                if !std::mem::take(resets_itself) {
                    return Ok(());
                }
                self.interrupts.reset();
                self.follow(hardware, self.control(space))
            });
            if let Err(error) = followed {
                let error = &error as &dyn std::error::Error;
                warn_limited!(error, "device does not follow its command register");
                return;
            }
        }
        bars.remap(decode, target, || ());
    }

    fn reset(&self, _space: &dyn BarSpace) -> io::Result<()> {
        ResetScope::new([self]).reset().map_err(io::Error::other)
    }
}

/// Whether an access of `data` at `offset` covers a byte of `registers`.
fn touches(offset: u16, data: &[u8], registers: Range<u16>) -> bool {
    let (start, end) = (usize::from(offset), usize::from(offset) + data.len());
    start < usize::from(registers.end) && usize::from(registers.start) < end
}

#[cfg(test)]
mod tests;
