"""DeCUR: Decoupling Common and Unique Representations for Multimodal Self-supervision.

This file is the method itself.  Read it beside Sec. 3 and Algorithm 1 of the paper
(arXiv:2309.05300, v1).  It does not depend on data sets, arguments or processes.

    Eq. 1-6, Algorithm 1      on_diag off_diag BN loss_c loss_u decur_loss  (they need only torch)
    the same loss, no KxK     decur_loss_gram                               (cheaper if 3 N <= 2 K)
    numbers for the log       diagonals bounds
    methods of Tables 1-3     barlow_twins_loss vicreg_loss simclr_loss clip_loss
    networks, Fig. 2          resnet mit projector DeCUR                    (E1, P1, E2, P2)
    initial weights           read_weights load_encoder

    paper                       here             shape
    X'_M1, X''_M1  (x1.1 x1.2)  x11, x12         NxC1xHxW        two augmented views of modality 1
    X'_M2, X''_M2  (x2.1 x2.2)  x21, x22         NxC2xHxW        two augmented views of modality 2
    f1, f2                      f1, f2           NxCxHxW -> NxK  each an encoder E, a projector P
    Z'_M1, ...     (z1.1 ...)   z11 z12 z21 z22  NxK             embeddings
    C_M1, C_M2     (C1, C2)     C1, C2           KxK             intra-modal correlation, Eq. 1
    C              (Cm)         Cm               KxK             cross-modal correlation, Eq. 1
    C_c, C_u       (Cc, Cu)     Cc, Cu           KcxKc, KuxKu    common and unique block of Cm
    lambda_M1 M2 c u            lmb1 lmb2 lmbc lmbu              trade-offs of Eq. 2-5
    N, K, K_c, K_u              N, K, Kc, Ku                     batch size; dimensions: all,
                                                                 common and unique

`python decur.py` times both forms of the loss at the paper's N and K.
"""
import os
import time

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import stochastic_depth


# ---- Algorithm 1: copy from here; these functions need only `import torch` ----

def on_diag(C):
    return C.diagonal()                         # K


def off_diag(C):
    K = len(C)                                  # every (K+1)-th element is on the diagonal
    if K == 0:
        return C                                # 0x0: an ablation left this block empty
    return C.flatten()[1:].view(K - 1, K + 1)[:, :-1]  # (K-1)xK


def BN(z):
    """Normalises each dimension over the batch to mean 0 and variance 1.  z: NxK.

    The variance is biased, as in nn.BatchNorm1d, because only then z.T @ z / N is the correlation
    of Eq. 1.  There is no affine part."""
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()


def loss_c(C, lmb):
    """Computes the loss of Eq. 2, 4 and 5, which pulls the diagonal to 1 and all other elements to
    0.  C: KxK, in [-1, 1].  Returns a scalar >= 0."""
    l_on = (on_diag(C) - 1).pow(2).sum()        # invariance
    l_off = off_diag(C).pow(2).sum()            # redundancy reduction
    return l_on + lmb * l_off


def loss_u(C, lmb):
    """Computes the cross-modal unique loss, Eq. 3, which pulls all elements to 0.  C: KuxKu, in
    [-1, 1].  Returns a scalar >= 0."""
    l_on = on_diag(C).pow(2).sum()              # decorrelation of the modalities
    l_off = off_diag(C).pow(2).sum()            # redundancy reduction
    return l_on + lmb * l_off


def decur_loss(z11, z12, z21, z22, Kc,
               lmb1=0.0051, lmb2=0.0051, lmbc=0.0051, lmbu=0.0051, intra=True):
    """Computes the DeCUR loss, Eq. 6, as Algorithm 1 prints it.

    z11, z12   NxK   embeddings of two views of modality 1, not normalised, float32 or float64
    z21, z22   NxK   embeddings of two views of modality 2
    Kc               the first Kc dimensions are common, the other K - Kc dimensions are unique
    intra            False leaves L1 and L2 out (Table 4, "w/o intra"); Kc = K is "w/o decoup."

    N is the size of the global batch, so gather the embeddings of all processes first.  Call this
    function outside autocast.  Returns the loss and, for the log, its terms L1 L2 Lc Lu, detached.
    A term that an ablation leaves out is 0.  Raises ValueError unless 0 <= Kc <= K."""
    N, K = z11.shape
    if not 0 <= Kc <= K:
        raise ValueError(f"Kc = {Kc} is not from 0 to K = {K}. Give 0 <= Kc <= K")
    z11, z21 = BN(z11), BN(z21)                 # NxK
    L1 = L2 = z11.new_zeros(())
    if intra:
        z12, z22 = BN(z12), BN(z22)             # NxK
        C1 = z11.T @ z12 / N                    # KxK
        C2 = z21.T @ z22 / N                    # KxK
        L1 = loss_c(C1, lmb1)                   # Eq. 4  intra-modal M1
        L2 = loss_c(C2, lmb2)                   # Eq. 5  intra-modal M2
    Cm = z11.T @ z21 / N                        # KxK
    Cc = Cm[:Kc, :Kc]                           # KcxKc
    Cu = Cm[Kc:, Kc:]                           # KuxKu  (the loss has no common-by-unique blocks)
    Lc = loss_c(Cc, lmbc)                       # Eq. 2  cross-modal common
    Lu = loss_u(Cu, lmbu)                       # Eq. 3  cross-modal unique
    terms = dict(L1=L1.detach(), L2=L2.detach(), Lc=Lc.detach(), Lu=Lu.detach())
    return L1 + L2 + Lc + Lu, terms             # Eq. 6
# ---- to here ----


def decur_loss_gram(z11, z12, z21, z22, Kc,
                    lmb1=0.0051, lmb2=0.0051, lmbc=0.0051, lmbu=0.0051, intra=True):
    """Computes `decur_loss` without any KxK matrix.  Loss and gradients are equal to those of
    `decur_loss`, apart from rounding.

    For C = Za.T @ Zb / N,  sum_ij C_ij^2 = tr(Zb.T Za Za.T Zb) / N^2 = <Za Za.T, Zb Zb.T> / N^2, an
    inner product of two NxN Gram matrices.  This sum minus the squares of the diagonal is the sum
    over the off-diagonal.  Six Gram matrices are enough for all four terms, because the Gram matrix
    of all dimensions is the sum of two: that of the common and that of the unique dimensions.

    The time is O(N^2 K) instead of O(N K^2).  The memory is O(NK) instead of O(K^2).  On one CPU
    core, with K 8192, this form is 20 to 27 times as fast for N 256, 1.6 times as fast for N = K/2,
    and 0.9 times as fast for N = 3/4 K."""
    N, K = z11.shape
    if not 0 <= Kc <= K:
        raise ValueError(f"Kc = {Kc} is not from 0 to K = {K}. Give 0 <= Kc <= K")
    z11, z21 = BN(z11), BN(z21)                                     # NxK
    G11c, G11u = gram(z11[:, :Kc]), gram(z11[:, Kc:])               # NxN
    G21c, G21u = gram(z21[:, :Kc]), gram(z21[:, Kc:])               # NxN
    L1 = L2 = z11.new_zeros(())
    if intra:
        z12, z22 = BN(z12), BN(z22)                                 # NxK
        c1 = (z11 * z12).mean(0)                                    # K    on_diag(C1)
        c2 = (z21 * z22).mean(0)                                    # K    on_diag(C2)
        L1 = loss_gram(c1, 1, G11c + G11u, gram(z12), lmb1)         # Eq. 4
        L2 = loss_gram(c2, 1, G21c + G21u, gram(z22), lmb2)         # Eq. 5
    cm = (z11 * z21).mean(0)                                        # K    on_diag(Cm)
    Lc = loss_gram(cm[:Kc], 1, G11c, G21c, lmbc)                    # Eq. 2
    Lu = loss_gram(cm[Kc:], 0, G11u, G21u, lmbu)                    # Eq. 3
    terms = dict(L1=L1.detach(), L2=L2.detach(), Lc=Lc.detach(), Lu=Lu.detach())
    return L1 + L2 + Lc + Lu, terms


def gram(z):
    return z @ z.T / len(z)                     # NxN


def loss_gram(c, target, Ga, Gb, lmb):
    """Computes `loss_c` (target 1) or `loss_u` (target 0).  c: K, the diagonal of C.  Ga, Gb: NxN,
    the Gram matrices of the two embeddings."""
    l_on = (c - target).pow(2).sum()
    l_off = (Ga * Gb).sum() - c.pow(2).sum()
    return l_on + lmb * l_off


@torch.no_grad()
def diagonals(z11, z12, z21, z22, Kc):
    """Returns the mean diagonals of C1 C2 Cc Cu, in [-1, 1], for the log.  These means are easier
    to judge than the loss, because the scale of the loss depends on N and K.

    z11, z12, z21, z22    NxK; if z12 or z22 is None, C1 and C2 are left out
    Kc                    the number of common dimensions; an empty Cc or Cu is left out"""
    means = {}
    if z12 is not None and z22 is not None:
        means["C1"] = (BN(z11) * BN(z12)).mean(0).mean()
        means["C2"] = (BN(z21) * BN(z22)).mean(0).mean()
    cm = (BN(z11) * BN(z21)).mean(0)                                # K    on_diag(Cm)
    if Kc > 0:
        means["Cc"] = cm[:Kc].mean()
    if Kc < len(cm):
        means["Cu"] = cm[Kc:].mean()
    return means


def chance_and_floor(N, k, lmb=0.0051, unique=False):
    """Returns two values of `loss_c` (or, if unique, of `loss_u`) for k dimensions.  Chance is the
    mean loss of independent embeddings.  No batch of size N has a loss below the floor.

    Chance: C_ij of independent embeddings has mean 0 and variance 1 / (N-1), so the diagonal gives
    k + k / (N-1).  Floor: the rank of C is at most N-1, so by Cauchy-Schwarz sum_ij C_ij^2 >=
    (tr C)^2 / (N-1), and the floor is the minimum over tr C."""
    if unique:
        return (k + lmb * k * (k - 1)) / (N - 1), 0.0
    a = lmb * (k / (N - 1) - 1)
    return k + (k + lmb * k * (k - 1)) / (N - 1), max(0.0, k * a / (1 + a))


def bounds(N, K, Kc, intra=True):
    """Returns two dicts {term: value} of the terms of Eq. 6: their values by chance, and their
    floors.  A term that an ablation leaves out is 0."""
    L1 = L2 = chance_and_floor(N, K if intra else 0)
    Lc, Lu = chance_and_floor(N, Kc), chance_and_floor(N, K - Kc, unique=True)
    pairs = dict(L1=L1, L2=L2, Lc=Lc, Lu=Lu)
    chance = {name: pair[0] for name, pair in pairs.items()}
    floor = {name: pair[1] for name, pair in pairs.items()}
    return chance, floor


# ---- Tables 1-3: the methods that DeCUR is compared with ----
# Each function takes embeddings of the global batch, NxK, not normalised, float32 or float64, and
# returns a scalar.  Call these functions outside autocast.  zA and zB are z11 and z21.  For Barlow
# Twins within modality 1, they are z11 and z12; within modality 2, z21 and z22.  Barlow Twins and
# VICReg have DeCUR's projector; SimCLR and CLIP have smaller projectors.

def barlow_twins_loss(zA, zB, lmb=0.0051):
    """Computes Barlow Twins' loss (Zbontar et al., 2021), Eq. 1-2, with DeCUR's lambda.  Table 4
    calls it "w/o intra&decoup."."""
    N, K = zA.shape
    zA, zB = BN(zA), BN(zB)                     # NxK
    if 3 * N > 2 * K:                           # then a KxK matrix is cheaper than Gram matrices
        return loss_c(zA.T @ zB / N, lmb)
    return loss_gram((zA * zB).mean(0), 1, gram(zA), gram(zB), lmb)


def vicreg_loss(zA, zB, lmb=25, mu=25, nu=1):
    """Computes VICReg's loss (Bardes et al., 2022), Eq. 1-6, with the weights of its Sec. 4.2.

    VICReg's Eq. 5 sums squared distances over the dimensions, but VICReg's Algorithm 1 takes their
    mean.  Here: the mean, because the weights were chosen for the mean.  VICReg's published code
    also halves v; this function does not."""
    N, K = zA.shape
    s = (zA - zB).pow(2).mean()                                     # Eq. 5  invariance
    v = c = 0
    for z in (zA - zA.mean(0), zB - zB.mean(0)):
        var = z.pow(2).sum(0) / (N - 1)                             # K    on_diag(cov), unbiased
        v = v + F.relu(1 - (var + 1e-4).sqrt()).mean()              # Eq. 1-2  variance, gamma = 1
        cov2 = (z @ z.T / (N - 1)).pow(2).sum()                     # sum_ij cov_ij^2, as above
        c = c + (cov2 - var.pow(2).sum()) / K                       # Eq. 3-4  covariance
    return lmb * s + mu * v + nu * c                                # Eq. 6


def simclr_loss(zA, zB, tau=0.1):
    """Computes SimCLR's loss (Chen et al., 2020a), Eq. 1: NT-Xent over the 2N embeddings.

    A tau of 0.1 is the best in SimCLR's Table 5.  SimCLR's projector (Sec. 2.3) is 2048-128."""
    N = len(zA)
    z = F.normalize(torch.cat((zA, zB)))                            # 2NxK  rows of length 1
    similarity = (z @ z.T / tau).fill_diagonal_(-torch.inf)         # 2Nx2N  Eq. 1 has only k != i
    partner = torch.arange(2 * N, device=z.device).roll(N)          # 2N     i + N mod 2N
    return F.cross_entropy(similarity, partner)


def clip_loss(zA, zB, tau=0.07):
    """Computes CLIP's loss (Radford et al., 2021), Fig. 3: symmetric cross-entropy over N pairs.

    CLIP's tau starts at 0.07 (Sec. 2.5) and is learned; here tau stays 0.07.  CLIP's projector is
    linear (Sec. 2.3), and has 1024 dimensions for a ResNet-50 (Table 19)."""
    logits = F.normalize(zA) @ F.normalize(zB).T / tau              # NxN
    pair = torch.arange(len(zA), device=zA.device)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


# ---- Fig. 2: encoders E1, E2 and projectors P1, P2 ----

RESNETS = {                                     # block, blocks per stage, width of the first stage
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    # The stride is 8 instead of 32, so that the last map of an image of 32 pixels is 4x4.
    "resnet-toy": (BasicBlock, (1, 1, 1, 1), 16),
}


class ResNet(torchvision.models.ResNet):
    """Implements torchvision's ResNet for any number of input channels, without the classifier.
    The parameters have torchvision's names.

    A call turns NxCxHxW into the pooled feature, Nxd.  `stages` returns four maps with H/4 to H/32
    rows; the maps of resnet-toy have H/2 to H/8 rows."""

    def __init__(self, name, channels):
        block, depths, width = RESNETS[name]
        super().__init__(block, depths)
        del self.fc
        if name == "resnet-toy":
            self.inplanes = width
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.Identity()
            for s, stride in enumerate((1, 2, 2, 1)):
                setattr(self, f"layer{s + 1}", self._make_layer(block, width << s, 1, stride))
        if channels != 3 or name == "resnet-toy":  # App. B: "to fit the input channel number"
            kernel = 3 if name == "resnet-toy" else 7
            self.conv1 = nn.Conv2d(channels, width, kernel, 2, padding=kernel // 2, bias=False)
        for module in self.modules():
            # as in torchvision; the layers that were replaced above need this, too
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.channels = channels
        self.dims = [width * block.expansion << s for s in range(4)]

    def stages(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.stages(x)[-1].mean((2, 3))  # Nxd


def resnet(name, channels):
    """Returns a ResNet with random weights.  name: a key of RESNETS.  Sec. 4: "ResNet-50 ... for
    all scenarios"."""
    return ResNet(name, channels)


# These are SegFormer's encoders (Xie et al., 2021), called MiT, with the published parameter names.
# Inside the encoders, maps are NxHxWxC.  As in the published code, layer norms have eps 1e-6, but
# those after patch embeddings and after reductions have 1e-5.  The equations and the table named
# below are SegFormer's.

MITS = {                                        # widths and depths of the four stages, Table 6
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}


def convolve(conv, x):
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)          # NxHxWxC


class Attention(nn.Module):
    """Computes multi-head attention, Eq. 1-2.  Keys and values come from a map that is R times
    smaller per axis."""

    def __init__(self, C, heads, R):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(C, 2 * C)
        self.proj = nn.Linear(C, C)
        self.sr = None
        if R > 1:
            self.sr = nn.Conv2d(C, C, R, stride=R)
            self.norm = nn.LayerNorm(C)

    def forward(self, x):
        y = x
        if self.sr is not None:
            y = self.norm(convolve(self.sr, x))                     # NxH/RxW/RxC
        k, v = self.kv(y).chunk(2, dim=-1)
        q, k, v = self.split(self.q(x)), self.split(k), self.split(v)
        out = F.scaled_dot_product_attention(q, k, v)               # N x heads x HW x C/heads
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def split(self, t):                         # NxHxWxC -> N x heads x HW x C/heads
        return t.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MixFFN(nn.Module):
    """Applies Linear, a 3x3 depthwise convolution, GELU and Linear, Eq. 3.  The convolution encodes
    the positions of the tokens."""

    def __init__(self, C):
        super().__init__()
        self.fc1 = nn.Linear(C, 4 * C)
        self.fc2 = nn.Linear(4 * C, C)
        self.dwconv = nn.Module()
        self.dwconv.dwconv = nn.Conv2d(4 * C, 4 * C, 3, padding=1, groups=4 * C)

    def forward(self, x):
        return self.fc2(F.gelu(convolve(self.dwconv.dwconv, self.fc1(x))))


class Block(nn.Module):
    def __init__(self, C, heads, R, drop):
        super().__init__()
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.attn = Attention(C, heads, R)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = MixFFN(C)
        self.drop = drop

    def forward(self, x):                       # drop path: a sample skips a branch with p = drop
        x = x + stochastic_depth(self.attn(self.norm1(x)), self.drop, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop, "row", self.training)


def start_as_segformer(net):
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):                         # normal, std sqrt(2 / fan_out)
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class MiT(nn.Module):
    """Implements SegFormer's encoder for any number of input channels.  A call and `stages` return
    the same as those of `ResNet`, but each map has passed a layer norm."""

    def __init__(self, name, channels):
        super().__init__()
        self.channels = channels
        self.dims, depths = MITS[name]
        drops = [0.1 * n / (sum(depths) - 1) for n in range(sum(depths))]  # grow with the depth
        widths = (channels, *self.dims)
        stages = zip(self.dims, depths, (1, 2, 5, 8), (8, 4, 2, 1))
        for s, (C, depth, heads, R) in enumerate(stages):
            kernel, stride = (3, 2) if s else (7, 4)                # overlapping patches
            embed = nn.Module()
            embed.proj = nn.Conv2d(widths[s], C, kernel, stride, padding=kernel // 2)
            embed.norm = nn.LayerNorm(C)
            blocks = [Block(C, heads, R, drops.pop(0)) for _ in range(depth)]
            setattr(self, f"patch_embed{s + 1}", embed)
            setattr(self, f"block{s + 1}", nn.Sequential(*blocks))
            setattr(self, f"norm{s + 1}", nn.LayerNorm(C, eps=1e-6))
        start_as_segformer(self)
        # Weights get the memory format of the maps, so that their gradients have this format, too.
        self.to(memory_format=torch.channels_last)

    def stage(self, s, x):                      # s: 1 to 4
        embed = getattr(self, f"patch_embed{s}")
        block = getattr(self, f"block{s}")
        norm = getattr(self, f"norm{s}")
        x = embed.norm(embed.proj(x).permute(0, 2, 3, 1))           # NxHxWxC
        return norm(block(x)).permute(0, 3, 1, 2)                   # NxCxHxW

    def stages(self, x):
        maps = []
        for s in (1, 2, 3, 4):
            x = self.stage(s, x)                # a stage takes the normed map of the stage before
            maps.append(x)
        return maps

    def forward(self, x):
        return self.stages(x)[-1].mean((2, 3))  # Nxd


def mit(name, channels):
    """Returns a MiT with random weights.  name: a key of MITS.  Sec. 4: "additional segformers";
    App. B: B2 and B5."""
    return MiT(name, channels)


def projector(d, widths):
    """Returns the projector of Sec. 4 and App. B: Linear, BatchNorm and ReLU for each width, but
    only Linear for the last width.

    d         the number of dimensions of the encoder's feature
    widths    (8192, 8192, 8192) in the paper; () means no projector (Fig. 3b)

    Paper: does not mention biases.  Here: no biases, as in Barlow Twins, because batch norm would
    remove biases again."""
    layers = []
    for width in widths:
        layers += [nn.Linear(d, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        d = width
    return nn.Sequential(*layers[:-2])          # Nxd -> NxK


class DeCUR(nn.Module):
    """Holds two branches that share no parameter, Fig. 2.  f1, f2: NxCxHxW -> NxK, each an encoder
    E and a projector P.

    views    which of x11 x12 x21 x22 are encoded.  DeCUR needs all four views.  DeCUR without its
             intra-modal terms and the other methods need two.  For a view that is not encoded, z is
             None.  A modality of which no view is encoded has no branch."""

    def __init__(self, backbone, channels1, channels2, widths, views=(True, True, True, True)):
        super().__init__()
        self.views = views
        self.f1 = branch(backbone, channels1, widths) if any(views[:2]) else None
        self.f2 = branch(backbone, channels2, widths) if any(views[2:]) else None

    def forward(self, x11, x12, x21, x22):      # four times NxK, not normalised
        z11 = self.f1(x11) if self.views[0] else None
        z12 = self.f1(x12) if self.views[1] else None
        z21 = self.f2(x21) if self.views[2] else None
        z22 = self.f2(x22) if self.views[3] else None
        return z11, z12, z21, z22


def branch(backbone, channels, widths):
    f = nn.Sequential()
    f.E = mit(backbone, channels) if backbone in MITS else resnet(backbone, channels)
    f.P = projector(f.E.dims[-1], widths)
    return f


# ---- initial weights: published weights, or weights of this project ----

# For each branch: the beginning of its keys in our files, and in the authors' files.
BRANCHES = (("f1.E.", "backbone_1."), ("f2.E.", "backbone_2."))
NOT_ENCODER = ("f1.P.", "f2.P.", "projector", "bn.")  # keys in files of both encoders
CLASSIFIER = ("fc.weight", "fc.bias", "head.weight", "head.bias")


def read_weights(file, backbone):
    """Returns a list of the state dicts in `file`: one for one encoder, or two for the encoders of
    modality 1 and modality 2.

    file    checkpoint.pt or encoder?.pth of this project, or a state dict of torchvision, SegFormer
            or the DeCUR authors; "imagenet" means torchvision's own weights of `backbone`, which
            are downloaded once
    Raises ValueError if the file is damaged, or holds more than tensors and plain values."""
    if file == "imagenet":
        return [load_imagenet(backbone)]
    if str(file).endswith(".safetensors"):
        raise ValueError(f"{file} cannot be read as it is. Convert it, and give w.pth: python -c "
                         f"\"import torch, safetensors.torch as s; "
                         f"torch.save(s.load_file('{file}'), 'w.pth')\"")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be opened ({error.strerror}). Give a checkpoint.pt, or "
                         f"the file of an encoder") from None
    except Exception:                           # a damaged file raises nearly anything
        raise ValueError(f"{file} is damaged, or holds more than tensors and plain values. Such a "
                         f"file could run code, so it is not loaded. Give another file") from None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state, dict) and key in state:
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{file} has no state dict. Give a file with a dict {{parameter name: "
                         f"tensor}}")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or not value.isfinite().all():
            raise ValueError(f"{file}: {key} is not a tensor of finite numbers. The first keys are "
                             f"{' '.join(list(state)[:4])}. Give a file of an encoder's weights")
    return split_branches(strip_prefix(state))


def strip_prefix(state):
    """Removes the prefix that all keys share, such as "module.", because DDP, compile and other
    wrappers add one.  f1. and f2. stay, because they name a branch of `DeCUR`."""
    prefix = os.path.commonprefix(list(state)).rpartition(".")[0]
    if not prefix or prefix.startswith(("f1", "f2")):
        return state
    return {key.removeprefix(f"{prefix}."): t for key, t in state.items()}


def split_branches(state):
    """Returns the state dict of each encoder.  Keys that belong to no branch go to all encoders, so
    that `load_encoder` refuses unknown keys."""
    known = (*BRANCHES[0], *BRANCHES[1], *NOT_ENCODER)
    rest = {key: t for key, t in state.items() if not key.startswith(known)}
    encoders = []
    for ours, authors in BRANCHES:
        encoder = {key.removeprefix(ours).removeprefix(authors): t for key, t in state.items()
                   if key.startswith((ours, authors))}
        if encoder:
            encoders.append(encoder | rest)
    return encoders or [rest]


def load_imagenet(backbone):
    try:
        weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, ValueError) as error:      # there are no weights, or the download failed
        raise ValueError(f"torchvision has no ImageNet weights of {backbone}, or cannot download "
                         f"them ({error}). Give the file of weights that you have") from None


def load_encoder(E, state, bgr=False):
    """Loads a state dict of `read_weights` into the encoder E.  Returns a line to print about it.

    bgr    True if the weights were trained on blue, green, red: the input channels of the first
           convolution are then reversed
    Raises ValueError unless the keys are exactly those of E.  Keys of a classifier are ignored."""
    own = E.state_dict()
    weights = {key: t for key, t in state.items() if key not in CLASSIFIER}
    for key in own:
        if key.endswith("num_batches_tracked"):  # files of torch before 0.4.1 have no counters
            weights.setdefault(key, own[key])
    try:
        E.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit ({' '.join(str(error).split())[:300]}). The "
                         f"first keys of the file are {' '.join(list(state)[:4])}. Give weights of "
                         f"the same backbone with the same input channels") from None
    if bgr:
        first = next(E.parameters()).data       # the first convolution's weight: C'xCxkxk
        first.copy_(first.flip(1))
    return f"{len(own)} of {len(own)} keys matched{', BGR turned to RGB' if bgr else ''}"


# ---- python decur.py: both forms of the loss, side by side ----

def time_loss(loss, z, Kc):
    """Returns two values: the seconds of a forward and a backward pass (the best of three), and the
    loss."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        value = loss(*z, Kc)[0]
        torch.autograd.grad(value, z)
        value = value.item()                    # waits until a GPU is done
        times.append(time.perf_counter() - start)
    return min(times), value


def main():
    """Prints how long both forms of the loss take, forward and backward, at the paper's sizes."""
    N, K, Kc = 256, 8192, 7168                  # SAR-optical
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # The four views share this part, so they are correlated, and no term is trivial.
    shared = torch.randn(N, K, device=device)
    z = [(shared + torch.randn(N, K, device=device)).requires_grad_() for _ in range(4)]
    print(f"N {N}  K {K}  Kc {Kc}  float32  {device}  torch {torch.__version__}")
    slow, loss = time_loss(decur_loss, z, Kc)
    fast, same = time_loss(decur_loss_gram, z, Kc)
    print(f"decur_loss {slow:.3f} s, decur_loss_gram {fast:.3f} s ({slow / fast:.1f} times as "
          f"fast); relative difference of the losses {abs(loss - same) / loss:.1e}")


if __name__ == "__main__":
    main()
