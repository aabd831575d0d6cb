//! What is asked for on the command line of `lab-bench`: peers, rounds, times.
//!
//! *Invariant:* a word that means nothing is an error, never ignored.

use crate::Skip;
use crate::bench::load::Load;
use crate::bench::peers::{self, Peer};
use crate::skip;
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// The options.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Fewer and shorter measurements, within [`QUICK`].
    pub quick: bool,
    /// Names of peers; empty: all.
    pub only: Vec<String>,
    /// Binaries that were named.
    pub given: Given,
    /// Rounds.
    pub rounds: usize,
    /// Seconds of one measurement.
    pub seconds: f64,
    /// Idle connections for each of three steps.
    pub idle: usize,
    /// Numbers of processors that a proxy gets, one set of rounds for each; empty: from one to all.
    pub cores: Vec<usize>,
    /// Processors' worth of time that others may take during a measurement.
    pub tolerance: f64,
    /// Time is virtual: one processor, nothing disturbs, rounds are perturbed, and the object goes to standard output.
    pub emulated: bool,
    /// Where the one object goes.
    pub json: Option<PathBuf>,
    /// Where the plots and the table go.
    pub out: PathBuf,
}

/// The longest that the rounds of a quick run may take, so that the whole ends within ten minutes.
pub const QUICK: Duration = Duration::from_secs(7 * 60);
/// How often a measurement that was disturbed is taken again.
pub const AGAIN: usize = 3;

/// Binaries that were named, and why others could not be brought.
#[derive(Clone, Debug, Default)]
pub struct Given {
    paths: BTreeMap<String, PathBuf>,
    absent: BTreeMap<String, String>,
    /// Lines for the configuration of Bunter's agents, above its tables.
    pub agent: String,
}

impl Given {
    /// The program of this name: the one that was named, or the one on PATH.
    pub fn program(&self, name: &str) -> Result<PathBuf, Skip> {
        if let Some(path) = self.paths.get(name) {
            let there = std::path::absolute(path).ok().filter(|path| path.is_file());
            return there.ok_or_else(|| Skip::because(format!("no file {}", path.display())));
        }
        if let Some(reason) = self.absent.get(name) {
            return Err(Skip::because(reason));
        }
        skip::find(name).ok_or_else(|| Skip::because(format!("no {name} on PATH; --peer {name}=FILE names one")))
    }
}

/// What `lab-bench --help` says.
pub const USAGE: &str = "\
lab-bench [option...]
  --quick              one third of the measurements, within 10 minutes for a few peers
  --only PEER,PEER     these peers alone, variants such as nginx-resumed included when named
  --peer NAME=FILE     a binary that is not on PATH: ztunnel, ghostunnel, envoy, nginx, haproxy, stunnel4
  --absent NAME=WHY    a reason to report for a binary that could not be brought
  --agent LINE         a line above the tables of the configuration of Bunter's agents, such as 'busy_poll = true'
  --rounds N           rounds (5; quick: 3)
  --seconds S          of one measurement (3; quick: 1.5)
  --idle N             idle connections of each of three steps of the memory measurement (700; quick: 300)
  --cores N,N          processors that a proxy gets, one set of rounds for each (1, 2, 4 ... all; quick: 1)
  --tolerance T        processors' worth of time that other programs may take during a measurement (0.08)
  --virtual            in a guest whose clock counts instructions: perturbed rounds, rows to standard output
  --json FILE          host and rows, as one object
  --out FOLDER         table and plots (target/bench)";

impl Plan {
    /// From the words of the command line.
    pub fn read(words: impl Iterator<Item = String>) -> crate::Result<Self> {
        let mut words = words.peekable();
        let mut plan = Self {
            quick: false,
            only: Vec::new(),
            given: Given::default(),
            rounds: 0,
            seconds: 0.0,
            idle: 0,
            cores: Vec::new(),
            tolerance: 0.08,
            emulated: false,
            json: None,
            out: PathBuf::from("target/bench"),
        };
        while let Some(word) = words.next() {
            if word == "--quick" {
                plan.quick = true;
                continue;
            }
            if word == "--virtual" {
                plan.emulated = true;
                continue;
            }
            let value = words.next().with_context(|| format!("{word} wants a value\n{USAGE}"))?;
            match word.as_str() {
                "--only" => plan.only = value.split(',').map(str::to_owned).collect(),
                "--peer" => {
                    let (name, path) = value.split_once('=').context("want --peer NAME=FILE")?;
                    plan.given.paths.insert(name.to_owned(), path.into());
                }
                "--absent" => {
                    let (name, reason) = value.split_once('=').context("want --absent NAME=WHY")?;
                    plan.given.absent.insert(name.to_owned(), reason.to_owned());
                }
                "--agent" => plan.given.agent += &format!("{value}\n"),
                "--rounds" => plan.rounds = value.parse()?,
                "--seconds" => plan.seconds = value.parse()?,
                "--idle" => plan.idle = value.parse()?,
                "--cores" => plan.cores = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--tolerance" => plan.tolerance = value.parse()?,
                "--json" => plan.json = Some(value.into()),
                "--out" => plan.out = value.into(),
                other => bail!("no option is called {other}\n{USAGE}"),
            }
        }
        let known = peers::all();
        for name in &plan.only {
            let names: Vec<&str> = known.iter().map(|peer| peer.name).collect();
            anyhow::ensure!(names.contains(&name.as_str()), "no peer is called {name}; there are {}", names.join(", "));
        }
        let pick = |chosen: usize, whole, quick| match (chosen, plan.quick) {
            (0, true) => quick,
            (0, false) => whole,
            (chosen, _) => chosen,
        };
        (plan.rounds, plan.idle) = (pick(plan.rounds, 5, 3), pick(plan.idle, 700, 300));
        if plan.emulated {
            plan.tolerance = f64::INFINITY;
        }
        if plan.seconds <= 0.0 {
            plan.seconds = if plan.quick { 1.5 } else { 3.0 };
        }
        Ok(plan)
    }

    /// The peers that are wanted.
    pub fn peers(&self) -> Vec<Peer> {
        let wanted = |peer: &Peer| match self.only.is_empty() {
            true => !(self.quick && peer.variant),
            false => self.only.iter().any(|name| name == peer.name),
        };
        peers::all().into_iter().filter(wanted).collect()
    }

    /// Numbers of processors of a proxy: 1, 2, 4 and so on, and all.
    pub fn cores(&self, processors: usize) -> Vec<usize> {
        if !self.cores.is_empty() {
            return self.cores.clone();
        }
        if self.quick {
            return vec![1];
        }
        let mut cores: Vec<usize> = (0..).map(|power| 1 << power).take_while(|cores| *cores < processors).collect();
        cores.push(processors);
        cores.dedup();
        cores
    }

    /// What is measured of a peer. Beyond the first number of processors, what more processors could change.
    pub fn loads(&self, peer: &Peer, first: bool) -> Vec<Load> {
        let mut loads = self.all_loads(peer, first);
        // There is no handshake in it, so its connections would say nothing.
        loads.retain(|load| !(peer.sealed() && matches!(load, Load::Connects(_))));
        loads
    }

    fn all_loads(&self, peer: &Peer, first: bool) -> Vec<Load> {
        if peer.variant && !self.only.iter().any(|name| name == peer.name) {
            return vec![Load::Connects(16)];
        }
        if !first {
            return vec![Load::Bulk(16), Load::RoundTrips(64, 64), Load::Connects(16)];
        }
        let mut loads = vec![
            Load::Bulk(1),
            Load::Bulk(16),
            Load::RoundTrips(64, 1),
            Load::RoundTrips(64, 16),
            Load::RoundTrips(64, 64),
            Load::Connects(16),
        ];
        if !self.quick {
            loads.extend([1, 16, 64].map(|connections| Load::RoundTrips(1024, connections)));
        }
        loads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(words: &[&str]) -> Plan {
        Plan::read(words.iter().map(|word| (*word).to_owned())).unwrap()
    }

    #[test]
    fn a_variant_is_measured_whole_only_when_it_is_named() {
        let all = plan(&[]);
        let variant = all.peers().into_iter().find(|peer| peer.name == "nginx-resumed").unwrap();
        assert_eq!(all.loads(&variant, true), [Load::Connects(16)]);
        let named = plan(&["--quick", "--only", "plain,nginx-resumed"]);
        assert_eq!(named.peers().len(), 2);
        assert_eq!(named.loads(&variant, true).len(), 6);
    }

    #[test]
    fn proxies_get_from_one_to_all_processors() {
        assert_eq!(plan(&[]).cores(2), [1, 2]);
        assert_eq!(plan(&[]).cores(6), [1, 2, 4, 6]);
        assert_eq!(plan(&["--quick"]).cores(6), [1]);
        assert_eq!(plan(&["--cores", "3,5"]).cores(6), [3, 5]);
    }

    #[test]
    fn unknown_peers_and_options_are_refused() {
        for words in [["--only", "nobody"], ["--color", "red"]] {
            assert!(Plan::read(words.iter().map(|word| (*word).to_owned())).is_err());
        }
    }
}
