"""The models that bench_inference.py compares: a static one, its twin, and other ways to mix experts by row."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from twinmerge.hf.loading import load_backbone
from twinmerge.hf.model import TwinModel
from twinmerge.routing.fit import fit_router
from twinmerge.routing.group_wise import group_gates
from twinmerge.routing.router import Router, Stored
from twinmerge.runtime.compose import theta
from twinmerge.runtime.layers import form_of
from twinmerge.tensors.low_rank import LowRank
from twinmerge.tensors.parts import Dense
from twinmerge.twin.features import Features, Layers
from twinmerge.twin.recipe import RouterSettings

SEED, RANK, EXPERTS, DROP = 0, 8, 8, 0.02
LAST = Layers("last")
FLOAT32, BFLOAT16 = 1e-4, 0.05
"""Largest difference allowed: of states of size 1 in float32; of logits in bfloat16 (8 bits, 12 layers), over their
deviation."""
Inputs = dict[str, Any]


def synthetic_experts(backbone: torch.nn.Module, count: int, rank: int) -> dict[str, dict[str, Any]]:
    """Exclusive parts of the right shapes for all linear layers, biases and norms."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = {}
    for module_name, module in backbone.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            form = form_of(module)
            kind = None if form is None else form.kind if leaf == form.matrix else "vector"
            if kind in ("linear", "vector") and "lm_head" not in module_name:
                shapes[f"{module_name}.{leaf}"] = kind, value

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def part(kind: str, like: Tensor) -> Any:
        if kind == "vector":
            return Dense((0.02 * random(*like.shape)).to(like.dtype))
        up, down = random(like.shape[0], rank), random(rank, like.shape[1])
        return LowRank((0.02 * up).to(like.dtype), (0.05 * down).to(like.dtype))

    return {f"e{t:03d}": {name: part(*entry) for name, entry in shapes.items()} for t in range(count)}


def one_expert_gates(rows: int, experts: int) -> Tensor:
    """A largest gate of 0.9 to 1, the rest shared out evenly."""
    generator = torch.Generator().manual_seed(SEED)
    top = 0.9 + 0.1 * torch.rand(rows, 1, generator=generator)
    chosen = torch.randint(0, experts, (rows, 1), generator=generator)
    return ((1 - top) / max(1, experts - 1)).expand(rows, experts).clone().scatter_(1, chosen, top)


def soft_gates(rows: int, experts: int) -> Tensor:
    """Four experts in every row."""
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:4] for _ in range(rows)])
    weights = 0.2 + torch.rand(rows, 4, generator=generator)
    return torch.zeros(rows, experts).scatter_(1, chosen, weights / weights.sum(dim=1, keepdim=True))


def random_inputs(rows: int, length: int) -> Inputs:
    """Token ids without padding."""
    ids = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(SEED))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def some_rows(inputs: Inputs, first: int, count: int = 1) -> Inputs:
    """A part of a batch."""
    return {name: value[first : first + count] for name, value in inputs.items()}


class Encoder:
    """MiniLM in all its ways."""

    def __init__(self, base: Path, experts: int = EXPERTS, rank: int = RANK) -> None:
        """Load the base as shared expert with synthetic exclusive parts."""
        self.static = load_backbone(base)
        self.exclusive = synthetic_experts(self.static, experts, rank)
        self.shared = dict(self.static.named_parameters())
        self.twin = TwinModel(load_backbone(base), self.exclusive, drop_below=DROP)
        self.experts = experts

    def rebuilt(self, gate: Tensor) -> torch.nn.Module:
        """The dense model for one gate."""
        model = copy.deepcopy(self.static)
        model.load_state_dict(theta(self.shared, list(self.exclusive.values()), gate), strict=False)
        return model

    def check(self, found: Tensor, gates: Tensor, inputs: Inputs) -> float:
        """Largest difference from the dense reference on three rows; one that is off ends the run."""
        worst = 0.0
        for row in range(min(3, len(gates))):
            with torch.inference_mode():
                want = self.rebuilt(gates[row])(**some_rows(inputs, row))[0][0]
            real = int(inputs["attention_mask"][row].sum())
            worst = max(worst, float((found[row, :real] - want[:real]).abs().max()))
        if worst > FLOAT32:
            raise SystemExit(f"outputs differ from the dense reference by {worst}")
        return worst

    def in_mode(self, mode: Any, gates: Tensor, inputs: Inputs, *, forget: bool = False) -> Callable[[], Tensor]:
        """The twin, one way forced; `forget`: as if its gates had never been met."""

        def run() -> Tensor:
            if forget:
                self.twin.merged.clear()
            states: Tensor = self.twin.encode(gates, mode=mode, **inputs)[0]
            return states

        return run

    def modes(self, gates: Tensor, inputs: Inputs, *names: str) -> tuple[dict[str, Callable[[], Any]], float]:
        """The twin in some modes, each compared with the dense reference; and the largest difference."""
        runs = {f"twin, {name}": self.in_mode(name, gates, inputs) for name in names}
        return runs, max(self.check(run(), gates, inputs) for run in runs.values())

    def memory_ratio(self) -> float:
        """Bytes of the loaded twin's tensors over those of one model."""
        parts = {t.data_ptr(): t.nbytes for t in [*self.twin.parameters(), *self.twin.buffers()]}
        return sum(parts.values()) / sum(p.nbytes for p in self.static.parameters())


def published(ours: Encoder, router: Router, inputs: Inputs) -> Callable[[], Tensor]:
    """The published code's way for one sample: a routing pass at batch 1, then all weights anew, then the pass.

    Every parameter of every expert is a dense vector in memory; scaled by the gate, summed, added, loaded.
    """
    dense = [
        {n: own[n].dense().reshape(value.shape) if n in own else 0 * value for n, value in ours.shared.items()}
        for own in ours.exclusive.values()
    ]
    routing_model, answering = ours.static, copy.deepcopy(ours.static)

    def run() -> Tensor:
        gate = router.route(Stored({LAST: routing_model(**inputs)[0].mean(dim=1)})).gate[0].tolist()
        scaled = [
            {name: weight * vector for name, vector in own.items()} for weight, own in zip(gate, dense, strict=True)
        ]
        state = {name: value + sum(own[name] for own in scaled) for name, value in ours.shared.items()}
        answering.load_state_dict(state)
        states: Tensor = answering(**inputs)[0]
        return states

    return run


def group_wise(ours: Encoder, gates: Tensor, inputs: Inputs) -> Callable[[], None]:
    """The published group-wise mode on this batch: at most 20 groups, a merged model each, made for the batch."""
    group, means = group_gates(gates, gates.argmax(dim=1), 20, seed=SEED)
    parts, model = list(ours.exclusive.values()), copy.deepcopy(ours.static)

    def run() -> None:
        for index, gate in enumerate(means):
            model.load_state_dict(theta(ours.shared, parts, gate), strict=False)
            rows = (group == index).nonzero()[:, 0]
            model(**{key: value[rows] for key, value in inputs.items()})

    return run


def separate_models(ours: Encoder, gates: Tensor, inputs: Inputs) -> Callable[[], None]:
    """As many models in memory as experts; each row goes to its expert's."""
    models = [ours.rebuilt(row) for row in torch.eye(ours.experts)]
    chosen = gates.argmax(dim=1)

    def run() -> None:
        for index, model in enumerate(models):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                model(**{key: value[rows] for key, value in inputs.items()})

    return run


def lora_settings(model: torch.nn.Module, **more: Any) -> LoraConfig:
    """An adapter on every linear layer of the backbone."""
    targets = sorted(
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    )
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, **more)


def peft_rows(static: torch.nn.Module, experts: list[int]) -> tuple[Any, list[str]]:
    """PEFT's mixed batch: one adapter a row, no biases and norms; the model and the rows' adapters."""
    settings = lora_settings(static)
    model: Any = get_peft_model(copy.deepcopy(static), settings, adapter_name="e0")
    for index in range(1, EXPERTS):
        model.add_adapter(f"e{index}", settings)
    dtype = next(static.parameters()).dtype
    return model.to(dtype).eval(), [f"e{index}" for index in experts]


class Inside(torch.nn.Module):
    """A backbone as X-LoRA finds one: in an attribute `model`."""

    def __init__(self, model: Any) -> None:
        """Take a copy."""
        super().__init__()
        self.model, self.config = copy.deepcopy(model), copy.deepcopy(model.config)
        self.config.use_cache = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, **inputs: Any) -> Any:
        """The backbone's."""
        return self.model(**inputs)


def peft_xlora(static: Any, folder: Path) -> Any:
    """PEFT's X-LoRA: its own classifier mixes the same adapters by token, after a pass of its own."""
    paths, model = {}, Inside(static)
    for index in range(EXPERTS):
        adapter: Any = get_peft_model(Inside(static), lora_settings(model))
        adapter.save_pretrained(folder / f"e{index}")
        paths[f"e{index}"] = str(folder / f"e{index}")
    settings = XLoraConfig(hidden_size=static.config.hidden_size, adapters=paths, xlora_depth=1)
    mixed: Any = get_peft_model(model, settings)
    for name, path in paths.items():  # PEFT 0.21 loses them on the way and then misses them
        mixed.base_model.lora_model.peft_config.setdefault(name, LoraConfig.from_pretrained(path))
    return mixed.eval()


def untrained_router(experts: int, features: int) -> Router:
    """The paper's network, for its time alone."""
    torch.manual_seed(SEED)
    names = [f"e{index:03d}" for index in range(experts)]
    rows = Stored({LAST: torch.randn(8 * experts, features)})
    return fit_router(rows, 8 * names, RouterSettings(method="mlp", features=Features(LAST), epochs=1), seed=SEED)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's notes on models that it does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama() -> tuple[Any, TwinModel, dict[str, dict[str, Any]]]:
    """A bf16 Llama (hidden 768, 12 layers) with random weights, its twin, and the exclusive parts."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32000,
        dtype=torch.bfloat16,
    )  # fmt: skip
    static: Any = LlamaForCausalLM(config)
    static = static.to(torch.bfloat16).eval()
    exclusive = synthetic_experts(static, EXPERTS, RANK)
    return static, TwinModel(copy.deepcopy(static), exclusive, merge_bytes=2**31), exclusive


def check_llama(static: Any, exclusive: Mapping[str, Any], gate: Tensor, found: Tensor, ids: Tensor) -> float:
    """Difference of the last token's logits (vocabulary,) from the dense reference's, over their deviation."""
    model = copy.deepcopy(static)
    model.load_state_dict(theta(dict(static.named_parameters()), list(exclusive.values()), gate), strict=False)
    with torch.inference_mode():
        want = model(input_ids=ids).logits[0, -1].float()
    difference = float((found.float() - want).norm() / (want - want.mean()).norm())
    if difference > BFLOAT16:
        raise SystemExit(f"logits differ from the dense reference by {difference}")
    return difference
