//! Progress for people: spinners and bars on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A step that takes a while; shown until it is finished or dropped.
#[derive(Debug)]
pub struct Step {
    what: String,
    bar: Option<ProgressBar>,
    began: Instant,
}

impl Step {
    /// Shows a spinner, or prints one line when standard error is no terminal.
    pub fn begin(what: impl Into<String>) -> Self {
        Self::with(what.into(), None, "{spinner} {msg} {elapsed:.dim}")
    }

    /// Shows a bar that runs to `total` (bytes when `total` is a size of files).
    pub fn bytes(what: impl Into<String>, total: u64) -> Self {
        let style = "{spinner} {msg} {wide_bar} {bytes}/{total_bytes}";
        Self::with(what.into(), Some(total), style)
    }

    /// Shows a bar that runs to `total` items.
    pub fn items(what: impl Into<String>, total: u64) -> Self {
        let style = "{spinner} {msg} {wide_bar} {pos}/{len} {elapsed:.dim}";
        Self::with(what.into(), Some(total), style)
    }

    fn with(what: String, total: Option<u64>, style: &str) -> Self {
        let bar = if stderr().is_terminal() {
            let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            bar.set_style(
                ProgressStyle::with_template(style)
                    .unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.set_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            Some(bar)
        } else {
            eprintln!("{what} ...");
            None
        };
        Self {
            what,
            bar,
            began: Instant::now(),
        }
    }

    /// Moves the bar.
    pub fn at(&self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
        }
    }

    /// Says what happens now: behind the step's own words, or on a line of its own.
    pub fn say(&self, now: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{}, {now}", self.what)),
            None => eprintln!("{}: {now}", self.what),
        }
    }

    /// Ends the step and says how long it took.
    pub fn done(self) {
        let seconds = self.began.elapsed().as_secs_f64();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: {seconds:.1} s", self.what);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
