"""How many bytes published weights take, whole and as what has changed since the version before.

    PYTHONPATH=. python benchmarks/deltas.py
    PYTHONPATH=. python benchmarks/deltas.py --width 512 --layers 8

A small GPT learns to predict the next byte of Python's own sources, in float32 with Adam, for 50 steps at 3e-4, and
then goes on at the learning rate of the row. Its weights are published as bfloat16 (in the last row as they are): once,
again after one step, and again after ten more. Bytes are those of all files of a version. "fetch" is a follower's, from
call to return; what it holds then is compared bit by bit with what the model holds.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ray_ckpt import WeightFollower, WeightPublisher

CONTEXT, BATCH, WARM_STEPS, LATER_STEPS = 64, 8, 50, 10


class Gpt(nn.Module):
    """A decoder of bytes."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        held = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        logits: torch.Tensor = self.head(self.layers(held, mask=mask, is_causal=True))
        return logits


def batches() -> Iterator[torch.Tensor]:
    """Pieces of source code, one byte longer than the context."""
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py")))
    data, chance = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=chance)
        yield torch.stack([data[start : start + CONTEXT + 1] for start in starts.tolist()])


def train(model: Gpt, optimizer: torch.optim.Optimizer, data: Iterator[torch.Tensor], steps: int) -> float:
    """The loss of the last of so many steps."""
    for _ in range(steps):
        batch = next(data)
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in directory.iterdir())


def row(model: Gpt, optimizer: torch.optim.Optimizer, data: Iterator[torch.Tensor], lr: float, dtype: str) -> str:
    """A row of the table."""
    model, state = copy.deepcopy(model), optimizer.state_dict()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(state))
    optimizer.param_groups[0]["lr"] = lr
    kind = getattr(torch, dtype)
    served = {name: torch.zeros_like(tensor, dtype=kind) for name, tensor in model.state_dict().items()}
    sizes, publishing, fetching = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        publisher, follower = WeightPublisher(directory), WeightFollower(directory)
        for version, steps in enumerate((0, 1, LATER_STEPS)):
            if steps:
                train(model, optimizer, data, steps)
            began = time.perf_counter()
            publisher.save(model, version, cast=kind)
            done = time.perf_counter()
            follower.fetch(served, version)
            fetching.append(time.perf_counter() - done)
            publishing.append(done - began)
            sizes.append(size_of(Path(directory) / f"step-{version}"))
            assert all(torch.equal(served[n], t.to(kind)) for n, t in model.state_dict().items()), "it is another one"
    whole, one, later = sizes
    return (
        f"| {lr:g} | {dtype} | {whole / 1e6:.1f} | {one / whole:.1%} | {later / whole:.1%} | "
        f"{publishing[0]:.2f} | {max(publishing[1:]):.2f} | {fetching[0]:.2f} | {max(fetching[1:]):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, data = Gpt(options.width, options.layers), batches()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    loss = train(model, optimizer, data, WARM_STEPS)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters / 1e6:.1f} million parameters, loss {loss:.2f} after {WARM_STEPS} steps\n")
    print(
        "| learning rate | weights | whole MB | one step later | ten more later | publish s, whole | as a delta | "
        "fetch s, whole | as a delta |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for lr in (1e-6, 1e-5, 3e-4):
        print(row(model, optimizer, data, lr, "bfloat16"), flush=True)
    print(row(model, optimizer, data, 1e-6, "float32"), flush=True)


if __name__ == "__main__":
    main()
