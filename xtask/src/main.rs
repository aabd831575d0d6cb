//! `cargo xtask <verb>`: everything that is done to this repository, with one command each.
//!
//! *Invariant:* CI runs these verbs and nothing else, so what passes here passes there.

mod bench;
mod build;
mod check;
mod codes;
mod count;
mod demo;
mod draw;
mod guests;
mod imports;
mod initramfs;
mod run;
mod setup;
mod source;
mod test;
mod vm;
mod wire;

use std::process::ExitCode;

use run::Fallible;
use setup::Need;

const HELP: &str = "\
cargo xtask <verb>

  setup                     bring the pinned toolchain, Debian packages, the BPF linker and cargo-deny
  build                     the kernel programs, then the agent (target/release/bunter)
  demo [--vm]               the main job on one screen, on two hosts made of network namespaces, or in a guest
  check                     format, lints, licences, documentation, order of modules, fence around unsafe, pictures,
                            policies
  test [tier...] [-- word]  tiers: pure, namespaces, vm (or vm=6.12 for one kernel); all without a name; only tests whose
                            name has the word
  vm [kernel...] [-- cmd]   boot Debian kernels in QEMU (a suite, a version such as 6.12, or newest) and run a command
  draw                      the pictures of the documentation, from docs/pictures/*.txt
  policy <dir...>           check policies and run their [[expect]] cases
  bench [option...]         the benchmarking lab: plain TCP, relays, proxies, Bunter, interleaved; --quick, --only PEER,PEER,
                            --peer ztunnel=FILE, --cores N,N, --json FILE; all of them: target/release/lab-bench --help
  bench micro [-- word]     the benchmarks of benches/
  help                      this

Each verb brings what it needs first; what is there already is left alone. Logs: target/xtask/logs";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = run::arm().and_then(|()| verb(&words));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("\nerror: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn verb(words: &[String]) -> Fallible {
    let (own, after) = match words.iter().position(|word| word == "--") {
        Some(at) => (&words[..at], &words[at + 1..]),
        None => (words, &words[words.len()..]),
    };
    let Some((verb, rest)) = own.split_first() else {
        println!("{HELP}");
        return Ok(());
    };
    match verb.as_str() {
        "setup" => setup::ensure(&[Need::Toolchain, Need::Build, Need::Check, Need::Lab, Need::Vm]),
        "build" => build::agent().map(|built| println!("  {}", built.bunter.display())),
        "demo" => demo::verb(rest),
        "check" => check::verb(),
        "test" => test::verb(rest, after),
        "vm" => vm::verb(rest, after),
        "draw" => draw::verb(rest),
        "policy" => check::policy(rest),
        "bench" => bench::verb(rest, after),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        other => Err(format!("no verb {other}\n\n{HELP}").into()),
    }
}
