"""Two processes train one network: torchrun --nproc-per-node 2 docs/examples/ddp.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from relaxprop import ActivationRelaxation

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same network and the same data in every process
network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
x, labels = torch.rand(64, 20), torch.randint(4, (64,))

model = DistributedDataParallel(ActivationRelaxation(network))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(20):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x[rank::size]), labels[rank::size])
    loss.backward()
    optimizer.step()

total = sum(p.sum().item() for p in network.parameters())
print(f"process {rank} of {size}: {total:.6f}", flush=True)
del model  # before its group: Gloo may otherwise wait for it for ever
dist.destroy_process_group()
