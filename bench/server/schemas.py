"""Judge: texts that a JSON schema asks for, checked by another program.

    python bench/server/schemas.py --url http://127.0.0.1:8080 [--suite DIR] [--limit 100]

Takes the schemas of the official JSON-Schema-Test-Suite where DIR holds its folder `tests/draft2020-12` (the source
package of PyPI's `jsonschema` has it under `json/`), and a few of its own. A schema that the server does not take must be
a 400 with the error object; an answer that ends by itself must be valid by jsonschema-rs. Answers cut by length prove
nothing and are counted.
"""

import collections
import json
import pathlib
import sys

import jsonschema_rs

import judge

OWN = [
    {"type": "integer", "minimum": -3, "maximum": 17},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 2},
    {"enum": ["a", 1, None, [1, 2], {"b": True}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string", "maxLength": 3}], "items": False},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}]},
    {"$defs": {"tree": {"type": "object", "properties": {"v": {"type": "boolean"}, "l": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
                        "required": ["v", "l"], "additionalProperties": False}}, "$ref": "#/$defs/tree"},
    {"type": "object", "properties": {"é\"\\": {"const": "ü\n"}}, "required": ["é\"\\"], "additionalProperties": False},
]


def schemas(folder, limit):
    yield from (("own", schema) for schema in OWN)
    if folder is None:
        return
    files = sorted(pathlib.Path(folder, "tests/draft2020-12").glob("*.json"))
    if not files:
        sys.exit(f"{folder}: no tests/draft2020-12 in it")
    groups = [(file.stem, group["schema"]) for file in files for group in json.loads(file.read_text())]
    yield from groups[:: max(1, len(groups) // limit)]


def main():
    options = judge.arguments(__doc__, suite={"default": None}, limit={"type": int, "default": 100}, tokens={"type": int, "default": 80})
    model = judge.get(options.url, "/v1/models", options.key)["data"][0]["id"]
    valid = cut = refused = 0
    faults, reasons = [], collections.Counter()
    for number, (source, schema) in enumerate(schemas(options.suite, options.limit)):
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        body = {"model": model, "prompt": "JSON: ", "max_tokens": options.tokens, "seed": number, "temperature": 1.0, "response_format": form}
        status, answer = judge.post(options.url, "/v1/completions", body, options.key)
        if status == 400 and source != "own" and answer["error"]["message"]:
            refused += 1
            reasons[answer["error"]["message"][:100]] += 1
            continue
        if status != 200:
            faults.append((source, schema, f"status {status}: {answer}"))
            continue
        choice = answer["choices"][0]
        if choice["finish_reason"] != "stop":
            cut += 1
            continue
        try:
            fits = jsonschema_rs.validator_for(schema).is_valid(json.loads(choice["text"]))
        except ValueError as error:
            fits = False
            choice["text"] += f" ({error})"
        if fits:
            valid += 1
        else:
            faults.append((source, schema, choice["text"]))
    for source, schema, text in faults:
        print(f"FAIL {source}: {json.dumps(schema)}\n     {text}")
    for reason, count in reasons.most_common(12):
        print(f"{count:4} refused: {reason}")
    print(f"{valid} valid, {cut} cut by length, {refused} refused with 400, {len(faults)} wrong")
    sys.exit(1 if faults else 0)


main()
