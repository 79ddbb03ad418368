//! The host's devices: facts joined with holders, and the reasons why a VM cannot have a device.

pub(crate) mod card;
pub(crate) mod device;
pub(crate) mod driver_record;
pub(crate) mod error;
pub(crate) mod guard;
pub(crate) mod mdev;
pub(crate) mod modules;
pub(crate) mod release;
pub(crate) mod scan;
pub(crate) mod tree;
pub(crate) mod unavailable;
pub(crate) mod usb;

pub use card::{Allow, Card, Terms, cards, is_reset, lacks, own_resets};
pub use device::{DeviceState, HostDevice, Sriov};
pub use error::InventoryError;
pub use mdev::{MdevDevice, MdevParent, Mdevs};
pub use modules::{KernelModules, NoDriver};
pub use release::release_quarantine;
pub use scan::scan;
pub use tree::{TreeNode, tree};
pub use usb::{UsbDevice, scan_usb};
