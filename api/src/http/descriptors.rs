//! Descriptors that go with a request (`SCM_RIGHTS`, unix(7)).

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most that a request can have.
pub const MOST: usize = 2;
/// How many are received, so that one too many is noticed. The kernel closes all others.
const RECEIVED: usize = MOST + 1;

/// The descriptors that have come over a connection since its last request.
#[derive(Debug, Clone, Default)]
pub struct Descriptors(Arc<Mutex<Received>>);

#[derive(Debug, Default)]
struct Received {
    files: Vec<File>,
    /// Some did not arrive: this process may have no more files open.
    lost: bool,
}

/// Not all descriptors of a request have arrived.
#[derive(Debug, thiserror::Error)]
#[error(
    "the descriptors that came with the request were lost: the VM's process has as many files open as it may: start \
     the VM with a higher limit (`ulimit -n`)"
)]
pub struct Lost;

impl Descriptors {
    /// Reads from a socket, and keeps what descriptors come with the bytes.
    ///
    /// # Errors
    /// Those of recvmsg(2).
    pub fn receive(&self, socket: BorrowedFd<'_>, data: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(RECEIVED))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let data = &mut [IoSliceMut::new(data)];
        let received = recvmsg(socket, data, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                let kept = &mut self.lock().files;
                let room = RECEIVED.saturating_sub(kept.len());
                kept.extend(files.take(room).map(File::from));
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            let mut kept = self.lock();
            // With one too many, the request is refused for that.
            kept.lost |= kept.files.len() < RECEIVED;
        }
        Ok(received.bytes)
    }

    /// Those that have come, for the request that has come.
    ///
    /// # Errors
    /// Not all have come. Those that have are closed.
    pub fn take(&self) -> Result<Vec<File>, Lost> {
        match std::mem::take(&mut *self.lock()) {
            Received { lost: true, .. } => Err(Lost),
            Received { files, .. } => Ok(files),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Received> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends descriptors ahead of a request, with an empty line, which servers skip there (RFC 9112, 2.2).
///
/// # Errors
/// Those of sendmsg(2).
pub fn send(socket: impl AsFd, files: &[File]) -> io::Result<()> {
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(
        socket,
        &[IoSlice::new(b"\r\n")],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn they_come_with_the_bytes_once_and_never_without_a_bound() {
        let (client, server) = UnixStream::pair().unwrap();
        let received = Descriptors::default();
        let mut data = [0; 8];
        let mut next = || received.receive(server.as_fd(), &mut data);
        let two = || [(); 2].map(|()| tempfile::tempfile().unwrap());
        send(&client, &two()).unwrap();
        assert_eq!(next().unwrap(), 2);
        assert_eq!(received.take().unwrap().len(), 2);
        assert_eq!(received.take().unwrap().len(), 0);
        for _ in 0..5 {
            send(&client, &two()).unwrap();
            assert_eq!(next().unwrap(), 2);
        }
        assert_eq!(received.take().unwrap().len(), RECEIVED);
        // The kernel has no room for all of a message, as when no more files may be open.
        received.lock().lost = true;
        send(&client, &two()).unwrap();
        next().unwrap();
        let lost = received.take().unwrap_err().to_string();
        assert!(lost.contains("ulimit -n"), "{lost}");
        assert_eq!(received.take().unwrap().len(), 0);
        drop(client);
        assert_eq!(next().unwrap(), 0);
        assert_eq!((&server).read(&mut data).unwrap(), 0);
    }
}
