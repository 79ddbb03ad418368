//! Rounds on the host and in the guest, one after the other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gantry_resources::base::HostPaths;
use gantry_resources::holding::{Holder, announce};
use gantry_resources::inventory::{Allow, scan};
use gantry_resources::pools::DeviceRequest;
use gantry_vmm::{MeasuredDevices, measure};
use indicatif::{ProgressBar, ProgressStyle};

use super::facts;
use super::guest::ids;
use super::model::{Access, Device, FORMAT, Kind, Lacking, Report, Results, Side};
use super::vm::Payload;
use crate::report::{Failure, USAGE};

/// The shortest that a test takes.
const SHORTEST: Duration = Duration::from_millis(5);

/// What is to be measured, and how.
pub struct Job {
    /// The devices.
    pub requests: Vec<DeviceRequest>,
    /// What they must be.
    pub kind: Option<Kind>,
    /// How long all tests take together.
    pub time: Duration,
    /// How often each side is measured.
    pub rounds: u32,
    /// The guest's kernel; the host's own if absent.
    pub kernel: Option<PathBuf>,
    /// The directory of its modules; the host's own if absent.
    pub modules: Option<PathBuf>,
    /// Options of gantry itself, for the VM.
    pub arguments: Vec<String>,
}

/// Measures the devices. They are leased anew for each round, as the guest is a VM like any other.
///
/// # Errors
/// A device is unavailable or of another kind, or the guest does not run.
pub fn run(job: &Job, paths: &HostPaths) -> Result<Results, Failure> {
    let release = facts::kernel(paths);
    let or = |path: &Option<PathBuf>, usual: String| path.clone().unwrap_or_else(|| usual.into());
    let kernel = or(&job.kernel, format!("/boot/vmlinuz-{release}"));
    let payload = Payload::new(
        &kernel,
        &or(&job.modules, format!("/lib/modules/{release}")),
    )?;
    let holder = Holder {
        vm: "bench".to_owned(),
        pid: std::process::id(),
    };
    let _running = announce(paths, &holder);
    let first = MeasuredDevices::acquire(paths, &job.requests, &holder)?;
    let mut rounds = Rounds::new(job, paths, &kernel, &first)?;
    rounds.on_host(&first)?;
    drop(first);
    rounds.in_guest(job, &payload)?;
    for round in 1..job.rounds {
        // What goes first may find the host warmer or cooler: each side does in turn.
        let on_host = |rounds: &mut Rounds| -> Result<(), Failure> {
            rounds.on_host(&MeasuredDevices::acquire(paths, &rounds.requests, &holder)?)
        };
        if round % 2 == 0 {
            on_host(&mut rounds)?;
            rounds.in_guest(job, &payload)?;
        } else {
            rounds.in_guest(job, &payload)?;
            on_host(&mut rounds)?;
        }
    }
    rounds.progress.finish_and_clear();
    Ok(rounds.results)
}

/// What the rounds have found so far, and what the next one needs.
struct Rounds {
    results: Results,
    /// The devices that the first round got.
    requests: Vec<DeviceRequest>,
    per_test: Duration,
    progress: ProgressBar,
}

impl Rounds {
    /// Before the first round.
    fn new(
        job: &Job,
        paths: &HostPaths,
        kernel: &Path,
        devices: &MeasuredDevices,
    ) -> Result<Self, Failure> {
        let names: Vec<&str> = devices.names().collect();
        let kinds = devices.kinds()?;
        check_kinds(job.kind, &names, &kinds)?;
        let tests: u32 = kinds.iter().map(|kind| measure::tests_of(*kind)).sum();
        let slots = (tests * job.rounds * 2).max(1);
        let per_test = (job.time / slots).max(SHORTEST);
        let known: BTreeMap<String, Option<&str>> = scan(paths)?
            .iter()
            .map(|device| (device.bdf.to_string(), device.device_name()))
            .collect();
        let described = names.iter().zip(&kinds).map(|(name, kind)| Device {
            address: (*name).to_owned(),
            ids: ids(&paths.sysfs, name),
            name: known.get(*name).copied().flatten().map(str::to_owned),
            kind: (*kind).into(),
            tests: Vec::new(),
            lacking: Vec::new(),
        });
        let described: Vec<Device> = described.collect();
        let all_ids: Vec<String> = described.iter().map(|device| device.ids.clone()).collect();
        let exact = names.iter().map(|name| exactly(name, &job.requests));
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            requests: exact.collect::<Result<_, _>>()?,
            results: Results {
                format: FORMAT,
                gantry: env!("CARGO_PKG_VERSION").to_owned(),
                begun: now.unwrap_or_default().as_secs(),
                rounds: job.rounds,
                per_test_ms: per_test.as_millis() as u64,
                host: facts::host(paths, kernel, &all_ids),
                devices: described,
            },
            per_test,
            progress: progress(u64::from(slots)),
        })
    }

    fn on_host(&mut self, devices: &MeasuredDevices) -> Result<(), Failure> {
        self.progress.set_message("host");
        let per_test = self.per_test;
        devices.measure(per_test, &mut |index, report| {
            self.take(Side::Host, Report::new(index, report));
        })?;
        Ok(())
    }

    fn in_guest(&mut self, job: &Job, payload: &Payload<'_>) -> Result<(), Failure> {
        self.progress.set_message("guest");
        let (requests, per_test) = (self.requests.clone(), self.per_test);
        let mut found = None;
        payload.measure(
            &job.arguments,
            &requests,
            per_test,
            &mut |report| match report {
                Report::Guest { ids, vfio } => found = Some((ids, vfio)),
                report => self.take(Side::Guest, report),
            },
        )?;
        let (found, vfio) = found.unwrap_or_default();
        self.results.host.guest_access = Some(if vfio { Access::Vfio } else { Access::Sysfs });
        let expected: Vec<&str> = self
            .results
            .devices
            .iter()
            .map(|device| &*device.ids)
            .collect();
        match found == expected {
            true => Ok(()),
            false => Err(Failure::host(format!(
                "the guest has other devices than the host gave it: {}, not {}",
                found.join(", "),
                expected.join(", ")
            ))),
        }
    }

    fn take(&mut self, side: Side, report: Report) {
        let devices = &mut self.results.devices;
        match report {
            Report::Round(index, test, unit, round) => {
                if let Some(device) = devices.get_mut(index) {
                    device.add(side, test, unit, round);
                }
                self.progress.inc(1);
            }
            Report::Lacking(index, test, why) => {
                if let Some(device) = devices.get_mut(index) {
                    device.lacks(Lacking { side, test, why });
                }
            }
            Report::Guest { .. } | Report::Failed(_) | Report::Done => {}
        }
    }
}

/// A request for a device that the first round got.
fn exactly(name: &str, requests: &[DeviceRequest]) -> Result<DeviceRequest, Failure> {
    let device = name
        .parse::<gantry_resources::base::DeviceName>()
        .map_err(Failure::host)?;
    // All requests of one command have the same terms.
    let first = requests.first();
    Ok(DeviceRequest {
        allow: first.map_or(Allow::default(), |first| first.allow),
        allow_ungrouped: first.is_some_and(|first| first.allow_ungrouped),
        ..DeviceRequest::device(device)
    })
}

fn check_kinds(
    wanted: Option<Kind>,
    names: &[&str],
    kinds: &[measure::Kind],
) -> Result<(), Failure> {
    let Some(wanted) = wanted.filter(|wanted| *wanted != Kind::Any) else {
        return Ok(());
    };
    let mut others = names.iter().zip(kinds);
    match others.find(|(_, kind)| Kind::from(**kind) != wanted) {
        None => Ok(()),
        Some((name, kind)) => {
            let kind = Kind::from(*kind).words();
            let what = format!("{name} is not {}: it is {kind}", wanted.words());
            Err(Failure::new(USAGE, what).help("--kind any measures whatever it is"))
        }
    }
}

/// Shown on a terminal only.
fn progress(tests: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} tests, {msg}, {eta} left");
    let bar = ProgressBar::new(tests);
    match style {
        Ok(style) => bar.with_style(style),
        // The template is wrong; the bar is there all the same.
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_another_kind_is_refused_by_name() {
        let kinds = [measure::Kind::Nvme, measure::Kind::Edu];
        let names = ["0000:01:00.0", "0000:02:00.0"];
        let refused = check_kinds(Some(Kind::Nvme), &names, &kinds).unwrap_err();
        assert_eq!(refused.exit, USAGE);
        assert_eq!(
            refused.to_string(),
            "0000:02:00.0 is not an NVMe controller: it is a device of another kind"
        );
        assert!(check_kinds(Some(Kind::Any), &names, &kinds).is_ok());
        assert!(check_kinds(None, &names, &kinds).is_ok());
    }
}
