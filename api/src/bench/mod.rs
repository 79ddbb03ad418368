//! `gantry bench`: what a device does on the host and in a guest, by the same code on both sides.
//!
//! [`run`] alternates between the two: on the host, `gantry_vmm::MeasuredDevices` leases the devices and measures them
//! through VFIO; in the guest, this program is init ([`guest`]), in an initramfs made for it ([`image`]).

mod compare;
mod facts;
pub mod guest;
mod image;
pub mod model;
mod page;
mod run;
mod stats;
mod table;
mod vm;

pub use compare::{Verdict, compare, print_comparison};
pub use model::Results;
pub use page::page;
pub use run::{Job, run};
pub use table::print_results;
#[cfg(test)]
pub use table::tests::example;
pub use vm::INIT as BENCH_GUEST;
