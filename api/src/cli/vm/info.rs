//! `gantry vm info`: one VM, and the devices that it has.

use std::io::{self, Write};

use clap::Args;
use gantry_resources::base::{ByteSize, HostPaths, Numbers};

use super::{find, watch};
use crate::http::wire::{Device, Placement, VmInfo};
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{Column, Shrink, cell, column, write_table};

#[derive(Debug, Args)]
#[command(after_help = "\
States of devices:
  announced  the guest was notified of it
  enabled    the guest has enabled its memory or I/O ports, or a disk's
             driver is ready
  detaching  the guest was asked to release it

Examples:
  gantry vm info web-1
  gantry vm info web-1 --json")]
pub struct InfoArgs {
    /// Name of the VM; `gantry vm list` shows them
    #[arg(value_name = "VM")]
    vm: String,
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort the devices by
    #[arg(long, value_name = "COLUMN", value_parser = column(&COLUMNS))]
    sort: Option<String>,
}

const COLUMNS: [Column; 5] = [
    Column::full("device"),
    Column::full("host"),
    Column::full("guest"),
    Column::new("group", Shrink::Drop(0)),
    Column::full("state"),
];

pub fn info(args: &InfoArgs, paths: &HostPaths) -> Result<(), Failure> {
    let client = find::vm(&args.vm, paths)?;
    let info: VmInfo = client.get("vm.info")?;
    if args.json {
        return print_json(&info);
    }
    print(|out| show(&info, args.sort.as_deref(), out))
}

fn show(info: &VmInfo, sort: Option<&str>, out: &mut dyn Write) -> io::Result<()> {
    let config = &info.config;
    writeln!(out, "name     {}", info.name)?;
    writeln!(out, "state    {}", info.state)?;
    if let Some(uptime) = info.uptime {
        writeln!(out, "uptime   {}", super::uptime(uptime))?;
    }
    if let Some(ended) = &info.ended {
        writeln!(out, "ended    {}", ended.replace('\n', "\n         "))?;
    }
    writeln!(out, "vcpus    {}", config.cpus.boot_vcpus)?;
    writeln!(out, "memory   {}", ByteSize(config.memory.size))?;
    if let Some(placement) = &info.placement {
        writeln!(out, "numa     {}", numa(placement))?;
    }
    if let Some(kernel) = &config.payload.kernel {
        writeln!(out, "kernel   {}", kernel.display())?;
    }
    if let Some(firmware) = &config.payload.firmware {
        writeln!(out, "firmware {}", firmware.display())?;
    }
    if let Some(initramfs) = &config.payload.initramfs {
        writeln!(out, "initrd   {}", initramfs.display())?;
    }
    if !config.payload.cmdline.is_empty() {
        writeln!(out, "cmdline  {}", config.payload.cmdline)?;
    }
    for disk in &config.disks {
        let read_only = if disk.readonly { ", read-only" } else { "" };
        writeln!(
            out,
            "disk     {}: {}{read_only}",
            disk.id,
            disk.path.display()
        )?;
    }
    for net in &config.net {
        let tap = net.tap.as_deref().unwrap_or("a tap of its own");
        writeln!(out, "net      {}: {tap}, {}", net.id, net.mac)?;
    }
    if let Some(vsock) = &config.vsock {
        writeln!(out, "vsock    CID {}", vsock.cid)?;
    }
    writeln!(out, "slots    {}", super::slots(info))?;
    if info.devices.is_empty() {
        return Ok(());
    }
    let rows = info.devices.iter().map(cells).collect();
    writeln!(out)?;
    write_table(out, &COLUMNS, rows, sort)?;
    let mut said: Vec<&String> = Vec::new();
    for device in &info.devices {
        let others = &device.together_with;
        if others.is_empty() || said.contains(&&device.id) {
            continue;
        }
        said.extend(others);
        let all: Vec<String> = [&device.id].into_iter().chain(others).cloned().collect();
        let all = watch::list(&all);
        writeln!(out, "\n{all} are one device: they are detached together")?;
    }
    Ok(())
}

/// `node 1, CPUs 4-7`
fn numa(placement: &Placement) -> String {
    let list = |numbers: &[u32]| numbers.iter().copied().collect::<Numbers>();
    let nodes = list(&placement.numa_nodes);
    match placement.host_cpus.as_slice() {
        [] => format!("node {nodes}"),
        cpus => format!("node {nodes}, CPUs {}", list(cpus)),
    }
}

fn cells(device: &Device) -> Vec<String> {
    vec![
        device.id.clone(),
        watch::on_host(device),
        device.pci_bdf.clone(),
        cell(device.group.as_ref()),
        device.state.to_string(),
    ]
}
