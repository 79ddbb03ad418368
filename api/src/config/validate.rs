//! Converts a VM's file into the VMM's configuration; this conversion is the validation.

mod disks;
mod nets;
mod place;
mod planned;
mod virtio;

use std::fmt::Display;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use gantry_resources::base::json::join;
use gantry_resources::base::{ByteSize, HostPaths, open_below, open_regular};
use gantry_resources::facts::VfioBackEnd;
use gantry_resources::pools::{
    Aliases, DeviceRequest, DeviceSource, GroupType, Groups, NO_USB, Plan, RomSource,
};
use gantry_vmm::{
    CloudInit, CpuConfig, Folders, Hotplug, MemorySize, NumaPolicy, Payload, SerialMode, VcpuCount,
};
use nix::fcntl::OFlag;

use super::model;
pub use disks::disk;

/// Bytes of a kernel command line, less its end mark: COMMAND_LINE_SIZE of the x86 boot protocol.
const MAX_CMDLINE: usize = 2047;

/// Bits of a guest-physical address: the fewest of any x86-64 processor, and the most.
const PHYS_BITS: std::ops::RangeInclusive<u8> = 36..=52;

/// Default number of hot-plug slots.
pub const SLOTS: u8 = 32;
/// Each slot takes 16 MiB of the guest's 1.5 GiB of 32-bit addresses for devices, which the devices present at
/// boot share.
const MAX_SLOTS: u8 = 96;
/// The granularity of a bridge's windows.
const MIN_WINDOW: u64 = 1 << 20;

/// The options of the command line and the host that add to a file.
#[derive(Debug)]
pub struct Context<'a> {
    /// Name of the VM.
    pub name: &'a str,
    /// Folder that relative paths start at.
    pub folder: &'a Path,
    /// Devices named by path may be in no group.
    pub allow_ungrouped: bool,
    /// Where the host keeps its service plans.
    pub host: &'a HostPaths,
    /// Number of hot-plug slots, where the file has no `hotplug`.
    pub slots: u8,
    /// Where the files that are named must lie; anywhere if absent.
    pub folders: Option<&'a Folders>,
    /// Where disks may come from that are attached later, where the file does not say.
    pub later_disks: &'a [PathBuf],
}

/// A value that fits its type, but with which no VM can be built.
#[derive(Debug)]
pub struct Invalid {
    /// Its key path.
    pub path: String,
    /// The reason and the remedy.
    pub what: String,
}

fn invalid(path: &str, what: impl Display, help: impl Display) -> Invalid {
    Invalid {
        path: path.to_owned(),
        what: format!("{what}: {help}"),
    }
}

/// Takes the name of one of the VM's devices, which stands at `key`.
fn claim_name(names: &mut Vec<String>, key: &str, id: &str) -> Result<(), Invalid> {
    if names.iter().any(|name| name == id) {
        let what = format!("another device of the VM is called \"{id}\"");
        return Err(invalid(&format!("{key}.id"), what, "choose another id"));
    }
    names.push(id.to_owned());
    Ok(())
}

/// The mistakes of a file.
#[derive(Default)]
struct Mistakes(Vec<Invalid>);

impl Mistakes {
    /// Returns the value if it is valid, and records the mistake otherwise.
    fn keep<T>(&mut self, value: Result<T, Invalid>) -> Option<T> {
        value.map_err(|mistake| self.0.push(mistake)).ok()
    }

    /// The value if there is no mistake.
    fn or<T>(self, value: Option<T>) -> Result<T, Vec<Invalid>> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(self.0),
        }
    }
}

/// Converts a whole file.
///
/// # Errors
/// All mistakes that can be found.
pub fn convert(
    config: model::VmConfig,
    context: &Context,
) -> Result<gantry_vmm::VmConfig, Vec<Invalid>> {
    let mut mistakes = Mistakes::default();
    let built = build(config, context, &mut mistakes);
    mistakes.or(built)
}

/// The devices of a file, and the NUMA nodes that they must be near to; the file need not describe a whole VM.
///
/// # Errors
/// Every mistake in the devices.
pub fn requests(
    config: model::VmConfig,
    context: &Context,
) -> Result<(Vec<DeviceRequest>, NumaPolicy), Vec<Invalid>> {
    if config.payload.is_some() {
        return convert(config, context).map(|config| (config.devices, config.nodes));
    }
    let mut mistakes = Mistakes::default();
    let plan = mistakes.keep(planned::named(config.plan.as_deref(), context));
    let requests = plan.and_then(|plan| {
        let plan = plan.as_ref();
        mistakes.keep(devices(config.devices, config.aliases, plan, context))
    });
    let nodes = place::nodes(config.numa_nodes);
    mistakes.or(requests.map(|requests| (requests, nodes)))
}

fn build(
    config: model::VmConfig,
    context: &Context,
    mistakes: &mut Mistakes,
) -> Option<gantry_vmm::VmConfig> {
    let missing = || invalid("payload", "this key is missing", "add \"payload\": ...");
    let payload = config.payload.ok_or_else(missing);
    let payload = mistakes.keep(payload.and_then(|config| payload_of(config, context)));
    let plan = mistakes.keep(planned::named(config.plan.as_deref(), context));
    let plan = plan.flatten();
    let plan = plan.as_ref();
    let affinity = config
        .cpus
        .as_ref()
        .and_then(|cpus| cpus.affinity.as_deref());
    let affinity = mistakes.keep(place::affinity(affinity.unwrap_or_default()));
    let cpu = mistakes.keep(config.cpus.as_ref().map_or(Ok(CpuConfig::default()), offer));
    let vcpus = match &config.cpus {
        Some(cpus) => vcpus(cpus),
        None => planned::vcpus(plan),
    };
    let vcpus = mistakes.keep(vcpus);
    if let (Some(affinity), Some(vcpus)) = (&affinity, vcpus) {
        mistakes.keep(place::check(affinity, vcpus));
    }
    let topology = config.cpus.as_ref().and_then(|cpus| cpus.topology.as_ref());
    let topology = vcpus.and_then(|vcpus| mistakes.keep(place::topology(topology, vcpus)));
    let memory = match &config.memory {
        Some(config) => memory(config),
        None => planned::memory(plan),
    };
    let memory = mistakes.keep(memory);
    let devices = mistakes.keep(devices(config.devices, config.aliases, plan, context));
    let own_disks = config.disks.unwrap_or_default();
    let disks = disks::disks(
        own_disks,
        devices.as_deref().unwrap_or_default(),
        context,
        mistakes,
    );
    let cloud_init = config.cloud_init.map(|files| cloud_init(files, context));
    let cloud_init = mistakes.keep(cloud_init.transpose());
    let given = devices.iter().flatten().flat_map(DeviceRequest::names);
    let names = given.chain(disks.iter().map(|disk| disk.id.clone()));
    let virtio = (config.net, config.vsock, config.rng);
    let virtio = virtio::devices(virtio, names.collect(), context, mistakes);
    let asks_for_slots = config.hotplug.is_some();
    let hotplug = mistakes.keep(hotplug(config.hotplug, context));
    let serial = mistakes.keep(serial(config.serial.unwrap_or_default(), context));
    let config = gantry_vmm::VmConfig {
        name: context.name.to_owned(),
        payload: payload?,
        vcpus: vcpus?,
        topology: topology?,
        cpu: cpu?,
        affinity: affinity?,
        nodes: place::nodes(config.numa_nodes),
        memory: memory?,
        devices: devices?,
        disks,
        cloud_init: cloud_init?,
        nets: virtio.nets,
        vsock: virtio.vsock,
        rng: virtio.rng,
        serial: serial?,
        pvpanic: config.pvpanic.unwrap_or(true),
        hotplug: hotplug?,
        back_end: back_end(config.platform.unwrap_or_default()),
        folders: context.folders.cloned(),
    };
    if asks_for_slots {
        warn_of_empty_slots(&config);
    }
    Some(config)
}

/// Says that nothing can be attached later to slots that were asked for.
fn warn_of_empty_slots(config: &gantry_vmm::VmConfig) {
    let hotplug = &config.hotplug;
    let no_device = hotplug.from.is_empty() && !hotplug.ungrouped && config.devices.is_empty();
    let none_may_come = no_device && hotplug.disks.is_empty();
    if hotplug.slots > 0 && none_may_come {
        tracing::warn!(
            "hotplug.groups: it names no group, and the VM starts without devices: none can be attached later; \
             `hotplug.disks` names none either"
        );
    }
}

fn payload_of(config: model::PayloadConfig, context: &Context) -> Result<Payload, Invalid> {
    let cmdline = config.cmdline.unwrap_or_default();
    if cmdline.contains('\0') {
        return Err(invalid(
            "payload.cmdline",
            "it holds a NUL character",
            "remove \\u0000",
        ));
    }
    if cmdline.len() > MAX_CMDLINE {
        let what = format!(
            "{} bytes are too many: at most {MAX_CMDLINE}",
            cmdline.len()
        );
        let help = "shorten the command line";
        return Err(invalid("payload.cmdline", what, help));
    }
    let (key, kernel) = match (config.kernel, config.firmware) {
        (Some(kernel), None) => ("payload.kernel", kernel),
        (None, Some(firmware)) => ("payload.firmware", firmware),
        (None, None) => {
            let what = "this key is missing";
            return Err(invalid("payload.kernel", what, "add \"kernel\": ..."));
        }
        (Some(_), Some(_)) => {
            let what = "a VM boots a kernel or a firmware";
            return Err(invalid("payload.firmware", what, "remove one of the two"));
        }
    };
    let is_firmware = key == "payload.firmware";
    for (key, is_there) in [
        ("payload.initramfs", config.initramfs.is_some()),
        ("payload.cmdline", !cmdline.is_empty()),
    ] {
        if is_firmware && is_there {
            let what = "a firmware takes none from here";
            let help = "remove the key: the boot loader on the disk says what its kernel gets";
            return Err(invalid(key, what, help));
        }
    }
    Ok(Payload {
        kernel: readable(key, &kernel, context)?,
        is_firmware,
        initramfs: config
            .initramfs
            .map(|file| readable("payload.initramfs", &file, context))
            .transpose()?,
        cmdline,
    })
}

fn cloud_init(config: model::CloudInitConfig, context: &Context) -> Result<CloudInit, Invalid> {
    Ok(CloudInit {
        user_data: readable("cloud_init.user_data", &config.user_data, context)?,
        meta_data: readable("cloud_init.meta_data", &config.meta_data, context)?,
        network_config: config
            .network_config
            .map(|file| readable("cloud_init.network_config", &file, context))
            .transpose()?,
    })
}

/// Opens a file once, so that the error for a wrong path names its key.
fn readable(key: &str, file: &Path, context: &Context) -> Result<PathBuf, Invalid> {
    if let Some(Folders { payload, .. }) = context.folders {
        let path = payload.join(file);
        let opened = open_below(payload, &path, OFlag::O_RDONLY);
        return named(key, path, opened, "read", payload);
    }
    let path = context.folder.join(file);
    let help = if file.is_absolute() {
        "name a file that this user may read"
    } else {
        "name a file that this user may read; a relative path starts at the folder of the JSON file"
    };
    let Err(problem) = open_regular(&path, File::options().read(true)) else {
        return Ok(path);
    };
    Err(invalid(
        key,
        format!("cannot read {}: {problem}", path.display()),
        help,
    ))
}

/// Opens a file that a client names, inside the folder that the client is limited to.
fn named(
    key: &str,
    path: PathBuf,
    opened: io::Result<File>,
    how: &str,
    folder: &Path,
) -> Result<PathBuf, Invalid> {
    let Err(problem) = opened else {
        return Ok(path);
    };
    let what = format!("cannot {how} {}: {problem}", path.display());
    let help = format!("clients of this socket name files in {}", folder.display());
    Err(invalid(key, what, help))
}

fn vcpus(config: &model::CpusConfig) -> Result<VcpuCount, Invalid> {
    let boot = config.boot_vcpus;
    let Some(vcpus) = VcpuCount::new(boot) else {
        let what = format!("a VM cannot have {boot} vCPUs");
        return Err(invalid(
            "cpus.boot_vcpus",
            what,
            format!("use 1 to {}", VcpuCount::MAX),
        ));
    };
    match config.max_vcpus {
        Some(max) if max != boot => {
            let what = format!("it differs from `boot_vcpus`: {max}, not {boot}");
            let help = "make them equal or leave it out: vCPUs cannot be added to a running VM yet";
            Err(invalid("cpus.max_vcpus", what, help))
        }
        _ => Ok(vcpus),
    }
}

/// The features of the host's processors that the guest gets.
fn offer(config: &model::CpusConfig) -> Result<CpuConfig, Invalid> {
    let max_phys_bits = match config.max_phys_bits.map(u8::try_from) {
        None => None,
        Some(Ok(bits)) if PHYS_BITS.contains(&bits) => Some(bits),
        Some(_) => {
            let (least, most) = (PHYS_BITS.start(), PHYS_BITS.end());
            let what = "a guest-physical address cannot have that many bits";
            let help = format!("use {least} to {most}, or remove the key");
            return Err(invalid("cpus.max_phys_bits", what, help));
        }
    };
    Ok(CpuConfig {
        nested: config.nested.unwrap_or(false),
        max_phys_bits,
    })
}

fn memory(config: &model::MemoryConfig) -> Result<MemorySize, Invalid> {
    let ByteSize(bytes) = config.size;
    let (min, align) = (MemorySize::MIN, MemorySize::ALIGN);
    MemorySize::new(bytes).ok_or_else(|| {
        if bytes < min {
            let what = format!("{} is too small", config.size);
            return invalid(
                "memory.size",
                what,
                format!("use {} or more", ByteSize(min)),
            );
        }
        let below = bytes - bytes % align;
        let near = [Some(below), below.checked_add(align)].map(|near| near.map(ByteSize));
        let near: Vec<String> = near.iter().flatten().map(ToString::to_string).collect();
        let what = format!("{} is not a multiple of {}", config.size, ByteSize(align));
        invalid(
            "memory.size",
            what,
            format!("the nearest sizes are {}", near.join(" and ")),
        )
    })
}

/// What the file asks for, or else its plan.
fn devices(
    own: Option<Vec<DeviceRequest>>,
    aliases: Option<Aliases>,
    plan: Option<&Plan>,
    context: &Context,
) -> Result<Vec<DeviceRequest>, Invalid> {
    if let (None, None, Some(plan)) = (&own, &aliases, plan) {
        return Ok(plan.requests());
    }
    let mut all: Vec<DeviceRequest> = Vec::new();
    let mut names: Vec<String> = Vec::new();
    for (index, request) in own.into_iter().flatten().enumerate() {
        let key = format!("devices[{index}]");
        let exact = request.from.device().is_some();
        if exact && all.iter().any(|other| other.from == request.from) {
            let what = "this device is in the list already";
            return Err(invalid(&key, what, "remove one of the two"));
        }
        if let Some(twice) = request.names().find(|name| names.contains(name)) {
            let what = format!("another device of the list is called \"{twice}\"");
            return Err(invalid(&join(&key, "id"), what, "choose another id"));
        }
        names.extend(request.names());
        let rom = match request.rom {
            RomSource::File(file) => RomSource::File(readable(&join(&key, "rom"), &file, context)?),
            rom => rom,
        };
        all.push(DeviceRequest {
            rom,
            allow_ungrouped: exact && context.allow_ungrouped,
            ..request
        });
    }
    all.extend(aliases.into_iter().flat_map(|Aliases(requests)| requests));
    Ok(all)
}

fn back_end(config: model::PlatformConfig) -> Option<VfioBackEnd> {
    config.iommufd.map(|iommufd| match iommufd {
        true => VfioBackEnd::Iommufd,
        false => VfioBackEnd::Container,
    })
}

fn hotplug(config: Option<model::HotplugConfig>, context: &Context) -> Result<Hotplug, Invalid> {
    let mut ungrouped = context.allow_ungrouped;
    let Some(config) = config else {
        return Ok(Hotplug {
            slots: context.slots,
            ungrouped,
            disks: context.later_disks.to_vec(),
            ..Hotplug::default()
        });
    };
    let slots = config.slots.unwrap_or(SLOTS.into());
    let Some(slots) = u8::try_from(slots).ok().filter(|slots| *slots <= MAX_SLOTS) else {
        let what = format!("{slots} is too many: at most {MAX_SLOTS}");
        let help = "ask for fewer; the devices that the VM starts with have slots beside these";
        return Err(invalid("hotplug.slots", what, help));
    };
    ungrouped |= config.ungrouped.unwrap_or(false);
    let window = config.window.map(|ByteSize(bytes)| bytes);
    if window.is_some_and(|bytes| !bytes.is_power_of_two() || bytes < MIN_WINDOW) {
        let help = format!("use a power of two, {} or more", ByteSize(MIN_WINDOW));
        return Err(invalid(
            "hotplug.window",
            "it is not a size that a BAR can have",
            help,
        ));
    }
    let groups = config.groups.unwrap_or_default();
    usable(&groups, context)?;
    let roms = config.roms.unwrap_or_default().into_iter().enumerate();
    let roms =
        roms.map(|(index, file)| readable(&format!("hotplug.roms[{index}]"), &file, context));
    let roms = roms.collect::<Result<_, _>>()?;
    let groups = groups.into_iter();
    Ok(Hotplug {
        slots,
        from: groups.map(DeviceSource::Group).collect(),
        ungrouped,
        window,
        roms,
        disks: disks::later(config.disks, context)?,
    })
}

/// Refuses groups whose devices cannot be passed yet.
fn usable(groups: &[String], context: &Context) -> Result<(), Invalid> {
    let there = Groups::load(context.host).unwrap_or_default();
    let usb = |name: &String| {
        let group = there.get(name);
        group.is_some_and(|group| group.kind == GroupType::Usb)
    };
    match groups.iter().position(usb) {
        Some(index) => {
            let key = format!("hotplug.groups[{index}]");
            Err(invalid(&key, NO_USB, "remove the group from the list"))
        }
        None => Ok(()),
    }
}

/// An existing file must be writable; a missing one is created when the VM is built.
fn serial_file(file: &Path, context: &Context) -> Result<SerialMode, Invalid> {
    if let Some(Folders { output, .. }) = context.folders {
        let Some(output) = output else {
            let what = "clients of this socket may name no file to write to";
            let help = "start gantry with --output-dir, or use another mode";
            return Err(invalid("serial.file", what, help));
        };
        let path = output.join(file);
        let opened = match open_below(output, &path, OFlag::O_WRONLY) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(SerialMode::File(path)),
            opened => opened,
        };
        return named("serial.file", path, opened, "write to", output).map(SerialMode::File);
    }
    let path = context.folder.join(file);
    let problem = match open_regular(&path, File::options().write(true)) {
        Err(error) if error.kind() != ErrorKind::NotFound => error.to_string(),
        Err(_) if !path.parent().is_some_and(Path::is_dir) => "its folder is not there".to_owned(),
        _ => return Ok(SerialMode::File(path)),
    };
    Err(invalid(
        "serial.file",
        format!("cannot write to {}: {problem}", path.display()),
        "name a regular file that this user may write to, or one that is not there yet in a folder that is",
    ))
}

fn serial(config: model::SerialConfig, context: &Context) -> Result<SerialMode, Invalid> {
    use model::SerialMode as Mode;
    match (config.mode, config.file) {
        (Mode::File, Some(file)) => serial_file(&file, context),
        (Mode::File, None) => {
            let help = "add \"file\": \"PATH\" beside it";
            Err(invalid("serial.mode", "mode \"File\" needs a file", help))
        }
        (_, Some(_)) => {
            let help = "set \"mode\": \"File\", or remove `file`";
            Err(invalid(
                "serial.file",
                "only mode \"File\" has a file",
                help,
            ))
        }
        (Mode::Off, None) => Ok(SerialMode::Off),
        (Mode::Null, None) => Ok(SerialMode::Null),
        (Mode::Tty, None) => Ok(SerialMode::Tty),
    }
}
