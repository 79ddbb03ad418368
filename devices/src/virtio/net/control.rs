//! The control queue of a network device (section 5.1.6.5): how many pairs of queues the driver uses.

use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_MQ,
    VIRTIO_NET_OK,
};

use super::NetPath;
use crate::virtio::serve::serve;
use crate::virtio::{Segments, Worker};

/// Class and command of the one command that there is.
const SET_PAIRS: [u8; 2] = [
    VIRTIO_NET_CTRL_MQ as u8,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8,
];

/// The thread of a network device.
pub struct ControlWorker {
    worker: Worker,
    commands: Commands,
}

impl ControlWorker {
    pub(super) fn new(worker: Worker, path: Arc<dyn NetPath>, pairs: u16) -> Self {
        Self {
            worker,
            commands: Commands { path, pairs },
        }
    }

    /// Serves drivers until the device is dropped.
    pub fn run(self) {
        let commands = self.commands;
        self.worker.run(|worker, activation| {
            let several = activation.features & 1 << VIRTIO_NET_F_MQ != 0;
            serve(worker, activation, |readable, writable| {
                commands.answer(several, readable, writable)
            });
        });
    }
}

/// Carries commands out.
pub(super) struct Commands {
    pub path: Arc<dyn NetPath>,
    pub pairs: u16,
}

impl Commands {
    /// Answers one command of a driver, which may use `several` pairs or not.
    pub fn answer(
        &self,
        several: bool,
        readable: &Segments<'_>,
        writable: &Segments<'_>,
    ) -> Result<u32, String> {
        if writable.bytes() == 0 {
            return Err("no room for the answer to a command".to_owned());
        }
        let answer = match several && self.carry_out(readable) {
            true => VIRTIO_NET_OK,
            false => VIRTIO_NET_ERR,
        };
        writable.write(&[answer as u8]);
        Ok(1)
    }

    fn carry_out(&self, readable: &Segments<'_>) -> bool {
        let mut command = [0; 4];
        readable.read(&mut command);
        let [class, number, pairs @ ..] = command;
        let pairs = u16::from_le_bytes(pairs);
        let known = [class, number] == SET_PAIRS && readable.bytes() == command.len() as u64;
        if !known || !(1..=self.pairs).contains(&pairs) {
            return false;
        }
        let used = self.path.use_pairs(pairs);
        if let Err(error) = &used {
            let error = error as &dyn std::error::Error;
            crate::warn_limited!(error, "cannot change the number of a network's queues");
        }
        used.is_ok()
    }
}
