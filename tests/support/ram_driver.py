"""A driver that saves to the cluster's memory, says so, and waits for its end."""

from __future__ import annotations

import sys
import threading

import ray
import torch

import ray_ckpt

if __name__ == "__main__":
    address, target = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    ray_ckpt.save({"x": torch.arange(1000)}, target)
    print("saved", flush=True)
    threading.Event().wait()
