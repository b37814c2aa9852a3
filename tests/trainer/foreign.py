"""Networks and checkpoints of other programs, with the names of their code and few channels."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]


def narrow_resnet(seed: int) -> nn.Module:
    """Returns a ResNet-18 with few channels and random BatchNorm statistics."""
    torch.manual_seed(seed)
    network: nn.Module = timm.create_model("resnet18", num_classes=0, channels=[8, 8, 8, 16])
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 32, 32))
    return network.eval()


def small_stem(network: nn.Module, padding: int) -> nn.Module:
    """Returns a ResNet with a stem for small images, as solo-learn (padding 2) and lightly (1) have for CIFAR."""
    network = copy.deepcopy(network)
    network.conv1 = nn.Conv2d(3, len(network.get_parameter("conv1.weight")), 3, 1, padding, bias=False)
    network.maxpool = nn.Identity()
    return network


class SwavResNet(nn.Module):
    """src/resnet50.py: the padding of the first convolution is a layer of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        setattr(self.network.conv1, "padding", (2, 2))  # noqa: B010

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features: Tensor = self.network(F.pad(x_BCHW, (1, 1, 1, 1)))
        return features


def renamed(network: nn.Module, prefix: str) -> State:
    return {prefix + name: x for name, x in network.state_dict().items()}


def mlp(prefix: str, *widths: int) -> State:
    """Returns the tensors of an nn.Sequential of linear layers and ReLU."""
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    return {f"{prefix}{2 * i}.{name}": x for i, layer in enumerate(layers) for name, x in layer.state_dict().items()}


CHILDREN = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}  # of torchvision's ResNet


def children(network: nn.Module, prefix: str) -> State:
    """Returns the tensors as nn.Sequential(*list(resnet.children())[:-1]) names them."""
    parts = {name: name.split(".", 1) for name in network.state_dict()}
    return {f"{prefix}{CHILDREN[parts[name][0]]}.{parts[name][1]}": x for name, x in network.state_dict().items()}


def generator(network: nn.Module, prefix: str) -> State:
    """Returns the tensors as lightly's ResNetGenerator names them, and many ResNets for CIFAR."""
    return {name.replace(".downsample.", ".shortcut."): x for name, x in renamed(network, prefix).items()}


# The networks of ViTs are written out here, so that what no tensor shows is not taken from timm.


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGLU(nn.Module):
    """dinov2/layers/swiglu_ffn.py."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int, scale: bool, swiglu: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width) if swiglu else Mlp(width)
        self.ls1 = LayerScale(width) if scale else nn.Identity()
        self.ls2 = LayerScale(width) if scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class ViT(nn.Module):
    """The ViT of DINO, MoCo v3 and MAE, and of DINOv2 with scales, registers and SwiGLU."""

    def __init__(
        self,
        heads: int,
        width: int = 24,
        patch: int = 8,
        side: int = 16,
        scale: bool = False,
        registers: int = 0,
        swiglu: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(heads)
        self.heads = heads
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, width))
        self.blocks = nn.ModuleList(Block(width, heads, scale, swiglu) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        with torch.no_grad():
            for x in self.parameters():  # large weights, so that another number of heads gives other features
                x.add_(0.3 * torch.randn_like(x))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BND = self.patch_embed.proj(x_BCHW).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], 1) + self.pos_embed
        if hasattr(self, "register_tokens"):
            registers = self.register_tokens.expand(len(x_BND), -1, -1)
            x_BND = torch.cat([x_BND[:, :1], registers, x_BND[:, 1:]], 1)
        for block in self.blocks:
            x_BND = block(x_BND)
        features: Tensor = self.norm(x_BND)[:, 0]
        return features


def fixed_positions(vit: ViT, rows_first: bool) -> ViT:
    """Gives a ViT the fixed positions of MoCo v3 (vits.py), which begin with rows, or of MAE (util/pos_embed.py)."""
    side, width = int((vit.pos_embed.shape[1] - 1) ** 0.5), vit.pos_embed.shape[2]
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    positions = torch.zeros_like(vit.pos_embed)
    for patch in range(side * side):
        row, column = divmod(patch, side)
        first, second = (row, column) if rows_first else (column, row)
        angles = first * omega, second * omega
        positions[0, 1 + patch] = torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()])
    vit.pos_embed = nn.Parameter(positions)
    return vit


def moco_v3_linear(vit: ViT) -> Any:
    """As main_lincls.py saves it: no prefix of the method is left."""
    state = {**renamed(vit, "module."), "module.head.weight": torch.zeros(10, 24), "module.head.bias": torch.zeros(10)}
    return {"epoch": 90, "arch": "vit_small", "state_dict": state, "best_acc1": 73.2, "optimizer": {}}


def transformers_names(vit: ViT, new: bool) -> State:
    """Returns a ViT's tensors as transformers names them in files, or in memory since version 5."""
    names = (
        ("blocks.", "layers." if new else "encoder.layer."),
        ("norm1.", "layernorm_before."),
        ("norm2.", "layernorm_after."),
        (".attn.proj.", ".attention.o_proj." if new else ".attention.output.dense."),
        (".mlp.fc1.", ".mlp.fc1." if new else ".intermediate.dense."),
        (".mlp.fc2.", ".mlp.fc2." if new else ".output.dense."),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
    )
    parts = ("q_proj", "k_proj", "v_proj") if new else tuple(f"attention.{x}" for x in ("query", "key", "value"))
    state: State = {}
    for name, x in vit.state_dict().items():
        for old, other in names:
            name = name.replace(old, other)
        name = f"layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
        if ".attn.qkv." in name:
            pieces = zip(parts, x.chunk(3), strict=True)
            state |= {name.replace("attn.qkv", f"attention.{part}"): piece.contiguous() for part, piece in pieces}
        else:
            state[name] = x
    return state


Make = Callable[[nn.Module, nn.Module], Any]
