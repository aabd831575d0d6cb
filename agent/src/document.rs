//! TOML files with positions: what the policy and the configuration are read through.
//!
//! Text goes in; tables come out whose every value knows its file and line, and every problem is put on one list, so
//! that a person sees all of them at once, one a line: `file:line: what; what to write instead`.
//!
//! *Invariant:* a key that nobody asked for is a problem, never ignored.

use bunter_identity::trust::files::{Exposure, Guard};
use rustix::fs::{Mode, OFlags};
use std::{collections::BTreeMap, fmt, fs::Metadata, io::Read, os::unix::fs::MetadataExt, path::Path, sync::Arc};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// Where something is written. Line 0 is the file as a whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceLocation {
    /// Path of the file, as shown to people.
    pub file: Arc<str>,
    /// Line, from 1.
    pub line: usize,
}

/// One thing that is wrong, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where.
    pub place: SourceLocation,
    /// What is wrong.
    pub what: String,
    /// What to do about it.
    pub instead: String,
}

/// All that is wrong with some files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

/// A value and where it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At<T> {
    /// Where.
    pub place: SourceLocation,
    /// What.
    pub value: T,
}

/// One parsed file.
pub struct Document<'t> {
    root: Spanned<DeTable<'t>>,
    lines: Lines,
}

/// One table of a file, with the keys that it may have.
pub struct Table<'d> {
    /// Where it begins.
    pub place: SourceLocation,
    name: String,
    lines: &'d Lines,
    values: BTreeMap<&'d str, &'d Spanned<DeValue<'d>>>,
}

/// A value that may be written as a string or as an inline table.
pub enum TextOrTable<'d> {
    /// A string.
    Text(At<&'d str>),
    /// A table.
    Table(Table<'d>),
}

/// What a text is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be obeyed: nobody but root, and whoever runs this, may be able to write it.
    InForce,
    /// To be looked at: it may be anybody's.
    Inspection,
}

/// Could this file or directory have been written by somebody who must not? Gives what is wrong, and what to do.
pub fn exposed(path: &Path, metadata: &Metadata, purpose: Purpose, what: &str) -> Option<(String, String)> {
    let guard = match purpose {
        Purpose::InForce => Guard::Group,
        Purpose::Inspection => Guard::Inspected,
    };
    let path = path.display();
    Some(match guard.exposure(metadata)? {
        Exposure::Owner(user) => {
            (format!("user {user} owns {what} and can write to it"), format!("run: chown root {path}"))
        }
        Exposure::Mode(bits) if bits & 0o002 != 0 => {
            (format!("everybody can write to {what}"), format!("run: chmod o-w {path}"))
        }
        Exposure::Mode(_) => {
            (format!("group {} can write to {what}", metadata.gid()), format!("run: chmod g-w {path}"))
        }
    })
}

/// Reads a file that says what the agent does; the error is what is wrong with it and what to do.
///
/// Opens first and looks then, so that what is checked is what is read. Non-blocking: a pipe must not hold up a start.
pub fn read(path: &Path, purpose: Purpose) -> Result<String, (String, String)> {
    let unreadable = |error: std::io::Error| {
        let instead = match error.kind() {
            std::io::ErrorKind::NotFound => "write it, or name another file",
            _ => "make it readable for root, or remove it",
        };
        (format!("the file cannot be read ({error})"), instead.to_owned())
    };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let descriptor = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| unreadable(error.into()))?;
    let file = std::fs::File::from(descriptor);
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(("this is not a regular file".into(), "give it another name, or write a file".into()));
    }
    if let Some(problem) = exposed(path, &metadata, purpose, "this file") {
        return Err(problem);
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE) {
        return Err((format!("the file is larger than {} MiB", MAX_FILE >> 20), "split it".into()));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line =
            error.as_bytes().iter().take(error.utf8_error().valid_up_to()).filter(|byte| **byte == b'\n').count() + 1;
        (format!("line {line} is not UTF-8 text"), "write it in UTF-8".into())
    })
}

/// Cuts a long text where a line begins with `[[`, so that it need not be in memory as one tree: a tree takes twenty times
/// as much as its text. With each part comes how many lines there are in front of it. Such a line may also stand within a
/// string or an array: then the part in front of it does not parse, and the text has to be parsed as a whole.
pub fn parts(text: &str) -> impl Iterator<Item = (usize, &str)> {
    /// Bytes after which the next such line begins a part.
    const PART: usize = 256 << 10;
    let (mut rest, mut line) = (text, 0);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let from = (PART..rest.len()).find(|at| rest.is_char_boundary(*at));
        let cut = from.and_then(|from| Some(from + rest.get(from..)?.find("\n[[")? + 1)).unwrap_or(rest.len());
        let (part, after) = rest.split_at(cut);
        let before = line;
        rest = after;
        line += part.bytes().filter(|byte| *byte == b'\n').count();
        Some((before, part))
    })
}

impl<'t> Document<'t> {
    /// Parses a whole file. A syntax error is a problem, and then there is no document.
    pub fn parse(file: &Arc<str>, text: &'t str, problems: &mut Problems) -> Option<Self> {
        Self::parse_part(file, 0, text, problems)
    }

    /// Parses one of the [`parts`] of a file, in front of which there are so many lines.
    pub fn parse_part(file: &Arc<str>, before: usize, text: &'t str, problems: &mut Problems) -> Option<Self> {
        let lines = Lines::new(file, before, text);
        match DeTable::parse(text) {
            Ok(root) => Some(Self { root, lines }),
            Err(error) => {
                let at = error.span().map_or(text.len(), |span| span.start);
                let what = error.message().lines().collect::<Vec<_>>().join(", ");
                let unfinished = text.get(at..).is_none_or(|rest| rest.trim().is_empty());
                let instead = if unfinished {
                    "the file ends too early: write the rest of it"
                } else {
                    "write `key = value` lines under [[table]] headers, texts in double quotes"
                };
                problems.add(&lines.place(at), format!("not valid TOML: {what}"), instead);
                None
            }
        }
    }

    /// The whole file as a table.
    pub fn root<'d>(&'d self, known: &[&'static str], problems: &mut Problems) -> Table<'d> {
        Table::new(
            self.root.get_ref(),
            SourceLocation { line: 0, ..self.lines.place(0) },
            "the file".into(),
            &self.lines,
            known,
            problems,
        )
    }
}

impl<'d> Table<'d> {
    fn new(
        table: &'d DeTable<'d>,
        place: SourceLocation,
        name: String,
        lines: &'d Lines,
        known: &[&'static str],
        problems: &mut Problems,
    ) -> Self {
        let mut values = BTreeMap::new();
        for (key, value) in table {
            let written: &str = key.get_ref();
            if known.contains(&written) {
                values.insert(written, value);
            } else {
                let place = lines.place(key.span().start);
                let instead = match nearest(written, known.iter().copied()) {
                    Some(near) => format!("write `{near}`"),
                    None => format!("write one of {}", list(known)),
                };
                problems.add(&place, format!("unknown key `{}` in {name}", clip(written)), instead);
            }
        }
        Self { place, name, lines, values }
    }

    /// The text of a key, if it is there.
    pub fn text(&self, key: &'static str, problems: &mut Problems) -> Option<At<&'d str>> {
        let value = self.values.get(key)?;
        self.as_text(key, value, problems)
    }

    /// The text of a key that has to be there. `example` is a whole line to write.
    pub fn required_text(&self, key: &'static str, example: &str, problems: &mut Problems) -> Option<At<&'d str>> {
        self.require(key, example, problems);
        self.text(key, problems)
    }

    /// Reports a key that has to be there and is not.
    pub fn require(&self, key: &'static str, example: &str, problems: &mut Problems) {
        if !self.values.contains_key(key) {
            problems.add(&self.place, format!("{} has no `{key}`", self.name), format!("write {example}"));
        }
    }

    /// Is the key there, whatever its value?
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Where the value of a key is written; where the table begins, if it is not there.
    pub fn place_of(&self, key: &str) -> SourceLocation {
        self.values.get(key).map_or_else(|| self.place.clone(), |value| self.lines.place(value.span().start))
    }

    /// The yes or no of a key.
    pub fn boolean(&self, key: &'static str, problems: &mut Problems) -> Option<At<bool>> {
        let value = self.values.get(key)?;
        let place = self.lines.place(value.span().start);
        match value.get_ref() {
            DeValue::Boolean(value) => Some(At { place, value: *value }),
            other => {
                problems.add(&place, wrong_type(key, "true or false", other), "write true or false, without quotes");
                None
            }
        }
    }

    /// The whole number of a key, between two bounds.
    pub fn number(&self, key: &'static str, least: u64, most: u64, problems: &mut Problems) -> Option<At<u64>> {
        let value = self.values.get(key)?;
        self.as_number(key, value, least, most, problems)
    }

    /// The texts of a list, if it is there.
    pub fn texts(&self, key: &'static str, problems: &mut Problems) -> Option<Vec<At<&'d str>>> {
        let values = self.list(key, "[\"...\"]", problems)?;
        Some(values.iter().filter_map(|value| self.as_text(key, value, problems)).collect())
    }

    /// The whole numbers of a list, if it is there.
    pub fn numbers(&self, key: &'static str, least: u64, most: u64, problems: &mut Problems) -> Option<Vec<At<u64>>> {
        let values = self.list(key, &format!("[{most}]"), problems)?;
        Some(values.iter().filter_map(|value| self.as_number(key, value, least, most, problems)).collect())
    }

    /// The tables under `[[key]]` headers.
    pub fn tables(&self, key: &'static str, known: &[&'static str], problems: &mut Problems) -> Vec<Table<'d>> {
        let Some(value) = self.values.get(key) else { return Vec::new() };
        let place = self.lines.place(value.span().start);
        let instead = format!("write [[{key}]], with two brackets");
        match value.get_ref() {
            DeValue::Array(values) => {
                let mut tables = Vec::new();
                for value in values {
                    let place = self.lines.place(value.span().start);
                    match value.get_ref() {
                        DeValue::Table(table) => {
                            tables.push(Table::new(table, place, format!("[[{key}]]"), self.lines, known, problems));
                        }
                        other => problems.add(&place, wrong_type(key, "a table", other), instead.clone()),
                    }
                }
                tables
            }
            other => {
                problems.add(&place, wrong_type(key, "a list of tables", other), instead);
                Vec::new()
            }
        }
    }

    /// The table under a `[key]` header, if it is there.
    pub fn table(&self, key: &'static str, known: &[&'static str], problems: &mut Problems) -> Option<Table<'d>> {
        let value = self.values.get(key)?;
        let place = self.lines.place(value.span().start);
        match value.get_ref() {
            DeValue::Table(table) => Some(Table::new(table, place, format!("[{key}]"), self.lines, known, problems)),
            other => {
                problems.add(&place, wrong_type(key, "a table", other), format!("write [{key}], with one bracket"));
                None
            }
        }
    }

    /// A key whose value is a text or an inline table.
    pub fn text_or_table(
        &self,
        key: &'static str,
        known: &[&'static str],
        problems: &mut Problems,
    ) -> Option<TextOrTable<'d>> {
        match self.values.get(key)?.get_ref() {
            DeValue::Table(_) => self.table(key, known, problems).map(TextOrTable::Table),
            _ => self.text(key, problems).map(TextOrTable::Text),
        }
    }

    /// A key whose value is a text or a whole number: the number comes back as its digits.
    pub fn text_or_digits(&self, key: &'static str, problems: &mut Problems) -> Option<At<String>> {
        let value = self.values.get(key)?;
        if let DeValue::Integer(number) = value.get_ref() {
            return Some(At { place: self.lines.place(value.span().start), value: number.as_str().to_owned() });
        }
        self.text(key, problems).map(|text| At { place: text.place, value: text.value.to_owned() })
    }

    fn list(&self, key: &'static str, example: &str, problems: &mut Problems) -> Option<&'d toml::de::DeArray<'d>> {
        let value = *self.values.get(key)?;
        match value.get_ref() {
            DeValue::Array(values) => Some(values),
            other => {
                let place = self.lines.place(value.span().start);
                problems.add(&place, wrong_type(key, "a list", other), format!("write {key} = {example}"));
                None
            }
        }
    }

    fn as_text(
        &self,
        key: &'static str,
        value: &'d Spanned<DeValue<'d>>,
        problems: &mut Problems,
    ) -> Option<At<&'d str>> {
        let place = self.lines.place(value.span().start);
        match value.get_ref() {
            DeValue::String(text) => Some(At { place, value: text }),
            other => {
                let instead = "put it in double quotes, with its unit if it has one";
                problems.add(&place, wrong_type(key, "a text", other), instead);
                None
            }
        }
    }

    fn as_number(
        &self,
        key: &'static str,
        value: &'d Spanned<DeValue<'d>>,
        least: u64,
        most: u64,
        problems: &mut Problems,
    ) -> Option<At<u64>> {
        let place = self.lines.place(value.span().start);
        let instead = format!("write a whole number from {least} to {most}, without quotes");
        match value.get_ref() {
            DeValue::Integer(number) => match u64::from_str_radix(number.as_str(), number.radix()) {
                Ok(value) if (least..=most).contains(&value) => Some(At { place, value }),
                _ => {
                    problems.add(&place, format!("`{key}` cannot be {}", clip(number.as_str())), instead);
                    None
                }
            },
            other => {
                problems.add(&place, wrong_type(key, "a whole number", other), instead);
                None
            }
        }
    }
}

impl Problems {
    /// Puts one more on the list.
    pub fn add(&mut self, place: &SourceLocation, what: impl Into<String>, instead: impl Into<String>) {
        self.0.push(Problem { place: place.clone(), what: what.into(), instead: instead.into() });
    }

    /// Nothing is wrong so far.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sorts by file and line, so that the list reads like the files.
    pub fn sorted(mut self) -> Self {
        self.0.sort();
        self.0.dedup();
        self
    }
}

/// The known word that somebody who wrote `written` most likely meant.
pub fn nearest<'k>(written: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    // The cost of comparing is the product of the lengths: what is much longer than every word is no typing error.
    if written.len() > 2 * bunter_identity::spiffe::MAX_TRUST_DOMAIN {
        return None;
    }
    let close = |word: &str| (word.len().max(written.len()) / 3).max(1);
    known
        .into_iter()
        .filter(|word| word.len().abs_diff(written.len()) <= close(word))
        .map(|word| (strsim::osa_distance(written, word), word))
        .filter(|(distance, word)| *distance <= close(word))
        .min()
        .map(|(_, word)| word)
}

/// Words for a sentence: `a`, `b` or `c`.
pub fn list(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => format!("`{one}`"),
        [front @ .., last] => {
            let front: Vec<_> = front.iter().map(|word| format!("`{word}`")).collect();
            format!("{} or `{last}`", front.join(", "))
        }
    }
}

/// What was written, short enough and harmless enough for one line of an error.
pub fn clip(text: &str) -> String {
    const MOST: usize = 120;
    let mut clipped: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    if text.chars().nth(MOST).is_some() {
        clipped.push('…');
    }
    clipped.replace("\\\"", "\"").replace("\\'", "'")
}

fn wrong_type(key: &str, wanted: &str, found: &DeValue<'_>) -> String {
    let found = match found {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    format!("`{key}` must be {wanted}, and this is {found}")
}

/// Byte offsets to lines.
struct Lines {
    file: Arc<str>,
    /// Lines in front of the text.
    before: usize,
    starts: Vec<usize>,
}

impl Lines {
    fn new(file: &Arc<str>, before: usize, text: &str) -> Self {
        let after_breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self { file: file.clone(), before, starts: std::iter::once(0).chain(after_breaks).collect() }
    }

    fn place(&self, offset: usize) -> SourceLocation {
        SourceLocation {
            file: self.file.clone(),
            line: self.before + self.starts.partition_point(|start| *start <= offset),
        }
    }
}

impl fmt::Display for SourceLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.file),
            line => write!(f, "{}:{line}", self.file),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.place, self.what, self.instead)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> String {
        let mut problems = Problems::default();
        if let Some(document) = Document::parse(&"f.toml".into(), text, &mut problems) {
            let root = document.root(&["name", "count", "list", "rule"], &mut problems);
            root.required_text("name", "name = \"...\"", &mut problems);
            root.number("count", 1, 64, &mut problems);
            root.texts("list", &mut problems);
            for rule in root.tables("rule", &["from", "to"], &mut problems) {
                rule.text("from", &mut problems);
            }
        }
        problems.sorted().to_string()
    }

    #[test]
    fn every_problem_is_listed_with_its_line_and_what_to_write() {
        assert_eq!(problems("name = \"a\"\ncount = 3\n"), "");
        assert_eq!(
            problems(
                "nmae = \"a\"\ncount = 65\nlist = \"x\"\n\n[[rule]]\nfrm = 1\nquite_other = 2\n[[rule]]\nfrom = 5\n"
            ),
            "f.toml: the file has no `name`; write name = \"...\"\n\
             f.toml:1: unknown key `nmae` in the file; write `name`\n\
             f.toml:2: `count` cannot be 65; write a whole number from 1 to 64, without quotes\n\
             f.toml:3: `list` must be a list, and this is a text; write list = [\"...\"]\n\
             f.toml:6: unknown key `frm` in [[rule]]; write `from`\n\
             f.toml:7: unknown key `quite_other` in [[rule]]; write one of `from` or `to`\n\
             f.toml:9: `from` must be a text, and this is a whole number; put it in double quotes, with its unit if it has one"
        );
    }

    #[test]
    fn one_bracket_instead_of_two_is_explained() {
        assert_eq!(
            problems("name = \"a\"\n[rule]\nfrom = \"x\"\n"),
            "f.toml:2: `rule` must be a list of tables, and this is a table; write [[rule]], with two brackets"
        );
    }

    #[test]
    fn a_half_written_file_is_one_problem() {
        for text in ["name = ", "name = \"a", "[[rule", "list = [\"a\",", "name"] {
            let found = problems(text);
            assert_eq!(found.lines().count(), 1, "{found}");
            assert!(found.starts_with("f.toml:1: not valid TOML: "), "{found}");
        }
    }

    #[test]
    fn what_is_quoted_is_short_and_has_no_control_characters() {
        assert_eq!(clip("a\u{1b}[2Jb\n\"q\""), "a\\u{1b}[2Jb\\n\"q\"");
        assert_eq!(clip(&"x".repeat(500)).chars().count(), 121);
    }
}
