//! What sysfs and procfs show, without the holders of devices.

pub(crate) mod alive;
pub(crate) mod attributes;
pub(crate) mod dsn;
pub(crate) mod ids;
pub(crate) mod interrupts;
pub(crate) mod memlock;
pub(crate) mod names;
pub(crate) mod no_reset;
pub(crate) mod nvme;
pub(crate) mod open_files;
pub(crate) mod process;
pub(crate) mod reserved;
pub(crate) mod topology;
pub(crate) mod vfio;
pub(crate) mod vgpu;

pub use ids::{PciClass, PciId};
pub use memlock::memlock_limit;
pub use nvme::Nvme;
pub use reserved::{ReservedError, ReservedKind, ReservedRegion, reserved_regions};
pub use topology::{HostNode, host_nodes, node_of, online_cpus};
pub use vfio::{CdevError, VfioBackEnd, cdev};
