//! Tells those who wait for it that the guest runs: the `gantry run -d` that started this process, and systemd.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use gantry_vmm::Handle;
use gantry_vmm::command::{Command, EventSink, VmEvent, VmState};
use serde::{Deserialize, Serialize};

use super::systemd;

/// What `gantry run -d` hears once the guest runs.
#[derive(Debug, Serialize, Deserialize)]
pub struct Started {
    /// Name of the VM.
    pub name: String,
    /// How much of the log is from before.
    pub said: u64,
}

/// Those who wait. They are told once.
#[derive(Clone, Default)]
pub struct Readiness(Arc<Waiting>);

#[derive(Default)]
struct Waiting {
    name: String,
    starter: Mutex<Option<File>>,
    systemd: Option<UnixDatagram>,
    vm: OnceLock<Handle>,
}

impl Readiness {
    /// For the VM called `name`. The sandbox lets no thread connect a socket later.
    pub fn new(name: &str, starter: Option<File>) -> Self {
        Self(Arc::new(Waiting {
            name: name.to_owned(),
            starter: Mutex::new(starter),
            systemd: systemd::connect(),
            vm: OnceLock::new(),
        }))
    }

    /// The VM, which ends if its starter does before the guest runs.
    pub fn watch(&self, vm: Handle) {
        let _ = self.0.vm.set(vm);
    }

    /// Events go on to `sink`, and the first that says that the guest runs is told.
    pub fn sink(&self, sink: EventSink) -> EventSink {
        let readiness = self.clone();
        Arc::new(move |event| {
            match event {
                VmEvent::State(VmState::Running) => readiness.tell(),
                VmEvent::Ended { .. } => readiness.notify("STOPPING=1"),
                _ => {}
            }
            sink(event);
        })
    }

    /// Tells that the guest runs, or that clients can boot one.
    pub fn tell(&self) {
        self.notify("READY=1");
        let starter = self.0.starter.lock();
        let starter = starter.unwrap_or_else(PoisonError::into_inner).take();
        let told = starter.map_or(Ok(()), |starter| self.tell_starter(starter));
        // A start that was given up leaves no VM.
        if told.is_err()
            && let Some(vm) = self.0.vm.get()
        {
            tracing::warn!("the `gantry run -d` that started this VM is gone: it ends");
            vm.ask(Command::Quit, drop);
        }
    }

    fn tell_starter(&self, mut starter: File) -> io::Result<()> {
        let log = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let started = Started {
            name: self.0.name.clone(),
            said: log.metadata()?.len(),
        };
        starter.write_all(&serde_json::to_vec(&started)?)
    }

    fn notify(&self, state: &str) {
        if let Some(systemd) = &self.0.systemd {
            // A service manager that does not listen misses nothing.
            let _ = systemd.send(state.as_bytes());
        }
    }
}
