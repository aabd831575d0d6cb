//! An unprivileged user of the host, a stranger on the wire and plain bad luck against the kernel half, as sentences; and a
//! random search for what nobody thought of.
//!
//! A workload `web` (uid 2001) listens strictly; an attacker is uid 3000, who is nobody and has no capability. No strict
//! listener's program ever reads a stranger's byte, whoever bound, joined, died or filled a table; whoever is allowed is
//! served in the end, or refused with a line; and the agent lives.

/// Agents on alpha and beta, or an announced skip and a return.
macro_rules! mesh {
    ($lab:expr, $policy:expr) => {
        mesh!($lab, $policy, &lab::Settings::default())
    };
    ($lab:expr, $policy:expr, $settings:expr) => {
        match $lab.only_mesh_with($policy, $settings) {
            Ok(mesh) => mesh,
            Err(skip) => {
                skip.announce($lab.test());
                return;
            }
        }
    };
}

#[path = "adversary/listeners.rs"]
mod listeners;
#[path = "adversary/shared_ports.rs"]
mod shared_ports;
#[path = "adversary/holders.rs"]
mod holders;
#[path = "adversary/dials.rs"]
mod dials;
#[path = "adversary/floods.rs"]
mod floods;
#[path = "adversary/script.rs"]
mod script;
#[path = "adversary/search.rs"]
mod search;

/// Processors have nothing to spare while this runs.
fn loaded<T>(work: impl FnOnce() -> T) -> T {
    struct Done<'a>(&'a std::sync::atomic::AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::black_box((0..10_000).sum::<u64>());
                }
            });
        }
        let _ends = Done(&done);
        work()
    })
}
