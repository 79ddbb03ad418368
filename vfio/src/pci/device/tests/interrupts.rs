//! Tests of the function's interrupts: the modes, how the guest switches among them, and Interrupt Disable.

use gantry_devices::pci::MsiMessage;
use gantry_devices::pci::capability::walk_standard;

use super::*;

/// TRAPS 4 and 9: any width of write to the control register counts, and none reaches hardware,
/// for which the fake asserts.
#[test]
fn msix_control_is_the_guests_own_at_any_width() {
    for (offset, on, off) in [
        (MSIX, vec![0, 0, 0, 0x80], vec![0, 0, 0, 0]),
        (MSIX + 2, vec![0, 0x80], vec![0, 0]),
        (MSIX + 3, vec![0x80], vec![0]),
    ] {
        let rig = Rig::new();
        rig.write(offset, &on);
        assert_eq!(rig.read(MSIX), 0x8040_0011);
        assert_eq!(rig.irq_events(), ["irqs 0..1"]);
        rig.write(MSIX + 2, &[0xff]);
        assert_eq!(rig.read(MSIX), 0x8040_0011);
        rig.write(offset, &off);
        assert_eq!(rig.read(MSIX), 0x0040_0011);
        assert_eq!(rig.irq_events(), ["irqs off"]);
    }
}

/// The registers are the guest's own at any width, which the fake asserts, and pending bits are read.
#[test]
fn msi_is_enabled_through_the_configuration_space() {
    for (offset, on, off) in [
        (MSI, vec![0, 0, 1, 0], vec![0; 4]),
        (MSI + 2, vec![1, 0], vec![0; 2]),
        (MSI + 2, vec![1], vec![0]),
    ] {
        let rig = Rig::new();
        rig.write(MSI + 4, &0xfee0_0000_u32.to_le_bytes());
        rig.write(MSI + 8, &1_u32.to_le_bytes());
        rig.write(MSI + 12, &[0x51, 0x40]);
        rig.write(offset, &on);
        assert_eq!(rig.device.armed(), Some(vec![true]));
        rig.device.fire(0);
        let delivered = MsiMessage {
            address: 0x1_fee0_0000,
            data: 0x4051,
        };
        assert_eq!(rig.router.delivered(), [delivered]);
        rig.write(MSI + 16, &[1, 0, 0, 0]);
        rig.device.fire(0);
        assert!(rig.router.delivered().is_empty());
        assert_eq!(rig.read(MSI + 20), 1, "pending");
        rig.write(MSI + 16, &[0]);
        assert_eq!(rig.read(MSI + 20), 0);
        assert_eq!(rig.router.delivered(), [delivered]);
        rig.write(offset, &off);
        assert_eq!((rig.device.armed(), rig.router.live()), (None, 0));
    }
}

/// Drivers try MSI-X, fall back to MSI, and go back, without a reset in between.
#[test]
fn guests_switch_between_msi_and_msix() {
    let rig = Rig::new();
    for _ in 0..2 {
        rig.write(MSI + 2, &[1]);
        assert_eq!(rig.device.armed(), Some(vec![true]));
        rig.write(MSIX + 3, &[0x80]);
        assert_eq!(rig.device.armed(), Some(vec![false]), "MSI-X is on");
        rig.write(MSI + 2, &[0]);
        rig.write(MSIX + 3, &[0]);
        assert_eq!((rig.device.armed(), rig.router.live()), (None, 0));
    }
    rig.write(MSI + 2, &[1]);
    rig.function.reset(&FakeSpace(&rig.device)).unwrap();
    assert_eq!((rig.device.armed(), rig.router.live()), (None, 0));
    assert_eq!(rig.read(MSI), 0x0180_7005);
}

#[test]
fn a_device_with_msi_only_has_interrupts_and_one_with_none_is_refused() {
    let mut device = FakeDevice::new();
    device.msix.count = 0;
    let rig = Rig::around(device);
    rig.write(MSI + 2, &[1]);
    assert_eq!(rig.device.armed(), Some(vec![true]));

    let mut device = FakeDevice::new();
    (device.msix.count, device.msi.count, device.intx.count) = (0, 0, 0);
    let router = Arc::new(FakeRouter::new(&device.trace, 1));
    let error = PassthroughDevice::new(Arc::new(device), router)
        .err()
        .unwrap();
    assert!(error.to_string().contains("has no interrupts"), "{error}");
}

/// What VFIO counts does not matter where the device has no such capability: it has its pin, or no interrupts.
#[test]
fn messages_that_the_device_has_no_capability_for_are_none() {
    for pins in [1, 0] {
        let mut device = FakeDevice::new();
        device.intx.count = pins;
        device.config.lock().unwrap()[usize::from(PM) + 1] = 0;
        let router = Arc::new(FakeRouter::new(&device.trace, 1));
        let made = PassthroughDevice::new(Arc::new(device), router);
        match made {
            Ok(function) => {
                let mut pin = [0];
                function.read_config(reg::INTERRUPT_PIN, &mut pin);
                assert_eq!((pins, pin), (1, [1]));
            }
            Err(error) => assert!(
                pins == 0 && matches!(error, Error::NoInterrupts { .. }),
                "{error}"
            ),
        }
    }
}

/// Some devices refuse the eventfd that unmasks, and the host may refuse its line.
#[test]
fn a_pin_that_the_host_cannot_connect_is_not_shown() {
    use std::error::Error as _;

    for step in ["INTx 0..1", "INTx unmasked by", "INTx off"] {
        let make = |no_interrupts| {
            let mut device = FakeDevice::new();
            (device.msix.count, device.msi.count) = (0, 0);
            let device = Arc::new(device);
            let router = Arc::new(FakeRouter::new(&device.trace, 1));
            let made = |steps| {
                device.trace.fail_after(steps);
                let options = PassthroughOptions {
                    no_interrupts,
                    rom: Rom::Device,
                };
                let made = PassthroughDevice::with(device.clone(), router.clone(), options);
                (device.trace.failed(), made)
            };
            let refused = (0..100).map(made);
            let mut refused = refused.skip_while(|(failed, _)| failed.as_deref() != Some(step));
            (refused.next().unwrap().1, device.command())
        };
        let error = make(false).0.err().unwrap();
        assert!(matches!(error, Error::NoInterrupts { .. }), "{error}");
        let why = error.source().unwrap().to_string();
        assert!(why.contains(step), "{why}");

        let (made, command) = make(true);
        let function = made.unwrap();
        let mut pin = [0xff];
        function.read_config(reg::INTERRUPT_PIN, &mut pin);
        assert_eq!((pin, command), ([0], reg::COMMAND_INTX_DISABLE), "{step}");
    }
}

/// A device with messages only.
fn without_pin() -> Rig {
    let mut device = FakeDevice::new();
    device.intx.count = 0;
    Rig::around(device)
}

/// A device with a pin only, in a slot whose pins have the lines from 20 on.
fn with_pin() -> Rig {
    let mut device = FakeDevice::new();
    (device.msix.count, device.msi.count) = (0, 0);
    let rig = Rig::around(device);
    rig.function.set_line(|pin| 20 + u32::from(pin));
    assert_eq!(rig.events(), Vec::<String>::new());
    rig
}

/// TRAPS 8: the trigger comes before what unmasks it.
#[test]
fn the_pin_is_connected_once_the_guest_enables_the_function_and_until_its_end() {
    let rig = with_pin();
    rig.write(CMD, &[0x04]);
    let seen = rig.events();
    assert!(
        seen.starts_with(&["line 20", "INTx 0..1", "INTx unmasked by"].map(str::to_owned)),
        "{seen:?}"
    );
    rig.write(CMD, &[0x06]);
    assert!(!rig.events().contains(&"line 20".to_owned()), "once");
    assert_eq!(
        (rig.router.lines(), rig.device.armed()),
        (vec![20], Some(vec![true]))
    );

    rig.function.reset(&FakeSpace(&rig.device)).unwrap();
    let seen = rig.events();
    let at = |event: &str| seen.iter().position(|one| one == event).unwrap();
    assert!(at("INTx off") < at("reset"));
    assert_eq!((rig.router.lines(), rig.device.armed()), (vec![], None));
    rig.write(CMD, &[0x06]);
    assert_eq!(rig.router.lines(), [20], "again");
    rig.function.retire().unwrap();
    assert_eq!((rig.router.lines(), rig.device.armed()), (vec![], None));
    rig.write(CMD, &[0x07]);
    assert_eq!(rig.device.armed(), None, "a retired function stays silent");

    let rig = with_pin();
    rig.write(CMD, &[0x06]);
    let (device, router) = (rig.device, rig.router);
    drop(rig.function);
    assert_eq!((router.lines(), device.armed()), (vec![], None));
}

/// Otherwise the device disturbs those that share its line on the host.
#[test]
fn intx_is_enabled_in_the_device_only_while_the_pin_is_connected() {
    let disabled = |rig: &Rig| rig.device.command() & reg::COMMAND_INTX_DISABLE != 0;
    let rig = with_pin();
    assert!(disabled(&rig), "before the guest enables the function");
    rig.write(CMD, &[0x40, 0]);
    assert!(disabled(&rig), "parity checks need no interrupts");
    rig.write(CMD, &[0x06, 0]);
    assert!(!disabled(&rig));
    let seen = rig.events();
    let at = |event: &str| seen.iter().position(|one| one == event).unwrap();
    let enabled = format!("{COMMAND} [06, 00]");
    assert!(at("INTx unmasked by") < at(&enabled), "{seen:?}");
    rig.write(CMD, &[0, 0]);
    assert!(disabled(&rig), "the guest has disabled the function");
    rig.write(CMD, &[0x06, 0]);
    assert!(!disabled(&rig));

    type End = fn(&Rig);
    let ends: [End; 2] = [
        |rig| rig.function.reset(&FakeSpace(&rig.device)).unwrap(),
        |rig| rig.function.retire().unwrap(),
    ];
    for end in ends {
        rig.write(CMD, &[0x06, 0]);
        rig.events();
        end(&rig);
        assert!(disabled(&rig));
        let seen = rig.events();
        let at = |event: &str| seen.iter().position(|one| one == event).unwrap();
        assert!(
            at(&format!("{COMMAND} [00, 04]")) < at("INTx off"),
            "{seen:?}"
        );
    }
}

#[test]
fn the_guest_disables_intx_and_reads_whether_it_is_asserted() {
    let rig = with_pin();
    assert_eq!(rig.read(0x3c), 0x0100);
    rig.write(CMD, &[2, 0]);
    assert_eq!(rig.device.command(), 0x0002, "INTx is enabled");
    rig.write(CMD + 1, &[0x04]);
    assert_eq!(rig.device.command(), 0x0402);
    let status = |rig: &Rig| rig.read(CMD) >> 16 & 8;
    assert_eq!(status(&rig), 8);
    rig.device.config.lock().unwrap()[usize::from(STATUS)] = 0x10;
    assert_eq!(status(&rig), 0);
    let without = without_pin();
    assert_eq!((status(&without), without.read(0x3c)), (0, 0));
    without.function.set_line(|_| 20);
    without.write(CMD, &[2, 0]);
    assert_eq!(without.router.lines(), [] as [u32; 0]);
}

/// Whichever call fails, nothing is left, and the guest's next attempt connects the pin.
#[test]
fn a_pin_that_cannot_be_connected_is_connected_at_the_next_attempt() {
    for steps in 0..3 {
        let rig = with_pin();
        rig.device.trace.fail_after(steps);
        rig.write(CMD, &[0x04]);
        let failed = rig.device.trace.failed().unwrap();
        assert!(
            failed.contains("line") || failed.contains("INTx"),
            "{failed}"
        );
        assert_eq!((rig.router.lines(), rig.device.armed()), (vec![], None));
        assert_eq!(rig.device.command(), 0x0404, "INTx stays disabled");
        rig.write(CMD, &[0x06]);
        assert_eq!(rig.router.lines(), [20]);
        assert_eq!(rig.device.command(), 0x0006);
    }
}

/// Nobody takes INTx on the host, where the line may be another device's too.
#[test]
fn intx_is_off_in_the_hardware_whatever_the_guest_says() {
    let rig = Rig::new();
    assert_eq!(rig.device.command(), reg::COMMAND_INTX_DISABLE);
    rig.write(CMD, &[0xff, 0xfb]);
    assert_eq!(rig.device.command(), 0x0547);
    assert_eq!(
        rig.read(CMD) & 0xffff,
        0x0147,
        "the guest's own bit is its own"
    );
}

/// A device with a pin, eight vectors of MSI on a host that has four for it, and MSI-X.
fn with_all() -> Rig {
    let mut device = FakeDevice::new();
    device.msi.count = 8;
    device.host_vectors = 4;
    device.config.lock().unwrap()[usize::from(MSI) + 2] |= 3 << 1;
    let rig = Rig::around(device);
    rig.function.set_line(|pin| 20 + u32::from(pin));
    rig
}

/// A guest with several vectors gets the interrupt of each.
#[test]
fn msi_vectors_that_the_host_does_not_have_are_not_shown() {
    let rig = with_all();
    assert_eq!(rig.read(MSI) >> 16, 0x0184, "four, with masks");
    rig.write(MSI + 12, &[0x40, 0]);
    rig.events();
    rig.write(MSI + 2, &[0x31]);
    assert_eq!(rig.device.armed(), Some(vec![true; 4]));
    let mut calls = rig.irq_events();
    calls.retain(|event| event.starts_with("MSI"));
    assert_eq!(calls, ["MSI 0..4"], "one call connects all");

    let mut device = FakeDevice::new();
    device.msi.count = 8;
    device.host_vectors = 0;
    device.config.lock().unwrap()[usize::from(MSI) + 2] |= 3 << 1;
    let rig = Rig::around(device);
    let listed = walk_standard(|offset| rig.read(offset));
    assert!(listed.iter().all(|found| found.offset != MSI), "{listed:?}");
}

/// What a masked vector raises from the beginning on is pending.
#[test]
fn events_of_msi_vectors_that_begin_masked_are_kept() {
    let rig = with_all();
    rig.write(MSI + 12, &[0x40, 0]);
    rig.write(MSI + 16, &[0b10]);
    rig.write(MSI + 2, &[0x11]);
    rig.device.fire(1);
    assert_eq!((rig.read(MSI + 20), rig.router.delivered().len()), (2, 0));
    rig.write(MSI + 16, &[0]);
    let data = rig
        .router
        .delivered()
        .iter()
        .map(|message| message.data)
        .collect::<Vec<_>>();
    assert_eq!(data, [0x41]);
}

/// TRAPS 8: drivers look for messages with the pin connected, and VFIO has one mode at a time.
#[test]
fn the_pin_gives_way_to_messages_and_comes_back() {
    let rig = with_all();
    rig.write(CMD, &[0x06, 0]);
    assert_eq!(rig.device.enabled(), Some(Irq::Intx));
    type Write = fn(&Rig, u8);
    let kinds: [(Irq, Write); 2] = [
        (Irq::Msi, |rig, on| rig.write(MSI + 2, &[on])),
        (Irq::Msix, |rig, on| rig.write(MSIX + 3, &[on << 7])),
    ];
    for (irq, enable) in kinds {
        enable(&rig, 1);
        assert_eq!(
            (rig.device.enabled(), rig.router.lines()),
            (Some(irq), vec![])
        );
        rig.write(CMD, &[0x06, 0x04]);
        enable(&rig, 0);
        assert_eq!(rig.router.lines(), [20]);
        assert!(rig.device.intx_disabled(), "the guest has it disabled");
        rig.write(CMD, &[0x06, 0]);
        assert!(!rig.device.intx_disabled());
    }
}

/// Some devices send no messages while INTx is disabled.
#[test]
fn interrupt_disable_is_the_guests_own_while_messages_are_enabled() {
    let rig = without_pin();
    rig.write(MSI + 2, &[1]);
    rig.write(CMD, &[0x06, 0]);
    assert_eq!(rig.device.command(), 0x0006);
    assert!(!rig.device.intx_disabled());
    rig.write(CMD, &[0x06, 0x04]);
    assert!(rig.device.intx_disabled());
}

/// The kernel clears the bit when messages end, and knows nothing of a bit that does not change.
#[test]
fn intx_is_disabled_in_the_hardware_when_messages_have_ended() {
    type End = fn(&Rig);
    let ends: [End; 3] = [
        |rig| rig.write(MSIX + 3, &[0]),
        |rig| rig.function.reset(&FakeSpace(&rig.device)).unwrap(),
        |rig| rig.function.retire().unwrap(),
    ];
    for end in ends {
        for disabled in [0, 4] {
            let rig = without_pin();
            rig.write(CMD, &[0x06, disabled]);
            rig.write(MSIX + 3, &[0x80]);
            end(&rig);
            assert_eq!(rig.device.enabled(), None);
            assert!(rig.device.intx_disabled());
        }
    }
}

#[test]
fn a_function_that_is_dropped_disables_its_pin() {
    for on in [MSIX + 3, 0x3c] {
        let rig = with_all();
        rig.write(CMD, &[0x06, 0]);
        rig.write(on, &[0x80]);
        let device = Arc::clone(&rig.device);
        drop(rig.function);
        assert_eq!((device.enabled(), device.command()), (None, 0x0400));
        assert!(device.intx_disabled());
    }
}

/// What a driver does, and what may go wrong meanwhile.
#[derive(Debug, Clone)]
enum Step {
    Command(u8, bool),
    Msi(u8),
    MsiMask(u8),
    Msix(u8),
    Vector(u16, bool),
    Fire,
    Reset,
    Fail(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0_u8..8, any::<bool>()).prop_map(|(low, disable)| Step::Command(low, disable)),
        3 => (0_u8..0x80).prop_map(Step::Msi),
        1 => (0_u8..0x10).prop_map(Step::MsiMask),
        3 => prop_oneof![Just(0), Just(0x40), Just(0x80), Just(0xc0)].prop_map(Step::Msix),
        4 => (0_u16..4, any::<bool>()).prop_map(|(vector, on)| Step::Vector(vector, on)),
        2 => Just(Step::Fire),
        1 => Just(Step::Reset),
        2 => (0_usize..8).prop_map(Step::Fail),
    ]
}

/// What the registers of a function say.
#[derive(Default)]
struct Model {
    command: u16,
    msi: u8,
    mask: u8,
    msix: u8,
    unmasked: [bool; 4],
}

impl Model {
    fn kind(&self) -> Option<Irq> {
        match (self.msix & 0x80, self.msi & 1, self.command & 7) {
            (0, 0, 0) => None,
            (0, 0, _) => Some(Irq::Intx),
            (0, _, _) => Some(Irq::Msi),
            _ => Some(Irq::Msix),
        }
    }

    /// The vectors whose interrupts reach the guest.
    fn delivered(&self) -> Vec<u16> {
        let vectors = (1_u16 << (self.msi >> 4)).min(4);
        (0..4)
            .filter(|&vector| match self.kind() {
                Some(Irq::Msix) => self.msix & 0x40 == 0 && self.unmasked[usize::from(vector)],
                Some(Irq::Msi) => vector < vectors && self.mask >> vector & 1 == 0,
                _ => false,
            })
            .collect()
    }
}

fn set_vector(rig: &Rig, vector: u16, unmasked: bool) {
    let entry = MSIX_TABLE + 16 * u64::from(vector);
    let data = u64::from(vector) | u64::from(!unmasked) << 32;
    assert!(
        rig.function
            .interrupts
            .write(0, entry + 8, &data.to_le_bytes())
    );
}

impl Step {
    fn take(&self, rig: &Rig, model: &mut Model) {
        match *self {
            Step::Command(low, disable) => {
                model.command = u16::from(low) | u16::from(disable) << 10;
                rig.write(CMD, &model.command.to_le_bytes());
            }
            Step::Msi(control) => {
                model.msi = control & 0x71;
                rig.write(MSI + 2, &[control]);
            }
            Step::MsiMask(mask) => {
                model.mask = mask;
                rig.write(MSI + 16, &[mask]);
            }
            Step::Msix(control) => {
                model.msix = control;
                rig.write(MSIX + 3, &[control]);
            }
            Step::Vector(vector, unmasked) => {
                model.unmasked[usize::from(vector)] = unmasked;
                set_vector(rig, vector, unmasked);
            }
            Step::Fire => {
                let armed = rig.device.armed().unwrap_or_default();
                let armed = (0..armed.len()).filter(|vector| armed[*vector]);
                armed.for_each(|vector| rig.device.fire(vector));
            }
            Step::Reset => {
                *model = Model::default();
                drop(rig.function.reset(&FakeSpace(&rig.device)));
            }
            Step::Fail(steps) => rig.device.trace.fail_after(steps),
        }
    }
}

proptest! {
    /// Guests switch among the modes in any order, and whichever call fails meanwhile: with the guest's next
    /// write, the device is in the mode that the registers say, and delivers what they say.
    #[test]
    fn interrupts_are_what_the_registers_say(
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let rig = with_all();
        let mut model = Model::default();
        let mut failed = false;
        for step in &steps {
            step.take(&rig, &mut model);
            failed |= rig.device.trace.failed().is_some();
        }
        rig.device.trace.fail_after(usize::MAX);
        rig.write(0x3c, &[1]);
        // A vector that failed stays masked until the guest unmasks it again.
        for vector in 0..4 {
            set_vector(&rig, vector, false);
            set_vector(&rig, vector, model.unmasked[usize::from(vector)]);
        }
        rig.write(MSI + 16, &[0xff]);
        rig.write(MSI + 16, &[model.mask]);

        prop_assert_eq!(rig.device.enabled(), model.kind());
        let lines = match model.kind() {
            Some(Irq::Intx) => vec![20],
            _ => vec![],
        };
        prop_assert_eq!(rig.router.lines(), lines);
        let silent = match model.kind() {
            None => reg::COMMAND_INTX_DISABLE,
            Some(_) => 0,
        };
        prop_assert_eq!(rig.device.command(), model.command | silent);
        if !failed && matches!(model.kind(), None | Some(Irq::Intx)) {
            let disabled = (model.command | silent) & reg::COMMAND_INTX_DISABLE != 0;
            prop_assert_eq!(rig.device.intx_disabled(), disabled);
        }
        rig.router.delivered();
        if model.kind() != Some(Irq::Intx) {
            Step::Fire.take(&rig, &mut model);
        }
        let delivered = rig.router.delivered();
        let mut data: Vec<_> = delivered.iter().map(|message| message.data as u16).collect();
        data.sort_unstable();
        prop_assert_eq!(data, model.delivered());

        let Rig { device, router, function } = rig;
        drop(function);
        prop_assert_eq!((device.enabled(), router.live(), router.lines()), (None, 0, vec![]));
        prop_assert!(failed || device.intx_disabled());
    }
}
