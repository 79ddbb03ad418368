//! Metrics for Prometheus, collected for each request.

use std::fmt;
use std::sync::atomic::AtomicI64;

use gantry_vmm::command::{DeviceCounters, DeviceInfo, VmInfo, VmState};
use hyper::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// The type of [`text`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The counters of the API itself.
#[derive(Debug, Default)]
pub struct ApiMetrics {
    requests: Family<RequestLabels, Counter>,
    connections: Gauge<i64, AtomicI64>,
    turned_away: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    path: &'static str,
    status: u16,
}

/// A connection that is open.
pub struct OpenConnection(Gauge<i64, AtomicI64>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl ApiMetrics {
    /// Counts an answer.
    pub fn answered(&self, path: &'static str, status: StatusCode) {
        let status = status.as_u16();
        self.requests
            .get_or_create(&RequestLabels { path, status })
            .inc();
    }

    /// Counts a connection for as long as it is open.
    pub fn connected(&self) -> OpenConnection {
        self.connections.inc();
        OpenConnection(self.connections.clone())
    }

    /// Counts a connection that was refused because of the limit.
    pub fn turned_away(&self) {
        self.turned_away.inc();
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Device {
    device: String,
    host: String,
    group: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Vector {
    #[prometheus(flatten)]
    device: Device,
    vector: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Region {
    #[prometheus(flatten)]
    device: Device,
    region: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Virtio {
    #[prometheus(flatten)]
    device: Device,
    what: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Step {
    #[prometheus(flatten)]
    device: Device,
    step: String,
}

/// Everything as text; `vm` is none where no VM is created.
///
/// # Errors
/// Never for text in memory.
pub fn text(
    name: &str,
    vm: Option<(&VmInfo, &[DeviceCounters])>,
    api_metrics: &ApiMetrics,
) -> Result<String, fmt::Error> {
    let labels = [("vm".into(), name.to_owned().into())];
    let mut registry = Registry::with_prefix_and_labels("gantry", labels.into_iter());
    if let Some((info, counters)) = vm {
        register_vm(&mut registry, info);
        register_devices(&mut registry, &info.devices, counters);
    }
    let api = registry.sub_registry_with_prefix("api");
    api.register(
        "requests",
        "Requests answered",
        api_metrics.requests.clone(),
    );
    api.register(
        "connections",
        "Connections that are open",
        api_metrics.connections.clone(),
    );
    api.register(
        "connections_turned_away",
        "Connections beyond the limit",
        api_metrics.turned_away.clone(),
    );
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn register_vm(registry: &mut Registry, info: &VmInfo) {
    let states = Family::<State, Gauge>::default();
    for (state, word) in [
        (VmState::Created, "created"),
        (VmState::Running, "running"),
        (VmState::Paused, "paused"),
        (VmState::Shutdown, "shutdown"),
    ] {
        let state = i64::from(state == info.state);
        states.get_or_create(&State { state: word }).set(state);
    }
    registry.register("vm_state", "1 for the state that the VM has", states);
    let numbers = [
        (
            "vm_vcpus",
            "Processors of the guest",
            u64::from(info.config.vcpus.get()),
        ),
        (
            "vm_memory_bytes",
            "RAM of the guest",
            info.config.memory.bytes(),
        ),
        ("vm_devices", "Devices in slots", info.devices.len() as u64),
        ("vm_slots", "Slots for devices", info.slots as u64),
        (
            "vm_slots_free",
            "Slots without a device",
            info.free_slots as u64,
        ),
    ];
    for (name, help, value) in numbers {
        let gauge: Gauge = Gauge::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    }
}

fn register_devices(registry: &mut Registry, infos: &[DeviceInfo], devices: &[DeviceCounters]) {
    let interrupts = Family::<Vector, Counter>::default();
    let reads = Family::<Region, Counter>::default();
    let writes = Family::<Region, Counter>::default();
    let mapped = Family::<Device, Gauge>::default();
    let resets = Family::<Device, Counter>::default();
    let errors = Family::<Device, Counter>::default();
    let virtio = Family::<Virtio, Gauge>::default();
    let steps = Family::<Step, Gauge<f64, std::sync::atomic::AtomicU64>>::default();
    for counters in devices {
        let group = infos.iter().find(|info| info.id == counters.id);
        let group = group.and_then(|info| info.kind.passed()?.group.clone());
        let device = Device {
            device: counters.id.clone(),
            host: counters.bdf.clone(),
            group: group.unwrap_or_default(),
        };
        for (&vector, &count) in &counters.interrupts {
            let device = device.clone();
            interrupts
                .get_or_create(&Vector { device, vector })
                .inc_by(count);
        }
        for (family, counts) in [
            (&reads, &counters.trapped_reads),
            (&writes, &counters.trapped_writes),
        ] {
            for (region, &count) in counts {
                let (device, region) = (device.clone(), region.to_string());
                family
                    .get_or_create(&Region { device, region })
                    .inc_by(count);
            }
        }
        for (what, count) in &counters.requests {
            let device = device.clone();
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            virtio.get_or_create(&Virtio { device, what }).set(count);
        }
        for (step, took) in &counters.attach {
            let (device, step) = (device.clone(), (*step).to_owned());
            steps
                .get_or_create(&Step { device, step })
                .set(took.as_secs_f64());
        }
        let bytes = i64::try_from(counters.bytes_mapped).unwrap_or(i64::MAX);
        mapped.get_or_create(&device).set(bytes);
        resets.get_or_create(&device).inc_by(counters.resets);
        errors.get_or_create(&device).inc_by(counters.errors);
    }
    let registry = registry.sub_registry_with_prefix("device");
    registry.register("interrupts", "Interrupts to the guest", interrupts);
    registry.register("trapped_reads", "Guest reads that gantry answered", reads);
    registry.register(
        "trapped_writes",
        "Guest writes that gantry answered",
        writes,
    );
    registry.register("mapped_bytes", "Bytes of BARs mapped for the guest", mapped);
    registry.register("resets", "Resets", resets);
    registry.register("errors", "Errors of the device or the host", errors);
    registry.register(
        "virtio",
        "What a virtio device did: requests and bytes; io_uring is 1 where requests are done side by side",
        virtio,
    );
    let help = "Time that each step of the attach took";
    registry.register_with_unit("attach_step", help, Unit::Seconds, steps);
}
