//! The codes of audit lines and errors, as the source has them, and the table that explains them.
//!
//! A code is a text in the body of a function `code`, or `..._code`, that gives a `&'static str`; or, beside the reasons of
//! the kernel programs, what follows a `Culprit` or the absence of one.
//!
//! *Invariant:* pure; no file is read here.

use std::collections::BTreeSet;

use crate::source::{blanked, texts, without_tests};

/// Stands for what a code has behind its colon, which is somebody else's list of names.
const NAME: &str = "NAME";

/// The codes of a file.
pub fn codes(text: &str) -> BTreeSet<String> {
    let text = without_tests(text);
    let (clean, texts) = (blanked(text), texts(text));
    let clean: Vec<char> = clean.chars().collect();
    let mut found = BTreeSet::new();
    for body in bodies(&clean) {
        found.extend(texts.iter().filter(|(at, _)| body.contains(at)).map(|(_, text)| generic(text)));
    }
    if text.contains("REASON_") {
        let follows = |at: usize| follows_culprit(&clean[..at]);
        let beside = texts.iter().filter(|(at, text)| is_code(text) && follows(*at));
        found.extend(beside.map(|(_, text)| text.clone()));
    }
    found
}

/// The bodies of functions that give a code.
fn bodies(clean: &[char]) -> Vec<std::ops::Range<usize>> {
    let words: Vec<char> = "code(".chars().collect();
    let starts = (0..clean.len()).filter(|&at| clean[at..].starts_with(&words) && is_definition(&clean[..at]));
    starts.filter_map(|at| body(clean, at)).collect()
}

/// Is the word that ends here the name of a function that is defined, whatever stands before `code` in it?
fn is_definition(before: &[char]) -> bool {
    let text: String = before.iter().rev().take(64).collect::<Vec<_>>().into_iter().rev().collect();
    let name = text.rsplit(' ').next().unwrap_or_default();
    let whole = name.is_empty() || name.ends_with('_') && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    whole && text.trim_end_matches(name).ends_with("fn ")
}

fn body(clean: &[char], at: usize) -> Option<std::ops::Range<usize>> {
    let opens = (at..clean.len()).find(|&i| matches!(clean[i], '{' | ';'))?;
    let signature: String = clean[at..opens].iter().collect();
    if clean[opens] == ';' || !signature.contains("-> &'static str") {
        return None;
    }
    let mut depth = 0;
    let closes = (opens..clean.len()).find(|&i| {
        match clean[i] {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        depth == 0
    })?;
    Some(opens..closes)
}

/// Behind `Culprit::Somebody,` or `None,`.
fn follows_culprit(before: &[char]) -> bool {
    let before: String = before.iter().rev().skip_while(|c| c.is_whitespace()).take(32).collect();
    let Some(word) = before.strip_prefix(',') else { return false };
    let word: String = word.chars().take_while(|c| c.is_alphanumeric() || *c == ':').collect();
    let word: String = word.chars().rev().collect();
    word == "None" || word.starts_with("Culprit::")
}

fn generic(text: &str) -> String {
    match text.split_once(':') {
        Some((kind, _)) => format!("{kind}:{NAME}"),
        None => text.to_owned(),
    }
}

fn is_code(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// What the table of a page and the code do not agree about: one line each.
pub fn differences(codes: &BTreeSet<String>, page: &str) -> Vec<String> {
    let rows = rows(page);
    let mut found = Vec::new();
    let mut told = BTreeSet::new();
    for (line, cells) in rows {
        let code = cells.first().map(|cell| cell.trim_matches('`').to_owned()).unwrap_or_default();
        if cells.len() != 4 || cells.iter().any(|cell| cell.is_empty()) {
            found.push(format!("line {line}: {code}: code, culprit, what it means and what to do belong in a row"));
        }
        if !codes.contains(&code) {
            found.push(format!("line {line}: {code}: no code says this"));
        }
        if !told.insert(code.clone()) {
            found.push(format!("line {line}: {code}: it has a row already"));
        }
    }
    found.extend(codes.difference(&told).map(|code| format!("{code}: it has no row")));
    found
}

/// The rows of tables whose first column is headed `code`, with their lines.
fn rows(page: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut inside = false;
    for (number, line) in (1..).zip(page.lines()) {
        let Some(row) = line.trim().strip_prefix('|').and_then(|row| row.strip_suffix('|')) else {
            inside = false;
            continue;
        };
        let cells: Vec<String> = row.split('|').map(|cell| cell.trim().to_owned()).collect();
        match cells.first().map(String::as_str) {
            Some("code") => inside = true,
            Some(rule) if rule.starts_with("---") => {}
            _ if inside => found.push((number, cells)),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(codes: &[&str]) -> BTreeSet<String> {
        codes.iter().map(|code| (*code).to_owned()).collect()
    }

    #[test]
    fn codes_are_found_in_the_bodies_of_functions_that_give_them() {
        let text = "impl Refusal for E {\n    fn culprit(&self) -> Culprit { say(\"nobody\") }\n    \
                    fn code(&self) -> &'static str {\n        // Not \"this\".\n        match self {\n            \
                    E::A { .. } => \"a-one\",\n            E::B(error) => error.code(),\n            \
                    E::C => { \"a-two\" }\n        }\n    }\n}\nconst X: &str = \"a-three\";\n\
                    fn barcode() -> &'static str { \"a-four\" }\nfn code(line: &str) -> Option<usize> { at(\"a-five\") }\n\
                    trait T { fn code(&self) -> &'static str; }\n\
                    fn alert_code(n: u8) -> &'static str { match n { 0 => concat!(\"alert:\", $name), _ => \"alert:c\" } }\n\n\
                    #[cfg(test)]\nmod tests { fn code() -> &'static str { \"a-six\" } }\n";
        assert_eq!(codes(text), set(&["a-one", "a-two", "alert:NAME"]));
    }

    #[test]
    fn codes_are_found_beside_reasons_of_the_kernel_programs() {
        let text = "match reason {\n REASON_ONE => (\n Culprit::Host,\n \"k-one\",\n \"a sentence\",\n ),\n\
                    REASON_TWO => (Culprit::Policy, \"k-two\", \"word\"), }\nrecord(Decision::Bypassed, None, \"passed\");\n\
                    protocol(6, \"tcp\");\n";
        assert_eq!(codes(text), set(&["k-one", "k-two", "passed"]));
        assert!(codes(&text.replace("REASON_", "OTHER_")).is_empty());
    }

    #[test]
    fn a_code_without_a_row_and_a_row_without_a_code_are_told() {
        let page = "| name | of |\n|---|---|\n| `else` | x |\n\n| code | culprit | means | do |\n|---|---|---|---|\n\
                    | `one` | host | m | d |\n| `two` | host | m | d |\n";
        assert!(differences(&set(&["one", "two"]), page).is_empty());
        assert_eq!(differences(&set(&["one", "two", "three"]), page), ["three: it has no row"]);
        assert_eq!(differences(&set(&["one"]), page), ["line 8: two: no code says this"]);
        let page = format!("{page}| `one` | host | again | d |\n| `three` | host | m | |\n");
        assert_eq!(differences(&set(&["one", "two", "three"]), &page).len(), 2);
    }
}
