"""Language models: chats and preferences as data, and modules that learn them, whole or by adapters."""

from trainkit.lm.allocator import return_freed_memory
from trainkit.lm.data import ChatDataset, PackedDataset, collate_packed, pack
from trainkit.lm.docstrings import docstring_examples
from trainkit.lm.dpo import DPO, Preference, PreferenceDataset, dpo_loss
from trainkit.lm.lora import Lora, load_adapter, merged, save_adapter
from trainkit.lm.module import CausalLM

__all__ = [
    "DPO",
    "CausalLM",
    "ChatDataset",
    "Lora",
    "PackedDataset",
    "Preference",
    "PreferenceDataset",
    "collate_packed",
    "docstring_examples",
    "dpo_loss",
    "load_adapter",
    "merged",
    "pack",
    "return_freed_memory",
    "save_adapter",
]
