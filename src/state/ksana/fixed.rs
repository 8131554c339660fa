//! The tables as they should be: what a group is follows from its nodes at once, nodes go offline by
//! the leader's clock and nobody's heartbeat, and what is gone is forgotten.

use super::strict::{check_comm, too_many_pairs};
use super::{
    GroupKey, KsanaOutcome, KsanaState, MAX_NAME, MAX_NODES, MAX_PAIRS, NodeRecord, NodeSpec, PairRecord,
    Role, Rules, describe,
};

pub(super) fn full() -> KsanaOutcome {
    KsanaOutcome::Refused(format!("there are {MAX_NODES} nodes already"))
}

impl KsanaState {
    pub(super) fn register(
        &mut self,
        now_ms: u64,
        spec: NodeSpec,
        wanted: Option<String>,
        spare: String,
    ) -> KsanaOutcome {
        if wanted.as_ref().is_some_and(|id| id.len() > MAX_NAME) {
            return KsanaOutcome::Refused(format!("node_id is longer than {MAX_NAME} bytes"));
        }
        let known = self.by_coordinator(&spec).cloned();
        let known_id = known.as_ref().map(|node| node.node_id.clone());
        let displaced = self.at_place(&spec).filter(|node| Some(&node.node_id) != known_id.as_ref()).cloned();
        let displaced_id = displaced.as_ref().map(|node| node.node_id.clone());
        let is_free = |id: &String| self.node(id).is_none() || displaced_id.as_ref() == Some(id);
        if known.is_none() && wanted.as_ref().is_some_and(|wanted| !is_free(wanted)) {
            return KsanaOutcome::IdTaken;
        }
        if known.is_none() && displaced.is_none() && !self.make_room() {
            return full();
        }
        // Whoever was there has begun anew: what it had agreed on with others is gone.
        for old in [&known, &displaced].into_iter().flatten() {
            self.has_restarted(old);
        }
        if let Some(id) = &displaced_id {
            self.take(id);
        }
        let node_id = match &known_id {
            // An id that describes another node would bring that one back some day.
            Some(id) if describe(id, &spec.cluster).is_some_and(|of| of != spec) => {
                self.id_for(&spec, None, spare)
            }
            Some(id) => id.clone(),
            None => self.id_for(&spec, wanted, spare),
        };
        match &known_id {
            Some(id) => self.replace(now_ms, id, spec.clone(), node_id.clone()),
            None => self.insert(now_ms, spec.clone(), node_id.clone()),
        }
        if let Some(old) = known {
            self.recount(&old.spec.group());
        }
        self.recount(&spec.group());
        KsanaOutcome::Registered { node_id }
    }

    fn has_restarted(&mut self, old: &NodeRecord) {
        if old.spec.is_prefill_head() {
            self.clear_pairs_of(&old.spec.inference_addr);
        }
        if old.spec.role == Role::Decode {
            // Who had not heard of a comm id has not joined under it, and still can.
            let knew = |pair: &PairRecord| {
                pair.decode_addr == old.spec.inference_addr
                    && pair.cluster == old.spec.cluster
                    && !pair.comm_id.is_empty()
                    && old.last_heard_ms >= pair.named_ms
            };
            let theirs: Vec<String> =
                self.pairs().iter().filter(|(_, pair)| knew(pair)).map(|(key, _)| key.clone()).collect();
            for key in theirs {
                self.with_pair(&key, PairRecord::default, |pair| pair.broken = true);
            }
        }
    }

    /// Whether there is room for one more node; if not, the one that has been offline for longest goes.
    fn make_room(&mut self) -> bool {
        if self.has_room() {
            return true;
        }
        let gone =
            self.nodes().filter(|node| !node.online).min_by_key(|node| (node.last_heard_ms, node.order));
        let Some(id) = gone.map(|node| node.node_id.clone()) else { return false };
        self.forget(&id);
        true
    }

    fn forget(&mut self, id: &str) {
        if let Some(node) = self.take(id) {
            self.recount(&node.spec.group());
        }
    }

    pub(super) fn beat(&mut self, now_ms: u64, id: &str) {
        let Some(key) = self.node(id).map(|node| node.spec.group()) else { return };
        self.heard(id, now_ms);
        self.set_online(id, true);
        let counted = self.count(&key, |node| node.online);
        self.set_group(&key, counted);
    }

    pub(super) fn name_pair(
        &mut self,
        now_ms: u64,
        id: &str,
        comm_key: String,
        comm_id: String,
    ) -> KsanaOutcome {
        let Some(node) = self.node(id) else { return KsanaOutcome::UnknownNode };
        if !node.spec.is_prefill_head() {
            return KsanaOutcome::NotPrefillHead;
        }
        let Some((prefill, decode)) = comm_key.split_once("__") else { return KsanaOutcome::BadKey };
        if prefill != node.spec.inference_addr {
            return KsanaOutcome::ForeignKey;
        }
        let cluster = node.spec.cluster.clone();
        if let Err(why) = check_comm(&comm_key, &comm_id) {
            return KsanaOutcome::Refused(why);
        }
        if comm_id.is_empty() {
            return KsanaOutcome::Refused("comm_id must not be empty".to_owned());
        }
        let decode_group =
            GroupKey { cluster: cluster.clone(), role: Role::Decode, inference_addr: decode.to_owned() };
        if !self.groups().contains_key(&decode_group) {
            return KsanaOutcome::ForeignKey;
        }
        match self.pairs().get(&comm_key) {
            // The first one stands until the prefill group begins anew: others may have joined under it.
            Some(pair) if !pair.comm_id.is_empty() => return KsanaOutcome::CommId(pair.comm_id.clone()),
            None if self.pairs().len() >= MAX_PAIRS => return too_many_pairs(),
            _ => {}
        }
        let made = || PairRecord {
            cluster,
            prefill_addr: prefill.to_owned(),
            decode_addr: decode.to_owned(),
            ..PairRecord::default()
        };
        self.with_pair(&comm_key, made, |pair| {
            pair.comm_id = comm_id.clone();
            pair.named_ms = now_ms;
            pair.broken = false;
        });
        KsanaOutcome::CommId(comm_id)
    }

    /// Whether [`KsanaState::judge`] would change something.
    pub fn wants_judgement(&self, now_ms: u64, rules: Rules, forget_ms: u64) -> bool {
        self.nodes().any(|node| {
            (node.online && rules.overdue(now_ms, node.last_heard_ms))
                || is_long_gone(node, now_ms, forget_ms)
        })
    }

    pub(super) fn judge(&mut self, now_ms: u64, rules: Rules, forget_ms: u64) {
        let overdue = |node: &&NodeRecord| node.online && rules.overdue(now_ms, node.last_heard_ms);
        let overdue: Vec<(String, GroupKey)> =
            self.nodes().filter(overdue).map(|node| (node.node_id.clone(), node.spec.group())).collect();
        for (id, _) in &overdue {
            self.set_online(id, false);
        }
        for (_, group) in &overdue {
            self.recount(group);
        }
        let gone = self.nodes().filter(|node| is_long_gone(node, now_ms, forget_ms));
        let gone: Vec<String> = gone.map(|node| node.node_id.clone()).collect();
        gone.iter().for_each(|id| self.forget(id));
    }
}

fn is_long_gone(node: &NodeRecord, now_ms: u64, forget_ms: u64) -> bool {
    !node.online && now_ms.saturating_sub(node.last_heard_ms) > forget_ms
}
