//! VF tokens, which the owner of a physical function shares with the owners of its virtual functions: with
//! vfio-pci, the kernel gives functions of one card to several owners only if they know the card's token
//! (`vf_token` of drivers/vfio/pci/vfio_pci_core.c). The process that opens the physical function first sets it.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::error::SriovError;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::base::sysfs;
use crate::base::uuid::Uuid;
use crate::inventory::device::HostDevice;
use crate::pools::group::Groups;
use crate::pools::sriov::VfToken;

/// The physical function whose token opens a device: the device itself, or the card of a virtual function.
pub(crate) fn card(device: &HostDevice) -> HostBdf {
    device.physfn.unwrap_or(device.bdf)
}

/// The token that a device must be opened with, if its card is with vfio-pci.
pub(crate) fn of(
    paths: &HostPaths,
    groups: &Groups,
    device: &HostDevice,
) -> Result<Option<Uuid>, SriovError> {
    let pf = card(device);
    let Some(wanted) = groups.vf_token(pf) else {
        return Ok(None);
    };
    let with_vfio = match device.physfn {
        None => device.sriov.is_some(),
        // The card may be another owner's, and is only read.
        Some(pf) => {
            let all = HostPaths {
                only: None,
                ..paths.clone()
            };
            HostDevice::read(&all, pf)?.on_vfio()
        }
    };
    match with_vfio.then_some(wanted) {
        None | Some(VfToken::Secret(false)) => Ok(None),
        Some(VfToken::Known(token)) => Ok(Some(token)),
        Some(VfToken::Secret(true)) => {
            let path = paths.run.join("vf-token").join(pf.to_string());
            kept(paths, &path)
                .map(Some)
                .map_err(|source| SriovError::Record { path, source })
        }
    }
}

/// The token in a file that only its owner can read; created if it is missing.
fn kept(paths: &HostPaths, path: &Path) -> io::Result<Uuid> {
    if let Some(text) = sysfs::text(path)? {
        let broken = |_| io::Error::other("it holds no token: remove it while no VM has the card");
        return text.parse().map_err(broken);
    }
    let token = paths.random_uuid()?;
    if let Some(dir) = path.parent() {
        crate::base::atomic::make_dir(dir)?;
    }
    let draft = path.with_extension(format!("{}", std::process::id()));
    // A file that a killed process left, or a link.
    let _ = std::fs::remove_file(&draft);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(&draft)?;
    io::Write::write_all(&mut file, token.to_string().as_bytes())?;
    // If two processes create one, both use the first.
    let linked = std::fs::hard_link(&draft, path);
    std::fs::remove_file(draft)?;
    match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => kept(paths, path),
        linked => linked.map(|()| token),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::FakeHost;

    #[test]
    fn a_token_is_kept_and_what_is_none_is_named() {
        let host = FakeHost::new(&[]);
        host.file(
            "proc/sys/kernel/random/uuid",
            "6a4d7d70-5b7a-4a44-a7a5-4d5e4a2b0c11\n",
        );
        let path = host.paths.run.join("vf-token/0000:01:00.0");
        let token = kept(&host.paths, &path).unwrap();
        assert_eq!(kept(&host.paths, &path).unwrap(), token);
        host.file("run/vf-token/0000:01:00.0", "no token");
        let said = kept(&host.paths, &path).unwrap_err().to_string();
        assert!(said.contains("remove it"), "{said}");
    }
}
