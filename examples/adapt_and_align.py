"""Teach a model answers with an adapter (SFT, packed rows), then which answers are preferred (DPO), and hand it off.

python examples/adapt_and_align.py                        # SmolLM2-135M on Python's docstrings
python examples/adapt_and_align.py --model FOLDER --steps 50 --out adapted
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from torch.utils.data import DataLoader

import trainkit
from common_platform.embedded import smollm2
from trainkit.export import handoff
from trainkit.lm import (
    DPO,
    CausalLM,
    ChatDataset,
    Lora,
    PackedDataset,
    Preference,
    PreferenceDataset,
    docstring_examples,
    merged,
    save_adapter,
)

MAX_LENGTH = 256  # tokens of a chat
ROW = 512  # tokens of a packed row


def trainer(steps: int, out: Path) -> trainkit.Trainer:
    return trainkit.Trainer(
        max_steps=steps, gradient_clip_val=1.0, enable_checkpointing=False, default_root_dir=out, log_every_n_steps=1
    )


def teach(base: Path, steps: int, out: Path) -> CausalLM:
    """Supervised fine-tuning of an adapter; what the model itself weighs stays as it was."""
    chats = [example.as_chat() for example in docstring_examples("train")[: 8 * steps]]
    rows = PackedDataset(ChatDataset(chats, base, MAX_LENGTH), ROW)
    module = CausalLM.from_folder(base, lora=Lora(rank=8), lr=3e-4, warmup_steps=min(2, steps), total_steps=steps)
    trainer(steps, out / "sft").fit(module, DataLoader(rows, 1, shuffle=True, collate_fn=rows.collate))
    save_adapter(module, out / "adapter")
    return module


def align(taught: CausalLM, base: Path, steps: int, out: Path) -> DPO:
    """Prefer a function's own docstring to that of its neighbour."""
    examples = docstring_examples("train")[: 4 * steps + 1]
    preferences = [
        Preference(one.as_chat()[:1], chosen=one.answer, rejected=other.answer) for one, other in pairwise(examples)
    ]
    pairs = PreferenceDataset(preferences, base, MAX_LENGTH)
    module = DPO(merged(taught), lora=Lora(rank=8), lr=1e-4, beta=0.1, total_steps=steps)
    trainer(steps, out / "dpo").fit(module, DataLoader(pairs, 2, shuffle=True, collate_fn=pairs.collate))
    return module


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: SmolLM2-135M-Instruct, embedded)")
    parser.add_argument("--out", type=Path, default=Path("adapted"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each of the two parts")
    args = parser.parse_args(arguments)
    trainkit.seed_everything(0)
    base = args.model or smollm2()
    taught = teach(base, args.steps, args.out)
    aligned = align(taught, base, args.steps, args.out)
    print(f"written: {handoff(aligned, base, args.out / 'model', overwrite=True)}")


if __name__ == "__main__":
    main()
