//! The JSON files of the configuration directory: read with file, line and key in every error,
//! replaced as a whole.

pub(crate) mod place;

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

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
    /// A file cannot be replaced; it is as it was.
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
    /// A file is not what it should be.
    #[error("{path}:{line}:{column}: {key}: {problem}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// Which key, such as `groups[0].rules[1].vendor`.
        key: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// What was to be written would not be what the file should be; it is as it was.
    #[error("{key}: {problem}")]
    Unfit {
        /// Which key.
        key: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
}

impl ConfigError {
    /// Whether what is written is wrong, rather than that the file cannot be used.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Self::Invalid { .. } | Self::Unfit { .. })
    }

    /// Of a text that is in no file yet: it has no lines that anyone could look at.
    fn unwritten(self) -> Self {
        match self {
            Self::Invalid { key, problem, .. } => Self::Unfit {
                key: key.rsplit('.').next().unwrap_or(&key).to_owned(),
                problem,
            },
            other => other,
        }
    }
}

/// The `*.json` files of a directory, in the order of their names; none if there is no directory.
pub(crate) fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let names = sysfs::entries(dir).map_err(|source| ConfigError::Read {
        path: dir.to_owned(),
        source,
    })?;
    let names = names
        .iter()
        .filter(|name| name.ends_with(".json") && !name.starts_with('.'));
    Ok(names.map(|name| dir.join(name)).collect())
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

/// What a file's text says. The path is for errors alone.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    let mut json = serde_json::Deserializer::from_str(text);
    let parsed = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| invalid(path, &error.path().to_string(), error.inner()))?;
    json.end().map_err(|error| invalid(path, ".", &error))?;
    Ok(parsed)
}

/// Replaces a file, after a look that what is written reads back.
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
    parse::<T>(path, &text).map_err(ConfigError::unwritten)?;
    atomic::replace(path, text.as_bytes()).map_err(failed)
}

fn invalid(path: &Path, key: &str, error: &serde_json::Error) -> ConfigError {
    ConfigError::Invalid {
        path: path.to_owned(),
        line: error.line(),
        column: error.column(),
        key: if key == "." {
            "the file".to_owned()
        } else {
            key.to_owned()
        },
        problem: explain(&error.to_string()),
    }
}

/// Says what serde says, without the position and with the nearest known word for an unknown one.
fn explain(message: &str) -> String {
    let message = message
        .rfind(" at line ")
        .map_or(message, |end| &message[..end]);
    let kind = match message {
        _ if message.starts_with("unknown field ") => "key",
        _ if message.starts_with("unknown variant ") => "value",
        _ => return message.to_owned(),
    };
    let mut words = message.split('`').skip(1).step_by(2);
    let unknown = words.next().unwrap_or_default();
    let known: Vec<&str> = words.collect();
    match nearest(unknown, known.iter().copied()) {
        Some(near) => format!("unknown {kind} \"{unknown}\": did you mean \"{near}\"?"),
        None => format!(
            "unknown {kind} \"{unknown}\": there are {}",
            known.join(", ")
        ),
    }
}

/// The most similar of some words, if any is similar at all.
pub(crate) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let rated = known.map(|candidate| {
        (
            strsim::normalized_damerau_levenshtein(word, candidate),
            candidate,
        )
    });
    let best = rated.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
    (best.0 >= 0.5).then_some(best.1)
}
