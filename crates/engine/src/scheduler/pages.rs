//! Pages: the memory of keys and values, counted in blocks of positions that several sequences may hold together.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Session;

/// Bytes of all pages that somebody holds, however many hold each.
#[derive(Clone, Debug, Default)]
pub(super) struct Gauge(Arc<AtomicUsize>);

impl Gauge {
    pub(super) fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn page(&self, bytes: usize) -> Arc<Page> {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Arc::new(Page { bytes, gauge: self.clone() })
    }
}

/// [`Session::BLOCK`] positions of a sequence in all layers.
#[derive(Debug)]
struct Page {
    bytes: usize,
    gauge: Gauge,
}

impl Drop for Page {
    fn drop(&mut self) {
        self.gauge.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A session with the pages that it holds.
pub(super) struct Paged<'m> {
    pub(super) session: Session<'m>,
    pages: Vec<Arc<Page>>,
    page_bytes: usize,
    gauge: Gauge,
}

/// Pages that positions need.
pub(super) fn pages_for(positions: usize) -> usize {
    positions.div_ceil(Session::BLOCK)
}

impl<'m> Paged<'m> {
    /// An empty session; `page_bytes` is what [`Session::BLOCK`] positions take.
    pub(super) fn new(session: Session<'m>, page_bytes: usize, gauge: &Gauge) -> Self {
        Self { session, pages: Vec::new(), page_bytes, gauge: gauge.clone() }
    }

    /// Whether the session can go back to the end of that many pages: one with a state that holds only where it is cannot.
    pub(super) fn can_go_back(&self, pages: usize) -> bool {
        let positions = pages * Session::BLOCK;
        positions == self.session.position() || self.session.earliest() <= positions
    }

    /// A session that has read the first `pages` pages of this one and shares them.
    pub(super) fn fork(&self, pages: usize) -> Self {
        let mut session = self.session.clone();
        session.rewind(pages * Session::BLOCK);
        let pages = self.pages[..pages_for(session.position())].to_vec();
        Self { session, pages, page_bytes: self.page_bytes, gauge: self.gauge.clone() }
    }

    /// Forgets all but the first `pages` pages.
    pub(super) fn keep(&mut self, pages: usize) {
        let left = self.session.rewind(pages * Session::BLOCK);
        self.pages.truncate(pages_for(left));
    }

    /// Counts the pages for further tokens, before they are read.
    pub(super) fn reserve(&mut self, tokens: usize) {
        while self.pages.len() < pages_for(self.session.position() + tokens) {
            self.pages.push(self.gauge.page(self.page_bytes));
        }
    }

    /// Bytes that further tokens will take.
    pub(super) fn bytes_for(&self, tokens: usize) -> usize {
        pages_for(self.session.position() + tokens).saturating_sub(self.pages.len()) * self.page_bytes
    }

    /// Adds the pages it holds to a set, each with its bytes.
    pub(super) fn list(&self, pages: &mut HashMap<*const (), usize>) {
        pages.extend(self.pages.iter().map(|page| (Arc::as_ptr(page).cast(), page.bytes)));
    }

    pub(super) fn holds_any(&self) -> bool {
        !self.pages.is_empty()
    }

    /// Whole pages that were read.
    pub(super) fn whole_pages(&self) -> usize {
        self.session.position() / Session::BLOCK
    }
}
