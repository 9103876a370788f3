"""DeCUR: Decoupling Common and Unique Representations for Multimodal Self-supervision.

The method itself, to be read beside Sec. 3 and Algorithm 1 of the paper (arXiv:2309.05300, v1).
Nothing here knows of data sets, arguments or processes.

    Eq. 1-6, Algorithm 1    on_diag off_diag BN loss_c loss_u decur_loss  (torch alone: copy them)
    the same, without KxK   decur_loss_gram                               (what pretrain.py uses)
    Tables 1-3, compared    barlow_twins_loss vicreg_loss simclr_loss clip_loss
    Fig. 2, App. B          resnet mit projector DeCUR                         (E1, P1, E2, P2)
    starting from weights   read_weights load_encoder

    paper                       here             shape
    X'_M1, X''_M1  (x1.1 x1.2)  x11, x12         NxC1xHxW        two augmented views of modality 1
    X'_M2, X''_M2  (x2.1 x2.2)  x21, x22         NxC2xHxW        two augmented views of modality 2
    f1, f2                      f1, f2           NxCxHxW -> NxK  an encoder E, a projector P each
    Z'_M1, ...     (z1.1 ...)   z11 z12 z21 z22  NxK             embeddings
    C_M1, C_M2     (C1, C2)     C1, C2           KxK             intra-modal correlation, Eq. 1
    C              (Cm)         Cm               KxK             cross-modal correlation, Eq. 1
    C_c, C_u       (Cc, Cu)     Cc, Cu           KcxKc, KuxKu    its common and its unique block
    lambda_M1 M2 c u            lmb1 lmb2 lmbc lmbu              trade-offs of Eq. 2-5
    N, K, K_c, K_u              N, K, Kc, Ku                     global batch; dimensions: K = Kc+Ku

`python decur.py` times both forms of the loss at the paper's N and K.
"""
import argparse
import multiprocessing
import pickle
import sys
import time

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import stochastic_depth


# ---- Algorithm 1: copy from here; it needs `import torch` and nothing else ----

def on_diag(C):
    return C.diagonal()                         # K


def off_diag(C):
    K = len(C)                                  # every (K+1)-th element is on the diagonal
    return C.flatten()[1:].view(K - 1, K + 1)[:, :-1]  # (K-1)xK


def BN(z):
    """Batch normalisation without affine part: mean 0, variance 1 over the batch.  z: NxK.

    The biased variance, as in nn.BatchNorm1d: only so is z.T @ z / N the correlation of Eq. 1.
    """
    return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()


def loss_c(C, lmb):
    """Eq. 2, 4, 5: diagonal to 1, the rest to 0.  C: KxK in [-1, 1].  Returns a scalar >= 0."""
    l_on = (on_diag(C) - 1).pow(2).sum()        # invariance
    l_off = off_diag(C).pow(2).sum()            # redundancy reduction
    return l_on + lmb * l_off


def loss_u(C, lmb):
    """Eq. 3, cross-modal unique: everything to 0.  C: KuxKu in [-1, 1].  Returns a scalar >= 0."""
    l_on = on_diag(C).pow(2).sum()              # decorrelation of the modalities
    l_off = off_diag(C).pow(2).sum()            # redundancy reduction
    return l_on + lmb * l_off


def decur_loss(z11, z12, z21, z22, Kc,
               lmb1=0.0051, lmb2=0.0051, lmbc=0.0051, lmbu=0.0051, intra=True):
    """The DeCUR loss, Eq. 6, as Algorithm 1 prints it.

    z11, z12   NxK   embeddings of two views of modality 1, not normalised, float32 or float64
    z21, z22   NxK   the same of modality 2; N is the global batch: gather over the processes first
    Kc               the first Kc dimensions are common, the other K - Kc unique, 0 <= Kc <= K
    intra            False leaves L1 and L2 out (Table 4, "w/o intra"); Kc = K is "w/o decoup."

    Call it outside autocast.  Returns the loss and a dict of detached scalars: terms L1 L2 Lc Lu
    and mean diagonals C1 C2 Cc Cu, in [-1, 1]; what an ablation leaves empty is left out.
    Raises ValueError if Kc is not within 0..K.
    """
    N, K = z11.shape
    if not 0 <= Kc <= K:
        raise ValueError(f"Kc = {Kc} common dimensions of K = {K}; expected 0 <= Kc <= K")
    z11, z12 = BN(z11), BN(z12)                 # NxK
    z21, z22 = BN(z21), BN(z22)                 # NxK
    Cm = z11.T @ z21 / N                        # KxK
    L, C = {}, {}
    if intra:
        C["C1"] = z11.T @ z12 / N               # KxK
        C["C2"] = z21.T @ z22 / N               # KxK
        L["L1"] = loss_c(C["C1"], lmb1)         # Eq. 4  intra-modal M1
        L["L2"] = loss_c(C["C2"], lmb2)         # Eq. 5  intra-modal M2
    if Kc > 0:
        C["Cc"] = Cm[:Kc, :Kc]                  # KcxKc
        L["Lc"] = loss_c(C["Cc"], lmbc)         # Eq. 2  cross-modal common
    if Kc < K:
        C["Cu"] = Cm[Kc:, Kc:]                  # KuxKu  (common-by-unique blocks: in no term)
        L["Lu"] = loss_u(C["Cu"], lmbu)         # Eq. 3  cross-modal unique
    parts = {**L, **{name: on_diag(c).mean() for name, c in C.items()}}
    return sum(L.values()), {name: part.detach() for name, part in parts.items()}  # Eq. 6
# ---- to here ----


def decur_loss_gram(z11, z12, z21, z22, Kc,
                    lmb1=0.0051, lmb2=0.0051, lmbc=0.0051, lmbu=0.0051, intra=True):
    """`decur_loss` but for rounding, gradients too, without ever forming a KxK matrix.

    For C = Za.T @ Zb / N,  sum_ij C_ij^2 = tr(Zb.T Za Za.T Zb) / N^2 = <Za Za.T, Zb Zb.T> / N^2, an
    inner product of NxN Gram matrices.  Less the diagonal's squares, the off-diagonal is left.  Six
    Gram matrices serve all four terms: that of all dimensions is the sum of the two blocks'.  Time
    O(N^2 K), memory O(NK) against O(N K^2), O(K^2): it pays while N < K, and N is 256, K 8192.
    """
    N, K = z11.shape
    if not 0 <= Kc <= K:
        raise ValueError(f"Kc = {Kc} common dimensions of K = {K}; expected 0 <= Kc <= K")
    z11, z21 = BN(z11), BN(z21)                                     # NxK
    G11c, G11u = gram(z11[:, :Kc]), gram(z11[:, Kc:])               # NxN
    G21c, G21u = gram(z21[:, :Kc]), gram(z21[:, Kc:])               # NxN
    cm = (z11 * z21).mean(0)                                        # K    on_diag(Cm)
    L, C = {}, {}
    if intra:
        z12, z22 = BN(z12), BN(z22)                                 # NxK
        C["C1"] = (z11 * z12).mean(0)                               # K    on_diag(C1)
        C["C2"] = (z21 * z22).mean(0)                               # K    on_diag(C2)
        L["L1"] = loss_gram(C["C1"], 1, G11c + G11u, gram(z12), lmb1)   # Eq. 4
        L["L2"] = loss_gram(C["C2"], 1, G21c + G21u, gram(z22), lmb2)   # Eq. 5
    if Kc > 0:
        C["Cc"] = cm[:Kc]                                           # Kc   on_diag(Cc)
        L["Lc"] = loss_gram(C["Cc"], 1, G11c, G21c, lmbc)           # Eq. 2
    if Kc < K:
        C["Cu"] = cm[Kc:]                                           # Ku   on_diag(Cu)
        L["Lu"] = loss_gram(C["Cu"], 0, G11u, G21u, lmbu)           # Eq. 3
    parts = {**L, **{name: c.mean() for name, c in C.items()}}
    return sum(L.values()), {name: part.detach() for name, part in parts.items()}


def gram(z):
    return z @ z.T / len(z)                     # NxN


def loss_gram(c, target, Ga, Gb, lmb):
    """`loss_c` (target 1) or `loss_u` (0) from the diagonal c: K, and both Gram matrices: NxN."""
    l_on = (c - target).pow(2).sum()
    l_off = (Ga * Gb).sum() - c.pow(2).sum()
    return l_on + lmb * l_off


def chance_and_floor(N, k, lmb=0.0051, unique=False):
    """`loss_c` (or `loss_u`) of k dimensions by chance, and the least that a batch of N allows.

    Chance: C_ij of independent embeddings has mean 0 and variance 1 / (N-1), so the diagonal gives
    k + k / (N-1).  Floor: the rank of C is at most N-1, so by Cauchy-Schwarz sum_ij C_ij^2 >=
    (tr C)^2 / (N-1); minimise over tr C.  The README tabulates both.  Returns two floats.
    """
    if unique:
        return (k + lmb * k * (k - 1)) / (N - 1), 0.0
    a = lmb * (k / (N - 1) - 1)
    return k + (k + lmb * k * (k - 1)) / (N - 1), max(0.0, k * a / (1 + a))


# ---- Tables 1-3: what DeCUR is compared with ----
# Functions of embeddings not yet normalised, NxK, float32 or float64, N the global batch, outside
# autocast.  zA, zB: z11 and z21, for Barlow Twins within one modality z11 and z12.  Each returns a
# scalar.  Barlow Twins and VICReg ask for DeCUR's own projector, SimCLR and CLIP for smaller ones.

def barlow_twins_loss(zA, zB, lmb=0.0051):
    """Barlow Twins (Zbontar et al., 2021), Eq. 1-2; lambda as DeCUR.  Table 4: w/o intra&decoup."""
    zA, zB = BN(zA), BN(zB)                     # NxK
    return loss_gram((zA * zB).mean(0), 1, gram(zA), gram(zB), lmb)


def vicreg_loss(zA, zB, lmb=25, mu=25, nu=1):
    """VICReg (Bardes et al., 2022), Eq. 1-6 and its Algorithm 1; weights of its Sec. 4.2.

    Its Eq. 5 sums squared distances over the dimensions, its Algorithm 1 takes the mean: here the
    mean, for which the weights were chosen.  Its published code also halves v.
    """
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
    """NT-Xent over the 2N embeddings, SimCLR (Chen et al., 2020a), Eq. 1.

    tau 0.1: the best in its Table 5.  Its projector (Sec. 2.3) is 2048-128.
    """
    N = len(zA)
    z = F.normalize(torch.cat((zA, zB)))                            # 2NxK  rows of length 1
    similarity = (z @ z.T / tau).fill_diagonal_(-torch.inf)         # 2Nx2N  k != i
    partner = torch.arange(2 * N, device=z.device).roll(N)          # i + N mod 2N
    return F.cross_entropy(similarity, partner)


def clip_loss(zA, zB, tau=0.07):
    """Symmetric cross-entropy over the N pairs, CLIP (Radford et al., 2021), Fig. 3.

    tau 0.07: where CLIP starts (Sec. 2.5); it learns tau from there, here it stays.  Its projector
    is linear (Sec. 2.3), for a ResNet-50 to 1024 dimensions (Table 19).
    """
    logits = F.normalize(zA) @ F.normalize(zB).T / tau              # NxN
    pair = torch.arange(len(zA), device=zA.device)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


# ---- Fig. 2: encoders E1, E2 and projectors P1, P2 ----

RESNETS = {                                     # block, blocks a stage, width of the first stage
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet-toy": (BasicBlock, (1, 1, 1, 1), 16),  # stride 8 instead of 32: 32 pixels leave 4x4
}


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet for any number of input channels, no classifier, names unchanged.

    Call: NxCxHxW -> Nxd, the pooled feature.  `stages`: the maps, Nxd1xH/4xW/4 ... Nxd4xH/32xW/32.
    """

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
            if isinstance(module, nn.Conv2d):   # torchvision's way, for the replaced layers too
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.channels, self.dims = channels, [width * block.expansion << s for s in range(4)]

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
    """Sec. 4: "ResNet-50 for all scenarios".  name: a key of RESNETS.  Random weights."""
    return ResNet(name, channels)


# SegFormer's encoders (Xie et al., 2021), "MiT", with the published parameter names.  Maps: NxHxWxC
# inside.  Layer norms have eps 1e-6, but 1e-5 after patch embeddings and reductions, as published.

MITS = {                                        # widths and depths of the four stages: its Table 6
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
    """Multi-head attention on keys and values of a map R times smaller per axis, its Eq. 1-2."""

    def __init__(self, C, heads, R):
        super().__init__()
        self.heads, self.reduce = heads, R > 1
        self.q, self.kv, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)
        if self.reduce:
            self.sr, self.norm = nn.Conv2d(C, C, R, stride=R), nn.LayerNorm(C)

    def forward(self, x):
        y = self.norm(convolve(self.sr, x)) if self.reduce else x   # NxH/RxW/RxC
        qkv = (self.q(x), *self.kv(y).chunk(2, dim=-1))
        q, k, v = (t.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        out = F.scaled_dot_product_attention(q, k, v)               # N x heads x HW x C/heads
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class MixFFN(nn.Module):
    """Linear, 3x3 depthwise convolution (it tells where tokens are), GELU, Linear, its Eq. 3."""

    def __init__(self, C):
        super().__init__()
        self.fc1, self.fc2, self.dwconv = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), nn.Module()
        self.dwconv.dwconv = nn.Conv2d(4 * C, 4 * C, 3, padding=1, groups=4 * C)

    def forward(self, x):
        return self.fc2(F.gelu(convolve(self.dwconv.dwconv, self.fc1(x))))


class Block(nn.Module):
    def __init__(self, C, heads, R, drop):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(C, eps=1e-6), Attention(C, heads, R)
        self.norm2, self.mlp, self.drop = nn.LayerNorm(C, eps=1e-6), MixFFN(C), drop

    def forward(self, x):                       # drop path: a sample skips a branch at rate `drop`
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
    """SegFormer's encoder for any input channels.  Call and `stages` as for `ResNet`, normed."""

    def __init__(self, name, channels):
        super().__init__()
        self.channels, (self.dims, depths) = channels, MITS[name]
        drops = [0.1 * n / (sum(depths) - 1) for n in range(sum(depths))]  # by depth in the net
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
        self.to(memory_format=torch.channels_last)  # as the maps are inside, and so the gradients

    def stage(self, s, x):                      # s: 1 to 4
        embed, block, norm = map(self.get_submodule, (f"patch_embed{s}", f"block{s}", f"norm{s}"))
        x = embed.norm(embed.proj(x).permute(0, 2, 3, 1))           # NxHxWxC
        return norm(block(x)).permute(0, 3, 1, 2)                   # NxCxHxW

    def stages(self, x):
        maps = []
        for s in (1, 2, 3, 4):
            x = self.stage(s, x)                # each stage takes the normed map of the one before
            maps.append(x)
        return maps

    def forward(self, x):
        return self.stages(x)[-1].mean((2, 3))  # Nxd


def mit(name, channels):
    """Sec. 4: "additional segformers"; App. B: B2 and B5.  name: a key of MITS.  Random weights."""
    return MiT(name, channels)


def projector(d, widths):
    """Sec. 4, App. B: Linear, BatchNorm and ReLU for each width, for the last only Linear.

    Paper: silent on biases.  Here: none, as in Barlow Twins; batch norm takes them out again.
    d: of the encoder.  widths: (8192, 8192, 8192) in the paper; () is no projector (Fig. 3b).
    """
    layers = []
    for width in widths:
        layers += [nn.Linear(d, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        d = width
    return nn.Sequential(*layers[:-2])          # Nxd -> NxK


class DeCUR(nn.Module):
    """Two branches that share no parameter, Fig. 2.  f1, f2: NxCxHxW -> NxK, each an encoder E and
    a projector P.

    views   which of the four are encoded: what DeCUR is compared with asks for two.  z of the rest
            is None, and a modality without views has no branch.
    """

    def __init__(self, backbone, channels1, channels2, widths, views=(True, True, True, True)):
        super().__init__()
        self.views = views
        self.f1 = branch(backbone, channels1, widths) if any(views[:2]) else None
        self.f2 = branch(backbone, channels2, widths) if any(views[2:]) else None

    def forward(self, x11, x12, x21, x22):      # NxK each, not yet normalised
        fx = zip(self.views, (self.f1, self.f1, self.f2, self.f2), (x11, x12, x21, x22))
        return tuple(f(x) if view else None for view, f, x in fx)


def branch(backbone, channels, widths):
    f = nn.Sequential()
    f.E = mit(backbone, channels) if backbone in MITS else resnet(backbone, channels)
    f.P = projector(f.E.dims[-1], widths)
    return f


# ---- starting from published weights, or one's own ----

BRANCHES = (("f1.E.", "backbone_1."), ("f2.E.", "backbone_2."))  # ours, the authors'
BESIDE = ("f1.P.", "f2.P.", "projector", "bn.")                  # what else a file of both holds
CLASSIFIER = {"fc.weight", "fc.bias", "head.weight", "head.bias"}


def read_weights(file, backbone):
    """A list of the state dicts in `file`: of one encoder, or of both modalities' in their order.

    file   checkpoint.pt or encoder?.pth of this project, a state dict of torchvision, of SegFormer,
           of the DeCUR authors; or "imagenet" for torchvision's own of `backbone`, downloaded once
    Raises ValueError where a file holds more than tensors and plain values: it could run code.
    """
    if file == "imagenet":
        if backbone not in torchvision.models.list_models():
            raise ValueError(f"torchvision has no ImageNet weights for {backbone}: "
                             f"give a file instead")
        weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
        try:
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except OSError as error:
            raise ValueError(f"no {weights.url} ({error}): "
                             f"fetch it where there is a network, give the file") from None
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError):
            raise ValueError(f"{file} is damaged, or no file of tensors and plain values alone: "
                             f"it could run code") from None
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}, expected a state dict")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    beside = (*BRANCHES[0], *BRANCHES[1], *BESIDE)
    rest = {key: value for key, value in state.items() if not key.startswith(beside)}
    encoders = [{key.removeprefix(start): value for start in starts for key, value in state.items()
                 if key.startswith(start)} for starts in BRANCHES]
    return [{**encoder, **rest} for encoder in encoders if encoder] or [rest]


def load_encoder(E, state, bgr=False):
    """Load a state dict of `read_weights` into the encoder E.  Returns a line: keys matched or not.

    bgr    the weights know images as blue, green, red: reverse the first convolution's input
    Raises ValueError, E untouched, unless all keys of E match and only a classifier is left over.
    """
    own = E.state_dict()
    first = next(iter(own))                     # the first convolution's weight: CxC_inxkxk
    if first in state and state[first].shape[1] != E.channels:
        raise ValueError(f"{first} takes {state[first].shape[1]} input channels, "
                         f"this encoder {E.channels}")
    if bgr and E.channels != 3:
        raise ValueError(f"BGR weights for an encoder of {E.channels} input channels: expected 3")
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    missing = [key for key in own if key not in state
               and not key.endswith("num_batches_tracked")]         # not before torch 0.4.1
    unexpected = [key for key in state if key not in own]
    lists = {"of another shape": shapes, "missing": missing, "unexpected": unexpected}
    report = f"{len(own.keys() & state.keys()) - len(shapes)} of {len(own)} keys matched" + "".join(
        f", {len(keys)} {name}: {' '.join(keys[:4])}{' ...' * (len(keys) > 4)}"
        for name, keys in lists.items() if keys)
    if shapes or missing or not CLASSIFIER.issuperset(unexpected):
        raise ValueError(f"{report}; expected all, and nothing beside a classifier: "
                         f"is it another backbone?")
    if bgr:
        state = {**state, first: state[first].flip(1)}
        report += ", input channels reversed"
    E.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    return report


# ---- python decur.py: both forms of the loss, side by side ----

def measure(loss, N, K, Kc, device, repeats, queue):
    """Seconds (best of `repeats`) and peak bytes, forward and backward; run in a fresh process."""
    torch.manual_seed(0)
    shared = torch.randn(N, K, device=device)   # correlated, so that no term is trivial
    z = [(shared + torch.randn(N, K, device=device)).requires_grad_() for _ in range(4)]
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    loss(*[z_[:2, :2] for z_ in z], 1)[0].backward()  # libraries loaded, threads started
    before = peak(device)
    seconds = []
    for _ in range(repeats):
        sync(), (start := time.perf_counter())
        value = loss(*z, Kc)[0]
        gradient = torch.autograd.grad(value, z)
        sync(), seconds.append(time.perf_counter() - start)
    norms = [g.norm().item() for g in gradient]
    queue.put((min(seconds), peak(device) - before, value.item(), norms))


def peak(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource                             # POSIX only
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main():
    parser = argparse.ArgumentParser(
        description="Time and peak memory of Algorithm 1's loss and of its Gram form, "
                    "forward and backward.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--batch-size", type=int, default=256, metavar="N", help="N, the global batch")
    add("--dims", type=int, default=8192, metavar="K", help="K, the embedding's dimensions")
    add("--common", type=float, default=0.875, help="fraction of common dimensions, 0 to 1")
    add("--repeats", type=int, default=3, help="the best time of so many counts")
    args = parser.parse_args()
    if args.batch_size < 2 or args.dims < 1 or not 0 <= args.common <= 1 or args.repeats < 1:
        parser.error("expected --batch-size >= 2, --dims >= 1, 0 <= --common <= 1 "
                     "and --repeats >= 1")
    N, K, Kc = args.batch_size, args.dims, round(args.common * args.dims)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = f"{torch.get_num_threads()} CPU threads"
    where = torch.cuda.get_device_name() if device == "cuda" else threads
    print(f"N {N}  K {K}  Kc {Kc}  float32  {where}  torch {torch.__version__}")
    rows, spawn = [], multiprocessing.get_context("spawn")  # a process each: peaks of their own
    for loss in (decur_loss, decur_loss_gram):
        queue = spawn.SimpleQueue()
        process = spawn.Process(target=measure, args=(loss, N, K, Kc, device, args.repeats, queue))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{loss.__name__} ended with exit code {process.exitcode}: too little memory? "
                     f"Try a smaller --dims")
        rows.append(queue.get())
        print(f"{loss.__name__:16s} {rows[-1][0]:8.3f} s  {rows[-1][1] / 2**20:8.1f} MiB  "
              f"loss {rows[-1][2]:.4f}")
    (time_a, memory_a, loss_a, gradient_a), (time_b, memory_b, loss_b, gradient_b) = rows
    gradient = max(abs(a - b) / a for a, b in zip(gradient_a, gradient_b))
    print(f"Gram form: {time_a / time_b:.1f} times faster, "
          f"{memory_a / max(memory_b, 1):.1f} times less memory, "
          f"relative difference of the loss {abs(loss_a - loss_b) / loss_a:.1e}, "
          f"of the gradients' norms {gradient:.1e}")


if __name__ == "__main__":
    main()
