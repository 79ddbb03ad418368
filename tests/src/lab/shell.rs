//! A terminal in the lab host, and a command whose output is passed through.

use std::io::{self, Read, Write, stdin, stdout};
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::termios::{self, SetArg};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

use super::channel::{Event, Process};
use super::{End, Host};
use crate::cleanup::Guard;
use crate::protocol::{Exit, Size};

/// Runs `argv` on this terminal until it ends; its exit status.
pub fn interactive(host: &Host, argv: &[&str]) -> Result<i32> {
    let size = terminal_size().unwrap_or(Size { rows: 24, cols: 80 });
    let mut process = host
        .command(argv.iter().copied())
        .on_terminal(size)
        .start()?;
    let raw = raw_terminal()?;
    let control = process.control();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = stdin().lock().read(&mut buffer) {
            if control
                .write(buffer.get(..read).unwrap_or_default())
                .is_err()
            {
                return;
            }
        }
    });
    let control = process.control();
    let mut changes = Signals::new([SIGWINCH]).context("cannot watch the terminal's size")?;
    thread::spawn(move || {
        for _ in changes.forever() {
            if let Some(size) = terminal_size() {
                let _ = control.resize(size);
            }
        }
    });
    let exit = pass_through(&mut process);
    drop(raw);
    match exit? {
        Some(code) => Ok(code),
        // A good way out.
        None if *host.end() == End::PoweredOff => {
            eprintln!("The lab host is powered off.");
            Ok(0)
        }
        None => Err(host.lost()),
    }
}

/// Runs `argv` without a terminal, output passed through; its exit status.
pub fn batch(host: &Host, argv: &[String]) -> Result<i32> {
    let mut process = host.command(argv.iter().cloned()).start()?;
    // Where this fails the lab is gone, which the next event tells.
    let _ = process.control().close();
    pass_through(&mut process)?.ok_or_else(|| host.lost())
}

/// Shows the command's output until it ends; its exit status, or nothing when the wire is gone.
fn pass_through(process: &mut Process) -> Result<Option<i32>> {
    loop {
        match process.next(None) {
            Ok(Event::Stdout(data)) => show(&mut stdout(), &data)?,
            Ok(Event::Stderr(data)) => show(&mut io::stderr(), &data)?,
            Ok(Event::Hello) => {}
            Ok(Event::Exit(Exit::Code(code))) => return Ok(Some(code)),
            Ok(Event::Exit(Exit::Signal(signal))) => return Ok(Some(128 + signal)),
            Ok(Event::Exit(Exit::NotStarted(why))) => bail!("cannot start it in the lab: {why}"),
            Err(_) => return Ok(None),
        }
    }
}

fn show(to: &mut impl Write, data: &[u8]) -> Result<()> {
    to.write_all(data)?;
    Ok(to.flush()?)
}

/// Raw mode until the guard is dropped or a signal ends us; nothing when this is no terminal.
fn raw_terminal() -> Result<Option<Guard>> {
    let Ok(former) = termios::tcgetattr(stdin()) else {
        return Ok(None);
    };
    let former = RestoreTerminal(former);
    let mut raw = former.0.clone();
    termios::cfmakeraw(&mut raw);
    termios::tcsetattr(stdin(), SetArg::TCSANOW, &raw).context("cannot set the terminal raw")?;
    Ok(Some(Guard::new(move || former.restore())))
}

struct RestoreTerminal(termios::Termios);

impl RestoreTerminal {
    fn restore(&self) {
        let _ = termios::tcsetattr(stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}

/// Asks `stty`, which needs no ioctl of our own.
fn terminal_size() -> Option<Size> {
    let output = Command::new("stty")
        .arg("size")
        .stdin(stdin().as_fd().try_clone_to_owned().ok()?)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (rows, cols) = text.trim().split_once(' ')?;
    let size = Size {
        rows: rows.parse().ok()?,
        cols: cols.parse().ok()?,
    };
    // A terminal that nobody sized says 0.
    (size.rows > 0 && size.cols > 0).then_some(size)
}
