//! A connection whose writes time out, and that lets the client finish writing before it closes.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep};

use super::descriptors::Descriptors;

/// How long a client may go on writing after its answer. With the connection closed it would see a broken pipe
/// and not read the answer.
const LINGER: Duration = Duration::from_secs(2);

/// A stream whose writes time out. The server bounds reads by limits for a request's head and body.
pub struct TimedStream {
    stream: UnixStream,
    received: Descriptors,
    patience: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
    /// Runs once all is written, while the client may still write.
    lingering: Option<Pin<Box<Sleep>>>,
    /// The server ends: close at once.
    shutting_down: watch::Receiver<bool>,
}

impl TimedStream {
    /// `stream`, whose writes time out after `patience`.
    pub fn new(
        stream: UnixStream,
        patience: Duration,
        shutting_down: watch::Receiver<bool>,
    ) -> Self {
        Self {
            stream,
            received: Descriptors::default(),
            patience,
            waiting: None,
            lingering: None,
            shutting_down,
        }
    }

    /// The descriptors that come over it.
    pub fn received(&self) -> &Descriptors {
        &self.received
    }

    /// Writes as much as fits into the socket's buffer, and closes.
    pub async fn write_and_close(mut self, text: &[u8]) {
        let _ = self.stream.try_write(text);
        let _ = std::future::poll_fn(|context| Pin::new(&mut self).poll_shutdown(context)).await;
    }

    /// Reads and drops data until the client closes or the time is over.
    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let lingering = self
            .lingering
            .get_or_insert_with(|| Box::pin(sleep(LINGER)));
        if *self.shutting_down.borrow() || lingering.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        let mut bytes = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut bytes);
            match Pin::new(&mut self.stream).poll_read(context, &mut buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(()),
            }
        }
    }

    /// Returns a write's outcome, or an error if it has waited too long.
    fn bounded<T>(
        &mut self,
        outcome: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.waiting = None;
            return outcome;
        }
        let patience = self.patience;
        let waiting = self
            .waiting
            .get_or_insert_with(|| Box::pin(sleep(patience)));
        match waiting.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                // It fails again if it is polled again.
                waiting.as_mut().reset(Instant::now());
                Poll::Ready(Err(ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            let receive = || {
                let data = buffer.initialize_unfilled();
                self.received.receive(self.stream.as_fd(), data)
            };
            match self.stream.try_io(Interest::READABLE, receive) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                received => {
                    buffer.advance(received?);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, data);
        self.bounded(outcome, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(context, data);
        self.bounded(outcome, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingering.is_none() {
            ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        }
        self.poll_linger(context).map(Ok)
    }
}
