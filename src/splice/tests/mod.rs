//! Streams that are cut and continued, against streams that are not.

mod client;
mod engine;
mod golden;
mod losses;
mod plans;
mod properties;
mod routes;

use std::sync::Arc;

use bytes::Bytes;

use super::sse::{Event, Parser};
use super::*;

/// The events in a stream's bytes.
fn events(stream: &[u8]) -> Vec<Event> {
    let mut parser = Parser::new(1 << 20);
    parser.push(Bytes::copy_from_slice(stream)).unwrap();
    assert!(!parser.is_cut());
    std::iter::from_fn(|| parser.next_event()).collect()
}

fn plan(route: StreamRoute, body: &str) -> Arc<Plan> {
    Arc::new(Plan::new(route, &Bytes::copy_from_slice(body.as_bytes()), &Options::default()).unwrap())
}

/// The state after what was handed out, as another process rebuilds it.
fn restored(plan: &Arc<Plan>, outs: &[Out]) -> Splice {
    Splice::restore(plan.clone(), outs.iter().map(|out| &out.journal[..])).unwrap()
}
