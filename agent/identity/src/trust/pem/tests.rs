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
         localKeyID: 54 69 6D 65\nsubject=O = Bunter, CN = END-user\n{}   \n\t\n{}\nEnding in 2036\n# 0123456789abcdef",
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
        (Content::Certificates, "X509 CRL", "crl.pem beside an authority"),
        (Content::Certificates, "PRIVATE KEY", "take the private key out"),
        (Content::Certificates, "ENCRYPTED PRIVATE KEY", "take the private key out"),
        (Content::Certificates, "TRUSTED CERTIFICATE", "without -trustout"),
        (Content::Certificates, "CERTIFICAT", "-----BEGIN CERTIFICATE-----"),
        (Content::Certificates, "CERTIFICATE REQUEST", "-----BEGIN CERTIFICATE-----"),
        (Content::Certificates, "PKCS7", "-print_certs"),
        (Content::Lists, "CRL", "-----BEGIN X509 CRL-----"),
        (Content::Lists, "CERTIFICATE", "ca.pem of an authority"),
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
                let mut lines: Vec<Vec<u8>> = file.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
                let count = lines.len();
                // Where the file is one line by now, losing a line would lose all of it, which nobody could notice.
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
