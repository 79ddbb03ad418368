//! `gantry completions` and `gantry man`: files for the shell and for man(1), made from the grammar.

use std::path::PathBuf;

use clap::{Args, Command};
use clap_complete::Shell;

use crate::output::print;
use crate::report::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry completions bash > /etc/bash_completion.d/gantry
  gantry completions zsh > ~/.zfunc/_gantry")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "Example: gantry man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Directory for the pages, one for each command
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub fn completions(args: &CompletionsArgs, mut grammar: Command) -> Result<(), Failure> {
    // Into memory first: the generator takes no error of the output for an answer.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut grammar, "gantry", &mut script);
    print(|out| out.write_all(&script))
}

pub fn man(args: &ManArgs, grammar: Command) -> Result<(), Failure> {
    let written = std::fs::create_dir_all(&args.dir)
        .and_then(|()| clap_mangen::generate_to(grammar, &args.dir));
    written.map_err(|error| Failure::host(format!("cannot write {}: {error}", args.dir.display())))
}
