//! Live messages of one rank: from a connection of ours, made again whenever it ends, or from
//! a hub that the engine connects to.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rand::RngExt;
use xxhash_rust::xxh3::xxh3_64;

use super::hub::{HubEvent, HubFeed};
use crate::kv::event;
use crate::kv::feed::Message;
use crate::zmtp::{Endpoint, Limits, Link, Parts, Resolve, SocketType, ZmtpError};

/// Pause before the second attempt to connect; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Longest pause between attempts, about.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why parts are not a message of a feed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rejected {
    /// Not topic, number and payload.
    Parts,
    /// A payload that is no batch of events.
    Payload,
}

/// Reads a message from its end: payload, number, and before them whatever there is.
pub(super) fn message(parts: &Parts) -> Result<Message<Bytes>, Rejected> {
    let [_, .., seq, payload] = parts.as_slice() else { return Err(Rejected::Parts) };
    let seq = u64::from_be_bytes(seq.as_ref().try_into().map_err(|_| Rejected::Parts)?);
    event::skim(payload).map_err(|_| Rejected::Payload)?;
    Ok(Message { seq, print: xxh3_64(payload), size: payload.len(), body: payload.clone() })
}

/// What happens.
pub(super) enum LiveEvent {
    /// A connection stands, its subscription sent.
    Connected,
    /// Parts of a message.
    Message(Parts),
    /// The connection ended, or could not be made.
    Gone(String),
    /// There will be no other.
    Over,
}

/// Where live messages come from.
pub(super) enum Live {
    Connect(Box<Connecting>),
    Hub(HubFeed),
}

pub(super) struct Connecting {
    endpoint: Endpoint,
    topic: String,
    resolve: Arc<dyn Resolve>,
    limits: Limits,
    link: Option<Link>,
    pause: Duration,
}

impl Live {
    pub(super) fn connect(
        endpoint: Endpoint,
        topic: String,
        resolve: Arc<dyn Resolve>,
        limits: Limits,
    ) -> Self {
        let (link, pause) = (None, Duration::ZERO);
        Self::Connect(Box::new(Connecting { endpoint, topic, resolve, limits, link, pause }))
    }

    /// What happens next. While there is a connection it loses nothing if it is dropped; while
    /// there is none, an attempt begins anew.
    pub(super) async fn next(&mut self) -> LiveEvent {
        match self {
            Self::Connect(connecting) => connecting.next().await,
            Self::Hub(feed) => match feed.next().await {
                Some(HubEvent::Connected) => LiveEvent::Connected,
                Some(HubEvent::Message(parts)) => LiveEvent::Message(parts),
                Some(HubEvent::Gone) => LiveEvent::Gone("the engine closed the connection".into()),
                None => LiveEvent::Over,
            },
        }
    }
}

impl Connecting {
    async fn next(&mut self) -> LiveEvent {
        let Some(link) = &mut self.link else {
            tokio::time::sleep(self.pause).await;
            return match self.attempt().await {
                Ok(link) => {
                    self.link = Some(link);
                    LiveEvent::Connected
                }
                Err(error) => {
                    self.pause = next_pause(self.pause);
                    LiveEvent::Gone(error.to_string())
                }
            };
        };
        match link.recv().await {
            Ok(parts) => {
                self.pause = FIRST_PAUSE;
                LiveEvent::Message(parts)
            }
            Err(error) => {
                self.link = None;
                self.pause = next_pause(self.pause);
                LiveEvent::Gone(error.to_string())
            }
        }
    }

    async fn attempt(&self) -> Result<Link, ZmtpError> {
        let Self { endpoint, limits, resolve, .. } = self;
        let mut link = Link::connect(endpoint, SocketType::Sub, *limits, resolve.as_ref()).await?;
        link.subscribe(&self.topic).await?;
        Ok(link)
    }
}

/// Twice as long, within the bounds, and a little at random: engines that restart together are not asked
/// together.
fn next_pause(pause: Duration) -> Duration {
    let doubled = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    doubled.mul_f64(rand::rng().random_range(0.75..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_from_their_end_and_anything_else_is_rejected() {
        let part = Bytes::copy_from_slice;
        let batch = part(b"\x92\x00\x90");
        let seq = part(&7_u64.to_be_bytes());
        for parts in [
            vec![part(b"topic"), seq.clone(), batch.clone()],
            vec![part(b""), part(b"topic"), seq.clone(), batch.clone()],
        ] {
            let read = message(&parts).unwrap();
            assert_eq!((read.seq, read.print, read.size), (7, xxh3_64(&batch), 3));
        }
        assert_eq!(message(&vec![seq.clone(), batch.clone()]), Err(Rejected::Parts));
        assert_eq!(message(&vec![part(b""), part(b"7"), batch]), Err(Rejected::Parts));
        assert_eq!(message(&vec![part(b""), seq, part(b"\xc0")]), Err(Rejected::Payload));
    }

    #[test]
    fn pauses_grow_to_their_bound() {
        let mut pause = Duration::ZERO;
        for _ in 0..20 {
            pause = next_pause(pause);
            assert!(pause >= FIRST_PAUSE.mul_f64(0.7) && pause <= LONGEST_PAUSE);
        }
        assert!(pause > LONGEST_PAUSE / 2);
    }
}
