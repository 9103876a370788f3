"""Transfer: Tables 1, 2 and 3, one command a cell; defaults are the settings of Sec. 5 and App. B.

    python finetune.py --task sunrgbd --toy --model late --linear \\
                       --weights runs/toy-rgbd-decur/checkpoint.pt          made-up scenes
    torchrun --nproc_per_node=4 finetune.py --task bigearthnet --linear --labels 0.01 \\
                       --weights runs/sar-optical-decur/checkpoint.pt       Table 1, first column
    python finetune.py --task geonrw --weights none          Supervised; with --linear Rand. Init.
    python finetune.py --table runs/*                        beside the paper's numbers

Writes into --out: results.json (task, split, weights and their sha256, settings, metric, seed,
time), ids.txt (the training samples), checkpoint.pt (all that --resume needs), log.jsonl,
args.json.  Metrics are of the whole test split after the last step, never of the best one.
"""
import argparse
import hashlib
import json
import signal
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CLASSES19, SCENE_CLASSES, SHAPES, BadInput, Draws, epoch_batches, make_toy, mixed,
                  moved, normalise, open_pairs, picture, random_boxes, read_label, separable,
                  triangle_filter, unit)
from decur import MITS, RESNETS, branch, mit, read_weights, resnet, start_as_segformer
from pretrain import (agreed, defaults, go_on, leave_group, load_checkpoint, measure_statistics,
                      mixed_precision, open_folder, processes, run, save_checkpoint, settings_of,
                      signals_to_come, start_from, start_processes, write_atomically)

GEONRW = ("forest", "water", "agricultural", "residential, commercial, industrial",
          "grassland, swamp, shrubbery", "railway", "highway, squares", "airport, shipyard",
          "roads", "buildings")
# The data set's own colormap, red green blue: the classes in their order.
GEONRW_COLOURS = ((44, 160, 44), (31, 119, 180), (140, 86, 75), (127, 127, 127), (188, 189, 34),
                  (255, 127, 14), (148, 103, 189), (23, 190, 207), (170, 170, 170), (214, 39, 40))
NYU40 = ("wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds "
         "desk shelves curtain dresser pillow mirror floor_mat clothes ceiling books fridge tv "
         "paper towel shower_curtain box whiteboard person night_stand toilet sink lamp bathtub "
         "bag otherstructure otherfurniture otherprop").split()
# scenario: of the encoders.  model: unless --model says other.
TASKS = {
    "bigearthnet": dict(scenario="sar-optical", data="data/bigearthnet", classes=tuple(CLASSES19),
                        model="late"),
    "geonrw": dict(scenario="rgb-dem", data="data/rgb-dem", classes=GEONRW, model="fcn"),
    "sunrgbd": dict(scenario="rgbd", data="data/rgbd", classes=tuple(NYU40[:37]), model="fcn"),
    "nyuv2": dict(scenario="rgbd", data="data/nyuv2", classes=tuple(NYU40), model="fcn"),
}
# App. B, Transfer learning.  size: the training crop's height; lr_linear: with --linear.  A comment
# beside a value: its source, where the paper is silent.
FCN_RGBD = dict(
    backbone="resnet50", modality=1, batch_size=8, steps=40000, optimizer="sgd", lr=0.01,
    weight_decay=1e-5,
    momentum=0.9, schedule="poly",              # MMSegmentation's of 40k, without its least rate
    size=480, scale=(0.5, 1.0))                 # 480x480 of CMX's 480x640; as in pretraining
# "the same settings of CMX": its published configuration for NYUv2, 500 epochs of 100 steps.
# scale None: CMX's own crops, see `cmx_boxes`; test_scales: each with its mirror image.
CMX_NYU = dict(
    backbone="mit_b2", modality=0, batch_size=8, steps=50000, optimizer="adamw", lr=6e-5,
    weight_decay=0.01, schedule="warm poly", size=480, scale=None, test_scales=(0.75, 1.0, 1.25))
RECIPES = {
    ("bigearthnet", "late"): dict(
        backbone="resnet50", modality=0, batch_size=256, epochs=100, optimizer="sgd", lr=0.05,
        lr_linear=0.5, weight_decay=0.0, momentum=0.9, schedule="steps", size=224, scale=(0.8, 1.0),
        test_crop=224 / 256),                   # the authors': the middle 224 of 256
    ("geonrw", "fcn"): dict(
        backbone="resnet50", modality=0, batch_size=256, epochs=30, optimizer="adamw", lr=1e-4,
        weight_decay=0.01, size=224, scale=(0.2, 1.0),
        schedule="constant"),                   # as the authors' in its 30 epochs
    ("sunrgbd", "fcn"): FCN_RGBD, ("nyuv2", "fcn"): FCN_RGBD,
    ("sunrgbd", "cmx"): CMX_NYU | dict(steps=None, epochs=500),  # published for NYUv2 alone
    ("nyuv2", "cmx"): CMX_NYU | dict(backbone="mit_b5"),  # Table 3: B2 on SUN RGB-D, B5 on NYUv2
}
# --toy: every model goes with every task.
TOYS = {
    "late": dict(backbone="resnet-toy", modality=0, batch_size=64, epochs=20, steps=None,
                 optimizer="sgd", lr=0.05, lr_linear=0.5, weight_decay=0.0, momentum=0.9,
                 schedule="steps", size=48, scale=(0.8, 1.0), test_crop=1.0),
    "fcn": dict(backbone="resnet-toy", modality=0, batch_size=32, epochs=8, steps=None,
                optimizer="adamw", lr=1e-3, lr_linear=1e-2, weight_decay=0.01, schedule="poly",
                size=48, scale=(0.5, 1.0)),
    "cmx": dict(backbone="mit_b0", batch_size=16, epochs=4, steps=None, lr=1e-3, size=48, embed=64),
}
REST = dict(seed=0, labels=1.0, epochs=None, steps=None, lr_linear=None, momentum=0.9,
            test_crop=None, test_scales=(1.0,), embed=512, split="train", test_split="test",
            depth_unit=1000.0, save_every=30.0, save_images=0)
RUN_ONLY = ("data", "out", "resume", "save_every", "workers", "toy", "save_images", "table")


# ---- metrics: of the data set, not means over batches ----

def average_precision(scores, labels):
    """mAP "micro", the global average: all N x C decisions are one ranking.

    scores   NxC (or N)   any real numbers        labels   NxC (or N)   0 or 1

    The area under the precision-recall steps, sum_n (R_n - R_{n-1}) P_n; equal scores share one
    threshold. Returns a float, or None where there is no positive label: it is undefined.
    """
    scores, labels = scores.flatten(), labels.flatten().double()
    if not labels.any():
        return None
    order = scores.argsort(descending=True)
    scores, hits = scores[order], labels[order].cumsum(0)
    last = torch.ones_like(scores, dtype=torch.bool)
    last[:-1] = scores[1:] != scores[:-1]                           # the last of equal scores
    above = torch.arange(1, len(scores) + 1, device=scores.device)[last]
    hits = hits[last]
    return (hits.diff(prepend=hits.new_zeros(1)) / hits[-1] * hits / above).sum().item()


def macro_average_precision(scores, labels):
    """The mean over the classes with a positive label; None without any."""
    each = [average_precision(s, l) for s, l in zip(scores.T, labels.T)]
    defined = [a for a in each if a is not None]
    return statistics.fmean(defined) if defined else None


def confusion(pred, gt, num_classes, ignore):
    """CxC counts, row: label, column: prediction; pixels labelled `ignore` are left out."""
    valid = gt != ignore
    counts = (num_classes * gt[valid] + pred[valid]).bincount(minlength=num_classes ** 2)
    return counts.view(num_classes, num_classes)


def iou_and_accuracy(pred, gt, num_classes, ignore):
    """mIoU and pixel accuracy.  pred, gt: classes 0..num_classes-1, any shape; gt also `ignore`.

    A class that is neither predicted nor labelled has no IoU and takes no part in the mean.
    Without a labelled pixel both are None: undefined.
    """
    return scores_of(confusion(pred, gt, num_classes, ignore))


def scores_of(matrix):
    if not matrix.any():
        return None, None
    matrix = matrix.cpu().double()              # MPS has no float64
    hit, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return (hit / union)[union > 0].mean().item(), (hit.sum() / matrix.sum()).item()


# ---- models: `features` of the encoders, then `head`, so that a probe can keep the features ----

class LateFusion(nn.Module):
    """App. B, SAR-optical: pooled features concatenated, one linear layer.

    encoders: modules NxCxHxW -> Nxd, d in `dims`.  Call: NxCxHxW for each encoder -> NxC logits.
    """

    def __init__(self, encoders, dims, num_classes):
        super().__init__()
        self.encoders, self.fc = nn.ModuleList(encoders), nn.Linear(sum(dims), num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # not in the paper: the authors'
        nn.init.zeros_(self.fc.bias)

    def features(self, *x):
        return [torch.cat([E(x_) for E, x_ in zip(self.encoders, x)], 1)]  # Nx2d

    def head(self, size, feature):
        return self.fc(feature)

    def forward(self, *x):
        return self.head(x[0].shape[-2:], *self.features(*x))


class FCN(nn.Module):
    """App. B, RGB-DEM: the last three stages of all encoders concatenated, 1x1 convolutions,
    bilinear to input size, added.  Call: NxCxHxW for each encoder -> NxCxHxW logits.

    Paper: the maps are upsampled, then convolved; with two ResNet-50 that is 7168 channels of
    224x224, 1.4 GB an image.  Here: convolved, then upsampled.  Both are linear, one across
    channels and one across pixels, and bilinear weights sum to 1, so that also the bias stays: it
    is the same function.
    """

    def __init__(self, encoders, num_classes):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.score = nn.ModuleList(nn.Conv2d(sum(E.dims[s] for E in encoders), num_classes, 1)
                                   for s in (1, 2, 3))

    def features(self, *x):
        maps = [E.stages(x_)[1:] for E, x_ in zip(self.encoders, x)]
        return [torch.cat(stage, 1) for stage in zip(*maps)]

    def head(self, size, *maps):
        return sum(F.interpolate(score(m), size, mode="bilinear")
                   for score, m in zip(self.score, maps))

    def forward(self, *x):
        return self.head(x[0].shape[-2:], *self.features(*x))


# CMX (Zhang et al., 2022) with the published parameter names: checkpoints load here and there.

class FRM(nn.Module):
    """Feature rectification, its Eq. 1-5: a stream takes from the other what two weights let by."""

    def __init__(self, C):
        super().__init__()
        self.channel_weights = nn.ModuleDict({"mlp": nn.Sequential(
            nn.Linear(4 * C, 4 * C), nn.ReLU(), nn.Linear(4 * C, 2 * C))})
        self.spatial_weights = nn.ModuleDict({"mlp": nn.Sequential(
            nn.Conv2d(2 * C, C, 1), nn.ReLU(), nn.Conv2d(C, 2, 1))})

    def forward(self, a, b):                    # NxCxHxW each
        ab = torch.cat((a, b), 1)                                   # Nx2CxHxW
        pooled = torch.cat((ab.mean((2, 3)), ab.amax((2, 3))), 1)   # Nx4C
        wc = self.channel_weights["mlp"](pooled).sigmoid()[..., None, None]
        ws = self.spatial_weights["mlp"](ab).sigmoid()
        (wca, wcb), (wsa, wsb) = wc.chunk(2, 1), ws.chunk(2, 1)     # NxCx1x1, Nx1xHxW
        return a + (wcb + wsb) / 2 * b, b + (wca + wsa) / 2 * a


class FFM(nn.Module):
    """Feature fusion, its Eq. 6-9: cross attention, then a residual mix of channels."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.cross = nn.ModuleDict()
        for i in (1, 2):
            self.cross[f"channel_proj{i}"] = nn.Linear(C, 2 * C)
            self.cross[f"end_proj{i}"] = nn.Linear(2 * C, C)
            self.cross[f"norm{i}"] = nn.LayerNorm(C)
        self.cross["cross_attn"] = nn.ModuleDict({f"kv{i}": nn.Linear(C, 2 * C, bias=False)
                                                  for i in (1, 2)})
        self.channel_emb = nn.ModuleDict({
            "residual": nn.Conv2d(2 * C, C, 1, bias=False),
            "channel_embed": nn.Sequential(
                nn.Conv2d(2 * C, C, 1), nn.Conv2d(C, C, 3, padding=1, groups=C), nn.ReLU(),
                nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
            "norm": nn.BatchNorm2d(C)})

    def forward(self, a, b):                    # NxCxHxW each
        cross, (H, W) = self.cross, a.shape[-2:]
        tokens = [m.flatten(2).mT for m in (a, b)]                  # NxHWxC
        y, u = zip(*[F.relu(cross[f"channel_proj{i}"](t)).chunk(2, -1)  # NxHWxC each
                     for i, t in enumerate(tokens, 1)])
        q = [self.split(u_) for u_ in u]                            # N x heads x HW x C/heads
        G = []
        for i, u_ in enumerate(u, 1):
            k, v = (self.split(t) for t in cross["cross_attn"][f"kv{i}"](u_).chunk(2, -1))
            # the context: N x heads x C/heads x C/heads
            G.append((k.mT @ v * k.shape[-1] ** -0.5).softmax(-2))
        # each with the other's context
        t = [(q_ @ G_).transpose(1, 2).flatten(2) for q_, G_ in zip(q, reversed(G))]
        yt = [torch.cat(pair, -1) for pair in zip(y, t)]            # NxHWx2C
        out = [cross[f"norm{i + 1}"](tokens[i] + cross[f"end_proj{i + 1}"](yt[i])) for i in (0, 1)]
        m = torch.cat(out, -1).mT.unflatten(2, (H, W))              # Nx2CxHxW
        emb = self.channel_emb
        return emb["norm"](emb["residual"](m) + emb["channel_embed"](m))

    def split(self, t):
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)    # N x heads x HW x C/heads


class CMX(nn.Module):
    """CMX with its MLP decoder.  Call: rgb NxCxHxW, x NxCxHxW -> Nxnum_classesxHxW logits.

    name: a key of MITS, for both streams; channels: of the two inputs; embed: width of the
    decoder.  Its batch norm has eps 1e-5 (the published: 1e-3 in training, 1e-5 in evaluation).
    """

    def __init__(self, name, num_classes, channels=(3, 3), embed=512, dropout=0.1):
        super().__init__()
        self.encoders = tuple(mit(name, c) for c in channels)      # a tuple: registered below
        dims = self.encoders[0].dims
        self.backbone = nn.Module()
        for prefix, E in zip(("", "extra_"), self.encoders):
            for part, module in E.named_children():
                self.backbone.add_module(prefix + part, module)
        self.backbone.FRMs = nn.ModuleList(FRM(C) for C in dims)
        self.backbone.FFMs = nn.ModuleList(FFM(C, heads) for C, heads in zip(dims, (1, 2, 5, 8)))
        start_as_segformer(self.backbone.FRMs), start_as_segformer(self.backbone.FFMs)
        self.decode_head = head = nn.ModuleDict(
            {f"linear_c{s}": nn.ModuleDict({"proj": nn.Linear(dims[s - 1], embed)})
             for s in (4, 3, 2, 1)})
        head["linear_fuse"] = nn.Sequential(
            nn.Conv2d(4 * embed, embed, 1), nn.BatchNorm2d(embed), nn.ReLU())
        head["linear_pred"] = nn.Conv2d(embed, num_classes, 1)
        for conv in (head["linear_fuse"][0], head["linear_pred"]):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.dropout = dropout

    def forward(self, rgb, x):
        size, fused = rgb.shape[-2:], []
        for s, (E1, E2) in enumerate([self.encoders] * 4):
            # the rectified maps go on to the next stage, the fused one to the decoder
            rgb, x = self.backbone.FRMs[s](E1.stage(s + 1, rgb), E2.stage(s + 1, x))
            fused.append(self.backbone.FFMs[s](rgb, x))
        head, maps = self.decode_head, []
        for s in (4, 3, 2, 1):
            m = head[f"linear_c{s}"]["proj"](fused[s - 1].movedim(1, -1)).movedim(-1, 1)
            maps.append(F.interpolate(m, fused[0].shape[-2:], mode="bilinear"))
        m = head["linear_fuse"](torch.cat(maps, 1))
        m = head["linear_pred"](F.dropout2d(m, self.dropout, self.training))
        return F.interpolate(m, size, mode="bilinear")


class Embedding(nn.Module):
    """An encoder with its projector, of whose K dimensions a part is given."""

    def __init__(self, f, dimensions):
        super().__init__()
        self.f, self.dimensions, self.dim = f, dimensions, dimensions.stop - dimensions.start

    def forward(self, x):
        return self.f(x)[:, self.dimensions]


# ---- the model of a run, and weights into it ----

def build(args, channels, num_classes):
    """The model of the settings, its encoders, and a line for each of the --weights they got."""
    channels = [channels[args.modality - 1]] if args.modality else channels
    file = args.weights[0]
    if args.part:
        encoders, line = embeddings(args, channels)
        return LateFusion(encoders, [E.dim for E in encoders], num_classes), encoders, [line]
    if args.model == "cmx":
        net = CMX(args.backbone, num_classes, channels, args.embed)
        encoders = net.encoders
    else:
        encoders = [(mit if args.backbone in MITS else resnet)(args.backbone, c) for c in channels]
        net = FCN(encoders, num_classes) if args.model == "fcn" else \
            LateFusion(encoders, [E.dims[-1] for E in encoders], num_classes)
    if args.weights == ["none"]:
        return net, encoders, ["random weights"]
    if args.model == "cmx" and len(args.weights) == 1 and Path(file).is_file():
        state = read_weights(file, "")[0]
        if any(key.startswith("backbone.") for key in state):       # a whole CMX
            for key in state if args.bgr else ():   # the published know images as blue, green, red
                if key.endswith("patch_embed1.proj.weight"):
                    state[key] = state[key].flip(1)
            load(net, state, file, f"a CMX of {args.backbone} and the task's classes")
            return net, encoders, [f"{file}: all {len(state)} keys of CMX matched"]
    return net, encoders, list(start_from(args.weights, encoders, args))


def load(net, state, file, expected):
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"--weights {file}: {reason}; expected {expected}") from None


def embeddings(args, channels):
    """Encoders with projectors from a checkpoint.pt, cut to --part, and a line about them."""
    file, which = args.weights[0], args.part
    checkpoint = load_checkpoint(Path(file))
    s, state = checkpoint["settings"], checkpoint["model"]
    if "Kc" not in s or len(args.weights) != 1:
        raise BadInput(f"--part {which}: expected --weights with one checkpoint.pt of pretrain.py, "
                       "which has the projector")
    Kc, K = s["Kc"], s["K"]
    start, stop = dict(common=(0, Kc), unique=(Kc, K), all=(0, K))[which]
    if start == stop:
        raise BadInput(f"--part {which}: {file} has {Kc} common of {K} dimensions")
    encoders = []
    for m, c in zip([args.modality] if args.modality else (1, 2), channels):
        f, prefix = branch(s["backbone"], c, s["widths"]), f"f{m}."
        load(f, {key.removeprefix(prefix): value for key, value in state.items()
                 if key.startswith(prefix)}, file, f"{c} input channels of modality {m}")
        encoders.append(Embedding(f, slice(start, stop)))
    return encoders, f"{file}: {stop - start} {which} dimensions of each modality's {K}"


def origin(files):
    """sha256 of each file, and where they are known the settings of the pretraining behind it."""
    paths = [Path(file) for file in files if file not in ("none", "imagenet")]
    settings = None
    if paths and paths[0].name.endswith(".pth") and paths[0].with_suffix(".json").is_file():
        settings = json.loads(paths[0].with_suffix(".json").read_text()).get("settings")
    elif paths:
        about = torch.load(paths[0], map_location="cpu", weights_only=True)
        settings = about.get("settings") if isinstance(about, dict) else None
        settings = settings_of(about) if settings and "method" in settings else settings
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths], settings


def fingerprint(modules):
    """sha256 of every parameter and buffer."""
    digest = hashlib.sha256()
    for t in (t for module in modules for t in module.state_dict().values()):
        digest.update(t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- samples ----

class Labelled:
    """A task's data set with every target checked: (x1, x2, target), the target C zeros and ones or
    HxW, 0 unlabelled, 1..C.

    factors: of the made-up scenes, where the target is which of the objects are there.
    Raises BadInput that names the file of a mask of another size, or with a value beyond C.
    """

    def __init__(self, data, num_classes, root, factors=None):
        self.data, self.modalities, self.num_classes = data, data.modalities, num_classes
        self.root, self.factors = Path(root), factors

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        name = self.data.ids[i]
        x1, x2, *target = self.data[i]
        # made-up satellite scenes come as views
        x1, x2 = (x[0] if isinstance(x, list) else x for x in (x1, x2))
        if self.factors:
            target = torch.zeros(self.num_classes)
            target[self.factors[name]] = 1
            return x1, x2, target
        file = self.mask_file(name)
        target = target[0] if target else torch.from_numpy(read_label(file))
        if target.ndim == 1:
            return x1, x2, target
        image, mask = x1.shape[-2:], target.shape
        if files := getattr(self.data, "files1", None):             # on the canvas all are equal
            image, mask = (Image.open(path).size[::-1] for path in (files[name], file))
        if image != mask:
            raise BadInput(f"{file} is a mask of {tuple(mask)} pixels for an image of "
                           f"{tuple(image)}; expected equal sizes")
        low, high = target.min(), target.max()
        if low < 0 or high > self.num_classes:
            raise BadInput(f"{file} has the label {low if low < 0 else high}; expected 0 "
                           f"(unlabelled) to {self.num_classes}")
        return x1, x2, target

    def mask_file(self, name):
        if isinstance(labels := getattr(self.data, "labels", None), dict):
            return labels[name]
        return self.root / "Label" / f"{name}.png" if self.modalities[0] == "sar" else f"{name}_seg"


def open_task(args, split, classes):
    """The data set of a split."""
    scenario, name, factors = TASKS[args.task]["scenario"], args.task, None
    if args.toy and name == "bigearthnet":
        name = scenario                         # its scenes lie as those of pretraining
    if args.toy and args.model == "late":       # 0..11: which object, then its shape
        rows = (Path(args.data) / "factors.csv").read_text().split()[1:]
        factors = {scene: [int(shape) + len(SHAPES) * k for k, shape in enumerate(shapes)]
                   for scene, *shapes in (row.split(",") for row in rows)}
    size = args.size * 2 // 3 if scenario == "rgbd" else args.size  # its canvas is 3/2 as high
    data = open_pairs(name, args.data, size, split, args.depth_unit)
    return Labelled(data, len(classes), args.data, factors)


def subset(n, fraction, seed):
    """--labels: a prefix of a seeded permutation of 0..n-1: smaller subsets lie in larger ones."""
    return np.random.default_rng(seed).permutation(n)[:max(1, round(fraction * n))]


# ---- augmentation: one box for both modalities and the mask ----

def cmx_boxes(B, H, W, draws):
    """CMX's: scaled by one of six factors, then cropped to the frame's size, or padded to it: a box
    that sticks out of the frame on all sides.
    """
    u = draws(4).double()
    s = torch.tensor([0.5, 0.75, 1, 1.25, 1.5, 1.75], dtype=u.dtype)[(6 * u[:, :1]).long()]  # Bx1

    def start(u, n):
        spare = (s * n).round() - n                                 # Bx1, in scaled pixels
        return torch.where(spare >= 0, (u * (spare + 1)).floor(), -(-spare / 2).floor()) / s

    return start(u[:, 1:2], H), start(u[:, 2:3], W), H / s, W / s, u[:, 3:] < 0.5


def middle_boxes(B, H, W, fraction):
    boxes = ((1 - fraction) / 2 * H, (1 - fraction) / 2 * W, fraction * H, fraction * W, 0)
    return [torch.full((B, 1), float(number)) for number in boxes]


def resample(x, boxes, size):
    """Each box resized to `size`, mirrored where it says so; outside the frame is 0.

    x: BxCxHxW float, by a triangle filter, as in pretraining; or BxHxW integers, the nearest pixel.
    """
    top, left, h, w, mirrored = (v.float().to(x.device) for v in boxes)  # Bx1 each
    if not x.is_floating_point():
        y, x_ = ((start + (torch.arange(n, device=x.device) + 0.5) * length / n).floor().long()
                 for start, length, n in ((top, h, size[0]), (left, w, size[1])))  # BxH', BxW'
        x_ = torch.where(mirrored > 0, x_.flip(1), x_)
        y, x_ = y[:, :, None], x_[:, None]
        H, W = x.shape[1:]
        inside = (y >= 0) & (y < H) & (x_ >= 0) & (x_ < W)          # BxH'xW'
        found = x[torch.arange(len(x), device=x.device)[:, None, None], y.clamp(0, H - 1),
                  x_.clamp(0, W - 1)]
        return torch.where(inside, found, 0)
    Wy = triangle_filter(top, h, x.shape[2], size[0]).nan_to_num(0)  # nan: a row outside
    Wx = triangle_filter(left, w, x.shape[3], size[1]).nan_to_num(0)
    return separable(x, Wy, torch.where(mirrored[..., None] > 0, Wx.flip(1), Wx))


def prepared(batch, args, modalities, device, draws=None):
    """A batch of files -> what the model sees ([NxCxHxW] of the modalities in use) and the target.

    With draws it is augmented; without, it is the frame, or its middle where the task crops.
    """
    *x, target = (moved(t, device) for t in batch)
    x = [normalise(unit(x_), modality) for x_, modality in zip(x, modalities)]
    x = [x[args.modality - 1]] if args.modality else x
    B, _, H, W = x[0].shape
    size = (args.size, args.size)
    if draws and args.scale:
        boxes = random_boxes(B, H, W, args.scale, draws)
    elif draws:
        boxes, size = cmx_boxes(B, H, W, draws), (H, W)
    elif args.test_crop:
        boxes = middle_boxes(B, H, W, args.test_crop)
    else:
        return x, target
    x = [resample(x_, boxes, size) for x_ in x]
    return x, target if target.ndim == 2 else resample(target, boxes, size)


# ---- training and evaluation ----

def schedule(name, step, steps):
    """The learning rate at a step, as a fraction of its base."""
    if name == "steps":                         # "by factor 10 at 60 and 80 epochs", of 100
        return 0.1 ** sum(10 * step >= part * steps for part in (6, 8))
    if name == "constant":
        return 1.0
    warm = steps // 50 if name == "warm poly" else 0  # CMX: 10 of 500 epochs, linearly from 0
    return step / warm if step < warm else (1 - step / steps) ** 0.9


def summed(t):
    """Over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def loss_of(logits, target, world):
    """MultiLabelSoftMarginLoss, or CrossEntropyLoss over the labelled pixels of all processes."""
    if target.ndim == 2:
        return F.multilabel_soft_margin_loss(logits.float(), target)
    labelled = summed((target > 0).sum().float()).clamp(min=1)
    total = F.cross_entropy(logits.float(), target - 1, ignore_index=-1, reduction="sum")
    return total * world / labelled             # DistributedDataParallel will divide by `world`


def scores(net, x, scales):
    """Logits; or CMX's evaluation: exp(logits + the mirror image's) of each scale, added.

    CMX: frames above 480x640, those at scale 1.25, by sliding windows.  Here: whole.
    """
    if tuple(scales) == (1.0,):
        return net(*x).float()
    size, both = x[0].shape[-2:], []
    for scale in scales:
        scaled = [F.interpolate(x_, [round(scale * n) for n in size], mode="bilinear") for x_ in x]
        both.append(net(*scaled).float() + net(*[x_.flip(-1) for x_ in scaled]).flip(-1).float())
    top = torch.stack([b.amax((1, 2, 3), keepdim=True) for b in both]).amax(0)  # Nx1x1x1
    excess = (top - 80).clamp(min=0)            # exp(89) would be infinite; the order stays
    return sum(F.interpolate((b - excess).exp(), size, mode="bilinear") for b in both)


@torch.no_grad()
def evaluate(predict, batches, num_classes, rows, n, device):
    """Metrics of n samples, each counted once; this process has the `rows` of them.

    predict: batch -> scores, target.  Returns {name: value, None where it is undefined}.
    """
    S, Y, matrix = [], [], torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for batch in batches:
        s, target = predict(batch)
        if target.ndim == 2:
            S.append(s), Y.append(target)
        else:
            matrix += confusion(s.argmax(1), target - 1, num_classes, -1)
    multilabel = summed(torch.tensor(float(bool(S)), device=device))  # S: empty without samples
    if not multilabel:
        return dict(zip(("mIoU", "accuracy"), scores_of(summed(matrix))))
    joint = torch.zeros(2, n, num_classes, device=device)           # 0 in the others' rows
    if S:
        joint[:, rows] = torch.stack((torch.cat(S), torch.cat(Y)))
    joint = summed(joint).cpu()
    return {"mAP micro": average_precision(*joint), "mAP macro": macro_average_precision(*joint)}


# ---- pictures ----

def palette(classes):
    """The data set's colours for 0 (black: unlabelled) and its classes, (C+1)x3 uint8.

    SUN RGB-D and NYUv2 come without colours: there as on made-up scenes it is the colormap that the
    field draws them with, PASCAL VOC's: the bits of the index spread over three channels.
    """
    if classes == GEONRW:
        return np.uint8([(0, 0, 0), *GEONRW_COLOURS])
    k = np.arange(len(classes) + 1)[:, None]
    bits = sum(((k >> (3 * b + np.arange(3))) & 1) << (7 - b) for b in range(3))
    return bits.astype(np.uint8)


TITLES = dict(sar="SAR", ms="optical", aerial="RGB", dem="height", rgb="RGB", hha="HHA")


def save_pictures(folder, names, target, x, modalities, s, classes):
    """A sheet a sample: inputs, label and prediction side by side, below them the colours' classes;
    of a multi-label task the inputs, below them each class with its score, labelled or predicted.
    """
    folder.mkdir(exist_ok=True)
    font, line, M = ImageFont.load_default(14), 20, 8               # pixels: M the margin
    inputs = [picture(x_, modality) for x_, modality in zip(x, modalities)]
    colours, target, s = palette(classes), target.cpu(), s.cpu()
    for k, name in enumerate(names):
        panels = [(TITLES.get(m, m), v[k]) for m, v in zip(modalities, inputs)]
        if target.ndim == 2:
            columns, rows = (0, 60, 140, 230), [("score", "label", "prediction", "class")]
            rows += [(f"{p:.2f}", "labelled" * bool(y), "predicted" * (p > 0.5), c)
                     for p, y, c in zip(s[k].sigmoid().tolist(), target[k], classes)]
        else:
            gt, pred = target[k].numpy(), s[k].argmax(0).numpy() + 1
            panels += [("label", colours[gt]), ("prediction", colours[pred])]
            columns, rows = (0, 20), [(tuple(colours[c].tolist()), ("unlabelled", *classes)[c])
                                      for c in np.union1d(gt, pred)]
        scale = max(1, 256 // len(panels[0][1]))
        H, W = (scale * n for n in panels[0][1].shape[:2])
        needed = columns[-1] + max(font.getlength(row[-1]) for row in rows)
        sheet = Image.new("RGB", (M + int(max(len(panels) * (W + M), needed + M)),
                                  H + line * (len(rows) + 1) + 3 * M), "white")
        draw = ImageDraw.Draw(sheet)
        for j, (title, panel) in enumerate(panels):
            draw.text((M + j * (W + M), M), title, "black", font)
            large = Image.fromarray(panel).resize((W, H), Image.Resampling.NEAREST)
            sheet.paste(large, (M + j * (W + M), M + line))
        for j, row in enumerate(rows):
            y = H + line * (j + 1) + 2 * M
            for left, cell in zip(columns, row):
                if isinstance(cell, str):
                    draw.text((M + left, y), cell, "black", font)
                else:
                    draw.rectangle((M + left, y + 2, M + left + 13, y + 15), cell, "grey")
        sheet.save(folder / f"{name.replace('/', '_')}.png")


# ---- the paper's tables, and what was run ----

def numbers(table):
    """Lines of a name and, from column 28 on, numbers ("-": none) -> {name: [number or None]}."""
    rows = [(line[:28].strip(), line[28:].split()) for line in table.splitlines()]
    return {name: [None if n == "-" else float(n) for n in row] for name, row in rows}


# Of both modalities, then of one (SAR, RGB): 1 % linear, 1 % fine-tuned, 100 % linear, fine-tuned.
TABLE_1 = numbers("""\
Rand. Init.                 58.7 58.7 70.1 70.1    50.0 50.0 54.2 54.2
Supervised                  77.0 77.0 88.9 88.9    67.5 67.5 81.9 81.9
SimCLR-cross                77.4 78.7 82.8 89.6    68.1 70.4 71.7 83.7
CLIP                        77.4 78.7 82.8 89.6    68.0 70.2 71.7 83.4
Barlow Twins                78.7 80.3 83.2 89.5    72.3 73.7 77.8 83.6
VICReg                      74.5 79.0 81.9 89.5    69.3 71.9 74.1 83.6
Barlow Twins, one modality     -    -    -    -    71.2 73.3 77.5 81.6
DeCUR                       79.4 81.7 85.4 89.7    73.7 75.4 78.3 83.7""")
TABLE_2 = numbers("""\
Rand. Init.                 14.1 14.1 23.0 23.0    14.2 14.2 18.5 18.5
Supervised                  22.1 22.1 44.0 44.0    17.5 17.5 38.8 38.8
SimCLR-cross                23.0 30.2 35.2 47.3    20.1 25.9 29.6 42.5
CLIP                        22.8 28.8 35.0 46.7    20.0 25.7 29.4 42.3
Barlow Twins                31.2 33.6 43.0 48.4    29.4 33.4 38.0 45.9
VICReg                      27.4 32.8 38.0 45.1    23.7 28.7 32.4 41.6
Barlow Twins, one modality     -    -    -    -    28.6 32.6 36.2 45.7
DeCUR                       34.9 36.9 43.9 48.7    31.4 34.5 43.9 46.5""")
DOUBTS = {                                      # where the paper contradicts itself
    ("bigearthnet", 0, "SimCLR-cross"): "repeats CLIP's row; the text's gain of 2%-4.8% over "
                                        "SimCLR cannot come from it",
    ("geonrw", 1, "DeCUR"): "43.9 is also the cell of Table 2, left; it gives 14.5 over CLIP where "
                            "the text says up to 11.4"}
# mIoU, accuracy of SUN RGB-D, then NYUv2; the rows in QUOTED the paper did not run either.
TABLE_3 = numbers("""\
FCN                         27.4 68.2    29.2 60.0
FCN (CLIP)                  30.5 74.2    30.4 63.3
FCN (DeCUR)                 34.5 75.5    31.2 63.9
SA-Gate                     49.4 82.5    52.4 77.9
SGNet                       48.6 82.0    51.1 76.8
ShapeConv                   48.6 82.2    51.3 76.4
OMNIVORE                       -    -    54.0    -
CMX-B2                      49.7 82.8       -    -
CMX-B2 (DeCUR)              50.6 83.2       -    -
CMX-B5                         -    -    56.9 80.1
CMX-B5 (DeCUR)                 -    -    57.3 80.3""")
QUOTED = ("SA-Gate", "SGNet", "ShapeConv", "OMNIVORE", "CMX-B2", "CMX-B5")
# SAR-optical mAP micro, RGB-DEM mIoU; "Barlow Twins" is there "w/o intra&decoup.".
TABLE_4 = numbers("""\
DeCUR                       81.7 36.9
Barlow Twins                80.3 33.6
w/o intra                   80.1 34.3
w/o decoup.                 81.1 35.2""")
PAPERS_COMMON = dict(bigearthnet=0.875, geonrw=0.75, sunrgbd=0.75, nyuv2=0.75)
METHODS = dict(simclr="SimCLR-cross", clip="CLIP", vicreg="VICReg", barlowtwins="Barlow Twins")


def deviations(result):
    """{setting: value} of a run, and of the pretraining behind it, where it is not the paper's for
    the task, head and method, or that of --toy; apart from labels, modality, seed and what Table 4
    and the figures vary.
    """
    result = json.loads(json.dumps(result))     # tuples as lists, as in the file
    s, model, toy = result["settings"], result["model"], result["toy"]
    recipe = RECIPES.get((result["task"], model), CMX_NYU if model == "cmx" else {})
    paper = dict(part=None, cached=False) | REST | recipe | (TOYS[model] if toy else {})
    if result["linear"] and paper["lr_linear"]:
        paper["lr"] = paper["lr_linear"]
    paper = json.loads(json.dumps(paper))
    free = ("seed", "labels", "modality", "depth_unit", "save_images", "save_every")
    found = {name: s.get(name, result.get(name)) for name in paper if name not in free}
    found = {name: value for name, value in found.items() if value != paper[name]}
    before, scenario = result["pretraining"] or {}, TASKS[result["task"]]["scenario"]
    if "method" not in before:                  # random, or from elsewhere
        return found
    paper = dict(scenario=scenario, weights=None, bgr=False, stopped=None)
    for table, _ in reversed(defaults(scenario, before["method"], before["backbone"], toy)):
        paper |= table
    free = ("backbone", "depth_unit") + ("common", "projector") * (before["method"] == "decur")
    return found | {f"pretraining {name}": before[name] for name, value in paper.items()
                    if name in before and name not in free and before[name] != value}


def row_of(result):
    """The row of the paper that a run belongs to, or None."""
    p = result["pretraining"]
    if result["weights"] == ["none"]:
        return "Rand. Init." if result["linear"] else "Supervised"
    if not p or "method" not in p:
        return None
    if p["method"] != "decur":
        return METHODS[p["method"]] + ", one modality" * bool(p.get("modality"))
    if p["projector"] != "8192-8192-8192" and not result["toy"]:
        return None
    if p["common"] == PAPERS_COMMON[result["task"]]:
        return "w/o intra" if p["no_intra"] else "DeCUR"
    return "w/o decoup." if p["common"] == 1 and not p["no_intra"] else None


def cell(results, metric, paper):
    """Mean and standard deviation over the seeds, in percent, and the paper's number."""
    values = [100 * r["metrics"][metric] for r in results if r["metrics"].get(metric) is not None]
    ours = f"{statistics.mean(values):.1f}" if values else "undefined" if results else "not run"
    ours += f" +- {statistics.stdev(values):.1f} (n {len(values)})" if len(values) > 1 else ""
    return f"{ours} | {'-' if paper is None else paper}"


def print_tables(folders):
    """Tables 1-4, Figures 3a, 3b, 6, 7 from the runs' results.json; cells: ours | the paper's."""
    files = [file for folder in folders if (file := Path(folder) / "results.json").is_file()]
    if not files:
        raise BadInput(f"no results.json in {' '.join(folders)}; expected folders of finetune.py")
    results = [json.loads(file.read_text()) for file in files]
    real = [r for r in results if not r["toy"] and not deviations(r)]
    shown = []

    def at(runs, metric, paper):
        shown.extend(runs)
        return cell(runs, metric, paper)

    def find(runs=real, **wanted):
        return [r for r in runs if all((row_of(r) if key == "row" else r[key]) == value
                                       for key, value in wanted.items())]

    def show(title, columns, rows):
        print(f"\n{title}")
        for name, cells in (("", columns), *rows):
            print(f"{name:38s}" + "".join(f"{text:26s}" for text in cells))

    setups = [dict(labels=labels, linear=linear) for labels in (0.01, 1.0)
              for linear in (True, False)]
    metrics = (("bigearthnet", "mAP micro"), ("geonrw", "mIoU"))
    columns = ("1% linear", "1% fine-tune", "100% linear", "100% fine-tune")
    for table, task, metric, modality, title in (
            (TABLE_1, *metrics[0], 0, "Table 1, left: BigEarthNet-MM, both modalities"),
            (TABLE_1, *metrics[0], 1, "Table 1, right: BigEarthNet-MM, SAR alone"),
            (TABLE_2, *metrics[1], 0, "Table 2, left: GeoNRW, both modalities"),
            (TABLE_2, *metrics[1], 1, "Table 2, right: GeoNRW, RGB alone")):
        rows, doubts = [], []
        for row, papers in table.items():
            if papers[4 * modality] is None:
                continue
            doubt = DOUBTS.get((task, modality, row))
            doubts += [f"* {row}: {doubt}"] if doubt else []
            runs = find(task=task, modality=modality, row=row)
            rows.append((row + " *" * bool(doubt), [
                at(find(runs, **setup), metric, paper)
                for setup, paper in zip(setups, papers[4 * modality:])]))
        show(f"{title}, {metric}", columns, rows)
        print(*doubts, sep="\n", end="\n" * bool(doubts))
    print("Rand. Init. is a run with --linear, Supervised one without; the paper prints one number "
          "in both columns.")
    for k, task, model in ((0, "sunrgbd", "fcn"), (0, "sunrgbd", "cmx"),
                           (1, "nyuv2", "fcn"), (1, "nyuv2", "cmx")):
        rows = []
        for name, papers in TABLE_3.items():
            papers = papers[2 * k:2 * k + 2]
            if name.startswith("FCN") != (model == "fcn") or papers[0] is None:
                continue
            row = name.partition("(")[2].rstrip(")") or "Supervised"
            runs = find(task=task, model=model, linear=False, row=row, labels=1.0,
                        modality=RECIPES[task, model]["modality"])
            rows.append((name, [
                f"quoted | {paper or '-'}" if name in QUOTED else at(runs, metric, paper)
                for metric, paper in zip(("mIoU", "accuracy"), papers)]))
        show(f"Table 3: {task}, {model}", ("mIoU", "accuracy"), rows)
    few = find(modality=0, labels=0.01)         # Sec. 6: 1 % of the labels, both modalities
    show("Table 4", ("SAR-optical, mAP micro", "RGB-DEM, mIoU"), [
        (row if row != "Barlow Twins" else "w/o intra&decoup.", [
            at(find(few, task=task, row=row, linear=False), metric, paper)
            for (task, metric), paper in zip(metrics, papers)])
        for row, papers in TABLE_4.items()])
    swept = [r for r in real if (p := r["pretraining"] or {}).get("method") == "decur"
             and not p["no_intra"]]
    for title, tasks, axis, projector in (
            ("Figure 3a: percentage of common dimensions", metrics, "common", "8192-8192-8192"),
            ("Figure 6: the same with 512 dimensions", metrics, "common", "512-512-512"),
            ("Figure 3b: projector, GeoNRW", metrics[1:], "projector", None),
            ("Figure 7: projector, BigEarthNet-MM", metrics[:1], "projector", None)):
        rows = []
        for task, metric in tasks:
            cells = {}                          # a point of the axis: its runs
            for r in find(swept, task=task, modality=0, labels=0.01):
                p = r["pretraining"]
                if projector == p["projector"] if projector else p["common"] == PAPERS_COMMON[task]:
                    cells.setdefault(str(p[axis]), []).append(r)
            rows += [(f"{task} {axis} {value}", [
                at(find(runs, linear=linear), metric, None) for linear in (True, False)])
                for value, runs in sorted(cells.items(), key=lambda point: (
                    0 if point[0] == "none" else float(point[0].split("-")[0])))]
        show(f"{title} (1% labels; the paper has a curve, no numbers)",
             ("linear", "fine-tune"), rows or [("not run", [])])
    rest = [r for r in results if r not in shown]
    if rest:
        print("\nOther runs: made-up scenes, settings, splits or weights that are not the paper's")
    groups = {}                                 # the same but for the seed
    for r in rest:
        groups.setdefault(f"{kind_of(r)}, {row_of(r) or ' '.join(r['weights'])}", []).append(r)
    for words, runs in sorted(groups.items()):
        print(f"{words}:", "  ".join(f"{metric} {cell(runs, metric, None).removesuffix(' | -')}"
                                     for metric in runs[0]["metrics"]))


def kind_of(result):
    """What was run, but for its weights and seed."""
    names = (result["task"], result["model"], "linear" if result["linear"] else "fine-tune",
             result["part"] and f"{result['part']} dimensions", "made-up scenes" * result["toy"],
             "cached" * result["settings"]["cached"])
    names += tuple(f"{name} {value}" for name, value in deviations(result).items()
                   if name not in ("part", "cached"))
    return (f"{' '.join(name for name in names if name)}, {100 * result['labels']:g}% labels, "
            f"modality {result['modality'] or 'both'}")


def line_of(result):
    """A run as one line."""
    metrics = "  ".join(f"{name} {'undefined' if value is None else f'{100 * value:.1f}'}"
                        for name, value in result["metrics"].items())
    return (f"{kind_of(result)}, seed {result['seed']}, weights "
            f"{' '.join(result['weights'])}: {metrics}  ({result['samples']} training, "
            f"{result['test_samples']} {result['test_split']} samples, {result['seconds']:.0f} s)")


# ---- command line ----

def get_args(argv=None):
    """The settings, each resolved to a value and its source.  Returns (args, {name: source})."""
    parser = argparse.ArgumentParser(
        description="Transfer of pretrained encoders (Tables 1-3). A setting that is not given is "
                    "the paper's for the task.", allow_abbrev=False)
    add = parser.add_argument
    add("--task", choices=TASKS, help="data set and head, with their settings")
    add("--table", nargs="+", metavar="DIR", help="print these runs as the paper's tables")
    add("--toy", action="store_true", help="the made-up scenes of the task, and small settings")
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="default: data/bigearthnet, rgb-dem, rgbd or nyuv2")
    add("--split", help="samples to train on; default: train")
    add("--test-split", help="samples of the metrics; default: test")
    add("--labels", type=float, help="fraction of the training samples; default: 1")
    add("--modality", choices=("both", "1", "2"),
        help="default: both; FCN on RGB-D 1, but with --toy both")
    add("--depth-unit", type=float, help="steps of a depth file a metre; default: 1000, mm")
    add("--size", type=int, help="height of the training crop in pixels")
    add("--workers", type=int, help="processes that read files; default: on CUDA 4, else 0")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=("late", "fcn", "cmx"), help="default: late (BigEarthNet), fcn")
    add("--backbone", choices=[*RESNETS, *MITS], help="default: resnet50; cmx: mit_b2 or mit_b5")
    add("--weights", nargs="+", metavar="FILE",
        help="file with both encoders, one for each, imagenet, a whole CMX, or none: random")
    add("--bgr", action="store_true", help="--weights saw BGR images: the DeCUR authors', CMX's")
    add("--part", choices=("common", "unique", "all"), help="classify this part of the embedding")
    add = parser.add_argument_group("optimisation").add_argument
    add("--linear", action="store_true", help="frozen encoders; default: fine-tuning")
    add("--cached", action="store_true", help="features once: fast, but without augmentation")
    add("--epochs", type=int, help="0: evaluate alone")
    add("--batch-size", type=int, help="the global one")
    add("--lr", type=float, help="at the start")
    add("--weight-decay", type=float)
    add("--seed", type=int, help="of everything random; default: 0")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="default: runs/TASK-MODEL-..., named by what it is")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--save-every", type=float, metavar="MINUTES", help="between checkpoints; default: 30")
    add("--save-images", type=int, metavar="N", help="pictures of the first N test samples")
    args = parser.parse_args(argv)
    if args.table:
        return args, {}
    if not args.task or not args.weights:
        raise BadInput("expected --task and --weights (a file, or none for random weights), or "
                       "--table")
    sources = {name: "command line" for name, value in vars(args).items()
               if value is not None and value is not False}
    args.modality = {None: None, "both": 0, "1": 1, "2": 2}[args.modality]
    task = TASKS[args.task]
    args.model = args.model or task["model"]
    if (args.task, args.model) not in RECIPES and not args.toy:
        models = " or ".join(model for task, model in RECIPES if task == args.task)
        raise BadInput(f"--model {args.model}: expected {models} for --task {args.task}")
    recipe = RECIPES.get((args.task, args.model), CMX_NYU if args.model == "cmx" else {})
    settings = {}                               # each overrides those before it
    for table, source in ((REST, "default"), (recipe, "paper, App. B; see RECIPES"),
                          (TOYS[args.model] if args.toy else {}, "--toy"),
                          ({} if args.epochs is None else dict(steps=None), "--epochs")):
        settings |= {name: (value, source) for name, value in table.items()}
    for name, (value, source) in settings.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
            sources[name] = source
    if args.linear and args.lr_linear and sources["lr"] != "command line":
        args.lr, sources["lr"] = args.lr_linear, sources["lr_linear"]
    sources.pop("lr_linear")
    cmx, rgbd = args.model == "cmx", task["scenario"] == "rgbd"
    least = 48 if cmx else 32 if args.backbone in MITS else 16      # CMX is evaluated at 3/4, too
    for fine, name, expected in (
            (0 < args.labels <= 1, "labels", "a fraction above 0, up to 1"),
            (not args.part or args.linear and args.model == "late", "part",
             "it with --linear and late fusion alone"),
            (not args.cached or args.linear and not cmx, "cached",
             "it with --linear, and not with CMX"),
            (not cmx or args.backbone in MITS and not args.modality, "model",
             "mit_b? and both modalities for cmx"),
            (args.size >= least and not (rgbd and args.size % 3), "size",
             f"{least} or more, on RGB-D a multiple of 3"),
            (args.batch_size > 0, "batch_size", "1 or more"), (args.lr > 0, "lr", "more than 0"),
            (args.save_every > 0, "save_every", "more than 0 minutes"),
            *((not getattr(args, name) or getattr(args, name) > 0, name, "0 or more")
              for name in ("epochs", "weight_decay", "seed", "save_images"))):
        if not fine:
            flag, value = name.replace("_", "-"), getattr(args, name)
            raise BadInput(f"--{flag}{'' if value is True else f' {value}'}: expected {expected}")
    args.data = args.data or (f"data/toy-{task['scenario']}" if args.toy else task["data"])
    if not args.out:
        file = Path(args.weights[0])
        name = file.resolve().parent.name if file.is_file() else file.name  # imagenet, none
        parts = [args.task, args.model, "linear" if args.linear else "finetune", args.part,
                 f"{100 * args.labels:g}", args.modality and f"modality{args.modality}", name,
                 "cached" * args.cached, f"seed{args.seed}"]
        args.out = Path("runs") / ("toy-" * args.toy + "-".join(str(p) for p in parts if p))
    return args, sources


def main():
    args, sources = get_args()
    if args.table:
        return print_tables(args.table)
    started = time.time()
    rank, world, device = start_processes()
    say = print if rank == 0 else lambda *_: None
    N = args.batch_size
    if N % world:
        raise BadInput(f"--batch-size {N} is not a multiple of {world} processes; try "
                       f"{max(1, N // world) * world}")
    if args.cached and world > 1:
        raise BadInput(f"--cached on {world} processes: expected one, it is fast enough")

    # ---- data ----
    if args.toy and rank == 0:
        make_toy(TASKS[args.task]["scenario"], args.data)
    agreed(False, device)                       # the others wait until the scenes are there
    classes = TASKS[args.task]["classes"]
    if args.toy:
        classes = SCENE_CLASSES[1:] if args.model == "late" else SCENE_CLASSES
    train, test = (open_task(args, split, classes) for split in (args.split, args.test_split))
    chosen = subset(len(train), args.labels, args.seed)
    if args.epochs != 0 and N > len(chosen):
        raise BadInput(f"--batch-size {N} is more than the {len(chosen)} training samples under "
                       f"{args.data}; at most {len(chosen)}")
    steps_per_epoch = max(1, len(chosen) // N)
    steps = args.steps if args.steps is not None else args.epochs * steps_per_epoch
    rows = slice(rank * N // world, (rank + 1) * N // world)  # of the global batch, this process's
    test_rows = slice(rank * len(test) // world, (rank + 1) * len(test) // world)
    draws = Draws(args.seed, N, rows)
    cuda = device.type == "cuda"
    workers = args.workers if args.workers is not None else 4 if cuda else 0
    loading = dict(num_workers=workers, worker_init_fn=leave_group, pin_memory=cuda)
    modalities = [train.modalities[args.modality - 1]] if args.modality else train.modalities

    # ---- model and optimiser ----
    torch.manual_seed(args.seed)
    channels = [x.shape[0] for x in train[0][:2]]
    net, encoders, lines = build(args, channels, len(classes))
    for E in encoders:
        E.requires_grad_(not args.linear)
    if cuda and world > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif world > 1 and not (args.linear and args.model != "cmx"):
        say(f"warning: on {world} CPU processes torch cannot synchronise batch normalisation; each "
            f"uses its {N // world} samples")
    net.to(device)
    if args.linear and args.weights == ["none"] and args.model != "cmx":  # CMX: layer norms
        seen = DataLoader(train, N, sampler=chosen[:20 * N].tolist(), drop_last=True, **loading)
        measure_statistics(net, (prepared(batch, args, train.modalities, device)[0]
                                 for batch in seen))
    model = DistributedDataParallel(net) if world > 1 else net
    trained = [p for p in net.parameters() if p.requires_grad]
    # CMX: no weight decay on biases and norms
    spared = [p for p in trained if p.ndim < 2 and args.model == "cmx"]
    groups = [dict(params=[p for p in trained if p.ndim >= 2 or args.model != "cmx"]),
              dict(params=spared, weight_decay=0.0)][:2 if spared else 1]
    optimizer = dict(sgd=partial(torch.optim.SGD, momentum=args.momentum),
                     adamw=torch.optim.AdamW)[args.optimizer](groups, args.lr,
                                                              weight_decay=args.weight_decay)

    # ---- the run's folder ----
    settings = {name: value for name, value in vars(args).items() if name not in RUN_ONLY}
    sha256, pretraining = origin(args.weights)
    settings |= dict(weights_sha256=sha256, samples=len(chosen), channels=channels,
                     classes=len(classes))
    checkpoint_file, log_file = args.out / "checkpoint.pt", args.out / "log.jsonl"
    step = go_on(checkpoint_file, settings, net, optimizer, args.resume, device)
    frozen = fingerprint(encoders) if args.linear else None
    save = partial(save_checkpoint, checkpoint_file, net, optimizer, settings=settings)
    if rank == 0:
        about = dict(argv=sys.argv, data=str(args.data), processes=world, device=str(device))
        lock = open_folder(args.out, settings | about, step)  # noqa: F841
        write_atomically(args.out / "ids.txt", lambda path: path.write_text(
            "".join(f"{train.data.ids[i]}\n" for i in sorted(chosen))))
        print(" ".join(sys.argv))
        print(f"{len(chosen)} of {len(train)} samples of {args.split} under {args.data}, "
              f"{len(test)} of {args.test_split}; {steps} steps on {processes(world)}, "
              f"{device.type}; torch {torch.__version__}")
        for name, source in sources.items():
            print(f"  {name.replace('_', '-'):14s} {str(getattr(args, name)):16s} {source}")
        print(*lines, sep="\n")
        print(f"parameters: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M, of which "
              f"{sum(p.numel() for p in trained) / 1e6:.2f} M are trained")
        if step:
            print(f"resumed from {checkpoint_file} at step {step} of {steps}")

    # ---- batches: what the model sees and its target ----

    def evaluation_mode(everything=True):
        net.train(not everything)
        for E in encoders if args.linear else ():
            E.eval()                            # frozen: the statistics of its batch norms, too

    def test_batches(data, index):
        pieces = np.array_split(index, -(-len(index) // max(1, N // world))) if len(index) else []
        yield from DataLoader(data, batch_sampler=[piece.tolist() for piece in pieces], **loading)

    def features():
        """Of the training samples, once: the image size, a list of tensors, and the targets."""
        evaluation_mode()
        found = []
        for batch in tqdm(test_batches(train, chosen), "features", disable=None, leave=False):
            x, target = prepared(batch, args, train.modalities, device)
            with torch.no_grad():
                found.append((net.features(*x), target))
        maps, targets = zip(*found)
        return x[0].shape[-2:], [torch.cat(f) for f in zip(*maps)], torch.cat(targets)

    def batches(epoch, skip):
        order = epoch_batches(len(chosen), N, args.seed, epoch)[skip:, rows]
        if args.cached:
            yield from ((lambda: ([f[index] for f in kept], targets[index])) for index in order)
            return
        train.data.epoch = epoch                # seasons of made-up satellite scenes
        # prepared once the step's draws are set
        yield from ((lambda: prepared(batch, args, train.modalities, device, draws))
                    for batch in DataLoader(train, batch_sampler=chosen[order].tolist(), **loading))

    forward = model
    if args.cached and steps:
        size, kept, targets = features()
        forward = partial(net.head, size)

    # ---- training ----
    stopped = signals_to_come()
    bar = tqdm(total=steps, initial=step, unit="step", disable=rank > 0 or None, dynamic_ncols=True)
    every = 1 if steps < 500 else 50
    saved, logged, logged_step = time.time(), time.time(), step
    while step < steps:
        epoch = step // steps_per_epoch
        for batch in batches(epoch, step % steps_per_epoch):
            if step == steps:
                break
            evaluation_mode(False)
            draws.restart(step)
            torch.manual_seed(mixed(args.seed, step, 1 + rank))     # for drop path and dropout
            x, target = batch()
            with mixed_precision(device) if args.model != "cmx" else nullcontext():  # CMX: float32
                logits = forward(*x)                                # NxC, or NxCxHxW
            loss = loss_of(logits, target, world)
            if agreed(not loss.isfinite(), device):
                sys.exit(f"the loss is {loss.item()} at step {step + 1}; what was saved before "
                         "stays; look at the data, or take a smaller --lr")
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(args.schedule, step, steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            step += 1
            bar.update()
            shown = step % every == 0 or step == steps
            if shown:
                loss = summed(loss.detach()) / world
            if rank == 0 and shown:
                now = time.time()
                log = dict(epoch=epoch + 1, step=step, loss=loss.item(),
                           lr=optimizer.param_groups[0]["lr"],
                           pairs_per_s=N * (step - logged_step) / (now - logged))
                logged, logged_step = now, step
                tqdm.write(f"epoch {epoch + 1:03d} step {step:06d}/{steps:06d}  loss {loss:.4f}  "
                           f"lr {log['lr']:.4g}  {log['pairs_per_s']:.0f} pairs/s")
                with open(log_file, "a") as file:
                    file.write(json.dumps(log) + "\n")
            stop = agreed(bool(stopped), device)
            if rank == 0 and (stop or step == steps or time.time() - saved > 60 * args.save_every):
                save(step=step)
                saved = time.time()
            if stop:
                bar.close()
                return say(f"stopped after step {step} of {steps} and saved {checkpoint_file}; to "
                           "go on, give the same command with --resume")
    bar.close()

    # ---- evaluation ----
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)   # all is saved: they may end it at once
    for buffer in net.buffers() if world > 1 else ():
        dist.broadcast(buffer, 0)               # on CPUs each process has its own statistics
    evaluation_mode()
    seen = test_rows.start

    def predict(batch):
        nonlocal seen
        x, target = prepared(batch, args, test.modalities, device)
        s = scores(net, x, args.test_scales)
        if (n := min(args.save_images - seen, len(target))) > 0:
            save_pictures(args.out / "images", test.data.ids[seen:seen + n], target[:n],
                          [x_[:n] for x_ in x], modalities, s[:n], classes)
        seen += len(target)
        return s, target

    test_index = np.arange(len(test))[test_rows]
    bar = tqdm(test_batches(test, test_index), "test", disable=rank > 0 or None, leave=False)
    metrics = evaluate(predict, bar, len(classes), test_rows, len(test), device)
    if args.linear and fingerprint(encoders) != frozen:
        sys.exit("a frozen encoder has changed, which must not happen: the results are void")
    if rank == 0:
        names = "task model toy linear part labels modality split test_split weights seed".split()
        result = {name: getattr(args, name) for name in names}
        result |= dict(samples=len(chosen), test_samples=len(test), weights_sha256=sha256,
                       pretraining=pretraining, metrics=metrics, seconds=time.time() - started,
                       steps=steps, settings=settings)
        write_atomically(args.out / "results.json",
                         lambda path: path.write_text(json.dumps(result, indent=1)))
        if args.linear:
            print("the frozen encoders have not changed by one bit")
        print(line_of(result))
        print(f"wrote results.json, ids.txt, {'checkpoint.pt, ' * bool(steps)}log.jsonl, args.json "
              f"into {args.out}")


if __name__ == "__main__":
    run(main)
