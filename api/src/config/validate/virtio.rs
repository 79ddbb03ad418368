//! The virtual devices of a VM beside its disks.

use std::path::Path;

use gantry_vmm::{CloudInit, NetConfig, RngConfig, VsockConfig};

use super::{Context, Invalid, Mistakes, claim_name, invalid, model, nets};

/// Context ids below are the hypervisor's and the host's, the one above stands for any.
const CIDS: std::ops::RangeInclusive<u64> = 3..=0xffff_fffe;
/// The kernel's sources of random numbers.
const SOURCES: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/hwrng"];

/// The keys of a file for them: `net`, `vsock`, `rng`.
type Keys = (
    Option<Vec<model::NetConfig>>,
    Option<model::VsockConfig>,
    Option<model::RngConfig>,
);

/// Those that have no mistake.
pub struct Devices {
    pub nets: Vec<NetConfig>,
    pub vsock: Option<VsockConfig>,
    pub rng: Option<RngConfig>,
}

/// The devices that a file names. `names` are those of the VM's other devices.
pub fn devices(
    (net, vsock, rng): Keys,
    mut names: Vec<String>,
    context: &Context,
    mistakes: &mut Mistakes,
) -> Devices {
    names.push(CloudInit::DISK.to_owned());
    let nets = nets::nets(net.unwrap_or_default(), &mut names, context, mistakes);
    let vsock = vsock.and_then(|config| mistakes.keep(self::vsock(config, &mut names, context)));
    let rng = rng.and_then(|config| mistakes.keep(self::rng(config, &mut names)));
    Devices { nets, vsock, rng }
}

/// The socket. `names` are those of the VM's devices before it.
fn vsock(
    config: model::VsockConfig,
    names: &mut Vec<String>,
    context: &Context,
) -> Result<VsockConfig, Invalid> {
    if context.folders.is_some() {
        let what = "clients of this socket may have no sockets of the host";
        let help = "have the host's administrator start the VM from a file";
        return Err(invalid("vsock", what, help));
    }
    if config.socket.is_some() {
        let what =
            "the guest's sockets are sockets of the host's kernel here, not of a Unix socket";
        let help = "remove the key, and reach the guest from the host by AF_VSOCK and its `cid`";
        return Err(invalid("vsock.socket", what, help));
    }
    let cid = match config.cid {
        cid if CIDS.contains(&cid) => cid as u32,
        cid => {
            let what = format!("no guest can have CID {cid}");
            let help = format!("use {} to {}", CIDS.start(), CIDS.end());
            return Err(invalid("vsock.cid", what, help));
        }
    };
    let id = config.id.unwrap_or_else(|| "vsock".to_owned());
    claim_name(names, "vsock", &id)?;
    Ok(VsockConfig { id, cid })
}

/// The random numbers. `names` are those of the VM's devices before them.
fn rng(config: model::RngConfig, names: &mut Vec<String>) -> Result<RngConfig, Invalid> {
    let source = config.src.unwrap_or_else(|| SOURCES[0].into());
    if !SOURCES.iter().any(|known| source == Path::new(known)) {
        let what = format!("{} is no source of random numbers", source.display());
        let help = format!("use {}", SOURCES.join(", "));
        return Err(invalid("rng.src", what, help));
    }
    let id = config.id.unwrap_or_else(|| "rng".to_owned());
    claim_name(names, "rng", &id)?;
    Ok(RngConfig { id, source })
}
