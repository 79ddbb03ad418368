//! The filters that select devices.

use serde::{Deserialize, Serialize};

/// Filters that must all hold for a device to match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Rule {}
