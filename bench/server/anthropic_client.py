"""Judge: Anthropic's own Python client against /v1/messages.

    python bench/server/anthropic_client.py --url http://127.0.0.1:8080

Needs a model with a chat template.
"""

import types

import anthropic

import judge

checks = judge.Checks()
TALK = [{"role": "user", "content": "Say something about the sea."}]
TOOL = {
    "name": "get_weather",
    "description": "The weather at a place.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 10}},
        "required": ["place"],
        "additionalProperties": False,
    },
}


def ask(c, temperature=0, **more):
    # In the body by hand: the client's newest versions have no argument for it any more.
    return c.client.messages.create(
        **{"model": c.model, "max_tokens": 16, "messages": TALK, "extra_body": {"temperature": temperature}, **more})


@checks.check
def message_shape(c):
    answer = ask(c, system="Be brief.")
    assert answer.type == "message" and answer.role == "assistant" and answer.content[0].type in ("text", "thinking")
    assert answer.stop_reason in ("end_turn", "max_tokens") and answer.usage.output_tokens <= 16


@checks.check
def stream_equals_whole(c):
    whole = ask(c)
    with c.client.messages.stream(model=c.model, max_tokens=16, messages=TALK, extra_body={"temperature": 0}) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens


@checks.check
def stop_sequences(c):
    text = "".join(block.text for block in ask(c).content if block.type == "text")
    stop = text[len(text) // 2:][:3]
    if not stop.strip():
        return "no text to stop at"
    answer = ask(c, stop_sequences=[stop])
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == stop
    assert "".join(block.text for block in answer.content if block.type == "text") == text[:text.index(stop)]


@checks.check
def tools(c):
    answer = ask(c, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=120)
    if answer.stop_reason == "max_tokens":
        return "the answer was too long"
    call = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use" and call.name == "get_weather" and isinstance(call.input["place"], str)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "12 degrees"}
    again = TALK + [{"role": "assistant", "content": [call.model_dump()]}, {"role": "user", "content": [result]}]
    assert ask(c, messages=again, tools=[TOOL]).stop_reason


@checks.check
def refusals(c):
    for wrong in ({"max_tokens": 0}, {"messages": []}, {"temperature": 9}):
        try:
            ask(c, **wrong)
        except anthropic.BadRequestError as error:
            assert error.body["type"] == "error" and error.body["error"]["type"] == "invalid_request_error", error.body
        else:
            raise AssertionError(f"no refusal of {wrong}")
    try:
        ask(c, model="no-such-model")
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError("no refusal of another model")


def main():
    options = judge.arguments(__doc__)
    context = types.SimpleNamespace(url=options.url, key=options.key)
    context.client = anthropic.Anthropic(base_url=options.url, api_key=options.key, max_retries=0, timeout=300)
    context.model = judge.get(options.url, "/v1/models", options.key)["data"][0]["id"]
    checks.run(context, options.only)


main()
