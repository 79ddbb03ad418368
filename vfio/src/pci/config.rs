//! The guest's view of a device's configuration space, planned once from the device's own.
//!
//! Registers are passed through, with these exceptions. The BARs, the command register, the power state, MSI
//! and the MSI-X control are emulated: the hardware's own registers follow in another form or not at all.
//! [`capabilities`] says which capabilities are hidden, and which the guest only reads.

use gantry_devices::pci::capability::{walk_extended, walk_standard};
use gantry_devices::pci::interrupts::{InBar, MsiLayout, MsixLayout};
use gantry_devices::pci::registers as reg;
use gantry_devices::pci::{Area, Capability, CapabilityId, ConfigSpace};
use gantry_devices::pci::{ExtendedCapability, ExtendedCapabilityId};

use super::capabilities::{self, Treatment};

/// The header, which every function has. Mediated devices may have less than 256 bytes in all: some of the
/// kernel's samples end a byte short.
const HEADER_SIZE: usize = 64;
/// Offset of the first extended capability.
const EXTENDED_START: u16 = 0x100;
/// The bits of the command register that a guest may set. The others are reserved or have no
/// meaning in PCI Express (PCI Express Base Specification 6.0, 7.5.1.1.3).
const COMMAND_WRITABLE: u16 = reg::COMMAND_IO
    | reg::COMMAND_MEMORY
    | reg::COMMAND_BUS_MASTER
    | COMMAND_PARITY
    | COMMAND_SERR
    | reg::COMMAND_INTX_DISABLE;
const COMMAND_PARITY: u16 = 1 << 6;
const COMMAND_SERR: u16 = 1 << 8;
/// Status: INTx is asserted.
pub(super) const STATUS_INTX: u8 = 1 << 3;
const BIST: u16 = 0x0f;

/// The configuration space of a function, and the capabilities whose registers have an effect.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Its state before the guest starts, without BARs and ROM.
    pub space: ConfigSpace,
    /// The power management capability, if there is one.
    pub power: Option<PowerCapability>,
    /// The MSI-X capability, if there is a usable one.
    pub msix: Option<MsixCapability>,
    /// The MSI capability, if there is a usable one.
    pub msi: Option<MsiCapability>,
    /// The guest gets the interrupt pin.
    pub intx: bool,
}

/// Which interrupts of the device VFIO can deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deliverable {
    /// How many vectors of MSI the host has for it.
    pub msi: u16,
    pub msix: bool,
    pub intx: bool,
}

/// MSI (PCI Express Base Specification 6.0, 7.7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsiCapability {
    /// Offset of the capability.
    pub offset: u16,
    /// Its registers.
    pub layout: MsiLayout,
}

/// PCI power management (PCI Express Base Specification 6.0, 7.5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PowerCapability {
    /// Offset of the control and status register, whose low byte holds the power state.
    pub control: u16,
    d1: bool,
    d2: bool,
    /// No_Soft_Reset: the function is as before when it comes back from D3hot.
    keeps_context: bool,
}

impl PowerCapability {
    /// Whether the function has the power state, 0 for D0 to 3 for D3hot; a write of another one is ignored.
    pub fn supports(self, state: u8) -> bool {
        match state {
            1 => self.d1,
            2 => self.d2,
            _ => true,
        }
    }

    /// Whether the function resets itself when it goes from one power state to another.
    pub fn resets(self, from: u8, to: u8) -> bool {
        (from, to) == (3, 0) && !self.keeps_context
    }
}

/// MSI-X (PCI Express Base Specification 6.0, 7.7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsixCapability {
    /// Offset of the message control register.
    pub control: u16,
    /// How many vectors there are, and where the table and the pending bits are.
    pub layout: MsixLayout,
}

/// Little-endian registers of a configuration space; past its end, zeros.
#[derive(Clone, Copy)]
struct Registers<'a>(&'a [u8]);

impl Registers<'_> {
    fn u8(self, offset: u16) -> u8 {
        self.0.get(usize::from(offset)).copied().unwrap_or(0)
    }

    fn u16(self, offset: u16) -> u16 {
        u16::from_le_bytes([self.u8(offset), self.u8(offset.saturating_add(1))])
    }

    fn u32(self, offset: u16) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset.saturating_add(2))) << 16
    }
}

/// Four bytes of the header that VFIO reads from every device, and that no device has all ones in: revision and
/// class. VFIO answers the vendor's id itself.
pub(super) const LIFE: u16 = reg::REVISION_ID;

/// Whether these are the answer of no device.
pub(super) const fn is_silence(life: u32) -> bool {
    life == u32::MAX
}

/// Plans the guest's view of the configuration space `physical` of the device, 256 or 4096 bytes, or a
/// little less.
///
/// # Errors
/// The device does not answer, or is a bridge.
pub(super) fn plan(physical: &[u8], deliverable: Deliverable) -> Result<Plan, &'static str> {
    let registers = Registers(physical);
    let silent = registers.u16(reg::VENDOR_ID) == u16::MAX || is_silence(registers.u32(LIFE));
    if silent || physical.len() < HEADER_SIZE {
        return Err("it does not answer: its configuration space reads all ones");
    }
    if registers.u8(reg::HEADER_TYPE) & !reg::HEADER_MULTIFUNCTION != 0 {
        return Err("it is a bridge, not an endpoint");
    }
    let size = physical.len().min(usize::from(reg::CONFIG_SIZE)) as u16;
    let mut plan = Plan {
        space: ConfigSpace::new().with(Area::pass_through(0, size)),
        power: None,
        msix: None,
        msi: None,
        intx: false,
    };
    header(&mut plan.space, registers);
    let found = walk_standard(|offset| registers.u32(offset));
    let treatment = |capability: &Capability| match capability.id {
        CapabilityId::MSI if deliverable.msi == 0 => Treatment::Hidden,
        CapabilityId::MSI_X if !deliverable.msix => Treatment::Hidden,
        id => capabilities::standard(id),
    };
    let hidden = |capability: &&Capability| treatment(capability) == Treatment::Hidden;
    for capability in found.iter().filter(hidden) {
        let len = standard_len(registers, capability);
        plan.space.insert(zeros(capability.offset, len));
    }
    let kept: Vec<_> = found.iter().filter(|&cap| !hidden(&cap)).copied().collect();
    link_standard(&mut plan.space, &kept);
    for capability in &kept {
        emulate(&mut plan, registers, capability, deliverable);
    }
    let pin = registers.u8(reg::INTERRUPT_PIN);
    if deliverable.intx && (1..=4).contains(&pin) {
        plan.intx = true;
        plan.space.set(reg::INTERRUPT_PIN, &[pin]);
    }
    if size > EXTENDED_START {
        extended(&mut plan.space, registers, size);
    }
    Ok(plan)
}

/// The registers of the type-0 header, without the capability list and the interrupt pin.
fn header(space: &mut ConfigSpace, registers: Registers<'_>) {
    let status = registers.u8(reg::STATUS) & !STATUS_INTX;
    let header_type = registers.u8(reg::HEADER_TYPE) & !reg::HEADER_MULTIFUNCTION;
    let areas = [
        Area::emulated(reg::COMMAND, &[0; 2], &COMMAND_WRITABLE.to_le_bytes()),
        Area::read_only(reg::STATUS, &[status]),
        Area::read_only(reg::HEADER_TYPE, &[header_type]),
        Area::read_only(BIST, &[0]),
        Area::emulated(reg::INTERRUPT_LINE, &[0], &[0xff]),
        Area::read_only(reg::INTERRUPT_PIN, &[0]),
    ];
    for area in areas {
        space.insert(area);
    }
}

/// Lists these capabilities only, in their order.
fn link_standard(space: &mut ConfigSpace, kept: &[Capability]) {
    let [status]: [u8; 1] = space.get(reg::STATUS);
    let mut list = reg::STATUS_CAPABILITIES as u8;
    if kept.is_empty() {
        list = 0;
    }
    let status = status & !(reg::STATUS_CAPABILITIES as u8) | list;
    space.set(reg::STATUS, &[status]);
    let first = kept.first().map_or(0, |capability| capability.offset as u8);
    space.insert(Area::read_only(reg::CAPABILITIES_POINTER, &[first]));
    let next = kept.iter().skip(1).map(|next| next.offset as u8).chain([0]);
    for (capability, next) in kept.iter().zip(next) {
        let header = [capability.id.0, next];
        space.insert(Area::read_only(capability.offset, &header));
    }
}

/// Emulates registers of a capability.
fn emulate(
    plan: &mut Plan,
    registers: Registers<'_>,
    capability: &Capability,
    deliverable: Deliverable,
) {
    let at = |offset: u16| capability.offset + offset;
    match capability.id {
        CapabilityId::POWER_MANAGEMENT => {
            let abilities = registers.u16(at(2));
            let rest = registers.u8(at(4)) & !POWER_STATE;
            let keeps_context = rest & NO_SOFT_RESET != 0;
            plan.power = Some(PowerCapability {
                control: at(4),
                d1: abilities & 1 << 9 != 0,
                d2: abilities & 1 << 10 != 0,
                keeps_context,
            });
            plan.space
                .insert(Area::emulated(at(4), &[rest], &[POWER_STATE]));
        }
        CapabilityId::MSI_X => {
            let control = registers.u16(at(2)) & MSIX_SIZE;
            plan.msix = Some(MsixCapability {
                control: at(2),
                layout: MsixLayout {
                    vectors: control + 1,
                    table: InBar::from_register(registers.u32(at(4))),
                    pba: InBar::from_register(registers.u32(at(8))),
                },
            });
            let writable = (!MSIX_SIZE & MSIX_DEFINED).to_le_bytes();
            plan.space
                .insert(Area::emulated(at(2), &control.to_le_bytes(), &writable));
        }
        CapabilityId::MSI => {
            // A guest that enables vectors which the host has not would never get their interrupts.
            let layout = MsiLayout::from_control(registers.u16(at(2))).at_most(deliverable.msi);
            plan.space.insert(layout.area(capability.offset));
            plan.msi = Some(MsiCapability {
                offset: capability.offset,
                layout,
            });
        }
        CapabilityId::PCI_EXPRESS => express(&mut plan.space, registers, capability.offset),
        _ => {}
    }
}

/// Power management control: the power state.
pub(super) const POWER_STATE: u8 = 0b11;
const NO_SOFT_RESET: u8 = 1 << 3;
/// MSI-X message control: the size of the table, less one.
const MSIX_SIZE: u16 = 0x07ff;
/// MSI-X message control: size, function mask and enable.
const MSIX_DEFINED: u16 = 0xc7ff;

/// In the guest every device has a root port above it: an endpoint that is integrated into the host's root
/// complex becomes an ordinary one, with the narrowest link if it has no link.
fn express(space: &mut ConfigSpace, registers: Registers<'_>, capability: u16) {
    const TYPE: u16 = 0b1111 << 4;
    const ROOT_COMPLEX_ENDPOINT: u16 = 0b1001 << 4;
    const ONE_LANE_AT_2_5: u32 = 1 << 4 | 1;
    const FLAGS: u16 = 0x02;
    const LINK_CAPABILITIES: u16 = 0x0c;
    const LINK_STATUS: u16 = 0x12;

    let flags = registers.u16(capability + FLAGS);
    if flags & TYPE != ROOT_COMPLEX_ENDPOINT {
        return;
    }
    let flags = (flags & !TYPE).to_le_bytes();
    space.insert(Area::read_only(capability + FLAGS, &flags));
    if registers.u32(capability + LINK_CAPABILITIES) == 0 {
        let link = ONE_LANE_AT_2_5.to_le_bytes();
        space.insert(Area::read_only(capability + LINK_CAPABILITIES, &link));
        space.insert(Area::read_only(capability + LINK_STATUS, &link[..2]));
    }
}

/// Lists the extended capabilities that guests get. The list always begins at 0x100, with an empty
/// capability if that one is hidden.
fn extended(space: &mut ConfigSpace, registers: Registers<'_>, end: u16) {
    let found = walk_extended(|offset| registers.u32(offset));
    let offsets: Vec<u16> = found.iter().map(|capability| capability.offset).collect();
    let mut kept = Vec::new();
    for capability in found {
        let offset = capability.offset;
        let behind = offsets.iter().copied().filter(|other| *other > offset);
        let next = behind.min().unwrap_or(end).max(offset);
        let len = extended_len(registers, &capability).min(next - offset);
        match capabilities::extended(capability.id) {
            Treatment::Shown => kept.push(capability),
            Treatment::ReadOnly => {
                space.insert(Area::pass_through_read_only(offset, len));
                kept.push(capability);
            }
            Treatment::Hidden => space.insert(zeros(offset, len)),
        }
    }
    if kept
        .first()
        .is_none_or(|first| first.offset != EXTENDED_START)
    {
        let null = ExtendedCapability {
            id: ExtendedCapabilityId::NULL,
            version: u8::from(!kept.is_empty()),
            offset: EXTENDED_START,
        };
        kept.insert(0, null);
    }
    let next = kept.iter().skip(1).map(|next| next.offset).chain([0]);
    for (capability, next) in kept.iter().zip(next) {
        let version = u32::from(capability.version) << 16;
        let header = u32::from(capability.id.0) | version | u32::from(next) << 20;
        space.insert(Area::read_only(capability.offset, &header.to_le_bytes()));
    }
}

fn zeros(offset: u16, len: u16) -> Area {
    Area::read_only(offset, &vec![0; usize::from(len)])
}

/// Length of a hidden capability: MSI's depends on its features.
fn standard_len(registers: Registers<'_>, capability: &Capability) -> u16 {
    match capability.id {
        CapabilityId::MSI => MsiLayout::from_control(registers.u16(capability.offset + 2)).size(),
        CapabilityId::ENHANCED_ALLOCATION => {
            // The number of entries, each with its length in dwords.
            let entries = registers.u8(capability.offset + 2) & 0x3f;
            (0..entries).fold(4, |len: u16, _| {
                let size = registers.u8(capability.offset.saturating_add(len)) & 0b111;
                len + 4 * (1 + u16::from(size))
            })
        }
        _ => 12,
    }
}

/// Length of an extended capability (PCI Express Base Specification 6.0, 7.8 to 9.3); the most there is of one that
/// is not known.
fn extended_len(registers: Registers<'_>, capability: &ExtendedCapability) -> u16 {
    match capability.id {
        ExtendedCapabilityId::AER => 0x48,
        ExtendedCapabilityId::SR_IOV => 0x40,
        ExtendedCapabilityId::PRI
        | ExtendedCapabilityId::L1_PM_SUBSTATES
        | ExtendedCapabilityId::DPC => 0x10,
        ExtendedCapabilityId::PTM | ExtendedCapabilityId::SERIAL_NUMBER => 0x0c,
        ExtendedCapabilityId::MULTICAST => 0x30,
        ExtendedCapabilityId::RESIZABLE_BAR | ExtendedCapabilityId::VF_RESIZABLE_BAR => {
            // The number of BARs is in the first control register.
            let bars = registers.u8(capability.offset + 8) >> 5;
            4 + 8 * u16::from(bars.clamp(1, 6))
        }
        ExtendedCapabilityId::ARI
        | ExtendedCapabilityId::ATS
        | ExtendedCapabilityId::PASID
        | ExtendedCapabilityId::LTR => 8,
        _ => u16::MAX,
    }
}

#[cfg(test)]
pub(super) mod tests;
