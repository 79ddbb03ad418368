//! Who holds a device, and which devices no VM may have: leases, quarantine, maintenance.

pub(crate) mod lease;
pub(crate) mod maintenance;
pub(crate) mod quarantine;
pub(crate) mod reach;
