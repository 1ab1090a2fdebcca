"""Lightning's Trainer: fit, with a validation whose metric is over all ranks."""

import os
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.ecosystem.replicas import check, digest


class Regression(lightning.LightningModule):
    """A small network that learns a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
torch.manual_seed(int(os.environ["RANK"]))  # so that it is DDP that makes them alike
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)
model = Regression()
before = digest(model)
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=2,
    strategy=DDPStrategy(process_group_backend=sys.argv[1]),
    max_epochs=2,
    default_root_dir=Path(sys.argv[2]),
    enable_progress_bar=False,
    logger=False,
)
trainer.fit(model, loader, loader)
check(model, before)
