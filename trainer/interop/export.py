"""Exports the backbone of a run for other programs.

timm            safetensors for timm.create_model(name, num_classes=0)
torchvision     safetensors for torchvision's model of that name, with `fc` (`heads`) replaced by nn.Identity()
detectron2      a pickle for MODEL.WEIGHTS, as MoCo's convert-pretrain-to-detectron2.py writes it
onnx            a network from normalised images [batch, 3, S, S] to features [batch, D]
huggingface     a folder with safetensors, timm's config.json and a model card

An export is checked before it gets its name: torchvision's own network (torchvision, detectron2) and onnxruntime must
return the same features.
"""

import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data.extras import optional_import
from data.normalize import MEAN, STD
from data.references import is_reference
from trainer import distributed
from trainer.config import Config
from trainer.external import short_name
from trainer.interop.layouts import from_torchvision_vit, to_detectron2
from trainer.interop.model_card import model_card
from trainer.interop.weights import CheckpointChoice, differences, load_encoder
from trainer.run.directory import read_config
from trainer.run.files import as_os_error

Format = Literal["timm", "torchvision", "detectron2", "onnx", "huggingface"]

SUFFIXES: dict[str, str] = {
    "timm": ".safetensors",
    "torchvision": ".safetensors",
    "detectron2": ".pkl",
    "onnx": ".onnx",
}
ONNX_BYTES = 2**31  # a file is one protobuf message, which is smaller
TOLERANCE = 1e-4  # relative to the largest feature; the order of summation differs


class Export(NamedTuple):
    """A network to export, in evaluation mode, and its origin.

    `arguments` are those that timm.create_model built it with. `size` is the side of its images in pixels.
    """

    network: Any
    arguments: dict[str, Any]
    config: Config
    size: int
    run: Path
    choice: CheckpointChoice
    step: int
    out: Path
    licence: str

    @property
    def name(self) -> str:
        """The name in timm without the tag of pretrained weights, which is also the name in torchvision."""
        return self.config.model.backbone.split(".")[0]

    @property
    def small_resnet(self) -> bool:
        """True for a ResNet with a stem for small images, which no other program has."""
        return self.config.model.small_images and hasattr(self.network, "conv1")

    def weights(self) -> dict[str, Tensor]:
        """Returns parameters and buffers by timm's names."""
        return {name: x.contiguous() for name, x in self.network.state_dict().items()}


@torch.no_grad()
def export(run: Path, to: Format, out: Path, choice: CheckpointChoice, licence: str) -> str:
    """Writes the backbone of a run to `out`. Called by all ranks.

    Args:
        run: The run directory.
        to: The format.
        out: The new file, or the new folder for huggingface.
        choice: The network and the checkpoint.
        licence: Hugging Face's identifier of a licence, for the model card.

    Returns:
        A text that says how to load the export; '' on ranks other than 0.

    Raises:
        ValueError: `out` exists or has another format's name, the run has no such network, or the format cannot
            represent it.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name, nothing is overwritten")
    if (suffix := SUFFIXES.get(to)) and out.suffix != suffix:  # by which those who load it recognise the format
        raise ValueError(f"--out: got {out}, need a name that ends in {suffix} for --format {to}")
    config = read_config(run)
    with distributed.process_group("cpu") as rank_info:
        encoder, step = load_encoder(run, config, choice)
        if rank_info.rank > 0:
            return ""
    if is_reference(config.model.backbone) and to != "onnx":
        raise ValueError(
            f"--format {to}: {short_name(config.model.backbone)} is not a model of {to}; need --format onnx"
        )
    network = encoder.backbone.eval().requires_grad_(False)
    size = config.eval.size or config.data.views[0].size
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        usage = WRITERS[to](
            Export(network, encoder.backbone_args, config, size, run, choice, step, out, licence), partial
        )
        os.rename(partial, out)
    except (OSError, SafetensorError) as error:
        cause = as_os_error(error, out) if isinstance(error, SafetensorError) else error
        raise OSError(cause.errno, cause.strerror or str(cause), str(out)) from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    return f"{out}: the {choice.network} of {run}" + (f" after {step:,} steps" if step else "") + f"; for {usage}"


# A writer writes an export to a path, which is renamed to `out` afterwards, and returns how it is loaded.


def write_timm(export: Export, path: Path) -> str:
    """Writes safetensors with timm's names."""
    path.write_bytes(save(export.weights(), {"format": "pt"}))
    model = export.config.model
    if export.small_resnet:
        call = _call_in_timm(model.backbone, export.arguments)
        conv = f"nn.Conv2d(3, conv1.out_channels, 3, {model.stem_stride}, padding={model.stem_padding}, bias=False)"
        return f"{call} once its conv1 is {conv} and its maxpool nn.Identity()"
    return _call_in_timm(model.backbone, {**export.arguments, "checkpoint_path": str(export.out)})


def _call_in_timm(name: str, arguments: dict[str, Any]) -> str:
    return f"timm.create_model({name!r}, num_classes=0{''.join(f', {key}={x!r}' for key, x in arguments.items())})"


def write_torchvision(export: Export, path: Path) -> str:
    """Writes safetensors with torchvision's names. Raises ValueError if torchvision has no such network."""
    path.write_bytes(save(torchvision_weights(export), {"format": "pt"}))
    network = export.network
    if not isinstance(network, VisionTransformer):
        return f"torchvision's {export.name}, its last layer replaced by nn.Identity()"
    call = ", ".join(map(str, _vit_arguments(network)))
    return f"torchvision.models.VisionTransformer({call}), its heads replaced by nn.Identity()"


def torchvision_weights(export: Export) -> dict[str, Tensor]:
    """Returns the weights by torchvision's names. Raises ValueError if its network differs or gives other features."""
    _refuse_small_stem(export, "torchvision")
    weights = export.weights()
    twin = _torchvision_twin(export)
    timm_names = {name: from_torchvision_vit(name) for name in twin.state_dict()}
    if difference := differences(weights, {timm_names[name]: x for name, x in twin.state_dict().items()}):
        raise ValueError(f"torchvision's {export.name} is another network: {difference}")
    renamed = {name: weights[timm_name] for name, timm_name in timm_names.items()}
    twin.load_state_dict(renamed)
    x_BCHW = _random_images(twin.image_size if isinstance(export.network, VisionTransformer) else export.size)
    _check_features(export.network(x_BCHW), twin.eval()(x_BCHW), f"torchvision's {export.name}")
    return renamed


def _torchvision_twin(export: Export) -> Any:
    """Returns torchvision's network of the same shape, with new weights and without its classifier."""
    import torchvision

    network = export.network
    if isinstance(network, VisionTransformer):
        patch = network.patch_embed
        if patch.img_size[0] != patch.img_size[1] or patch.patch_size[0] != patch.patch_size[1]:
            raise ValueError(f"torchvision has no ViT for {patch.img_size} pixels in patches of {patch.patch_size}")
        twin = torchvision.models.VisionTransformer(*_vit_arguments(network))
        twin.heads = nn.Identity()
        return twin
    if not isinstance(network, ResNet) or export.name not in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"torchvision has no {export.name} that is the same network; it has ResNets and ViTs")
    twin = torchvision.models.get_model(export.name)
    twin.fc = nn.Identity()
    return twin


def _vit_arguments(network: VisionTransformer) -> tuple[int, ...]:
    """Returns torchvision's image_size, patch_size, num_layers, num_heads, hidden_dim and mlp_dim."""
    block, patch = network.blocks[0], network.patch_embed
    sizes = patch.img_size[0], patch.patch_size[0], len(network.blocks)
    return *sizes, block.attn.num_heads, network.embed_dim, block.mlp.fc1.out_features


def write_detectron2(export: Export, path: Path) -> str:
    """Writes a pickle of numpy arrays with detectron2's names. Raises ValueError if it is not torchvision's ResNet."""
    if not isinstance(export.network, ResNet):
        raise ValueError(f"detectron2 has ResNets only, the backbone is {export.config.model.backbone}")
    # detectron2 normalises by the running statistics and has no batch counters.
    weights = {
        to_detectron2(name): x.numpy()
        for name, x in torchvision_weights(export).items()
        if not name.endswith("num_batches_tracked")
    }
    with path.open("wb") as file:
        stored = {"model": weights, "__author__": "AdCo trainer", "matching_heuristics": True}
        _PortablePickler(file, protocol=4).dump(stored)
    return "MODEL.WEIGHTS of detectron2, with RESNETS.STRIDE_IN_1X1 False and INPUT.FORMAT RGB"


class _PortablePickler(pickle.Pickler):
    """Pickles arrays for any version of numpy. detectron2 often runs with numpy 1, which cannot read numpy 2's."""

    def reducer_override(self, x: Any) -> Any:
        return (np.ndarray, (x.shape, x.dtype.str, bytearray(x.tobytes()))) if type(x) is np.ndarray else NotImplemented


def write_onnx(export: Export, path: Path) -> str:
    """Writes an ONNX model with a variable batch size.

    Raises ValueError if the weights are too large for one file, or if onnxruntime returns other features.
    """
    with optional_import("export", "--format onnx"):
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 # torch's exporter uses it

    size = sum(x.nbytes for x in export.weights().values())
    if size >= ONNX_BYTES:
        raise ValueError(
            f"--format onnx: got {size / 1e9:.1f} GB of weights, need less than {ONNX_BYTES / 1e9:.1f} GB for one "
            "file; --format timm and huggingface have no limit"
        )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own code
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["features"]}
        shapes = ({0: torch.export.Dim("batch")},)
        inputs = (_random_images(export.size),)
        program = torch.onnx.export(export.network, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {"mean": str(list(MEAN)), "std": str(list(STD)), "range": "[0, 1]"})
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for batch in (1, 3):  # the model was traced with 2
        x_BCHW = _random_images(export.size, batch)
        (features,) = session.run(["features"], {"images": x_BCHW.numpy()})
        _check_features(export.network(x_BCHW), torch.from_numpy(features), "onnxruntime")
    return f"images, float32 [batch, 3, {export.size}, {export.size}] to features, checked in onnxruntime"


def write_folder(export: Export, folder: Path) -> str:
    """Writes a folder for Hugging Face. Raises ValueError if timm cannot build the network from its name."""
    _refuse_small_stem(export, "Hugging Face's folder is loaded by timm, which")
    folder.mkdir()
    network = export.network
    # Keeps the entries that describe the network, and drops those that describe timm's own weights of this name.
    kept = ("architecture", "num_classes", "first_conv", "classifier", "pool_size", "fixed_input_size", "input_size")
    network.pretrained_cfg = {name: x for name, x in network.pretrained_cfg.items() if name in kept}
    data = {
        "input_size": (3, export.size, export.size),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": export.config.eval.crop or 224 / 256,  # as `data.cpu.render_center` crops
    }
    timm.models.save_for_hf(network, str(folder), safe_serialization=True, data_config=data)
    # safetensors creates files that only their owner can read.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    card = model_card(
        export.run, export.config, export.choice.network, export.step, network, export.size, export.licence
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return f"timm.create_model('local-dir:{export.out}', pretrained=True)"


def _refuse_small_stem(export: Export, program: str) -> None:
    model = export.config.model
    if export.small_resnet:
        raise ValueError(
            f"{program} has no ResNet with a stem for small images (model.small_images, "
            f"stem_stride {model.stem_stride}): its own has a 7 x 7 convolution of stride 2 and a max pooling; "
            "use --format timm or onnx"
        )


def _random_images(size: int, batch: int = 2) -> Tensor:
    """Returns the same images [B, 3, S, S] at each call."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def _check_features(ours_BD: Tensor, theirs_BD: Tensor, program: str) -> None:
    difference = float((ours_BD - theirs_BD).abs().max() / ours_BD.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"{program} returns other features: they differ by {difference:.3g} of the largest")


WRITERS: dict[Format, Callable[[Export, Path], str]] = {
    "timm": write_timm,
    "torchvision": write_torchvision,
    "detectron2": write_detectron2,
    "onnx": write_onnx,
    "huggingface": write_folder,
}
