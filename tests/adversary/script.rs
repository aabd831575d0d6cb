//! What is done in a round of the random search: lines for each puppet, and the fate of the agent.
//!
//! *Invariant:* a script follows from one number, and from nothing else but the addresses of the lab.

use lab::Lab;
use lab::hand::{ATTACKER, STRANGER, USER, WEB};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Ports that everybody fights for.
pub(super) const PORTS: [u16; 4] = [8080, 8081, 8082, 8083];
/// Port of the workload on the other host, which users dial.
pub(super) const FAR: u16 = 9443;
/// Lines that each puppet is told in a round.
const LINES: usize = 60;
/// Cgroups that puppets live in and are moved to. The last two are made by a move into them.
pub(super) const CGROUPS: [&str; 6] = ["server", "nobody", "one", "elsewhere", "elsewhere/fresh", "server/fresh"];
/// Puppets: name, user, cgroup at the start.
pub(super) const CAST: [(&str, u32, &str); 7] = [
    ("web-1", WEB, "server"),
    ("web-2", WEB, "one"),
    ("user", USER, "one"),
    ("foe-1", ATTACKER, "nobody"),
    ("foe-2", ATTACKER, "delegated/start"),
    ("root-1", 0, "elsewhere"),
    ("root-2", 0, "server"),
];

/// Numbers that follow from one number (SplitMix64).
pub(super) struct Chance(pub(super) u64);

impl Chance {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[usize::try_from(self.below(all.len() as u64)).unwrap_or(0)]
    }

    fn one_in(&mut self, number: u64) -> bool {
        self.below(number) == 0
    }
}

/// What a round is made of.
#[derive(Clone)]
pub(super) struct Script {
    /// For each of the cast what it is told. A line that begins with `@` is for the one who tells it.
    pub(super) lines: Vec<Vec<String>>,
    /// What happens to the agent, each after so many milliseconds.
    pub(super) fate: Vec<(u64, Fate)>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Fate {
    /// SIGKILL, and a new one after so many milliseconds.
    Killed(u64),
    /// SIGTERM, and a new one.
    Restarted,
    /// SIGHUP.
    Reloaded,
}

impl Script {
    pub(super) fn new(lab: &Lab, seed: u64) -> Self {
        let mut chance = Chance(seed);
        let lines = CAST.iter().map(|(name, uid, _)| part(lab, &mut chance, name, *uid)).collect();
        let fate = (0..chance.below(5)).map(|_| {
            let fate = match chance.below(6) {
                0..3 => Fate::Killed(chance.below(600)),
                3 => Fate::Restarted,
                _ => Fate::Reloaded,
            };
            (50 + chance.below(500), fate)
        });
        let fate = fate.collect();
        Self { lines, fate }
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("agent: {:?}\n", self.fate);
        for ((name, uid, cgroup), lines) in CAST.iter().zip(&self.lines) {
            let _ = writeln!(text, "{name} (uid {uid}, cgroup {cgroup}):");
            for line in lines {
                let _ = writeln!(text, "    {line}");
            }
        }
        text
    }
}

/// An address of beta to listen on or to dial, and its family.
fn address(lab: &Lab, chance: &mut Chance) -> (u8, SocketAddr) {
    let port = if chance.one_in(8) { 0 } else { *chance.pick(&PORTS) };
    let all: [IpAddr; 9] = [
        Ipv4Addr::UNSPECIFIED.into(),
        Ipv4Addr::UNSPECIFIED.into(),
        lab.beta.v4.into(),
        Ipv4Addr::LOCALHOST.into(),
        Ipv6Addr::UNSPECIFIED.into(),
        Ipv6Addr::UNSPECIFIED.into(),
        lab.beta.v6.into(),
        Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into(),
        lab.beta.v4.to_ipv6_mapped().into(),
    ];
    let ip = *chance.pick(&all);
    (if ip.is_ipv4() { 4 } else { 6 }, SocketAddr::new(ip, port))
}

/// What one of the cast is told.
fn part(lab: &Lab, chance: &mut Chance, name: &str, uid: u32) -> Vec<String> {
    let mut lines = Vec::new();
    while lines.len() < LINES {
        let kind = chance.below(100);
        match (uid, kind) {
            (USER, 0..70) => lines.push(dial(lab, chance)),
            (ATTACKER, 0..3) => {
                let how = chance.pick(&["shutdown", "close", "mptcp"]);
                lines.push(format!("litter {} {how}", 200 + chance.below(2000)));
            }
            (ATTACKER, 3..14) => lines.push(call(lab, chance)),
            (ATTACKER, 14..16) => lines.push(format!("cross {}", 20 + chance.below(150))),
            (ATTACKER, 16..18) => lines.push("@forge".to_owned()),
            (ATTACKER, 18..20) => lines.push("@squat".to_owned()),
            (0, 0..4) => lines.push(format!("setuid {}", chance.pick(&[WEB, WEB, USER, ATTACKER]))),
            (_, 20..55) => begin(lab, chance, &mut lines),
            (_, 55..60) => lines.push(format!("@move {}", chance.pick(&CGROUPS))),
            (WEB, 60..63) => {
                let how = chance.pick(&["", "", " again", " shared"]);
                lines.push(format!("flap {} {}{how}", address(lab, chance).1, 50 + chance.below(250)));
            }
            (WEB, 63..64) => lines.push("serve off".to_owned()),
            (WEB, 64..67) => lines.push("serve on".to_owned()),
            (_, 67..70) => lines.push(format!("fork {}", 50 + chance.below(1200))),
            _ => lines.push(meddle(lab, chance, name)),
        }
        if chance.one_in(2) {
            lines.push(format!("sleep {}", chance.below(100)));
        }
    }
    lines
}

/// Names of sockets.
const SOCKETS: [&str; 4] = ["a", "b", "c", "d"];

/// A listener, in one breath or in pieces.
fn begin(lab: &Lab, chance: &mut Chance, lines: &mut Vec<String>) {
    let socket = *chance.pick(&SOCKETS);
    let (family, at) = address(lab, chance);
    let kind = if chance.one_in(6) { " mptcp" } else { "" };
    let mut words = vec![format!("socket {socket} {family}{kind}")];
    for (option, odds) in [("reuseport", 3), ("reuseaddr", 2), ("device:eth0", 8), ("device:lo", 8)] {
        if chance.one_in(odds) {
            words.push(format!("opt {socket} {option}"));
        }
    }
    if family == 6 && chance.one_in(2) {
        words.push(format!("opt {socket} {}", chance.pick(&["v6only", "dual"])));
    }
    if !chance.one_in(12) {
        words.push(format!("bind {socket} {at}"));
    }
    if !chance.one_in(8) {
        let backlog = if chance.one_in(4) { " 1" } else { "" };
        words.push(format!("listen {socket}{backlog}"));
    }
    if chance.one_in(3) {
        lines.extend(words);
    } else {
        lines.push(words.join("; "));
    }
}

/// Something that is done to a socket.
fn meddle(lab: &Lab, chance: &mut Chance, name: &str) -> String {
    let (socket, other) = (*chance.pick(&SOCKETS), *chance.pick(&SOCKETS));
    match chance.below(15) {
        13 => format!("opt {socket} {}", chance.pick(&["reuseport", "reuseaddr"])),
        0 | 1 => format!("listen {socket}"),
        2 => format!("shutdown {socket} rd"),
        3 => format!("shutdown {socket} {}", chance.pick(&["wr", "both"])),
        4 | 5 => format!("close {socket}"),
        6 => format!("dup {socket} {other}"),
        7 | 8 => {
            let to = CAST.iter().map(|(name, ..)| *name).filter(|to| *to != name && !to.starts_with("user"));
            format!("give {socket} {}", chance.pick(&to.collect::<Vec<_>>()))
        }
        9 | 10 => format!("take {socket} 30"),
        11 => format!("name {socket}"),
        12 => format!("shutdown {socket} rd; listen {socket}"),
        _ => format!("connect {socket} {}; disconnect {socket}; listen {socket}", address(lab, chance).1),
    }
}

/// A user dials the workload on the other host and says the marker. These sockets are given to nobody.
fn dial(lab: &Lab, chance: &mut Chance) -> String {
    let to = *chance.pick(&[lab.alpha.at(FAR), lab.alpha.at6(FAR), lab.alpha.mapped(FAR)]);
    let family = if to.is_ipv4() { 4 } else { 6 };
    let kind = if chance.one_in(5) { " mptcp" } else { "" };
    let mut line = format!("socket m {family}{kind}");
    if chance.one_in(8) {
        line += "; opt m device:eth0";
    }
    for (option, odds) in [("reset", 4), ("deferred", 4), ("reuseaddr", 2)] {
        if chance.one_in(odds) {
            line += &format!("; opt m {option}");
        }
    }
    if chance.one_in(4) {
        line += &format!("; bind m 0.0.0.0:{}", 5000 + chance.below(4));
    }
    let marker = lab.marker();
    line += &match chance.below(6) {
        0 => format!("; fastopen m {to} {marker}"),
        1 => format!("; connect m {to}; disconnect m; connect m {to}; write m {marker}"),
        2 => format!("; connect m {to}; sleep {}; write m {marker}", chance.below(400)),
        3 => format!("; connect m {to}; opt m device:eth0; write m {marker}"),
        _ => format!("; connect m {to}; write m {marker}"),
    };
    if chance.one_in(2) {
        line += "; read m";
    }
    if chance.one_in(2) {
        line += "; close m";
    }
    line
}

/// An attacker speaks to a port of the host it runs on.
fn call(lab: &Lab, chance: &mut Chance) -> String {
    let (family, to) = address(lab, chance);
    let port = if to.port() == 0 { PORTS[0] } else { to.port() };
    let to = SocketAddr::new(to.ip(), port);
    format!("socket x {family}; connect x {to}; write x {STRANGER}{to}")
}
