"""DeCUR: Decoupling Common and Unique Representations for Multimodal Self-supervision.

The method itself, to be read beside Sec. 3 and Algorithm 1 of the paper (arXiv:2309.05300, version 1).
Nothing here knows of files, arguments or processes.

    Eq. 1-6, Algorithm 1    on_diag off_diag BN loss_c loss_u decur_loss       (torch alone: copy the block)
    the same, without KxK   decur_loss_gram                                    (what pretrain.py uses)
    Fig. 2, App. B          resnet projector DeCUR                             (E1, P1, E2, P2)

    paper                     here                shape
    X'_M1, X''_M1  (x1.1 x1.2)  x11, x12          NxC1xHxW   two augmented views of modality 1
    X'_M2, X''_M2  (x2.1 x2.2)  x21, x22          NxC2xHxW   two augmented views of modality 2
    f1, f2                    f1, f2              NxCxHxW -> NxK   encoder E and projector P of a modality
    Z'_M1, ...     (z1.1 ...)   z11 z12 z21 z22   NxK        embeddings
    C_M1, C_M2     (C1, C2)     C1, C2            KxK        intra-modal cross-correlation, Eq. 1
    C              (Cm)         Cm                KxK        cross-modal cross-correlation, Eq. 1
    C_c, C_u       (Cc, Cu)     Cc, Cu            KcxKc, KuxKu   its common and its unique block
    lambda_M1 M2 c u          lmb1 lmb2 lmbc lmbu            trade-offs of Eq. 2-5
    N, K, K_c, K_u            N, K, Kc, Ku                   global batch, dimensions: K = Kc + Ku

`python decur.py` times both forms of the loss at the paper's N and K.
"""
import argparse
import multiprocessing
import sys
import time

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck


# ---- Algorithm 1: copy from here; it needs `import torch` and nothing else ----

def on_diag(C):
    return C.diagonal()                         # K


def off_diag(C):
    K = len(C)                                  # every (K+1)-th element is on the diagonal: a view, no copy
    return C.flatten()[1:].view(K - 1, K + 1)[:, :-1]  # (K-1)xK


def BN(z):
    """Batch normalisation without affine part: mean 0, variance 1 over the batch.  z: NxK.

    The variance is the biased one, as in nn.BatchNorm1d: only so is z.T @ z / N the Eq. 1 correlation.
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


def decur_loss(z11, z12, z21, z22, Kc, lmb1=0.0051, lmb2=0.0051, lmbc=0.0051, lmbu=0.0051, intra=True):
    """The DeCUR loss, Eq. 6, as Algorithm 1 prints it.

    z11, z12   NxK   embeddings of two views of modality 1, before any normalisation, float32 or float64
    z21, z22   NxK   the same of modality 2; N is the global batch: gather over the processes first
    Kc               the first Kc dimensions are common, the other K - Kc unique, 0 <= Kc <= K
    intra            False leaves L1 and L2 out (Table 4, "w/o intra"); Kc = K is "w/o decoup."

    Call it outside autocast.  Returns the loss (a scalar) and a dict of detached scalars: the terms L1 L2 Lc Lu
    and the mean diagonals C1 C2 Cc Cu, in [-1, 1]; what an ablation leaves empty is left out.
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
        C["Cu"] = Cm[Kc:, Kc:]                  # KuxKu  (the common-by-unique blocks of Cm are in no term)
        L["Lu"] = loss_u(C["Cu"], lmbu)         # Eq. 3  cross-modal unique
    parts = {**L, **{name: on_diag(c).mean() for name, c in C.items()}}
    return sum(L.values()), {name: part.detach() for name, part in parts.items()}  # Eq. 6
# ---- to here ----


def decur_loss_gram(z11, z12, z21, z22, Kc, lmb1=0.0051, lmb2=0.0051, lmbc=0.0051, lmbu=0.0051, intra=True):
    """`decur_loss` to the last digit but rounding, gradients too, without ever forming a KxK matrix.

    For C = Za.T @ Zb / N,  sum_ij C_ij^2 = tr(Zb.T Za Za.T Zb) / N^2 = <Za Za.T, Zb Zb.T> / N^2:  an inner product
    of two NxN Gram matrices.  Take the diagonal's squares off, and the off-diagonal is left.  Six Gram matrices
    serve all four terms, since that of all dimensions is the sum of the common and the unique block's.
    Time O(N^2 K) and memory O(N^2 + NK) against O(N K^2) and O(K^2): it pays as long as N < K, and N is 256, K 8192.
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
    """`loss_c` (target 1) or `loss_u` (target 0) from the diagonal c: K, and both Gram matrices: NxN."""
    l_on = (c - target).pow(2).sum()
    l_off = (Ga * Gb).sum() - c.pow(2).sum()
    return l_on + lmb * l_off


def chance_and_floor(N, k, lmb=0.0051, unique=False):
    """What `loss_c` (or `loss_u`) of k dimensions is for independent embeddings, and the least that N samples allow.

    Chance: an off-diagonal C_ij has variance 1 / (N-1), so the diagonal gives k + k / (N-1).  Floor: the rank of C is
    at most N-1, so by Cauchy-Schwarz sum_ij C_ij^2 >= (tr C)^2 / (N-1); minimise over tr C.  Sec. "what the loss
    should look like" of the README tabulates both.  Returns two floats.
    """
    if unique:
        return (k + lmb * k * (k - 1)) / (N - 1), 0.0
    a = lmb * (k / (N - 1) - 1)
    return k + (k + lmb * k * (k - 1)) / (N - 1), max(0.0, k * a / (1 + a))


# ---- Fig. 2: encoders E1, E2 and projectors P1, P2 ----

RESNETS = {                                     # block, blocks a stage, width of the first stage
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet-toy": (BasicBlock, (1, 1, 1, 1), 16),  # total stride 8 instead of 32: 32 pixels leave a 4x4 map
}


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet for any number of input channels and without its classifier, names unchanged.

    Call: NxCxHxW -> Nxd, the pooled feature.  `stages`: the four stage maps, Nxd1xH/4xW/4 ... Nxd4xH/32xW/32.
    """

    def __init__(self, name, channels):
        block, depths, width = RESNETS[name]
        super().__init__(block, depths)
        del self.fc
        if name == "resnet-toy":
            self.inplanes = width
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.Identity()
            for stage, stride in enumerate((1, 2, 2, 1)):
                setattr(self, f"layer{stage + 1}", self._make_layer(block, width << stage, 1, stride))
        if channels != 3 or name == "resnet-toy":  # App. B: "the first layer is modified to fit the input channel number"
            kernel = 3 if name == "resnet-toy" else 7
            self.conv1 = nn.Conv2d(channels, width, kernel, stride=2, padding=kernel // 2, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):   # torchvision's own initialisation, for the replaced layers too
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.channels, self.dims = channels, [width * block.expansion << stage for stage in range(4)]

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
    """Sec. 4: "ResNet-50 for all scenarios".  name: a key of RESNETS.  channels: of the input.  Random weights."""
    return ResNet(name, channels)


def projector(d, widths):
    """Sec. 4, App. B: Linear, BatchNorm and ReLU for each width, for the last one Linear only; no biases.

    d: of the encoder.  widths: (8192, 8192, 8192) in the paper; () is no projector at all (Fig. 3b).
    """
    layers = []
    for width in widths:
        layers += [nn.Linear(d, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        d = width
    return nn.Sequential(*layers[:-2])          # Nxd -> NxK


class DeCUR(nn.Module):
    """Two branches that share no parameter, Fig. 2.  f1, f2: NxCxHxW -> NxK, each an encoder E and a projector P."""

    def __init__(self, backbone, channels1, channels2, widths):
        super().__init__()
        self.f1 = branch(backbone, channels1, widths)
        self.f2 = branch(backbone, channels2, widths)

    def forward(self, x11, x12, x21, x22):
        return self.f1(x11), self.f1(x12), self.f2(x21), self.f2(x22)  # NxK each, not yet normalised


def branch(backbone, channels, widths):
    f = nn.Sequential()
    f.E = resnet(backbone, channels)
    f.P = projector(f.E.dims[-1], widths)
    return f


# ---- python decur.py: both forms of the loss, side by side ----

def measure(loss, N, K, Kc, device, repeats, queue):
    """Time (s, best of `repeats`) and peak memory (bytes) of one forward and backward pass; run in a fresh process."""
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
    queue.put((min(seconds), peak(device) - before, value.item(), [g.norm().item() for g in gradient]))


def peak(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource                             # POSIX only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description="Time and peak memory of Algorithm 1's loss and of its Gram form, "
                                     "forward and backward.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="N, the global batch")
    parser.add_argument("--dims", type=int, default=8192, metavar="K", help="K, the embedding's dimensions")
    parser.add_argument("--common", type=float, default=0.875, help="fraction of common dimensions, 0 to 1")
    parser.add_argument("--repeats", type=int, default=3, help="the best time of so many counts")
    args = parser.parse_args()
    if args.batch_size < 2 or args.dims < 1 or not 0 <= args.common <= 1 or args.repeats < 1:
        parser.error("expected --batch-size >= 2, --dims >= 1, 0 <= --common <= 1 and --repeats >= 1")
    N, K, Kc = args.batch_size, args.dims, round(args.common * args.dims)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"N {N}  K {K}  Kc {Kc}  float32  {where}  torch {torch.__version__}")
    rows, spawn = [], multiprocessing.get_context("spawn")  # a process each, so that a peak is its own
    for loss in (decur_loss, decur_loss_gram):
        queue = spawn.SimpleQueue()
        process = spawn.Process(target=measure, args=(loss, N, K, Kc, device, args.repeats, queue))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{loss.__name__} ended with exit code {process.exitcode}: too little memory? Try a smaller --dims")
        rows.append(queue.get())
        print(f"{loss.__name__:16s} {rows[-1][0]:8.3f} s  {rows[-1][1] / 2**20:8.1f} MiB  loss {rows[-1][2]:.4f}")
    (time_a, memory_a, loss_a, gradient_a), (time_b, memory_b, loss_b, gradient_b) = rows
    gradient = max(abs(a - b) / a for a, b in zip(gradient_a, gradient_b))
    print(f"Gram form: {time_a / time_b:.1f} times faster, {memory_a / max(memory_b, 1):.1f} times less memory, "
          f"relative difference of the loss {abs(loss_a - loss_b) / loss_a:.1e}, of the gradients' norms {gradient:.1e}")


if __name__ == "__main__":
    main()
