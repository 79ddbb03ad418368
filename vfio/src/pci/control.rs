//! The registers of a passed function that the hardware follows in one place: command, power state, and with
//! them the interrupt mode.

use gantry_devices::pci::Decode;
use gantry_devices::pci::interrupts::InterruptMode;
use gantry_devices::pci::registers as reg;

use super::config::PowerCapability;
use crate::Result;
use crate::host::{DeviceIo, Region};

/// What takes effect in [`gantry_devices::pci::PciDevice::remap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Control {
    pub command: u16,
    /// The power state, 0 for D0 to 3 for D3hot.
    pub power: u8,
    pub interrupts: InterruptMode,
}

impl Control {
    pub const AT_RESET: Self = Self {
        command: 0,
        power: 0,
        interrupts: InterruptMode::Off,
    };

    /// Outside D0 nothing is decoded (PCI Express Base Specification 6.0, 5.3.1).
    pub fn decode(self) -> Decode {
        match self.power {
            0 => Decode::from_command(self.command),
            _ => Decode::NONE,
        }
    }

    /// The power state comes first: outside of D0 a function may lose other writes.
    pub fn write(self, io: &dyn DeviceIo, power: Option<PowerCapability>, pin: Pin) -> Result<()> {
        if let Some(power) = power {
            io.write(Region::CONFIG, power.control.into(), &[self.power])?;
        }
        let command = match pin {
            Pin::Disabled => self.command | reg::COMMAND_INTX_DISABLE,
            Pin::Enabled => self.command & !reg::COMMAND_INTX_DISABLE,
            Pin::AsGuestSays => self.command,
        };
        io.write(Region::CONFIG, reg::COMMAND.into(), &command.to_le_bytes())
    }
}

/// What is written to Interrupt Disable in the device's command register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pin {
    /// The bit is set: nothing handles the device's interrupts, and the pin would disturb devices that share its
    /// line on the host.
    Disabled,
    /// The bit is clear.
    Enabled,
    /// The guest's own bit: the pin is connected, or messages are enabled. Some devices send no messages either
    /// while the bit is set.
    AsGuestSays,
}

impl Pin {
    /// What comes before a mode ends. The pin is disabled before VFIO stops handling it.
    ///
    /// VFIO has a copy of the bit, and writes the hardware's only where the copy changes. At the end of messages,
    /// the kernel clears the hardware's alone: with the copy clear too, the bit can be set again.
    pub fn before_leaving(mode: InterruptMode) -> Option<Self> {
        match mode {
            InterruptMode::Off => None,
            InterruptMode::Intx(_) => Some(Self::Disabled),
            InterruptMode::Messages(..) => Some(Self::Enabled),
        }
    }
}
