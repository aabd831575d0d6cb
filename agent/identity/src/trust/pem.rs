//! PEM files that trust rests on: text in, every section of it out, or the first line that was not understood.
//!
//! RFC 7468 lets a reader pass over what it does not know, and readers do. Here a section that was passed over would be an
//! authority that is missing, or a revoked certificate that stays good. So a line that might have been meant as a boundary,
//! or as the content of a section, has to be exactly that. The decoding itself is the library's.
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

/// A line outside of sections that consists of at least so many characters of Base64 is taken for a lost piece of a
/// section. The lines of a section have 64.
const PIECE: usize = 32;

/// How much of a line an error shows. Where a boundary lacks its line end, content follows in the same line, and that of a
/// key is secret.
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
            (Self::Certificates, "X509 CRL") => {
                "put revocation lists into a file of their own: crl.pem beside an authority, or what `crl` names in [[trust]]"
            }
            (Self::Lists, "CERTIFICATE") => {
                "put certificates into a file of their own: ca.pem of an authority, or what `bundle` names in [[trust]]"
            }
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
mod tests;
