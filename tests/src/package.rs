//! `cargo xtask package`: a Debian package of gantry with man pages, completions and units.
//!
//! `cargo deb` makes it, from `package.metadata.deb` in `api/Cargo.toml`; it is built once into the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::lab::cache::Cache;
use crate::lab::command::{logged, output};
use crate::lab::parts::{gantry, workspace};

/// The version of `cargo deb`.
const CARGO_DEB: &str = "3.8.0";
/// Where the package installs gantry.
const INSTALLED: &str = "/usr/bin/gantry";

/// Makes the package, and says where it is.
pub fn run() -> Result<()> {
    let gantry = gantry()?;
    let made = workspace().join("target/package");
    generate(&gantry, &made)?;
    eprintln!("Packing");
    let mut pack = Command::new(cargo_deb()?);
    pack.current_dir(workspace());
    pack.args(["-p", "gantry-api", "--no-build", "--no-strip", "-o"])
        .arg(&made);
    let package = output(&mut pack)?;
    let package = String::from_utf8(package).context("the package's name is no text")?;
    let package = package.trim().lines().last().unwrap_or_default().to_owned();
    ensure!(Path::new(&package).is_file(), "cargo deb made no package");
    println!("{package}");
    Ok(())
}

/// `cargo-deb`, built if it is not in the cache.
fn cargo_deb() -> Result<PathBuf> {
    let cache = Cache::open()?;
    let entry = cache.entry("cargo-deb", &[CARGO_DEB.as_bytes()], |into, scratch| {
        eprintln!("Building cargo-deb {CARGO_DEB}, once");
        let mut install = Command::new("cargo");
        install.args([
            "install",
            "cargo-deb",
            "--locked",
            "--debug",
            "--version",
            CARGO_DEB,
        ]);
        install
            .arg("--root")
            .arg(into)
            .arg("--target-dir")
            .arg(scratch);
        logged(&mut install, &scratch.join("log"), |_| {})
    })?;
    Ok(entry.join("bin/cargo-deb"))
}

/// What comes from the program itself: man pages, completions, and the unit that runs `gantry boot`.
fn generate(gantry: &Path, into: &Path) -> Result<()> {
    // Pages of commands that there are no more must not be packed.
    let _ = fs::remove_dir_all(into);
    fs::create_dir_all(into).with_context(|| format!("cannot make {}", into.display()))?;
    output(Command::new(gantry).arg("man").arg(into.join("man")))?;
    for (shell, file) in [
        ("bash", "gantry.bash"),
        ("zsh", "_gantry"),
        ("fish", "gantry.fish"),
    ] {
        let script = output(Command::new(gantry).args(["completions", shell]))?;
        fs::write(into.join(file), script)?;
    }
    let unit = into.join("gantry.service");
    let persist = ["device", "persist", "--by", "systemd", "--output"];
    output(Command::new(gantry).args(persist).arg(&unit))?;
    let text = fs::read_to_string(&unit)?;
    let installed = text.replace(&gantry.display().to_string(), INSTALLED);
    ensure!(
        installed.contains(INSTALLED),
        "the unit runs another program:\n{text}"
    );
    fs::write(&unit, installed)?;
    Ok(())
}
