//! The three tables: their records, digest and order; each change goes through here.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    GroupKey, GroupRecord, KsanaCommand, KsanaOutcome, MAX_LEASE, MAX_NODES, MAX_REQUEST_ID, NodeRecord,
    NodeSpec, PairRecord, Role, describe, node_id,
};
use crate::codec::{CodecError, decode, encode};
use crate::state::digest::Digest;
use crate::state::replicated::Records;

/// First byte of a node's record key.
pub const KSANA_NODE: u8 = 5;
/// First byte of a group's record key.
pub const KSANA_GROUP: u8 = 6;
/// First byte of a pair's record key.
pub const KSANA_PAIR: u8 = 7;
/// The key of what is there once.
pub const KSANA_SCALARS: u8 = 8;

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
struct Scalars {
    /// Rows made so far.
    order: u64,
    /// The next request id; 0 before the first lease.
    next_request: u32,
}

/// See [`super`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KsanaState {
    nodes: BTreeMap<String, NodeRecord>,
    /// Node ids by coordinator address.
    by_coordinator: BTreeMap<String, String>,
    groups: BTreeMap<GroupKey, GroupRecord>,
    pairs: BTreeMap<String, PairRecord>,
    scalars: Scalars,
    digest: Digest,
    /// Changes whenever something but a time has changed. Local, not replicated.
    version: u64,
}

impl KsanaState {
    /// A node.
    pub fn node(&self, id: &str) -> Option<&NodeRecord> {
        self.nodes.get(id)
    }

    /// All nodes, by id.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeRecord> {
        self.nodes.values()
    }

    /// All groups that have sent a heartbeat.
    pub fn groups(&self) -> &BTreeMap<GroupKey, GroupRecord> {
        &self.groups
    }

    /// All pairs, by key.
    pub fn pairs(&self) -> &BTreeMap<String, PairRecord> {
        &self.pairs
    }

    /// Changes whenever something but a time has changed. Local, not replicated.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The request id that will be leased next; 0 before the first.
    pub fn next_request(&self) -> u32 {
        self.scalars.next_request
    }

    /// Says which content this is.
    pub fn digest(&self) -> u64 {
        self.digest.0
    }

    /// Applies a command at cluster time `now_ms`.
    pub fn apply(&mut self, now_ms: u64, command: KsanaCommand) -> KsanaOutcome {
        match command {
            KsanaCommand::Register { spec, wanted, spare, rules } => {
                if let Err(why) = spec.check() {
                    return KsanaOutcome::Refused(why);
                }
                match rules.strict {
                    true => self.register_strictly(now_ms, spec, wanted, spare),
                    false => self.register(now_ms, spec, wanted, spare),
                }
            }
            KsanaCommand::Beat { node_id, cluster, rules } => {
                if !self.bring_back(now_ms, &node_id, &cluster) {
                    return KsanaOutcome::UnknownNode;
                }
                if rules.strict {
                    self.beat_strictly(now_ms, &node_id, rules)
                } else {
                    self.beat(now_ms, &node_id)
                }
                KsanaOutcome::Done
            }
            KsanaCommand::Heard { nodes, rules } => {
                for (id, age_ms) in nodes {
                    let at_ms = now_ms.saturating_sub(age_ms.into());
                    let Some(node) = self.nodes.get(&id) else { continue };
                    let comes_back = !node.online && !rules.overdue(now_ms, at_ms);
                    self.heard(&id, at_ms);
                    if comes_back && !rules.strict {
                        self.beat(now_ms, &id);
                    }
                }
                KsanaOutcome::Done
            }
            KsanaCommand::CommId { node_id, cluster, comm_key, comm_id, rules } => {
                if !self.bring_back(now_ms, &node_id, &cluster) {
                    return KsanaOutcome::UnknownNode;
                }
                match rules.strict {
                    true => self.name_pair_strictly(now_ms, &node_id, comm_key, comm_id),
                    false => self.name_pair(now_ms, &node_id, comm_key, comm_id),
                }
            }
            KsanaCommand::Judge { rules, forget_ms } => {
                self.judge(now_ms, rules, forget_ms);
                KsanaOutcome::Done
            }
            KsanaCommand::Lease { count, start } => self.lease(count, start),
            KsanaCommand::Remove { node_id } => self.remove(&node_id),
        }
    }

    /// Whether there is such a node; if not, and its id describes one whose place nobody has, it is
    /// there now.
    fn bring_back(&mut self, now_ms: u64, id: &str, cluster: &str) -> bool {
        if self.nodes.contains_key(id) {
            return true;
        }
        let Some(spec) = describe(id, cluster) else { return false };
        let is_taken = self.by_coordinator(&spec).is_some() || self.at_place(&spec).is_some();
        if is_taken || !self.has_room() {
            return false;
        }
        self.insert(now_ms, spec, id.to_owned());
        true
    }

    fn lease(&mut self, count: u32, start: u32) -> KsanaOutcome {
        let count = count.clamp(1, MAX_LEASE);
        let next = match self.scalars.next_request {
            0 => start,
            next => next,
        };
        let fits = |next: u32| next >= 1 && next <= MAX_REQUEST_ID - count;
        let first = if fits(next) { next } else { 1 };
        self.with_scalars(|scalars| scalars.next_request = first + count);
        KsanaOutcome::Block { first, count }
    }

    fn remove(&mut self, id: &str) -> KsanaOutcome {
        let Some(node) = self.take(id) else { return KsanaOutcome::UnknownNode };
        if node.spec.is_prefill_head() {
            self.clear_pairs_of(&node.spec.inference_addr);
        }
        self.recount(&node.spec.group());
        KsanaOutcome::Done
    }

    // ---- rows ----

    pub(super) fn has_room(&self) -> bool {
        self.nodes.len() < MAX_NODES
    }

    /// The node with this coordinator address.
    pub(super) fn by_coordinator(&self, spec: &NodeSpec) -> Option<&NodeRecord> {
        self.nodes.get(self.by_coordinator.get(&spec.coordinator_addr)?)
    }

    /// The node that has this place.
    pub(super) fn at_place(&self, spec: &NodeSpec) -> Option<&NodeRecord> {
        self.nodes.values().find(|node| node.spec.same_place(spec))
    }

    /// The nodes of a group, by rank.
    pub(super) fn members(&self, cluster: &str, role: Role, addr: &str) -> Vec<&NodeRecord> {
        let is_member = |node: &&NodeRecord| {
            node.spec.role == role && node.spec.inference_addr == addr && node.spec.cluster == cluster
        };
        let mut members: Vec<_> = self.nodes.values().filter(is_member).collect();
        members.sort_by_key(|node| (node.spec.rank, node.order));
        members
    }

    /// The id of a new node.
    pub(super) fn id_for(&self, spec: &NodeSpec, wanted: Option<String>, spare: String) -> String {
        let own = || {
            let id = node_id(spec);
            if self.nodes.contains_key(&id) { spare } else { id }
        };
        wanted.unwrap_or_else(own)
    }

    /// The id that a node with this coordinator address has, if there is one.
    pub fn registered_id(&self, spec: &NodeSpec) -> Option<String> {
        self.by_coordinator(spec).map(|node| node.node_id.clone())
    }

    /// The id that a node gets in fixed mode which asks for none, if nothing is in its way as far as is
    /// known here: one that describes it.
    pub fn expected_id(&self, spec: &NodeSpec) -> Option<String> {
        let own = node_id(spec);
        match self.by_coordinator(spec) {
            Some(node) if node.node_id == own => Some(own),
            // Whatever it is called, only a decision can say what becomes of that.
            Some(_) => None,
            None => (!self.nodes.contains_key(&own)).then_some(own),
        }
    }

    fn next_order(&mut self) -> u64 {
        self.with_scalars(|scalars| {
            scalars.order += 1;
            scalars.order
        })
    }

    pub(super) fn insert(&mut self, now_ms: u64, spec: NodeSpec, node_id: String) {
        let order = self.next_order();
        let record =
            NodeRecord { node_id: node_id.clone(), spec, last_heard_ms: now_ms, online: true, order };
        self.put(node_id, record);
    }

    fn put(&mut self, id: String, record: NodeRecord) {
        self.digest.add(KSANA_NODE, &record);
        self.by_coordinator.insert(record.spec.coordinator_addr.clone(), id.clone());
        self.nodes.insert(id, record);
        self.version = self.version.wrapping_add(1);
    }

    pub(super) fn take(&mut self, id: &str) -> Option<NodeRecord> {
        let record = self.nodes.remove(id)?;
        self.digest.remove(KSANA_NODE, &record);
        self.by_coordinator.remove(&record.spec.coordinator_addr);
        self.version = self.version.wrapping_add(1);
        Some(record)
    }

    /// Puts a node in another's place of rows, under a new id if one is given.
    pub(super) fn replace(&mut self, now_ms: u64, old_id: &str, spec: NodeSpec, new_id: String) {
        if let Some(old) = self.take(old_id) {
            let record = NodeRecord {
                node_id: new_id.clone(),
                spec,
                last_heard_ms: now_ms,
                online: true,
                order: old.order,
            };
            self.put(new_id, record);
        }
    }

    /// Notes a sign of life; no more.
    pub(super) fn heard(&mut self, id: &str, at_ms: u64) {
        let Some(node) = self.nodes.get_mut(id).filter(|node| node.last_heard_ms < at_ms) else { return };
        self.digest.remove(KSANA_NODE, node);
        node.last_heard_ms = at_ms;
        self.digest.add(KSANA_NODE, node);
    }

    pub(super) fn set_online(&mut self, id: &str, online: bool) {
        let Some(node) = self.nodes.get_mut(id).filter(|node| node.online != online) else { return };
        self.digest.remove(KSANA_NODE, node);
        node.online = online;
        self.digest.add(KSANA_NODE, node);
        self.version = self.version.wrapping_add(1);
    }

    /// What a group's row should say but for its place in the order, with `online` saying who is.
    pub(super) fn count(&self, key: &GroupKey, online: impl Fn(&NodeRecord) -> bool) -> GroupRecord {
        let mut group = GroupRecord::default();
        for node in self.members(&key.cluster, key.role, &key.inference_addr) {
            if online(node) {
                group.online_nodes += 1;
                group.online_devices = group.online_devices.saturating_add(node.spec.devices);
                group.world_size = group.world_size.max(node.spec.world_size);
            }
        }
        group.ready = group.online_devices == group.world_size && group.world_size > 0;
        group
    }

    /// Writes a group's row; its place in the order stays.
    pub(super) fn set_group(&mut self, key: &GroupKey, group: GroupRecord) {
        let old = self.groups.get(key).copied();
        let order = old.map_or_else(|| self.next_order(), |old| old.order);
        let group = GroupRecord { order, ..group };
        if old == Some(group) {
            return;
        }
        if let Some(old) = old {
            self.digest.remove(KSANA_GROUP, &(key, old));
        }
        self.digest.add(KSANA_GROUP, &(key, group));
        self.groups.insert(key.clone(), group);
        self.version = self.version.wrapping_add(1);
    }

    /// Counts a group anew that has a row; one without nodes goes, with its pairs.
    pub(super) fn recount(&mut self, key: &GroupKey) {
        if !self.groups.contains_key(key) {
            return;
        }
        if !self.members(&key.cluster, key.role, &key.inference_addr).is_empty() {
            let counted = self.count(key, |node| node.online);
            return self.set_group(key, counted);
        }
        if let Some(old) = self.groups.remove(key) {
            self.digest.remove(KSANA_GROUP, &(key, old));
            self.version = self.version.wrapping_add(1);
        }
        let is_of = |pair: &PairRecord| {
            pair.cluster == key.cluster
                && key.inference_addr
                    == *(if key.role == Role::Prefill { &pair.prefill_addr } else { &pair.decode_addr })
        };
        let gone: Vec<String> =
            self.pairs.iter().filter(|(_, pair)| is_of(pair)).map(|(key, _)| key.clone()).collect();
        for key in gone {
            if let Some(old) = self.pairs.remove(&key) {
                self.digest.remove(KSANA_PAIR, &(&key, old));
            }
        }
    }

    /// Changes a pair, or makes it first.
    pub(super) fn with_pair(
        &mut self,
        key: &str,
        made: impl FnOnce() -> PairRecord,
        change: impl FnOnce(&mut PairRecord),
    ) {
        let (mut pair, old) = match self.pairs.get(key) {
            Some(pair) => (pair.clone(), true),
            None => (PairRecord { order: self.next_order(), ..made() }, false),
        };
        if old {
            self.digest.remove(KSANA_PAIR, &(key, &pair));
        }
        change(&mut pair);
        self.digest.add(KSANA_PAIR, &(key, &pair));
        self.pairs.insert(key.to_owned(), pair);
        self.version = self.version.wrapping_add(1);
    }

    /// The pairs of a prefill group have no communicator any more.
    pub(super) fn clear_pairs_of(&mut self, prefill_addr: &str) {
        let theirs = self.pairs.iter().filter(|(_, pair)| pair.prefill_addr == prefill_addr);
        let keys: Vec<String> = theirs.map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.with_pair(&key, PairRecord::default, |pair| {
                pair.comm_id.clear();
                pair.legs.clear();
                pair.active = false;
                pair.broken = false;
            });
        }
    }

    fn with_scalars<R>(&mut self, change: impl FnOnce(&mut Scalars) -> R) -> R {
        self.digest.remove(KSANA_SCALARS, &self.scalars);
        let result = change(&mut self.scalars);
        self.digest.add(KSANA_SCALARS, &self.scalars);
        result
    }

    // ---- records ----

    /// The content as records; none of nothing.
    pub fn records(&self) -> Records {
        let mut records = Records::new();
        let key = |kind: u8, rest: &[u8]| [&[kind], rest].concat();
        if self.scalars != Scalars::default() {
            records.push((vec![KSANA_SCALARS], encode(&self.scalars)));
        }
        records.extend(self.nodes.iter().map(|(id, node)| (key(KSANA_NODE, id.as_bytes()), encode(node))));
        let groups = self.groups.iter();
        records.extend(groups.map(|(of, group)| (key(KSANA_GROUP, &encode(of)), encode(&(of, group)))));
        let pairs = self.pairs.iter();
        records.extend(pairs.map(|(of, pair)| (key(KSANA_PAIR, of.as_bytes()), encode(&(of, pair)))));
        records
    }

    /// Takes a record in.
    pub fn restore(&mut self, kind: u8, value: &[u8]) -> Result<(), CodecError> {
        match kind {
            KSANA_SCALARS => {
                let scalars = decode(value)?;
                self.with_scalars(|s| *s = scalars);
            }
            KSANA_GROUP => {
                let (key, group): (GroupKey, GroupRecord) = decode(value)?;
                self.digest.add(KSANA_GROUP, &(&key, group));
                self.groups.insert(key, group);
            }
            KSANA_PAIR => {
                let (key, pair): (String, PairRecord) = decode(value)?;
                self.digest.add(KSANA_PAIR, &(&key, &pair));
                self.pairs.insert(key, pair);
            }
            _ => {
                let node: NodeRecord = decode(value)?;
                self.put(node.node_id.clone(), node);
            }
        }
        // Like no other that was seen before.
        self.version = self.digest.0;
        Ok(())
    }
}
