//! Standard output and error: tables, colours, pipes, what clap makes.

use std::fs;

use crate::host::{Done, Host, first_words};

#[test]
fn version_and_help_are_there() {
    let host = Host::new();
    assert_eq!(
        host.gantry(&["--version"]).ok(),
        format!("gantry {}\n", env!("CARGO_PKG_VERSION"))
    );
    let help = host.gantry(&["run", "--help"]).ok();
    for words in [
        "Exit status:",
        "128+n",
        "Examples:",
        "--allow-ungrouped",
        "--seccomp",
    ] {
        assert!(help.contains(words), "{words}: {help}");
    }
    assert!(!host.gantry(&["--help"]).ok().contains("sysfs-write"));
}

#[test]
fn directories_are_taken_from_flags_and_environment() {
    let host = Host::new();
    fs::create_dir(host.path("other")).unwrap();
    let other = host.path("other").display().to_string();
    let by_flag = host.gantry(&["group", "list", "--config-dir", &other]).ok();
    assert!(by_flag.contains("other/groups.json"), "{by_flag}");
    let output = host
        .command(&["group", "list"])
        .env("GANTRY_CONFIG_DIR", &other)
        .output();
    assert!(
        Done::from(output.unwrap())
            .ok()
            .contains("other/groups.json")
    );
}

#[test]
fn errors_are_coloured_only_where_that_is_wanted() {
    let host = Host::new();
    let plain = host.gantry(&["run", "none.json"]).failed(2);
    assert!(!plain.contains('\x1b'), "{plain:?}");
    let forced = host
        .command(&["run", "none.json"])
        .env("CLICOLOR_FORCE", "1")
        .output()
        .unwrap();
    assert!(Done::from(forced).failed(2).starts_with("\x1b["));
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let host = Host::new();
    for args in [&["device", "list"][..], &["schema"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = host.command(args).stdout(writer).output().unwrap();
        assert_eq!(Done::from(output).ok(), "");
    }
}

#[test]
fn a_full_disk_is_a_failure() {
    let host = Host::new();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = host
        .command(&["device", "list"])
        .stdout(full)
        .output()
        .unwrap();
    let error = Done::from(output).failed(1);
    assert!(
        error.starts_with("error: cannot write to standard output: No space left"),
        "{error}"
    );
}

#[test]
fn no_state_of_a_stream_harms_a_command() {
    let host = Host::new();
    // The log warns of the group, and then the VM fails: its kernel is none.
    let vm = r#"{"payload": {"kernel": "/bin/true"}, "hotplug": {"groups": ["none"]}}"#;
    fs::write(host.path("w.json"), vm).unwrap();
    let vm = host.path("w.json").display().to_string();
    let commands: [(&[&str], &[i32]); 6] = [
        (&["run", "--no-api", &vm], &[1]),
        (&["device", "list"], &[0, 1]),
        (&["device", "list", "--json"], &[0, 1]),
        (&["completions", "bash"], &[0, 1]),
        (&["--help"], &[0, 1]),
        (&["device", "lits"], &[2]),
    ];
    let streams = [
        "\"$@\" >/dev/full",
        "\"$@\" 2>/dev/full",
        "\"$@\" >/dev/full 2>&1",
        "\"$@\" >&-",
        "\"$@\" 2>&-",
        "\"$@\" >&- 2>&-",
        "\"$@\" | true",
        "\"$@\" 2>&1 | true",
        "\"$@\" >&2 2>/dev/full",
        "ulimit -f 0; \"$@\" >limited 2>&1",
    ];
    for (args, statuses) in commands {
        for stream in streams {
            let command = host.command(args);
            let mut shell = std::process::Command::new("bash");
            shell.args(["-c", &format!("set -o pipefail; {stream}"), "bash"]);
            shell.arg(command.get_program()).args(command.get_args());
            shell.current_dir(host.path(""));
            shell.stdin(std::process::Stdio::null());
            let status = shell.output().unwrap().status;
            let known = |code| statuses.contains(&code);
            assert!(
                status.code().is_some_and(known),
                "{args:?} {stream}: {status}"
            );
        }
    }
}

#[test]
fn tables_are_sorted_by_each_of_their_columns() {
    let host = Host::new();
    let tables: [(&[&str], &str); 11] = [
        (&["device", "list"], "address"),
        (&["device", "list", "--type", "nvme"], "address"),
        (&["device", "mdev"], "uuid"),
        (&["group", "list"], "name"),
        (&["group", "show", "disks"], "address"),
        (&["group", "match", "disks"], "address"),
        (&["group", "alias"], "alias"),
        (&["group", "device-spec"], "address"),
        (&["plan", "list"], "name"),
        (&["tenant", "list"], "name"),
        (&["vm", "list"], "name"),
    ];
    for (args, column) in tables {
        host.gantry(&[args, &["--sort", column]].concat()).ok();
        let wrong = host.gantry(&[args, &["--sort", "colour"]].concat());
        assert!(wrong.failed(2).to_lowercase().contains(column), "{args:?}");
    }
    // The titles that a table shows are the words that --sort takes.
    for table in [
        &["device", "list"][..],
        &["group", "list"],
        &["group", "show", "disks"],
    ] {
        let shown = host.gantry(table).ok();
        let heads = shown
            .lines()
            .find(|line| line.starts_with("ADDRESS") || line.starts_with("NAME"));
        for head in heads.unwrap().split_whitespace() {
            host.gantry(&[table, &["--sort", head.to_lowercase().as_str()]].concat())
                .ok();
        }
    }
    let by_state = host
        .gantry(&["group", "match", "disks", "--sort", "STATE"])
        .ok();
    assert_eq!(first_words(&by_state), ["0000:02:00.0", "0000:01:00.0"]);
}

#[test]
fn what_is_piped_is_never_cut_to_a_width() {
    let host = Host::new();
    let wide = host.gantry(&["device", "list"]).ok();
    let mut narrow = host.command(&["device", "list"]);
    let narrow = Done::from(narrow.env("COLUMNS", "40").output().unwrap());
    assert_eq!(narrow.ok(), wide);
    let head = wide.lines().next().unwrap();
    for title in ["ADDRESS", "ID", "CLASS", "MODULES", "NUMA", "VFS", "VM"] {
        assert!(head.contains(title), "{head}");
    }
    assert!(!wide.contains('…') && !wide.contains("Not shown"), "{wide}");
}

#[test]
fn completions_and_man_pages_come_from_the_grammar() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = host.gantry(&["completions", shell]).ok();
        assert!(script.contains("release-quarantine"), "{shell}");
        assert!(
            !script.contains("sysfs-write"),
            "{shell} offers what is hidden"
        );
        assert!(!script.contains("No such"), "{shell}");
    }
    let dir = host.path("man1");
    host.gantry(&["man", dir.to_str().unwrap()]).ok();
    let page = fs::read_to_string(dir.join("gantry-group-create.1")).unwrap();
    assert!(
        page.contains("--rule") || page.contains("\\-\\-rule"),
        "{page}"
    );
    assert!(!dir.join("gantry-__restore.1").exists());
}
