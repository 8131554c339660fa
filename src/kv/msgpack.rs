//! A reader of MessagePack that borrows, for events that come a million a second.
//!
//! Bytes in, values out, nothing allocated. Every length is checked against the bytes that are
//! left before anything is done with it, and nesting is bounded, so that no input makes it take
//! memory or stack beyond its own size.

use rmp::Marker;

/// Deepest nesting that is skipped. Events nest four levels.
const MAX_DEPTH: u32 = 32;

/// Why bytes could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unreadable {
    /// The bytes end in the middle of a value.
    #[error("it ends in the middle of a value")]
    Short,
    /// A value is of another type than the format has at this place.
    #[error("a value is of the wrong type")]
    Type,
    /// Lists in lists in lists.
    #[error("it is nested deeper than {MAX_DEPTH} levels")]
    Depth,
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
        Ok(match Marker::from_u8(marker) {
            Marker::Null => Value::Nil,
            Marker::False => Value::Bool(false),
            Marker::True => Value::Bool(true),
            Marker::FixPos(number) => positive(u64::from(number)),
            Marker::U8 => positive(u64::from(u8::from_be_bytes(self.fixed()?))),
            Marker::U16 => positive(u64::from(u16::from_be_bytes(self.fixed()?))),
            Marker::U32 => positive(u64::from(u32::from_be_bytes(self.fixed()?))),
            Marker::U64 => positive(u64::from_be_bytes(self.fixed()?)),
            Marker::FixNeg(number) => signed(i64::from(number)),
            Marker::I8 => signed(i64::from(i8::from_be_bytes(self.fixed()?))),
            Marker::I16 => signed(i64::from(i16::from_be_bytes(self.fixed()?))),
            Marker::I32 => signed(i64::from(i32::from_be_bytes(self.fixed()?))),
            Marker::I64 => signed(i64::from_be_bytes(self.fixed()?)),
            Marker::F32 => Value::Float(f64::from(f32::from_be_bytes(self.fixed()?))),
            Marker::F64 => Value::Float(f64::from_be_bytes(self.fixed()?)),
            Marker::FixStr(length) => Value::Text(self.take(usize::from(length))?),
            Marker::Str8 => Value::Text(self.sized(1)?),
            Marker::Str16 => Value::Text(self.sized(2)?),
            Marker::Str32 => Value::Text(self.sized(4)?),
            Marker::Bin8 => Value::Bytes(self.sized(1)?),
            Marker::Bin16 => Value::Bytes(self.sized(2)?),
            Marker::Bin32 => Value::Bytes(self.sized(4)?),
            Marker::FixArray(count) => Value::List(self.fits(usize::from(count), 1)?),
            Marker::Array16 => Value::List(self.count(2, 1)?),
            Marker::Array32 => Value::List(self.count(4, 1)?),
            Marker::FixMap(count) => Value::Map(self.fits(usize::from(count), 2)?),
            Marker::Map16 => Value::Map(self.count(2, 2)?),
            Marker::Map32 => Value::Map(self.count(4, 2)?),
            Marker::FixExt1 => Value::Other(self.take(2)?),
            Marker::FixExt2 => Value::Other(self.take(3)?),
            Marker::FixExt4 => Value::Other(self.take(5)?),
            Marker::FixExt8 => Value::Other(self.take(9)?),
            Marker::FixExt16 => Value::Other(self.take(17)?),
            Marker::Ext8 => self.extension(1)?,
            Marker::Ext16 => self.extension(2)?,
            Marker::Ext32 => self.extension(4)?,
            Marker::Reserved => return Err(Unreadable::Type),
        })
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
        self.skip_at(0)?;
        Ok(&start[..start.len() - self.0.len()])
    }

    fn skip_at(&mut self, depth: u32) -> Result<(), Unreadable> {
        if depth > MAX_DEPTH {
            return Err(Unreadable::Depth);
        }
        let inside = match self.value()? {
            Value::List(count) => count,
            // No more pairs than half the bytes: it cannot overflow.
            Value::Map(count) => count * 2,
            _ => return Ok(()),
        };
        (0..inside).try_for_each(|_| self.skip_at(depth + 1))
    }
}

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
    fn skipping_knows_where_a_value_ends_and_how_deep_is_too_deep() {
        let mut reader = Reader::new(&[0x82, 0xa1, b'a', 0x92, 1, 2, 0xa1, b'b', 0xc0, 7]);
        assert_eq!(reader.skip().unwrap().len(), 9);
        assert_eq!(reader.value(), Ok(Value::Int { bits: 7, negative: false }));
        assert_eq!(Reader::new(&[0x91; 100]).skip(), Err(Unreadable::Depth));
    }
}
