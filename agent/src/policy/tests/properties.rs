//! What must hold for every policy: random policies of a small world, asked every question.

use super::*;
use bunter_common::{MODE_MESH, VERDICT_BYPASS, VERDICT_MESH};
use proptest::prelude::*;
use std::fmt::Write;

const IDS: [&str; 4] = ["a", "b", "ns/c", "ns/d"];
const MATCHERS: [&str; 6] = [
    "\"spiffe://td/a\"",
    "\"spiffe://td/b\"",
    "\"spiffe://td/ns/c\"",
    "{ pattern = \"spiffe://td/ns/*\" }",
    "{ pattern = \"spiffe://td/*\" }",
    "{ pattern = \"spiffe://td/**\" }",
];
const NETWORKS: [&str; 5] = ["10.0.0.1", "10.0.0.2", "10.0.0.0/30", "10.0.0.2/31", "[fd00::1]"];
const PORTS: [&str; 3] = ["80", "81", "*"];
const HOSTS: [&str; 5] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "[fd00::1]"];

#[derive(Clone, Debug)]
struct Rules {
    destinations: Vec<(usize, usize, usize)>,
    allows: Vec<(usize, usize, Option<usize>)>,
    bypasses: Vec<(usize, usize, usize)>,
    udps: Vec<(usize, usize, usize)>,
}

fn rules() -> impl Strategy<Value = Rules> {
    use proptest::collection::vec;
    let region = || (0..NETWORKS.len(), 0..PORTS.len());
    (
        vec((region(), 0..IDS.len()).prop_map(|((n, p), i)| (n, p, i)), 0..6),
        vec((0..MATCHERS.len(), 0..MATCHERS.len(), proptest::option::of(0..2usize)), 0..6),
        vec((region(), 0..MATCHERS.len()).prop_map(|((n, p), m)| (n, p, m)), 0..4),
        vec((region(), 0..MATCHERS.len()).prop_map(|((n, p), m)| (n, p, m)), 0..3),
    )
        .prop_map(|(mut destinations, mut allows, mut bypasses, mut udps)| {
            // Most repetitions are mistakes that the check refuses: leave them out, so that more policies are asked.
            let mut seen = BTreeSet::new();
            destinations.retain(|(network, port, _)| seen.insert((*network, *port)));
            bypasses.retain(|(network, port, _)| !seen.contains(&(*network, *port)));
            for plain in [&mut bypasses, &mut udps] {
                let mut seen = BTreeSet::new();
                plain.retain(|rule| seen.insert(*rule));
            }
            let mut seen = BTreeSet::new();
            allows.retain(|(from, to, _)| seen.insert((*from, *to)));
            Rules { destinations, allows, bypasses, udps }
        })
}

impl Rules {
    fn text(&self) -> String {
        let mut text = String::from("trust_domain = \"td\"\n");
        for (number, id) in IDS.iter().enumerate() {
            let uid = number + 1;
            writeln!(text, "[[workload]]\nid = \"spiffe://td/{id}\"\nselectors = [\"unix:uid:{uid}\"]").unwrap();
        }
        for (network, port, id) in &self.destinations {
            let (network, port, id) = (NETWORKS[*network], PORTS[*port], IDS[*id]);
            writeln!(text, "[[destination]]\naddress = \"{network}:{port}\"\nid = \"spiffe://td/{id}\"").unwrap();
        }
        for (from, to, port) in &self.allows {
            writeln!(text, "[[allow]]\nfrom = {}\nto = {}", MATCHERS[*from], MATCHERS[*to]).unwrap();
            if let Some(port) = port {
                writeln!(text, "ports = [{}]", PORTS[*port]).unwrap();
            }
        }
        for (kind, rules) in [("bypass", &self.bypasses), ("udp", &self.udps)] {
            for (number, (network, port, from)) in rules.iter().enumerate() {
                let (network, port, from) = (NETWORKS[*network], PORTS[*port], MATCHERS[*from]);
                writeln!(text, "[[{kind}]]\nname = \"{kind}{number}\"\nfrom = {from}\naddress = \"{network}:{port}\"")
                    .unwrap();
            }
        }
        text
    }
}

fn questions() -> impl Iterator<Item = (SpiffeId, SocketAddr)> {
    IDS.iter().flat_map(|from| {
        let addresses = HOSTS.iter().flat_map(|host| [80, 81, 82].map(|port| format!("{host}:{port}")));
        addresses.map(|to| (id(from), to.parse().unwrap()))
    })
}

/// What the kernel programs do with the rows: (mode, action, rule) of a destination and a protocol.
fn kernel_says(
    policy: &Policy,
    kernel: &KernelPolicy,
    from: &SpiffeId,
    to: SocketAddr,
    protocol: u16,
) -> (u32, u32, u32) {
    let row = kernel
        .destinations
        .iter()
        .filter(|row| row.network.contains(&to.ip()) && row.port.is_none_or(|port| port == to.port()))
        .max_by_key(|row| (row.port.is_some(), row.network.prefix_len()));
    let Some(row) = row else { return (0, 0, 0) };
    let workload = policy.workloads().iter().position(|workload| workload.id == *from).unwrap();
    let rows = policy.candidates(&[]);
    let who = rows.iter().find(|row| row.workload as usize == workload + 1).unwrap();
    let (target, group) = match protocol {
        6 => (row.target, row.group),
        _ => (row.datagrams, 0),
    };
    // As `verdicts` in ebpf/src/facts.rs looks for them.
    for port in [0, to.port()] {
        for (source, target) in [(who.source, target), (who.group, target), (who.source, group), (who.group, group)] {
            let found = kernel.verdicts.iter().find(|verdict| {
                (verdict.source, verdict.target, verdict.port, verdict.protocol) == (source, target, port, protocol)
            });
            if let Some(verdict) = found.filter(|_| source != 0 && target != 0) {
                return (row.mode, verdict.action, verdict.rule);
            }
        }
    }
    (row.mode, 0, 0)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Nobody,
    Workload(u32),
    Ask,
}

/// What `who` in ebpf/src/facts.rs makes of the rows that a task matches.
fn kernel_knows(policy: &Policy, cgroup: &str, uid: u32, gid: u32) -> Known {
    let mut rows = policy.candidates(&[]);
    let set = policy.cgroup_set(cgroup);
    if !set.is_empty() {
        rows.extend(policy.candidates(&set));
    }
    let (mut workload, mut certain, mut attested) = (0, 0, 0);
    for row in rows {
        if row.uid.is_some_and(|wanted| wanted != uid) || row.gid.is_some_and(|wanted| wanted != gid) {
            continue;
        }
        attested = attested.max(row.attested);
        if row.certain > certain {
            (certain, workload) = (row.certain, row.workload);
        } else if row.certain == certain && row.workload != workload {
            workload = 0;
        }
    }
    match workload {
        _ if certain == 0 && attested == 0 => Known::Nobody,
        0 => Known::Ask,
        _ if attested >= certain => Known::Ask,
        number => Known::Workload(number),
    }
}

fn identified(policy: &Policy, cgroup: &str, uid: u32, gid: u32, path: &str) -> Result<Option<u32>, Ambiguous> {
    let process =
        Process { uid: Some(uid), gid: Some(gid), cgroup: Some(cgroup.into()), path: Some(path.into()), sha256: None };
    policy.identify(&process).map(|found| found.map(|workload| workload.number))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_rows_say_exactly_what_the_policy_says(rules in rules()) {
        let Ok(policy) = load(&rules.text()) else { return Ok(()) };
        let kernel = policy.kernel();
        for (from, to) in questions() {
            let (mode, action, rule) = kernel_says(&policy, &kernel, &from, to, 6);
            let expected = match policy.outbound(&from, to) {
                Outbound::Mesh { .. } => (VERDICT_MESH, 0),
                Outbound::Bypass(rule) => (VERDICT_BYPASS, rule.number),
                Outbound::Deny => (0, 0),
            };
            prop_assert_eq!((action, rule), expected, "{} {}", from, to);
            prop_assert_eq!(mode == MODE_MESH, policy.is_mesh(to), "{} {}", from, to);
            let (_, action, rule) = kernel_says(&policy, &kernel, &from, to, 17);
            let expected = policy.udp(&from, to).map_or((0, 0), |rule| (VERDICT_BYPASS, rule.number));
            prop_assert_eq!((action, rule), expected, "UDP {} {}", from, to);
        }
    }

    /// By what is written alone: rows that the rules add for their ports must never change who has to answer.
    #[test]
    fn what_is_written_decides_whatever_rows_the_ports_of_rules_add(rules in rules()) {
        let Ok(policy) = load(&rules.text()) else { return Ok(()) };
        let region = |network: usize, port: usize| Region::parse(&format!("{}:{}", NETWORKS[network], PORTS[port])).unwrap();
        let meshes = rules.destinations.iter().map(|(network, port, id)| (region(*network, *port), Some(IDS[*id])));
        let plain = rules.bypasses.iter().map(|(network, port, _)| (region(*network, *port), None));
        let written: Vec<_> = meshes.chain(plain).collect();
        for (_, to) in questions() {
            let deciding = written
                .iter()
                .filter(|(region, _)| region.contains(to))
                .max_by_key(|(region, _)| (region.port.is_some(), region.network.prefix_len()));
            let expected = deciding.and_then(|(_, expected)| *expected).map(id);
            prop_assert_eq!(policy.expected(to), expected.as_ref(), "{}", to);
            for from in IDS.map(id) {
                let udp = policy.udps.iter().any(|udp| udp.region.contains(to) && udp.from.matches(&from));
                prop_assert_eq!(policy.udp(&from, to).is_some(), expected.is_some() && udp, "UDP {} {}", from, to);
                let allowed = |expected: &SpiffeId| policy.allows.iter().any(|allow| {
                    allow.from.matches(&from) && allow.to.matches(expected) && allow.ports.contain(to.port())
                });
                let bypassed = |bypass: &Plain| bypass.region.contains(to) && bypass.from.matches(&from);
                match (policy.outbound(&from, to), &expected) {
                    (Outbound::Mesh { .. }, Some(expected)) => prop_assert!(allowed(expected), "{} {}", from, to),
                    (Outbound::Deny, Some(expected)) => prop_assert!(!allowed(expected), "{} {}", from, to),
                    (Outbound::Bypass(_), None) => prop_assert!(policy.bypasses.iter().any(bypassed), "{} {}", from, to),
                    (Outbound::Deny, None) => {
                        let exact = |bypass: &&Plain| deciding.is_some_and(|(region, _)| *region == bypass.region);
                        prop_assert!(!policy.bypasses.iter().filter(exact).any(bypassed), "{} {}", from, to);
                    }
                    (found, expected) => prop_assert!(false, "{} {}: {:?}, not {:?}", from, to, found, expected),
                }
            }
        }
    }

    #[test]
    fn removing_an_allow_rule_never_allows_more_and_never_changes_a_bypass(rules in rules(), which in 0usize..6) {
        let Ok(more) = load(&rules.text()) else { return Ok(()) };
        let mut fewer = rules.clone();
        if which < fewer.allows.len() {
            fewer.allows.remove(which);
        }
        let fewer = load(&fewer.text()).unwrap();
        for (from, to) in questions() {
            match (fewer.outbound(&from, to), more.outbound(&from, to)) {
                (Outbound::Deny, Outbound::Deny | Outbound::Mesh { .. }) => {}
                (Outbound::Mesh { peers: a }, Outbound::Mesh { peers: b }) => prop_assert_eq!(&a.0[0].0, &b.0[0].0),
                (Outbound::Bypass(a), Outbound::Bypass(b)) => prop_assert_eq!(&a.name, &b.name),
                (fewer, more) => prop_assert!(false, "{} {}: {:?} became {:?}", from, to, fewer, more),
            }
            for peer in IDS {
                let (before, after) = (fewer.inbound(&from, to.port()), more.inbound(&from, to.port()));
                prop_assert!(before.peers.admits(&id(peer)).is_none() || after.peers.admits(&id(peer)).is_some());
            }
        }
    }

    #[test]
    fn a_workload_or_address_that_no_rule_names_is_denied(rules in rules(), port in 1u16..) {
        let Ok(policy) = load(&rules.text()) else { return Ok(()) };
        let stranger = SpiffeId::parse("spiffe://elsewhere/a").unwrap();
        for (from, to) in questions() {
            prop_assert!(matches!(policy.outbound(&stranger, to), Outbound::Deny));
            prop_assert!(policy.inbound(&from, to.port()).peers.admits(&stranger).is_none());
            prop_assert!(matches!(policy.outbound(&from, SocketAddr::new([203, 0, 113, 1].into(), port)), Outbound::Deny));
        }
    }

    #[test]
    fn outbound_and_inbound_agree_about_an_allowed_pair(rules in rules()) {
        let Ok(policy) = load(&rules.text()) else { return Ok(()) };
        for (from, to) in questions() {
            if let Outbound::Mesh { peers } = policy.outbound(&from, to) {
                let Matcher::Exact(server) = &peers.0[0].0 else { panic!("a pattern") };
                let inbound = policy.inbound(server, to.port());
                prop_assert_eq!(inbound.peers.admits(&from).map(|rule| rule.number), Some(peers.0[0].1.number));
            }
        }
    }

    #[test]
    fn the_kernels_answer_about_a_process_is_the_agents_or_a_question(
        entries in proptest::collection::vec(
            (proptest::option::of(1u32..3), proptest::option::of(1u32..3), 0usize..4, 0usize..3), 1..7,
        ),
    ) {
        let mut text = String::from("trust_domain = \"td\"\n");
        for (number, (uid, gid, cgroup, path)) in entries.iter().enumerate() {
            let mut selectors = Vec::new();
            selectors.extend(uid.map(|uid| format!("\"unix:uid:{uid}\"")));
            selectors.extend(gid.map(|gid| format!("\"unix:gid:{gid}\"")));
            selectors.extend(["\"cgroup:/c\"", "\"cgroup:/c/d\"", "\"systemd:u.service\""].get(*cgroup).map(|s| (*s).to_owned()));
            selectors.extend(["\"unix:path:/x\"", "\"unix:path:/y\""].get(*path).map(|s| (*s).to_owned()));
            writeln!(text, "[[workload]]\nid = \"spiffe://td/{number}\"\nselectors = [{}]", selectors.join(", ")).unwrap();
        }
        let Ok(policy) = load(&text) else { return Ok(()) };
        for cgroup in ["/", "/c", "/c/d", "/c/d/e", "/cc", "/u.service", "/a.slice/u.service/x", "/c/u.service"] {
            for (uid, gid) in [(1, 1), (1, 2), (2, 1), (3, 3)] {
                let found = kernel_knows(&policy, cgroup, uid, gid);
                for path in ["/x", "/y", "/z"] {
                    let truth = identified(&policy, cgroup, uid, gid, path);
                    match found {
                        // No entry can match, whatever the executable is.
                        Known::Nobody => prop_assert_eq!(truth, Ok(None)),
                        Known::Workload(number) => prop_assert_eq!(truth, Ok(Some(number))),
                        Known::Ask => {}
                    }
                }
            }
        }
        // A cgroup that is not known yet matches the selectors that its parent matches, or the parent is open.
        for (cgroup, parent) in [("/c/d/e", "/c/d"), ("/c/d", "/c"), ("/c", "/"), ("/a.slice/u.service/x", "/a.slice/u.service"),
            ("/a.slice/u.service", "/a.slice"), ("/a.slice", "/"), ("/c/u.service", "/c"), ("/cc", "/")]
        {
            prop_assert!(
                policy.cgroup_open(parent) || policy.cgroup_set(cgroup) == policy.cgroup_set(parent),
                "{} below {}", cgroup, parent
            );
            prop_assert!(policy.cgroup_open(parent) || !policy.cgroup_open(cgroup), "{} is open below {}", cgroup, parent);
            // Ids for which a cgroup makes a difference from its parent are in `unseen`.
            for (uid, gid) in [(1, 1), (1, 2), (2, 1), (3, 3)] {
                let expected = policy.kernel().unseen.iter().any(|(of, with)| {
                    of.is_none_or(|wanted| wanted == uid) && with.is_none_or(|wanted| wanted == gid)
                });
                if !expected {
                    prop_assert_eq!(kernel_knows(&policy, cgroup, uid, gid), kernel_knows(&policy, parent, uid, gid));
                }
            }
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in any::<String>(), cut in 0usize..3000) {
        let _ = load(&text);
        // Half-written files: what is there up to some byte.
        let whole = format!("trust_domain = \"td\"\n{ENTRIES}{MESH}");
        let at = (0..=cut.min(whole.len())).rev().find(|at| whole.is_char_boundary(*at)).unwrap();
        let _ = load(&whole[..at]);
        let _ = load(&format!("{}{text}", &whole[..at]));
    }
}
