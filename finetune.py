"""Transfers pretrained encoders to labelled tasks: one command gives one cell of Tables 1, 2 or 3.

    python finetune.py --task sunrgbd --toy --model late --linear \\
                       --weights runs/toy-rgbd-decur/checkpoint.pt          made-up scenes
    torchrun --nproc_per_node=4 finetune.py --task bigearthnet --linear --labels 0.01 \\
                       --weights runs/sar-optical-decur/checkpoint.pt       Table 1, first column
    python finetune.py --task geonrw --weights none          Supervised; with --linear: Rand. Init.
    python finetune.py --task custom --data1 A --data2 B --target masks \\
                       --weights runs/custom-decur/checkpoint.pt            your own labels
    python finetune.py --table runs/*                        lists runs, with means over seeds

The defaults are the settings of Sec. 5 and App. B.  Writes into --out:
    results.json         metrics, the metrics of a guess, scores and counts of each class, settings
    ids.txt              the names of the training samples
    checkpoint.pt        all that --resume needs
    log.jsonl            one line per logged step
    args.json            the settings, the command line, the machine
    images/              the pictures of --save-images
The metrics are measured on the whole test split after the last step, never at the best step.
"""
import argparse
import copy
import csv
import hashlib
import json
import math
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from data import (CLASSES19, MODALITIES, SCENE_CLASSES, SHAPES, add_flags, check_mask,
                  count_mask_values, draw_boxes, expand_path, filter_separably, find_images,
                  find_mask_warnings, find_warnings, in_processes, leave_group, make_toy,
                  make_triangle_filter, make_visible, move_to, need, normalise, number,
                  open_dataset, read_factors, read_json, read_lines, read_list, read_mask, reading,
                  resize, resize_array, run_main, show_progress, to_unit_range, write_text)
from decur import MITS, branch, mit, start_as_segformer
from pretrain import (FLAGS, Run, check_batch, check_equal, collect_settings, describe_input,
                      distribute, fill_in, find_checkpoint, join, leave, load_checkpoint,
                      make_loader, make_run_folder, measure_statistics, mixed_precision,
                      read_environment, read_pretraining, restore, start_from, warn_of_other_input)

GEONRW = ("forest", "water", "agricultural", "residential, commercial, industrial",
          "grassland, swamp, shrubbery", "railway", "highway, squares", "airport, shipyard",
          "roads", "buildings")
NYU40 = ("wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds "
         "desk shelves curtain dresser pillow mirror floor_mat clothes ceiling books fridge tv "
         "paper towel shower_curtain box whiteboard person night_stand toilet sink lamp bathtub "
         "bag otherstructure otherfurniture otherprop").split()
# scenario: the pretraining whose modalities the task has.
TASKS = {
    "bigearthnet": dict(scenario="sar-optical", data="data/bigearthnet", classes=tuple(CLASSES19)),
    "geonrw": dict(scenario="rgb-dem", data="data/rgb-dem", classes=GEONRW),
    "sunrgbd": dict(scenario="rgbd", data="data/rgbd", classes=tuple(NYU40[:37])),
    "nyuv2": dict(scenario="rgbd", data="data/nyuv2", classes=tuple(NYU40)),
    "custom": dict(),
}
# A recipe is a list of (settings, their source).  size: the height of a training crop in pixels.
# scale: the share of the frame's area that a crop covers.  modality: 1, 2, or 0 for both.
FCN_RGBD = [
    (dict(backbone="resnet50", modality=1, batch_size=8, steps=40000, optimizer="sgd", lr=0.01,
          weight_decay=1e-5, schedule="poly"), "paper, App. B"),
    (dict(momentum=0.9), "MMSegmentation, 40k"),  # its "poly" ends above 0, ours ends at 0
    (dict(size=480), "CMX, NYUv2"),             # CMX crops to 480x640
    (dict(scale=(0.5, 1.0)), "this project, as pretraining")]
# App. B: "the same settings of CMX".  CMX published settings only for NYUv2: 500 epochs of 100
# steps.  scale None: CMX's own crops, see `draw_cmx_boxes`.  test_scales: the test resizes an
# image to each of these scales, and mirrors each of them.
CMX_NYU = dict(modality=0, batch_size=8, optimizer="adamw", lr=6e-5, weight_decay=0.01,
               schedule="warm poly", size=480, scale=None, test_scales=(0.75, 1.0, 1.25))
TINY = dict(backbone="resnet-toy", modality=0, size=48)
OWN = dict(modality=0, batch_size=32, epochs=50, optimizer="adamw", lr=1e-4, weight_decay=0.01,
           schedule="poly", scale=(0.5, 1.0), test_crop=1.0, split=None, test_split=None,
           ignore=255)
RECIPES = {                                     # by task and model; the first is the default
    ("bigearthnet", "late"): [
        (dict(backbone="resnet50", batch_size=256, epochs=100, optimizer="sgd", lr=0.05,
              weight_decay=0.0, momentum=0.9, schedule="steps", scale=(0.8, 1.0)), "paper, App. B"),
        (dict(size=224, test_crop=224 / 256), "authors")],  # test: the middle 224 of 256
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
    ("custom", "late"): [(OWN, "this project")],
    ("custom", "fcn"): [(OWN, "this project")],
    ("toy", "late"): [(TINY | dict(batch_size=64, epochs=20, optimizer="sgd", lr=0.05,
                                   weight_decay=0.0, momentum=0.9, schedule="steps",
                                   scale=(0.8, 1.0), test_crop=1.0), "--toy")],
    ("toy", "fcn"): [(TINY | dict(batch_size=32, epochs=8, optimizer="adamw", lr=1e-3,
                                  weight_decay=0.01, schedule="poly", scale=(0.5, 1.0)), "--toy")],
    ("toy", "cmx"): [(CMX_NYU | TINY | dict(backbone="mit_b0", batch_size=16, epochs=4, lr=1e-3,
                                            embed=64), "--toy")],
}
# With --linear, these settings come before those of RECIPES.
LINEAR = {
    ("bigearthnet", "late"): [(dict(lr=0.5), "paper, App. B")],
    ("custom", "late"): [(dict(lr=1e-2), "this project")],
    ("custom", "fcn"): [(dict(lr=1e-2), "this project")],
    ("toy", "late"): [(dict(lr=0.5), "--toy")], ("toy", "fcn"): [(dict(lr=1e-2), "--toy")],
}
OTHER_SETTINGS = dict(backbone="resnet50", size=224, epochs=None, steps=None, test_crop=None,
                      part=None, test_scales=(1.0,), embed=512, split="train", test_split="test",
                      modality=0, labels=1.0, seed=0, depth_unit=1000.0, save_every=10.0,
                      save_images=0)


# ---- the protocol ----

def train(run, net, model, args, inputs):
    """Trains as in App. B.  Frozen encoders stay in evaluation mode, because in training mode batch
    norms would change their statistics."""
    precision = nullcontext() if args.model == "cmx" else mixed_precision(run.device)
    for batch in run.batches():
        net.train()
        if args.linear:
            for E in net.encoders:
                E.eval()
        x, target = prepare_batch(batch, args, inputs, run.device, run.draws)
        with precision:                         # CMX trains without autocast, as published
            logits = model(*x)                  # NxC, or NxCxHxW
        loss = compute_transfer_loss(logits, target, run.world)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.log(sum_over_processes(loss.detach()) / run.world)


def compute_transfer_loss(logits, target, world):
    """Returns MultiLabelSoftMarginLoss, or CrossEntropyLoss of the samples or pixels that have a
    label.  Both are means over the global batch."""
    if target.is_floating_point():              # NxC, 0 or 1
        return F.multilabel_soft_margin_loss(logits.float(), target)
    labelled = sum_over_processes((target >= 0).sum().float()).clamp(min=1)
    total = F.cross_entropy(logits.float(), target, ignore_index=-1, reduction="sum")
    return total * world / labelled             # DistributedDataParallel will divide by `world`


@torch.no_grad()
def test(net, data, train_counts, args, device, rank=0, world=1):
    """Tests on the whole split; each process takes a share of the samples.  Returns what
    `summarise` makes of the counts of all processes."""
    if world > 1 and device.type == "cpu":      # CPU processes have different batch statistics
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    net.eval()
    n, C = len(data), len(data.classes)
    first, last = rank * n // world, (rank + 1) * n // world
    total = torch.zeros(C, C, dtype=torch.int64, device=device)     # rows: labels
    if data.kind == "multi-label":
        # scores and labels; rows of other processes' samples stay 0, so a sum joins all processes
        total = torch.zeros(2, n, C, device=device)
    i = first                                   # the index of the next sample
    for x, target in read_batches(data, np.arange(first, last), args, device, world, "test"):
        scores = compute_scores(net, x, args.test_scales)           # NxC, or NxCxHxW
        if target.ndim == 3 and scores.shape[2:] != target.shape[1:]:
            scores = F.interpolate(scores, target.shape[1:], mode="bilinear")
        if data.kind == "multi-label":
            total[:, i:i + len(scores)] = torch.stack((scores, target))
        else:
            total += count_confusions(scores.argmax(1), target, C, -1)
        for k in range(min(len(scores), args.save_images - i)):
            images = [batch[k] for batch in x]
            save_prediction(args, data, i + k, images, target[k], scores[k])
        i += len(scores)
    return summarise(data, sum_over_processes(total).cpu(), train_counts)


def sum_over_processes(t):
    """Sums a tensor over the processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def compute_scores(net, x, scales):
    """Returns the logits for one scale, or the scores of CMX's evaluation for several scales.

    CMX adds the logits of the image and of its mirror image for each scale, then adds the
    exponentials of these sums.
    CMX tests frames above 480x640 (scale 1.25) by sliding windows.  Here the frame is tested as a
    whole."""
    if tuple(scales) == (1.0,):
        return net(*x).float()
    size, sums = x[0].shape[-2:], []
    for scale in scales:
        scaled_size = [round(scale * n) for n in size]
        scaled = [F.interpolate(images, scaled_size, mode="bilinear") for images in x]
        mirrored = [images.flip(-1) for images in scaled]
        sums.append(net(*scaled).float() + net(*mirrored).flip(-1).float())
    top = torch.stack([t.amax((1, 2, 3), keepdim=True) for t in sums]).amax(0)  # Nx1x1x1
    # exp(89) is infinite in float32.  A shift keeps the order of the classes, but scores that are
    # more than about 180 below the largest become 0.
    excess = (top - 80).clamp(min=0)
    return sum(F.interpolate((t - excess).exp(), size, mode="bilinear") for t in sums)


def scale_rate(name, step, steps):
    """Returns the factor of the learning rate at a step."""
    if name == "steps":                         # App. B: "by factor 10 at 60 and 80 epochs" of 100
        return 0.1 ** sum(10 * step >= tenths * steps for tenths in (6, 8))
    if name == "constant":
        return 1.0
    warm = steps // 50 if name == "warm poly" else 0  # CMX: the rate rises for 10 of 500 epochs
    return step / warm if step < warm else (1 - step / steps) ** 0.9


def make_transfer_optimizer(net, args):
    """Returns SGD or AdamW for the parameters that are trained."""
    trained = [p for p in net.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim < 2]  # biases and norms
    decay = 0.0 if args.model == "cmx" else args.weight_decay       # CMX does not decay others
    groups = [dict(params=weights), dict(params=others, weight_decay=decay)]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, args.momentum, weight_decay=args.weight_decay)
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)


# ---- models ----

class LateFusion(nn.Module):
    """Classifies as in App. B, SAR-optical: concatenates pooled features, then one linear layer.

    encoders    modules NxCxHxW -> NxD
    part        the slice of each encoder's output that is used
    dims        the width of this slice, for each encoder
    Call: NxCxHxW for each encoder -> NxC logits."""

    def __init__(self, encoders, dims, num_classes, part=slice(None)):
        super().__init__()
        self.encoders, self.part = nn.ModuleList(encoders), part
        self.fc = nn.Linear(sum(dims), num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # as in the authors' code
        nn.init.zeros_(self.fc.bias)

    def encode(self, *images):
        return torch.cat([E(x)[:, self.part] for E, x in zip(self.encoders, images)], 1)

    def forward(self, *images):
        return self.fc(self.encode(*images))


class FCN(nn.Module):
    """Segments as in App. B, RGB-DEM.  For each of the last three stages, the maps of all encoders
    are concatenated, upsampled to the input's size and convolved (1x1).  The three results are
    added.

    Call: NxCxHxW for each encoder -> NxCxHxW logits.
    Paper: maps are upsampled, then convolved, which needs 7168 channels of 224x224.
    Here: maps are convolved, then upsampled.  The result is the same, because both operations are
    linear and bilinear weights sum to 1."""

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
    """Rectifies features (CMX's Eq. 1-5): adds to each modality the other modality, weighted by
    channel and by pixel."""

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
    """Fuses features (CMX's Eq. 6-9) by cross attention, then by a residual mix of channels."""

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
        # NxHWxC: each modality attends to the context of the other modality
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
    """Segments with CMX and its MLP decoder, which is `embed` wide.

    Call: NxCxHxW, NxCxHxW -> NxCxHxW logits.
    The batch norm of the decoder has eps 1e-5 here.  CMX has 1e-3 in training and 1e-5 in tests."""

    def __init__(self, name, num_classes, channels=(3, 3), embed=512, dropout=0.1):
        super().__init__()
        # A tuple is not registered as a module.  `backbone` registers the encoders by CMX's names.
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


# ---- metrics of the whole data set (not means over batches) ----

def average_precision(scores, labels):
    """Returns sum_n (R_n - R_{n-1}) P_n, the area under precision over recall, or None if no label
    is positive.  All decisions are in one ranking, where equal scores share one threshold.

    scores, labels    of one shape.  For NxC, the result is mAP "micro"."""
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
    mAP "macro" is the mean of the AP over the classes that have a positive label."""
    each = [average_precision(s, y) for s, y in zip(scores.T, labels.T)]
    defined = [value for value in each if value is not None]
    macro = math.fsum(defined) / len(defined) if defined else None
    return {"mAP micro": average_precision(scores, labels), "mAP macro": macro}, each


def count_confusions(pred, gt, num_classes, ignore):
    """Returns CxC counts: rows are labels, columns are predictions.  Labels equal to `ignore` are
    not counted.  They get a bin of their own, because selecting the other labels takes longer."""
    bins = num_classes ** 2
    bin_of_each = torch.where(gt == ignore, bins, num_classes * gt.long() + pred)
    counts = bin_of_each.flatten().bincount(minlength=bins + 1)
    return counts[:bins].view(num_classes, num_classes)


def compute_counting_metrics(matrix, kind):
    """Returns the metrics of a confusion matrix, and the score of each class: its IoU, or in
    single-label tasks its accuracy.  Classes without a score are not in the mean."""
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
    """Returns mIoU and pixel accuracy, both None if no pixel has a label.

    pred, gt    classes, of one shape; pixels whose label equals `ignore` do not count"""
    counts = count_confusions(pred, gt, num_classes, ignore)
    metrics, _ = compute_counting_metrics(counts, "segmentation")
    return metrics["mIoU"], metrics["accuracy"]


def summarise(data, total, train_counts):
    """Returns the results as a dict: `metrics`; `guess`, the same metrics of a guess that never
    looks at the image; `classes`, the score of each class; `train_labels` and `test_labels`, the
    number of labels of each class.

    total           scores and labels of a multi-label task (2xNxC), or confusions (CxC)
    train_counts    the number of training samples of each class; of its pixels, if labels are masks
    In a multi-label task, the guess ranks the classes by how often they occur in training.  In
    other tasks, the guess is always the class that is most frequent in training."""
    if data.kind == "multi-label":
        scores, labels = total                                      # NxC each
        metrics, each = compute_ranking_metrics(scores, labels)
        guess, _ = compute_ranking_metrics(train_counts.float().expand_as(labels), labels)
        test_counts = labels.sum(0).long()
    else:
        metrics, each = compute_counting_metrics(total, data.kind)
        test_counts, guessed = total.sum(1), torch.zeros_like(total)
        guessed[:, train_counts.argmax()] = test_counts
        guess, _ = compute_counting_metrics(guessed, data.kind)
    columns = dict(classes=each, train_labels=train_counts.tolist(),
                   test_labels=test_counts.tolist())
    result = {name: dict(zip(data.classes, values)) for name, values in columns.items()}
    return dict(metrics=metrics, guess=guess, **result)


# ---- the model of a run, and weights into it ----

def build_model(args, data):
    """Returns the model that the settings ask for, and lines about the weights of its encoders."""
    sample, modalities, num_classes = data[0], select_modalities(args), len(data.classes)
    channels = [sample[m].shape[0] for m in modalities]
    if args.part:
        rows = [data.inputs[m] for m in modalities]
        return build_with_projectors(args, channels, num_classes, rows)
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
    return net, start_from(args.weights, net.encoders, args, [data.inputs[m] for m in modalities])


def build_with_projectors(args, channels, num_classes, rows):
    """Returns late fusion for --part, and lines about it.  The model classifies a part of the
    embeddings instead of the encoders' features.

    rows    the rows of MODALITIES that the model will see"""
    file, branches = args.weights[0], nn.ModuleDict()
    with reading(file, "a checkpoint.pt of pretrain.py for these images", "give other --weights"):
        checkpoint = load_checkpoint(file)
        settings, state = checkpoint["settings"], checkpoint["model"]
        K, Kc = settings["K"], settings["Kc"]
        need(not settings["modality"], f"{file} has one encoder, so no dimension is common. Leave "
             f"--part out")
        check_equal(vars(args), settings, ["backbone"], "--part", f"{file}. Give its --backbone")
        for m, c in zip(select_modalities(args), channels):
            branches[f"f{m + 1}"] = branch(args.backbone, c, settings["widths"])
        branches.load_state_dict({key: t for key, t in state.items() if key[:2] in branches})
    start, stop = {"common": (0, Kc), "unique": (Kc, K), "all": (0, K)}[args.part]
    need(start < stop, f"--part {args.part} is empty, because {Kc} of the {K} dimensions of {file} "
         f"are common. Give another --part")
    dims = [stop - start] * len(branches)
    net = LateFusion(branches.values(), dims, num_classes, slice(start, stop))
    lines = [f"{file}: {args.part} dimensions, {stop - start} of each modality's {K}"]
    for m, row in zip(select_modalities(args), rows):
        lines += warn_of_other_input(file, settings["inputs"][m], row)
    return net, lines


# ---- samples ----

class Labelled:
    """Holds the samples of a task: (x1, x2, target).

    kind          "multi-label": a target is C zeros and ones
                  "single-label": a target is a class, counted from 0
                  "segmentation": a target is HxW classes, counted from 0; -1 is no label
    read_label    a function that returns the label of a name, without reading an image.  In labels,
                  classes are counted from 1 and 0 is no label, except for multi-label"""

    def __init__(self, data, classes, kind, read_label):
        self.data, self.classes, self.kind, self.read_label = data, classes, kind, read_label
        self.ids, self.inputs, self.epoch = data.ids, data.inputs, 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        self.data.epoch = self.epoch            # seasons change with the epoch
        x1, x2, *label = self.data[i]
        if not label:                           # an item of pretraining: take the first views
            x1, x2, label = x1[0], x2[0], [self.read_label(self.ids[i])]
        if x1.shape[-2:] != x2.shape[-2:]:      # own images; one box is cut from both
            x2 = torch.from_numpy(resize_array(x2.numpy(), x1.shape[-2:]))
        if self.kind == "multi-label":
            return x1, x2, label[0]
        if self.kind == "segmentation":
            check_mask(self.ids[i], label[0], x1.shape[-2:], len(self.classes))
        return x1, x2, label[0] - 1

    def count_labels(self, i):
        """Returns C counts: the pixels of each class in a mask, or 1 for each class of an image."""
        label = torch.as_tensor(self.read_label(self.ids[i]))
        if self.kind == "multi-label":
            return label.long()
        return label.flatten().bincount(minlength=len(self.classes) + 1)[1:]


def open_task(args, rank):
    """Opens the data sets of both splits.  Returns them, and lines about them."""
    if args.task == "custom":
        both, lines = open_custom_task(args)
    else:
        both, lines = open_published_task(args, rank), []
    modalities, default = both[0].data.modalities, args.pretraining[0].get("depth_unit", 1000)
    need("depth" in modalities or args.depth_unit in (1000, default), f"--depth-unit has no effect "
         f"on {' and '.join(modalities)}. Leave --depth-unit out")
    shared = sorted(set(both[0].ids) & set(both[1].ids))
    need(not shared, f"--split {args.split} and --test-split {args.test_split} share "
         f"{len(shared)} names, such as {' '.join(shared[:1])}. Test on names that are not trained "
         f"on")
    return both, lines


def open_published_task(args, rank):
    """Opens the data sets of both splits, or the made-up scenes that stand for them."""
    task, name, size, both = TASKS[args.task], args.task, args.size, []
    kind = "multi-label" if args.model == "late" else "segmentation"
    classes, labels = task["classes"], None
    if task["scenario"] == "rgbd":
        size = math.ceil(2 * size / 3)          # the canvas is 3/2 as high as its `size`
    if args.toy:
        make_toy(task["scenario"], args.data, rank=rank)
        classes = SCENE_CLASSES
    if args.toy and args.model == "late":       # the label says which objects are in the scene
        name, classes, labels = task["scenario"], SCENE_CLASSES[1:], {}
        for scene, shapes in read_factors(args.data).items():       # 3 objects
            labels[scene] = F.one_hot(torch.tensor(shapes), len(SHAPES)).flatten().float()
    for split in (args.split, args.test_split):
        data = open_dataset(name, args.data, size, split, args.depth_unit,
                            classes=None if labels else len(classes))
        if kind == "multi-label":
            read_label = (labels or data.labels).get
        else:
            read_label = partial(read_classes, data.files[2], range(1, len(classes) + 1))
        both.append(Labelled(data, classes, kind, read_label))
    return both


def read_classes(files, values, name):
    """Reads the mask of a name.  Returns k + 1 where the mask has the value values[k], otherwise 0.
    The values are sorted."""
    mask, values = read_mask(files[name]), np.array(values)
    k = np.searchsorted(values, mask).clip(max=len(values) - 1)
    return torch.from_numpy(np.where(values[k] == mask, k + 1, 0))


def choose_subset(n, fraction, seed):
    """Returns the first part of a seeded permutation of 0..n-1, for --labels.  A smaller subset is
    contained in each larger subset of the same seed."""
    return np.random.default_rng(seed).permutation(n)[:max(1, round(fraction * n))]


def select_modalities(args):
    """Returns the indices of the modalities that the model sees."""
    return [args.modality - 1] if args.modality else [0, 1]


def read_batches(data, indices, args, device, world, text):
    """Yields the samples once, in their order, not augmented.  text: the progress bar's text."""
    loader = DataLoader(Subset(data, indices.tolist()), max(1, args.batch_size // world),
                        num_workers=args.workers, worker_init_fn=leave_group,
                        pin_memory=device.type == "cuda")
    for batch in show_progress(loader, desc=text):
        yield prepare_batch(batch, args, data.inputs, device)


@torch.no_grad()
def compute_features(net, data, indices, args, device):
    """Returns a data set of features and targets, for --cached.  The features of each training
    sample are computed once, without augmentation."""
    net.eval()
    features, targets = [], []
    for x, target in read_batches(data, indices, args, device, 1, "features"):
        features.append(net.encode(*x).cpu())
        targets.append(target.cpu())
    return TensorDataset(torch.cat(features), torch.cat(targets))


# ---- augmentation: one box for both modalities and the mask ----

def draw_cmx_boxes(B, H, W, draws):
    """Draws boxes as CMX does: a frame is scaled by one of six factors, then cropped or padded to
    its former size.  Returns top, left, height, width and flip, each Bx1."""
    u = draws(4).double()
    factors = torch.tensor([0.5, 0.75, 1, 1.25, 1.5, 1.75], dtype=u.dtype)
    s = factors[(6 * u[:, :1]).long()]          # Bx1
    starts = []
    for n, v in ((H, u[:, 1:2]), (W, u[:, 2:3])):
        spare = (s * n).round() - n             # Bx1, scaled pixels; below 0: padding
        starts.append(torch.where(spare >= 0, (v * (spare + 1)).floor(), (spare / 2).ceil()) / s)
    return *starts, H / s, W / s, u[:, 3:] < 0.5


def resample_boxes(x, boxes, size):
    """Cuts a box out of each image or mask, resizes it to `size`, and mirrors it if flip is 1.

    x      BxCxHxW float: resized by a triangle filter as in pretraining; 0 outside of the image
           or BxHxW classes: resized by the nearest pixel; -1 outside of the mask
    boxes  Bx5 float on the device of x: top, left, height, width, flip"""
    top, left, h, w, mirrored = boxes.split(1, 1)                   # Bx1 each
    H, W = x.shape[-2:]
    if x.is_floating_point():
        Wy = make_triangle_filter(top, h, H, size[0]).nan_to_num(0)  # NaN: outside
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
    """Returns what the model sees of a batch, a list of NxCxHxW, and the target.

    With draws, images and target are augmented.  Without draws, the model sees the whole frame.  If
    test_crop is set, it sees the middle of the frame, resized to the size of the training crops;
    masks stay as they are."""
    *x, target = [move_to(t, device) for t in batch]
    if args.cached and draws:                   # x is a batch of features
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


# ---- --task custom: the user's own pairs and labels ----

CSV_FORM = ("one `name,label` per line, such as `scene7,forest`. A name with several labels has "
            "several lines. The first line may be the header `name,label`")


def open_custom_task(args):
    """Opens the user's own pairs and labels.  Returns the samples of both splits, and lines about
    them."""
    pairs, lines = open_own_pairs(args)
    if args.model == "late":
        named, describe = read_label_table(args.target), describe_labels
    else:
        need(not Path(args.target).is_file(), f"--target {args.target} is not a csv. Give a folder "
             f"or a pattern of masks, or a file NAME.csv with {CSV_FORM}")
        named = find_images(args.target, (".png", ".tif", ".tiff", ".npy"))
        describe = describe_masks
    names = dict.fromkeys(pairs.ids)
    unpaired = [name for name in named if name not in names]
    remedy = "Give masks with the names of the pairs, or a pattern such as 'masks/*_mask.png'"
    if args.model == "late":
        remedy = "Write the names of the pairs. If this line is a header, write it as `name,label`"
    need(not unpaired, f"--target {args.target} has a label for {' '.join(unpaired[:1])!r}, but no "
         f"pair has this name. The first pair is {pairs.ids[0]!r}. {remedy}")
    classes, kind, read_label, more = describe(args, named)
    remedy = "Give labels of two classes or more"
    if kind == "segmentation" and args.ignore >= 0:
        remedy += f". If {args.ignore} is the value of a class in these masks, give --ignore -1"
    need(classes, f"--target {args.target} has no class. {remedy}")
    need(len(classes) > 1, f"--target {args.target} has only the class {''.join(classes)!r}. "
         f"{remedy}")
    both = []
    for part in split_names(args, pairs.ids, named):
        need(part, f"--target {args.target} labels none of the pairs of one split. Add labels, or "
             f"give other --split and --test-split")
        data = copy.copy(pairs)
        data.ids = part
        both.append(Labelled(data, classes, kind, read_label))
    lines.append(f"pairs with a label: {len(named)} of {len(pairs)}; the task is {kind} with "
                 f"{len(classes)} classes")
    if not args.split:
        lines.append("the test split is a random fifth. If tiles of one scene, or frames of one "
                     "place, are in both splits, the scores are too high. Then give --split and "
                     "--test-split")
    return both, lines + more


def open_own_pairs(args):
    """Opens the images of --data1 and --data2.  Returns them, and lines about them.

    If the encoders were pretrained on own images, images are normalised as in that pretraining.
    Otherwise --as1 and --as2 say what the images are."""
    inputs, reduced = None, args.model == "late"  # a mask has the full size of its image
    if all(pretraining.get("scenario") == "custom" for pretraining in args.pretraining):
        inputs = [pretraining["sees"] for pretraining in args.pretraining]
        if len(inputs) == 1:                    # the model does not see the other modality
            inputs = args.pretraining[0]["inputs"]
    pairs = open_dataset("custom", [args.data1, args.data2], args.size,
                         depth_unit=args.depth_unit, inputs=inputs, declared=(args.as1, args.as2),
                         reduce=reduced)
    lines = list(pairs.notes)
    for m, pretraining in zip(select_modalities(args), args.pretraining):
        seen = pretraining.get("sees", pairs.inputs[m])["name"]
        if seen in MODALITIES and seen != pairs.inputs[m]["name"]:
            lines.append(f"warning: the encoder of modality {m + 1} was trained on {seen}. If the "
                         f"images of --data{m + 1} are {seen}, give --as{m + 1} {seen}")
    return pairs, lines


def read_label_table(file):
    """Reads lines `name,label`.  Returns {name: the set of its labels}.  The set is empty if the
    label is empty."""
    labels = {}
    with reading(file, "a csv"):
        lines = [line for line in read_lines(file) if line != "name,label"]
        for cells in csv.reader(lines, strict=True):
            need(len(cells) == 2, f"{file} has {len(cells)} columns in the line {cells}. Give "
                 f"{CSV_FORM}")
            name, label = [cell.strip() for cell in cells]
            labels.setdefault(name, set()).update({label} - {""})
    return labels


def describe_labels(args, labels):
    """Returns the classes, the kind of the task, a function name -> label, and lines to print.

    labels    {name: the set of its labels}, from `read_label_table`"""
    classes, label_of = sorted(set().union(*labels.values())), {}
    kind, lines = "single-label", []
    not_single = [name for name, own in labels.items() if len(own) != 1]
    if not_single:
        kind = "multi-label"
        lines.append(f"names with several labels or none: {len(not_single)} of {len(labels)} in "
                     f"--target, such as {not_single[0]}. So the task is multi-label")
    for name, own in labels.items():
        ones = torch.tensor([float(label in own) for label in classes])
        label_of[name] = ones if not_single else ones.argmax() + 1
    joined = [c for c in classes if set(re.split(r"[|;,/&+ ]+", c)) <= set(classes) - {c}]
    if joined:
        lines.append(f"warning: the class {joined[0]!r} looks like several labels in one. If that "
                     f"is so, write {CSV_FORM}")
    return classes, kind, label_of.get, lines


def describe_masks(args, files):
    """Returns the same as `describe_labels`, for masks.  Each value except --ignore is a class.

    files    {name: path of its mask}"""
    counts = count_mask_values(files)
    total = sum(pixels for pixels, _ in counts.values())
    counts = {value: n for value, n in counts.items() if value >= 0 and value != args.ignore}
    shares = {value: pixels / total for value, (pixels, _) in counts.items()}
    values = ", ".join(f"{value} ({share:.2%})" for value, share in shares.items())
    lines = [f"classes in the masks: {values}. {1 - sum(shares.values()):.2%} of the pixels have "
             f"no label, because their value is {args.ignore} (--ignore), negative, or no data"]
    lines += [f"warning: {warning}" for warning in find_mask_warnings(counts)]
    classes = [str(value) for value in counts]
    return classes, "segmentation", partial(read_classes, files, list(counts)), lines


def split_names(args, ids, named):
    """Returns names to train on and names to test on, from the lists --split and --test-split.
    Without lists, --seed draws a random fifth of the names to test on.  Names without a label are
    left out.

    ids, named    the names of the pairs, and {name: label}"""
    if not args.split:
        ids = [name for name in ids if name in named]
        held_out = [ids[i] for i in sorted(choose_subset(len(ids), 0.2, args.seed))]
        return sorted(set(ids) - set(held_out)), held_out
    both = []
    for file in (args.split, args.test_split):
        listed = read_list(Path(file), dict.fromkeys(ids))
        both.append([name for name in listed if name in named])
    return both


# ---- pictures ----

def save_prediction(args, data, i, x, target, scores):
    """Draws inputs, label and prediction side by side.  The names of the classes are below, each in
    its colour."""
    names = ["no label", *data.classes]
    # Steps of the golden angle keep the hues of any number of classes apart.
    colours = [ImageColor.getrgb(f"hsv({222 * k % 360}, 75%, {95 if k % 2 else 75}%)")
               for k in range(len(names))]
    colours[0] = (80, 80, 80)
    colours = np.array(colours, np.uint8)
    labels = [target.cpu().numpy() + 1, scores.argmax(0).cpu().numpy() + 1]  # HxW each
    panels = []
    for image, m in zip(x, select_modalities(args)):
        image = resize(image[None].float(), target.shape)[0]
        panels.append(np.uint8(255 * make_visible(image, data.inputs[m])))
    panels += [colours[label] for label in labels]
    wide = Image.fromarray(np.concatenate(panels, 1))
    wide = ImageOps.scale(wide, max(1, 256 // wide.height), Image.Resampling.NEAREST)
    inputs = "input" if len(x) == 1 else f"{len(x)} inputs"
    legend = [(f"{data.ids[i]}: {inputs}, label, prediction", (255, 255, 255))]
    legend += [(names[k], tuple(colours[k].tolist())) for k in np.unique(labels)]
    sheet = ImageOps.expand(wide, (0, 0, 0, 20 * len(legend)))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for line, (text, colour) in enumerate(legend):
        draw.text((4, wide.height + 20 * line), text, colour, font)
    (args.out / "images").mkdir(exist_ok=True)
    sheet.save(args.out / "images" / f"{data.ids[i]}.png")


# ---- a run ----

def main(argv=None):
    args, sources = get_args(argv)
    if args.table:
        return print_table(args.table)
    rank, world, device = process = read_environment()
    checkpoint = find_checkpoint(args.out, args.resume)             # or None
    step = checkpoint["step"] if checkpoint else 0
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for CMX and for tests

    # ---- data ----
    (data, test_data), lines = open_task(args, rank)
    chosen = choose_subset(len(data), args.labels, args.seed)
    check_batch(args.batch_size, len(chosen), world)
    args.steps = args.steps or args.epochs * (len(chosen) // args.batch_size)

    # ---- model ----
    torch.manual_seed(args.seed)
    net, more = build_model(args, data)
    move_net(net, device)
    if args.linear:
        freeze(net, data, chosen, args, device, resumed=bool(checkpoint))
    optimizer = make_transfer_optimizer(net, args)
    settings = collect_settings(
        args, weights_sha256=[hash_file(file) for file in args.weights if Path(file).is_file()],
        samples=len(chosen), test_samples=len(test_data), class_names=list(data.classes))
    if checkpoint:
        restore(checkpoint, args.out, net, optimizer, settings)
    counts = count_classes(data, chosen[rank::world], args.workers)

    # ---- run; the loader's workers start before the processes are connected ----
    trained, samples, indices = net, data, chosen
    if args.cached:                             # the same loop trains only the linear layer
        trained, indices = net.fc, np.arange(len(chosen))
        samples = compute_features(net, data, chosen, args, device)
    loader = make_loader(args, samples, indices, step, args.steps, process)
    join(args.out, step, process)
    model = distribute(trained, world, device)
    # `distribute` has given all processes the batch statistics of the first process
    frozen = [copy.deepcopy(E.state_dict()) for E in net.encoders] if args.linear else []
    counts = sum_over_processes(counts.to(device)).cpu()
    need(counts.any(), "no training sample has a label. Give more --labels, or another --seed")
    warnings = find_warnings(data.data)         # reads images, so before --out is made
    if rank == 0:
        make_run_folder(args, settings, process)
    run = Run(args, settings, net, optimizer, loader, step, args.steps,
              len(indices) // args.batch_size, partial(scale_rate, args.schedule), process)
    lines += more + describe_training(args, data, counts.tolist(), len(chosen))
    run.print_start(sources, lines, warnings)
    train(run, net, model, args, data.inputs)
    if not run.stopped:
        check_frozen(net, frozen)               # `test` may change batch statistics on CPUs
        result = test(net, test_data, counts, args, device, rank, world)
        finish(run, result, sorted(data.ids[i] for i in chosen))
    leave()
    return 128 + run.stopped if run.stopped else 0  # the exit code of a signal


def move_net(net, device):
    """Moves net to the device.  On a GPU, convolutions in bf16 are faster if channels are last."""
    if device.type == "cuda":
        net.to(device, memory_format=torch.channels_last, non_blocking=True)
    else:
        net.to(device)


def hash_file(path):
    """Returns the sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def count_classes(data, indices, workers):
    """Returns C counts of the labels of these samples: images of a class, or pixels in masks."""
    total = torch.zeros(len(data.classes), dtype=torch.int64)
    for counts in in_processes(data.count_labels, indices.tolist(), workers, "classes"):
        total += counts
    return total


def describe_training(args, data, counts, n):
    """Returns lines: how many samples are trained on, and warnings about labels and weights."""
    lines = [f"trains on {n} of {len(data)} training samples"]
    lines += warn_of_missing_classes(data.classes, counts, "training")
    for source in args.pretraining:
        if source.get("stopped"):
            lines.append(f"warning: the pretraining {source['file']} was stopped "
                         f"{source['stopped']}. To finish it, give its command with --resume")
    return lines


def warn_of_missing_classes(classes, counts, where):
    """Returns a list of one warning that names the classes without a label, or an empty list."""
    missing = [name for name, n in zip(classes, counts) if not n]
    if not missing:
        return []
    return [f"warning: classes without a {where} sample ({len(missing)} of {len(classes)}): "
            f"{', '.join(missing)}"]


def freeze(net, data, chosen, args, device, resumed):
    """Freezes the encoders.  The batch statistics of random encoders are measured on what they see.
    A resumed run has these statistics in its checkpoint."""
    for E in net.encoders:
        E.requires_grad_(False)
    if args.weights == ["none"] and args.model != "cmx" and not resumed:  # CMX: layer norms
        n = args.batch_size * min(20, len(chosen) // args.batch_size)
        batches = read_batches(data, chosen[:n], args, device, 1, "statistics")
        measure_statistics(net, (x for x, _ in batches))


def check_frozen(net, frozen):
    """Ends the run unless every encoder equals the copy of its state in `frozen`."""
    for state, E in zip(frozen, net.encoders):
        if not all(torch.equal(t, state[name]) for name, t in E.state_dict().items()):
            sys.exit("a frozen encoder has changed in training, so no results are written. This is "
                     "a fault in the code. Please report it")


def finish(run, result, ids):
    """Writes results.json and ids.txt.  Prints each score with the score of a guess beside it."""
    args = run.args
    result |= run.settings
    result |= dict(pretraining=args.pretraining, run=identify_run(args, run.settings))
    if run.rank == 0:
        write_text(args.out / "ids.txt", "".join(f"{name}\n" for name in ids))
        write_text(args.out / "results.json", json.dumps(result, indent=1))
    trained, tested = result["train_labels"], result["test_labels"]
    run.print(f"  {'class':36s} {'score':>6s} {'labels in training':>20s} {'in test':>14s}")
    for name, score in zip(trained, to_percent(result["classes"].values())):
        run.print(f"  {name:36s} {score:6.1f} {trained[name]:20d} {tested[name]:14d}")
    run.print(*warn_of_missing_classes(tested, tested.values(), "test"))
    if args.linear:
        run.print("the weights of the frozen encoders have not changed")
    run.print(f"{format_scores([result])}  test samples: {result['test_samples']}",
              "a guess: the score of a prediction from the classes' frequencies in training alone",
              f"wrote {args.out}/results.json")


# ---- --table: what was run ----

METHOD_NAMES = dict(barlowtwins="Barlow Twins (w/o intra&decoup.)", vicreg="VICReg",
                    simclr="SimCLR-cross", clip="CLIP")
# Names in Table 4 by (no_intra, common == 1): DeCUR, and DeCUR without one part or without both
DECUR_NAMES = {(False, False): "DeCUR", (True, False): "w/o intra", (False, True): "w/o decoup.",
               (True, True): METHOD_NAMES["barlowtwins"]}
TITLE = ("task", "model", "weights", "protocol", "labels")  # these begin each line
# Two runs that differ only in these settings share a line.  They are seeds, or follow from others.
NOT_COMPARED = ("seed", "weights_sha256", "file", "inputs", "sees", "channels", "modalities",
                "widths", "K", "Kc", "steps")


def identify_run(args, settings):
    """Returns {name: value} of everything that makes two runs different, except their seeds.  Files
    are compared by their content, pretrainings by their settings."""
    run = dict(settings, data=args.data)
    if args.task == "custom":
        for name in ("data1", "data2", "target", "split", "test_split"):
            run[name] = name_file(getattr(args, name))
    for m, source in enumerate(args.pretraining, 1):
        run |= {f"pretraining {m} {name}": value for name, value in source.items()}
    run = {name: str(run[name]) for name in run if name.split()[-1] not in NOT_COMPARED}
    weights = dict.fromkeys(name_weights(source) for source in args.pretraining)
    return run | dict(task=f"toy {args.task}" if args.toy else args.task,
                      weights=" and ".join(weights), labels=f"{100 * args.labels:g}% of the labels",
                      protocol="linear" if args.linear else "fine-tuned")


def name_weights(source):
    """Returns the paper's name of an encoder's pretraining; for weights of others, the file."""
    if "method" not in source:
        return name_file(source["file"])
    if source.get("modality"):
        return f"{source['method']} of modality {source['modality']}"
    if source["method"] == "decur":
        return DECUR_NAMES[source["no_intra"], source["common"] == 1]
    return METHOD_NAMES[source["method"]]


def name_file(path):
    """Returns the name of a file with a hash of its content, or the path of a folder or pattern."""
    if path and Path(path).is_file():
        return f"{Path(path).name} ({hash_file(path)[:8]})"
    return str(path)


def print_table(folders):
    """Prints one line for each group of runs that differ only by their seeds.

    A line begins with the values of TITLE.  If other lines have the same title, the settings follow
    in which these lines differ.  Then the scores follow."""
    groups, values = {}, {}
    for file in [Path(folder) / "results.json" for folder in folders]:
        need(file.parent.exists(), f"--table: there is no folder {file.parent}. Give the --out of "
             f"runs")
        if not file.is_file():                  # a pretraining, or a run that has not ended
            continue
        result = read_json(file, "results of finetune.py")
        need("run" in result, f"{file} is from an older version of finetune.py. Run its command "
             f"again, or leave it out")
        with reading(file, "results of finetune.py", "run its command again, or leave it out"):
            run = result["run"]
            title = "  ".join(run[name] for name in TITLE)
            seeds = [source.get("seed") for source in [result, *result["pretraining"]]]
            # If one of these entries is missing, `reading` names the file.
            format_scores([result])
            result["test_samples"]
        result["folder"] = str(file.parent)
        # a run that was repeated with the same seeds counts once
        groups.setdefault((title, str(sorted(run.items()))), {})[str(seeds)] = result
        for name, value in run.items():
            values.setdefault((title, name), set()).add(value)
    need(groups, f"--table {' '.join(folders)}: none of these folders has a results.json. Give the "
         f"--out of runs of finetune.py that have ended")
    for (title, _), by_seeds in sorted(groups.items()):
        results = list(by_seeds.values())
        where = ", ".join(result["folder"] for result in results)
        differences = [f"{name} {value}" for name, value in results[0]["run"].items()
                       if len(values[title, name]) > 1]
        print(title, *differences, format_scores(results), f"seeds: {len(results)}",
              f"test samples: {results[0]['test_samples']}", f"in {where}", sep="  ")


def format_scores(results):
    """Returns, for each metric, mean and deviation over the seeds and the score of a guess, as text
    in percent."""
    words = []
    for name in results[0]["metrics"]:
        scores = to_percent(result["metrics"][name] for result in results)
        guesses = to_percent(result["guess"][name] for result in results)
        deviation = f" +- {scores.std(ddof=1):.1f}" if len(results) > 1 else ""
        words.append(f"{name} {scores.mean():.1f}{deviation} (a guess: {guesses.mean():.1f})")
    return "  ".join(words)


def to_percent(values):
    """Returns an array of percents.  None (an undefined score) becomes NaN."""
    return 100 * np.array(list(values), float)


# ---- command line ----

# The flags of pretrain.py, some with another help text or range, and flags of finetune.py only.
BY_TASK = "default: depends on the task; printed at the start"
TRANSFER_FLAGS = FLAGS | {
    "task": dict(choices=TASKS, help="the data set and its classes; custom: your own labels"),
    "table": dict(nargs="+", metavar="DIR", help="folders of runs to list; nothing is trained"),
    "split": dict(type=expand_path, help="name of the list to train on, with custom a file; "
                  "default: train, with custom a random four fifths"),
    "test-split": dict(type=expand_path, help="name of the list to test on, with custom a file; "
                       "default: test, with custom the remaining fifth"),
    "labels": dict(type=number(float, 1e-9, 1), help="share of the training samples that is used, "
                   "such as 0.01; default: 1"),
    "modality": dict(type=int, choices=(0, 1, 2), help="modality that the model sees, or 0 for "
                     "both; default: 0, but 1 for FCN on sunrgbd and nyuv2"),
    "size": FLAGS["size"] | dict(help=f"height of the training crops in pixels; {BY_TASK}"),
    "target": FLAGS["data1"] | dict(help="with custom: the labels, either masks (a folder or a "
                                    "pattern in quotes) or a csv with lines `name,label`"),
    "ignore": dict(type=number(int, -2 ** 31), help="with custom: the value in masks that means no "
                   "label, beside negative values; default: 255"),
    "model": dict(choices=("late", "fcn", "cmx"), help="late fusion, FCN or CMX; default: fcn, but "
                  "late for bigearthnet and for a csv"),
    "weights": FLAGS["weights"] | dict(help="weights to start from: one file for both encoders, a "
                                       "file for each, imagenet, or none (random)"),
    "part": dict(choices=("common", "unique", "all"), help="with --linear and late fusion: "
                 "dimensions of the embedding to classify; default: the encoder's features"),
    "backbone": FLAGS["backbone"] | dict(help=f"network of the encoders; {BY_TASK}"),
    "linear": dict(action="store_true", help="freeze the encoders; default: fine-tune them"),
    "cached": dict(action="store_true", help="with --linear and late fusion: compute the features "
                   "once, without augmentation, which is fast; default: augment"),
    "epochs": FLAGS["epochs"] | dict(help=f"number of passes over the data; {BY_TASK}"),
    "batch-size": dict(type=number(int, 1), help=f"samples per step, in all processes together; "
                       f"{BY_TASK}"),
    "lr": FLAGS["lr"] | dict(help=f"learning rate at the start; {BY_TASK}"),
    "weight-decay": FLAGS["weight-decay"] | dict(help=f"weight decay; {BY_TASK}"),
    "out": FLAGS["out"] | dict(help="folder of the run; default: runs/TASK-MODEL-WEIGHTS-seedN, so "
                               "runs that differ only in other flags need an --out each"),
    "save-images": dict(type=number(int, 0), metavar="N", help="number of test samples to draw; "
                        "default: 0"),
}


def get_args(argv=None):
    """Returns the settings, and {name: source} of the settings that have a default."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Transfer (Tables 1-3). The "
                                     "defaults are the paper's settings for the task.")
    for title, names in (
            ("what to run", "task table toy"),
            ("data", "data split test-split labels modality depth-unit size workers"),
            ("--task custom", "data1 data2 as1 as2 target ignore"),
            ("model", "model backbone weights bgr part linear cached"),
            ("optimization and run", "epochs batch-size lr weight-decay seed out resume save-every "
             "save-images")):
        add_flags(parser.add_argument_group(title), TRANSFER_FLAGS, names)
    args = parser.parse_args(argv)
    if args.table:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        given.remove("table")
        need(not given, f"--table does not work with other flags. Leave "
             f"--{' '.join(given[:1]).replace('_', '-')} out")
        return args, {}
    need(args.task, "--task is missing. Give --task and --weights to train, or --table to list "
         "runs")
    need(args.weights, "--weights is missing. Give the checkpoint.pt of a pretraining, the files "
         "of encoders, imagenet or none")
    args.pretraining = read_pretrainings(args.weights)
    choose_data_and_model(args)
    sources = fill_in(args, list_settings(args))
    if args.modality and len(args.pretraining) == 2:
        args.pretraining = [args.pretraining[args.modality - 1]]
    check_transfer_flags(args)
    toy = "toy-" if args.toy else ""
    weights = [Path(file).parent.name or Path(file).stem for file in args.weights]
    name = "-".join([args.task, args.model, *dict.fromkeys(weights), f"seed{args.seed}"])
    args.out = Path(args.out or f"runs/{toy}{name}")
    return args, sources


def read_pretrainings(files):
    """Returns a dict for each encoder in --weights: its `file`, the settings of its pretraining,
    and `sees`, the row of MODALITIES that it was trained on.  Weights of others have no more than
    the file."""
    pretrainings = []
    for file in files:
        settings, rows = read_pretraining(file)
        for row in rows:
            pretrainings.append({"stopped": None, **settings, "file": file, "sees": row,
                                 "input": describe_input(row)})
        if not rows:
            pretrainings.append(dict(file=file))
    return pretrainings


def choose_data_and_model(args):
    """Sets --data and --model.  Raises BadInput for flags that do not fit the task."""
    custom, task = args.task == "custom", TASKS[args.task]
    for name in ("data1", "data2", "as1", "as2", "target", "ignore"):
        need(custom or getattr(args, name) is None, f"--{name} works only with --task custom")
    models = [model for name, model in RECIPES if name == args.task]
    if custom:
        need(args.data1 and args.data2 and args.target and not args.data and not args.toy,
             "--task custom needs --data1, --data2 and --target. It does not work with --data or "
             "--toy")
        args.data = [args.data1, args.data2]
        models = ["late" if args.target.lower().endswith(".csv") else "fcn"]
        need(args.ignore is None or models == ["fcn"], "--ignore works only with masks as "
             "--target. Leave --ignore out")
    args.data = args.data or (f"data/toy-{task['scenario']}" if args.toy else task["data"])
    args.model = args.model or models[0]
    if args.toy and args.task != "bigearthnet":
        models = ("late", "fcn", "cmx")
    need(args.model in models, f"--model {args.model} does not work with --task {args.task}. "
         f"Give --model {' or '.join(models)}")


def list_settings(args):
    """Returns [(settings, their source)].  The default of a setting is in the first pair that has
    the setting."""
    name, tables, first = "toy" if args.toy else args.task, [], args.pretraining[0]
    if args.epochs:
        tables.append((dict(steps=None), "--epochs"))
    if args.linear:
        tables += LINEAR.get((name, args.model), [])
    if "depth" in first.get("modalities", ()):
        tables.append((dict(depth_unit=first["depth_unit"]), "--weights"))
    if args.task == "custom" and "method" in first:
        tables.append((dict(backbone=first["backbone"], size=first["size"]), "--weights"))
    return tables + RECIPES[name, args.model] + [(OTHER_SETTINGS, "default")]


def check_transfer_flags(args):
    """Raises BadInput for settings that do not go together."""
    late = args.model == "late"
    need(not late or not args.save_images, "--save-images does not work with --model late, because "
         "late fusion predicts no masks. Leave --save-images out")
    for name in ("part", "cached"):
        need(not getattr(args, name) or args.linear and late,
             f"--{name} works only with --linear and --model late")
    need(not args.part or len(args.weights) == 1 and "method" in args.pretraining[0], "--part "
         "needs the projectors. Give one checkpoint.pt of pretrain.py as --weights")
    need(not args.bgr or args.weights[0] not in ("none", "imagenet") and not args.part, "--bgr "
         "works only with files of others as --weights, and without --part")
    need(args.model != "cmx" or args.backbone in MITS and not args.modality,
         "--model cmx works only with a SegFormer as --backbone, such as mit_b2, and without "
         "--modality")
    need(args.backbone not in MITS or args.size >= 48, f"--size {args.size} is too small for "
         f"{args.backbone}. Give --size 48 or more")
    need(args.task != "custom" or bool(args.split) == bool(args.test_split),
         "--task custom needs both --split and --test-split, or neither. Each is a file of names")


if __name__ == "__main__":
    run_main(main)
