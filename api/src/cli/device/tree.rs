//! `gantry device tree`: shows which PCI functions are behind which, with IOMMU groups, NUMA nodes, groups and VMs.

mod icon;
mod svg;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Args;
use gantry_resources::base::{HostBdf, HostPaths, Uuid};
use gantry_resources::facts::PciId;
use gantry_resources::inventory::{DeviceState, HostDevice, Mdevs, Sriov, TreeNode, scan, tree};
use gantry_resources::pools::Groups;
use serde::Serialize;

use super::state_word;
use crate::output::{print, print_json};
use crate::report::Failure;
use crate::table::{cut, terminal_width};
use icon::Icon;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  gantry device tree
  gantry device tree --svg host.svg
  gantry device tree --svg - > host.svg")]
pub struct TreeArgs {
    /// Write the tree as a picture to this file, or - for standard output
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    svg: Option<PathBuf>,
    /// Show the tree as JSON
    #[arg(long)]
    json: bool,
}

/// A function with its name, group and state, and the functions behind it.
#[derive(Debug, Serialize)]
struct Node {
    bdf: HostBdf,
    id: PciId,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    iommu_group: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    numa_node: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    bridge: bool,
    /// What it is, for its icon.
    #[serde(skip)]
    icon: Icon,
    /// Of a physical function: the virtual ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    sriov: Option<Sriov>,
    /// The mediated devices that it made.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mdevs: Vec<Uuid>,
    #[serde(flatten)]
    state: DeviceState,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    children: Vec<Node>,
}

impl Node {
    fn new(node: &TreeNode, groups: &Groups, mdevs: &Mdevs) -> Self {
        let device: &HostDevice = node.device;
        let name = [device.device_name(), device.class_name()];
        let group = groups.group_of(device);
        let address = device.bdf.to_string();
        let made = mdevs.devices.iter().filter(|mdev| mdev.parent == address);
        Self {
            bdf: device.bdf,
            id: device.id,
            name: name
                .into_iter()
                .flatten()
                .next()
                .unwrap_or("unknown")
                .to_owned(),
            iommu_group: device.iommu_group,
            numa_node: device.numa_node,
            group: group.map(|group| group.name.clone()),
            icon: Icon::of(device.class, group.and_then(|group| group.class.as_deref())),
            bridge: device.is_bridge(),
            sriov: device.sriov,
            mdevs: made.map(|mdev| mdev.uuid).collect(),
            state: device.state(),
            children: node
                .children
                .iter()
                .map(|child| Self::new(child, groups, mdevs))
                .collect(),
        }
    }

    /// IOMMU group, NUMA node, group and holder.
    fn facts(&self) -> String {
        let mut facts = Vec::new();
        facts.extend(self.iommu_group.map(|group| format!("iommu {group}")));
        facts.extend(self.numa_node.map(|node| format!("numa {node}")));
        facts.extend(self.made());
        if !self.bridge {
            facts.extend(self.group.clone());
            facts.push(self.holder());
        }
        facts.join(" · ")
    }

    /// Its virtual functions and mediated devices, in words.
    fn made(&self) -> Vec<String> {
        let functions = self.sriov.filter(|sriov| sriov.active > 0);
        let functions = functions.map(|sriov| format!("{} of {} VFs", sriov.active, sriov.total));
        let mdevs = Some(self.mdevs.len()).filter(|count| *count > 0);
        let mdevs = mdevs.map(|count| match count {
            1 => "1 mediated device".to_owned(),
            count => format!("{count} mediated devices"),
        });
        functions.into_iter().chain(mdevs).collect()
    }

    /// The VM that has it, or else its state.
    fn holder(&self) -> String {
        match &self.state {
            DeviceState::Assigned { vm: Some(vm) } => format!("VM \"{vm}\""),
            state => state_word(state).to_owned(),
        }
    }
}

pub fn show(args: &TreeArgs, paths: &HostPaths) -> Result<(), Failure> {
    let devices = scan(paths)?;
    let groups = Groups::load(paths)?;
    let mdevs = Mdevs::read(paths)?;
    let roots: Vec<Node> = tree(paths, &devices)
        .iter()
        .map(|node| Node::new(node, &groups, &mdevs))
        .collect();
    if args.json {
        return print_json(&roots);
    }
    match &args.svg {
        None => print(|out| write_tree(out, &roots, terminal_width())),
        Some(file) => {
            let hostname = std::fs::read_to_string(paths.proc.join("sys/kernel/hostname"));
            let title = svg::Title {
                host: hostname.unwrap_or_default().trim().to_owned(),
                date: httpdate::fmt_http_date(SystemTime::now()),
            };
            let picture = svg::draw(&roots, &title);
            if file == Path::new("-") {
                return print(|out| out.write_all(picture.as_bytes()));
            }
            let written = std::fs::write(file, picture);
            written
                .map_err(|error| Failure::host(format!("cannot write {}: {error}", file.display())))
        }
    }
}

fn write_tree(out: &mut dyn Write, roots: &[Node], width: usize) -> io::Result<()> {
    let mut lines = Vec::new();
    for node in roots {
        lines.push((String::new(), node));
        below(&mut lines, "", &node.children);
    }
    // The facts are in one column, if there is room.
    let head = |(lead, node): &(String, &Node)| format!("{lead}{} {} ", node.bdf, node.id);
    let widest = lines
        .iter()
        .map(|line| head(line).chars().count() + line.1.name.chars().count());
    let facts = lines
        .iter()
        .map(|(_, node)| node.facts().chars().count())
        .max();
    // Only names are cut.
    let least = lines.iter().map(|line| head(line).chars().count()).max();
    let room = width.saturating_sub(facts.unwrap_or(0) + 2);
    let room = room.max(least.unwrap_or(0));
    let column = widest.max().unwrap_or(0).min(room);
    for line in &lines {
        let mut text = head(line);
        let free = column.saturating_sub(text.chars().count());
        let mut name = line.1.name.clone();
        cut(&mut name, free);
        text.push_str(&name);
        writeln!(
            out,
            "{}",
            format!("{text:column$}  {}", line.1.facts()).trim_end()
        )?;
    }
    Ok(())
}

fn below<'a>(lines: &mut Vec<(String, &'a Node)>, lead: &str, children: &'a [Node]) {
    for (index, child) in children.iter().enumerate() {
        let last = index + 1 == children.len();
        lines.push((format!("{lead}{}", if last { "└─ " } else { "├─ " }), child));
        let lead = format!("{lead}{}", if last { "   " } else { "│  " });
        below(lines, &lead, &child.children);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn node(address: &str, name: &str, children: Vec<Node>) -> Node {
        Node {
            bdf: address.parse().unwrap(),
            id: PciId {
                vendor: 0x10de,
                device: 0x1c30,
            },
            name: name.to_owned(),
            iommu_group: Some(7),
            numa_node: None,
            group: Some("gpus".to_owned()),
            bridge: !children.is_empty(),
            icon: Icon::Network,
            sriov: None,
            mdevs: Vec::new(),
            state: DeviceState::Detached,
            children,
        }
    }

    pub(super) fn host() -> Vec<Node> {
        let cards = vec![
            node("0b:00.0", "a <card>", Vec::new()),
            node("0b:00.1", "its sound", Vec::new()),
        ];
        let far = vec![node("0c:00.0", "a disk", Vec::new())];
        vec![node(
            "00:01.0",
            "a port",
            vec![
                node("0a:00.0", "a switch", cards),
                node("0a:01.0", "a switch", far),
            ],
        )]
    }

    #[test]
    fn lines_show_what_hangs_behind_what() {
        let mut out = Vec::new();
        write_tree(&mut out, &host(), 200).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "0000:00:01.0 10de:1c30 a port           iommu 7",
                "├─ 0000:0a:00.0 10de:1c30 a switch      iommu 7",
                "│  ├─ 0000:0b:00.0 10de:1c30 a <card>   iommu 7 · gpus · detached",
                "│  └─ 0000:0b:00.1 10de:1c30 its sound  iommu 7 · gpus · detached",
                "└─ 0000:0a:01.0 10de:1c30 a switch      iommu 7",
                "   └─ 0000:0c:00.0 10de:1c30 a disk     iommu 7 · gpus · detached",
            ]
        );
    }

    #[test]
    fn names_are_cut_where_the_terminal_is_narrow() {
        let mut out = Vec::new();
        write_tree(
            &mut out,
            &[node("00:01.0", &"long ".repeat(30), Vec::new())],
            80,
        )
        .unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.lines().all(|line| line.chars().count() <= 80),
            "{text}"
        );
        assert!(text.contains("long…  iommu 7"), "{text}");
    }
}
