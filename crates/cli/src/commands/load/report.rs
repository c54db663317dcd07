//! Figures of a load: rates, and times as percentiles.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

use super::client::{Answer, Outcome};

/// Milliseconds at shares of all measurements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// The mean.
    pub mean: f64,
    /// Half lie below.
    pub p50: f64,
    /// Nine of ten lie below.
    pub p90: f64,
    /// 95 of 100.
    pub p95: f64,
    /// 99 of 100.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Percentiles {
    /// By nearest rank: each is a value that was measured. All are 0 where nothing was.
    fn new(times: impl Iterator<Item = Duration>) -> Self {
        let mut times: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
        times.sort_by(f64::total_cmp);
        let Some(&max) = times.last() else { return Self::default() };
        let at = |share: f64| times[((share * times.len() as f64).ceil() as usize).clamp(1, times.len()) - 1];
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        Self { mean, p50: at(0.5), p90: at(0.9), p95: at(0.95), p99: at(0.99), max }
    }
}

/// The server's memory, if its process is known.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// The process.
    pub pid: u32,
    /// Resident bytes before the load, with the model loaded and warm.
    pub before: u64,
    /// Resident bytes when half of the requests had ended.
    pub halfway: u64,
    /// Resident bytes after it, when the server had come to rest.
    pub after: u64,
}

/// What a load showed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Requests sent in good order.
    pub requests: usize,
    /// Requests with a whole answer.
    pub answered: usize,
    /// Requests that the server put off with status 429.
    pub refused: usize,
    /// The other requests, counted by what happened.
    pub failed: BTreeMap<String, usize>,
    /// From the first request's begin to the last one's end.
    pub seconds: f64,
    /// Mean tokens of a prompt, by the server's count; none where it gives no count.
    pub prompt_tokens: Option<f64>,
    /// Mean tokens of an answer.
    pub answer_tokens: f64,
    /// Whether tokens are the server's count, or pieces of the stream.
    pub counted_by_server: bool,
    /// Tokens of answers a second, all requests together.
    pub output_tokens_per_second: f64,
    /// Requests answered a second.
    pub answers_per_second: f64,
    /// Time to the first piece of text.
    pub first_token_ms: Percentiles,
    /// Time between one piece of text and the next.
    pub between_ms: Percentiles,
    /// An answer's time after its first token, divided by its further tokens.
    pub each_token_ms: Percentiles,
    /// Time to the end of the answer.
    pub whole_ms: Percentiles,
    /// The server's memory.
    pub memory: Option<Memory>,
}

impl Report {
    /// Sums up what became of requests within `wall`.
    pub fn new(outcomes: &[Outcome], wall: Duration, memory: Option<Memory>) -> Self {
        let answers: Vec<&Answer> = outcomes.iter().filter_map(answer).collect();
        let mut failed = BTreeMap::new();
        for outcome in outcomes {
            if let Outcome::Failed(reason) = outcome {
                *failed.entry(reason.clone()).or_insert(0) += 1;
            }
        }
        let tokens: u64 = answers.iter().map(|answer| tokens(answer)).sum();
        let count = answers.len().max(1) as f64;
        let prompts: Option<u64> = answers.iter().map(|answer| answer.prompt_tokens).sum();
        let seconds = wall.as_secs_f64();
        Self {
            requests: outcomes.len(),
            answered: answers.len(),
            refused: outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Refused(_))).count(),
            failed,
            seconds,
            prompt_tokens: prompts.filter(|_| !answers.is_empty()).map(|sum| sum as f64 / count),
            answer_tokens: tokens as f64 / count,
            counted_by_server: answers.iter().all(|answer| answer.completion_tokens.is_some()),
            output_tokens_per_second: tokens as f64 / seconds,
            answers_per_second: answers.len() as f64 / seconds,
            first_token_ms: Percentiles::new(answers.iter().filter_map(|answer| answer.times.first().copied())),
            between_ms: Percentiles::new(
                answers.iter().flat_map(|answer| answer.times.windows(2).map(|pair| pair[1] - pair[0])),
            ),
            each_token_ms: Percentiles::new(answers.iter().filter_map(|answer| each_token(answer))),
            whole_ms: Percentiles::new(answers.iter().map(|answer| answer.ended)),
            memory,
        }
    }

    /// The report as lines.
    pub fn lines(&self) -> String {
        let failed: usize = self.failed.values().sum();
        let mut text = format!(
            "{} requests in {:.1} s: {} answered, {} refused with status 429, {failed} failed\n",
            self.requests, self.seconds, self.answered, self.refused
        );
        for (reason, count) in self.failed.iter().take(10) {
            let _ = writeln!(text, "  {count} x {reason}");
        }
        let prompt = self.prompt_tokens.map_or("an unknown number of".into(), |tokens| format!("{tokens:.1}"));
        let counted = if self.counted_by_server { "" } else { " (pieces of the stream: the server gives no count)" };
        let _ = writeln!(
            text,
            "{prompt} prompt tokens and {:.1} answer tokens a request{counted}\n{:.1} output tokens/s, {:.2} answers/s\n",
            self.answer_tokens, self.output_tokens_per_second, self.answers_per_second
        );
        let _ = writeln!(
            text,
            "{:<22}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}",
            "milliseconds", "mean", "p50", "p90", "p95", "p99", "max"
        );
        let rows = [
            ("first token", self.first_token_ms),
            ("between pieces", self.between_ms),
            ("each further token", self.each_token_ms),
            ("whole answer", self.whole_ms),
        ];
        for (name, p) in rows {
            let [mean, p50, p90, p95, p99, max] =
                [p.mean, p.p50, p.p90, p.p95, p.p99, p.max].map(|ms| format!("{ms:.1}"));
            let _ = writeln!(text, "{name:<22}{mean:>9}{p50:>9}{p90:>9}{p95:>9}{p99:>9}{max:>9}");
        }
        if let Some(memory) = self.memory {
            text.push_str(&memory.line());
        }
        text
    }
}

impl Memory {
    /// One line.
    pub fn line(&self) -> String {
        let [before, halfway, after] =
            [self.before, self.halfway, self.after].map(|bytes| bytes as f64 / (1 << 20) as f64);
        format!("memory of process {}: {before:.1} MiB before, {halfway:.1} halfway, {after:.1} after\n", self.pid)
    }
}

fn answer(outcome: &Outcome) -> Option<&Answer> {
    match outcome {
        Outcome::Answered(answer) => Some(answer),
        _ => None,
    }
}

/// Tokens of an answer: the server's count, or pieces of the stream where it gives none.
fn tokens(answer: &Answer) -> u64 {
    answer.completion_tokens.unwrap_or(answer.times.len() as u64)
}

fn each_token(answer: &Answer) -> Option<Duration> {
    let further = u32::try_from(tokens(answer)).ok()?.checked_sub(1).filter(|&further| further > 0)?;
    Some((*answer.times.last()? - *answer.times.first()?) / further)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn percentiles_by_nearest_rank() {
        let p = Percentiles::new((1..=100).rev().map(ms));
        assert_eq!((p.p50, p.p90, p.p95, p.p99, p.max, p.mean), (50.0, 90.0, 95.0, 99.0, 100.0, 50.5));
        assert_eq!(Percentiles::new([ms(7)].into_iter()).p99, 7.0);
        assert_eq!(Percentiles::new(std::iter::empty()), Percentiles::default());
    }

    #[test]
    fn figures_that_fit_on_paper() {
        let answer = Answer {
            text: "a b c".into(),
            times: vec![ms(100), ms(110), ms(140)],
            prompt_tokens: Some(10),
            completion_tokens: Some(5),
            ended: ms(150),
        };
        let uncounted = Answer { completion_tokens: None, prompt_tokens: None, ..answer.clone() };
        let outcomes = [
            Outcome::Answered(answer.clone()),
            Outcome::Refused(ms(1000)),
            Outcome::Failed("status 500".into()),
            Outcome::Failed("status 500".into()),
        ];
        let report = Report::new(&outcomes, ms(2000), None);
        assert_eq!((report.requests, report.answered, report.refused, report.failed["status 500"]), (4, 1, 1, 2));
        assert_eq!(
            (report.output_tokens_per_second, report.answer_tokens, report.prompt_tokens),
            (2.5, 5.0, Some(10.0))
        );
        assert_eq!((report.first_token_ms.p50, report.between_ms.max, report.each_token_ms.p50), (100.0, 30.0, 10.0));
        assert!(report.counted_by_server && report.lines().contains("2 x status 500"));
        let report = Report::new(&[Outcome::Answered(answer), Outcome::Answered(uncounted)], ms(1000), None);
        assert_eq!((report.counted_by_server, report.prompt_tokens, report.answer_tokens), (false, None, 4.0));
    }
}
