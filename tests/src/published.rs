//! What gantry publishes (its OpenAPI document, its JSON Schema, its metrics), held against validators from
//! PyPI. They are fetched once, into the cache; nothing is installed.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cleanup::TempFolder;
use crate::lab::cache::Cache;
use crate::lab::command;
use crate::lab::packages::{Apt, Wanted, use_tree};
use crate::lab::parts::workspace;
use crate::lab::sources::Release;
use crate::ui::Step;

/// The validators, with versions, so that a new one cannot break what was right before.
const VALIDATORS: &[&str] = &[
    "openapi-spec-validator==0.7.2",
    "jsonschema==4.25.1",
    "prometheus-client==0.23.1",
];

/// Python, and its installer as a wheel, which runs without being installed.
const PYTHON: Wanted = Wanted {
    always: &["python3-pip-whl"],
    missing: &["python3"],
    backports: false,
};
const WHEELS: &str = "usr/share/python-wheels";

/// Validates what `gantry` publishes.
pub fn validate(gantry: &Path) -> Result<()> {
    let cache = Cache::open()?;
    let inputs = format!("{PYTHON:?} {VALIDATORS:?}");
    let validators = cache.entry("validators", &[inputs.as_bytes()], |into, _| {
        fetch(&cache, into)
    })?;
    let samples = TempFolder::new(&std::env::temp_dir(), "gantry-samples.")?;
    let readme = samples.path().join("readme.json");
    fs::write(&readme, in_readme()?)?;
    let mut check = python(&validators);
    check
        .env("PYTHONPATH", validators.join("site"))
        .arg(workspace().join("tests/lab/published.py"))
        .arg(gantry)
        .arg(workspace().join("tests/lab/vm.json"))
        .arg(readme);
    let said = command::output(&mut check).context("what gantry publishes is not valid")?;
    eprint!("{}", String::from_utf8_lossy(&said));
    Ok(())
}

fn fetch(cache: &Cache, into: &Path) -> Result<()> {
    let apt = Apt::open(cache.folder("apt"), Release::of_this_machine()?)?;
    apt.unpack("Python's installer", PYTHON, into)?;
    let step = Step::begin("Fetching validators from PyPI");
    let mut pip = python(into);
    pip.arg(installer(into)?.join("pip"))
        .args([
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--target",
        ])
        .arg(into.join("site"))
        .args(VALIDATORS);
    command::output(&mut pip).context("cannot fetch the validators; is the network up?")?;
    step.done();
    Ok(())
}

/// pip's wheel.
fn installer(tree: &Path) -> Result<PathBuf> {
    let wheels = tree.join(WHEELS);
    let found = fs::read_dir(&wheels)?.flatten().map(|entry| entry.path());
    let is_pip = |path: &PathBuf| {
        let name = path.file_name().and_then(OsStr::to_str);
        name.is_some_and(|name| name.starts_with("pip-"))
    };
    let mut found = found.filter(is_pip);
    found
        .next()
        .with_context(|| format!("there is no pip in {}", wheels.display()))
}

/// This machine's Python, or the one in `tree`.
fn python(tree: &Path) -> Command {
    let mut python = Command::new("python3");
    use_tree(&mut python, tree);
    python
}

/// The VM's file that README shows.
fn in_readme() -> Result<String> {
    let text = fs::read_to_string(workspace().join("README.md"))?;
    let block = text.split("```json\n").nth(1);
    let block = block.and_then(|rest| rest.split("```").next());
    block
        .map(str::to_owned)
        .context("README.md shows no VM's file")
}
