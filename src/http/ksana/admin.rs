//! KsanaLLM's tables for operators.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::Method;

use crate::admin_types::MessageReply;
use crate::admin_types::ksana::{KsanaGroup, KsanaNode, KsanaPair, KsanaReply};
use crate::http::admin::settle;
use crate::http::call::{Call, misrouted};
use crate::http::errors::{ApiError, Code};
use crate::http::routes::Route;
use crate::routing::view::NOT_SCORED;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::ksana::{GroupKey, KsanaCommand, KsanaOutcome, KsanaState, Role};

/// Answers an operator.
pub(in crate::http) async fn answer(call: Call) -> Result<Response, ApiError> {
    let front = &call.shard.front;
    match (call.route, call.method()) {
        (Route::AdminKsana, &Method::GET) => {
            settle(&call.shard, call.query()).await?;
            let mut reply = KsanaReply::default();
            let strict = front.ksana.as_ref().map(|ksana| ksana.options.strict);
            front.control.ksana(&mut |state, now_ms| reply = tables(state, now_ms, strict));
            let groups = front.control.ksana_groups();
            let blocks = front.control.blocks().index.load_full();
            for group in &mut reply.groups {
                let role = if group.role == Role::Prefill.name() { Role::Prefill } else { Role::Decode };
                let (cluster, inference_addr) = (group.cluster_name.clone(), group.inference_addr.clone());
                let Some(view) = groups.get(&GroupKey { cluster, role, inference_addr }) else { continue };
                let load = view.rank_load(0, true);
                group.requests = load.requests;
                group.prefill_tokens = load.prefill_tokens;
                group.kv_blocks = load.decode_blocks;
                let ranks = view.live.ranks();
                let known = ranks.first().filter(|ix| **ix != NOT_SCORED);
                group.cached_blocks = known.map_or(0, |ix| blocks.rank(*ix).0);
            }
            Ok(Json(reply).into_response())
        }
        (Route::AdminKsanaNode, &Method::DELETE) => {
            let invalid =
                || ApiError::new(Code::InvalidValue, "the id in the path is not valid text").param("id");
            let node_id = call.parameter().ok_or_else(invalid)?;
            let command = KsanaCommand::Remove { node_id: node_id.clone() };
            match front.control.propose(ControlCommand::Ksana(command)).await? {
                ControlOutcome::Ksana(KsanaOutcome::UnknownNode) => {
                    let text = format!("no node has the id {node_id}; everline ksana nodes lists them");
                    Err(ApiError::new(Code::WorkerNotFound, text).param("id"))
                }
                _ => {
                    let message =
                        format!("node {node_id} is removed; should it still send heartbeats, it comes back");
                    Ok(Json(MessageReply { message }).into_response())
                }
            }
        }
        (route, _) => Err(misrouted(route)),
    }
}

fn tables(state: &KsanaState, now_ms: u64, strict: Option<bool>) -> KsanaReply {
    let compat = match strict {
        Some(true) => "strict",
        Some(false) => "fixed",
        None => "",
    };
    let mut nodes: Vec<_> = state.nodes().collect();
    nodes.sort_by_key(|node| node.order);
    let nodes = nodes.into_iter().map(|node| KsanaNode {
        node_id: node.node_id.clone(),
        cluster_name: node.spec.cluster.clone(),
        inference_addr: node.spec.inference_addr.clone(),
        coordinator_addr: node.spec.coordinator_addr.clone(),
        role: node.spec.role.name().to_owned(),
        node_rank: node.spec.rank,
        world_size: node.spec.world_size,
        device_num: node.spec.devices,
        is_online: node.online,
        heard_ms_ago: now_ms.saturating_sub(node.last_heard_ms),
    });
    let mut groups: Vec<_> = state.groups().iter().collect();
    groups.sort_by_key(|(_, group)| group.order);
    let groups = groups.into_iter().map(|(key, group)| KsanaGroup {
        cluster_name: key.cluster.clone(),
        inference_addr: key.inference_addr.clone(),
        role: key.role.name().to_owned(),
        world_size_expected: group.world_size,
        online_device_sum: group.online_devices,
        online_node_count: group.online_nodes,
        is_ready: group.ready,
        ..KsanaGroup::default()
    });
    let mut pairs: Vec<_> = state.pairs().iter().collect();
    pairs.sort_by_key(|(_, pair)| pair.order);
    let pairs = pairs.into_iter().map(|(key, pair)| {
        let blocked_by = state.blocker(key).filter(|_| strict != Some(true)).map(str::to_owned);
        KsanaPair {
            comm_key: key.clone(),
            cluster_name: pair.cluster.clone(),
            is_active: if strict == Some(true) { pair.active } else { blocked_by.is_none() },
            blocked_by,
            has_comm_id: !pair.comm_id.is_empty(),
        }
    });
    KsanaReply {
        compat: compat.to_owned(),
        nodes: nodes.collect(),
        groups: groups.collect(),
        pairs: pairs.collect(),
    }
}
