//! A reader of MessagePack that borrows, for events that come a million a second.
//!
//! Bytes in, values out, nothing allocated and nothing recursive. Every length is checked against
//! the bytes that are left before anything is done with it, so that no input makes it take memory,
//! stack or time beyond its own size.

/// Why bytes could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unreadable {
    /// The bytes end in the middle of a value.
    #[error("it ends in the middle of a value")]
    Short,
    /// A value is of another type than the format has at this place.
    #[error("a value is of the wrong type")]
    Type,
}

/// A value; lists and maps only announce how many values follow.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value<'a> {
    /// Nothing.
    Nil,
    /// True or false.
    Bool(bool),
    /// An integer, its bits: what was negative is its two's complement.
    Int {
        /// Its 64 bits.
        bits: u64,
        /// Whether it is below zero.
        negative: bool,
    },
    /// A number with a point.
    Float(f64),
    /// A text; whether it is UTF-8 nobody has looked at.
    Text(&'a [u8]),
    /// Bytes.
    Bytes(&'a [u8]),
    /// A list of so many values, which come next.
    List(usize),
    /// So many pairs, which come next.
    Map(usize),
    /// Something of an application's own.
    Other(&'a [u8]),
}

/// The bytes that are still to be read.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// How many bytes are left.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Unreadable> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Unreadable::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], Unreadable> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Unreadable::Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn length(&mut self, width: usize) -> Result<usize, Unreadable> {
        Ok(match width {
            1 => usize::from(u8::from_be_bytes(self.fixed()?)),
            2 => usize::from(u16::from_be_bytes(self.fixed()?)),
            _ => usize::try_from(u32::from_be_bytes(self.fixed()?)).map_err(|_| Unreadable::Short)?,
        })
    }

    /// A list or map cannot have more values than there are bytes left.
    fn count(&mut self, width: usize, least: usize) -> Result<usize, Unreadable> {
        let count = self.length(width)?;
        self.fits(count, least)
    }

    fn fits(&self, count: usize, least: usize) -> Result<usize, Unreadable> {
        if count.saturating_mul(least) > self.0.len() { Err(Unreadable::Short) } else { Ok(count) }
    }

    /// The next value, or the head of a list or map.
    pub fn value(&mut self) -> Result<Value<'a>, Unreadable> {
        let positive = |bits: u64| Value::Int { bits, negative: false };
        let signed = |number: i64| Value::Int { bits: number as u64, negative: number < 0 };
        let [marker] = self.fixed()?;
        Ok(match marker {
            0x00..=0x7f => positive(u64::from(marker)),
            0x80..=0x8f => Value::Map(self.fits(usize::from(marker & 0x0f), 2)?),
            0x90..=0x9f => Value::List(self.fits(usize::from(marker & 0x0f), 1)?),
            0xa0..=0xbf => Value::Text(self.take(usize::from(marker & 0x1f))?),
            0xc0 => Value::Nil,
            0xc1 => return Err(Unreadable::Type),
            0xc2 => Value::Bool(false),
            0xc3 => Value::Bool(true),
            0xc4 => Value::Bytes(self.sized(1)?),
            0xc5 => Value::Bytes(self.sized(2)?),
            0xc6 => Value::Bytes(self.sized(4)?),
            0xc7 => self.extension(1)?,
            0xc8 => self.extension(2)?,
            0xc9 => self.extension(4)?,
            0xca => Value::Float(f64::from(f32::from_be_bytes(self.fixed()?))),
            0xcb => Value::Float(f64::from_be_bytes(self.fixed()?)),
            0xcc => positive(u64::from(u8::from_be_bytes(self.fixed()?))),
            0xcd => positive(u64::from(u16::from_be_bytes(self.fixed()?))),
            0xce => positive(u64::from(u32::from_be_bytes(self.fixed()?))),
            0xcf => positive(u64::from_be_bytes(self.fixed()?)),
            0xd0 => signed(i64::from(i8::from_be_bytes(self.fixed()?))),
            0xd1 => signed(i64::from(i16::from_be_bytes(self.fixed()?))),
            0xd2 => signed(i64::from(i32::from_be_bytes(self.fixed()?))),
            0xd3 => signed(i64::from_be_bytes(self.fixed()?)),
            // One byte of type, then 1, 2, 4, 8 or 16.
            0xd4..=0xd8 => Value::Other(self.take(1 + (1 << (marker - 0xd4)))?),
            0xd9 => Value::Text(self.sized(1)?),
            0xda => Value::Text(self.sized(2)?),
            0xdb => Value::Text(self.sized(4)?),
            0xdc => Value::List(self.count(2, 1)?),
            0xdd => Value::List(self.count(4, 1)?),
            0xde => Value::Map(self.count(2, 2)?),
            0xdf => Value::Map(self.count(4, 2)?),
            0xe0..=0xff => signed(i64::from(marker as i8)),
        })
    }

    /// Reads `count` numbers of 32 bits onto the end of `into`. The short forms that tokens come in
    /// have a short way.
    pub fn numbers(&mut self, count: usize, into: &mut Vec<u32>) -> Result<(), Unreadable> {
        into.reserve(self.fits(count, 1)?);
        for _ in 0..count {
            let number = match *self.0 {
                [small @ 0..=0x7f, ref rest @ ..] => {
                    self.0 = rest;
                    u32::from(small)
                }
                [0xcd, high, low, ref rest @ ..] => {
                    self.0 = rest;
                    u32::from(u16::from_be_bytes([high, low]))
                }
                [0xce, a, b, c, d, ref rest @ ..] => {
                    self.0 = rest;
                    u32::from_be_bytes([a, b, c, d])
                }
                _ => match self.value()? {
                    Value::Int { bits, negative: false } => {
                        u32::try_from(bits).map_err(|_| Unreadable::Type)?
                    }
                    _ => return Err(Unreadable::Type),
                },
            };
            into.push(number);
        }
        Ok(())
    }

    fn sized(&mut self, width: usize) -> Result<&'a [u8], Unreadable> {
        let length = self.length(width)?;
        self.take(length)
    }

    fn extension(&mut self, width: usize) -> Result<Value<'a>, Unreadable> {
        let length = self.length(width)?;
        Ok(Value::Other(self.take(length.checked_add(1).ok_or(Unreadable::Short)?)?))
    }

    /// The head of a list: how many values follow.
    pub fn list(&mut self) -> Result<usize, Unreadable> {
        match self.value()? {
            Value::List(count) => Ok(count),
            _ => Err(Unreadable::Type),
        }
    }

    /// Skips a whole value with all that is in it, and gives its bytes.
    pub fn skip(&mut self) -> Result<&'a [u8], Unreadable> {
        let start = self.0;
        let mut values = 1_usize;
        while values > 0 {
            values -= 1;
            let &[marker, ..] = self.0 else { return Err(Unreadable::Short) };
            let length = usize::from(LENGTHS[usize::from(marker)]);
            if length > 0 {
                self.0 = self.0.get(length..).ok_or(Unreadable::Short)?;
                continue;
            }
            // Never more than there are bytes, so that the sum cannot overflow.
            values += match self.value()? {
                Value::List(count) => count,
                Value::Map(count) => count * 2,
                _ => 0,
            };
        }
        Ok(&start[..start.len() - self.0.len()])
    }
}

/// Bytes of values whose first byte tells their length, with that byte; 0 for all others.
const LENGTHS: [u8; 256] = {
    let mut lengths = [0; 256];
    let mut marker = 0;
    while marker < 256 {
        lengths[marker] = match marker {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => 1,
            0xa0..=0xbf => 1 + (marker as u8 - 0xa0),
            0xcc | 0xd0 => 2,
            0xcd | 0xd1 => 3,
            0xca | 0xce | 0xd2 => 5,
            0xcb | 0xcf | 0xd3 => 9,
            _ => 0,
        };
        marker += 1;
    }
    lengths
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_all_widths_keep_their_bits() {
        fn read(bytes: &[u8]) -> Value<'_> {
            Reader::new(bytes).value().unwrap()
        }
        assert_eq!(read(&[0x7f]), Value::Int { bits: 127, negative: false });
        assert_eq!(read(&[0xe0]), Value::Int { bits: (-32_i64) as u64, negative: true });
        assert_eq!(
            read(&[0xd3, 0x8f, 0x43, 0xaf, 0x17, 0x1e, 0xaf, 0x0c, 0xb2]),
            Value::Int { bits: (-8_123_456_789_012_345_678_i64) as u64, negative: true }
        );
        assert_eq!(read(&[0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0]), Value::Float(1.0));
    }

    #[test]
    fn a_list_that_promises_more_than_there_is_is_refused_at_once() {
        assert_eq!(Reader::new(&[0xdd, 0xff, 0xff, 0xff, 0xff, 1]).value(), Err(Unreadable::Short));
        assert_eq!(Reader::new(&[0xdf, 0x7f, 0xff, 0xff, 0xff, 1]).value(), Err(Unreadable::Short));
        assert_eq!(Reader::new(&[0xc6, 0xff, 0xff, 0xff, 0xff]).value(), Err(Unreadable::Short));
        assert_eq!(Reader::new(&[]).value(), Err(Unreadable::Short));
    }

    #[test]
    fn skipping_knows_where_a_value_ends_however_deep_it_is() {
        let mut reader = Reader::new(&[0x82, 0xa1, b'a', 0x92, 1, 2, 0xa1, b'b', 0xc0, 7]);
        assert_eq!(reader.skip().unwrap().len(), 9);
        assert_eq!(reader.value(), Ok(Value::Int { bits: 7, negative: false }));
        let mut deep = vec![0x91; 1_000_000];
        assert_eq!(Reader::new(&deep).skip(), Err(Unreadable::Short));
        deep.push(0xc0);
        assert_eq!(Reader::new(&deep).skip().unwrap().len(), deep.len());
    }

    #[test]
    fn every_first_byte_is_skipped_as_far_as_it_is_read() {
        for marker in 0..=255 {
            let mut bytes = [1; 64];
            bytes[0] = marker;
            let (mut skipped, mut read) = (Reader::new(&bytes), Reader::new(&bytes));
            let inside = match read.value() {
                Ok(Value::List(count)) => count,
                Ok(Value::Map(count)) => 2 * count,
                Ok(_) => 0,
                Err(why) => {
                    assert_eq!(skipped.skip(), Err(why), "{marker:#x}");
                    continue;
                }
            };
            (0..inside).for_each(|_| assert!(read.value().is_ok()));
            skipped.skip().unwrap();
            assert_eq!(skipped.left(), read.left(), "{marker:#x}");
        }
    }

    #[test]
    fn numbers_are_read_in_all_widths_and_nothing_else_is_a_number() {
        let mut into = vec![9];
        let bytes = [7, 0xcc, 200, 0xcd, 1, 0, 0xce, 0, 1, 0, 0, 0xcf, 0, 0, 0, 0, 0, 0, 0, 5];
        Reader::new(&bytes).numbers(5, &mut into).unwrap();
        assert_eq!(into, [9, 7, 200, 256, 65536, 5]);
        for bytes in [&[0xff][..], &[0xc0], &[0xcf, 1, 0, 0, 0, 0, 0, 0, 0], &[0xcd, 1]] {
            assert!(Reader::new(bytes).numbers(1, &mut into).is_err());
        }
        assert_eq!(Reader::new(&[1]).numbers(2, &mut into), Err(Unreadable::Short));
    }
}
