//! One connection between two ZeroMQ sockets.

use std::net::IpAddr;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::endpoint::{Listener, Resolve, Stream};
use super::wire::{self, Frame};
use super::{Endpoint, Parts, SocketType, ZmtpError};

/// From connecting to both sides having said what they are.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Read at once, at most.
const READ: usize = 64 << 10;

/// Longest command: names of sockets, topics.
const MAX_COMMAND: usize = 8 << 10;

/// How much a peer may send at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Bytes of a message, all parts together.
    pub bytes: usize,
    /// Parts of a message.
    pub parts: usize,
}

impl Default for Limits {
    /// 16 MiB: a batch of a million removed blocks. Messages of feeds have up to four parts.
    fn default() -> Self {
        Self { bytes: 16 << 20, parts: 8 }
    }
}

/// A connection, its handshake done.
pub struct Link {
    stream: Box<dyn Stream>,
    limits: Limits,
    inbox: BytesMut,
    /// Answers to pings that are not written yet.
    outbox: BytesMut,
    /// Parts of a message that is not complete.
    parts: Parts,
    size: usize,
}

impl Link {
    /// Connects as a socket of type `ours`.
    pub async fn connect(
        endpoint: &Endpoint,
        ours: SocketType,
        limits: Limits,
        resolve: &dyn Resolve,
    ) -> Result<Self, ZmtpError> {
        let connecting = async { Self::shake(endpoint.connect(resolve).await?, ours, limits).await };
        timeout(HANDSHAKE_TIMEOUT, connecting).await.unwrap_or(Err(ZmtpError::Handshake))
    }

    /// Waits for the next connection to `listener`. What is returned has still to shake hands
    /// ([`Incoming::shake`]), by a task of its own: a peer may take its time.
    pub async fn accept(listener: &Listener) -> Result<Incoming, ZmtpError> {
        let (stream, peer) = listener.accept().await?;
        Ok(Incoming { stream, peer })
    }

    async fn shake(mut stream: Box<dyn Stream>, ours: SocketType, limits: Limits) -> Result<Self, ZmtpError> {
        stream.write_all(&wire::greeting()).await?;
        let mut greeting = [0; wire::GREETING];
        match stream.read_exact(&mut greeting).await {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(ZmtpError::Closed);
            }
            read => read?,
        };
        wire::check_greeting(&greeting)?;
        let mut out = BytesMut::new();
        wire::put_ready(&mut out, ours);
        stream.write_all(&out).await?;
        let (inbox, outbox, parts) = (BytesMut::new(), BytesMut::new(), Vec::new());
        let mut link = Self { stream, limits, inbox, outbox, parts, size: 0 };
        let Frame::Command(body) = link.frame(MAX_COMMAND).await? else {
            return Err(ZmtpError::Protocol("a message before READY"));
        };
        match wire::command(&body) {
            Some((b"READY", data)) => {
                let theirs = wire::socket_type(data).ok_or(ZmtpError::Protocol("READY without a type"))?;
                if !ours.talks_to(theirs) {
                    let theirs = String::from_utf8_lossy(theirs).into_owned();
                    return Err(ZmtpError::Mismatch { ours, theirs });
                }
                Ok(link)
            }
            Some((b"ERROR", data)) => Err(ZmtpError::Refused(
                String::from_utf8_lossy(data.get(1..).unwrap_or_default()).into_owned(),
            )),
            _ => Err(ZmtpError::Protocol("another command instead of READY")),
        }
    }

    /// The next frame. Loses nothing if it is dropped.
    async fn frame(&mut self, most: usize) -> Result<Frame, ZmtpError> {
        loop {
            if let Some(frame) = wire::take_frame(&mut self.inbox, most)? {
                return Ok(frame);
            }
            // Never more than what has come doubled, whatever length a frame announces.
            self.inbox.reserve(READ);
            if self.stream.read_buf(&mut (&mut self.inbox).limit(READ)).await? == 0 {
                return Err(ZmtpError::Closed);
            }
        }
    }

    /// The next message. A subscription comes as the older protocol has it: one part, 1 (or 0 to take it
    /// back) and the topic. Loses nothing if it is dropped.
    pub async fn recv(&mut self) -> Result<Parts, ZmtpError> {
        loop {
            while !self.outbox.is_empty() {
                self.stream.write_buf(&mut self.outbox).await?;
            }
            let Limits { bytes, parts } = self.limits;
            match self.frame(bytes - self.size).await? {
                Frame::Part(part, more) => {
                    self.size += part.len();
                    if self.parts.len() == parts {
                        return Err(ZmtpError::TooLong(bytes, parts));
                    }
                    self.parts.push(part);
                    if !more {
                        self.size = 0;
                        return Ok(std::mem::take(&mut self.parts));
                    }
                }
                Frame::Command(body) => match wire::command(&body) {
                    // Two bytes of time to live, then what is to be sent back.
                    Some((b"PING", data)) => {
                        wire::put_pong(&mut self.outbox, data.get(2..).unwrap_or_default());
                    }
                    Some((b"SUBSCRIBE", topic)) => return Ok(vec![[&[1], topic].concat().into()]),
                    Some((b"CANCEL", topic)) => return Ok(vec![[&[0], topic].concat().into()]),
                    Some((b"ERROR", data)) => {
                        let reason = String::from_utf8_lossy(data.get(1..).unwrap_or_default());
                        return Err(ZmtpError::Refused(reason.into_owned()));
                    }
                    _ => {}
                },
            }
        }
    }

    /// Sends a message. Must not be dropped before it is done, unless the link is dropped with it.
    pub async fn send(&mut self, parts: &[Bytes]) -> Result<(), ZmtpError> {
        let mut out = std::mem::take(&mut self.outbox);
        out.reserve(parts.iter().map(|part| part.len() + 9).sum());
        wire::put_message(&mut out, parts);
        self.stream.write_all(&out).await?;
        self.stream.flush().await?;
        Ok(())
    }

    /// Asks a PUB for everything whose topic begins with `topic`.
    pub async fn subscribe(&mut self, topic: &str) -> Result<(), ZmtpError> {
        let part = [&[1], topic.as_bytes()].concat();
        self.send(&[part.into()]).await
    }
}

/// A connection that somebody else made.
pub struct Incoming {
    stream: Box<dyn Stream>,
    peer: Option<IpAddr>,
}

impl Incoming {
    /// Who it is from; `None` for a process of this machine, by a file.
    pub fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// Shakes hands as a socket of type `ours`, within [`HANDSHAKE_TIMEOUT`].
    pub async fn shake(self, ours: SocketType, limits: Limits) -> Result<Link, ZmtpError> {
        self.shake_within(HANDSHAKE_TIMEOUT, ours, limits).await
    }

    async fn shake_within(
        self,
        within: Duration,
        ours: SocketType,
        limits: Limits,
    ) -> Result<Link, ZmtpError> {
        let shaking = Link::shake(self.stream, ours, limits);
        timeout(within, shaking).await.unwrap_or(Err(ZmtpError::Handshake))
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::zmtp::AnyAddress;

    async fn listener() -> Listener {
        Listener::bind(&Endpoint::parse("tcp://127.0.0.1:0").unwrap()).await.unwrap()
    }

    /// Both ends of a connection, shaken hands.
    async fn pair(
        ours: SocketType,
        theirs: SocketType,
    ) -> (Result<Link, ZmtpError>, Result<Link, ZmtpError>) {
        let listener = listener().await;
        let limits = Limits { bytes: 1000, parts: 3 };
        let connect = Link::connect(listener.endpoint(), ours, limits, &AnyAddress);
        let accept = async { Link::accept(&listener).await?.shake(theirs, limits).await };
        tokio::join!(connect, accept)
    }

    #[tokio::test]
    async fn messages_pass_both_ways_and_the_end_is_an_end() {
        let (dealer, router) = pair(SocketType::Dealer, SocketType::Router).await;
        let (mut dealer, mut router) = (dealer.unwrap(), router.unwrap());
        let parts = vec![Bytes::new(), Bytes::from(vec![1; 500])];
        dealer.send(&parts).await.unwrap();
        assert_eq!(router.recv().await.unwrap(), parts);
        router.send(&parts).await.unwrap();
        assert_eq!(dealer.recv().await.unwrap(), parts);
        drop(router);
        assert!(matches!(dealer.recv().await, Err(ZmtpError::Closed)));
    }

    #[tokio::test]
    async fn sockets_that_cannot_talk_say_so() {
        let (sub, dealer) = pair(SocketType::Sub, SocketType::Dealer).await;
        let error = sub.err().unwrap().to_string();
        assert_eq!(error, "a SUB socket cannot talk to a socket of type \"DEALER\"");
        assert!(dealer.is_err());
    }

    #[tokio::test]
    async fn too_long_and_too_many_parts_are_refused() {
        for message in [vec![Bytes::from(vec![0; 600]); 2], vec![Bytes::new(); 4], vec![vec![0; 1001].into()]]
        {
            let (dealer, router) = pair(SocketType::Dealer, SocketType::Router).await;
            let (mut dealer, mut router) = (dealer.unwrap(), router.unwrap());
            dealer.send(&message).await.unwrap();
            assert!(matches!(router.recv().await, Err(ZmtpError::TooLong(..))), "{}", message.len());
        }
    }

    #[tokio::test]
    async fn who_speaks_something_else_is_told_apart() {
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = http.local_addr().unwrap().port();
        let endpoint = Endpoint::Tcp { host: "127.0.0.1".into(), port };
        let serve = async {
            let (mut stream, _) = http.accept().await.unwrap();
            stream
                .write_all(&[b"HTTP/1.1 400 Bad Request\r\n".as_slice(), &[b' '; 64]].concat())
                .await
                .unwrap();
            stream
        };
        let connect = Link::connect(&endpoint, SocketType::Sub, Limits::default(), &AnyAddress);
        let (link, _stream) = tokio::join!(connect, serve);
        assert!(matches!(link, Err(ZmtpError::Protocol(_))));
    }

    #[tokio::test]
    async fn who_says_nothing_is_given_up() {
        let listener = listener().await;
        let Endpoint::Tcp { port, .. } = *listener.endpoint() else { panic!() };
        let silent = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let incoming = Link::accept(&listener).await.unwrap();
        let soon = Duration::from_millis(20);
        let shaken = incoming.shake_within(soon, SocketType::Sub, Limits::default()).await;
        assert!(matches!(shaken, Err(ZmtpError::Handshake)));
        drop(silent);
    }

    #[tokio::test]
    async fn a_ping_is_answered_with_what_it_brought() {
        let (subscriber, publisher) = pair(SocketType::Sub, SocketType::Pub).await;
        let (mut subscriber, mut publisher) = (subscriber.unwrap(), publisher.unwrap());
        publisher.stream.write_all(b"\x04\x09\x04PING\0\x0aab").await.unwrap();
        publisher.send(&[Bytes::from_static(b"topic")]).await.unwrap();
        publisher.send(&[Bytes::from_static(b"more")]).await.unwrap();
        assert_eq!(subscriber.recv().await.unwrap().len(), 1);
        // Written before the next message is read.
        subscriber.recv().await.unwrap();
        let Frame::Command(pong) = publisher.frame(100).await.unwrap() else { panic!() };
        assert_eq!(wire::command(&pong), Some((&b"PONG"[..], &b"ab"[..])));
    }
}
