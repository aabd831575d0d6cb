//! Processes: every program that xtask starts goes through here.
//!
//! A step runs in a process group of its own, writes its whole output to a log under `target/xtask/logs`, shows how
//! long it has taken, and on failure prints the tail of that log. Ctrl-C ends the groups and runs the clean-ups.
//!
//! *Invariant:* nothing is ended by name, only by the process group that was started here.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// What went wrong, as a person should read it.
#[derive(Debug)]
pub struct Failure(String);

/// The result of nearly everything here.
pub type Fallible<T = ()> = Result<T, Failure>;

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Failure {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// Says what was tried when an input or output error came.
pub trait During<T> {
    /// Turns the error into a [`Failure`] that begins with `what`.
    fn during(self, what: impl fmt::Display) -> Fallible<T>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl fmt::Display) -> Fallible<T> {
        self.map_err(|error| Failure(format!("{what}: {error}")))
    }
}

/// The root of the repository.
pub fn root() -> PathBuf {
    let own = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let own = own.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    own.parent().map(Path::to_path_buf).unwrap_or(own)
}

/// Where xtask keeps what it makes for this checkout: logs, images.
pub fn work(name: &str) -> PathBuf {
    let path = root().join("target/xtask").join(name);
    let _ = std::fs::create_dir_all(&path);
    path
}

/// Whether this process is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The file of a program on PATH (and in the sbin folders, which are not on everybody's PATH).
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let folders = path.split(':').chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"]);
    folders.map(|folder| Path::new(folder).join(program)).find(|file| file.is_file())
}

/// A program whose standard error goes where its standard output goes, so that a log has the right order.
pub fn merged(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 2>&1", "sh"]).arg(program);
    command
}

/// Runs a short program and gives back what it wrote to standard output, or None when it failed or is not there.
pub fn quiet(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How a step is run and shown.
pub struct Step<'a> {
    label: String,
    log: PathBuf,
    limit: Option<Duration>,
    silence: Option<Duration>,
    each_line: Option<EachLine<'a>>,
    shown: bool,
}

/// What is called with every line of a step; false ends the step.
type EachLine<'a> = Box<dyn FnMut(&str) -> bool + 'a>;

/// How a step ended.
pub struct Ended {
    /// The exit status; None when xtask ended the step itself.
    pub status: Option<ExitStatus>,
    /// Why xtask ended the step, if it did.
    pub cut: Option<String>,
    /// How long it took.
    pub took: Duration,
    /// The log.
    pub log: PathBuf,
}

impl Ended {
    /// Whether the step ended by itself with exit code 0.
    pub fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// "exit code 3", "signal 9" or why xtask ended it.
    pub fn how(&self) -> String {
        match (&self.cut, self.status) {
            (Some(why), _) => why.clone(),
            (None, Some(status)) => status.to_string(),
            (None, None) => "ended".into(),
        }
    }
}

/// A step with this label; its log's name is made from it.
pub fn step<'a>(label: impl Into<String>) -> Step<'a> {
    let label = label.into();
    let name: String = label.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    Step {
        log: work("logs").join(format!("{name}.log")),
        label,
        limit: None,
        silence: None,
        each_line: None,
        shown: true,
    }
}

impl<'a> Step<'a> {
    /// Ends the step after this time.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Ends the step when it has written nothing for this time.
    pub fn silence(mut self, limit: Duration) -> Self {
        self.silence = Some(limit);
        self
    }

    /// Calls this with every line; when it says false, the step is ended.
    pub fn each_line(mut self, each: impl FnMut(&str) -> bool + 'a) -> Self {
        self.each_line = Some(Box::new(each));
        self
    }

    /// Shows no progress: what calls it shows something better.
    pub fn unshown(mut self) -> Self {
        self.shown = false;
        self
    }

    /// Runs the command; anything but success is a failure that shows the tail of the log.
    pub fn run(self, command: Command) -> Fallible {
        let label = self.label.clone();
        let ended = self.watch(command)?;
        if ended.success() {
            return Ok(());
        }
        Err(format!("{label}: {}\n{}\n  whole log: {}", ended.how(), tail(&ended.log, 40), ended.log.display()).into())
    }

    /// Runs the command (made by [`merged`]) and says how it ended.
    pub fn watch(mut self, command: Command) -> Fallible<Ended> {
        let started = Instant::now();
        let mut log = File::create(&self.log).during(format!("cannot write {}", self.log.display()))?;
        let mut progress = Progress::new(&self.label, self.shown);
        let mut process = Process::start(&self.label, command)?;
        let output = process.child.stdout.take().ok_or("no output pipe")?;
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || read_lines(output, |line| send.send(line).is_ok()));

        let mut spoke = Instant::now();
        let mut cut = None;
        let mut gone: Option<(ExitStatus, Instant)> = None;
        let status = loop {
            match lines.recv_timeout(Duration::from_millis(250)) {
                Ok(line) => {
                    spoke = Instant::now();
                    let _ = writeln!(log, "{line}");
                    progress.line(&line);
                    let goes_on = self.each_line.as_mut().is_none_or(|each| each(&line));
                    if !goes_on && cut.is_none() {
                        cut = Some("ended".to_owned());
                    }
                }
                // Every writer has closed the pipe: only the exit status is missing.
                Err(RecvTimeoutError::Disconnected) => break Some(process.wait()?),
                Err(RecvTimeoutError::Timeout) => {}
            }
            progress.tick();
            if gone.is_none() {
                gone = process.poll()?.map(|status| (status, Instant::now()));
            }
            // A grandchild may hold the pipe open for ever.
            match gone {
                Some((status, at)) if at.elapsed() > Duration::from_secs(2) => break Some(status),
                _ => {}
            }
            if cut.is_none() {
                cut = over(self.limit, started, "took longer than")
                    .or_else(|| over(self.silence, spoke, "wrote nothing for"));
            }
            if cut.is_some() {
                process.end();
                break None;
            }
        };
        stop_if_interrupted();
        progress.done();
        Ok(Ended { status: if cut.is_some() { None } else { status }, cut, took: started.elapsed(), log: self.log })
    }
}

fn over(limit: Option<Duration>, since: Instant, what: &str) -> Option<String> {
    let limit = limit?;
    (since.elapsed() > limit).then(|| format!("{what} {} and was ended", seconds(limit)))
}

fn read_lines(from: impl io::Read, mut each: impl FnMut(String) -> bool) {
    let mut reader = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                if !each(text.trim_end_matches(['\n', '\r']).to_owned()) {
                    return;
                }
            }
        }
    }
}

/// "7 s" or "3 min 20 s".
pub fn seconds(time: Duration) -> String {
    let all = time.as_secs();
    if all < 60 { format!("{:.1} s", time.as_secs_f32()) } else { format!("{} min {} s", all / 60, all % 60) }
}

/// The last lines of a log, indented.
pub fn tail(log: &Path, count: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut last: VecDeque<&str> = VecDeque::new();
    for line in text.lines() {
        if last.len() == count {
            last.pop_front();
        }
        last.push_back(line);
    }
    last.into_iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

/// Shows a running step: one line that is rewritten on a terminal, a line every half minute elsewhere.
struct Progress {
    label: String,
    started: Instant,
    told: Instant,
    last: String,
    terminal: bool,
    shown: bool,
}

impl Progress {
    fn new(label: &str, shown: bool) -> Self {
        let now = Instant::now();
        let terminal = io::stdout().is_terminal();
        Self { label: label.to_owned(), started: now, told: now, last: String::new(), terminal, shown }
    }

    fn line(&mut self, line: &str) {
        self.last = line.chars().filter(|c| !c.is_control()).take(60).collect();
    }

    fn tick(&mut self) {
        let pause = if self.terminal { 1 } else { 30 };
        if !self.shown || self.told.elapsed() < Duration::from_secs(pause) {
            return;
        }
        self.told = Instant::now();
        let took = seconds(self.started.elapsed());
        if self.terminal {
            print!("\r\x1b[K  {} ({took}) {}", self.label, self.last.trim());
            let _ = io::stdout().flush();
        } else {
            println!("  {} ({took} so far)", self.label);
        }
    }

    fn done(&mut self) {
        if self.shown {
            let start = if self.terminal { "\r\x1b[K" } else { "" };
            println!("{start}  {} ({})", self.label, seconds(self.started.elapsed()));
        }
    }
}

/// A running program with its own process group, ended when this is dropped.
pub struct Process {
    child: Child,
    group: Pid,
    ended: bool,
}

static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

impl Process {
    /// Starts the program with no input; its output is a pipe unless the caller set something else.
    pub fn start(label: &str, mut command: Command) -> Fallible<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        Self::start_as_is(label, command)
    }

    /// Starts the program as it was set up, in its own process group.
    pub fn start_as_is(label: &str, mut command: Command) -> Fallible<Self> {
        stop_if_interrupted();
        command.process_group(0);
        // The lock is held over the start, so that an interrupt cannot fall between the start and the list.
        let mut groups = lock(&GROUPS);
        let child = command.spawn().during(format!("{label}: cannot start"))?;
        let group = Pid::from_child(&child);
        groups.push(group);
        Ok(Self { child, group, ended: false })
    }

    /// The exit status, if it has ended.
    pub fn poll(&mut self) -> Fallible<Option<ExitStatus>> {
        let mut groups = lock(&GROUPS);
        let status = self.child.try_wait().during("cannot wait")?;
        if status.is_some() && !self.ended {
            self.ended = true;
            groups.retain(|group| *group != self.group);
        }
        Ok(status)
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> Fallible<ExitStatus> {
        loop {
            if let Some(status) = self.poll()? {
                stop_if_interrupted();
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks the group to end, and makes it after three seconds.
    pub fn end(&mut self) {
        self.signal(Signal::TERM);
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(3) {
            if !matches!(self.poll(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.signal(Signal::KILL);
        let _ = self.wait();
    }

    /// Sends a signal to the whole group, if it has not ended.
    pub fn signal(&mut self, signal: Signal) {
        if let Ok(None) = self.poll() {
            let _ = kill_process_group(self.group, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.ended {
            self.end();
        }
    }
}

type Undo = Box<dyn FnOnce() + Send>;

static CLEANUPS: Mutex<Vec<(u64, Undo)>> = Mutex::new(Vec::new());
static NEXT: AtomicU64 = AtomicU64::new(0);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Something to undo exactly once: when this is dropped, or when xtask is interrupted.
#[must_use = "the clean-up runs at once when this is dropped"]
pub struct Cleanup(u64);

/// Remembers how to undo something.
pub fn on_exit(undo: impl FnOnce() + Send + 'static) -> Cleanup {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    lock(&CLEANUPS).push((number, Box::new(undo)));
    Cleanup(number)
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        let mut all = lock(&CLEANUPS);
        let found = all.iter().position(|(number, _)| *number == self.0).map(|at| all.remove(at));
        drop(all);
        if let Some((_, undo)) = found {
            undo();
        }
    }
}

/// Makes Ctrl-C, a hang-up and SIGTERM end what was started and undo what was done.
pub fn arm() -> Fallible {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).during("cannot catch signals")?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            println!("\nInterrupted: ending what was started and cleaning up");
            end_all();
            loop {
                let undo = lock(&CLEANUPS).pop();
                match undo {
                    Some((_, undo)) => undo(),
                    None => break,
                }
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

fn end_all() {
    let all = lock(&GROUPS).clone();
    for group in &all {
        let _ = kill_process_group(*group, Signal::TERM);
    }
    let asked = Instant::now();
    while asked.elapsed() < Duration::from_secs(3) && !lock(&GROUPS).is_empty() {
        std::thread::sleep(Duration::from_millis(50));
    }
    for group in lock(&GROUPS).iter() {
        let _ = kill_process_group(*group, Signal::KILL);
    }
}

/// The interrupted main thread goes no further: the signal thread cleans up and exits.
fn stop_if_interrupted() {
    if INTERRUPTED.load(Ordering::SeqCst) && std::thread::current().name() == Some("main") {
        loop {
            std::thread::park();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
