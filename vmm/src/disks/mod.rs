//! Disks of the guest, files or block devices of the host and that of cloud-init: opened, put behind root ports, and
//! served.

mod cloud_init;
mod open;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_devices::pci::{BarSpace, MsiRouter, PciDevice, PortIndex, SegmentError, SlotGuard};
use gantry_devices::virtio::block::{Block, Disk};
use gantry_devices::virtio::{VirtioError, VirtioFunction};

pub use cloud_init::CloudInitError;
pub use open::{DiskProblem, open};

use crate::config::{DiskConfig, VmConfig};
use crate::cpu::Features;
use crate::machine::Machine;
use crate::process::sandbox::{Role, Sandbox};
use crate::process::threads::{self, Task};

/// How long the host may take to end an access to a disk.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// The disks of a VM, each behind a root port of its own. Dropping the value takes them away from the guest and
/// ends their threads.
#[derive(Default)]
pub struct Disks(Vec<PluggedDisk>);

struct PluggedDisk {
    // Dropped in this order: the guest reaches the function no more, then the thread's work ends, then the thread.
    _slot: SlotGuard,
    function: Arc<VirtioFunction>,
    _thread: DiskThread,
}

/// The thread of a disk. Dropping it waits until the thread has ended, and leaves one behind that the kernel keeps
/// in an access to the disk: guest RAM and the disk stay as they are until it returns.
struct DiskThread(Option<Task<()>>);

impl Drop for DiskThread {
    fn drop(&mut self) {
        let deadline = Instant::now() + END_TIMEOUT;
        if let Some(Err(thread)) = self.0.take().map(|thread| thread.join_until(deadline)) {
            tracing::error!("a disk of the VM does not answer: its thread is left behind");
            thread.abandon();
        }
    }
}

/// Opens the disks of a VM, in their order; the last is that of cloud-init.
///
/// # Errors
/// The first that is missing, not permitted, in use, or no disk.
pub fn open_all(config: &VmConfig) -> Result<Vec<(DiskConfig, Disk)>, DiskError> {
    let mut disks = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let opened = open(disk, config.folders.as_ref());
        let opened = opened.map_err(|problem| DiskError::Open { index, problem })?;
        disks.push((disk.clone(), opened));
    }
    if let Some(files) = &config.cloud_init {
        let below = config.folders.as_ref();
        let below = below.map(|folders| folders.payload.as_path());
        disks.push((cloud_init::config(), cloud_init::disk(files, below)?));
    }
    Ok(disks)
}

impl Disks {
    /// Puts open disks behind the root ports from number `first` on.
    ///
    /// # Errors
    /// There are not enough ports, descriptors or threads.
    pub fn plug(
        disks: Vec<(DiskConfig, Disk)>,
        machine: &Machine,
        first: usize,
        features: &Features,
        sandbox: &Sandbox,
    ) -> Result<Self, DiskError> {
        let ports = machine.pci.ports().map(|(port, ..)| port);
        let ports: Vec<PortIndex> = ports.skip(first).take(disks.len()).collect();
        let all = disks.into_iter().zip(ports).enumerate();
        let bits = features.physical_bits();
        let plugged = all.map(|(index, ((config, disk), port))| {
            let failed = |source: PlugError| DiskError::Plug { index, source };
            let (device, worker) = Block::new(disk, &config.serial, config.queues)
                .map_err(|error| failed(error.into()))?;
            let router: Arc<dyn MsiRouter> = Arc::new(machine.routes.clone());
            let (device, ram) = (Arc::new(device), machine.ram.view());
            let function = VirtioFunction::new(&config.id, device, ram, router, bits);
            let function = function.map_err(|error| failed(error.into()))?;
            // The thread is last: where one of these fails, nothing waits for it.
            let slot = machine.pci.plug(port, 0, function.clone());
            let slot = slot.map_err(|error| failed(error.into()))?;
            let run = move || worker.run();
            let thread =
                threads::spawn(Role::Disk, sandbox, run).map_err(|error| failed(error.into()))?;
            Ok(PluggedDisk {
                _slot: slot,
                function,
                _thread: DiskThread(Some(thread)),
            })
        });
        Ok(Self(plugged.collect::<Result<_, DiskError>>()?))
    }

    /// Resets the disks for the guest's reboot.
    ///
    /// # Errors
    /// A disk does not leave guest RAM in time: the kernel keeps its thread.
    pub fn reset(&self, space: &dyn BarSpace) -> io::Result<()> {
        self.0.iter().for_each(|disk| disk.function.stop());
        let mut disks = self.0.iter();
        disks.try_for_each(|disk| disk.function.reset(space))
    }
}

/// A disk cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Its file cannot be used.
    #[error("disks[{index}].path: {problem}")]
    Open {
        /// Its place in the list.
        index: usize,
        /// Why.
        problem: DiskProblem,
    },
    /// That of cloud-init cannot be made.
    #[error(transparent)]
    CloudInit(#[from] CloudInitError),
    /// It cannot be put behind a root port.
    #[error("disks[{index}]: it cannot be plugged in")]
    Plug {
        /// Its place in the list.
        index: usize,
        /// Why.
        #[source]
        source: PlugError,
    },
}

/// Why an open disk cannot be put behind a root port.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// No descriptor or thread is left.
    #[error("no thread or eventfd can be made for it")]
    Host(#[from] io::Error),
    /// It is no virtio device that can be.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// There is no root port for it.
    #[error(transparent)]
    Port(#[from] SegmentError),
}
