//! A guest's whole file system as one cpio archive: programs of this host with their libraries, modules, an init.
//!
//! The archive is written here, not by cpio(1), so that the same files always give the same bytes: names sorted, times
//! and owners zero, inode numbers counted. A guest that counts instructions repeats only then.
//!
//! *Invariant:* a program keeps the path that it has on the host (`/usr/sbin/nginx`, symbolic links included), because
//! identities are given by path.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::run::{During, Fallible, which};

/// A file system that is being put together.
pub struct Image {
    entries: BTreeMap<String, Entry>,
}

enum Entry {
    Folder,
    Link(String),
    /// Content from a file of the host.
    Copy(PathBuf, u32),
    /// Content made here.
    Text(String, u32),
    /// A character device: major and minor number.
    Device(u32, u32),
}

impl Image {
    /// An empty file system with the folders and links that every Debian has.
    pub fn new() -> Self {
        let mut image = Self { entries: BTreeMap::new() };
        for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
            image.entries.insert(link.into(), Entry::Link(target.into()));
        }
        for folder in ["proc", "sys", "dev", "run", "tmp", "root", "mnt", "var/log", "var/lib", "usr/lib64", "usr/sbin"]
        {
            image.folder(folder);
        }
        image.entries.insert("var/run".into(), Entry::Link("/run".into()));
        image.entries.insert("dev/console".into(), Entry::Device(5, 1));
        image
    }

    /// A folder, with those above it.
    pub fn folder(&mut self, path: &str) {
        let mut whole = String::new();
        for part in path.trim_matches('/').split('/') {
            if !whole.is_empty() {
                whole.push('/');
            }
            whole.push_str(part);
            self.entries.entry(whole.clone()).or_insert(Entry::Folder);
        }
    }

    /// A file with this text.
    pub fn text(&mut self, path: &str, mode: u32, text: impl Into<String>) {
        self.insert(path, Entry::Text(text.into(), mode));
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.insert(path, Entry::Link(target.into()));
    }

    /// A file of the host under another name, without looking at what it needs.
    pub fn copy(&mut self, path: &str, from: &Path) -> Fallible {
        let mode = fs::metadata(from).during(from.display())?.permissions().mode() & 0o777;
        self.insert(path, Entry::Copy(from.to_path_buf(), mode));
        Ok(())
    }

    /// A program of the host under another name, with its libraries.
    pub fn program_as(&mut self, path: &str, from: &Path) -> Fallible {
        self.copy(path, from)?;
        self.libraries(from)
    }

    /// A program of the host by name, at its own place, with its libraries.
    pub fn program(&mut self, name: &str) -> Fallible {
        let file = which(name).ok_or_else(|| format!("no program {name} on this host"))?;
        self.as_on_host(&file)?;
        self.libraries(&file)
    }

    /// A file, link or whole folder of the host at its own place.
    pub fn as_on_host(&mut self, file: &Path) -> Fallible {
        let place = merged_usr(file);
        let about = fs::symlink_metadata(file).during(file.display())?;
        if about.is_dir() {
            self.folder(&place);
            for entry in fs::read_dir(file).during(file.display())? {
                self.as_on_host(&entry.during(file.display())?.path())?;
            }
            return Ok(());
        }
        if !about.is_symlink() {
            return self.copy(&place, file);
        }
        let target = fs::read_link(file).during(file.display())?;
        self.insert(&place, Entry::Link(target.to_string_lossy().into_owned()));
        let next = file.parent().unwrap_or(Path::new("/")).join(target);
        self.as_on_host(&without_dots(&next))
    }

    /// The archive's bytes.
    pub fn write(&self, out: &mut impl Write) -> Fallible {
        let mut number = 0;
        for (name, entry) in &self.entries {
            number += 1;
            let (mode, device, content) = match entry {
                Entry::Folder => (0o040_755, (0, 0), Vec::new()),
                Entry::Link(target) => (0o120_777, (0, 0), target.clone().into_bytes()),
                Entry::Copy(from, mode) => (0o100_000 | mode, (0, 0), fs::read(from).during(from.display())?),
                Entry::Text(text, mode) => (0o100_000 | mode, (0, 0), text.clone().into_bytes()),
                Entry::Device(major, minor) => (0o020_600, (*major, *minor), Vec::new()),
            };
            record(out, number, name, mode, device, &content).during("cannot write the guest's files")?;
        }
        record(out, number + 1, "TRAILER!!!", 0, (0, 0), &[]).during("cannot write the guest's files")
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let path = merged_usr(Path::new(path));
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder);
        }
        self.entries.insert(path, entry);
    }

    fn libraries(&mut self, program: &Path) -> Fallible {
        let output = Command::new("ldd").arg(program).output().during("cannot run ldd (package libc-bin)")?;
        // A static program makes ldd fail; it needs nothing.
        for library in libraries_of(&String::from_utf8_lossy(&output.stdout)) {
            self.as_on_host(&library)?;
        }
        Ok(())
    }
}

/// The absolute paths in what ldd prints, e.g. `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f...)`.
fn libraries_of(text: &str) -> Vec<PathBuf> {
    let words = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(PathBuf::from).collect()
}

/// The path without its leading slash, below usr/ where Debian has merged the old folders into it.
fn merged_usr(path: &Path) -> String {
    let path = without_dots(path).to_string_lossy().trim_start_matches('/').to_owned();
    let first = path.split('/').next().unwrap_or_default();
    let merged = matches!(first, "bin" | "sbin" | "lib" | "lib64") && path.contains('/');
    if merged { format!("usr/{path}") } else { path }
}

fn without_dots(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir => {}
            other => clean.push(other),
        }
    }
    clean
}

/// One member of a "newc" archive (Documentation/driver-api/early-userspace/buffer-format.rst).
fn record(
    out: &mut impl Write,
    number: u32,
    name: &str,
    mode: u32,
    device: (u32, u32),
    content: &[u8],
) -> io::Result<()> {
    let size = u32::try_from(content.len()).map_err(|_| io::Error::other(format!("{name} is over 4 GiB")))?;
    let fields = [number, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
    let mut head = String::from("070701");
    for field in fields {
        head.push_str(&format!("{field:08X}"));
    }
    out.write_all(head.as_bytes())?;
    out.write_all(name.as_bytes())?;
    // The name ends with a zero byte; then zeroes to a multiple of four.
    let padding = |length: usize| (4 - length % 4) % 4;
    let named = head.len() + name.len() + 1;
    out.write_all(&[0; 4][..1 + padding(named)])?;
    out.write_all(content)?;
    out.write_all(&[0; 4][..padding(content.len())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_give_the_same_bytes_whatever_the_order() {
        let write = |names: [&str; 2]| {
            let mut image = Image::new();
            for name in names {
                image.text(name, 0o644, name);
            }
            let mut bytes = Vec::new();
            image.write(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(write(["/etc/a", "/etc/b"]).len() % 4, 0);
        assert!(write(["/x", "/y"]) == write(["/y", "/x"]));
    }

    #[test]
    fn an_archive_is_read_back_by_cpio_as_it_was_written() {
        let mut bytes = Vec::new();
        record(&mut bytes, 1, "etc/odd", 0o100_644, (0, 0), b"12345").unwrap();
        assert!(bytes.starts_with(b"07070100000001000081A4"));
        assert_eq!(bytes.len() % 4, 0);
        let name = bytes.windows(8).position(|window| window == b"etc/odd\0").unwrap();
        assert_eq!(name, 110);
        assert_eq!(&bytes[120..125], b"12345");
    }

    #[test]
    fn programs_are_placed_where_a_merged_usr_has_them() {
        assert_eq!(merged_usr(Path::new("/lib/x86_64-linux-gnu/libc.so.6")), "usr/lib/x86_64-linux-gnu/libc.so.6");
        assert_eq!(merged_usr(Path::new("/usr/bin/../sbin/ip")), "usr/sbin/ip");
        assert_eq!(merged_usr(Path::new("/lib")), "lib");
        assert_eq!(merged_usr(Path::new("/etc/hosts")), "etc/hosts");
    }

    #[test]
    fn libraries_are_read_from_what_ldd_prints() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tlibgone.so => not found\n";
        let found = libraries_of(text);
        assert_eq!(found, [Path::new("/lib/x86_64-linux-gnu/libz.so.1"), Path::new("/lib64/ld-linux-x86-64.so.2")]);
    }
}
