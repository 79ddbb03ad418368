//! Results as one HTML page that needs no other file: tables and plots, for screens of either brightness and for paper.

mod plots;

use std::fmt::Write;

use super::model::{Access, Device, Results, Test, Unit};
use super::table::{NO_VFIO, figures, lacking_text, title};

const STYLE: &str = include_str!("style.css");

/// The page.
pub fn page(results: &Results) -> String {
    let host = &results.host;
    let mut html = String::new();
    let mut put = |text: &str| html.push_str(text);
    put("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n");
    put(
        "<meta name=\"viewport\" content=\"width=device-width\">\n<meta name=\"color-scheme\" content=\"light dark\">\n",
    );
    put(&format!(
        "<title>gantry bench: {}</title>\n",
        escape(&host.name)
    ));
    put(&format!("<style>\n{STYLE}</style></head><body>\n"));
    put("<h1>What passing devices to a guest costs</h1>\n");
    if let Some(why) = &host.simulated {
        put(&format!(
            "<p class=\"warning\"><strong>Simulated:</strong> {}. The figures say nothing of hardware.</p>\n",
            escape(why)
        ));
    }
    if host.guest_access == Some(Access::Sysfs) {
        put(&format!("<p class=\"warning\">{}</p>\n", escape(NO_VFIO)));
    }
    put(&format!(
        "<p>Measured on <b>{}</b>: {}, {} processors, Linux {}; the guest ran {}. {} rounds on each side, {} ms a test; \
         gantry {}; <time>{}</time>.</p>\n",
        escape(&host.name),
        escape(&host.cpu),
        host.cpus,
        escape(&host.kernel),
        escape(&host.guest_kernel),
        results.rounds,
        results.per_test_ms,
        escape(&results.gantry),
        date(results.begun),
    ));
    for one in &results.devices {
        put(&device(one));
    }
    put("</body></html>\n");
    html
}

fn device(device: &Device) -> String {
    let mut html = format!("<section>\n<h2>{}</h2>\n", escape(&title(device)));
    let mut put = |text: &str| html.push_str(text);
    put(
        "<table><thead><tr><th>Test<th>Host<th>Guest<th>Guest / host<th>95% interval<th>Host p99<th>Guest p99\
         <th>Host p99.9<th>Guest p99.9<th>Samples</tr></thead><tbody>\n",
    );
    device.tests.iter().for_each(|test| put(&row(test)));
    put("</tbody></table>\n");
    for lacking in &device.lacking {
        let text = escape(&lacking_text(lacking));
        put(&format!("<p class=\"lacking\">{text}</p>\n"));
    }
    put("<div class=\"plots\">\n");
    let mut plot = |what: &str, svg: Option<String>| {
        if let Some(svg) = svg {
            let what = escape(what);
            put(&format!(
                "<figure role=\"img\" aria-label=\"{what}\">{svg}<figcaption>{what}</figcaption></figure>\n"
            ));
        }
    };
    plot(
        "Guest divided by host, of the medians, with 95% intervals",
        plots::ratios(device),
    );
    plot("Reads in a second by depth", plots::by_depth(device));
    for test in device
        .tests
        .iter()
        .filter(|test| test.unit == Unit::Nanoseconds && test.test != "clock")
    {
        plot(
            &format!("Distribution: {}", test.test),
            plots::distribution(test),
        );
    }
    put("</div>\n</section>\n");
    html
}

fn row(test: &Test) -> String {
    let mut cells = format!("<tr><th scope=\"row\">{}", escape(&test.test));
    for figure in figures(test) {
        let text = figure.map_or("–".to_owned(), |text| escape(&text));
        // Writing to memory does not fail.
        let _ = write!(cells, "<td>{text}");
    }
    cells.push_str("</tr>\n");
    cells
}

/// Text as HTML has it.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A moment, for people.
fn date(seconds: u64) -> String {
    let moment = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    httpdate::fmt_http_date(moment)
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::example;
    use super::*;

    #[test]
    fn a_page_needs_no_other_file_and_says_that_the_host_is_simulated() {
        let page = page(&example([2000.0, 2002.0]));
        assert!(page.contains("<strong>Simulated:</strong> the host is a virtual machine."));
        assert!(page.contains("<td>2.00 µs"), "{page}");
        assert!(page.contains("QEMU NVM Express &lt;Controller&gt;"));
        // The ratios, the rate by depth, one distribution.
        assert_eq!(page.matches("<svg").count(), 3);
        for word in ["<script", "src=", "href=", "@import", "url("] {
            assert!(!page.contains(word), "{word}");
        }
        assert!(page.contains("prefers-color-scheme: dark") && page.contains("@media print"));
    }

    #[test]
    fn a_device_without_figures_has_a_page_without_plots() {
        let mut results = example([1.0, 1.0]);
        results.devices[0].tests.clear();
        assert!(!page(&results).contains("<svg"));
    }
}
