//! The audit log on disk: a thread that appends lines, and what happens when it cannot.
//!
//! Shards hand over finished lines through a bounded queue and never wait for the disk. When the disk refuses a write,
//! the thread keeps what it holds, tries again every second, and continues in the middle of the line where it stopped,
//! so that the file never holds half a line followed by another. While it is failing, [`Sender::refuses`] tells the
//! pipeline to take no new connections, unless the configuration says `when_full = "continue"`.
//!
//! *Invariant:* a line that was taken is written once and whole, or counted in [`Health::lost`].

use super::Record;
use crate::lock::lock;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Lines that may wait for the disk: about 40 MB at 600 bytes a line. They are counted: a channel of bounded size has room
/// for all of them from the start, which is 2 MB that most agents never use.
const QUEUE: usize = 65_536;
/// How much is written at once.
const BATCH: usize = 256 * 1024;
/// Pause between two writes. A line that comes alone is written at once; where they come in thousands, waking the thread
/// for each would cost more than writing it.
const PAUSE: Duration = Duration::from_millis(5);
/// Pause between two attempts after a failed write.
const RETRY: Duration = Duration::from_secs(1);

/// The log cannot be opened at start.
#[derive(Debug, thiserror::Error)]
#[error("audit log {path}: {source}; make the directory, or set [audit] path", path = path.display())]
pub struct OpenError {
    path: PathBuf,
    source: std::io::Error,
}

/// How the log is doing; for `wimsey status`.
#[derive(Debug, Default)]
pub struct Health {
    /// Orders that wait for the writer, [`QUEUE`] at most.
    waiting: AtomicUsize,
    written: AtomicU64,
    lost: AtomicU64,
    failing: AtomicBool,
    last_error: Mutex<Option<String>>,
}

impl Health {
    /// Lines written since the start.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
    /// Lines dropped since the start because the queue was full.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
    /// The last write failed and has not yet been made good.
    pub fn failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }
    /// What the last failed write said.
    pub fn last_error(&self) -> Option<String> {
        lock(&self.last_error).clone()
    }
}

enum Order {
    Line(Vec<u8>),
    Reopen,
    Stop,
}

/// The handle that shards write through.
#[derive(Clone, Debug)]
pub struct Sender {
    queue: mpsc::Sender<Order>,
    health: Arc<Health>,
    refuse_when_failing: bool,
}

impl Sender {
    /// Hands over a record. Never waits and never fails: what does not fit is counted.
    pub fn send(&self, record: &Record) {
        if !self.order(Order::Line(record.line())) {
            self.health.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
    /// Must new connections be refused because nobody could be told about them (R108)?
    pub fn refuses(&self) -> bool {
        self.refuse_when_failing && self.health.failing()
    }
    /// How the log is doing.
    pub fn health(&self) -> &Health {
        &self.health
    }
    /// Closes the file and opens it again by name, after a rotation.
    pub fn reopen(&self) {
        // A full queue means that the disk is failing, and then the file is opened again anyway.
        let _ = self.order(Order::Reopen);
    }
    /// False if there is no room, or no writer any more.
    fn order(&self, order: Order) -> bool {
        // Counted first, so that the writer never takes away what is not counted yet.
        let taken = self.health.waiting.fetch_add(1, Ordering::Relaxed) < QUEUE && self.queue.send(order).is_ok();
        if !taken {
            self.health.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        taken
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
        let (queue, orders) = mpsc::channel();
        let health = Arc::new(Health::default());
        let sender = Sender { queue, health: health.clone(), refuse_when_failing };
        let writer = Writer { path: path.to_owned(), file, health, orders, batch: Vec::new(), lines: 0, start: 0 };
        let thread = std::thread::Builder::new()
            .name("wimsey-audit".into())
            .spawn(move || writer.run())
            .map_err(|source| OpenError { path: path.to_owned(), source })?;
        Ok(Self { sender, thread: Some(thread) })
    }
    /// A handle to write through.
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }
    /// Writes out what is queued and ends the thread. Lines sent later are counted as lost.
    pub fn close(mut self) {
        let _ = self.sender.queue.send(Order::Stop);
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
    orders: Receiver<Order>,
    batch: Vec<u8>,
    lines: u64,
    /// How much of the batch is on disk already.
    start: usize,
}

impl Writer {
    fn run(mut self) {
        let mut stopping = false;
        loop {
            if self.batch.is_empty() && !stopping {
                match self.orders.recv() {
                    Ok(order) => stopping |= self.take(order),
                    Err(_) => return,
                }
            }
            while self.batch.len() < BATCH {
                match self.orders.try_recv() {
                    Ok(order) => stopping |= self.take(order),
                    Err(_) => break,
                }
            }
            match self.write() {
                Ok(()) if stopping => return,
                Ok(()) => std::thread::sleep(PAUSE),
                // Nothing more can be done for these lines, and the process has to end.
                Err(_) if stopping => {
                    self.health.lost.fetch_add(self.lines, Ordering::Relaxed);
                    return;
                }
                Err(error) => self.wait_after(&error, &mut stopping),
            }
        }
    }

    /// Takes an order; true if it was the last.
    fn take(&mut self, order: Order) -> bool {
        // The last order is not counted: it has to get through where there is no room.
        if !matches!(order, Order::Stop) {
            self.health.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        match order {
            Order::Line(line) => {
                self.batch.extend_from_slice(&line);
                self.lines += 1;
                false
            }
            Order::Reopen => {
                self.reopen();
                false
            }
            Order::Stop => true,
        }
    }

    fn reopen(&mut self) {
        match open(&self.path) {
            Ok(file) => self.file = file,
            Err(error) => self.fail(&error),
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
        if self.lines > 0 {
            self.health.written.fetch_add(self.lines, Ordering::Relaxed);
            self.batch.clear();
            self.batch.shrink_to(BATCH);
            self.lines = 0;
            self.start = 0;
        }
        if self.health.failing.swap(false, Ordering::Relaxed) {
            tracing::info!(path = %self.path.display(), "the audit log is being written again");
        }
        Ok(())
    }

    fn fail(&mut self, error: &std::io::Error) {
        *lock(&self.health.last_error) = Some(error.to_string());
        if !self.health.failing.swap(true, Ordering::Relaxed) {
            tracing::error!(path = %self.path.display(), %error,
                "the audit log cannot be written: make room on its file system; what is waiting is kept and tried again");
        }
    }

    fn wait_after(&mut self, error: &std::io::Error, stopping: &mut bool) {
        self.fail(error);
        // In the middle of a line the same file must go on; between lines a new file may be better than none.
        if self.start == 0 {
            self.reopen();
        }
        match self.orders.recv_timeout(RETRY) {
            Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => *stopping = true,
            Ok(order) => {
                self.take(order);
                std::thread::sleep(RETRY / 10);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
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
        // As much again may be in the writer's batch, and a few lines go there while it tries again.
        let sent = QUEUE + BATCH / line.len() + 1000;
        let taken = (0..sent).filter(|_| sender.order(Order::Line(line.clone()))).count();
        assert!((QUEUE..sent).contains(&taken), "{taken} of {sent}");
        assert!(sender.health().waiting.load(Ordering::Relaxed) <= QUEUE);
        while sender.health().lost() == 0 {
            sender.send(&record(2));
        }
    }

    #[test]
    fn a_missing_directory_is_named_at_start() {
        let error = Log::open(Path::new("/nonexistent/audit.jsonl"), true).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/audit.jsonl"), "{error}");
    }
}
