//! `gantry schema`: what the JSON files may hold, for editors and programs.

use clap::{Args, ValueEnum};
use gantry_resources::pools::{Groups, Plans};

use crate::output::print_json;
use crate::report::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry schema > vm.schema.json
  gantry schema groups > groups.schema.json")]
pub struct SchemaArgs {
    /// Which file
    #[arg(value_enum, default_value_t = Kind::Vm)]
    file: Kind,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    /// A VM's file, as `gantry run` takes it
    Vm,
    /// A file of groups: groups.json, groups.d/*.json
    Groups,
    /// A file of service plans: plans.json, plans.d/*.json
    Plans,
    /// Results of `gantry bench run --json`
    Bench,
}

pub fn schema(args: SchemaArgs) -> Result<(), Failure> {
    match args.file {
        Kind::Vm => print_json(&crate::config::schema()),
        Kind::Groups => print_json(&Groups::schema()),
        Kind::Plans => print_json(&Plans::schema()),
        Kind::Bench => print_json(&crate::bench::model::schema()),
    }
}
