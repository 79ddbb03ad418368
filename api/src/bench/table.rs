//! Results on the terminal.

use std::io::{self, Write};

use super::model::{Access, Device, Lacking, Results, Round, Side, Test, Unit, medians};
use super::stats::Ratio;
use crate::output::print;
use crate::report::Failure;
use crate::table::{Column, Shrink, cell, write_table};

const COLUMNS: &[Column] = &[
    Column::new("test", Shrink::Cut(16)),
    Column::full("host"),
    Column::full("guest"),
    Column::full("guest/host"),
    Column::new("95%", Shrink::Drop(4)),
    Column::new("host p99", Shrink::Drop(3)),
    Column::new("guest p99", Shrink::Drop(3)),
    Column::new("host p99.9", Shrink::Drop(1)),
    Column::new("guest p99.9", Shrink::Drop(1)),
    Column::new("samples", Shrink::Drop(2)),
];

/// What the guest lacks without VFIO.
pub const NO_VFIO: &str = "No interrupts in the guest: its kernel has no VFIO without an IOMMU (CONFIG_VFIO_NOIOMMU), so that it reached the \
     devices through sysfs.";

/// Prints the results as tables, one for each device.
pub fn print_results(results: &Results) -> Result<(), Failure> {
    print(|out| write_results(out, results))
}

fn write_results(out: &mut dyn Write, results: &Results) -> io::Result<()> {
    let Results {
        host,
        rounds,
        per_test_ms,
        ..
    } = results;
    if let Some(why) = &host.simulated {
        writeln!(
            out,
            "Simulated: {why}. The figures say nothing of hardware."
        )?;
    }
    if host.guest_access == Some(Access::Sysfs) {
        writeln!(out, "{NO_VFIO}")?;
    }
    for device in &results.devices {
        writeln!(out, "{}", title(device))?;
        write_table(out, COLUMNS, device.tests.iter().map(row).collect(), None)?;
        for lacking in &device.lacking {
            writeln!(out, "{}", lacking_text(lacking))?;
        }
        writeln!(out)?;
    }
    writeln!(
        out,
        "Medians of {rounds} {} of {per_test_ms} ms a test on each side, and the guest's divided by the host's.",
        if *rounds == 1 { "round" } else { "rounds" },
    )
}

/// What a side lacks, as a sentence.
pub fn lacking_text(lacking: &Lacking) -> String {
    let Lacking { side, test, why } = lacking;
    let side = match side {
        Side::Host => "on the host",
        Side::Guest => "in the guest",
    };
    format!("Not measured {side}: {test}: {why}")
}

/// What a device is called.
pub fn title(device: &Device) -> String {
    let name = device.name.as_deref().unwrap_or("unknown device");
    format!("{} {name} [{}]", device.address, device.ids)
}

fn row(test: &Test) -> Vec<String> {
    let figures = figures(test).into_iter().map(cell);
    std::iter::once(test.test.clone()).chain(figures).collect()
}

/// What is shown of a test, in the order of the columns after its name.
pub fn figures(test: &Test) -> [Option<String>; 9] {
    let of = |rounds: &[Round], figure: fn(&Round) -> f64| {
        let figures: Vec<f64> = rounds.iter().map(figure).collect();
        median(figures).map(|figure| show(test.unit, figure))
    };
    // Of a rate, the extremes of a few parts of the time: they say nothing.
    let tail = |shown: Option<String>| shown.filter(|_| test.unit == Unit::Nanoseconds);
    let rounds = test.host.iter().chain(&test.guest);
    let samples: u64 = rounds.map(|round| round.samples).sum();
    [
        of(&test.host, |round| round.p50),
        of(&test.guest, |round| round.p50),
        test.ratio.map(|ratio| format!("{:.2}", ratio.value)),
        test.ratio.and_then(interval),
        tail(of(&test.host, |round| round.p99)),
        tail(of(&test.guest, |round| round.p99)),
        tail(of(&test.host, |round| round.p999)),
        tail(of(&test.guest, |round| round.p999)),
        Some(samples.to_string()),
    ]
}

/// The median over rounds.
pub fn middle(rounds: &[Round]) -> Option<f64> {
    median(medians(rounds))
}

fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}

/// An interval, if it is known.
pub fn interval(ratio: Ratio) -> Option<String> {
    Some(format!("{:.2}-{:.2}", ratio.low?, ratio.high?))
}

/// A figure with its unit.
pub fn show(unit: Unit, figure: f64) -> String {
    let scaled = |units: [&str; 4]| {
        let mut figure = figure;
        let mut unit = units[0];
        for next in &units[1..] {
            if figure < 1000.0 {
                break;
            }
            figure /= 1000.0;
            unit = next;
        }
        let digits = match figure {
            figure if figure >= 100.0 => 0,
            figure if figure >= 10.0 => 1,
            _ => 2,
        };
        format!("{figure:.digits$} {unit}")
    };
    match unit {
        Unit::Nanoseconds => scaled(["ns", "µs", "ms", "s"]),
        Unit::PerSecond => scaled(["/s", "k/s", "M/s", "G/s"]),
        Unit::BytesPerSecond => scaled(["B/s", "kB/s", "MB/s", "GB/s"]),
    }
}

#[cfg(test)]
pub mod tests {
    use gantry_vmm::measure::Samples;

    use super::super::model::{FORMAT, Host, Kind, Round};
    use super::*;

    /// Results of two rounds of a disk, with these medians of the guest's latency.
    pub fn example(guest: [f64; 2]) -> Results {
        let mut device = Device {
            address: "0000:01:00.0".to_owned(),
            ids: "1b36:0010".to_owned(),
            name: Some("QEMU NVM Express <Controller>".to_owned()),
            kind: Kind::Nvme,
            tests: Vec::new(),
            lacking: vec![Lacking {
                side: Side::Host,
                test: "reset".to_owned(),
                why: "it has none".to_owned(),
            }],
        };
        let mut add = |side, test: &str, unit, median: f64| {
            let samples = Samples::new(vec![median * 0.5, median, median * 2.0]);
            device.add(side, test.to_owned(), unit, Round::from(&samples.unwrap()));
        };
        for (round, median) in guest.into_iter().enumerate() {
            let host = 1000.0 + round as f64;
            add(Side::Host, "MMIO read 4 B", Unit::Nanoseconds, host);
            add(Side::Guest, "MMIO read 4 B", Unit::Nanoseconds, median);
            for depth in [1.0, 4.0] {
                let test = format!("read 4 KiB, depth {depth}");
                add(Side::Host, &test, Unit::PerSecond, 9000.0 * depth);
                add(Side::Guest, &test, Unit::PerSecond, 8000.0 * depth);
            }
        }
        Results {
            format: FORMAT,
            gantry: "0.1.0".to_owned(),
            begun: 1_800_000_000,
            rounds: 2,
            per_test_ms: 100,
            host: Host {
                name: "lab".to_owned(),
                kernel: "6.12".to_owned(),
                cpu: "a processor".to_owned(),
                cpus: 2,
                simulated: Some("the host is a virtual machine".to_owned()),
                guest_kernel: "/boot/vmlinuz".to_owned(),
                guest_access: Some(Access::Vfio),
            },
            devices: vec![device],
        }
    }

    #[test]
    fn figures_have_three_digits_and_a_unit() {
        for (unit, figure, shown) in [
            (Unit::Nanoseconds, 31.04, "31.0 ns"),
            (Unit::Nanoseconds, 1234.0, "1.23 µs"),
            (Unit::Nanoseconds, 104_700_000.0, "105 ms"),
            (Unit::PerSecond, 750_000.0, "750 k/s"),
            (Unit::BytesPerSecond, 3.2e9, "3.20 GB/s"),
            (Unit::BytesPerSecond, 3.2e13, "32000 GB/s"),
        ] {
            assert_eq!(show(unit, figure), shown);
        }
    }

    #[test]
    fn a_table_shows_both_sides_their_ratio_and_that_the_host_is_simulated() {
        let mut out = Vec::new();
        write_results(&mut out, &example([2000.0, 2002.0])).unwrap();
        let text = anstream::adapter::strip_str(&String::from_utf8(out).unwrap()).to_string();
        assert!(
            text.starts_with("Simulated: the host is a virtual machine."),
            "{text}"
        );
        let row = text
            .lines()
            .find(|line| line.starts_with("MMIO read"))
            .unwrap();
        assert!(
            row.contains("1.00 µs") && row.contains("2.00 µs") && row.contains("2.00-2.00"),
            "{row}"
        );
        assert!(
            text.contains("Not measured on the host: reset: it has none"),
            "{text}"
        );
    }
}
