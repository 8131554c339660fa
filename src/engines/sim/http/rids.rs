//! SGLang's request ids: one that is in flight is refused a second time.

use std::sync::Arc;

use serde_json::Value;

use super::error::ApiError;
use super::sglang;
use crate::engines::sim::engine::Engine;

/// The ids of a request, taken until it is dropped; none where SGLang is not spoken.
pub(super) struct Rids {
    engine: Arc<Engine>,
    ids: Vec<String>,
}

impl Rids {
    /// Takes the ids that a body names; `engine` is the first of the ranks, which keeps them for all.
    pub(super) fn of(body: &Value, engine: &Arc<Engine>) -> Result<Self, ApiError> {
        let mut rids = Self { engine: Arc::clone(engine), ids: Vec::new() };
        if !sglang::is_spoken(engine) {
            return Ok(rids);
        }
        let named: Vec<&str> = match &body["rid"] {
            Value::String(rid) => vec![rid],
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let mut in_flight = engine.rids.lock();
        for rid in named {
            if !in_flight.insert(rid.to_owned()) {
                drop(in_flight);
                let message = format!("Duplicate request ID detected: {rid}");
                return Err(ApiError::bad_request(message, None).of_sglang());
            }
            rids.ids.push(rid.to_owned());
        }
        drop(in_flight);
        Ok(rids)
    }
}

impl Drop for Rids {
    fn drop(&mut self) {
        let mut in_flight = self.engine.rids.lock();
        self.ids.iter().for_each(|rid| {
            in_flight.remove(rid);
        });
    }
}
