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

/// Reads what test programs print, line by line (libtest's format, plus `SKIPPED (reason): name`).
#[derive(Default)]
pub struct Reader {
    count: Count,
    announced: Option<usize>,
    running: String,
    failed_here: Vec<String>,
    skipped_here: Vec<(String, String)>,
}

impl Reader {
    /// One line.
    pub fn line(&mut self, line: &str) {
        let line = line.trim_end();
        if let Some(rest) =
            line.trim_start().strip_prefix("Running ").or_else(|| line.trim_start().strip_prefix("Doc-tests "))
        {
            self.running = rest.split(" (").next().unwrap_or(rest).to_owned();
        } else if let Some(rest) = line.strip_prefix("running ") {
            self.lost();
            self.announced = rest.split(' ').next().and_then(|number| number.parse().ok());
        } else if let Some(rest) = line.strip_prefix("test result: ") {
            self.result(rest);
        } else if let Some((reason, name)) = skipped(line) {
            if !self.skipped_here.iter().any(|(known, _)| *known == name) {
                self.skipped_here.push((name, reason));
            }
        } else if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.fail(name);
        } else if let Some((name, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            if outcome == "FAILED" {
                self.fail(name);
            } else if let Some(rest) = outcome.strip_prefix("ignored") {
                let reason = rest.trim_start_matches([',', ' ']);
                let reason = if reason.is_empty() { "ignored" } else { reason };
                self.count.skipped.push((name.to_owned(), reason.to_owned()));
            }
        }
    }

    /// The count, after the last line.
    pub fn end(mut self) -> Count {
        self.lost();
        self.count
    }

    fn fail(&mut self, name: &str) {
        if !self.failed_here.iter().any(|known| known == name) {
            self.failed_here.push(name.to_owned());
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
        self.count.passed += passed.saturating_sub(self.skipped_here.len());
        self.count.failed.append(&mut self.failed_here);
        self.count.skipped.append(&mut self.skipped_here);
        self.announced = None;
    }

    /// A test program that began and never said its result.
    fn lost(&mut self) {
        if let Some(number) = self.announced.take() {
            self.count.failed.append(&mut self.failed_here);
            self.count.skipped.append(&mut self.skipped_here);
            self.count.failed.push(format!("{}: ended without a result ({number} tests)", self.running));
        }
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
             test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\n   Doc-tests wimsey\n\n\
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
    fn a_program_that_dies_is_a_failure() {
        let count = read("     Running flows.rs (target/x)\nrunning 7 tests\ntest a ... ok\nerror: signal: 11\n");
        assert_eq!(count.line(), "0 passed, 1 failed, 0 skipped");
        assert_eq!(count.failed[0], "flows.rs: ended without a result (7 tests)");
    }
}
