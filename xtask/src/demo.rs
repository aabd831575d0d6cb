//! The verb `demo`: the main job on one screen, with real programs.
//!
//! Two hosts are network namespaces, joined by a wire that is captured, each with an agent of its own. nginx, curl, redis
//! and redis-cli are Debian's, and know nothing of TLS here. Each claim on the screen is checked; one that does not hold
//! fails the demo.
//!
//! *Invariant:* whatever the demo made is gone when it ends, also when it is interrupted, and what a killed demo left is
//! gone when the next begins.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::run::{During, Fallible, Process, is_root, on_exit, quiet, which};
use crate::setup::{self, Need};
use crate::vm::{self, Job};
use crate::{build, wire};

const PREFIX: &str = "wimsey-demo";
const ALPHA: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const BETA: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const SECRET: &str = "the butler did it";

/// Runs the demo here, or in a guest.
pub fn verb(words: &[String]) -> Fallible {
    // In a guest everything is there already.
    if std::env::var_os("WIMSEY_GUEST").is_some() {
        return show(Path::new("/usr/local/bin/wimsey"));
    }
    match words {
        [] => {
            if !is_root() {
                return Err("the demo makes network namespaces and loads kernel programs: run it as root, e.g. \
                            `sudo -E env PATH=$PATH cargo xtask demo`, or in a guest: `cargo xtask demo --vm`"
                    .into());
            }
            setup::ensure(&[Need::Lab])?;
            let built = build::agent()?;
            show(&built.wimsey)
        }
        [word] if word == "--vm" => guest(),
        _ => Err("usage: cargo xtask demo [--vm]".into()),
    }
}

fn guest() -> Fallible {
    let kernel = vm::kernels(&["trixie-security".into()])?.remove(0);
    let built = build::agent()?;
    let own = std::env::current_exe().during("cannot find xtask itself")?;
    println!("\nA guest with Debian's kernel {} boots; the demo runs in it.\n", kernel.release);
    let mut job = Job::new("demo", "/usr/local/bin/xtask demo");
    job.programs.push((build::stripped(&built.wimsey)?, "/usr/local/bin/wimsey".into()));
    job.programs.push((own, "/usr/local/bin/xtask".into()));
    let show = |line: &str| {
        // What the kernel itself has to say is in the log.
        if !line.starts_with('[') {
            println!("{}", if terminal() { line.to_owned() } else { line.replace(BOLD, "").replace(NORMAL, "") });
        }
    };
    let verdict = vm::boot_unshown(&kernel, &job, show)?;
    if verdict.success() { Ok(()) } else { Err(format!("{} ({})", verdict.line(), verdict.log.display()).into()) }
}

fn show(wimsey: &Path) -> Fallible {
    let _one = only_one()?;
    // Not below /tmp, where another user could have put a link of that name.
    let folder = PathBuf::from(format!("/run/{PREFIX}"));
    let mut demo = Demo::prepare(wimsey, &folder)?;
    demo.picture();
    let plain = demo.without_wimsey()?;
    demo.start_agents()?;
    let sealed = demo.with_wimsey(&plain)?;
    demo.audit()?;
    demo.stranger()?;
    demo.dead_agent(&sealed)?;
    demo.engine()?;
    println!("\n{}", bold("Everything above was checked. Cleaning up."));
    Ok(())
}

/// Keeps a second demo away while one runs.
fn only_one() -> Fallible<crate::run::Cleanup> {
    let lock = PathBuf::from(format!("/run/{PREFIX}.pid"));
    if let Ok(text) = fs::read_to_string(&lock) {
        let exe = fs::read_link(format!("/proc/{}/exe", text.trim()));
        if exe.is_ok_and(|exe| exe.file_name().is_some_and(|name| name == "xtask")) {
            return Err(format!("another demo is running (process {})", text.trim()).into());
        }
    }
    fs::write(&lock, std::process::id().to_string()).during(lock.display())?;
    Ok(on_exit(move || {
        let _ = fs::remove_file(lock);
    }))
}

struct Demo {
    wimsey: PathBuf,
    folder: PathBuf,
    // Ended in this order: programs first, then what they ran in.
    agents: Vec<Process>,
    programs: Vec<Process>,
    _undo: Vec<crate::run::Cleanup>,
}

impl Demo {
    fn prepare(wimsey: &Path, folder: &Path) -> Fallible<Self> {
        clean(wimsey, folder);
        let (program, made) = (wimsey.to_path_buf(), folder.to_path_buf());
        let undo = on_exit(move || clean(&program, &made));
        fs::create_dir_all(folder).during(folder.display())?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).during(folder.display())?;
        for (host, address) in [("alpha", ALPHA), ("beta", BETA)] {
            let netns = netns(host);
            ip(&["netns", "add", &netns])?;
            ip(&["-n", &netns, "link", "set", "lo", "up"])?;
            if host == "beta" {
                ip(&[
                    "link",
                    "add",
                    "eth0",
                    "netns",
                    &netns,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    &self::netns("alpha"),
                ])?;
                ip(&["-n", &self::netns("alpha"), "addr", "add", &format!("{ALPHA}/24"), "dev", "eth0"])?;
                ip(&["-n", &self::netns("alpha"), "link", "set", "eth0", "up"])?;
                ip(&["-n", &netns, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
                ip(&["-n", &netns, "link", "set", "eth0", "up"])?;
            }
        }
        let demo =
            Self { wimsey: wimsey.into(), folder: folder.into(), agents: vec![], programs: vec![], _undo: vec![undo] };
        demo.write("www/index.html", &format!("{SECRET}\n"))?;
        demo.write("nginx.conf", &demo.nginx())?;
        demo.write("policies/demo.toml", &policy())?;
        for host in ["alpha", "beta"] {
            demo.write(&format!("{host}.toml"), &demo.configuration(host))?;
            let private = demo.folder.join(host);
            fs::create_dir_all(private.join("run")).during(private.display())?;
            fs::create_dir_all(private.join("state")).during(private.display())?;
            fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).during(private.display())?;
        }
        Ok(demo)
    }

    fn picture(&self) {
        println!(
            "\n{}\n\n    alpha {ALPHA} ─────────── wire, captured ─────────── beta {BETA}\n    \
             curl       spiffe://example.org/curl               nginx  spiffe://example.org/web\n    \
             redis-cli  spiffe://example.org/teller             redis  spiffe://example.org/vault",
            bold("Wimsey: unmodified programs on two hosts speak mutual TLS as who they are")
        );
    }

    /// The same programs with nothing in between: what everybody on the wire can read.
    fn without_wimsey(&mut self) -> Fallible<Vec<u8>> {
        title("1. Without Wimsey");
        let capture = self.capture("plain", |demo| {
            let mut nginx = demo.start_program("beta", None, &["nginx", "-c", &demo.path("nginx.conf")])?;
            demo.wait_for_port("alpha", 80)?;
            let answer = demo.say("alpha", None, &["curl", "-sS", "-m", "10", &format!("http://{BETA}/")])?;
            nginx.end();
            expect(text(&answer).contains(SECRET), "curl got the page", &text(&answer))
        })?;
        expect(wire::holds(&capture, SECRET.as_bytes()), "the capture holds the page in plaintext", "it does not")?;
        Ok(capture)
    }

    fn start_agents(&mut self) -> Fallible {
        let authority = self.path("ca");
        let made = self.wimsey(&["ca", "init", "--trust-domain", "example.org", "--dir", &authority])?;
        need(&made, "wimsey ca init")?;
        let checked = self.wimsey(&["policy", "test", &self.path("policies")])?;
        need(&checked, "wimsey policy test")?;
        for host in ["alpha", "beta"] {
            self.start_agent(host)?;
        }
        Ok(())
    }

    fn start_agent(&mut self, host: &str) -> Fallible {
        let configuration = self.path(&format!("{host}.toml"));
        let log = self.folder.join(format!("{host}.log"));
        let mut command = enter(host, &self.wimsey.to_string_lossy());
        command.args(["agent", "--config", &configuration]);
        let agent = start(&format!("agent of {host}"), command, &log)?;
        let at = if host == "alpha" { 0 } else { 1 };
        if at < self.agents.len() {
            self.agents[at] = agent;
        } else {
            self.agents.push(agent);
        }
        let began = Instant::now();
        loop {
            if self.status(host).is_some() {
                return Ok(());
            }
            let ended = self.agents[at].poll()?;
            if ended.is_some() || began.elapsed() > Duration::from_secs(60) {
                let said = fs::read_to_string(&log).unwrap_or_default();
                return Err(format!("the agent of {host} is not ready: {ended:?}\n{said}").into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn with_wimsey(&mut self, plain: &[u8]) -> Fallible<Vec<u8>> {
        title("2. With an agent on each host, the same programs, the same addresses");
        let capture = self.capture("sealed", |demo| {
            let nginx = demo.start_program("beta", Some("demo-web"), &["nginx", "-c", &demo.path("nginx.conf")])?;
            let folder = demo.path("");
            let redis = ["redis-server", "--port", "6379", "--save", "", "--protected-mode", "no", "--dir", &folder];
            let redis = demo.start_program("beta", Some("demo-vault"), &redis)?;
            demo.programs.extend([nginx, redis]);
            demo.until("curl gets the page", || {
                let url = format!("http://{BETA}/");
                demo.ask("alpha", Some("demo-curl"), &["curl", "-sS", "-m", "10", &url])
                    .ok()
                    .filter(|a| text(a).contains(SECRET))
            })?;
            let url = format!("http://{BETA}/");
            let answer = demo.say("alpha", Some("demo-curl"), &["curl", "-sS", "-m", "10", &url])?;
            expect(text(&answer).contains(SECRET), "curl got the page", &text(&answer))?;
            let beta = BETA.to_string();
            demo.until("redis answers", || {
                let ping = ["redis-cli", "-h", &beta, "PING"];
                demo.ask("alpha", Some("demo-teller"), &ping).ok().filter(|answer| text(answer).contains("PONG"))
            })?;
            let set = ["redis-cli", "-h", &beta, "SET", "who", SECRET];
            expect(
                text(&demo.say("alpha", Some("demo-teller"), &set)?).contains("OK"),
                "redis-cli stored a value",
                "no OK",
            )?;
            let get = demo.say("alpha", Some("demo-teller"), &["redis-cli", "-h", &beta, "GET", "who"])?;
            expect(text(&get).contains(SECRET), "redis-cli read it back", &text(&get))
        })?;
        expect(
            !wire::holds(&capture, SECRET.as_bytes()),
            "no plaintext between the hosts",
            "the page is in the capture",
        )?;
        let mut records = 0;
        for stream in wire::streams(&capture) {
            let found = wire::records(&stream.bytes);
            let found = found.ok_or_else(|| format!("the stream {} > {} is not TLS", stream.from, stream.to))?;
            records += found.len();
        }
        expect(records > 0, &format!("all {records} records between the hosts are TLS 1.3"), "there is none")?;
        side_by_side(plain, &capture);
        Ok(capture)
    }

    fn audit(&self) -> Fallible {
        title("3. Each host wrote down who spoke with whom");
        for host in ["alpha", "beta"] {
            let log = fs::read_to_string(self.audit_path(host)).during("audit log")?;
            for (from, to) in [("curl", "web"), ("teller", "vault")] {
                let both = |line: &&str| {
                    line.contains(&format!("spiffe://example.org/{from}\""))
                        && line.contains(&format!("spiffe://example.org/{to}\""))
                };
                let line = log.lines().rev().find(both);
                let line = line.ok_or_else(|| format!("no line of {host} has both {from} and {to}:\n{log}"))?;
                println!("   {host:<5} {}", summary(line));
            }
        }
        println!(
            "   whole, one of them: {}",
            fs::read_to_string(self.audit_path("beta")).unwrap_or_default().lines().last().unwrap_or("")
        );
        Ok(())
    }

    fn stranger(&self) -> Fallible {
        title("4. A program without an identity is refused at once");
        let began = Instant::now();
        let answer = self.say("alpha", None, &["curl", "-sS", "-m", "10", &format!("http://{BETA}/")])?;
        let took = began.elapsed();
        expect(!answer.status.success() && took < Duration::from_secs(5), "curl was refused", &text(&answer))?;
        let refusal = self.until("the refusal is in the audit log", || {
            let log = fs::read_to_string(self.audit_path("alpha")).ok()?;
            log.lines().rev().find(|line| line.contains("\"denied\"") && line.contains("curl")).map(str::to_owned)
        })?;
        println!("   alpha {}", summary(&refusal));
        Ok(())
    }

    fn dead_agent(&mut self, sealed: &[u8]) -> Fallible {
        title("5. A killed agent means refused, never plaintext");
        let capture = self.capture("dead", |demo| {
            demo.agents[0].signal(Signal::KILL);
            let _ = demo.agents[0].wait();
            println!("   kill -9 of alpha's agent");
            let began = Instant::now();
            let answer =
                demo.say("alpha", Some("demo-curl"), &["curl", "-sS", "-m", "10", &format!("http://{BETA}/")])?;
            let refused = !answer.status.success() && began.elapsed() < Duration::from_secs(5);
            expect(refused, "curl was refused", &text(&answer))
        })?;
        let _ = sealed;
        expect(!wire::holds(&capture, b"GET / HTTP"), "nothing of the request is on the wire", "it is")?;
        self.start_agent("alpha")?;
        let url = format!("http://{BETA}/");
        let answer = self.until("curl gets the page again", || {
            self.ask("alpha", Some("demo-curl"), &["curl", "-sS", "-m", "10", &url])
                .ok()
                .filter(|a| text(a).contains(SECRET))
        })?;
        expect(text(&answer).contains(SECRET), "the agent started again, and curl got the page", "it did not")
    }

    fn engine(&self) -> Fallible {
        title("6. Which engine carried the records, and why");
        let status = self.status("alpha").ok_or("no status")?;
        for line in status.lines().filter(|line| line.starts_with("engine") || line.starts_with("covers")) {
            println!("   {line}");
        }
        let doctor = self.wimsey(&["doctor"])?;
        for line in text(&doctor).lines() {
            println!("   {line}");
        }
        Ok(())
    }

    /// Runs something while tcpdump listens between the hosts, and gives the capture.
    fn capture(&mut self, name: &str, run: impl FnOnce(&mut Self) -> Fallible) -> Fallible<Vec<u8>> {
        let file = self.folder.join(format!("{name}.pcap"));
        let mut command = enter("beta", "tcpdump");
        command.args(["-i", "eth0", "-U", "-s", "0", "--immediate-mode", "-Z", "root", "-w"]).arg(&file).arg("tcp");
        let mut tcpdump = start("tcpdump", command, &self.folder.join("tcpdump.log"))?;
        self.until("tcpdump listens", || fs::metadata(&file).ok().filter(|about| about.len() >= 24))?;
        let done = run(self);
        // The last packets are on their way to the file.
        std::thread::sleep(Duration::from_millis(300));
        tcpdump.end();
        done?;
        fs::read(&file).during(file.display())
    }

    fn start_program(&self, host: &str, name: Option<&str>, words: &[&str]) -> Fallible<Process> {
        let program = words.first().copied().unwrap_or_default();
        start(program, self.command(host, name, words), &self.folder.join(format!("{program}.log")))
    }

    /// Runs a program of the demo and shows the command and its answer.
    fn say(&self, host: &str, name: Option<&str>, words: &[&str]) -> Fallible<Output> {
        let who = name.map_or(String::new(), |name| format!("wimsey run --name {name} -- "));
        println!("   {host}$ {who}{}", words.join(" "));
        let answer = self.ask(host, name, words)?;
        for line in text(&answer).lines().take(4) {
            println!("      {line}");
        }
        Ok(answer)
    }

    fn ask(&self, host: &str, name: Option<&str>, words: &[&str]) -> Fallible<Output> {
        let mut command = self.command(host, name, words);
        command.stdin(Stdio::null()).output().during(words.join(" "))
    }

    fn command(&self, host: &str, name: Option<&str>, words: &[&str]) -> Command {
        let mut command = match name {
            Some(name) => {
                let mut command = enter(host, &self.wimsey.to_string_lossy());
                command.args(["run", "--name", name, "--"]);
                command
            }
            None => enter(host, "env"),
        };
        command.args(words);
        command
    }

    fn wimsey(&self, words: &[&str]) -> Fallible<Output> {
        Command::new(&self.wimsey).args(words).stdin(Stdio::null()).output().during("cannot run wimsey")
    }

    fn status(&self, host: &str) -> Option<String> {
        quiet(&self.wimsey.to_string_lossy(), &["status", "--config", &self.path(&format!("{host}.toml"))])
    }

    fn until<T>(&self, what: &str, mut ask: impl FnMut() -> Option<T>) -> Fallible<T> {
        let began = Instant::now();
        loop {
            if let Some(answer) = ask() {
                return Ok(answer);
            }
            if began.elapsed() > Duration::from_secs(60) {
                return Err(format!("waited a minute, but not: {what}\n{}", self.logs()).into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn wait_for_port(&self, host: &str, port: u16) -> Fallible {
        let url = format!("http://{BETA}:{port}/");
        self.until("nginx answers", || quiet("nsenter", &[&entry(host), "curl", "-s", "-m", "2", &url])).map(drop)
    }

    /// The ends of all logs, for a failure.
    fn logs(&self) -> String {
        let mut all = String::new();
        for name in ["alpha.log", "beta.log", "nginx.log", "redis-server.log"] {
            let lines = crate::run::tail(&self.folder.join(name), 12);
            all.push_str(&format!("  {name}:\n{lines}\n"));
        }
        all
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    fn audit_path(&self, host: &str) -> PathBuf {
        self.folder.join(host).join("audit.jsonl")
    }

    fn write(&self, name: &str, text: &str) -> Fallible {
        let path = self.folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).during(parent.display())?;
        }
        fs::write(&path, text).during(path.display())
    }

    fn nginx(&self) -> String {
        let folder = self.folder.display();
        format!(
            "daemon off;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\n\
             http {{\n  access_log off;\n  client_body_temp_path {folder}/nginx-body;\n  proxy_temp_path {folder}/nginx-proxy;\n  \
             fastcgi_temp_path {folder}/nginx-fastcgi;\n  uwsgi_temp_path {folder}/nginx-uwsgi;\n  \
             scgi_temp_path {folder}/nginx-scgi;\n  server {{ listen {BETA}:80; root {folder}/www; }}\n}}\n"
        )
    }

    fn configuration(&self, host: &str) -> String {
        let folder = self.folder.display();
        // The guest is there to show the kernel's TLS.
        let engine = if std::env::var_os("WIMSEY_GUEST").is_some() { "kernel" } else { "auto" };
        format!(
            "policy_dir = \"{folder}/policies\"\nstate_dir = \"{folder}/{host}/state\"\nrun_dir = \"{folder}/{host}/run\"\n\
             engine = \"{engine}\"\n\n[identity]\nprovider = \"embedded\"\nca_dir = \"{folder}/ca\"\n\n\
             [audit]\npath = \"{folder}/{host}/audit.jsonl\"\n"
        )
    }
}

/// Who is who, where it is, and who may speak with whom. The path narrows the cgroup: another program in it is nobody.
fn policy() -> String {
    let mut text = String::from("trust_domain = \"example.org\"\n");
    for (name, program) in [("curl", "curl"), ("web", "nginx"), ("teller", "redis-cli"), ("vault", "redis-server")] {
        // Debian's redis-server is a link; the kernel knows the file.
        let path = which(program).and_then(|path| fs::canonicalize(path).ok()).unwrap_or_default();
        text.push_str(&format!(
            "\n[[workload]]\nid = \"spiffe://example.org/{name}\"\n\
             selectors = [\"cgroup:/wimsey/demo-{name}\", \"unix:path:{}\"]\n",
            path.display()
        ));
    }
    for (port, name) in [(80, "web"), (6379, "vault")] {
        text.push_str(&format!(
            "\n[[destination]]\naddress = \"{BETA}:{port}\"\nid = \"spiffe://example.org/{name}\"\n"
        ));
    }
    for (from, to, port) in [("curl", "web", 80), ("teller", "vault", 6379)] {
        text.push_str(&format!(
            "\n[[allow]]\nname = \"{from}-to-{to}\"\nfrom = \"spiffe://example.org/{from}\"\n\
             to = \"spiffe://example.org/{to}\"\nports = [{port}]\n\n[[expect]]\nfrom = \"spiffe://example.org/{from}\"\n\
             to = \"{BETA}:{port}\"\ndecision = \"allow\"\nrule = \"{from}-to-{to}\"\n"
        ));
    }
    text
}

/// Removes what a demo made: its pins, its namespaces, its cgroups, its folder.
fn clean(wimsey: &Path, folder: &Path) {
    for host in ["alpha", "beta"] {
        let configuration = folder.join(format!("{host}.toml"));
        if Path::new(&format!("/run/netns/{}", netns(host))).exists() {
            for pid in quiet("ip", &["netns", "pids", &netns(host)]).unwrap_or_default().split_whitespace() {
                // Only a demo that was killed leaves any, and they are in a namespace that it made.
                if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                }
            }
            let configuration = configuration.to_string_lossy();
            let _ = quiet("nsenter", &[&entry(host), &wimsey.to_string_lossy(), "release", "--config", &configuration]);
            let _ = quiet("ip", &["netns", "del", &netns(host)]);
        }
    }
    for name in ["demo-curl", "demo-web", "demo-teller", "demo-vault"] {
        if let Some(mount) = cgroup_mount() {
            let _ = fs::remove_dir(mount.join("wimsey").join(name));
        }
    }
    let _ = fs::remove_dir_all(folder);
}

/// Where the unified hierarchy is mounted.
fn cgroup_mount() -> Option<PathBuf> {
    let mounts = quiet("findmnt", &["--noheadings", "--list", "--output", "TARGET", "--types", "cgroup2"])?;
    mounts.lines().last().map(PathBuf::from)
}

fn netns(host: &str) -> String {
    format!("{PREFIX}-{host}")
}

fn entry(host: &str) -> String {
    format!("--net=/run/netns/{}", netns(host))
}

/// A program in a host. `ip netns exec` would mount another /sys, without the cgroups and the pins in it.
fn enter(host: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(entry(host)).arg(program);
    command
}

/// Starts something that runs until the demo ends it, or until xtask is killed.
fn start(label: &str, inner: Command, log: &Path) -> Fallible<Process> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(inner.get_program()).args(inner.get_args());
    let out = fs::File::create(log).during(log.display())?;
    let err = out.try_clone().during(log.display())?;
    command.stdin(Stdio::null()).stdout(out).stderr(err);
    Process::start_as_is(label, command)
}

fn ip(words: &[&str]) -> Fallible {
    let output = Command::new("ip").args(words).output().during("cannot run ip")?;
    need(&output, &format!("ip {}", words.join(" ")))
}

fn need(output: &Output, what: &str) -> Fallible {
    if output.status.success() { Ok(()) } else { Err(format!("{what}: {}\n{}", output.status, text(output)).into()) }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn title(text: &str) {
    println!("\n{}", bold(text));
}

const BOLD: &str = "\x1b[1m";
const NORMAL: &str = "\x1b[0m";

fn bold(text: &str) -> String {
    if terminal() { format!("{BOLD}{text}{NORMAL}") } else { text.to_owned() }
}

fn terminal() -> bool {
    use std::io::IsTerminal;
    std::io::stdout().is_terminal()
}

/// One claim of the demo.
fn expect(holds: bool, claim: &str, otherwise: &str) -> Fallible {
    if holds {
        println!("   ok: {claim}");
        return Ok(());
    }
    Err(format!("NOT so: {claim}\n  {}", otherwise.trim()).into())
}

/// The end of nginx's answer as the wire had it, twice.
fn side_by_side(plain: &[u8], sealed: &[u8]) {
    let answer =
        |file: &[u8]| wire::streams(file).into_iter().rfind(|stream| stream.from == 80 && !stream.bytes.is_empty());
    let end = |bytes: &[u8]| bytes[bytes.len().saturating_sub(48)..].to_vec();
    let left = answer(plain).map(|stream| end(&stream.bytes)).unwrap_or_default();
    // The record that carries the answer is the longest after the handshake's; alerts and tickets are shorter.
    let record = answer(sealed).and_then(|stream| {
        let records = wire::records(&stream.bytes)?;
        records.iter().rev().find(|record| record.len() > 200).map(|record| end(record))
    });
    let right = record.unwrap_or_default();
    println!("\n   {:<38}the same with Wimsey:", "the end of nginx's answer, without:");
    for (left, right) in wire::dump(&left).iter().zip(wire::dump(&right)) {
        println!("   {left:<38}{right}");
    }
}

/// The parts of an audit line that a screen has room for.
fn summary(line: &str) -> String {
    let field = |key: &str| text_of(line, key).unwrap_or_default();
    let part = |name: &str, key: &str| {
        let inner =
            line.split_once(&format!("\"{name}\":{{")).map_or("", |(_, rest)| rest.split('}').next().unwrap_or(""));
        text_of(inner, key).unwrap_or_default()
    };
    let who = |name: &str| {
        let id = part(name, "id");
        if id.is_empty() { part(name, "address") } else { id.replace("spiffe://example.org/", "") }
    };
    let mut words = vec![field("decision"), format!("{} > {}", who("source"), who("destination"))];
    if field("decision") == "allowed" {
        words.extend([field("method"), part("tls", "group"), part("tls", "cipher")]);
        words.extend([format!("engine {}", field("engine")), format!("rule {}", field("rule"))]);
    } else {
        words.extend([field("code"), field("reason")]);
    }
    words.retain(|word| !word.is_empty());
    words.join(", ")
}

fn text_of(line: &str, key: &str) -> Option<String> {
    Some(line.split_once(&format!("\"{key}\":\""))?.1.split('"').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::summary;

    #[test]
    fn an_audit_line_is_summed_up_with_both_identities() {
        let line = r#"{"time":"2026-11-22T05:00:00Z","flow":1,"decision":"allowed","source":{"id":"spiffe://example.org/curl","address":"10.77.0.1:1"},"destination":{"id":"spiffe://example.org/web","address":"10.77.0.2:80"},"method":"mtls","tls":{"group":"X25519MLKEM768","cipher":"TLS13_AES_128_GCM_SHA256"},"engine":"user","rule":"curl-to-web","code":"closed"}"#;
        let words = summary(line);
        assert_eq!(
            words,
            "allowed, curl > web, mtls, X25519MLKEM768, TLS13_AES_128_GCM_SHA256, engine user, rule curl-to-web"
        );
    }

    #[test]
    fn a_refusal_is_summed_up_with_its_reason() {
        let line = r#"{"decision":"denied","source":{"address":"10.77.0.1:1"},"destination":{"address":"10.77.0.2:80"},"code":"no-identity","reason":"no entry"}"#;
        assert_eq!(summary(line), "denied, 10.77.0.1:1 > 10.77.0.2:80, no-identity, no entry");
    }
}
