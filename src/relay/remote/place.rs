//! An edge's question where a stream goes, and what it tells of the stream afterwards: the replica that
//! chose keeps it booked for as long as the call lasts. When that replica dies, another one is told
//! what the stream takes by now.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use rand::seq::SliceRandom as _;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::places::{ELSEWHERE, HERE, REFUSED};
use super::{Cluster, Remote};
use crate::cluster::peer::purpose::Purpose;
use crate::codec;
use crate::ids::ReplicaId;
use crate::relay::directory::{Address, Member};
use crate::relay::link::MAX_MESSAGE;
use crate::relay::link::proto::place_said::What;
use crate::relay::link::proto::placing_client::PlacingClient;
use crate::relay::link::proto::{PlaceSaid, PlaceTold};
use crate::relay::order::Order;
use crate::relay::placing::{Place, Running, Share};

/// How often a replica that has not answered yet is looked after; after so many looks at which the
/// cluster misses it, the next one is asked.
const LOOK: Duration = Duration::from_millis(500);
const MISSED: u32 = 2;
/// How long a replica may take to book what runs already.
const AGAIN: Duration = Duration::from_millis(1000);
/// Pause before that is tried again, drawn from this to twice as much.
const PAUSE: Duration = Duration::from_millis(250);
/// How long a replica may take to hear the last of a stream.
const LAST_WORDS: Duration = Duration::from_millis(1000);
/// Most of an answer that waits to be read by the replica. A replica that is slower does not learn
/// what the engine has cached of it.
const MOST_SAID: usize = 256 << 10;
/// Messages of one call that are on their way.
const UNDERWAY: usize = 8;

/// Where a stream goes.
pub enum Placing {
    /// There; booked as long as the handle lives.
    At(Place, Kept),
    /// Whoever holds it chooses.
    Elsewhere,
    /// The client gets this error.
    Refused(Bytes),
}

/// What a replica has to be told of a stream.
#[derive(Default)]
struct News {
    began: bool,
    /// Blocks, all together.
    grown: u32,
    said: BytesMut,
    /// Too much was said to be read.
    deaf: bool,
    ended: bool,
    over: bool,
}

/// A stream's booking at a replica; freed when dropped.
pub struct Kept {
    news: Arc<(Mutex<News>, Notify)>,
}

impl Kept {
    fn note(&self, what: impl FnOnce(&mut News)) {
        what(&mut self.news.0.lock());
        self.news.1.notify_one();
    }

    /// The first output has come.
    pub fn began(&self) {
        self.note(|news| news.began = true);
    }

    /// The output takes so many blocks more.
    pub fn grew(&self, blocks: u32) {
        self.note(|news| news.grown = news.grown.saturating_add(blocks));
    }

    /// A piece of the answer.
    pub fn said(&self, piece: &[u8]) {
        self.note(|news| {
            if news.said.len() + piece.len() > MOST_SAID {
                news.deaf = true;
                news.said = BytesMut::new();
            } else if !news.deaf {
                news.said.extend_from_slice(piece);
            }
        });
    }

    /// The answer has ended as it should.
    pub fn ended(self) {
        self.note(|news| news.ended = true);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.note(|news| news.over = true);
    }
}

/// A call to one replica.
struct Call {
    say: mpsc::Sender<PlaceSaid>,
    told: Streaming<PlaceTold>,
}

impl Call {
    /// False when the call is over.
    async fn say(&self, what: What) -> bool {
        self.say.send(PlaceSaid { what: Some(what) }).await.is_ok()
    }

    /// Has what was said heard before the call ends: a call that is just dropped may take the last words
    /// with it.
    async fn finish(self) {
        let Self { say, mut told } = self;
        drop(say);
        let _ = timeout(LAST_WORDS, told.message()).await;
    }
}

impl Remote {
    /// Whether there are engines with agents, as far as was heard.
    pub fn has_agents(&self) -> bool {
        self.seen.load().look.agents
    }

    /// Asks one replica after the other for a stream's place.
    pub async fn place(self: &Arc<Self>, order: &Order) -> Placing {
        let order: Bytes = codec::encode(order).into();
        for member in self.at_random() {
            let asked = self.open_call(&member, What::Order(order.clone()));
            let answered = tokio::select! {
                answered = asked => answered,
                () = self.is_missed(member.peer.id) => Err("the cluster misses it".to_owned()),
            };
            match answered {
                Ok((PlaceTold { outcome: HERE, what }, call)) => {
                    let Ok(place) = codec::decode::<Place>(&what) else {
                        tracing::warn!(
                            replica = member.peer.name,
                            "its answer cannot be read; is it of another version?"
                        );
                        continue;
                    };
                    let news = Arc::new((Mutex::default(), Notify::new()));
                    self.note_located(place.holder(), Some(place.agent.clone()));
                    let keeping = Arc::clone(self).keep(place.clone(), Arc::clone(&news), call);
                    // Ends when the handle is dropped.
                    self.runtime.spawn(keeping);
                    return Placing::At(place, Kept { news });
                }
                Ok((PlaceTold { outcome: REFUSED, what }, _)) => return Placing::Refused(what),
                Ok(_) => return Placing::Elsewhere,
                Err(why) => tracing::debug!(replica = member.peer.name, why, "no place from there"),
            }
        }
        Placing::Elsewhere
    }

    fn at_random(&self) -> Vec<Member> {
        let mut members = self.replicas();
        members.shuffle(&mut rand::rng());
        members.sort_by_key(|member| !member.peer.alive);
        members
    }

    async fn is_missed(&self, id: ReplicaId) {
        let mut missed = 0;
        while missed < MISSED {
            sleep(LOOK).await;
            // One that is frozen keeps its connections open.
            missed = if self.misses(id) { missed + 1 } else { 0 };
        }
    }

    async fn open_call(&self, member: &Member, first: What) -> Result<(PlaceTold, Call), String> {
        let channel = self.place_channel(&(member.peer.address.clone(), Some(member.peer.name.clone())))?;
        let mut client = PlacingClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let (say, said) = mpsc::channel(UNDERWAY);
        let cluster = Cluster(self.seen.load().look.cluster.clone());
        // There is room: nothing was said yet.
        let _ = say.try_send(PlaceSaid { what: Some(first) });
        let answer = client.place(cluster.of(ReceiverStream::new(said))).await;
        let mut told = answer.map_err(|status| status.message().to_owned())?.into_inner();
        match told.message().await {
            Ok(Some(answer)) => Ok((answer, Call { say, told })),
            Ok(None) => Err("no answer".to_owned()),
            Err(status) => Err(status.message().to_owned()),
        }
    }

    /// A connection for such calls: prompts are long, and must not stand in front of short questions.
    fn place_channel(&self, place: &Address) -> Result<Channel, String> {
        let mut channels = self.place_channels.lock();
        if let Some(channel) = channels.get(place) {
            return Ok(channel.clone());
        }
        let channel = self.channel(place, Purpose::Streams)?;
        channels.insert(place.clone(), channel.clone());
        Ok(channel)
    }

    /// Keeps a stream booked.
    async fn keep(self: Arc<Self>, place: Place, news: Arc<(Mutex<News>, Notify)>, call: Call) {
        let mut call = Some(call);
        // What was told to the replica of the call.
        let (mut began, mut grown) = (false, 0);
        loop {
            let Some(mut open) = call.take() else {
                let pause = PAUSE.mul_f64(rand::random_range(1.0..2.0));
                if timeout(pause, over(&news)).await.is_ok() {
                    return;
                }
                if self.reach().replica {
                    let (now_began, now_grown) = {
                        let news = news.0.lock();
                        (news.began, news.grown)
                    };
                    let share = Share {
                        prefill_tokens: if now_began { 0 } else { place.share.prefill_tokens },
                        decode_blocks: place.share.decode_blocks.saturating_add(now_grown),
                    };
                    let running = Running { worker: place.worker, rank: place.rank, share };
                    call = self.book_again(running).await;
                    (began, grown) = (now_began, now_grown);
                }
                continue;
            };
            let is_open = tokio::select! {
                () = news.1.notified() => {
                    let (whats, is_over) = read(&news, &place, &mut began, &mut grown);
                    let mut is_open = true;
                    for what in whats {
                        is_open &= open.say(what).await;
                    }
                    if is_over {
                        return open.finish().await;
                    }
                    is_open
                }
                // It says nothing more: this is its end.
                _ = open.told.message() => false,
            };
            call = is_open.then_some(open);
        }
    }

    async fn book_again(&self, running: Running) -> Option<Call> {
        let running: Bytes = codec::encode(&running).into();
        for member in self.at_random().into_iter().filter(|member| member.peer.alive) {
            match timeout(AGAIN, self.open_call(&member, What::Running(running.clone()))).await {
                Ok(Ok((PlaceTold { outcome: HERE, .. }, call))) => return Some(call),
                Ok(Ok((PlaceTold { outcome: ELSEWHERE, .. }, _))) => {
                    tracing::debug!(
                        replica = member.peer.name,
                        "it does not know the engine of a stream that runs"
                    );
                }
                Ok(Ok(_)) => {}
                Ok(Err(why)) => tracing::debug!(replica = member.peer.name, why, "not booked again there"),
                Err(_) => tracing::debug!(replica = member.peer.name, "not booked again there in time"),
            }
        }
        None
    }
}

async fn over(news: &(Mutex<News>, Notify)) {
    while !news.0.lock().over {
        news.1.notified().await;
    }
}

/// What is to be said now, and whether that is all.
fn read(news: &(Mutex<News>, Notify), place: &Place, began: &mut bool, grown: &mut u32) -> (Vec<What>, bool) {
    let mut news = news.0.lock();
    let mut whats = Vec::new();
    if news.began && !std::mem::replace(began, true) {
        whats.push(What::Began(1));
    }
    let more = news.grown - std::mem::replace(grown, news.grown);
    if more > 0 {
        whats.push(What::Grown(more));
    }
    if place.wants_text {
        if !news.said.is_empty() {
            whats.push(What::Said(std::mem::take(&mut news.said).freeze()));
        }
        if news.ended && !news.deaf {
            whats.push(What::Ended(1));
        }
    }
    (whats, news.over)
}
