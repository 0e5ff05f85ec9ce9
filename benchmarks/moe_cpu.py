"""How fast are the experts of a mixture on a CPU, beside Transformers' own two ways to compute them?

One layer with Qwen3-30B-A3B's proportions (128 experts, 8 of a token), of a quarter of its width: prompts, a batch of
decodes, and a single one, in float32 and bfloat16; and what int8 and int4 experts take of memory.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from common import Report, arguments, interleaved, median, seconds
from servekit.kernels.fused_moe import fused_moe
from servekit.kernels.fused_moe.experts import DenseExperts, ExpertWeights, quantize_experts
from servekit.kernels.fused_moe.native_experts import NativeExperts
from servekit.kernels.moe_routing import Routing, route
from servekit.kernels.native import Format, native_library
from servekit.kernels.native.library import Pool

HIDDEN, INNER, EXPERTS, TOP_K = 512, 192, 128, 8
TOKENS = (1, 32, 1024)
PEERS = ("eager", "batched_mm", "grouped_mm")  # ways of Transformers


def peer(way: str, gate_up: Tensor, down: Tensor) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = way
    layer = Qwen3MoeExperts(config).to(gate_up.dtype)
    with torch.no_grad():
        layer.gate_up_proj.copy_(gate_up)
        layer.down_proj.copy_(down)
    return layer


def size_of(weights: ExpertWeights) -> int:
    parts = [getattr(weights, name) for name in weights.__slots__]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


def compare(report: Report, dtype: torch.dtype, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5).to(dtype)
    down = (torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) * INNER**-0.5).to(dtype)
    layers = {way: peer(way, gate_up, down) for way in PEERS}
    ours = DenseExperts(gate_up), DenseExperts(down)
    library = native_library()
    if library is None:
        raise SystemExit("the C++ kernels were not built: there is nothing to measure")
    format = Format.F32 if dtype == torch.float32 else Format.BF16
    native = NativeExperts(library, Pool(library, torch.get_num_threads()), gate_up, down, format)
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        logits = torch.randn(tokens, EXPERTS, generator=generator)
        weights, experts = route(logits, Routing(num_experts=EXPERTS, top_k=TOP_K))
        numbers, shares = experts.long(), weights.to(dtype)
        sides = {"ours": lambda x=x, w=weights, e=experts: native(x, e, w)}
        sides["ours_by_torch"] = lambda x=x, w=weights, e=experts: fused_moe(x, e, w, *ours)
        for way, layer in layers.items():
            sides[way] = lambda x=x, n=numbers, s=shares, call=layer: call(x, n, s)
        with torch.inference_mode():
            want = sides["eager"]().float()
            off = (sides["ours"]().float() - want).norm() / want.norm()
            assert float(off) < 0.02, f"ours differs by {float(off)}"
            taken = interleaved({name: lambda call=call: seconds(call) for name, call in sides.items()}, rounds)
        middle = {name: median(values[1:]) for name, values in taken.items()}
        kind = str(dtype).removeprefix("torch.")
        for name, value in middle.items():
            report.figure(f"{kind}_{tokens}_tokens_{name}_ms", value * 1e3)
        best = min(middle[way] for way in PEERS)
        report.target(
            f"{kind}, {tokens} tokens: times as fast as the best of Transformers'", best / middle["ours"], ">=", 1.0
        )


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report(peers={"transformers": transformers.__version__})
    for dtype in (torch.float32, torch.bfloat16):
        compare(report, dtype, 6 if options.quick else 30)
    whole = torch.randn(8, 2 * INNER, HIDDEN).bfloat16()
    for kind in ("fp8", "int8", "int4"):
        saved = size_of(quantize_experts(whole, "dense")) / size_of(quantize_experts(whole, kind, parts=2))
        report.figure(f"{kind}_memory_saved_times", saved)
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
