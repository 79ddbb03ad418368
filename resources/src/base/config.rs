//! The JSON files of the configuration directory. Errors name file, line and key; files are replaced as a whole.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::base::json::{self, JsonError};
use crate::base::regular::read_regular;
use crate::base::{atomic, sysfs};

/// A file of the configuration directory is wrong, or cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A file or directory cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be replaced, and is unchanged.
    #[error(
        "cannot write {path}{}",
        sysfs::if_denied(.source, "run as a user who may, or set GANTRY_CONFIG_DIR")
    )]
    Write {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content of a file is wrong, or would be after the change.
    #[error(transparent)]
    Invalid(#[from] JsonError),
}

impl ConfigError {
    /// Whether the content is wrong. Otherwise the file cannot be used.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Self::Invalid(_))
    }
}

/// The files of one kind, in the order in which they count: `groups.json`, then `groups.d/*.json` in the order of
/// their names, whether or not they exist.
pub(crate) fn files(config: &Path, kind: &str) -> Result<Vec<PathBuf>, ConfigError> {
    let dir = config.join(format!("{kind}.d"));
    let names = sysfs::entries(&dir).map_err(|source| ConfigError::Read {
        path: dir.clone(),
        source,
    })?;
    let names = names
        .iter()
        .filter(|name| name.ends_with(".json") && !name.starts_with('.'));
    let main = config.join(format!("{kind}.json"));
    Ok([main]
        .into_iter()
        .chain(names.map(|name| dir.join(name)))
        .collect())
}

/// The longest file of the configuration directory.
const LONGEST: u64 = 16 << 20;

/// A file's text; none if there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<String>, ConfigError> {
    match read_regular(path, LONGEST) {
        Ok(text) => Ok(Some(text)),
        Err(error) if sysfs::is_gone(&error) => Ok(None),
        Err(source) => Err(ConfigError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Parses a file's text. The path is for errors only.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    Ok(json::from_file(path, text)?)
}

/// Replaces a file, after checking that the new content can be read.
pub(crate) fn write<T: Serialize + DeserializeOwned>(
    path: &Path,
    value: &T,
) -> Result<(), ConfigError> {
    let failed = |source| ConfigError::Write {
        path: path.to_owned(),
        source,
    };
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| failed(io::Error::other(error)))?;
    text.push('\n');
    json::from_text::<T>(&text).map_err(ConfigError::from)?;
    atomic::replace(path, text.as_bytes()).map_err(failed)
}
