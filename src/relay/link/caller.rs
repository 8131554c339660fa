//! The asking end of a link: opens and attaches to streams at one other process, and puts what comes
//! into copies.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tonic::transport::Channel as Connection;

use super::outbox::Outbox;
use super::proto::frame::What;
use super::proto::relay_client::RelayClient;
use super::proto::{Accepted, Attach, Batch, Events, Frame, Open};
use super::signs::Signs;
use super::{CLUSTER, MAX_MESSAGE, Past, UNLESS_WATCHED, WINDOW, Why, frame, from_wire, line_from_wire};
use crate::codec;
use crate::ids::StreamId;
use crate::relay::copy::Copy;
use crate::relay::log::Event;
use crate::relay::order::Head;

/// How long opening a link may take.
const OPEN_TIMEOUT: Duration = Duration::from_millis(1000);

/// Why a stream stopped coming.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lost {
    /// The link broke: its other end died, or had closed it.
    Link,
    /// Nothing is heard of the link's other end.
    Silence,
    /// The other end says so.
    Refused(Why),
    /// The other end goes on for now, but wants somebody else to.
    Leaving,
    /// Its last event has come.
    Ended,
}

/// Told of streams that stop coming. Called without locks; must not block.
pub type OnLost = dyn Fn(Arc<Copy>, Lost) + Send + Sync;

/// Why something could not be asked.
#[derive(thiserror::Error, Clone, Debug, PartialEq, Eq)]
pub enum AskError {
    /// No link, or it broke before the answer.
    #[error("the link broke")]
    Broken,
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// The answer is no.
    #[error("{1}")]
    Refused(Why, String),
}

type Answer = Result<Accepted, AskError>;

struct Channel {
    /// Known from the start of what this end opens; otherwise with the answer.
    copy: Mutex<Option<Arc<Copy>>>,
    answer: Mutex<Option<oneshot::Sender<Answer>>>,
    /// Bytes taken and not yet credited.
    owed: AtomicUsize,
}

/// What is wanted of a stream that the other end has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Everything, to go on with it if need be.
    pub whole: bool,
    /// Else, from which event on.
    pub from: u64,
    /// The replica that the other end gets it from, where it has none; 0 is nobody.
    pub via: u64,
    /// Its load is booked here for as long as the channel is open.
    pub books: bool,
}

/// How a stream is ordered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms {
    /// Its load is booked here for as long as the channel is open.
    pub books: bool,
    /// Others may order it, too: nothing of it may be read before it is listed.
    pub shared: bool,
}

/// A link that was opened.
pub struct Link {
    outbox: Arc<Outbox>,
    /// `None` once the link is broken.
    channels: Mutex<Option<HashMap<u64, Arc<Channel>>>>,
    next: AtomicU64,
    signs: Signs,
    /// Without a sign of life for so long the other end is taken to be dead.
    silence: Duration,
    /// Without a channel for so long it is closed.
    idle: Option<Duration>,
    /// When it was last wanted or had a channel. Written with the channels locked.
    used: Mutex<Instant>,
    on_lost: Arc<OnLost>,
}

/// A stream's channel. Dropping it gives the stream up, here.
pub struct Ticket {
    link: Arc<Link>,
    number: u64,
    /// What the other end was told last of how many listen here.
    watched: AtomicU32,
}

impl Ticket {
    /// So many clients listen to this end's copy. The other end takes it that none do until it is told.
    pub fn watch(&self, clients: u32) {
        if self.watched.swap(clients, Ordering::Relaxed) != clients {
            self.link.outbox.send(frame(self.number, What::Watch(clients)));
        }
    }

    /// Whether anything may still come.
    pub fn is_open(&self) -> bool {
        self.link.channels.lock().as_ref().is_some_and(|channels| channels.contains_key(&self.number))
    }

    /// Ends the generation; and forgets the stream.
    pub fn cancel(&self, purge: bool) {
        self.link.outbox.send(frame(self.number, What::Cancel(u32::from(purge))));
    }

    /// Ends the generation, if nobody else listens.
    pub fn desert(&self) {
        self.link.outbox.send(frame(self.number, What::Cancel(UNLESS_WATCHED)));
    }

    /// Ends the generation for somebody who goes on without it: nothing that comes from there is
    /// taken any more, its end least of all.
    pub fn call_off(self) {
        // In this order: the answer to a cancellation is an end of the stream.
        if self.link.forget(self.number).is_some() {
            self.link.outbox.send(frame(self.number, What::Cancel(1)));
            self.link.outbox.send(frame(self.number, What::Close(0)));
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.link.forget(self.number).is_some() {
            self.link.outbox.send(frame(self.number, What::Close(0)));
        }
    }
}

impl Link {
    /// Opens a link. After the first time without a sign of life the other end is taken to be dead; after
    /// the second without a channel, if there is one, the link is closed.
    pub async fn open(
        connection: Connection,
        cluster: &str,
        (silence, idle): (Duration, Option<Duration>),
        on_lost: Arc<OnLost>,
    ) -> Result<Arc<Self>, String> {
        let outbox = Arc::<Outbox>::default();
        let mut request = tonic::Request::new(outbox.batches());
        let cluster = cluster.parse().map_err(|_| "the cluster's id is not ASCII".to_owned())?;
        request.metadata_mut().insert(CLUSTER, cluster);
        let mut client = RelayClient::new(connection)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        // The answer's head comes with its first message.
        outbox.ping();
        let answers = tokio::time::timeout(OPEN_TIMEOUT, client.link(request))
            .await
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(|status| status.message().to_owned())?
            .into_inner();
        let link = Arc::new(Self {
            outbox,
            channels: Mutex::new(Some(HashMap::new())),
            next: AtomicU64::new(1),
            signs: Signs::new(),
            silence,
            idle,
            used: Mutex::new(Instant::now()),
            on_lost,
        });
        // Both end with the link.
        tokio::spawn(Arc::clone(&link).listen(answers));
        tokio::spawn(Arc::clone(&link).watch_over());
        Ok(link)
    }

    /// Whether it still works, as far as is known.
    pub fn is_open(&self) -> bool {
        self.channels.lock().is_some() && !self.outbox.is_closed()
    }

    /// Whether it still works, for somebody who is about to use it: it is not closed for idleness meanwhile.
    pub fn is_wanted(&self) -> bool {
        let channels = self.channels.lock();
        *self.used.lock() = Instant::now();
        channels.is_some() && !self.outbox.is_closed()
    }

    /// Channels in use.
    pub fn channels(&self) -> usize {
        self.channels.lock().as_ref().map_or(0, HashMap::len)
    }

    /// Has a stream generated at the other end; `copy` gets what is generated.
    pub async fn order(
        self: &Arc<Self>,
        copy: &Arc<Copy>,
        attempt: u32,
        past: Option<Past>,
        Terms { books, shared }: Terms,
        within: Duration,
    ) -> Result<(Ticket, Accepted), AskError> {
        let open = Open {
            id: Bytes::copy_from_slice(copy.id.chars()),
            attempt,
            order: codec::encode(&*copy.order).into(),
            past: past.map(|past| past.into_wire(attempt - 1)),
            books,
            shared,
        };
        let (ticket, answer) = self.ask(Some(Arc::clone(copy)), What::Open(open))?;
        let accepted = wait(answer, within).await?;
        Ok((ticket, accepted))
    }

    /// Asks for a stream that the other end has, or gets from somebody else. The answer says what it
    /// is; what follows comes after [`Link::receive`].
    pub async fn attach(
        self: &Arc<Self>,
        id: StreamId,
        wanted: Wanted,
        within: Duration,
    ) -> Result<(Ticket, Accepted), AskError> {
        let Wanted { whole, from, via, books } = wanted;
        let id = Bytes::copy_from_slice(id.chars());
        let attach = Attach { id, whole, from, via, books, ..Attach::default() };
        let (ticket, answer) = self.ask(None, What::Attach(attach))?;
        let accepted = wait(answer, within).await?;
        Ok((ticket, accepted))
    }

    /// Asks what the other end knows of a stream. No events come; the ticket is good for ending it.
    pub async fn glance(
        self: &Arc<Self>,
        id: StreamId,
        within: Duration,
    ) -> Result<(Ticket, Accepted), AskError> {
        let id = Bytes::copy_from_slice(id.chars());
        let attach = Attach { id, from: u64::MAX, glance: true, ..Attach::default() };
        let (ticket, answer) = self.ask(None, What::Attach(attach))?;
        let accepted = wait(answer, within).await?;
        Ok((ticket, accepted))
    }

    /// Asks for what the other end has of a stream and this one has not, `from` an event on, of which
    /// `seal` is a later attempt: the other end takes nothing of earlier ones any more.
    pub async fn remains(
        self: &Arc<Self>,
        id: StreamId,
        from: u64,
        seal: u32,
        within: Duration,
    ) -> Result<(Ticket, Accepted), AskError> {
        let id = Bytes::copy_from_slice(id.chars());
        let attach = Attach { id, from, seal, ..Attach::default() };
        let (ticket, answer) = self.ask(None, What::Attach(attach))?;
        let accepted = wait(answer, within).await?;
        Ok((ticket, accepted))
    }

    /// Has what comes put into `copy`.
    pub fn receive(&self, ticket: &Ticket, copy: &Arc<Copy>) {
        let known = self.channels.lock().as_ref().and_then(|channels| channels.get(&ticket.number).cloned());
        match known {
            Some(channel) => {
                *channel.copy.lock() = Some(Arc::clone(copy));
                self.outbox.send(frame(ticket.number, What::Credit(WINDOW as u64)));
            }
            None => (self.on_lost)(Arc::clone(copy), Lost::Link),
        }
    }

    fn ask(
        self: &Arc<Self>,
        copy: Option<Arc<Copy>>,
        what: What,
    ) -> Result<(Ticket, oneshot::Receiver<Answer>), AskError> {
        let (tell, answer) = oneshot::channel();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let channel =
            Channel { copy: Mutex::new(copy), answer: Mutex::new(Some(tell)), owed: AtomicUsize::new(0) };
        match self.channels.lock().as_mut() {
            Some(channels) => channels.insert(number, Arc::new(channel)),
            None => return Err(AskError::Broken),
        };
        let ticket = Ticket { link: Arc::clone(self), number, watched: AtomicU32::new(0) };
        if !self.outbox.send(frame(number, what)) {
            return Err(AskError::Broken);
        }
        Ok((ticket, answer))
    }

    fn forget(&self, number: u64) -> Option<Arc<Channel>> {
        self.channels.lock().as_mut()?.remove(&number)
    }

    async fn listen(self: Arc<Self>, mut answers: tonic::Streaming<Batch>) {
        // However it ends: its thread may.
        let _closes = Closes(&self);
        while let Some(Ok(batch)) = answers.next().await {
            self.signs.heard();
            batch.frames.into_iter().for_each(|frame| self.take(frame));
            if self.channels.lock().is_none() {
                break;
            }
        }
    }

    /// Until the link is broken, or has to be.
    async fn watch_over(self: Arc<Self>) {
        let is_open = || self.is_open() && !self.has_idled();
        self.signs.exchange(&self.outbox, self.silence, is_open).await;
        self.close_for(Lost::Silence);
    }

    /// Closes it if nobody has used it for long.
    fn has_idled(&self) -> bool {
        let Some(idle) = self.idle else { return false };
        let mut channels = self.channels.lock();
        let mut used = self.used.lock();
        if channels.as_ref().is_some_and(|channels| !channels.is_empty()) {
            *used = Instant::now();
        }
        let has_idled = used.elapsed() >= idle;
        if has_idled {
            self.outbox.close();
            channels.take();
        }
        has_idled
    }

    /// Breaks the link: whoever waits for something on it is told.
    pub fn close(&self) {
        self.close_for(Lost::Link);
    }

    fn close_for(&self, why: Lost) {
        self.outbox.close();
        let Some(channels) = self.channels.lock().take() else { return };
        for channel in channels.into_values() {
            channel.give_up(why, AskError::Broken, &*self.on_lost);
        }
    }

    fn take(&self, frame: Frame) {
        let Some(what) = frame.what else { return };
        let channel =
            self.channels.lock().as_ref().and_then(|channels| channels.get(&frame.channel).cloned());
        let Some(channel) = channel else { return };
        match what {
            What::Accepted(accepted) => {
                channel.tell(Ok(accepted));
            }
            What::Head(head) => {
                let copy = channel.copy.lock().clone();
                if let (Some(copy), Ok(head)) = (copy, codec::decode::<Head>(&head)) {
                    copy.set_head(Arc::new(head));
                }
            }
            What::Events(events) => self.take_events(frame.channel, &channel, events),
            What::Refused(refused) => {
                let why = Why::from_wire(refused.why);
                self.forget(frame.channel);
                channel.give_up(Lost::Refused(why), AskError::Refused(why, refused.text), &*self.on_lost);
            }
            What::Leave(_) => {
                let copy = channel.copy.lock().clone();
                if let Some(copy) = copy {
                    (self.on_lost)(copy, Lost::Leaving);
                }
            }
            What::Close(_) => {
                self.forget(frame.channel);
                channel.give_up(Lost::Link, AskError::Broken, &*self.on_lost);
            }
            // Only the asking end says those.
            What::Open(_) | What::Attach(_) | What::Credit(_) | What::Watch(_) | What::Cancel(_) => {}
        }
    }

    fn take_events(&self, number: u64, channel: &Arc<Channel>, events: Events) {
        let Some(copy) = channel.copy.lock().clone() else { return };
        let line = events.line.is_some().then(|| line_from_wire(events.line));
        let follows = match line {
            Some(Some(line)) => copy.follow(events.attempt, &line) || events.attempt < copy.attempt(),
            // What nobody writes.
            Some(None) => false,
            None => true,
        };
        let batch: Vec<Event> = events.events.into_iter().map(from_wire).collect();
        let bytes: usize = batch.iter().map(Event::bytes).sum();
        let terminal = batch.last().is_some_and(|event| event.terminal);
        if !follows || !copy.push(events.attempt, events.first, batch) {
            // A gap, or a contradiction: this copy cannot become whole from here.
            self.forget(number);
            self.outbox.send(frame(number, What::Close(0)));
            return channel.give_up(Lost::Link, AskError::Broken, &*self.on_lost);
        }
        if terminal {
            self.forget(number);
            self.outbox.send(frame(number, What::Close(0)));
            return (self.on_lost)(copy, Lost::Ended);
        }
        let owed = channel.owed.fetch_add(bytes, Ordering::AcqRel) + bytes;
        if owed < WINDOW / 2 {
            return;
        }
        if copy.has_room() {
            return self.give_credit(number, channel);
        }
        // A client here does not read. Ends when it does, or leaves: then there is room.
        let (outbox, channel) = (Arc::clone(&self.outbox), Arc::clone(channel));
        tokio::spawn(async move {
            std::future::poll_fn(|cx| copy.poll_room(cx)).await;
            credit(&outbox, number, &channel);
        });
    }

    fn give_credit(&self, number: u64, channel: &Channel) {
        credit(&self.outbox, number, channel);
    }
}

fn credit(outbox: &Outbox, number: u64, channel: &Channel) {
    let owed = channel.owed.swap(0, Ordering::AcqRel);
    if owed > 0 {
        outbox.send(frame(number, What::Credit(owed as u64)));
    }
}

/// Closes a link at the end of a scope.
struct Closes<'a>(&'a Link);

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A limit that is noticed so much too late says that this process was away. The answer may be there then,
/// and not be read yet.
const OVERSLEPT: Duration = Duration::from_millis(500);

async fn wait(mut answer: oneshot::Receiver<Answer>, within: Duration) -> Answer {
    let began = Instant::now();
    let mut waited = tokio::time::timeout(within, &mut answer).await;
    if waited.is_err() && began.elapsed() > within + OVERSLEPT {
        waited = tokio::time::timeout(within, &mut answer).await;
    }
    match waited {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(AskError::Broken),
        Err(_) => Err(AskError::Timeout),
    }
}

impl Channel {
    fn tell(&self, answer: Answer) -> bool {
        let tell = self.answer.lock().take();
        tell.is_some_and(|tell| tell.send(answer).is_ok())
    }

    /// Whoever waits for the answer hears of it there; otherwise the copy has lost its source.
    fn give_up(&self, lost: Lost, error: AskError, on_lost: &OnLost) {
        let waits = self.answer.lock().is_some();
        if waits {
            self.tell(Err(error));
            return;
        }
        let copy = self.copy.lock().take();
        if let Some(copy) = copy
            && !copy.ended()
        {
            on_lost(copy, lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_was_away_reads_the_answer_that_came_meanwhile() {
        let within = Duration::from_millis(20);
        let (say, answer) = oneshot::channel();
        let waiting = tokio::spawn(wait(answer, within));
        tokio::task::yield_now().await;
        // Nothing runs on this thread meanwhile, as where the process is stopped.
        std::thread::sleep(within + OVERSLEPT + Duration::from_millis(50));
        let read_later = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            say.send(Err(AskError::Broken))
        };
        assert_eq!(read_later.await, Ok(()), "it still waits");
        assert_eq!(waiting.await.unwrap().err(), Some(AskError::Broken));
        let (_say, answer) = oneshot::channel();
        assert_eq!(
            wait(answer, within).await.err(),
            Some(AskError::Timeout),
            "one that was there has waited enough"
        );
    }
}
