"""Transfer: Tables 1, 2 and 3, one command a cell, with the settings of Sec. 5 and App. B as defaults.

    python finetune.py --task sunrgbd --toy --model late --linear --weights runs/toy-rgbd-decur/checkpoint.pt
    torchrun --nproc_per_node=4 finetune.py --task bigearthnet --linear --labels 0.01 --weights runs/sar-optical-decur/checkpoint.pt
    python finetune.py --task geonrw --weights none                         Supervised; with --linear Rand. Init.
    python finetune.py --table runs/*                                       what was run, beside the paper's numbers

Writes into --out: results.json (task, split, weights and their sha256, settings, metric, seed, time), ids.txt (the
training samples), checkpoint.pt (all that --resume needs), log.jsonl, args.json.  Metrics are of the whole test split
after the last step, never of the best one.
"""
import argparse
import hashlib
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CLASSES19, SCENE_CLASSES, SHAPES, BadInput, Draws, epoch_batches, make_toy, mixed, normalise, open_pairs,
                  picture, random_boxes, read_label, separable, triangle_filter, unit)
from decur import MITS, RESNETS, MiT, branch, mit, read_weights, resnet, start_as_segformer
from pretrain import (agreed, go_on, ignore_interrupt, load_checkpoint, open_folder, run, save_checkpoint,
                      signals_to_come, start_from, start_processes, write_atomically)

GEONRW = ("forest", "water", "agricultural", "residential, commercial, industrial", "grassland, swamp, shrubbery", "railway",
          "highway, squares", "airport, shipyard", "roads", "buildings")
NYU40 = ("wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser "
         "pillow mirror floor_mat clothes ceiling books fridge tv paper towel shower_curtain box whiteboard person "
         "night_stand toilet sink lamp bathtub bag otherstructure otherfurniture otherprop").split()
TASKS = {                                       # scenario of the encoders, folder, classes, the model unless --model says other
    "bigearthnet": dict(scenario="sar-optical", data="data/bigearthnet", classes=tuple(CLASSES19), model="late"),
    "geonrw": dict(scenario="rgb-dem", data="data/rgb-dem", classes=GEONRW, model="fcn"),
    "sunrgbd": dict(scenario="rgbd", data="data/rgbd", classes=tuple(NYU40[:37]), model="fcn"),
    "nyuv2": dict(scenario="rgbd", data="data/nyuv2", classes=tuple(NYU40), model="fcn"),
}
# App. B, Transfer learning.  size: the training crop's height; lr_linear: with --linear.  What the paper does not say:
FCN_RGBD = dict(
    backbone="resnet50", modality=1, batch_size=8, steps=40000, optimizer="sgd", lr=0.01, weight_decay=1e-5,
    momentum=0.9, schedule="poly",              # MMSegmentation's schedule of 40k, which has this optimiser, rate and length
    size=480, scale=(0.5, 1.0))                 # all frames come to 480x640, as in CMX; scale as in pretraining
CMX_NYU = dict(                                 # "the same settings of CMX": its published configuration for NYUv2
    backbone="mit_b2", modality=0, batch_size=8, steps=50000, optimizer="adamw", lr=6e-5, weight_decay=0.01,
    schedule="warm poly", size=480, scale=None,  # 500 epochs of 100 steps; scale None: CMX's own crops, see `cmx_boxes`
    test_scales=(0.75, 1.0, 1.25))              # each with its mirror image
RECIPES = {
    ("bigearthnet", "late"): dict(
        backbone="resnet50", modality=0, batch_size=256, epochs=100, optimizer="sgd", lr=0.05, lr_linear=0.5,
        weight_decay=0.0, momentum=0.9, schedule="steps", size=224, scale=(0.8, 1.0),
        test_crop=224 / 256),                   # the authors': the middle 224 of 256
    ("geonrw", "fcn"): dict(
        backbone="resnet50", modality=0, batch_size=256, epochs=30, optimizer="adamw", lr=1e-4, weight_decay=0.01,
        schedule="constant", size=224, scale=(0.2, 1.0)),  # the authors' schedule, too, changes nothing in 30 epochs
    ("sunrgbd", "fcn"): FCN_RGBD, ("nyuv2", "fcn"): FCN_RGBD,
    ("sunrgbd", "cmx"): CMX_NYU | dict(steps=None, epochs=500),  # no configuration was published: that of NYUv2
    ("nyuv2", "cmx"): CMX_NYU | dict(backbone="mit_b5"),  # Table 3 has B2 on SUN RGB-D, B5 on NYUv2
}
# --toy: every model goes with every task.  A probe's rate is that of small encoders; all else stays.
TOYS = {
    "late": dict(backbone="resnet-toy", modality=0, batch_size=64, epochs=20, steps=None, optimizer="sgd", lr=0.05,
                 lr_linear=0.5, weight_decay=0.0, momentum=0.9, schedule="steps", size=48, scale=(0.8, 1.0), test_crop=1.0),
    "fcn": dict(backbone="resnet-toy", modality=0, batch_size=32, epochs=8, steps=None, optimizer="adamw", lr=1e-3,
                lr_linear=1e-2, weight_decay=0.01, schedule="poly", size=48, scale=(0.5, 1.0)),
    "cmx": dict(backbone="mit_b0", batch_size=16, epochs=4, steps=None, lr=1e-3, size=48, embed=64),
}
REST = dict(labels=1.0, epochs=None, steps=None, lr_linear=None, momentum=0.9, test_crop=None, test_scales=(1.0,), embed=512,
            split="train", test_split="test", depth_unit=1000.0)
RUN_ONLY = ("data", "out", "resume", "save_every", "workers", "toy", "save_images", "table", "cached")


# ---- metrics: of the data set, not means over batches ----

def average_precision(scores, labels):
    """mAP "micro", the global average: all N x C decisions are one ranking.

    scores   NxC (or N)   any real numbers        labels   NxC (or N)   0 or 1

    The area under the precision-recall steps, sum_n (R_n - R_{n-1}) P_n; equal scores share one threshold.
    Returns a float, or None where there is no positive label: it is undefined.
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
    """The mean of each class's average precision, over the classes with a positive label; None without any."""
    each = [average_precision(s, l) for s, l in zip(scores.T, labels.T)]
    return mean([a for a in each if a is not None])


def confusion(pred, gt, num_classes, ignore):
    """CxC counts, row: label, column: prediction; pixels labelled `ignore` are left out."""
    valid = gt != ignore
    return (num_classes * gt[valid] + pred[valid]).bincount(minlength=num_classes ** 2).view(num_classes, num_classes)


def iou_and_accuracy(pred, gt, num_classes, ignore):
    """mIoU and pixel accuracy.  pred, gt: integers of one shape, classes 0..num_classes-1, in gt also `ignore`.

    A class that is neither predicted nor labelled has no IoU and takes no part in the mean.  Without a labelled pixel
    both are None: undefined.
    """
    return scores_of(confusion(pred, gt, num_classes, ignore))


def scores_of(matrix):
    matrix = matrix.double()
    hit, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    if not matrix.any():
        return None, None
    return (hit / union)[union > 0].mean().item(), (hit.sum() / matrix.sum()).item()


def mean(values):
    return sum(values) / len(values) if values else None


# ---- models: `features` of the encoders, then `head`, so that a probe can keep the features ----

class LateFusion(nn.Module):
    """App. B, SAR-optical: pooled features concatenated, one linear layer.  Call: NxCxHxW for each encoder -> NxC logits.

    encoders: modules NxCxHxW -> Nxd, d in `dims`.
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
    """App. B, RGB-DEM.  The last three stages of all encoders concatenated, 1x1 convolutions, bilinear to input size, added.

    Paper: the maps are upsampled, then convolved; with two ResNet-50 that is 7168 channels of 224x224, 1.4 GB an image.
    Here: convolved, then upsampled.  Both are linear, one across channels and one across pixels, and bilinear weights sum
    to 1, so that also the bias stays: it is the same function.  Call: NxCxHxW for each encoder -> NxCxHxW logits.
    """

    def __init__(self, encoders, num_classes):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.score = nn.ModuleList(nn.Conv2d(sum(E.dims[s] for E in encoders), num_classes, 1) for s in (1, 2, 3))

    def features(self, *x):
        maps = [E.stages(x_)[1:] for E, x_ in zip(self.encoders, x)]
        return [torch.cat(stage, 1) for stage in zip(*maps)]

    def head(self, size, *maps):
        return sum(F.interpolate(score(m), size, mode="bilinear") for score, m in zip(self.score, maps))

    def forward(self, *x):
        return self.head(x[0].shape[-2:], *self.features(*x))


# CMX (Zhang et al., 2022), under the published parameter names: its checkpoints load here, and ours there.

class FRM(nn.Module):
    """Feature rectification, its Eq. 1-5: each stream takes from the other what channel and spatial weights let through."""

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
    """Feature fusion, its Eq. 6-9: cross attention between the streams, then a residual mix of channels."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.cross = nn.ModuleDict()
        for i in (1, 2):
            self.cross[f"channel_proj{i}"], self.cross[f"end_proj{i}"] = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
            self.cross[f"norm{i}"] = nn.LayerNorm(C)
        self.cross["cross_attn"] = nn.ModuleDict({f"kv{i}": nn.Linear(C, 2 * C, bias=False) for i in (1, 2)})
        self.channel_emb = nn.ModuleDict({
            "residual": nn.Conv2d(2 * C, C, 1, bias=False),
            "channel_embed": nn.Sequential(nn.Conv2d(2 * C, C, 1), nn.Conv2d(C, C, 3, padding=1, groups=C), nn.ReLU(),
                                           nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
            "norm": nn.BatchNorm2d(C)})

    def forward(self, a, b):                    # NxCxHxW each
        cross, (H, W) = self.cross, a.shape[-2:]
        tokens = [m.flatten(2).mT for m in (a, b)]                  # NxHWxC
        y, u = zip(*[F.relu(cross[f"channel_proj{i}"](t)).chunk(2, -1) for i, t in enumerate(tokens, 1)])  # NxHWxC
        q = [self.split(u_) for u_ in u]                            # N x heads x HW x C/heads
        G = []
        for i, u_ in enumerate(u, 1):
            k, v = (self.split(t) for t in cross["cross_attn"][f"kv{i}"](u_).chunk(2, -1))
            G.append((k.mT @ v * k.shape[-1] ** -0.5).softmax(-2))  # the context: N x heads x C/heads x C/heads
        t = [(q_ @ G_).transpose(1, 2).flatten(2) for q_, G_ in zip(q, reversed(G))]  # each with the other's context
        out = [cross[f"norm{i}"](tokens[i - 1] + cross[f"end_proj{i}"](torch.cat((y[i - 1], t[i - 1]), -1))) for i in (1, 2)]
        m = torch.cat(out, -1).mT.unflatten(2, (H, W))              # Nx2CxHxW
        emb = self.channel_emb
        return emb["norm"](emb["residual"](m) + emb["channel_embed"](m))

    def split(self, t):
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)    # N x heads x HW x C/heads


class CMX(nn.Module):
    """CMX with its MLP decoder.  Call: rgb NxCxHxW, x NxCxHxW -> Nxnum_classesxHxW logits at input size.

    name: a key of MITS, for both streams; channels: of the two inputs; embed: width of the decoder.  The decoder's batch
    norm has eps 1e-5 (its code: 1e-3 in training, 1e-5 in evaluation).  `encoders`: both streams, as `mit` gives them.
    """

    def __init__(self, name, num_classes, channels=(3, 3), embed=512, dropout=0.1):
        super().__init__()
        self.encoders = tuple(mit(name, c) for c in channels)       # a tuple: their parts are registered below
        dims = self.encoders[0].dims
        self.backbone = nn.Module()
        for prefix, E in zip(("", "extra_"), self.encoders):
            for part, module in E.named_children():
                self.backbone.add_module(prefix + part, module)
        self.backbone.FRMs = nn.ModuleList(FRM(C) for C in dims)
        self.backbone.FFMs = nn.ModuleList(FFM(C, heads) for C, heads in zip(dims, (1, 2, 5, 8)))
        start_as_segformer(self.backbone.FRMs), start_as_segformer(self.backbone.FFMs)
        self.decode_head = nn.ModuleDict({f"linear_c{s}": nn.ModuleDict({"proj": nn.Linear(dims[s - 1], embed)})
                                          for s in (4, 3, 2, 1)})
        self.decode_head["linear_fuse"] = nn.Sequential(
            nn.Conv2d(4 * embed, embed, 1), nn.BatchNorm2d(embed), nn.ReLU())
        self.decode_head["linear_pred"] = nn.Conv2d(embed, num_classes, 1)
        for conv in (self.decode_head["linear_fuse"][0], self.decode_head["linear_pred"]):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.dropout = dropout

    def forward(self, rgb, x):
        size, fused = rgb.shape[-2:], []
        for s, (E1, E2) in enumerate([self.encoders] * 4):
            rgb, x = self.backbone.FRMs[s](E1.stage(s + 1, rgb), E2.stage(s + 1, x))  # these go on to the next stage,
            fused.append(self.backbone.FFMs[s](rgb, x))                               # this to the decoder
        maps = []
        for s, f in reversed(list(enumerate(fused, 1))):            # 4, 3, 2, 1
            m = self.decode_head[f"linear_c{s}"]["proj"](f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps.append(F.interpolate(m, fused[0].shape[-2:], mode="bilinear"))
        m = self.decode_head["linear_fuse"](torch.cat(maps, 1))
        m = self.decode_head["linear_pred"](F.dropout2d(m, self.dropout, self.training))
        return F.interpolate(m, size, mode="bilinear")


class Embedding(nn.Module):
    """An encoder with its projector, of whose K dimensions a part is given: the common, the unique or all."""

    def __init__(self, f, dimensions):
        super().__init__()
        self.f, self.dimensions = f, dimensions

    def forward(self, x):
        return self.f(x)[:, self.dimensions]

