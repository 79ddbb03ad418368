//! The worker's jobs and their order.

use super::*;
use crate::command::Answer;
use crate::control::{ControlLoop, Mailbox};

const MIB: u64 = 1 << 20;

type Answers = Receiver<Result<Answer, CommandError>>;

fn attach(id: &str) -> (Job, Answers) {
    let (sender, answers) = channel();
    let attach = Attach {
        id: Some(id.to_owned()),
        wanted: DeviceSelector::Plan("gpu".to_owned()),
    };
    let reply = move |answer| drop(sender.send(answer));
    let job = Job {
        attach,
        reply: Box::new(reply),
        slots: 1,
    };
    (job, answers)
}

#[test]
fn a_vm_that_ends_opens_nothing_more() {
    let [(first, _), (second, answer), (third, other)] = ["first", "second", "third"].map(attach);
    let (sender, given) = channel();
    let ending: Arc<AtomicBool> = Arc::default();
    let mut jobs = Jobs {
        given,
        ending: Arc::clone(&ending),
    };
    for job in [first, second, third] {
        sender.send(job).unwrap();
    }
    drop(sender);
    let job = jobs.next().unwrap();
    assert_eq!(job.attach.id.as_deref(), Some("first"));
    ending.store(true, Ordering::Release);
    assert!(jobs.next().is_none());
    for answers in [answer, other] {
        assert!(matches!(answers.try_recv(), Ok(Err(CommandError::Ending))));
    }
}

#[test]
fn what_was_prepared_for_a_vm_that_ends_is_not_left_for_the_next_one() {
    let mailbox = Mailbox::new().unwrap();
    let (job, answers) = attach("late");
    let prepared = Prepared {
        attach: job.attach,
        reply: job.reply,
        devices: Err(Error::NoNested),
        steps: Steps::begin(),
    };
    mailbox.post(Event::Signal(1));
    mailbox.post(Event::Prepared(Box::new(prepared)));
    mailbox.post(Event::Quit);
    let taken = mailbox.take_prepared();
    assert_eq!(taken.len(), 1);
    taken.into_iter().for_each(Prepared::give_up);
    assert!(matches!(answers.try_recv(), Ok(Err(CommandError::Ending))));
    assert!(mailbox.take_prepared().is_empty());
    let mut control = ControlLoop::new(mailbox).unwrap();
    let now = Some(Instant::now());
    assert!(matches!(control.next(now), Ok(Some(Event::Signal(1)))));
    assert!(matches!(control.next(now), Ok(Some(Event::Quit))));
}

fn room() -> Room {
    Room {
        ram: vec![0..=512 * MIB - 1, 4096 * MIB..=5000 * MIB - 1],
        windows: vec![2048 * MIB..=3000 * MIB - 1],
    }
}

#[test]
fn a_device_that_reserves_ram_or_windows_is_noticed() {
    let room = room();
    let free = [512 * MIB..=600 * MIB, 3000 * MIB..=4096 * MIB - 1];
    assert_eq!(room.conflict(&free), None);
    for taken in [0..=0, 512 * MIB - 1..=512 * MIB, 2999 * MIB..=3000 * MIB] {
        let reserved = [free[0].clone(), taken.clone()];
        assert_eq!(room.conflict(&reserved), Some(&taken));
    }
}

#[test]
fn ram_beyond_the_iommu_is_noticed() {
    let room = room();
    assert_eq!(room.unmappable(&[]), None, "nothing is known");
    assert_eq!(room.unmappable(&[0..=u64::MAX]), None);
    assert_eq!(room.unmappable(&[0..=4096 * MIB]), Some(&room.ram[1]));
}
