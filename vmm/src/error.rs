//! Why a VM could not be built or run.

use crate::boot::BootError;
use crate::boot::acpi::AcpiError;
use crate::cpu::CpuError;
use crate::disks::DiskError;
use crate::host::files::FileError;
use crate::host::preflight::PreflightError;
use crate::kvm::KvmError;
use crate::layout::LayoutError;
use crate::machine::MachineError;
use crate::passthrough::DeviceError;
use crate::process::error::HostError;
use crate::process::signals::Interrupted;
use crate::vcpus::StuckVcpus;
use crate::virtio::OpenError;

/// Every way in which starting and running a VM fails. Each text says what failed; the chain of
/// sources says why.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host lacks something.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// No VM starts for now.
    #[error(
        "this host is in maintenance and starts no VM: {0}\ntry again later; `gantry maintenance off` ends the maintenance"
    )]
    Maintenance(String),
    /// Whether the host is in maintenance cannot be told.
    #[error(transparent)]
    MaintenanceUnknown(#[from] gantry_resources::holding::MaintenanceError),
    /// The guest is to run VMs itself, and the host's KVM does not let it.
    #[error(
        "`cpus.nested` is true, but KVM on this host has nested virtualisation switched off\nreload its module \
         (`modprobe -r kvm_intel && modprobe kvm_intel nested=1`; on AMD kvm_amd), or remove the key"
    )]
    NoNested,
    /// Two devices would have one name.
    #[error(
        "two devices of the VM would be called \"{0}\": a further function of a card is called by the card's id \
         with a number behind it\ngive one of them another `id`"
    )]
    DuplicateId(String),
    /// A device of the host is not to be had, or cannot be given to the guest.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A disk cannot be given to the guest.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Another virtual device cannot be given to the guest.
    #[error(transparent)]
    Virtio(#[from] OpenError),
    /// KVM is not there or refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU could not be set up.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// RAM and devices do not fit into the guest's address space.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The machine cannot be built.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A file named in the VM's file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The ACPI tables could not be written.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A vCPU is kept by the kernel.
    #[error(transparent)]
    Stuck(#[from] StuckVcpus),
    /// A signal asked gantry to end while it built the VM. `Vmm::run` makes an outcome of it.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// The host's kernel refused something else.
    #[error(transparent)]
    Host(#[from] HostError),
}
