//! Init of the measuring guest: binds its devices to vfio-pci, measures them, and powers off. What it finds goes to the
//! console, a line for each test.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use gantry_resources::base::{HostPaths, chain};
use gantry_vmm::MeasuredDevices;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use super::image::MODULES;
use super::model::Report;

/// What a line begins with that says a [`Report`].
pub const MARK: &str = "gantry-bench ";

const SYS: &str = "/sys";
const DEV: &str = "/dev";
const VFIO: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
/// Class of bridges, which are the VM's.
const BRIDGE: &str = "0x06";
/// How long the kernel may take to make the node of a device.
const NODE_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs as init. Does not return.
pub fn init(per_test: Duration) -> ! {
    match measure(per_test) {
        Ok(()) => say(&Report::Done),
        Err(why) => say(&Report::Failed(why)),
    }
    let _ = reboot(RebootMode::RB_POWER_OFF);
    // As init it must not end: the kernel would panic. Whoever runs the VM sees that it is silent.
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn measure(per_test: Duration) -> Result<(), String> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", SYS), ("devtmpfs", DEV)] {
        let mounted = mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>);
        mounted.map_err(|error| format!("cannot mount {at}: {error}"))?;
    }
    load_modules()?;
    // Only with it there are interrupts.
    let vfio = fs::write(VFIO, "1").is_ok();
    // Where the kernel moves pages that are locked, a device would go on with where they were.
    let _ = fs::write("/proc/sys/vm/compact_unevictable_allowed", "0");
    let names = functions()?;
    names.iter().try_for_each(|name| release(name))?;
    if vfio {
        names.iter().try_for_each(|name| bind(name))?;
    }
    let ids = names.iter().map(|name| ids(Path::new(SYS), name)).collect();
    say(&Report::Guest { ids, vfio });
    let devices = MeasuredDevices::in_guest(&HostPaths::default(), vfio, &names);
    let devices = devices.map_err(|error| chain(&error).to_string())?;
    devices
        .measure(per_test, &mut |index, report| {
            say(&Report::new(index, report))
        })
        .map_err(|error| chain(&error).to_string())
}

fn say(report: &Report) {
    if let Ok(text) = serde_json::to_string(report) {
        // There is nobody to tell if the console cannot be written to.
        let _ = writeln!(io::stdout().lock(), "{MARK}{text}");
    }
}

/// Loads the modules of the initramfs, which the kernel itself unpacks.
fn load_modules() -> Result<(), String> {
    /// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h.
    const COMPRESSED: u32 = 4;
    let mut files = entries(Path::new(MODULES))?;
    files.sort();
    for name in files {
        let flags = match name.ends_with(".ko") {
            true => ModuleInitFlags::empty(),
            false => ModuleInitFlags::from_bits_retain(COMPRESSED),
        };
        let file = File::open(Path::new(MODULES).join(&name));
        let file = file.map_err(|error| format!("cannot open {name}: {error}"))?;
        finit_module(&file, &CString::default(), flags)
            .map_err(|error| format!("its kernel does not load {name}: {error}"))?;
    }
    Ok(())
}

/// The guest's PCI functions that are not the VM's own, in the order of their addresses.
fn functions() -> Result<Vec<String>, String> {
    let folder = Path::new(SYS).join("bus/pci/devices");
    let mut names = entries(&folder)?;
    names.sort();
    names.retain(|name| !attribute(Path::new(SYS), name, "class").starts_with(BRIDGE));
    Ok(names)
}

/// Takes a function from whichever driver has it: only vfio-pci may have it from now on.
fn release(name: &str) -> Result<(), String> {
    let folder = Path::new(SYS).join("bus/pci/devices").join(name);
    write(&folder.join("driver_override"), "vfio-pci")?;
    let unbind = folder.join("driver/unbind");
    match unbind.exists() {
        true => write(&unbind, name),
        false => Ok(()),
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("cannot write to {}: {error}", path.display()))
}

/// Gives a function to vfio-pci.
fn bind(name: &str) -> Result<(), String> {
    let folder = Path::new(SYS).join("bus/pci/devices").join(name);
    write(&Path::new(SYS).join("bus/pci/drivers_probe"), name)?;
    let group = fs::read_link(folder.join("iommu_group"));
    let group = group.map_err(|error| format!("vfio-pci does not take {name}: {error}"))?;
    let number = group.file_name().unwrap_or_default().to_string_lossy();
    let node = Path::new(DEV).join(format!("vfio/noiommu-{number}"));
    let begun = Instant::now();
    while !node.exists() {
        if begun.elapsed() > NODE_TIMEOUT {
            return Err(format!("the kernel makes no {}", node.display()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Vendor and device ids of a function: `1b36:0010`.
pub fn ids(sys: &Path, name: &str) -> String {
    let [vendor, device] = ["vendor", "device"].map(|id| attribute(sys, name, id));
    let digits = |id: &str| id.trim_start_matches("0x").to_owned();
    format!("{}:{}", digits(&vendor), digits(&device))
}

fn attribute(sys: &Path, name: &str, attribute: &str) -> String {
    let path = sys.join("bus/pci/devices").join(name).join(attribute);
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

fn entries(folder: &Path) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(folder);
    let entries = entries.map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names.filter_map(|name| name.into_string().ok()).collect())
}
