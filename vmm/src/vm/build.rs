//! How a VM is put together, in order.

use std::fs::File;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;

use gantry_devices::pci::MsiRouter;
use gantry_resources::base::HostPaths;
use gantry_resources::facts::node_of;
use gantry_resources::holding::Holder;
use gantry_resources::opener::{ToCome, to_come};
use gantry_resources::pools::Placement;

use super::exits::ExitDispatcher;
use super::hotplug_setup::{HotplugSetup, limit};
use super::{OpenPayload, Vm, VmContext};
use crate::boot::Entry;
use crate::config::{NumaPolicy, VmConfig};
use crate::cpu::{self, Features, Snapshot};
use crate::disks::{self, OpenDisk};
use crate::error::Error;
use crate::host::files::{FileError, read_rom};
use crate::host::placement::VmPlacement;
use crate::host::preflight::{self, PreflightError};
use crate::hotplug::{HostDevices, SlotDevice, arrange};
use crate::info::VmState;
use crate::kvm::{KvmError, KvmVm, Vcpu, VfioObserver};
use crate::layout::{HYPERTRANSPORT, Layout, LayoutInputs};
use crate::machine::Machine;
use crate::passthrough::{
    AcquiredDevices, Acquirer, AttachedDevice, DeviceError, IoAddressSpace, Lessor, Prefault,
    RamRanges, RomFiles, forbidden,
};
use crate::process::error::{HostError, cannot};
use crate::process::sandbox::{Role, Sandbox};
use crate::process::signals::Signals;
use crate::process::threads::{self, Task};
use crate::topology::Topology;
use crate::vcpus::{VcpuBarrier, Vcpus};
use crate::virtio::{OpenDevices, VirtioContext};

impl Vm {
    /// Leases the devices and builds the VM up to the first instruction. Steps that can fail without touching a
    /// device come first. Each step's guard undoes it if a later step fails, or if a signal comes.
    ///
    /// # Errors
    /// Something is missing, refused or does not fit; nothing is held then.
    pub fn build(config: &Arc<VmConfig>, context: &VmContext) -> Result<Self, Error> {
        let VmContext {
            host,
            sandbox,
            mailbox,
            signals,
            ..
        } = context;
        preflight::check(config, host)?;
        let mut payload = OpenPayload::open(config)?;
        let roms = read_roms(config)?;
        let virtual_devices = OpenVirtual::open(config, host)?;
        let kvm = KvmVm::new()?;
        preflight::check_vcpus(config.vcpus, kvm.kvm().get_max_vcpus())?;
        let features = offered(config, &kvm)?;

        let holder = Holder {
            vm: config.name.clone(),
            pid: std::process::id(),
        };
        let hot = (config.hotplug.slots > 0)
            .then(|| HotplugSetup::new(host, &holder, &kvm, roms.clone()))
            .transpose()?;
        let acquired = acquire(config, context, &roms, &holder, hot.as_ref(), &kvm)?;
        signals.check()?;
        let later = to_come(host, &config.hotplug.from);
        let placement = place_vm(config, &acquired, &later, host)?;
        let functions: Vec<_> = acquired.functions().into_iter().map(Some).collect();
        let ports = arrange(&functions).len() + config.virtual_devices();
        let space = acquired.space().cloned();
        let layout = plan(config, &features, &acquired, ports, &later)?;
        let mut machine = Machine::new(&kvm, &layout, config, ports, &placement, &context.console)?;
        let (opened, entry) = side_by_side(acquired, &machine, context, || {
            payload.load(&machine, &layout, config.vcpus)
        })?;

        let mut devices = HostDevices::new(&machine.slots, context.for_devices())?;
        let guest = machine.virtio_host(features.physical_bits());
        let virtio = context.for_devices().virtio(guest.clone());
        devices.plug_at_boot(virtual_devices.behind(opened, config, &virtio)?)?;
        machine.assign_pci(&layout)?;
        if let Some(hot) = hot {
            hot.confine(&placement, limit(config, ports))?;
            devices.open_slots(hot.worker(space.as_ref(), config, guest, &layout, context)?);
        }
        let declared = space.is_none() && !config.hotplug.from.is_empty();
        let ram = machine.ram.ranges();
        let prefault = declared.then(|| Prefault::start(&ram, 1, &Arc::default(), sandbox));
        drop(space);
        let irqchip = kvm.save_irqchip()?;
        let (vcpus, snapshots) = make_vcpus(&kvm, &config.topology, &features, &entry, &machine)?;
        let barrier = VcpuBarrier::new();
        let exits = ExitDispatcher::new(&machine, &barrier, mailbox);
        let affinities = placement.affinities(config);
        let vcpus = Vcpus::start(vcpus, affinities, &barrier, sandbox, &Arc::new(exits))
            .map_err(cannot("spawn a vCPU thread"))?;
        Ok(Self {
            vcpus,
            devices,
            _prefault: prefault.transpose()?,
            interrupts: File::open(host.proc.join("interrupts")).ok(),
            machine,
            snapshots,
            irqchip,
            layout,
            payload,
            barrier,
            config: Arc::clone(config),
            placement,
            state: VmState::Running,
            context: context.clone(),
            kvm,
        })
    }
}

/// What the host has for the virtual devices of a VM.
struct OpenVirtual {
    disks: Vec<OpenDisk>,
    others: OpenDevices,
}

impl OpenVirtual {
    fn open(config: &VmConfig, host: &HostPaths) -> Result<Self, Error> {
        Ok(Self {
            disks: disks::open_all(config)?,
            others: OpenDevices::open(config, host)?,
        })
    }

    /// All devices in the order of their ports: those of the host, and behind them the virtual ones.
    fn behind(
        self,
        passed: Vec<AttachedDevice>,
        config: &VmConfig,
        context: &VirtioContext,
    ) -> Result<Vec<SlotDevice>, Error> {
        let mut all: Vec<_> = passed.into_iter().map(SlotDevice::Passed).collect();
        for disk in self.disks {
            all.push(SlotDevice::Virtio(disk.device(context)?));
        }
        let others = self.others.devices(config, context)?;
        all.extend(others.into_iter().map(SlotDevice::Virtio));
        Ok(all)
    }
}

/// The CPU features that the host's KVM offers and the VM's file allows.
fn offered(config: &VmConfig, kvm: &KvmVm) -> Result<Features, Error> {
    let features = Features::of(kvm.kvm(), config.cpu);
    let features = features.map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
    match config.cpu.nested && !features.has_nested() {
        true => Err(Error::NoNested),
        false => Ok(features),
    }
}

/// Maps RAM, opens devices and loads the kernel (`load`) in parallel.
fn side_by_side(
    acquired: AcquiredDevices,
    machine: &Machine,
    context: &VmContext,
    load: impl FnOnce() -> Result<Entry, Error>,
) -> Result<(Vec<AttachedDevice>, Entry), Error> {
    let (sandbox, signals) = (&context.sandbox, &context.signals);
    let mapping = match acquired.space() {
        Some(space) => Some(map_ram(space, &machine.ram.ranges(), sandbox, signals)?),
        None => None,
    };
    let router: Arc<dyn MsiRouter> = Arc::new(machine.routes.clone());
    let opening = acquired.open(&router, &context.for_devices().notify, sandbox)?;
    let entry = load()?;
    let devices = opening.wait(sandbox, || signals.check().is_err());
    let mapped = mapping.map_or(Ok(()), Task::join);
    signals.check()?;
    mapped?;
    Ok((devices?, entry))
}

/// Places the VM near its devices, or near those that may come later if it has none yet.
fn place_vm(
    config: &VmConfig,
    acquired: &AcquiredDevices,
    later: &ToCome,
    host: &HostPaths,
) -> Result<VmPlacement, PreflightError> {
    let names = acquired.names();
    let own = names.iter().filter_map(|name| node_of(host, *name));
    let nodes = match names.is_empty() {
        true => later.nodes.clone(),
        false => own.collect(),
    };
    Ok(VmPlacement::find(config, &nodes, host)?)
}

/// The placement for which the devices at boot are chosen.
fn asked_placement(nodes: &NumaPolicy) -> Placement {
    match nodes {
        NumaPolicy::Only(nodes) => Placement::bound(nodes.iter().collect()),
        NumaPolicy::NearDevices | NumaPolicy::Any => Placement::Anywhere,
    }
}

/// Reads the expansion ROMs that the VM's file names.
fn read_roms(config: &VmConfig) -> Result<RomFiles, FileError> {
    let below = config.folders.as_ref();
    let below = below.map(|folders| folders.payload.as_path());
    let devices = config.devices.iter().enumerate();
    let devices = devices.filter_map(|(index, device)| {
        let path = device.rom.file()?;
        Some((format!("devices[{index}].rom"), path))
    });
    let later = config.hotplug.roms.iter().enumerate();
    let later = later.map(|(index, path)| (format!("hotplug.roms[{index}]"), path));
    let read = |(key, path): (String, &PathBuf)| Ok((path.clone(), read_rom(&key, path, below)?));
    devices.chain(later).map(read).collect()
}

/// Leases the devices that the VM starts with. If the VM has an opener, the opener leases them, as it must know
/// every device of a group.
fn acquire(
    config: &VmConfig,
    context: &VmContext,
    roms: &RomFiles,
    holder: &Holder,
    hot: Option<&HotplugSetup>,
    kvm: &KvmVm,
) -> Result<AcquiredDevices, Error> {
    if config.devices.is_empty() {
        return Ok(AcquiredDevices::default());
    }
    let (host, signals) = (&context.host, &context.signals);
    let roms = roms.of(&config.devices)?;
    let placement = asked_placement(&config.nodes);
    let observer = match hot {
        Some(hot) => Arc::clone(&hot.observer),
        None => Arc::new(VfioObserver::new(kvm.vm())?),
    };
    let lessor = match hot {
        Some(hot) => {
            hot.opener.place(placement).map_err(DeviceError::from)?;
            Lessor::Opener(&hot.opener)
        }
        None => Lessor::Process(&placement, holder),
    };
    let acquirer = Acquirer {
        lessor,
        back_end: config.back_end_on(host),
        sent: None,
        on_new_space: &|| {},
        observer: &observer,
        host,
        sandbox: &context.sandbox,
    };
    let cancelled = || signals.check().is_err();
    let acquired = acquirer.acquire(&config.devices, &roms, None, &cancelled);
    signals.check()?;
    let acquired = acquired?;
    match acquired.duplicate_id() {
        Some(id) => Err(Error::DuplicateId(id.to_owned())),
        None => Ok(acquired),
    }
}

fn plan(
    config: &VmConfig,
    features: &Features,
    acquired: &AcquiredDevices,
    ports: usize,
    later: &ToCome,
) -> Result<Layout, Error> {
    let iova = acquired.iova_ranges()?;
    let mut reserved = acquired.reserved().to_vec();
    let later = later.reserved.iter().filter_map(forbidden).collect();
    reserved.extend(expected(config.hotplug.slots, &iova, later));
    let ports = ports + usize::from(config.hotplug.slots);
    Ok(Layout::plan(&LayoutInputs {
        root_ports: u8::try_from(ports).unwrap_or(u8::MAX),
        ram: config.memory.bytes(),
        physical_bits: features.physical_bits(),
        iova: &iova,
        reserved: &reserved,
    })?)
}

/// What devices attached to `slots` later will reserve, as far as it is `known` or follows from the IOMMU's
/// ranges. If neither is known, what any AMD IOMMU may reserve.
fn expected(
    slots: u8,
    iova: &[RangeInclusive<u64>],
    known: Vec<RangeInclusive<u64>>,
) -> Vec<RangeInclusive<u64>> {
    match slots > 0 && iova.is_empty() && known.is_empty() {
        true => vec![HYPERTRANSPORT],
        false => known,
    }
}

/// Starts to map all of RAM, once for all present and later devices. Ends early once a signal has come.
fn map_ram(
    space: &Arc<IoAddressSpace>,
    ram: &RamRanges,
    sandbox: &Sandbox,
    signals: &Arc<Signals>,
) -> Result<Task<Result<(), DeviceError>>, HostError> {
    let (space, ram, signals) = (Arc::clone(space), Arc::clone(ram), Arc::clone(signals));
    let map = move || space.map(&ram, || signals.check().is_err());
    threads::spawn(Role::Dma, sandbox, map).map_err(cannot("spawn a thread"))
}

fn make_vcpus(
    kvm: &KvmVm,
    topology: &Topology,
    features: &Features,
    entry: &Entry,
    machine: &Machine,
) -> Result<(Vec<Vcpu>, Vec<Snapshot>), Error> {
    let (mut vcpus, mut snapshots) = (Vec::new(), Vec::new());
    let posted = kvm.post_config_address()?;
    for id in 0..topology.count() {
        let vcpu = kvm
            .vm()
            .create_vcpu(u64::from(id))
            .map_err(KvmError::call("KVM_CREATE_VCPU"))?;
        cpu::setup(&vcpu, id, topology, features)?;
        snapshots.push(Snapshot::take(&vcpu, id, features)?);
        if id == 0 {
            cpu::boot_state(&vcpu, entry, machine.ram.memory())?;
        }
        let vcpu = Vcpu::new(vcpu, posted.clone());
        vcpus.push(vcpu.map_err(cannot("map the ring of posted writes"))?);
    }
    Ok((vcpus, snapshots))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_amd_reserves_stays_free_where_nothing_is_known() {
        let msi = 0xfee0_0000..=0xfeef_ffff;
        assert_eq!(expected(4, &[], Vec::new()), [HYPERTRANSPORT]);
        assert_eq!(expected(4, &[], vec![msi.clone()]), [msi]);
        assert!(expected(4, &[0..=1 << 39], Vec::new()).is_empty());
        assert!(expected(0, &[], Vec::new()).is_empty());
    }
}
