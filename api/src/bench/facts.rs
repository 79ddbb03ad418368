//! Facts of the host that figures depend on.

use std::fs;
use std::path::Path;

use gantry_resources::base::HostPaths;

use super::model::Host;

/// Vendors of devices that only emulators have.
const EMULATED: [&str; 3] = ["1234", "1af4", "1b36"];

/// Those of this host.
pub fn host(paths: &HostPaths, guest_kernel: &Path, devices: &[String]) -> Host {
    let cpuinfo = text(&paths.proc.join("cpuinfo"));
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("", |(_, model)| model);
    let dmi = paths.sysfs.join("class/dmi/id");
    let maker = ["sys_vendor", "product_name"].map(|name| text(&dmi.join(name)));
    Host {
        name: text(&paths.proc.join("sys/kernel/hostname")),
        kernel: kernel(paths),
        cpu: cpu.to_owned(),
        cpus: cpuinfo
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count() as u32,
        simulated: simulated(&cpuinfo, &maker.join(" "), devices),
        guest_kernel: guest_kernel.display().to_string(),
        guest_access: None,
    }
}

/// The running kernel, as `uname -r` says.
pub fn kernel(paths: &HostPaths) -> String {
    text(&paths.proc.join("sys/kernel/osrelease"))
}

/// What simulates the host or the devices with these ids, if anything does.
fn simulated(cpuinfo: &str, maker: &str, ids: &[String]) -> Option<String> {
    let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    let virtual_cpu = flags.any(|line| line.split_whitespace().any(|flag| flag == "hypervisor"));
    let mut reasons = Vec::new();
    if virtual_cpu || maker.contains("QEMU") {
        reasons.push(match maker.trim() {
            "" => "the host is a virtual machine".to_owned(),
            maker => format!("the host is a virtual machine ({maker})"),
        });
    }
    let vendor = |id: &&String| EMULATED.contains(&id.split(':').next().unwrap_or_default());
    if let Some(id) = ids.iter().find(vendor) {
        reasons.push(format!("device {id} is an emulated one"));
    }
    (!reasons.is_empty()).then(|| reasons.join(", and "))
}

fn text(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_host_is_known_by_its_processor_its_maker_or_its_devices() {
        let told = |flags: &str, maker: &str, id: &str| {
            simulated(
                &format!("processor: 0\nflags : {flags}\n"),
                maker,
                &[id.to_owned()],
            )
        };
        assert_eq!(told("svm npt", "Dell Inc. R760", "144d:a80a"), None);
        assert!(
            told("svm hypervisor", "", "144d:a80a")
                .unwrap()
                .contains("virtual")
        );
        assert!(
            told("svm", "QEMU Standard PC", "144d:a80a")
                .unwrap()
                .contains("QEMU")
        );
        assert!(
            told("svm", "Dell", "1b36:0010")
                .unwrap()
                .contains("1b36:0010")
        );
    }
}
