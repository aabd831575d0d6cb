//! Statements together: what contradicts, repeats or hides what, and the policy that they make.
//!
//! The texts of all files come in, a whole [`Policy`] goes out, or the list of everything that is wrong.
//!
//! *Invariant:* a policy is taken whole or not at all, and nothing in it depends on which of two statements is read first,
//! except which rule is named where several allow the same thing.

use super::{
    Accounts, Allow, AllowIndex, Kind, Listeners, MAX_CANDIDATES, MAX_DESTINATIONS, MAX_VERDICTS, MAX_WORKLOADS,
    Matcher, Plain, Policy, Preexisting, Rejected, Rule, Source, Workload, kernel,
    language::{AllowRule, InboundRule, PlainRule, Statements, WorkloadEntry},
    selector::Selector,
    table::{Region, Table},
};
use crate::document::{At, Problems, SourceLocation, nearest};
use bunter_identity::spiffe::{SpiffeId, TrustDomain};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
    sync::Arc,
};

/// Most `[[bypass]]`, and most `[[udp]]` rules: each is compared with every destination.
const MAX_PLAIN: usize = 4096;

pub(super) fn check(directory: &str, sources: &[Source], accounts: &Accounts) -> Result<Policy, Rejected> {
    let mut problems = Problems::default();
    let mut statements = Statements::default();
    for source in sources {
        statements.read(&source.file, &source.text, accounts, &mut problems);
    }
    let whole = SourceLocation { file: directory.into(), line: 0 };
    let trust_domain = agreed(&statements.trust_domains, "trust_domain", &mut problems);
    if statements.trust_domains.is_empty() && problems.is_empty() {
        problems.add(&whole, "no file says trust_domain", "write trust_domain = \"example.org\" at the top of one");
    }
    let preexisting = agreed(&statements.preexisting, "preexisting", &mut problems).unwrap_or(Preexisting::Keep);
    rule_names(&statements, &mut problems);
    for entry in &statements.workloads {
        workload(entry, trust_domain.as_ref(), &mut problems);
    }
    same_selectors(&statements.workloads, &mut problems);
    overlapping_allows(&statements.allows, &mut problems);
    overlapping_inbounds(&statements.inbounds, &mut problems);
    if let Some(trust_domain) = &trust_domain {
        local_only(&statements, trust_domain, &mut problems);
    }
    limits(&statements, &whole, &mut problems);
    let map = regions(&statements, &mut problems);
    match trust_domain {
        Some(trust_domain) if problems.is_empty() => {
            build(statements, map, trust_domain, preexisting, &whole).map_err(|problems| Rejected { problems })
        }
        _ => Err(Rejected { problems: problems.sorted() }),
    }
}

/// The value on which all files that set this key agree.
fn agreed<T: Clone + PartialEq>(said: &[At<T>], key: &str, problems: &mut Problems) -> Option<T> {
    let (first, others) = said.split_first()?;
    for other in others.iter().filter(|other| other.value != first.value) {
        problems.add(
            &other.place,
            format!("`{key}` is not what {} says", first.place),
            "write the same, or remove one",
        );
    }
    Some(first.value.clone())
}

/// Reports every item whose key was seen before.
fn repeated<K: Ord, I>(
    items: impl IntoIterator<Item = (K, SourceLocation, I)>,
    problems: &mut Problems,
    what: impl Fn(&I, &SourceLocation) -> (String, String),
) {
    let mut seen: BTreeMap<K, SourceLocation> = BTreeMap::new();
    for (key, place, item) in items {
        match seen.get(&key) {
            Some(first) => {
                let (what, instead) = what(&item, first);
                problems.add(&place, what, instead);
            }
            None => drop(seen.insert(key, place)),
        }
    }
}

fn rule_names(statements: &Statements, problems: &mut Problems) {
    let allows = statements.allows.iter().map(|rule| (&rule.name, &rule.place));
    let inbounds = statements.inbounds.iter().map(|rule| (&rule.name, &rule.place));
    let plain = statements.bypasses.iter().chain(&statements.udps).map(|rule| (&rule.name, &rule.place));
    let names = allows.chain(inbounds).chain(plain).map(|(name, place)| (name, place.clone(), name));
    repeated(names, problems, |name, first| {
        (format!("the name `{name}` is taken by the rule at {first}"), "write another name".into())
    });
}

fn workload(entry: &WorkloadEntry, trust_domain: Option<&TrustDomain>, problems: &mut Problems) {
    if let Some(trust_domain) = trust_domain.filter(|trust_domain| !entry.id.is_member_of(trust_domain)) {
        let what = format!("workload {} is not in trust domain {trust_domain}", entry.id);
        let instead =
            format!("write {}{}: other trust domains issue their own identities", trust_domain.id(), entry.id.path());
        problems.add(&entry.place, what, instead);
    }
    for (index, at) in entry.selectors.iter().enumerate() {
        for earlier in entry.selectors.iter().take(index) {
            contradiction(at, &earlier.value, problems);
        }
    }
    let mut visible =
        entry.selectors.iter().map(|at| &at.value).filter(|selector| selector.is_kernel_visible()).peekable();
    if visible.peek().is_none() {
        let what = format!("workload {} has no selector that the kernel can see", entry.id);
        let instead = "add a user, group, cgroup or unit, such as \"systemd:nginx.service\"";
        problems.add(&entry.place, what, instead);
    } else if visible.all(Selector::is_root) {
        let what = format!("every process of root could be workload {}", entry.id);
        let instead = "add a cgroup or unit, such as \"systemd:nginx.service\", or run it as a user of its own";
        problems.add(&entry.place, what, instead);
    }
}

fn contradiction(at: &At<Selector>, earlier: &Selector, problems: &mut Problems) {
    let selector = &at.value;
    if selector == earlier {
        problems.add(&at.place, format!("selector {selector} is there twice"), "write it once");
    } else if selector.excludes(earlier) {
        let what = format!("no process can be both {earlier} and {selector}");
        problems.add(&at.place, what, "write one of them, or two [[workload]] entries");
    } else if let (Selector::Cgroup(one), Selector::Cgroup(other)) = (selector, earlier) {
        let (wider, narrower) = if one.len() < other.len() { (selector, earlier) } else { (earlier, selector) };
        problems.add(
            &at.place,
            format!("{wider} always holds where {narrower} does"),
            format!("write {narrower} alone"),
        );
    }
}

fn same_selectors(entries: &[WorkloadEntry], problems: &mut Problems) {
    let items = entries.iter().map(|entry| {
        let selectors: BTreeSet<_> = entry.selectors.iter().map(|at| at.value.clone()).collect();
        (selectors, entry.place.clone(), entry)
    });
    repeated(items, problems, |entry, first| {
        let what = format!("workload {} has the same selectors as the entry at {first}", entry.id);
        (what, "add a selector that tells them apart, or remove one entry".into())
    });
}

fn overlapping_allows(rules: &[AllowRule], problems: &mut Problems) {
    let mut seen: HashMap<(&Matcher, &Matcher), Vec<&AllowRule>> = HashMap::new();
    for rule in rules {
        let earlier = seen.entry((&rule.from, &rule.to)).or_default();
        if let Some(first) = earlier.iter().find(|first| first.ports.overlap(&rule.ports)) {
            let what =
                format!("rule `{}` overlaps rule `{}` at {}: same from and to", rule.name, first.name, first.place);
            problems.add(&rule.place, what, "write ports that differ, or remove one rule");
        }
        earlier.push(rule);
    }
}

fn overlapping_inbounds(rules: &[InboundRule], problems: &mut Problems) {
    let mut seen: HashMap<&SpiffeId, Vec<&InboundRule>> = HashMap::new();
    for rule in rules {
        let earlier = seen.entry(&rule.id).or_default();
        if let Some(first) = earlier.iter().find(|first| first.ports.overlap(&rule.ports)) {
            let what = format!("[[inbound]] of {} overlaps the one at {}", rule.id, first.place);
            problems.add(&rule.place, what, "write ports that differ, or remove one");
        }
        earlier.push(rule);
        for at in rule.listen.iter().filter(|at| !rule.ports.contain(at.value.port())) {
            let what = format!("`listen` has port {}, and `ports` has not", at.value.port());
            problems.add(&at.place, what, "write it in both, or leave `ports` out");
        }
    }
    let listen = rules.iter().flat_map(|rule| rule.listen.iter().map(|at| (at.value, at.place.clone(), at.value)));
    repeated(listen, problems, |address, first| {
        (format!("{address} is protected twice, first at {first}"), "write it once".into())
    });
}

/// Rules about the local end: no process of this host can ever have the identity of another trust domain.
fn local_only(statements: &Statements, trust_domain: &TrustDomain, problems: &mut Problems) {
    let mut refuse = |place: &SourceLocation, key: &str, matcher: &dyn Display| {
        let what = format!("`{key}` is {matcher}, and no process here can be outside trust domain {trust_domain}");
        problems.add(place, what, format!("write an ID of {}", trust_domain.id()));
    };
    for rule in statements.bypasses.iter().chain(&statements.udps) {
        let foreign = match &rule.from {
            Matcher::Exact(id) => !id.is_member_of(trust_domain),
            Matcher::Pattern(pattern) => pattern.trust_domain() != *trust_domain,
        };
        if foreign {
            refuse(&rule.place, "from", &rule.from);
        }
    }
    for rule in statements.inbounds.iter().filter(|rule| !rule.id.is_member_of(trust_domain)) {
        refuse(&rule.place, "id", &rule.id);
    }
}

fn limits(statements: &Statements, whole: &SourceLocation, problems: &mut Problems) {
    for (what, count, most) in [
        ("[[workload]] entries", statements.workloads.len(), MAX_WORKLOADS),
        ("[[destination]] entries", statements.destinations.len(), MAX_DESTINATIONS),
        ("[[bypass]] rules", statements.bypasses.len(), MAX_PLAIN),
        ("[[udp]] rules", statements.udps.len(), MAX_PLAIN),
    ] {
        if count > most {
            problems.add(
                whole,
                format!("{count} {what}, and {most} are the most"),
                "join some: one entry can be a network",
            );
        }
    }
}

/// All regions that decide something, and what each is.
#[derive(Default)]
struct Map {
    table: Table,
    kinds: Vec<Kind>,
    places: Vec<SourceLocation>,
    warnings: Problems,
}

impl Map {
    fn add(&mut self, region: Region, kind: Kind, place: &SourceLocation) {
        if self.table.add(region) == self.kinds.len() {
            self.kinds.push(kind);
            self.places.push(place.clone());
        }
    }

    fn mesh(&self, index: usize) -> Option<&SpiffeId> {
        match self.kinds.get(index)? {
            Kind::Mesh(id) => Some(id),
            Kind::Plain(_) => None,
        }
    }

    fn place(&self, index: usize) -> String {
        self.places.get(index).map(SourceLocation::to_string).unwrap_or_default()
    }

    fn region(&self, index: usize) -> Option<Region> {
        self.table.regions().get(index).copied()
    }

    /// Gives a part of a mesh destination a row of its own, with the meaning of the whole. Does nothing where there is a
    /// row already, or where something else decides.
    ///
    /// A row for one port would win over the rows for any port that lie inside it. So each of these that decides for that
    /// port so far gets a row for it too, with its own meaning.
    fn split(&mut self, part: Region) {
        let parent = self.table.ancestors(&part).next().filter(|index| self.mesh(*index).is_some());
        let Some(parent) = parent.filter(|_| self.table.position(&part).is_none()) else { return };
        let mut rows = vec![(part, parent)];
        if part.port.is_some() {
            let inside = self.table.any_port_within(&part).filter_map(|index| Some((self.region(index)?, index)));
            let with_port = inside.map(|(inner, index)| (Region { network: inner.network, port: part.port }, index));
            rows.extend(with_port.filter(|(region, index)| self.table.ancestors(region).next() == Some(*index)));
        }
        for (region, like) in rows {
            if let (Some(kind), Some(place)) = (self.kinds.get(like).cloned(), self.places.get(like).cloned()) {
                self.add(region, kind, &place);
            }
        }
    }
}

fn regions(statements: &Statements, problems: &mut Problems) -> Map {
    let mut map = Map::default();
    for entry in &statements.destinations {
        if entry.region.is_of_a_link() {
            let what = format!(
                "address {} is another host's on each link, and programs say which to nobody else",
                entry.region
            );
            problems.add(&entry.place, what, "write an address of that host that is not link-local");
        }
        if let Some(first) = map.table.position(&entry.region) {
            let what = format!("address {} is a destination twice, first at {}", entry.region, map.place(first));
            problems.add(&entry.place, what, "remove one, or write a narrower address");
        }
        map.add(entry.region, Kind::Mesh(entry.id.clone()), &entry.place);
    }
    for rule in &statements.bypasses {
        if let Some(mesh) = map.table.position(&rule.region).filter(|index| map.mesh(*index).is_some()) {
            let what = format!("bypass `{}` has the address of the mesh destination at {}", rule.name, map.place(mesh));
            problems.add(&rule.place, what, "remove one: an address is reached by mutual TLS or in plaintext");
        } else {
            map.add(rule.region, Kind::Plain(Vec::new()), &rule.place);
        }
    }
    for (rules, key) in [(&statements.bypasses, "[[bypass]]"), (&statements.udps, "[[udp]]")] {
        let items = rules.iter().map(|rule| ((&rule.from, rule.region), rule.place.clone(), rule));
        repeated(items, problems, |rule, first| {
            (format!("{key} `{}` says the same as the one at {first}", rule.name), "remove one".into())
        });
    }
    crossings(&map, problems);
    bypasses(&mut map, &statements.bypasses);
    for rule in &statements.udps {
        datagrams(&mut map, rule, problems);
    }
    map
}

/// An exact port wins over a longer prefix for any port, which surprises people. So where the two meet, the answer has
/// to be written down.
fn crossings(map: &Map, problems: &mut Problems) {
    for (index, exact) in map.table.regions().iter().enumerate().filter(|(_, region)| region.port.is_some()) {
        let inside = map.table.any_port_within(exact).filter_map(|other| Some((other, map.region(other)?)));
        for (other, any) in inside.filter(|(_, any)| any.network != exact.network) {
            let both = Region { network: any.network, port: exact.port };
            if map.table.position(&both).is_none()
                && let Some(place) = map.places.get(index)
            {
                let what =
                    format!("{exact} and {any} (at {}) overlap, and neither is part of the other", map.place(other));
                problems.add(place, what, format!("write an entry for {both}, which then decides"));
            }
        }
    }
}

/// Which bypasses hold in each plaintext region: those that cover it, unless a mesh destination lies in between.
fn bypasses(map: &mut Map, rules: &[PlainRule]) {
    for index in 0..map.kinds.len() {
        let Some(region) = map.region(index).filter(|_| map.mesh(index).is_none()) else { continue };
        let between: Vec<_> = map
            .table
            .ancestors(&region)
            .filter(|ancestor| map.mesh(*ancestor).is_some())
            .filter_map(|ancestor| map.region(ancestor))
            .collect();
        let holds =
            |rule: &PlainRule| rule.region.covers(&region) && !between.iter().any(|mesh| rule.region.covers(mesh));
        let holding = rules.iter().enumerate().filter(|(_, rule)| holds(rule)).map(|(at, _)| at).collect();
        if let Some(kind) = map.kinds.get_mut(index) {
            *kind = Kind::Plain(holding);
        }
        if let (Some(mesh), Some(place)) = (between.first(), map.places.get(index)) {
            let what =
                format!("{region} is a hole in the mesh destination {mesh}: programs without an identity reach it too");
            map.warnings.add(place, what, "keep it only if nothing there can speak mutual TLS");
        }
    }
}

/// A UDP rule needs every region that it covers in part to be split.
fn datagrams(map: &mut Map, rule: &PlainRule, problems: &mut Problems) {
    let meshes = map.table.regions().iter().enumerate().filter(|(index, _)| map.mesh(*index).is_some());
    let parts: Vec<_> = meshes.filter_map(|(_, mesh)| mesh.overlap(&rule.region)).collect();
    if parts.is_empty() {
        let what =
            format!("[[udp]] `{}`: {} is no mesh destination, and other UDP is left alone", rule.name, rule.region);
        problems.add(&rule.place, what, "remove it, or write the address of a [[destination]]");
    }
    for part in parts {
        map.split(part);
    }
}

fn build(
    statements: Statements,
    map: Map,
    trust_domain: TrustDomain,
    preexisting: Preexisting,
    whole: &SourceLocation,
) -> Result<Policy, Problems> {
    let mut warnings = map.warnings;
    let ids: Vec<_> = statements.workloads.iter().map(|entry| entry.id.clone()).collect();
    unused(&statements, &ids, &mut warnings);
    let mut rules = Vec::new();
    let allows: Vec<_> = statements
        .allows
        .into_iter()
        .map(|rule| Allow {
            rule: numbered(&mut rules, rule.name, rule.idle_timeout),
            from: rule.from,
            to: rule.to,
            ports: rule.ports,
        })
        .collect();
    let inbounds = statements
        .inbounds
        .into_iter()
        .map(|rule| Listeners {
            permissive: rule.permissive.then(|| numbered(&mut rules, rule.name, None)),
            listen: rule.listen.into_iter().map(|at| at.value).collect(),
            id: rule.id,
            ports: rule.ports,
        })
        .collect();
    let mut plain = |list: Vec<PlainRule>| -> Vec<Plain> {
        let number = |rule: PlainRule| Plain {
            rule: numbered(&mut rules, rule.name, None),
            from: rule.from,
            region: rule.region,
        };
        list.into_iter().map(number).collect()
    };
    let (bypasses, udps) = (plain(statements.bypasses), plain(statements.udps));

    let mut policy = Policy {
        trust_domain,
        preexisting,
        workloads: Vec::with_capacity(ids.len()),
        selectors: Vec::with_capacity(ids.len()),
        filed: HashMap::new(),
        cgroup_selectors: Vec::new(),
        unit_selectors: 0,
        entries: kernel::Entries::default(),
        table: map.table,
        kinds: map.kinds,
        index: AllowIndex::new(&allows),
        allows,
        inbounds,
        bypasses,
        udps,
        expectations: statements.expectations,
        rules,
        warnings: warnings.sorted(),
        kernel: Arc::default(),
    };
    for entry in statements.workloads {
        enrol(&mut policy, entry);
    }
    policy.cgroup_selectors.sort();
    policy.cgroup_selectors.dedup();
    policy.unit_selectors =
        policy.cgroup_selectors.iter().filter(|selector| matches!(selector, Selector::Systemd(_))).count();
    let mut problems = Problems::default();
    let mut entries = kernel::entries(&policy);
    match kernel::compile(&policy, &mut entries) {
        Some(rows) => policy.kernel = Arc::new(rows),
        None => {
            problems.add(whole, "two names of the policy make one number in the kernel", "rename a workload or a rule")
        }
    }
    policy.entries = entries;
    let for_everybody = policy.candidates(&[]).len() + policy.kernel.unseen.len();
    for (what, count, most) in [
        ("rows of destinations", policy.kernel.destinations.len(), MAX_DESTINATIONS),
        ("rows of verdicts", policy.kernel.verdicts.len(), MAX_VERDICTS),
        ("pairs of user and group", for_everybody, MAX_CANDIDATES),
    ] {
        if count > most {
            let what = format!("the rules make more than {most} {what} for the kernel");
            problems.add(whole, what, "write fewer workloads, destinations or ports on this host, or wider networks");
        }
    }
    if problems.is_empty() { Ok(policy) } else { Err(problems) }
}

fn numbered(rules: &mut Vec<Arc<Rule>>, name: Arc<str>, idle_timeout: Option<std::time::Duration>) -> Arc<Rule> {
    let number = u32::try_from(rules.len() + 1).unwrap_or(u32::MAX);
    let rule = Arc::new(Rule { number, name, idle_timeout });
    rules.push(rule.clone());
    rule
}

fn enrol(policy: &mut Policy, entry: WorkloadEntry) {
    let index = policy.workloads.len();
    let mut selectors: Vec<_> = entry.selectors.into_iter().map(|at| at.value).collect();
    selectors.sort();
    policy.cgroup_selectors.extend(selectors.iter().filter(|selector| selector.is_of_cgroup()).cloned());
    if let Some(first) = selectors.iter().find(|selector| selector.is_kernel_visible()) {
        policy.filed.entry(first.clone()).or_default().push(index);
    }
    policy.selectors.push(selectors);
    let number = u32::try_from(index + 1).unwrap_or(u32::MAX);
    policy.workloads.push(Workload { number, id: entry.id });
}

/// Rules that cannot match anything on this host. Warnings, not errors: a directory may be shared by many hosts.
fn unused(statements: &Statements, ids: &[SpiffeId], warnings: &mut Problems) {
    let registered: BTreeSet<&SpiffeId> = ids.iter().collect();
    let is_here = |matcher: &Matcher| match matcher {
        Matcher::Exact(id) => registered.contains(id),
        Matcher::Pattern(pattern) => registered.iter().any(|id| pattern.matches(id)),
    };
    let suggest = |matchers: &[&Matcher]| {
        let near = matchers.iter().find_map(|matcher| match matcher {
            Matcher::Exact(id) => nearest(id.as_str(), registered.iter().map(|id| id.as_str())),
            Matcher::Pattern(_) => None,
        });
        match near {
            Some(near) => format!("write {near}, or leave it if it is for another host"),
            None => "register a [[workload]], or leave it if it is for another host".into(),
        }
    };
    for rule in statements.allows.iter().filter(|rule| !is_here(&rule.from) && !is_here(&rule.to)) {
        let what = format!("rule `{}` is about no workload of this policy: {} to {}", rule.name, rule.from, rule.to);
        warnings.add(&rule.place, what, suggest(&[&rule.from, &rule.to]));
    }
    for rule in statements.bypasses.iter().chain(&statements.udps).filter(|rule| !is_here(&rule.from)) {
        let what = format!("rule `{}` is about no workload of this policy: {}", rule.name, rule.from);
        warnings.add(&rule.place, what, suggest(&[&rule.from]));
    }
    for rule in statements.inbounds.iter().filter(|rule| !registered.contains(&rule.id)) {
        let what = format!("[[inbound]] is about no workload of this policy: {}", rule.id);
        warnings.add(&rule.place, what, suggest(&[&Matcher::Exact(rule.id.clone())]));
    }
}
