"""Explains what was pretrained: Algorithm 2, and every picture of Sec. 7 and App. D.

    python explain.py --checkpoint runs/toy-rgbd-decur/checkpoint.pt
    python explain.py --checkpoint runs/rgbd-decur/checkpoint.pt --compare runs/cross/checkpoint.pt
    python explain.py --sweep runs/common-*               made-up scenes: Sec. 6 over seeds, Fig. 3a

    Algorithm 2   figure                  function                                picture, numbers
    1             Fig. 4a and 8, Eq. 7    alignment_histogram, retrieval          alignment.png .npz
    2             Fig. 1 and 9            tsne_vis                                tsne.png      .npz
    3             Fig. 4b and 10          gradcam, gradcam_vis                    gradcam.png   .npz
    4             Fig. 5a                 gradcam_stat                            spatial.png   .npz
    5             Fig. 5b                 integrated_gradients, IG_vis, IG_stat   spectral.png  .npz
    not there     made-up scenes only     linear_probe, sweep                     factors.png   .npz
                  the training's log      picture_curves                          curves.png    .npz

A sentence on how to read each is printed beside its path.  Two dictionaries run through the file:
`parts`, from "common" and "unique" to their columns of an embedding, and attributions, from the
same names to tensors; a method without unique dimensions has no such entry.  Networks are in
evaluation mode and see whole images, not augmented.
"""
import argparse
import csv
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import (MODALITIES, BadInput, Draws, collate, epoch_batches, open_pairs, plain,
                  random_resized_crop)
from decur import BN, DeCUR, branch, chance_and_floor
from pretrain import (load_checkpoint, measure_statistics, run, settings_of, start_processes,
                      write_atomically)

PICTURES = ("curves", "alignment", "tsne", "gradcam", "spatial", "spectral", "factors")
WAVELENGTHS = dict(                             # Sentinel-2: the band's centre; Sentinel-1: C band
    B1="443 nm", B2="490 nm", B3="560 nm", B4="665 nm", B5="705 nm", B6="740 nm", B7="783 nm",
    B8="842 nm", B8A="865 nm", B9="945 nm", B10="1375 nm", B11="1610 nm", B12="2190 nm",
    VV="5.5 cm", VH="5.5 cm")
progress = partial(tqdm, leave=False, disable=None, dynamic_ncols=True)


# ---- Algorithm 2, 1: cross-modal representation alignment ----

def alignment_histogram(z1, z2, bins=20, top=1.0):
    """Eq. 7, L_i = (1 - C_ii)^2: 0 where both modalities agree in dimension i, 1 where unrelated.

    z1, z2   NxK   embeddings of one batch
    Returns the losses, K in [0, 4], and their counts in `bins` equal steps of (0, top).  The
    paper's top is 1, which leaves out every dimension with a negative C_ii: half of the unrelated.
    """
    z1, z2 = BN(z1), BN(z2)                     # NxK
    C_ii = (z1 * z2).mean(0)                    # K    on_diag(z1.T @ z2 / N), but no KxK matrix
    losses = (C_ii - 1).pow(2)                  # K
    return losses, torch.histc(losses, bins, 0, top)


def retrieval(z1, z2):
    """How often a sample's nearest neighbour in the other modality, by cosine, is its partner.

    z1, z2: NxK.  The mean of both directions, 0..1; unrelated embeddings give 1 / N.
    """
    near = F.normalize(BN(z1)) @ F.normalize(BN(z2)).T                  # NxN
    partner = torch.arange(len(near), device=near.device)
    return sum((near.argmax(dim) == partner).float().mean().item() for dim in (0, 1)) / 2


# ---- Algorithm 2, 2: representation visualization ----

def tsne_vis(z1, z2, text="t-SNE"):
    """One point a DIMENSION, with N samples as coordinates.  z1, z2: NxK -> 2Kx2, z1's first; KL.

    Normalised features have the squared distance 2 N (1 - C_ij): near points are correlated.
    """
    feature = torch.cat((BN(z1), BN(z2)), -1)   # Nx2K
    feature = feature.permute(1, 0)             # 2KxN
    return tsne(feature, text=text)


def tsne(x, perplexity=30.0, steps=1000, text="t-SNE"):
    """Exact t-SNE (van der Maaten & Hinton, 2008).  x: nxD.  Returns nx2 and the final KL(P|Q).

    Starts from the first two principal components, lest the global arrangement be left to chance,
    with a rate of n / 48 (Belkina et al., 2019).
    """
    n = len(x)
    P = affinities(x, min(perplexity, (n - 1) / 3))                     # nxn
    U, S, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = U[:, :2] * S[:2]                                                # nx2
    y = y / y[:, 0].std().clamp(min=1e-12) * 1e-4
    velocity, gains, lr = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 50)
    for step in progress(range(steps), text, unit="step"):
        early = step < steps // 4
        near, Q = student(y)                                            # nxn
        pull = ((12 if early else 1) * P - Q) * near                    # nxn  early exaggeration
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)       # nx2
        downhill = velocity * gradient < 0
        gains = torch.where(downhill, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - lr * gains * gradient
        y = y + velocity
    Q = student(y)[1].clamp(min=1e-12)
    return y, (torch.special.xlogy(P, P) - P * Q.log()).sum().item()


def affinities(x, perplexity):
    """P of t-SNE, nxn: each point's Gaussian is as wide as gives the perplexity, by bisection."""
    D = distances(x).fill_diagonal_(torch.inf)                          # nxn
    D = D - D.min(1, keepdim=True).values                               # softmax stays the same
    beta = torch.ones_like(D[:, :1])                                    # nx1  1 / (2 sigma^2)
    low, high = torch.zeros_like(beta), torch.full_like(beta, torch.inf)
    for _ in range(64):
        P = (-beta * D).softmax(1)                                      # nxn
        wide = torch.special.entr(P).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return (P + P.T) / (2 * len(x))


def student(y):
    """1 / (1 + |y_i - y_j|^2), its diagonal 0, and Q, the same with sum 1.  y: nx2 -> nxn each."""
    near = 1 / (1 + distances(y)).fill_diagonal_(torch.inf)
    return near, near / near.sum()


def distances(x):
    # through a product of matrices, digits would cancel
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").pow(2)


# ---- Algorithm 2, 3: spatial saliency visualization ----

def part_means(f, mean, var, parts):
    """Sec. 7: "we average the common and unique dimensions as two single values output".

    mean, var: K, of the embedding over the samples, from one pass before.  They have to be
    constants: with those of the batch itself, a normalised feature's sum over the batch is zero
    whatever x is, and so is its gradient, and every map made of it.  Returns x -> Nx2.
    """
    def out(x):
        z = (f(x) - mean) / (var + 1e-5).sqrt()                         # NxK  BN
        return torch.stack([z[:, columns].mean(1) for columns in parts.values()], 1)  # Nx2
    return out


def gradcam(net, layer, x, target, relu=False):
    """GradCAM (Selvaraju et al., 2017, Eq. 1-2): channels, weighted by their mean gradient, summed.

    net           function or module, NxCxHxW -> NxM
    layer         a module that net calls; its output is NxCxhxw, or NxhxwxC of a LayerNorm (MiT)
    target        column of the output, 0 <= target < M
    relu          the positive part only, as Selvaraju's Eq. 2; Algorithm 2's LayerGradCam keeps all
    Returns Nx1xhxw.  Samples do not mix as long as net is in evaluation mode.
    """
    kept = []

    def keep(module, inputs, output):
        kept.append(output.detach().requires_grad_())                   # the graph starts here
        return kept[-1].clone()                                         # in-place layers may follow

    hook = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            out = net(x)[:, target].sum()
    finally:
        hook.remove()
    A, (G,) = kept[0].detach(), torch.autograd.grad(out, kept)          # NxCxhxw
    if isinstance(layer, nn.LayerNorm):
        A, G = A.permute(0, 3, 1, 2), G.permute(0, 3, 1, 2)
    attribution = (G.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True)  # Nx1xhxw
    return attribution.relu() if relu else attribution


def gradcam_vis(net, layer, parts, x):
    """{part: NxHxW}: GradCAM maps of the outputs of `part_means`, upsampled to the input's size."""
    return {part: F.interpolate(gradcam(net, layer, x, target), x.shape[-2:], mode="bilinear")[:, 0]
            for target, part in enumerate(parts)}


def layers(E):
    """{name: module} for GradCAM, the last the default: "after the last convolutional layer".

    Paper: that in Sec. 7, but f1.last_conv2 in Algorithm 2.  Here: the last, in a ResNet-50
    layer4.2.conv3; --layer layer4.2.conv2 gives the other.
    ResNet's convolutions in the order they run in; the ends of SegFormer's stages.
    """
    ends = ("norm1", "norm2", "norm3", "norm4")
    names = {name: module for name, module in E.named_modules() if name in ends}
    return names or {name: module for name, module in E.named_modules()
                     if isinstance(module, nn.Conv2d) and "downsample" not in name}


# ---- Algorithm 2, 4: spatial saliency statistics ----

def gradcam_stat(att1, att2):
    """{part: N}: how far the bright areas of both modalities overlap.  att1, att2: {part: NxHxW}.

    The mean over the pixels of the product of both maps, each scaled to 0..1, then its logarithm.
    Paper: "norm" is not defined.  Here: the positive part, then min-max of each map.
    """
    return {part: ((norm(att1[part]) * norm(att2[part])).mean((1, 2)) + 1e-8).log()
            for part in att1}


def norm(att):
    """Positive part of each map, scaled to 0..1; a flat map is 0.  NxHxW -> NxHxW."""
    att = att.relu()
    low, high = att.amin((1, 2), keepdim=True), att.amax((1, 2), keepdim=True)
    span = high - low                           # of a 1x1 map, upsampled: rounding alone
    return torch.where(span > 1e-5 * high, (att - low) / span, 0)


# ---- Algorithm 2, 5: spectral saliency statistics ----

def integrated_gradients(net, x, x0=None, target=0, steps=32):
    """Integrated gradients (Sundararajan et al., 2017, Eq. 1): (x - x0) * mean gradient on the way.

    net      function or module, NxCxHxW -> NxM
    x0       the baseline, as x; None is 0, the mean of the data set where inputs are normalised
    steps    of the midpoint rule.  One at a time: memory is that of one batch, whatever the number
    Returns NxCxHxW, whose sum is net(x) - net(x0), "completeness", but for the error of the rule.
    """
    x0 = torch.zeros_like(x) if x0 is None else x0
    total = torch.zeros_like(x)                 # NxCxHxW
    for step in range(steps):
        point = (x0 + (step + 0.5) / steps * (x - x0)).requires_grad_()
        with torch.enable_grad():
            out = net(point)[:, target].sum()
        total += torch.autograd.grad(out, point)[0]
    return (x - x0) * total / steps


def IG_vis(net, parts, steps, x):
    """{"common": NxCxHxW, "unique": NxCxHxW}: integrated gradients of what `part_means` gives."""
    return {part: integrated_gradients(net, x, None, target, steps)
            for target, part in enumerate(parts)}


def IG_stat(att):
    """{part: NxC}, the importance of each band: the signed mean over pixels of {part: NxCxHxW}.

    Paper: Algorithm 2 averages over images too, Fig. 5b counts them.  Here: a value for each image.
    """
    return {part: a.mean((2, 3)) for part, a in att.items()}


# ---- made-up scenes: what a linear probe reads ----

def linear_probe(x, y, x_test, y_test, decay=1e-2):
    """Accuracy on unseen samples of logistic regression.  x: NxD features, y: N classes.

    decay    of the squared weights, on features of standard deviation 1
    """
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, x_test = (x - mean) / std, (x_test - mean) / std
    W = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, device=x.device, requires_grad=True)
    # (D+1)xM; its last row are the biases
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ W[:-1] + W[-1], y) + decay * W[:-1].pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((x_test @ W[:-1] + W[-1]).argmax(1) == y_test).float().mean().item()


def supervised(E, x, y, seed, epochs=12):
    """Trains encoder E on all factors at once: the most that it could know.  x: NxCxSxS, y: NxF."""
    classes, N = int(y.max()) + 1, min(128, len(x))
    head = nn.Linear(E.dims[-1], y.shape[1] * classes).to(x.device)
    draws, steps = Draws(seed, N, slice(None)), epochs * (len(x) // N)
    optimizer = torch.optim.AdamW([*E.parameters(), *head.parameters()], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    E.train()
    for step in progress(range(steps), "supervised encoder", unit="step"):
        epoch, i = divmod(step, len(x) // N)
        rows = epoch_batches(len(x), N, seed, epoch)[i]
        draws.restart(step)
        scores = head(E(random_resized_crop(x[rows], x.shape[-1], (0.5, 1.0), draws)))
        loss = F.cross_entropy(scores.unflatten(1, (-1, classes)).mT, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def features(f, x):
    """f(x) in evaluation mode, 256 samples at a time."""
    f.eval()
    return torch.cat([f(chunk) for chunk in x.split(256)])              # NxD


def probe_all(rows, y, y_test):
    """{name: accuracies, one a factor} of {name: (train features NxD, test features)}; y: NxF."""
    return {name: [linear_probe(a, y[:, i], b, y_test[:, i]) for i in range(y.shape[1])]
            for name, (a, b) in rows.items()}


def read_factors(f, parts, x, y, x_test, y_test):
    """Of one modality's branch f of a net: {features: accuracies, one a factor}.

    x: NxCxSxS normalised; y: NxF classes.
    """
    z, z_test = features(f, x), features(f, x_test)                     # NxK
    rows = {part: (z[:, columns], z_test[:, columns]) for part, columns in parts.items()}
    return probe_all(rows | dict(backbone=(features(f.E, x), features(f.E, x_test))), y, y_test)


def read_yardsticks(fresh, x, y, x_test, y_test, seed):
    """The same of an encoder that knows nothing and of one that was told all.  fresh: makes one."""
    torch.manual_seed(seed)
    random, taught = fresh().to(x.device), fresh().to(x.device)
    measure_statistics(random, ([chunk] for chunk in x.split(256)))
    supervised(taught, x, y, seed)
    rows = {name: (features(E, x), features(E, x_test))
            for name, E in (("random encoder", random), ("supervised encoder", taught))}
    return probe_all(rows, y, y_test)


def read_net(net, settings, parts, scenes, y, seed=None):
    """{(m, features): accuracies} of both modalities m, with a seed those of the yardsticks, too.

    scenes: [x1, x2] of train and test scenes, NxCxSxS each; y: their classes, NxF each.
    """
    table = {}
    for m, f in enumerate((net.f1, net.f2)):
        known = scenes[0][m], y[0], scenes[1][m], y[1]
        found = read_factors(f, parts, *known)
        if seed is not None:
            found |= read_yardsticks(lambda: branch(settings["backbone"], settings["channels"][m],
                                                    ()).E, *known, seed)
        table |= {(m, name): accuracies for name, accuracies in found.items()}
    return table


# ---- figures, with Pillow: one font, one margin, colours that colour-blind readers tell apart ----

INK, GREY, PAPER = "#000000", "#8c8c8c", "#ffffff"
RED, BLUE = "#d55e00", "#0072b2"                # of Okabe and Ito, for the two modalities of Fig. 1
COLOURS = dict(common="#009e73", unique="#e69f00")
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
FONT, LINE, M = ImageFont.load_default(14), 20, 16  # a line's height and the margin, in pixels
TOP = 2 * M + 2 * LINE                          # where panels begin, below title and legend


def page(width, height, title, legend=()):
    """A blank figure with its title and a legend of (words, colour).  Returns image and pen."""
    image = Image.new("RGB", (width, height), PAPER)
    pen, x = ImageDraw.Draw(image), M
    pen.text((M, M), title, INK, FONT)
    for words, colour in legend:
        pen.rectangle((x, M + LINE + 6, x + 11, M + LINE + 17), colour)
        pen.text((x + 17, M + LINE + 4), words, INK, FONT)
        x += 17 + FONT.getlength(words) + 2 * M
    return image, pen


def panel(i, columns, width, height):
    """The box (left, top, right, bottom) of panel i; panels fill the page row by row."""
    x, y = M + i % columns * (width + M), TOP + i // columns * (height + M)
    return x, y, x + width, y + height


def axes(pen, box, xs, ys, title, xlabel, powers=False):
    """Axes over xs[0]..xs[1] and ys[0]..ys[1], with ticks and words.  Returns (x, y) -> pixel.

    powers: y is a logarithm to the base of 10.
    """
    left, top, right, bottom = box[0] + 32, box[1] + LINE + 8, box[2] - 8, box[3] - 2 * LINE

    def at(x, y):
        return (round(left + (x - xs[0]) / (xs[1] - xs[0]) * (right - left)),
                round(bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top)))

    pen.text(box[:2], title, INK, FONT)
    pen.text(((left + right) / 2, bottom + LINE + 2), xlabel, INK, FONT, "ma")
    for x in ticks(*xs):
        pen.line((at(x, 0)[0], bottom, at(x, 0)[0], bottom + 4), GREY)
        pen.text((at(x, 0)[0], bottom + 6), f"{x:g}", INK, FONT, "ma")
    for y in ticks(*ys):
        pen.line((left - 4, at(0, y)[1], left, at(0, y)[1]), GREY)
        pen.text((left - 6, at(0, y)[1]), f"{10 ** y if powers else y:.4g}", INK, FONT, "rm")
    pen.line((left, top, left, bottom, right, bottom), GREY)
    return at


def ticks(low, high):
    """At most six round numbers within low..high."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(s * power for s in (0.2, 0.5, 1, 2) if (high - low) / (s * power) <= 5.01)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def curve(pen, at, xs, ys, colour):
    """A line through the points, which are marked where they are few."""
    points = [at(x, y) for x, y in zip(xs, ys)]
    pen.line(points, colour, 2)
    for x, y in points if len(points) < 20 else ():
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)


def bars(pen, at, edges, heights, base, colour, outline=None):
    """Histogram bars that stand on `base`, filled, or outlined with None as their colour."""
    for x0, x1, y0, height in zip(edges, edges[1:], base, heights):
        (x0, y1), (x1, y0) = at(x0, y0 + height), at(x1, y0)
        if y0 > y1:                             # nothing is nothing, not a line
            pen.rectangle((x0, y1, x1 - 2, y0 - 1), colour, outline, 2)


def viridis(value):
    """0..1 -> colour, 0..255, along a last dimension of 3."""
    levels = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(value, levels, channel) for channel in VIRIDIS.T], -1)


def visible(x, modality):
    """A normalised image, CxHxW, as one can look at it: HxWx3 in [0, 1].

    Multispectral: true colour, stretched from the 2nd to the 98th percentile; SAR and DEM: grey,
    stretched likewise; colour, depth and HHA: as they are.
    """
    bands, mean, std = (MODALITIES[modality][key] for key in ("bands", "mean", "std"))
    x = (x.cpu() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)).numpy()
    grey = modality in ("sar", "dem") or len(bands) < 3
    chosen = [0] if grey else [0, 1, 2]
    if "B4" in bands:
        chosen = [bands.index(band) for band in ("B4", "B3", "B2")]
    x = x[chosen].transpose(1, 2, 0)            # HxWx3, or 1
    if modality in ("sar", "dem") or len(bands) > 3:
        low, high = np.percentile(x, (2, 98), axis=(0, 1))
        x = (x - low) / np.maximum(high - low, 1e-6)
    return np.broadcast_to(x.clip(0, 1), (*x.shape[:2], 3))


# ---- the pictures: what to draw, its numbers, how to read it ----

def picture_curves(save, log, N, K, Kc, intra):
    """The terms of Eq. 6 and the mean diagonals as they were logged.  log: {name: values}."""
    terms = [name for name in ("loss", "L1", "L2", "Lc", "Lu") if name in log]
    diagonals = [name for name in ("C1", "C2", "Cc", "Cu") if name in log]
    sizes = [(K, False)] * 2 * intra + [(Kc, False)] * (Kc > 0) + [(K - Kc, True)] * (Kc < K)
    chance, floor = (sum(bounds) for bounds in zip(*(
        chance_and_floor(N, k, unique=unique) for k, unique in sizes)))
    colours = dict(zip(("loss", "L1", "L2", "Lc", "Lu"), (INK, RED, BLUE, *COLOURS.values())))
    image, pen = page(944, TOP + 300 + M, "Pretraining: the loss and its terms, the mean diagonals "
                      "of their correlation matrices",
                      [(f"{term} {'C' + term[1:] if term != 'loss' else ''}", colours[term])
                       for term in terms])
    steps, least = log["step"], min(min(log[name]) for name in terms)
    least = max(1e-3, min(least, floor or least))  # a floor of 0 has no place on the axis
    low, high = (math.floor(math.log10(least / 1.2)),
                 math.log10(1.2 * max(chance, max(log["loss"]))))
    at = axes(pen, panel(0, 2, 448, 300), (0, steps[-1]), (low, high),
              f"loss (lines: chance {chance:.1f}, floor {floor:.1f})", "step", powers=True)
    for bound in filter(None, (chance, floor)):
        pen.line((*at(0, math.log10(bound)), *at(steps[-1], math.log10(bound))), GREY)
    for name in terms:
        curve(pen, at, steps, np.log10(np.maximum(log[name], 10.0 ** low)), colours[name])
    at = axes(pen, panel(1, 2, 448, 300), (0, steps[-1]), (-0.2, 1),
              "mean of the diagonal: 1 agreement, 0 none", "step")
    pen.line((*at(0, 0), *at(steps[-1], 0)), GREY)
    for name in diagonals:
        curve(pen, at, steps, log[name], colours["L" + name[1:]])
    save("curves", image, "Both intra-modal terms and Lc should fall from chance towards the floor "
         "and C1, C2, Cc rise towards 1, while Cu stays at 0.", **log)


def picture_alignment(save, z, parts, others):
    """Fig. 4a, 8.  z: batches (z1, z2), NxK; others: those of --compare, or none."""
    top, width = 4, 0.05                        # a loss can be up to 4, not only Algorithm 2's 1
    histogram = partial(alignment_histogram, bins=round(top / width), top=top)
    found = [{part: histogram(z1[:, columns], z2[:, columns]) for part, columns in parts.items()}
             for z1, z2 in z]
    losses = {part: torch.stack([batch[part][0] for batch in found]) for part in parts}
    others = [histogram(z1, z2) for z1, z2 in others]
    losses |= {"compared": torch.stack([loss for loss, _ in others])} if others else {}
    for part, a in losses.items():
        beyond = (a > 1).sum(1).float().mean()
        print(f"{part}: mean loss {a.mean():.3f}; of {a.shape[1]} dimensions {beyond:.1f} lie "
              f"beyond 1, where Algorithm 2's range ends")
    drawn = max(30, int(max(a.max() for a in losses.values()) / width) + 1)  # bins
    edges = np.arange(drawn + 1) * width
    legend = [(f"{part} dimensions", COLOURS[part]) for part in parts]
    legend += [("all of the compared run (outlined)", INK)] if others else []
    image, pen = page(944, TOP + -(-len(z) // 2) * (250 + M),
                      "Cross-modal alignment: percentage of the dimensions by their loss, Eq. 7",
                      legend)
    for i, batch in enumerate(found):
        shares = {part: counts[:drawn].numpy() * 100 / z[i][0].shape[1]
                  for part, (_, counts) in batch.items()}
        other = others[i][1][:drawn].numpy() * 100 / len(others[i][0]) if others else np.zeros(1)
        highest = 1.05 * max(sum(shares.values()).max(), other.max())
        box = panel(i, 2, 448 if len(z) > 1 else 912, 250)
        at = axes(pen, box, (0, edges[-1]), (0, highest), f"batch {i + 1}",
                  "loss: 0 aligned, 1 unrelated, above 1 opposed")
        base = np.zeros(drawn)
        for part, share in shares.items():
            bars(pen, at, edges, share, base, COLOURS[part])
            base = base + share
        if others:
            bars(pen, at, edges, other, np.zeros(drawn), None, INK)
        pen.line((*at(1, 0), *at(1, highest)), GREY)
    save("alignment", image, "Every dimension's loss between the modalities: common ones should "
         "stand at 0, unique ones around 1.", **losses)


def picture_tsne(save, z, chosen, Kc, modalities, device):
    """Fig. 1, 9.  z: batches (z1, z2), NxK; chosen: the dimensions drawn, below Kc common ones."""
    results = [tsne_vis(*(a[:, chosen].to(device) for a in pair), f"t-SNE {i + 1} of {len(z)}")
               for i, pair in enumerate(z)]
    points = np.stack([y.cpu().numpy() for y, _ in results])            # batches x 2k x 2
    print("t-SNE: KL of each batch", " ".join(f"{kl:.3f}" for _, kl in results))
    side, columns = 456, min(2, len(z))
    image, pen = page(M + columns * (side + M), TOP + -(-len(z) // 2) * (side + M),
                      "t-SNE of the dimensions: crosses and squares are common, dots unique",
                      list(zip(modalities, (RED, BLUE))))
    for i, y in enumerate(points):
        box = panel(i, columns, side, side)
        pen.rectangle(box, None, GREY)
        middle, radius = (y.min(0) + y.max(0)) / 2, max(np.ptp(y, axis=0).max() / 2, 1e-12)
        y = (y - middle) / radius * (side / 2 - M) + np.reshape(box, (2, 2)).mean(0)  # pixels
        for j, (px, py) in enumerate(y):
            colour, mark = (RED, BLUE)[j // len(chosen)], (px - 4, py - 4, px + 4, py + 4)
            if chosen[j % len(chosen)] >= Kc:
                pen.ellipse((px - 2, py - 2, px + 2, py + 2), colour)
            elif colour == BLUE:
                pen.rectangle(mark, None, colour)
            else:
                pen.line(mark, colour), pen.line((px - 4, py + 4, px + 4, py - 4), colour)
    save("tsne", image, "A mark is a dimension, a panel a batch: aligned common dimensions are red "
         "crosses within blue squares, unique ones keep apart by colour.",
         points=points, dimensions=chosen, Kc=Kc)


def picture_gradcam(save, loader, cams, modalities):
    """Fig. 4b, 10.  cams: `gradcam_vis` of each modality's network."""
    side, numbers, rows = 144, {}, []
    for x in loader:                            # one pair at a time
        tiles = []
        for m, name in enumerate(modalities):
            picture = visible(x[m][0], name)
            tiles.append((name, picture))
            for part, a in cams[m](x[m]).items():
                colours = viridis(norm(a)[0].cpu().numpy()) / 255
                tiles.append((f"{name}, {part}", 0.45 * picture + 0.55 * colours))
                numbers.setdefault(f"modality{m + 1}_{part}", []).append(a[0].cpu().numpy())
        rows.append(tiles)
    image, pen = page(M + len(tiles) * (side + 4) + 2 * M, TOP + len(rows) * (side + 4) + M,
                      "GradCAM: what raises the mean of common, of unique dimensions (violet: "
                      "nothing, yellow: most)")
    for row, tiles in enumerate(rows):
        for column, (words, tile) in enumerate(tiles):
            x, y = M + column * (side + 4) + M * (2 * column >= len(tiles)), TOP + row * (side + 4)
            tile = Image.fromarray((tile * 255).astype(np.uint8))
            image.paste(tile.resize((side, side), Image.Resampling.BICUBIC), (x, y))
            if row == 0:
                pen.text((x, y - LINE - 2), words, INK, FONT)
    save("gradcam", image, "A row is a pair: common maps should lie on what both modalities show, "
         "unique ones on what one alone shows.", **numbers)


def picture_spatial(save, loader, cams):
    """Fig. 5a.  cams: `gradcam_vis` of each modality's network."""
    stats = [gradcam_stat(cams[0](x1), cams[1](x2)) for x1, x2 in loader]
    logs = {part: torch.cat([stat[part] for stat in stats]).cpu().numpy() for part in stats[0]}
    # Paper: "normalize the results of each patch to 0 to 1".  Here: min-max over all pairs, since
    # one number has no range of its own, and over common and unique together, to compare them.
    low, high = min(a.min() for a in logs.values()), max(a.max() for a in logs.values())
    scores = {part: (a - low) / max(high - low, 1e-12) for part, a in logs.items()}
    image, pen = page(560, TOP + len(scores) * (220 + M),
                      "Overlap of the two modalities' GradCAM maps: number of pairs",
                      [(f"{part}, mean {a.mean():.3f} (line)", COLOURS[part])
                       for part, a in scores.items()])
    for i, (part, a) in enumerate(scores.items()):
        nothing = np.mean(logs[part] < math.log(2e-8))
        print(f"overlap of GradCAM maps, {part}: mean {a.mean():.3f}; {nothing:.0%} of the pairs "
              f"share no bright pixel")
        counts, edges = np.histogram(a, 40, (0, 1))
        highest = 1.05 * counts.max()
        at = axes(pen, panel(i, 1, 528, 220), (0, 1), (0, highest), part,
                  "score: 0 least overlap of the set, 1 most")
        bars(pen, at, edges, counts, np.zeros(40), COLOURS[part])
        pen.line((*at(a.mean(), 0), *at(a.mean(), highest)), INK, 2)
    save("spatial", image, "How far the two modalities look at the same places: unique should "
         "stand further left than common (the paper: a slight trend).", **scores)


def picture_spectral(save, loader, nets, parts, steps, modalities):
    """Fig. 5b.  nets: `part_means` of each modality."""
    stats, errors = ([], []), []
    for x in loader:
        for m, net in enumerate(nets):
            att = IG_vis(net, parts, steps, x[m])
            stats[m].append({part: a.cpu() for part, a in IG_stat(att).items()})
            with torch.no_grad():
                gain = net(x[m]) - net(torch.zeros_like(x[m]))          # Nx2
            total = torch.stack([a.sum((1, 2, 3)) for a in att.values()], 1)
            errors.append(torch.stack(((total - gain).abs(), gain.abs())).mean((1, 2)).cpu())
    error, gain = torch.stack(errors).mean(0).tolist()
    print(f"integrated gradients, {steps} steps: completeness error {error:.2g}, mean "
          f"|f(x) - f(x0)| {gain:.2g}")
    scores = [{part: torch.cat([stat[part] for stat in stats[m]]).numpy() for part in parts}
              for m in (0, 1)]                  # NxC
    # Paper: "we normalize the scores".  Here: by the largest magnitude in the modality, common and
    # unique together.
    for both in scores:
        largest = max(1e-12, *(np.abs(a).max() for a in both.values()))
        both.update({part: a / largest for part, a in both.items()})
    bands = [(m, c, band) for m, name in enumerate(modalities)
             for c, band in enumerate(MODALITIES[name]["bands"])]
    step, left, middle, right = 46, 200, 560, 928
    longest = max(np.abs(a).mean(0).max() for both in scores for a in both.values())
    image, pen = page(right + M, TOP + LINE + len(bands) * step + M,
                      "Integrated gradients: what each band adds to the mean of common, of unique "
                      "dimensions",
                      [(part, COLOURS[part]) for part in parts])
    pen.text((left, TOP - 8), "mean magnitude", INK, FONT)
    pen.text((middle, TOP - 8), "images by signed score, from -1 to 1", INK, FONT)
    for row, (m, c, band) in enumerate(bands):
        y = TOP + LINE + row * step
        words = f"{modalities[m]} {band}  {WAVELENGTHS.get(band, '')}"
        words = band if band == modalities[m] else words
        pen.text((M, y + 17), words, INK, FONT, "lm")
        for i, part in enumerate(parts):
            a, y_bar = scores[m][part][:, c], y + 18 * i
            end = left + np.abs(a).mean() / longest * (middle - left - 80)
            pen.rectangle((left, y_bar, end, y_bar + 15), COLOURS[part])
            pen.text((end + 6, y_bar + 8), f"{np.abs(a).mean():.3f}", INK, FONT, "lm")
            counts = np.histogram(a, 31, (-1, 1))[0]
            xs = np.linspace(middle, right, 31)
            pen.line([(x, y + 34 - n / counts.max() * 32) for x, n in zip(xs, counts)],
                     COLOURS[part], 2)
        pen.line((middle, y + 35, right, y + 35), GREY)
        pen.line(((middle + right) / 2, y, (middle + right) / 2, y + 38), GREY)
    save("spectral", image, "How much each band moves the mean of the common, of the unique "
         "dimensions, relative to the modality's largest score.",
         **{f"modality{m + 1}_{part}": a for m in (0, 1) for part, a in scores[m].items()})


def picture_factors(save, table, names, chance):
    """table: of `read_net`; names: of the modalities."""
    table = {f"{names[m]}, {name}": accuracies for (m, name), accuracies in table.items()}
    columns = ("seen by both", f"by {names[0]} alone", f"by {names[1]} alone")
    width, height, left = 150, 32, 220
    image, pen = page(2 * M + left + 3 * width, TOP + len(table) * height + M,
                      f"Accuracy of a linear probe on unseen scenes (chance {chance:.2f})")
    for i, words in enumerate(columns):
        pen.text((M + left + (i + 0.5) * width, TOP - LINE - 2), words, INK, FONT, "ma")
    for row, (name, accuracies) in enumerate(table.items()):
        print(f"{name:28s}" + "".join(f"  {words} {accuracy:.2f}"
                                      for words, accuracy in zip(columns, accuracies)))
        y = TOP + row * height
        pen.text((M, y + height / 2), name, INK, FONT, "lm")
        for i, accuracy in enumerate(accuracies):
            x, level = M + left + i * width, max(0, (accuracy - chance) / (1 - chance))
            pen.rectangle((x, y, x + width - 2, y + height - 2), tuple(viridis(level).astype(int)))
            ink = PAPER if level < 0.5 else INK
            pen.text((x + width / 2, y + height / 2), f"{accuracy:.2f}", ink, FONT, "mm")
    save("factors", image, "How well each factor of the made-up scenes can be read: common "
         "dimensions should hold what both modalities see, unique ones what one alone sees.",
         rows=list(table), accuracy=list(table.values()))


def picture_sweep(save, found, names, axis, chance):
    """Fig. 3a and 3b on made-up scenes.  found: of `sweep`; axis: the setting that differs."""
    rows = {run[axis]: table for run, table in found if run}
    xs, colours = sorted(rows), dict(COLOURS, backbone=INK)
    image, pen = page(944, TOP + 2 * (280 + M), f"Accuracy of a linear probe by {axis}; grey: "
                      f"random encoder, chance",
                      list(colours.items()))
    yardsticks = next(table for run, table in found if not run)
    for i, (m, factor) in enumerate(((0, 0), (0, 1), (1, 0), (1, 2))):
        what = "what both see" if factor == 0 else f"what {names[m]} alone sees"
        at = axes(pen, panel(i, 2, 448, 280), (xs[0], xs[-1]), (0, 1), f"{names[m]}: {what}", axis)
        for level in (chance, yardsticks[m, "random encoder"][:, factor].mean()):
            pen.line((*at(xs[0], level), *at(xs[-1], level)), GREY)
        for name, colour in colours.items():
            points = [(x, rows[x][m, name][:, factor]) for x in xs if (m, name) in rows[x]]
            for x, a in points:                 # the range of the seeds
                pen.line((*at(x, a.min()), *at(x, a.max())), colour)
            if points:                          # without decoupling there are no unique ones
                curve(pen, at, *zip(*((x, a.mean()) for x, a in points)), colour)
    save("sweep", image, f"How {axis} moves what common and unique dimensions and backbones hold; "
         f"bars span the seeds.", **{f"{x} {names[m]} {name}": a for x in xs
                                     for (m, name), a in rows[x].items()})


def open_out(out):
    """Makes the folder.  Returns `save_picture` into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "writable", Path.touch), (out / "writable").unlink()
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written ({error.strerror}); give another") from None
    return partial(save_picture, out)


def save_picture(out, name, image, sentence, **numbers):
    """The picture and its numbers, and how to read it, printed."""
    def write_npz(part):
        with open(part, "wb") as file:
            np.savez(file, **numbers)

    write_atomically(out / f"{name}.png", partial(image.save, format="PNG"))
    write_atomically(out / f"{name}.npz", write_npz)
    print(f"{out / name}.png and .npz\n  {sentence}")


# ---- what is explained ----

def open_net(path, device):
    """The pretrained network, in evaluation mode and frozen, and its settings."""
    checkpoint = load_checkpoint(path)
    settings, state = settings_of(checkpoint), checkpoint["model"]
    if settings["stopped"]:
        print(f"{path} is of a run that was stopped {settings['stopped']}")
    if not all(any(key.startswith(f"{f}.E.") for key in state) for f in ("f1", "f2")):
        raise BadInput(f"{path} holds one encoder alone; expected those of two modalities")
    net = DeCUR(settings["backbone"], *settings["channels"], settings["widths"])
    net.load_state_dict(state)
    return net.to(device).eval().requires_grad_(False), settings


def open_data(settings, root, split):
    """The data set, or BadInput if it is not of the kind that the checkpoint knows."""
    custom = dict(rows=settings["inputs"]) if settings["scenario"] == "custom" else {}
    if bool(custom) != (len(root) == 2):
        raise BadInput(f"--data {' '.join(root)}: expected two folders for custom, one otherwise")
    try:
        data = open_pairs(settings["scenario"], root if custom else root[0], settings["size"],
                          split, settings["depth_unit"], settings["seed"], **custom)
    except BadInput as error:
        raise BadInput(f"the checkpoint is of {settings['scenario']}; {error}") from None
    got = [f"{name} ({len(views[0])} channels)" for name, views in zip(data.modalities, data[0])]
    expected = [f"{name} ({channels} channels)"
                for name, channels in zip(settings["modalities"], settings["channels"])]
    if got != expected:
        raise BadInput(f"{root[0]} holds {' and '.join(got)}, the checkpoint knows "
                       f"{' and '.join(expected)}; give --data")
    return data


def batches(data, rows, size, batch_size, workers, device, text):
    """Batches [x1, x2] of what the networks see, BxCxSxS, under a progress bar."""
    loader = DataLoader(Subset(data, rows), batch_size, collate_fn=collate, num_workers=workers)
    for views in progress(loader, text, unit="batch"):
        yield [plain(x[0].to(device), m, size) for x, m in zip(views, data.modalities)]


@torch.no_grad()
def embed(net, loader, N, kept):
    """One pass over the samples.  Returns the embeddings of the first `kept`, in batches (z1, z2),
    NxK on the CPU, and of each modality mean and biased variance over all samples, K each."""
    z, n, sums = ([], []), 0, [0, 0]
    for x in loader:
        for m, f in enumerate((net.f1, net.f2)):
            a = f(x[m]).cpu()                   # BxK
            z[m].extend([a] if n < kept else [])
            sums[m] += torch.stack((a.double(), a.double().pow(2))).sum(1)  # 2xK
        n += len(a)
    moments = [(mean.float(), (square - mean.pow(2)).clamp(min=0).float())
               for mean, square in (s / n for s in sums)]
    return list(zip(*(torch.cat(a)[:kept].split(N) for a in z))), moments


def read_scenes(settings, root, workers, device):
    """All made-up scenes and what is in them: [x1, x2] NxCxSxS and NxF classes, for train, test.

    None where the data are not made up, so that the factors are not known.
    """
    factors = Path(root[0]) / "factors.csv"
    if not factors.is_file():
        return None
    with open(factors, newline="") as file:
        classes = {row.pop("id"): [int(value) for value in row.values()]
                   for row in csv.DictReader(file)}
    scenes, y = [], []
    for split in ("train", "test"):
        part = open_data(settings, root, split)
        seen = batches(part, range(len(part)), settings["size"], 256, workers, device, split)
        scenes.append([torch.cat(x) for x in zip(*seen)])
        y.append(torch.tensor([classes[i] for i in part.ids], device=device))
    return scenes, y


def sweep(runs, root, out, workers, device):
    """Sec. 6 on made-up scenes: Table 4, Fig. 3a and the like from many runs, over their seeds.

    Prints a table: for each kind of run and modality the mean accuracy, and its standard deviation
    over the seeds, with which common / unique / backbone features tell what both modalities see and
    what it alone sees.  Draws sweep.png if the runs differ in a single number.
    """
    nets = [open_net(run / "checkpoint.pt", device) for run in runs]
    every = [settings for _, settings in nets]
    first = every[0]
    for settings, run in zip(every, runs):
        for name in ("scenario", "size", "backbone"):
            if settings[name] != first[name]:
                raise BadInput(f"--sweep: {name} is {settings[name]} in {run}, but {first[name]} "
                               f"in {runs[0]}; expected runs that see the same")
    root = root or trained_on(runs[0] / "checkpoint.pt", first)
    known = read_scenes(first, root, workers, device)
    if not known:
        raise BadInput(f"--sweep: no factors.csv under {root[0]}; expected runs of made-up scenes")
    save = open_out(out)
    differ = [name for name in first if name not in ("seed", "K", "Kc", "widths")
              and any(settings.get(name) != first[name] for settings in every)]
    # {what differs: {(m, features): [accuracies of each seed]}}, under None random and supervised
    found, seeds = {}, set()
    for net, settings in progress(nets, "runs", unit="run"):
        table = read_net(net, settings, parts_of(settings), *known,
                         settings["seed"] if settings["seed"] not in seeds else None)
        seeds.add(settings["seed"])
        for key, accuracies in table.items():
            run = None if "encoder" in key[1] else tuple(
                " ".join(v) if isinstance(v := settings.get(name), list) else v for name in differ)
            found.setdefault(run, {}).setdefault(key, []).append(accuracies)
    found = [(run if run is None else dict(zip(differ, run)),
              {key: np.array(a) for key, a in table.items()})           # seeds x factors
             for run, table in found.items()]
    names = first["modalities"]

    def cell(a):
        return f"{a.mean():.2f}" + (f"±{a.std(ddof=1):.2f}" if len(a) > 1 else "")

    print("| run (seeds) | " + " | ".join(f"{name}: {what}" for name in names
                                          for what in ("what both see", "what it alone sees"))
          + " |")
    print("|---" * 5 + "|")
    for run, table in sorted(found, key=lambda row: row[0] is None):
        lines = {"random encoder": ["random encoder"], "supervised encoder": ["supervised encoder"]}
        if run is not None:
            words = [name.replace("_", "-") if value is True else f"{name} {value}"
                     for name, value in run.items() if value is not False and value is not None]
            lines = {" ".join(words) or first["method"]: ["common", "unique", "backbone"]}
        for words, wanted in lines.items():
            n = len(next(iter(table.values())))
            print(f"| {words} ({n}) | " + " | ".join(
                " / ".join(cell(table[m, name][:, factor]) if (m, name) in table else "-"
                           for name in wanted)
                for m in (0, 1) for factor in (0, m + 1)) + " |")
    if len(differ) == 1 and all(type(run[differ[0]]) in (int, float) for run, _ in found if run):
        picture_sweep(save, found, names, differ[0], 1 / (int(known[1][0].max()) + 1))


def parts_of(settings):
    """{"common": its columns of an embedding, "unique": ...}, those that there are."""
    K, Kc = settings["K"], settings["Kc"]
    return {part: columns for part, columns in (("common", slice(0, Kc)), ("unique", slice(Kc, K)))
            if columns.start < columns.stop}


def trained_on(path, settings):
    """The folders where the run that wrote checkpoint `path` read its data."""
    record = path.with_name("args.json")
    recorded = json.loads(record.read_text()) if record.is_file() else {}
    root = recorded.get("data", f"data/{settings['scenario']}")
    return [root] if isinstance(root, str) else root


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Algorithm 2, the pictures of Sec. 7 and App. D.",
                                     allow_abbrev=False)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--checkpoint", type=Path, help="that pretrain.py wrote")
    group.add_argument("--sweep", nargs="+", type=Path, metavar="RUN",
                       help="folders of runs on made-up scenes: what their encoders know")
    parser.add_argument("--compare", type=Path, help="another one, in the alignment histograms")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=PICTURES,
                        help="pictures to make; default: all")
    parser.add_argument("--out", type=Path,
                        help="default: explain/ beside the checkpoint, with --sweep explain/")
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", metavar="DIR",
                       help="two for custom; default: what the checkpoint was trained on")
    group.add_argument("--split", help="default: what the checkpoint was trained on")
    group.add_argument("--samples", type=int,
                       help="pairs, drawn at random; default: 512, or all if there are fewer")
    group.add_argument("--seed", type=int, default=0, help="of the draw, the probes; default: 0")
    group.add_argument("--workers", type=int, default=0, help="that read files; default: 0")
    group = parser.add_argument_group("methods")
    group.add_argument("--tsne-dims", type=int, default=1024,
                       help="of each modality, at most; default: 1024")
    group.add_argument("--layer", help="of GradCAM; default: the last convolution, or MiT stage")
    group.add_argument("--pairs", type=int, default=6, help="on the GradCAM page; default: 6")
    group.add_argument("--steps", type=int, default=64, help="of integrated gradients; default: 64")
    group.add_argument("--batch-size", type=int, default=64,
                       help="for memory, no result depends on it; default: 64")
    args = parser.parse_args(argv)
    for name, least in (("samples", 8), ("seed", 0), ("workers", 0), ("tsne_dims", 4), ("pairs", 1),
                        ("steps", 1), ("batch_size", 1)):
        value, flag = getattr(args, name), name.replace("_", "-")
        if value is not None and value < least:
            raise BadInput(f"--{flag} {value}: expected {least} or more")
    return args


def main():
    args = get_args()
    rank, _, device = start_processes()
    if rank > 0:                                # under torchrun the first process does it all
        return
    out = args.out or (args.checkpoint.parent if args.checkpoint else Path()) / "explain"
    if args.sweep:
        return sweep(args.sweep, args.data, out, args.workers, device)
    net, settings = open_net(args.checkpoint, device)
    root = args.data or trained_on(args.checkpoint, settings)
    data = open_data(settings, root, args.split or settings["split"])
    samples = args.samples or min(512, len(data))
    if samples > len(data):
        raise BadInput(f"--samples {samples} is more than the {len(data)} pairs under {root[0]}; "
                       f"at most {len(data)}")
    found = [layers(f.E) for f in (net.f1, net.f2)]
    layer = args.layer or list(found[0])[-1]
    if layer not in found[0]:
        raise BadInput(f"--layer {layer}: no such layer; there are {' '.join(found[0])}")
    if args.compare:
        other, theirs = open_net(args.compare, device)
        for name in ("scenario", "modalities", "channels", "size"):
            if theirs[name] != settings[name]:
                raise BadInput(f"--compare: {name} is {theirs[name]} in {args.compare}, but "
                               f"{settings[name]} in {args.checkpoint}; give a run of that data")
    save, wanted = open_out(out), args.only

    K, Kc, names = settings["K"], settings["Kc"], settings["modalities"]
    parts = parts_of(settings)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    rows = rng.permutation(len(data))[:samples]
    load = partial(batches, data, rows, settings["size"], args.batch_size, args.workers, device)
    N = min(settings["batch_size"], samples)                            # in 1 and 2, as in training
    kept = min(4 * N, samples)                                          # Fig. 8 and 9: 4 batches
    print(f"{samples} of {len(data)} pairs of {' and '.join(names)} from {' '.join(root)}; N {N}  "
          f"K {K}  Kc {Kc}; {device.type}")
    z, moments = embed(net, load("embeddings"), N, kept)
    every = [torch.cat(a) for a in zip(*z)]
    z = [pair for pair in z if len(pair[0]) == N]
    nets = [part_means(f, mean.to(device), var.to(device), parts)
            for f, (mean, var) in zip((net.f1, net.f2), moments)]
    cams = [partial(gradcam_vis, f, named[layer], parts) for f, named in zip(nets, found)]

    log = args.checkpoint.with_name("log.jsonl")
    if "curves" in wanted and settings["method"] == "decur" and log.is_file():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        picture_curves(save, {name: [line[name] for line in lines] for name in lines[0]},
                       settings["batch_size"], K, Kc, not settings["no_intra"])
    elif "curves" in wanted:
        print(f"no {log} of DeCUR's terms, so curves.png is left out")
    if "alignment" in wanted:
        first = {part: retrieval(*(a[:, columns] for a in every))
                 for part, columns in (parts | {"all": slice(None)}).items()}
        print(f"the nearest of {kept} in the other modality is the partner (chance "
              f"{1 / kept:.3f}):",
              ", ".join(f"{part} {a:.3f}" for part, a in first.items()))
        others = []
        if args.compare:
            others = embed(other, load("embeddings to compare"), N, len(z) * N)[0]
        picture_alignment(save, z, parts, others)
    if "tsne" in wanted:
        picture_tsne(save, z, np.sort(rng.permutation(K)[:args.tsne_dims]), Kc, names, device)
    if "gradcam" in wanted:
        pairs = batches(data, rows[:args.pairs], settings["size"], 1, 0, device, "GradCAM")
        picture_gradcam(save, pairs, cams, names)
    if "spatial" in wanted:
        picture_spatial(save, load("GradCAM statistics"), cams)
    if "spectral" in wanted:
        picture_spectral(save, load("integrated gradients"), nets, parts, args.steps, names)
    if "factors" in wanted:
        known = read_scenes(settings, root, args.workers, device)
        if known:
            picture_factors(save, read_net(net, settings, parts, *known, args.seed), names,
                            1 / (int(known[1][0].max()) + 1))
        else:
            print("only made-up scenes have known factors, so factors.png is left out")


if __name__ == "__main__":
    run(main)
