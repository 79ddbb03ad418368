//! The API's server before a VM that is played: what clients get, and what bad clients do not do.

// The workspace allows these in tests; clippy does not take a test's helper functions for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod by_hand;
mod cleanup;
mod client;
mod commands;
mod console;
mod descriptors;
mod fake;
mod faults;
mod hostile;
mod published;
mod service;
