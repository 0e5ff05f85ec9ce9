"""A model trained by trainkit is the same model in transformers and in servekit, or it is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from tests.tiny import make_folder
from torch.utils.data import DataLoader

import trainkit
from common_platform import errors
from common_platform.artifact import open_model_folder, verify
from servekit import LLM, SamplingParams
from trainkit.export import handoff
from trainkit.lm import CausalLM, ChatDataset

CHATS = [
    [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(16)
]


@pytest.fixture(scope="module", params=["llama-tied", "llama", "qwen2"])
def trained(request, tmp_path_factory):
    """The base folder, the trained module, and what was handed off."""
    root = tmp_path_factory.mktemp("handoff")
    base = make_folder(root / "base", request.param)
    data = ChatDataset(CHATS, base, 64)
    module = CausalLM.from_folder(base, lr=1e-3, total_steps=4)
    trainer = trainkit.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, DataLoader(data, 4, collate_fn=data.collate))
    path = handoff(module, base, root / "tuned", metrics={"val_loss": 1.5}, provenance={"by": "a test"})
    return base, module, path


def test_the_manifest_says_what_it_is(trained):
    _, _, path = trained
    manifest = verify(path)
    assert manifest.provenance["metrics"] == {"val_loss": 1.5}
    assert manifest.provenance["global_step"] == 4
    assert manifest.provenance["by"] == "a test"
    assert manifest.provenance["versions"]["trainkit"] == trainkit.__version__
    assert len(manifest.probes) == 4
    assert manifest.model["dtype"] == "bfloat16"


def test_transformers_opens_it_and_computes_the_probes(trained):
    _, module, path = trained
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16).float()), name
    for probe in verify(path).probes:
        ids = torch.tensor([probe.token_ids])
        with torch.inference_mode():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(logprobs, torch.tensor(probe.logprobs), rtol=0, atol=1e-4)


def test_servekit_opens_it_and_answers_as_the_trained_model(trained):
    _, _, path = trained
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    with LLM(path, dtype="float32", kv_cache_memory_bytes=4 << 20) as llm:
        output = llm.chat(CHATS[3][:1], params)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0, len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)
    for row, entry in zip(logprobs, output.outputs[0].logprobs, strict=True):
        assert abs(float(row[entry.token_id]) - entry.logprob) < 1e-4
        assert float(row.max()) - float(row[entry.token_id]) < 1e-4


def test_training_left_its_mark(trained):
    base, _, path = trained
    with open_model_folder(base) as before, open_model_folder(path) as after:
        assert not torch.equal(before.tensor("model.norm.weight").bfloat16(), after.tensor("model.norm.weight"))


def test_every_damaged_file_is_refused_by_both_ends(trained):
    _, _, path = trained
    for file in sorted(p for p in path.iterdir() if p.name != "manifest.json"):
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        try:
            for use in (LLM, CausalLM.from_folder):
                with pytest.raises(errors.ArtifactDigestMismatch, match=file.name):
                    use(path)
        finally:
            file.write_bytes(content)
    verify(path)


def test_weights_exchanged_with_a_valid_manifest_are_caught_by_the_probes(trained, tmp_path):
    """Somebody wrote other weights and made the manifest fit: the digests are right, the answers are not."""
    import hashlib
    import shutil

    from safetensors.torch import load_file, save_file

    _, _, path = trained
    forged = shutil.copytree(path, tmp_path / "forged")
    weights = load_file(forged / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, forged / "model.safetensors")
    data = (forged / "model.safetensors").read_bytes()
    manifest = json.loads((forged / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["name"] == "model.safetensors":
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (forged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(errors.ArtifactDigestMismatch, match="probes"):
        LLM(forged, kv_cache_memory_bytes=4 << 20)


def test_what_cannot_be_handed_off_says_why(trained, tmp_path):
    base, module, path = trained
    with pytest.raises(errors.ConfigError, match="overwrite"):
        handoff(module, base, path)
    with pytest.raises(errors.ExportError, match="causal LM"):
        handoff(torch.nn.Linear(2, 2), base, tmp_path / "x")
    with pytest.raises(errors.ConfigError, match="dtype"):
        handoff(module, base, tmp_path / "x", dtype="int3")
    weight = module.model.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("nan")
    with pytest.raises(errors.ExportError, match=r"model\.norm\.weight"):
        handoff(module, base, tmp_path / "x")
    with torch.no_grad():
        weight.copy_(kept)
    assert list(tmp_path.iterdir()) == []


def test_large_models_are_written_in_shards(trained, tmp_path, monkeypatch):
    base, module, _ = trained
    monkeypatch.setattr(sys.modules["trainkit.export.handoff"], "SHARD_BYTES", 50_000)
    path = handoff(module, base, tmp_path / "sharded", num_probes=1)
    with open_model_folder(path) as folder:
        assert len(list(path.glob("model-*.safetensors"))) > 1
        for name, tensor in module.model.state_dict().items():
            if name in folder.tensor_names:
                assert torch.equal(folder.tensor(name), tensor.to(torch.bfloat16))
    transformers.AutoModelForCausalLM.from_pretrained(path)
