//! The events that the control thread of a VM handles.

use gantry_devices::panic::Panic;
use gantry_devices::pci::PortIndex;

use crate::command::{Command, CommandError, Reply};
use crate::passthrough::{DeviceEvent, DeviceKey};
use crate::process::event_loop::{self, Refusal};
use crate::vcpus::VcpuFault;

/// What happened.
pub enum Event {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU cannot go on; all are pausing.
    Fault(u8, VcpuFault),
    /// A signal asked gantry to end.
    Signal(i32),
    /// The user ended the VM from its console.
    Quit,
    /// The guest's kernel has panicked.
    Panic(Panic),
    /// The guest has released the devices in a slot.
    Eject(PortIndex),
    /// Something happened to a device of the host.
    Device(DeviceKey, DeviceEvent),
    /// The attach worker has finished a job.
    AttachDone,
    /// A client wants something done.
    Command(Command, Reply),
}

impl Event {
    /// Whether the guest caused it: a reset voids it.
    pub fn is_of_guest(&self) -> bool {
        match self {
            Self::PowerOff | Self::Reset | Self::Fault(..) | Self::Eject(_) | Self::Panic(_) => {
                true
            }
            Self::Device(_, event) => *event == DeviceEvent::Enabled,
            Self::Signal(_) | Self::Quit | Self::AttachDone | Self::Command(..) => false,
        }
    }
}

impl event_loop::Event for Event {
    /// The events that do not repeat are bounded by the number of slots, devices and vCPUs.
    fn repeats(&self, waiting: &Self) -> bool {
        match (self, waiting) {
            (Self::PowerOff, Self::PowerOff)
            | (Self::Reset, Self::Reset)
            | (Self::Quit, Self::Quit)
            | (Self::AttachDone, Self::AttachDone) => true,
            (Self::Fault(vcpu, _), Self::Fault(other, _)) => vcpu == other,
            (Self::Signal(number), Self::Signal(other)) => number == other,
            (Self::Panic(panic), Self::Panic(other)) => panic == other,
            (Self::Eject(port), Self::Eject(other)) => port == other,
            (Self::Device(key, event), Self::Device(other, same)) => key == other && event == same,
            _ => false,
        }
    }

    fn is_request(&self) -> bool {
        matches!(self, Self::Command(..))
    }

    fn refuse(self, why: Refusal) {
        if let Self::Command(_, reply) = self {
            reply(Err(match why {
                Refusal::Full => CommandError::Busy,
                Refusal::Closed => CommandError::Ending,
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use gantry_devices::pci::PciSegment;

    use super::*;
    use crate::command::Answer;
    use crate::process::event_loop::Mailbox;

    /// A command, and where its answer will be.
    fn ask(mailbox: &Mailbox<Event>) -> Receiver<Result<Answer, CommandError>> {
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
        let forgotten = mailbox.extract(Event::is_of_guest);
        let [Event::Reset, Event::Eject(ejected), Event::PowerOff] = forgotten[..] else {
            panic!("{} events", forgotten.len());
        };
        assert_eq!(ejected, port);
        let left = mailbox.extract(|_| true);
        assert!(matches!(left[..], [Event::Command(..), Event::Signal(15)]));
        assert!(answers.try_recv().is_err(), "nobody has answered");
    }

    #[test]
    fn an_event_that_waits_is_not_posted_again() {
        let pci = &mut PciSegment::new([0..=2]).unwrap();
        let ports = [(); 2].map(|()| pci.add_root_port(0).unwrap());
        let mailbox = Mailbox::new().unwrap();
        let key = DeviceKey::unique();
        for _ in 0..1000 {
            for port in ports {
                mailbox.post(Event::Eject(port));
            }
            mailbox.post(Event::Device(key, DeviceEvent::Enabled));
            mailbox.post(Event::PowerOff);
            mailbox.post(Event::Panic(Panic::End));
            mailbox.post(Event::Signal(1));
            mailbox.post(Event::AttachDone);
        }
        assert_eq!(mailbox.extract(|_| true).len(), 7);
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
}
