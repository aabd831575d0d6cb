//! The audit log on disk: a thread that appends lines, and what happens when it cannot.
//!
//! Shards append finished lines to a bounded buffer and never wait for the disk. When the disk refuses a write, the thread
//! keeps what it holds, tries again every second, and continues in the middle of the line where it stopped, so that the
//! file never holds half a line followed by another. While it is failing, [`Sender::refuses`] tells the pipeline to take no
//! new connections, unless the configuration says `when_full = "continue"`.
//!
//! Where the file cannot be opened again after a rotation, lines go on in the one that is open, and opening is tried again
//! every second as well. No connection is refused for that.
//!
//! *Invariant:* each line is either written once and whole, or counted in [`Health::lost`].

use super::Record;
use super::repeats::Repeats;
use crate::lock::lock;
use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may wait for the disk: about 40 MB at 600 bytes a line.
const LINES: usize = 65_536;
/// How much memory is kept for lines while few come.
const USUAL: usize = 64 * 1024;
/// Pause between two writes. A line that comes alone is written at once; where they come in thousands, waking the thread
/// for each would cost more than writing it.
const PAUSE: Duration = Duration::from_millis(5);
/// Pause between two attempts after a failed write, or when the file could not be opened again.
const RETRY: Duration = Duration::from_secs(1);

/// The log cannot be opened at start.
#[derive(Debug, thiserror::Error)]
#[error("audit log {path}: {source}; make the directory, or set [audit] path", path = path.display())]
pub struct OpenError {
    path: PathBuf,
    source: std::io::Error,
}

/// How the log is doing; for `bunter status`.
#[derive(Debug, Default)]
pub struct Health {
    written: AtomicU64,
    lost: AtomicU64,
    /// The last write failed.
    unwritable: AtomicBool,
    /// The file that is written to is not, or may not be, the one that has the log's name.
    outdated: AtomicBool,
    last_error: Mutex<Option<String>>,
}

impl Health {
    /// Lines written since the start.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
    /// Lines dropped since the start because too many were waiting.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
    /// The last write failed, or the file could not be opened again, and that has not yet been made good.
    pub fn failing(&self) -> bool {
        self.unwritable.load(Ordering::Relaxed) || self.outdated.load(Ordering::Relaxed)
    }
    /// What the last failure said.
    pub fn last_error(&self) -> Option<String> {
        lock(&self.last_error).clone()
    }
}

/// What the shards hand over to the writer.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    ring: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Whole lines that the writer has not taken.
    text: Vec<u8>,
    /// How many these are.
    lines: usize,
    /// Lines that the writer has taken and not written.
    taken: usize,
    /// The writer waits for the next line.
    asleep: bool,
    reopen: bool,
    /// The writer ends: nothing is taken any more.
    stop: bool,
}

impl Queue {
    /// False where there is no room, or no writer any more.
    fn put(&self, line: &[u8]) -> bool {
        let mut waiting = lock(&self.waiting);
        if waiting.stop || waiting.lines + waiting.taken >= LINES {
            return false;
        }
        waiting.text.extend_from_slice(line);
        waiting.lines += 1;
        if std::mem::take(&mut waiting.asleep) {
            self.ring.notify_one();
        }
        true
    }

    fn tell(&self, what: impl FnOnce(&mut Waiting)) {
        what(&mut lock(&self.waiting));
        self.ring.notify_one();
    }
}

/// The handle that shards write through.
#[derive(Clone, Debug)]
pub struct Sender {
    queue: Arc<Queue>,
    health: Arc<Health>,
    refuse_when_failing: bool,
    repeats: Arc<Mutex<Repeats>>,
}

thread_local! {
    /// Where a line is written before it is handed over.
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Sender {
    /// Hands over a record. Never waits for the disk and never fails: what does not fit is counted.
    pub fn send(&self, record: &Record) {
        let taken = LINE.with_borrow_mut(|line| {
            line.clear();
            record.write(line);
            self.queue.put(line)
        });
        if !taken {
            self.health.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
    /// The same for a refusal, by this process or by the kernel. What repeats faster than anybody can read is counted, and
    /// handed over by [`Sender::collect`].
    pub fn send_refusal(&self, record: Record) {
        let now = lock(&self.repeats).take(record, Instant::now());
        now.iter().for_each(|record| self.send(record));
    }
    /// Hands over what was counted, where it has waited long enough. To be called every second or two.
    pub fn collect(&self) {
        self.hand_over(false);
    }
    fn hand_over(&self, all: bool) {
        let due = lock(&self.repeats).due(Instant::now(), all);
        due.iter().for_each(|record| self.send(record));
    }
    /// Must new connections be refused because nobody could be told about them (R108)?
    pub fn refuses(&self) -> bool {
        self.refuse_when_failing && self.health.unwritable.load(Ordering::Relaxed)
    }
    /// How the log is doing.
    pub fn health(&self) -> &Health {
        &self.health
    }
    /// Closes the file and opens it again by name, after a rotation.
    pub fn reopen(&self) {
        self.queue.tell(|waiting| waiting.reopen = true);
    }
}

/// The writing thread.
#[derive(Debug)]
pub struct Log {
    sender: Sender,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Log {
    /// Opens the log for appending (mode 0600) and starts the thread.
    pub fn open(path: &Path, refuse_when_failing: bool) -> Result<Self, OpenError> {
        let file = open(path).map_err(|source| OpenError { path: path.to_owned(), source })?;
        let (queue, health) = (Arc::<Queue>::default(), Arc::<Health>::default());
        let repeats = Arc::default();
        let sender = Sender { queue: queue.clone(), health: health.clone(), refuse_when_failing, repeats };
        let path_of_writer = path.to_owned();
        let writer = Writer { path: path_of_writer, file, health, queue, batch: Vec::new(), start: 0, reopen_at: None };
        let thread = std::thread::Builder::new()
            .name("bunter-audit".into())
            .spawn(move || writer.run())
            .map_err(|source| OpenError { path: path.to_owned(), source })?;
        Ok(Self { sender, thread: Some(thread) })
    }
    /// A handle to write through.
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }
    /// Writes out what is waiting and ends the thread. Lines sent later are counted as lost.
    pub fn close(mut self) {
        self.sender.hand_over(true);
        self.sender.queue.tell(|waiting| waiting.stop = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

struct Writer {
    path: PathBuf,
    file: File,
    health: Arc<Health>,
    queue: Arc<Queue>,
    /// Lines that were taken; `Waiting::taken` is their number.
    batch: Vec<u8>,
    /// How much of the batch is on disk already.
    start: usize,
    /// When to open the file again, where that has failed.
    reopen_at: Option<Instant>,
}

impl Writer {
    fn run(mut self) {
        loop {
            let stopping = self.batch.is_empty() && self.take();
            match self.write() {
                Ok(()) if stopping => return,
                Ok(()) => std::thread::sleep(PAUSE),
                Err(error) => {
                    self.fail(&error);
                    if self.wait_after() {
                        return self.give_up();
                    }
                }
            }
        }
    }

    /// Waits until there is something to do, and takes all of it. True: nothing will come after it.
    fn take(&mut self) -> bool {
        let queue = self.queue.clone();
        let mut waiting = lock(&queue.waiting);
        while waiting.lines == 0 && !waiting.reopen && !waiting.stop && !self.is_to_reopen() {
            waiting.asleep = true;
            waiting = match self.reopen_at {
                None => queue.ring.wait(waiting).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let time = at.saturating_duration_since(Instant::now());
                    queue.ring.wait_timeout(waiting, time).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        std::mem::swap(&mut self.batch, &mut waiting.text);
        waiting.taken = std::mem::take(&mut waiting.lines);
        let (reopen, stop) = (std::mem::take(&mut waiting.reopen), waiting.stop);
        drop(waiting);
        if reopen || self.is_to_reopen() {
            self.reopen();
        }
        stop
    }

    /// Did opening the file fail, and is it time to try again?
    fn is_to_reopen(&self) -> bool {
        self.reopen_at.is_some_and(|at| at <= Instant::now())
    }

    fn reopen(&mut self) {
        match open(&self.path) {
            Ok(file) => {
                self.file = file;
                self.reopen_at = None;
                if self.health.outdated.swap(false, Ordering::Relaxed) {
                    tracing::info!(path = %self.path.display(), "the audit log has been opened again");
                }
            }
            Err(error) => {
                self.reopen_at = Some(Instant::now() + RETRY);
                *lock(&self.health.last_error) = Some(format!("the file cannot be opened again: {error}"));
                if !self.health.outdated.swap(true, Ordering::Relaxed) {
                    tracing::error!(path = %self.path.display(), %error,
                        "the audit log cannot be opened again: make its directory, or let the agent write there; lines go on in \
                         the file that is open, and it is tried again");
                }
            }
        }
    }

    fn write(&mut self) -> std::io::Result<()> {
        while let Some(rest) = self.batch.get(self.start..).filter(|rest| !rest.is_empty()) {
            match self.file.write(rest) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(count) => self.start += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if !self.batch.is_empty() {
            self.batch.clear();
            self.batch.shrink_to(USUAL);
            self.start = 0;
            let lines = std::mem::take(&mut lock(&self.queue.waiting).taken);
            self.health.written.fetch_add(lines as u64, Ordering::Relaxed);
        }
        if self.health.unwritable.swap(false, Ordering::Relaxed) {
            tracing::info!(path = %self.path.display(), "the audit log is being written again");
        }
        Ok(())
    }

    fn fail(&mut self, error: &std::io::Error) {
        *lock(&self.health.last_error) = Some(error.to_string());
        if !self.health.unwritable.swap(true, Ordering::Relaxed) {
            tracing::error!(path = %self.path.display(), %error,
                "the audit log cannot be written: make room on its file system; what is waiting is kept and tried again");
        }
    }

    /// Waits before the next attempt. True: the agent ends, and there is no time for one.
    fn wait_after(&mut self) -> bool {
        let queue = self.queue.clone();
        // A line that is half written must go on in the same file; otherwise one that is opened anew may work.
        let may_reopen = self.start == 0;
        let nothing = |waiting: &mut Waiting| !(waiting.stop || waiting.reopen && may_reopen);
        let woken = queue.ring.wait_timeout_while(lock(&queue.waiting), RETRY, nothing);
        let (mut waiting, _) = woken.unwrap_or_else(PoisonError::into_inner);
        let stop = waiting.stop;
        if may_reopen {
            waiting.reopen = false;
            drop(waiting);
            self.reopen();
        }
        stop && self.write().is_err()
    }

    /// Counts what could not be written as lost.
    fn give_up(self) {
        let waiting = lock(&self.queue.waiting);
        self.health.lost.fetch_add((waiting.taken + waiting.lines) as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::tests_support::record;

    #[test]
    fn lines_arrive_whole_in_order_and_before_close_returns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let log = Log::open(&path, true).unwrap();
        for flow in 0..1000 {
            log.sender().send(&record(flow));
        }
        let sender = log.sender();
        log.close();
        let text = std::fs::read_to_string(&path).unwrap();
        for (index, line) in text.lines().enumerate() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(value["flow"], index);
        }
        assert_eq!(text.lines().count(), 1000);
        assert_eq!(sender.health().written(), 1000);
    }

    #[test]
    fn a_rotated_log_goes_on_in_a_new_file_under_the_old_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let log = Log::open(&path, true).unwrap();
        log.sender().send(&record(1));
        while log.sender().health().written() < 1 {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::fs::rename(&path, folder.path().join("audit.jsonl.1")).unwrap();
        log.sender().reopen();
        log.sender().send(&record(2));
        log.close();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
    }

    #[test]
    fn a_log_that_cannot_be_opened_again_says_so_until_it_is_and_goes_on_in_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, away) = (folder.path().join("log"), folder.path().join("away"));
        let path = directory.join("audit.jsonl");
        std::fs::create_dir(&directory).unwrap();
        let log = Log::open(&path, true).unwrap();
        let sender = log.sender();
        let until = |done: &dyn Fn(&Health) -> bool| {
            let begun = Instant::now();
            while !done(sender.health()) {
                assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", sender.health());
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        std::fs::rename(&directory, &away).unwrap();
        sender.reopen();
        until(&Health::failing);
        for flow in 0..3 {
            sender.send(&record(flow));
            until(&|health| health.written() > flow);
            std::thread::sleep(2 * PAUSE);
            assert!(sender.health().failing(), "and it is written");
        }
        assert!(sender.health().last_error().unwrap().contains("No such file"));
        assert!(!sender.refuses(), "nothing is lost");
        std::fs::create_dir(&directory).unwrap();
        until(&|health| !health.failing());
        sender.send(&record(3));
        log.close();
        let lines = |directory: &Path| std::fs::read_to_string(directory.join("audit.jsonl")).unwrap().lines().count();
        assert_eq!((lines(&away), lines(&directory), sender.health().lost()), (3, 1, 0));
    }

    #[test]
    fn a_device_that_is_full_makes_new_connections_wait_outside() {
        let log = Log::open(Path::new("/dev/full"), true).unwrap();
        let sender = log.sender();
        assert!(!sender.refuses());
        sender.send(&record(1));
        while !sender.refuses() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(sender.health().last_error().unwrap().contains("No space left"));
        log.close();
        assert_eq!((sender.health().written(), sender.health().lost()), (0, 1));
    }

    #[test]
    fn lines_that_the_queue_has_no_room_for_are_counted_as_lost() {
        let log = Log::open(Path::new("/dev/full"), true).unwrap();
        let sender = log.sender();
        let line = record(1).line();
        // The writer may have taken some of them meanwhile; they count as well.
        let taken = (0..2 * LINES).filter(|_| sender.queue.put(&line)).count();
        assert_eq!(taken, LINES);
        sender.send(&record(2));
        assert_eq!(sender.health().lost(), 1);
        log.close();
        assert_eq!((sender.health().written(), sender.health().lost()), (0, LINES as u64 + 1));
        sender.send(&record(3));
        assert_eq!(sender.health().lost(), LINES as u64 + 2, "nobody writes any more");
    }

    #[test]
    fn a_missing_directory_is_named_at_start() {
        let error = Log::open(Path::new("/nonexistent/audit.jsonl"), true).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/audit.jsonl"), "{error}");
    }
}
