//! Chooses places for streams that edges have admitted, as for this replica's own, and keeps them
//! booked.

use std::sync::Arc;

use http::HeaderValue;

use super::at_agent::{Chosen, choose};
use super::failing::route_of;
use crate::http::errors::{ApiError, Code};
use crate::http::front::Shard;
use crate::http::proxy::look_for;
use crate::http::queue::Held;
use crate::http::routes::Route;
use crate::http::sequel::Sequel;
use crate::relay::directory::Soon;
use crate::relay::order::Order;
use crate::relay::placing::{Booked, Placed, Placer, Running};
use crate::routing::book;

/// See the module.
pub struct Places {
    shard: Arc<Shard>,
}

impl Places {
    /// By this replica's view.
    pub fn new(shard: Arc<Shard>) -> Arc<Self> {
        Arc::new(Self { shard })
    }

    async fn try_place(&self, order: &Order) -> Result<Placed, ApiError> {
        let (front, route) = (&self.shard.front, route_of(order));
        if route == Route::Unknown {
            return Err(ApiError::new(
                Code::Internal,
                "a place for a stream of an unknown route was asked for",
            ));
        }
        if !front.control.registry().has_agents {
            return Ok(Placed::Elsewhere);
        }
        let mut asked = look_for(route, &order.header_map(), &order.body, order.key.as_deref()).await?;
        let request_id = HeaderValue::from_str(&order.request_id);
        let request_id = request_id.unwrap_or(HeaderValue::from_static("unprintable"));
        let mut tracked = front.metrics.track(route);
        let chosen = choose(&self.shard, route, order, &mut asked, &request_id, &mut tracked).await;
        // Counted at the edge.
        tracked.pass_to_stream();
        Ok(match chosen? {
            Some(Chosen { place, booking, sequel, .. }) => {
                Placed::At(place, Box::new(Followed { booking, sequel }))
            }
            None => Placed::Elsewhere,
        })
    }
}

impl Placer for Places {
    fn place(self: Arc<Self>, order: Order) -> Soon<Placed> {
        Box::pin(async move {
            let placed = self.try_place(&order).await;
            placed.unwrap_or_else(|error| Placed::Refused(error.to_wire().into()))
        })
    }

    fn book(self: Arc<Self>, running: Running) -> Option<Box<dyn Booked>> {
        let front = &self.shard.front;
        let view = front.control.registry();
        let worker = view.workers.iter().find(|worker| worker.record.ix == running.worker)?;
        let share = book::Share {
            rank: running.rank,
            prefill_tokens: running.share.prefill_tokens,
            decode_blocks: running.share.decode_blocks,
            chain: None,
        };
        let booking = front.control.bookings().book_share(Arc::clone(worker), share);
        Some(Box::new(Followed { booking: Held::new(booking, &front.queue), sequel: None }))
    }
}

/// A stream of an edge, as that tells of it.
struct Followed {
    booking: Held,
    sequel: Option<Sequel>,
}

impl Booked for Followed {
    fn began(&mut self) {
        self.booking.prefill_done();
        self.booking.heard();
    }

    fn grew(&mut self, blocks: u32) {
        self.booking.grow(blocks);
        self.booking.heard();
    }

    fn said(&mut self, piece: &[u8]) {
        if let Some(sequel) = &mut self.sequel {
            sequel.push(piece);
        }
    }

    fn ended(self: Box<Self>) {
        if let Some(sequel) = self.sequel {
            sequel.finish();
        }
    }
}
