//! Who holds a device, and which devices no VM may have: leases, quarantine, maintenance.

pub(crate) mod device_lock;
pub(crate) mod host_lock;
pub(crate) mod lock_file;
pub(crate) mod maintenance;
pub(crate) mod own_files;
pub(crate) mod passing;
pub(crate) mod quarantine;
pub(crate) mod record;
pub(crate) mod vgpu_records;
