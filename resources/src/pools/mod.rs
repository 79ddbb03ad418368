//! What operators write down: groups and their rules, aliases, plans; and what a VM asks for.

pub(crate) mod group;
pub(crate) mod nova;
pub(crate) mod plan;
pub(crate) mod request;
pub(crate) mod rule;
pub(crate) mod sriov;
pub(crate) mod tenant;
pub(crate) mod vf_settings;
pub(crate) mod vgpu;
