"""Batch-norm statistics of averaged weights, over the batches of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # as in torch's own update_bn

from dist_ema.core.group import Group
from dist_ema.core.names import ddp_modules


def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | int | str | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Recompute the running statistics of batch-norm layers with one pass over some batches.

    Does what `torch.optim.swa_utils.update_bn` does, over all ranks: each rank passes its own
    batches through the model, and every rank gets the statistics of one process with all batches
    (the mean over batches). Averaged weights need this, since their activations differ from those
    in training. Inside `average_parameters()`, the statistics are used until the block ends.

    Args:
        loader: batches of this rank; the first element of a tuple or list is the input. Under FSDP
            every rank needs as many batches, since each forward pass communicates.
        model: any module, wrapped or not.
        device: to move batches to; None leaves them where they are.
        process_group: the ranks that share their statistics; the default group if None.

    Raises:
        ValueError: no rank passed any batch. The statistics are unchanged.
        TypeError: `model` is not a module. Call it for each model if there are several.
        RuntimeError: ranks have other batch-norm layers, or one did not call it. On every rank.

    Collective: every rank calls it. One all-reduce of two numbers per channel. Momenta and training
    modes are restored; after an exception, the statistics are too.
    """
    group = Group(process_group)
    channels: dict[str, str] = {}  # compared between ranks when the block ends
    with group.together("update_bn()", channels):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, wanted one torch.nn.Module")
        layers = [
            m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
        ]
        label = "the channels of the batch-norm layers that share statistics (process_group=)"
        channels[label] = str([layer.num_features for layer in layers])
    if not layers:
        return
    before = [{name: b.clone() for name, b in layer.named_buffers()} for layer in layers]
    try:
        with group.together("update_bn()"), torch.no_grad(), _cumulative(model, layers):
            for batch in loader:
                inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
                model(inputs if device is None else inputs.to(device))
        with torch.no_grad():
            _combine(layers, group)
    except BaseException:
        with torch.no_grad():
            for layer, buffers in zip(layers, before, strict=True):
                for name, buffer in layer.named_buffers():
                    buffer.copy_(buffers[name])
        raise


@contextmanager
def _cumulative(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Let layers average over the batches of this rank, in training mode."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    # Before each forward pass DDP would broadcast the statistics of rank 0.
    ddp = [(module, module.require_forward_param_sync) for module in ddp_modules(model)]
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative mean
        for module, _ in ddp:
            module.require_forward_param_sync = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, must_sync in ddp:
            module.require_forward_param_sync = must_sync


def _combine(layers: list[_BatchNorm], group: Group) -> None:
    """Average the statistics of all ranks, weighted by their numbers of batches."""
    rows = []
    for layer in layers:
        mean, variance, count = (x.double().view(-1) for x in _statistics(layer))
        rows += [mean * count, variance * count, count]
    sums = torch.cat(rows).to(group.device)
    if group.size > 1:
        dist.all_reduce(sums, group=group.process_group)
    if not sums.any():
        raise ValueError("update_bn: no rank passed a batch through a batch-norm layer")
    for layer in layers:
        running_mean, running_var, num_batches = _statistics(layer)
        channels = len(running_mean)
        means, variances, total, sums = sums.split(
            [channels, channels, 1, len(sums) - 2 * channels - 1]
        )
        if not total:  # an unused layer keeps its reset statistics, as in torch
            continue
        running_mean.copy_(means / total)
        running_var.copy_(variances / total)
        num_batches.copy_(total[0])


def _statistics(layer: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    assert layer.num_batches_tracked is not None
    return layer.running_mean, layer.running_var, layer.num_batches_tracked
