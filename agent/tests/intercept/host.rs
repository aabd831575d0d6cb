//! An agent in a box that is not the host, and what others have put in its way: it starts on the host or not at all.

use crate::world::{World, unable, world};
use bunter::intercept::{Error, PinnedTables, TableUsage};
use bunter_identity::refusal::Refusal;
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const BPFFS: &str = "/sys/fs/bpf";
const OTHER: u32 = 3000;

/// The agent: the one that this test was built with, or the one of the guest.
fn bunter() -> String {
    std::env::var("BUNTER_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_bunter").to_owned())
}

/// Says why a test cannot run here, if it cannot: a guest has few programs.
fn lacking(test: &str, programs: &[&str]) -> bool {
    let missing = |program: &&&str| Command::new(program).arg("--version").output().is_err();
    if let Some(program) = programs.iter().find(missing) {
        eprintln!("SKIPPED (no {program}): {test}");
        return true;
    }
    unable(test)
}

/// What a shell script of a box prints, in which `$BUNTER` is the agent.
fn in_a_box(words: &[&str], script: &str) -> (bool, String) {
    let output =
        Command::new("unshare").args(words).args(["sh", "-ec", script]).env("BUNTER", bunter()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// In this box neither the agent starts nor is doctor content, and both name the reason.
fn refused(words: &[&str], script: &str, code: &str, advice: &str) {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    fs::create_dir(at("policies")).unwrap();
    fs::write(at("policies/none.toml"), "trust_domain = \"lab.test\"\n").unwrap();
    let made =
        Command::new(bunter()).args(["ca", "init", "--trust-domain", "lab.test", "--dir", &at("ca")]).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let config = format!(
        "policy_dir = \"{}\"\nstate_dir = \"{}\"\nrun_dir = \"{}\"\n[identity]\nprovider = \"embedded\"\nca_dir = \"{}\"\n\
         [audit]\npath = \"{}\"\n",
        at("policies"),
        at("state"),
        at("run"),
        at("ca"),
        at("audit.jsonl"),
    );
    fs::write(at("agent.toml"), config).unwrap();
    let (started, said) =
        in_a_box(words, &format!("{script}\nexec timeout 20 $BUNTER agent --config {}", at("agent.toml")));
    assert!(!started && said.contains(advice), "{said}");
    let (content, said) = in_a_box(words, &format!("{script}\nexec $BUNTER doctor --json"));
    assert!(!content && said.contains(&format!("\"code\": \"{code}\"")), "{said}");
}

#[test]
fn an_agent_in_a_cgroup_namespace_of_its_own_does_not_start() {
    if lacking("an_agent_in_a_cgroup_namespace_of_its_own_does_not_start", &["unshare", "timeout"]) {
        return;
    }
    refused(&["--cgroup"], "", "cgroup-namespace", "--cgroupns=host");
}

#[test]
fn an_agent_in_a_process_namespace_of_its_own_does_not_start() {
    if lacking("an_agent_in_a_process_namespace_of_its_own_does_not_start", &["unshare", "timeout"]) {
        return;
    }
    refused(&["--pid", "--fork", "--mount-proc"], "", "pid-namespace", "--pid=host");
}

#[test]
fn an_agent_with_a_bpf_file_system_of_its_own_does_not_start() {
    if lacking("an_agent_with_a_bpf_file_system_of_its_own_does_not_start", &["unshare", "timeout"]) {
        return;
    }
    let own = format!("mount -t bpf bpf {BPFFS}");
    refused(&["--mount"], &own, "other-bpffs", "is not the BPF file system that process 1 has");
    // Nor does it mount one where it sees none.
    let none = format!("umount -l {BPFFS}");
    refused(&["--mount"], &none, "other-bpffs", "is not the BPF file system that process 1 has");
}

#[test]
fn an_agent_that_sees_a_part_of_the_cgroup_tree_does_not_start() {
    if lacking("an_agent_that_sees_a_part_of_the_cgroup_tree_does_not_start", &["unshare", "timeout"]) {
        return;
    }
    let mount = bunter_sys::mounts::cgroup2().unwrap().expect("cgroup2 is mounted");
    let mount = mount.display();
    let part = format!("{mount}/wit-part-{}", std::process::id());
    fs::create_dir(&part).unwrap();
    let bound = format!("mount --bind {part} {mount}");
    // The kernel shows the root of a mount that was made in a cgroup namespace as `/` in that namespace.
    let made =
        format!("echo 0 >{part}/cgroup.procs; umount -l {mount}; unshare --cgroup mount -t cgroup2 none {mount}");
    refused(&["--mount"], &bound, "part-of-cgroup2", "only a part of the host's cgroup2 hierarchy");
    refused(&["--mount"], &made, "part-of-cgroup2", "only a part of the host's cgroup2 hierarchy");
    // What ran in it may be on its way out.
    for _ in 0..100 {
        if fs::remove_dir(&part).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{part} cannot be removed");
}

/// Where the pins of the world's namespace are, which has none yet.
fn pins() -> PathBuf {
    let inode = fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
    Path::new(BPFFS).join("bunter").join(format!("abi{}-{inode}", bunter_common::ABI))
}

fn released(mut world: World) -> World {
    world.kill_agent();
    assert!(world.release());
    world
}

#[test]
fn what_another_user_has_put_where_the_pins_go_stops_the_agent_by_name() {
    let mut world = released(world!());
    fs::create_dir(pins()).unwrap();
    chown(pins(), Some(OTHER), Some(OTHER)).unwrap();
    let error = world.try_start().unwrap_err();
    assert!(matches!(&error, Error::NotRoots { path, owner: OTHER, .. } if *path == pins()), "{error}");
    assert!(error.to_string().contains("rm -r"), "{error}");
    fs::remove_dir(pins()).unwrap();
    world.try_start().unwrap();
}

#[test]
fn the_way_to_the_pins_is_closed_to_others_at_every_start() {
    let mut world = world!();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let parent = pins().parent().unwrap().to_path_buf();
    assert_eq!((mode(&parent), mode(&pins())), (0o700, 0o700));
    world.kill_agent();
    fs::set_permissions(pins(), PermissionsExt::from_mode(0o777)).unwrap();
    fs::set_permissions(pins().join("OWN"), PermissionsExt::from_mode(0o666)).unwrap();
    world.try_start().unwrap();
    assert_eq!((mode(&pins()), mode(&pins().join("OWN"))), (0o700, 0o600));
}

#[test]
fn a_user_who_holds_the_lock_on_the_pins_is_named() {
    if lacking("a_user_who_holds_the_lock_on_the_pins_is_named", &["setpriv", "flock"]) {
        return;
    }
    let mut world = world!();
    world.kill_agent();
    // As it was made once, and only so can a user open the directory. The root of the file system may keep users out, so the
    // directory is handed on.
    fs::set_permissions(pins(), PermissionsExt::from_mode(0o755)).unwrap();
    let script = "exec 9<\"$0\"; exec setpriv --reuid 3000 --regid 3000 --clear-groups \
                  flock --no-fork /proc/self/fd/9 sleep 30";
    let mut other = Command::new("sh").args(["-c", script]).arg(pins()).spawn().unwrap();
    let locked = || {
        let (locks, holder) = (fs::read_to_string("/proc/locks").unwrap(), format!(" {} ", other.id()));
        locks.lines().any(|line| line.contains("FLOCK") && line.contains(&holder))
    };
    for _ in 0..250 {
        if locked() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let held = world.try_start();
    let pid = other.id();
    other.kill().unwrap();
    other.wait().unwrap();
    let error = held.unwrap_err();
    assert!(matches!(error, Error::HeldByUser { process, user: OTHER, .. } if process == pid), "{error}");
    assert_eq!(error.code(), "pins-held-by-user");
    world.try_start().unwrap();
}

#[test]
fn a_bpf_file_system_that_others_can_write_to_is_refused() {
    let name = "a_bpf_file_system_that_others_can_write_to_is_refused";
    if std::env::var_os("BUNTER_GUEST").is_none() {
        eprintln!("SKIPPED (changes the whole machine: in guests only): {name}");
        return;
    }
    let mut world = world!();
    world.kill_agent();
    let before = fs::metadata(BPFFS).unwrap().permissions();
    fs::set_permissions(BPFFS, PermissionsExt::from_mode(0o777)).unwrap();
    let open = world.try_start();
    fs::set_permissions(BPFFS, PermissionsExt::from_mode(0o1777)).unwrap();
    let sticky = world.try_start();
    fs::set_permissions(BPFFS, before).unwrap();
    assert!(matches!(open, Err(Error::OpenBpfFs { .. })), "{open:?}");
    sticky.unwrap();
}

#[test]
fn the_room_in_the_tables_is_what_is_in_them() {
    let mut world = world!();
    let before = PinnedTables::open(&pins()).unwrap().count().unwrap();
    let row = |tables: &[TableUsage], name: &str| tables.iter().find(|table| table.name == name).unwrap().clone();
    assert!(before.iter().all(|room| room.counted && room.used <= room.size && room.size > 1), "{before:?}");
    // An LPM trie and a hash.
    assert_eq!((row(&before, "DESTINATIONS").used, row(&before, "VERDICTS").used), (0, 0));
    assert!(row(&before, "OWN").used > 0, "the agent's own listeners");
    let facts = world.enrol().allowing();
    world.install(facts);
    let after = PinnedTables::open(&pins()).unwrap().count().unwrap();
    assert_eq!((row(&after, "DESTINATIONS").used, row(&after, "VERDICTS").used), (4, 2));
    assert!(after.iter().all(|table| table.name != "CONFIG" && table.name != "EVENTS"), "{after:?}");
}
