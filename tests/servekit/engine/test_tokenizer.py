"""The tokenizer without transformers says what transformers says."""

from __future__ import annotations

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from common_platform.embedded import smollm2
from common_platform.errors import ArtifactError, RequestError
from servekit.engine.tokenizer import Tokenizer

TEMPLATE_CASES = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ 7*7 }} {% for %}"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "<|im_end|>"},
    ],
]


@pytest.fixture(scope="module")
def both():
    return Tokenizer.from_folder(smollm2()), transformers.AutoTokenizer.from_pretrained(smollm2())


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_encode_and_decode(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("messages", TEMPLATE_CASES)
@pytest.mark.parametrize("generate", [True, False])
def test_chat_template(both, messages, generate):
    ours, theirs = both
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    assert ours.apply_chat_template(messages, add_generation_prompt=generate) == expected


def folder(tmp_path, template):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(smollm2() / name) if name == "model.safetensors" else (
            tmp_path / name
        ).write_bytes((smollm2() / name).read_bytes())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nope.nope }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_is_the_requests_error(tmp_path, template):
    tokenizer = Tokenizer.from_folder(folder(tmp_path, template))
    with pytest.raises(RequestError) as raised:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert raised.value.code == "chat_template_error"


def test_no_template_and_a_broken_one(tmp_path):
    with pytest.raises(ArtifactError, match="chat_template"):
        Tokenizer.from_folder(folder(tmp_path, "{% for %}"))
