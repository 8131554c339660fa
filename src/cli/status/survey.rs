//! One look at a cluster: what the replica says that was asked, and what the others say of
//! themselves.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::Value;

use super::super::client::Client;
use super::super::output::Failure;
use crate::admin_types::StatusReply;
use crate::cluster::api::MemberStatus;
use crate::ids::ReplicaId;

/// Where every replica answers.
const PATH: &str = "/v1/admin/status";
/// How long another replica may take. It is asked for a few columns, not for the page.
const OTHERS: Duration = Duration::from_secs(1);

/// One look.
pub(super) struct Survey {
    /// What the replica says that was asked.
    pub(super) asked: StatusReply,
    /// What living others say.
    pub(super) others: BTreeMap<ReplicaId, StatusReply>,
    /// Living others that did not say anything.
    pub(super) mute: Vec<ReplicaId>,
    /// Requests a second of each since the look before; empty at the first.
    pub(super) rates: BTreeMap<ReplicaId, f64>,
}

impl Survey {
    /// Asks a replica, and all others that it says are alive, at once; with `local` nobody else.
    pub(super) async fn of(client: &Client, local: bool) -> Result<Self, Failure> {
        let asked: StatusReply = client.get(PATH).await?;
        let me = asked.cluster.me;
        let wanted = |member: &&MemberStatus| !local && member.alive && member.id != me;
        let members: Vec<_> = asked.cluster.members.iter().filter(wanted).collect();
        let answers = join_all(members.iter().map(|member| ask(client, member))).await;
        let (mut others, mut mute) = (BTreeMap::new(), Vec::new());
        for (member, answer) in members.iter().zip(answers) {
            match answer {
                Some(reply) => _ = others.insert(member.id, reply),
                None => mute.push(member.id),
            }
        }
        Ok(Self { asked, others, mute, rates: BTreeMap::new() })
    }

    /// What a replica says of itself, if it said anything.
    pub(super) fn reply(&self, id: ReplicaId) -> Option<&StatusReply> {
        if id == self.asked.cluster.me { Some(&self.asked) } else { self.others.get(&id) }
    }

    /// All that said anything, the one asked first.
    pub(super) fn replies(&self) -> impl Iterator<Item = &StatusReply> {
        std::iter::once(&self.asked).chain(self.others.values())
    }

    /// The answer of the replica asked, with the others' below `others`.
    pub(super) fn json(&self) -> Result<Value, Failure> {
        let fail = |error: serde_json::Error| Failure::Failed(error.to_string());
        let mut json = serde_json::to_value(&self.asked).map_err(fail)?;
        let others: Vec<&StatusReply> = self.others.values().collect();
        json["others"] = serde_json::to_value(others).map_err(fail)?;
        Ok(json)
    }
}

/// A replica's own words; `None` where it cannot be asked from here.
async fn ask(client: &Client, member: &MemberStatus) -> Option<StatusReply> {
    let client = client.of(&member.info.admin).ok()?.with_timeout(OTHERS);
    let reply: StatusReply = client.get(PATH).await.ok()?;
    // Behind an address that is not its own anybody might answer.
    (reply.cluster.me == member.id).then_some(reply)
}

/// Requests a second between looks.
#[derive(Default)]
pub(super) struct Rates {
    before: BTreeMap<ReplicaId, (Instant, u64)>,
}

impl Rates {
    /// Writes the rates since the look before into a survey.
    pub(super) fn see(&mut self, survey: &mut Survey) {
        let now = Instant::now();
        let totals: Vec<_> = survey.replies().map(|reply| (reply.cluster.me, reply.requests_total)).collect();
        for (id, total) in totals {
            if let Some((then, before)) = self.before.insert(id, (now, total)) {
                // Less than before: it has started anew.
                let grown = total.checked_sub(before).unwrap_or(total);
                let seconds = (now - then).as_secs_f64().max(0.001);
                survey.rates.insert(id, grown as f64 / seconds);
            }
        }
    }
}
