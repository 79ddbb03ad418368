//! Configuration space as ordered areas: emulated, or passed through to the hardware.

use std::ops::Range;

use super::registers::CONFIG_SIZE;

/// The hardware behind a function, for areas that pass accesses through.
pub trait Backing {
    /// Fills `data`, 1, 2 or 4 bytes, from `offset` on; all ones if that fails.
    fn read(&self, offset: u16, data: &mut [u8]);

    /// Writes `data`, 1, 2 or 4 bytes, at `offset`.
    fn write(&self, offset: u16, data: &[u8]);
}

/// No hardware: reads give zeros, as reserved registers do, and writes are lost.
#[derive(Debug, Clone, Copy)]
pub struct NoBacking;

impl Backing for NoBacking {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u16, _data: &[u8]) {}
}

/// A part of configuration space whose accesses are handled in one way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    offset: u16,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    /// Emulated bytes, and the bits of them that the guest may write. Equally long.
    Emulated { bytes: Vec<u8>, writable: Vec<u8> },
    /// Accesses go to the backing; writes only if it is `writable`.
    PassThrough { len: u16, writable: bool },
}

impl Area {
    /// Emulated registers: `bytes`, of which the guest may change the bits set in `writable`. If `writable` is
    /// shorter, the rest is read-only.
    pub fn emulated(offset: u16, bytes: &[u8], writable: &[u8]) -> Self {
        let bytes = fit(offset, bytes);
        let mut writable = writable.to_vec();
        writable.resize(bytes.len(), 0);
        Self {
            offset,
            content: Content::Emulated { bytes, writable },
        }
    }

    /// Emulated registers that no write changes.
    pub fn read_only(offset: u16, bytes: &[u8]) -> Self {
        Self::emulated(offset, bytes, &[])
    }

    /// Hardware registers, unchanged.
    pub fn pass_through(offset: u16, len: u16) -> Self {
        Self::hardware(offset, len, true)
    }

    /// Hardware registers that no write of the guest reaches.
    pub fn pass_through_read_only(offset: u16, len: u16) -> Self {
        Self::hardware(offset, len, false)
    }

    fn hardware(offset: u16, len: u16, writable: bool) -> Self {
        let len = len.min(CONFIG_SIZE.saturating_sub(offset));
        Self {
            offset,
            content: Content::PassThrough { len, writable },
        }
    }

    fn len(&self) -> usize {
        match &self.content {
            Content::Emulated { bytes, .. } => bytes.len(),
            Content::PassThrough { len, .. } => usize::from(*len),
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
                Content::PassThrough { writable, .. } => Content::PassThrough {
                    len: (end - start) as u16,
                    writable: *writable,
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
/// Outside of all areas reads give zeros and writes are lost, as with reserved registers. An access that
/// crosses areas is split between them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigSpace {
    /// In ascending order, without overlaps or empty areas.
    areas: Vec<Area>,
}

impl ConfigSpace {
    /// A space without areas.
    pub fn new() -> Self {
        Self::default()
    }

    /// [`Self::insert`] in a chain.
    #[must_use]
    pub fn with(mut self, area: Area) -> Self {
        self.insert(area);
        self
    }

    /// Adds an area, which replaces the parts of earlier areas that it covers.
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

    /// Fills `data` from `offset` on for the guest; all ones past the end of the space.
    pub fn read(&self, offset: u16, data: &mut [u8], backing: &dyn Backing) {
        let access = span(offset, data.len());
        data.fill(0xff);
        data[..access.len()].fill(0);
        for area in self.touched(&access) {
            let (at, here) = overlap(area, &access);
            let data = &mut data[here.start - access.start..here.end - access.start];
            match &area.content {
                Content::Emulated { bytes, .. } => data.copy_from_slice(&bytes[at]),
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
                Content::PassThrough { writable: true, .. } => {
                    write_backing(here.start, data, backing);
                }
                Content::PassThrough { .. } => {}
            }
        }
    }

    /// Sets emulated bytes as the device itself does, whatever the guest may write. Has no effect on
    /// what is passed through.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        let access = span(offset, data.len());
        for area in self.areas.iter_mut().filter(|area| touches(area, &access)) {
            let (at, here) = overlap(area, &access);
            let data = &data[here.start - access.start..here.end - access.start];
            if let Content::Emulated { bytes, .. } = &mut area.content {
                bytes[at].copy_from_slice(data);
            }
        }
    }

    /// Bytes at `offset` of emulated areas; zeros where accesses are passed through.
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

#[cfg(test)]
mod tests;
