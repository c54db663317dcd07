//! Memory for the kernels: aligned buffers that are used again instead of returned, and files mapped for reading.

mod buffer;
mod mapped;
mod pool;
mod shared;

pub use buffer::{Buffer, clear, copy};
pub use mapped::MappedFile;
pub use pool::{PoolStatistics, release_pool, statistics};
pub use shared::SharedBytes;
