//! A row of a kernel table, before and after.

/// One row before and after.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change<K, V> {
    pub(super) key: K,
    pub(super) before: Option<V>,
    pub(super) after: Option<V>,
}

pub(super) type Changes<K, V> = Vec<Change<K, V>>;

impl<K, V> Change<K, V> {
    pub(super) fn new(key: K, after: V) -> Self {
        Self { key, before: None, after: Some(after) }
    }
}
