//! The server: connections, each bounded in number, time and size, and their end.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{sleep, timeout};

use super::calls::App;
use super::metrics::Tally;
use super::patience::Patient;
use super::{Events, Vm};

/// How much a client may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time; more are told 503.
    pub connections: usize,
    /// Time for the head of a request, which is also how long a connection may idle.
    pub head: Duration,
    /// Time for the body of a request.
    pub body: Duration,
    /// Bytes of the body of a request.
    pub body_bytes: usize,
    /// Time that a client may take to read anything at all.
    pub read: Duration,
    /// Time that the VM may take to answer.
    pub answer: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            head: Duration::from_secs(30),
            body: Duration::from_secs(10),
            body_bytes: 256 << 10,
            read: Duration::from_secs(10),
            answer: Duration::from_secs(120),
        }
    }
}

/// The longest head of a request, and the buffer that a connection may fill.
const HEAD_BYTES: usize = 16 << 10;
/// How long nobody may have been connected before the memory that answers took is given back.
const QUIET: Duration = Duration::from_millis(200);
/// How long the last answers may take once the server ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// Who answers.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Name of the VM.
    pub name: String,
    /// Devices named by path may be in no group.
    pub allow_ungrouped: bool,
    /// Where the host keeps things.
    pub host: gantry_resources::HostPaths,
}

/// A server that listens and does not answer yet.
pub struct Server {
    runtime: Runtime,
    listener: UnixListener,
    stop: Stop,
    limits: Limits,
}

/// Ends a server, from any thread.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<Notify>);

impl Stop {
    /// No connection is accepted from now on, and those that are there end with their next answer.
    pub fn stop(&self) {
        self.0.notify_one();
    }
}

impl Server {
    /// A server on a socket.
    ///
    /// # Errors
    /// The kernel has no descriptors left.
    pub fn new(listener: std::os::unix::net::UnixListener, limits: Limits) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let _inside = runtime.enter();
        let listener = UnixListener::from_std(listener)?;
        drop(_inside);
        Ok(Self {
            runtime,
            listener,
            stop: Stop::default(),
            limits,
        })
    }

    /// What ends it.
    pub fn stopper(&self) -> Stop {
        self.stop.clone()
    }

    /// Answers on the calling thread until it is stopped.
    pub fn serve(self, vm: Arc<dyn Vm>, events: Events, identity: Identity) {
        let Self {
            runtime,
            listener,
            stop,
            limits,
        } = self;
        let tally = Tally::default();
        let app = Arc::new(App {
            vm,
            events: events.clone(),
            identity,
            tally,
            limits: limits.clone(),
        });
        runtime.block_on(async {
            let places = Arc::new(Semaphore::new(limits.connections));
            let leaving = Arc::new(tokio::sync::watch::Sender::new(false));
            let mut stopped = pin!(stop.0.notified());
            loop {
                let next = race(stopped.as_mut(), listener.accept()).await;
                let Some(accepted) = next else { break };
                match accepted {
                    Ok((stream, _)) => {
                        admit(stream, &places, &app, leaving.subscribe());
                    }
                    Err(error) => {
                        // Out of descriptors, say: those that are there must end first.
                        tracing::warn!(%error, "the API cannot accept a connection");
                        sleep(Duration::from_millis(100)).await;
                    }
                }
            }
            drop(listener);
            events.close();
            leaving.send_replace(true);
            let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
            let _ = timeout(FAREWELL, places.acquire_many(all)).await;
        });
        runtime.shutdown_background();
    }
}

/// What `wanted` gives; none if `end` comes first.
async fn race<T>(
    mut end: std::pin::Pin<&mut impl Future<Output = ()>>,
    wanted: impl Future<Output = T>,
) -> Option<T> {
    let mut wanted = pin!(wanted);
    std::future::poll_fn(|context| {
        use std::task::Poll::{Pending, Ready};
        match end.as_mut().poll(context) {
            Ready(()) => Ready(None),
            Pending => wanted.as_mut().poll(context).map(Some),
        }
    })
    .await
}

fn admit(
    stream: UnixStream,
    places: &Arc<Semaphore>,
    app: &Arc<App>,
    leaving: tokio::sync::watch::Receiver<bool>,
) {
    let Ok(place) = Arc::clone(places).try_acquire_owned() else {
        app.tally.turned_away();
        // What does not fit into an empty socket's buffer at once was not to be.
        let _ = stream.try_write(FULL);
        return;
    };
    let connection = connection(stream, Arc::clone(app), leaving);
    let all = app.limits.connections;
    let places = Arc::clone(places);
    tokio::spawn(async move {
        connection.await;
        drop(place);
        sleep(QUIET).await;
        if places.available_permits() == all {
            gantry_vmm::let_go_of_program();
        }
    });
}

const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    content-type: application/json\r\nconnection: close\r\ncontent-length: 60\r\n\r\n\
    [\"there are too many connections: close one, and try again\"]";

async fn connection(
    stream: UnixStream,
    app: Arc<App>,
    mut leaving: tokio::sync::watch::Receiver<bool>,
) {
    let open = app.tally.connected();
    let io = TokioIo::new(Patient::new(stream, app.limits.read));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(app.limits.head)
        .max_buf_size(HEAD_BYTES)
        // A client may be done with writing before it reads: `nc -N`.
        .half_close(true);
    let answers = service_fn(move |request| {
        let app = Arc::clone(&app);
        async move { Ok::<_, std::convert::Infallible>(app.answer(request).await) }
    });
    let mut connection = pin!(builder.serve_connection(io, answers));
    let end = pin!(async { drop(leaving.wait_for(|leaving| *leaving).await) });
    let outcome = match race(end, connection.as_mut()).await {
        Some(outcome) => outcome,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection of the API ended early");
    }
    drop(open);
}

#[cfg(test)]
mod tests {
    use super::FULL;

    #[test]
    fn the_answer_to_one_too_many_is_well_formed() {
        let text = std::str::from_utf8(FULL).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("content-length: {}", body.len())),
            "{}",
            body.len()
        );
        serde_json::from_str::<Vec<String>>(body).unwrap();
    }
}
