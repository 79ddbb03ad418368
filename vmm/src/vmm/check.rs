//! Checks a VM without starting it: loads its kernel and initramfs into memory that is discarded.

use std::io;

use gantry_resources::base::HostPaths;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::config::VmConfig;
use crate::disks;
use crate::error::Error;
use crate::host::preflight;
use crate::layout::{Layout, LayoutInputs};
use crate::process::error::cannot;
use crate::virtio::OpenDevices;
use crate::vm::OpenPayload;

/// As much of the VM's memory as the check needs: kernels and their initramfs lie below 4 GiB.
const ENOUGH: u64 = 4 << 30;

/// Checks that the host has room for the VM, that its disks, taps and the like can be opened, and that its kernel and
/// initramfs can be booted and fit into its memory. Returns all that is wrong.
pub fn check(config: &VmConfig, host: &HostPaths) -> Vec<Error> {
    let checks = [
        preflight::check_host(config, host).map_err(Error::from),
        disks::open_all(config).map(drop).map_err(Error::from),
        OpenDevices::open(config, host)
            .map(drop)
            .map_err(Error::from),
        check_payload(config),
    ];
    checks.into_iter().filter_map(Result::err).collect()
}

fn check_payload(config: &VmConfig) -> Result<(), Error> {
    let layout = Layout::plan(&LayoutInputs {
        root_ports: 0,
        ram: config.memory.bytes().min(ENOUGH),
        physical_bits: 46,
        iova: &[],
        reserved: &[],
    })?;
    let ram = layout.ram.iter();
    let ranges: Vec<_> = ram
        .map(|range| (GuestAddress(range.start), range.len as usize))
        .collect();
    // Private and not reserved: only pages that are written take memory.
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges)
        .map_err(io::Error::other)
        .map_err(cannot("make memory to load the kernel into"))?;
    let rsdp = GuestAddress(layout.acpi.start);
    OpenPayload::open(config)?.boot(&memory, &layout, rsdp)?;
    Ok(())
}
