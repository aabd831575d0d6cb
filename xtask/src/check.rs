//! The verb `check`: everything that can be said about the tree without running the agent.
//!
//! *Invariant:* every check runs, also after one has failed, and what could not be checked is counted by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::count::Count;
use crate::imports::{self, Modules, WALLS};
use crate::run::{During, Fallible, root, seconds, step, tail, work};
use crate::setup::{self, Need};
use crate::source;
use crate::{build, codes, draw};

/// Crates whose modules are listed in the order in which they may import each other.
const CRATES: [&str; 3] = ["agent/src", "agent/identity/src", "agent/sys/src"];

/// Where the compiler is told to refuse `unsafe`, and by which words.
const FORBID: [&str; 3] = ["agent/src/lib.rs", "agent/src/main.rs", "agent/identity/src/lib.rs"];
const FORBIDDEN: &str = "\n#![forbid(unsafe_code)]\n";

/// Lines of a file, its tests with it; a longer file becomes a folder with the same door.
const LONGEST_FILE: usize = 600;

/// Pages of docs/ that name tests, and whether each line of their tables has to.
const PAGES: [(&str, bool); 3] = [("SPECIFICATION.md", false), ("REQUIREMENTS.md", false), ("THREAT-MODEL.md", true)];

/// Runs all checks.
pub fn verb() -> Fallible {
    setup::ensure(&[Need::Toolchain, Need::Build])?;
    let deny = setup::ensure(&[Need::Check]);
    let mut checks = Checks::default();
    checks.tree();
    let xtask = root().join("xtask/Cargo.toml").to_string_lossy().into_owned();
    let own = work("own").to_string_lossy().into_owned();

    checks.cargo("format", setup::cargo(&["fmt", "--all", "--check"]));
    checks.cargo("format of xtask", setup::cargo(&["fmt", "--manifest-path", &xtask, "--check"]));
    checks.cargo("format of ebpf", in_ebpf(setup::cargo(&["fmt", "--check"])));
    checks.cargo("kernel programs build", build::bpf_cargo("build", &[]));
    checks.cargo("lints of ebpf", build::bpf_cargo("clippy", &["--", "-D", "warnings"]));
    checks.cargo("lints", setup::cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    let lints = ["clippy", "--manifest-path", &xtask, "--target-dir", &own, "--all-targets", "--", "-D", "warnings"];
    checks.cargo("lints of xtask", setup::cargo(&lints));
    let mut documentation = setup::cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
    documentation.env("RUSTDOCFLAGS", "-D warnings");
    checks.cargo("documentation", documentation);
    match deny {
        Ok(()) => {
            checks.cargo("licences, bans, sources", setup::cargo(&["deny", "check", "licenses", "bans", "sources"]));
            checks.advisories();
        }
        Err(failure) => {
            for name in ["licences, bans, sources", "advisories"] {
                checks.skip(name, &failure.to_string());
            }
        }
    }
    checks.policies();
    checks.end()
}

fn in_ebpf(mut command: Command) -> Command {
    command.current_dir(root().join("ebpf"));
    command
}

/// The verb `policy`: checks directories of policies and runs their expectations.
pub fn policy(folders: &[String]) -> Fallible {
    setup::ensure(&[Need::Toolchain])?;
    let mut command = setup::cargo(&["run", "--quiet", "-p", "bunter", "--", "policy", "test"]);
    if folders.is_empty() {
        command.args(examples());
    } else {
        command.args(folders.iter().map(|folder| fs::canonicalize(folder).unwrap_or_else(|_| folder.into())));
    }
    let ended = step("policies").each_line(|line| {
        println!("    {line}");
        true
    });
    let ended = ended.watch(command)?;
    if ended.success() { Ok(()) } else { Err(format!("bunter policy test: {}", ended.how()).into()) }
}

fn examples() -> Vec<PathBuf> {
    let listed = fs::read_dir(root().join("policies/examples")).into_iter().flatten().flatten();
    let mut examples: Vec<PathBuf> = listed.map(|entry| entry.path()).collect();
    examples.push(root().join("vagrant/policies"));
    examples.sort();
    examples
}

#[derive(Default)]
struct Checks {
    count: Count,
}

impl Checks {
    /// A check by a program: it passes when the program does.
    fn cargo(&mut self, name: &str, command: Command) {
        match step(name).watch(command) {
            Ok(ended) if ended.success() => self.count.passed += 1,
            Ok(ended) => self.fail(name, &format!("{}\n  whole log: {}", tail(&ended.log, 40), ended.log.display())),
            Err(failure) => self.fail(name, &failure.to_string()),
        }
    }

    /// A check of our own: it passes when it finds nothing.
    fn own(&mut self, name: &str, find: impl FnOnce() -> Fallible<Vec<String>>) {
        let started = Instant::now();
        match find() {
            Ok(found) if found.is_empty() => {
                println!("  {name} ({})", seconds(started.elapsed()));
                self.count.passed += 1;
            }
            Ok(found) => {
                self.fail(name, &found.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n"))
            }
            Err(failure) => self.fail(name, &failure.to_string()),
        }
    }

    fn fail(&mut self, name: &str, what: &str) {
        println!("  FAILED: {name}\n{what}");
        self.count.failed.push(name.to_owned());
    }

    fn skip(&mut self, name: &str, reason: &str) {
        println!("  skipped: {name} ({reason})");
        self.count.skipped.push((name.to_owned(), reason.to_owned()));
    }

    /// What is said about the tree by reading it.
    fn tree(&mut self) {
        self.own("order of modules", || {
            let mut found = Vec::new();
            for folder in CRATES {
                let library = fs::read_to_string(root().join(folder).join("lib.rs")).during(folder)?;
                // Only the agent has a binary.
                let binary = fs::read_to_string(root().join(folder).join("main.rs")).unwrap_or_default();
                for (path, text) in rust_files(&[folder])? {
                    found.extend(imports::upward(&library, &binary, folder, &path, &text));
                }
            }
            Ok(found)
        });
        self.own("circles and walls", || {
            let manifest = "agent/identity/Cargo.toml";
            let mut found =
                imports::beyond_identity(manifest, &fs::read_to_string(root().join(manifest)).during(manifest)?);
            for folder in CRATES {
                let (binary, library): (Vec<_>, Vec<_>) = rust_files(&[folder])?
                    .into_iter()
                    .partition(|(path, _)| path.contains("/src/main.rs") || path.contains("/src/cli/"));
                let in_order = fs::read_to_string(root().join(folder).join("lib.rs")).during(folder)?;
                for (root, files) in [("lib", library), ("main", binary)] {
                    let modules = Modules::read(folder, root, &files);
                    found.extend(modules.circles().into_iter().chain(modules.breaches(WALLS)));
                    found.extend(modules.upward(&in_order));
                    found.extend(files.iter().filter_map(|(path, text)| source::behind_tests(path, text)));
                    found.extend(files.iter().flat_map(|(path, text)| imports::runtime_in_pure(path, text)));
                }
            }
            Ok(found)
        });
        self.own("fence around unsafe", || {
            let files = rust_files(&["agent", "benches", "ebpf/common", "tests", "xtask/src"])?;
            let mut found: Vec<String> =
                files.iter().flat_map(|(path, text)| source::unsafe_outside(path, text)).collect();
            let open = files
                .iter()
                .filter(|(path, text)| FORBID.contains(&path.as_str()) && !source::blanked(text).contains(FORBIDDEN));
            found.extend(open.map(|(path, _)| format!("{path}: does not say {}", FORBIDDEN.trim())));
            Ok(found)
        });
        self.own("length of files", || {
            let files = rust_files(&["agent", "benches", "ebpf", "tests", "xtask/src"])?;
            let long = files.iter().map(|(path, text)| (path, text.lines().count()));
            let long = long.filter(|(_, lines)| *lines > LONGEST_FILE);
            Ok(long.map(|(path, lines)| format!("{path}: {lines} lines; make it a folder")).collect())
        });
        self.own("numbers of decisions", || Ok(repeated_decisions(&root().join("docs/adr"))));
        self.own("pictures", draw::stale);
        self.own("diffs of CONTRIBUTING.md", || unfit_diffs("CONTRIBUTING.md"));
        self.own("codes that OPERATIONS.md explains", unexplained_codes);
        for (page, every_line) in PAGES {
            match fs::read_to_string(root().join("docs").join(page)) {
                Ok(text) => self.promises(page, &text, every_line),
                Err(_) => self.skip(&format!("tests that {page} names"), &format!("there is no docs/{page}")),
            }
        }
    }

    /// The tests that a page names are in the tree; with `every_line`, each line of its tables names one.
    fn promises(&mut self, page: &str, text: &str, every_line: bool) {
        self.own(&format!("tests that {page} names"), || {
            let files = rust_files(&["agent", "benches", "ebpf", "tests", "xtask/src"])?;
            let code: String = files.into_iter().map(|(_, text)| text).collect();
            let named = source::named_tests(text);
            if named.is_empty() {
                return Ok(vec!["it names no test at all (write `Test: \\`name\\`` or a table column Test)".into()]);
            }
            let missing = named.into_iter().filter(|name| !source::has_test(&code, name));
            let mut found: Vec<String> = missing.map(|name| format!("no test {name}")).collect();
            if every_line {
                let without = source::lines_without_test(text).into_iter();
                found.extend(without.map(|line| format!("docs/{page}:{line}: names no test")));
            }
            Ok(found)
        });
        let pending = text.matches("test pending").count();
        if pending > 0 {
            self.skip(&format!("promises of {page}"), &format!("{pending} say \"test pending\""));
        }
    }

    /// Advisories need a database that is fetched from a git host; where that cannot be reached, it is said.
    fn advisories(&mut self) {
        let name = "advisories";
        let mut command = setup::cargo(&["deny", "check", "advisories"]);
        command.env("GIT_TERMINAL_PROMPT", "0");
        match step(name).limit(Duration::from_secs(120)).watch(command) {
            Ok(ended) if ended.success() => self.count.passed += 1,
            Ok(ended) => {
                let text = fs::read_to_string(&ended.log).unwrap_or_default();
                if ended.cut.is_some() || text.contains("failed to fetch advisory database") {
                    self.skip(name, "the advisory database cannot be fetched from here");
                } else {
                    self.fail(name, &tail(&ended.log, 60));
                }
            }
            Err(failure) => self.fail(name, &failure.to_string()),
        }
    }

    fn policies(&mut self) {
        let mut command = setup::cargo(&["run", "--quiet", "-p", "bunter", "--", "policy", "test"]);
        command.args(examples());
        self.cargo("policies", command);
    }

    fn end(self) -> Fallible {
        print!("\n{}", self.count.details());
        println!("{}", self.count.line());
        if self.count.failed.is_empty() { Ok(()) } else { std::process::exit(1) }
    }
}

/// What the table of codes in docs/OPERATIONS.md and the code do not agree about.
fn unexplained_codes() -> Fallible<Vec<String>> {
    let page = "docs/OPERATIONS.md";
    let text = fs::read_to_string(root().join(page)).during(page)?;
    let mut said = BTreeSet::new();
    for (_, text) in rust_files(&["agent/src", "agent/identity/src", "ebpf/common/src"])? {
        said.extend(codes::codes(&text));
    }
    Ok(codes::differences(&said, &text))
}

/// Every Rust file below these folders of the repository, with its path from the root.
fn rust_files(folders: &[&str]) -> Fallible<Vec<(String, String)>> {
    let mut files = Vec::new();
    for folder in folders {
        collect(&root(), &root().join(folder), &mut files)?;
    }
    files.sort();
    Ok(files)
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<(String, String)>) -> Fallible {
    for entry in fs::read_dir(folder).during(folder.display())? {
        let path = entry.during(folder.display())?.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                collect(root, &path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            files.push((name, fs::read_to_string(&path).during(path.display())?));
        }
    }
    Ok(())
}

/// Whether what a page tells readers to change is there to be changed: its diffs, taken together, apply to the tree. Where a
/// reader has made all of these changes, they can be taken back.
fn unfit_diffs(page: &str) -> Fallible<Vec<String>> {
    let text = fs::read_to_string(root().join(page)).during(page)?;
    let patch = work("diffs").join("page.diff");
    fs::write(&patch, source::diffs(&text)).during(patch.display())?;
    let apply = |options: &[&str]| {
        let mut git = Command::new("git");
        git.args(["apply", "--check"]).args(options).arg(&patch).current_dir(root());
        git.output().during("cannot run git")
    };
    let forwards = apply(&[])?;
    if forwards.status.success() || apply(&["--reverse"])?.status.success() {
        return Ok(Vec::new());
    }
    Ok(String::from_utf8_lossy(&forwards.stderr).lines().map(|line| format!("{page}: {line}")).collect())
}

fn repeated_decisions(folder: &Path) -> Vec<String> {
    let mut numbers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let number: String = name.chars().take_while(char::is_ascii_digit).collect();
        if number.len() == 4 && name.ends_with(".md") {
            numbers.entry(number).or_default().push(name);
        } else if name != "README.md" {
            found.push(format!("docs/adr/{name}: a decision is NNNN-title.md"));
        }
    }
    let repeated = numbers.into_iter().filter(|(_, names)| names.len() > 1);
    found.extend(repeated.map(|(number, names)| format!("number {number} twice: {}", names.join(", "))));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_row_in_the_page_for_operators_and_every_row_its_code() {
        let found = unexplained_codes().unwrap();
        assert!(found.is_empty(), "docs/OPERATIONS.md:\n{}", found.join("\n"));
    }

    #[test]
    fn what_contributors_are_told_to_change_is_there() {
        assert_eq!(unfit_diffs("CONTRIBUTING.md").map_err(|failure| failure.to_string()), Ok(Vec::new()));
    }
}
