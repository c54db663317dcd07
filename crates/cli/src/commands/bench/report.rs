//! The result of a benchmark as a table for people and as JSON.

use std::fmt::Write;

use moebius_engine::bench::{BenchResult, Phase, Spread};
use moebius_kernels::gemm::Precision;
use moebius_kernels::isa::Isa;
use moebius_model::Model;
use serde_json::{Value, json};

use crate::output::count;

/// What the machine can do, with the threads of the benchmark.
pub struct Machine {
    /// The instruction set in use.
    pub isa: Isa,
    /// Threads.
    pub threads: usize,
    /// Bytes a second of a streaming read.
    pub read_bandwidth: f64,
    /// Operations a second of multiply-adds in registers, in the precision of the products.
    pub peak_operations: f64,
    /// The same in bytes, as weights in block formats are multiplied.
    pub peak_byte_operations: f64,
}

/// Everything that is reported.
pub struct Report<'m> {
    /// What was measured.
    pub name: String,
    /// The model.
    pub model: &'m Model,
    /// Of its products.
    pub precision: Precision,
    /// Where it ran.
    pub machine: Machine,
    /// Time to read or make the weights.
    pub load_seconds: f64,
    /// Sequences that decoded together.
    pub batch: usize,
    /// Memory in use at the end, where the system says so.
    pub resident_bytes: Option<u64>,
    /// The most there ever was.
    pub peak_bytes: Option<u64>,
    /// The measurements.
    pub result: BenchResult,
}

impl Report<'_> {
    /// The kinds of work, each with the name that a reader sees.
    fn phases(&self) -> Vec<(String, &Phase)> {
        let mut phases = vec![("prefill".to_string(), &self.result.prefill), ("decode".into(), &self.result.decode)];
        phases.extend(self.result.batched_decode.iter().map(|phase| (format!("decode x {}", self.batch), phase)));
        phases
    }

    /// Lines for people.
    pub fn table(&self) -> String {
        let machine = &self.machine;
        let mut text = String::new();
        let mut line = |what: &str, value: String| {
            writeln!(text, "{what:<14} {value}").expect("a string takes all");
        };
        let parameters = self.model.count_params();
        line("model", self.name.clone());
        line("parameters", format!("{} in all, {} active a token", count(parameters.total), count(parameters.active)));
        line(
            "machine",
            format!(
                "{}, {} threads: reads {} GB/s, computes {} billion operations/s in {}, {} in bytes",
                machine.isa,
                machine.threads,
                giga(machine.read_bandwidth),
                giga(machine.peak_operations),
                self.dtype(),
                giga(machine.peak_byte_operations),
            ),
        );
        line("load", format!("{:.2} s, first token {:.3} s later", self.load_seconds, self.result.first_token_seconds));
        let memory = |bytes: Option<u64>| bytes.map_or("unknown".into(), |bytes| format!("{} GB", giga(bytes as f64)));
        let weights = self.model.held_weight_bytes(self.precision) as f64;
        let (resident, peak) = (memory(self.resident_bytes), memory(self.peak_bytes));
        line("memory", format!("{resident} resident, {peak} at most; weights as read {} GB", giga(weights)));
        text.push('\n');
        for (name, phase) in self.phases() {
            self.table_of(&name, phase, &mut text);
        }
        text
    }

    fn table_of(&self, name: &str, phase: &Phase, text: &mut String) {
        let rate = phase.rate();
        let (bytes, operations) = (phase.bytes_a_second().median, phase.operations_a_second().median);
        let a_token = |amount: u64| amount as f64 / phase.tokens as f64;
        let experts = match (phase.experts, self.model.experts()) {
            (Some(distinct), Some((_, all))) => format!(", {distinct:.1} of {all} experts a layer and pass"),
            _ => String::new(),
        };
        let lines = [
            format!("{:>9.1} tokens/s ({:.1} to {:.1})", rate.median, rate.min, rate.max),
            format!(
                "          reads {:.1} MB of weights and {:.2} MB of cache a token{experts}: {} GB/s, {} of memory's",
                a_token(phase.cost.weight_bytes) / 1e6,
                a_token(phase.cost.cache_bytes) / 1e6,
                giga(bytes),
                percent(bytes / self.machine.read_bandwidth),
            ),
            format!(
                "          {:.1} million operations a token: {} billion/s, {} of the {} peak, {} of that in bytes",
                a_token(phase.cost.operations) / 1e6,
                giga(operations),
                percent(operations / self.machine.peak_operations),
                self.dtype(),
                percent(operations / self.machine.peak_byte_operations),
            ),
        ];
        for (index, line) in lines.iter().enumerate() {
            writeln!(text, "{:<14} {line}", if index == 0 { name } else { "" }).expect("a string takes all");
        }
    }

    fn dtype(&self) -> &'static str {
        match self.precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// One object.
    pub fn json(&self) -> String {
        let parameters = self.model.count_params();
        let config = &self.model.config;
        let value = json!({
            "model": self.name,
            "family": config.family,
            "layers": config.n_layers(),
            "parameters": parameters.total,
            "active_parameters": parameters.active,
            "dtype": self.dtype(),
            "machine": {
                "isa": self.machine.isa.to_string(),
                "threads": self.machine.threads,
                "read_bytes_per_second": self.machine.read_bandwidth,
                "operations_per_second": self.machine.peak_operations,
                "byte_operations_per_second": self.machine.peak_byte_operations,
            },
            "load_seconds": self.load_seconds,
            "first_token_seconds": self.result.first_token_seconds,
            "weight_bytes": self.model.held_weight_bytes(self.precision),
            "resident_bytes": self.resident_bytes,
            "peak_bytes": self.peak_bytes,
            "prefill": self.json_of(&self.result.prefill),
            "decode": self.json_of(&self.result.decode),
            "batch": self.batch,
            "batched_decode": self.result.batched_decode.as_ref().map(|phase| self.json_of(phase)),
        });
        format!("{value:#}\n")
    }

    fn json_of(&self, phase: &Phase) -> Value {
        let a_token = |amount: u64| amount as f64 / phase.tokens as f64;
        let (bytes, operations) = (phase.bytes_a_second().median, phase.operations_a_second().median);
        json!({
            "tokens": phase.tokens,
            "passes": phase.passes,
            "seconds": phase.seconds,
            "tokens_per_second": json_of_spread(phase.rate()),
            "weight_bytes_per_token": a_token(phase.cost.weight_bytes),
            "cache_bytes_per_token": a_token(phase.cost.cache_bytes),
            "operations_per_token": a_token(phase.cost.operations),
            "experts_per_layer_and_pass": phase.experts,
            "bytes_per_second": bytes,
            "share_of_read_bandwidth": bytes / self.machine.read_bandwidth,
            "operations_per_second": operations,
            "share_of_peak_operations": operations / self.machine.peak_operations,
            "share_of_peak_byte_operations": operations / self.machine.peak_byte_operations,
        })
    }
}

fn json_of_spread(spread: Spread) -> Value {
    json!({ "median": spread.median, "min": spread.min, "max": spread.max })
}

/// Billions, short.
fn giga(number: f64) -> String {
    let number = number / 1e9;
    let decimals = if number >= 100.0 { 0 } else { 1 + usize::from(number < 10.0) };
    format!("{number:.decimals$}")
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([giga(473.21e9), giga(27.04e9), giga(3.456e9)], ["473", "27.0", "3.46"]);
        assert_eq!(percent(0.8249), "82.5 %");
    }
}
