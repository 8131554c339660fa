//! The line that a running demo shows, and what it says when children end and come back.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{MissedTickBehavior, interval};

use super::super::client::Client;
use super::super::output::{Failure, Out};
use super::super::status::leaders;
use super::super::table::count;
use super::child::Children;
use super::plan::{Layout, Replica, write_state};
use crate::admin_types::StatusReply;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// A replica that does not answer within this time is not up.
const ANSWER: Duration = Duration::from_millis(800);
/// Where nobody watches, every so many looks is a line.
const LOOKS_PER_LINE: u32 = 5;

/// Watches until output fails; never ends otherwise.
pub(super) async fn watch(
    layout: &Layout,
    children: &mut Children,
    out: &mut Out,
    restart: bool,
    state_file: Option<&Path>,
) -> Result<(), Failure> {
    let mut clients = Vec::new();
    for replica in &layout.replicas {
        clients.push(Client::new(&replica.admin_url())?.with_timeout(ANSWER));
    }
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut gone: BTreeSet<String> = BTreeSet::new();
    let mut totals = vec![Counter::default(); layout.replicas.len()];
    for look in 0_u32.. {
        ticks.tick().await;
        for (name, status) in children.newly_ended() {
            let note = match layout.restart_command(&name) {
                _ if restart => "starting it again".to_owned(),
                Some(command) => format!("bring it back: {command}"),
                None => format!("its log is {}", layout.log(&name).display()),
            };
            say(out, &format!("{name} ended ({status}); {note}"))?;
            if restart {
                children.restart(&name)?;
                state_file.map_or(Ok(()), |path| write_state(path, layout, children))?;
            } else {
                gone.insert(name);
            }
        }
        let replies = join_all(clients.iter().map(|c| c.get::<StatusReply>("/v1/admin/status"))).await;
        let replies: Vec<Option<StatusReply>> = replies.into_iter().map(Result::ok).collect();
        for (replica, _) in layout.replicas.iter().zip(&replies).filter(|(_, reply)| reply.is_some()) {
            if gone.remove(&replica.name) {
                say(out, &format!("{} is back", replica.name))?;
            }
        }
        for (counter, reply) in totals.iter_mut().zip(&replies) {
            counter.see(reply.as_ref());
        }
        let total = totals.iter().map(Counter::sum).sum();
        let line = line(&layout.replicas, &replies, &gone, total);
        if out.is_terminal() {
            out.write(&format!("\r\x1b[2K{line}"))?;
        } else if look % LOOKS_PER_LINE == 0 {
            out.line(&line)?;
        }
    }
    Ok(())
}

/// Requests of a replica over all its lives, each of which counts from 0.
#[derive(Clone, Copy, Default)]
struct Counter {
    earlier: u64,
    now: u64,
}

impl Counter {
    fn see(&mut self, reply: Option<&StatusReply>) {
        let Some(seen) = reply.map(|reply| reply.requests_total) else { return };
        if seen < self.now {
            self.earlier += self.now;
        }
        self.now = seen;
    }

    fn sum(&self) -> u64 {
        self.earlier + self.now
    }
}

/// A line that stays, above the live one.
fn say(out: &mut Out, text: &str) -> Result<(), Failure> {
    let clear = if out.is_terminal() { "\r\x1b[2K" } else { "" };
    out.write(&format!("{clear}{text}\n"))
}

fn line(
    replicas: &[Replica],
    replies: &[Option<StatusReply>],
    gone: &BTreeSet<String>,
    total: u64,
) -> String {
    let up = replies.iter().flatten().count();
    let silent = replicas.iter().zip(replies).filter(|(_, reply)| reply.is_none());
    let mut away: BTreeSet<&str> = silent.map(|(replica, _)| replica.name.as_str()).collect();
    away.extend(gone.iter().map(String::as_str));
    let away = match away.is_empty() {
        true => String::new(),
        false => format!("  gone: {}", away.into_iter().collect::<Vec<_>>().join(" ")),
    };
    // A replica with a quorum knows more than one without.
    let best = replies.iter().flatten().max_by_key(|reply| reply.cluster.quorum);
    let Some(best) = best else {
        return format!("replicas 0/{} up{away}", replicas.len());
    };
    let online = best.workers.iter().filter(|w| w.online).count();
    let in_flight: i64 = best.workers.iter().map(|w| w.requests).sum();
    format!(
        "replicas {up}/{} up  {}{}  workers {online}/{} online  {} in flight, {total} in total{away}",
        replicas.len(),
        leaders(&best.cluster),
        if best.cluster.quorum { "" } else { "  NO QUORUM" },
        best.workers.len(),
        count(usize::try_from(in_flight).unwrap_or(0), "request"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::super::status::tests::sample;
    use super::super::plan::Plan;
    use super::super::profile::Profile;
    use super::*;

    #[test]
    fn the_line_says_who_is_up_and_what_is_going_on() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan::new(3, 0, 1, 0, Profile::Plain, Some(folder.path())).unwrap();
        let replies = [Some(sample()), Some(sample()), None];
        assert_eq!(
            line(&plan.replicas, &replies, &BTreeSet::from(["e1".to_owned()]), 96_422),
            "replicas 2/3 up  leader r2  workers 2/3 online  63 requests in flight, 96422 in total  gone: e1 r3"
        );
        assert_eq!(
            line(&plan.replicas, &[None, None, None], &BTreeSet::new(), 0),
            "replicas 0/3 up  gone: r1 r2 r3"
        );
    }
}
