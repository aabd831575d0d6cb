//! The policy decision: once for each connection, and a few times for each process that is attested. Ten rules are a small
//! host, ten thousand a whole data centre in one directory.

use bunter::policy::{Accounts, Evidence, Policy, Source};
use bunter_identity::spiffe::SpiffeId;
use criterion::{Criterion, criterion_group, criterion_main};
use std::{fmt::Write, hint::black_box, net::SocketAddr, path::Path};

/// `count` workloads, each the only client of the next one.
fn text(count: usize) -> String {
    let mut text = String::from("trust_domain = \"example.org\"\n");
    for number in 0..count {
        let (id, next) = (format!("spiffe://example.org/w{number}"), (number + 1) % count);
        let (high, low) = (number / 250, number % 250 + 1);
        write!(
            text,
            "[[workload]]\nid = \"{id}\"\nselectors = [\"unix:uid:{uid}\", \"systemd:w{number}.service\"]\n\
             [[destination]]\naddress = \"10.0.{high}.{low}:80\"\nid = \"{id}\"\n\
             [[allow]]\nfrom = \"{id}\"\nto = \"spiffe://example.org/w{next}\"\nports = [80]\n",
            uid = 1000 + number % 100,
        )
        .expect("a string takes text");
    }
    text
}

fn load(text: &str) -> Policy {
    let source = Source { file: "bench.toml".into(), text: text.to_owned() };
    Policy::parse("bench", &[source], &Accounts::default()).expect("a valid policy")
}

struct Process {
    cgroup: String,
}

impl Evidence for Process {
    fn uid(&self) -> Option<u32> {
        Some(1005)
    }
    fn gid(&self) -> Option<u32> {
        Some(1005)
    }
    fn cgroup(&self) -> Option<&str> {
        Some(&self.cgroup)
    }
    fn path(&self) -> Option<&Path> {
        Some(Path::new("/usr/bin/w"))
    }
    fn sha256(&self) -> Option<[u8; 32]> {
        None
    }
}

fn decisions(criterion: &mut Criterion) {
    for count in [10, 10_000] {
        let text = text(count);
        let policy = load(&text);
        let client = SpiffeId::parse("spiffe://example.org/w5").expect("a valid ID");
        let server = SpiffeId::parse("spiffe://example.org/w6").expect("a valid ID");
        let allowed: SocketAddr = "10.0.0.7:80".parse().expect("an address");
        let denied: SocketAddr = "10.0.0.8:80".parse().expect("an address");
        let process = Process { cgroup: "/system.slice/w5.service".into() };

        let name = |what: &str| format!("policy/{count} rules/{what}");
        criterion.bench_function(&name("outbound, allowed"), |bencher| {
            bencher.iter(|| policy.outbound(black_box(&client), black_box(allowed)));
        });
        criterion.bench_function(&name("outbound, denied"), |bencher| {
            bencher.iter(|| policy.outbound(black_box(&client), black_box(denied)));
        });
        criterion.bench_function(&name("inbound"), |bencher| {
            bencher.iter(|| policy.inbound(black_box(&server), black_box(80)).peers.admits(&client).is_some());
        });
        criterion.bench_function(&name("identify a process"), |bencher| {
            bencher.iter(|| policy.identify(black_box(&process)).map(|workload| workload.map(|found| found.number)));
        });
        criterion.bench_function(&name("class of a cgroup"), |bencher| {
            bencher.iter(|| policy.cgroup_set(black_box("/system.slice/w5.service")));
        });
    }
    let text = text(1000);
    criterion.bench_function("policy/1000 rules/read and check", |bencher| bencher.iter(|| load(black_box(&text))));
}

criterion_group! { name = benches; config = bunter_benches::quick(); targets = decisions }
criterion_main!(benches);
