//! Bars as SVG: one panel for each metric of the table.
//!
//! *Invariant:* pure text; every panel begins at zero and shows every peer that has a figure.

use crate::bench::report::{MAIN, Report, number};
use std::fmt::Write;

const WIDTH: usize = 560;
const BAR: usize = 18;
const LABEL: usize = 150;
const HEAD: usize = 34;

/// The picture.
pub fn svg(report: &Report, caption: &str) -> String {
    let peers = report.peers();
    let panel = HEAD + peers.len() * BAR + 16;
    let (width, height) = (2 * WIDTH, 40 + MAIN.len().div_ceil(2) * panel);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"14\">{}</text>\n",
        escape(caption)
    );
    for (index, (metric, unit, more, title)) in MAIN.iter().enumerate() {
        let (left, top) = ((index % 2) * WIDTH + 10, 40 + (index / 2) * panel);
        let better = if *more { "more is better" } else { "less is better" };
        let heading = format!("{title}, {unit} ({better})");
        let _ =
            writeln!(text, "<text x=\"{left}\" y=\"{}\" font-weight=\"bold\">{}</text>", top + 20, escape(&heading));
        let figures: Vec<(&String, f64)> =
            peers.iter().filter_map(|peer| Some((peer, report.value(peer, metric)?))).collect();
        let most = figures.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        for (row, (peer, value)) in figures.iter().enumerate() {
            let y = top + HEAD + row * BAR;
            let room = (WIDTH - LABEL - 90) as f64;
            let length = if most > 0.0 { (value / most * room).max(0.0) } else { 0.0 };
            let colour = if peer.starts_with("bunter") { "#c0392b" } else { "#5d6d7e" };
            let _ = writeln!(
                text,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
                 <rect x=\"{}\" y=\"{}\" width=\"{length:.1}\" height=\"{}\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{}</text>",
                left + LABEL - 6,
                y + 13,
                escape(peer),
                left + LABEL,
                y + 2,
                BAR - 4,
                (left + LABEL + 6) as f64 + length,
                y + 13,
                number(*value),
            );
        }
    }
    text + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fills_the_panel_and_names_are_escaped() {
        let mut report = Report::default();
        report.add("plain", None, "throughput_1", "Gb/s", 40.0);
        report.add("bunter", Some("user"), "throughput_1", "Gb/s", 10.0);
        let text = svg(&report, "a < b");
        assert!(text.contains("a &lt; b") && text.ends_with("</svg>\n"), "{text}");
        assert!(text.contains("width=\"320.0\"") && text.contains("width=\"80.0\""), "{text}");
        assert_eq!(text.matches("more is better").count(), 3);
    }
}
