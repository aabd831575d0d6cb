//! What can be said about Rust source by reading it: its text without comments and strings, `unsafe`; and about pages: the
//! tests that they name, the diffs that they show. What modules import is read in `imports`.
//!
//! This is not a parser. Comments and the text of strings are blanked first; what is left is searched for words.
//!
//! *Invariant:* pure; no file is read here.

/// Does this word stand in the line, whole?
pub fn names_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !is_word(c)).any(|part| part == word)
}

/// Every `unsafe` outside the places that may say it. `path` is from the root.
pub fn unsafe_outside(path: &str, text: &str) -> Vec<String> {
    let fenced = path.starts_with("agent/sys/src/") || path == "tests/src/sys.rs";
    if fenced {
        return Vec::new();
    }
    let clean = blanked(text);
    let mut found = Vec::new();
    for (number, line) in clean.lines().enumerate() {
        let says = names_word(line, "unsafe");
        let plain_old_data = path.starts_with("ebpf/common/") && line.contains("unsafe impl aya::Pod for");
        if says && !plain_old_data {
            found.push(format!("{path}:{}: unsafe outside agent/sys", number + 1));
        }
    }
    found
}

/// Is something behind the tests that are in the file itself? It would not be read.
pub fn behind_tests(path: &str, text: &str) -> Option<String> {
    let clean = blanked(text);
    let rest = &clean[blanked(without_tests(text)).len()..];
    let open = rest.find('{')?;
    let mut depth = 0_usize;
    let end = rest[open..].char_indices().find_map(|(at, c)| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        (depth == 0).then_some(open + at + 1)
    })?;
    // Further tests may follow.
    let more = rest[end..].trim();
    (!more.is_empty() && !more.starts_with("#[cfg(test)]")).then(|| format!("{path}: code stands behind its tests"))
}

/// Is there a test of this name?
pub fn has_test(code: &str, name: &str) -> bool {
    let function = format!("fn {name}(");
    code.match_indices(&function).any(|(at, _)| {
        let before = &code[..at];
        let head = before.rfind(['}', ';']).map_or(before, |end| &before[end..]);
        head.contains("#[test]") || head.contains("#[tokio::test")
    })
}

/// What stands before the tests that are in the file itself; those in a file of their own end nothing.
pub fn without_tests(text: &str) -> &str {
    const TESTS: &str = "\n#[cfg(test)]\nmod ";
    let is_here = |at: &usize| text[at + TESTS.len()..].lines().next().is_some_and(|line| line.contains('{'));
    let end = text.match_indices(TESTS).map(|(at, _)| at).find(is_here).unwrap_or(text.len());
    &text[..end]
}

/// Tests that a page of promises names: words in backticks after `Test:` or `Tests:`, or in a table's column of that
/// name. A path such as `flows::name` names its last part.
pub fn named_tests(page: &str) -> Vec<String> {
    let mut found: Vec<String> = test_cells(page).into_iter().flat_map(|(_, cell)| quoted(cell)).collect();
    for line in page.lines().filter(|line| !line.trim().starts_with('|')) {
        for key in ["Test:", "Tests:"] {
            if let Some((_, rest)) = line.split_once(key) {
                found.extend(quoted(rest));
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

/// The lines of a page's tables that have a column for tests and name none in it.
pub fn lines_without_test(page: &str) -> Vec<usize> {
    let empty = test_cells(page).into_iter().filter(|(_, cell)| quoted(cell).is_empty());
    empty.map(|(line, _)| line).collect()
}

/// What stands in the column for tests, with its line, of every table that has one.
fn test_cells(page: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut column = None;
    for (number, line) in page.lines().enumerate() {
        let Some(row) = line.trim().strip_prefix('|') else {
            column = None;
            continue;
        };
        let cells: Vec<&str> = row.trim_end_matches('|').split('|').map(str::trim).collect();
        if let Some(at) = cells.iter().position(|cell| is_heading(cell)) {
            column = Some(at);
        } else if let Some(at) = column.filter(|_| !is_below_heading(row)) {
            found.push((number + 1, cells.get(at).copied().unwrap_or_default()));
        }
    }
    found
}

/// Is this the line of dashes between a table's heading and what is in it?
fn is_below_heading(row: &str) -> bool {
    row.chars().all(|c| "-:| ".contains(c))
}

/// The diffs of a page, one after the other: what stands in its blocks of that kind.
pub fn diffs(page: &str) -> String {
    let blocks = page.split("\n```diff\n").skip(1);
    blocks.filter_map(|rest| Some(format!("{}\n", rest.split_once("\n```")?.0))).collect()
}

fn is_heading(cell: &str) -> bool {
    cell.eq_ignore_ascii_case("test") || cell.eq_ignore_ascii_case("tests")
}

fn quoted(text: &str) -> Vec<String> {
    let words = text.split('`').skip(1).step_by(2).map(|word| word.rsplit("::").next().unwrap_or(word));
    let names = words.filter(|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
    names.map(str::to_owned).collect()
}

/// The text with comments and the insides of strings replaced by spaces; lines stay where they are.
pub fn blanked(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let chars: Vec<char> = text.chars().collect();
    let mut i = 0;
    while i < chars.len() {
        let end = after(&chars, i);
        if end == i + 1 {
            out.push(chars[i]);
        } else {
            out.extend((i..end).map(|j| if chars[j] == '\n' { '\n' } else { ' ' }));
        }
        i = end;
    }
    out
}

/// Every text in quotes, raw ones left out, and the number of characters before it.
pub fn texts(text: &str) -> Vec<(usize, String)> {
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        let end = after(&chars, i);
        if chars[i] == '"' && end > i + 1 {
            found.push((i, chars[i + 1..end - 1].iter().collect()));
        }
        i = end;
    }
    found
}

/// The end of the comment, string or character that begins here; of anything else, the next place.
fn after(chars: &[char], i: usize) -> usize {
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    match (at(i), at(i + 1)) {
        ('/', '/') => (i..chars.len()).find(|&j| at(j) == '\n').unwrap_or(chars.len()),
        ('/', '*') => after_comment(chars, i),
        ('r', '"' | '#') if !is_word(at(i.wrapping_sub(1))) => after_raw(chars, i).unwrap_or(i + 1),
        ('"', _) => after_string(chars, i),
        // A character, not a lifetime: 'x' or an escape.
        ('\'', '\\') => (i + 3..chars.len()).find(|&j| at(j) == '\'').map_or(chars.len(), |j| j + 1),
        ('\'', _) if at(i + 2) == '\'' => i + 3,
        _ => i + 1,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn after_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut i = start;
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 1),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 1),
            _ => {}
        }
        i += 1;
        if depth == 0 {
            return i;
        }
    }
    i
}

fn after_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 1,
            '"' => return i + 1,
            _ => {}
        }
        i += 1;
    }
    i.min(chars.len())
}

/// The end of `r"..."` or `r#"..."#`; None when it is something else, such as `r#type`.
fn after_raw(chars: &[char], start: usize) -> Option<usize> {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    if chars.get(start + 1 + hashes) != Some(&'"') {
        return None;
    }
    let mut i = start + 2 + hashes;
    while i < chars.len() {
        if chars[i] == '"' && chars[i + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes {
            return Some(i + 1 + hashes);
        }
        i += 1;
    }
    Some(chars.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_is_found_outside_its_fence_only() {
        assert_eq!(unsafe_outside("agent/src/relay.rs", "fn f() {\n    unsafe { g() }\n}\n").len(), 1);
        assert!(unsafe_outside("agent/sys/src/lib.rs", "unsafe { g() }").is_empty());
        assert!(unsafe_outside("agent/src/relay.rs", "#![deny(unsafe_code)] // no unsafe here\n").is_empty());
        assert!(unsafe_outside("ebpf/common/src/lib.rs", "unsafe impl aya::Pod for Origin {}\n").is_empty());
        assert_eq!(unsafe_outside("ebpf/common/src/lib.rs", "unsafe fn f() {}\n").len(), 1);
    }

    #[test]
    fn tests_are_read_from_a_page_of_promises() {
        let page = "- No plaintext. Test: `flows::no_plaintext_is_seen`, `half_close_works`\n\
                    | promise | test |\n|---|---|\n| `x` is small | `x_is_small` |\n\nThe map `net_prio` is no test.\n";
        assert_eq!(named_tests(page), ["half_close_works", "no_plaintext_is_seen", "x_is_small"]);
    }

    #[test]
    fn a_line_of_a_table_that_names_no_test_is_found() {
        let page = "| threat | test |\n|:--|---|\n| one | `one_is_refused` |\n| `two` | none |\n| three |\n| four | |\n\n\
                    | who | what |\n|---|---|\n| nobody | nothing |\n";
        assert_eq!(lines_without_test(page), [4, 5, 6]);
        assert_eq!(named_tests(page), ["one_is_refused"]);
    }

    #[test]
    fn only_tests_in_the_file_itself_end_what_is_read_of_it() {
        assert_eq!(without_tests("a\nb\n\n#[cfg(test)]\nmod tests {\n}\n"), "a\nb\n");
        assert_eq!(without_tests("a\nb\n"), "a\nb\n");
        let more = "a\n#[cfg(test)]\nmod tests;\nb\n";
        assert_eq!(without_tests(&format!("{more}\n#[cfg(test)]\nmod more {{\n}}\n")), more);
    }

    #[test]
    fn code_behind_tests_is_found() {
        let tests = "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    fn g() {}\n}\n";
        assert_eq!(behind_tests("a.rs", tests), None);
        assert_eq!(behind_tests("a.rs", "fn f() {}\n"), None);
        assert!(behind_tests("a.rs", &format!("{tests}use crate::relay;\n")).is_some());
    }

    #[test]
    fn a_function_is_a_test_where_it_says_so() {
        let code = "fn plain() {}\n#[test]\nfn one() {}\n#[tokio::test(flavor = \"x\")]\nasync fn two() {}\n#[test]\n#[ignore]\nfn three() {}\n";
        assert!(["one", "two", "three"].iter().all(|name| has_test(code, name)));
        assert!(!has_test(code, "plain") && !has_test(code, "none"));
    }

    #[test]
    fn the_diffs_of_a_page_are_its_blocks_of_that_kind() {
        let page = "Text\n\n```diff\n-a\n+b\n```\n\n```text\n-c\n```\n\n```diff\n+d\n```\n";
        assert_eq!(diffs(page), "-a\n+b\n+d\n");
    }
}
