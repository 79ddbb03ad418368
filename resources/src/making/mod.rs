//! Devices that do not exist until gantry makes them: virtual functions and vGPUs.

pub(crate) mod demand;
pub(crate) mod sriov;
pub(crate) mod vgpu;

pub use demand::{reap, restore_helper};
pub use sriov::{HostAccess, Netlink, SriovError, SriovReport, activate, deactivate};
pub use vgpu::{VgpuError, VgpuReport, make_ahead, unmake_ahead};
