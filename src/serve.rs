//! Runs a replica.

use crate::config::Loaded;

/// Runs a replica until it is told to stop.
pub fn run(loaded: Loaded) -> anyhow::Result<()> {
    let _ = loaded;
    anyhow::bail!("serve is not wired yet")
}
