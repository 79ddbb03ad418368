//! The sandbox: which system calls each thread may make, and what happens when it makes another.

mod files;
mod filters;
mod trap;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use gantry_resources::HostPaths;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::threads::Role;

use crate::config::VmConfig;
pub use trap::install as install_traps;

/// What becomes of a system call that no filter names.
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

/// The compiled filters of every role.
pub struct Sandbox {
    mode: SeccompMode,
    control: Filter,
    vcpu: Filter,
    device: Filter,
    dma: Filter,
    api: Filter,
    attach: Filter,
    keeper: Filter,
}

/// The filter of one role.
#[derive(Clone)]
pub struct Filter(Option<Arc<BpfProgram>>);

impl Sandbox {
    /// Compiles the filters.
    ///
    /// # Errors
    /// A filter has no valid form, which is a mistake in its table.
    pub fn new(mode: SeccompMode) -> io::Result<Self> {
        Ok(Self {
            mode,
            control: Filter::compile(mode, filters::control())?,
            vcpu: Filter::compile(mode, filters::vcpu())?,
            device: Filter::compile(mode, filters::device())?,
            dma: Filter::compile(mode, filters::dma())?,
            api: Filter::compile(mode, filters::api())?,
            attach: Filter::compile(mode, filters::attach())?,
            keeper: Filter::but(mode, filters::NEVER)?,
        })
    }

    /// Keeps the calling thread, and what it makes from now on, from all files but those that a VM
    /// needs, and from removing files but where its `socket` is. Without filters, or where they only log, it may open what it likes.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn confine_files(
        &self,
        config: &VmConfig,
        host: &HostPaths,
        socket: Option<&Path>,
    ) -> io::Result<()> {
        match self.mode {
            SeccompMode::On => files::confine(config, host, socket),
            SeccompMode::Log | SeccompMode::Off => Ok(()),
        }
    }

    /// Keeps the calling thread from all files. As above.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn confine_to_nothing(&self) -> io::Result<()> {
        match self.mode {
            SeccompMode::On => files::confine_to_nothing(),
            SeccompMode::Log | SeccompMode::Off => Ok(()),
        }
    }

    /// The filter of a role.
    pub fn filter(&self, role: Role) -> Filter {
        match role {
            Role::Control => self.control.clone(),
            Role::Vcpu(_) => self.vcpu.clone(),
            Role::Device => self.device.clone(),
            Role::Dma => self.dma.clone(),
            Role::Api => self.api.clone(),
            Role::Attach => self.attach.clone(),
            Role::Keeper => self.keeper.clone(),
            Role::Vm => Filter(None),
        }
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

    /// A filter that allows all but these calls.
    fn but(mode: SeccompMode, calls: &[libc::c_long]) -> io::Result<Self> {
        let Some(refused) = Self::refusal(mode) else {
            return Ok(Self(None));
        };
        let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
        Self::program(rules, SeccompAction::Allow, refused)
    }

    /// What becomes of a call that is not allowed; `None` without filters.
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

    /// Confines the calling thread, for the rest of its life.
    ///
    /// # Errors
    /// The kernel refused the filter: the thread is not confined and must not go on.
    pub fn enter(&self) -> io::Result<()> {
        match &self.0 {
            Some(program) => seccompiler::apply_filter(program).map_err(io::Error::other),
            None => Ok(()),
        }
    }
}
