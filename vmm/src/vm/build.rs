//! How a VM is put together, in order.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};
use std::thread::available_parallelism;

use gantry_devices::pci::MsiRouter;
use gantry_resources::base::HostPaths;
use gantry_resources::facts::{memlock_limit, node_of};
use gantry_resources::holding::Holder;
use gantry_resources::opener::{Limit, Opener, ToCome, to_come};
use gantry_resources::pools::Placement;

use super::exits::ExitDispatcher;
use super::{Event, OpenPayload, Vm, VmContext};
use crate::boot::Entry;
use crate::config::{NumaPolicy, VcpuCount, VmConfig};
use crate::cpu::{self, Features, Snapshot};
use crate::error::Error;
use crate::host::placement::VmPlacement;
use crate::host::preflight::{self, PreflightError};
use crate::hotplug::{AttachWorker, Attacher, GuestRanges, HostDevices, arrange};
use crate::info::VmState;
use crate::kvm::{KvmError, KvmVm, Vcpu, VfioObserver};
use crate::layout::{HYPERTRANSPORT, Layout, LayoutInputs};
use crate::machine::Machine;
use crate::passthrough::{
    AcquiredDevices, Acquirer, AttachedDevice, DeviceError, IoAddressSpace, Lessor, Prefault,
    RamRanges, forbidden,
};
use crate::process::error::{HostError, cannot};
use crate::process::sandbox::{Role, Sandbox};
use crate::process::signals::Signals;
use crate::process::threads::{self, Task};
use crate::vcpus::{VcpuBarrier, Vcpus};

/// More threads than this slow each other down when they populate memory.
const POPULATE_THREADS: usize = 4;
/// Processors that the populating threads leave free: for the guest, and for the thread that maps memory.
const OTHER_THREADS: usize = 2;
/// The functions that one slot can hold.
const FUNCTIONS: usize = 8;

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
        let kvm = KvmVm::new()?;
        preflight::check_vcpus(config.vcpus, kvm.kvm().get_max_vcpus())?;
        let features = offered(config, &kvm)?;

        let holder = Holder {
            vm: config.name.clone(),
            pid: std::process::id(),
        };
        let hot = match config.hotplug.slots {
            0 => None,
            _ => Some(HotplugSetup::new(host, &holder, &kvm)?),
        };
        let acquired = acquire(config, context, &holder, hot.as_ref(), &kvm)?;
        signals.check()?;
        let later = to_come(host, &config.hotplug.from);
        let placement = place_vm(config, &acquired, &later, host)?;
        let ports = arrange(&acquired.functions()).len();
        let space = acquired.space().cloned();
        let layout = plan(config, &features, &acquired, ports, &later)?;
        let mut machine = Machine::new(&kvm, &layout, config, ports, &placement)?;
        let (opened, entry) = side_by_side(acquired, &machine, context, || {
            payload.load(&machine, &layout, config.vcpus)
        })?;

        let mut devices = HostDevices::new(&machine.slots, context.for_devices())?;
        devices.plug_at_boot(opened)?;
        machine.assign_pci(&layout)?;
        if let Some(hot) = hot {
            hot.confine(&placement, limit(config, ports))?;
            devices.open_slots(hot.worker(space.as_ref(), config, &machine, &layout, context)?);
        }
        let declared = space.is_none() && !config.hotplug.from.is_empty();
        let ram = machine.ram.ranges();
        let prefault = declared.then(|| Prefault::start(&ram, 1, &Arc::default(), sandbox));
        drop(space);
        let irqchip = kvm.save_irqchip()?;
        let (vcpus, snapshots) = make_vcpus(&kvm, config.vcpus, &features, &entry, &machine)?;
        let barrier = VcpuBarrier::new();
        let dispatcher = ExitDispatcher::new(
            Arc::clone(&machine.space),
            Arc::clone(&barrier),
            Arc::clone(mailbox),
        );
        let affinities = placement.affinities(config);
        let vcpus = Vcpus::start(vcpus, affinities, &barrier, sandbox, &Arc::new(dispatcher))
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

/// What it takes to attach devices later.
struct HotplugSetup {
    opener: Opener,
    observer: Arc<VfioObserver>,
}

impl HotplugSetup {
    fn new(host: &HostPaths, holder: &Holder, kvm: &KvmVm) -> Result<Self, Error> {
        Ok(Self {
            opener: Opener::start(host, holder).map_err(DeviceError::from)?,
            observer: Arc::new(VfioObserver::new(kvm.vm())?),
        })
    }

    /// Later devices are chosen for the VM's placement and within the limit.
    fn confine(&self, placement: &VmPlacement, limit: Limit) -> Result<(), DeviceError> {
        self.opener.place(placement.for_devices())?;
        Ok(self.opener.limit(limit)?)
    }

    /// Starts the attach worker. Devices join the address space `space`, if there is one.
    fn worker(
        self,
        space: Option<&Arc<IoAddressSpace>>,
        config: &VmConfig,
        machine: &Machine,
        layout: &Layout,
        context: &VmContext,
    ) -> Result<AttachWorker, HostError> {
        let attacher = Attacher {
            opener: self.opener,
            observer: self.observer,
            router: Arc::new(machine.routes.clone()),
            space: space.map_or_else(Weak::new, Arc::downgrade),
            ram: machine.ram.ranges(),
            ranges: guest_ranges(layout),
            memlock: memlock_limit(&context.host),
            threads: populate_threads(available_parallelism().map_or(1, NonZeroUsize::get)),
            declared: !config.hotplug.from.is_empty(),
            context: context.for_devices(),
        };
        let mailbox = Arc::clone(&context.mailbox);
        AttachWorker::start(attacher, move || mailbox.post(Event::AttachDone))
    }
}

/// How many threads populate memory beside the one that maps it.
fn populate_threads(processors: usize) -> usize {
    processors
        .saturating_sub(OTHER_THREADS)
        .min(POPULATE_THREADS)
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

/// What may be attached while the VM runs. `ports` is the number of slots that the devices at boot take.
fn limit(config: &VmConfig, ports: usize) -> Limit {
    let slots = ports + usize::from(config.hotplug.slots);
    Limit {
        from: config.hotplug.from.clone(),
        ungrouped: config.hotplug.ungrouped,
        most: slots * FUNCTIONS,
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
    let devices = opening.wait(|| signals.check().is_err());
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

/// Leases the devices that the VM starts with. If the VM has an opener, the opener leases them, as it must know
/// every device of a group.
fn acquire(
    config: &VmConfig,
    context: &VmContext,
    holder: &Holder,
    hot: Option<&HotplugSetup>,
    kvm: &KvmVm,
) -> Result<AcquiredDevices, Error> {
    if config.devices.is_empty() {
        return Ok(AcquiredDevices::default());
    }
    let (host, signals) = (&context.host, &context.signals);
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
        observer: &observer,
        host,
    };
    let cancelled = || signals.check().is_err();
    let acquired = acquirer.acquire(&config.devices, None, &cancelled);
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

/// The guest addresses that later devices must not reserve.
fn guest_ranges(layout: &Layout) -> GuestRanges {
    let ram = layout.ram.iter();
    let bridges = layout.bridges.iter();
    GuestRanges {
        ram: ram.map(|range| range.start..=range.end() - 1).collect(),
        windows: bridges
            .flat_map(|bridge| [bridge.mem32.clone(), bridge.mem64.clone()])
            .collect(),
    }
}

fn make_vcpus(
    kvm: &KvmVm,
    count: VcpuCount,
    features: &Features,
    entry: &Entry,
    machine: &Machine,
) -> Result<(Vec<Vcpu>, Vec<Snapshot>), Error> {
    let (mut vcpus, mut snapshots) = (Vec::new(), Vec::new());
    let posted = kvm.post_config_address()?;
    for id in 0..count.get() {
        let vcpu = kvm
            .vm()
            .create_vcpu(id.into())
            .map_err(KvmError::call("KVM_CREATE_VCPU"))?;
        cpu::setup(&vcpu, id.into(), count.get().into(), features)?;
        snapshots.push(Snapshot::take(&vcpu, id.into(), features)?);
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
    fn memory_is_made_present_by_processors_that_have_nothing_else_to_do() {
        let threads = [1, 2, 3, 6, 64].map(populate_threads);
        assert_eq!(threads, [0, 0, 1, 4, 4]);
    }

    #[test]
    fn what_amd_reserves_stays_free_where_nothing_is_known() {
        let msi = 0xfee0_0000..=0xfeef_ffff;
        assert_eq!(expected(4, &[], Vec::new()), [HYPERTRANSPORT]);
        assert_eq!(expected(4, &[], vec![msi.clone()]), [msi]);
        assert!(expected(4, &[0..=1 << 39], Vec::new()).is_empty());
        assert!(expected(0, &[], Vec::new()).is_empty());
    }
}
