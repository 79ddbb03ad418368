//! The roles of threads: each has a name and a filter.

use std::fmt;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs the control loop of a VM, and takes it apart. No thread is started in this role: the first thread,
    /// or one in [`Role::Vm`], enters it.
    Control,
    /// Builds a VM in a process that outlives it, with the filters of the process only.
    Vm,
    /// Speaks with clients.
    Api,
    /// Runs one vCPU and answers its exits.
    Vcpu(u8),
    /// Attaches devices while the guest runs, or closes detached ones.
    Attach,
    /// Opens, resets or closes one device. The kernel waits for the device's reset meanwhile.
    Device,
    /// Makes guest RAM present and maps it for the devices.
    Dma,
    /// Serves the queues of a virtual disk, or makes the disk larger.
    Disk,
    /// Serves queues of another virtual device: commands, or requests for random numbers.
    Virtio,
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
            Self::Disk => f.write_str("disk"),
            Self::Virtio => f.write_str("virtio"),
        }
    }
}
