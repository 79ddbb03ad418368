//! All that a lab is made of: found in the cache or made, built from this tree, or said to lack.

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};

use super::cache::Cache;
use super::debian::{self, DebianImage};
use super::erratum;
use super::kernel::{self, Kernel};
use super::kernel_build;
use super::packages::{Apt, Wanted, find_in};
use super::qemu;
use super::sources::Release;

/// Modules of the stock kernel that the lab host can load.
const STOCK_MODULES: &[&str] = &[
    "kvm_amd",
    "vfio_pci",
    "vfio_iommu_type1",
    "vhost_vsock",
    "vhost_net",
    "tun",
    "veth",
    "bridge",
    "bonding",
    "8021q",
    "vmxnet3",
    "virtio_net",
    // For guests.
    PANIC_MODULE,
];

/// What tells a VMM that Debian's kernel has panicked.
pub const PANIC_MODULE: &str = "pvpanic_mmio";
/// What it needs.
pub const PANIC_MODULE_NEEDS: &[&str] = &["pvpanic"];

/// The parts, as paths on this machine.
#[derive(Debug, Clone)]
pub struct Parts {
    /// QEMU and its firmware, unpacked.
    pub qemu: PathBuf,
    /// Its package and version, and whether it is mended.
    pub qemu_package: String,
    /// Busybox, pciutils, iproute2, kmod and udev, unpacked.
    pub tools: PathBuf,
    /// Debian's kernel.
    pub stock: Kernel,
    /// The lab's kernel, if it is built.
    pub lab: Option<Kernel>,
    /// The program under test.
    pub gantry: PathBuf,
    /// The lab's agent.
    pub agent: PathBuf,
}

/// What is asked for besides the parts that every lab needs.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Test this program instead of building the one of this tree.
    pub gantry: Option<PathBuf>,
    /// Build the lab kernel if it is not in the cache.
    pub lab_kernel: bool,
}

impl Parts {
    /// The versions that a lab's behaviour depends on.
    pub fn versions(&self) -> String {
        let kernels = [Some(&self.stock), self.lab.as_ref()];
        let kernels = kernels.into_iter().flatten();
        let kernels: Vec<&str> = kernels.map(|kernel| kernel.release.as_str()).collect();
        format!("{}; Linux {}", self.qemu_package, kernels.join(" and "))
    }

    /// Whether its processors may take turns: so a QEMU that is not mended hangs almost every guest.
    pub fn may_take_turns(&self) -> bool {
        !self.qemu_package.ends_with(NOT_MENDED)
    }

    /// Finds or makes all parts.
    pub fn prepare(options: &Options) -> Result<Self> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            bail!("the lab runs on x86-64 Linux only");
        }
        let store = Store::open()?;
        let qemu = store.qemu()?;
        let tools = store.tree(
            "tools",
            "busybox, pciutils, iproute2, kmod and udev",
            Wanted {
                always: &[
                    "busybox-static",
                    "pciutils",
                    "libpci3",
                    "pci.ids",
                    "iproute2",
                    "kmod",
                    "udev",
                ],
                missing: &["pciutils", "iproute2", "kmod", "udev"],
                backports: false,
            },
        )?;
        let stock = store.stock_kernel(&busybox(&tools)?)?;
        let lab = store.lab_kernel(options.lab_kernel)?;
        let mut built = build(options.gantry.is_none())?;
        let mut take = |name: &str| {
            let found = built.iter().position(|path| path.ends_with(name));
            found
                .map(|at| built.swap_remove(at))
                .ok_or_else(|| anyhow!("cargo built no {name}"))
        };
        let agent = take("lab-agent")?;
        let gantry = match &options.gantry {
            Some(path) => {
                fs::canonicalize(path).with_context(|| format!("there is no {}", path.display()))?
            }
            None => take("gantry")?,
        };
        Ok(Self {
            qemu_package: package_of(&qemu)?,
            qemu,
            tools,
            stock,
            lab,
            gantry,
            agent,
        })
    }

    /// A Debian disk image, built if it is not in the cache.
    pub fn debian(&self) -> Result<DebianImage> {
        let store = Store::open()?;
        let build = |into: &Path, work: &Path| debian::build(store.apt()?, work, into);
        let recipe = DebianImage::recipe();
        let entry = store.cache.entry("debian", &[recipe.as_bytes()], build)?;
        Ok(DebianImage::open(&entry))
    }

    /// Busybox, statically linked.
    pub fn busybox(&self) -> Result<PathBuf> {
        busybox(&self.tools)
    }
}

/// The package that the QEMU at `tree` comes from, as it was noted when that was unpacked.
fn package_of(tree: &Path) -> Result<String> {
    let file = tree.join("packages");
    let packages = fs::read_to_string(&file);
    let packages = packages.with_context(|| format!("cannot read {}", file.display()))?;
    let mut packages = packages.lines();
    let package = packages.find(|line| line.starts_with(QEMU_PACKAGE));
    Ok(package.unwrap_or(QEMU_PACKAGE).to_owned())
}

fn busybox(tools: &Path) -> Result<PathBuf> {
    find_in(tools, &["bin/busybox", "usr/bin/busybox"])
}

/// The release that QEMU and the lab kernel's source are taken from, with its backports. QEMU of Debian 12
/// (10.0), emulating SVM, clears a bit of a processor's pending interrupts without the lock that others take to
/// set one, so that interrupts are lost. Debian 12 has no kernel that exports BARs of VFIO devices as DMA buffers.
const NEWER_RELEASE: &str = "trixie";

const QEMU_PACKAGE: &str = "qemu-system-x86";
const MENDED: &str = ", mended";
const NOT_MENDED: &str = ", not mended";

/// The cache, with apt opened at the first use: for this machine's release, and for the newer one.
struct Store {
    cache: Cache,
    apt: OnceCell<Apt>,
    newer: OnceCell<Apt>,
}

impl Store {
    fn open() -> Result<Self> {
        Ok(Self {
            cache: Cache::open()?,
            apt: OnceCell::new(),
            newer: OnceCell::new(),
        })
    }

    fn apt(&self) -> Result<&Apt> {
        open_once(&self.apt, || {
            Apt::open(self.cache.folder("apt"), Release::of_this_machine()?)
        })
    }

    fn newer(&self) -> Result<&Apt> {
        open_once(&self.newer, || {
            let release = Release::of_this_machine()?.other(NEWER_RELEASE);
            Apt::open(self.cache.folder("apt-foreign"), release)
        })
    }

    /// QEMU with all it needs, its C library included.
    fn qemu(&self) -> Result<PathBuf> {
        let wanted = Wanted {
            always: &[],
            missing: &[QEMU_PACKAGE],
            backports: true,
        };
        let inputs = format!("{NEWER_RELEASE} {wanted:?} mended twice, which is noted");
        self.cache.entry("qemu", &[inputs.as_bytes()], |into, _| {
            let mut packages = self.newer()?.unpack("QEMU", wanted, into)?;
            let mended = erratum::mend(&qemu::program(into)?)?;
            let ours = |name: &&mut String| name.starts_with(QEMU_PACKAGE);
            let package = packages.iter_mut().find(ours);
            let package = package.context("QEMU's package is not among its own")?;
            if !mended {
                eprintln!(
                    "note: {package} is not as the lab knows it, so its processors do not take turns; guests may \
                     hang now and then (see lab/erratum.rs)"
                );
            }
            package.push_str(if mended { MENDED } else { NOT_MENDED });
            Ok(fs::write(into.join("packages"), packages.join("\n"))?)
        })
    }

    /// Packages unpacked together.
    fn tree(&self, name: &str, what: &str, wanted: Wanted<'_>) -> Result<PathBuf> {
        let inputs = format!("{wanted:?}");
        self.cache.entry(name, &[inputs.as_bytes()], |into, _| {
            let packages = self.apt()?.unpack(what, wanted, into)?;
            Ok(fs::write(into.join("packages"), packages.join("\n"))?)
        })
    }

    fn stock_kernel(&self, busybox: &Path) -> Result<Kernel> {
        let inputs = STOCK_MODULES.join(" ");
        let entry = self
            .cache
            .entry("stock-kernel", &[inputs.as_bytes()], |into, scratch| {
                let apt = self.apt()?;
                let name = kernel::newest_cloud_image(&apt.names("linux-image-6.12")?)?;
                let wanted = Wanted {
                    always: &[&name],
                    missing: &[],
                    backports: true,
                };
                apt.unpack("Debian's kernel", wanted, scratch)?;
                kernel::unpack_stock(scratch, STOCK_MODULES, busybox, into)
            })?;
        kernel::open(&entry)
    }

    /// The lab kernel, built if it `must` be.
    fn lab_kernel(&self, must: bool) -> Result<Option<Kernel>> {
        let inputs = [
            kernel_build::SOURCE.as_bytes(),
            kernel_build::OPTIONS.as_bytes(),
        ];
        let path = self.cache.path("lab-kernel", &inputs);
        if !must && !path.is_dir() {
            return Ok(None);
        }
        let entry = self.cache.entry("lab-kernel", &inputs, |into, scratch| {
            kernel_build::build(self.apt()?, self.newer()?, scratch, into)
        })?;
        kernel::open(&entry).map(Some)
    }
}

/// What is in `cell`; what `open` gives, at the first use.
fn open_once(cell: &OnceCell<Apt>, open: impl FnOnce() -> Result<Apt>) -> Result<&Apt> {
    match cell.get() {
        Some(apt) => Ok(apt),
        None => {
            let apt = open()?;
            Ok(cell.get_or_init(|| apt))
        }
    }
}

/// The root of the source tree that this was built from.
pub fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// Builds gantry of this tree as it is released; the program.
pub fn gantry() -> Result<PathBuf> {
    let built = build_of(&["-p", "gantry-api", "--bin", "gantry"])?;
    built.into_iter().next().context("cargo built no gantry")
}

/// Builds the agent, and gantry if asked; the paths of the programs.
fn build(gantry: bool) -> Result<Vec<PathBuf>> {
    let mut what = vec!["-p", "gantry-tests", "--bin", "lab-agent"];
    if gantry {
        what.extend(["-p", "gantry-api", "--bin", "gantry"]);
    }
    build_of(&what)
}

fn build_of(what: &[&str]) -> Result<Vec<PathBuf>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--release",
            "--message-format=json-render-diagnostics",
        ])
        .args(what);
    let output = command
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo cannot build gantry; its messages are above");
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            Some(PathBuf::from(message.get("executable")?.as_str()?))
        })
        .collect())
}
