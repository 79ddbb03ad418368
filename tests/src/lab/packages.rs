//! Debian packages, downloaded and unpacked into the cache; nothing is ever installed.
//!
//! Apt runs on a private configuration: sources derived from the machine's own, with the backports
//! suite added on Debian 12, and lists of their own. No root is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use super::command;
use super::sources::{self, Release};
use crate::ui::Step;

const TRIPLET: &str = "x86_64-linux-gnu";
const LISTS_STAY_FRESH: Duration = Duration::from_secs(24 * 3600);

/// Apt with a private configuration.
#[derive(Debug)]
pub struct Apt {
    folder: PathBuf,
    release: Release,
}

/// Which packages to unpack together.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Always unpacked, installed on this machine or not.
    pub always: &'a [&'a str],
    /// Unpacked with all they depend on, as far as this machine lacks it.
    pub missing: &'a [&'a str],
    /// Prefer the backports suite where the release has one.
    pub backports: bool,
}

impl Apt {
    /// Prepares the configuration in `folder` and fetches the package lists if they are old.
    pub fn open(folder: PathBuf, release: Release) -> Result<Self> {
        let sources = folder.join("sources");
        for folder in [&sources, &folder.join("lists"), &folder.join("cache")] {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        sources::derive_all(&release, &sources)?;
        if release.is_foreign() {
            fs::write(folder.join("status"), "")?;
        }
        let apt = Self { folder, release };
        apt.update()?;
        Ok(apt)
    }

    fn update(&self) -> Result<()> {
        let stamp = self.folder.join("updated");
        let age = fs::metadata(&stamp)
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|then| SystemTime::now().duration_since(then).ok());
        if age.is_some_and(|age| age < LISTS_STAY_FRESH) {
            return Ok(());
        }
        let step = Step::begin("Fetching Debian's package lists");
        let log = self.folder.join("update.log");
        command::logged(self.apt_get().arg("update"), &log, |_| {})
            .context("cannot fetch the package lists; is the network up?")?;
        fs::write(&stamp, "")?;
        step.done();
        Ok(())
    }

    /// Names of packages that begin with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let mut command = Command::new("apt-cache");
        let names = command::output(self.configure(&mut command).args(["pkgnames", prefix]))?;
        Ok(String::from_utf8_lossy(&names)
            .lines()
            .map(str::to_owned)
            .collect())
    }

    /// Downloads what is `wanted`, unpacks it into the new folder `tree` and returns
    /// `package=version` of each.
    pub fn unpack(&self, what: &str, wanted: Wanted<'_>, tree: &Path) -> Result<Vec<String>> {
        let mut packages = self.missing(wanted)?;
        let names: Vec<&str> = wanted.always.to_vec();
        packages.retain(|package| {
            let name = package.split('=').next().unwrap_or_default();
            !names.contains(&name)
        });
        packages.extend(names.into_iter().map(str::to_owned));
        let archives = tree.join("archives");
        fs::create_dir_all(&archives)?;
        if !packages.is_empty() {
            self.download(what, &packages, wanted.backports, &archives)?;
        }
        let step = Step::begin(format!("Unpacking {what}"));
        let mut unpacked = Vec::new();
        for entry in fs::read_dir(&archives)? {
            let deb = entry?.path();
            if deb.extension().is_none_or(|extension| extension != "deb") {
                continue;
            }
            command::output(Command::new("dpkg").arg("-x").arg(&deb).arg(tree))?;
            unpacked.push(package_of(&deb));
        }
        fs::remove_dir_all(&archives)?;
        retarget_links(tree)?;
        step.done();
        unpacked.sort();
        Ok(unpacked)
    }

    /// `package=version` of what this machine lacks of `wanted.missing` and its dependencies.
    fn missing(&self, wanted: Wanted<'_>) -> Result<Vec<String>> {
        if wanted.missing.is_empty() {
            return Ok(Vec::new());
        }
        let mut command = self.apt_get();
        self.prefer(&mut command, wanted.backports);
        command
            .args(["install", "--simulate", "--no-install-recommends"])
            .args(wanted.missing);
        let plan = command::output(&mut command)
            .with_context(|| format!("apt finds no way to get {}", wanted.missing.join(", ")))?;
        Ok(parse_plan(&String::from_utf8_lossy(&plan)))
    }

    fn download(
        &self,
        what: &str,
        packages: &[String],
        backports: bool,
        into: &Path,
    ) -> Result<()> {
        let mut command = self.apt_get();
        self.prefer(&mut command, backports);
        command.arg("download").args(packages).current_dir(into);
        let mut sizes = self.apt_get();
        self.prefer(&mut sizes, backports);
        sizes.args(["download", "--print-uris"]).args(packages);
        let total = total_size(&String::from_utf8_lossy(&command::output(&mut sizes)?));
        ensure!(total > 0, "apt has nothing to download for {what}");
        let step = Step::bytes(
            format!("Downloading {what} ({} MB)", total / 1_000_000),
            total,
        );
        command::logged(&mut command, &into.join("log"), |_| step.at(size_of(into)))
            .with_context(|| format!("cannot download {what}"))?;
        step.done();
        Ok(())
    }

    fn prefer(&self, command: &mut Command, backports: bool) {
        if let (true, Some(suite)) = (backports, self.release.backports()) {
            command.args(["-t", &suite]);
        }
    }

    fn apt_get(&self) -> Command {
        let mut command = Command::new("apt-get");
        self.configure(&mut command);
        command
    }

    fn configure<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let options = [
            ("Dir::Etc::sourcelist", "/dev/null".into()),
            ("Dir::Etc::sourceparts", self.folder.join("sources")),
            ("Dir::State::lists", self.folder.join("lists")),
            ("Dir::Cache", self.folder.join("cache")),
        ];
        for (key, value) in options {
            command.arg(format!("-o{key}={}", value.display()));
        }
        if self.release.is_foreign() {
            // As if nothing were installed.
            let status = self.folder.join("status");
            command.arg(format!("-oDir::State::status={}", status.display()));
        }
        // apt's own user cannot read a cache in a home folder; translations and icons are no use.
        command
            .args(["-oAPT::Sandbox::User=root", "-oAcquire::Languages=none"])
            .args(["-oAcquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"])
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
    }
}

/// Lets `command` use the programs and libraries of an unpacked tree.
pub fn use_tree(command: &mut Command, tree: &Path) {
    let places = [
        (
            "PATH",
            vec![
                "usr/bin".to_owned(),
                "usr/sbin".to_owned(),
                "bin".to_owned(),
                "sbin".to_owned(),
            ],
        ),
        (
            "LD_LIBRARY_PATH",
            vec![format!("usr/lib/{TRIPLET}"), format!("lib/{TRIPLET}")],
        ),
        (
            "LIBRARY_PATH",
            vec![format!("usr/lib/{TRIPLET}"), format!("lib/{TRIPLET}")],
        ),
        (
            "C_INCLUDE_PATH",
            vec!["usr/include".to_owned(), format!("usr/include/{TRIPLET}")],
        ),
    ];
    for (variable, places) in places {
        let mut value: Vec<PathBuf> = places.iter().map(|place| tree.join(place)).collect();
        if let Some(old) = std::env::var_os(variable) {
            value.extend(std::env::split_paths(&old).filter(|path| !path.as_os_str().is_empty()));
        }
        if let Ok(value) = std::env::join_paths(value) {
            command.env(variable, value);
        }
    }
}

/// What runs a program of a whole foreign tree: its own loader and libraries.
pub fn loader(tree: &Path) -> Result<Vec<PathBuf>> {
    let libraries = tree.join("usr/lib").join(TRIPLET);
    let loader = find_in(&libraries, &["ld-linux-x86-64.so.2"])?;
    Ok(vec![loader, "--library-path".into(), libraries])
}

/// The library's or program's path in `tree`, where Debian puts it.
pub fn find_in(tree: &Path, places: &[&str]) -> Result<PathBuf> {
    match places
        .iter()
        .map(|place| tree.join(place))
        .find(|path| path.exists())
    {
        Some(path) => Ok(path),
        None => bail!("{} holds none of {}", tree.display(), places.join(", ")),
    }
}

/// `Inst name [old version] (version suite [arch])` lines of a simulated installation.
fn parse_plan(plan: &str) -> Vec<String> {
    plan.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix("Inst ")?;
            let name = rest.split(' ').next()?;
            let version = rest.split_once('(')?.1.split(' ').next()?;
            Some(format!("{name}={version}"))
        })
        .collect()
}

/// Sum of the sizes in apt's `'uri' file size hash` lines.
fn total_size(uris: &str) -> u64 {
    uris.lines()
        .filter(|line| line.starts_with('\''))
        .filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok())
        .sum()
}

fn size_of(folder: &Path) -> u64 {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|meta| meta.len())
        .sum()
}

/// `name=version` out of a file name such as `bc_1.07.1-3+b1_amd64.deb`.
fn package_of(deb: &Path) -> String {
    let name = deb.file_stem().unwrap_or_default().to_string_lossy();
    let mut parts = name.split('_');
    let name = parts.next().unwrap_or_default();
    let version = parts.next().unwrap_or_default().replace("%3a", ":");
    format!("{name}={version}")
}

/// Points library links whose target is installed on this machine, not unpacked, at the former.
fn retarget_links(tree: &Path) -> Result<()> {
    let place = format!("usr/lib/{TRIPLET}");
    for entry in fs::read_dir(tree.join(&place)).into_iter().flatten() {
        let link = entry?.path();
        let (Ok(target), false) = (fs::read_link(&link), link.exists()) else {
            continue;
        };
        let installed = [Path::new("/").join(&place), Path::new("/lib").join(TRIPLET)]
            .into_iter()
            .map(|folder| folder.join(&target))
            .find(|path| path.exists());
        if let Some(installed) = installed {
            fs::remove_file(&link)?;
            std::os::unix::fs::symlink(installed, &link)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_parsed() {
        let plan = "Reading package lists...\n\
            Inst m4 (1.4.19-3 Debian:12.13/oldstable [amd64])\n\
            Inst libelf1 [0.188-2.1] (0.192-4~bpo12+1 Backports [amd64]) []\n\
            Conf m4 (1.4.19-3 Debian:12.13/oldstable [amd64])\n";
        assert_eq!(parse_plan(plan), ["m4=1.4.19-3", "libelf1=0.192-4~bpo12+1"]);
    }

    #[test]
    fn sizes_are_added() {
        let uris =
            "WARNING: x\n'http://h/a_1.deb' a_1.deb 100 SHA256:0\n'http://h/b' b 23 SHA256:1\n";
        assert_eq!(total_size(uris), 123);
    }

    #[test]
    fn a_file_name_gives_the_package() {
        let deb = Path::new("/x/qemu-system-x86_1%3a10.0.2+ds-2_amd64.deb");
        assert_eq!(package_of(deb), "qemu-system-x86=1:10.0.2+ds-2");
    }
}
