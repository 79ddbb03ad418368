//! Running VMs, found by their sockets.

use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_resources::base::HostPaths;
use gantry_resources::holding::{RunningVm, running_vms};
use gantry_resources::pools::Tenants;

use crate::http::client::{Client, ClientError};
use crate::http::wire::VmmPing;
use crate::http::{path_of, remove_stale};
use crate::report::Failure;

/// How long a command waits for an answer: longer than the server takes at most.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(130);
/// How many VMs are asked at a time.
const AT_A_TIME: usize = 64;

/// How long a list waits for each VM.
pub const LIST_TIMEOUT: Duration = Duration::from_secs(2);

/// The VM of that name, or behind that socket.
pub fn vm(name: &str, paths: &HostPaths) -> Result<Client, Failure> {
    let path = if name.contains('/') {
        PathBuf::from(name)
    } else {
        path_of(&paths.run, name)
    };
    // This only looks for a listener: a guest's state may take longer.
    match connect(&path, LIST_TIMEOUT)?.get::<VmmPing>("vmm.ping") {
        Err(ClientError::NotListening { .. }) => Err(unknown(name, paths)),
        Err(error) => Err(error.into()),
        Ok(_) => connect(&path, REQUEST_TIMEOUT),
    }
}

pub fn connect(path: &Path, patience: Duration) -> Result<Client, Failure> {
    Client::new(path, patience)
        .map_err(|error| Failure::host(format!("cannot make a connection: {error}")))
}

fn unknown(name: &str, paths: &HostPaths) -> Failure {
    let mut running = running_vms(paths).unwrap_or_default().into_iter();
    if let Some(vm) = running.find(|vm| vm.record.name == name) {
        return unreachable_vm(&vm, paths);
    }
    let names: Vec<String> = sockets(paths).into_iter().map(|(name, _)| name).collect();
    let help = match names.as_slice() {
        [] => format!(
            "no VM has a socket in {}: `gantry run` starts one",
            paths.run.display()
        ),
        names => format!("these run: {}", names.join(", ")),
    };
    Failure::host(format!("no VM \"{name}\" runs")).help(help)
}

/// The error for a running VM whose socket is elsewhere or another user's.
fn unreachable_vm(vm: &RunningVm, paths: &HostPaths) -> Failure {
    let Some(tenant) = &vm.tenant else {
        let what = format!("{vm} has no socket in {}", paths.run.display());
        return Failure::host(what)
            .help("if it was started with --api-socket PATH, use PATH as its name");
    };
    let tenants = Tenants::load(paths).unwrap_or_default();
    let user = tenants.find(tenant).map(|tenant| &*tenant.file.user);
    let user = user.unwrap_or("USER");
    Failure::host(format!("{vm} is not yours")).help(format!(
        "its user controls it, as in `sudo -u {user} gantry vm info {}`",
        vm.record.name
    ))
}

/// Asks the VMs of all sockets in the run directory, many at a time, since each silent VM costs a timeout. The
/// answers are in the order of the names.
pub fn ask_all<T: Send>(paths: &HostPaths, ask: impl Fn(String, PathBuf) -> T + Sync) -> Vec<T> {
    let mut answers = Vec::new();
    for some in sockets(paths).chunks(AT_A_TIME) {
        let ask = &ask;
        answers.extend(std::thread::scope(|scope| {
            let asked = some.iter().cloned();
            let asked = asked.map(|(name, path)| scope.spawn(move || ask(name, path)));
            let asked: Vec<_> = asked.collect();
            let answers = asked.into_iter().map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            answers.collect::<Vec<T>>()
        }));
    }
    answers
}

/// Names and sockets of the run directory, in the order of the names. A socket without a listener is
/// removed where this user may.
pub fn sockets(paths: &HostPaths) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(&paths.run)
        .into_iter()
        .flatten()
        .flatten();
    let mut found: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?.strip_suffix(".sock")?;
            let path = entry.path();
            // If it cannot be removed, connecting to it fails with the reason.
            let _ = remove_stale(&path, &paths.run);
            path.exists().then(|| (name.to_owned(), path))
        })
        .collect();
    found.sort();
    found
}
