//! The lab tests: many cases in one boot of the lab, each a named test.
//!
//! `cargo test -p gantry-tests --test lab [-- NAME]` runs them, or those whose names contain NAME. All of them
//! run in several labs side by side, one for each processor; those named in one lab. `--test-threads` says how
//! many labs instead. The output ends with a table of the suites and their times.
//! `GANTRY=/path/to/gantry` tests that program instead of a release build of this tree.
//! A lab that cannot start makes each of its cases fail. A case that loses a guest is tried once more in a
//! fresh lab, which the end of the output tells of: the emulator is known to lose some. Not so in a soak.
//!
//! # Adding a case
//! Write a function in the module it belongs to and name it in that module's `CASES`:
//! ```text
//! pub const CASES: &[Case] = cases![the_serial_is_shown];
//!
//! fn the_serial_is_shown(host: &Host) -> Result<()> {
//!     let list = host.sh("gantry device list --json").output()?.success()?.text();
//!     ensure!(list.contains("GANTRY-NVME0001"), "{list}");
//!     Ok(())
//! }
//! ```
//! A new module's `CASES` go into [`SUITES`] below, under each lab they are to run in. A case
//! restores what it changes: after it, no device is bound to vfio-pci, no gantry runs, no file is
//! locked. What it leaves behind fails it, and the next case gets a fresh lab.

mod api;
mod bench;
mod check;
mod demand;
mod devices;
mod disks;
mod endings;
mod errors;
mod firmware;
mod hotplug;
mod interrupts;
mod lab_kernel;
mod launch;
mod living;
mod net;
mod numa;
mod passthrough;
mod persist;
mod pool;
mod pools;
mod quarantine;
mod refusals;
mod removal;
mod resets;
mod runner;
mod sandbox;
mod sriov;
mod tenants;
mod the_lab;
mod uplinks;
mod usb;
mod vgpu;
mod vm;
mod xtask;

use std::process::ExitCode;
use std::sync::Arc;

use gantry_tests::cleanup;
use gantry_tests::lab::device::Device;
use gantry_tests::lab::images::HostKernel;
use libtest_mimic::{Arguments, Trial};
use runner::{Runner, Suite, labs_side_by_side};

/// Which cases run in which lab, the longest suites first. Cases are begun in this order; each thread that runs
/// them boots a lab for its first case of a suite, and keeps it to the last.
const SUITES: &[Suite] = &[
    Suite {
        name: "lab-kernel",
        kernel: HostKernel::Lab,
        append: "",
        devices: Device::usual,
        udev: false,
        iommufd: None,
        cases: &[
            ("the_lab", the_lab::CASES),
            ("lab_kernel", lab_kernel::CASES),
            ("launch", launch::CASES),
            ("launch", launch::MORE),
            ("firmware", firmware::CASES),
            ("living", living::CASES),
            ("passthrough", passthrough::CASES),
            ("passthrough", passthrough::MORE),
            ("disks", disks::CASES),
            ("net", net::CASES),
            ("api", api::CASES),
            ("hotplug", api::HOTPLUG),
            ("endings", endings::CASES),
            ("endings", endings::MORE),
            ("hotplug", hotplug::CASES),
            ("hotplug", hotplug::MORE),
            ("pools", pools::CASES),
            ("pools", pools::MORE),
            ("demand", demand::CASES),
            ("tenants", tenants::CASES),
            ("quarantine", quarantine::CASES),
            ("refusals", refusals::CASES),
            ("refusals", refusals::BOTH),
            ("sandbox", sandbox::CASES),
            ("sriov", sriov::CASES),
            ("vgpu", vgpu::CASES),
            ("interrupts", interrupts::CASES),
            ("removal", removal::CASES),
        ],
    },
    Suite {
        name: "iommufd",
        kernel: HostKernel::Lab,
        append: "",
        devices: Device::usual,
        udev: false,
        iommufd: Some(true),
        cases: &[
            ("passthrough", passthrough::CASES),
            ("passthrough", passthrough::MORE),
            ("hotplug", hotplug::CASES),
            ("hotplug", hotplug::MORE),
            ("sandbox", sandbox::CASES),
            ("sriov", sriov::CASES),
            ("vgpu", vgpu::CASES),
            ("interrupts", interrupts::CASES),
            ("removal", removal::CASES),
        ],
    },
    Suite {
        name: "stock",
        kernel: HostKernel::Stock,
        append: "",
        devices: Device::usual,
        udev: false,
        iommufd: None,
        cases: &[
            ("the_lab", the_lab::CASES),
            ("launch", launch::CASES),
            ("net", net::CASES),
            ("passthrough", passthrough::CASES),
            ("endings", endings::CASES),
            ("hotplug", hotplug::CASES),
            ("hotplug", hotplug::AUDITED),
            ("pools", pools::CASES),
            ("pools", pools::SWAP),
            ("refusals", refusals::CASES),
            ("refusals", refusals::NO_IOMMUFD),
            ("sandbox", sandbox::CASES),
            ("sandbox", sandbox::AUDITED),
            ("check", check::CASES),
            ("persist", persist::CASES),
            ("bench", bench::CASES),
            ("xtask", xtask::CASES),
        ],
    },
    Suite {
        name: "iommu-off",
        kernel: HostKernel::Stock,
        append: "intel_iommu=off",
        devices: Device::usual,
        udev: false,
        iommufd: None,
        cases: &[("check", check::IOMMU_OFF)],
    },
    Suite {
        name: "no-remapping",
        kernel: HostKernel::Stock,
        append: "intremap=off iommu=pt",
        devices: Device::with_console,
        udev: false,
        iommufd: None,
        cases: &[("check", check::NO_REMAPPING), ("pools", pools::CONSOLE)],
    },
    Suite {
        name: "no-iommu",
        kernel: HostKernel::Stock,
        append: "iommu=off",
        devices: Device::usual,
        udev: false,
        iommufd: None,
        cases: &[("check", check::NO_IOMMU)],
    },
    Suite {
        name: "numa",
        kernel: HostKernel::Stock,
        append: "",
        devices: Device::on_two_nodes,
        udev: false,
        iommufd: None,
        cases: &[("numa", numa::CASES)],
    },
    Suite {
        name: "cards",
        kernel: HostKernel::Stock,
        append: "",
        devices: Device::only_cards,
        udev: true,
        iommufd: None,
        cases: &[
            ("uplinks", uplinks::CASES),
            ("errors", errors::CASES),
            ("resets", resets::CASES),
            ("persist", persist::UDEV),
        ],
    },
    Suite {
        name: "devices",
        kernel: HostKernel::Lab,
        append: "",
        devices: Device::of_each_kind,
        udev: false,
        iommufd: None,
        cases: &[
            ("devices", devices::CASES),
            ("interrupts", interrupts::CARDS),
        ],
    },
    Suite {
        name: "usb",
        kernel: HostKernel::Lab,
        append: "",
        devices: Device::only_usb,
        udev: false,
        iommufd: None,
        cases: &[("usb", usb::CASES), ("passthrough", passthrough::HUGE)],
    },
];

/// Whether `cargo xtask soak` runs this.
fn is_soak() -> bool {
    std::env::var_os("GANTRY_ROUNDS").is_some()
}

/// How often a case repeats what it repeats: `usual` times, or as often as `cargo xtask soak` says.
fn rounds(usual: u64) -> u64 {
    let soak = std::env::var("GANTRY_ROUNDS").ok();
    soak.and_then(|rounds| rounds.parse().ok()).unwrap_or(usual)
}

fn main() -> ExitCode {
    if let Err(error) = cleanup::on_signals() {
        eprintln!("error: cannot watch for signals: {error}");
        return ExitCode::FAILURE;
    }
    let mut arguments = Arguments::from_args();
    // Each thread has a lab of its own. A few cases are sooner done in one, and the processors of a soak's
    // labs run beside each other already.
    let few = arguments.filter.is_some() || is_soak();
    arguments.test_threads = arguments
        .test_threads
        .or_else(|| Some(if few { 1 } else { labs_side_by_side() }));
    let runner = Arc::new(Runner::default());
    let mut trials = Vec::new();
    for suite in SUITES {
        for (module, cases) in suite.cases {
            for case in *cases {
                let runner = Arc::clone(&runner);
                let name = format!("{}::{module}::{}", suite.name, case.name);
                trials.push(Trial::test(name.clone(), move || {
                    runner.run(suite, case, &name)
                }));
            }
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    runner.clear();
    conclusion.exit_code()
}
