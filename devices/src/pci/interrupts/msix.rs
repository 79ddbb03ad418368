//! The MSI-X table of a function as a pure model: a write returns which vectors changed.

use super::MsiMessage;

/// The most vectors a function can have (PCI Express Base Specification 6.0, 7.7.2.2).
pub const MAX_VECTORS: u16 = 2048;
/// Size of a table entry in bytes: address, upper address, data, control.
pub const ENTRY_SIZE: u64 = 16;

/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Vector control: the vector is masked. All other bits are reserved.
const VECTOR_MASK: u32 = 1 << 0;

/// Where the message control register lies in the capability.
const CONTROL: std::ops::Range<u16> = 2..4;

/// Vectors whose delivery changed, in ascending order, with their messages; `None` for a vector that is no
/// longer delivered.
pub type Changes = Vec<(u16, Option<MsiMessage>)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    const AT_RESET: Self = Self {
        address: 0,
        data: 0,
        control: VECTOR_MASK,
    };

    fn to_bytes(self) -> [u8; ENTRY_SIZE as usize] {
        let low = u128::from(self.address) | u128::from(self.data) << 64;
        (low | u128::from(self.control) << 96).to_le_bytes()
    }

    fn from_bytes(bytes: [u8; ENTRY_SIZE as usize]) -> Self {
        let bits = u128::from_le_bytes(bytes);
        Self {
            address: bits as u64 & !0b11,
            data: (bits >> 64) as u32,
            control: (bits >> 96) as u32 & VECTOR_MASK,
        }
    }

    fn message(&self) -> Option<MsiMessage> {
        (self.control & VECTOR_MASK == 0).then_some(MsiMessage {
            address: self.address,
            data: self.data,
        })
    }
}

/// The table and the message control register.
///
/// A vector is *effective* when MSI-X is on, the function is not masked and the vector is not
/// masked. Vectors start masked and MSI-X starts off.
#[derive(Debug, Clone)]
pub struct MsixTable {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
}

impl MsixTable {
    /// A table of `vectors` entries, at least 1 and at most [`MAX_VECTORS`].
    pub fn new(vectors: u16) -> Self {
        let vectors = vectors.clamp(1, MAX_VECTORS);
        Self {
            entries: vec![Entry::AT_RESET; usize::from(vectors)],
            enabled: false,
            masked: false,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Length of the table in bytes.
    pub fn table_len(&self) -> u64 {
        u64::from(self.vectors()) * ENTRY_SIZE
    }

    /// Length of the pending bit array in bytes: one bit a vector, in whole 64-bit words.
    pub fn pba_len(&self) -> u64 {
        u64::from(self.vectors()).div_ceil(64) * 8
    }

    /// Whether MSI-X is on, so that the function uses neither INTx nor MSI.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The message control register.
    pub fn control(&self) -> u16 {
        let mut control = self.vectors() - 1;
        if self.enabled {
            control |= ENABLE;
        }
        if self.masked {
            control |= FUNCTION_MASK;
        }
        control
    }

    /// Takes a guest's write to the capability, `offset` bytes from its header on. Only bytes of the message
    /// control register have an effect, for any width of the write.
    pub fn write_control(&mut self, offset: u16, data: &[u8]) -> Changes {
        let mut control = self.control().to_le_bytes();
        for (at, &byte) in (u32::from(offset)..).zip(data) {
            if (u32::from(CONTROL.start)..u32::from(CONTROL.end)).contains(&at) {
                control[at as usize - usize::from(CONTROL.start)] = byte;
            }
        }
        let control = u16::from_le_bytes(control);
        self.change_all(|table| {
            table.enabled = control & ENABLE != 0;
            table.masked = control & FUNCTION_MASK != 0;
        })
    }

    /// Fills `data` from the table at `offset`. Zeros past its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(0..) {
            *byte = self
                .entry_at(offset.saturating_add(index))
                .map_or(0, |(vector, lane)| self.entries[vector].to_bytes()[lane]);
        }
    }

    /// Takes a guest's write to the table at `offset`. The specification asks for dwords and qwords (7.7.2);
    /// other writes change the bytes that they cover.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Changes {
        let mut changes = Changes::new();
        let mut at = offset;
        let mut rest = data;
        while let Some((vector, lane)) = self.entry_at(at) {
            let (here, beyond) = rest.split_at(rest.len().min(ENTRY_SIZE as usize - lane));
            if here.is_empty() {
                break;
            }
            let before = self.effective(vector);
            let mut bytes = self.entries[vector].to_bytes();
            bytes[lane..lane + here.len()].copy_from_slice(here);
            self.entries[vector] = Entry::from_bytes(bytes);
            let after = self.effective(vector);
            if before != after {
                changes.push((vector as u16, after));
            }
            at += here.len() as u64;
            rest = beyond;
        }
        changes
    }

    /// The vectors that are delivered now.
    pub fn unmasked(&self) -> Changes {
        (0..self.vectors())
            .filter_map(|vector| Some((vector, Some(self.effective(vector.into())?))))
            .collect()
    }

    /// Fills `data` from the pending bit array at `offset`. `pending` gives each vector's bit. Zeros past its
    /// end.
    pub fn read_pba(&self, offset: u64, data: &mut [u8], pending: impl Fn(u16) -> bool) {
        let vectors = u64::from(self.vectors());
        for (byte, index) in data.iter_mut().zip(0..) {
            let first = offset.saturating_add(index).saturating_mul(8);
            *byte = (0..8)
                .filter(|bit| first.saturating_add(*bit) < vectors)
                .filter(|bit| pending((first + bit) as u16))
                .fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// Back to the state after a reset: all vectors masked, MSI-X off.
    pub fn reset(&mut self) -> Changes {
        self.change_all(|table| {
            table.enabled = false;
            table.masked = false;
            table.entries.fill(Entry::AT_RESET);
        })
    }

    /// Applies a change that may concern every vector.
    fn change_all(&mut self, change: impl FnOnce(&mut Self)) -> Changes {
        let before: Vec<_> = (0..self.entries.len())
            .map(|vector| self.effective(vector))
            .collect();
        change(self);
        before
            .into_iter()
            .enumerate()
            .filter_map(|(vector, before)| {
                let after = self.effective(vector);
                (before != after).then_some((vector as u16, after))
            })
            .collect()
    }

    fn effective(&self, vector: usize) -> Option<MsiMessage> {
        if self.enabled && !self.masked {
            self.entries[vector].message()
        } else {
            None
        }
    }

    /// The entry at a table offset, and the byte in it.
    fn entry_at(&self, offset: u64) -> Option<(usize, usize)> {
        let vector = offset / ENTRY_SIZE;
        (vector < u64::from(self.vectors()))
            .then_some((vector as usize, (offset % ENTRY_SIZE) as usize))
    }
}

#[cfg(test)]
mod tests;
