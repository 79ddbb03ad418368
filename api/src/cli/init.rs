//! `gantry init`: writes a VM's file, with a device that it takes from the host.

mod ask;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use gantry_resources::base::{HostBdf, HostPaths};
use gantry_resources::inventory::{DeviceState, HostDevice, cards, is_reset, scan};
use gantry_resources::pools::Groups;
use gantry_vmm::VmConfig;
use serde_json::{Map, json};

use super::device::{detach_into, would_detach};
use crate::cli::group::fit;
use crate::config::{self, LoadOptions, SourceText};
use crate::output::{note, print};
use crate::report::{Failure, USAGE};

#[derive(Debug, Args)]
#[command(after_help = "\
At a terminal it asks for what is not named, shows what it will do, and asks again before it does that. The device is \
taken from the driver of the host and becomes the group's; `gantry device reattach` gives it back. A device that the \
host uses is refused, and a file that is there is never overwritten.

Examples:
  gantry init
  gantry init web.json --device 0b:00.0 --group gpus --disk web.raw
  gantry init --group gpus --kernel /boot/vmlinuz --yes")]
pub struct InitArgs {
    /// The file to write
    #[arg(value_name = "VM.JSON", default_value = "vm.json")]
    file: PathBuf,
    /// The device that the VM gets, with the other functions of its card; may be given several times
    #[arg(long = "device", value_name = "BDF")]
    devices: Vec<HostBdf>,
    /// The group that the devices are put into [default: one named for their kind]. Without --device: the group
    /// that the VM takes one from
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// The kernel that the VM boots [default: the newest in /boot]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initramfs [default: that of the kernel in /boot]
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// A disk for the VM's root: a raw image or a block device
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// The VM's memory
    #[arg(long, value_name = "SIZE", default_value = "2G")]
    memory: String,
    /// Number of vCPUs
    #[arg(long, value_name = "COUNT", default_value_t = 2)]
    cpus: u8,
    /// Ask nothing
    #[arg(short, long)]
    yes: bool,
}

/// What is to be done.
struct Plan {
    /// Devices that leave the host's drivers, and the group that they are put into if they are in none.
    takes: Option<(Vec<HostBdf>, Option<String>)>,
    /// The VM's file.
    text: String,
    /// The same as `gantry run` reads it.
    config: VmConfig,
}

pub fn init(args: InitArgs, paths: &HostPaths) -> Result<(), Failure> {
    // A link that leads nowhere is there, too.
    if fs::symlink_metadata(&args.file).is_ok() {
        return Err(is_there(&args.file));
    }
    let is_asked = !args.yes;
    if is_asked && !io::stdin().is_terminal() {
        let what = "gantry init asks, and standard input is no terminal";
        return Err(Failure::new(USAGE, what).help("add --yes, and name what the VM gets"));
    }
    let args = match is_asked {
        true => ask::missing(args, paths)?,
        false => args,
    };
    let plan = plan(&args, paths)?;
    print(|out| show(out, &plan, &args.file))?;
    if let Some((devices, _)) = &plan.takes {
        // It shows the moves, or refuses a device that the host uses.
        would_detach(devices, paths)?;
    }
    if is_asked && !ask::confirm()? {
        note("nothing was done");
        return Ok(());
    }
    let mut file = create(&args.file)?;
    let done = apply(&plan, &mut file, paths);
    if done.is_err() {
        let _ = fs::remove_file(&args.file);
    }
    done?;
    let file = args.file.display();
    print(|out| writeln!(out, "{file} is written: `gantry run {file}` runs the VM"))?;
    match plan.config.devices.as_slice() {
        [] => Ok(()),
        devices => {
            // What lacks now may be free later.
            if let Err(failure) = fit::print_fit(paths, devices, BTreeSet::new(), false) {
                note(format!("warning: {failure}"));
            }
            Ok(())
        }
    }
}

fn apply(plan: &Plan, file: &mut File, paths: &HostPaths) -> Result<(), Failure> {
    file.write_all(plan.text.as_bytes())
        .map_err(|error| Failure::host(format!("cannot write the VM's file: {error}")))?;
    match &plan.takes {
        Some((devices, group)) => detach_into(devices, group.as_deref(), paths),
        None => Ok(()),
    }
}

fn create(path: &Path) -> Result<File, Failure> {
    File::create_new(path).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => is_there(path),
        _ => Failure::host(format!("cannot make {}: {error}", path.display())),
    })
}

fn is_there(path: &Path) -> Failure {
    let path = path.display();
    Failure::host(format!("{path} is there already, and is left as it is")).help(format!(
        "name another file, or look at it: `gantry run --check {path}`"
    ))
}

fn show(out: &mut dyn Write, plan: &Plan, file: &Path) -> io::Result<()> {
    writeln!(out, "{} will be written:\n{}", file.display(), plan.text)?;
    match &plan.takes {
        None => Ok(()),
        Some((_, None)) => writeln!(out, "These devices will be taken from the host:"),
        Some((_, Some(group))) => {
            writeln!(
                out,
                "These devices will be taken from the host, for the group \"{group}\":"
            )
        }
    }
}

fn plan(args: &InitArgs, paths: &HostPaths) -> Result<Plan, Failure> {
    let all = scan(paths)?;
    let groups = Groups::load(paths)?;
    let mut devices = Vec::new();
    // In the order of their addresses, each once.
    for bdf in &args.devices.iter().collect::<BTreeSet<_>>() {
        let found = all.iter().find(|device| device.bdf == **bdf);
        devices.push(found.ok_or_else(|| {
            let what = format!("there is no device {bdf} on this host");
            Failure::new(USAGE, what).help("`gantry device list` shows what there is")
        })?);
    }
    let own = devices.first().and_then(|first| groups.group_of(first));
    let group = match (&args.group, own, devices.first()) {
        (Some(named), ..) => Some(named.clone()),
        (None, Some(own), _) => Some(own.name.clone()),
        (None, None, Some(first)) => Some(new_name(first, &groups)),
        (None, None, None) => None,
    };
    if devices.is_empty()
        && let Some(name) = &group
    {
        groups.find(name)?;
    }
    let is_in = |device: &&HostDevice| {
        groups.group_of(device).map(|group| &*group.name) == group.as_deref()
    };
    let on_host = |device: &&HostDevice| device.state() == DeviceState::Attached;
    let joins = group.clone().filter(|_| !devices.iter().all(is_in));
    let takes = joins.is_some() || devices.iter().any(on_host);
    let takes = takes.then(|| (args.devices.clone(), joins));
    let text = text(args, group.as_deref(), &devices, &all)?;
    let config = check(args, &text, paths)?;
    Ok(Plan {
        takes,
        text,
        config,
    })
}

/// A name for a group of devices of this kind that no group has.
fn new_name(device: &HostDevice, groups: &Groups) -> String {
    let stem = match device.class.to_string().get(..2) {
        _ if device.is_nvme() => "nvme",
        Some("02") => "nic",
        Some("03") => "gpu",
        _ => "devices",
    };
    let numbered = (2..).map(|number| format!("{stem}{number}"));
    let mut names = std::iter::once(stem.to_owned()).chain(numbered);
    let free = names.find(|name| groups.get(name).is_none());
    free.unwrap_or_else(|| stem.to_owned())
}

/// The VM's file.
fn text(
    args: &InitArgs,
    group: Option<&str>,
    devices: &[&HostDevice],
    all: &[HostDevice],
) -> Result<String, Failure> {
    let absolute = |path: &PathBuf| std::path::absolute(path).map_err(Failure::host);
    let (kernel, initramfs) = match &args.kernel {
        Some(kernel) => (kernel.clone(), args.initramfs.clone()),
        None => {
            let (kernel, initramfs) = newest_kernel(Path::new("/boot")).ok_or_else(|| {
                Failure::new(USAGE, "there is no kernel in /boot").help("name one: `--kernel FILE`")
            })?;
            (kernel, args.initramfs.clone().or(initramfs))
        }
    };
    let root = if args.disk.is_some() {
        " root=/dev/vda"
    } else {
        ""
    };
    let mut payload = Map::new();
    payload.insert("kernel".to_owned(), json!(absolute(&kernel)?));
    if let Some(initramfs) = &initramfs {
        payload.insert("initramfs".to_owned(), json!(absolute(initramfs)?));
    }
    payload.insert("cmdline".to_owned(), json!(format!("console=ttyS0{root}")));
    let mut file = json!({
        "payload": payload,
        "cpus": {"boot_vcpus": args.cpus},
        "memory": {"size": args.memory},
        "serial": {"mode": "Tty"},
    });
    if let Some(group) = group {
        let mut request = json!({"group": group});
        let count = cards(devices.iter().copied()).len();
        if count > 1 {
            request["count"] = json!(count);
        }
        // The user names the device, and is shown what its entry says.
        if devices.iter().any(|device| !is_reset(device, all)) {
            request["allow_no_reset"] = json!(true);
        }
        let no_interrupts =
            |device: &&HostDevice| device.interrupts.is_some_and(|has| !has.are_any());
        if devices.iter().any(no_interrupts) {
            request["interrupts"] = json!("none");
        }
        file["devices"] = json!([request]);
    }
    if let Some(disk) = &args.disk {
        file["disks"] = json!([{"path": absolute(disk)?}]);
    }
    let text = serde_json::to_string_pretty(&file)?;
    Ok(format!("{text}\n"))
}

/// Reads the text as `gantry run` will, before anything is done.
fn check(args: &InitArgs, text: &str, paths: &HostPaths) -> Result<VmConfig, Failure> {
    let name = config::Source::from(args.file.clone()).name(None);
    let written = SourceText {
        text,
        file: &args.file.display().to_string(),
        folder: Path::new(""),
    };
    let options = LoadOptions {
        host: paths.clone(),
        ..LoadOptions::default()
    };
    Ok(config::parse(&written, &name, &options)?)
}

/// The newest kernel of a folder, and its initramfs.
fn newest_kernel(boot: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    let entries = fs::read_dir(boot).ok()?.flatten();
    let kernels = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let version = name.strip_prefix("vmlinuz-")?.to_owned();
        Some((entry.metadata().ok()?.modified().ok()?, version))
    });
    let (_, version) = kernels.max()?;
    let initramfs = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
    ];
    let initramfs = initramfs.map(|name| boot.join(name));
    let kernel = boot.join(format!("vmlinuz-{version}"));
    Some((kernel, initramfs.into_iter().find(|path| path.exists())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_comes_with_its_initramfs() {
        let boot = tempfile::tempdir().unwrap();
        assert_eq!(newest_kernel(boot.path()), None);
        let write = |name: &str| fs::write(boot.path().join(name), "").unwrap();
        write("vmlinuz-6.1.0");
        write("initrd.img-6.1.0");
        write("config-6.12.0");
        let (kernel, initramfs) = newest_kernel(boot.path()).unwrap();
        assert!(kernel.ends_with("vmlinuz-6.1.0"));
        assert!(initramfs.unwrap().ends_with("initrd.img-6.1.0"));
    }
}
