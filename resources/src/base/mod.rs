//! The base of all modules: paths, addresses and names, files, JSON texts, helper processes, rtnetlink.

pub(crate) mod acl;
pub(crate) mod atomic;
pub(crate) mod bdf;
pub(crate) mod chain;
pub(crate) mod config;
pub(crate) mod helpers;
pub(crate) mod host;
pub mod json;
pub(crate) mod name;
pub(crate) mod numbers;
pub(crate) mod regular;
pub mod rtnetlink;
pub(crate) mod size;
pub(crate) mod sysfs;
pub(crate) mod text;
pub(crate) mod uuid;

pub use atomic::make_dir;
pub use bdf::{BdfError, HostBdf};
pub use chain::{causes, chain, messages};
pub use config::ConfigError;
pub use helpers::reap_helpers;
pub use host::HostPaths;
pub use name::{DeviceName, label_flaw};
pub use numbers::Numbers;
pub use regular::{open_below, open_regular, open_with, read_regular, read_text};
pub use size::ByteSize;
pub use text::harmless;
pub use uuid::Uuid;
