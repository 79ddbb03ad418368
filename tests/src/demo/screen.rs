//! What people see: numbered steps, commands as typed, what they print; colour on a terminal only.

use std::io::{self, Write, stdout};

use anstream::AutoStream;
use anstyle::{AnsiColor, Style};

use super::Logs;
use crate::protocol::Size;
use crate::ui::Step;

const HEADING: Style = Style::new().bold();
const PROMPT: Style = AnsiColor::Cyan.on_default();
const COMMAND: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();

/// All but headings stands this far to the right.
const INDENT: usize = 2;

/// The screen, and which step it shows.
pub struct Screen {
    out: AutoStream<io::Stdout>,
    width: usize,
    step: u8,
    heading: String,
}

impl Screen {
    /// Standard output: as wide as its terminal within reason, 80 characters where it is none.
    pub fn new() -> Self {
        let width = terminal_size::terminal_size_of(stdout()).map_or(80, |(width, _)| width.0);
        Self {
            out: AutoStream::auto(stdout()),
            width: usize::from(width).clamp(60, 100),
            step: 0,
            heading: String::new(),
        }
    }

    /// The size of a terminal whose contents fit.
    pub fn size(&self) -> Size {
        Size {
            rows: 24,
            cols: u16::try_from(self.width - INDENT).unwrap_or(80),
        }
    }

    /// What this is about.
    pub fn title(&mut self, title: &str, text: &str) -> io::Result<()> {
        writeln!(self.out, "\n{HEADING}{title}{HEADING:#}")?;
        writeln!(self.out, "{text}")
    }

    /// Begins the next step.
    pub fn step(&mut self, heading: &str) -> io::Result<()> {
        self.step += 1;
        self.heading = heading.to_owned();
        let step = self.step;
        writeln!(self.out, "\n{HEADING}{step}. {heading}{HEADING:#}")
    }

    /// Explains.
    pub fn tell(&mut self, text: &str) -> io::Result<()> {
        self.lines(text)
    }

    /// A command at its prompt.
    pub fn typed(&mut self, prompt: &str, command: &str) -> io::Result<()> {
        let indent = " ".repeat(INDENT);
        writeln!(
            self.out,
            "{indent}{PROMPT}{prompt}{PROMPT:#} {COMMAND}{command}{COMMAND:#}"
        )
    }

    /// What it prints.
    pub fn printed(&mut self, text: &str) -> io::Result<()> {
        self.lines(text)
    }

    /// A claim that was found true.
    pub fn holds(&mut self, claim: &str, finding: &str) -> io::Result<()> {
        let indent = " ".repeat(INDENT);
        writeln!(self.out, "{indent}{GOOD}ok{GOOD:#} {claim:8}{finding}")
    }

    /// Shows that something goes on until it is dropped; standard output has to rest meanwhile.
    pub fn wait(&mut self, what: &str) -> Step {
        Step::begin(what)
    }

    /// The end of a demo that went well.
    pub fn result(&mut self, logs: &Logs, verdict: &str) -> io::Result<()> {
        writeln!(self.out)?;
        for (name, path) in logs.kept() {
            writeln!(self.out, "{name}: {}", path.display())?;
        }
        writeln!(
            self.out,
            "To look around in that host yourself: cargo xtask lab\n\n{GOOD}{verdict}{GOOD:#}"
        )?;
        self.out.flush()
    }

    /// The end of one that did not, on standard error.
    pub fn failure(&self, error: &anyhow::Error, logs: &Logs) {
        // With standard error gone there is nobody left to tell.
        let _ = self.try_failure(&mut anstream::stderr(), error, logs);
    }

    fn try_failure(
        &self,
        out: &mut impl Write,
        error: &anyhow::Error,
        logs: &Logs,
    ) -> io::Result<()> {
        let Self { step, heading, .. } = self;
        let why = format!("{error:#}");
        writeln!(
            out,
            "\n{BAD}demo: failed{BAD:#} at step {step}, \"{heading}\"\n{}\n",
            why.trim_end()
        )?;
        for (name, path) in logs.kept() {
            writeln!(out, "{name}: {}", path.display())?;
        }
        writeln!(
            out,
            "What to do: run it again if this machine had much else to do. If it fails again,\n\
             `cargo xtask lab` is a shell in the same host: type the commands from above there,\n\
             one by one."
        )
    }

    fn lines(&mut self, text: &str) -> io::Result<()> {
        let room = self.width - INDENT;
        for line in text.lines() {
            let line = line.trim_end().replace('\t', "    ");
            for piece in wrap(&line, room) {
                let indent = if piece.is_empty() { 0 } else { INDENT };
                writeln!(self.out, "{}{piece}", " ".repeat(indent))?;
            }
        }
        Ok(())
    }
}

/// Cuts a line at spaces; what goes on is set in by four. Lines with colours fit as they are.
fn wrap(line: &str, width: usize) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut rest = line.to_owned();
    while rest.chars().count() > width && !rest.contains('\x1b') {
        let begin = rest.len() - rest.trim_start().len();
        let within = rest.char_indices().take(width + 1);
        let spaces = within.filter(|(at, char)| *char == ' ' && *at > begin);
        let Some((space, _)) = spaces.last() else {
            break;
        };
        let tail = rest.split_off(space);
        pieces.push(rest);
        rest = format!("    {}", tail.trim_start());
    }
    pieces.push(rest);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_cut_at_spaces() {
        assert_eq!(wrap("one two three", 7), ["one two", "    three"]);
        assert_eq!(wrap("one two", 7), ["one two"]);
        assert_eq!(wrap("  abcdefghij", 7), ["  abcdefghij"]);
        assert_eq!(wrap("a bcdefghijkl", 8), ["a", "    bcdefghijkl"]);
        assert_eq!(wrap("äöü äöü", 3), ["äöü", "    äöü"]);
        assert_eq!(wrap("", 7), [""]);
    }
}
