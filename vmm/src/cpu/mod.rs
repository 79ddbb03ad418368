//! vCPU state: CPUID, the kernel's entry, and the return to power-on.

mod cpuid;
mod lapic;
mod msrs;
mod registers;
mod snapshot;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryError};

use crate::boot::Entry;
use crate::config::CpuConfig;
use crate::topology::Topology;
pub use snapshot::Snapshot;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// KVM refused.
    #[error("vCPU {vcpu}: {call} failed")]
    Kvm {
        /// The vCPU.
        vcpu: u32,
        /// The ioctl.
        call: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// There are more CPUID leaves than KVM takes.
    #[error("vCPU {vcpu}: its {leaves} CPUID leaves are more than KVM takes")]
    CpuidLeaves {
        /// The vCPU.
        vcpu: u32,
        /// Number of leaves.
        leaves: usize,
    },
    /// Guest memory could not be written.
    #[error("cannot write the page tables of the boot vCPU")]
    Tables(#[source] GuestMemoryError),
}

/// What the host's KVM gives every vCPU of a VM.
#[derive(Debug, Clone)]
pub struct Features {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// MSRs to save for a reboot.
    msrs: Vec<u32>,
    xcrs: bool,
    nested: bool,
}

impl Features {
    /// Asks the host for what a guest is offered.
    ///
    /// # Errors
    /// KVM refused.
    pub fn of(kvm: &Kvm, offer: CpuConfig) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self {
            cpuid: cpuid::common(supported.as_slice(), tsc_deadline, offer),
            msrs: msrs::saved(kvm.get_msr_index_list()?.as_slice(), offer.nested),
            xcrs: kvm.check_extension(Cap::Xcrs),
            nested: offer.nested && kvm.check_extension(Cap::NestedState),
        })
    }

    /// Whether the guest can run VMs itself.
    pub fn has_nested(&self) -> bool {
        cpuid::offers_nested(&self.cpuid)
    }

    /// Bits of a guest-physical address.
    pub fn physical_bits(&self) -> u8 {
        cpuid::physical_bits(&self.cpuid)
    }
}

/// Sets up a new vCPU, number `id` of those of the `topology`, in its state at power-on. All but the first wait for
/// the guest to start them, by KVM's default.
///
/// # Errors
/// KVM refused a part of the state.
pub fn setup(
    vcpu: &VcpuFd,
    id: u32,
    topology: &Topology,
    features: &Features,
) -> Result<(), CpuError> {
    let leaves = cpuid::of_processor(&features.cpuid, id, topology);
    let cpuid = CpuId::from_entries(&leaves).map_err(|_| CpuError::CpuidLeaves {
        vcpu: id,
        leaves: leaves.len(),
    })?;
    call(id, "KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid))?;
    call(id, "KVM_SET_MSRS", msrs::set_up(vcpu))?;
    let mut pins = call(id, "KVM_GET_LAPIC", vcpu.get_lapic())?;
    lapic::set_pins(&mut pins);
    call(id, "KVM_SET_LAPIC", vcpu.set_lapic(&pins))
}

/// Sets the boot vCPU, in its state at power-on, to the kernel's entry.
///
/// # Errors
/// KVM refused, or guest memory is not there.
pub fn boot_state<M: GuestMemoryBackend>(
    vcpu: &VcpuFd,
    entry: &Entry,
    memory: &M,
) -> Result<(), CpuError> {
    let mut sregs = call(0, "KVM_GET_SREGS", vcpu.get_sregs())?;
    let regs = match *entry {
        Entry::Pvh { entry, start_info } => registers::pvh(&mut sregs, entry, start_info),
        Entry::Linux64 { entry, boot_params } => {
            registers::write_tables(memory).map_err(CpuError::Tables)?;
            registers::linux64(&mut sregs, entry, boot_params)
        }
    };
    call(0, "KVM_SET_SREGS", vcpu.set_sregs(&sregs))?;
    call(0, "KVM_SET_REGS", vcpu.set_regs(&regs))
}

fn call<T>(
    vcpu: u32,
    call: &'static str,
    result: Result<T, kvm_ioctls::Error>,
) -> Result<T, CpuError> {
    result.map_err(|source| CpuError::Kvm { vcpu, call, source })
}
