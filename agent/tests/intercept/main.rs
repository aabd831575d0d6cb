//! The kernel programs and the agent's listeners, on the running kernel: each test in a network namespace and a cgroup of
//! its own.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that meets what it did not expect has failed"
)]

mod outbound;
mod inbound;
mod agents;
mod bounds;
mod host;
mod policies;
mod reload;
mod world;

use tokio::io::AsyncWriteExt;
use world::World;

/// Not a test: what a client process runs.
#[test]
fn the_client_role() {
    if let Ok(script) = std::env::var("BUNTER_TEST_CLIENT") {
        world::play(&script);
    }
}

/// Lets the client's connection in and answers on it, as a relay would.
fn answer(world: &World) -> bunter::flow::Flow {
    let shard = world.shard();
    world.run(async {
        let mut flow = shard.accept_outbound().await.unwrap();
        flow.socket.write_all(b"answer").await.unwrap();
        // Closing it would be a reset, which may be there before the program has read.
        socket2::SockRef::from(&flow.socket).set_linger(None).unwrap();
        flow
    })
}
