//! The vCPU threads: started together, paused together, stopped together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;

use crate::kvm::{Access, Exit, Vcpu};
use crate::placement::Berth;
use crate::sandbox::Sandbox;
use crate::threads::{self, Role, Task};

/// Makes a vCPU leave the kernel. Its handler does nothing: interrupting the system call is all.
pub const KICK: Signal = Signal::SIGUSR1;

/// How long a kick may stay without effect before it is sent again. A signal that arrives between
/// the look at the phase and the entry into the kernel is lost.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// How long a vCPU may take to leave the kernel. It takes microseconds, unless a device that it accesses does not
/// answer.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// vCPUs that do not leave the kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("vCPU {} does not come back from the host's kernel: a device that it accesses may hang", numbers(.0))]
pub struct Stuck(Vec<u8>);

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
pub enum Fault {
    /// The guest caused a triple fault.
    TripleFault,
    /// KVM or the processor cannot go on, in KVM's words.
    Broken(String),
}

/// What a vCPU thread reports to the owner of the VM.
pub trait Monitor: Send + Sync {
    /// The vCPUs cannot go on; they are pausing.
    fn fault(&self, vcpu: u8, fault: Fault);
}

/// The meeting point of the vCPU threads and their owner.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    // Mirrors `state.phase != Run`, so that a running vCPU looks at no lock between two exits.
    halt: AtomicBool,
}

struct State {
    phase: Phase,
    /// The guest has asked for its end or its reset, or cannot go on: nothing but [`Gate::rearm`] lets it run.
    halted: bool,
    /// The vCPUs that may run, with their threads.
    inside: Vec<(u8, Pthread)>,
}

impl Gate {
    /// Closed: vCPUs wait until [`Gate::open`].
    pub fn new() -> Arc<Self> {
        let state = State {
            phase: Phase::Pause,
            halted: false,
            inside: Vec::new(),
        };
        let halt = AtomicBool::new(true);
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            halt,
        })
    }

    /// Lets the vCPUs run, unless one of them has [halted](Self::halt) the machine: its owner has yet to hear
    /// of that.
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
    /// These still do at the deadline: the kernel keeps them, as in an access to a device that hangs.
    fn wait_until_empty(&self, deadline: Instant) -> Result<(), Stuck> {
        let mut state = self.lock();
        while !state.inside.is_empty() {
            if Instant::now() >= deadline {
                return Err(Stuck(state.inside.iter().map(|(vcpu, _)| *vcpu).collect()));
            }
            for &(_, thread) in &state.inside {
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

    /// Called by a vCPU: waits for the gate to open. `None` means to end.
    fn pass(&self, vcpu: u8) -> Option<Inside<'_>> {
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
        state.inside.push((vcpu, pthread_self()));
        Some(Inside { gate: self, vcpu })
    }
}

/// A vCPU that has passed the gate. Dropping it, by a panic too, says that it runs no more.
struct Inside<'a> {
    gate: &'a Gate,
    vcpu: u8,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.inside.retain(|(vcpu, _)| *vcpu != self.vcpu);
        self.gate.changed.notify_all();
    }
}

/// The vCPU threads of a VM. Dropping them stops and joins them.
pub struct Vcpus {
    gate: Arc<Gate>,
    fleet: Arc<Fleet>,
    threads: Vec<Task<()>>,
}

/// The vCPUs themselves; each is locked by its thread while it may run.
type Fleet = Vec<Mutex<Vcpu>>;

impl Vcpus {
    /// Starts a thread for each vCPU, in its berth; none runs before the gate is opened.
    ///
    /// # Errors
    /// A thread could not be made, or have the processors that it must.
    pub fn start<A>(
        vcpus: Vec<Vcpu>,
        berths: Vec<Berth>,
        gate: &Arc<Gate>,
        sandbox: &Sandbox,
        access: &Arc<A>,
    ) -> std::io::Result<Self>
    where
        A: Access + Monitor + 'static,
    {
        let fleet: Arc<Fleet> = Arc::new(vcpus.into_iter().map(Mutex::new).collect());
        let mut this = Self {
            gate: Arc::clone(gate),
            fleet,
            threads: Vec::new(),
        };
        let (told, heard) = channel();
        for (index, berth) in berths.into_iter().enumerate() {
            let told = told.clone();
            let index = u8::try_from(index).map_err(std::io::Error::other)?;
            let (gate, fleet, access) = (
                Arc::clone(gate),
                Arc::clone(&this.fleet),
                Arc::clone(access),
            );
            let body = move || run(index, &fleet, &gate, &*access);
            let moor = move || {
                // Heard until the last thread has said it.
                let _ = told.send(berth.take());
            };
            let role = Role::Vcpu(index);
            let thread = threads::spawn_prepared(role, sandbox, moor, body)?;
            this.threads.push(thread);
        }
        drop(told);
        heard.into_iter().collect::<std::io::Result<()>>()?;
        Ok(this)
    }

    /// Stops the vCPUs for good and waits for their threads to end. What does not leave the kernel is left
    /// to itself: all that it may still reach lives as long as it does.
    pub fn stop(&mut self) {
        self.gate.enter_phase(Phase::Stop);
        let deadline = Instant::now() + LEAVE_PATIENCE;
        if let Err(stuck) = self.gate.wait_until_empty(deadline) {
            tracing::error!("{stuck}: the VM ends without waiting for it");
        }
        for thread in self.threads.drain(..) {
            if let Err(thread) = thread.join_until(deadline) {
                thread.abandon();
            }
        }
    }

    /// Pauses the vCPUs and waits until none runs. They stay paused until the gate is opened.
    ///
    /// # Errors
    /// One does not leave the kernel. The others are paused.
    pub fn pause(&self) -> Result<(), Stuck> {
        self.gate.close();
        self.gate.wait_until_empty(Instant::now() + LEAVE_PATIENCE)
    }

    /// Calls `change` with each of the vCPUs, in order. They must have been paused.
    ///
    /// # Errors
    /// The first error of `change`; the vCPUs after it were not visited.
    pub fn visit<E>(
        &self,
        mut change: impl FnMut(usize, &mut VcpuFd) -> Result<(), E>,
    ) -> Result<(), E> {
        for (index, vcpu) in self.fleet.iter().enumerate() {
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
fn run<A: Access + Monitor>(index: u8, fleet: &Fleet, gate: &Gate, access: &A) {
    let Some(vcpu) = fleet.get(usize::from(index)) else {
        return;
    };
    while let Some(_inside) = gate.pass(index) {
        // Given back before `_inside` goes.
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        while !gate.halt.load(Ordering::Acquire) {
            let fault = match vcpu.run(access) {
                Ok(Exit::Continue) => continue,
                Ok(Exit::TripleFault) => Fault::TripleFault,
                Ok(Exit::Broken(what)) => Fault::Broken(what),
                Err(error) => Fault::Broken(format!("KVM_RUN: {error}")),
            };
            gate.halt();
            access.fault(index, fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_was_halted_runs_again_only_after_a_reset() {
        let gate = Gate::new();
        gate.open();
        gate.halt();
        gate.open();
        assert!(gate.halt.load(Ordering::Acquire), "no client opens it");
        gate.rearm();
        assert!(
            gate.halt.load(Ordering::Acquire),
            "nor does the reset alone"
        );
        gate.open();
        assert!(!gate.halt.load(Ordering::Acquire));
    }

    #[test]
    fn a_vcpu_that_the_kernel_keeps_is_named_at_the_deadline() {
        crate::sandbox::install_traps().unwrap();
        let gate = Gate::new();
        gate.open();
        let (told, heard) = channel();
        let (let_go, kept) = channel::<()>();
        let vcpu = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            let _inside = vcpu.pass(3);
            told.send(()).unwrap();
            // As a read of a device that hangs: no kick ends it.
            let _ = kept.recv();
        });
        heard.recv().unwrap();
        gate.close();
        let soon = Instant::now() + Duration::from_millis(20);
        let stuck = gate.wait_until_empty(soon).unwrap_err();
        assert!(
            stuck.to_string().starts_with("vCPU 3 does not come back"),
            "{stuck}"
        );
        drop(let_go);
        gate.wait_until_empty(Instant::now() + Duration::from_secs(60))
            .unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn a_vcpu_thread_that_panics_has_left() {
        let gate = Gate::new();
        gate.open();
        let vcpu = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            let _inside = vcpu.pass(0);
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(thread.join().is_err());
        assert!(gate.lock().inside.is_empty());
        gate.wait_until_empty(Instant::now()).unwrap();
        gate.enter_phase(Phase::Stop);
        assert!(gate.pass(0).is_none());
    }
}
