"""Models of the layout matrix: odd-sized perceptrons, one with tensor subclasses and one whose hooks split entries, and
two decoders of transformers with tiny random weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from tests.support.models import Scale
from tests.support.subclasses import RowInt8

VOCABULARY, SEQUENCE = 31, 7


class OddPerceptron(nn.Sequential):
    """Widths that no number of ranks divides, a persistent buffer, and more parts than stages."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(37, 61),
            nn.Sequential(nn.Tanh(), nn.Linear(61, 113)),
            nn.Sequential(Scale(113), nn.Linear(113, 61)),
            nn.Sequential(nn.Tanh(), nn.Linear(61, 37)),
            nn.Linear(37, 61),
            nn.Linear(61, 37),
        )

    def sample_batch(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(batch_size, 37, generator=generator)
        return inputs, inputs.flip(-1)

    def tp_plan(self) -> dict[str, ParallelStyle]:
        columns = ColwiseParallel(output_layouts=Replicate())
        rows = RowwiseParallel(input_layouts=Replicate())
        return {"0": columns, "1.1": rows, "2.1": columns, "3.1": rows, "4": columns, "5": rows}


class Offset(nn.Module):
    """Adds what a persistent buffer says that is made of an int8 tensor and of a scale per row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("offset", RowInt8(torch.empty(dim, 4, dtype=torch.int8), torch.empty(dim, 1)))

    def reset_parameters(self) -> None:
        self.offset.copy_(RowInt8.of(torch.randn(self.offset.shape)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.offset.values().mean(1)


class Quantized(OddPerceptron):
    """With buffers that are tensor subclasses; it is trained with momentum that is, too."""

    def __init__(self) -> None:
        super().__init__()
        self[2] = nn.Sequential(Scale(113), nn.Linear(113, 61), Offset(61))
        self[3] = nn.Sequential(nn.Tanh(), nn.Linear(61, 37), Offset(37))


class Fused(nn.Module):
    """Has one weight, and shows it as three: hooks split it in its state dict, and join it in a load."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_join)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = nn.functional.linear(hidden, self.weight).chunk(3, -1)
        return hidden + query.tanh() * key + value


def _split(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: object) -> None:
    parts = state.pop(f"{prefix}weight").chunk(3)
    state |= {f"{prefix}{name}": part for name, part in zip("qkv", parts, strict=True)}


def _join(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    if all(f"{prefix}{name}" in state for name in "qkv"):
        state[f"{prefix}weight"] = torch.cat([state.pop(f"{prefix}{name}") for name in "qkv"])


class Hooked(OddPerceptron):
    """With weights that its state dict shows otherwise than it has them."""

    def __init__(self) -> None:
        super().__init__()
        self[3] = nn.Sequential(Fused(61), nn.Linear(61, 37))

    def tp_plan(self) -> dict[str, ParallelStyle]:
        return {name: style for name, style in super().tp_plan().items() if name != "3.1"}


class Decoder(nn.Module):
    """A causal language model of transformers that can be cut: it passes on what the missing parts would have taken."""

    def __init__(self, whole: PreTrainedModel) -> None:
        super().__init__()
        self.model = whole.model
        self.lm_head = whole.lm_head
        self.num_layers = whole.config.num_hidden_layers
        self._init_weights = whole._init_weights

    def pipeline_parts(self) -> list[str]:
        layers = [f"model.layers.{number}" for number in range(self.num_layers)]
        return ["model.embed_tokens", *layers, "model.norm", "lm_head"]

    def forward(self, tokens_or_hidden: torch.Tensor) -> torch.Tensor:
        for name in ("embed_tokens", "norm"):
            if getattr(self.model, name) is None:
                setattr(self.model, name, nn.Identity())
        hidden = self.model(input_ids=tokens_or_hidden, use_cache=False).last_hidden_state
        return hidden if self.lm_head is None else self.lm_head(hidden)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def sample_batch(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(VOCABULARY, (batch_size, SEQUENCE), generator=generator)
        return tokens, tokens.roll(-1, 1)

    def tp_plan(self) -> dict[str, ParallelStyle]:
        attention, mlp = "model.layers.*.self_attn", "model.layers.*.mlp"
        columns = [f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"]
        columns += [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        return {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            **{name: ColwiseParallel() for name in columns},
            **{name: RowwiseParallel() for name in (f"{attention}.o_proj", f"{mlp}.down_proj")},
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        }


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attn_implementation": "eager",
}


def llama() -> Decoder:
    """Its embeddings are tied: input and output share one weight."""
    return Decoder(LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True)))


def mixtral() -> Decoder:
    """A mixture of four experts, two of which see each token."""
    config = MixtralConfig(**_SIZES, num_local_experts=4, experts_implementation="eager")
    return Decoder(MixtralForCausalLM(config))


MODELS = {
    "perceptron": OddPerceptron,
    "quantized": Quantized,
    "hooked": Hooked,
    "llama": llama,
    "mixtral": mixtral,
}
