//! One device attached to a running guest and detached, and what its VMM's API costs.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::api::Client;
use super::vmm::Vmm;
use super::{IDLE, PATIENCE, ms, now};

/// The guest prints this when it waits for a disk, ...
const WATCHES: &str = "guest: watches";
/// ... and this when the disk's driver is ready.
const DRIVER: &str = "guest: driver";
/// Whatever a VMM does in the background after a boot is done by then.
const SETTLED: Duration = Duration::from_secs(5);
/// How often a latency is taken.
const TIMES: usize = 200;
/// Clients that ask at the same time, under load.
const OTHERS: usize = 4;
/// How long each of them waits between two requests.
const PAUSE: Duration = Duration::from_millis(10);

/// From a request to a device in use, and back.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Attach {
    /// From the request to its answer, ms.
    pub reply: f64,
    /// From the request to the guest's driver being ready, ms.
    pub driver: f64,
    /// From the request to take it away to the host having it back, ms.
    pub gone: f64,
    /// What the processes beside the VMM's own take, MiB.
    pub helpers: f64,
    /// Median time of `vm.info`, ms.
    pub info: f64,
    /// The same while others ask, ms.
    pub info_loaded: f64,
}

/// Attaches the device at `path` and detaches it, once the guest has booted and is idle.
pub fn attach(argv: &[String], socket: &str, path: &str) -> Result<Attach> {
    let _ = fs::remove_file(socket);
    let mut vmm = Vmm::start(argv)?;
    vmm.wait_for(WATCHES, PATIENCE)?;
    thread::sleep(SETTLED);
    let mut client = Client::connect(socket)?;
    // The first answer of a process takes longer than the others.
    client.get("vm.info")?;
    let asked = now()?;
    let added = client.put("vm.add-device", &json!({ "path": path }))?;
    let reply = now()?;
    let driver = vmm.wait_for(DRIVER, PATIENCE)?;
    let (info, info_loaded) = (latency(socket)?, latency_under_load(socket)?);
    let helpers = vmm.helpers_memory()? as f64 / 1024.0;
    let id = added["id"].as_str().context("the device has no name")?;
    let node = node(path)?;
    ensure!(File::open(&node).is_err(), "nobody holds {node}");
    let removed = now()?;
    client.put("vm.remove-device", &json!({ "id": id }))?;
    let gone = given_back(&node)?;
    vmm.end()?;
    Ok(Attach {
        reply: ms(reply.saturating_sub(asked)),
        driver: ms(driver.saturating_sub(asked)),
        gone: ms(gone.saturating_sub(removed)),
        helpers,
        info,
        info_loaded,
    })
}

/// PSS of the VMM and its children without the guest's RAM, MiB: if there is a socket, after clients
/// have asked for something.
pub fn memory(argv: &[String], socket: Option<&str>, ram_mib: u64) -> Result<f64> {
    if let Some(socket) = socket {
        let _ = fs::remove_file(socket);
    }
    let mut vmm = Vmm::start(argv)?;
    vmm.wait_for(WATCHES, PATIENCE)?;
    if let Some(socket) = socket {
        latency_under_load(socket)?;
    }
    thread::sleep(IDLE);
    let memory = vmm.memory_beyond(ram_mib << 10)?;
    vmm.end()?;
    Ok(memory as f64 / 1024.0)
}

/// The node of a device's IOMMU group, which one process at a time can open.
fn node(path: &str) -> Result<String> {
    let group = fs::read_link(Path::new(path).join("iommu_group"));
    let group = group.with_context(|| format!("{path} is in no IOMMU group"))?;
    let number = group.file_name().context("the group has no number")?;
    Ok(format!("/dev/vfio/{}", number.to_string_lossy()))
}

/// Waits until nobody holds the group; when that was.
fn given_back(node: &str) -> Result<Duration> {
    let deadline = now()? + PATIENCE;
    loop {
        if File::options().read(true).write(true).open(node).is_ok() {
            return now();
        }
        ensure!(now()? < deadline, "the device is never given back");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The median of many times of `vm.info`, ms.
fn latency(socket: &str) -> Result<f64> {
    let mut client = Client::connect(socket)?;
    let mut times = Vec::with_capacity(TIMES);
    for _ in 0..TIMES {
        let asked = now()?;
        client.get("vm.info")?;
        times.push(ms(now()?.saturating_sub(asked)));
    }
    times.sort_by(f64::total_cmp);
    times.get(TIMES / 2).copied().context("no times")
}

fn latency_under_load(socket: &str) -> Result<f64> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let ask = || -> Result<()> {
            let mut client = Client::connect(socket)?;
            while !over.load(Ordering::Relaxed) {
                client.get("vm.info")?;
                thread::sleep(PAUSE);
            }
            Ok(())
        };
        let others: Vec<_> = (0..OTHERS).map(|_| scope.spawn(ask)).collect();
        let median = latency(socket);
        over.store(true, Ordering::Relaxed);
        for other in others {
            other
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        median
    })
}
