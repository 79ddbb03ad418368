//! What is expensive to make is made once and kept outside the work tree.
//!
//! An entry is a folder named after a hash of what it was made from. It is made in a temporary
//! folder beside it and renamed, so that an entry that exists is whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::cleanup::TempFolder;

/// The folder of all entries.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$XDG_CACHE_HOME/gantry` or `~/.cache/gantry`.
    pub fn open() -> Result<Self> {
        let base = match std::env::var_os("XDG_CACHE_HOME") {
            Some(path) if Path::new(&path).is_absolute() => PathBuf::from(path),
            _ => std::env::home_dir()
                .context("no home folder to cache in; set XDG_CACHE_HOME")?
                .join(".cache"),
        };
        let root = base.join("gantry");
        fs::create_dir_all(&root)
            .with_context(|| format!("cannot create the cache {}", root.display()))?;
        Ok(Self { root })
    }

    /// The entry `name` made from `inputs`; when there is none, `make` fills the first folder it is
    /// given, with the second one to work in.
    ///
    /// A second process that wants the same entry waits for the first.
    pub fn entry(
        &self,
        name: &str,
        inputs: &[&[u8]],
        make: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.path(name, inputs);
        if path.is_dir() {
            return Ok(path);
        }
        let lock = self.root.join(format!("{name}.lock"));
        let lock =
            File::create(&lock).with_context(|| format!("cannot create {}", lock.display()))?;
        lock.lock().context("cannot lock a cache entry")?;
        if path.is_dir() {
            return Ok(path);
        }
        self.sweep(name);
        let fresh = TempFolder::new(&self.root, &format!("{name}.new."))
            .with_context(|| format!("cannot create a folder in {}", self.root.display()))?;
        let (into, scratch) = (fresh.path().join("entry"), fresh.path().join("scratch"));
        for folder in [&into, &scratch] {
            fs::create_dir(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        make(&into, &scratch)?;
        fs::rename(&into, &path)
            .with_context(|| format!("cannot move a finished entry to {}", path.display()))?;
        Ok(path)
    }

    /// Removes what a killed process left behind; the caller holds the entry's lock.
    fn sweep(&self, name: &str) {
        let prefix = format!("{name}.new.");
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// A folder for what is neither an entry nor worth a key.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Where the entry is, made or not.
    pub fn path(&self, name: &str, inputs: &[&[u8]]) -> PathBuf {
        self.root.join(format!("{name}-{}", key(inputs)))
    }
}

/// 16 hexadecimal digits that stand for `inputs`.
fn key(inputs: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update(input.len().to_le_bytes());
        hash.update(input);
    }
    hash.finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        (folder, Cache { root })
    }

    #[test]
    fn an_entry_is_made_once() {
        let (_folder, cache) = cache();
        let make = |path: &Path, _: &Path| Ok(fs::write(path.join("file"), "1")?);
        let first = cache.entry("x", &[b"a"], make).unwrap();
        let second = cache
            .entry("x", &[b"a"], |_, _| anyhow::bail!("made again"))
            .unwrap();
        assert_eq!(first, second);
        assert_eq!(fs::read(first.join("file")).unwrap(), b"1");
    }

    #[test]
    fn a_failed_entry_leaves_nothing() {
        let (folder, cache) = cache();
        let failed = cache.entry("x", &[], |path, _| {
            fs::write(path.join("half"), "")?;
            anyhow::bail!("no")
        });
        assert!(failed.is_err());
        assert!(!cache.path("x", &[]).exists());
        let left = fs::read_dir(folder.path())
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().path().is_dir())
            .count();
        assert_eq!(left, 0);
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let (folder, cache) = cache();
        let stale = folder.path().join("x.new.abc");
        fs::create_dir(&stale).unwrap();
        cache.entry("x", &[], |_, _| Ok(())).unwrap();
        assert!(!stale.exists());
    }

    #[test]
    fn inputs_do_not_run_into_each_other() {
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
    }
}
