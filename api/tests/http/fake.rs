//! A VM of words alone behind a real server on a real socket.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use gantry_api::http::{Console, Events, Identity, Limits, Server, Socket, Stop, Vm};
use gantry_resources::base::HostPaths;
use gantry_vmm::VmConfig;
use gantry_vmm::command::{
    Answer, Attach, Command, CommandError, DeferredConfig, DeviceCounters, DeviceInfo, DeviceKind,
    DeviceState, GuestBdf, PassedDevice, Reply, VmEvent, VmInfo, VmState,
};

/// A VM without a machine. It answers at once, on the thread that asks.
#[derive(Default)]
pub struct FakeVm {
    pub events: Events,
    pub console: Console,
    /// What clients have typed.
    pub typed: Mutex<Vec<u8>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    vm: Option<(Arc<VmConfig>, VmState)>,
    devices: Vec<DeviceInfo>,
}

const SLOTS: usize = 4;
/// Name of a plan whose devices are functions of one.
pub const WHOLE: &str = "gpu";
/// Name of a device that the guest never answers for.
pub const LAZY: &str = "lazy";

impl FakeVm {
    fn run(&self, command: Command) -> Result<Answer, CommandError> {
        let mut state = self.state.lock().unwrap();
        if let Command::Create(DeferredConfig(make)) = command {
            if state.vm.is_some() {
                return Err(CommandError::AlreadyCreated);
            }
            let config = make()?;
            state.vm = Some((Arc::new(config), VmState::Created));
            return Ok(Answer::Done);
        }
        if matches!(command, Command::Quit) {
            return Ok(Answer::Done);
        }
        let Some((config, was)) = state.vm.clone() else {
            return Err(CommandError::NotCreated);
        };
        let is = match (&command, was) {
            (Command::Boot, VmState::Created | VmState::Shutdown) => VmState::Running,
            (Command::Boot, _) => return Err(CommandError::AlreadyRunning),
            (Command::Counters, _) => return Ok(Answer::Counters(counters(&state.devices))),
            (Command::Delete, _) => {
                state.vm = None;
                return Ok(Answer::Done);
            }
            (Command::Detach(_), VmState::Created) => return Ok(Answer::Done),
            (_, VmState::Created | VmState::Shutdown) => return Err(CommandError::NotBooted),
            (Command::Attach(attach), _) => {
                return self.attach(&mut state, attach);
            }
            (Command::Detach(detach), _) => {
                let found = state.devices.iter().position(|d| d.id == detach.id);
                let found = found.ok_or_else(|| CommandError::NoSuchDevice {
                    id: detach.id.clone(),
                    others: state.devices.iter().map(|d| d.id.clone()).collect(),
                })?;
                let forced = detach.force_after.is_some();
                if forced || detach.id != LAZY {
                    let gone = state.devices.remove(found);
                    let together = |one: &DeviceInfo| gone.together_with.contains(&one.id);
                    state.devices.retain(|one| !together(one));
                    for id in [vec![gone.id], gone.together_with].concat() {
                        self.events.publish(VmEvent::Detached { id, forced });
                    }
                }
                return Ok(Answer::Done);
            }
            (Command::PowerButton, was) => was,
            (Command::Pause, _) => VmState::Paused,
            (Command::Resume, VmState::Paused) => VmState::Running,
            (Command::Resume, _) => return Err(CommandError::NotPaused),
            (Command::Shutdown, _) => VmState::Shutdown,
            _ => VmState::Running,
        };
        state.vm = Some((config, is));
        self.events.publish(VmEvent::State(is));
        Ok(Answer::Done)
    }

    fn attach(&self, state: &mut State, attach: &Attach) -> Result<Answer, CommandError> {
        let nvme = || "nvme".to_owned();
        let (count, group) = match attach {
            Attach::Devices(request) => {
                let group = request.from.pool().map(|_| nvme());
                (request.count as usize, group)
            }
            Attach::Plan { .. } => (2, Some(nvme())),
            // What is in the files, in place of what they are.
            Attach::Sent(sent) => {
                let files = [Some(&sent.cdev), sent.iommufd.as_ref()];
                let texts = files.into_iter().flatten().map(text_of);
                (1, Some(texts.collect::<Vec<_>>().join(" and ")))
            }
            Attach::Disk { .. } => (1, None),
        };
        if state.devices.len() + count > SLOTS {
            return Err(CommandError::NoFreeSlot { slots: SLOTS });
        }
        let first = state.devices.len();
        let (allow, rom, on_error, whole) = match attach {
            Attach::Devices(request) => {
                (request.allow, request.rom.clone(), request.on_error, false)
            }
            other => (
                Default::default(),
                Default::default(),
                Default::default(),
                matches!(other, Attach::Plan { name, .. } if name == WHOLE),
            ),
        };
        for index in first..first + count {
            let id = attach
                .id()
                .map_or_else(|| format!("dev{index}"), str::to_owned);
            if state.devices.iter().any(|device| device.id == id) {
                return Err(CommandError::DuplicateId(id));
            }
            let kind = match attach {
                Attach::Disk { disk, .. } => DeviceKind::Disk(disk.clone()),
                _ => DeviceKind::Passed(PassedDevice {
                    name: format!("0000:{:02x}:00.0", index + 1).parse().unwrap(),
                    group: group.clone(),
                    allow,
                    on_error,
                    rom: rom.clone(),
                }),
            };
            let device = DeviceInfo {
                id,
                kind,
                guest: GuestBdf::from_bits((index as u16 + 1) << 8),
                state: DeviceState::Announced,
                together_with: match whole {
                    true => vec![format!("dev{}", 2 * first + 1 - index)],
                    false => Vec::new(),
                },
            };
            self.events.publish(VmEvent::Attached(device.clone()));
            if device.id != LAZY {
                let id = device.id.clone();
                self.events.publish(VmEvent::Enabled { id });
            }
            state.devices.push(device);
        }
        Ok(Answer::Attached(state.devices[first..].to_vec()))
    }
}

fn text_of(mut file: &File) -> String {
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

fn counters(devices: &[DeviceInfo]) -> Vec<DeviceCounters> {
    let counters = |device: &DeviceInfo| DeviceCounters {
        id: device.id.clone(),
        bdf: device
            .kind
            .passed()
            .map_or(String::new(), |one| one.name.to_string()),
        interrupts: BTreeMap::from([(0, 3), (2, 40)]),
        trapped_reads: BTreeMap::from([("bar0".to_owned(), 7)]),
        trapped_writes: BTreeMap::new(),
        bytes_mapped: 16 << 10,
        attach: vec![("open", Duration::from_millis(107))],
        resets: 1,
        requests: Vec::new(),
        errors: 0,
    };
    devices.iter().map(counters).collect()
}

impl Vm for FakeVm {
    fn ask(&self, command: Command, reply: Reply) {
        reply(self.run(command));
    }

    fn info(&self) -> Result<VmInfo, CommandError> {
        let state = self.state.lock().unwrap();
        let (config, is) = state.vm.clone().ok_or(CommandError::NotCreated)?;
        Ok(VmInfo {
            config,
            nodes: [1].into_iter().collect(),
            cpus: [4, 5].into_iter().collect(),
            state: is,
            uptime: (is == VmState::Running).then(|| Duration::from_secs(90)),
            ended: (is == VmState::Shutdown)
                .then(|| "the guest died: at once\ntoo little memory".to_owned()),
            devices: state.devices.clone(),
            slots: SLOTS,
            free_slots: SLOTS - state.devices.len(),
        })
    }

    /// The guest says what is typed, a few bytes at a time.
    fn type_in(&self, input: &[u8]) -> Result<usize, CommandError> {
        let info = self.info()?;
        if !info.config.serial.is_console() {
            return Err(CommandError::NoConsole);
        }
        let taken = &input[..input.len().min(FIFO)];
        self.typed.lock().unwrap().extend(taken);
        self.console.publish(taken);
        Ok(taken.len())
    }
}

/// How much its serial port takes at a time.
const FIFO: usize = 3;

/// A server before a fake VM, in a folder of its own. Dropping it ends it.
pub struct Bed {
    pub folder: tempfile::TempDir,
    pub vm: Arc<FakeVm>,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Bed {
    pub fn new() -> Self {
        Self::limited(Limits::default())
    }

    pub fn limited(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let vm = Arc::new(FakeVm::default());
        let (stop, thread) = serve(
            &folder,
            Arc::clone(&vm) as _,
            vm.events.clone(),
            vm.console.clone(),
            limits,
        );
        Self {
            folder,
            vm,
            stop,
            thread: Some(thread),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("vm.sock")
    }

    /// The body of a `vm.create` that is right.
    pub fn config(&self) -> String {
        let kernel = self.folder.path().join("vmlinux");
        std::fs::write(&kernel, "").unwrap();
        serde_json::json!({
            "payload": {"kernel": kernel, "cmdline": "console=ttyS0"},
            "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
            "memory": {"size": 128 << 20},
            "serial": {"mode": "Null"},
        })
        .to_string()
    }

    /// A VM that runs.
    pub fn boot(&self) {
        assert_eq!(self.put("vm.create", &self.config()).0, 204);
        assert_eq!(self.put("vm.boot", "").0, 204);
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        stream.set_write_timeout(patience).unwrap();
        stream
    }

    /// Sends raw bytes, and reads until the server closes.
    pub fn raw(&self, request: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may close before all is written.
        let _ = stream.write_all(request);
        rest(stream)
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        parted(
            &self.raw(
                format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes(),
            ),
        )
    }

    pub fn put(&self, call: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let request = format!(
            "PUT /api/v1/{call} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-length: {length}\r\n\r\n{body}"
        );
        parted(&self.raw(request.as_bytes()))
    }

    /// Whether it answers a request of somebody who behaves.
    pub fn is_well(&self) {
        assert_eq!(self.get("/api/v1/vmm.ping").0, 200);
    }

    pub fn stop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Serves `vm` at `vm.sock` in a folder, on a thread of its own.
pub fn serve(
    folder: &tempfile::TempDir,
    vm: Arc<dyn Vm>,
    events: Events,
    console: Console,
    limits: Limits,
) -> (Stop, JoinHandle<()>) {
    let socket = Socket::bind(&folder.path().join("vm.sock"), None, folder.path()).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_gantry"));
    let (listener, file) = socket.into_parts(program, folder.path()).unwrap();
    let server = Server::new(listener, limits).unwrap();
    let stop = server.stopper();
    let identity = Identity {
        name: "fake".to_owned(),
        allow_ungrouped: false,
        host: HostPaths::under(folder.path()),
        folders: None,
    };
    let thread = std::thread::spawn(move || {
        let _file = file;
        server.serve(vm, events, console, identity);
    });
    (stop, thread)
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the server still writes.
pub fn rest(mut stream: UnixStream) -> String {
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => answer.extend(&buffer[..length]),
            // It closed with bytes of the request unread.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}, after {:?}", String::from_utf8_lossy(&answer)),
        }
    }
    String::from_utf8(answer).unwrap()
}

/// Status and body of the first answer in a text.
pub fn parted(answer: &str) -> (u16, String) {
    let status = answer.get(9..12).and_then(|status| status.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (
        status.unwrap_or_else(|| panic!("no answer: {answer:?}")),
        body.to_owned(),
    )
}
