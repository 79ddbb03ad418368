//! What is posted, repeated, refused and waited for.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::*;

/// An event of a guest, or a request with where its refusal is told.
enum Posted {
    Guest(u32),
    Request(Sender<Refusal>),
}

impl Event for Posted {
    fn repeats(&self, waiting: &Self) -> bool {
        matches!((self, waiting), (Self::Guest(one), Self::Guest(other)) if one == other)
    }

    fn is_request(&self) -> bool {
        matches!(self, Self::Request(_))
    }

    fn refuse(self, why: Refusal) {
        if let Self::Request(sender) = self {
            sender.send(why).unwrap();
        }
    }
}

fn request(mailbox: &Mailbox<Posted>) -> Receiver<Refusal> {
    let (sender, refusals) = channel();
    mailbox.post(Posted::Request(sender));
    refusals
}

#[test]
fn some_events_are_taken_out_and_the_others_stay_in_order() {
    let mailbox = Mailbox::new().unwrap();
    mailbox.post(Posted::Guest(1));
    let refusals = request(&mailbox);
    mailbox.post(Posted::Guest(2));
    mailbox.post(Posted::Guest(3));
    let taken = mailbox.extract(|event| matches!(event, Posted::Guest(1 | 3)));
    assert!(matches!(taken[..], [Posted::Guest(1), Posted::Guest(3)]));
    assert!(matches!(mailbox.take(), Some(Posted::Request(_))));
    assert!(matches!(mailbox.take(), Some(Posted::Guest(2))));
    assert!(mailbox.take().is_none());
    assert!(refusals.try_recv().is_err(), "nobody has refused it");
}

#[test]
fn nobody_can_fill_the_mailbox() {
    let mailbox = Mailbox::new().unwrap();
    for _ in 0..1000 {
        (0..6).for_each(|number| mailbox.post(Posted::Guest(number)));
    }
    assert_eq!(mailbox.lock().events.len(), 6);
    let asked: Vec<_> = (0..=MAX_REQUESTS).map(|_| request(&mailbox)).collect();
    let refused: Vec<_> = asked
        .iter()
        .filter_map(|refusals| refusals.try_recv().ok())
        .collect();
    assert_eq!(refused, [Refusal::Full]);
    assert!(
        asked[MAX_REQUESTS].try_recv().is_err(),
        "it was the last one"
    );
    assert!(matches!(mailbox.take(), Some(Posted::Guest(0))));
    assert!(matches!(mailbox.take(), Some(Posted::Guest(1))));
    mailbox.post(Posted::Guest(0));
    assert_eq!(
        mailbox.lock().events.len(),
        5 + MAX_REQUESTS,
        "it is news again"
    );
}

#[test]
fn a_closed_mailbox_refuses_what_was_and_is_posted() {
    let mailbox = Mailbox::new().unwrap();
    let before = request(&mailbox);
    mailbox.close();
    let after = request(&mailbox);
    for refusals in [before, after] {
        assert_eq!(refusals.try_recv(), Ok(Refusal::Closed));
    }
}

#[test]
fn the_next_event_is_waited_for_until_the_deadline() {
    let mailbox = Mailbox::new().unwrap();
    let mut events = EventLoop::new(Arc::clone(&mailbox)).unwrap();
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(20);
    assert!(events.next(Some(deadline)).unwrap().is_none());
    assert!(begun.elapsed() >= Duration::from_millis(20));
    mailbox.post(Posted::Guest(0));
    let event = events.next(Some(deadline)).unwrap();
    assert!(matches!(event, Some(Posted::Guest(0))), "though it is over");
}
