//! The sandbox: the system calls and files that each thread may use, and what happens at a violation.

mod files;
mod filters;
mod process;
mod role;
mod trap;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use gantry_resources::base::HostPaths;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

pub use files::{Output, VmFiles};
pub use role::Role;
pub use trap::{KICK, install as install_traps};

/// What happens to a system call that no filter names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SeccompMode {
    /// It is reported by name and ends the process.
    #[default]
    On,
    /// The kernel logs it and lets it through.
    Log,
    /// No filters at all.
    Off,
}

/// The compiled filters of every role, and of the process.
pub struct Sandbox {
    mode: SeccompMode,
    process: [Filter; 2],
    control: Filter,
    vcpu: Filter,
    device: Filter,
    dma: Filter,
    disk: Filter,
    virtio: Filter,
    api: Filter,
    attach: Filter,
}

/// One filter.
#[derive(Clone)]
struct Filter(Option<Arc<BpfProgram>>);

impl Sandbox {
    /// Compiles the filters.
    ///
    /// # Errors
    /// A filter's table is invalid.
    pub fn new(mode: SeccompMode) -> io::Result<Self> {
        Ok(Self {
            mode,
            process: process_filters(mode)?,
            control: Filter::compile(mode, filters::control())?,
            vcpu: Filter::compile(mode, filters::vcpu())?,
            device: Filter::compile(mode, filters::device())?,
            dma: Filter::compile(mode, filters::dma())?,
            disk: Filter::compile(mode, filters::disk())?,
            virtio: Filter::compile(mode, filters::virtio())?,
            api: Filter::compile(mode, filters::api())?,
            attach: Filter::compile(mode, filters::attach())?,
        })
    }

    /// Denies the calling thread, and every thread and helper that it starts from now on, the calls that
    /// nothing in gantry makes. A role's filter comes on top.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn confine_process(&self) -> io::Result<()> {
        self.process.iter().try_for_each(Filter::enter)
    }

    /// Denies the calling thread, and every thread and helper that it starts from now on, all files but those
    /// that building a VM needs. Does nothing if filters are off or only log.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn confine_files(&self, files: &VmFiles, host: &HostPaths) -> io::Result<()> {
        match self.mode {
            SeccompMode::On => files::confine(files, host),
            SeccompMode::Log | SeccompMode::Off => Ok(()),
        }
    }

    /// The confinement of a role, which its thread enters before its work.
    pub fn confinement(&self, role: Role) -> Confinement {
        let filter = match role {
            Role::Control => self.control.clone(),
            Role::Vcpu(_) => self.vcpu.clone(),
            Role::Device => self.device.clone(),
            Role::Dma => self.dma.clone(),
            Role::Disk => self.disk.clone(),
            Role::Virtio => self.virtio.clone(),
            Role::Api => self.api.clone(),
            Role::Attach => self.attach.clone(),
            Role::Vm => Filter(None),
        };
        Confinement {
            files: role == Role::Vm || self.mode != SeccompMode::On,
            filter,
        }
    }
}

/// Confines a helper that removes one file of `folder`, under the lock of the file `lock`.
///
/// # Errors
/// The kernel refused.
pub fn confine_removal(folder: &Path, lock: &Path) -> io::Result<()> {
    files::confine_removal(folder, lock)?;
    process_filters(SeccompMode::On)?
        .iter()
        .try_for_each(Filter::enter)
}

/// Refuses what nothing in gantry does.
fn process_filters(mode: SeccompMode) -> io::Result<[Filter; 2]> {
    Ok([Filter::known(mode), Filter::but(mode, process::never())?])
}

/// What keeps a thread to its role.
pub struct Confinement {
    /// Whether it may reach files.
    files: bool,
    filter: Filter,
}

impl Confinement {
    /// Confines the calling thread, and every thread that it starts from now on, for the rest of its life.
    ///
    /// # Errors
    /// The kernel refused: the thread is not confined and must not go on.
    pub fn enter(&self) -> io::Result<()> {
        if !self.files {
            files::confine_to_nothing()?;
        }
        self.filter.enter()
    }
}

impl Filter {
    /// A filter that allows what the rules name.
    fn compile(mode: SeccompMode, rules: filters::Rules) -> io::Result<Self> {
        let Some(refused) = Self::refusal(mode) else {
            return Ok(Self(None));
        };
        Self::program(rules, refused, SeccompAction::Allow)
    }

    /// A filter that answers ENOSYS to calls that were not reviewed: the C library tries some, and works
    /// without them.
    fn known(mode: SeccompMode) -> Self {
        let program = Self::refusal(mode).map(|_| Arc::new(process::known_calls()));
        Self(program)
    }

    /// A filter that allows all but what the rules name.
    fn but(mode: SeccompMode, rules: filters::Rules) -> io::Result<Self> {
        let Some(refused) = Self::refusal(mode) else {
            return Ok(Self(None));
        };
        Self::program(rules, SeccompAction::Allow, refused)
    }

    /// What happens to a call that is not allowed; `None` without filters.
    fn refusal(mode: SeccompMode) -> Option<SeccompAction> {
        match mode {
            SeccompMode::On => Some(SeccompAction::Trap),
            SeccompMode::Log => Some(SeccompAction::Log),
            SeccompMode::Off => None,
        }
    }

    fn program(
        rules: filters::Rules,
        others: SeccompAction,
        named: SeccompAction,
    ) -> io::Result<Self> {
        let rules: BTreeMap<_, _> = rules.into_iter().collect();
        let filter = SeccompFilter::new(rules, others, named, TargetArch::x86_64)
            .map_err(io::Error::other)?;
        let program = BpfProgram::try_from(filter).map_err(io::Error::other)?;
        Ok(Self(Some(Arc::new(program))))
    }

    fn enter(&self) -> io::Result<()> {
        match &self.0 {
            Some(program) => seccompiler::apply_filter(program).map_err(io::Error::other),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::thread;

    use gantry_devices::bounded::BoundedFile;
    use gantry_devices::virtio::block::Disk;

    use super::*;

    const MOST: u64 = 4 << 10;

    /// Fills a log until its older half goes.
    fn fill(log: &mut BoundedFile) {
        for number in 0..200 {
            writeln!(log, "line {number} of a log that is too long").unwrap();
        }
    }

    #[test]
    fn a_thread_of_any_role_halves_a_full_log() {
        let sandbox = Sandbox::new(SeccompMode::On).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        for role in [
            Role::Control,
            Role::Vcpu(0),
            Role::Device,
            Role::Dma,
            Role::Disk,
            Role::Virtio,
            Role::Api,
            Role::Attach,
        ] {
            let append = File::options().append(true).create(true).open(&path);
            let append = append.unwrap();
            append.set_len(0).unwrap();
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mut log = BoundedFile::shared(file, append, MOST);
            let filter = sandbox.confinement(role).filter;
            // A call that the filter does not allow ends the test's process.
            let logs = thread::spawn(move || {
                filter.enter().unwrap();
                fill(&mut log);
            });
            logs.join().unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.len() as u64 <= MOST, "{role}: {}", text.len());
            assert!(text.starts_with("[older output was removed"), "{role}");
            assert!(text.contains("line 199 of"), "{role}");
        }
    }

    #[test]
    fn a_thread_of_a_disk_makes_it_larger() {
        let sandbox = Sandbox::new(SeccompMode::On).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let disk = Disk::new(file.try_clone().unwrap(), 4096, 512, false);
        let filter = sandbox.confinement(Role::Disk).filter;
        let resizes = thread::spawn(move || {
            filter.enter().unwrap();
            disk.resize(4 << 20)
        });
        resizes.join().unwrap().unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4 << 20);
    }
}
