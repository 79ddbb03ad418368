//! The commands of clients, as a running VM handles them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

use super::{End, Vm};
use crate::command::{Answer, Command, CommandError, Reply};
use crate::error::Error;
use crate::info::{DeviceCounters, VmState};
use crate::kvm::KvmError;
use crate::passthrough::interrupts;

impl Vm {
    /// Handles a command and answers it. Returns `Some` if the VM ends by it.
    ///
    /// # Errors
    /// The host failed the VM, which cannot go on. The client has been answered.
    pub(super) fn obey(&mut self, command: Command, reply: Reply) -> Result<Option<End>, Error> {
        let answer = match command {
            Command::Shutdown | Command::Delete | Command::Quit => {
                return Ok(Some(End::Requested(command, reply)));
            }
            Command::Reboot => {
                let was = self.state;
                let rebooted = self.reboot();
                return match rebooted {
                    Ok(()) => {
                        // Who asks for a boot wants it to run.
                        if was == VmState::Paused {
                            self.barrier.open();
                            self.set_state(VmState::Running);
                        }
                        reply(Ok(Answer::Done));
                        Ok(None)
                    }
                    Err(error) => {
                        reply(Err(CommandError::Ending));
                        Err(error)
                    }
                };
            }
            Command::Create(_) => Err(CommandError::AlreadyCreated),
            Command::Boot => Err(CommandError::AlreadyRunning),
            Command::Pause => self.pause(),
            Command::Resume => self.resume(),
            Command::PowerButton => {
                self.machine.events.press_power_button();
                self.devices.remind();
                Ok(Answer::Done)
            }
            Command::Nmi => self.nmi(),
            Command::Counters => Ok(Answer::Counters(self.counters())),
            Command::Attach(attach) => {
                self.devices.attach(attach, reply);
                return Ok(None);
            }
            Command::ResizeDisk { id, bytes } => {
                self.devices.resize_disk(id, bytes, reply);
                return Ok(None);
            }
            Command::Detach(detach) => self.devices.detach(&detach),
        };
        reply(answer);
        Ok(None)
    }

    fn pause(&mut self) -> Result<Answer, CommandError> {
        if self.state == VmState::Paused {
            return Err(CommandError::AlreadyPaused);
        }
        self.pause_vcpus()?;
        // The guest must not take the pause for a lock-up of its processors. A guest without KVM's clock cannot
        // be told.
        self.vcpus
            .visit(|_, vcpu| match vcpu.kvmclock_ctrl() {
                Err(error) if error.errno() != libc::EINVAL => Err(error),
                _ => Ok(()),
            })
            .unwrap_or_else(|error| tracing::warn!(%error, "KVM_KVMCLOCK_CTRL"));
        self.set_state(VmState::Paused);
        Ok(Answer::Done)
    }

    fn resume(&mut self) -> Result<Answer, CommandError> {
        if self.state != VmState::Paused {
            return Err(CommandError::NotPaused);
        }
        self.barrier.open();
        self.set_state(VmState::Running);
        Ok(Answer::Done)
    }

    /// Pauses the vCPUs, or none of them.
    fn pause_vcpus(&self) -> Result<(), CommandError> {
        self.vcpus.pause().map_err(|stuck| {
            if self.state == VmState::Running {
                self.barrier.open();
            }
            CommandError::Failed(stuck.into())
        })
    }

    fn nmi(&mut self) -> Result<Answer, CommandError> {
        self.pause_vcpus()?;
        let sent = self.vcpus.visit(|_, vcpu: &mut VcpuFd| vcpu.nmi());
        if self.state == VmState::Running {
            self.barrier.open();
        }
        sent.map_err(|error| CommandError::Failed(KvmError::call("KVM_NMI")(error).into()))?;
        Ok(Answer::Done)
    }

    fn counters(&self) -> Vec<DeviceCounters> {
        let text = self.interrupts.as_ref().map(read_whole).unwrap_or_default();
        self.devices.counters(&interrupts(&text))
    }
}

/// Reads a file of /proc from its beginning. It was opened before the sandbox closed.
fn read_whole(file: &File) -> String {
    const STEP: usize = 64 << 10;
    let mut text = Vec::new();
    loop {
        let read = text.len();
        text.resize(read + STEP, 0);
        let len = text
            .get_mut(read..)
            .map_or(Ok(0), |rest| file.read_at(rest, read as u64));
        text.truncate(read + len.as_ref().copied().unwrap_or(0));
        if !len.is_ok_and(|len| len > 0) {
            return String::from_utf8_lossy(&text).into_owned();
        }
    }
}
