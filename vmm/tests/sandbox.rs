//! What becomes of a thread that makes a system call its filter does not name, seen from outside:
//! this program runs itself again as the victim.

#![allow(missing_docs, clippy::expect_used)] // a test, without the harness's attributes

use std::process::{Command, ExitCode};

use gantry_vmm::sandbox::{self, Sandbox, SeccompMode};
use gantry_vmm::threads::{Role, spawn};

const ROLES: [Role; 5] = [
    Role::Vcpu(0),
    Role::Device,
    Role::Dma,
    Role::Api,
    Role::Attach,
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("--victim"), Some(mode)) => victim(&mode),
        _ => {
            check();
            println!("test result: ok. sandbox: 8 passed");
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
    let (status, stderr) = run("memory:vcpu0");
    assert_eq!(status, Some(0), "giving memory back: {stderr}");
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

/// Opens a socket, which no role may, on a thread of the role that `what` names; or only allocates
/// and frees so much there that the allocator gives memory back to the kernel.
fn victim(what: &str) -> ExitCode {
    let (mode, name) = what.split_once(':').expect("mode:role");
    let deed: fn() = match mode {
        "memory" => || {
            drop(std::hint::black_box(
                [(); 8].map(|()| vec![1_u8; 100 << 10]),
            ))
        },
        _ => || drop(std::os::unix::net::UnixDatagram::unbound().expect("a socket")),
    };
    let mode = match mode {
        "on" | "memory" => SeccompMode::On,
        "log" => SeccompMode::Log,
        _ => SeccompMode::Off,
    };
    let role = ROLES
        .into_iter()
        .find(|role| role.to_string() == name)
        .expect("a role");
    sandbox::install_traps().expect("installs");
    let sandbox = Sandbox::new(mode).expect("compiles");
    spawn(role, &sandbox, deed).expect("spawns").join();
    ExitCode::SUCCESS
}
