//! What is shown: rows, tables, who is best.
//!
//! *Invariant:* every figure that was measured has a row, whoever it flatters, and the ten metrics of [`MAIN`] keep their
//! names and units.

use crate::bench::stats::{median, spread};
use serde_json::{Value, json};
use std::fmt::Write;

/// The metrics of the table and the plots: name, unit, whether more is better, title.
pub const MAIN: [(&str, &str, bool, &str); 10] = [
    ("throughput_1", "Gb/s", true, "one stream"),
    ("throughput_16", "Gb/s", true, "16 streams"),
    ("cpu_per_gb", "s", false, "processor time of both proxies per GB"),
    ("rtt64_c1_p50", "us", false, "64 B round trip, 1 connection, median"),
    ("rtt64_c16_p50", "us", false, "64 B round trip, 16 connections, median"),
    ("rtt64_c16_p99", "us", false, "64 B round trip, 16 connections, 99 %"),
    ("rtt64_c64_p99", "us", false, "64 B round trip, 64 connections, 99 %"),
    ("conn_rate", "1/s", true, "new connections"),
    ("rss_idle", "MB", false, "memory of one proxy at rest"),
    ("rss_per_conn", "KB", false, "memory of one proxy per idle connection"),
];

/// Whose names do not stand for encryption between the hosts.
const PLAIN: [&str; 2] = ["plain", "haproxy-tcp"];

/// One figure of one peer, with all its rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Peer.
    pub peer: String,
    /// Bunter's engine.
    pub engine: Option<String>,
    /// Metric.
    pub metric: String,
    /// Unit.
    pub unit: String,
    /// One value for each round.
    pub values: Vec<f64>,
}

impl Series {
    fn title(&self) -> String {
        self.engine.as_ref().map_or_else(|| self.peer.clone(), |engine| format!("{} ({engine})", self.peer))
    }
}

/// Everything that was measured.
#[derive(Clone, Debug, Default)]
pub struct Report {
    series: Vec<Series>,
}

impl Report {
    /// Adds a value.
    pub fn add(&mut self, peer: &str, engine: Option<&str>, metric: &str, unit: &str, value: f64) {
        let known =
            |series: &&mut Series| series.peer == peer && series.engine.as_deref() == engine && series.metric == metric;
        match self.series.iter_mut().find(known) {
            Some(series) => series.values.push(value),
            None => self.series.push(Series {
                peer: peer.to_owned(),
                engine: engine.map(str::to_owned),
                metric: metric.to_owned(),
                unit: unit.to_owned(),
                values: vec![value],
            }),
        }
    }

    /// The rows of the one object.
    pub fn rows(&self) -> Vec<Value> {
        let row = |series: &Series| {
            json!({
                "peer": series.peer, "engine": series.engine, "metric": series.metric, "unit": series.unit,
                "value": round(median(&series.values)), "n": series.values.len(),
                "spread": round(spread(&series.values)),
            })
        };
        self.series.iter().filter(|series| median(&series.values).is_finite()).map(row).collect()
    }

    /// Peers in the order in which they came.
    pub fn peers(&self) -> Vec<String> {
        let mut peers = Vec::new();
        for series in &self.series {
            if !peers.contains(&series.title()) {
                peers.push(series.title());
            }
        }
        peers
    }

    /// The median of this metric of this peer.
    pub fn value(&self, title: &str, metric: &str) -> Option<f64> {
        let series = self.series.iter().find(|series| series.title() == title && series.metric == metric)?;
        Some(median(&series.values)).filter(|value| value.is_finite())
    }

    /// The main table: absolute, then in units of what `plain`, `ztunnel` and `ktls-own` did in this run, then who is best.
    pub fn table(&self) -> String {
        let mut text = self.grid("absolute", None);
        for base in ["plain", "ztunnel", "ktls-own"] {
            if self.peers().iter().any(|peer| peer == base) {
                text += &self.grid(&format!("ratio to {base}"), Some(base));
            }
        }
        text + &self.best()
    }

    fn grid(&self, title: &str, base: Option<&str>) -> String {
        let names: Vec<&str> = MAIN.iter().map(|(name, ..)| *name).collect();
        let mut text = format!("\n{title:24}");
        text += &names.iter().map(|name| format!("{name:>15}")).collect::<String>();
        if base.is_none() {
            let units: String = MAIN.iter().map(|(_, unit, ..)| format!("{unit:>15}")).collect();
            let _ = write!(text, "\n{:24}{units}", "");
        }
        text.push('\n');
        for peer in self.peers() {
            let _ = write!(text, "{peer:24}");
            for name in &names {
                let value = self.value(&peer, name);
                let cell = match (value, base.map(|base| self.value(base, name))) {
                    (Some(value), None) => number(value),
                    (Some(value), Some(Some(base))) if base != 0.0 => format!("{:.3}", value / base),
                    _ => "-".to_owned(),
                };
                let _ = write!(text, "{cell:>15}");
            }
            text.push('\n');
        }
        text
    }

    /// For each metric, the best of those that encrypt, and how Bunter's best stands to it.
    fn best(&self) -> String {
        let mut text = "\nbest of those that encrypt\n".to_owned();
        for (metric, unit, more, title) in MAIN {
            let mut all: Vec<(String, f64)> = self
                .peers()
                .into_iter()
                .filter(|peer| !PLAIN.contains(&peer.as_str()))
                .filter_map(|peer| self.value(&peer, metric).map(|value| (peer, value)))
                .collect();
            all.sort_by(|left, right| if more { right.1.total_cmp(&left.1) } else { left.1.total_cmp(&right.1) });
            let Some((peer, value)) = all.first() else { continue };
            let _ = write!(text, "  {metric:15} {peer}, {} {unit}", number(*value));
            match all.iter().find(|(peer, _)| peer.starts_with("bunter")) {
                Some((own, _)) if own == peer => {}
                Some((own, own_value)) => {
                    let _ = write!(text, "; {own} has {}, {:.2} of it", number(*own_value), own_value / value);
                }
                None => text.push_str("; bunter was not measured"),
            }
            let _ = writeln!(text, "   [{title}]");
        }
        text
    }

    /// All rows as lines, for a file.
    pub fn lines(&self) -> String {
        let line = |series: &Series| {
            format!(
                "{:24} {:22} {:>12} {:5} n={} spread={:.3}\n",
                series.title(),
                series.metric,
                number(median(&series.values)),
                series.unit,
                series.values.len(),
                spread(&series.values)
            )
        };
        self.series.iter().map(line).collect()
    }
}

/// Six digits are more than any measurement has.
fn round(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// For people: three or four digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        for value in [40.0, 44.0, 42.0] {
            report.add("plain", None, "throughput_1", "Gb/s", value);
        }
        report.add("ztunnel", None, "throughput_1", "Gb/s", 8.4);
        report.add("bunter", Some("user"), "throughput_1", "Gb/s", 4.2);
        report
    }

    #[test]
    fn rows_have_what_readers_of_the_object_expect() {
        let rows = report().rows();
        assert_eq!(rows.len(), 3);
        let wanted = json!({
            "peer": "plain", "engine": null, "metric": "throughput_1", "unit": "Gb/s",
            "value": 42.0, "n": 3, "spread": 0.095_238_1,
        });
        assert_eq!(rows[0], wanted);
        assert_eq!(rows[2]["engine"], "user");
    }

    #[test]
    fn ratios_are_to_the_same_run_and_a_better_peer_is_named() {
        let table = report().table();
        assert!(table.contains("ratio to plain") && table.contains("ratio to ztunnel"), "{table}");
        let ratios: Vec<&str> = table.lines().filter(|line| line.starts_with("bunter (user)")).collect();
        assert!(ratios[1].contains("0.100") && ratios[2].contains("0.500"), "{table}");
        assert!(table.contains("throughput_1    ztunnel, 8.40 Gb/s; bunter (user) has 4.20, 0.50 of it"), "{table}");
    }

    #[test]
    fn a_value_that_is_no_number_has_no_row() {
        let mut report = Report::default();
        report.add("plain", None, "conn_rate", "1/s", f64::NAN);
        assert!(report.rows().is_empty());
    }
}
