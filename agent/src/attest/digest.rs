//! SHA-256 of executables, each read once.
//!
//! A digest is remembered under everything that changes when a file does. Only one file is read at a time, on a thread for
//! blocking work, so that a workload with a huge executable delays only itself and others whose executables have to be
//! read.
//!
//! *Invariant:* a file that changed while it was read, or so shortly before that its times could not show it, is never
//! remembered.

use super::process::Executable;
use crate::lock::lock;
use aws_lc_rs::digest::{Context, SHA256};
use rustix::fs::fstatfs;
use std::{
    collections::HashMap,
    fs::{File, Metadata},
    io::{self, Read, Seek},
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

/// Larger executables have no digest.
pub(crate) const SIZE_LIMIT: u64 = 512 << 20;
/// Remembered digests; beyond that all are forgotten.
const REMEMBERED: usize = 1024;
/// Times of files are no finer than a tick of the kernel; this is far more.
const SETTLED: Duration = Duration::from_secs(2);
/// `FUSE_SUPER_MAGIC` in fs/fuse/inode.c.
const FUSE: u64 = 0x6573_5546;

/// Digests that are known.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    known: Arc<Mutex<HashMap<Version, [u8; 32]>>>,
    /// Held while a file is read.
    reading: tokio::sync::Mutex<()>,
}

/// A file at one state of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Why there is no digest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoDigest {
    #[error("its executable is larger than {} MiB, which is the most that is hashed", SIZE_LIMIT >> 20)]
    TooLarge,
    #[error("its executable is on a FUSE file system, whose server could show other bytes than those that run")]
    Fuse,
    #[error("its executable changed while it was hashed")]
    Changed,
    #[error("its executable cannot be read: {0}")]
    Unreadable(#[from] io::Error),
}

impl Digests {
    /// The digest of an executable that is already open, so that it is the file that runs and not another one of the same
    /// name.
    pub(crate) async fn of(&self, executable: &Executable) -> Result<[u8; 32], NoDigest> {
        let version = Version::of(&executable.file.metadata()?);
        if version.size > SIZE_LIMIT {
            return Err(NoDigest::TooLarge);
        }
        if u64::try_from(fstatfs(&executable.file).map_err(io::Error::from)?.f_type) == Ok(FUSE) {
            return Err(NoDigest::Fuse);
        }
        if let Some(digest) = self.known(&version) {
            return Ok(digest);
        }
        let _reading = self.reading.lock().await;
        if let Some(digest) = self.known(&version) {
            return Ok(digest);
        }
        let (file, known) = (executable.file.try_clone()?, self.known.clone());
        tokio::task::spawn_blocking(move || read(file, version, &known)).await.map_err(io::Error::other)?
    }

    fn known(&self, version: &Version) -> Option<[u8; 32]> {
        lock(&self.known).get(version).copied()
    }
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(self.changed.0).is_ok_and(|changed| Duration::from_secs(changed) + SETTLED < now)
    }
}

fn read(mut file: File, version: Version, known: &Mutex<HashMap<Version, [u8; 32]>>) -> Result<[u8; 32], NoDigest> {
    let begun = SystemTime::now();
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0u8; 128 * 1024];
    let mut left = SIZE_LIMIT;
    file.rewind()?;
    loop {
        let count = file.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
        left = left.checked_sub(count as u64).ok_or(NoDigest::TooLarge)?;
        context.update(bytes);
    }
    if Version::of(&file.metadata()?) != version {
        return Err(NoDigest::Changed);
    }
    let mut digest = [0u8; 32];
    digest.iter_mut().zip(context.finish().as_ref()).for_each(|(to, from)| *to = *from);
    if version.is_settled(begun) {
        let mut known = lock(known);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(version, digest);
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn executable(path: &Path) -> Executable {
        let file = File::open(path).unwrap();
        let metadata = file.metadata().unwrap();
        Executable { file, path: path.into(), is_at_path: true, device: metadata.dev(), inode: metadata.ino() }
    }

    #[tokio::test]
    async fn the_digest_is_that_of_the_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        let digest = Digests::default().of(&executable(&path)).await.unwrap();
        // FIPS 180-4, the one-block example.
        assert_eq!(
            bunter_identity::trust::x509::hex(&digest),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[tokio::test]
    async fn a_file_that_has_just_changed_is_not_remembered_and_an_old_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        std::fs::write(&path, "new").unwrap();
        let digests = Digests::default();
        let first = digests.of(&executable(&path)).await.unwrap();
        assert!(digests.known.lock().unwrap().is_empty());
        std::fs::write(&path, "now").unwrap();
        assert_ne!(digests.of(&executable(&path)).await.unwrap(), first);
        let old = std::env::current_exe().unwrap();
        digests.of(&executable(Path::new("/usr/bin/env"))).await.unwrap();
        let remembered = Version::of(&std::fs::metadata("/usr/bin/env").unwrap());
        assert!(digests.known(&remembered).is_some(), "{}", old.display());
    }

    #[tokio::test]
    async fn an_executable_that_is_too_large_has_no_digest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("huge");
        File::create(&path).unwrap().set_len(SIZE_LIMIT + 1).unwrap();
        assert!(matches!(Digests::default().of(&executable(&path)).await, Err(NoDigest::TooLarge)));
    }
}
