"""Accelerate: a loop of one's own with accumulated gradients, which it takes to be on gloo."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.ecosystem.replicas import check, digest

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(accelerator.process_index)  # so that it is DDP that makes them alike
net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
inputs = torch.randn(72, 8, generator=torch.Generator().manual_seed(0))
dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
model, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(dataset, batch_size=8, shuffle=True))
before = digest(net)
num_seen = 0
for batch, target in loader:
    with accelerator.accumulate(model):
        output = model(batch)
        accelerator.backward(nn.functional.mse_loss(output, target))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    num_seen += len(accelerator.gather_for_metrics(output))
assert num_seen == len(dataset), f"{num_seen} outputs were gathered of {len(dataset)}"
check(net, before)
accelerator.end_training()
