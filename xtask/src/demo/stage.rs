//! Where the demo plays: two hosts on one wire, their agents, and the programs of Debian that run on them.
//!
//! *Invariant:* programs end before what they ran in is removed, and whatever was made has a name of the demo.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{ALPHA, BETA, PREFIX, SECRET};
use crate::run::{During, Fallible, Process, on_exit, quiet, which};

pub(super) struct Demo {
    bunter: PathBuf,
    folder: PathBuf,
    // Ended in this order: programs first, then what they ran in.
    pub(super) agents: Vec<Process>,
    pub(super) programs: Vec<Process>,
    _undo: Vec<crate::run::Cleanup>,
}

impl Demo {
    pub(super) fn prepare(bunter: &Path, folder: &Path) -> Fallible<Self> {
        clean(bunter, folder);
        let (program, made) = (bunter.to_path_buf(), folder.to_path_buf());
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
            Self { bunter: bunter.into(), folder: folder.into(), agents: vec![], programs: vec![], _undo: vec![undo] };
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

    pub(super) fn start_agents(&mut self) -> Fallible {
        let authority = self.path("ca");
        let made = self.bunter(&["ca", "init", "--trust-domain", "example.org", "--dir", &authority])?;
        need(&made, "bunter ca init")?;
        let checked = self.bunter(&["policy", "test", &self.path("policies")])?;
        need(&checked, "bunter policy test")?;
        for host in ["alpha", "beta"] {
            self.start_agent(host)?;
        }
        Ok(())
    }

    pub(super) fn start_agent(&mut self, host: &str) -> Fallible {
        let configuration = self.path(&format!("{host}.toml"));
        let log = self.folder.join(format!("{host}.log"));
        let mut command = enter(host, &self.bunter.to_string_lossy());
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

    /// Runs something while tcpdump listens between the hosts, and gives the capture.
    pub(super) fn capture(&mut self, name: &str, run: impl FnOnce(&mut Self) -> Fallible) -> Fallible<Vec<u8>> {
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

    pub(super) fn start_program(&self, host: &str, name: Option<&str>, words: &[&str]) -> Fallible<Process> {
        let program = words.first().copied().unwrap_or_default();
        start(program, self.command(host, name, words), &self.folder.join(format!("{program}.log")))
    }

    /// Runs a program of the demo and shows the command and its answer.
    pub(super) fn say(&self, host: &str, name: Option<&str>, words: &[&str]) -> Fallible<Output> {
        let who = name.map_or(String::new(), |name| format!("bunter run --name {name} -- "));
        println!("   {host}$ {who}{}", words.join(" "));
        let answer = self.ask(host, name, words)?;
        for line in text(&answer).lines().take(4) {
            println!("      {line}");
        }
        Ok(answer)
    }

    pub(super) fn ask(&self, host: &str, name: Option<&str>, words: &[&str]) -> Fallible<Output> {
        let mut command = self.command(host, name, words);
        command.stdin(Stdio::null()).output().during(words.join(" "))
    }

    fn command(&self, host: &str, name: Option<&str>, words: &[&str]) -> Command {
        let mut command = match name {
            Some(name) => {
                let mut command = enter(host, &self.bunter.to_string_lossy());
                command.args(["run", "--name", name, "--"]);
                command
            }
            None => enter(host, "env"),
        };
        command.args(words);
        command
    }

    pub(super) fn bunter(&self, words: &[&str]) -> Fallible<Output> {
        Command::new(&self.bunter).args(words).stdin(Stdio::null()).output().during("cannot run bunter")
    }

    pub(super) fn status(&self, host: &str) -> Option<String> {
        quiet(&self.bunter.to_string_lossy(), &["status", "--config", &self.path(&format!("{host}.toml"))])
    }

    pub(super) fn until<T>(&self, what: &str, mut ask: impl FnMut() -> Option<T>) -> Fallible<T> {
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

    pub(super) fn wait_for_port(&self, host: &str, port: u16) -> Fallible {
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

    pub(super) fn path(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    pub(super) fn audit_path(&self, host: &str) -> PathBuf {
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
        let engine = if std::env::var_os("BUNTER_GUEST").is_some() { "kernel" } else { "auto" };
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
             selectors = [\"cgroup:/bunter/demo-{name}\", \"unix:path:{}\"]\n",
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
fn clean(bunter: &Path, folder: &Path) {
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
            let _ = quiet("nsenter", &[&entry(host), &bunter.to_string_lossy(), "release", "--config", &configuration]);
            let _ = quiet("ip", &["netns", "del", &netns(host)]);
        }
    }
    for name in ["demo-curl", "demo-web", "demo-teller", "demo-vault"] {
        if let Some(mount) = cgroup_mount() {
            let _ = fs::remove_dir(mount.join("bunter").join(name));
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

pub(super) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
