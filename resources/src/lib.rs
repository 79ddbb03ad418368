//! What the host owns and who holds it: the PCI inventory, groups, leases and driver binding.
//!
//! Nothing here keeps state of its own. What exists is read from sysfs at the moment of asking, who
//! holds it is a kernel lock, and what is wanted is JSON under the configuration directory. So there
//! is nothing that a crash, a host reboot or a hand-edited file could leave behind or contradict.
//!
//! The usual way through: [`scan`] for a list of [`HostDevice`]s, [`Groups::load`] for the pools,
//! [`detach`] to hand devices to vfio-pci, [`allocate`] to take [`Lease`]s for a VM; dropping a lease
//! gives the device back. Every function takes [`HostPaths`], so that all of it runs over a fake tree.

#![forbid(unsafe_code)]

mod allocation;
mod base;
mod check;
mod facts;
#[cfg(test)]
mod fixture;
mod holding;
mod inventory;
mod making;
mod moving;
mod opener;
mod pools;
mod tenants;

pub use allocation::Lease;
pub use allocation::{AllocateError, Fit, RequestFit, allocate, allocate_near, fit};
pub use base::atomic::make_dir;
pub use base::bdf::{BdfError, HostBdf};
pub use base::config::ConfigError;
pub use base::helpers::reap_helpers;
pub use base::host::HostPaths;
pub use base::json;
pub use base::name::DeviceName;
pub use base::numbers::{Numbers, NumbersError};
pub use base::regular::{open_below, open_regular, read_regular, read_text};
pub use base::uuid::{Uuid, UuidError};
pub use check::{
    Advice, CheckError, CommandLineChange, Finding, Level, Report, check, note_reboot,
};
pub use facts::ids::{PciClass, PciId};
pub use facts::interrupts::Interrupts;
pub use facts::memlock::memlock_limit;
pub use facts::nvme::{Namespace, Nvme};
pub use facts::reserved::{ReservedError, ReservedKind, ReservedRegion, reserved_regions};
pub use facts::topology::{HostNode, host_nodes, node_of, online_cpus};
pub use facts::vgpu::{VendorType, VendorVgpu};
pub use holding::host_lock::LeaseError;
pub use holding::lock_file::holder;
pub use holding::maintenance::{
    Announced, Maintenance, MaintenanceError, RunningVm, announce, begin_maintenance,
    end_maintenance, maintenance, running_vms,
};
pub use holding::own_files::{OwnFiles, own_files};
pub use holding::quarantine::{QuarantineError, Until, shared_quarantine};
pub use holding::record::{Holder, LeaseKind, LeaseRecord, LeaseStatus};
pub use inventory::card::{Allow, Card, Terms, cards, is_reset, lacks};
pub use inventory::device::DeviceType;
pub use inventory::device::{DeviceState, HostDevice, NodeAccess, Sriov};
pub use inventory::error::InventoryError;
pub use inventory::guard::{Guarded, HostUse, OnBlock, Via, host_uses};
pub use inventory::mdev::{MdevDevice, MdevParent, MdevType, Mdevs};
pub use inventory::modules::{KernelModules, NoDriver};
pub use inventory::obstacle::{Blocked, Obstacle, Sieve, blocked};
pub use inventory::release::release_quarantine;
pub use inventory::scan::scan;
pub use inventory::tree::{TreeNode, tree};
pub use inventory::usb::{UsbDevice, scan_usb};
pub use making::demand::{reap, restore_helper};
pub use making::sriov::{
    HostAccess, HostWrite, Interface, LinkError, LinkWrite, LiveVf, Netlink, SriovError,
    SriovReport, VfLinks, activate, deactivate,
};
pub use making::vgpu::{VgpuError, VgpuReport, make_ahead, unmake_ahead};
pub use moving::bind::{BindError, BindReport, BindRequest, detach, reattach};
pub use moving::moves::MoveError;
pub use moving::persist::{PersistBy, Persistent, persist, persist_functions, persist_unit};
pub use moving::writer::{
    ChildWriter, SysfsWrite, SysfsWriter, Unfinished, WriteError, write_helper,
};
pub use opener::{
    BUSY_PATIENCE, HeldLease, Limit, Opened, OpenedDevice, OpenedGroup, Opener, OpenerError,
    ToCome, opener_helper, pool_of, source_of, to_come, ungrouped,
};
pub use pools::group::{
    Bind, Chosen, EditError, GroupChange, GroupError, GroupFiles, GroupType, Groups, NO_USB,
    Overlap, ResourceGroup, change_aliases, change_device_specs,
};
pub use pools::nova::{Alias, DeviceSpec, NumaPolicy, Traits};
pub use pools::plan::{Plan, PlanError, PlanSize, Plans, change_plan, create_plan, delete_plan};
pub use pools::request::{
    DeviceEntry, InterruptNeed, Placement, Request, RequestError, Requests, Source, Wish, aliases,
};
pub use pools::rule::{
    ClassPrefix, Filter, FilterValue, Filters, HexId, IdPair, Number, Rule, RuleError, Slot, Word,
};
pub use pools::sriov::{MacPlan, SriovSpec, VfToken};
pub use pools::tenant::{Tenant, TenantFile, Tenants};
pub use pools::vf_settings::{LinkState, Mac, VfSetting, VfState};
pub use pools::vgpu::{Instance, VgpuSpec};
pub use tenants::{
    Grant, Granted, TenantError, create_tenant, delete_tenant, edit_tenant, grant,
    put_tenants_right, revoke, revoke_mdevs,
};
