"""Train under Ray Train with checkpoints of ray_ckpt; be killed; resume on another number of workers.

    python jobs/ray_train.py --storage /mnt/shared/run4 --workers 4
    python jobs/ray_train.py --storage /mnt/shared/run4 --workers 2      after the first was killed

Needs `pip install "ray[train]"`. `docs/ray_train.md` goes through it.
"""

import argparse
import json
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ray_ckpt import write_report


def train_loop(config: dict[str, Any]) -> None:
    import torch
    from torch.distributed.fsdp import fully_shard

    from ray_ckpt import EventFile, TrainState
    from ray_ckpt.integrations.ray_train import report, resume

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    fully_shard(model)
    state = TrainState(model, torch.optim.Adam(model.parameters()))
    store, ranks = f"{config['storage']}/steps", ray.train.get_context()
    events = EventFile(config["events"]) if config["events"] else None
    resumed = resume(state, store, events=events)
    first = (resumed and resumed.step) or 0
    for step in range(first, config["steps"]):
        batch = torch.randn(60, 8, generator=torch.Generator().manual_seed(step))
        inputs = batch.chunk(ranks.get_world_size())[ranks.get_world_rank()]
        state.optimizer.zero_grad()
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        state.optimizer.step()
        if (step + 1) % config["save_every"] == 0:
            report(state, store, step + 1, {"step": step + 1, "first": first}, events=events)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True, help="an absolute path or a URI that all nodes share")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--events", metavar="FILE", help="append what workers go through, as JSON lines")
    parser.add_argument("--report", metavar="FILE", help="draw the last checkpoint as one HTML page")
    config = vars(parser.parse_args())
    run, scaling = RunConfig("ray_train", config["storage"]), ScalingConfig(num_workers=config["workers"])
    trainer = TorchTrainer(train_loop, train_loop_config=config, scaling_config=scaling, run_config=run)
    print(json.dumps(trainer.fit().metrics))
    if config["report"]:
        write_report(f"{config['storage']}/steps", config["report"])
