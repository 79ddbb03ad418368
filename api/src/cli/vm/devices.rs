//! `gantry vm attach` and `gantry vm detach`: send the request, wait for the guest, print the result.

use std::collections::BTreeMap;
use std::path::{self, PathBuf};
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gantry_resources::base::{DeviceName, HostPaths};
use gantry_resources::inventory::Allow;
use gantry_resources::pools::{DeviceRequest, DeviceSource, NumaPolicy, OnError, RomSource};
use serde::Serialize;
use serde::de::value::StringDeserializer;
use serde::de::{DeserializeOwned, IntoDeserializer};
use serde_json::Value;
use tokio::time::Instant;

use super::{find, open, state, watch};
use crate::config::PlanDevices;
use crate::http::client::{Client, ClientError, EventReader, seconds};
use crate::http::wire::{AddedDevices, Device, DeviceState, Event, RemoveDevice, VmInfo, VmState};
use crate::output::{note, print, print_json};
use crate::report::Failure;

#[derive(Debug, Args)]
#[command(override_usage = "gantry vm attach [OPTIONS] <--group|--alias|--plan|--device> <VM>")]
#[command(after_help = "\
Devices go into slots that the VM was started with: `\"hotplug\": {\"slots\": 8}` in its file. `gantry \
vm info` shows how many are free.

The command waits until the guest has enabled the devices, that is, their memory or I/O ports. Whether a driver then \
succeeds, `lspci -k` in the guest shows; `gantry vm metrics` shows their interrupts. `gantry vm events` shows how long each \
step takes, and `gantry vm metrics` shows it afterwards. A device that the guest does not \
enable in time stays in the VM until `gantry vm detach`.

Examples:
  gantry vm attach web-1 --group gpu
  gantry vm attach web-1 --group nvme --count 4 --timeout 60
  gantry vm attach web-1 --device 0000:41:00.0 --id gpu0
  sudo gantry vm attach alices-vm --device 0000:41:00.0 --open")]
pub struct AttachArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    #[command(flatten)]
    from: SourceArgs,
    /// How many devices of the group or alias
    #[arg(long, value_name = "N", conflicts_with = "device")]
    count: Option<u32>,
    /// How near to the VM's memory and processors the devices must be
    #[arg(long, value_name = "POLICY", value_parser = policies(), conflicts_with_all = ["device", "plan"])]
    numa_policy: Option<NumaPolicy>,
    /// `none` takes devices without interrupts too
    #[arg(long, value_name = "KIND", value_parser = ["msix", "none"], conflicts_with = "plan")]
    interrupts: Option<String>,
    /// Take devices too that nothing resets between two VMs: one may read what the other left
    #[arg(long, conflicts_with = "plan")]
    allow_no_reset: bool,
    /// What happens when the device reports an error that the hardware could not correct [default: report]
    #[arg(long, value_name = "WHAT", value_parser = on_error(), conflicts_with = "plan")]
    on_error: Option<OnError>,
    /// File with the expansion ROM for the guest, one of those under `hotplug.roms` in the VM's file [default:
    /// the device's own]
    #[arg(long, value_name = "FILE", conflicts_with = "plan")]
    rom: Option<PathBuf>,
    /// Hide the device's expansion ROM from the guest
    #[arg(long, conflicts_with_all = ["plan", "rom"])]
    no_rom: bool,
    /// Open the device here and send it to the VM, whose user need not be allowed to open it
    #[arg(long, requires = "device")]
    open: bool,
    /// Name that the device gets in the VM [default: its address on the host]
    #[arg(long)]
    id: Option<String>,
    /// How long to wait for the guest, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u32,
    /// Do not wait for the guest to enable the devices
    #[arg(long)]
    no_wait: bool,
    /// Show the devices as JSON
    #[arg(long)]
    json: bool,
}

/// Where devices come from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// Group to take devices from; `gantry group list` shows them
    #[arg(long)]
    group: Option<String>,
    /// Alias to take devices by; `gantry group alias` shows them
    #[arg(long, value_parser = alias)]
    alias: Option<String>,
    /// Service plan whose devices to take; `gantry plan list` shows them
    #[arg(long, conflicts_with_all = ["count", "id"])]
    plan: Option<String>,
    /// Address of the device to take; `gantry device list` shows them
    #[arg(long, value_name = "ADDRESS")]
    device: Option<DeviceName>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The guest's driver releases the device first. If the guest does not answer, run the command again, or remove the \
device with --force-after.

The functions of one device, such as a GPU and its audio, share a slot and are detached together; `gantry vm info` \
shows them.

Examples:
  gantry vm detach web-1 gpu0
  gantry vm detach web-1 41:00.0 --force-after 10")]
pub struct DetachArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    /// The device: its name in the VM, or its address on the host; `gantry vm info` shows them
    #[arg(value_name = "DEVICE")]
    device: String,
    /// Remove the device by force after this many seconds if the guest has not released it
    #[arg(long, value_name = "SECONDS")]
    force_after: Option<f64>,
    /// How long to wait for the guest, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u32,
    /// Do not wait for the guest to release the device
    #[arg(long)]
    no_wait: bool,
    /// Show the result as JSON
    #[arg(long)]
    json: bool,
}

pub fn attach(args: AttachArgs, paths: &HostPaths) -> Result<(), Failure> {
    let client = find::vm(&args.vm, paths)?;
    let mut events = client.events()?;
    let added: Option<AddedDevices> = match &args.from.plan {
        Some(plan) => {
            let (plan, id) = (plan.clone(), None);
            client.put_json("vm.add-device", &PlanDevices { plan, id })?
        }
        None => {
            let device = args.from.device.filter(|_| args.open);
            let sent = device.map(|device| open::open(&client, device, paths));
            client.put_json_with("vm.add-device", &args.body()?, sent.transpose()?.as_ref())?
        }
    };
    let mut devices = added.map_or_else(Vec::new, |added| added.devices);
    if !args.no_wait {
        let wait = Duration::from_secs(args.timeout.into());
        wait_until_enabled((&client, &args.vm), &mut events, &mut devices, wait)?;
    }
    if args.json {
        return print_json(&devices);
    }
    print(|out| match devices.as_slice() {
        [] => writeln!(out, "{} will have it when it boots", args.vm),
        devices => devices.iter().try_for_each(|device| {
            let how = match device.state {
                DeviceState::Enabled => "enabled by the guest",
                DeviceState::Announced => "plugged in",
                DeviceState::Detaching => "being detached",
            };
            let (named, bdf) = (watch::named(device), &device.pci_bdf);
            writeln!(out, "{named} is {how} in {}: guest address {bdf}", args.vm)
        }),
    })
}

impl AttachArgs {
    /// What is asked for without a plan. A device that comes open is not named.
    fn body(&self) -> Result<Value, Failure> {
        let body = serde_json::to_value(self.request());
        let mut body = body.map_err(|error| Failure::host(error.to_string()))?;
        if let (true, Value::Object(keys)) = (self.open, &mut body) {
            keys.remove("path");
        }
        Ok(body)
    }

    /// The request for devices without a plan.
    fn request(&self) -> DeviceRequest {
        let SourceArgs {
            group,
            alias,
            device,
            ..
        } = &self.from;
        let group = group.clone().map(DeviceSource::Group);
        let alias = alias.clone().map(DeviceSource::Alias);
        let device = device.map(DeviceSource::Device);
        let from = group.or(alias).or(device);
        // The command line requires one of them.
        let from = from.unwrap_or(DeviceSource::Group(String::new()));
        DeviceRequest {
            id: self.id.clone(),
            numa_policy: self.numa_policy,
            allow: Allow {
                no_interrupts: self.interrupts.as_deref() == Some("none"),
                no_reset: self.allow_no_reset,
            },
            on_error: self.on_error.unwrap_or_default(),
            rom: match &self.rom {
                Some(file) => RomSource::File(path::absolute(file).unwrap_or(file.clone())),
                None if self.no_rom => RomSource::None,
                None => RomSource::Device,
            },
            ..DeviceRequest::new(from, self.count.unwrap_or(1))
        }
    }
}

/// An alias. A count behind it, as in Nova's requests, is an error.
fn alias(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((name, count)) if count.parse::<u32>().is_ok() => Err(format!(
            "give the count apart from the alias: use `--alias {name} --count {count}`"
        )),
        _ => Ok(text.to_owned()),
    }
}

/// Takes the NUMA policies of a VM's file.
fn policies() -> impl TypedValueParser<Value = NumaPolicy> {
    words(["required", "preferred", "legacy", "socket"])
}

/// Those for what follows an error.
fn on_error() -> impl TypedValueParser<Value = OnError> {
    words(["report", "unplug", "stop"])
}

fn words<T: DeserializeOwned + Clone + Send + Sync + 'static>(
    words: impl IntoIterator<Item = &'static str>,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(words).try_map(|word| {
        let word: StringDeserializer<serde::de::value::Error> =
            word.to_lowercase().into_deserializer();
        T::deserialize(word)
    })
}

/// The error for devices that the guest has not enabled in time.
fn not_enabled(client: &Client, vm: &str, waiting: &[String], wait: Duration) -> Failure {
    let (named, waited) = (watch::list(waiting), seconds(wait));
    let what =
        format!("the guest has not enabled {named} in {waited}: it is attached, but not in use");
    let why = state::paused_note(client, vm).unwrap_or_else(|| {
        "the guest may lack a driver for it: look with `lspci -k` there".to_owned()
    });
    let first = waiting.first().map_or("", String::as_str);
    Failure::host(what).help(format!(
        "{why}; `gantry vm detach {vm} {first}` gives it back"
    ))
}

/// Waits until the guest has enabled all devices of a VM.
pub fn wait_until_enabled(
    (client, vm): (&Client, &str),
    events: &mut EventReader<'_>,
    devices: &mut [Device],
    wait: Duration,
) -> Result<(), Failure> {
    if let Some(paused) = state::paused_note(client, vm) {
        note(paused);
    }
    wait_for_driver(events, devices, wait)?
        .map_err(|waiting| not_enabled(client, vm, &waiting, wait))
}

/// Waits until the guest has enabled all devices. Returns those that it has not enabled in time.
fn wait_for_driver(
    events: &mut EventReader<'_>,
    devices: &mut [Device],
    wait: Duration,
) -> Result<Result<(), Vec<String>>, Failure> {
    let deadline = Instant::now() + wait;
    let mut took: BTreeMap<String, f64> = BTreeMap::new();
    loop {
        let waiting = devices
            .iter()
            .filter(|device| device.state != DeviceState::Enabled);
        let waiting: Vec<String> = waiting.map(|device| device.id.clone()).collect();
        if waiting.is_empty() {
            return Ok(Ok(()));
        }
        let line = match events.next(Some(deadline)) {
            Ok(Some(line)) => line,
            Ok(None) => return Err(Failure::host("the VM ended")),
            Err(ClientError::TimedOut { .. }) => return Ok(Err(waiting)),
            Err(error) => return Err(error.into()),
        };
        match line.event {
            Event::AttachStep {
                id, seconds, hint, ..
            } => {
                // A shorter step needs no hint.
                if let Some(hint) = hint.filter(|_| seconds > 0.5 && waiting.contains(&id)) {
                    note(format_args!("{id}: {seconds:.2} s: {hint}"));
                }
                *took.entry(id).or_default() += seconds;
            }
            // Devices that other clients attach are ignored.
            Event::Attached { device } if waiting.contains(&device.id) => {
                let seconds = took.get(&device.id).copied().unwrap_or_default();
                let named = watch::named(&device);
                note(format_args!(
                    "{named} is plugged in after {seconds:.2} s: waiting for the guest's driver"
                ));
            }
            Event::Enabled { id } => {
                let enabled = devices.iter_mut().filter(|device| device.id == id);
                enabled.for_each(|device| device.state = DeviceState::Enabled);
            }
            _ => {}
        }
    }
}

/// The result of a detach.
#[derive(Debug, Serialize)]
struct DetachReport {
    id: String,
    /// The other functions of the same device, which are detached with it.
    together_with: Vec<String>,
    gone: bool,
    forced: bool,
}

pub fn detach(args: &DetachArgs, paths: &HostPaths) -> Result<(), Failure> {
    let client = find::vm(&args.vm, paths)?;
    let info: VmInfo = client.get("vm.info")?;
    let (id, together_with) = find_device(&args.device, &info);
    let mut going = vec![id.clone()];
    going.extend(together_with.iter().cloned());
    let (named, is) = match together_with.as_slice() {
        [] => (id.clone(), "is"),
        _ => (watch::list(&going), "are"),
    };
    let mut events = client.events()?;
    let body = RemoveDevice {
        id: id.clone(),
        force_after: args.force_after,
    };
    client.put_json::<()>("vm.remove-device", &body)?;
    if matches!(info.state, VmState::Created | VmState::Shutdown) {
        return removed_before_boot(args, id, together_with);
    }
    let forced = if args.no_wait {
        None
    } else {
        match state::paused_note(&client, &args.vm) {
            Some(paused) => note(paused),
            None => note(format_args!(
                "waiting for the guest of VM {} to release {named}",
                args.vm
            )),
        }
        let wait = args.force_after.unwrap_or(0.0) + f64::from(args.timeout);
        let wait = Duration::try_from_secs_f64(wait).unwrap_or(Duration::MAX);
        Some(match wait_for_guest(&mut events, going, wait)? {
            Ok(forced) => forced,
            Err(left) => return Err(not_released(&client, args, &left, wait)),
        })
    };
    if args.json {
        return print_json(&DetachReport {
            gone: forced.is_some(),
            forced: forced == Some(true),
            id,
            together_with,
        });
    }
    print(|out| match forced {
        None => writeln!(out, "{named}: the guest is asked to release it"),
        Some(false) => writeln!(out, "{named} {is} given back"),
        Some(true) => writeln!(out, "{named} {is} taken from the guest and given back"),
    })
}

/// The error for devices that the guest has not released in time.
fn not_released(client: &Client, args: &DetachArgs, left: &[String], wait: Duration) -> Failure {
    let (named, waited) = (watch::list(left), seconds(wait));
    let what = format!("the guest has not released {named} in {waited}");
    let force = "take it from the guest with `--force-after 0`";
    Failure::host(what).help(match state::paused_note(client, &args.vm) {
        Some(paused) => format!("{paused}; or {force}"),
        None => format!("ask again, or {force}"),
    })
}

/// Waits until devices are gone. Returns whether that was forced, or the devices that are left.
fn wait_for_guest(
    events: &mut EventReader<'_>,
    mut going: Vec<String>,
    wait: Duration,
) -> Result<Result<bool, Vec<String>>, Failure> {
    let now = Instant::now();
    let deadline = now.checked_add(wait);
    loop {
        match events.next(deadline) {
            Ok(Some(line)) => {
                if let Event::Detached { id, forced } = line.event {
                    going.retain(|left| *left != id);
                    if going.is_empty() {
                        return Ok(Ok(forced));
                    }
                }
            }
            // The VM ended and gave all its devices back.
            Ok(None) => return Ok(Ok(true)),
            Err(ClientError::TimedOut { .. }) => return Ok(Err(going)),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A VM that is not booted has no guest to wait for.
fn removed_before_boot(
    args: &DetachArgs,
    id: String,
    together_with: Vec<String>,
) -> Result<(), Failure> {
    if args.json {
        return print_json(&DetachReport {
            gone: true,
            forced: false,
            id,
            together_with,
        });
    }
    print(|out| writeln!(out, "{id}: {} will not have it when it boots", args.vm))
}

/// The name of a device in the VM, found by that name or by its host address, and the names of the other functions
/// of the same device.
fn find_device(device: &str, info: &VmInfo) -> (String, Vec<String>) {
    let name: Option<DeviceName> = device.parse().ok();
    let named = info.devices.iter().find(|found| found.id == device);
    let at = || {
        let mut devices = info.devices.iter();
        devices.find(|found| name.is_some() && found.host == name)
    };
    match named.or_else(at) {
        Some(found) => (found.id.clone(), found.together_with.clone()),
        // A VM that is not booted names a device by its full address. For an unknown device, the VM's own error
        // lists its devices.
        None => (
            name.map_or(device.to_owned(), |name| name.to_string()),
            Vec::new(),
        ),
    }
}
