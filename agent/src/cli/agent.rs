//! `bunter agent` and `bunter release`.

use super::Wrong;
use bunter::config::Config;
use bunter::{daemon, intercept};
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use tracing_subscriber::filter::{LevelFilter, ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Runs the agent until it is told to stop.
pub fn run(config: &Path) -> anyhow::Result<ExitCode> {
    log();
    let config = Config::load(config).map_err(|error| Wrong(error.to_string()))?;
    match daemon::run(config) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(daemon::Error::Policy(rejected)) => Err(Wrong(rejected.to_string()).into()),
        Err(error) => Err(error.into()),
    }
}

/// Takes the kernel programs of this network namespace away.
pub fn release(config: &Path) -> anyhow::Result<ExitCode> {
    let config = Config::load(config).map_err(|error| Wrong(error.to_string()))?;
    if intercept::release(&config.run_dir)? {
        println!("released: this network namespace is left alone, and its workloads speak plaintext");
    } else {
        println!("nothing to release: no kernel programs of Bunter in this network namespace");
    }
    super::run::sweep_all();
    Ok(ExitCode::SUCCESS)
}

/// Log lines go to standard error; RUST_LOG chooses which.
fn log() {
    let wanted = std::env::var("RUST_LOG").unwrap_or_default();
    let (filter, misunderstood) = filter(&wanted);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
    if let Some(error) = misunderstood {
        tracing::warn!(RUST_LOG = wanted, %error, "RUST_LOG cannot be understood: it is taken for info");
    }
}

/// Levels and `target=level` pairs, separated by commas. `info` where there are none, or where one cannot be understood.
fn filter(wanted: &str) -> (Targets, Option<ParseError>) {
    let info = Targets::new().with_default(LevelFilter::INFO);
    let directives: Vec<&str> = wanted.split(',').map(str::trim).filter(|directive| !directive.is_empty()).collect();
    if directives.is_empty() {
        return (info, None);
    }
    match directives.join(",").parse() {
        Ok(filter) => (filter, None),
        Err(error) => (info, Some(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn rust_log_chooses_which_lines_are_written() {
        for wanted in ["", " ", ",", "info", "bunter=loud", "bunter=debug=info"] {
            let (filter, misunderstood) = filter(wanted);
            assert!(filter.would_enable("bunter::daemon", &Level::INFO), "{wanted:?}");
            assert!(!filter.would_enable("bunter::daemon", &Level::DEBUG), "{wanted:?}");
            assert_eq!(misunderstood.is_some(), wanted.contains('='), "{wanted:?}");
        }
        let (filter, misunderstood) = filter("warn, bunter::intercept=debug,");
        assert!(misunderstood.is_none());
        assert!(filter.would_enable("bunter::intercept::control", &Level::DEBUG));
        assert!(!filter.would_enable("bunter::daemon", &Level::INFO));
        assert!(filter.would_enable("bunter::daemon", &Level::WARN));
    }
}
