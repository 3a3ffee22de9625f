//! Bytes of a fuzzer as numbers and choices. An input that has ended goes on with zeros.

/// What is left of an input.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// At most so many bytes.
    pub(crate) fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.iter_mut().zip(self.take(N)).for_each(|(to, from)| *to = *from);
        bytes
    }
    pub(crate) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }
    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
    /// A byte as a number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u8) -> u32 {
        u32::from(self.u8() % end)
    }
    /// An index of a slice of `len` elements; none if there are none.
    pub(crate) fn index(&mut self, len: usize) -> Option<usize> {
        usize::from(self.u8()).checked_rem(len)
    }
    pub(crate) fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }
}
