"""A causal language model from a Hugging Face folder, ready to be fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from common_platform.artifact import open_model_folder
from common_platform.errors import ConfigError
from trainkit.lm import attention, states
from trainkit.lm.data import IGNORED
from trainkit.lm.lora import Lora, add_adapter
from trainkit.lm.loss import chunked_cross_entropy
from trainkit.lm.tokenizer import transformers
from trainkit.module import TrainModule
from trainkit.schedules import warmup_schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MLP = "mlp"  # what gradient_checkpointing may be beside True and False
SETTINGS = ("lr", "weight_decay", "warmup_steps", "total_steps", "decay", "loss_chunk")


class CausalLM(TrainModule):
    """Fine-tunes ``model`` to say the labelled tokens: supervised fine-tuning.

    Batches are packed (``PackedDataset.collate``) or padded (``ChatDataset.collate``); what is padding is not computed
    where the model allows it. Packed documents do not see each other: the first packed batch is checked for it.

    Args:
        model: a causal LM of transformers: a backbone and an output embedding.
        lr: the full learning rate.
        weight_decay: of matrices; vectors (norms, biases) have none.
        warmup_steps, total_steps: of the schedule, which then falls to 0 by ``decay``.
        loss_chunk: tokens whose logits exist at a time.
        lora: train an adapter of peft and leave ``model``'s own weights as they are.

    Raises:
        ConfigError: a setting is out of its range.
        ResourceError: ``lora`` is given and peft is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        total_steps: int = 1000,
        decay: str = "linear",
        loss_chunk: int = 512,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        if not lr > 0 or lr == float("inf"):
            raise ConfigError("lr", lr, "a number above 0")
        if loss_chunk < 1:
            raise ConfigError("loss_chunk", loss_chunk, "1 token or more")
        self.save_hyperparameters(*SETTINGS)
        self.hparams["betas"] = list(betas)
        self.model: Any = model if lora is None else add_adapter(model, lora)
        states.prepare(self.model)
        self._packs: bool | None = None  # whether packed rows have been found to be safe

    @classmethod
    def from_folder(
        cls, path: str | Path, *, dtype: str = "float32", gradient_checkpointing: bool | str = False, **settings: Any
    ) -> Self:
        """The model in ``path``, which is verified first if it is a hand-off artifact.

        Args:
            dtype: of the weights: float32, bfloat16 or float16.
            gradient_checkpointing: compute activations again instead of keeping them; "mlp": only those of the gated
                MLP, on a CPU.
            settings: of the constructor.

        Raises:
            ArtifactError: the folder cannot be used.
            ResourceError: transformers is not installed.
        """
        return cls(load_model(path, dtype=dtype, gradient_checkpointing=gradient_checkpointing), **settings)

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The sum of the labelled tokens' cross entropies, and how many they are."""
        hidden, targets = self.learnt_states(batch)
        return chunked_cross_entropy(hidden, targets, self.head, chunk=self.hparams["loss_chunk"]), len(targets)

    @property
    def head(self) -> Any:
        """States -> logits."""
        return states.head_of(self.model)

    def learnt_states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The states ``[learnt, width]`` before each labelled token, and those tokens ``[learnt]``, row by row."""
        batch = self._as_it_is_computed(batch)
        hidden = states.hidden_states(self.model, batch)
        targets = batch["labels"][:, 1:].flatten()
        chosen = (targets != IGNORED).nonzero()[:, 0]
        before = hidden[:, :-1].flatten(0, 1) if len(hidden) > 1 else hidden[0]
        return before.index_select(0, chosen), targets[chosen]

    def _as_it_is_computed(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A packed batch, where the model can be given one."""
        is_packed = "lengths" in batch
        if self._packs is None and (is_packed or _attends_by_document(self.model)):
            try:
                states.check_no_cross_talk(self.model)
                self._packs = True
            except ConfigError:
                if is_packed:
                    raise
                self._packs = False
        if is_packed or not self._packs or not _attends_by_document(self.model):
            return batch
        return states.unpadded(batch)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        total, count = self.loss(batch)
        mean = total / max(count, 1)
        self.log("train_loss", mean, prog_bar=True, weight=count)
        return {"loss": mean, "weight": count}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._log_loss("val_loss", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._log_loss("test_loss", batch)

    def _log_loss(self, name: str, batch: Mapping[str, Tensor]) -> None:
        total, count = self.loss(batch)
        self.log(name, total / max(count, 1), prog_bar=True, weight=count)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Make a step, and let gradients go at once: the next forward pass needs their room."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        settings = self.hparams
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings["weight_decay"]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), fused=True)
        schedule = warmup_schedule(
            optimizer,
            warmup_steps=settings["warmup_steps"],
            total_steps=settings["total_steps"],
            decay=settings["decay"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load_model(path: str | Path, *, dtype: str = "float32", gradient_checkpointing: bool | str = False) -> Any:
    """A causal LM of transformers; the arguments and errors are those of ``CausalLM.from_folder``."""
    if dtype not in DTYPES:
        raise ConfigError("dtype", dtype, f"one of {tuple(DTYPES)}")
    if gradient_checkpointing not in (True, False, MLP):
        raise ConfigError("gradient_checkpointing", gradient_checkpointing, f"True, False or {MLP!r}")
    with open_model_folder(path):
        pass
    model = transformers().AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    if gradient_checkpointing == MLP:
        states.recompute_mlp(model)
    elif gradient_checkpointing:
        states.recompute_activations(model)
    return model


def _attends_by_document(model: Any) -> bool:
    return states.causal_lm(model).config._attn_implementation == attention.NAME
