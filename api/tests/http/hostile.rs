//! The command line before a socket that somebody hostile listens on.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};

/// What `gantry vm ARGS` does where each connection is answered by `answer`, with the path it asks for.
fn gantry(args: &[&str], answer: fn(&str, &mut UnixStream)) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("vm.sock")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                let length = stream.read(&mut request).unwrap_or(0);
                let request = String::from_utf8_lossy(&request[..length]);
                let path = request.split(' ').nth(1).unwrap_or_default();
                answer(path, &mut stream);
            });
        }
    });
    let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
    command
        .arg("--run-dir")
        .arg(folder.path())
        .arg("vm")
        .args(args);
    command.env("CLICOLOR_FORCE", "1").stdin(Stdio::null());
    command.output().unwrap()
}

fn send(stream: &mut UnixStream, status: u16, body: &str) {
    let length = body.len();
    let head = format!("HTTP/1.1 {status} \r\nContent-Length: {length}\r\n\r\n{body}");
    let _ = stream.write_all(head.as_bytes());
}

const PING: &str = r#"{"build_version": "", "version": "", "pid": 1, "features": []}"#;
/// Clears the screen, sets the title, turns the direction of writing.
const HOSTILE: &str = "x\u{1b}[2J\u{1b}]0;t\u{7}\u{9b}1m\u{202e}y";
const HARMLESS: &str = "x\\u{1b}[2J\\u{1b}]0;t\\u{7}\\u{9b}1m\\u{202e}y";

fn messages(path: &str, stream: &mut UnixStream) {
    match path.ends_with("ping") {
        true => send(stream, 200, PING),
        false => send(stream, 500, &serde_json::json!([HOSTILE]).to_string()),
    }
}

fn events(path: &str, stream: &mut UnixStream) {
    let event = serde_json::json!({"time": 1, "event": "guest-fault", "error": HOSTILE});
    match path.ends_with("ping") {
        true => send(stream, 200, PING),
        false => send(stream, 200, &format!("{event}\n")),
    }
}

fn metrics(path: &str, stream: &mut UnixStream) {
    match path.ends_with("ping") {
        true => send(stream, 200, PING),
        false => send(stream, 200, HOSTILE),
    }
}

#[test]
fn nothing_that_a_socket_says_reaches_the_terminal_as_a_command() {
    let answers: [fn(&str, &mut UnixStream); 3] = [messages, events, metrics];
    for (args, answer) in [
        (&["info", "vm"][..], answers[0]),
        (&["list"], answers[0]),
        (&["list", "--json"], answers[0]),
        (&["pause", "vm"], answers[0]),
        (&["events", "vm"], answers[1]),
        (&["events", "vm", "--json"], answers[1]),
        (&["metrics", "vm"], answers[2]),
    ] {
        let Output { stdout, stderr, .. } = gantry(args, answer);
        let said = String::from_utf8([stdout, stderr].concat()).unwrap();
        for bad in ["\u{1b}[2J", "\u{1b}]", "\u{7}", "\u{9b}", "\u{202e}"] {
            assert!(!said.contains(bad), "{args:?}: {said:?}");
        }
        let said = said.replace("\\\\", "\\");
        let told = said.contains(HARMLESS);
        assert!(told || args == ["list"], "{args:?}: {said:?}");
    }
}

/// A body without an end.
fn endless(_: &str, stream: &mut UnixStream) {
    let _ = stream.write_all(b"HTTP/1.1 200 \r\n\r\n");
    while stream.write_all(&[b' '; 1 << 16]).is_ok() {}
}

fn endless_line(path: &str, stream: &mut UnixStream) {
    match path.ends_with("ping") {
        true => send(stream, 200, PING),
        false => endless(path, stream),
    }
}

#[test]
fn an_answer_without_end_is_not_read_to_its_end() {
    for (args, answer) in [
        (&["info", "vm"][..], endless as fn(&str, &mut UnixStream)),
        (&["info", "vm"], endless_line),
        (&["metrics", "vm"], endless_line),
        (&["events", "vm"], endless_line),
        (&["power-button", "vm", "--wait"], endless_line),
    ] {
        let Output { status, stderr, .. } = gantry(args, answer);
        let said = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{args:?}: {said}");
        assert!(
            said.contains("gave an answer that gantry cannot read"),
            "{args:?}: {said}"
        );
    }
}

#[test]
fn vms_are_asked_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    // No VM answers before all have been asked.
    let all = std::sync::Arc::new(std::sync::Barrier::new(8));
    for name in 0..8 {
        let path = folder.path().join(format!("{name}.sock"));
        let listener = UnixListener::bind(path).unwrap();
        let all = std::sync::Arc::clone(&all);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut request = [0; 4096];
                let mut stream = stream.unwrap();
                // Looking whether somebody listens sends nothing.
                let length = stream.read(&mut request).unwrap_or(0);
                if length > 0 {
                    all.wait();
                    match request.starts_with(b"GET /metrics") {
                        true => send(&mut stream, 200, ""),
                        false => send(&mut stream, 200, PING),
                    }
                }
            }
        });
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
    command.arg("--run-dir").arg(folder.path());
    let output = command.args(["metrics"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let up = |line: &&str| line.starts_with("gantry_vm_up{") && line.ends_with(" 1");
    assert_eq!(text.lines().filter(up).count(), 8, "{text}");
}
