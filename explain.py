"""Explains what was pretrained: Algorithm 2, and every picture of Sec. 7 and App. D.

    python explain.py --checkpoint runs/toy-rgbd-decur/checkpoint.pt
    python explain.py --checkpoint runs/rgbd-decur/checkpoint.pt --compare runs/cross/checkpoint.pt
    python explain.py --sweep runs/common-*               made-up scenes: Sec. 6 over seeds, Fig. 3a

    Algorithm 2   figure                  function                                picture, numbers
    1             Fig. 4a and 8, Eq. 7    alignment_histogram                     alignment.png .npz
    2             Fig. 1 and 9            tsne_vis                                tsne.png      .npz
    3             Fig. 4b and 10          gradcam, gradcam_vis                    gradcam.png   .npz
    4             Fig. 5a                 gradcam_stat                            spatial.png   .npz
    5             Fig. 5b                 integrated_gradients, IG_vis, IG_stat   spectral.png  .npz
    not there     made-up scenes only     linear_probe, sweep                     factors.png   .npz
                  the training's log      picture_curves                          curves.png    .npz
                  --only embeddings       picture_embeddings                      embeddings    .npz

What should be seen, what was measured and whether it is so is printed beside each path.  Names end
in _c for common and in _u for unique dimensions, as in Algorithm 2; a slice without dimensions has
maps of 0, which are not drawn.  Networks are in evaluation mode and see whole images.
"""
import argparse
import collections
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Subset

from data import (BadInput, Draws, epoch_batches, expand_path, run_main, need, number,
                  open_dataset, resize_and_normalise, show_progress, random_resized_crop, read_factors, read_json,
                  reading, make_visible, write_atomically)
from decur import BN, DeCUR, bounds, branch
from pretrain import (load_checkpoint, make_folder, measure_statistics, check_equal, read_environment,
                      read_settings)


# ---- Algorithm 2, 1: cross-modal representation alignment ----

def alignment_histogram(z1, z2, bins=20, top=1.0):
    """Eq. 7, L_i = (1 - C_ii)^2: 0 where both modalities agree in dimension i, 1 where unrelated.

    z1, z2   NxK   embeddings of one batch
    Returns the losses, K in [0, 4], and their counts in `bins` equal steps of (0, top).  The
    paper's top is 1, which leaves out dimensions with a negative C_ii: half of the unrelated."""
    z1, z2 = BN(z1), BN(z2)                     # NxK
    C_ii = (z1 * z2).mean(0)                    # K    on_diag(z1.T @ z2 / N), but no KxK matrix
    losses = (C_ii - 1).pow(2)                  # K
    return losses, torch.histc(losses, bins, 0, top)


# ---- Algorithm 2, 2: representation visualization ----

def tsne_vis(z1, z2, text="t-SNE"):
    """One point a DIMENSION, with N samples as coordinates.  z1, z2: NxK -> 2Kx2, z1's first; KL.

    Normalised features have the squared distance 2 N (1 - C_ij): near points are correlated."""
    feature = torch.cat((BN(z1), BN(z2)), -1)   # Nx2K
    feature = feature.permute(1, 0)             # 2KxN
    return tsne(feature, text=text)


def tsne(x, perplexity=30.0, steps=1000, text="t-SNE"):
    """Exact t-SNE (van der Maaten & Hinton, 2008).  x: nxD.  Returns nx2 and the final KL(P|Q).

    Starts from the first two principal components, lest the global arrangement be left to chance,
    with the rate of Belkina et al. (2019): n / 12, over the gradient's 4."""
    n = len(x)
    P = affinities(x, min(perplexity, (n - 1) / 3))                     # nxn
    U, S, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = U[:, :2] * S[:2]                                                # nx2
    y = y / y[:, 0].std().clamp(min=1e-12) * 1e-4
    velocity, gains, lr = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 50)
    near, pull = torch.empty_like(P), torch.empty_like(P)   # used again: each pass over nxn counts
    for step in show_progress(range(steps), text, unit="step"):
        early = step < steps // 4
        exaggeration, momentum = (12, 0.5) if early else (1, 0.8)
        student(y, near)                                                # nxn
        Q_share = 1 / (exaggeration * near.sum().item())
        torch.sub(P, near, alpha=Q_share, out=pull).mul_(near)          # nxn  (P - Q) near
        gradient = 4 * exaggeration * (pull.sum(1, keepdim=True) * y - pull @ y)  # nx2
        downhill = velocity * gradient < 0
        gains = torch.where(downhill, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = momentum * velocity - lr * gains * gradient
        y = y + velocity
    Q = student(y, near) / near.sum()
    return y, (torch.special.xlogy(P, P) - P * Q.clamp(min=1e-12).log()).sum().item()


def affinities(x, perplexity):
    """P of t-SNE, nxn: each point's Gaussian is as wide as gives the perplexity, by bisection."""
    D = distances(x).fill_diagonal_(torch.inf)                          # nxn
    D = D - D.min(1, keepdim=True).values                               # softmax stays the same
    beta = torch.ones_like(D[:, :1])                                    # nx1  1 / (2 sigma^2)
    low, high = torch.zeros_like(beta), torch.full_like(beta, torch.inf)
    for _ in range(40):
        P = (-beta * D).softmax(1)                                      # nxn
        wide = torch.special.entr(P).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return (P + P.T) / (2 * len(x))


def student(y, out):
    """1 / (1 + |y_i - y_j|^2), its diagonal 0, into out: nxn.  y: nx2.

    One product of nx4 matrices; its rounding is small beside the 1."""
    length, one = y.pow(2).sum(1, keepdim=True), torch.ones_like(y[:, :1])  # nx1
    left, right = torch.cat((-2 * y, 1 + length, one), 1), torch.cat((y, one, length), 1)
    return torch.mm(left, right.T, out=out).reciprocal_().fill_diagonal_(0)


def distances(x):
    """|x_i - x_j|^2, nxn, without a product of matrices, in which digits would cancel."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").pow(2)


# ---- Algorithm 2, 3: spatial saliency visualization ----

class TwoValues:
    """One modality's network with its output prepared: "we average the common and unique
    dimensions as two single values output" (Sec. 7).  Images NxCxHxW -> out1, Nx2.

    f1          encoder and projector
    mean, var   K, of the embedding over all samples: constants.  With the batch's own, the sum of a
                normalised feature over it is 0 whatever x is, so is its gradient, so is every map
    Kc          the first Kc dimensions are common
    layer       the module of f1 that GradCAM looks at"""

    def __init__(self, f1, mean, var, Kc, layer):
        self.f1, self.mean, self.var, self.Kc, self.layer = f1, mean, var, Kc, layer

    def __call__(self, x1):
        z1 = (self.f1(x1) - self.mean) / (self.var + 1e-5).sqrt()       # NxK  BN(f1(x1))
        z1_c = z1[:, :self.Kc].mean(-1, keepdim=True)                   # Nx1
        z1_u = z1[:, self.Kc:].mean(-1, keepdim=True)                   # Nx1
        out1 = torch.cat((z1_c, z1_u), -1)                              # Nx2
        return out1


def gradcam(net, layer, x, target, relu=False):
    """GradCAM (Selvaraju et al., 2017, Eq. 1-2): channels, weighted by their mean gradient, summed.

    net           function or module, NxCxHxW -> NxM
    layer         a module that net calls; its output is NxCxhxw, or NxhxwxC of a LayerNorm (MiT)
    target        column of the output, 0 <= target < M
    relu          the positive part only, as Selvaraju's Eq. 2; Algorithm 2's LayerGradCam keeps all
    Returns Nx1xhxw.  Samples do not mix as long as net is in evaluation mode."""
    outputs = []

    def hold(module, inputs, output):
        outputs.append(output.detach().requires_grad_())                # the graph starts here
        return outputs[-1].clone()                                      # in-place layers may follow

    hook = layer.register_forward_hook(hold)
    try:
        with torch.enable_grad():
            out = net(x)[:, target].sum()
    finally:
        hook.remove()
    A = outputs[0].detach()                                             # NxCxhxw
    G = torch.autograd.grad(out, outputs)[0]                            # NxCxhxw
    if isinstance(layer, nn.LayerNorm):
        A, G = A.permute(0, 3, 1, 2), G.permute(0, 3, 1, 2)
    attribution = (G.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True)  # Nx1xhxw
    return attribution.relu() if relu else attribution


def gradcam_vis(net1, x1, relu=False):
    """The common and the unique map, NxHxW each, of a `TwoValues`."""
    attr1_c = gradcam(net1, net1.layer, x1, 0, relu)                    # Nx1xhxw  Nx7x7 in Alg. 2
    attr1_u = gradcam(net1, net1.layer, x1, 1, relu)                    # Nx1xhxw
    return upsamp(attr1_c, x1), upsamp(attr1_u, x1)                     # NxHxW, Nx224x224 in Alg. 2


def upsamp(attr, x):
    return F.interpolate(attr, x.shape[-2:], mode="bilinear")[:, 0]     # NxHxW


def layers(E):
    """{name: module} for GradCAM, the last the default: "after the last convolutional layer".

    Paper: that in Sec. 7, but f1.last_conv2 in Algorithm 2.  Here: the last, in a ResNet-50
    layer4.2.conv3; --layer layer4.2.conv2 gives the other.  Of SegFormer: its stages' ends."""
    ends = ("norm1", "norm2", "norm3", "norm4")
    stages = {name: module for name, module in E.named_modules() if name in ends}
    return stages or {name: module for name, module in E.named_modules()
                      if isinstance(module, nn.Conv2d) and "downsample" not in name}


# ---- Algorithm 2, 4: spatial saliency statistics ----

def gradcam_stat(net1, net2, x1, x2):
    """How far the salient areas of both modalities overlap: two scores in [0, 1] for each pair.

    Paper: "norm" is not defined; Sec. 7 says multiply, take the logarithm, normalize each patch.
    Here: as the authors' code, logarithm and min-max of each map, then the mean of the product."""
    att1_c, att1_u = gradcam_vis(net1, x1, relu=True)                   # NxHxW
    att2_c, att2_u = gradcam_vis(net2, x2, relu=True)                   # NxHxW
    mul_c = (norm(att1_c) * norm(att2_c)).mean((1, 2))                  # N
    mul_u = (norm(att1_u) * norm(att2_u)).mean((1, 2))                  # N
    return mul_c, mul_u


def norm(att):
    """Logarithm of each map's positive part, scaled to 0..1; 0 where nothing is positive.  NxHxW"""
    return scaled((att.relu() + 1e-20).log10())


def scaled(att):
    """Each map of NxHxW from its minimum to its maximum, to 0..1; a flat one is 0."""
    low, high = att.amin((1, 2), keepdim=True), att.amax((1, 2), keepdim=True)
    span = high - low                           # of a 1x1 map, upsampled: rounding alone
    return torch.where(span > 1e-5 * high.abs(), (att - low) / span, 0)


# ---- Algorithm 2, 5: spectral saliency statistics ----

def integrated_gradients(net, x, x0=None, target=0, steps=32):
    """Integrated gradients (Sundararajan et al., 2017, Eq. 1): (x - x0) * mean gradient on the way.

    net      function or module, NxCxHxW -> NxM
    x0       the baseline, as x; None is 0, the mean of the data set where inputs are normalised
    steps    of the midpoint rule.  One at a time: memory is that of one batch, whatever the number
    Returns NxCxHxW, whose sum is net(x) - net(x0), "completeness", but for the rule's error."""
    x0 = torch.zeros_like(x) if x0 is None else x0
    total = torch.zeros_like(x)                 # NxCxHxW
    for step in range(steps):
        point = (x0 + (step + 0.5) / steps * (x - x0)).requires_grad_()
        with torch.enable_grad():
            out = net(point)[:, target].sum()
        total += torch.autograd.grad(out, point)[0]
    return (x - x0) * total / steps


def IG_vis(net1, x1, steps):
    """Integrated gradients of both values of a `TwoValues`, NxCxHxW each."""
    att1_c = integrated_gradients(net1, x1, None, 0, steps)
    att1_u = integrated_gradients(net1, x1, None, 1, steps)
    return att1_c, att1_u


def IG_stat(net1, x1, steps):
    """The importance of each band, NxC: the signed mean over the pixels.

    Paper: Algorithm 2 averages over images too, Fig. 5b counts them.  Here: a value an image."""
    att1_c, att1_u = IG_vis(net1, x1, steps)    # NxCxHxW
    imp_c = att1_c.mean((2, 3))                 # NxC
    imp_u = att1_u.mean((2, 3))                 # NxC
    return imp_c, imp_u


# ---- what is explained ----

@torch.no_grad()
def embed(net, loader, count):
    """One pass over the samples.  Returns z1 and z2, NxK on the CPU, of the first `count`, and for
    each modality mean and biased variance over all samples, K each."""
    z, n, sums = ([], []), 0, [0, 0]
    for x in loader:
        for m, f in enumerate((net.f1, net.f2)):
            z_batch = f(x[m]).cpu()             # BxK
            if n < count:
                z[m].append(z_batch)
            sums[m] += torch.stack((z_batch.double(), z_batch.double().pow(2))).sum(1)  # 2xK
        n += len(x[0])
    moments = []
    for mean, square in (total / n for total in sums):
        var = (square - mean.pow(2)).clamp(min=0)
        moments.append((mean.float().to(x[0].device), var.float().to(x[0].device)))
    return torch.cat(z[0])[:count], torch.cat(z[1])[:count], moments


class Explained:
    """What every picture needs.

    net, settings         of the checkpoint; N its batch size, K and Kc its dimensions
    data, samples         the data set, and which of its samples are explained
    z1, z2, batch_rows    embeddings of 4 N samples, as far as there are, and each batch's slice
    net1, net2, compared  `TwoValues` of the two modalities; z1 and z2 of --compare, or None"""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.net, settings = open_net(args.checkpoint, device)
        self.settings, self.modalities = settings, settings["modalities"]
        self.K, self.Kc = settings["K"], settings["Kc"]
        self.root = args.data or trained_on(args.checkpoint, settings)
        self.data = open_explained_data(settings, self.root, args.split or settings["split"])
        n = len(self.data)
        usual = n if args.only == ["embeddings"] else min(n, max(512, 4 * settings["batch_size"]))
        count = args.samples or usual
        need(count <= n, f"--samples {count}: expected at most the {n} pairs under {self.root[0]}")
        # Paper: Fig. 5 is of the whole data set.  Here: of these samples; --samples takes more.
        rng = np.random.default_rng(args.seed)
        self.samples = rng.permutation(n)[:count]
        self.dimensions = np.sort(rng.permutation(self.K)[:args.tsne_dims])
        N = min(settings["batch_size"], count)  # in Alg. 2, 1 and 2: as in training
        self.batch_rows = [slice(i, i + N) for i in range(0, count - N + 1, N)][:4]  # Fig. 8 and 9
        layers1, layers2 = layers(self.net.f1.E), layers(self.net.f2.E)
        layer = args.layer or list(layers1)[-1]
        need(layer in layers1, f"--layer {layer}: no such layer; there are {' '.join(layers1)}")
        if args.compare:
            other, others = open_net(args.compare, device)
            check_equal(others, settings, ("scenario", "modalities", "channels", "size"),
                       args.compare, "the first run; expected runs that see the same")
        make_folder(args.out)
        print(f"{count} of {n} pairs of {' and '.join(self.modalities)} from "
              f"{' '.join(self.root)}; N {N}  K {self.K}  Kc {self.Kc}; {device.type}")
        first = len(self.batch_rows) * N
        self.z1, self.z2, moments = embed(self.net, self.batches("embeddings"), first)
        self.net1 = TwoValues(self.net.f1, *moments[0], self.Kc, layers1[layer])
        self.net2 = TwoValues(self.net.f2, *moments[1], self.Kc, layers2[layer])
        example = torch.zeros(1, settings["channels"][0], settings["size"], settings["size"])
        h, w = gradcam(self.net1, self.net1.layer, example.to(device), 0).shape[-2:]
        if max(h, w) <= 2:
            print(f"warning: GradCAM's maps are {h}x{w} pixels, too coarse to tell places apart; "
                  f"give an earlier --layer, or pretrain with a larger --size")
        self.compared = embed(other, self.batches("compared"), first)[:2] if args.compare else None

    def batches(self, text):
        return batches(self.data, self.samples, self.settings["size"], self.args.batch_size,
                       self.args.workers, self.device, text)

    def parts(self, common, unique):
        """{"common": ..., "unique": ...}, without the one that has no dimensions."""
        both, sizes = {"common": common, "unique": unique}, (self.Kc, self.K - self.Kc)
        return {part: value for (part, value), size in zip(both.items(), sizes) if size > 0}


def open_net(path, device):
    """The pretrained network, in evaluation mode and frozen, and its settings, with the step."""
    checkpoint = load_checkpoint(path)
    try:
        settings = read_settings(checkpoint) | dict(step=checkpoint["step"])
        net = DeCUR(settings["backbone"], *settings["channels"], settings["widths"])
        net.load_state_dict(checkpoint["model"])
        need(all(t.isfinite().all() for t in net.state_dict().values()), "a weight is not finite")
        return net.to(device).eval().requires_grad_(False), settings
    except (BadInput, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be explained ({' '.join(str(error).split())[:150]}); "
                       f"expected a whole pretraining, with both encoders; give another") from None


def trained_on(path, settings):
    """Where the run that wrote checkpoint `path` read its data: a list, of two for custom."""
    record, root = path.with_name("args.json"), f"data/{settings['scenario']}"
    if record.is_file():
        root = read_json(record, "the record of a run by pretrain.py").get("data")
    need(isinstance(root, (str, list)), f"{record} names no data; expected folders; give --data")
    return [root] if isinstance(root, str) else [str(folder) for folder in root]


def open_explained_data(settings, root, split):
    """The data set, or BadInput if it is not of the kind that the checkpoint knows."""
    custom = dict(inputs=settings["inputs"]) if settings["scenario"] == "custom" else {}
    need(len(root) == (2 if custom else 1),
         f"--data {' '.join(root)}: expected two folders or patterns for custom, one otherwise")
    data = open_dataset(settings["scenario"], root if custom else root[0], settings["size"], split,
                      settings["depth_unit"], settings["seed"], **custom)
    shown = [[name, len(views[0])] for name, views in zip(data.modalities, data[0])]
    trained = [list(pair) for pair in zip(settings["modalities"], settings["channels"])]
    need(shown == trained, f"{root[0]} holds {shown}, the checkpoint knows {trained}; give --data")
    return data


def batches(data, samples, size, batch_size, workers, device, text):
    """Batches [x1, x2] of what the networks see, BxCxSxS, under a progress bar."""
    loader = DataLoader(Subset(data, samples), batch_size, num_workers=workers)
    for views in show_progress(loader, text, unit="batch"):
        yield [resize_and_normalise(x[0].to(device), row, size)
               for x, row in zip(views, data.inputs)]


def main(argv=None):
    args = get_args(argv)
    rank, _, device = read_environment()
    if rank > 0:                                # under torchrun the first process does it all
        return
    if args.sweep:
        return sweep(args, device)
    e = Explained(args, device)
    stopped = e.settings["stopped"] or f"at step {e.settings['step']}"  # "at step 100 of 200"
    caption = f"{args.checkpoint.resolve().parent.name} {stopped}"
    for name in args.only:
        image, numbers, sentence = PICTURES[name](e)
        save_picture(args.out, name, image, numbers, sentence, caption)


# ---- made-up scenes: what a linear probe reads ----

FEATURES = ("common", "unique", "backbone")
YARDSTICKS = ("random encoder", "supervised encoder")


def linear_probe(x, y, x_test, y_test, decay=1e-2):
    """Accuracy on unseen samples of logistic regression, with a decay of the squared weights of
    features of standard deviation 1.  x: NxD features, y: N classes, W: (D+1)xM, biases last."""
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, x_test = (x - mean) / std, (x_test - mean) / std
    W = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, device=x.device, requires_grad=True)
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
    for step in show_progress(range(steps), "supervised encoder", unit="step"):
        epoch, i = divmod(step, len(x) // N)
        batch = epoch_batches(len(x), N, seed, epoch)[i]
        draws.restart(step)
        scores = head(E(random_resized_crop(x[batch], x.shape[-1], (0.5, 1.0), draws)))
        loss = F.cross_entropy(scores.unflatten(1, (-1, classes)).mT, y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def features(f, x):
    """f(x) in evaluation mode, 256 samples at a time."""
    f.eval()
    return torch.cat([f(chunk) for chunk in x.split(256)])              # NxD


def read_features(settings, m, f, seed, x, y, x_test, y_test):
    """{features: accuracies, one a factor} of modality m's branch f.  x: NxCxSxS, y: NxF.

    With a seed also of a backbone that knows nothing, and of one that is told all."""
    Kc, z, z_test = settings["Kc"], features(f, x), features(f, x_test)  # NxK
    inputs = dict(common=(z[:, :Kc], z_test[:, :Kc]), unique=(z[:, Kc:], z_test[:, Kc:]))
    encoders = {"backbone": f.E}
    if seed is not None:
        torch.manual_seed(seed)
        for name in YARDSTICKS:
            encoders[name] = branch(settings["backbone"], settings["channels"][m], ()).E.to(x)
        measure_statistics(encoders["random encoder"], ([chunk] for chunk in x.split(256)))
        supervised(encoders["supervised encoder"], x, y, seed)
    for name, E in encoders.items():
        inputs[name] = features(E, x), features(E, x_test)
    accuracies = {}
    for name, (train, test) in inputs.items():
        if train.shape[1] > 0:
            accuracies[name] = [linear_probe(train, y[:, factor], test, y_test[:, factor])
                                for factor in range(y.shape[1])]
    return accuracies


def read_runs(runs, root, args, device):
    """{(label, m, features): accuracies, seeds x factors} of made-up scenes, of which the factors
    are known; None if there are none under root.  runs: (label, net, settings) each."""
    settings, x, y = runs[0][2], [], []
    if not (Path(root[0]) / "factors.csv").is_file():
        return None
    factors = read_factors(root[0])
    for split in ("train", "test"):
        data = open_explained_data(settings, root, split)
        missing = [name for name in data.ids if name not in factors]
        need(not missing, f"factors.csv lacks {missing[:1]}; make the scenes again: data.py toy")
        y.append(torch.tensor([factors[name] for name in data.ids], device=device))
        loader = batches(data, range(len(data)), settings["size"], 256, args.workers, device, split)
        x.append([torch.cat(images) for images in zip(*loader)])        # NxCxSxS each
    accuracies, seeds = collections.defaultdict(list), set()
    for label, net, settings in runs:
        print(f"probes of {label}, seed {settings['seed']}")
        seed = None if settings["seed"] in seeds else settings["seed"]  # yardsticks: once a seed
        seeds.add(seed)
        for m, f in enumerate((net.f1, net.f2)):
            table = read_features(settings, m, f, seed, x[0][m], y[0], x[1][m], y[1])
            for name, values in table.items():
                key = (name, m, "backbone") if name in YARDSTICKS else (label, m, name)
                accuracies[key].append(values)
    return {key: np.array(values) for key, values in accuracies.items()}


def sweep(args, device):
    """Sec. 6 on made-up scenes: Table 4, Fig. 3a and the like from many runs, over their seeds.

    Runs whose folders have one name but for -SEED at its end are one line of the table."""
    runs = []
    for folder in args.sweep:
        net, settings = open_net(folder / "checkpoint.pt", device)
        label = re.sub(rf"[-_](seed|s)?{settings['seed']}$", "", folder.resolve().name)
        runs.append((label, net, settings))
        check_equal(settings, runs[0][2], ("scenario", "size", "backbone"), f"--sweep {folder}",
                   "the first run; expected runs that see the same")
    root = args.data or trained_on(args.sweep[0] / "checkpoint.pt", runs[0][2])
    accuracies = read_runs(runs, root, args, device)
    need(accuracies, f"--sweep: no factors.csv under {root[0]}; expected runs of made-up scenes")
    make_folder(args.out)
    picture = picture_accuracies(accuracies, runs[0][2]["modalities"])
    save_picture(args.out, "sweep", *picture, f"{len(runs)} runs")


# ---- the pictures: each returns an image, its numbers, and a sentence ----

# Of Okabe and Ito: colour-blind readers tell them apart.
INK, GREY, PAPER, RED, BLUE = "#000000", "#8c8c8c", "#ffffff", "#d55e00", "#0072b2"
COLOURS = dict(common="#009e73", unique="#e69f00", backbone=INK)
TERMS = dict(loss=INK, L1=RED, L2=BLUE, Lc=COLOURS["common"], Lu=COLOURS["unique"])
MARKS = ((RED, "cross"), (BLUE, "square"), (RED, "dot"), (BLUE, "dot"))  # common, then unique


def claim(words, numbers, less):
    """What should be, what was measured: is numbers[less] lower ("hardly": by < 5 % or 0.01)?"""
    measured = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    if len(numbers) < 2:
        return f"{words}: {measured}"
    highest, answer = max(numbers.values()), "yes"
    if numbers[less] > highest - max(0.01, 0.05 * abs(highest)):
        answer = "hardly" if numbers[less] < highest else "no"
    return f"{words}: {measured}: is {less} lower? {answer}"


def picture_curves(e):
    """The terms of Eq. 6 and the mean diagonals as they were logged."""
    path = e.args.checkpoint.with_name("log.jsonl")
    if e.settings["method"] != "decur" or not path.is_file():
        return None, {}, f"no {path} of DeCUR's terms, so curves.png is left out"
    log = read_log(path)
    limits = bounds(e.settings["batch_size"], e.K, e.Kc, not e.settings["no_intra"])
    chance, floor = (sum(values.values()) for values in limits)
    steps, names = log["step"], [name for name in TERMS if any(log.get(name, ()))]  # 0: ablated
    legend = [("loss", INK)]
    legend += [(f"{name}, {name.replace('L', 'C')}", TERMS[name]) for name in names[1:]]
    image, pen = page(944, TOP + 300 + M, f"Pretraining: the loss and its terms L; grey: chance "
                      f"{chance:.1f}, floor {floor:.1f}; right: mean diagonals C", legend)
    lines = {name: log[name] for name in names}
    lines |= {"chance": [chance] * len(steps), "floor": [floor] * len(steps)}
    logs = {name: np.log10(np.maximum(a, 1e-2)) for name, a in lines.items()}  # a loss can be 0
    ends = np.array(list(logs.values()))
    at = axes(pen, panel(0, 2, 448, 300), (0, steps[-1]),
              (math.floor(ends.min()), ends.max() + 0.1), "", "step", "loss", powers=True)
    for name, a in logs.items():
        curve(pen, at, steps, a, TERMS.get(name, GREY))
    at = axes(pen, panel(1, 2, 448, 300), (0, steps[-1]), (-0.2, 1), "", "step", "mean diagonal")
    means = {name: log[name] for name in ("C1", "C2", "Cc", "Cu") if name in log}
    for name, a in means.items():
        curve(pen, at, steps, a, TERMS[name.replace("C", "L")])
    last = {name: a[-1] for name, a in means.items() if name in ("Cc", "Cu")}
    return image, log, claim(f"Loss {log['loss'][-1]:.4g} at step {steps[-1]} (chance "
                             f"{chance:.4g}, floor {floor:.4g}); the mean diagonal Cc should rise "
                             f"to 1 and Cu stay at 0, below it", last, "Cu")


def read_log(path):
    """{name: values} of a run's log.jsonl."""
    log = {}
    with reading(path, "the numbers of a step on each line", "or leave curves out of --only"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name in lines[0]:
            log[name] = [line[name] for line in lines]
        finite = np.isfinite(np.array(list(log.values()), float)).all()  # numbers, all of them
        if not finite or min(log["step"]) < 1:
            raise ValueError("a number is not finite, or a step below 1")
        return log


def picture_alignment(e):
    """Fig. 4a, 8."""
    pairs = e.parts((e.z1[:, :e.Kc], e.z2[:, :e.Kc]), (e.z1[:, e.Kc:], e.z2[:, e.Kc:]))
    parts, n, sizes = list(pairs), len(e.batch_rows), dict.fromkeys(pairs, e.K)
    legend = [(f"{part} dimensions", COLOURS[part]) for part in pairs]
    if e.compared:
        pairs["compared"], sizes["compared"] = e.compared, e.compared[0].shape[1]
        legend.append(("all of the compared run", INK, "outline"))
    losses = {}                                 # batches x dimensions each
    for part, (z1, z2) in pairs.items():
        losses[part] = torch.stack([alignment_histogram(z1[batch], z2[batch])[0]
                                    for batch in e.batch_rows])
    top = max(1.5, *(a.max().item() for a in losses.values()))  # up to 4, not Algorithm 2's 1
    image, pen = page(944, TOP + math.ceil(n / 2) * (250 + M), "Cross-modal alignment: dimensions "
                      "by their loss, Eq. 7; bars of common and unique ones are stacked", legend)
    for i in range(n):
        heights = {part: torch.histc(a[i], 40, 0, top).numpy() * 100 / sizes[part]
                   for part, a in losses.items()}
        highest, base = sum(a.max() for a in heights.values()), np.zeros(40)
        at = axes(pen, panel(i, 2, 448, 250), (0, top), (0, highest), f"batch {i + 1}",
                  "loss: 0 aligned, 1 unrelated, above 1 opposed", "% of K dimensions")
        for part in parts:
            bars(pen, at, np.linspace(0, top, 41), heights[part], base, COLOURS[part])
            base = base + heights[part]
        if e.compared:
            bars(pen, at, np.linspace(0, top, 41), heights["compared"], np.zeros(40), None, INK)
        pen.line((*at(1, 0), *at(1, highest)), GREY)
    means = {part: losses[part].mean().item() for part in parts}
    return image, losses, claim("Common losses should be 0, unique ones 1; mean", means, "common")


def picture_tsne(e):
    """Fig. 1, 9."""
    results, n, k = [], len(e.batch_rows), len(e.dimensions)
    for i, batch in enumerate(e.batch_rows):
        z1, z2 = (z[batch][:, e.dimensions].to(e.device) for z in (e.z1, e.z2))
        results.append(tsne_vis(z1, z2, f"t-SNE {i + 1} of {n}"))
    points = np.stack([y.cpu().numpy() for y, _ in results])            # batches x 2k x 2
    unique = e.dimensions >= e.Kc               # k
    side, shares = 448, collections.defaultdict(list)
    legend = []
    for part, first in e.parts(0, 2).items():
        legend += [(f"{name} {part}", *MARKS[first + m]) for m, name in enumerate(e.modalities)]
    image, pen = page(944, TOP + math.ceil(n / 2) * (side + M),
                      "t-SNE: a mark is a dimension, a panel a batch", legend)
    for i, y in enumerate(points):
        box = panel(i, 2, side, side)
        pen.rectangle(box, None, GREY)
        middle, radius = (y.min(0) + y.max(0)) / 2, max(np.ptp(y, axis=0).max() / 2, 1e-12)
        pixels = (y - middle) / radius * (side / 2 - M) + np.reshape(box, (2, 2)).mean(0)
        nearest = distances(torch.from_numpy(y)).fill_diagonal_(torch.inf).argmin(1)
        for j, (px, py) in enumerate(pixels):
            m, dimension = divmod(j, k)
            mark(pen, px, py, *MARKS[2 * unique[dimension] + m])
            part = "unique" if unique[dimension] else "common"
            shares[part].append(float(nearest[j] == (j + k) % (2 * k)))
    kl = " ".join(f"{divergence:.3f}" for _, divergence in results)
    return image, dict(points=points, dimensions=e.dimensions, Kc=e.Kc), claim(
        f"KL of each batch {kl}.  Common dimensions should lie on their partners of the other "
        f"modality, unique ones apart; share whose nearest is the partner",
        {part: np.mean(a) for part, a in shares.items()}, "unique")


def picture_gradcam(e):
    """Fig. 4b, 10."""
    side, empty, pairs, numbers = 144, 0, [], collections.defaultdict(list)
    for x in batches(e.data, e.samples[:e.args.pairs], e.settings["size"], 1, 0, e.device, "pairs"):
        tiles = []
        for m, (name, net) in enumerate(zip(e.modalities, (e.net1, e.net2))):
            picture = make_visible(x[m][0], e.data.inputs[m])
            tiles.append((name, picture, ""))
            for part, att in e.parts(*gradcam_vis(net, x[m])).items():
                colours = viridis(scaled(att.relu())[0].cpu().numpy()) / 255
                note = "" if att.max() > 0 else "no positive pixel"
                tiles.append((f"{name}, {part}", 0.45 * picture + 0.55 * colours, note))
                empty += note != ""
                numbers[f"modality{m + 1}_{part}"].append(att[0].cpu().numpy())
        pairs.append(tiles)
    image, pen = page(2 * M + len(tiles) * (side + 4), TOP + len(pairs) * (side + 4) + M,
                      "GradCAM: what raises the mean of common, of unique dimensions (violet: "
                      "nothing, yellow: most)")
    for row, tiles in enumerate(pairs):
        for column, (words, tile, note) in enumerate(tiles):
            x, y = M + column * (side + 4), TOP + row * (side + 4)
            tile = Image.fromarray((tile * 255).astype(np.uint8)).resize((side, side))
            image.paste(tile, (x, y))
            pen.text((x + side / 2, y + side / 2), note, PAPER, FONT, "mm")
            if row == 0:
                pen.text((x, y - LINE - 2), words, INK, FONT)
    return image, numbers, (f"A row is a pair: common maps should lie on what both show, unique on "
                            f"what one alone shows; {empty} maps have no positive pixel")


def picture_spatial(e):
    """Fig. 5a."""
    stats = [gradcam_stat(e.net1, e.net2, x1, x2) for x1, x2 in e.batches("GradCAM statistics")]
    mul_c, mul_u = (torch.cat(scores).cpu().numpy() for scores in zip(*stats))
    scores = e.parts(mul_c, mul_u)
    means = {part: a.mean() for part, a in scores.items()}
    image, pen = page(560, TOP + len(scores) * (220 + M), "Overlap of the two modalities' GradCAM "
                      "maps, Fig. 5a; line: mean", [(part, COLOURS[part]) for part in scores])
    for i, (part, a) in enumerate(scores.items()):
        counts, edges = np.histogram(a, 40, (0, 1))
        highest = 1.05 * counts.max()
        at = axes(pen, panel(i, 1, 528, 220), (0, 1), (0, highest), f"mean {means[part]:.3f}",
                  "score: 0 no overlap, 1 the same places", "pairs")
        bars(pen, at, edges, counts, np.zeros(40), COLOURS[part])
        pen.line((*at(means[part], 0), *at(means[part], highest)), INK, 2)
    return image, scores, claim("Unique scores should stand further left (the paper: a slight "
                                "trend); mean", means, "unique")


def picture_spectral(e):
    """Fig. 5b."""
    stats, errors = ([], []), []
    for x in e.batches("integrated gradients"):
        for m, net in enumerate((e.net1, e.net2)):
            imp = torch.stack(IG_stat(net, x[m], e.args.steps), 1)      # Nx2xC
            stats[m].append(imp.cpu())
            with torch.no_grad():
                gain = net(x[m]) - net(torch.zeros_like(x[m]))          # Nx2
            error = imp.sum(2) * x[m][0, 0].numel() - gain              # Nx2  completeness
            errors.append(torch.stack((error, gain)).abs().nanmean((1, 2)).cpu())
    error, gain = torch.stack(errors).mean(0).tolist()
    numbers, sentences = {}, [f"Completeness error {error:.2g} of {gain:.2g}, {e.args.steps} steps"]
    image, pen = page(944, TOP + 2 * (240 + M), "Integrated gradients, Fig. 5b: how far each band "
                      "moves the mean of common, of unique dimensions",
                      [(part, COLOURS[part]) for part in e.parts(0, 1)])
    for m, name in enumerate(e.modalities):
        imp_c, imp_u = torch.cat(stats[m]).unbind(1)                    # NxC
        # Paper: "we normalize the scores".  Here: by the largest magnitude in the modality, common
        # and unique together.
        scores = e.parts(imp_c.numpy(), imp_u.numpy())
        largest = max(1e-12, *(np.abs(a).max() for a in scores.values()))
        numbers |= {f"modality{m + 1}_{part}": a / largest for part, a in scores.items()}
        means = {part: np.abs(a / largest).mean(0) for part, a in scores.items()}  # C
        grouped_bars(pen, panel(m, 1, 912, 240), means, e.data.inputs[m]["bands"], name,
                     "mean magnitude of the score")
        sentences.append(claim(f"{name}: the paper's optical moves unique ones more; mean",
                               {part: a.mean() for part, a in means.items()}, "common"))
    return image, numbers, "\n  ".join(sentences)


def picture_factors(e):
    """How well a linear probe reads each factor of the made-up scenes."""
    run = ("this run", e.net, e.settings | dict(seed=e.args.seed))
    accuracies = read_runs([run], e.root, e.args, e.device)
    if not accuracies:
        return None, {}, "only made-up scenes have known factors, so factors.png is left out"
    image, _, sentence = picture_accuracies(accuracies, e.modalities)
    names = [f"{e.modalities[m]}, {name if label == 'this run' else label}"
             for label, m, name in accuracies]
    return image, dict(rows=names, accuracy=[a[0] for a in accuracies.values()]), sentence


def picture_accuracies(accuracies, modalities):
    """Prints a table with mean and standard deviation over the seeds, and draws the means."""
    labels = dict.fromkeys(label for label, _, _ in accuracies)
    labels = sorted(labels, key=YARDSTICKS.__contains__)                # those come last
    lines, titles, sentences = {label: [] for label in labels}, [], []
    seen = (0, 0, "unique"), (0, 1, "common"), (1, 0, "unique"), (1, 2, "common")
    image, pen = page(944, TOP + 4 * (200 + M), "Accuracy of a linear probe on unseen scenes, mean "
                      "over seeds", [(name, COLOURS[name]) for name in FEATURES])
    for i, (m, factor, less) in enumerate(seen):
        titles.append(f"{modalities[m]}: what {'it alone sees' if factor else 'both see'}")
        means = {name: [] for name in FEATURES}
        for label in labels:
            cells = []
            for name in FEATURES:
                values = accuracies.get((label, m, name), np.zeros((0, 3)))[:, factor]
                means[name].append(values.sum() / max(1, len(values)))
                cells.append(f"{means[name][-1]:.2f}" if len(values) else "-")
                if len(values) > 1:
                    cells[-1] += f"±{values.std(ddof=1):.2f}"
            lines[label].append(" / ".join(cells))
        grouped_bars(pen, panel(i, 1, 912, 200), means, labels, titles[-1], "accuracy")
        parts = {name: means[name][0] for name in FEATURES[:2]
                 if (labels[0], m, name) in accuracies}
        sentences.append(claim(f"{labels[0]}: {titles[-1]}, less in {less}", parts, less))
    print(f"| {' / '.join(FEATURES)} (seeds) | {' | '.join(titles)} |\n" + "|---" * 5 + "|")
    for label, cells in lines.items():
        print(f"| {label} ({len(accuracies[label, 0, 'backbone'])}) | {' | '.join(cells)} |")
    numbers = {f"{label} {modalities[m]} {name}": a for (label, m, name), a in accuracies.items()}
    return image, numbers, "\n  ".join(sentences)


def picture_embeddings(e):
    """No picture, but every sample's embeddings and features, for programs of one's own."""
    columns = dict(z1=[], z2=[], features1=[], features2=[])            # MxK, MxK, Mxd, Mxd
    for x in e.batches("embeddings and features"):
        for m, f in enumerate((e.net.f1, e.net.f2)):
            backbone = features(f.E, x[m])
            columns[f"features{m + 1}"].append(backbone.cpu())
            columns[f"z{m + 1}"].append(features(f.P, backbone).cpu())
    numbers = {name: torch.cat(batches).numpy() for name, batches in columns.items()}
    numbers |= dict(names=[e.data.ids[i] for i in e.samples], Kc=e.Kc)
    return None, numbers, "z1 and z2 are not normalised; their first Kc columns are common"


PICTURES = dict(curves=picture_curves, alignment=picture_alignment, tsne=picture_tsne,
                gradcam=picture_gradcam, spatial=picture_spatial, spectral=picture_spectral,
                factors=picture_factors, embeddings=picture_embeddings)


def save_picture(out, name, image, numbers, sentence, caption):
    """The picture, whose run it shows, and its numbers.  Prints how to read it."""
    if image:
        image = ImageOps.expand(image, (0, 0, 0, LINE), PAPER)
        corner = image.width - M, image.height - M
        ImageDraw.Draw(image).text(corner, caption, GREY, FONT, "rs")
        write_atomically(out / f"{name}.png", partial(image.save, format="PNG"))
    if numbers:
        write_atomically(out / f"{name}.npz", lambda file: np.savez(file, **numbers))
        print(f"{out / name}{'.png and .npz' if image else '.npz'}")
    print(f"  {sentence}")


# ---- a plot kit, with Pillow: one font, one margin ----

VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
FONT, LINE, M = ImageFont.load_default(14), 20, 16  # a line's height and the margin, in pixels
TOP = 2 * M + 2 * LINE                          # where panels begin, below title and legend


def page(width, height, title, legend=()):
    """A blank figure with its title and a legend of (words, colour, shape).  Returns image, pen."""
    image = Image.new("RGB", (width, height), PAPER)
    pen, x = ImageDraw.Draw(image), M
    pen.text((M, M), title, INK, FONT)
    for words, *look in legend:
        mark(pen, x + 5, M + LINE + 12, *look)
        pen.text((x + 17, M + LINE + 4), words, INK, FONT)
        x += 17 + FONT.getlength(words) + 2 * M
    return image, pen


def mark(pen, x, y, colour, shape="box"):
    box = (x - 4, y - 4, x + 4, y + 4)
    if shape == "cross":
        pen.line(box, colour)
        pen.line((x - 4, y + 4, x + 4, y - 4), colour)
    elif shape == "dot":
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
    else:
        pen.rectangle(box, colour if shape == "box" else None, colour)


def panel(i, columns, width, height):
    """The box (left, top, right, bottom) of panel i; panels fill the page row by row."""
    x, y = M + i % columns * (width + M), TOP + i // columns * (height + M)
    return x, y, x + width, y + height


def axes(pen, box, xs, ys, title, xlabel, ylabel, powers=False, words=None):
    """Axes over xs[0]..xs[1] and ys[0]..ys[1], with ticks and words.  Returns (x, y) -> pixel.

    powers   y is a logarithm to the base of 10
    words    stand at 0.5, 1.5, ... in place of numbers"""
    left, top, right, bottom = box[0] + 36, box[1] + LINE + 8, box[2] - 8, box[3] - 2 * LINE

    def at(x, y):
        return (round(left + (x - xs[0]) / (xs[1] - xs[0]) * (right - left)),
                round(bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top)))

    pen.text(box[:2], ylabel, INK, FONT)
    pen.text((right, box[1]), title, INK, FONT, "ra")
    pen.text(((left + right) / 2, bottom + LINE + 2), xlabel, INK, FONT, "ma")
    labels = {i + 0.5: word for i, word in enumerate(words or ())}
    for x, label in (labels or {x: f"{x:g}" for x in ticks(*xs)}).items():
        pen.line((at(x, 0)[0], bottom, at(x, 0)[0], bottom + 4), GREY)
        pen.text((at(x, 0)[0], bottom + 6), label, INK, FONT, "ma", align="center")
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
    if len(points) < 20:
        for x, y in points:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)


def bars(pen, at, edges, heights, base, colour, outline=None):
    """Histogram bars that stand on `base`, filled, or outlined with None as their colour."""
    for x0, x1, y0, height in zip(edges, edges[1:], base, heights):
        (x0, y1), (x1, y0) = at(x0, y0 + height), at(x1, y0)
        if y0 > y1:                             # nothing is nothing, not a line
            pen.rectangle((x0, y1, x1 - 2, y0 - 1), colour, outline, 2)


def grouped_bars(pen, box, groups, words, title, ylabel):
    """Bars side by side above each of the words.  groups: {a key of COLOURS: heights}."""
    highest = max(1e-12, *(max(heights) for heights in groups.values()))
    at = axes(pen, box, (0, len(words)), (0, 1.05 * highest), title, "", ylabel, words=words)
    for i, (name, heights) in enumerate(groups.items()):
        for j, height in enumerate(heights):
            left, width = j + 0.1 + 0.8 * i / len(groups), 0.8 / len(groups)
            bars(pen, at, (left, left + width), [height], [0], COLOURS[name])


def viridis(value):
    """0..1 -> colour, 0..255, along a last dimension of 3."""
    levels = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(value, levels, channel) for channel in VIRIDIS.T], -1)


def user_path(text):
    return Path(expand_path(text))


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Algorithm 2, the pictures of Sec. 7 and App. D.",
                                     allow_abbrev=False)
    add, group = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--checkpoint", type=user_path, help="that pretrain.py wrote")
    group.add_argument("--sweep", nargs="+", type=user_path, metavar="RUN",
                       help="folders of runs on made-up scenes: what their encoders know")
    add("--compare", type=user_path, help="another one, in the alignment histograms")
    add("--only", nargs="+", choices=PICTURES, default=list(PICTURES)[:-1],
        help="pictures to make; default: all, but not embeddings")
    add("--out", type=user_path, help="default: explain/ beside the checkpoint, --sweep: explain/")
    add("--data", type=expand_path, nargs="+", metavar="DIR",
        help="for custom two folders or patterns; default: what the checkpoint was trained on")
    add("--split", type=expand_path, help="default: what the checkpoint was trained on")
    add("--samples", type=number(int, 8), help="random pairs; default: 512, or 4 N if more, or all")
    add("--seed", type=number(int, 0), default=0, help="of the draw, the probes; default: 0")
    add("--workers", type=number(int, 0), default=0, help="that read files; default: 0")
    add("--tsne-dims", type=number(int, 4), default=1024, help="of each modality; default: 1024")
    add("--layer", help="of GradCAM; default: the last convolution, or MiT stage")
    add("--pairs", type=number(int, 1), default=6, help="on the GradCAM page; default: 6")
    add("--steps", type=number(int, 1), default=64, help="of integrated gradients; default: 64")
    add("--batch-size", type=number(int, 1), default=64,
        help="for memory; the same but for rounding, which moves a t-SNE's points; default: 64")
    args = parser.parse_args(argv)
    args.out = args.out or (args.checkpoint.parent if args.checkpoint else Path()) / "explain"
    return args


if __name__ == "__main__":
    run_main(main)
