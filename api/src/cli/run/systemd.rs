//! The service manager's socket (sd_notify(3)). `sd-notify` and its like open it when they have something to say, and
//! a VM that runs can open nothing.

use std::env;
use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The socket that `NOTIFY_SOCKET` names, connected; none if this is no service of type `notify`.
pub fn connect() -> Option<UnixDatagram> {
    to(&env::var_os("NOTIFY_SOCKET")?)
}

fn to(name: &OsStr) -> Option<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(name),
    };
    let connected = || {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address?)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let connected: std::io::Result<UnixDatagram> = connected();
    connected
        .inspect_err(|error| tracing::warn!(%error, "systemd does not hear when the guest runs"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_a_folder_is_reached_and_a_missing_one_does_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        assert!(to(path.as_os_str()).is_none());
        let service_manager = UnixDatagram::bind(&path).unwrap();
        to(path.as_os_str()).unwrap().send(b"READY=1").unwrap();
        let mut heard = [0; 64];
        let len = service_manager.recv(&mut heard).unwrap();
        assert_eq!(&heard[..len], b"READY=1");
    }
}
