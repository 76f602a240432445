"""Bodies made by schemathesis from the server's own OpenAPI document, with our fields in it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

# Anything may stand in our fields; what is near to good values gets further.
ANYTHING: dict[str, Any] = {
    "anyOf": [
        {"type": "number"},
        {"type": "integer", "minimum": -2, "maximum": 3000},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "maxLength": 40},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
        {"type": "object", "maxProperties": 2},
    ]
}
POLICY: dict[str, Any] = {
    "anyOf": [
        {"enum": ["auto", "int8", "int4", "snapkv", "fair(snapkv)", "kvcrush(h2o)@int4", "none"]},
        {"type": "string", "pattern": r"^[a-z0-9(),=@+ ]{0,40}$"},
        *ANYTHING["anyOf"],
    ]
}
SPANS: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": 3,
            "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        },
        {"type": "string", "pattern": r"^[0-9:,-]{0,12}$"},
        *ANYTHING["anyOf"],
    ]
}
OURS = {"kv_policy": POLICY, "kv_budget": ANYTHING, "kv_protect": SPANS, "kv_spans": SPANS}
# So that a request costs no minutes of a CPU. vLLM has no bound of its own that is low enough.
BOUNDS = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), 8),
    **dict.fromkeys(("min_tokens", "n", "best_of", "top_logprobs", "prompt_logprobs"), 2),
}
# Fewer bodies than these say little.
FEWEST = 40
# They would stop or reshape the server, which is what they are for.
LEFT_OUT = "^/(scale_elastic_ep|is_scaling_elastic_ep|pause|resume|sleep|wake_up|metrics)"


def document(url: str, model: str) -> dict[str, Any]:
    """Returns the server's OpenAPI document with our fields in every body that generates text, with
    a model that there is, and with bounds for what would take minutes."""
    with httpx.Client(trust_env=False, timeout=30) as http:
        found: dict[str, Any] = http.get(url + "/openapi.json").json()
    for schema in found["components"]["schemas"].values():
        fields = schema.get("properties", {})
        lengths = {"max_tokens", "max_output_tokens"} & {*fields}
        for name in {*fields} & {*BOUNDS}:
            fields[name] = {"type": "integer", "minimum": 0, "maximum": BOUNDS[name]}
        if "model" in fields:
            fields["model"] = {"enum": [model]}
        if lengths and "model" in fields:
            fields.update(OURS)
            schema["required"] = sorted({*schema.get("required", ()), *lengths})
    return found


@dataclass
class Fuzzed:
    """What the fuzzer saw.

    Attributes:
        answers: number of answers by status.
        errors: requests that got a 5xx: method, path, body, status, and the answer's start.
    """

    answers: Counter[int] = field(default_factory=Counter)
    errors: list[dict[str, Any]] = field(default_factory=list)


def run(
    url: str, model: str, folder: pathlib.Path, tools: pathlib.Path, seconds: float, seed: int
) -> Fuzzed:
    """Lets schemathesis ask a server for some seconds, and longer if it asked little in them.

    Args:
        model: its name there.
        folder: where its files go.
        tools: where scripts/deploy_tools.sh has put it.

    Raises:
        RuntimeError: it could not do its job, or asked hardly anything in many times that.
    """
    schema, har = folder / "openapi.json", folder / "fuzz.har"
    schema.write_text(json.dumps(document(url, model)), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", url),
        *("--phases", "fuzzing", "--checks", "not_a_server_error", "--continue-on-failure"),
        *("--no-shrink", "--suppress-health-check", "all", "--warnings", "off", "--workers", "2"),
        *("--request-timeout", "20", "--exclude-path-regex", LEFT_OUT),
        *("--generation-database", "none"),
        *("--report", "har", "--report-har-path", str(har), "--output-sanitize", "false"),
    ]
    told, found = "", Fuzzed()  # what it says of itself
    # Its time runs while it prepares its first body, which on a busy machine may take all of it.
    for turn, allowed in enumerate((seconds, 3 * seconds, 6 * seconds)):
        done = subprocess.run(
            [*command, "--seed", str(seed + turn), "--max-time", str(int(allowed))],
            cwd=folder,
            env={"PYTHONPATH": str(tools), "PATH": "", "HOME": str(folder), "NO_PROXY": "*"},
            capture_output=True,
            text=True,
            timeout=allowed + 120,
        )
        told = done.stdout[-3000:]
        # 1 is a server error found; which of those are ours is not its to say.
        if done.returncode not in (0, 1):
            raise RuntimeError(f"schemathesis failed:\n{told}\n{done.stderr[-2000:]}")
        more = read(har)
        found.answers += more.answers
        found.errors += more.errors
        if found.answers.total() >= FEWEST:
            return found
    raise RuntimeError(f"schemathesis asked {found.answers.total()} times only:\n{told}")


def read(har: pathlib.Path) -> Fuzzed:
    """Returns what a HAR file of schemathesis's says."""
    found = Fuzzed()
    for entry in json.loads(har.read_text(encoding="utf-8"))["log"]["entries"]:
        status = entry["response"]["status"]
        found.answers[status] += 1
        if status >= 500:
            asked = entry["request"]
            found.errors.append(
                {
                    "method": asked["method"],
                    "path": httpx.URL(asked["url"]).raw_path.decode(),
                    "body": (asked.get("postData") or {}).get("text", ""),
                    "type": next(
                        (
                            h["value"]
                            for h in asked["headers"]
                            if h["name"].lower() == "content-type"
                        ),
                        "application/json",
                    ),
                    "status": status,
                    "answer": (entry["response"].get("content", {}).get("text") or "")[:300],
                }
            )
    return found


def again(url: str, errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Asks another server the same, and returns those that it answers without a 5xx."""
    found = []
    with httpx.Client(trust_env=False, timeout=60, base_url=url) as http:
        for error in errors:
            got = http.request(
                error["method"],
                error["path"],
                content=error["body"].encode(errors="surrogatepass"),
                headers={"Content-Type": error["type"]},
            )
            if got.status_code < 500:
                found.append({**error, "plain": got.status_code})
    return found
