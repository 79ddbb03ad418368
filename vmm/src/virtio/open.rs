//! The virtual devices of a guest beside its disks: networks and sockets, which the host's kernel serves, and random
//! numbers. They are opened before the guest is built, and made when it has RAM.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use gantry_devices::virtio::VirtioBackend;
use gantry_devices::virtio::net::Net;
use gantry_devices::virtio::rng::Rng;
use gantry_devices::virtio::vsock::Vsock;
use gantry_resources::base::HostPaths;

use super::net::NetQueues;
use super::tap::{Tap, TapError};
use super::vhost::{self, VhostError};
use super::vsock::{self, CidError, VsockQueues};
use super::{VirtioContext, VirtioDevice, VirtioDeviceError};
use crate::config::{NetConfig, RngConfig, VmConfig, VsockConfig};
use crate::info::DeviceKind;
use crate::process::sandbox::Role;

/// Why a device cannot be given to the guest, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A network has no tap.
    #[error("net[{index}]: {problem}")]
    Net {
        /// Its place in the list.
        index: usize,
        /// Why.
        problem: TapError,
    },
    /// The kernel does not serve a device.
    #[error("{key}: {problem}")]
    Vhost {
        /// The device's key.
        key: String,
        /// Why.
        problem: VhostError,
    },
    /// The guest cannot have its context id.
    #[error("vsock.cid: {0}")]
    Cid(CidError),
    /// There are no random numbers.
    #[error("rng.src: cannot open {}: {source}: name another source", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process lacks what a device takes.
    #[error("{key}: the device cannot be made")]
    Make {
        /// The device's key.
        key: String,
        /// Why.
        #[source]
        source: VirtioDeviceError,
    },
}

/// What the host has for the devices of a VM.
pub struct OpenDevices {
    taps: Vec<Tap>,
    random: Option<File>,
}

impl OpenDevices {
    /// Opens, or makes, what the VM's file asks for, in its order.
    ///
    /// # Errors
    /// The first that is missing, not permitted, or in use.
    pub fn open(config: &VmConfig, host: &HostPaths) -> Result<Self, OpenError> {
        let mut taps = Vec::new();
        for (index, net) in config.nets.iter().enumerate() {
            vhost::check_net().map_err(|problem| OpenError::Vhost {
                key: net_key(index),
                problem,
            })?;
            let tap = Tap::open(net, host);
            taps.push(tap.map_err(|problem| OpenError::Net { index, problem })?);
        }
        if let Some(vsock) = &config.vsock {
            vsock::check(vsock.cid)?;
        }
        let random = config.rng.as_ref().map(source).transpose()?;
        Ok(Self { taps, random })
    }

    /// The devices, in the order of their ports.
    ///
    /// # Errors
    /// The kernel does not serve one, or there are not enough descriptors or threads.
    pub fn devices(
        self,
        config: &VmConfig,
        context: &VirtioContext,
    ) -> Result<Vec<VirtioDevice>, OpenError> {
        let mut devices = Vec::new();
        for (index, (tap, net)) in self.taps.into_iter().zip(&config.nets).enumerate() {
            let queues = NetQueues::new(tap, &context.host.ram, net);
            let queues = queues.map_err(|problem| OpenError::Vhost {
                key: net_key(index),
                problem,
            })?;
            let made = network(net, queues, context);
            devices.push(made.map_err(|source| OpenError::Make {
                key: net_key(index),
                source,
            })?);
        }
        if let Some(vsock) = &config.vsock {
            let queues = VsockQueues::new(vsock.cid, &context.host.ram)?;
            devices.push(
                socket(vsock, queues, context).map_err(|source| OpenError::Make {
                    key: "vsock".to_owned(),
                    source,
                })?,
            );
        }
        if let (Some(source), Some(rng)) = (self.random, &config.rng) {
            devices.push(
                random(rng, source, context).map_err(|source| OpenError::Make {
                    key: "rng".to_owned(),
                    source,
                })?,
            );
        }
        Ok(devices)
    }
}

fn net_key(index: usize) -> String {
    format!("net[{index}]")
}

fn source(rng: &RngConfig) -> Result<File, OpenError> {
    let mut options = File::options();
    let opened = options.read(true).custom_flags(libc::O_NONBLOCK);
    opened
        .open(&rng.source)
        .map_err(|source| OpenError::Source {
            path: rng.source.clone(),
            source,
        })
}

fn network(
    net: &NetConfig,
    queues: NetQueues,
    context: &VirtioContext,
) -> Result<VirtioDevice, VirtioDeviceError> {
    let (backend, control) = Net::new(queues.spec(), Arc::new(queues))?;
    let service = control.map(|control| (Role::Virtio, Box::new(|| control.run()) as _));
    let kind = DeviceKind::Net(net.clone());
    VirtioDevice::new(&net.id, kind, Arc::new(backend), service, context)
}

fn socket(
    vsock: &VsockConfig,
    queues: VsockQueues,
    context: &VirtioContext,
) -> Result<VirtioDevice, VirtioDeviceError> {
    let backend = Vsock::new(vsock.cid, queues.features(), Arc::new(queues));
    let backend: Arc<dyn VirtioBackend> = Arc::new(backend);
    let kind = DeviceKind::Vsock(vsock.clone());
    VirtioDevice::new(&vsock.id, kind, backend, None, context)
}

fn random(
    rng: &RngConfig,
    source: File,
    context: &VirtioContext,
) -> Result<VirtioDevice, VirtioDeviceError> {
    let (backend, worker) = Rng::new(source)?;
    let service = (Role::Virtio, Box::new(|| worker.run()) as _);
    let kind = DeviceKind::Rng(rng.clone());
    VirtioDevice::new(&rng.id, kind, Arc::new(backend), Some(service), context)
}
