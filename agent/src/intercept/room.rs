//! How full the tables of the kernel programs are.
//!
//! *Invariant:* what is pinned is what is counted, whatever maps this version of the programs has.

use super::{
    error::{During, Error},
    host,
};
use crate::sys::bpf;
use aya::maps::{MapData, MapType};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// All tables together are counted for no longer: whoever asks for it waits, and so does what else its thread has to do.
const PATIENCE: Duration = Duration::from_millis(200);

/// A table and the room in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Name of the map.
    pub name: String,
    /// Rows that it has; at least so many where `counted` is false.
    pub used: u32,
    /// Rows that it has room for.
    pub size: u32,
    /// There was time to count all of them.
    pub counted: bool,
}

/// The tables that are pinned for this thread's network namespace. `None` where no agent is and none has been.
pub fn rooms_here() -> Result<Option<Vec<Room>>, Error> {
    match host::hosts_pins(host::netns()?.1)? {
        Some(pins) if pins.exists() => rooms(&pins).map(Some),
        _ => Ok(None),
    }
}

/// The tables that are pinned in this directory, by name. Arrays and queues have no rows that come and go, and are left out.
pub fn rooms(pins: &Path) -> Result<Vec<Room>, Error> {
    let reading = || format!("reading {}", pins.display());
    let entries: io::Result<Vec<PathBuf>> =
        fs::read_dir(pins).during(reading)?.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut entries = entries.during(reading)?;
    entries.sort();
    let until = Instant::now() + PATIENCE;
    entries.iter().filter_map(|pin| room(pin, until).transpose()).collect()
}

/// `None` for what is no table.
fn room(pin: &Path, until: Instant) -> Result<Option<Room>, Error> {
    let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Links are pinned beside the maps, and their names say so.
    if name.contains('-') {
        return Ok(None);
    }
    let counting = || format!("counting the rows of {}", pin.display());
    let map = MapData::from_pin(pin).map_err(io::Error::other).during(counting)?;
    let info = map.info().map_err(io::Error::other).during(counting)?;
    let table = matches!(
        info.map_type(),
        Ok(MapType::Hash
            | MapType::LruHash
            | MapType::PerCpuHash
            | MapType::LruPerCpuHash
            | MapType::LpmTrie
            | MapType::SockHash
            | MapType::HashOfMaps)
    );
    if !table {
        return Ok(None);
    }
    let size = info.max_entries();
    let (used, counted) = bpf::count(&map, size, || Instant::now() < until).during(counting)?;
    Ok(Some(Room { name, used, size, counted }))
}
