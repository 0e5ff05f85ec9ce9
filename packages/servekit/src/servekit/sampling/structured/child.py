"""The process that compiles constraints: reads one, answers with a verdict, until its input ends."""

from __future__ import annotations

import math
import resource
import signal
import struct
import sys
from pathlib import Path

import msgspec

from common_platform.errors import PlatformError, RequestError
from servekit.sampling.parameters import StructuredOutput
from servekit.sampling.structured.guard import Setup, Verdict
from servekit.sampling.structured.limits import GrammarLimits
from servekit.sampling.structured.matcher import GrammarCompiler


def main() -> None:
    setup = msgspec.msgpack.decode(_read() or b"", type=Setup)
    settings = setup.limits
    memory = int(settings["memory_bytes"])
    limits = GrammarLimits(max_grammar_states=int(settings["max_grammar_states"]), cache_bytes=1)  # none comes twice
    try:
        compiler = GrammarCompiler(setup.tokenizer_json, setup.vocab_size, setup.eos_token_ids, limits)
    except PlatformError as error:
        _write(Verdict(error.code, error.message))
        return
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory, -1))
    _write(Verdict())
    patience = math.ceil(settings["timeout_s"]) + 1  # the parent kills at its deadline; this is for a parent that died
    while packed := _read():
        signal.alarm(patience)
        verdict = _judge(compiler, msgspec.msgpack.decode(packed, type=StructuredOutput))
        signal.alarm(0)
        _write(verdict)


def _judge(compiler: GrammarCompiler, spec: StructuredOutput) -> Verdict:
    try:
        compiler.compile(spec)
    except RequestError as error:
        return Verdict(error.code, error.message, error.param)
    return Verdict()


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _read() -> bytes | None:
    head = sys.stdin.buffer.read(4)
    return sys.stdin.buffer.read(struct.unpack("<I", head)[0]) if len(head) == 4 else None


def _write(verdict: Verdict) -> None:
    body = msgspec.msgpack.encode(verdict)
    sys.stdout.buffer.write(struct.pack("<I", len(body)) + body)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
