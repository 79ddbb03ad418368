//! The serial port: registers, interrupts, and lines that leave it.

use std::os::fd::OwnedFd;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;

/// Counts writes, and keeps what is written.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<Vec<u8>>>>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().push(data.to_vec());
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn written(&self) -> Vec<String> {
        let writes = std::mem::take(&mut *self.0.lock().unwrap());
        writes
            .into_iter()
            .map(|data| String::from_utf8(data).unwrap())
            .collect()
    }
}

fn serial() -> (Serial, Sink, EventFd) {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let sink = Sink::default();
    let serial = Serial::new(irq.try_clone().unwrap(), Box::new(sink.clone())).unwrap();
    (serial, sink, irq)
}

fn print(serial: &Serial, text: &str) {
    for byte in text.bytes() {
        assert!(matches!(serial.write(DATA, &[byte]), Effect::None));
    }
}

fn register(serial: &Serial, offset: u64) -> u8 {
    let mut data = [0];
    serial.read(offset, &mut data);
    data[0]
}

fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let timeout = PollTimeout::try_from(timeout).unwrap();
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).unwrap() == 1
}

#[test]
fn lines_leave_whole_and_at_once() {
    let (serial, sink, _) = serial();
    print(&serial, "one\ntwo\r\nthr");
    assert_eq!(sink.written(), ["one\n", "two\r\n"]);
    drop(serial);
    assert_eq!(sink.written(), ["thr"]);
}

#[test]
fn a_prompt_leaves_when_the_timer_says_so() {
    let (serial, sink, _) = serial();
    for _ in 0..2 {
        print(&serial, "login: ");
        assert_eq!(sink.written(), [""; 0]);
        assert!(readable(serial.timer(), Duration::from_secs(60)));
        serial.flush();
        assert_eq!(sink.written(), ["login: "]);
        assert!(!readable(serial.timer(), Duration::ZERO));
    }
    serial.flush();
    assert_eq!(sink.written(), [""; 0]);
}

#[test]
fn long_lines_do_not_wait_for_their_end() {
    let (serial, sink, _) = serial();
    print(&serial, &"x".repeat(LONGEST_LINE));
    assert_eq!(sink.written(), ["x".repeat(LONGEST_LINE)]);
}

#[test]
fn output_that_fails_is_not_the_guests_concern() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _data: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let serial = Serial::new(irq, Box::new(Broken)).unwrap();
    print(&serial, "lost\nlost");
    serial.flush();
    assert_eq!(register(&serial, LINE_STATUS) & 0x60, 0x60);
}

#[test]
fn input_fills_the_fifo_and_tells_when_there_is_room() {
    let (serial, _, irq) = serial();
    let _ = serial.write(INTERRUPT_ENABLE, &[1]);
    let input: Vec<u8> = (0..100).collect();
    let taken = serial.enqueue(&input);
    assert!(taken > 0 && taken < input.len());
    assert_eq!(serial.enqueue(&input), 0);
    assert_eq!(irq.read().unwrap(), 1);
    assert!(serial.room().read().is_err());
    let read: Vec<u8> = (0..taken).map(|_| register(&serial, DATA)).collect();
    assert_eq!(read, input[..taken]);
    assert!(serial.room().read().is_ok());
    assert_eq!(serial.enqueue(&input[taken..]), input.len() - taken);
    assert_eq!(serial.enqueue(&[]), 0);
    while register(&serial, LINE_STATUS) & 1 != 0 {
        register(&serial, DATA);
    }
    register(&serial, DATA);
    assert!(serial.room().read().is_err(), "nobody waits for room");
}

#[test]
fn input_is_lost_while_the_guest_tests_its_port() {
    let (serial, sink, _) = serial();
    let _ = serial.write(MODEM_CONTROL, &[1 << 4]);
    assert_eq!(serial.enqueue(b"abc"), 3);
    print(&serial, "z");
    assert_eq!(register(&serial, DATA), b'z');
    drop(serial);
    assert_eq!(sink.written(), [""; 0]);
}

#[test]
fn a_reset_forgets_registers_and_input_but_no_output() {
    let (serial, sink, irq) = serial();
    let registers = |serial: &Serial| [1, 3, 4, 7].map(|offset| register(serial, offset));
    let first = registers(&serial);
    for (offset, value) in [(INTERRUPT_ENABLE, 1), (3, 0x83), (4, 0x13), (7, 0x5a)] {
        let _ = serial.write(offset, &[value]);
    }
    assert_ne!(registers(&serial), first);
    let _ = serial.write(3, &[3]);
    let _ = serial.write(MODEM_CONTROL, &[8]);
    assert!(serial.enqueue(&[b'a'; 100]) < 100);
    assert!(irq.read().is_ok());
    print(&serial, "last words");

    serial.reset();
    assert_eq!(sink.written(), ["last words"]);
    assert_eq!(registers(&serial), first);
    assert_eq!(register(&serial, LINE_STATUS) & 1, 0, "no input waits");
    assert!(serial.room().read().is_ok(), "the rest may come");
    print(&serial, "hello\n");
    assert_eq!(sink.written(), ["hello\n"]);
    let _ = serial.write(INTERRUPT_ENABLE, &[1]);
    assert_eq!(serial.enqueue(b"b"), 1);
    assert!(irq.read().is_ok(), "the interrupt line is the same");
}

#[test]
fn output_that_nobody_reads_holds_no_vcpu_up() {
    let (reader, writer) = io::pipe().unwrap();
    let bounded_writer = crate::bounded_writer::BoundedWriter::new(
        OwnedFd::from(writer).into(),
        crate::bounded_writer::Kind::Guest,
    );
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let serial = Serial::new(irq, Box::new(bounded_writer)).unwrap();
    let line = [[b'x'; 63].as_slice(), b"\n"].concat();
    let mut longest = Duration::ZERO;
    for _ in 0..(1 << 20) / line.len() {
        let start = Instant::now();
        for &byte in &line {
            let _ = serial.write(DATA, &[byte]);
        }
        longest = longest.max(start.elapsed());
    }
    // The bound, with room for a busy machine.
    assert!(longest < Duration::from_millis(1000), "{longest:?}");
    drop(serial);
    drop(reader);
}

#[test]
fn wide_accesses_cover_their_registers() {
    let (serial, ..) = serial();
    let _ = serial.write(7, &[0x5a, 0xff]);
    let mut data = [0; 2];
    serial.read(7, &mut data);
    assert_eq!(data, [0x5a, 0xff]);
}

proptest! {
    #[test]
    fn hostile_accesses_do_no_harm(
        accesses in vec((prop_oneof![0..10_u64, any::<u64>()], vec(any::<u8>(), 0..9)), 0..100),
    ) {
        let (serial, ..) = serial();
        for (offset, mut data) in accesses {
            prop_assert!(matches!(serial.write(offset, &data), Effect::None));
            serial.read(offset, &mut data);
            serial.enqueue(&data);
        }
    }
}
