//! Devices for one use: they are in quarantine from just before their use until they are released.

use super::error::AllocateError;
use crate::base::host::HostPaths;
use crate::holding::quarantine::{Until, forget_reason, quarantine};
use crate::holding::record::Holder;
use crate::inventory::device::HostDevice;
use crate::pools::group::Groups;

/// Of chosen devices those for one use. The first function of a card stands for the others.
fn for_one_use<'a>(groups: &Groups, chosen: &[&'a HostDevice]) -> Vec<&'a HostDevice> {
    let first = |device: &HostDevice| {
        let lead = device.lead.as_ref();
        !lead.is_some_and(|lead| chosen.iter().any(|one| one.bdf == lead.bdf))
    };
    let once = |device: &HostDevice| groups.tags(device).one_time_use && first(device);
    chosen
        .iter()
        .copied()
        .filter(|device| once(device))
        .collect()
}

/// Records the use of devices for one use, before they are used.
pub(super) fn use_once(
    paths: &HostPaths,
    groups: &Groups,
    chosen: &[&HostDevice],
    holder: &Holder,
) -> Result<(), AllocateError> {
    let reason = reason_of_use(holder);
    for device in for_one_use(groups, chosen) {
        if let Err(error) = quarantine(paths, device.bdf, device.id, &reason, Until::Released) {
            unused(paths, groups, chosen, holder);
            return Err(error.into());
        }
    }
    Ok(())
}

fn reason_of_use(holder: &Holder) -> String {
    format!("it was used by VM \"{}\" (one_time_use)", holder.vm)
}

/// Removes the record of [`use_once`], unless it was replaced because the device hung.
pub(super) fn unused(paths: &HostPaths, groups: &Groups, chosen: &[&HostDevice], holder: &Holder) {
    for device in for_one_use(groups, chosen) {
        if let Err(error) = forget_reason(paths, device.bdf, &reason_of_use(holder)) {
            tracing::error!("{} stays in quarantine: {error}", device.bdf);
        }
    }
}
