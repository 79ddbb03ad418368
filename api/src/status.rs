//! Exit statuses: their numbers and descriptions, and which error leads to which.

use std::error::Error;

use gantry_resources::allocation::AllocateError;
use gantry_resources::base::json::JsonError;
use gantry_resources::base::{ConfigError, causes};
use gantry_resources::opener::OpenerError;
use gantry_resources::pools::{EditError, GroupError, PlanError, UnknownTenant};
use gantry_resources::tenants::TenantError;
use gantry_vmm::DeviceError;
use gantry_vmm::command::CommandError;

use crate::config;

/// The guest powered off, or the command did what it was asked.
pub const SUCCESS: u8 = 0;
/// gantry or the host failed.
pub const FAILED: u8 = 1;
/// The command line or the configuration is wrong; clap exits with the same code.
pub const USAGE: u8 = 2;
/// The guest died.
pub const GUEST_DIED: u8 = 3;
/// The VM was stopped from the console.
pub const STOPPED: u8 = 4;
/// Others hold the devices, or the host is in maintenance: `EX_TEMPFAIL` of sysexits.h.
pub const TRY_AGAIN: u8 = 75;
/// Plus n: ended by signal n, as shells have it.
pub const BY_SIGNAL: u8 = 128;

/// The statuses for people, in the order of their numbers.
pub const EXIT_STATUSES: &str = "\
Exit status:
  0      the guest powered off, or the command did what it was asked
  1      gantry or the host failed
  2      the command line or a file is wrong, or names a group, an alias,
         a plan, a tenant or a user that does not exist
  3      the guest died (a triple fault, say)
  4      the VM was stopped from the console with ctrl-a x
  75     not now: other VMs hold the devices, or the host is in
         maintenance; try again later
  128+n  ended by signal n";

/// The status that an error leads to.
pub fn status_of(error: &(dyn Error + 'static)) -> u8 {
    if is_temporary(error) {
        TRY_AGAIN
    } else if causes(error).any(is_mistake) {
        USAGE
    } else {
        FAILED
    }
}

/// Whether the same request may succeed later, once others have released what they hold.
pub fn is_temporary(error: &(dyn Error + 'static)) -> bool {
    causes(error).any(|error| {
        if let Some(error) = error.downcast_ref::<gantry_vmm::Error>() {
            use gantry_vmm::Error as E;
            return match error {
                E::Maintenance(_) | E::Device(DeviceError::Opener(OpenerError::Busy(_))) => true,
                E::Device(DeviceError::Allocate(error)) => error.is_temporary(),
                _ => false,
            };
        }
        match error.downcast_ref() {
            Some(CommandError::Failed(error)) => return is_temporary(error),
            Some(CommandError::Busy) => return true,
            _ => {}
        }
        let allocate = error.downcast_ref::<AllocateError>();
        allocate.is_some_and(AllocateError::is_temporary)
    })
}

/// Whether a file is wrong, or a name that was given names nothing on this host.
fn is_mistake(error: &(dyn Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref() {
        use gantry_vmm::Error as E;
        match error {
            E::Device(DeviceError::Allocate(error)) => error.is_mistake(),
            E::Device(DeviceError::Opener(OpenerError::Mistaken(_))) | E::DuplicateId(_) => true,
            _ => false,
        }
    } else if let Some(error) = error.downcast_ref::<AllocateError>() {
        error.is_mistake()
    } else if error.is::<config::Error>() || error.is::<JsonError>() || error.is::<UnknownTenant>()
    {
        true
    } else if let Some(error) = error.downcast_ref::<ConfigError>() {
        error.is_mistake()
    } else if let Some(EditError::Groups(error)) = error.downcast_ref() {
        error.is_mistake()
    } else if let Some(error) = error.downcast_ref::<GroupError>() {
        error.is_mistake()
    } else if let Some(error) = error.downcast_ref::<PlanError>() {
        error.is_mistake()
    } else {
        let tenant = error.downcast_ref::<TenantError>();
        tenant.is_some_and(TenantError::is_mistake)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device_error(error: impl Into<DeviceError>) -> gantry_vmm::Error {
        error.into().into()
    }

    #[test]
    fn what_others_hold_is_a_reason_to_try_again() {
        let busy = || device_error(OpenerError::Busy("all are held".to_owned()));
        assert_eq!(status_of(&busy()), TRY_AGAIN);
        assert_eq!(status_of(&CommandError::from(busy())), TRY_AGAIN);
        assert_eq!(status_of(&CommandError::Busy), TRY_AGAIN);
        let maintenance = gantry_vmm::Error::Maintenance("new memory".to_owned());
        assert_eq!(status_of(&maintenance), TRY_AGAIN);
        let refused = device_error(OpenerError::Refused("not yours".to_owned()));
        assert_eq!(status_of(&refused), FAILED);
    }

    #[test]
    fn a_name_that_there_is_not_is_a_mistake_whatever_it_names() {
        let name = || "gpu".to_owned();
        let group = AllocateError::UnknownGroup {
            name: name(),
            near: None,
            known: Vec::new(),
        };
        assert_eq!(status_of(&device_error(group)), USAGE);
        let by_opener = OpenerError::Mistaken("there is no group \"gpu\"".to_owned());
        assert_eq!(status_of(&device_error(by_opener)), USAGE);
        let group = GroupError::Unknown {
            name: name(),
            near: None,
        };
        assert_eq!(status_of(&group), USAGE);
        let plan = PlanError::Unknown {
            name: name(),
            near: None,
        };
        assert_eq!(status_of(&plan), USAGE);
    }

    #[test]
    fn every_status_has_its_words() {
        for status in [SUCCESS, FAILED, USAGE, GUEST_DIED, STOPPED, TRY_AGAIN] {
            let begin = format!("  {status} ");
            assert!(
                EXIT_STATUSES.lines().any(|line| line.starts_with(&begin)),
                "{status}"
            );
        }
    }
}
