//! A first measurement, as ratios within one run; the lab's benchmarks measure it properly.
//!
//! `cargo test --release -p bunter --lib -- relay::tests::smoke --ignored --nocapture`

use super::*;
use std::{
    io::{Read, Write},
    thread,
    time::Instant,
};

/// Bytes of one run.
const LENGTH: usize = 4 << 30;
const ROUNDS: u32 = 20_000;

fn blocking(socket: TcpStream) -> std::net::TcpStream {
    let socket = socket.into_std().unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_nodelay(true).unwrap();
    socket
}

/// Each pipe on a thread and a runtime of its own, as on two hosts.
fn on_shards(pipes: Vec<Pipe>) -> Vec<thread::JoinHandle<Tally>> {
    let start = |pipe: Pipe| {
        let (application, network) = (pipe.application.into_std().unwrap(), pipe.network.into_std().unwrap());
        let protection = pipe.protection;
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let application = TcpStream::from_std(application).unwrap();
                let network = TcpStream::from_std(network).unwrap();
                let pipe = Pipe { application, network, protection, early: Vec::new(), agreement: None };
                carry(pipe, &Limits::default(), pending(), &Progress::default()).await.0
            })
        })
    };
    pipes.into_iter().map(start).collect()
}

fn measure(name: &str, left: TcpStream, right: TcpStream, pipes: Vec<Pipe>) {
    let (mut left, mut right) = (blocking(left), blocking(right));
    let shards = on_shards(pipes);
    let mut echo = right.try_clone().unwrap();
    let echoing = thread::spawn(move || {
        let mut word = [0; 64];
        for _ in 0..ROUNDS {
            echo.read_exact(&mut word).unwrap();
            echo.write_all(&word).unwrap();
        }
    });
    let started = Instant::now();
    let mut word = [7; 64];
    for _ in 0..ROUNDS {
        left.write_all(&word).unwrap();
        left.read_exact(&mut word).unwrap();
    }
    let round = started.elapsed() / ROUNDS;
    echoing.join().unwrap();
    let (started, spent) = (Instant::now(), cpu());
    let sending = thread::spawn(move || {
        let piece = vec![7; 128 << 10];
        for _ in 0..LENGTH / piece.len() {
            left.write_all(&piece).unwrap();
        }
        left.shutdown(std::net::Shutdown::Write).unwrap();
        left.read_to_end(&mut Vec::new()).unwrap();
    });
    let (mut room, mut total) = (vec![0; 256 << 10], 0);
    loop {
        match right.read(&mut room).unwrap() {
            0 => break,
            length => total += length,
        }
    }
    assert_eq!(total, LENGTH);
    let spent = (cpu() - spent) / (total as f64 / 1e9);
    let gigabits = (total * 8) as f64 / started.elapsed().as_secs_f64() / 1e9;
    drop(right);
    sending.join().unwrap();
    for shard in shards {
        assert_eq!(shard.join().unwrap().closed, CloseReason::Complete);
    }
    println!("{name:<50} {gigabits:6.1} Gb/s  {spent:5.2} CPU s/GB in all  {round:>9.1?} a round trip of 64 bytes");
}

fn cpu() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[tokio::test]
#[ignore = "a measurement, for a release build on a quiet machine"]
async fn two_hops_by_each_engine_beside_plain_tcp() {
    for _ in 0..3 {
        let (left, right) = pair().await;
        measure("plain TCP", left, right, Vec::new());

        let ((left, a), (b, c), (d, right)) = (program().await, pair().await, pair().await);
        let pipes = vec![Pipe::plain(a, b).unwrap(), Pipe::plain(d, c).unwrap()];
        measure("two plain relays", left, right, pipes);

        for ciphers in [Ciphers::All, Ciphers::ChaChaOnly] {
            let sessions = World::new().sessions(ciphers).await;
            let name = format!("two relays, {:?} {}", engine().engine(), sessions.client.accepted().cipher());
            let (right, upstream) = program().await;
            let pipes =
                vec![arm(sessions.client, engine()).unwrap(), arm(sessions.server.joined(upstream), engine()).unwrap()];
            measure(&name, sessions.client_application, right, pipes);
        }
    }
}
