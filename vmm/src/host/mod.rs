//! What a VM needs of the host beside devices: NUMA nodes, CPUs, memory and files.

pub mod files;
pub mod placement;
pub mod preflight;
