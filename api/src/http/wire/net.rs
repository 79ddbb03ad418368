//! Networks, sockets and random numbers in the API.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use gantry_resources::pools::Mac;
use gantry_vmm::{NetConfig, RngConfig, TapConfig, VsockConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A virtio network of a VM.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Net {
    /// Its name.
    pub id: String,
    /// Its tap on the host, if it is not one that gantry makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Address of the host on the tap that gantry makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<Ipv4Addr>,
    /// Mask that goes with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Ipv4Addr>,
    /// Its address in the guest.
    pub mac: Mac,
    /// Bytes of the largest packet, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Number of its queues.
    pub num_queues: u16,
    /// Size of each queue.
    pub queue_size: u16,
    /// Whether checksums may be left to the other side.
    pub offload_csum: bool,
    /// Whether segmentation of TCP may be left to the other side.
    pub offload_tso: bool,
    /// Whether fragmentation of UDP may be left to the other side.
    pub offload_ufo: bool,
}

impl From<&NetConfig> for Net {
    fn from(net: &NetConfig) -> Self {
        let (tap, address) = match &net.tap {
            TapConfig::Named(name) => (Some(name.clone()), None),
            TapConfig::Made { address } => (None, *address),
        };
        let mask = |prefix: u8| Ipv4Addr::from(u32::MAX << (32 - u32::from(prefix)));
        Self {
            id: net.id.clone(),
            tap,
            ip: address.map(|(ip, _)| ip),
            mask: address.map(|(_, prefix)| mask(prefix)),
            mac: Mac(net.mac),
            mtu: net.mtu,
            num_queues: 2 * net.pairs,
            queue_size: net.queue_size,
            offload_csum: net.offloads.checksum,
            offload_tso: net.offloads.tcp,
            offload_ufo: net.offloads.udp,
        }
    }
}

/// Sockets between guest and host.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Vsock {
    /// Its name.
    pub id: String,
    /// The guest's context id.
    pub cid: u32,
}

impl From<&VsockConfig> for Vsock {
    fn from(vsock: &VsockConfig) -> Self {
        Self {
            id: vsock.id.clone(),
            cid: vsock.cid,
        }
    }
}

/// Random numbers of the host.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Rng {
    /// Its name.
    pub id: String,
    /// The file that they are read from.
    pub src: PathBuf,
}

impl From<&RngConfig> for Rng {
    fn from(rng: &RngConfig) -> Self {
        Self {
            id: rng.id.clone(),
            src: rng.source.clone(),
        }
    }
}
