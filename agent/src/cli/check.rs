//! `bunter check` and `bunter policy test`: do configuration and policy say what was meant?

use super::Wrong;
use bunter::config::Config;
use bunter::document::Purpose;
use bunter::policy::Policy;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Checks configuration, policy and authority as the agent would at start, and prints what would be in force.
pub fn run(path: &Path) -> anyhow::Result<ExitCode> {
    let config = Config::load(path).map_err(|error| Wrong(error.to_string()))?;
    let policy = Policy::load(&config.policy_dir, Purpose::InForce).map_err(|error| Wrong(error.to_string()))?;
    bunter::daemon::check_identity(&config, &policy).map_err(|error| Wrong(error.to_string()))?;
    print!("{}", config.print());
    println!("\n{}", policy.decision_table());
    warn(&policy);
    for line in bunter::daemon::second_authorities(&config, &policy) {
        eprintln!("warning: {line}");
    }
    expectations(&policy)?;
    println!("{}: configuration, authority and policy are sound", path.display());
    Ok(ExitCode::SUCCESS)
}

/// Checks policy directories and runs their `[[expect]]` cases.
pub fn test_policies(directories: &[PathBuf]) -> anyhow::Result<ExitCode> {
    let mut failed = Vec::new();
    for directory in directories {
        match Policy::load(directory, Purpose::Inspection) {
            Ok(policy) => {
                println!("{}", directory.display());
                println!("{}", policy.decision_table());
                warn(&policy);
                if let Err(wrong) = expectations(&policy) {
                    failed.push(wrong.to_string());
                }
            }
            Err(rejected) => failed.push(rejected.to_string()),
        }
    }
    if failed.is_empty() { Ok(ExitCode::SUCCESS) } else { Err(Wrong(failed.join("\n")).into()) }
}

fn warn(policy: &Policy) {
    for warning in &policy.warnings().0 {
        eprintln!("warning: {warning}");
    }
}

fn expectations(policy: &Policy) -> anyhow::Result<()> {
    let results = policy.run_expectations();
    let wrong: Vec<String> = results
        .iter()
        .filter(|result| !result.passed)
        .map(|result| {
            format!(
                "{}: {}: expected {}, but the policy says {}",
                result.place, result.case, result.expected, result.got
            )
        })
        .collect();
    println!("{} of {} expectations hold", results.len() - wrong.len(), results.len());
    if wrong.is_empty() { Ok(()) } else { Err(Wrong(wrong.join("\n")).into()) }
}
