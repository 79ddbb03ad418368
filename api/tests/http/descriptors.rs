//! Descriptors that come with requests.

use std::io::{IoSlice, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::by_hand::receive;
use crate::fake::Bed;

/// Sends the head of a request with descriptors of files that have these texts, and its body behind it, as Cloud
/// Hypervisor's own client does. Returns status and body of the answer.
fn put(stream: &mut UnixStream, call: &str, body: &str, texts: &[&str]) -> (u16, String) {
    let files = texts.iter().map(|text| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        file
    });
    let files: Vec<_> = files.collect();
    let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    }
    let head = format!("PUT /api/v1/{call} HTTP/1.1\r\nHost: localhost\r\n");
    let head = [IoSlice::new(head.as_bytes())];
    sendmsg(&*stream, &head, &mut control, SendFlags::empty()).unwrap();
    drop(files);
    write!(stream, "Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let (status, body) = receive(stream);
    (status, body.unwrap_or_default())
}

fn running() -> Bed {
    let bed = Bed::new();
    for (call, body) in [("vm.create", bed.config()), ("vm.boot", String::new())] {
        let (status, answer) = put(&mut bed.connect(), call, &body, &[]);
        assert_eq!(status, 204, "{answer}");
    }
    bed
}

#[test]
fn a_device_comes_with_its_iommufd_or_alone() {
    let bed = running();
    // Over one connection: each request has its own.
    let mut stream = bed.connect();
    for (body, texts, group) in [
        (
            r#"{"id": "one"}"#,
            &["cdev", "iommufd"][..],
            "cdev and iommufd",
        ),
        (
            r#"{"id": "two", "path": null, "fd": null}"#,
            &["other"],
            "other",
        ),
        (r#"{"id": "three", "group": "nvme"}"#, &[], "nvme"),
    ] {
        let (status, answer) = put(&mut stream, "vm.add-device", body, texts);
        assert_eq!(status, 200, "{answer}");
        assert!(
            answer.contains(&format!("\"group\":\"{group}\"")),
            "{answer}"
        );
    }
}

#[test]
fn what_takes_none_refuses_them_and_so_does_a_device_with_a_name() {
    let bed = running();
    let mut stream = bed.connect();
    for (call, body, texts, why) in [
        (
            "vm.pause",
            "",
            &["cdev"][..],
            "only `vm.add-device` takes some",
        ),
        (
            "vm.add-device",
            "{}",
            &["1", "2", "3"],
            "more than 2 descriptors",
        ),
        (
            "vm.add-device",
            r#"{"path": "0000:01:00.0"}"#,
            &["cdev"],
            "came as a descriptor",
        ),
        (
            "vm.add-device",
            r#"{"count": 2}"#,
            &["cdev"],
            "exactly one device",
        ),
        ("vm.add-device", r#"{"fd": 5}"#, &["cdev"], "fd"),
        ("vm.add-device", "{}", &[], "neither `group` nor"),
    ] {
        let (status, answer) = put(&mut stream, call, body, texts);
        assert_eq!(status, 400, "{call}: {answer}");
        assert!(answer.contains(why), "{call}: {answer}");
    }
}
