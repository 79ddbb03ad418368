//! The requests of ioctl(2) that this crate makes, by the threads that make them.

use super::ioctl::*;
use super::iommufd::*;

/// Requests for opening a container or an IOAS, groups and devices.
pub const OPEN_REQUESTS: &[u64] = &[
    GET_API_VERSION,
    CHECK_EXTENSION,
    SET_IOMMU,
    GROUP_GET_STATUS,
    GROUP_SET_CONTAINER,
    GROUP_GET_DEVICE_FD,
    DEVICE_GET_INFO,
    DEVICE_GET_REGION_INFO,
    DEVICE_GET_IRQ_INFO,
    DEVICE_GET_PCI_HOT_RESET_INFO,
    IOMMU_GET_INFO,
    IOAS_ALLOC,
    IOAS_IOVA_RANGES,
    DEVICE_BIND_IOMMUFD,
    DEVICE_ATTACH_IOMMUFD_PT,
];

/// Requests of a running VM with open devices, until it has closed them.
pub const RUNTIME_REQUESTS: &[u64] = &[
    DEVICE_SET_IRQS,
    DEVICE_RESET,
    DEVICE_PCI_HOT_RESET,
    IOMMU_GET_INFO,
    IOMMU_MAP_DMA,
    IOMMU_UNMAP_DMA,
    GROUP_UNSET_CONTAINER,
    IOAS_MAP,
    IOAS_UNMAP,
    DEVICE_DETACH_IOMMUFD_PT,
    IOMMUFD_DESTROY,
];

/// Requests for masking and unmasking interrupts of a device.
pub const INTERRUPT_REQUESTS: &[u64] = &[DEVICE_SET_IRQS];

/// Requests of a thread that maps guest memory for devices, and unmaps it if that fails.
pub const DMA_REQUESTS: &[u64] = &[
    IOMMU_GET_INFO,
    IOMMU_MAP_DMA,
    IOMMU_UNMAP_DMA,
    IOAS_IOVA_RANGES,
    IOAS_MAP,
    IOAS_UNMAP,
];
