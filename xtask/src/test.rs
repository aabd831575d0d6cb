//! The verb `test`: three tiers, each with a counted list of what ran and what could not.
//!
//! pure needs nothing but the toolchain. namespaces runs the lab on this host's kernel, as root. vm runs the same lab in
//! a guest for each supported Debian kernel, with engine `kernel`.
//!
//! *Invariant:* the last line is the sum of all tiers, and a tier that could not run at all is in it as skipped.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::build::{self, Lab};
use crate::count::{Count, Reader};
use crate::run::{Fallible, merged, root, seconds, step, work};
use crate::setup::{self, Need};
use crate::vm::{self, Job, Kernel};

/// How much slower a guest is than the host: one emulated instruction costs about ten real ones, and guests share the
/// processors.
const GUEST_SLOWNESS: u32 = 12;
/// The longest that the tests of a guest may take. On two idle cores the three kernels take half of it, side by side.
const GUEST_LIMIT: Duration = Duration::from_secs(50 * 60);
/// The longest that a guest may say nothing. A test may be long, so this is longer than any.
const GUEST_SILENCE: Duration = Duration::from_secs(5 * 60);

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
                privileged(&mut report, wanted("namespaces"), guests, filter)
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
fn privileged(report: &mut Report, here: bool, guests: Option<&[String]>, filter: &[String]) {
    let built = build::agent().and_then(|built| {
        let (lab, own) = (build::lab()?, build::agent_tests()?);
        Ok(Programs { wimsey: built.wimsey, lab, own, filter: filter.to_vec() })
    });
    let programs = match built {
        Ok(programs) => programs,
        Err(failure) => return report.tier("build", || Err(failure)),
    };
    if here {
        report.tier("namespaces", || namespaces(&programs.lab, filter));
    }
    if let Some(kernels) = guests {
        in_guests(report, kernels, &programs);
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
    let mut targets = vec!["test", "--no-fail-fast", "-p", "wimsey", "-p", "wimsey-common", "--lib", "--bins"];
    let integration = integration_tests();
    targets.extend(integration.iter().flat_map(|name| ["--test", name]));
    let sets: [(&str, Vec<&str>); 3] = [
        ("tests of wimsey", targets),
        ("examples in the documentation", vec!["test", "--no-fail-fast", "-p", "wimsey", "--doc"]),
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
    let mut args = vec!["test", "--no-fail-fast", "-p", "wimsey"];
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

/// What the guests run.
struct Programs {
    wimsey: PathBuf,
    lab: Lab,
    own: Vec<(String, PathBuf)>,
    filter: Vec<String>,
}

/// What a guest runs of these test programs; of all others it runs everything. An emulated processor takes ten times as
/// long, so what no kernel changes is left to the other tiers, and rooms of the lab that are not here run in guests where
/// a person names them, and are counted as skipped where nobody does.
const IN_GUESTS: &[(&str, &[&str])] = &[
    ("wimsey", &["offload::", "relay::", "privilege::"]),
    ("hostile", &["servers::", "locals::"]),
    ("host", &["the_oracle"]),
];

/// The rooms of the lab that guests run by name only.
const BY_NAME: &[&str] = &["hostile clients::", "hostile inputs::", "hostile disks::"];

fn in_guests(report: &mut Report, words: &[String], programs: &Programs) {
    let kernels = match vm::kernels(words) {
        Ok(kernels) => kernels,
        Err(failure) => {
            let reason = failure.to_string().lines().next().unwrap_or("no kernels").to_owned();
            println!("  {failure}");
            let wanted: Vec<&str> =
                if words.is_empty() { vm::DEFAULT.to_vec() } else { words.iter().map(String::as_str).collect() };
            for kernel in wanted {
                report.add(&format!("vm {kernel}"), all_skipped(programs, kernel, &reason), Duration::ZERO);
            }
            return;
        }
    };
    let job = match job(programs) {
        Ok(job) => job,
        Err(failure) => return report.tier("vm", || Err(failure)),
    };
    // What a guest cannot use of two processors, another one can.
    let (next, ended) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..vm::at_once().min(kernels.len()) {
            scope.spawn(|| {
                while let Some((number, kernel)) = take(&next, &kernels) {
                    let began = Instant::now();
                    let count = guest(kernel, &job);
                    let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
                    ended.insert(number, (count, began.elapsed()));
                }
            });
        }
    });
    let ended = ended.into_inner().unwrap_or_else(PoisonError::into_inner);
    for (number, (count, took)) in ended {
        let name = kernels.get(number).map_or("?", |kernel| &kernel.release);
        report.outcome(&format!("vm {name}"), count, took);
    }
}

fn take<'a, T>(next: &AtomicUsize, all: &'a [T]) -> Option<(usize, &'a T)> {
    let number = next.fetch_add(1, Ordering::Relaxed);
    Some((number, all.get(number)?))
}

fn guest(kernel: &Kernel, job: &Job) -> Fallible<Count> {
    let mut reader = Reader::default();
    let verdict = vm::boot(kernel, job, |line| reader.line(line))?;
    let mut count = reader.end();
    // The kernels of this tier all have what engine `kernel` needs. Where it was not used, something is broken.
    let unused = |(_, reason): &(String, String)| reason.contains("engine") || reason.contains("TLS");
    let (engine, others) = count.skipped.into_iter().partition(unused);
    count.skipped = others;
    let failed = |(name, reason): (String, String)| format!("{name}: skipped ({reason})");
    count.failed.extend(engine.into_iter().map(failed));
    if let Some(trouble) = &verdict.trouble {
        count.failed.push(format!("the guest itself: {trouble}"));
    } else if !verdict.success() && count.failed.is_empty() {
        count.failed.push(format!("the guest itself: {}", verdict.line()));
    }
    if !count.failed.is_empty() {
        println!("{}\n  whole console: {}", crate::run::tail(&verdict.log, 60), verdict.log.display());
    }
    let names = count.skipped.iter_mut().map(|(name, _)| name).chain(&mut count.failed);
    names.for_each(|name| *name = format!("{name} on {}", kernel.series()));
    Ok(count)
}

/// The lab, the kernel programs' tests and the engine's, one program after the other.
fn job(programs: &Programs) -> Fallible<Job> {
    let quote = |word: &String| format!(" '{}'", word.replace('\'', "'\\''"));
    let filter: String = programs.filter.iter().map(quote).collect();
    let mut script = format!(
        "export WIMSEY_ENGINE=kernel WIMSEY_TEST_ENGINE=kernel WIMSEY_BIN=/usr/local/bin/wimsey LAB_APP=/lab/lab-app\n\
         export LAB_SLOW={GUEST_SLOWNESS} RUST_BACKTRACE=0\ncd /tmp\nwimsey doctor\ncode=0\n"
    );
    let mut job = Job::new("lab", "");
    job.programs.push((build::stripped(&programs.wimsey)?, "/usr/local/bin/wimsey".to_owned()));
    for (name, program) in &programs.lab.programs {
        job.programs.push((build::stripped(program)?, format!("/lab/{name}")));
    }
    let own = programs.own.iter().map(|program| (program, true));
    for ((name, program), own) in own.chain(programs.lab.tests.iter().map(|program| (program, false))) {
        job.programs.push((build::stripped(program)?, format!("/lab/test-{name}")));
        // libtest takes several words as "any of them", so a person's words replace the choice.
        let choice = IN_GUESTS.iter().find(|(program, _)| program == name).filter(|_| filter.is_empty());
        if choice.is_some_and(|(_, words)| words.is_empty()) {
            continue;
        }
        let words = choice.map_or_else(|| filter.clone(), |(_, words)| format!(" {}", words.join(" ")));
        // The lab says past the harness that it skips. What else it says must be seen even when the guest is ended.
        let output = if own { "--show-output" } else { "--nocapture" };
        script.push_str(&format!("echo 'Running {name}'\n/lab/test-{name} {output}{words} || code=1\n"));
    }
    if filter.is_empty() {
        for room in BY_NAME {
            script.push_str(&format!("echo 'SKIPPED (emulated: by name only, cargo xtask test vm -- WORD): {room}'\n"));
        }
    }
    script.push_str("exit $code");
    job.script = script;
    job.limit = GUEST_LIMIT;
    job.silence = GUEST_SILENCE;
    Ok(job)
}

/// Every test of the lab, as skipped for one reason.
fn all_skipped(programs: &Programs, suite: &str, reason: &str) -> Count {
    let mut count = Count::default();
    for (_, program) in &programs.lab.tests {
        let listed = Command::new(program).arg("--list").args(&programs.filter).output();
        let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        for name in listed.lines().filter_map(|line| line.strip_suffix(": test")) {
            count.skipped.push((format!("{name} on {suite}"), reason.to_owned()));
        }
    }
    if count.skipped.is_empty() {
        count.skipped.push((format!("the lab on {suite}"), reason.to_owned()));
    }
    count
}
