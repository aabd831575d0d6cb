//! The policies that the documentation shows: each is read without a problem, and all its cases hold.

use bunter::policy::{Accounts, Policy, Source};
use std::path::{Path, PathBuf};

fn policies() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies")
}

fn all_cases_hold(policy: &Policy) {
    let results = policy.run_expectations();
    assert!(!results.is_empty(), "no [[expect]] case");
    let failed: Vec<_> = results.iter().filter(|result| !result.passed).map(ToString::to_string).collect();
    assert!(failed.is_empty(), "{}\n{}", failed.join("\n"), policy.decision_table());
}

#[test]
fn every_example_is_read_without_a_warning_and_its_cases_hold() {
    let mut count = 0;
    for entry in std::fs::read_dir(policies().join("examples")).unwrap() {
        let directory = entry.unwrap().path();
        let policy =
            Policy::load(&directory, bunter::document::Purpose::Inspection).unwrap_or_else(|error| panic!("{error}"));
        assert!(policy.warnings().is_empty(), "{}", policy.warnings());
        all_cases_hold(&policy);
        count += 1;
    }
    assert!(count >= 5, "{count} examples");
}

#[test]
fn the_default_denies() {
    let path = policies().join("default-deny.toml");
    let source = Source { file: "default-deny.toml".into(), text: std::fs::read_to_string(path).unwrap() };
    let policy = Policy::parse("policies", &[source], &Accounts::default()).unwrap_or_else(|error| panic!("{error}"));
    all_cases_hold(&policy);
    assert!(policy.workloads().is_empty() && policy.kernel().destinations.is_empty());
}

/// The statements that the description of the language shows make one policy, cases included.
#[test]
fn the_description_of_the_language_is_itself_a_policy() {
    let text = std::fs::read_to_string(policies().join("README.md")).unwrap();
    let toml: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter(|line| !line.starts_with("policies/"))
        .collect();
    let source = Source { file: "README.md".into(), text: toml.join("\n") };
    let policy = Policy::parse("policies", &[source], &Accounts::default()).unwrap_or_else(|error| panic!("{error}"));
    all_cases_hold(&policy);
}
