//! `GET /v1/models`: what the routable workers serve, merged, in OpenAI's shape.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::routing::view::RegistryView;
use crate::state::worker::ServedModel;

/// The list. A model served by several workers appears once, with the shortest of their
/// contexts, since any of them may get a request. `created` is 0: a router does not know.
pub(super) fn list(view: &RegistryView) -> Value {
    let mut merged: BTreeMap<&str, ServedModel> = BTreeMap::new();
    for worker in view.workers.iter().filter(|worker| worker.is_routable()) {
        for model in &worker.record.spec.models {
            let known = merged.entry(&model.name).or_insert_with(|| model.clone());
            known.max_model_len = match (known.max_model_len, model.max_model_len) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
    }
    let data: Vec<Value> = merged.into_values().map(entry).collect();
    json!({"object": "list", "data": data})
}

fn entry(model: ServedModel) -> Value {
    let mut entry = json!({
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "everline",
        "root": model.lora_of.as_deref().unwrap_or(&model.name),
        "parent": model.lora_of,
    });
    if let Some(length) = model.max_model_len {
        entry["max_model_len"] = length.into();
    }
    entry
}
