//! The tier `vm`: the lab, the kernel programs' tests and the engine's, in a guest for each kernel, side by side.
//!
//! A kernel on which these very programs passed is not asked again by a plain `cargo xtask test`: a guest takes many minutes,
//! and the same bytes on the same kernel have nothing new to say. It is counted as skipped, with the date; `cargo xtask
//! test vm` asks again.
//!
//! *Invariant:* only a guest without any failure is remembered, and only for exactly the programs that it ran.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::build::{self, Lab};
use crate::count::{Count, Reader};
use crate::run::{Fallible, quiet, work};
use crate::vm::{self, Job, Kernel};

/// How much slower a guest is than the host: one emulated instruction costs about ten real ones, and guests share the
/// processors.
const GUEST_SLOWNESS: u32 = 12;
/// Bytes of a bulk transfer, before they are divided by the slowness.
const GUEST_BULK: u32 = 256 << 20;
/// The longest that the tests of a guest may take. On two idle cores the three kernels take two thirds of it, side by side.
const GUEST_LIMIT: Duration = Duration::from_secs(60 * 60);
/// The longest that a guest may say nothing. A test may be long, so this is longer than any.
const GUEST_SILENCE: Duration = Duration::from_secs(8 * 60);
/// Lines of a guest's console that are shown from where a test failed.
const PANIC_LINES: usize = 30;

/// What the guests run.
pub struct Programs {
    /// The agent.
    pub bunter: PathBuf,
    /// The lab.
    pub lab: Lab,
    /// The agent's own tests.
    pub own: Vec<(String, PathBuf)>,
    /// A person's choice of tests.
    pub filter: Vec<String>,
}

/// What a guest runs of these test programs; of all others it runs everything. An emulated processor takes ten times as
/// long, so what no kernel changes is left to the other tiers, and rooms of the lab that are not here run in guests where
/// a person names them, and are counted as skipped where nobody does.
const IN_GUESTS: &[(&str, &[&str])] = &[
    ("bunter", &["offload::", "relay::", "privilege::"]),
    ("hostile", &["locals::", "in_the_middle_is", "tampered", "half_a_record", "without_close_notify"]),
    ("host", &["the_oracle"]),
    // What each kernel decides in a way of its own: hooks, order of its tables, protocols, what can be kept with a socket.
    (
        "adversary",
        &[
            "bound_to_the_link",
            "of_a_dead_agent",
            "chosen_after_connect",
            "connected_before_the_agent",
            "disconnected_and_gave_away",
            "in_another_namespace",
            "sctp_of",
            "dccp_of",
            "icmp_of",
            "from_the_same_address_later",
            "who_binds_as_root",
            "manager_listens_on",
            "left_with_it_listens_again",
            "a_listener_that_was_shut_down",
            "a_multipath_listener",
            "listener_that_comes_and_goes",
            "who_joins_a_port_by_reuseport",
            "somebody_shares_a_port",
            "port_that_another_has_on_another_device",
            "in_a_new_cgroup_without_an_agent",
            "no_note_can_be_made",
            "ipv6_only_opens_nothing_for_ipv4",
            "upstream_connection_reaches_only",
            "no_program_of_socket_calls",
        ],
    ),
];

/// What a guest does not run of these test programs: it is about policy, files, words and clocks of the agent, which no kernel
/// changes.
const NOT_IN_GUESTS: &[(&str, &[&str])] = &[(
    "flows",
    &[
        "what_bunter_ca",
        "a_friendly_trust_domain",
        "a_broken_policy",
        "svids_are_renewed",
        "an_authority_is_replaced",
        "release_says",
        "the_exit_code",
        "outlast_the_drain",
        "insists_on_its_own_protocols",
        "sessions_can_be_left_out",
        "sessions_that_nobody_uses",
        "an_idle_connection_is_closed",
        "no_longer_allows",
        "than_the_limit_is_refused",
        "a_client_without_a_rule",
        "rules_for_ports_and_patterns",
        "a_change_of_policy",
        "two_workloads_never_share",
        "by_idle_time_and_by_number",
        "that_is_refused_is_tried_again",
        "a_reload_changes_new_connections",
        "say_what_is_going_on",
        "redis_cli",
        "a_server_that_speaks_first",
        "curl_with_an_svid",
        "identities_come_from_users",
        "are_drained_where_policy",
        "needs_no_svid",
    ],
)];

/// The rooms of the lab that guests run by name only, or of which they run a part.
const BY_NAME: &[&str] = &[
    "hostile clients::",
    "hostile servers::",
    "hostile inputs::",
    "hostile disks::",
    "adversary floods::",
    "the rest of adversary and flows",
];

/// What became of the tests on a kernel: name of the tier, count, time.
type Outcome = (String, Fallible<Count>, Duration);

/// Runs the programs on each kernel that the words name, or on the default ones. `again`: also where they passed before.
pub fn run(words: &[String], programs: &Programs, again: bool) -> Vec<Outcome> {
    let kernels = match vm::kernels(words) {
        Ok(kernels) => kernels,
        Err(failure) => {
            let reason = failure.to_string().lines().next().unwrap_or("no kernels").to_owned();
            println!("  {failure}");
            let wanted: Vec<&str> =
                if words.is_empty() { vm::DEFAULT.to_vec() } else { words.iter().map(String::as_str).collect() };
            let skipped = |kernel: &str| Ok(all_skipped(programs, kernel, &reason));
            return wanted.iter().map(|kernel| (format!("vm {kernel}"), skipped(kernel), Duration::ZERO)).collect();
        }
    };
    let job = match job(programs) {
        Ok(job) => job,
        Err(failure) => return vec![("vm".into(), Err(failure), Duration::ZERO)],
    };
    // What a guest cannot use of two processors, another one can.
    let (next, ended) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..vm::at_once().min(kernels.len()) {
            scope.spawn(|| {
                while let Some((number, kernel)) = take(&next, &kernels) {
                    let began = Instant::now();
                    let memory = Memory::of(kernel, &job, programs.filter.is_empty());
                    let count = match memory.as_ref().filter(|_| !again).and_then(Memory::recall) {
                        Some(skipped) => Ok(skipped),
                        None => guest(kernel, &job).inspect(|count| memory.iter().for_each(|it| it.keep(count))),
                    };
                    let outcome = (format!("vm {}", kernel.release), count, began.elapsed());
                    ended.lock().unwrap_or_else(PoisonError::into_inner).insert(number, outcome);
                }
            });
        }
    });
    ended.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

/// What passed on a kernel the last time.
struct Memory {
    file: PathBuf,
    series: String,
    /// Checksums of all that a guest is made from, and its script.
    key: String,
}

impl Memory {
    /// None where it cannot be said what the guest is made from, and where a person chose the tests.
    fn of(kernel: &Kernel, job: &Job, whole: bool) -> Option<Self> {
        let files = job.programs.iter().map(|(from, _)| from.to_string_lossy().into_owned()).chain(vm::parts(kernel));
        let files: Vec<String> = files.collect();
        let arguments: Vec<&str> = std::iter::once("--").chain(files.iter().map(String::as_str)).collect();
        let sums = quiet("sha256sum", &arguments).filter(|_| whole)?;
        let (file, series) = (work("guests").join(&kernel.release), kernel.series());
        Some(Self { file, series, key: format!("{sums}{}", job.script) })
    }

    fn recall(&self) -> Option<Count> {
        let kept = fs::read_to_string(&self.file).ok()?;
        let (number, key) = kept.split_once('\n')?;
        let at = quiet("date", &["-r", &self.file.to_string_lossy(), "+%F %R"]).filter(|_| key == self.key)?;
        let reason = format!("these very programs passed at {}; cargo xtask test vm asks again", at.trim());
        Some(Count { skipped: vec![(format!("{number} tests on {}", self.series), reason)], ..Count::default() })
    }

    fn keep(&self, count: &Count) {
        let _ = fs::remove_file(&self.file);
        if count.failed.is_empty() {
            // Without it the guest runs again.
            let _ = fs::write(&self.file, format!("{}\n{}", count.passed, self.key));
        }
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
        let (panics, end) = (panics(&verdict.log), crate::run::tail(&verdict.log, 20));
        println!("{panics}    ...\n{end}\n  whole console: {}", verdict.log.display());
    }
    let names = count.skipped.iter_mut().map(|(name, _)| name).chain(&mut count.failed);
    names.for_each(|name| *name = format!("{name} on {}", kernel.series()));
    Ok(count)
}

/// What the tests of a guest said when they failed, indented: each message with the lines after it.
fn panics(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let (mut shown, mut left) = (String::new(), 0);
    for line in text.lines() {
        left = if line.contains("panicked at") { PANIC_LINES } else { left };
        if left > 0 {
            shown.push_str(&format!("    {line}\n"));
            left -= 1;
        }
    }
    shown
}

/// The lab, the kernel programs' tests and the engine's, one program after the other.
fn job(programs: &Programs) -> Fallible<Job> {
    let quote = |word: &String| format!(" '{}'", word.replace('\'', "'\\''"));
    let filter: String = programs.filter.iter().map(quote).collect();
    let mut script = format!(
        "export BUNTER_ENGINE=kernel BUNTER_TEST_ENGINE=kernel BUNTER_BIN=/usr/local/bin/bunter LAB_APP=/lab/lab-app\n\
         export LAB_SLOW={GUEST_SLOWNESS} LAB_BULK={GUEST_BULK} RUST_BACKTRACE=0\ncd /tmp\nbunter doctor\ncode=0\n\
         # Debian loads the latter for nobody who merely opens a socket.\n\
         for module in sctp dccp_ipv4 dccp_ipv6; do modprobe -q $module; done\n"
    );
    let mut job = Job::new("lab", "");
    job.programs.push((build::stripped(&programs.bunter)?, "/usr/local/bin/bunter".to_owned()));
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
        let mut words = choice.map_or_else(|| filter.clone(), |(_, words)| format!(" {}", words.join(" ")));
        let left_out = NOT_IN_GUESTS.iter().filter(|(program, _)| program == name && filter.is_empty());
        left_out.flat_map(|(_, left_out)| *left_out).for_each(|word| words.push_str(&format!(" --skip {word}")));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_for_guests_is_the_name_of_a_test() {
        let of_a_test = |words: &&(&str, &[&str])| words.0 != "bunter";
        for (program, words) in IN_GUESTS.iter().filter(of_a_test).chain(NOT_IN_GUESTS) {
            let folder = crate::run::root().join("tests").join(program);
            let files = fs::read_dir(&folder).map(|files| files.map(|file| file.unwrap().path()).collect());
            let files: Vec<PathBuf> = files.unwrap_or_else(|_| vec![folder.with_extension("rs")]);
            let text: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
            for word in words.iter().filter(|word| !word.ends_with("::")) {
                let named = text.lines().any(|line| line.starts_with("fn ") && line.contains(word));
                assert!(named, "no test of {program} has {word} in its name");
            }
        }
    }

    #[test]
    fn only_a_guest_without_failures_is_remembered_and_only_for_the_same_programs() {
        let file = std::env::temp_dir().join(format!("bunter-guests-{}", std::process::id()));
        let memory = |key: &str| Memory { file: file.clone(), series: "6.1".into(), key: key.into() };
        let passed = Count { passed: 7, ..Count::default() };
        let failed = Count { failed: vec!["x on 6.1".into()], ..passed.clone() };
        assert!(memory("a\nb").recall().is_none());
        memory("a\nb").keep(&passed);
        let recalled = memory("a\nb").recall().unwrap();
        assert_eq!((recalled.passed, recalled.failed.len(), recalled.skipped.len()), (0, 0, 1));
        assert!(recalled.skipped[0].0.starts_with("7 tests"), "{recalled:?}");
        assert!(memory("a\nc").recall().is_none());
        memory("a\nb").keep(&failed);
        assert!(memory("a\nb").recall().is_none());
    }
}
