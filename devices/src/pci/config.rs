//! Configuration space as ordered areas: emulated, patched over the hardware, or passed through.

use std::ops::Range;

use super::registers::CONFIG_SIZE;

/// What answers where an area lets accesses through: the hardware behind a function.
pub trait Backing {
    /// Fills `data`, 1, 2 or 4 bytes, from `offset` on; all ones where that fails.
    fn read(&self, offset: u16, data: &mut [u8]);

    /// Writes `data`, 1, 2 or 4 bytes, at `offset`.
    fn write(&self, offset: u16, data: &[u8]);
}

/// Nothing behind the areas: reads give zeros, as reserved registers do, and writes are lost.
#[derive(Debug, Clone, Copy)]
pub struct NoBacking;

impl Backing for NoBacking {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u16, _data: &[u8]) {}
}

/// A run of configuration space that is answered in one way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    offset: u16,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    /// Bytes of our own, and the bits of them that the guest may write. Equally long.
    Emulated { bytes: Vec<u8>, writable: Vec<u8> },
    /// The bits in `mask` are read from `value`, all others from the backing. Equally long.
    Patched { mask: Vec<u8>, value: Vec<u8> },
    /// Everything goes to the backing.
    PassThrough { len: u16 },
}

impl Area {
    /// Registers of our own: `bytes`, of which the guest may change the bits set in `writable`.
    /// Where `writable` is shorter, the rest is read-only.
    pub fn emulated(offset: u16, bytes: &[u8], writable: &[u8]) -> Self {
        let bytes = fit(offset, bytes);
        let mut writable = writable.to_vec();
        writable.resize(bytes.len(), 0);
        Self {
            offset,
            content: Content::Emulated { bytes, writable },
        }
    }

    /// Registers of our own that no write changes.
    pub fn read_only(offset: u16, bytes: &[u8]) -> Self {
        Self::emulated(offset, bytes, &[])
    }

    /// Hardware registers of which the guest reads the bits in `mask` from `value`, and cannot
    /// write them: a write leaves them as the hardware has them, by reading them and writing them
    /// back, so they must not be bits that a write of 1 clears unless their whole byte is in `mask`.
    /// Where `value` is shorter, its bits are 0.
    pub fn patched(offset: u16, mask: &[u8], value: &[u8]) -> Self {
        let mask = fit(offset, mask);
        let mut value = value.to_vec();
        value.resize(mask.len(), 0);
        for (value, mask) in value.iter_mut().zip(&mask) {
            *value &= mask;
        }
        Self {
            offset,
            content: Content::Patched { mask, value },
        }
    }

    /// Hardware registers as they are.
    pub fn pass_through(offset: u16, len: u16) -> Self {
        let len = len.min(CONFIG_SIZE.saturating_sub(offset));
        Self {
            offset,
            content: Content::PassThrough { len },
        }
    }

    fn len(&self) -> usize {
        match &self.content {
            Content::Emulated { bytes, .. } => bytes.len(),
            Content::Patched { mask, .. } => mask.len(),
            Content::PassThrough { len } => usize::from(*len),
        }
    }

    fn range(&self) -> Range<usize> {
        let start = usize::from(self.offset);
        start..start + self.len()
    }

    /// The part of the area inside `range`, which must overlap it.
    fn part(&self, range: &Range<usize>) -> Self {
        let own = self.range();
        let (start, end) = (range.start.max(own.start), range.end.min(own.end));
        let cut = |bytes: &[u8]| bytes[start - own.start..end - own.start].to_vec();
        Self {
            offset: start as u16,
            content: match &self.content {
                Content::Emulated { bytes, writable } => Content::Emulated {
                    bytes: cut(bytes),
                    writable: cut(writable),
                },
                Content::Patched { mask, value } => Content::Patched {
                    mask: cut(mask),
                    value: cut(value),
                },
                Content::PassThrough { .. } => Content::PassThrough {
                    len: (end - start) as u16,
                },
            },
        }
    }
}

/// The bytes that still lie inside the configuration space.
fn fit(offset: u16, bytes: &[u8]) -> Vec<u8> {
    let room = usize::from(CONFIG_SIZE.saturating_sub(offset));
    bytes[..bytes.len().min(room)].to_vec()
}

/// The 4096 bytes of a function's configuration space.
///
/// Where no area lies, reads give zeros and writes are lost, as with reserved registers. An access
/// that crosses areas is split between them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigSpace {
    /// In ascending order, without overlaps or empty areas.
    areas: Vec<Area>,
}

impl ConfigSpace {
    /// A space with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// A space that passes everything through.
    pub fn pass_through() -> Self {
        Self::new().with(Area::pass_through(0, CONFIG_SIZE))
    }

    /// [`Self::insert`] in a chain.
    #[must_use]
    pub fn with(mut self, area: Area) -> Self {
        self.insert(area);
        self
    }

    /// Puts an area in, over the parts of earlier areas that it covers.
    pub fn insert(&mut self, area: Area) {
        let new = area.range();
        if new.is_empty() {
            return;
        }
        let mut areas = Vec::with_capacity(self.areas.len() + 2);
        for old in self.areas.drain(..) {
            let range = old.range();
            if range.end <= new.start || range.start >= new.end {
                areas.push(old);
                continue;
            }
            if range.start < new.start {
                areas.push(old.part(&(range.start..new.start)));
            }
            if range.end > new.end {
                areas.push(old.part(&(new.end..range.end)));
            }
        }
        areas.push(area);
        areas.sort_by_key(|area| area.offset);
        self.areas = areas;
    }

    /// Fills `data` with what the guest reads at `offset`; all ones past the end of the space.
    pub fn read(&self, offset: u16, data: &mut [u8], backing: &dyn Backing) {
        let access = span(offset, data.len());
        data.fill(0xff);
        data[..access.len()].fill(0);
        for area in self.touched(&access) {
            let (at, here) = overlap(area, &access);
            let data = &mut data[here.start - access.start..here.end - access.start];
            match &area.content {
                Content::Emulated { bytes, .. } => data.copy_from_slice(&bytes[at]),
                Content::Patched { mask, value } => {
                    read_patched(here.start, data, (&mask[at.clone()], &value[at]), backing);
                }
                Content::PassThrough { .. } => read_backing(here.start, data, backing),
            }
        }
    }

    /// Takes a guest's write at `offset`. Bytes past the end of the space are lost.
    pub fn write(&mut self, offset: u16, data: &[u8], backing: &dyn Backing) {
        let access = span(offset, data.len());
        for area in self.areas.iter_mut().filter(|area| touches(area, &access)) {
            let (at, here) = overlap(area, &access);
            let data = &data[here.start - access.start..here.end - access.start];
            match &mut area.content {
                Content::Emulated { bytes, writable } => {
                    for ((byte, &mask), &new) in
                        bytes[at.clone()].iter_mut().zip(&writable[at]).zip(data)
                    {
                        *byte = *byte & !mask | new & mask;
                    }
                }
                Content::Patched { mask, .. } => {
                    write_patched(here.start, data, &mask[at], backing);
                }
                Content::PassThrough { .. } => write_backing(here.start, data, backing),
            }
        }
    }

    /// Sets emulated bytes, or patched bits, as the device itself does, whatever the guest may
    /// write. Has no effect on what is passed through.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        let access = span(offset, data.len());
        for area in self.areas.iter_mut().filter(|area| touches(area, &access)) {
            let (at, here) = overlap(area, &access);
            let data = &data[here.start - access.start..here.end - access.start];
            match &mut area.content {
                Content::Emulated { bytes, .. } => bytes[at].copy_from_slice(data),
                Content::Patched { mask, value } => {
                    for ((value, &mask), &new) in
                        value[at.clone()].iter_mut().zip(&mask[at]).zip(data)
                    {
                        *value = new & mask;
                    }
                }
                Content::PassThrough { .. } => {}
            }
        }
    }

    /// Up to 4 bytes at `offset` of what is emulated or patched, little endian, without asking any
    /// backing.
    pub fn get<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.read(offset, &mut data, &NoBacking);
        data
    }

    fn touched(&self, access: &Range<usize>) -> impl Iterator<Item = &Area> {
        self.areas.iter().filter(move |area| touches(area, access))
    }
}

/// The bytes of the configuration space that an access covers.
fn span(offset: u16, len: usize) -> Range<usize> {
    let end = usize::from(CONFIG_SIZE);
    let start = usize::from(offset).min(end);
    start..start.saturating_add(len).min(end)
}

fn touches(area: &Area, access: &Range<usize>) -> bool {
    let own = area.range();
    own.start < access.end && access.start < own.end
}

/// Where an access and an area that it touches meet: inside the area, and in the whole space.
fn overlap(area: &Area, access: &Range<usize>) -> (Range<usize>, Range<usize>) {
    let own = area.range();
    let here = own.start.max(access.start)..own.end.min(access.end);
    (here.start - own.start..here.end - own.start, here)
}

/// Splits `len` bytes at `start` into naturally aligned accesses of 4, 2 or 1 bytes.
fn aligned(start: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = len - at;
        let size = [4, 2, 1]
            .into_iter()
            .find(|&size| size <= left && (start + at).is_multiple_of(size))?;
        at += size;
        Some(at - size..at)
    })
}

fn read_backing(start: usize, data: &mut [u8], backing: &dyn Backing) {
    for piece in aligned(start, data.len()) {
        backing.read((start + piece.start) as u16, &mut data[piece]);
    }
}

fn write_backing(start: usize, data: &[u8], backing: &dyn Backing) {
    for piece in aligned(start, data.len()) {
        backing.write((start + piece.start) as u16, &data[piece]);
    }
}

/// Asks the backing only where not every bit is patched.
fn read_patched(start: usize, data: &mut [u8], patch: (&[u8], &[u8]), backing: &dyn Backing) {
    let (mask, value) = patch;
    for piece in aligned(start, data.len()) {
        let data = &mut data[piece.clone()];
        if mask[piece.clone()].iter().all(|&mask| mask == 0xff) {
            data.copy_from_slice(&value[piece]);
            continue;
        }
        backing.read((start + piece.start) as u16, data);
        for ((byte, &mask), &value) in data.iter_mut().zip(&mask[piece.clone()]).zip(&value[piece])
        {
            *byte = *byte & !mask | value & mask;
        }
    }
}

/// Writes the bits that are not patched, and for the others what the hardware has now. Bytes that
/// are patched whole stay out of every access, as they may clear on being written back.
fn write_patched(start: usize, data: &[u8], mask: &[u8], backing: &dyn Backing) {
    let mut at = 0;
    for run in mask.chunk_by(|&a, &b| (a == 0xff) == (b == 0xff)) {
        if run[0] != 0xff {
            for piece in aligned(start + at, run.len()) {
                let data = &data[at..][piece.clone()];
                merge_write(start + at + piece.start, data, &run[piece], backing);
            }
        }
        at += run.len();
    }
}

fn merge_write(offset: usize, data: &[u8], mask: &[u8], backing: &dyn Backing) {
    let offset = offset as u16;
    let mut merged = [0; 4];
    let merged = &mut merged[..data.len()];
    if mask.iter().any(|&mask| mask != 0) {
        backing.read(offset, merged);
    }
    for ((byte, &mask), &new) in merged.iter_mut().zip(mask).zip(data) {
        *byte = *byte & mask | new & !mask;
    }
    backing.write(offset, merged);
}

#[cfg(test)]
mod tests;
