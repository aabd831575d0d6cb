//! SPIFFE IDs and trust domains: parsed once, compared cheaply.
//!
//! A string comes in, a value that satisfies R1 to R14 goes out, or an error that says what is wrong and at which
//! character. [`Pattern`] is the one explicit way to mean more than one ID (R17).
//!
//! *Invariant:* nothing is repaired (R13). What is not written in canonical form is refused, so two IDs are the same
//! workload exactly when their bytes are equal (R11).

use std::{fmt, str::FromStr, sync::Arc};

/// Longest identifier in bytes, the scheme included (R4, R5).
pub const MAX_ID: usize = 2048;
/// Longest trust domain name in bytes (R5).
pub const MAX_TRUST_DOMAIN: usize = 255;

const SCHEME: &str = "spiffe://";

/// A trust domain name: `example.org`. Names that look like IP addresses or DNS names are treated like any other (R7).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// A SPIFFE ID with a path: `spiffe://example.org/web`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    path_at: u16,
}

/// An explicit pattern over SPIFFE IDs (R17).
///
/// - `*` stands for exactly one whole path segment: `spiffe://example.org/ns/*/web`.
/// - `**` stands for one or more segments and may only be the last: `spiffe://example.org/ns/**`.
/// - Everything else is compared byte by byte. The trust domain is never a wildcard, and a segment is either a wildcard
///   or literal: `web-*` is refused.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern {
    text: Arc<str>,
    path_at: u16,
}

/// What is wrong with an identifier, and where. `at` counts characters from 1 over the whole identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant says what it is")]
pub enum InvalidId {
    #[error("it is empty: write spiffe://TRUST-DOMAIN/PATH")]
    Empty,
    #[error("it is {length} bytes long, and {MAX_ID} is the most (R5)")]
    TooLong { length: usize },
    #[error("it does not begin with `spiffe://` (R6)")]
    Scheme,
    #[error("the scheme must be written in lower case: `spiffe://` (R13)")]
    SchemeCase,
    #[error("the trust domain is empty (R1)")]
    TrustDomainEmpty,
    #[error("the trust domain is {length} bytes long, and {MAX_TRUST_DOMAIN} is the most (R5)")]
    TrustDomainTooLong { length: usize },
    #[error("the trust domain has the capital letter `{letter}` at character {at}: write it in lower case (R7, R13)")]
    TrustDomainCase { letter: char, at: usize },
    #[error("the trust domain has user information, ending in `@` at character {at} (R3)")]
    UserInformation { at: usize },
    #[error("the trust domain has a port, at character {at} (R3)")]
    Port { at: usize },
    #[error("percent-encoding at character {at} (R7, R8)")]
    PercentEncoding { at: usize },
    #[error("a query, at character {at} (R3)")]
    Query { at: usize },
    #[error("a fragment, at character {at} (R3)")]
    Fragment { at: usize },
    #[error("`{}` at character {at} cannot be in a trust domain: only a to z, 0 to 9, `.`, `-` and `_` can (R7)", .found.escape_debug())]
    TrustDomainCharacter { found: char, at: usize },
    #[error("the path is missing: write spiffe://TRUST-DOMAIN/PATH (R2)")]
    PathMissing,
    #[error("a trailing `/` at character {at} (R8)")]
    TrailingSlash { at: usize },
    #[error("an empty path segment at character {at} (R8)")]
    EmptySegment { at: usize },
    #[error("the relative path segment `{segment}` at character {at} (R8)")]
    RelativeSegment { segment: &'static str, at: usize },
    #[error("`{}` at character {at} cannot be in a path: only letters, digits, `.`, `-`, `_` and `/` can (R8)", .found.escape_debug())]
    PathCharacter { found: char, at: usize },
    #[error("there is a path, and the ID of a trust domain has none: write spiffe://TRUST-DOMAIN")]
    PathPresent,
    #[error("the pattern has no wildcard: write the ID itself, without `pattern`")]
    NoWildcard,
    #[error("`*` at character {at} shares its segment with other characters: `*` stands for one whole segment (R17)")]
    PartialWildcard { at: usize },
    #[error("`**` at character {at} is not the last segment")]
    InnerDoubleWildcard { at: usize },
    #[error("a wildcard in the trust domain, at character {at}: name each trust domain (R16, R17)")]
    TrustDomainWildcard { at: usize },
}

impl TrustDomain {
    /// Parses a trust domain name: `example.org`, without a scheme.
    pub fn parse(name: &str) -> Result<Self, InvalidId> {
        check_trust_domain(name, 0)?;
        Ok(Self(name.into()))
    }

    /// Parses the SPIFFE ID of a trust domain itself, as signing certificates carry it (R32): `spiffe://example.org`.
    pub fn parse_id(uri: &str) -> Result<Self, InvalidId> {
        let (trust_domain, path) = split(uri)?;
        check_trust_domain(trust_domain, SCHEME.len())?;
        if path.is_empty() { Ok(Self(trust_domain.into())) } else { Err(InvalidId::PathPresent) }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE ID of the trust domain itself: `spiffe://example.org`.
    pub fn id(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }
}

impl SpiffeId {
    /// Parses a complete SPIFFE ID with a non-root path.
    pub fn parse(uri: &str) -> Result<Self, InvalidId> {
        let (trust_domain, path) = split(uri)?;
        check_trust_domain(trust_domain, SCHEME.len())?;
        let path_at = path_start(trust_domain);
        for (at, segment) in segments(path, path_at.into())? {
            check_segment(segment, at)?;
        }
        Ok(Self { uri: uri.into(), path_at })
    }

    /// The complete URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The trust domain part.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.trust_domain_name().into())
    }

    /// The name of the trust domain.
    pub fn trust_domain_name(&self) -> &str {
        self.uri.get(SCHEME.len()..self.path_at.into()).unwrap_or_default()
    }

    /// The path, beginning with `/`.
    pub fn path(&self) -> &str {
        self.uri.get(self.path_at.into()..).unwrap_or_default()
    }

    /// Is this ID in that trust domain? No allocation, for verifiers.
    pub fn is_member_of(&self, trust_domain: &TrustDomain) -> bool {
        self.trust_domain_name() == trust_domain.as_str()
    }
}

impl Pattern {
    /// Parses a pattern; it must have at least one wildcard.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let (trust_domain, path) = split(text)?;
        if let Some(at) = trust_domain.find('*') {
            return Err(InvalidId::TrustDomainWildcard { at: SCHEME.len() + at + 1 });
        }
        check_trust_domain(trust_domain, SCHEME.len())?;
        let path_at = path_start(trust_domain);
        let mut double = None;
        let mut wildcard = false;
        for (at, segment) in segments(path, path_at.into())? {
            if let Some(at) = double {
                return Err(InvalidId::InnerDoubleWildcard { at });
            }
            match segment {
                "**" => double = Some(at + 1),
                "*" => {}
                _ => {
                    if let Some(star) = segment.find('*') {
                        return Err(InvalidId::PartialWildcard { at: at + star + 1 });
                    }
                    check_segment(segment, at)?;
                    continue;
                }
            }
            wildcard = true;
        }
        if wildcard { Ok(Self { text: text.into(), path_at }) } else { Err(InvalidId::NoWildcard) }
    }

    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain that every matching ID is in.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.trust_domain_name().into())
    }

    fn trust_domain_name(&self) -> &str {
        self.text.get(SCHEME.len()..self.path_at.into()).unwrap_or_default()
    }

    fn path(&self) -> &str {
        self.text.get(self.path_at.into()..).unwrap_or_default()
    }

    /// Does the complete URI match?
    pub fn matches(&self, id: &SpiffeId) -> bool {
        if self.trust_domain_name() != id.trust_domain_name() {
            return false;
        }
        let mut segments = id.path().split('/').skip(1);
        for wanted in self.path().split('/').skip(1) {
            match (wanted, segments.next()) {
                (_, None) => return false,
                ("**", Some(_)) => return true,
                ("*", Some(_)) => {}
                (literal, Some(segment)) if literal == segment => {}
                _ => return false,
            }
        }
        segments.next().is_none()
    }
}

/// Cuts an identifier into trust domain and path (empty, or beginning with `/`), and bounds its length.
fn split(uri: &str) -> Result<(&str, &str), InvalidId> {
    if uri.is_empty() {
        return Err(InvalidId::Empty);
    }
    if uri.len() > MAX_ID {
        return Err(InvalidId::TooLong { length: uri.len() });
    }
    let Some(rest) = uri.strip_prefix(SCHEME) else {
        let other_case = uri.get(..SCHEME.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME));
        return Err(if other_case { InvalidId::SchemeCase } else { InvalidId::Scheme });
    };
    Ok(rest.split_at(rest.find('/').unwrap_or(rest.len())))
}

/// Where the path begins; `split` has bounded the whole by [`MAX_ID`].
fn path_start(trust_domain: &str) -> u16 {
    u16::try_from(SCHEME.len() + trust_domain.len()).unwrap_or(u16::MAX)
}

/// `before` is the number of characters in front of `name`; all of them are ASCII, as is everything before the first
/// character that is wrong, so bytes and characters count the same.
fn check_trust_domain(name: &str, before: usize) -> Result<(), InvalidId> {
    if name.is_empty() {
        return Err(InvalidId::TrustDomainEmpty);
    }
    if let Some(at) = name.find('@') {
        return Err(InvalidId::UserInformation { at: before + at + 1 });
    }
    for (index, found) in name.char_indices() {
        let at = before + index + 1;
        match found {
            'a'..='z' | '0'..='9' | '.' | '-' | '_' => {}
            'A'..='Z' => return Err(InvalidId::TrustDomainCase { letter: found, at }),
            ':' => return Err(InvalidId::Port { at }),
            _ => return Err(delimiter(found, at).unwrap_or(InvalidId::TrustDomainCharacter { found, at })),
        }
    }
    if name.len() > MAX_TRUST_DOMAIN {
        return Err(InvalidId::TrustDomainTooLong { length: name.len() });
    }
    Ok(())
}

/// The segments of a path and the number of characters in front of each.
fn segments(path: &str, before: usize) -> Result<impl Iterator<Item = (usize, &str)>, InvalidId> {
    let inside = match path.strip_prefix('/') {
        None | Some("") => return Err(InvalidId::PathMissing),
        Some(inside) => inside,
    };
    // A slash that ends a query or fragment is not what is wrong with it.
    if inside.ends_with('/') && !inside.contains(['?', '#']) {
        return Err(InvalidId::TrailingSlash { at: before + path.chars().count() });
    }
    let mut at = before + 1;
    Ok(inside.split('/').map(move |segment| {
        let begins = at;
        at += segment.len() + 1;
        (begins, segment)
    }))
}

fn check_segment(segment: &str, before: usize) -> Result<(), InvalidId> {
    match segment {
        "" => return Err(InvalidId::EmptySegment { at: before + 1 }),
        "." => return Err(InvalidId::RelativeSegment { segment: ".", at: before + 1 }),
        ".." => return Err(InvalidId::RelativeSegment { segment: "..", at: before + 1 }),
        _ => {}
    }
    for (index, found) in segment.char_indices() {
        let at = before + index + 1;
        match found {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_' => {}
            _ => return Err(delimiter(found, at).unwrap_or(InvalidId::PathCharacter { found, at })),
        }
    }
    Ok(())
}

/// Characters that mean something in other URIs get an error that says what.
fn delimiter(found: char, at: usize) -> Option<InvalidId> {
    match found {
        '%' => Some(InvalidId::PercentEncoding { at }),
        '?' => Some(InvalidId::Query { at }),
        '#' => Some(InvalidId::Fragment { at }),
        _ => None,
    }
}

/// What every identifier type of this file is to the rest of the world: a string.
macro_rules! text {
    ($type:ident) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($type), self.as_str())
            }
        }
        impl FromStr for $type {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::parse(text)
            }
        }
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                Self::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

text!(TrustDomain);
text!(SpiffeId);
text!(Pattern);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(uri: &str) -> String {
        SpiffeId::parse(uri).map(|id| format!("accepted {id}")).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn canonical_ids_are_accepted_and_taken_apart() {
        for (uri, trust_domain, path) in [
            ("spiffe://example.org/web", "example.org", "/web"),
            ("spiffe://example.org/ns/prod/sa/Web.Server_1-a", "example.org", "/ns/prod/sa/Web.Server_1-a"),
            ("spiffe://td/a", "td", "/a"),
            ("spiffe://a_b-c.d/...", "a_b-c.d", "/..."),
            ("spiffe://example.org/.hidden/..x", "example.org", "/.hidden/..x"),
        ] {
            let id = SpiffeId::parse(uri).unwrap();
            assert_eq!((id.trust_domain_name(), id.path(), id.as_str()), (trust_domain, path, uri));
            assert!(id.is_member_of(&TrustDomain::parse(trust_domain).unwrap()));
        }
    }

    #[test]
    fn r1_an_authority_is_needed() {
        assert_eq!(refusal(""), "it is empty: write spiffe://TRUST-DOMAIN/PATH");
        assert_eq!(refusal("spiffe://"), "the trust domain is empty (R1)");
        assert_eq!(refusal("spiffe:///web"), "the trust domain is empty (R1)");
        assert_eq!(refusal("/web"), "it does not begin with `spiffe://` (R6)");
    }

    #[test]
    fn r2_a_path_is_needed() {
        let missing = "the path is missing: write spiffe://TRUST-DOMAIN/PATH (R2)";
        assert_eq!(refusal("spiffe://example.org"), missing);
        assert_eq!(refusal("spiffe://example.org/"), missing);
    }

    #[test]
    fn r3_no_query_fragment_user_information_or_port() {
        assert_eq!(refusal("spiffe://example.org/web?x=1"), "a query, at character 25 (R3)");
        assert_eq!(refusal("spiffe://example.org?x"), "a query, at character 21 (R3)");
        assert_eq!(refusal("spiffe://example.org/web#x"), "a fragment, at character 25 (R3)");
        assert_eq!(refusal("spiffe://example.org/web?a/"), "a query, at character 25 (R3)");
        assert_eq!(
            refusal("spiffe://user:word@example.org/web"),
            "the trust domain has user information, ending in `@` at character 19 (R3)"
        );
        assert_eq!(refusal("spiffe://example.org:8443/web"), "the trust domain has a port, at character 21 (R3)");
    }

    #[test]
    fn r4_r5_2048_bytes_are_taken_and_2049_are_not() {
        let longest = format!("spiffe://example.org/{}", "a".repeat(MAX_ID - 21));
        assert_eq!(SpiffeId::parse(&longest).unwrap().as_str().len(), 2048);
        assert_eq!(refusal(&format!("{longest}a")), "it is 2049 bytes long, and 2048 is the most (R5)");
        let domain = "d".repeat(MAX_TRUST_DOMAIN);
        assert!(SpiffeId::parse(&format!("spiffe://{domain}/web")).is_ok());
        assert_eq!(
            refusal(&format!("spiffe://{domain}d/web")),
            "the trust domain is 256 bytes long, and 255 is the most (R5)"
        );
    }

    #[test]
    fn r6_r12_the_scheme_is_spiffe() {
        for uri in
            ["http://example.org/web", "wimse://example.org/web", "spiffe:/example.org/web", "spiffe", "ſpiffe://a/b"]
        {
            assert_eq!(refusal(uri), "it does not begin with `spiffe://` (R6)", "{uri}");
        }
    }

    #[test]
    fn r7_trust_domain_characters() {
        for (uri, expected) in [
            ("spiffe://exam%70le.org/web", "percent-encoding at character 14 (R7, R8)"),
            (
                "spiffe://exämple.org/web",
                "`ä` at character 12 cannot be in a trust domain: only a to z, 0 to 9, `.`, `-` and `_` can (R7)",
            ),
            (
                "spiffe://[fd00__1]/web",
                "`[` at character 10 cannot be in a trust domain: only a to z, 0 to 9, `.`, `-` and `_` can (R7)",
            ),
            (
                "spiffe://example.org\n/web",
                "`\\n` at character 21 cannot be in a trust domain: only a to z, 0 to 9, `.`, `-` and `_` can (R7)",
            ),
        ] {
            assert_eq!(refusal(uri), expected);
        }
    }

    #[test]
    fn r7_names_that_look_like_addresses_are_treated_the_same() {
        for uri in ["spiffe://10.0.0.1/web", "spiffe://999.999.1.1/web", "spiffe://-/web", "spiffe://..a/web"] {
            assert!(SpiffeId::parse(uri).is_ok(), "{uri}");
        }
    }

    #[test]
    fn r8_path_segments() {
        for (uri, expected) in [
            ("spiffe://example.org/web/", "a trailing `/` at character 25 (R8)"),
            ("spiffe://example.org//", "a trailing `/` at character 22 (R8)"),
            ("spiffe://example.org//web", "an empty path segment at character 22 (R8)"),
            ("spiffe://example.org/a//b", "an empty path segment at character 24 (R8)"),
            ("spiffe://example.org/./b", "the relative path segment `.` at character 22 (R8)"),
            ("spiffe://example.org/a/../b", "the relative path segment `..` at character 24 (R8)"),
            ("spiffe://example.org/a/%2e%2e", "percent-encoding at character 24 (R7, R8)"),
            (
                "spiffe://example.org/we b",
                "` ` at character 24 cannot be in a path: only letters, digits, `.`, `-`, `_` and `/` can (R8)",
            ),
            (
                "spiffe://example.org/*",
                "`*` at character 22 cannot be in a path: only letters, digits, `.`, `-`, `_` and `/` can (R8)",
            ),
        ] {
            assert_eq!(refusal(uri), expected, "{uri}");
        }
    }

    #[test]
    fn r9_r13_other_case_is_refused_and_never_repaired() {
        assert_eq!(refusal("SPIFFE://example.org/web"), "the scheme must be written in lower case: `spiffe://` (R13)");
        assert_eq!(
            refusal("spiffe://Example.org/web"),
            "the trust domain has the capital letter `E` at character 10: write it in lower case (R7, R13)"
        );
    }

    #[test]
    fn r9_r11_the_path_is_compared_with_its_case() {
        let (lower, upper) = (SpiffeId::parse("spiffe://td/web").unwrap(), SpiffeId::parse("spiffe://td/Web").unwrap());
        assert_ne!(lower, upper);
    }

    #[test]
    fn the_id_of_a_trust_domain_has_no_path() {
        assert_eq!(TrustDomain::parse_id("spiffe://example.org").unwrap().id(), "spiffe://example.org");
        assert_eq!(TrustDomain::parse_id("spiffe://example.org/"), Err(InvalidId::PathPresent));
        assert_eq!(TrustDomain::parse_id("spiffe://example.org/web"), Err(InvalidId::PathPresent));
        assert_eq!(TrustDomain::parse("spiffe://example.org"), Err(InvalidId::Port { at: 7 }));
    }

    #[test]
    fn r17_a_pattern_means_what_it_says_and_no_more() {
        for (pattern, id, expected) in [
            ("spiffe://td/ns/*", "spiffe://td/ns/a", true),
            ("spiffe://td/ns/*", "spiffe://td/ns/a/b", false),
            ("spiffe://td/ns/*", "spiffe://td/ns", false),
            ("spiffe://td/ns/*", "spiffe://td2/ns/a", false),
            ("spiffe://td/ns/*", "spiffe://td/ns2/a", false),
            ("spiffe://td/ns/*/web", "spiffe://td/ns/x/web", true),
            ("spiffe://td/ns/*/web", "spiffe://td/ns/x/web2", false),
            ("spiffe://td/ns/*/web", "spiffe://td/ns/x/y/web", false),
            ("spiffe://td/ns/**", "spiffe://td/ns/a", true),
            ("spiffe://td/ns/**", "spiffe://td/ns/a/b/c", true),
            ("spiffe://td/ns/**", "spiffe://td/ns", false),
            ("spiffe://td/**", "spiffe://td/anything/at/all", true),
            ("spiffe://td/*", "spiffe://td/Web", true),
            ("spiffe://td/*/**", "spiffe://td/a", false),
            ("spiffe://td/a/*", "spiffe://td/A/b", false),
        ] {
            let matches = Pattern::parse(pattern).unwrap().matches(&SpiffeId::parse(id).unwrap());
            assert_eq!(matches, expected, "{pattern} {id}");
        }
    }

    #[test]
    fn r17_a_pattern_is_explicit() {
        for (pattern, expected) in [
            ("spiffe://td/web", "the pattern has no wildcard: write the ID itself, without `pattern`"),
            ("spiffe://*/web", "a wildcard in the trust domain, at character 10: name each trust domain (R16, R17)"),
            (
                "spiffe://td/web-*",
                "`*` at character 17 shares its segment with other characters: `*` stands for one whole segment (R17)",
            ),
            ("spiffe://td/**/web", "`**` at character 13 is not the last segment"),
            (
                "spiffe://td/***",
                "`*` at character 13 shares its segment with other characters: `*` stands for one whole segment (R17)",
            ),
            ("spiffe://td/*/", "a trailing `/` at character 14 (R8)"),
            ("spiffe://td/*/..", "the relative path segment `..` at character 15 (R8)"),
        ] {
            assert_eq!(Pattern::parse(pattern).unwrap_err().to_string(), expected, "{pattern}");
        }
    }

    #[test]
    fn identifiers_travel_as_strings() {
        let id: SpiffeId = serde_json::from_str("\"spiffe://td/a\"").unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"spiffe://td/a\"");
        let error = serde_json::from_str::<SpiffeId>("\"spiffe://td\"").unwrap_err().to_string();
        assert!(error.starts_with("the path is missing"), "{error}");
    }

    proptest! {
        #[test]
        fn parse_and_print_are_inverse(
            domain in "[a-z0-9._-]{1,40}",
            path in proptest::collection::vec("[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,12}", 1..6),
        ) {
            let uri = format!("spiffe://{domain}/{}", path.join("/"));
            let id = SpiffeId::parse(&uri).unwrap();
            prop_assert_eq!(id.to_string(), uri);
            prop_assert_eq!(SpiffeId::parse(id.as_str()).unwrap(), id.clone());
            prop_assert_eq!(id.trust_domain_name(), domain);
        }

        #[test]
        fn nothing_panics_and_what_is_accepted_is_canonical(text in any::<String>(), tail in "\\PC{0,30}") {
            for text in [text.clone(), format!("spiffe://{text}"), format!("spiffe://td/{tail}"), format!("spiffe://{tail}")] {
                if let Ok(id) = SpiffeId::parse(&text) {
                    prop_assert_eq!(id.as_str(), &text);
                    prop_assert!(id.path().split('/').skip(1).all(|segment| !matches!(segment, "" | "." | "..")));
                }
                let _ = (TrustDomain::parse(&text), TrustDomain::parse_id(&text), Pattern::parse(&text));
            }
        }

        #[test]
        fn a_pattern_with_one_star_matches_as_a_slow_reference_does(
            left in proptest::collection::vec(prop_oneof![Just("*"), "[ab]{1,2}".prop_map(|s| if s == "a" { "a" } else { "b" })], 1..4),
            right in proptest::collection::vec(prop_oneof![Just("a"), Just("b"), Just("c")], 1..4),
        ) {
            let Ok(pattern) = Pattern::parse(&format!("spiffe://td/{}", left.join("/"))) else { return Ok(()) };
            let id = SpiffeId::parse(&format!("spiffe://td/{}", right.join("/"))).unwrap();
            let expected = left.len() == right.len() && left.iter().zip(&right).all(|(l, r)| *l == "*" || l == r);
            prop_assert_eq!(pattern.matches(&id), expected);
        }
    }
}
