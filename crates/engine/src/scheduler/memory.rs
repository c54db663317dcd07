//! Which tokens go into a step: who decodes first, then prompts in the order in which they came, as far as rows and memory go.

use std::collections::{HashMap, HashSet};

use moebius_model::Model;

use super::SchedulerOptions;
use super::pages::{Gauge, Paged};
use super::prefix::PrefixTree;
use super::sequence::Sequence;
use crate::{Session, Wanted};

/// Keys and values of all sequences, and of beginnings that are kept.
pub(super) struct Memory<'m> {
    model: &'m Model,
    options: SchedulerOptions,
    page_bytes: usize,
    gauge: Gauge,
    pub(super) tree: PrefixTree<'m>,
}

/// What a sequence reads in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// Its place among the sequences that run.
    pub(super) index: usize,
    /// How many tokens.
    pub(super) tokens: usize,
    pub(super) wanted: Wanted,
}

/// What a step consists of.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub(super) shares: Vec<Share>,
    /// Sequences whose memory was taken away.
    pub(super) yielded: usize,
    /// Tokens that need not be read, for others have.
    pub(super) adopted: usize,
    /// A sequence that runs alone and has no memory left to go on.
    pub(super) full: Option<usize>,
}

impl<'m> Memory<'m> {
    pub(super) fn new(model: &'m Model, options: &SchedulerOptions, page_bytes: usize, gauge: &Gauge) -> Self {
        let (options, gauge) = (options.clone(), gauge.clone());
        Self { model, options, page_bytes, gauge, tree: PrefixTree::default() }
    }

    /// A session for a prompt: what is known of it, `shares` permitting. `None` where those that run need the memory.
    pub(super) fn admit(
        &mut self,
        running: &[Sequence<'m>],
        tenant: u64,
        prompt: &[u32],
        shares: bool,
    ) -> Option<Paged<'m>> {
        // The last token is read in any case: the text begins with the logits behind it.
        let known = &prompt[..prompt.len() - 1];
        let found = if shares && self.options.share_prefixes { self.tree.find(tenant, known) } else { None };
        let paged = found.unwrap_or_else(|| self.fresh());
        let needed = paged.bytes_for(prompt.len() - paged.session.position());
        let mut held = HashMap::new();
        running.iter().map(|sequence| &sequence.paged).chain([&paged]).for_each(|paged| paged.list(&mut held));
        let needed = needed + running.iter().map(|other| other.paged.bytes_for(other.unread())).sum::<usize>();
        let fits = held.values().sum::<usize>() + needed <= self.options.cache_bytes;
        (fits || running.is_empty()).then_some(paged)
    }

    /// Chooses what is read next, and sees to the memory for it. Sequences stand in the order in which they began.
    pub(super) fn compose(&mut self, running: &mut [Sequence<'m>]) -> Step {
        let mut step = Step::default();
        let mut left = self.options.step_tokens.max(self.options.most_running).max(1);
        for index in 0..running.len() {
            if running[index].is_decoding() {
                left -= self.choose(running, index, left, &mut step);
            }
        }
        // Pages that are being read in this step: who needs the same ones waits for them.
        let mut reading = HashSet::new();
        for (index, most) in prompts(running, left) {
            step.adopted += self.adopt(&mut running[index]);
            if !self.is_being_read(&running[index], &mut reading) {
                left -= self.choose(running, index, most.min(left), &mut step);
            }
        }
        if step.shares.is_empty() && !running.is_empty() {
            // Even the first, which may take the memory of all others, has too little.
            step.full = Some(0);
        }
        step.shares.sort_by_key(|share| share.index);
        step
    }

    /// Has a sequence read up to `most` tokens in this step, if there is memory; gives how many.
    fn choose(&mut self, running: &mut [Sequence<'m>], index: usize, most: usize, step: &mut Step) -> usize {
        if most == 0 {
            return 0;
        }
        let (tokens, wanted) = chunk(&running[index], most);
        if !self.make_room(running, index, tokens, step) {
            return 0;
        }
        running[index].paged.reserve(tokens);
        step.shares.push(Share { index, tokens, wanted });
        tokens
    }

    /// Keeps what a sequence has read, for those that begin alike. Texts that are only embedded are not written on.
    pub(super) fn keep(&mut self, sequence: &Sequence<'m>) {
        if self.options.share_prefixes && sequence.writes() {
            self.tree.insert(sequence.tenant, &sequence.paged);
        }
    }

    /// Forgets everything that no sequence holds.
    pub(super) fn clear(&mut self) {
        self.tree = PrefixTree::default();
    }

    fn fresh(&self) -> Paged<'m> {
        Paged::new(Session::new(self.model, self.options.precision), self.page_bytes, &self.gauge)
    }

    /// Takes over what another sequence has read meanwhile; gives the number of tokens.
    fn adopt(&mut self, sequence: &mut Sequence<'m>) -> usize {
        if !self.options.share_prefixes || !sequence.shares() {
            return 0;
        }
        let known = &sequence.tokens[..sequence.tokens.len() - 1];
        let position = sequence.paged.session.position();
        let covered = self.tree.covered(sequence.tenant, known) * Session::BLOCK;
        if covered <= position {
            return 0;
        }
        let Some(paged) = self.tree.find(sequence.tenant, known) else { return 0 };
        sequence.paged = paged;
        sequence.adopted(covered - position);
        covered - position
    }

    /// Whether another sequence of this step reads the page that this one would read next; if not, it does so now.
    fn is_being_read(&self, sequence: &Sequence<'m>, reading: &mut HashSet<(u64, Vec<u32>)>) -> bool {
        let end = (sequence.paged.whole_pages() + 1) * Session::BLOCK;
        if !self.options.share_prefixes || !sequence.shares() || sequence.tokens.len() <= end {
            return false;
        }
        !reading.insert((sequence.tenant, sequence.tokens[..end].to_vec()))
    }

    /// Sees to it that a sequence can read tokens: beginnings that were kept go first, then the memory of sequences that
    /// began later.
    fn make_room(&mut self, running: &mut [Sequence<'m>], index: usize, tokens: usize, step: &mut Step) -> bool {
        let needed = running[index].paged.bytes_for(tokens);
        let fits = |gauge: &Gauge| gauge.bytes() + needed <= self.options.cache_bytes;
        while needed > 0 && !fits(&self.gauge) {
            if self.tree.evict() {
                continue;
            }
            let Some(last) = (index + 1..running.len()).rev().find(|&other| running[other].paged.holds_any()) else {
                return false;
            };
            running[last].paged = self.fresh();
            step.shares.retain(|share| share.index != last);
            step.yielded += 1;
        }
        true
    }
}

/// Sequences that read prompts, each with the most tokens that it may read: the oldest comes first and has half of the rows,
/// or all that the others do not need; then the others, those first that are done soonest.
fn prompts(running: &[Sequence], rows: usize) -> Vec<(usize, usize)> {
    let mut others: Vec<(usize, usize)> = (running.iter().enumerate())
        .filter(|(_, sequence)| !sequence.is_decoding())
        .map(|(index, sequence)| (index, sequence.unread()))
        .collect();
    if others.is_empty() {
        return others;
    }
    let (oldest, _) = others.remove(0);
    let needed: usize = others.iter().map(|(_, unread)| unread).sum();
    others.sort_by_key(|&(index, unread)| (unread, index));
    let first = (oldest, rows.saturating_sub(needed).max(rows / 2));
    std::iter::once(first).chain(others).collect()
}

/// How many tokens a sequence reads of `left`: a part of a prompt ends with a page, so that others can use all of it.
fn chunk(sequence: &Sequence, left: usize) -> (usize, Wanted) {
    let (tokens, wanted) = sequence.wants(left);
    let end = sequence.paged.session.position() + tokens;
    let over = end % Session::BLOCK;
    if tokens < sequence.unread() && over < tokens {
        return sequence.wants(tokens - over);
    }
    (tokens, wanted)
}
