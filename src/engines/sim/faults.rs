//! Switches that make the engine misbehave at run time, for tests of what stands in front of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};

/// What `/health` and `/ping` do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Answer 200.
    #[default]
    Ok,
    /// Answer 503.
    Fail,
    /// Accept the request and never answer.
    Hang,
}

/// The switches that stay as they are set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FaultState {
    /// The engine makes no more steps: streams stand still, requests are accepted.
    pub hang: bool,
    /// Inference routes answer with this status.
    pub error_status: Option<u16>,
    /// Connections of inference requests, running ones too, are reset.
    pub reset: bool,
    /// Streams carry a broken event and end; other replies are broken JSON.
    pub garbage: bool,
    /// A stream ends without a word after this many events.
    pub close_after_events: Option<u64>,
    /// What the health routes do.
    pub health: Health,
    /// The engine process is dead: streams end with an error event, new requests get 500.
    pub engine_dead: bool,
}

/// A change of the switches: what is absent stays, `null` switches off.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FaultChange {
    hang: Option<bool>,
    #[serde(deserialize_with = "present")]
    error_status: Option<Option<u16>>,
    reset: Option<bool>,
    garbage: Option<bool>,
    #[serde(deserialize_with = "present")]
    close_after_events: Option<Option<u64>>,
    health: Option<Health>,
    engine_dead: Option<bool>,
    /// Once: everything running and waiting ends with `finish_reason` `abort`.
    pub abort_all: bool,
}

impl FaultChange {
    /// The engine process dies.
    pub fn death() -> Self {
        Self { engine_dead: Some(true), ..Self::default() }
    }
}

fn present<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Some)
}

/// The switches of one engine, read on every event and therefore cheap while none is set.
#[derive(Debug, Default)]
pub struct Faults {
    state: RwLock<FaultState>,
    any: AtomicBool,
    changes: AtomicU64,
}

impl Faults {
    /// The switches now.
    pub fn get(&self) -> FaultState {
        if self.any.load(Ordering::Acquire) { self.state.read().clone() } else { FaultState::default() }
    }

    /// Sets what the change names and returns the result.
    pub fn apply(&self, change: &FaultChange) -> Result<FaultState, String> {
        if let Some(Some(status)) = change.error_status
            && !(400..600).contains(&status)
        {
            return Err(format!("error_status must be 400 to 599, not {status}"));
        }
        let mut state = self.state.write();
        state.hang = change.hang.unwrap_or(state.hang);
        state.error_status = change.error_status.unwrap_or(state.error_status);
        state.reset = change.reset.unwrap_or(state.reset);
        state.garbage = change.garbage.unwrap_or(state.garbage);
        state.close_after_events = change.close_after_events.unwrap_or(state.close_after_events);
        state.health = change.health.unwrap_or(state.health);
        state.engine_dead = change.engine_dead.unwrap_or(state.engine_dead);
        self.any.store(*state != FaultState::default(), Ordering::Release);
        self.changes.fetch_add(1, Ordering::Release);
        Ok(state.clone())
    }
}
