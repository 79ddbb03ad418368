//! Queues of a virtio device in the host's kernel (vhost).

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_devices::ram::RamView;
use gantry_devices::virtio::ActiveQueue;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Guest RAM as the vhost crate takes it.
pub type Memory = Arc<GuestMemoryMmap>;

/// The node of networks.
pub const NET: &str = "/dev/vhost-net";
/// The node of sockets.
pub const VSOCK: &str = "/dev/vhost-vsock";

/// Features that every driver is offered by the transport: virtio 1, event indices and indirect descriptors.
const TRANSPORT: u64 = 1 << 32 | 1 << 29 | 1 << 28;

/// Why the host's kernel does not serve a device.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// Its node cannot be opened.
    #[error("cannot open {}: {source}: {}", path.display(), help(path, source))]
    Open {
        /// The node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It lacks a feature.
    #[error("{} lacks features that the VM needs ({missing:#x}): use a newer kernel", path.display())]
    Features {
        /// The node.
        path: PathBuf,
        /// Feature bits.
        missing: u64,
    },
    /// It refused something.
    #[error("{} refused {what}: {source}", path.display())]
    Refused {
        /// The node.
        path: PathBuf,
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn help(path: &Path, error: &io::Error) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            format!("load its module with `modprobe {}`", name.replace('-', "_"))
        }
        Some(libc::EACCES | libc::EPERM) => format!(
            "let this user open it: on Debian, by `adduser USER kvm`; anywhere, by `setfacl -m u:USER:rw {}`",
            path.display()
        ),
        _ => "this kernel has no vhost, or the host is short of descriptors".to_owned(),
    }
}

/// Whether networks can be had.
///
/// # Errors
/// The node cannot be opened.
pub fn check_net() -> Result<(), VhostError> {
    let opened = File::options().read(true).write(true).open(NET);
    node(NET, opened.map_err(vhost::Error::VhostOpen)).map(drop)
}

/// What came of opening the node `path`.
///
/// # Errors
/// It cannot be opened.
pub fn node<T>(path: &str, opened: vhost::Result<T>) -> Result<T, VhostError> {
    opened.map_err(|error| VhostError::Open {
        path: path.into(),
        source: io_error(error),
    })
}

/// Makes this process the owner of a vhost device that was opened by `open`, and gives it guest RAM. `needed` are
/// features that it must have beside those of the transport.
///
/// # Errors
/// The node cannot be opened, lacks a feature, or refuses.
pub fn open<V: VhostBackend>(
    path: &str,
    ram: &RamView,
    needed: u64,
    open: impl FnOnce(Memory) -> vhost::Result<V>,
) -> Result<V, VhostError> {
    let refused = |what| {
        move |error| VhostError::Refused {
            path: path.into(),
            what,
            source: io_error(error),
        }
    };
    let vhost = node(path, open(Arc::new(ram.memory().clone())))?;
    let has = vhost
        .get_features()
        .map_err(refused("to tell its features"))?;
    let missing = (needed | TRANSPORT) & !has;
    if missing != 0 {
        let path = path.into();
        return Err(VhostError::Features { path, missing });
    }
    vhost.set_owner().map_err(refused("its owner"))?;
    let regions = ram.ranges().iter().map(|(guest, mapping)| {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: *guest,
            memory_size: mapping.size() as u64,
            userspace_addr: mapping.as_ptr().addr() as u64,
            // For servers in other processes.
            mmap_offset: 0,
            mmap_handle: -1,
        }
    });
    let regions: Vec<_> = regions.collect();
    vhost
        .set_mem_table(&regions)
        .map_err(refused("guest RAM"))?;
    Ok(vhost)
}

/// Gives a vhost device the queue that a driver has set up, as its number `index`, and has it raise the queue's
/// interrupt.
///
/// # Errors
/// The kernel refused, or a ring does not lie in one range of RAM.
pub fn give<V: VhostBackend + Send + Sync + 'static>(
    vhost: &Arc<V>,
    index: usize,
    ram: &RamView,
    active: &ActiveQueue,
) -> io::Result<()> {
    let queue = &active.queue;
    let rings = VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    };
    check(ram.memory(), &rings)?;
    vhost.set_vring_num(index, queue.size()).map_err(io_error)?;
    vhost.set_vring_base(index, 0).map_err(io_error)?;
    vhost.set_vring_addr(index, &rings).map_err(io_error)?;
    vhost
        .set_vring_kick(index, &active.kick)
        .map_err(io_error)?;
    let caller = Arc::clone(vhost);
    active.signal.follow(move |trigger| {
        if let Err(error) = caller.set_vring_call(index, trigger) {
            tracing::error!(%error, "vhost does not take the eventfd of an interrupt");
        }
    })
}

/// The kernel takes each ring by the address of its first byte: all of it must be in one mapping, or what lies behind
/// that mapping in this process would be the guest's.
fn check(memory: &GuestMemoryMmap, rings: &VringConfigData) -> io::Result<()> {
    let entries = usize::from(rings.queue_size);
    // With the event indices behind the available and the used ring (section 2.7 of the specification).
    for (at, len) in [
        (rings.desc_table_addr, 16 * entries),
        (rings.avail_ring_addr, 6 + 2 * entries),
        (rings.used_ring_addr, 6 + 8 * entries),
    ] {
        let slice = memory.get_slice(GuestAddress(at), len);
        slice.map_err(|_| io::Error::other("a ring does not lie in one range of RAM"))?;
    }
    Ok(())
}

/// The kernel's answer behind an error of the vhost crate.
pub fn io_error(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::IoctlError(error)
        | vhost::Error::IOError(error)
        | vhost::Error::VhostOpen(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use gantry_devices::mapping::HostMapping;

    use super::*;

    fn rings(at: u64) -> VringConfigData {
        VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 0,
            desc_table_addr: at,
            used_ring_addr: 0x1000,
            avail_ring_addr: 0x8000,
            log_addr: None,
        }
    }

    #[test]
    fn a_ring_never_crosses_from_one_mapping_into_another() {
        let range = |guest| {
            let mapping = HostMapping::anonymous(1 << 20, 4096).unwrap();
            (guest, Arc::new(mapping))
        };
        let ram = RamView::new(Arc::new([range(0), range(1 << 20)])).unwrap();
        let fits = |at| check(ram.memory(), &rings(at)).is_ok();
        assert!(fits(0x2000) && fits((1 << 20) - 4096) && fits(1 << 20));
        for at in [
            (1 << 20) - 4095,
            (1 << 20) - 16,
            (2 << 20) - 4095,
            2 << 20,
            u64::MAX,
        ] {
            assert!(!fits(at), "{at:#x}");
        }
    }

    #[test]
    fn what_is_missing_is_told_with_its_remedy() {
        let told = |code| {
            let source = io::Error::from_raw_os_error(code);
            let path = NET.into();
            VhostError::Open { path, source }.to_string()
        };
        assert!(told(libc::ENOENT).contains("`modprobe vhost_net`"));
        assert!(told(libc::EACCES).contains("setfacl -m u:USER:rw /dev/vhost-net"));
    }
}
