//! A booted lab host: run commands in it, write and read its files, know why it died.

use std::fs;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::channel::{Channel, Event, Process};
use super::device::{self, Device};
use super::end::End;
use super::monitor::Monitor;
use super::parts::Parts;
use super::put::Put;
use super::qemu::{Machine, Running};
use super::{command, disk, images, rom};
use crate::cleanup::TempFolder;
use crate::protocol::{Exit, Run, Size};

/// How long a boot may take; it takes 2 to 5 s on an idle machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);
/// How long a running host may take to say that it is there.
const HELLO_PATIENCE: Duration = Duration::from_secs(60);
/// How long a command may run unless it says otherwise.
const COMMAND_PATIENCE: Duration = Duration::from_secs(240);
/// How long QEMU may take to end when the wire is gone.
const END_PATIENCE: Duration = Duration::from_secs(20);
/// What QEMU says of every lab.
const USUAL_MESSAGES: &[&str] = &["'-mon' is deprecated", "is not connected to host network"];
/// What part of the memory the initramfs may take: it is there twice while the kernel unpacks it, which drops
/// without a word what finds no room.
const INITRD_SHARE: usize = 4;

/// Which lab to boot.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Kernel of the lab host.
    pub kernel: images::HostKernel,
    /// Its devices.
    pub devices: Vec<Device>,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Its processors.
    pub cpus: u8,
    /// Whether its processors run beside each other: what is measured needs that, and what looks for
    /// races. By default they take turns on one thread; the [`lab`](super) says why.
    pub parallel: bool,
    /// Added to its kernel's command line.
    pub append: String,
    /// Whether it has Debian's modprobe and udev, which nobody starts, in place of busybox's.
    pub udev: bool,
    /// Files of this machine that are put there besides.
    pub puts: Vec<Put>,
    /// More arguments for QEMU, after the lab's own.
    pub qemu: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            kernel: images::HostKernel::Stock,
            devices: Device::usual(),
            memory_mib: 8 << 10,
            cpus: 2,
            parallel: false,
            append: String::new(),
            udev: false,
            puts: Vec::new(),
            qemu: Vec::new(),
        }
    }
}

/// A booted lab host. Dropping it ends it and removes its files.
#[derive(Debug)]
pub struct Host {
    channel: Arc<Channel>,
    running: Running,
    machine: Machine,
    monitor: Mutex<Monitor>,
    booted_in: Duration,
    end: OnceLock<End>,
    // Last: its folder goes when QEMU is gone.
    _folder: TempFolder,
}

impl Host {
    /// Boots a lab and waits for its agent.
    pub fn boot(parts: &Parts, setup: &Setup) -> Result<Self> {
        let folder = TempFolder::new(&std::env::temp_dir(), "gantry-lab.")
            .context("cannot create a temporary folder for the lab")?;
        let path = folder.path();
        let initrd = images::host(parts, setup)?;
        let (needed, most) = (initrd.len() >> 20, setup.memory_mib as usize / INITRD_SHARE);
        ensure!(
            needed <= most,
            "the lab's files take {needed} MiB, and a lab with {} MiB of memory holds {most} MiB of them",
            setup.memory_mib
        );
        fs::write(path.join("initrd"), initrd).context("cannot write the lab's initramfs")?;
        for device in &setup.devices {
            if let Some(name) = device.rom() {
                rom::write(name, &device::rom_path(path, name))?;
            }
            if let Some(serial) = device.disk() {
                disk::write(serial, &device::disk_path(path, serial))?;
            }
        }
        let machine = Machine {
            qemu: parts.qemu.clone(),
            kernel: setup.kernel.of(parts)?.bzimage.clone(),
            append: setup.append.clone(),
            memory_mib: setup.memory_mib,
            cpus: setup.cpus,
            parallel: setup.parallel || !parts.may_take_turns(),
            devices: setup.devices.clone(),
            more: setup.qemu.clone(),
            folder: path.to_owned(),
        };
        let began = Instant::now();
        let running = machine.start()?;
        let channel = Channel::new(running.agent.try_clone()?)?;
        let monitor = Monitor::new(running.monitor.try_clone()?).map_err(|error| {
            match command::tail(&machine.messages()) {
                words if words.is_empty() => error.context("QEMU does not start"),
                words => anyhow!("QEMU does not start; it says:\n{words}"),
            }
        })?;
        let monitor = Mutex::new(monitor);
        let mut host = Self {
            channel,
            running,
            machine,
            monitor,
            booted_in: Duration::ZERO,
            end: OnceLock::new(),
            _folder: folder,
        };
        match host.channel.hello(BOOT_PATIENCE) {
            Ok(true) => {}
            Ok(false) => bail!(
                "the lab did not boot in {BOOT_PATIENCE:?}\n{}",
                host.last_words()
            ),
            Err(_) => bail!("the lab died while booting\n{}", host.last_words()),
        }
        host.booted_in = began.elapsed();
        // QEMU has read it, and it is large.
        let _ = fs::remove_file(host.machine.folder.join("initrd"));
        Ok(host)
    }

    /// What QEMU has said besides what it says of every lab: warnings mostly.
    pub fn messages(&self) -> String {
        let messages = fs::read(self.machine.messages()).unwrap_or_default();
        let messages = String::from_utf8_lossy(&messages);
        let mut lines: Vec<&str> = messages.lines().collect();
        lines.retain(|line| !USUAL_MESSAGES.iter().any(|usual| line.contains(usual)));
        lines.join("\n")
    }

    /// How long the boot took, from QEMU's start to the agent's first word.
    pub fn booted_in(&self) -> Duration {
        self.booted_in
    }

    /// A shell script to run in the host.
    pub fn sh(&self, script: &str) -> HostCommand<'_> {
        self.command(["sh", "-c", script])
    }

    /// A program with its arguments to run in the host.
    pub fn command<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> HostCommand<'_> {
        HostCommand {
            host: self,
            run: Run {
                argv: argv.into_iter().map(Into::into).collect(),
                env: Vec::new(),
                cwd: "/root".to_owned(),
                tty: None,
            },
            input: Vec::new(),
            patience: COMMAND_PATIENCE,
        }
    }

    /// Writes a file in the host, with its folders.
    pub fn write(&self, path: &str, data: impl Into<Vec<u8>>) -> Result<()> {
        self.command([
            "sh",
            "-c",
            "mkdir -p \"$(dirname \"$0\")\" && cat >\"$0\"",
            path,
        ])
        .input(data)
        .output()?
        .success()
        .with_context(|| format!("cannot write {path} in the lab"))?;
        Ok(())
    }

    /// Reads a file in the host.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.command(["cat", path]).output()?.success()?;
        Ok(output.stdout)
    }

    /// Reads a file in the host as text, without the line end at its end.
    pub fn read_text(&self, path: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.read(path)?)
            .trim_end()
            .to_owned())
    }

    /// Whether its agent still answers.
    pub fn answers(&self) -> bool {
        matches!(self.channel.hello(HELLO_PATIENCE), Ok(true))
    }

    /// Runs a command of QEMU's monitor. Device number `n` of the setup is `dev<n>` there.
    pub fn monitor(
        &self,
        command: &str,
        arguments: serde_json::Value,
    ) -> Result<serde_json::Value> {
        let mut monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        monitor.execute(command, arguments)
    }

    /// What the kernel console and QEMU said last, for error messages.
    pub fn last_words(&self) -> String {
        // QEMU's last writes may still be on their way.
        std::thread::sleep(Duration::from_millis(100));
        let state = match self.running.child.try_wait() {
            Ok(Some(status)) => format!("QEMU ended: {status}"),
            _ => "QEMU runs".to_owned(),
        };
        format!(
            "{state}\nits messages:\n{}the console's end:\n{}",
            command::tail(&self.machine.messages()),
            command::tail(&self.machine.console())
        )
    }

    /// Why the lab ended, asked when the wire to it is gone.
    pub fn end(&self) -> &End {
        // Events are told once.
        self.end.get_or_init(|| self.wait_for_end())
    }

    fn wait_for_end(&self) -> End {
        let deadline = Instant::now() + END_PATIENCE;
        let status = loop {
            match self.running.child.try_wait() {
                Ok(Some(status)) => break Some(status),
                _ if Instant::now() > deadline => break None,
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        let Some(status) = status else {
            return End::Lost("its agent does not answer any more, and QEMU still runs".to_owned());
        };
        let mut monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        let console = fs::read(self.machine.console()).unwrap_or_default();
        End::of(
            &status.to_string(),
            monitor.last_reason().as_deref(),
            &String::from_utf8_lossy(&console),
        )
    }

    /// The error of what the lab's end came in between of.
    pub fn lost(&self) -> anyhow::Error {
        anyhow!("the lab has ended: {}\n{}", self.end(), self.last_words())
    }
}

/// A command to run in the host; nothing happens before `output` or `start`.
#[derive(Debug)]
#[must_use = "nothing runs before output() or start()"]
pub struct HostCommand<'a> {
    host: &'a Host,
    run: Run,
    input: Vec<u8>,
    patience: Duration,
}

impl HostCommand<'_> {
    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.run.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Gives it this standard input; without, it is empty.
    pub fn input(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.input = data.into();
        self
    }

    /// Kills it and fails when it runs longer; 240 s without.
    pub fn within(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Gives it a terminal.
    pub fn on_terminal(mut self, size: Size) -> Self {
        self.run.tty = Some(size);
        self
    }

    /// Starts it with its input still open; dropping the process kills it.
    pub fn start(self) -> Result<Process> {
        self.host
            .channel
            .start(&self.run)
            .map_err(|_| self.host.lost())
    }

    /// Runs it to its end. Fails when it cannot be started, does not end in time, or the host dies;
    /// not when it exits with an error.
    pub fn output(self) -> Result<Output> {
        let what = self.run.argv.join(" ");
        let (host, patience) = (self.host, self.patience);
        let deadline = Instant::now() + patience;
        let input = self.input.clone();
        let mut process = self.start()?;
        let control = process.control();
        control
            .write(&input)
            .and_then(|()| control.close())
            .map_err(|_| host.lost())?;
        let mut output = Output {
            what,
            exit: Exit::Code(0),
            stdout: Vec::new(),
            stderr: Vec::new(),
        };
        loop {
            match process.next(Some(deadline)) {
                Ok(Event::Stdout(data)) => output.stdout.extend(data),
                Ok(Event::Stderr(data)) => output.stderr.extend(data),
                Ok(Event::Hello) => {}
                Ok(Event::Exit(Exit::NotStarted(why))) => {
                    bail!("cannot start `{}` in the lab: {why}", output.what)
                }
                Ok(Event::Exit(exit)) => {
                    output.exit = exit;
                    return Ok(output);
                }
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                    bail!("not over in {patience:?}: {output}")
                }
                Err(_) => return Err(host.lost()),
            }
        }
    }
}

/// What a command left.
#[derive(Debug, Clone)]
pub struct Output {
    what: String,
    /// How it ended.
    pub exit: Exit,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without the line end at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Standard error as text, without the line end at its end.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_owned()
    }

    /// Fails unless it exited with 0.
    pub fn success(self) -> Result<Self> {
        self.exits(0)
    }

    /// Fails unless it exited with `code`.
    pub fn exits(self, code: i32) -> Result<Self> {
        if self.exit != Exit::Code(code) {
            bail!("expected exit status {code}: {self}");
        }
        Ok(self)
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, exit, .. } = self;
        writeln!(f, "`{what}`: {exit:?}\n--- stdout\n{}", self.text())?;
        write!(f, "--- stderr\n{}", self.errors())
    }
}
