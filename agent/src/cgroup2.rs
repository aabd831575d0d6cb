//! Where the unified cgroup hierarchy is mounted on this host.
//!
//! *Invariant:* only a mount of the whole hierarchy counts, so that paths below it are the paths that policy names.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The mount point, as this process sees it; `None` where the whole hierarchy is mounted nowhere.
pub fn mount_point() -> io::Result<Option<PathBuf>> {
    Ok(in_mountinfo(&std::fs::read("/proc/self/mountinfo")?))
}

/// Fields are separated by spaces, which the kernel writes as octal escapes inside of them; the optional fields end with
/// a lone `-` (proc_pid_mountinfo(5)). Of several mounts, the last one was mounted last and is the one that a path reaches.
fn in_mountinfo(text: &[u8]) -> Option<PathBuf> {
    let mut found = None;
    for line in text.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        let (Some(root), Some(point)) = (fields.nth(3), fields.next()) else { continue };
        if root == b"/" && fields.by_ref().any(|field| field == b"-") && fields.next() == Some(b"cgroup2") {
            found = Some(PathBuf::from(OsString::from_vec(unescape(point))));
        }
    }
    found
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => plain.push(*first),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_unified_hierarchy_is_found_wherever_it_is_mounted() {
        let hybrid = b"32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:4 master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(in_mountinfo(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let odd = b"41 31 0:38 / /a\\040b\\134c rw - cgroup2 none rw\n";
        assert_eq!(in_mountinfo(odd), Some("/a b\\c".into()));
        let both = b"41 31 0:38 / /below rw - cgroup2 none rw\n42 31 0:38 / /above rw - cgroup2 none rw\n\
            43 31 0:38 /part /beside rw - cgroup2 none rw\n";
        assert_eq!(in_mountinfo(both), Some("/above".into()));
    }

    #[test]
    fn a_part_of_the_hierarchy_and_a_file_system_that_only_says_cgroup2_are_not_taken() {
        for text in [
            "41 31 0:38 /sub /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "41 31 0:38 / /sys/fs/cgroup rw - tmpfs cgroup2 rw\n",
            "41 31 0:38 / /cgroup2 rw cgroup2 - ext4 - cgroup2\n",
            "41 31 0:38 / /x rw\n",
            "\n\n",
            "",
        ] {
            assert_eq!(in_mountinfo(text.as_bytes()), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_mountinfo_makes_the_parser_panic(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = in_mountinfo(&text);
        }
    }
}
