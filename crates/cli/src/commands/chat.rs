//! `moebius chat`: a conversation in the terminal, or line by line through a pipe.

use std::io::{BufRead, IsTerminal};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use moebius_engine::{
    ChatTemplate, Conversation, EngineError, Event, Finish, GenerationOptions, Generator, Message, Session, Summary,
    Tokenizer,
};
use rustyline::error::ReadlineError;

use crate::arguments::ChatArguments;
use crate::models::Source;
use crate::output;

/// Whether an answer is being written: ctrl-C ends it then, and the program otherwise.
static ANSWERING: AtomicBool = AtomicBool::new(false);
/// Set by ctrl-C while an answer is being written.
static STOP: AtomicBool = AtomicBool::new(false);

/// The exit status of a process that ctrl-C ended.
const INTERRUPTED: i32 = 130;

const HELP: &str = "\
/system TEXT  begin anew under this instruction (without TEXT: under none)
/reset        begin anew, under the same instruction
/help         this list
/quit         leave; so do ctrl-D, and ctrl-C at the prompt
Ctrl-C during an answer ends the answer only.";

/// Runs the command.
///
/// # Errors
/// A model that cannot be read or has no chat template, an input that is no UTF-8, an output that cannot be written.
pub fn execute(arguments: &ChatArguments) -> anyhow::Result<ExitCode> {
    let source = Source::new(arguments.model.as_deref());
    let template = template(arguments, &source)?;
    let mut options = arguments.sampling.options(&source.generation_defaults()?);
    options.max_tokens = arguments.max_tokens.unwrap_or(usize::MAX);
    options.sampling.validate()?;
    let precision = &arguments.precision;
    let (tokenizer, model) = source.tokenizer_and_model(precision.weights, precision.dtype.weights())?;
    let end = template.special("eos_token").and_then(|token| tokenizer.token_id(token));
    options.end_tokens.extend(end.filter(|end| !options.end_tokens.contains(end)));
    ctrlc::set_handler(interrupted).context("ctrl-C handler")?;

    let generator = Generator::new(&model, &tokenizer, arguments.precision.numerics());
    let mut chat = Chat {
        session: generator.session(),
        generator,
        tokenizer: &tokenizer,
        template,
        options,
        system: arguments.system.clone(),
        messages: Vec::new(),
        figures: arguments.figures,
    };
    chat.begin();
    let mut input = Input::new()?;
    while let Some(line) = input.line()? {
        if chat.obey(line.trim())?.is_break() {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The template of the command line, or else the model's own.
fn template(arguments: &ChatArguments, source: &Source) -> anyhow::Result<ChatTemplate> {
    let own = source.chat_template()?;
    if let Some(path) = &arguments.template {
        let name = path.display().to_string();
        let bytes = std::fs::read(path).with_context(|| name.clone())?;
        let text = output::utf8(bytes).with_context(|| name.clone())?;
        let template = ChatTemplate::new(&text, &name)?;
        return Ok(own.iter().fold(template, |template, own| template.with_specials_of(own)));
    }
    let Some(template) = own else {
        let model = match source {
            Source::Shipped => "the model inside this binary".to_string(),
            Source::Folder(path) | Source::Gguf(path) => path.display().to_string(),
        };
        bail!(
            "{model} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): give one \
             with --template FILE, another model with --model DIR, or use `moebius run`"
        );
    };
    Ok(template)
}

fn interrupted() {
    if !ANSWERING.load(Ordering::SeqCst) || STOP.swap(true, Ordering::SeqCst) {
        std::process::exit(INTERRUPTED);
    }
}

/// A conversation with its model.
struct Chat<'m> {
    generator: Generator<'m>,
    /// What the model has read. Each turn goes on from what its text shares with the last one.
    session: Session<'m>,
    tokenizer: &'m Tokenizer,
    template: ChatTemplate,
    options: GenerationOptions,
    system: Option<String>,
    messages: Vec<Message>,
    figures: bool,
}

impl Chat<'_> {
    /// Forgets everything but the instruction.
    fn begin(&mut self) {
        self.messages = self.system.iter().map(|text| Message::text("system", text)).collect();
    }

    /// Does what a line asks for.
    fn obey(&mut self, line: &str) -> anyhow::Result<ControlFlow<()>> {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "" => {}
            "/quit" | "/exit" => return Ok(ControlFlow::Break(())),
            "/help" => output::note(HELP),
            "/reset" => self.begin(),
            "/system" => {
                self.system = Some(rest.trim().to_string()).filter(|text| !text.is_empty());
                self.begin();
            }
            command if command.starts_with('/') => {
                output::note(&format!("{command} is no command; /help lists them"));
            }
            _ => self.answer(line)?,
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Writes the answer to a message. What the engine refuses is said and leaves the conversation as it was.
    fn answer(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(Message::text("user", text));
        STOP.store(false, Ordering::SeqCst);
        ANSWERING.store(true, Ordering::SeqCst);
        let mut answer = String::new();
        let mut failure = None;
        let written = self.generate(&mut |event| {
            if let Event::Text(text) = event {
                answer.push_str(&text);
                failure = output::print(&text).err();
            }
            if failure.is_some() || STOP.load(Ordering::SeqCst) {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        ANSWERING.store(false, Ordering::SeqCst);
        if let Some(failure) = failure {
            return Err(failure);
        }
        match written {
            Ok(summary) => {
                output::print("\n")?;
                self.remarks(&summary);
            }
            Err(error @ EngineError::PromptTooLong { .. }) => {
                output::note(&format!("the conversation is full ({error}); /reset begins anew"));
            }
            Err(error) => output::complain(&error.into()),
        }
        if answer.is_empty() {
            self.messages.pop();
        } else {
            self.messages.push(Message::text("assistant", &answer));
        }
        Ok(())
    }

    fn generate(&mut self, on_event: &mut dyn FnMut(Event) -> ControlFlow<()>) -> Result<Summary, EngineError> {
        let conversation =
            Conversation { messages: &self.messages, add_generation_prompt: true, ..Conversation::default() };
        let prompt = self.tokenizer.encode_bare(&self.template.render(&conversation)?)?;
        self.generator.continue_session(&mut self.session, &prompt, &self.options, on_event)
    }

    /// Why an answer ends where it does, if that needs saying, and the figures if they are wanted.
    fn remarks(&self, summary: &Summary) {
        match summary.finish {
            Finish::ContextFull => output::note("(the model's context is full; /reset begins anew)"),
            Finish::MaxTokens => output::note(&format!("(ended after {} tokens)", summary.tokens.len())),
            Finish::Cancelled => output::note("(interrupted)"),
            Finish::EndToken(_) | Finish::Stop(_) | Finish::TimeLimit => {}
        }
        if self.figures {
            let rate = summary.generation_rate().map(|rate| format!(", {rate:.1} tokens/s")).unwrap_or_default();
            output::note(&format!(
                "conversation: {} tokens, {} kept from before, {} read at {:.1} tokens/s; answer: {} tokens{rate}",
                summary.prompt_tokens,
                summary.cached_tokens,
                summary.prompt_tokens - summary.cached_tokens,
                summary.prompt_rate(),
                summary.tokens.len(),
            ));
        }
    }
}

/// Where lines come from.
enum Input {
    Terminal(Box<rustyline::DefaultEditor>),
    Pipe(std::io::StdinLock<'static>),
}

impl Input {
    fn new() -> anyhow::Result<Self> {
        let input = std::io::stdin();
        if !input.is_terminal() || !std::io::stdout().is_terminal() {
            return Ok(Self::Pipe(input.lock()));
        }
        output::note("/help lists the commands, ctrl-D leaves.");
        Ok(Self::Terminal(Box::new(rustyline::DefaultEditor::new().context("terminal")?)))
    }

    /// The next line, `None` at the end.
    fn line(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(line.as_str());
                    Ok(Some(line))
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                Err(error) => Err(error).context("terminal"),
            },
            Self::Pipe(input) => {
                let mut bytes = Vec::new();
                let read = input.read_until(b'\n', &mut bytes).context("standard input")?;
                Ok(if read == 0 { None } else { Some(output::utf8(bytes).context("standard input")?) })
            }
        }
    }
}
