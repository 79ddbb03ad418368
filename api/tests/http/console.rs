//! The guest's console: what all who are attached see, and what they type.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use crate::fake::Bed;

const ATTACH: &[u8] = b"GET /api/v1/vm.console HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n\
    Upgrade: gantry-console\r\n\r\n";

/// A server whose VM runs, with a serial port on its terminal.
fn bed() -> Bed {
    let bed = Bed::new();
    let config = bed.config().replace("Null", "Tty");
    assert_eq!(bed.put("vm.create", &config).0, 204);
    assert_eq!(bed.put("vm.boot", "").0, 204);
    bed
}

/// A connection that is attached.
fn attach(bed: &Bed) -> BufReader<UnixStream> {
    let mut stream = BufReader::new(bed.connect());
    stream.get_mut().write_all(ATTACH).unwrap();
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).unwrap() > 0, "{head}");
    }
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    stream
}

fn hears(stream: &mut BufReader<UnixStream>, text: &str) {
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(String::from_utf8_lossy(&heard), text);
}

#[test]
fn all_who_are_attached_see_what_any_of_them_types() {
    let bed = bed();
    bed.vm.console.publish(b"before\r\n");
    let (mut first, mut second) = (attach(&bed), attach(&bed));
    for stream in [&mut first, &mut second] {
        hears(stream, "before\r\n");
    }
    first
        .get_mut()
        .write_all(b"more than fits at once")
        .unwrap();
    for stream in [&mut first, &mut second] {
        hears(stream, "more than fits at once");
    }
    // One that leaves takes nothing with it.
    drop(first);
    second.get_mut().write_all(b"\x03").unwrap();
    hears(&mut second, "\x03");
    assert_eq!(*bed.vm.typed.lock().unwrap(), b"more than fits at once\x03");
    bed.vm.console.publish(b"last words");
    drop(bed);
    let mut rest = String::new();
    second.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "last words");
}

#[test]
fn a_console_that_there_is_not_is_refused() {
    let bed = Bed::new();
    bed.boot();
    let answer = bed.raw(ATTACH);
    assert!(answer.starts_with("HTTP/1.1 409 "), "{answer}");
    assert!(answer.contains("Null"), "{answer}");
    let (status, answer) = bed.get("/api/v1/vm.console");
    assert_eq!(status, 426);
    assert!(answer.contains("Upgrade: gantry-console"), "{answer}");
    bed.is_well();
}

#[test]
fn the_command_types_what_comes_and_tells_how_the_vm_ended() {
    let bed = bed();
    bed.vm.console.publish(b"login: ");
    let mut console = Command::new(env!("CARGO_BIN_EXE_gantry"))
        .args(["vm", "console"])
        .arg(bed.socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = console.stdin.take().unwrap();
    // Ctrl-a is a key like others where there is no terminal.
    input.write_all(b"\x01d").unwrap();
    let mut heard = vec![0; b"login: \x01d".len()];
    console
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut heard)
        .unwrap();
    assert_eq!(heard, b"login: \x01d");
    drop(input);
    bed.vm.events.publish(gantry_vmm::command::VmEvent::Ended {
        reason: "the guest powered off".to_owned(),
    });
    drop(bed);
    let ended = console.wait_with_output().unwrap();
    assert!(ended.status.success());
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(said.ends_with(" ended: the guest powered off\n"), "{said}");
}
