"""AdCo (arXiv 2011.08435): an encoder and a bank of learned negatives play a min-max game.

The student's queries are contrasted with the teacher's keys and the bank; the student descends on the loss, the bank
ascends on it, and the teacher follows the student.

B images of this rank, V views, D dimensions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from models.bank import Bank, Rows
from models.contrast import contrast
from models.encoder import Encoder
from models.shuffle_bn import plan, shuffle, unshuffle

Phase = Callable[[str], AbstractContextManager[object]]  # what surrounds a phase of a step, by its name


class Play(NamedTuple):
    """loss: scalar, of this rank's images, to be averaged over ranks. rows: what the bank is to step on.

    metrics: name to scalar tensor, of this rank.
    """

    loss: Tensor
    rows: list[Rows]
    metrics: dict[str, Tensor]


class AdCo:
    """The game. `student` learns by gradient, `teacher` follows it, `bank` steps by itself.

    temperature: of the encoder's loss (the adversary's is the bank's). symmetric: views 0 and 1 both give keys, and
    the two directions count one half each; else view 0 is the key of all others. crops: sum or mean of the losses
    of the queries of one key. batch_keys: see `models.contrast`. bn: shuffle moves images between ranks for the
    teacher; sync needs a student and teacher made by `models.shuffle_bn.synchronise_bn`.
    """

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        bank: Bank,
        *,
        temperature: float = 0.12,
        symmetric: bool = False,
        batch_keys: bool = True,
        crops: str = "sum",
        bn: str = "shuffle",
    ) -> None:
        self.student, self.teacher, self.bank = student, teacher, bank
        self.temperature, self.symmetric, self.batch_keys = temperature, symmetric, batch_keys
        self.crops, self.bn = crops, bn

    def play(
        self,
        student: Callable[[list[Tensor]], Tensor],
        views: list[Tensor],
        seed: int,
        phase: Phase = record_function,
    ) -> Play:
        """The loss of one batch: V images tensors [B, 3, S_v, S_v].

        student: what to call for queries, `self.student` or a wrapper that averages gradients over ranks.
        seed: of the shuffle, the same on all ranks. phase: what times the phases teacher, student and score.
        """
        key_views = [0, 1] if self.symmetric else [0]
        with phase("teacher"):
            keys = {j: self.keys(views[j], seed + j) for j in key_views}
        query_views = [i for i in range(len(views)) if key_views != [i]]
        with phase("student"):
            queries_ND = student([views[i] for i in query_views])
        with phase("score"), torch.autocast(queries_ND.device.type, enabled=False):
            return self._contrast(dict(zip(query_views, queries_ND.chunk(len(query_views)), strict=True)), keys)

    @torch.no_grad()
    def keys(self, images: Tensor, seed: int) -> Tensor:
        """The teacher's embeddings of images [B, 3, S, S], unit rows [B, D]."""
        world = dist.get_world_size()
        if self.bn != "shuffle" or world == 1:
            return self.teacher([images])
        route = plan(len(images), dist.get_rank(), world, seed)
        return unshuffle(self.teacher([shuffle(images, route)]), route)

    def _contrast(self, queries: dict[int, Tensor], keys: dict[int, Tensor]) -> Play:
        """queries and keys: [B, D] by number of view. Every key meets the queries of all other views."""
        losses, rows, positives, hardest = [], [], [], []
        for j, k_BD in keys.items():
            met = [q_BD for i, q_BD in queries.items() if i != j]
            weight = 1 / len(keys) / len(k_BD) / (len(met) if self.crops == "mean" else 1)
            result = contrast(torch.cat(met), k_BD, self.bank, self.temperature, self.batch_keys)
            losses.append(result.loss_N.sum() * weight)
            rows.append(result.rows(weight / dist.get_world_size()))
            positives.append(result.positive_N)
            hardest.append(result.hardest_N)
        loss = torch.stack(losses).sum()
        positive_N, hardest_N = torch.cat(positives), torch.cat(hardest)
        metrics = {
            "loss": loss.detach(),
            "pretext_top1": (positive_N > hardest_N).float().mean(),
            "positive_similarity": positive_N.mean(),
            "hardest_similarity": hardest_N.mean(),
        }
        return Play(loss, rows, metrics)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Make BatchNorm's running statistics, which each rank keeps of its own batches, the mean of all ranks'.

        Where and how often this is done changes no result: it commutes with the moving averages.
        """
        world = dist.get_world_size()
        for network in (self.student, self.teacher):
            for buffer in network.buffers():
                if world > 1 and buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= world
