//! The results of `gantry bench`, as JSON has them.

use gantry_vmm::measure::{self, Samples};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

use super::stats::{self, Ratio};

/// The number of this form of the results; it changes when old readers would misread new results.
pub const FORMAT: u32 = 1;

/// What a `gantry bench run` found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "Results of gantry bench run")]
pub struct Results {
    /// Number of the form of this document: 1.
    pub format: u32,
    /// Version of gantry.
    pub gantry: String,
    /// When it began, in seconds since 1970.
    pub begun: u64,
    /// How often the devices were measured on each side.
    pub rounds: u32,
    /// Milliseconds of each test in each round.
    pub per_test_ms: u64,
    /// The host that it ran on.
    pub host: Host,
    /// The devices, in the order in which the guest had them.
    pub devices: Vec<Device>,
}

/// Facts of a host that figures depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its kernel, as `uname -r` says.
    pub kernel: String,
    /// Model of its processors.
    pub cpu: String,
    /// How many processors it has.
    pub cpus: u32,
    /// What it is simulated by, if it is: its figures then say nothing of hardware.
    pub simulated: Option<String>,
    /// The guest's kernel: its file.
    pub guest_kernel: String,
    /// How the guest reaches the devices.
    pub guest_access: Option<Access>,
}

/// How a guest reaches a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Through VFIO, as the host does.
    Vfio,
    /// Through sysfs: its kernel has no VFIO without an IOMMU. There are no interrupts then.
    Sysfs,
}

/// What is known of a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Device {
    /// Address on the host.
    pub address: String,
    /// Vendor and device ids.
    pub ids: String,
    /// Name by the ids, if it is known.
    pub name: Option<String>,
    /// What it is to its tests.
    pub kind: Kind,
    /// What was measured.
    pub tests: Vec<Test>,
    /// What was not measured, and why.
    pub lacking: Vec<Lacking>,
}

/// What a device is, to its tests.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An NVMe controller
    Nvme,
    /// A network controller
    Nic,
    /// A display controller or accelerator
    Gpu,
    /// Whatever it is
    Any,
}

impl From<measure::Kind> for Kind {
    fn from(kind: measure::Kind) -> Self {
        match kind {
            measure::Kind::Nvme => Self::Nvme,
            measure::Kind::Nic => Self::Nic,
            measure::Kind::Gpu => Self::Gpu,
            measure::Kind::Edu | measure::Kind::Other => Self::Any,
        }
    }
}

impl Kind {
    /// What it is, in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Nvme => "an NVMe controller",
            Self::Nic => "a network controller",
            Self::Gpu => "a display controller or accelerator",
            Self::Any => "a device of another kind",
        }
    }
}

/// A test of a device, on both sides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Test {
    /// What was measured.
    pub test: String,
    /// Unit of the figures.
    pub unit: Unit,
    /// The rounds on the host.
    pub host: Vec<Round>,
    /// The rounds in the guest.
    pub guest: Vec<Round>,
    /// The guest's median divided by the host's.
    pub ratio: Option<Ratio>,
}

/// Unit of figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Nanoseconds of one operation; less is better.
    Nanoseconds,
    /// Operations in a second; more is better.
    PerSecond,
    /// Bytes in a second; more is better.
    BytesPerSecond,
}

impl From<measure::Unit> for Unit {
    fn from(unit: measure::Unit) -> Self {
        match unit {
            measure::Unit::Nanoseconds => Self::Nanoseconds,
            measure::Unit::PerSecond => Self::PerSecond,
            measure::Unit::BytesPerSecond => Self::BytesPerSecond,
        }
    }
}

/// One round of a test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Round {
    /// How many samples were taken.
    pub samples: u64,
    /// Their mean.
    pub mean: f64,
    /// Their median.
    pub p50: f64,
    /// 99% of them are below.
    pub p99: f64,
    /// 99.9% of them are below.
    pub p999: f64,
    /// Their distribution: at each share of them, the value below which so many are.
    pub curve: Vec<Point>,
}

/// A point of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Point {
    /// Share of the samples, 0 to 1.
    pub share: f64,
    /// The value below which they are.
    pub value: f64,
}

/// The medians of rounds.
pub fn medians(rounds: &[Round]) -> Vec<f64> {
    rounds.iter().map(|round| round.p50).collect()
}

/// Shares at which a distribution is kept.
pub const SHARES: [f64; 13] = [
    0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0,
];

impl From<&Samples> for Round {
    fn from(samples: &Samples) -> Self {
        let point = |share| Point {
            share,
            value: samples.quantile(share),
        };
        Self {
            samples: samples.count() as u64,
            mean: samples.mean(),
            p50: samples.quantile(0.5),
            p99: samples.quantile(0.99),
            p999: samples.quantile(0.999),
            curve: SHARES.map(point).to_vec(),
        }
    }
}

/// What was not measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Lacking {
    /// Where it was not.
    pub side: Side,
    /// The test.
    pub test: String,
    /// Why.
    pub why: String,
}

/// Where a figure comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The host, through VFIO.
    Host,
    /// The guest.
    Guest,
}

/// What a test reported, as it comes from the guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// A round of a test of the device with this index.
    Round(usize, String, Unit, Round),
    /// A test of the device with this index that there is not, and why.
    Lacking(usize, String, String),
    /// What the guest has.
    Guest {
        /// Vendor and device ids of the devices that are measured.
        ids: Vec<String>,
        /// Whether it reaches them through VFIO.
        vfio: bool,
    },
    /// The guest cannot measure.
    Failed(String),
    /// All is measured.
    Done,
}

impl Report {
    /// What the device with this index reported.
    pub fn new(index: usize, report: measure::Report) -> Self {
        match report {
            measure::Report::Figure(figure) => {
                let round = Round::from(&figure.samples);
                Self::Round(index, figure.test, figure.unit.into(), round)
            }
            measure::Report::Lacking { test, why } => Self::Lacking(index, test, why),
        }
    }
}

impl Device {
    /// Takes in a round of a test.
    pub fn add(&mut self, side: Side, test: String, unit: Unit, round: Round) {
        let known = self.tests.iter().position(|known| known.test == test);
        let at = known.unwrap_or_else(|| {
            self.tests.push(Test {
                test,
                unit,
                host: Vec::new(),
                guest: Vec::new(),
                ratio: None,
            });
            self.tests.len() - 1
        });
        if let Some(test) = self.tests.get_mut(at) {
            match side {
                Side::Host => test.host.push(round),
                Side::Guest => test.guest.push(round),
            }
            test.ratio = stats::ratio(&medians(&test.guest), &medians(&test.host));
        }
    }

    /// Takes in what it lacks, once.
    pub fn lacks(&mut self, lacking: Lacking) {
        if !self.lacking.contains(&lacking) {
            self.lacking.push(lacking);
        }
    }
}

/// The JSON Schema of results.
pub fn schema() -> Schema {
    schema_for!(Results)
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::example;
    use super::*;

    #[test]
    fn results_are_read_as_they_were_written_and_the_schema_has_all_their_keys() {
        let results = example([2000.0, 2002.0]);
        let text = serde_json::to_string(&results).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&text).unwrap(), results);
        let schema = serde_json::to_value(schema()).unwrap();
        let written: serde_json::Value = serde_json::from_str(&text).unwrap();
        let keys = |value: &serde_json::Value| -> Vec<String> {
            let keys = value.as_object().into_iter().flatten();
            keys.map(|(key, _)| key.clone()).collect()
        };
        assert_eq!(keys(&schema["properties"]), keys(&written));
        let device = &schema["$defs"]["Device"]["properties"];
        assert_eq!(keys(device), keys(&written["devices"][0]));
        let test = &schema["$defs"]["Test"]["properties"];
        assert_eq!(keys(test), keys(&written["devices"][0]["tests"][0]));
    }

    #[test]
    fn a_report_survives_the_console() {
        let report = Report::Lacking(1, "reset".to_owned(), "it has none".to_owned());
        let text = serde_json::to_string(&report).unwrap();
        assert!(!text.contains('\n'));
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
