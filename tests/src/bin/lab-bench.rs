//! The benchmarking lab: `lab-bench --help`. `cargo xtask bench` builds and runs it.
//!
//! *Invariant:* a peer that does not start or misbehaves is named in the report and does not end the run.

use anyhow::Context;
use lab::bench::facts::{self, Layout};
use lab::bench::load::Load;
use lab::bench::peers::{self, Authority, Chain, Start};
use lab::bench::plan::{Plan, QUICK, USAGE};
use lab::bench::report::Report;
use lab::bench::{measure, plot};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

/// Around the object on the console of a guest.
const BEGIN: &str = "bench-object-begin";
const END: &str = "bench-object-end";

fn main() -> ExitCode {
    if std::env::args().any(|word| word == "--help") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    // A panic of the lab's helpers is told by whoever catches it.
    std::panic::set_hook(Box::new(|_| {}));
    match std::panic::catch_unwind(|| Plan::read(std::env::args().skip(1)).and_then(|plan| Run::new(plan).whole())) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("lab-bench: {error:#}");
            ExitCode::from(1)
        }
        Err(panic) => {
            eprintln!("lab-bench: {}", peers::said(&*panic));
            ExitCode::from(1)
        }
    }
}

/// What came together so far.
struct Run {
    plan: Plan,
    report: Report,
    notes: BTreeMap<String, String>,
    skipped: BTreeMap<String, String>,
    failed: Vec<Value>,
    layouts: Vec<String>,
    /// By peer.
    discarded: BTreeMap<String, usize>,
    /// Measurements that were kept although others took too much each time: peer, load, what others took.
    disturbed: Vec<Value>,
    /// What others took, of all that was kept.
    others: Vec<f64>,
    deadline: Option<Instant>,
}

impl Run {
    fn new(plan: Plan) -> Self {
        let deadline = (plan.quick && !plan.emulated).then(|| Instant::now() + QUICK);
        Self {
            plan,
            report: Report::default(),
            notes: BTreeMap::new(),
            skipped: BTreeMap::new(),
            failed: Vec::new(),
            layouts: Vec::new(),
            discarded: BTreeMap::new(),
            disturbed: Vec::new(),
            others: Vec::new(),
            deadline,
        }
    }

    fn whole(mut self) -> anyhow::Result<()> {
        lab::skip::need_root().map_err(|skip| anyhow::anyhow!("cannot measure here: {}", skip.0))?;
        if lab::skip::bunter().is_ok_and(|path| path.components().any(|part| part.as_os_str() == "debug")) {
            eprintln!("lab-bench: warning: the agent is not a release build");
        }
        let host = facts::host();
        let processors = facts::processors();
        let authority = Authority::found()?;
        for (number, cores) in self.plan.cores(processors.len()).into_iter().enumerate() {
            let layout = Layout::new(&processors, cores);
            println!("proxies with {cores} of {} processors: {}", processors.len(), layout.text());
            self.layouts.push(layout.text());
            facts::pin_self(&layout.client);
            self.rounds(&layout, &authority, number == 0);
        }
        self.show(host)
    }

    fn late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() > deadline)
    }

    fn fail(&mut self, peer: &str, what: &str, error: &str) {
        eprintln!("  {peer}: {what}: {error}");
        self.failed.push(json!({ "peer": peer, "what": what, "error": error }));
    }

    /// All rounds with one number of processors.
    fn rounds(&mut self, layout: &Layout, authority: &Authority, first: bool) {
        let mut chains: Vec<Chain> = Vec::new();
        for peer in self.plan.peers() {
            let title = peer.title();
            match peers::start(&peer, layout, &self.plan.given, authority) {
                Start::Running(chain) => {
                    println!("  {title}: {}", chain.note);
                    self.notes.insert(title, chain.note.clone());
                    chains.push(*chain);
                }
                Start::Skipped(reason) => {
                    println!("  {title}: skipped: {reason}");
                    self.skipped.insert(title, reason);
                }
                Start::Failed(error) => self.fail(&title, "start", &error),
            }
        }
        if first {
            self.memory(&chains);
        }
        // In a guest, the first round warms it up: caches of the kernel fill, connections of agents come to be.
        let warm_ups = usize::from(self.plan.emulated);
        for round in 0..self.plan.rounds + warm_ups {
            if round > 0 && self.late() {
                println!("time is up after {round} rounds");
                break;
            }
            let counted = round >= warm_ups;
            println!(
                "round {} of {}{}",
                round + 1 - warm_ups.min(round),
                self.plan.rounds,
                if counted { "" } else { ": warm-up" }
            );
            self.round(&chains, layout, round, first, counted);
        }
        if first && !self.plan.emulated {
            self.beside(&mut chains);
        }
    }

    /// Every load on every peer, once.
    fn round(&mut self, chains: &[Chain], layout: &Layout, round: usize, first: bool, counted: bool) {
        let mut order: Vec<Load> = chains.iter().flat_map(|chain| self.plan.loads(&chain.peer, first)).collect();
        order.sort_unstable();
        order.dedup();
        for load in order {
            // The first round is done whole, so that there is something to show.
            if round > 0 && self.late() {
                println!("time is up within round {}", round + 1);
                return;
            }
            for step in 0..chains.len() {
                // Another one begins each round.
                let chain = &chains[(step + round) % chains.len()];
                if !self.plan.loads(&chain.peer, first).contains(&load) {
                    continue;
                }
                if self.plan.emulated {
                    // Otherwise each round would be the one before, instruction for instruction.
                    std::thread::sleep(std::time::Duration::from_micros(1013 * (round as u64 + 1)));
                }
                self.one(chain, load, layout, first, counted);
            }
        }
    }

    fn memory(&mut self, chains: &[Chain]) {
        println!("memory, with 3 times {} idle connections", self.plan.idle);
        for chain in chains {
            let peer = &chain.peer;
            if self.plan.loads(peer, true) == [Load::Connects(16)] {
                continue;
            }
            match measure::memory(chain, self.plan.idle) {
                Ok(figures) => {
                    for (metric, unit, value) in figures {
                        self.report.add(peer.name, peer.engine, &metric, unit, value);
                    }
                }
                Err(error) => self.fail(&peer.title(), "memory", &format!("{error:#}")),
            }
        }
    }

    fn one(&mut self, chain: &Chain, load: Load, layout: &Layout, first: bool, counted: bool) {
        let peer = &chain.peer;
        let title = peer.title();
        let sample = measure::sample(chain, load, self.plan.seconds, self.plan.tolerance, self.deadline);
        let sample = match sample {
            Ok(sample) => sample,
            Err(error) => return self.fail(&title, &format!("{load:?}"), &format!("{error:#}")),
        };
        if !counted {
            return;
        }
        *self.discarded.entry(title.clone()).or_default() += sample.discarded;
        self.others.push(sample.others);
        let mut note = String::new();
        if sample.disturbed {
            let others = (sample.others * 1000.0).round() / 1000.0;
            self.disturbed.push(json!({ "peer": title, "load": format!("{load:?}"), "others": others }));
            note = format!("  (disturbed: others took {others} of a processor)");
        }
        let shown: Vec<String> =
            sample.figures.iter().map(|(name, unit, value)| format!("{name} {value:.2} {unit}")).collect();
        println!("  {title}: {}{note}", shown.join(", "));
        for (metric, unit, value) in sample.figures {
            // The names without anything behind them are those of the first layout.
            let metric = if first { metric } else { format!("{metric}@{}", layout.cores) };
            self.report.add(peer.name, peer.engine, &metric, unit, value);
        }
    }

    /// The same flows by programs that are not ours: iperf3 and wrk, at the end.
    fn beside(&mut self, chains: &mut [Chain]) {
        let time = format!("{}", self.plan.seconds.ceil());
        let rounds = self.plan.rounds.min(if self.plan.quick { 1 } else { 3 });
        for round in 0..rounds {
            for chain in chains.iter().filter(|chain| !chain.peer.variant) {
                if self.late() {
                    return;
                }
                match measure::wrk(chain, &time) {
                    Ok(figures) => {
                        let peer = &chain.peer;
                        for (metric, unit, value) in figures {
                            self.report.add(peer.name, peer.engine, &metric, unit, value);
                        }
                    }
                    Err(error) if round == 0 => self.fail(&chain.peer.title(), "wrk", &format!("{error:#}")),
                    Err(_) => {}
                }
            }
        }
        for chain in chains.iter_mut().filter(|chain| !chain.peer.variant) {
            if self.late() {
                return;
            }
            let (name, engine, title) = (chain.peer.name, chain.peer.engine, chain.peer.title());
            match measure::iperf(chain, &time, rounds) {
                Ok(values) => {
                    println!("  {title}: iperf3_1 {values:.2?} Gb/s");
                    values.into_iter().for_each(|value| self.report.add(name, engine, "iperf3_1", "Gb/s", value));
                }
                Err(error) => self.fail(&title, "iperf3", &format!("{error:#}")),
            }
        }
    }

    fn show(self, mut host: Value) -> anyhow::Result<()> {
        let discarded: usize = self.discarded.values().sum();
        let kept = self.others.len();
        let others = lab::bench::stats::sorted(&self.others);
        let typical = lab::bench::stats::percentile(&others, 0.5);
        let facts = [
            ("virtual_time", json!(self.plan.emulated)),
            ("layouts", json!(self.layouts)),
            ("rounds", json!(self.plan.rounds)),
            ("seconds", json!(self.plan.seconds)),
            ("tolerance", json!(self.plan.tolerance)),
            ("discarded", json!(self.discarded)),
            ("disturbed", json!(self.disturbed)),
            ("others_median", json!((typical * 1e4).round() / 1e4)),
            ("skipped", json!(self.skipped)),
            ("failed", json!(self.failed)),
            ("peers", json!(self.notes)),
            ("programs", facts::programs(&self.plan.given)),
            ("spread", json!("(largest - smallest) / median of the n rounds")),
            ("rss", json!("resident memory of one proxy, all its processes: the mean of the two")),
        ];
        for (name, value) in facts {
            host[name] = value;
        }
        let mut text = format!(
            "kernel {}, {}, {} processors, {}\n{}\nmedians of up to {} rounds of {} s, interleaved\n\
             {kept} measurements kept, {discarded} thrown away because others took more than {} of a processor; \
             {} kept although they did; others took {typical:.3} in the median\n",
            host["kernel"].as_str().unwrap_or_default(),
            host["cpu"].as_str().unwrap_or_default(),
            host["cores"],
            host["date"].as_str().unwrap_or_default(),
            self.layouts.join("\n"),
            self.plan.rounds,
            self.plan.seconds,
            self.plan.tolerance,
            self.disturbed.len(),
        );
        text += &self.report.table();
        for (peer, reason) in &self.skipped {
            text += &format!("skipped: {peer}: {reason}\n");
        }
        for failure in &self.failed {
            text += &format!("failed: {failure}\n");
        }
        println!("\n{text}");
        let object = json!({ "host": host, "rows": self.report.rows() });
        if self.plan.emulated {
            println!("{BEGIN}\n{object:#}\n{END}");
            return Ok(());
        }
        let out = &self.plan.out;
        std::fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
        let write = |name: &str, text: &str| {
            let path = out.join(name);
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
        };
        write("table.txt", &format!("{text}\n{}", self.report.lines()))?;
        let caption = format!("{}, {}, kernel {}", host["date"], host["cpu"], host["kernel"]).replace('"', "");
        write("bench.svg", &plot::svg(&self.report, &caption))?;
        if let Some(convert) = lab::skip::find("rsvg-convert") {
            let mut command = std::process::Command::new(convert);
            command.arg("-o").arg(out.join("bench.png")).arg(out.join("bench.svg"));
            let done = command.status();
            anyhow::ensure!(done.is_ok_and(|status| status.success()), "rsvg-convert does not make a picture");
        }
        write("bench.json", &format!("{object:#}\n"))?;
        if let Some(path) = &self.plan.json {
            std::fs::write(path, format!("{object:#}\n")).with_context(|| format!("write {}", path.display()))?;
        }
        println!("table, plots and rows: {}", out.display());
        Ok(())
    }
}
