"""Fused blocks under torch.distributed: the stock blocks' gradients and statistics on every rank."""

import gc

import torch
import torch.distributed.nn  # imported later, its default arguments keep the group, and Gloo's threads, for ever
from test_contract import assert_as_stock, image, three
from torch import nn


def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    compare_with_stock(rank)
    gc.collect()  # whatever holds the group: its threads end with it, before the interpreter does
    torch.distributed.destroy_process_group()


def compare_with_stock(rank):
    torch.manual_seed(0)
    blocks = three("basic")
    torch.manual_seed(rank)
    wrapped = {id(b): nn.parallel.DistributedDataParallel(b) for b in blocks}
    x = image(blocks[0])
    assert_as_stock(blocks, x, lambda b: wrapped[id(b)])
    fused = wrapped[id(blocks[0])]
    (fused(x).sum() + fused(x + 1).sum()).backward()  # the second call broadcasts running statistics in between
    mean = blocks[0].conv1.weight.grad.clone()
    torch.distributed.all_reduce(mean)
    torch.testing.assert_close(mean / 2, blocks[0].conv1.weight.grad)


def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
