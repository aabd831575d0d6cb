//! PEM files that trust rests on: text in, every section of it out, or the first line that was not understood.
//!
//! RFC 7468 lets a reader pass over what it does not know, and readers do. Here a section that is passed over is an
//! authority that is missing or a certificate that stays good though it was revoked, so whatever might have been meant as
//! a boundary, or as the content of a section, has to be one. The decoding itself is the library's.
//!
//! What is taken beside exact sections: explanatory text between them, as `openssl` writes it, blank lines, white space at
//! the end of a line, and CRLF line ends.
//!
//! *Invariant:* no line that looks like a part of a section is ever left out: either it is in what is returned, or
//! nothing is returned.

use rustls::pki_types::{
    CertificateDer,
    pem::{PemObject, SectionKind},
};
use x509_parser::asn1_rs::{FromDer, Sequence};
use zeroize::Zeroizing;

/// What a file holds, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Certificates,
    Lists,
    Key,
}

/// One section, decoded: exactly one DER structure.
pub(crate) struct Section {
    /// The line of its BEGIN, from 1.
    pub(crate) line: usize,
    pub(crate) der: Zeroizing<Vec<u8>>,
}

impl Section {
    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        CertificateDer::from(self.der.to_vec())
    }
}

/// The first thing in a file that was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}: {what}; {instead}")]
pub struct Unread {
    /// Line, from 1.
    pub line: usize,
    /// What stands there.
    pub what: String,
    /// What to do about it.
    pub instead: String,
}

/// A line outside of sections is taken for a lost piece of one from so many characters of Base64 on. The lines of a section
/// have 64.
const PIECE: usize = 32;

/// How much of a line is shown. Behind a boundary that lacks its line end comes the content, and that of a key is secret.
const SHOWN: usize = 40;
const SHOWN_OF_KEYS: usize = 24;

const PLAIN_TEXT: &str = "save the file as plain text, UTF-8 without a byte order mark";

/// Every section of a file, in order. A file without any has none.
pub(crate) fn sections(file: &[u8], content: Content) -> Result<Vec<Section>, Unread> {
    let mut sections = Vec::new();
    let mut open: Option<Open> = None;
    // Reserved beforehand: a vector that grows leaves unwiped copies of a key behind.
    let mut base64 = Zeroizing::new(Vec::with_capacity(file.len()));
    for (index, line) in text(file)?.split('\n').enumerate() {
        let here = Here { number: index + 1, line: line.strip_suffix('\r').unwrap_or(line), content };
        here.check_characters()?;
        match (here.read()?, open) {
            (Line::Begin(label), None) => open = Some(Open { line: here.number, label }),
            (Line::Other(text), None) => here.check_explanation(text)?,
            (Line::End(label), None) => return Err(here.end_without_begin(label)),
            (Line::Begin(_), Some(open)) => return Err(here.begin_inside(open)),
            (Line::Other(text), Some(open)) => {
                here.check_base64(text, open)?;
                base64.extend_from_slice(text.as_bytes());
            }
            (Line::End(label), Some(section)) if label == section.label => {
                sections.push(section.close(&base64)?);
                base64.clear();
                open = None;
            }
            (Line::End(_), Some(open)) => return Err(here.end_of_another(open)),
        }
    }
    match open {
        None => Ok(sections),
        Some(open) => Err(open.broken("has no end")),
    }
}

impl Content {
    /// What may stand in a boundary of such a file.
    fn labels(self) -> &'static [&'static str] {
        match self {
            Self::Certificates => &["CERTIFICATE"],
            Self::Lists => &["X509 CRL"],
            Self::Key => &["PRIVATE KEY", "EC PRIVATE KEY"],
        }
    }

    fn label(self, text: &str) -> Option<&'static str> {
        self.labels().iter().copied().find(|label| *label == text)
    }

    /// What to do about a section that does not belong in such a file.
    fn instead_of(self, label: &str) -> String {
        let boundaries = self.labels().iter().map(|label| format!("-----BEGIN {label}-----"));
        let known = boundaries.collect::<Vec<_>>().join(" or ");
        let advice = match (self, label) {
            (Self::Key, "ENCRYPTED PRIVATE KEY") => "write the key without a password, with openssl pkey -in FILE",
            (Self::Key, "EC PARAMETERS") => "remove this section, the key names its curve itself",
            (Self::Key, "RSA PRIVATE KEY") => "take an ECDSA P-256 key",
            (_, "TRUSTED CERTIFICATE") => "write it with openssl x509 -in FILE, without -trustout",
            (_, "PKCS7" | "CMS") => "write what is in it with openssl pkcs7 -in FILE -print_certs",
            (Self::Certificates, "X509 CRL") => "put revocation lists into the file that the key crl names",
            (Self::Lists, "CERTIFICATE") => "put certificates into the file that the key bundle names",
            (Self::Certificates | Self::Lists, key) if key.ends_with("PRIVATE KEY") => {
                "take the private key out, and see who could read it"
            }
            _ => "write the line so, where that is what it is, or take the section out",
        };
        format!("this file holds {known} and nothing else; {advice}")
    }
}

/// A section whose END has not come yet.
#[derive(Clone, Copy)]
struct Open {
    line: usize,
    label: &'static str,
}

impl Open {
    fn broken(self, what: &str) -> Unread {
        let (line, label) = (self.line, self.label);
        Unread {
            line,
            what: format!("the section that begins here with -----BEGIN {label}----- {what}"),
            instead: format!("get the whole file again, down to the last -----END {label}-----"),
        }
    }

    fn close(self, base64: &[u8]) -> Result<Section, Unread> {
        if base64.is_empty() {
            return Err(self.broken("is empty"));
        }
        if !base64.len().is_multiple_of(4) || !is_padded_rightly(base64) {
            return Err(self.broken("is not whole: its Base64 does not come out even"));
        }
        let (begin, end) = (format!("-----BEGIN {}-----\n", self.label), format!("\n-----END {}-----\n", self.label));
        let mut clean = Zeroizing::new(Vec::with_capacity(begin.len() + base64.len() + end.len()));
        for part in [begin.as_bytes(), base64, end.as_bytes()] {
            clean.extend_from_slice(part);
        }
        let (_, der): (SectionKind, Vec<u8>) =
            PemObject::from_pem_slice(&clean).map_err(|error| self.broken(&format!("cannot be read: {error}")))?;
        let der = Zeroizing::new(der);
        match Sequence::from_der(&der) {
            Ok(([], _)) => {}
            Ok(_) => return Err(self.broken("has bytes after its end in DER")),
            Err(_) => return Err(self.broken("holds no whole structure in DER")),
        }
        Ok(Section { line: self.line, der })
    }
}

/// One line, and what the file should hold.
struct Here<'a> {
    number: usize,
    line: &'a str,
    content: Content,
}

/// What a line is.
enum Line<'a> {
    Begin(&'static str),
    End(&'a str),
    /// No boundary; without white space at its end.
    Other(&'a str),
}

impl<'a> Here<'a> {
    fn wrong(&self, what: impl Into<String>, instead: impl Into<String>) -> Unread {
        Unread { line: self.number, what: what.into(), instead: instead.into() }
    }

    fn shown(&self) -> String {
        let most = if self.content == Content::Key { SHOWN_OF_KEYS } else { SHOWN };
        let text: String = self.line.chars().take(most).collect();
        let dots = if text.len() < self.line.len() { "..." } else { "" };
        format!("`{}{dots}`", text.escape_debug())
    }

    fn check_characters(&self) -> Result<(), Unread> {
        match self.line.chars().find(|character| character.is_control() && *character != '\t') {
            None => Ok(()),
            Some('\r') => Err(self.wrong(
                "a carriage return stands without a line feed",
                "end lines with a line feed (LF, or CR and LF)",
            )),
            Some(control) => {
                Err(self.wrong(format!("the control character {} stands here", control.escape_unicode()), PLAIN_TEXT))
            }
        }
    }

    /// A boundary in exactly its form, or a line that nobody could mean as one.
    fn read(&self) -> Result<Line<'a>, Unread> {
        let line = self.line.trim_end_matches([' ', '\t']);
        let label = |begin: &str| line.strip_prefix(begin).and_then(|rest| rest.strip_suffix("-----"));
        if let Some(label) = label("-----BEGIN ") {
            return match self.content.label(label) {
                Some(label) => Ok(Line::Begin(label)),
                None => {
                    Err(self.wrong(format!("{} does not belong here", self.shown()), self.content.instead_of(label)))
                }
            };
        }
        if let Some(label) = label("-----END ") {
            return Ok(Line::End(label));
        }
        if !looks_like_a_boundary(line) {
            return Ok(Line::Other(line));
        }
        let label = self.content.labels().first().copied().unwrap_or_default();
        Err(self.wrong(
            format!("{} looks like a boundary of a section and is none", self.shown()),
            format!(
                "write -----BEGIN {label}----- or -----END {label}-----, alone on its line from the first column on"
            ),
        ))
    }

    fn end_without_begin(&self, label: &str) -> Unread {
        let instead = match self.content.label(label) {
            Some(label) => format!("get the whole file again; the first line of a section is -----BEGIN {label}-----"),
            None => self.content.instead_of(label),
        };
        self.wrong(format!("{} ends a section that has not begun", self.shown()), instead)
    }

    fn begin_inside(&self, open: Open) -> Unread {
        let Open { line, label } = open;
        self.wrong(
            format!("{} stands inside of the section that begins in line {line}", self.shown()),
            format!("get the whole file again; each section ends with -----END {label}----- before the next begins"),
        )
    }

    fn end_of_another(&self, open: Open) -> Unread {
        let Open { line, label } = open;
        self.wrong(
            format!("{} ends the section that begins in line {line} with another label", self.shown()),
            format!("write -----END {label}-----"),
        )
    }

    /// Content of a section: Base64 from the first column on.
    fn check_base64(&self, text: &str, open: Open) -> Result<(), Unread> {
        let Some((before, character)) = text.char_indices().find(|(_, at)| !is_base64(*at) && *at != '=') else {
            return Ok(());
        };
        if text.contains(':') {
            return Err(self.wrong(
                "a header stands inside of a section, as in keys with a password",
                "write the section without it; openssl pkey -in FILE writes a key without a password",
            ));
        }
        let Open { line, label } = open;
        Err(self.wrong(
            format!("column {} has `{}`, which is not Base64", before + 1, character.escape_debug()),
            format!("get the whole file again; the section that begins in line {line} ends with -----END {label}-----"),
        ))
    }

    /// Explanatory text, in which no piece of a section may hide.
    fn check_explanation(&self, text: &str) -> Result<(), Unread> {
        let text = text.trim();
        let digits = text.trim_end_matches('=');
        if text.len() < PIECE || !digits.chars().all(is_base64) {
            return Ok(());
        }
        Err(self.wrong(
            "a line of Base64 stands outside of any section",
            format!(
                "write the boundaries around it, from -----BEGIN {} on, or remove it",
                self.content.labels().join(" or ")
            ),
        ))
    }
}

/// The file as text, whose lines may still be anything.
fn text(file: &[u8]) -> Result<&str, Unread> {
    let wrong = |line: usize, what: &str| Err(Unread { line, what: what.into(), instead: PLAIN_TEXT.into() });
    let line_of = |at: usize| file.iter().take(at).filter(|byte| **byte == b'\n').count() + 1;
    if file.starts_with(b"\xef\xbb\xbf") {
        return wrong(1, "the file begins with a byte order mark");
    }
    if file.starts_with(b"\xff\xfe") || file.starts_with(b"\xfe\xff") {
        return wrong(1, "the file is text in UTF-16");
    }
    if let Some(at) = file.iter().position(|byte| *byte == 0) {
        return wrong(line_of(at), "a zero byte stands here, as in UTF-16 or in no text at all");
    }
    std::str::from_utf8(file).or_else(|error| wrong(line_of(error.valid_up_to()), "the line is not UTF-8 text"))
}

/// Could somebody have meant this line as a boundary? Three dashes of whatever kind in a row, nothing but dashes, or BEGIN
/// or END in capitals behind a dash or at the beginning of the line.
fn looks_like_a_boundary(line: &str) -> bool {
    let runs = || line.split(|character| !is_dash(character)).map(|run| run.chars().count());
    let nothing_else = line.chars().all(|character| is_dash(character) || character.is_whitespace());
    let keyword = |(at, word): (usize, &str)| {
        let before = line.get(..at).unwrap_or_default().trim_end();
        let after = line.get(at + word.len()..).unwrap_or_default();
        (before.ends_with(is_dash) || !before.contains(char::is_alphanumeric))
            && !after.starts_with(char::is_alphanumeric)
    };
    runs().any(|run| run >= 3)
        || (nothing_else && runs().any(|run| run > 0))
        || line.match_indices("BEGIN").chain(line.match_indices("END")).any(keyword)
}

fn is_dash(character: char) -> bool {
    // Hyphens, dashes, bars and minus signs, as word processors and web pages put them for a hyphen.
    matches!(
        character,
        '-' | '\u{ad}' | '\u{2010}'
            ..='\u{2015}'
                | '\u{2043}'
                | '\u{2212}'
                | '\u{2500}'
                | '\u{2e3a}'
                | '\u{2e3b}'
                | '\u{30fc}'
                | '\u{fe58}'
                | '\u{fe63}'
                | '\u{ff0d}'
    )
}

fn is_base64(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '+' || character == '/'
}

/// At most two `=`, at the end, and no bits before them that are thrown away: each structure is written in one way only.
fn is_padded_rightly(base64: &[u8]) -> bool {
    let padding = base64.iter().rev().take_while(|byte| **byte == b'=').count();
    let Some((digits, _)) = base64.split_at_checked(base64.len() - padding) else { return false };
    let even: &[u8] = match padding {
        0 => return !digits.contains(&b'='),
        1 => b"AEIMQUYcgkosw048",
        2 => b"AQgw",
        _ => return false,
    };
    !digits.contains(&b'=') && digits.last().is_some_and(|last| even.contains(last))
}

#[cfg(test)]
mod tests {
    use super::{super::files, *};
    use crate::trust::testing::tlv;
    use proptest::{collection::vec, prelude::*};

    /// A structure in DER that fills a few lines, and no other's.
    fn der(number: u8, length: usize) -> Vec<u8> {
        let bytes = (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(number.wrapping_mul(101)));
        tlv(0x30, &tlv(4, &bytes.collect::<Vec<u8>>()))
    }

    fn section(number: u8) -> String {
        files::pem("X509 CRL", &der(number, 190 + usize::from(number))).to_string()
    }

    fn read(file: &[u8]) -> Result<Vec<Vec<u8>>, Unread> {
        sections(file, Content::Lists).map(|all| all.iter().map(|one| one.der.to_vec()).collect())
    }

    /// Five lines of Base64 between two boundaries.
    const LINES: usize = 7;

    /// Three sections, of which the second is written otherwise; the error of it.
    #[track_caller]
    fn refused(second: &str) -> Unread {
        let whole = format!("{}{second}{}", section(1), section(3));
        match read(whole.as_bytes()) {
            Err(unread) => unread,
            Ok(sections) => panic!("{} sections were read of\n{whole}", sections.len()),
        }
    }

    #[test]
    fn sections_are_read_with_explanations_blank_lines_and_either_line_end() {
        let three = [der(1, 191), der(2, 192), der(3, 193)].to_vec();
        let explained = format!(
            "Authority of example.org, xn--bcher-kva, end-to-end, since 2026 — gültig\n\n{}Bag Attributes\n    \
             localKeyID: 54 69 6D 65\nsubject=O = Wimsey, CN = END-user\n{}   \n\t\n{}\nEnding in 2036\n# 0123456789abcdef",
            section(1),
            section(2),
            section(3)
        );
        let plain = format!("{}{}{}", section(1), section(2), section(3));
        for text in [
            plain.clone(),
            explained.clone(),
            plain.replace('\n', "\r\n"),
            explained.replace('\n', "\r\n"),
            plain.replace('\n', " \t\n"),
            plain.trim_end().to_owned(),
            plain.replace("-----BEGIN", "\n-----BEGIN"),
        ] {
            assert_eq!(read(text.as_bytes()), Ok(three.clone()), "{text}");
        }
        // Long lines, and one line, are what other programs write.
        let (begin, end) = ("-----BEGIN X509 CRL-----\n", "-----END X509 CRL-----\n");
        let joined = section(2).lines().filter(|line| !line.starts_with('-')).collect::<String>();
        assert_eq!(read(format!("{begin}{joined}\n{end}").as_bytes()), Ok(vec![der(2, 192)]));
    }

    #[test]
    fn a_file_without_a_section_has_none() {
        for text in ["", "\n", "rubbish", "# nothing here yet\n"] {
            assert_eq!(read(text.as_bytes()), Ok(Vec::new()), "{text}");
        }
    }

    #[test]
    fn a_boundary_in_an_odd_form_is_refused_with_its_line() {
        let (begin, end) = ("-----BEGIN X509 CRL-----", "-----END X509 CRL-----");
        for odd in [
            "----BEGIN X509 CRL-----",
            "------BEGIN X509 CRL-----",
            "-----BEGIN X509 CRL----",
            "-----BEGIN X509 CRL------",
            "-----BEGIN X509 CRL",
            "BEGIN X509 CRL-----",
            "BEGIN X509 CRL",
            "-BEGIN X509 CRL-",
            "--BEGIN X509 CRL--",
            "-----BEGIN CRL-----",
            "-----BEGIN X509  CRL-----",
            "-----BEGIN  X509 CRL-----",
            "-----BEGIN X509 CRL -----",
            "-----BEGINX509 CRL-----",
            "-----BEGIN-----",
            "-----BEGIN -----",
            "-----BEGIN X509 CRI-----",
            "-----BEGIN x509 crl-----",
            "-----begin X509 CRL-----",
            "-----Begin X509 CRL-----",
            "-----BEGIN X.509 CRL-----",
            " -----BEGIN X509 CRL-----",
            "\t-----BEGIN X509 CRL-----",
            "# -----BEGIN X509 CRL-----",
            "#-----BEGIN X509 CRL-----",
            "> -----BEGIN X509 CRL-----",
            "\"-----BEGIN X509 CRL-----",
            "-----BEGIN X509 CRL-----MIIB",
            "-----BEGIN X509 CRL----- x",
            "x -----BEGIN X509 CRL-----",
            "-----BEGIN X509 CRL-----\\n",
            "-----BEGIN X509 CRL-----\u{a0}",
            "-----BEGIN\u{a0}X509 CRL-----",
            "\u{feff}-----BEGIN X509 CRL-----",
            "\u{200b}-----BEGIN X509 CRL-----",
            "-----BEGIN\tX509 CRL-----",
            "–––––BEGIN X509 CRL–––––",
            "——BEGIN X509 CRL——",
            "—BEGIN X509 CRL—",
            "‐‐‐‐‐BEGIN X509 CRL‐‐‐‐‐",
            "-----BEGIN CERTIFICATE-----",
            "-----BEGIN TRUSTED CERTIFICATE-----",
            "-----BEGIN PRIVATE KEY-----",
            "-----BEGIN ENCRYPTED PRIVATE KEY-----",
            "-----BEGIN PKCS7-----",
            "---- BEGIN SSH2 PUBLIC KEY ----",
            "- - - BEGIN X509 CRL - - -",
            "---",
            "--",
            "-",
            "—",
        ] {
            let unread = refused(&section(2).replace(begin, odd));
            assert_eq!(unread.line, LINES + 1, "{odd}: {unread}");
            let odd = odd.replace("BEGIN", "END").replace("begin", "end").replace("Begin", "End");
            let unread = refused(&section(2).replace(end, &odd));
            assert_eq!(unread.line, 2 * LINES, "{odd}: {unread}");
        }
    }

    #[test]
    fn a_lost_boundary_is_refused() {
        let (begin, end) = ("-----BEGIN X509 CRL-----\n", "-----END X509 CRL-----\n");
        assert_eq!(refused(&section(2).replace(begin, "")).line, LINES + 1);
        assert_eq!(refused(&section(2).replace(end, "")).line, 2 * LINES);
        assert_eq!(refused(&section(2).replace(begin, "").replace(end, "")).line, LINES + 1);
        assert_eq!(refused(&section(2).replace(end, begin)).line, 2 * LINES);
        assert_eq!(refused(begin).line, LINES + 2);
        assert_eq!(refused(end).line, LINES + 1);
        // One section out of two is none of them.
        let merged = format!("{}{}", section(1), section(2)).replace(&format!("{end}{begin}"), "");
        assert_eq!(read(merged.as_bytes()).unwrap_err().line, 1);
        let cut = section(1);
        assert_eq!(read(cut.trim_end().trim_end_matches('-').as_bytes()).unwrap_err().line, LINES);
        assert_eq!(read(cut.get(..100).unwrap().as_bytes()).unwrap_err().line, 1);
    }

    #[test]
    fn another_encoding_than_plain_text_is_refused() {
        let plain = section(1);
        let wide = |unit: fn(u16) -> [u8; 2]| plain.encode_utf16().flat_map(unit).collect::<Vec<u8>>();
        for (what, file, line) in [
            ("a byte order mark", [b"\xef\xbb\xbf", plain.as_bytes()].concat(), 1),
            ("UTF-16", wide(u16::to_le_bytes), 1),
            ("UTF-16 with a mark", [&b"\xff\xfe"[..], &wide(u16::to_le_bytes)].concat(), 1),
            ("big-endian UTF-16 with a mark", [&b"\xfe\xff"[..], &wide(u16::to_be_bytes)].concat(), 1),
            ("Latin-1", [b"g\xfcltig\n", plain.as_bytes()].concat(), 1),
            ("a zero byte at the end", [plain.as_bytes(), &[0]].concat(), LINES + 1),
            ("carriage returns alone", plain.replace('\n', "\r").into_bytes(), 1),
            ("a line feed that is none", plain.replacen('\n', "\u{b}", 1).into_bytes(), 1),
            ("an escape sequence", format!("\u{1b}[1m{plain}").into_bytes(), 1),
            ("a file with a mark behind another", format!("{plain}\u{feff}{plain}").into_bytes(), LINES + 1),
        ] {
            let unread = read(&file).unwrap_err();
            assert_eq!(unread.line, line, "{what}: {unread}");
        }
    }

    #[test]
    fn base64_is_read_strictly_and_holds_one_structure() {
        let with = |change: &dyn Fn(&str) -> String| {
            let text = section(2);
            let lines: Vec<&str> = text.lines().collect();
            let body = change(&lines[1..LINES - 1].join("\n"));
            format!("{}\n{body}\n{}\n", lines[0], lines[LINES - 1])
        };
        for (what, text) in [
            ("nothing", with(&|_| String::new())),
            ("a digit less", with(&|body| body.replacen('M', "", 1))),
            ("a strange character", with(&|body| body.replacen('M', "*", 1))),
            ("the alphabet of URLs", with(&|body| body.replacen('M', "_", 1))),
            ("a blank inside", with(&|body| body.replacen('M', "M ", 1))),
            ("indented", with(&|body| body.replace('\n', "\n  "))),
            ("padding inside", with(&|body| body.replacen('\n', "=\n", 1))),
            ("four digits more", with(&|body| format!("{body}\nAAAA"))),
            ("a header", with(&|body| format!("Proc-Type: 4,ENCRYPTED\n\n{body}"))),
            ("two structures", files::pem("X509 CRL", &[der(2, 40), der(3, 40)].concat()).to_string()),
            ("half a structure", files::pem("X509 CRL", &der(2, 40)[..20]).to_string()),
            ("no structure", files::pem("X509 CRL", b"rubbish").to_string()),
            ("something else than a sequence", files::pem("X509 CRL", &tlv(4, b"rubbish")).to_string()),
        ] {
            let unread = refused(&text);
            assert!((LINES + 1..=2 * LINES).contains(&unread.line), "{what}: {unread}");
        }
        // The same octets, padded otherwise.
        let short = files::pem("X509 CRL", &der(2, 9)).to_string();
        assert!(read(short.as_bytes()).is_ok() && short.contains("Lw==") || short.contains("=="), "{short}");
        for (from, to) in [("==\n", "=\n"), ("==\n", "\n"), ("==\n", "===\n"), ("==\n", "====\n")] {
            assert!(read(short.replace(from, to).as_bytes()).is_err(), "{to}");
        }
        let digit = short.split("==").next().unwrap().chars().last().unwrap();
        let next = char::from(digit as u8 + 1);
        assert!(read(short.replace(&format!("{digit}=="), &format!("{next}==")).as_bytes()).is_err());
    }

    #[test]
    fn what_does_not_belong_in_a_file_is_named_with_what_to_do() {
        let of = |label: &str| files::pem(label, &der(1, 40)).to_string();
        for (content, label, words) in [
            (Content::Certificates, "X509 CRL", "the file that the key crl names"),
            (Content::Certificates, "PRIVATE KEY", "take the private key out"),
            (Content::Certificates, "ENCRYPTED PRIVATE KEY", "take the private key out"),
            (Content::Certificates, "TRUSTED CERTIFICATE", "without -trustout"),
            (Content::Certificates, "CERTIFICAT", "-----BEGIN CERTIFICATE-----"),
            (Content::Certificates, "CERTIFICATE REQUEST", "-----BEGIN CERTIFICATE-----"),
            (Content::Certificates, "PKCS7", "-print_certs"),
            (Content::Lists, "CRL", "-----BEGIN X509 CRL-----"),
            (Content::Lists, "CERTIFICATE", "the file that the key bundle names"),
            (Content::Lists, "EC PRIVATE KEY", "take the private key out"),
            (Content::Key, "ENCRYPTED PRIVATE KEY", "openssl pkey"),
            (Content::Key, "RSA PRIVATE KEY", "ECDSA P-256"),
            (Content::Key, "EC PARAMETERS", "remove this section"),
            (Content::Key, "CERTIFICATE", "-----BEGIN PRIVATE KEY----- or -----BEGIN EC PRIVATE KEY-----"),
        ] {
            let unread = sections(of(label).as_bytes(), content).map(drop).unwrap_err();
            assert!(unread.line == 1 && unread.to_string().contains(words), "{label}: {unread}");
        }
        let both = [of("PRIVATE KEY"), of("EC PRIVATE KEY")].concat();
        assert_eq!(sections(both.as_bytes(), Content::Key).map(|all| all.len()), Ok(2));
    }

    #[test]
    fn an_error_shows_the_line_and_nothing_of_a_key() {
        let unread = refused("-----BEGIN CRL-----\n");
        assert_eq!(
            unread.to_string(),
            "8: `-----BEGIN CRL-----` does not belong here; this file holds -----BEGIN X509 CRL----- and nothing else; \
             write the line so, where that is what it is, or take the section out"
        );
        let key = files::pem("PRIVATE KEY", &der(1, 40)).to_string();
        let content = key.lines().nth(1).unwrap();
        for file in [
            key.replace('\n', ""),
            key.replacen("-----\n", "-----", 1),
            key.replacen('\n', ": ", 2),
            key.lines().skip(1).collect::<Vec<_>>().join("\n"),
            key.replacen(content, &format!("{content}*"), 1),
        ] {
            let unread = sections(file.as_bytes(), Content::Key).map(drop).unwrap_err();
            assert!(!unread.to_string().contains(&content[..8]), "{unread}");
        }
    }

    /// One way in which a file goes wrong on its way.
    #[derive(Clone, Debug)]
    enum Mutation {
        DeleteByte(usize),
        InsertText(usize, &'static str),
        ReplaceByte(usize, u8),
        DeleteLine(usize),
        DoubleLine(usize),
        SwapLines(usize, usize),
        IndentLine(usize, &'static str),
        LowerLine(usize),
        JoinLine(usize),
        DeleteRange(usize, usize),
        Everywhere(&'static str, &'static str),
    }

    fn mutation() -> impl Strategy<Value = Mutation> {
        let odd = prop::sample::select(vec![
            "-",
            " ",
            "\n",
            "\r",
            "\t",
            "\0",
            "=",
            "A",
            "—",
            "\u{feff}",
            "#",
            "-----BEGIN X509 CRL-----\n",
            "BEGIN",
            "END",
        ]);
        let indent = prop::sample::select(vec![" ", "\t", "# ", "> ", "\u{200b}", "//"]);
        let replaced = prop::sample::select(vec![
            ("-----", "----"),
            ("-----", "------"),
            ("-----", "—"),
            ("X509 CRL", "CRL"),
            ("X509 ", ""),
            ("\n", "\r"),
            ("\n", "\r\n"),
            ("\n", "\n\n"),
            ("\n", "\n "),
            ("\n", " \n"),
            ("BEGIN", "Begin"),
            ("END", "end"),
            ("BEGIN ", "BEGIN"),
        ]);
        prop_oneof![
            any::<usize>().prop_map(Mutation::DeleteByte),
            (any::<usize>(), odd).prop_map(|(at, text)| Mutation::InsertText(at, text)),
            (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Mutation::ReplaceByte(at, byte)),
            any::<usize>().prop_map(Mutation::DeleteLine),
            any::<usize>().prop_map(Mutation::DoubleLine),
            (any::<usize>(), any::<usize>()).prop_map(|(one, other)| Mutation::SwapLines(one, other)),
            (any::<usize>(), indent).prop_map(|(at, text)| Mutation::IndentLine(at, text)),
            any::<usize>().prop_map(Mutation::LowerLine),
            any::<usize>().prop_map(Mutation::JoinLine),
            (any::<usize>(), 1..120_usize).prop_map(|(at, length)| Mutation::DeleteRange(at, length)),
            replaced.prop_map(|(from, to)| Mutation::Everywhere(from, to)),
        ]
    }

    impl Mutation {
        fn apply(&self, file: &mut Vec<u8>) {
            let at = |at: usize| at % file.len().max(1);
            match *self {
                Self::DeleteByte(byte) => drop(file.remove(at(byte))),
                Self::InsertText(byte, text) => drop(file.splice(at(byte)..at(byte), text.bytes())),
                Self::ReplaceByte(byte, by) => {
                    let byte = at(byte);
                    file[byte] = by;
                }
                Self::DeleteRange(from, length) => drop(file.drain(at(from)..(at(from) + length).min(file.len()))),
                Self::Everywhere(from, to) => {
                    if let Ok(text) = std::str::from_utf8(file) {
                        *file = text.replace(from, to).into_bytes();
                    }
                }
                ref of_lines => {
                    let mut lines: Vec<Vec<u8>> =
                        file.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
                    let count = lines.len();
                    // Where all is one line by now, a line that goes is the file: nobody could tell.
                    if count < LINES {
                        return;
                    }
                    match *of_lines {
                        Self::DeleteLine(line) => drop(lines.remove(line % count)),
                        Self::DoubleLine(line) => lines.insert(line % count, lines[line % count].clone()),
                        Self::SwapLines(one, other) => lines.swap(one % count, other % count),
                        Self::IndentLine(line, text) => drop(lines[line % count].splice(..0, text.bytes())),
                        Self::LowerLine(line) => lines[line % count].make_ascii_lowercase(),
                        Self::JoinLine(line) => lines[line % count].retain(|byte| *byte != b'\n'),
                        _ => {}
                    }
                    *file = lines.concat();
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn a_file_that_went_wrong_is_read_whole_or_refused(
            mutations in vec(mutation(), 1..4),
            explained in any::<bool>(),
        ) {
            let text = if explained { "Authority of example.org\n  since: 2026\n\n" } else { "" };
            let mut file = format!("{text}{}{text}{}{}{text}", section(1), section(2), section(3)).into_bytes();
            for mutation in &mutations {
                mutation.apply(&mut file);
            }
            if let Ok(sections) = read(&file) {
                prop_assert!(sections.len() >= 3, "{} sections after {mutations:?} in\n{}", sections.len(), String::from_utf8_lossy(&file));
            }
        }

        #[test]
        fn a_file_that_was_cut_is_refused_or_ends_with_a_section(end in any::<prop::sample::Index>()) {
            let file = format!("{}{}{}", section(1), section(2), section(3));
            let file = &file[..end.index(file.len())];
            let whole = file.matches("-----END X509 CRL-----").count();
            match read(file.as_bytes()) {
                Ok(sections) => {
                    prop_assert_eq!(sections.len(), whole);
                    prop_assert!(file.is_empty() || file.trim_end().ends_with("-----END X509 CRL-----"), "{}", file);
                }
                Err(unread) => prop_assert!(unread.line >= 1),
            }
        }

        #[test]
        fn no_bytes_make_it_panic(file in vec(any::<u8>(), 0..400), text in "[-A-Z \\n=]{0,200}") {
            for content in [Content::Certificates, Content::Lists, Content::Key] {
                let _ = sections(&file, content);
                let _ = sections(text.as_bytes(), content);
            }
        }
    }
}
