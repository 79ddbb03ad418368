//! KVM: the virtual machine, its interrupt controller, memory slots, interrupt routes and vCPUs.

mod doorbells;
mod routes;
mod slots;
mod vcpu;
mod vfio;

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};

pub use doorbells::Doorbell;
pub use routes::GsiRoutes;
pub use slots::{MemorySlots, SlotGuard};
pub use vcpu::{Exit, ExitHandler, PostedWrites, Vcpu};
pub use vfio::VfioObserver;

use crate::layout;

/// Where the kernel may keep its pages for real mode.
const IDENTITY_MAP: u64 = layout::KVM_PAGES;
const TSS: usize = layout::KVM_PAGES as usize + 0x1000;

/// Why KVM could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` is not there.
    #[error(
        "/dev/kvm does not exist: this host offers no virtualisation\n\
         load it with `modprobe kvm_intel` or `modprobe kvm_amd`; if that fails, switch \
         virtualisation (VT-x, SVM) on in the host's BIOS"
    )]
    Missing,
    /// `/dev/kvm` may not be opened.
    #[error(
        "/dev/kvm may not be opened by this user\n\
         run gantry as root, or add the user to the group that owns it: `ls -l /dev/kvm` shows \
         which, often `kvm`"
    )]
    NotPermitted,
    /// The kernel's KVM interface is not the stable one.
    #[error("this kernel's KVM speaks API version {0}, gantry needs {KVM_API_VERSION}")]
    Version(i32),
    /// The kernel lacks something gantry stands on.
    #[error("this kernel's KVM lacks {0:?}; gantry needs Linux 5.10 or later")]
    Lacks(Cap),
    /// The kernel's KVM leaves interrupt controllers to user space.
    #[error(
        "this kernel's KVM has no I/O APIC (KVM_CREATE_IRQCHIP): it was built without \
         CONFIG_KVM_IOAPIC\n\
         boot a kernel that has it, as those of the distributions do"
    )]
    NoIoApic,
    /// A KVM call failed.
    #[error("KVM: {call}")]
    Call {
        /// The ioctl, by its name in the KVM API documentation.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl KvmError {
    /// Makes an error of the failed ioctl `call`.
    pub fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |errno| Self::Call {
            call,
            source: errno.into(),
        }
    }
}

/// The interrupt controllers' state at a moment.
pub struct IrqchipState(Vec<kvm_irqchip>);

/// One KVM virtual machine with its whole interrupt controller in the kernel.
pub struct KvmVm {
    kvm: Kvm,
    vm: Arc<VmFd>,
}

impl KvmVm {
    /// Makes a virtual machine without memory or vCPUs.
    ///
    /// # Errors
    /// `/dev/kvm` is missing, not permitted or too old, or the kernel refused.
    pub fn new() -> Result<Self, KvmError> {
        let kvm = open()?;
        let vm = kvm.create_vm().map_err(KvmError::call("KVM_CREATE_VM"))?;
        vm.set_identity_map_address(IDENTITY_MAP)
            .map_err(KvmError::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(TSS)
            .map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(no_irqchip)?;
        Ok(Self {
            kvm,
            vm: Arc::new(vm),
        })
    }

    /// The virtual machine itself.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Has KVM post writes to the PCI configuration address port: one exit for each configuration access
    /// instead of two.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn post_config_address(&self) -> Result<PostedWrites, KvmError> {
        let ports = layout::PCI_CONFIG_PORTS;
        let address = IoEventAddress::Pio(u64::from(*ports.start()));
        self.vm
            .register_coalesced_mmio(address, size_of::<u32>() as u32)
            .map_err(KvmError::call("KVM_REGISTER_COALESCED_MMIO"))?;
        Ok(PostedWrites::due_at(ports))
    }

    /// The state of the in-kernel I/O APIC and PICs.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn save_irqchip(&self) -> Result<IrqchipState, KvmError> {
        let mut chips = Vec::new();
        for chip_id in [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.vm
                .get_irqchip(&mut chip)
                .map_err(KvmError::call("KVM_GET_IRQCHIP"))?;
            chips.push(chip);
        }
        Ok(IrqchipState(chips))
    }

    /// Brings the interrupt controllers back to `state`.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn restore_irqchip(&self, state: &IrqchipState) -> Result<(), KvmError> {
        for chip in &state.0 {
            self.vm
                .set_irqchip(chip)
                .map_err(KvmError::call("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// The KVM system device, for questions about capabilities and MSRs.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

/// A kernel without `CONFIG_KVM_IOAPIC` does not know the call.
fn no_irqchip(errno: kvm_ioctls::Error) -> KvmError {
    match errno.errno() {
        libc::ENOTTY => KvmError::NoIoApic,
        _ => KvmError::call("KVM_CREATE_IRQCHIP")(errno),
    }
}

fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|errno| match errno.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::NotPermitted,
        _ => KvmError::call("open /dev/kvm")(errno),
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::Version(version));
    }
    let needed = [
        Cap::Irqchip,
        Cap::Irqfd,
        Cap::IrqRouting,
        Cap::ImmediateExit,
        Cap::UserMemory,
        Cap::TscDeadlineTimer,
        Cap::CoalescedPio,
    ];
    match needed.into_iter().find(|cap| !kvm.check_extension(*cap)) {
        Some(cap) => Err(KvmError::Lacks(cap)),
        None => Ok(kvm),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_an_io_apic_is_told_by_its_option() {
        let error = no_irqchip(kvm_ioctls::Error::new(libc::ENOTTY)).to_string();
        assert!(error.contains("CONFIG_KVM_IOAPIC"), "{error}");
        let error = no_irqchip(kvm_ioctls::Error::new(libc::ENOMEM)).to_string();
        assert!(error.contains("KVM_CREATE_IRQCHIP"), "{error}");
    }
}
