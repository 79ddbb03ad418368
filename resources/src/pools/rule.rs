//! The filters that select devices, and whether a device passes them.

mod filter;
mod usb;
mod value;

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::base::bdf::HostBdf;
use crate::inventory::device::HostDevice;
use filter::Subject;
pub(crate) use filter::{Filter, FilterValue};
use value::addresses;
pub(crate) use value::{ClassPrefix, HexId, IdPair, Number, Slot, Word};

/// Filters that must all hold for a device to match. There is at least one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Filters", into = "Filters")]
#[schemars(with = "Filters")]
pub struct Rule(Box<Filters>);

/// The filters of a rule as they are written; those left out hold for every device.
///
/// Each is a value that the field must equal, or an object of comparisons that must all hold: `equal`,
/// `not`, `less`, `more`, and for texts `begins`, `ends`, `contains` and `regex`. Text filters on ids and
/// classes look at the names in pci.ids too; in names, case does not count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("minProperties" = 1))]
pub struct Filters {
    /// The device's name in pci.ids, with or without its vendor's: "NVM Express*" or {"contains": "P2000"}.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Filter<Word>>,
    /// Vendor and device id together, as `lspci -nn` shows them: "1b36:0010".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Filter<IdPair>>,
    /// Vendor id, four hex digits: "1b36" or "0x1b36".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<Filter<HexId>>,
    /// Device id, four hex digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Filter<HexId>>,
    /// Subsystem vendor and device id together: "1af4:1100".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<Filter<IdPair>>,
    /// The class code or its beginning: base class ("01"), with subclass ("0108"), with programming
    /// interface ("010802").
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<Filter<ClassPrefix>>,
    /// PCI address: "0000:01:00.0", "01:00.0", or a pattern such as "3b:*".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Filter<Slot>>,
    /// Serial number: of the NVMe controller, or the PCIe device serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Filter<Word>>,
    /// The driver of the device. A device that gantry detached from a host driver counts as having that driver too.
    /// A device that vfio-pci had from the start has no host driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<Filter<Word>>,
    /// NUMA node; a device of a host with one node has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa: Option<Filter<Number>>,
    /// IOMMU group. Its number may change when the host boots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu_group: Option<Filter<Number>>,
    /// Of a virtual function: the address of its physical function.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pf: Option<Filter<Slot>>,
    /// A type of mediated device that it can make: "nvidia-222".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mdev_type: Option<Filter<Word>>,
    /// Model of an NVMe controller, as it says: "SAMSUNG MZQL2*".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Filter<Word>>,
    /// Firmware revision of an NVMe controller.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Filter<Word>>,
    /// Size of an NVMe disk in GB (10^9 bytes), rounded down: of all its namespaces together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Filter<Number>>,
    /// Of a USB device: number of its bus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<Filter<Number>>,
    /// Of a USB device: the ports that it is plugged in at, "1-4.2", or a pattern such as "1-4.*".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Filter<Word>>,
    /// Of a USB device: Mbit/s, rounded down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed: Option<Filter<Number>>,
}

/// A filter that cannot be read.
#[derive(Debug, Error)]
pub enum RuleError {
    /// Not four hex digits.
    #[error("\"{0}\" is not a PCI id: write four hex digits, \"8086\" or \"0x8086\"")]
    Id(String),
    /// Not two ids with a colon between.
    #[error("\"{0}\" is not a pair of PCI ids: write vendor and device like \"1b36:0010\"")]
    IdPair(String),
    /// Not the beginning of a class code.
    #[error("\"{0}\" is not a PCI class: write 2, 4 or 6 hex digits, like \"0108\" for NVMe")]
    Class(String),
    /// Neither an address nor a pattern.
    #[error(
        "\"{0}\" is not a PCI address: write it like 0000:01:00.0 or 01:00.0, or a pattern like 01:*"
    )]
    Slot(String),
    /// No filter at all.
    #[error(
        "a rule needs at least one filter (name, id, vendor, device, subsystem, class, slot, serial, driver, numa, iommu_group, pf, mdev_type, model, firmware, size, bus, port, speed), or it would take every device"
    )]
    Empty,
    /// A text without a character.
    #[error("the text cannot be empty: leave the filter out instead")]
    EmptyText,
    /// An object without a comparison.
    #[error("a filter needs a comparison: equal, not, less, more, begins, ends, contains or regex")]
    NoOperator,
    /// A text comparison on a number.
    #[error("\"{operator}\" compares texts and this is a number: use equal, not, less or more")]
    NotText {
        /// The comparison.
        operator: &'static str,
    },
    /// An order comparison on a text.
    #[error("\"{operator}\" means nothing here: use equal, not, begins, ends, contains or regex")]
    NotOrdered {
        /// The comparison.
        operator: &'static str,
    },
    /// A pattern that cannot be read.
    #[error("\"{text}\" is not a pattern: {problem}")]
    Pattern {
        /// The pattern.
        text: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl Rule {
    /// The filters.
    pub fn filters(&self) -> &Filters {
        &self.0
    }

    /// The rule that matches this device alone: its address and its ids, so that it does not match other hardware
    /// at that address.
    pub(crate) fn of_device(device: &HostDevice) -> Self {
        Self(Box::new(Filters {
            id: Some(Filter::equal(device.id.into())),
            slot: Some(Filter::equal(Slot::Exact(device.bdf))),
            subsystem: device.subsystem.map(|id| Filter::equal(id.into())),
            ..Filters::default()
        }))
    }

    /// The address that the rule names, if it names exactly one.
    pub(crate) fn only_slot(&self) -> Option<HostBdf> {
        match self.0.slot.as_ref()?.only()? {
            Slot::Exact(bdf) => Some(*bdf),
            Slot::Glob(..) => None,
        }
    }

    /// Whether the rule names the device's address, but not the hardware that is there now.
    pub(crate) fn means_former(&self, device: &HostDevice) -> bool {
        let Filters {
            id,
            vendor,
            device: device_id,
            subsystem,
            ..
        } = (*self.0).clone();
        let identity = Filters {
            id,
            vendor,
            device: device_id,
            subsystem,
            ..Filters::default()
        };
        self.only_slot() == Some(device.bdf)
            && Self::try_from(identity).is_ok_and(|identity| !identity.matches(device))
    }

    /// Whether all filters hold for a device.
    pub fn matches(&self, device: &HostDevice) -> bool {
        let Filters {
            name,
            id,
            vendor,
            device: device_id,
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
        let nvme = device.nvme.as_ref();
        holds(vendor, || {
            named(HexId(device.id.vendor), device.vendor_name())
        }) && holds(device_id, || {
            named(HexId(device.id.device), device.device_name())
        }) && holds(id, || one(Some(IdPair::from(device.id))))
            && holds(subsystem, || one(device.subsystem.map(IdPair::from)))
            && holds(class, || named(device.class.into(), device.class_name()))
            && holds(slot, || address(Some(device.bdf)))
            && holds(pf, || address(device.physfn))
            && holds(serial, || serials(device))
            && holds(driver, || {
                let former = device.former_driver.as_deref();
                words(device.driver.as_deref().into_iter().chain(former))
            })
            && holds(numa, || one(device.numa_node.map(Number)))
            && holds(iommu_group, || one(device.iommu_group.map(Number)))
            && holds(mdev_type, || {
                words(device.mdev_types.iter().map(String::as_str))
            })
            && holds(name, || names(device))
            && holds(model, || {
                folded(
                    nvme.map(|nvme| Cow::Borrowed(nvme.model.as_str()))
                        .into_iter()
                        .collect(),
                )
            })
            && holds(firmware, || words(nvme.map(|nvme| nvme.firmware.as_str())))
            && holds(size, || one(nvme.map(|nvme| Number(nvme.gigabytes()))))
            && holds(bus, || one(None))
            && holds(port, || words([]))
            && holds(speed, || one(None))
    }
}

/// Whether a filter holds, if there is one. The field is read only then.
fn holds<'a, T: FilterValue>(
    filter: &Option<Filter<T>>,
    subject: impl FnOnce() -> Subject<'a, T>,
) -> bool {
    filter
        .as_ref()
        .is_none_or(|filter| filter.holds(&subject()))
}

fn one<T: ToString>(value: Option<T>) -> Subject<'static, T> {
    let texts = value.iter().map(|value| Cow::Owned(value.to_string()));
    Subject {
        texts: texts.collect(),
        names: Vec::new(),
        values: value.into_iter().collect(),
    }
}

fn named<T: ToString>(value: T, name: Option<&'static str>) -> Subject<'static, T> {
    Subject {
        names: name.into_iter().map(Cow::Borrowed).collect(),
        ..one(Some(value))
    }
}

fn address(bdf: Option<HostBdf>) -> Subject<'static, Slot> {
    Subject {
        values: bdf.into_iter().map(Slot::Exact).collect(),
        texts: bdf
            .into_iter()
            .flat_map(addresses)
            .map(Cow::Owned)
            .collect(),
        names: Vec::new(),
    }
}

fn words<'a>(texts: impl IntoIterator<Item = &'a str>) -> Subject<'a, Word> {
    let texts: Vec<_> = texts.into_iter().map(Cow::Borrowed).collect();
    Subject {
        values: texts.iter().map(|text| Word::exact(text)).collect(),
        texts,
        names: Vec::new(),
    }
}

fn folded(names: Vec<Cow<'_, str>>) -> Subject<'_, Word> {
    Subject {
        values: names.iter().map(|name| Word::folded(name)).collect(),
        texts: Vec::new(),
        names,
    }
}

/// The NVMe serial number as it is, and the PCIe one, whose hex digits users write in either case.
fn serials(device: &HostDevice) -> Subject<'_, Word> {
    let Subject { values, names, .. } = folded(
        device
            .dsn
            .as_deref()
            .into_iter()
            .map(Cow::Borrowed)
            .collect(),
    );
    let mut all = words(device.serial.as_deref());
    all.values.extend(values);
    all.names = names;
    all
}

/// The device's name alone, and after its vendor's as tables show it.
fn names(device: &HostDevice) -> Subject<'static, Word> {
    let Some(name) = device.device_name() else {
        return folded(
            device
                .vendor_name()
                .into_iter()
                .map(Cow::Borrowed)
                .collect(),
        );
    };
    let both = device
        .vendor_name()
        .map(|vendor| format!("{vendor} {name}"));
    folded(
        [Some(Cow::Borrowed(name)), both.map(Cow::Owned)]
            .into_iter()
            .flatten()
            .collect(),
    )
}

impl TryFrom<Filters> for Rule {
    type Error = RuleError;

    fn try_from(filters: Filters) -> Result<Self, RuleError> {
        if filters == Filters::default() {
            return Err(RuleError::Empty);
        }
        Ok(Self(Box::new(filters)))
    }
}

impl From<Rule> for Filters {
    fn from(rule: Rule) -> Self {
        *rule.0
    }
}

#[cfg(test)]
mod tests;
