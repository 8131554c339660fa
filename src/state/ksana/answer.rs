//! What a node is told at its heartbeat, and which pairs requests may go to.

use super::strict::{comm_key, is_shown};
use super::{GroupKey, GroupRecord, KsanaState, Leg, NodeRecord, PairRecord, Role};

/// What a node's heartbeat is answered with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The node's record.
    pub node: NodeRecord,
    /// Whether its group is ready.
    pub group_ready: bool,
    /// Its group with each of the opposite role.
    pub keys: Vec<KeyView>,
}

/// A pair, as a node sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyView {
    /// Its key.
    pub comm_key: String,
    /// The comm id; empty while there is none, or it is not shown.
    pub comm_id: String,
    /// Rank, device and coordinator address of each device, prefill first.
    pub addresses: Vec<(u32, u32, String)>,
}

/// A pair that requests may go to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct RoutePair {
    /// Its key.
    pub comm_key: String,
    /// Where the prefill group takes requests.
    pub prefill_addr: String,
    /// Where the decode group does.
    pub decode_addr: String,
}

impl KsanaState {
    /// What a node is told; `None` if it is not known.
    pub fn answer(&self, id: &str, strict: bool) -> Option<Answer> {
        let node = self.node(id)?;
        let spec = &node.spec;
        let own_ready = self.groups().get(&spec.group()).is_some_and(|group| group.ready);
        let is_opposite = |key: &GroupKey| key.cluster == spec.cluster && key.role == spec.role.opposite();
        let mut opposite: Vec<(&GroupKey, &GroupRecord)> =
            self.groups().iter().filter(|(key, _)| is_opposite(key)).collect();
        opposite.sort_by_key(|(_, group)| group.order);
        let keys = opposite.into_iter().map(|(key, group)| {
            let (prefill, decode) = match spec.role {
                Role::Prefill => (own_ready, group.ready),
                Role::Decode => (group.ready, own_ready),
            };
            let comm_key = comm_key(spec, &key.inference_addr);
            let pair = self.pairs().get(&comm_key).filter(|_| is_shown(spec.rank, prefill, decode));
            let legs = match pair {
                Some(pair) if strict => pair.legs.clone(),
                // As the groups are now: a rank that has begun anew is where it says it is.
                Some(pair) if !pair.comm_id.is_empty() => {
                    self.legs(&pair.cluster, &pair.prefill_addr, &pair.decode_addr)
                }
                _ => Vec::new(),
            };
            KeyView {
                comm_key,
                comm_id: pair.map(|pair| pair.comm_id.clone()).unwrap_or_default(),
                addresses: expand(&legs),
            }
        });
        Some(Answer { node: node.clone(), group_ready: own_ready, keys: keys.collect() })
    }

    /// The pairs of a cluster that requests may go to.
    pub fn routes(&self, cluster: &str, strict: bool) -> Vec<RoutePair> {
        let is_good = |key: &str, pair: &PairRecord| match strict {
            true => {
                pair.active
                    && self.has_head(Role::Prefill, &pair.prefill_addr)
                    && self.has_head(Role::Decode, &pair.decode_addr)
            }
            false => self.blocker(key).is_none(),
        };
        let pairs = self.pairs().iter().filter(|(key, pair)| pair.cluster == cluster && is_good(key, pair));
        pairs
            .map(|(key, pair)| RoutePair {
                comm_key: key.clone(),
                prefill_addr: pair.prefill_addr.clone(),
                decode_addr: pair.decode_addr.clone(),
            })
            .collect()
    }

    /// Whether the first rank of such a group is online, in whatever cluster.
    fn has_head(&self, role: Role, addr: &str) -> bool {
        self.nodes().any(|node| {
            node.online && node.spec.rank == 0 && node.spec.role == role && node.spec.inference_addr == addr
        })
    }

    /// Why no request may go to a pair, in fixed mode; `None` if it may.
    pub fn blocker(&self, key: &str) -> Option<&'static str> {
        let Some(pair) = self.pairs().get(key) else { return Some("no comm id") };
        let group = |role, addr: &String| {
            let key = GroupKey { cluster: pair.cluster.clone(), role, inference_addr: addr.clone() };
            self.groups().get(&key).copied().unwrap_or_default()
        };
        let prefill = group(Role::Prefill, &pair.prefill_addr);
        let decode = group(Role::Decode, &pair.decode_addr);
        if pair.comm_id.is_empty() {
            Some("no comm id")
        } else if !prefill.ready {
            Some("prefill not ready")
        } else if !decode.ready {
            Some("decode not ready")
        } else if prefill.world_size != decode.world_size {
            Some("unequal world sizes")
        } else if pair.broken {
            Some("decode restarted")
        } else {
            None
        }
    }
}

/// One entry a device.
pub(super) fn expand(legs: &[Leg]) -> Vec<(u32, u32, String)> {
    let each = |leg: &Leg| {
        let (rank, addr) = (leg.rank, leg.coordinator_addr.clone());
        (0..leg.devices).map(move |device| (rank, device, addr.clone()))
    };
    legs.iter().flat_map(each).collect()
}
