//! The table of calls: paths, verbs, summaries and refusals.

use hyper::{Method, StatusCode};

use super::reply::HttpError;

/// What the paths of the VMM's own calls begin with.
pub const ROOT: &str = "/api/v1/";

/// A call that gantry answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Ping,
    Quit,
    Create,
    Boot,
    Delete,
    Shutdown,
    Reboot,
    Pause,
    Resume,
    PowerButton,
    Nmi,
    Info,
    Counters,
    AddDevice,
    AddDisk,
    ResizeDisk,
    RemoveDevice,
    Console,
    Events,
    OpenApi,
    Metrics,
}

/// One row of the table.
#[derive(Debug)]
pub struct Route {
    /// Path in full.
    pub path: &'static str,
    /// Verb: `GET` or `PUT`.
    pub verb: &'static str,
    /// The call.
    pub call: Call,
    /// What it does, for the published document.
    pub summary: &'static str,
    /// Statuses beside 200 or 204, and when.
    pub refusals: &'static [(u16, &'static str)],
}

const NOT_CREATED: (u16, &str) = (404, "The VM is not created.");
const NOT_BOOTED: (u16, &str) = (405, "The VM is not booted.");
const MALFORMED: (u16, &str) = (400, "The body is wrong; the answer names the key.");
const FAILED: (u16, &str) = (500, "gantry or the host failed; the body says why.");

const fn route(
    path: &'static str,
    verb: &'static str,
    call: Call,
    summary: &'static str,
    refusals: &'static [(u16, &'static str)],
) -> Route {
    Route {
        path,
        verb,
        call,
        summary,
        refusals,
    }
}

/// Every call, in the order of the published document.
pub const ROUTES: &[Route] = &[
    route(
        "/api/v1/vmm.ping",
        "GET",
        Call::Ping,
        "Show the name, version and process of gantry",
        &[],
    ),
    route(
        "/api/v1/vmm.shutdown",
        "PUT",
        Call::Quit,
        "End the VM and gantry",
        &[],
    ),
    route(
        "/api/v1/vm.create",
        "PUT",
        Call::Create,
        "Give the VM its configuration: what `gantry run` reads from a file",
        &[
            MALFORMED,
            (
                409,
                "The VM is created already, or the host is in maintenance.",
            ),
            FAILED,
        ],
    ),
    route(
        "/api/v1/vm.boot",
        "PUT",
        Call::Boot,
        "Lease the devices, build the VM and run the guest",
        &[
            NOT_CREATED,
            (405, "The VM runs already."),
            (
                409,
                "The devices are not available, or the host is in maintenance.",
            ),
            FAILED,
        ],
    ),
    route(
        "/api/v1/vm.delete",
        "PUT",
        Call::Delete,
        "End the VM and forget its configuration",
        &[FAILED],
    ),
    route(
        "/api/v1/vm.shutdown",
        "PUT",
        Call::Shutdown,
        "End the VM at once and give its devices back",
        &[NOT_CREATED, NOT_BOOTED, FAILED],
    ),
    route(
        "/api/v1/vm.reboot",
        "PUT",
        Call::Reboot,
        "Reset the VM and boot it again",
        &[NOT_CREATED, NOT_BOOTED, FAILED],
    ),
    route(
        "/api/v1/vm.pause",
        "PUT",
        Call::Pause,
        "Pause the vCPUs",
        &[NOT_CREATED, NOT_BOOTED, FAILED],
    ),
    route(
        "/api/v1/vm.resume",
        "PUT",
        Call::Resume,
        "Resume the vCPUs",
        &[NOT_CREATED, (405, "The VM is not paused."), FAILED],
    ),
    route(
        "/api/v1/vm.power-button",
        "PUT",
        Call::PowerButton,
        "Press the power button: the guest is asked to power off",
        &[NOT_CREATED, NOT_BOOTED, FAILED],
    ),
    route(
        "/api/v1/vm.nmi",
        "PUT",
        Call::Nmi,
        "Send a non-maskable interrupt to each vCPU",
        &[NOT_CREATED, NOT_BOOTED, FAILED],
    ),
    // An older version of the API's document has it here.
    route(
        "/api/v1/vmm.nmi",
        "PUT",
        Call::Nmi,
        "The same as vm.nmi, under its older name",
        &[NOT_CREATED, NOT_BOOTED, FAILED],
    ),
    route(
        "/api/v1/vm.info",
        "GET",
        Call::Info,
        "Show the VM's configuration, state and devices",
        &[NOT_CREATED],
    ),
    route(
        "/api/v1/vm.counters",
        "GET",
        Call::Counters,
        "Show the counters of each device",
        &[NOT_CREATED],
    ),
    route(
        "/api/v1/vm.add-device",
        "PUT",
        Call::AddDevice,
        "Attach devices: the answer comes when they are announced to the guest, or 204 if the VM is not \
         booted. A device may come open instead of named, as descriptors with the request (SCM_RIGHTS): its cdev, \
         and the iommufd for it, which the VM's first device needs where gantry may not open /dev/iommu",
        &[
            MALFORMED,
            NOT_CREATED,
            (
                409,
                "The name is taken, there is no free slot, or no such device is available.",
            ),
            FAILED,
            (
                504,
                "It takes long: an event follows when the device is attached, or why it is not.",
            ),
        ],
    ),
    route(
        "/api/v1/vm.add-disk",
        "PUT",
        Call::AddDisk,
        "Attach a disk: the answer comes when it is announced to the guest, or 204 if the VM is not booted",
        &[
            (
                400,
                "The body is wrong, or its file is no disk; the answer says why.",
            ),
            NOT_CREATED,
            (
                409,
                "The name is taken, there is no free slot, or the file is in use or not one that the VM may have.",
            ),
            FAILED,
        ],
    ),
    route(
        "/api/v1/vm.resize-disk",
        "PUT",
        Call::ResizeDisk,
        "Make a disk larger, with its file if that is smaller: the answer comes when the guest was told",
        &[
            (
                400,
                "The body is wrong, or the disk cannot have that size; the answer says why.",
            ),
            (404, "The VM is not created, or has no such disk."),
            NOT_BOOTED,
            FAILED,
        ],
    ),
    route(
        "/api/v1/vm.remove-device",
        "PUT",
        Call::RemoveDevice,
        "Detach a device: the answer comes when the guest was asked to release it, an event when it is gone. A VM \
         that is not booted boots without it",
        &[
            MALFORMED,
            (404, "The VM is not created, or has no such device."),
            FAILED,
        ],
    ),
    route(
        "/api/v1/vm.console",
        "GET",
        Call::Console,
        "Attach to the guest's console: with `Connection: Upgrade` and `Upgrade: gantry-console` the connection \
         carries its output and what is typed",
        &[
            (409, "The VM's serial port leads nowhere."),
            (426, "The request does not ask for the upgrade."),
        ],
    ),
    route(
        "/api/v1/events",
        "GET",
        Call::Events,
        "Stream events, one JSON object a line, and empty lines to keep the connection",
        &[],
    ),
    route(
        "/api/v1/openapi.json",
        "GET",
        Call::OpenApi,
        "Show this document",
        &[],
    ),
    route(
        "/metrics",
        "GET",
        Call::Metrics,
        "Show metrics of the VM, its devices and the API for Prometheus",
        &[],
    ),
];

/// Calls of Cloud Hypervisor's API that gantry does not have.
pub const UNSUPPORTED: &[&str] = &[
    "vm.add-fs",
    "vm.add-generic-vhost-user",
    "vm.add-net",
    "vm.add-pmem",
    "vm.add-user-device",
    "vm.add-vdpa",
    "vm.add-vsock",
    "vm.coredump",
    "vm.receive-migration",
    "vm.resize",
    "vm.resize-zone",
    "vm.restore",
    "vm.send-migration",
    "vm.snapshot",
];

/// The call that a request is for.
///
/// # Errors
/// 404, 405 with the right verb, or 501.
pub fn find(method: &Method, path: &str) -> Result<&'static Route, HttpError> {
    if let Some(route) = ROUTES.iter().find(|route| route.path == path) {
        if method.as_str() == route.verb {
            return Ok(route);
        }
        let what = format!("{path} takes {}, not {method}", route.verb);
        return Err(HttpError {
            allow: Some(route.verb),
            ..HttpError::new(StatusCode::METHOD_NOT_ALLOWED, what)
        });
    }
    match path.strip_prefix(ROOT) {
        Some(call) if UNSUPPORTED.contains(&call) => {
            let what = format!("gantry does not support {call}");
            Err(HttpError::new(StatusCode::NOT_IMPLEMENTED, what))
        }
        _ => {
            let what = format!("there is no {path}; {ROOT}openapi.json lists all paths");
            Err(HttpError::new(StatusCode::NOT_FOUND, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_stands_once() {
        for (index, route) in ROUTES.iter().enumerate() {
            assert!(ROUTES[..index].iter().all(|other| other.path != route.path));
            let call = route.path.strip_prefix(ROOT).unwrap_or_default();
            assert!(!UNSUPPORTED.contains(&call));
        }
    }

    #[test]
    fn what_is_not_there_is_told_apart() {
        let refused = |method: Method, path| find(&method, path).unwrap_err();
        let wrong = refused(Method::POST, "/api/v1/vm.boot");
        assert_eq!((wrong.status.as_u16(), wrong.allow), (405, Some("PUT")));
        let unsupported = refused(Method::PUT, "/api/v1/vm.snapshot");
        assert_eq!(unsupported.status.as_u16(), 501);
        assert!(unsupported.messages[0].contains("vm.snapshot"));
        for path in ["/", "/api/v1/", "/api/v1/vm.fly", "/vm.boot", "/metrics/"] {
            assert_eq!(refused(Method::GET, path).status.as_u16(), 404, "{path}");
        }
    }
}
