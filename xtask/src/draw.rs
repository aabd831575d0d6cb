//! The verb `draw`: the pictures of the documentation, drawn from text in the tree.
//!
//! Each `docs/pictures/NAME.txt` says what is in a picture and where (docs/pictures/README.md has the form);
//! `docs/pictures/NAME.svg` is what it gives. Both are committed, and `cargo xtask check` fails where they differ.
//!
//! *Invariant:* the same text gives the same bytes; a picture in which something lies over something else is not drawn.

mod overlap;
mod picture;
mod svg;

use std::fs;
use std::path::{Path, PathBuf};

use crate::run::{During, Fallible, root};
use picture::Picture;

/// Draws all pictures anew.
pub fn verb(words: &[String]) -> Fallible {
    if !words.is_empty() {
        return Err("usage: cargo xtask draw".into());
    }
    let mut problems = Vec::new();
    for (path, text) in texts()? {
        let drawn = path.with_extension("svg");
        match draw(&path, &text) {
            Ok(svg) => {
                fs::write(&drawn, svg).during(drawn.display())?;
                println!("  {}", shown(&drawn));
            }
            Err(failure) => problems.push(failure.to_string()),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n").into()) }
}

/// What is wrong with the committed pictures: one line each.
pub fn stale() -> Fallible<Vec<String>> {
    let mut found = Vec::new();
    for (path, text) in texts()? {
        let drawn = path.with_extension("svg");
        match draw(&path, &text) {
            Ok(svg) if fs::read_to_string(&drawn).is_ok_and(|committed| committed == svg) => {}
            Ok(_) => found.push(format!("{}: not what its text gives; run `cargo xtask draw`", shown(&drawn))),
            Err(failure) => found.push(failure.to_string()),
        }
    }
    for path in files("svg")? {
        if !path.with_extension("txt").is_file() {
            found.push(format!("{}: there is no text that it is drawn from", shown(&path)));
        }
    }
    Ok(found)
}

fn draw(path: &Path, text: &str) -> Fallible<String> {
    let picture = Picture::read(text);
    let problems = match &picture {
        Ok(picture) => overlap::problems(picture),
        Err(problem) => vec![problem.clone()],
    };
    match picture {
        Ok(picture) if problems.is_empty() => Ok(svg::written(&picture, &shown(path))),
        _ => Err(problems.iter().map(|what| format!("{}:{what}", shown(path))).collect::<Vec<_>>().join("\n").into()),
    }
}

fn texts() -> Fallible<Vec<(PathBuf, String)>> {
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).during(path.display())?;
        Ok((path, text))
    };
    files("txt")?.into_iter().map(read).collect()
}

/// The files of docs/pictures with this extension, in order.
fn files(extension: &str) -> Fallible<Vec<PathBuf>> {
    let folder = root().join("docs/pictures");
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder).during(folder.display())? {
        let path = entry.during(folder.display())?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A path from the root of the repository.
fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(text: &str) -> String {
        match draw(Path::new("picture.txt"), text) {
            Ok(svg) => svg,
            Err(failure) => failure.to_string(),
        }
    }

    #[test]
    fn committed_pictures_are_what_their_texts_give() {
        assert_eq!(stale().map_err(|failure| failure.to_string()), Ok(Vec::new()));
        assert!(texts().is_ok_and(|texts| texts.len() >= 3));
    }

    #[test]
    fn a_picture_has_its_boxes_arrows_and_words() {
        let svg = drawn(
            "size 400 100\ntitle Two <programs>\ndescription One speaks.\n\
             box a 10 40 80 40 program : curl\nbox b 300 40 80 40 agent : agent | seals\n\
             arrow a.right -> b.left plain : bytes & more\n",
        );
        for part in ["viewBox=\"0 0 400 100\"", ">Two &lt;programs&gt;</title>", ">seals<", "bytes &amp; more"] {
            assert!(svg.contains(part), "{part} is not in\n{svg}");
        }
        assert_eq!(svg.matches("<polygon").count(), 1);
    }

    #[test]
    fn a_line_that_is_not_understood_is_named_with_what_to_write() {
        let head = "size 400 100\ntitle T\ndescription D.\n";
        for (line, expected) in [
            ("circle 1 2 3", "picture.txt:4: no statement `circle`; there are size, title, description, lane, box"),
            ("box a 1 2 3 x program : A", "picture.txt:4: `x` is not a number"),
            ("box a 1 2 30 30 prgram : A", "picture.txt:4: no kind `prgram`; there are program, kernel"),
            ("arrow a.right -> b.left plain", "picture.txt:4: there is no box `a` above"),
        ] {
            let answer = drawn(&format!("{head}{line}\n"));
            assert!(answer.starts_with(expected), "{answer}");
        }
        assert!(drawn("size 901 100\ntitle T\ndescription D.\n").contains("at most 900 wide"));
        assert!(drawn("title T\ndescription D.\n").contains("says no size"));
    }

    #[test]
    fn what_lies_over_something_else_is_refused() {
        let head = "size 400 200\ntitle T\ndescription D.\nbox a 20 60 80 40 program : A\n";
        for (lines, expected) in [
            ("box b 90 60 80 40 program : B", ":5: box `b` lies over box `a`"),
            ("box b 150 60 20 40 program : long words", ":5: `long words` is wider than box `b`"),
            ("box b 350 60 80 40 program : B", ":5: box `b` is not inside the picture"),
            ("note 30 80 : words", ":5: `words` lies over box `a`"),
            ("note 200 80 : words\nnote 210 82 : others", ":6: `others` lies over `words`"),
            (
                "box b 150 60 80 40 program : B\nbox c 300 60 80 40 program : C\narrow a.right -> c.left plain",
                ":7: the arrow crosses box `b`",
            ),
            ("box c 300 60 80 40 program : C\nnote 150 84 : words\narrow a.right -> c.left plain", ":7: the arrow cro"),
            ("lane 60 40 200 100 host : L", ":5: box `a` is half inside lane `L`"),
        ] {
            let answer = drawn(&format!("{head}{lines}\n"));
            assert!(answer.contains(expected), "{lines}\n{answer}");
        }
    }
}
