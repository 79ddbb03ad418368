//! Errors in definitions of groups.

use thiserror::Error;

use crate::base::config::ConfigError;
use crate::base::json::{JsonError, near_or_list};

/// A definition of groups is wrong, or cannot be read.
#[derive(Debug, Error)]
pub enum GroupError {
    /// A file is wrong, or cannot be read or written.
    #[error(transparent)]
    File(#[from] ConfigError),
    /// There is no such group.
    #[error("there is no group \"{name}\"{}", near_or_list(.near, "gantry group list"))]
    Unknown {
        /// The name.
        name: String,
        /// The most similar name.
        near: Option<String>,
    },
}

impl From<JsonError> for GroupError {
    fn from(error: JsonError) -> Self {
        Self::File(error.into())
    }
}

impl GroupError {
    /// Whether a definition or a name is wrong, rather than a file unusable.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::File(error) => error.is_mistake(),
            Self::Unknown { .. } => true,
        }
    }
}
