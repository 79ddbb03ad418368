//! Shows errors and turns them into exit statuses.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};

use gantry_resources::base::messages;
use tracing::Level;

use crate::http::client::ClientError;
use crate::status::status_of;
pub use crate::status::{
    BY_SIGNAL, EXIT_STATUSES, FAILED, GUEST_DIED, STOPPED, SUCCESS, TRY_AGAIN, USAGE,
};

use crate::stderr::Stderr;

const ERROR: Style = AnsiColor::Red.on_default().bold();
const CAUSE: Style = Style::new().dimmed();

/// Whether standard error takes colour. Asked once, at the start: a process that has run a VM is
/// confined and may no longer ask for terminals.
pub fn colour() -> ColorChoice {
    AutoStream::choice(&std::io::stderr())
}

/// A failed command, with its exit status.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: u8,
    error: Box<dyn Error + Send + Sync>,
    help: Option<String>,
}

impl Failure {
    /// A failure with exit code `exit`.
    pub fn new(exit: u8, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            exit,
            error: error.into(),
            help: None,
        }
    }

    /// A failure whose exit status and advice follow from the error; the status is 1 by default.
    pub fn host(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let error = error.into();
        let client = error.downcast_ref::<ClientError>();
        let help = client.and_then(ClientError::remedy);
        let exit = match client {
            Some(error) if error.is_temporary() => TRY_AGAIN,
            _ => status_of(&*error),
        };
        Self { exit, error, help }
    }

    /// The same failure with advice.
    pub fn help(self, help: impl Into<String>) -> Self {
        Self {
            help: Some(help.into()),
            ..self
        }
    }

    /// Shows the failure on standard error.
    pub fn show(&self, stderr: &Stderr, colour: ColorChoice) -> ExitCode {
        let mut text = Vec::new();
        // Writing to memory does not fail.
        let _ = self.write(&mut text);
        let text = match colour {
            ColorChoice::Never => anstream::adapter::strip_bytes(&text).into_vec(),
            _ => text,
        };
        stderr.say(Level::ERROR, &text);
        ExitCode::from(self.exit)
    }

    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        for (index, text) in messages(&*self.error).iter().enumerate() {
            let text = indented(text);
            match index {
                0 => writeln!(out, "{ERROR}error:{ERROR:#} {text}")?,
                _ => writeln!(out, "  {CAUSE}because:{CAUSE:#} {text}")?,
            }
        }
        self.help
            .iter()
            .try_for_each(|help| writeln!(out, "  {}", indented(help)))
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::host(error)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.error)
    }
}

fn indented(text: &str) -> String {
    text.replace('\n', "\n  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open 0000:01:00.0")]
    struct Outer(#[source] Middle);

    #[derive(Debug, thiserror::Error)]
    #[error(transparent)]
    struct Middle(Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("group 7\nis busy")]
    struct Inner;

    #[test]
    fn the_chain_is_told_once_from_the_outside_in() {
        let failure = Failure::host(Outer(Middle(Inner))).help("wait");
        let mut out = anstream::StripStream::new(Vec::new());
        failure.write(&mut out).unwrap();
        assert_eq!(
            String::from_utf8(out.into_inner()).unwrap(),
            "error: cannot open 0000:01:00.0\n  because: group 7\n  is busy\n  wait\n"
        );
    }
}
