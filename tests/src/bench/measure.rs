//! One measurement: the load runs, and the processor time of the proxies and of everybody else is read before and after.
//!
//! *Invariant:* what other programs took during a measurement is known; where it is too much, the measurement is thrown
//! away, or kept and called disturbed when it never got quiet.

use crate::bench::load::Load;
use crate::bench::peers::Chain;
use crate::bench::plan::AGAIN;
use crate::janitor::processes;
use crate::{clock, program};
use anyhow::{Context, ensure};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// A figure: metric, unit, value.
pub type Figure = (String, &'static str, f64);

/// Processor time in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Used {
    user: f64,
    system: f64,
}

/// What a cgroup and everything below it has used.
fn used(cgroup: &Path) -> Used {
    let text = std::fs::read_to_string(cgroup.join("cpu.stat")).unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        line.unwrap_or(0.0) / 1e6
    };
    Used { user: field("user_usec "), system: field("system_usec ") }
}

/// Seconds that all processors were busy, stolen time included, by the first line of /proc/stat.
fn busy(stat: &str) -> Option<f64> {
    let ticks: Vec<f64> = stat.lines().next()?.split_whitespace().skip(1).map_while(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is in user already.
    let busy: f64 =
        ticks.iter().take(8).enumerate().filter(|(at, _)| !matches!(at, 3 | 4)).map(|(_, ticks)| ticks).sum();
    (ticks.len() >= 8).then_some(busy / rustix::param::clock_ticks_per_second() as f64)
}

/// Seconds that this program has used, by its line of /proc/self/stat.
fn own(stat: &str) -> Option<f64> {
    // The name in brackets may have anything in it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks / rustix::param::clock_ticks_per_second() as f64)
}

/// Everything that is read before and after.
struct Reading {
    at: Instant,
    proxies: Used,
    /// Of the chain's whole lab and of this program.
    ours: f64,
    busy: f64,
}

impl Reading {
    fn take(chain: &Chain) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let lab = used(&chain.lab.cgroup(""));
        let mut proxies = Used::default();
        for name in &chain.proxies {
            let one = used(&chain.lab.cgroup(name));
            proxies = Used { user: proxies.user + one.user, system: proxies.system + one.system };
        }
        Self {
            at: Instant::now(),
            proxies,
            ours: lab.user + lab.system + own(&read("/proc/self/stat")).unwrap_or(0.0),
            busy: busy(&read("/proc/stat")).unwrap_or(0.0),
        }
    }
}

/// Processors' worth of time that others took between two readings. Ticks are coarse, so it can come out below nothing.
fn others(before: &Reading, after: &Reading) -> f64 {
    let seconds = (after.at - before.at).as_secs_f64();
    ((after.busy - before.busy) - (after.ours - before.ours)).max(0.0) / seconds.max(0.001)
}

/// What one measurement came to.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The figures.
    pub figures: Vec<Figure>,
    /// Processors' worth of time that others took meanwhile.
    pub others: f64,
    /// Measurements that were thrown away before this one.
    pub discarded: usize,
    /// Others took more than was to be tolerated, each time.
    pub disturbed: bool,
}

/// Measures until nothing disturbs, a few times at most, and gives the last or the least disturbed one.
pub fn sample(
    chain: &Chain,
    load: Load,
    seconds: f64,
    tolerance: f64,
    until: Option<Instant>,
) -> crate::Result<Sample> {
    settle(|| measure(chain, load, seconds), tolerance, || until.is_none_or(|until| Instant::now() < until))
}

/// The decision itself: `take` gives figures and what others took.
fn settle(
    mut take: impl FnMut() -> crate::Result<(Vec<Figure>, f64)>,
    tolerance: f64,
    may_repeat: impl Fn() -> bool,
) -> crate::Result<Sample> {
    let mut best: Option<Sample> = None;
    for taken in 0..AGAIN {
        let (figures, others) = take()?;
        let disturbed = others > tolerance;
        if best.as_ref().is_none_or(|best| others < best.others) {
            best = Some(Sample { figures, others, discarded: 0, disturbed });
        }
        if let Some(best) = &mut best {
            best.discarded = taken;
        }
        if !disturbed || !may_repeat() {
            break;
        }
    }
    best.context("nothing was measured")
}

fn measure(chain: &Chain, load: Load, seconds: f64) -> crate::Result<(Vec<Figure>, f64)> {
    let to = chain.to.to_string();
    let (kind, number, size) = match load {
        Load::Bulk(number) => ("bulk", number, 0),
        Load::RoundTrips(size, number) => ("round-trips", number, size),
        Load::Connects(number) => ("connects", number, 0),
    };
    let (number, size, time) = (number.to_string(), size.to_string(), seconds.to_string());
    let threads = chain.threads.to_string();
    let words = ["load", "--kind", kind, "--to", &to, "--connections", &number, "--size", &size, "--seconds", &time];
    let mut program = chain.client(&[&words[..], &["--threads", &threads]].concat())?;
    if let Err(error) = program.line(clock::seconds(30), |line| line.starts_with("READY")) {
        let said = program.stderr();
        return Err(if said.is_empty() { error } else { anyhow::anyhow!("{}", said.trim()) });
    }
    let (before, wire) = (Reading::take(chain), on_the_wire(chain));
    program.say("go")?;
    let outcome = program.wait(clock::seconds(90))?;
    let (after, wire) = (Reading::take(chain), on_the_wire(chain) - wire);
    ensure!(outcome.status.success(), "{}", outcome.stderr.trim());
    let answer: Value = serde_json::from_str(outcome.stdout.lines().last().unwrap_or_default())
        .context("the load generator's answer")?;
    let used =
        Used { user: after.proxies.user - before.proxies.user, system: after.proxies.system - before.proxies.system };
    let mut figures = figures(load, &answer, used, !chain.proxies.is_empty())?;
    if let (Load::Connects(_), Some(total)) = (load, answer["total"].as_f64()) {
        // Shows what a connection weighs, handshake and tickets included, and whether it was pooled.
        figures.push(("conn_wire".to_owned(), "B", wire / total));
    }
    Ok((figures, others(&before, &after)))
}

/// Bytes that the server's host has sent and received, whole frames, by its link's counters.
fn on_the_wire(chain: &Chain) -> f64 {
    let text = chain.lab.beta.within(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:"));
    let fields: Vec<f64> = line.unwrap_or_default().split_whitespace().map_while(|word| word.parse().ok()).collect();
    // Received bytes come first, sent ones ninth.
    fields.first().unwrap_or(&0.0) + fields.get(8).unwrap_or(&0.0)
}

/// What a load's answer and the processor time mean, by the names that rows have.
fn figures(load: Load, answer: &Value, used: Used, proxied: bool) -> crate::Result<Vec<Figure>> {
    let field = |name: &str| answer[name].as_f64().with_context(|| format!("no {name} in {answer}"));
    let all = used.user + used.system;
    Ok(match load {
        Load::Bulk(streams) => {
            let mut figures = vec![(format!("throughput_{streams}"), "Gb/s", field("per_second")? * 8.0 / 1e9)];
            if proxied {
                let gigabytes = field("bytes")? / 1e9;
                let of = if streams == 1 { String::new() } else { format!("_{streams}") };
                figures.push((format!("cpu_per_gb{of}"), "s", all / gigabytes));
                figures.push((format!("cpu_per_gb{of}_user"), "s", used.user / gigabytes));
            }
            figures
        }
        Load::RoundTrips(size, connections) => {
            let name = if size == 1024 { "rtt1k".to_owned() } else { format!("rtt{size}") };
            let name = |what: &str| format!("{name}_c{connections}_{what}");
            let mut figures = vec![
                (name("p50"), "us", field("p50")?),
                (name("p99"), "us", field("p99")?),
                (name("rate"), "1/s", field("per_second")?),
            ];
            if proxied {
                figures.push((name("cpu"), "us", all * 1e6 / field("total")?));
            }
            figures
        }
        Load::Connects(_) => {
            let mut figures = vec![
                ("conn_rate".to_owned(), "1/s", field("per_second")?),
                ("conn_p50".to_owned(), "us", field("p50")?),
                ("conn_p99".to_owned(), "us", field("p99")?),
            ];
            if proxied {
                figures.push(("cpu_per_1000_conns".to_owned(), "s", all * 1000.0 / field("total")?));
            }
            figures
        }
    })
}

/// Resident memory of one proxy, the mean of the two, in bytes.
fn resident(chain: &Chain) -> f64 {
    let of = |cgroup: &String| -> u64 {
        let processes = processes(&chain.lab.cgroup(cgroup));
        processes.iter().map(|pid| program::resident(pid.as_raw_nonzero().get().unsigned_abs())).sum()
    };
    chain.proxies.iter().map(of).sum::<u64>() as f64 / chain.proxies.len().max(1) as f64
}

/// Slabs, kernel stacks, page tables and buffers of sockets, of the whole machine, in bytes.
fn kernel_memory() -> f64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = |name: &str| -> f64 {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_suffix("kB")?.trim().parse().ok());
        line.unwrap_or(0.0)
    };
    let sockstat = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let pages = sockstat.lines().find_map(|line| line.strip_prefix("TCP:")?.rsplit(' ').next()?.parse::<f64>().ok());
    let kept = kilobytes("Slab:") + kilobytes("KernelStack:") + kilobytes("PageTables:");
    kept * 1024.0 + pages.unwrap_or(0.0) * rustix::param::page_size() as f64
}

/// Memory at rest, and what each idle connection adds, in three steps of so many connections. For fresh proxies.
pub fn memory(chain: &Chain, number: usize) -> crate::Result<Vec<Figure>> {
    let pause = || std::thread::sleep(Duration::from_millis(700));
    pause();
    let rest = resident(chain);
    let mut figures = Vec::new();
    if !chain.proxies.is_empty() {
        figures.push(("rss_idle".to_owned(), "MB", rest / 1e6));
    }
    let (mut held, mut last, mut last_kernel) = (Vec::new(), rest, kernel_memory());
    for _ in 0..3 {
        let (to, count) = (chain.to.to_string(), number.to_string());
        let mut program = chain.client(&["load", "--kind", "hold", "--to", &to, "--connections", &count])?;
        program.line(clock::seconds(90), |line| line.contains("held"))?;
        held.push(program);
        pause();
        let (now, now_kernel) = (resident(chain), kernel_memory());
        if !chain.proxies.is_empty() {
            figures.push(("rss_per_conn".to_owned(), "KB", (now - last) / 1e3 / number as f64));
        }
        figures.push(("kernel_per_conn".to_owned(), "KB", (now_kernel - last_kernel) / 1e3 / number as f64));
        (last, last_kernel) = (now, now_kernel);
    }
    for mut program in held {
        program.close_stdin();
        program.end(clock::seconds(20))?;
    }
    Ok(figures)
}

/// wrk beside our own generator: requests on 16 connections that stay, and on one connection each.
pub fn wrk(chain: &Chain, seconds: &str) -> crate::Result<Vec<Figure>> {
    let (url, time) = (format!("http://{}/", chain.to), format!("{seconds}s"));
    let mut figures = Vec::new();
    for (metric, header) in [("wrk_c16_rate", None), ("wrk_conn_rate", Some("Connection: close"))] {
        let mut words = vec!["wrk", "-t1", "-c16", "-d", &time];
        words.extend(header.iter().flat_map(|header| ["-H", header]));
        words.push(&url);
        crate::skip::need("wrk").map_err(|skip| anyhow::anyhow!(skip.0))?;
        let outcome = chain.lab.run(&chain.lab.alpha, "client", &words).wait(clock::seconds(60))?;
        let line = outcome.stdout.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
        let rate = line.and_then(|rate| rate.trim().parse::<f64>().ok()).filter(|rate| *rate > 0.0);
        let rate = rate.with_context(|| format!("{metric}: {}{}", outcome.stdout, outcome.stderr))?;
        figures.push((metric.to_owned(), "1/s", rate));
    }
    Ok(figures)
}

/// iperf3 beside our own generator: one stream. It takes the place of the server, for good.
pub fn iperf(chain: &mut Chain, seconds: &str, rounds: usize) -> crate::Result<Vec<f64>> {
    crate::skip::need("iperf3").map_err(|skip| anyhow::anyhow!(skip.0))?;
    let port = crate::policy::PORT.to_string();
    let _server = chain.replace_server(&["iperf3", "-s", "-p", &port]);
    std::thread::sleep(Duration::from_millis(500));
    let (host, port) = (chain.to.ip().to_string(), chain.to.port().to_string());
    let mut values = Vec::new();
    for _ in 0..rounds {
        let words = ["iperf3", "-c", &host, "-p", &port, "-t", seconds, "-J"];
        let outcome = chain.lab.run(&chain.lab.alpha, "client", &words).wait(clock::seconds(60))?;
        let answer: Value = serde_json::from_str(&outcome.stdout).context("what iperf3 says")?;
        let bits = answer["end"]["sum_received"]["bits_per_second"].as_f64();
        values.push(bits.with_context(|| format!("iperf3: {}", answer["error"]))? / 1e9);
        std::thread::sleep(Duration::from_millis(300));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(others: &[f64]) -> Sample {
        let mut left = others.iter();
        settle(|| Ok((Vec::new(), *left.next().unwrap())), 0.05, || true).unwrap()
    }

    #[test]
    fn a_quiet_measurement_is_taken_at_once() {
        let sample = settled(&[0.01]);
        assert_eq!((sample.discarded, sample.disturbed), (0, false));
    }

    #[test]
    fn a_disturbed_one_is_thrown_away_and_counted() {
        let sample = settled(&[0.4, 0.3, 0.02]);
        assert_eq!((sample.discarded, sample.disturbed, sample.others), (2, false, 0.02));
    }

    #[test]
    fn where_it_never_gets_quiet_the_least_disturbed_one_is_kept_and_called_so() {
        let sample = settled(&[0.4, 0.2, 0.3]);
        assert_eq!((sample.discarded, sample.disturbed, sample.others), (2, true, 0.2));
    }

    #[test]
    fn busy_time_leaves_out_idle_and_waiting() {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        assert_eq!(busy("cpu  1 2 4 1000 1000 8 16 32 64 64\ncpu0 0"), Some(63.0 / ticks));
        assert_eq!(busy("cpu 1"), None);
    }

    #[test]
    fn own_time_is_found_behind_any_name() {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let line = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 30 12 13 14";
        assert_eq!(own(line), Some(42.0 / ticks));
    }

    #[test]
    fn figures_have_the_names_and_units_of_the_rows() {
        let used = Used { user: 0.5, system: 1.5 };
        let answer = serde_json::json!({
            "bytes": 4e9, "per_second": 1e9, "count": 10, "total": 2000, "p50": 7.0, "p99": 9.0,
        });
        let bulk = figures(Load::Bulk(1), &answer, used, true).unwrap();
        assert_eq!(bulk[0], ("throughput_1".to_owned(), "Gb/s", 8.0));
        assert_eq!(bulk[1], ("cpu_per_gb".to_owned(), "s", 0.5));
        let trips = figures(Load::RoundTrips(64, 16), &answer, used, true).unwrap();
        assert_eq!(trips[1], ("rtt64_c16_p99".to_owned(), "us", 9.0));
        let connects = figures(Load::Connects(16), &answer, used, true).unwrap();
        assert_eq!(connects[3], ("cpu_per_1000_conns".to_owned(), "s", 1.0));
        assert_eq!(figures(Load::Bulk(1), &answer, used, false).unwrap().len(), 1);
    }
}
