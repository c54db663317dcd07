"""Judge: OpenAI's own Python client against every endpoint, as a program that was written for OpenAI would use it.

    python bench/server/openai_client.py --url http://127.0.0.1:8080

Checks say what must hold for any model: shapes, counts, equality of repeated requests, obedience to grammars. None asks
the model to be clever.
"""

import json
import math
import types

import openai

import judge

checks = judge.Checks()
NO_TEMPLATE = "the model has no chat template"
PROMPT = "Once upon a time there was a"
TALK = [{"role": "user", "content": "Say something about the sea."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}},
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}


def complete(c, **more):
    return c.client.completions.create(**{"model": c.model, "prompt": PROMPT, "max_tokens": 12, "seed": 7, **more})


def chat(c, **more):
    return c.client.chat.completions.create(**{"model": c.model, "messages": TALK, "max_tokens": 12, "seed": 7, **more})


def raises(kind, status, call):
    """The client's own error class, with OpenAI's error object in it."""
    try:
        call()
    except kind as error:
        assert error.status_code == status, error.status_code
        assert isinstance(error.body, dict) and error.body["message"] and error.body["type"], error.body
        return error
    raise AssertionError(f"no {kind.__name__}")


@checks.check
def models_list_and_retrieve(c):
    listed = c.client.models.list().data
    assert [model.id for model in listed] == [c.model]
    assert c.client.models.retrieve(c.model).id == c.model
    raises(openai.NotFoundError, 404, lambda: c.client.models.retrieve("no-such-model"))


@checks.check
def completion_shape_and_usage(c):
    answer = complete(c)
    assert answer.object == "text_completion" and len(answer.choices) == 1
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@checks.check
def completion_seed_gives_the_same_text(c):
    first, again = complete(c, temperature=1.0), complete(c, temperature=1.0)
    assert first.choices[0].text == again.choices[0].text
    others = {complete(c, temperature=1.5, seed=seed, max_tokens=16).choices[0].text for seed in range(6)}
    assert len(others) > 1, "the seed changes nothing"


@checks.check
def completion_stream_equals_whole(c):
    whole = complete(c, temperature=0.9, max_tokens=24).choices[0]
    chunks = list(complete(c, temperature=0.9, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.text
    assert [ch.choices[0].finish_reason for ch in chunks if ch.choices][-1] == whole.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


@checks.check
def completion_n_and_best_of(c):
    answer = complete(c, n=3, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(complete(c, n=1, best_of=3, temperature=1.0).choices) == 1


@checks.check
def completion_several_prompts_and_token_prompts(c):
    two = complete(c, prompt=[PROMPT, "The sea"], temperature=0)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == complete(c, temperature=0).choices[0].text
    _, tokens = judge.post(c.url, "/tokenize", {"prompt": PROMPT}, c.key)
    assert complete(c, prompt=tokens["tokens"], temperature=0).choices[0].text == two.choices[0].text


@checks.check
def completion_stop_strings(c):
    whole = complete(c, temperature=0, max_tokens=24).choices[0].text
    for start, length in [(len(whole) // 3, 1), (len(whole) // 2, 3), (len(whole) // 4, 5)]:
        stop = whole[start:start + length]
        if not stop.strip():
            continue
        cut = complete(c, temperature=0, max_tokens=24, stop=[stop, "\u2603"]).choices[0]
        assert cut.text == whole[:whole.index(stop)] and cut.finish_reason == "stop", (stop, cut.text, whole)
        pieces = complete(c, temperature=0, max_tokens=24, stop=stop, stream=True)
        assert "".join(p.choices[0].text for p in pieces if p.choices) == cut.text


@checks.check
def completion_logprobs(c):
    choice = complete(c, logprobs=3, temperature=0).choices[0]
    scores = choice.logprobs
    assert "".join(scores.tokens) == choice.text or "\ufffd" in "".join(scores.tokens)
    for token, own, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs):
        assert own <= 0 and len(top) >= 1 and math.isclose(max(top.values()), own, abs_tol=1e-5), (token, own, top)
        assert sum(math.exp(value) for value in top.values()) <= 1.0001


@checks.check
def completion_echo(c):
    choice = complete(c, echo=True, temperature=0).choices[0]
    assert choice.text.startswith(PROMPT) or PROMPT in choice.text


@checks.check
def completion_logit_bias_forces_a_token(c):
    _, tokens = judge.post(c.url, "/tokenize", {"prompt": " sea", "add_special_tokens": False}, c.key)
    answer = complete(c, logit_bias={str(tokens["tokens"][-1]): 100}, temperature=0, max_tokens=4)
    _, one = judge.post(c.url, "/detokenize", {"tokens": tokens["tokens"][-1:]}, c.key)
    assert answer.choices[0].text.replace(one["prompt"], "") == "", answer.choices[0].text


@checks.check
def completion_penalties_change_the_text(c):
    plain = complete(c, temperature=0, max_tokens=48).choices[0].text
    penalised = complete(c, temperature=0, max_tokens=48, frequency_penalty=2.0, presence_penalty=2.0).choices[0].text
    assert len(set(penalised.split())) >= len(set(plain.split()))


@checks.check
def completion_structured(c):
    body = {"response_format": {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}}
    choice = complete(c, max_tokens=100, extra_body=body).choices[0]
    if choice.finish_reason == "stop":
        valid_pet(choice.text)
    regex = complete(c, max_tokens=30, extra_body={"response_format": {"type": "regex", "regex": "[0-9]{3}-[0-9]{4}"}})
    text = regex.choices[0].text
    assert len(text) == 8 and text[3] == "-" and text.replace("-", "").isdigit(), text
    lark = 'start: "yes" | "no" | "perhaps"'
    text = complete(c, max_tokens=30, extra_body={"response_format": {"type": "lark", "grammar": lark}}).choices[0].text
    assert text in ("yes", "no", "perhaps"), text


def valid_pet(text):
    pet = json.loads(text)
    assert set(pet) == {"name", "age", "kind"} and 0 <= pet["age"] <= 120 and pet["kind"] in ("cat", "dog"), pet


@checks.check
def completion_routing(c):
    answer = complete(c, temperature=0, max_tokens=6, extra_body={"routing": True})
    made = answer.usage.completion_tokens
    check_routing(c, answer.model_extra["routing"], answer.usage.prompt_tokens, made)
    chunks = complete(c, temperature=0, max_tokens=6, stream=True, extra_body={"routing": True})
    streamed = [entry for chunk in chunks for entry in chunk.model_extra["routing"]]
    check_routing(c, streamed, answer.usage.prompt_tokens, made)
    assert streamed == answer.model_extra["routing"], "streamed and whole routing differ"


def check_routing(c, routing, prompt, made):
    places = [entry["position"] for entry in routing]
    assert places == sorted(places) and len(set(places)) == len(places), places
    # The last token made is never read by the model; prefix sharing may leave the routing of shared tokens untold.
    assert sum(not entry["in_prompt"] for entry in routing) in (made, made - 1), (len(routing), prompt, made)
    assert sum(entry["in_prompt"] for entry in routing) <= prompt
    card = c.card
    for entry in routing:
        assert [layer["layer"] for layer in entry["layers"]] in (card["moe_layers"], []), entry
        for layer in entry["layers"]:
            assert len(layer["experts"]) == len(set(layer["experts"])) == card["top_k"] == len(layer["weights"])
            assert all(0 <= expert < card["n_experts"] for expert in layer["experts"])


@checks.check
def completion_refusals(c):
    raises(openai.BadRequestError, 400, lambda: complete(c, temperature=-1))
    raises(openai.BadRequestError, 400, lambda: complete(c, top_p=2))
    raises(openai.BadRequestError, 400, lambda: complete(c, n=0))
    raises(openai.BadRequestError, 400, lambda: complete(c, extra_body={"frobnicate": 1}))
    raises(openai.BadRequestError, 400, lambda: complete(c, prompt="word " * 200000, max_tokens=1))
    raises(openai.NotFoundError, 404, lambda: complete(c, model="no-such-model"))
    bad = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no-such-type"}}}}
    raises(openai.BadRequestError, 400, lambda: complete(c, extra_body=bad))
    raises(openai.BadRequestError, 400, lambda: complete(c, extra_body={"response_format": {"type": "regex", "regex": "("}}))


@checks.check
def chat_shape_and_usage(c):
    if not c.template:
        error = raises(openai.BadRequestError, 400, lambda: chat(c))
        assert "template" in str(error), error
        return NO_TEMPLATE
    answer = chat(c)
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert chat(c, max_tokens=openai.NOT_GIVEN, max_completion_tokens=5).usage.completion_tokens <= 5


@checks.check
def chat_stream_equals_whole(c):
    if not c.template:
        return NO_TEMPLATE
    whole = chat(c, temperature=0.9, max_tokens=24).choices[0]
    chunks = list(chat(c, temperature=0.9, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == (whole.message.content or ""), (text, whole.message.content)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.prompt_tokens > 0 and chunks[-1].choices == []


@checks.check
def chat_n_logprobs_and_system(c):
    if not c.template:
        return NO_TEMPLATE
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    answer = chat(c, messages=messages, n=2, logprobs=True, top_logprobs=2, temperature=1.0)
    assert len(answer.choices) == 2
    for choice in answer.choices:
        for score in choice.logprobs.content:
            assert score.logprob <= 0 and len(score.top_logprobs) == 2
            assert bytes(score.bytes).decode(errors="replace") == score.token or "\ufffd" in score.token


@checks.check
def chat_json_object_and_schema(c):
    if not c.template:
        return NO_TEMPLATE
    choice = chat(c, response_format={"type": "json_object"}, max_tokens=60).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        choice = chat(c, response_format=form, max_tokens=120, temperature=1.2, seed=seed).choices[0]
        if choice.finish_reason == "stop":
            valid_pet(choice.message.content)


@checks.check
def chat_tools(c):
    if not c.template:
        return NO_TEMPLATE
    forced = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", forced):
        answer = chat(c, tools=[TOOL], tool_choice=choice, max_tokens=120).choices[0]
        if answer.finish_reason == "length":
            continue
        assert answer.finish_reason == "tool_calls", answer
        call = answer.message.tool_calls[0]
        weather = json.loads(call.function.arguments)
        assert call.function.name == "get_weather" and weather["unit"] in ("C", "F") and call.id
        again = TALK + [
            answer.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
        ]
        assert chat(c, messages=again, tools=[TOOL]).choices[0].finish_reason
    assert not chat(c, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls


@checks.check
def chat_tools_streamed(c):
    if not c.template:
        return NO_TEMPLATE
    chunks = chat(c, tools=[TOOL], tool_choice="required", max_tokens=120, stream=True)
    deltas, reason = [], None
    for chunk in chunks:
        deltas += chunk.choices[0].delta.tool_calls or []
        reason = chunk.choices[0].finish_reason or reason
    if reason != "length":
        assert reason == "tool_calls" and deltas[0].function.name == "get_weather", deltas
        json.loads("".join(delta.function.arguments or "" for delta in deltas if delta.index == 0))


@checks.check
def chat_refusals(c):
    raises(openai.BadRequestError, 400, lambda: chat(c, messages=[]))
    raises(openai.BadRequestError, 400, lambda: chat(c, messages=[{"role": "wizard", "content": "x"}]))
    raises(openai.BadRequestError, 400, lambda: chat(c, top_logprobs=500, logprobs=True))
    raises(openai.BadRequestError, 400, lambda: chat(c, tools=[{"type": "function"}]))


@checks.check
def responses_whole_and_streamed(c):
    if not c.template:
        return NO_TEMPLATE
    ask = {"model": c.model, "input": "Name a colour.", "instructions": "Be brief.", "max_output_tokens": 16}
    answer = c.client.responses.create(**ask, temperature=0)
    assert answer.object == "response" and answer.status in ("completed", "incomplete")
    assert answer.usage.output_tokens > 0 and answer.output[0].type in ("message", "reasoning")
    events = list(c.client.responses.create(**ask, temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


@checks.check
def responses_structured_and_tools(c):
    if not c.template:
        return NO_TEMPLATE
    form = {"format": {"type": "json_schema", "name": "pet", "schema": SCHEMA, "strict": True}}
    answer = c.client.responses.create(model=c.model, input="A pet.", text=form, max_output_tokens=120)
    if answer.status == "completed":
        valid_pet(answer.output_text)
    tool = {"type": "function", **TOOL["function"], "strict": True}
    answer = c.client.responses.create(
        model=c.model, input="Weather?", tools=[tool], tool_choice="required", max_output_tokens=120)
    calls = [item for item in answer.output if item.type == "function_call"]
    if answer.status == "completed":
        assert calls and json.loads(calls[0].arguments)["unit"] in ("C", "F")


@checks.check
def embeddings(c):
    ask = lambda **more: c.client.embeddings.create(**{"model": c.model, "input": "The sea", **more}).data
    one = ask()[0].embedding
    assert len(one) == c.card["hidden"] and all(math.isfinite(value) for value in one)
    plain = ask(encoding_format="float")[0].embedding
    assert max(abs(a - b) for a, b in zip(one, plain)) < 1e-6
    many = ask(input=["A dog", "The sea", "One more text that is longer than the others"])
    assert [item.index for item in many] == [0, 1, 2]
    assert many[1].embedding == one, "a text's embedding depends on its neighbours"


@checks.check
def tokens_and_back(c):
    for text in ["The sea, the sea", "é 海 🌊\n\t x"]:
        _, tokens = judge.post(c.url, "/tokenize", {"prompt": text, "add_special_tokens": False}, c.key)
        assert tokens["count"] == len(tokens["tokens"])
        _, back = judge.post(c.url, "/detokenize", {"tokens": tokens["tokens"]}, c.key)
        assert back["prompt"].strip() == text.strip(), back
    status, error = judge.post(c.url, "/detokenize", {"tokens": [4000000000]}, c.key)
    assert status == 400 and error["error"]["message"]


@checks.check
def metrics_and_health(c):
    import urllib.request

    read = lambda path: urllib.request.urlopen(c.url + path, timeout=20).read().decode()
    assert urllib.request.urlopen(c.url + "/health").status == 200 and urllib.request.urlopen(c.url + "/ready").status == 200
    lines = [line for line in read("/metrics").splitlines() if line and not line.startswith("#")]
    assert len(lines) > 10 and all(len(line.rsplit(" ", 1)) == 2 for line in lines)
    assert [float(line.rsplit(" ", 1)[1]) for line in lines]


@checks.check
def other_paths_and_methods(c):
    status, error = judge.post(c.url, "/v1/no-such-path", {}, c.key)
    assert status == 404 and error["error"]["message"]
    status, error = judge.post(c.url, "/v1/models", {}, c.key)
    assert status == 405 and error["error"]["message"]


def main():
    options = judge.arguments(__doc__)
    context = types.SimpleNamespace(url=options.url, key=options.key)
    context.client = openai.OpenAI(base_url=options.url + "/v1", api_key=options.key, max_retries=0, timeout=300)
    context.card = judge.get(options.url, "/v1/moebius/model", options.key)
    context.model = context.card["name"]
    context.template = context.card.get("chat_template", True)
    checks.run(context, options.only)


main()
