//! One virtual machine on KVM, put together and taken apart.
//!
//! [`Vmm`] is the whole of it: it takes a validated [`VmConfig`], leases the host's devices, builds
//! the machine, runs the guest until it ends, and gives everything back. Meanwhile clients reach the
//! VM through its [`Handle`], with a [`command::Command`].
//!
//! The modules lie in floors, and each imports from those below it only:
//!
//! | floor | modules |
//! |---|---|
//! | the process | `vmm`: one VM after the other; the way in for clients |
//! | one VM | `vm`: built, run, rebooted, ended |
//! | its devices | `hotplug`: slots, and how devices come and go |
//! | what clients see | `command`, `status`, `error` |
//! | its parts | `passthrough`: devices of the host; `disks`, `virtio`; `machine`: all that every VM has; `vcpus` |
//! | terms and facts | `info`, `host`, `cpu`, `boot`, `kvm` |
//! | ground | `config`, `layout`, `process`: threads, sandbox, events |

mod boot;
pub mod command;
mod config;
mod cpu;
mod disks;
mod error;
mod host;
mod hotplug;
mod info;
mod kvm;
mod layout;
mod machine;
mod passthrough;
mod process;
mod status;
mod topology;
mod vcpus;
mod virtio;
mod vm;
mod vmm;

pub use gantry_devices::bounded::BoundedFile;
pub use gantry_devices::bounded_writer;
pub use gantry_devices::virtio::block::{Queues, SERIAL_LEN};
pub use gantry_devices::virtio::net::Offloads;

pub use config::{
    CloudInit, CpuConfig, DiskConfig, FileSet, Folders, Hotplug, MemorySize, NetConfig, NumaPolicy,
    Payload, RngConfig, SerialMode, TapConfig, VcpuCount, VmConfig, VsockConfig,
};
pub use disks::{DiskError, DiskProblem, open as open_disk};
pub use error::Error;
pub use gantry_vfio::measure;
pub use machine::release_program_pages;
pub use passthrough::{DeviceError, MeasuredDevices};
pub use process::journal::is_journal;
pub use process::sandbox::SeccompMode;
pub use process::terminal::{Keys, Terminal};
pub use process::{sandbox, threads};
pub use topology::Topology;
pub use virtio::interface_name_flaw;
pub use vm::Outcome;
pub use vmm::{Handle, Options, Vmm, check};
