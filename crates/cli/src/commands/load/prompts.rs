//! The bodies of requests: read from a file, or made up in a wanted length.

use std::path::Path;

use anyhow::{Context, anyhow, bail};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::arguments::{Endpoint, LoadArguments};
use super::client::Target;

/// Words that most vocabularies hold whole.
const WORDS: &str = "the of and to in that was he it his with as for had you not be her on at by which have or from this him \
    but all she they were my are me one their so an said them we who would been will no when there if more out up into do any \
    your what has man could other than our some very time upon about may its only now like little then can made should did us \
    such great before must two these see know over much down after first good men own never most old day where those sea house \
    hand water light night world long way come might life under again himself made through being every back place thought head";

/// Prompts of the wanted kind, one after the other.
#[derive(Debug)]
pub struct Prompts {
    common: Map<String, Value>,
    endpoint: Endpoint,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// The lines of a file, taken in turn.
    Lines(Vec<Map<String, Value>>),
    /// Made up: words of the shared beginning and of the rest.
    Words { seed: u64, shared: usize, own: usize },
}

impl Prompts {
    /// Reads the file or finds out how many words make the wanted number of tokens.
    ///
    /// # Errors
    /// A file or a JSON text that cannot be used, a server that does not count tokens.
    pub async fn new(arguments: &LoadArguments, target: &Target, model: &str) -> anyhow::Result<Self> {
        let mut common = match &arguments.extra {
            None => Map::new(),
            Some(text) => match serde_json::from_str(text).context("--extra")? {
                Value::Object(fields) => fields,
                other => bail!("--extra: wanted a JSON object, found {other}"),
            },
        };
        common.insert("model".into(), model.into());
        common.insert("max_tokens".into(), arguments.max_tokens.get().into());
        let source = Source::Words { seed: arguments.seed, shared: 0, own: 0 };
        let mut prompts = Self { common, endpoint: arguments.endpoint, source };
        prompts.source = match &arguments.prompts {
            Some(file) => Source::Lines(read_lines(file)?),
            None => prompts.measure(arguments, target).await?,
        };
        Ok(prompts)
    }

    /// Two prompts of known numbers of words give tokens for the template and tokens for a word.
    async fn measure(&self, arguments: &LoadArguments, target: &Target) -> anyhow::Result<Source> {
        let wanted = arguments.prompt_tokens.get();
        if arguments.shared_prefix > wanted {
            bail!("--shared-prefix {}: wanted at most the prompt's {wanted} tokens", arguments.shared_prefix);
        }
        // A word may be many tokens: the longer of the two must still fit where the wanted prompt does.
        let (few, many) = (wanted.div_ceil(32), wanted.div_ceil(8));
        let mut counts = [0.0; 2];
        for (count, words) in counts.iter_mut().zip([few, many]) {
            let mut body = self.body(made_up(!arguments.seed, 0, words));
            body["max_tokens"] = 1.into();
            let answer = target.post(self.endpoint.path(), &body).await?;
            let tokens = answer["usage"]["prompt_tokens"].as_u64();
            *count =
                tokens.ok_or_else(|| anyhow!("{}: no usage.prompt_tokens in its answer", target.authority))? as f64;
        }
        let each = if many > few { (counts[1] - counts[0]) / (many - few) as f64 } else { counts[0] / few as f64 };
        let fixed = (counts[0] - each * few as f64).max(0.0);
        let words = |tokens: f64| (tokens / each.max(0.1)).round().max(0.0) as usize;
        let shared = words(arguments.shared_prefix as f64);
        let own = words(wanted as f64 - fixed).saturating_sub(shared).max(1);
        Ok(Source::Words { seed: arguments.seed, shared, own })
    }

    /// The body of request `index`, without `stream`.
    pub fn get(&self, index: usize) -> Value {
        match &self.source {
            Source::Words { seed, shared, own } => {
                let beginning = made_up(*seed, 0, *shared);
                let rest = made_up(*seed, index as u64 + 1, *own);
                self.body([beginning, rest].join(" ").trim_start().to_string())
            }
            Source::Lines(lines) => {
                let mut fields = self.common.clone();
                fields.extend(lines[index % lines.len()].clone());
                Value::Object(fields)
            }
        }
    }

    fn body(&self, text: String) -> Value {
        let mut fields = self.common.clone();
        match self.endpoint {
            Endpoint::Chat => fields.insert("messages".into(), json!([{"role": "user", "content": text}])),
            Endpoint::Completions => fields.insert("prompt".into(), text.into()),
        };
        Value::Object(fields)
    }
}

/// The same body, with its answer as a stream that ends in the server's count.
pub fn streamed(mut body: Value) -> Value {
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body
}

fn made_up(seed: u64, stream: u64, words: usize) -> String {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    let all: Vec<&str> = WORDS.split_whitespace().collect();
    (0..words).map(|_| all[random.random_range(0..all.len())]).collect::<Vec<_>>().join(" ")
}

fn read_lines(file: &Path) -> anyhow::Result<Vec<Map<String, Value>>> {
    let name = file.display();
    let text = std::fs::read_to_string(file).with_context(|| name.to_string())?;
    let mut lines = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value = serde_json::from_str(line).with_context(|| format!("{name}, line {}", number + 1))?;
        match value {
            Value::Object(fields) if fields.contains_key("messages") || fields.contains_key("prompt") => {
                lines.push(fields)
            }
            _ => bail!("{name}, line {}: wanted an object with `messages` or `prompt`", number + 1),
        }
    }
    if lines.is_empty() {
        bail!("{name}: no prompt in it");
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(source: Source) -> Prompts {
        let common = Map::from_iter([("model".to_string(), "m".into()), ("max_tokens".to_string(), 8.into())]);
        Prompts { common, endpoint: Endpoint::Chat, source }
    }

    #[test]
    fn made_up_prompts_share_their_beginning_only() {
        let prompts = prompts(Source::Words { seed: 3, shared: 5, own: 7 });
        let texts: Vec<String> =
            (0..3).map(|i| prompts.get(i)["messages"][0]["content"].as_str().unwrap().to_string()).collect();
        let words: Vec<Vec<&str>> = texts.iter().map(|text| text.split(' ').collect()).collect();
        assert!(words.iter().all(|words| words.len() == 12));
        assert!(words[0][..5] == words[1][..5] && words[1][..5] == words[2][..5]);
        assert!(words[0][5..] != words[1][5..] && words[1][5..] != words[2][5..]);
        assert_eq!(prompts.get(1), prompts.get(1));
    }

    #[test]
    fn files() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.jsonl");
        std::fs::write(&file, "{\"prompt\": \"a\"}\n\n{\"prompt\": \"b\", \"max_tokens\": 2}\n").unwrap();
        let prompts = prompts(Source::Lines(read_lines(&file).unwrap()));
        assert_eq!(prompts.get(0), json!({"model": "m", "max_tokens": 8, "prompt": "a"}));
        assert_eq!(
            (prompts.get(1), prompts.get(2)),
            (json!({"model": "m", "max_tokens": 2, "prompt": "b"}), prompts.get(0))
        );
        for (text, part) in [("", "no prompt"), ("{\n", "line 1"), ("{\"prompt\": 1}\n[1]", "line 2")] {
            std::fs::write(&file, text).unwrap();
            let error = format!("{:#}", read_lines(&file).unwrap_err());
            assert!(error.contains("prompts.jsonl") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_stream_asks_for_usage() {
        assert_eq!(streamed(json!({}))["stream_options"]["include_usage"], true);
    }
}
