//! Cases about the sandbox: nothing that gantry does is outside its filters.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use nix::sys::signal::Signal;

use crate::pool::{FIRST, Pool};
use crate::runner::{Case, cases};
use crate::vm::Vm;

/// For every host kernel.
pub const CASES: &[Case] = cases![without_filters_a_guest_runs_as_well];

/// For host kernels that can audit.
pub const AUDITED: &[Case] = cases![nothing_is_outside_the_filters];

fn without_filters_a_guest_runs_as_well(host: &Host) -> Result<()> {
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut vm = Vm::new("sleep").devices("nvme", 1);
    for (flags, filters) in [("--seccomp off", "0"), ("--seccomp on", "2")] {
        vm.flags = flags;
        let mut running = vm.start(host)?;
        running.until("guest: init")?;
        // Seccomp's mode of every thread; KVM's own threads have none.
        let script =
            "for task in /proc/$(pidof gantry | tr ' ' '\\n' | sort -n | head -n1)/task/*; do
                case $(cat $task/comm) in kvm-*) ;; *) sed -n 's/^Seccomp:.//p' $task/status ;; esac
            done | sort -u";
        let modes = host.sh(script).output()?.success()?.text();
        ensure!(modes == filters, "{flags}: {modes}");
        running.signal(Signal::SIGTERM)?;
        running.end()?.exits(143)?;
    }
    Ok(())
}

fn nothing_is_outside_the_filters(host: &Host) -> Result<()> {
    let logged = host.read_text("/proc/sys/kernel/seccomp/actions_logged")?;
    ensure!(logged.contains("log"), "the kernel logs {logged}");
    let _pool = Pool::of(host, &[FIRST.bdf])?;
    let mut vm = Vm::new("shell").cpus(2).devices("nvme", 1);
    vm.flags = "--seccomp log";
    let mut running = vm.start(host)?;
    running.types("dd if=/dev/nvme0n1 of=/dev/null bs=1M iflag=direct; reboot -f")?;
    running.until("guest: init")?;
    running.types("dd if=/dev/nvme0n1 of=/dev/null bs=1M iflag=direct; poweroff -f")?;
    running.end()?.powered_off()?;
    vm = Vm::new("reboot").append("reboot=t").devices("nvme", 1);
    vm.flags = "--seccomp log";
    vm.run(host)?.exits(3)?;
    let log = host
        .sh("dmesg | grep type=1326 || true")
        .output()?
        .success()?;
    ensure!(log.text().is_empty(), "{log}");
    Ok(())
}
