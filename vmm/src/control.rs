//! The control loop: the thread that owns the VM waits here for what threads, signals and the
//! terminal have to say.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use gantry_devices::panic::Panic;
use gantry_devices::pci::PortIndex;
use gantry_resources::base::DeviceName;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::command::{Command, CommandError, Reply};
use crate::error::Error;
use crate::vcpus::VcpuFault;
use crate::vm::{Alarm, AlarmKey, Prepared};

/// What happened.
pub enum Event {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU cannot go on; all are pausing.
    VcpuFault(u8, VcpuFault),
    /// Someone sent gantry a signal that asks it to end.
    Signal(i32),
    /// The user ended the VM from its console.
    Quit,
    /// The guest's kernel has panicked.
    Panic(Panic),
    /// The guest has let go of what is in a slot.
    Eject(PortIndex),
    /// The guest has switched a device of the host on.
    Enabled(DeviceName),
    /// The host has something to say of a device.
    Alarm(AlarmKey, Alarm),
    /// Devices that a client wants are ready to be plugged in, or are not to be had.
    Prepared(Box<Prepared>),
    /// A client wants something done.
    Command(Command, Reply),
}

impl Event {
    /// Whether it says what another one says, which waits already. Guests and devices can say it again at any
    /// rate; what is left is bounded by the number of slots, devices and vCPUs.
    fn repeats(&self, waiting: &Self) -> bool {
        match (self, waiting) {
            (Self::PowerOff, Self::PowerOff)
            | (Self::Reset, Self::Reset)
            | (Self::Quit, Self::Quit) => true,
            (Self::VcpuFault(vcpu, _), Self::VcpuFault(other, _)) => vcpu == other,
            (Self::Signal(number), Self::Signal(other)) => number == other,
            (Self::Panic(panic), Self::Panic(other)) => panic == other,
            (Self::Eject(port), Self::Eject(other)) => port == other,
            (Self::Enabled(name), Self::Enabled(other)) => name == other,
            (Self::Alarm(key, alarm), Self::Alarm(other, same)) => key == other && alarm == same,
            _ => false,
        }
    }
}

/// How many commands of clients may wait. Each takes the control thread microseconds, so that more are there only
/// if that thread does not get on.
const MOST_COMMANDS: usize = 64;

/// Events on their way to the control thread. Any thread may post; none waits.
pub struct Mailbox {
    queue: Mutex<Queue>,
    bell: EventFd,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Event>,
    /// Nobody takes events any more.
    closed: bool,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            queue: Mutex::default(),
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// Leaves an event for the control thread, unless it says what another one says that is there. A client whose
    /// command is one too many is answered so.
    pub fn post(&self, event: Event) {
        let mut queue = self.lock();
        if queue.closed {
            drop(queue);
            return refuse(event, || CommandError::Ending);
        }
        if matches!(event, Event::Command(..)) {
            let commands = queue.events.iter();
            let commands = commands.filter(|event| matches!(event, Event::Command(..)));
            if commands.count() >= MOST_COMMANDS {
                drop(queue);
                return refuse(event, || CommandError::Busy);
            }
        } else if queue.events.iter().any(|waiting| event.repeats(waiting)) {
            return;
        }
        queue.events.push_back(event);
        drop(queue);
        // Fails only when the counter is full, and then the bell rings already.
        let _ = self.bell.write(1);
    }

    /// Forgets what the guest asked for, and keeps what came from outside. Returns the slots that it
    /// has emptied, which nobody has been told of.
    pub fn forget_guest(&self) -> Vec<PortIndex> {
        let mut queue = self.lock();
        let emptied = queue.events.iter().filter_map(|event| match event {
            Event::Eject(port) => Some(*port),
            _ => None,
        });
        let emptied = emptied.collect();
        queue.events.retain(|event| match event {
            Event::Signal(_) | Event::Quit | Event::Command(..) => true,
            Event::Prepared(_) | Event::Alarm(..) => true,
            Event::PowerOff | Event::Reset | Event::VcpuFault(..) => false,
            Event::Eject(_) | Event::Enabled(_) | Event::Panic(_) => false,
        });
        emptied
    }

    /// Takes out what was prepared for a VM that ends.
    pub fn take_prepared(&self) -> Vec<Prepared> {
        let mut queue = self.lock();
        let mut prepared = Vec::new();
        for event in std::mem::take(&mut queue.events) {
            match event {
                Event::Prepared(one) => prepared.push(*one),
                other => queue.events.push_back(other),
            }
        }
        prepared
    }

    /// Answers whoever still asks that the VM is ending, now and from now on.
    pub fn close(&self) {
        let mut queue = self.lock();
        queue.closed = true;
        let left = std::mem::take(&mut queue.events);
        drop(queue);
        refuse_all(left);
    }

    /// Whether nobody takes events any more.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn take(&self) -> Option<Event> {
        self.lock().events.pop_front()
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refuse_all(events: VecDeque<Event>) {
    for event in events {
        refuse(event, || CommandError::Ending);
    }
}

fn refuse(event: Event, why: impl FnOnce() -> CommandError) {
    match event {
        Event::Command(_, reply) => reply(Err(why())),
        Event::Prepared(prepared) => prepared.give_up(),
        _ => {}
    }
}

/// Waits for events.
pub struct ControlLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    mailbox: Arc<Mailbox>,
}

impl ControlLoop {
    /// A loop that hears the mailbox.
    ///
    /// # Errors
    /// The kernel refused an epoll instance.
    pub fn new(mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let mut manager: EventManager<Box<dyn MutEventSubscriber>> =
            EventManager::new().map_err(|error| io::Error::other(format!("{error:?}")))?;
        manager.add_subscriber(Box::new(Bell(Arc::clone(&mailbox))));
        Ok(Self { manager, mailbox })
    }

    /// Hears one more source.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Waits for the next event; `None` once the deadline, if there is one, is over.
    ///
    /// # Errors
    /// epoll failed.
    pub fn next(&mut self, deadline: Option<Instant>) -> io::Result<Option<Event>> {
        loop {
            if let Some(event) = self.mailbox.take() {
                return Ok(Some(event));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            // Rounded up, so as not to wake up too early; -1 is for ever.
            let wait = left.map_or(-1, |left| {
                i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
            });
            self.manager
                .run_with_timeout(wait)
                .map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
    }
}

/// Answers the bell: that it rang is all there is to know.
struct Bell(Arc<Mailbox>);

impl MutEventSubscriber for Bell {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        listen(ops, &self.0.bell);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.0.bell.read();
    }
}

/// The signals that ask gantry to end. They are blocked in every thread and read from a file.
pub struct Signals {
    fd: SignalFd,
    before: SigSet,
    /// The first that was found pending.
    came: OnceLock<i32>,
}

const ENDING: [Signal; 4] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
];

impl Signals {
    /// Blocks the signals for the calling thread and every thread it makes from now on, and SIGCONT, which
    /// the console reads where it is used; a process that is stopped goes on by it all the same. SIGTTOU is
    /// blocked too, so that a VM in the background writes to a terminal that is set to stop such a job
    /// (`stty tostop`). Dropping the value forgets those that came, since gantry ends already, and lets
    /// others through again.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn block() -> io::Result<Self> {
        let mut set: SigSet = ENDING.into_iter().collect();
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let mut before = SigSet::empty();
        set.add(Signal::SIGCONT);
        set.add(Signal::SIGTTOU);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        Ok(Self {
            fd,
            before,
            came: OnceLock::new(),
        })
    }

    /// Whether a signal has come: for the time before [`SignalWatch`] hears them. Any thread may
    /// ask.
    ///
    /// # Errors
    /// One has.
    pub fn check(&self) -> Result<(), Error> {
        if self.came.get().is_none()
            && let Some(signal) = self.read()
        {
            let _ = self.came.set(signal);
        }
        self.came
            .get()
            .map_or(Ok(()), |&signal| Err(Error::Interrupted(signal)))
    }

    fn read(&self) -> Option<i32> {
        let info = self.fd.read_signal().ok()??;
        i32::try_from(info.ssi_signo).ok()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        while self.read().is_some() {}
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.before), None);
    }
}

/// Posts the signals that come from now on.
pub struct SignalWatch {
    /// Where they come in.
    pub signals: Arc<Signals>,
    /// Where they are posted.
    pub mailbox: Arc<Mailbox>,
}

impl MutEventSubscriber for SignalWatch {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        listen(ops, &self.signals.fd);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        while let Some(signal) = self.signals.read() {
            self.mailbox.post(Event::Signal(signal));
        }
    }
}

fn listen(ops: &mut EventOps<'_>, source: &impl AsRawFd) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        tracing::error!(?error, "an event source is not heard");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    use gantry_devices::pci::PciSegment;

    use super::*;
    use crate::command::Answer;

    /// A command, and where its answer will be.
    fn ask(mailbox: &Mailbox) -> Receiver<Result<Answer, CommandError>> {
        let (sender, answers) = channel();
        let reply = move |answer| drop(sender.send(answer));
        mailbox.post(Event::Command(Command::Counters, Box::new(reply)));
        answers
    }

    #[test]
    fn a_reset_forgets_the_guest_and_keeps_clients() {
        let port = PciSegment::new([0..=1]).unwrap().add_root_port(0).unwrap();
        let mailbox = Mailbox::new().unwrap();
        mailbox.post(Event::Reset);
        let answers = ask(&mailbox);
        mailbox.post(Event::Eject(port));
        mailbox.post(Event::PowerOff);
        mailbox.post(Event::Signal(15));
        assert_eq!(mailbox.forget_guest(), [port]);
        assert!(matches!(mailbox.take(), Some(Event::Command(..))));
        assert!(matches!(mailbox.take(), Some(Event::Signal(15))));
        assert!(mailbox.take().is_none());
        assert!(answers.try_recv().is_err(), "nobody has answered");
    }

    #[test]
    fn nobody_can_fill_the_mailbox() {
        let pci = &mut PciSegment::new([0..=2]).unwrap();
        let ports = [(); 2].map(|()| pci.add_root_port(0).unwrap());
        let mailbox = Mailbox::new().unwrap();
        let name: DeviceName = "01:00.0".parse().unwrap();
        for _ in 0..1000 {
            for port in ports {
                mailbox.post(Event::Eject(port));
            }
            mailbox.post(Event::Enabled(name));
            mailbox.post(Event::PowerOff);
            mailbox.post(Event::Panic(Panic::End));
            mailbox.post(Event::Signal(1));
        }
        assert_eq!(mailbox.lock().events.len(), 6);
        let asked: Vec<_> = (0..=MOST_COMMANDS).map(|_| ask(&mailbox)).collect();
        let answered = asked.iter().filter_map(|answer| answer.try_recv().ok());
        let answered: Vec<_> = answered.collect();
        assert!(matches!(answered[..], [Err(CommandError::Busy)]));
        assert!(
            asked[MOST_COMMANDS].try_recv().is_err(),
            "it was the last one"
        );
        assert!(matches!(mailbox.take(), Some(Event::Eject(_))));
        assert!(matches!(mailbox.take(), Some(Event::Eject(_))));
        mailbox.post(Event::Eject(ports[0]));
        assert_eq!(
            mailbox.lock().events.len(),
            5 + MOST_COMMANDS,
            "it is news again"
        );
    }

    #[test]
    fn a_closed_mailbox_answers_whoever_asked_and_asks() {
        let mailbox = Mailbox::new().unwrap();
        let before = ask(&mailbox);
        mailbox.close();
        let after = ask(&mailbox);
        for answers in [before, after] {
            let answer = answers.try_recv().unwrap();
            assert!(matches!(answer, Err(CommandError::Ending)));
        }
    }

    #[test]
    fn the_next_event_is_waited_for_until_the_deadline() {
        let mailbox = Mailbox::new().unwrap();
        let mut control = ControlLoop::new(Arc::clone(&mailbox)).unwrap();
        let begun = Instant::now();
        let deadline = begun + Duration::from_millis(20);
        assert!(control.next(Some(deadline)).unwrap().is_none());
        assert!(begun.elapsed() >= Duration::from_millis(20));
        mailbox.post(Event::Quit);
        let event = control.next(Some(deadline)).unwrap();
        assert!(matches!(event, Some(Event::Quit)), "though it is over");
    }
}
