//! `GET /v1/models` and one model of it: what the routable workers serve, merged, in OpenAI's shape.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::routing::view::RegistryView;
use crate::state::worker::ServedModel;

/// The list of those that `visible` lets through. A model served by several workers appears once, with the shortest of their
/// contexts, since any of them may get a request. `created` is 0: a router does not know.
pub(super) fn list(view: &RegistryView, visible: impl Fn(&str) -> bool) -> Value {
    let data: Vec<Value> = merged(view, visible).into_values().map(entry).collect();
    json!({"object": "list", "data": data})
}

/// One model; `None` if no routable worker serves it.
pub(super) fn show(view: &RegistryView, name: &str) -> Option<Value> {
    merged(view, |model| model == name).into_values().next().map(entry)
}

fn merged(view: &RegistryView, visible: impl Fn(&str) -> bool) -> BTreeMap<&str, ServedModel> {
    let mut merged: BTreeMap<&str, ServedModel> = BTreeMap::new();
    for worker in view.workers.iter().filter(|worker| worker.is_routable()) {
        for model in worker.record.spec.models.iter().filter(|model| visible(&model.name)) {
            let known = merged.entry(&model.name).or_insert_with(|| model.clone());
            known.max_model_len = match (known.max_model_len, model.max_model_len) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
    }
    merged
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
