//! The answering end of a link.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use parking_lot::Mutex;
use tonic::{Request as Rpc, Response, Status, Streaming};

use super::feeder::Feeder;
use super::outbox::Outbox;
use super::proto::frame::What;
use super::proto::relay_server::{Relay, RelayServer};
use super::proto::{Accepted, Attach, Batch, Frame, Open, Refused};
use super::signs::Signs;
use super::{CLUSTER, MAX_MESSAGE, Past, UNLESS_WATCHED, WINDOW, Why, end_to_wire, frame, line_to_wire};
use crate::codec;
use crate::ids::StreamId;
use crate::relay::copy::{Copy, Stop};
use crate::relay::order::Order;

/// Most channels of one link.
const CHANNELS: usize = 65_536;

/// A refusal.
pub type Refusal = (Why, String);

/// A boxed future with a copy or a refusal.
pub type Having<'a> = Pin<Box<dyn Future<Output = Result<Arc<Copy>, Refusal>> + Send + 'a>>;

/// Who answers.
pub trait Host: Send + Sync + 'static {
    /// Hexadecimal id of the cluster; empty before there is one.
    fn cluster(&self) -> String;
    /// Generates a stream: at once, or not at all. One that is `shared` is read by nobody before it is
    /// listed.
    fn open(
        self: Arc<Self>,
        id: StreamId,
        attempt: u32,
        order: Order,
        past: Past,
        shared: bool,
    ) -> Result<Arc<Copy>, Refusal>;
    /// What there is here of a stream for whoever begins `attempt`: nothing of earlier ones is added to it any
    /// more.
    fn remains(&self, id: StreamId, attempt: u32) -> Result<Arc<Copy>, Refusal>;
    /// The copy of a stream; from the replica `via`, where that is not 0 and there is none here.
    fn attach(self: Arc<Self>, id: StreamId, via: u64) -> Having<'static>;
    /// Ends a generation; and forgets it.
    fn cancel(&self, copy: &Arc<Copy>, purge: bool);
    /// A client that does not come back has left: ends a generation that nobody else listens to.
    fn deserted(&self, copy: &Arc<Copy>);
    /// Other clients listen to a copy than before.
    fn watched(&self, copy: &Arc<Copy>);
    /// After what silence a caller is taken to be dead.
    fn silence(&self) -> Duration;
}

/// The service over a host.
pub struct Service<H> {
    host: Arc<OnceLock<Arc<H>>>,
    links: AtomicU64,
}

impl<H: Host> Service<H> {
    /// The service, ready for a tonic server. The host may come later.
    pub fn serve(host: Arc<OnceLock<Arc<H>>>) -> RelayServer<Self> {
        RelayServer::new(Self { host, links: AtomicU64::new(1) })
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}

#[tonic::async_trait]
impl<H: Host> Relay for Service<H> {
    type LinkStream = Pin<Box<dyn Stream<Item = Result<Batch, Status>> + Send>>;

    async fn link(&self, request: Rpc<Streaming<Batch>>) -> Result<Response<Self::LinkStream>, Status> {
        let host = self.host.get().filter(|host| !host.cluster().is_empty());
        let Some(host) = host else {
            return Err(Status::unavailable("this replica is not a member yet"));
        };
        let cluster = host.cluster();
        let theirs =
            request.metadata().get(CLUSTER).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if theirs != cluster {
            return Err(Status::failed_precondition("this replica belongs to another cluster"));
        }
        let outbox = Arc::<Outbox>::default();
        let served = Arc::new(Served {
            host: Arc::clone(host),
            number: self.links.fetch_add(1, Ordering::Relaxed),
            outbox: Arc::clone(&outbox),
            channels: Mutex::default(),
            signs: Signs::new(),
        });
        let batches = outbox.batches();
        // The caller waits for a first message.
        outbox.ping();
        // Both end with the link.
        tokio::spawn(Arc::clone(&served).listen(request.into_inner()));
        tokio::spawn(served.watch_over());
        Ok(Response::new(Box::pin(batches.map(Ok))))
    }
}

struct Served<H> {
    host: Arc<H>,
    number: u64,
    outbox: Arc<Outbox>,
    channels: Mutex<HashMap<u64, Arc<Feeder>>>,
    signs: Signs,
}

impl<H: Host> Served<H> {
    async fn listen(self: Arc<Self>, mut batches: Streaming<Batch>) {
        while let Some(Ok(batch)) = batches.next().await {
            self.signs.heard();
            for frame in batch.frames {
                self.take(frame);
            }
            if self.outbox.is_closed() {
                break;
            }
        }
        self.outbox.close();
        let channels: Vec<_> = self.channels.lock().drain().collect();
        for (number, feeder) in channels {
            self.over(number, &feeder);
        }
    }

    /// Until the link is broken, or has to be.
    async fn watch_over(self: Arc<Self>) {
        self.signs.exchange(&self.outbox, self.host.silence(), || !self.outbox.is_closed()).await;
        self.outbox.close();
    }

    fn take(self: &Arc<Self>, taken: Frame) {
        let number = taken.channel;
        match taken.what {
            Some(What::Open(open)) => self.open(number, open),
            Some(What::Attach(attach)) => {
                let served = Arc::clone(self);
                // Ends with the attempt to get a copy, which has a limit.
                tokio::spawn(async move { served.attach(number, attach).await });
            }
            Some(What::Credit(bytes)) => {
                if let Some(feeder) = self.feeder(number) {
                    feeder.credit(usize::try_from(bytes).unwrap_or(usize::MAX).min(WINDOW));
                }
            }
            Some(What::Watch(clients)) => {
                if let Some(feeder) = self.feeder(number) {
                    self.watched(number, &feeder, clients);
                }
            }
            Some(What::Cancel(how)) => {
                if let Some(feeder) = self.feeder(number) {
                    match how {
                        UNLESS_WATCHED => self.host.deserted(&feeder.copy),
                        how => self.host.cancel(&feeder.copy, how == 1),
                    }
                }
            }
            Some(What::Close(_)) => {
                let feeder = self.channels.lock().remove(&number);
                if let Some(feeder) = feeder {
                    self.over(number, &feeder);
                }
            }
            // Only the answering end says those.
            Some(What::Accepted(_) | What::Refused(_) | What::Head(_) | What::Events(_) | What::Leave(_))
            | None => {}
        }
    }

    /// Nobody reads any more by way of this channel.
    fn over(&self, number: u64, feeder: &Feeder) {
        self.watched(number, feeder, 0);
        feeder.copy.book((self.number, number), false);
        feeder.stop();
    }

    /// So many clients listen at the other end; whoever this copy comes from hears of it, too.
    fn watched(&self, channel: u64, feeder: &Feeder, clients: u32) {
        feeder.copy.watch((self.number, channel), clients);
        self.host.watched(&feeder.copy);
    }

    fn feeder(&self, number: u64) -> Option<Arc<Feeder>> {
        self.channels.lock().get(&number).cloned()
    }

    fn open(self: &Arc<Self>, number: u64, open: Open) {
        let (id, order) = match (stream_id(&open.id), codec::decode::<Order>(&open.order)) {
            (Some(id), Ok(order)) => (id, order),
            _ => return self.refuse(number, Why::NotUnderstood, "the order cannot be read"),
        };
        let Some(past) = Past::from_wire(open.past.unwrap_or_default()) else {
            return self.refuse(number, Why::NotUnderstood, "what was before cannot be read");
        };
        let (at, knows_head) = (past.had.first + past.had.events.len() as u64, !past.head.is_empty());
        match Arc::clone(&self.host).open(id, open.attempt, order, past, open.shared) {
            Ok(copy) => {
                let line = Some(line_to_wire(&copy.line()));
                let accepted = Accepted { attempt: open.attempt, line, ..Accepted::default() };
                // First, so that the end of the channel comes after it.
                copy.book((self.number, number), open.books);
                if !self.feed(number, &copy, at, knows_head, accepted, WINDOW) {
                    copy.book((self.number, number), false);
                }
            }
            Err((why, text)) => self.refuse(number, why, &text),
        }
    }

    async fn attach(self: Arc<Self>, number: u64, attach: Attach) {
        let Some(id) = stream_id(&attach.id) else {
            return self.refuse(number, Why::NotUnderstood, "the stream's id cannot be read");
        };
        let had = match attach.seal {
            0 => Arc::clone(&self.host).attach(id, attach.via).await,
            attempt => self.host.remains(id, attempt),
        };
        let copy = match had {
            Ok(copy) => copy,
            Err((why, text)) => return self.refuse(number, why, &text),
        };
        let head = copy.head().map(|head| codec::encode(&*head)).unwrap_or_default();
        let order = match attach.glance || attach.seal > 0 {
            true => codec::encode(&copy.order.outline()),
            false => codec::encode(&*copy.order),
        };
        let (summary, line) = copy.summary_with_line();
        let mut accepted = Accepted {
            attempt: summary.attempt,
            order: order.into(),
            head: head.into(),
            first: attach.from,
            journal: Bytes::new(),
            line: Some(line_to_wire(&line)),
            next: summary.events,
            ended: end_to_wire(summary.ended),
        };
        if attach.whole {
            let Some(had) = copy.past() else {
                return self.refuse(number, Why::Behind, "too much of the stream was forgotten");
            };
            (accepted.first, accepted.journal) = (had.first, had.journal);
        }
        let (at, knows_head) = (accepted.first, !accepted.head.is_empty());
        copy.book((self.number, number), attach.books);
        // The caller gives credit once it has made room.
        if !self.feed(number, &copy, at, knows_head, accepted, 0) {
            copy.book((self.number, number), false);
        }
    }

    /// False where it cannot be fed.
    fn feed(
        &self,
        number: u64,
        copy: &Arc<Copy>,
        at: u64,
        knows_head: bool,
        accepted: Accepted,
        credit: usize,
    ) -> bool {
        let feeder = match Feeder::begin(number, copy, &self.outbox, at, knows_head) {
            Ok(feeder) => feeder,
            Err(Stop::Behind | Stop::Ended) => {
                self.refuse(number, Why::Behind, "what is asked for was forgotten");
                return false;
            }
            Err(Stop::Closed | Stop::Stray) => {
                self.refuse(number, Why::NoSuchStream, "this copy is closed");
                return false;
            }
        };
        {
            let mut channels = self.channels.lock();
            if channels.len() >= CHANNELS || channels.contains_key(&number) {
                drop(channels);
                feeder.stop();
                self.refuse(number, Why::Busy, "this link has too many streams");
                return false;
            }
            channels.insert(number, Arc::clone(&feeder));
        }
        let answer = frame(number, What::Accepted(accepted));
        match copy.head() {
            Some(_) => self.outbox.send(answer),
            // An engine was asked this moment, and needs the processor more than whoever waits for it.
            None => self.outbox.send_with_next(answer),
        };
        feeder.credit(credit);
        if self.outbox.is_closed() {
            self.channels.lock().remove(&number);
            feeder.stop();
            return false;
        }
        true
    }

    fn refuse(&self, number: u64, why: Why, text: &str) {
        self.outbox.send(frame(number, What::Refused(Refused { why: why as u32, text: text.to_owned() })));
    }
}

fn stream_id(bytes: &[u8]) -> Option<StreamId> {
    StreamId::parse(&format!("st_{}", std::str::from_utf8(bytes).ok()?))
}
