//! Clients that are many, slow, silent, wrong or greedy: each gets an HTTP error, the others an answer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_api::http::{Console, Events, Limits, Vm};
use gantry_resources::base::HostPaths;
use gantry_resources::holding::{begin_maintenance, end_maintenance};
use gantry_vmm::command::{Command, CommandError, Reply, VmEvent, VmInfo};

use crate::fake::{Bed, parted, rest, serve};

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\nhost: x\r\n\r\n";

/// Limits that tests can wait for.
fn short() -> Limits {
    Limits {
        head: Duration::from_millis(300),
        body: Duration::from_millis(300),
        read: Duration::from_millis(300),
        answer: Duration::from_millis(300),
        ..Limits::default()
    }
}

#[test]
fn a_hundred_clients_at_once_are_answered() {
    let bed = Bed::new();
    bed.boot();
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let mut stream = bed.connect();
                for _ in 0..20 {
                    stream
                        .write_all(b"GET /api/v1/vm.info HTTP/1.1\r\nhost: x\r\n\r\n")
                        .unwrap();
                    assert_eq!(answer(&mut stream).0, 200);
                }
            });
        }
    });
}

/// Reads one answer with a length from a connection that stays open.
fn answer(stream: &mut UnixStream) -> (u16, String) {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        text.extend(byte);
    }
    let head = String::from_utf8(text).unwrap();
    let length = head.split("Content-Length: ").nth(1);
    let length = length
        .and_then(|rest| rest.split("\r\n").next())
        .map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (parted(&head).0, String::from_utf8(body).unwrap())
}

#[test]
fn one_too_many_is_told_so_and_the_others_stay() {
    let mut bed = Bed::limited(Limits {
        connections: 3,
        ..Limits::default()
    });
    let mut open: Vec<UnixStream> = (0..3).map(|_| bed.connect()).collect();
    for stream in &mut open {
        stream
            .write_all(b"GET /api/v1/events HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        let mut said = [0; 12];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"HTTP/1.1 200");
    }
    let refused = rest(bed.connect());
    assert_eq!(parted(&refused).0, 503);
    assert!(refused.contains("\r\nRetry-After: 1\r\n"), "{refused}");
    open.pop();
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        // Who listens no more is missed when the next event is told.
        bed.vm.events.publish(VmEvent::Reboot);
        let (status, text) = bed.get("/metrics");
        if status == 200 {
            assert!(text.contains("connections_turned_away_total"), "{text}");
            break;
        }
        assert!(Instant::now() < deadline, "the place is not free again");
    }
    bed.stop();
    assert!(rest(open.remove(0)).contains("reboot"));
}

#[test]
fn a_slow_head_is_not_waited_for() {
    let bed = Bed::limited(short());
    let mut stream = bed.connect();
    let began = Instant::now();
    for byte in PING.iter().take(20) {
        if stream.write_all(&[*byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(40));
    }
    let said = rest(stream);
    assert!(
        said.is_empty() || said.starts_with("HTTP/1.1 408"),
        "{said}"
    );
    assert!(began.elapsed() < Duration::from_secs(5));
    bed.is_well();
}

#[test]
fn a_silent_client_is_closed() {
    let bed = Bed::limited(short());
    let began = Instant::now();
    rest(bed.connect());
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_slow_body_is_not_waited_for() {
    let bed = Bed::limited(short());
    let mut stream = bed.connect();
    let head = "PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(answer(&mut stream).0, 408);
    bed.is_well();
}

#[test]
fn a_client_that_does_not_read_is_closed() {
    let bed = Bed::limited(short());
    let mut greedy = bed.connect();
    // It asks for more than the sockets hold, and reads nothing.
    greedy.set_nonblocking(true).unwrap();
    let request = b"GET /api/v1/openapi.json HTTP/1.1\r\nhost: x\r\n\r\n";
    let began = Instant::now();
    loop {
        match greedy.write(request) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(_) => break,
            Ok(_) => {}
        }
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "it is never closed"
        );
    }
    bed.is_well();
}

#[test]
fn a_listener_that_does_not_read_is_closed_and_harms_nobody() {
    let bed = Bed::limited(short());
    let mut stream = bed.connect();
    stream
        .write_all(b"GET /api/v1/events HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let began = Instant::now();
    let what = "x".repeat(1000);
    while bed
        .get("/metrics")
        .1
        .contains("gantry_api_connections{vm=\"fake\"} 2")
    {
        for _ in 0..100 {
            let (id, error) = ("gpu".to_owned(), what.clone());
            bed.vm.events.publish(VmEvent::DeviceError { id, error });
        }
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "it is never closed"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let said = rest(stream);
    assert!(said.starts_with("HTTP/1.1 200"));
}

#[test]
fn a_client_that_is_done_writing_is_answered() {
    let bed = Bed::new();
    let mut stream = bed.connect();
    stream.write_all(PING).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(parted(&rest(stream)).0, 200);
}

#[test]
fn clients_that_hang_up_early_leave_nothing() {
    let bed = Bed::new();
    for request in [
        &b""[..],
        b"GET /api",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"GET /api/v1/events HTTP/1.1\r\nhost: x\r\n\r\n",
        PING,
    ] {
        for _ in 0..20 {
            let mut stream = bed.connect();
            stream.write_all(request).unwrap();
            drop(stream);
        }
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    let alone = "gantry_api_connections{vm=\"fake\"} 1";
    loop {
        // Whoever listens to events is missed when the next one is told.
        bed.vm.events.publish(VmEvent::Reboot);
        if bed.get("/metrics").1.contains(alone) {
            break;
        }
        assert!(Instant::now() < deadline, "{}", bed.get("/metrics").1);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn malformed_requests_are_told_so() {
    let bed = Bed::new();
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(100_000));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(1000));
    for (request, status) in [
        (
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"[..],
            400,
        ),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/9.9\r\n\r\n", 400),
        (b"GET /api/v1/vmm.ping HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (
            b"PUT /api/v1/vm.boot HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
            400,
        ),
        (
            b"PUT /api/v1/vm.boot HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            400,
        ),
        (long.as_bytes(), 431),
        (many.as_bytes(), 431),
    ] {
        let answer = bed.raw(request);
        assert_eq!(
            parted(&answer).0,
            status,
            "{:?}",
            String::from_utf8_lossy(request)
        );
    }
    let chunked = b"PUT /api/v1/vm.create HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n";
    assert_eq!(parted(&bed.raw(chunked)).0, 400);
    let latin =
        b"PUT /api/v1/vm.create HTTP/1.1\r\nconnection: close\r\ncontent-length: 2\r\n\r\n\xe9\"";
    assert_eq!(parted(&bed.raw(latin)).0, 400);
    bed.is_well();
}

#[test]
fn a_body_of_100_mb_is_refused() {
    const SIZE: usize = 100 << 20;
    let bed = Bed::new();
    let before = resident();
    for (field, chunk) in [
        (format!("content-length: {SIZE}"), vec![b' '; 1 << 20]),
        ("transfer-encoding: chunked".to_owned(), {
            let mut chunk = b"100000\r\n".to_vec();
            chunk.resize(chunk.len() + (1 << 20), b' ');
            chunk.extend(b"\r\n");
            chunk
        }),
    ] {
        let mut stream = bed.connect();
        let head = format!("PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\n{field}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        for _ in 0..100 {
            stream.write_all(&chunk).unwrap();
        }
        let _ = stream.write_all(b"0\r\n\r\n");
        let (status, body) = parted(&rest(stream));
        assert_eq!(status, 413, "{body}");
        assert!(body.contains("larger than"), "{body}");
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 50 << 20, "it kept {grown} bytes");
    bed.is_well();
}

#[test]
fn who_waits_to_be_asked_for_a_large_body_is_not_asked() {
    let bed = Bed::new();
    let head = "PUT /api/v1/vm.create HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n\
                content-length: 104857600\r\n\r\n";
    let answer = bed.raw(head.as_bytes());
    assert_eq!(parted(&answer).0, 413, "{answer}");
}

/// Bytes of memory that this process has.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let bed = Bed::new();
    let mut request = Vec::new();
    for _ in 0..50 {
        request.extend(PING);
        request.extend(b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n");
    }
    request.extend(b"GET /api/v1/vm.info HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let text = bed.raw(&request);
    let statuses: Vec<&str> = text
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|answer| &answer[..3])
        .collect();
    assert_eq!(statuses.len(), 101);
    let expected = ["200", "404"].into_iter().cycle().take(100).chain(["404"]);
    assert!(statuses.into_iter().eq(expected));
}

/// A VM that takes its time, or is gone.
struct Mute {
    keeps: std::sync::Mutex<Vec<Reply>>,
    forgets: bool,
}

impl Vm for Mute {
    fn ask(&self, _command: Command, reply: Reply) {
        if !self.forgets {
            self.keeps.lock().unwrap().push(reply);
        }
    }

    fn info(&self) -> Result<VmInfo, CommandError> {
        Err(CommandError::NotCreated)
    }

    fn type_in(&self, _input: &[u8]) -> Result<usize, CommandError> {
        Err(CommandError::NotCreated)
    }
}

#[test]
fn a_vm_that_does_not_answer_is_told_of() {
    for (forgets, status) in [(false, 504), (true, 503)] {
        let folder = tempfile::tempdir().unwrap();
        let vm = Arc::new(Mute {
            keeps: std::sync::Mutex::default(),
            forgets,
        });
        let (stop, thread) = serve(&folder, vm, Events::default(), Console::default(), short());
        let mut stream = UnixStream::connect(folder.path().join("vm.sock")).unwrap();
        stream
            .write_all(b"PUT /api/v1/vm.boot HTTP/1.1\r\nhost: x\r\n\r\n")
            .unwrap();
        assert_eq!(answer(&mut stream).0, status);
        stream.write_all(PING).unwrap();
        assert_eq!(answer(&mut stream).0, 200);
        stop.stop();
        thread.join().unwrap();
    }
}

#[test]
fn the_end_waits_for_answers_and_for_nobody_who_is_silent() {
    let mut bed = Bed::new();
    let idle = bed.connect();
    std::thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    bed.stop();
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    assert!(rest(idle).is_empty());
    assert!(!bed.socket().exists());
}

#[test]
fn a_vm_that_is_created_in_maintenance_is_refused_for_now() {
    let bed = Bed::new();
    let paths = HostPaths::under(bed.folder.path());
    begin_maintenance(&paths, Some("new memory")).unwrap();
    let request = |body: &str| {
        let length = body.len();
        format!(
            "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    };
    let refused = bed.raw(request(&bed.config()).as_bytes());
    assert_eq!(parted(&refused).0, 409, "{refused}");
    assert!(refused.contains("\r\nRetry-After: 1\r\n"), "{refused}");
    assert!(refused.contains("new memory"), "{refused}");
    // Nobody can tell: that is the host's failure, and not the client's mistake.
    end_maintenance(&paths).unwrap();
    let unreadable = bed.folder.path().join("var/maintenance.json");
    std::fs::create_dir(&unreadable).unwrap();
    assert_eq!(bed.put("vm.create", &bed.config()).0, 500);
    std::fs::remove_dir(&unreadable).unwrap();
    assert_eq!(bed.put("vm.create", &bed.config()).0, 204);
}
