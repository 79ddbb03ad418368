//! `gantry vm list`: the VMs that run.

use std::fmt;
use std::num::NonZeroU32;

use clap::Args;
use gantry_resources::base::{ByteSize, HostPaths};
use gantry_resources::holding::{RunningVm, running_vms};
use serde::Serialize;

use super::find;
use crate::http::client::{ClientError, is_stopped};
use crate::http::wire::{VmInfo, VmState, VmmPing};
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{Column, Shrink, cell, column, print_table};

#[derive(Debug, Args)]
#[command(after_help = "\
States:
  created    it can be booted
  running    its guest runs
  paused     its processors wait
  shut down  its guest has ended; it can be booted again
  no VM      it waits for one; `gantry vm shutdown NAME --process` ends it
  no socket  it has none (--no-api), or one elsewhere (--api-socket)
  tenant T   it is tenant T's, whose user controls it
  denied     it belongs to another user
  stopped    its process is stopped (ctrl-z); `kill -CONT PID` continues it
  silent     it does not answer

Examples:
  gantry vm list
  gantry vm list --sort memory
  gantry vm list --json")]
pub struct ListArgs {
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Column to sort by
    #[arg(long, value_name = "COLUMN", value_parser = column(&COLUMNS))]
    sort: Option<String>,
}

/// A VM that runs.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// The tenant that runs it, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    pid: Option<u32>,
    /// Its socket in the run directory, if it has one there.
    socket: Option<std::path::PathBuf>,
    state: State,
    info: Option<VmInfo>,
    /// Why it cannot be asked.
    problem: Option<String>,
}

/// The state of a VM, from its socket; or why it is unknown.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum State {
    Vm(VmState),
    Words(String),
}

impl State {
    fn words(words: impl Into<String>) -> Self {
        Self::Words(words.into())
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(state) => state.fmt(f),
            Self::Words(words) => f.write_str(words),
        }
    }
}

const COLUMNS: [Column; 8] = [
    Column::full("name"),
    Column::new("pid", Shrink::Drop(0)),
    Column::full("state"),
    Column::new("uptime", Shrink::Drop(4)),
    Column::new("vcpus", Shrink::Drop(1)),
    Column::new("memory", Shrink::Drop(2)),
    Column::new("slots", Shrink::Drop(3)),
    Column::new("devices", Shrink::Cut(12)),
];

pub fn list(args: &ListArgs, paths: &HostPaths) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for row in find::ask_all(paths, Row::of_socket) {
        rows.extend(row?);
    }
    let silent = running_vms(paths)?;
    let known: Vec<u32> = rows.iter().filter_map(|row| row.pid).collect();
    let silent = silent
        .into_iter()
        .filter(|vm| vm.record.pid.is_none_or(|pid| !known.contains(&pid.get())));
    rows.extend(silent.map(Row::of_record));
    if args.json {
        return print_json(&rows);
    }
    if rows.is_empty() {
        return print(|out| writeln!(out, "No VM runs."));
    }
    let cells = rows.iter().map(Row::cells).collect();
    print_table(&COLUMNS, cells, args.sort.as_deref())
}

impl Row {
    /// None if no process listens on the socket.
    fn of_socket(name: String, socket: std::path::PathBuf) -> Result<Option<Self>, Failure> {
        let client = find::connect(&socket, find::LIST_TIMEOUT)?;
        let mut row = Self {
            name,
            tenant: None,
            pid: None,
            socket: Some(socket),
            state: State::words("no VM"),
            info: None,
            problem: None,
        };
        match client.get("vmm.ping") {
            Ok(VmmPing { pid, .. }) => row.pid = Some(pid),
            Err(ClientError::NotListening { .. }) => return Ok(None),
            Err(error) => return Ok(Some(row.with_problem(&error))),
        }
        match client.get::<VmInfo>("vm.info") {
            Ok(info) => {
                row.state = State::Vm(info.state);
                row.info = Some(info);
            }
            // None is created.
            Err(ClientError::Refused { status: 404, .. }) => {}
            Err(error) => row = row.with_problem(&error),
        }
        Ok(Some(row))
    }

    fn with_problem(self, error: &ClientError) -> Self {
        let (state, pid) = match *error {
            ClientError::Denied { .. } => ("denied", None),
            ClientError::TimedOut { pid: Some(pid), .. } if is_stopped(pid) => {
                ("stopped", Some(pid))
            }
            ClientError::TimedOut { pid, .. } => ("silent", pid),
            _ => ("silent", None),
        };
        Self {
            pid: self.pid.or(pid),
            state: State::words(state),
            problem: Some(error.to_string()),
            ..self
        }
    }

    fn of_record(RunningVm { tenant, record }: RunningVm) -> Self {
        let state = tenant.as_ref().map(|tenant| format!("tenant {tenant}"));
        Self {
            name: record.name,
            tenant,
            pid: record.pid.map(NonZeroU32::get),
            socket: None,
            state: state.map_or_else(|| State::words("no socket"), State::Words),
            info: None,
            problem: None,
        }
    }

    fn cells(&self) -> Vec<String> {
        let info = self.info.as_ref();
        let devices = info.map(|info| {
            let names: Vec<&str> = info.devices.iter().map(|device| &*device.id).collect();
            names.join(" ")
        });
        vec![
            self.name.clone(),
            cell(self.pid),
            self.state.to_string(),
            cell(info.and_then(|info| info.uptime).map(super::uptime)),
            cell(info.map(|info| info.config.cpus.boot_vcpus)),
            cell(info.map(|info| ByteSize(info.config.memory.size))),
            cell(info.map(super::slots)),
            cell(devices),
        ]
    }
}
