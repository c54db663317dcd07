//! The scheduler against one sequence at a time: the same texts, whatever else runs.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver as Inlet, Sender, channel};
use std::sync::{Arc, Mutex};

use moebius_kernels::gemm::Precision;

use super::*;
use crate::testing::{byte_level, small_model};
use crate::{Event, Finish, GenerationOptions, Generator, SamplingOptions, TokenExperts, Tokenizer};

const CONTEXT: usize = 400;

/// Sends news on, until it is told to go.
struct Listener {
    to: Sender<News>,
    gone: Arc<AtomicBool>,
}

impl Receiver for Listener {
    fn news(&mut self, news: News) -> ControlFlow<()> {
        let _ = self.to.send(news);
        if self.is_listening() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn is_listening(&self) -> bool {
        !self.gone.load(Ordering::SeqCst)
    }
}

struct Asked {
    news: Inlet<News>,
    gone: Arc<AtomicBool>,
}

/// What one request came to.
#[derive(Debug, Default)]
struct Answer {
    text: String,
    scores: Vec<TokenScore>,
    prompt_scores: Vec<TokenScore>,
    experts: Vec<TokenExperts>,
    embedding: Vec<f32>,
    outcome: Option<Outcome>,
    failed: Option<String>,
    dropped: Option<Dropped>,
}

impl Asked {
    fn answer(&self) -> Answer {
        let mut answer = Answer::default();
        for news in self.news.iter() {
            match news {
                News::Begun { .. } => {}
                News::Text(piece) => {
                    answer.text.push_str(&piece.text);
                    answer.scores.extend(piece.scores);
                }
                News::PromptScores(scores) => answer.prompt_scores = scores,
                News::Experts(experts) => answer.experts.push(experts),
                News::Embedding(vector) => answer.embedding = vector,
                News::Finished(outcome) => answer.outcome = Some(outcome),
                News::Failed(error) => answer.failed = Some(error.to_string()),
                News::Dropped(dropped) => answer.dropped = Some(dropped),
            }
        }
        answer
    }
}

fn ask(scheduler: &Scheduler, client: u64, prompt: &[u32], task: Task) -> Result<Asked, Refusal> {
    let (to, news) = channel();
    let gone = Arc::new(AtomicBool::new(false));
    let receiver = Box::new(Listener { to, gone: gone.clone() });
    scheduler.submit(vec![Request { prompt: prompt.to_vec(), task, client, tenant: 0, receiver }])?;
    Ok(Asked { news, gone })
}

fn options() -> SchedulerOptions {
    SchedulerOptions { step_tokens: 70, most_running: 8, cache_bytes: 64 << 20, ..SchedulerOptions::default() }
}

/// Runs a scheduler on a thread of its own while `body` asks it things; then it finishes what runs.
fn with_scheduler<R>(options: SchedulerOptions, body: impl FnOnce(&Scheduler, &Model, &Tokenizer) -> R) -> R {
    let (model, tokenizer) = (small_model(CONTEXT), byte_level());
    let scheduler = Scheduler::new(&model, options);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| scheduler.run(&model, &tokenizer));
        let result = body(&scheduler, &model, &tokenizer);
        scheduler.stop(Stop::WhenDone);
        thread.join().unwrap();
        result
    })
}

fn prompt(seed: usize, length: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * 31 + seed * 17 + i * i * seed) % 95 + 32) as u32).collect()
}

fn sampling(seed: u64) -> SamplingOptions {
    SamplingOptions { temperature: 0.9, top_p: 0.95, seed, ..SamplingOptions::greedy() }
}

/// What the generator, which knows nothing of others, writes.
fn alone(model: &Model, tokenizer: &Tokenizer, prompt: &[u32], sampling: SamplingOptions, max_tokens: usize) -> String {
    let generator = Generator::new(model, tokenizer, Precision::Bf16);
    let options = GenerationOptions { sampling, max_tokens, end_tokens: vec![256], ..GenerationOptions::default() };
    let mut text = String::new();
    let mut session = generator.session();
    generator
        .continue_session(&mut session, prompt, &options, &mut |event| {
            if let Event::Text(piece) = event {
                text.push_str(&piece);
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    text
}

fn write(seed: u64, max_tokens: usize) -> Task {
    Task::Generate(Box::new(Generate {
        sampling: sampling(seed),
        max_tokens,
        end_tokens: vec![256],
        ..Generate::default()
    }))
}

/// Prompts of many lengths, several with a long beginning in common, at once: each gets the text that it gets alone.
fn texts_under_load_are_texts_alone(options: SchedulerOptions) -> Statistics {
    let common = prompt(1, 150);
    let prompts: Vec<Vec<u32>> = (0..20)
        .map(|i| match i % 3 {
            0 => [&common[..], &prompt(i, 1 + i)].concat(),
            1 => prompt(i, 1 + 13 * i),
            _ => prompt(i, 5),
        })
        .collect();
    with_scheduler(options, |scheduler, model, tokenizer| {
        for round in 0..2 {
            let asked: Vec<Asked> = (prompts.iter().enumerate())
                .map(|(i, prompt)| ask(scheduler, i as u64 % 4, prompt, write(i as u64, 10 + i)).unwrap())
                .collect();
            for (i, (asked, prompt)) in asked.iter().zip(&prompts).enumerate() {
                let answer = asked.answer();
                let wanted = alone(model, tokenizer, prompt, sampling(i as u64), 10 + i);
                assert_eq!(answer.text, wanted, "round {round}, request {i}: {:?}", answer.failed);
                assert_eq!(answer.outcome.unwrap().prompt_tokens, prompt.len());
            }
        }
        scheduler.statistics(|statistics| statistics.clone())
    })
}

#[test]
fn every_text_is_the_one_written_alone() {
    let statistics = texts_under_load_are_texts_alone(options());
    assert!(statistics.prefix_hits > 0 && statistics.prefix_tokens >= 128, "{statistics:?}");
    assert_eq!((statistics.finished, statistics.running, statistics.yielded), (40, 0, 0));
    let load: u64 = statistics.experts[&0].counts.iter().sum();
    assert_eq!(load, 2 * statistics.loads.iter().map(|load| load.tokens).sum::<u64>(), "two experts a token");
    let bytes: Vec<_> = statistics.loads.iter().filter_map(Load::bytes_per_token).collect();
    assert!(bytes.first() > bytes.last(), "{bytes:?}");
}

#[test]
fn memory_that_is_taken_away_changes_no_text() {
    // Room for the longest alone and little more.
    let model = small_model(CONTEXT);
    let cache_bytes = pages_for(CONTEXT) * Session::page_bytes(&model, Precision::Bf16.into());
    let statistics = texts_under_load_are_texts_alone(SchedulerOptions { cache_bytes, ..options() });
    assert_eq!(statistics.finished, 40);
    let statistics = texts_under_load_are_texts_alone(SchedulerOptions { share_prefixes: false, ..options() });
    assert_eq!((statistics.finished, statistics.prefix_hits), (40, 0));
}

#[test]
fn sequences_yield_to_older_ones_when_they_grow_and_come_back() {
    let model = small_model(CONTEXT);
    let cache_bytes = 6 * Session::page_bytes(&model, Precision::Bf16.into());
    with_scheduler(SchedulerOptions { cache_bytes, ..options() }, |scheduler, model, tokenizer| {
        let prompts: Vec<Vec<u32>> = (0..4).map(|i| prompt(i, 60)).collect();
        let asked: Vec<_> = prompts.iter().map(|p| ask(scheduler, 0, p, write(5, 150)).unwrap()).collect();
        for (asked, prompt) in asked.iter().zip(&prompts) {
            assert_eq!(asked.answer().text, alone(model, tokenizer, prompt, sampling(5), 150));
        }
        assert!(scheduler.statistics(|statistics| statistics.yielded) > 0);
        assert!(scheduler.cache_bytes().0 <= cache_bytes);
    });
}

#[test]
fn experts_and_scores_are_told_for_every_token() {
    with_scheduler(options(), |scheduler, _, _| {
        let tokens = prompt(3, 140);
        // What is known of the prompt must not keep its tokens from being told.
        ask(scheduler, 0, &tokens, write(1, 2)).unwrap().answer();
        let generate = |trace_experts, prompt_scores| {
            Task::Generate(Box::new(Generate {
                max_tokens: 5,
                trace_experts,
                prompt_scores,
                scores: Some(2),
                ..Generate::default()
            }))
        };
        let traced = ask(scheduler, 0, &tokens, generate(true, None)).unwrap().answer();
        let positions: Vec<usize> = traced.experts.iter().map(|experts| experts.position).collect();
        assert_eq!(positions, (0..145).collect::<Vec<_>>());
        assert!(traced.experts.iter().all(|experts| experts.layers.len() == 2));
        assert!(traced.experts.iter().all(|experts| experts.in_prompt == (experts.position < 140)));
        let scored = ask(scheduler, 0, &tokens, generate(false, Some(1))).unwrap().answer();
        assert_eq!(scored.prompt_scores.len(), 139);
        assert!(scored.prompt_scores.iter().zip(&tokens[1..]).all(|(score, &token)| score.token == token));
        assert_eq!((scored.scores.len(), scored.scores[0].top.len()), (5, 2));
        assert_eq!(scored.scores, traced.scores, "greedy, so the best is the one chosen");
        assert!(scored.scores.iter().all(|score| score.top[0] == (score.token, score.log_probability)));
        let written: f64 = scored.scores.iter().map(|score| f64::from(score.log_probability)).sum();
        assert!((scored.outcome.unwrap().log_probability - written).abs() < 1e-9);
    });
}

#[test]
fn embeddings_are_those_of_the_whole_text() {
    with_scheduler(options(), |scheduler, model, _| {
        let tokens = prompt(3, 200);
        let mut session = Session::new(model, Precision::Bf16);
        let mut readings = [crate::Reading { session: &mut session, tokens: &tokens, wanted: crate::Wanted::Hidden }];
        let given = Session::read_step(&mut readings, &mut moebius_model::Silent).unwrap().unwrap();
        let hidden = given.of(0).to_vec();
        let mean = |d: usize| (hidden.chunks(32).map(|row| f64::from(row[d])).sum::<f64>() / 200.0) as f32;
        let found = ask(scheduler, 0, &tokens, Task::Embed(Pooling::Mean)).unwrap().answer().embedding;
        assert_eq!(found, (0..32).map(mean).collect::<Vec<_>>());
        let found = ask(scheduler, 0, &tokens, Task::Embed(Pooling::Last)).unwrap().answer().embedding;
        assert_eq!(found, hidden[199 * 32..]);
        let whole = ask(scheduler, 0, &prompt(1, CONTEXT), Task::Embed(Pooling::Last)).unwrap().answer();
        assert_eq!(whole.embedding.len(), 32);
    });
}

#[test]
fn stop_strings_end_the_text_and_its_scores() {
    with_scheduler(options(), |scheduler, model, tokenizer| {
        let tokens = prompt(2, 20);
        let whole = alone(model, tokenizer, &tokens, sampling(4), 60);
        let letters: Vec<char> = whole.chars().collect();
        let stop: String = letters[10..13].iter().collect();
        let wanted = &whole[..whole.find(&stop).unwrap()];
        let task = Task::Generate(Box::new(Generate {
            sampling: sampling(4),
            max_tokens: 60,
            end_tokens: vec![256],
            stop: vec![stop.clone()],
            scores: Some(0),
            ..Generate::default()
        }));
        let answer = ask(scheduler, 0, &tokens, task).unwrap().answer();
        assert_eq!(answer.text, wanted);
        assert_eq!(answer.outcome.unwrap().finish, Finish::Stop(stop));
        let told: Vec<u32> = answer.scores.iter().map(|score| score.token).collect();
        assert_eq!(tokenizer.decode(&told).unwrap(), wanted);
    });
}

#[test]
fn texts_keep_to_their_grammar() {
    let compiler = crate::GrammarCompiler::new(&byte_level(), 257, &[256]).unwrap();
    with_scheduler(options(), |scheduler, _, _| {
        let grammar = crate::Grammar::Regex("[a-c]{3}-[0-9]{2}".into());
        let asked: Vec<_> = (0..6)
            .map(|seed| {
                let constraint = Some(compiler.compile(&grammar).unwrap());
                let task = Generate {
                    sampling: sampling(seed),
                    max_tokens: 60,
                    end_tokens: vec![256],
                    constraint,
                    ..Generate::default()
                };
                ask(scheduler, 0, &prompt(2, 20), Task::Generate(Box::new(task))).unwrap()
            })
            .collect();
        for asked in asked {
            let answer = asked.answer();
            let bytes = answer.text.as_bytes();
            assert_eq!(bytes.len(), 6, "{answer:?}");
            assert!(bytes[..3].iter().all(|b| (b'a'..=b'c').contains(b)) && bytes[4..].iter().all(u8::is_ascii_digit));
            assert!(matches!(answer.outcome.unwrap().finish, Finish::EndToken(_)));
        }
    });
}

#[test]
fn too_many_are_refused_and_the_impossible_at_once() {
    let model = small_model(CONTEXT);
    let scheduler = Scheduler::new(&model, SchedulerOptions { most_waiting: 2, cache_bytes: 1 << 14, ..options() });
    let asked: Vec<_> = (0..2).map(|_| ask(&scheduler, 0, &[65], write(1, 3)).unwrap()).collect();
    match ask(&scheduler, 0, &[65], write(1, 3)).err().unwrap() {
        Refusal::Full { waiting: 2, retry_after } => assert!(retry_after.as_secs() >= 1),
        other => panic!("{other}"),
    }
    let refuse = |prompt: &[u32], task| match ask(&scheduler, 0, prompt, task).err().unwrap() {
        Refusal::Impossible(error) => error.to_string(),
        other => panic!("{other}"),
    };
    assert!(refuse(&[], write(1, 3)).contains("empty"));
    assert!(refuse(&[257], write(1, 3)).contains("257"));
    assert!(refuse(&[65; CONTEXT], write(1, 3)).contains("400"));
    assert!(refuse(&[65; CONTEXT - 1], write(1, 3)).contains("cache"));
    let hot = Generate { sampling: SamplingOptions { temperature: -1.0, ..sampling(1) }, ..Generate::default() };
    assert!(refuse(&[65], Task::Generate(Box::new(hot))).contains("temperature"));
    // Nothing was ever run: what waits hears of the end.
    scheduler.stop(Stop::WhenDone);
    scheduler.run(&model, &byte_level());
    assert!(asked.iter().all(|asked| asked.answer().dropped == Some(Dropped::ShuttingDown)));
    assert!(matches!(ask(&scheduler, 0, &[65], write(1, 3)), Err(Refusal::ShuttingDown)));
}

#[test]
fn who_leaves_frees_what_he_held() {
    with_scheduler(options(), |scheduler, model, tokenizer| {
        let leaving: Vec<_> =
            (0..12).map(|i| ask(scheduler, 0, &prompt(i, 90), write(i as u64, 300)).unwrap()).collect();
        let staying = ask(scheduler, 1, &prompt(50, 90), write(3, 40)).unwrap();
        leaving.iter().for_each(|asked| asked.gone.store(true, Ordering::SeqCst));
        assert_eq!(staying.answer().text, alone(model, tokenizer, &prompt(50, 90), sampling(3), 40));
        leaving.iter().for_each(|asked| _ = asked.answer());
        scheduler.statistics(|statistics| assert_eq!(statistics.running, 0));
    });
}

#[test]
fn a_receiver_that_panics_harms_the_step_only() {
    struct Bomb(Arc<Mutex<()>>);
    impl Receiver for Bomb {
        fn news(&mut self, news: News) -> ControlFlow<()> {
            let _held = self.0.lock();
            assert!(!matches!(news, News::Text(_)), "a fault of ours");
            ControlFlow::Continue(())
        }

        fn is_listening(&self) -> bool {
            true
        }
    }
    with_scheduler(options(), |scheduler, model, tokenizer| {
        let receiver = Box::new(Bomb(Arc::default()));
        let request = Request { prompt: vec![65], task: write(1, 9), client: 0, tenant: 0, receiver };
        scheduler.submit(vec![request]).unwrap();
        while scheduler.statistics(|statistics| statistics.steps == 0) && scheduler.waiting() > 0 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(200));
        let after = ask(scheduler, 0, &prompt(1, 70), write(3, 10)).unwrap().answer();
        assert_eq!(after.text, alone(model, tokenizer, &prompt(1, 70), sampling(3), 10));
    });
}

#[test]
fn time_runs_out_with_what_was_written() {
    let short = SchedulerOptions { longest_run: Duration::ZERO, ..options() };
    with_scheduler(short, |scheduler, _, _| {
        let answer = ask(scheduler, 0, &[65], write(1, 100)).unwrap().answer();
        assert_eq!(answer.outcome.unwrap().finish, Finish::TimeLimit);
    });
    let short = SchedulerOptions { longest_wait: Duration::ZERO, ..options() };
    with_scheduler(short, |scheduler, _, _| {
        let answer = ask(scheduler, 0, &[65], write(1, 100)).unwrap().answer();
        assert_eq!(answer.dropped, Some(Dropped::WaitedTooLong));
    });
}
