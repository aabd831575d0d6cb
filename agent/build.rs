//! Embeds the kernel programs, which `cargo xtask build` has compiled from `ebpf/` for another target.
//!
//! The object is the file that `BUNTER_BPF_OBJECT` names, or the one where that build leaves it. Without either the agent
//! is built all the same, for checks and tests that need no kernel programs, and says at start what is missing.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=BUNTER_BPF_OBJECT");
    let named = env::var_os("BUNTER_BPF_OBJECT").map(PathBuf::from);
    let object = named.clone().unwrap_or_else(|| {
        let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
        here.join("../ebpf/target/bpfel-unknown-none/release/bunter-ebpf")
    });
    // A path that is not there would make every build start anew, so the nearest one that is there is watched.
    let watched = object.ancestors().find(|path| path.exists()).unwrap_or(&object);
    println!("cargo::rerun-if-changed={}", watched.display());
    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) if named.is_some() => panic!("BUNTER_BPF_OBJECT names {}: {error}", object.display()),
        Err(_) => Vec::new(),
    };
    let to = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bunter-ebpf");
    fs::write(&to, bytes).unwrap_or_else(|error| panic!("writing {}: {error}", to.display()));
}
