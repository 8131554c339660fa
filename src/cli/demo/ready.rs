//! Waits until a demo can be used, and explains what is missing when it cannot.

use std::time::Duration;

use http::{Method, StatusCode};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use super::super::client::Client;
use super::super::output::{Failure, Out};
use super::child::{Children, tail};
use super::plan::{BALANCER, Layout, MODEL};

/// How long everything may take together.
const LIMIT: Duration = Duration::from_secs(60);
/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// How long one look may take.
const LOOK: Duration = Duration::from_secs(2);

/// Returns when all engines listen, all replicas are ready and the model is listed through the
/// balancer.
pub(super) async fn wait(layout: &Layout, children: &mut Children, out: &mut Out) -> Result<(), Failure> {
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
        let missing = missing(layout).await?;
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

async fn missing(layout: &Layout) -> Result<Vec<Missing>, Failure> {
    let mut missing = Vec::new();
    for engine in &layout.engines {
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
    // Through the balancer there is nothing to see before a replica is ready.
    if missing.is_empty()
        && let Err(why) = look(&format!("http://{}", layout.balancer), "/v1/models", MODEL).await?
    {
        missing.push(Missing { name: BALANCER.to_owned(), why });
    }
    Ok(missing)
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
