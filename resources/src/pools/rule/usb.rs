//! Whether a rule matches a USB device: by the fields that USB and PCI share, and by those of USB.

use std::borrow::Cow;

use super::filter::{Filter, Subject};
use super::value::{HexId, IdPair, Number, Word};
use super::{Filters, Rule, folded, holds, one, words};
use crate::inventory::usb::UsbDevice;

impl Rule {
    /// The rule that matches this device alone: by its serial number, or else by its port.
    pub(crate) fn of_usb(device: &UsbDevice) -> Self {
        let word = |text: &str| Some(Filter::equal(Word::exact(text)));
        let serial = device.serial.as_deref();
        Self(Box::new(Filters {
            id: Some(Filter::equal(device.id.into())),
            serial: serial.and_then(word),
            port: match serial {
                Some(_) => None,
                None => word(&device.port),
            },
            ..Filters::default()
        }))
    }

    /// Whether all filters hold for a USB device, which has no fields of PCI functions.
    pub fn matches_usb(&self, device: &UsbDevice) -> bool {
        let Filters {
            name,
            id,
            vendor,
            device: product,
            subsystem,
            class,
            slot,
            serial,
            driver,
            numa,
            iommu_group,
            pf,
            mdev_type,
            model,
            firmware,
            size,
            bus,
            port,
            speed,
        } = &*self.0;
        let text = |text: &Option<String>| text.as_deref().map(str::to_owned);
        holds(vendor, || {
            said(HexId(device.id.vendor), &device.manufacturer)
        }) && holds(product, || said(HexId(device.id.device), &device.product))
            && holds(id, || one(Some(IdPair::from(device.id))))
            && holds(serial, || words(device.serial.as_deref()))
            && holds(driver, || words(device.drivers.iter().map(String::as_str)))
            && holds(name, || {
                let names = [device.name(), text(&device.product)];
                folded(names.into_iter().flatten().map(Cow::Owned).collect())
            })
            && holds(bus, || one(Some(Number(device.bus))))
            && holds(port, || words([device.port.as_str()]))
            && holds(speed, || one(device.speed.map(Number)))
            && holds(subsystem, || one(None))
            && holds(class, || one(None))
            && holds(slot, || one(None))
            && holds(pf, || one(None))
            && holds(numa, || one(None))
            && holds(iommu_group, || one(None))
            && holds(mdev_type, || words([]))
            && holds(model, || words([]))
            && holds(firmware, || words([]))
            && holds(size, || one(None))
    }
}

/// An id with the name that the device itself gives it.
fn said<'a>(id: HexId, name: &'a Option<String>) -> Subject<'a, HexId> {
    Subject {
        names: name.as_deref().into_iter().map(Cow::Borrowed).collect(),
        ..one(Some(id))
    }
}
