//! `gantry vm console`: the console of a VM, from another terminal.

use std::collections::VecDeque;
use std::future::{pending, poll_fn};
use std::io::{self, IsTerminal, Read, Write};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::thread;

use clap::Args;
use gantry_resources::base::HostPaths;
use gantry_vmm::{Keys, Terminal};
use nix::sys::signal::{SigSet, Signal};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf};
use tokio::sync::mpsc::{Receiver, channel};

use super::find;
use crate::http::client::{Client, ConsoleStream};
use crate::http::wire::Event;
use crate::output::note;
use crate::report::{BY_SIGNAL, Failure};

/// Bytes that wait for a guest that does not read. What is typed beyond them is dropped.
const MOST_TYPED: usize = 64 << 10;

#[derive(Debug, Args)]
#[command(after_help = "\
Several may attach at a time: all see what the guest writes, and all may type. The latest lines are shown first. \
ctrl-a d detaches, and the VM runs on; ctrl-a twice sends one ctrl-a. Without a terminal, standard input is typed \
as it is, and the command goes on until the VM ends. The guest's serial port has no size of its window: \
`stty rows 50 cols 132` sets it in the guest.

Examples:
  gantry vm console web-1
  echo reboot | gantry vm console web-1")]
pub struct ConsoleArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
}

/// Why the console was left.
enum Left {
    Detached,
    Signal(Signal),
    /// The VM has closed it.
    Closed,
    /// Nobody reads this command's output.
    Unread,
}

pub fn console(args: &ConsoleArgs, paths: &HostPaths) -> Result<(), Failure> {
    let name = &*args.vm;
    let client = find::vm(name, paths)?;
    // Before the console, so that the VM's last event is not missed.
    let mut events = client.events()?;
    let console = client.console()?;
    let is_terminal = io::stdin().is_terminal();
    if is_terminal {
        note(format!("console of {name}: ctrl-a d detaches"));
    }
    let left = attach(&client, console, name)?;
    let new_line = if is_terminal { "\n" } else { "" };
    match left {
        Left::Detached => note(format!("{new_line}detached: {name} runs on")),
        Left::Unread => {}
        Left::Signal(signal) => {
            let exit = BY_SIGNAL.saturating_add(signal as u8);
            let what = format!("{signal} came: {name} runs on");
            return Err(Failure::new(exit, what));
        }
        Left::Closed => {
            let mut why = None;
            while let Some(line) = events.next(None)? {
                if let Event::Ended { reason } = line.event {
                    why = Some(reason);
                }
            }
            let why = why.unwrap_or_else(|| "gantry was killed, or died".to_owned());
            note(format!("{new_line}VM {name} ended: {why}"));
        }
    }
    Ok(())
}

/// Carries bytes between the console and the standard streams. The terminal is raw meanwhile.
fn attach(client: &Client, console: ConsoleStream, name: &str) -> Result<Left, Failure> {
    let failed = |error: io::Error| Failure::host(format!("cannot use the terminal: {error}"));
    let signals = signals().map_err(failed)?;
    let mut terminal = Terminal::open().map_err(failed)?;
    if let Some(terminal) = &mut terminal {
        terminal.follow(false).map_err(failed)?;
    }
    let keys = terminal.is_some().then(|| Keys::new(b"dx"));
    Ok(client.block_on(async {
        let (from, to) = tokio::io::split(console);
        let shows = pin!(show(from));
        let types = pin!(type_in(stdin(), to, keys, name));
        let follows = pin!(follow(signals, terminal.as_mut()));
        first([shows, types, follows]).await
    }))
}

/// What the first of them gives.
async fn first<T, const N: usize>(mut futures: [Pin<&mut dyn Future<Output = T>>; N]) -> T {
    poll_fn(|context| {
        let mut polled = futures.iter_mut().map(|one| one.as_mut().poll(context));
        polled.find(Poll::is_ready).unwrap_or(Poll::Pending)
    })
    .await
}

/// The signals that end this command or let it go on: none may end it with the terminal raw. They are blocked for
/// this thread and those that it starts, one of which waits for them.
fn signals() -> io::Result<Receiver<Signal>> {
    let signals: SigSet = [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGCONT,
    ]
    .into_iter()
    .collect();
    signals.thread_block()?;
    let (sender, receiver) = channel(1);
    thread::spawn(move || {
        while let Ok(signal) = signals.wait()
            && sender.blocking_send(signal).is_ok()
        {}
    });
    Ok(receiver)
}

/// Makes the terminal raw again when it comes back to this command, until a signal ends it.
async fn follow(mut signals: Receiver<Signal>, mut terminal: Option<&mut Terminal>) -> Left {
    while let Some(signal) = signals.recv().await {
        match (signal, &mut terminal) {
            // If it cannot be set now, it is as it was.
            (Signal::SIGCONT, Some(terminal)) => drop(terminal.follow(true)),
            (Signal::SIGCONT, None) => {}
            (signal, _) => return Left::Signal(signal),
        }
    }
    pending().await
}

/// Shows what the guest writes.
async fn show(mut from: ReadHalf<ConsoleStream>) -> Left {
    let mut buffer = [0; 4096];
    loop {
        let len = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return Left::Closed,
            Ok(len) => len,
        };
        let mut out = io::stdout().lock();
        let written = out.write_all(buffer.get(..len).unwrap_or_default());
        if written.and_then(|()| out.flush()).is_err() {
            return Left::Unread;
        }
    }
}

/// Types what comes on standard input, but for the commands of a user at a terminal. A command is seen though the
/// guest reads nothing; without a terminal, the input waits for the guest.
async fn type_in(
    mut input: Receiver<Vec<u8>>,
    mut to: impl AsyncWrite + Unpin,
    mut keys: Option<Keys>,
    name: &str,
) -> Left {
    let mut queue = VecDeque::new();
    loop {
        let typed = poll_fn(|context| {
            while !queue.is_empty() {
                match Pin::new(&mut to).poll_write(context, queue.as_slices().0) {
                    Poll::Ready(Ok(written @ 1..)) => drop(queue.drain(..written)),
                    // The other direction tells why.
                    Poll::Ready(_) => queue.clear(),
                    Poll::Pending if keys.is_none() => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            input.poll_recv(context)
        });
        let Some(typed) = typed.await else { break };
        let command = match &mut keys {
            Some(keys) => keys.take(&typed, &mut queue),
            None => {
                queue.extend(typed);
                None
            }
        };
        queue.truncate(MOST_TYPED);
        match command {
            None => {}
            Some(b'd') => return Left::Detached,
            Some(_) => note(format!(
                "\r\nctrl-a d detaches; `gantry vm shutdown {name}` ends the VM\r"
            )),
        }
    }
    let _ = to.write_all(queue.make_contiguous()).await;
    // The guest's output goes on.
    pending().await
}

/// What comes on standard input. A thread reads it, as a regular file cannot be waited for.
fn stdin() -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel(1);
    thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(len) = io::stdin().lock().read(&mut buffer)
            && len > 0
        {
            let typed = buffer.get(..len).unwrap_or_default().to_vec();
            if sender.blocking_send(typed).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(future)
    }

    #[test]
    fn the_console_of_a_guest_that_reads_nothing_is_left() {
        run(async {
            let (sender, input) = channel(1);
            // Nobody reads the other end.
            let (to, _other) = tokio::io::duplex(1);
            let types = async {
                for _ in 0..3 {
                    sender.send(vec![b'x'; MOST_TYPED]).await.unwrap();
                }
                sender.send(b"\x01d".to_vec()).await.unwrap();
                pending().await
            };
            let left = pin!(type_in(input, to, Some(Keys::new(b"dx")), "vm"));
            let left: [Pin<&mut dyn Future<Output = Left>>; 2] = [left, pin!(types)];
            assert!(matches!(first(left).await, Left::Detached));
        });
    }

    #[test]
    fn input_without_a_terminal_waits_for_the_guest() {
        run(async {
            let (sender, input) = channel(1);
            let (to, mut other) = tokio::io::duplex(1);
            let text = vec![b'x'; 2 * MOST_TYPED];
            let guest = async {
                for part in text.chunks(256) {
                    sender.send(part.to_vec()).await.unwrap();
                }
                drop(sender);
                Left::Closed
            };
            let reads = async {
                let mut read = vec![0; text.len()];
                other.read_exact(&mut read).await.unwrap();
                assert_eq!(read, text);
                Left::Unread
            };
            let mut guest = pin!(guest);
            let mut types = pin!(type_in(input, to, None, "vm"));
            let mut sent = false;
            let both = poll_fn(|context| {
                sent = sent || guest.as_mut().poll(context).is_ready();
                types.as_mut().poll(context)
            });
            let left: [Pin<&mut dyn Future<Output = Left>>; 2] = [pin!(both), pin!(reads)];
            assert!(matches!(first(left).await, Left::Unread));
        });
    }
}
