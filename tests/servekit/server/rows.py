"""Bad requests as data: what is sent, and how it must be answered."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

VOCAB = 258
LENGTH = 1024
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Row:
    """``words`` must stand in the message; ``body`` is sent as it is where it is bytes."""

    id: str
    path: str
    body: Any
    code: str
    param: str | None = None
    words: tuple[str, ...] = ()
    status: int = 400
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "M", "prompt": "hi", "max_tokens": 4} | changes


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "M", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | changes


def one(number: int, code: str, name: str, value: Any, *words: str, param: str | None = None, status: int = 400) -> Row:
    """A good completion with one field changed."""
    return Row(f"srv-{number:03}", COMPLETIONS, completion(**{name: value}), code, param or name, words, status)


def said(number: int, code: str, name: str, value: Any, *words: str, param: str | None = None) -> Row:
    """A good chat with one field changed."""
    return Row(f"srv-{number:03}", CHAT, chat(**{name: value}), code, param or name, words)


def raw(number: int, body: bytes, code: str, param: str | None = None, *words: str, path: str = COMPLETIONS) -> Row:
    return Row(f"srv-{number:03}", path, body, code, param, words)


def typed(number: int, kind: str | None, code: str, *words: str, body: bytes = b"{}", encoding: str = "") -> Row:
    """Refused by its headers."""
    headers = {} if kind is None else {"Content-Type": kind}
    if encoding:
        headers["Content-Encoding"] = encoding
    return Row(f"srv-{number:03}", COMPLETIONS, body, code, None, words, 415, headers=headers)


def good(text: str) -> bytes:
    """The good completion with raw JSON in place of its last brace."""
    return json.dumps(completion()).encode()[:-1] + text.encode() + b"}"


def message(number: int, content: Any, code: str, param: str, *words: str) -> Row:
    return said(number, code, "messages", [content], *words, param=param)


NESTED: dict[str, Any] = {}
for _ in range(64):
    NESTED = {"k": NESTED}
JSON = "application/json"
DEEP = b'{"model":"M","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

BODIES = [
    raw(1, b"", "invalid_json", None, "empty body"),
    raw(2, b'{"model":', "invalid_json", None, "byte 9"),
    raw(3, b"[]", "invalid_type", None, "got array, want object", path=CHAT),
    raw(4, b"null", "invalid_type", None, "got null, want object"),
    raw(5, b'"' + b"a" * 1000 + b'"', "invalid_type", None, "got string"),
    raw(6, DEEP, "json_too_deep", None, "64", "--max-json-depth", path=CHAT),
    one(7, "json_too_deep", "metadata", NESTED, "65", "64", "--max-json-depth"),
    raw(8, good(', "max_tokens": 1000000'), "duplicate_key", "max_tokens", "max_tokens"),
    raw(9, b'{"model":"M","prompt":"\xff\xfe"}', "invalid_utf8", None, "byte 23"),
    raw(10, b'{"model":"M","prompt":"\\ud800"}', "invalid_unicode", "prompt", "position 0", "lone surrogate"),
    raw(
        11,
        b'{"model":"M","messages":[{"role":"user","content":"ok \\udfff tail"}]}',
        "invalid_unicode",
        "messages[0].content",
        "position 3",
        path=CHAT,
    ),
    raw(13, good(', "temperature": NaN'), "invalid_json", None, "NaN is not JSON"),
    raw(14, good(', "temperature": Infinity'), "invalid_json", None, "Infinity is not JSON"),
    raw(15, good(', "temperature": 1e400'), "out_of_range", "temperature", "finite", "0..2"),
    raw(16, b'{"model":"M","prompt":"hi","max_tokens":1' + b"0" * 5000 + b"}", "invalid_json", None, "too long"),
    typed(19, JSON, "unsupported_content_encoding", "gzip", "identity", encoding="gzip", body=b"\x1f\x8b"),
    typed(20, JSON, "unsupported_content_encoding", "br", encoding="br"),
    typed(21, "text/plain", "unsupported_media_type", "text/plain", JSON),
    typed(22, "application/x-www-form-urlencoded", "unsupported_media_type", JSON, body=b"prompt=hi"),
    typed(23, "multipart/form-data; boundary=x", "unsupported_media_type", body=b"--x\r\n\r\n" * 100_000),
    typed(24, None, "unsupported_media_type"),
    typed(25, f"{JSON}; charset=utf-16", "unsupported_charset", "utf-16", "utf-8", body="{}".encode("utf-16")),
    raw(32, b'{"prompt":"hi"}', "missing_field", "model"),
    raw(33, b'{"model":"M"}', "missing_field", "prompt"),
]

NAMES = [
    one(34, "model_not_found", "model", "no-such-model", "no-such-model", status=404),
    one(35, "model_not_found", "model", "../../../etc/passwd", status=404),
    one(36, "model_not_found", "model", "x" * 1_000_000, status=404),
    one(37, "invalid_type", "model", 5, "integer", "string"),
    one(39, "unknown_field", "frobnicate", 1, "--ignore-unknown-fields"),
    one(40, "unknown_field", "trust_remote_code", True),
    one(41, "unknown_field", "__class__", {"__init__": 1}),
    one(62, "unsupported", "suffix", "x"),
    one(58, "prompt_embeds_disabled", "prompt_embeds", "UEsDBAoAAAAA", "--enable-prompt-embeds"),
    one(115, "unsupported", "priority", 10**9, "--allow-request-priority"),
]

PROMPTS = [
    one(42, "empty_prompt", "prompt", ""),
    one(43, "empty_prompt", "prompt", []),
    one(44, "empty_prompt", "prompt", ["", ""], param="prompt[0]"),
    one(45, "empty_prompt", "prompt", [[]], param="prompt[0]"),
    one(46, "invalid_type", "prompt", [1, "a"], param="prompt[1]"),
    one(47, "invalid_type", "prompt", [1.5], "number", "integer", param="prompt[0]"),
    one(48, "out_of_range", "prompt", [-1], "-1", f"0..{VOCAB - 1}", param="prompt[0]"),
    one(49, "out_of_range", "prompt", [VOCAB], f"{VOCAB}", f"0..{VOCAB - 1}", param="prompt[0]"),
    one(50, "out_of_range", "prompt", [2**31], "2147483648", param="prompt[0]"),
    one(51, "invalid_type", "prompt", {"text": "hi"}, "object"),
    one(52, "context_length_exceeded", "prompt", [5] * LENGTH, f"{LENGTH}", "max_tokens", "--max-model-len"),
    one(53, "context_length_exceeded", "prompt", "a" * (24 << 20), "--max-model-len"),
    one(54, "out_of_range", "prompt", ["hi"] * 257, "257", "256", "--max-prompts"),
    Row("srv-055", COMPLETIONS, completion(prompt=["hi"] * 256, n=16), "out_of_range", "n", ("4096", "--max-seqs")),
]

NUMBERS = [
    one(63, "out_of_range", "max_tokens", 2**63, "9223372036854775808", "--max-model-len"),
    one(64, "out_of_range", "max_tokens", -1, "-1", f"1..{LENGTH}"),
    one(65, "invalid_type", "max_tokens", 4.5, "number", "integer"),
    one(66, "invalid_type", "max_tokens", "4", "string", "integer"),
    one(67, "out_of_range", "n", 0, "0", "1..16", "--max-n"),
    one(68, "out_of_range", "n", -1, "-1"),
    one(69, "out_of_range", "n", 17, "17", "16", "--max-n"),
    one(70, "out_of_range", "n", 10**9, "1000000000", "16", "--max-n"),
    one(71, "out_of_range", "best_of", 10**6, "1000000", "16", "--max-n"),
    one(72, "out_of_range", "temperature", -0.1, "-0.1", "0..2"),
    one(73, "out_of_range", "temperature", 2.0001, "2.0001", "0..2"),
    one(74, "invalid_type", "temperature", "hot", "string", "number"),
    one(75, "out_of_range", "top_p", 0, "0", "(0,1]"),
    one(76, "out_of_range", "top_p", 1.01, "1.01"),
    one(77, "out_of_range", "top_p", -1, "-1"),
    one(78, "out_of_range", "top_k", -5, "-5", f"-1 or 1..{VOCAB}"),
    one(79, "out_of_range", "min_p", 1.5, "1.5", "0..1"),
    one(80, "out_of_range", "presence_penalty", -3, "-3", "-2..2"),
    one(81, "out_of_range", "frequency_penalty", 2.5, "2.5", "-2..2"),
    one(82, "out_of_range", "repetition_penalty", 0, "0"),
    one(83, "out_of_range", "repetition_penalty", -1, "-1"),
    one(84, "out_of_range", "logprobs", 21, "21", "20", "--max-logprobs"),
    one(85, "out_of_range", "logprobs", -1, "-1"),
    one(86, "out_of_range", "logprobs", 10**12, "1000000000000", "20", "--max-logprobs"),
    one(87, "out_of_range", "prompt_logprobs", 100000, "100000", "20", "--max-logprobs"),
    one(88, "out_of_range", "min_tokens", 5, "5", "4"),
    one(89, "out_of_range", "seed", 2**70, str(2**70), "64-bit"),
    one(90, "invalid_type", "stream", "yes", "string", "boolean"),
    Row(
        "srv-091", COMPLETIONS, completion(n=16, max_tokens=LENGTH // 2), "out_of_range", "max_tokens", ("8192", "4096")
    ),
    Row("srv-092", COMPLETIONS, completion(n=4, best_of=2), "conflict", "best_of", ("2", "4")),
    Row("srv-093", COMPLETIONS, completion(best_of=4, stream=True), "conflict", "best_of", ("stream",)),
    one(95, "out_of_range", "max_tokens", 0, "0", "echo"),
    said(96, "conflict", "max_completion_tokens", 8),
    said(97, "conflict", "top_logprobs", 5, "logprobs"),
]

LISTS = [
    one(98, "out_of_range", "logit_bias", {str(VOCAB): 1}, str(VOCAB), f"0..{VOCAB - 1}"),
    one(99, "out_of_range", "logit_bias", {"-1": 5}, "-1"),
    one(100, "invalid_type", "logit_bias", {"abc": 5}, "'abc'"),
    one(101, "out_of_range", "logit_bias", {"1": 101}, "101", "-100..100"),
    one(102, "out_of_range", "logit_bias", {str(i): 1 for i in range(1025)}, "1025", "1024", "--max-logit-bias"),
    one(103, "invalid_type", "logit_bias", {"1": 5, " 1": 5, "01": 5}, "' 1'"),
    one(104, "out_of_range", "stop", ["a"] * 17, "17", "16", "--max-stop"),
    one(105, "out_of_range", "stop", ["x" * 257], "257", "256", "--max-stop-chars", param="stop[0]"),
    one(106, "out_of_range", "stop", [""], "empty", param="stop[0]"),
    one(107, "invalid_type", "stop", [1, 2], param="stop[0]"),
    one(108, "out_of_range", "stop_token_ids", [VOCAB + 7], f"{VOCAB + 7}", param="stop_token_ids[0]"),
    one(109, "out_of_range", "stop_token_ids", list(range(129)), "129", "128", "--max-stop-token-ids"),
    raw(110, good(', "bad_words": ["\\ud83d"]'), "invalid_unicode", "bad_words[0]"),
    one(111, "out_of_range", "allowed_token_ids", [], "empty"),
    one(112, "out_of_range", "allowed_token_ids", [VOCAB], f"{VOCAB}", param="allowed_token_ids[0]"),
    one(113, "out_of_range", "cache_salt", "x" * 257, "257", "256"),
    one(114, "out_of_range", "user", "x" * 100_000, "100000", "256"),
]

LOOP = "{% for i in range(10**9) %}x{% endfor %}"
FUNCTION = {"type": "function", "function": {"name": "f"}}
BAD_TYPE = {"type": "object", "properties": {"x": {"type": ["string", 5]}}}
KWARGS = "chat_template_kwargs"
MESSAGES = [
    said(116, "out_of_range", "messages", [], "empty"),
    said(117, "invalid_type", "messages", "hi"),
    message(118, {"role": "wizard", "content": "hi"}, "unsupported_role", "messages[0].role", "wizard", "assistant"),
    message(119, {"role": "user"}, "missing_field", "messages[0].content"),
    message(120, {"role": "user", "content": None}, "invalid_type", "messages[0].content"),
    message(121, {"role": "tool", "content": "x"}, "conflict", "messages[0]"),
    said(122, "out_of_range", "messages", [{"role": "user", "content": "x"}] * 2049, "2049", "2048", "--max-messages"),
    message(123, {"role": "user", "content": [{"type": "hologram"}]}, "unsupported", "messages[0].content[0].type"),
    message(124, {"role": "user", "content": [{"type": "text"}]}, "missing_field", "messages[0].content[0].text"),
    said(127, "chat_template_refused", "chat_template", LOOP, "--allow-request-chat-template"),
    said(131, "unknown_field", KWARGS, {"tokenize": True}, param=f"{KWARGS}.tokenize"),
    said(132, "chat_template_refused", KWARGS, {"chat_template": "x"}, param=f"{KWARGS}.chat_template"),
    said(133, "unknown_field", KWARGS, {"messages": []}, param=f"{KWARGS}.messages"),
    Row(
        "srv-134",
        CHAT,
        chat(stream=True, stream_options={"include_usage": "maybe"}),
        "invalid_type",
        "stream_options.include_usage",
    ),
    said(135, "conflict", "tool_choice", "required"),
    said(136, "out_of_range", "tools", [FUNCTION] * 129, "129", "128", "--max-tools"),
    said(137, "unsupported", "response_format", {"type": "yaml"}, param="response_format.type"),
    Row(
        "grm-022",
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": BAD_TYPE}}]),
        "grammar_invalid",
        "tools[0].function.parameters.type",
    ),
    Row("grm-023", CHAT, chat(tools=[{"type": "function", "function": {}}]), "missing_field", "tools[0].function.name"),
    Row(
        "grm-024",
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "a b;rm"}}]),
        "out_of_range",
        "tools[0].function.name",
        ("[A-Za-z0-9_-]{1,64}",),
    ),
]


def schema(number: int, code: str, value: Any, at: str, *words: str) -> Row:
    """A chat whose answer must fit a JSON schema that cannot be used."""
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}
    path = f"response_format.json_schema.schema{at}"
    return Row(f"grm-{number:03}", CHAT, chat(response_format=form), code, path, words)


def structured(number: int, code: str, kind: str, value: Any, *words: str) -> Row:
    body = chat(structured_outputs={kind: value})
    return Row(f"grm-{number:03}", CHAT, body, code, f"structured_outputs.{kind}", words)


CIRCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
DEEP_SCHEMA: dict[str, Any] = {"type": "string"}
for _ in range(33):
    DEEP_SCHEMA = {"type": "object", "additionalProperties": DEEP_SCHEMA}
LARGE_SCHEMA = {"description": "x" * (70 << 10)}

GRAMMARS = [
    schema(1, "grammar_invalid", {"type": "not-a-type"}, ".type", "not-a-type"),
    schema(5, "grammar_remote_ref", {"$ref": "http://169.254.169.254/s.json"}, ".$ref"),
    schema(6, "grammar_remote_ref", {"$ref": "file:///etc/passwd"}, ".$ref"),
    schema(8, "grammar_too_large", LARGE_SCHEMA, "", "65536", "--max-schema-bytes"),
    schema(14, "grammar_unsatisfiable", {"enum": []}, ".enum"),
    schema(2, "grammar_recursive_ref", {"$ref": "#"}, ".$ref"),
    schema(3, "grammar_recursive_ref", CIRCLE, ".$ref"),
    schema(4, "grammar_invalid", {"$ref": "#/$defs/missing"}, ".$ref", "#/$defs/missing"),
    schema(9, "grammar_too_deep", DEEP_SCHEMA, "", "33", "32", "--max-schema-depth"),
    schema(11, "grammar_invalid", {"type": "string", "pattern": "["}, ""),
    schema(12, "grammar_too_large", {"type": "string", "minLength": 10**9}, ".minLength"),
    schema(13, "grammar_unsatisfiable", {"type": "array", "minItems": 5, "maxItems": 2}, ""),
    schema(15, "grammar_too_large", {"type": "object", "properties": {f"k{i}": {} for i in range(10**4)}}, ""),
    structured(16, "grammar_too_large", "regex", "a{1,100000}", "states", "--max-grammar-states"),
    structured(18, "grammar_invalid", "grammar", "root ::= root", "recursion"),
    structured(17, "out_of_range", "regex", "a" * 5000, "5000", "4096", "--max-regex-chars"),
    structured(19, "grammar_invalid", "grammar", ""),
    Row(
        "two-formats", CHAT, chat(structured_outputs={"regex": "a", "choice": ["b"]}), "conflict", "structured_outputs"
    ),
]

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
ROUTES = [
    Row("srv-145", TOKENIZE, {"model": "M", "prompt": "A" * (8 << 20)}, "context_length_exceeded", "prompt"),
    Row("srv-146", TOKENIZE, {"model": "M", "prompt": 5}, "invalid_type", "prompt"),
    Row(
        "srv-147",
        TOKENIZE,
        {"model": "M", KWARGS: {"tokenize": True}, "messages": [{"role": "user", "content": "x" * (4 << 20)}]},
        "unknown_field",
        f"{KWARGS}.tokenize",
    ),
    Row("srv-148", DETOKENIZE, {"model": "M", "tokens": [VOCAB]}, "out_of_range", "tokens[0]"),
    Row("srv-149", DETOKENIZE, {"model": "M", "tokens": [-1]}, "out_of_range", "tokens[0]"),
    Row("srv-150", DETOKENIZE, {"model": "M", "tokens": "abc"}, "invalid_type", "tokens"),
    Row("srv-151", DETOKENIZE, {"model": "M", "tokens": [0] * 5_000_000}, "out_of_range", "tokens", ("5000000",)),
    Row("srv-152", COMPLETIONS, b"", "method_not_allowed", status=405, method="GET"),
    Row("srv-153", "/v1/models/M", b"", "method_not_allowed", status=405, method="DELETE"),
    Row("srv-154", "/v1/models/..%2f..%2fetc%2fpasswd", b"", "model_not_found", status=404, method="GET"),
    Row("srv-155", "/nope", b"", "not_found", status=404, method="GET"),
    Row("srv-173", "/admin/pause", {}, "not_found", status=404),
]

ROWS = [*BODIES, *NAMES, *PROMPTS, *NUMBERS, *LISTS, *MESSAGES, *GRAMMARS, *ROUTES]
