//! The unit of allocation: a card, which is the functions of one physical device.
//!
//! A card is what shares a slot (domain, bus, device number) and an IOMMU group: a GPU with its audio and USB
//! functions, or a network card whose ports cannot be isolated. Virtual functions, and ports with an IOMMU group
//! each, are cards of their own. The resource group that has a card's first function has all of it; where no
//! group has that, the other functions are what their own rules say. A VM that is given a card by a group or an
//! alias gets all of these functions, in one slot. A device named by its address is given alone.

use serde::{Deserialize, Serialize};

use crate::inventory::device::HostDevice;
use crate::inventory::unavailable::{Unavailable, UnavailableDevice};

/// The functions of a card that go together, in the order of their addresses. There is at least one.
#[derive(Clone, Debug)]
pub struct Card<'a> {
    first: &'a HostDevice,
    others: Vec<&'a HostDevice>,
}

impl<'a> Card<'a> {
    /// The first of its functions.
    pub fn first(&self) -> &'a HostDevice {
        self.first
    }

    /// All its functions.
    pub fn functions(&self) -> impl Iterator<Item = &'a HostDevice> + use<'a, '_> {
        std::iter::once(self.first).chain(self.others.iter().copied())
    }

    /// The same with some of its functions; none if there are none.
    pub(crate) fn only(&self, wanted: impl Fn(&HostDevice) -> bool) -> Option<Self> {
        cards(self.functions().filter(|device| wanted(device))).pop()
    }
}

/// The cards of these functions, which are in the order of their addresses.
pub fn cards<'a>(functions: impl IntoIterator<Item = &'a HostDevice>) -> Vec<Card<'a>> {
    let mut cards: Vec<Card<'a>> = Vec::new();
    for device in functions {
        let near = cards.iter_mut().rev();
        let mut near = near.take_while(|card| card.first.bdf.is_in_slot_of(device.bdf));
        match near.find(|card| card.first.shares_card(device)) {
            Some(card) => card.others.push(device),
            None => cards.push(Card {
                first: device,
                others: Vec::new(),
            }),
        }
    }
    cards
}

/// What a device may lack, as its entry allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    /// Interrupts.
    pub no_interrupts: bool,
    /// A reset. Without it, the guest finds what the VM before left in the device.
    pub no_reset: bool,
}

/// The conditions under which a VM is given a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Which of the requests it is for, counted from 0.
    pub request: usize,
    /// What it may lack.
    pub allow: Allow,
    /// Whether it must not be reset.
    pub must_not_reset: bool,
}

/// The methods by which the kernel resets a function alone, in its order. For the first of several functions of a
/// bus it lists a bus reset too, since it checks before it has found the others, and then refuses it.
pub fn own_resets<'a>(
    device: &'a HostDevice,
    all: &'a [HostDevice],
) -> impl Iterator<Item = &'a str> {
    let alone = || on_bus(device, all).count() == 1;
    let methods = device.reset_methods.iter().map(String::as_str);
    methods.filter(move |method| *method != "bus" || alone())
}

/// Whether a function is reset between two VMs: the kernel has a method for it, or vfio-pci resets its bus when the
/// last device of it is closed. vfio-pci does so if one VM has all functions of the bus, so if they are in one
/// IOMMU group. For a function that is alone on its bus, a working bus reset is among the methods.
pub fn is_reset(device: &HostDevice, all: &[HostDevice]) -> bool {
    if device.must_not_reset.is_some() {
        return false;
    }
    let whole = || on_bus(device, all).all(|one| one.iommu_group == device.iommu_group);
    let of_bus = || !device.on_root_bus && on_bus(device, all).count() > 1 && whole();
    own_resets(device, all).next().is_some() || device.iommu_group.is_some() && of_bus()
}

/// The functions on a function's bus.
fn on_bus<'a>(device: &HostDevice, all: &'a [HostDevice]) -> impl Iterator<Item = &'a HostDevice> {
    let bus = (device.bdf.domain(), device.bdf.bus());
    let address = |one: &HostDevice| (one.bdf.domain(), one.bdf.bus());
    all.iter().filter(move |one| address(one) == bus)
}

/// What a device lacks and its entry does not allow. Unknown interrupts are checked again when the device is
/// opened.
pub fn lacks(device: &HostDevice, all: &[HostDevice], allow: Allow) -> Option<UnavailableDevice> {
    let no_interrupts = device
        .interrupts
        .filter(|has| !has.are_any() && !allow.no_interrupts);
    let no_reset = !allow.no_reset && !is_reset(device, all);
    if let Some(why) = &device.must_not_reset {
        let by_kernel = device.on_vfio() && !device.reset_methods.is_empty();
        if by_kernel || no_reset {
            let why = Unavailable::MustNotReset {
                why: why.clone(),
                by_kernel,
            };
            return Some(UnavailableDevice {
                bdf: device.bdf,
                why,
            });
        }
    }
    let why = match no_interrupts {
        Some(_) => Unavailable::NoInterrupts { no_reset },
        None if no_reset => Unavailable::NoReset,
        None => return None,
    };
    let bdf = device.bdf;
    Some(UnavailableDevice { bdf, why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::hosts::{nvswitch_server, paired_gpus, workstation};
    use crate::fixture::{Fake, FakeHost};

    fn shape(devices: &[HostDevice]) -> Vec<Vec<String>> {
        let functions = |card: &Card<'_>| {
            let functions = card.functions();
            functions.map(|one| one.bdf.to_string()).collect()
        };
        cards(devices).iter().map(functions).collect()
    }

    #[test]
    fn a_card_is_what_shares_a_slot_and_an_iommu_group() {
        let gpu = |function: u8| Fake::nvme(&format!("0b:00.{function}"), 7);
        let host = FakeHost::new(&[
            gpu(0).class(0x03_00_00),
            gpu(1).class(0x04_03_00),
            gpu(2).class(0x0c_03_30),
            gpu(3).class(0x0c_80_00),
            // Two ports that are isolated from each other, two that are not.
            Fake::nvme("0c:00.0", 8),
            Fake::nvme("0c:00.1", 9),
            Fake::nvme("0d:00.0", 10),
            Fake::nvme("0d:00.1", 10),
            // Another slot of the same IOMMU group.
            Fake::nvme("0d:01.0", 10),
        ]);
        let expected: Vec<Vec<&str>> = vec![
            vec![
                "0000:0b:00.0",
                "0000:0b:00.1",
                "0000:0b:00.2",
                "0000:0b:00.3",
            ],
            vec!["0000:0c:00.0"],
            vec!["0000:0c:00.1"],
            vec!["0000:0d:00.0", "0000:0d:00.1"],
            vec!["0000:0d:01.0"],
        ];
        let all = host.scan();
        assert_eq!(shape(&all), expected);
        for device in &all {
            let alone = HostDevice::read(&host.paths, device.bdf).unwrap();
            assert_eq!(&alone, device, "read alone");
        }
    }

    #[test]
    fn virtual_functions_are_cards_of_their_own() {
        let host = nvswitch_server();
        let functions = host.iter().filter(|device| device.physfn.is_some());
        let functions: Vec<HostDevice> = functions.cloned().collect();
        assert_eq!(cards(&functions).len(), 256);
        // Two cards in one IOMMU group are two.
        let gpus: Vec<HostDevice> = paired_gpus().into_iter().take(4).collect();
        assert_eq!(shape(&gpus).len(), 2);
    }

    #[test]
    fn a_bus_reset_counts_where_all_of_the_bus_is_in_one_iommu_group() {
        let mut host = workstation();
        let no_method = |host: &mut Vec<HostDevice>| {
            host.iter_mut().for_each(|one| one.reset_methods.clear());
        };
        assert!(host.iter().all(|one| is_reset(one, &host)));
        no_method(&mut host);
        let reset = |host: &[HostDevice]| -> Vec<String> {
            let reset = host.iter().filter(|one| is_reset(one, host));
            reset.map(|one| one.bdf.to_string()).collect()
        };
        // The disk is alone on its bus: the kernel would say so if a bus reset worked.
        assert_eq!(reset(&host), ["0000:0b:00.0", "0000:0b:00.1"]);
        let change = |change: fn(&mut HostDevice)| {
            let mut host = host.clone();
            let last = host.iter_mut().find(|one| one.bdf.function() == 1);
            change(last.unwrap());
            reset(&host)
        };
        assert!(change(|audio| audio.iommu_group = Some(8)).is_empty());
        host.iter_mut().for_each(|one| one.on_root_bus = true);
        assert!(reset(&host).is_empty(), "a root bus is not reset");
    }

    #[test]
    fn a_bus_reset_is_no_reset_of_one_function_among_several() {
        let mut host = workstation();
        for one in &mut host {
            one.reset_methods = vec!["bus".to_owned()];
        }
        let shown = |host: &[HostDevice]| -> Vec<(String, usize, bool)> {
            let row = |one: &HostDevice| {
                let own = own_resets(one, host).count();
                (one.bdf.to_string(), own, is_reset(one, host))
            };
            host.iter().map(row).collect()
        };
        let card = ["0000:0b:00.0", "0000:0b:00.1"];
        for (bdf, own, is_reset) in shown(&host) {
            assert_eq!(own, usize::from(!card.contains(&bdf.as_str())), "{bdf}");
            assert!(is_reset, "{bdf}");
        }
        let audio = host.iter_mut().find(|one| one.bdf.function() == 1);
        audio.unwrap().iommu_group = Some(8);
        for (bdf, _, is_reset) in shown(&host) {
            assert_eq!(is_reset, !card.contains(&bdf.as_str()), "{bdf}");
        }
    }

    #[test]
    fn a_device_that_must_not_be_reset_is_given_only_where_its_entry_allows_it() {
        let host = FakeHost::new(&[Fake::nvme("01:00.0", 1).driver("vfio-pci")]);
        let entry = r#"{"vendor": "1b36", "device": "0010", "reason": "it hangs", "source": "us"}"#;
        host.file("etc/no-reset.json", &format!(r#"{{"devices": [{entry}]}}"#));
        let said = |allow| {
            let all = host.scan();
            assert!(!is_reset(&all[0], &all));
            lacks(&all[0], &all, allow).map(|one| one.to_string())
        };
        let no_reset = Allow {
            no_reset: true,
            ..Allow::default()
        };
        // The kernel would reset it whatever the entry says.
        for allow in [Allow::default(), no_reset] {
            let words = said(allow).unwrap();
            assert!(words.contains("it hangs (us)"), "{words}");
            assert!(words.contains("0000:01:00.0/reset_method`"), "{words}");
        }
        host.file("sys/bus/pci/devices/0000:01:00.0/reset_method", "\n");
        let words = said(Allow::default()).unwrap();
        assert!(words.contains("it hangs (us)"), "{words}");
        assert!(words.contains("\"allow_no_reset\": true"), "{words}");
        assert_eq!(said(no_reset), None);
    }

    #[test]
    fn what_a_device_lacks_is_said_unless_its_entry_allows_it() {
        let host = FakeHost::new(&[
            Fake::nvme("00:15.0", 1)
                .without_interrupts()
                .with("reset_method", ""),
            Fake::nvme("01:00.0", 2),
        ]);
        let all = host.scan();
        let said = |allow| -> Vec<String> {
            let lacks = all.iter().flat_map(|one| lacks(one, &all, allow));
            lacks.map(|one| one.to_string()).collect()
        };
        let strict = said(Allow::default());
        // Both are said at once.
        let [both] = strict.as_slice() else {
            panic!("{strict:?}");
        };
        let no_interrupts = Allow {
            no_interrupts: true,
            ..Allow::default()
        };
        let no_reset = said(no_interrupts).concat();
        assert!(no_reset.starts_with("0000:00:15.0 has no reset"));
        assert!(no_reset.contains("\"allow_no_reset\": true"));
        let no_interrupts = both.strip_suffix(&no_reset).unwrap();
        assert!(no_interrupts.starts_with("0000:00:15.0 has no interrupts"));
        assert!(no_interrupts.contains("\"interrupts\": \"none\""), "{both}");
        let all = Allow {
            no_interrupts: true,
            no_reset: true,
        };
        assert!(said(all).is_empty());
    }
}
