//! The helper that removes a socket's file, as the program that it is.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

/// The helper for the socket `vm.sock` of a run directory.
fn start(run: &tempfile::TempDir) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
    command.arg("__remove-socket");
    command.arg(run.path().join("vm.sock")).arg(run.path());
    command.stdin(Stdio::piped()).spawn().unwrap()
}

#[test]
fn the_socket_of_a_process_that_is_gone_goes_and_no_other_does() {
    let run = tempfile::tempdir().unwrap();
    let path = |name: &str| run.path().join(name);
    fs::write(path("sockets.lock"), "").unwrap();
    let listener = UnixListener::bind(path("vm.sock")).unwrap();
    drop(UnixListener::bind(path("web.sock")).unwrap());
    let mut helper = start(&run);
    // The end of its standard input is the end of the process that has the other end.
    drop(helper.stdin.take());
    drop(listener);
    assert!(helper.wait().unwrap().success());
    assert!(!path("vm.sock").exists());
    assert!(path("web.sock").exists());
}
