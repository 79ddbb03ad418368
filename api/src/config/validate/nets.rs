//! The networks of a VM.

use std::fs;
use std::net::Ipv4Addr;

use gantry_resources::pools::Mac;
use gantry_vmm::{NetConfig, Offloads, TapConfig, interface_name_flaw};

use super::{Context, Invalid, Mistakes, claim_name, invalid, model};

/// The most networks: each takes a root port.
const MAX_NETS: usize = 16;
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: std::ops::RangeInclusive<u64> = 64..=1024;
const MAX_QUEUES: u64 = 64;
/// From what IPv4 asks for to what a tap can have.
const MTUS: std::ops::RangeInclusive<u64> = 68..=65521;
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// By it hosts differ whose VMs have the same names.
const MACHINE_ID: &str = "/etc/machine-id";

/// The networks that a file names. `names` are those of the VM's devices before them.
pub fn nets(
    configs: Vec<model::NetConfig>,
    names: &mut Vec<String>,
    context: &Context,
    mistakes: &mut Mistakes,
) -> Vec<NetConfig> {
    if !configs.is_empty() && context.folders.is_some() {
        let what = "clients of this socket may have no network of the host";
        let help = "have the host's administrator start the VM from a file";
        mistakes.keep::<()>(Err(invalid("net", what, help)));
        return Vec::new();
    }
    if configs.len() > MAX_NETS {
        let what = format!("{} are too many: at most {MAX_NETS}", configs.len());
        mistakes.keep::<()>(Err(invalid(
            "net",
            what,
            "join some by a bridge of the host",
        )));
        return Vec::new();
    }
    let mut all: Vec<NetConfig> = Vec::new();
    for (index, config) in configs.into_iter().enumerate() {
        let key = format!("net[{index}]");
        let Some(net) = mistakes.keep(net(&key, index, config, context)) else {
            continue;
        };
        mistakes.keep(claim_name(names, &key, &net.id));
        let twice = |key: String, earlier, what| {
            let what = format!("`net[{earlier}]` has this {what} already");
            invalid(&key, what, "choose another one")
        };
        let named = |net: &NetConfig| match &net.tap {
            TapConfig::Named(name) => Some(name.clone()),
            TapConfig::Made { .. } => None,
        };
        let same_tap = |other: &NetConfig| named(&net).is_some() && named(other) == named(&net);
        if let Some(earlier) = all.iter().position(same_tap) {
            mistakes.keep::<()>(Err(twice(format!("{key}.tap"), earlier, "tap")));
        }
        if let Some(earlier) = all.iter().position(|other| other.mac == net.mac) {
            mistakes.keep::<()>(Err(twice(format!("{key}.mac"), earlier, "address")));
        }
        all.push(net);
    }
    all
}

fn net(
    key: &str,
    index: usize,
    config: model::NetConfig,
    context: &Context,
) -> Result<NetConfig, Invalid> {
    let id = config.id.clone().unwrap_or_else(|| format!("net{index}"));
    Ok(NetConfig {
        tap: tap(key, &config)?,
        mac: match config.mac {
            Some(mac) => given_mac(key, mac)?,
            None => own_mac(context.name, &id),
        },
        mtu: config.mtu.map(|mtu| checked_mtu(key, mtu)).transpose()?,
        pairs: pairs(key, config.num_queues)?,
        queue_size: queue_size(key, config.queue_size)?,
        offloads: offloads(key, &config)?,
        id,
    })
}

fn tap(key: &str, config: &model::NetConfig) -> Result<TapConfig, Invalid> {
    match (&config.tap, config.ip, config.mask) {
        (Some(name), None, None) => match interface_name_flaw(name) {
            None => Ok(TapConfig::Named(name.clone())),
            Some(what) => {
                let help = "name a tap of the host, such as \"tap0\"";
                Err(invalid(&format!("{key}.tap"), what, help))
            }
        },
        (Some(name), ip, _) => {
            let key = format!("{key}.{}", if ip.is_some() { "ip" } else { "mask" });
            let what = "only a tap that gantry makes gets its address from here";
            let help = format!("use `ip address add ADDRESS/24 dev {name}`, or remove `tap`");
            Err(invalid(&key, what, help))
        }
        (None, None, Some(_)) => {
            let help = "add `ip`, or remove it";
            Err(invalid(&format!("{key}.mask"), "it goes with `ip`", help))
        }
        (None, None, None) => Ok(TapConfig::Made { address: None }),
        (None, Some(ip), mask) => {
            let prefix = prefix(key, mask.unwrap_or(MASK))?;
            let address = Some((ip, prefix));
            Ok(TapConfig::Made { address })
        }
    }
}

/// The length of the prefix that a mask stands for.
fn prefix(key: &str, mask: Ipv4Addr) -> Result<u8, Invalid> {
    let bits = u32::from(mask);
    let ones = bits.leading_ones();
    match ones > 0 && bits.count_ones() == ones {
        true => Ok(ones as u8),
        false => {
            let what = format!("{mask} is no mask of a network");
            let help = "write it like 255.255.255.0";
            Err(invalid(&format!("{key}.mask"), what, help))
        }
    }
}

fn given_mac(key: &str, mac: Mac) -> Result<[u8; 6], Invalid> {
    match mac.is_unicast() {
        true => Ok(mac.0),
        false => {
            let what = format!("no card can have the address {mac}");
            let help = "use one with an even first byte, such as 52:54:00:12:34:56";
            Err(invalid(&format!("{key}.mac"), what, help))
        }
    }
}

/// The address of a network that the file gives none: the same at every start, so that the guest keeps its leases and
/// the names of its interfaces.
fn own_mac(vm: &str, id: &str) -> [u8; 6] {
    let machine = fs::read(MACHINE_ID).unwrap_or_default();
    let parts: [&[u8]; 3] = [&machine, vm.as_bytes(), id.as_bytes()];
    // FNV-1a, with an end mark behind each part.
    let bytes = parts.into_iter().flat_map(|part| part.iter().chain(&[0]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [first, rest @ .., _, _] = hash.to_le_bytes();
    let [b, c, d, e, f] = rest;
    // Of one station, and given by an administrator.
    [first & 0xfc | 0x02, b, c, d, e, f]
}

fn checked_mtu(key: &str, mtu: u64) -> Result<u16, Invalid> {
    match mtu {
        mtu if MTUS.contains(&mtu) => Ok(mtu as u16),
        mtu => {
            let what = format!("a network cannot have an MTU of {mtu}");
            let help = format!("use {} to {}", MTUS.start(), MTUS.end());
            Err(invalid(&format!("{key}.mtu"), what, help))
        }
    }
}

fn pairs(key: &str, queues: Option<u64>) -> Result<u16, Invalid> {
    match queues.unwrap_or(2) {
        queues @ 2..=MAX_QUEUES if queues.is_multiple_of(2) => Ok(queues as u16 / 2),
        queues => {
            let what = format!("a network cannot have {queues} queues");
            let help = format!("use an even number, 2 to {MAX_QUEUES}: one for each direction");
            Err(invalid(&format!("{key}.num_queues"), what, help))
        }
    }
}

fn queue_size(key: &str, size: Option<u64>) -> Result<u16, Invalid> {
    match size.unwrap_or(QUEUE_SIZE.into()) {
        size if QUEUE_SIZES.contains(&size) && size.is_power_of_two() => Ok(size as u16),
        size => {
            let what = format!("a queue of a network cannot have {size} entries");
            let (least, most) = (QUEUE_SIZES.start(), QUEUE_SIZES.end());
            let help = format!("use a power of two, {least} to {most}");
            Err(invalid(&format!("{key}.queue_size"), what, help))
        }
    }
}

fn offloads(key: &str, config: &model::NetConfig) -> Result<Offloads, Invalid> {
    let checksum = config.offload_csum.unwrap_or(true);
    for (name, asked) in [
        ("offload_tso", config.offload_tso),
        ("offload_ufo", config.offload_ufo),
    ] {
        if asked == Some(true) && !checksum {
            let help = "remove one of the two";
            let what = "it needs `offload_csum`, which is false";
            return Err(invalid(&format!("{key}.{name}"), what, help));
        }
    }
    Ok(Offloads {
        checksum,
        tcp: config.offload_tso.unwrap_or(checksum),
        udp: config.offload_ufo.unwrap_or(checksum),
    })
}
