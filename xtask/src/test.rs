//! The verb `test`: three tiers, each with a counted list of what ran and what could not.
//!
//! pure needs nothing but the toolchain. namespaces runs the lab on this host's kernel, as root. vm runs the same lab in
//! a guest for each supported Debian kernel, with engine `kernel`.
//!
//! *Invariant:* the last line is the sum of all tiers, and a tier that could not run at all is in it as skipped.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::build::{self, Lab};
use crate::count::{Count, Reader};
use crate::guests::{self, Programs};
use crate::run::{Fallible, merged, root, seconds, step, work};
use crate::setup::{self, Need};

/// Runs the named tiers, or all.
pub fn verb(tiers: &[String], filter: &[String]) -> Fallible {
    let known = ["pure", "namespaces", "vm"];
    let kernels: Vec<String> = tiers.iter().filter_map(|tier| Some(tier.strip_prefix("vm=")?.to_owned())).collect();
    if let Some(wrong) = tiers.iter().find(|tier| !known.contains(&tier.as_str()) && !tier.starts_with("vm=")) {
        return Err(format!("no tier {wrong}; there are {}, and vm=KERNEL for one kernel", known.join(", ")).into());
    }
    let started = Instant::now();
    let wanted = |tier: &str| {
        tiers.is_empty() || tiers.iter().any(|name| name == tier || (tier == "vm" && name.starts_with("vm=")))
    };
    let mut report = Report::default();
    setup::ensure(&[Need::Toolchain])?;
    if wanted("pure") {
        report.tier("pure", || pure(filter));
    }
    if wanted("namespaces") || wanted("vm") {
        // Without its programs the lab says which test needs which; without the linker there is no agent to test.
        if let Err(failure) = setup::ensure(&[Need::Lab]) {
            println!("  {failure}");
        }
        match setup::ensure(&[Need::Build]) {
            Ok(()) => {
                let guests = wanted("vm").then_some(kernels.as_slice());
                // Who asks for guests gets guests.
                let again = !tiers.is_empty() || !filter.is_empty();
                privileged(&mut report, wanted("namespaces"), guests, again, filter)
            }
            Err(failure) => {
                println!("  {failure}");
                for tier in ["namespaces", "vm"].into_iter().filter(|tier| wanted(tier)) {
                    let reason = "the set-up is not complete, see above".to_owned();
                    report.add(
                        tier,
                        Count { skipped: vec![(tier.into(), reason)], ..Count::default() },
                        Duration::ZERO,
                    );
                }
            }
        }
    }
    report.end(started.elapsed())
}

/// The tiers that need an agent with its kernel programs.
fn privileged(report: &mut Report, here: bool, guests: Option<&[String]>, again: bool, filter: &[String]) {
    let built = build::agent().and_then(|built| {
        let (lab, own) = (build::lab()?, build::agent_tests()?);
        Ok(Programs { bunter: built.bunter, lab, own, filter: filter.to_vec() })
    });
    let programs = match built {
        Ok(programs) => programs,
        Err(failure) => return report.tier("build", || Err(failure)),
    };
    if here {
        report.tier("namespaces", || namespaces(&programs.lab, filter));
    }
    if let Some(kernels) = guests {
        for (name, count, took) in guests::run(kernels, &programs, again) {
            report.outcome(&name, count, took);
        }
    }
}

#[derive(Default)]
struct Report {
    sum: Count,
    tiers: Vec<String>,
}

impl Report {
    fn tier(&mut self, name: &str, run: impl FnOnce() -> Fallible<Count>) {
        let started = Instant::now();
        let count = run();
        self.outcome(name, count, started.elapsed());
    }

    fn outcome(&mut self, name: &str, count: Fallible<Count>, took: Duration) {
        let count = count.unwrap_or_else(|failure| {
            println!("  {failure}");
            let first = failure.to_string().lines().next().unwrap_or_default().to_owned();
            Count { failed: vec![format!("{name}: {first}")], ..Count::default() }
        });
        self.add(name, count, took);
    }

    fn add(&mut self, name: &str, count: Count, took: Duration) {
        let text = format!("tier {name:<22} {} ({})\n{}", count.line(), seconds(took), count.details());
        print!("{text}");
        self.tiers.push(text);
        self.sum.add(count);
    }

    fn end(self, took: Duration) -> Fallible {
        println!("\n{}({})", self.tiers.concat(), seconds(took));
        println!("{}", self.sum.line());
        if self.sum.failed.is_empty() { Ok(()) } else { std::process::exit(1) }
    }
}

fn pure(filter: &[String]) -> Fallible<Count> {
    let mut count = Count::default();
    let own = work("own").to_string_lossy().into_owned();
    let xtask = root().join("xtask/Cargo.toml").to_string_lossy().into_owned();
    let mut targets = vec!["test", "--no-fail-fast", "-p", "bunter", "-p", "bunter-identity", "-p", "bunter-sys"];
    targets.extend(["-p", "bunter-common", "--lib", "--bins"]);
    let integration = integration_tests();
    targets.extend(integration.iter().flat_map(|name| ["--test", name]));
    let sets: [(&str, Vec<&str>); 3] = [
        ("tests of bunter", targets),
        (
            "examples in the documentation",
            vec!["test", "--no-fail-fast", "-p", "bunter", "-p", "bunter-identity", "-p", "bunter-sys", "--doc"],
        ),
        ("tests of xtask", vec!["test", "--no-fail-fast", "--manifest-path", &xtask, "--target-dir", &own]),
    ];
    for (label, mut args) in sets {
        args.extend(["--", "--show-output"]);
        args.extend(filter.iter().map(String::as_str));
        count.add(libtest(label, setup::cargo(&args))?);
    }
    Ok(count)
}

/// The agent's integration tests that need no privilege: `agent/tests/NAME.rs` and `agent/tests/NAME/`.
fn integration_tests() -> Vec<String> {
    let listed = std::fs::read_dir(root().join("agent/tests")).into_iter().flatten().flatten();
    let names = listed.map(|entry| entry.file_name().to_string_lossy().trim_end_matches(".rs").to_owned());
    let mut names: Vec<String> = names.filter(|name| !build::PRIVILEGED.contains(&name.as_str())).collect();
    names.retain(|name| {
        let base = root().join("agent/tests").join(name);
        base.with_extension("rs").is_file() || base.join("main.rs").is_file()
    });
    names.sort();
    names
}

fn namespaces(lab: &Lab, filter: &[String]) -> Fallible<Count> {
    let mut count = Count::default();
    let mut args = vec!["test", "--no-fail-fast", "-p", "bunter"];
    args.extend(build::PRIVILEGED.iter().flat_map(|name| ["--test", name]));
    args.extend(["--", "--show-output"]);
    args.extend(filter.iter().map(String::as_str));
    count.add(libtest("kernel programs on this host", setup::cargo(&args))?);
    for (name, program) in &lab.tests {
        let mut command = merged(program);
        command.arg("--show-output").args(filter).current_dir(root().join("tests"));
        setup::pin(&mut command);
        count.add(libtest(&format!("lab {name}"), command)?);
    }
    Ok(count)
}

/// Runs a command that prints what libtest prints.
fn libtest(label: &str, command: Command) -> Fallible<Count> {
    let mut reader = Reader::default();
    reader.line(&format!("Running {label}"));
    let ended = step(label).each_line(|line| {
        reader.line(line);
        true
    });
    let ended = ended.watch(command)?;
    let mut count = reader.end();
    if !ended.success() && count.failed.is_empty() {
        // It did not compile, or it ended before its first test.
        count.failed.push(format!("{label}: {}", ended.how()));
    }
    if !count.failed.is_empty() {
        println!("{}\n  whole log: {}", crate::run::tail(&ended.log, 60), ended.log.display());
    }
    Ok(count)
}
