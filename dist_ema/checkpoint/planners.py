"""Planners of `torch.distributed.checkpoint` for averages.

Torch plans: which boxes a rank writes, and which saved boxes fill the boxes that it holds. What is
added here is the check that the boxes of all ranks make up the tensors.

Keys of the planned state are `NUMBER/fqn`, the number being that of the average.
"""

from __future__ import annotations

import dataclasses

from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from dist_ema.checkpoint.manifest import CheckpointError
from dist_ema.layout import Box, uncovered


def key_of(number: int, fqn: str) -> str:
    return f"{number}/{fqn}"


def split_key(key: str) -> tuple[int, str]:
    number, fqn = key.split("/", 1)
    return int(number), fqn


class EmaSavePlanner(DefaultSavePlanner):
    """Lets each rank write the boxes that it owns, and checks that they make up the tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        if (
            not self.is_coordinator
        ):  # plain tensors are those without elements, which all ranks hold
            items = [item for item in plan.items if item.type == WriteItemType.SHARD]
            plan = dataclasses.replace(plan, items=items)
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Every box has one owner, so there is nothing to deduplicate."""
        plans, metadata = create_default_global_save_plan(all_plans)
        known = metadata.state_dict_metadata
        for rank, plan in enumerate(plans):
            for item in plan.items:
                about, data = known[item.index.fqn], item.tensor_data
                assert isinstance(about, TensorStorageMetadata) and data is not None
                theirs, first = (data.size, data.properties.dtype), about.properties.dtype
                if theirs != (about.size, first):
                    raise CheckpointError(
                        f"{split_key(item.index.fqn)[1]}: rank {rank} has shape {tuple(data.size)} "
                        f"and {data.properties.dtype}, others {tuple(about.size)} and {first}"
                    )
        for key in self.state_dict:
            found = known.get(key)
            assert found is None or isinstance(found, TensorStorageMetadata)
            boxes = [box_of(chunk) for chunk in found.chunks] if found else []
            problem = uncovered(tuple(self.state_dict[key].shape), boxes)
            if problem:
                raise CheckpointError(
                    f"{split_key(key)[1]}: {problem}; the process group does not hold the whole "
                    "model (pass process_group=)"
                )
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata


class EmaLoadPlanner(DefaultLoadPlanner):
    """Fills boxes from the saved boxes that they overlap."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)


def box_of(chunk: ChunkStorageMetadata) -> Box:
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))
