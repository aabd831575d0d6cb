//! The programs that run in the lab: servers and clients of many kinds, in one binary.
//!
//! `lab-app in ... -- PROGRAM` goes to a network namespace and a cgroup and becomes the program; `lab-app janitor` cleans
//! up after the tests; everything else is a test program, whose results are JSON lines on standard output.

use anyhow::{Context, bail};
use lab::bench::load::{Load, Target};
use lab::crowd::{self, Crowd};
use lab::dial::{self, How};
use lab::script::{self, Step};
use lab::{bench, enter, janitor, puppet, servers};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde_json::json;
use socket2::Socket;
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

const USAGE: &str = "usage: lab-app VERB [--OPTION VALUE]... [STEP]...
  in --netns=FILE --cgroup=DIR --user=UID:GID --files=N -- PROGRAM ARGUMENT...
  janitor
  echo --listen ADDRESS... [--report yes]
  serve --listen ADDRESS... [--connections N] [--marker TEXT] STEP...
  talk --to ADDRESS [--bind ADDRESS] [--how HOW] [--marker TEXT] STEP...
  hold --to ADDRESS --connections N --marker TEXT
  crowd --to ADDRESS... --connections N --marker TEXT [--at-once N]
  lend --socket PATH --to ADDRESS
  borrow --socket PATH --to ADDRESS STEP...
  puppet --name NAME
  udp-echo --listen ADDRESS
  udp-talk --to ADDRESS [--connected yes] --text TEXT
  bench-server --listen ADDRESS... --threads N [--sealed yes]
  load --kind bulk|round-trips|connects --to ADDRESS --connections N [--size BYTES] --seconds S --threads N [--sealed yes]
  load --kind hold --to ADDRESS --connections N
  load --kind try --to ADDRESS
HOW: blocking nonblocking fastopen fastopen-connect io-uring mptcp
STEP: send:TEXT line read:N to-end half-close reset close sleep:MS pattern:N both:N slowly:N:BYTES:MS fill:MS echo wait names";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("lab-app: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Options by name, and the words that are none.
struct Arguments {
    options: Vec<(String, String)>,
    words: Vec<String>,
}

impl Arguments {
    fn read() -> anyhow::Result<Self> {
        let mut all: VecDeque<String> = std::env::args().skip(2).collect();
        let (mut options, mut words) = (Vec::new(), Vec::new());
        while let Some(word) = all.pop_front() {
            match word.strip_prefix("--") {
                Some(name) => options.push((name.to_owned(), all.pop_front().context("an option without value")?)),
                None => words.push(word),
            }
        }
        Ok(Self { options, words })
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.options.iter().find(|(option, _)| option == name).map(|(_, value)| value.as_str())
    }

    fn all<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(&self, name: &str) -> anyhow::Result<Vec<T>> {
        let values = self.options.iter().filter(|(option, _)| option == name);
        let values = values.map(|(_, value)| value.parse().with_context(|| format!("--{name} {value}")));
        values.collect()
    }

    fn one<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(&self, name: &str) -> anyhow::Result<T> {
        self.all(name)?.pop().with_context(|| format!("--{name} is missing\n{USAGE}"))
    }

    fn to(&self) -> anyhow::Result<SocketAddr> {
        self.one("to")
    }

    fn how(&self) -> anyhow::Result<How> {
        self.text("how").map_or(Ok(How::default()), str::parse)
    }

    fn marker(&self) -> &str {
        self.text("marker").unwrap_or("no-marker-was-given-to-lab-app")
    }

    fn seconds(&self) -> anyhow::Result<Duration> {
        Ok(Duration::from_secs_f64(self.one("seconds")?))
    }

    fn steps(&self) -> anyhow::Result<Vec<Step>> {
        self.words.iter().map(|word| word.parse()).collect()
    }
}

fn run() -> anyhow::Result<bool> {
    let verb = std::env::args().nth(1).context(USAGE)?;
    match verb.as_str() {
        "in" => return enter::become_program(std::env::args_os().skip(2)).map(|()| true),
        "janitor" => return janitor::serve().map(|()| true),
        _ => {}
    }
    let arguments = Arguments::read()?;
    let listen = || arguments.all::<SocketAddr>("listen");
    match verb.as_str() {
        "echo" => servers::echo(&listen()?, arguments.text("report").is_some())?,
        "serve" => {
            let number = arguments.all("connections")?.pop();
            servers::serve(&listen()?, arguments.steps()?, number, arguments.marker())?;
        }
        "talk" => return talk(&arguments),
        "hold" => servers::hold(arguments.to()?, arguments.one("connections")?, arguments.marker())?,
        "crowd" => {
            let (to, connections) = (arguments.all("to")?, arguments.one("connections")?);
            let at_once = arguments.all("at-once")?.pop().unwrap_or(connections);
            crowd::run(Crowd { to, connections, at_once, marker: arguments.marker().to_owned() })?;
        }
        "lend" => lend(&arguments)?,
        "puppet" => puppet::serve(arguments.text("name").context("--name is missing")?)?,
        "borrow" => return borrow(&arguments),
        "udp-echo" => servers::udp_echo(arguments.one("listen")?)?,
        "udp-talk" => {
            let text = arguments.text("text").unwrap_or_default();
            servers::udp_talk(arguments.to()?, arguments.text("connected").is_some(), text)?;
        }
        "bench-server" => {
            bench::serve::run(&listen()?, arguments.one("threads")?, arguments.text("sealed").is_some())?;
        }
        "load" => load(&arguments)?,
        other => bail!("no verb is called {other}\n{USAGE}"),
    }
    Ok(true)
}

/// One measurement's load, or connections to hold, or a single try.
fn load(arguments: &Arguments) -> anyhow::Result<()> {
    let to = Target { to: arguments.to()?, sealed: arguments.text("sealed").is_some() };
    let kind: String = arguments.one("kind")?;
    let number = || arguments.one("connections");
    let load = match kind.as_str() {
        "bulk" => Load::Bulk(number()?),
        "round-trips" => Load::RoundTrips(arguments.one("size")?, number()?),
        "connects" => Load::Connects(number()?),
        "hold" => return bench::load::hold(to, number()?),
        "try" => return bench::load::attempt_once(to),
        other => bail!("no load is called {other}\n{USAGE}"),
    };
    let (time, threads) = (arguments.seconds()?, arguments.one("threads")?);
    // Whoever measures reads its meters between the two.
    let began = || {
        servers::ready("primed");
        std::io::stdin().read_line(&mut String::new())?;
        Ok(())
    };
    script::say(&bench::load::run(load, to, time, threads, began)?);
    Ok(())
}

/// Connects and runs a script.
fn talk(arguments: &Arguments) -> anyhow::Result<bool> {
    let (to, how) = (arguments.to()?, arguments.how()?);
    let bind = arguments.all::<SocketAddr>("bind")?.pop();
    let socket = dial::socket(to, bind, how).context("make the socket")?;
    follow(arguments, socket, to, how)
}

/// Connects this socket and runs the script on it.
fn follow(arguments: &Arguments, socket: Socket, to: SocketAddr, how: How) -> anyhow::Result<bool> {
    let mut steps = arguments.steps()?;
    let began = std::time::Instant::now();
    // With Fast Open the first thing that is sent belongs to the connecting.
    let first = match (how, steps.first()) {
        (How::FastOpen, Some(Step::Send(text))) => text.clone(),
        _ => String::new(),
    };
    let outcome = dial::connect(socket, to, how, first.as_bytes());
    let ms = began.elapsed().as_millis() as u64;
    match outcome {
        Ok((stream, sent)) => {
            script::say(&json!({ "step": "connect", "ok": true, "ms": ms }));
            if how == How::FastOpen && !steps.is_empty() {
                let rest = first.get(sent..).unwrap_or_default().to_owned();
                steps[0] = Step::Send(rest);
            }
            dial::limit(&stream, script::patience())?;
            Ok(script::run(stream, &steps, 0, arguments.marker()))
        }
        Err(error) => {
            script::say(&json!({ "step": "connect", "ok": false, "error": dial::name(&error), "ms": ms }));
            Ok(false)
        }
    }
}

/// Makes a TCP socket and gives it to whoever comes.
fn lend(arguments: &Arguments) -> anyhow::Result<()> {
    let path: String = arguments.one("socket")?;
    let socket = dial::socket(arguments.to()?, None, How::Blocking)?;
    let listener = UnixListener::bind(&path)?;
    servers::ready(&path);
    let (stream, _) = listener.accept()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let lent = [socket.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&lent));
    rustix::net::sendmsg(&stream, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::empty())?;
    // Until the other end closes, the socket stays this program's as well.
    let _ = (&stream).read(&mut [0]);
    Ok(())
}

/// Takes a socket that was made elsewhere, connects it and runs a script.
fn borrow(arguments: &Arguments) -> anyhow::Result<bool> {
    let path: String = arguments.one("socket")?;
    let stream = UnixStream::connect(&path)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::empty())?;
    let lent: Option<OwnedFd> = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    let lent = lent.context("no socket came")?;
    follow(arguments, Socket::from(lent), arguments.to()?, How::Blocking)
}
