//! Why a device is unavailable, in words: the device, the reason, and the remedy.

use std::fmt;

use super::{Unavailable, UnavailableDevice};
use crate::base::bdf::HostBdf;
use crate::holding::record::{LeaseKind, LeaseRecord};
use crate::inventory::device::DeviceType;

impl fmt::Display for UnavailableDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bdf = self.bdf;
        match &self.why {
            Unavailable::Bridge => write!(f, "{bdf} is a bridge, which belongs to the host"),
            Unavailable::Quarantined { why } => write!(
                f,
                "{bdf} is in quarantine: {why}; `gantry device release-quarantine {bdf}` releases it"
            ),
            Unavailable::HostDriver { driver } => {
                write!(
                    f,
                    "{bdf} is bound to {driver}: `gantry device detach {bdf}` frees it for VMs"
                )
            }
            Unavailable::HostNeeds { need } if need.bdf == bdf => {
                write!(f, "{need}: the host uses it")
            }
            Unavailable::HostNeeds { need } => write!(
                f,
                "{bdf} shares its IOMMU group with a device that the host uses: {need}"
            ),
            Unavailable::HasVfs { count } => write!(
                f,
                "{bdf} has {count} virtual functions, which would be destroyed: run `gantry group deactivate` for their group, or write 0 to its sriov_numvfs"
            ),
            Unavailable::Unbound => {
                write!(
                    f,
                    "{bdf} is bound to no driver: `gantry device detach {bdf}` binds it to vfio-pci"
                )
            }
            Unavailable::NoIommuGroup => write!(
                f,
                "{bdf} is in no IOMMU group: switch the IOMMU on in the firmware (VT-d, AMD-Vi) and on the \
                 kernel's command line (intel_iommu=on; AMD's is on by default)"
            ),
            Unavailable::GroupInUse { group, members } => {
                let members: Vec<String> = members
                    .iter()
                    .map(|(member, driver)| format!("{member} ({driver})"))
                    .collect();
                write!(
                    f,
                    "{bdf} shares IOMMU group {group} with {}, which the host uses; a group is assigned as a whole: \
                     `gantry device detach {bdf}` detaches all of it",
                    members.join(", ")
                )
            }
            Unavailable::NodeMissing { group } => write!(
                f,
                "{bdf} is bound to vfio-pci, but /dev/vfio/{group} is not there: `modprobe vfio_iommu_type1`, and in \
                 a container make /dev/vfio visible (with iommufd, its cdev below /dev/vfio/devices)"
            ),
            Unavailable::NodeDenied { group } => write!(
                f,
                "{bdf} cannot be opened by this user: run as root, or `chown USER /dev/vfio/{group}` as root (with iommufd, its cdev below \
                 /dev/vfio/devices)"
            ),
            _ => of_holder(f, bdf, &self.why),
        }
    }
}

impl UnavailableDevice {
    /// The advice, to append to the sentence, about the holder of a device that a command must move; empty if
    /// the sentence contains it.
    pub(crate) fn end_of_lease(&self) -> String {
        let (device, holder) = match &self.why {
            Unavailable::Leased { holder } => (self.bdf, holder),
            Unavailable::GroupLeased { member, holder, .. } => (*member, holder),
            _ => return String::new(),
        };
        match holder {
            Some(LeaseRecord {
                kind: LeaseKind::Vm,
                name,
                ..
            }) => {
                format!(": `gantry vm detach {name} {device}` takes it from the VM, or end the VM")
            }
            Some(_) => ": try again when that has ended".to_owned(),
            None => ": end that process first".to_owned(),
        }
    }
}

/// The holder of the device, or of one that belongs to it.
fn of_holder(f: &mut fmt::Formatter<'_>, bdf: HostBdf, why: &Unavailable) -> fmt::Result {
    match why {
        Unavailable::Leased { holder } => write!(f, "{bdf} is held by {}", name(holder)),
        Unavailable::LockUnreadable { file, why } => write!(
            f,
            "{bdf} counts as held: its lock file {} cannot be read ({why}); as root, remove the \
             file if no process uses the device",
            file.display()
        ),
        Unavailable::GroupLeased {
            group,
            member,
            holder,
        } => write!(
            f,
            "{bdf} shares IOMMU group {group} with {member}, which is held by {}; a group is never split \
             between VMs",
            name(holder)
        ),
        _ => of_request(f, bdf, why),
    }
}

/// Why a card and its virtual functions cannot go to different VMs.
fn of_card(f: &mut fmt::Formatter<'_>, bdf: HostBdf, why: &Unavailable) -> fmt::Result {
    match why {
        Unavailable::NoVfToken { pf } => write!(
            f,
            "{bdf} is a function of {pf}, which is bound to vfio-pci: VMs can have one each only with a VF token; set \
             \"vf_token\": true in the \"sriov\" of its group, or `gantry device reattach {pf}`"
        ),
        Unavailable::PfQuarantined { pf, why } => write!(
            f,
            "{bdf} is a function of {pf}, which is in quarantine: {why}; `gantry device release-quarantine {pf}` releases it"
        ),
        Unavailable::PfIdle { pf } => write!(
            f,
            "{bdf} is a function of {pf}, which is bound to vfio-pci and which no VM has: start the VM that gets {pf} first, \
             it sets the VF token"
        ),
        Unavailable::VfHeld { vf } => write!(
            f,
            "{bdf} has the virtual function {vf}, which is held: VMs can have one each only with a VF token; \
             set \"vf_token\": true in the \"sriov\" of its group"
        ),
        _ => write!(f, "{bdf} is not available"),
    }
}

/// Why an available device does not fit the request.
fn of_request(f: &mut fmt::Formatter<'_>, bdf: HostBdf, why: &Unavailable) -> fmt::Result {
    match why {
        Unavailable::OtherGroup { owner } => {
            write!(
                f,
                "{bdf} belongs to group \"{owner}\", which is defined earlier and matches it as well"
            )
        }
        Unavailable::OfTenant { tenant } => write!(
            f,
            "{bdf} belongs to tenant \"{tenant}\": `gantry tenant revoke {tenant} {bdf}` takes it back"
        ),
        Unavailable::AskedFor => {
            write!(f, "{bdf} is asked for twice in the request")
        }
        Unavailable::Changed { is } => write!(
            f,
            "{bdf} is {is} now, not the device that the rule names: change the rule if the new device is right"
        ),
        Unavailable::DeviceType { is, wanted } => mismatch(f, bdf, *is, *wanted),
        Unavailable::ResourceClass { is } => write!(f, "{bdf} has resource class {is}"),
        Unavailable::Traits { missing } => {
            write!(f, "{bdf} lacks the traits {}", missing.join(", "))
        }
        Unavailable::Migratable { wanted } => {
            let said = if *wanted { "yes" } else { "no" };
            write!(
                f,
                "{bdf} has no device_spec that says \"live_migratable\": \"{said}\""
            )
        }
        Unavailable::Numa { node: Some(node) } => {
            write!(f, "{bdf} is on NUMA node {node}, too far from the VM")
        }
        Unavailable::Numa { node: None } => {
            write!(f, "{bdf} does not say which NUMA node it is on")
        }
        Unavailable::NoInterrupts { no_reset } => {
            write!(
                f,
                "{bdf} has no interrupts: add \"interrupts\": \"none\" to the device's entry to use it without"
            )?;
            match no_reset {
                true => {
                    f.write_str(". ")?;
                    of_request(f, bdf, &Unavailable::NoReset)
                }
                false => Ok(()),
            }
        }
        Unavailable::NoReset => write!(
            f,
            "{bdf} has no reset (its reset_method in sysfs is empty): a VM can read what the VM before left in it. \
             Add \"allow_no_reset\": true to the device's entry to use it all the same"
        ),
        Unavailable::MustNotReset { why, by_kernel } => must_not_reset(f, bdf, why, *by_kernel),
        Unavailable::SamePf { pf } => {
            write!(f, "{bdf} is on {pf}, like another device of the request")
        }
        _ => of_card(f, bdf, why),
    }
}

fn must_not_reset(
    f: &mut fmt::Formatter<'_>,
    bdf: HostBdf,
    why: &str,
    by_kernel: bool,
) -> fmt::Result {
    write!(f, "{bdf} must not be reset: {why}; ")?;
    match by_kernel {
        true => write!(
            f,
            "the kernel would reset it for a VM: `echo > /sys/bus/pci/devices/{bdf}/reset_method` as root switches \
             that off"
        ),
        false => f.write_str(
            "a VM can read what the VM before left in it. Add \"allow_no_reset\": true to the device's entry to use \
             it all the same",
        ),
    }
}

/// The remedy in the alias.
fn mismatch(
    f: &mut fmt::Formatter<'_>,
    bdf: HostBdf,
    is: DeviceType,
    wanted: Option<DeviceType>,
) -> fmt::Result {
    match wanted {
        Some(wanted) => write!(f, "{bdf} is {is}, not {wanted}")?,
        None => write!(f, "{bdf} is {is}, which an alias must ask for by name")?,
    }
    write!(f, ": set \"device_type\": \"{is}\" in the alias")
}

fn name(holder: &Option<LeaseRecord>) -> String {
    holder
        .as_ref()
        .map_or_else(|| "an unknown process".to_owned(), LeaseRecord::to_string)
}
