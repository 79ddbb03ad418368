//! The PCI hierarchy: host bridges, the root ports on them, and one device behind each port.

use std::cell::Cell;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::registers::{CONFIG_SIZE, HEADER_MULTIFUNCTION, HEADER_TYPE};
use super::{
    BarGuard, BarPlacement, BarSpace, BarSpaceError, GuestBdf, HostBridge, PortWindows, RootPort,
};
use crate::device::{Effect, PciDevice, PortIndex};

/// Functions of one device.
const FUNCTIONS: u8 = 8;
/// Devices on a root bus that can be made of root ports: all but the host bridge's.
const PORT_DEVICES: u8 = 31;

/// Why the hierarchy cannot be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Two host bridges have buses in common, or one has none.
    #[error("the range of buses {first:#04x} to {last:#04x} of a host bridge is empty or taken")]
    Buses {
        /// The host bridge's first bus.
        first: u8,
        /// Its last bus.
        last: u8,
    },
    /// There is no such host bridge.
    #[error("there is no host bridge {bridge}")]
    NoBridge {
        /// Its place in the list.
        bridge: usize,
    },
    /// All device or bus numbers of a host bridge are in use.
    #[error("host bridge {bridge} has no room for another root port after {ports}")]
    Full {
        /// The host bridge's place in the list.
        bridge: usize,
        /// Root ports on it.
        ports: usize,
    },
    /// There is no such root port.
    #[error("there is no root port {port}")]
    NoPort {
        /// Its number.
        port: usize,
    },
    /// The slot has such a function already, or the function number is over 7.
    #[error("function {function} behind root port {port} is taken or does not exist")]
    Function {
        /// The root port's number.
        port: usize,
        /// The function number.
        function: u8,
    },
}

struct Root {
    buses: RangeInclusive<u8>,
    bridge: Arc<HostBridge>,
}

struct Port {
    /// The address of the port itself.
    at: GuestBdf,
    port: Arc<RootPort>,
    /// Device 0 of the bus behind the port. Locked only for the look-up, never during an access to a
    /// function.
    functions: RwLock<[Option<Arc<dyn PciDevice>>; FUNCTIONS as usize]>,
    /// Held while the functions are remapped, so that what `refused` says is of the last time.
    remapping: Mutex<()>,
    /// A BAR behind the port could not be mapped.
    refused: AtomicBool,
}

/// The function at an address, the port that it is or is behind, and whether its device has more functions.
struct Target {
    device: Arc<dyn PciDevice>,
    port: Option<PortIndex>,
    multifunction: bool,
}

/// The address space as a port forwards it, for one remap.
struct Forwarded<'s> {
    space: &'s dyn BarSpace,
    windows: PortWindows,
    refused: Cell<bool>,
}

impl BarSpace for Forwarded<'_> {
    /// A BAR lies in one window as a whole.
    fn forwards(&self, placement: &BarPlacement) -> bool {
        let PortWindows { mem32, mem64, io } = &self.windows;
        let windows = match placement.io {
            true => [io, &None],
            false => [mem32, mem64],
        };
        let end = placement.base.saturating_add(placement.size);
        let mut windows = windows.into_iter().flatten();
        windows.any(|window| window.start <= placement.base && end <= window.end)
    }

    fn map(&self, placement: &BarPlacement) -> Result<BarGuard, BarSpaceError> {
        let mapped = self.space.map(placement);
        if mapped.is_err() {
            self.refused.set(true);
        }
        mapped
    }
}

/// PCI segment 0 of the guest.
///
/// The tree of host bridges and root ports is complete when the guest starts; functions are added and
/// removed behind the ports. The bus numbers that the guest writes to the ports route configuration accesses.
pub struct PciSegment {
    roots: Vec<Root>,
    ports: Vec<Port>,
}

impl PciSegment {
    /// A segment with a host bridge for each range of bus numbers.
    ///
    /// # Errors
    /// A range is empty, or two ranges overlap.
    pub fn new(
        bridges: impl IntoIterator<Item = RangeInclusive<u8>>,
    ) -> Result<Self, SegmentError> {
        let mut roots: Vec<Root> = Vec::new();
        for buses in bridges {
            let (first, last) = (*buses.start(), *buses.end());
            let taken = roots
                .iter()
                .any(|root| first <= *root.buses.end() && *root.buses.start() <= last);
            if taken || buses.is_empty() {
                return Err(SegmentError::Buses { first, last });
            }
            let bridge = Arc::new(HostBridge::new());
            roots.push(Root { buses, bridge });
        }
        let ports = Vec::new();
        Ok(Self { roots, ports })
    }

    /// Adds a root port to the host bridge at `bridge` in the list: the next function of the devices
    /// 1, 2, ... of its bus, with the bridge's next bus behind it and an empty slot.
    ///
    /// # Errors
    /// There is no such bridge, or no device or bus number is left.
    pub fn add_root_port(&mut self, bridge: usize) -> Result<PortIndex, SegmentError> {
        let root = self
            .roots
            .get(bridge)
            .ok_or(SegmentError::NoBridge { bridge })?;
        let (first, last) = (*root.buses.start(), *root.buses.end());
        let on_bridge = self.ports.iter().filter(|port| port.at.bus() == first);
        let ports = on_bridge.count();
        let full = SegmentError::Full { bridge, ports };
        let number = u8::try_from(ports).map_err(|_| full)?;
        let device = number / FUNCTIONS + 1;
        let secondary = first
            .checked_add(1)
            .and_then(|bus| bus.checked_add(number))
            .filter(|bus| *bus <= last && device <= PORT_DEVICES)
            .ok_or(full)?;
        let at = GuestBdf::new(first, device, number % FUNCTIONS).map_err(|_| full)?;
        let index = self.ports.len();
        self.ports.push(Port {
            at,
            // Slot 0 is no slot.
            port: Arc::new(RootPort::new(first, secondary, index as u16 + 1)),
            functions: RwLock::default(),
            remapping: Mutex::default(),
            refused: AtomicBool::new(false),
        });
        Ok(PortIndex(index))
    }

    /// Puts a function into the slot of `port` as number `function`, until the returned guard is dropped.
    ///
    /// A guest looks for other functions only if it finds function 0: plug that one in last.
    ///
    /// # Errors
    /// There is no such port or function number, or the slot has such a function already.
    pub fn plug(
        self: &Arc<Self>,
        port: PortIndex,
        function: u8,
        device: Arc<dyn PciDevice>,
    ) -> Result<SlotGuard, SegmentError> {
        self.attach(port, function, device)?;
        Ok(SlotGuard {
            segment: Arc::clone(self),
            port,
            function,
        })
    }

    /// Puts `device` behind `port` as function `function`. Returns its address in the guest.
    ///
    /// # Errors
    /// As [`Self::plug`].
    pub(crate) fn attach(
        &self,
        port: PortIndex,
        function: u8,
        device: Arc<dyn PciDevice>,
    ) -> Result<GuestBdf, SegmentError> {
        let PortIndex(index) = port;
        let refused = SegmentError::Function {
            port: index,
            function,
        };
        let port = self
            .ports
            .get(index)
            .ok_or(SegmentError::NoPort { port: index })?;
        let at = GuestBdf::new(port.port.secondary_bus(), 0, function).map_err(|_| refused)?;
        let mut functions = port
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        match functions.get_mut(usize::from(function)) {
            Some(free @ None) => *free = Some(device),
            _ => return Err(refused),
        }
        port.port.set_occupied(true);
        Ok(at)
    }

    /// Takes a function away from behind `port`, if it is there.
    pub(crate) fn detach(&self, port: PortIndex, function: u8) -> Option<Arc<dyn PciDevice>> {
        let port = self.ports.get(port.0)?;
        let mut functions = port
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let device = functions.get_mut(usize::from(function))?.take();
        port.port
            .set_occupied(functions.iter().any(Option::is_some));
        device
    }

    /// The buses of each host bridge, its own first.
    pub fn bridges(&self) -> impl Iterator<Item = RangeInclusive<u8>> {
        self.roots.iter().map(|root| root.buses.clone())
    }

    /// The root ports and their addresses.
    pub fn ports(&self) -> impl Iterator<Item = (PortIndex, GuestBdf, &Arc<RootPort>)> {
        self.ports
            .iter()
            .enumerate()
            .map(|(index, port)| (PortIndex(index), port.at, &port.port))
    }

    /// The root ports of the host bridge at `bridge` in the list, and where they are.
    pub fn ports_of(
        &self,
        bridge: usize,
    ) -> impl Iterator<Item = (PortIndex, GuestBdf, &Arc<RootPort>)> {
        let bus = self.roots.get(bridge).map(|root| *root.buses.start());
        self.ports().filter(move |(_, at, _)| Some(at.bus()) == bus)
    }

    /// The functions behind a port, by number.
    pub fn functions_behind(&self, port: PortIndex) -> Vec<(u8, Arc<dyn PciDevice>)> {
        self.ports
            .get(port.0)
            .map_or_else(Vec::new, Port::functions)
    }

    /// The host bridges and the root ports.
    pub fn bridges_and_ports(&self) -> impl Iterator<Item = &dyn PciDevice> {
        let bridges = self.roots.iter().map(|root| &*root.bridge as _);
        bridges.chain(self.ports.iter().map(|port| &*port.port as _))
    }

    /// All functions at their addresses in the guest: host bridges, root ports, and the functions behind the
    /// ports.
    pub fn functions(&self) -> Vec<(GuestBdf, Arc<dyn PciDevice>)> {
        let mut all: Vec<(GuestBdf, Arc<dyn PciDevice>)> = Vec::new();
        for root in &self.roots {
            let at = GuestBdf::from_bits(u16::from(*root.buses.start()) << 8);
            all.push((at, Arc::clone(&root.bridge) as _));
        }
        for port in &self.ports {
            all.push((port.at, Arc::clone(&port.port) as _));
        }
        for port in &self.ports {
            let bus = u16::from(port.port.secondary_bus()) << 8;
            for (function, device) in port.functions() {
                all.push((GuestBdf::from_bits(bus | u16::from(function)), device));
            }
        }
        all
    }

    /// Fills `data` from the configuration space of the function at `at`; all ones if there is none, and for
    /// accesses that are not 1, 2 or 4 bytes, naturally aligned.
    pub fn read_config(&self, at: GuestBdf, offset: u16, data: &mut [u8]) {
        let target = if is_valid(offset, data.len()) {
            self.find(at)
        } else {
            None
        };
        let Some(target) = target else {
            data.fill(0xff);
            return;
        };
        target.device.read_config(offset, data);
        if let Some(header_type) = HEADER_TYPE
            .checked_sub(offset)
            .and_then(|index| data.get_mut(usize::from(index)))
        {
            // The slot knows whether there are other functions; the function does not.
            *header_type &= !HEADER_MULTIFUNCTION;
            if target.multifunction {
                *header_type |= HEADER_MULTIFUNCTION;
            }
        }
    }

    /// Takes a write to the configuration space of the function at `at`. It is lost if [`Self::read_config`]
    /// would read all ones.
    pub fn write_config(&self, at: GuestBdf, offset: u16, data: &[u8]) -> Effect {
        if !is_valid(offset, data.len()) {
            return Effect::None;
        }
        let Some(Target { device, port, .. }) = self.find(at) else {
            return Effect::None;
        };
        let changed = device.write_config(offset, data);
        port.filter(|_| changed).map_or(Effect::None, Effect::Remap)
    }

    /// Makes the mappings in `space` those of the BARs behind `port`: of the BARs that their functions decode, those
    /// that lie in a window of the port. Then tries again what was refused before, here or elsewhere: what was in its
    /// place may have moved.
    pub fn remap(&self, port: PortIndex, space: &dyn BarSpace) {
        if let Some(port) = self.ports.get(port.0) {
            port.remap(space);
            self.retry_refused(space);
        }
    }

    /// Tries again to map the BARs that could not be mapped.
    pub fn retry_refused(&self, space: &dyn BarSpace) {
        let ports = self.ports.iter();
        let refused = ports.filter(|port| port.refused.load(Ordering::Relaxed));
        refused.for_each(|port| port.remap(space));
    }

    fn find(&self, at: GuestBdf) -> Option<Target> {
        let root = self
            .roots
            .iter()
            .find(|root| root.buses.contains(&at.bus()))?;
        let bus = *root.buses.start();
        if at.bus() != bus {
            return self.find_behind(bus, at);
        }
        if at.device() == 0 {
            return (at.function() == 0).then(|| Target {
                device: Arc::clone(&root.bridge) as _,
                port: None,
                multifunction: false,
            });
        }
        let index = self.ports.iter().position(|port| port.at == at)?;
        let port = self.ports.get(index)?;
        let siblings = self
            .ports
            .iter()
            .filter(|port| (port.at.bus(), port.at.device()) == (bus, at.device()));
        Some(Target {
            device: Arc::clone(&port.port) as _,
            port: Some(PortIndex(index)),
            multifunction: siblings.count() > 1,
        })
    }

    /// A root port forwards to the one device on its link, device 0.
    fn find_behind(&self, root_bus: u8, at: GuestBdf) -> Option<Target> {
        if at.device() != 0 {
            return None;
        }
        let leads_there =
            |port: &Port| port.at.bus() == root_bus && port.port.secondary_bus() == at.bus();
        let index = self.ports.iter().position(leads_there)?;
        let port = self.ports.get(index)?;
        let functions = port
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let device = functions.get(usize::from(at.function()))?.as_ref()?;
        Some(Target {
            device: Arc::clone(device),
            port: Some(PortIndex(index)),
            multifunction: functions.iter().flatten().count() > 1,
        })
    }
}

/// A function in the slot of a root port. Dropping it takes the function out of the slot.
pub struct SlotGuard {
    segment: Arc<PciSegment>,
    port: PortIndex,
    function: u8,
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        self.segment.detach(self.port, self.function);
    }
}

impl Port {
    fn remap(&self, space: &dyn BarSpace) {
        let _turn = self
            .remapping
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let forwarded = Forwarded {
            space,
            windows: self.port.forwards(),
            refused: Cell::new(false),
        };
        for (_, function) in self.functions() {
            function.remap(&forwarded);
        }
        self.refused
            .store(forwarded.refused.get(), Ordering::Relaxed);
    }

    fn functions(&self) -> Vec<(u8, Arc<dyn PciDevice>)> {
        let functions = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        (0..)
            .zip(functions.iter())
            .filter_map(|(function, device)| Some((function, Arc::clone(device.as_ref()?))))
            .collect()
    }
}

/// Whether a function accepts such an access.
fn is_valid(offset: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4)
        && usize::from(offset).is_multiple_of(len)
        && usize::from(offset) + len <= usize::from(CONFIG_SIZE)
}

#[cfg(test)]
mod tests;
