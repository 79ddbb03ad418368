//! How devices change drivers, and come back: writes with deadlines, binding, restore records.

pub(crate) mod bind;
pub(crate) mod moves;
pub(crate) mod persist;
pub(crate) mod writer;

pub use bind::{BindError, BindReport, BindRequest, detach, reattach};
pub use persist::{PersistBy, Persistent, persist, persist_functions, persist_unit};
pub use writer::{ChildWriter, SysfsWrite, SysfsWriter, write_helper};
