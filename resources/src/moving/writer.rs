//! Writes to sysfs with a deadline, since the kernel may never return from one.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use thiserror::Error;

use crate::base::helpers;
use crate::facts::open_files;
use crate::holding::passing::PASSING_PATIENCE;

/// The first argument of the child that [`ChildWriter`] runs.
const SUBCOMMAND: &str = "__sysfs-write";

/// One write to a sysfs attribute.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SysfsWrite {
    /// The attribute.
    pub path: PathBuf,
    /// What is written, in one write.
    pub value: String,
}

/// A write to sysfs failed.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The kernel refused it.
    #[error("the kernel refused {value:?} in {path}")]
    Refused {
        /// The attribute.
        path: PathBuf,
        /// What was written.
        value: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A process keeps the device open.
    #[error(
        "the kernel has refused {:?} in {} for {:.1?}, as the device is in use{}",
        .0.write.value, .0.write.path.display(), .0.after, .0.by
    )]
    Busy(Box<Unfinished>),
    /// The kernel did not return.
    #[error(
        "the kernel did not return within {:?} from writing {:?} to {}: the device hangs, see dmesg{}",
        .0.after, .0.write.value, .0.write.path.display(), .0.by
    )]
    Hung(Box<Unfinished>),
    /// The process that writes could not be run.
    #[error("cannot run {program} to write {path}")]
    Helper {
        /// The program.
        program: PathBuf,
        /// The attribute.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A write that another process blocks.
#[derive(Debug)]
pub struct Unfinished {
    /// What was written.
    pub write: SysfsWrite,
    /// How long it was tried, or waited for.
    pub after: Duration,
    /// The process that has the device open, if visible.
    pub by: String,
}

/// Writes sysfs attributes.
pub trait SysfsWriter {
    /// Writes `value` to an attribute that exists, in one write.
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError>;

    /// [`SysfsWriter::write`] with a file that stays open until the kernel returns, even if this process ends
    /// before: a lock on it tells others that the write goes on.
    fn write_keeping(&self, path: &Path, value: &str, kept: &File) -> Result<(), WriteError>;
}

/// Writes in a child process, which is abandoned when the kernel does not return in time.
///
/// While the kernel answers that a device is in use, or to try again, the write is repeated for a while: a killed
/// process loses its locks before the kernel has closed its devices, and some drivers are not ready while a device
/// resets. The answer is final if a process that is not ending has the device open.
///
/// A process inside such a write cannot even be killed. The child executes the program anew, so that it has none of
/// this process's descriptors and keeps no lock but that on the file that it is given as standard input.
#[derive(Clone, Debug)]
pub struct ChildWriter {
    /// The program to run with `__sysfs-write PATH VALUE`; it must call [`write_helper`].
    pub program: PathBuf,
    /// How long to wait for it.
    pub deadline: Duration,
    /// How long a device may be in use.
    pub patience: Duration,
    /// procfs, which shows who uses the device.
    pub proc: PathBuf,
}

impl Default for ChildWriter {
    /// This program, and 30 seconds.
    fn default() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            deadline: Duration::from_secs(30),
            patience: PASSING_PATIENCE,
            proc: "/proc".into(),
        }
    }
}

impl SysfsWriter for ChildWriter {
    fn write(&self, path: &Path, value: &str) -> Result<(), WriteError> {
        self.insist(path, value, || Ok(Stdio::null()))
    }

    fn write_keeping(&self, path: &Path, value: &str, kept: &File) -> Result<(), WriteError> {
        self.insist(path, value, || kept.try_clone().map(Stdio::from))
    }
}

impl ChildWriter {
    fn insist(
        &self,
        path: &Path,
        value: &str,
        stdin: impl Fn() -> io::Result<Stdio>,
    ) -> Result<(), WriteError> {
        let started = Instant::now();
        let errno = |error: &WriteError| match error {
            WriteError::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        };
        let mut pause = Duration::from_millis(10);
        let mut before = Vec::new();
        loop {
            let written = self.run(path, value, stdin());
            let waited = started.elapsed();
            match written.as_ref().err().and_then(errno) {
                Some(libc::EBUSY) => {
                    // A process that only checks whether a device is free has it open for a moment: only one that
                    // is seen twice counts.
                    let staying = open_files::staying(&self.proc, &open_files::about(path, value));
                    let stays = staying.iter().any(|pid| before.contains(pid));
                    if stays || waited >= self.patience {
                        return Err(WriteError::Busy(self.unfinished(path, value, waited)));
                    }
                    before = staying;
                }
                Some(libc::EAGAIN | libc::EINTR) if waited < self.patience => {}
                _ => return written,
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    fn unfinished(&self, path: &Path, value: &str, after: Duration) -> Box<Unfinished> {
        let by = open_files::words(&self.proc, &open_files::about(path, value));
        let (path, value) = (path.to_owned(), value.to_owned());
        let write = SysfsWrite { path, value };
        Box::new(Unfinished { write, after, by })
    }

    fn run(&self, path: &Path, value: &str, stdin: io::Result<Stdio>) -> Result<(), WriteError> {
        let helper = |source| WriteError::Helper {
            program: self.program.clone(),
            path: path.to_owned(),
            source,
        };
        let mut command = Command::new(&self.program);
        command.arg(SUBCOMMAND).arg(path).arg(value).env_clear();
        // In a process group of its own, so that it does not get the terminal's ctrl-c.
        command.process_group(0);
        command
            .stdin(stdin.map_err(helper)?)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().map_err(helper)?;
        let Some(status) = wait(&mut child, self.deadline).map_err(helper)? else {
            // It dies as soon as the kernel returns, before it could write anything else.
            let _ = child.kill();
            helpers::keep(child);
            return Err(WriteError::Hung(self.unfinished(
                path,
                value,
                self.deadline,
            )));
        };
        match status.code() {
            Some(0) => Ok(()),
            Some(errno) => Err(WriteError::Refused {
                path: path.to_owned(),
                value: value.to_owned(),
                source: io::Error::from_raw_os_error(errno),
            }),
            None => Err(helper(io::Error::other(format!("it died: {status}")))),
        }
    }
}

/// Waits for a child; none at the deadline.
fn wait(child: &mut Child, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// What the child of [`ChildWriter`] does with the arguments after `__sysfs-write`: a path and a value.
///
/// Its exit status is 0 or the errno of the failure.
pub fn write_helper(args: &[String]) -> ExitCode {
    let [path, value] = args else {
        return ExitCode::from(nix::libc::EINVAL as u8);
    };
    match write_once(Path::new(path), value) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let errno = error
                .raw_os_error()
                .and_then(|errno| u8::try_from(errno).ok());
            ExitCode::from(errno.unwrap_or(nix::libc::EIO as u8))
        }
    }
}

/// sysfs takes an attribute's value from a single write(2).
fn write_once(path: &Path, value: &str) -> io::Result<()> {
    let written = OpenOptions::new()
        .write(true)
        .open(path)?
        .write(value.as_bytes())?;
    if written == value.len() {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(nix::libc::EIO))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::holding::lock_file;
    use std::fs;

    /// A program that does what a shell script says. The script is written by another process: a
    /// descriptor open for writing here could be inherited by a child of another test, and then the
    /// script could not be executed.
    fn program(dir: &Path, script: &str) -> PathBuf {
        let path = dir.join("program");
        let make = "printf '#!/bin/sh\n%s\n' \"$2\" > \"$1\" && chmod +x \"$1\"";
        let made = Command::new("sh")
            .args(["-c", make, "sh"])
            .arg(&path)
            .arg(script)
            .status()
            .unwrap();
        assert!(made.success());
        path
    }

    fn writer(dir: &Path, script: &str, deadline: Duration) -> ChildWriter {
        ChildWriter {
            program: program(dir, script),
            deadline,
            patience: Duration::from_millis(300),
            proc: dir.join("proc"),
        }
    }

    #[test]
    fn the_child_gets_path_and_value_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        let script = r#"[ "$1" = __sysfs-write ] && { printf '%s|' "$3"; env | grep -c SECRET; } > "$2"; exit 0"#;
        let writer = writer(dir.path(), script, Duration::from_secs(20));
        writer.write(&target, "vfio-pci").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "vfio-pci|0\n");
    }

    #[test]
    fn an_errno_comes_back_with_path_and_value() {
        let dir = tempfile::tempdir().unwrap();
        let writer = writer(dir.path(), "exit 19", Duration::from_secs(20));
        let error = writer
            .write(Path::new("/sys/x/unbind"), "0000:01:00.0")
            .unwrap_err();
        let WriteError::Refused { source, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(source.raw_os_error(), Some(nix::libc::ENODEV));
        assert!(
            error.to_string().contains("/sys/x/unbind")
                && error.to_string().contains("0000:01:00.0")
        );
    }

    #[test]
    fn a_device_that_is_in_use_for_a_moment_is_waited_for_and_then_its_user_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (device, tries) = (dir.path().join("device"), dir.path().join("tries"));
        let script = format!(
            r#"echo >>{0}; [ $(wc -l <{0}) -gt 2 ] || exit 16"#,
            tries.display()
        );
        let patient = |script: &str| ChildWriter {
            patience: Duration::from_secs(20),
            ..writer(dir.path(), script, Duration::from_secs(20))
        };
        let unbind = device.join("driver/unbind");
        let patient_one = patient(&script);
        patient_one.write(&unbind, "0000:01:00.0").unwrap();
        let count = || fs::read_to_string(&tries).unwrap().len();
        assert_eq!(count(), 3);
        let busy = writer(dir.path(), "exit 16", Duration::from_secs(20));
        let error = busy.write(&unbind, "0000:01:00.0").unwrap_err();
        assert!(
            error.to_string().ends_with("as the device is in use"),
            "{error}"
        );
        let fd = dir.path().join("proc/77/fd");
        for dir in [&fd, &device, &dir.path().join("groups/12")] {
            fs::create_dir_all(dir).unwrap();
        }
        std::os::unix::fs::symlink(dir.path().join("groups/12"), device.join("iommu_group"))
            .unwrap();
        std::os::unix::fs::symlink("/dev/vfio/12", fd.join("5")).unwrap();
        let error = busy.write(&unbind, "0000:01:00.0").unwrap_err();
        assert!(error.to_string().contains("in use: process 77"), "{error}");
        // One that is ending is waited for; one that stays is not, whatever patience there is.
        let runs = |flags: u32| {
            let stat = format!("77 (qemu) R 1 77 77 0 -1 {flags} 0\n");
            fs::write(dir.path().join("proc/77/stat"), stat).unwrap();
        };
        runs(4);
        fs::write(&tries, "").unwrap();
        patient(&script).write(&unbind, "0000:01:00.0").unwrap();
        assert_eq!(count(), 3);
        runs(0);
        fs::write(&tries, "").unwrap();
        let script = format!("echo >>{}; exit 16", tries.display());
        let error = patient(&script).write(&unbind, "0000:01:00.0").unwrap_err();
        assert!(error.to_string().contains("in use: process 77"), "{error}");
        assert_eq!(count(), 2);
    }

    #[test]
    fn what_the_kernel_says_to_try_again_is_tried_again_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let tries = dir.path().join("tries");
        let count = || fs::read_to_string(&tries).unwrap().len();
        for errno in [libc::EAGAIN, libc::EINTR] {
            let script = format!(
                r#"echo >>{0}; [ $(wc -l <{0}) -gt 2 ] || exit {errno}"#,
                tries.display()
            );
            let patient = ChildWriter {
                patience: Duration::from_secs(20),
                ..writer(dir.path(), &script, Duration::from_secs(20))
            };
            fs::write(&tries, "").unwrap();
            patient.write(Path::new("/sys/x"), "1").unwrap();
            assert_eq!(count(), 3);
            let script = format!("echo >>{}; exit {errno}", tries.display());
            let writer = writer(dir.path(), &script, Duration::from_secs(20));
            let error = writer.write(Path::new("/sys/x"), "1").unwrap_err();
            assert!(matches!(error, WriteError::Refused { .. }), "{error}");
            assert!(count() > 4);
        }
    }

    #[test]
    fn a_child_that_hangs_is_left_alone_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let writer = writer(dir.path(), "exec sleep 600", Duration::from_millis(200));
        let started = Instant::now();
        let error = writer
            .write(Path::new("/sys/x/unbind"), "0000:01:00.0")
            .unwrap_err();
        assert!(matches!(error, WriteError::Hung { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_is_kept_stays_locked_until_the_last_who_writes_is_through() {
        let dir = tempfile::tempdir().unwrap();
        // The child's own child stands for one that the kernel holds up.
        let writer = writer(
            dir.path(),
            "exec 3<&0; sleep 1 <&3 3<&- & exit 0",
            Duration::from_secs(20),
        );
        let kept = dir.path().join("kept");
        fs::write(&kept, "").unwrap();
        let locked = || lock_file::is_locked(&File::open(&kept).unwrap()).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&kept)
            .unwrap();
        assert!(lock_file::try_lock(&file).unwrap());
        writer
            .write_keeping(Path::new("/sys/x"), "1", &file)
            .unwrap();
        drop(file);
        assert!(locked());
        let started = Instant::now();
        while locked() && started.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!locked());
    }

    #[test]
    fn a_program_that_is_not_there_or_dies_is_named() {
        let gone = ChildWriter {
            program: "/nonexistent/gantry".into(),
            ..ChildWriter::default()
        };
        let error = gone.write(Path::new("/sys/x"), "1").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/gantry"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let dies = writer(dir.path(), "kill -9 $$", Duration::from_secs(20));
        assert!(matches!(
            dies.write(Path::new("/sys/x"), "1"),
            Err(WriteError::Helper { .. })
        ));
    }

    #[test]
    fn a_value_is_written_in_place_and_a_missing_file_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("driver_override");
        assert!(write_once(&path, "vfio-pci").is_err());
        assert!(!path.exists());
        fs::write(&path, "").unwrap();
        write_once(&path, "vfio-pci").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "vfio-pci");
    }
}
