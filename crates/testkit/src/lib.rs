//! What several crates' tests share. Unpublished.
#![forbid(unsafe_code)]

/// A thread pool of `n` threads, for tests that compare bits between thread counts.
pub fn threads(n: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("a thread pool")
}
