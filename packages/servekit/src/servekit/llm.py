"""Offline inference: a model in this process, prompts in, answers out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from servekit.engine.config import EngineConfig
from servekit.engine.engine import EngineCore
from servekit.engine.grammars import GrammarDoor
from servekit.engine.output import OutputProcessor, RequestOutput, RequestTracker
from servekit.engine.tokenizer import Tokenizer
from servekit.engine.validate import validate
from servekit.execution.proposer import SpeculativeConfig
from servekit.sampling.parameters import SamplingParams


class TokensPrompt(TypedDict):
    """A prompt that is tokenized already."""

    prompt_token_ids: list[int]


Prompt = str | list[int] | TokensPrompt
Messages = list[dict[str, Any]]


class LLM:
    """A model ready to answer::

        with LLM("path/to/model") as llm:
            for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
                print(output.outputs[0].text)

    Args:
        model: a Hugging Face folder or a hand-off artifact, which is verified first.
        settings: the fields of ``EngineConfig``.

    Raises:
        ArtifactError: the folder cannot be used.
        ConfigError: a setting is out of its range.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        if isinstance(settings.get("speculative_config"), dict):
            settings["speculative_config"] = SpeculativeConfig(**settings["speculative_config"])
        config = EngineConfig(model=str(model), **settings)
        self._core = EngineCore(config)
        self.tokenizer = Tokenizer.from_folder(self._core.executor.folder)
        self.facts = self._core.facts
        self._outputs = OutputProcessor(self.tokenizer)
        self._grammars = GrammarDoor(config.model, self.facts)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched as they fit, in the order given.

        Args:
            prompts: a text, token ids, ``{"prompt_token_ids": [...]}``, or a list of these.
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

    def _run(
        self, prompts: Sequence[str | list[int]], params: Sequence[SamplingParams], add_special_tokens: bool
    ) -> list[RequestOutput]:
        requests = [
            validate(
                f"{next(self._numbers)}", prompt, one, self.facts, self.tokenizer, add_special_tokens=add_special_tokens
            )
            for prompt, one in zip(prompts, params, strict=True)
        ]
        for one in params:
            if one.structured_outputs is not None:
                self._grammars.check(one.structured_outputs)
        trackers: list[RequestTracker] = []
        try:
            for request, prompt in zip(requests, prompts, strict=True):
                self._core.add(request)
                trackers.append(self._outputs.add(request, prompt if isinstance(prompt, str) else None))
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


def _tokens_or_text(prompt: Prompt) -> str | list[int]:
    return prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt


def _params_for(
    prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(params)} sampling_params: give one for all, or one each")
    return list(params)
