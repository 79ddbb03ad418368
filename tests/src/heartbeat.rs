//! Keeps the lab host's processors awake: each is woken by another one several times a second.
//!
//! QEMU's emulation of SVM clears a bit of a processor's word of pending interrupts without the lock
//! that everyone else takes to set one, so that an interrupt that arrives while a nested guest exits
//! can be forgotten until the next one comes. A processor that idles and waits for nothing but its
//! timer then sleeps for ever ("possible timer handling issue", says the kernel), and with it whatever
//! ran there. An interrupt from another processor brings the forgotten one along.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Seldom enough to cost a guest nothing that can be measured.
const PERIOD: Duration = Duration::from_millis(100);

/// Starts one thread a processor, for as long as this process lives.
pub fn start() -> io::Result<()> {
    let processors = thread::available_parallelism()?.get();
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..processors).map(|_| channel()).unzip();
    for (processor, receiver) in receivers.into_iter().enumerate() {
        let next = senders.get((processor + 1) % processors).cloned();
        let Some(next) = next else { continue };
        thread::Builder::new()
            .name(format!("heartbeat {processor}"))
            .spawn(move || {
                if stay_on(processor).is_ok() {
                    beat(&receiver, &next);
                }
            })?;
    }
    Ok(())
}

/// Wakes the next processor unless this one has just been woken: whichever still has its timer begins.
fn beat(woken: &Receiver<()>, next: &Sender<()>) {
    loop {
        match woken.recv_timeout(PERIOD) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => {
                if next.send(()).is_err() {
                    return;
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn stay_on(processor: usize) -> nix::Result<()> {
    let mut only = CpuSet::new();
    only.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &only)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_its_timer_is_woken() {
        let (to_sleeper, sleeper) = channel();
        let (to_waker, waker) = channel();
        thread::spawn(move || beat(&waker, &to_sleeper));
        // This one never times out by itself.
        for _ in 0..2 {
            assert!(sleeper.recv_timeout(Duration::from_secs(60)).is_ok());
        }
        drop(to_waker);
    }
}
