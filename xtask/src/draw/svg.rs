//! A picture as SVG: colours that are explicit, so that a dark page shows it as a light one does, and fonts by kind alone.
//!
//! *Invariant:* pure; what stands in a text is escaped.

use std::fmt::Write;

use super::picture::{Anchor, Area, Kind, Picture, Point, Way, Words};

const INK: &str = "#1b1f24";

/// The SVG of a picture. `source` is the text that it is drawn from.
pub fn written(picture: &Picture, source: &str) -> String {
    let mut svg = String::new();
    let (width, height) = (picture.width, picture.height);
    // Writing to a string cannot fail.
    let _ = writeln!(
        svg,
        "<!-- Drawn from {source} by `cargo xtask draw`: change the text, not this file. -->\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         role=\"img\" aria-labelledby=\"title description\" \
         font-family=\"sans-serif\" fill=\"{INK}\">\n\
         <title id=\"title\">{}</title>\n<desc id=\"description\">{}</desc>",
        escaped(&picture.title),
        escaped(&picture.description)
    );
    let whole = Area { x: 0.5, y: 0.5, width: width - 1.0, height: height - 1.0 };
    rectangle(&mut svg, whole, 6, "#ffffff", "#d0d7de", "");
    for lane in &picture.lanes {
        let (fill, stroke, dash) = lane_colours(lane.kind);
        rectangle(&mut svg, lane.area, 8, fill, stroke, dash);
        lane.words.iter().for_each(|words| text(&mut svg, words));
    }
    for arrow in &picture.arrows {
        line(&mut svg, &arrow.points, arrow.kind, arrow.both_ways);
        arrow.words.iter().for_each(|words| text(&mut svg, words));
    }
    for block in &picture.boxes {
        let (fill, stroke) = box_colours(block.kind);
        rectangle(&mut svg, block.area, 5, fill, stroke, "");
        block.words.iter().for_each(|words| text(&mut svg, words));
    }
    for note in &picture.notes {
        note.words.iter().for_each(|words| text(&mut svg, words));
    }
    for key in &picture.keys {
        line(&mut svg, &[key.from, key.to], key.kind, false);
        text(&mut svg, &key.words);
    }
    svg.push_str("</svg>\n");
    svg
}

fn lane_colours(kind: Kind) -> (&'static str, &'static str, &'static str) {
    match kind {
        Kind::Program => ("#f4f8fe", "#9dbbe6", ""),
        Kind::Kernel => ("#fdf9ef", "#dcc08a", ""),
        Kind::Agent => ("#f2faf4", "#8fc7a2", ""),
        Kind::Secret => ("#fdf3f4", "#dea0a8", ""),
        Kind::Outside => ("#ffffff", "#57606a", "6 4"),
        Kind::Host => ("#f6f8fa", "#b6bec8", ""),
        Kind::Wire => ("#ffffff", "#9aa4af", "3 3"),
    }
}

fn box_colours(kind: Kind) -> (&'static str, &'static str) {
    match kind {
        Kind::Program => ("#dce9fb", "#2b5fab"),
        Kind::Kernel => ("#fbecc9", "#96650a"),
        Kind::Agent => ("#d5f0de", "#1d7a3f"),
        Kind::Secret => ("#f9d9dd", "#a52236"),
        Kind::Outside => ("#e7eaee", "#57606a"),
        Kind::Host | Kind::Wire => ("#ffffff", "#57606a"),
    }
}

/// Colour, width and dashes of a line: whoever does not tell the colours apart goes by the dashes.
fn way(kind: Way) -> (&'static str, f64, &'static str) {
    match kind {
        Way::Plain => ("#a04b00", 1.8, "6 4"),
        Way::Tls => ("#1652a8", 3.2, ""),
        Way::Control => ("#3c444d", 1.3, ""),
        Way::Refused => ("#a52236", 1.8, "1.5 3.5"),
    }
}

fn rectangle(svg: &mut String, area: Area, round: u8, fill: &str, stroke: &str, dash: &str) {
    let Area { x, y, width, height } = area;
    let _ = writeln!(
        svg,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"{round}\" fill=\"{fill}\" \
         stroke=\"{stroke}\"{}/>",
        dashes(dash)
    );
}

/// A line with its head. The line ends where the head begins, so that the head stays sharp.
fn line(svg: &mut String, points: &[Point], kind: Way, both_ways: bool) {
    let (colour, width, dash) = way(kind);
    let mut path = points.to_vec();
    let mut heads = String::new();
    let last = path.len() - 1;
    path[last] = head(&mut heads, points[last - 1], points[last], colour);
    if both_ways {
        path[0] = head(&mut heads, points[1], points[0], colour);
    }
    let path: Vec<String> = path.iter().map(|point| format!("{},{}", point.x, point.y)).collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"{}/>",
        path.join(" "),
        dashes(dash)
    );
    svg.push_str(&heads);
}

/// Draws the head of an arrow and gives the place where the line meets it.
fn head(svg: &mut String, from: Point, to: Point, colour: &str) -> Point {
    let (long, half) = (9.0, 4.5);
    let (dx, dy) =
        ((to.x - from.x).signum() * f64::from(from.x != to.x), (to.y - from.y).signum() * f64::from(from.y != to.y));
    let base = Point { x: to.x - long * dx, y: to.y - long * dy };
    let (left, right) = (
        Point { x: base.x - half * dy, y: base.y - half * dx },
        Point { x: base.x + half * dy, y: base.y + half * dx },
    );
    let _ = writeln!(
        svg,
        "<polygon points=\"{},{} {},{} {},{}\" fill=\"{colour}\"/>",
        to.x, to.y, left.x, left.y, right.x, right.y
    );
    base
}

fn text(svg: &mut String, words: &Words) {
    let anchor = match words.anchor {
        Anchor::Start => "start",
        Anchor::Middle => "middle",
        Anchor::End => "end",
    };
    let weight = if words.bold { " font-weight=\"bold\"" } else { "" };
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{:.1}\" font-size=\"{}\" text-anchor=\"{anchor}\"{weight}>{}</text>",
        words.at.x,
        words.at.y,
        words.size,
        escaped(&words.text)
    );
}

fn dashes(dash: &str) -> String {
    if dash.is_empty() { String::new() } else { format!(" stroke-dasharray=\"{dash}\"") }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
