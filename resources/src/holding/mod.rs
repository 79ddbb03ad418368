//! Who holds a device, and which devices no VM may have: leases, quarantine, maintenance.

pub(crate) mod device_lock;
pub(crate) mod host_lock;
pub(crate) mod lock_file;
pub(crate) mod maintenance;
pub(crate) mod own_files;
pub(crate) mod passing;
pub(crate) mod quarantine;
pub(crate) mod record;
pub(crate) mod restore;
pub(crate) mod vgpu_records;

pub use lock_file::holder;
pub use maintenance::{
    Maintenance, MaintenanceError, RunningVm, announce, begin_maintenance, end_maintenance,
    maintenance, running_vms,
};
pub use own_files::own_files;
pub use quarantine::shared_quarantine;
pub use record::{Holder, LeaseStatus};
