//! How full the tables of the kernel programs are.
//!
//! *Invariant:* the maps that are pinned are counted, whether or not this version of the programs has them.

use super::{
    error::{During, Error},
    host,
};
use aya::maps::MapType;
use bunter_sys::bpf::Rows;
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// The longest time that all tables together are counted for: whoever asks waits for it, and so does all other work of this
/// thread.
const PATIENCE: Duration = Duration::from_millis(200);

/// A table and the room in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableUsage {
    /// Name of the map.
    pub name: String,
    /// Rows that it has; at least so many where `counted` is false.
    pub used: u32,
    /// Rows that it has room for.
    pub size: u32,
    /// There was time to count all of them.
    pub counted: bool,
}

/// The tables of one network namespace, opened beforehand: an agent in its sandbox cannot open any.
#[derive(Debug)]
pub struct PinnedTables {
    tables: Vec<(String, Rows)>,
}

impl PinnedTables {
    /// What is pinned for this thread's network namespace. `None` where no agent is and none has been.
    pub fn here() -> Result<Option<Self>, Error> {
        match host::hosts_pins(host::netns()?.1)? {
            Some(pins) if pins.exists() => Self::open(&pins).map(Some),
            _ => Ok(None),
        }
    }

    /// What is pinned in this directory, in the order of the names.
    pub fn open(pins: &Path) -> Result<Self, Error> {
        let reading = || format!("reading {}", pins.display());
        let mut tables = Vec::new();
        for entry in fs::read_dir(pins).during(reading)? {
            let pin = entry.during(reading)?.path();
            let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // Links are pinned beside the maps, and their names say so.
            if name.contains('-') {
                continue;
            }
            let rows = Rows::open(&pin).during(|| format!("opening {}", pin.display()))?;
            if has_rows(&rows) {
                tables.push((name, rows));
            }
        }
        tables.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(Self { tables })
    }

    /// How full each is.
    pub fn count(&self) -> Result<Vec<TableUsage>, Error> {
        let until = Instant::now() + PATIENCE;
        let room = |(name, rows): &(String, Rows)| {
            let counting = || format!("counting the rows of {name}");
            let (used, counted) = rows.count(|| Instant::now() < until).during(counting)?;
            Ok(TableUsage { name: name.clone(), used, size: rows.info.max_entries(), counted })
        };
        self.tables.iter().map(room).collect()
    }
}

/// Arrays and queues have no rows that come and go.
fn has_rows(rows: &Rows) -> bool {
    matches!(
        rows.info.map_type(),
        Ok(MapType::Hash
            | MapType::LruHash
            | MapType::PerCpuHash
            | MapType::LruPerCpuHash
            | MapType::LpmTrie
            | MapType::SockHash
            | MapType::HashOfMaps)
    )
}
