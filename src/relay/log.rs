//! A stream's events as one process has them: a window of the last ones, and the journal of all,
//! from which another process can tell where generation stands.

use std::collections::VecDeque;

use bytes::Bytes;

/// One event.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Event {
    /// What the client gets, without id and without the blank line at its end.
    pub lines: Bytes,
    /// What it says of the generation's state; see [`crate::splice`].
    pub journal: Bytes,
    /// No event comes after it.
    pub terminal: bool,
}

/// Shorter slices are copied to be kept.
const SHORT: usize = 4 << 10;

/// The same bytes, to be kept. What was read from a connection is a slice of its buffer, of 8 KiB and
/// more, all of which is there for as long as the slice is, and which no bound counts; so short ones
/// get memory of their own.
pub fn kept(bytes: Bytes) -> Bytes {
    if bytes.len() < SHORT { Bytes::copy_from_slice(&bytes) } else { bytes }
}

impl Event {
    /// Memory that it takes.
    pub fn bytes(&self) -> usize {
        self.lines.len() + self.journal.len() + size_of::<Self>()
    }
}

/// Most bytes of journal that are kept of events outside the window. A stream beyond that cannot be
/// continued.
pub const MOST_JOURNAL: usize = 4 << 20;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Log {
    first: u64,
    events: VecDeque<Event>,
    bytes: usize,
    journal: Vec<u8>,
    journal_cut: bool,
    ended: bool,
}

impl Log {
    /// A log that begins with event `first`, before which `journal` was.
    pub fn after(first: u64, journal: &[u8]) -> Self {
        Self {
            first,
            journal: journal.to_vec(),
            journal_cut: journal.len() > MOST_JOURNAL,
            ..Self::default()
        }
    }

    /// Number of the first event in the window.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Number that the next event gets.
    pub fn next(&self) -> u64 {
        self.first + self.events.len() as u64
    }

    /// Whether the terminal event is there.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Memory that it takes.
    pub fn bytes(&self) -> usize {
        self.bytes + self.journal.len()
    }

    /// Bytes in the window.
    pub fn window(&self) -> usize {
        self.bytes
    }

    /// Adds an event. Nothing comes after the terminal one.
    pub fn push(&mut self, event: Event) {
        if self.ended {
            return;
        }
        let event = Event { lines: kept(event.lines), journal: kept(event.journal), ..event };
        self.bytes += event.bytes();
        self.ended = event.terminal;
        self.events.push_back(event);
    }

    /// One event of the window.
    pub fn get(&self, seq: u64) -> Option<&Event> {
        self.events.get(usize::try_from(seq.checked_sub(self.first)?).ok()?)
    }

    /// Forgets the events from `from` on, as if they had not been. False where some of those before it
    /// are not in the window.
    pub fn cut(&mut self, from: u64) -> bool {
        if from < self.first {
            return false;
        }
        while self.next() > from {
            let Some(event) = self.events.pop_back() else { break };
            self.bytes -= event.bytes();
            self.ended = false;
        }
        true
    }

    /// Forgets the first events until the window has at most `bytes`, but none from `keep` on.
    pub fn trim(&mut self, bytes: usize, keep: u64) {
        while self.bytes > bytes && self.first < keep {
            let Some(event) = self.events.pop_front() else { return };
            self.first += 1;
            self.bytes -= event.bytes();
            if self.journal.len() + event.journal.len() + 4 > MOST_JOURNAL {
                self.journal_cut = true;
                continue;
            }
            put(&mut self.journal, &event.journal);
        }
    }

    /// The journal of the events before the window, for [`Log::after`]; `None` where not all of it
    /// was kept.
    pub fn old_journal(&self) -> Option<&[u8]> {
        (!self.journal_cut).then_some(self.journal.as_slice())
    }

    /// The journal of all events, in order; `None` where not all of it was kept.
    pub fn journal(&self) -> Option<impl Iterator<Item = &[u8]>> {
        let old = entries(self.old_journal()?);
        Some(old.chain(self.events.iter().map(|event| event.journal.as_ref())))
    }
}

fn put(journal: &mut Vec<u8>, entry: &[u8]) {
    // An entry is a part of an event, which is bounded far below 4 GiB.
    journal.extend_from_slice(&(entry.len() as u32).to_le_bytes());
    journal.extend_from_slice(entry);
}

fn entries(mut journal: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = journal.split_first_chunk::<4>()?;
        let (entry, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        journal = rest;
        Some(entry)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> Event {
        Event { lines: text.to_owned().into(), journal: format!("j{text}").into(), terminal: text == "end" }
    }

    #[test]
    fn what_is_kept_does_not_keep_the_buffer_that_it_was_read_into() {
        let read = Bytes::from(vec![b'x'; 16 << 10]);
        let mut log = Log::default();
        log.push(Event { lines: read.slice(5..105), journal: read.slice(200..210), terminal: false });
        assert!(read.is_unique(), "a slice of it is kept");
        assert_eq!((log.get(0).unwrap().lines.len(), log.get(0).unwrap().journal.len()), (100, 10));
        // What is most of a buffer is not worth a copy.
        log.push(Event { lines: read.slice(..SHORT), ..Event::default() });
        assert!(!read.is_unique());
    }

    #[test]
    fn what_leaves_the_window_stays_in_the_journal() {
        let mut log = Log::default();
        (0..10).for_each(|n| log.push(event(&n.to_string())));
        let each = event("0").bytes();
        assert_eq!((log.window(), log.first(), log.next()), (10 * each, 0, 10));
        log.trim(4 * each, 3);
        assert_eq!((log.first(), log.window()), (3, 7 * each), "not what somebody still reads");
        log.trim(4 * each, 10);
        assert_eq!((log.first(), log.get(5), log.get(6)), (6, None, Some(&event("6"))));
        let all: Vec<Vec<u8>> = log.journal().unwrap().map(<[u8]>::to_vec).collect();
        assert_eq!(all, (0..10).map(|n| format!("j{n}").into_bytes()).collect::<Vec<_>>());
        let other = Log::after(log.first(), log.old_journal().unwrap());
        assert_eq!((other.next(), other.journal().unwrap().count()), (6, 6));
        log.push(event("end"));
        log.push(event("more"));
        assert_eq!((log.next(), log.ended()), (11, true));
    }

    #[test]
    fn what_is_cut_off_at_the_end_had_never_been() {
        let mut log = Log::default();
        (0..5).for_each(|n| log.push(event(&n.to_string())));
        let bytes = log.bytes();
        log.push(event("end"));
        assert!(log.ended() && log.cut(5));
        assert_eq!((log.ended(), log.next(), log.bytes()), (false, 5, bytes));
        log.trim(0, 3);
        assert!(!log.cut(2) && log.cut(3));
        assert_eq!((log.first(), log.next(), log.journal().unwrap().count()), (3, 3, 3));
        log.push(event("x"));
        assert_eq!(log.get(3), Some(&event("x")));
    }

    #[test]
    fn a_journal_that_grows_too_long_is_none() {
        let mut log = Log::default();
        for _ in 0..3 {
            log.push(Event { journal: vec![0; MOST_JOURNAL / 2].into(), ..event("x") });
        }
        assert!(log.journal().is_some());
        log.trim(0, 3);
        assert!(log.journal().is_none() && log.old_journal().is_none());
    }
}
