//! The sandbox: which system calls each thread may make, and what happens when it makes another.

mod filters;
mod trap;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::threads::Role;

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
    control: Filter,
    vcpu: Filter,
    device: Filter,
    dma: Filter,
    api: Filter,
    attach: Filter,
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
            control: Filter::compile(mode, filters::control())?,
            vcpu: Filter::compile(mode, filters::vcpu())?,
            device: Filter::compile(mode, filters::device())?,
            dma: Filter::compile(mode, filters::dma())?,
            api: Filter::compile(mode, filters::api())?,
            attach: Filter::compile(mode, filters::attach())?,
        })
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
            Role::Vm => Filter(None),
        }
    }
}

impl Filter {
    fn compile(mode: SeccompMode, rules: filters::Rules) -> io::Result<Self> {
        let refused = match mode {
            SeccompMode::On => SeccompAction::Trap,
            SeccompMode::Log => SeccompAction::Log,
            SeccompMode::Off => return Ok(Self(None)),
        };
        let rules: BTreeMap<_, _> = rules.into_iter().collect();
        let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)
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
