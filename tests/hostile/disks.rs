//! A full disk under the audit log.

use lab::janitor::{Item, Kept, keep};
use lab::policy::PORT;
use lab::{Lab, Policy, Settings, clock, lab, or_skip};
use rustix::mount::{MountFlags, mount};
use std::path::PathBuf;

/// A file system of 64 KiB.
fn small_disk(lab: &Lab) -> (PathBuf, Kept) {
    let path = lab.directory().join("small");
    std::fs::create_dir(&path).unwrap();
    let guard = keep(Item::Mount(path.clone()));
    mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(c"size=64k")).unwrap();
    (path, guard)
}

fn settings(path: &std::path::Path, when_full: &str) -> Settings {
    Settings {
        audit: Some(path.join("audit.jsonl")),
        audit_lines: format!("when_full = \"{when_full}\"\n"),
        ..Settings::default()
    }
}

/// Fills what is left.
fn fill(path: &std::path::Path) {
    let mut size = 64 * 1024;
    let mut number = 0;
    while size > 0 {
        match std::fs::write(path.join(format!("filler-{number}")), vec![0; size]) {
            Ok(()) => number += 1,
            Err(_) => {
                let _ = std::fs::remove_file(path.join(format!("filler-{number}")));
                size /= 2;
            }
        }
    }
}

fn free(path: &std::path::Path) {
    for entry in std::fs::read_dir(path).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("filler") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}

#[test]
fn with_a_full_disk_new_connections_are_refused_until_there_is_room() {
    let lab = lab!();
    let (disk, _mounted) = small_disk(&lab);
    let mesh = or_skip!(one_small_disk(&lab, &settings(&disk, "refuse")));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    mesh.0.expect_records(PORT, 1);
    fill(&disk);
    // The last page of the log may still have room for some lines.
    let mut tries = 0;
    let refused = clock::until(clock::seconds(60), || {
        tries += 1;
        let said = lab.echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        said.last().is_some_and(|last| last["ok"] == false).then_some(())
    });
    assert!(refused.is_some(), "{tries} connections were allowed with a full disk: {:#}", mesh.0.status());
    let status = mesh.0.status();
    assert_eq!(status["audit"]["failing"], true, "{status:#}");
    assert!(status["audit"]["last_error"].is_string(), "{status:#}");
    free(&disk);
    let works = clock::until(clock::seconds(30), || {
        let said = lab.echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
        said.last().is_some_and(|last| last["ok"] == true).then_some(())
    });
    assert!(works.is_some(), "there is room again, but: {:#}", mesh.0.status());
    assert_eq!(mesh.0.status()["audit"]["failing"], false);
    // Every line is whole: `audit` parses each of them.
    assert!(!mesh.0.audit().is_empty());
    lab.expect_tls(PORT);
}

#[test]
fn with_a_full_disk_connections_go_on_where_the_operator_wants_that() {
    let lab = lab!();
    let (disk, _mounted) = small_disk(&lab);
    let mesh = or_skip!(one_small_disk(&lab, &settings(&disk, "continue")));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    fill(&disk);
    for _ in 0..40 {
        lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    }
    let status = mesh.0.status();
    assert_eq!(status["audit"]["failing"], true, "{status:#}");
    free(&disk);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    let well = clock::until(clock::seconds(20), || (mesh.0.status()["audit"]["failing"] == false).then_some(()));
    assert!(well.is_some(), "{:#}", mesh.0.status());
    lab.expect_tls(PORT);
}

/// Agents on both hosts, alpha's with its audit log on the small disk.
fn one_small_disk<'a>(lab: &'a Lab, settings: &Settings) -> Result<(lab::Agent<'a>, lab::Agent<'a>), lab::Skip> {
    if lab::skip::plain() {
        return Err(lab::Skip::because("LAB_PLAIN=1 leaves the agent out, and this test is about the agent"));
    }
    let policy = Policy::standard(lab);
    let alpha = lab::Agent::prepare(lab, &lab.alpha, &policy, settings)?;
    let beta = lab::Agent::prepare(lab, &lab.beta, &policy, &Settings::default())?;
    alpha.start().unwrap();
    beta.start().unwrap();
    Ok((alpha, beta))
}
