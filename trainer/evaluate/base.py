"""The protocol of an evaluation: a function that takes an encoder and returns named numbers.

To add one, write a file like `trainer.evaluate.knn` with an `EVALUATOR` and register it in `trainer.evaluate.registry`.

`trainer.config` imports the settings of an evaluation from its file. Evaluations and the files that they import
therefore import `trainer.config`, and modules that depend on it, only inside functions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.sources.base import Source
from models.encoder import Encoder
from trainer.distributed import RankInfo
from trainer.ops.stop import deadline, interruptible

if TYPE_CHECKING:
    from trainer.config import Config

RESULTS = "results.json"

Results = dict[str, Any]  # by name; the first number is the primary metric, which reports and charts show


class EvaluationContext(NamedTuple):
    """The inputs of an evaluation.

    Attributes:
        encoder: The network to evaluate, on this rank's device.
        config: The configuration of the run, with the overrides of the command line.
        rank_info: This process.
        folder: The directory of this evaluation, for the files that it writes.
        index_folder: The directory with the indices of the images.
        started: When this process started, in seconds of the epoch.
        sources: The images that `Evaluator.open_sources` has opened, by name.
    """

    encoder: Encoder
    config: "Config"
    rank_info: RankInfo
    folder: Path
    index_folder: Path
    started: float
    sources: dict[str, Source]

    def interruptible(self) -> AbstractContextManager[None]:
        """Return the context for work outside of a training loop: a stop request ends it, and nothing of it is kept."""
        return interruptible(self.folder, deadline(self.config.run.max_minutes, self.started))


def _no_sources(context: EvaluationContext) -> dict[str, Source]:
    return {}


class Evaluator(NamedTuple):
    """An evaluation.

    Attributes:
        folder_name: Returns the default name of its directory, from the configuration with overrides and that of the
            run without them.
        settings: Returns what the results depend on, besides the weights, the images, their size and the precision.
        evaluate: Returns the results, on rank 0 at least. Collective. A deviation of metric NAME is called
            NAME_deviation.
        open_sources: Opens the images; an evaluation that has begun is refused on other images. Collective.
    """

    folder_name: Callable[["Config", "Config"], str]
    settings: Callable[["Config"], dict[str, Any]]
    evaluate: Callable[[EvaluationContext], Results]
    open_sources: Callable[[EvaluationContext], dict[str, Source]] = _no_sources


def labelled_sources(context: EvaluationContext, more: bool = False) -> dict[str, Source]:
    """Open the training images and the validation images, `train` and `val`. Collective.

    With `more`, those of `data.more_val` as well, NAME as `more_val.NAME`.

    Raises:
        ValueError: On all ranks, if there are no validation images or the training images have a single class.
    """
    from trainer.run.sources import open_sources

    data = context.config.data
    if not more:
        data = data.model_copy(update={"more_val": None})
    train, test, more_val = open_sources(data, context.index_folder)
    if test is None:
        raise ValueError("an evaluation needs labelled validation images: give data.val=…")
    if len(train.classes) < 2:
        raise ValueError(f"an evaluation needs at least two classes; {data.train} has one, {train.classes[0]}")
    return {"train": train, "val": test, **{f"more_val.{name}": source for name, source in more_val.items()}}
