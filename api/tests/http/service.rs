//! gantry as a service of systemd: what its socket and its journal get.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn systemd_hears_when_clients_can_boot_a_vm() {
    let run = tempfile::tempdir().unwrap();
    let path = run.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    let patience = Some(Duration::from_secs(60));
    systemd.set_read_timeout(patience).unwrap();
    let mut gantry = Command::new(env!("CARGO_BIN_EXE_gantry"))
        .arg("--run-dir")
        .arg(run.path())
        .args(["run", "--api-socket"])
        .arg(run.path().join("vm.sock"))
        .env("NOTIFY_SOCKET", &path)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut heard = [0; 64];
    let len = systemd.recv(&mut heard).unwrap();
    assert_eq!(&heard[..len], b"READY=1");
    assert!(run.path().join("vm.sock").exists());
    gantry.kill().unwrap();
    gantry.wait().unwrap();
}

#[test]
fn the_journal_gets_the_priority_of_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let journal = File::create(&path).unwrap();
    let file = journal.metadata().unwrap();
    let named = format!("{}:{}", file.dev(), file.ino());
    for (stream, begin) in [(&*named, "<3>error: "), ("1:1", "error: ")] {
        let journal = File::create(&path).unwrap();
        let status = Command::new(env!("CARGO_BIN_EXE_gantry"))
            .args(["run", "/none/vm.json"])
            .env("JOURNAL_STREAM", stream)
            .stderr(journal)
            .status();
        assert_eq!(status.unwrap().code(), Some(2));
        let said = std::fs::read_to_string(&path).unwrap();
        assert!(said.lines().all(|line| line.starts_with('<')) == begin.starts_with('<'));
        assert!(said.starts_with(begin), "{said}");
    }
}
