//! The common configuration of a virtio device (section 4.1.4.3) as a state machine without side effects.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::signals::Signals;

/// Bytes of the common configuration.
pub const COMMON_LEN: u64 = 0x38;
/// Offset of the device status.
pub const STATUS: u64 = 0x14;
/// The feature bits of the transport: virtio 1, event indices and indirect descriptors.
const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
/// The bits that a driver may set.
const SETTABLE: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// What the device has to do after a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    None,
    /// The driver is ready: the queues are to be served.
    Start,
    /// The driver resets the device.
    Reset,
}

/// The registers of a queue.
#[derive(Debug, Clone, Copy)]
struct QueueRegisters {
    max: u16,
    size: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueRegisters {
    const fn new(max: u16) -> Self {
        Self {
            max,
            size: max,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }

    fn build(&self, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(self.max)?;
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(self.available))?;
        queue.try_set_used_ring_address(GuestAddress(self.used))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// The common configuration.
#[derive(Debug)]
pub struct Transport {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    status: u8,
    selected: u16,
    queues: Vec<QueueRegisters>,
}

impl Transport {
    /// The registers of a device that offers `features` beside those of the transport, with queues of at most
    /// these sizes.
    pub fn new(features: u64, sizes: &[u16]) -> Self {
        Self {
            offered: features | FEATURES,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            status: 0,
            selected: 0,
            queues: sizes.iter().copied().map(QueueRegisters::new).collect(),
        }
    }

    /// The device status, 0 after a reset.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The feature bits that the driver has accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Sets all registers back.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max).collect();
        *self = Self::new(self.offered, &sizes);
    }

    /// The queues that the driver has enabled, with their numbers.
    ///
    /// # Errors
    /// The driver has set up a queue as none can be.
    pub fn queues(&self) -> Result<Vec<(u16, Queue)>, virtio_queue::Error> {
        let event_idx = self.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        (0..)
            .zip(&self.queues)
            .filter(|(_, queue)| queue.enabled)
            .map(|(index, queue)| Ok((index, queue.build(event_idx)?)))
            .collect()
    }

    /// Fills `data` from `offset` on; zeros past the end.
    pub fn read(&self, offset: u64, data: &mut [u8], signals: &Signals) {
        let registers = self.registers(signals);
        for (byte, at) in data.iter_mut().zip(offset..) {
            let register = usize::try_from(at).ok().and_then(|at| registers.get(at));
            *byte = register.copied().unwrap_or(0);
        }
    }

    fn registers(&self, signals: &Signals) -> [u8; COMMON_LEN as usize] {
        let mut bytes = [0; COMMON_LEN as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0x00, &self.device_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_select).to_le_bytes());
        put(0x08, &self.driver_select.to_le_bytes());
        put(0x0c, &half(self.accepted, self.driver_select).to_le_bytes());
        put(0x10, &signals.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        let needs_reset = match signals.is_broken() {
            true => NEEDS_RESET,
            false => 0,
        };
        put(STATUS as usize, &[self.status | needs_reset]);
        put(STATUS as usize + 1, &[signals.generation()]);
        put(0x16, &self.selected.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.selected)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &signals.queue_vector(self.selected).to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            // Each queue has a doorbell of its own.
            put(0x1e, &self.selected.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        bytes
    }

    /// Takes a driver's write at `offset`. A driver has to write each register as a whole, and 64-bit registers
    /// in halves (section 4.1.3.1); other writes are lost.
    pub fn write(&mut self, offset: u64, data: &[u8], signals: &Signals) -> Step {
        match *data {
            [byte] if offset == STATUS => return self.set_status(byte),
            [low, high] => self.write_word(offset, u16::from_le_bytes([low, high]), signals),
            [a, b, c, d] => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
        Step::None
    }

    fn write_word(&mut self, offset: u64, value: u16, signals: &Signals) {
        match offset {
            0x10 => signals.set_config_vector(value),
            0x16 => self.selected = value,
            0x1a => signals.set_queue_vector(self.selected, value),
            _ => {}
        }
        let Some(queue) = self.disabled() else {
            return;
        };
        match offset {
            0x18 if value.is_power_of_two() && value <= queue.max => queue.size = value,
            0x1c if value == 1 => queue.enabled = true,
            _ => {}
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.device_select = value,
            0x08 => self.driver_select = value,
            // Features are agreed on once.
            0x0c if self.status & FEATURES_OK == 0 => {
                self.accepted = with_half(self.accepted, self.driver_select, value);
            }
            _ => {}
        }
        let Some(queue) = self.disabled() else {
            return;
        };
        let (address, half) = match offset {
            0x20 | 0x24 => (&mut queue.descriptors, offset - 0x20),
            0x28 | 0x2c => (&mut queue.available, offset - 0x28),
            0x30 | 0x34 => (&mut queue.used, offset - 0x30),
            _ => return,
        };
        *address = with_half(*address, half as u32 / 4, value);
    }

    /// The selected queue, as long as the driver may change it.
    fn disabled(&mut self) -> Option<&mut QueueRegisters> {
        let queue = self.queues.get_mut(usize::from(self.selected));
        queue.filter(|queue| !queue.enabled)
    }

    fn set_status(&mut self, status: u8) -> Step {
        if status == 0 {
            return Step::Reset;
        }
        let mut added = status & SETTABLE & !self.status;
        let version_1 = self.accepted & 1 << VIRTIO_F_VERSION_1 != 0;
        if !version_1 || self.accepted & !self.offered != 0 {
            added &= !FEATURES_OK;
        }
        if (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        match added & DRIVER_OK {
            0 => Step::None,
            _ => Step::Start,
        }
    }
}

/// Half `number` of 64 bits, from the low one on; 0 past the end.
fn half(bits: u64, number: u32) -> u32 {
    match number {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

/// `bits` with another half.
fn with_half(bits: u64, number: u32, value: u32) -> u64 {
    let value = u64::from(value);
    match number {
        0 => bits & !0xffff_ffff | value,
        1 => bits & 0xffff_ffff | value << 32,
        _ => bits,
    }
}
