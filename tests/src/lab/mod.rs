//! The lab: a whole passthrough host, simulated, on any machine.
//!
//! QEMU emulates, without hardware help, a CPU with SVM, an Intel IOMMU and real device models; a
//! Linux kernel booted in it is the *host* (L1) with real KVM and VFIO, and gantry runs *guests*
//! (L2) there. [`Host::boot`] gives a booted host to run commands in.
//!
//! The host's processors take turns on one thread of this machine, unless something is measured or the soak
//! looks for races ([`Setup::parallel`]). When they run beside each other, a guest dies or goes silent now
//! and then: three did in one run of 167 cases, none in ten other runs, and why was not found. It has not
//! been seen where they take turns, which takes no longer on two processors.
//!
//! | room | holds |
//! |---|---|
//! | [`cache`] | what is made once and kept: folders named after a hash of their inputs |
//! | [`sources`], [`packages`] | Debian packages, downloaded and unpacked, never installed |
//! | [`kernel`], [`kernel_build`] | the stock Debian kernel, and the lab's own for iommufd and mdev |
//! | [`debian`] | a Debian disk image for guests |
//! | [`erratum`] | faults of QEMU that end or hang guests, mended in the unpacked copy |
//! | [`parts`] | all that a lab is made of: found in the cache or made |
//! | [`initramfs`] | cpio archives of programs with their libraries, modules and files |
//! | [`images`] | what is in the two initramfs, the host's and the guest's |
//! | [`put`] | files of this machine that go there besides |
//! | [`disk`] | disks with known contents |
//! | [`device`] | the devices of the machine |
//! | [`qemu`] | the machine, its command line and its process |
//! | [`monitor`] | QEMU's own monitor: faults and hot-plug from outside |
//! | [`channel`] | the wire to the agent |
//! | [`host`] | a booted lab host |
//! | [`end`] | how a lab ended |
//! | [`shell`] | a terminal in it |
//! | [`cli`] | `cargo xtask lab` |

pub mod cache;
pub mod channel;
pub mod cli;
pub mod command;
pub mod debian;
pub mod device;
pub mod disk;
pub mod end;
pub mod erratum;
pub mod host;
pub mod images;
pub mod initramfs;
pub mod kernel;
pub mod kernel_build;
pub mod monitor;
pub mod packages;
pub mod parts;
pub mod put;
pub mod qemu;
pub mod rom;
pub mod shell;
pub mod sources;

pub use end::End;
pub use host::{Host, Output, Setup};
pub use parts::Parts;
