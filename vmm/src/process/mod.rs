//! The process that VMs run in: its threads and what each may do, its signals, its terminal, and the loop that
//! events come in by.

pub mod error;
pub mod event_loop;
pub mod sandbox;
pub mod signals;
pub mod terminal;
pub mod threads;
