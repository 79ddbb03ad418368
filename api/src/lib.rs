//! What people and programs touch: the `gantry` binary's command line, JSON files and HTTP API.

#![forbid(unsafe_code)]

mod bench;
mod cli;
mod config;
pub mod http;
mod output;
mod report;
mod signals;
mod status;
mod stderr;
mod table;
mod vm_log;

pub use cli::main;
