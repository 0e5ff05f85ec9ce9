"""common-platform installed alone: detect, hand off, verify."""

import importlib.util
import tempfile
from pathlib import Path

import torch

from common_platform.artifact import ArtifactWriter, open_model_folder
from common_platform.platforms import detect

for sibling in ("trainkit", "servekit"):
    if importlib.util.find_spec(sibling):
        raise SystemExit(f"{sibling} is installed: this is not alone")
print(detect().devices[0].name)
with tempfile.TemporaryDirectory() as home:
    path = Path(home, "model")
    with ArtifactWriter(path) as writer:
        writer.write_json("config.json", {"architectures": ["Example"]})
        writer.write_tensors("model.safetensors", {"weight": torch.arange(6.0)})
        writer.commit()
    with open_model_folder(path) as folder:
        if not torch.equal(folder.tensor("weight"), torch.arange(6.0)):
            raise SystemExit("the tensor that came back is another one")
print("common-platform: ok")
