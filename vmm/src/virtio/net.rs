//! The queues of a virtio network device in the host's kernel, between guest RAM and a tap.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gantry_devices::ram::RamView;
use gantry_devices::virtio::net::{NetPath, NetSpec};
use gantry_devices::virtio::{ActiveQueue, KernelQueues};
use vhost::VhostBackend;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;

use super::tap::Tap;
use super::vhost::{self as queues, Memory, VhostError, io_error};
use crate::config::NetConfig;

/// Buffers of a packet can be merged (`VIRTIO_NET_F_MRG_RXBUF`).
const MERGED_BUFFERS: u64 = 1 << 15;
/// What of a driver's features concerns vhost: those of the ring, and how packets lie in it. The tap does the others.
const VHOST_FEATURES: u64 = MERGED_BUFFERS | 1 << 28 | 1 << 29 | 1 << 32;

/// The queues of a device: a vhost device and a queue of the tap for each pair.
pub struct NetQueues {
    pairs: Vec<Arc<Net<Memory>>>,
    tap: Tap,
    spec: NetSpec,
    // The kernel reads and writes it.
    ram: RamView,
    state: Mutex<State>,
}

struct State {
    /// Which queues of the tap take packets.
    attached: Vec<bool>,
    /// Pairs and numbers in them of the queues that the kernel serves.
    served: Vec<(usize, usize)>,
}

impl NetQueues {
    /// A vhost device for each queue of the tap.
    ///
    /// # Errors
    /// The host has no vhost, or no descriptors left.
    pub fn new(tap: Tap, ram: &RamView, net: &NetConfig) -> Result<Self, VhostError> {
        let pair = |_: &File| {
            let vhost = queues::open(queues::NET, ram, MERGED_BUFFERS, Net::new)?;
            Ok(Arc::new(vhost))
        };
        let pairs = tap
            .queues()
            .iter()
            .map(pair)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            state: Mutex::new(State {
                attached: vec![true; pairs.len()],
                served: Vec::new(),
            }),
            pairs,
            spec: net.spec(tap.mtu()),
            tap,
            ram: ram.clone(),
        })
    }

    /// What the driver is told.
    pub fn spec(&self) -> NetSpec {
        self.spec
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KernelQueues for NetQueues {
    fn start(&self, features: u64, queues: &[ActiveQueue]) -> io::Result<()> {
        self.use_pairs(1)?;
        self.tap.set_offloads(features)?;
        for (number, (vhost, tap)) in self.pairs.iter().zip(self.tap.queues()).enumerate() {
            let own = |queue: &&ActiveQueue| usize::from(queue.index) / 2 == number;
            let own: Vec<_> = queues.iter().filter(own).collect();
            if own.is_empty() {
                continue;
            }
            let features = features & VHOST_FEATURES;
            vhost.set_features(features).map_err(io_error)?;
            for queue in own {
                let index = usize::from(queue.index) % 2;
                queues::give(vhost, index, &self.ram, queue)?;
                self.lock().served.push((number, index));
                vhost.set_backend(index, Some(tap)).map_err(io_error)?;
                // Buffers that the driver made available before are looked at now.
                let _ = queue.kick.write(1);
            }
        }
        Ok(())
    }

    fn stop(&self) {
        for (number, index) in std::mem::take(&mut self.lock().served) {
            let Some(vhost) = self.pairs.get(number) else {
                continue;
            };
            if let Err(error) = vhost.set_backend(index, None) {
                tracing::error!(%error, "vhost does not leave a queue");
            }
        }
    }
}

impl NetPath for NetQueues {
    fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        let mut state = self.lock();
        for (number, attached) in state.attached.iter_mut().enumerate() {
            let wanted = number < usize::from(pairs);
            if *attached != wanted {
                self.tap.attach(number, wanted)?;
                *attached = wanted;
            }
        }
        Ok(())
    }
}
