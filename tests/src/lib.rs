//! The lab (a simulated VFIO host), and what the demo, the tests and the benches share.
//!
//! See [`lab`] for the host, [`protocol`] for how it is spoken to, [`checks`] for what has to pass,
//! [`mod@bench`] for what is measured.

pub mod bench;
pub mod checks;
pub mod cleanup;
pub mod demo;
pub mod devices;
pub mod lab;
pub mod modules;
pub mod package;
pub mod protocol;
pub mod published;
pub mod times;
pub mod ui;
