//! Devices that a VM gets only if their entry allows it: those without interrupts or without a reset.

use super::facts::Devices;
use super::{Finding, Level};
use crate::inventory::card::{Allow, lacks};
use crate::inventory::unavailable::{Unavailable, UnavailableDevice};

pub(super) fn judge(devices: &Devices) -> Vec<Finding> {
    let lacks = |device| lacks(device, &devices.all, Allow::default());
    let all: Vec<UnavailableDevice> = devices.wanted().filter_map(lacks).collect();
    let of = |no_reset: bool| {
        let words = |one: &UnavailableDevice| match &one.why {
            Unavailable::NoInterrupts { .. } if !no_reset => Some(one.bdf.to_string()),
            Unavailable::MustNotReset { why, .. } if no_reset => {
                Some(format!("{} (it must not be reset: {why})", one.bdf))
            }
            Unavailable::NoInterrupts { no_reset: true } | Unavailable::NoReset if no_reset => {
                Some(one.bdf.to_string())
            }
            _ => None,
        };
        let named: Vec<String> = all.iter().filter_map(words).collect();
        named.join(", ")
    };
    let findings = [
        (
            "interrupts",
            "Interrupts",
            of(false),
            "these have no interrupts",
            "add \"interrupts\": \"none\" to such a device's entry in the VM's file: it works without interrupts",
        ),
        (
            "resets",
            "Device reset",
            of(true),
            "nothing resets these between two VMs, and one could read what the other left",
            "add \"allow_no_reset\": true to such a device's entry in the VM's file if that is acceptable",
        ),
    ];
    let findings = findings.into_iter();
    findings
        .filter(|(_, _, named, ..)| !named.is_empty())
        .map(|(check, title, named, what, fix)| {
            let reason = format!("{what}: {named}");
            Finding::new(check, title, Level::Warn, reason).fix(fix)
        })
        .collect()
}
