//! The buffers of a descriptor chain (section 2.7.5), checked: what the driver has written, and what it wants to read.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// The most buffers in a chain. A table of descriptors could hold far more, and each costs the device memory.
pub const MAX_BUFFERS: u32 = 256;

/// Why a descriptor chain cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A buffer lies outside of guest RAM.
    #[error("a buffer lies outside of guest RAM")]
    OutsideRam,
    /// A buffer that the device may read follows one that it may write (section 2.7.4.2).
    #[error("a buffer to be read follows one to be written")]
    Order,
    /// It has more than [`MAX_BUFFERS`].
    #[error("a chain has more than {MAX_BUFFERS} buffers")]
    TooLong,
}

/// Buffers in guest RAM, one after the other. The guest may change them at any time.
#[derive(Clone, Default)]
pub struct Segments<'a>(Vec<VolatileSlice<'a>>);

impl<'a> Segments<'a> {
    /// The buffers that the device may read, and those that it may write.
    ///
    /// # Errors
    /// A buffer lies outside of guest RAM, the order is wrong, or the chain is too long. A chain that breaks off for another reason is
    /// shorter than the driver meant.
    pub fn of(
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<(Self, Self), ChainError> {
        let (mut readable, mut writable) = (Self::default(), Self::default());
        for (index, descriptor) in chain.enumerate() {
            if index >= MAX_BUFFERS as usize {
                return Err(ChainError::TooLong);
            }
            let segments = match descriptor.is_write_only() {
                true => &mut writable,
                false if writable.0.is_empty() => &mut readable,
                false => return Err(ChainError::Order),
            };
            let len = descriptor.len() as usize;
            // There is no IOMMU between the device and RAM: the permission is the same for all of it.
            let slices = memory.get_slices(descriptor.addr(), len, Permissions::ReadWrite);
            for slice in slices.map_err(|_| ChainError::OutsideRam)? {
                segments.0.push(slice.map_err(|_| ChainError::OutsideRam)?);
            }
        }
        Ok((readable, writable))
    }

    /// Bytes in all of them.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|slice| slice.len() as u64).sum()
    }

    /// The buffers.
    pub fn slices(&self) -> &[VolatileSlice<'a>] {
        &self.0
    }

    /// Takes the first `len` bytes off. `None`, and nothing is taken, if there are less.
    pub fn take_front(&mut self, len: u64) -> Option<Self> {
        if self.bytes() < len {
            return None;
        }
        let (mut front, mut left) = (Vec::new(), len as usize);
        let mut rest = std::mem::take(&mut self.0).into_iter();
        for slice in rest.by_ref() {
            match left.checked_sub(slice.len()) {
                Some(more) if more > 0 => left = more,
                _ => {
                    let (head, tail) = slice.split_at(left).ok()?;
                    front.push(head);
                    self.0.push(tail);
                    break;
                }
            }
            front.push(slice);
        }
        self.0.extend(rest);
        Some(Self(front))
    }

    /// Copies the buffers into `bytes`. Returns how many bytes that are.
    pub fn read(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            done += slice.copy_to(&mut bytes[done..]);
        }
        done
    }

    /// Copies `bytes` into the buffers. Returns how many bytes that are.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let here = slice.len().min(bytes.len() - done);
            slice.copy_from(&bytes[done..done + here]);
            done += here;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(bytes: &mut [u8], sizes: &[usize]) -> Segments<'static> {
        let mut rest = VolatileSlice::from(Box::leak(bytes.to_vec().into_boxed_slice()));
        let cut = |size: &usize| {
            let (head, tail) = rest.split_at(*size).unwrap();
            rest = tail;
            head
        };
        Segments(sizes.iter().map(cut).collect())
    }

    #[test]
    fn the_front_is_taken_across_buffers() {
        for sizes in [&[6][..], &[1, 2, 3], &[3, 0, 3], &[0, 6], &[2, 4, 0]] {
            for len in 0..=6 {
                let mut rest = over(&mut [1, 2, 3, 4, 5, 6], sizes);
                let front = rest.take_front(len).unwrap();
                assert_eq!((front.bytes(), rest.bytes()), (len, 6 - len));
                let mut bytes = [0; 6];
                assert_eq!(front.read(&mut bytes) as u64, len);
                rest.read(&mut bytes[len as usize..]);
                assert_eq!(bytes, [1, 2, 3, 4, 5, 6], "{sizes:?} at {len}");
            }
            let mut all = over(&mut [1, 2, 3, 4, 5, 6], sizes);
            assert!(all.take_front(7).is_none());
            assert_eq!(all.bytes(), 6);
        }
    }

    #[test]
    fn writes_fill_the_buffers_and_no_more() {
        let segments = over(&mut [0; 4], &[1, 3]);
        assert_eq!(segments.write(&[1, 2, 3]), 3);
        assert_eq!(segments.write(&[5, 6, 7, 8, 9]), 4);
        let mut bytes = [0; 4];
        segments.read(&mut bytes);
        assert_eq!(bytes, [5, 6, 7, 8]);
    }
}
