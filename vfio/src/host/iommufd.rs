//! The system calls of iommufd, and of VFIO for devices that are opened as cdevs.
//!
//! Numbers and structures are those of `linux/iommufd.h` and `linux/vfio.h`. An IOAS is made, mapped and unmapped by
//! the crates `vfio-ioctls` and `iommufd-ioctls`; what they have no call for is here. Every function returns the
//! kernel's errno unchanged; the callers add the device and the action.
#![allow(unsafe_code)] // ioctl(2), and mapping memory for devices.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::raw::c_ulong;
use std::sync::Arc;

use gantry_devices::mapping::HostMapping;
use iommufd_bindings::iommufd as abi;
use iommufd_ioctls::IommuFd;
use vfio_bindings::bindings::vfio;
use vfio_ioctls::{VfioError, VfioIommufd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref};

use super::ioctl::{address_in, argsz, checked, request};

pub(super) const DEVICE_BIND_IOMMUFD: c_ulong = request(18);
pub(super) const DEVICE_ATTACH_IOMMUFD_PT: c_ulong = request(19);
pub(super) const DEVICE_DETACH_IOMMUFD_PT: c_ulong = request(20);

const fn iommufd_request(number: u32) -> c_ulong {
    ioctl_expr(_IOC_NONE, abi::IOMMUFD_TYPE as u32, number, 0)
}

pub(super) const IOMMUFD_DESTROY: c_ulong = iommufd_request(abi::IOMMUFD_CMD_DESTROY);
pub(super) const IOAS_ALLOC: c_ulong = iommufd_request(abi::IOMMUFD_CMD_IOAS_ALLOC);
pub(super) const IOAS_IOVA_RANGES: c_ulong = iommufd_request(abi::IOMMUFD_CMD_IOAS_IOVA_RANGES);
pub(super) const IOAS_MAP: c_ulong = iommufd_request(abi::IOMMUFD_CMD_IOAS_MAP);
pub(super) const IOAS_UNMAP: c_ulong = iommufd_request(abi::IOMMUFD_CMD_IOAS_UNMAP);

/// How many IOVA ranges are asked for at first.
const RANGES: usize = 16;

/// The kernel's answer behind an error of `vfio-ioctls`.
fn answer(error: &VfioError) -> io::Error {
    let mut cause: Option<&dyn Error> = Some(error);
    while let Some(error) = cause {
        if let Some(errno) = error.downcast_ref::<errno::Error>() {
            return io::Error::from_raw_os_error(errno.errno());
        }
        cause = error.source();
    }
    io::Error::other(error.to_string())
}

/// Makes an IOAS of an iommufd that is open. It is destroyed when the value is dropped.
pub fn alloc_ioas(iommufd: File) -> io::Result<VfioIommufd> {
    let iommufd = Arc::new(IommuFd::new_from_fd(iommufd));
    VfioIommufd::new(iommufd, None, None).map_err(|error| answer(&error))
}

/// Lets devices read and write `len` bytes of `memory` from `offset` on, at `iova`. The pages are
/// pinned until they are unmapped, whether or not `memory` outlives that.
pub fn map_ioas(
    ioas: &VfioIommufd,
    iova: u64,
    memory: &HostMapping,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let address = address_in(memory, offset, len)? as *mut u8;
    // SAFETY: the range lies inside memory that was mapped to be shared with devices and is never reached through
    // references.
    let mapped = unsafe { ioas.vfio_dma_map(iova, len as usize, address) };
    mapped.map_err(|error| answer(&error))
}

/// Unmaps all mappings in the range.
pub fn unmap_ioas(ioas: &VfioIommufd, iova: u64, len: u64) -> io::Result<()> {
    let unmapped = ioas.vfio_dma_unmap(iova, len as usize);
    unmapped.map_err(|error| answer(&error))
}

/// First and last address of each range that can be mapped, with the devices that are attached now.
pub fn iova_ranges(ioas: &VfioIommufd) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges = vec![abi::iommu_iova_range::default(); RANGES];
    loop {
        let mut query = abi::iommu_ioas_iova_ranges {
            size: argsz::<abi::iommu_ioas_iova_ranges>(),
            ioas_id: ioas.ioas().id(),
            num_iovas: u32::try_from(ranges.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            allowed_iovas: ranges.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the structure is the one the request is defined with, and says its own size; the kernel writes at
        // most the `num_iovas` ranges that the buffer behind its pointer has.
        let ret = unsafe { ioctl_with_mut_ref(&**ioas.iommufd(), IOAS_IOVA_RANGES, &mut query) };
        let count = query.num_iovas as usize;
        match checked(ret) {
            // There are more ranges than the buffer holds.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) && count > ranges.len() => {
                ranges.resize(count, Default::default());
            }
            Err(error) => return Err(error),
            Ok(_) => {
                let ranges = ranges.iter().take(count);
                return Ok(ranges.map(|range| (range.start, range.last)).collect());
            }
        }
    }
}

/// Opens the device behind a cdev, which resets it where it can be, for the iommufd. `token` is that of its card;
/// kernels before 6.17 know no token here (EINVAL).
pub fn bind(
    device: BorrowedFd<'_>,
    iommufd: &impl AsRawFd,
    token: Option<&[u8; 16]>,
) -> io::Result<()> {
    let mut bind = vfio::vfio_device_bind_iommufd {
        argsz: argsz::<vfio::vfio_device_bind_iommufd>(),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    if let Some(token) = token {
        bind.flags = vfio::VFIO_DEVICE_BIND_FLAG_TOKEN;
        bind.token_uuid_ptr = token.as_ptr() as u64;
    }
    // SAFETY: the structure is the one the request is defined with, and says its own size; its pointer is null, or
    // that of 16 bytes, which outlive the call and which the kernel only reads.
    let ret = unsafe { ioctl_with_mut_ref(&device, DEVICE_BIND_IOMMUFD, &mut bind) };
    checked(ret).map(drop)
}

/// Attaches a device that is bound to an iommufd to one of its IOASes.
pub fn attach(device: BorrowedFd<'_>, ioas: u32) -> io::Result<()> {
    let mut attach = vfio::vfio_device_attach_iommufd_pt {
        argsz: argsz::<vfio::vfio_device_attach_iommufd_pt>(),
        pt_id: ioas,
        ..Default::default()
    };
    // SAFETY: the structure is the one the request is defined with, and says its own size.
    let ret = unsafe { ioctl_with_mut_ref(&device, DEVICE_ATTACH_IOMMUFD_PT, &mut attach) };
    checked(ret).map(drop)
}

/// Detaches a device from its IOAS: its DMA ends.
pub fn detach(device: BorrowedFd<'_>) -> io::Result<()> {
    let detach = vfio::vfio_device_detach_iommufd_pt {
        argsz: argsz::<vfio::vfio_device_detach_iommufd_pt>(),
        ..Default::default()
    };
    // SAFETY: the structure is the one the request is defined with, and says its own size.
    let ret = unsafe { ioctl_with_ref(&device, DEVICE_DETACH_IOMMUFD_PT, &detach) };
    checked(ret).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel() {
        assert_eq!(DEVICE_BIND_IOMMUFD, 0x3b76);
        assert_eq!(IOAS_ALLOC, 0x3b81);
        assert_eq!(IOAS_IOVA_RANGES, 0x3b84);
        assert_eq!(IOAS_UNMAP, 0x3b86);
    }

    #[test]
    fn a_refusal_carries_the_errno() {
        let null = File::open("/dev/null").unwrap();
        let fd = null.as_fd();
        let refused = [
            bind(fd, &null, None),
            bind(fd, &null, Some(&[0; 16])),
            attach(fd, 1),
            detach(fd),
            alloc_ioas(null.try_clone().unwrap()).map(drop),
        ];
        for (call, result) in refused.into_iter().enumerate() {
            let errno = result.unwrap_err().raw_os_error();
            assert_eq!(errno, Some(libc::ENOTTY), "call {call}");
        }
    }
}
