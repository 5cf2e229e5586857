"""Half of every weight each: torchrun --nproc-per-node 2 docs/examples/fsdp.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from relaxprop import ActivationRelaxation

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
x, labels = torch.rand(64, 20), torch.randint(4, (64,))

model = ActivationRelaxation(network)
fully_shard(network[0])  # a part, before or after the network is wrapped
fully_shard(model)  # then the wrapper
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(20):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x[rank::size]), labels[rank::size])
    loss.backward()
    optimizer.step()

total = sum(p.full_tensor().sum().item() for p in model.parameters())
print(f"process {rank} of {size}: {total:.6f}", flush=True)
dist.destroy_process_group()
