//! Interfaces through which users are logged in: those that the answers of their SSH connections leave by.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// SSH's port, as /proc/net/tcp writes it.
const SSH: &str = "0016";
/// `TCP_ESTABLISHED` of the kernel's net/tcp_states.h.
const ESTABLISHED: &str = "01";

/// Interfaces that established connections to this host's SSH go through, from /proc/net/tcp, tcp6 (for
/// IPv4 peers of a socket that takes both) and route (proc_net(5)).
pub(super) fn interfaces(tcp: &str, tcp6: &str, routes: &str) -> BTreeSet<String> {
    let peers = peers(tcp).chain(peers(tcp6));
    peers.filter_map(|peer| way(peer, routes)).collect()
}

/// The other ends of connections to SSH.
fn peers(table: &str) -> impl Iterator<Item = Ipv4Addr> {
    table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
        let wanted = local.ends_with(&format!(":{SSH}")) && state == ESTABLISHED;
        wanted.then(|| address(remote.split(':').next()?))?
    })
}

/// An address in the host's byte order; an IPv6 address only if it is a mapped IPv4 one.
fn address(hex: &str) -> Option<Ipv4Addr> {
    let hex = match hex.len() {
        8 => hex,
        _ => hex.strip_prefix("0000000000000000FFFF0000")?,
    };
    let bytes = u32::from_str_radix(hex, 16).ok()?.to_le_bytes();
    Some(Ipv4Addr::from(bytes))
}

/// The interface of the longest prefix that holds an address.
fn way(peer: Ipv4Addr, routes: &str) -> Option<String> {
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let bits = |field: &&str| Some(u32::from(address(field)?));
        let (to, mask) = (bits(fields.get(1)?)?, bits(fields.get(7)?)?);
        (u32::from(peer) & mask == to).then(|| (mask, fields[0].to_owned()))
    };
    let routes = routes.lines().filter_map(route);
    routes.max_by_key(|(mask, _)| *mask).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
        eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\n\
        mgmt0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\n\
        mgmt1\t0001000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n";

    fn line(local: &str, remote: &str, state: &str) -> String {
        format!("   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 0 0 1\n")
    }

    #[test]
    fn answers_take_the_narrowest_route() {
        let of = |tcp: &str, tcp6: &str| {
            let found = interfaces(tcp, tcp6, ROUTES);
            found.into_iter().collect::<Vec<_>>().join(" ")
        };
        // 10.3.9.9, 10.0.9.9 and 10.0.1.9.
        let wide = line("0100000A:0016", "0909030A:D431", "01");
        let narrow = line("0100000A:0016", "0909000A:D431", "01");
        assert_eq!(of(&wide, ""), "mgmt0");
        assert_eq!(of(&narrow, ""), "mgmt0");
        let second = line("0100000A:0016", "0901000A:D431", "01");
        assert_eq!(of(&second, ""), "mgmt1");
        let over6 = line(
            "0000000000000000FFFF00000100000A:0016",
            "0000000000000000FFFF00000100A8C0:D431",
            "01",
        );
        assert_eq!(of("", &over6), "eth0");
        // Another service's, and one that only listens.
        assert_eq!(of(&line("0100000A:0050", "0909000A:D431", "01"), ""), "");
        assert_eq!(of(&line("00000000:0016", "00000000:0000", "0A"), ""), "");
        assert_eq!(
            of(
                "",
                &line(
                    "20010DB8000000000000000000000001:0016",
                    "20010DB8000000000000000000000002:D431",
                    "01"
                )
            ),
            ""
        );
    }
}
