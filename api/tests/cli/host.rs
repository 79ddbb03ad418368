//! A host of files, the binary run over it, and how that ended.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// A host of files: two NVMe disks and a NIC, and a group for the disks.
pub struct Host(tempfile::TempDir);

impl Host {
    pub fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for dir in [
            "sys/bus/pci/devices",
            "sys/bus/pci/drivers",
            "dev",
            "proc/self",
            "run",
            "etc",
        ] {
            fs::create_dir_all(host.path(dir)).unwrap();
        }
        fs::write(host.path("proc/self/mountinfo"), "").unwrap();
        host.device("0000:00:03.0", ["0x8086", "0x1572", "0x020000"], "i40e", 3);
        host.device(
            "0000:01:00.0",
            ["0x1b36", "0x0010", "0x010802"],
            "vfio-pci",
            11,
        );
        host.device("0000:02:00.0", ["0x1b36", "0x0010", "0x010802"], "nvme", 2);
        let groups = r#"{"groups": [{"name": "disks", "type": "nvme", "class": "storage",
            "description": "local disks", "rules": [{"class": "0108"}]}]}"#;
        fs::write(host.path("etc/groups.json"), groups).unwrap();
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn device(&self, bdf: &str, ids: [&str; 3], driver: &str, group: u32) {
        let dir = self.path("sys/bus/pci/devices").join(bdf);
        fs::create_dir_all(&dir).unwrap();
        let [vendor, device, class] =
            ids.map(|id| u32::from_str_radix(id.trim_start_matches("0x"), 16).unwrap());
        let modalias = format!(
            "pci:v{vendor:08X}d{device:08X}sv00000000sd00000000bc{:02X}sc{:02X}i{:02X}\n",
            class >> 16,
            class >> 8 & 0xff,
            class & 0xff
        );
        fs::write(dir.join("modalias"), modalias).unwrap();
        for (name, text) in [
            ("numa_node", "-1\n"),
            ("driver_override", "(null)\n"),
            ("reset_method", "flr\n"),
        ] {
            fs::write(dir.join(name), text).unwrap();
        }
        let driver_dir = self.path("sys/bus/pci/drivers").join(driver);
        let group_dir = self.path(&format!("sys/kernel/iommu_groups/{group}"));
        fs::create_dir_all(&driver_dir).unwrap();
        fs::create_dir_all(group_dir.join("devices")).unwrap();
        symlink(&dir, group_dir.join("devices").join(bdf)).unwrap();
        symlink(driver_dir, dir.join("driver")).unwrap();
        symlink(group_dir, dir.join("iommu_group")).unwrap();
    }

    /// The VFIO node of an IOMMU group.
    pub fn node(&self, group: u32) {
        fs::create_dir_all(self.path("dev/vfio")).unwrap();
        fs::write(self.path(&format!("dev/vfio/{group}")), "").unwrap();
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
        command
            .arg("--host-root")
            .arg(self.0.path())
            .args(args)
            .stdin(Stdio::null());
        for name in [
            "GANTRY_RUN_DIR",
            "GANTRY_CONFIG_DIR",
            "NO_COLOR",
            "CLICOLOR_FORCE",
        ] {
            command.env_remove(name);
        }
        command
    }

    pub fn gantry(&self, args: &[&str]) -> Done {
        Done::from(self.command(args).output().unwrap())
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Done {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Done {
    /// Output of a command that must have gone well, and quietly.
    pub fn ok(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""));
        self.out
    }

    /// Error text of a command that must have failed with `code`, and printed nothing else.
    pub fn failed(self, code: i32) -> String {
        assert_eq!(
            (self.code, self.out.as_str()),
            (Some(code), ""),
            "{}",
            self.err
        );
        self.err
    }
}

/// First words of each line after the header.
pub fn first_words(table: &str) -> Vec<&str> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}
