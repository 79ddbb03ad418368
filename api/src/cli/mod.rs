//! The command line: its grammar, and the way from arguments to an exit code.

mod bench;
mod boot;
mod check;
mod device;
mod generate;
mod grammar;
mod group;
mod group_change;
mod init;
mod maintenance;
mod metrics;
mod plan;
mod run;
mod schema;
mod tenant;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anstream::ColorChoice;
#[cfg(test)]
use clap::FromArgMatches;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};
use gantry_resources::base::{HostPaths, chain};
use gantry_resources::making::reap;
use gantry_resources::moving::ChildWriter;
use tracing::Level;

use crate::bench::BENCH_GUEST;
use crate::http::{CleanupArgs, REMOVE_SOCKET, cleanup_helper};
use crate::output::print;
use crate::report::{self, EXIT_STATUSES, Failure};
use crate::signals;
use crate::stderr::Stderr;

const EXAMPLES: &str = "\
Examples:
  gantry check                         what the host lacks, and the remedy
  gantry device list                   what the host has, and who has it
  gantry group create gpu --device 0b:00.0
  gantry device detach 0b:00.0         from the host's driver to vfio-pci
  gantry group list                    the groups, and what is free
  gantry init                          a VM's file, with a device
  gantry run vm.json                   a VM from a file
  gantry vm attach web-1 --group gpu   a device for a VM that runs";

/// Launches Linux VMs with devices of the host passed through.
#[derive(Debug, Parser)]
#[command(
    name = "gantry",
    version,
    propagate_version = true,
    max_term_width = 100
)]
#[command(after_help = format!("{EXAMPLES}\n\n{EXIT_STATUSES}"))]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Globals {
    /// Directory of locks and sockets [default: /run/gantry]
    #[arg(long, global = true, value_name = "DIR")]
    #[arg(env = "GANTRY_RUN_DIR", hide_env_values = true)]
    run_dir: Option<PathBuf>,
    /// Directory of groups.json and groups.d [default: /etc/gantry]
    #[arg(long, global = true, value_name = "DIR")]
    #[arg(env = "GANTRY_CONFIG_DIR", hide_env_values = true)]
    config_dir: Option<PathBuf>,
    /// Directory of the state that outlives a reboot [default: /var/lib/gantry]
    #[arg(long, global = true, value_name = "DIR")]
    #[arg(env = "GANTRY_STATE_DIR", hide_env_values = true)]
    state_dir: Option<PathBuf>,
    /// See and use only what this tenant owns [default: the tenant of the user who runs it]
    #[arg(long, global = true, value_name = "NAME")]
    #[arg(env = "GANTRY_TENANT", hide_env_values = true)]
    tenant: Option<String>,
    /// Log more to standard error; -vv and -vvv still more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Directory whose sys, dev, proc, run and etc are used instead of the host's
    #[arg(long, global = true, value_name = "DIR", hide = true)]
    host_root: Option<PathBuf>,
    /// This is the second gantry of `gantry run -d`
    #[arg(long = run::IN_BACKGROUND, hide = true)]
    in_background: bool,
}

impl Globals {
    /// The host's directories, from these options or by default.
    fn paths(&self) -> Result<HostPaths, Failure> {
        let mut paths = match &self.host_root {
            Some(root) => HostPaths::under(root),
            None => HostPaths::default(),
        };
        paths.run = self.run_dir.clone().unwrap_or(paths.run);
        paths.config = self.config_dir.clone().unwrap_or(paths.config);
        paths.state = self.state_dir.clone().unwrap_or(paths.state);
        tenant::scope(paths, self.tenant.as_deref())
    }

    /// These options again, for a process that does a part of the same command.
    fn arguments(&self) -> Vec<String> {
        let folder =
            |folder: &Option<PathBuf>| folder.as_ref().map(|folder| folder.display().to_string());
        let options = [
            ("--run-dir", folder(&self.run_dir)),
            ("--config-dir", folder(&self.config_dir)),
            ("--state-dir", folder(&self.state_dir)),
            ("--tenant", self.tenant.clone()),
            ("--host-root", folder(&self.host_root)),
        ];
        let given = options
            .into_iter()
            .filter_map(|(name, value)| Some([name.to_owned(), value?]));
        given.flatten().collect()
    }

    fn level(&self) -> Level {
        match self.verbose {
            0 => Level::WARN,
            1 => Level::INFO,
            2 => Level::DEBUG,
            _ => Level::TRACE,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a VM's file, and take a device for it from the host
    Init(init::InitArgs),
    /// Run a VM until it ends
    Run(run::RunArgs),
    /// List and control the VMs that run
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// List the host's devices, and move them between host and VMs
    #[command(subcommand)]
    Device(device::DeviceCommand),
    /// List and change the groups of devices
    #[command(subcommand)]
    Group(group::GroupCommand),
    /// List and change the service plans
    #[command(subcommand)]
    Plan(plan::PlanCommand),
    /// List the tenants, and change what they own
    #[command(subcommand)]
    Tenant(tenant::TenantCommand),
    /// Print how much of each group is free and what all VMs did, for Prometheus
    Metrics(metrics::MetricsArgs),
    /// Keep new VMs from starting during maintenance of the host
    #[command(subcommand)]
    Maintenance(maintenance::MaintenanceCommand),
    /// Bind, grant and activate again what a reboot of the host undid
    Boot(boot::BootArgs),
    /// Measure what devices do on the host and in a guest
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Check what this host lacks for passing devices to VMs, and show the fixes
    Check(check::CheckArgs),
    /// Print the JSON Schema of gantry's files
    Schema(schema::SchemaArgs),
    /// Print a completion script for a shell
    Completions(generate::CompletionsArgs),
    /// Write man pages
    Man(generate::ManArgs),
    /// Be init of a measuring guest
    #[command(name = BENCH_GUEST, hide = true)]
    BenchGuest {
        /// Milliseconds of each test
        per_test: u64,
    },
    /// Write one sysfs file, in a process that can be abandoned when the kernel hangs
    #[command(name = "__sysfs-write", hide = true)]
    SysfsWrite {
        /// Path and value
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Lease and open devices for a VM that can open nothing itself
    #[command(name = "__open", hide = true)]
    Open {
        /// Directories of the host
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Wait for the end of a VM on standard input, then remove its socket
    #[command(name = REMOVE_SOCKET, hide = true)]
    RemoveSocket(CleanupArgs),
    /// Wait for the end of a VM on standard input, then give its devices back to the host
    #[command(name = "__restore", hide = true)]
    Restore {
        /// Directories of the host, and devices
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

/// Runs the command line; returns the exit status.
pub fn main() -> ExitCode {
    signals::outlive_size_limits();
    let colour = report::colour();
    let stderr = Stderr::open();
    let Cli { globals, command } = match grammar::parse::<Cli>() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => error.exit(),
        Err(text) => {
            let printed = print(|out| write!(out, "{}", text.render().ansi()));
            return match printed {
                Ok(()) => ExitCode::SUCCESS,
                Err(failure) => failure.show(&stderr, colour),
            };
        }
    };
    tracing_subscriber::fmt()
        .with_ansi(colour != ColorChoice::Never)
        .with_max_level(globals.level())
        .with_writer(stderr.clone())
        .with_level(!stderr.is_journal())
        // They would go to standard error, and a failed write there panics.
        .log_internal_errors(false)
        .without_time()
        .with_target(false)
        .compact()
        .init();
    // Helpers get all they need as arguments, and may be confined.
    let paths = match command {
        Command::Open { .. }
        | Command::BenchGuest { .. }
        | Command::RemoveSocket(_)
        | Command::Restore { .. }
        | Command::SysfsWrite { .. } => Ok(HostPaths::default()),
        _ => globals.paths(),
    };
    let in_background = globals.in_background;
    paths
        .and_then(|paths| match command {
            Command::Run(args) => run::run(args, in_background, &stderr, &paths),
            Command::Bench(command) => bench::bench(command, &paths, globals.arguments()),
            command => execute(command, &paths),
        })
        .unwrap_or_else(|failure| failure.show(&stderr, colour))
}

/// Undoes the changes of VMs and commands that were killed. A failure does not stop the command, and delays it by
/// about a second at most.
fn reap_or_warn(paths: &HostPaths) {
    let writer = ChildWriter {
        patience: Duration::from_secs(1),
        ..ChildWriter::default()
    };
    for error in reap(paths, &writer).err().into_iter().flatten() {
        tracing::warn!(
            "a change by a VM or command that was killed could not be undone: {}",
            chain(&error)
        );
    }
}

fn execute(command: Command, paths: &HostPaths) -> Result<ExitCode, Failure> {
    match command {
        // These take more than the host's directories.
        Command::Run(_) | Command::Bench(_) => {}
        Command::BenchGuest { per_test } => {
            crate::bench::guest::init(Duration::from_millis(per_test))
        }
        Command::Init(args) => init::init(args, paths)?,
        Command::Check(args) => return check::check(&args, paths),
        Command::Device(command) => device::device(command, paths)?,
        Command::Vm(command) => vm::vm(command, paths)?,
        Command::Boot(args) => boot::boot(&args, paths)?,
        Command::Plan(command) => plan::plan(command, paths)?,
        Command::Tenant(command) => tenant::tenant(command, paths)?,
        Command::Metrics(args) => metrics::metrics(&args, paths)?,
        Command::Maintenance(command) => maintenance::switch(command, paths)?,
        Command::Group(command) => group::group(command, paths)?,
        Command::Completions(args) => generate::completions(&args, Cli::command())?,
        Command::Man(args) => generate::man(&args, Cli::command())?,
        Command::Schema(args) => schema::schema(args)?,
        Command::Open { args } => return Ok(gantry_resources::opener::opener_helper(&args)),
        Command::RemoveSocket(args) => return Ok(cleanup_helper(&args.path, &args.run)),
        Command::Restore { args } => return Ok(gantry_resources::making::restore_helper(&args)),
        Command::SysfsWrite { args } => return Ok(gantry_resources::moving::write_helper(&args)),
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        grammar::any_case(Cli::command()).debug_assert();
    }

    #[test]
    fn no_word_of_a_list_needs_its_case() {
        for (args, said) in [
            (
                &["device", "list", "--sort", "IOMMU", "--type", "NVMe"][..],
                "list",
            ),
            (
                &["group", "create", "x", "--type", "PCI", "--bind", "Demand"],
                "create",
            ),
            (
                &[
                    "vm",
                    "attach",
                    "x",
                    "--group",
                    "g",
                    "--numa-policy",
                    "Required",
                ],
                "attach",
            ),
            (&["run", "--seccomp", "LOG", "vm.json"], "run"),
            (&["completions", "BASH"], "completions"),
            (&["group", "list", "--sort", "free"], "list"),
        ] {
            let args = ["gantry"].iter().chain(args);
            let matches = grammar::any_case(Cli::command()).try_get_matches_from(args);
            let read = matches.and_then(|matches| Cli::from_arg_matches(&matches));
            assert!(read.is_ok(), "{said}: {read:?}");
        }
    }

    /// Each visible command with its full name.
    fn each_command(check: &mut dyn FnMut(&str, &clap::Command)) {
        let mut all = Cli::command();
        all.build();
        fn below(command: &clap::Command, check: &mut dyn FnMut(&str, &clap::Command)) {
            check(command.get_bin_name().unwrap_or_default(), command);
            let seen = command.get_subcommands().filter(|one| !one.is_hide_set());
            let seen = seen.filter(|one| one.get_name() != "help");
            seen.for_each(|one| below(one, check));
        }
        below(&all, check);
    }

    /// The text after the options of each command.
    fn each_after_help(check: &mut dyn FnMut(&str, &str)) {
        each_command(&mut |name, command| {
            let help = command.get_after_help().map(ToString::to_string);
            check(name, &help.unwrap_or_default());
        });
    }

    #[test]
    fn every_command_tells_programs_too() {
        // `init` asks, `run` and `vm console` are a VM's console and `boot` a part of the host's; the others print what they make, as JSON or
        // as text of a form of its own.
        let others = [
            "gantry init",
            "gantry run",
            "gantry vm console",
            "gantry vm logs",
            "gantry vm metrics",
            "gantry plan show",
            "gantry metrics",
            "gantry boot",
            "gantry schema",
            "gantry completions",
            "gantry man",
        ];
        let mut without = Vec::new();
        each_command(&mut |name, command| {
            let json = command.get_arguments().any(|arg| arg.get_id() == "json");
            if !command.has_subcommands() && !json {
                without.push(name.to_owned());
            }
        });
        assert_eq!(without, others);
    }

    #[test]
    fn every_visible_command_shows_an_example() {
        each_after_help(&mut |name, help| assert!(help.contains("Example"), "{name}"));
    }

    #[test]
    fn no_help_is_wrapped_twice() {
        each_after_help(&mut |name, help| {
            let lines: Vec<&str> = help.lines().collect();
            // A man page of 80 columns sets them in by 7, without the 2 that they have.
            let indented = lines.iter().filter(|line| line.starts_with(' '));
            for line in indented {
                assert!(line.chars().count() <= 75, "{name}: {line}");
            }
            // What stands alone is a paragraph, which clap wraps; only a heading is followed by a line.
            for pair in lines.windows(2) {
                let prose = |line: &str| !line.is_empty() && !line.starts_with(' ');
                let broken = prose(pair[0]) && prose(pair[1]) && !pair[0].ends_with(':');
                assert!(!broken, "{name}: {}", pair[0]);
            }
        });
    }
}
