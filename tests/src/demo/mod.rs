//! `cargo xtask demo`: a VM takes a disk from a group, uses it, and gives it back.
//!
//! All of it happens in the lab, is shown as it happens, and is checked at the end. [`screen`] is
//! what people see, [`guest`] understands the guest's console, [`vm`] runs the VM in the lab host,
//! [`claims`] holds what was seen against what is known from elsewhere.

mod claims;
mod guest;
mod screen;
mod story;
mod vm;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::cleanup;
use crate::lab::Parts;
use crate::lab::cache::Cache;
use crate::lab::parts::Options;
use screen::Screen;
use story::Story;

/// Runs the demo; the exit status of the process.
pub fn run() -> Result<i32> {
    let parts = Parts::prepare(&Options::default())?;
    let logs = Logs::in_folder(&Cache::open()?.folder("demo"))?;
    let began = Instant::now();
    let mut screen = Screen::new();
    match Story::new(&mut screen, &logs).tell(&parts) {
        Ok(facts) => {
            let total = began.elapsed().as_secs_f64().round();
            screen.result(&logs, &facts.verdict(total))?;
            Ok(0)
        }
        Err(error) => {
            // A signal that ends the demo breaks it first.
            cleanup::wait_if_ending();
            screen.failure(&error, &logs);
            Ok(1)
        }
    }
}

/// Files that outlive the demo.
#[derive(Debug)]
struct Logs {
    /// All that the guest's console said.
    console: PathBuf,
    /// The host's kernel log, kept when the demo fails.
    kernel: PathBuf,
}

impl Logs {
    /// Makes the folder, and away with what an earlier demo left there.
    fn in_folder(folder: &Path) -> Result<Self> {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self {
            console: folder.join("guest-console.log"),
            kernel: folder.join("host-kernel.log"),
        })
    }

    /// Those that hold something, with their names.
    fn kept(&self) -> impl Iterator<Item = (&str, &Path)> {
        [
            ("The guest's whole console", self.console.as_path()),
            ("The host's kernel log", self.kernel.as_path()),
        ]
        .into_iter()
        .filter(|(_, path)| fs::metadata(path).is_ok_and(|file| file.len() > 0))
    }
}
