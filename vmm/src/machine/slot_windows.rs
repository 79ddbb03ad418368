//! The windows of the root ports, which limit the devices that can be plugged in while the guest runs.

use std::collections::BTreeMap;
use std::ops::Range;

use gantry_devices::pci::firmware::{
    self, FirmwareError, HostWindows, IO_GRANULARITY, Minimum, WindowKind,
};
use gantry_devices::pci::{PciSegment, PortIndex, PortWindows};

/// The windows of the slots. Empty slots have windows, too.
pub struct SlotWindows {
    /// Number of the first port that is empty at the start.
    first: usize,
    /// Bytes of 64-bit addresses that each such port is to have, if the VM's file says so.
    requested: Option<u64>,
    /// What each empty port got, by host bridge.
    shares: BTreeMap<usize, Share>,
    /// The windows of all ports.
    given: BTreeMap<PortIndex, PortWindows>,
}

/// What each port that is empty at the start gets.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// Bytes of addresses below 4 GiB.
    mem32: u64,
    /// Bytes of 64-bit addresses.
    mem64: u64,
    /// How many of them, counted from the last, get I/O ports: there are few. Slots are filled from the first
    /// on, and most devices have no I/O BAR.
    with_io: usize,
}

/// The most 64-bit addresses that a slot gets by default: enough for the largest BARs there are.
const MAX_SHARE64: u64 = 256 << 30;
/// The most addresses below 4 GiB: few devices have more than one BAR of 16 MiB there.
const MAX_SHARE32: u64 = 256 << 20;
/// The least that is worth having.
const MIN_SHARE64: u64 = 1 << 20;

impl SlotWindows {
    /// No windows yet. The ports from number `first` on are empty at the start; each is to have `requested`
    /// bytes of 64-bit addresses, if that is given.
    pub fn new(first: usize, requested: Option<u64>) -> Self {
        Self {
            first,
            requested,
            shares: BTreeMap::new(),
            given: BTreeMap::new(),
        }
    }

    /// The windows of a port, as assigned at the guest's last boot.
    pub fn of(&self, port: PortIndex) -> PortWindows {
        self.given.get(&port).cloned().unwrap_or_default()
    }

    /// Assigns windows and BAR addresses to the ports of a host bridge and the functions behind them.
    ///
    /// # Errors
    /// A window of the host bridge does not hold what is behind its ports.
    pub fn assign(
        &mut self,
        pci: &PciSegment,
        bridge: usize,
        host: &HostWindows,
    ) -> Result<(), FirmwareError> {
        let ports = pci.ports_of(bridge).map(|(port, ..)| port);
        let empty: Vec<PortIndex> = ports.filter(|port| port.get() >= self.first).collect();
        let before = self.shares.get(&bridge).copied();
        let mut share = before.unwrap_or_else(|| self.even(host, empty.len() as u64));
        let plans = loop {
            let without_io = empty.len().saturating_sub(share.with_io);
            let with_io = empty.get(without_io).copied();
            let minimum = |port: PortIndex| match port.get() {
                number if number < self.first => Minimum::default(),
                _ => Minimum {
                    mem32: share.mem32,
                    mem64: share.mem64,
                    io: IO_GRANULARITY * u64::from(with_io.is_some_and(|first| port >= first)),
                },
            };
            match firmware::assign(pci, bridge, host, minimum) {
                Err(error) if !empty.is_empty() && self.shrink(&mut share, error.kind()) => {}
                plans => break plans?,
            }
        };
        self.shares.insert(bridge, share);
        let given = plans.into_iter().map(|(port, plan)| (port, plan.windows));
        self.given.extend(given);
        Ok(())
    }

    /// Even shares of a part of the bridge's windows. The rest is for the devices at boot.
    fn even(&self, host: &HostWindows, empty: u64) -> Share {
        let len = |range: &Range<u64>| range.end.saturating_sub(range.start) / empty.max(1);
        let least = Minimum::default().mem32;
        let mem32 = (len(&host.mem32) / 4 * 3).clamp(least, MAX_SHARE32);
        let mem64 = (len(&host.mem64) / 2).clamp(MIN_SHARE64, MAX_SHARE64);
        let windows = (host.io.end.saturating_sub(host.io.start) / IO_GRANULARITY).min(empty);
        Share {
            mem32: 1 << mem32.ilog2(),
            mem64: self.requested.unwrap_or(1 << mem64.ilog2()),
            with_io: windows as usize,
        }
    }

    /// Makes a share that did not fit smaller. Returns `false` if it cannot be smaller.
    fn shrink(&self, share: &mut Share, kind: WindowKind) -> bool {
        if kind == WindowKind::Io {
            let more = share.with_io > 0;
            share.with_io = share.with_io.saturating_sub(1);
            return more;
        }
        if share.mem32 > Minimum::default().mem32 {
            share.mem32 /= 2;
            return true;
        }
        let more = self.requested.is_none() && share.mem64 > MIN_SHARE64;
        if more {
            share.mem64 /= 2;
        }
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn host() -> HostWindows {
        HostWindows {
            mem32: 2 * GIB..3 * GIB + GIB / 2,
            mem64: 4 * GIB..1024 * GIB,
            io: 0x1000..0x1_0000,
        }
    }

    fn windows(requested: Option<u64>) -> SlotWindows {
        SlotWindows::new(1, requested)
    }

    fn segment(ports: usize) -> PciSegment {
        let mut segment = PciSegment::new([0..=0xff]).unwrap();
        for _ in 0..ports {
            segment.add_root_port(0).unwrap();
        }
        segment
    }

    #[test]
    fn empty_slots_share_what_there_is() {
        for (empty, mem32, mem64) in [(1, 256 << 20, 256 * GIB), (32, 32 << 20, 8 * GIB)] {
            let segment = segment(empty + 1);
            let mut windows = windows(None);
            windows.assign(&segment, 0, &host()).unwrap();
            let len = |window: &Option<Range<u64>>| {
                window
                    .as_ref()
                    .map_or(0, |window| window.end - window.start)
            };
            let all: Vec<_> = windows.given.values().cloned().collect();
            assert_eq!(len(&all[0].mem64), 0, "there from the start");
            for given in &all[1..] {
                assert_eq!((len(&given.mem32), len(&given.mem64)), (mem32, mem64));
            }
            // 60 KiB of I/O ports, and the first slots go without.
            let with_io = all.iter().map(|given| len(&given.io));
            let mut expected = vec![0; empty + 1];
            expected[(empty + 1).saturating_sub(15).max(1)..].fill(0x1000);
            assert!(with_io.eq(expected));
            let before = windows.given.clone();
            windows.assign(&segment, 0, &host()).unwrap();
            assert_eq!(windows.given, before, "the same at a reboot");
        }
    }

    #[test]
    fn io_ports_that_others_need_are_done_without() {
        let mut few = host();
        few.io = 0x1000..0x4000;
        let segment = segment(6);
        let mut shared = windows(None);
        shared.assign(&segment, 0, &few).unwrap();
        assert_eq!(shared.shares.get(&0).map(|share| share.with_io), Some(3));
        // As after a reboot with fewer left.
        few.io = 0x1000..0x3000;
        shared.assign(&segment, 0, &few).unwrap();
        assert_eq!(shared.shares.get(&0).map(|share| share.with_io), Some(2));
        few.io = 0x1000..0x1000;
        windows(None).assign(&segment, 0, &few).unwrap();
    }

    #[test]
    fn shares_shrink_until_they_fit_and_wishes_do_not() {
        let mut small = host();
        small.mem32 = 2 * GIB..2 * GIB + (544 << 20);
        let segment = segment(33);
        let mut shared = windows(None);
        shared.assign(&segment, 0, &small).unwrap();
        assert_eq!(
            shared.shares.get(&0).map(|share| share.mem32),
            Some(16 << 20)
        );
        let refused = windows(Some(128 * GIB)).assign(&segment, 0, &host());
        assert!(matches!(refused, Err(FirmwareError::Slot { .. })));
        let segment = self::segment(5);
        windows(Some(128 * GIB))
            .assign(&segment, 0, &host())
            .unwrap();
    }
}
