"""Lightning Fabric: a loop of one's own, which Fabric sets up."""

import sys

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.ecosystem.replicas import check, digest

fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend=sys.argv[1]))
fabric.launch()
torch.manual_seed(fabric.global_rank)  # so that it is DDP that makes them alike
net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.01))
inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
loader = fabric.setup_dataloaders(DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8))
before = digest(net)
for batch, target in loader:
    optimizer.zero_grad()
    fabric.backward(nn.functional.mse_loss(model(batch), target))
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
assert fabric.all_reduce(torch.tensor(float(fabric.global_rank)), reduce_op="sum") == 1
check(net, before)
