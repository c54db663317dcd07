//! Times one layer of experts, forward alone and with its backward, as a training step meets it: f32 weights that changed
//! since the last call, so that packing them for the products is within the time. The last line is JSON, in milliseconds.
//!
//!     cargo run --release -p moebius-moe --example layer_bench -- [--threads 2] [--seconds 3] [--f32]
//!         [--tokens 2048] [--hidden 1024] [--experts 32] [--top-k 4] [--width 512]
//!
//! Routing is given: each token's experts are drawn without repetition, all alike. `bench/layer_vs_pytorch.py` runs it
//! beside PyTorch.

use moebius_kernels::gemm::Precision;
use moebius_kernels::isa::Isa;
use moebius_kernels::machine::{Operands, peak_operations};
use moebius_kernels::parallel::with_team;
use moebius_moe::{ExpertBank, Plan};
use moebius_tensor::{Gradients, Graph, Param, Rng, Tensor, Var};
use std::error::Error;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The value behind a flag, or `default`.
fn option<T>(name: &str, default: T) -> Result<T, Box<dyn Error>>
where
    T: std::str::FromStr<Err: Error + 'static>,
{
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == name) {
        Some(at) => Ok(arguments.get(at + 1).ok_or_else(|| format!("{name}: wanted a number"))?.parse()?),
        None => Ok(default),
    }
}

fn normal(random: &mut Rng, shape: &[usize], deviation: f32) -> Tensor {
    let mut numbers = vec![0.0; shape.iter().product()];
    random.fill_normal(&mut numbers, deviation);
    Tensor::new(shape, numbers)
}

struct Layer {
    bank: ExpertBank,
    plan: Rc<Plan>,
    x: Tensor,
    weights: Tensor,
    dy: Vec<f32>,
    precision: Precision,
}

impl Layer {
    fn new(precision: Precision) -> Result<Self, Box<dyn Error>> {
        let (tokens, hidden) = (option("--tokens", 2048)?, option("--hidden", 1024)?);
        let (experts, top_k, width) = (option("--experts", 32)?, option("--top-k", 4)?, option("--width", 512)?);
        if top_k == 0 || top_k > experts {
            return Err(format!("--top-k {top_k}: wanted 1 to {experts}, the experts").into());
        }
        let mut random = Rng::new(1);
        let mut chosen = Vec::with_capacity(tokens * top_k);
        for _ in 0..tokens {
            let mut order: Vec<(f32, u32)> = (0..experts as u32).map(|expert| (random.uniform(), expert)).collect();
            order.sort_by(|a, b| a.0.total_cmp(&b.0));
            chosen.extend(order[..top_k].iter().map(|&(_, expert)| expert));
        }
        let plan = Rc::new(Plan::from_choices(experts, top_k, &chosen)?);
        let gate_up = Param::new(0, "gate_up", normal(&mut random, &[experts, 2 * width, hidden], 0.02));
        let down = Param::new(1, "down", normal(&mut random, &[experts, hidden, width], 0.02));
        let weights = Tensor::new(&[plan.n_assignments()], vec![1.0 / top_k as f32; plan.n_assignments()]);
        let x = normal(&mut random, &[tokens, hidden], 1.0);
        let dy = normal(&mut random, &[tokens, hidden], 1.0).data().to_vec();
        Ok(Self { bank: ExpertBank::new(gate_up, down)?, plan, x, weights, dy, precision })
    }

    /// What an optimiser would have done: packed weights are stale.
    fn touch(&mut self) {
        self.bank.params_mut().into_iter().for_each(|param| param.update(|_| ()));
    }

    fn forward(&self) -> Result<(), Box<dyn Error>> {
        let graph = Graph::inference(self.precision);
        let (x, weights) = (Var::constant(self.x.clone()), Var::constant(self.weights.clone()));
        self.bank.forward(&graph, &x, &self.plan, &weights)?;
        Ok(())
    }

    fn both(&self, gradients: &mut Gradients) -> Result<(), Box<dyn Error>> {
        let graph = Graph::training(self.precision);
        let (x, weights) = (graph.variable(self.x.clone()), graph.variable(self.weights.clone()));
        let y = self.bank.forward(&graph, &x, &self.plan, &weights)?;
        gradients.clear();
        graph.backward_from(&[(&y, &self.dy)], gradients);
        Ok(())
    }
}

/// Milliseconds of each call after three that warm up, until the time is over.
fn repeat(seconds: f64, mut call: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<Vec<f64>, Box<dyn Error>> {
    for _ in 0..3 {
        call()?;
    }
    let (begun, mut times) = (Instant::now(), Vec::new());
    while times.len() < 3 || begun.elapsed().as_secs_f64() < seconds {
        let call_begun = Instant::now();
        call()?;
        times.push(1e3 * call_begun.elapsed().as_secs_f64());
    }
    Ok(times)
}

fn run(seconds: f64, precision: Precision) -> Result<(), Box<dyn Error>> {
    let peak = peak_operations(Isa::current(), Operands::Bf16, Duration::from_millis(300));
    let mut layer = Layer::new(precision)?;
    let mut gradients = Gradients::new();
    let forward = repeat(seconds, || {
        layer.touch();
        with_team(|| layer.forward())
    })?;
    let both = repeat(seconds, || {
        layer.touch();
        with_team(|| layer.both(&mut gradients))
    })?;
    println!(r#"{{"forward":{forward:?},"both":{both:?},"bf16_peak":{peak:e}}}"#);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let is_f32 = std::env::args().any(|argument| argument == "--f32");
    let precision = if is_f32 { Precision::F32 } else { Precision::Bf16 };
    let seconds = option("--seconds", 3.0)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(option("--threads", 2)?).build()?;
    pool.install(|| run(seconds, precision).map_err(|error| error.to_string()))?;
    Ok(())
}
