//! Cases about the host's way to the network where it is more than a card: bonds, VLANs, bridges.

use anyhow::{Result, ensure};
use gantry_tests::lab::Host;
use serde_json::json;

use crate::pool::{VIRTIO_CARD, device, nothing_is_held, stays};
use crate::runner::{Case, cases};
use crate::vm::Vm;

/// For a host with network cards whose kernel has bonds.
pub const CASES: &[Case] = cases![
    the_cards_of_a_bond_stay_with_the_host,
    the_card_below_a_vlan_on_a_bond_on_a_bridge_stays_with_the_host,
    no_vm_takes_a_card_of_a_bond,
    naming_the_card_takes_it_out_of_its_bond,
    a_virtio_card_without_its_driver_is_free,
];

/// One of VMware's, whose interface is its own child.
const CARD: &str = "0000:01:00.0";

/// The interface of a card.
fn interface(host: &Host, bdf: &str) -> Result<String> {
    let script = format!(
        "modprobe -a vmxnet3 virtio_net; ls -d /sys/bus/pci/devices/{bdf}/net/* /sys/bus/pci/devices/{bdf}/virtio*/net/* 2>/dev/null"
    );
    let path = host.sh(&script).output()?.text();
    Ok(path.rsplit('/').next().unwrap_or_default().to_owned())
}

/// Does `during` with a bond of both cards, and with what `above` makes of it: the last interface has the
/// default route.
fn with_bond(
    host: &Host,
    above: &str,
    top: &str,
    during: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let (one, other) = (interface(host, CARD)?, interface(host, VIRTIO_CARD)?);
    // Busybox's shell would take its own `ip`.
    let set_up = format!(
        "modprobe bonding max_bonds=0 && /bin/ip link add bond9 type bond mode active-backup &&
         /bin/ip link set {one} master bond9 && /bin/ip link set {other} master bond9 &&
         /bin/ip link set bond9 up && {above} &&
         /bin/ip address add 10.9.1.1/24 dev {top} && /bin/ip link set {top} up &&
         /bin/ip route add default via 10.9.1.2"
    );
    let result = host.sh(&set_up).output()?.success().and_then(|_| during());
    let clear = "for name in br9 bond9.7 bond9; do
            [ ! -e /sys/class/net/$name ] || /bin/ip link delete $name
        done";
    host.sh(clear).output()?.success()?;
    result
}

/// Fails unless both cards stay, with these words about each.
fn both_stay(host: &Host, words: &str) -> Result<()> {
    for bdf in [CARD, VIRTIO_CARD] {
        let says = format!("{bdf} is {}, {words}", interface(host, bdf)?);
        let way_out = format!("--override {bdf}");
        stays(host, bdf, &[&says, &way_out])?;
    }
    Ok(())
}

fn the_cards_of_a_bond_stay_with_the_host(host: &Host) -> Result<()> {
    with_bond(host, "true", "bond9", || {
        both_stay(host, "part of bond9, which carries a default route")
    })
}

fn the_card_below_a_vlan_on_a_bond_on_a_bridge_stays_with_the_host(host: &Host) -> Result<()> {
    let above = "/bin/ip link add link bond9 name bond9.7 type vlan id 7 &&
         /bin/ip link add br9 type bridge && /bin/ip link set bond9.7 master br9 up";
    with_bond(host, above, "br9", || {
        both_stay(
            host,
            "part of bond9; br9, connected to it, carries a default route",
        )
    })
}

/// Not even where the group says that a VM may take its devices from the host.
fn no_vm_takes_a_card_of_a_bond(host: &Host) -> Result<()> {
    with_bond(host, "true", "bond9", || {
        let rules = json!([{"slot": CARD}, {"slot": VIRTIO_CARD}]);
        let groups = json!({"groups": [{"name": "cards", "bind": "demand", "rules": rules}]});
        host.write("/etc/gantry/groups.json", groups.to_string())?;
        let refused = Vm::new("none").devices("cards", 1).run(host)?.exits(1)?;
        for bdf in [CARD, VIRTIO_CARD] {
            let words = format!(
                "{bdf} is {}, part of bond9, which carries a default route: the host uses it",
                interface(host, bdf)?
            );
            ensure!(refused.errors.contains(&words), "no {words:?}: {refused}");
            ensure!(device(host, bdf)?["state"] == "attached", "{bdf} moved");
        }
        let boot = host
            .command(["gantry", "device", "persist", CARD])
            .output()?
            .exits(1)?;
        ensure!(boot.errors().contains("part of bond9"), "{boot}");
        nothing_is_held(host)
    })
}

fn naming_the_card_takes_it_out_of_its_bond(host: &Host) -> Result<()> {
    with_bond(host, "true", "bond9", || {
        let detach = |overridden: &str| {
            host.command(["gantry", "device", "detach", CARD, "--override", overridden])
                .output()
        };
        let other = detach(VIRTIO_CARD)?.exits(1)?;
        ensure!(other.errors().contains("part of bond9"), "{other}");
        detach(CARD)?.success()?;
        ensure!(device(host, CARD)?["driver"] == "vfio-pci", "it stays");
        let left = host.read_text("/sys/class/net/bond9/bonding/slaves")?;
        ensure!(left == interface(host, VIRTIO_CARD)?, "{left} is left");
        host.command(["gantry", "device", "reattach", CARD])
            .output()?
            .success()?;
        Ok(())
    })
}

/// Nobody has an interface that there is not.
fn a_virtio_card_without_its_driver_is_free(host: &Host) -> Result<()> {
    let detach = || {
        host.command(["gantry", "device", "detach", VIRTIO_CARD, "--dry-run"])
            .output()
    };
    let name = interface(host, VIRTIO_CARD)?;
    let moved = format!("/bin/ip link set {name} down; unshare -n sleep 30 & echo $!; sleep 0.5");
    let pid = host.sh(&moved).output()?.success()?.text();
    let hide = format!("/bin/ip link set {name} netns {pid}");
    host.sh(&hide).output()?.success()?;
    let hidden = detach()?.exits(1)?;
    host.sh(&format!("kill {pid}; sleep 0.5")).output()?;
    ensure!(
        hidden.errors().contains("in another network namespace"),
        "{hidden}"
    );
    host.sh("modprobe -r virtio_net").output()?.success()?;
    detach()?.success()?;
    ensure!(!interface(host, VIRTIO_CARD)?.is_empty(), "no driver");
    Ok(())
}
