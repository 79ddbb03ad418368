//! Answers requests: finds the call, reads its body, sends the command to the VM, writes the answer.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use gantry_resources::base::json::{Document, JsonError};
use gantry_resources::holding::{Maintenance, maintenance};
use gantry_vmm::Error;
use gantry_vmm::command::{
    Answer, Attach, Command, CommandError, DeferredConfig, Detach, DeviceCounters, SentDevice,
    VmInfo,
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{EXPECT, UPGRADE};
use hyper::upgrade::OnUpgrade;
use hyper::{Request, StatusCode};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::connections::ConnectionSlot;
use super::console::{self, Attachment, Console};
use super::descriptors::Descriptors;
use super::metrics::{self, ApiMetrics};
use super::reply::{self, HttpError, HttpResponse};
use super::routes::{self, Call};
use super::settings::{Identity, Limits};
use super::wire::{self, AddedDevices, AddedDisk, Event, RemoveDevice, ResizeDisk, VmmPing};
use super::{Events, Vm, openapi};
use crate::config::{self, LoadOptions, SourceText};

/// How long an unused body is read, so that its sender reads the answer.
const DRAIN: Duration = Duration::from_secs(2);

/// What the handlers of all requests share.
pub struct Handlers {
    pub vm: Arc<dyn Vm>,
    pub events: Events,
    pub console: Console,
    pub identity: Identity,
    pub api_metrics: ApiMetrics,
    pub limits: Limits,
}

impl Handlers {
    /// Answers one request after reading all of it: a client that is still writing reads no answer.
    pub async fn answer(
        &self,
        mut request: Request<Incoming>,
        received: &Descriptors,
        slot: Arc<ConnectionSlot>,
    ) -> HttpResponse {
        let route = routes::find(request.method(), request.uri().path());
        let upgrade = console_upgrade(&mut request);
        let body = match &route {
            Ok(_) => self.body(request).await,
            Err(_) => {
                skip(request).await;
                Ok(Bytes::new())
            }
        };
        let files = received.take();
        let in_use = slot.in_use();
        let (name, answer) = match (route, body) {
            (Ok(route), Ok(_)) if route.call == Call::Console => {
                (route.path, self.attach(upgrade, &slot))
            }
            (Ok(route), Ok(body)) => {
                let answer = match files {
                    Ok(files) => self.call(route.call, &body, files).await,
                    Err(lost) => {
                        let status = StatusCode::SERVICE_UNAVAILABLE;
                        Err(HttpError::new(status, lost.to_string()))
                    }
                };
                (route.path, answer)
            }
            (Ok(route), Err(refusal)) => (route.path, Err(refusal)),
            (Err(refusal), _) => ("none", Err(refusal)),
        };
        let answer = answer.unwrap_or_else(|refusal| reply::refused(&refusal));
        self.api_metrics.answered(name, answer.status());
        answer.map(|payload| payload.keep(in_use))
    }

    async fn call(
        &self,
        call: Call,
        body: &[u8],
        files: Vec<File>,
    ) -> Result<HttpResponse, HttpError> {
        if !files.is_empty() && call != Call::AddDevice {
            let what = "descriptors came with the request: only `vm.add-device` takes some";
            return Err(HttpError::malformed(what.to_owned()));
        }
        let command = match call {
            Call::Ping => return Ok(reply::json(&self.ping())),
            Call::Info => return Ok(reply::json(&wire::VmInfo::from(&self.info()?))),
            Call::Counters => return Ok(reply::json(&wire::counters(&self.counters().await?))),
            Call::AddDevice => return self.add_device(body, files).await,
            Call::AddDisk => return self.add_disk(body).await,
            Call::Events => return self.subscribe(),
            Call::Console => return Err(no_upgrade()),
            Call::OpenApi => return Ok(reply::json(&openapi::document())),
            Call::Metrics => return self.metrics().await,
            Call::RemoveDevice => Command::Detach(detach(body)?),
            Call::ResizeDisk => resize_disk(body)?,
            Call::Create => self.create(body)?,
            Call::Quit => Command::Quit,
            Call::Boot => Command::Boot,
            Call::Delete => Command::Delete,
            Call::Shutdown => Command::Shutdown,
            Call::Reboot => Command::Reboot,
            Call::Pause => Command::Pause,
            Call::Resume => Command::Resume,
            Call::PowerButton => Command::PowerButton,
            Call::Nmi => Command::Nmi,
        };
        self.ask(command).await?;
        Ok(reply::done())
    }

    /// What the VM answers.
    async fn ask(&self, command: Command) -> Result<Answer, HttpError> {
        let (sender, receiver) = oneshot::channel();
        // The client may have gone.
        let reply = Box::new(|answer| drop(sender.send(answer)));
        self.vm.ask(command, reply);
        match timeout(self.limits.answer, receiver).await {
            Ok(Ok(answer)) => Ok(answer?),
            Ok(Err(_)) => {
                let what = "the VM ended before it answered";
                Err(HttpError::new(StatusCode::SERVICE_UNAVAILABLE, what))
            }
            Err(_) => {
                let what = format!("the VM did not answer in {:?}", self.limits.answer);
                Err(HttpError::new(StatusCode::GATEWAY_TIMEOUT, what))
            }
        }
    }

    fn ping(&self) -> VmmPing {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        VmmPing {
            build_version: format!("gantry-{version}"),
            version,
            pid: std::process::id(),
            features: vec!["kvm".to_owned(), "vfio".to_owned()],
            name: self.identity.name.clone(),
        }
    }

    fn info(&self) -> Result<VmInfo, HttpError> {
        Ok(self.vm.info()?)
    }

    async fn counters(&self) -> Result<Vec<DeviceCounters>, HttpError> {
        match self.ask(Command::Counters).await? {
            Answer::Counters(counters) => Ok(counters),
            other => Err(mixed_up(&other)),
        }
    }

    fn create(&self, body: &[u8]) -> Result<Command, HttpError> {
        let text = text(body)?.to_owned();
        let Identity {
            name,
            allow_ungrouped,
            host,
            folders,
        } = self.identity.clone();
        // This opens files, so the thread that owns the VM does it.
        let make = move || {
            if let Some(Maintenance { reason, .. }) = maintenance(&host).map_err(Error::from)? {
                return Err(Error::Maintenance(reason).into());
            }
            let extras = LoadOptions {
                name: None,
                allow_ungrouped,
                host,
                slots: config::SLOTS,
                // Who may boot any file may attach any, too.
                later_disks: folders.is_none().then(|| "/".into()).into_iter().collect(),
                folders,
            };
            let written = SourceText {
                text: &text,
                file: "the body",
                folder: Path::new(""),
            };
            let config = config::parse(&written, &name, &extras);
            let config = config.inspect(|config| config::warn_of_groups(config, &extras.host));
            config.map_err(|error| CommandError::Invalid(error.into()))
        };
        Ok(Command::Create(DeferredConfig(Box::new(make))))
    }

    async fn add_device(&self, body: &[u8], files: Vec<File>) -> Result<HttpResponse, HttpError> {
        let body = text(body)?;
        let mut files = files.into_iter();
        let attach = match (files.next(), files.next(), files.next()) {
            (None, ..) => config::attach(body, self.identity.allow_ungrouped),
            (Some(cdev), iommufd, None) => config::sent(body).map(|request| {
                Attach::Sent(SentDevice {
                    request,
                    cdev,
                    iommufd,
                })
            }),
            _ => {
                let what = "more than 2 descriptors came with the request: send a device's cdev, and an iommufd";
                return Err(HttpError::malformed(what.to_owned()));
            }
        };
        let attach = attach.map_err(|error| HttpError::malformed(error.to_string()))?;
        match self.ask(Command::Attach(attach)).await? {
            Answer::Attached(devices) => {
                let Some(first) = devices.first() else {
                    return Ok(reply::done());
                };
                Ok(reply::json(&AddedDevices {
                    id: first.id.clone(),
                    bdf: first.guest.to_string(),
                    devices: devices.iter().map(wire::Device::from).collect(),
                }))
            }
            _ => Ok(reply::done()),
        }
    }

    async fn add_disk(&self, body: &[u8]) -> Result<HttpResponse, HttpError> {
        let attach = config::attach_disk(text(body)?, self.identity.folders.as_ref());
        let attach = attach.map_err(|error| HttpError::malformed(error.to_string()))?;
        match self.ask(Command::Attach(attach)).await? {
            Answer::Attached(devices) if !devices.is_empty() => {
                let disk = devices.first().map(AddedDisk::from);
                Ok(reply::json(&disk))
            }
            _ => Ok(reply::done()),
        }
    }

    fn subscribe(&self) -> Result<HttpResponse, HttpError> {
        let ended = || HttpError::new(StatusCode::SERVICE_UNAVAILABLE, "the VM ends");
        // Subscribe before reading the state, so that no change is missed.
        let subscription = self.events.subscribe().ok_or_else(ended)?;
        let state = self.vm_state()?;
        Ok(reply::lines(subscription.stream(Event::State { state })))
    }

    /// Attaches the connection to the console, once the answer is written.
    fn attach(
        &self,
        upgrade: Option<OnUpgrade>,
        slot: &Arc<ConnectionSlot>,
    ) -> Result<HttpResponse, HttpError> {
        let upgrade = upgrade.ok_or_else(no_upgrade)?;
        console::check(&*self.vm)?;
        let attachment = Attachment {
            upgrade,
            console: self.console.clone(),
            vm: Arc::clone(&self.vm),
            slot: Arc::clone(slot),
        };
        tokio::spawn(attachment.serve());
        Ok(reply::upgraded(console::PROTOCOL))
    }

    fn vm_state(&self) -> Result<Option<wire::VmState>, HttpError> {
        match self.info() {
            Ok(info) => Ok(Some(info.state.into())),
            Err(refusal) if refusal.status == StatusCode::NOT_FOUND => Ok(None),
            Err(refusal) => Err(refusal),
        }
    }

    async fn metrics(&self) -> Result<HttpResponse, HttpError> {
        let vm = match self.info() {
            Ok(info) => Some((info, self.counters().await?)),
            Err(refusal) if refusal.status == StatusCode::NOT_FOUND => None,
            Err(refusal) => return Err(refusal),
        };
        let vm = vm.as_ref().map(|(info, counters)| (info, &counters[..]));
        let text = metrics::text(&self.identity.name, vm, &self.api_metrics);
        let text = text.map_err(|error| {
            HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
        })?;
        Ok(reply::text(metrics::CONTENT_TYPE, text))
    }

    /// The whole body, within bounds of size and time.
    async fn body(&self, request: Request<Incoming>) -> Result<Bytes, HttpError> {
        let most = self.limits.body_bytes;
        let waits = waits(&request);
        let mut body = request.into_body();
        let declared = body.size_hint().lower();
        let whole = async {
            if declared > most as u64 {
                return Ok(None);
            }
            match Limited::new(&mut body, most).collect().await {
                Ok(whole) => Ok(Some(whole.to_bytes())),
                Err(error) if error.is::<LengthLimitError>() => Ok(None),
                Err(error) => Err(HttpError::malformed(format!("the body: {error}"))),
            }
        };
        let whole = match timeout(self.limits.body, whole).await {
            Ok(whole) => whole?,
            Err(_) => {
                let what = format!("the body did not come in {:?}", self.limits.body);
                return Err(HttpError::new(StatusCode::REQUEST_TIMEOUT, what));
            }
        };
        if let Some(whole) = whole {
            return Ok(whole);
        }
        if !waits {
            drain(body).await;
        }
        let what = format!("the body is larger than {most} bytes");
        Err(HttpError::new(StatusCode::PAYLOAD_TOO_LARGE, what))
    }
}

/// The connection beneath a request, if it asks for a console.
fn console_upgrade(request: &mut Request<Incoming>) -> Option<OnUpgrade> {
    let asked = request.headers().get(UPGRADE)?;
    let wanted = asked.as_bytes() == console::PROTOCOL.as_bytes();
    wanted.then(|| hyper::upgrade::on(request))
}

fn no_upgrade() -> HttpError {
    let what = format!(
        "a console is no answer: send `Connection: Upgrade` and `Upgrade: {}`, as `gantry vm console` does",
        console::PROTOCOL
    );
    HttpError::new(StatusCode::UPGRADE_REQUIRED, what)
}

fn detach(body: &[u8]) -> Result<Detach, HttpError> {
    let text = text(body)?;
    let read = || {
        let mut document = Document::parse(Path::new("the body"), text)?;
        let detach = document
            .decode()
            .and_then(|RemoveDevice { id, force_after }| {
                let time = force_after.map(Duration::try_from_secs_f64).transpose();
                let wrong = |_| document.mistake("force_after", NO_TIME);
                let force_after = time.map_err(wrong).ok()?;
                Some(Detach { id, force_after })
            });
        document.finish(detach)
    };
    read().map_err(|error: JsonError| HttpError::malformed(error.to_string()))
}

fn resize_disk(body: &[u8]) -> Result<Command, HttpError> {
    let text = text(body)?;
    let read = || {
        let mut document = Document::parse(Path::new("the body"), text)?;
        let resize = document.decode();
        document.finish(resize)
    };
    let resize: Result<ResizeDisk, JsonError> = read();
    let ResizeDisk { id, desired_size } =
        resize.map_err(|error| HttpError::malformed(error.to_string()))?;
    let bytes = desired_size;
    Ok(Command::ResizeDisk { id, bytes })
}

const NO_TIME: &str = "this is no time: write a number of seconds, such as 2.5";

fn text(body: &[u8]) -> Result<&str, HttpError> {
    std::str::from_utf8(body).map_err(|_| HttpError::malformed("the body is not text: send JSON"))
}

/// Lets the client send a body that is not used.
async fn skip(request: Request<Incoming>) {
    if !waits(&request) {
        drain(request.into_body()).await;
    }
}

/// Whether the client waits for `100 Continue` before it sends the body.
fn waits(request: &Request<Incoming>) -> bool {
    request.headers().contains_key(EXPECT)
}

/// Reads the rest of a body and drops it.
async fn drain(mut body: Incoming) {
    let rest = async { while let Some(Ok(_)) = body.frame().await {} };
    let _ = timeout(DRAIN, rest).await;
}

/// The VM's answer does not fit the command: a bug in gantry.
fn mixed_up(answer: &Answer) -> HttpError {
    tracing::error!(?answer, "the VM's answer does not fit the command");
    let what = "the VM's answer does not fit the command: this is a bug in gantry";
    HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, what)
}
