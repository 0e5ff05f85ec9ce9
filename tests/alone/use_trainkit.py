"""trainkit installed alone: train, stop, resume."""

import importlib.util
import tempfile

import torch
from torch.utils.data import DataLoader, TensorDataset

import trainkit

if importlib.util.find_spec("servekit"):
    raise SystemExit("servekit is installed: this is not alone")


class Line(trainkit.TrainModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = ((self.layer(x) - y) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


trainkit.seed_everything(0)
x = torch.randn(64, 3)
data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
with tempfile.TemporaryDirectory() as home:
    trainkit.Trainer(max_epochs=2, default_root_dir=home).fit(Line(), data)
    trainer = trainkit.Trainer(max_epochs=6, default_root_dir=home, log_every_n_steps=1)
    trainer.fit(Line(), data, ckpt_path="last")
if trainer.global_step != 48 or trainer.callback_metrics["loss"] > 0.05:
    raise SystemExit(f"step {trainer.global_step}, {trainer.callback_metrics}")
print("trainkit: ok")
