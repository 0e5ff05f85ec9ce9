"""Real text that needs no download: the docstrings of Python's standard library, as questions and answers.

Sources are parsed, never imported. A module, with all that is in it, is either in the training part or in the
held-out part, decided by a hash of its name, so that no held-out answer has a near copy in training.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common_platform.errors import ConfigError

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 0.15
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "site-packages", "pydoc_data"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class DocstringExample:
    """One public function, method or class of the standard library and what its docstring says."""

    module: str  # "textwrap"
    name: str  # "dedent", or "TextWrapper.fill"
    signature: str  # "dedent(text)"; empty for a class
    answer: str  # the docstring, dedented

    @property
    def question(self) -> str:
        if not self.signature:
            return f"What is the class `{self.module}.{self.name}` in Python?"
        return f"What does `{self.module}.{self.signature}` do in Python?"

    def as_chat(self) -> list[dict[str, str]]:
        """The messages of a chat, to be rendered by a model's own template."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def docstring_examples(split: Split, *, min_chars: int = 60, max_chars: int = 500) -> list[DocstringExample]:
    """All examples of one part, in a fixed order that mixes the modules.

    Args:
        split: "train" or "held_out".
        min_chars: shorter docstrings say too little.
        max_chars: longer ones are left out whole, so that each answer has its end.

    Raises:
        ConfigError: ``split`` is another word.
    """
    if split not in ("train", "held_out"):
        raise ConfigError("split", split, "one of ('train', 'held_out')")
    held_out = split == "held_out"
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {
        example.answer: example  # the first of equal docstrings
        for path in _sources(root)
        if _is_held_out(_module_name(root, path)) == held_out
        for example in _examples_of(_module_name(root, path), path)
        if min_chars <= len(example.answer) <= max_chars
    }
    return sorted(found.values(), key=lambda e: _hash(f"{e.module}.{e.name}"))


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        *folders, name = path.relative_to(root).parts
        is_private = any(part.startswith("_") for part in [*folders, name.removeprefix("__init__")])
        if not is_private and not SKIPPED_FOLDERS.intersection(folders):
            yield path


def _module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_held_out(module: str) -> bool:
    return int(_hash(module.split(".")[0])[:8], 16) / 2**32 < HELD_OUT_SHARE


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _examples_of(module: str, path: Path) -> Iterator[DocstringExample]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few files are there to be wrong
        return
    for node in tree.body:
        if isinstance(node, Function):
            yield from _example(module, node, prefix="")
        elif isinstance(node, ast.ClassDef):
            yield from _example(module, node, prefix="")
            for member in node.body:
                if isinstance(member, Function):
                    yield from _example(module, member, prefix=f"{node.name}.")


def _example(module: str, node: Function | ast.ClassDef, prefix: str) -> Iterator[DocstringExample]:
    text = ast.get_docstring(node, clean=False)
    if not text or node.name.startswith("_") or prefix.startswith("_"):
        return
    name = prefix + node.name
    signature = f"{name}({_arguments(node.args)})" if isinstance(node, Function) else ""
    yield DocstringExample(module, name, signature, inspect.cleandoc(text).strip())


def _arguments(args: ast.arguments) -> str:
    names = [a.arg for a in [*args.posonlyargs, *args.args]]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [a.arg for a in args.kwonlyargs]
    names += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return ", ".join(n for n in names if n not in ("self", "cls"))
