//! Whole policies in the maps of the running kernel: who inherits from whom, what happens when tables are full, and how long
//! a large policy takes.

use crate::world::{World, world};
use bunter::policy::{Accounts, Policy, Source};
use bunter_common::*;
use std::{
    fmt::Write,
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

fn policy(text: &str) -> Policy {
    let source = Source { file: "p.toml".into(), text: format!("trust_domain = \"td\"\n{text}") };
    Policy::parse("policies", &[source], &Accounts::default()).unwrap_or_else(|error| panic!("{error}"))
}

fn name(world: &World) -> String {
    world.cgroup.file_name().unwrap().to_str().unwrap().to_owned()
}

/// A directory of the cgroup tree that is removed again.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn new(path: std::path::PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its processes may still be on their way out.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

const MESH: &str = "[[destination]]\naddress = \"10.77.0.2:80\"\nid = \"spiffe://td/server\"\n";

#[test]
fn a_cgroup_that_nobody_has_looked_at_is_what_its_nearest_ancestor_is() {
    let mut world = world!();
    let inside = Cgroup::new(world.cgroup.join("inside"));
    let of_uid =
        "[[workload]]\nid = \"spiffe://td/by-uid\"\nselectors = [\"unix:uid:54321\", \"cgroup:/bunter-none\"]\n";
    let text = format!(
        "{MESH}{of_uid}[[workload]]\nid = \"spiffe://td/in\"\nselectors = [\"cgroup:/{}/inside\"]\n",
        name(&world)
    );
    world.programs().install(Arc::new(policy(&text))).unwrap();
    world.kill_agent();
    let server = std::net::TcpListener::bind("10.77.0.2:81").unwrap();
    let deep = Cgroup::new(inside.0.join("new"));
    let deeper = Cgroup::new(deep.0.join("newer"));
    let apart = Cgroup::new(world.cgroup.join("outside/new"));
    let fresh = Cgroup::new(world.cgroup.join("fresh"));
    let both = "connect 10.77.0.2:80;connect 10.77.0.2:81";
    for (cgroup, mesh, other) in [
        // Enrolled, and no rule allows it.
        (&deep, "EPERM", "EPERM"),
        (&deeper, "EPERM", "EPERM"),
        // Nobody, as `outside` is, and left alone where it is no mesh destination.
        (&apart, "EPERM", "connected to 10.77.0.2:81 from 10.77.0.2"),
        // Could be `inside` for all that the kernel knows: there is no agent to ask.
        (&fresh, "ECONNREFUSED", "connected to 10.77.0.2:81 from 10.77.0.2"),
    ] {
        let mut client = world.client_in(&cgroup.0, both);
        assert_eq!((client.line().as_str(), client.line().as_str()), (mesh, other), "{}", cgroup.0.display());
    }
    drop((server, deeper, deep, apart, fresh, inside));
}

#[test]
fn an_unknown_cgroup_matters_only_to_whom_an_entry_could_name() {
    let mut world = world!();
    let text = format!(
        "{MESH}[[workload]]\nid = \"spiffe://td/in\"\nselectors = [\"unix:uid:54321\", \"cgroup:/{}/fresh\"]\n",
        name(&world)
    );
    world.programs().install(Arc::new(policy(&text))).unwrap();
    world.kill_agent();
    let fresh = Cgroup::new(world.cgroup.join("fresh"));
    // Root is not uid 54321, whatever the cgroup turns out to be.
    assert_eq!(world.client_in(&fresh.0, "connect 10.77.0.2:80").line(), "EPERM");
}

#[test]
fn users_and_cgroups_of_one_policy_do_not_fill_the_tables_and_full_tables_end_nobody() {
    let mut world = world!();
    let mut text = MESH.to_owned();
    for number in 0..260 {
        writeln!(
            text,
            "[[workload]]\nid = \"spiffe://td/u{number}\"\nselectors = [\"unix:uid:{}\"]\n\
             [[workload]]\nid = \"spiffe://td/c{number}\"\nselectors = [\"cgroup:/{}/c{number}\"]",
            70_000 + number,
            name(&world)
        )
        .unwrap();
    }
    world.programs().install(Arc::new(policy(&text))).unwrap();
    let before: Vec<Cgroup> = (0..130).map(|number| Cgroup::new(world.cgroup.join(format!("c{number}")))).collect();
    world.listen_for(Duration::from_millis(50));
    world.programs().install(Arc::new(policy(&text))).unwrap();
    let after: Vec<Cgroup> = (130..260).map(|number| Cgroup::new(world.cgroup.join(format!("c{number}")))).collect();
    world.listen_for(Duration::from_millis(50));
    assert_eq!(world.programs().install(Arc::new(policy(&text))).unwrap(), 3);
    assert_eq!(world.programs().unplaced_cgroups(), 0);
    drop((before, after));

    world.kill_agent();
    world.release();
    world.options.sizes = vec![(map::CGROUPS, 64), (map::CANDIDATES, 4096)];
    world.try_start().unwrap();
    world.programs().install(Arc::new(policy(&text))).unwrap();
    let many: Vec<Cgroup> = (0..60).map(|number| Cgroup::new(world.cgroup.join(format!("c{number}")))).collect();
    world.listen_for(Duration::from_millis(50));
    assert!(world.programs().unplaced_cgroups() > 0);
    // What found no room could be anybody of the policy, and its program is asked of the agent: refused when there is none.
    world.kill_agent();
    // Another test's thread may be starting a process, which has this one's listeners until it runs its program.
    let refused = || world.client_in(&many[59].0, "connect 10.77.0.2:80").line() == "ECONNREFUSED";
    assert!((0..20).any(|_| refused()));
}

#[test]
fn one_changed_rule_is_in_force_at_once_and_a_restarted_agent_writes_only_what_differs() {
    let mut world = world!();
    let text = |rules: &str| {
        format!(
            "{MESH}{rules}[[workload]]\nid = \"spiffe://td/in\"\nselectors = [\"cgroup:/{}\"]\n",
            world.cgroup.file_name().unwrap().to_str().unwrap()
        )
    };
    let closed = text("");
    let open = text("[[bypass]]\nname = \"b\"\nfrom = { pattern = \"spiffe://td/*\" }\naddress = \"10.77.0.2:81\"\n");
    let dial = |world: &World| world.client("connect 10.77.0.2:81").line();
    world.programs().install(Arc::new(policy(&closed))).unwrap();
    let server = std::net::TcpListener::bind("10.77.0.2:81").unwrap();
    assert_eq!(dial(&world), "EPERM");
    let prepared = world.programs().outlook().unwrap().prepare(Arc::new(policy(&open)));
    // The address, what may go there, and whom the pattern names.
    assert_eq!(prepared.changes(), 2);
    assert_eq!(world.programs().install_prepared(prepared).unwrap(), 2);
    assert_eq!(dial(&world), "connected to 10.77.0.2:81 from 10.77.0.2");
    world.kill_agent();
    world.try_start().unwrap();
    assert_eq!(dial(&world), "connected to 10.77.0.2:81 from 10.77.0.2");
    world.programs().install(Arc::new(policy(&open))).unwrap();
    assert_eq!(dial(&world), "connected to 10.77.0.2:81 from 10.77.0.2");
    world.programs().install(Arc::new(policy(&closed))).unwrap();
    assert_eq!(dial(&world), "EPERM");
    drop(server);
}

#[test]
fn while_it_changes_who_is_who_nobody_falls_between_two_policies() {
    let mut world = world!();
    let name = name(&world);
    let text = |number: u32| {
        let other = format!("[[workload]]\nid = \"spiffe://td/other\"\nselectors = [\"unix:uid:{number}\"]\n");
        format!("{MESH}{other}[[workload]]\nid = \"spiffe://td/in\"\nselectors = [\"cgroup:/{name}\"]\n")
    };
    world.programs().install(Arc::new(policy(&text(1)))).unwrap();
    let _server = std::net::TcpListener::bind("10.77.0.2:81").unwrap();
    // What a workload dials beside the mesh follows its policy, and this one has no rule for it.
    let mut clients: Vec<_> = (0..6).map(|_| world.client("dial-for 10.77.0.2:81 6000")).collect();
    let began = Instant::now();
    let mut changes = 0;
    while began.elapsed() < Duration::from_millis(5500) {
        changes += 1;
        world.programs().install(Arc::new(policy(&text(70_000 + changes)))).unwrap();
    }
    for client in &mut clients {
        let ends = client.line();
        assert!(ends.starts_with("EPERM: ") && !ends.contains(','), "{changes} changes: {ends}");
    }
    // How many there are is a matter of the machine: a hundred, or ten where the processor is emulated.
    let slowness: u32 = std::env::var("LAB_SLOW").ok().and_then(|text| text.parse().ok()).unwrap_or(1).max(1);
    assert!(changes > 20 / slowness, "{changes}");
}

fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// A data centre's policy on one host; prints what takes how long.
#[test]
#[ignore = "takes seconds and a quiet machine"]
fn a_thousand_workloads_ten_thousand_destinations_and_a_hundred_thousand_rules() {
    let mut world = world!();
    let mut text = String::new();
    for number in 0..1000 {
        writeln!(text, "[[workload]]\nid = \"spiffe://td/w/{number}\"\nselectors = [\"unix:uid:{}\"]", 70_000 + number)
            .unwrap();
    }
    for number in 0..10_000 {
        let (high, low) = (number / 250, number % 250 + 1);
        writeln!(text, "[[destination]]\naddress = \"10.1.{high}.{low}:80\"\nid = \"spiffe://td/s/{number}\"").unwrap();
    }
    for number in 0..100_000 {
        let (from, to) = (number % 1000, (number / 1000) * 100 + number % 100);
        writeln!(text, "[[allow]]\nfrom = \"spiffe://td/w/{from}\"\nto = \"spiffe://td/s/{to}\"").unwrap();
    }
    let changed = format!("{text}[[allow]]\nfrom = \"spiffe://td/w/1\"\nto = \"spiffe://td/s/9999\"\n");
    println!("{} MiB of text, resident {} MiB", text.len() >> 20, resident());
    let timed = |what: &str, since: Instant| {
        println!("{what}: {:.1} ms, resident {} MiB", since.elapsed().as_secs_f64() * 1000.0, resident());
        since.elapsed()
    };
    let mut whole = Duration::ZERO;
    let mut reload = Duration::ZERO;
    for (round, text) in [&text, &changed].into_iter().enumerate() {
        let since = Instant::now();
        let parsed = policy(text);
        let parsing = timed("read and checked", since);
        let since = Instant::now();
        let prepared = world.programs().outlook().unwrap().prepare(Arc::new(parsed));
        let preparing = timed(&format!("prepared, {} rows", prepared.changes()), since);
        let since = Instant::now();
        world.programs().install_prepared(prepared).unwrap();
        let installing = timed("installed", since);
        whole = parsing + preparing + installing;
        reload = installing;
        println!("round {round}: {:.1} ms together", whole.as_secs_f64() * 1000.0);
    }
    world.kill_agent();
    let since = Instant::now();
    world.try_start().unwrap();
    timed("started again over all rows", since);
    world.kill_agent();
    world.release();
    let since = Instant::now();
    world.try_start().unwrap();
    timed("started over none", since);
    assert!(whole < Duration::from_secs(10), "{whole:?}");
    assert!(reload < Duration::from_millis(500), "{reload:?}");
}
