//! Why a VM could not be built or run.

use std::io;

use gantry_resources::base::DeviceName;

/// Every way in which starting and running a VM fails. Each text says what failed; the chain of
/// sources says why.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host lacks something.
    #[error(transparent)]
    Preflight(#[from] crate::preflight::PreflightError),
    /// No VM starts for now.
    #[error(
        "this host is in maintenance and starts no VM: {0}\ntry again later; `gantry maintenance off` ends the maintenance"
    )]
    Maintenance(String),
    /// Whether the host is in maintenance cannot be told.
    #[error(transparent)]
    MaintenanceUnknown(#[from] gantry_resources::holding::MaintenanceError),
    /// The devices could not be leased.
    #[error(transparent)]
    Allocate(Box<gantry_resources::allocation::AllocateError>),
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
    /// A leased device is in no IOMMU group.
    #[error(
        "{device} is in no IOMMU group: without an IOMMU a guest could write to all of the host's \
         memory\nswitch the IOMMU on in the BIOS and with `intel_iommu=on` or `amd_iommu=on` on the \
         kernel's command line"
    )]
    NoIommuGroup {
        /// The device.
        device: DeviceName,
    },
    /// The helper that opens devices does not, or cannot be reached.
    #[error(transparent)]
    Opener(#[from] gantry_resources::opener::OpenerError),
    /// A device that comes later reserves addresses that the guest uses.
    #[error(
        "{device} reserves {start:#x}-{last:#x}, where this VM has RAM or PCI windows\n\
         name its group in `hotplug.groups` of the VM's file, and start the VM again: RAM is then laid \
         out around what the device reserves"
    )]
    Clash {
        /// The device.
        device: DeviceName,
        /// First address.
        start: u64,
        /// Last address.
        last: u64,
    },
    /// The IOMMU of a device that comes later does not reach all of RAM.
    #[error(
        "the host's IOMMU cannot map the guest's memory at {start:#x}-{last:#x} for the new device\n\
         start the VM with the device, or with less memory"
    )]
    Unmappable {
        /// First address.
        start: u64,
        /// Last address.
        last: u64,
    },
    /// The IOMMU's forbidden ranges are not known.
    #[error(transparent)]
    Reserved(#[from] gantry_resources::facts::ReservedError),
    /// VFIO refused something.
    #[error(transparent)]
    Vfio(#[from] gantry_vfio::Error),
    /// KVM is not there or refused something.
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
    /// A vCPU could not be set up.
    #[error(transparent)]
    Cpu(#[from] crate::cpu::CpuError),
    /// RAM and devices do not fit into the guest's address space.
    #[error(transparent)]
    Layout(#[from] crate::layout::LayoutError),
    /// Something does not fit where the plan has it.
    #[error("cannot place {what} in the guest's address space")]
    Place {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: gantry_devices::pci::BarSpaceError,
    },
    /// The PCI windows do not hold all BARs.
    #[error(transparent)]
    Firmware(#[from] gantry_devices::pci::firmware::FirmwareError),
    /// There are more devices than root ports can be made.
    #[error(transparent)]
    Slots(#[from] gantry_devices::pci::SegmentError),
    /// A file that the VM's file names cannot be used.
    #[error(transparent)]
    File(#[from] crate::vm::FileError),
    /// The kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] crate::boot::BootError),
    /// The ACPI tables could not be written.
    #[error(transparent)]
    Acpi(#[from] crate::boot::acpi::AcpiError),
    /// A vCPU is kept by the kernel.
    #[error(transparent)]
    StuckVcpus(#[from] crate::vcpus::StuckVcpus),
    /// The kernel is at a device, and does not come back from it.
    #[error(
        "{device} does not answer: a call of the host's kernel on it has not returned for {seconds} s\n\
         the device stays leased until the call returns; `dmesg` may show why"
    )]
    DeviceStuck {
        /// The device.
        device: DeviceName,
        /// For how long.
        seconds: u64,
    },
    /// A signal asked gantry to end while it built the VM. [`run`](crate::run) makes an outcome of it.
    #[error("signal {0} came before the VM was built")]
    Interrupted(i32),
    /// The host's kernel refused something else.
    #[error("cannot {what}")]
    Host {
        /// What was to be done.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl From<gantry_resources::allocation::AllocateError> for Error {
    fn from(error: gantry_resources::allocation::AllocateError) -> Self {
        Self::Allocate(Box::new(error))
    }
}

impl Error {
    /// Makes an error of a failure to do `what`.
    pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// Makes an error of a failure to place `what`.
    pub(crate) fn place<E>(what: &'static str) -> impl FnOnce(E) -> Self
    where
        gantry_devices::pci::BarSpaceError: From<E>,
    {
        move |source| Self::Place {
            what,
            source: source.into(),
        }
    }
}
