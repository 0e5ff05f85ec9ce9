"""Merged parts are attention to all keys."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.backends import DEVICE, backends, cases

MERGE = backends("servekit.kernels.merge_attention", "merge_attention")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize(("backend", "dtype"), cases(MERGE))
@pytest.mark.parametrize(("sizes", "width"), [((5,), 16), ((3, 0, 7), 24), ((1, 40, 0), 130), ((0, 0), 8)])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
def test_parts_of_any_size_make_the_whole(backend, dtype, sizes, width, has_sinks):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, width, dtype=torch.float64, generator=generator)
    keys, values = torch.randn(2, sum(sizes), width, dtype=torch.float64, generator=generator)
    scores = query @ keys.t()
    sinks = torch.tensor([0.5, -2.0])
    whole = torch.cat((scores, sinks.double()[None, :, None].expand(3, 2, 1)), dim=-1) if has_sinks else scores
    exact = whole.softmax(dim=-1)[..., : sum(sizes)] @ values if sum(sizes) else torch.zeros_like(query)
    parts = torch.full((len(sizes), 3, 2, width), float("nan"))  # what is in a part without keys does not matter
    log_sums = torch.full((len(sizes), 3, 2), float("-inf"))
    for part, some in enumerate(scores.split(list(sizes), dim=-1)):
        if some.shape[-1]:
            parts[part] = (some.softmax(dim=-1) @ values.split(list(sizes))[part]).float()
            log_sums[part] = some.logsumexp(dim=-1).float()
    given = {"sinks": sinks.to(DEVICE)} if has_sinks else {}
    merged = MERGE[backend](parts.to(DEVICE), log_sums.to(DEVICE), dtype, **given)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double().cpu(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
