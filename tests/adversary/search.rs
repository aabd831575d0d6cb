//! A random search: programs of socket calls by several users in several cgroups, while the agent dies, comes back and
//! reloads, tables are filled, strangers speak to every port and clients call on it through the mesh.
//!
//! Everything that is done comes from one number, which is printed. `ADVERSARY_SEED=1234` begins there again, and
//! `ADVERSARY_SEED=1234:7` does the seventh round alone; how the kernel interleaves the processes is its own affair.
//!
//! *Invariant:* whether a byte was read wrongly is decided by what the reading process knows: its user, and who bound
//! the socket and made it listen.

use crate::listeners::policy;
use crate::script::{CAST, CGROUPS, Chance, FAR, Fate, PORTS, Script};
use lab::hand::{ATTACKER, Hand, STRANGER, USER, WEB, last, listening};
use lab::janitor::processes;
use lab::{Lab, Mesh, clock, lab, or_skip, skip};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Strangers speak to all these at once, without waiting long for anybody.
fn barrage(targets: &[SocketAddr]) {
    let mut open: Vec<(Socket, SocketAddr)> = Vec::new();
    for to in targets {
        let Ok(socket) = Socket::new(Domain::for_address(*to), Type::STREAM, None) else { continue };
        let _ = socket.set_nonblocking(true);
        match socket.connect(&(*to).into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {}
            _ => open.push((socket, *to)),
        }
    }
    let end = Instant::now() + Duration::from_millis(60);
    while !open.is_empty() && Instant::now() < end {
        let mut polled: Vec<PollFd<'_>> =
            open.iter().map(|(socket, _)| PollFd::new(socket, PollFlags::OUT | PollFlags::HUP)).collect();
        let limit = rustix::fs::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        let _ = rustix::event::poll(&mut polled, Some(&limit));
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(polled);
        let mut ready = ready.into_iter();
        open.retain(|(socket, to)| {
            let told = ready.next() == Some(true);
            if told {
                let mut stream = socket;
                let _ = stream.write(format!("{STRANGER}{to}\n").as_bytes());
            }
            !told
        });
    }
}

/// What a search has seen.
#[derive(Default)]
struct Seen {
    rounds: AtomicUsize,
    steps: AtomicUsize,
    worked: AtomicUsize,
    barrages: AtomicUsize,
    /// How often a strict workload read a stranger's byte on a socket that it neither bound nor listened on, by who did;
    /// and how often others did.
    passed: Mutex<BTreeMap<String, usize>>,
    elsewhere: AtomicUsize,
    /// What the workload on the other host heard of users within rounds.
    served: AtomicUsize,
}

/// Is this stranger's byte one that nobody should have read?
fn wrong(event: &Value) -> bool {
    let strict = event["uid"] == WEB || event["accepted"] == WEB;
    let own = event["bound"] == WEB || (event["listened"] == WEB && event["shared"] == false);
    strict && own
}

/// What somebody says who dials the agent itself. Nobody hears it.
const FORGED: &str = "FORGED-";

/// Is this a client's byte that came to somebody who has nothing to do with a workload?
fn astray(lab: &Lab, event: &Value) -> bool {
    let whose = |key: &str| event[key] == ATTACKER;
    let said = event["text"].as_str().is_some_and(|text| text.contains(lab.marker()));
    said && whose("uid") && whose("bound") && whose("listened") && event["shared"] == false
}

/// Where the agent of beta listens, and with it whatever else is on that address.
fn doors(lab: &Lab) -> Vec<SocketAddr> {
    listening(&lab.beta)
        .into_iter()
        .filter(|at| at.ip() == Ipv4Addr::LOCALHOST && !PORTS.contains(&at.port()))
        .collect()
}

/// A line that is not known before it is said.
fn spelled(lab: &Lab, line: &str, before: &[SocketAddr]) -> String {
    let each = |one: &dyn Fn(usize, &SocketAddr) -> String, at: &[SocketAddr]| {
        at.iter().take(8).enumerate().map(|(index, at)| one(index, at)).collect::<Vec<_>>().join("; ")
    };
    match line {
        "@forge" => each(
            &|index, at| {
                let bound = format!("bind f 0.0.0.0:{}", 5000 + index % 4);
                format!("socket f 4; opt f reuseaddr; opt f reset; {bound}; connect f {at}; write f {FORGED}; close f")
            },
            &doors(lab),
        ),
        _ => each(
            &|index, at| format!("socket q{index} 4; opt q{index} reuseaddr; bind q{index} {at}; listen q{index}"),
            before,
        ),
    }
}

/// One round, from its script to its verdict: what went wrong, if something did.
fn round(lab: &Lab, mesh: &Mesh<'_>, far: &Hand, script: &Script, seen: &Seen) -> Result<(), String> {
    let done = AtomicBool::new(false);
    let ports: Mutex<BTreeSet<u16>> = Mutex::new(PORTS.into());
    let log: Mutex<Vec<String>> = Mutex::default();
    let (began, heard) = (Instant::now(), far.heard().len());
    let note = |who: &str, what: &str| {
        let line = format!("{:>6} ms {who}: {what}", began.elapsed().as_millis());
        log.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    };
    let speak = |host: &lab::Host, locally: bool| {
        host.within(|| {
            while !done.load(Ordering::Relaxed) {
                let ports = ports.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let mut ips: Vec<IpAddr> = vec![lab.beta.v4.into(), lab.beta.v6.into()];
                if locally {
                    ips = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), lab.beta.v4.into()];
                }
                let targets: Vec<SocketAddr> =
                    ports.iter().flat_map(|port| ips.iter().map(|ip| SocketAddr::new(*ip, *port))).collect();
                barrage(&targets);
                seen.barrages.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(8));
            }
        });
    };
    let before = doors(lab);
    let call = || {
        let mut caller = lab.puppet(&lab.alpha, "one", USER, "caller");
        let mut number = 0_usize;
        while !done.load(Ordering::Relaxed) {
            let to = SocketAddr::new(lab.beta.v4.into(), PORTS[number % PORTS.len()]);
            let line = format!("patience 40; socket k 4; connect k {to}; write k {}; close k", lab.marker());
            let _ = caller.try_tell(&line, clock::seconds(20));
            number += 1;
        }
        caller.end();
    };
    let perform = |hand: &mut Hand, name: &str, lines: &[String]| {
        let _ = hand.try_tell(&format!("patience {}", clock::millis(300).as_millis()), clock::seconds(20));
        for line in lines.iter().take_while(|_| began.elapsed() < clock::seconds(8)) {
            seen.steps.fetch_add(1, Ordering::Relaxed);
            if let Some(cgroup) = line.strip_prefix("@move ") {
                let file = lab.cgroup(cgroup).join("cgroup.procs");
                let moved = std::fs::write(file, hand.pid().to_string());
                note(name, &format!("{line}: {moved:?}"));
                continue;
            }
            let line = &if line.starts_with('@') { spelled(lab, line, &before) } else { line.clone() };
            if line.is_empty() {
                continue;
            }
            let answer = match hand.try_tell(line, clock::seconds(20)) {
                Ok(answer) => answer,
                Err(error) => return note(name, &format!("{line}: {error:#}")),
            };
            let step = last(&answer);
            let port = step["local"].as_str().and_then(|local| local.parse::<SocketAddr>().ok()).map(|at| at.port());
            if let Some(port) = port.filter(|port| *port != 0) {
                let mut ports = ports.lock().unwrap_or_else(PoisonError::into_inner);
                if ports.len() < 12 {
                    ports.insert(port);
                }
            }
            let end = if answer["ok"] == true { "ok".to_owned() } else { answer["error"].to_string() };
            seen.worked.fetch_add(usize::from(answer["ok"] == true), Ordering::Relaxed);
            note(name, &format!("{line}: {end} {}", step["local"].as_str().unwrap_or_default()));
        }
    };
    let mut hands: Vec<Hand> =
        CAST.iter().map(|(name, uid, cgroup)| lab.puppet(&lab.beta, cgroup, *uid, name)).collect();
    let fate = std::thread::scope(|scope| {
        let strangers =
            [scope.spawn(|| speak(&lab.stranger, false)), scope.spawn(|| speak(&lab.beta, true)), scope.spawn(call)];
        let agent = scope.spawn(|| decide(mesh, &script.fate, &note));
        let mut parts = Vec::new();
        for ((hand, (name, ..)), lines) in hands.iter_mut().zip(CAST).zip(&script.lines) {
            let perform = &perform;
            parts.push(scope.spawn(move || perform(hand, name, lines)));
        }
        parts.into_iter().for_each(|part| drop(part.join()));
        let fate = agent.join();
        // The last that was said is read as well.
        std::thread::sleep(Duration::from_millis(150));
        done.store(true, Ordering::Relaxed);
        strangers.into_iter().for_each(|stranger| drop(stranger.join()));
        fate.unwrap_or_else(|_| Err("the thread that ends agents panicked".to_owned()))
    });
    let story = || {
        let log = log.lock().unwrap_or_else(PoisonError::into_inner);
        log[log.len().saturating_sub(60)..].join("\n")
    };
    fate.map_err(|what| format!("{what}\nlast steps:\n{}", story()))?;
    for hand in &hands {
        for event in hand.heard() {
            if astray(lab, &event) {
                return Err(format!("{} read what a client said: {event}\nlast steps:\n{}", hand.name(), story()));
            }
        }
        for event in hand.strangers() {
            if wrong(&event) {
                return Err(format!("{} read what a stranger said: {event}\nlast steps:\n{}", hand.name(), story()));
            }
            if event["uid"] == WEB {
                let whose = format!("bound by {}, listened by {}", event["bound"], event["listened"]);
                *seen.passed.lock().unwrap_or_else(PoisonError::into_inner).entry(whose).or_default() += 1;
            } else {
                seen.elsewhere.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    drop(hands);
    seen.served.fetch_add(far.heard().len() - heard, Ordering::Relaxed);
    seen.rounds.fetch_add(1, Ordering::Relaxed);
    quiet(lab, mesh, far).map_err(|what| format!("{what}\nlast steps:\n{}", story()))
}

/// What becomes of the agent of beta during a round. It runs at the end.
fn decide(mesh: &Mesh<'_>, fate: &[(u64, Fate)], note: &dyn Fn(&str, &str)) -> Result<(), String> {
    let agent = mesh.beta();
    let well = || {
        let log = agent.log();
        if log.contains("panicked") {
            return Err(format!("the agent panicked:\n{log}"));
        }
        if agent.runs() { Ok(()) } else { Err(format!("the agent ended by itself:\n{log}")) }
    };
    for (pause, fate) in fate {
        std::thread::sleep(Duration::from_millis(*pause));
        well()?;
        note("agent", &format!("{fate:?}"));
        match fate {
            Fate::Killed(millis) => {
                agent.kill();
                std::thread::sleep(Duration::from_millis(*millis));
            }
            Fate::Restarted => drop(agent.terminate().map_err(|error| format!("SIGTERM: {error:#}"))?),
            Fate::Reloaded => agent.signal(Signal::HUP),
        }
        if !agent.runs() {
            agent.start().map_err(|error| format!("{error:#}"))?;
            note("agent", "runs again");
        }
    }
    well()
}

/// All is quiet: a fresh web is served, closed to strangers, a user reaches the other host, and the agent lives.
fn quiet(lab: &Lab, mesh: &Mesh<'_>, far: &Hand) -> Result<(), String> {
    for cgroup in CGROUPS.iter().chain(&["delegated"]) {
        for pid in processes(&lab.cgroup(cgroup)) {
            let _: Result<(), _> = kill_process(pid, Signal::KILL);
        }
    }
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let listens = clock::until(clock::seconds(10), || {
        let line = format!("socket s 6; opt s reuseaddr; opt s dual; bind s [::]:{}; listen s", PORTS[0]);
        (web.tell(&line)["ok"] == true).then_some(())
    });
    let panicked = |work: &dyn Fn()| {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        outcome.err().map(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned()))
    };
    if listens.is_none() {
        return Err("web cannot listen though all others are gone".to_owned());
    }
    if let Some(what) = panicked(&|| lab.expect_served_or_told(mesh, lab.beta.at(PORTS[0]))) {
        return Err(format!("when all was quiet: {what}"));
    }
    lab.assail(PORTS[0], 1);
    if let Some(event) = web.strangers().first() {
        return Err(format!("when all was quiet, web read what a stranger said: {event}"));
    }
    // Whoever is served within a round is so by chance, least on a slow machine: that one can be is seen here.
    let mut user = lab.puppet(&lab.beta, "one", USER, "user");
    let before = far.heard().len();
    let line = format!("socket k 4; connect k {}; write k {}; close k", lab.alpha.at(FAR), lab.marker());
    let reached = clock::until(clock::seconds(10), || {
        let _ = user.try_tell(&line, clock::seconds(20));
        (far.heard().len() > before).then_some(())
    });
    if reached.is_none() {
        return Err(format!("when all was quiet, a user did not reach the other host:\n{}", mesh.beta().log()));
    }
    for agent in [mesh.alpha(), mesh.beta()] {
        if !agent.runs() || panicked(&|| drop(agent.status())).is_some() {
            return Err(format!("the agent does not answer:\n{}", agent.log()));
        }
    }
    Ok(())
}

/// The puppets without whom a script still fails, as far as that can be found out in a minute.
fn shrunk(lab: &Lab, mesh: &Mesh<'_>, far: &Hand, script: &Script) -> (usize, Script) {
    let end = Instant::now() + clock::seconds(60);
    let seen = Seen::default();
    let fails = |script: &Script| Instant::now() < end && again(lab, mesh, far, script, &seen).is_err();
    let times = (0..3).filter(|_| fails(script)).count();
    let mut least = script.clone();
    for index in 0..CAST.len() {
        let mut less = least.clone();
        less.lines[index].clear();
        if times > 0 && !least.lines[index].is_empty() && (0..2).any(|_| fails(&less)) {
            least = less;
        }
    }
    (times, least)
}

/// A round after one that went wrong.
fn again(lab: &Lab, mesh: &Mesh<'_>, far: &Hand, script: &Script, seen: &Seen) -> Result<(), String> {
    if !mesh.beta().runs() {
        mesh.beta().start().map_err(|error| format!("{error:#}"))?;
    }
    round(lab, mesh, far, script, seen)
}

/// Rounds until the time is up. `ADVERSARY_SECONDS` says another time.
fn search(lab: &Lab, seconds: u64) {
    let policy = policy(lab, &PORTS).destination(lab.alpha.at(FAR), "server").destination(lab.alpha.at6(FAR), "server");
    let mesh = mesh!(lab, &policy);
    let said = std::env::var("ADVERSARY_SEED").unwrap_or_default();
    let (seed, only) = said.split_once(':').unwrap_or((&said, ""));
    let clock =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
    let seed: u64 = seed.parse().unwrap_or(clock % 1_000_000_007);
    let seconds = std::env::var("ADVERSARY_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(seconds);
    lab.delegate("delegated", ATTACKER);
    for host in [&lab.alpha, &lab.beta] {
        host.sysctl("net/ipv4/tcp_fastopen", "1543").unwrap();
    }
    lab.capture_many();
    // In a cgroup that is not cleared between rounds.
    let mut far = lab.puppet(&lab.alpha, "third", WEB, "far");
    far.must(&format!("socket s 6; opt s dual; bind s [::]:{FAR}; listen s"));
    tell(&format!("ADVERSARY_SEED={seed} for {seconds} s"));
    let (seen, end) = (Seen::default(), Instant::now() + Duration::from_secs(seconds));
    let first: u64 = only.parse().unwrap_or(0);
    for number in first.. {
        let script = Script::new(lab, Chance(seed.wrapping_add(number)).next());
        if let Err(what) = round(lab, &mesh, &far, &script, &seen) {
            let (times, least) = shrunk(lab, &mesh, &far, &script);
            tell(&format!("round {number} fails:\n{}", script.text()));
            panic!(
                "ADVERSARY_SEED={seed}:{number}: {what}\n--- alone it fails {times} times of 3; the least that does is:\n{}",
                least.text()
            );
        }
        if Instant::now() >= end || !only.is_empty() {
            break;
        }
    }
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    tell(&format!(
        "{} rounds, {} steps of which {} worked, {} barrages; strangers were heard by others {} times, and by \
         web on sockets of others {:?}; the workload on the other host heard {} messages within rounds",
        count(&seen.rounds),
        count(&seen.steps),
        count(&seen.worked),
        count(&seen.barrages),
        count(&seen.elsewhere),
        seen.passed.lock().unwrap_or_else(PoisonError::into_inner),
        count(&seen.served)
    ));
    // Within 300 ms times the slowness of the machine: where the processor is emulated that is a matter of chance.
    let by_chance = clock::slowness() > 1 || !only.is_empty();
    assert!(count(&seen.served) > 0 || by_chance, "no user was ever served: the search searches nothing");
    far.expect_no_stranger("on the other host");
    far.expect_unheard(FORGED, "of somebody who dialled the agent itself");
    let wire = lab.wire();
    lab.expect_marker(&wire);
    if wire.lost > 0 {
        tell(&format!("the capture lost {} packets", wire.lost));
    }
}

/// Says something past the harness, which swallows what a test that passes prints.
fn tell(text: &str) {
    let _ = std::io::stdout().lock().write_all(format!("\nadversary: {text}\n").as_bytes());
}

#[test]
fn no_program_of_socket_calls_makes_a_strict_listener_hear_a_stranger() {
    search(&lab!(), 60);
}

#[test]
fn no_long_search_finds_a_program_that_makes_a_strict_listener_hear_a_stranger() {
    let lab = lab!();
    or_skip!(skip::by_name("no_long_search"));
    search(&lab, 1800);
}
