//! VMs of the cases: their files, gantry running them, and what their guests say.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::channel::{Event, Process};
use gantry_tests::lab::{Host, Output};
use gantry_tests::protocol::{Exit, Size};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// How long a guest may take to say something, or gantry to end.
const PATIENCE: Duration = Duration::from_secs(180);
/// What the guest's shell says when it waits for a command.
const PROMPT: &str = "/ # ";

thread_local! {
    /// `platform.iommufd` of the VMs of the case that runs on this thread.
    static IOMMUFD: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Gives all VMs that this thread makes from now on this `platform.iommufd`.
pub fn set_iommufd(iommufd: Option<bool>) {
    IOMMUFD.set(iommufd);
}

/// A VM to be run.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Its name, and that of its file.
    pub name: String,
    /// Its file.
    pub file: Value,
    /// Flags for `gantry run`.
    pub flags: &'static str,
}

impl Vm {
    /// One vCPU, 256 MiB, and the lab kernel, entered by PVH and saying little. The guest does
    /// `task` (see `guest-init.sh`).
    pub fn new(task: &str) -> Self {
        Self {
            name: "vm".to_owned(),
            file: json!({
                "payload": {
                    "kernel": "/lab/vmlinux",
                    "initramfs": "/lab/initramfs-guest",
                    "cmdline": format!("console=ttyS0 quiet task={task}"),
                },
                "cpus": {"boot_vcpus": 1},
                "memory": {"size": "256M"},
                "serial": {"mode": "Tty"},
                "platform": {"iommufd": IOMMUFD.get()},
            }),
            flags: "",
        }
    }

    /// The same with Debian's kernel, a bzImage.
    pub fn of_debian(mut self) -> Self {
        self.file["payload"]["kernel"] = json!("/lab/bzImage-debian");
        self
    }

    /// The same with a kernel that says all it has to say.
    pub fn loud(mut self) -> Self {
        let words = self.cmdline().replace("quiet", "ignore_loglevel");
        self.file["payload"]["cmdline"] = json!(words);
        self
    }

    /// The same with more words on the kernel's command line.
    pub fn append(mut self, words: &str) -> Self {
        self.file["payload"]["cmdline"] = json!(format!("{} {words}", self.cmdline()));
        self
    }

    /// The same with so many vCPUs.
    pub fn cpus(mut self, count: u32) -> Self {
        self.file["cpus"]["boot_vcpus"] = json!(count);
        self
    }

    /// The same with so much memory.
    pub fn memory(mut self, size: &str) -> Self {
        self.file["memory"]["size"] = json!(size);
        self
    }

    /// The same with so many devices of a group.
    pub fn devices(mut self, group: &str, count: u32) -> Self {
        let device = json!({"group": group, "count": count});
        match &mut self.file["devices"] {
            Value::Array(devices) => devices.push(device),
            none => *none = json!([device]),
        }
        self
    }

    /// The same with so many devices of a group that may have neither interrupts nor a reset.
    pub fn lacking(mut self, group: &str, count: u32) -> Self {
        self = self.devices(group, count);
        let last = self.file["devices"]
            .as_array_mut()
            .and_then(|all| all.last_mut());
        if let Some(last) = last {
            last["interrupts"] = json!("none");
            last["allow_no_reset"] = json!(true);
        }
        self
    }

    /// The same with one device, named by its address, that may have neither interrupts nor a reset.
    pub fn lacking_path(mut self, bdf: &str) -> Self {
        let path = format!("/sys/bus/pci/devices/{bdf}");
        let device = json!({"path": path, "interrupts": "none", "allow_no_reset": true});
        match &mut self.file["devices"] {
            Value::Array(devices) => devices.push(device),
            none => *none = json!([device]),
        }
        self
    }

    /// The same under another name.
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    fn cmdline(&self) -> String {
        let words = self.file["payload"]["cmdline"].as_str();
        words.unwrap_or_default().to_owned()
    }

    /// Writes its file into the host; where it lies.
    pub fn write(&self, host: &Host) -> Result<String> {
        let path = format!("/tmp/vms/{}.json", self.name);
        host.write(&path, self.file.to_string())?;
        Ok(path)
    }

    /// Writes its file; the command that runs it.
    pub fn command(&self, host: &Host) -> Result<String> {
        Ok(format!("gantry run {} {}", self.flags, self.write(host)?))
    }

    /// Runs it to its end, with nothing on its console's input.
    pub fn run(&self, host: &Host) -> Result<Ended> {
        let running = self.start(host)?;
        running.process.control().close()?;
        running.end()
    }

    /// Starts it.
    pub fn start(&self, host: &Host) -> Result<Running> {
        let command = format!("exec {}", self.command(host)?);
        Ok(Running::of(host.sh(&command).start()?))
    }

    /// Runs `script` on a terminal, with the command that runs the VM in `$VM`.
    pub fn on_terminal(&self, host: &Host, script: &str) -> Result<Running> {
        let terminal = host.sh(script).on_terminal(Size { rows: 24, cols: 80 });
        Ok(Running::of(
            terminal.env("VM", &self.command(host)?).start()?,
        ))
    }
}

/// A gantry that runs a VM; dropping it kills it.
#[derive(Debug)]
pub struct Running {
    process: Process,
    said: String,
    errors: String,
    /// What of `said` was waited for already.
    heard: usize,
    exit: Option<Exit>,
}

impl Running {
    /// A process that is gantry, or ends with it.
    pub fn of(process: Process) -> Self {
        Self {
            process,
            said: String::new(),
            errors: String::new(),
            heard: 0,
            exit: None,
        }
    }

    /// Waits until the guest says `words`, once more if it has been waited for them before.
    pub fn until(&mut self, words: &str) -> Result<()> {
        ensure!(self.says(words)?, "it never said {words:?}: {self}");
        Ok(())
    }

    /// Waits until the guest says `words`, or gantry ends: then it is `false`.
    pub fn says(&mut self, words: &str) -> Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let fresh = self.said.get(self.heard..).unwrap_or_default();
            if let Some(at) = fresh.find(words) {
                self.heard += at + words.len();
                return Ok(true);
            }
            if self.exit.is_some() {
                return Ok(false);
            }
            ensure!(self.listen(deadline)?, "it does not say {words:?}: {self}");
        }
    }

    /// Waits until the guest says a whole line that begins with `prefix`; the rest of that line.
    pub fn line(&mut self, prefix: &str) -> Result<String> {
        self.until(&format!("\n{prefix}"))?;
        let begin = self.heard;
        self.until("\n")?;
        let line = self.said.get(begin..self.heard).unwrap_or_default();
        Ok(line.trim().to_owned())
    }

    /// Types `line` at the shell of a guest whose task is `shell`, as soon as it waits for one.
    pub fn types(&mut self, line: &str) -> Result<()> {
        self.until(PROMPT)?;
        self.keys(&format!("{line}\n"))
    }

    /// Sends `keys` to its input.
    pub fn keys(&self, keys: &str) -> Result<()> {
        Ok(self.process.control().write(keys.as_bytes())?)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(self.process.control().signal(signal)?)
    }

    /// Waits for its end.
    pub fn end(mut self) -> Result<Ended> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(exit) = self.exit.take() {
                return Ok(Ended {
                    exit,
                    said: std::mem::take(&mut self.said),
                    errors: std::mem::take(&mut self.errors),
                });
            }
            ensure!(self.listen(deadline)?, "it does not end: {self}");
        }
    }

    /// Takes in the next event; `false` at the deadline.
    fn listen(&mut self, deadline: Instant) -> Result<bool> {
        match self.process.next(Some(deadline)) {
            Ok(Event::Stdout(data)) => self.said.push_str(&String::from_utf8_lossy(&data)),
            Ok(Event::Stderr(data)) => self.errors.push_str(&String::from_utf8_lossy(&data)),
            Ok(Event::Exit(exit)) => self.exit = Some(exit),
            Ok(Event::Hello) => {}
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => return Ok(false),
            Err(error) => return Err(error).context("the lab host is gone"),
        }
        Ok(true)
    }
}

impl std::fmt::Display for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}\n--- the guest said\n{}\n", self.exit, self.said)?;
        write!(f, "--- gantry said\n{}", self.errors)
    }
}

/// What a run left.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub exit: Exit,
    /// What the guest said, or all that was to be seen on the terminal.
    pub said: String,
    /// What gantry said.
    pub errors: String,
}

impl Ended {
    /// What a finished command of the host left.
    pub fn of(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            said: text(&output.stdout),
            errors: text(&output.stderr),
            exit: output.exit,
        }
    }

    /// Whether gantry said more on standard error than how the VM ended.
    pub fn complains(&self) -> bool {
        let tells_end = |line: &str| line.starts_with("VM ") && line.contains(" ended: ");
        self.errors.lines().any(|line| !tells_end(line))
    }

    /// Fails unless the exit status is `code`.
    pub fn exits(self, code: i32) -> Result<Self> {
        ensure!(
            self.exit == Exit::Code(code),
            "expected exit status {code}: {self}"
        );
        Ok(self)
    }

    /// Fails unless the guest powered itself off and gantry had nothing to complain of.
    pub fn powered_off(self) -> Result<Self> {
        let ended = self.exits(0)?;
        ensure!(!ended.complains(), "gantry complains: {ended}");
        Ok(ended)
    }

    /// What the guest said of `key`, in a line `guest: key=value`.
    pub fn value(&self, key: &str) -> Result<&str> {
        let value = self.values(key).next();
        value.with_context(|| format!("the guest said nothing of {key}: {self}"))
    }

    /// What the guest said of `key`, each time.
    pub fn values<'a>(&'a self, key: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        let prefix = format!("guest: {key}=");
        let lines = self.said.lines().map(str::trim_end);
        lines.filter_map(move |line| line.strip_prefix(&*prefix))
    }

    /// What the guest said of `key`, as a number.
    pub fn number(&self, key: &str) -> Result<u64> {
        let value = self.value(key)?;
        value.parse().with_context(|| format!("{key} is {value:?}"))
    }

    /// Fails if the guest's kernel is unhappy with its machine.
    pub fn no_warnings(&self) -> Result<()> {
        const WARNINGS: &[&str] = &[
            "WARNING:",
            "BUG:",
            "can't claim",
            "no compatible bridge window",
            "can't assign",
            "failed to assign",
            "ACPI Error",
            "ACPI BIOS Error",
            "ACPI Warning",
            "Firmware Bug",
            "Call Trace",
            "Unable to handle",
        ];
        let bad = |line: &&str| WARNINGS.iter().any(|warning| line.contains(warning));
        let found: Vec<&str> = self.said.lines().filter(bad).collect();
        ensure!(found.is_empty(), "{found:#?}\nin: {self}");
        Ok(())
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { exit, said, errors } = self;
        write!(
            f,
            "{exit:?}\n--- the guest said\n{said}\n--- gantry said\n{errors}"
        )
    }
}
