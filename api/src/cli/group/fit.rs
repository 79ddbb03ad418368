//! `gantry group fit`: shows the devices that a request would get, without taking them.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use gantry_resources::allocation::{Fit, RequestFit, fit};
use gantry_resources::base::{HostPaths, read_regular, read_text};
use gantry_resources::pools::{Aliases, DeviceRequest, Instance, Placement};

use crate::config::{self, LONGEST, LoadOptions, SourceText};
use crate::output::{print, print_json};
use crate::report::{FAILED, Failure, TRY_AGAIN, USAGE};
use gantry_vmm::NumaPolicy;

#[derive(Debug, Args)]
#[command(after_help = "\
REQUEST is the part of a VM's file that asks for devices, such a file, or Nova's words for aliases. \
Each request is shown with the devices that it would get, and how many devices each filter dropped. \
The exit status is 1 where something does not fit.

Examples:
  gantry group fit gpus:2
  gantry group fit '{\"devices\": [{\"group\": \"gpus\", \"count\": 2}]}'
  gantry group fit '{\"pci_passthrough:alias\": \"gpu:1, qat-c62x-vf:2\"}'
  gantry group fit 'gpu:1, qat-c62x-vf:2'
  gantry group fit vm.json")]
pub struct FitArgs {
    /// JSON, a file of it (- for standard input), or aliases with counts
    request: String,
    /// NUMA nodes of the host that the VM is bound to
    #[arg(long = "node", value_name = "NODE", value_delimiter = ',')]
    nodes: Vec<u32>,
    /// Take devices named by path that are in no group
    #[arg(long)]
    allow_ungrouped: bool,
    /// Show the result as JSON
    #[arg(long)]
    json: bool,
}

pub fn show(args: &FitArgs, paths: &HostPaths) -> Result<(), Failure> {
    let (requests, mut nodes) = read(args, paths)?;
    nodes.extend(&args.nodes);
    print_fit(paths, &requests, nodes, args.json)
}

/// Shows the devices that requests would get. A request that does not fit is an error.
pub fn print_fit(
    paths: &HostPaths,
    requests: &[DeviceRequest],
    nodes: BTreeSet<u32>,
    json: bool,
) -> Result<(), Failure> {
    if requests.is_empty() && !json {
        return print(|out| writeln!(out, "The request asks for no devices."));
    }
    let placement = Placement::bound(nodes);
    let result = fit(paths, requests, &placement)?;
    if json {
        print_json(&result)?;
    }
    let lacking = result.requests.iter().find(|request| !request.is_enough());
    if !json {
        print(|out| table(out, &result, lacking))?;
    }
    match lacking {
        None => Ok(()),
        Some(request) => Err(Failure::new(
            if request.is_temporary() {
                TRY_AGAIN
            } else {
                FAILED
            },
            format!("No valid host was found: {request}"),
        )),
    }
}

fn read(args: &FitArgs, paths: &HostPaths) -> Result<(Vec<DeviceRequest>, BTreeSet<u32>), Failure> {
    let wrong = |what: String| Failure::new(USAGE, what);
    let path = PathBuf::from(&args.request);
    let mut name = path.as_path();
    let text = args.request.trim_start();
    let text = match text.starts_with('{') {
        true => {
            name = Path::new("the request");
            text.to_owned()
        }
        false if text == "-" => {
            name = Path::new("<stdin>");
            read_text(std::io::stdin().lock(), LONGEST)
                .map_err(|error| wrong(format!("cannot read standard input: {error}")))?
        }
        false if path.is_file() => read_regular(&path, LONGEST)
            .map_err(|error| wrong(format!("cannot read {}: {error}", path.display())))?,
        false => {
            let Aliases(requests) = text.parse().map_err(wrong)?;
            return Ok((requests, BTreeSet::new()));
        }
    };
    let written = SourceText {
        text: &text,
        file: &name.display().to_string(),
        folder: name.parent().unwrap_or(Path::new("")),
    };
    let extras = LoadOptions {
        allow_ungrouped: args.allow_ungrouped,
        host: paths.clone(),
        ..LoadOptions::default()
    };
    let (requests, nodes) = config::requests(&written, &extras)?;
    let nodes = match &nodes {
        NumaPolicy::Only(nodes) => nodes.iter().collect(),
        NumaPolicy::NearDevices | NumaPolicy::Any => BTreeSet::new(),
    };
    Ok((requests, nodes))
}

/// Writes the devices that each request would get. The error describes the `lacking` one.
fn table(out: &mut dyn Write, result: &Fit, lacking: Option<&RequestFit>) -> io::Result<()> {
    for request in &result.requests {
        line(out, request)?;
        if lacking != Some(request) {
            drops(out, request)?;
        }
    }
    match &result.numa_nodes {
        Some(nodes) if result.fits => {
            let nodes: Vec<String> = nodes.iter().map(u32::to_string).collect();
            writeln!(out, "NUMA node {}", nodes.join(", "))
        }
        _ => Ok(()),
    }
}

fn line(out: &mut dyn Write, request: &RequestFit) -> io::Result<()> {
    let devices = request.devices.iter().map(ToString::to_string);
    let devices: Vec<String> = devices.chain(instances(&request.instances)).collect();
    let devices = match devices.as_slice() {
        [] => "none".to_owned(),
        devices => devices.join(" "),
    };
    match &request.from {
        Some(from) => {
            let got = request.cards + request.instances.len();
            writeln!(out, "{from}: {got} of {}: {devices}", request.wanted)
        }
        None => writeln!(out, "by address: {devices}"),
    }
}

/// How many devices are free, and which filters dropped the others.
fn drops(out: &mut dyn Write, request: &RequestFit) -> io::Result<()> {
    if let Some(group) = &request.inactive {
        writeln!(
            out,
            "  its virtual functions are not there: `gantry group activate {group}` makes them"
        )?;
    }
    // Devices that are created for the VM are not among the existing ones.
    if !request.instances.is_empty() {
        writeln!(out, "  {} free", request.free)?;
    } else if !request.dropped.is_empty() {
        let (drops, all) = (request.drops(), request.considered);
        writeln!(
            out,
            "  {} free; of {all} devices dropped: {drops}",
            request.free
        )?;
    }
    Ok(())
}

/// Existing mediated devices by their UUIDs, new ones by their number and type.
fn instances(all: &[Instance]) -> Vec<String> {
    let (there, new): (Vec<_>, Vec<_>) = all.iter().partition(|one| one.uuid.is_some());
    let mut made: Vec<(String, usize)> = Vec::new();
    for one in new {
        let what = format!("new {} of {}", one.kind, one.parent);
        match made.iter_mut().find(|(known, _)| *known == what) {
            Some((_, count)) => *count += 1,
            None => made.push((what, 1)),
        }
    }
    let there = there.into_iter().filter_map(|one| one.uuid);
    let made = made
        .into_iter()
        .map(|(what, count)| format!("{count} {what}"));
    there.map(|uuid| uuid.to_string()).chain(made).collect()
}
