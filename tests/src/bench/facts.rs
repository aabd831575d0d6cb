//! What the figures depend on: kernel, processor, programs, date, and who gets which processors.
//!
//! *Invariant:* what cannot be found out is said to be unknown.

use crate::bench::plan::Given;
use serde_json::{Value, json};
use std::process::Command;

/// Which programs run on which processors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Processors that each proxy has, or that both share.
    pub cores: usize,
    /// Of the client.
    pub client: Vec<usize>,
    /// Of the client's proxy.
    pub first: Vec<usize>,
    /// Of the server's proxy.
    pub second: Vec<usize>,
    /// Of the server.
    pub server: Vec<usize>,
}

impl Layout {
    /// For proxies that get so many of these processors. With two for each proxy and two more, everybody has their own;
    /// with fewer, both proxies share theirs, and client and server share the rest; where there is no rest, all share
    /// all.
    pub fn new(processors: &[usize], cores: usize) -> Self {
        let all = processors.to_vec();
        let cores = cores.clamp(1, all.len());
        if all.len() >= 2 * cores + 2 {
            let ends = (all.len() - 2 * cores) / 2;
            return Self {
                cores,
                client: all[..ends].to_vec(),
                first: all[ends..ends + cores].to_vec(),
                second: all[ends + cores..ends + 2 * cores].to_vec(),
                server: all[ends + 2 * cores..].to_vec(),
            };
        }
        if all.len() > cores {
            let (ends, proxies) = all.split_at(all.len() - cores);
            let (ends, proxies) = (ends.to_vec(), proxies.to_vec());
            return Self { cores, client: ends.clone(), first: proxies.clone(), second: proxies, server: ends };
        }
        Self { cores, client: all.clone(), first: all.clone(), second: all.clone(), server: all }
    }

    /// In words.
    pub fn text(&self) -> String {
        let Self { client, first, second, server, .. } = self;
        if client == first {
            format!("everything shares processors {client:?}")
        } else if client == server {
            format!("client and server share processors {client:?}, both proxies share {first:?}")
        } else {
            format!("client {client:?}, first proxy {first:?}, second proxy {second:?}, server {server:?}")
        }
    }
}

/// The processors that this process may run on.
pub fn processors() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None);
    let listed =
        |set: rustix::thread::CpuSet| (0..rustix::thread::CpuSet::MAX_CPU).filter(|n| set.is_set(*n)).collect();
    set.map_or_else(|_| vec![0], listed)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The value of the first line of a file that begins with this name and has a colon.
fn field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|before| before.trim() == name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// What the figures depend on, before anything is measured.
pub fn host() -> Value {
    let unknown = || "unknown".to_owned();
    let flags = field("/proc/cpuinfo", "flags").unwrap_or_default();
    let has = |flag: &str| flags.split(' ').any(|word| word == flag);
    let of_note: Vec<&str> = ["aes", "vaes", "avx512f"].into_iter().filter(|flag| has(flag)).collect();
    let date = time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339);
    json!({
        "kernel": read("/proc/sys/kernel/osrelease"),
        "cpu": field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
        "cores": processors().len(),
        "cpu_flags": of_note,
        "virtual": has("hypervisor"),
        "governor": match read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") {
            text if text.is_empty() => unknown(),
            text => text,
        },
        "memory": field("/proc/meminfo", "MemTotal").unwrap_or_else(unknown),
        "date": date.unwrap_or_else(|_| unknown()),
    })
}

/// Keeps this program off the proxies' processors.
pub fn pin_self(processors: &[usize]) {
    let mut set = rustix::thread::CpuSet::new();
    processors.iter().for_each(|number| set.set(*number));
    // Where it cannot be, it costs a little, and what it costs is not counted as others'.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// What the programs say that they are.
pub fn programs(given: &Given) -> Value {
    let words: [(&str, &[&str]); 9] = [
        ("haproxy", &["-v"]),
        ("stunnel4", &["-version"]),
        ("nginx", &["-v"]),
        ("envoy", &["--version"]),
        ("ghostunnel", &["--version"]),
        ("ztunnel", &["version"]),
        ("iperf3", &["--version"]),
        ("wrk", &["-v"]),
        ("bunter", &["--version"]),
    ];
    let mut programs = serde_json::Map::new();
    for (name, words) in words {
        let path = if name == "bunter" { crate::skip::bunter() } else { given.program(name) };
        if let Ok(path) = path {
            programs.insert(name.to_owned(), json!(version(&path, words)));
        }
    }
    Value::Object(programs)
}

/// The first line that a program says of itself that has a digit.
fn version(program: &std::path::Path, words: &[&str]) -> String {
    let output = Command::new(program).args(words).stdin(std::process::Stdio::null()).output();
    let said = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().find(|line| line.contains('.') && line.chars().any(|c| c.is_ascii_digit()));
    line.unwrap_or("unknown version").trim().chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_four_processors_everybody_has_one() {
        let layout = Layout::new(&[0, 1, 2, 3], 1);
        assert_eq!((layout.client, layout.first), (vec![0], vec![1]));
        assert_eq!((layout.second, layout.server), (vec![2], vec![3]));
    }

    #[test]
    fn with_two_processors_the_load_has_one_and_the_proxies_the_other() {
        let layout = Layout::new(&[0, 1], 1);
        assert_eq!((&layout.client, &layout.server), (&vec![0], &vec![0]));
        assert_eq!((&layout.first, &layout.second), (&vec![1], &vec![1]));
        assert_eq!(Layout::new(&[0, 1], 2).text(), "everything shares processors [0, 1]");
    }

    #[test]
    fn with_eight_processors_each_proxy_may_have_three() {
        let layout = Layout::new(&[0, 1, 2, 3, 4, 5, 6, 7], 3);
        assert_eq!((layout.client, layout.first), (vec![0], vec![1, 2, 3]));
        assert_eq!((layout.second, layout.server), (vec![4, 5, 6], vec![7]));
        let layout = Layout::new(&[0, 1, 2, 3, 4, 5, 6, 7], 4);
        assert_eq!((layout.client, layout.first), (vec![0, 1, 2, 3], vec![4, 5, 6, 7]));
    }
}
