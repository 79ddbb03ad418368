//! placeholder

mod boot;
mod cpu;
mod layout;
