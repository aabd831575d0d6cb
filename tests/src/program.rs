//! A running program with its output, ended when dropped.
//!
//! *Invariant:* every wait has a deadline, and a deadline that passes shows what the program said until then.

use crate::clock;
use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How a program ended and what it said.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it was started, for messages.
    pub title: String,
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Its output, if it ended well; a panic that shows everything, if not.
    #[track_caller]
    pub fn good(self) -> String {
        assert!(self.status.success(), "{self:#?}");
        self.stdout
    }

    /// Everything it said, if it did not end well; a panic, if it did.
    #[track_caller]
    pub fn bad(self) -> String {
        assert!(!self.status.success(), "this should have failed: {self:#?}");
        format!("{}{}", self.stdout, self.stderr)
    }

    /// The last line of the output as JSON.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        let text = self.good();
        let line = text.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
    }
}

#[derive(Default)]
struct Lines {
    text: String,
    ended: bool,
}

/// One stream of output, collected by a thread.
#[derive(Clone, Default)]
struct Stream(Arc<(Mutex<Lines>, Condvar)>);

impl Stream {
    fn collect(&self, source: impl std::io::Read + Send + 'static) -> JoinHandle<()> {
        let stream = self.clone();
        std::thread::spawn(move || {
            let mut source = BufReader::new(source);
            let mut line = Vec::new();
            loop {
                line.clear();
                let size = source.read_until(b'\n', &mut line).unwrap_or(0);
                let mut lines = stream.0.0.lock().unwrap_or_else(PoisonError::into_inner);
                lines.text.push_str(&String::from_utf8_lossy(&line));
                lines.ended = size == 0;
                stream.0.1.notify_all();
                if size == 0 {
                    return;
                }
            }
        })
    }

    fn text(&self) -> String {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).text.clone()
    }

    /// Waits for a whole line from `start` on that satisfies the condition.
    fn wait(&self, start: usize, limit: Duration, wanted: impl Fn(&str) -> bool) -> Option<(String, usize)> {
        let end = Instant::now() + limit;
        let mut lines = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = start;
        loop {
            while let Some(length) = lines.text[at..].find('\n') {
                let line = &lines.text[at..at + length];
                at += length + 1;
                if wanted(line) {
                    return Some((line.to_owned(), at));
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            if lines.ended || left.is_zero() {
                return None;
            }
            lines = self.0.1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A running program.
pub struct Program {
    title: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Stream,
    stderr: Stream,
    collectors: Vec<JoinHandle<()>>,
    read_to: usize,
}

impl Program {
    /// Starts it, with pipes on all three streams.
    pub fn start(mut command: Command, title: impl Into<String>) -> crate::Result<Self> {
        let title = title.into();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {title}"))?;
        let (stdout, stderr) = (Stream::default(), Stream::default());
        let mut collectors = Vec::new();
        collectors.extend(child.stdout.take().map(|pipe| stdout.collect(pipe)));
        collectors.extend(child.stderr.take().map(|pipe| stderr.collect(pipe)));
        let stdin = child.stdin.take();
        Ok(Self { title, child, stdin, stdout, stderr, collectors, read_to: 0 })
    }

    /// Process id: the program's own.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output until now.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it has written to standard error until now.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits for the next line of standard output that satisfies the condition. Lines before it are passed over.
    pub fn line(&mut self, limit: Duration, wanted: impl Fn(&str) -> bool) -> crate::Result<String> {
        match self.stdout.wait(self.read_to, limit, wanted) {
            Some((line, at)) => {
                self.read_to = at;
                Ok(line)
            }
            None => bail!(
                "{} did not say what was waited for within {limit:?}\n  stdout: {}\n  stderr: {}",
                self.title,
                self.stdout(),
                self.stderr()
            ),
        }
    }

    /// Waits for the next line of standard output that is a JSON object and satisfies the condition.
    #[track_caller]
    pub fn event(&mut self, wanted: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        let parse = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
        match self.line(clock::seconds(20), |line| parse(line).is_some_and(|value| wanted(&value))) {
            Ok(line) => parse(&line).unwrap_or_default(),
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Waits for the result of the named step of a script.
    #[track_caller]
    pub fn step(&mut self, name: &str) -> serde_json::Value {
        self.event(|event| event["step"] == name)
    }

    /// Waits until a server says that it is ready.
    pub fn ready(&mut self) -> crate::Result<()> {
        self.line(clock::seconds(20), |line| line.starts_with("READY")).map(|_| ())
    }

    /// Writes a line to standard input.
    pub fn say(&mut self, line: &str) -> crate::Result<()> {
        let pipe = self.stdin.as_mut().context("standard input is closed")?;
        pipe.write_all(format!("{line}\n").as_bytes()).with_context(|| format!("tell {}", self.title))
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Has it ended?
    pub fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    pub fn wait(mut self, limit: Duration) -> crate::Result<Outcome> {
        self.end(limit)
    }

    /// Waits for its end and leaves the guard alive.
    pub fn end(&mut self, limit: Duration) -> crate::Result<Outcome> {
        let Some(status) = clock::until(limit, || self.child.try_wait().ok().flatten()) else {
            bail!(
                "{} did not end within {limit:?}\n  stdout: {}\n  stderr: {}",
                self.title,
                self.stdout(),
                self.stderr()
            );
        };
        // A daemon that the program left behind may hold the pipes open: then what has come is all there is.
        let _ = clock::until(clock::seconds(2), || self.collectors.iter().all(JoinHandle::is_finished).then_some(()));
        Ok(Outcome { title: self.title.clone(), status, stdout: self.stdout(), stderr: self.stderr() })
    }

    /// Waits for its end with the usual deadline, and panics if it passes.
    #[track_caller]
    pub fn outcome(self) -> Outcome {
        match self.wait(clock::seconds(30)) {
            Ok(outcome) => outcome,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Resident memory, in bytes.
    pub fn resident(&self) -> u64 {
        resident(self.pid())
    }
}

/// Resident memory of a process, in bytes; 0 if it is gone.
pub fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

impl Drop for Program {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
