//! Where this kernel keeps what the programs want to know of a task, from its own type information (BTF).
//!
//! The format is that of Documentation/bpf/btf.rst. Only names, members and their offsets are read.
//!
//! *Invariant:* a layout is whole or not there: without one the programs read nothing, and decide nothing by it.

use bunter_common::TaskLayout;

/// Type information of the running kernel.
const PATH: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

/// The layout of the running kernel; all zero where it cannot be found out.
pub(super) fn running() -> TaskLayout {
    let found = std::fs::read(PATH).ok().and_then(|bytes| of(&bytes));
    if found.is_none() {
        tracing::warn!(
            path = PATH,
            "this kernel does not tell how it lays out a task: who begins to listen is found out by the agent alone, and \
             listeners are refused until it has"
        );
    }
    found.unwrap_or_default()
}

fn of(bytes: &[u8]) -> Option<TaskLayout> {
    let types = Types::read(bytes)?;
    // A field of one bit: bit 24 and above of its offset are its size.
    let ipv6_only = types.bits("sock_common", "skc_ipv6only")?;
    Some(TaskLayout {
        real_cred: types.offset("task_struct", "real_cred")?,
        tgid: types.offset("task_struct", "tgid")?,
        cgroups: types.offset("task_struct", "cgroups")?,
        uid: types.offset("cred", "uid")?,
        gid: types.offset("cred", "gid")?,
        dfl_cgrp: types.offset("css_set", "dfl_cgrp")?,
        kn: types.offset("cgroup", "kn")?,
        id: types.offset("kernfs_node", "id")?,
        skc_net: types.offset("sock_common", "skc_net")?,
        net_cookie: types.offset("net", "net_cookie")?,
        ipv6_only: ipv6_only / 8,
        ipv6_only_bit: ipv6_only % 8,
        shutdown: types.offset("sock", "sk_shutdown")?,
    })
}

struct Types<'b> {
    types: &'b [u8],
    strings: &'b [u8],
    /// Where each type begins; their numbers count from 1.
    starts: Vec<u32>,
}

const STRUCTURE: u32 = 4;
const UNION: u32 = 5;

impl<'b> Types<'b> {
    fn read(bytes: &'b [u8]) -> Option<Self> {
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let word = |at| word_at(bytes, at);
        let (header, type_start, type_length) = (word(4)? as usize, word(8)? as usize, word(12)? as usize);
        let (string_start, string_length) = (word(16)? as usize, word(20)? as usize);
        let part = |start: usize, length: usize| {
            let start = header.checked_add(start)?;
            bytes.get(start..start.checked_add(length)?)
        };
        let mut all = Self {
            types: part(type_start, type_length)?,
            strings: part(string_start, string_length)?,
            starts: Vec::new(),
        };
        let mut at = 0;
        while at < all.types.len() {
            all.starts.push(u32::try_from(at).ok()?);
            let (kind, count, _) = all.info(at)?;
            at += 12
                + match kind {
                    // Integers, variables, declaration tags.
                    1 | 14 | 17 => 4,
                    3 => 12,
                    STRUCTURE | UNION | 15 | 19 => count * 12,
                    6 | 13 => count * 8,
                    2 | 7..=12 | 16 | 18 => 0,
                    _ => return None,
                };
        }
        Some(all)
    }

    /// Kind of the type that begins here, how many members it has, and whether some of them are fields of bits.
    fn info(&self, at: usize) -> Option<(u32, usize, bool)> {
        let info = word_at(self.types, at + 4)?;
        Some((info >> 24 & 0x1f, (info & 0xffff) as usize, info >> 31 != 0))
    }

    /// Offset of a member in bytes, also inside of members without a name.
    fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let bits = self.bits(structure, member)?;
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// The same in bits.
    fn bits(&self, structure: &str, member: &str) -> Option<u32> {
        let is_named = |at: &usize| {
            self.info(*at).is_some_and(|(kind, ..)| kind == STRUCTURE)
                && word_at(self.types, *at).and_then(|name| self.name(name)) == Some(structure.as_bytes())
        };
        let mut named = self.starts.iter().map(|at| *at as usize).filter(is_named);
        named.find_map(|at| self.find(at, member, 0))
    }

    fn find(&self, structure: usize, wanted: &str, depth: u32) -> Option<u32> {
        let (kind, count, bits) = self.info(structure)?;
        if depth > 8 || !matches!(kind, STRUCTURE | UNION) {
            return None;
        }
        (0..count).find_map(|index| {
            let at = structure + 12 + index * 12;
            let (name, number) = (word_at(self.types, at)?, word_at(self.types, at + 4)?);
            let offset = word_at(self.types, at + 8)? & if bits { 0x00ff_ffff } else { u32::MAX };
            if name == 0 {
                let inner = *self.starts.get((number as usize).checked_sub(1)?)?;
                return self.find(inner as usize, wanted, depth + 1)?.checked_add(offset);
            }
            (self.name(name) == Some(wanted.as_bytes())).then_some(offset)
        })
    }

    fn name(&self, at: u32) -> Option<&[u8]> {
        self.strings.get(at as usize..)?.split(|byte| *byte == 0).next()
    }
}

fn word_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_of_the_running_kernel_is_found() {
        let Ok(bytes) = std::fs::read(PATH) else {
            return eprintln!("SKIPPED (no {PATH}): the_layout_of_the_running_kernel_is_found");
        };
        let layout = of(&bytes).unwrap();
        assert!(layout.real_cred > 0 && layout.tgid > 0 && layout.cgroups > 0 && layout.dfl_cgrp > 0, "{layout:?}");
        assert_eq!(layout.gid, layout.uid + 4);
        assert!(layout.ipv6_only > 0 && layout.ipv6_only_bit < 8, "{layout:?}");
        // A prefix of it is no layout.
        assert_eq!(of(&bytes[..bytes.len() / 2]), None);
    }

    proptest! {
        #[test]
        fn nothing_panics_on_what_is_no_type_information(mut bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let [a, b, ..] = bytes.as_mut_slice() {
                [*a, *b] = MAGIC.to_ne_bytes();
            }
            let _ = of(&bytes);
        }
    }
}
