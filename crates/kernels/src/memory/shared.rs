//! [`SharedBytes`]: bytes that stay as they are, in memory or in a mapped file.

use std::ops::{Deref, Range};
use std::sync::Arc;

use super::{Buffer, MappedFile};

/// Bytes that several owners share and none changes.
#[derive(Clone, Debug)]
pub struct SharedBytes(Place);

#[derive(Clone, Debug)]
enum Place {
    Memory(Arc<Buffer<u8>>, Range<usize>),
    File(Arc<MappedFile>, Range<usize>),
}

impl SharedBytes {
    /// A range of a mapped file; none if it leaves the file.
    pub fn of_file(file: &Arc<MappedFile>, range: Range<usize>) -> Option<Self> {
        file.get(range.clone())?;
        Some(Self(Place::File(file.clone(), range)))
    }

    /// Some of the bytes; none if the range leaves them.
    pub fn part(&self, range: Range<usize>) -> Option<Self> {
        self.get(range.clone())?;
        let inside = |outer: &Range<usize>| outer.start + range.start..outer.start + range.end;
        Some(Self(match &self.0 {
            Place::Memory(bytes, outer) => Place::Memory(bytes.clone(), inside(outer)),
            Place::File(file, outer) => Place::File(file.clone(), inside(outer)),
        }))
    }

    /// Asks the operating system to bring the bytes into memory, if they stand in a file.
    pub fn will_need(&self) {
        if let Place::File(file, range) = &self.0 {
            file.will_need(range.clone());
        }
    }
}

impl From<Buffer<u8>> for SharedBytes {
    fn from(bytes: Buffer<u8>) -> Self {
        let all = 0..bytes.len();
        Self(Place::Memory(Arc::new(bytes), all))
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Place::Memory(bytes, range) => &bytes[range.clone()],
            Place::File(file, range) => &file[range.clone()],
        }
    }
}
