//! One vCPU: runs it until an exit that user space must answer.
#![allow(unsafe_code)] // the shared kvm_run page is a union, and its data outlive the borrow.

use std::io;
use std::ops::RangeInclusive;
use std::slice;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_coalesced_mmio;
use kvm_ioctls::{VcpuExit, VcpuFd};

/// Why a vCPU came back to user space.
pub enum Exit {
    /// An access was answered, or a signal came: run on.
    Continue,
    /// The guest caused a triple fault.
    TripleFault,
    /// The processor or KVM cannot go on.
    Broken(String),
}

/// Answers the accesses of a vCPU.
pub trait ExitHandler {
    /// The guest reads an I/O port.
    fn port_in(&self, port: u16, data: &mut [u8]);
    /// The guest writes an I/O port.
    fn port_out(&self, port: u16, data: &[u8]);
    /// The guest reads memory that is not RAM.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// The guest writes memory that is not RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Port writes that KVM keeps in a ring instead of causing an exit (`KVM_CAP_COALESCED_PIO`). They must be
/// handled before the next access to these ports.
#[derive(Clone)]
pub struct PostedWrites {
    ports: RangeInclusive<u16>,
    // All vCPUs share the ring. Held while entries are taken out of it.
    ring: Arc<Mutex<()>>,
}

impl PostedWrites {
    /// What is written to some of these ports has been posted.
    pub(super) fn due_at(ports: RangeInclusive<u16>) -> Self {
        let ring = Arc::default();
        Self { ports, ring }
    }
}

/// One vCPU.
pub struct Vcpu {
    fd: VcpuFd,
    posted: PostedWrites,
}

impl Vcpu {
    /// Takes over a vCPU that KVM made.
    ///
    /// # Errors
    /// The ring of posted writes cannot be mapped.
    pub fn new(mut fd: VcpuFd, posted: PostedWrites) -> io::Result<Self> {
        fd.map_coalesced_mmio_ring()?;
        Ok(Self { fd, posted })
    }

    /// The vCPU's file descriptor, to set its state while it does not run.
    pub fn fd(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Runs the guest until one exit, and has `access` answer it.
    ///
    /// # Errors
    /// `KVM_RUN` failed for a reason other than a signal.
    pub fn run(&mut self, access: &impl ExitHandler) -> io::Result<Exit> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Exit::Continue);
            }
            Err(errno) => return Err(errno.into()),
        };
        match exit {
            VcpuExit::IoOut(port, data) => {
                let (start, len) = (data.as_ptr(), data.len());
                // SAFETY: the data lie in the vCPU's mapped run page, which only KVM_RUN changes,
                // and `self` is borrowed mutably until this function returns.
                let data = unsafe { slice::from_raw_parts(start, len) };
                self.catch_up(port, access)?;
                let width = self.port_width();
                data.chunks(width)
                    .for_each(|item| access.port_out(port, item));
            }
            VcpuExit::IoIn(port, data) => {
                let (start, len) = (data.as_mut_ptr(), data.len());
                // SAFETY: as above; nothing else refers to the data area.
                let data = unsafe { slice::from_raw_parts_mut(start, len) };
                self.catch_up(port, access)?;
                let width = self.port_width();
                data.chunks_mut(width)
                    .for_each(|item| access.port_in(port, item));
            }
            VcpuExit::MmioRead(address, data) => access.mmio_read(address, data),
            VcpuExit::MmioWrite(address, data) => access.mmio_write(address, data),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
            VcpuExit::Shutdown => return Ok(Exit::TripleFault),
            VcpuExit::InternalError => return Ok(Exit::Broken(self.internal_error())),
            other => return Ok(Exit::Broken(format!("{other:?}"))),
        }
        Ok(Exit::Continue)
    }

    /// Passes the posted writes to `access`, if `port` is one that posts them or depends on them.
    fn catch_up(&mut self, port: u16, access: &impl ExitHandler) -> io::Result<()> {
        if !self.posted.ports.contains(&port) {
            return Ok(());
        }
        let ring = self.posted.ring.lock();
        let _ring = ring.unwrap_or_else(PoisonError::into_inner);
        while let Some(write) = self.fd.coalesced_mmio_read()? {
            let kvm_coalesced_mmio {
                phys_addr,
                len,
                data,
                ..
            } = write;
            if let (Ok(port), Some(data)) = (u16::try_from(phys_addr), data.get(..len as usize)) {
                access.port_out(port, data);
            }
        }
        Ok(())
    }

    /// What KVM cannot do (`KVM_EXIT_INTERNAL_ERROR`), with the words that it adds for its developers.
    fn internal_error(&mut self) -> String {
        // SAFETY: `internal` is the union's live member after such an exit.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let what = match internal.suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
                "it cannot emulate the guest's instruction"
            }
            kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions came at once",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => {
                "the delivery of an event was interrupted by an access that it cannot finish"
            }
            kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                "the processor left the guest for a reason that it does not know"
            }
            _ => "it does not say what",
        };
        let words = internal.data.iter().take(internal.ndata as usize);
        let words: Vec<String> = words.map(|word| format!("{word:#x}")).collect();
        let (number, words) = (internal.suberror, words.join(" "));
        format!("KVM has an internal error {number}: {what} [{words}]")
    }

    /// Width in bytes of one item of a port access: string instructions bring several at once.
    fn port_width(&mut self) -> usize {
        // SAFETY: `io` is the union's live member after an exit by a port access.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        usize::from(io.size.max(1))
    }
}
