"""What the judges share: a list of named checks, run one by one, with a verdict at the end."""

import argparse
import json
import sys
import time
import traceback
import urllib.request


def arguments(description, **more):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server, without /v1")
    parser.add_argument("--key", default="none", help="API key")
    parser.add_argument("--only", default="", help="run checks whose name holds this")
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


def get(url, path, key="none"):
    """GET of a JSON document."""
    request = urllib.request.Request(url + path, headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def post(url, path, body, key="none"):
    """POST: status and JSON of the answer, whatever the status."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Checks:
    """Functions marked with `@checks.check` or `@checks.check(needs=...)`."""

    def __init__(self):
        self.all = []

    def check(self, function):
        self.all.append(function)
        return function

    def run(self, context, only=""):
        """Runs them; a check that returns a text was left out for that reason. Ends the program."""
        failed = left_out = 0
        chosen = [check for check in self.all if only in check.__name__]
        for check in chosen:
            begun = time.monotonic()
            try:
                reason = check(context)
            except Exception:
                failed += 1
                print(f"FAIL  {check.__name__}")
                traceback.print_exc(limit=-2, file=sys.stdout)
                continue
            left_out += reason is not None
            mark, note = ("  --", f" (left out: {reason})") if reason else ("  ok", f" ({time.monotonic() - begun:.2f} s)")
            print(f"{mark}  {check.__name__}{note}")
        print(f"{len(chosen) - failed - left_out} ok, {failed} failed, {left_out} left out")
        sys.exit(1 if failed else 0)
