//! One virtual machine on KVM, put together and taken apart.
//!
//! [`run`] is the whole of it: it takes a validated [`VmConfig`], leases the host's devices, builds
//! the machine, runs the guest until it ends, and gives everything back.

mod address_space;
mod boot;
mod config;
mod console;
mod control;
mod cpu;
mod error;
mod kvm;
mod layout;
mod memory;
mod preflight;
pub mod sandbox;
pub mod threads;
mod vcpus;
mod vm;

pub use config::{MemorySize, Payload, SerialMode, VcpuCount, VmConfig};
pub use error::Error;
pub use sandbox::SeccompMode;
pub use vm::{Options, Outcome, run};
