//! Cases about `cargo xtask lab` as people and scripts call it. Each boots a lab of its own.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use gantry_tests::lab::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::runner::{Case, cases};

pub const CASES: &[Case] = cases![
    files_and_devices_are_added,
    what_qemu_refuses_is_told_in_its_words,
    a_lost_wire_is_an_error,
    a_kernels_panic_is_an_error,
    a_poweroff_ends_no_command_well,
    a_killed_qemu_is_an_error,
];

/// `cargo xtask lab` with these arguments, and `script` in the lab.
fn command(arguments: &[&str], script: &str) -> Command {
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    xtask.args(["lab", "--memory", "2G"]).args(arguments);
    if let Some(gantry) = std::env::var_os("GANTRY") {
        xtask.arg("--gantry").arg(gantry);
    }
    xtask
        .args(["--", "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    xtask
}

fn lab(arguments: &[&str], script: &str) -> Result<Output> {
    command(arguments, script)
        .output()
        .context("cannot start xtask")
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn files_and_devices_are_added(_: &Host) -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("word"), "put there\n")?;
    let put = format!("{}:/lab/more", folder.path().display());
    let program = format!("{}:/bin/again", env!("CARGO_BIN_EXE_xtask"));
    let arguments = [
        "--put",
        &put,
        "--put",
        &program,
        "--qemu",
        "-device e1000e,addr=0x5",
        "--qemu",
        "-device 'ahci,addr=0x6'",
    ];
    let script =
        "cat /lab/more/word && again --help && cat /sys/bus/pci/devices/0000:00:0[56].0/device
        free -m | awk '/^Mem:/ { exit !($2 < 2048) }'";
    let output = lab(&arguments, script)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{}: {text}{}",
        output.status,
        errors(&output)
    );
    let words = ["put there", "xtask", "0x10d3", "0x2922"];
    ensure!(words.iter().all(|word| text.contains(word)), "{text}");
    Ok(())
}

fn what_qemu_refuses_is_told_in_its_words(_: &Host) -> Result<()> {
    let output = lab(&["--qemu", "-device no-such-device"], "true")?;
    let errors = errors(&output);
    ensure!(output.status.code() == Some(1), "{}", output.status);
    ensure!(
        errors.contains("'no-such-device' is not a valid device model name"),
        "{errors}"
    );
    Ok(())
}

/// Runs `script` in a lab that ends by it: the status is 1 and the error says these words.
fn ends(script: &str, words: &str) -> Result<()> {
    fails(&lab(&[], &format!("{script}; sleep 100"))?, words)
}

fn fails(output: &Output, words: &str) -> Result<()> {
    let errors = errors(output);
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let error = errors.lines().find(|line| line.starts_with("error: "));
    ensure!(error.is_some_and(|error| error.contains(words)), "{errors}");
    Ok(())
}

fn a_lost_wire_is_an_error(_: &Host) -> Result<()> {
    ends(
        "echo 0000:00:02.0 >/sys/bus/pci/devices/0000:00:02.0/driver/unbind",
        "virtio console 0000:00:02.0",
    )
}

fn a_kernels_panic_is_an_error(_: &Host) -> Result<()> {
    ends("echo c >/proc/sysrq-trigger", "kernel panicked")
}

fn a_poweroff_ends_no_command_well(_: &Host) -> Result<()> {
    ends("poweroff -f", "powered off")
}

fn a_killed_qemu_is_an_error(_: &Host) -> Result<()> {
    let mut xtask = command(&[], "echo up; sleep 100").spawn()?;
    let stdout = xtask.stdout.as_mut().context("its output is piped")?;
    BufReader::new(stdout).read_line(&mut String::new())?;
    let children = format!("/proc/{0}/task/{0}/children", xtask.id());
    let children = std::fs::read_to_string(children)?;
    let qemu = children.trim().parse().context("QEMU is its one child")?;
    kill(Pid::from_raw(qemu), Signal::SIGKILL)?;
    fails(&xtask.wait_with_output()?, "SIGKILL")
}
