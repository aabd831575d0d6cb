//! A shard: one thread, one single-threaded runtime, listeners of its own. A flow stays here from accept to close.
//!
//! *Invariant:* no flow leaves the thread that accepted it, and shards share nothing but what [`AgentState`] holds.

use crate::busy_poll;
use crate::flow::Direction;
use crate::intercept::{Error, ShardListeners, UnboundListeners};
use crate::pipeline::{self, AgentState, Site};
use crate::reuse::Pool;
use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::LocalSet;

/// Pause after an accept that failed for want of resources, so that a full table is no busy loop.
const PAUSE: Duration = Duration::from_millis(20);

/// How often idle connections that have waited for too long are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// Starts the thread of one shard. It ends when `closing` turns true and its last flow is over.
pub fn start(
    unbound: UnboundListeners,
    shared: Arc<AgentState>,
    closing: watch::Receiver<bool>,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    let index = unbound.shard();
    std::thread::Builder::new().name(format!("bunter-shard{index}")).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return tracing::error!(shard = index, %error, "a shard has no runtime"),
        };
        let flows = LocalSet::new();
        if let Err(error) = runtime.block_on(flows.run_until(serve(shared, unbound, closing))) {
            tracing::error!(shard = index, %error, "a shard cannot take connections");
        }
        // The listeners are gone. Flows that are under way may finish; the daemon ends them when the time to drain is over.
        runtime.block_on(flows);
    })
}

async fn serve(
    shared: Arc<AgentState>,
    unbound: UnboundListeners,
    mut closing: watch::Receiver<bool>,
) -> Result<(), Error> {
    let listeners = unbound.open()?;
    let site = Rc::new(Site {
        dialler: listeners.dialler(),
        pool: RefCell::new(Pool::new(
            shared.config.sessions,
            shared.config.limits.connections / 4 / shared.shards.max(1),
        )),
        without_reuse: RefCell::new(HashSet::new()),
        closing: closing.clone(),
    });
    tokio::select! {
        () = accept(&shared, &site, &listeners, Direction::Outbound) => {}
        () = accept(&shared, &site, &listeners, Direction::Inbound) => {}
        () = tidy(&shared, &site) => {}
        () = busy_poll::run(), if shared.config.busy_poll => {}
        _ = closing.wait_for(|closing| *closing) => {}
    }
    site.pool.borrow_mut().close();
    // The listeners close here. Flows that are under way have what they need.
    Ok(())
}

/// Closes the connections that wait for another use: all of them when policy or trust change, else what has waited too long.
async fn tidy(shared: &AgentState, site: &Site) {
    let mut changed = shared.changed.subscribe();
    loop {
        match tokio::time::timeout(SWEEP, changed.changed()).await {
            Ok(Ok(())) => {
                site.pool.borrow_mut().clear();
                site.without_reuse.borrow_mut().clear();
            }
            // The sender is gone, because the agent ends.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => site.pool.borrow_mut().sweep(Instant::now()),
        }
    }
}

async fn accept(shared: &Arc<AgentState>, site: &Rc<Site>, listeners: &ShardListeners, direction: Direction) {
    loop {
        let accepted = match direction {
            Direction::Outbound => listeners.accept_outbound().await,
            Direction::Inbound => listeners.accept_inbound().await,
        };
        match accepted {
            Ok(flow) => {
                let (shared, site) = (shared.clone(), site.clone());
                tokio::task::spawn_local(async move { pipeline::serve(&shared, &site, flow).await });
            }
            Err(error) => {
                pipeline::reject_stray(shared, direction, &error);
                if matches!(error, Error::Accept { .. }) {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}
