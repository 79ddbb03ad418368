//! What can be wrong with a VM's file, said so that the user can mend it.

use super::document::{self, Position};

/// Why there is no [`gantry_vmm::VmConfig`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read at all.
    #[error("cannot read {what}")]
    Read {
        /// The file, as the user named it.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The name that the VM would have cannot be used.
    #[error("`{name}` cannot be a VM's name: {why}")]
    Name {
        /// The name.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Something in the file is wrong.
    #[error("{file}:{}:{}: {what}", position.line, position.column)]
    Invalid {
        /// The file, as the user named it.
        file: String,
        /// Where in it.
        position: Position,
        /// Which key, and what is wrong with it.
        what: String,
        /// What to do about it.
        help: Option<String>,
    },
}

impl Error {
    /// What to do about it.
    pub fn help(&self) -> Option<&str> {
        match self {
            Self::Read { .. } => None,
            Self::Name { .. } => Some("give it another name with --name"),
            Self::Invalid { help, .. } => help.as_deref(),
        }
    }
}

/// Something wrong at a place of a text whose file name is not known yet.
#[derive(Debug)]
pub struct Fault {
    /// Byte offset in the text.
    pub at: usize,
    /// Which key, and what is wrong with it.
    pub what: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Fault {
    /// A fault that needs no advice.
    pub fn new(at: usize, what: String) -> Self {
        Self {
            at,
            what,
            help: None,
        }
    }

    /// The same fault in a text that has a name.
    pub fn in_file(self, file: &str, text: &str) -> Error {
        Error::Invalid {
            file: file.to_owned(),
            position: document::position(text, self.at),
            what: self.what,
            help: self.help,
        }
    }

    /// The same fault with advice.
    pub fn help(self, help: impl Into<String>) -> Self {
        Self {
            help: Some(help.into()),
            ..self
        }
    }
}
