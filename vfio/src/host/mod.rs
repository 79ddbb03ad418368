//! The kernel's VFIO: containers, groups, DMA mappings and devices.

mod attachment;
mod container;
mod device;
mod dma;
mod group;
mod info;
mod ioctl;

pub use attachment::Attachment;
pub use container::Container;
pub use device::{DeviceIo, Irq, Region, VfioDevice};
pub use dma::{DmaMapping, DmaSpace, Iommu};
pub use group::{Group, GroupObserver};
pub use info::{IommuInfo, IrqInfo, MmapArea, RegionInfo};
pub use ioctl::{DMA_REQUESTS, INTERRUPT_REQUESTS, OPEN_REQUESTS, RUNTIME_REQUESTS};
