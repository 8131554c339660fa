//! The tables as the reference router keeps them, its faults included: who heartbeats decides what
//! everybody else is.

use super::{
    GroupKey, GroupRecord, KsanaOutcome, KsanaState, Leg, MAX_COMM_ID, MAX_NAME, MAX_PAIRS, NodeRecord,
    NodeSpec, PairRecord, Role, Rules,
};

/// What a heartbeat changes, beside the time of the node's last one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Effects {
    /// The node itself comes online.
    comes_back: bool,
    /// Nodes that go offline.
    go_offline: Vec<String>,
    /// Rows that go unready with them.
    go_unready: Vec<GroupKey>,
    /// The node's own group.
    own: Option<(GroupKey, GroupRecord)>,
    /// Pairs by key, with what becomes of their activity.
    pairs: Vec<(String, PairRecord)>,
}

impl Effects {
    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl KsanaState {
    /// Whether a heartbeat of this node would change nothing but its time: then nobody needs to agree
    /// about it before it is answered. False for a node that is not known.
    pub fn is_plain_beat(&self, now_ms: u64, id: &str, rules: Rules) -> bool {
        let Some(node) = self.node(id) else { return false };
        match rules.strict {
            true => self.effects(now_ms, node, rules).is_nothing(),
            false => node.online && self.groups().contains_key(&node.spec.group()),
        }
    }

    fn effects(&self, now_ms: u64, caller: &NodeRecord, rules: Rules) -> Effects {
        let spec = &caller.spec;
        let is_overdue = |node: &NodeRecord| {
            node.node_id != caller.node_id
                && node.spec.cluster == spec.cluster
                && rules.overdue(now_ms, node.last_heard_ms)
        };
        let overdue: Vec<&NodeRecord> = self.nodes().filter(|node| is_overdue(node)).collect();
        // By their address alone, whatever their role.
        let unready = |key: &GroupKey| {
            key.cluster == spec.cluster
                && overdue.iter().any(|node| node.spec.inference_addr == key.inference_addr)
        };
        let own_key = spec.group();
        let own =
            self.count(&own_key, |node| node.node_id == caller.node_id || (node.online && !is_overdue(node)));
        let go_unready = self
            .groups()
            .iter()
            .filter(|(key, group)| group.ready && **key != own_key && unready(key))
            .map(|(key, _)| key.clone());
        let old = self.groups().get(&own_key);
        let own_changes = old.is_none_or(|old| *old != GroupRecord { order: old.order, ..own });
        let mut effects = Effects {
            comes_back: !caller.online,
            go_offline: overdue.iter().filter(|n| n.online).map(|n| n.node_id.clone()).collect(),
            go_unready: go_unready.collect(),
            own: own_changes.then(|| (own_key.clone(), own)),
            pairs: Vec::new(),
        };
        let mut opposite: Vec<(&GroupKey, &GroupRecord)> = self
            .groups()
            .iter()
            .filter(|(key, _)| key.cluster == spec.cluster && key.role == spec.role.opposite())
            .collect();
        opposite.sort_by_key(|(_, group)| group.order);
        for (key, group) in opposite {
            let is_ready = group.ready && !unready(key);
            let (prefill, decode) = match spec.role {
                Role::Prefill => (own.ready, is_ready),
                Role::Decode => (is_ready, own.ready),
            };
            let active = is_shown(spec.rank, prefill, decode);
            let comm_key = comm_key(spec, &key.inference_addr);
            match self.pairs().get(&comm_key) {
                Some(pair) if pair.active == active => {}
                Some(pair) => effects.pairs.push((comm_key, PairRecord { active, ..pair.clone() })),
                None if self.pairs().len() + effects.pairs.len() < MAX_PAIRS => {
                    effects.pairs.push((comm_key, new_pair(spec, &key.inference_addr, active)));
                }
                None => {}
            }
        }
        effects
    }

    pub(super) fn beat_strictly(&mut self, now_ms: u64, id: &str, rules: Rules) {
        let Some(node) = self.node(id) else { return };
        let effects = self.effects(now_ms, node, rules);
        self.heard(id, now_ms);
        self.set_online(id, true);
        for id in &effects.go_offline {
            self.set_online(id, false);
        }
        for key in &effects.go_unready {
            let group = self.groups().get(key).copied().unwrap_or_default();
            self.set_group(key, GroupRecord { ready: false, ..group });
        }
        if let Some((key, group)) = &effects.own {
            self.set_group(key, *group);
        }
        for (key, pair) in effects.pairs {
            let active = pair.active;
            self.with_pair(&key, || pair, |pair| pair.active = active);
        }
    }

    pub(super) fn register_strictly(
        &mut self,
        now_ms: u64,
        spec: NodeSpec,
        wanted: Option<String>,
        spare: String,
    ) -> KsanaOutcome {
        let place = self.at_place(&spec).map(|node| node.node_id.clone());
        if let Some(old) = self.by_coordinator(&spec).cloned() {
            if place.is_some_and(|place| place != old.node_id) {
                return KsanaOutcome::PlaceTaken;
            }
            if old.spec.is_prefill_head() {
                self.clear_pairs_of(&old.spec.inference_addr);
            }
            self.replace(now_ms, &old.node_id, spec, old.node_id.clone());
            return KsanaOutcome::Registered { node_id: old.node_id };
        }
        if place.is_some() {
            return KsanaOutcome::PlaceTaken;
        }
        if wanted.as_ref().is_some_and(|wanted| self.node(wanted).is_some()) {
            return KsanaOutcome::IdTaken;
        }
        if !self.has_room() {
            return super::fixed::full();
        }
        let node_id = self.id_for(&spec, wanted, spare);
        self.insert(now_ms, spec, node_id.clone());
        KsanaOutcome::Registered { node_id }
    }

    pub(super) fn name_pair_strictly(
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
        if let Err(why) = check_comm(&comm_key, &comm_id) {
            return KsanaOutcome::Refused(why);
        }
        if !self.pairs().contains_key(&comm_key) && self.pairs().len() >= MAX_PAIRS {
            return too_many_pairs();
        }
        let cluster = node.spec.cluster.clone();
        let legs = self.legs(&cluster, prefill, decode);
        let made = || PairRecord {
            cluster: cluster.clone(),
            prefill_addr: prefill.to_owned(),
            decode_addr: decode.to_owned(),
            active: true,
            ..PairRecord::default()
        };
        self.with_pair(&comm_key, made, |pair| {
            pair.legs = legs;
            pair.comm_id = comm_id.clone();
            pair.named_ms = now_ms;
        });
        KsanaOutcome::CommId(comm_id)
    }

    /// The nodes of both groups, prefill first, each by rank.
    pub(super) fn legs(&self, cluster: &str, prefill: &str, decode: &str) -> Vec<Leg> {
        let of = |role, addr| self.members(cluster, role, addr);
        let nodes = of(Role::Prefill, prefill).into_iter().chain(of(Role::Decode, decode));
        nodes
            .map(|node| Leg {
                rank: node.spec.rank,
                devices: node.spec.devices,
                coordinator_addr: node.spec.coordinator_addr.clone(),
            })
            .collect()
    }
}

/// Whether a caller of this rank is shown a pair whose groups are ready or not. A prefill group that
/// is not ready shows to rank 0 all the same, of either role.
pub(super) fn is_shown(rank: u32, prefill_ready: bool, decode_ready: bool) -> bool {
    decode_ready && (prefill_ready || rank == 0)
}

/// The key of a node's group with one of the opposite role.
pub(super) fn comm_key(spec: &NodeSpec, opposite: &str) -> String {
    match spec.role {
        Role::Prefill => format!("{}__{opposite}", spec.inference_addr),
        Role::Decode => format!("{opposite}__{}", spec.inference_addr),
    }
}

fn new_pair(spec: &NodeSpec, opposite: &str, active: bool) -> PairRecord {
    let (prefill, decode) = match spec.role {
        Role::Prefill => (spec.inference_addr.as_str(), opposite),
        Role::Decode => (opposite, spec.inference_addr.as_str()),
    };
    PairRecord {
        cluster: spec.cluster.clone(),
        prefill_addr: prefill.to_owned(),
        decode_addr: decode.to_owned(),
        active,
        ..PairRecord::default()
    }
}

pub(super) fn check_comm(comm_key: &str, comm_id: &str) -> Result<(), String> {
    if comm_key.len() > 2 * MAX_NAME + 2 {
        return Err(format!("comm_key is longer than {} bytes", 2 * MAX_NAME + 2));
    }
    if comm_id.len() > MAX_COMM_ID {
        return Err(format!("comm_id is longer than {MAX_COMM_ID} bytes"));
    }
    Ok(())
}

pub(super) fn too_many_pairs() -> KsanaOutcome {
    KsanaOutcome::Refused(format!("there are {MAX_PAIRS} pairs already"))
}
