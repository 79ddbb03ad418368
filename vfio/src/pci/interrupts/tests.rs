//! Tests of messages against a device and a router that keep to the kernel's rules.

use gantry_devices::pci::interrupts::{InBar, MSI_MAX_LEN};

use super::*;
use crate::host::IrqInfo;
use crate::testing::{FakeDevice, FakeRouter, MSIX_PBA, MSIX_TABLE, MSIX_VECTORS};

const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

struct Rig {
    device: Arc<FakeDevice>,
    router: Arc<FakeRouter>,
    interrupts: Arc<Interrupts>,
}

impl Rig {
    fn new() -> Self {
        Self::with(FakeDevice::new(), usize::MAX)
    }

    /// On a kernel that gives vectors only all at once.
    fn fixed() -> Self {
        let mut device = FakeDevice::new();
        device.msix.fixed = true;
        Self::with(device, usize::MAX)
    }

    fn with(device: FakeDevice, routes: usize) -> Self {
        let router = Arc::new(FakeRouter::new(&device.trace, routes));
        let device = Arc::new(device);
        let io: Arc<dyn DeviceIo> = device.clone();
        let layout = MsixLayout {
            vectors: MSIX_VECTORS,
            table: InBar {
                bar: 0,
                offset: MSIX_TABLE,
            },
            pba: InBar {
                bar: 0,
                offset: MSIX_PBA,
            },
        };
        let interrupts = super::new(&io, router.clone(), Some(&layout), None).unwrap();
        Self {
            device,
            router,
            interrupts,
        }
    }

    fn unmask(&self, vector: u16) {
        let entry = MSIX_TABLE + 16 * u64::from(vector);
        let data = u64::from(0x40 + vector).to_le_bytes();
        self.write(entry, &0xfee0_0000_u64.to_le_bytes());
        self.write(entry + 8, &data);
    }

    fn mask(&self, vector: u16) {
        self.write(MSIX_TABLE + 16 * u64::from(vector) + 12, &[1, 0, 0, 0]);
    }

    fn write(&self, at: u64, data: &[u8]) {
        assert!(self.interrupts.write(0, at, data));
    }

    fn msix(&self, control: u16) {
        self.interrupts.write_msix_control(control);
        self.interrupts.switch(self.interrupts.wanted(false));
    }

    fn msi(&self, capability: &[u8; MSI_MAX_LEN]) {
        self.interrupts.write_msi(capability);
        self.interrupts.switch(self.interrupts.wanted(false));
    }

    fn pending(&self) -> u64 {
        let mut data = [0; 8];
        assert!(self.interrupts.read(0, MSIX_PBA, &mut data));
        u64::from_le_bytes(data)
    }

    /// The data of what has been delivered, which tells the vector.
    fn delivered(&self) -> Vec<u32> {
        let messages = self.router.delivered();
        messages.iter().map(|message| message.data - 0x40).collect()
    }

    fn armed(&self) -> Vec<usize> {
        let armed = self.device.armed().unwrap_or_default();
        (0..armed.len()).filter(|&vector| armed[vector]).collect()
    }
}

/// TRAPS 5 and 6: nothing is taken before the guest unmasks, and then in the right order.
#[test]
fn a_vector_costs_nothing_before_it_is_unmasked() {
    let rig = Rig::new();
    rig.unmask(64);
    assert_eq!(
        rig.device.trace.take(),
        Vec::<String>::new(),
        "MSI-X is off"
    );
    rig.mask(64);
    rig.msix(ENABLE);
    assert_eq!(rig.device.trace.take(), ["irqs 0..1"]);
    assert!(rig.armed().is_empty());

    rig.unmask(64);
    let order = ["route 0", "route 0 set Some(80)", "irqs 64..65"];
    assert_eq!(rig.device.trace.take(), order);
    assert_eq!(rig.armed(), [64]);
    rig.device.fire(64);
    assert_eq!(rig.delivered(), [64]);
}

#[test]
fn vectors_set_up_before_the_switch_are_delivered_after_it() {
    let rig = Rig::new();
    rig.msix(ENABLE | FUNCTION_MASK);
    rig.unmask(1);
    rig.unmask(3);
    assert_eq!(rig.router.live(), 0);
    rig.msix(ENABLE);
    assert_eq!(rig.armed(), [1, 3]);
}

#[test]
fn many_vectors_unmasked_at_once_are_published_once() {
    for refused in [false, true] {
        let rig = Rig::new();
        rig.msix(ENABLE | FUNCTION_MASK);
        (0..MSIX_VECTORS).for_each(|vector| rig.unmask(vector));
        rig.device.trace.take();
        if refused {
            rig.device.trace.fail_after(usize::from(MSIX_VECTORS));
        }
        rig.msix(ENABLE);
        let seen = rig.device.trace.take();
        let published = seen.iter().filter(|event| *event == "publish").count();
        assert_eq!(published, usize::from(!refused));
        let first_set = seen.iter().position(|event| event.contains(" set "));
        let routes = usize::from(MSIX_VECTORS) + published;
        assert_eq!(first_set, Some(routes), "all routes come first");
        assert_eq!(rig.armed(), Vec::from_iter(0..usize::from(MSIX_VECTORS)));
        rig.device.fire(64);
        assert_eq!(rig.delivered(), [64]);
    }
}

/// TRAPS 3: what arrives while a vector is masked is pending, and comes with the unmasking.
#[test]
fn a_masked_vector_stays_armed_and_remembers() {
    for by_function in [false, true] {
        let rig = Rig::new();
        rig.msix(ENABLE);
        rig.unmask(2);
        rig.device.trace.take();
        match by_function {
            true => rig.msix(ENABLE | FUNCTION_MASK),
            false => rig.mask(2),
        }
        assert_eq!(rig.device.trace.take(), ["route 0 set None"]);
        assert_eq!(rig.pending(), 0);
        rig.device.fire(2);
        assert!(rig.delivered().is_empty());
        assert_eq!(rig.pending(), 1 << 2);
        match by_function {
            true => rig.msix(ENABLE),
            false => rig.unmask(2),
        }
        assert_eq!(rig.delivered(), [2]);
        assert_eq!(rig.pending(), 0);
        assert_eq!(rig.router.live(), 1, "the same route");
    }
}

#[test]
fn a_changed_message_reaches_the_route() {
    let rig = Rig::new();
    rig.msix(ENABLE);
    rig.unmask(0);
    rig.device.trace.take();
    rig.write(MSIX_TABLE + 8, &0x55_u32.to_le_bytes());
    assert_eq!(rig.device.trace.take(), ["route 0 set Some(55)"]);
}

/// TRAPS 5: without dynamic vectors all are taken away and given again, a few times at most.
#[test]
fn fixed_vectors_grow_by_doubling_and_never_beyond_the_table() {
    let rig = Rig::fixed();
    rig.msix(ENABLE);
    let mut rearmed = 0;
    for vector in 0..MSIX_VECTORS {
        rig.device.trace.take();
        rig.unmask(vector);
        let seen = rig.device.trace.take();
        let asked = |event: &String| event.starts_with("irqs 0..128");
        assert!(!seen.iter().any(asked), "more than the table has");
        rearmed += seen.iter().filter(|event| *event == "irqs off").count();
        let upto = Vec::from_iter(0..=usize::from(vector));
        assert_eq!(rig.armed(), upto);
    }
    assert_eq!(rearmed, 7, "2, 4, 8, 16, 32, 64, 65");
    assert_eq!(rig.device.armed().unwrap().len(), usize::from(MSIX_VECTORS));
}

#[test]
fn vectors_that_a_failed_growth_has_lost_come_back_one_by_one() {
    let rig = Rig::fixed();
    rig.msix(ENABLE);
    (0..2).for_each(|vector| rig.unmask(vector));
    // A route, its message, all off; then twice the attempt, once the way back.
    rig.device.trace.fail(3, 3);
    rig.unmask(2);
    assert_eq!((rig.device.armed(), rig.router.live()), (None, 0));
    for vector in [1, 2, 0] {
        rig.mask(vector);
        rig.unmask(vector);
    }
    assert_eq!(rig.armed(), [0, 1, 2]);
    rig.delivered();
    (0..3).for_each(|vector| rig.device.fire(vector));
    assert_eq!(rig.delivered().len(), 3);
}

#[test]
fn what_may_be_lost_while_vectors_are_away_is_made_up_for() {
    let rig = Rig::fixed();
    rig.msix(ENABLE);
    rig.unmask(0);
    assert!(rig.delivered().is_empty());
    rig.unmask(1);
    assert_eq!(
        rig.delivered(),
        [0],
        "one too many for the old, none for the new"
    );
}

#[test]
fn a_host_with_few_vectors_gives_what_it_has() {
    let mut device = FakeDevice::new();
    device.msix.fixed = true;
    device.host_vectors = 3;
    let rig = Rig::with(device, usize::MAX);
    rig.msix(ENABLE);
    (0..5).for_each(|vector| rig.unmask(vector));
    assert_eq!(
        rig.armed(),
        [0, 1, 2],
        "four for three were refused, exactly three were not"
    );
    assert_eq!(rig.router.live(), 3);
    rig.device.fire(1);
    assert!(rig.delivered().contains(&1));
}

/// TRAPS 6: routes run out, and come back when MSI-X is switched off.
#[test]
fn when_routes_run_out_only_that_vector_is_lost() {
    let rig = Rig::with(FakeDevice::new(), 2);
    rig.msix(ENABLE);
    (0..4).for_each(|vector| rig.unmask(vector));
    assert_eq!(rig.armed(), [0, 1]);
    rig.device.fire(0);
    assert_eq!(rig.delivered(), [0]);

    rig.msix(0);
    assert_eq!((rig.router.live(), rig.device.armed()), (0, None));
    (0..4).for_each(|vector| rig.mask(vector));
    rig.msix(ENABLE);
    rig.unmask(3);
    assert_eq!(rig.armed(), [3]);
}

#[test]
fn switching_off_and_resets_give_everything_back() {
    for reset in [false, true] {
        let rig = Rig::new();
        rig.msix(ENABLE);
        rig.unmask(7);
        rig.device.trace.take();
        match reset {
            true => rig.interrupts.reset(),
            false => rig.msix(FUNCTION_MASK),
        }
        let off = ["route 0 set None", "irqs off"];
        assert_eq!(rig.device.trace.take(), off[usize::from(reset)..]);
        assert_eq!((rig.router.live(), rig.device.armed()), (0, None));
        rig.msix(ENABLE);
        let kept = if reset { vec![] } else { vec![7] };
        assert_eq!(
            rig.armed(),
            kept,
            "the table outlives the switch, not a reset"
        );
    }
}

/// Whichever call fails, nothing is left half done, and the guest's next attempt succeeds.
#[test]
fn every_failing_step_leaves_a_vector_masked_and_the_others_alive() {
    for fixed in [false, true] {
        for steps in 0.. {
            let rig = if fixed { Rig::fixed() } else { Rig::new() };
            rig.device.trace.fail_after(steps);
            rig.msix(ENABLE);
            (0..3).for_each(|vector| rig.unmask(vector));
            let done = rig.device.trace.failed().is_none();
            assert_eq!(rig.armed().len(), rig.router.live(), "step {steps}");
            if !done {
                assert!(
                    rig.armed().len() >= 2,
                    "step {steps}: {:?}",
                    rig.device.trace.failed()
                );
            }
            (0..3).for_each(|vector| {
                rig.mask(vector);
                rig.unmask(vector);
            });
            assert_eq!(rig.armed(), [0, 1, 2], "step {steps}");
            rig.delivered();
            (0..3).for_each(|vector| rig.device.fire(vector));
            assert_eq!(rig.delivered().len(), 3, "step {steps}");
            if done {
                assert!(steps > 8);
                break;
            }
        }
    }
}

#[test]
fn what_lies_beside_the_structures_is_not_answered_and_edges_are_lost() {
    let rig = Rig::new();
    let mut data = [0; 4];
    for at in [
        MSIX_TABLE - 4,
        MSIX_TABLE + 65 * 16,
        MSIX_PBA - 4,
        MSIX_PBA + 16,
        u64::MAX,
    ] {
        assert!(!rig.interrupts.read(0, at, &mut data), "{at:#x}");
        assert!(!rig.interrupts.write(0, at, &data), "{at:#x}");
    }
    assert!(!rig.interrupts.read(4, MSIX_TABLE, &mut data));
    for at in [
        MSIX_TABLE - 1,
        MSIX_TABLE + 65 * 16 - 1,
        MSIX_PBA - 3,
        MSIX_PBA + 15,
    ] {
        rig.write(at, &[0; 4]);
        assert!(rig.interrupts.read(0, at, &mut data));
        assert_eq!(data, [0xff; 4], "{at:#x}");
    }
    rig.write(MSIX_PBA, &[0xff; 8]);
    assert_eq!(rig.pending(), 0);
}

#[test]
fn a_table_outside_of_its_bar_is_refused_and_pending_bits_there_are_done_without() {
    let device: Arc<dyn DeviceIo> = Arc::new(FakeDevice::new());
    let router: Arc<dyn MsiRouter> = Arc::new(FakeRouter::new(&Arc::default(), 1));
    let good = InBar {
        bar: 0,
        offset: 0x4000,
    };
    let bad = [(6, 0), (1, 0), (0, 0x7ff8), (0, u64::MAX - 7)];
    for (bar, offset) in bad {
        let place = InBar { bar, offset };
        let mut layout = MsixLayout {
            vectors: 2,
            table: place,
            pba: good,
        };
        assert!(super::new(&device, router.clone(), Some(&layout), None).is_err());
        layout = MsixLayout {
            vectors: 65,
            table: good,
            pba: place,
        };
        let interrupts = super::new(&device, router.clone(), Some(&layout), None).unwrap();
        assert_eq!(interrupts.ranges(0).len(), 1);
    }
    assert_eq!(
        device.irq(Irq::Msix),
        IrqInfo {
            count: 65,
            fixed: false
        }
    );
}

/// A device with eight vectors of MSI, on a host that has so many for it.
fn msi(host_vectors: usize) -> (Rig, [u8; MSI_MAX_LEN]) {
    let mut device = FakeDevice::new();
    device.msi.count = 8;
    device.host_vectors = host_vectors;
    let router = Arc::new(FakeRouter::new(&device.trace, usize::MAX));
    let device = Arc::new(device);
    let io: Arc<dyn DeviceIo> = device.clone();
    let layout = MsiLayout::from_control(0x0086);
    let interrupts = super::new(&io, router.clone(), None, Some(layout)).unwrap();
    let mut capability = [0; MSI_MAX_LEN];
    // The address, the data, and four of the eight vectors enabled.
    capability[4..8].copy_from_slice(&0xfee0_0000_u32.to_le_bytes());
    capability[12] = 0x40;
    capability[2] = 0x21;
    let rig = Rig {
        device,
        router,
        interrupts,
    };
    (rig, capability)
}

#[test]
fn msi_vectors_are_allocated_at_once_and_connected() {
    let (rig, mut capability) = msi(usize::MAX);
    rig.msi(&capability);
    let seen = rig.device.trace.take();
    let calls = seen.iter().filter(|event| event.starts_with("MSI"));
    assert!(calls.eq(["MSI 0..4"]), "{seen:?}");
    rig.device.fire(3);
    assert_eq!(rig.delivered(), [3]);
    capability[12] = 0x44;
    rig.msi(&capability);
    assert_eq!(rig.armed(), [0, 1, 2, 3]);
    rig.device.fire(0);
    assert_eq!(rig.delivered(), [4]);
    capability[2] = 0;
    rig.msi(&capability);
    assert!(rig.device.trace.take().contains(&"MSI off".to_owned()));
    assert_eq!((rig.router.live(), rig.device.armed()), (0, None));
}

#[test]
fn a_host_with_few_msi_vectors_gives_a_power_of_two() {
    let (rig, capability) = msi(3);
    rig.msi(&capability);
    assert_eq!(rig.armed(), [0, 1]);
    assert_eq!(rig.router.live(), 2, "the others have no route");
    rig.device.fire(1);
    assert_eq!(rig.delivered(), [1]);
}

/// Whichever call fails, the guest's next attempt succeeds.
#[test]
fn a_failing_step_of_msi_is_mended_by_the_next_attempt() {
    for steps in 0.. {
        let (rig, mut capability) = msi(usize::MAX);
        rig.device.trace.fail_after(steps);
        rig.msi(&capability);
        let failed = rig.device.trace.failed();
        for enable in [0, 0x21] {
            capability[2] = enable;
            rig.msi(&capability);
        }
        assert_eq!(rig.armed(), [0, 1, 2, 3], "{failed:?}");
        rig.delivered();
        (0..4).for_each(|vector| rig.device.fire(vector));
        assert_eq!(rig.delivered().len(), 4, "{failed:?}");
        if failed.is_none() {
            assert!(steps > 8);
            break;
        }
    }
}
