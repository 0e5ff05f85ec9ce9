"""A causal language model from a Hugging Face folder, ready to be fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common_platform.artifact import open_model_folder
from common_platform.errors import ConfigError
from trainkit.lm.data import IGNORED
from trainkit.lm.loss import chunked_cross_entropy
from trainkit.lm.tokenizer import transformers
from trainkit.module import TrainModule
from trainkit.schedules import warmup_schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CausalLM(TrainModule):
    """Fine-tunes ``model`` to say the labelled tokens.

    Args:
        model: a causal LM of transformers: a backbone and an output embedding.
        lr: the full learning rate.
        weight_decay: of matrices; vectors (norms, biases) have none.
        warmup_steps, total_steps: of the schedule, which then falls to 0 by ``decay``.
        loss_chunk: tokens whose logits exist at a time.
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
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ConfigError("lr", lr, "a number above 0")
        self.save_hyperparameters("lr", "weight_decay", "warmup_steps", "total_steps", "decay", "loss_chunk")
        self.hparams["betas"] = list(betas)
        self.model = model

    @classmethod
    def from_folder(
        cls, path: str | Path, *, dtype: str = "float32", gradient_checkpointing: bool = False, **settings: Any
    ) -> CausalLM:
        """The model in ``path``, which is verified first if it is a hand-off artifact.

        Args:
            dtype: of the weights: float32, bfloat16 or float16.
            gradient_checkpointing: compute activations again instead of keeping them.
            settings: of the constructor.

        Raises:
            ArtifactError: the folder cannot be used.
            ResourceError: transformers is not installed.
        """
        if dtype not in DTYPES:
            raise ConfigError("dtype", dtype, f"one of {tuple(DTYPES)}")
        with open_model_folder(path):
            pass
        model = transformers().AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return cls(model, **settings)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The sum of the labelled tokens' cross entropies, and how many they are."""
        about = {key: value for key, value in batch.items() if key != "labels"}
        if about["attention_mask"].ndim == 4:
            about["attention_mask"] = _additive(about["attention_mask"], self.model.dtype)  # type: ignore[arg-type]
        hidden = self.model.base_model(**about, use_cache=False).last_hidden_state[:, :-1]  # type: ignore[operator,union-attr]
        targets = batch["labels"][:, 1:]
        learnt = targets != IGNORED
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        total = chunked_cross_entropy(hidden[learnt], targets[learnt], head, chunk=self.hparams["loss_chunk"])
        return total, int(learnt.sum())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        total, count = self.loss(batch)
        mean = total / max(count, 1)
        self.log("train_loss", mean, prog_bar=True, weight=count)
        return {"loss": mean, "weight": count}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        total, count = self.loss(batch)
        self.log("val_loss", total / max(count, 1), prog_bar=True, weight=count)

    def configure_optimizers(self) -> Any:
        settings = self.hparams
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings["weight_decay"]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), fused=True)
        schedule = warmup_schedule(
            optimizer,
            warmup_steps=settings["warmup_steps"],
            total_steps=settings["total_steps"],
            decay=settings["decay"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers to be added to the scores, which every attention of transformers understands."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
