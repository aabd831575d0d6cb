//! What the modules of a crate import, by reading them: in the order of lib.rs, in no circle, through no wall.
//!
//! This is not a parser. Comments and the text of strings are blanked, tests are left out, and paths are followed through
//! what a module hands on by `use`, to the file that defines the name.
//!
//! *Invariant:* pure; no file is read here.

use crate::source::{blanked, names_word, without_tests};
use std::collections::BTreeSet;

/// What a module of a crate imports from below itself in the reading order of lib.rs. `folder` has the crate's sources, among
/// them `path`; `binary` is main.rs.
pub fn upward(library: &str, binary: &str, folder: &str, path: &str, text: &str) -> Vec<String> {
    let order = modules(library);
    let within = path.strip_prefix(folder).unwrap_or(path).trim_start_matches('/');
    let own = within.split('/').next().unwrap_or(within).trim_end_matches(".rs");
    // lib.rs stands outside of the order, and what belongs to the binary is after all of it.
    let Some(place) = order.iter().position(|name| name == own) else {
        if own == "lib" || own == "main" || modules(binary).iter().any(|name| name == own) {
            return Vec::new();
        }
        return vec![format!("{path}: not listed in lib.rs")];
    };
    let mut found = Vec::new();
    for (line, name) in imports(without_tests(text)) {
        let listed = order.iter().position(|other| *other == name);
        if listed.is_some_and(|listed| listed > place) {
            found.push(format!("{path}:{line}: imports {name}, which is listed after {own}"));
        }
    }
    found
}

/// The modules of lib.rs, in order.
fn modules(library: &str) -> Vec<String> {
    let clean = blanked(library);
    let words = clean.lines().filter_map(|line| {
        let line = line.trim();
        let line = line.strip_prefix("pub(crate) ").or_else(|| line.strip_prefix("pub ")).unwrap_or(line);
        line.strip_prefix("mod ")?.strip_suffix(';')
    });
    words.map(str::to_owned).collect()
}

/// Every `crate::name` with its line, those in `crate::{one, two::three}` too.
fn imports(text: &str) -> Vec<(usize, String)> {
    let clean = blanked(text);
    let mut found = Vec::new();
    for (at, _) in clean.match_indices("crate::") {
        // `$crate::` and `some_crate::` are other words.
        let before = clean[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let line = clean[..at].matches('\n').count() + 1;
        let rest = &clean[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            found.extend(members(group).into_iter().map(|member| (line, word(member.trim()).to_owned())));
        } else {
            found.push((line, word(rest).to_owned()));
        }
    }
    found
}

fn word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// What the order of lib.rs would let through and must not be: a room, and a room that nothing in it may import of. Who
/// carries bytes does not decide, and who answers the operator does not touch connections.
pub const WALLS: &[(&str, &str)] =
    &[("relay", "policy"), ("offload", "policy"), ("admin", "pipeline"), ("admin", "shard")];

/// What the manifest of the crate of identities must not name: the kernel, the runtime, and the agent.
pub fn beyond_identity(path: &str, manifest: &str) -> Vec<String> {
    let lines = manifest.lines().map(|line| line.split(['.', ' ', '=']).next().unwrap_or(line));
    let crates = lines.filter(|name| matches!(*name, "aya" | "tokio" | "bunter" | "bunter-common" | "bunter-sys"));
    crates.map(|name| format!("{path}: depends on {name}")).collect()
}

/// Rooms and files that are pure, so that they name no runtime. Of the crate of identities everything is.
pub const PURE: &[&str] = &[
    "agent/src/units",
    "agent/src/document",
    "agent/src/policy",
    "agent/src/config",
    "agent/src/admission",
    "agent/src/authorize",
    "agent/src/whence",
    "agent/src/handshake/error",
    "agent/src/handshake/secrets",
    "agent/src/handshake/settings",
    "agent/src/handshake/verify",
    "agent/src/handshake_slots/queue",
    "agent/src/live/places",
    "agent/src/offload/record",
    "agent/src/relay/control",
    "agent/src/relay/exchange",
    "agent/src/relay/reason",
    "agent/identity/src",
];

/// Where a pure file names the runtime.
pub fn runtime_in_pure(path: &str, text: &str) -> Vec<String> {
    let stem = path.trim_end_matches(".rs");
    let is_pure =
        PURE.iter().any(|pure| stem.strip_prefix(pure).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
    if !is_pure || is_test(path) {
        return Vec::new();
    }
    let clean = blanked(without_tests(text));
    let lines = clean.lines().enumerate();
    lines
        .filter(|(_, line)| names_word(line, "tokio"))
        .map(|(at, _)| format!("{path}:{}: names tokio, and is pure", at + 1))
        .collect()
}

/// A file of tests, or of what only tests need.
fn is_test(path: &str) -> bool {
    path.split('/').any(|part| matches!(part.trim_end_matches(".rs"), "tests" | "testing"))
}

/// A module: its path within the crate, its file, what it imports and what it hands on under which name.
struct Module {
    path: Vec<String>,
    file: String,
    text: String,
    uses: Vec<Use>,
}

/// One name of a `use`.
struct Use {
    path: Vec<String>,
    name: String,
}

/// The modules of one crate, read, and which imports which.
pub struct Modules {
    all: Vec<Module>,
    edges: BTreeSet<(usize, usize)>,
}

impl Modules {
    /// `files`: path from the root, and text. Those of the binary are a crate of their own.
    pub fn read(folder: &str, root: &str, files: &[(String, String)]) -> Self {
        let modules = files.iter().filter(|(path, _)| !is_test(path)).filter_map(|(file, text)| {
            let within = file.strip_prefix(folder)?.trim_start_matches('/').trim_end_matches(".rs");
            let mut path: Vec<String> = within.split('/').map(str::to_owned).collect();
            if path == [root] {
                path.clear();
            } else if path.last().is_some_and(|last| last == "mod") {
                path.pop();
            }
            let (uses, text) = split_uses(&blanked(without_tests(text)));
            Some(Module { path, file: file.clone(), text, uses })
        });
        let mut modules = Self { all: modules.collect(), edges: BTreeSet::new() };
        modules.edges = modules.find_edges();
        modules
    }

    fn at(&self, path: &[String]) -> Option<usize> {
        self.all.iter().position(|module| module.path == path)
    }

    /// A path as it is written in this module, from the root of the crate; none where it leads out of the crate.
    fn absolute(&self, module: &[String], path: &[String]) -> Option<Vec<String>> {
        let (first, rest) = path.split_first()?;
        let from = match first.as_str() {
            "crate" => Vec::new(),
            "self" => module.to_vec(),
            "super" => {
                let (_, above) = module.split_last()?;
                return match rest.first() {
                    Some(_) => self.absolute(above, rest).or_else(|| Some([above, rest].concat())),
                    None => Some(above.to_vec()),
                };
            }
            child => {
                let inside = [module, &[child.to_owned()]].concat();
                self.at(&inside)?;
                inside
            }
        };
        Some([&from[..], rest].concat())
    }

    /// The module whose file defines what is at this path.
    fn definer(&self, path: &[String], depth: usize) -> Option<usize> {
        let length = (0..=path.len()).rev().find(|length| self.at(&path[..*length]).is_some())?;
        let found = self.at(&path[..length])?;
        let Some(name) = path.get(length).filter(|_| depth < 8) else { return Some(found) };
        let module = &self.all[found];
        let on = module.uses.iter().find(|used| used.name == *name);
        let on = on.and_then(|used| self.absolute(&module.path, &used.path));
        on.and_then(|on| self.definer(&[&on[..], &path[length + 1..]].concat(), depth + 1)).or(Some(found))
    }

    /// What each module imports of others. That a module has others within it is no import.
    fn find_edges(&self) -> BTreeSet<(usize, usize)> {
        let mut edges = BTreeSet::new();
        for (index, module) in self.all.iter().enumerate() {
            let written = paths(&module.text);
            for path in module.uses.iter().map(|used| &used.path).chain(&written) {
                let found = self.absolute(&module.path, path).and_then(|path| self.definer(&path, 0));
                if let Some(other) = found.filter(|other| !self.all[*other].path.starts_with(&module.path)) {
                    edges.insert((index, other));
                }
            }
        }
        edges
    }

    /// Files that import each other in a circle, and what of them imports what.
    pub fn circles(&self) -> Vec<String> {
        let mut edges = self.edges.clone();
        loop {
            let imports: BTreeSet<usize> = edges.iter().map(|(from, _)| *from).collect();
            let imported: BTreeSet<usize> = edges.iter().map(|(_, to)| *to).collect();
            let before = edges.len();
            edges.retain(|(from, to)| imported.contains(from) && imports.contains(to));
            if edges.len() == before {
                break;
            }
        }
        let file = |index: usize| &self.all[index].file;
        edges.into_iter().map(|(from, to)| format!("{} imports {}, in a circle", file(from), file(to))).collect()
    }

    /// Imports against the order of lib.rs, however the path is written.
    pub fn upward(&self, library: &str) -> Vec<String> {
        let order = modules(library);
        let place = |index: usize| {
            let room = self.all[index].path.first()?;
            order.iter().position(|name| name == room)
        };
        let edges = self.edges.iter().filter(|(from, to)| place(*from) < place(*to) && place(*from).is_some());
        let file = |index: usize| &self.all[index].file;
        edges.map(|(from, to)| format!("{} imports {}, which is listed after it", file(*from), file(*to))).collect()
    }

    /// Imports through a wall.
    pub fn breaches(&self, walls: &[(&str, &str)]) -> Vec<String> {
        let room = |index: usize| self.all[index].path.first().map_or("", String::as_str);
        let edges = self.edges.iter().filter(|(from, to)| walls.contains(&(room(*from), room(*to))));
        edges
            .map(|(from, to)| format!("{} imports of {}, from which a wall parts it", self.all[*from].file, room(*to)))
            .collect()
    }
}

/// Takes the `use` declarations out of a text without comments: each name with its path; and what is left.
fn split_uses(text: &str) -> (Vec<Use>, String) {
    let (mut uses, mut rest, mut from) = (Vec::new(), String::new(), 0);
    while let Some(at) = text[from..].find("use ").map(|at| at + from) {
        let starts = text[..at].chars().next_back().is_none_or(|c| c.is_whitespace());
        let Some(end) = text[at..].find(';').map(|end| end + at).filter(|_| starts) else {
            rest.push_str(&text[from..at + 4]);
            from = at + 4;
            continue;
        };
        rest.push_str(&text[from..at]);
        names(&[], &text[at + 4..end], &mut uses);
        from = end + 1;
    }
    rest.push_str(&text[from..]);
    (uses, rest)
}

/// The names of one branch of a `use`.
fn names(prefix: &[String], branch: &str, uses: &mut Vec<Use>) {
    let branch = branch.trim();
    if let Some((before, group)) = branch.split_once('{') {
        let prefix: Vec<String> = prefix.iter().cloned().chain(parts(before)).collect();
        for member in members(group) {
            names(&prefix, member, uses);
        }
        return;
    }
    let (path, alias) = branch.split_once(" as ").map_or((branch, None), |(path, alias)| (path, Some(alias.trim())));
    let mut path: Vec<String> = prefix.iter().cloned().chain(parts(path)).collect();
    // `{self, ...}` is the module itself.
    if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    let name = alias.map(str::to_owned).or_else(|| path.last().cloned());
    uses.extend(name.map(|name| Use { path, name }));
}

fn parts(path: &str) -> impl Iterator<Item = String> {
    path.split("::").map(|part| part.trim().to_owned()).filter(|part| !part.is_empty())
}

/// The members of a group, up to its closing brace.
fn members(group: &str) -> Vec<&str> {
    let (mut found, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                found.push(&group[from..at]);
                from = at + 1;
                if c == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    found.retain(|member| !member.trim().is_empty());
    found
}

/// Every path of two parts and more that is written out in a text without comments.
fn paths(text: &str) -> Vec<Vec<String>> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let words =
        text.split(|c: char| !is_word(c) && c != ':').filter(|word| word.contains("::") && !word.starts_with(':'));
    words.map(|word| parts(word).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRARY: &str = "//! mod fake;\npub mod spiffe;\npub mod policy;\n\npub mod relay;\nmod pipeline;\n";

    #[test]
    fn an_upward_import_is_found_wherever_it_is_written() {
        let found = |text: &str| upward(LIBRARY, "mod cli;", "agent/src", "agent/src/policy/mod.rs", text);
        assert!(found("use crate::spiffe::SpiffeId;\n").is_empty());
        assert_eq!(
            found("use crate::relay::Pipe;\n"),
            ["agent/src/policy/mod.rs:1: imports relay, which is listed after policy"]
        );
        assert_eq!(found("\nfn f() { crate::pipeline::walk() }\n").len(), 1);
        assert_eq!(found("use crate::{spiffe::{A, B}, relay::{C, D}};\n").len(), 1);
        assert_eq!(found("use crate::{\n    spiffe,\n    pipeline,\n};\n").len(), 1);
    }

    #[test]
    fn comments_strings_tests_and_other_crates_are_no_imports() {
        let found = |text: &str| upward(LIBRARY, "mod cli;", "agent/src", "agent/src/policy.rs", text);
        assert!(found("//! See [`crate::relay`].\n/* crate::relay */ fn f() {}\n").is_empty());
        assert!(
            found("const X: &str = \"crate::relay\"; const Y: char = '\"'; const Z: &str = r#\"crate::relay\"#;\n")
                .is_empty()
        );
        assert!(found("fn f() { other_crate::relay() }\n").is_empty());
        assert!(found("fn f() {}\n\n#[cfg(test)]\nmod tests {\n    use crate::relay::Pipe;\n}\n").is_empty());
        assert!(found("use crate::policy::Rule;\n").is_empty());
    }

    #[test]
    fn a_file_that_lib_does_not_list_is_told() {
        assert_eq!(upward(LIBRARY, "mod cli;", "agent/src", "agent/src/stray.rs", "").len(), 1);
        assert!(upward(LIBRARY, "mod cli;", "agent/src", "agent/src/main.rs", "use crate::relay;").is_empty());
        assert!(upward(LIBRARY, "mod cli;", "agent/src", "agent/src/cli/run.rs", "use crate::relay;").is_empty());
    }

    fn crate_of(files: &[(&str, &str)]) -> Modules {
        let files: Vec<_> =
            files.iter().map(|(file, text)| (format!("agent/src/{file}"), (*text).to_owned())).collect();
        Modules::read("agent/src", "lib", &files)
    }

    #[test]
    fn a_circle_is_found_however_the_imports_are_written() {
        let circle = |one: &str, other: &str| {
            let door = "mod control;\nmod status;\npub use control::Control;\npub struct Own;\n";
            let files = [
                ("lib.rs", "mod daemon;"),
                ("daemon/mod.rs", door),
                ("daemon/control.rs", one),
                ("daemon/status.rs", other),
            ];
            crate_of(&files).circles()
        };
        let found = circle("use super::status;\n", "use super::control::Control;\n");
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0], "agent/src/daemon/control.rs imports agent/src/daemon/status.rs, in a circle");
        // Handed on by the door, in a group, written out, from the root.
        assert_eq!(circle("use super::{Own, status::{self}};\n", "use super::{Control as C};\n").len(), 2);
        assert_eq!(circle("fn f() { super::status::g() }\n", "fn g() -> crate::daemon::Control {}\n").len(), 2);
        // What the door itself has is no circle, nor are comments and tests.
        assert!(circle("use super::{Own, status};\n", "use super::Own;\n//! use super::control;\n").is_empty());
        assert!(
            circle("use super::status;\n", "\n#[cfg(test)]\nmod tests {\n    use super::super::control::X;\n}\n")
                .is_empty()
        );
    }

    #[test]
    fn an_import_against_the_order_is_found_by_super_as_well() {
        let files =
            [("lib.rs", ""), ("lock.rs", "fn up() { super::relay::f() }\n"), ("relay.rs", "use crate::lock;\n")];
        assert_eq!(
            crate_of(&files).upward("mod lock;\nmod relay;\n"),
            ["agent/src/lock.rs imports agent/src/relay.rs, which is listed after it"]
        );
    }

    #[test]
    fn an_import_through_a_wall_is_found() {
        let files = [
            ("lib.rs", "mod policy; mod relay;"),
            ("policy.rs", "pub struct Rule;"),
            ("relay/mod.rs", "mod flow;"),
            ("relay/flow.rs", "fn f(rule: &crate::policy::Rule) {}\n"),
        ];
        let found = crate_of(&files).breaches(WALLS);
        assert_eq!(found, ["agent/src/relay/flow.rs imports of policy, from which a wall parts it"]);
    }

    #[test]
    fn identities_know_neither_kernel_nor_runtime_nor_agent() {
        assert_eq!(beyond_identity("Cargo.toml", "[dependencies]\naya.workspace = true\n").len(), 1);
        assert_eq!(beyond_identity("Cargo.toml", "tokio = \"1\"\nbunter = { path = \"..\" }\n").len(), 2);
        assert!(beyond_identity("Cargo.toml", "name = \"bunter-identity\"\nrustls.workspace = true\n").is_empty());
    }

    #[test]
    fn a_pure_file_names_no_runtime() {
        assert_eq!(runtime_in_pure("agent/src/policy/load.rs", "use tokio::fs;\n").len(), 1);
        assert_eq!(runtime_in_pure("agent/src/admission.rs", "fn f() { tokio::spawn(g()) }\n").len(), 1);
        assert!(runtime_in_pure("agent/src/policy/load.rs", "// not tokio\nlet x = \"tokio\";\n").is_empty());
        assert!(runtime_in_pure("agent/src/shard.rs", "use tokio::net;\n").is_empty());
    }
}
