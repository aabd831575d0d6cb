//! One port and several sockets: who joins it, who has it on another device or for the other family, and whom clients reach.

use crate::listeners::{bound_by_root, policy, settle, web, with_web_in_its_cgroup};
use lab::hand::{ATTACKER, Hand, USER, WEB, expect_alive, knock};
use lab::policy::PORT;
use lab::{Lab, Mesh, clock, lab};
use std::time::{Duration, Instant};

/// Web and the same user in a cgroup that is nobody's share a port.
fn joined(lab: &Lab, web_first: bool) {
    let mesh = mesh!(lab, &with_web_in_its_cgroup(lab));
    let how = "opt s reuseport; opt s reuseaddr; ";
    let at = format!("0.0.0.0:{PORT}");
    let (web, joiner) = if web_first {
        let web = web(lab, "server", "web", how, &at);
        settle();
        (web, self::web(lab, "elsewhere", "joiner", how, &at))
    } else {
        let joiner = self::web(lab, "elsewhere", "joiner", how, &at);
        settle();
        (web(lab, "server", "web", how, &at), joiner)
    };
    lab.assail(PORT, 8);
    web.expect_no_stranger("at once");
    settle();
    lab.assail(PORT, 8);
    web.expect_no_stranger("a moment later");
    lab.expect_served_or_told(&mesh, lab.beta.at(PORT));
    // The joiner goes, and comes again and goes by a shutdown: web stays what it is.
    joiner.end();
    let mut joiner = self::web(lab, "elsewhere", "joiner", how, &at);
    joiner.must("shutdown s rd");
    lab.assail(PORT, 8);
    web.expect_no_stranger("after the joiner left");
    joiner.end();
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}

#[test]
fn who_joins_a_port_by_reuseport_never_lowers_its_protection() {
    joined(&lab!(), true);
}

#[test]
fn who_had_a_port_before_by_reuseport_never_lowers_its_protection() {
    joined(&lab!(), false);
}

/// Web is bound to the link, and an attacker listens on the same port of another device.
fn on_another_device(lab: &Lab, web_first: bool, family: u8, any: &str) {
    let mesh = mesh!(lab, &policy(lab, &[PORT]));
    let at = format!("{any}:{PORT}");
    let attack = |attacker: &mut Hand| {
        attacker.must(&format!("socket a {family}; opt a reuseaddr; opt a device:lo; bind a {at}; listen a"));
    };
    let mut attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    if !web_first {
        attack(&mut attacker);
        settle();
    }
    let web = web(lab, "server", "web", "opt s device:eth0; ", &at);
    if web_first {
        settle();
        attack(&mut attacker);
    }
    lab.assail(PORT, 2);
    web.expect_no_stranger("at once");
    settle();
    lab.assail(PORT, 2);
    web.expect_no_stranger("a moment later");
    attacker.must("shutdown a rd; close a");
    lab.assail(PORT, 1);
    web.expect_no_stranger("after the attacker left");
    attack(&mut attacker);
    lab.expect_served_or_told(&mesh, if family == 4 { lab.beta.at(PORT) } else { lab.beta.at6(PORT) });
    // What a client says to web is for nobody else who has the port on another device.
    attacker.expect_unheard(lab.marker(), "a client of web spoke");
    expect_alive(&mesh);
}

#[test]
fn a_port_that_another_has_on_another_device_stays_protected() {
    on_another_device(&lab!(), true, 4, "0.0.0.0");
}

#[test]
fn a_port_that_another_had_on_another_device_before_is_protected() {
    on_another_device(&lab!(), false, 4, "0.0.0.0");
}

#[test]
fn an_ipv6_port_that_another_had_on_another_device_before_is_protected() {
    on_another_device(&lab!(), false, 6, "[::]");
}

/// Root binds and web listens, in a loop, while an attacker listens for IPv6 only on the same port.
fn beside_an_ipv6_listener(lab: &Lab) {
    let mut attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    attacker.must(&format!("socket s 6; opt s v6only; bind s [::]:{PORT}; listen s"));
    bound_by_root(lab, "root binds, web listens, and somebody listens for IPv6 only");
}

#[test]
fn a_listener_for_ipv6_only_opens_nothing_for_ipv4() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    beside_an_ipv6_listener(&lab);
    expect_alive(&mesh);
}

#[test]
fn a_listener_for_ipv6_only_opens_nothing_for_ipv4_without_an_agent() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    mesh.beta().kill();
    beside_an_ipv6_listener(&lab);
}

#[test]
fn a_socket_that_is_bound_for_ipv6_only_closes_no_ipv4_port() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let at = format!("0.0.0.0:{}", PORT + 9);
    let mut other = lab.puppet(&lab.beta, "nobody", ATTACKER, "other");
    other.must(&format!("socket o 4; bind o {at}; listen o"));
    settle();
    let mut user = lab.puppet(&lab.beta, "one", USER, "user");
    user.must(&format!("socket s 6; opt s v6only; bind s [::]:{}", PORT + 9));
    for from in [&lab.stranger, &lab.beta] {
        assert!(from.within(|| knock(lab.beta.at(PORT + 9))).connected, "what is nobody's is left alone");
    }
    expect_alive(&mesh);
}

#[test]
fn the_upstream_connection_reaches_only_those_who_were_found_to_listen() {
    let lab = lab!();
    let mesh = mesh!(lab, &policy(&lab, &[PORT]));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let attacker = lab.puppet(&lab.beta, "nobody", ATTACKER, "attacker");
    upstreams(&lab, &mesh, &mut web, attacker, "");
}

#[test]
fn whoever_shares_a_port_and_listens_now_and_then_hears_no_client() {
    let lab = lab!();
    let mesh = mesh!(lab, &with_web_in_its_cgroup(&lab));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let joiner = lab.puppet(&lab.beta, "elsewhere", WEB, "joiner");
    upstreams(&lab, &mesh, &mut web, joiner, " shared");
}

/// Web and somebody else come and go on one port, while clients of web say something. When the other one is gone, web is
/// served.
fn upstreams(lab: &Lab, mesh: &Mesh<'_>, web: &mut Hand, mut attacker: Hand, how: &str) {
    let mut users: Vec<Hand> =
        (0..2).map(|index| lab.puppet(&lab.alpha, "one", USER, &format!("user-{index}"))).collect();
    let (millis, patience) = (clock::millis(6000).as_millis(), clock::millis(30).as_millis());
    let flap = |hand: &mut Hand| {
        let end = Instant::now() + clock::millis(6000);
        // The port is the other's now and then.
        while Instant::now() < end {
            hand.tell(&format!("flap 0.0.0.0:{PORT} {}{how}", millis / 20));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| flap(web));
        scope.spawn(|| flap(&mut attacker));
        let end = Instant::now() + clock::millis(6000);
        for user in &mut users {
            scope.spawn(move || {
                for number in 0_u32.. {
                    if Instant::now() >= end {
                        break;
                    }
                    let (to, marker) = (lab.beta.at(PORT), lab.marker());
                    user.tell(&format!(
                        "patience {patience}; socket u 4; connect u {to}; write u {marker}-{number}; close u"
                    ));
                }
            });
        }
    });
    attacker.expect_unheard(lab.marker(), "what was meant for web");
    attacker.end();
    web.must(&format!("socket s 4; opt s reuseaddr; bind s 0.0.0.0:{PORT}; listen s"));
    lab.expect_served(mesh, lab.beta.at(PORT));
    expect_alive(mesh);
}

/// Ways to be bound to one port of beta: family, options, address.
fn ways(lab: &Lab) -> [(u8, &'static str, String); 8] {
    let (v4, v6) = (lab.beta.v4, lab.beta.v6);
    [
        (4, "", "0.0.0.0".to_owned()),
        (4, "", v4.to_string()),
        (6, "dual", "[::]".to_owned()),
        (6, "v6only", "[::]".to_owned()),
        (6, "dual", "[::ffff:0.0.0.0]".to_owned()),
        (6, "dual", format!("[::ffff:{v4}]")),
        (6, "v6only", format!("[{v6}]")),
        (6, "dual", format!("[{v6}]")),
    ]
}

/// Of several sockets that share a port the kernel chooses by rules of its own, which differ by family, address, device and age:
/// each pair is tried, from another one on each time.
#[test]
fn however_somebody_shares_a_port_they_hear_no_client() {
    let lab = lab!();
    let mesh = mesh!(lab, &with_web_in_its_cgroup(&lab));
    let mut web = lab.puppet(&lab.beta, "server", WEB, "web");
    let mut joiner = lab.puppet(&lab.beta, "elsewhere", WEB, "joiner");
    let mut user = lab.puppet(&lab.alpha, "one", USER, "user");
    let alone = format!("socket s 6; opt s reuseport; opt s reuseaddr; opt s dual; bind s [::]:{PORT}; listen s");
    web.must(&alone);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    web.must("close s");
    let mut pairs = Vec::new();
    for own in ways(&lab) {
        for other in ways(&lab) {
            for device in ["", "device:lo"] {
                for order in ["listens before", "binds before", "listens after"] {
                    pairs.push((own.clone(), other.clone(), device, order));
                }
            }
        }
    }
    // On a slow machine some of them, others each time.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let first = usize::try_from(now.as_nanos() % pairs.len() as u128).unwrap_or(0);
    let (all, end) = (pairs.len(), Instant::now() + Duration::from_secs(30));
    let (mut both, mut before) = (0, String::new());
    for (tried, number) in (0..all).map(|step| (first + step * 131) % all).enumerate() {
        if Instant::now() >= end && tried >= 20 {
            break;
        }
        let ((own, how, own_ip), (other, other_how, other_ip), device, order) = &pairs[number];
        let opt = |name: &str, word: &str| match word {
            "" => String::new(),
            _ => format!("opt {name} {word}; "),
        };
        let own_options = if *own == 6 { opt("s", how) } else { String::new() };
        let other_options = if *other == 6 { opt("j", other_how) } else { String::new() } + &opt("j", device);
        let begin =
            format!("socket j {other}; opt j reuseport; opt j reuseaddr; {other_options}bind j {other_ip}:{PORT}");
        let joins = match *order {
            "listens before" => joiner.tell(&format!("{begin}; listen j"))["ok"] == true,
            "binds before" => joiner.tell(&begin)["ok"] == true,
            _ => true,
        };
        web.must(&format!(
            "socket s {own}; opt s reuseport; opt s reuseaddr; {own_options}bind s {own_ip}:{PORT}; listen s"
        ));
        let joins = match *order {
            "listens before" => joins,
            "binds before" => joins && joiner.tell("listen j")["ok"] == true,
            _ => joiner.tell(&format!("{begin}; listen j"))["ok"] == true,
        };
        both += usize::from(joins);
        for to in [lab.beta.at(PORT), lab.beta.at6(PORT)] {
            let (millis, marker) = (clock::millis(100).as_millis(), lab.marker());
            let family = if to.is_ipv4() { 4 } else { 6 };
            let _ = user.tell(&format!(
                "patience {millis}; socket u {family}; connect u {to}; write u {marker}; read u; close u"
            ));
        }
        let what = format!("pair {number}: web {how} {own_ip}, the other {other_how} {other_ip} {device} {order}");
        // What was heard of the pair before may be said late.
        joiner.expect_unheard(lab.marker(), &format!("{what}; before: {before}"));
        before = what;
        web.must("close s");
        joiner.tell("close j");
    }
    assert!(both > 0, "nobody ever shared the port");
    web.must(&alone);
    lab.expect_served(&mesh, lab.beta.at(PORT));
    expect_alive(&mesh);
}
