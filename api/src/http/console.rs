//! The guest's console for clients: what it writes goes to all who are attached, and what they type goes to its
//! serial port.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gantry_vmm::command::{CommandError, ConsoleSink};
use hyper::body::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::broadcast::{Receiver, Sender, channel};
use tokio::time::sleep;

use super::Vm;
use super::connections::ConnectionSlot;
use super::race::race;

/// The protocol that a connection is upgraded to: bytes both ways.
pub const PROTOCOL: &str = "gantry-console";
/// How much of the latest output a client gets first.
const RECENT: usize = 4 << 10;
/// Lines that are kept for a slow client.
const BACKLOG: usize = 256;
/// How long the guest gets to read what it was sent, before it is sent more: with a FIFO of 64 bytes about as fast as
/// a port of 115,200 baud.
const INPUT_INTERVAL: Duration = Duration::from_millis(5);

/// The guest's output, for clients to attach to.
#[derive(Debug, Clone)]
pub struct Console(Arc<Mutex<Output>>);

#[derive(Debug)]
struct Output {
    recent: VecDeque<u8>,
    clients: Option<Sender<Bytes>>,
}

impl Default for Console {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Output {
            recent: VecDeque::new(),
            clients: Some(channel(BACKLOG).0),
        })))
    }
}

impl Console {
    /// Takes output of the guest, from any thread. Never waits for clients.
    pub fn publish(&self, data: &[u8]) {
        let mut output = self.output();
        output.recent.extend(data);
        let surplus = output.recent.len().saturating_sub(RECENT);
        output.recent.drain(..surplus);
        if let Some(clients) = &output.clients
            && clients.receiver_count() > 0
        {
            // Fails without a client.
            let _ = clients.send(Bytes::copy_from_slice(data));
        }
    }

    /// The sink for a VM's output.
    pub fn sink(&self) -> ConsoleSink {
        let console = self.clone();
        Arc::new(move |data| console.publish(data))
    }

    /// Ends every attachment after the output published so far.
    pub fn close(&self) {
        self.output().clients.take();
    }

    /// Attaches a client: the latest whole lines and what follows them, and what comes from now on.
    fn attach(&self) -> Option<(Bytes, Receiver<Bytes>)> {
        let output = self.output();
        let receiver = output.clients.as_ref()?.subscribe();
        let recent: Vec<u8> = output.recent.iter().copied().collect();
        let cut = match recent.len() < RECENT {
            true => 0,
            false => recent.iter().position(|byte| *byte == b'\n').unwrap_or(0),
        };
        // Replayed, a query of the terminal would be answered once more, and the guest would take that for input.
        let text = anstream::adapter::strip_bytes(recent.get(cut..).unwrap_or_default());
        Some((text.into_vec().into(), receiver))
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's connection to a console.
pub struct Attachment {
    pub upgrade: OnUpgrade,
    pub console: Console,
    pub vm: Arc<dyn Vm>,
    pub slot: Arc<ConnectionSlot>,
}

impl Attachment {
    /// Carries bytes until the client leaves, another connection evicts it, or the console is closed.
    pub async fn serve(self) {
        let Self {
            upgrade,
            console,
            vm,
            slot,
        } = self;
        let (Ok(stream), Some((recent, output))) = (upgrade.await, console.attach()) else {
            return;
        };
        // From here on: the request, which has been answered, was in use too.
        let _in_use = slot.in_use();
        let (from, to) = tokio::io::split(TokioIo::new(stream));
        let evicted = slot.evicted();
        let leaves = pin!(async {
            let _ = race(pin!(evicted.notified()), pin!(typed(from, &*vm))).await;
        });
        let _ = race(leaves, pin!(show(to, recent, output))).await;
    }
}

/// Sends what the guest writes, to the end of the console or of the client.
async fn show(
    mut to: WriteHalf<TokioIo<Upgraded>>,
    recent: Bytes,
    mut output: Receiver<Bytes>,
) -> std::io::Result<()> {
    to.write_all(&recent).await?;
    loop {
        match output.recv().await {
            Ok(data) => to.write_all(&data).await?,
            Err(RecvError::Lagged(_)) => {
                let note = "\r\n[output is missing here: it came too fast to be shown]\r\n";
                to.write_all(note.as_bytes()).await?;
            }
            Err(RecvError::Closed) => return to.shutdown().await,
        }
    }
}

/// Types what the client sends, until it leaves. Without a guest that has a serial port it is dropped.
async fn typed(mut from: ReadHalf<TokioIo<Upgraded>>, vm: &dyn Vm) -> Option<Infallible> {
    let mut buffer = [0; 256];
    loop {
        let len = from.read(&mut buffer).await.ok().filter(|len| *len > 0)?;
        let mut left = buffer.get(..len)?;
        while let Ok(taken) = vm.type_in(left) {
            left = left.get(taken..).unwrap_or_default();
            if left.is_empty() {
                break;
            }
            sleep(INPUT_INTERVAL).await;
        }
    }
}

/// Whether clients can attach to the console of the VM, or of one that they boot later.
///
/// # Errors
/// They cannot.
pub fn check(vm: &dyn Vm) -> Result<(), CommandError> {
    match vm.type_in(&[]) {
        Ok(_) | Err(CommandError::NotCreated | CommandError::NotBooted) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_the_latest_lines_without_controls_and_what_follows() {
        let console = Console::default();
        for number in 0..1000 {
            console.publish(format!("line {number}\r\n").as_bytes());
        }
        console.publish(b"\x1b[6n\x1b[1mlogin: ");
        let (recent, mut output) = console.attach().unwrap();
        let recent = String::from_utf8(recent.to_vec()).unwrap();
        assert!(recent.len() <= RECENT);
        assert!(recent.ends_with("line 999\r\nlogin: "), "{recent:?}");
        let mut lines = recent.trim_start().lines();
        assert!(lines.next().unwrap().starts_with("line "), "{recent:?}");
        console.publish(b"\x1b[1mroot");
        assert_eq!(output.try_recv().unwrap(), &b"\x1b[1mroot"[..]);
        console.close();
        assert!(output.try_recv().is_err() && console.attach().is_none());
        console.publish(b"nobody reads this");
    }
}
