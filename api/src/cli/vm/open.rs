//! Opens a device for a VM whose user need not be allowed to, once that user may have it.

use std::fs::File;
use std::path::PathBuf;

use gantry_resources::base::{DeviceName, HostPaths};
use gantry_resources::facts::{VfioBackEnd, cdev};
use gantry_resources::holding::{LeaseStatus, holder};
use gantry_resources::pools::Tenants;
use nix::unistd::{Uid, User};

use crate::http::client::{Client, Sent};
use crate::report::{Failure, TRY_AGAIN};

/// Opens what the VM of `client` needs to have a device by iommufd: the device's cdev and an iommufd. Any process
/// may listen on a socket: the descriptors go to its user only.
pub fn open(client: &Client, device: DeviceName, paths: &HostPaths) -> Result<Sent, Failure> {
    let to = client.listener_user()?;
    may_have(Uid::from_raw(to), device, &Tenants::load(paths)?)?;
    free(device, &holder(paths, device))?;
    let cdev = cdev(paths, device).map_err(|error| Failure::host(error.to_string()))?;
    let open = |path: PathBuf| {
        let opened = File::options().read(true).write(true).open(&path);
        opened.map_err(|error| Failure::host(format!("cannot open {}: {error}", path.display())))
    };
    let files = vec![open(cdev)?, open(VfioBackEnd::Iommufd.node(paths))?];
    Ok(Sent { files, to })
}

/// Checks that the user who listens on a socket may have a device: it is granted to that user, or it is no tenant's
/// and that user is root or runs this command.
fn may_have(listener: Uid, device: DeviceName, tenants: &Tenants) -> Result<(), Failure> {
    let user = User::from_uid(listener).ok().flatten();
    let user = user.map_or_else(|| listener.to_string(), |user| user.name);
    let not_sent = format!("{device} is not sent to user {user}, whose process has the socket");
    match tenants.owner_of(device) {
        Some(tenant) if tenant.file.user == user => Ok(()),
        Some(tenant) => {
            let (name, owner) = (&tenant.name, &tenant.file.user);
            let what = format!("{not_sent}: it is granted to tenant \"{name}\" of user {owner}");
            Err(Failure::host(what).help(format!("attach it to a VM of user {owner}")))
        }
        None if listener.is_root() || listener == Uid::effective() => Ok(()),
        None => {
            let what = format!("{not_sent}: it is granted to no tenant of that user");
            let tenant = tenants.of_user(&user).next();
            let help = match tenant.map(|tenant| &tenant.name) {
                Some(name) => format!("`gantry tenant grant {name} {device}`"),
                None => format!(
                    "`gantry tenant create NAME --user {user}`, then `gantry tenant grant NAME {device}`"
                ),
            };
            Err(Failure::host(what).help(help))
        }
    }
}

fn free(device: DeviceName, lease: &LeaseStatus) -> Result<(), Failure> {
    if !lease.is_held() {
        return Ok(());
    }
    let record = lease.record().map(ToString::to_string);
    let by = record.unwrap_or_else(|| "an unknown holder".to_owned());
    let what = format!("{device} is held by {by}");
    Err(Failure::new(TRY_AGAIN, what).help("`gantry device list` shows the devices that are free"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_device_is_opened_for_its_tenant_or_for_root_and_for_nobody_else() {
        let root = tempfile::tempdir().unwrap();
        let paths = HostPaths::under(root.path());
        let (own, foreign) = ("0000:01:00.0", "0000:02:00.0");
        for (name, user, device) in [("a", "daemon", own), ("b", "bin", foreign)] {
            let dir = paths.config.join("tenants").join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("tenant.json"), format!(r#"{{"user": "{user}"}}"#)).unwrap();
            let groups = format!(
                r#"{{"groups": [{{"name": "{name}", "rules": [{{"slot": "{device}"}}]}}]}}"#
            );
            fs::write(dir.join("groups.json"), groups).unwrap();
        }
        let tenants = Tenants::load(&paths).unwrap();
        let daemon = User::from_name("daemon").unwrap().unwrap().uid;
        let asked = |user, device: &str| may_have(user, device.parse().unwrap(), &tenants);
        asked(daemon, own).unwrap();
        for user in [Uid::from_raw(0), Uid::effective()] {
            asked(user, "0000:03:00.0").unwrap();
        }
        for (user, device, remedy) in [
            (daemon, foreign, "attach it to a VM of user bin"),
            (Uid::from_raw(0), own, "attach it to a VM of user daemon"),
            (daemon, "0000:03:00.0", "gantry tenant grant a 0000:03:00.0"),
            (Uid::from_raw(65_533), "0000:03:00.0", "--user 65533"),
        ] {
            let refused = format!("{:?}", asked(user, device).unwrap_err());
            assert!(refused.contains(device), "{refused}");
            assert!(refused.contains(remedy), "{refused}");
        }
    }
}
