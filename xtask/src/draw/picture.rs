//! A picture as its text says it: lanes, boxes, arrows, notes and keys, with the places of all words.
//!
//! *Invariant:* pure; no file is read here. Every problem begins with its line number.

/// A whole picture.
pub struct Picture {
    pub width: f64,
    pub height: f64,
    pub title: String,
    pub description: String,
    pub lanes: Vec<Lane>,
    pub boxes: Vec<Block>,
    pub arrows: Vec<Arrow>,
    pub notes: Vec<Note>,
    pub keys: Vec<Key>,
}

/// A region that holds boxes; its name stands at its upper left.
pub struct Lane {
    pub line: usize,
    pub area: Area,
    pub kind: Kind,
    pub words: Vec<Words>,
}

pub struct Block {
    pub line: usize,
    pub name: String,
    pub area: Area,
    pub kind: Kind,
    pub words: Vec<Words>,
}

pub struct Arrow {
    pub line: usize,
    /// Numbers of the boxes at its ends.
    pub ends: [usize; 2],
    pub both_ways: bool,
    pub kind: Way,
    /// Corners, ends included. All parts are upright or level.
    pub points: Vec<Point>,
    pub words: Vec<Words>,
}

pub struct Note {
    pub line: usize,
    pub words: Vec<Words>,
}

/// A piece of line with what such a line means.
pub struct Key {
    pub line: usize,
    pub from: Point,
    pub to: Point,
    pub kind: Way,
    pub words: Words,
}

/// One line of text.
pub struct Words {
    pub text: String,
    pub size: f64,
    pub bold: bool,
    pub anchor: Anchor,
    pub at: Point,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

#[derive(Clone, Copy)]
pub struct Point {
    pub x: f64,
    pub y: f64,
}

#[derive(Clone, Copy)]
pub struct Area {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

/// What a lane or a box is.
#[derive(Clone, Copy)]
pub enum Kind {
    Program,
    Kernel,
    Agent,
    Secret,
    Outside,
    Host,
    Wire,
}

/// What goes along a line.
#[derive(Clone, Copy)]
pub enum Way {
    Plain,
    Tls,
    Control,
    Refused,
}

const KINDS: [(&str, Kind); 7] = [
    ("program", Kind::Program),
    ("kernel", Kind::Kernel),
    ("agent", Kind::Agent),
    ("secret", Kind::Secret),
    ("outside", Kind::Outside),
    ("host", Kind::Host),
    ("wire", Kind::Wire),
];
const WAYS: [(&str, Way); 4] =
    [("plain", Way::Plain), ("tls", Way::Tls), ("control", Way::Control), ("refused", Way::Refused)];
const STATEMENTS: &str = "size, title, description, lane, box, arrow, note, key";

const WIDEST: f64 = 900.0;
const FIRST_LINE: f64 = 13.0;
const OTHER_LINES: f64 = 11.5;
const LEADING: f64 = 15.0;
/// From the middle of a line of text to its baseline, in parts of its size.
const BASELINE: f64 = 0.35;

impl Picture {
    /// Reads a text, or says what is wrong with it: `LINE: what`.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut picture = Self {
            width: 0.0,
            height: 0.0,
            title: String::new(),
            description: String::new(),
            lanes: Vec::new(),
            boxes: Vec::new(),
            arrows: Vec::new(),
            notes: Vec::new(),
            keys: Vec::new(),
        };
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                let number = index + 1;
                picture.statement(number, line).map_err(|what| format!("{number}: {what}"))?;
            }
        }
        for (missing, what) in [
            (picture.width == 0.0, "size"),
            (picture.title.is_empty(), "title"),
            (picture.description.is_empty(), "description"),
        ] {
            if missing {
                return Err(format!("1: the text says no {what}"));
            }
        }
        Ok(picture)
    }

    fn statement(&mut self, line: usize, text: &str) -> Result<(), String> {
        let (statement, rest) = text.split_once(' ').unwrap_or((text, ""));
        let (head, words) = rest.split_once(" : ").unwrap_or((rest, ""));
        let mut parts = Parts(head.split_whitespace());
        match statement {
            "size" => {
                (self.width, self.height) = (parts.number()?, parts.number()?);
                if self.width > WIDEST {
                    return Err(format!("a picture is at most {WIDEST} wide"));
                }
            }
            "title" => {
                self.title = rest.to_owned();
                return Ok(());
            }
            "description" => {
                self.description = rest.to_owned();
                return Ok(());
            }
            "lane" => {
                let (area, kind) = (parts.area()?, parts.one_of("kind", &KINDS)?);
                self.lanes.push(Lane { line, area, kind, words: lane_words(area, words) });
            }
            "box" => {
                let name = parts.word()?.to_owned();
                let (area, kind) = (parts.area()?, parts.one_of("kind", &KINDS)?);
                if self.boxes.iter().any(|other| other.name == name) {
                    return Err(format!("there is a box `{name}` above"));
                }
                self.boxes.push(Block { line, name, area, kind, words: block_words(area, words) });
            }
            "arrow" => {
                let arrow = self.arrow(line, &mut parts, words)?;
                self.arrows.push(arrow);
            }
            "note" => {
                let at = parts.point()?;
                self.notes.push(Note { line, words: note_words(at, words) });
            }
            "key" => {
                let from = parts.point()?;
                let to = Point { x: from.x + 44.0, ..from };
                let at = Point { x: to.x + 8.0, y: from.y + OTHER_LINES * BASELINE };
                let kind = parts.one_of("kind", &WAYS)?;
                self.keys.push(Key { line, from, to, kind, words: small(words, Anchor::Start, at) });
            }
            other => return Err(format!("no statement `{other}`; there are {STATEMENTS}")),
        }
        parts.end()
    }

    /// `FROM.SIDE -> TO.SIDE KIND`, with `<->` for both ways, and `left` behind the kind for words on the left.
    fn arrow(&self, line: usize, parts: &mut Parts<'_>, words: &str) -> Result<Arrow, String> {
        let from = self.end(parts.word()?)?;
        let both_ways = match parts.word()? {
            "->" => false,
            "<->" => true,
            other => return Err(format!("`{other}` is neither -> nor <->")),
        };
        let to = self.end(parts.word()?)?;
        let kind = parts.one_of("kind", &WAYS)?;
        let left = parts.optional("left");
        let points = route(&from, &to);
        let words = arrow_words(&points, left, words);
        Ok(Arrow { line, ends: [from.number, to.number], both_ways, kind, points, words })
    }

    /// `NAME.SIDE`, or `NAME.SIDE+N` for N away from the middle of the side, to the right or down.
    fn end(&self, text: &str) -> Result<End, String> {
        let (name, side) = text.split_once('.').ok_or(format!("`{text}` is not NAME.SIDE"))?;
        let number = self.boxes.iter().position(|block| block.name == name);
        let number = number.ok_or(format!("there is no box `{name}` above"))?;
        let (side, offset) = match side.find(['+', '-']) {
            Some(at) => (&side[..at], parse(&side[at..])?),
            None => (side, 0.0),
        };
        let area = self.boxes[number].area;
        let (middle, level) = (area.middle(), matches!(side, "left" | "right"));
        let at = match side {
            "left" => Point { x: area.x, y: middle.y + offset },
            "right" => Point { x: area.right(), y: middle.y + offset },
            "top" => Point { x: middle.x + offset, y: area.y },
            "bottom" => Point { x: middle.x + offset, y: area.bottom() },
            other => return Err(format!("no side `{other}`; there are left, right, top, bottom")),
        };
        Ok(End { number, at, level })
    }
}

struct End {
    number: usize,
    at: Point,
    /// Does the line leave sideways?
    level: bool,
}

/// The corners of a line between two ends: straight, or with one or two right angles.
fn route(from: &End, to: &End) -> Vec<Point> {
    let (a, b) = (from.at, to.at);
    let corners = match (from.level, to.level) {
        _ if a.x == b.x || a.y == b.y => vec![],
        (true, true) => {
            let x = (a.x + b.x) / 2.0;
            vec![Point { x, y: a.y }, Point { x, y: b.y }]
        }
        (false, false) => {
            let y = (a.y + b.y) / 2.0;
            vec![Point { x: a.x, y }, Point { x: b.x, y }]
        }
        (true, false) => vec![Point { x: b.x, y: a.y }],
        (false, true) => vec![Point { x: a.x, y: b.y }],
    };
    [vec![a], corners, vec![b]].concat()
}

fn lane_words(area: Area, words: &str) -> Vec<Words> {
    let at = |index: usize| Point { x: area.x + 10.0, y: area.y + 18.0 + LEADING * index as f64 };
    lines(words).enumerate().map(|(index, text)| sized(text, index, Anchor::Start, at(index))).collect()
}

fn block_words(area: Area, words: &str) -> Vec<Words> {
    let count = lines(words).count() as f64;
    let middle = area.middle();
    let words = lines(words).enumerate().map(|(index, text)| {
        let y = middle.y + (index as f64 - (count - 1.0) / 2.0) * LEADING;
        let size = if index == 0 { FIRST_LINE } else { OTHER_LINES };
        sized(text, index, Anchor::Middle, Point { x: middle.x, y: y + size * BASELINE })
    });
    words.collect()
}

/// Above the longest part of a line if it is level, beside it if it is upright.
fn arrow_words(points: &[Point], left: bool, words: &str) -> Vec<Words> {
    let length = |part: &&[Point]| (part[0].x - part[1].x).abs() + (part[0].y - part[1].y).abs();
    let longest = points.windows(2).max_by(|a, b| length(a).total_cmp(&length(b)));
    let Some(&[a, b]) = longest else { return Vec::new() };
    let middle = Point { x: (a.x + b.x) / 2.0, y: (a.y + b.y) / 2.0 };
    let count = lines(words).count() as f64;
    let words = lines(words).enumerate().map(|(index, text)| {
        let index = index as f64;
        if a.y == b.y {
            let y = middle.y - 7.0 - (count - 1.0 - index) * LEADING;
            return small(text, Anchor::Middle, Point { x: middle.x, y });
        }
        let y = middle.y + (index - (count - 1.0) / 2.0) * LEADING + OTHER_LINES * BASELINE;
        let (anchor, x) = if left { (Anchor::End, middle.x - 8.0) } else { (Anchor::Start, middle.x + 8.0) };
        small(text, anchor, Point { x, y })
    });
    words.collect()
}

fn note_words(at: Point, words: &str) -> Vec<Words> {
    let place = |index: usize| Point { x: at.x, y: at.y + LEADING * index as f64 };
    lines(words).enumerate().map(|(index, text)| small(text, Anchor::Start, place(index))).collect()
}

fn lines(words: &str) -> impl Iterator<Item = &str> {
    words.split('|').map(str::trim).filter(|line| !line.is_empty())
}

/// The first line of a box or a lane is its name.
fn sized(text: &str, index: usize, anchor: Anchor, at: Point) -> Words {
    let bold = index == 0;
    Words { text: text.to_owned(), size: if bold { FIRST_LINE } else { OTHER_LINES }, bold, anchor, at }
}

fn small(text: &str, anchor: Anchor, at: Point) -> Words {
    Words { text: text.to_owned(), size: OTHER_LINES, bold: false, anchor, at }
}

impl Area {
    pub fn right(&self) -> f64 {
        self.x + self.width
    }

    pub fn bottom(&self) -> f64 {
        self.y + self.height
    }

    fn middle(&self) -> Point {
        Point { x: self.x + self.width / 2.0, y: self.y + self.height / 2.0 }
    }
}

/// The words of a statement before its colon.
struct Parts<'t>(std::str::SplitWhitespace<'t>);

impl<'t> Parts<'t> {
    fn word(&mut self) -> Result<&'t str, String> {
        self.0.next().ok_or("a word is missing".into())
    }

    fn number(&mut self) -> Result<f64, String> {
        parse(self.word()?)
    }

    fn point(&mut self) -> Result<Point, String> {
        Ok(Point { x: self.number()?, y: self.number()? })
    }

    fn area(&mut self) -> Result<Area, String> {
        Ok(Area { x: self.number()?, y: self.number()?, width: self.number()?, height: self.number()? })
    }

    fn one_of<T: Copy>(&mut self, what: &str, known: &[(&str, T)]) -> Result<T, String> {
        let word = self.word()?;
        let found = known.iter().find(|(name, _)| *name == word).map(|(_, kind)| *kind);
        let names = || known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| format!("no {what} `{word}`; there are {}", names()))
    }

    fn optional(&mut self, word: &str) -> bool {
        let mut ahead = self.0.clone();
        let found = ahead.next() == Some(word);
        if found {
            self.0 = ahead;
        }
        found
    }

    fn end(mut self) -> Result<(), String> {
        self.0.next().map_or(Ok(()), |word| Err(format!("`{word}` is one word too many")))
    }
}

fn parse(word: &str) -> Result<f64, String> {
    word.parse::<i32>().map(f64::from).map_err(|_| format!("`{word}` is not a number"))
}
