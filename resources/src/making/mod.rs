//! Devices that do not exist until gantry makes them: virtual functions and vGPUs.

pub(crate) mod demand;
pub(crate) mod sriov;
pub(crate) mod vgpu;
