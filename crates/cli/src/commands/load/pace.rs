//! When requests begin: so many at once, or so many a second.

use std::future::Future;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;

/// The rule by which requests begin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// This many under way at any time.
    Together(usize),
    /// This many a second on average, at random moments (a Poisson process), whatever became of earlier ones.
    PerSecond(f64),
}

/// Runs `requests` jobs at a pace; `job(index, begin)` is given the moment at which it was due. Results stand in the order
/// in which they ended.
pub async fn run<T, Job>(pace: Pace, requests: usize, seed: u64, job: impl Fn(usize, Instant) -> Job) -> Vec<T>
where
    T: Send + 'static,
    Job: Future<Output = T> + Send + 'static,
{
    let mut running = JoinSet::new();
    let mut results = Vec::with_capacity(requests);
    let due = arrivals(pace, requests, seed);
    let started = Instant::now();
    for index in 0..requests {
        let begin = match (pace, &due) {
            (Pace::Together(most), _) => {
                while running.len() >= most {
                    results.extend(running.join_next().await.map(finished));
                }
                Instant::now()
            }
            (Pace::PerSecond(_), due) => {
                let begin = started + due[index];
                tokio::time::sleep_until(begin.into()).await;
                // An ended task holds its result, an answer's text: take what is there.
                while let Some(result) = running.try_join_next() {
                    results.push(finished(result));
                }
                begin
            }
        };
        running.spawn(job(index, begin));
    }
    while let Some(result) = running.join_next().await {
        results.push(finished(result));
    }
    results
}

fn finished<T>(result: Result<T, tokio::task::JoinError>) -> T {
    // Nobody aborts a job: what is left is its panic, which goes on here.
    result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// When each request is due, counted from the start; empty where they follow each other.
fn arrivals(pace: Pace, requests: usize, seed: u64) -> Vec<Duration> {
    let Pace::PerSecond(rate) = pace else { return Vec::new() };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut at = 0.0;
    let mut next = || {
        let now = at;
        let uniform: f64 = random.random_range(f64::MIN_POSITIVE..1.0);
        at -= uniform.ln() / rate;
        Duration::from_secs_f64(now)
    };
    (0..requests).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn arrivals_have_the_rate() {
        let due = arrivals(Pace::PerSecond(50.0), 4000, 7);
        assert!(due[0] == Duration::ZERO && due.is_sorted());
        let rate = 4000.0 / due[3999].as_secs_f64();
        assert!((45.0..55.0).contains(&rate), "{rate}");
        assert_eq!(due, arrivals(Pace::PerSecond(50.0), 4000, 7));
    }

    #[tokio::test]
    async fn so_many_at_once() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let job = |index, _| {
            let (now, most) = (now.clone(), most.clone());
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(2)).await;
                now.fetch_sub(1, Ordering::SeqCst);
                index
            }
        };
        let mut results = run(Pace::Together(5), 40, 1, job).await;
        results.sort_unstable();
        assert_eq!(results, (0..40).collect::<Vec<_>>());
        assert_eq!(most.load(Ordering::SeqCst), 5);
    }

    #[tokio::test]
    async fn a_rate_does_not_wait_for_answers() {
        let job = |_, begin: Instant| async move {
            let late = begin.elapsed();
            tokio::time::sleep(Duration::from_millis(300)).await;
            late
        };
        let started = Instant::now();
        let late = run(Pace::PerSecond(200.0), 20, 1, job).await;
        // One after the other they would take six seconds.
        assert!(late.len() == 20 && started.elapsed() < Duration::from_secs(3));
    }
}
