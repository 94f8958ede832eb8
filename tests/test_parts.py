"""Parts of one model (pipeline stages), and several models with one average."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema import BEMA, ShardedEMA, update_bn
from tests.net import Net, batch_of_tokens, loss_of
from tests.oracle import Oracle
from tests.runs import check_average, same
from tests.worlds import WRAPPERS, from_rank_0

WIDTH, LAYERS = 6, 4


class Model(nn.Module):
    """Layers in a ModuleDict, so that a stage keeps the names that its layers have in the whole."""

    def __init__(self, layers: Sequence[int] = range(LAYERS)) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH) if 0 in layers else None
        self.layers = nn.ModuleDict({str(i): Layer() for i in layers})
        self.last = nn.Linear(WIDTH, 5, bias=False) if LAYERS - 1 in layers else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first is None else self.first(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.last is None else self.last(x)


class Layer(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.count += 1
        return x + self.frozen(self.norm(self.linear(x)).relu())


WHOLE = Model()
TRAINED = [name for name, p in WHOLE.named_parameters() if p.requires_grad]


class Pipeline:
    """Stages of one model along one axis of a mesh, each cut over the ranks that have it."""

    def __init__(self, mesh: DeviceMesh, stages: int, cut: str = "none", **options: Any) -> None:
        pp = mesh["pp"].size()
        self.stages = range(mesh.get_local_rank("pp"), stages, pp)
        torch.manual_seed(3)
        weights = Model().state_dict()
        self.parts = []
        for stage in self.stages:
            size = LAYERS // stages
            part = Model(range(stage * size, (stage + 1) * size))
            part.load_state_dict({name: weights[name] for name in part.state_dict()})
            self.parts.append(part)
        self.models: list[nn.Module] = list(self.parts)
        if cut == "fsdp2":
            for part in self.parts:
                fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
        elif cut == "ddp":
            group = mesh.get_group("dp")
            self.models = [DistributedDataParallel(p, process_group=group) for p in self.parts]
        pipeline_stages = [
            PipelineStage(model, stage, stages, torch.device("cpu"), group=mesh.get_group("pp"))
            for stage, model in zip(self.stages, self.models, strict=True)
        ]
        self.schedule: Any = (
            ScheduleInterleaved1F1B(pipeline_stages, 4, loss_fn=loss)
            if stages > pp
            else Schedule1F1B(pipeline_stages[0], 4, loss_fn=loss)
        )
        trained = [p for part in self.parts for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.05, foreach=False)
        self.ema = ShardedEMA(self.models, 0.7, **options)

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        x, y = torch.randn(8, 3), torch.randn(8, 5)
        is_first, is_last = 0 in self.stages, self.schedule._num_stages - 1 in self.stages
        self.optimizer.zero_grad()
        self.schedule.step(*[x][:is_first], **({"target": y} if is_last else {}))
        self.optimizer.step()

    def full(self) -> dict[str, Tensor]:
        """The whole weights of all parts, on every rank."""
        own = {}
        for part in self.parts:
            for name, p in part.named_parameters():
                own[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        return {name: tensor for state in every for name, tensor in state.items()}


def loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


@pytest.mark.parametrize(
    ("num_ranks", "pp", "stages_of_a_rank", "cut"),
    [
        (2, 2, 2, "none"),
        (4, 4, 1, "none"),
        (4, 2, 1, "ddp"),
        (4, 2, 2, "fsdp2"),
    ],
)
def test_stages_are_one_model(
    num_ranks: int, pp: int, stages_of_a_rank: int, cut: str, tmp_path: Path
):
    world = dist.get_world_size()
    mesh = DeviceMesh("cpu", torch.arange(world).view(pp, -1), mesh_dim_names=("pp", "dp"))
    run = Pipeline(mesh, pp * stages_of_a_rank, cut)
    oracle = Oracle({name: run.full()[name] for name in TRAINED}, 0.7)
    for i in range(3):
        run.step(i)
        run.ema.update()
        oracle.update(run.full())
    before, nbytes = run.full(), 4 * sum(p.numel() for p in oracle.average.values())
    state = from_rank_0(run.ema.gather_state_dict())
    assert state.keys() == WHOLE.state_dict().keys()
    check_average(run.ema, oracle.average)
    averaged = {name: state[name] for name in TRAINED}
    held = torch.tensor(run.ema.nbytes)
    dist.all_reduce(held)
    assert nbytes <= held <= 1.5 * nbytes
    assert state["layers.3.count"] > 0
    assert run.ema.drift() > 0
    assert dict(run.ema.gather_tensors()).keys() == (state.keys() if not dist.get_rank() else set())
    with run.ema.average_parameters():
        same({name: run.full()[name] for name in TRAINED}, averaged)
    same(run.full(), before)
    whole = Model()
    run.ema.copy_to(whole)
    same(whole.state_dict(), state)

    run.ema.save(tmp_path / "ema")
    run.ema.export(tmp_path / "export")
    same(load_file(tmp_path / "export" / "model.safetensors"), state)
    run.ema.reset()
    run.ema.load(tmp_path / "ema")
    assert run.ema.step == 3
    same({n: from_rank_0(run.ema.gather_state_dict())[n] for n in TRAINED}, averaged)
    # Another number of stages, and one process with the whole model.
    if world == 4:
        halves = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("copy", "pp"))
        other = Pipeline(halves, 2, process_group=halves.get_group("pp"))
        other.ema.load(tmp_path / "ema")
        loaded = other.ema.gather_state_dict()
        if dist.get_rank() % 2 == 0:
            same({name: loaded[name] for name in TRAINED}, averaged)
    alone = [dist.new_group([rank]) for rank in range(world)][dist.get_rank()]
    one = ShardedEMA(Model(), 0.7, process_group=alone)
    one.load(tmp_path / "ema")
    same({name: one.gather_state_dict()[name] for name in TRAINED}, averaged)
    one.load(tmp_path / "export")
    same({name: one.gather_state_dict()[name] for name in TRAINED}, averaged)


@pytest.mark.ranks(2)
def test_stages_with_one_name_for_different_weights_or_shapes_are_refused():
    torch.manual_seed(dist.get_rank())
    with pytest.raises(RuntimeError, match=r"differ between them: 0\.bias, 0\.weight"):
        ShardedEMA([nn.Sequential(nn.Linear(3, 3))])
    size = 3 + dist.get_rank()
    with pytest.raises(ValueError, match=r"x\.weight: \(3, 3\) and \(4, 4\)"):
        ShardedEMA([nn.ModuleDict({"x": nn.Linear(size, size)})])


@pytest.mark.ranks(3)
@pytest.mark.parametrize("kind", ["shape", "dtype", "value", "frozen", "equal"])
def test_stages_with_one_name_for_different_copied_tensors_are_refused(kind: str, tmp_path: Path):
    last = dist.get_rank() // 2  # ranks 0 and 1 have the same stage
    part = nn.ModuleDict({f"stage{last}": nn.Linear(2, 2)})
    shared = torch.ones(3 + last * (kind == "shape"))
    if kind == "dtype" and last:
        shared = shared.double()
    if kind in ("value", "frozen"):
        shared += last
    if kind == "frozen":
        part.register_parameter("shared", nn.Parameter(shared, requires_grad=False))
    else:
        part.register_buffer("shared", shared)
        part.register_buffer(f"count{last}", torch.tensor(dist.get_rank()))
    ema = ShardedEMA([part], 0.5)
    if kind == "equal":  # as torch's own broadcast, rank 0 counts among ranks of one stage
        state = from_rank_0(ema.gather_state_dict())
        assert torch.equal(state["shared"], torch.ones(3)) and len(state) == 7
        assert (state["count0"], state["count1"]) == (0, 2)
        return
    text = {"shape": r"\(4,\)", "dtype": "float64"}.get(kind, "values of hash")
    for call in (ema.gather_state_dict, lambda: ema.export(tmp_path / "export")):
        with pytest.raises(ValueError, match=rf"shared has .* on rank 0 and .*{text}.* on rank 2"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks(0)
def test_a_plain_mapping_gets_the_average_by_copy_to_and_no_statistics():
    models, copies = ({"a": nn.Linear(2, 2), "b": nn.Linear(2, 3)} for _ in range(2))
    ema = ShardedEMA(models, 0.5)
    ema.update()
    ema.copy_to(copies)
    assert torch.equal(copies["b"].weight, models["b"].weight)
    with pytest.raises(TypeError, match="wanted one"):
        update_bn([], models)


@pytest.mark.ranks(2)
def test_a_part_may_have_frozen_weights_only():
    part = nn.ModuleDict({f"part{dist.get_rank()}": nn.Linear(2, 2)})
    part.requires_grad_(dist.get_rank() == 1)
    ema = ShardedEMA([part], 0.5)
    ema.update()
    names = {f"part{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert ema.gather_state_dict().keys() == (names if dist.get_rank() == 0 else set())
    part.requires_grad_(False)
    with pytest.raises(ValueError, match="none is averaged"):
        ShardedEMA([part])


def wrap_all(cut: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    mixed = {"g": "fsdp2", "d": "ddp", "encoder": "fsdp1"}
    models = {"g": Net(), "d": Model(), "encoder": nn.Linear(3, 3)}
    return {n: WRAPPERS[mixed[n] if cut == "mixed" else cut](m) for n, m in models.items()}


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("cut", ["plain", "fsdp2", "mixed"])
@pytest.mark.parametrize("rule", [0.5, BEMA(lag=1.0)])
def test_several_models_have_one_average(cut: str, rule: Any, tmp_path: Path):
    models = wrap_all(cut)
    together = ShardedEMA(models, rule)
    alone = {name: ShardedEMA(model, rule) for name, model in models.items()}
    assert together.model is models
    for seed in range(2):
        loss_of(models["g"](batch_of_tokens(seed))).backward()
        models["d"](torch.randn(4, 3)).sum().backward()
        models["encoder"](torch.randn(4, 3)).square().sum().backward()
        with torch.no_grad():
            for model in models.values():
                trained = [p for p in model.parameters() if p.grad is not None]
                torch.optim.SGD(trained, lr=0.1, foreach=False).step()
                model.zero_grad()
        for ema in (together, *alone.values()):
            ema.update()
    state = together.gather_state_dict()
    states = {name: ema.gather_state_dict() for name, ema in alone.items()}
    same(state, {f"{m}.{key}": value for m, s in states.items() for key, value in s.items()})
    inputs = {"g": batch_of_tokens(9), "d": torch.ones(2, 3), "encoder": torch.ones(2, 3)}
    outputs = {}
    with torch.no_grad():
        for name, ema in alone.items():
            with ema.average_parameters():
                outputs[name] = models[name](inputs[name])
        with together.average_parameters():
            for name, output in outputs.items():
                assert torch.equal(models[name](inputs[name]), output)
                with pytest.raises(RuntimeError, match="inside average_parameters"):
                    alone[name].update()
    together.save(tmp_path / "ema")
    together.reset()
    together.load(tmp_path / "ema")
    same(together.gather_state_dict(), state)
    together.export(tmp_path / "export")
    assert {path.name for path in (tmp_path / "export").iterdir()} == set(models)
    for name, ema in alone.items():
        ema.export(tmp_path / name)
        files = [p / "model.safetensors" for p in (tmp_path / "export" / name, tmp_path / name)]
        assert files[0].read_bytes() == files[1].read_bytes()
    if rule == 0.5:  # an export has one average, and BEMA keeps two
        together.reset()
        together.load(tmp_path / "export", step=2)
        same(together.gather_state_dict(), state)


@pytest.mark.ranks(2)
def test_ranks_must_pass_the_same_models():
    names = "gd" if dist.get_rank() == 0 else "dg"
    with pytest.raises(ValueError, match="argument model"):
        ShardedEMA({name: nn.Linear(2, 2) for name in names})
    part = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="argument model is a list of modules on rank 0"):
        ShardedEMA([part] if dist.get_rank() == 0 else part)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ([], ValueError, "no module"),
        ({}, ValueError, "no module"),
        ([nn.Linear(1, 1), nn.Linear(1, 1)], ValueError, "several parts have a tensor named"),
        ({"a.b": nn.Linear(1, 1)}, ValueError, "cannot name a model"),
        ({"../a": nn.Linear(1, 1)}, ValueError, "cannot name a model"),
        ({"a": 3}, TypeError, "model is a dict"),
        ([nn.Linear(1, 1), None], TypeError, "model is a list"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ShardedEMA(model)


def test_a_weight_that_models_share_is_averaged_once():
    shared = nn.Linear(2, 2)
    a, b = nn.Sequential(shared), nn.Sequential(nn.ReLU(), shared)
    ema = ShardedEMA({"a": a, "b": b}, 0.5)
    with torch.no_grad():
        shared.weight.add_(1.0)
    start = shared.weight - 1.0
    ema.update()
    state = ema.gather_state_dict()
    assert state.keys() == {"a.0.weight", "a.0.bias", "b.1.weight", "b.1.bias"}
    assert torch.equal(state["a.0.weight"], start + 0.5)
    assert state["a.0.weight"] is state["b.1.weight"]
    assert ema.nbytes <= 4 * 8
