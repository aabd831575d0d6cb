//! Stock Debian kernels in QEMU: find, boot, watch, judge.
//!
//! The guest is an initramfs of this host's own programs; its init prepares it with `vagrant/provision.sh`, runs one
//! script, prints a verdict and powers off.
//!
//! *Invariant:* a guest that says nothing, takes too long, or whose kernel complains has failed, whatever its script
//! said before.

mod debian;

pub use debian::{DEFAULT, Kernel, kernels};

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::initramfs::Image;
use crate::run::{During, Fallible, merged, quiet, root, seconds, step, work};

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
         rcupdate.rcu_cpu_stall_timeout=120 mitigations=off bunter.mark={mark}"
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
    image.copy("/bunter/vagrant/provision.sh", &root().join("vagrant/provision.sh"))?;
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

#[cfg(test)]
mod tests {
    use super::*;

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
