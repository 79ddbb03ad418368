//! What a failed request waits for: matching devices whose holders are about to release them.

use std::collections::BTreeSet;

use super::fit::RequestFit;
use super::host_view::HostView;
use crate::base::bdf::HostBdf;
use crate::base::host::HostPaths;
use crate::holding::passing::is_passing;
use crate::inventory::device::HostDevice;
use crate::inventory::unavailable::{Unavailable, UnavailableDevice};
use crate::pools::request::DeviceSource;

/// Devices that a request lacks.
#[derive(Debug, Default)]
pub(super) struct Shortage {
    /// Matching devices that are not available now.
    devices: BTreeSet<HostBdf>,
    /// Cards whose other functions keep them from being available.
    cards: BTreeSet<HostBdf>,
    /// The device that must be created for it.
    pub(super) made: bool,
}

impl Shortage {
    /// The shortage of a request that got too few devices.
    pub(super) fn of(look: &HostView, fit: &RequestFit) -> Self {
        let name = fit.from.as_ref().and_then(DeviceSource::pool);
        let group = name.and_then(|name| look.groups.get(name));
        Self {
            made: group.is_some_and(|group| group.vgpu.is_some()),
            ..Self::devices(look, &fit.blocked)
        }
    }

    /// The shortage of a request for these devices.
    pub(super) fn devices(look: &HostView, blocked: &[UnavailableDevice]) -> Self {
        let mut lacks = Self::default();
        for blocked in blocked.iter().filter(|blocked| may_pass(blocked)) {
            lacks.devices.insert(blocked.bdf);
            let mut devices = look.devices.iter();
            let device = devices.find(|device| device.bdf == blocked.bdf);
            let device = device.filter(|device| device.vgpu.is_some() || is_cards(blocked));
            lacks.cards.extend(device.map(card));
        }
        lacks
    }

    /// Whether a matching device is about to become free.
    pub(super) fn passes(&self, paths: &HostPaths, look: &HostView) -> bool {
        let meant = look.devices.iter();
        let meant: Vec<&HostDevice> = meant
            .filter(|one| self.devices.contains(&one.bdf))
            .collect();
        let concerned = |device: &HostDevice| {
            let mut meant = meant.iter();
            meant.any(|one| {
                let neighbours = one.iommu_group.is_some() && one.iommu_group == device.iommu_group;
                let of_card = self.cards.contains(&card(one)) && card(one) == card(device);
                one.bdf == device.bdf || neighbours || of_card
            })
        };
        let mut functions = look.devices.iter().filter(|device| device.lease.is_held());
        let mut mdevs = look.mdevs.devices.iter().filter(|one| one.lease.is_held());
        functions
            .any(|device| concerned(device) && is_passing(paths, device.bdf, device.lease.record()))
            || self.made && mdevs.any(|one| is_passing(paths, one.uuid, one.lease.record()))
    }
}

/// Whether a device becomes available once its holder, or the holder of its neighbours, releases it.
fn may_pass(blocked: &UnavailableDevice) -> bool {
    !matches!(
        blocked.why,
        Unavailable::OfTenant { .. }
            | Unavailable::OtherGroup { .. }
            | Unavailable::Changed { .. }
            | Unavailable::DeviceType { .. }
            | Unavailable::ResourceClass { .. }
            | Unavailable::Traits { .. }
            | Unavailable::Migratable { .. }
            | Unavailable::NoInterrupts { .. }
            | Unavailable::NoReset
            | Unavailable::MustNotReset { .. }
    )
}

/// Whether another function of its card keeps a device from being available.
fn is_cards(blocked: &UnavailableDevice) -> bool {
    matches!(
        blocked.why,
        Unavailable::VfHeld { .. } | Unavailable::NoVfToken { .. } | Unavailable::PfIdle { .. }
    )
}

fn card(device: &HostDevice) -> HostBdf {
    device.physfn.unwrap_or(device.bdf)
}
