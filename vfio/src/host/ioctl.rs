//! The VFIO system calls: one safe function for each ioctl, and nothing else.
//!
//! Numbers and structures are those of `linux/vfio.h`. Every function returns the kernel's errno unchanged;
//! the callers add the device and the action.
#![allow(unsafe_code)] // ioctl(2), and taking ownership of the fd that one of them returns.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::raw::{c_int, c_ulong};

use gantry_devices::mapping::HostMapping;
use vfio_bindings::bindings::vfio as abi;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{
    _IOC_NONE, ioctl, ioctl_expr, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr,
    ioctl_with_ref, ioctl_with_val,
};

use super::device::Irq;

pub(super) const fn request(number: u32) -> c_ulong {
    ioctl_expr(_IOC_NONE, abi::VFIO_TYPE as u32, abi::VFIO_BASE + number, 0)
}

pub(super) const GET_API_VERSION: c_ulong = request(0);
pub(super) const CHECK_EXTENSION: c_ulong = request(1);
pub(super) const SET_IOMMU: c_ulong = request(2);
pub(super) const GROUP_GET_STATUS: c_ulong = request(3);
pub(super) const GROUP_SET_CONTAINER: c_ulong = request(4);
pub(super) const GROUP_UNSET_CONTAINER: c_ulong = request(5);
pub(super) const GROUP_GET_DEVICE_FD: c_ulong = request(6);
pub(super) const DEVICE_GET_INFO: c_ulong = request(7);
pub(super) const DEVICE_GET_REGION_INFO: c_ulong = request(8);
pub(super) const DEVICE_GET_IRQ_INFO: c_ulong = request(9);
pub(super) const DEVICE_SET_IRQS: c_ulong = request(10);
pub(super) const DEVICE_RESET: c_ulong = request(11);
// The numbers of the next two are also those of requests on a container.
pub(super) const DEVICE_GET_PCI_HOT_RESET_INFO: c_ulong = request(12);
pub(super) const DEVICE_PCI_HOT_RESET: c_ulong = request(13);
pub(super) const IOMMU_GET_INFO: c_ulong = request(12);
pub(super) const IOMMU_MAP_DMA: c_ulong = request(13);
pub(super) const IOMMU_UNMAP_DMA: c_ulong = request(14);

/// Size of the fixed part of an information structure.
pub(super) const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

pub(super) fn checked(ret: c_int) -> io::Result<c_int> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ret)
}

/// The version of the interface; `VFIO_API_VERSION` is the only one so far.
pub fn api_version(container: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: the request takes no argument.
    let ret = unsafe { ioctl(&container, GET_API_VERSION) };
    checked(ret).map(|version| version as u32)
}

/// Whether the container knows an extension, such as an IOMMU type.
pub fn check_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    // SAFETY: the argument is a number.
    let ret = unsafe { ioctl_with_val(&container, CHECK_EXTENSION, c_ulong::from(extension)) };
    checked(ret).map(|known| known > 0)
}

/// Chooses the IOMMU type of a container that has a group.
pub fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    let ret = unsafe { ioctl_with_val(&container, SET_IOMMU, c_ulong::from(kind)) };
    checked(ret).map(drop)
}

/// `VFIO_GROUP_FLAGS_*`.
pub fn group_status(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = abi::vfio_group_status {
        argsz: argsz::<abi::vfio_group_status>(),
        ..Default::default()
    };
    // SAFETY: the structure is the one the request is defined with, and says its own size.
    let ret = unsafe { ioctl_with_mut_ref(&group, GROUP_GET_STATUS, &mut status) };
    checked(ret).map(|_| status.flags)
}

/// Puts a group into a container.
pub fn group_set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let fd = container.as_raw_fd();
    // SAFETY: the argument is a pointer to an fd, which the kernel only reads.
    let ret = unsafe { ioctl_with_ref(&group, GROUP_SET_CONTAINER, &fd) };
    checked(ret).map(drop)
}

/// Takes a group out of its container. EBUSY while one of its devices is open.
pub fn group_unset_container(group: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    let ret = unsafe { ioctl(&group, GROUP_UNSET_CONTAINER) };
    checked(ret).map(drop)
}

/// Opens a device of the group, which resets it where it can be. The fd is close-on-exec.
pub fn group_get_device_fd(group: BorrowedFd<'_>, device: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the argument is a string that ends in a NUL, which the kernel only reads.
    let ret = unsafe { ioctl_with_ptr(&group, GROUP_GET_DEVICE_FD, device.as_ptr()) };
    let fd = checked(ret)?;
    // SAFETY: the kernel has just made this fd for the caller, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Flags and numbers of regions and interrupt indexes of a device.
pub fn device_info(device: BorrowedFd<'_>) -> io::Result<abi::vfio_device_info> {
    let mut info = abi::vfio_device_info {
        argsz: argsz::<abi::vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: the structure is the one the request is defined with, and says its own size.
    let ret = unsafe { ioctl_with_mut_ref(&device, DEVICE_GET_INFO, &mut info) };
    checked(ret).map(|_| info)
}

/// The `vfio_region_info` of a region with the capabilities that follow it, as bytes.
pub fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u8>> {
    // `index` is the third 32-bit field.
    with_capabilities(
        device,
        DEVICE_GET_REGION_INFO,
        argsz::<abi::vfio_region_info>(),
        u64::from(index),
    )
}

/// The `vfio_iommu_type1_info` of a container with the capabilities that follow it, as bytes.
pub fn iommu_info(container: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    with_capabilities(
        container,
        IOMMU_GET_INFO,
        argsz::<abi::vfio_iommu_type1_info>(),
        0,
    )
}

/// Requests a structure that begins with `argsz: u32, flags: u32` and whose second 64 bits are `input`: once
/// for its length with capabilities, then, if it is longer, for all of it.
fn with_capabilities(
    fd: BorrowedFd<'_>,
    request: c_ulong,
    fixed: u32,
    input: u64,
) -> io::Result<Vec<u8>> {
    let mut size = fixed;
    loop {
        let mut words = vec![0u64; size.div_ceil(8) as usize];
        if let [head, second, ..] = words.as_mut_slice() {
            *head = u64::from(size);
            *second = input;
        }
        // SAFETY: the kernel writes at most the `argsz` bytes that the buffer says it has and has.
        let ret = unsafe { ioctl_with_mut_ptr(&fd, request, words.as_mut_ptr()) };
        checked(ret)?;
        let needed = words.first().map_or(0, |&head| head as u32);
        if needed <= size {
            return Ok(words.into_iter().flat_map(u64::to_ne_bytes).collect());
        }
        size = needed;
    }
}

/// Information on an interrupt index.
pub fn irq_info(device: BorrowedFd<'_>, index: Irq) -> io::Result<abi::vfio_irq_info> {
    let mut info = abi::vfio_irq_info {
        argsz: argsz::<abi::vfio_irq_info>(),
        index: index as u32,
        ..Default::default()
    };
    // SAFETY: the structure is the one the request is defined with, and says its own size.
    let ret = unsafe { ioctl_with_mut_ref(&device, DEVICE_GET_IRQ_INFO, &mut info) };
    checked(ret).map(|_| info)
}

/// Connects the interrupts from `start` on to `triggers`; `None` disconnects one.
pub fn set_irqs(
    device: BorrowedFd<'_>,
    index: Irq,
    start: u32,
    triggers: &[Option<&EventFd>],
) -> io::Result<()> {
    let fds = triggers.iter().map(|fd| fd.map_or(-1, AsRawFd::as_raw_fd));
    set(device, &irq_set(TRIGGERED_BY, index, start, fds)?)
}

/// Has the device raise an interrupt of the index again, if it still wants one, when `resample` is written.
pub fn unmask_by(device: BorrowedFd<'_>, index: Irq, resample: &EventFd) -> io::Result<()> {
    let fds = [resample.as_raw_fd()].into_iter();
    set(device, &irq_set(UNMASKED_BY, index, 0, fds)?)
}

/// Disconnects every interrupt of the index, and disables it in the device.
pub fn disable_irqs(device: BorrowedFd<'_>, index: Irq) -> io::Result<()> {
    set(device, &irq_set(DISABLED, index, 0, std::iter::empty())?)
}

const TRIGGERED_BY: u32 = abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
const UNMASKED_BY: u32 = abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_UNMASK;
/// With no interrupts: with some, the request raises them.
const DISABLED: u32 = abi::VFIO_IRQ_SET_DATA_NONE | abi::VFIO_IRQ_SET_ACTION_TRIGGER;

/// A `vfio_irq_set`: argsz, flags, index, start, count, then the fds, 32 bits each.
fn irq_set(
    flags: u32,
    index: Irq,
    start: u32,
    fds: impl ExactSizeIterator<Item = c_int>,
) -> io::Result<Vec<u32>> {
    let count = u32::try_from(fds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut words = vec![0, flags, index as u32, start, count];
    words.extend(fds.map(|fd| fd as u32));
    words[0] = size_of_val(words.as_slice()) as u32;
    Ok(words)
}

fn set(device: BorrowedFd<'_>, irq_set: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads the `argsz` bytes that `irq_set` says it has and has.
    let ret = unsafe { ioctl_with_ptr(&device, DEVICE_SET_IRQS, irq_set.as_ptr()) };
    match checked(ret)? {
        0 => Ok(()),
        // The host has too few interrupt vectors: the result is how many it has.
        _ => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
    }
}

/// Resets the device by the best method of its bus.
pub fn device_reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    let ret = unsafe { ioctl(&device, DEVICE_RESET) };
    checked(ret).map(drop)
}

/// A function that a hot reset of a device resets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusFunction {
    /// Its IOMMU group; of a device opened as a cdev, its number in the IOMMU file descriptor.
    pub owner: u32,
    pub segment: u16,
    pub bus: u8,
    /// Device number times 8, plus function number.
    pub devfn: u8,
}

/// Its address as sysfs writes it.
impl fmt::Display for BusFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, function) = (self.devfn >> 3, self.devfn & 7);
        let Self { segment, bus, .. } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

/// The functions that a hot reset of the device resets: those of its slot or bus. ENODEV if there is no such
/// reset.
pub fn hot_reset_info(device: BorrowedFd<'_>) -> io::Result<Vec<BusFunction>> {
    // struct vfio_pci_hot_reset_info: argsz, flags, count, then 64 bits a function.
    const HEADER: usize = 3;
    let mut room = 8;
    loop {
        let mut words = vec![0u32; HEADER + 2 * room];
        words[0] = size_of_val(words.as_slice()) as u32;
        // SAFETY: the kernel writes at most the `argsz` bytes that the buffer says it has and has.
        let ret = unsafe {
            ioctl_with_mut_ptr(&device, DEVICE_GET_PCI_HOT_RESET_INFO, words.as_mut_ptr())
        };
        let count = words[2] as usize;
        match checked(ret) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && count > room => {
                room = count;
            }
            Err(error) => return Err(error),
            Ok(_) => {
                let functions = words[HEADER..].chunks_exact(2).take(count);
                return Ok(functions
                    .map(|pair| bus_function(pair[0], pair[1]))
                    .collect());
            }
        }
    }
}

fn bus_function(owner: u32, place: u32) -> BusFunction {
    let [low, high, bus, devfn] = place.to_ne_bytes();
    BusFunction {
        owner,
        segment: u16::from_ne_bytes([low, high]),
        bus,
        devfn,
    }
}

/// Resets the slot or the bus of the device. `groups` are those of all functions on it; none for a device opened
/// as a cdev, whose IOMMU file descriptor must own all of them.
pub fn hot_reset(device: BorrowedFd<'_>, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
    // struct vfio_pci_hot_reset: argsz, flags, count, then the descriptors of the groups, 32 bits each.
    let count = u32::try_from(groups.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut words = vec![0, 0, count];
    words.extend(groups.iter().map(|group| group.as_raw_fd() as u32));
    words[0] = size_of_val(words.as_slice()) as u32;
    // SAFETY: the kernel reads the `argsz` bytes that the buffer says it has and has.
    let ret = unsafe { ioctl_with_ptr(&device, DEVICE_PCI_HOT_RESET, words.as_ptr()) };
    checked(ret).map(drop)
}

/// The address of `len` bytes of `memory` from `offset` on, which must lie inside.
pub(super) fn address_in(memory: &HostMapping, offset: u64, len: u64) -> io::Result<u64> {
    let end = offset.checked_add(len);
    match end.is_some_and(|end| end <= memory.size() as u64) {
        true => Ok(memory.address() + offset),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Lets devices read and write `len` bytes of `memory` from `offset` on, at `iova`. The pages are
/// pinned until they are unmapped, whether or not `memory` outlives that.
pub fn map_dma(
    container: BorrowedFd<'_>,
    iova: u64,
    memory: &HostMapping,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let vaddr = address_in(memory, offset, len)?;
    let map = abi::vfio_iommu_type1_dma_map {
        argsz: argsz::<abi::vfio_iommu_type1_dma_map>(),
        flags: abi::VFIO_DMA_MAP_FLAG_READ | abi::VFIO_DMA_MAP_FLAG_WRITE,
        vaddr,
        iova,
        size: len,
    };
    // SAFETY: the structure is the one the request is defined with; the range it names lies inside
    // memory that was mapped to be shared with devices and is never reached through references.
    let ret = unsafe { ioctl_with_ref(&container, IOMMU_MAP_DMA, &map) };
    checked(ret).map(drop)
}

/// Unmaps all mappings in the range. Returns their size in bytes.
pub fn unmap_dma(container: BorrowedFd<'_>, iova: u64, len: u64) -> io::Result<u64> {
    let mut unmap = abi::vfio_iommu_type1_dma_unmap {
        argsz: argsz::<abi::vfio_iommu_type1_dma_unmap>(),
        flags: 0,
        iova,
        size: len,
        ..Default::default()
    };
    // SAFETY: the structure is the one the request is defined with, and says its own size.
    let ret = unsafe { ioctl_with_mut_ref(&container, IOMMU_UNMAP_DMA, &mut unmap) };
    checked(ret).map(|_| unmap.size)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel() {
        assert_eq!(GET_API_VERSION, 0x3b64);
        assert_eq!(DEVICE_SET_IRQS, 0x3b6e);
        assert_eq!(IOMMU_UNMAP_DMA, 0x3b72);
    }

    #[test]
    fn a_function_on_the_bus_is_read_as_the_kernel_writes_it() {
        let place = u32::from_ne_bytes([0x34, 0x12, 0x05, 0x09]);
        let BusFunction {
            owner,
            segment,
            bus,
            devfn,
        } = bus_function(7, place);
        assert_eq!((owner, segment, bus, devfn), (7, 0x1234, 5, 9));
    }

    /// TRAPS 39: what disables has no interrupts, and what connects or disconnects one names an eventfd.
    #[test]
    fn only_a_set_of_no_interrupts_disables_them() {
        let off = irq_set(DISABLED, Irq::Msix, 0, std::iter::empty()).unwrap();
        let none_trigger = abi::VFIO_IRQ_SET_DATA_NONE | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
        assert_eq!(off, [20, none_trigger, 2, 0, 0]);
        let two = irq_set(TRIGGERED_BY, Irq::Msi, 3, [7, -1].into_iter()).unwrap();
        assert_eq!(two, [28, 0x24, 1, 3, 2, 7, u32::MAX]);
        for flags in [TRIGGERED_BY, UNMASKED_BY] {
            assert_eq!(flags & abi::VFIO_IRQ_SET_DATA_NONE, 0);
        }
    }

    #[test]
    fn a_refusal_carries_the_errno() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = null.as_fd();
        let event = EventFd::new(0).unwrap();
        let refused = [
            api_version(fd).map(drop),
            check_extension(fd, 3).map(drop),
            group_status(fd).map(drop),
            group_set_container(fd, fd),
            group_get_device_fd(fd, c"0000:00:00.0").map(drop),
            device_info(fd).map(drop),
            region_info(fd, 7).map(drop),
            iommu_info(fd).map(drop),
            irq_info(fd, Irq::Msix).map(drop),
            set_irqs(fd, Irq::Msix, 0, &[None, Some(&event)]),
            disable_irqs(fd, Irq::Msix),
            unmask_by(fd, Irq::Intx, &event),
            device_reset(fd),
            hot_reset_info(fd).map(drop),
            hot_reset(fd, &[fd]),
            unmap_dma(fd, 0, 4096).map(drop),
        ];
        for (call, result) in refused.into_iter().enumerate() {
            let errno = result.unwrap_err().raw_os_error();
            assert_eq!(errno, Some(libc::ENOTTY), "call {call}");
        }
    }

    #[test]
    fn memory_beyond_its_mapping_is_never_offered_to_devices() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let memory = HostMapping::anonymous(8192, 4096).unwrap();
        for (offset, len) in [(0, 8193), (8192, 1), (u64::MAX, 2)] {
            let refused = map_dma(null.as_fd(), 0, &memory, offset, len).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
        let asked = map_dma(null.as_fd(), 0, &memory, 4096, 4096).unwrap_err();
        assert_eq!(asked.raw_os_error(), Some(libc::ENOTTY));
    }
}
