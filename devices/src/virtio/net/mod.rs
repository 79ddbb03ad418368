//! A virtio network device (section 5.1) whose packets the host's kernel moves.

mod control;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

pub use control::ControlWorker;

use super::{Activation, KernelQueues, VirtioBackend, VirtioKind, WorkerHandle, kernel, worker};

/// An Ethernet controller.
const CLASS: u32 = 0x02_00_00;
/// Entries of the control queue: its driver has one command under way at a time.
const CONTROL_SIZE: u16 = 64;
/// A pair has a queue for each direction.
const QUEUES_OF_PAIR: u16 = 2;

/// The offloads that a driver is offered, in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums. The others need it.
    pub checksum: bool,
    /// Segmentation of TCP.
    pub tcp: bool,
    /// Fragmentation of UDP.
    pub udp: bool,
}

impl Offloads {
    fn features(self) -> u64 {
        let checksum: &[u32] = &[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM];
        let tcp: &[u32] = &[
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
        ];
        let udp: &[u32] = &[VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_UFO];
        let all = [
            (self.checksum, checksum),
            (self.checksum && self.tcp, tcp),
            (self.checksum && self.udp, udp),
        ];
        let offered = all.iter().filter(|(offered, _)| *offered);
        bits(offered.flat_map(|(_, bits)| *bits))
    }
}

/// What a driver is told of its network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetSpec {
    /// Its address.
    pub mac: [u8; 6],
    /// Bytes of the largest packet, without its Ethernet header.
    pub mtu: u16,
    /// How many pairs of queues it has, at least one.
    pub pairs: u16,
    /// The size of each queue: a power of two.
    pub queue_size: u16,
    /// What the driver need not do itself.
    pub offloads: Offloads,
}

/// The host's side of the device. Queue `2n` receives and queue `2n + 1` sends, both for pair `n`.
pub trait NetPath: KernelQueues {
    /// Has packets come and go by the first `pairs` pairs alone. It is one pair after a start.
    ///
    /// # Errors
    /// The kernel refused.
    fn use_pairs(&self, pairs: u16) -> io::Result<()>;
}

/// The device.
pub struct Net {
    spec: NetSpec,
    sizes: Vec<u16>,
    path: Arc<dyn NetPath>,
    /// Serves the control queue, which is there with several pairs only.
    control: Option<WorkerHandle>,
}

impl Net {
    /// The device, and what its thread runs, if it needs one.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(spec: NetSpec, path: Arc<dyn NetPath>) -> io::Result<(Self, Option<ControlWorker>)> {
        let mut sizes = vec![spec.queue_size; usize::from(spec.pairs * QUEUES_OF_PAIR)];
        let (control, thread) = match spec.pairs {
            ..=1 => (None, None),
            pairs => {
                sizes.push(CONTROL_SIZE);
                let (handle, worker) = worker()?;
                let thread = ControlWorker::new(worker, Arc::clone(&path), pairs);
                (Some(handle), Some(thread))
            }
        };
        let device = Self {
            spec,
            sizes,
            path,
            control,
        };
        Ok((device, thread))
    }

    /// The configuration (section 5.1.4).
    fn config(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&self.spec.mac);
        bytes[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        bytes[8..10].copy_from_slice(&self.spec.pairs.to_le_bytes());
        bytes[10..].copy_from_slice(&self.spec.mtu.to_le_bytes());
        bytes
    }
}

impl VirtioBackend for Net {
    fn kind(&self) -> VirtioKind {
        VirtioKind {
            id: VIRTIO_ID_NET as u16,
            class: CLASS,
        }
    }

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
        ];
        let several: &[u32] = match self.control {
            None => &[],
            Some(_) => &[VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ],
        };
        bits(always.iter().chain(several)) | self.spec.offloads.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_bytes(&self.config(), offset, data);
    }

    /// Without several pairs the control queue follows the first pair, wherever it is with them (section 5.1.2).
    fn start(&self, activation: Activation) {
        let Activation {
            ram,
            features,
            queues,
        } = activation;
        let accepted = |feature: u32| features & 1 << feature != 0;
        let data = match accepted(VIRTIO_NET_F_MQ) {
            true => self.spec.pairs * QUEUES_OF_PAIR,
            false => QUEUES_OF_PAIR,
        };
        let (data, others): (Vec<_>, Vec<_>) =
            queues.into_iter().partition(|queue| queue.index < data);
        if !kernel::start(&*self.path, features, &data) {
            return;
        }
        let first = others.into_iter().next();
        if let (Some(control), Some(queue)) = (&self.control, first)
            && accepted(VIRTIO_NET_F_CTRL_VQ)
        {
            control.start(Activation {
                ram,
                features,
                queues: vec![queue],
            });
        }
    }

    fn stop(&self) {
        if let Some(control) = &self.control {
            control.stop();
        }
        self.path.stop();
    }

    fn is_stopped(&self) -> bool {
        let control = self.control.as_ref();
        control.is_none_or(WorkerHandle::is_stopped)
    }

    fn wait_stopped(&self, timeout: Duration) -> bool {
        let control = self.control.as_ref();
        control.is_none_or(|control| control.wait_stopped(timeout))
    }
}

fn bits<'a>(numbers: impl IntoIterator<Item = &'a u32>) -> u64 {
    numbers.into_iter().fold(0, |bits, bit| bits | 1 << bit)
}

#[cfg(test)]
mod tests;
