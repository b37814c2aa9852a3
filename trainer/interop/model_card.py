"""The README.md of a model on Hugging Face: what it is, how it was trained, how to load it, whom to cite.

The front matter is as https://huggingface.co/docs/hub/model-cards has it.
"""

from pathlib import Path
from typing import Any

from torch import nn

from data.normalize import MEAN, STD
from trainer.config import Config
from trainer.report.format import format_percent, format_seconds, latest
from trainer.report.page import render
from trainer.run.directory import IMPORTED
from trainer.run.files import read_json
from trainer.run.results import read_rows

METHODS = {
    "adco": "AdCo, adversarial contrast against learned negatives (arXiv 2011.08435)",
    "acssl": "adversarial contrastive learning with hard negatives mined online (after arXiv 2202.13072)",
    "moco": "MoCo v2 (arXiv 2003.04297)",
    "simclr": "SimCLR (arXiv 2002.05709)",
    "byol": "BYOL (arXiv 2006.07733)",
}


def model_card(run: Path, config: Config, network: str, step: int, backbone: nn.Module, size: int, licence: str) -> str:
    """The card, in Markdown, of the `network` of a run after `step` steps."""
    rows = read_rows(run / "metrics.jsonl")
    return render(
        "model_card.md.j2",
        title=f"{config.model.backbone}, {run.resolve().name}",
        licence=licence,
        imported=read_json(run / IMPORTED),
        method=config.method.name,
        method_text=METHODS[config.method.name],
        backbone=config.model.backbone,
        parameters=sum(p.numel() for p in backbone.parameters()),
        features=getattr(backbone, "head_hidden_size", backbone.num_features),
        network=network,
        step=step,
        training=_training(config),
        results=_results(read_json(run / "results.json")) if step == latest("step", rows) else [],  # of the last step
        size=size,
        mean=list(MEAN),
        std=list(STD),
    )


def _training(config: Config) -> list[tuple[str, str]]:
    data, optim = config.data, config.optim
    said = [
        ("data", f"`{Path(data.train).name}`"),
        ("epochs", f"{config.run.epochs}"),
        ("batch", f"{data.batch_size} images"),
        ("views", ", ".join(f"{view.size} pixels" for view in data.views)),
        ("optimizer", f"{optim.name}, learning rate {optim.lr:g} for 256 images, weight decay {optim.weight_decay:g}"),
        ("embedding", f"{config.model.dim} dimensions"),
        ("seed", f"{config.run.seed}"),
    ]
    if negatives := config.method.describe_negatives(config.bank):
        said.append(("negatives", negatives))
    return said


def _results(results: dict[str, Any]) -> list[tuple[str, str]]:
    said = []
    if "knn" in results:
        settings = f"k = {results['k']}, T = {results['temperature']}"
        said.append((f"kNN top-1 on the validation images ({settings})", format_percent(results["knn"])))
        said.append(("the same, untrained", format_percent(results["knn_untrained"])))
    if "seconds" in results:
        said.append(
            ("training time", f"{format_seconds(results['seconds'])}, {results['ranks']} × {results['device']}")
        )
    return said
