//! The `moebius` command: parse, call, print.
//!
//! A failure is one line on standard error and exit status 1, wrong usage (clap's part) is 2. A reader that goes away,
//! as in `moebius run | head`, is no failure.
#![forbid(unsafe_code)]

mod arguments;
mod commands;
mod display;
mod memory;
mod models;
mod output;
mod record;
mod samples;
mod token_file;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, Command};

/// As much as a main thread has.
const STACK_BYTES: usize = 8 << 20;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match execute(&arguments) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn execute(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    // Whoever asks by MOEBIUS_ISA for what the machine lacks hears it now, not from inside a product.
    moebius_kernels::isa::Isa::from_environment()?;
    let threads = arguments.threads.map_or(0, std::num::NonZeroUsize::get);
    rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK_BYTES).build_global()?;
    // On a thread of the pool: from outside of it, every parallel loop would wake one thread more, and be woken by it.
    rayon::scope(|_| dispatch(&arguments.command))
}

fn dispatch(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(run) => commands::run::execute(run),
        Command::Pack(pack) => commands::pack::execute(pack),
        Command::Chat(chat) => commands::chat::execute(chat),
        Command::Train(train) => commands::train::execute(train),
        Command::Compare(compare) => commands::compare::execute(compare),
        Command::Eval(eval) => commands::eval::execute(eval),
        Command::Bench(bench) => commands::bench::execute(bench),
        Command::Serve(serve) => commands::serve::execute(serve),
        Command::Load(load) => commands::load::execute(load),
        Command::Export(export) => commands::export::execute(export),
        Command::Info(info) => commands::info::execute(info),
        Command::Logits(logits) => commands::logits::execute(logits),
        Command::Check(check) => commands::check::execute(check),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    kinds.into_iter().any(|cause| cause.kind() == ErrorKind::BrokenPipe)
}
