//! The kernels of the lab: Debian's own, and one built for what Debian's lack.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::command;

/// A kernel, ready to boot.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Compressed image.
    pub bzimage: PathBuf,
    /// Stripped ELF image, for PVH; only of kernels built here.
    pub vmlinux: Option<PathBuf>,
    /// Version as `uname -r` says it.
    pub release: String,
    /// Folder of uncompressed modules; its file `order` says what each needs, as `modules.dep` does.
    pub modules: PathBuf,
}

impl Kernel {
    /// The modules' files, each before those that depend on it.
    pub fn modules(&self) -> Result<Vec<(String, PathBuf, Vec<String>)>> {
        let order = fs::read_to_string(self.modules.join("order"))
            .with_context(|| format!("cannot read {}", self.modules.display()))?;
        Ok(order
            .lines()
            .filter_map(|line| {
                let (name, needs) = line.split_once(':')?;
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                Some((
                    name.to_owned(),
                    self.modules.join(format!("{name}.ko")),
                    needs,
                ))
            })
            .collect())
    }
}

/// The kernel of an unpacked `linux-image-*-unsigned` package, with the modules `wanted`, written
/// to `into`.
pub fn unpack_stock(tree: &Path, wanted: &[&str], busybox: &Path, into: &Path) -> Result<()> {
    let (image, release) = fs::read_dir(tree.join("boot"))?
        .flatten()
        .find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let release = name.strip_prefix("vmlinuz-")?.to_owned();
            Some((entry.path(), release))
        })
        .with_context(|| format!("{} holds no kernel", tree.display()))?;
    fs::rename(image, into.join("bzImage"))?;
    fs::write(into.join("release"), &release)?;
    let modules = ["usr/lib/modules", "lib/modules"]
        .into_iter()
        .map(|place| tree.join(place).join(&release).join("kernel"))
        .find(|path| path.is_dir())
        .context("the kernel package holds no modules")?;
    let mut files = BTreeMap::new();
    list_modules(&modules, &mut files)?;
    let target = into.join("modules");
    fs::create_dir(&target)?;
    collect_modules(&files, wanted, &target, &|file| decompress(file, busybox))
}

/// The kernel that `unpack_stock` or `build` left in `entry`.
pub fn open(entry: &Path) -> Result<Kernel> {
    let vmlinux = entry.join("vmlinux");
    Ok(Kernel {
        bzimage: entry.join("bzImage"),
        vmlinux: vmlinux.exists().then_some(vmlinux),
        release: fs::read_to_string(entry.join("release"))
            .with_context(|| format!("{} is no kernel", entry.display()))?,
        modules: entry.join("modules"),
    })
}

/// The newest `linux-image-6.12*-cloud-amd64-unsigned` among package `names`.
pub fn newest_cloud_image(names: &[String]) -> Result<String> {
    let number = |name: &str| -> Vec<u64> {
        name.split(|character: char| !character.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .collect()
    };
    match names
        .iter()
        .filter(|name| name.ends_with("-cloud-amd64-unsigned"))
        .max_by_key(|name| number(name))
    {
        Some(name) => Ok(name.clone()),
        None => bail!("Debian offers no linux-image-6.12*-cloud-amd64-unsigned here"),
    }
}

/// Writes the `wanted` modules and their dependencies to `into`, with their order in `order`.
pub fn collect_modules(
    files: &BTreeMap<String, PathBuf>,
    wanted: &[&str],
    into: &Path,
    read: &dyn Fn(&Path) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut done: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut order = String::new();
    // Depth first; a module is entered again when all it needs is there.
    let mut stack: Vec<String> = wanted.iter().rev().map(|name| (*name).to_owned()).collect();
    while let Some(name) = stack.pop() {
        let Some(file) = files.get(&name).filter(|_| !done.contains_key(&name)) else {
            continue; // built in, or there already
        };
        let bytes = read(file)?;
        let needs = dependencies(&bytes);
        let open: Vec<String> = needs
            .iter()
            .filter(|need| files.contains_key(*need) && !done.contains_key(*need))
            .cloned()
            .collect();
        if !open.is_empty() {
            stack.push(name);
            stack.extend(open);
            continue;
        }
        // As depmod writes it: all that is needed, what is loaded first comes last.
        let mut all = Vec::new();
        for need in needs.iter().filter(|need| files.contains_key(*need)) {
            all.push(need.clone());
            all.extend(done.get(need).into_iter().flatten().cloned());
        }
        let mut seen = BTreeSet::new();
        all.reverse();
        all.retain(|need| seen.insert(need.clone()));
        all.reverse();
        fs::write(into.join(format!("{name}.ko")), bytes)?;
        order.push_str(&format!("{name}: {}\n", all.join(" ")));
        done.insert(name, all);
    }
    fs::write(into.join("order"), order).context("cannot write the modules' order")
}

/// Every module below `folder`, by the name the kernel gives it.
pub fn list_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            list_modules(&path, files)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// The `depends=` entry of a module's `.modinfo` section, names as the kernel gives them.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module.get(at + KEY.len()..).unwrap_or_default();
    let value = value.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

fn decompress(file: &Path, busybox: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|extension| extension == "xz") {
        return command::output(Command::new(busybox).args(["xz", "-dc"]).arg(file));
    }
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = BTreeMap::new();
        for (name, needs) in [("a", "b"), ("b", "c-d"), ("c_d", ""), ("other", "")] {
            let path = folder.path().join(format!("{name}.src"));
            fs::write(&path, format!("ELF\0depends={needs}\0name={name}\0")).unwrap();
            files.insert(name.to_owned(), path);
        }
        let read = |path: &Path| Ok(fs::read(path)?);
        collect_modules(&files, &["a", "builtin"], folder.path(), &read).unwrap();
        let order = fs::read_to_string(folder.path().join("order")).unwrap();
        assert_eq!(order, "c_d: \nb: c_d\na: b c_d\n");
        assert!(!folder.path().join("other.ko").exists());
    }

    #[test]
    fn the_newest_image_wins() {
        let names = [
            "linux-image-6.12.9+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.95+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.96+deb12-amd64-unsigned",
        ]
        .map(str::to_owned);
        assert_eq!(newest_cloud_image(&names).unwrap(), names[1]);
        assert!(newest_cloud_image(&names[2..]).is_err());
    }
}
