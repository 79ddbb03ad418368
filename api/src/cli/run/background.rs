//! `gantry run -d`: starts a second gantry in a session of its own, and waits until its guest runs.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use gantry_resources::base::HostPaths;
use nix::unistd::{dup2_stdin, dup2_stdout, setsid};

use super::RunArgs;
use super::readiness::Started;
use crate::output::{note, print};
use crate::report::{BY_SIGNAL, FAILED, Failure};
use crate::stderr::Stderr;
use crate::vm_log::{Logs, NewLog};

/// The flag of the second gantry.
pub const FLAG: &str = "in-background";

/// Runs this command line once more in the background. Returns once its guest runs, or with the exit status that it
/// ended with, after what it said.
pub fn start(args: &RunArgs, paths: &HostPaths) -> Result<ExitCode, Failure> {
    let log = Logs::new(&paths.run).create().map_err(|error| {
        let run = paths.run.display();
        Failure::host(format!("cannot make the VM's log in {run}: {error}")).help(
            "a user who may not write there needs a folder in $XDG_RUNTIME_DIR, as a login sets it",
        )
    })?;
    let failed = |error: io::Error| Failure::host(format!("cannot start gantry: {error}"));
    let (mut ready, child) = spawn(args, &log).map_err(failed)?;
    let mut answer = Vec::new();
    ready.read_to_end(&mut answer).map_err(failed)?;
    match serde_json::from_slice(&answer) {
        Ok(started) => is_started(&started, &log, args),
        Err(_) => has_failed(child, &log).map_err(failed),
    }
}

fn spawn(args: &RunArgs, log: &NewLog) -> io::Result<(io::PipeReader, Child)> {
    let (reader, writer) = io::pipe()?;
    let stdin = match args.reads_stdin() {
        true => Stdio::inherit(),
        false => Stdio::null(),
    };
    let child = Command::new("/proc/self/exe")
        .arg(format!("--{FLAG}"))
        .args(std::env::args_os().skip(1))
        .stdin(stdin)
        .stdout(writer)
        .stderr(log.stdio()?)
        .spawn()?;
    Ok((reader, child))
}

fn is_started(started: &Started, log: &NewLog, args: &RunArgs) -> Result<ExitCode, Failure> {
    let Started { name, said } = started;
    if let Err(error) = log.keep(name) {
        note(format!(
            "warning: `gantry vm logs {name}` has nothing to show: {error}"
        ));
    }
    show(&log.text(Some(*said)).unwrap_or_default());
    let vm = args.name_for_clients(name);
    print(|out| {
        writeln!(
            out,
            "VM {name} runs. `gantry vm console {vm}` attaches to its console, `gantry vm logs {name}` shows \
             what it has said, `gantry vm shutdown {vm}` ends it."
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

fn has_failed(mut child: Child, log: &NewLog) -> io::Result<ExitCode> {
    let status = child.wait()?;
    show(&log.text(None)?);
    if let Some(signal) = status.signal() {
        note(format!("error: gantry was killed by signal {signal}"));
    }
    Ok(ExitCode::from(exit_code(status)))
}

fn exit_code(status: ExitStatus) -> u8 {
    let number = |number: i32| u8::try_from(number).ok();
    let signal = || status.signal().and_then(number);
    match status.code().and_then(number) {
        // It ended without a word.
        Some(0) => FAILED,
        Some(code) => code,
        None => BY_SIGNAL.saturating_add(signal().unwrap_or(0)),
    }
}

/// Shows what the second gantry said.
fn show(text: &[u8]) {
    let _ = io::stderr().write_all(text);
}

/// The standard streams of the second gantry.
pub struct Background {
    ready: File,
    null: File,
}

impl Background {
    /// Leaves the session of the starter, and keeps standard output for telling it that the guest runs. Standard
    /// error is the VM's log.
    ///
    /// # Errors
    /// The kernel refuses a step.
    pub fn enter(stderr: &Stderr) -> io::Result<Self> {
        setsid()?;
        stderr.bound()?;
        let ready = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdout(&null)?;
        Ok(Self { ready, null })
    }

    /// Closes standard input, once the VM's file is read. Returns what the starter reads.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn leave_stdin(self) -> io::Result<File> {
        dup2_stdin(&self.null)?;
        Ok(self.ready)
    }
}
