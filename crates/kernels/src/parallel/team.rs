//! A team of threads that stay awake between the loops of one body.
//!
//! A decoded token is a hundred short loops with a little serial work between them. Waking a sleeping thread for each
//! takes up to a tenth of a millisecond on a virtual machine, more than many of the loops themselves.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Looks at the clock of work before a waiting thread lets others run.
const PATIENCE: u32 = 1 << 14;

/// Work that every member takes part in until nothing is left of it.
#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    /// # Safety
    /// `data` is that of the job, whose work lives.
    call: unsafe fn(*const ()),
}

/// What leader and helpers share.
struct Team {
    /// Odd while a job is open; each job has a number of its own.
    turn: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    /// Helpers that may be at work on the open job.
    active: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: the job is written by the leader while no turn is open and no helper active, and read by helpers between
// joining an open turn and leaving it.
unsafe impl Sync for Team {}

thread_local! {
    /// The team that this thread leads.
    static LEADS: Cell<*const Team> = const { Cell::new(std::ptr::null()) };
}

/// Runs `body`, whose parallel loops find the current pool's other threads awake. They wait by spinning, so the body
/// should be little else than loops: a forward pass, a training step.
///
/// Outside a pool's threads it is just the call. Inside, nothing but this module's loops may need the pool's threads.
pub fn with_team<R>(body: impl FnOnce() -> R) -> R {
    let threads = super::threads();
    if threads <= 1 || rayon::current_thread_index().is_none() || !LEADS.get().is_null() {
        return body();
    }
    let team = Team {
        turn: AtomicUsize::new(0),
        job: UnsafeCell::new(None),
        active: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        panic: Mutex::new(None),
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| team.help());
        }
        /// Dismisses the helpers, also when the body panics: the scope waits for them.
        struct Dismiss<'t>(&'t Team);
        impl Drop for Dismiss<'_> {
            fn drop(&mut self) {
                LEADS.set(std::ptr::null());
                self.0.stop.store(true, Ordering::SeqCst);
            }
        }
        let _dismiss = Dismiss(&team);
        LEADS.set(&raw const team);
        body()
    })
}

/// Has the team that this thread leads do the work, all members at once; false if it leads none.
pub(super) fn share(work: &(impl Fn() + Sync)) -> bool {
    let team = LEADS.get();
    if team.is_null() {
        return false;
    }
    // SAFETY: `with_team` clears the pointer before its team goes.
    unsafe { &*team }.run(work);
    true
}

impl Team {
    fn run<F: Fn() + Sync>(&self, work: &F) {
        /// # Safety
        /// `data` is a `&F` that lives.
        unsafe fn call<F: Fn() + Sync>(data: *const ()) {
            // SAFETY: the caller's promise.
            unsafe { (*data.cast::<F>())() }
        }
        /// Closes the turn and waits for who is still at work, also when the leader's own part panics.
        struct Close<'t>(&'t Team);
        impl Drop for Close<'_> {
            fn drop(&mut self) {
                self.0.turn.fetch_add(1, Ordering::SeqCst);
                wait_until(|| self.0.active.load(Ordering::SeqCst) == 0);
                LEADS.set(self.0);
            }
        }
        // A loop inside this one is none of the team's, which is at work already.
        LEADS.set(std::ptr::null());
        // SAFETY: no turn is open and nobody is active: the last `Close` saw to it.
        unsafe { *self.job.get() = Some(Job { data: std::ptr::from_ref(work).cast(), call: call::<F> }) };
        self.turn.fetch_add(1, Ordering::SeqCst);
        let close = Close(self);
        work();
        drop(close);
        let panic = self.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// A helper: joins every turn that it sees open, until the team is dismissed.
    fn help(&self) {
        let mut last = 0;
        loop {
            let mut turn = 0;
            wait_until(|| {
                turn = self.turn.load(Ordering::SeqCst);
                (turn % 2 == 1 && turn != last) || self.stop.load(Ordering::SeqCst)
            });
            if turn % 2 == 0 || turn == last {
                return;
            }
            last = turn;
            self.active.fetch_add(1, Ordering::SeqCst);
            // Still open after joining: the leader closes it before it looks for who is active, so it waits for us.
            if self.turn.load(Ordering::SeqCst) == turn {
                // SAFETY: the turn is open, so the leader does not write.
                let job = unsafe { *self.job.get() };
                if let Some(Job { data, call }) = job {
                    // SAFETY: the leader keeps the work until nobody is active.
                    let result = catch_unwind(AssertUnwindSafe(|| unsafe { call(data) }));
                    if let Err(panic) = result {
                        let mut slot = self.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        slot.get_or_insert(panic);
                    }
                }
            }
            self.active.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Waits awake; after a while it lets other threads of the machine run in between.
fn wait_until(mut ready: impl FnMut() -> bool) {
    let mut looks = 0u32;
    while !ready() {
        looks = looks.saturating_add(1);
        if looks < PATIENCE { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::for_each_index;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_index_of_every_loop_is_visited_once() {
        for threads in 1..5 {
            pool(threads).install(|| {
                with_team(|| {
                    for count in (0..300).map(|i| i % 7 * i) {
                        let visits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                        for_each_index(count, 0, |index| {
                            visits[index].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(visits.iter().all(|v| v.load(Ordering::Relaxed) == 1), "{count} on {threads}");
                    }
                });
            });
        }
    }

    #[test]
    fn teams_in_teams_and_loops_in_loops_end() {
        pool(3).install(|| {
            let total = AtomicUsize::new(0);
            with_team(|| {
                with_team(|| {
                    for_each_index(10, 0, |_| {
                        for_each_index(10, 0, |_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                });
            });
            assert_eq!(total.into_inner(), 100);
        });
        assert_eq!(with_team(|| 7), 7, "outside a pool");
    }

    #[test]
    fn a_panic_of_any_member_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(3);
        for bad in [0, 5, 63] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.install(|| with_team(|| for_each_index(64, 0, |index| assert_ne!(index, bad))));
            }));
            assert!(result.is_err());
        }
        assert_eq!(pool.install(|| with_team(rayon::current_num_threads)), 3);
    }

    #[test]
    fn many_short_teams() {
        let pool = pool(4);
        for round in 0..500 {
            let total = AtomicUsize::new(0);
            pool.install(|| {
                with_team(|| for_each_index(round % 9, 0, |index| _ = total.fetch_add(index + 1, Ordering::Relaxed)));
            });
            let wanted = (round % 9) * (round % 9 + 1) / 2;
            assert_eq!(total.into_inner(), wanted);
        }
    }
}
