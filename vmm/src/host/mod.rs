//! What a VM takes of the host beside devices: NUMA nodes, processors, memory and files.

pub mod files;
pub mod placement;
pub mod preflight;
