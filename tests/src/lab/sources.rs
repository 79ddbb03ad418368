//! Apt sources derived from the machine's own: the same places, with the backports suite added, or
//! with the suites of another release.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// The Debian release that the packages come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// This machine's.
    codename: String,
    /// Taken instead of this machine's, with its backports.
    other: Option<&'static str>,
}

impl Release {
    /// Reads `/etc/os-release`.
    pub fn of_this_machine() -> Result<Self> {
        let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let codename = text
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .unwrap_or_default()
            .trim_matches('"');
        if !["bookworm", "trixie"].contains(&codename) {
            bail!(
                "the lab takes its parts from Debian 12 or 13, this is {}: run it there, in a \
                 virtual machine or a container",
                text.lines()
                    .find_map(|line| line.strip_prefix("PRETTY_NAME="))
                    .unwrap_or("another system")
            );
        }
        Ok(Self {
            codename: codename.to_owned(),
            other: None,
        })
    }

    /// The release `other` from the same places, whose packages fit each other and not this machine.
    pub fn other(self, other: &'static str) -> Self {
        let other = Some(other);
        Self { other, ..self }
    }

    /// Whether the packages come with all they need, whatever this machine has.
    pub fn is_foreign(&self) -> bool {
        self.other.is_some()
    }

    /// The suite with newer versions, where the release's own are too old for the lab.
    pub fn backports(&self) -> Option<String> {
        match self.other {
            Some(other) => Some(format!("{other}-backports")),
            None => (self.codename == "bookworm").then(|| format!("{}-backports", self.codename)),
        }
    }

    /// What takes the place of one of this machine's suites.
    fn instead_of(&self, suite: &str) -> Vec<String> {
        let main = suite == self.codename;
        let mut suites = match self.other {
            Some(other) if main => vec![other.to_owned()],
            None if self.is_suite(suite) => vec![suite.to_owned()],
            _ => Vec::new(),
        };
        if main {
            suites.extend(self.backports());
        }
        suites
    }

    fn is_suite(&self, suite: &str) -> bool {
        suite
            .strip_prefix(&self.codename)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '/']))
    }
}

/// Writes to `into` what is derived from every source in `/etc/apt`.
pub fn derive_all(release: &Release, into: &Path) -> Result<()> {
    let mut files = vec![Path::new("/etc/apt/sources.list").to_owned()];
    for entry in fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
    {
        files.push(entry?.path());
    }
    let mut any = false;
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        let derived = match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => derive_lines(&text, release),
            Some("sources") => derive_stanzas(&text, release),
            _ => continue,
        };
        let Some(name) = file.file_name().filter(|_| !derived.is_empty()) else {
            continue;
        };
        any = true;
        fs::write(into.join(name), derived)
            .with_context(|| format!("cannot write to {}", into.display()))?;
    }
    if !any {
        bail!(
            "/etc/apt names no source of Debian {}'s main component; add one",
            release.codename
        );
    }
    Ok(())
}

/// One-line format: `deb [options] uri suite components`.
fn derive_lines(text: &str, release: &Release) -> String {
    let mut derived = String::new();
    for line in text.lines().map(str::trim) {
        let Some(rest) = line
            .strip_prefix("deb")
            .filter(|rest| rest.starts_with([' ', '\t']))
        else {
            continue;
        };
        let (options, rest) = match rest.trim_start().strip_prefix('[') {
            Some(rest) => rest.split_once(']').unwrap_or_default(),
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else {
            continue;
        };
        if !words.any(|component| component == "main") {
            continue;
        }
        for suite in release.instead_of(suite) {
            let options = match options.trim() {
                "" => String::new(),
                options => format!("[{options}] "),
            };
            derived.push_str(&format!("deb {options}{uri} {suite} main\n"));
        }
    }
    derived
}

/// deb822 format: stanzas of `Field: value`, separated by empty lines.
fn derive_stanzas(text: &str, release: &Release) -> String {
    let text: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    text.split(|line| line.trim().is_empty())
        .filter_map(|stanza| derive_stanza(stanza, release))
        .collect()
}

fn derive_stanza(lines: &[&str], release: &Release) -> Option<String> {
    let field = |name: &str| -> Vec<String> {
        let mut words = Vec::new();
        let mut inside = false;
        for line in lines {
            let value = match line.split_once(':') {
                _ if line.starts_with([' ', '\t']) => inside.then_some(*line),
                Some((key, value)) => {
                    inside = key.eq_ignore_ascii_case(name);
                    inside.then_some(value)
                }
                None => None,
            };
            words.extend(
                value
                    .unwrap_or_default()
                    .split_whitespace()
                    .map(str::to_owned),
            );
        }
        words
    };
    let has = |name: &str, word: &str| field(name).iter().any(|found| found == word);
    let mut suites: Vec<String> = Vec::new();
    for suite in field("Suites") {
        for fresh in release.instead_of(&suite) {
            if !suites.contains(&fresh) {
                suites.push(fresh);
            }
        }
    }
    if suites.is_empty()
        || has("Enabled", "no")
        || !has("Types", "deb")
        || !has("Components", "main")
    {
        return None;
    }
    let mut stanza = format!(
        "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n",
        field("URIs").join(" "),
        suites.join(" ")
    );
    // Keys may be given in place over many lines: this field is kept as it stands.
    let mut inside = false;
    for line in lines {
        let goes_on = line.starts_with([' ', '\t']);
        inside = if goes_on {
            inside
        } else {
            line.to_ascii_lowercase().starts_with("signed-by:")
        };
        if inside {
            stanza.push_str(line);
            stanza.push('\n');
        }
    }
    stanza.push('\n');
    Some(stanza)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(codename: &str) -> Release {
        let codename = codename.to_owned();
        Release {
            codename,
            other: None,
        }
    }

    #[test]
    fn lines_gain_backports() {
        let text = "# deb http://h/debian bookworm main\n\
            deb [signed-by=/k] http://h/debian bookworm main contrib\n\
            deb-src http://h/debian bookworm main\n\
            deb http://h/security bookworm-security main\n\
            deb http://h/docker bookworm stable\n\
            deb http://h/other trixie main\n";
        assert_eq!(
            derive_lines(text, &release("bookworm")),
            "deb [signed-by=/k] http://h/debian bookworm main\n\
             deb [signed-by=/k] http://h/debian bookworm-backports main\n\
             deb http://h/security bookworm-security main\n"
        );
    }

    #[test]
    fn stanzas_gain_backports() {
        let text = "Types: deb deb-src\n# a comment\nURIs: http://h/debian\n\
            Suites: bookworm\n bookworm-updates\nComponents: main non-free\nSigned-By:\n -----BEGIN\n .\n\n\
            Types: deb\nURIs: http://h/security\nSuites: bookworm-security\nComponents: main\n\n\
            Enabled: no\nTypes: deb\nURIs: http://h/off\nSuites: bookworm\nComponents: main\n\n\
            Types: deb\nURIs: http://h/node\nSuites: nodistro\nComponents: main\n";
        assert_eq!(
            derive_stanzas(text, &release("bookworm")),
            "Types: deb\nURIs: http://h/debian\n\
             Suites: bookworm bookworm-backports bookworm-updates\nComponents: main\n\
             Signed-By:\n -----BEGIN\n .\n\n\
             Types: deb\nURIs: http://h/security\nSuites: bookworm-security\nComponents: main\n\n"
        );
    }

    #[test]
    fn another_release_takes_the_place_of_this_machines() {
        let release = release("bookworm").other("trixie");
        let text = "deb [a=b] http://h/debian bookworm main\n\
            deb http://h/debian bookworm-updates main\n\
            deb http://h/security bookworm-security main\n";
        assert_eq!(
            derive_lines(text, &release),
            "deb [a=b] http://h/debian trixie main\n\
             deb [a=b] http://h/debian trixie-backports main\n"
        );
        let text = "Types: deb\nURIs: http://h/debian\nSuites: bookworm bookworm-updates\n\
            Components: main\n";
        let expected = "Types: deb\nURIs: http://h/debian\nSuites: trixie trixie-backports\n\
            Components: main\n\n";
        assert_eq!(derive_stanzas(text, &release), expected);
    }

    #[test]
    fn trixie_needs_no_backports() {
        let text = "deb http://h/debian trixie main\n";
        assert_eq!(
            derive_lines(text, &release("trixie")),
            "deb http://h/debian trixie main\n"
        );
    }
}
