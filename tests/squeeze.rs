//! The whole machine's memory for TCP runs out. A test program of its own, since it takes from everything else on the
//! machine what that needs: it runs in guests only, and alone there.

use lab::policy::PORT;
use lab::world::{events, pick};
use lab::{Lab, Policy, Settings, clock, lab, or_skip, skip};
use std::time::Duration;

const LIMITS: &str = "/proc/sys/net/ipv4/tcp_mem";
/// Pages: a megabyte and a half for all sockets of the machine.
const SQUEEZED: &str = "300 400 400";

/// Little memory until it is dropped.
struct Squeeze {
    before: String,
}

impl Squeeze {
    fn begin() -> Self {
        let before = std::fs::read_to_string(LIMITS).unwrap();
        std::fs::write(LIMITS, SQUEEZED).unwrap();
        Self { before }
    }
}

impl Drop for Squeeze {
    fn drop(&mut self) {
        std::fs::write(LIMITS, &self.before).unwrap();
    }
}

/// How often a host's sockets were told that memory is short.
fn pressures(lab: &Lab) -> u64 {
    let of = |host: &lab::Host| host.within(|| std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap());
    [&lab.alpha, &lab.beta].map(of).iter().map(|text| counter(text, "TCPMemoryPressures")).sum()
}

/// A counter of `/proc/net/netstat`, whose lines come in pairs: names, then values.
fn counter(text: &str, name: &str) -> u64 {
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
    let found = lines.as_chunks().0.iter().find_map(|[names, values]| {
        let at = names.iter().position(|word| *word == name)?;
        values.get(at)?.parse().ok()
    });
    found.unwrap_or_else(|| panic!("no counter {name}"))
}

#[test]
fn when_the_memory_for_tcp_runs_out_no_byte_is_wrong_and_nothing_hangs() {
    let lab = lab!();
    or_skip!(skip::need_guest());
    lab.capture_heads();
    let settings = Settings { tables: "[timeouts]\nstall = \"5s\"\n".into(), ..Settings::default() };
    let mesh = or_skip!(lab.mesh_with(&Policy::standard(&lab), &settings));
    let both = format!("both:{}", clock::bulk(64 << 20));
    let steps = [both.as_str(), "half-close", "to-end"];
    let server = lab.serve_script(&lab.beta, "server", &steps);
    let before = pressures(&lab);
    let squeeze = Squeeze::begin();
    let clients: Vec<_> = (0..4).map(|_| lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &steps)).collect();
    // Long enough for the agents to see that the kernel is stuck, not so long that TCP itself backs off for minutes.
    std::thread::sleep(Duration::from_secs(20));
    let felt = pressures(&lab) - before;
    drop(squeeze);
    assert!(felt > 0, "memory was never short: this shows nothing");
    // Whole, or ended by a reset: never in between.
    for client in clients {
        let outcome = client.wait(clock::seconds(60)).expect("it ends");
        let said = events(&outcome.stdout);
        let end = pick(&said, "both");
        if end["ok"] == true {
            assert_eq!(end["sha256"], end["sent"], "both sides send the same: {end}");
        } else {
            assert!(matches!(end["error"].as_str(), Some("ECONNRESET" | "EPIPE")), "{end}");
        }
    }
    if mesh.protected() {
        for agent in [mesh.alpha(), mesh.beta()] {
            let closed = clock::until(clock::seconds(10), || agent.connections().is_empty().then_some(()));
            assert!(closed.is_some(), "connections stay open: {:#?}", agent.connections());
        }
        for record in mesh.alpha().records_for(PORT) {
            println!("squeezed: {} after {} bytes", record["code"], record["bytes"]["sent"]);
        }
    }
    drop(server);
    // With memory again, all is as before.
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_marker(&lab.wire());
}
