"""The configuration's section `data`: the data sets, how batches are made, and what happens to each view."""

import os
import re
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict

from data.extras import is_installed
from data.order import Blocks
from data.paths import absolute
from data.processes import available_cores
from data.views import Augment, View

# Marks fields that may change when a run resumes, because they do not change what the run learns.
RESUMABLE: JsonDict = {"resumable": True}
# The type of settings that are a path or a pattern of paths.
PathText = Annotated[str, AfterValidator(absolute)]
RESERVED_NAMES = ("pixels", "untrained", "initial")  # what the results compare `knn` with


class DecoderSettings(BaseModel):
    """JPEG decoding by the DALI backend on a GPU; ignored elsewhere.

    NVIDIA's examples for ImageNet set the paddings to 211025920 and 140544512 bytes and the size to 5980 x 6430 pixels.
    Then nothing is allocated after the first step, at a cost of 0.2 GB of GPU memory per thread.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hw_decoder_load: float = Field(
        0.65,
        ge=0,
        le=1,
        description="Share of the images that the hardware decoder (A100 and later) decodes; CUDA cores decode the "
        "others, and the best share depends on data.workers.",
    )
    device_padding: int = Field(
        16 << 20, ge=0, description="Bytes of GPU memory per thread that nvJPEG allocates at the start."
    )
    host_padding: int = Field(
        8 << 20, ge=0, description="Bytes of host memory per thread that nvJPEG allocates at the start."
    )
    width: int = Field(
        0, ge=0, description="Width in pixels of the largest image that the hardware decoder prepares for; 0: none."
    )
    height: int = Field(
        0, ge=0, description="Height in pixels of the largest image that the hardware decoder prepares for; 0: none."
    )


class DataSettings(BaseModel):
    """The data sets, how batches are made, and what happens to each view."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    train: PathText = Field(
        description="Training images: a folder of class/image.jpg, shards, an index, or another format of "
        "docs/data.md. The folder may differ when a run is resumed, the images may not.",
        json_schema_extra=RESUMABLE,
    )
    val: PathText | None = Field(
        None,
        description="Labelled test images for evaluations, in any format of `train`; null for none.",
        json_schema_extra=RESUMABLE,
    )
    more_val: dict[str, PathText] | None = Field(
        None,
        description="Further labelled test images by name, in classes of `train`: `{sketch: /data/sketch}` logs "
        "`knn_sketch` with each kNN evaluation of `val`; null for none.",
        json_schema_extra=RESUMABLE,
    )
    accept_changed: bool = Field(
        False,
        description="Continue on images that are not those that the run was started with; images.json in the run "
        "directory records it.",
        json_schema_extra=RESUMABLE,
    )
    batch_size: int = Field(256, ge=1, description="Images per step, over all ranks.")
    backend: Literal["auto", "cpu", "dali"] = Field(
        "auto",
        description="Program that decodes and augments images; auto: DALI on a GPU, else the plain CPU backend.",
        json_schema_extra=RESUMABLE,
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Processes per rank that make batches (0: the training process makes them); null: as many as the "
        "machine's cores allow.",
        json_schema_extra=RESUMABLE,
    )
    prefetch: int = Field(
        2,
        ge=1,
        description="Batches made ahead, by each worker process or by DALI.",
        json_schema_extra=RESUMABLE,
    )
    decoder: DecoderSettings = Field(
        DecoderSettings(), description="JPEG decoding on a GPU by DALI.", json_schema_extra=RESUMABLE
    )
    order: Literal["global", "block"] = Field(
        "global",
        description="Shuffling of an epoch: global over all images, or block, for storage with slow random access.",
    )
    block_size: int = Field(1024, ge=1, description="Consecutive images in a block, for order: block.")
    block_window: int = Field(
        16, ge=1, description="Blocks whose images are shuffled together, for order: block.", validate_default=True
    )
    max_unreadable: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of the images seen (counted as at least 1000) that may be unreadable before the run stops.",
        json_schema_extra=RESUMABLE,
    )
    views: tuple[View, ...] = Field(
        (View(size=224), View(size=224)),
        description="The views of an image; views[0] is the key (symmetric methods: views[0] and views[1]), the others "
        "are queries.",
    )
    augment: Augment = Field(
        Augment(), description="Distribution of the augmentations of all views; a view may differ (data.views)."
    )

    @field_validator("more_val")
    @classmethod
    def _check_more_val(cls, paths: dict[str, str] | None, info: ValidationInfo) -> dict[str, str] | None:
        for name in paths or {}:  # the messages continue the name of the setting
            if not re.fullmatch("[A-Za-z0-9_]+", name):
                raise ValueError(f"{name}: need a name of letters, digits and _")
            if name in RESERVED_NAMES:
                raise ValueError(f"{name}: knn_{name} has another meaning in the results, need another name")
            if info.data.get("val", "") is None:
                raise ValueError(f"{name}: need data.val as well, whose accuracy is knn")
        return paths

    @field_validator("views")  # min_length would count only the views without errors
    @classmethod
    def _check_views(cls, views: tuple[View, ...]) -> tuple[View, ...]:
        if len(views) < 2:
            raise ValueError("need at least 2 views")
        return views

    @field_validator("block_window")
    @classmethod
    def _check_block_window(cls, window: int, info: ValidationInfo) -> int:
        size, batch_size = info.data.get("block_size"), info.data.get("batch_size")
        if info.data.get("order") == "block" and size and batch_size and size * window < batch_size:
            raise ValueError(
                f"need at least {-(-batch_size // size)} blocks of {size} images to mix batches of {batch_size} images"
            )
        return window

    @property
    def paths(self) -> dict[str, str]:
        """The data sets by their settings: `train`, and where they are set `val` and each `more_val.NAME`."""
        more = {f"more_val.{name}": path for name, path in (self.more_val or {}).items()}
        return {"train": self.train, **({"val": self.val} if self.val else {}), **more}

    @property
    def blocks(self) -> Blocks | None:
        """The blocks of order: block; None for order: global."""
        return Blocks(self.block_size, self.block_window) if self.order == "block" else None

    def backend_for(self, device: torch.device) -> Literal["cpu", "dali"]:
        """Return the backend, with auto resolved for the device; docs/data-backends.md has the measurements."""
        if self.backend != "auto":
            return self.backend
        return "dali" if device.type == "cuda" else "cpu"

    def evaluation_backend_for(self, device: torch.device) -> Literal["cpu", "dali"]:
        """Return the backend of evaluations: auto takes DALI on a GPU only if it is installed."""
        if self.backend == "auto" and not is_installed("nvidia.dali"):
            return "cpu"
        return self.backend_for(device)

    def workers_for(self, device: torch.device) -> int:
        """Return the number of worker processes per rank, by default as many as suit the device and the machine.

        With a GPU, workers get the cores that the ranks' own threads leave, up to 16. Without one, the network uses all
        cores and one process is fast enough.
        """
        if self.workers is not None:
            return self.workers
        if device.type != "cuda":
            return 1
        cores_per_rank = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        return min(16, max(1, cores_per_rank - 1))
