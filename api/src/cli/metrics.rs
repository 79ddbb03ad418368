//! `gantry metrics`: the host's pools and all VMs that run, as Prometheus reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs::{self, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use gantry_resources::base::HostPaths;
use gantry_resources::pools::Groups;

use super::group::{Counts, counts};
use super::vm::metrics_of_all;
use crate::output::print;
use crate::report::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
A VM's socket is a Unix socket, which Prometheus cannot read. Its node_exporter reads files: let a timer \
write one into the folder that node_exporter is given with --collector.textfile.directory.

Examples:
  gantry metrics | grep free
  gantry metrics --textfile /var/lib/node_exporter/gantry.prom")]
pub struct MetricsArgs {
    /// Write to this file, which is replaced as a whole, instead of standard output (`-`)
    #[arg(long, value_name = "FILE")]
    textfile: Option<PathBuf>,
}

pub fn metrics(args: &MetricsArgs, paths: &HostPaths) -> Result<(), Failure> {
    let groups = Groups::load(paths)?;
    let mut families = Families::default();
    families.pools(&counts(&groups, paths)?);
    for (name, text) in metrics_of_all(paths) {
        families.vm(&name, text.as_deref());
    }
    let text = families.text();
    let file = args.textfile.as_deref();
    match file.filter(|file| *file != Path::new("-")) {
        None => print(|out| out.write_all(text.as_bytes())),
        Some(file) => replace(file, &text)
            .map_err(|error| Failure::host(format!("cannot write {}: {error}", file.display()))),
    }
}

/// Replaces a file as a whole, readable for all. The folder may be another user's: links there are not followed,
/// and only a regular file is replaced.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    if fs::symlink_metadata(file).is_ok_and(|old| !old.is_file()) {
        let what = "it is not a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut name = file.as_os_str().to_owned();
    // node_exporter reads files whose names end with `.prom` only.
    name.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(name);
    let _ = fs::remove_file(&fresh);
    let mut draft = fs::File::create_new(&fresh)?;
    let written = draft
        .write_all(text.as_bytes())
        .and_then(|()| draft.set_permissions(Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&fresh, file));
    written.inspect_err(|_| drop(fs::remove_file(&fresh)))
}

/// Metrics by family: each family is printed once, with the samples of all VMs.
#[derive(Debug, Default)]
struct Families(BTreeMap<String, Family>);

#[derive(Debug, Default)]
struct Family {
    help: String,
    kind: String,
    samples: Vec<String>,
}

impl Families {
    fn gauge(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: usize) {
        let family = self.0.entry(name.to_owned()).or_default();
        family.help = help.to_owned();
        family.kind = "gauge".to_owned();
        let labels: Vec<String> = labels
            .iter()
            .map(|(key, value)| format!("{key}=\"{}\"", escaped(value)))
            .collect();
        family
            .samples
            .push(format!("{name}{{{}}} {value}", labels.join(",")));
    }

    fn pools(&mut self, pools: &[Counts]) {
        for pool in pools {
            let labels = [("group", pool.group.as_str()), ("type", pool.kind)];
            for (name, help, value) in [
                ("gantry_group_devices", "Devices of a group", pool.total),
                (
                    "gantry_group_devices_used",
                    "Devices of a group that VMs have",
                    pool.used,
                ),
                (
                    "gantry_group_devices_free",
                    "Devices of a group that are free",
                    pool.free,
                ),
                (
                    "gantry_group_devices_quarantined",
                    "Devices of a group that are in quarantine",
                    pool.quarantined,
                ),
            ] {
                self.gauge(name, help, &labels, value);
            }
        }
    }

    /// Adds a VM's metrics in OpenMetrics form; none if it did not answer.
    fn vm(&mut self, name: &str, text: Option<&str>) {
        let help = "Whether the VM's process answers";
        self.gauge(
            "gantry_vm_up",
            help,
            &[("vm", name)],
            usize::from(text.is_some()),
        );
        // A VM may report only its own metrics.
        let own = format!("{{vm=\"{}\"", escaped(name));
        let up = format!("gantry_vm_up{own}}}");
        let mut told = BTreeSet::from([up.as_str()]);
        let mut current = None;
        for line in text.unwrap_or_default().lines() {
            let mut words = line.splitn(4, ' ');
            let what = (words.next(), words.next(), words.next(), words.next());
            match what {
                (Some("#"), Some(key), Some(family), Some(rest)) => {
                    if !is_name(family) {
                        continue;
                    }
                    let family = self.0.entry(family.to_owned()).or_default();
                    match key {
                        "HELP" if family.help.is_empty() => {
                            let plain =
                                rest.replace(|char: char| char == '\\' || char.is_control(), "");
                            family.help = plain.trim_end_matches('.').to_owned();
                        }
                        "TYPE" if family.kind.is_empty() && KINDS.contains(&rest) => {
                            family.kind = rest.to_owned();
                        }
                        _ => {}
                    }
                    current = line.split(' ').nth(2).map(str::to_owned);
                }
                _ => {
                    let sample = line.split('{').next().unwrap_or_default();
                    let family = current.as_ref().filter(|family| {
                        let rest = sample.strip_prefix(family.as_str());
                        matches!(rest, Some("" | "_total"))
                            && line[sample.len()..].starts_with(&own)
                    });
                    // Prometheus rejects all metrics if one sample is malformed or duplicate.
                    if let Some(family) = family.and_then(|family| self.0.get_mut(family))
                        && let Some(labels) = labels(&line[sample.len()..])
                        && told.insert(&line[..sample.len() + labels])
                    {
                        family.samples.push(line.to_owned());
                    }
                }
            }
        }
    }

    /// Prometheus' text format, in which a counter's family has the name of its samples.
    fn text(&self) -> String {
        let mut text = String::new();
        for (name, family) in self
            .0
            .iter()
            .filter(|(_, family)| !family.samples.is_empty() && !family.kind.is_empty())
        {
            let name = match family.kind.as_str() {
                "counter" => format!("{name}_total"),
                _ => name.clone(),
            };
            // Writing to a string does not fail.
            let _ = writeln!(text, "# HELP {name} {}", family.help);
            let _ = writeln!(text, "# TYPE {name} {}", family.kind);
            for sample in &family.samples {
                let _ = writeln!(text, "{sample}");
            }
        }
        text
    }
}

/// The types of metrics that VMs report.
const KINDS: [&str; 2] = ["counter", "gauge"];

/// The length of a sample's labels, before its value; none if the sample is not of the form `{vm="a",device="d"}
/// 3`.
fn labels(text: &str) -> Option<usize> {
    let mut rest = text.strip_prefix('{')?;
    loop {
        let (name, value) = rest.split_once("=\"")?;
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        if name.is_empty() || !name.bytes().all(plain) {
            return None;
        }
        let mut is_escaped = false;
        let end = value.find(|char: char| {
            let ends = char == '"' && !is_escaped;
            is_escaped = char == '\\' && !is_escaped;
            ends
        })?;
        let (value, behind) = value.split_at(end);
        let unescaped = value.replace("\\\\", "").replace("\\\"", "");
        if unescaped.replace("\\n", "").contains('\\') || value.contains(char::is_control) {
            return None;
        }
        let behind = behind.strip_prefix('"')?;
        match behind.strip_prefix(',') {
            Some(next) => rest = next,
            None => {
                let number = behind.strip_prefix("} ")?;
                number.parse::<f64>().ok()?;
                return Some(text.len() - number.len() - 1);
            }
        }
    }
}

fn is_name(name: &str) -> bool {
    name.starts_with("gantry_")
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// A label's value as the text formats write it.
fn escaped(value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"");
    value.replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "\
# HELP gantry_device_resets Resets.
# TYPE gantry_device_resets counter
gantry_device_resets_total{vm=\"a\",device=\"d\"} 3
# HELP gantry_vm_slots Slots.
# TYPE gantry_vm_slots gauge
gantry_vm_slots{vm=\"a\"} 4
# EOF
";

    #[test]
    fn pools_and_all_vms_are_told_family_by_family() {
        let mut families = Families::default();
        families.pools(&[Counts {
            group: "gpu \"x\"".to_owned(),
            kind: "gpu",
            total: 4,
            used: 1,
            free: 2,
            quarantined: 1,
        }]);
        families.vm("a", Some(ANSWER));
        families.vm("b", Some(&ANSWER.replace("\"a\"", "\"b\"")));
        families.vm("silent", None);
        let text = families.text();
        let once = |line: &str| text.lines().filter(|found| *found == line).count() == 1;
        for line in [
            "# TYPE gantry_device_resets_total counter",
            "gantry_device_resets_total{vm=\"a\",device=\"d\"} 3",
            "gantry_device_resets_total{vm=\"b\",device=\"d\"} 3",
            "# TYPE gantry_vm_slots gauge",
            "gantry_group_devices{group=\"gpu \\\"x\\\"\",type=\"gpu\"} 4",
            "gantry_group_devices_quarantined{group=\"gpu \\\"x\\\"\",type=\"gpu\"} 1",
            "gantry_vm_up{vm=\"a\"} 1",
            "gantry_vm_up{vm=\"silent\"} 0",
        ] {
            assert!(once(line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn what_a_vm_tells_wrongly_spoils_nothing() {
        let wrong = "\
# TYPE gantry_vm_odd nonsense
# TYPE gantry_vm_up gauge
gantry_vm_up{vm=\"a\"} 0
# TYPE gantry_vm_slots gauge
gantry_vm_slots{vm=\"a\"} many
gantry_vm_slots{vm=\"a\",} 1
gantry_vm_slots{vm=\"a\"}
gantry_vm_slots{vm=\"a\",x=\"\\q\"} 1
gantry_vm_slots{vm=\"a\",x=\"\u{1b}[2J\"} 1
gantry_vm_slots{vm=\"a\",x=\"} 1
gantry_vm_slots{vm=\"a\",x=\"\\\\n\\\"\"} 1
gantry_vm_slots{vm=\"a\"} 4
gantry_vm_slots{vm=\"a\"} 5
";
        let mut families = Families::default();
        families.vm("a", Some(wrong));
        let text = families.text();
        let samples: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let escapes = r#"gantry_vm_slots{vm="a",x="\\n\""} 1"#;
        let expected = [
            escapes,
            r#"gantry_vm_slots{vm="a"} 4"#,
            r#"gantry_vm_up{vm="a"} 1"#,
        ];
        assert_eq!(samples, expected);
        assert!(!text.contains("nonsense"), "{text}");
    }

    #[test]
    fn a_vm_speaks_for_no_other() {
        let forged = "\
# TYPE gantry_vm_slots gauge
gantry_vm_slots{vm=\"other\"} 4
gantry_group_devices{group=\"gpu\"} 9
gantry_vm_slotsé{vm=\"a\"} 1
# TYPE node_load1 gauge
node_load1{vm=\"a\"} 1
";
        let mut families = Families::default();
        families.vm("a", Some(forged));
        let text = families.text();
        for line in text.lines() {
            assert!(line.contains("gantry_vm_up"), "{text}");
        }
    }
}
