//! `gantry completions` and `gantry man`: generate files for the shell and for man(1) from the grammar.

use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::output::print;
use crate::report::{Failure, USAGE};

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

pub fn completions(args: &CompletionsArgs, grammar: Command) -> Result<(), Failure> {
    // The generators offer hidden commands too.
    let seen = grammar.get_subcommands().filter(|one| !one.is_hide_set());
    let mut grammar = Command::new("gantry")
        .args(grammar.get_arguments().cloned())
        .subcommands(seen.cloned());
    // Into memory first: the generator cannot report a write error.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut grammar, "gantry", &mut script);
    print(|out| out.write_all(&script))
}

pub fn man(args: &ManArgs, mut grammar: Command) -> Result<(), Failure> {
    if args.dir == Path::new("-") {
        let what = "man pages are several files: name a directory for them";
        return Err(Failure::new(USAGE, what));
    }
    grammar = grammar.disable_help_subcommand(true);
    grammar.build();
    let written = std::fs::create_dir_all(&args.dir).and_then(|()| pages(&grammar, &args.dir));
    written.map_err(|error| Failure::host(format!("cannot write {}: {error}", args.dir.display())))
}

/// Writes the pages of a command and of those below it.
fn pages(command: &Command, dir: &Path) -> io::Result<()> {
    let seen = command.get_subcommands().filter(|one| !one.is_hide_set());
    seen.into_iter().try_for_each(|one| pages(one, dir))?;
    let version = command.get_version().unwrap_or_default();
    let man = Man::new(command.clone()).source(format!("gantry {version}"));
    fs::write(dir.join(man.get_filename()), page(command, &man)?)
}

/// A page. Examples and tables stay as they are, and no line is stretched.
fn page(command: &Command, man: &Man) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    page.extend(b".ad l\n.nh\n");
    man.render_name_section(&mut page)?;
    let usage = command.clone().render_usage().to_string();
    let mut rest = Roff::new();
    rest.control("SH", ["SYNOPSIS"]);
    rest.text([roman(usage.trim_start_matches("Usage: "))]);
    rest.to_writer(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let help = command.get_after_help().map(ToString::to_string);
    notes(&help.unwrap_or_default()).to_writer(&mut page)?;
    Ok(page)
}

/// The text after the options, in sections of a man page.
fn notes(help: &str) -> Roff {
    let mut roff = Roff::new();
    let mut section = "";
    for paragraph in help.split("\n\n") {
        let (heading, text) = match paragraph.split_once(':') {
            Some(("Example" | "Examples", text)) => ("EXAMPLES", text),
            Some(("Exit status", text)) => ("EXIT STATUS", text),
            _ => ("NOTES", paragraph),
        };
        if section == heading {
            roff.control("PP", []);
        } else {
            roff.control("SH", [heading]);
        }
        section = heading;
        for line in text.trim_start_matches('\n').lines() {
            // Indented lines are shown as they are.
            if line.starts_with(' ') {
                roff.control("nf", []);
                roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
                roff.control("fi", []);
            } else {
                roff.text([roman(line)]);
            }
        }
    }
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_stay_as_they_are_and_sections_have_names() {
        let text = notes("A word\nof it.\n\nExamples:\n  gantry  run\n\nExit status:\n  0  done")
            .to_roff();
        let of = |line: &str| text.lines().position(|found| found == line);
        assert!(of(".SH NOTES") < of(".SH EXAMPLES"), "{text}");
        assert!(of(".SH EXAMPLES") < of(".SH \"EXIT STATUS\""), "{text}");
        assert!(text.contains(".nf\ngantry  run\n.fi\n"), "{text}");
        assert!(
            notes("Example: gantry boot")
                .to_roff()
                .contains("\n gantry boot\n")
        );
    }
}
