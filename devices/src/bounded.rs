//! Output to a file of bounded size, which keeps the newest output.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// Takes the place of older output.
const NOTE: &[u8] = b"[older output was removed from here]\n";
/// Bytes moved at a time.
const STEP: usize = 64 << 10;

/// A file that holds a limited number of bytes. When it is full, the older half is removed at once, so that a
/// reader of the file finds text without holes.
pub struct BoundedFile {
    file: File,
    /// The same file, opened to append, where others append to it.
    shared: Option<File>,
    most: u64,
    len: u64,
}

impl BoundedFile {
    /// Writes to `file`, which is empty and readable. `most` is far more than one write.
    pub fn new(file: File, most: u64) -> Self {
        Self {
            file,
            shared: None,
            most,
            len: 0,
        }
    }

    /// Appends to a file to which other processes append a little, by the same open file description `append`. `file`
    /// is the same file, opened to read and write anywhere.
    pub fn shared(file: File, append: File, most: u64) -> Self {
        Self {
            shared: Some(append),
            ..Self::new(file, most)
        }
    }

    /// Keeps the newer half.
    fn halve(&mut self) -> io::Result<()> {
        let mut from = self.len - (self.len / 2).min(self.most / 2);
        self.file.write_all_at(NOTE, 0)?;
        let mut kept = NOTE.len() as u64;
        let mut step = vec![0; STEP];
        loop {
            // To the end, beyond what was written here if others append too. Another process may have truncated the file.
            let read = self.file.read_at(&mut step, from)?;
            if read == 0 {
                break;
            }
            self.file.write_all_at(&step[..read], kept)?;
            from += read as u64;
            kept += read as u64;
        }
        self.len = kept;
        self.file.set_len(kept)
    }
}

impl Write for BoundedFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.len + data.len() as u64 > self.most {
            self.halve()?;
        }
        let written = match &mut self.shared {
            Some(append) => append.write(data)?,
            None => self.file.write_at(data, self.len)?,
        };
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn the_newest_is_kept_and_the_file_never_holds_more_than_it_may() {
        const MOST: u64 = 300 << 10;
        let memory = memfd_create("bounded", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(memory);
        let mut bounded = BoundedFile::new(file.try_clone().unwrap(), MOST);
        let line = |number: u32| format!("line {number:06}\n");
        for number in 0..100_000 {
            bounded.write_all(line(number).as_bytes()).unwrap();
            if number % 1000 == 0 {
                assert!(file.metadata().unwrap().len() <= MOST);
            }
        }
        let mut text = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut text, 0).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<&str> = text
            .strip_prefix(std::str::from_utf8(NOTE).unwrap())
            .unwrap()
            .lines()
            .collect();
        assert!(lines.len() as u64 * 12 >= MOST / 2 - STEP as u64);
        // The first may be cut.
        let first = 100_000 - (lines.len() as u32 - 1);
        let newest = (first..100_000).map(line).collect::<String>();
        assert!(text.ends_with(&newest));
    }

    #[test]
    fn a_file_that_others_append_to_is_kept_whole_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let append = File::options().append(true).create(true).open(&path);
        let append = append.unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut other = append.try_clone().unwrap();
        let mut bounded = BoundedFile::shared(file, append, 1 << 10);
        for number in 0..100 {
            other.write_all(b"other\n").unwrap();
            bounded
                .write_all(format!("own {number}\n").as_bytes())
                .unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        // What others write counts once the older half goes.
        assert!(text.len() < 2 << 10, "{}", text.len());
        assert!(text.ends_with("own 98\nother\nown 99\n"), "{text}");
        assert!(!text.contains('\0'));
    }

    #[test]
    fn a_file_that_was_cut_off_from_outside_is_written_on() {
        let memory = memfd_create("bounded", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(memory);
        let mut bounded = BoundedFile::new(file.try_clone().unwrap(), 1 << 10);
        bounded.write_all(&[b'x'; 1000]).unwrap();
        file.set_len(0).unwrap();
        bounded.write_all(&[b'y'; 100]).unwrap();
        assert_eq!(file.metadata().unwrap().len(), NOTE.len() as u64 + 100);
    }
}
