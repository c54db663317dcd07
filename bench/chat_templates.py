"""Renders published chat templates with transformers, for
`cargo run -p moebius-engine --example chat_templates out.json`.

    python bench/chat_templates.py out.json FOLDER...

Each FOLDER holds a tokenizer_config.json (or a chat_template.jinja beside it); a .gguf or a .jinja file may stand in its
place.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "crates/engine/tests/fixtures"))
from templates import CONVERSATIONS, TOOLS  # noqa: E402
from transformers.utils.chat_template_utils import _compile_jinja_template  # noqa: E402

MORE = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                  {"role": "user", "content": "c"}], "add_generation_prompt": True},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Köln?"}],
     "tools": TOOLS, "add_generation_prompt": True},
    {"messages": [{"role": "user", "content": "Weather?"},
                  {"role": "assistant", "content": "", "tool_calls": [
                      {"id": "abcdefghi", "type": "function",
                       "function": {"name": "weather", "arguments": "{\"place\": \"Köln\"}"}}]},
                  {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "grey"},
                  {"role": "assistant", "content": "Grey."}, {"role": "user", "content": "Thanks"}],
     "tools": TOOLS, "add_generation_prompt": True},
]
NAMES = ["bos_token", "eos_token", "unk_token", "pad_token"]


def source(path):
    """Template and special tokens."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        tokens = fields["tokenizer.ggml.tokens"]
        ids = {name: fields.get(f"tokenizer.ggml.{name}_id") for name in NAMES}
        special = {name: tokens.contents(field.contents()) for name, field in ids.items() if field is not None}
        return fields["tokenizer.chat_template"].contents(), special
    if path.suffix == ".jinja":
        return path.read_text(), {"bos_token": "<s>", "eos_token": "</s>"}
    config = json.loads((path / "tokenizer_config.json").read_text())
    jinja = path / "chat_template.jinja"
    template = jinja.read_text() if jinja.exists() else config.get("chat_template")
    special = {name: config[name] for name in NAMES if config.get(name)}
    return template, {name: t if isinstance(t, str) else t["content"] for name, t in special.items()}


def render(template, special, conversation):
    tools = conversation.get("tools")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named["tool_use"] if tools and "tool_use" in named else named["default"]
    messages = []
    for message in conversation["messages"]:
        reasoning = message.get("reasoning_content")
        messages.append({"thinking": reasoning, **message} if reasoning is not None else message)
    try:
        return {"wanted": _compile_jinja_template(template).render(
            messages=messages, tools=tools, documents=None,
            add_generation_prompt=conversation.get("add_generation_prompt", False),
            **special, **conversation.get("variables", {}))}
    except Exception as error:
        return {"refused": str(error)}


def main():
    out = []
    for path in map(Path, sys.argv[2:]):
        template, special = source(path)
        if template is None:
            print(f"{path}: no template")
            continue
        cases = [{**conversation, **render(template, special, conversation)}
                 for conversation in CONVERSATIONS + MORE]
        out.append({"name": path.parent.parent.name if path.name == "models" else path.name, "template": template,
                    "special": special, "cases": cases})
    Path(sys.argv[1]).write_text(json.dumps(out, ensure_ascii=False))


main()
