//! What becomes of a thread that makes a system call its filter does not name, seen from outside:
//! this program runs itself again as the victim.

#![allow(missing_docs, clippy::expect_used)] // a test, without the harness's attributes

use std::process::{Command, ExitCode};

use gantry_vmm::sandbox::{self, Sandbox, SeccompMode};
use gantry_vmm::threads::{Role, spawn};

const ROLES: [Role; 3] = [Role::Vcpu(0), Role::Device, Role::Dma];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("--victim"), Some(mode)) => victim(&mode),
        _ => {
            check();
            println!("test result: ok. sandbox: 5 passed");
            ExitCode::SUCCESS
        }
    }
}

fn check() {
    for role in ROLES {
        let (status, stderr) = run(&format!("on:{role}"));
        assert_eq!(status, Some(159), "{role}: {stderr}");
        let sentence = format!("thread '{role}' made the system call 'socket'");
        assert!(stderr.contains(&sentence), "{role}: {stderr}");
    }
    assert_eq!(
        run("off:vcpu0").0,
        Some(0),
        "no filter lets the call through"
    );
    assert_eq!(
        run("log:vcpu0").0,
        Some(0),
        "a logging filter lets the call through"
    );
}

fn run(mode: &str) -> (Option<i32>, String) {
    let me = std::env::current_exe().expect("the path of this program");
    let output = Command::new(me)
        .args(["--victim", mode])
        .output()
        .expect("runs");
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Opens a socket, which no role may, on a thread of the role that `what` names.
fn victim(what: &str) -> ExitCode {
    let (mode, name) = what.split_once(':').expect("mode:role");
    let mode = match mode {
        "on" => SeccompMode::On,
        "log" => SeccompMode::Log,
        _ => SeccompMode::Off,
    };
    let role = ROLES
        .into_iter()
        .find(|role| role.to_string() == name)
        .expect("a role");
    sandbox::install_traps().expect("installs");
    let sandbox = Sandbox::new(mode).expect("compiles");
    let thread = spawn(role, &sandbox, || {
        std::os::unix::net::UnixDatagram::unbound().is_ok()
    });
    if thread.expect("spawns").join() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
