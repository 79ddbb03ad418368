//! Answers as HTTP: bodies, status codes, and errors as the lists of messages that clients know.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use gantry_resources::base::messages;
use gantry_resources::opener::OpenerError;
use gantry_vmm::command::{CommandError, ResizeError};
use gantry_vmm::{DeviceError, DiskError, DiskProblem};
use http_body_util::Full;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::ext::ReasonPhrase;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, UPGRADE};
use hyper::{Response, StatusCode};
use serde::Serialize;

use super::connections::InUse;
use super::events::EventStream;

/// An answer.
pub type HttpResponse = Response<Payload>;

/// The body of an answer.
pub struct Payload {
    content: Content,
    /// The connection is in use until the answer is written.
    in_use: Option<InUse>,
}

enum Content {
    /// All of it at once.
    Whole(Full<Bytes>),
    /// A line for each event.
    Lines(EventStream),
}

impl Payload {
    fn whole(body: Bytes) -> Self {
        Content::Whole(Full::new(body)).into()
    }

    /// Keeps a connection in use for as long as this is written.
    pub fn keep(mut self, in_use: InUse) -> Self {
        self.in_use = Some(in_use);
        self
    }
}

impl From<Content> for Payload {
    fn from(content: Content) -> Self {
        Self {
            content,
            in_use: None,
        }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.get_mut().content {
            Content::Whole(body) => Pin::new(body).poll_frame(context),
            Content::Lines(stream) => stream
                .poll_line(context)
                .map(|line| line.map(Frame::data).map(Ok)),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Whole(body) => body.is_end_stream(),
            Content::Lines(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(body) => body.size_hint(),
            Content::Lines(_) => SizeHint::default(),
        }
    }
}

/// Clients that read HTTP by hand take all that follows the version for the status: no reason follows it.
const NO_REASON: ReasonPhrase = ReasonPhrase::from_static(b"");

fn answer(status: StatusCode, payload: Payload) -> HttpResponse {
    let mut answer = Response::new(payload);
    *answer.status_mut() = status;
    answer.extensions_mut().insert(NO_REASON);
    answer
}

fn typed(status: StatusCode, kind: &'static str, payload: Payload) -> HttpResponse {
    let mut answer = answer(status, payload);
    let kind = HeaderValue::from_static(kind);
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

/// A refused or failed request.
#[derive(Debug)]
pub struct HttpError {
    /// The status.
    pub status: StatusCode,
    /// The messages, from the outermost error to its cause.
    pub messages: Vec<String>,
    /// The right verb.
    pub allow: Option<&'static str>,
    /// The same request may succeed later.
    pub temporary: bool,
}

impl HttpError {
    /// A refusal with one message.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            messages: vec![message.into()],
            allow: None,
            temporary: false,
        }
    }

    /// The request is wrong.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }
}

impl From<CommandError> for HttpError {
    fn from(error: CommandError) -> Self {
        use CommandError as E;
        let status = match &error {
            E::NotCreated | E::NoSuchDevice { .. } => StatusCode::NOT_FOUND,
            E::NotBooted | E::NotPaused | E::AlreadyPaused | E::AlreadyRunning => {
                StatusCode::METHOD_NOT_ALLOWED
            }
            E::AlreadyCreated
            | E::DuplicateId(_)
            | E::NoConsole
            | E::NoSlots
            | E::NoFreeSlot { .. }
            | E::SlotsTooSmall { .. }
            | E::Resize {
                problem: ResizeError::Busy,
                ..
            } => StatusCode::CONFLICT,
            E::Resize {
                problem: ResizeError::Io(_) | ResizeError::Thread(_),
                ..
            } => StatusCode::INTERNAL_SERVER_ERROR,
            E::Invalid(_) | E::Resize { .. } => StatusCode::BAD_REQUEST,
            E::Ending | E::Busy => StatusCode::SERVICE_UNAVAILABLE,
            E::Failed(error) if not_to_be_had(error) => StatusCode::CONFLICT,
            E::Failed(gantry_vmm::Error::Disk(DiskError::Later(_))) => StatusCode::BAD_REQUEST,
            E::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let temporary = match &error {
            E::NoFreeSlot { .. } => true,
            error => crate::status::is_temporary(error),
        };
        Self {
            status,
            messages: messages(&error),
            allow: None,
            temporary,
        }
    }
}

/// Whether the request is refused in the present state. Otherwise gantry or the host failed.
fn not_to_be_had(error: &gantry_vmm::Error) -> bool {
    use gantry_vmm::Error as E;
    match error {
        E::Maintenance(_) | E::DuplicateId(_) => true,
        E::Device(error) => match error {
            DeviceError::Clash { .. } | DeviceError::Unmappable { .. } => true,
            DeviceError::Allocate(error) => error.is_refusal(),
            DeviceError::Opener(error) => matches!(
                error,
                OpenerError::Refused(_) | OpenerError::Mistaken(_) | OpenerError::Busy(_)
            ),
            _ => false,
        },
        E::Disk(DiskError::Later(DiskProblem::Locked { .. } | DiskProblem::HostUses { .. })) => {
            true
        }
        _ => false,
    }
}

/// 204: done, without a body.
pub fn done() -> HttpResponse {
    answer(StatusCode::NO_CONTENT, Payload::whole(Bytes::new()))
}

/// 101: the connection is of another protocol from now on.
pub fn upgraded(protocol: &'static str) -> HttpResponse {
    let mut answer = answer(
        StatusCode::SWITCHING_PROTOCOLS,
        Payload::whole(Bytes::new()),
    );
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(protocol));
    answer
}

/// 200 with a JSON body.
pub fn json(value: &impl Serialize) -> HttpResponse {
    with_json(StatusCode::OK, value)
}

/// 200 with text of a type.
pub fn text(kind: &'static str, text: String) -> HttpResponse {
    whole(StatusCode::OK, kind, text.into())
}

/// 200 with a line for each event, until one side ends it.
pub fn lines(stream: EventStream) -> HttpResponse {
    let payload = Content::Lines(stream).into();
    typed(StatusCode::OK, "application/x-ndjson", payload)
}

/// The refusal's status, with its messages as a JSON list.
pub fn refused(refusal: &HttpError) -> HttpResponse {
    let mut answer = with_json(refusal.status, &refusal.messages);
    if let Some(verb) = refusal.allow {
        let verb = HeaderValue::from_static(verb);
        answer.headers_mut().insert(ALLOW, verb);
    }
    if refusal.temporary {
        let seconds = HeaderValue::from_static("1");
        answer.headers_mut().insert(RETRY_AFTER, seconds);
    }
    if refusal.status == StatusCode::PAYLOAD_TOO_LARGE {
        let close = HeaderValue::from_static("close");
        answer.headers_mut().insert(CONNECTION, close);
    }
    answer
}

fn with_json(status: StatusCode, value: &impl Serialize) -> HttpResponse {
    match serde_json::to_vec(value) {
        Ok(body) => whole(status, "application/json", body.into()),
        Err(error) => {
            // No body has keys that are not text, which is all that could fail.
            tracing::error!(%error, "an answer cannot be written as JSON");
            whole(
                StatusCode::INTERNAL_SERVER_ERROR,
                "application/json",
                "[]".into(),
            )
        }
    }
}

fn whole(status: StatusCode, kind: &'static str, body: Bytes) -> HttpResponse {
    typed(status, kind, Payload::whole(body))
}

#[cfg(test)]
mod tests {
    use gantry_resources::allocation::AllocateError;

    use super::*;

    #[test]
    fn what_is_not_to_be_had_is_no_failure_of_the_host() {
        let status = |error: gantry_vmm::Error| HttpError::from(CommandError::from(error)).status;
        let device = |error: DeviceError| status(error.into());
        let refused = OpenerError::Refused("no group \"gpu\"".to_owned());
        assert_eq!(device(refused.into()), StatusCode::CONFLICT);
        let maintenance = gantry_vmm::Error::Maintenance("new memory".to_owned());
        assert_eq!(status(maintenance), StatusCode::CONFLICT);
        let twice = AllocateError::AskedTwice {
            bdf: "0000:01:00.0".parse().unwrap(),
        };
        assert_eq!(device(twice.into()), StatusCode::CONFLICT);
        let unreadable = gantry_resources::inventory::InventoryError::Sysfs {
            path: "/sys/bus/pci".into(),
            source: std::io::ErrorKind::PermissionDenied.into(),
        };
        let unreadable = AllocateError::from(unreadable);
        let failure = StatusCode::INTERNAL_SERVER_ERROR;
        assert_eq!(device(unreadable.into()), failure);
        let failed = OpenerError::Failed("cannot open /dev/vfio/7".to_owned());
        assert_eq!(device(failed.into()), failure);
        let gone = OpenerError::Gone(std::io::ErrorKind::UnexpectedEof.into());
        assert_eq!(device(gone.into()), StatusCode::INTERNAL_SERVER_ERROR);
    }
}
