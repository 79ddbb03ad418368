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
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::connections::{ConnectionSlot, ConnectionTable};
use super::handlers::Handlers;
use super::metrics::ApiMetrics;
use super::race::race;
use super::settings::{Identity, Limits};
use super::timed_stream::TimedStream;
use super::{Console, Events, Vm};

/// The longest head of a request, and the buffer that a connection may fill.
const HEAD_BYTES: usize = 16 << 10;
/// How long there is no connection before the memory that answers took is given back.
const IDLE_TIME: Duration = Duration::from_millis(200);
/// How long the last answers may take when the server ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);
/// How many refused connections get an answer at a time; further ones are closed without.
const MAX_REJECTIONS: usize = 64;

/// A server that listens and does not answer yet.
pub struct Server {
    runtime: Runtime,
    listener: UnixListener,
    stop: Stop,
    limits: Limits,
    /// User of this process: its thread may not ask once it is confined.
    owner: u32,
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
            owner: nix::unistd::geteuid().as_raw(),
        })
    }

    /// What ends it.
    pub fn stopper(&self) -> Stop {
        self.stop.clone()
    }

    /// Answers on the calling thread until it is stopped.
    pub fn serve(self, vm: Arc<dyn Vm>, events: Events, console: Console, identity: Identity) {
        let Self {
            runtime,
            listener,
            stop,
            limits,
            owner,
        } = self;
        let api_metrics = ApiMetrics::default();
        let app = Arc::new(Handlers {
            vm,
            events: events.clone(),
            console: console.clone(),
            identity,
            api_metrics,
            limits: limits.clone(),
        });
        runtime.block_on(async {
            let acceptor = Acceptor {
                connections: ConnectionTable::new(limits.connections, owner),
                turned_away: Arc::new(Semaphore::new(MAX_REJECTIONS)),
                shutting_down: watch::Sender::new(false),
                app,
            };
            let mut stopped = pin!(stop.0.notified());
            loop {
                let next = race(stopped.as_mut(), listener.accept()).await;
                let Some(accepted) = next else { break };
                match accepted {
                    Ok((stream, _)) => acceptor.accept(stream),
                    Err(error) => {
                        // Out of descriptors, say: those that are there must end first.
                        tracing::warn!(%error, "the API cannot accept a connection");
                        sleep(Duration::from_millis(100)).await;
                    }
                }
            }
            drop(listener);
            events.close();
            console.close();
            acceptor.shutting_down.send_replace(true);
            let _ = timeout(SHUTDOWN_TIMEOUT, acceptor.shutting_down.closed()).await;
        });
        runtime.shutdown_background();
    }
}

/// Accepts connections, or refuses them.
struct Acceptor {
    connections: Arc<ConnectionTable>,
    turned_away: Arc<Semaphore>,
    shutting_down: watch::Sender<bool>,
    app: Arc<Handlers>,
}

impl Acceptor {
    fn accept(&self, stream: UnixStream) {
        // The kernel knows the other side of every connected socket.
        let user = stream.peer_cred().map_or(u32::MAX, |peer| peer.uid());
        let shutting_down = self.shutting_down.subscribe();
        let stream = TimedStream::new(stream, self.app.limits.read, shutting_down.clone());
        let Some(slot) = self.connections.take(user) else {
            self.app.api_metrics.turned_away();
            if let Ok(turn) = Arc::clone(&self.turned_away).try_acquire_owned() {
                tokio::spawn(async move {
                    stream.write_and_close(TOO_MANY_CONNECTIONS).await;
                    drop(turn);
                });
            }
            return;
        };
        let connection = connection(stream, slot, Arc::clone(&self.app), shutting_down);
        let connections = Arc::clone(&self.connections);
        tokio::spawn(async move {
            connection.await;
            sleep(IDLE_TIME).await;
            if connections.is_empty() {
                gantry_vmm::release_program_pages();
            }
        });
    }
}

const TOO_MANY_CONNECTIONS: &[u8] = b"HTTP/1.1 503 \r\n\
    Content-Type: application/json\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 60\r\n\r\n\
    [\"there are too many connections: close one, and try again\"]";

async fn connection(
    stream: TimedStream,
    slot: ConnectionSlot,
    app: Arc<Handlers>,
    mut shutting_down: watch::Receiver<bool>,
) {
    let open = app.api_metrics.connected();
    let evicted = slot.evicted();
    let slot = Arc::new(slot);
    let received = stream.received().clone();
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(app.limits.head)
        .max_buf_size(HEAD_BYTES)
        // Clients that read HTTP by hand look for `Content-Length` written so.
        .title_case_headers(true)
        // A client may be done with writing before it reads: `nc -N`.
        .half_close(true);
    let answers = service_fn(move |request| {
        let (app, slot, received) = (Arc::clone(&app), Arc::clone(&slot), received.clone());
        async move { Ok::<_, std::convert::Infallible>(app.answer(request, &received, slot).await) }
    });
    let connection = builder.serve_connection(TokioIo::new(stream), answers);
    let mut connection = pin!(connection.with_upgrades());
    let whole = async {
        let end =
            pin!(async { drop(shutting_down.wait_for(|shutting_down| *shutting_down).await) });
        match race(end, connection.as_mut()).await {
            Some(outcome) => outcome,
            None => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    match race(pin!(evicted.notified()), whole).await {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::debug!(%error, "a connection of the API ended early"),
        None => tracing::debug!("an idle connection of the API was closed for another"),
    }
    drop(open);
}

#[cfg(test)]
mod tests {
    use super::TOO_MANY_CONNECTIONS;

    #[test]
    fn the_answer_to_one_too_many_is_well_formed() {
        let text = std::str::from_utf8(TOO_MANY_CONNECTIONS).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())),
            "{}",
            body.len()
        );
        serde_json::from_str::<Vec<String>>(body).unwrap();
    }
}
