"""Weighted averages of saved checkpoints, in place of the decay of a learning rate.

    merge(["run/checkpoint-*"], "run/merged", weights="1-sqrt", dtype=torch.bfloat16)

Checkpoints may be of different formats, and sharded in different ways. `combine` computes the sums,
`export` writes the files.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint.dcp_reader import METADATA
from dist_ema.checkpoint.directory import MANIFEST, target
from dist_ema.checkpoint.reader import Checkpoint
from dist_ema.checkpoint.writer import written_by
from dist_ema.core.errors import CheckpointError, listed
from dist_ema.core.group import Group
from dist_ema.core.layout import TensorMeta, flat_boxes, flat_ends, whole
from dist_ema.export.files import Writer, plan_exports, summary, write_export
from dist_ema.export.layouts import ModelLayout
from dist_ema.export.offline import Source, dtype_named, models_of, name_in_files
from dist_ema.options import MERGE_WEIGHTS, no_pickles
from dist_ema.posthoc.combine import Range, Term, WeightedSums
from dist_ema.posthoc.snapshots import refuse_duplicates, refuse_overlap

_RANGE = 1 << 20  # elements that are summed at a time, a block of fp32
_TOLERANCE = 1e-6  # of the sum of given weights
_HEAD = 1024  # elements that are compared first
_NESTED = ("pytorch_model_fsdp_0", "pytorch_model_fsdp", "model_and_optim")
_TOKENIZER_FILE = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|chat_template"
    r"|(video_)?preprocessor_config|processor_config).*\.(json|txt|model|jinja|bpe|tiktoken)"
)
_CURVES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was merged, and what was written."""

    path: Path
    weights: dict[str, float]  # by checkpoint, oldest first
    library: str  # whose layout the files have
    files: list[str]
    nbytes: int

    def __str__(self) -> str:
        listed = "".join(f"  {w:+.6f}  {path}\n" for path, w in self.weights.items())
        return f"{listed}{self.path}: in the layout of {self.library}, {', '.join(self.files)}"


def merge(
    checkpoints: Iterable[str | Path],
    out: str | Path,
    *,
    weights: str | Sequence[float] = "uniform",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    normalize: bool = False,
    name: str | None = None,
    prefix: str | None = None,
    base: str | Path | None = None,
    progress: Callable[[int], Any] = lambda total: nullcontext(lambda nbytes: None),
) -> MergeResult:
    """Write the weighted average of checkpoints as safetensors that `from_pretrained` reads.

    A checkpoint is a directory of `ShardedEMA.save`; a safetensors file, or a directory of them
    with or without an index; or a directory of `torch.distributed.checkpoint`, as accelerate,
    torchtitan, Lightning and OLMo-core write it. Formats, numbers of ranks and ways of sharding may
    differ. Nothing in them is executed. Weights c_j of n checkpoints, j = 0 for the oldest:

        uniform     1 / n
        linear, 1-sqrt, cosine
                    f(j / n) - f((j + 1) / n), for f(x) = 1 - x, 1 - sqrt(x), (1 + cos(pi x)) / 2:
                    if each checkpoint is the sum of the steps up to it, the average has each step
                    times f, as if the learning rate had been decayed by f (WSM, arXiv 2507.17634).
                    The oldest weighs most under 1-sqrt.
        ema:D       an average of decay D that starts with the oldest: D ** (n - 1) for it, then
                    (1 - D) * D ** (n - 1 - j)

    Sums are computed in float64 and rounded once. Integer and boolean tensors, and tensors that
    only `base` has, are copied, from the last checkpoint that has them. Configurations and files of
    a tokenizer are those of the first checkpoint that has them, then of `base`, with the dtype that
    is written. The metadata of the files has the checkpoints, their weights and the versions.

    Local: one process, without a process group; do not call it on several ranks. Memory: about
    50 MB, and the descriptions of tensors. Every checkpoint is read once, or twice where it is not
    sharded as the first is. Files in `out` are replaced all at once, other files stay.

    Args:
        checkpoints: paths or patterns such as "run/checkpoint-*", oldest first. Neighbors whose
            paths differ only in numbers are sorted by number, unless `weights` are numbers.
        out: directory to write.
        weights: a name from above, or numbers, one for each checkpoint, negative ones allowed.
            Numbers may be a string such as "0.2,0.3,0.5". Their sum must be 1.
        dtype: a dtype of torch or its name, for floating-point tensors. By default each tensor has
            the widest of its dtypes in the checkpoints.
        max_shard_size: maximum size of a file, in bytes or as a string such as "5GB".
        normalize: divide the weights by their sum.
        name: which average to read from checkpoints of `ShardedEMA` that hold several.
        prefix: prefix of the model's names in directories of `torch.distributed.checkpoint`, if it
            is not found by itself; or a pattern such as "ema_optimizer.state.*.ema_params".
        base: a checkpoint of the model, for tensors that others lack (frozen weights, buffers).
        progress: called with the number of bytes to read; returns a context manager of a function
            that is called with the number of bytes read.

    Raises:
        CheckpointError: a checkpoint is damaged; tensors are missing, additional or of other shapes
            in one, or quantized (they are listed). `out` is unchanged.
        ValueError: an argument is out of range; a checkpoint is given twice; the result holds NaN
            or Inf; `out` is among the checkpoints. `out` is unchanged.
    """
    dtype = dtype_named(None if dtype is None else str(dtype).removeprefix("torch."))
    paths = expand(checkpoints, weights)
    factors = coefficients(weights, len(paths), normalize=normalize)
    bases = [] if base is None else [Path(base)]
    refuse_overlap(Path(out), [*paths, *bases])
    with ExitStack() as opened:
        given = [*paths, *bases]
        inputs = [_Input(path, name, prefix, len(given), opened) for path in given]
        # Not a buffer for each: blocks of a hundred checkpoints would be half a GB.
        buffer = bytearray(max(each.checkpoint.manifest.block_bytes for each in inputs))
        for each in inputs:
            each.checkpoint.buffer = buffer
        refuse_duplicates((each.path, each.checkpoint) for each in inputs)
        base_input = inputs.pop() if bases else None
        tensors, sources = _match(inputs, base_input, factors, dtype)
        searched = [each.path if each.path.is_dir() else each.path.parent for each in inputs]
        searched += [path for path in bases if path.is_dir()]
        layouts = _layouts([*inputs, *([base_input] if base_input else [])])
        origin = {
            "checkpoints": [
                {"path": str(each.path), "weight": factor} | each.description()
                for each, factor in zip(inputs, factors, strict=True)
            ],
            "weights": weights if isinstance(weights, str) else "given",
            "base": None if base is None else str(base),
            "versions": written_by(1),
        }
        metadata = {"merged": json.dumps(origin)}
        plans = plan_exports(
            tensors,
            layouts,
            max_shard_size,
            None,
            metadata=metadata,
            copies=_tokenizer_files(searched),
        )

        def write_values(writer: Writer) -> None:
            places = writer.plan.places.items()
            ranges = chain.from_iterable(sources[fqn].ranges(place.dtype) for fqn, place in places)
            for each, (total,) in sums.compute(ranges):
                writer.write_chunk(each.fqn, each.start, total)
                advance(each.nbytes)

        used = [term.checkpoint for source in sources.values() for term in source.terms]
        total = sum(term.nbytes for source in sources.values() for term in source.terms)
        with WeightedSums(used, 1, _RANGE) as sums, progress(total) as advance:
            write_export(Path(out), plans, Group.alone(), write_values)
    return MergeResult(
        target(Path(out)),
        {str(path): factor for path, factor in zip(paths, factors, strict=True)},
        **summary(plans),
    )


# Arguments.


def expand(
    checkpoints: Iterable[str | Path], weights: str | Sequence[float] = "uniform"
) -> list[Path]:
    """The paths in order, oldest first; see `merge`."""
    given = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints
    paths: list[Path] = []
    for path in given:
        matched = [] if os.path.lexists(path) else glob.glob(str(path))
        paths += map(Path, sorted(matched, key=_numbers) or [str(path)])
    if not paths:
        raise ValueError("no checkpoints are given")
    families = groupby(paths, key=lambda path: re.sub(r"\d+", "#", str(path)))
    ordered = [path for _, family in families for path in sorted(family, key=_numbers)]
    is_named = isinstance(weights, str) and "," not in weights
    if not is_named and paths != ordered and paths == sorted(paths, key=str):
        raise ValueError(
            f"checkpoints are in alphabetical order, {paths[0].name} first; give them in the order "
            f"of the weights, or of their numbers, {ordered[0].name} first"
        )
    return ordered if is_named else paths


def _numbers(path: str | Path) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", str(path))], str(path)


def coefficients(weights: str | Sequence[float], n: int, *, normalize: bool = False) -> list[float]:
    """The weight of each of `n` checkpoints, oldest first; see `merge`.

    Raises:
        ValueError: `weights` is not known, not of `n` numbers, or does not add up to 1.
    """
    text = weights.strip() if isinstance(weights, str) else ""
    kind, _, argument = text.partition(":")
    known = MERGE_WEIGHTS.get(text)
    hint = f" (what other tools call {text} is {known} here)" if known else ""
    problem = (
        f"weights is {weights!r}, wanted uniform, linear, 1-sqrt, cosine, ema:DECAY with a decay "
        f"in [0, 1), or {n} numbers{hint}"
    )
    if text == "uniform":
        return [1 / n] * n
    if text in _CURVES:
        at = [_CURVES[text](j / n) for j in range(n + 1)]
        return [at[j] - at[j + 1] for j in range(n)]
    try:
        if kind == "ema":
            decay = float(argument)
            if not 0 <= decay < 1:
                raise ValueError(problem)
            return [decay ** (n - 1)] + [(1 - decay) * decay ** (n - 1 - j) for j in range(1, n)]
        numbers = [float(each) for each in (text.split(",") if text else weights)]
    except (TypeError, ValueError):
        raise ValueError(problem) from None
    total = math.fsum(numbers)
    if len(numbers) != n or not math.isfinite(total):
        raise ValueError(problem)
    if normalize and abs(total) > _TOLERANCE:
        return [each / total for each in numbers]
    if normalize or abs(total - 1) > _TOLERANCE:
        raise ValueError(f"weights add up to {total:g}, wanted 1; normalize divides by the sum")
    return numbers


# Checkpoints and their tensors.


class _Input(Source):
    """An open checkpoint, and its tensors by the names that they have in the library's files."""

    def __init__(
        self, path: Path, name: str | None, prefix: str | None, num: int, opened: ExitStack
    ) -> None:
        nested = (path / each for each in _NESTED if (path / each / METADATA).is_file())
        is_known = any((path / each).is_file() for each in (MANIFEST, METADATA))
        place = path if is_known or any(path.glob("*.safetensors")) else next(nested, None)
        if problem := no_pickles(path) if place is None else None:
            raise CheckpointError(problem)
        checkpoint = opened.enter_context(Checkpoint(place or path, prefix, num=num))
        super().__init__(checkpoint, None if checkpoint.is_plain else name)
        self.path = path
        directory = path if path.is_dir() else path.parent
        self.layouts, self.others = models_of(self, directory)
        self._heads: dict[str, torch.Tensor] = {}
        self.known: dict[str, str] = {}  # by each name: the name in the checkpoint
        self.metas = {tensor.fqn: tensor for tensor in self.tensors}
        for fqn, tensor in self.metas.items():
            for own in (fqn, *tensor.aliases):
                if (in_file := self._name_in_file(own)) is not None:
                    self.known.setdefault(in_file, fqn)

    def _name_in_file(self, fqn: str) -> str | None:
        return fqn if self.checkpoint.is_plain else name_in_files(self.layouts, (fqn,))

    def missing(self) -> Iterator[tuple[list[str], TensorMeta]]:
        """What the model has beside the average, by names in the library's files."""
        for tensor in self.others or ():
            names = map(self._name_in_file, (tensor.fqn, *tensor.aliases))
            if known := [name for name in names if name is not None]:
                yield known, tensor

    def head(self, name: str) -> torch.Tensor:
        """The first elements of a tensor."""
        if name not in self._heads:
            meta = self.meta(name)
            numel = min(_HEAD, meta.numel)
            self._heads[name] = torch.empty(numel, dtype=meta.dtype, device="cpu")
            self.checkpoint.read(self.average, self.known[name], 0, self._heads[name])
        return self._heads[name]

    def description(self) -> dict[str, object]:
        manifest = self.checkpoint.manifest
        if self.checkpoint.is_plain:
            return {}
        return {"name": self.name, "id": manifest.id, "step": manifest.state["step"]}

    def meta(self, name: str) -> TensorMeta:
        return self.metas[self.known[name]]

    def term(self, name: str, factor: float) -> Term:
        return Term(self.checkpoint, self.average, self.known[name], (factor,))


@dataclass(frozen=True, slots=True)
class _Sum:
    """A tensor of the result: a sum of saved ones, or a copy of one."""

    meta: TensorMeta  # of the saved tensors, in their widest dtype
    terms: Sequence[Term]

    def ranges(self, dtype: torch.dtype) -> Iterator[Range]:
        """All elements in order. Ranges end where boxes of the first tensor do: none of its blocks
        is read twice."""
        outer, ends = whole(self.meta.shape), []
        for saved in self.terms[0].average.tensors[self.terms[0].fqn].boxes:
            begin, last = flat_ends(saved.box, outer) if saved.box.numel else (0, -1)
            if last + 1 - begin == saved.box.numel:
                ends.append(last + 1)
        ends.sort()
        start = 0
        while start < self.meta.numel:
            stop = min(start + _RANGE, self.meta.numel)
            before = bisect_right(ends, stop)
            if before and ends[before - 1] > start:
                stop = ends[before - 1]
            boxes = flat_boxes(self.meta.shape, start, stop)
            yield Range(self.meta.fqn, start, self.terms, boxes, dtype)
            start = stop


def _match(
    inputs: Sequence[_Input],
    base: _Input | None,
    factors: Sequence[float],
    dtype: torch.dtype | None,
) -> tuple[list[TensorMeta], dict[str, _Sum]]:
    """The tensors of the result, and what each is computed from, by name.

    A name that stands for the same tensor as another name in every checkpoint becomes its alias.

    Raises:
        CheckpointError: checkpoints do not fit to each other.
    """
    holders, twins, problems = _holders(inputs, base)
    first_name: dict[tuple[object, ...], str] = {}
    aliases: dict[str, list[str]] = defaultdict(list)
    sources: dict[str, _Sum] = {}
    for name, having in holders.items():
        key = tuple((id(each), each.known[name]) for each in having)
        first = first_name.setdefault(key, name)
        if first != name:
            aliases[first].append(name)
        elif misfits := list(_misfits(name, having)):
            problems += misfits
        else:
            sources[name] = _sum(name, having, factors, is_averaged=having != [base])
    if problems:
        is_lacking = base is None and any(" is missing" in each for each in problems)
        hint = "; base= (--base) names a checkpoint that has what others lack"
        raise CheckpointError(listed(problems) + hint * is_lacking)
    for name, twin in twins.items():
        aliases[twin].append(name)
    tensors = []
    for name, source in sources.items():
        own = source.meta.dtype if dtype is None else source.meta.dtype_as(dtype)
        kept = tuple(n for n in aliases[name] if n not in sources)
        tensors.append(replace(source.meta, aliases=kept, dtype=own))
    return tensors, sources


def _holders(
    inputs: Sequence[_Input], base: _Input | None
) -> tuple[dict[str, list[_Input]], dict[str, str], list[str]]:
    """The checkpoints that each tensor is taken from, by its name.

    Returns:
        These; other names of tied tensors, with the name of each that is written; problems.
    """
    holders: dict[str, list[_Input]] = {}
    twins: dict[str, str] = {}
    problems: list[str] = []
    names = dict.fromkeys(name for each in inputs for name in each.known)
    in_base = {} if base is None else base.known
    for name in names:
        having = [each for each in inputs if name in each.known]
        if len(having) < len(inputs) and (twin := _twin(name, having, inputs)):
            twins[name] = twin
        elif len(having) == len(inputs):
            holders[name] = having
        elif base is not None and name in in_base:
            holders[name] = [each if name in each.known else base for each in inputs]
        else:
            problem = f"{name} is missing, {having[0].path} has it"
            problems += [f"{each.path}: {problem}" for each in inputs if name not in each.known]
    # Tensors of the model that are not averaged.
    missing = [item for each in inputs for item in each.missing()]
    missing = [(known, tensor) for known, tensor in missing if names.keys().isdisjoint(known)]
    lost = dict.fromkeys(known[0] for known, _ in missing if in_base.keys().isdisjoint(known))
    others = {name: tensor for known, tensor in missing for name in known}
    if base is not None:
        is_listed = any(each.others is not None for each in inputs)
        taken = {fqn for name, fqn in in_base.items() if name in names}
        for name, fqn in in_base.items():
            if fqn in taken or (is_listed and name not in others):
                continue
            shape = base.meta(name).shape
            if twin := _twin(name, [base], [*inputs, base]):
                twins[name] = twin
            elif name in others and shape != others[name].shape:
                wanted = others[name].shape
                problems.append(f"{base.path}: {name} has shape {shape}, wanted {wanted}")
            else:
                holders[name] = [base]
    return holders, twins, problems + [f"{name} is missing" for name in lost]


def _misfits(name: str, holders: Sequence[_Input]) -> Iterator[str]:
    """Why a tensor of several checkpoints cannot be averaged."""
    first = holders[0].meta(name)
    for each in holders:
        meta = each.meta(name)
        if meta.shape != first.shape:
            yield (
                f"{each.path}: {name} has shape {meta.shape}, in {holders[0].path} it has "
                f"{first.shape}"
            )
        if _kind(meta.dtype) != _kind(first.dtype):
            yield f"{each.path}: {name} is of {meta.dtype}, in {holders[0].path} of {first.dtype}"
        if meta.dtype.is_floating_point and meta.dtype.itemsize == 1:
            yield f"{each.path}: {name} is quantized, of {meta.dtype}; dequantize it"


def _sum(
    name: str, holders: Sequence[_Input], factors: Sequence[float], *, is_averaged: bool
) -> _Sum:
    metas = [each.meta(name) for each in holders]
    if not is_averaged or _kind(metas[0].dtype) == "integer":
        terms, kind = [holders[-1].term(name, 1.0)], metas[-1].dtype
    else:
        pairs = zip(holders, factors, strict=True)
        terms = [each.term(name, factor) for each, factor in pairs if factor]
        kind = reduce(torch.promote_types, (meta.dtype for meta in metas))
    return _Sum(TensorMeta(name, (), metas[0].shape, kind, is_averaged), terms)


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "real" if dtype.is_floating_point else "integer"


def _twin(name: str, holders: Sequence[_Input], inputs: Sequence[_Input]) -> str | None:
    """The name of a tied tensor: one of all checkpoints, with equal values in all `holders`.

    Vectors and constants are not tied, since they may be equal by chance.
    """
    metas = [each.meta(name) for each in holders]
    if len(metas[0].shape) < 2:
        return None
    for other in holders[0].known:
        if other == name or not all(other in each.known for each in inputs):
            continue
        pairs = [(each.meta(other), meta) for each, meta in zip(holders, metas, strict=True)]
        if all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs) and all(
            _equal(each, name, other) for each in holders
        ):
            return other
    return None


def _equal(source: _Input, a: str, b: str) -> bool:
    """Whether tensors have equal bits. False for constants, which may be equal by chance."""

    def same(left: torch.Tensor, right: torch.Tensor) -> bool:
        return torch.equal(left.view(torch.uint8), right.view(torch.uint8))

    if not same(source.head(a), source.head(b)):
        return False
    is_constant = True
    chunks = (source.chunks(source.meta(name)) for name in (a, b))
    for (_, left), (_, right) in zip(*chunks, strict=True):
        if not same(left, right):
            return False
        is_constant = is_constant and bool((left == source.head(a)[0]).all())
    return not is_constant


# Configurations.


def _layouts(inputs: Sequence[_Input]) -> dict[str, ModelLayout]:
    """The layouts of the first checkpoint that has a library's configuration, by names in files."""
    known = [each for each in inputs if {t.library for t in each.layouts.values()} != {"plain"}]
    layouts = (known or inputs)[0].layouts
    for layout in layouts.values():
        if json.loads(layout.texts.get("config.json", "{}")).get("quantization_config"):
            raise CheckpointError(
                "config.json has a quantization_config: averages of quantized weights are not "
                "those of the weights that they stand for; merge checkpoints without quantization"
            )
    return {name: replace(t, names=None, ignored=()) for name, t in layouts.items()}


def _tokenizer_files(directories: Sequence[Path]) -> list[Path]:
    """The files of a tokenizer or processor, in the first directory that has some."""
    for directory in directories:
        files = [
            entry
            for entry in sorted(directory.iterdir())
            if _TOKENIZER_FILE.fullmatch(entry.name) and entry.is_file()
        ]
        if files:
            return files
    return []
