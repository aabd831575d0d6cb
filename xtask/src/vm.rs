//! Stock Debian kernels in QEMU: find, boot, watch, judge.
//!
//! A kernel is found by the Debian suite that carries it, through an apt configuration of its own, so neither the
//! host's package lists nor its version of Debian matter. The guest is an initramfs of this host's own programs; its
//! init prepares it with `vagrant/provision.sh`, runs one script, prints a verdict and powers off.
//!
//! *Invariant:* a guest that says nothing, takes too long, or whose kernel complains has failed, whatever its script
//! said before.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::initramfs::Image;
use crate::run::{During, Failure, Fallible, merged, quiet, root, seconds, step, work};
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

/// Programs of the host that every guest has. What only some jobs need is named by the job.
const PROGRAMS: &[&str] = &[
    "dash",
    "bash",
    "busybox",
    "kmod",
    "ip",
    "ss",
    "tc",
    "tcpdump",
    "nginx",
    "redis-server",
    "redis-cli",
    "redis-benchmark",
    "curl",
    "openssl",
    "nsenter",
    "unshare",
    "setpriv",
    "timeout",
    "strace",
];

/// Programs without which a guest can still do its job.
const OPTIONAL: &[&str] = &["strace", "redis-benchmark", "bash"];

/// Memory of a guest, in MiB, unless `GUEST_MEMORY_MB` says otherwise: 50,000 connections need four times as much.
fn memory_mb() -> usize {
    std::env::var("GUEST_MEMORY_MB").ok().and_then(|text| text.parse().ok()).unwrap_or(2048)
}

/// How often a kernel is booted that does not come up: the emulation of code that changes itself fails at times while a kernel
/// chooses its variants (`sched_clock_tick` and `int3`, seen with 6.12). What happens later is the kernel's or ours.
const BOOTS: usize = 3;

/// Text on the console that means that the kernel is in trouble.
const TROUBLE: &[&str] = &[
    "Kernel panic",
    "BUG:",
    "Oops:",
    "general protection fault",
    "soft lockup",
    "hard LOCKUP",
    "blocked for more than",
    "detected stall",
    "self-detected stall",
    "WARNING: CPU",
    "kernel BUG at",
    "double fault",
    "Unable to handle",
    "refcount_t:",
    "KASAN:",
    "Out of memory: Killed",
];

/// A kernel, ready to boot.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The suite it was found in.
    pub suite: String,
    /// What `uname -r` says.
    pub release: String,
    folder: PathBuf,
}

impl Kernel {
    /// "6.1" of "6.1.0-56-cloud-amd64".
    pub fn series(&self) -> String {
        self.release.split('.').take(2).collect::<Vec<_>>().join(".")
    }

    /// Since Linux 7.0 a program can keep nothing with a socket on an x86 processor without cmpxchg16b (`kmalloc_nolock` in
    /// mm/slub.c). All that are sold have it.
    fn notes_need_cx16(&self) -> bool {
        self.release.split('.').next().and_then(|major| major.parse().ok()).is_some_and(|major: u32| major >= 7)
    }
}

/// What a guest does.
pub struct Job {
    /// Names logs and images.
    pub name: String,
    /// Programs of this host to take along, under these paths, with their libraries.
    pub programs: Vec<(PathBuf, String)>,
    /// Other files or folders of this host to take along, under these paths.
    pub files: Vec<(PathBuf, String)>,
    /// The shell script; its exit code is the verdict.
    pub script: String,
    /// The longest that the whole boot may take.
    pub limit: Duration,
    /// The longest that the console may be silent.
    pub silence: Duration,
    /// Processors of the guest.
    pub processors: u32,
    /// The guest's clock counts instructions, a nanosecond each, and what chance would decide is decided before: the same
    /// guest does the same twice, whatever the host does meanwhile.
    pub virtual_time: bool,
}

impl Job {
    /// A job that runs this script, with limits that suit a small one.
    pub fn new(name: &str, script: &str) -> Self {
        Self {
            name: name.into(),
            programs: Vec::new(),
            files: Vec::new(),
            script: script.into(),
            limit: Duration::from_secs(900),
            silence: Duration::from_secs(240),
            processors: 2,
            virtual_time: false,
        }
    }
}

/// How a guest ended.
pub struct Verdict {
    /// The script's exit code, if the guest came so far.
    pub code: Option<i32>,
    /// What the kernel said, or why xtask ended the guest.
    pub trouble: Option<String>,
    /// How long it ran.
    pub took: Duration,
    /// The console.
    pub log: PathBuf,
}

impl Verdict {
    /// Whether the script succeeded and the kernel was content.
    pub fn success(&self) -> bool {
        self.code == Some(0) && self.trouble.is_none()
    }

    /// One line for a table.
    pub fn line(&self) -> String {
        match (&self.trouble, self.code) {
            (Some(trouble), _) => format!("failed: {trouble}"),
            (None, Some(0)) => "ok".into(),
            (None, Some(code)) => format!("failed: exit code {code}"),
            (None, None) => "failed: the guest ended without a verdict".into(),
        }
    }
}

/// The verb `vm`: boots each kernel and runs a small check that shows what it can do, or the command after `--`.
pub fn verb(words: &[String], command: &[String]) -> Fallible {
    let script = if command.is_empty() { include_str!("guest-probe.sh").to_owned() } else { command.join(" ") };
    let mut failed = Vec::new();
    let mut table = Vec::new();
    for kernel in kernels(words)? {
        let verdict = boot(&kernel, &Job::new("probe", &script), |line| println!("    {line}"))?;
        table.push(format!(
            "  {:<20} {:<26} {} ({})",
            kernel.suite,
            kernel.release,
            verdict.line(),
            seconds(verdict.took)
        ));
        if !verdict.success() {
            failed.push(kernel.release);
        }
    }
    println!("{}", table.join("\n"));
    if failed.is_empty() { Ok(()) } else { Err(format!("failed on {}", failed.join(", ")).into()) }
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

/// How many guests may run side by side: one more than there are processors, since none of them keeps its own busy, and no
/// more than there is memory for.
pub fn at_once() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free =
        memory.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    let room = free.map_or(1, |kilobytes: usize| kilobytes / 1024 / (memory_mb() + memory_mb() / 4));
    room.clamp(1, processors + 1)
}

/// Boots a kernel with a job. Every line of the console, from the job's first on, goes to `each_line`.
pub fn boot(kernel: &Kernel, job: &Job, each_line: impl FnMut(&str)) -> Fallible<Verdict> {
    watch(kernel, job, each_line, true)
}

/// The same, with nothing on the screen but what `each_line` puts there.
pub fn boot_unshown(kernel: &Kernel, job: &Job, each_line: impl FnMut(&str)) -> Fallible<Verdict> {
    watch(kernel, job, each_line, false)
}

fn watch(kernel: &Kernel, job: &Job, mut each_line: impl FnMut(&str), shown: bool) -> Fallible<Verdict> {
    let image = image(kernel, job)?;
    let made = image.clone();
    let _undo = crate::run::on_exit(move || {
        let _ = fs::remove_file(made);
    });
    for _ in 1..BOOTS {
        let (verdict, came_up) = once(kernel, job, &image, &mut each_line, shown)?;
        let Some(trouble) = verdict.trouble.as_ref().filter(|_| !came_up) else { return Ok(verdict) };
        println!("  {} did not come up, which is the emulator's fault; once more ({trouble})", kernel.release);
    }
    once(kernel, job, &image, &mut each_line, shown).map(|(verdict, _)| verdict)
}

/// One boot. Says also whether it came as far as the job.
fn once(
    kernel: &Kernel,
    job: &Job,
    image: &Path,
    each_line: &mut dyn FnMut(&str),
    shown: bool,
) -> Fallible<(Verdict, bool)> {
    let mark = format!("verdict-{:x}", std::process::id());
    let mut code = None;
    let mut trouble: Option<String> = None;
    let (mut begun, mut came_up) = (false, false);
    let mut after_trouble = 0;
    let watch = |line: &str| {
        if let Some(rest) = line.trim_end().strip_prefix(&format!("{mark} ")) {
            code = rest.parse().ok();
            begun = false;
            return true;
        }
        if line.starts_with(&format!("{mark}:begin")) {
            (begun, came_up) = (true, true);
            return true;
        }
        if begun {
            each_line(line);
        }
        if trouble.is_none() {
            trouble = TROUBLE.iter().find(|text| line.contains(*text)).map(|_| line.trim().to_owned());
        } else {
            // The lines after the first are the stack; then there is nothing to wait for.
            after_trouble += 1;
        }
        after_trouble < 60
    };
    let label = format!("guest {} {}", kernel.release, job.name);
    let mut step = step(label).limit(job.limit).silence(job.silence).each_line(watch);
    if !shown {
        step = step.unshown();
    }
    let ended = step.watch(qemu(kernel, job, image, &mark))?;
    if trouble.is_none() && code.is_none() {
        trouble = ended.cut.clone().map(|cut| format!("the guest {cut}"));
    }
    Ok((Verdict { code, trouble, took: ended.took, log: ended.log }, came_up))
}

fn qemu(kernel: &Kernel, job: &Job, image: &Path, mark: &str) -> Command {
    // setpriv ends QEMU when xtask itself is killed; nothing else could.
    let mut command = merged("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    // Plain "max" offers cmpxchg16b, whose emulation crashed one boot in three of 6.12, and none in thirty of 7.3.
    if job.virtual_time {
        // Each step of `rep movsb` counts as an instruction: without it, copies do not cost more than they would.
        command.args(["-accel", "tcg,thread=single", "-cpu", "max,-cx16,-erms,-fsrm,-rdrand,-rdseed", "-smp", "1"]);
        command.args(["-icount", "shift=0,sleep=off", "-rtc", "base=2024-01-01T00:00:00,clock=vm", "-seed", "1"]);
    } else {
        let processors = job.processors.to_string();
        let cpu = if kernel.notes_need_cx16() { "max" } else { "max,-cx16" };
        command.args(["-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", &processors]);
    }
    command.args(["-m", &memory_mb().to_string()]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.arg("-kernel").arg(kernel.folder.join("vmlinuz")).arg("-initrd").arg(image);
    // The emulated processors are slow and share the host: the kernel's own alarms get more time, as xtask has its own.
    let still = if job.virtual_time { "nokaslr norandmaps " } else { "" };
    let line = format!(
        "{still}console=ttyS0 panic=-1 loglevel=5 random.trust_cpu=on tsc=reliable watchdog_thresh=60 \
         rcupdate.rcu_cpu_stall_timeout=120 mitigations=off wimsey.mark={mark}"
    );
    command.arg("-append").arg(line);
    command
}

/// The files of a kernel, and those of the tree that every guest is prepared with.
pub fn parts(kernel: &Kernel) -> Vec<String> {
    let files =
        [kernel.folder.join("vmlinuz"), root().join("vagrant/provision.sh"), root().join("xtask/src/guest-init.sh")];
    files.iter().map(|file| file.to_string_lossy().into_owned()).collect()
}

fn image(kernel: &Kernel, job: &Job) -> Fallible<PathBuf> {
    let mut image = Image::new();
    image.text("/init", 0o755, include_str!("guest-init.sh"));
    image.text("/job", 0o755, format!("#!/bin/sh\n{}\n", job.script));
    image.copy("/wimsey/vagrant/provision.sh", &root().join("vagrant/provision.sh"))?;
    image.text("/etc/passwd", 0o644, PASSWD);
    image.text("/etc/group", 0o644, GROUP);
    image.text("/etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n");
    image.text("/etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files\n");
    image.text("/etc/services", 0o644, "http 80/tcp\nhttps 443/tcp\nredis 6379/tcp\n");
    for name in PROGRAMS {
        match image.program(name) {
            Err(failure) if !OPTIONAL.contains(name) => return Err(failure),
            _ => {}
        }
    }
    // The applets come last on PATH, so that Debian's own programs win over busybox's.
    let applets = quiet("busybox", &["--list"]).ok_or("busybox does not list its applets")?;
    for applet in applets.lines() {
        image.link(&format!("/usr/lib/busybox/{applet}"), "/bin/busybox");
    }
    image.link("/bin/sh", "dash");
    for name in ["modprobe", "insmod", "lsmod"] {
        image.link(&format!("/sbin/{name}"), "/bin/kmod");
    }
    for folder in ["/usr/lib/nginx/modules", "/etc/nginx/mime.types", "/etc/ssl/openssl.cnf", "/usr/lib/ssl"] {
        if Path::new(folder).exists() {
            // Links in there may point to certificates that nobody put on this host.
            let _ = image.as_on_host(Path::new(folder));
        }
    }
    modules(&mut image, kernel)?;
    for (from, to) in &job.programs {
        image.program_as(to, from)?;
    }
    for (from, to) in &job.files {
        add_files(&mut image, from, to)?;
    }
    let path = work("images").join(format!("{}-{}-{}.cpio", kernel.release, job.name, std::process::id()));
    let file = File::create(&path).during(path.display())?;
    let mut out = BufWriter::new(file);
    image.write(&mut out)?;
    out.flush().during(path.display())?;
    Ok(path)
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\n\
                      redis:x:100:100::/var/lib/redis:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nadm:x:4:\nwww-data:x:33:\nredis:x:100:\nnogroup:x:65534:\n";

fn add_files(image: &mut Image, from: &Path, to: &str) -> Fallible {
    if !from.is_dir() {
        return image.copy(to, from);
    }
    image.folder(to);
    for entry in fs::read_dir(from).during(from.display())? {
        let entry = entry.during(from.display())?;
        add_files(image, &entry.path(), &format!("{to}/{}", entry.file_name().to_string_lossy()))?;
    }
    Ok(())
}

/// The wanted modules and all that they depend on, with an index that modprobe understands.
fn modules(image: &mut Image, kernel: &Kernel) -> Fallible {
    let folder = kernel.folder.join("modules");
    for entry in fs::read_dir(&folder).during(folder.display())? {
        let entry = entry.during(folder.display())?;
        let name = entry.file_name().to_string_lossy().into_owned();
        add_files(image, &entry.path(), &format!("/usr/lib/modules/{}/{name}", kernel.release))?;
    }
    Ok(())
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
        let mirror = std::env::var("WIMSEY_DEBIAN_MIRROR").unwrap_or_else(|_| "http://deb.debian.org".into());
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

    #[test]
    fn a_guest_without_a_verdict_has_failed() {
        let verdict = |code, trouble: Option<&str>| {
            let trouble = trouble.map(str::to_owned);
            Verdict { code, trouble, took: Duration::ZERO, log: PathBuf::new() }
        };
        assert!(verdict(Some(0), None).success());
        assert!(!verdict(None, None).success());
        assert!(!verdict(Some(1), None).success());
        assert!(!verdict(Some(0), Some("WARNING: CPU: 0")).success());
    }
}
