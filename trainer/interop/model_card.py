"""The README.md of a model on Hugging Face: what it is, how it was trained, how to load it, what to cite.

Its front matter is described in https://huggingface.co/docs/hub/model-cards.
"""

from pathlib import Path
from typing import Any

from torch import nn

from data.normalize import MEAN, STD
from trainer.config import Config
from trainer.external import short_name
from trainer.report.format import format_percent, format_seconds, latest
from trainer.report.page import render
from trainer.run.directory import IMPORTED
from trainer.run.files import read_json
from trainer.run.results import more_knn, read_rows


def model_card(run: Path, config: Config, network: str, step: int, backbone: nn.Module, size: int, licence: str) -> str:
    """Returns the card as Markdown.

    Args:
        run: The run directory, for the results or for the origin of an imported model.
        config: The run's configuration.
        network: student or teacher.
        step: The step of the checkpoint. The card has results for the student of the last step only.
        backbone: The network without its head.
        size: Side of the images in pixels.
        licence: Hugging Face's identifier of a licence.
    """
    final = step == latest("step", read_rows(run / "metrics.jsonl")) and network == "student"
    return render(
        "model_card.md.j2",
        title=f"{short_name(config.model.backbone)}, {run.resolve().name}",
        licence=licence,
        imported=read_json(run / IMPORTED),
        method=short_name(config.method.name),
        papers=config.method.papers,
        backbone=short_name(config.model.backbone),
        arguments=config.model.backbone_args,
        parameters=sum(p.numel() for p in backbone.parameters()),
        features=getattr(backbone, "head_hidden_size", backbone.num_features),
        network=network,
        step=step,
        training=_training(config),
        results=_results(read_json(run / "results.json")) if final else [],
        size=size,
        mean=list(MEAN),
        std=list(STD),
    )


def _training(config: Config) -> list[tuple[str, str]]:
    data, optim = config.data, config.optim
    negatives, weights = config.method.describe_negatives(config.bank), config.model.weights
    return [
        ("data", f"`{Path(data.train).name}`"),
        *([("initial weights", f"`{Path(weights).name}`")] if weights else []),
        ("epochs", f"{config.run.epochs}"),
        ("batch", f"{data.batch_size} images"),
        ("views", ", ".join(f"{view.size} pixels" for view in data.views)),
        ("optimizer", f"{optim.name}, learning rate {optim.lr:g} per 256 images, weight decay {optim.weight_decay:g}"),
        ("embedding", f"{config.model.dim} dimensions"),
        ("seed", f"{config.run.seed}"),
        *([("negatives", negatives)] if negatives else []),
    ]


def _results(results: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "knn" in results:
        settings = f"k = {results['k']}, T = {results['temperature']}"
        rows.append((f"kNN top-1 on the validation images ({settings})", format_percent(results["knn"])))
        rows += [(f"kNN top-1 on {name}", format_percent(value)) for name, value in more_knn(results).items()]
        baselines = {"knn_untrained": "the untrained encoder", "knn_initial": "the initial weights"}
        for key, name in (baselines | {"knn_pixels": "the raw pixels"}).items():
            if key in results:
                rows.append((f"kNN top-1 of {name}", format_percent(results[key])))
    if "seconds" in results:
        machine = f"{results['ranks']} × {results['device']}"
        rows.append(("training time", f"{format_seconds(results['seconds'])}, {machine}"))
    return rows
