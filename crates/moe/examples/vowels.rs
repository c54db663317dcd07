//! The vowel experiment of Jacobs, Jordan, Nowlan and Hinton (1991), table 1, beside the paper's rows.
//!
//! `cargo run --release --example vowels -- FILE.csv [RUNS]`; the table (Peterson and Barney 1952) needs the columns
//! `speaker`, `vowel` (i, I, A for hod, V for hud; others are left out), `f1`, `f2`.
//!
//! What the paper does not say, and what is taken here: four logistic outputs; formants to mean 0 and deviation 1;
//! weights normal of deviation 0.3; rate 0.4 on the mean gradient of all rows, no momentum; 50 training and 25 test
//! speakers drawn anew in each run. Training ends at a mean squared error of 0.08 an output, as in the paper.

use moebius_moe::routers::mixtures::{Hierarchy, Mixture, MixtureError, Output, Response};
use moebius_tensor::Rng;
use std::error::Error;

const VOWELS: [&str; 4] = ["i", "I", "A", "V"];
const RATE: f32 = 0.4;
const DEVIATION: f32 = 0.3;
const ENOUGH: f64 = 0.08;
const MOST_EPOCHS: usize = 20_000;

/// A measured vowel.
struct Row {
    speaker: String,
    formants: [f32; 2],
    vowel: usize,
}

/// Inputs `[rows, 2]` and targets `[rows, 4]`.
#[derive(Default)]
struct Table {
    x: Vec<f32>,
    targets: Vec<f32>,
}

/// Something that learns a table.
trait Learner {
    fn step(&mut self, table: &Table);
    fn predict(&self, x: &[f32]) -> Vec<f32>;
}

impl Learner for Mixture {
    fn step(&mut self, table: &Table) {
        Mixture::step(self, &table.x, &table.targets, MixtureError::Likelihood, RATE);
    }

    fn predict(&self, x: &[f32]) -> Vec<f32> {
        Mixture::predict(self, x)
    }
}

/// The two-level mixture of Jordan and Jacobs (1994) over softmax regressions; an epoch is a round of EM.
impl Learner for Hierarchy {
    fn step(&mut self, table: &Table) {
        self.em(&table.x, &table.targets, 1);
    }

    fn predict(&self, x: &[f32]) -> Vec<f32> {
        Hierarchy::predict(self, x)
    }
}

/// One hidden layer, all logistic, half the squared error.
struct Network {
    /// `[units, 3]`
    hidden: Vec<[f32; 3]>,
    /// `[4][units + 1]`
    output: Vec<Vec<f32>>,
}

fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl Network {
    fn random(units: usize, rng: &mut Rng) -> Self {
        let mut w = vec![0.0; units * 3 + 4 * (units + 1)];
        rng.fill_normal(&mut w, DEVIATION);
        let (hidden, output) = w.split_at(units * 3);
        Self {
            hidden: hidden.chunks_exact(3).map(|w| [w[0], w[1], w[2]]).collect(),
            output: output.chunks_exact(units + 1).map(<[f32]>::to_vec).collect(),
        }
    }

    fn hidden(&self, x: &[f32]) -> Vec<f32> {
        let units = self.hidden.iter().map(|w| logistic(w[0] * x[0] + w[1] * x[1] + w[2]));
        units.chain([1.0]).collect()
    }

    fn outputs(&self, hidden: &[f32]) -> Vec<f32> {
        self.output.iter().map(|w| logistic(w.iter().zip(hidden).map(|(w, h)| w * h).sum())).collect()
    }
}

impl Learner for Network {
    fn step(&mut self, table: &Table) {
        let rows = table.x.len() as f32 / 2.0;
        let mut hidden_slopes = vec![[0.0; 3]; self.hidden.len()];
        let mut output_slopes = vec![vec![0.0; self.hidden.len() + 1]; 4];
        for (x, targets) in table.x.chunks_exact(2).zip(table.targets.chunks_exact(4)) {
            let hidden = self.hidden(x);
            let outputs = self.outputs(&hidden);
            let slopes: Vec<f32> = outputs.iter().zip(targets).map(|(o, d)| (o - d) * o * (1.0 - o) / rows).collect();
            for (sums, slope) in output_slopes.iter_mut().zip(&slopes) {
                sums.iter_mut().zip(&hidden).for_each(|(sum, h)| *sum += slope * h);
            }
            for (unit, sums) in hidden_slopes.iter_mut().enumerate() {
                let back: f32 = slopes.iter().zip(&self.output).map(|(slope, w)| slope * w[unit]).sum();
                let slope = back * hidden[unit] * (1.0 - hidden[unit]);
                sums.iter_mut().zip([x[0], x[1], 1.0]).for_each(|(sum, x)| *sum += slope * x);
            }
        }
        let pairs = self.hidden.iter_mut().flatten().zip(hidden_slopes.iter().flatten());
        let pairs = pairs.chain(self.output.iter_mut().flatten().zip(output_slopes.iter().flatten()));
        pairs.for_each(|(w, slope)| *w -= RATE * slope);
    }

    fn predict(&self, x: &[f32]) -> Vec<f32> {
        self.outputs(&self.hidden(x))
    }
}

fn read(path: &str) -> Result<Vec<Row>, Box<dyn Error>> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap_or_default().split(',').map(str::trim).collect();
    let column = |name: &str| {
        header
            .iter()
            .position(|&found| found == name)
            .ok_or_else(|| format!("{path}: wanted a column {name}, found {header:?}"))
    };
    let [speaker, vowel, f1, f2] = [column("speaker")?, column("vowel")?, column("f1")?, column("f2")?];
    let mut rows = Vec::new();
    for (at, line) in lines.enumerate() {
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        let cell = |i: usize| {
            cells
                .get(i)
                .copied()
                .ok_or_else(|| format!("{path}:{}: wanted {} cells, found {}", at + 2, header.len(), cells.len()))
        };
        let number = |i: usize| -> Result<f32, Box<dyn Error>> {
            let found = cell(i)?;
            let number: Option<f32> = found.parse().ok().filter(|n: &f32| n.is_finite());
            Ok(number.ok_or_else(|| format!("{path}:{}: wanted a number, found {found}", at + 2))?)
        };
        if let Some(vowel) = VOWELS.iter().position(|&name| Ok(name) == cell(vowel)) {
            rows.push(Row { speaker: cell(speaker)?.to_owned(), formants: [number(f1)?, number(f2)?], vowel });
        }
    }
    Ok(rows)
}

/// 50 speakers to learn from, 25 to test; formants scaled by the first.
fn split(rows: &[Row], rng: &mut Rng) -> Result<[Table; 2], Box<dyn Error>> {
    let mut speakers: Vec<&str> = rows.iter().map(|row| row.speaker.as_str()).collect();
    speakers.sort_unstable();
    speakers.dedup();
    if speakers.len() < 75 {
        return Err(format!("wanted at least 75 speakers, found {}", speakers.len()).into());
    }
    let count = speakers.len();
    (0..75).for_each(|i| speakers.swap(i, i + rng.below(count - i)));
    let mut tables = [Table::default(), Table::default()];
    for row in rows {
        let table = match speakers.iter().position(|&speaker| speaker == row.speaker) {
            Some(0..50) => &mut tables[0],
            Some(50..75) => &mut tables[1],
            _ => continue,
        };
        table.x.extend(row.formants);
        table.targets.extend((0..4).map(|vowel| f32::from(u8::from(vowel == row.vowel))));
    }
    for formant in 0..2 {
        let known: Vec<f32> = tables[0].x.iter().skip(formant).step_by(2).copied().collect();
        let mean = known.iter().sum::<f32>() / known.len() as f32;
        let deviation = (known.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / known.len() as f32).sqrt();
        for table in &mut tables {
            table.x.iter_mut().skip(formant).step_by(2).for_each(|x| *x = (*x - mean) / deviation);
        }
    }
    Ok(tables)
}

/// Mean squared error an output, and percent of rows whose largest output is the right one.
fn measure(learner: &dyn Learner, table: &Table) -> (f64, f64) {
    let (mut squares, mut right) = (0.0, 0);
    let best = |values: &[f32]| (0..4).max_by(|&a, &b| values[a].total_cmp(&values[b]));
    for (x, targets) in table.x.chunks_exact(2).zip(table.targets.chunks_exact(4)) {
        let outputs = learner.predict(x);
        squares += outputs.iter().zip(targets).map(|(o, d)| f64::from((o - d).powi(2))).sum::<f64>();
        right += usize::from(best(&outputs) == best(targets));
    }
    (squares / table.targets.len() as f64, 400.0 * right as f64 / table.targets.len() as f64)
}

fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0).max(1.0);
    (mean, variance.sqrt())
}

/// What learns.
#[derive(Clone, Copy)]
enum System {
    Experts(usize),
    Hidden(usize),
    Tree(usize, usize),
}

impl System {
    fn begin(self, rng: &mut Rng) -> Box<dyn Learner> {
        match self {
            Self::Experts(n) => Box::new(Mixture::random([2, 4, n], Output::Logistic, DEVIATION, rng)),
            Self::Hidden(n) => Box::new(Network::random(n, rng)),
            Self::Tree(a, b) => Box::new(Hierarchy::random([2, 4], [a, b], Response::Classes, DEVIATION, rng)),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Experts(n) => format!("{n} experts"),
            Self::Hidden(n) => format!("BP {n} hidden"),
            Self::Tree(a, b) => format!("{a} x {b}, EM"),
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("wanted: vowels FILE.csv [RUNS]")?;
    let runs: u64 = arguments.get(1).map_or(Ok(25), |runs| runs.parse())?;
    let rows = read(path)?;
    println!("{:<14} {:>6} {:>6} {:>7} {:>5}   paper: train test epochs SD", "system", "train", "test", "epochs", "SD");
    let systems = [
        (System::Experts(4), "88 90 1124 23"),
        (System::Experts(8), "88 90 1083 12"),
        (System::Hidden(6), "88 90 2209 83"),
        (System::Hidden(12), "88 90 2435 124"),
        (System::Tree(2, 2), "not in it"),
    ];
    for (system, paper) in systems {
        let (mut epochs, mut train, mut test, mut unfinished) = (vec![], vec![], vec![], 0);
        for seed in 0..runs {
            let mut rng = Rng::new(seed);
            let [known, unknown] = split(&rows, &mut rng)?;
            let mut learner = system.begin(&mut rng);
            let mut epoch = 0;
            while measure(&*learner, &known).0 > ENOUGH && epoch < MOST_EPOCHS {
                learner.step(&known);
                epoch += 1;
            }
            if epoch == MOST_EPOCHS {
                unfinished += 1;
                continue;
            }
            epochs.push(epoch as f64);
            train.push(measure(&*learner, &known).1);
            test.push(measure(&*learner, &unknown).1);
        }
        let name = system.name();
        let ((mean, deviation), train, test) =
            (mean_and_deviation(&epochs), mean_and_deviation(&train).0, mean_and_deviation(&test).0);
        println!("{name:<14} {train:>6.1} {test:>6.1} {mean:>7.0} {deviation:>5.0}   {paper}");
        if unfinished > 0 {
            println!(
                "  {unfinished} of {runs} runs did not reach {ENOUGH} in {MOST_EPOCHS} epochs and do not count above"
            );
        }
    }
    Ok(())
}
