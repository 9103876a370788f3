"""Transfer: Tables 1, 2 and 3, one command a cell; defaults are the settings of Sec. 5 and App. B.

    python finetune.py --task sunrgbd --toy --model late --linear \\
                       --weights runs/toy-rgbd-decur/checkpoint.pt          made-up scenes
    torchrun --nproc_per_node=4 finetune.py --task bigearthnet --linear --labels 0.01 \\
                       --weights runs/sar-optical-decur/checkpoint.pt       Table 1, first column
    python finetune.py --task geonrw --weights none          Supervised; with --linear Rand. Init.
    python finetune.py --task custom --data1 A --data2 B --target masks \\
                       --weights runs/custom-decur/checkpoint.pt            your own labels
    python finetune.py --table runs/*                        beside the paper's numbers

Writes into --out: results.json (metrics, scores of each class, settings, sha256 of the weights),
ids.txt (the training samples), checkpoint.pt (all that --resume needs), log.jsonl, args.json.
Metrics are of the whole test split after the last step, never of the best one.
"""
import argparse
import copy
import csv
import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from data import (CLASSES19, SCENE_CLASSES, SHAPES, BadInput, OnePattern, check_mask,
                  choose_workers, expand_path, run_main, find_warnings, leave_group, make_toy, move_to, find_images,
                  need, normalise, number, open_dataset, show_progress, draw_boxes, read_factors,
                  read_json, read_lines, read_list, read_mask, reading, resize, filter_separably,
                  make_triangle_filter, to_unit_range, make_visible, write_text)
from decur import MITS, RESNETS, branch, mit, read_weights, start_as_segformer
from pretrain import (SCENARIOS, Run, check_batch, collect_settings, distribute, fill_in,
                      find_checkpoint, join, leave, list_defaults, load_checkpoint, make_loader,
                      make_run_folder, measure_statistics, mixed_precision, read_pretraining,
                      read_environment, hash_file, restore, start_from, sum_over_processes)

GEONRW = ("forest", "water", "agricultural", "residential, commercial, industrial",
          "grassland, swamp, shrubbery", "railway", "highway, squares", "airport, shipyard",
          "roads", "buildings")
NYU40 = ("wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds "
         "desk shelves curtain dresser pillow mirror floor_mat clothes ceiling books fridge tv "
         "paper towel shower_curtain box whiteboard person night_stand toilet sink lamp bathtub "
         "bag otherstructure otherfurniture otherprop").split()
# scenario: of the encoders.  model: unless --model says otherwise.
TASKS = {
    "bigearthnet": dict(scenario="sar-optical", data="data/bigearthnet", classes=tuple(CLASSES19),
                        model="late"),
    "geonrw": dict(scenario="rgb-dem", data="data/rgb-dem", classes=GEONRW, model="fcn"),
    "sunrgbd": dict(scenario="rgbd", data="data/rgbd", classes=tuple(NYU40[:37]), model="fcn"),
    "nyuv2": dict(scenario="rgbd", data="data/nyuv2", classes=tuple(NYU40), model="fcn"),
    "custom": dict(scenario="custom", data=None, classes=None, model=None),
}
# Each recipe: [(settings, their source)].  size: the height of a training crop, which covers
# `scale` of the frame's area; modality 0: both.
FCN_RGBD = [
    (dict(backbone="resnet50", modality=1, batch_size=8, steps=40000, optimizer="sgd", lr=0.01,
          weight_decay=1e-5, schedule="poly"), "paper, App. B"),
    (dict(momentum=0.9), "MMSegmentation, 40k"),  # and the power of "poly", without its least rate
    (dict(size=480), "CMX, NYUv2"),             # the height of its 480x640
    (dict(scale=(0.5, 1.0)), "here: as pretraining")]
# "the same settings of CMX": what it published, for NYUv2 alone: 500 epochs of 100 steps.
# scale None: CMX's own crops, see `cmx_boxes`; test_scales: each with its mirror image.
CMX_NYU = dict(modality=0, batch_size=8, optimizer="adamw", lr=6e-5, weight_decay=0.01,
               schedule="warm poly", size=480, scale=None, test_scales=(0.75, 1.0, 1.25))
OWN = dict(modality=0, batch_size=32, epochs=50, optimizer="adamw", lr=1e-4, weight_decay=0.01,
           schedule="poly", scale=(0.5, 1.0), test_crop=1.0, split=None, test_split=None,
           test_share=0.2, ignore=255)
RECIPES = {
    ("bigearthnet", "late"): [
        (dict(backbone="resnet50", batch_size=256, epochs=100, optimizer="sgd", lr=0.05,
              weight_decay=0.0, momentum=0.9, schedule="steps", scale=(0.8, 1.0)), "paper, App. B"),
        (dict(size=224, test_crop=224 / 256), "authors")],  # tested on the middle 224 of 256
    ("geonrw", "fcn"): [
        (dict(backbone="resnet50", batch_size=256, epochs=30, optimizer="adamw",
              lr=1e-4, weight_decay=0.01, scale=(0.2, 1.0)), "paper, App. B"),
        (dict(size=224, schedule="constant"), "authors")],
    ("sunrgbd", "fcn"): FCN_RGBD,
    ("nyuv2", "fcn"): FCN_RGBD,
    ("sunrgbd", "cmx"): [(dict(backbone="mit_b2"), "paper, Table 3"),
                         (CMX_NYU | dict(epochs=500), "as CMX, NYUv2")],
    ("nyuv2", "cmx"): [(dict(backbone="mit_b5"), "paper, Table 3"),
                       (CMX_NYU | dict(steps=50000), "CMX, NYUv2")],
    ("custom", "late"): [(OWN, "here")],
    ("custom", "fcn"): [(OWN, "here")],
}
LINEAR = {"bigearthnet": (dict(lr=0.5), "paper, App. B"), "custom": (dict(lr=1e-2), "here"),
          "toy late": (dict(lr=0.5), "--toy"), "toy fcn": (dict(lr=1e-2), "--toy")}
# --toy: every model goes with every task but bigearthnet.
TOY_SETTINGS = dict(backbone="resnet-toy", modality=0, steps=None, size=48)
TOY_RECIPES = {
    "late": TOY_SETTINGS | dict(batch_size=64, epochs=20, optimizer="sgd", lr=0.05, weight_decay=0.0,
                       momentum=0.9, schedule="steps", scale=(0.8, 1.0), test_crop=1.0),
    "fcn": TOY_SETTINGS | dict(batch_size=32, epochs=8, optimizer="adamw", lr=1e-3, weight_decay=0.01,
                      schedule="poly", scale=(0.5, 1.0)),
    "cmx": CMX_NYU | dict(backbone="mit_b0", batch_size=16, epochs=4, lr=1e-3, size=48, embed=64),
}
REST = dict(backbone="resnet50", size=224, epochs=None, steps=None, test_crop=None, part=None,
            test_scales=(1.0,), embed=512, split="train", test_split="test", cached=False)
# What the paper's tables vary, or what is not theirs.
FREE = dict(modality=0, labels=1.0, seed=0, depth_unit=1000.0, save_every=10.0, save_images=0)


# ---- the protocol ----

def train(run, net, model, args, inputs):
    """App. B, transfer.  Frozen encoders stay in evaluation mode, batch statistics included."""
    precision = nullcontext() if args.model == "cmx" else mixed_precision(run.device)
    for batch in run.batches():
        net.train()
        if args.linear:
            for E in net.encoders:
                E.eval()
        x, target = prepared(batch, args, inputs, run.device, run.draws)
        with precision:
            logits = model(*x)                  # NxC, or NxCxHxW; of CMX in float32, as published
        loss = compute_transfer_loss(logits, target, run.world)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.log(sum_over_processes(loss.detach()) / run.world)


def compute_transfer_loss(logits, target, world):
    """MultiLabelSoftMarginLoss, or CrossEntropyLoss over what all processes have labelled."""
    if target.is_floating_point():              # NxC, 0 or 1
        return F.multilabel_soft_margin_loss(logits.float(), target)
    labelled = sum_over_processes((target >= 0).sum().float()).clamp(min=1)
    total = F.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum")
    return total * world / labelled             # DistributedDataParallel will divide by `world`


@torch.no_grad()
def test(net, data, args, device, rank=0, world=1):
    """Metrics and scores of each class, of the whole split: the processes' counts are joined."""
    if world > 1 and device.type == "cpu":      # each process has statistics of its own
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    net.eval()
    n, C = len(data), len(data.classes)
    first, last = rank * n // world, (rank + 1) * n // world
    matrix = torch.zeros(C, C, dtype=torch.int64, device=device)    # row: label, column: prediction
    ranking = torch.zeros(2, n, C, device=device)  # scores and labels; 0 where another process is
    for x, target in batches_of(data, np.arange(first, last), args, device, world, "test"):
        s = scores(net, x, args.test_scales)                        # NxC, or NxCxHxW
        if target.ndim == 3 and s.shape[2:] != target.shape[1:]:
            s = F.interpolate(s, target.shape[1:], mode="bilinear")
        if data.kind == "multi-label":
            ranking[:, first:first + len(s)] = torch.stack((s, target))
        else:
            matrix += confusion(s.argmax(1), target, C, -1)
        for k in range(min(len(s), args.save_images - first)):
            save_prediction(args, data, first + k, [images[k] for images in x], target[k], s[k])
        first += len(s)
    ranking, matrix = sum_over_processes(ranking).cpu(), sum_over_processes(matrix)
    if data.kind == "multi-label":
        metrics, each = ranking_metrics(*ranking)
    else:
        metrics, each = counting_metrics(matrix, data.kind)
    return dict(metrics=metrics, classes=dict(zip(data.classes, each)))


def scores(net, x, scales):
    """Logits; or CMX's evaluation: exp(logits + the mirror image's) of each scale, added.
    CMX: frames above 480x640, those at scale 1.25, by sliding windows.  Here: whole."""
    if tuple(scales) == (1.0,):
        return net(*x).float()
    size, both = x[0].shape[-2:], []
    for scale in scales:
        scaled_size = [round(scale * n) for n in size]
        scaled = [F.interpolate(images, scaled_size, mode="bilinear") for images in x]
        mirrored = [images.flip(-1) for images in scaled]
        both.append(net(*scaled).float() + net(*mirrored).flip(-1).float())
    top = torch.stack([b.amax((1, 2, 3), keepdim=True) for b in both]).amax(0)  # Nx1x1x1
    excess = (top - 80).clamp(min=0)            # exp(89) would be infinite; the order stays
    return sum(F.interpolate((b - excess).exp(), size, mode="bilinear") for b in both)


def schedule(name, step, steps):
    """The learning rate at a step, as a fraction of its base."""
    if name == "steps":                         # "by factor 10 at 60 and 80 epochs", of 100
        if 10 * step < 6 * steps:
            return 1.0
        return 0.1 if 10 * step < 8 * steps else 0.1 ** 2
    if name == "constant":
        return 1.0
    warm = steps // 50 if name == "warm poly" else 0  # CMX: 10 of 500 epochs, linearly from 0
    return step / warm if step < warm else (1 - step / steps) ** 0.9


def make_transfer_optimizer(net, args):
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [dict(params=trained)]
    if args.model == "cmx":                     # no weight decay on biases and norms
        weights = [p for p in trained if p.ndim > 1]
        others = [p for p in trained if p.ndim < 2]
        groups = [dict(params=weights), dict(params=others, weight_decay=0.0)]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay)
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)


# ---- models ----

class LateFusion(nn.Module):
    """App. B, SAR-optical: pooled features concatenated, one linear layer.  encoders: NxCxHxW ->
    Nxd, d in `dims`; of their output `part` is taken.  Call: NxCxHxW each -> NxC logits."""

    def __init__(self, encoders, dims, num_classes, part=slice(None)):
        super().__init__()
        self.encoders, self.part = nn.ModuleList(encoders), part
        self.fc = nn.Linear(sum(dims), num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # not in the paper: the authors'
        nn.init.zeros_(self.fc.bias)

    def features(self, *images):
        return torch.cat([E(x)[:, self.part] for E, x in zip(self.encoders, images)], 1)

    def forward(self, *images):
        return self.fc(self.features(*images))


class FCN(nn.Module):
    """App. B, RGB-DEM: the last three stages of all encoders concatenated, 1x1 convolutions,
    bilinear to input size, added.  Call: NxCxHxW for each encoder -> NxCxHxW logits.
    Paper: upsampled, then convolved: 7168 channels of 224x224.  Here: convolved, then upsampled;
    both are linear and bilinear weights sum to 1: it is the same function."""

    def __init__(self, encoders, num_classes):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.score = nn.ModuleList()
        for s in (1, 2, 3):
            self.score.append(nn.Conv2d(sum(E.dims[s] for E in encoders), num_classes, 1))

    def forward(self, *images):
        stages = [E.stages(x)[1:] for E, x in zip(self.encoders, images)]
        logits = 0
        for score, *maps in zip(self.score, *stages):
            joint = score(torch.cat(maps, 1))
            logits = logits + F.interpolate(joint, images[0].shape[-2:], mode="bilinear")
        return logits


# CMX (Zhang et al., 2022) with the published parameter names: checkpoints load here and there.

class FRM(nn.Module):
    """Feature rectification, its Eq. 1-5: each stream takes from the other by two weights."""

    def __init__(self, C):
        super().__init__()
        self.channel_weights = nn.ModuleDict({"mlp": nn.Sequential(
            nn.Linear(4 * C, 4 * C), nn.ReLU(), nn.Linear(4 * C, 2 * C))})
        self.spatial_weights = nn.ModuleDict({"mlp": nn.Sequential(
            nn.Conv2d(2 * C, C, 1), nn.ReLU(), nn.Conv2d(C, 2, 1))})

    def forward(self, a, b):                    # NxCxHxW each
        ab = torch.cat((a, b), 1)                                   # Nx2CxHxW
        pooled = torch.cat((ab.mean((2, 3)), ab.amax((2, 3))), 1)   # Nx4C
        channel = self.channel_weights["mlp"](pooled).sigmoid()[..., None, None]
        spatial = self.spatial_weights["mlp"](ab).sigmoid()
        channel_a, channel_b = channel.chunk(2, 1)                  # NxCx1x1
        spatial_a, spatial_b = spatial.chunk(2, 1)                  # Nx1xHxW
        return a + (channel_b + spatial_b) / 2 * b, b + (channel_a + spatial_a) / 2 * a


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
        H, W = a.shape[-2:]
        a, b = a.flatten(2).mT, b.flatten(2).mT                     # NxHWxC
        ya, ua = F.relu(self.cross["channel_proj1"](a)).chunk(2, -1)  # NxHWxC each
        yb, ub = F.relu(self.cross["channel_proj2"](b)).chunk(2, -1)
        Ga, Gb = self.context("kv1", ua), self.context("kv2", ub)
        ta = (self.split(ua) @ Gb).transpose(1, 2).flatten(2)       # NxHWxC, the other's context
        tb = (self.split(ub) @ Ga).transpose(1, 2).flatten(2)
        a = self.cross["norm1"](a + self.cross["end_proj1"](torch.cat((ya, ta), -1)))
        b = self.cross["norm2"](b + self.cross["end_proj2"](torch.cat((yb, tb), -1)))
        m = torch.cat((a, b), -1).mT.unflatten(2, (H, W))           # Nx2CxHxW
        mix = self.channel_emb["residual"](m) + self.channel_emb["channel_embed"](m)
        return self.channel_emb["norm"](mix)                        # NxCxHxW

    def context(self, name, u):
        k, v = self.cross["cross_attn"][name](u).chunk(2, -1)
        k, v = self.split(k), self.split(v)
        return (k.mT @ v * k.shape[-1] ** -0.5).softmax(-2)  # N x heads x C/heads x C/heads

    def split(self, t):
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)    # N x heads x HW x C/heads


class CMX(nn.Module):
    """CMX with its MLP decoder, `embed` wide.  Call: NxCxHxW, NxCxHxW -> NxCxHxW logits.
    The decoder's batch norm has eps 1e-5 (the published: 1e-3 in training, 1e-5 in evaluation)."""

    def __init__(self, name, num_classes, channels=(3, 3), embed=512, dropout=0.1):
        super().__init__()
        self.encoders = tuple(mit(name, c) for c in channels)      # a tuple: registered below
        self.dropout = dropout
        dims = self.encoders[0].dims
        self.backbone = nn.Module()
        for prefix, E in zip(("", "extra_"), self.encoders):
            for part, module in E.named_children():
                self.backbone.add_module(prefix + part, module)
        self.backbone.FRMs = nn.ModuleList(FRM(C) for C in dims)
        self.backbone.FFMs = nn.ModuleList(FFM(C, heads) for C, heads in zip(dims, (1, 2, 5, 8)))
        start_as_segformer(self.backbone.FRMs)
        start_as_segformer(self.backbone.FFMs)
        self.decode_head = head = nn.ModuleDict()
        for s in (4, 3, 2, 1):
            head[f"linear_c{s}"] = nn.ModuleDict({"proj": nn.Linear(dims[s - 1], embed)})
        head["linear_fuse"] = nn.Sequential(
            nn.Conv2d(4 * embed, embed, 1), nn.BatchNorm2d(embed), nn.ReLU())
        head["linear_pred"] = nn.Conv2d(embed, num_classes, 1)
        for conv in (head["linear_fuse"][0], head["linear_pred"]):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, rgb, x):
        size, head, fused, maps = rgb.shape[-2:], self.decode_head, [], []
        E1, E2 = self.encoders
        for s in (1, 2, 3, 4):
            # the rectified maps go on to the next stage, the fused one to the decoder
            rgb, x = self.backbone.FRMs[s - 1](E1.stage(s, rgb), E2.stage(s, x))
            fused.append(self.backbone.FFMs[s - 1](rgb, x))
        for s in (4, 3, 2, 1):
            m = head[f"linear_c{s}"]["proj"](fused[s - 1].movedim(1, -1)).movedim(-1, 1)
            maps.append(F.interpolate(m, fused[0].shape[-2:], mode="bilinear"))
        m = head["linear_fuse"](torch.cat(maps, 1))
        m = head["linear_pred"](F.dropout2d(m, self.dropout, self.training))
        return F.interpolate(m, size, mode="bilinear")


# ---- metrics: of the data set, not means over batches ----

def average_precision(scores, labels):
    """mAP "micro", of all NxC decisions in one ranking: sum_n (R_n - R_{n-1}) P_n, the area under
    precision over recall; equal scores share one threshold.  None without a positive label."""
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


def ranking_metrics(scores, labels):
    """NxC each -> mAP, and the AP of each class; macro: the mean over those with a positive."""
    each = [average_precision(s, y) for s, y in zip(scores.T, labels.T)]
    defined = [value for value in each if value is not None]
    macro = statistics.fmean(defined) if defined else None
    return {"mAP micro": average_precision(scores, labels), "mAP macro": macro}, each


def confusion(pred, gt, num_classes, ignore):
    """CxC counts, row: label, column: prediction; what is labelled `ignore` is left out."""
    valid = gt != ignore
    counts = (num_classes * gt[valid] + pred[valid]).bincount(minlength=num_classes ** 2)
    return counts.view(num_classes, num_classes)


def counting_metrics(matrix, kind):
    """Confusion matrix -> metrics, and the IoU of each class or, of whole images, its accuracy.
    The mean leaves out what is neither predicted nor labelled."""
    matrix = matrix.cpu().double()              # MPS has no float64
    hit, labelled = matrix.diagonal(), matrix.sum(1)
    name, total = "mIoU", matrix.sum(0) + labelled - hit
    if kind == "single-label":
        name, total = "mean accuracy", labelled
    each = [(h / t).item() if t else None for h, t in zip(hit, total)]
    if not matrix.any():
        return {name: None, "accuracy": None}, each
    mean = (hit / total)[total > 0].mean().item()
    return {name: mean, "accuracy": (hit.sum() / matrix.sum()).item()}, each


def iou_and_accuracy(pred, gt, num_classes, ignore):
    """mIoU and pixel accuracy.  pred, gt: classes 0..num_classes-1, any shape; gt also `ignore`."""
    metrics, _ = counting_metrics(confusion(pred, gt, num_classes, ignore), "segmentation")
    return metrics["mIoU"], metrics["accuracy"]


# ---- the model of a run, and weights into it ----

def build(args, channels, num_classes, inputs):
    """The model of the settings, and a line for each of the --weights that its encoders got."""
    if args.part:
        return with_projectors(args, channels, num_classes)
    if args.model == "cmx":
        net = CMX(args.backbone, num_classes, channels, args.embed)
    else:
        encoders = [branch(args.backbone, c, ()).E for c in channels]
        if args.model == "fcn":
            net = FCN(encoders, num_classes)
        else:
            net = LateFusion(encoders, [E.dims[-1] for E in encoders], num_classes)
    if args.weights == ["none"]:
        return net, ["random weights"]
    whole = whole_cmx(args) if args.model == "cmx" else None
    if whole:
        load_exactly(net, whole, args.weights[0])
        return net, [f"{args.weights[0]}: all keys of CMX matched"]
    return net, start_from(args.weights, net.encoders, args, inputs)


def whole_cmx(args):
    """The state if --weights is a whole CMX, or None.  --bgr: it knows blue, green, red."""
    try:
        state = read_weights(args.weights[0], args.backbone)[0]
    except ValueError:                          # `start_from` says why
        return None
    for key in state:
        if args.bgr and key.endswith("patch_embed1.proj.weight"):
            state[key] = state[key].flip(1)
    return state if any(key.startswith("backbone.") for key in state) else None


def load_exactly(module, state, file):
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"--weights {file}: {' '.join(str(error).split())[:300]}") from None


def with_projectors(args, channels, num_classes):
    """--part: late fusion of a part of the embeddings, not of the encoders' features."""
    file, part, p = args.weights[0], args.part, args.pretraining
    need(p, f"--part {part}: expected --weights with a checkpoint.pt of pretrain.py")
    start, stop = {"common": (0, p["Kc"]), "unique": (p["Kc"], p["K"]), "all": (0, p["K"])}[part]
    need(start < stop, f"--part {part}: {file} has {p['Kc']} common of {p['K']} dimensions")
    branches = nn.ModuleDict()
    for m, c in zip(used(args), channels):
        branches[f"f{m + 1}"] = branch(p["backbone"], c, p["widths"])
    state = load_checkpoint(file)["model"]
    load_exactly(branches, {key: t for key, t in state.items() if key[:2] in branches}, file)
    dims = [stop - start] * len(branches)
    net = LateFusion(branches.values(), dims, num_classes, slice(start, stop))
    return net, [f"{file}: {stop - start} {part} dimensions of each modality's {p['K']}"]


# ---- samples ----

class Labelled:
    """Samples of a task: (x1, x2, target).  kind: "multi-label", C zeros and ones; "single-label",
    a class; "segmentation", HxW classes, -1: no label.  target_of: name -> target, for data sets of
    pretraining.  ids: some of the data set's, or all."""

    def __init__(self, data, classes, kind, target_of=None, ids=None):
        self.data, self.classes, self.kind, self.target_of = data, classes, kind, target_of
        self.ids, self.inputs, self.epoch = ids or data.ids, data.inputs, 0
        self.place = {name: i for i, name in enumerate(data.ids)}

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        name = self.ids[i]
        self.data.epoch = self.epoch            # seasons of made-up satellite scenes
        x1, x2, *target = self.data[self.place[name]]
        if self.target_of:
            x1, x2, target = x1[0], x2[0], [self.target_of(name)]  # the first views
        if x1.shape[-2:] != x2.shape[-2:]:      # one's own: one box will be cut out of both
            x2 = resize(to_unit_range(x2)[None], x1.shape[-2:])[0]
        if self.kind == "segmentation":
            check_mask(name, target[0], x1.shape[-2:], len(self.classes))
            return x1, x2, target[0] - 1        # 0: no label
        return x1, x2, target[0]


def open_task(args, rank):
    """The data sets of both splits, and lines about them."""
    if args.task == "custom":
        return open_own(args)
    task, name, target_of = TASKS[args.task], args.task, None
    classes, size, num_classes = task["classes"], args.size, None
    if task["scenario"] == "rgbd":
        size = math.ceil(2 * size / 3)          # its canvas is 3/2 as high
    if args.toy:
        make_toy(task["scenario"], args.data, rank=rank)
        classes, num_classes = SCENE_CLASSES, len(SCENE_CLASSES)
    if args.toy and args.model == "late":       # which objects are there; the masks are not used
        name, classes, num_classes = task["scenario"], SCENE_CLASSES[1:], None
        target_of = partial(factors_target, read_factors(args.data))
    kind = "multi-label" if args.model == "late" else "segmentation"
    both = []
    for split in (args.split, args.test_split):
        data = open_dataset(name, args.data, size, split, args.depth_unit, classes=num_classes)
        both.append(Labelled(data, classes, kind, target_of))
    return both, []


def factors_target(factors, scene):
    """12 zeros and ones."""
    need(scene in factors, f"factors.csv lacks {scene}; make the scenes again: data.py toy")
    return F.one_hot(torch.tensor(factors[scene]), len(SHAPES)).flatten().float()


def subset(n, fraction, seed):
    """--labels: a prefix of a seeded permutation of 0..n-1: smaller subsets lie in larger ones."""
    return np.random.default_rng(seed).permutation(n)[:max(1, round(fraction * n))]


def used(args):
    """Indices of the modalities that the model sees."""
    return [args.modality - 1] if args.modality else [0, 1]


def batches_of(data, indices, args, device, world, text):
    """The samples once, in their order; not augmented."""
    loader = DataLoader(Subset(data, indices.tolist()), max(1, args.batch_size // world),
                        num_workers=args.workers, worker_init_fn=leave_group,
                        pin_memory=device.type == "cuda")
    for batch in show_progress(loader, desc=text):
        yield prepared(batch, args, data.inputs, device)


@torch.no_grad()
def cached_features(net, data, indices, args, device):
    """--cached: each training sample's features, once and not augmented, as a data set."""
    net.eval()
    features, targets = [], []
    for x, target in batches_of(data, indices, args, device, 1, "features"):
        features.append(net.features(*x).cpu())
        targets.append(target.cpu())
    return TensorDataset(torch.cat(features), torch.cat(targets))


# ---- augmentation: one box for both modalities and the mask ----

def cmx_boxes(B, H, W, draws):
    """CMX's: scaled by one of six factors, then cropped to the frame's size, or padded to it."""
    u = draws(4).double()
    s = torch.tensor([0.5, 0.75, 1, 1.25, 1.5, 1.75], dtype=u.dtype)[(6 * u[:, :1]).long()]  # Bx1
    starts = []
    for n, v in ((H, u[:, 1:2]), (W, u[:, 2:3])):
        spare = (s * n).round() - n             # Bx1, in scaled pixels; below 0: padded
        starts.append(torch.where(spare >= 0, (v * (spare + 1)).floor(), (spare / 2).ceil()) / s)
    return *starts, H / s, W / s, u[:, 3:] < 0.5


def resample(x, boxes, size):
    """Each box resized to `size`, mirrored where it says so.  x: BxCxHxW float, by a triangle
    filter as in pretraining, outside 0; or BxHxW classes, the nearest pixel, outside -1."""
    top, left, h, w, mirrored = [v.float().to(x.device) for v in boxes]  # Bx1 each
    H, W = x.shape[-2:]
    if x.is_floating_point():
        Wy = make_triangle_filter(top, h, H, size[0]).nan_to_num(0)      # nan: a row outside
        Wx = make_triangle_filter(left, w, W, size[1]).nan_to_num(0)
        return filter_separably(x, Wy, torch.where(mirrored[..., None] > 0, Wx.flip(1), Wx))
    pixel = torch.arange(max(size), device=x.device) + 0.5
    line = (top + pixel[:size[0]] * h / size[0]).floor().long().clamp(-1, H)  # BxH'
    column = (left + pixel[:size[1]] * w / size[1]).floor().long().clamp(-1, W)  # BxW'
    column = torch.where(mirrored > 0, column.flip(1), column)
    framed = F.pad(x, (1, 1, 1, 1), value=-1)                       # Bx(H+2)x(W+2)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return framed[image, line[:, :, None] + 1, column[:, None] + 1]  # BxH'xW'


def prepared(batch, args, inputs, device, draws=None):
    """A batch of files -> what the model sees, [NxCxHxW], and the target.  Augmented with draws;
    without, the frame, or with test_crop its middle, as large as training's crops; masks stay."""
    *x, target = [move_to(t, device) for t in batch]
    if args.cached and draws:                   # a batch of features
        return x, target
    x = [normalise(to_unit_range(x[m]), inputs[m]) for m in used(args)]
    B, _, H, W = x[0].shape
    size = (args.size, args.size)
    if draws and args.scale:
        boxes = draw_boxes(B, H, W, args.scale, draws)
    elif draws:
        boxes, size = cmx_boxes(B, H, W, draws), (H, W)
    elif args.test_crop:
        height, width = args.test_crop * H, args.test_crop * W
        middle = ((H - height) / 2, (W - width) / 2, height, width, 0)
        boxes = [torch.full((B, 1), float(value)) for value in middle]
    else:
        return x, target
    x = [resample(images, boxes, size) for images in x]
    if target.ndim == 3 and draws:
        target = resample(target, boxes, size)
    return x, target


# ---- --task custom: one's own pairs and labels ----

def open_own(args):
    """The training and the test samples, and lines about them."""
    pairs, lines = own_pairs(args)
    if args.target.endswith(".csv"):
        files, labels = {}, read_table(args.target)
    else:
        files, labels = find_images(args.target, (".png", ".tif", ".tiff")), {}
        for name, file in show_progress(files.items(), desc="masks"):
            labels[name] = set(np.unique(read_mask(file)).tolist()) - {args.ignore, -1}
    strangers = sorted(labels.keys() - set(pairs.ids))
    need(not strangers, f"--target {args.target} names {strangers[:1]}, which has no pair; "
         f"expected names such as {pairs.ids[0]}: in a csv `name,label` with a comma, and no other "
         f"header; of masks a pattern like 'masks/*_mask.png'")
    values = sorted(set().union(*labels.values()))                  # words, or numbers in masks
    classes = [str(value) for value in values]
    need(1 < len(values) <= 256, f"--target {args.target} has {len(values)} classes {classes[:9]}; "
         f"expected 2 to 256 (in masks {args.ignore} is no label, or another --ignore)")
    if args.classes:
        classes = read_lines(args.classes)
        values = list(range(len(classes)))
        need(len(set(classes)) == len(classes), f"{args.classes}: a name twice; expected each once")
        strange = [name for name, own in labels.items() if not own <= set(values)]
        need(not strange, f"--target {args.target}: masks have other values than 0 to "
             f"{values[-1]}, those of --classes, and --ignore {args.ignore}: {strange[:4]}")
    kind, target_of = "segmentation", partial(mask_target, files, values)
    if not files:
        kind, targets = "multi-label", {}
        for name, own in labels.items():
            targets[name] = torch.tensor([float(value in own) for value in values])
        if all(len(own) == 1 for own in labels.values()):
            kind = "single-label"
            targets = {name: target.argmax() for name, target in targets.items()}
        target_of = targets.get
        unlabelled = [name for name, own in labels.items() if not own]
        if unlabelled:
            lines.append(f"warning: {len(unlabelled)} names of --target have no label, such as "
                         f"{unlabelled[0]}, so that the task is multi-label; remove their lines?")
    splits = split_of(args, [name for name in pairs.ids if name in labels])
    lines.append(f"{len(labels)} of {len(pairs)} pairs have labels: {kind}, {len(values)} classes")
    learned, tested = [set().union(*map(labels.get, ids)) for ids in splits]
    for value in sorted(tested - learned):
        lines.append(f"warning: no training sample has the class {classes[values.index(value)]}; "
                     f"it is scored all the same")
    return [Labelled(pairs, classes, kind, target_of, ids) for ids in splits], lines


def read_table(file):
    """name,label[,label...] a line -> {name: its labels}."""
    labels = {}
    with reading(file, "a csv"):
        for line in csv.reader(read_lines(file), strict=True):
            name, *own = [cell.strip() for cell in line]
            need(name not in labels, f"{file} has {name} twice; expected a line for each name")
            labels[name] = {label for label in own if label}
    labels.pop("name", None)                    # a header
    return labels


def own_pairs(args):
    """The pairs, and lines about them: images of 8 bits are normalised as the weights know them."""
    folders, p = [args.data1, args.data2], args.pretraining
    if p.get("scenario") == "custom":
        return open_dataset("custom", folders, args.size, inputs=p["inputs"]), []
    pairs, lines = open_dataset("custom", folders, args.size), []
    for m, row, seen in zip((0, 1), pairs.inputs, p.get("inputs", [])):
        source = "by their own mean and standard deviation"
        if row["dtype"] == "uint8" and len(row["bands"]) == len(seen["bands"]):
            row.update(mean=seen["mean"], std=seen["std"])
            source = f"as {p['modalities'][m]} of {p['scenario']}"
        lines.append(f"images of modality {m + 1} are normalised {source}")
    return pairs, lines


def mask_target(files, values, name):
    """The mask of a name: k + 1 where it has the k-th of the values, otherwise 0."""
    mask = torch.from_numpy(read_mask(files[name]))
    target = torch.zeros_like(mask)
    for k, value in enumerate(values):
        target[mask == value] = k + 1
    return target


def split_of(args, ids):
    """Names to train on and to test, by two lists, or a seeded share to test."""
    if args.split:
        names = dict.fromkeys(ids)
        splits = [read_list(Path(file), names) for file in (args.split, args.test_split)]
        shared = sorted(set(splits[0]) & set(splits[1]))
        need(not shared, f"{len(shared)} names are in both of {args.split} and {args.test_split} "
             f"(the first: {shared[:1]}); expected other samples to test on")
        return splits
    order = np.random.default_rng((args.seed, len(ids))).permutation(len(ids))
    n = round(args.test_share * len(ids))
    need(0 < n < len(ids), f"--test-share {args.test_share} of {len(ids)} samples is {n}; expected "
         f"some to train on and some to test: another share, or more labels")
    names = np.array(ids, object)
    return names[np.sort(order[n:])].tolist(), names[np.sort(order[:n])].tolist()


# ---- pictures ----

def save_prediction(args, data, i, x, target, s):
    """Inputs, label and prediction side by side; below, in their colours, the classes in them."""
    names = ["no label", *data.classes]
    colours = np.random.default_rng(0).integers(50, 256, (len(names), 3), np.uint8)
    colours[0] = 0
    labels = [target.cpu().numpy() + 1, s.argmax(0).cpu().numpy() + 1]  # HxW each
    panels = []
    for image, m in zip(x, used(args)):
        image = resize(image[None].float(), target.shape)[0]
        panels.append(np.uint8(255 * make_visible(image, data.inputs[m])))
    panels += [colours[label] for label in labels]
    wide = Image.fromarray(np.concatenate(panels, 1))
    wide = ImageOps.scale(wide, max(1, 256 // wide.height), Image.Resampling.NEAREST)
    words = [(f"{data.ids[i]}: {len(x)} inputs, label, prediction", (90, 90, 90))]
    words += [(names[k], tuple(colours[k].tolist())) for k in np.unique(labels)]
    sheet = ImageOps.expand(wide, (0, 0, 0, 20 * len(words)), (90, 90, 90))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for j, (text, colour) in enumerate(words):
        top = wide.height + 20 * j
        draw.rectangle((4, top + 4, 16, top + 16), colour)
        draw.text((22, top + 1), text, (255, 255, 255), font)
    (args.out / "images").mkdir(exist_ok=True)
    sheet.save(args.out / "images" / f"{data.ids[i].replace('/', '_')}.png")


# ---- a run ----

def main(argv=None):
    args, sources, changed = get_args(argv)
    if args.table:
        return print_tables(args.table)
    started = time.time()
    rank, world, device = process = read_environment()
    checkpoint = find_checkpoint(args.out, args.resume)             # or None
    step = checkpoint["step"] if checkpoint else 0
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in CMX and evaluation

    # ---- data ----
    (data, test_data), lines = open_task(args, rank)
    chosen = subset(len(data), args.labels, args.seed)
    if args.epochs != 0:
        check_batch(args.batch_size, len(chosen), world)
    if args.steps is None:
        args.steps = args.epochs * max(1, len(chosen) // args.batch_size)

    # ---- model; the loader's workers start before any process talks to another ----
    torch.manual_seed(args.seed)
    channels = [data[0][m].shape[0] for m in used(args)]
    inputs = [data.inputs[m] for m in used(args)]
    net, more = build(args, channels, len(data.classes), inputs)
    net.to(device)
    frozen = freeze(net, data, chosen, args, device) if args.linear else []
    trained, seen, indices = net, data, chosen
    if args.cached:                             # the same loop, of the linear layer, on features
        trained, indices = net.fc, np.arange(len(chosen))
        seen = cached_features(net, data, chosen, args, device)
    loader = make_loader(args, seen, indices, step, args.steps, process)
    join(args.out, step, process)
    model = distribute(trained, world, device)
    optimizer = make_transfer_optimizer(net, args)
    hashes = [hash_file(file) for file in args.weights if Path(file).is_file()]
    settings = collect_settings(
        args, weights_sha256=hashes, samples=len(chosen), test_samples=len(test_data),
        num_classes=len(data.classes))
    if checkpoint:
        restore(checkpoint, args.out, net, optimizer, settings)

    # ---- run ----
    if rank == 0:
        make_run_folder(args, settings, process)
    run = Run(args, settings, net, optimizer, loader, step, args.steps,
              len(indices) // args.batch_size, partial(schedule, args.schedule), process)
    lines += [*more, f"{len(chosen)} of {len(data)} training samples"]
    if args.pretraining.get("stopped"):
        lines.append(f"warning: the pretraining was stopped {args.pretraining['stopped']}")
    run.introduce(sources, lines, find_warnings(data.data))
    train(run, net, model, args, data.inputs)
    if not run.stopped:
        result = test(net, test_data, args, device, rank, world)
        for state, E in zip(frozen, net.encoders):
            if not all(torch.equal(t, state[name]) for name, t in E.state_dict().items()):
                sys.exit("a frozen encoder has changed, which must not be: the results are void")
        result.update(changed=not_the_papers(args, changed), seconds=time.time() - started)
        finish(run, args, result, sorted(data.ids[i] for i in chosen))
    leave()
    return 128 + run.stopped if run.stopped else 0  # the exit code of a signal


def freeze(net, data, chosen, args, device):
    """Encoders without gradients; random ones get batch statistics.  Returns copies of states."""
    for E in net.encoders:
        E.requires_grad_(False)
    if args.weights == ["none"] and args.model != "cmx":            # CMX: layer norms
        n = args.batch_size * min(20, len(chosen) // args.batch_size)
        batches = batches_of(data, chosen[:n], args, device, 1, "statistics")
        measure_statistics(net, (x for x, _ in batches))
    return [copy.deepcopy(E.state_dict()) for E in net.encoders]


def finish(run, args, result, ids):
    """results.json and ids.txt, and what they say on the screen."""
    result.update(run.settings, toy=args.toy, pretraining=args.pretraining)
    result["row"] = row_of(args, result["weights_sha256"])
    if run.rank == 0:
        write_text(args.out / "ids.txt", "".join(f"{name}\n" for name in ids))
        write_text(args.out / "results.json", json.dumps(result, indent=1, default=str))
    for name, value in result["classes"].items():
        run.print(f"  {name:40s} {percent(value)}")
    if args.linear:
        run.print("the frozen encoders have not changed by one bit")
    words = [f"{name} {percent(value)}" for name, value in result["metrics"].items()]
    run.print("  ".join(words), f"wrote {args.out}/results.json")


# ---- the paper's tables, and what was run ----

def numbers(table):
    """Lines of a name and, from column 28 on, numbers ("-": none) -> {name: [number or None]}."""
    lines = {}
    for line in table.splitlines():
        lines[line[:28].strip()] = [None if n == "-" else float(n) for n in line[28:].split()]
    return lines


# Of both modalities, then of one (SAR, RGB): 1 % linear, 1 % fine-tuned, 100 % linear, fine-tuned.
# Rand. Init. is a run with --linear, Supervised one without; the paper has one number for both.
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
# The paper contradicts itself: SimCLR-cross repeats CLIP's row in Table 1, left, where the text has
# a gain of 2 to 4.8 over SimCLR; in Table 2, right, DeCUR's 43.9 is that of the left, and 14.5 over
# CLIP, where the text has "up to 11.4".
# mIoU, accuracy of SUN RGB-D, then NYUv2; the paper quotes four that it did not run, and does not
# say how FCN's first row began: taken as random.
TABLE_3 = numbers("""\
fcn, Supervised             27.4 68.2    29.2 60.0
fcn, CLIP                   30.5 74.2    30.4 63.3
fcn, DeCUR                  34.5 75.5    31.2 63.9
SA-Gate, quoted             49.4 82.5    52.4 77.9
SGNet, quoted               48.6 82.0    51.1 76.8
ShapeConv, quoted           48.6 82.2    51.3 76.4
OMNIVORE, quoted               -    -    54.0    -
cmx, ImageNet               49.7 82.8    56.9 80.1
cmx, DeCUR                  50.6 83.2    57.3 80.3""")
# SAR-optical mAP micro, RGB-DEM mIoU; "Barlow Twins" is there "w/o intra&decoup.".
TABLE_4 = numbers("""\
DeCUR                       81.7 36.9
Barlow Twins                80.3 33.6
w/o intra                   80.1 34.3
w/o decoup.                 81.1 35.2""")
SETUPS = {"1% linear": dict(labels=0.01, linear=True),
          "1% fine-tune": dict(labels=0.01, linear=False),
          "100% linear": dict(labels=1.0, linear=True),
          "100% fine-tune": dict(labels=1.0, linear=False)}
METHODS = dict(simclr="SimCLR-cross", clip="CLIP", vicreg="VICReg", barlowtwins="Barlow Twins")


def row_of(args, hashes):
    """The row of the paper's tables that a run belongs to, or None."""
    row, p, scenario = None, args.pretraining, TASKS[args.task]["scenario"]
    if args.weights == ["none"]:
        row = "Rand. Init." if args.linear else "Supervised"
    elif not p and hashes[1:] == hashes[:1]:
        row = "ImageNet"                        # one published file for both streams: as CMX starts
    elif p and p["method"] != "decur":
        row = METHODS[p["method"]] + (", one modality" if p.get("modality") else "")
    elif p:
        common = SCENARIOS[scenario]["common"]
        names = {(common, False): "DeCUR", (common, True): "w/o intra", (1, False): "w/o decoup."}
        row = names.get((p["common"], p["no_intra"]))
    return f"{args.model}, {row}" if row and scenario == "rgbd" else row  # Table 3 has two heads


def not_the_papers(args, changed):
    """{setting: value} of the run, and the pretraining behind it, where the paper has another."""
    p, scenario = args.pretraining, TASKS[args.task]["scenario"]
    if not p or args.task == "custom":
        return changed
    paper = dict(scenario=scenario, bgr=False, stopped=None, backbone=args.backbone)
    if p["backbone"] not in MITS:
        paper["weights"] = None                 # segformers may start as CMX's do
    if p["common"] == 1:
        paper["common"] = 1                     # Table 4, w/o decoup.
    tables = list_defaults(scenario, p["method"], p["backbone"], args.toy)
    _, different = fill_in(argparse.Namespace(**p), [(paper, "paper"), *tables])
    behind = {f"pretraining {name}": v for name, v in different.items() if name not in FREE}
    return changed | behind


def print_tables(folders):
    """Tables 1-4 from the runs' results.json, then the other runs; cells: ours | the paper's."""
    results = []
    for folder in folders:
        if (Path(folder) / "results.json").is_file():
            try:
                results.append(read_results(Path(folder) / "results.json"))
            except BadInput as error:           # the others are shown all the same
                print(f"left out: {error}")
    need(results, f"--table {' '.join(folders)}: expected folders with a results.json")
    papers = [r for r in results if not r["toy"] and not r["changed"]]
    for title, table, task, metric in (("Table 1", TABLE_1, "bigearthnet", "mAP micro"),
                                       ("Table 2", TABLE_2, "geonrw", "mIoU")):
        for modality, words in enumerate(("both modalities", "SAR or RGB alone")):
            columns = [(head, metric, dict(setup, task=task, modality=modality))
                       for head, setup in SETUPS.items()]
            print_table(papers, f"{title}, {task}, {metric}, {words}", table, 4 * modality, columns)
    columns = []
    for task in ("sunrgbd", "nyuv2"):
        settings = dict(task=task, labels=1.0, linear=False)
        columns += [(f"{task}, {metric}", metric, settings) for metric in ("mIoU", "accuracy")]
    print_table(papers, "Table 3 (CMX: B2, then B5)", TABLE_3, 0, columns)
    settings = dict(modality=0, labels=0.01, linear=False)
    columns = [("SAR-optical, mAP micro", "mAP micro", dict(settings, task="bigearthnet")),
               ("RGB-DEM, mIoU", "mIoU", dict(settings, task="geonrw"))]
    print_table(papers, 'Table 4 ("Barlow Twins": w/o intra&decoup.)', TABLE_4, 0, columns)
    print("\nOther runs: made-up scenes; settings, splits, weights not the tables'; Fig. 3, 6, 7")
    groups = {}                                 # the same but for the seed
    for r in results:
        if "shown" not in r:
            settings = {name: r[name] for name in ("toy", "linear", "labels", "modality")}
            method = (r["pretraining"] or {}).get("method")
            words = [r["task"], r["model"], r["row"] or method or " ".join(r["weights"])]
            if words[2].startswith(words[1]):
                del words[1]                    # Table 3's rows name the model
            words += [f"{name} {value}" for name, value in (settings | r["changed"]).items()]
            groups.setdefault(", ".join(words), []).append(r)
    for words, runs in sorted(groups.items()):
        cells = [f"{metric} {cell(runs, metric)}" for metric in runs[0]["metrics"]]
        print(f"{words}:  {'  '.join(cells)}")


def read_results(file):
    result = read_json(file, "results of finetune.py")
    kinds = dict(task=str, model=str, toy=bool, linear=bool, changed=dict, metrics=dict,
                 weights=list)
    odd = [name for name, kind in kinds.items() if not isinstance(result.get(name), kind)]
    need(not odd, f"{file} is damaged or older ({' '.join(odd)}); run its command again")
    return result


def print_table(papers, title, table, first, columns):
    """columns: (head, metric, settings of a run), whose numbers stand in `table` from `first`."""
    print(f"\n{title}\n{'':30s}" + "".join(f"{head:26s}" for head, _, _ in columns))
    for row, values in table.items():
        line = f"{row:30s}"
        for (_, metric, settings), value in zip(columns, values[first:]):
            runs = [r for r in papers if dict(settings, row=row).items() <= r.items()]
            text = f"{cell(runs, metric)} | {value or '-'}"
            line += f"{text:26s}"
        print(line)


def cell(results, metric):
    """Mean and standard deviation over the seeds, in percent."""
    for r in results:
        r["shown"] = True
    values = [r["metrics"][metric] for r in results if r["metrics"].get(metric) is not None]
    if not values:
        return "undefined" if results else "not run"
    text = percent(statistics.mean(values))
    if len(values) > 1:
        text += f" +- {percent(statistics.stdev(values))} (n {len(values)})"
    return text


def percent(value):
    return "undefined" if value is None else f"{100 * value:.1f}"


# ---- command line ----

def get_args(argv=None):
    """The settings; {name: source}; {name: value} of what was given otherwise than the default."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Transfer (Tables 1-3). A "
                                     "setting that is not given is the paper's for the task.")
    add = parser.add_argument
    add("--task", choices=TASKS, help="data set and head, with their settings")
    add("--table", nargs="+", metavar="DIR", help="print these runs as the paper's tables")
    add("--toy", action="store_true", help="the made-up scenes of the task, and small settings")
    add("--data", type=expand_path, help="folder; default: data/bigearthnet, rgb-dem, rgbd or nyuv2")
    add("--split", type=expand_path, help="to train on; default: train; custom: a file of names")
    add("--test-split", type=expand_path, help="to test on; default: test; custom: a file of names")
    add("--labels", type=number(float, 1e-9, 1), help="share of the training samples; default: 1")
    add("--modality", type=int, choices=(0, 1, 2), help="0: both; default: 0, FCN on RGB-D 1")
    add("--depth-unit", type=number(float, 1e-3, 1e9), help="depth steps a metre; default: 1000")
    add("--size", type=number(int, 16, 4096), help="height of the training crop in pixels")
    add("--workers", type=number(int, 0), default=choose_workers(),
        help="that read files; default: on CUDA up to 8, else 0")
    add("--model", choices=("late", "fcn", "cmx"), help="default: late (BigEarthNet, csv), fcn")
    add("--backbone", choices=[*RESNETS, *MITS], help="default: resnet50; cmx: mit_b2 or mit_b5")
    add("--weights", type=expand_path, nargs="+", metavar="FILE",
        help="file with both encoders, one for each, imagenet, a whole CMX, or none: random")
    add("--bgr", action="store_true", help="--weights saw BGR images: the DeCUR authors', CMX's")
    add("--part", choices=("common", "unique", "all"), help="classify this part of the embedding")
    add("--linear", action="store_true", help="frozen encoders; default: fine-tuning")
    add("--cached", action="store_true", default=None, help="features once: not augmented, fast")
    add("--epochs", type=number(int, 0), help="0: evaluate alone")
    add("--batch-size", type=number(int, 1), help="the global one")
    add("--lr", type=number(float, 1e-12, 1e6), help="at the start")
    add("--weight-decay", type=number(float, 0, 1))
    add("--seed", type=number(int, 0, 2 ** 63 - 1), help="of everything random; default: 0")
    add("--out", type=expand_path, help="default: runs/TASK-MODEL-..., named by what it is")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--save-every", type=number(float, 1e-6), metavar="MINUTES", help="default: 10")
    add("--save-images", type=number(int, 0), metavar="N", help="pictures of N test samples")
    add = parser.add_argument_group("--task custom").add_argument
    files = dict(metavar="FILES", type=expand_path, nargs="+", action=OnePattern)
    add("--data1", **files, help="images of modality 1: a folder, or a pattern in quotes")
    add("--data2", **files, help="images of modality 2")
    add("--target", **files, help="masks, as folder or pattern; or a csv: name,label,...")
    add("--classes", type=expand_path, metavar="FILE", help="names of masks' 0, 1, ..., one a line")
    add("--ignore", type=number(int, 0), help="value in masks that is no label; default: 255")
    add("--test-share", type=number(float, 0, 1), help="of samples, without lists; default: 0.2")
    args = parser.parse_args(argv)
    sources, changed = ({}, {}) if args.table else settle(args)
    return args, sources, changed


def settle(args):
    """Every setting that was not given.  Returns what `fill_in` does."""
    need(args.task and args.weights, "expected --task and --weights (a file, or none), or --table")
    task, model, tables = TASKS[args.task], TASKS[args.task]["model"], []
    where = f"data/toy-{task['scenario']}" if args.toy else task["data"]
    if args.task == "custom":
        need(args.data1 and args.data2 and args.target and not args.data and not args.toy,
             "--task custom: expected --data1, --data2 and --target, no --data and no --toy")
        where = [args.data1, args.data2]
        model = "late" if args.target.endswith(".csv") else "fcn"
    args.data = args.data or where
    args.model = args.model or model
    args.pretraining, _ = read_pretraining(args.weights[0])
    if args.epochs is not None:
        tables.append((dict(steps=None), "--epochs"))
    if args.linear:
        tables.append(LINEAR.get(f"toy {args.model}" if args.toy else args.task, ({}, "")))
    if args.toy:
        tables.append((TOY_RECIPES[args.model], "--toy"))
    if args.task == "custom" and args.pretraining:
        about = {name: args.pretraining[name] for name in ("backbone", "size")}
        tables.append((about, "--weights"))
    tables += RECIPES.get((args.task, args.model), [])
    sources, changed = fill_in(args, [*tables, (REST, "default")])
    free_sources, _ = fill_in(args, [(FREE, "default")])
    check_transfer_flags(args, model)
    args.out = Path(args.out or f"runs/{name_of(args)}")
    return free_sources | sources, changed


def name_of(args):
    """The name of --out: what is run."""
    weights = Path(args.weights[0])             # or none, imagenet
    weights = weights.resolve().parent if weights.is_file() else weights
    protocol = "linear" if args.linear else "finetune"
    modality = f"modality{args.modality}" if args.modality else None
    words = [args.toy and "toy", args.task, args.model, protocol, args.part,
             f"{100 * args.labels:g}", modality, weights.name, args.cached and "cached",
             f"seed{args.seed}"]
    return "-".join(word for word in words if word)


def check_transfer_flags(args, model):
    """What no single flag can tell.  model: of the task."""
    custom, cmx, late = args.task == "custom", args.model == "cmx", args.model == "late"
    fits = args.model == model or (args.task, args.model) in RECIPES and not custom
    fits = fits or args.toy and args.task != "bigearthnet"
    need(fits, f"--model {args.model}: expected another for --task {args.task}, as {model}")
    need(custom or not (args.data1 or args.data2 or args.target or args.classes),
         "--data1, --data2, --target, --classes: expected them with --task custom")
    need(not late or not (args.classes or args.save_images),
         "--classes, --save-images: expected them with segmentation alone")
    need(not (args.part or args.cached) or args.linear and late,
         "--part, --cached: expected them with --linear and late fusion alone")
    need(not cmx or args.backbone in MITS and not args.modality,
         "--model cmx: expected a mit as --backbone, and both modalities")
    need(not custom or bool(args.split) == bool(args.test_split),
         "--split, --test-split: expected two files of names, or neither, for a --test-share")
    need(args.size >= 48 or args.backbone not in MITS,              # CMX is tested at 3/4, too
         f"--size {args.size}: expected 48 or more for {args.backbone}")


if __name__ == "__main__":
    run_main(main)
