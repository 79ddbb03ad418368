//! The plots of a device, as SVG. Their colours are those that the page's style replaces in the dark.

use std::error::Error;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::super::model::{Device, Round, Test, Unit};
use super::super::stats::Ratio;
use super::super::table::{middle, show};

const SIZE: (u32, u32) = (520, 300);
const FONT: (&str, i32) = ("sans-serif", 12);
const LINE: RGBColor = RGBColor(0xcc, 0xcc, 0xcc);
const HOST: RGBColor = RGBColor(0x0b, 0x6b, 0xcb);
const GUEST: RGBColor = RGBColor(0xc2, 0x41, 0x0c);
/// Pixels of a row of ratios.
const ROW: u32 = 22;
/// How a test is called that counts reads at a depth.
const BY_DEPTH: &str = "read 4 KiB, depth ";

type Drawn = Result<(), Box<dyn Error>>;

/// Draws an SVG; `None` if it cannot be drawn.
fn svg(
    size: (u32, u32),
    draw: impl Fn(&DrawingArea<SVGBackend<'_>, Shift>) -> Drawn,
) -> Option<String> {
    let mut text = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        draw(&root).and_then(|()| Ok(root.present()?))
    };
    if let Err(error) = drawn {
        tracing::warn!("a plot is left out: {error}");
        return None;
    }
    // Alone in a file it would have to say its type; within HTML it must not.
    text.find("<svg").map(|at| text.split_off(at))
}

/// The ratio of each test, as a bar around its interval.
pub fn ratios(device: &Device) -> Option<String> {
    let known = device.tests.iter().filter(|test| test.test != "clock");
    let known: Vec<(&Test, Ratio)> = known.filter_map(|test| Some((test, test.ratio?))).collect();
    let all = known.iter().flat_map(|(_, ratio)| ends(*ratio));
    let range = around(all.chain([1.0]))?;
    if known.is_empty() {
        return None;
    }
    let rows = known.len();
    svg((SIZE.0, rows as u32 * ROW + 60), |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(190)
            .build_cartesian_2d(range.clone().log_scale(), 0.0..rows as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(0)
            .light_line_style(TRANSPARENT)
            .bold_line_style(LINE)
            .x_label_formatter(&|ratio| format!("{ratio:.2}"))
            .label_style(FONT)
            .draw()?;
        chart.draw_series([PathElement::new(
            vec![(1.0, 0.0), (1.0, rows as f64)],
            BLACK,
        )])?;
        for (index, (test, ratio)) in known.iter().enumerate() {
            // The first test is on top.
            let y = rows as f64 - index as f64 - 0.5;
            let [low, high] = ends(*ratio);
            chart.draw_series([PathElement::new(
                vec![(low, y), (high, y)],
                GUEST.stroke_width(3),
            )])?;
            chart.draw_series([Circle::new((ratio.value, y), 4, GUEST.filled())])?;
            let (_, at) = chart.backend_coord(&(1.0, y));
            root.draw_text(&test.test, &FONT.into_text_style(root), (8, at - 7))?;
        }
        Ok(())
    })
}

/// Both ends of a ratio's interval; the ratio itself if it has none.
fn ends(ratio: Ratio) -> [f64; 2] {
    [ratio.low, ratio.high].map(|end| end.unwrap_or(ratio.value))
}

/// Reads in a second, by depth.
pub fn by_depth(device: &Device) -> Option<String> {
    let rates = device.tests.iter().filter_map(|test| {
        let depth: f64 = test.test.strip_prefix(BY_DEPTH)?.parse().ok()?;
        (test.unit == Unit::PerSecond).then_some((depth, test))
    });
    let rates: Vec<(f64, &Test)> = rates.collect();
    let line = |rounds: fn(&Test) -> &Vec<Round>| -> Vec<(f64, f64)> {
        let points = rates
            .iter()
            .map(|(depth, test)| Some((*depth, middle(rounds(test))?)));
        points.flatten().collect()
    };
    let (host, guest) = (line(|test| &test.host), line(|test| &test.guest));
    let both = || host.iter().chain(&guest);
    let (depths, figures) = (
        around(both().map(|point| point.0))?,
        around(both().map(|point| point.1))?,
    );
    svg(SIZE, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d(depths.clone().log_scale(), figures.clone().log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(LINE)
            .x_desc("depth")
            .x_label_formatter(&|depth| format!("{depth:.0}"))
            .y_label_formatter(&|rate| show(Unit::PerSecond, *rate))
            .label_style(FONT)
            .draw()?;
        for (points, colour) in [(&host, HOST), (&guest, GUEST)] {
            chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
            let dots = points
                .iter()
                .map(|point| Circle::new(*point, 3, colour.filled()));
            chart.draw_series(dots)?;
        }
        legend(root)
    })
}

/// The distribution of a test: for each share of the operations, how long they take at most.
pub fn distribution(test: &Test) -> Option<String> {
    let sides = [(&test.host, HOST), (&test.guest, GUEST)];
    let values = sides.iter().flat_map(|(rounds, _)| rounds.iter());
    let values = values.flat_map(|round| round.curve.iter().map(|point| point.value));
    let range = around(values)?;
    // The places of the shares are equally far from each other: so the rare ones are seen.
    let shares: Vec<f64> = test
        .host
        .first()
        .or(test.guest.first())?
        .curve
        .iter()
        .map(|point| point.share)
        .collect();
    let last = shares.len().checked_sub(1).filter(|last| *last > 0)?;
    svg(SIZE, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d(0..last, range.clone().log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(LINE)
            .x_desc("percentile")
            .x_labels(shares.len())
            .x_label_formatter(&|index| {
                let share = shares.get(*index).copied().unwrap_or_default() * 1000.0;
                format!("{}", share.round() / 10.0)
            })
            .y_label_formatter(&|time| show(Unit::Nanoseconds, *time))
            .label_style(FONT)
            .draw()?;
        for (rounds, colour) in &sides {
            for round in *rounds {
                let values = round.curve.iter().map(|point| point.value.max(range.start));
                let line = values.enumerate();
                chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
            }
        }
        legend(root)
    })
}

/// Which colour is which.
fn legend(root: &DrawingArea<SVGBackend<'_>, Shift>) -> Drawn {
    for (name, colour, x) in [("host", HOST, 84), ("guest", GUEST, 144)] {
        let line = vec![(x, 16), (x + 16, 16)];
        root.draw(&PathElement::new(line, colour.stroke_width(3)))?;
        root.draw_text(name, &FONT.into_text_style(root), (x + 20, 9))?;
    }
    Ok(())
}

/// A range for a logarithmic axis that has all positive values, with some room; `None` without any.
fn around(values: impl Iterator<Item = f64>) -> Option<Range<f64>> {
    let values = values.filter(|value| *value > 0.0 && value.is_finite());
    let (low, high) = values.fold((f64::MAX, 0.0f64), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    (low <= high).then_some(low * 0.8..high * 1.25)
}
