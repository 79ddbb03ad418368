//! Tests of the whole function against a fake device: order, roll-back, and hostile guests.

use gantry_devices::pci::registers::{BARS, STATUS};
use gantry_devices::pci::{Segment, SegmentKind};
use proptest::prelude::*;

use super::*;
use crate::host::Region;
use crate::testing::{CMD, FakeDevice, FakeRouter, FakeSpace, MSI, MSIX, MSIX_TABLE, PM};

mod interrupts;

struct Rig {
    device: Arc<FakeDevice>,
    router: Arc<FakeRouter>,
    function: Arc<PassthroughDevice>,
}

const BAR0: u64 = 0xc000_0000;
const BAR4: u64 = 0x10_0000_0000;

impl Rig {
    /// Freshly assigned: BAR0 and BAR4 have addresses, nothing is decoded.
    fn new() -> Self {
        Self::around(FakeDevice::new())
    }

    fn around(device: FakeDevice) -> Self {
        let device = Arc::new(device);
        let router = Arc::new(FakeRouter::new(&device.trace, usize::MAX));
        let function = PassthroughDevice::new(device.clone(), router.clone()).unwrap();
        let rig = Self {
            device,
            router,
            function,
        };
        rig.move_bar(0, BAR0);
        rig.move_bar(4, BAR4);
        rig.device.trace.take();
        rig
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let space = FakeSpace(&self.device);
        crate::testing::write_config(self.function.as_ref(), &space, offset, data);
    }

    fn move_bar(&self, index: u16, to: u64) {
        self.write(BARS.start + 4 * index, &(to as u32).to_le_bytes());
        self.write(
            BARS.start + 4 * index + 4,
            &((to >> 32) as u32).to_le_bytes(),
        );
    }

    fn read(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.function.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn events(&self) -> Vec<String> {
        self.device.trace.take()
    }

    /// What VFIO was asked to do with interrupts.
    fn irq_events(&self) -> Vec<String> {
        let mut events = self.events();
        events.retain(|event| !event.starts_with("write"));
        events
    }
}

const COMMAND: &str = "write configuration space 0x4";
const POWER: &str = "write configuration space 0x44";

/// TRAPS 11: on, the hardware goes first; off, the mapping.
#[test]
fn decoding_follows_the_command_register_in_the_safe_order() {
    let rig = Rig::new();
    rig.write(CMD, &[0x02, 0]);
    let on = [
        format!("{POWER} [00]"),
        format!("{COMMAND} [02, 04]"),
        format!("map {BAR0:#x}"),
        format!("map {BAR4:#x}"),
    ];
    assert_eq!(rig.events(), on);
    rig.write(CMD, &[0x00, 0]);
    let off = [
        format!("unmap {BAR0:#x}"),
        format!("unmap {BAR4:#x}"),
        format!("{POWER} [00]"),
        format!("{COMMAND} [00, 04]"),
    ];
    assert_eq!(rig.events(), off);
}

#[test]
fn bus_master_reaches_the_hardware_in_remap_and_moves_nothing() {
    let rig = Rig::new();
    rig.write(CMD, &[0x02]);
    rig.events();
    assert!(rig.function.write_config(CMD, &[0x06, 0x05]));
    assert_eq!(rig.device.command(), 0x0402);
    rig.function.remap(&FakeSpace(&rig.device));
    assert_eq!(rig.device.command(), 0x0506, "with SERR and INTx disable");
    assert!(!rig.events().iter().any(|event| event.contains("map")));
    assert!(
        !rig.function.write_config(CMD, &[0x06, 0x05]),
        "nothing has changed"
    );
    rig.write(CMD, &[0xff; 4]);
    assert_eq!(rig.device.command(), 0x0547, "reserved bits stay clear");
    assert_eq!(rig.read(CMD) & 0xffff, 0x0547);
}

/// A dword write to the command register clears status bits as it should.
#[test]
fn status_is_the_hardwares_own() {
    let rig = Rig::new();
    rig.write(CMD, &[0x02, 0, 0, 0xf9]);
    assert!(
        rig.events()
            .contains(&"write configuration space 0x7 [f9]".to_owned())
    );
    rig.device.config.lock().unwrap()[usize::from(STATUS) + 1] = 0x20;
    assert_eq!(rig.read(CMD) >> 24, 0x20);
}

/// TRAPS 14: a device that is gone is found out by what it reads as, told of once, and found again by its reset.
#[test]
fn a_device_that_answers_nothing_is_told_of_once() {
    let rig = Rig::new();
    assert!(!rig.function.has_fallen_silent());
    // Registers of a device that works may read so.
    rig.device.config.lock().unwrap()[0x2c..0x30].fill(0xff);
    assert_eq!(rig.read(0x2c), u32::MAX);
    assert!(!rig.function.has_fallen_silent());
    rig.device.fall_silent(true);
    for _ in 0..3 {
        assert_eq!(rig.read(0x08), u32::MAX);
    }
    assert!(rig.function.has_fallen_silent());
    let reads = rig.device.trace.reads();
    rig.read(0x08);
    assert_eq!(rig.device.trace.reads() - reads, 1, "it is not asked again");
    assert!(!rig.function.has_fallen_silent());
    let space = FakeSpace(&rig.device);
    let error = rig.function.reset(&space).unwrap_err().to_string();
    assert!(error.contains("does not answer"), "{error}");
    assert!(rig.function.reset_failed() && rig.function.has_fallen_silent());
    rig.device.fall_silent(false);
    rig.function.reset(&space).unwrap();
    assert!(!rig.function.has_fallen_silent());
    assert_eq!(rig.read(0x08), 0x0108_0202);
}

/// TRAPS 10.
#[test]
fn bars_are_sized_from_a_shadow() {
    let rig = Rig::new();
    rig.write(CMD, &[0x02]);
    rig.events();
    for probe in [0xffff_ffff, 0xffff_fff0_u32] {
        rig.write(BARS.start, &probe.to_le_bytes());
        rig.write(BARS.start + 4, &0xffff_ffff_u32.to_le_bytes());
        assert_eq!(rig.read(BARS.start), 0xffff_8004);
        assert_eq!(rig.read(BARS.start + 4), 0xffff_ffff);
        rig.move_bar(0, BAR0);
    }
    assert_eq!(rig.device.trace.mapped(), [BAR4, BAR0]);
    let touched: Vec<_> = rig
        .events()
        .into_iter()
        .filter(|event| event.starts_with("write"))
        .collect();
    assert_eq!(
        touched,
        Vec::<String>::new(),
        "not even the command register"
    );
    rig.write(0x30, &[0xff; 4]);
    assert_eq!(rig.read(0x30), 0, "no expansion ROM");
}

/// The ROM is decoded with its own bit and the function's memory both on, and is sized without a write to
/// the hardware.
#[test]
fn a_rom_is_mapped_while_it_is_enabled_and_memory_is() {
    const ROM: u16 = 0x30;
    const BASE: u32 = 0xd000_0000;
    let mut device = FakeDevice::new();
    device.regions[Region::ROM.index()].size = 0x1_0000;
    let rig = Rig::around(device);
    let write = |value: u32| {
        rig.write(ROM, &value.to_le_bytes());
        rig.read(ROM)
    };
    rig.write(CMD, &[0x02]);
    rig.events();
    for (probe, enabled) in [(0xffff_f800, 0), (0xffff_fffe, 0), (u32::MAX, 1)] {
        assert_eq!(write(probe), 0xffff_0000 | enabled, "{probe:#x}");
    }
    assert_eq!(write(BASE), BASE);
    assert_eq!(rig.events(), [] as [&str; 0], "not enabled");
    assert_eq!(write(BASE | 1), BASE | 1);
    assert_eq!(rig.events(), [format!("map {BASE:#x}")]);
    let moved = BASE + 0x1_0000;
    write(moved | 1);
    assert_eq!(
        rig.events(),
        [format!("unmap {BASE:#x}"), format!("map {moved:#x}")]
    );
    rig.write(CMD, &[0]);
    assert!(rig.events().contains(&format!("unmap {moved:#x}")));
    rig.write(CMD, &[0x02]);
    assert!(rig.events().contains(&format!("map {moved:#x}")));
    rig.write(ROM, &[0]);
    assert_eq!(rig.events(), [format!("unmap {moved:#x}")]);
    rig.write(ROM, &[1]);
    rig.function.reset(&FakeSpace(&rig.device)).unwrap();
    assert_eq!(rig.read(ROM), 0);
}

/// TRAPS 13.
#[test]
fn moved_bars_leave_before_any_arrives() {
    let rig = Rig::new();
    rig.write(CMD, &[0x02]);
    rig.events();
    let to = |index: u16, to: u64| {
        let low = (to as u32).to_le_bytes();
        rig.function.write_config(BARS.start + 4 * index, &low);
        rig.function.write_config(
            BARS.start + 4 * index + 4,
            &((to >> 32) as u32).to_le_bytes(),
        );
    };
    to(0, BAR4);
    to(4, BAR0);
    rig.function.remap(&FakeSpace(&rig.device));
    let moved = [
        format!("unmap {BAR0:#x}"),
        format!("unmap {BAR4:#x}"),
        format!("map {BAR4:#x}"),
        format!("map {BAR0:#x}"),
    ];
    assert_eq!(rig.events(), moved);
}

/// TRAPS 12.
#[test]
fn outside_d0_nothing_is_mapped() {
    let rig = Rig::new();
    rig.write(CMD, &[0x06]);
    rig.events();
    rig.write(PM + 4, &[0x03, 0]);
    let down = rig.events();
    let first_write = down
        .iter()
        .position(|event| *event == format!("{POWER} [03]"))
        .unwrap();
    assert!(down[..first_write].contains(&format!("unmap {BAR4:#x}")));
    assert_eq!((rig.device.power(), rig.read(PM + 4) & 3), (3, 3));
    rig.write(CMD, &[0x02]);
    rig.write(CMD, &[0x06]);
    assert!(rig.device.trace.mapped().is_empty());

    rig.events();
    rig.write(PM + 4, &[0x00, 0]);
    assert_eq!(rig.device.power(), 0);
    assert_eq!(rig.device.trace.mapped(), [BAR0, BAR4]);
}

/// PCI Express Base Specification 6.0, 5.3.1.4: without No_Soft_Reset the function resets itself on its way from
/// D3hot to D0; with it, all is as before.
#[test]
fn what_a_function_keeps_in_d3hot_depends_on_no_soft_reset() {
    for no_soft_reset in [8, 0] {
        let device = FakeDevice::new();
        device.config.lock().unwrap()[usize::from(PM) + 4] = no_soft_reset;
        let rig = Rig::around(device);
        let keeps = no_soft_reset != 0;
        rig.write(CMD, &[0x06]);
        rig.write(MSIX + 2, &[0, 0x80]);
        rig.write(PM + 4, &[3, 0]);
        assert!(rig.device.trace.mapped().is_empty());
        assert!(rig.device.armed().is_some(), "it may yet come back");
        rig.events();
        rig.write(PM + 4, &[0, 0]);
        assert_eq!((rig.device.power(), rig.read(PM + 4) & 3), (0, 0));
        let (bars, mapped, command, control) = match keeps {
            true => (BAR0 as u32 | 4, vec![BAR0, BAR4], 6, 0x8040),
            false => (4, vec![], 0, 0x0040),
        };
        assert_eq!(rig.read(BARS.start), bars);
        assert_eq!(rig.device.trace.mapped(), mapped);
        assert_eq!(rig.read(CMD) & 0xffff, command);
        assert_eq!(rig.device.command() & 0xff, command as u16);
        assert_eq!(rig.read(MSIX) >> 16, control);
        assert_eq!(rig.device.armed().is_some(), keeps);
        let events = rig.events();
        let at = |event: &str| events.iter().position(|done| done == event);
        assert!(
            keeps || at(&format!("{POWER} [00]")) < at("irqs off"),
            "{events:?}"
        );
        // As a driver restores it.
        rig.move_bar(0, BAR0);
        rig.write(MSIX + 2, &[0, 0x80]);
        rig.write(CMD, &[0x06]);
        assert!(rig.device.trace.mapped().contains(&BAR0));
        assert!(rig.device.armed().is_some());
    }
}

#[test]
fn power_states_that_the_function_lacks_are_not_entered() {
    let rig = Rig::new();
    rig.write(CMD, &[0x02]);
    assert!(!rig.function.write_config(PM + 4, &[0x01]));
    assert_eq!(
        (rig.read(PM + 4) & 3, rig.device.trace.mapped().len()),
        (0, 2)
    );
    rig.write(PM + 4, &[0x02]);
    assert_eq!(
        (rig.read(PM + 4) & 3, rig.device.trace.mapped().len()),
        (2, 0)
    );
}

#[test]
fn the_table_is_reached_through_the_bar_and_its_neighbours_are_the_devices() {
    let rig = Rig::new();
    let bars: Vec<_> = rig.function.lock().bars.bars().cloned().collect();
    let segment = |bar: usize, at: u64| -> Segment {
        let mut segments = bars[bar].segments.iter();
        segments
            .rfind(|segment| segment.offset <= at)
            .unwrap()
            .clone()
    };
    assert!(matches!(segment(0, 0).kind, SegmentKind::Direct(_)));
    assert!(matches!(segment(2, 0).kind, SegmentKind::Direct(_)));
    let trapped = segment(0, MSIX_TABLE);
    let SegmentKind::Trapped { len, device } = trapped.kind else {
        panic!("the table traps");
    };
    assert_eq!((trapped.offset, len), (0x5000, 0x1000));
    let table = MSIX_TABLE - trapped.offset;
    rig.write(MSIX + 2, &[0, 0x80]);
    let _ = device.write(table, &0xfee0_0000_u64.to_le_bytes());
    let _ = device.write(table + 8, &0x41_u64.to_le_bytes());
    rig.device.fire(0);
    assert_eq!(rig.router.delivered().len(), 1);
    let mut data = [0; 4];
    device.read(table + 8, &mut data);
    assert_eq!(data, [0x41, 0, 0, 0]);
    rig.events();
    let _ = device.write(0x10, &[7]);
    assert_eq!(rig.events(), ["write BAR0 0x5010 [07]"]);
    device.read(0x10, &mut data);
    assert_eq!(data, [7, 0x11, 0x12, 0x13]);
}

#[test]
fn a_reset_gives_back_the_function_that_the_guest_began_with() {
    let rig = Rig::new();
    rig.write(CMD, &[0x06]);
    rig.write(0x3c, &[0x0b]);
    rig.write(PM + 4, &[0x02]);
    rig.write(MSIX + 2, &[0, 0x80]);
    rig.events();
    rig.function.reset(&FakeSpace(&rig.device)).unwrap();
    let events = rig.events();
    let at = |event: &str| events.iter().position(|seen| seen == event).unwrap();
    assert!(at("irqs off") < at("reset"));
    assert!(
        at(&format!("{COMMAND} [00, 04]")) < at("reset"),
        "DMA ends first"
    );
    assert!(rig.device.trace.mapped().is_empty());
    assert_eq!(
        (rig.device.command(), rig.device.power(), rig.router.live()),
        (reg::COMMAND_INTX_DISABLE, 0, 0)
    );
    let untouched = Rig::new();
    untouched.move_bar(0, 0);
    untouched.move_bar(4, 0);
    for offset in (0..4096).step_by(4) {
        assert_eq!(rig.read(offset), untouched.read(offset), "{offset:#x}");
    }
}

/// What a vCPU does that had found the function before has no effect.
#[test]
fn a_retired_function_has_no_mappings_interrupts_or_dma_and_gets_none() {
    let rig = Rig::new();
    rig.write(CMD, &[0x06]);
    rig.write(MSIX + 2, &[0x00, 0x80]);
    assert!(rig.device.armed().is_some());
    rig.events();
    rig.function.retire().unwrap();
    let events = rig.events();
    let at = |event: &str| events.iter().position(|done| done == event);
    let (unmapped, stopped) = (
        at(&format!("unmap {BAR0:#x}")),
        at(&format!("{COMMAND} [00, 04]")),
    );
    assert!(unmapped.is_some() && unmapped < stopped, "{events:?}");
    let quiet = || {
        assert_eq!(rig.device.command(), 0x0400);
        assert!(rig.device.trace.mapped().is_empty());
        assert_eq!(rig.device.armed(), None);
        assert_eq!(rig.router.live(), 0);
    };
    quiet();
    assert!(!rig.function.write_config(CMD, &[0x06, 0]));
    assert!(!rig.function.write_config(MSIX + 2, &[0x00, 0x80]));
    rig.function.remap(&FakeSpace(&rig.device));
    assert_eq!(rig.events(), Vec::<String>::new());
    quiet();
}

#[test]
fn a_function_that_does_not_stop_is_reset() {
    let rig = Rig::new();
    rig.write(CMD, &[0x06]);
    rig.device.trace.fail_after(0);
    rig.function.retire().unwrap();
    assert!(rig.events().contains(&"reset".to_owned()));
    let rig = Rig::new();
    rig.write(CMD, &[0x06]);
    rig.device.trace.fail(0, usize::MAX);
    rig.function.retire().unwrap_err();
    assert!(rig.function.reset_failed());
    assert!(rig.device.trace.mapped().is_empty());
}

#[test]
fn a_device_that_reads_all_ones_is_silent() {
    let rig = Rig::new();
    assert!(!rig.function.is_silent());
    rig.device.config.lock().unwrap().fill(0xff);
    assert!(rig.function.is_silent());
    // Nothing is known of it then.
    rig.device.trace.fail_after(0);
    assert!(!rig.function.is_silent());
}

#[test]
fn a_device_without_a_reset_is_quieted_and_stays_usable() {
    let mut device = FakeDevice::new();
    device.resettable = false;
    let rig = Rig::around(device);
    rig.write(CMD, &[0x06]);
    rig.function.reset(&FakeSpace(&rig.device)).unwrap();
    assert_eq!(rig.device.command(), reg::COMMAND_INTX_DISABLE);
    assert!(rig.device.trace.mapped().is_empty());
}

#[test]
fn a_failed_reset_is_told_and_leaves_nothing_mapped() {
    for steps in 0..6 {
        let rig = Rig::new();
        rig.write(CMD, &[0x06]);
        rig.write(MSIX + 2, &[0, 0x80]);
        rig.device.trace.fail_after(steps);
        let reset = rig.function.reset(&FakeSpace(&rig.device));
        assert!(rig.device.trace.mapped().is_empty());
        assert_eq!(rig.read(CMD) & 0xffff, 0);
        let failed = rig.device.trace.failed();
        assert_eq!(
            rig.function.reset_failed(),
            failed.as_deref() == Some("reset")
        );
        match failed.as_deref() {
            // Said in the log: the reset that follows ends the interrupts too.
            Some("irqs off") => {}
            Some(_) => assert!(reset.is_err()),
            None => panic!("a reset takes more than {steps} steps"),
        }
    }
}

/// Whichever call fails while the function is made, nothing of it is left, and the error says
/// which device and where.
#[test]
fn making_a_function_is_undone_at_every_step() {
    for steps in 0.. {
        let device = Arc::new(FakeDevice::new());
        let router = Arc::new(FakeRouter::new(&device.trace, usize::MAX));
        device.trace.fail_after(steps);
        match PassthroughDevice::new(device.clone(), router.clone()) {
            Ok(_) => {
                assert_eq!((steps, device.mappings()), (10, 3));
                break;
            }
            Err(error) => {
                let place = device.trace.failed().unwrap();
                let text = error.to_string();
                assert!(
                    text.contains("0000:01:00.0") && text.contains(&place),
                    "{text}"
                );
                assert_eq!((device.mappings(), router.live()), (0, 0), "{place}");
                assert_eq!(Arc::strong_count(&device), 1, "{place}");
            }
        }
    }
}

/// Whichever call fails while BARs are mapped, the guest's next attempt completes it.
#[test]
fn mapping_goes_on_after_a_failure_at_any_step() {
    for steps in 0..4 {
        let rig = Rig::new();
        rig.device.trace.fail_after(steps);
        rig.write(CMD, &[0x02]);
        assert!(rig.device.trace.failed().is_some());
        rig.write(0x3c, &[1]);
        assert_eq!(rig.device.trace.mapped().len(), 2, "step {steps}");
        assert_eq!(rig.device.command(), 0x0402);
    }
}

/// Power is told, the command is not: what the hardware knows is uncertain, and told again.
#[test]
fn hardware_that_was_told_half_is_told_all_again() {
    let rig = Rig::new();
    rig.write(CMD, &[0x02]);
    rig.device.trace.fail_after(1);
    rig.write(PM + 4, &[0x02]);
    assert_eq!(
        (rig.device.power(), rig.device.trace.mapped().len()),
        (2, 0)
    );
    rig.write(PM + 4, &[0x00]);
    assert_eq!(
        (rig.device.power(), rig.device.trace.mapped().len()),
        (0, 2)
    );
}

/// TRAPS 26: mappings, bus mastering and interrupts, then the device, even while windows of it are held.
#[test]
fn dropping_the_function_gives_everything_back_in_order() {
    let rig = Rig::new();
    rig.write(CMD, &[0x06]);
    rig.write(MSIX + 2, &[0, 0x80]);
    let Rig {
        device,
        router,
        function,
    } = rig;
    let windows: Vec<_> = function.lock().bars.bars().cloned().collect();
    device.trace.take();
    drop(function);
    let order = [
        format!("unmap {BAR0:#x}"),
        format!("unmap {BAR4:#x}"),
        format!("{POWER} [00]"),
        format!("{COMMAND} [00, 00]"),
        "irqs off".to_owned(),
        format!("{POWER} [00]"),
        format!("{COMMAND} [00, 04]"),
    ];
    assert_eq!(device.trace.take(), order);
    assert!(device.intx_disabled());
    drop(windows);
    assert_eq!((device.mappings(), router.live()), (0, 0));
    assert_eq!(Arc::strong_count(&device), 1);
}

#[test]
fn a_device_that_makes_no_sense_is_refused_by_name() {
    let bridge = |device: &mut FakeDevice| device.config.lock().unwrap()[0x0e] = 0x01;
    let no_table = |device: &mut FakeDevice| device.config.lock().unwrap()[0xb4] = 0x03;
    let odd_bar = |device: &mut FakeDevice| device.regions[0].size = 0x7000;
    let gone = |device: &mut FakeDevice| device.regions[7].size = 0;
    type Spoil = fn(&mut FakeDevice);
    let cases: [(Spoil, &str); 4] = [
        (bridge, "bridge"),
        (no_table, "MSI-X table"),
        (odd_bar, "BAR 0"),
        (gone, "does not answer"),
    ];
    for (spoil, why) in cases {
        let mut device = FakeDevice::new();
        spoil(&mut device);
        let router = Arc::new(FakeRouter::new(&device.trace, 1));
        let error = PassthroughDevice::new(Arc::new(device), router).err();
        let text = error.unwrap().to_string();
        assert!(
            text.contains("0000:01:00.0") && text.contains(why),
            "{text}"
        );
    }
}

#[derive(Debug, Clone)]
enum Access {
    Write(u16, Vec<u8>),
    Read(u16, usize),
    Trapped(usize, u64, Vec<u8>),
    Fail(usize),
    Reset,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![
        Just(CMD),
        BARS.start..BARS.end,
        PM..PM + 8,
        MSI..MSI + 24,
        MSIX..MSIX + 12,
        0_u16..4096,
    ];
    let data = || {
        let byte = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x02), Just(0x80)];
        proptest::collection::vec(byte, 1..=8)
    };
    let aligned = (offset, data(), 0_u32..3).prop_map(|(offset, mut data, width)| {
        data.resize(1 << width, 0);
        (offset & !((1 << width) - 1), data)
    });
    let bar = (any::<usize>(), 0_u64..0x1010, data());
    prop_oneof![
        8 => aligned.clone().prop_map(|(offset, data)| Access::Write(offset, data)),
        2 => aligned.prop_map(|(offset, data)| Access::Read(offset, data.len())),
        4 => bar.prop_map(|(window, at, data)| Access::Trapped(window, at, data)),
        1 => (0_usize..4).prop_map(Access::Fail),
        1 => Just(Access::Reset),
    ]
}

proptest! {
    /// No access panics, here or by breaking a rule that the fake asserts: the MSI-X control and
    /// BARs of the hardware are never written, and what is mapped is decoded.
    #[test]
    fn hostile_guests_get_nowhere(
        accesses in proptest::collection::vec(access(), 1..60),
        fixed in any::<bool>(),
        messages in any::<bool>(),
    ) {
        let mut device = FakeDevice::new();
        device.msix.fixed = fixed;
        if !messages {
            (device.msix.count, device.msi.count) = (0, 0);
        }
        let device = Arc::new(device);
        let router = Arc::new(FakeRouter::new(&device.trace, 3));
        let function = PassthroughDevice::new(device.clone(), router.clone()).unwrap();
        function.set_line(|_| 16);
        let bars: Vec<_> = function.lock().bars.bars().cloned().collect();
        let trapped: Vec<_> = bars
            .iter()
            .flat_map(|bar| bar.segments.iter())
            .filter_map(|segment| match &segment.kind {
                SegmentKind::Trapped { device, .. } => Some(Arc::clone(device)),
                SegmentKind::Direct(_) | SegmentKind::Doorbells { .. } => None,
            })
            .collect();
        let space = FakeSpace(&device);
        for access in accesses {
            match access {
                Access::Write(offset, data) => {
                    crate::testing::write_config(function.as_ref(), &space, offset, &data);
                }
                Access::Read(offset, len) => function.read_config(offset, &mut vec![0; len]),
                Access::Trapped(window, at, mut data) => {
                    let window = &trapped[window % trapped.len()];
                    let _ = window.write(at, &data);
                    window.read(at, &mut data);
                }
                Access::Fail(steps) => device.trace.fail_after(steps),
                Access::Reset => drop(function.reset(&space)),
            }
            prop_assert!(router.live() <= 3);
        }
        drop(bars);
        drop(trapped);
        drop(function);
        prop_assert_eq!((device.mappings(), router.live()), (0, 0));
        prop_assert!(router.lines().is_empty());
        prop_assert!(device.trace.mapped().is_empty());
    }
}

/// Registers with an effect: command, BARs, ROM, interrupt line, power, MSI, MSI-X.
fn control_word() -> impl Strategy<Value = u16> {
    prop_oneof![
        Just(CMD),
        (BARS.start / 4..BARS.end / 4).prop_map(|dword| dword * 4),
        Just(0x30),
        Just(0x3c),
        Just(PM + 4),
        (MSI / 4..MSI / 4 + 6).prop_map(|dword| dword * 4),
        Just(MSIX),
        (0_u16..1024).prop_map(|dword| dword * 4),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// TRAPS 9: a dword has the effect of its two words, and of its four bytes.
    #[test]
    fn the_width_of_a_write_does_not_matter(
        writes in proptest::collection::vec((control_word(), any::<[u8; 4]>()), 1..20),
    ) {
        let seen = [4, 2, 1].map(|width| {
            let mut device = FakeDevice::new();
            device.regions[Region::ROM.index()].size = 0x1_0000;
            let rig = Rig::around(device);
            for (offset, data) in &writes {
                for (at, data) in (*offset..).step_by(width).zip(data.chunks(width)) {
                    rig.write(at, data);
                }
            }
            let registers: Vec<u32> = (0..0x400).map(|dword| rig.read(dword * 4)).collect();
            let hardware = rig.device.config.lock().unwrap().clone();
            let mut mapped = rig.device.trace.mapped();
            mapped.sort_unstable();
            (registers, hardware, mapped, rig.device.armed())
        });
        prop_assert_eq!(&seen[0], &seen[1]);
        prop_assert_eq!(&seen[0], &seen[2]);
    }
}

#[test]
fn configuration_spaces_of_odd_sizes_do_no_harm() {
    for size in [0, 1, 63, 64, 255, 256, 257, 300, 0x102, 0x141, 4095, 5000] {
        let mut device = FakeDevice::new();
        device.regions[Region::CONFIG.index()].size = size;
        let router = Arc::new(FakeRouter::new(&device.trace, usize::MAX));
        let made = PassthroughDevice::new(Arc::new(device), router);
        assert_eq!(made.is_ok(), size >= 64, "{size}");
    }
}
