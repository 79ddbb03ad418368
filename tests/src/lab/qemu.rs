//! The simulated machine: what it is made of, its QEMU command line, its process.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::device::Device;
use super::packages;
use crate::cleanup::OwnedChild;
use crate::protocol::PORT_NAME;

/// QEMU itself, among its unpacked packages.
pub fn program(tree: &Path) -> Result<PathBuf> {
    packages::find_in(tree, &["usr/bin/qemu-system-x86_64"])
}

/// Everything that makes one machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Unpacked packages that hold QEMU and its firmware.
    pub qemu: PathBuf,
    /// Kernel image of the lab host.
    pub kernel: PathBuf,
    /// Added to the kernel's command line.
    pub append: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u8,
    /// Whether the processors run beside each other; else they take turns.
    pub parallel: bool,
    /// Devices, in the order of their slots.
    pub devices: Vec<Device>,
    /// More arguments, after all others.
    pub more: Vec<String>,
    /// Folder of the initramfs (`initrd`), the disks, the console's log and QEMU's own.
    pub folder: PathBuf,
}

impl Machine {
    /// The kernel console's log.
    pub fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// QEMU's messages.
    pub fn messages(&self) -> PathBuf {
        self.folder.join("qemu.log")
    }

    fn arguments(&self) -> Vec<String> {
        let share = |place: &str| self.qemu.join(place).display().to_string();
        let mut arguments: Vec<String> = [
            "-L",
            &share("usr/share/qemu"),
            "-L",
            &share("usr/share/seabios"),
            "-M",
            "q35,kernel-irqchip=split",
            "-accel",
            match self.parallel {
                true => "tcg,thread=multi",
                false => "tcg,thread=single",
            },
            "-cpu",
            "max,+svm,+npt",
            "-smp",
            &self.cpus.to_string(),
            "-m",
            &format!("{}M", self.memory_mib),
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            &format!("file:{}", self.console().display()),
            // The agent's wire is QEMU's standard input, the monitor's its standard output: two
            // inherited sockets, so there is no path to agree on and nothing to clean up.
            "-chardev",
            "socket,id=agent,fd=0",
            "-chardev",
            "socket,id=monitor,fd=1",
            "-mon",
            "chardev=monitor,mode=control",
            "-device",
            "intel-iommu,intremap=on,aw-bits=48",
            "-device",
            "virtio-serial-pci,id=wire,addr=0x2",
            "-device",
            &format!("virtserialport,chardev=agent,name={PORT_NAME}"),
            "-kernel",
            &self.kernel.display().to_string(),
            "-initrd",
            &self.folder.join("initrd").display().to_string(),
            "-append",
            &format!(
                // Linux counts timer interrupts while it spins for 10 ticks, and panics for want of
                // four: on a machine with other work to do there may be fewer. The lab kernel has no loop
                // devices by itself, as its guests need none.
                "console=ttyS0 intel_iommu=on no_timer_check loop.max_loop=8 panic=-1 quiet rdinit=/init {}",
                self.append
            ),
        ]
        .map(str::to_owned)
        .to_vec();
        let on_node = |device: &Device| matches!(device, Device::NvmeOnNode { .. });
        if self.devices.iter().any(on_node) {
            arguments.extend(self.two_nodes());
        }
        for (index, device) in self.devices.iter().enumerate() {
            arguments.extend(device.backend(index, &self.folder));
            arguments.extend(device.arguments(index, &self.folder));
        }
        arguments.extend_from_slice(&self.more);
        arguments
    }

    /// Two NUMA nodes, the first with one processor.
    fn two_nodes(&self) -> Vec<String> {
        let half = self.memory_mib / 2;
        let node = |number: u8, cpus: String| {
            [
                "-object".to_owned(),
                format!("memory-backend-ram,id=ram{number},size={half}M"),
                "-numa".to_owned(),
                format!("node,nodeid={number},cpus={cpus},memdev=ram{number}"),
            ]
        };
        let others = format!("1-{}", self.cpus.saturating_sub(1));
        [node(0, "0".to_owned()), node(1, others)].concat()
    }

    /// Starts QEMU. The process dies with the returned value, and with this process.
    pub fn start(&self) -> Result<Running> {
        let (agent, theirs_agent) = UnixStream::pair()?;
        let (monitor, theirs_monitor) = UnixStream::pair()?;
        let binary = program(&self.qemu)?;
        // setpriv is part of every Debian: QEMU goes when we do, even by SIGKILL.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .args(packages::loader(&self.qemu)?)
            .arg(&binary)
            .args(self.arguments())
            .stdin(OwnedFd::from(theirs_agent))
            .stdout(OwnedFd::from(theirs_monitor))
            .stderr(fs::File::create(self.messages())?);
        let child = OwnedChild::spawn(&mut command)
            .with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(Running {
            child,
            agent,
            monitor,
        })
    }
}

/// A started machine.
#[derive(Debug)]
pub struct Running {
    /// QEMU.
    pub child: OwnedChild,
    /// The agent's wire.
    pub agent: UnixStream,
    /// The monitor's wire, which speaks QMP.
    pub monitor: UnixStream,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_slots_of_their_own() {
        let machine = Machine {
            qemu: "/q".into(),
            kernel: "/k".into(),
            append: "a=b".into(),
            memory_mib: 1024,
            cpus: 2,
            parallel: false,
            devices: Device::usual(),
            more: vec!["-device".into(), "e1000e".into()],
            folder: "/f".into(),
        };
        let arguments = machine.arguments();
        let all = arguments.join(" ");
        assert!(all.contains("bus=pcie.0,chassis=0,slot=0,addr=0x10"));
        assert!(all.contains("drive=disk1,serial=GANTRY-NVME0002"));
        assert!(all.contains("file.filename=/f/GANTRY-NVME0001.raw"));
        assert!(all.contains("bochs-display,id=dev4,addr=0x14.0,multifunction=on"));
        assert!(all.contains("rdinit=/init a=b"));
        assert!(all.ends_with("-device e1000e"));
        assert!(all.contains("-accel tcg,thread=single"));
        let parallel = Machine {
            parallel: true,
            ..machine
        };
        let parallel = parallel.arguments().join(" ");
        assert!(parallel.contains("-accel tcg,thread=multi"));
        // The IOMMU has to come before every device that it is to translate for.
        let position = |what: &str| arguments.iter().position(|a| a.starts_with(what)).unwrap();
        assert!(position("intel-iommu") < position("virtio-serial-pci"));
        assert!(position("intel-iommu") < position("nvme"));
    }
}
