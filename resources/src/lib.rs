//! What the host owns and who holds it: the PCI inventory, groups, leases and driver binding.
//!
//! Nothing here keeps state of its own. What exists is read from sysfs at the moment of asking, who
//! holds it is a kernel lock, and what is wanted is JSON under the configuration directory. So there
//! is nothing that a crash, a host reboot or a hand-edited file could leave behind or contradict.
//!
//! The modules are floors, each of which imports only those below it:
//!
//! | floor | holds |
//! |---|---|
//! | [`check`] | what the host lacks to give devices to VMs |
//! | [`opener`] | the process that leases and opens devices for a VM that runs |
//! | [`tenants`] | whose devices are |
//! | [`allocation`] | which device a VM gets, and its leases |
//! | [`making`] | devices that are made for VMs, or bound for one and given back |
//! | [`moving`] | binding to drivers, writes to sysfs with deadlines |
//! | [`pools`] | groups, rules, aliases, plans, tenants as they are written down; requests |
//! | [`inventory`] | the host's devices, with who holds them, and what the host uses |
//! | [`holding`] | locks, quarantine, maintenance |
//! | [`facts`] | what sysfs and procfs say |
//! | [`base`] | paths, names, files |
//!
//! The usual way through: [`inventory::scan`] for a list of [`inventory::HostDevice`]s,
//! [`pools::Groups::load`] for the pools, [`moving::detach`] to hand devices to vfio-pci,
//! [`allocation::allocate`] to take [`allocation::Lease`]s for a VM; dropping a lease gives the device
//! back. Every function takes [`base::HostPaths`], so that all of it runs over a fake tree.

#![forbid(unsafe_code)]
#![warn(unreachable_pub)]

pub mod allocation;
pub mod base;
pub mod check;
pub mod facts;
#[cfg(test)]
mod fixture;
pub mod holding;
pub mod inventory;
pub mod making;
pub mod moving;
pub mod opener;
pub mod pools;
pub mod tenants;
