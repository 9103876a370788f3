"""Transfers pretrained encoders to labelled tasks: one command gives one cell of Tables 1, 2 or 3.

    python finetune.py --task sunrgbd --toy --model late --linear \\
                       --weights runs/toy-rgbd-decur/checkpoint.pt          made-up scenes
    torchrun --nproc_per_node=4 finetune.py --task bigearthnet --linear --labels 0.01 \\
                       --weights runs/sar-optical-decur/checkpoint.pt       Table 1, first column
    python finetune.py --task geonrw --weights none          Supervised; with --linear Rand. Init.
    python finetune.py --task custom --data1 A --data2 B --target masks \\
                       --weights runs/custom-decur/checkpoint.pt            your own labels
    python finetune.py --table runs/*                        lists these runs, means over seeds

The defaults are the settings of Sec. 5 and App. B.  Writes into --out: results.json (metrics, what
the most frequent class would score, scores and counts of each class, all settings), ids.txt (the
training samples), checkpoint.pt (all that --resume needs), log.jsonl, args.json.
The metrics are of the whole test split after the last step, never of the best step.
"""
import argparse
import copy
import csv
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter
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

from data import (CLASSES19, MODALITIES, SCENE_CLASSES, SHAPES, BadInput, add_flags, check_mask,
                  count_mask_values, draw_boxes, expand_path, filter_separably, find_images,
                  find_mask_warnings, find_warnings, in_processes, leave_group, make_toy,
                  make_triangle_filter, make_visible, move_to, need, normalise, number,
                  open_dataset, read_factors, read_json, read_lines, read_list, read_mask, reading,
                  resize, run_main, show_progress, to_unit_range, write_text)
from decur import MITS, RESNETS, branch, mit, start_as_segformer
from pretrain import (FLAGS, Run, check_batch, collect_settings, describe_input, distribute,
                      fill_in, find_checkpoint, hash_file, join, leave, load_checkpoint,
                      make_loader, make_run_folder, measure_statistics, mixed_precision,
                      read_environment, read_pretraining, restore, start_from, sum_over_processes)

GEONRW = ("forest", "water", "agricultural", "residential, commercial, industrial",
          "grassland, swamp, shrubbery", "railway", "highway, squares", "airport, shipyard",
          "roads", "buildings")
NYU40 = ("wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds "
         "desk shelves curtain dresser pillow mirror floor_mat clothes ceiling books fridge tv "
         "paper towel shower_curtain box whiteboard person night_stand toilet sink lamp bathtub "
         "bag otherstructure otherfurniture otherprop").split()
# scenario: which the encoders were pretrained on.  model: used unless --model is given.
TASKS = {
    "bigearthnet": dict(scenario="sar-optical", data="data/bigearthnet", classes=tuple(CLASSES19),
                        model="late"),
    "geonrw": dict(scenario="rgb-dem", data="data/rgb-dem", classes=GEONRW, model="fcn"),
    "sunrgbd": dict(scenario="rgbd", data="data/rgbd", classes=tuple(NYU40[:37]), model="fcn"),
    "nyuv2": dict(scenario="rgbd", data="data/nyuv2", classes=tuple(NYU40), model="fcn"),
    "custom": dict(scenario="custom", data=None, classes=None, model=None),
}
# A recipe is a list of (settings, their source).  size: the height of a training crop in pixels.
# scale: the share of the frame's area that a crop covers.  modality: 1, 2, or 0 for both.
FCN_RGBD = [
    (dict(backbone="resnet50", modality=1, batch_size=8, steps=40000, optimizer="sgd", lr=0.01,
          weight_decay=1e-5, schedule="poly"), "paper, App. B"),
    (dict(momentum=0.9), "MMSegmentation, 40k"),  # its "poly" has a least rate; ours ends at 0
    (dict(size=480), "CMX, NYUv2"),             # CMX crops to 480x640
    (dict(scale=(0.5, 1.0)), "here: as pretraining")]
# App. B: "the same settings of CMX".  CMX published settings only for NYUv2: 500 epochs of 100
# steps.  scale None: CMX's own crops, see `draw_cmx_boxes`.  test_scales: each scale is tested
# together with its mirror image.
CMX_NYU = dict(modality=0, batch_size=8, optimizer="adamw", lr=6e-5, weight_decay=0.01,
               schedule="warm poly", size=480, scale=None, test_scales=(0.75, 1.0, 1.25))
OWN = dict(modality=0, batch_size=32, epochs=50, optimizer="adamw", lr=1e-4, weight_decay=0.01,
           schedule="poly", scale=(0.5, 1.0), test_crop=1.0, split=None, test_split=None,
           test_share=0.2, ignore=255, as1=None, as2=None)
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
# With --toy every task but bigearthnet can have every model.
TOY_SETTINGS = dict(backbone="resnet-toy", modality=0, steps=None, size=48)
TOY_RECIPES = {
    "late": TOY_SETTINGS | dict(batch_size=64, epochs=20, optimizer="sgd", lr=0.05,
                                weight_decay=0.0, momentum=0.9, schedule="steps",
                                scale=(0.8, 1.0), test_crop=1.0),
    "fcn": TOY_SETTINGS | dict(batch_size=32, epochs=8, optimizer="adamw", lr=1e-3,
                               weight_decay=0.01, schedule="poly", scale=(0.5, 1.0)),
    "cmx": CMX_NYU | dict(backbone="mit_b0", batch_size=16, epochs=4, lr=1e-3, size=48, embed=64),
}
OTHER_SETTINGS = dict(backbone="resnet50", size=224, epochs=None, steps=None, test_crop=None,
                      part=None, test_scales=(1.0,), embed=512, split="train", test_split="test",
                      cached=False, modality=0, labels=1.0, seed=0, depth_unit=1000.0,
                      save_every=10.0, save_images=0)


# ---- the protocol ----

def train(run, net, model, args, inputs):
    """Trains as in App. B.  Frozen encoders stay in evaluation mode, batch statistics included."""
    precision = nullcontext() if args.model == "cmx" else mixed_precision(run.device)
    for batch in run.batches():
        net.train()
        if args.linear:
            for E in net.encoders:
                E.eval()
        x, target = prepare_batch(batch, args, inputs, run.device, run.draws)
        with precision:                         # CMX in float32, as published
            logits = model(*x)                  # NxC, or NxCxHxW
        loss = compute_transfer_loss(logits, target, run.world)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.log(sum_over_processes(loss.detach()) / run.world)


def compute_transfer_loss(logits, target, world):
    """Returns MultiLabelSoftMarginLoss, or CrossEntropyLoss over all labelled samples or pixels.
    Both are means over the global batch."""
    if target.is_floating_point():              # NxC, 0 or 1
        return F.multilabel_soft_margin_loss(logits.float(), target)
    labelled = sum_over_processes((target >= 0).sum().float()).clamp(min=1)
    total = F.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum")
    return total * world / labelled             # DistributedDataParallel will divide by `world`


@torch.no_grad()
def test(net, data, train_counts, args, device, rank=0, world=1):
    """Tests on the whole split; each process takes a share of the samples.  Returns what
    `summarise` makes of the joint counts."""
    if world > 1 and device.type == "cpu":      # each process has batch statistics of its own
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    net.eval()
    n, C = len(data), len(data.classes)
    first, last = rank * n // world, (rank + 1) * n // world
    matrix = torch.zeros(C, C, dtype=torch.int64, device=device)    # row: label, column: prediction
    ranking = torch.zeros(2, n, C, device=device)  # scores and labels; 0 in other processes' rows
    for x, target in read_batches(data, np.arange(first, last), args, device, world, "test"):
        scores = compute_scores(net, x, args.test_scales)           # NxC, or NxCxHxW
        if target.ndim == 3 and scores.shape[2:] != target.shape[1:]:
            scores = F.interpolate(scores, target.shape[1:], mode="bilinear")
        if data.kind == "multi-label":
            ranking[:, first:first + len(scores)] = torch.stack((scores, target))
        else:
            matrix += count_confusions(scores.argmax(1), target, C, -1)
        for k in range(min(len(scores), args.save_images - first)):
            images = [batch[k] for batch in x]
            save_prediction(args, data, first + k, images, target[k], scores[k])
        first += len(scores)
    ranking, matrix = sum_over_processes(ranking).cpu(), sum_over_processes(matrix).cpu()
    return summarise(data, ranking, matrix, train_counts)


def compute_scores(net, x, scales):
    """Returns logits.  With several scales it is CMX's evaluation: for each scale, the logits of
    the image and of its mirror image are added; the exponentials of these sums are added.
    CMX tests frames above 480x640 (scale 1.25) by sliding windows.  Here: as a whole."""
    if tuple(scales) == (1.0,):
        return net(*x).float()
    size, both = x[0].shape[-2:], []
    for scale in scales:
        scaled_size = [round(scale * n) for n in size]
        scaled = [F.interpolate(images, scaled_size, mode="bilinear") for images in x]
        mirrored = [images.flip(-1) for images in scaled]
        both.append(net(*scaled).float() + net(*mirrored).flip(-1).float())
    top = torch.stack([b.amax((1, 2, 3), keepdim=True) for b in both]).amax(0)  # Nx1x1x1
    excess = (top - 80).clamp(min=0)            # exp(89) is infinite; a shift keeps the order
    return sum(F.interpolate((b - excess).exp(), size, mode="bilinear") for b in both)


def scale_rate(name, step, steps):
    """Returns the learning rate at a step, as a fraction of its base."""
    if name == "steps":                         # App. B: "by factor 10 at 60 and 80 epochs" of 100
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
    """App. B, SAR-optical: pooled features concatenated, then one linear layer.

    encoders  NxCxHxW -> Nxd each, d as in `dims`;  part: the slice of each output that is used
    Call: NxCxHxW for each encoder -> NxC logits."""

    def __init__(self, encoders, dims, num_classes, part=slice(None)):
        super().__init__()
        self.encoders, self.part = nn.ModuleList(encoders), part
        self.fc = nn.Linear(sum(dims), num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # not in the paper: as the authors
        nn.init.zeros_(self.fc.bias)

    def encode(self, *images):
        return torch.cat([E(x)[:, self.part] for E, x in zip(self.encoders, images)], 1)

    def forward(self, *images):
        return self.fc(self.encode(*images))


class FCN(nn.Module):
    """App. B, RGB-DEM: the last three stages of all encoders are concatenated, upsampled to the
    input's size, convolved (1x1), and added.  Call: NxCxHxW for each encoder -> NxCxHxW logits.
    Paper: upsampled, then convolved: 7168 channels of 224x224.  Here: convolved, then upsampled.
    The function is the same, because both are linear and bilinear weights sum to 1."""

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


# CMX (Zhang et al., 2022).  Parameters have the published names.

class FRM(nn.Module):
    """Rectifies features, CMX's Eq. 1-5: each stream adds the other one, weighted by channel and
    by pixel."""

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
    """Fuses features, CMX's Eq. 6-9: cross attention, then a residual mix of channels."""

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
        Ga = self.compute_context("kv1", ua)
        Gb = self.compute_context("kv2", ub)
        # NxHWxC, the context of the other modality
        ta = (self.split_heads(ua) @ Gb).transpose(1, 2).flatten(2)
        tb = (self.split_heads(ub) @ Ga).transpose(1, 2).flatten(2)
        a = self.cross["norm1"](a + self.cross["end_proj1"](torch.cat((ya, ta), -1)))
        b = self.cross["norm2"](b + self.cross["end_proj2"](torch.cat((yb, tb), -1)))
        m = torch.cat((a, b), -1).mT.unflatten(2, (H, W))           # Nx2CxHxW
        mix = self.channel_emb["residual"](m) + self.channel_emb["channel_embed"](m)
        return self.channel_emb["norm"](mix)                        # NxCxHxW

    def compute_context(self, name, u):
        k, v = self.cross["cross_attn"][name](u).chunk(2, -1)
        k, v = self.split_heads(k), self.split_heads(v)
        return (k.mT @ v * k.shape[-1] ** -0.5).softmax(-2)  # N x heads x C/heads x C/heads

    def split_heads(self, t):
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)    # N x heads x HW x C/heads


class CMX(nn.Module):
    """CMX with its MLP decoder, `embed` wide.  Call: NxCxHxW, NxCxHxW -> NxCxHxW logits.
    Here the batch norm of the decoder has eps 1e-5; CMX has 1e-3 in training, 1e-5 in tests."""

    def __init__(self, name, num_classes, channels=(3, 3), embed=512, dropout=0.1):
        super().__init__()
        # a tuple, because the encoders' modules are registered in `backbone`, by CMX's names
        self.encoders = tuple(mit(name, c) for c in channels)
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
            # the rectified maps go on to the next stage, the fused map goes to the decoder
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
    """Returns sum_n (R_n - R_{n-1}) P_n, the area under precision over recall, of all decisions in
    one ranking; equal scores share one threshold.  Returns None if no label is positive.
    Of NxC scores and labels this is mAP "micro"."""
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


def compute_ranking_metrics(scores, labels):
    """Returns the mAP of NxC scores and labels, and the AP of each class.
    "macro" is the mean over the classes that have a positive label."""
    each = [average_precision(s, y) for s, y in zip(scores.T, labels.T)]
    defined = [value for value in each if value is not None]
    macro = statistics.fmean(defined) if defined else None
    return {"mAP micro": average_precision(scores, labels), "mAP macro": macro}, each


def count_confusions(pred, gt, num_classes, ignore):
    """Returns CxC counts, row: label, column: prediction.  Labels equal to `ignore` do not count:
    they get a bin of their own, because selecting the others would take longer."""
    bins = num_classes ** 2
    bin_of_each = torch.where(gt == ignore, bins, num_classes * gt + pred)
    counts = bin_of_each.flatten().bincount(minlength=bins + 1)
    return counts[:bins].view(num_classes, num_classes)


def compute_counting_metrics(matrix, kind):
    """Returns the metrics of a confusion matrix, and the IoU of each class (of single-label tasks,
    its accuracy).  Classes that are neither predicted nor labelled are not in the mean."""
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


def summarise(data, ranking, matrix, train_counts):
    """Returns the metrics; their yardstick: the same metrics of a guess that never looks at the
    image; and for each class its score and its numbers of training and test labels.

    ranking       2xNxC   scores and labels of a multi-label task: the guess ranks every image by
                          how often each class occurs in training
    matrix        CxC     confusions of other tasks: the guess is the most frequent training class
    train_counts  C       images (in masks: pixels) of each class in what was trained on"""
    if data.kind == "multi-label":
        scores, labels = ranking
        metrics, each = compute_ranking_metrics(scores, labels)
        frequencies = train_counts.float().expand_as(labels)        # NxC
        yardstick, _ = compute_ranking_metrics(frequencies, labels)
        test_counts = labels.sum(0)
        guess = "every image is ranked by how often each class occurs in training"
    else:
        metrics, each = compute_counting_metrics(matrix, data.kind)
        most, guessed = int(train_counts.argmax()), torch.zeros_like(matrix)
        guessed[:, most] = matrix.sum(1)
        yardstick, _ = compute_counting_metrics(guessed, data.kind)
        test_counts, guess = matrix.sum(1), f"always {data.classes[most]}"
    counts = {}
    for name, trained, tested in zip(data.classes, train_counts.tolist(), test_counts.tolist()):
        counts[name] = dict(train=int(trained), test=int(tested))
    return dict(metrics=metrics, yardstick=yardstick, guess=guess,
                classes=dict(zip(data.classes, each)), counts=counts)


# ---- the model of a run, and weights into it ----

def build_model(args, data, device="cpu"):
    """Returns the model of the settings on the device, and a line for each of the --weights in its
    encoders."""
    sample, modalities = data[0], select_modalities(args)
    channels = [sample[m].shape[0] for m in modalities]
    if args.part:
        net, lines = build_with_projectors(args, channels, len(data.classes))
    else:
        net, lines = build_with_encoders(args, channels, len(data.classes)), ["random weights"]
        if args.weights != ["none"]:
            rows = [data.inputs[m] for m in modalities]
            lines = start_from(args.weights, net.encoders, args, rows)
    net.to(device)
    if torch.device(device).type == "cuda" and args.backbone in RESNETS:
        net.to(memory_format=torch.channels_last)
    return net, lines


def build_with_encoders(args, channels, num_classes):
    if args.model == "cmx":
        return CMX(args.backbone, num_classes, channels, args.embed)
    encoders = [branch(args.backbone, c, ()).E for c in channels]
    if args.model == "fcn":
        return FCN(encoders, num_classes)
    return LateFusion(encoders, [E.dims[-1] for E in encoders], num_classes)


def build_with_projectors(args, channels, num_classes):
    """--part: returns late fusion of a part of the embeddings, instead of the encoders' features,
    and a line about it."""
    file, part, settings = args.weights[0], args.part, args.pretraining[0]
    state = load_checkpoint(file)["model"]      # refuses files without projectors
    K, Kc = settings["K"], settings["Kc"]
    start, stop = {"common": (0, Kc), "unique": (Kc, K), "all": (0, K)}[part]
    need(start < stop, f"--part {part}: {file} has {Kc} common of {K} dimensions, so that this "
         f"part is empty; give another --part")
    branches = nn.ModuleDict()
    for m, c in zip(select_modalities(args), channels):
        branches[f"f{m + 1}"] = branch(settings["backbone"], c, settings["widths"])
    try:
        branches.load_state_dict({key: t for key, t in state.items() if key[:2] in branches})
    except RuntimeError as error:
        raise BadInput(f"--weights {file}: {' '.join(str(error).split())[:300]}") from None
    dims = [stop - start] * len(branches)
    net = LateFusion(branches.values(), dims, num_classes, slice(start, stop))
    return net, [f"{file}: {stop - start} {part} dimensions of each modality's {K}"]


# ---- samples ----

class Labelled:
    """Samples of a task: (x1, x2, target).

    kind       "multi-label": the target has C zeros and ones; "single-label": it is a class;
               "segmentation": HxW classes, -1 where there is no label
    target_of  name -> target, where the data set itself has no labels
    ids        the names of these samples; by default all of the data set's"""

    def __init__(self, data, classes, kind, target_of=None, ids=None):
        self.data, self.classes, self.kind, self.target_of = data, classes, kind, target_of
        self.ids, self.inputs, self.epoch = ids or data.ids, data.inputs, 0
        self.index_of = {name: i for i, name in enumerate(data.ids)}

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        name = self.ids[i]
        self.data.epoch = self.epoch            # seasons of made-up satellite scenes
        x1, x2, *target = self.data[self.index_of[name]]
        if self.target_of:
            x1, x2, target = x1[0], x2[0], [self.target_of(name)]  # the first views
        if x1.shape[-2:] != x2.shape[-2:]:      # one's own: one box will be cut out of both
            x2 = resize(to_unit_range(x2)[None], x1.shape[-2:])[0]
        if self.kind == "segmentation":
            check_mask(name, target[0], x1.shape[-2:], len(self.classes))
            return x1, x2, target[0] - 1        # in files 0 is no label
        return x1, x2, target[0]

    def count_labels(self, i):
        """Returns C counts of a sample: of its pixels, or of the image itself.  Reads no image."""
        name, C = self.ids[i], len(self.classes)
        if self.target_of:
            target = self.target_of(name)
        elif self.kind == "multi-label":
            target = torch.from_numpy(self.data.labels[name])
        else:
            target = torch.from_numpy(read_mask(self.data.files[2][name])).clamp(min=0)
        if self.kind == "multi-label":
            return target.long()
        if self.kind == "single-label":
            return F.one_hot(target, C)
        return target.flatten().bincount(minlength=C + 1)[1:]


def open_task(args, rank):
    """Opens the data sets of both splits.  Returns them, and lines about them."""
    if args.task == "custom":
        both, lines = open_custom_task(args)
    else:
        both, lines = open_published_task(args, rank), []
    modalities = both[0].data.modalities
    need(args.depth_unit == 1000 or "depth" in modalities, f"--depth-unit has no effect on "
         f"{' and '.join(modalities)}. Leave it out")
    return both, lines


def open_published_task(args, rank):
    """Opens the data sets of both splits, or the made-up scenes that stand for them."""
    task, name, target_of = TASKS[args.task], args.task, None
    classes, size, num_classes = task["classes"], args.size, None
    if task["scenario"] == "rgbd":
        size = math.ceil(2 * size / 3)          # its canvas is 3/2 as high
    if args.toy:
        make_toy(task["scenario"], args.data, rank=rank)
        classes, num_classes = SCENE_CLASSES, len(SCENE_CLASSES)
    if args.toy and args.model == "late":       # classes are the objects in a scene, not its mask
        name, classes, num_classes = task["scenario"], SCENE_CLASSES[1:], None
        target_of = partial(make_factors_target, read_factors(args.data))
    kind = "multi-label" if args.model == "late" else "segmentation"
    both = []
    for split in (args.split, args.test_split):
        data = open_dataset(name, args.data, size, split, args.depth_unit, classes=num_classes)
        both.append(Labelled(data, classes, kind, target_of))
    return both


def make_factors_target(factors, scene):
    """Returns 12 zeros and ones: which of four shapes each of a scene's three objects has."""
    need(scene in factors, f"factors.csv lacks {scene}; make the scenes again: data.py toy")
    return F.one_hot(torch.tensor(factors[scene]), len(SHAPES)).flatten().float()


def choose_subset(n, fraction, seed):
    """--labels: returns a prefix of a seeded permutation of 0..n-1, so that smaller subsets lie in
    larger ones."""
    return np.random.default_rng(seed).permutation(n)[:max(1, round(fraction * n))]


def select_modalities(args):
    """Returns the indices of the modalities that the model sees."""
    return [args.modality - 1] if args.modality else [0, 1]


def read_batches(data, indices, args, device, world, text):
    """Yields the samples once, in their order, not augmented.  text: of the progress bar."""
    loader = DataLoader(Subset(data, indices.tolist()), max(1, args.batch_size // world),
                        num_workers=args.workers, worker_init_fn=leave_group,
                        pin_memory=device.type == "cuda")
    for batch in show_progress(loader, desc=text):
        yield prepare_batch(batch, args, data.inputs, device)


@torch.no_grad()
def compute_features(net, data, indices, args, device):
    """--cached: returns each training sample's features, computed once and not augmented, as a
    data set."""
    net.eval()
    features, targets = [], []
    for x, target in read_batches(data, indices, args, device, 1, "features"):
        features.append(net.encode(*x).cpu())
        targets.append(target.cpu())
    return TensorDataset(torch.cat(features), torch.cat(targets))


# ---- augmentation: one box for both modalities and the mask ----

def draw_cmx_boxes(B, H, W, draws):
    """Returns boxes as CMX draws them: a frame is scaled by one of six factors, then cropped to
    its former size, or padded to it.  Top, left, height, width, flip: Bx1."""
    u = draws(4).double()
    factors = torch.tensor([0.5, 0.75, 1, 1.25, 1.5, 1.75], dtype=u.dtype)
    s = factors[(6 * u[:, :1]).long()]          # Bx1
    starts = []
    for n, v in ((H, u[:, 1:2]), (W, u[:, 2:3])):
        spare = (s * n).round() - n             # Bx1, in scaled pixels; below 0: padded
        starts.append(torch.where(spare >= 0, (v * (spare + 1)).floor(), (spare / 2).ceil()) / s)
    return *starts, H / s, W / s, u[:, 3:] < 0.5


def resample_boxes(x, boxes, size):
    """Returns each box resized to `size`, and mirrored where the box says so.

    x      BxCxHxW float: resized by a triangle filter as in pretraining, 0 outside of the image;
           or BxHxW classes: the nearest pixel, -1 outside
    boxes  Bx5 float on the device of x: top, left, height, width, flip"""
    top, left, h, w, mirrored = boxes.split(1, 1)                   # Bx1 each
    H, W = x.shape[-2:]
    if x.is_floating_point():
        Wy = make_triangle_filter(top, h, H, size[0]).nan_to_num(0)  # nan: a row outside
        Wx = make_triangle_filter(left, w, W, size[1]).nan_to_num(0)
        return filter_separably(x, Wy, torch.where(mirrored[..., None] > 0, Wx.flip(1), Wx))
    pixel = torch.arange(max(size), device=x.device) + 0.5
    line = (top + pixel[:size[0]] * h / size[0]).floor().long().clamp(-1, H)  # BxH'
    column = (left + pixel[:size[1]] * w / size[1]).floor().long().clamp(-1, W)  # BxW'
    column = torch.where(mirrored > 0, column.flip(1), column)
    framed = F.pad(x, (1, 1, 1, 1), value=-1)                       # Bx(H+2)x(W+2)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return framed[image, line[:, :, None] + 1, column[:, None] + 1]  # BxH'xW'


def prepare_batch(batch, args, inputs, device, draws=None):
    """Returns what the model sees of a batch of files, [NxCxHxW], and the target.

    With draws both are augmented.  Without, the model sees the frame; or with test_crop the middle
    of the frame, resized to the training crops' size, while masks stay as they are."""
    *x, target = [move_to(t, device) for t in batch]
    if args.cached and draws:                   # a batch of features
        return x, target
    x = [normalise(to_unit_range(x[m]), inputs[m]) for m in select_modalities(args)]
    B, _, H, W = x[0].shape
    size = (args.size, args.size)
    if draws and args.scale:
        boxes = draw_boxes(B, H, W, args.scale, draws)
    elif draws:
        boxes, size = draw_cmx_boxes(B, H, W, draws), (H, W)
    elif args.test_crop:
        height, width = args.test_crop * H, args.test_crop * W
        middle = ((H - height) / 2, (W - width) / 2, height, width, 0)
        boxes = [torch.full((B, 1), float(value)) for value in middle]
    else:
        return x, target
    boxes = move_to(torch.cat([v.float() for v in boxes], 1), device)  # Bx5, one copy for all
    x = [resample_boxes(images, boxes, size) for images in x]
    if target.ndim == 3 and draws:
        target = resample_boxes(target, boxes, size)
    return x, target


# ---- --task custom: one's own pairs and labels ----

def open_custom_task(args):
    """Opens one's own pairs and labels.  Returns the samples of both splits, and lines about
    them."""
    pairs, lines = open_own_pairs(args)
    open_labels = open_own_table if is_table(args.target) else open_own_masks
    named, classes, kind, target_of, more = open_labels(args, pairs)
    need(len(classes) > 1, f"--target {args.target} has {len(classes)} classes {classes}. Give "
         f"labels of 2 classes or more")
    ids = [name for name in pairs.ids if name in named]
    both = [Labelled(pairs, classes, kind, target_of, part) for part in split_names(args, ids)]
    lines.append(f"{len(ids)} of {len(pairs)} pairs have labels: {kind}, {len(classes)} classes")
    return both, lines + more


def open_own_pairs(args):
    """Opens the images of --data1 and --data2.  Returns them, and lines about them.

    Encoders that were pretrained on one's own images keep how those were normalised.  With other
    encoders --as1 and --as2 say what the images are."""
    sources, inputs = args.pretraining, None
    if all(source.get("scenario") == "custom" for source in sources):
        inputs = list(sources[0]["inputs"])
        for m, source in zip(select_modalities(args), sources):
            inputs[m] = source["sees"]
    pairs = open_dataset("custom", [args.data1, args.data2], args.size,
                         depth_unit=args.depth_unit, inputs=inputs, declared=(args.as1, args.as2))
    lines = list(pairs.notes)
    for m, source in zip(select_modalities(args), sources):
        row, seen = pairs.inputs[m], source.get("sees")
        if seen and seen["name"] in MODALITIES and row["name"] != seen["name"]:
            lines.append(f"warning: the encoder of modality {m + 1} was trained on {seen['name']}, "
                         f"but --data{m + 1} is normalised as {row['name']}; if these images are "
                         f"{seen['name']} ({seen['range']}), give --as{m + 1} {seen['name']}")
    return pairs, lines


def is_table(target):
    return Path(target).suffix.lower() == ".csv"


def check_names(args, named, pairs):
    """Refuses labels of names that no pair has."""
    strangers = sorted(set(named) - set(pairs.ids))
    need(not strangers, f"--target {args.target} names {strangers[:1]}, which has no pair. The "
         f"pairs have names such as {pairs.ids[0]}. Give masks of equal names, a pattern such as "
         f"'masks/*_mask.png', or a csv with {CSV_FORM}")


CSV_FORM = ("one `name,label` a line, such as `scene7,forest`; several labels of a name are "
            "several lines; the first line may be the header `name,label`")


def open_own_table(args, pairs):
    """Opens the labels of a csv.  Returns {name: labels}, the classes, the kind of the task, a
    function name -> target, and lines about the labels."""
    labels, lines = read_label_table(args.target), []
    check_names(args, labels, pairs)
    classes, kind, targets = sorted(set().union(*labels.values())), "multi-label", {}
    for name, own in labels.items():
        targets[name] = torch.tensor([float(label in own) for label in classes])
    odd = [name for name, own in labels.items() if len(own) != 1]
    if not odd:
        kind = "single-label"
        targets = {name: target.argmax() for name, target in targets.items()}
    elif len(odd) < len(labels) / 20:
        lines.append(f"warning: {len(odd)} of {len(labels)} names in --target have no label or "
                     f"several, such as {odd[0]}, so that the task is multi-label; if that is not "
                     f"meant, correct their lines")
    joined = find_joined_labels(classes)
    if joined:
        lines.append(f"warning: classes such as {joined[0]!r} look like several labels in one; if "
                     f"they are, write {CSV_FORM}")
    return labels, classes, kind, targets.get, lines


def read_label_table(file):
    """Reads lines `name,label`.  Returns {name: the set of its labels}, which an empty label
    leaves empty."""
    labels = {}
    with reading(file, "a csv"):
        for line in csv.reader(read_lines(file), strict=True):
            cells = [cell.strip() for cell in line]
            need(len(cells) == 2, f"{file} has {len(cells)} columns in the line {cells}; expected "
                 f"{CSV_FORM}")
            name, label = cells
            if not labels and cells == ["name", "label"]:
                continue
            labels.setdefault(name, set())
            if label:
                labels[name].add(label)
    return labels


def find_joined_labels(labels):
    """Returns the labels that a separator splits into parts which all occur elsewhere: as labels
    or, unless the separator is a space, as parts of other labels."""
    joined = []
    for separator in "|;,/&+ ":
        parts_of = {}
        for label in labels:
            parts_of[label] = {part.strip() for part in label.split(separator)}
        known = set(labels)
        if separator != " ":                    # names of classes share words
            counts = Counter(part for parts in parts_of.values() for part in parts)
            known = {part for part, n in counts.items() if n > 1}
        joined += [label for label, parts in parts_of.items() if len(parts) > 1 and parts <= known]
    return joined


def open_own_masks(args, pairs):
    """Opens masks.  Returns what `open_own_table` does; each value but --ignore is a class."""
    files = find_images(args.target, (".png", ".tif", ".tiff", ".npy"))
    check_names(args, files, pairs)
    counts = count_mask_values(files)
    total = sum(pixels for pixels, _ in counts.values())
    values = sorted(value for value in counts if value >= 0 and value != args.ignore)
    need(len(values) <= 256, f"--target {args.target} holds {len(values)} values, such as "
         f"{values[:3]}; masks may have 256 classes at most, one value for each")
    labelled = sum(counts[value][0] for value in values)
    held = [f"{value} ({counts[value][0] / total:.2%})" for value in values]
    lines = [f"masks hold {', '.join(held)}; without a label (--ignore {args.ignore}, negative or "
             f"no data) {1 - labelled / total:.2%} of the pixels"]
    if labelled < total / 2:
        lines.append(f"warning: most pixels of the masks have no label; if {args.ignore} is a "
                     f"class, give another --ignore, such as -1")
    considered = {value: counts[value] for value in values}
    lines += [f"warning: {warning}" for warning in find_mask_warnings(considered)]
    classes = [str(value) for value in values]
    return files, classes, "segmentation", partial(read_own_mask, files, values), lines


def read_own_mask(files, values, name):
    """Returns the mask of a name: k + 1 where it has the k-th of the values, otherwise 0."""
    mask = torch.from_numpy(read_mask(files[name]))
    target = torch.zeros_like(mask)
    for k, value in enumerate(values):
        target[mask == value] = k + 1
    return target


def split_names(args, ids):
    """Returns names to train on and names to test on: of two lists, or of a seeded share."""
    if args.split:
        names = dict.fromkeys(ids)
        splits = [read_list(Path(file), names) for file in (args.split, args.test_split)]
        shared = sorted(set(splits[0]) & set(splits[1]))
        need(not shared, f"{len(shared)} names are in both {args.split} and {args.test_split}, "
             f"such as {shared[:1]}; test on samples that are not trained on")
        return splits
    order = np.random.default_rng((args.seed, len(ids))).permutation(len(ids))
    n = round(args.test_share * len(ids))
    need(0 < n < len(ids), f"--test-share {args.test_share} of {len(ids)} labelled samples is {n}; "
         f"give a share that leaves samples both for training and for testing, or more labels")
    names = np.array(ids, object)
    return names[np.sort(order[n:])].tolist(), names[np.sort(order[:n])].tolist()


# ---- pictures ----

def save_prediction(args, data, i, x, target, scores):
    """Draws inputs, label and prediction side by side; below, the classes in their colours."""
    names = ["no label", *data.classes]
    colours = np.random.default_rng(0).integers(50, 256, (len(names), 3), np.uint8)
    colours[0] = 0
    labels = [target.cpu().numpy() + 1, scores.argmax(0).cpu().numpy() + 1]  # HxW each
    panels = []
    for image, m in zip(x, select_modalities(args)):
        image = resize(image[None].float(), target.shape)[0]
        panels.append(np.uint8(255 * make_visible(image, data.inputs[m])))
    panels += [colours[label] for label in labels]
    wide = Image.fromarray(np.concatenate(panels, 1))
    wide = ImageOps.scale(wide, max(1, 256 // wide.height), Image.Resampling.NEAREST)
    legend = [(f"{data.ids[i]}: {len(x)} inputs, label, prediction", (90, 90, 90))]
    legend += [(names[k], tuple(colours[k].tolist())) for k in np.unique(labels)]
    sheet = ImageOps.expand(wide, (0, 0, 0, 20 * len(legend)), (90, 90, 90))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for j, (text, colour) in enumerate(legend):
        top = wide.height + 20 * j
        draw.rectangle((4, top + 4, 16, top + 16), colour)
        draw.text((22, top + 1), text, (255, 255, 255), font)
    (args.out / "images").mkdir(exist_ok=True)
    sheet.save(args.out / "images" / f"{data.ids[i].replace('/', '_')}.png")


# ---- a run ----

def main(argv=None):
    args, sources, changed = get_args(argv)
    if args.table:
        return print_table(args.table)
    started = time.time()
    rank, world, device = process = read_environment()
    checkpoint = find_checkpoint(args.out, args.resume)             # or None
    step = checkpoint["step"] if checkpoint else 0
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in CMX and evaluation

    # ---- data ----
    (data, test_data), lines = open_task(args, rank)
    chosen = choose_subset(len(data), args.labels, args.seed)
    args.steps = count_steps(args, len(chosen), world)
    counts = count_classes(data, chosen[rank::world], args.workers)

    # ---- model ----
    torch.manual_seed(args.seed)
    net, more = build_model(args, data, device)
    if args.linear:
        freeze(net, data, chosen, args, device, resumed=bool(checkpoint))
    optimizer = make_transfer_optimizer(net, args)
    settings = collect_settings(
        args, weights_sha256=[hash_file(file) for file in args.weights if Path(file).is_file()],
        samples=len(chosen), test_samples=len(test_data), num_classes=len(data.classes))
    if checkpoint:
        restore(checkpoint, args.out, net, optimizer, settings)
    frozen = [copy.deepcopy(E.state_dict()) for E in net.encoders] if args.linear else []

    # ---- run; the loader's workers start before the processes meet ----
    trained, samples, indices = net, data, chosen
    if args.cached:                             # the same loop, of the linear layer, on features
        trained, indices = net.fc, np.arange(len(chosen))
        samples = compute_features(net, data, chosen, args, device)
    loader = make_loader(args, samples, indices, step, args.steps, process)
    join(args.out, step, process)
    model = distribute(trained, world, device)
    counts = sum_over_processes(counts.to(device)).cpu()
    if rank == 0:
        make_run_folder(args, settings, process)
    run = Run(args, settings, net, optimizer, loader, step, args.steps,
              len(indices) // args.batch_size, partial(scale_rate, args.schedule), process)
    lines += more + describe_training(args, data, counts, len(chosen))
    run.introduce(sources, lines, find_warnings(data.data))
    train(run, net, model, args, data.inputs)
    if not run.stopped:
        result = test(net, test_data, counts, args, device, rank, world)
        check_frozen(net, frozen)
        result["seconds"] = time.time() - started
        finish(run, args, result, changed, sorted(data.ids[i] for i in chosen))
    leave()
    return 128 + run.stopped if run.stopped else 0  # the exit code of a signal


def count_steps(args, n, world):
    """Returns the number of steps of a run on n samples.  Refuses a batch that does not fit."""
    if args.epochs != 0:                        # 0: the model is only tested
        check_batch(args.batch_size, n, world)
    if args.steps is not None:
        return args.steps
    return args.epochs * max(1, n // args.batch_size)


def count_classes(data, indices, workers):
    """Returns C counts of the labels that samples have: of images, or of pixels in masks."""
    total = torch.zeros(len(data.classes), dtype=torch.int64)
    for counts in in_processes(data.count_labels, indices.tolist(), workers, "classes"):
        total += counts
    return total


def describe_training(args, data, counts, n):
    """Returns lines: how many samples are trained on, and what is wrong with them."""
    lines = [f"trained on {n} of {len(data)} training samples"]
    lines += warn_of_missing_classes(data.classes, counts.tolist(), f"{n} samples trained on")
    stopped = {source["file"]: source.get("stopped") for source in args.pretraining}
    for file, where in stopped.items():
        if where:
            lines.append(f"warning: the pretraining behind {file} was stopped {where}")
    return lines


def warn_of_missing_classes(classes, counts, where):
    """Returns at most one line: the classes that do not occur."""
    missing = [name for name, n in zip(classes, counts) if not n]
    if not missing:
        return []
    return [f"warning: {len(missing)} of {len(classes)} classes do not occur in the {where}: "
            f"{', '.join(missing)}"]


def freeze(net, data, chosen, args, device, resumed):
    """Takes the encoders out of training.  Random encoders get the batch statistics of what they
    see; if the run is resumed, its checkpoint has them."""
    for E in net.encoders:
        E.requires_grad_(False)
    if args.weights == ["none"] and args.model != "cmx" and not resumed:  # CMX has layer norms
        n = args.batch_size * min(20, len(chosen) // args.batch_size)
        batches = read_batches(data, chosen[:n], args, device, 1, "statistics")
        measure_statistics(net, (x for x, _ in batches))


def check_frozen(net, frozen):
    """Ends the run unless every encoder equals the copy of its state in `frozen`."""
    for state, E in zip(frozen, net.encoders):
        if not all(torch.equal(t, state[name]) for name, t in E.state_dict().items()):
            sys.exit("a frozen encoder has changed, which must not be: the results are void")


def finish(run, args, result, changed, ids):
    """Writes results.json and ids.txt, and prints the scores, each beside its yardstick."""
    result |= run.settings | describe_run_for_table(args, run.settings, changed)
    result["pretraining"] = args.pretraining
    if run.rank == 0:
        write_text(args.out / "ids.txt", "".join(f"{name}\n" for name in ids))
        write_text(args.out / "results.json", json.dumps(result, indent=1, default=str))
    counts = result["counts"]
    trained, tested = (sum(n[part] for n in counts.values()) for part in ("train", "test"))
    score = {"mIoU": "IoU", "mAP micro": "AP"}.get(next(iter(result["metrics"])), "accuracy")
    run.print(f"  {'class':36s} {score:>10s}  share of the labels in training and test")
    for name, value in result["classes"].items():
        shares = counts[name]["train"] / max(1, trained), counts[name]["test"] / max(1, tested)
        run.print(f"  {name:40s} {format_percent(value):>6s} {shares[0]:8.2%} {shares[1]:8.2%}")
    test_counts = [n["test"] for n in counts.values()]
    run.print(*warn_of_missing_classes(counts, test_counts, "test samples"))
    if args.linear:
        run.print("the frozen encoders have not changed by one bit")
    run.print(f"{format_scores([result])}  on {result['test_samples']} test samples",
              f"a guess, without a look at the image: {result['guess']}",
              f"wrote {args.out}/results.json")


# ---- --table: what was run ----

# Seeds, settings that follow from others, and those that `describe_run_for_table` adds itself.
NOT_COMPARED = ("seed", "K", "Kc", "widths", "channels", "modalities", "inputs", "sees", "file",
                "linear", "weights_sha256", "num_classes", "steps")
# What `name_result` says of every run.
NAMED = ("toy", "task", "model", "weights", "protocol", "labels", "data1", "data2", "target")
PRETRAININGS = dict(decur="DeCUR", barlowtwins="Barlow Twins (w/o intra&decoup.)",
                    vicreg="VICReg", simclr="SimCLR-cross", clip="CLIP")


def describe_run_for_table(args, settings, changed):
    """Returns what --table needs to know of a run.

    what     {name: value}; runs of equal values differ only by their seeds.  A file counts by its
             content, a pretraining by its settings
    shown    {name: text} where another text than the value is printed: the names of files
    changed  the names of the settings that are not the defaults
    seeds    of the run and of the pretrainings behind it"""
    what, shown = describe_weights(args), {}
    what |= dict(task=args.task, toy=args.toy, protocol="linear" if args.linear else "fine-tuned")
    if args.task == "custom":
        for name in ("data1", "data2", "target", "split", "test_split"):
            what[name], shown[name] = identify_file(getattr(args, name))
    for name, value in settings.items():
        if name not in NOT_COMPARED:
            what.setdefault(name, value)
    seeds = [args.seed, *(source.get("seed") for source in args.pretraining)]
    return dict(what=what, shown=shown, changed=list(changed), seeds=seeds)


def identify_file(path):
    """Returns what stands for the content of a file (for folders and patterns, the path itself),
    and a text to print."""
    if path is None or not Path(path).is_file():
        path = path and os.path.normpath(path)
        return path, path
    short = hash_file(path)[:8]
    return short, f"{Path(path).name} ({short})"


def describe_weights(args):
    """Returns {name: value} of what the encoders started from.  Where the encoders differ, the
    values of both stand in the text."""
    names, values = [], {}
    for source in args.pretraining:
        name, settings = name_pretraining(source)
        names.append(name)
        for key, value in settings.items():
            values.setdefault(f"pretraining {key}", []).append(str(value))
    values["weights"] = names
    return {key: " and ".join(dict.fromkeys(texts)) for key, texts in values.items()}


def name_pretraining(source):
    """Returns the paper's name of the pretraining behind an encoder, and its settings."""
    if "method" not in source:                  # weights of others
        names = dict(none="random", imagenet="ImageNet")
        return names.get(source["file"]) or identify_file(source["file"])[1], {}
    settings = {name: value for name, value in source.items() if name not in NOT_COMPARED}
    settings["input"] = describe_input(source["sees"])
    if settings["common"] == 1 and settings["no_intra"]:            # Table 4: the same loss
        settings.update(method="barlowtwins", no_intra=False)
    name = PRETRAININGS[settings["method"]]
    if settings["no_intra"]:
        name = "w/o intra"
    elif settings["method"] == "decur" and settings["common"] == 1:
        name = "w/o decoup."
    if settings.get("modality"):
        name += ", one modality"
    if settings.get("stopped"):
        name += f", stopped {settings['stopped']}"
    return name, settings


def print_table(folders):
    """Prints a line for all runs that differ only by their seeds: what they are; settings that are
    not the defaults, or differ from those of other runs that begin alike; scores."""
    results = []
    for folder in folders:
        file = Path(folder) / "results.json"
        if file.is_file():
            try:
                results.append(read_results(file))
            except BadInput as error:           # the other runs are listed all the same
                print(f"left out: {error}")
    need(results, f"--table {' '.join(folders)}: no folder has a results.json that can be read; "
         f"give the --out of runs of finetune.py")
    groups, values = {}, {}
    for r in results:
        groups.setdefault(json.dumps(r["what"], sort_keys=True), []).append(r)
        for name, value in r["what"].items():   # of runs whose lines begin alike
            values.setdefault((*name_result(r), name), set()).add(json.dumps(value))
    lines = []
    for runs in groups.values():
        result, start = runs[0], name_result(runs[0])
        words = list(start)
        for name, value in result["what"].items():
            differs = len(values[*start, name]) > 1
            if name not in NAMED and (differs or name in result["changed"]):
                words.append(f"{name} {result['shown'].get(name, value)}")
        seeds = len({json.dumps(r["seeds"]) for r in runs})
        over = "1 seed" if seeds == 1 else f"{seeds} seeds"
        if len(runs) > seeds:
            over += f" in {len(runs)} runs"
        words += [format_scores(runs), f"({over}, {result['test_samples']} test samples)"]
        lines.append("  ".join(words))
    print(*sorted(lines), sep="\n")


def read_results(file):
    result = read_json(file, "results of finetune.py")
    kinds = dict(what=dict, shown=dict, changed=list, seeds=list, metrics=dict, yardstick=dict,
                 test_samples=int)
    odd = [name for name, kind in kinds.items() if not isinstance(result.get(name), kind)]
    need(not odd, f"{file} is damaged or from an older version (it lacks {' '.join(odd)}); run its "
         f"command again")
    return result


def name_result(result):
    """Returns the words with which the line of a run begins."""
    what, shown = result["what"], result["shown"]
    words = [f"toy {what['task']}" if what["toy"] else what["task"], what["model"],
             what["weights"], what["protocol"], f"{100 * what['labels']:g}% of the labels"]
    words += [shown[name] for name in ("data1", "data2", "target") if name in shown]
    return tuple(words)


def format_scores(runs):
    """Returns mean and standard deviation over the seeds, in percent, and their yardsticks."""
    words = []
    for metric in runs[0]["metrics"]:
        values = [r["metrics"][metric] for r in runs if r["metrics"][metric] is not None]
        text = format_percent(statistics.mean(values) if values else None)
        if len(values) > 1:
            text += f" +- {format_percent(statistics.stdev(values))}"
        guesses = [r["yardstick"][metric] for r in runs if r["yardstick"][metric] is not None]
        guess = format_percent(statistics.mean(guesses) if guesses else None)
        words.append(f"{metric} {text} (a guess: {guess})")
    return "  ".join(words)


def format_percent(value):
    return "undefined" if value is None else f"{100 * value:.1f}"


# ---- command line ----

# Flags of pretrain.py, some with other help texts or limits, and flags of transfer only.
RECIPE = "default: of the task's recipe"
TRANSFER_FLAGS = FLAGS | {
    "task": dict(choices=TASKS, help="data set with its classes; custom: your own labels"),
    "table": dict(nargs="+", metavar="DIR", help="list the runs in these folders, nothing else"),
    "split": dict(type=expand_path, help="list to train on, of custom a file; default: train"),
    "test-split": dict(type=expand_path, help="list to test on, of custom a file; default: test"),
    "labels": dict(type=number(float, 1e-9, 1), help="share of training samples; default: 1"),
    "modality": dict(type=int, choices=(0, 1, 2), help="modality that the model sees; 0: both; "
                     "default: 0, FCN on RGB-D 1"),
    "size": FLAGS["size"] | dict(help=f"height of the training crops in pixels; {RECIPE}"),
    "target": FLAGS["data1"] | dict(help="with custom: labels, masks given as --data1, or a csv of "
                                    "lines `name,label`"),
    "ignore": dict(type=number(int, -2 ** 31), help="with custom: value in masks that is no label, "
                   "as all negative values are; default: 255"),
    "test-share": dict(type=number(float, 0, 1), help="with custom: share of the samples to test "
                       "on, unless there are lists; default: 0.2"),
    "model": dict(choices=("late", "fcn", "cmx"), help="late fusion, FCN or CMX; default: "
                  "fcn, with bigearthnet or a csv late"),
    "backbone": FLAGS["backbone"] | dict(help="encoders; default: resnet50, of cmx mit_b2 or b5"),
    "weights": FLAGS["weights"] | dict(help="weights to start from: one file for both encoders, a "
                                       "file for each, imagenet, or none (random)"),
    "part": dict(choices=("common", "unique", "all"), help="dimensions of the embedding to "
                 "classify; default: the encoder's features"),
    "linear": dict(action="store_true", help="freeze the encoders; default: fine-tuning"),
    "cached": dict(action="store_true", default=None, help="with --linear: compute the features "
                   "once, not augmented, which is fast"),
    "epochs": dict(type=number(int, 0), help=f"passes over the data; 0: only test; {RECIPE}"),
    "batch-size": dict(type=number(int, 1), help=f"samples per step, of all processes; {RECIPE}"),
    "lr": FLAGS["lr"] | dict(help=f"learning rate at the start; {RECIPE}"),
    "weight-decay": FLAGS["weight-decay"] | dict(help=f"weight decay; {RECIPE}"),
    "out": FLAGS["out"] | dict(help="folder of the run; default: runs/TASK-MODEL-WEIGHTS-seedN, "
                               "with settings that are not the defaults"),
    "save-images": dict(type=number(int, 0), metavar="N", help="draw N test samples; default: 0"),
}


def get_args(argv=None):
    """Returns the settings; {name: its source}; {name: value} of the settings that are not the
    defaults."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Transfer (Tables 1-3). A "
                                     "setting that is not given is the paper's for the task.")
    for title, names in (
            ("what to run", "task table toy"),
            ("data", "data split test-split labels modality depth-unit size workers"),
            ("--task custom", "data1 data2 as1 as2 target ignore test-share"),
            ("model", "model backbone weights bgr part linear cached"),
            ("optimization and run", "epochs batch-size lr weight-decay seed out resume save-every "
             "save-images")):
        add_flags(parser.add_argument_group(title), TRANSFER_FLAGS, names)
    args = parser.parse_args(argv)
    sources, changed = ({}, {}) if args.table else fill_in_settings(args)
    return args, sources, changed


def fill_in_settings(args):
    """Fills in every setting that was not given.  Returns what `fill_in` does."""
    need(args.task and args.weights, "nothing to do: give --task and --weights (a file, or none), "
         "or --table")
    task, model, tables = TASKS[args.task], TASKS[args.task]["model"], []
    where = f"data/toy-{task['scenario']}" if args.toy else task["data"]
    if args.task == "custom":
        need(args.data1 and args.data2 and args.target and not args.data and not args.toy,
             "--task custom needs --data1, --data2 and --target, and has no --data and no --toy")
        where = [args.data1, args.data2]
        model = "late" if is_table(args.target) else "fcn"
    args.data = args.data or where
    args.model = args.model or model
    args.pretraining = read_sources(args.weights)
    if args.epochs is not None:
        tables.append((dict(steps=None), "--epochs"))
    if args.linear:
        tables.append(LINEAR.get(f"toy {args.model}" if args.toy else args.task, ({}, "")))
    if args.toy:
        tables.append((TOY_RECIPES[args.model], "--toy"))
    first = args.pretraining[0]
    if args.task == "custom" and "method" in first:
        tables.append((dict(backbone=first["backbone"], size=first["size"]), "--weights"))
    tables += RECIPES.get((args.task, args.model), [])
    sources, changed = fill_in(args, [*tables, (OTHER_SETTINGS, "default")])
    if args.modality and len(args.pretraining) == 2:
        args.pretraining = [args.pretraining[args.modality - 1]]
    check_transfer_flags(args, model)
    args.out = Path(args.out or f"runs/{name_run(args, changed)}")
    return sources, changed


def read_sources(files):
    """Returns for each encoder in --weights: its `file`, the settings of its pretraining, and what
    it `sees`, a row of MODALITIES; of weights of others only the file."""
    sources = []
    for file in files:
        settings, rows = read_pretraining(file)
        sources += [dict(settings, sees=row, file=file) for row in rows] or [dict(file=file)]
    return sources


def name_run(args, changed):
    """Returns the name of the default --out: TASK-MODEL-WEIGHTS-...-seedN, where ... are the
    settings that are not the defaults."""
    starts = []
    for file in args.weights:
        path = Path(file)                       # or none, imagenet
        ours = re.fullmatch(r"checkpoint\.pt|encoder[12]\.pth", path.name)
        starts.append(path.resolve().parent.name if ours else path.stem)
    task = f"toy-{args.task}" if args.toy else args.task
    words = [task, args.model, "-".join(dict.fromkeys(starts)), "linear" if args.linear else ""]
    if args.target:
        words.append(Path(args.target).stem)
    for name, value in changed.items():
        if name not in ("seed", "save_every", "save_images"):
            words.append(name if value is True else f"{name}{value}")
    words = [re.sub(r"[^\w.]+", "-", word).strip("-") for word in [*words, f"seed{args.seed}"]]
    return "-".join(word for word in words if word)


def check_transfer_flags(args, model):
    """Refuses settings that do not go together.  model: the task's."""
    custom, cmx, late = args.task == "custom", args.model == "cmx", args.model == "late"
    fits = args.model == model or (args.task, args.model) in RECIPES and not custom
    fits = fits or args.toy and args.task != "bigearthnet"
    need(fits, f"--task {args.task} has no --model {args.model}; give --model {model}")
    for name in ("data1", "data2", "as1", "as2", "target"):
        need(custom or not getattr(args, name), f"--{name} works only with --task custom")
    for name in ("ignore", "test_share"):
        need(custom or getattr(args, name) is None,
             f"--{name.replace('_', '-')} works only with --task custom")
    need(not custom or not Path(args.target).is_file() or is_table(args.target),
         f"--target {args.target} is a file, but no .csv; give {CSV_FORM}; or a folder of masks")
    need(not late or not args.save_images, f"--save-images works only with segmentation, but this "
         f"is --model {args.model}")
    for name in ("part", "cached"):
        need(not getattr(args, name) or args.linear and late,
             f"--{name} works only with --linear and --model late")
    need(not args.part or "K" in args.pretraining[0],
         "--part works only with the checkpoint.pt of a pretraining as --weights")
    need(not cmx or args.backbone in MITS and not args.modality,
         "--model cmx works only with a mit as --backbone and with both modalities")
    need(not custom or bool(args.split) == bool(args.test_split),
         "--split and --test-split are two files of names: give both, or neither")
    need(args.size >= 48 or args.backbone not in MITS,              # CMX also tests at scale 3/4
         f"--size {args.size} is too small for {args.backbone}; give 48 or more")


if __name__ == "__main__":
    run_main(main)
