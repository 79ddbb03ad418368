//! The agent of the lab host: starts what `xtask` asks for and sends back what comes out.
//!
//! It is started by the lab host's `/init` and speaks [`gantry_tests::protocol`] over a
//! virtio-serial port. When the port or `xtask` is gone, the agent ends, `/init` restarts the host and
//! QEMU ends: no lab outlives its owner. With the argument `measure` it runs one measurement of a
//! bench instead, and with `relay` and a path it passes what comes in on to a Unix socket and back.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use gantry_tests::bench::inside;
use gantry_tests::protocol::{Exit, Frame, Kind, PORT_NAME, Run, Size};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The sending half of the port, shared by all threads.
#[derive(Clone)]
struct Port(Arc<Mutex<File>>);

impl Port {
    fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        frame.write_to(&mut *file)
    }
}

/// A command that runs: its process group, its input (an empty chunk closes it), its terminal.
struct Running {
    group: Pid,
    input: Sender<Vec<u8>>,
    terminal: Option<File>,
}

type Table = Arc<Mutex<HashMap<u32, Running>>>;

fn main() {
    let outcome = match std::env::args().nth(1).as_deref() {
        Some(inside::ARGUMENT) => inside::run().map_err(io::Error::other),
        Some("relay") => relay(&std::env::args().nth(2).unwrap_or_default()),
        _ => serve(),
    };
    if let Err(error) = outcome {
        eprintln!("lab-agent: {error:#}");
        std::process::exit(1);
    }
}

/// Joins standard input and output with a Unix socket, until the socket is closed.
fn relay(path: &str) -> io::Result<()> {
    let mut from_socket = UnixStream::connect(path)?;
    let mut to_socket = from_socket.try_clone()?;
    thread::spawn(move || {
        let _ = pass(&mut io::stdin(), &mut to_socket);
        to_socket.shutdown(std::net::Shutdown::Write)
    });
    pass(&mut from_socket, &mut io::stdout())
}

/// Passes what comes on as it comes, which [`io::copy`] does not promise.
fn pass(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            read => to.write_all(&buffer[..read]).and_then(|()| to.flush())?,
        }
    }
}

fn serve() -> io::Result<()> {
    let file = open_port()?;
    let port = Port(Arc::new(Mutex::new(file.try_clone()?)));
    let mut input = Patient { file, began: false };
    let table = Table::default();
    loop {
        let frame = match Frame::read_from(&mut input) {
            Ok(frame) => frame,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        match frame.kind {
            Kind::Hello => port.send(&frame)?,
            Kind::Run => {
                if let Err(error) = start(&frame, &port, &table) {
                    let exit = Exit::NotStarted(error.to_string());
                    port.send(&Frame::json(frame.id, Kind::Exit, &exit)?)?;
                }
            }
            Kind::Stdin => feed(frame, &table),
            Kind::Signal => signal(&frame, &table)?,
            Kind::Resize => resize(&frame, &table)?,
            Kind::Stdout | Kind::Stderr | Kind::Exit => {}
        }
    }
}

/// Finds the virtio-serial port by its name and opens it.
fn open_port() -> io::Result<File> {
    for _ in 0..100 {
        for entry in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME {
                return File::options()
                    .read(true)
                    .write(true)
                    .open(std::path::Path::new("/dev").join(entry.file_name()));
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    Err(io::Error::other(format!(
        "no virtio-serial port named {PORT_NAME}"
    )))
}

/// Reads the port; before the first byte an end of file only means that the host's side is not
/// announced yet.
struct Patient {
    file: File,
    began: bool,
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.file.read(buffer)?;
            if read > 0 || self.began {
                self.began = true;
                return Ok(read);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn start(frame: &Frame, port: &Port, table: &Table) -> io::Result<()> {
    let run: Run = frame.parse()?;
    let (program, arguments) = run
        .argv
        .split_first()
        .ok_or_else(|| io::Error::other("an empty command"))?;
    match run.tty {
        None => {
            let mut command = Command::new(program);
            command.args(arguments).process_group(0);
            start_piped(frame.id, dress(command, &run), port, table)
        }
        Some(size) => {
            // `setsid -c` makes the terminal the controlling one: job control and ^C work.
            let mut command = Command::new("setsid");
            command.arg("-c").arg(program).args(arguments);
            start_on_terminal(frame.id, dress(command, &run), size, (port, table))
        }
    }
}

fn dress(mut command: Command, run: &Run) -> Command {
    command
        .envs(run.env.iter().cloned())
        .current_dir(&run.cwd)
        .stdin(Stdio::piped());
    command
}

fn start_piped(id: u32, mut command: Command, port: &Port, table: &Table) -> io::Result<()> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let running = Running {
        group: Pid::from_raw(child.id().cast_signed()),
        input: feeder(child.stdin.take()),
        terminal: None,
    };
    lock(table).insert(id, running);
    let pumps = [
        child
            .stdout
            .take()
            .map(|from| pump(id, Kind::Stdout, from, port)),
        child
            .stderr
            .take()
            .map(|from| pump(id, Kind::Stderr, from, port)),
    ];
    finish(
        id,
        child,
        pumps.into_iter().flatten().collect(),
        (port, table),
    );
    Ok(())
}

fn start_on_terminal(
    id: u32,
    mut command: Command,
    size: Size,
    (port, table): (&Port, &Table),
) -> io::Result<()> {
    let pty = openpty(&winsize(size), None)?;
    let slave = pty.slave;
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave);
    let child = command.spawn()?;
    drop(command); // and with it our copies of the terminal's slave side
    let master = File::from(pty.master);
    let running = Running {
        group: Pid::from_raw(child.id().cast_signed()),
        input: feeder(Some(master.try_clone()?)),
        terminal: Some(master.try_clone()?),
    };
    lock(table).insert(id, running);
    let pumps = vec![pump(id, Kind::Stdout, master, port)];
    finish(id, child, pumps, (port, table));
    Ok(())
}

/// Copies a stream of a command into frames until it ends.
fn pump(
    id: u32,
    kind: Kind,
    mut from: impl Read + Send + 'static,
    port: &Port,
) -> thread::JoinHandle<()> {
    let port = port.clone();
    thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        // A terminal whose last user is gone reads as EIO: the end, as 0 is for a pipe.
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            let data = buffer.get(..read).unwrap_or_default();
            if port.send(&Frame::bytes(id, kind, data)).is_err() {
                return;
            }
        }
    })
}

/// Waits for the command's end and tells the host.
///
/// A background process may keep the streams open for longer: the command's end waits two seconds
/// for it, not for ever.
fn finish(
    id: u32,
    mut child: std::process::Child,
    pumps: Vec<thread::JoinHandle<()>>,
    (port, table): (&Port, &Table),
) {
    let port = port.clone();
    let table = Arc::clone(table);
    thread::spawn(move || {
        let status = child.wait();
        for _ in 0..2000 {
            if pumps.iter().all(thread::JoinHandle::is_finished) {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        lock(&table).remove(&id);
        let exit = match status {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, signal) => Exit::Signal(signal.unwrap_or_default()),
            },
            Err(error) => Exit::NotStarted(error.to_string()),
        };
        if let Ok(frame) = Frame::json(id, Kind::Exit, &exit) {
            // The host's end is gone when this fails; the main loop sees that too.
            let _ = port.send(&frame);
        }
    });
}

/// A thread of its own feeds each command: one that reads nothing must not stop the agent.
fn feeder(to: Option<impl Write + Send + 'static>) -> Sender<Vec<u8>> {
    let (sender, chunks) = channel::<Vec<u8>>();
    thread::spawn(move || {
        let Some(mut to) = to else { return };
        while let Ok(chunk) = chunks.recv() {
            if chunk.is_empty() || to.write_all(&chunk).is_err() {
                return;
            }
        }
    });
    sender
}

fn feed(frame: Frame, table: &Table) {
    if let Some(running) = lock(table).get(&frame.id) {
        // The command may have closed its input: not our loss.
        let _ = running.input.send(frame.data);
    }
}

fn signal(frame: &Frame, table: &Table) -> io::Result<()> {
    let signal = Signal::try_from(frame.parse::<i32>()?)?;
    if let Some(running) = lock(table).get(&frame.id) {
        // A group that is gone already needs no signal.
        let _ = killpg(running.group, signal);
    }
    Ok(())
}

fn resize(frame: &Frame, table: &Table) -> io::Result<()> {
    let size: Size = frame.parse()?;
    if let Some(Running {
        terminal: Some(terminal),
        ..
    }) = lock(table).get(&frame.id)
    {
        set_size(terminal.as_fd().try_clone_to_owned()?, size);
    }
    Ok(())
}

/// Changes the size of a terminal through `stty`, which needs no ioctl of our own.
fn set_size(terminal: OwnedFd, size: Size) {
    let _ = Command::new("stty")
        .args([
            "rows",
            &size.rows.to_string(),
            "cols",
            &size.cols.to_string(),
        ])
        .stdin(terminal)
        .status();
}

fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn lock(table: &Table) -> std::sync::MutexGuard<'_, HashMap<u32, Running>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}
