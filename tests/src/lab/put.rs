//! Files and folders of this machine that are put into the lab beside its own.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

use super::initramfs::Initramfs;

/// Where a file goes that is put without a place: the working directory of the lab's commands.
const HOME: &str = "/root";

/// The lab host mounts a file system over each of these when it boots.
const COVERED: &[&str] = &["dev", "proc", "run", "sys", "tmp"];

/// A file or folder of this machine and its place in the lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    /// Path here.
    pub from: PathBuf,
    /// Absolute path in the lab.
    pub place: String,
}

impl FromStr for Put {
    type Err = anyhow::Error;

    /// `FILE`, `FILE:/PLACE`, or `FILE:/FOLDER/`, which keeps the file's name.
    fn from_str(text: &str) -> Result<Self> {
        let (from, place) = match text.rsplit_once(":/") {
            Some((from, place)) => (from, format!("/{place}")),
            None => (text, format!("{HOME}/")),
        };
        let from = PathBuf::from(from);
        fs::metadata(&from).with_context(|| {
            format!(
                "cannot read {} (a place follows it as :/PLACE)",
                from.display()
            )
        })?;
        let place = match place.ends_with('/') {
            true => {
                let name = from.file_name().and_then(|name| name.to_str());
                let name =
                    name.with_context(|| format!("give {} a place: FILE:/PLACE", from.display()))?;
                place + name
            }
            false => place,
        };
        Ok(Self {
            from,
            place: in_the_lab(&place)?,
        })
    }
}

impl Put {
    /// Adds it to the lab's initramfs, in place of what is there; programs and shared libraries come with
    /// the libraries that they need.
    pub fn add(&self, archive: &mut Initramfs) -> Result<()> {
        let kind = fs::metadata(&self.from)
            .with_context(|| format!("cannot read {}", self.from.display()))?
            .file_type();
        match kind.is_dir() {
            true => add_folder(archive, &self.place, &self.from),
            false => add_file(archive, &self.place, &self.from),
        }
        .with_context(|| format!("cannot put {} into the lab", self.from.display()))
    }
}

/// A place in the lab as an absolute path, if a file there can be seen once the lab has booted.
fn in_the_lab(place: &str) -> Result<String> {
    let mut names = Vec::new();
    for component in Path::new(place).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => names.push(name.to_str().unwrap_or_default()),
            Component::ParentDir | Component::Prefix(_) => bail!("{place}: leave out the `..`"),
        }
    }
    // `sbin` is a link to `bin` there.
    match names.first_mut() {
        None => bail!("{place} is no place for a file"),
        Some(first) if *first == "sbin" => *first = "bin",
        Some(first) if COVERED.contains(first) => bail!(
            "{place}: the lab host mounts a file system over /{first} when it boots; choose another place, \
             {HOME}/NAME for example"
        ),
        Some(_) => {}
    }
    Ok(format!("/{}", names.join("/")))
}

fn add_folder(archive: &mut Initramfs, place: &str, from: &Path) -> Result<()> {
    let cannot = || format!("cannot read {}", from.display());
    archive.make_way(place, true)?;
    archive.folder(place);
    let entries: std::io::Result<Vec<_>> = fs::read_dir(from).with_context(cannot)?.collect();
    let mut entries = entries.with_context(cannot)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (from, name) = (entry.path(), entry.file_name());
        let name = name.to_str();
        let name = name.with_context(|| format!("{} has a name not in UTF-8", from.display()))?;
        let place = format!("{place}/{name}");
        let kind = entry.file_type()?;
        if kind.is_dir() {
            add_folder(archive, &place, &from)?;
        } else if kind.is_symlink() {
            archive.make_way(&place, false)?;
            archive.link(&place, &fs::read_link(&from)?.to_string_lossy());
        } else {
            add_file(archive, &place, &from)?;
        }
    }
    Ok(())
}

fn add_file(archive: &mut Initramfs, place: &str, from: &Path) -> Result<()> {
    let meta = fs::metadata(from).with_context(|| format!("cannot read {}", from.display()))?;
    // Another kind may never end, or never begin.
    ensure!(
        meta.is_file(),
        "{} is neither a file nor a folder",
        from.display()
    );
    archive.make_way(place, false)?;
    archive.program(place, from, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn put(text: impl AsRef<Path>) -> Result<Put> {
        text.as_ref().to_str().unwrap().parse()
    }

    /// Names and modes of an archive's entries, in order.
    fn entries(archive: Initramfs) -> Vec<(String, u32)> {
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        text.split("070701")
            .skip(1)
            .map(|entry| {
                let mode = u32::from_str_radix(&entry[8..16], 16).unwrap();
                let name = entry[104..].split('\0').next().unwrap();
                (name.to_owned(), mode)
            })
            .collect()
    }

    #[test]
    fn a_file_has_a_place() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("0000:01:00.0");
        fs::write(&file, "x").unwrap();
        let file = file.to_str().unwrap();
        let place = |suffix: &str| put(format!("{file}{suffix}")).map(|put| put.place);
        assert_eq!(place("").unwrap(), "/root/0000:01:00.0");
        assert_eq!(place(":/bin/tool").unwrap(), "/bin/tool");
        assert_eq!(place(":/sbin//./").unwrap(), "/bin/0000:01:00.0");
        let missing = put("/no/such/file").unwrap_err();
        assert!(
            format!("{missing:#}").contains("/no/such/file"),
            "{missing:#}"
        );
    }

    #[test]
    fn a_place_that_nobody_would_see_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = file.path().display();
        for place in ["/tmp/x", "/run/gantry/", "/proc", "/../x", "/etc/../tmp/x"] {
            assert!(put(format!("{file}:{place}")).is_err(), "{place}");
        }
        let error = put(format!("{file}:/tmp/x")).unwrap_err().to_string();
        assert!(error.contains("/tmp") && error.contains("/root"), "{error}");
        assert!(put("/").is_err(), "it has no name");
    }

    #[test]
    fn a_folder_comes_with_all_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().join("here");
        fs::create_dir_all(here.join("empty")).unwrap();
        fs::write(here.join("script"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(here.join("script"), PermissionsExt::from_mode(0o750)).unwrap();
        symlink("script", here.join("link")).unwrap();
        let mut archive = Initramfs::default();
        put(&here).unwrap().add(&mut archive).unwrap();
        let expected = [
            ("root", 0o040_755),
            ("root/here", 0o040_755),
            ("root/here/empty", 0o040_755),
            ("root/here/link", 0o120_777),
            ("root/here/script", 0o100_750),
            ("TRAILER!!!", 0),
        ];
        let expected = expected.map(|(name, mode)| (name.to_owned(), mode));
        assert_eq!(entries(archive), expected);
    }

    #[test]
    fn a_program_comes_with_its_libraries() {
        let program = std::env::current_exe().unwrap();
        let text = format!("{}:/bin/tool", program.display());
        let mut archive = Initramfs::default();
        put(text).unwrap().add(&mut archive).unwrap();
        let bytes = archive.finish();
        let holds = |name: &str| {
            let name = name.as_bytes();
            bytes.windows(name.len()).any(|window| window == name)
        };
        assert!(holds("lib64/ld-linux-x86-64.so.2\0"));
        assert!(holds("lib/x86_64-linux-gnu/libc.so.6\0"));
    }

    #[test]
    fn what_is_there_is_replaced_but_for_folders() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut archive = Initramfs::default();
        archive.link("bin/ls", "busybox");
        let mut add = |place: &str| {
            let put = put(format!("{}:{place}", file.path().display())).unwrap();
            put.add(&mut archive).map_err(|error| format!("{error:#}"))
        };
        add("/bin/ls").unwrap();
        assert!(add("/bin").unwrap_err().contains("/bin is a folder"));
        assert!(add("/bin/ls/x").unwrap_err().contains("/bin/ls is a file"));
        let names: Vec<_> = entries(archive).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["bin", "bin/ls", "bin/ls", "TRAILER!!!"]);
    }

    #[test]
    fn what_may_never_end_is_not_read() {
        let error = put("/dev/zero:/zero")
            .unwrap()
            .add(&mut Initramfs::default());
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("/dev/zero is neither"), "{error}");
    }
}
