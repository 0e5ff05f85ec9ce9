"""Language models: chats as data, and a module that learns them."""

from trainkit.lm.data import ChatDataset, PackedDataset, collate_packed, pack
from trainkit.lm.docstrings import docstring_examples
from trainkit.lm.module import CausalLM

__all__ = ["CausalLM", "ChatDataset", "PackedDataset", "collate_packed", "docstring_examples", "pack"]
