//! The frames that `xtask` and the lab's agent exchange over a virtio-serial port.
//!
//! A frame is `id: u32 LE, kind: u8, length: u32 LE, payload`. `id` names one command; many run at
//! a time. Payloads are raw bytes (the three streams) or JSON (everything else).

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port, found by the agent under `/sys/class/virtio-ports`.
pub const PORT_NAME: &str = "gantry.lab";

/// Frames larger than this are a broken stream, not data.
const MAX_PAYLOAD: u32 = 1 << 20;

/// What a frame carries. Lower half: to the agent; upper half: from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host to agent and back: "are you there?" Sent once, before anything else.
    Hello = 0,
    /// Start a command: a JSON [`Run`].
    Run = 1,
    /// Bytes for its standard input; an empty payload closes it.
    Stdin = 2,
    /// Send a signal to its process group: a JSON number.
    Signal = 3,
    /// New size of its terminal: a JSON [`Size`].
    Resize = 4,
    /// Bytes of its standard output (or its terminal).
    Stdout = 16,
    /// Bytes of its standard error.
    Stderr = 17,
    /// The command is over: a JSON [`Exit`]. The last frame of its id.
    Exit = 18,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Hello,
            Self::Run,
            Self::Stdin,
            Self::Signal,
            Self::Resize,
            Self::Stdout,
            Self::Stderr,
            Self::Exit,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// A command to start in the lab host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Program and arguments; never empty.
    pub argv: Vec<String>,
    /// Added to the agent's environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// With a terminal of this size as its three streams and controlling terminal.
    pub tty: Option<Size>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It exited with this status.
    Code(i32),
    /// It was killed by this signal.
    Signal(i32),
    /// It never started, and why.
    NotStarted(String),
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which command.
    pub id: u32,
    /// What it is about.
    pub kind: Kind,
    /// Its payload.
    pub data: Vec<u8>,
}

impl Frame {
    /// A frame of raw bytes.
    pub fn bytes(id: u32, kind: Kind, data: impl Into<Vec<u8>>) -> Self {
        Self {
            id,
            kind,
            data: data.into(),
        }
    }

    /// A frame whose payload is `value` as JSON.
    pub fn json(id: u32, kind: Kind, value: &impl Serialize) -> io::Result<Self> {
        Ok(Self::bytes(id, kind, serde_json::to_vec(value)?))
    }

    /// The payload as a value.
    pub fn parse<T: for<'de> Deserialize<'de>>(&self) -> io::Result<T> {
        Ok(serde_json::from_slice(&self.data)?)
    }

    /// Writes the frame in one call, so that frames of several threads do not mix.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.data.len())
            .ok()
            .filter(|length| *length <= MAX_PAYLOAD)
            .ok_or_else(|| io::Error::other("a frame's payload is larger than 1 MiB"))?;
        let mut bytes = Vec::with_capacity(self.data.len() + 9);
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&self.data);
        out.write_all(&bytes)
    }

    /// Reads the next frame; an end of file between frames is `UnexpectedEof`.
    pub fn read_from(input: &mut impl Read) -> io::Result<Self> {
        let mut header = [0u8; 9];
        input.read_exact(&mut header)?;
        let [a, b, c, d, kind, l0, l1, l2, l3] = header;
        let kind = Kind::from_byte(kind)
            .ok_or_else(|| io::Error::other(format!("unknown frame kind {kind}")))?;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length > MAX_PAYLOAD {
            return Err(io::Error::other(format!("a frame of {length} bytes")));
        }
        let mut data = vec![0; length as usize];
        input.read_exact(&mut data)?;
        Ok(Self {
            id: u32::from_le_bytes([a, b, c, d]),
            kind,
            data,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let run = Run {
            argv: vec!["sh".into(), "-c".into(), "true".into()],
            env: vec![("A".into(), "1".into())],
            cwd: "/".into(),
            tty: Some(Size { rows: 24, cols: 80 }),
        };
        let mut wire = Vec::new();
        Frame::json(7, Kind::Run, &run)
            .unwrap()
            .write_to(&mut wire)
            .unwrap();
        Frame::bytes(8, Kind::Stdout, [0u8, 255, 10])
            .write_to(&mut wire)
            .unwrap();
        let mut input = wire.as_slice();
        let first = Frame::read_from(&mut input).unwrap();
        assert_eq!((first.id, first.kind), (7, Kind::Run));
        assert_eq!(first.parse::<Run>().unwrap(), run);
        let second = Frame::read_from(&mut input).unwrap();
        assert_eq!(second, Frame::bytes(8, Kind::Stdout, [0u8, 255, 10]));
        assert_eq!(
            Frame::read_from(&mut input).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn garbage_is_refused() {
        let unknown = [0, 0, 0, 0, 99, 0, 0, 0, 0];
        assert!(Frame::read_from(&mut unknown.as_slice()).is_err());
        let huge = [0, 0, 0, 0, Kind::Stdout as u8, 255, 255, 255, 255];
        assert!(Frame::read_from(&mut huge.as_slice()).is_err());
        let too_big = Frame::bytes(1, Kind::Stdin, vec![0; (MAX_PAYLOAD + 1) as usize]);
        assert!(too_big.write_to(&mut Vec::new()).is_err());
    }
}
