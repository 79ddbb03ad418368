//! The stream of events: published by any thread, written as a line of JSON to each subscribed client.
//!
//! Lines of JSON rather than server-sent events: programs and shells with `jq` read a Unix socket, not browsers,
//! and a line needs no unwrapping.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gantry_vmm::command::{EventSink, VmEvent};
use hyper::body::Bytes;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::broadcast::{Receiver, Sender, channel};
use tokio::time::timeout;

use super::wire::{Event, EventLine};

/// Events that are kept for a slow reader.
const BACKLOG: usize = 256;
/// After so long without an event an empty line shows whether the reader is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// An event and when it happened.
#[derive(Debug)]
struct TimedEvent {
    at: SystemTime,
    event: VmEvent,
}

/// Publishes events to all subscriptions.
#[derive(Debug, Clone)]
pub struct Events(Arc<Mutex<Option<Sender<Arc<TimedEvent>>>>>);

impl Default for Events {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(channel(BACKLOG).0))))
    }
}

impl Events {
    /// Publishes an event from any thread. Never waits for readers.
    pub fn publish(&self, event: VmEvent) {
        if let Some(sender) = &*self.sender() {
            let at = SystemTime::now();
            // Fails without a subscription.
            let _ = sender.send(Arc::new(TimedEvent { at, event }));
        }
    }

    /// The sink for a VM's events.
    pub fn sink(&self) -> EventSink {
        let events = self.clone();
        Arc::new(move |event| events.publish(event))
    }

    /// Ends every stream after the events published so far.
    pub fn close(&self) {
        self.sender().take();
    }

    /// Subscribes to events from now on.
    pub(super) fn subscribe(&self) -> Option<Subscription> {
        let sender = self.sender();
        sender
            .as_ref()
            .map(|sender| Subscription(sender.subscribe()))
    }

    fn sender(&self) -> std::sync::MutexGuard<'_, Option<Sender<Arc<TimedEvent>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's subscription to events.
#[derive(Debug)]
pub struct Subscription(Receiver<Arc<TimedEvent>>);

impl Subscription {
    /// The stream of events, after `first`.
    pub fn stream(self, first: Event) -> EventStream {
        let line = line(SystemTime::now(), first);
        EventStream {
            next: Box::pin(std::future::ready((Some(line), self))),
        }
    }

    async fn line(mut self) -> (Option<Bytes>, Self) {
        let line = match timeout(KEEP_ALIVE, self.0.recv()).await {
            Err(_) => Some(Bytes::from_static(b"\n")),
            Ok(Ok(happened)) => Some(line(happened.at, Event::from(&happened.event))),
            Ok(Err(RecvError::Lagged(events))) => {
                Some(line(SystemTime::now(), Event::Missed { events }))
            }
            Ok(Err(RecvError::Closed)) => None,
        };
        (line, self)
    }
}

fn line(at: SystemTime, event: Event) -> Bytes {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let time = since.as_secs_f64();
    let mut text = serde_json::to_vec(&EventLine { time, event }).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

/// The lines that one client gets.
pub struct EventStream {
    next: Pin<Box<dyn Future<Output = (Option<Bytes>, Subscription)> + Send>>,
}

impl EventStream {
    /// The next line; none at the end.
    pub fn poll_line(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let (line, subscription) = std::task::ready!(self.next.as_mut().poll(context));
        self.next = Box::pin(subscription.line());
        Poll::Ready(line)
    }
}
