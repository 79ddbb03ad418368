//! The host's network interfaces through rtnetlink(7).
//!
//! The messages are laid out by netlink-packet-route; the socket is nix's, which is here anyway. rtnetlink and neli
//! would each bring a runtime or macros for a handful of requests that are asked and answered one at a time.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::{AddressFamily as Family, RouteNetlinkMessage};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// An answer about one interface: 256 functions have about 60 KiB of attributes.
const ANSWER: usize = 256 << 10;

/// Sets an interface up, with this MTU if one is given (`ip link set DEV up mtu MTU`).
///
/// # Errors
/// The kernel refused.
pub fn set_up(index: u32, mtu: Option<u16>) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let mtu = mtu.map(|mtu| LinkAttribute::Mtu(mtu.into()));
    message.attributes.extend(mtu);
    let request = RouteNetlinkMessage::SetLink(message);
    ask(request, NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// Gives an interface an address (`ip address add ADDRESS/PREFIX dev DEV`).
///
/// # Errors
/// The kernel refused.
pub fn add_address(index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let mut message = AddressMessage::default();
    message.header.family = Family::Inet;
    message.header.prefix_len = prefix;
    message.header.index = index;
    let address = IpAddr::V4(address);
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    let request = RouteNetlinkMessage::NewAddress(message);
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    ask(request, flags).map(drop)
}

/// Sends one request; the answer, or none where the kernel only acknowledges.
pub(crate) fn ask(request: RouteNetlinkMessage, flags: u16) -> io::Result<Option<LinkMessage>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
    answer(&socket)
}

fn answer(socket: &OwnedFd) -> io::Result<Option<LinkMessage>> {
    let mut bytes = vec![0; ANSWER];
    let length = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
    let bytes = bytes.get(..length).unwrap_or_default();
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes);
    match message.map_err(io::Error::other)?.payload {
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(None),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        other => Err(io::Error::other(format!(
            "an answer of another kind: {other:?}"
        ))),
    }
}
