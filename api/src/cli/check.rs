//! `gantry check`: shows what this host lacks to give devices to VMs, with the exact fix.

use std::fmt;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use clap::Args;
use gantry_resources::base::{HostBdf, HostPaths};
use gantry_resources::check::{Advice, CommandLineChange, Finding, Level, Report, note_reboot};

use crate::output::{print, print_json};
use crate::report::{Failure, SUCCESS};
use crate::table::terminal_width;

/// Exit status if the worst finding is a warning. `gantry run` does not use it.
const WARNED: u8 = 5;
/// Exit status if the worst finding is a failure.
const FOUND_FAILURE: u8 = 6;

#[derive(Debug, Args)]
#[command(after_help = "\
Results:
  ok    in order; advice shows what could be better
  warn  it works, at a price or a risk, or a device is not ready yet
  fail  no VM with a device can start, or the host is not safe from its VMs

Exit status:
  0  all is ok
  1  the check could not be done
  2  the command line is wrong
  5  the worst finding is warn
  6  the worst finding is fail

Examples:
  gantry check
  gantry check 0b:00.0 0b:00.1    as if these devices were in a group
  gantry check --json
  gantry check --note-reboot      after a change that needs a reboot")]
pub struct CheckArgs {
    /// Devices to look at besides those of the groups
    #[arg(value_name = "BDF")]
    devices: Vec<HostBdf>,
    /// Show everything as JSON
    #[arg(long)]
    json: bool,
    /// Record in the configuration directory that the boot loader or the firmware was changed as shown. Until the
    /// reboot, checks say that it is pending; afterwards, whether the change took effect
    #[arg(long)]
    note_reboot: bool,
}

pub fn check(args: &CheckArgs, paths: &HostPaths) -> Result<ExitCode, Failure> {
    let look = || gantry_resources::check::check(paths, &args.devices).map_err(Failure::host);
    let mut report = look()?;
    if args.note_reboot {
        note_reboot(paths, &report)?;
        report = look()?;
    }
    if args.json {
        print_json(&report)?;
    } else {
        let shown = ReportTable {
            report: &report,
            width: terminal_width(),
        };
        print(|out| write!(out, "{shown}"))?;
    }
    Ok(ExitCode::from(match report.level {
        Level::Ok => SUCCESS,
        Level::Warn => WARNED,
        Level::Fail => FOUND_FAILURE,
    }))
}

const HEADER: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const OK: Style = AnsiColor::Green.on_default();
const WARN: Style = AnsiColor::Yellow.on_default().bold();
const FAIL: Style = AnsiColor::Red.on_default().bold();

/// Reasons are wrapped at no less than this; a narrower terminal wraps them itself.
const NARROWEST: usize = 32;
/// Longer lines than this are hard to read.
const WIDEST: usize = 100;

/// A report as a table, with the fixes under each row.
struct ReportTable<'a> {
    report: &'a Report,
    /// Characters of a line.
    width: usize,
}

impl fmt::Display for ReportTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let findings = &self.report.findings;
        let titles = findings.iter().map(|finding| finding.title.chars().count());
        let title = titles.max().unwrap_or_default();
        writeln!(f, "{HEADER}RESULT  {:title$}  REASON{HEADER:#}", "CHECK")?;
        for finding in findings {
            self.row(f, finding, title)?;
        }
        let count = |level| {
            findings
                .iter()
                .filter(|finding| finding.level == level)
                .count()
        };
        let [ok, warn, fail] = [Level::Ok, Level::Warn, Level::Fail].map(count);
        writeln!(f, "\n{ok} ok, {warn} warn, {fail} fail")?;
        match &self.report.command_line {
            Some(change) => self.command_line(f, change),
            None => Ok(()),
        }
    }
}

impl ReportTable<'_> {
    fn row(&self, f: &mut fmt::Formatter, finding: &Finding, title: usize) -> fmt::Result {
        let (word, style) = match finding.level {
            Level::Ok => ("ok", OK),
            Level::Warn => ("warn", WARN),
            Level::Fail => ("fail", FAIL),
        };
        let indent = "RESULT".len() + 2 + title + 2;
        let reason = self.wrap(&finding.reason, indent);
        write!(f, "{style}{word:6}{style:#}  {:title$}  ", finding.title)?;
        writeln!(f, "{}", reason.join(&format!("\n{:indent$}", "")))?;
        // Advice for a good result is optional.
        let style = if finding.level == Level::Ok {
            DIM
        } else {
            Style::new()
        };
        // Below the check's name: lines to copy are long.
        let indent = "RESULT".len() + 2;
        for Advice { text, lines } in &finding.fix {
            let text = self
                .wrap(text, indent + 2)
                .join(&format!("\n{:indent$}  ", ""));
            writeln!(f, "{:indent$}{style}- {text}{style:#}", "")?;
            for line in lines {
                writeln!(f, "{:indent$}    {style}{line}{style:#}", "")?;
            }
        }
        Ok(())
    }

    fn command_line(&self, f: &mut fmt::Formatter, change: &CommandLineChange) -> fmt::Result {
        writeln!(f, "\n{HEADER}Kernel command line{HEADER:#}")?;
        for (what, words) in [("add", &change.add), ("remove", &change.remove)] {
            if !words.is_empty() {
                writeln!(f, "  {what:6}  {}", words.join(" "))?;
            }
        }
        let text = self.wrap(&change.how.text, 2);
        writeln!(f, "  {}", text.join("\n  "))?;
        change
            .how
            .lines
            .iter()
            .try_for_each(|line| writeln!(f, "    {line}"))
    }

    /// Wraps a text that is indented by `indent` characters. Without a terminal, a text stays in one line for
    /// `grep`.
    fn wrap(&self, text: &str, indent: usize) -> Vec<String> {
        if self.width == usize::MAX {
            return vec![text.to_owned()];
        }
        let room = self.width.min(WIDEST + indent).saturating_sub(indent);
        wrap(text, room.max(NARROWEST))
    }
}

/// Lines of at most `width` characters, broken at blanks; a longer word has a line of its own.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(report: &Report, width: usize) -> String {
        let text = ReportTable { report, width }.to_string();
        anstream::adapter::strip_str(&text).to_string()
    }

    /// The report of a host of which nothing is known.
    fn report() -> Report {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("sys/bus/pci/devices")).unwrap();
        gantry_resources::check::check(&HostPaths::under(root.path()), &[]).unwrap()
    }

    #[test]
    fn texts_are_broken_at_blanks() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(
            wrap("a much-too-long-word b", 5),
            ["a", "much-too-long-word", "b"]
        );
        assert_eq!(wrap("", 5), [""]);
    }

    #[test]
    fn a_report_fits_the_terminal_but_for_what_is_to_be_copied() {
        let report = report();
        let copied: Vec<&str> = report
            .findings
            .iter()
            .flat_map(|finding| &finding.fix)
            .flat_map(|advice| &advice.lines)
            .map(String::as_str)
            .collect();
        for line in shown(&report, 70).lines() {
            let fits =
                line.chars().count() <= 70 || copied.iter().any(|copied| line.ends_with(copied));
            assert!(fits, "{line}");
        }
    }

    #[test]
    fn without_a_terminal_each_reason_is_one_line() {
        let report = report();
        let text = shown(&report, usize::MAX);
        for finding in &report.findings {
            assert!(text.contains(&finding.reason), "{text}");
        }
        assert!(text.starts_with("RESULT  CHECK"), "{text}");
    }
}
