use super::*;
use std::path::PathBuf;

mod properties;
mod rows;

const PASSWD: &str = "root:x:0:0::/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\ncurl:x:1000:1000::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\n";

fn load(text: &str) -> Result<Policy, Rejected> {
    let source = Source { file: "p.toml".into(), text: text.into() };
    Policy::parse("policies", &[source], &Accounts::from_text(PASSWD, GROUP))
}

/// The first line is `trust_domain`, so the text given begins at line 2.
fn policy(text: &str) -> Policy {
    load(&format!("trust_domain = \"td\"\n{text}")).unwrap_or_else(|error| panic!("{error}"))
}

fn refusal(text: &str) -> String {
    load(&format!("trust_domain = \"td\"\n{text}")).map_or_else(|error| error.to_string(), |_| "accepted".into())
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap()
}

fn outbound(policy: &Policy, from: &str, to: &str) -> String {
    match policy.outbound(&id(from), to.parse().unwrap()) {
        Outbound::Mesh { peers } => {
            let (Matcher::Exact(expected), rule) = &peers.0[0] else { panic!("not one exact ID: {peers:?}") };
            assert_eq!(peers.0.len(), 1);
            format!("mesh {expected} by {}", rule.name)
        }
        Outbound::Bypass(rule) => format!("bypass by {}", rule.name),
        Outbound::Deny => "deny".into(),
    }
}

#[derive(Default, Clone, Debug)]
struct Process {
    uid: Option<u32>,
    gid: Option<u32>,
    cgroup: Option<String>,
    path: Option<PathBuf>,
    sha256: Option<[u8; 32]>,
}

impl Evidence for Process {
    fn uid(&self) -> Option<u32> {
        self.uid
    }
    fn gid(&self) -> Option<u32> {
        self.gid
    }
    fn cgroup(&self) -> Option<&str> {
        self.cgroup.as_deref()
    }
    fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
    fn sha256(&self) -> Option<[u8; 32]> {
        self.sha256
    }
}

fn process(uid: u32, cgroup: &str, path: &str) -> Process {
    Process {
        uid: Some(uid),
        gid: Some(uid),
        cgroup: Some(cgroup.into()),
        path: Some(path.into()),
        sha256: Some([7; 32]),
    }
}

fn who(policy: &Policy, process: &Process) -> String {
    match policy.identify(process) {
        Ok(Some(workload)) => workload.id.path().into(),
        Ok(None) => "nobody".into(),
        Err(error) => format!("{} or {}", error.first.path(), error.second.path()),
    }
}

const ENTRIES: &str = r#"
    [[workload]]
    id = "spiffe://td/any"
    selectors = ["unix:user:curl"]
    [[workload]]
    id = "spiffe://td/curl"
    selectors = ["unix:uid:1000", "unix:path:/usr/bin/curl"]
    [[workload]]
    id = "spiffe://td/unit"
    selectors = ["systemd:web.service", "unix:uid:33"]
    [[workload]]
    id = "spiffe://td/lab"
    selectors = ["cgroup:/bunter/lab"]
    [[workload]]
    id = "spiffe://td/hashed"
    selectors = ["unix:gid:5", "unix:sha256:0707070707070707070707070707070707070707070707070707070707070707"]
"#;

#[test]
fn the_entry_with_the_most_selectors_wins_and_a_tie_is_ambiguous() {
    let policy = policy(ENTRIES);
    for (uid, cgroup, path, expected) in [
        (1000, "/", "/usr/bin/wget", "/any"),
        (1000, "/", "/usr/bin/curl", "/curl"),
        (1000, "/bunter/lab", "/usr/bin/curl", "/curl"),
        (1000, "/bunter/lab/x", "/usr/bin/wget", "/any or /lab"),
        (1001, "/bunter/lab", "/usr/bin/curl", "/lab"),
        (1001, "/bunter/labs", "/usr/bin/curl", "nobody"),
        (33, "/system.slice/web.service", "/x", "/unit"),
        (33, "/system.slice/web.service/child", "/x", "/unit"),
        (33, "/system.slice/other.service", "/x", "nobody"),
        (5, "/", "/x", "/hashed"),
        (0, "/", "/x", "nobody"),
    ] {
        assert_eq!(who(&policy, &process(uid, cgroup, path)), expected, "{uid} {cgroup} {path}");
    }
}

#[test]
fn a_process_of_which_nothing_is_known_is_nobody() {
    assert_eq!(who(&policy(ENTRIES), &Process::default()), "nobody");
}

#[test]
fn two_ways_to_the_same_identity_are_not_ambiguous() {
    let policy = policy(
        "[[workload]]\nid = \"spiffe://td/a\"\nselectors = [\"unix:uid:1\"]\n\
         [[workload]]\nid = \"spiffe://td/a\"\nselectors = [\"unix:gid:1\"]\n",
    );
    assert_eq!(who(&policy, &process(1, "/", "/x")), "/a");
}

const MESH: &str = r#"
    [[destination]]
    address = "10.0.0.0/24:*"
    id = "spiffe://td/net"
    [[destination]]
    address = "10.0.0.2:80"
    id = "spiffe://td/web"
    [[destination]]
    address = "[fd00::2]:80"
    id = "spiffe://td/web"
    [[allow]]
    name = "to-web"
    from = "spiffe://td/curl"
    to = "spiffe://td/web"
    idle_timeout = "1h"
    [[allow]]
    name = "to-net"
    from = { pattern = "spiffe://td/ns/*" }
    to = "spiffe://td/net"
    ports = [443, 80]
    [[bypass]]
    name = "dns"
    from = "spiffe://td/curl"
    address = "10.0.0.53:53"
    [[bypass]]
    name = "outside"
    from = { pattern = "spiffe://td/**" }
    address = "192.0.2.0/24:*"
    [[bypass]]
    name = "narrow"
    from = "spiffe://td/other"
    address = "192.0.2.1:25"
"#;

#[test]
fn the_longest_prefix_and_the_exact_port_decide_who_must_answer() {
    let policy = policy(MESH);
    for (from, to, expected) in [
        ("curl", "10.0.0.2:80", "mesh spiffe://td/web by to-web"),
        ("curl", "[::ffff:10.0.0.2]:80", "mesh spiffe://td/web by to-web"),
        ("curl", "[fd00::2]:80", "mesh spiffe://td/web by to-web"),
        ("curl", "10.0.0.2:81", "deny"),
        ("curl", "10.0.0.3:80", "deny"),
        ("ns/a", "10.0.0.3:80", "mesh spiffe://td/net by to-net"),
        ("ns/a", "10.0.0.3:443", "mesh spiffe://td/net by to-net"),
        ("ns/a", "10.0.0.3:444", "deny"),
        ("ns/a/b", "10.0.0.3:443", "deny"),
        ("ns/a", "10.0.0.2:80", "deny"),
        ("curl", "10.0.1.2:80", "deny"),
        ("stranger", "10.0.0.2:80", "deny"),
    ] {
        assert_eq!(outbound(&policy, from, to), expected, "{from} {to}");
    }
    assert!(policy.is_mesh("10.0.0.9:9".parse().unwrap()) && !policy.is_mesh("10.0.0.53:53".parse().unwrap()));
    assert_eq!(policy.expected("10.0.0.2:80".parse().unwrap()), Some(&id("web")));
    assert!(policy.destinations() >= 6 && policy.destinations() == policy.kernel().destinations.len());
}

#[test]
fn a_bypass_is_for_whom_it_names_and_a_narrower_one_of_others_does_not_hide_it() {
    let policy = policy(MESH);
    for (from, to, expected) in [
        ("curl", "10.0.0.53:53", "bypass by dns"),
        ("ns/a", "10.0.0.53:53", "deny"),
        ("curl", "192.0.2.9:1", "bypass by outside"),
        ("curl", "192.0.2.1:25", "bypass by outside"),
        ("other", "192.0.2.1:25", "bypass by outside"),
        ("curl", "192.0.3.1:25", "deny"),
    ] {
        assert_eq!(outbound(&policy, from, to), expected, "{from} {to}");
    }
}

#[test]
fn a_wide_bypass_does_not_reach_through_a_mesh_destination() {
    let policy = policy(
        "[[bypass]]\nname = \"wide\"\nfrom = \"spiffe://td/a\"\naddress = \"10.0.0.0/8:*\"\n\
         [[destination]]\naddress = \"10.0.0.0/24:*\"\nid = \"spiffe://td/net\"\n\
         [[bypass]]\nname = \"hole\"\nfrom = \"spiffe://td/b\"\naddress = \"10.0.0.53:53\"\n",
    );
    assert_eq!(outbound(&policy, "a", "10.1.0.1:1"), "bypass by wide");
    assert_eq!(outbound(&policy, "a", "10.0.0.1:1"), "deny");
    assert_eq!(outbound(&policy, "a", "10.0.0.53:53"), "deny");
    assert_eq!(outbound(&policy, "b", "10.0.0.53:53"), "bypass by hole");
    assert!(policy.warnings().to_string().contains(
        "p.toml:9: 10.0.0.53:53 is a hole in the mesh destination 10.0.0.0/24:*: \
         programs without an identity reach it too; keep it only if nothing there can speak mutual TLS"
    ));
}

#[test]
fn inbound_peers_are_those_of_the_rules_for_the_port() {
    let policy = policy(
        "[[allow]]\nname = \"a\"\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/web\"\nports = [80]\n\
         [[allow]]\nname = \"b\"\nfrom = { pattern = \"spiffe://other/ns/**\" }\nto = { pattern = \"spiffe://td/*\" }\n\
         [[inbound]]\nname = \"moving\"\nid = \"spiffe://td/web\"\nports = [8080]\nmode = \"permissive\"\n\
         [[inbound]]\nid = \"spiffe://td/web\"\nports = [80]\nlisten = [\"0.0.0.0:80\", \"[::]:80\"]\n",
    );
    let admitted = |port: u16, peer: &str| {
        let inbound = policy.inbound(&id("web"), port);
        inbound.peers.admits(&SpiffeId::parse(peer).unwrap()).map(|rule| rule.name.to_string())
    };
    assert_eq!(admitted(80, "spiffe://td/a").as_deref(), Some("a"));
    assert_eq!(admitted(81, "spiffe://td/a"), None);
    assert_eq!(admitted(81, "spiffe://other/ns/x/y").as_deref(), Some("b"));
    assert_eq!(admitted(81, "spiffe://td/ns/x"), None);
    assert_eq!(
        policy.inbound(&id("web"), 8080).permissive.map(|rule| rule.name.to_string()).as_deref(),
        Some("moving")
    );
    assert!(policy.inbound(&id("web"), 80).permissive.is_none());
    assert!(policy.inbound(&id("deep/er"), 80).is_closed());
    assert_eq!(policy.kernel().protected, [("0.0.0.0".parse().unwrap(), 80), ("::".parse().unwrap(), 80)]);
    let domains: Vec<_> = policy.trust_domains().iter().map(TrustDomain::to_string).collect();
    assert_eq!(domains, ["other", "td"]);
}

#[test]
fn udp_to_a_mesh_destination_needs_a_rule_of_its_own() {
    let policy = policy(&format!(
        "{MESH}\n[[udp]]\nname = \"quic\"\nfrom = \"spiffe://td/curl\"\naddress = \"10.0.0.0/25:443\"\n"
    ));
    let udp = |from: &str, to: &str| policy.udp(&id(from), to.parse().unwrap()).map(|rule| rule.name.to_string());
    assert_eq!(udp("curl", "10.0.0.9:443").as_deref(), Some("quic"));
    assert_eq!(udp("curl", "10.0.0.200:443"), None);
    assert_eq!(udp("curl", "10.0.0.9:444"), None);
    assert_eq!(udp("ns/a", "10.0.0.9:443"), None);
    assert_eq!(outbound(&policy, "ns/a", "10.0.0.9:443"), "mesh spiffe://td/net by to-net");
}

#[test]
fn a_policy_that_says_nothing_allows_nothing() {
    let policy = policy("");
    assert_eq!(outbound(&policy, "a", "10.0.0.2:80"), "deny");
    assert!(policy.inbound(&id("a"), 80).is_closed());
    let kernel = policy.kernel();
    assert!(kernel.destinations.is_empty() && kernel.verdicts.is_empty() && !kernel.cgroup_classes);
    assert_eq!(policy.preexisting(), Preexisting::Keep);
}

#[test]
fn numbers_lead_back_to_rules_and_workloads() {
    let policy = policy(&format!("{ENTRIES}{MESH}"));
    for (at, name) in ["to-web", "to-net", "dns", "outside", "narrow"].iter().enumerate() {
        assert_eq!(&*policy.rule(u32::try_from(at + 1).unwrap()).unwrap().name, *name);
    }
    assert!(policy.rule(0).is_none() && policy.rule(6).is_none());
    assert_eq!(policy.rule(1).unwrap().idle_timeout, Some(Duration::from_secs(3600)));
    let workload = policy.workload(2).unwrap();
    assert_eq!(workload.id, id("curl"));
    assert_eq!(policy.selectors(workload), ["unix:uid:1000", "unix:path:/usr/bin/curl"]);
    assert!(policy.workload(0).is_none() && policy.workload(6).is_none());
}

#[test]
fn a_link_local_address_is_no_destination() {
    let text = |address: &str| format!("[[destination]]\naddress = \"{address}\"\nid = \"spiffe://td/web\"\n");
    assert_eq!(
        refusal(&text("[fe80::2]:80")),
        "p.toml:2: address [fe80::2]:80 is another host's on each link, and programs say which to nobody else; \
         write an address of that host that is not link-local"
    );
    assert!(refusal(&text("[fe80::/10]:80")).contains("on each link"));
    policy(&text("[fd00::2]:80"));
}

#[test]
fn every_problem_of_every_file_is_told_at_once() {
    let sources = [
        Source { file: "a.toml".into(), text: "trust_domain = \"td\"\n[[alow]]\nx = 1\n".into() },
        Source {
            file: "b.toml".into(),
            text: "trust_domain = \"td2\"\n[[allow]]\nfrom = \"spiffe://td/a\"\nport = 1\n".into(),
        },
        Source { file: "c.toml".into(), text: "[[allow]]\nfrom = ".into() },
    ];
    let error = Policy::parse("policies", &sources, &Accounts::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a.toml:2: unknown key `alow` in the file; write `allow`\n\
         b.toml:1: `trust_domain` is not what a.toml:1 says; write the same, or remove one\n\
         b.toml:2: [[allow]] has no `to`; write to = \"spiffe://example.org/web\"\n\
         b.toml:4: unknown key `port` in [[allow]]; write `ports`\n\
         c.toml:2: not valid TOML: string values must be quoted, expected literal string; the file ends too early: write the rest of it"
    );
}

#[test]
fn each_mistake_gets_one_line_that_says_what_to_write() {
    for (text, expected) in [
        (
            "preexisting = \"drain\"",
            "p.toml:2: `preexisting` cannot be `drain`; write \"keep\", \"kill\" or \"drain 10m\"",
        ),
        (
            "preexisting = \"drain 10\"",
            "p.toml:2: `preexisting`: the number 10 has no unit: write \"10s\" for seconds (units are ms, s, m, h and d); \
             write preexisting = \"drain 10m\"",
        ),
        (
            "[[workload]]\nid = \"spiffe://td/a\"\n",
            "p.toml:2: [[workload]] has no `selectors`; write selectors = [\"systemd:nginx.service\"]",
        ),
        (
            "[[workload]]\nid = \"spiffe://other/a\"\nselectors = [\"unix:uid:1\"]",
            "p.toml:2: workload spiffe://other/a is not in trust domain td; write spiffe://td/a: other trust domains issue \
             their own identities",
        ),
        (
            "[[workload]]\nid = \"spiffe://td/a\"\nselectors = [\"unix:path:/bin/a\"]",
            "p.toml:2: workload spiffe://td/a has no selector that the kernel can see; \
             add a user, group, cgroup or unit, such as \"systemd:nginx.service\"",
        ),
        (
            "[[workload]]\nid = \"spiffe://td/a\"\nselectors = [\"unix:user:root\", \"unix:path:/bin/a\"]",
            "p.toml:2: every process of root could be workload spiffe://td/a; \
             add a cgroup or unit, such as \"systemd:nginx.service\", or run it as a user of its own",
        ),
        (
            "[[workload]]\nid = \"spiffe://td/a\"\nselectors = [\"unix:uid:1000\",\n\"unix:user:curl\"]",
            "p.toml:5: selector unix:uid:1000 is there twice; write it once",
        ),
        (
            "[[workload]]\nid = \"spiffe://td/a\"\nselectors = [\"unix:uid:1\", \"unix:uid:2\"]",
            "p.toml:4: no process can be both unix:uid:1 and unix:uid:2; write one of them, or two [[workload]] entries",
        ),
        (
            "[[workload]]\nid = \"spiffe://td/a\"\nselectors = [\"cgroup:/a/b\", \"cgroup:/a\"]",
            "p.toml:4: cgroup:/a always holds where cgroup:/a/b does; write cgroup:/a/b alone",
        ),
        (
            "[[workload]]\nid = \"spiffe://td/a\"\nselectors = [\"unix:uid:1\"]\n\
             [[workload]]\nid = \"spiffe://td/b\"\nselectors = [\"unix:uid:1\"]",
            "p.toml:5: workload spiffe://td/b has the same selectors as the entry at p.toml:2; \
             add a selector that tells them apart, or remove one entry",
        ),
        (
            "[[destination]]\naddress = \"10.0.0.2:80\"\nid = \"spiffe://td/a\"\n\
             [[destination]]\naddress = \"10.0.0.2/32:80\"\nid = \"spiffe://td/b\"",
            "p.toml:5: address 10.0.0.2:80 is a destination twice, first at p.toml:2; remove one, or write a narrower address",
        ),
        (
            "[[destination]]\naddress = \"10.0.0.2:80\"\nid = \"spiffe://td/a\"\n\
             [[bypass]]\nname = \"b\"\nfrom = \"spiffe://td/a\"\naddress = \"10.0.0.2:80\"",
            "p.toml:5: bypass `b` has the address of the mesh destination at p.toml:2; \
             remove one: an address is reached by mutual TLS or in plaintext",
        ),
        (
            "[[destination]]\naddress = \"10.0.0.0/24:80\"\nid = \"spiffe://td/a\"\n\
             [[destination]]\naddress = \"10.0.0.2:*\"\nid = \"spiffe://td/b\"",
            "p.toml:2: 10.0.0.0/24:80 and 10.0.0.2:* (at p.toml:5) overlap, and neither is part of the other; \
             write an entry for 10.0.0.2:80, which then decides",
        ),
        (
            "[[allow]]\nname = \"a\"\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\n\
             [[allow]]\nname = \"b\"\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\nports = [80]",
            "p.toml:6: rule `b` overlaps rule `a` at p.toml:2: same from and to; write ports that differ, or remove one rule",
        ),
        (
            "[[allow]]\nname = \"a\"\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\n\
             [[allow]]\nname = \"a\"\nfrom = \"spiffe://td/c\"\nto = \"spiffe://td/b\"",
            "p.toml:6: the name `a` is taken by the rule at p.toml:2; write another name",
        ),
        (
            "[[allow]]\nfrom = \"spiffe://td/ns/*\"\nto = \"spiffe://td/b\"",
            "p.toml:3: SPIFFE ID `spiffe://td/ns/*`: `*` at character 16 cannot be in a path: only letters, digits, `.`, `-`, \
             `_` and `/` can (R8); write { pattern = \"...\" } where a rule may mean many IDs, or one ID",
        ),
        (
            "[[allow]]\nfrom = { pattern = \"spiffe://td/a\" }\nto = \"spiffe://td/b\"",
            "p.toml:3: pattern `spiffe://td/a`: the pattern has no wildcard: write the ID itself, without `pattern`; \
             write { pattern = \"spiffe://example.org/ns/*\" } for one segment, or `/**` at the end for more",
        ),
        (
            "[[allow]]\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\nports = [80, 80]",
            "p.toml:5: port 80 is there twice; write it once",
        ),
        (
            "[[allow]]\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\nports = []",
            "p.toml:5: `ports` is empty; write the ports, or remove it for all ports",
        ),
        (
            "[[allow]]\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\nports = [\"80\"]",
            "p.toml:5: `ports` must be a whole number, and this is a text; \
             write a whole number from 1 to 65535, without quotes",
        ),
        (
            "[[allow]]\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\nidle_timeout = 5",
            "p.toml:5: `idle_timeout` must be a text, and this is a whole number; \
             put it in double quotes, with its unit if it has one",
        ),
        (
            "[[allow]]\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\nidle_timeout = \"5 min\"",
            "p.toml:5: `idle_timeout`: ` min` is not a unit of time: write ms, s, m, h or d, such as \"30s\"; \
             write idle_timeout = \"1h\"",
        ),
        (
            "[[bypass]]\nfrom = \"spiffe://td/a\"\naddress = \"10.0.0.2:80\"",
            "p.toml:2: [[bypass]] has no `name`; write name = \"...\", so that every plaintext packet has a named reason",
        ),
        (
            "[[bypass]]\nname = \"b\"\nfrom = \"spiffe://other/a\"\naddress = \"10.0.0.2:80\"",
            "p.toml:2: `from` is spiffe://other/a, and no process here can be outside trust domain td; \
             write an ID of spiffe://td",
        ),
        (
            "[[udp]]\nname = \"u\"\nfrom = \"spiffe://td/a\"\naddress = \"10.0.0.2:80\"",
            "p.toml:2: [[udp]] `u`: 10.0.0.2:80 is no mesh destination, and other UDP is left alone; \
             remove it, or write the address of a [[destination]]",
        ),
        (
            "[[inbound]]\nid = \"spiffe://td/a\"\nmode = \"permisive\"",
            "p.toml:4: `mode` cannot be `permisive`; write \"strict\" or \"permissive\"",
        ),
        (
            "[[inbound]]\nid = \"spiffe://td/a\"\nports = [80]\nlisten = [\"0.0.0.0:81\"]",
            "p.toml:5: `listen` has port 81, and `ports` has not; write it in both, or leave `ports` out",
        ),
        (
            "[[inbound]]\nid = \"spiffe://td/a\"\n[[inbound]]\nid = \"spiffe://td/a\"\nports = [80]",
            "p.toml:4: [[inbound]] of spiffe://td/a overlaps the one at p.toml:2; write ports that differ, or remove one",
        ),
        (
            "[[expect]]\nfrom = \"spiffe://td/a\"\nto = \"10.0.0.2:80\"\ndecision = \"denied\"",
            "p.toml:5: `decision` cannot be `denied`; write \"allow\", \"deny\" or \"bypass\"",
        ),
        (
            "[[expect]]\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/b\"\ndecision = \"deny\"",
            "p.toml:2: [[expect]] has no `port`; write port = 80, the port that the client dials",
        ),
    ] {
        assert_eq!(refusal(text), expected, "{text}");
    }
}

#[test]
fn the_surprising_overlap_is_settled_by_an_entry_for_it() {
    let policy = policy(
        "[[destination]]\naddress = \"10.0.0.0/24:80\"\nid = \"spiffe://td/a\"\n\
         [[destination]]\naddress = \"10.0.0.2:*\"\nid = \"spiffe://td/b\"\n\
         [[destination]]\naddress = \"10.0.0.2:80\"\nid = \"spiffe://td/b\"\n",
    );
    assert_eq!(policy.expected("10.0.0.2:80".parse().unwrap()), Some(&id("b")));
    assert_eq!(policy.expected("10.0.0.3:80".parse().unwrap()), Some(&id("a")));
}

#[test]
fn a_rule_for_a_port_does_not_change_who_must_answer_inside_its_network() {
    let policy = policy(
        "[[destination]]\naddress = \"10.0.0.0/24:*\"\nid = \"spiffe://td/net\"\n\
         [[destination]]\naddress = \"10.0.0.2:*\"\nid = \"spiffe://td/web\"\n\
         [[bypass]]\nname = \"hole\"\nfrom = \"spiffe://td/a\"\naddress = \"10.0.0.3:*\"\n\
         [[allow]]\nname = \"to-net\"\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/net\"\nports = [80]\n",
    );
    assert_eq!(outbound(&policy, "a", "10.0.0.1:80"), "mesh spiffe://td/net by to-net");
    assert_eq!(policy.expected("10.0.0.2:80".parse().unwrap()), Some(&id("web")));
    assert_eq!(outbound(&policy, "a", "10.0.0.2:80"), "deny");
    assert_eq!(outbound(&policy, "a", "10.0.0.3:80"), "bypass by hole");
}

#[test]
fn a_policy_must_say_its_trust_domain() {
    assert_eq!(
        load("preexisting = \"kill\"\n").unwrap_err().to_string(),
        "policies: no file says trust_domain; write trust_domain = \"example.org\" at the top of one"
    );
}

#[test]
fn rules_about_nobody_are_warnings_with_a_suggestion() {
    let policy = policy(
        "[[workload]]\nid = \"spiffe://td/redis\"\nselectors = [\"unix:uid:1\"]\n\
         [[bypass]]\nname = \"b\"\nfrom = \"spiffe://td/rediss\"\naddress = \"192.0.2.1:1\"\n\
         [[allow]]\nname = \"far\"\nfrom = \"spiffe://td/elsewhere/x\"\nto = \"spiffe://td/elsewhere/y\"\n\
         [[allow]]\nname = \"near\"\nfrom = \"spiffe://td/elsewhere/x\"\nto = \"spiffe://td/redis\"\n\
         [[inbound]]\nid = \"spiffe://td/elsewhere/y\"\n",
    );
    assert_eq!(
        policy.warnings().to_string(),
        "p.toml:5: rule `b` is about no workload of this policy: spiffe://td/rediss; \
         write spiffe://td/redis, or leave it if it is for another host\n\
         p.toml:9: rule `far` is about no workload of this policy: spiffe://td/elsewhere/x to spiffe://td/elsewhere/y; \
         register a [[workload]], or leave it if it is for another host\n\
         p.toml:17: [[inbound]] is about no workload of this policy: spiffe://td/elsewhere/y; \
         register a [[workload]], or leave it if it is for another host"
    );
}

#[test]
fn expectations_say_which_case_failed_and_what_the_policy_says() {
    let policy = policy(&format!(
        r#"{MESH}
        [[udp]]
        name = "quic"
        from = "spiffe://td/curl"
        address = "10.0.0.2:80"
        [[inbound]]
        name = "moving"
        id = "spiffe://td/web"
        mode = "permissive"
        [[expect]]
        from = "spiffe://td/curl"
        to = "10.0.0.2:80"
        decision = "allow"
        rule = "to-web"
        [[expect]]
        from = "spiffe://td/curl"
        to = "10.0.0.53:53"
        decision = "bypass"
        [[expect]]
        from = "spiffe://td/curl"
        to = "10.0.0.2:80"
        protocol = "udp"
        decision = "allow"
        [[expect]]
        from = "spiffe://td/curl"
        to = "spiffe://td/web"
        port = 80
        decision = "allow"
        rule = "another"
        [[expect]]
        from = "plaintext"
        to = "spiffe://td/web"
        port = 80
        decision = "deny"
        "#
    ));
    let results = policy.run_expectations();
    assert_eq!(results.iter().map(|result| result.passed).collect::<Vec<_>>(), [true, true, true, false, false]);
    assert_eq!(results[0].to_string(), "p.toml:43: spiffe://td/curl to 10.0.0.2:80: allow by to-web");
    assert_eq!(
        results[3].to_string(),
        "p.toml:57: spiffe://td/curl to spiffe://td/web port 80: expected allow by another, but the policy says allow by to-web"
    );
    assert_eq!(
        results[4].to_string(),
        "p.toml:63: plaintext to spiffe://td/web port 80: expected deny, but the policy says allow by moving"
    );
}

#[test]
fn the_decision_table_is_for_people() {
    let policy = policy(&format!(
        "{ENTRIES}{MESH}[[inbound]]\nname = \"moving\"\nid = \"spiffe://td/curl\"\nports = [80, 81]\nmode = \"permissive\"\n\
         [[allow]]\nname = \"in\"\nfrom = {{ pattern = \"spiffe://td/**\" }}\nto = \"spiffe://td/unit\"\nports = [443]\n"
    ));
    let table = policy.decision_table();
    assert_eq!(
        table.lines().next(),
        Some("FROM                            TO                              DECISION  RULE")
    );
    for line in [
        "spiffe://td/curl                10.0.0.2:80 (spiffe://td/web)   allow     to-web",
        "spiffe://td/curl                10.0.0.53:53                    bypass    dns",
        "{ pattern = \"spiffe://td/**\" }  spiffe://td/unit port 443       allow     in",
        "plaintext                       spiffe://td/curl port 80, 81    allow     moving",
        "everything else of these workloads: deny",
    ] {
        assert!(table.lines().any(|found| found == line), "{line}\n{table}");
    }
}
