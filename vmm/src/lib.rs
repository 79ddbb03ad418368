//! One virtual machine on KVM, put together and taken apart.
//!
//! [`Vmm`] is the whole of it: it takes a validated [`VmConfig`], leases the host's devices, builds
//! the machine, runs the guest until it ends, and gives everything back. Meanwhile clients reach the
//! VM through its [`Handle`], with a [`command::Command`].

mod address_space;
mod boot;
pub mod command;
mod config;
mod console;
mod control;
mod cpu;
mod error;
mod kvm;
mod layout;
mod memory;
mod placement;
mod preflight;
pub mod sandbox;
mod status;
pub mod threads;
mod vcpus;
mod vm;
mod vmm;

pub use gantry_devices::bounded_writer;

pub use config::{
    CpuConfig, Folders, Hotplug, MemorySize, NamedRequest, NumaPolicy, Payload, SerialMode,
    VcpuCount, VmConfig,
};
pub use error::Error;
pub use memory::release_program_pages;
pub use sandbox::SeccompMode;
pub use vm::check;
pub use vmm::{Handle, Options, Outcome, Vmm};
