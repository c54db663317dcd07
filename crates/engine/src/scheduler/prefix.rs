//! A tree of what was read: sequences that begin alike find the keys and values of their common beginning here.
//!
//! A node stands for the tokens of one page behind those of its parent. What it holds is a session that has read them, most
//! often one that went further and serves the nodes below too; a session's pages are shared by all who go on from it.
//! Leaves that nobody asked for longest are given up first.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use super::pages::Paged;
use crate::Session;

type NodeId = u64;

struct Node<'m> {
    parent: Option<NodeId>,
    /// The page's tokens; empty at a root.
    run: Box<[u32]>,
    children: HashMap<Box<[u32]>, NodeId>,
    /// A session that has read the node's tokens, perhaps more; none at a root.
    held: Option<Rc<RefCell<Paged<'m>>>>,
    /// Pages from the root to here.
    depth: usize,
    used: u64,
}

impl Node<'_> {
    fn serves(&self) -> bool {
        self.held.as_ref().is_some_and(|held| held.borrow().can_go_back(self.depth))
    }
}

/// The tree, with a root for each tenant: nobody learns from the time that an answer takes what others have asked.
#[derive(Default)]
pub(super) struct PrefixTree<'m> {
    nodes: HashMap<NodeId, Node<'m>>,
    roots: HashMap<u64, NodeId>,
    /// Nodes without children, those that were not used for the longest time first.
    leaves: BTreeSet<(u64, NodeId)>,
    clock: u64,
}

impl<'m> PrefixTree<'m> {
    /// Pages of `tokens` that the tree has, from the beginning.
    pub(super) fn covered(&self, tenant: u64, tokens: &[u32]) -> usize {
        let Some(root) = self.roots.get(&tenant) else { return 0 };
        let (mut node, mut pages) = (&self.nodes[root], 0);
        for run in tokens.chunks_exact(Session::BLOCK) {
            let Some(child) = node.children.get(run) else { break };
            node = &self.nodes[child];
            if node.serves() {
                pages = node.depth;
            }
        }
        pages
    }

    /// A session that has read the longest known beginning of `tokens`, in whole pages; `None` if there is none.
    pub(super) fn find(&mut self, tenant: u64, tokens: &[u32]) -> Option<Paged<'m>> {
        let mut id = *self.roots.get(&tenant)?;
        for run in tokens.chunks_exact(Session::BLOCK) {
            let Some(&child) = self.nodes[&id].children.get(run) else { break };
            id = child;
        }
        // A session with a state that cannot go back serves only the node where it is.
        while !self.nodes[&id].serves() {
            id = self.nodes[&id].parent?;
        }
        self.touch(id);
        let node = &self.nodes[&id];
        node.held.as_ref().map(|held| held.borrow().fork(node.depth))
    }

    /// Keeps the whole pages of what a session has read.
    pub(super) fn insert(&mut self, tenant: u64, read: &Paged<'m>) {
        let tokens = read.session.tokens();
        if read.whole_pages() <= self.covered(tenant, tokens) || !read.can_go_back(read.whole_pages()) {
            return;
        }
        let held = Rc::new(RefCell::new(read.fork(read.whole_pages())));
        let mut id = match self.roots.get(&tenant) {
            Some(&root) => root,
            None => {
                let root = self.add(None, Box::default(), None, 0);
                self.roots.insert(tenant, root);
                root
            }
        };
        for (page, run) in tokens.chunks_exact(Session::BLOCK).enumerate() {
            id = match self.nodes[&id].children.get(run) {
                Some(&child) => child,
                None => self.add(Some(id), run.into(), Some(held.clone()), page + 1),
            };
        }
        self.touch(id);
    }

    /// Gives up the leaf that was not used for the longest time; false if there is none.
    pub(super) fn evict(&mut self) -> bool {
        let Some((_, id)) = self.leaves.pop_first() else { return false };
        let node = self.nodes.remove(&id).expect("a leaf is a node");
        match node.parent {
            None => self.roots.retain(|_, root| *root != id),
            Some(parent_id) => {
                let parent = self.nodes.get_mut(&parent_id).expect("a node's parent");
                parent.children.remove(&node.run);
                // The session served this leaf; if it serves the parent too, it goes back to there.
                if let (Some(held), Some(above)) = (&node.held, &parent.held)
                    && Rc::ptr_eq(held, above)
                {
                    let can = held.borrow().can_go_back(parent.depth);
                    if can { held.borrow_mut().keep(parent.depth) } else { parent.held = None }
                }
                if parent.children.is_empty() {
                    self.leaves.insert((parent.used, parent_id));
                }
            }
        }
        true
    }

    fn add(
        &mut self,
        parent: Option<NodeId>,
        run: Box<[u32]>,
        held: Option<Rc<RefCell<Paged<'m>>>>,
        depth: usize,
    ) -> NodeId {
        self.clock += 1;
        let id = self.clock;
        if let Some(parent_id) = parent {
            let parent = self.nodes.get_mut(&parent_id).expect("a node's parent");
            self.leaves.remove(&(parent.used, parent_id));
            parent.children.insert(run.clone(), id);
        }
        self.nodes.insert(id, Node { parent, run, children: HashMap::new(), held, depth, used: self.clock });
        self.leaves.insert((self.clock, id));
        id
    }

    /// A node and all above it are of use now.
    fn touch(&mut self, id: NodeId) {
        self.clock += 1;
        let mut next = Some(id);
        while let Some(id) = next {
            let node = self.nodes.get_mut(&id).expect("a node");
            let before = std::mem::replace(&mut node.used, self.clock);
            next = node.parent;
            if self.leaves.remove(&(before, id)) {
                self.leaves.insert((self.clock, id));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pages::{Gauge, pages_for};
    use super::*;
    use crate::testing::small_model;
    use moebius_kernels::gemm::Precision;
    use moebius_model::Silent;

    const PAGE: usize = Session::BLOCK;
    const BYTES: usize = 1000;

    fn read<'m>(start: Paged<'m>, tokens: &[u32]) -> Paged<'m> {
        let mut paged = start;
        let rest = &tokens[paged.session.position()..];
        paged.reserve(rest.len());
        paged.session.read(rest, &mut Silent).unwrap();
        paged
    }

    fn text(seed: u32, length: usize) -> Vec<u32> {
        (0..length as u32).map(|i| (i * 7 + seed * 13) % 256).collect()
    }

    #[test]
    fn a_common_beginning_is_held_once_and_gives_the_same_logits() {
        let model = small_model(4 * PAGE + 10);
        let gauge = Gauge::default();
        let fresh = || Paged::new(Session::new(&model, Precision::Bf16), BYTES, &gauge);
        let mut tree = PrefixTree::default();
        let first = text(1, 3 * PAGE + 5);
        let mut second = first.clone();
        second[2 * PAGE + 3] += 1;
        assert!(tree.find(0, &first).is_none());
        let read_first = read(fresh(), &first);
        tree.insert(0, &read_first);
        assert_eq!(gauge.bytes(), 4 * BYTES, "three whole pages and one begun");
        drop(read_first);
        assert_eq!((gauge.bytes(), tree.covered(0, &first), tree.covered(0, &second)), (3 * BYTES, 3, 2));
        assert_eq!(tree.covered(1, &first), 0, "another tenant knows nothing");

        let mut shared = tree.find(0, &second).unwrap();
        assert_eq!(shared.session.position(), 2 * PAGE);
        assert_eq!(gauge.bytes(), 3 * BYTES, "a fork costs nothing");
        shared.reserve(PAGE + 5);
        let logits = shared.session.read(&second[2 * PAGE..], &mut Silent).unwrap();
        assert_eq!(logits, fresh().session.read(&second, &mut Silent).unwrap());
        tree.insert(0, &shared);
        drop(shared);
        assert_eq!(gauge.bytes(), 4 * BYTES, "two in common and one each");
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_frees_its_pages() {
        let model = small_model(4 * PAGE + 10);
        let gauge = Gauge::default();
        let fresh = || Paged::new(Session::new(&model, Precision::Bf16), BYTES, &gauge);
        let mut tree = PrefixTree::default();
        let (old, new) = (text(1, 2 * PAGE), text(2, 3 * PAGE));
        for tokens in [&old, &new] {
            tree.insert(0, &read(fresh(), tokens));
        }
        drop(tree.find(0, &old));
        assert_eq!(gauge.bytes(), 5 * BYTES);
        assert!(tree.evict());
        assert_eq!((gauge.bytes(), tree.covered(0, &new), tree.covered(0, &old)), (4 * BYTES, 2, 2));
        let running = tree.find(0, &old).unwrap();
        while tree.evict() {}
        assert_eq!(gauge.bytes(), pages_for(2 * PAGE) * BYTES, "who runs keeps what it reads");
        drop(running);
        assert_eq!((gauge.bytes(), tree.nodes.len(), tree.roots.len()), (0, 0, 0));
    }
}
