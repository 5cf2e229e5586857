"""Accelerate: torchrun --nproc-per-node 2 docs/examples/accelerated.py"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from relaxprop import ActivationRelaxation

accelerator = Accelerator(cpu=True)  # leave cpu out where there are GPUs

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
x, labels = torch.rand(64, 20), torch.randint(4, (64,))

model = ActivationRelaxation(network)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
loader = DataLoader(TensorDataset(x, labels), batch_size=32)  # of every process
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(20):
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()

total = sum(p.sum().item() for p in network.parameters())
rank, size = accelerator.process_index, accelerator.num_processes
print(f"process {rank} of {size}: {total:.6f}", flush=True)
# The model goes before its group: Gloo may otherwise wait for it for ever.
model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
accelerator.end_training()
