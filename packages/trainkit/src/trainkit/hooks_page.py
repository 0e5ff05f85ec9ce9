"""docs/hooks.md, made from the table of hooks: ``python -m trainkit.hooks_page docs/hooks.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from trainkit.hooks import HOOKS

HEAD = """# Hooks

Made from `trainkit/hooks.py` by `python -m trainkit.hooks_page docs/hooks.md`; do not edit.

The hooks are in the order in which a fit, and then an evaluation, calls them. Names, order and arguments are
Lightning's, and a test records both libraries to hold that. A hook is called on the callbacks in their order and then
on the module; those in the column *data* on the data module, where it has them. Arguments of callbacks follow
`(self, trainer, pl_module)`. `dataloader_idx` is passed where there are several loaders.

- Callbacks that keep checkpoints come after the module, so that what they save is whole.
- `EarlyStopping` and the like come after the module's `on_train_epoch_end`, so that they see what it logs.
- After an exception there is a `teardown`, which Lightning leaves out.

| hook | callback | module | data | when |
|---|---|---|---|---|
"""


def page() -> str:
    """The page."""
    rows = []
    for hook in HOOKS:
        owners = [hook.callback, hook.module, hook.data]
        columns = ["" if arguments is None else f"({', '.join(arguments)})" for arguments in owners]
        rows.append(f"| `{hook.name}` | {' | '.join(columns)} | {hook.when} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
