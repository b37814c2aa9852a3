"""The evaluations that the command line offers. Importing this file imports none of them, so that --help is quick."""

import hashlib
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trainer.evaluate.base import Evaluator


class Registration(NamedTuple):
    """The entry of an evaluation on the command line.

    Attributes:
        module: The module that has its `EVALUATOR`.
        help: The text of `python -m trainer VERB --help`.
        seed: The override that `--seed N` stands for, with {} in place of N. Empty if nothing is drawn at random.
        fast: The override that `--fast` stands for. Empty without a fast protocol.
    """

    module: str
    help: str
    seed: str = ""
    fast: str = ""

    def overrides(self, seed: int | None, fast: bool) -> list[str]:
        """Return the overrides that the options --seed and --fast stand for."""
        if fast and not self.fast:
            raise ValueError("--fast: this evaluation has one protocol only")
        return [self.seed.format(seed)] * bool(self.seed and seed is not None) + [self.fast] * fast


EVALUATIONS = {
    "knn": Registration(
        "trainer.evaluate.knn",
        "Evaluate a checkpoint of a run, or an imported model, by weighted k nearest neighbours.\n\n"
        "The run's settings apply: eval.k=20 eval.temperature=0.07 is DINO's convention, eval.k=200 "
        "eval.temperature=0.1 that of the original paper and of lightly's benchmarks. The results are in RUN/knn, or "
        "with another convention than the run's in a directory that is named after it, such as RUN/knn-k20-t0.07.",
    ),
    "linear": Registration(
        "trainer.evaluate.linear",
        "Evaluate a checkpoint of a run by a linear classifier on the frozen backbone.\n\n"
        "The published protocol saves checkpoints and resumes as pretrain does. With --fast, features are computed "
        "once per random crop, and held-out training images choose among many learning rates and weight decays. See "
        "docs/evaluation.md.",
        seed="linear.seed={}",
        fast="linear.fast=true",
    ),
    "finetune": Registration(
        "trainer.evaluate.finetune",
        "Fine-tune a checkpoint of a run with few labels, once for each seed, and report mean and deviation.\n\n"
        "finetune.labels=0.01 (default), 0.1 or 1 is the share of the training images whose labels are used; "
        "finetune.subset_list=FILE names them. Saves checkpoints and resumes as pretrain does. See docs/evaluation.md.",
        seed="finetune.seeds=[{}]",
    ),
    "voc07": Registration(
        "trainer.evaluate.voc07",
        "Evaluate a checkpoint of a run by linear SVMs on PASCAL VOC 2007: mean average precision.\n\n"
        "voc07.root=VOCdevkit/VOC2007 is the directory of the development kit, with trainval and test. See "
        "docs/evaluation.md.",
        seed="voc07.seed={}",
    ),
}


def load_evaluator(verb: str) -> "Evaluator":
    """Import the module of an evaluation and return its `EVALUATOR`, or one from outside (`trainer.external`).

    Raises:
        ValueError: The reference to one from outside names something else.
    """
    if verb in EVALUATIONS:
        evaluator: Evaluator = import_module(EVALUATIONS[verb].module).EVALUATOR
        return evaluator
    from data.references import is_reference, resolve
    from trainer.evaluate.base import Evaluator as Expected
    from trainer.external import source_file

    found = resolve(verb) if is_reference(verb) else None
    if not isinstance(found, Expected):
        raise ValueError(f"evaluate: got {verb!r}, need file.py:NAME of a trainer.evaluate.base.Evaluator")
    code = hashlib.sha256(source_file(verb).read_bytes()).hexdigest()  # results of other code are other results
    return found._replace(settings=lambda config: {**found.settings(config), "code": code})
