//! What the host's kernel refuses.

use std::io;

/// The host's kernel refused something.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct HostError {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// Makes an error of a failure to do `what`.
pub fn cannot(what: &'static str) -> impl FnOnce(io::Error) -> HostError {
    move |source| HostError { what, source }
}
