//! The helper's side: it leases and opens, keeps the leases, and ends with the socket.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::files::{FileOpener, OPEN_PATIENCE};
use super::wire::{self, Leased, LeasedGroup, Limit, Nodes, Refusal, Reply, Request, Return};
use crate::allocation::{AllocateError, Lease, OwnLease, Recipient, allocate_for, fit};
use crate::base::chain::chain;
use crate::base::host::HostPaths;
use crate::base::name::DeviceName;
use crate::base::text::short;
use crate::facts::reserved::reserved_regions;
use crate::facts::vfio::{VfioBackEnd, cdev, device_of_cdev};
use crate::holding::record::Holder;
use crate::inventory::device::HostDevice;
use crate::inventory::mdev::MdevDevice;
use crate::pools::group::Groups;
use crate::pools::plan::{PlanError, Plans};
use crate::pools::request::{DeviceRequest, DeviceSource, Placement};

/// How long an IOMMU group may stay busy after its device was leased: a holder that was killed keeps it
/// until the kernel has reset the device.
pub const BUSY_PATIENCE: Duration = Duration::from_secs(5);
/// How long others wait for the end of a lease whose device does not answer.
const LEASE_END_PATIENCE: Duration = Duration::from_secs(1);
/// How long to wait between two attempts at a group that is in use.
const BUSY_STEP: Duration = Duration::from_millis(20);

/// Runs the helper with the arguments after `__open`: the host's directories. Its standard input and output are the
/// sockets.
pub fn opener_helper(args: &[String]) -> ExitCode {
    let Some((paths, _)) = HostPaths::from_args(args) else {
        return ExitCode::FAILURE;
    };
    let asked = io::stdin().as_fd().try_clone_to_owned();
    let returned = io::stdout().as_fd().try_clone_to_owned();
    let served =
        asked.and_then(|asked| serve(&paths, asked.into(), returned?.into(), &allocate_for));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The function that allocates: [`allocate_for`].
pub(super) type Allocate<'a> =
    dyn Fn(&HostPaths, &[DeviceRequest], Recipient<'_>) -> Result<Vec<Lease>, AllocateError> + 'a;

/// Answers requests until their socket closes, and ends leases that are returned over the other one meanwhile.
pub(super) fn serve(
    paths: &HostPaths,
    mut asks: UnixStream,
    returns: UnixStream,
    allocate: &Allocate<'_>,
) -> io::Result<()> {
    let leases = Leases::default();
    thread::scope(|threads| {
        let taken = returns.try_clone()?;
        threads.spawn(|| leases.receive_returns(taken));
        let served = answer(paths, &mut asks, &leases, allocate);
        // The other thread ends with its socket.
        let _ = returns.shutdown(Shutdown::Both);
        served
    })
}

fn answer(
    paths: &HostPaths,
    socket: &mut UnixStream,
    leases: &Leases,
    allocate: &Allocate<'_>,
) -> io::Result<()> {
    let Request::Hello { vm, pid } = wire::receive(socket)? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let mut server = OpenerServer {
        paths,
        allocate,
        holder: Holder { vm, pid },
        placement: Placement::Anywhere,
        limit: None,
        slots: None,
        leases,
        next: 0,
        last: 0..0,
        sources: Vec::new(),
    };
    let files = FileOpener::default();
    loop {
        match wire::receive(socket) {
            Ok(Request::Lease {
                mut requests,
                ungrouped,
                nodes,
            }) => {
                let limit = server.limit.as_ref();
                let ungrouped = limit.map_or(ungrouped, |limit| limit.ungrouped);
                for request in &mut requests {
                    request.allow_ungrouped = ungrouped;
                }
                server.lease(socket, &requests, &nodes)?;
            }
            Ok(Request::Plan(name)) => {
                let planned = server.plan(&name);
                let reply = planned.map_or_else(Reply::Refused, Reply::Planned);
                wire::send(socket, &reply)?;
            }
            Ok(Request::Cdev { major, minor }) => {
                let device = device_of_cdev(paths, major, minor);
                let device = device.map_err(|error| denied(&error));
                wire::send(socket, &device.map_or_else(Reply::Refused, Reply::Device))?;
            }
            Ok(Request::File { path, flags }) => {
                let limit = server.limit.as_ref();
                send_opened(socket, files.open(limit, &path, flags, OPEN_PATIENCE))?;
            }
            Ok(Request::ReplyLost) => {
                for id in std::mem::take(&mut server.last) {
                    leases.end(id, None);
                }
            }
            Ok(Request::Slots(free)) => server.slots = Some(free),
            Ok(Request::Place(placement)) if server.limit.is_none() => server.placement = placement,
            Ok(Request::Limit(mut limit)) if server.limit.is_none() => {
                if limit.from.is_empty() {
                    limit.from = std::mem::take(&mut server.sources);
                }
                server.warm_up(&limit.from);
                server.limit = Some(limit);
            }
            Ok(Request::Limit(_) | Request::Place(_) | Request::Hello { .. }) => {
                return Err(io::ErrorKind::InvalidData.into());
            }
            // The VM has ended, and so do the leases that it still had.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// The leases that the helper keeps, by the numbers that the VM knows.
#[derive(Default)]
struct Leases(Mutex<BTreeMap<u64, Lease>>);

impl Leases {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, Lease>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies for an allocation, which keep no lease alive.
    fn own(&self) -> Vec<OwnLease> {
        self.all().values().map(Lease::as_own).collect()
    }

    fn end(&self, id: u64, aside: Option<&str>) {
        let Some(lease) = self.all().remove(&id) else {
            return;
        };
        if let Some(reason) = aside {
            lease.set_aside(&short(reason));
        }
        end_lease(lease);
    }

    /// Ends leases that the VM returns, until the socket closes.
    fn receive_returns(&self, mut socket: UnixStream) {
        while let Ok(Return { id, aside }) = wire::receive(&mut socket) {
            self.end(id, aside.as_deref());
            if wire::send(&mut socket, &()).is_err() {
                return;
            }
        }
    }
}

/// Ends a lease. The last check of the device may wait for the hardware; other leases do not wait for that.
fn end_lease(lease: Lease) {
    let (ended, end) = channel();
    let end_lease = move || {
        drop(lease);
        // The other thread may have stopped waiting.
        let _ = ended.send(());
    };
    // Without a thread it has been dropped with the closure.
    if thread::Builder::new().spawn(end_lease).is_ok() {
        let _ = end.recv_timeout(LEASE_END_PATIENCE);
    }
}

/// The helper's side: the VM that it opens for, and the leases that it keeps.
struct OpenerServer<'a> {
    paths: &'a HostPaths,
    allocate: &'a Allocate<'a>,
    holder: Holder,
    placement: Placement,
    /// None while the VM is built: its file decides.
    limit: Option<Limit>,
    /// The slots that are free for the next request; none while each device gets a new slot.
    slots: Option<usize>,
    leases: &'a Leases,
    next: u64,
    /// The leases of the last request.
    last: Range<u64>,
    /// The sources of the devices that the VM starts with.
    sources: Vec<DeviceSource>,
}

/// The result of a request.
struct Bundle {
    leases: Vec<Lease>,
    groups: Vec<LeasedGroup>,
    /// The address space's node, the nodes of groups or cdevs, and copies of the locks, which delay no lease
    /// that is returned meanwhile.
    files: Vec<File>,
}

impl OpenerServer<'_> {
    fn lease(
        &mut self,
        socket: &mut UnixStream,
        requests: &[DeviceRequest],
        nodes: &Nodes,
    ) -> io::Result<()> {
        self.last = 0..0;
        let bundle = self.bundle(requests, nodes);
        // Input before the reply means that the VM waits no more, or is gone: everything is released.
        if wire::has_more(socket) {
            return Ok(());
        }
        let Bundle {
            leases,
            groups,
            files,
        } = match bundle {
            Ok(bundle) => bundle,
            Err(refusal) => return wire::send(socket, &Reply::Refused(refusal)),
        };
        let first = self.next;
        let devices = (first..).zip(&leases).map(|(id, lease)| Leased {
            id,
            name: lease.name(),
            group: lease.iommu_group().unwrap_or_default(),
            virtual_function: lease.is_virtual_function(),
            token: lease.token(),
            pool: pool_of(self.paths, lease.name()),
            terms: lease.terms(),
            locks: lease.descriptors().count(),
        });
        let devices = devices.collect();
        self.next += leases.len() as u64;
        self.last = first..self.next;
        // Stored before the reply is sent: the VM may return a lease at once, and may do so without reading
        // the reply.
        self.leases.all().extend((first..).zip(leases));
        let sent = wire::send(socket, &Reply::Leased { devices, groups });
        let mut files = files.iter();
        let sent = sent
            .and_then(|()| files.try_for_each(|file| wire::send_file(socket, file.as_raw_fd())));
        if sent.is_err() {
            for id in std::mem::take(&mut self.last) {
                self.leases.end(id, None);
            }
            return sent;
        }
        if self.limit.is_none() {
            let sources = requests.iter().filter_map(|one| self.source(one).ok()?);
            self.sources = sources.chain(self.sources.clone()).collect();
        }
        Ok(())
    }

    fn plan(&self, name: &str) -> Result<Vec<DeviceRequest>, Refusal> {
        let not = |error: PlanError| match error.is_mistake() {
            true => Refusal::Mistaken(chain(&error)),
            false => failed(&error),
        };
        let plans = Plans::load(self.paths).map_err(not)?;
        let plan = plans.find(name).map_err(not)?;
        let requests = plan.requests();
        match requests.is_empty() {
            true => Err(Refusal::Denied(format!("plan \"{name}\" has no devices"))),
            false => Ok(requests),
        }
    }

    /// Leases and opens, or returns the refusal in words for the user.
    fn bundle(&self, requests: &[DeviceRequest], nodes: &Nodes) -> Result<Bundle, Refusal> {
        if let Some(limit) = &self.limit {
            self.check_limit(limit, requests)?;
        }
        let vm = Recipient {
            holder: &self.holder,
            placement: &self.placement,
            own: &self.leases.own(),
            slots: self.slots,
        };
        let leases = (self.allocate)(self.paths, requests, vm);
        let leases = leases.map_err(|error| not_allocated(&error))?;
        if nodes.sent && leases.len() > 1 {
            let names: Vec<_> = leases
                .iter()
                .map(|lease| lease.name().to_string())
                .collect();
            return Err(Refusal::Denied(format!(
                "a device that comes as a descriptor must be a whole card, and this is one of {}: attach the card \
                 by its address instead",
                names.join(", ")
            )));
        }
        let mut groups: Vec<LeasedGroup> = Vec::new();
        let mut files = Vec::new();
        if nodes.address_space {
            files.push(open_node(&nodes.back_end.node(self.paths))?);
        }
        for lease in &leases {
            let Some(number) = lease.iommu_group() else {
                let why = format!("{} is in no IOMMU group", lease.name());
                return Err(Refusal::Denied(why));
            };
            let new =
                !nodes.held.contains(&number) && groups.iter().all(|group| group.number != number);
            if new {
                let reserved = reserved_regions(self.paths, number);
                let reserved = reserved.map_err(|error| failed(&error))?;
                groups.push(LeasedGroup { number, reserved });
            }
            match nodes.back_end {
                VfioBackEnd::Container if new => files.push(self.group(number, lease)?),
                VfioBackEnd::Container => {}
                VfioBackEnd::Iommufd if nodes.sent => {}
                VfioBackEnd::Iommufd => {
                    let path = cdev(self.paths, lease.name()).map_err(|error| failed(&error))?;
                    files.push(open_node(&path)?);
                }
            }
        }
        let locks = leases.iter().flat_map(Lease::descriptors);
        let locks: io::Result<Vec<File>> = locks.map(File::try_clone).collect();
        files.extend(locks.map_err(|error| failed(&error))?);
        Ok(Bundle {
            leases,
            groups,
            files,
        })
    }

    /// The node of a group.
    fn group(&self, number: u32, lease: &Lease) -> Result<File, Refusal> {
        let path = self.paths.vfio_group(number);
        open_when_free(&path).map_err(|error| {
            // The process that keeps it busy holds no lease, or cannot be ended.
            if error.raw_os_error() == Some(nix::libc::EBUSY) {
                lease.set_aside(&format!("IOMMU group {number} stays busy"));
            }
            cannot_open(&path)(error)
        })
    }

    /// Takes the path of a later request, so that code and sysfs are in memory when one comes.
    fn warm_up(&self, from: &[DeviceSource]) {
        for source in from {
            let request = DeviceRequest::new(source.clone(), 1);
            // Whether it fits now does not matter.
            let _ = fit(self.paths, &[request], &Placement::default());
        }
    }

    /// Checks that the limit allows all requests.
    fn check_limit(&self, limit: &Limit, requests: &[DeviceRequest]) -> Result<(), Refusal> {
        let most = limit.most;
        if self.leases.all().len().saturating_add(devices(requests)) > most {
            return Err(Refusal::Denied(format!(
                "this VM can have at most {} at a time: detach one first",
                match most {
                    1 => "1 device".to_owned(),
                    most => format!("{most} devices"),
                }
            )));
        }
        requests
            .iter()
            .try_for_each(|request| self.check_source(limit, request))
    }

    fn check_source(&self, limit: &Limit, request: &DeviceRequest) -> Result<(), Refusal> {
        let source = self.source(request)?;
        let allowed = match &source {
            Some(source) => limit.from.contains(source),
            None => limit.ungrouped,
        };
        match (allowed, source) {
            (true, _) => Ok(()),
            (false, Some(source)) => Err(Refusal::Denied(wrong_source(limit, &source))),
            (false, None) => Err(Refusal::Denied(ungrouped(request))),
        }
    }

    /// The source of a request's devices; none for a device that is in no group.
    fn source(&self, request: &DeviceRequest) -> Result<Option<DeviceSource>, Refusal> {
        source_of(self.paths, request).map_err(|error| not_allocated(&error))
    }
}

/// The source of a request's devices; none for a device that is in no group.
pub fn source_of(
    paths: &HostPaths,
    request: &DeviceRequest,
) -> Result<Option<DeviceSource>, AllocateError> {
    match &request.from {
        DeviceSource::Device(name) => Ok(group_of(paths, *name)?.map(DeviceSource::Group)),
        from => Ok(Some(from.clone())),
    }
}

fn group_of(paths: &HostPaths, name: DeviceName) -> Result<Option<String>, AllocateError> {
    let groups = Groups::load(paths)?;
    Ok(match name {
        DeviceName::Pci(bdf) => {
            let device = HostDevice::read(paths, bdf)?;
            groups.group_of(&device).map(|group| group.name.clone())
        }
        DeviceName::Mdev(uuid) => {
            let device = MdevDevice::read(paths, uuid)?;
            device.and_then(|device| Some(groups.group_of_mdev(&device)?.name.clone()))
        }
    })
}

/// The resource group of a device, if it can be read.
pub fn pool_of(paths: &HostPaths, name: DeviceName) -> Option<String> {
    group_of(paths, name).ok().flatten()
}

fn wrong_source(limit: &Limit, source: &DeviceSource) -> String {
    let from: Vec<String> = limit.from.iter().map(ToString::to_string).collect();
    let may = match from.is_empty() {
        true => "this VM names no groups for devices that are attached later".to_owned(),
        false => format!(
            "devices attached to this VM come from {} only",
            from.join(", ")
        ),
    };
    let remedy = match source {
        DeviceSource::Group(name) => format!("add \"{name}\" to `hotplug.groups` of its file"),
        DeviceSource::Alias(_) | DeviceSource::Device(_) => {
            "name the groups of the devices in `hotplug.groups` of its file".to_owned()
        }
    };
    format!("{may}, not from {source}: {remedy}, and start the VM again")
}

/// The refusal of an ungrouped device for a VM that was not started with leave for such devices.
pub fn ungrouped(request: &DeviceRequest) -> String {
    format!(
        "{} is in no group: add it to a group of this VM, or set \"ungrouped\": true under `hotplug` in the \
         VM's file and start the VM again",
        request.from
    )
}

/// The number of devices asked for.
fn devices(requests: &[DeviceRequest]) -> usize {
    let counts = requests.iter().map(|request| request.count as usize);
    counts.fold(0, usize::saturating_add)
}

/// Sends a file that was opened, or the reason why it was not.
fn send_opened(
    socket: &mut UnixStream,
    opened: Result<io::Result<File>, Refusal>,
) -> io::Result<()> {
    match opened {
        Ok(Ok(file)) => {
            wire::send(socket, &Reply::Opened)?;
            wire::send_file(socket, file.as_raw_fd())
        }
        Ok(Err(error)) => {
            let errno = error.raw_os_error().unwrap_or(nix::libc::EACCES);
            wire::send(socket, &Reply::NotOpened { errno })
        }
        Err(refusal) => wire::send(socket, &Reply::Refused(refusal)),
    }
}

fn open_node(path: &Path) -> Result<File, Refusal> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(cannot_open(path))
}

/// Opens a group's node, and tries again for a while if it is in use.
fn open_when_free(path: &Path) -> io::Result<File> {
    let deadline = Instant::now() + BUSY_PATIENCE;
    loop {
        match OpenOptions::new().read(true).write(true).open(path) {
            Err(error)
                if error.raw_os_error() == Some(nix::libc::EBUSY) && Instant::now() < deadline =>
            {
                std::thread::sleep(BUSY_STEP);
            }
            opened => return opened,
        }
    }
}

fn cannot_open(path: &Path) -> impl Fn(io::Error) -> Refusal {
    move |error| Refusal::Failed(format!("cannot open {}: {error}", path.display()))
}

fn denied(error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal::Denied(chain(error))
}

fn failed(error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal::Failed(chain(error))
}

fn not_allocated(error: &AllocateError) -> Refusal {
    match error.is_refusal() {
        _ if error.is_temporary() => Refusal::Busy(chain(error)),
        _ if error.is_mistake() => Refusal::Mistaken(chain(error)),
        true => denied(error),
        false => failed(error),
    }
}
