//! The client: sends requests to a running VM over its socket, one connection each, and waits.

use std::cell::Cell;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_resources::base::harmless;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, RETRY_AFTER, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode, http::request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::net::unix::UCred;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{Instant, timeout, timeout_at};

use super::console::PROTOCOL;
use super::descriptors;
use super::routes::ROOT;
use super::sanitize;
use super::socket;
use super::wire::EventLine;

/// Why a request to a VM failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens on the socket, or there is no socket.
    #[error("no VM listens on {path}")]
    NotListening {
        /// The socket.
        path: PathBuf,
    },
    /// This user may not connect.
    #[error(
        "you may not use {path}: its owner may, and the group that `gantry run --api-group` names"
    )]
    Denied {
        /// The socket.
        path: PathBuf,
    },
    /// The VM refused the request.
    #[error("{}", messages.join("\n"))]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The VM's reasons.
        messages: Vec<String>,
        /// The same request may succeed later.
        temporary: bool,
    },
    /// The VM did not answer in time.
    #[error("the VM on {path}{} did not answer in {}", process(*pid), seconds(*waited))]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// The process that listens, if known.
        pid: Option<u32>,
        /// How long the client waited.
        waited: Duration,
    },
    /// The connection broke, or the answer cannot be read.
    #[error("the VM on {path} gave an answer that gantry cannot read")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl ClientError {
    /// Whether the same request may succeed later.
    pub fn is_temporary(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                temporary: true,
                ..
            }
        )
    }

    /// What may help.
    pub fn remedy(&self) -> Option<String> {
        match *self {
            Self::TimedOut { pid: Some(pid), .. } if is_stopped(pid) => Some(format!(
                "the process is stopped: `kill -CONT {pid}` lets it run on"
            )),
            Self::TimedOut { pid: Some(pid), .. } => Some(format!(
                "try again; `kill {pid}` ends it, `kill -9 {pid}` in any case, and its devices go back"
            )),
            _ => None,
        }
    }
}

/// Whether a process is stopped, for example by ctrl-z.
pub fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    // Its state is behind its name, which is in parentheses (proc_pid_stat(5)).
    stat.is_ok_and(|stat| {
        stat.rsplit_once(") ")
            .is_some_and(|(_, state)| state.starts_with('T'))
    })
}

fn process(pid: Option<u32>) -> String {
    pid.map_or(String::new(), |pid| format!(" (process {pid})"))
}

/// A time for people.
pub fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

/// Descriptors that go with a request.
pub struct Sent {
    /// The descriptors.
    pub files: Vec<File>,
    /// The only user whose process may have them.
    pub to: u32,
}

/// Method, path and body of a request.
type Parts<'a> = (Method, &'a str, Bytes);
/// The console of a guest: its output, and what is typed.
pub type ConsoleStream = TokioIo<Upgraded>;

/// A client of one VM.
pub struct Client {
    runtime: Runtime,
    path: PathBuf,
    patience: Duration,
    /// The process that listens, once known.
    pid: Cell<Option<u32>>,
}

impl Client {
    /// The VM behind a socket. An answer is waited for as long as `patience`. Nothing is connected yet.
    ///
    /// # Errors
    /// The kernel has no descriptors left.
    pub fn new(path: &Path, patience: Duration) -> std::io::Result<Self> {
        Ok(Self {
            runtime: Builder::new_current_thread().enable_all().build()?,
            path: path.to_owned(),
            patience,
            pid: Cell::default(),
        })
    }

    /// The answer to a `GET` of a call.
    ///
    /// # Errors
    /// The request fails, or the VM refuses it.
    pub fn get<T: DeserializeOwned>(&self, call: &str) -> Result<T, ClientError> {
        let body = self.whole((Method::GET, &format!("{ROOT}{call}"), Bytes::new()), None)?;
        sanitize::json(&body).map_err(|error| self.broken(error))
    }

    /// The answer to a `GET` of a path, as text.
    ///
    /// # Errors
    /// The request fails, or the VM refuses it.
    pub fn text(&self, path: &str) -> Result<String, ClientError> {
        let body = self.whole((Method::GET, path, Bytes::new()), None)?;
        let text = std::str::from_utf8(&body).map_err(|error| self.broken(error))?;
        Ok(harmless(text))
    }

    /// Sends a `PUT` without a body.
    ///
    /// # Errors
    /// The request fails, or the VM refuses it.
    pub fn put(&self, call: &str) -> Result<(), ClientError> {
        let request = (Method::PUT, &*format!("{ROOT}{call}"), Bytes::new());
        self.whole(request, None).map(drop)
    }

    /// Sends a `PUT` and returns the answer, if it has a body.
    ///
    /// # Errors
    /// The request fails, or the VM refuses it.
    pub fn put_json<T: DeserializeOwned>(
        &self,
        call: &str,
        body: &impl Serialize,
    ) -> Result<Option<T>, ClientError> {
        self.put_json_with(call, body, None)
    }

    /// The same with descriptors.
    ///
    /// # Errors
    /// The request fails, or the VM refuses it.
    pub fn put_json_with<T: DeserializeOwned>(
        &self,
        call: &str,
        body: &impl Serialize,
        sent: Option<&Sent>,
    ) -> Result<Option<T>, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(error))?;
        let request = (Method::PUT, &*format!("{ROOT}{call}"), body.into());
        let answer = self.whole(request, sent)?;
        if answer.is_empty() {
            return Ok(None);
        }
        let answer = sanitize::json(&answer);
        answer.map(Some).map_err(|error| self.broken(error))
    }

    /// The stream of events, from now on.
    ///
    /// # Errors
    /// The request fails, or the VM refuses it.
    pub fn events(&self) -> Result<EventReader<'_>, ClientError> {
        let path = format!("{ROOT}events");
        let answer = self.with_timeout(self.send((Method::GET, &path, Bytes::new()), None))?;
        Ok(EventReader {
            client: self,
            body: answer.into_body(),
            read: Vec::new(),
        })
    }

    /// Attaches to the guest's console.
    ///
    /// # Errors
    /// The request fails, or the VM refuses it.
    pub fn console(&self) -> Result<ConsoleStream, ClientError> {
        self.with_timeout(async {
            let asked = Request::get(format!("{ROOT}vm.console"))
                .header(CONNECTION, "Upgrade")
                .header(UPGRADE, PROTOCOL);
            let answer = self.request(asked, Bytes::new(), None).await?;
            let upgraded = hyper::upgrade::on(answer).await;
            let upgraded = upgraded.map_err(|error| self.broken(error))?;
            Ok(TokioIo::new(upgraded))
        })
    }

    /// Runs what uses a [`ConsoleStream`].
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    fn whole(&self, request: Parts<'_>, sent: Option<&Sent>) -> Result<Bytes, ClientError> {
        self.with_timeout(async {
            let answer = self.send(request, sent).await?;
            let body = sanitize::read_body(answer.into_body()).await;
            body.map_err(|error| self.broken(error))
        })
    }

    fn with_timeout<T>(
        &self,
        answer: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        let waited = self.patience;
        let late = |_| ClientError::TimedOut {
            path: self.path.clone(),
            pid: self.pid.get(),
            waited,
        };
        self.runtime
            .block_on(async { timeout(waited, answer).await.map_err(late)? })
    }

    async fn send(
        &self,
        (method, path, body): Parts<'_>,
        sent: Option<&Sent>,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(CONTENT_TYPE, "application/json");
        self.request(request, body, sent).await
    }

    /// The user whose process listens.
    ///
    /// # Errors
    /// None listens, or this user may not connect.
    pub fn listener_user(&self) -> Result<u32, ClientError> {
        self.with_timeout(async { Ok(self.peer(&self.connect().await?)?.uid()) })
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let stream = UnixStream::connect(&self.path).await;
        let stream = stream.map_err(|error| self.unreachable(error))?;
        let listener = stream.peer_cred().ok().and_then(|peer| peer.pid());
        self.pid.set(listener.and_then(socket::process));
        Ok(stream)
    }

    fn peer(&self, stream: &UnixStream) -> Result<UCred, ClientError> {
        stream.peer_cred().map_err(|error| self.broken(error))
    }

    async fn request(
        &self,
        request: request::Builder,
        body: Bytes,
        sent: Option<&Sent>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        if let Some(Sent { files, to }) = sent {
            // Another process may listen by now.
            if self.peer(&stream)?.uid() != *to {
                return Err(self.broken("another user's process listens there now"));
            }
            // A socket that is just connected has room.
            descriptors::send(&stream, files).map_err(|error| self.broken(error))?;
        }
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(error))?;
        tokio::spawn(async { drop(connection.with_upgrades().await) });
        let request = request
            .header(HOST, "localhost")
            .body(Full::new(body))
            .map_err(|error| self.broken(error))?;
        let answer = sender.send_request(request).await;
        let answer = answer.map_err(|error| self.broken(error))?;
        match answer.status() {
            StatusCode::OK | StatusCode::NO_CONTENT | StatusCode::SWITCHING_PROTOCOLS => Ok(answer),
            _ => Err(self.refused(answer).await),
        }
    }

    async fn refused(&self, answer: Response<Incoming>) -> ClientError {
        let status = answer.status();
        let temporary = answer.headers().contains_key(RETRY_AFTER);
        let body = match sanitize::read_body(answer.into_body()).await {
            Ok(body) => body,
            Err(error) => return self.broken(error),
        };
        let messages = sanitize::json(&body);
        ClientError::Refused {
            status: status.as_u16(),
            messages: messages.unwrap_or_else(|_| vec![format!("the VM answers {status}")]),
            temporary,
        }
    }

    fn unreachable(&self, error: std::io::Error) -> ClientError {
        let path = self.path.clone();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                ClientError::NotListening { path }
            }
            ErrorKind::PermissionDenied => ClientError::Denied { path },
            _ => self.broken(error),
        }
    }

    fn broken(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Broken {
            path: self.path.clone(),
            source: error.into(),
        }
    }
}

/// Reads a stream of events.
pub struct EventReader<'c> {
    client: &'c Client,
    body: Incoming,
    read: Vec<u8>,
}

impl EventReader<'_> {
    /// The next event, waited for until `deadline`, or for ever; none once the VM has ended.
    ///
    /// # Errors
    /// The deadline is there ([`ClientError::TimedOut`]), or the stream breaks.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Option<EventLine>, ClientError> {
        let began = Instant::now();
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                // The VM sends empty lines to keep the stream alive.
                if line.len() > 1 {
                    let event = sanitize::json(&line);
                    return event.map(Some).map_err(|error| self.client.broken(error));
                }
                continue;
            }
            if self.read.len() > sanitize::LONGEST_LINE {
                return Err(self.client.broken("an event is too long"));
            }
            let body = &mut self.body;
            let frame = self.client.runtime.block_on(async {
                match deadline {
                    None => Some(body.frame().await),
                    Some(deadline) => timeout_at(deadline, body.frame()).await.ok(),
                }
            });
            match frame {
                Some(Some(Ok(frame))) => {
                    self.read.extend(frame.into_data().unwrap_or_default());
                }
                // A killed VM breaks the stream off.
                Some(None | Some(Err(_))) => return Ok(None),
                None => {
                    return Err(ClientError::TimedOut {
                        path: self.client.path.clone(),
                        pid: self.client.pid.get(),
                        waited: began.elapsed(),
                    });
                }
            }
        }
    }
}
