//! The hand that moves a [`puppet`](crate::puppet), and what strangers do to a host meanwhile.
//!
//! *Invariant:* every text that a stranger sends begins with [`STRANGER`], and nothing else that a test sends contains it.

use crate::agent::Mesh;
use crate::enter::Place;
use crate::host::Host;
use crate::program::Program;
use crate::stranger::Attempt;
use crate::world::{Lab, events};
use crate::{clock, skip};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The user whose listeners take mutual TLS or nothing.
pub const WEB: u32 = 2001;
/// The user who is enrolled and dials.
pub const USER: u32 = 2002;
/// The user who is nobody.
pub const ATTACKER: u32 = 3000;

/// How everything begins that a stranger says.
pub const STRANGER: &str = "STRANGER-";

/// A puppet under this hand.
pub struct Hand {
    program: Program,
    told: u64,
    name: String,
}

impl Hand {
    /// Starts a puppet at a place: `program` is `lab-app`, or a copy of it.
    #[track_caller]
    pub fn start(lab: &Lab, place: Place, program: &Path, name: &str) -> Self {
        let mut command = lab.command_in(place, program);
        command.args(["puppet", "--name", name]);
        let program = Program::start(command, format!("puppet {name}"));
        match program.and_then(|mut program| program.ready().map(|()| program)) {
            Ok(program) => Self { program, told: 0, name: name.to_owned() },
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Its name, under which others give sockets to it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// Tells it to do something, and gives what came of it.
    #[track_caller]
    pub fn tell(&mut self, line: &str) -> Value {
        match self.try_tell(line, clock::seconds(60)) {
            Ok(answer) => answer,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// The same; an error where the puppet is gone or silent for too long.
    pub fn try_tell(&mut self, line: &str, limit: Duration) -> crate::Result<Value> {
        self.program.say(line)?;
        self.told += 1;
        let answer = format!("\"reply\":{}", self.told);
        // Keys are in order, so that the number may be followed by either.
        let line = self
            .program
            .line(limit, |line| line.split_once(&answer).is_some_and(|(_, rest)| rest.starts_with([',', '}'])))?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Tells it to do something that has to go well, and gives what the last step came to.
    #[track_caller]
    pub fn must(&mut self, line: &str) -> Value {
        let answer = self.tell(line);
        assert_eq!(answer["ok"], true, "puppet {}: {answer}", self.name);
        last(&answer)
    }

    /// Ends it and waits until it is gone.
    pub fn end(self) {
        drop(self.program);
    }

    /// All that its sockets heard: events `read`.
    pub fn heard(&self) -> Vec<Value> {
        events(&self.program.stdout()).into_iter().filter(|event| event["event"] == "read").collect()
    }

    /// Those of them in which a stranger speaks.
    pub fn strangers(&self) -> Vec<Value> {
        let speaks = |event: &Value| event["text"].as_str().is_some_and(|text| text.contains(STRANGER));
        self.heard().into_iter().filter(speaks).collect()
    }

    /// No stranger was heard.
    #[track_caller]
    pub fn expect_no_stranger(&self, when: &str) {
        let heard = self.strangers();
        let first = heard.first().map(Value::to_string).unwrap_or_default();
        assert!(heard.is_empty(), "{when}: {} heard strangers {} times, first: {first}", self.name, heard.len());
    }

    /// Nothing was heard that contains this text.
    #[track_caller]
    pub fn expect_unheard(&self, text: &str, when: &str) {
        let heard = self.heard().into_iter().find(|event| event["text"].as_str().is_some_and(|it| it.contains(text)));
        assert!(heard.is_none(), "{when}: {} heard what was not for it: {heard:?}", self.name);
    }
}

/// What the last step of an answer came to.
pub fn last(answer: &Value) -> Value {
    answer["steps"].as_array().and_then(|steps| steps.last()).cloned().unwrap_or_default()
}

impl Lab {
    /// A puppet on a host, in the cgroup of this name, as a user (0: root).
    #[track_caller]
    pub fn puppet(&self, host: &Host, cgroup: &str, uid: u32, name: &str) -> Hand {
        let program = skip::lab_app().unwrap_or_else(|skip| panic!("{}", skip.0));
        let user = (uid != 0).then_some((uid, uid));
        Hand::start(self, Place { user, ..self.place(host, cgroup) }, &program, name)
    }

    /// Moves a process into the cgroup of this name.
    #[track_caller]
    pub fn move_to(&self, cgroup: &str, pid: u32) {
        let file = self.cgroup(cgroup).join("cgroup.procs");
        if let Err(error) = std::fs::write(&file, pid.to_string()) {
            panic!("write {}: {error}", file.display());
        }
    }

    /// A cgroup whose subtree belongs to a user, and below it one where the user's programs start.
    #[track_caller]
    pub fn delegate(&self, cgroup: &str, uid: u32) -> PathBuf {
        let tree = self.cgroup(cgroup);
        let start = self.cgroup(&format!("{cgroup}/start"));
        for directory in [&tree, &start] {
            for path in [directory.clone(), directory.join("cgroup.procs")] {
                if let Err(error) = std::os::unix::fs::chown(&path, Some(uid), Some(uid)) {
                    panic!("chown {}: {error}", path.display());
                }
            }
        }
        tree
    }

    /// Strangers call on this port of beta: from another host and from beta itself, by IPv4 and IPv6, so many times each.
    pub fn assail(&self, port: u16, times: usize) -> Vec<Attempt> {
        let beta = &self.beta;
        let far = vec![beta.at(port), beta.at6(port)];
        let near =
            vec![beta.at(port), beta.at6(port), (Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()];
        let calls = [(&self.stranger, far), (beta, near)];
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (host, targets) in &calls {
                for to in targets {
                    threads
                        .push(scope.spawn(move || host.within(|| (0..times).map(|_| knock(*to)).collect::<Vec<_>>())));
                }
            }
            threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
        })
    }

    /// The client on alpha is served at last; where not, everything is shown.
    #[track_caller]
    pub fn expect_served(&self, mesh: &Mesh<'_>, to: SocketAddr) {
        let mut last = Vec::new();
        let served = clock::until(clock::seconds(10), || {
            last = self.echo(&self.alpha, "client", to, &[]);
            last.iter().any(|event| event["text"] == self.marker()).then_some(())
        });
        let tail = |agent: &crate::Agent<'_>| {
            let lines = agent.audit();
            lines[lines.len().saturating_sub(3)..].iter().map(|line| format!("{line}\n")).collect::<String>()
        };
        let show = || format!("{last:?}\nalpha:\n{}beta:\n{}", tail(mesh.alpha()), tail(mesh.beta()));
        assert!(served.is_some(), "an allowed client is not served at {to}: {}", show());
    }

    /// The client on alpha is served at last, or every refusal has a line in an audit log.
    #[track_caller]
    pub fn expect_served_or_told(&self, mesh: &Mesh<'_>, to: SocketAddr) {
        let began = time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339);
        let began = began.unwrap_or_default();
        let lines = || {
            let denied = |line: &&Value| line["decision"] == "denied" && line["time"].as_str() >= Some(&began);
            let mine = |line: &&Value| {
                line["source"]["address"]
                    .as_str()
                    .is_none_or(|it| it.contains(&self.alpha.v4.to_string()) || it.contains(&self.alpha.v6.to_string()))
            };
            let all = [mesh.alpha(), mesh.beta()].map(|agent| agent.records_for(to.port()));
            all.concat().iter().filter(denied).filter(mine).count()
        };
        let mut last = Vec::new();
        let served = clock::until(clock::seconds(10), || {
            last = self.echo(&self.alpha, "client", to, &[]);
            last.iter().any(|event| event["text"] == self.marker()).then_some(())
        });
        let told = served.or_else(|| clock::until(clock::seconds(10), || (lines() > 0).then_some(())));
        assert!(told.is_some(), "an allowed client is neither served at {to} nor told why not: {last:?}");
    }
}

/// A stranger connects, speaks, says that it is done and listens for a moment.
pub fn knock(to: SocketAddr) -> Attempt {
    let mut attempt = Attempt::default();
    let mut talk = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, clock::seconds(1))?;
        attempt.connected = true;
        // Whoever reads it reads it at once. Not everybody answers.
        stream.set_read_timeout(Some(clock::millis(500)))?;
        stream.write_all(format!("{STRANGER}{to}\n").as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut attempt.answer).map(|_| ())
    };
    let end = talk();
    attempt.end = end.map_or_else(|error| crate::dial::name(&error), |()| "eof".to_owned());
    attempt
}

/// Both agents run, answer, and have not panicked.
#[track_caller]
pub fn expect_alive(mesh: &Mesh<'_>) {
    for agent in [mesh.alpha(), mesh.beta()] {
        assert!(agent.status().is_object());
        assert!(!agent.log().contains("panicked"), "{}", agent.log());
    }
}

/// Where sockets listen on a host, by IPv4: what every user of the host can read.
pub fn listening(host: &Host) -> Vec<SocketAddr> {
    let table = host.within(|| std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap_or_default());
    let mut found = Vec::new();
    for line in table.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, local, _, "0A", ..] = words[..] else { continue };
        let Some((address, port)) = local.split_once(':') else { continue };
        let address = u32::from_str_radix(address, 16).map(|word| Ipv4Addr::from(word.swap_bytes()));
        if let (Ok(address), Ok(port)) = (address, u16::from_str_radix(port, 16)) {
            found.push(SocketAddr::new(address.into(), port));
        }
    }
    found
}
