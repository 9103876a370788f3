"""Explains a pretrained run: Algorithm 2, and every picture of Sec. 7 and App. D.

    python explain.py --checkpoint runs/toy-rgbd-decur/checkpoint.pt
    python explain.py --checkpoint runs/rgbd-decur/checkpoint.pt --compare runs/cross/checkpoint.pt
    python explain.py --sweep runs/common-*               many runs on made-up scenes: Sec. 6

    Algorithm 2   figure                  function                                picture, numbers
    1             Fig. 4a and 8, Eq. 7    alignment_histogram                     alignment.png .npz
    2             Fig. 1 and 9            tsne_vis                                tsne.png      .npz
    3             Fig. 4b and 10          gradcam, gradcam_vis                    gradcam.png   .npz
    4             Fig. 5a                 gradcam_stat                            spatial.png   .npz
    5             Fig. 5b                 integrated_gradients, IG_vis, IG_stat   spectral.png  .npz
    not there     made-up scenes only     variance_shares, linear_probe           factors.png   .npz
                  the log of training     picture_curves                          curves.png    .npz
                  --only embeddings       retrieve, picture_embeddings            embeddings    .npz

For each picture it prints what is expected, the measured numbers, and whether the two agree.  As in
Algorithm 2, names in _c are of the common dimensions, names in _u of the unique dimensions.  If a
run has no unique dimensions, their maps are not drawn.  Networks are in evaluation mode and see
whole images.
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
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Subset

from data import (SHAPES, expand_path, make_visible, name_composite, need, number,
                  open_dataset, read_factors, read_mask, reading, resize, resize_and_normalise,
                  run_main, show_progress, write_atomically)
from decur import BN, DeCUR, bounds, branch
from pretrain import (check_equal, describe_input, differ, load_checkpoint, make_folder,
                      measure_statistics, read_environment, read_settings)


# ---- Algorithm 2, 1: cross-modal representation alignment ----

def alignment_histogram(z1, z2, bins=20, top=1.0):
    """Computes Eq. 7, L_i = (1 - C_ii)^2: 0 if the modalities agree in dimension i, 1 if they are
    unrelated.

    z1, z2   NxK   embeddings of one batch
    Returns the K losses, each in [0, 4], and how many losses lie in each of `bins` equal steps from
    0 to `top`.  The paper's histogram ends at 1, so it leaves out dimensions with a negative C_ii.
    These are half of the unrelated dimensions."""
    z1, z2 = BN(z1), BN(z2)                     # NxK
    C_ii = (z1 * z2).mean(0)                    # K    on_diag(z1.T @ z2 / N), but no KxK matrix
    losses = (C_ii - 1).pow(2)                  # K
    return losses, torch.histc(losses, bins, 0, top)


# ---- Algorithm 2, 2: representation visualization ----

def tsne_vis(z1, z2, text="t-SNE"):
    """Returns one point per DIMENSION (2Kx2, those of z1 first) and the KL divergence.

    z1, z2   NxK   the N samples are the coordinates of a dimension
    Dimensions i and j of BN(z) have the squared distance 2 N (1 - C_ij), so near points are
    correlated dimensions."""
    feature = torch.cat((BN(z1), BN(z2)), -1)   # Nx2K
    feature = feature.permute(1, 0)             # 2KxN
    return tsne(feature, text=text)


def tsne(x, perplexity=30.0, steps=1000, text="t-SNE"):
    """Computes exact t-SNE (van der Maaten & Hinton, 2008).  x: nxD.  Returns nx2 and KL(P|Q).

    The points start from the first two principal components, because a random start would leave
    the global arrangement to chance.  The rate n / 12 of Belkina et al. (2019) is n / 48 here,
    because their gradient lacks the factor 4."""
    n = len(x)
    P = find_affinities(x, min(perplexity, (n - 1) / 3))                # nxn
    U, S, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = U[:, :2] * S[:2]                                                # nx2
    y = y / y[:, 0].std().clamp(min=1e-12) * 1e-4
    velocity, gains, lr = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 50)
    near, pull = torch.empty_like(P), torch.empty_like(P)   # kept: new nxn memory takes time
    for step in show_progress(range(steps), text, unit="step"):
        early = step < steps // 4
        exaggeration, momentum = (12, 0.5) if early else (1, 0.8)
        fill_student(y, near)                                           # nxn
        Q_share = 1 / (exaggeration * near.sum().item())
        torch.sub(P, near, alpha=Q_share, out=pull).mul_(near)          # nxn  (P - Q) near
        gradient = 4 * exaggeration * (pull.sum(1, keepdim=True) * y - pull @ y)  # nx2
        downhill = velocity * gradient < 0
        gains = torch.where(downhill, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = momentum * velocity - lr * gains * gradient
        y = y + velocity
    Q = fill_student(y, near) / near.sum()
    return y, (torch.special.xlogy(P, P) - P * Q.clamp(min=1e-12).log()).sum().item()


def find_affinities(x, perplexity):
    """Returns t-SNE's P, nxn.  Bisection finds the width of each point's Gaussian, so that its
    perplexity is the one given."""
    D = square_distances(x).fill_diagonal_(torch.inf)                   # nxn
    D = D - D.min(1, keepdim=True).values                               # the softmax stays the same
    beta = torch.ones_like(D[:, :1])                                    # nx1  1 / (2 sigma^2)
    low, high = torch.zeros_like(beta), torch.full_like(beta, torch.inf)
    for _ in range(40):
        P = (-beta * D).softmax(1)                                      # nxn
        wide = torch.special.entr(P).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return (P + P.T) / (2 * len(x))


def fill_student(y, out):
    """Writes 1 / (1 + |y_i - y_j|^2) into out (nxn), and 0 into its diagonal.  y: nx2.

    One product of nx4 matrices gives 1 + |y_i - y_j|^2.  Its rounding error is small beside 1."""
    length, one = y.pow(2).sum(1, keepdim=True), torch.ones_like(y[:, :1])  # nx1
    left, right = torch.cat((-2 * y, 1 + length, one), 1), torch.cat((y, one, length), 1)
    return torch.mm(left, right.T, out=out).reciprocal_().fill_diagonal_(0)


def square_distances(x):
    """Returns |x_i - x_j|^2, nxn.  A matrix product would be faster, but it loses digits."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").pow(2)


# ---- Algorithm 2, 3: spatial saliency visualization ----

class TwoValues:
    """Computes two values from images of one modality: "we average the common and unique dimensions
    as two single values output" (Sec. 7).  Call: NxCxHxW -> out1, Nx2.

    f1          encoder and projector
    z1          NxK, the embeddings of all samples.  Their mean and biased variance are constants.
                If the batch's own mean and variance were used, every normalised feature would sum
                to 0 over the batch for any x.  The gradient of this sum, and so every map, would
                be 0
    Kc          the first Kc dimensions are common
    layer       the module of f1 that GradCAM looks at
    square      False: the mean of the dimensions, as in Algorithm 2.  True: the mean of their
                squares.  The sign of a dimension is arbitrary, so dimensions cancel in the mean"""

    def __init__(self, f1, z1, Kc, layer, square=False):
        self.f1, self.Kc, self.layer, self.square = f1, Kc, layer, square
        self.var, self.mean = torch.var_mean(z1.double(), 0, unbiased=False)  # K, K

    def __call__(self, x1):
        mean, var = self.mean.to(x1), self.var.to(x1)
        z1 = (self.f1(x1) - mean) / (var + 1e-5).sqrt()                 # NxK  BN(f1(x1))
        if self.square:
            z1 = z1.pow(2)                                              # NxK
        z1_c = z1[:, :self.Kc].mean(-1, keepdim=True)                   # Nx1
        z1_u = z1[:, self.Kc:].mean(-1, keepdim=True)                   # Nx1
        out1 = torch.cat((z1_c, z1_u), -1)                              # Nx2
        return out1


def gradcam(net, layer, x, target, relu=False):
    """Computes GradCAM (Selvaraju et al., 2017, Eq. 1-2): multiplies each channel of a layer by its
    mean gradient, and adds the channels.

    net           function or module, NxCxHxW -> NxM
    layer         a module that net calls; its output is NxCxhxw, or NxhxwxC of a LayerNorm (MiT)
    target        column of the output, 0 <= target < M
    relu          True keeps only the positive part, as Selvaraju's Eq. 2 does.  Algorithm 2's
                  LayerGradCam keeps negative values as well
    Returns Nx1xhxw.  net must be in evaluation mode, so that the samples do not mix."""
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
    """Returns the GradCAM maps, NxHxW each, of the common and the unique value of a `TwoValues`."""
    attr1_c = gradcam(net1, net1.layer, x1, 0, relu)                    # Nx1xhxw  Nx7x7 in Alg. 2
    attr1_u = gradcam(net1, net1.layer, x1, 1, relu)                    # Nx1xhxw
    return upsamp(attr1_c, x1), upsamp(attr1_u, x1)                     # NxHxW, Nx224x224 in Alg. 2


def upsamp(attr, x):
    return F.interpolate(attr, x.shape[-2:], mode="bilinear")[:, 0]     # NxHxW


def find_layers(E):
    """Returns {name: module} for --layer of GradCAM.  The last module is the default.

    Paper: "after the last convolutional layer" in Sec. 7, but f1.last_conv2 in Algorithm 2.  Here:
    the last convolution, which in a ResNet-50 is layer4.2.conv3.  --layer layer4.2.conv2 chooses
    Algorithm 2's.  SegFormer has no such layer, so the choice is among the ends of its stages."""
    ends = ("norm1", "norm2", "norm3", "norm4")
    stages = {name: module for name, module in E.named_modules() if name in ends}
    return stages or {name: module for name, module in E.named_modules()
                      if isinstance(module, nn.Conv2d) and "downsample" not in name}


# ---- Algorithm 2, 4: spatial saliency statistics ----

def gradcam_stat(net1, net2, x1, x2):
    """Measures how far the salient areas of two modalities overlap.  Returns N common and N unique
    scores in [0, 1].

    Paper: Algorithm 2 does not define "norm"; Sec. 7 says multiply, take the logarithm, normalize
    each patch.  Here, as in the authors' code: the negative values of each map become 0 (ReLU), the
    map is upsampled, and its logarithm is scaled to 0..1.  A score is the mean of the product of
    two maps."""
    att1_c, att1_u = gradcam_vis(net1, x1, relu=True)                   # NxHxW
    att2_c, att2_u = gradcam_vis(net2, x2, relu=True)                   # NxHxW
    mul_c = (norm(att1_c) * norm(att2_c)).mean((1, 2))                  # N
    mul_u = (norm(att1_u) * norm(att2_u)).mean((1, 2))                  # N
    return mul_c, mul_u


def norm(att):
    """Scales the logarithm of each map to 0..1.  att: NxHxW, not negative.  A map of 0 stays 0."""
    return scale_maps((att + 1e-20).log10())


def scale_maps(att):
    """Scales each map of NxHxW from its minimum and maximum to 0 and 1.  A flat map becomes 0."""
    low, high = att.amin((1, 2), keepdim=True), att.amax((1, 2), keepdim=True)
    span = high - low
    varies = span > 1e-5 * high.abs()           # an upsampled 1x1 map varies only by rounding
    return torch.where(varies, (att - low) / span, 0)


def measure_density(att, mask):
    """Measures how dense a map is on an object: the share of the map that lies on the object,
    divided by the object's share of the area.  1 means as dense as in the whole image.

    att, mask   ...xHxW   maps that are not negative; 1 on the object and 0 elsewhere
    Returns one value per map.  It is NaN if the map is 0 or the object is hidden."""
    share = (att * mask).mean((-2, -1)) / att.mean((-2, -1))
    return share / mask.mean((-2, -1))


# ---- Algorithm 2, 5: spectral saliency statistics ----

def integrated_gradients(net, x, x0=None, target=0, steps=32):
    """Computes integrated gradients (Sundararajan et al., 2017, Eq. 1): (x - x0) times the mean
    gradient on the straight way from x0 to x.

    net      function or module, NxCxHxW -> NxM
    x0       the baseline, of the shape of x.  None: 0.  For modalities with a measured mean, 0 is
             the mean image; for sar, ms, aerial and dem it is the lowest value (black)
    steps    the number of steps of the midpoint rule.  Only one step is in memory at a time
    Returns NxCxHxW.  Its sum is net(x) - net(x0), except for the error of the midpoint rule.  The
    paper of the method calls this completeness."""
    x0 = torch.zeros_like(x) if x0 is None else x0
    total = torch.zeros_like(x)                 # NxCxHxW
    for step in range(steps):
        point = (x0 + (step + 0.5) / steps * (x - x0)).requires_grad_()
        with torch.enable_grad():
            out = net(point)[:, target].sum()
        total += torch.autograd.grad(out, point)[0]
    return (x - x0) * total / steps


def IG_vis(net1, x1, steps):
    """Returns the integrated gradients, NxCxHxW each, of both values of a `TwoValues`."""
    att1_c = integrated_gradients(net1, x1, None, 0, steps)
    att1_u = integrated_gradients(net1, x1, None, 1, steps)
    return att1_c, att1_u


def IG_stat(net1, x1, steps):
    """Returns the importance of each band for both values, NxC each: the signed mean over pixels.

    Paper: Algorithm 2 averages over the images as well, but Fig. 5b is a histogram over images.
    Here: one value per image and band."""
    att1_c, att1_u = IG_vis(net1, x1, steps)    # NxCxHxW
    imp_c = att1_c.mean((2, 3))                 # NxC
    imp_u = att1_u.mean((2, 3))                 # NxC
    return imp_c, imp_u


# ---- not in Algorithm 2: shares of variance, linear probes, retrieval ----

def variance_shares(z, classes):
    """Returns the share of each dimension's variance that lies between the classes, minus chance:
    max(0, between / total - (k - 1) / (n - 1)).  That is eta squared minus its mean in pure noise.

    z         nxK   embeddings of n samples
    classes   n     the class of each sample; k different ones
    A probe on 384 dimensions recognises an object even if each dimension holds only a trace of the
    object.  The share says how large the object's part of a dimension is."""
    z = z.double()
    mean = z.mean(0)                                                    # K
    total = (z - mean).pow(2).sum(0)                                    # K
    between, kinds = torch.zeros_like(mean), classes.unique()
    for kind in kinds:
        members = z[classes == kind]
        between += len(members) * (members.mean(0) - mean).pow(2)       # K
    chance = (len(kinds) - 1) / (len(z) - 1)
    return (between / total.clamp(min=1e-12) - chance).clamp(min=0)     # K


def linear_probe(x, y, x_test, y_test, decay=1e-2):
    """Trains a logistic regression and returns its accuracy on unseen samples.

    x, x_test   NxD   features, which are scaled to a standard deviation of 1
    y, y_test   N     classes
    decay       the factor of the squared weights in the loss
    The weights W are (D+1)xM.  The last row of W holds the biases."""
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


def retrieve(z1, z2):
    """Returns R@1 and R@5: the share of samples of modality 1 whose partner is among the 1 or 5
    nearest of all samples of modality 2.

    z1, z2   nxK   embeddings.  Samples are near if the cosine after BN is large.  If another
                   sample is as near as the partner, the partner counts as the farther one"""
    z1, z2 = F.normalize(BN(z1)), F.normalize(BN(z2))                   # nxK
    similarity = z1 @ z2.T                                              # nxn
    partner = similarity.diagonal()[:, None]                            # nx1
    nearer = (similarity >= partner).sum(1) - 1                         # n
    return [(nearer < k).float().mean().item() for k in (1, 5)]


# ---- what is explained ----

class Explained:
    """Holds what every picture needs.

    args, device           the command line, and where the networks run
    net, settings          the network and the settings of the checkpoint
    N, K, Kc               the batch size of training, all dimensions, the common dimensions
    root, data             where the data set lies, and the data set
    modalities             the names of the two modalities, with a number if they are equal
    samples                the samples of the data set that are explained, in random order
    dimensions             the dimensions of each modality that t-SNE shows
    batch_slices           up to four slices of `samples`, each of N samples
    main adds what needs a pass over the samples:
    embedded               what `embed` returns for the network
    compared               what `embed` returns for the network of --compare, or None
    values                 a `TwoValues` for each modality"""

    def __init__(self, args, device, net, settings, root, data):
        self.args, self.device, self.net, self.settings = args, device, net, settings
        self.root, self.data, self.K, self.Kc = root, data, settings["K"], settings["Kc"]
        first, second = settings["modalities"]
        self.modalities = (first, second) if first != second else (f"{first} 1", f"{second} 2")
        n = len(data)
        usual = n if args.only == ["embeddings"] else max(512, 4 * settings["batch_size"])
        count = args.samples or min(n, usual)
        need(n >= 8 or args.only == ["embeddings"], f"{root[0]} has {n} pairs, too few to explain "
             f"a run. Give 8 or more")
        need(count <= n, f"--samples {count} is more than the number of pairs in {root[0]}, {n}. "
                         f"Give {n} or less")
        # Paper: Fig. 5 shows the whole data set.  Here: these samples, which --samples can change.
        rng = np.random.default_rng(args.seed)
        self.samples = rng.permutation(n)[:count]
        self.dimensions = np.sort(rng.permutation(self.K)[:args.tsne_dims])
        self.N = N = min(settings["batch_size"], count)  # N of training, as in Alg. 2
        self.batch_slices = [slice(i, i + N) for i in range(0, count - N + 1, N)][:4]  # Fig. 8, 9

    def batches(self, text):
        return load_batches(self.data, self.samples, self.settings["size"], self.args.batch_size,
                            self.args.workers, self.device, text)

    def keep_nonempty(self, common, unique):
        """Returns {"common": common, "unique": unique}, without a kind that has no dimensions."""
        kinds = {"common": (common, self.Kc), "unique": (unique, self.K - self.Kc)}
        return {kind: value for kind, (value, size) in kinds.items() if size > 0}


@torch.no_grad()
def embed(net, batches):
    """Returns the embeddings of all samples and the features of the backbones as a dict:
    "z1" and "z2" are NxK, "features1" and "features2" are Nxd.  They stay in the CPU's memory:
    10,000 samples take 0.7 GB if K is 8192."""
    columns = dict(z1=[], z2=[], features1=[], features2=[])
    for x in batches:
        for m, f in enumerate((net.f1, net.f2)):
            features = f.E(x[m])
            columns[f"features{m + 1}"].append(features.cpu())
            columns[f"z{m + 1}"].append(f.P(features).cpu())
    return {name: torch.cat(parts) for name, parts in columns.items()}


def open_net(path, device):
    """Returns the pretrained network, frozen and in evaluation mode, and its run's settings.  The
    setting `data` is a list of one folder; for custom, of two folders or patterns."""
    checkpoint = load_checkpoint(path)
    with reading(path, "a pretrained network", "give a checkpoint.pt of pretrain.py"):
        settings = read_settings(checkpoint) | dict(step=checkpoint["step"])
        m = settings["modality"]
        need(not m, f"{path} is a run with --modality {m}, so it has only one encoder. Give a run "
                    f"of both modalities")
        if isinstance(settings["data"], str):
            settings["data"] = [settings["data"]]
        net = DeCUR(settings["backbone"], *settings["channels"], settings["widths"])
        net.load_state_dict(checkpoint["model"])
    return net.to(device).eval().requires_grad_(False), settings


def open_compared(path, settings, inputs, device):
    """Returns the network of --compare.  Raises BadInput unless it was trained on the same inputs.

    settings    of the run of --checkpoint
    inputs      what that run's encoders see: two rows of data.MODALITIES"""
    net, others = open_net(path, device)
    remedy = "the run of --checkpoint. Give a run with the same settings"
    check_equal(others, settings, ("scenario", "modalities", "channels", "size", "K"),
                f"--compare {path}", remedy)
    for theirs, row in zip(others["inputs"], inputs):
        need(not differ(theirs, row), f"--compare {path}: an encoder sees "
             f"{describe_input(theirs)}, but {describe_input(row)} in {remedy}")
    return net


def open_explained_data(settings, root, split):
    """Returns the data set.  Raises BadInput if its modalities differ from the checkpoint's."""
    custom = dict(inputs=settings["inputs"]) if settings["scenario"] == "custom" else {}
    need(len(root) == (2 if custom else 1), f"--data {' '.join(root)} does not fit the run. Give "
         f"two folders or patterns for a run with --scenario custom, otherwise one folder")
    data = open_dataset(settings["scenario"], root if custom else root[0], settings["size"], split,
                        settings["depth_unit"], settings["seed"], reduce=True, **custom)
    found = [[name, len(views[0])] for name, views in zip(data.modalities, data[0])]
    expected = [list(pair) for pair in zip(settings["modalities"], settings["channels"])]
    need(found == expected, f"{root[0]} holds {found} (modality, channels), but the checkpoint was "
                            f"trained on {expected}. Give other --data")
    return data


def load_batches(data, samples, size, batch_size, workers, device, text):
    """Yields batches [x1, x2] of what the networks see, BxCxSxS, under a progress bar."""
    loader = DataLoader(Subset(data, samples), batch_size, num_workers=workers)
    for views in show_progress(loader, text, unit="batch"):
        yield [resize_and_normalise(x[0].to(device), row, size)
               for x, row in zip(views, data.inputs)]


def choose_layer(net, name):
    """Returns, for each encoder, the module that GradCAM looks at.  The default is the last one."""
    layers1, layers2 = find_layers(net.f1.E), find_layers(net.f2.E)
    name = name or list(layers1)[-1]
    need(name in layers1, f"--layer {name}: the encoder has no layer of this name. Choose one of "
                          f"{' '.join(layers1)}")
    return layers1[name], layers2[name]


def main(argv=None):
    args = get_args(argv)
    rank, _, device = read_environment()
    if rank > 0:                                # under torchrun, only process 0 works
        return
    if args.sweep:
        return sweep(args, device)
    net, settings = open_net(args.checkpoint, device)
    root, split = args.data or settings["data"], args.split or settings["split"]
    if args.data and not args.split and settings["scenario"] == "custom":
        split = "all"                           # the list of the training names other images
    data = open_explained_data(settings, root, split)
    e = Explained(args, device, net, settings, root, data)
    layer1, layer2 = choose_layer(net, args.layer)
    if args.compare:
        other = open_compared(args.compare, settings, data.inputs, device)
    make_folder(args.out)
    print(f"{len(e.samples)} of {len(data)} pairs of {' and '.join(e.modalities)} from "
          f"{' '.join(root)}; N {e.N}  K {e.K}  Kc {e.Kc}; {device.type}")
    e.embedded = embed(net, e.batches("embeddings"))
    square = args.value == "square"
    e.values = (TwoValues(net.f1, e.embedded["z1"], e.Kc, layer1, square),
                TwoValues(net.f2, e.embedded["z2"], e.Kc, layer2, square))
    e.compared = embed(other, e.batches("embeddings of --compare")) if args.compare else None
    stopped = settings["stopped"] or f"at step {settings['step']}"  # "at step 100 of 200"
    caption = f"{args.checkpoint.resolve().parent.name} {stopped}"
    for name in args.only:
        image, numbers, sentence = PICTURES[name](e)
        save_picture(args.out, name, image, numbers, sentence, caption)


# ---- made-up scenes, of which the objects are known ----

# The label image of a scene.  It is 0 without label, 1 in the background, then there is one value
# for each shape of each object.
LABEL_FILES = {"rgbd": "Label/{}.png", "sar-optical": "Label/{}.png",
               "rgb-dem": "cropped/seg/{}.png"}
RANDOM = "random encoder"


def name_objects(modalities):
    """Returns names for the objects of a made-up scene, in the order of factors.csv."""
    return "both see", *(f"only {modality} sees" for modality in modalities)


def are_made_up(root):
    """Returns whether the data are made-up scenes.  root: one folder, or two of custom pairs."""
    return len(root) == 1 and (Path(root[0]) / "factors.csv").is_file()


def read_masks(scenario, root, name, size):
    """Returns a mask of each object, 3xSxS in [0, 1], with the pixels that the networks see.  Both
    sensors see the first object, only sensor 1 sees the second, only sensor 2 sees the third.  A
    pixel belongs to one object only, even where two objects overlap."""
    label = torch.as_tensor(read_mask(Path(root[0]) / LABEL_FILES[scenario].format(name)))
    which = (label - 2).div(len(SHAPES), rounding_mode="floor")         # HxW; -1 is no object
    masks = torch.stack([which == factor for factor in range(3)])       # 3xHxW
    return resize(masks[None].float(), (size, size))[0]


def measure_densities(e):
    """Returns {("GradCAM maps", m, "common" or "unique"): Nx3}: how dense the maps of all samples
    are on the three objects of their scenes."""
    scenario, size, densities = e.settings["scenario"], e.settings["size"], {}
    names = iter([e.data.ids[i] for i in e.samples])
    for x in e.batches("density of GradCAM maps"):
        masks = [read_masks(scenario, e.root, next(names), size) for _ in x[0]]
        masks = torch.stack(masks).to(e.device)                         # Bx3xSxS
        for m, two_values in enumerate(e.values):
            for kind, att in e.keep_nonempty(*gradcam_vis(two_values, x[m], relu=True)).items():
                density = measure_density(att[:, None], masks).cpu()    # Bx3
                densities.setdefault(("GradCAM maps", m, kind), []).append(density)
    return {key: torch.cat(batches).numpy() for key, batches in densities.items()}


def compare_objects(title, found, modalities, limit):
    """Prints a table of mean and deviation: one line for each name (such as that of a run) and kind
    of dimensions, one column for each modality and object.  Returns one claim for each name that
    has both kinds.

    found   {(name, m, kind): Sx3}   S measurements of the three objects
    An object that both sensors see belongs in common dimensions.  An object that only one sensor
    sees belongs in the unique dimensions of that sensor.  The claim has ratios: the mean in the
    dimensions where the object belongs, divided by the mean in the other dimensions.  Each ratio
    should be above the limit."""
    objects = [f"{modality}: {name}" for modality in modalities
               for name in name_objects(modalities)]
    print(f"{title}\n| | {' | '.join(objects)} |\n{'|---' * 7}|")
    claims, means = [], {}
    for name, kind in dict.fromkeys((name, kind) for name, _, kind in found):
        a = np.concatenate((found[name, 0, kind], found[name, 1, kind]), 1)  # Sx6
        print(f"| {name}, {kind} | {' | '.join(map(format_mean, a.T))} |")
        means[name, kind] = a.mean(0).clip(0.001)                      # 6; below 0.001 is noise
        if kind == "unique" and (name, "common") in means:
            both = means[name, "common"] / means[name, "unique"]
            ratios = {objects[0]: both[0], objects[1]: 1 / both[1],
                      objects[3]: both[3], objects[5]: 1 / both[5], "limit": limit}
            claims.append(claim(f"{name}: the ratios common / unique (objects that both see) and "
                                f"unique / common (objects that only one sees) are above {limit}",
                                ratios, "limit"))
    return claims


def format_mean(values):
    """Returns the mean, with the standard deviation if there are several values."""
    text = f"{values.mean():.3f}"
    return f"{text}±{values.std(ddof=1):.3f}" if len(values) > 1 else text


@torch.no_grad()
def run_network(f, x):
    """Returns f(x) in evaluation mode, computed for 256 samples at a time."""
    f.eval()
    return torch.cat([f(chunk) for chunk in x.split(256)])              # NxD


def read_scenes(settings, root, workers, device):
    """Returns {"train" or "test": (x1, x2, factors)}: NxCxSxS, NxCxSxS and Nx3 classes."""
    scenes, factors = {}, read_factors(root[0])
    for split in ("train", "test"):
        data = open_explained_data(settings, root, split)
        classes = [factors.get(name) for name in data.ids]
        need(all(classes), f"factors.csv in {root[0]} lacks scenes of the split {split}. Make the "
                           f"scenes again with `data.py toy`")
        loaded = load_batches(data, range(len(data)), settings["size"], 256, workers, device, split)
        x1, x2 = (torch.cat(images) for images in zip(*loaded))
        scenes[split] = x1, x2, torch.tensor(classes, device=device)
    return scenes


def make_random_encoder(settings, m, seed, x):
    """Returns an untrained encoder of modality m, with BatchNorm statistics of the images x."""
    torch.manual_seed(seed)
    E = branch(settings["backbone"], settings["channels"][m], ()).E.to(x)
    measure_statistics(E, ([chunk] for chunk in x.split(256)))
    return E


def probe_factors(E, m, scenes):
    """Returns, for each of the three factors, the accuracy of a linear probe on encoder E."""
    x, x_test = (run_network(E, scenes[split][m]) for split in ("train", "test"))
    factors, factors_test = scenes["train"][2], scenes["test"][2]
    return [linear_probe(x, y, x_test, y_test) for y, y_test in zip(factors.T, factors_test.T)]


def measure_factors(runs, scenes):
    """Measures what the networks of several runs know about the three factors.

    runs    a list of (run's name, network, settings)
    Returns {(run's name, m, kind): Sx3} for the S runs of that name.  For the kinds "common" and
    "unique" the numbers are the mean share of variance on the test split.  For the kind "backbone"
    they are the accuracy of a linear probe.  The last name, RANDOM, stands for random encoders, one
    for each seed."""
    found, (x1, x2, factors) = collections.defaultdict(list), scenes["test"]
    for run_name, net, settings in runs:
        print(f"measuring {run_name}, seed {settings['seed']}")
        for m, (f, x) in enumerate(((net.f1, x1), (net.f2, x2))):
            z = run_network(f, x)                                       # NxK
            shares = torch.stack([variance_shares(z, y) for y in factors.T])  # 3xK
            halves = shares.tensor_split([settings["Kc"]], 1)           # 3xKc, 3xKu
            for kind, half in zip(("common", "unique"), halves):
                if half.numel():
                    found[run_name, m, kind].append(half.mean(1).tolist())
            found[run_name, m, "backbone"].append(probe_factors(f.E, m, scenes))
    for seed in dict.fromkeys(settings["seed"] for _, _, settings in runs):
        for m in (0, 1):
            E = make_random_encoder(runs[0][2], m, seed, scenes["train"][m])
            found[RANDOM, m, "backbone"].append(probe_factors(E, m, scenes))
    return {key: np.array(values) for key, values in found.items()}


def sweep(args, device):
    """Measures the factors in many runs on made-up scenes, as in Table 4 or Fig. 3a.

    Runs share a line of the tables if the names of their folders differ only in a seed at the end,
    such as decur-0 and decur-1."""
    runs, first = [], {}                        # first: the first folder and settings of each name
    for folder in args.sweep:
        net, settings = open_net(folder / "checkpoint.pt", device)
        run_name = re.sub(rf"[-_](seed|s)?{settings['seed']}$", "", folder.resolve().name)
        need(all((name, others["seed"]) != (run_name, settings["seed"])
                 for name, _, others in runs), f"--sweep {folder}: another of these runs has the "
             f"same name and seed. Give each run once")
        runs.append((run_name, net, settings))
        check_equal(settings, runs[0][2], ("scenario", "size", "backbone"), f"--sweep {folder}",
                    "the first run. Give runs with the same settings")
        other, others = first.setdefault(run_name, (folder, settings))
        same = [name for name in settings if name not in ("seed", "data", "step")]
        check_equal(settings, others, same, f"--sweep {folder}", f"{other}, and the names of these "
                    f"folders differ only in the seed. Rename one of the two folders")
    settings = runs[0][2]
    root = args.data or settings["data"]
    need(are_made_up(root), f"--sweep works only with runs on made-up scenes, but {root[0]} has no "
                            f"factors.csv. Give runs with --toy")
    found = measure_factors(runs, read_scenes(settings, root, args.workers, device))
    make_folder(args.out)
    picture = picture_measured(found, settings["modalities"])
    save_picture(args.out, "sweep", *picture, f"{len(runs)} runs")


# ---- the pictures: each function returns an image, its numbers, and what to print ----

# These are colours of Okabe and Ito, which colour-blind readers can tell apart.
INK, GREY, WHITE, RED, BLUE = "#000000", "#8c8c8c", "#ffffff", "#d55e00", "#0072b2"
KIND_COLOURS = {"common": "#009e73", "unique": "#e69f00", "backbone": INK, RANDOM: "#ddd"}
CURVE_COLOURS = dict(loss=INK, L1=RED, L2=BLUE, Lc=KIND_COLOURS["common"],
                     Lu=KIND_COLOURS["unique"])
MARKS = {("common", 0): (RED, "cross"), ("common", 1): (BLUE, "square"),
         ("unique", 0): (RED, "dot"), ("unique", 1): (BLUE, "dot")}  # of modality 1 and 2


def claim(expected, measured, lower):
    """Returns a line: what is expected, the measured numbers, and whether the two agree.

    They agree if measured[lower] is the lowest number."""
    text = ", ".join(f"{name} {value:.3g}" for name, value in measured.items())
    line = f"Expected: {expected}. Measured: {text}."
    others = [value for name, value in measured.items() if name != lower]
    if len(measured) < 2:
        return line
    verdict = "yes" if measured[lower] < np.min(others) else "no"       # NaN agrees with nothing
    return f"{line} Agrees: {verdict}."


def picture_curves(e):
    """Draws the loss, its terms (Eq. 6) and the mean diagonals, from the log of the run."""
    path = e.args.checkpoint.with_name("log.jsonl")
    if e.settings["method"] != "decur":
        return None, {}, "curves.png is left out, because only DeCUR's loss has terms"
    if not path.is_file():
        return None, {}, f"curves.png is left out, because there is no {path}"
    log = read_log(path)
    limits = bounds(e.settings["batch_size"], e.K, e.Kc, not e.settings["no_intra"])
    chance, floor = (sum(values.values()) for values in limits)
    steps = log["step"]
    terms = [name for name in CURVE_COLOURS if any(log.get(name, ()))]  # an ablated term is 0
    image, pen, (left, right) = start_page(
        2, 2, 448, 300, f"Pretraining, left: the loss and its terms (grey: chance {chance:.1f}, "
        f"floor {floor:.1f}); right: the mean diagonals C of the terms",
        [(name, CURVE_COLOURS[name]) for name in terms])
    lines = {name: log[name] for name in terms}
    lines |= {"chance": [chance] * len(steps), "floor": [floor] * len(steps)}
    logs = {name: np.log10(np.maximum(a, 1e-2)) for name, a in lines.items()}  # a loss can be 0
    ends = np.array(list(logs.values()))
    at = draw_axes(pen, left, (0, steps[-1]), (math.floor(ends.min()), ends.max() + 0.1), "",
                   "step", "loss", powers=True)
    for name, a in logs.items():
        draw_curve(pen, at, steps, a, CURVE_COLOURS.get(name, GREY))
    at = draw_axes(pen, right, (0, steps[-1]), (-0.2, 1), "", "step", "mean diagonal")
    diagonals = {name: log[name] for name in ("C1", "C2", "Cc", "Cu") if name in log}
    for name, a in diagonals.items():
        draw_curve(pen, at, steps, a, CURVE_COLOURS[name.replace("C", "L")])
    last = {}
    if "Cc" in log:
        last["Cc"] = log["Cc"][-1]
    if "Cu" in log:
        last["magnitude of Cu"] = abs(log["Cu"][-1])
    return image, log, (f"Loss {log['loss'][-1]:.4g} at step {steps[-1]}; chance {chance:.4g}, "
                        f"floor {floor:.4g}\n  " +
                        claim("the magnitude of the mean diagonal Cu (at best 0) is below Cc (at "
                              "best 1)", last, "magnitude of Cu"))


def read_log(path):
    """Returns {name: values} of a run's log.jsonl.  A run that was resumed may have logged a step
    twice; the last line of a step counts."""
    with reading(path, "the log of a run", "give --only without curves"):
        parsed = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        lines = list({line["step"]: line for line in parsed}.values())
        return {name: [line[name] for line in lines] for name in lines[0]}


def measure_alignment(e, embedded):
    """Returns Eq. 7 of each batch and dimension, nxK."""
    z1, z2 = embedded["z1"], embedded["z2"]
    return torch.stack([alignment_histogram(z1[batch], z2[batch])[0] for batch in e.batch_slices])


def picture_alignment(e):
    """Draws Fig. 4a and 8."""
    a = measure_alignment(e, e.embedded)                                # nxK
    losses = e.keep_nonempty(a[:, :e.Kc], a[:, e.Kc:])
    means = {kind: a.mean().item() for kind, a in losses.items()}
    legend = [(f"{kind} dimensions", KIND_COLOURS[kind]) for kind in losses]
    if e.compared:
        losses["compared"] = measure_alignment(e, e.compared)           # nxK
        legend.append(("all dimensions of --compare", INK))
    top = max(1.5, *(a.max().item() for a in losses.values()))  # in Alg. 2 the top is 1
    edges = np.linspace(0, top, 41)
    image, pen, boxes = start_page(
        len(e.batch_slices), 2, 448, 250, "Cross-modal alignment: the loss of each dimension, "
        "Eq. 7; bars of unique dimensions stand on bars of common dimensions", legend)
    for i, box in enumerate(boxes):
        heights = {kind: torch.histc(a[i], 40, 0, top).numpy() * 100 / e.K
                   for kind, a in losses.items()}
        highest, base = sum(a.max() for a in heights.values()), np.zeros(40)
        at = draw_axes(pen, box, (0, top), (0, highest), f"batch {i + 1}",
                       "loss: 0 aligned, 1 unrelated, above 1 opposed", "% of K dimensions")
        for kind in means:
            draw_bars(pen, at, edges, heights[kind], base, KIND_COLOURS[kind])
            base = base + heights[kind]
        if e.compared:
            draw_curve(pen, at, (edges[:-1] + edges[1:]) / 2, heights["compared"], INK)
        pen.line((*at(1, 0), *at(1, highest)), GREY)
    return image, losses, claim("the mean loss is lower in common dimensions (0: aligned) than in "
                                "unique dimensions (1: unrelated)", means, "common")


def picture_tsne(e):
    """Draws Fig. 1 and 9."""
    n, k, side = len(e.batch_slices), len(e.dimensions), 448
    kinds = np.where(e.dimensions < e.Kc, "common", "unique")           # k
    legend = [(f"{e.modalities[m]}, {kind}", *mark) for (kind, m), mark in MARKS.items()
              if kind in kinds]
    image, pen, boxes = start_page(n, 2, side, side, "t-SNE: each mark is a dimension, each panel "
                                   "a batch", legend)
    marks = [MARKS[kind, m] for m in (0, 1) for kind in kinds]          # 2k
    points, divergences, together = [], [], []
    for i, (batch, box) in enumerate(zip(e.batch_slices, boxes)):
        z1, z2 = (e.embedded[name][batch][:, e.dimensions].to(e.device) for name in ("z1", "z2"))
        y, divergence = tsne_vis(z1, z2, f"t-SNE {i + 1} of {n}")
        y = y.cpu()                                                     # 2kx2
        nearest = square_distances(y).fill_diagonal_(torch.inf).argmin(1)
        together.append(nearest == torch.arange(2 * k).roll(k))         # 2k
        divergences.append(f"{divergence:.3f}")
        y = y.numpy()
        points.append(y)
        pen.rectangle(box, None, GREY)
        middle, radius = (y.min(0) + y.max(0)) / 2, max(np.ptp(y, axis=0).max() / 2, 1e-12)
        pixels = (y - middle) / radius * (side / 2 - MARGIN) + np.reshape(box, (2, 2)).mean(0)
        for (px, py), mark in zip(pixels, marks):
            draw_mark(pen, px, py, *mark)
    together = torch.cat(together).float().view(-1, k).numpy()          # 2nxk
    means = {kind: together[:, kinds == kind].mean() for kind in np.unique(kinds)}
    return image, dict(points=np.stack(points), dimensions=e.dimensions, Kc=e.Kc), (
        f"KL divergence of each batch: {' '.join(divergences)}\n  " +
        claim("fewer unique than common dimensions lie next to the same dimension of the other "
              "modality (shares of the dimensions)", means, "unique"))


def picture_gradcam(e):
    """Draws Fig. 4b and 10.  On made-up scenes, measures how dense the maps are on the objects."""
    side, size, tiles, empty = 144, e.settings["size"], [], 0
    numbers = collections.defaultdict(list)
    for x in load_batches(e.data, e.samples[:e.args.pairs], size, 1, 0, e.device, "pairs"):
        for m, two_values in enumerate(e.values):
            picture = make_visible(x[m][0], e.data.inputs[m])
            bands = name_composite(e.data.inputs[m]).replace("channel ", "")
            tiles.append((e.modalities[m] + bands, picture))
            for kind, att in e.keep_nonempty(*gradcam_vis(two_values, x[m])).items():
                colours = to_viridis(scale_maps(att.relu())[0].cpu().numpy()) / 255
                tiles.append((f"{e.modalities[m]}, {kind}", 0.45 * picture + 0.55 * colours))
                numbers[f"modality{m + 1}_{kind}"].append(att[0].cpu().numpy())
                empty += int(att.max() <= 0)
    columns = 2 + len(numbers)
    image, pen, boxes = start_page(
        len(tiles), columns, side, side, f"GradCAM: what raises the {VALUES[e.args.value]} of "
        f"dimensions (violet: nothing, yellow: most)")
    for i, ((heading, tile), (left, top, _, _)) in enumerate(zip(tiles, boxes)):
        tile = Image.fromarray((tile * 255).astype(np.uint8)).resize((side, side))
        image.paste(tile, (left, top))
        if i < columns:
            pen.text((left, top - LINE - 2), heading, INK, FONT)
    lines = [f"Each row of the picture is a pair. Common maps should lie on what both modalities "
             f"show, unique maps on what only one shows. Maps without a positive pixel: {empty}"]
    h, w = gradcam(e.values[1], e.values[1].layer, x[1], 0).shape[-2:]  # of modality 2
    if max(h, w) <= 2:
        lines.append(f"warning: GradCAM's maps have only {h}x{w} pixels, too few to show places. "
                     f"Give an earlier --layer, or pretrain with a larger --size")
    if are_made_up(e.root):
        densities = measure_densities(e)
        numbers |= {f"modality{m + 1}_{kind}_density": a for (_, m, kind), a in densities.items()}
        means = {key: np.nanmean(a, 0, keepdims=True) for key, a in densities.items()}
        title = (f"Density of the GradCAM maps on objects (1: as in the whole image), mean of "
                 f"{len(e.samples)} scenes")
        lines += compare_objects(title, means, e.modalities, limit=1)
    return image, numbers, "\n  ".join(lines)


def picture_spatial(e):
    """Draws Fig. 5a."""
    stats = [gradcam_stat(*e.values, x1, x2) for x1, x2 in e.batches("GradCAM statistics")]
    mul_c, mul_u = (torch.cat(scores).cpu().numpy() for scores in zip(*stats))
    scores = e.keep_nonempty(mul_c, mul_u)
    means = {kind: a.mean() for kind, a in scores.items()}
    image, pen, boxes = start_page(
        len(scores), 1, 528, 220, f"Fig. 5a: overlap of the GradCAM maps of both modalities "
        f"(value: {VALUES[e.args.value]})", [(kind, KIND_COLOURS[kind]) for kind in scores])
    for box, (kind, a) in zip(boxes, scores.items()):
        counts, edges = np.histogram(a, 40, (0, 1))
        highest = 1.05 * counts.max()
        at = draw_axes(pen, box, (0, 1), (0, highest), f"mean {means[kind]:.3f}",
                       "score: 0 no overlap, 1 the same places", "pairs")
        draw_bars(pen, at, edges, counts, np.zeros(40), KIND_COLOURS[kind])
        pen.line((*at(means[kind], 0), *at(means[kind], highest)), INK, 2)
    return image, scores, claim("unique maps overlap less than common maps; the paper found a "
                                "slight trend (means)", means, "unique")


def picture_spectral(e):
    """Draws Fig. 5b.

    Paper: a histogram of the scores of the images.  Here: the mean of their magnitudes.  A score is
    the signed mean over the pixels, from `IG_stat`."""
    stats, errors = ([], []), []
    for x in e.batches("integrated gradients"):
        for m, two_values in enumerate(e.values):
            imp = torch.stack(IG_stat(two_values, x[m], e.args.steps), 1)  # Nx2xC
            stats[m].append(imp.cpu())
            with torch.no_grad():
                gain = two_values(x[m]) - two_values(torch.zeros_like(x[m]))  # Nx2
            error = imp.sum(2) * x[m][0, 0].numel() - gain              # Nx2  completeness
            errors.append(torch.stack((error, gain)).abs().nanmean((1, 2)).cpu())
    error, gain = torch.stack(errors).mean(0).tolist()
    numbers, lines = {}, [f"Check of the integrated gradients: their sum should be {gain:.2g}, and "
                          f"differs from it by {error:.2g} (means over images). More --steps bring "
                          f"it closer"]
    image, pen, boxes = start_page(
        2, 1, 912, 240, f"Integrated gradients, Fig. 5b: how far each band moves the "
        f"{VALUES[e.args.value]} of common and of unique dimensions",
        [(kind, KIND_COLOURS[kind]) for kind in e.keep_nonempty(0, 1)])
    for m, (modality, box) in enumerate(zip(e.modalities, boxes)):
        imp_c, imp_u = torch.cat(stats[m]).unbind(1)                    # NxC
        # Paper: "we normalize the scores".  Here: by the largest magnitude in the modality, common
        # and unique together.
        scores = e.keep_nonempty(imp_c.numpy(), imp_u.numpy())
        largest = max(1e-12, *(np.abs(a).max() for a in scores.values()))
        numbers |= {f"modality{m + 1}_{kind}": a / largest for kind, a in scores.items()}
        means = {kind: np.abs(a / largest).mean(0) for kind, a in scores.items()}  # C
        overall = {kind: a.mean() for kind, a in means.items()}
        bands = [band.removeprefix("channel ") for band in e.data.inputs[m]["bands"]]
        draw_grouped_bars(pen, box, means, bands, modality, "mean magnitude of the score")
        if modality == "ms":                    # the paper found this for optical images
            lines.append(claim(f"{modality}: bands move common dimensions less than unique "
                               f"dimensions (means)", overall, "common"))
    return image, numbers, "\n  ".join(lines)


def picture_factors(e):
    """Draws how much dimensions vary with each object, and what a probe on the backbone reads."""
    if not are_made_up(e.root):
        return None, {}, "factors.png is left out, because only made-up scenes have known factors"
    scenes = read_scenes(e.settings, e.root, e.args.workers, e.device)
    found = measure_factors([("this run", e.net, e.settings)], scenes)
    return picture_measured(found, e.modalities)


def picture_measured(found, modalities):
    """Draws the means over runs of what `measure_factors` returns, two panels for each name."""
    run_names = list(dict.fromkeys(run_name for run_name, _, _ in found))  # the last one is RANDOM
    image, pen, boxes = start_page(
        2 * len(run_names) - 2, 2, 448, 200, "Share of each dimension's variance that lies between "
        f"the shapes of an object; accuracy of a linear probe (chance {1 / len(SHAPES):g})",
        list(KIND_COLOURS.items()))
    for i, box in enumerate(boxes):
        run_name, m = run_names[i // 2], i % 2
        bars = {kind: a.mean(0) for (name, side, kind), a in found.items()
                if (name, side) == (run_name, m)}
        bars[RANDOM] = found[RANDOM, m, "backbone"].mean(0)
        draw_grouped_bars(pen, box, bars, name_objects(modalities),
                          f"{run_name}: {modalities[m]}", "share, accuracy")
    claims = compare_objects(f"Share of each dimension's variance that lies between the shapes of "
                             f"an object, and accuracy of a linear probe on the backbone (chance "
                             f"{1 / len(SHAPES):g}), on unseen scenes", found, modalities, limit=2)
    numbers = {f"{run_name} {modalities[m]} {kind}": a
               for (run_name, m, kind), a in found.items()}
    return image, numbers, "\n  ".join(claims or ["No run has both common and unique dimensions"])


def picture_embeddings(e):
    """Returns no picture, but the embeddings and features of all samples, for other programs.
    Measures how well each sample retrieves its partner in the other modality."""
    last, kind = e.Kc, "common dimensions"
    if e.Kc == 0:
        last, kind = e.K, "unique dimensions, because the run has no common dimensions"
    z1, z2 = (e.embedded[name][:5000, :last] for name in ("z1", "z2"))  # time grows as n^2
    n, (first, second) = len(z1), e.modalities
    lines = [f"Retrieval among {n} pairs by {kind}; chance is R@1 {1 / n:.4f}, R@5 "
             f"{min(1, 5 / n):.4f}"]
    routes = {f"{first} to {second}": (z1, z2), f"{second} to {first}": (z2, z1)}
    for route, pair in routes.items():
        R1, R5 = retrieve(*pair)
        lines.append(f"{route}: R@1 {R1:.4f}, R@5 {R5:.4f}")
    lines.append("z1 and z2 are not normalised; their first Kc columns are common")
    numbers = e.embedded | dict(names=[e.data.ids[i] for i in e.samples], Kc=e.Kc)
    return None, numbers, "\n  ".join(lines)


VALUES = {"mean": "mean", "square": "mean square"}  # of --value
PICTURES = dict(curves=picture_curves, alignment=picture_alignment, tsne=picture_tsne,
                gradcam=picture_gradcam, spatial=picture_spatial, spectral=picture_spectral,
                factors=picture_factors, embeddings=picture_embeddings)


def save_picture(out, name, image, numbers, sentence, caption):
    """Writes the picture, with the name of its run as a caption, and its numbers.  Prints how to
    read the picture."""
    if image:
        corner = image.width - MARGIN, image.height - MARGIN
        ImageDraw.Draw(image).text(corner, caption, GREY, FONT, "rs")
        write_atomically(out / f"{name}.png", partial(image.save, format="PNG"))
    if numbers:
        write_atomically(out / f"{name}.npz", lambda file: np.savez(file, **numbers))
        print(f"{out / name}{'.png and .npz' if image else '.npz'}")
    print(f"  {sentence}")


# ---- a plot kit with Pillow: one font, one margin ----

VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
FONT, LINE, MARGIN = ImageFont.load_default(14), 20, 16  # height of a line, and margin, in pixels
TOP = 2 * MARGIN + 2 * LINE                          # where panels begin, below title and legend


def start_page(n, columns, width, height, title, legend=()):
    """Returns a blank image, a pen for it, and the box (left, top, right, bottom) of each of the n
    panels, row by row.  Each entry of the legend is a text, a colour and possibly a shape."""
    rows = math.ceil(n / columns)
    below = TOP + rows * (height + MARGIN)      # where the caption is
    size = MARGIN + columns * (width + MARGIN), below + LINE
    image = Image.new("RGB", size, WHITE)
    pen, x, boxes = ImageDraw.Draw(image), MARGIN, []
    pen.text((MARGIN, MARGIN), title, INK, FONT)
    for text, *look in legend:
        draw_mark(pen, x + 5, MARGIN + LINE + 12, *look)
        pen.text((x + 17, MARGIN + LINE + 4), text, INK, FONT)
        x += 17 + FONT.getlength(text) + 2 * MARGIN
    for i in range(n):
        left, top = MARGIN + i % columns * (width + MARGIN), TOP + i // columns * (height + MARGIN)
        boxes.append((left, top, left + width, top + height))
    return image, pen, boxes


def draw_mark(pen, x, y, colour, shape="box"):
    box = (x - 4, y - 4, x + 4, y + 4)
    if shape == "cross":
        pen.line(box, colour)
        pen.line((x - 4, y + 4, x + 4, y - 4), colour)
    elif shape == "dot":
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
    else:
        pen.rectangle(box, colour if shape == "box" else None, colour)


def draw_axes(pen, box, xs, ys, title, xlabel, ylabel, powers=False, names=()):
    """Draws axes from xs[0] to xs[1] and from ys[0] to ys[1].  Returns a function (x, y) -> pixel.

    powers   True: y is a logarithm to the base of 10
    names    words below the x axis at 0.5, 1.5, ..., instead of numbers"""
    left, top, right, bottom = box[0] + 36, box[1] + LINE + 8, box[2] - 8, box[3] - 2 * LINE

    def at(x, y):
        return (round(left + (x - xs[0]) / (xs[1] - xs[0]) * (right - left)),
                round(bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - top)))

    pen.text(box[:2], ylabel, INK, FONT)
    pen.text((right, box[1]), title, INK, FONT, "ra")
    pen.text(((left + right) / 2, bottom + LINE + 2), xlabel, INK, FONT, "ma")
    labels = {i + 0.5: name for i, name in enumerate(names)}
    for x, label in (labels or {x: f"{x:g}" for x in choose_ticks(*xs)}).items():
        pen.line((at(x, 0)[0], bottom, at(x, 0)[0], bottom + 4), GREY)
        pen.text((at(x, 0)[0], bottom + 6), label, INK, FONT, "ma", align="center")
    for y in choose_ticks(*ys):
        pen.line((left - 4, at(0, y)[1], left, at(0, y)[1]), GREY)
        pen.text((left - 6, at(0, y)[1]), f"{10 ** y if powers else y:.4g}", INK, FONT, "rm")
    pen.line((left, top, left, bottom, right, bottom), GREY)
    return at


def choose_ticks(low, high):
    """Returns at most six round numbers within low..high."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(s * power for s in (0.2, 0.5, 1, 2) if (high - low) / (s * power) <= 5.01)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def draw_curve(pen, at, xs, ys, colour):
    pen.line([at(x, y) for x, y in zip(xs, ys)], colour, 2)


def draw_bars(pen, at, edges, heights, base, colour):
    """Draws the bars of a histogram, which stand on `base`."""
    for x0, x1, y0, height in zip(edges, edges[1:], base, heights):
        (x0, y1), (x1, y0) = at(x0, y0 + height), at(x1, y0)
        if y0 > y1:                             # a bar of height 0 is not drawn
            pen.rectangle((x0, y1, x1 - 2, y0 - 1), colour)


def draw_grouped_bars(pen, box, groups, names, title, ylabel):
    """Draws bars side by side above each of the names.  groups: {kind: heights}."""
    highest = max(1e-12, *(max(heights) for heights in groups.values()))
    at = draw_axes(pen, box, (0, len(names)), (0, 1.05 * highest), title, "", ylabel, names=names)
    for i, (name, heights) in enumerate(groups.items()):
        for j, height in enumerate(heights):
            left, width = j + 0.1 + 0.8 * i / len(groups), 0.8 / len(groups)
            draw_bars(pen, at, (left, left + width), [height], [0], KIND_COLOURS[name])


def to_viridis(value):
    """Returns the colours of values in 0..1.  A new last dimension has red, green, blue, 0..255."""
    levels = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(value, levels, channel) for channel in VIRIDIS.T], -1)


# These flags have an effect only on these pictures.
USED_BY = dict(compare={"alignment"}, tsne_dims={"tsne"}, steps={"spectral"}, pairs={"gradcam"},
               layer={"gradcam", "spatial"}, value={"gradcam", "spatial", "spectral"})


def expand_to_path(text):
    return Path(expand_path(text))


def get_args(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False,
                                     description="Draws Algorithm 2 and the pictures of Sec. 7.")
    add, group = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--checkpoint", type=expand_to_path, metavar="FILE",
                       help="the checkpoint.pt of a run of pretrain.py")
    group.add_argument("--sweep", nargs="+", type=expand_to_path, metavar="RUN",
                       help="the folders of runs on made-up scenes, to compare what they know")
    add("--compare", type=expand_to_path, metavar="FILE",
        help="the checkpoint.pt of a second run, for the alignment histograms; default: none")
    add("--only", nargs="+", choices=PICTURES, default=list(PICTURES)[:-1],
        help="the pictures to make; default: all except embeddings")
    add("--out", type=expand_to_path, metavar="DIR",
        help="the folder to write; default: explain/ in the run's folder, for --sweep explain/")
    add("--data", type=expand_path, nargs="+", metavar="DIR",
        help="the folder of the data; for custom two folders or patterns; default: as in training")
    add("--split", type=expand_path, help="the split of the data, such as test, with custom the "
        "file of a list; default: as in training, but all if custom --data are given")
    add("--samples", type=number(int, 8),
        help="the number of random pairs; default: 512, or 4 batches if that is more; all pairs "
        "with --only embeddings")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0,
        help="the seed of the random pairs and of t-SNE's random dimensions; default: 0")
    add("--workers", type=number(int, 0), default=0, help="processes that read files; default: 0")
    add("--value", choices=VALUES, default="mean",
        help="what is explained, the mean of dimensions or of their squares; default: mean")
    add("--tsne-dims", type=number(int, 4), default=1024,
        help="the number of dimensions of each modality in t-SNE; default: 1024")
    add("--layer", help="the name of the layer for GradCAM, such as layer4.2.conv2; default: the "
        "last convolution, or the last stage of a SegFormer")
    add("--pairs", type=number(int, 1), default=6,
        help="the number of pairs in the GradCAM picture; default: 6")
    add("--steps", type=number(int, 1), default=64,
        help="the number of steps of integrated gradients; default: 64")
    add("--batch-size", type=number(int, 1), default=64,
        help="the number of pairs in memory at a time, which changes results only by rounding; "
        "default: 64")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value == parser.get_default(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        need(not args.sweep or name in ("sweep", "data", "workers", "out"),
             f"{flag} has no effect with --sweep. Leave {flag} out")
        need(name not in USED_BY or USED_BY[name] & set(args.only),
             f"{flag} has no effect on {' '.join(args.only)}. Leave {flag} out")
    args.out = args.out or (args.checkpoint.parent if args.checkpoint else Path()) / "explain"
    return args


if __name__ == "__main__":
    run_main(main)
