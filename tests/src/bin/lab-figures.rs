//! The figures of the data path, measured side by side in one run: plain TCP, nginx `stream` with mutual TLS on both
//! hosts, and Wimsey, each between two network namespaces of this machine.
//!
//! `lab-figures [--rounds N] [--seconds S] [--idle N] [--json FILE]`. The ways are interleaved, each figure is the median
//! of its rounds, and what counts is the ratio to plain TCP of the same run. `LAB_PLAIN=1` leaves Wimsey out.
//!
//! *Invariant:* all ways use the same server and client programs, the same link, TLS 1.3 and keys of the same kind.

use anyhow::{Context, bail};
use lab::janitor::processes;
use lab::policy::{PORT, id};
use lab::program::resident;
use lab::{Lab, Mint, Policy, Program, Settings, Skip, clock, skip};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;

/// Port of the server that the nginx on its host passes to.
const PLAIN: u16 = 7001;
/// Port on which that nginx takes TLS.
const TLS: u16 = 7443;
/// Ports on which the client's nginx listens: one makes a full handshake for every connection, one resumes.
const FULL: u16 = 7002;
const RESUMED: u16 = 7003;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-figures: {error:#}");
            ExitCode::from(1)
        }
    }
}

struct Options {
    rounds: usize,
    seconds: f64,
    idle: usize,
    json: Option<String>,
}

impl Options {
    fn read() -> anyhow::Result<Self> {
        let mut options = Self { rounds: 3, seconds: 3.0, idle: 2000, json: None };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let value = words.next().with_context(|| format!("{word} wants a value"))?;
            match word.as_str() {
                "--rounds" => options.rounds = value.parse()?,
                "--seconds" => options.seconds = value.parse()?,
                "--idle" => options.idle = value.parse()?,
                "--json" => options.json = Some(value),
                other => bail!("no option is called {other}; there are --rounds, --seconds, --idle and --json"),
            }
        }
        Ok(options)
    }
}

/// One way from the client to the server.
struct Way<'a> {
    name: &'static str,
    lab: &'a Lab,
    cgroup: &'static str,
    to: SocketAddr,
}

/// What is measured, the field of the answer that counts, and whether more is better.
const FIGURES: [(&str, &[&str], &str, bool); 7] = [
    ("one stream, MB/s", &["throughput"], "megabytes_per_second", true),
    ("64 B round trip, 1 connection, p50 us", &["round-trips", "--connections", "1"], "p50_us", false),
    ("64 B round trip, 1 connection, p99 us", &["round-trips", "--connections", "1"], "p99_us", false),
    ("64 B round trips, 16 connections, per s", &["round-trips", "--connections", "16"], "per_second", true),
    ("64 B round trip, 16 connections, p50 us", &["round-trips", "--connections", "16"], "p50_us", false),
    ("64 B round trip, 16 connections, p99 us", &["round-trips", "--connections", "16"], "p99_us", false),
    ("new connections, 8 at once, per s", &["connects", "--connections", "8"], "per_second", true),
];

fn run() -> anyhow::Result<()> {
    let options = Options::read()?;
    let skipped = |skip: Skip| anyhow::anyhow!("cannot measure here: {}", skip.0);
    skip::need("nginx").map_err(skipped)?;
    if skip::wimsey().is_ok_and(|path| path.components().any(|part| part.as_os_str() == "debug")) {
        eprintln!("lab-figures: warning: the agent is not a release build");
    }

    // Two labs: the agents and their programs in the kernel have nothing to do with the other ways.
    let bare = Lab::open_unwatched("figures-bare").map_err(skipped)?;
    let meshed = Lab::open_unwatched("figures-wimsey").map_err(skipped)?;
    let settings = Settings {
        engine: std::env::var("WIMSEY_ENGINE").unwrap_or_else(|_| "user".to_owned()),
        top: format!("cgroup = \"{}\"", meshed.cgroup_path()),
        ..Settings::default()
    };
    let mesh = meshed.mesh_with(&Policy::standard(&meshed), &settings).map_err(skipped)?;
    let engine = if mesh.protected() { mesh.alpha().status()["agent"]["engine"].clone() } else { Value::Null };
    let engine = engine.as_str().unwrap_or("none").to_owned();

    let _plain = bare.serve(&bare.beta, "server", &["echo", "--listen", &bare.beta.at(PLAIN).to_string()]);
    let _protected = meshed.serve(&meshed.beta, "server", &["echo", "--listen", &meshed.beta.at(PORT).to_string()]);
    let _nginx = nginx(&bare)?;
    let loopback = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let mut ways = vec![
        Way { name: "plain TCP", lab: &bare, cgroup: "client", to: bare.beta.at(PLAIN) },
        Way { name: "nginx", lab: &bare, cgroup: "client", to: loopback(FULL) },
        Way { name: "nginx, resumed", lab: &bare, cgroup: "client", to: loopback(RESUMED) },
        Way { name: "wimsey", lab: &meshed, cgroup: "client", to: meshed.beta.at(PORT) },
    ];
    if !mesh.protected() {
        ways.pop();
    }

    let size = |name: &str| match name {
        "wimsey" => mesh.alpha().resident(),
        _ => nginx_resident(&bare, "nginx-alpha"),
    };
    let at_rest: Vec<u64> = ways.iter().map(|way| size(way.name)).collect();
    let mut samples: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
    let mut order: Vec<&[&str]> = FIGURES.iter().map(|(_, words, ..)| *words).collect();
    order.dedup();
    for round in 0..options.rounds {
        for words in &order {
            for step in 0..ways.len() {
                // Another one begins each round.
                let way_number = (step + round) % ways.len();
                let way = &ways[way_number];
                eprintln!("round {} of {}: {}: {}", round + 1, options.rounds, way.name, words.join(" "));
                let answer = measure(way, words, options.seconds)?;
                for (number, (.., field, _)) in FIGURES.iter().enumerate().filter(|(_, figure)| figure.1 == *words) {
                    let value = answer[*field].as_f64().with_context(|| format!("no {field} in {answer}"))?;
                    samples.entry((number, way_number)).or_default().push(value);
                }
            }
        }
    }

    eprintln!("{} idle connections", options.idle);
    let mut memory = Vec::new();
    for (way, before) in ways.iter().zip(at_rest).filter(|(way, _)| matches!(way.name, "nginx" | "wimsey")) {
        let mut held = hold(way, options.idle)?;
        std::thread::sleep(std::time::Duration::from_secs(1));
        memory.push((way.name, before, size(way.name)));
        held.close_stdin();
        let _ = held.end(clock::seconds(20));
    }

    let table = report(&ways, &mut samples, &memory, &options, &engine);
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{table:#}\n")).with_context(|| format!("write {path}"))?;
    }
    Ok(())
}

fn measure(way: &Way<'_>, words: &[&str], seconds: f64) -> anyhow::Result<Value> {
    let (to, seconds) = (way.to.to_string(), seconds.to_string());
    let words = [&["lab-app"], words, &["--to", &to, "--seconds", &seconds]].concat();
    let program = way.lab.run(&way.lab.alpha, way.cgroup, &words);
    let outcome = program.wait(clock::seconds(120))?;
    anyhow::ensure!(outcome.status.success(), "{}: {}", way.name, outcome.stderr);
    Ok(serde_json::from_str(outcome.stdout.trim())?)
}

fn hold(way: &Way<'_>, number: usize) -> anyhow::Result<Program> {
    let mut place = way.lab.place(&way.lab.alpha, way.cgroup);
    place.files = Some(number as u64 + 1000);
    let app = skip::lab_app().map_err(|skip| anyhow::anyhow!(skip.0))?;
    let mut command = way.lab.command_in(place, app);
    command.args(["hold", "--to", &way.to.to_string(), "--connections", &number.to_string(), "--marker", "idle"]);
    let mut program = Program::start(command, "hold")?;
    program.line(clock::seconds(60), |line| line.contains("held"))?;
    Ok(program)
}

/// An nginx on each host: the client's takes plaintext on loopback and makes TLS of it, the server's the other way round.
fn nginx(lab: &Lab) -> anyhow::Result<(Program, Program)> {
    let (mint, authority, _) = Mint::found(lab::policy::DOMAIN, time::Duration::hours(-1), time::Duration::days(1))?;
    let directory = lab.directory().display();
    lab.file("authority.pem", authority);
    for name in ["client", "server"] {
        let svid = mint.svid(&id(name))?;
        lab.file(&format!("{name}.pem"), svid.certificate_pem);
        lab.file(&format!("{name}-key.pem"), svid.key_pem);
    }
    let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let module = if std::path::Path::new(module).exists() { format!("load_module {module};\n") } else { String::new() };
    let head = |name: &str| {
        format!(
            "{module}daemon off;\nuser root;\nworker_processes auto;\nworker_rlimit_nofile 20000;\n\
             pid {directory}/{name}.pid;\nerror_log stderr;\nevents {{ worker_connections 10000; }}\n"
        )
    };
    let (beta, plain) = (lab.beta.at(TLS), lab.beta.at(PLAIN));
    let server = format!(
        "{}stream {{ server {{ listen {beta} ssl backlog=4096; proxy_pass {plain}; tcp_nodelay on;\n\
         ssl_protocols TLSv1.3; ssl_certificate {directory}/server.pem; ssl_certificate_key {directory}/server-key.pem;\n\
         ssl_client_certificate {directory}/authority.pem; ssl_verify_client on; }} }}\n",
        head("server")
    );
    let one = |port: u16, reuse: &str| {
        format!(
            "server {{ listen 127.0.0.1:{port} backlog=4096; proxy_pass {beta}; tcp_nodelay on; proxy_ssl on;\n\
             proxy_ssl_protocols TLSv1.3; proxy_ssl_certificate {directory}/client.pem;\n\
             proxy_ssl_certificate_key {directory}/client-key.pem; proxy_ssl_session_reuse {reuse};\n\
             proxy_ssl_trusted_certificate {directory}/authority.pem; proxy_ssl_verify off; }}\n"
        )
    };
    let client = format!("{}stream {{ {}{} }}\n", head("client"), one(FULL, "off"), one(RESUMED, "on"));
    let start = |host, cgroup: &str, name: &str, text: String| {
        let config = lab.file(&format!("nginx-{name}.conf"), text).display().to_string();
        lab.run(host, cgroup, &["nginx", "-c", &config])
    };
    let server = start(&lab.beta, "nginx-beta", "server", server);
    let client = start(&lab.alpha, "nginx-alpha", "client", client);
    let there = clock::until(clock::seconds(20), || {
        lab.alpha.within(|| std::net::TcpStream::connect((std::net::Ipv4Addr::LOCALHOST, FULL)).ok())
    });
    anyhow::ensure!(there.is_some(), "nginx does not listen: {}{}", client.stderr(), server.stderr());
    Ok((server, client))
}

/// Resident memory of all processes of a cgroup.
fn nginx_resident(lab: &Lab, cgroup: &str) -> u64 {
    processes(&lab.cgroup(cgroup)).iter().map(|pid| resident(pid.as_raw_nonzero().get().unsigned_abs())).sum()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(
    ways: &[Way<'_>],
    samples: &mut BTreeMap<(usize, usize), Vec<f64>>,
    memory: &[(&str, u64, u64)],
    options: &Options,
    engine: &str,
) -> Value {
    let (kernel, processor, cores) = machine();
    println!("kernel {kernel}, {processor}, {cores} cores, engine {engine}");
    println!(
        "{} rounds of {} s each, interleaved; medians, and in brackets the ratio to plain TCP",
        options.rounds, options.seconds
    );
    print!("{:42}", "");
    for way in ways {
        print!("{:>24}", way.name);
    }
    println!();
    let mut rows = Vec::new();
    for (number, (title, .., more)) in FIGURES.iter().enumerate() {
        print!("{title:42}");
        let values: Vec<f64> =
            (0..ways.len()).map(|way| samples.get_mut(&(number, way)).map_or(f64::NAN, |list| median(list))).collect();
        for value in &values {
            let shown = format!("{value:.1} ({:.3})", value / values[0]);
            print!("{shown:>24}");
        }
        println!();
        let by_way: BTreeMap<&str, Value> = ways
            .iter()
            .zip(&values)
            .map(|(way, value)| (way.name, json!({ "value": value, "to_plain": value / values[0] })))
            .collect();
        rows.push(json!({ "figure": title, "more_is_better": more, "ways": by_way }));
    }
    let mut sizes = Vec::new();
    for (name, before, after) in memory {
        let each = after.saturating_sub(*before) / options.idle.max(1) as u64;
        println!(
            "RSS of {name} on the client's host: {} KiB at rest, {} KiB with {} idle connections ({each} B each)",
            before / 1024,
            after / 1024,
            options.idle
        );
        sizes.push(json!({ "of": name, "rest": before, "idle": after, "connections": options.idle }));
    }
    json!({
        "kernel": kernel, "processor": processor, "cores": cores, "engine": engine,
        "rounds": options.rounds, "seconds": options.seconds, "figures": rows, "resident_bytes": sizes,
    })
}

fn machine() -> (String, String, usize) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name").map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned())
        })
        .unwrap_or_else(|| "unknown processor".to_owned());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (read("/proc/sys/kernel/osrelease").trim().to_owned(), processor, cores)
}
