//! Selectors: what a registration entry asks of a process.
//!
//! The text of a selector and the host's accounts come in, a [`Selector`] goes out. Whether it holds is asked of
//! [`Evidence`], the cheap facts first.
//!
//! *Invariant:* nothing here believes what a process can write about itself; each selector holds by what the kernel says.

use super::Evidence;
use crate::document::{clip, list, nearest};
use std::{collections::BTreeMap, fmt, path::Path, path::PathBuf};

/// One condition on a process, names already turned into numbers. Ordered from cheap to costly to check.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Selector {
    /// Real and effective user id.
    Uid(u32),
    /// Real and effective group id.
    Gid(u32),
    /// This cgroup and everything below it.
    Cgroup(String),
    /// A unit of the system manager.
    Systemd(String),
    /// Path of the executable.
    Path(PathBuf),
    /// SHA-256 of the executable.
    Sha256([u8; 32]),
}

/// The host's users and groups by name.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    users: BTreeMap<String, u32>,
    groups: BTreeMap<String, u32>,
}

/// What is wrong with a selector, and what to write instead.
pub(super) struct Wrong {
    pub what: String,
    pub instead: String,
}

const FORMS: [&str; 8] = [
    "unix:uid:N",
    "unix:user:NAME",
    "unix:gid:N",
    "unix:group:NAME",
    "unix:path:/PATH",
    "unix:sha256:HEX",
    "cgroup:/PATH",
    "systemd:UNIT",
];

/// The kinds of unit that have a cgroup.
const UNIT_KINDS: [&str; 6] = [".service", ".scope", ".slice", ".socket", ".mount", ".swap"];

impl Selector {
    pub fn parse(text: &str, accounts: &Accounts) -> Result<Self, Wrong> {
        let (kind, value) = match text.split_once(':') {
            Some(("unix", rest)) => match rest.split_once(':') {
                Some((kind, value)) => (format!("unix:{kind}"), value),
                None => return Err(unknown(text)),
            },
            Some((kind, value)) => (kind.to_owned(), value),
            None => return Err(unknown(text)),
        };
        match kind.as_str() {
            "unix:uid" => number(text, value).map(Self::Uid),
            "unix:gid" => number(text, value).map(Self::Gid),
            "unix:user" => account(text, value, &accounts.users, "user", "unix:uid:N").map(Self::Uid),
            "unix:group" => account(text, value, &accounts.groups, "group", "unix:gid:N").map(Self::Gid),
            "unix:path" => absolute(text, value, "unix:path:/usr/sbin/nginx").map(|path| Self::Path(path.into())),
            "unix:sha256" => digest(text, value).map(Self::Sha256),
            "cgroup" => {
                absolute(text, value, "cgroup:/system.slice/nginx.service").map(|path| Self::Cgroup(path.into()))
            }
            "systemd" => unit(text, value).map(|unit| Self::Systemd(unit.into())),
            _ => Err(unknown(text)),
        }
    }

    /// Can the kernel programs check it?
    pub fn is_kernel_visible(&self) -> bool {
        !matches!(self, Self::Path(_) | Self::Sha256(_))
    }

    /// Does it depend on the cgroup alone?
    pub fn is_of_cgroup(&self) -> bool {
        matches!(self, Self::Cgroup(_) | Self::Systemd(_))
    }

    /// Does it hold for root, that is for nearly everything that runs on a host?
    pub fn is_root(&self) -> bool {
        matches!(self, Self::Uid(0) | Self::Gid(0))
    }

    /// Can no process ever satisfy both?
    pub fn excludes(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Uid(a), Self::Uid(b)) | (Self::Gid(a), Self::Gid(b)) => a != b,
            (Self::Path(a), Self::Path(b)) => a != b,
            (Self::Sha256(a), Self::Sha256(b)) => a != b,
            (Self::Cgroup(a), Self::Cgroup(b)) => !is_at_or_below(a, b) && !is_at_or_below(b, a),
            _ => false,
        }
    }

    /// Does it hold for this process?
    pub fn holds(&self, evidence: &dyn Evidence) -> bool {
        match self {
            Self::Uid(uid) => evidence.uid() == Some(*uid),
            Self::Gid(gid) => evidence.gid() == Some(*gid),
            Self::Cgroup(_) | Self::Systemd(_) => evidence.cgroup().is_some_and(|cgroup| self.holds_in(cgroup)),
            Self::Path(path) => evidence.path() == Some(path.as_path()),
            Self::Sha256(digest) => evidence.sha256() == Some(*digest),
        }
    }

    /// Does this cgroup selector hold for a process in that cgroup?
    pub fn holds_in(&self, cgroup: &str) -> bool {
        match self {
            Self::Cgroup(wanted) => is_at_or_below(cgroup, wanted),
            Self::Systemd(wanted) => units(cgroup).any(|unit| unit == wanted),
            _ => false,
        }
    }
}

/// Every cgroup selector that could hold in a cgroup: the cgroup, its ancestors, and its units.
pub(super) fn selectors_of(cgroup: &str) -> impl Iterator<Item = Selector> {
    let ancestors = cgroup.char_indices().skip(1).filter(|(_, letter)| *letter == '/').map(|(at, _)| at);
    ancestors
        .chain(std::iter::once(cgroup.len()))
        .filter_map(|end| cgroup.get(..end))
        .map(|path| Selector::Cgroup(path.to_owned()))
        .chain(units(cgroup).map(|unit| Selector::Systemd(unit.to_owned())))
}

/// The units of the system manager that a cgroup is in: its slices, outermost first, and the one unit in them.
///
/// systemd puts units into slices and nowhere else, and hands what is below a unit to whoever runs there: a user's own
/// manager, a container. Names below a unit are chosen by what runs there, so they name no unit of the system.
fn units(cgroup: &str) -> impl Iterator<Item = &str> {
    let mut in_slices = true;
    cgroup
        .split('/')
        .skip(1)
        .take_while(move |name| std::mem::replace(&mut in_slices, name.ends_with(".slice")) && !name.is_empty())
}

/// Can there be units below this cgroup that it is not in itself? Only in the root and in slices.
pub(super) fn may_hold_units(cgroup: &str) -> bool {
    cgroup == "/" || cgroup.split('/').skip(1).all(|name| name.ends_with(".slice"))
}

/// Whole path components only: `/a/bc` is not below `/a/b`.
fn is_at_or_below(path: &str, ancestor: &str) -> bool {
    path.strip_prefix(ancestor).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn wrong(text: &str, what: impl fmt::Display, instead: impl Into<String>) -> Wrong {
    Wrong { what: format!("selector `{}`: {what}", clip(text)), instead: instead.into() }
}

fn unknown(text: &str) -> Wrong {
    let kind = text.rsplit_once(':').map_or(text, |(kind, _)| kind);
    let kinds = FORMS.iter().filter_map(|form| form.rsplit_once(':')).map(|(kind, _)| kind);
    let instead = match nearest(kind, kinds) {
        Some(near) => {
            format!("write {}", FORMS.iter().find(|form| form.starts_with(near)).copied().unwrap_or(near))
        }
        None => format!("write {}", list(&FORMS)),
    };
    wrong(text, "no such kind of selector", instead)
}

fn number(text: &str, value: &str) -> Result<u32, Wrong> {
    let canonical = value == "0" || (!value.starts_with('0') && value.bytes().all(|byte| byte.is_ascii_digit()));
    match value.parse::<u32>() {
        // The highest value means "no id" to the kernel and "any" in the maps.
        Ok(number) if canonical && number != u32::MAX => Ok(number),
        _ => {
            let name = if text.starts_with("unix:uid") { "unix:user:NAME" } else { "unix:group:NAME" };
            let what = format!("`{}` is not a number from 0 to {}", clip(value), u32::MAX - 1);
            Err(wrong(text, what, format!("write the number, or {name}")))
        }
    }
}

fn account(text: &str, name: &str, known: &BTreeMap<String, u32>, kind: &str, numeric: &str) -> Result<u32, Wrong> {
    if let Some(id) = known.get(name) {
        return Ok(*id);
    }
    let instead = match nearest(name, known.keys().map(String::as_str)) {
        Some(near) => format!("write `{near}`, or {numeric} if the {kind} is not in the host's own files"),
        None => format!("create the {kind}, or write {numeric} if it is not in the host's own files"),
    };
    Err(wrong(text, format!("this host has no {kind} `{}`", clip(name)), instead))
}

fn absolute<'t>(text: &str, path: &'t str, example: &str) -> Result<&'t str, Wrong> {
    let instead = format!("write an absolute path without `.`, `..` and empty parts, such as {example}");
    if path == "/" {
        let everything = if text.starts_with("cgroup") { "it holds for every process" } else { "it is a directory" };
        return Err(wrong(text, everything, format!("name one, such as {example}")));
    }
    match path.strip_prefix('/') {
        Some(parts) if parts.split('/').all(|part| !matches!(part, "" | "." | "..")) => Ok(path),
        Some(_) => Err(wrong(text, "the path is not in its shortest form", instead)),
        None => Err(wrong(text, "the path is not absolute", instead)),
    }
}

fn digest(text: &str, value: &str) -> Result<[u8; 32], Wrong> {
    let refused = || wrong(text, "not 64 hexadecimal digits in lower case", "write what `sha256sum FILE` prints");
    let mut digest = [0; 32];
    if value.len() != 64 || !value.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(refused());
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        let digits = value.get(2 * index..2 * index + 2).ok_or_else(refused)?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| refused())?;
    }
    Ok(digest)
}

fn unit<'t>(text: &str, unit: &'t str) -> Result<&'t str, Wrong> {
    let kind = UNIT_KINDS.iter().find(|kind| unit.ends_with(**kind));
    let plain = unit.chars().all(|c| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c));
    match kind {
        Some(kind) if plain && unit.len() > kind.len() => Ok(unit),
        _ if plain && !unit.is_empty() && !unit.contains('.') => {
            Err(wrong(text, "the unit has no kind", format!("write systemd:{unit}.service")))
        }
        _ => Err(wrong(text, "not the name of a unit that has processes", "write systemd:nginx.service or the like")),
    }
}

impl Accounts {
    /// From the content of `/etc/passwd` and `/etc/group`. Lines that are not entries are skipped, as libc does.
    pub fn from_text(passwd: &str, group: &str) -> Self {
        let ids = |text: &str| {
            let mut ids = BTreeMap::new();
            for line in text.lines().filter(|line| !line.starts_with('#')) {
                let mut fields = line.split(':');
                let (name, id) = (fields.next(), fields.nth(1).and_then(|id| id.parse::<u32>().ok()));
                if let (Some(name), Some(id)) = (name, id)
                    && !name.is_empty()
                {
                    // The first entry of a name wins, as with getpwnam(3).
                    ids.entry(name.to_owned()).or_insert(id);
                }
            }
            ids
        };
        Self { users: ids(passwd), groups: ids(group) }
    }

    /// From this host's own files. A file that cannot be read has no entries: names in it are then reported as unknown.
    pub fn of_this_host() -> Self {
        let read = |path: &str| {
            let bytes = std::fs::read(Path::new(path)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Self::from_text(&read("/etc/passwd"), &read("/etc/group"))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "unix:uid:{uid}"),
            Self::Gid(gid) => write!(f, "unix:gid:{gid}"),
            Self::Cgroup(path) => write!(f, "cgroup:{path}"),
            Self::Systemd(unit) => write!(f, "systemd:{unit}"),
            Self::Path(path) => write!(f, "unix:path:{}", path.display()),
            Self::Sha256(digest) => {
                f.write_str("unix:sha256:")?;
                digest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts::from_text(
            "root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/:/bin/false\n",
            "root:x:0:\nwww-data:x:33:\n",
        )
    }

    fn parse(text: &str) -> String {
        match Selector::parse(text, &accounts()) {
            Ok(selector) => format!("ok {selector}"),
            Err(Wrong { what, instead }) => format!("{what}; {instead}"),
        }
    }

    #[test]
    fn selectors_are_read_and_names_become_numbers() {
        let digest = "ab".repeat(32);
        for (text, expected) in [
            ("unix:uid:1000", "ok unix:uid:1000"),
            ("unix:user:www-data", "ok unix:uid:33"),
            ("unix:gid:0", "ok unix:gid:0"),
            ("unix:group:www-data", "ok unix:gid:33"),
            ("unix:path:/usr/sbin/nginx", "ok unix:path:/usr/sbin/nginx"),
            ("cgroup:/bunter/web", "ok cgroup:/bunter/web"),
            ("systemd:nginx.service", "ok systemd:nginx.service"),
            ("systemd:getty@tty1.service", "ok systemd:getty@tty1.service"),
        ] {
            assert_eq!(parse(text), expected);
        }
        assert_eq!(parse(&format!("unix:sha256:{digest}")), format!("ok unix:sha256:{digest}"));
    }

    #[test]
    fn wrong_selectors_say_what_to_write() {
        for (text, expected) in [
            ("unix:usr:www-data", "selector `unix:usr:www-data`: no such kind of selector; write unix:user:NAME"),
            (
                "unix:user:www-dat",
                "selector `unix:user:www-dat`: this host has no user `www-dat`; \
                 write `www-data`, or unix:uid:N if the user is not in the host's own files",
            ),
            (
                "unix:uid:www-data",
                "selector `unix:uid:www-data`: `www-data` is not a number from 0 to 4294967294; write the number, or unix:user:NAME",
            ),
            (
                "unix:uid:4294967295",
                "selector `unix:uid:4294967295`: `4294967295` is not a number from 0 to 4294967294; \
                 write the number, or unix:user:NAME",
            ),
            (
                "unix:uid:+5",
                "selector `unix:uid:+5`: `+5` is not a number from 0 to 4294967294; write the number, or unix:user:NAME",
            ),
            (
                "unix:path:nginx",
                "selector `unix:path:nginx`: the path is not absolute; write an absolute path without `.`, `..` and \
                 empty parts, such as unix:path:/usr/sbin/nginx",
            ),
            (
                "cgroup:/",
                "selector `cgroup:/`: it holds for every process; name one, such as cgroup:/system.slice/nginx.service",
            ),
            (
                "cgroup:/a/../b",
                "selector `cgroup:/a/../b`: the path is not in its shortest form; write an absolute path without `.`, \
                 `..` and empty parts, such as cgroup:/system.slice/nginx.service",
            ),
            ("systemd:nginx", "selector `systemd:nginx`: the unit has no kind; write systemd:nginx.service"),
            (
                "systemd:a/b.service",
                "selector `systemd:a/b.service`: not the name of a unit that has processes; write systemd:nginx.service \
                 or the like",
            ),
            (
                "unix:sha256:AB",
                "selector `unix:sha256:AB`: not 64 hexadecimal digits in lower case; write what `sha256sum FILE` prints",
            ),
        ] {
            assert_eq!(parse(text), expected);
        }
        assert!(parse("nonsense").contains("write `unix:uid:N`, `unix:user:NAME`"));
    }

    #[test]
    fn a_cgroup_selector_holds_for_whole_path_components() {
        let selector = Selector::Cgroup("/a/b".into());
        for (cgroup, expected) in [("/a/b", true), ("/a/b/c", true), ("/a/bc", false), ("/a", false), ("/x/a/b", false)]
        {
            assert_eq!(selector.holds_in(cgroup), expected, "{cgroup}");
        }
    }

    #[test]
    fn a_unit_cannot_be_imitated_below_a_delegated_cgroup() {
        let nginx = Selector::Systemd("nginx.service".into());
        for (cgroup, expected) in [
            ("/system.slice/nginx.service", true),
            ("/system.slice/nginx.service/worker", true),
            ("/system.slice/system-nginx.slice/nginx.service", true),
            ("/nginx.service", true),
            ("/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service", false),
            ("/system.slice/docker-0123.scope/system.slice/nginx.service", false),
            ("/bunter/nginx.service", false),
            ("/system.slice/nginx.service2", false),
            ("/", false),
            ("", false),
        ] {
            assert_eq!(nginx.holds_in(cgroup), expected, "{cgroup}");
            assert_eq!(selectors_of(cgroup).any(|selector| selector == nginx), expected, "{cgroup}");
        }
        assert!(Selector::Systemd("system.slice".into()).holds_in("/system.slice/nginx.service"));
    }

    #[test]
    fn the_selectors_of_a_cgroup_are_those_that_hold_in_it() {
        let found: Vec<_> = selectors_of("/a.slice/b.service/c").map(|selector| selector.to_string()).collect();
        assert_eq!(
            found,
            [
                "cgroup:/a.slice",
                "cgroup:/a.slice/b.service",
                "cgroup:/a.slice/b.service/c",
                "systemd:a.slice",
                "systemd:b.service"
            ]
        );
    }
}
