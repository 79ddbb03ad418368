//! The process that VMs run in: threads and their sandbox, signals, the terminal, and the event loop.

pub mod error;
pub mod event_loop;
pub mod journal;
pub mod sandbox;
pub mod signals;
pub mod terminal;
pub mod threads;
