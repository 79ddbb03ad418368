//! Definitions by operators: groups and their rules, aliases, plans, tenants. And device requests of VMs.

pub(crate) mod group;
pub(crate) mod nova;
pub(crate) mod plan;
pub(crate) mod request;
pub(crate) mod rule;
pub(crate) mod sriov;
pub(crate) mod tenant;
pub(crate) mod vf_settings;
pub(crate) mod vgpu;

pub use group::{
    Bind, Chosen, EditError, GroupChange, GroupError, GroupFiles, GroupType, Groups, NO_USB,
    ResourceGroup, change_aliases, change_device_specs,
};
pub use nova::{Alias, DeviceSpec, NumaPolicy, Traits};
pub use plan::{Plan, PlanError, Plans, change_plan, create_plan, delete_plan};
pub use request::{
    Aliases, DeviceRequest, DeviceSource, OnError, Placement, RomSource, SentRequest,
    check_device_id, nth_id,
};
pub use rule::Rule;
pub use sriov::SriovSpec;
pub use tenant::{Tenant, TenantFile, Tenants, UnknownTenant};
pub use vf_settings::Mac;
pub use vgpu::{Instance, VgpuSpec};
