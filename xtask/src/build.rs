//! The kernel programs, then the agent around them, then the lab.
//!
//! *Invariant:* the agent that the lab, the demo and the guests run embeds the object built here, never an older one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{During, Fallible, merged, root, step, work};
use crate::setup::{self, Need};

/// What a build gives.
pub struct Built {
    /// The agent and command line.
    pub bunter: PathBuf,
}

/// What the lab's build gives.
pub struct Lab {
    /// The test programs of `tests/`, by name.
    pub tests: Vec<(String, PathBuf)>,
    /// The other programs of `tests/`, by name.
    pub programs: Vec<(String, PathBuf)>,
}

/// Builds the kernel programs and the agent.
pub fn agent() -> Fallible<Built> {
    setup::ensure(&[Need::Toolchain, Need::Build])?;
    kernel_programs()?;
    // The agent's build script looks for the object at the place where it was just made. No variable says so: with one,
    // every switch between xtask and a plain cargo would build the agent anew.
    step("agent, release").run(setup::cargo(&["build", "--release", "-p", "bunter"]))?;
    Ok(Built { bunter: root().join("target/release/bunter") })
}

/// Builds the lab's tests and programs without running them.
pub fn lab() -> Fallible<Lab> {
    let mut built = artifacts("lab", &["-p", "lab", "--bins", "--tests"])?;
    // A program's own unit tests bear its name; there are none worth a guest's time.
    let named = |list: &[Artifact], name: &str| list.iter().any(|artifact| !artifact.test && artifact.name == name);
    let mut lab = Lab { tests: Vec::new(), programs: Vec::new() };
    built.sort_by(|one, other| one.name.cmp(&other.name));
    for artifact in &built {
        if !artifact.test {
            lab.programs.push((artifact.name.clone(), artifact.executable.clone()));
        } else if !named(&built, &artifact.name) && artifact.name != "lab" {
            lab.tests.push((artifact.name.clone(), artifact.executable.clone()));
        }
    }
    Ok(lab)
}

/// Builds the agent's own tests that a kernel matters to: its unit tests, and those of the kernel programs.
pub fn agent_tests() -> Fallible<Vec<(String, PathBuf)>> {
    let mut args = vec!["-p", "bunter", "--lib"];
    args.extend(PRIVILEGED.iter().flat_map(|name| ["--test", name]));
    let built = artifacts("tests of bunter", &args)?;
    Ok(built
        .into_iter()
        .filter(|artifact| artifact.test)
        .map(|artifact| (artifact.name, artifact.executable))
        .collect())
}

/// The agent's integration tests that load kernel programs.
pub const PRIVILEGED: &[&str] = &["intercept"];

fn artifacts(label: &str, what: &[&str]) -> Fallible<Vec<Artifact>> {
    let mut args = vec!["test", "--no-run", "--message-format=json-render-diagnostics"];
    args.extend(what);
    let mut found: Vec<Artifact> = Vec::new();
    let each = |line: &str| {
        found.extend(artifact(line));
        true
    };
    step(format!("build {label}")).each_line(each).run(setup::cargo(&args))?;
    Ok(found)
}

/// Where the kernel programs' object is.
pub fn object_path() -> PathBuf {
    root().join("ebpf/target/bpfel-unknown-none/release/bunter-ebpf")
}

/// A command of the kernel programs' workspace: its target has no prebuilt `core`, and building one is unstable.
pub fn bpf_cargo(verb: &str, rest: &[&str]) -> Command {
    let mut command = merged("cargo");
    command.args([verb, "--release", "-Z", "build-std=core", "--target", "bpfel-unknown-none"]).args(rest);
    command.current_dir(root().join("ebpf")).env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTFLAGS");
    setup::pin(&mut command);
    command
}

/// Builds the kernel programs.
pub fn kernel_programs() -> Fallible {
    step("kernel programs").run(bpf_cargo("build", &[]))?;
    if !object_path().is_file() {
        return Err(format!("the build of ebpf/ left no {}", object_path().display()).into());
    }
    without_debug_information(&object_path())
}

/// The type information that the verifier reads (BTF) is made from debug information, which the agent need not carry: where the
/// toolchain has what takes it off, it is taken off.
///
/// Once: an object that is written again is one that the agent is built again for.
fn without_debug_information(object: &Path) -> Fallible {
    const SECTION: &[u8] = b".debug_info";
    let bytes = fs::read(object).during("cannot read the kernel programs")?;
    if !bytes.windows(SECTION.len()).any(|window| window == SECTION) {
        return Ok(());
    }
    let mut rustc = Command::new("rustc");
    setup::pin(&mut rustc);
    let printed = rustc.args(["--print", "sysroot"]).output().during("cannot run rustc")?;
    let libraries = Path::new(String::from_utf8_lossy(&printed.stdout).trim()).join("lib");
    let hosts = fs::read_dir(libraries.join("rustlib")).into_iter().flatten().flatten();
    let Some(objcopy) = hosts.map(|host| host.path().join("bin/rust-objcopy")).find(|path| path.is_file()) else {
        return Ok(());
    };
    let stripped = object.with_extension("stripped");
    let mut strip = Command::new(objcopy);
    strip.env("LD_LIBRARY_PATH", &libraries).arg("--strip-debug").args([object, &stripped]);
    if !strip.status().during("cannot run rust-objcopy")?.success() {
        return Err(format!("{} cannot be stripped", object.display()).into());
    }
    // Into the very file, which has a second name in cargo's folder: a new one would be replaced at the next build.
    fs::write(object, fs::read(&stripped).during("cannot read what was stripped")?)
        .during("cannot write the kernel programs")
}

/// A copy without debug information: what goes into a guest is loaded into its memory.
pub fn stripped(file: &Path) -> Fallible<PathBuf> {
    let name = file.file_name().ok_or_else(|| format!("{} has no name", file.display()))?;
    let copy = work("stripped").join(name);
    let newer = |a: &Path, b: &Path| -> Option<bool> {
        Some(fs::metadata(a).ok()?.modified().ok()? > fs::metadata(b).ok()?.modified().ok()?)
    };
    if newer(&copy, file) == Some(true) {
        return Ok(copy);
    }
    let mut strip = Command::new("strip");
    strip.args(["--strip-debug", "-o"]).arg(&copy).arg(file);
    let status = strip.status().during("cannot run strip (package binutils)")?;
    if status.success() { Ok(copy) } else { Err(format!("strip of {} failed", file.display()).into()) }
}

struct Artifact {
    name: String,
    executable: PathBuf,
    test: bool,
}

/// What a line of `--message-format=json` says about an executable. Cargo writes one object a line, its keys unspaced.
fn artifact(line: &str) -> Option<Artifact> {
    if !line.starts_with("{\"reason\":\"compiler-artifact\"") {
        return None;
    }
    let executable = PathBuf::from(text_after(line, "\"executable\":\"")?);
    let target = line.split_once("\"target\":{")?.1;
    let name = text_after(target, "\"name\":\"")?.to_owned();
    let profile = line.split_once("\"profile\":{")?.1;
    let test = profile.split_once("\"test\":")?.1.starts_with("true");
    Some(Artifact { name, executable, test })
}

fn text_after<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_once(key)?.1.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::artifact;

    const TEST: &str = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/tests#lab@0.1.0","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],"crate_types":["bin"],"name":"flows","src_path":"/w/tests/flows.rs","edition":"2024","doc":false,"doctest":false,"test":true},"profile":{"opt_level":"1","debuginfo":"line-tables-only","debug_assertions":true,"overflow_checks":true,"test":true},"features":[],"filenames":["/w/target/debug/deps/flows-1f"],"executable":"/w/target/debug/deps/flows-1f","fresh":true}"#;

    #[test]
    fn a_test_program_is_found_in_what_cargo_prints() {
        let found = artifact(TEST).unwrap();
        assert_eq!((found.name.as_str(), found.test), ("flows", true));
        assert_eq!(found.executable.to_str(), Some("/w/target/debug/deps/flows-1f"));
        let program = TEST.replace("\"overflow_checks\":true,\"test\":true", "\"overflow_checks\":true,\"test\":false");
        assert!(!artifact(&program).unwrap().test);
    }

    #[test]
    fn a_library_and_other_lines_are_no_programs() {
        assert!(
            artifact(&TEST.replace("\"executable\":\"/w/target/debug/deps/flows-1f\"", "\"executable\":null"))
                .is_none()
        );
        assert!(artifact("{\"reason\":\"build-finished\",\"success\":true}").is_none());
        assert!(artifact("   Compiling lab v0.1.0").is_none());
    }
}
