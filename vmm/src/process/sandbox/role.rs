//! The roles of threads: each has a name and a filter.

use std::fmt;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs the control loop of a VM that stands, and takes it apart. A thread comes to this role by
    /// itself: the first one, or one that was [`Role::Vm`].
    Control,
    /// Builds a VM in a process that outlives it, behind the filter of whoever made the thread.
    Vm,
    /// Speaks with clients.
    Api,
    /// Runs one vCPU and answers its exits.
    Vcpu(u8),
    /// Prepares devices that come while the guest runs, and closes those that go.
    Attach,
    /// Opens, resets or closes one device; for a host device the kernel waits for its reset.
    Device,
    /// Makes guest RAM present and maps it for the devices.
    Dma,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("control"),
            Self::Vm => f.write_str("vm"),
            Self::Api => f.write_str("api"),
            Self::Vcpu(index) => write!(f, "vcpu{index}"),
            Self::Attach => f.write_str("attach"),
            Self::Device => f.write_str("device"),
            Self::Dma => f.write_str("dma"),
        }
    }
}
