//! `bunter ca revoke`: a certificate of the embedded authority in, a newly signed revocation list beside the authority
//! out.
//!
//! A list is replaced as a whole, under a lock on the directory, and only after it was read back as an agent would read it.
//! Reasons are not kept, because readers of a list make no use of them.
//!
//! *Invariant:* an entry never leaves a list, and the number of a list only grows, even after the file was removed.

use super::ca::{self, Authority, CaError};
use crate::{
    refusal::{Culprit, Refusal},
    spiffe::TrustDomain,
    trust::{
        crl::{self, About, CrlError, ListFault},
        files::{self, FileError, Guard},
        pem::{self, Content, Unread},
        x509::{Parsed, display_time, hex, unix_time},
    },
};
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use std::{
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// How long a list is good unless told otherwise: thirty days.
pub const DEFAULT_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// RFC 5280 section 4.1.2.2.
const LONGEST_SERIAL: usize = 20;

/// What is to be done to the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Revoke the certificate with this serial number, in hexadecimal as `bunter` and `openssl x509 -serial` print it.
    Serial(String),
    /// Revoke the first certificate of this PEM file.
    Certificate(PathBuf),
    /// Sign the same list anew, so that it is good for longer.
    Refresh,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Trust domain of the authority.
    pub domain: TrustDomain,
    /// The file of the list.
    pub path: PathBuf,
    /// The serial number that is revoked now, in hexadecimal.
    pub serial: Option<String>,
    /// The file was written. False where the serial number was in it already.
    pub written: bool,
    /// The list as it is now.
    pub list: About,
}

/// Why a certificate cannot be revoked.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// The authority.
    #[error(transparent)]
    Authority(#[from] CaError),
    /// The list that is there, or the one that was to be.
    #[error(transparent)]
    List(#[from] CrlError),
    /// The list that is there cannot be extended.
    #[error("revocation list of {domain}: {path}: {fault}")]
    Unreadable {
        /// Trust domain of the authority.
        domain: TrustDomain,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: ListFault,
    },
    /// The certificate's file.
    #[error("certificate to revoke: {0}")]
    File(FileError),
    /// Something in the certificate's file was not understood.
    #[error("certificate to revoke: {path}:{fault}")]
    Unread {
        /// The file.
        path: PathBuf,
        /// What, and in which line.
        fault: Unread,
    },
    /// The certificate.
    #[error("certificate to revoke: {path}: {why}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A serial number that cannot be one.
    #[error(
        "`{0}` is no serial number: write 1 to 20 octets in hexadecimal, such as 4f5a12, with or without colons, not zero"
    )]
    Serial(String),
    /// The lock by which one revocation waits for another cannot be taken.
    #[error("{path}: cannot be locked: {source}")]
    Lock {
        /// The authority's directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The cryptographic library failed.
    #[error("revocation list: signing failed: {0}. This is a defect of Bunter or of this host's random numbers")]
    Crypto(rcgen::Error),
}

impl Refusal for RevokeError {
    fn culprit(&self) -> Culprit {
        match self {
            RevokeError::Authority(error) => error.culprit(),
            RevokeError::Unread { .. } | RevokeError::Certificate { .. } | RevokeError::Serial(_) => Culprit::Policy,
            RevokeError::Crypto(_) => Culprit::Ourselves,
            _ => Culprit::Host,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            RevokeError::Authority(error) => error.code(),
            RevokeError::List(error) => error.code(),
            RevokeError::Unreadable { .. } => "crl-malformed",
            RevokeError::File(error) => error.code(),
            RevokeError::Unread { .. } | RevokeError::Certificate { .. } => "revoke-certificate",
            RevokeError::Serial(_) => "revoke-serial",
            RevokeError::Lock { .. } => "revoke-lock",
            RevokeError::Crypto(_) => "ca-crypto",
        }
    }
}

/// Carries out the order. `life`: for how long the list is good, at most as long as its authority.
pub fn revoke(dir: &Path, order: &Order, life: Duration, now: SystemTime) -> Result<Done, RevokeError> {
    let authority = Authority::load(dir, None, now)?;
    let serial = match order {
        Order::Serial(text) => Some(serial_from(text).ok_or_else(|| RevokeError::Serial(text.clone()))?),
        Order::Certificate(path) => Some(serial_of(path, &authority)?),
        Order::Refresh => None,
    };
    // Dropped, and so unlocked, at the end.
    let _lock = lock(dir)?;
    let path = dir.join(ca::LIST_FILE);
    let mut held = Held::read(&authority, path.clone(), now)?;
    let domain = authority.trust_domain().clone();
    if let (Some(serial), Some(list)) = (&serial, &held.about)
        && held.entries.iter().any(|entry| entry.serial_number.as_ref() == serial)
    {
        return Ok(Done { domain, path, serial: Some(hex(serial)), written: false, list: list.clone() });
    }
    held.entries.extend(serial.iter().map(|serial| entry(serial, now)));
    let pem = held.sign(&authority, life, now)?;
    // Read as an agent will read it before anybody can.
    let read = crl::parse(&domain, &path, pem.as_bytes(), &authority.anchors().authorities(), &[])?;
    let list = read
        .first()
        .map(|list| list.about().clone())
        .ok_or(CrlError::Empty { domain: domain.clone(), path: path.clone() })?;
    files::write(&path, pem.as_bytes(), Guard::Public, true).map_err(CaError::from)?;
    Ok(Done { domain, path, serial: serial.map(|serial| hex(&serial)), written: true, list })
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (domain, path) = (&self.domain, self.path.display());
        let About { number, revoked, next_update, .. } = &self.list;
        let until = display_time(*next_update);
        match (&self.serial, self.written) {
            (Some(serial), true) => writeln!(f, "revoked {serial} of {domain}")?,
            (Some(serial), false) => writeln!(f, "{serial} of {domain} was revoked already: nothing was changed")?,
            (None, _) => writeln!(f, "signed the revocation list of {domain} anew")?,
        }
        writeln!(f, "  {path}: list {number}, {revoked} revoked, good until {until}")?;
        writeln!(f, "  It is in force when the agents have reloaded: send them SIGHUP.")?;
        write!(f, "  Sign it anew with --refresh before that time: with a list that has expired, peers are refused.")
    }
}

/// The list that is there, or none.
#[derive(Default)]
struct Held {
    entries: Vec<RevokedCertParams>,
    number: Vec<u8>,
    about: Option<About>,
}

impl Held {
    fn read(authority: &Authority, path: PathBuf, now: SystemTime) -> Result<Self, RevokeError> {
        let domain = authority.trust_domain();
        let pem = match files::read(&path, Guard::Public) {
            Err(FileError::Missing { .. }) => return Ok(Self { number: number_after(&[], now), ..Self::default() }),
            pem => pem.map_err(|source| CrlError::File { domain: domain.clone(), source })?,
        };
        // One that has expired may still be extended.
        let lists = crl::parse(domain, &path, &pem, &authority.anchors().authorities(), &[])?;
        let unreadable = |fault| RevokeError::Unreadable { domain: domain.clone(), path: path.clone(), fault };
        let sections = pem::sections(&pem, Content::Lists).map_err(|fault| CrlError::Unread {
            domain: domain.clone(),
            path: path.clone(),
            fault,
        })?;
        let first = sections.first().ok_or_else(|| CrlError::Empty { domain: domain.clone(), path: path.clone() })?;
        let list = crl::read(&first.der).map_err(unreadable)?;
        let entries = list.iter_revoked_certificates().map(|old| RevokedCertParams {
            revocation_time: old.revocation_date.to_datetime(),
            ..entry(significant(old.raw_serial()), now)
        });
        let number = list.crl_number().map(|number| number.to_bytes_be()).unwrap_or_default();
        Ok(Self {
            entries: entries.collect(),
            number: number_after(&number, now),
            about: lists.first().map(|list| list.about().clone()),
        })
    }

    fn sign(self, authority: &Authority, life: Duration, now: SystemTime) -> Result<String, RevokeError> {
        let (this_update, next_update) = ca::validity(now, life, Some(authority.validity().not_after))?;
        let params = CertificateRevocationListParams {
            this_update: this_update.into(),
            next_update: next_update.into(),
            crl_number: SerialNumber::from_slice(&self.number),
            issuing_distribution_point: None,
            revoked_certs: self.entries,
            key_identifier_method: match authority.key_identifier()? {
                Some(identifier) => KeyIdMethod::PreSpecified(identifier),
                None => KeyIdMethod::Sha256,
            },
        };
        let list = params.signed_by(authority.issuer()).map_err(RevokeError::Crypto)?;
        Ok(files::pem("X509 CRL", list.der()).to_string())
    }
}

fn entry(serial: &[u8], now: SystemTime) -> RevokedCertParams {
    RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    }
}

/// The next number of a list: one more, and never less than the seconds since 1970, so that the numbers go on even where
/// the list was removed and begun again (RFC 5280 section 5.2.3).
fn number_after(last: &[u8], now: SystemTime) -> Vec<u8> {
    let mut next = last.to_vec();
    let carry = next.iter_mut().rev().all(|digit| {
        *digit = digit.wrapping_add(1);
        *digit == 0
    });
    if carry {
        next.insert(0, 1);
    }
    let clock = unix_time(now).as_secs().to_be_bytes();
    let (next, clock) = (significant(&next), significant(&clock));
    // Without leading zeros the longer number is the larger one.
    std::cmp::max((next.len(), next), (clock.len(), clock)).1.to_vec()
}

fn serial_from(text: &str) -> Option<Vec<u8>> {
    let digits: String = text.chars().filter(|character| *character != ':').collect();
    let padded = if digits.len().is_multiple_of(2) { digits } else { format!("0{digits}") };
    let octet = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair).ok().filter(|pair| pair.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        u8::from_str_radix(pair, 16).ok()
    };
    let serial: Vec<u8> = padded.as_bytes().chunks(2).map(octet).collect::<Option<_>>()?;
    let serial = significant(&serial);
    (1..=LONGEST_SERIAL).contains(&serial.len()).then(|| serial.to_vec())
}

/// The serial number of a certificate that this authority issued; any other's would hit somebody else's certificate.
fn serial_of(path: &Path, authority: &Authority) -> Result<Vec<u8>, RevokeError> {
    let wrong = |why: String| RevokeError::Certificate { path: path.into(), why };
    let pem = files::read(path, Guard::Public).map_err(RevokeError::File)?;
    let sections =
        pem::sections(&pem, Content::Certificates).map_err(|fault| RevokeError::Unread { path: path.into(), fault })?;
    let certificate = sections.first().ok_or_else(|| wrong("holds no PEM certificate".into()))?.certificate();
    let parsed = Parsed::parse(&certificate).map_err(|error| wrong(error.to_string()))?;
    if !authority.has_issued(&parsed)? {
        let domain = authority.trust_domain();
        return Err(wrong(format!("was not issued by this authority of {domain}: name the directory of its own")));
    }
    Ok(significant(parsed.raw_serial()).to_vec())
}

/// Without the zeros before it.
fn significant(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|octet| **octet == 0).count();
    number.get(zeros..).unwrap_or_default()
}

/// One at a time: the second one extends what the first one wrote.
fn lock(dir: &Path) -> Result<File, RevokeError> {
    let locked = File::open(dir).and_then(|directory| directory.lock().map(|()| directory));
    locked.map_err(|source| RevokeError::Lock { path: dir.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::bundle::Trust;
    use crate::trust::{crl::IssuerAndSerial, testing::*};
    use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject};
    use std::os::unix::fs::PermissionsExt;

    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn made() -> (tempfile::TempDir, PathBuf) {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("ca");
        ca::init(&dir, &domain_of("example.org"), ca::DEFAULT_LIFE, now()).unwrap();
        (scratch, dir)
    }

    fn serial(dir: &Path, text: &str, now: SystemTime) -> Done {
        revoke(dir, &Order::Serial(text.into()), DAY, now).unwrap()
    }

    /// Serial numbers and dates in the file, as another reader sees them.
    fn entries(dir: &Path) -> Vec<(String, i64)> {
        let der = CertificateRevocationListDer::from_pem_file(dir.join(ca::LIST_FILE)).unwrap();
        let list = x509_parser::parse_x509_crl(&der).unwrap().1;
        let entries = list.iter_revoked_certificates();
        entries.map(|entry| (hex(entry.raw_serial()), entry.revocation_date.timestamp())).collect()
    }

    fn seconds(time: SystemTime) -> i64 {
        i64::try_from(unix_time(time).as_secs()).unwrap()
    }

    #[test]
    fn a_revoked_certificate_is_on_a_list_that_the_agent_takes_and_everybody_can_read() {
        let (scratch, dir) = made();
        let out = scratch.path().join("peer");
        let id = id_of("spiffe://example.org/peer");
        let issued = ca::issue_files(&dir, &id, &out, HOUR, now()).unwrap();
        let done = revoke(&dir, &Order::Certificate(out.join("svid.pem")), DAY, now()).unwrap();
        assert_eq!((done.serial.as_deref(), done.written, done.list.revoked), (Some(&*issued.serial), true, 1));
        assert_eq!(done.list.next_update, now() + DAY);
        let path = dir.join(ca::LIST_FILE);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        let authority = Authority::load(&dir, None, now()).unwrap();
        let domain = domain_of("example.org");
        let trust = Trust::new().with(domain.clone(), authority.anchors().clone());
        let trust = trust.with_lists(&domain, &path, now()).unwrap();
        let other = authority.issue(&id, HOUR, now()).unwrap();
        let name = |certificate| [IssuerAndSerial::of(certificate).unwrap()];
        assert!(trust.revokes(&domain, &name(&issued.certificate)));
        assert!(!trust.revokes(&domain, &name(&other.certificate)));
        assert!(!trust.revokes(&domain_of("example.net"), &name(&issued.certificate)));
        let text = done.to_string();
        assert!(text.contains(&issued.serial) && text.contains("SIGHUP") && text.contains("2026-11-23"), "{text}");
    }

    #[test]
    fn a_list_grows_keeps_its_dates_and_counts_up() {
        let (_scratch, dir) = made();
        let first = serial(&dir, "05", now());
        let second = serial(&dir, "FF:01", now());
        let third = serial(&dir, "7", now() + HOUR);
        assert_eq!(third.list.revoked, 3);
        let at = seconds(now());
        assert_eq!(entries(&dir), [("05".into(), at), ("00ff01".into(), at), ("07".into(), at + 3600)]);
        let numbers = [first, second, third].map(|done| u64::from_str_radix(&done.list.number, 16).unwrap());
        assert!(numbers.is_sorted_by(|one, two| one < two), "{numbers:?}");
        // The list is begun again, but its numbers go on.
        std::fs::remove_file(dir.join(ca::LIST_FILE)).unwrap();
        let again = serial(&dir, "05", now() + HOUR + Duration::from_secs(1));
        assert!(u64::from_str_radix(&again.list.number, 16).unwrap() > numbers[2]);
    }

    #[test]
    fn a_serial_number_that_is_on_the_list_changes_nothing_however_it_is_written() {
        let (_scratch, dir) = made();
        serial(&dir, "00ff01", now());
        let before = std::fs::read(dir.join(ca::LIST_FILE)).unwrap();
        for text in ["ff01", "FF01", "00:FF:01", "0ff01"] {
            let done = serial(&dir, text, now() + HOUR);
            assert!(!done.written && done.to_string().contains("already"), "{text}: {done}");
            assert_eq!(std::fs::read(dir.join(ca::LIST_FILE)).unwrap(), before, "{text}");
        }
    }

    #[test]
    fn a_list_that_has_expired_can_be_signed_anew_and_one_that_is_not_there_begun() {
        let (_scratch, dir) = made();
        assert_eq!(revoke(&dir, &Order::Refresh, DAY, now()).unwrap().list.revoked, 0);
        serial(&dir, "05", now());
        let done = revoke(&dir, &Order::Refresh, DAY, now() + 3 * DAY).unwrap();
        assert_eq!((done.serial, done.written, done.list.revoked), (None, true, 1));
        assert_eq!(done.list.next_update, now() + 4 * DAY);
        assert_eq!(entries(&dir), [("05".into(), seconds(now()))]);
    }

    #[test]
    fn no_list_outlives_its_authority_and_none_lasts_no_time() {
        let (_scratch, dir) = made();
        let authority = Authority::load(&dir, None, now()).unwrap().validity().not_after;
        let done = revoke(&dir, &Order::Refresh, 2 * ca::DEFAULT_LIFE, now()).unwrap();
        assert_eq!(done.list.next_update, authority);
        assert_eq!(revoke(&dir, &Order::Refresh, Duration::ZERO, now()).unwrap_err().code(), "ca-no-life");
    }

    #[test]
    fn serial_numbers_are_read_as_they_are_printed() {
        for (text, expected) in [
            ("05", Some(&[5][..])),
            ("5", Some(&[5])),
            ("0005", Some(&[5])),
            ("ab:CD", Some(&[0xab, 0xcd])),
            ("ffffffffffffffffffffffffffffffffffffffff", Some(&[0xff; 20])),
            ("ffffffffffffffffffffffffffffffffffffffff01", None),
            ("", None),
            ("0", None),
            ("00:00", None),
            ("0x05", None),
            ("+5", None),
            ("g5", None),
            ("é5", None),
        ] {
            assert_eq!(serial_from(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn the_next_number_is_larger_and_not_below_the_clock() {
        let clock = SystemTime::UNIX_EPOCH + Duration::from_secs(0x1234);
        for (last, expected) in [
            (&[][..], &[0x12, 0x34][..]),
            (&[7], &[0x12, 0x34]),
            (&[0x12, 0x34], &[0x12, 0x35]),
            (&[0, 0x12, 0xff], &[0x13, 0]),
            (&[0xff, 0xff], &[1, 0, 0]),
        ] {
            assert_eq!(number_after(last, clock), expected, "{last:?}");
        }
    }

    #[test]
    fn a_certificate_of_another_authority_is_not_revoked() {
        let (scratch, dir) = made();
        let (_other_scratch, other) = made();
        let id = id_of("spiffe://example.org/peer");
        ca::issue_files(&other, &id, &scratch.path().join("peer"), HOUR, now()).unwrap();
        std::fs::write(scratch.path().join("rubbish.pem"), "rubbish").unwrap();
        for (file, word) in [("peer/svid.pem", "was not issued"), ("rubbish.pem", "no PEM"), ("none.pem", "no such")] {
            let error = revoke(&dir, &Order::Certificate(scratch.path().join(file)), DAY, now()).unwrap_err();
            assert!(error.to_string().contains(word) && error.to_string().contains(file), "{error}");
        }
        assert!(!dir.join(ca::LIST_FILE).exists());
    }

    #[test]
    fn a_list_that_cannot_be_extended_is_left_as_it_is() {
        let (_scratch, dir) = made();
        let (_other_scratch, other) = made();
        serial(&other, "05", now());
        let foreign = std::fs::read(other.join(ca::LIST_FILE)).unwrap();
        for (content, code) in [(&b"rubbish"[..], "crl-empty"), (&foreign, "crl-other-authority")] {
            std::fs::write(dir.join(ca::LIST_FILE), content).unwrap();
            let error = revoke(&dir, &Order::Serial("06".into()), DAY, now()).unwrap_err();
            assert_eq!((error.code(), error.culprit()), (code, Culprit::Host));
            assert_eq!(std::fs::read(dir.join(ca::LIST_FILE)).unwrap(), content);
        }
    }

    #[test]
    fn two_who_revoke_at_once_do_not_lose_an_entry() {
        let (_scratch, dir) = made();
        let threads: Vec<_> = (1..=8)
            .map(|number| {
                let dir = dir.clone();
                std::thread::spawn(move || serial(&dir, &format!("{number:02}"), now()))
            })
            .collect();
        threads.into_iter().for_each(|thread| drop(thread.join().unwrap()));
        assert_eq!(entries(&dir).len(), 8);
    }
}
