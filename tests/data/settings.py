"""Settings for tests of the loader: any number of views, made by this process with the CPU backend."""

from typing import Any

import torch

from data.settings import DataSettings

CPU = torch.device("cpu")


def data_settings(**changes: Any) -> DataSettings:
    """`changes` are not validated, so a single view is possible."""
    return DataSettings(train="none", workers=0, backend="cpu").model_copy(update=changes)
