//! Lines for systemd's journal, which takes the priority of a line from its begin (sd-daemon(3)).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

/// The longest line. It is written at once, and is shorter than those that the journal breaks itself.
const LONGEST: usize = 2048;
/// The priority of a guest's lines.
const PRIORITY: &[u8] = b"<6>";

/// Whether a stream is the file that the service manager has connected to its journal (systemd.exec(5)).
pub fn is_journal(stream: &impl AsFd) -> bool {
    let named = std::env::var("JOURNAL_STREAM");
    named.is_ok_and(|named| {
        let own = stream.as_fd().try_clone_to_owned().map(File::from);
        let own = own.and_then(|own| own.metadata());
        own.is_ok_and(|own| named == format!("{}:{}", own.dev(), own.ino()))
    })
}

/// Writes a guest's output in whole lines, each with its priority: the guest cannot choose one. Standard error may be
/// the same stream, so the begin of a line is known only if nothing unfinished is written.
#[derive(Debug)]
pub struct GuestLines<W: Write> {
    out: W,
    line: Vec<u8>,
}

impl<W: Write> GuestLines<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Self {
        Self {
            out,
            line: PRIORITY.to_vec(),
        }
    }

    fn end_line(&mut self) -> io::Result<()> {
        self.line.push(b'\n');
        let written = self.out.write_all(&self.line);
        self.line.truncate(PRIORITY.len());
        written
    }
}

impl<W: Write> Write for GuestLines<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for &byte in data {
            // The journal ends a line at a zero, too.
            if byte == b'\n' || byte == 0 {
                self.end_line()?;
                continue;
            }
            self.line.push(byte);
            if self.line.len() + 1 == LONGEST {
                self.end_line()?;
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<W: Write> Drop for GuestLines<W> {
    /// Writes an unfinished line.
    fn drop(&mut self) {
        if self.line.len() > PRIORITY.len() {
            let _ = self.end_line();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written of these parts: each write of its own.
    fn written(parts: &[&[u8]]) -> Vec<Vec<u8>> {
        struct Writes(Vec<Vec<u8>>);
        impl Write for &mut Writes {
            fn write(&mut self, data: &[u8]) -> io::Result<usize> {
                self.0.push(data.to_vec());
                Ok(data.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut writes = Writes(Vec::new());
        let mut lines = GuestLines::new(&mut writes);
        for part in parts {
            assert_eq!(lines.write(part).unwrap(), part.len());
        }
        drop(lines);
        writes.0
    }

    #[test]
    fn a_guest_chooses_no_priority() {
        let lines = written(&[b"<0>a\n<", b"1>b\0<2>c\nlogin: "]);
        assert_eq!(
            lines,
            [
                &b"<6><0>a\n"[..],
                b"<6><1>b\n",
                b"<6><2>c\n",
                b"<6>login: \n"
            ]
        );
    }

    #[test]
    fn every_write_is_a_whole_line_that_the_journal_does_not_break() {
        let long = vec![b'x'; 3 * LONGEST];
        let lines = written(&[&long]);
        assert_eq!(lines.len(), 4);
        for line in lines {
            assert!(line.len() <= LONGEST);
            assert!(line.starts_with(b"<6>") && line.ends_with(b"\n"));
        }
    }
}
