//! `wimsey agent` and `wimsey release`.

use super::Wrong;
use std::path::Path;
use std::process::ExitCode;
use wimsey::config::Config;
use wimsey::{daemon, intercept};

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
        println!("nothing to release: no kernel programs of Wimsey in this network namespace");
    }
    super::run::sweep_all();
    Ok(ExitCode::SUCCESS)
}

/// Log lines go to standard error; RUST_LOG chooses which.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
