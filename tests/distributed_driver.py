"""One of torchrun's processes: trains a network in three ways, and saves the parameters that each leaves.

    torchrun --standalone --nproc-per-node 2 distributed_driver.py FOLDER

writes {"stock": [...], "fused": [...], "step": [...]} to FOLDER/RANK.pt: of torch alone and of fastmlp's
parts, both under DistributedDataParallel in the standard loop, and of TrainStep with a process group.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastmlp

STEPS, BATCH, SIZES = 3, 8, (5, 9, 3)
OPTIONS = {"lr": 0.1, "momentum": 0.9}

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())  # each process begins with weights and data of its own
data = [(torch.randn(BATCH, SIZES[0]), torch.randint(SIZES[-1], (BATCH,))) for _ in range(STEPS)]
fused = fastmlp.MLP(*SIZES)
in_one_call = copy.deepcopy(fused)
stock = nn.Sequential(nn.Linear(*SIZES[:2]), nn.ReLU(), nn.Linear(*SIZES[1:]))
with torch.no_grad():
    for own, weights in zip(stock.parameters(), fused.parameters(), strict=True):
        own.copy_(weights)


def train(model, loss, optimizer):
    parallel = DistributedDataParallel(model)
    for x, target in data:
        value = loss(parallel(x), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


train(stock, nn.CrossEntropyLoss(), torch.optim.SGD(stock.parameters(), **OPTIONS))
train(fused, fastmlp.CrossEntropyLoss(), fastmlp.SGD(fused.parameters(), **OPTIONS))
optimizer = fastmlp.SGD(in_one_call.parameters(), **OPTIONS)
step = fastmlp.TrainStep(in_one_call, nn.CrossEntropyLoss(), optimizer, process_group=dist.group.WORLD)
for x, target in data:
    step(x, target)

models = {"stock": stock, "fused": fused, "step": in_one_call}
parameters = {name: [p.detach() for p in model.parameters()] for name, model in models.items()}
torch.save(parameters, f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
os._exit(0)  # all is done: at a usual exit, threads of torch's that still end may abort the process
