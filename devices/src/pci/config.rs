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
mod tests {
    use std::sync::Mutex;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = CONFIG_SIZE as usize;

    /// Hardware that takes every write, and checks that accesses are well-formed.
    struct Hardware {
        bytes: Mutex<Vec<u8>>,
        accesses: Mutex<Vec<(char, u16, usize)>>,
    }

    impl Hardware {
        fn new() -> Self {
            Self {
                bytes: Mutex::new((0..SIZE).map(|at| (at * 7) as u8).collect()),
                accesses: Mutex::default(),
            }
        }

        fn check(&self, kind: char, offset: u16, len: usize) -> Range<usize> {
            let start = usize::from(offset);
            assert!(matches!(len, 1 | 2 | 4) && start.is_multiple_of(len) && start + len <= SIZE);
            self.accesses.lock().unwrap().push((kind, offset, len));
            start..start + len
        }
    }

    impl Backing for Hardware {
        fn read(&self, offset: u16, data: &mut [u8]) {
            let at = self.check('r', offset, data.len());
            data.copy_from_slice(&self.bytes.lock().unwrap()[at]);
        }

        fn write(&self, offset: u16, data: &[u8]) {
            let at = self.check('w', offset, data.len());
            self.bytes.lock().unwrap()[at].copy_from_slice(data);
        }
    }

    #[test]
    fn an_access_is_split_over_areas() {
        let mut config = ConfigSpace::pass_through()
            .with(Area::emulated(0x41, &[0xaa, 0xbb], &[0x0f]))
            .with(Area::patched(0x43, &[0xf0], &[0x50]));
        let hardware = Hardware::new();
        hardware.bytes.lock().unwrap()[0x40..0x44].copy_from_slice(&[1, 2, 3, 4]);
        let mut data = [0; 4];
        config.read(0x40, &mut data, &hardware);
        assert_eq!(data, [1, 0xaa, 0xbb, 0x54]);
        config.write(0x40, &[0x11, 0x22, 0x33, 0x44], &hardware);
        config.read(0x40, &mut data, &hardware);
        assert_eq!(data, [0x11, 0xa2, 0xbb, 0x54]);
        assert_eq!(hardware.bytes.lock().unwrap()[0x40..0x44], [0x11, 2, 3, 4]);
    }

    #[test]
    fn whole_accesses_reach_the_hardware_whole() {
        let mut config = ConfigSpace::pass_through().with(Area::patched(0x50, &[0, 0, 1], &[]));
        let hardware = Hardware::new();
        config.write(0x40, &[0; 4], &hardware);
        config.write(0x50, &[0; 2], &hardware);
        let accesses = std::mem::take(&mut *hardware.accesses.lock().unwrap());
        assert_eq!(accesses, [('w', 0x40, 4), ('w', 0x50, 2)]);
    }

    #[test]
    fn bytes_that_are_patched_whole_never_touch_the_hardware() {
        let patch = Area::patched(0x40, &[0xff, 0xff, 0x00, 0xff], &[1, 2, 3, 4]);
        let mut config = ConfigSpace::pass_through().with(patch);
        let hardware = Hardware::new();
        config.write(0x40, &[0; 4], &hardware);
        let mut word = [0; 2];
        config.read(0x40, &mut word, &hardware);
        assert_eq!(word, [1, 2]);
        assert_eq!(*hardware.accesses.lock().unwrap(), [('w', 0x42, 1)]);
    }

    #[test]
    fn a_later_area_covers_parts_of_earlier_ones() {
        let config = ConfigSpace::new()
            .with(Area::read_only(0x10, &[1; 8]))
            .with(Area::read_only(0x12, &[2; 2]))
            .with(Area::read_only(0x0e, &[3; 3]));
        assert_eq!(config.get(0x0e), [3, 3, 3, 1, 2, 2, 1, 1, 1, 1, 0]);
        assert_eq!(config.get(0x17), [1, 0]);
    }

    #[test]
    fn the_device_sets_what_the_guest_cannot() {
        let mut config = ConfigSpace::new()
            .with(Area::read_only(0, &[1, 2]))
            .with(Area::patched(2, &[0x0f], &[0]));
        config.write(0, &[9, 9, 9, 9], &NoBacking);
        assert_eq!(config.get(0), [1, 2, 0, 0]);
        config.set(1, &[7, 0xff, 0xff]);
        assert_eq!(config.get(0), [1, 7, 0x0f, 0]);
    }

    #[test]
    fn past_the_end_there_are_ones_and_areas_are_cut() {
        let mut config = ConfigSpace::new().with(Area::read_only(0xffe, &[1; 8]));
        let mut data = [0; 4];
        config.read(0xffe, &mut data, &NoBacking);
        assert_eq!(data, [1, 1, 0xff, 0xff]);
        config.read(u16::MAX, &mut data, &NoBacking);
        assert_eq!(data, [0xff; 4]);
        config.write(u16::MAX, &data, &NoBacking);
        config.insert(Area::pass_through(u16::MAX, 4));
        config.insert(Area::read_only(0x1000, &[1]));
        assert_eq!(config.areas.len(), 1);
    }

    /// One step of a test run, near enough to the others that they meet.
    #[derive(Debug, Clone)]
    enum Step {
        Emulated(u16, Vec<u8>, Vec<u8>),
        Patched(u16, Vec<u8>, Vec<u8>),
        PassThrough(u16, u16),
        Read(u16, usize),
        Write(u16, Vec<u8>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let at = || prop_oneof![0x30_u16..0x60, 0xff0_u16..=0x1008, Just(u16::MAX)];
        let bytes = || vec(prop_oneof![any::<u8>(), Just(0), Just(0xff)], 0..12);
        let step = prop_oneof![
            (at(), bytes(), bytes()).prop_map(|(at, a, b)| Step::Emulated(at, a, b)),
            (at(), bytes(), bytes()).prop_map(|(at, a, b)| Step::Patched(at, a, b)),
            (at(), 0..12_u16).prop_map(|(at, len)| Step::PassThrough(at, len)),
            (at(), 0..9_usize).prop_map(|(at, len)| Step::Read(at, len)),
            (at(), bytes()).prop_map(|(at, data)| Step::Write(at, data)),
        ];
        vec(step, 0..40)
    }

    /// The same space, bit by bit: whose it is, whether the guest may write it, and what it is.
    struct Naive {
        own: Vec<u8>,
        writable: Vec<u8>,
        value: Vec<u8>,
        hardware: Vec<u8>,
    }

    impl Naive {
        fn put(&mut self, at: u16, own: &[u8], writable: &[u8], value: &[u8]) {
            for (index, own) in own.iter().enumerate() {
                let at = usize::from(at) + index;
                if at < SIZE {
                    self.own[at] = *own;
                    self.writable[at] = writable.get(index).copied().unwrap_or(0);
                    self.value[at] = value.get(index).copied().unwrap_or(0);
                }
            }
        }

        fn read(&self, at: usize) -> u8 {
            if at >= SIZE {
                return 0xff;
            }
            self.value[at] & self.own[at] | self.hardware[at] & !self.own[at]
        }

        fn write(&mut self, at: usize, new: u8) {
            if at < SIZE {
                let (own, writable) = (self.own[at], self.writable[at] & self.own[at]);
                self.value[at] = self.value[at] & !writable | new & writable;
                self.hardware[at] = self.hardware[at] & own | new & !own;
            }
        }
    }

    proptest! {
        #[test]
        fn areas_behave_as_the_bits_in_them(steps in steps(), through in any::<bool>()) {
            let hardware = Hardware::new();
            let mut config = if through { ConfigSpace::pass_through() } else { ConfigSpace::new() };
            let mut naive = Naive {
                own: vec![if through { 0 } else { 0xff }; SIZE],
                writable: vec![0; SIZE],
                value: vec![0; SIZE],
                hardware: hardware.bytes.lock().unwrap().clone(),
            };
            for step in steps {
                match step {
                    Step::Emulated(at, bytes, writable) => {
                        config.insert(Area::emulated(at, &bytes, &writable));
                        naive.put(at, &vec![0xff; bytes.len()], &writable, &bytes);
                    }
                    Step::Patched(at, mask, value) => {
                        config.insert(Area::patched(at, &mask, &value));
                        naive.put(at, &mask, &[], &value);
                    }
                    Step::PassThrough(at, len) => {
                        config.insert(Area::pass_through(at, len));
                        naive.put(at, &vec![0; usize::from(len)], &[], &[]);
                    }
                    Step::Read(at, len) => {
                        let mut data = vec![0; len];
                        config.read(at, &mut data, &hardware);
                        let expected: Vec<u8> =
                            (0..len).map(|index| naive.read(usize::from(at) + index)).collect();
                        prop_assert_eq!(data, expected);
                    }
                    Step::Write(at, data) => {
                        config.write(at, &data, &hardware);
                        for (index, byte) in data.into_iter().enumerate() {
                            naive.write(usize::from(at) + index, byte);
                        }
                    }
                }
                let bytes = hardware.bytes.lock().unwrap();
                prop_assert_eq!(&*bytes, &naive.hardware);
            }
            let sorted = config.areas.windows(2).all(|pair| {
                pair[0].range().end <= pair[1].range().start
            });
            prop_assert!(sorted && config.areas.iter().all(|area| area.len() > 0));
        }
    }
}
