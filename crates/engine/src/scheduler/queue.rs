//! Who waits: a bounded queue in which each client has its turn.
//!
//! Clients are served by what they have had (Sheng et al. 2024, "Fairness in Serving Large Language Models"): the next is
//! that of the client for whom the fewest tokens were computed. A client that comes back from a pause begins with the least
//! of those who are there, so that nobody saves up for later. Who waits half the longest time allowed goes first.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::request::Request;

/// A request that waits.
pub(super) struct Waiting {
    pub(super) request: Request,
    pub(super) since: Instant,
}

/// The queue.
#[derive(Default)]
pub(super) struct Queue {
    clients: HashMap<u64, Client>,
    length: usize,
}

#[derive(Default)]
struct Client {
    waiting: VecDeque<Waiting>,
    running: usize,
    /// Tokens computed for it, lifted when it comes back.
    served: u64,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn push(&mut self, request: Request) {
        let client = request.client;
        if !self.clients.contains_key(&client) {
            let least = self.clients.values().map(|client| client.served).min().unwrap_or(0);
            self.clients.insert(client, Client { served: least, ..Client::default() });
        }
        let client = self.clients.get_mut(&client).expect("there now");
        client.waiting.push_back(Waiting { request, since: Instant::now() });
        self.length += 1;
    }

    /// Whose turn it is; [`Queue::pop`] takes its first. `patience` is the time after which age alone counts.
    pub(super) fn next(&self, patience: Duration) -> Option<u64> {
        let waiting = || self.clients.iter().filter_map(|(&id, client)| Some((id, client, client.waiting.front()?)));
        let oldest = waiting().min_by_key(|(_, _, first)| first.since)?;
        if oldest.2.since.elapsed() >= patience {
            return Some(oldest.0);
        }
        waiting().min_by_key(|(_, client, first)| (client.served, first.since)).map(|(id, ..)| id)
    }

    pub(super) fn peek(&self, client: u64) -> Option<&Waiting> {
        self.clients.get(&client)?.waiting.front()
    }

    /// Takes a client's first; it runs from now on.
    pub(super) fn pop(&mut self, client: u64) -> Option<Waiting> {
        let client = self.clients.get_mut(&client)?;
        let waiting = client.waiting.pop_front()?;
        client.running += 1;
        self.length -= 1;
        Some(waiting)
    }

    /// Tokens were computed for a client.
    pub(super) fn charge(&mut self, client: u64, tokens: usize) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.served += tokens as u64;
        }
    }

    /// One of a client's no longer runs.
    pub(super) fn ended(&mut self, client: u64) {
        if let Some(entry) = self.clients.get_mut(&client) {
            entry.running -= 1;
            if entry.running == 0 && entry.waiting.is_empty() {
                self.clients.remove(&client);
            }
        }
    }

    /// Takes out all for whom `drop` holds.
    pub(super) fn remove(&mut self, mut drop: impl FnMut(&Waiting) -> bool) -> Vec<Waiting> {
        let mut removed = Vec::new();
        for client in self.clients.values_mut() {
            let (gone, kept): (Vec<Waiting>, Vec<Waiting>) =
                std::mem::take(&mut client.waiting).into_iter().partition(|waiting| drop(waiting));
            client.waiting = kept.into();
            removed.extend(gone);
        }
        self.clients.retain(|_, client| client.running > 0 || !client.waiting.is_empty());
        self.length -= removed.len();
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::{News, Pooling, Receiver, Task};
    use super::*;
    use std::ops::ControlFlow;

    struct Nobody;

    impl Receiver for Nobody {
        fn news(&mut self, _: News) -> ControlFlow<()> {
            ControlFlow::Continue(())
        }

        fn is_listening(&self) -> bool {
            true
        }
    }

    fn request(client: u64, first: u32) -> Request {
        let task = Task::Embed(Pooling::Mean);
        Request { prompt: vec![first], task, client, tenant: 0, receiver: Box::new(Nobody) }
    }

    const LONG: Duration = Duration::from_secs(100);

    #[test]
    fn clients_take_turns_by_what_they_had() {
        let mut queue = Queue::default();
        for number in 0..3 {
            queue.push(request(1, number));
        }
        queue.push(request(2, 10));
        let mut order = Vec::new();
        while let Some(client) = queue.next(LONG) {
            let waiting = queue.pop(client).unwrap();
            order.push(waiting.request.prompt[0]);
            queue.charge(client, 5);
        }
        assert_eq!(order, [0, 10, 1, 2]);
        assert_eq!(queue.len(), 0);
        // Client 2 pauses and comes back: it has saved nothing up, and owes nothing.
        queue.ended(2);
        queue.push(request(2, 11));
        assert_eq!(queue.clients[&2].served, queue.clients[&1].served);
    }

    #[test]
    fn who_waited_long_goes_first() {
        let mut queue = Queue::default();
        queue.push(request(1, 0));
        queue.push(request(2, 1));
        queue.charge(1, 1000);
        assert_eq!(queue.next(LONG), Some(2));
        assert_eq!(queue.next(Duration::ZERO), Some(1));
    }

    #[test]
    fn the_dropped_are_taken_out() {
        let mut queue = Queue::default();
        for number in 0..6 {
            queue.push(request(number.into(), number));
        }
        let gone = queue.remove(|waiting| waiting.request.prompt[0].is_multiple_of(2));
        assert_eq!((gone.len(), queue.len(), queue.clients.len()), (3, 3, 3));
        queue.ended(77);
    }
}
