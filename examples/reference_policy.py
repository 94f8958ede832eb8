"""Reinforcement learning under ZeRO-3, whose reference policy is an average of the policy.

    torchrun --standalone --nproc_per_node 2 examples/reference_policy.py

Without a GPU: `DS_ACCELERATOR=cpu torchrun ...`. The policy is rewarded for the right one of 16
actions, and held near the reference by a KL penalty. The reference is sharded by DeepSpeed, too, as
an engine without an optimizer; it follows the policy slowly (arXiv 2406.16768, an EMA anchor).
"""

import os

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn.functional import one_hot

from dist_ema import ShardedEMA

CONFIG = {
    "train_micro_batch_size_per_gpu": 64,
    "steps_per_print": 10**9,
    "zero_optimization": {"stage": 3},
}
CHOICES = 16


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(CHOICES, 64), nn.Tanh(), nn.Linear(64, CHOICES))


def reward(contexts: Tensor, actions: Tensor) -> Tensor:
    return (actions == (3 * contexts + 1) % CHOICES).float()


def main() -> None:
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
    policy, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=CONFIG)
    reference, *_ = deepspeed.initialize(model=network(), config=CONFIG)
    ema = ShardedEMA(policy, decay=0.9, into=reference)  # the reference starts as the policy

    def distribution(engine: nn.Module, contexts: Tensor) -> torch.distributions.Categorical:
        return torch.distributions.Categorical(logits=engine(one_hot(contexts, CHOICES).float()))

    torch.manual_seed(dist.get_rank())
    for _ in range(200):
        contexts = torch.randint(CHOICES, (64,), device=policy.device)
        with torch.no_grad():
            anchor = distribution(reference, contexts)
        chosen = distribution(policy, contexts)
        actions = chosen.sample()
        rewards = reward(contexts, actions)
        advantages = rewards - rewards.mean()
        kl = torch.distributions.kl_divergence(chosen, anchor)
        policy.backward((0.1 * kl - advantages * chosen.log_prob(actions)).mean())
        policy.step()
        ema.update()

    contexts = torch.arange(CHOICES, device=policy.device)
    with torch.no_grad():
        right = [
            reward(contexts, distribution(engine, contexts).probs.argmax(1)).mean().item()
            for engine in (policy, reference)
        ]
    if dist.get_rank() == 0:
        print(f"rewarded: policy {right[0]:.3f}, reference {right[1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
