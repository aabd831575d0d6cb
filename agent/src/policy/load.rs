//! Reading a policy directory: the one place of the policy that does I/O.
//!
//! A directory comes in, the texts of its files go to `check`, in name order.
//!
//! *Invariant:* what others on the host could have written is not policy: a directory or a file that somebody beside root
//! can write to is refused.

use super::{Accounts, Policy, Rejected, Source, check, language};
use crate::document::{self, Problems, Purpose, SourceLocation};
use std::path::Path;

/// Most files of one directory.
const MAX_FILES: usize = 4096;

pub(super) fn load(directory: &Path, accounts: &Accounts, purpose: Purpose) -> Result<Policy, Rejected> {
    let shown = directory.display().to_string();
    let mut problems = Problems::default();
    let sources = read(directory, &shown, purpose, &mut problems);
    if problems.is_empty() {
        return check::check(&shown, &sources, accounts);
    }
    // Some file could not be read; what is wrong with the others is reported at the same time.
    let mut statements = language::Statements::default();
    for source in &sources {
        statements.read(&source.file, &source.text, accounts, &mut problems);
    }
    Err(Rejected { problems: problems.sorted() })
}

fn read(directory: &Path, shown: &str, purpose: Purpose, problems: &mut Problems) -> Vec<Source> {
    let whole = SourceLocation { file: shown.into(), line: 0 };
    let names = match names(directory, problems) {
        Ok(names) => names,
        Err(error) => {
            let instead = "make the directory, with a file in it that says trust_domain = \"example.org\"";
            problems.add(&whole, format!("the policy directory cannot be read ({error})"), instead);
            return Vec::new();
        }
    };
    match std::fs::metadata(directory) {
        Ok(metadata) => {
            if let Some((what, instead)) = document::exposed(directory, &metadata, purpose, "the policy directory") {
                problems.add(&whole, what, instead);
            }
        }
        Err(error) => {
            problems.add(&whole, format!("the policy directory cannot be read ({error})"), "check its permissions")
        }
    }
    if names.is_empty() {
        let instead = "start with a file DOMAIN.toml in it that says trust_domain = \"example.org\"";
        problems.add(&whole, "the policy directory has no *.toml file", instead);
    }
    if names.len() > MAX_FILES {
        let what = format!("the policy directory has {} files, and {MAX_FILES} are the most", names.len());
        problems.add(&whole, what, "join some of them");
        return Vec::new();
    }
    let mut sources = Vec::with_capacity(names.len());
    for name in names {
        let path = directory.join(&name);
        let place = SourceLocation { file: path.display().to_string().into(), line: 0 };
        match document::read(&path, purpose) {
            Ok(text) => sources.push(Source { file: place.file, text }),
            Err((what, instead)) => problems.add(&place, what, instead),
        }
    }
    sources
}

/// The `*.toml` files by name. Hidden files are left out: they belong to editors and package managers.
///
/// A name that was probably meant to be one of them is a problem: the rules in that file would be missing unnoticed.
fn names(directory: &Path, problems: &mut Problems) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        // A name that is not UTF-8 is kept with a replacement character; opening it then says so.
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        if name.ends_with(".toml") {
            names.push(name);
        } else if name.trim_end().to_lowercase().ends_with(".toml") {
            let place = SourceLocation { file: directory.join(&name).display().to_string().into(), line: 0 };
            let instead = "let its name end in exactly .toml, or in something else altogether";
            problems.add(&place, format!("`{}` is almost the name of a policy file", name.escape_debug()), instead);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn refused(directory: &Path) -> String {
        let error = load(directory, &Accounts::default(), Purpose::InForce).unwrap_err();
        error.to_string().replace(&directory.display().to_string(), "DIR")
    }

    #[test]
    fn an_empty_or_missing_directory_says_how_to_start() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(
            refused(directory.path()),
            "DIR: the policy directory has no *.toml file; \
             start with a file DOMAIN.toml in it that says trust_domain = \"example.org\""
        );
        assert_eq!(
            refused(&directory.path().join("none")),
            "DIR: the policy directory cannot be read (No such file or directory (os error 2)); \
             make the directory, with a file in it that says trust_domain = \"example.org\""
        );
    }

    #[test]
    fn files_are_read_in_name_order_and_others_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in
            [("b.toml", "preexisting = 2"), ("a.toml", "preexisting = 1"), (".c.toml", "x"), ("d.txt", "x")]
        {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let mut problems = Problems::default();
        let sources = read(directory.path(), "DIR", Purpose::InForce, &mut problems);
        assert!(problems.is_empty(), "{problems}");
        assert_eq!(
            sources.iter().map(|source| source.text.as_str()).collect::<Vec<_>>(),
            ["preexisting = 1", "preexisting = 2"]
        );
    }

    #[test]
    fn a_file_that_is_almost_named_right_is_not_left_out() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.toml"), "trust_domain = \"example.org\"\n").unwrap();
        for name in ["b.TOML", "b.Toml", "b.toml ", "b.toml\n"] {
            let file = directory.path().join(name);
            fs::write(&file, "").unwrap();
            let error = refused(directory.path());
            assert!(error.contains("is almost the name of a policy file"), "{error}");
            fs::remove_file(file).unwrap();
        }
        for name in ["b.toml.bak", "b.toml~", "b.tom", "b", ".b.TOML"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        assert!(load(directory.path(), &Accounts::default(), Purpose::InForce).is_ok());
    }

    #[test]
    fn nothing_of_a_file_hides_behind_an_unusual_line_end() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.toml");
        let text = "trust_domain = \"example.org\" # ours\n# more\n[[unknown]]\n";
        for text in [
            text.replace('\n', "\r"),
            text.replacen('\n', "\r", 1),
            text.replacen("more\n", "more\r", 1),
            text.replace('\n', "\0"),
            text.replace('\n', "\u{b}"),
            text.replace('\n', "\r\n"),
            format!("\u{feff}{text}"),
        ] {
            fs::write(&file, &text).unwrap();
            assert!(load(directory.path(), &Accounts::default(), Purpose::InForce).is_err(), "{text:?}");
        }
        for text in ["trust_domain = \"example.org\"\r\n# more\r\n", "\u{feff}trust_domain = \"example.org\"\n"] {
            fs::write(&file, text).unwrap();
            assert_eq!(load(directory.path(), &Accounts::default(), Purpose::InForce).map(drop), Ok(()), "{text:?}");
        }
    }

    #[test]
    fn what_everybody_can_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.toml");
        fs::write(&file, "trust_domain = \"example.org\"\n").unwrap();
        assert!(load(directory.path(), &Accounts::default(), Purpose::InForce).is_ok());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o646)).unwrap();
        assert_eq!(
            refused(directory.path()),
            "DIR/a.toml: everybody can write to this file; run: chmod o-w DIR/a.toml"
        );
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(refused(directory.path()), "DIR: everybody can write to the policy directory; run: chmod o-w DIR");
    }

    #[test]
    fn what_another_user_or_group_could_have_written_is_looked_at_and_not_obeyed() {
        let directory = tempfile::tempdir().unwrap();
        let (file, whole) = (directory.path().join("a.toml"), directory.path().to_owned());
        fs::write(&file, "trust_domain = \"example.org\"\n").unwrap();
        let give = |path: &Path, user: u32, group: u32| std::os::unix::fs::chown(path, Some(user), Some(group));
        if give(&file, 65534, 0).is_err() {
            eprintln!("SKIPPED (not root): what_another_user_or_group_could_have_written_is_looked_at_and_not_obeyed");
            return;
        }
        assert_eq!(
            refused(&whole),
            "DIR/a.toml: user 65534 owns this file and can write to it; run: chown root DIR/a.toml"
        );
        assert!(load(&whole, &Accounts::default(), Purpose::Inspection).is_ok());
        give(&file, 0, 65534).unwrap();
        assert!(load(&whole, &Accounts::default(), Purpose::InForce).is_ok(), "the group may only read it");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
        assert_eq!(refused(&whole), "DIR/a.toml: group 65534 can write to this file; run: chmod g-w DIR/a.toml");
        give(&file, 0, 0).unwrap();
        assert!(load(&whole, &Accounts::default(), Purpose::InForce).is_ok(), "root's group is root");
        give(&whole, 65534, 0).unwrap();
        assert_eq!(
            refused(&whole),
            "DIR: user 65534 owns the policy directory and can write to it; run: chown root DIR"
        );
    }

    #[test]
    fn pipes_directories_and_other_encodings_are_refused_without_waiting() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("a.toml")).unwrap();
        fs::write(directory.path().join("b.toml"), b"# first\n# \xff\n").unwrap();
        let pipe = directory.path().join("c.toml");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::from(0o600), 0)
            .unwrap();
        fs::write(directory.path().join("d.toml"), "trust_domian = \"example.org\"\n").unwrap();
        assert_eq!(
            refused(directory.path()),
            "DIR/a.toml: this is not a regular file; give it another name, or write a file\n\
             DIR/b.toml: line 2 is not UTF-8 text; write it in UTF-8\n\
             DIR/c.toml: this is not a regular file; give it another name, or write a file\n\
             DIR/d.toml:1: unknown key `trust_domian` in the file; write `trust_domain`"
        );
    }
}
