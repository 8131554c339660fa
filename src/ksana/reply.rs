//! What the management routes answer with.

use super::json::Json;
use crate::state::ksana::{Answer, NodeSpec};

/// `{"detail":…}`
pub fn detail(text: &str) -> String {
    text_of(&Json::object([("detail", Json::text(text))]))
}

/// What a registration is answered with; `now` is UTC, with `Z`.
pub fn registered(node_id: &str, now: &str) -> String {
    let members = [
        ("node_id", Json::text(node_id)),
        ("is_online", Json::Bool(true)),
        ("last_heartbeat", Json::text(now)),
    ];
    text_of(&Json::object(members))
}

/// What a heartbeat is answered with; `now` is local time without its zone. With `certain` false the
/// pairs that seem to have no comm id are left out: it may only not be known here yet, and who leads a
/// prefill group would make a new one.
pub fn heartbeat(answer: &Answer, now: &str, certain: bool) -> String {
    let shown = || answer.keys.iter().filter(|key| certain || !key.comm_id.is_empty());
    let addresses = shown().map(|key| {
        let tuple = |(rank, device, addr): &(u32, u32, String)| {
            Json::List(vec![Json::int((*rank).into()), Json::int((*device).into()), Json::text(addr)])
        };
        (key.comm_key.clone(), Json::List(key.addresses.iter().map(tuple).collect()))
    });
    let ids = shown().map(|key| (key.comm_key.clone(), Json::text(&key.comm_id)));
    let spec = &answer.node.spec;
    let members = [
        ("node_id", Json::text(&answer.node.node_id)),
        ("is_online", Json::Bool(true)),
        ("group_ready", Json::Bool(answer.group_ready)),
        ("coordinator_addr", Json::text(&spec.coordinator_addr)),
        ("node_role", Json::text(spec.role.name())),
        ("timestamp", Json::text(now)),
        ("comm_group_to_address", Json::Object(addresses.collect())),
        ("comm_group_to_id", Json::Object(ids.collect())),
    ];
    text_of(&Json::object(members))
}

/// What the registration of a comm id is answered with.
pub fn comm_id(stored: &str) -> String {
    text_of(&Json::object([("status", Json::text("OK")), ("comm_id", Json::text(stored))]))
}

/// Which of the database's rules a registration broke.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// Two nodes with one place.
    Place,
    /// Two nodes with one id.
    Id,
}

/// What the reference answers a registration with that its database refuses: the words of SQLAlchemy,
/// statement and parameters included. `now` as the database writes it.
pub fn sql_error(broken: Broken, node_id: &str, spec: &NodeSpec, now: &str) -> String {
    let columns = match broken {
        Broken::Place => {
            "node_info.cluster_name, node_info.inference_addr, node_info.role, node_info.node_rank"
        }
        Broken::Id => "node_info.node_id",
    };
    let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
    let text = format!(
        "(sqlite3.IntegrityError) UNIQUE constraint failed: {columns}\n[SQL: INSERT INTO node_info (node_id, \
         cluster_name, inference_addr, coordinator_addr, role, node_rank, world_size, device_num, last_heartbeat, \
         is_online, start_time, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)]\n\
         [parameters: ({}, {}, {}, {}, '{}', {}, {}, {}, '{now}', 1, '{now}', '{now}', '{now}')]\n(Background on \
         this error at: https://sqlalche.me/e/20/gkpj)",
        quoted(node_id),
        quoted(&spec.cluster),
        quoted(&spec.inference_addr),
        quoted(&spec.coordinator_addr),
        spec.role.name(),
        spec.rank,
        spec.world_size,
        spec.devices,
    );
    detail(&text)
}

fn text_of(json: &Json) -> String {
    // Of texts, flags and whole numbers, which can always be written.
    json.to_text().unwrap_or_default()
}
