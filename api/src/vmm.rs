//! Stand-in for the VMM's entry, until the crate has it.

#![allow(dead_code, missing_docs)]

#[path = "../../vmm/src/config.rs"]
mod config;
pub use config::*;

/// How system calls are filtered.
#[derive(Debug, Clone, Copy)]
pub enum SeccompMode {
    On,
    Log,
    Off,
}
/// Options.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub seccomp: SeccompMode,
}
/// How a VM ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    PowerOff,
    Stopped,
    Signal(i32),
    GuestFault(String),
}
/// Failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this gantry cannot run VMs yet")]
    Stub,
}
/// Entry.
pub fn run(
    config: VmConfig,
    host: &gantry_resources::HostPaths,
    options: Options,
) -> Result<Outcome, Error> {
    let _ = (config, host, options);
    Err(Error::Stub)
}
