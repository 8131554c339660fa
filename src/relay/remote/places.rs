//! Chooses places for edges, over the peer listener. What is chosen is booked for as long as the call
//! lasts: an edge that dies frees it with its connection.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request as Rpc, Response, Status, Streaming};

use crate::codec;
use crate::relay::hub::Relays;
use crate::relay::link::CLUSTER;
use crate::relay::link::MAX_MESSAGE;
use crate::relay::link::proto::place_said::What;
use crate::relay::link::proto::placing_server::{Placing, PlacingServer};
use crate::relay::link::proto::{PlaceSaid, PlaceTold};
use crate::relay::order::Order;
use crate::relay::placing::{Booked, Placed, Placer, Running};

/// Most streams of edges that are booked here at once.
const MOST: usize = 65_536;
/// How long a caller may take to say what it wants.
const FIRST: Duration = Duration::from_secs(10);

/// How it went.
pub(super) const HERE: u32 = 1;
pub(super) const ELSEWHERE: u32 = 2;
pub(super) const REFUSED: u32 = 3;

/// The service over a replica's [`Placer`].
pub struct Service {
    relays: Arc<OnceLock<Arc<Relays>>>,
    room: Arc<Semaphore>,
}

impl Service {
    /// The service, ready for a tonic server. The streams may come later.
    pub fn serve(relays: Arc<OnceLock<Arc<Relays>>>) -> PlacingServer<Self> {
        PlacingServer::new(Self { relays, room: Arc::new(Semaphore::new(MOST)) })
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}

#[tonic::async_trait]
impl Placing for Service {
    type PlaceStream = Pin<Box<dyn Stream<Item = Result<PlaceTold, Status>> + Send>>;

    async fn place(&self, request: Rpc<Streaming<PlaceSaid>>) -> Result<Response<Self::PlaceStream>, Status> {
        let known = self.relays.get().and_then(|relays| Some((relays, relays.placer()?)));
        let Some((relays, placer)) = known else {
            return Err(Status::unavailable("this replica does not choose places yet"));
        };
        let view = relays.view_to_serve();
        if view.cluster.is_empty() {
            return Err(Status::unavailable("this replica is not a member yet"));
        }
        let theirs = request.metadata().get(CLUSTER).and_then(|value| value.to_str().ok());
        if theirs != Some(view.cluster.as_str()) {
            return Err(Status::failed_precondition("this replica belongs to another cluster"));
        }
        if relays.is_leaving() {
            return Err(Status::unavailable("this replica is leaving"));
        }
        if !view.current {
            return Err(Status::unavailable("this replica has just started, and knows too little yet"));
        }
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            return Err(Status::resource_exhausted("too many streams of edges are booked here"));
        };
        let (tell, told) = mpsc::channel(1);
        let said = request.into_inner();
        // Ends with the call.
        relays.spawn(async move {
            answer(placer, said, tell).await;
            drop(room);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(told).map(Ok))))
    }
}

async fn answer(placer: Arc<dyn Placer>, mut said: Streaming<PlaceSaid>, tell: mpsc::Sender<PlaceTold>) {
    let first = timeout(FIRST, said.message()).await;
    let Ok(Ok(Some(PlaceSaid { what: Some(first) }))) = first else { return };
    let (told, booked) = match first {
        What::Order(order) => {
            let Ok(order) = codec::decode::<Order>(&order) else { return };
            let placed = tokio::select! {
                placed = placer.place(order) => placed,
                () = tell.closed() => return,
            };
            match placed {
                Placed::At(place, booked) => {
                    (PlaceTold { outcome: HERE, what: codec::encode(&place).into() }, Some(booked))
                }
                Placed::Elsewhere => (PlaceTold { outcome: ELSEWHERE, what: Bytes::new() }, None),
                Placed::Refused(why) => (PlaceTold { outcome: REFUSED, what: why }, None),
            }
        }
        What::Running(running) => {
            let Ok(running) = codec::decode::<Running>(&running) else { return };
            match placer.book(running) {
                Some(booked) => (PlaceTold { outcome: HERE, what: Bytes::new() }, Some(booked)),
                None => (PlaceTold { outcome: ELSEWHERE, what: Bytes::new() }, None),
            }
        }
        // Of which stream?
        What::Began(_) | What::Grown(_) | What::Said(_) | What::Ended(_) => return,
    };
    if tell.send(told).await.is_err() {
        return;
    }
    if let Some(booked) = booked {
        follow(booked, &mut said).await;
    }
}

/// Keeps a booking up to date until the caller lets go.
async fn follow(mut booked: Box<dyn Booked>, said: &mut Streaming<PlaceSaid>) {
    while let Ok(Some(PlaceSaid { what: Some(what) })) = said.message().await {
        match what {
            What::Began(_) => booked.began(),
            What::Grown(blocks) => booked.grew(blocks),
            What::Said(piece) => booked.said(&piece),
            What::Ended(_) => return booked.ended(),
            // Only the first word.
            What::Order(_) | What::Running(_) => return,
        }
    }
}
