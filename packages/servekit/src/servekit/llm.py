"""Offline inference: a model in this process, prompts in, answers out."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import msgspec

from common_platform.errors import ConfigError, RequestError, ResourceError
from servekit.core.plan import TokenLogprob
from servekit.core.prompt_embeds import PromptEmbeds
from servekit.core.stats import SchedulerStats
from servekit.engine.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from servekit.engine.collector import fewer_collections
from servekit.engine.config import EngineConfig
from servekit.engine.engine import EngineCore
from servekit.engine.grammars import GrammarDoor
from servekit.engine.output import OutputProcessor, RequestOutput, RequestTracker
from servekit.engine.prompt_embeds import embeds_of
from servekit.engine.tokenizer import Tokenizer
from servekit.engine.tracing import RequestTracer
from servekit.engine.validate import EngineRequest, validate
from servekit.execution.logits_processors import name_of
from servekit.execution.pooling import POOLINGS
from servekit.execution.speculative import SpeculativeConfig
from servekit.sampling.parameters import SamplingParams


class TokensPrompt(TypedDict):
    """A prompt that is tokenized already."""

    prompt_token_ids: list[int]


class EmbedsPrompt(TypedDict):
    """Embeddings in place of a prompt's tokens: ``[tokens, hidden]``, a tensor or an array of floats."""

    prompt_embeds: Any


Prompt = str | list[int] | TokensPrompt | EmbedsPrompt
Messages = list[dict[str, Any]]


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt as a vector, or as one vector a token."""

    request_id: str
    prompt_token_ids: list[int]
    embedding: list[Any]


class LLM:
    """A model ready to answer::

        with LLM("path/to/model") as llm:
            for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
                print(output.outputs[0].text)

    Args:
        model: a Hugging Face folder or a hand-off artifact, which is verified first.
        settings: the fields of ``EngineConfig``; ``logits_processors`` may be classes themselves.

    Raises:
        ArtifactError: the folder cannot be used.
        ConfigError: a setting is out of its range.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        if isinstance(settings.get("speculative_config"), dict):
            settings["speculative_config"] = SpeculativeConfig(**settings["speculative_config"])
        if "logits_processors" in settings:
            settings["logits_processors"] = [name_of(each) for each in settings["logits_processors"]]
        config = EngineConfig(model=str(model), **settings)
        self._core = EngineCore(config)
        self.tokenizer = Tokenizer.from_folder(self._core.executor.folder)
        self.facts = self._core.facts
        self.tokenizer.check_fits(self.facts.vocab_size)
        self._tracer = RequestTracer.of(config)
        self._outputs = OutputProcessor(self.tokenizer, self._tracer)
        self._grammars = GrammarDoor(config.model, self.facts, config.grammar_limits)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched as they fit, in the order given.

        Args:
            prompts: a text, token ids, ``{"prompt_token_ids": [...]}``, ``{"prompt_embeds": [tokens, hidden]}``, or a
                list of these.
            sampling_params: for all prompts, or one each.

        Raises:
            RequestError: a prompt or its parameters cannot be served; none has been run then.
        """
        many = _as_list(prompts)
        return self._run([_tokens_or_text(prompt) for prompt in many], _params_for(many, sampling_params), True)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one chat, or several, through the model's chat template; ``template`` goes to it."""
        chats = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        prompts = [self.tokenizer.apply_chat_template(chat, **template) for chat in chats]  # type: ignore[arg-type]
        return self._run(prompts, _params_for(prompts, sampling_params), False)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The ``params.beam_width`` most likely continuations of each prompt.

        Raises:
            RequestError: a prompt and ``max_tokens`` do not fit the context.
        """
        many = [_tokens_or_text(prompt) for prompt in _as_list(prompts)]
        if any(isinstance(prompt, PromptEmbeds) for prompt in many):
            raise RequestError("prompt_embeds", "embeddings", "tokens, for beam search", code="unsupported")
        longest = SamplingParams(max_tokens=params.max_tokens)
        token_ids = [self._validated(prompt, longest, True).prompt_token_ids for prompt in many]
        found = beam_search(token_ids, params, self.facts.eos_token_ids, self._next_tokens)
        for beam in (beam for beams in found for beam in beams):
            beam.text = self.tokenizer.decode(beam.token_ids[beam.num_prompt :], skip_special_tokens=True)
        return [BeamSearchOutput(beams) for beams in found]

    def _next_tokens(self, sequences: list[list[int]], params: SamplingParams) -> list[TokenLogprob | None]:
        answers = [output.outputs[0] for output in self._run(sequences, [params] * len(sequences), False)]
        return [answer.logprobs[0] if answer.logprobs else None for answer in answers]

    def encode(self, prompts: Prompt | Sequence[Prompt], *, pooling: str = "all") -> list[EmbeddingOutput]:
        """The last hidden states of each prompt, float32.

        Args:
            pooling: ``all`` of them, one vector a token; their ``mean``; or the ``last`` token's.

        Raises:
            RequestError: a prompt does not fit the context; none has been run then.
        """
        if pooling not in POOLINGS:
            raise RequestError("pooling", pooling, f"one of {POOLINGS}", code="out_of_range")
        many = [_tokens_or_text(prompt) for prompt in _as_list(prompts)]
        params = [SamplingParams(max_tokens=0, temperature=0.0)] * len(many)
        outputs = self._run(many, params, True, pooling)
        for output in outputs:
            if not output.pooled:
                answer = output.outputs[0]
                raise ResourceError(
                    message=f"encode: request {output.request_id}: {answer.error or answer.finish_reason}"
                )
        return [EmbeddingOutput(output.request_id, output.prompt_token_ids, output.pooled) for output in outputs]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str = "last", normalize: bool = True
    ) -> list[EmbeddingOutput]:
        """One vector a prompt, of length 1 unless told otherwise; ``pooling``: ``last`` or ``mean``, see ``encode``."""
        if pooling == "all":
            raise RequestError(
                "pooling", pooling, "last or mean; or encode() for a vector a token", code="out_of_range"
            )
        outputs = self.encode(prompts, pooling=pooling)
        for output in outputs if normalize else ():
            length = math.sqrt(math.fsum(x * x for x in output.embedding)) or 1.0
            output.embedding = [x / length for x in output.embedding]
        return outputs

    def score(self, queries: Prompt | Sequence[Prompt], texts: Prompt | Sequence[Prompt]) -> list[float]:
        """How alike two texts are: the cosine of their embeddings, -1..1. One query is held against every text."""
        first, second = _as_list(queries), _as_list(texts)
        if len(first) not in (1, len(second)):
            raise ValueError(f"{len(first)} queries but {len(second)} texts: give one query, or one each")
        vectors = [output.embedding for output in self.embed([*first, *second])]
        left = vectors[: len(first)] * (len(second) // len(first))
        return [math.fsum(map(operator.mul, a, b)) for a, b in zip(left, vectors[len(first) :], strict=True)]

    def sleep(self, level: int = 1) -> None:
        """Give memory back until ``wake_up``: the KV cache (level 1), and the weights as well (level 2).

        Raises:
            ConfigError: no such level.
        """
        if level not in (1, 2):
            raise ConfigError("level", level, "1 or 2")
        self._core.sleep(level)

    def wake_up(self) -> None:
        """Take the memory again; what was cached is gone, answers are the same."""
        self._core.wake_up()

    @property
    def is_sleeping(self) -> bool:
        return self._core.is_sleeping

    def collective_rpc(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of every worker by its name, or ``method(worker, ...)``: one result a rank. For the curious."""
        return self._core.executor.collective_rpc(method, args, kwargs)

    def stats(self) -> SchedulerStats:
        """What the scheduler counted so far."""
        return self._core.stats()

    def _validated(
        self, prompt: str | list[int] | PromptEmbeds, params: SamplingParams, add_special_tokens: bool
    ) -> EngineRequest:
        return validate(
            f"{next(self._numbers)}", prompt, params, self.facts, self.tokenizer, add_special_tokens=add_special_tokens
        )

    def _run(
        self,
        prompts: Sequence[str | list[int] | PromptEmbeds],
        params: Sequence[SamplingParams],
        add_special_tokens: bool,
        pooling: str = "",
    ) -> list[RequestOutput]:
        if self.is_sleeping:
            raise ResourceError(message="the engine sleeps: call wake_up() first")
        requests = [
            self._validated(prompt, one, add_special_tokens).told_at_the_end()
            for prompt, one in zip(prompts, params, strict=True)
        ]
        if pooling:
            requests = [msgspec.structs.replace(request, pooling=pooling) for request in requests]
        for one in params:
            if one.structured_outputs is not None:
                self._grammars.check(one.structured_outputs)
        trackers: list[RequestTracker] = []
        try:
            for request, prompt in zip(requests, prompts, strict=True):
                self._core.add(request)
                trackers.append(self._outputs.add(request, prompt if isinstance(prompt, str) else None))
            with fewer_collections():
                while self._core.has_work:
                    self._core.abort(self._outputs.process(self._core.step())[1])
        except BaseException:
            for request in requests:
                self._outputs.forget(request.request_id)
                self._core.abort([request.child_id(i) for i in range(request.num_sequences)])
            raise
        return [tracker.final() for tracker in trackers]

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes."""
        return self._core.reset_prefix_cache()

    def close(self) -> None:
        """Give memory and threads back."""
        self._grammars.close()
        self._core.stop()
        if self._tracer is not None:
            self._tracer.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | dict):
        return [prompts]  # type: ignore[list-item]
    if prompts and all(isinstance(token, int) for token in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]


def _tokens_or_text(prompt: Prompt) -> str | list[int] | PromptEmbeds:
    if not isinstance(prompt, dict):
        return prompt
    about: dict[str, Any] = {**prompt}
    return embeds_of(about["prompt_embeds"]) if "prompt_embeds" in about else about["prompt_token_ids"]


def _params_for(
    prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(params)} sampling_params: give one for all, or one each")
    return list(params)
