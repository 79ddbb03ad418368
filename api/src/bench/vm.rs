//! The measuring guest, seen from the host: a VM of its own process, and the lines on its console.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use gantry_resources::pools::DeviceRequest;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::guest::MARK;
use super::image::{ENVIRONMENT, PROGRAM, image};
use super::model::Report;
use crate::report::Failure;

/// The hidden command that is init of the guest.
pub const INIT: &str = "__bench-guest";
/// How long the guest may be silent, beside a test: while its kernel boots, and while the device is reset.
const SILENCE: Duration = Duration::from_secs(120);
/// RAM of the guest beside the initramfs and what is unpacked from it.
const RAM: u64 = 256 << 20;
/// RAM is a multiple of this.
const RAM_ALIGN: u64 = 2 << 20;

/// What the guest boots.
pub struct Payload<'a> {
    kernel: &'a Path,
    initramfs: NamedTempFile,
    ram: u64,
}

impl<'a> Payload<'a> {
    /// Makes the guest's initramfs for a kernel with these modules.
    ///
    /// # Errors
    /// A file is missing, or there is no room for the initramfs.
    pub fn new(kernel: &'a Path, modules: &Path) -> Result<Self, Failure> {
        if let Err(error) = std::fs::File::open(kernel) {
            let what = format!(
                "cannot open the guest's kernel {}: {error}",
                kernel.display()
            );
            return Err(Failure::host(what).help("--kernel names another"));
        }
        let image = image(modules)?;
        let mut initramfs = NamedTempFile::with_prefix("gantry-bench-")?;
        std::io::Write::write_all(&mut initramfs, &image)?;
        Ok(Self {
            kernel,
            initramfs,
            ram: (2 * image.len() as u64 + RAM).next_multiple_of(RAM_ALIGN),
        })
    }

    /// The VM's file.
    fn config(&self, devices: &[DeviceRequest], per_test: Duration) -> Value {
        let cmdline = format!(
            "console=ttyS0 quiet loglevel=1 {ENVIRONMENT} rdinit={PROGRAM} -- {INIT} {}",
            per_test.as_millis()
        );
        json!({
            "payload": {"kernel": self.kernel, "initramfs": self.initramfs.path(), "cmdline": cmdline},
            // One that measures, one for the rest.
            "cpus": {"boot_vcpus": 2},
            "memory": {"size": self.ram},
            "devices": devices,
            "serial": {"mode": "Tty"},
        })
    }

    /// Boots a guest with these devices, and takes what it reports until it powers off. `arguments` are the options of
    /// gantry itself.
    ///
    /// # Errors
    /// The VM cannot start, or its guest fails or falls silent.
    pub fn measure(
        &self,
        arguments: &[String],
        devices: &[DeviceRequest],
        per_test: Duration,
        take: &mut dyn FnMut(Report),
    ) -> Result<(), Failure> {
        let mut file = NamedTempFile::with_prefix("gantry-bench-")?;
        serde_json::to_writer(&mut file, &self.config(devices, per_test))?;
        let mut command = Command::new("/proc/self/exe");
        command
            .args(arguments)
            .args(["run", "--no-api", "--name", "bench"]);
        if devices.iter().any(|device| device.allow_ungrouped) {
            command.arg("--allow-ungrouped");
        }
        command.arg(file.path());
        let mut vm = Vm::start(command)?;
        let done = vm.follow(per_test, take)?;
        let (status, errors) = vm.end()?;
        match done && status.success() {
            true => Ok(()),
            false => {
                let what = format!(
                    "the measuring guest did not finish ({status})\n{}",
                    errors.trim()
                );
                Err(Failure::new(
                    status.code().map_or(1, |code| code.max(1) as u8),
                    what,
                ))
            }
        }
    }
}

/// A VM that runs.
struct Vm {
    child: Child,
    lines: Receiver<String>,
    errors: thread::JoinHandle<String>,
}

impl Vm {
    fn start(mut command: Command) -> Result<Self, Failure> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let (sender, lines) = channel();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        thread::spawn(move || {
            let Some(stdout) = stdout else { return };
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    break;
                }
            }
        });
        let errors = thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut stderr) = stderr {
                // What was read until it failed is all that there is to show.
                let _ = stderr.read_to_end(&mut text);
            }
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Self {
            child,
            lines,
            errors,
        })
    }

    /// Takes reports until the guest is done, or its console closes. Returns whether it is done.
    fn follow(
        &mut self,
        per_test: Duration,
        take: &mut dyn FnMut(Report),
    ) -> Result<bool, Failure> {
        loop {
            match self.lines.recv_timeout(SILENCE + per_test * 2) {
                Ok(line) => match parse(&line) {
                    Some(Report::Done) => return Ok(true),
                    Some(Report::Failed(why)) => {
                        self.kill();
                        return Err(Failure::host(format!(
                            "the measuring guest cannot measure: {why}"
                        )));
                    }
                    Some(report) => take(report),
                    None => tracing::debug!("guest: {line}"),
                },
                Err(RecvTimeoutError::Disconnected) => return Ok(false),
                Err(RecvTimeoutError::Timeout) => {
                    self.kill();
                    let seconds = (SILENCE + per_test * 2).as_secs();
                    return Err(Failure::host(format!(
                        "the measuring guest has said nothing for {seconds} s, and was ended: with -vv its console is shown"
                    )));
                }
            }
        }
    }

    fn end(mut self) -> Result<(ExitStatus, String), Failure> {
        let status = self.child.wait()?;
        let errors = self.errors.join().unwrap_or_default();
        Ok((status, errors))
    }

    fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A report, if the line says one. Other lines are the kernel's.
fn parse(line: &str) -> Option<Report> {
    let (_, text) = line.split_once(MARK)?;
    serde_json::from_str(text.trim_end()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_found_among_the_kernels_lines() {
        let line = format!(
            "\r{MARK}{}\r",
            serde_json::to_string(&Report::Done).unwrap()
        );
        assert_eq!(parse(&line), Some(Report::Done));
        assert_eq!(parse("[    0.1] Linux version 6.12"), None);
        assert_eq!(parse(&format!("{MARK}{{")), None);
    }
}
