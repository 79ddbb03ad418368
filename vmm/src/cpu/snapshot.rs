//! A vCPU's state at power-on, which a reboot of the guest restores.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_nested_state__bindgen_ty_1, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Error, VcpuFd};

use super::{CpuError, Features, call, msrs};

/// How many accesses an instruction may need to complete.
const COMPLETIONS: usize = 64;

/// The state of a vCPU at power-on.
pub struct Snapshot {
    id: u32,
    nested: Option<NestedState>,
    sregs: kvm_sregs,
    xcrs: Option<kvm_xcrs>,
    fpu: kvm_fpu,
    regs: kvm_regs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

impl Snapshot {
    /// Saves the state of vCPU `id`, right after [`super::setup`].
    ///
    /// # Errors
    /// KVM refused a part of the state.
    pub fn take(vcpu: &VcpuFd, id: u32, features: &Features) -> Result<Self, CpuError> {
        Ok(Self {
            id,
            nested: features
                .nested
                .then(|| call(id, "KVM_GET_NESTED_STATE", NestedState::take(vcpu)))
                .transpose()?,
            sregs: call(id, "KVM_GET_SREGS", vcpu.get_sregs())?,
            xcrs: features
                .xcrs
                .then(|| call(id, "KVM_GET_XCRS", vcpu.get_xcrs()))
                .transpose()?,
            fpu: call(id, "KVM_GET_FPU", vcpu.get_fpu())?,
            regs: call(id, "KVM_GET_REGS", vcpu.get_regs())?,
            debug: call(id, "KVM_GET_DEBUGREGS", vcpu.get_debug_regs())?,
            lapic: call(id, "KVM_GET_LAPIC", vcpu.get_lapic())?,
            msrs: call(id, "KVM_GET_MSRS", msrs::read(vcpu, &features.msrs))?,
            events: call(id, "KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?,
            mp_state: call(id, "KVM_GET_MP_STATE", vcpu.get_mp_state())?,
        })
    }

    /// Restores the vCPU while none runs. Calls `KVM_RUN` to complete the instruction that the vCPU may be in,
    /// without running the guest.
    ///
    /// KVM requires the order: leave a nested guest first; set the mode of the local APIC (special registers)
    /// before its registers, and these before the timer's deadline (an MSR); the run state comes last.
    ///
    /// # Errors
    /// KVM refused a part of the state.
    pub fn restore(&self, vcpu: &mut VcpuFd) -> Result<(), CpuError> {
        let id = self.id;
        complete(vcpu).map_err(|source| CpuError::Kvm {
            vcpu: id,
            call: "KVM_RUN",
            source,
        })?;
        if let Some(nested) = &self.nested {
            call(
                id,
                "KVM_SET_NESTED_STATE",
                vcpu.set_nested_state(&nested.buffer()),
            )?;
        }
        call(id, "KVM_SET_SREGS", vcpu.set_sregs(&self.sregs))?;
        if let Some(xcrs) = &self.xcrs {
            call(id, "KVM_SET_XCRS", vcpu.set_xcrs(xcrs))?;
        }
        call(id, "KVM_SET_FPU", vcpu.set_fpu(&self.fpu))?;
        call(id, "KVM_SET_REGS", vcpu.set_regs(&self.regs))?;
        call(id, "KVM_SET_DEBUGREGS", vcpu.set_debug_regs(&self.debug))?;
        call(id, "KVM_SET_LAPIC", vcpu.set_lapic(&self.lapic))?;
        let refused = call(id, "KVM_SET_MSRS", msrs::write(vcpu, &self.msrs))?;
        if !refused.is_empty() {
            // Those that are read-only still have their value.
            tracing::debug!(vcpu = id, "MSRs not written at reboot: {refused:x?}");
        }
        call(id, "KVM_SET_MSRS", msrs::synchronize_tsc(vcpu))?;
        call(
            id,
            "KVM_SET_VCPU_EVENTS",
            vcpu.set_vcpu_events(&self.events),
        )?;
        call(id, "KVM_SET_MP_STATE", vcpu.set_mp_state(self.mp_state))
    }
}

/// The nested state of a vCPU without a nested guest: a header, without the 8 KiB for a nested guest in KVM's
/// structure.
#[derive(Clone, Copy)]
struct NestedState {
    flags: u16,
    format: u16,
    size: u32,
    header: kvm_nested_state__bindgen_ty_1,
}

impl NestedState {
    fn take(vcpu: &VcpuFd) -> Result<Self, Error> {
        let mut state = KvmNestedStateBuffer::empty();
        vcpu.nested_state(&mut state)?;
        let KvmNestedStateBuffer {
            flags,
            format,
            size,
            hdr: header,
            ..
        } = state;
        Ok(Self {
            flags,
            format,
            size,
            header,
        })
    }

    fn buffer(&self) -> KvmNestedStateBuffer {
        let mut state = KvmNestedStateBuffer::empty();
        (state.flags, state.format, state.size) = (self.flags, self.format, self.size);
        state.hdr = self.header;
        state
    }
}

/// Lets KVM complete an access that it passed to user space. Otherwise it would do so at the next run, on top
/// of the new state.
fn complete(vcpu: &mut VcpuFd) -> Result<(), Error> {
    vcpu.set_kvm_immediate_exit(1);
    let mut result = Ok(());
    for _ in 0..COMPLETIONS {
        match vcpu.run() {
            Ok(_) => {}
            Err(interrupted) if matches!(interrupted.errno(), libc::EINTR | libc::EAGAIN) => break,
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    vcpu.set_kvm_immediate_exit(0);
    result
}
