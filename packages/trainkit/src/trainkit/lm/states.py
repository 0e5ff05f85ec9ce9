"""The last hidden states of a batch, packed or padded, by the fastest way that a model allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common_platform.errors import ConfigError
from trainkit.lm.attention import NAME, Documents, by_document
from trainkit.lm.fused import RECOMPUTES_MLP, can_fuse, fused_backbone
from trainkit.lm.tokenizer import transformers

CROSS_TALK = 1e-3  # relative: far above rounding in any dtype that is tried, far below what a leak makes


def causal_lm(model: Any) -> Any:
    """The model of transformers in ``model``, which may wear an adapter of peft."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def prepare(model: Any) -> None:
    """Let ``model`` attend by document where its documents are given; otherwise it works as before.

    A model whose attention cannot be replaced keeps its own, and is given a mask for packed rows.
    """
    lm = causal_lm(model)
    config = lm.config
    if not getattr(lm, "_supports_attention_backend", False) or config._attn_implementation not in ("sdpa", "eager"):
        return
    if getattr(config, "attn_logit_softcapping", None) or getattr(lm, "_supports_sdpa", False) is False:
        return
    library = transformers()
    library.AttentionInterface.register(NAME, _attention)
    library.AttentionMaskInterface.register(NAME, library.masking_utils.sdpa_mask)
    lm.set_attn_implementation(NAME)


def recompute_activations(model: Any) -> None:
    """Keep only the states between layers, and compute the rest again in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def recompute_mlp(model: Any) -> None:
    """Of the activations between states compute those of the gated MLP again in the backward pass, over half of them.

    Raises:
        ConfigError: the fused layers do not compute ``model``.
    """
    backbone = causal_lm(model).base_model
    if not can_fuse(backbone):
        raise ConfigError("gradient_checkpointing", "mlp", f"True or False for {type(backbone).__name__} as it is here")
    setattr(backbone, RECOMPUTES_MLP, True)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any) -> Any:
    if how.get("documents") is None:
        how.pop("documents", None)
        return transformers().integrations.sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, **how)
    return by_document(module, query, key, value, mask, **how)


def documents_of(batch: Mapping[str, Tensor]) -> Documents | None:
    """Where the documents of a packed batch lie; None for a padded one."""
    return Documents(tuple(batch["lengths"].tolist())) if "lengths" in batch else None


def unpadded(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A padded batch as a packed one: what the mask leaves out is not computed."""
    seen = batch["attention_mask"].bool()
    labels = batch["labels"].clone()
    labels[torch.arange(len(labels)), seen.int().argmax(1)] = -100  # nothing before a row's first token is its own
    lengths = seen.sum(1)
    positions = seen.cumsum(1) - 1
    return {
        "input_ids": batch["input_ids"][seen][None],
        "labels": labels[seen][None],
        "position_ids": positions[seen][None],
        "lengths": lengths[lengths > 0],
    }


def hidden_states(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """What the output embedding is applied to.

    Args:
        model: a causal LM of transformers that ``prepare`` has seen, with or without an adapter.
        batch: ``input_ids`` with ``position_ids`` and ``lengths`` (packed), or with ``attention_mask`` (padded).

    Returns:
        ``[rows, tokens, width]``.
    """
    lm = causal_lm(model)
    backbone = lm.base_model
    documents = documents_of(batch)
    if documents is None:
        known = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        return backbone(**known, use_cache=False).last_hidden_state
    about = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    if can_fuse(backbone):
        return fused_backbone(backbone, **about, documents=documents)[None]
    if lm.config._attn_implementation == NAME:
        unread = batch["input_ids"].new_zeros(1, 1, 1, 1)  # a mask that is there, so that no other one is made
        return backbone(**about, attention_mask=unread, documents=documents, use_cache=False).last_hidden_state
    mask = _masks(lm.config, documents, batch["input_ids"].device, lm.dtype)
    return backbone(**about, attention_mask=mask, use_cache=False).last_hidden_state


def _masks(config: Any, documents: Documents, device: torch.device, dtype: torch.dtype) -> Any:
    """The mask of all layers, or one for each kind of layer where the model has several kinds.

    Raises:
        ConfigError: a kind whose mask is not known.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError("packing", sorted(unknown), "full or sliding attention: use ChatDataset.collate, which pads")
    window = getattr(config, "sliding_window", None)
    full, sliding = _mask(documents, device, dtype, None), _mask(documents, device, dtype, window)
    if "sliding_attention" in kinds:
        return {"full_attention": full, "sliding_attention": sliding}
    return full if kinds else sliding


def _mask(documents: Documents, device: torch.device, dtype: torch.dtype, window: int | None) -> Tensor:
    """``[1, 1, tokens, tokens]``, to be added to the scores: 0 where a token may look."""
    number = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths)).to(device)
    allowed = (number[:, None] == number[None]).tril()
    if window:
        allowed = allowed.triu(1 - window)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


def check_no_cross_talk(model: Any) -> None:
    """Compute a short document by the model itself, alone, and behind another one in a packed row, and compare.

    Raises:
        ConfigError: the other one shows. Recurrent layers and convolutions do that, and no mask keeps them apart.
    """
    lm = causal_lm(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            own, packed = _own_and_packed(lm)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise _refused(lm, "it takes no mask") from error
    finally:
        model.train(was_training)
    difference = float((own - packed).abs().max() / own.abs().max().clamp_min(1e-6))
    if not difference <= (CROSS_TALK if lm.dtype == torch.float32 else 50 * CROSS_TALK):
        raise _refused(lm, f"logits differ by {difference:.0e}")


def _own_and_packed(lm: Any) -> tuple[Tensor, Tensor]:
    """Logits of the second of two documents: the model's own for it alone, and ours in a pack."""
    device = lm.get_input_embeddings().weight.device
    first, second = (torch.arange(start, start + 6, device=device) % lm.config.vocab_size for start in (3, 11))
    row = {
        "input_ids": torch.cat([first, second])[None],
        "position_ids": torch.arange(6, device=device).repeat(2)[None],
        "lengths": torch.tensor([6, 6]),
    }
    return lm(input_ids=second[None], use_cache=False).logits[0], head_of(lm)(hidden_states(lm, row)[0, 6:])


def _refused(lm: Any, why: str) -> ConfigError:
    allowed = f"an architecture whose documents do not see each other ({why}): use ChatDataset.collate, which pads"
    return ConfigError("packing", lm.config.model_type, allowed)


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """States -> logits, as the model's own forward makes them: some scale or cap what the output embedding gives."""
    lm = causal_lm(model)
    embedding, config = lm.get_output_embeddings(), lm.config
    factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if factor == 1.0 and not cap:
        return embedding

    def head(states: Tensor) -> Tensor:
        logits = embedding(states) * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return head
