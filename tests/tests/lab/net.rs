//! Cases about networks, sockets and random numbers, which the host's kernel gives to guests.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use gantry_tests::protocol::Exit;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::passthrough::count_exits;
use crate::pool::nothing_is_held;
use crate::runner::{Case, cases};
use crate::vm::{Running, Vm};

/// For every host kernel.
pub const CASES: &[Case] = cases![
    a_guest_talks_to_its_host_and_goes_on_after_a_reboot,
    a_guest_uses_as_many_queues_as_it_has_processors,
    packets_cause_no_exit_to_user_space,
    a_tap_that_cannot_be_had_is_refused,
    random_numbers_and_sockets_come_from_the_host,
];

/// The guest's address in the cases; the host's is 10.7.0.1.
const UP: &str = "ip address add 10.7.0.2/24 dev eth0; ip link set eth0 up";
const MAC: &str = "52:54:00:00:07:02";

/// Loads the modules of networks and sockets, where they are not in the kernel.
fn with_modules(host: &Host) -> Result<()> {
    host.sh("modprobe -a tun vhost_net vhost_vsock 2>/dev/null; ls /dev/net/tun /dev/vhost-net /dev/vhost-vsock")
        .output()?
        .success()?;
    Ok(())
}

/// A VM with a network on a tap of its own.
fn with_tap() -> Vm {
    with_net(json!({"ip": "10.7.0.1", "mac": MAC}))
}

fn with_net(net: Value) -> Vm {
    let mut vm = Vm::new("shell");
    vm.file["net"] = json!([net]);
    vm
}

/// Fails if a tap that gantry makes is there.
fn no_tap_is_left(host: &Host) -> Result<()> {
    let left = host.sh("ls /sys/class/net | grep gantry; true").output()?;
    let left = left.success()?.text();
    ensure!(left.is_empty(), "this is left:\n{left}");
    nothing_is_held(host)
}

/// Runs a script on the host.
fn on_host(host: &Host, script: &str) -> Result<String> {
    Ok(host.sh(script).output()?.success()?.text())
}

fn a_guest_talks_to_its_host_and_goes_on_after_a_reboot(host: &Host) -> Result<()> {
    with_modules(host)?;
    on_host(
        host,
        "dd if=/dev/urandom of=/tmp/sent bs=64k count=40 2>/dev/null",
    )?;
    let sum = on_host(host, "echo $(sha256sum </tmp/sent)")?;
    let mut vm = with_tap();
    vm.file["net"][0]["mtu"] = json!(4000);
    let mut running = vm.start(host)?;
    for boot in 0..2 {
        running.types("echo guest: is=$(cd /sys/class/net/eth0; cat address mtu)")?;
        running.types(UP)?;
        running.types(
            "ping -q -c 3 -s 3900 10.7.0.1 | sed 's/^[0-9].*, \\([0-9]*\\) .*/guest: pings=\\1/'",
        )?;
        running.until("guest: pings=")?;
        let sends = host
            .sh("nc -l -p 5000 </tmp/sent; nc -l -p 5001 | sha256sum")
            .start()?;
        // The listener is there once it is asked.
        running.types("until nc 10.7.0.1 5000 >/tmp/got && [ -s /tmp/got ]; do sleep 0.2; done")?;
        running.types("until nc 10.7.0.1 5001 </tmp/got; do sleep 0.2; done")?;
        running.types("echo guest: got=$(sha256sum </tmp/got)")?;
        running.until("guest: got=")?;
        let back = Running::of(sends).end()?.exits(0)?;
        ensure!(
            back.said.trim().starts_with(sum.trim_end_matches(" -")),
            "{back}"
        );
        running.types(if boot == 0 {
            "reboot -f"
        } else {
            "poweroff -f"
        })?;
    }
    let ended = running.end()?.powered_off()?;
    let is = format!("{MAC} 4000");
    ensure!(ended.values("is").eq([&*is, &*is]), "{ended}");
    ensure!(ended.values("pings").eq(["3", "3"]), "{ended}");
    ensure!(ended.values("got").eq([&*sum, &*sum]), "{ended}");
    no_tap_is_left(host)
}

/// With one processor, the guest uses one pair of queues of two: what the host sends must not go to the other.
fn a_guest_uses_as_many_queues_as_it_has_processors(host: &Host) -> Result<()> {
    with_modules(host)?;
    on_host(
        host,
        "/bin/ip tuntap add tap7 mode tap multi_queue && /bin/ip address add 10.7.0.1/24 dev tap7",
    )?;
    for processors in [2, 1] {
        let net = json!({"tap": "tap7", "num_queues": 4, "mac": MAC});
        let mut running = with_net(net).cpus(processors).start(host)?;
        running.types(UP)?;
        running.types("echo guest: irqs=$(grep -cE 'virtio0-(in|out)put' /proc/interrupts)")?;
        running.types("until ping -c 1 -W 1 10.7.0.1; do :; done; echo guest: up")?;
        running.until("guest: up\r\n")?;
        // Each is a flow of its own.
        let flows = on_host(
            host,
            "for n in 1 2 3 4 5 6 7 8; do ping -q -c 1 -W 5 10.7.0.2 >/dev/null && echo $n; done; true",
        )?;
        ensure!(
            flows.split_whitespace().count() == 8,
            "{processors}: {flows}"
        );
        running.types("poweroff -f")?;
        let ended = running.end()?.powered_off()?;
        ensure!(ended.value("irqs")? == "4", "{ended}");
    }
    // It was the host's before, and still is.
    on_host(host, "/bin/ip link delete tap7")?;
    no_tap_is_left(host)
}

fn packets_cause_no_exit_to_user_space(host: &Host) -> Result<()> {
    with_modules(host)?;
    let mut running = with_tap().start(host)?;
    running.types(UP)?;
    running.types(
        "until ping -c 1 -W 1 10.7.0.1; do :; done; echo guest: floods; ping -q -A 10.7.0.1",
    )?;
    running.until("guest: floods\r\n")?;
    // Then the terminal, which is no part of what is counted, is quiet.
    until_received(host, 50)?;
    count_exits(host, true)?;
    until_received(host, 500)?;
    let exits = count_exits(host, false)?;
    ensure!(
        exits == 0,
        "{exits} exits while 500 packets went there and back"
    );
    running.signal(Signal::SIGKILL)?;
    running.end()?;
    // The kernel has taken the tap away with the process.
    no_tap_is_left(host)
}

/// Waits until the host has received so many packets more.
fn until_received(host: &Host, packets: u32) -> Result<()> {
    let script = format!(
        "seen() {{ cat /sys/class/net/gantry0/statistics/rx_packets; }}; end=$(( $(seen) + {packets} ))
         while [ $(seen) -lt $end ]; do sleep 0.05; done"
    );
    on_host(host, &script).map(drop)
}

fn a_tap_that_cannot_be_had_is_refused(host: &Host) -> Result<()> {
    with_modules(host)?;
    on_host(
        host,
        "/bin/ip tuntap add tap8 mode tap; /bin/ip tuntap add tap9 mode tap multi_queue; /bin/ip tuntap add tun9 mode tun",
    )?;
    let mut first = with_net(json!({"tap": "tap8"}));
    first.file["net"] = json!([{"tap": "tap8"}, {"tap": "tap9"}]);
    first.file["vsock"] = json!({"cid": 7});
    let mut first = first.named("first").start(host)?;
    first.until("guest: init")?;
    let mut said = Vec::new();
    for (net, words) in [
        (
            json!({"tap": "none9"}),
            "tap: the host has no interface none9: make it with `ip tuntap add none9",
        ),
        (json!({"tap": "lo"}), "tap: lo is no tap"),
        (json!({"tap": "tun9"}), "tap: tun9 is no tap"),
        (
            json!({"tap": "tap8"}),
            "tap: tap8 is in use by another process",
        ),
        (
            json!({"tap": "tap9"}),
            "tap: tap9 is in use by another process",
        ),
        (
            json!({"tap": "tap8", "num_queues": 4}),
            "num_queues: tap8 was made with one queue",
        ),
    ] {
        let ended = with_net(net).named("second").run(host)?;
        said.push((format!("net[0]: {words}"), ended));
    }
    let mut same = Vm::new("none").named("second");
    same.file["vsock"] = json!({"cid": 7});
    let words = "vsock.cid: another VM of this host has CID 7: choose another one";
    said.push((words.to_owned(), same.run(host)?));
    on_host(host, "mv /dev/vhost-net /dev/vhost-gone")?;
    let words = "net[0]: cannot open /dev/vhost-net: No such file or directory (os error 2): load its module with \
                 `modprobe vhost_net`";
    let without = with_net(json!({})).named("second").run(host);
    on_host(host, "mv /dev/vhost-gone /dev/vhost-net")?;
    said.push((words.to_owned(), without?));
    first.types("poweroff -f")?;
    first.end()?.powered_off()?;
    on_host(
        host,
        "for tap in tap8 tap9 tun9; do /bin/ip link delete $tap; done",
    )?;
    for (words, ended) in said {
        ensure!(ended.errors.contains(&words), "{words}: {ended}");
        ensure!(ended.exit == Exit::Code(1), "{ended}");
    }
    no_tap_is_left(host)
}

fn random_numbers_and_sockets_come_from_the_host(host: &Host) -> Result<()> {
    with_modules(host)?;
    let mut vm = Vm::new("shell");
    vm.file["rng"] = json!({"src": "/dev/urandom"});
    vm.file["vsock"] = json!({"cid": 5});
    let mut running = vm.start(host)?;
    running.types("echo guest: source=$(cat /sys/class/misc/hw_random/rng_current)")?;
    running.types("for n in 1 2; do echo guest: number=$(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | od -An -tx8); done")?;
    running.types("echo guest: sockets=$(ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport | grep -c virtio)")?;
    running.types("poweroff -f")?;
    let ended = running.end()?.powered_off()?;
    ensure!(ended.value("source")? == "virtio_rng.0", "{ended}");
    ensure!(ended.value("sockets")? == "1", "{ended}");
    let mut numbers: Vec<&str> = ended.values("number").collect();
    numbers.dedup();
    ensure!(
        numbers.len() == 2 && numbers.iter().all(|number| number.len() > 30),
        "{ended}"
    );
    nothing_is_held(host)
}
