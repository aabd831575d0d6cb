//! A shard: one thread, one single-threaded runtime, one door. Flows live and die here.
//!
//! *Invariant:* no flow leaves the thread that accepted it, and nothing here is shared but what [`Shared`] holds.

use crate::intercept::{Direction, Door, Doorway, Error};
use crate::pipeline::{self, Shared};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::LocalSet;

/// Pause after an accept that failed for want of resources, so that a full table is no busy loop.
const PAUSE: Duration = Duration::from_millis(20);

/// Starts the thread of one shard. It ends when `closing` turns true and its last flow is over.
pub fn start(
    doorway: Doorway,
    shared: Arc<Shared>,
    closing: watch::Receiver<bool>,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    let index = doorway.shard();
    std::thread::Builder::new().name(format!("wimsey-shard{index}")).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return tracing::error!(shard = index, %error, "a shard has no runtime"),
        };
        let flows = LocalSet::new();
        if let Err(error) = runtime.block_on(flows.run_until(serve(shared, doorway, closing))) {
            tracing::error!(shard = index, %error, "a shard cannot take connections");
        }
        // The listeners are gone; what runs may finish, and the daemon ends it when the time to drain is over.
        runtime.block_on(flows);
    })
}

async fn serve(shared: Arc<Shared>, doorway: Doorway, mut closing: watch::Receiver<bool>) -> Result<(), Error> {
    let door = doorway.open()?;
    tokio::select! {
        () = accept(&shared, &door, Direction::Outbound) => {}
        () = accept(&shared, &door, Direction::Inbound) => {}
        _ = closing.wait_for(|closing| *closing) => {}
    }
    // The door closes here. Flows that are under way have what they need.
    Ok(())
}

async fn accept(shared: &Arc<Shared>, door: &Door, direction: Direction) {
    loop {
        let accepted = match direction {
            Direction::Outbound => door.accept_outbound().await,
            Direction::Inbound => door.accept_inbound().await,
        };
        match accepted {
            Ok(flow) => {
                let (shared, dialler) = (shared.clone(), door.dialler());
                tokio::task::spawn_local(async move { pipeline::walk(&shared, &dialler, flow).await });
            }
            Err(error) => {
                pipeline::turned_away(shared, direction, &error);
                if matches!(error, Error::Accept { .. }) {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}
