//! The PCI hierarchy: host bridges, the root ports on them, and one device behind each port.

use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock};

use super::registers::{CONFIG_SIZE, HEADER_MULTIFUNCTION, HEADER_TYPE};
use super::{GuestBdf, HostBridge, PciDevice, RootPort};
use crate::bus::Effect;

/// Functions of one device.
const FUNCTIONS: u8 = 8;
/// Devices on a root bus that can be made of root ports: all but the host bridge's.
const PORT_DEVICES: u8 = 31;

/// A root port of a [`PciSegment`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortIndex(usize);

impl PortIndex {
    /// The port's number, from 0 on in the order in which ports were added.
    pub const fn get(self) -> usize {
        self.0
    }
}

/// Why the hierarchy cannot be as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Two host bridges have buses in common, or one has none.
    #[error("buses {first:#04x} to {last:#04x} of a host bridge are none or taken")]
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
    /// Something is there already, or the function number is over 7.
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
    /// Where the port itself is.
    at: GuestBdf,
    port: Arc<RootPort>,
    /// Device 0 of the bus behind the port. The lock is held only to look, never while a function
    /// runs.
    functions: RwLock<[Option<Arc<dyn PciDevice>>; FUNCTIONS as usize]>,
}

/// What answers at an address, and whether its device has other functions too.
struct Target {
    device: Arc<dyn PciDevice>,
    multifunction: bool,
}

/// PCI segment 0 of the guest.
///
/// The tree of host bridges and root ports stands when the guest starts; functions come and go
/// behind the ports. Configuration accesses find their way by the bus numbers that the guest has
/// written to the ports.
pub struct PciSegment {
    roots: Vec<Root>,
    ports: Vec<Port>,
}

impl PciSegment {
    /// A segment with a host bridge for each range of bus numbers.
    ///
    /// # Errors
    /// A range is empty, or two ranges meet.
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
        });
        Ok(PortIndex(index))
    }

    /// Puts `device` behind `port` as function `function`, and returns where the guest has it now.
    ///
    /// A guest looks for other functions only where it finds function 0: attach that one last.
    ///
    /// # Errors
    /// There is no such port or function number, or something is there already.
    pub fn attach(
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
    pub fn detach(&self, port: PortIndex, function: u8) -> Option<Arc<dyn PciDevice>> {
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

    /// The root ports and where they are.
    pub fn ports(&self) -> impl Iterator<Item = (PortIndex, GuestBdf, &Arc<RootPort>)> {
        self.ports
            .iter()
            .enumerate()
            .map(|(index, port)| (PortIndex(index), port.at, &port.port))
    }

    /// The functions behind a port, by number.
    pub fn functions_behind(&self, port: PortIndex) -> Vec<(u8, Arc<dyn PciDevice>)> {
        self.ports
            .get(port.0)
            .map_or_else(Vec::new, Port::functions)
    }

    /// Every function there is, where the guest has it now: host bridges, root ports, and what is
    /// behind the ports.
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

    /// Fills `data` from the configuration space of the function at `at`; all ones where there is
    /// none, and for accesses that are not 1, 2 or 4 bytes, naturally aligned.
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
            // Whether there are other functions depends on what was attached, not on the function.
            *header_type &= !HEADER_MULTIFUNCTION;
            if target.multifunction {
                *header_type |= HEADER_MULTIFUNCTION;
            }
        }
    }

    /// Takes a write to the configuration space of the function at `at`. It is lost where
    /// [`Self::read_config`] would read all ones.
    pub fn write_config(&self, at: GuestBdf, offset: u16, data: &[u8]) -> Effect {
        if !is_valid(offset, data.len()) {
            return Effect::None;
        }
        match self.find(at) {
            Some(Target { device, .. }) if device.write_config(offset, data) => {
                Effect::Remap(device)
            }
            _ => Effect::None,
        }
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
                multifunction: false,
            });
        }
        let port = self.ports.iter().find(|port| port.at == at)?;
        let siblings = self
            .ports
            .iter()
            .filter(|port| (port.at.bus(), port.at.device()) == (bus, at.device()));
        Some(Target {
            device: Arc::clone(&port.port) as _,
            multifunction: siblings.count() > 1,
        })
    }

    /// A root port forwards to the one device on its link, device 0.
    fn find_behind(&self, root_bus: u8, at: GuestBdf) -> Option<Target> {
        if at.device() != 0 {
            return None;
        }
        let port = self
            .ports
            .iter()
            .filter(|port| port.at.bus() == root_bus)
            .find(|port| port.port.secondary_bus() == at.bus())?;
        let functions = port
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let device = functions.get(usize::from(at.function()))?.as_ref()?;
        Some(Target {
            device: Arc::clone(device),
            multifunction: functions.iter().flatten().count() > 1,
        })
    }
}

impl Port {
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

/// Whether functions take an access like this.
fn is_valid(offset: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4)
        && usize::from(offset).is_multiple_of(len)
        && usize::from(offset) + len <= usize::from(CONFIG_SIZE)
}

#[cfg(test)]
mod tests {
    use super::super::BarKind;
    use super::super::fake::{Endpoint, Event, FakeSpace, bar};
    use super::*;

    fn bdf(bus: u8, device: u8, function: u8) -> GuestBdf {
        GuestBdf::new(bus, device, function).unwrap()
    }

    fn segment(ports: usize) -> PciSegment {
        let mut segment = PciSegment::new([0..=0xff]).unwrap();
        for _ in 0..ports {
            segment.add_root_port(0).unwrap();
        }
        segment
    }

    fn dword(segment: &PciSegment, at: GuestBdf, offset: u16) -> u32 {
        let mut data = [0; 4];
        segment.read_config(at, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn header_type(segment: &PciSegment, at: GuestBdf) -> u8 {
        let byte = |offset, len| {
            let mut data = [0; 4];
            segment.read_config(at, offset, &mut data[..len]);
            data[len - 1]
        };
        let seen = [byte(0x0e, 1), (dword(segment, at, 0x0c) >> 16) as u8];
        assert_eq!(seen[0], seen[1]);
        seen[0]
    }

    #[test]
    fn ports_fill_multifunction_slots() {
        let segment = segment(9);
        let at: Vec<_> = segment.ports().map(|(_, at, _)| at.to_string()).collect();
        assert_eq!(at[0], "0000:00:01.0");
        assert_eq!(at[7], "0000:00:01.7");
        assert_eq!(at[8], "0000:00:02.0");
        assert_eq!(header_type(&segment, bdf(0, 0, 0)), 0);
        assert_eq!(header_type(&segment, bdf(0, 1, 0)), 0x81);
        assert_eq!(header_type(&segment, bdf(0, 1, 7)), 0x81);
        assert_eq!(header_type(&segment, bdf(0, 2, 0)), 1);
        for empty in [bdf(0, 0, 1), bdf(0, 2, 1), bdf(0, 3, 0), bdf(1, 0, 0)] {
            assert_eq!(dword(&segment, empty, 0), u32::MAX, "{empty}");
        }
    }

    #[test]
    fn functions_are_reached_through_the_bus_number_of_their_port() {
        let segment = segment(2);
        let ports: Vec<_> = segment.ports().map(|(index, ..)| index).collect();
        let at = segment
            .attach(ports[1], 0, Endpoint::new(0x77, []))
            .unwrap();
        assert_eq!(at, bdf(2, 0, 0));
        assert_eq!(dword(&segment, at, 0), 0x0077_1234);
        for empty in [bdf(2, 1, 0), bdf(2, 0, 1), bdf(1, 0, 0), bdf(9, 0, 0)] {
            assert_eq!(dword(&segment, empty, 0), u32::MAX, "{empty}");
        }
        let _ = segment.write_config(bdf(0, 1, 1), 0x19, &[9]);
        assert_eq!(dword(&segment, at, 0), u32::MAX);
        assert_eq!(dword(&segment, bdf(9, 0, 0), 0), 0x0077_1234);
        let all: Vec<_> = segment.functions().iter().map(|(at, _)| *at).collect();
        let ports = [bdf(0, 1, 0), bdf(0, 1, 1)];
        assert_eq!(all, [bdf(0, 0, 0), ports[0], ports[1], bdf(9, 0, 0)]);
    }

    #[test]
    fn the_multifunction_bit_follows_what_is_attached() {
        let segment = segment(1);
        let port = PortIndex(0);
        segment.attach(port, 0, Endpoint::new(1, [])).unwrap();
        assert_eq!(header_type(&segment, bdf(1, 0, 0)), 0);
        segment.attach(port, 1, Endpoint::new(2, [])).unwrap();
        assert_eq!(header_type(&segment, bdf(1, 0, 0)), 0x80);
        assert_eq!(dword(&segment, bdf(1, 0, 1), 0), 0x0002_1234);
        assert!(segment.detach(port, 1).is_some());
        assert!(segment.detach(port, 1).is_none());
        assert_eq!(header_type(&segment, bdf(1, 0, 0)), 0);
    }

    #[test]
    fn the_slot_is_occupied_until_the_last_function_goes() {
        let segment = segment(1);
        let port = PortIndex(0);
        let present = || dword(&segment, bdf(0, 1, 0), 0x58) >> 22 & 1;
        assert_eq!(present(), 0);
        segment.attach(port, 0, Endpoint::new(1, [])).unwrap();
        segment.attach(port, 3, Endpoint::new(1, [])).unwrap();
        segment.detach(port, 0);
        assert_eq!(present(), 1);
        segment.detach(port, 3);
        assert_eq!(present(), 0);
    }

    #[test]
    fn a_write_that_moves_bars_asks_for_a_remap() {
        let segment = segment(1);
        let kind = BarKind::Memory32 {
            prefetchable: false,
        };
        let device = Endpoint::new(1, [bar(0, kind, 0x1000)]);
        let at = segment.attach(PortIndex(0), 0, device).unwrap();
        let address = 0xc000_0000_u32.to_le_bytes();
        assert!(matches!(
            segment.write_config(at, 0x10, &address),
            Effect::None
        ));
        let space = FakeSpace::default();
        let Effect::Remap(device) = segment.write_config(at, 4, &[2, 0]) else {
            panic!("memory decoding maps the BAR");
        };
        device.remap(&space);
        assert_eq!(space.events(), [Event::Map(0xc000_0000)]);
        assert!(matches!(segment.write_config(at, 4, &[2, 0]), Effect::None));
    }

    #[test]
    fn accesses_that_functions_do_not_take_are_refused() {
        let segment = segment(1);
        for (offset, len) in [
            (1, 2),
            (2, 4),
            (3, 2),
            (0, 3),
            (0, 8),
            (0xffe, 4),
            (0x1000, 1),
        ] {
            let mut data = vec![0; len];
            segment.read_config(bdf(0, 0, 0), offset, &mut data);
            assert_eq!(data, vec![0xff; len], "{offset:#x}");
            let _ = segment.write_config(bdf(0, 1, 0), offset, &data);
        }
        assert_eq!(dword(&segment, bdf(0, 1, 0), 4) & 0xffff, 0);
    }

    #[test]
    fn host_bridges_share_out_the_buses() {
        let mut segment = PciSegment::new([0..=0x0f, 0x80..=0x81]).unwrap();
        segment.add_root_port(0).unwrap();
        let far = segment.add_root_port(1).unwrap();
        let full = SegmentError::Full {
            bridge: 1,
            ports: 1,
        };
        assert_eq!(segment.add_root_port(1), Err(full));
        let missing = SegmentError::NoBridge { bridge: 2 };
        assert_eq!(segment.add_root_port(2), Err(missing));
        let at = segment.attach(far, 0, Endpoint::new(5, [])).unwrap();
        assert_eq!(at, bdf(0x81, 0, 0));
        assert_eq!(dword(&segment, bdf(0x80, 0, 0), 0), 0x0008_1b36);
        assert_eq!(dword(&segment, at, 0), 0x0005_1234);
        // A port cannot reach into the buses of another host bridge.
        let _ = segment.write_config(bdf(0, 1, 0), 0x19, &[0x81]);
        assert_eq!(dword(&segment, at, 0), 0x0005_1234);
        assert_eq!(
            segment.bridges().collect::<Vec<_>>(),
            [0..=0x0f, 0x80..=0x81]
        );
    }

    #[test]
    fn hierarchies_that_make_no_sense_are_refused() {
        for bridges in [vec![0..=0x10, 0x10..=0x20], vec![RangeInclusive::new(5, 4)]] {
            assert!(matches!(
                PciSegment::new(bridges),
                Err(SegmentError::Buses { .. })
            ));
        }
        let mut full = segment(248);
        let refused = SegmentError::Full {
            bridge: 0,
            ports: 248,
        };
        assert_eq!(full.add_root_port(0), Err(refused));
        let (last, at, port) = full.ports().last().unwrap();
        assert_eq!(
            (last.get(), at, port.secondary_bus()),
            (247, bdf(0, 31, 7), 248)
        );
        let device = || Endpoint::new(1, []);
        full.attach(last, 0, device()).unwrap();
        for function in [0, 8, 255] {
            let refused = SegmentError::Function {
                port: 247,
                function,
            };
            assert_eq!(full.attach(last, function, device()), Err(refused));
        }
        let missing = full.attach(PortIndex(248), 0, device());
        assert_eq!(missing, Err(SegmentError::NoPort { port: 248 }));
    }
}
