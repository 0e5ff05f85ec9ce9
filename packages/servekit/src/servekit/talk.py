"""``servekit chat`` and ``complete``: an answer as it comes, from a model loaded here or from a running server."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from common_platform.errors import ConfigError, RequestError, ResourceError
from servekit.engine.async_engine import AsyncEngine
from servekit.engine.config import EngineConfig
from servekit.sampling.parameters import SamplingParams

TIMEOUT_S = 300.0  # between two pieces of an answer
T = TypeVar("T")
Message = dict[str, Any]


class Speaker(Protocol):
    """Whoever answers; each answer comes in pieces."""

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[str]: ...

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]: ...


def is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def speaker(model: str, settings: dict[str, Any], api_key: str | None) -> AbstractContextManager[Speaker]:
    """Args: model: a model folder, loaded with ``settings``, or the address of a running server."""
    return remote_speaker(model, api_key) if is_url(model) else local_speaker(EngineConfig(model=model, **settings))


@contextmanager
def local_speaker(config: EngineConfig) -> Iterator[Speaker]:
    """A model loaded here.

    Raises:
        ArtifactError, ConfigError: it cannot be.
    """
    with asyncio.Runner() as runner:
        engine = runner.run(AsyncEngine.from_config(config))
        try:
            yield _Local(runner, engine)
        finally:
            runner.run(engine.shutdown())


class _Local:
    def __init__(self, runner: asyncio.Runner, engine: AsyncEngine) -> None:
        self._runner = runner
        self._engine = engine
        self._num_requests = 0

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        return self._answer(prompt, params, add_special_tokens=True)

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        prompt = self._engine.tokenizer.apply_chat_template([dict(message) for message in messages])
        return self._answer(prompt, params, add_special_tokens=False)

    def _answer(self, prompt: str, params: SamplingParams, *, add_special_tokens: bool) -> Iterator[str]:
        self._num_requests += 1
        adding = self._engine.add_request(
            f"talk-{self._num_requests}", prompt, params, add_special_tokens=add_special_tokens
        )
        stream = self._runner.run(adding)
        try:
            for output in _pulled(self._runner, stream):
                yield output.outputs[0].delta_text
        finally:
            self._runner.run(stream.aclose())


def _pulled(runner: asyncio.Runner, stream: AsyncIterator[T]) -> Iterator[T]:
    """An asynchronous iterator, one item after the other."""
    done = object()

    async def next_one() -> Any:
        return await anext(stream, done)

    while (item := runner.run(next_one())) is not done:
        yield item


@contextmanager
def remote_speaker(url: str, api_key: str | None) -> Iterator[Speaker]:
    """A running server.

    Raises:
        ConfigError: ``url`` is none; ResourceError: nobody answers there.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise ConfigError("url", url, "http://HOST:PORT or https://HOST:PORT")
    remote = _Remote(url, api_key)
    remote.find_model()
    yield remote


class _Remote:
    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._parts = urlsplit(url)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._model = ""

    def find_model(self) -> None:
        """The first that the server serves is the one to talk to."""
        with self._answer_to("GET", "/v1/models", None) as answer:
            self._model = json.loads(answer.read())["data"][0]["id"]

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        for choice in self._choices("/v1/completions", {"prompt": prompt} | _asked(params)):
            yield choice["text"]

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[str]:
        for choice in self._choices("/v1/chat/completions", {"messages": list(messages)} | _asked(params)):
            yield choice["delta"].get("content") or ""

    def _choices(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._answer_to("POST", path, body | {"model": self._model, "stream": True}) as answer:
            for line in answer:
                text = line.decode().strip()
                if not text.startswith("data: ") or text == "data: [DONE]":
                    continue
                event = json.loads(text.removeprefix("data: "))
                _raise_error(event)
                yield from event["choices"]

    @contextmanager
    def _answer_to(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, self._parts.path.rstrip("/") + path, data, self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                self._refuse(answer)
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise ResourceError("url", self._url, "the address of a running server") from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)

    def _refuse(self, answer: http.client.HTTPResponse) -> None:
        try:
            _raise_error(json.loads(answer.read(1 << 20)))
        except ValueError as error:
            if isinstance(error, RequestError):
                raise
        raise ResourceError("url", f"{self._url}, status {answer.status}", "a server of OpenAI's routes")


def _raise_error(event: Any) -> None:
    found = event.get("error") if isinstance(event, dict) else None
    if isinstance(found, dict):
        raise RequestError(found.get("param"), code=found.get("code") or "refused", message=str(found.get("message")))


def _asked(params: SamplingParams) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "seed")
    given = {name: getattr(params, name) for name in names}
    made: dict[str, Any] = msgspec.to_builtins({name: value for name, value in given.items() if value is not None})
    return made
