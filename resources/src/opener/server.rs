//! The helper's side: it leases and opens, keeps what belongs to a lease, and ends with the socket.

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

use super::files;
use super::wire::{self, Ask, Leased, LeasedGroup, Limit, Nodes, Refusal, Return, Said};
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
const LAST_LOOK: Duration = Duration::from_secs(1);
/// How long to wait between two attempts at a group that is in use.
const BUSY_STEP: Duration = Duration::from_millis(20);

/// What the helper does with the arguments after `__open`: the host's directories. Its standard input and output
/// are the sockets.
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

/// What allocates: [`allocate_for`].
pub(super) type Allocate<'a> =
    dyn Fn(&HostPaths, &[DeviceRequest], Recipient<'_>) -> Result<Vec<Lease>, AllocateError> + 'a;

/// Answers until the socket ends, over which things are asked for. Leases come back over the other one
/// meanwhile.
pub(super) fn serve(
    paths: &HostPaths,
    mut asks: UnixStream,
    returns: UnixStream,
    allocate: &Allocate<'_>,
) -> io::Result<()> {
    let leases = Leases::default();
    thread::scope(|threads| {
        let taken = returns.try_clone()?;
        threads.spawn(|| leases.take_back(taken));
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
    let Ask::Hello { vm, pid } = wire::receive(socket)? else {
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
    loop {
        match wire::receive(socket) {
            Ok(Ask::Lease {
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
            Ok(Ask::Plan(name)) => {
                let planned = server.plan(&name);
                let said = planned.map_or_else(Said::Not, Said::Planned);
                wire::send(socket, &said)?;
            }
            Ok(Ask::Cdev { major, minor }) => {
                let device = device_of_cdev(paths, major, minor);
                let device = device.map_err(|error| denied(&error));
                wire::send(socket, &device.map_or_else(Said::Not, Said::Device))?;
            }
            Ok(Ask::File { path, flags }) => {
                send_opened(socket, files::open(server.limit.as_ref(), &path, flags))?;
            }
            Ok(Ask::Unheard) => {
                for id in std::mem::take(&mut server.last) {
                    leases.end(id, None);
                }
            }
            Ok(Ask::Slots(free)) => server.slots = Some(free),
            Ok(Ask::Place(placement)) if server.limit.is_none() => server.placement = placement,
            Ok(Ask::Limit(mut limit)) if server.limit.is_none() => {
                if limit.from.is_empty() {
                    limit.from = std::mem::take(&mut server.sources);
                }
                server.rehearse(&limit.from);
                server.limit = Some(limit);
            }
            Ok(Ask::Limit(_) | Ask::Place(_) | Ask::Hello { .. }) => {
                return Err(io::ErrorKind::InvalidData.into());
            }
            // The end of the VM, and of the leases it still had.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// The leases that the helper keeps, by the numbers that the VM knows them by.
#[derive(Default)]
struct Leases(Mutex<BTreeMap<u64, Lease>>);

impl Leases {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, Lease>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an allocation must know of them. It holds none of them up.
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
        give_back(lease);
    }

    /// Ends leases that come back, until the socket ends.
    fn take_back(&self, mut socket: UnixStream) {
        while let Ok(Return { id, aside }) = wire::receive(&mut socket) {
            self.end(id, aside.as_deref());
            if wire::send(&mut socket, &()).is_err() {
                return;
            }
        }
    }
}

/// Ends a lease. The last look at the device can wait for the hardware, and other leases do not wait for that.
fn give_back(lease: Lease) {
    let (ended, end) = channel();
    let end_lease = move || {
        drop(lease);
        // Nobody waits any more.
        let _ = ended.send(());
    };
    // Without a thread it has been dropped with the closure.
    if thread::Builder::new().spawn(end_lease).is_ok() {
        let _ = end.recv_timeout(LAST_LOOK);
    }
}

/// The helper's side: for whom it opens what, and the leases that it keeps.
struct OpenerServer<'a> {
    paths: &'a HostPaths,
    allocate: &'a Allocate<'a>,
    holder: Holder,
    placement: Placement,
    /// None while the VM is built, as its file says.
    limit: Option<Limit>,
    /// The slots that are free for what is asked for next; None while each device gets one that is made for it.
    slots: Option<usize>,
    leases: &'a Leases,
    next: u64,
    /// What was given for the last request.
    last: Range<u64>,
    /// Where the devices came from that the VM starts with.
    sources: Vec<DeviceSource>,
}

/// What goes over the socket for a request.
struct Bundle {
    leases: Vec<Lease>,
    groups: Vec<LeasedGroup>,
    /// The address space's node, the groups' or the cdevs', and copies of the locks: a lease that comes back meanwhile is not held
    /// up.
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
        // Before its answer somebody speaks only who waits for it no more; or is gone. All goes back.
        if wire::has_more(socket) {
            return Ok(());
        }
        let Bundle {
            leases,
            groups,
            files,
        } = match bundle {
            Ok(bundle) => bundle,
            Err(refusal) => return wire::send(socket, &Said::Not(refusal)),
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
        // One that comes back at once must be found; and who reads no answer may still give back.
        self.leases.all().extend((first..).zip(leases));
        let sent = wire::send(socket, &Said::Leased { devices, groups });
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

    /// Leases and opens, or says why not, in words for whoever asked.
    fn bundle(&self, requests: &[DeviceRequest], nodes: &Nodes) -> Result<Bundle, Refusal> {
        if let Some(limit) = &self.limit {
            self.within(limit, requests)?;
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
        when_free(&path).map_err(|error| {
            // Whoever keeps it busy keeps to no lease, or cannot be ended.
            if error.raw_os_error() == Some(nix::libc::EBUSY) {
                lease.set_aside(&format!("IOMMU group {number} stays busy"));
            }
            cannot_open(&path)(error)
        })
    }

    /// Goes the way that a request will take, so that code and sysfs are at hand when one comes.
    fn rehearse(&self, from: &[DeviceSource]) {
        for source in from {
            let request = DeviceRequest::new(source.clone(), 1);
            // Whether it fits now is of no interest.
            let _ = fit(self.paths, &[request], &Placement::default());
        }
    }

    /// Whether the VM may be given all that it asks for.
    fn within(&self, limit: &Limit, requests: &[DeviceRequest]) -> Result<(), Refusal> {
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
            .try_for_each(|request| self.may(limit, request))
    }

    fn may(&self, limit: &Limit, request: &DeviceRequest) -> Result<(), Refusal> {
        let source = self.source(request)?;
        let allowed = match &source {
            Some(source) => limit.from.contains(source),
            None => limit.ungrouped,
        };
        match (allowed, source) {
            (true, _) => Ok(()),
            (false, Some(source)) => Err(Refusal::Denied(not_from(limit, &source))),
            (false, None) => Err(Refusal::Denied(ungrouped(request))),
        }
    }

    /// Where a request's devices come from; none for a device that is in no group.
    fn source(&self, request: &DeviceRequest) -> Result<Option<DeviceSource>, Refusal> {
        source_of(self.paths, request).map_err(|error| not_allocated(&error))
    }
}

/// Where a request's devices come from; none for a device that is in no group.
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

/// The resource group that a device is in, as far as that can be read.
pub fn pool_of(paths: &HostPaths, name: DeviceName) -> Option<String> {
    group_of(paths, name).ok().flatten()
}

fn not_from(limit: &Limit, source: &DeviceSource) -> String {
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

/// Why a VM that was not started for it gets no device that is in no group.
pub fn ungrouped(request: &DeviceRequest) -> String {
    format!(
        "{} is in no group: add it to a group of this VM, or set \"ungrouped\": true under `hotplug` in the \
         VM's file and start the VM again",
        request.from
    )
}

/// How many devices are asked for.
fn devices(requests: &[DeviceRequest]) -> usize {
    let counts = requests.iter().map(|request| request.count as usize);
    counts.fold(0, usize::saturating_add)
}

/// Sends a file that was opened, or why it was not.
fn send_opened(
    socket: &mut UnixStream,
    opened: Result<io::Result<File>, Refusal>,
) -> io::Result<()> {
    match opened {
        Ok(Ok(file)) => {
            wire::send(socket, &Said::Opened)?;
            wire::send_file(socket, file.as_raw_fd())
        }
        Ok(Err(error)) => {
            let errno = error.raw_os_error().unwrap_or(nix::libc::EACCES);
            wire::send(socket, &Said::NotOpened { errno })
        }
        Err(refusal) => wire::send(socket, &Said::Not(refusal)),
    }
}

fn open_node(path: &Path) -> Result<File, Refusal> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(cannot_open(path))
}

/// Opens a group's node; one that is in use is asked for again for a while.
fn when_free(path: &Path) -> io::Result<File> {
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
