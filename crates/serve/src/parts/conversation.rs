//! What the interfaces for conversations have in common: from messages, tools and fields to what the engine is told.

use moebius_engine::scheduler::Generate;
use moebius_engine::{Constraint, Grammar};
use serde_json::{Map, Value, json};

use super::calls::ToolFormat;
use super::output::OutputReader;
use super::prompt::{Chat, blocking};
use super::sampling::SamplingFields;
use super::tools::{Tool, ToolChoice, instructions};
use crate::error::ApiError;
use crate::state::App;

/// A conversation to be answered, whichever interface it came by.
pub struct Ask {
    /// Messages as OpenAI's API has them.
    pub messages: Vec<Value>,
    /// Tools that may be called.
    pub tools: Vec<Tool>,
    /// Whether one must be.
    pub choice: ToolChoice,
    /// Whether several may be.
    pub parallel: bool,
    /// Variables of the template.
    pub variables: Map<String, Value>,
    /// What the answer must be.
    pub form: Option<Grammar>,
    /// How to write.
    pub fields: SamplingFields,
    /// How many answers.
    pub n: usize,
    /// Each token's score, and those of so many of the likeliest.
    pub scores: Option<usize>,
    /// Each token's experts.
    pub routing: bool,
}

/// What the engine is told.
pub struct Ready {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// How to go on, for each answer.
    pub generates: Vec<Generate>,
    /// Reads each answer.
    pub reader: OutputReader,
}

impl Ask {
    /// Checks everything and renders the conversation.
    ///
    /// # Errors
    /// 400 with the field at fault.
    pub async fn prepare(self, app: &App) -> Result<Ready, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::invalid("messages", "Invalid 'messages': wanted at least one message."));
        }
        let offered = if self.choice == ToolChoice::None { &[][..] } else { &self.tools };
        let mut generates = self.fields.generates(app, self.n)?;
        let grammar = wanted_form(app, self.form, &self.choice, &self.tools, self.parallel)?;
        let constraints = compile(app, grammar, self.n).await?;
        for (generate, constraint) in generates.iter_mut().zip(constraints) {
            generate.scores = self.scores;
            generate.trace_experts = self.routing;
            generate.show_special = app.tool_format.has_special(!offered.is_empty());
            generate.constraint = constraint;
        }
        let rendered = app.render(conversation(app, self.messages, offered, self.variables)).await?;
        let thinks = app.template.as_ref().is_some_and(|template| template.source().contains("<think>"));
        let reader = OutputReader::new(app.tool_format, offered, thinks, rendered.in_thoughts);
        Ok(Ready { prompt: rendered.tokens, generates, reader })
    }
}

/// The form that the answer must have, by what it must call or what it must be.
fn wanted_form(
    app: &App,
    form: Option<Grammar>,
    choice: &ToolChoice,
    tools: &[Tool],
    parallel: bool,
) -> Result<Option<Grammar>, ApiError> {
    let forced: Vec<Tool> = choice.forced(tools).into_iter().cloned().collect();
    match (forced.is_empty(), form) {
        (true, form) => Ok(form),
        (false, None) => Ok(Some(app.tool_format.grammar(&forced, parallel, &app.tokenizer))),
        (false, Some(_)) => {
            let message = "A call of a tool and a form of the text cannot both be demanded.";
            Err(ApiError::invalid("response_format", message))
        }
    }
}

/// A constraint for each text, made where it may take its time.
///
/// # Errors
/// 400: a grammar that is none, or too large.
pub async fn compile(app: &App, grammar: Option<Grammar>, n: usize) -> Result<Vec<Option<Constraint>>, ApiError> {
    let Some(grammar) = grammar else { return Ok((0..n).map(|_| None).collect()) };
    let app = app.clone();
    blocking(move || (0..n).map(|_| Ok(Some(app.compiler.compile(&grammar)?))).collect()).await
}

/// The conversation as the template gets it: tools beside it, or where the template knows none, told in a system message.
fn conversation(app: &App, mut messages: Vec<Value>, tools: &[Tool], variables: Map<String, Value>) -> Chat {
    let told = app.tool_format != ToolFormat::Hermes { told: false };
    if !told && !tools.is_empty() {
        let text = instructions(tools);
        match messages.first_mut().filter(|first| first["role"] == "system") {
            Some(first) if first["content"].is_string() => {
                first["content"] = format!("{}\n\n{text}", first["content"].as_str().unwrap_or_default()).into();
            }
            _ => messages.insert(0, json!({"role": "system", "content": text})),
        }
    }
    let tools = if told { tools.iter().map(Tool::for_template).collect() } else { Vec::new() };
    Chat { messages, tools, variables }
}
