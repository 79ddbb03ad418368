//! The worker's jobs and their order.

use super::*;
use crate::command::{Answer, Attach};
use crate::error::Error;

type Answers = Receiver<Result<Answer, CommandError>>;

fn attach(id: &str) -> (AttachJob, Answers) {
    let (sender, answers) = channel();
    let attach = Attach::Plan {
        name: "gpu".to_owned(),
        id: Some(id.to_owned()),
    };
    let reply = move |answer| drop(sender.send(answer));
    let job = AttachJob {
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
    let jobs = JobQueue {
        given,
        ending: Arc::clone(&ending),
    };
    for job in [first, second, third] {
        sender.send(job).unwrap();
    }
    drop(sender);
    let job = jobs.next().unwrap();
    assert_eq!(job.attach.id(), Some("first"));
    ending.store(true, Ordering::Release);
    assert!(jobs.next().is_none());
    for answers in [answer, other] {
        assert!(matches!(answers.try_recv(), Ok(Err(CommandError::Ending))));
    }
}

#[test]
fn devices_that_come_too_late_for_a_vm_are_left_to_its_end_and_then_closed() {
    let (done, results) = channel();
    let worker = AttachWorker {
        jobs: None,
        ending: Arc::default(),
        results,
        thread: None,
    };
    let result = |id| {
        let (job, answers) = attach(id);
        let result = AttachResult {
            attach: job.attach,
            reply: job.reply,
            devices: Err(Error::NoNested),
            steps: AttachSteps::start(),
        };
        (result, answers)
    };
    let [(taken, _), (late, answer), (stray, other)] = ["taken", "late", "stray"].map(result);
    done.send(taken).unwrap();
    done.send(late).unwrap();
    let taken = worker.take_result().unwrap();
    assert_eq!(taken.attach.id(), Some("taken"));
    let left = worker.end();
    let ids = left.iter().map(|result| result.attach.id());
    assert_eq!(ids.collect::<Vec<_>>(), [Some("late")]);
    left.into_iter().for_each(AttachResult::cancel);
    // From a worker that the VM did not wait for.
    let Err(SendError(stray)) = done.send(stray) else {
        panic!("the VM is gone");
    };
    stray.cancel();
    for answers in [answer, other] {
        assert!(matches!(answers.try_recv(), Ok(Err(CommandError::Ending))));
    }
}
