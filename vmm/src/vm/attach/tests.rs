//! The worker's jobs and their order.

use super::*;
use crate::command::Answer;

const MIB: u64 = 1 << 20;

type Answers = Receiver<Result<Answer, CommandError>>;

fn attach(id: &str) -> (Job, Answers) {
    let (sender, answers) = channel();
    let attach = Attach {
        id: Some(id.to_owned()),
        wanted: Wanted::Plan("gpu".to_owned()),
    };
    let reply = move |answer| drop(sender.send(answer));
    (Job::Attach(attach, Box::new(reply)), answers)
}

fn close() -> Job {
    Job::Close {
        devices: Vec::new(),
        forced: None,
    }
}

fn jobs(given: impl IntoIterator<Item = Job>) -> Jobs {
    let (sender, jobs) = channel();
    given.into_iter().for_each(|job| sender.send(job).unwrap());
    Jobs {
        given: jobs,
        waiting: VecDeque::new(),
        ending: Arc::default(),
    }
}

fn what(job: Option<Job>) -> String {
    match job {
        Some(Job::Attach(attach, _)) => attach.id.unwrap(),
        Some(Job::Close { .. }) => "close".to_owned(),
        None => "end".to_owned(),
    }
}

#[test]
fn closing_comes_before_opening() {
    let [(first, _), (second, _)] = ["first", "second"].map(attach);
    let mut jobs = jobs([first, second, close()]);
    let order = [(); 4].map(|()| what(jobs.next()));
    assert_eq!(order, ["close", "first", "second", "end"]);
}

#[test]
fn a_vm_that_ends_opens_nothing_more_and_closes_everything() {
    let [(first, answer), (second, other)] = ["first", "second"].map(attach);
    let mut jobs = jobs([first, close(), second, close()]);
    jobs.ending.store(true, Ordering::Release);
    let order = [(); 3].map(|()| what(jobs.next()));
    assert_eq!(order, ["close", "close", "end"]);
    for answers in [answer, other] {
        assert!(matches!(answers.try_recv(), Ok(Err(CommandError::Ending))));
    }
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
