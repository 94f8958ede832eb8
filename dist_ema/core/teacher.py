"""A teacher, whose weights are the average: a second module, or a second adapter of the model.

[Note: counterparts]
A rank averages each of the student's fragments into its counterpart, a fragment of the teacher with
the same box of a tensor of the same shape: others would be averaged into the wrong weights without
an error. In a second module (DINO, BYOL, mean teacher) a counterpart has the same name. In an
adapter one component differs: `lora_A.teacher.weight` belongs to `lora_A.default.weight`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dist_ema.core.engine import Engine, Weight, pointer
from dist_ema.core.errors import listed
from dist_ema.core.layout import Fragment, FragmentMeta
from dist_ema.core.names import as_module, named_modules
from dist_ema.core.plan import Plan
from dist_ema.core.storage import AverageStorage

# Settings of an adapter that say where it is from, or how its weights were initialized.
_ORIGINS = ("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping")


def as_teacher(into: object) -> nn.Module:
    """The module of an `into` argument, which may be a list or mapping as the model may be.

    Raises:
        ValueError: it is something else.
    """
    try:
        return as_module(into)
    except TypeError as error:
        wanted = "a torch.nn.Module or the name of an adapter"
        raise ValueError(f"into is a {type(into).__name__}, wanted {wanted}") from error


class Teacher:
    """A second model, sharded like the student, whose storage holds the average. Local."""

    def __init__(
        self,
        into: nn.Module | str,
        model: nn.Module,
        student: Engine,
        plan: Plan,
        select: Callable[[nn.Module], Engine],
    ) -> None:
        """
        Args:
            into: the module, or the name of the adapter in `model`.
            student: the engine of `model`.

        Raises:
            ValueError: the teacher is sharded in another way, has other settings, or trains; the
                weights are named.
        """
        self._model, self._select = model, select
        self._adapter = into if isinstance(into, str) else None
        self._module = model if isinstance(into, str) else into
        self._engine = student if isinstance(into, str) else select(into)
        if self._engine.kind != student.kind:
            raise ValueError(
                f"into is sharded by {self._engine.kind}, the model by {student.kind}; wrap both "
                "in the same way"
            )
        self._student = ""  # the adapter that is averaged
        if self._adapter is not None:
            names = _by_name(self._engine.weights())
            self._student = _averaged_adapter(model, self._adapter, plan.averaged, names)
        self._frozen = {w.fqn for w in plan.weights if not w.tensor.requires_grad} - plan.averaged
        self._buffer_stamp: list[int] | None = None
        self._buffer_pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._bind(plan)
        self.refuse_training(ValueError)
        if any(
            self._fragments[fragment.meta].view.data_ptr() == fragment.view.data_ptr()
            for weight, _ in self._pairs
            for fragment in weight.fragments
        ):
            raise ValueError("into shares weights with the model; pass a separate module")

    def storage(self, plan: Plan) -> AverageStorage:
        """The average in the teacher's own storage, where gaps belong to other weights."""
        values = [self._fragments[fragment.meta].view for fragment in plan.fragments]
        return AverageStorage(plan.fragments, [values], owns_gaps=False)

    def dtype_of(self, fqn: str) -> torch.dtype:
        """The dtype of the teacher's counterpart of a weight."""
        return self._dtypes[fqn]

    def moved(self, student: Engine) -> bool:
        """Whether storage moved since `storage` was called; `student` is the model's engine now."""
        if self._adapter is not None:
            return student is not self._engine
        return self._engine.stamp() != self._stamp

    def follow(self, plan: Plan, student: Engine) -> None:
        """Find the storage again."""
        self._engine = self._select(self._module) if self._adapter is None else student
        self._bind(plan)

    def refuse_training(self, error: type[Exception] = RuntimeError) -> None:
        """Raise an error if the teacher is an adapter that requires grad now. Local."""
        for _, weight in self._pairs if self._adapter is not None else ():
            if weight.tensor.requires_grad:
                raise error(
                    f"{weight.fqn}: requires grad, and an optimizer may write to the teacher; call "
                    f"set_adapter({self._student!r}) before the optimizer step and update(), or "
                    f"set_adapter({self._adapter!r}, inference_mode=True); under FSDP2 call "
                    "reshard() of the model before each"
                )

    def copy_parameters(self, *, frozen_only: bool) -> None:
        """Copy parameters that are not averaged from the student."""
        for student, teacher in self._copied:
            if student.fqn in self._frozen or not frozen_only:
                for target, source in zip(teacher.views, student.views, strict=True):
                    target.copy_(source)

    def copy_buffers(self, student: Engine, averaged: frozenset[str]) -> None:
        """Copy buffers that are not averaged from the student, as they are registered now.

        A buffer that the teacher lacks, or has in another shape, is registered as a copy.
        """
        if self._buffer_stamp != self._stamp_of_buffers():
            self._pair_buffers(student, averaged)
            self._buffer_stamp = self._stamp_of_buffers()
        for target, source in self._buffer_pairs:
            target.copy_(source)

    def _stamp_of_buffers(self) -> list[int]:
        """Changes when a buffer is registered, replaced or moved."""
        modules = itertools.chain(self._model.modules(), self._module.modules())
        return [pointer(buffer) for module in modules for buffer in module._buffers.values()]

    def _pair_buffers(self, student: Engine, averaged: frozenset[str]) -> None:
        modules = dict(named_modules(self._module))
        sources = [
            (weight, names)
            for weight in student.buffers()
            if weight.fqn not in averaged and not weight.problem
            if (names := self._counterparts(weight, modules))
        ]
        own = _by_name(self._engine.buffers())
        for weight, names in sources:
            if not _fits(own.get(names[0]), weight, names):
                copied = weight.tensor.detach().clone()
                for fqn in names:
                    owner, _, name = fqn.rpartition(".")
                    modules[owner].register_buffer(name, copied, persistent=weight.persistent)
        own = _by_name(self._engine.buffers())
        self._buffer_pairs = [
            pair
            for weight, names in sources
            for pair in zip(own[names[0]].views, weight.views, strict=True)
        ]

    def refresh(self) -> None:
        """Let the next forward pass of the teacher read the new average."""
        self._engine.refresh([teacher for _, teacher in self._pairs])

    def _bind(self, plan: Plan) -> None:
        own = _by_name(self._engine.weights())
        modules = dict(named_modules(self._module))
        self._pairs: list[tuple[Weight, Weight]] = []
        problems: list[str] = []
        for weight in plan.weights:
            names = self._counterparts(weight, modules)
            teacher = own.get(names[0]) if names else None
            if teacher is not None and (problem := _difference(weight, teacher)) is None:
                self._pairs.append((weight, teacher))
            elif teacher is not None:
                problems.append(f"{teacher.fqn} {problem}")
            elif self._adapter is None or weight.fqn in plan.averaged:
                problems.append(f"{weight.fqn} is missing")
        if problems:
            raise ValueError(
                f"into has another layout than the model: {'; '.join(problems)}"
                + ("; use DDP, FSDP2 or ZeRO-3" if self._adapter is not None else "")
            )
        self._copied = [pair for pair in self._pairs if pair[0].fqn not in plan.averaged]
        self._dtypes = {student.fqn: teacher.tensor.dtype for student, teacher in self._pairs}
        self._fragments: dict[FragmentMeta, Fragment] = {
            fragment.meta: counterpart
            for student, teacher in self._pairs
            for fragment, counterpart in zip(student.fragments, teacher.fragments, strict=True)
        }
        self._stamp = self._engine.stamp()
        self._buffer_stamp = None

    def _counterparts(self, weight: Weight, modules: Collection[str]) -> list[str]:
        """The names that the counterpart of a weight or buffer may have, of those modules."""
        names = (weight.fqn, *weight.aliases)
        if self._adapter is not None:
            names = tuple(
                name
                for fqn in names
                for replaced, name in _replacements(fqn, self._adapter)
                if replaced == self._student
            )
        return [name for name in names if name.rpartition(".")[0] in modules]


def _by_name(weights: Sequence[Weight]) -> dict[str, Weight]:
    """Weights by each of their names."""
    return {name: weight for weight in weights for name in (weight.fqn, *weight.aliases)}


def _replacements(fqn: str, adapter: str) -> Iterator[tuple[str, str]]:
    """Each component of a name, and the name with the adapter's in its place."""
    parts = fqn.split(".")
    for i, part in enumerate(parts):
        if part != adapter:
            yield part, ".".join([*parts[:i], adapter, *parts[i + 1 :]])


def _averaged_adapter(
    model: nn.Module, adapter: str, averaged: Collection[str], names: Collection[str]
) -> str:
    """The name of the adapter that is averaged, if another adapter is the teacher.

    It is the one component of all averaged names whose replacement gives the name of a weight.

    Raises:
        ValueError: there is no such component, or several, or the adapters' settings differ.
    """
    candidates = {
        fqn: {replaced for replaced, name in _replacements(fqn, adapter) if name in names}
        for fqn in sorted(averaged)
    }
    several = [*filter(None, candidates.values())]
    common = set.intersection(*several) if several else set()
    if len(common) == 1:
        _refuse_other_settings(model, "".join(common), adapter)
    missing = [fqn for fqn, components in candidates.items() if not components]
    if trained := [fqn for fqn in missing if adapter in fqn.split(".")]:
        raise ValueError(
            f"into={adapter!r}: {trained[0]} is of that adapter and would be averaged itself; "
            "freeze it by set_adapter() with the name of the student's and, where PEFT leaves it "
            "trainable, by requires_grad_(False), or leave it out by params= and buffers="
        )
    if missing:
        raise ValueError(
            f"into={adapter!r}: there is no adapter of this name with counterparts of these "
            f"averaged weights: {listed(missing, 4, ', ')}. Before the model is wrapped, call "
            f"model.add_adapter({adapter!r}, config) with the configuration of the adapter that "
            "trains, which must be active, and the teacher frozen; choose the weights of that "
            "adapter alone by params= and buffers="
        )
    if averaged and len(common) != 1:  # a part of a model may have frozen weights only
        raise ValueError(
            f"into={adapter!r} may stand for several components of the averaged names: "
            f"{sorted(set.union(*several))}; average one adapter, by params=, and give the teacher "
            "a name that no module has"
        )
    return "".join(common)


def _refuse_other_settings(model: nn.Module, student: str, teacher: str) -> None:
    """Raise ValueError if a module keeps other settings (rank, scale) for one adapter."""
    differences = dict.fromkeys(
        f"{label} is {here.get(label)}, of {student!r} {there.get(label)}"
        for _, module in named_modules(model)
        for attribute, values in [
            ("peft_config", getattr(module, "peft_config", None)),
            *(item for item in vars(module).items() if not item[0].startswith("_")),
        ]
        if isinstance(values, dict) and student in values and teacher in values
        for here, there in [[_settings(attribute, values[name]) for name in (teacher, student)]]
        for label in dict.fromkeys((*here, *there))
        if here.get(label) != there.get(label)
    )
    if differences:
        raise ValueError(
            f"into={teacher!r} is an adapter with other settings than the averaged one, and would "
            f"compute something else with the same weights: {'; '.join(differences)}; add it with "
            f"the configuration of {student!r}"
        )


def _settings(label: str, value: Any) -> dict[str, Any]:
    """What a module keeps for an adapter: its configuration, or a number such as its scale."""
    if isinstance(value, bool | int | float | str):
        return {label: value}
    if isinstance(value, nn.Module | torch.Tensor) or not hasattr(value, "to_dict"):
        return {}
    ignored = (*_ORIGINS, *(key for key in value.to_dict() if key.startswith("init_")))
    return {key: item for key, item in value.to_dict().items() if key not in ignored}


def _fits(buffer: Weight | None, source: Weight, names: Sequence[str]) -> bool:
    """Whether the values of another buffer can be copied to a teacher's, which has these names."""
    if buffer is None or {buffer.fqn, *buffer.aliases} != {*names} or buffer.shape != source.shape:
        return False
    dtypes = {t.dtype for t in (buffer.tensor, source.tensor)}
    return len(dtypes) == 1 or all(dtype.is_floating_point for dtype in dtypes)


def _difference(student: Weight, teacher: Weight) -> str | None:
    """Why a weight of the teacher cannot hold the average of a student's; None if it can."""
    if teacher.problem is not None:
        return teacher.problem
    if teacher.shape != student.shape:
        return f"has shape {teacher.shape}, the model's {student.shape}"
    if not torch.can_cast(student.tensor.dtype, teacher.tensor.dtype):
        return f"is of {teacher.tensor.dtype}, the model's of {student.tensor.dtype}"
    places = [[(f.meta.box, f.meta.order) for f in w.fragments] for w in (teacher, student)]
    if places[0] != places[1]:
        return "is sharded in another way"
    if any(not f.in_place for f in teacher.fragments):
        return "is a copy that its engine overwrites from a master"
    return None
