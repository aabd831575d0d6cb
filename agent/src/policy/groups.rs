//! Which patterns match an ID, among many: found segment by segment, not pattern by pattern.
//!
//! *Invariant:* the patterns found are exactly those whose [`Pattern::matches`] takes the ID.

use bunter_identity::spiffe::{Pattern, SpiffeId};
use std::collections::HashMap;

/// Patterns by their segments, the trust domain first.
#[derive(Debug, Default)]
pub(super) struct Groups<'p> {
    nodes: Vec<Node<'p>>,
}

#[derive(Debug, Default)]
struct Node<'p> {
    literal: HashMap<&'p str, usize>,
    /// `*`
    one: Option<usize>,
    /// A pattern that ends here, and one that ends here in `**`.
    here: Option<&'p Pattern>,
    below: Option<&'p Pattern>,
}

impl<'p> Groups<'p> {
    pub fn new(patterns: impl Iterator<Item = &'p Pattern>) -> Self {
        let mut groups = Self { nodes: vec![Node::default()] };
        for pattern in patterns {
            groups.add(pattern);
        }
        groups
    }

    fn add(&mut self, pattern: &'p Pattern) {
        let mut at = 0;
        let mut to_the_end = false;
        for segment in segments(pattern.as_str()) {
            if segment == "**" {
                to_the_end = true;
                break;
            }
            let next = self.nodes.len();
            let Some(node) = self.nodes.get_mut(at) else { return };
            at = match segment {
                "*" => *node.one.get_or_insert(next),
                literal => *node.literal.entry(literal).or_insert(next),
            };
            if at == next {
                self.nodes.push(Node::default());
            }
        }
        if let Some(node) = self.nodes.get_mut(at) {
            if to_the_end { &mut node.below } else { &mut node.here }.get_or_insert(pattern);
        }
    }

    /// The patterns that match, sorted.
    pub fn matching(&self, id: &SpiffeId) -> Vec<&'p Pattern> {
        let mut found = Vec::new();
        let mut reached = vec![0];
        for segment in segments(id.as_str()) {
            let nodes: Vec<&Node<'p>> = reached.iter().filter_map(|at| self.nodes.get(*at)).collect();
            found.extend(nodes.iter().filter_map(|node| node.below));
            reached = nodes.iter().flat_map(|node| [node.literal.get(segment).copied(), node.one]).flatten().collect();
        }
        found.extend(reached.iter().filter_map(|at| self.nodes.get(*at)).filter_map(|node| node.here));
        found.sort_unstable();
        found.dedup();
        found
    }
}

fn segments(uri: &str) -> impl Iterator<Item = &str> {
    uri.strip_prefix("spiffe://").unwrap_or(uri).split('/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_found_is_what_matches(
            patterns in proptest::collection::vec("spiffe://(td|te)(/(a|b|\\*)){0,3}/(a|b|\\*|\\*\\*)", 0..12),
            id in "spiffe://(td|te)(/(a|b|c)){1,4}",
        ) {
            let patterns: Vec<Pattern> = patterns.iter().filter_map(|text| Pattern::parse(text).ok()).collect();
            let id = SpiffeId::parse(&id).unwrap();
            let mut expected: Vec<&Pattern> = patterns.iter().filter(|pattern| pattern.matches(&id)).collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(Groups::new(patterns.iter()).matching(&id), expected);
        }
    }
}
