//! What lies over something else in a picture: nobody could read it.
//!
//! How wide a word is depends on the reader's fonts. It is estimated here from the widest of the common ones, so that it
//! fits with others too.
//!
//! *Invariant:* pure; every problem begins with its line number.

use super::picture::{Anchor, Area, Arrow, Block, Picture, Point, Words};

/// Space that is kept around words.
const MARGIN: f64 = 2.0;

/// All problems of a picture: `LINE: what`.
pub fn problems(picture: &Picture) -> Vec<String> {
    let whole = Area { x: 0.0, y: 0.0, width: picture.width, height: picture.height };
    let mut found = Vec::new();
    for (index, block) in picture.boxes.iter().enumerate() {
        let (line, name) = (block.line, &block.name);
        if !within(&block.area, &whole) {
            found.push(format!("{line}: box `{name}` is not inside the picture"));
        }
        for other in picture.boxes.iter().take(index).filter(|other| overlap(&block.area, &other.area)) {
            found.push(format!("{line}: box `{name}` lies over box `{}`", other.name));
        }
        found.extend(words_of_box(block));
    }
    found.extend(lanes(picture, &whole));
    found.extend(words(picture, &whole));
    found.extend(arrows(picture));
    found
}

fn words_of_box(block: &Block) -> Vec<String> {
    let too_wide = |words: &&Words| !within(&area_of(words), &block.area);
    let tell = |words: &Words| format!("{}: `{}` is wider than box `{}`", block.line, words.text, block.name);
    block.words.iter().filter(too_wide).map(tell).collect()
}

/// A box is in a lane or out of it, and never over its name.
fn lanes(picture: &Picture, whole: &Area) -> Vec<String> {
    let mut found = Vec::new();
    for lane in &picture.lanes {
        let (line, name) = (lane.line, lane.words.first().map_or("", |words| &words.text));
        if !within(&lane.area, whole) {
            found.push(format!("{line}: lane `{name}` is not inside the picture"));
        }
        for block in &picture.boxes {
            if overlap(&block.area, &lane.area) && !within(&block.area, &lane.area) {
                found.push(format!("{line}: box `{}` is half inside lane `{name}`", block.name));
            }
        }
    }
    found
}

/// Words that stand free: names of lanes, notes, keys, and what is written at arrows.
fn words(picture: &Picture, whole: &Area) -> Vec<String> {
    let mut found = Vec::new();
    let free = free_words(picture);
    for (index, (line, words)) in free.iter().enumerate() {
        let (area, text) = (area_of(words), &words.text);
        if !within(&area, whole) {
            found.push(format!("{line}: `{text}` is not inside the picture"));
        }
        for block in picture.boxes.iter().filter(|block| overlap(&area, &block.area)) {
            found.push(format!("{line}: `{text}` lies over box `{}`", block.name));
        }
        for (_, other) in free.iter().take(index).filter(|(_, other)| overlap(&area, &area_of(other))) {
            found.push(format!("{line}: `{text}` lies over `{}`", other.text));
        }
        for lane in &picture.lanes {
            if overlap(&area, &lane.area) && !within(&area, &lane.area) {
                found.push(format!("{line}: `{text}` lies over the edge of a lane"));
            }
        }
    }
    found
}

fn free_words(picture: &Picture) -> Vec<(usize, &Words)> {
    let lanes = picture.lanes.iter().flat_map(|lane| lane.words.iter().map(move |words| (lane.line, words)));
    let notes = picture.notes.iter().flat_map(|note| note.words.iter().map(move |words| (note.line, words)));
    let keys = picture.keys.iter().map(|key| (key.line, &key.words));
    let arrows = picture.arrows.iter().flat_map(|arrow| arrow.words.iter().map(move |words| (arrow.line, words)));
    lanes.chain(notes).chain(keys).chain(arrows).collect()
}

fn arrows(picture: &Picture) -> Vec<String> {
    let mut found = Vec::new();
    for arrow in &picture.arrows {
        for (at, block) in picture.boxes.iter().enumerate() {
            let own = arrow.ends.contains(&at);
            // At its own boxes a line touches the edge; it must not come in again.
            let area = if own { shrunk(&block.area) } else { block.area };
            if parts(arrow).any(|part| overlap(&part, &area)) {
                found.push(format!("{}: the arrow crosses box `{}`", arrow.line, block.name));
            }
        }
        for (_, words) in free_words(picture) {
            if parts(arrow).any(|part| overlap(&part, &area_of(words))) {
                found.push(format!("{}: the arrow crosses `{}`", arrow.line, words.text));
            }
        }
    }
    found
}

/// The areas of an arrow's parts, as wide as its head.
fn parts(arrow: &Arrow) -> impl Iterator<Item = Area> + '_ {
    arrow.points.windows(2).map(|part| {
        let (a, b) = (part[0], part[1]);
        let (x, y) = (a.x.min(b.x), a.y.min(b.y));
        let (width, height) = ((a.x - b.x).abs(), (a.y - b.y).abs());
        if height == 0.0 {
            Area { x, y: y - 3.0, width, height: 6.0 }
        } else {
            Area { x: x - 3.0, y, width: 6.0, height }
        }
    })
}

/// What one line of text takes up.
fn area_of(words: &Words) -> Area {
    let width = width(words) + 2.0 * MARGIN;
    let Point { x, y } = words.at;
    let x = match words.anchor {
        Anchor::Start => x - MARGIN,
        Anchor::Middle => x - width / 2.0,
        Anchor::End => x + MARGIN - width,
    };
    Area { x, y: y - 0.8 * words.size, width, height: 1.05 * words.size }
}

fn width(words: &Words) -> f64 {
    let ems: f64 = words.text.chars().map(ems).sum();
    ems * words.size * if words.bold { 1.1 } else { 1.0 }
}

/// How wide a letter is in DejaVu Sans, in parts of the size, rounded up.
fn ems(letter: char) -> f64 {
    match letter {
        'i' | 'j' | 'l' | '\'' => 0.29,
        ' ' | '.' | ',' | ':' | ';' | '|' | 'I' => 0.34,
        'f' | 't' | 'r' | '(' | ')' | '/' | '-' | '[' | ']' => 0.42,
        'c' | 'k' | 's' | 'v' | 'x' | 'y' | 'z' | 'J' => 0.6,
        'm' | 'w' | 'M' | 'W' | '@' | '%' => 1.0,
        letter if letter.is_lowercase() || letter.is_ascii_digit() => 0.645,
        _ => 0.79,
    }
}

fn within(inner: &Area, outer: &Area) -> bool {
    inner.x >= outer.x && inner.y >= outer.y && inner.right() <= outer.right() && inner.bottom() <= outer.bottom()
}

fn overlap(a: &Area, b: &Area) -> bool {
    a.x < b.right() && b.x < a.right() && a.y < b.bottom() && b.y < a.bottom()
}

fn shrunk(area: &Area) -> Area {
    let by = 4.0;
    Area { x: area.x + by, y: area.y + by, width: area.width - 2.0 * by, height: area.height - 2.0 * by }
}
