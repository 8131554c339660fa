//! Waits until a demo can be used, and explains what is missing when it cannot.

use std::time::Duration;

use http::{Method, StatusCode};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use super::super::client::Client;
use super::super::output::{Failure, Out};
use super::child::{Children, tail};
use super::plan::{BALANCER, Layout, MODEL};
use super::profile::Part;
use crate::admin_types::ksana::{KsanaPair, KsanaReply};

/// How long everything may take together.
const LIMIT: Duration = Duration::from_secs(60);
/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// How long one look may take.
const LOOK: Duration = Duration::from_secs(2);

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Replicas that can be registered with.
    Replicas,
    /// Everything.
    All,
}

/// Returns when all engines listen, all replicas and edges are ready and requests would be answered through
/// the balancer; of the engines nothing is said in the phase before they are there.
pub(super) async fn wait(
    layout: &Layout,
    phase: Phase,
    children: &mut Children,
    out: &mut Out,
) -> Result<(), Failure> {
    let started = Instant::now();
    let mut said = String::new();
    loop {
        if let Some((name, status)) = children.newly_ended().into_iter().next() {
            let log = layout.log(&name);
            return Err(Failure::Failed(format!(
                "{name} ended ({status}); its log ends with\n{}",
                tail(&log)
            )));
        }
        let missing = missing(layout, phase).await?;
        if missing.is_empty() {
            return Ok(());
        }
        if started.elapsed() > LIMIT {
            let logs = missing.iter().map(|piece| {
                format!(
                    "  {}: {}; its log ends with\n{}",
                    piece.name,
                    piece.why,
                    tail(&layout.log(&piece.name))
                )
            });
            let logs: Vec<String> = logs.collect();
            let text = format!("not ready after {} s:\n{}", LIMIT.as_secs(), logs.join("\n"));
            return Err(Failure::Failed(text));
        }
        let names: Vec<&str> = missing.iter().map(|piece| piece.name.as_str()).collect();
        let line = format!("waiting for {}", names.join(", "));
        if line != said {
            out.line(&format!("{:>5.1} s  {line}", started.elapsed().as_secs_f32()))?;
            said = line;
        }
        sleep(PAUSE).await;
    }
}

struct Missing {
    name: String,
    why: String,
}

async fn missing(layout: &Layout, phase: Phase) -> Result<Vec<Missing>, Failure> {
    let mut missing = Vec::new();
    for engine in layout.engines.iter().filter(|_| phase == Phase::All) {
        if let Err(e) = TcpStream::connect(engine.address).await {
            missing.push(Missing {
                name: engine.name.clone(),
                why: format!("{} does not listen: {e}", engine.address),
            });
        }
    }
    for replica in &layout.replicas {
        if let Err(why) = look(&replica.admin_url(), "/readyz", "").await? {
            missing.push(Missing { name: replica.name.clone(), why });
        }
    }
    for edge in &layout.edges {
        if let Err(why) = look(&edge.admin_url(), "/readyz", "").await? {
            missing.push(Missing { name: edge.name.clone(), why });
        }
    }
    if layout.profile.engines_register() {
        if missing.is_empty() && phase == Phase::All {
            missing.extend(missing_pairs(layout).await?);
        }
        return Ok(missing);
    }
    // Through the balancer there is nothing to see before a replica is ready.
    if missing.is_empty()
        && let Err(why) = look(&format!("http://{}", layout.balancer), "/v1/models", MODEL).await?
    {
        missing.push(Missing { name: BALANCER.to_owned(), why });
    }
    Ok(missing)
}

/// What keeps KsanaLLM's pairs from being used: each prefill engine is to be joined with each decode engine.
async fn missing_pairs(layout: &Layout) -> Result<Option<Missing>, Failure> {
    let prefills = layout.engines.iter().filter(|engine| engine.part == Part::Prefill).count();
    let wanted = prefills * (layout.engines.len() - prefills);
    for replica in &layout.replicas {
        let client = Client::new(&replica.admin_url())?.with_timeout(LOOK);
        let ready = match client.get::<KsanaReply>("/v1/admin/ksana").await {
            Ok(reply) => {
                let is_ready =
                    |pair: &&KsanaPair| pair.is_active && pair.has_comm_id && pair.blocked_by.is_none();
                reply.pairs.iter().filter(is_ready).count()
            }
            Err(Failure::Unreachable(_)) => 0,
            Err(other) => return Err(other),
        };
        if ready < wanted {
            let why = format!("{} knows {ready} of {wanted} pairs to be ready", replica.name);
            return Ok(Some(Missing { name: "pairs".to_owned(), why }));
        }
    }
    Ok(None)
}

/// Whether `GET` answers 200 with `wanted` somewhere in it; otherwise what it answers.
async fn look(base: &str, path: &str, wanted: &str) -> Result<Result<(), String>, Failure> {
    let client = Client::new(base)?.with_timeout(LOOK);
    Ok(match client.raw(Method::GET, path, None::<&()>).await {
        Err(Failure::Unreachable(_)) => Err(format!("{base} does not answer")),
        Err(other) => return Err(other),
        Ok((StatusCode::OK, body)) if String::from_utf8_lossy(&body).contains(wanted) => Ok(()),
        Ok((StatusCode::OK, _)) => Err(format!("{base}{path} does not list {wanted}")),
        Ok((status, body)) => {
            let body = String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
            Err(format!("{base}{path} answers {status}: {}", body.trim()))
        }
    })
}
