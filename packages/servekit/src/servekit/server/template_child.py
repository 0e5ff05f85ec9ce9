"""The process that renders chat templates: reads one job, answers with its text, until its input ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError

from common_platform.errors import RequestError
from servekit.engine.chat_template import compiled, until_final, variables_for

TIMES_UP = signal.SIGPROF  # ends the process, whatever it is at
LIMIT = "chat_template_limit"
ERROR = "chat_template_error"
Json = dict[str, Any]


def main() -> None:
    setup = _read() or {}
    own = None if setup["source"] is None else compiled(setup["source"])
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + setup["memory_bytes"], -1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _write({})
    while (job := _read()) is not None:
        signal.setitimer(signal.ITIMER_PROF, setup["timeout_s"])
        answer = _answer(job, own, setup)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answer)


def _answer(job: Json, own: Template | None, setup: Json) -> Json:
    try:
        template = compiled(job["source"]) if job.get("source") is not None else own
        if template is None:
            return {"code": ERROR, "message": "no template"}
        return {"text": _text(template, job, setup)}
    except _TooLong:
        return {"code": LIMIT, "message": f"its text is longer than {setup['max_chars']} characters"}
    except (MemoryError, OverflowError, RecursionError):
        return {"code": LIMIT, "message": "it needs too much memory"}
    except RequestError as error:
        return {"code": error.code, "param": error.param, "message": error.message}
    except SecurityError:
        return {"code": ERROR, "message": "it does what a template may not"}
    except TemplateError as error:  # what raise_exception says, and faults of the syntax
        return {"code": ERROR, "message": str(error)[:160]}
    except Exception as error:  # noqa: BLE001 - a template may raise anything; whose name it is stays here
        message = str(error)[:160] if isinstance(error, TypeError | ValueError) else "it failed"
        return {"code": ERROR, "message": message}


class _TooLong(Exception):
    pass


def _text(template: Template, job: Json, setup: Json) -> str:
    shown = variables_for(
        job["messages"],
        add_generation_prompt=job["add_generation_prompt"],
        tools=job["tools"],
        special=setup["special"],
        variables=job["variables"],
    )
    pieces, size = [], 0
    for piece in template.generate(shown):
        pieces.append(piece)
        size += len(piece)
        if size > setup["max_chars"]:
            raise _TooLong
    text = "".join(pieces)
    return until_final(text, job["messages"]) if job["continue_final_message"] else text


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _read() -> Json | None:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        return None
    job: Json = json.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]))
    return job


def _write(answer: Json) -> None:
    body = json.dumps(answer).encode()
    _out.write(struct.pack("<I", len(body)) + body)
    _out.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when we end
    _out = os.fdopen(os.dup(1), "wb")
    main()
