//! Cases about endings: signals, the console's escape, guests that die; nothing is held after any.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use gantry_tests::protocol::Exit;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::pool::{FIRST, Pool, device, nothing_is_held};
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For every host kernel.
pub const CASES: &[Case] = cases![
    signals_end_it_and_release_everything,
    killed_while_booting_it_leaves_nothing,
];

/// For one host kernel.
pub const MORE: &[Case] = cases![
    ctrl_a_x_ends_it_and_restores_the_terminal,
    a_signal_restores_the_terminal,
    a_start_up_error_leaves_the_terminal_alone,
    in_the_background_it_leaves_the_terminal_alone,
    in_the_foreground_again_its_console_is_alive,
    in_the_background_again_it_ends,
    a_panicking_guest_boots_again,
    a_panic_is_told_of,
    a_triple_fault_ends_it,
    a_kernel_that_dies_at_once_ends_it,
];

fn signals_end_it_and_release_everything(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("sleep").devices("nvme", 1);
    let signals = [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ];
    for signal in signals {
        let mut running = vm.start(host)?;
        match signal {
            Signal::SIGTERM => running.until("guest: init")?,
            // While it is being built.
            Signal::SIGINT => until_held(host)?,
            // While its guest boots, or has done so.
            _ => {
                until_held(host)?;
                sleep(Duration::from_secs(1));
            }
        }
        running.signal(signal)?;
        let ended = running.end()?.exits(128 + signal as i32)?;
        ensure!(!ended.complains(), "{signal}: {ended}");
        let end = format!(" ended: signal {}", signal as i32);
        ensure!(ended.errors.contains(&end), "{signal}: {ended}");
        nothing_is_held(host)?;
    }
    Ok(())
}

/// Waits until a device is leased.
fn until_held(host: &Host) -> Result<()> {
    host.sh("until grep -q OFDLCK /proc/locks; do :; done")
        .output()?
        .success()?;
    Ok(())
}

fn killed_while_booting_it_leaves_nothing(host: &Host) -> Result<()> {
    let rounds = crate::rounds(10);
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    // Its guest stays, so that on a fast machine too it is the kill that ends it.
    let stays = Vm::new("sleep").devices("nvme", 1);
    let mut before = None;
    for round in 0..rounds {
        let running = stays.start(host)?;
        // The one that was killed is dying while the next one starts.
        if let Some(killed) = before.take() {
            check_killed(killed)?;
        }
        sleep(Duration::from_millis(3000 * round / rounds));
        running.signal(Signal::SIGKILL)?;
        before = Some(running);
    }
    let last = Vm::new("nvme").devices("nvme", 1).start(host)?;
    if let Some(killed) = before.take() {
        check_killed(killed)?;
    }
    let ended = last.end()?.powered_off()?;
    ensure!(ended.value("nvme0.sha256")? == FIRST.checksum(), "{ended}");
    // It goes back to the host at once, though the kernel closes it after it has let go of the lock.
    let mut killed = stays.start(host)?;
    killed.until("guest: init")?;
    killed.signal(Signal::SIGKILL)?;
    let back = ["gantry", "device", "reattach", FIRST.bdf];
    host.command(back).output()?.success()?;
    check_killed(killed)?;
    ensure!(device(host, FIRST.bdf)?["driver"] == "nvme", "not back");
    nothing_is_held(host)
}

/// It ended by the kill, and not by itself with an error before.
fn check_killed(killed: Running) -> Result<()> {
    let ended = killed.end()?;
    ensure!(ended.exit == Exit::Signal(9), "not by the kill: {ended}");
    ensure!(ended.errors.is_empty(), "{ended}");
    Ok(())
}

/// Runs the VM on a terminal, with its settings shown before and after. While it runs, `meanwhile`
/// is done with it. Fails unless the settings are as before; returns the exit status.
fn status_on_terminal(
    host: &Host,
    vm: &Vm,
    meanwhile: impl FnOnce(&mut Running) -> Result<()>,
) -> Result<String> {
    let script = "echo tty=$(tty); echo before=$(stty -g); $VM; status=$?
        echo; echo status=$status; echo after=$(stty -g)";
    let mut running = vm.on_terminal(host, script)?;
    running.until("before=")?;
    meanwhile(&mut running)?;
    let ended = running.end()?.exits(0)?;
    let word = |key: &str| {
        let value = ended.said.lines().find_map(|line| line.strip_prefix(key));
        value.unwrap_or_default().trim().to_owned()
    };
    let (before, after) = (word("before="), word("after="));
    ensure!(!before.is_empty() && before == after, "{ended}");
    Ok(word("status="))
}

/// Fails unless the only terminal in use is in raw mode, or is not, as said.
fn terminal_is_raw(host: &Host, raw: bool) -> Result<()> {
    let settings = host.sh("stty -a -F /dev/pts/0").output()?.success()?;
    let is_raw = settings.text().contains("-icanon");
    ensure!(is_raw == raw, "{settings}");
    Ok(())
}

fn ctrl_a_x_ends_it_and_restores_the_terminal(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("shell").devices("nvme", 1);
    let status = status_on_terminal(host, &vm, |running| {
        terminal_is_raw(host, false)?;
        // Ctrl-c is the guest's, and so is a ctrl-a typed twice.
        // Said by what is to be interrupted, which therefore has the terminal.
        running.types("sh -c 'echo now; exec sleep 1000'")?;
        running.until("now\r\n")?;
        running.keys("\x03")?;
        running.types("echo now; read keys; echo $keys | xxd")?;
        running.until("now\r\n")?;
        running.keys("\x01\x01\n")?;
        running.until("010a")?;
        terminal_is_raw(host, true)?;
        running.keys("\x01x")
    })?;
    ensure!(status == "4", "status {status}");
    nothing_is_held(host)
}

fn a_signal_restores_the_terminal(host: &Host) -> Result<()> {
    let status = status_on_terminal(host, &Vm::new("sleep"), |running| {
        running.until("guest: init")?;
        terminal_is_raw(host, true)?;
        host.sh("kill -TERM $(pidof gantry)").output()?.success()?;
        Ok(())
    })?;
    ensure!(status == "143", "status {status}");
    Ok(())
}

fn a_start_up_error_leaves_the_terminal_alone(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[])?;
    let vm = Vm::new("none").devices("nvme", 1);
    let status = status_on_terminal(host, &vm, |running| running.until("error:"))?;
    ensure!(status == "1", "status {status}");
    let mut vm = Vm::new("none");
    vm.file["payload"]["kernel"] = json!("/bin/busybox");
    let status = status_on_terminal(host, &vm, |running| running.until("error:"))?;
    ensure!(status == "1", "status {status}");
    Ok(())
}

fn in_the_background_it_leaves_the_terminal_alone(host: &Host) -> Result<()> {
    // With job control, a job that is not in the foreground is stopped when it sets the terminal.
    let script = "set -m; $VM >/tmp/background 2>&1 & wait $!; echo status=$?";
    let ended = Vm::new("none").on_terminal(host, script)?.end()?.exits(0)?;
    ensure!(ended.said.contains("status=0"), "{ended}");
    let said = host.read_text("/tmp/background")?;
    ensure!(said.contains("guest: done"), "{said}");
    Ok(())
}

fn in_the_foreground_again_its_console_is_alive(host: &Host) -> Result<()> {
    let script = "set -m; echo before=$(stty -g); $VM &
        until [ -S /run/gantry/vm.sock ]; do sleep 0.1; done; sleep 1
        fg; echo; stty sane; stty -a; fg; status=$?
        echo; echo status=$status; echo after=$(stty -g)";
    let mut running = Vm::new("shell").on_terminal(host, script)?;
    running.types("echo ali''ve")?;
    running.until("alive")?;
    terminal_is_raw(host, true)?;
    // Stopped, the shell has the terminal, and gives it back with other settings.
    host.sh("kill -STOP $(pidof gantry | tr ' ' '\\n' | sort -n | head -n1)")
        .output()?
        .success()?;
    running.until("icanon")?;
    running.keys("echo a''gain\n")?;
    running.until("again")?;
    terminal_is_raw(host, true)?;
    running.keys("\x01x")?;
    let ended = running.end()?.exits(0)?;
    ensure!(ended.said.contains("status=4"), "{ended}");
    let after = ended
        .said
        .lines()
        .find_map(|line| line.strip_prefix("after="));
    let sane = after.is_some_and(|after| ended.said.contains(&format!("before={}", after.trim())));
    ensure!(sane, "{ended}");
    Ok(())
}

fn in_the_background_again_it_ends(host: &Host) -> Result<()> {
    // Ended where the terminal is not its own, it must neither set it nor be stopped for that.
    let script = "set -m; $VM; echo job=stopped; stty sane; echo before=$(stty -g); bg
        sleep 1; kill -TERM $(pidof gantry); wait %1; echo status=$?; echo after=$(stty -g)";
    let mut running = Vm::new("shell").on_terminal(host, script)?;
    running.until("/ # ")?;
    host.sh("kill -STOP $(pidof gantry | tr ' ' '\\n' | sort -n | head -n1)")
        .output()?
        .success()?;
    running.until("job=stopped")?;
    let ended = running.end()?.exits(0)?;
    ensure!(ended.said.contains("status=143"), "{ended}");
    let word = |key| ended.said.lines().find_map(|line| line.strip_prefix(key));
    let (before, after) = (word("before="), word("after="));
    ensure!(before.is_some() && before == after, "{ended}");
    Ok(())
}

fn a_panicking_guest_boots_again(host: &Host) -> Result<()> {
    let vm = Vm::new("crash").append("panic=-1");
    let mut running = vm.start(host)?;
    running.until("guest: init")?;
    running.until("sysrq triggered crash")?;
    running.until("guest: init")?;
    running.signal(Signal::SIGTERM)?;
    running.end()?.exits(143)?;
    Ok(())
}

fn a_panic_is_told_of(host: &Host) -> Result<()> {
    let vm = Vm::new("crash").of_debian().memory("512M");
    let listen =
        "until [ -S /run/gantry/vm.sock ]; do sleep 0.1; done; exec gantry vm events vm --json";
    let mut events = Running::of(host.sh(listen).start()?);
    let mut running = vm.start(host)?;
    running.until("end Kernel panic")?;
    events.until("\"guest-panic\"")?;
    // What follows is the guest's to decide: this one waits.
    let info = host.sh("gantry vm info vm --json").output()?.success()?;
    ensure!(info.text().contains("Running"), "{info}");
    running.signal(Signal::SIGTERM)?;
    let ended = running.end()?.exits(143)?;
    let told = "the guest's kernel has panicked";
    ensure!(ended.errors.contains(told), "{ended}");
    events.end()?.exits(0)?;
    Ok(())
}

fn a_triple_fault_ends_it(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let vm = Vm::new("reboot").append("reboot=t").devices("nvme", 1);
    let ended = vm.run(host)?.exits(3)?;
    ensure!(ended.errors.contains("triple fault"), "{ended}");
    nothing_is_held(host)
}

fn a_kernel_that_dies_at_once_ends_it(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    host.write("/tmp/vms/deadly", deadly_kernel())?;
    let mut vm = Vm::new("none").devices("nvme", 1);
    vm.file["payload"] = json!({"kernel": "/tmp/vms/deadly"});
    let ended = vm.run(host)?.exits(3)?;
    ensure!(ended.errors.starts_with("error: the guest died"), "{ended}");
    ensure!(ended.errors.contains("earlyprintk"), "no advice: {ended}");
    ensure!(ended.errors.lines().count() <= 20, "{ended}");
    nothing_is_held(host)
}

/// An ELF file with a PVH entry at 1 MiB (Xen's note 18, `XEN_ELFNOTE_PHYS32_ENTRY`), where an
/// undefined instruction is.
fn deadly_kernel() -> Vec<u8> {
    const ENTRY: u32 = 1 << 20;
    const CODE_AT: u64 = 0x1000;
    const NOTE_AT: u64 = 0x800;
    let program = |kind: u32, flags: u32, offset: u64, address: u64, len: u64| {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(flags.to_le_bytes());
        for field in [offset, address, address, len, len, 4] {
            header.extend(field.to_le_bytes());
        }
        header
    };
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    // ELF64, little-endian, an executable for x86-64; two program headers of 56 bytes follow.
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [u64::from(ENTRY), 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let note_len = note.len() as u64;
    file.extend(program(1, 5, CODE_AT, ENTRY.into(), 16));
    file.extend(program(4, 4, NOTE_AT, 0, note_len));
    file.resize(NOTE_AT as usize, 0);
    file.extend(note);
    file.resize(CODE_AT as usize, 0);
    file.extend([0x0f, 0x0b]);
    file.resize(CODE_AT as usize + 16, 0);
    file
}
