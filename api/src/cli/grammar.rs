//! Reads arguments: values of a list in any case, and hints for commands of other tools.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory, FromArgMatches};

/// Commands of other tools, and gantry's counterparts.
const ELSEWHERE: [(&[&str], &str); 10] = [
    (
        &["ls", "list"],
        "`gantry vm list`, `gantry device list` and `gantry group list` show what there is",
    ),
    (&["ps", "top"], "`gantry vm list` shows the VMs that run"),
    (
        &["start", "create", "launch", "exec", "up"],
        "`gantry run vm.json` starts a VM",
    ),
    (
        &["attach-console", "serial", "tty"],
        "`gantry vm console NAME` attaches to the console of a VM",
    ),
    (
        &["stop", "kill", "destroy", "shutdown", "poweroff", "down"],
        "`gantry vm shutdown NAME` ends a VM, `gantry vm power-button NAME` asks its guest to",
    ),
    (
        &["pause", "resume", "reboot", "restart"],
        "`gantry vm` has it: `gantry vm --help`",
    ),
    (
        &["attach", "add-device"],
        "`gantry vm attach NAME --group GROUP` gives a device to a VM that runs",
    ),
    (
        &["detach", "bind", "unbind", "reattach"],
        "`gantry device detach` and `gantry device reattach` move devices between host and VMs, `gantry vm detach` takes one from a VM",
    ),
    (
        &["info", "show", "inspect", "status"],
        "`gantry vm info NAME`, `gantry group show NAME` and `gantry device list` show it",
    ),
    (
        &["validate", "verify", "lint", "fit"],
        "`gantry run --check vm.json` checks a VM's file, `gantry group fit` what it would get",
    ),
];

/// A value on the command line that `''` removes.
#[derive(Debug, Clone)]
pub struct OrNone<T>(pub Option<T>);

impl<T> OrNone<T> {
    /// None for an empty text, or else what `parse` reads.
    pub fn parse(
        text: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Self, String> {
        match text.trim() {
            "" => Ok(Self(None)),
            text => parse(text).map(|value| Self(Some(value))),
        }
    }
}

/// Reads the arguments of the process.
pub fn parse<C: CommandFactory + FromArgMatches>() -> Result<C, clap::Error> {
    let mut grammar = any_case(C::command());
    let matches = grammar.try_get_matches_from_mut(std::env::args_os());
    let matches = matches.map_err(pointed)?;
    C::from_arg_matches(&matches).map_err(|error| error.format(&mut grammar))
}

/// The grammar with case-insensitive values of lists.
pub fn any_case(command: Command) -> Command {
    let each = |arg: clap::Arg| {
        let is_word = arg.get_action().takes_values() && !arg.get_possible_values().is_empty();
        match is_word {
            true => arg.ignore_case(true),
            false => arg,
        }
    };
    command.mut_args(each).mut_subcommands(any_case)
}

/// Names gantry's command for a command of another tool.
fn pointed(mut error: clap::Error) -> clap::Error {
    let known = match (error.kind(), error.get(ContextKind::InvalidSubcommand)) {
        (ErrorKind::InvalidSubcommand, Some(ContextValue::String(word))) => ELSEWHERE
            .iter()
            .find(|(words, _)| words.contains(&word.as_str())),
        _ => None,
    };
    // Below a command, a suggestion of its own subcommands is better.
    let has_own = error.get(ContextKind::SuggestedSubcommand).is_some();
    let is_first = match error.get(ContextKind::Usage) {
        Some(ContextValue::StyledStr(usage)) => usage.to_string().contains("gantry [OPTIONS]"),
        _ => false,
    };
    if let Some((_, pointer)) = known.filter(|_| is_first || !has_own) {
        let pointer = ContextValue::StyledStrs(vec![(*pointer).into()]);
        error.remove(ContextKind::SuggestedSubcommand);
        error.insert(ContextKind::Suggested, pointer);
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_names_commands_that_there_are() {
        let mut grammar = crate::cli::command();
        grammar.build();
        for (words, pointer) in ELSEWHERE {
            for word in words {
                assert!(
                    grammar.find_subcommand(word).is_none(),
                    "{word} is a command"
                );
            }
            let named = pointer.split('`').skip(1).step_by(2);
            for command in named {
                let mut at = &grammar;
                let below = command.split(' ').skip(1);
                for word in below.take_while(|word| word.starts_with(|c: char| c.is_lowercase())) {
                    match at.find_subcommand(word) {
                        Some(one) => at = one,
                        None => assert!(word.ends_with(".json"), "{command}"),
                    }
                }
                assert!(at.get_name() != "gantry", "{command}");
            }
        }
    }
}
