//! Service plans: processors, memory and devices under a name, kept on the host.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

use crate::base::config::{self, ConfigError};
use crate::base::host::HostPaths;
use crate::base::json::{JsonError, ListItem, Place, near_or_list, nearest};
use crate::base::name::read_name;
use crate::base::size::ByteSize;
use crate::holding::host_lock::{ALLOCATION_DEADLINE, AllocationLock, LeaseError};
use crate::holding::record::LeaseRecord;
use crate::pools::request::{Aliases, DeviceRequest, DeviceSource};

/// The parts of a VM's configuration that its own file leaves out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The name: letters, digits, `.`, `_`, `-`; at most 64.
    #[serde(deserialize_with = "plan_name")]
    #[schemars(extend("pattern" = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"))]
    pub name: String,
    /// A description.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Number of processors.
    #[serde(
        default,
        deserialize_with = "vcpus",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(range(min = 1, max = 254))]
    pub vcpus: Option<u64>,
    /// Size of the RAM: a number of bytes, or a string such as "4GiB".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// Devices, as in a VM's file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceRequest>,
    /// Devices by aliases with counts: "gpu:1, qat-c62x-vf:2".
    #[serde(
        default,
        rename = "pci_passthrough:alias",
        skip_serializing_if = "Option::is_none"
    )]
    pub aliases: Option<Aliases>,
    /// The file that defines the plan.
    #[serde(skip)]
    pub file: PathBuf,
}

/// Reads a number of vCPUs that a VM can have.
fn vcpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let vcpus = Option::<u64>::deserialize(deserializer)?;
    match vcpus.filter(|vcpus| !(1..=254).contains(vcpus)) {
        None => Ok(vcpus),
        Some(wrong) => Err(serde::de::Error::custom(format!(
            "a VM cannot have {wrong} vCPUs: use 1 to 254"
        ))),
    }
}

fn plan_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    read_name("a plan", deserializer)
}

impl Plan {
    /// An empty plan.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            description: String::new(),
            vcpus: None,
            memory: None,
            devices: Vec::new(),
            aliases: None,
            file: PathBuf::new(),
        }
    }

    /// The groups that it names.
    pub fn groups(&self) -> impl Iterator<Item = &str> {
        self.devices
            .iter()
            .filter_map(|request| match &request.from {
                DeviceSource::Group(name) => Some(name.as_str()),
                DeviceSource::Alias(_) | DeviceSource::Device(_) => None,
            })
    }

    /// All devices of the plan.
    pub fn requests(&self) -> Vec<DeviceRequest> {
        let aliases = self.aliases.iter().flat_map(|Aliases(requests)| requests);
        self.devices.iter().chain(aliases).cloned().collect()
    }
}

/// A file of plans: `plans.json` and each `plans.d/*.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "gantry service plans")]
struct PlansFile {
    /// For editors; gantry does not read it.
    #[serde(rename = "$schema", skip_serializing_if = "Option::is_none")]
    schema: Option<String>,
    /// The plans.
    plans: Vec<Plan>,
}

/// All plans of the host.
#[derive(Clone, Debug, Default)]
pub struct Plans {
    plans: Vec<Plan>,
}

/// A plan is wrong, or cannot be used.
#[derive(Debug, Error)]
pub enum PlanError {
    /// A file is wrong, or cannot be read or written.
    #[error(transparent)]
    File(#[from] ConfigError),
    /// The lock cannot be had.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// There is no such plan.
    #[error("there is no plan \"{name}\"{}", near_or_list(.near, "gantry plan list"))]
    Unknown {
        /// The name.
        name: String,
        /// The most similar name.
        near: Option<String>,
    },
    /// A plan of that name exists already.
    #[error(
        "there is already a plan named \"{name}\" at {at}: `gantry plan edit {name}` changes it"
    )]
    Exists {
        /// The name.
        name: String,
        /// Where it is.
        at: Place,
    },
}

impl From<JsonError> for PlanError {
    fn from(error: JsonError) -> Self {
        Self::File(error.into())
    }
}

impl PlanError {
    /// Whether a definition or a name is wrong, rather than a file unusable.
    pub fn is_mistake(&self) -> bool {
        match self {
            Self::File(error) => error.is_mistake(),
            Self::Unknown { .. } => true,
            Self::Lease(_) | Self::Exists { .. } => false,
        }
    }
}

fn item(plan: &Plan) -> ListItem<'_> {
    ListItem {
        list: "plans",
        name: &plan.name,
    }
}

impl Plans {
    /// Reads `plans.json`, then `plans.d/*.json` in the order of their names. None need exist.
    pub fn load(paths: &HostPaths) -> Result<Self, PlanError> {
        let mut plans = Self::default();
        for path in config::files(&paths.config, "plans")? {
            plans.add(path.clone(), read(&path)?)?;
        }
        Ok(plans)
    }

    fn add(&mut self, path: PathBuf, file: PlansFile) -> Result<(), PlanError> {
        for mut plan in file.plans {
            plan.file = path.clone();
            let same = self.plans.iter().find(|other| other.name == plan.name);
            if let Some(first) = same {
                let list = item(&plan);
                let first = Place::first(&first.file, list, "name");
                let second = Place::last(&path, list, "name");
                let what = format!(
                    "`name`: there is already a plan named \"{}\" at {first}: rename or remove one of them",
                    plan.name
                );
                return Err(JsonError::new(Some(second), what).into());
            }
            self.plans.push(plan);
        }
        Ok(())
    }

    /// The plans in the order of definition.
    pub fn iter(&self) -> impl Iterator<Item = &Plan> {
        self.plans.iter()
    }

    /// The plan of that name, or an error that names the most similar one.
    pub fn find(&self, name: &str) -> Result<&Plan, PlanError> {
        let plan = self.plans.iter().find(|plan| plan.name == name);
        plan.ok_or_else(|| {
            let names = self.plans.iter().map(|plan| plan.name.as_str());
            PlanError::Unknown {
                name: name.to_owned(),
                near: nearest(name, names).map(str::to_owned),
            }
        })
    }

    /// The JSON Schema of a plan file.
    pub fn schema() -> schemars::Schema {
        schemars::schema_for!(PlansFile)
    }
}

/// Adds a plan to `plans.json`. Returns the file.
pub fn create_plan(paths: &HostPaths, plan: Plan) -> Result<PathBuf, PlanError> {
    let path = paths.config.join("plans.json");
    let _choosing = lock(paths)?;
    let plans = Plans::load(paths)?;
    if let Some(first) = plans.iter().find(|other| other.name == plan.name) {
        return Err(PlanError::Exists {
            at: Place::first(&first.file, item(first), "name"),
            name: plan.name,
        });
    }
    let mut file = read(&path)?;
    file.plans.push(plan);
    write(path, &file)
}

/// Changes a plan in the file that defines it, but for its name. Returns the file. VMs that run are not
/// touched.
pub fn change_plan(
    paths: &HostPaths,
    name: &str,
    change: impl FnOnce(&mut Plan),
) -> Result<PathBuf, PlanError> {
    let _choosing = lock(paths)?;
    let path = Plans::load(paths)?.find(name)?.file.clone();
    let mut file = read(&path)?;
    if let Some(plan) = file.plans.iter_mut().find(|plan| plan.name == name) {
        change(plan);
        plan.name = name.to_owned();
    }
    write(path, &file)
}

/// Writes a file, after checking that plans can be read from it.
fn write(path: PathBuf, file: &PlansFile) -> Result<PathBuf, PlanError> {
    Plans::default().add(path.clone(), file.clone())?;
    config::write(&path, file)?;
    Ok(path)
}

/// Removes a plan from the file that defines it. Returns the file. VMs that run are not touched.
pub fn delete_plan(paths: &HostPaths, name: &str) -> Result<PathBuf, PlanError> {
    let _choosing = lock(paths)?;
    let path = Plans::load(paths)?.find(name)?.file.clone();
    let mut file = read(&path)?;
    file.plans.retain(|plan| plan.name != name);
    write(path, &file)
}

fn lock(paths: &HostPaths) -> Result<AllocationLock, LeaseError> {
    let record = LeaseRecord::task("gantry plan");
    AllocationLock::acquire(paths, &record, ALLOCATION_DEADLINE)
}

fn read(path: &std::path::Path) -> Result<PlansFile, ConfigError> {
    match config::read(path)? {
        Some(text) => config::parse(path, &text),
        None => Ok(PlansFile::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::FakeHost;

    fn plan(text: &str) -> Plan {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn plans_are_made_read_and_deleted() {
        let host = FakeHost::new(&[]);
        host.file(
            "etc/plans.d/a.json",
            r#"{"plans": [{"name": "small", "vcpus": 1, "memory": 536870912}]}"#,
        );
        let gpu2 = plan(
            r#"{"name": "gpu2", "vcpus": 4, "memory": "8GiB", "devices": [{"group": "gpus", "count": 2}],
                "pci_passthrough:alias": "qat-vf:1"}"#,
        );
        create_plan(&host.paths, gpu2).unwrap();
        let plans = Plans::load(&host.paths).unwrap();
        let names: Vec<_> = plans.iter().map(|plan| plan.name.as_str()).collect();
        assert_eq!(names, ["gpu2", "small"]);
        assert_eq!(plans.find("gpu2").unwrap().requests().len(), 2);
        let file = delete_plan(&host.paths, "small").unwrap();
        assert!(file.ends_with("plans.d/a.json"));
        let error = delete_plan(&host.paths, "gpu").unwrap_err().to_string();
        assert!(error.contains("did you mean \"gpu2\"?"), "{error}");
    }

    #[test]
    fn wrong_plans_are_refused_with_their_place() {
        for (text, said) in [
            (
                r#"{"plans": [{"name": "a b"}]}"#,
                "plans.json:1:21: `plans[0].name`: \"a b\" cannot",
            ),
            (
                r#"{"plans": [{"name": "a", "vcpu": 1}]}"#,
                "did you mean `vcpus`?",
            ),
            (
                r#"{"plans": [{"name": "a"}, {"name": "a"}]}"#,
                "plans.json:1:36: `name`: there is already a plan named \"a\" at",
            ),
            (
                r#"{"plans": [{"name": "a", "vcpus": 255}]}"#,
                "plans.json:1:35: `plans[0].vcpus`: a VM cannot have 255 vCPUs: use 1 to 254",
            ),
            (
                r#"{"plans": [{"name": "a", "memory": "4GB"}]}"#,
                "plans.json:1:36: `plans[0].memory`: \"4GB\" is no size: did you mean \"4G\"?",
            ),
            (
                r#"{"plans": [{"name": "a", "devices": [{}]}]}"#,
                "plans.json:1:38: `plans[0].devices[0]`: it has neither",
            ),
            (
                r#"{"plans": [{"name": "a", "pci_passthrough:alias": "x:"}]}"#,
                "plans.json:1:51: `plans[0].pci_passthrough:alias`: \"x:\" is not an alias",
            ),
        ] {
            let host = FakeHost::new(&[]);
            host.file("etc/plans.json", text);
            let error = Plans::load(&host.paths).unwrap_err().to_string();
            assert!(
                error.contains(said) && error.contains("plans.json"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_plan_is_changed_where_it_is() {
        let host = FakeHost::new(&[]);
        let text = r#"{"plans": [{"name": "a", "vcpus": 1}, {"name": "b"}]}"#;
        host.file("etc/plans.d/a.json", text);
        let larger = |plan: &mut Plan| {
            plan.vcpus = Some(8);
            plan.name = "c".to_owned();
        };
        let file = change_plan(&host.paths, "a", larger).unwrap();
        assert!(file.ends_with("plans.d/a.json"));
        let plans = Plans::load(&host.paths).unwrap();
        assert_eq!(plans.find("a").unwrap().vcpus, Some(8));
        let wrong = |plan: &mut Plan| plan.aliases = Some(Aliases(Vec::new()));
        change_plan(&host.paths, "b", wrong).unwrap_err();
        assert_eq!(Plans::load(&host.paths).unwrap().iter().count(), 2);
    }

    #[test]
    fn a_plan_that_is_there_is_not_made_again() {
        let host = FakeHost::new(&[]);
        create_plan(&host.paths, plan(r#"{"name": "a"}"#)).unwrap();
        let before = std::fs::read(host.paths.config.join("plans.json")).unwrap();
        let again = create_plan(&host.paths, plan(r#"{"name": "a", "vcpus": 2}"#)).unwrap_err();
        let again = again.to_string();
        assert!(
            again.contains("plans.json:") && again.contains("plan edit a"),
            "{again}"
        );
        assert_eq!(
            std::fs::read(host.paths.config.join("plans.json")).unwrap(),
            before
        );
    }
}
