//! Reading and writing the files that trust rests on: a path in, checked bytes out.
//!
//! Permissions are looked at on the open file, not on the path, so that nobody can exchange it in between. Whatever is
//! written appears whole or not at all.
//!
//! *Invariant:* a file that somebody other than root or the agent's own user can change is never read as trusted, and
//! every buffer made here that may hold key bytes is wiped.

use crate::refusal::{Culprit, Refusal};
use rustix::fs::OFlags;
use std::{
    fs::{DirBuilder, Metadata, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// No certificate or key file comes near this size.
const LIMIT: u64 = 4 << 20;

/// What others may do with a file or a directory. Its owner has to be root or the user that runs this, but for
/// [`Guard::Inspected`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// Only its owner may read it or change it.
    Secret,
    /// Everybody may read it, only its owner may change it.
    Public,
    /// The same, and root's group, or that of whoever runs this, may change it as well.
    Group,
    /// It is only inspected, and nothing is done by it: any user may own it, but not everybody may change it.
    Inspected,
}

/// Why somebody could read or change a file or a directory who must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposure {
    /// It belongs to this user, who can change it whatever its mode says.
    Owner(u32),
    /// Its mode has these bits too many.
    Mode(u32),
}

impl Guard {
    /// What is wrong with owner and mode.
    pub fn exposure(self, metadata: &Metadata) -> Option<Exposure> {
        let own = |id: u32, mine: u32| id == 0 || id == mine;
        let (owner, group) = (metadata.uid(), metadata.gid());
        if self != Guard::Inspected && !own(owner, rustix::process::geteuid().as_raw()) {
            return Some(Exposure::Owner(owner));
        }
        let forbidden = match self {
            Guard::Secret => 0o077,
            Guard::Group if own(group, rustix::process::getegid().as_raw()) => 0o002,
            Guard::Public | Guard::Group => 0o022,
            Guard::Inspected => 0o002,
        };
        Some(metadata.mode() & forbidden).filter(|bits| *bits != 0).map(Exposure::Mode)
    }

    fn mode(self) -> u32 {
        match self {
            Guard::Secret => 0o600,
            Guard::Public | Guard::Group | Guard::Inspected => 0o644,
        }
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is no such file.
    #[error("{path}: there is no such file")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be read.
    #[error("{path}: cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than its owner may change it, or read it.
    #[error("{path}: mode {mode:04o} lets others {what} it: run chmod {wanted:o} {path}")]
    Exposed {
        /// The file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What they may do.
        what: &'static str,
        /// Mode that it should have.
        wanted: u32,
    },
    /// It belongs to another user.
    #[error("{path}: belongs to uid {owner}, not to root or to the user that runs Bunter: run chown root {path}")]
    ForeignOwner {
        /// The file or directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// It is far too big for what it should be.
    #[error("{path}: {size} bytes are too many for a certificate or key file (at most {LIMIT})")]
    TooBig {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Somebody writes to it at this moment.
    #[error("{path}: changed while it was read: write it under another name, then rename it, and reload")]
    Changing {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be written.
    #[error("{path}: cannot be written: {source}")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Refusal for FileError {
    fn culprit(&self) -> Culprit {
        Culprit::Host
    }
    fn code(&self) -> &'static str {
        match self {
            FileError::Missing { .. } => "file-missing",
            FileError::Unreadable { .. } => "file-unreadable",
            FileError::Exposed { .. } => "file-permissions",
            FileError::ForeignOwner { .. } => "file-owner",
            FileError::TooBig { .. } => "file-too-big",
            FileError::Changing { .. } => "file-changing",
            FileError::Unwritable { .. } => "file-unwritable",
        }
    }
}

/// Reads a whole file, after checking that nobody else could have written it or, if it is secret, can read it.
pub(crate) fn read(path: &Path, guard: Guard) -> Result<Zeroizing<Vec<u8>>, FileError> {
    // Without waiting: a pipe in the place of a file must not hold up a reload.
    let mut open = OpenOptions::new();
    let file = open.read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path);
    let mut file = file.map_err(|source| unreadable(path, source))?;
    let metadata = file.metadata().map_err(|source| unreadable(path, source))?;
    check(path, &metadata, guard)?;
    if !metadata.is_file() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
        return Err(FileError::Unreadable { path: path.into(), source });
    }
    let size = metadata.len();
    if size > LIMIT {
        return Err(FileError::TooBig { path: path.into(), size });
    }
    // Reserved beforehand: a vector that grows leaves unwiped copies of a key behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(size.saturating_add(1) as usize));
    (&mut file).take(size.saturating_add(1)).read_to_end(&mut bytes).map_err(|source| unreadable(path, source))?;
    let after = file.metadata().map_err(|source| unreadable(path, source))?;
    // A part of a file would be taken for a file in which a section is missing.
    if bytes.len() as u64 != size || change_of(&after) != change_of(&metadata) {
        return Err(FileError::Changing { path: path.into() });
    }
    Ok(bytes)
}

fn change_of(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

/// Checks that nobody else can put files into a directory.
pub(crate) fn check_directory(path: &Path) -> Result<(), FileError> {
    let metadata = std::fs::metadata(path).map_err(|source| unreadable(path, source))?;
    check(path, &metadata, Guard::Public).map_err(|error| match error {
        FileError::Exposed { path, mode, what, .. } => FileError::Exposed { path, mode, what, wanted: 0o700 },
        other => other,
    })
}

/// Makes a directory that only its owner can enter, with its parents, unless it is there.
pub(crate) fn make_directory(path: &Path) -> Result<(), FileError> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(|source| unwritable(path, source))?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result.map_err(|source| unwritable(path, source)),
    }
}

/// Writes a file whole or not at all. `replace`: an older one of that name may go.
pub(crate) fn write(path: &Path, bytes: &[u8], guard: Guard, replace: bool) -> Result<(), FileError> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.new", std::process::id()));
    let scratch = path.with_file_name(name);
    let written = write_scratch(&scratch, bytes, guard).and_then(|()| {
        if replace {
            std::fs::rename(&scratch, path)
        } else {
            // A hard link, unlike a rename, fails where the name is taken.
            std::fs::hard_link(&scratch, path).and_then(|()| std::fs::remove_file(&scratch))
        }
    });
    written.map_err(|source| {
        // The scratch file may not exist; then there is nothing to remove.
        let _ = std::fs::remove_file(&scratch);
        unwritable(path, source)
    })
}

/// Wraps DER into PEM (RFC 7468).
pub fn pem(label: &str, der: &[u8]) -> Zeroizing<String> {
    const LINE: usize = 64;
    let mut text = Zeroizing::new(String::with_capacity(der.len() * 3 / 2 + 2 * (label.len() + 20) + 8));
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    let mut column = 0;
    for chunk in der.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            text.push(if place > chunk.len() { '=' } else { base64_digit(bits >> (18 - 6 * place) & 63) });
        }
        column += 4;
        if column == LINE {
            text.push('\n');
            column = 0;
        }
    }
    if column > 0 {
        text.push('\n');
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}

fn base64_digit(value: u32) -> char {
    let value = value as u8 & 63;
    char::from(match value {
        0..26 => b'A' + value,
        26..52 => b'a' + (value - 26),
        52..62 => b'0' + (value - 52),
        62 => b'+',
        _ => b'/',
    })
}

fn write_scratch(path: &Path, bytes: &[u8], guard: Guard) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(guard.mode()).open(path)?;
    file.set_permissions(Permissions::from_mode(guard.mode()))?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn check(path: &Path, metadata: &Metadata, guard: Guard) -> Result<(), FileError> {
    match guard.exposure(metadata) {
        None => Ok(()),
        Some(Exposure::Owner(owner)) => Err(FileError::ForeignOwner { path: path.into(), owner }),
        Some(Exposure::Mode(bits)) => {
            let what = if bits & 0o022 != 0 { "change" } else { "read" };
            let mode = metadata.mode() & 0o7777;
            Err(FileError::Exposed { path: path.into(), mode, what, wanted: guard.mode() })
        }
    }
}

fn unreadable(path: &Path, source: io::Error) -> FileError {
    match source.kind() {
        io::ErrorKind::NotFound => FileError::Missing { path: path.into() },
        _ => FileError::Unreadable { path: path.into(), source },
    }
}

fn unwritable(path: &Path, source: io::Error) -> FileError {
    FileError::Unwritable { path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &Path, mode: u32) -> PathBuf {
        let path = dir.join(format!("file-{mode:o}"));
        std::fs::write(&path, b"content").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_file_that_others_may_change_is_refused_and_the_error_says_what_to_run() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o666, 0o646, 0o664] {
            let path = file(dir.path(), mode);
            let error = read(&path, Guard::Public).unwrap_err();
            assert_eq!(error.code(), "file-permissions");
            assert!(error.to_string().contains(&format!("chmod 644 {}", path.display())), "{error}");
        }
        assert_eq!(&read(&file(dir.path(), 0o644), Guard::Public).unwrap()[..], b"content");
    }

    #[test]
    fn a_secret_that_the_group_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o640, 0o604, 0o660] {
            assert_eq!(read(&file(dir.path(), mode), Guard::Secret).unwrap_err().code(), "file-permissions");
        }
        assert!(read(&file(dir.path(), 0o600), Guard::Secret).is_ok());
        assert!(read(&file(dir.path(), 0o400), Guard::Secret).is_ok());
    }

    #[test]
    fn a_missing_file_a_directory_and_a_huge_file_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(&dir.path().join("none"), Guard::Public).unwrap_err().code(), "file-missing");
        assert!(read(dir.path(), Guard::Public).is_err());
        let huge = file(dir.path(), 0o600);
        OpenOptions::new().write(true).open(&huge).unwrap().set_len(LIMIT + 1).unwrap();
        assert_eq!(read(&huge, Guard::Public).unwrap_err().code(), "file-too-big");
    }

    #[test]
    fn a_file_that_is_not_what_it_was_a_moment_ago_is_refused_and_a_pipe_is_not_waited_for() {
        // The kernel makes it up while it is read: its size says nothing, as that of a file that somebody is writing.
        let made_up = Path::new("/proc/self/status");
        assert_eq!(read(made_up, Guard::Public).unwrap_err().code(), "file-changing");
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let mode = rustix::fs::Mode::from(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert_eq!(read(&pipe, Guard::Public).unwrap_err().code(), "file-unreadable");
    }

    #[test]
    fn writing_without_replace_leaves_an_older_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        write(&path, b"one", Guard::Secret, false).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(write(&path, b"two", Guard::Secret, false).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        write(&path, b"three", Guard::Secret, true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no scratch file is left");
    }

    #[test]
    fn pem_is_what_other_readers_expect() {
        use rustls::pki_types::{CertificateDer, pem::PemObject};
        for length in [0usize, 1, 2, 3, 47, 48, 49, 500] {
            let der: Vec<u8> = (0..length).map(|byte| (byte * 7 % 256) as u8).collect();
            let text = pem("CERTIFICATE", &der);
            assert_eq!(CertificateDer::from_pem_slice(text.as_bytes()).unwrap().as_ref(), &der[..]);
            assert!(text.lines().all(|line| line.len() <= 64));
        }
    }
}
