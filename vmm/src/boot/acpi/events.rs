//! Notifications of the guest: a Generic Event Device, the power button, and slots for hot-plug.
//!
//! A slot is a device with `_EJ0` under its root port's device: Linux (`acpiphp`) handles it by ACPI, since
//! `_OSC` refuses native hot-plug. There is no `_STA`: configuration space shows whether a slot is occupied.
//! Device checks go to the port: after one on the slot, Linux looks for new devices only, and not for removed
//! ones.

use acpi_tables::aml::{
    And, Arg, Device, EISAName, Else, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, GreaterThan, If, Interrupt, LessThan, Local, Method, MethodCall, Name, Notify,
    OpRegion, OpRegionSpace, Path, ResourceTemplate, Scope, ShiftRight, Store, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use gantry_devices::events::{self, slot_number};
use gantry_devices::pci::{GuestBdf, PortIndex};

use crate::layout::{EVENT_GSI, EVENT_PORT};

/// A root port with a hot-plug slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HotSlot {
    /// The port.
    pub port: PortIndex,
    /// Where it is, on the first host bridge's bus.
    pub at: GuestBdf,
}

impl HotSlot {
    fn number(self) -> u16 {
        slot_number(self.port)
    }

    /// The name of the root port under its host bridge.
    fn port_name(self) -> String {
        format!("S{:03X}", self.number())
    }

    /// The path of the root port.
    fn path(self) -> String {
        format!("\\_SB_.PCI0.{}", self.port_name())
    }

    /// The path of what is in the slot.
    fn card_path(self) -> String {
        format!("{}.CARD", self.path())
    }
}

/// The parts of `\_SB` that have to do with events.
pub fn events(slots: &[HotSlot], sink: &mut dyn AmlSink) {
    event_device(sink);
    notifier(slots, sink);
    Device::new(
        Path::new("PWRB"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(Path::new("_UID"), &ZERO),
        ],
    )
    .to_aml_bytes(sink);
    if !slots.is_empty() {
        let mut ports = Vec::new();
        slots.iter().for_each(|slot| port(*slot, &mut ports));
        sink.vec(&Scope::raw(Path::new("PCI0"), ports));
    }
}

/// The Generic Event Device (5.6.9): its interrupt handler reads every pending event and passes it on.
fn event_device(sink: &mut dyn AmlSink) {
    let line = Interrupt::new(true, true, false, false, EVENT_GSI);
    let (base, len) = (EVENT_PORT, events::LEN as u8);
    let registers = OpRegion::new(Path::new("EVRG"), OpRegionSpace::SystemIO, &base, &len);
    let fields = Field::new(
        Path::new("EVRG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![
            FieldEntry::Named(*b"EVNT", 32),
            FieldEntry::Named(*b"EJCT", 32),
            FieldEntry::Named(*b"ANSW", 32),
        ],
    );
    Device::new(
        Path::new("EVTS"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&line])),
            &registers,
            &fields,
            &Assembled(event_method()),
        ],
    )
    .to_aml_bytes(sink);
}

/// `_EVT`: reads an event and passes it on, until there is none.
fn event_method() -> Vec<u8> {
    let (event, register) = (Local(0), Path::new("EVNT"));
    let (number, kind) = (Local(1), Local(2));
    let (low, shift) = (0xffff_u16, 16_u8);
    let read = Store::new(&event, &register);
    let (number_is, kind_is) = (
        And::new(&number, &event, &low),
        ShiftRight::new(&kind, &event, &shift),
    );
    let tell = MethodCall::new(Path::new("\\_SB_.TELL"), vec![&number, &kind]);
    let there_is_one = GreaterThan::new(&event, &ZERO);
    let pass_on = While::new(&there_is_one, vec![&number_is, &kind_is, &tell, &read]);
    let mut bytes = Vec::new();
    Method::new(Path::new("_EVT"), 1, true, vec![&read, &pass_on]).to_aml_bytes(&mut bytes);
    bytes
}

/// `TELL(number, kind)`: notifies the power button, which has number 0, or a slot: its port of a device check,
/// the device in it of everything else.
fn notifier(slots: &[HotSlot], sink: &mut dyn AmlSink) {
    let (number, kind) = (Arg(0), Arg(1));
    let mut cases = Vec::new();
    let button = Path::new("\\_SB_.PWRB");
    let press = Notify::new(&button, &kind);
    If::new(&Equal::new(&number, &ZERO), vec![&press]).to_aml_bytes(&mut cases);
    for slot in slots {
        let (port, card) = (Path::new(&slot.path()), Path::new(&slot.card_path()));
        let (look, other) = (Notify::new(&port, &kind), Notify::new(&card, &kind));
        let to_look = Equal::new(&kind, &events::DEVICE_CHECK);
        let (look, other) = (If::new(&to_look, vec![&look]), Else::new(vec![&other]));
        let its_number = slot.number();
        let is = Equal::new(&number, &its_number);
        If::new(&is, vec![&look, &other]).to_aml_bytes(&mut cases);
    }
    Method::new(Path::new("TELL"), 2, true, vec![&Assembled(cases)]).to_aml_bytes(sink);
}

/// AML that has been put together already.
struct Assembled(Vec<u8>);

impl Aml for Assembled {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// A root port, and under it the functions in its slot (6.1.1, 6.1.9, 6.3.3). Each answers a notification once
/// it is handled, if the notification's number is below 4 (6.3.5).
fn port(slot: HotSlot, sink: &mut dyn AmlSink) {
    let address = u32::from(slot.at.device()) << 16 | u32::from(slot.at.function());
    let number = slot.number();
    let register = Path::new("\\_SB_.EVTS.EJCT");
    let let_go = Store::new(&register, &number);
    let eject = Method::new(Path::new("_EJ0"), 1, true, vec![&let_go]);
    let answer = Path::new("\\_SB_.EVTS.ANSW");
    let say = Store::new(&answer, &number);
    let was_told = LessThan::new(&Arg(0), &4_u8);
    let done = If::new(&was_told, vec![&say]);
    let status = Method::new(Path::new("_OST"), 3, true, vec![&done]);
    let card_address = Name::new(Path::new("_ADR"), &ZERO);
    let user_number = Name::new(Path::new("_SUN"), &number);
    let card = Device::new(
        Path::new("CARD"),
        vec![&card_address, &user_number, &eject, &status],
    );
    let port_address = Name::new(Path::new("_ADR"), &address);
    Device::new(
        Path::new(&slot.port_name()),
        vec![&port_address, &status, &card],
    )
    .to_aml_bytes(sink);
}
