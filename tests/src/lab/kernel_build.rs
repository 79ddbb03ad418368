//! Builds the lab kernel from Debian's kernel source: `allnoconfig` plus `tests/lab/kernel.config`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail};

use super::kernel::{collect_modules, list_modules};
use super::packages::{Apt, Wanted, find_in, use_tree};
use super::{command, kernel};
use crate::ui::Step;

/// The options on top of `allnoconfig`.
pub const OPTIONS: &str = include_str!("../../lab/kernel.config");
/// Debian's package of the source.
pub const SOURCE: &str = "linux-source-7.3";
/// Modules that are built beside the kernel: real mdev parents.
const MODULES: &[&str] = &["mtty", "mdpy", "mbochs"];
/// Steps that a build logs, for the bar.
const STEPS: u64 = 2400;

/// Downloads, configures and builds; leaves the result in `into`. The tools come from `apt`, to run on this
/// machine, the source from the `newer` release.
pub fn build(apt: &Apt, newer: &Apt, work: &Path, into: &Path) -> Result<()> {
    let (tools, source) = (work.join("tools"), work.join("source"));
    for folder in [&tools, &source] {
        fs::create_dir(folder)?;
    }
    let wanted = Wanted {
        always: &[],
        missing: &[
            "make",
            "bc",
            "flex",
            "bison",
            "libelf-dev",
            "xz-utils",
            "zstd",
        ],
        backports: false,
    };
    apt.unpack("the kernel's build tools", wanted, &tools)?;
    let wanted = Wanted {
        always: &[SOURCE],
        missing: &[],
        backports: true,
    };
    let version = newer.unpack("the kernel's source", wanted, &source)?;
    let tree = unpack(&tools, &source, work)?;
    configure(&tools, &tree, &work.join("configure.log"))?;
    compile(&tools, &tree, &work.join("build.log"))?;
    collect(&tree, into)?;
    Ok(fs::write(into.join("packages"), version.join("\n"))?)
}

fn unpack(tools: &Path, source: &Path, work: &Path) -> Result<std::path::PathBuf> {
    let archive = find_in(source, &[&format!("usr/src/{SOURCE}.tar.xz")])?;
    let step = Step::begin("Extracting the kernel's source");
    let mut tar = Command::new("tar");
    use_tree(&mut tar, tools);
    tar.arg("-xf").arg(&archive).arg("-C").arg(work);
    command::logged(&mut tar, &work.join("tar.log"), |_| {})?;
    step.done();
    Ok(work.join(SOURCE))
}

fn configure(tools: &Path, tree: &Path, log: &Path) -> Result<()> {
    let options = tree.join("lab.config");
    fs::write(&options, OPTIONS)?;
    let mut make = make(tools, tree);
    make.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &options);
    command::logged(&mut make, log, |_| {}).context("cannot configure the lab kernel")?;
    let chosen = fs::read_to_string(tree.join(".config"))?;
    let lost = lost_options(OPTIONS, &chosen);
    if !lost.is_empty() {
        bail!(
            "{SOURCE} does not take these lines of tests/lab/kernel.config: {}",
            lost.join(", ")
        );
    }
    Ok(())
}

fn compile(tools: &Path, tree: &Path, log: &Path) -> Result<()> {
    let jobs = available_parallelism().map_or(1, usize::from);
    let step = Step::items(
        "Building the lab kernel (once; about 9 minutes on 2 processors)",
        STEPS,
    );
    let mut make = make(tools, tree);
    make.arg(format!("-j{jobs}")).args(["bzImage", "modules"]);
    command::logged(&mut make, log, |log| {
        let text = fs::read(log).unwrap_or_default();
        let steps = text.split(|byte| *byte == b'\n').count() as u64;
        step.at(steps.min(STEPS));
    })
    .context("cannot build the lab kernel")?;
    step.done();
    Ok(())
}

/// Copies image, stripped ELF and modules to `into`.
fn collect(tree: &Path, into: &Path) -> Result<()> {
    fs::copy(tree.join("arch/x86/boot/bzImage"), into.join("bzImage"))?;
    command::output(
        Command::new("strip")
            .arg("-o")
            .arg(into.join("vmlinux"))
            .arg(tree.join("vmlinux")),
    )?;
    let release = fs::read_to_string(tree.join("include/config/kernel.release"))?;
    fs::write(into.join("release"), release.trim())?;
    let mut files = BTreeMap::new();
    for folder in ["drivers", "samples"] {
        list_modules(&tree.join(folder), &mut files)?;
    }
    let modules = into.join("modules");
    fs::create_dir(&modules)?;
    collect_modules(&files, MODULES, &modules, &|file| Ok(fs::read(file)?))?;
    let missing: Vec<&str> = MODULES
        .iter()
        .filter(|name| !modules.join(format!("{name}.ko")).exists())
        .copied()
        .collect();
    if !missing.is_empty() {
        bail!("the lab kernel's build left no {}", missing.join(", "));
    }
    kernel::open(into).map(|_| ())
}

fn make(tools: &Path, tree: &Path) -> Command {
    let mut make = Command::new("make");
    use_tree(&mut make, tools);
    make.arg("-C").arg(tree);
    // Programs that look for their own files under /usr.
    for (variable, place) in [
        ("BISON_PKGDATADIR", "usr/share/bison"),
        ("M4", "usr/bin/m4"),
    ] {
        let path = tools.join(place);
        if path.exists() {
            make.env(variable, path);
        }
    }
    for variable in ["KBUILD_BUILD_USER", "KBUILD_BUILD_HOST"] {
        make.env(variable, "lab");
    }
    make.env_remove("MAKEFLAGS").env("LC_ALL", "C");
    make
}

/// The `=y`, `=m` and value lines of `wanted` that `chosen` lacks, and the `=n` ones it has.
fn lost_options(wanted: &str, chosen: &str) -> Vec<String> {
    let has = |line: &str| chosen.lines().any(|chosen| chosen == line);
    wanted
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter(|line| match line.strip_suffix("=n") {
            Some(name) => has(&format!("{name}=y")) || has(&format!("{name}=m")),
            None => !has(line),
        })
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_options_are_named() {
        let wanted = "# x\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_C=n\nCONFIG_D=\"d\"\nCONFIG_E=n\n";
        let chosen = "CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=y\nCONFIG_D=\"d\"\n# CONFIG_E is not set\n";
        assert_eq!(lost_options(wanted, chosen), ["CONFIG_B=m", "CONFIG_C=n"]);
    }

    #[test]
    fn options_are_sorted_and_unique() {
        let lines: Vec<&str> = OPTIONS
            .lines()
            .filter(|line| !line.starts_with('#'))
            .collect();
        assert!(lines.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
