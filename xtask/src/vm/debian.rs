//! Debian's kernels: found by the suite that carries them, downloaded, and kept in the cache.
//!
//! apt has a configuration of its own here, so neither the host's package lists nor its version of Debian matter.
//!
//! *Invariant:* a kernel of the cache is used only if it is whole, and has the modules that are wanted today.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::run::{During, Failure, Fallible, merged, quiet, step};
use crate::setup::{self, Need};

/// What runs when no kernel is named: the oldest supported, the one in between, the newest.
pub const DEFAULT: [&str; 3] = ["bookworm-security", "trixie-security", "trixie-backports"];

/// Every suite that may be named, with the archive it is in.
const SUITES: [(&str, &str); 4] = [
    ("bookworm-security", "debian-security"),
    ("bookworm-backports", "debian"),
    ("trixie-security", "debian-security"),
    ("trixie-backports", "debian"),
];

/// Modules that the guests load or may load on demand; those they depend on come along.
const MODULES: &[&str] = &[
    "tls",
    "gcm",
    "ccm",
    "ctr",
    "cmac",
    "ghash_generic",
    "aesni_intel",
    "ghash_clmulni_intel",
    "chacha20poly1305",
    "chacha",
    "chacha_x86_64",
    "poly1305_x86_64",
    "crc32c_intel",
    "veth",
    "dummy",
    "tun",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "sch_netem",
    "bridge",
    "sch_ingress",
    "cls_bpf",
    "mptcp_diag",
    "sctp",
    "dccp_ipv4",
    "dccp_ipv6",
];

/// A kernel, ready to boot.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The suite it was found in.
    pub suite: String,
    /// What `uname -r` says.
    pub release: String,
    pub(super) folder: PathBuf,
}

impl Kernel {
    /// "6.1" of "6.1.0-56-cloud-amd64".
    pub fn series(&self) -> String {
        self.release.split('.').take(2).collect::<Vec<_>>().join(".")
    }

    /// Since Linux 7.0 a program can keep nothing with a socket on an x86 processor without cmpxchg16b (`kmalloc_nolock` in
    /// mm/slub.c). All that are sold have it.
    pub(super) fn notes_need_cx16(&self) -> bool {
        self.release.split('.').next().and_then(|major| major.parse().ok()).is_some_and(|major: u32| major >= 7)
    }
}

/// The kernels that these words name: a suite, the beginning of a version, or "newest". No word: the default three.
pub fn kernels(words: &[String]) -> Fallible<Vec<Kernel>> {
    setup::ensure(&[Need::Lab, Need::Vm])?;
    if std::env::consts::ARCH != "x86_64" {
        return Err("guests are made for x86_64 hosts only".into());
    }
    if words.is_empty() {
        return DEFAULT.iter().map(|suite| kernel(suite)).collect();
    }
    words.iter().map(|word| named(word)).collect()
}

fn named(word: &str) -> Fallible<Kernel> {
    if word == "newest" {
        return kernel(DEFAULT[2]);
    }
    if SUITES.iter().any(|(suite, _)| *suite == word) {
        return kernel(word);
    }
    let mut seen = Vec::new();
    for suite in DEFAULT.iter().copied().chain(SUITES.iter().map(|(suite, _)| *suite)) {
        let kernel = kernel(suite)?;
        if kernel.release.starts_with(&format!("{word}.")) || kernel.release == word {
            return Ok(kernel);
        }
        seen.push(format!("{suite} has {}", kernel.release));
    }
    Err(format!("no kernel {word}: {}", seen.join(", ")).into())
}

/// The suite's kernel, from the cache or downloaded. What is cached is looked up anew once a day.
fn kernel(suite: &str) -> Fallible<Kernel> {
    let cache = setup::cache("kernels");
    let current = cache.join(format!("{suite}.current"));
    let known = fs::read_to_string(&current).ok().and_then(|release| ready(suite, release.trim()));
    let age = fs::metadata(&current).and_then(|about| about.modified()).ok();
    let fresh = age.and_then(|time| SystemTime::now().duration_since(time).ok()).is_some_and(|age| age < DAY);
    if let (Some(kernel), true) = (&known, fresh) {
        return Ok(kernel.clone());
    }
    match (find(suite), known) {
        (Ok(kernel), _) => {
            fs::write(&current, &kernel.release).during(current.display())?;
            Ok(kernel)
        }
        (Err(failure), Some(kernel)) => {
            println!("  {suite}: using {} of the cache ({failure})", kernel.release);
            Ok(kernel)
        }
        (Err(failure), None) => Err(failure),
    }
}

const DAY: Duration = Duration::from_secs(86_400);

/// The kernel in the cache, if it is whole and was made with today's list of modules.
fn ready(suite: &str, release: &str) -> Option<Kernel> {
    let folder = setup::cache("kernels").join(release);
    let whole = fs::read_to_string(folder.join("made-with")).ok()? == MODULES.join(" ");
    whole.then(|| Kernel { suite: suite.into(), release: release.into(), folder })
}

fn find(suite: &str) -> Fallible<Kernel> {
    let apt = Apt::new(suite)?;
    apt.run("apt-get", &["update"])?;
    let meta = apt.ask("apt-cache", &["depends", "--important", "linux-image-cloud-amd64"])?;
    let image = dependencies(&meta).into_iter().find(|name| name.starts_with("linux-image-"));
    let image = image.ok_or_else(|| format!("{suite} has no linux-image-cloud-amd64"))?;
    let release = image.trim_start_matches("linux-image-").to_owned();
    if let Some(kernel) = ready(suite, &release) {
        return Ok(kernel);
    }
    // From 7.x on the kernel, its modules and its lists are in packages of their own.
    let parts = apt.ask("apt-cache", &["depends", "--important", &image])?;
    let wanted = ["linux-binary-", "linux-modules-", "linux-base-"].map(|part| format!("{part}{release}"));
    let mut packages: Vec<String> = dependencies(&parts).into_iter().filter(|name| wanted.contains(name)).collect();
    packages.push(image);
    let scratch = setup::cache("kernels").join(format!("{release}.partial.{}", std::process::id()));
    let remove = scratch.clone();
    let _undo = crate::run::on_exit(move || {
        let _ = fs::remove_dir_all(remove);
    });
    fs::create_dir_all(&scratch).during(scratch.display())?;
    for package in packages {
        let mut download = merged("apt-get");
        download.args(["download", &package]).env("APT_CONFIG", &apt.config).current_dir(&scratch);
        step(format!("download {package}")).run(download)?;
    }
    unpack(&scratch, &release)?;
    let place = setup::cache("kernels").join(&release);
    let _ = fs::remove_dir_all(&place);
    fs::rename(scratch.join("ready"), &place).during(place.display())?;
    ready(suite, &release).ok_or_else(|| Failure::from(format!("{} is not whole", place.display())))
}

/// Packages that `apt-cache depends` lists as dependencies.
fn dependencies(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| Some(line.trim().strip_prefix("Depends: ")?.to_owned())).collect()
}

/// Unpacks the packages and keeps the kernel and the wanted modules, indexed, under `ready/`.
fn unpack(scratch: &Path, release: &str) -> Fallible {
    let tree = scratch.join("tree");
    for entry in fs::read_dir(scratch).during(scratch.display())?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "deb") {
            let mut command = merged("dpkg-deb");
            command.arg("-x").arg(entry.path()).arg(&tree);
            step("unpack the kernel").unshown().run(command)?;
        }
    }
    let found = |choices: &[String]| choices.iter().map(|path| tree.join(path)).find(|path| path.exists());
    let vmlinuz = found(&[format!("boot/vmlinuz-{release}"), format!("usr/lib/modules/{release}/vmlinuz")]);
    let vmlinuz = vmlinuz.ok_or_else(|| format!("no vmlinuz in the packages of {release}"))?;
    let modules = found(&[format!("usr/lib/modules/{release}"), format!("lib/modules/{release}")]);
    let modules = modules.ok_or_else(|| format!("no modules in the packages of {release}"))?;

    // depmod wants lib/modules/RELEASE below its base; the packages have it there or below usr/.
    let base = modules.ancestors().nth(3).ok_or("no base folder")?.to_path_buf();
    depmod(&base, release)?;
    let index = fs::read_to_string(modules.join("modules.dep")).during("modules.dep")?;
    let ready = scratch.join("ready");
    let kept = ready.join("lib/modules").join(release);
    for path in closure(&index, MODULES) {
        let to = kept.join(&path);
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).during(folder.display())?;
        }
        fs::copy(modules.join(&path), &to).during(&path)?;
    }
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        if modules.join(name).exists() {
            fs::copy(modules.join(name), kept.join(name)).during(name)?;
        }
    }
    depmod(&ready, release)?;
    fs::rename(&kept, ready.join("modules")).during("modules")?;
    let _ = fs::remove_dir_all(ready.join("lib"));
    fs::copy(vmlinuz, ready.join("vmlinuz")).during("vmlinuz")?;
    fs::write(ready.join("made-with"), MODULES.join(" ")).during("made-with")
}

fn depmod(base: &Path, release: &str) -> Fallible {
    let program = crate::run::which("depmod").ok_or("no depmod (package kmod)")?;
    let mut command = merged(program);
    command.arg("-b").arg(base).arg(release);
    step("depmod").unshown().run(command)
}

/// The files of these modules and of all that they need, by the lines `path: path path...` of modules.dep.
fn closure(index: &str, wanted: &[&str]) -> Vec<String> {
    let lines: Vec<(&str, &str)> = index.lines().filter_map(|line| line.split_once(':')).collect();
    let mut files: Vec<String> = Vec::new();
    for (path, needs) in lines {
        let file = path.rsplit('/').next().unwrap_or(path);
        let name = file.split(".ko").next().unwrap_or(file).replace('-', "_");
        if wanted.contains(&name.as_str()) {
            files.push(path.to_owned());
            files.extend(needs.split_whitespace().map(str::to_owned));
        }
    }
    files.sort();
    files.dedup();
    files
}

/// An apt that knows one suite and shares nothing with the host's but the archive's keys and the way to the network.
struct Apt {
    suite: String,
    config: PathBuf,
}

impl Apt {
    fn new(suite: &str) -> Fallible<Self> {
        let archive = SUITES.iter().find(|(name, _)| *name == suite).map(|(_, archive)| *archive);
        let archive = archive.ok_or_else(|| format!("{suite} is not one of the suites that have kernels"))?;
        let base = setup::cache("apt").join(suite);
        for folder in ["etc/apt.conf.d", "etc/preferences.d", "state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(base.join(folder)).during(base.display())?;
        }
        let mirror = std::env::var("BUNTER_DEBIAN_MIRROR").unwrap_or_else(|_| "http://deb.debian.org".into());
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let source = format!("deb [arch=amd64 signed-by={keys}] {mirror}/{archive} {suite} main\n");
        fs::write(base.join("etc/sources.list"), source).during("sources.list")?;
        let folder = base.display();
        let mut text = format!(
            "Dir \"{folder}/\";\nDir::Etc \"{folder}/etc\";\nDir::State \"{folder}/state\";\n\
             Dir::State::status \"/dev/null\";\nDir::Cache \"{folder}/cache\";\n\
             Dir::Bin::methods \"/usr/lib/apt/methods\";\nAPT::Architecture \"amd64\";\nAcquire::Languages \"none\";\n"
        );
        if crate::run::is_root() {
            // The user _apt cannot read a cache in root's home.
            text.push_str("APT::Sandbox::User \"root\";\n");
        }
        // A proxy that the host's apt uses is the way to the network here too.
        for line in quiet("apt-config", &["dump"]).unwrap_or_default().lines() {
            if line.starts_with("Acquire::http") {
                text.push_str(line);
                text.push('\n');
            }
        }
        let config = base.join("apt.conf");
        fs::write(&config, text).during(config.display())?;
        Ok(Self { suite: suite.into(), config })
    }

    fn run(&self, program: &str, args: &[&str]) -> Fallible {
        let mut command = merged(program);
        command.args(args).env("APT_CONFIG", &self.config);
        step(format!("{program} {} {}", args.join(" "), self.suite)).unshown().run(command)
    }

    fn ask(&self, program: &str, args: &[&str]) -> Fallible<String> {
        let output = Command::new(program).args(args).env("APT_CONFIG", &self.config).output();
        let output = output.during(format!("cannot run {program}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_with_all_that_they_need() {
        let index = "kernel/net/tls/tls.ko.xz:\nkernel/arch/x86/crypto/aesni-intel.ko.xz: kernel/crypto/crypto_simd.ko.xz \
                     kernel/crypto/cryptd.ko.xz\nkernel/drivers/net/veth.ko:\nkernel/fs/fat/fat.ko:\n";
        let files = closure(index, &["aesni_intel", "veth"]);
        let expected = [
            "kernel/arch/x86/crypto/aesni-intel.ko.xz",
            "kernel/crypto/cryptd.ko.xz",
            "kernel/crypto/crypto_simd.ko.xz",
            "kernel/drivers/net/veth.ko",
        ];
        assert_eq!(files, expected);
    }

    #[test]
    fn the_versioned_image_is_read_from_the_meta_package() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-base-cloud-amd64\n  Depends: linux-image-7.3.4+deb13-cloud-amd64\n \
                    |Depends: dracut\n";
        assert_eq!(dependencies(text), ["linux-base-cloud-amd64", "linux-image-7.3.4+deb13-cloud-amd64"]);
    }
}
