//! The answer of two workers that share a request: the decode worker's, while the prefill worker's is
//! read to its end beside it and thrown away.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::UpstreamBody;
use crate::disagg::logprobs::InEvents;
use crate::http::queue::Held;

/// A prefill worker's answer, read for its end: until then its load is booked, and its request would be
/// aborted by whoever closed the connection.
#[derive(Debug)]
pub(in crate::http) struct Drain {
    body: UpstreamBody,
    /// Booked until the end.
    _booking: Held,
    /// What was read, if somebody wants it.
    kept: Option<Vec<u8>>,
    most: usize,
}

/// Why an answer was not read to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::http) enum Undrained {
    /// It broke off.
    Broken,
    /// It is longer than anybody keeps.
    TooLong,
}

impl Drain {
    /// Of this answer. Of one that is kept there may be so many bytes.
    pub(in crate::http) fn new(body: UpstreamBody, booking: Held, keep: Option<usize>) -> Self {
        Self { body, _booking: booking, kept: keep.map(|_| Vec::new()), most: keep.unwrap_or(usize::MAX) }
    }

    /// Ready with its end, and with what was kept.
    pub(in crate::http) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<Vec<u8>, Undrained>> {
        loop {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let (Some(kept), Some(data)) = (&mut self.kept, frame.data_ref()) {
                        if kept.len() + data.len() > self.most {
                            return Poll::Ready(Err(Undrained::TooLong));
                        }
                        kept.extend_from_slice(data);
                    }
                }
                Some(Err(_)) => return Poll::Ready(Err(Undrained::Broken)),
                None => return Poll::Ready(Ok(self.kept.take().unwrap_or_default())),
            }
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(in crate::http) struct PairBody {
    /// Read already.
    first: Option<Bytes>,
    decode: UpstreamBody,
    drain: Option<Drain>,
    /// Puts what the prefill worker knows of the prompt into each event.
    merging: Option<InEvents>,
}

impl PairBody {
    /// Begins with `first`, which was read already.
    pub(in crate::http) fn begin(
        first: Option<Bytes>,
        decode: UpstreamBody,
        drain: Option<Drain>,
        merging: Option<InEvents>,
    ) -> UpstreamBody {
        UpstreamBody::Pair(Box::new(Self { first, decode, drain, merging }))
    }

    pub(super) fn is_chunked(&self) -> bool {
        self.decode.is_chunked()
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(drain) = &mut self.drain
            && drain.poll_end(cx).is_ready()
        {
            // However it ended: the decode worker has what it needs, it has begun to answer.
            self.drain = None;
        }
        loop {
            let piece = match self.first.take() {
                Some(first) => Some(Ok(Frame::data(first))),
                None => ready!(Pin::new(&mut self.decode).poll_frame(cx)),
            };
            let Some(merging) = &mut self.merging else { return Poll::Ready(piece) };
            let merged = match piece {
                Some(Ok(frame)) => frame.data_ref().map(|data| merging.push(data)).unwrap_or_default(),
                None => merging.finish(),
                failed => return Poll::Ready(failed),
            };
            let is_over = self.decode.is_end_stream() && merged.is_empty();
            if !merged.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(merged))));
            }
            if is_over {
                return Poll::Ready(None);
            }
        }
    }

    pub(super) fn is_end(&self) -> bool {
        self.first.is_none() && self.merging.is_none() && self.decode.is_end_stream()
    }

    pub(super) fn size(&self) -> SizeHint {
        if self.merging.is_some() {
            return SizeHint::default();
        }
        let first = self.first.as_ref().map_or(0, |first| first.len() as u64);
        let rest = self.decode.size_hint();
        let mut hint = SizeHint::default();
        hint.set_lower(rest.lower() + first);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + first);
        }
        hint
    }
}
