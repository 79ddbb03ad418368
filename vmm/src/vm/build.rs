//! How a VM is put together, in order.

use std::sync::Arc;

use gantry_devices::pci::MsiRouter;
use gantry_resources::Holder;

use super::Vm;
use super::board::Board;
use super::dispatch::Dispatch;
use super::host_devices::{AttachedDevice, Claimed};
use super::payload::OpenPayload;
use crate::boot::Entry;
use crate::command::VmState;
use crate::config::{VcpuCount, VmConfig};
use crate::cpu::{self, Features, Snapshot};
use crate::error::Error;
use crate::kvm::{KvmError, Machine, Vcpu};
use crate::layout::{Layout, LayoutInputs};
use crate::preflight;
use crate::vcpus::{Gate, Vcpus};
use crate::vmm::Ground;

impl Vm {
    /// Leases the devices and builds the VM up to the first instruction. What can fail without
    /// touching a device comes first; each step's guard undoes it if a later one fails, or if a
    /// signal has come.
    ///
    /// # Errors
    /// Something is missing, refused or does not fit; nothing is held then.
    pub fn build(config: &Arc<VmConfig>, ground: &Ground) -> Result<Self, Error> {
        let Ground {
            host,
            sandbox,
            mailbox,
            signals,
            ..
        } = ground;
        preflight::check(config, host)?;
        let mut payload = OpenPayload::open(&config.payload)?;
        let machine = Machine::new()?;
        preflight::check_vcpus(config.vcpus, machine.kvm().get_max_vcpus())?;
        let features =
            Features::of(machine.kvm()).map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;

        let holder = Holder {
            vm: config.name.clone(),
            pid: std::process::id(),
        };
        let leases = gantry_resources::allocate(host, &config.devices, &holder)?;
        signals.check()?;
        let claimed = Claimed::new(leases, host, &machine)?;
        signals.check()?;
        let layout = plan(config, &features, &claimed)?;
        let board = Board::new(&machine, &layout, &config.serial, claimed.device_count())?;

        // Side by side: RAM is pinned, devices are opened, the kernel is loaded.
        let dma = claimed.map_ram(&board.ram, sandbox, signals)?;
        let router: Arc<dyn MsiRouter> = Arc::new(board.routes.clone());
        let opening = claimed.open(&router, sandbox)?;
        let entry = payload.load(&board, &layout, config.vcpus)?;
        let mut devices = opening
            .into_iter()
            .map(|task| task.join())
            .collect::<Result<Vec<_>, _>>()?;
        let dma = dma.map_or(Ok(Vec::new()), |task| task.join());
        signals.check()?;
        let dma = dma?;

        plug(&board, &mut devices)?;
        board.assign_pci(&layout)?;
        let irqchip = machine.save_irqchip()?;
        let (vcpus, snapshots) = make_vcpus(&machine, config.vcpus, &features, &entry, &board)?;
        let gate = Gate::new();
        let dispatch = Dispatch::new(
            Arc::clone(&board.space),
            Arc::clone(&gate),
            Arc::clone(mailbox),
        );
        let vcpus = Vcpus::start(vcpus, &gate, sandbox, &Arc::new(dispatch))
            .map_err(Error::host("spawn a vCPU thread"))?;
        Ok(Self {
            vcpus,
            devices,
            _dma: dma,
            board,
            snapshots,
            irqchip,
            layout,
            payload,
            vcpu_count: config.vcpus,
            serial: config.serial.clone(),
            gate,
            config: Arc::clone(config),
            state: VmState::Running,
            ground: ground.clone(),
            machine,
        })
    }
}

/// Puts each device behind a root port of its own.
fn plug(board: &Board, devices: &mut [AttachedDevice]) -> Result<(), Error> {
    let ports: Vec<_> = board.pci.ports().map(|(port, ..)| port).collect();
    for (device, port) in devices.iter_mut().zip(ports) {
        device.plug(&board.pci, port)?;
    }
    Ok(())
}

fn plan(config: &VmConfig, features: &Features, claimed: &Claimed) -> Result<Layout, Error> {
    let iova = claimed.iova_ranges()?;
    Ok(Layout::plan(&LayoutInputs {
        root_ports: u8::try_from(claimed.device_count()).unwrap_or(u8::MAX),
        ram: config.memory.bytes(),
        physical_bits: features.physical_bits(),
        iova: &iova,
        reserved: claimed.reserved(),
    })?)
}

fn make_vcpus(
    machine: &Machine,
    count: VcpuCount,
    features: &Features,
    entry: &Entry,
    board: &Board,
) -> Result<(Vec<Vcpu>, Vec<Snapshot>), Error> {
    let (mut vcpus, mut snapshots) = (Vec::new(), Vec::new());
    let posted = machine.post_config_address()?;
    for id in 0..count.get() {
        let vcpu = machine
            .vm()
            .create_vcpu(id.into())
            .map_err(KvmError::call("KVM_CREATE_VCPU"))?;
        cpu::setup(&vcpu, id.into(), count.get().into(), features)?;
        snapshots.push(Snapshot::take(&vcpu, id.into(), features)?);
        if id == 0 {
            cpu::boot_state(&vcpu, entry, board.ram.memory())?;
        }
        let vcpu = Vcpu::new(vcpu, posted.clone());
        vcpus.push(vcpu.map_err(Error::host("map the ring of posted writes"))?);
    }
    Ok((vcpus, snapshots))
}
