//! The built binary over a fake host: what it prints, and the exit codes it ends with.

// The workspace allows these in tests; clippy does not take a test's helper functions for tests.
#![allow(clippy::unwrap_used)]

mod devices;
mod files;
mod functions;
mod groups;
mod host;
mod output;
