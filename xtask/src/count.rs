//! Counting tests: what ran, what failed, what could not run and why.
//!
//! *Invariant:* a test that said SKIPPED is never counted as passed, and a test program that ended without its closing
//! line is counted as failed.

use std::collections::BTreeMap;

/// Tests by outcome.
#[derive(Default, Debug, Clone)]
pub struct Count {
    /// How many passed.
    pub passed: usize,
    /// Those that failed.
    pub failed: Vec<String>,
    /// Those that could not run, with the reason.
    pub skipped: Vec<(String, String)>,
}

impl Count {
    /// Adds another count.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
    }

    /// The plain closing line.
    pub fn line(&self) -> String {
        format!("{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped.len())
    }

    /// The failed by name, and the skipped by reason.
    pub fn details(&self) -> String {
        let mut text = String::new();
        for name in &self.failed {
            text.push_str(&format!("    failed   {name}\n"));
        }
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, reason) in &self.skipped {
            reasons.entry(reason).or_default().push(name);
        }
        for (reason, names) in reasons {
            text.push_str(&format!("    skipped  {} ({reason}): {}\n", names.len(), names.join(", ")));
        }
        text
    }
}

/// Reads what test programs print with `--show-output`, line by line. A test skips by printing `SKIPPED (reason): name`,
/// or `skipped: reason` where its own name is known from the heading of its output.
#[derive(Default)]
pub struct Reader {
    count: Count,
    announced: Option<usize>,
    running: String,
    /// Whether what is read now is the output of tests that failed, and whose.
    failures: bool,
    speaker: Option<String>,
    failed_here: Vec<String>,
    skipped_here: Vec<(String, String)>,
}

impl Reader {
    /// One line.
    pub fn line(&mut self, line: &str) {
        let line = line.trim_end();
        let start = line.trim_start();
        if let Some(rest) = start.strip_prefix("Running ").or_else(|| start.strip_prefix("Doc-tests ")) {
            self.running = rest.split(" (").next().unwrap_or(rest).to_owned();
        } else if let Some(rest) = line.strip_prefix("running ") {
            self.lost();
            self.announced = rest.split(' ').next().and_then(|number| number.parse().ok());
        } else if let Some(rest) = line.strip_prefix("test result: ") {
            self.result(rest);
        } else if line == "failures:" || line == "successes:" {
            self.failures = line == "failures:";
            self.speaker = None;
        } else if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.speaker = Some(name.to_owned());
            if self.failures {
                self.fail(name);
            }
        } else if let Some((reason, name)) = skipped(line) {
            self.skip(&name, &reason);
        } else if let (Some(reason), Some(name)) = (line.strip_prefix("skipped: "), self.speaker.clone()) {
            self.skip(&name, reason);
        } else if let Some((name, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            self.outcome(name, outcome);
        }
    }

    /// The count, after the last line.
    pub fn end(mut self) -> Count {
        self.lost();
        // What was said to be skipped outside of any test program.
        self.settle();
        self.count
    }

    fn outcome(&mut self, name: &str, outcome: &str) {
        if outcome == "FAILED" {
            self.fail(name);
        } else if let Some(rest) = outcome.strip_prefix("ignored") {
            let reason = rest.trim_start_matches([',', ' ']);
            let reason = if reason.is_empty() { "ignored" } else { reason };
            self.count.skipped.push((name.to_owned(), reason.to_owned()));
        }
    }

    fn fail(&mut self, name: &str) {
        if !self.failed_here.iter().any(|known| known == name) {
            self.failed_here.push(name.to_owned());
        }
    }

    fn skip(&mut self, name: &str, reason: &str) {
        // The same test may be named with and without its module.
        let last = |name: &str| name.rsplit("::").next().unwrap_or_default().to_owned();
        if !self.skipped_here.iter().any(|(known, _)| last(known) == last(name)) {
            self.skipped_here.push((name.to_owned(), reason.to_owned()));
        }
    }

    /// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s`
    fn result(&mut self, rest: &str) {
        let number = |word: &str| -> usize {
            let part = rest.split([';', '.']).find(|part| part.trim().ends_with(word));
            part.and_then(|part| part.trim().split(' ').next()?.parse().ok()).unwrap_or(0)
        };
        let (passed, failed) = (number("passed"), number("failed"));
        while self.failed_here.len() < failed {
            self.failed_here.push(format!("one of {}", self.running));
        }
        // A test that says that it skips and fails all the same has failed.
        let failed_here = &self.failed_here;
        self.skipped_here.retain(|(name, _)| !failed_here.contains(name));
        self.count.passed += passed.saturating_sub(self.skipped_here.len());
        self.settle();
        self.announced = None;
    }

    /// A test program that began and never said its result.
    fn lost(&mut self) {
        if let Some(number) = self.announced.take() {
            self.settle();
            self.count.failed.push(format!("{}: ended without a result ({number} tests)", self.running));
        }
    }

    fn settle(&mut self) {
        self.count.failed.append(&mut self.failed_here);
        self.count.skipped.append(&mut self.skipped_here);
        (self.failures, self.speaker) = (false, None);
    }
}

/// The reason and the name in `SKIPPED (reason): name`; the reason may itself hold brackets.
fn skipped(line: &str) -> Option<(String, String)> {
    let (_, rest) = line.split_once("SKIPPED (")?;
    let (reason, name) = rest.rsplit_once("): ")?;
    Some((reason.to_owned(), name.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Count {
        let mut reader = Reader::default();
        text.lines().for_each(|line| reader.line(line));
        reader.end()
    }

    #[test]
    fn several_programs_are_added_up() {
        let count = read(
            "     Running unittests src/lib.rs (target/debug/deps/a-1)\n\nrunning 2 tests\ntest a::b ... ok\ntest a::c ... ok\n\n\
             test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\n   Doc-tests bunter\n\n\
             running 1 test\ntest agent/src/lib.rs - x (line 3) - compile fail ... ok\n\n\
             test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
        );
        assert_eq!(count.line(), "3 passed, 0 failed, 0 skipped");
    }

    #[test]
    fn failures_have_names_and_are_counted_once() {
        let count = read(
            "running 2 tests\ntest one ... FAILED\ntest two ... ok\n\nfailures:\n\n---- one stdout ----\nthread panicked\n\n\
             failures:\n    one\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n",
        );
        assert_eq!((count.passed, count.failed), (1, vec!["one".to_owned()]));
    }

    #[test]
    fn a_test_that_says_skipped_has_not_passed() {
        let count = read(
            "running 3 tests\n\nSKIPPED (no kernel TLS (CONFIG_TLS=n)): kernel_engine_carries_http\ntest kernel_engine_carries_http ... ok\n\
             test other ... ok\ntest slow ... ignored, needs a day\n\n\
             test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1s\n",
        );
        assert_eq!(count.line(), "1 passed, 0 failed, 2 skipped");
        assert!(count.details().contains("(no kernel TLS (CONFIG_TLS=n)): kernel_engine_carries_http"));
        assert!(count.details().contains("(needs a day): slow"));
    }

    #[test]
    fn the_output_of_a_test_that_passed_is_no_failure_and_may_say_skipped() {
        let count = read(
            "running 3 tests\ntest x::one ... ok\ntest x::two ... ok\ntest x::three ... ok\n\nsuccesses:\n\n\
             ---- x::one stdout ----\nskipped: no openssl on PATH\n\n---- x::three stdout ----\nSKIPPED (needs root): three\n\
             skipped: needs root\n\nsuccesses:\n    x::one\n    x::two\n    x::three\n\n\
             test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n",
        );
        assert_eq!(count.line(), "1 passed, 0 failed, 2 skipped");
    }

    #[test]
    fn what_is_skipped_outside_of_any_program_is_counted() {
        let count = read(
            "Running one\nrunning 2 tests\ntest a ... ok\ntest b ... ok\n\n\
             test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n\
             SKIPPED (by name only): a room\nSKIPPED (by name only): another room\n",
        );
        assert_eq!(count.line(), "2 passed, 0 failed, 2 skipped");
    }

    #[test]
    fn a_program_that_dies_is_a_failure() {
        let count = read("     Running flows.rs (target/x)\nrunning 7 tests\ntest a ... ok\nerror: signal: 11\n");
        assert_eq!(count.line(), "0 passed, 1 failed, 0 skipped");
        assert_eq!(count.failed[0], "flows.rs: ended without a result (7 tests)");
    }
}
