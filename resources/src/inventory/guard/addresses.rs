//! Network interfaces by which the host can be reached: those that are up and have an address.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr};

use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::InterfaceFlags;

use crate::base::host::HostPaths;

/// Interfaces with an address that is valid beyond the link, one each. The kernel knows those of its own host; a
/// host of files has none.
pub(super) fn addressed(paths: &HostPaths) -> io::Result<BTreeMap<String, IpAddr>> {
    let mut found = BTreeMap::new();
    if paths.sysfs != HostPaths::default().sysfs {
        return Ok(found);
    }
    for one in getifaddrs()? {
        // The label of an IPv4 address may differ from the interface's name, such as eth0:1.
        let name = one.interface_name.split(':').next().unwrap_or_default();
        if let Some(address) = reachable(&one) {
            found.entry(name.to_owned()).or_insert(address);
        }
    }
    Ok(found)
}

fn reachable(one: &InterfaceAddress) -> Option<IpAddr> {
    let address = one.address.as_ref()?;
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    let address = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
    let up = one.flags.contains(InterfaceFlags::IFF_UP);
    (up && is_global(address)).then_some(address)
}

/// Neither a loopback nor a link-local address (RFC 3927, RFC 4291 2.5.6).
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => v6 != Ipv6Addr::LOCALHOST && !v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_link_do_not_count() {
        for (address, counts) in [
            ("10.9.1.1", true),
            ("192.0.2.7", true),
            ("2001:db8::1", true),
            ("fd00::1", true),
            ("127.0.0.1", false),
            ("169.254.3.4", false),
            ("fe80::5054:ff:fe00:1", false),
            ("::1", false),
        ] {
            assert_eq!(is_global(address.parse().unwrap()), counts, "{address}");
        }
    }

    #[test]
    fn a_host_of_files_has_none_of_this_ones() {
        let files = HostPaths::under("/nonexistent".as_ref());
        assert!(addressed(&files).unwrap().is_empty());
        let here = addressed(&HostPaths::default()).unwrap();
        assert!(!here.contains_key("lo"), "{here:?}");
    }
}
