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

mod allocate;
mod atomic;
mod bdf;
mod bind;
mod card;
mod check;
mod config;
mod demand;
mod dsn;
#[cfg(test)]
mod fixture;
mod former;
mod group;
mod guard;
mod helpers;
mod host;
mod ids;
mod interrupts;
mod inventory;
mod lease;
mod maintenance;
mod mdev;
mod memlock;
mod modules;
mod moves;
mod name;
mod names;
mod nova;
mod numbers;
mod obstacle;
mod opener;
mod persist;
mod plan;
mod quarantine;
mod reach;
mod regular;
mod request;
mod reserved;
mod rule;
mod sriov;
mod sysfs;
mod tenant;
mod topology;
mod tree;
mod usb;
mod uuid;
mod vgpu;
mod writer;

pub use allocate::{AllocateError, Fit, RequestFit, allocate, allocate_near, fit};
pub use atomic::make_dir;
pub use bdf::{BdfError, HostBdf};
pub use bind::{BindError, BindReport, BindRequest, detach, reattach};
pub use card::{Allow, Card, Terms, cards, is_reset, lacks};
pub use check::{
    Advice, CheckError, CommandLineChange, Finding, Level, Report, check, note_reboot,
};
pub use config::ConfigError;
pub use config::place::Place;
pub use demand::{reap, restore_helper};
pub use group::{
    Bind, Chosen, EditError, GroupChange, GroupError, GroupFiles, GroupType, Groups, NO_USB,
    Overlap, ResourceGroup, change_aliases, change_device_specs,
};
pub use guard::{Guarded, HostUse, OnBlock, Via, host_uses};
pub use helpers::reap_helpers;
pub use host::HostPaths;
pub use ids::{PciClass, PciId};
pub use interrupts::Interrupts;
pub use inventory::{
    DeviceState, HostDevice, InventoryError, Namespace, NodeAccess, Nvme, Sriov, scan,
};
pub use lease::{Holder, Lease, LeaseError, LeaseKind, LeaseRecord, LeaseStatus, holder};
pub use maintenance::{
    Announced, Maintenance, MaintenanceError, RunningVm, announce, begin_maintenance,
    end_maintenance, maintenance, running_vms,
};
pub use mdev::{MdevDevice, MdevParent, MdevType, Mdevs};
pub use memlock::memlock_limit;
pub use modules::{KernelModules, NoDriver};
pub use moves::MoveError;
pub use name::DeviceName;
pub use nova::{Alias, DeviceSpec, DeviceType, NumaPolicy, Traits};
pub use numbers::{Numbers, NumbersError};
pub use obstacle::{Blocked, Obstacle, Sieve, blocked};
pub use opener::{
    BUSY_PATIENCE, HeldLease, Limit, Opened, OpenedDevice, OpenedGroup, Opener, OpenerError,
    ToCome, opener_helper, pool_of, source_of, to_come, ungrouped,
};
pub use persist::{PersistBy, Persistent, persist, persist_functions, persist_unit};
pub use plan::{Plan, PlanError, PlanSize, Plans, change_plan, create_plan, delete_plan};
pub use quarantine::{QuarantineError, Until, quarantine, release_quarantine, shared_quarantine};
pub use reach::{OwnFiles, own_files};
pub use regular::{open_below, open_regular, read_regular, read_text};
pub use request::{
    DeviceEntry, InterruptNeed, Placement, Request, RequestError, Requests, Source, Wish, aliases,
};
pub use reserved::{ReservedError, ReservedKind, ReservedRegion, reserved_regions};
pub use rule::{
    ClassPrefix, Filter, FilterValue, Filters, HexId, IdPair, Number, Rule, RuleError, Slot, Word,
};
pub use sriov::{
    HostAccess, HostWrite, Interface, LinkError, LinkState, LinkWrite, LiveVf, Mac, MacPlan,
    Netlink, SriovError, SriovReport, SriovSpec, VfLinks, VfSetting, VfState, VfToken, activate,
    deactivate,
};
pub use tenant::{
    Grant, Granted, Tenant, TenantError, TenantFile, Tenants, create_tenant, delete_tenant,
    edit_tenant, grant, put_tenants_right, revoke, revoke_mdevs,
};
pub use topology::{HostNode, host_nodes, node_of, online_cpus};
pub use tree::{TreeNode, tree};
pub use usb::{UsbDevice, scan_usb};
pub use uuid::{Uuid, UuidError};
pub use vgpu::{
    Instance, VendorType, VendorVgpu, VgpuError, VgpuReport, VgpuSpec, make_ahead, unmake_ahead,
};
pub use writer::{ChildWriter, SysfsWrite, SysfsWriter, Unfinished, WriteError, write_helper};
