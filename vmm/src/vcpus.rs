//! The vCPU threads: started together, paused together, stopped together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};

use crate::host::placement::CpuAffinity;
use crate::kvm::{Exit, ExitHandler, Vcpu};
use crate::process::sandbox::{KICK, Role, Sandbox};
use crate::process::threads::{self, Task};

/// How long a kick may stay without effect before it is sent again. A signal that arrives between
/// the look at the phase and the entry into the kernel is lost.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// How long a vCPU may take to leave the kernel. It takes microseconds, unless a device that it accesses does not
/// answer.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// vCPUs that do not leave the kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("vCPU {} is stuck in the host's kernel: a device that it accesses may hang", numbers(.0))]
pub struct StuckVcpus(Vec<u8>);

fn numbers(vcpus: &[u8]) -> String {
    let texts: Vec<String> = vcpus.iter().map(u8::to_string).collect();
    texts.join(", ")
}

/// What the vCPUs are to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Run,
    Pause,
    Stop,
}

/// Why the vCPUs stopped running on their own.
#[derive(Debug)]
pub enum VcpuFault {
    /// The guest caused a triple fault.
    TripleFault,
    /// KVM or the processor cannot go on, in KVM's words.
    Broken(String),
}

/// What a vCPU thread reports to the owner of the VM.
pub trait FaultSink: Send + Sync {
    /// The vCPUs cannot go on; they are pausing.
    fn fault(&self, vcpu: u8, fault: VcpuFault);
}

/// Holds the vCPU threads back while the VM is paused, and counts those that run.
pub struct VcpuBarrier {
    state: Mutex<State>,
    changed: Condvar,
    // Mirrors `state.phase != Run`, so that a running vCPU looks at no lock between two exits.
    halt: AtomicBool,
}

struct State {
    phase: Phase,
    /// The guest has asked for its end or its reset, or cannot go on. It stays paused until
    /// [`VcpuBarrier::rearm`].
    halted: bool,
    /// The vCPUs that may run, with their threads.
    running: Vec<(u8, Pthread)>,
}

impl VcpuBarrier {
    /// Closed: vCPUs wait until [`VcpuBarrier::open`].
    pub fn new() -> Arc<Self> {
        let state = State {
            phase: Phase::Pause,
            halted: false,
            running: Vec::new(),
        };
        let halt = AtomicBool::new(true);
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            halt,
        })
    }

    /// Lets the vCPUs run, unless one of them has [halted](Self::halt) the machine and the control thread has
    /// not handled that yet.
    pub fn open(&self) {
        self.enter_phase(Phase::Run);
    }

    /// Pauses the vCPUs until the machine has been reset, without waiting until they have. A vCPU may call
    /// it about itself.
    pub fn halt(&self) {
        self.lock().halted = true;
        self.close();
    }

    /// Forgets that the machine was halted: it has been reset.
    pub fn rearm(&self) {
        self.lock().halted = false;
    }

    /// Asks the vCPUs to pause, without waiting until they have.
    fn close(&self) {
        self.enter_phase(Phase::Pause);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter_phase(&self, phase: Phase) {
        let mut state = self.lock();
        let held_back = phase == Phase::Run && state.halted;
        if state.phase != Phase::Stop && !held_back {
            state.phase = phase;
            self.halt.store(phase != Phase::Run, Ordering::Release);
            self.changed.notify_all();
        }
    }

    /// Waits until no vCPU runs, kicking those that do.
    ///
    /// # Errors
    /// These vCPUs still run at the deadline: the kernel keeps them, for example in an access to a device that
    /// hangs.
    fn wait_until_empty(&self, deadline: Instant) -> Result<(), StuckVcpus> {
        let mut state = self.lock();
        while !state.running.is_empty() {
            if Instant::now() >= deadline {
                return Err(StuckVcpus(
                    state.running.iter().map(|(vcpu, _)| *vcpu).collect(),
                ));
            }
            for &(_, thread) in &state.running {
                // The thread is alive: it takes itself out of the list before it ends.
                let _ = pthread_kill(thread, KICK);
            }
            let (next, _) = self
                .changed
                .wait_timeout(state, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
        Ok(())
    }

    /// Called by a vCPU thread: waits until the barrier is open. `None` means that the thread is to end.
    fn pass(&self, vcpu: u8) -> Option<RunningVcpu<'_>> {
        let mut state = self.lock();
        loop {
            match state.phase {
                Phase::Run => break,
                Phase::Stop => return None,
                Phase::Pause => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
        state.running.push((vcpu, pthread_self()));
        Some(RunningVcpu {
            barrier: self,
            vcpu,
        })
    }
}

/// A vCPU that has passed the barrier. Dropping it marks the vCPU as stopped, after a panic too.
struct RunningVcpu<'a> {
    barrier: &'a VcpuBarrier,
    vcpu: u8,
}

impl Drop for RunningVcpu<'_> {
    fn drop(&mut self) {
        let mut state = self.barrier.lock();
        state.running.retain(|(vcpu, _)| *vcpu != self.vcpu);
        self.barrier.changed.notify_all();
    }
}

/// The vCPU threads of a VM. Dropping them stops and joins them.
pub struct Vcpus {
    barrier: Arc<VcpuBarrier>,
    // Each is locked by its thread while it may run.
    vcpus: Arc<[Mutex<Vcpu>]>,
    threads: Vec<Task<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU with its CPU affinity. No vCPU runs before the barrier is opened.
    ///
    /// # Errors
    /// A thread could not be made, or its CPU affinity could not be set.
    pub fn start<A>(
        vcpus: Vec<Vcpu>,
        affinities: Vec<CpuAffinity>,
        barrier: &Arc<VcpuBarrier>,
        sandbox: &Sandbox,
        access: &Arc<A>,
    ) -> std::io::Result<Self>
    where
        A: ExitHandler + FaultSink + 'static,
    {
        let vcpus: Arc<[Mutex<Vcpu>]> = vcpus.into_iter().map(Mutex::new).collect();
        let mut this = Self {
            barrier: Arc::clone(barrier),
            vcpus,
            threads: Vec::new(),
        };
        let (told, heard) = channel();
        for (index, affinity) in affinities.into_iter().enumerate() {
            let told = told.clone();
            let index = u8::try_from(index).map_err(std::io::Error::other)?;
            let (barrier, vcpus, access) = (
                Arc::clone(barrier),
                Arc::clone(&this.vcpus),
                Arc::clone(access),
            );
            let body = move || run(index, &vcpus, &barrier, &*access);
            let pin = move || {
                // The receiver lives until all threads have sent.
                let _ = told.send(affinity.apply());
            };
            let role = Role::Vcpu(index);
            let thread = threads::spawn_prepared(role, sandbox, pin, body)?;
            this.threads.push(thread);
        }
        drop(told);
        heard.into_iter().collect::<std::io::Result<()>>()?;
        Ok(this)
    }

    /// Stops the vCPUs for good and waits for their threads. A thread that does not leave the kernel is
    /// abandoned: everything that it can reach lives as long as it does.
    pub fn stop(&mut self) {
        self.barrier.enter_phase(Phase::Stop);
        let deadline = Instant::now() + LEAVE_TIMEOUT;
        if let Err(stuck) = self.barrier.wait_until_empty(deadline) {
            tracing::error!("{stuck}: the VM ends without waiting for it");
        }
        for thread in self.threads.drain(..) {
            if let Err(thread) = thread.join_until(deadline) {
                thread.abandon();
            }
        }
    }

    /// Pauses the vCPUs and waits until none runs. They stay paused until the barrier is opened.
    ///
    /// # Errors
    /// One does not leave the kernel. The others are paused.
    pub fn pause(&self) -> Result<(), StuckVcpus> {
        self.barrier.close();
        self.barrier
            .wait_until_empty(Instant::now() + LEAVE_TIMEOUT)
    }

    /// Calls `change` with each of the vCPUs, in order. They must have been paused.
    ///
    /// # Errors
    /// The first error of `change`; the vCPUs after it were not visited.
    pub fn visit<E>(
        &self,
        mut change: impl FnMut(usize, &mut VcpuFd) -> Result<(), E>,
    ) -> Result<(), E> {
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            change(
                index,
                vcpu.lock().unwrap_or_else(PoisonError::into_inner).fd(),
            )?;
        }
        Ok(())
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The life of a vCPU thread.
fn run<A: ExitHandler + FaultSink>(
    index: u8,
    vcpus: &[Mutex<Vcpu>],
    barrier: &VcpuBarrier,
    access: &A,
) {
    let Some(vcpu) = vcpus.get(usize::from(index)) else {
        return;
    };
    while let Some(_running) = barrier.pass(index) {
        // Given back before `_running` goes.
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        while !barrier.halt.load(Ordering::Acquire) {
            let fault = match vcpu.run(access) {
                Ok(Exit::Continue) => continue,
                Ok(Exit::TripleFault) => VcpuFault::TripleFault,
                Ok(Exit::Broken(what)) => VcpuFault::Broken(what),
                Err(error) => VcpuFault::Broken(format!("KVM_RUN: {error}")),
            };
            barrier.halt();
            access.fault(index, fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_was_halted_runs_again_only_after_a_reset() {
        let barrier = VcpuBarrier::new();
        barrier.open();
        barrier.halt();
        barrier.open();
        assert!(barrier.halt.load(Ordering::Acquire), "no client opens it");
        barrier.rearm();
        assert!(
            barrier.halt.load(Ordering::Acquire),
            "nor does the reset alone"
        );
        barrier.open();
        assert!(!barrier.halt.load(Ordering::Acquire));
    }

    #[test]
    fn a_vcpu_that_the_kernel_keeps_is_named_at_the_deadline() {
        crate::process::sandbox::install_traps().unwrap();
        let barrier = VcpuBarrier::new();
        barrier.open();
        let (told, heard) = channel();
        let (let_go, kept) = channel::<()>();
        let vcpu = Arc::clone(&barrier);
        let thread = std::thread::spawn(move || {
            let _running = vcpu.pass(3);
            told.send(()).unwrap();
            // Like a read of a device that hangs: no kick ends it.
            let _ = kept.recv();
        });
        heard.recv().unwrap();
        barrier.close();
        let soon = Instant::now() + Duration::from_millis(20);
        let stuck = barrier.wait_until_empty(soon).unwrap_err();
        assert!(stuck.to_string().starts_with("vCPU 3 is stuck"), "{stuck}");
        drop(let_go);
        barrier
            .wait_until_empty(Instant::now() + Duration::from_secs(60))
            .unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn a_vcpu_thread_that_panics_has_left() {
        let barrier = VcpuBarrier::new();
        barrier.open();
        let vcpu = Arc::clone(&barrier);
        let thread = std::thread::spawn(move || {
            let _running = vcpu.pass(0);
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(thread.join().is_err());
        assert!(barrier.lock().running.is_empty());
        barrier.wait_until_empty(Instant::now()).unwrap();
        barrier.enter_phase(Phase::Stop);
        assert!(barrier.pass(0).is_none());
    }
}
