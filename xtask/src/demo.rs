//! The verb `demo`: the main job on one screen, with real programs.
//!
//! Two hosts are network namespaces, joined by a wire that is captured, each with an agent of its own. nginx, curl, redis
//! and redis-cli are Debian's, and know nothing of TLS here. Each claim on the screen is checked; one that does not hold
//! fails the demo.
//!
//! *Invariant:* whatever the demo made is gone when it ends, also when it is interrupted, and what a killed demo left is
//! gone when the next begins.

mod screen;
mod stage;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::run::{During, Fallible, is_root, on_exit};
use crate::setup::{self, Need};
use crate::vm::{self, Job};
use crate::{build, wire};
use screen::{BOLD, NORMAL, bold, expect, side_by_side, summary, terminal, title};
use stage::{Demo, text};

const PREFIX: &str = "bunter-demo";
const ALPHA: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const BETA: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const SECRET: &str = "the butler did it";

/// Runs the demo here, or in a guest.
pub fn verb(words: &[String]) -> Fallible {
    // In a guest everything is there already.
    if std::env::var_os("BUNTER_GUEST").is_some() {
        return show(Path::new("/usr/local/bin/bunter"));
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
            show(&built.bunter)
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
    job.programs.push((build::stripped(&built.bunter)?, "/usr/local/bin/bunter".into()));
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

fn show(bunter: &Path) -> Fallible {
    let _one = only_one()?;
    // Not below /tmp, where another user could have put a link of that name.
    let folder = PathBuf::from(format!("/run/{PREFIX}"));
    let mut demo = Demo::prepare(bunter, &folder)?;
    demo.picture();
    let plain = demo.without_bunter()?;
    demo.start_agents()?;
    let sealed = demo.with_bunter(&plain)?;
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

impl Demo {
    fn picture(&self) {
        println!(
            "\n{}\n\n    alpha {ALPHA} ─────────── wire, captured ─────────── beta {BETA}\n    \
             curl       spiffe://example.org/curl               nginx  spiffe://example.org/web\n    \
             redis-cli  spiffe://example.org/teller             redis  spiffe://example.org/vault",
            bold("Bunter: unmodified programs on two hosts speak mutual TLS as who they are")
        );
    }

    /// The same programs with nothing in between: what everybody on the wire can read.
    fn without_bunter(&mut self) -> Fallible<Vec<u8>> {
        title("1. Without Bunter");
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

    fn with_bunter(&mut self, plain: &[u8]) -> Fallible<Vec<u8>> {
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
        let doctor = self.bunter(&["doctor"])?;
        for line in text(&doctor).lines() {
            println!("   {line}");
        }
        Ok(())
    }
}
