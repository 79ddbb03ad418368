//! Clients that write and read HTTP by hand: byte for byte what they send and what they look for.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use gantry_api::http::Limits;

use crate::fake::{Bed, parted, rest};

/// How long a client takes between two writes.
const PAUSE: Duration = Duration::from_millis(40);

/// Writes pieces apart; each write must succeed.
fn write_apart(stream: &mut UnixStream, pieces: &[&str]) {
    for piece in pieces {
        stream.write_all(piece.as_bytes()).unwrap();
        std::thread::sleep(PAUSE);
    }
}

/// Sends line, length and body apart, as Cloud Hypervisor's own client does.
fn send(stream: &mut UnixStream, verb: &str, call: &str, body: Option<&str>) {
    let line = format!("{verb} /api/v1/{call} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    let length = body.map(|body| format!("Content-Length: {}\r\n", body.len()));
    let pieces = [
        Some(line.as_str()),
        length.as_deref(),
        Some("\r\n"),
        body.filter(|body| !body.is_empty()),
    ];
    write_apart(stream, &pieces.into_iter().flatten().collect::<Vec<_>>());
}

/// Reads an answer as that client does: all between the version and the line's end is the status, the
/// length is behind `Content-Length: ` and nothing else, and without one there is no body.
pub fn receive(stream: &mut UnixStream) -> (u16, Option<String>) {
    let mut text = String::new();
    let (mut bytes, mut whole) = ([0; 256], None);
    while whole.is_none_or(|end| text.len() < end) {
        match stream.read(&mut bytes).unwrap() {
            0 => break,
            count => text.push_str(std::str::from_utf8(&bytes[..count]).unwrap()),
        }
        if let Some(head) = text.find("\r\n\r\n") {
            let length = text.split("Content-Length: ").nth(1);
            let length = length.and_then(|rest| rest.split('\r').next());
            whole = Some(head + 4 + length.map_or(0, |length| length.trim().parse().unwrap()));
            if length.is_none() {
                break;
            }
        }
    }
    assert!(!text.to_lowercase().contains("transfer-encoding"), "{text}");
    let status = text.strip_prefix("HTTP/1.1 ").unwrap();
    let status = status.split('\r').next().unwrap().trim();
    let body = text.contains("Content-Length: ").then(|| {
        let (_, body) = text.split_once("\r\n\r\n").unwrap();
        body.to_owned()
    });
    (status.parse().expect(status), body)
}

fn call(bed: &Bed, verb: &str, call: &str, body: Option<&str>) -> (u16, Option<String>) {
    let mut stream = bed.connect();
    send(&mut stream, verb, call, body);
    receive(&mut stream)
}

#[test]
fn a_client_that_takes_the_line_for_the_status_lives_through_a_vm() {
    let bed = Bed::new();
    let (status, body) = call(&bed, "GET", "vmm.ping", None);
    assert_eq!(status, 200);
    assert!(body.unwrap().contains("\"version\""));
    let config = bed.config();
    for (verb, name, body, expected) in [
        ("GET", "vm.info", None, 404),
        ("PUT", "vm.create", Some("{}"), 400),
        ("PUT", "vm.create", Some(config.as_str()), 204),
        ("PUT", "vm.create", Some(config.as_str()), 409),
        ("PUT", "vm.boot", None, 204),
        ("PUT", "vm.boot", Some(""), 405),
        ("PUT", "vm.add-device", Some(r#"{"group": "nvme"}"#), 200),
        ("PUT", "vm.remove-device", Some(r#"{"id": "dev0"}"#), 204),
        ("GET", "vm.info", None, 200),
        ("GET", "vm.counters", None, 200),
        ("PUT", "vm.pause", None, 204),
        ("PUT", "vm.resume", None, 204),
        ("PUT", "vm.resize", Some(r#"{"desired_vcpus": 2}"#), 501),
        ("PUT", "vm.shutdown", None, 204),
        ("PUT", "vm.delete", None, 204),
    ] {
        let (status, answer) = call(&bed, verb, name, body);
        assert_eq!(status, expected, "{name}: {answer:?}");
        assert_eq!(answer.is_none(), status == 204, "{name}: {answer:?}");
    }
}

#[test]
fn a_refusal_is_read_by_one_who_writes_the_body_last() {
    let bed = Bed::new();
    let body = format!("{{\"source_url\": \"file:///{}\"}}", "x".repeat(100_000));
    for (verb, name, expected) in [
        ("PUT", "vm.restore", 501),
        ("PUT", "vm.send-migration", 501),
        ("PUT", "vm.fly", 404),
        ("GET", "vm.boot", 405),
        ("POST", "vm.create", 405),
        ("GET", "vmm.ping", 200),
        ("PUT", "vm.boot", 404),
    ] {
        let (status, answer) = call(&bed, verb, name, Some(&body));
        assert_eq!(status, expected, "{name}");
        let answer = answer.unwrap();
        assert!(answer.len() > 2, "{name}: {answer}");
    }
}

#[test]
fn a_refusal_leaves_the_connection_usable() {
    let bed = Bed::new();
    let mut stream = bed.connect();
    for _ in 0..3 {
        send(
            &mut stream,
            "PUT",
            "vm.restore",
            Some("{\"source_url\": \"x\"}"),
        );
        assert_eq!(receive(&mut stream).0, 501);
        send(&mut stream, "GET", "vmm.ping", None);
        assert_eq!(receive(&mut stream).0, 200);
    }
}

#[test]
fn a_body_that_never_comes_delays_the_refusal_and_no_more() {
    let bed = Bed::new();
    let mut stream = bed.connect();
    let head = "PUT /api/v1/vm.restore HTTP/1.1\r\nContent-Length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(receive(&mut stream).0, 501);
    assert_eq!(rest(stream), "");
    bed.is_well();
}

#[test]
fn who_writes_on_after_an_early_answer_reads_it() {
    let bed = Bed::limited(Limits {
        connections: 1,
        ..Limits::default()
    });
    let mut listener = bed.connect();
    listener
        .write_all(b"GET /api/v1/events HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    listener.read_exact(&mut [0; 64]).unwrap();
    let body = "x".repeat(1000);
    // One connection too many.
    let mut stream = bed.connect();
    std::thread::sleep(PAUSE);
    let head = [
        "PUT /api/v1/vm.boot HTTP/1.1\r\n",
        "Content-Length: 1000\r\n",
        "\r\n",
    ];
    write_apart(&mut stream, &head);
    write_apart(&mut stream, &[&body]);
    assert_eq!(receive(&mut stream).0, 503);
    drop(listener);
    let bed = Bed::new();
    let long = format!("x: {}\r\n", "y".repeat(10_000));
    let pieces = ["nonsense\r\n\r\n", &body, &body];
    let mut stream = bed.connect();
    write_apart(&mut stream, &pieces);
    assert_eq!(parted(&rest(stream)).0, 400);
    let pieces = ["GET / HTTP/1.1\r\n", &long, &long, &long, "\r\n"];
    let mut stream = bed.connect();
    write_apart(&mut stream, &pieces);
    assert_eq!(parted(&rest(stream)).0, 431);
}

#[test]
fn other_habits_are_answered() {
    let bed = Bed::new();
    let ping = "vmm.ping";
    for (request, begin) in [
        // An older version, whose connections close.
        (
            format!("GET /api/v1/{ping} HTTP/1.0\r\n\r\n"),
            "HTTP/1.0 200 \r\n",
        ),
        (
            format!("GET /api/v1/{ping} HTTP/1.1\r\nCONNECTION: CLOSE\r\nHOST: x\r\n\r\n"),
            "HTTP/1.1 200 \r\n",
        ),
        (
            "PUT /api/v1/vm.boot HTTP/1.0\r\ncontent-length: 0\r\n\r\n".to_owned(),
            "HTTP/1.0 404 \r\n",
        ),
        (
            "PUT /api/v1/vm.add-device HTTP/1.1\r\nconnection: close\r\n\
             transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
                .to_owned(),
            "HTTP/1.1 400 \r\n",
        ),
        // A line's end too many before the request, as after a body of older clients.
        (
            format!("\r\nGET /api/v1/{ping} HTTP/1.1\r\nconnection: close\r\n\r\n"),
            "HTTP/1.1 200 \r\n",
        ),
    ] {
        let answer = bed.raw(request.as_bytes());
        assert!(answer.starts_with(begin), "{request}: {answer}");
        assert!(answer.contains("\r\nContent-Length: "), "{answer}");
    }
}

#[test]
fn who_waits_to_be_asked_for_the_body_is_asked() {
    let bed = Bed::new();
    let body = bed.config();
    let head = |call: &str| {
        format!(
            "PUT /api/v1/{call} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        )
    };
    let mut stream = bed.connect();
    stream.write_all(head("vm.create").as_bytes()).unwrap();
    let mut asked = [0; 25];
    stream.read_exact(&mut asked).unwrap();
    assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).unwrap();
    assert_eq!(receive(&mut stream).0, 204);
    // A call that there is not is refused before its body is asked for.
    let mut stream = bed.connect();
    stream.write_all(head("vm.restore").as_bytes()).unwrap();
    assert_eq!(receive(&mut stream).0, 501);
}

#[test]
fn requests_in_one_write_are_answered_one_after_the_other() {
    let bed = Bed::new();
    let config = bed.config();
    let mut text = format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{config}",
        config.len()
    );
    text += "PUT /api/v1/vm.restore HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}";
    text += "PUT /api/v1/vm.boot HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let answer = bed.raw(text.as_bytes());
    let statuses: Vec<&str> = answer
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|answer| answer.split("\r\n").next().unwrap())
        .collect();
    assert_eq!(statuses, ["204 ", "501 ", "204 "]);
}

#[test]
fn half_sent_requests_lock_nobody_out() {
    const PLACES: usize = 32;
    let bed = Bed::limited(Limits {
        connections: PLACES,
        head: Duration::from_secs(100),
        body: Duration::from_secs(100),
        ..Limits::default()
    });
    let begun = [
        "",
        "GET /api",
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    ];
    let half: Vec<UnixStream> = (0..2 * PLACES)
        .map(|index| {
            let mut stream = bed.connect();
            stream.write_all(begun[index % 3].as_bytes()).unwrap();
            stream
        })
        .collect();
    for _ in 0..PLACES {
        bed.is_well();
    }
    // Those that came first have lost their places.
    half.into_iter()
        .take(PLACES)
        .for_each(|stream| assert_eq!(rest(stream), ""));
}
