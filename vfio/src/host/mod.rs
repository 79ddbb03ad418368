//! The kernel's VFIO: containers with groups, iommufd with cdevs, DMA mappings and devices.

mod attachment;
mod cdev;
mod container;
mod device;
mod dma;
mod group;
mod info;
mod ioas;
mod ioctl;
mod iommufd;
mod requests;
mod retry;

pub use attachment::Attachment;
pub use cdev::{Cdev, CdevBinder, UnboundCdev};
pub use container::Container;
pub use device::{DeviceIo, Irq, Region, VfioDevice};
pub use dma::{DmaMapping, DmaSpace, Iommu};
pub use group::{FileObserver, Group};
pub use info::{IommuInfo, IrqInfo, MmapArea, RegionInfo};
pub use ioas::Ioas;
pub use requests::{DMA_REQUESTS, INTERRUPT_REQUESTS, OPEN_REQUESTS, RUNTIME_REQUESTS};
