//! The interfaces, over HTTP: whole and streamed, and what each field does.

mod common;

use common::{CONTEXT, Running, chat, options};
use serde_json::{Value, json};

#[test]
fn streams_say_what_whole_answers_say() {
    let server = Running::start(options());
    let fields = json!({"seed": 7, "n": 2, "logprobs": true, "top_logprobs": 3});
    let whole = server.chat("Hallo", fields.clone()).ok();
    let mut streaming = fields;
    streaming["stream"] = json!(true);
    streaming["stream_options"] = json!({"include_usage": true});
    let streamed = server.chat("Hallo", streaming);
    for index in 0..2 {
        assert_eq!(whole["choices"][index]["message"]["content"], streamed.streamed(index));
        let events = streamed.events();
        let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
        let scores: Vec<Value> = choices
            .filter(|choice| choice["index"] == index)
            .filter_map(|choice| choice["logprobs"]["content"].as_array())
            .flatten()
            .cloned()
            .collect();
        assert_eq!(whole["choices"][index]["logprobs"]["content"], json!(scores));
        assert_eq!(scores[0]["top_logprobs"].as_array().unwrap().len(), 3);
    }
    assert_ne!(whole["choices"][0]["message"], whole["choices"][1]["message"], "seeds differ");
    let events = streamed.events();
    assert_eq!(events.last().unwrap()["usage"], {
        let mut usage = whole["usage"].clone();
        usage["prompt_tokens_details"] = events.last().unwrap()["usage"]["prompt_tokens_details"].clone();
        usage
    });
    assert!(streamed.body.ends_with("data: [DONE]\n\n"));
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");

    let text = |answer: &Value| -> String {
        answer["choices"].as_array().unwrap().iter().filter_map(|choice| choice["text"].as_str()).collect()
    };
    let mut body = json!({"model": "small", "prompt": "Es war", "max_tokens": 20, "seed": 3, "logprobs": 2});
    let whole = server.post("/v1/completions", &body).ok();
    body["stream"] = json!(true);
    let streamed: String = server.post("/v1/completions", &body).events().iter().map(text).collect();
    assert_eq!(text(&whole), streamed);
    assert_eq!(whole["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 20);
}

#[test]
fn all_conversation_interfaces_write_the_same() {
    let server = Running::start(options());
    let wanted = server.chat("Guten Tag", json!({"temperature": 0})).content();
    let message = json!({"model": "small", "max_tokens": 24, "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Guten Tag"}]}]});
    let anthropic = server.post("/v1/messages", &message).ok();
    assert_eq!((&anthropic["content"][0]["text"], &anthropic["stop_reason"]), (&json!(wanted), &json!("max_tokens")));
    let mut streaming = message.clone();
    streaming["stream"] = json!(true);
    let events = server.post("/v1/messages", &streaming).events();
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(text, wanted);
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!((kinds[0], kinds[kinds.len() - 1]), ("message_start", "message_stop"));
    let counted = json!({"model": "small", "messages": message["messages"]});
    let counted = server.post("/v1/messages/count_tokens", &counted).ok();
    assert_eq!(counted["input_tokens"], "<user>Guten Tag<assistant>".len());

    let request = json!({"model": "small", "input": "Guten Tag", "temperature": 0, "max_output_tokens": 24});
    let response = server.post("/v1/responses", &request).ok();
    assert_eq!(response["output"][0]["content"][0]["text"], wanted);
    assert_eq!(
        (&response["status"], &response["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    let mut streaming = request;
    streaming["stream"] = json!(true);
    let events = server.post("/v1/responses", &streaming).events();
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let text: String = deltas.filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(text, wanted);
    assert!(events.iter().enumerate().all(|(number, event)| event["sequence_number"] == number));
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0]["text"], wanted);
}

#[test]
fn routing_names_every_token() {
    let server = Running::start(options());
    let check = |routing: &[Value]| {
        let prompt = "<user>abc<assistant>".len();
        assert_eq!(routing.len(), prompt + 5);
        for (position, entry) in routing.iter().enumerate() {
            assert_eq!(entry["position"], position);
            assert_eq!(entry["in_prompt"], position < prompt);
            let layers = entry["layers"].as_array().unwrap();
            assert!(layers.iter().enumerate().all(|(index, layer)| layer["layer"] == index), "{entry}");
            let weights = layers[1]["weights"].as_array().unwrap();
            assert_eq!((layers.len(), layers[0]["experts"].as_array().unwrap().len(), weights.len()), (2, 2, 2));
            let sum: f64 = weights.iter().map(|weight| weight.as_f64().unwrap()).sum();
            assert!((sum - 1.0).abs() < 1e-5);
        }
        assert_eq!(routing[6]["text"], "a");
    };
    for _ in 0..2 {
        let fields = json!({"routing": true, "max_tokens": 5, "seed": 1});
        check(server.chat("abc", fields.clone()).ok()["routing"].as_array().unwrap());
        let mut streaming = fields;
        streaming["stream"] = json!(true);
        let events = server.chat("abc", streaming).events();
        assert!(events.iter().all(|event| event["routing"].is_array()));
        let all: Vec<Value> = events.iter().flat_map(|event| event["routing"].as_array().unwrap().clone()).collect();
        check(&all);
    }
    let stats = server.get("/v1/moebius/stats").ok();
    assert_eq!(stats["expert_load"].as_array().unwrap().len(), 2);
    assert!(stats["expert_bytes_per_token"].as_f64().unwrap() > 0.0);
    let card = server.get("/v1/moebius/model").ok();
    assert_eq!((&card["moe_layers"], &card["n_experts"], &card["top_k"]), (&json!([0, 1]), &json!(4), &json!(2)));
}

#[test]
fn answers_have_the_form_asked_for() {
    let server = Running::start(options());
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "yy"]}}, "required": ["a", "b"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": true}});
    for seed in 0..4 {
        let text = server.chat("go", json!({"response_format": format, "seed": seed, "max_tokens": 200})).content();
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(value["a"].as_u64().unwrap() < 100 && ["x", "yy"].contains(&value["b"].as_str().unwrap()), "{text}");
    }
    let regex = json!({"response_format": {"type": "regex", "regex": "[0-9]{4}-[0-9]{2}"}});
    let text = server.chat("go", regex).content();
    assert!(text.len() == 7 && text.as_bytes()[4] == b'-', "{text}");
    let lark = json!({"response_format": {"type": "lark", "grammar": "start: \"yes\" | \"no\""}});
    assert!(["yes", "no"].contains(&&server.chat("go", lark).content()[..]));
    let format = json!({"format": {"type": "json_schema", "name": "s", "schema": schema}});
    let request = json!({"model": "small", "input": "x", "text": format, "seed": 1, "max_output_tokens": 200});
    let response = server.post("/v1/responses", &request).ok();
    assert!(serde_json::from_str::<Value>(response["output"][0]["content"][0]["text"].as_str().unwrap()).is_ok());
}

#[test]
fn a_tool_that_must_be_called_is_called() {
    let server = Running::start(options());
    let parameters = json!({"type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"],
        "additionalProperties": false});
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": parameters}}]);
    let fields =
        json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 200, "seed": 5});
    let answer = server.chat("?", fields.clone()).ok();
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null),
        "{answer}"
    );
    let call = &choice["message"]["tool_calls"][0]["function"];
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(call["name"] == "weather" && ["Ulm", "Bonn"].contains(&arguments["city"].as_str().unwrap()));
    let mut streaming = fields;
    streaming["stream"] = json!(true);
    let events = server.chat("?", streaming).events();
    let deltas: Vec<&Value> =
        events.iter().filter_map(|event| event["choices"][0]["delta"].get("tool_calls")).collect();
    assert_eq!((deltas.len(), &deltas[0][0]["function"], &deltas[0][0]["index"]), (1, call, &json!(0)));

    let tool = json!({"name": "weather", "input_schema": parameters});
    let message = json!({"model": "small", "max_tokens": 200, "seed": 5, "messages": [{"role": "user", "content": "?"}],
        "tools": [tool], "tool_choice": {"type": "tool", "name": "weather"}});
    let answer = server.post("/v1/messages", &message).ok();
    let block = &answer["content"][0];
    assert_eq!(
        (&answer["stop_reason"], &block["type"], &block["name"]),
        (&json!("tool_use"), &json!("tool_use"), &json!("weather"))
    );
    assert!(block["input"]["city"].is_string());
    let follow = json!({"model": "small", "max_tokens": 5, "messages": [{"role": "user", "content": "?"},
        {"role": "assistant", "content": [block]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": "rain"}]}]});
    server.post("/v1/messages", &follow).ok();

    let tool = json!({"type": "function", "name": "weather", "parameters": parameters});
    let request = json!({"model": "small", "input": "?", "tools": [tool], "tool_choice": "required",
        "seed": 5, "max_output_tokens": 200, "parallel_tool_calls": false});
    let item = server.post("/v1/responses", &request).ok()["output"][0].clone();
    assert_eq!((&item["type"], &item["name"]), (&json!("function_call"), &json!("weather")));
}

#[test]
fn every_form_of_calls_can_be_demanded() {
    let parameters = json!({"type": "object", "required": ["city", "days"], "additionalProperties": false, "properties": {
        "city": {"type": "string", "enum": ["Ulm", "Bonn"]}, "days": {"enum": [1, 2]}, "exact": {"type": "boolean"}}});
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": parameters}}]);
    let fields = json!({"tools": tools, "tool_choice": "required", "max_tokens": 1300, "seed": 5, "temperature": 2,
        "parallel_tool_calls": false});
    for marks in [
        "<tool_call>",
        "<tool_call><function=a><parameter=b>",
        "<tool_call>{name}<arg_key>",
        "<minimax:tool_call></minimax:tool_call>",
        "<｜tool▁calls▁begin｜>```json",
        "<｜tool▁calls▁begin｜>",
        "<|tool_calls_section_begin|>",
        "[TOOL_CALLS]",
        "[TOOL_CALLS][ARGS]",
        "<|tool_call|>",
        "<|tool_list_start|>",
        "<|python_start|>",
        "<|channel|>",
    ] {
        let template = format!("{{# {marks} #}}{{% for message in messages %}}<{{{{ message.role }}}}>{{% endfor %}}");
        let server = Running::with_template(options(), &template);
        let answer = server.chat("?", fields.clone()).ok();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{marks}: {answer}");
        let call = &choice["message"]["tool_calls"][0]["function"];
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        assert!(call["name"] == "weather" && ["Ulm", "Bonn"].contains(&arguments["city"].as_str().unwrap()), "{marks}");
        assert!([json!(1), json!(2)].contains(&arguments["days"]), "{marks}: {arguments}");
        let mut streaming = fields.clone();
        streaming["stream"] = json!(true);
        let events = server.chat("?", streaming).events();
        let deltas: Vec<&Value> =
            events.iter().filter_map(|event| event["choices"][0]["delta"].get("tool_calls")).collect();
        assert_eq!((deltas.len(), &deltas[0][0]["function"]), (1, call), "{marks}");
    }
}

#[test]
fn responses_have_scores_where_asked_for() {
    let server = Running::start(options());
    let mut request = json!({"model": "small", "input": "Guten Tag", "max_output_tokens": 12, "seed": 4});
    let plain = server.post("/v1/responses", &request).ok();
    assert_eq!(plain["output"][0]["content"][0]["logprobs"], json!([]));
    request["include"] = json!(["message.output_text.logprobs"]);
    request["top_logprobs"] = json!(2);
    let whole = server.post("/v1/responses", &request).ok();
    let part = &whole["output"][0]["content"][0];
    let scores = part["logprobs"].as_array().unwrap();
    assert_eq!(part["text"], plain["output"][0]["content"][0]["text"]);
    let bytes: Vec<u8> = (scores.iter().flat_map(|score| score["bytes"].as_array().unwrap()))
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(part["text"], *String::from_utf8_lossy(&bytes));
    assert!(scores.iter().all(|score| score["logprob"].as_f64().unwrap() <= 0.0));
    assert_eq!(scores[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(whole["usage"]["output_tokens_details"]["reasoning_tokens"], 0);
    request["stream"] = json!(true);
    let events = server.post("/v1/responses", &request).events();
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let streamed: Vec<Value> = deltas.flat_map(|event| event["logprobs"].as_array().unwrap().clone()).collect();
    let done = events.iter().find(|event| event["type"] == "response.output_text.done").unwrap();
    assert_eq!((&json!(streamed), &done["logprobs"]), (&part["logprobs"], &part["logprobs"]));
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0]["logprobs"], part["logprobs"]);
    request["top_logprobs"] = json!(21);
    assert_eq!(server.post("/v1/responses", &request).error()["param"], "top_logprobs");
}

#[test]
fn thoughts_are_counted() {
    // The prompt opens the thoughts, and nothing closes them.
    let server = Running::with_template(options(), "{{ messages[0].content }}<think>");
    let fields = json!({"seed": 3, "max_tokens": 20});
    let whole = server.chat("a", fields.clone()).ok();
    let counted = |usage: &Value| usage["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    let written = whole["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(written > 0 && counted(&whole["usage"]) == written, "{whole}");
    let mut streaming = fields;
    streaming["stream"] = json!(true);
    streaming["stream_options"] = json!({"include_usage": true});
    let events = server.chat("a", streaming).events();
    assert_eq!(counted(&events.last().unwrap()["usage"]), written);
    let request = json!({"model": "small", "input": "a", "seed": 3, "max_output_tokens": 20, "top_logprobs": 1});
    let response = server.post("/v1/responses", &request).ok();
    assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], written);
    assert_eq!(response["output"][0]["type"], "reasoning");
}

#[test]
fn completions_take_all_kinds_of_prompts() {
    let server = Running::start(options());
    let ask = |fields: Value| {
        let mut body = json!({"model": "small", "max_tokens": 6, "temperature": 0});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.post("/v1/completions", &body)
    };
    let one = ask(json!({"prompt": "ab"})).ok()["choices"][0]["text"].clone();
    assert_eq!(ask(json!({"prompt": [97, 98]})).ok()["choices"][0]["text"], one);
    let two = ask(json!({"prompt": ["ab", "xyz"], "n": 2})).ok();
    assert_eq!((two["choices"].as_array().unwrap().len(), &two["choices"][1]["text"]), (4, &one));
    assert_eq!(two["usage"]["prompt_tokens"], 5);
    let echoed = ask(json!({"prompt": "ab", "echo": true, "logprobs": 1, "max_tokens": 0})).ok();
    let scores = &echoed["choices"][0]["logprobs"];
    assert_eq!(echoed["choices"][0]["text"], "ab");
    assert!(scores["token_logprobs"][0].is_null() && scores["token_logprobs"][1].as_f64().unwrap() < 0.0, "{scores}");
    assert_eq!(scores["text_offset"], json!([0, 1]));
    // Of several texts the one with the best score, which is among those of the same seeds.
    let all = ask(json!({"prompt": "ab", "n": 3, "seed": 4, "temperature": 1})).ok();
    let best = ask(json!({"prompt": "ab", "best_of": 3, "seed": 4, "temperature": 1})).ok();
    assert!(all["choices"].as_array().unwrap().iter().any(|choice| choice["text"] == best["choices"][0]["text"]));
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
}

#[test]
fn embeddings_and_tokens() {
    let server = Running::start(options());
    let ask = |fields: Value| {
        let mut body = json!({"model": "small", "input": ["one", "two"]});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.post("/v1/embeddings", &body).ok()
    };
    let floats = ask(json!({}));
    let vector: Vec<f64> =
        floats["data"][1]["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    assert_eq!(vector.len(), 32);
    assert!((vector.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    assert_eq!(floats["usage"]["total_tokens"], 6);
    let encoded = ask(json!({"encoding_format": "base64"}));
    assert_eq!(encoded["data"][1]["embedding"].as_str().unwrap().len(), 172);
    assert_ne!(ask(json!({"pooling": "last"}))["data"][0], floats["data"][0]);

    let tokens = server.post("/tokenize", &json!({"prompt": "aé"})).ok();
    assert_eq!((&tokens["tokens"], &tokens["max_model_len"]), (&json!([97, 195, 169]), &json!(CONTEXT)));
    let text = server.post("/detokenize", &json!({"tokens": [97, 195, 169, 256]})).ok();
    assert_eq!(text["prompt"], "aé<|end|>");
    let chat = server.post("/tokenize", &json!({"messages": [{"role": "user", "content": "x"}]})).ok();
    assert_eq!(chat["count"], "<user>x<assistant>".len());
}

#[test]
fn what_is_known_of_a_prompt_is_told() {
    let server = Running::start(options());
    let text = "All work and no play. ".repeat(20);
    let usage = |answer: Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(usage(server.chat(&text, json!({})).ok()), 0);
    let cached = usage(server.chat(&text, json!({})).ok());
    assert!(cached >= 384 && cached.is_multiple_of(64), "{cached}");
    let stats = server.get("/v1/moebius/stats").ok();
    assert!(stats["cache"]["prefix_tokens_reused"].as_u64().unwrap() >= cached, "{stats}");
    assert!(stats["cache"]["bytes_used"].as_u64().unwrap() > 0);
}

#[test]
fn what_the_server_says_of_itself() {
    let server = Running::start(options());
    assert_eq!(server.get("/v1/models").ok()["data"][0]["id"], "small");
    assert_eq!(server.get("/v1/models/small").ok()["id"], "small");
    assert_eq!(server.get("/health").ok()["status"], "ok");
    assert_eq!(server.get("/ready").ok()["status"], "ready");
    let written = server.chat("x", json!({})).ok()["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((1..=24).contains(&written), "{written}");
    let metrics = server.get("/metrics");
    assert!(metrics.head.contains("content-type: text/plain"));
    for name in [
        "moebius_http_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "moebius_expert_tokens_total{expert=\"3\",layer=\"1\"}",
        "moebius_expert_bytes_per_token{most_sequences=\"1\"}",
        &format!("moebius_generated_tokens_total {written}\n"),
    ] {
        assert!(metrics.body.contains(name), "{name} in\n{}", metrics.body);
    }
    let document = server.get("/openapi.json").ok();
    assert!(document["paths"]["/v1/chat/completions"]["post"]["responses"]["429"].is_object());
    assert!(server.get("/").body.contains("<html"));
    assert!(server.chat("x", json!({})).head.contains("x-request-id: req-"));
    let body = chat("x", json!({})).to_string();
    let given =
        server.send(&common::head("/v1/chat/completions", body.len(), "x-request-id: mine-7\r\n"), body.as_bytes());
    assert!(given.head.contains("x-request-id: mine-7"));
}
