"""python -m pytest -q: a few minutes on two CPU cores, no data.  Each name is a true sentence."""
import argparse
import csv
import gc
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import data
import decur
import explain
import finetune
import pretrain
from data import BadInput
from decur import BN, DeCUR, decur_loss, decur_loss_gram, loss_c, loss_u, off_diag, on_diag

HERE = Path(__file__).parent


def embeddings(N, K, dtype=torch.float64, seed=0):
    """Four correlated NxK embeddings that need gradients."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, N, K, generator=g, dtype=dtype)
    shared = draw()
    return [(shared + draw()).requires_grad_() for _ in range(4)]


def relative(a, b):
    """The norm of the difference of two lists of tensors, relative to the norm of the second."""
    a, b = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


# ---- decur.py: Eq. 1-6 and Algorithm 1 ----

def test_the_loss_block_runs_with_torch_alone():
    """What the README offers for copying: the lines between the two markers."""
    source = (HERE / "decur.py").read_text()
    block = source.split("# ---- Algorithm 1: copy from here")[1].split("# ---- to here")[0]
    names = {"torch": torch}
    exec("#" + block, names)
    z = embeddings(8, 6)
    assert names["decur_loss"](*z, 4)[0] == decur_loss(*z, 4)[0]


def test_the_loss_in_the_readme_is_the_loss():
    """Its 20 lines, run as they stand there."""
    block = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(block, names)
    z = embeddings(8, 6)
    loss = names["decur_loss"](*z, 4).item()
    assert loss == pytest.approx(decur_loss(*z, 4)[0].item(), rel=1e-12)


def test_algorithm_1_C_equals_equation_1():
    """BN's biased variance makes z.T @ z / N the correlation of Eq. 1, but for eps 1e-5."""
    zA, zB = embeddings(16, 5)[:2]
    C = BN(zA).T @ BN(zB) / 16
    a, b = zA - zA.mean(0), zB - zB.mean(0)
    for i in range(5):
        for j in range(5):
            assert abs(C[i, j] - (a[:, i] * b[:, j]).sum() / a[:, i].norm() / b[:, j].norm()) < 1e-5


def test_BN_is_batch_norm_in_training_mode():
    """Biased variance and eps as nn.BatchNorm1d(affine=False)."""
    z = embeddings(16, 5)[0]
    assert torch.allclose(BN(z), F.batch_norm(z, None, None, training=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_off_diag_is_all_but_the_diagonal(K):
    C = torch.arange(K * K).view(K, K)
    expected = [C[i, j].item() for i in range(K) for j in range(K) if i != j]
    assert off_diag(C).flatten().tolist() == expected
    assert on_diag(C).tolist() == [C[i, i].item() for i in range(K)]


def test_losses_on_a_2x2_matrix_by_hand():
    """Eq. 2: (0.5-1)^2 + 0 + r = 0.27; Eq. 3: 0.5^2 + 1^2 + r = 1.27; r = 0.1 (0.2^2 + 0.4^2)."""
    C = torch.tensor([[0.5, 0.2], [0.4, 1.0]])
    assert loss_c(C, 0.1).item() == pytest.approx(0.27)
    assert loss_u(C, 0.1).item() == pytest.approx(1.27)


def test_the_loss_is_the_plain_sum_of_equation_6():
    z = embeddings(9, 7)
    loss, parts = decur_loss(*z, 4)
    terms = [parts[name].item() for name in ("L1", "L2", "Lc", "Lu")]
    assert loss.item() == pytest.approx(sum(terms))
    assert not any(part.requires_grad for part in parts.values())


def test_identical_views_have_zero_diagonal_loss():
    """All C_ii of C1, C2 and Cc are 1 (but for eps), and the unique diagonal is 1, its worst."""
    z = embeddings(32, 6)[0]
    loss, parts = decur_loss(z, z, z, z, 4, lmb1=0, lmb2=0, lmbc=0, lmbu=0)
    assert all(parts[name] < 1e-8 for name in ("L1", "L2", "Lc"))
    assert parts["Lu"].item() == pytest.approx(2, abs=1e-4)


def test_chance_loss_matches_theory():
    """Independent embeddings: mean of 800 draws within 1 % of decur.chance_and_floor."""
    N, K, Kc = 24, 40, 30
    sums = torch.zeros(4)
    for seed in range(800):
        g = torch.Generator().manual_seed(seed)
        _, parts = decur_loss(*(torch.randn(N, K, generator=g) for _ in range(4)), Kc)
        sums += torch.tensor([parts[name] for name in ("L1", "L2", "Lc", "Lu")])
    blocks = (K, 0), (K, 0), (Kc, 0), (K - Kc, 1)
    chance = [decur.chance_and_floor(N, k, unique=u)[0] for k, u in blocks]
    assert torch.allclose(sums / 800, torch.tensor(chance), rtol=0.01)


def test_no_loss_beats_the_rank_floor():
    """8 samples cannot decorrelate K = 64 dimensions; loss_c's optimum over z meets the bound."""
    N, K = 8, 64
    floor = decur.chance_and_floor(N, K)[1]
    g = torch.Generator().manual_seed(0)
    z = torch.randn(N, K, dtype=torch.float64, generator=g).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=500, line_search_fn="strong_wolfe")
    loss = lambda: loss_c(BN(z).T @ BN(z) / N, 0.0051)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value
    optimizer.step(closure)
    assert floor <= loss() < 1.2 * floor
    values = [decur.chance_and_floor(256, k)[i] for k in (8192, 7168) for i in (0, 1)]
    assert [round(value) for value in values] == [9566, 1122, 8224, 871]


def test_Kc_equal_K_is_cross_modal_barlow_twins():
    """Table 4 "w/o intra & decoup.": only Eq. 2, over all dimensions."""
    z = embeddings(9, 7)
    loss, parts = decur_loss(*z, 7, intra=False)
    assert loss == loss_c(BN(z[0]).T @ BN(z[2]) / 9, 0.0051)
    assert sorted(parts) == ["Cc", "Lc"]


def test_affine_change_of_z_changes_nothing():
    """BN inside the loss: a dimension's scale (of any sign, one for all) and shift do nothing."""
    z = [z_.detach() * 10 for z_ in embeddings(16, 6)]  # large, so that eps does not matter
    scale, shift = torch.tensor([3.0, -2, 5, 1, 7, -4]), torch.arange(6.0)
    changed = decur_loss(*(z_ * scale + shift for z_ in z), 4)[0]
    assert changed.item() == pytest.approx(decur_loss(*z, 4)[0].item(), rel=1e-5)


def test_common_by_unique_blocks_are_free():
    """A unique dimension of modality 1 equal to a common one of 2 costs nothing across the two."""
    z11, _, z21, _ = (z_.detach() for z_ in embeddings(16, 6))
    before = decur_loss(z11, z11, z21, z21, 4)[1]
    z11[:, 5] = z21[:, 0]
    z11[:, 4] = BN(z11)[:, 4]
    after = decur_loss(z11, z11, z21, z21, 4)[1]
    assert after["Lc"] == before["Lc"]
    Cu = (BN(z11).T @ BN(z21) / 16)[4:, 4:]
    assert after["Lu"].item() == pytest.approx(loss_u(Cu, 0.0051).item())


@pytest.mark.parametrize("N, K, Kc, intra", [
    (16, 64, 48, True), (7, 13, 5, True), (7, 13, 5, False), (16, 32, 0, True), (16, 32, 32, True),
    (16, 32, 32, False), (16, 32, 0, False), (33, 8, 6, True), (5, 1, 1, True), (5, 2, 1, True)])
def test_the_gram_form_is_algorithm_1(N, K, Kc, intra):
    """Same value, parts, gradients in float64: N below, above K, empty blocks, unequal lambdas."""
    z, results = embeddings(N, K), []
    for form in (decur_loss, decur_loss_gram):
        loss, parts = form(*z, Kc, 0.01, 0.02, 0.03, 0.04, intra=intra)
        gradient = torch.autograd.grad(loss, z, allow_unused=True)
        results.append((loss, parts, [g for g in gradient if g is not None]))
    (loss_a, parts_a, gradient_a), (loss_b, parts_b, gradient_b) = results
    assert list(parts_a) == list(parts_b)
    assert all(torch.isfinite(part) for part in parts_b.values())
    assert relative([loss_b, *parts_b.values()], [loss_a, *parts_a.values()]) < 1e-12
    assert relative(gradient_b, gradient_a) < 1e-12


def test_the_gram_form_keeps_no_KxK_matrix():
    """Nothing saved for the backward pass is larger than NxK."""
    sizes = []
    saved = lambda t: (sizes.append(t.numel()), t)[1]
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        decur_loss_gram(*embeddings(8, 512), 384)
    assert max(sizes) <= 8 * 512


@pytest.mark.parametrize("form", [decur_loss, decur_loss_gram])
def test_more_common_dimensions_than_dimensions_are_an_error(form):
    with pytest.raises(ValueError, match="Kc = 9 common dimensions of K = 8"):
        form(*embeddings(4, 8), 9)


# ---- decur.py: Fig. 2 ----

def test_projectors_share_no_parameter():
    """P1 and P2, E1 and E2: two of each (the authors' code wrapped one list of layers twice)."""
    net = DeCUR("resnet-toy", 3, 1, [16, 16, 16])
    storages = [{p.data_ptr() for p in f.parameters()} for f in (net.f1, net.f2)]
    assert not storages[0] & storages[1] and all(storages)


def test_the_projector_is_that_of_section_4():
    """Linear-BN-ReLU twice, then Linear; no biases; 151 M parameters for a ResNet-50."""
    names = [type(layer).__name__ for layer in decur.projector(8, [4, 4, 6])]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    parameters = sum(p.numel() for p in decur.projector(8, [4, 4, 6]).parameters())
    assert parameters == 8 * 4 + 8 + 4 * 4 + 8 + 4 * 6
    x = torch.randn(2, 8)
    assert decur.projector(8, [])(x) is x       # Fig. 3b, no projector


@pytest.mark.parametrize("name, channels", [("resnet18", 2), ("resnet50", 13), ("resnet50", 3)])
def test_encoders_have_torchvision_names_and_any_number_of_channels(name, channels):
    encoder = decur.resnet(name, channels)
    reference = getattr(torchvision.models, name)(weights=None)
    reference.conv1 = torch.nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    missing, unexpected = reference.load_state_dict(encoder.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    reference.fc = torch.nn.Identity()
    x = torch.randn(2, channels, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(x), reference.eval()(x))
        assert [m.shape[1] for m in encoder.stages(x)] == encoder.dims


def test_the_toy_encoder_leaves_a_4x4_map_of_32_pixels():
    encoder = decur.resnet("resnet-toy", 2)
    assert encoder.stages(torch.randn(2, 2, 32, 32))[-1].shape == (2, 128, 4, 4)


# ---- Tables 1-3: the methods that DeCUR is compared with ----

def two_views(scale=1.0):
    return [scale * z.detach() for z in embeddings(6, 5)[:2]]  # NxK, float64


def cosine(a, b):
    """The similarity of two lists of numbers."""
    lengths = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b)) / lengths


def test_barlow_twins_is_its_equations_1_and_2():
    """Zbontar et al. 2021, Eq. 1-2 (as DeCUR's Eq. 1 and 2), one element at a time."""
    zA, zB = two_views(scale=1000)              # so large that BN's eps, not in Eq. 1, is little
    a, b = (zA - zA.mean(0)).tolist(), (zB - zB.mean(0)).tolist()
    N, K, loss = len(a), len(a[0]), 0
    for i in range(K):
        for j in range(K):
            dot = sum(a[n][i] * b[n][j] for n in range(N))
            lengths = math.sqrt(sum(row[i] ** 2 for row in a) * sum(row[j] ** 2 for row in b))
            loss += (1 - dot / lengths) ** 2 if i == j else 0.0051 * (dot / lengths) ** 2
    assert math.isclose(decur.barlow_twins_loss(zA, zB).item(), loss, rel_tol=1e-9)


def test_barlow_twins_is_decur_without_intra_and_without_unique():
    """Table 4, "w/o intra&decoup.": "a cross-modal Barlow Twins remains"."""
    zA, zB = two_views()
    expected = decur.barlow_twins_loss(zA, zB)
    for loss in (decur.decur_loss, decur.decur_loss_gram):
        assert torch.allclose(loss(zA, zA, zB, zB, Kc=5, intra=False)[0], expected, rtol=1e-12)


def test_vicreg_is_its_equations_1_to_6():
    """Bardes et al. 2022, Eq. 1-6, by element; Eq. 5 a mean of dimensions, as its Algorithm 1."""
    zA, zB = two_views(scale=0.7)
    N, K = zA.shape
    s = sum((zA[n, i] - zB[n, i]).item() ** 2 for n in range(N) for i in range(K)) / (N * K)
    v = c = 0
    for z in (zA.tolist(), zB.tolist()):
        mean = [sum(z[n][i] for n in range(N)) / N for i in range(K)]
        for i in range(K):
            for j in range(K):
                cov = sum((z[n][i] - mean[i]) * (z[n][j] - mean[j]) for n in range(N)) / (N - 1)
                if i == j:
                    v += max(0, 1 - math.sqrt(cov + 1e-4)) / K
                else:
                    c += cov ** 2 / K
    assert v > 0.1                              # the hinge takes part
    assert math.isclose(decur.vicreg_loss(zA, zB).item(), 25 * s + 25 * v + 1 * c, rel_tol=1e-12)


def test_simclr_is_its_equation_1():
    """Chen et al. 2020, Eq. 1: of the other 2N - 1 embeddings the partner is the right one."""
    zA, zB = two_views()
    z, N = torch.cat((zA, zB)).tolist(), len(zA)
    s = [[cosine(a, b) for b in z] for a in z]
    loss = 0
    for i in range(2 * N):
        total = sum(math.exp(s[i][k] / 0.1) for k in range(2 * N) if k != i)
        loss -= math.log(math.exp(s[i][(i + N) % (2 * N)] / 0.1) / total) / (2 * N)
    assert math.isclose(decur.simclr_loss(zA, zB).item(), loss, rel_tol=1e-12)


def test_clip_is_its_figure_3():
    """Radford et al. 2021, Fig. 3: of the other modality's N the partner is right, both ways."""
    zA, zB = two_views()
    a, b, N = zA.tolist(), zB.tolist(), len(zA)
    e = [[math.exp(cosine(p, q) / 0.07) for q in b] for p in a]
    rows = [math.log(e[i][i] / sum(e[i])) for i in range(N)]
    columns = [math.log(e[i][i] / sum(row[i] for row in e)) for i in range(N)]
    loss = -(sum(rows) + sum(columns)) / 2 / N
    assert math.isclose(decur.clip_loss(zA, zB).item(), loss, rel_tol=1e-12)


def test_methods_ignore_what_their_papers_say_they_ignore():
    """Barlow Twins an affine change per dimension, VICReg a shift, the others lengths, rotation."""
    zA, zB = two_views(scale=1000)
    per_dimension, per_sample = torch.arange(1, 6).double(), torch.arange(1, 7).double()[:, None]
    g = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=g))[0]
    same = lambda loss, a, b: torch.allclose(loss(a, b), loss(zA, zB), rtol=1e-6)
    assert same(decur.barlow_twins_loss, zA * per_dimension - 3, zB / per_dimension + 7)
    assert same(decur.vicreg_loss, zA + per_dimension, zB + per_dimension)
    assert not same(decur.vicreg_loss, zA * 2, zB * 2)
    for loss in (decur.simclr_loss, decur.clip_loss):
        assert same(loss, zA * per_sample, zB)
        assert same(loss, zA @ rotation, zB @ rotation)
        assert not same(loss, zA + per_dimension * 1000, zB)
    for loss in (decur.barlow_twins_loss, decur.vicreg_loss, decur.simclr_loss, decur.clip_loss):
        assert same(loss, zB, zA), f"{loss.__name__} is not symmetric"
        assert same(loss, zA.flip(0), zB.flip(0)), f"{loss.__name__} knows the order of the batch"
        assert not same(loss, zA, zB.flip(0)), f"{loss.__name__} does not know the pairs"


def test_chance_of_contrastive_losses():
    """Equal embeddings say nothing: SimCLR guesses one of 2N - 1, CLIP one of N."""
    z = torch.ones(8, 3)
    assert math.isclose(decur.simclr_loss(z, z).item(), math.log(15), rel_tol=1e-6)
    assert math.isclose(decur.clip_loss(z, z).item(), math.log(8), rel_tol=1e-6)


# ---- Sec. 4: SegFormer's encoders ----

def test_mit_has_the_published_number_of_parameters():
    """Without the classifier."""
    published = {"mit_b0": 3319392, "mit_b1": 13151424, "mit_b2": 24196288,
                 "mit_b3": 44072128, "mit_b4": 60842688, "mit_b5": 81443008}
    with torch.device("meta"):                  # no memory, no time
        encoders = {name: decur.mit(name, 3) for name in decur.MITS}
    sizes = {name: sum(p.numel() for p in E.parameters()) for name, E in encoders.items()}
    assert sizes == published


def mit_keys(depths):
    """The names in a published mit_b*.pth but its classifier's, from their grammar."""
    keys = []
    for S, depth in enumerate(depths, 1):
        keys += [f"patch_embed{S}.proj", f"patch_embed{S}.norm", f"norm{S}"]
        names = "norm1 norm2 attn.q attn.kv attn.proj mlp.fc1 mlp.fc2 mlp.dwconv.dwconv".split()
        names += ["attn.sr", "attn.norm"] * (S < 4)
        keys += [f"block{S}.{n}.{name}" for n in range(depth) for name in names]
    return {f"{key}.{kind}" for key in keys for kind in ("weight", "bias")}


def test_mit_has_the_published_names():
    """Only so do mit_b*.pth load here, and ours in CMX."""
    with torch.device("meta"):
        for name, (_, depths) in decur.MITS.items():
            assert decur.mit(name, 3).state_dict().keys() == mit_keys(depths)
    assert len(mit_keys((2, 2, 2, 2))) == 2 * (4 * 3 + 8 * 8 + 6 * 2)  # stages, blocks, reductions


def test_mit_starts_as_published():
    """Linear weights of std 0.02, convolutions' sqrt(2 / fan_out), biases 0; norms of two eps."""
    torch.manual_seed(0)
    E = decur.mit("mit_b0", 3)
    assert E.block4[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    conv, depthwise = E.patch_embed4.proj, E.block4[0].mlp.dwconv.dwconv
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    assert all(p.abs().max() == 0 for name, p in E.named_parameters() if name.endswith("bias"))
    eps = {name: m.eps for name, m in E.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    for name, value in eps.items():
        assert value == (1e-5 if "embed" in name or "attn" in name else 1e-6), name


def test_mit_has_four_stages_at_any_size():
    """Strides 4, 2, 2, 2: a side n becomes (n - 1) // stride + 1, equal, divisible or not."""
    E = decur.mit("mit_b0", 5).eval()
    x = torch.randn(2, 5, 70, 50)
    maps = E.stages(x)
    shapes = [(2, 32, 18, 13), (2, 64, 9, 7), (2, 160, 5, 4), (2, 256, 3, 2)]
    assert [tuple(m.shape) for m in maps] == shapes
    assert (E.dims[-1], E.channels) == (256, 5)
    assert torch.allclose(E(x), maps[-1].mean((2, 3)))
    assert all(abs(m.mean(1)).max() < 1e-5 for m in maps)  # a fresh layer norm leaves mean 0


def test_attention_of_mit_by_hand():
    """SegFormer Eq. 1: softmax(q k / sqrt(C / heads)) v, head by head, k and v of a reduced map."""
    torch.manual_seed(0)
    attention = decur.Attention(C=4, heads=2, R=2).double()
    x = torch.randn(1, 4, 6, 4, dtype=torch.float64)
    y = attention.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # 4x6 -> 2x3 tokens
    y = attention.norm(y)[0].reshape(6, 4)
    q, kv = attention.q(x)[0].reshape(24, 4), attention.kv(y)
    out = torch.zeros(24, 4, dtype=torch.float64)
    for head in (slice(0, 2), slice(2, 4)):
        k, v = kv[:, :4][:, head], kv[:, 4:][:, head]  # the first C values are k, the others v
        for n in range(24):
            weight = torch.stack([(q[n, head] @ k[m] / math.sqrt(2)).exp() for m in range(6)])
            out[n, head] = (weight / weight.sum()) @ v
    assert torch.allclose(attention(x), attention.proj(out).view(1, 4, 6, 4))


def test_drop_path_grows_with_depth_and_drops_a_branch_of_a_sample_whole():
    """0 for the first block to 0.1 for the last; what is kept is divided by its probability."""
    torch.manual_seed(0)
    E = decur.mit("mit_b0", 3)
    drops = [block.drop for S in "1234" for block in getattr(E, f"block{S}")]
    assert torch.allclose(torch.tensor(drops), torch.arange(8) / 70)
    block, x = E.block4[1], torch.randn(64, 2, 2, 256)
    block.drop, block.norm2, block.mlp = 0.5, nn.Identity(), nn.Identity()  # y + y / 0.5 or y
    with torch.no_grad():
        attended, out = x + block.attn(block.norm1(x)) / 0.5, block.train()(x)
        cases = [y[n] * f for n in range(64) for y in (x, attended) for f in (1, 3)]
        equal = lambda n, c: torch.allclose(out[n], cases[4 * n + c], atol=1e-5)
        case = [[equal(n, c) for c in range(4)].index(True) for n in range(64)]
        assert set(case) == {0, 1, 2, 3}        # by sample, and by branch
        assert torch.allclose(block.eval()(x), 2 * (x + block.attn(block.norm1(x))), atol=1e-5)


# ---- weights in and out ----

def backbone_1_and_2(E1, E2, module="module."):
    """A file of the authors: two backbones, projectors, the loss's batch norm, one prefix."""
    state = {**{f"backbone_1.{k}": v for k, v in E1.state_dict().items()},
             **{f"backbone_2.{k}": v for k, v in E2.state_dict().items()},
             "projector1.0.weight": torch.zeros(4, 4), "projector2.0.weight": torch.zeros(4, 4),
             "bn.running_mean": torch.zeros(4), "bn.num_batches_tracked": torch.tensor(3)}
    return {module + k: v for k, v in state.items()}


def same_weights(A, B):
    tensors = zip(A.state_dict().values(), B.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in tensors)


def test_weights_of_every_kind_load(tmp_path):
    """Ours, torchvision's, SegFormer's, the authors': one encoder or both in a file."""
    model = decur.DeCUR("resnet-toy", 2, 13, (8, 8))
    E1, E2 = model.f1.E, model.f2.E
    mit = decur.mit("mit_b0", 3)
    head = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    fc = {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}
    one = {"ours": E1.state_dict(), "torchvision": {**E1.state_dict(), **fc},
           "old torchvision": {k: v for k, v in E1.state_dict().items() if "num_batches" not in k},
           "the authors' alone": {f"module.backbone_1.{k}": v for k, v in E1.state_dict().items()},
           "the authors' alone, flat": {"model": {**E1.state_dict(), **fc}}}
    both = {"ours": {"model": model.state_dict(), "epoch": 3, "args": {"method": "decur"}},
            "the authors'": {"model": backbone_1_and_2(E1, E2), "epoch": 99,
                             "optimizer": {"state": {}}},
            "the authors', flat": backbone_1_and_2(E1, E2, module="")}
    for kind, state in one.items():
        torch.save(state, tmp_path / "file.pth")
        states = decur.read_weights(tmp_path / "file.pth", "resnet-toy")
        assert len(states) == 1, kind
        fresh = decur.resnet("resnet-toy", 2)
        report = decur.load_encoder(fresh, states[0])
        assert same_weights(fresh, E1), kind
        has_fc = "fc.bias" in states[0]
        assert report.endswith("2 unexpected: fc.weight fc.bias") == has_fc, report
    for kind, state in both.items():
        torch.save(state, tmp_path / "file.pth")
        states = decur.read_weights(tmp_path / "file.pth", "resnet-toy")
        assert len(states) == 2, kind
        for state, E in zip(states, (E1, E2)):
            fresh = decur.resnet("resnet-toy", E.channels)
            assert "keys matched" in decur.load_encoder(fresh, state)
            assert same_weights(fresh, E), kind
    for state in ({**mit.state_dict(), **head}, {"state_dict": {**mit.state_dict(), **head}}):
        torch.save(state, tmp_path / "mit_b0.pth")
        fresh = decur.mit("mit_b0", 3)
        report = decur.load_encoder(fresh, *decur.read_weights(tmp_path / "mit_b0.pth", "mit_b0"))
        assert report == "176 of 176 keys matched, 2 unexpected: head.weight head.bias"
        assert same_weights(fresh, mit)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """Other channels, another backbone, something over or missing: an error, nothing loaded."""
    E = decur.resnet("resnet-toy", 3)
    before = {k: v.clone() for k, v in E.state_dict().items()}
    good = decur.resnet("resnet-toy", 3).state_dict()
    missing = {k: v for k, v in good.items() if k != "layer4.0.bn2.bias"}
    for state, words in (
            (decur.resnet("resnet-toy", 13).state_dict(), "13 input channels, this encoder 3"),
            (decur.resnet("resnet18", 3).state_dict(), "of another shape"),
            (decur.mit("mit_b0", 3).state_dict(), "missing: conv1.weight"),
            (missing, "1 missing: layer4.0.bn2.bias"),
            ({**good, "da1_l3.proj.weight": torch.zeros(2)}, "1 unexpected: da1_l3.proj.weight")):
        with pytest.raises(ValueError, match=words):
            decur.load_encoder(E, state)
    assert all(torch.equal(v, before[k]) for k, v in E.state_dict().items())
    joint = backbone_1_and_2(E, E)
    joint["module.da1_l3.proj.weight"] = torch.zeros(2)  # the authors' deformable attention
    torch.save({"model": joint}, tmp_path / "rda.pth")
    for state in decur.read_weights(tmp_path / "rda.pth", "resnet-toy"):
        with pytest.raises(ValueError, match="1 unexpected: da1_l3.proj.weight"):
            decur.load_encoder(E, state)


def test_files_that_could_run_code_are_refused(tmp_path):
    """weights_only=True: tensors and plain values, no other objects; the message is one line."""
    torch.save({"model": {}, "args": argparse.Namespace(lr=0.2)}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights at all")
    for name, words in (("code.pth", "could run code"), ("text.pth", "could run code"),
                        ("list.pth", "a list")):
        with pytest.raises(ValueError, match=words) as error:
            decur.read_weights(tmp_path / name, "resnet-toy")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no ImageNet weights for mit_b2"):
        decur.read_weights("imagenet", "mit_b2")


def test_imagenet_weights_are_torchvisions_own_download(monkeypatch):
    """As tensors alone, with its checksum; without a network the message says where it is."""
    def download(url, **kwargs):
        assert kwargs["weights_only"] and kwargs["check_hash"] and "resnet18" in url
        return torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    states = decur.read_weights("imagenet", "resnet18")
    report = decur.load_encoder(decur.resnet("resnet18", 3), *states)
    assert report == "120 of 120 keys matched, 2 unexpected: fc.weight fc.bias"

    def no_network(url, **kwargs):
        raise urllib.error.URLError("unreachable")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match="no https://.*resnet18.*pth .*unreachable"):
        decur.read_weights("imagenet", "resnet18")


def test_bgr_weights_are_turned_around():
    """With OpenCV the authors' first channel is blue; only the first convolution cares."""
    for make, name in ((decur.resnet, "resnet-toy"), (decur.mit, "mit_b0")):
        theirs, ours = make(name, 3).eval(), make(name, 3).eval()
        report = decur.load_encoder(ours, theirs.state_dict(), bgr=True)
        assert report.endswith("input channels reversed")
        rgb = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.allclose(ours(rgb), theirs(rgb.flip(1)), atol=1e-5)
            assert not torch.allclose(ours(rgb), theirs(rgb), atol=1e-3)
    with pytest.raises(ValueError, match="13 input channels: expected 3"):
        E = decur.resnet("resnet-toy", 13)
        decur.load_encoder(E, E.state_dict(), bgr=True)


# ---- processes: the loss and its gradient are those of one process with the joint batch ----

def process(rank, world, folder, function, *args):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    torch.save(function(rank, world, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_processes(world, folder, function, *args):
    """function(rank, world, *args) of each of `world` gloo processes, as a list.

    All come from one server that has imported what they need, where there are such servers.
    """
    folder.mkdir()
    multiprocessing.set_forkserver_preload(["test_decur"])
    servers = "forkserver" in multiprocessing.get_all_start_methods()
    torch.multiprocessing.start_processes(process, (world, folder, function, *args), nprocs=world,
                                          start_method="forkserver" if servers else "spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def losses_and_gradients(rank, world):
    """Of DeCUR and of all that it is compared with: {name: [loss, gradient of each view]}."""
    results = {}
    for name, (loss_of, _) in pretrain.METHODS.items():
        joint = embeddings(16, 24, torch.float32)
        z = [z_.detach().chunk(world)[rank].requires_grad_() for z_ in joint]
        z = z if name == "decur" else z[:2]
        gathered = list(map(pretrain.gather, z))
        loss = loss_of(*gathered, 18)[0] if name == "decur" else loss_of(*gathered)
        loss.backward()
        results[name] = [loss.detach(), *(z_.grad / world for z_ in z)]  # DDP averages: / world
    return results


def three_steps(rank, world):
    """Two branches' parameters after three LARS steps and before, batch norm in evaluation mode."""
    torch.manual_seed(0)
    net = DeCUR("resnet-toy", 3, 1, [16, 16])
    net.eval()
    before = [p.detach().clone() for p in net.parameters()]
    model = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    groups = [dict(params=[p for p in net.parameters() if p.ndim > 1], lr=0.2),
              dict(params=[p for p in net.parameters() if p.ndim <= 1], lr=0.0048)]
    optimizer = pretrain.LARS(groups)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    draws = data.Draws(0, 8, rows)
    for step in range(3):
        draws.restart(step)
        g = torch.Generator().manual_seed(step)
        x1, x2 = (torch.rand(8, C, 36, 48, generator=g)[rows] for C in (3, 1))
        views = (x1, "rgb"), (x1, "rgb"), (x2, "depth"), (x2, "depth")
        x = [data.augment(x_, m, 32, draws) for x_, m in views]
        loss, _ = decur_loss_gram(*map(pretrain.gather, model(*x)), 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()], before


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_give_the_one_process_gradient(world, tmp_path):
    """gather, of all methods: an in-place all_reduce of C, as published, would give 1/world."""
    several = in_processes(world, tmp_path / "w", losses_and_gradients)
    for name, one in losses_and_gradients(0, 1).items():
        assert all(relative([rank[name][0]], [one[0]]) < 1e-6 for rank in several), name
        for view in range(1, len(one)):
            joint = torch.cat([rank[name][view] for rank in several])
            assert relative([joint], [one[view]]) < 1e-6, name


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_make_the_one_process_steps(world, tmp_path):
    """Augmentation, gather, DDP and LARS together; a gradient of 1/world would move biases less."""
    one, before = three_steps(0, 1)
    for rank, _ in in_processes(world, tmp_path / "w", three_steps):
        assert relative(rank, one) < 1e-6
        for ndim in (1, 2, 4):                  # biases and batch norm, Linear, convolutions
            moved = [[p - p0 for p, p0 in zip(after, before) if p.ndim == ndim]
                     for after in (rank, one)]
            assert relative(*moved) < 1e-4


def resumed(rank, world, folders):
    """What a process is told that looks for the checkpoint in its own of the folders."""
    net = nn.Linear(1, 1)
    try:
        return pretrain.go_on(folders[rank] / "checkpoint.pt", {}, net,
                              torch.optim.SGD(net.parameters()), True, "cpu")
    except BadInput as error:
        return str(error)


def test_processes_that_do_not_see_one_checkpoint_are_refused(tmp_path):
    """Else one would go on from step 3 and the other, on another machine's disk, start anew."""
    net, here, nowhere = nn.Linear(1, 1), tmp_path, tmp_path / "nowhere"
    pretrain.save_checkpoint(here / "checkpoint.pt", net, torch.optim.SGD(net.parameters()), 3, {})
    assert in_processes(2, tmp_path / "same", resumed, [here, here]) == [3, 3]
    for words in in_processes(2, tmp_path / "apart", resumed, [here, nowhere]):
        assert "is at step 3 for one process, at 0 for another" in words


# ---- pretrain.py: App. B ----

def test_lars_step_by_hand():
    """|p| = 5, |g| = 10, no decay: trust = 0.001 * 5 / 10; step 2 adds 0.9 of the first."""
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = pretrain.LARS([p], lr=2.0, weight_decay=0.0)
    p.grad = torch.tensor([[6.0, 8.0]])
    optimizer.step()
    assert torch.allclose(p, torch.tensor([[3 - 2 * 0.003, 4 - 2 * 0.004]]))
    before = p.detach().clone()
    optimizer.step()                            # trust * g = 0.001 |p| g / |g|, |p| = 4.99
    first, second = torch.tensor([[0.003, 0.004]]), torch.tensor([[0.002994, 0.003992]])
    assert torch.allclose(before - p, 2 * (second + 0.9 * first))


def test_lars_decays_weights_but_not_biases():
    """wd 0.5, gradient 0: direction 0.5 p, trust 0.001 |p| / |0.5 p| = 0.002; biases stay."""
    w, b = torch.nn.Parameter(torch.full((2, 2), 2.0)), torch.nn.Parameter(torch.full((2,), 2.0))
    w.grad, b.grad = torch.zeros(2, 2), torch.zeros(2)
    pretrain.LARS([w, b], lr=1.0, weight_decay=0.5).step()
    assert torch.allclose(w, torch.full((2, 2), 2 - 0.002))
    assert torch.equal(b, torch.full((2,), 2.0))


def test_lars_ignores_loss_scale_biases_do_not():
    """Ten times the gradient: the same step of a weight, ten times the step of a bias."""
    steps = []
    for scale in (1, 10):
        w, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
        w.grad, b.grad = scale * torch.tensor([[1.0, 2], [3, 4]]), scale * torch.tensor([1.0, 2])
        pretrain.LARS([w, b], lr=0.1, weight_decay=0.0).step()
        steps.append((1 - w.detach(), 1 - b.detach()))
    assert torch.allclose(steps[0][0], steps[1][0])
    assert torch.allclose(10 * steps[0][1], steps[1][1])


def test_lars_moves_a_weight_of_norm_zero():
    w = torch.nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    pretrain.LARS([w], lr=0.1).step()
    assert torch.allclose(w, torch.full((2, 2), -0.1))


def test_schedule_has_no_warmup_and_ends_at_zero():
    rates = [pretrain.cosine(step, 10) for step in range(11)]
    assert rates[0] == 1 and rates[5] == pytest.approx(0.5) and rates[10] == 0
    assert rates == sorted(rates, reverse=True)


def test_defaults_are_the_papers():
    """Sec. 4 and App. B, every scenario."""
    for scenario, common, epochs, batch in (
            ("sar-optical", 0.875, 100, 256), ("rgb-dem", 0.75, 100, 256),
            ("rgbd", 0.75, 200, 128)):
        args, sources = pretrain.get_args(["--scenario", scenario])
        assert (args.common, args.epochs, args.batch_size) == (common, epochs, batch)
        assert (args.lr, args.lr_bias, args.weight_decay, args.size) == (0.2, 0.0048, 1e-6, 224)
        assert (args.backbone, args.widths) == ("resnet50", [8192] * 3)
        assert sources["common"] == "paper, Sec. 4" and sources["seed"] == "default"
        assert args.data == f"data/{scenario}"
    assert pretrain.get_args(["--scenario", "rgbd", "--common", "0"])[1]["common"] == "command line"


# ---- data.py: order, augmentation, readers, scenes ----

def test_the_data_order_is_a_function_of_seed_and_epoch():
    """Every index at most once an epoch, whole batches only, another order in another epoch."""
    batches = data.epoch_batches(50, 8, seed=3, epoch=1)
    assert batches.shape == (6, 8) and len(set(batches.flatten())) == 48
    assert (batches == data.epoch_batches(50, 8, 3, 1)).all()
    assert (batches != data.epoch_batches(50, 8, 3, 2)).any()
    assert (batches != data.epoch_batches(50, 8, 4, 1)).any()


def test_augmentation_does_not_depend_on_the_processes():
    """Two processes with half the batch each make the views of one process with all of it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (8, 3, 36, 48), dtype=torch.uint8, generator=g)
    views = []
    for rows in (slice(0, 8), slice(0, 4), slice(4, 8)):
        draws = data.Draws(1, 8, rows)
        draws.restart(5)
        views.append([data.augment(x[rows], "rgb", 24, draws) for _ in range(2)])
    for view in range(2):
        joined = torch.cat([views[1][view], views[2][view]])
        assert torch.allclose(joined, views[0][view], atol=1e-5)
    assert not torch.allclose(views[0][0], views[0][1], atol=0.1)  # two views differ


def test_the_crop_is_an_antialiased_resize_of_a_box():
    """As F.interpolate(antialias=True) has it, boxes smaller and larger than the crop."""
    x = torch.rand(3, 2, 40, 50, generator=torch.Generator().manual_seed(0))
    left, w = torch.tensor([[3.0], [0], [5]]), torch.tensor([[20.0], [50], [11]])
    top, h = torch.tensor([[0.0], [7], [29]]), torch.tensor([[40.0], [10], [11]])
    Wy, Wx = data.triangle_filter(top, h, 40, 16), data.triangle_filter(left, w, 50, 16)
    y = data.separable(x, Wy, Wx)
    for i in range(3):
        box = x[i:i + 1, :, int(top[i]):int(top[i] + h[i]), int(left[i]):int(left[i] + w[i])]
        expected = F.interpolate(box, (16, 16), mode="bilinear", antialias=True)
        assert torch.allclose(y[i:i + 1], expected, atol=1e-5)


def test_crops_cover_the_areas_and_ratios_asked_for_and_half_are_flipped():
    """Ramps in x and y show each box: its sides from the slope, its flip from the sign."""
    B, H, W = 400, 60, 80
    ramp = torch.stack([torch.arange(W).expand(H, W), torch.arange(H)[:, None].expand(H, W)])
    ramp = ramp.float().expand(B, 2, H, W)
    draws = data.Draws(0, B, slice(0, B))
    draws.restart(0)
    y = data.random_resized_crop(ramp, 10, (0.25, 0.5), draws)
    w = (y[:, 0, 5, 7] - y[:, 0, 5, 2]) * 2     # 5 of 10 pixels apart
    h = (y[:, 1, 7, 5] - y[:, 1, 2, 5]) * 2
    area, ratio = (w.abs() * h) / (H * W), w.abs() / h
    assert 0.24 < area.min() < 0.27 and 0.48 < area.max() < 0.51
    assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.37
    assert 0.4 < (w < 0).float().mean() < 0.6


def test_a_box_that_never_fits_becomes_the_largest_centred_one():
    """A strip of 8 x 100 has no box of its whole area within 3/4 and 4/3: 8 x 11 in the middle."""
    x = torch.arange(100.0).expand(1, 1, 8, 100)
    draws = data.Draws(0, 1, slice(0, 1))
    draws.restart(0)
    y = data.random_resized_crop(x, 11, (1.0, 1.0), draws)
    assert sorted(y[0, 0, 0].round().int().tolist()) == list(range(44, 55))


def test_colours_stay_within_range_and_never_wrap():
    """The authors' uint8 arithmetic wrapped bright pixels to dark: 230 * 1.4 -> 66."""
    x = torch.full((64, 3, 4, 4), 230 / 255)
    draws = data.Draws(0, 64, slice(0, 64))
    draws.restart(0)
    y = data.random_colour(x, (0.4, 0.0, 0.0, 0.0), 1.0, 0.0, draws)
    assert y.min() > 0.5 and y.max() == 1


def test_brightness_contrast_and_saturation_are_torchvisions():
    """One at a time, factors read off a probe image, away from the clamp; float32."""
    from torchvision.transforms.v2 import functional as TF
    x = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    for k, function in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)):
        jitter = [0.0] * 4
        jitter[k] = 0.4
        draws, same = data.Draws(0, 8, slice(0, 8)), data.Draws(0, 8, slice(0, 8))
        draws.restart(k), same.restart(k)
        factors = 1 + 0.4 * (2 * same(6)[:, 1 + k] - 1)
        y = data.random_colour(x, jitter, 1.0, 0.0, draws)
        expected = torch.stack([function(x_, factor.item()) for x_, factor in zip(x, factors)])
        assert torch.allclose(y, expected, atol=2e-3)


def test_grayscale_makes_channels_equal_for_any_number_of_them():
    draws = data.Draws(0, 4, slice(0, 4))
    draws.restart(0)
    for C in (2, 3, 13):
        x = torch.rand(4, C, 5, 5)
        y = data.random_colour(x, (0.0,) * 4, 0.0, 1.0, draws)
        assert torch.allclose(y, y[:, :1].expand_as(y), atol=1e-6)
        assert C == 3 or torch.allclose(y[:, 0], x.mean(1), atol=1e-6)


def test_hue_turns_red_into_green_into_blue_and_keeps_grey():
    third = data.hue_rotation(torch.tensor([2 * np.pi / 3]))[0]
    assert torch.allclose(third @ torch.eye(3), torch.eye(3).roll(1, 0), atol=1e-6)
    grey = data.hue_rotation(torch.tensor([0.7]))[0] @ torch.ones(3)
    assert torch.allclose(grey, torch.ones(3), atol=1e-6)


def test_blur_keeps_constants_and_touches_only_the_images_that_draw_it():
    draws = data.Draws(0, 40, slice(0, 40))
    draws.restart(0)
    x = torch.rand(40, 1, 56, 56, generator=torch.Generator().manual_seed(0))
    x[:, :, :28] = 0.5
    y = data.random_blur(x, 0.5, draws)
    assert torch.allclose(y[:, :, :24], x[:, :, :24], atol=1e-5)  # 8 sigma of <= 0.5 pixels away
    unchanged = (y == x).flatten(1).all(1)
    assert 10 < unchanged.sum() < 30


def test_solarize_inverts_what_is_bright():
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 1, 3)
    draws = data.Draws(0, 1, slice(0, 1))
    draws.restart(0)
    solarized = data.random_solarize(x, 1.1, draws).flatten()
    assert torch.allclose(solarized, torch.tensor([0.2, 0.5, 0.1]))
    assert torch.equal(data.random_solarize(x, 0.0, draws), x)


def write_frames(root, n=4, size=(48, 36)):
    """A small folder-form data set: colours and depths that are known."""
    for folder in ("RGB", "Depth"):
        (root / folder).mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", size, (10 * i, 20, 30)).save(root / "RGB" / f"{i}.png")
        depth = np.full(size[::-1], 2000 + 100 * i, np.uint16)
        depth[0, 0], depth[0, 1] = 0, 65535
        Image.fromarray(depth).save(root / "Depth" / f"{i}.png")
    return root


def test_a_frame_is_read_as_colour_and_metres(tmp_path):
    """Canvas 36 x 48 for crops of 24; 2100 mm / 10 m = 0.21; no reading: the data set's mean."""
    pairs = data.RGBD(write_frames(tmp_path / "d"), 24)
    (rgb,), (depth,) = pairs[1]
    assert rgb.shape == (3, 36, 48) and rgb.dtype == torch.uint8
    assert rgb[:, 5, 5].tolist() == [10, 20, 30]
    assert depth.shape == (1, 36, 48) and depth[0, 5, 5].item() == pytest.approx(0.21)
    assert depth[0, 0, :2].tolist() == pytest.approx([0.238, 0.238])
    assert pairs.modalities == ("rgb", "depth")


def test_frames_of_different_sizes_come_to_one_canvas_and_holes_do_not_bleed(tmp_path):
    """Shrinking averages valid pixels only: next to a hole the depth is still 2 m, not less."""
    root = write_frames(tmp_path / "d", 1, (192, 144))
    Image.new("RGB", (50, 40)).save(root / "RGB" / "x.jpg")
    depth = np.full((40, 50), 2000, np.uint16)
    depth[:20] = 0
    Image.fromarray(depth).save(root / "Depth" / "x.png")
    pairs = data.RGBD(root, 24)
    assert [pairs[i][1][0].shape for i in range(2)] == [(1, 36, 48)] * 2
    values = pairs[1][1][0]
    assert set(values.unique().mul(1000).round().int().tolist()) == {200, 238}


def test_lists_name_the_frames_of_a_split(tmp_path):
    """Bare stems, paths, suffixes, CRLF and second columns are all understood."""
    root = write_frames(tmp_path / "d")
    (root / "train.txt").write_bytes(b"2\r\nRGB/0.png\tLabel/0.png\r\n\r\n")
    assert data.RGBD(root, 24, "train").ids == ["2", "0"]


def test_collate_gives_two_views_of_each_modality():
    one, two = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    x1, x2 = (data.both_views(views, "cpu")
              for views in data.collate([([one], [one, two]), ([two], [two, one])]))
    assert x1[0] is x1[1] and x1[0].shape == (2, 1, 2, 2)
    assert torch.equal(x2[0], torch.stack([one, two]))
    assert torch.equal(x2[1], torch.stack([two, one]))


def toy(folder, scenes=48, held_out=16):
    data.make_toy("rgbd", folder, scenes, held_out)
    return folder


def test_made_up_scenes_are_seeded_and_hold_what_factors_csv_says(tmp_path):
    """The common object is nearer than the wall, bright; no painting in depth, no pane in RGB."""
    a, b = toy(tmp_path / "a", 6, 2), toy(tmp_path / "b", 6, 2)
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert len(files) == 8 * 3 + 3
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    rows, panes = list(csv.DictReader(open(a / "factors.csv"))), []
    assert (a / "train.txt").read_text().split() == [row["id"] for row in rows[:6]]
    for row in rows:
        rgb, depth, label = (np.array(Image.open(a / d / f"{row['id']}.png")).astype(float)
                             for d in ("RGB", "Depth", "Label"))
        depth[depth == 0] = np.nan
        masks = {key: label == 2 + 4 * k + int(row[key])
                 for k, key in enumerate(("common", "unique1", "unique2"))}
        wall = label == 1
        assert min(masks["common"].sum(), masks["unique1"].sum()) > 30
        panes.append(masks["unique2"].sum())
        assert rgb[masks["common"]].mean() > rgb[wall].mean() > rgb[masks["unique1"]].mean()
        order = masks["common"], wall, masks["unique2"]
        near, middle, far = (np.nanmean(depth[mask]) for mask in order)
        assert near < middle < far
    panes.sort()                                # one of them lies behind other objects
    assert panes[0] > 10 and panes[1] > 30


def test_shapes_have_the_same_area():
    """Otherwise mean brightness would give the factor away; 4 in units of the shape's radius."""
    v, u = (np.mgrid[0:600, 0:600] - 299.5) / 100
    for shape in data.SHAPES:
        assert data.draw_shape(shape, u, v).sum() / 1e4 == pytest.approx(4, rel=0.01)

# ---- data.py: the real layouts of the data sets, in small ----

def bands_of(date, S=12):
    """A season of SSL4EO-S12: S1 in dB, S2 x 10000, of native size, the date in every pixel."""
    size = {band: S // r for r, names in data.BLOCKS.items() for band in names}
    kind = lambda k, band: (-12.0, np.float32) if band in data.S1 else (100 * date + k, np.uint16)
    return {band: np.full((size[band], size[band]), *kind(k, band))
            for k, band in enumerate(data.S1 + data.S2)}


def write_ssl4eo(root, ids=("0000000", "000001", "0000007")):
    """Four seasons each, out of the order of S1's names, with a six-digit folder and void ids."""
    for name in ids:
        for date, satellite in ((3, "B"), (6, "A"), (9, "B"), (12, "A")):
            stamp = f"2020{date:02d}20T001515"
            s1 = f"S1{satellite}_IW_GRDH_1SDV_{stamp}_{stamp}_031883_03AE27_9BAF"
            s2 = f"{stamp}_{stamp}_T15QXA"
            for folder, season, bands in (("s1", s1, data.S1), ("s2c", s2, data.S2)):
                (root / folder / name / season).mkdir(parents=True)
                for band, x in bands_of(date).items():
                    if band in bands:
                        tifffile.imwrite(root / folder / name / season / f"{band}.tif", x)
    return root


def test_ssl4eo_reads_four_seasons_in_the_order_of_their_dates(tmp_path):
    """Directories are listed (void ids, six digits); S1A is before S1B by name, not by date."""
    pairs = data.open_pairs("sar-optical", write_ssl4eo(tmp_path), 8)
    assert pairs.ids == ["0000000", "0000007", "000001"]
    for season, date in enumerate((3, 6, 9, 12)):
        bands = dict(pairs.raw(0, [season]))
        assert tuple(bands) == data.S1 + data.S2
        assert bands["B2"].shape == (1, 12, 12) and bands["B9"].shape == (1, 2, 2)
        assert (bands["B12"] == 100 * date + 14).all()
        x1, x2 = data.stack_bands(pairs.blocks(0, season))
        assert x1.shape == (2, 12, 12) and x2.dtype == torch.uint8
        expected = [[round((100 * date + k) / 10000 * 255)] for k in range(2, 15)]
        assert [band.unique().tolist() for band in x2] == expected


def test_both_modalities_of_a_view_show_the_same_season(tmp_path):
    """Seasons are functions of (seed, epoch, index), drawn for each view; two need not agree."""
    pairs = data.open_pairs("sar-optical", write_ssl4eo(tmp_path, ["0000000"]), 8, seed=3)
    folders = sorted((tmp_path / "s1" / "0000000").iterdir(), key=lambda path: path.name[17:])
    for season, folder in enumerate(folders):   # now S1 tells its season, too
        tifffile.imwrite(folder / "VV.tif", np.full((12, 12), -18 + 3 * season, np.float32))
    seen = []
    for epoch in range(12):
        pairs.epoch = epoch
        x1, x2 = pairs[0]
        level = [(x[0].float().mean(), y[12].float().mean()) for x, y in zip(x1, x2)]
        assert (level[0][0] < level[1][0]) == (level[0][1] < level[1][1])
        assert all((a == b).all() for a, b in zip(x1 + x2, sum(pairs[0], [])))
        seen.append(level[0][1] == level[1][1])
    assert 0 < sum(seen) < 12


def test_eight_bits_are_clipped_and_never_wrap():
    """S2: x / 10000 * 255.  S1: without 2 % of outliers, the data set's mean -+ 2 std to 0..255."""
    s2 = np.array([0, 5000, 10000, 10040, 65535], np.uint16)
    assert data.to_8bit("B2", s2, {}).tolist() == [0, 128, 255, 255, 255]
    x = np.linspace(-15, -10, 101, dtype=np.float32)
    x[0], x[-1], stats = -60, np.inf, {"VV": (-12.0, 2.0)}
    y = data.to_8bit("VV", x, stats)
    assert y[50] == round(255 * (-12.5 + 16) / 8) and y.dtype == np.uint8
    assert y[0] == y[-1] == 0 and y[99] == y[98] > y[97]  # empty is -16 dB; 1 % is cut each way
    x = np.full(3, -10, np.float32)
    assert data.to_8bit("VV", x, stats).tolist() == [round(255 * 6 / 8)] * 3


@pytest.mark.parametrize("r", [1, 2, 6])
def test_bands_are_brought_to_10_m_bilinearly(r):
    """Integer arithmetic against F.interpolate in float64: half a step at most, so rounded."""
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    y = torch.from_numpy(x).double()[None]
    y = F.interpolate(y, scale_factor=r, mode="bilinear")[0].numpy()
    assert np.abs(data.upsample(x, r) - y).max() <= 0.5 + 1e-9


def test_packed_and_raw_give_the_same_batches_bit_for_bit(tmp_path, monkeypatch):
    """Also interrupted: nothing is there before all is, and what was done is not done again."""
    root = tmp_path / "raw"
    list(data.write_satellite(root, [np.random.default_rng(i) for i in range(5)], 5, S=24))
    raw, whole, calls = data.SSL4EO(root), data.packed_rows, []

    def stops(dataset, i):
        calls.append(i)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(dataset, i)
    monkeypatch.setattr(data, "packed_rows", stops)
    with pytest.raises(KeyboardInterrupt):
        data.pack(root, root / "packed", 1, every=2)
    assert not (root / "packed").exists()
    data.pack(root, root / "packed", 1, every=2)
    assert calls == [0, 0, 1, 2, 0, 2, 3, 4] and sorted(os.listdir(root / "packed")) == [
        "ids.txt", "season0.npy", "season1.npy", "season2.npy", "season3.npy"]
    packed = data.SSL4EO(root)
    assert packed.packed and not raw.packed
    for epoch in range(2):
        raw.epoch = packed.epoch = epoch
        for i in range(5):
            for a, b in zip(sum(raw[i], []), sum(packed[i], [])):
                assert a.dtype == b.dtype == torch.uint8 and (a == b).all()


def test_a_damaged_ssl4eo_tree_is_refused_by_name(tmp_path):
    """A missing band, a band of another size, a missing season, a missing partner, v1.1."""
    root = write_ssl4eo(tmp_path / "v1")
    band = next((root / "s2c" / "0000000").glob("*/B9.tif"))
    tifffile.imwrite(band, np.zeros((3, 3), np.uint16))
    with pytest.raises(BadInput, match=r"0000000: B9 has \(3, 3\) .*expected \(2, 2\)"):
        [data.SSL4EO(root).blocks(0, season) for season in range(4)]
    band.unlink()
    with pytest.raises(BadInput, match="B9.tif"):
        [data.SSL4EO(root).blocks(0, season) for season in range(4)]
    shutil.rmtree(band.parent)
    with pytest.raises(BadInput, match="holds 3 seasons, expected 4"):
        data.SSL4EO(root).blocks(0, 0)
    shutil.rmtree(root / "s1" / "000001")
    with pytest.raises(BadInput, match="1 samples .* only one of s1 and s2c .*000001"):
        data.SSL4EO(root)
    (tmp_path / "train" / "S1GRD").mkdir(parents=True)
    (tmp_path / "train" / "S1GRD" / "ssl4eos12_train_seasonal_data_000001.zarr.zip").write_text("")
    with pytest.raises(BadInput, match="v1.1"):
        data.open_pairs("sar-optical", tmp_path, 8)


def write_bigearthnet(root):
    """Three patches of 12 pixels, the last snowy; five-digit times, CRLF lists of 1, 2 columns."""
    pairs = [(f"S2B_MSIL2A_20170924T9302{k}_69_{k}",
              f"S1A_IW_GRDH_1SDV_20170925T04325{k}_35VPK_69_{k}") for k in range(3)]
    folder1, folder2 = root / "BigEarthNet-S1-v1.0", root / "BigEarthNet-v1.0"
    for k, (s2, s1) in enumerate(pairs):
        labels = ["Bare rock"] if k else ["Discontinuous urban fabric", "Airports", "Sea and ocean"]
        patch1, patch2 = folder1 / s1, folder2 / s2
        for patch, extra in ((patch2, {}), (patch1, {"corresponding_s2_patch": s2})):
            patch.mkdir(parents=True)
            text = json.dumps(dict(labels=labels, **extra))
            (patch / f"{patch.name}_labels_metadata.json").write_text(text)
        for n, (band, x) in enumerate(bands_of(k + 1).items()):
            patch = patch1 if band in data.S1 else patch2
            if band != "B10":
                band = band if band in data.S1 else f"B{band[1:]:0>2}"
                tifffile.imwrite(patch / f"{patch.name}_{band}.tif", x)
    (root / "train.csv").write_bytes("".join(f"{s2},{s1}\r\n" for s2, s1 in pairs).encode())
    column = "".join(f"{s2}\r\n" for s2, _ in pairs[::-1])
    (root / "bigearthnet-val.csv").write_bytes(column.encode())
    (root / "patches_with_seasonal_snow.csv").write_bytes(f"{pairs[2][0]}\r\n".encode())
    return pairs


def test_images_that_would_be_misread_are_refused(tmp_path):
    """Colours of 16 bits, which Pillow cuts to 8; two files of one stem; a folder that is not."""
    bits = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)        # 2x2, 16 bits, RGB
    pixels = zlib.compress((b"\0" + bytes(range(12))) * 2)
    chunks = [(b"IHDR", bits), (b"IDAT", pixels), (b"IEND", b"")]
    file = tmp_path / "a.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks))
    with pytest.raises(BadInput, match="a.png has colours of 16 bits"):
        data.read_image(file)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(BadInput, match="a.jpg and .*a.png have one stem"):
        data.stems(tmp_path)
    with pytest.raises(BadInput, match="no folder"):
        data.stems(tmp_path / "nowhere")


def test_a_killed_process_is_an_error_and_not_a_wait():
    with pytest.raises(BadInput, match="one of 2 processes was killed"):
        list(data.in_processes(kill_me, range(8), 2, "test"))


def kill_me(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_do_not_run_ahead_of_who_takes_their_results(tmp_path):
    results = data.in_processes(partial(leave_a_file, tmp_path), range(400), 2, "test")
    assert next(results) == 0
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) <= 5 * 16 < 400
    assert list(results) == list(range(1, 400)) and len(list(tmp_path.iterdir())) == 400


def leave_a_file(folder, job):
    (folder / str(job)).touch()
    return job


def test_check_reads_labels_as_transfer_will(tmp_path, monkeypatch, capsys):
    """A class beyond the task's, a mask of another size, no label: listed, each in its line."""
    root = write_frames(tmp_path / "d")
    (root / "Label").mkdir()
    for name, value, size in (("0", 37, (48, 36)), ("1", 38, (48, 36)), ("2", 1, (24, 18))):
        Image.new("L", size, value).save(root / "Label" / f"{name}.png")
    (root / "train.txt").write_text("0\n1\n2\n3\n")
    monkeypatch.setattr(sys, "argv", f"data.py check --task sunrgbd --data {root} --workers 1 "
                                     f"--size 24 --out {tmp_path / 'out'}".split())
    with pytest.raises(SystemExit):
        data.main()
    bad = (tmp_path / "out" / "bad-ids.txt").read_text()
    assert bad.count("\n") == 3 and "3\tno partner" in bad
    assert data.TASKS == {task: len(about["classes"]) for task, about in finetune.TASKS.items()}
    assert "1\tthe label 38; expected 0 (unlabelled) to 37" in bad and "2\ta mask of" in bad


def test_bigearthnet_gives_both_sensors_an_empty_B10_and_19_classes(tmp_path):
    """Two columns name the pair, one is completed from the S1 patches' json; snow is left out."""
    pairs = write_bigearthnet(tmp_path)
    task = data.open_pairs("bigearthnet", tmp_path, 8, "train")
    assert task.ids == [s2 for s2, _ in pairs[:2]]
    assert data.open_pairs("bigearthnet", tmp_path, 8, "val").ids == task.ids[::-1]
    assert data.open_pairs("bigearthnet", tmp_path, 8, "all").ids == task.ids
    x1, x2, target = task[0]
    assert x1.shape == (2, 12, 12) and x2.shape == (13, 12, 12)
    assert (x2[data.S2.index("B10")] == 0).all() and data.S2.index("B10") == 10
    assert (x2[11] == round((100 + 13) / 10000 * 255)).all()            # B11, after the empty band
    assert target.nonzero()[:, 0].tolist() == [0, 18] and task[1][2].sum() == 0
    assert len(data.CLASSES19) == 19 and len(data.CLASSES43) + len(data.DROPPED43) == 43
    s1, there, away = pairs[0][1], tmp_path / "BigEarthNet-S1-v1.0", tmp_path / "away"
    shutil.move(there / s1, away)               # pairs.csv follows what is unpacked
    assert data.open_pairs("bigearthnet", tmp_path, 8, "all").ids == task.ids[1:]
    shutil.move(away, there / s1)
    assert data.open_pairs("bigearthnet", tmp_path, 8, "all").ids == task.ids
    shutil.rmtree(tmp_path / "BigEarthNet-v1.0" / pairs[1][0])
    with pytest.raises(BadInput, match=f"1 samples .*{pairs[1][0]}"):
        data.open_pairs("bigearthnet", tmp_path, 8, "train")


def write_geonrw(root, dem=None):
    """A tile of 32 pixels, near infrared its fourth band, in a city to train and one to test."""
    rng = np.random.default_rng(0)
    rgbi = rng.integers(0, 256, (32, 32, 4)).astype(np.uint8)
    for city in ("aachen", "herne"):
        (root / city).mkdir(parents=True)
        Image.fromarray(rgbi).save(root / city / "371_5712_rgb.jp2")
        height = rng.random((32, 32), np.float32) * 50 if dem is None else dem
        tifffile.imwrite(root / city / "371_5712_dem.tif", height)
        classes = rng.integers(0, 11, (32, 32)).astype(np.uint8)
        tifffile.imwrite(root / city / "371_5712_seg.tif", classes)
    return rgbi


def test_geonrw_gives_16_patches_a_tile_and_cropped_equals_whole(tmp_path):
    """Row by row; three of four bands; split by city; masks keep label 0; `crop` changes no bit."""
    rgbi = write_geonrw(tmp_path)
    both = lambda: [data.open_pairs(name, tmp_path, 8, "train") for name in ("geonrw", "rgb-dem")]
    tasks = both()
    assert tasks[0].ids == [f"aachen/371_5712_{k}" for k in range(1, 17)]
    assert data.open_pairs("geonrw", tmp_path, 8, "test").ids[0] == "herne/371_5712_1"
    rgb, dem, seg = tasks[0][6]                 # the 7th: second row, third column
    assert (rgb.permute(1, 2, 0).numpy() == rgbi[8:16, 16:24, :3]).all()
    mask = tifffile.imread(tmp_path / "aachen" / "371_5712_seg.tif")
    assert (seg.numpy() == mask[8:16, 16:24]).all() and seg.dtype == torch.int64
    assert (mask == 0).any()
    assert dem.shape == (3, 8, 8) and dem.dtype == torch.float32 and (dem[0] == dem[2]).all()
    before = [task[i] for task in tasks for i in range(16)]
    data.crop(tmp_path, tmp_path / "cropped", 1)
    tasks = both()
    after = [task[i] for task in tasks for i in range(16)]
    flat = lambda items: items[:16] + [sum(x, []) for x in items[16:]]
    for a, b in zip(flat(before), flat(after)):
        assert all((x == y).all() and x.dtype == y.dtype for x, y in zip(a, b))
    (tmp_path / "cropped" / "aachen" / "371_5712_3_seg.tif").unlink()
    with pytest.raises(BadInput, match="less than all of dem, rgb, seg .*371_5712_3"):
        data.open_pairs("geonrw", tmp_path, 8, "train")


def test_holes_of_a_height_model_take_no_part_and_flat_ground_is_no_division_by_zero():
    """NaN, -9999, 65535 and -1.7e308 are holes; they become the mean of the stretched heights."""
    dem = np.linspace(100, 200, 101).reshape(1, 1, -1)
    holes = np.array([[[np.nan, -9999, 65535, -1.7e308, np.inf]]])
    x = data.stretch(np.concatenate([dem, holes], 2), "tile")[0, 0]
    assert x[0] == 0 and x[100] == 1 and abs(x[50] - 0.5) < 1e-6  # 1st, 99th percentile: 101, 199
    assert abs(x[75] - (175 - 101) / 98) < 1e-6
    assert (x[101:] == x[101]).all() and abs(x[101] - 0.5) < 1e-6
    assert (data.stretch(np.full((1, 4, 4), 7.0), "tile") == 0).all()
    with pytest.raises(BadInput, match="tile has no valid height"):
        data.stretch(holes, "tile")


def camera(W=160, H=120):
    return np.array([[W / 2, 0, W / 2], [0, W / 2, H / 2], [0, 0, 1.0]])


def tilted_room(W=160, H=120):
    """Depth in metres of a room seen by a camera that is turned, 1.5 m above its floor.

    Returns depth, the direction of gravity in the camera's axes, and for every pixel its plane
    (0 floor, 1 ceiling, 2 wall) and its height above the floor in cm.
    """
    pitch, roll = np.radians(12), np.radians(7)
    (cp, sp), (cr, sr) = ((np.cos(angle), np.sin(angle)) for angle in (pitch, roll))
    turn = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    turn = turn @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    K = camera(W, H)
    y, x = np.mgrid[1:H + 1, 1:W + 1]
    rays = np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], np.ones((H, W))])
    world = turn @ rays.reshape(3, -1)          # x right, y down, z forward
    planes = [(world[1], 1.5), (-world[1], 1.0), (world[2], 3.0), (world[0], 1.4), (-world[0], 1.4)]
    z = np.stack([np.where(along > 1e-9, distance / np.maximum(along, 1e-9), np.inf)
                  for along, distance in planes])
    which, z = z.argmin(0), z.min(0)
    plane, height = np.minimum(which, 2), 100 * (1.5 - world[1] * z)
    return z.reshape(H, W), turn[1], plane.reshape(H, W), height.reshape(H, W)


def test_hha_of_a_tilted_room_is_known():
    """Disparity 31000 / cm; height in cm; angle + 38: floors 38, walls 128, ceilings 218."""
    z, g, plane, height = tilted_room()
    for K in (camera(), (80, 80, 80, 60)):
        out = data.hha(z, z, K).astype(float)
        assert out.shape == (120, 160, 3)
        disparity = np.minimum(np.floor(310 / np.maximum(z, 1) + 0.5), 255)
        assert np.abs(out[..., 0] - disparity).max() == 0
        assert np.abs(out[..., 1] - np.minimum(height, 255)).max() < 3
        inside = np.ones(plane.shape, bool)     # windows that lie in one plane
        for dy, dx in ((-4, -4), (-4, 4), (4, -4), (4, 4), (0, 4), (0, -4), (4, 0), (-4, 0)):
            inside &= np.roll(plane, (dy, dx), (0, 1)) == plane
        inside[:4] = inside[-4:] = inside[:, :4] = inside[:, -4:] = False
        for kind, angle in enumerate((0, 180, 90)):
            wrong = np.abs(out[..., 2] - (angle + 38))[inside & (plane == kind)]
            assert len(wrong) > 200 and np.median(wrong) <= 1 and (wrong > 2).mean() < 0.05
    integral = np.pad(np.ones((9, 8)).cumsum(0).cumsum(1), ((11, 10), (11, 10)), "edge")
    integral[:11] = integral[:, :11] = 0
    sums = data.window_sums(integral, 3)[[0, 4, 4], [0, 4, 7]].tolist()
    assert sums == [16, 49, 28]                 # 4x4, 7x7, 7x4 at the border


def test_missing_depth_takes_no_part_in_hha():
    """Where the whole window is missing the angle is 180 degrees; millimetres are an error."""
    z, g, plane, height = tilted_room()
    raw = z.copy()
    raw[40:70, 40:90] = 0
    filled, masked = data.hha(z, z, camera()).astype(int), data.hha(z, raw, camera()).astype(int)
    assert (masked[45:65, 45:85, 2] == 218).all() and (masked[..., 0] == filled[..., 0]).all()
    far = np.ones(z.shape, bool)
    far[30:80, 30:100] = False
    assert (np.abs(masked - filled)[..., 2][far] > 1).mean() < 0.01
    with pytest.raises(ValueError, match="expected metres"):
        data.hha(z * 1000, z, camera())
    with pytest.raises(ValueError, match="some valid depth"):
        data.hha(z, np.zeros_like(z), camera())


def write_sunrgbd(root):
    """Two frames of different sensors, sizes, depth in the tree; image's stem is not depth's."""
    rng = np.random.default_rng(0)
    for frame, (H, W), intrinsics in (
            ("kv1/b3dodata/img_0063", (42, 56), "60 0 28\n0 60 21\n0 0 1\n"),
            ("xtion/sun3ddata/hotel/hotel/0000110-1", (44, 59), "60 0 29 0 60 22 0 0 1")):
        for name in ("image", "depth", "depth_bfx"):
            (root / "SUNRGBD" / frame / name).mkdir(parents=True)
        (root / "SUNRGBD" / frame / "intrinsics.txt").write_text(intrinsics)
        (root / "SUNRGBD" / frame / "scene.txt").write_text("office")
        rgb = rng.integers(0, 256, (H, W, 3)).astype(np.uint8)
        Image.fromarray(rgb).save(root / "SUNRGBD" / frame / "image" / "a.JPG")
        mm = (2000 + 5 * np.mgrid[:H, :W].sum(0)).astype(np.uint16)
        raw = (mm << 3 | mm >> 13).astype(np.uint16)  # rotated left by three bits, as published
        Image.fromarray(raw).save(root / "SUNRGBD" / frame / "depth_bfx" / "b_abs.png")
        raw[:4] = 0
        Image.fromarray(raw).save(root / "SUNRGBD" / frame / "depth" / "b_abs.png")
    (root / "train.txt").write_text("/n/fs/sun3d/data/SUNRGBD/kv1/b3dodata/img_0063/\r\n")
    (root / "test.txt").write_text("SUNRGBD/xtion/sun3ddata/hotel/hotel/0000110-1//image/a.JPG\n")
    (root / "labels").mkdir()
    for k, (H, W) in ((1, (44, 59)), (2, (42, 56))):  # the numbers run through the test list first
        Image.fromarray(np.full((H, W), k, np.uint8)).save(root / "labels" / f"img-{k:06d}.png")


def test_the_raw_sun_rgbd_tree_is_read_once_hha_has_been_there(tmp_path):
    """`hha` takes a frame's camera, filled depth, raw holes; it goes on where it was stopped."""
    write_sunrgbd(tmp_path)
    raw = np.array([8 * 2378, 0, 8 * 8100, 1 << 3 | 2], np.uint16)
    for dtype in (np.uint16, np.int32):         # as Pillow before 10.3 gives it
        assert data.sunrgbd_depth(raw.astype(dtype)).tolist() == [2.378, 0.0, 8.0, 8.0]
    assert data.sunrgbd_depth(np.array([2378 << 3 & 65535 | 2378 >> 13], np.int32))[0] == 2.378
    words = "2 samples .* without hha/, which `python data.py hha` writes"
    with pytest.raises(BadInput, match=words):
        data.open_pairs("rgbd", tmp_path, 16)
    data.write_hha(tmp_path, 1, 1000.0)
    frames = data.sunrgbd_frames(tmp_path)
    assert list(frames) == ["kv1/b3dodata/img_0063", "xtion/sun3ddata/hotel/hotel/0000110-1"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("hha/*.png")}
    data.write_hha(tmp_path, 1, 1000.0)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("hha/*.png")}
    assert written == again and len(written) == 2
    pairs = data.open_pairs("rgbd", tmp_path, 16)
    assert pairs.modalities == ("rgb", "hha")
    assert [x.shape for x in sum(pairs[1], [])] == [(3, 24, 32)] * 2
    mm = 2000 + 5 * np.mgrid[:42, :56].sum(0)
    raw = np.where(np.arange(42)[:, None] < 4, 0, mm)
    _, hha = pairs.raw(0)
    assert (hha[1].transpose(1, 2, 0) == data.hha(mm / 1000, raw / 1000, (60, 60, 28, 21))).all()
    for split, label in (("test", 1), ("train", 2)):
        task = data.open_pairs("sunrgbd", tmp_path, 16, split)
        assert len(task) == 1 and (task[0][2] == label).all() and task[0][2].shape == (24, 32)


def test_hha_of_the_folder_form_fills_holes_from_the_background(tmp_path):
    """A hole gets the farther reading beside it; a label is a palette's index, never a colour."""
    row, full = [0, 2, 0, 0, 3, 0.0], [2, 2, 3, 3, 3, 3]
    assert data.filled(np.array([row, [0] * 6])).tolist() == [full, [3] * 6]
    root = write_frames(tmp_path / "frames", 2)
    with pytest.raises(BadInput, match="intrinsics.txt cannot be read"):
        data.write_hha(root, 1, 1000.0)
    (root / "intrinsics.txt").write_text("48 0 24 0 48 18 0 0 1")
    data.write_hha(root, 1, 1000.0)
    assert data.open_pairs("rgbd", root, 16).modalities == ("rgb", "hha")
    (root / "Label").mkdir()
    indices = np.arange(36 * 48, dtype=np.uint8).reshape(36, 48) % 41
    image = Image.fromarray(indices, "P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(root / "Label" / "0.png")
    assert (data.read_label(root / "Label" / "0.png") == indices).all()
    image.convert("RGB").save(root / "Label" / "1.png")
    with pytest.raises(BadInput, match="1.png is a RGB image; expected class indices"):
        data.read_label(root / "Label" / "1.png")


def test_tiff_of_any_layout_is_read_as_CxHxW(tmp_path):
    """Bands last, planes, pages, big-endian, deflate; LZW by Pillow, unless it would drop bands."""
    path, rng = tmp_path / "a.tif", np.random.default_rng(0)
    x = rng.integers(0, 60000, (13, 6, 7)).astype(np.uint16)
    tifffile.imwrite(path, x.transpose(1, 2, 0), planarconfig="contig", photometric="minisblack")
    assert (data.read_tiff(path) == x).all()
    tifffile.imwrite(path, x, planarconfig="separate", photometric="minisblack", compression="zlib")
    assert (data.read_tiff(path) == x).all()
    tifffile.imwrite(path, x, byteorder=">", photometric="minisblack")
    assert (data.read_tiff(path) == x).all() and data.read_tiff(path).dtype == np.uint16
    rgb = x[:3].transpose(1, 2, 0).astype(np.uint8)
    for image in (rgb[..., 0], rgb, x[0], rng.random((6, 7), np.float32)):
        Image.fromarray(image).save(path, compression="tiff_lzw")
        y = data.read_tiff(path)
        expected = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        assert y.dtype == image.dtype and (y == expected).all()
    Image.fromarray(rgb[..., :2], "LA").save(path, compression="tiff_lzw")
    words = "a.tif is compressed with LZW .*2 bands.*pip install imagecodecs"
    with pytest.raises(BadInput, match=words):
        data.read_tiff(path)
    tifffile.imwrite(path, x)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BadInput, match="a.tif cannot be read as a TIFF"):
        data.read_tiff(path)


def test_ones_own_pairs_of_any_form_are_measured_and_brought_to_0_to_1(tmp_path):
    """npy, 2 channels; PNG, TIFF of 8 bits, any case; NaN, other sizes, constant channels."""
    rng, (one, two) = np.random.default_rng(0), (tmp_path / "one", tmp_path / "two")
    one.mkdir(), two.mkdir()
    arrays = [np.stack([rng.normal(1000, 50, (8, 9)), np.full((8, 9), 7)]).astype(np.float32)
              for _ in range(4)]
    arrays[2][0, 0, 0] = np.nan
    for i, a in enumerate(arrays):
        np.save(one / f"{i}.npy", a if i else a.transpose(1, 2, 0))
        image = Image.fromarray(rng.integers(0, 256, (8, 9, 3)).astype(np.uint8))
        image = image if i < 3 else Image.new("RGB", (19, 17), (100, 100, 100))
        image.save(two / f"{i}{'.PNG' if i % 2 else '.TIF'}")
    pairs = data.open_pairs("custom", (one, two), 8)
    row1, row2 = pairs.rows
    values = np.stack(arrays)[:, 0]
    assert abs(row1["raw_mean"][0] - np.nanmean(values)) < 1e-3
    assert abs(row1["raw_std"][0] - np.nanstd(values)) < 1e-3
    assert row1["raw_mean"][1] == 7 and row2["raw_mean"] is None and len(row2["mean"]) == 3
    (x1,), (x2,) = pairs[2]
    assert x1.dtype == torch.float32 and x2.dtype == torch.uint8 and x2.shape == (3, 8, 9)
    expected = ((arrays[2][0] - row1["raw_mean"][0]) / row1["raw_std"][0] / 6 + 0.5).clip(0, 1)
    expected[0, 0] = 0.5                        # no value: the mean
    assert np.abs(x1[0].numpy() - expected).max() < 1e-5 and (x1[1] == 0.5).all()
    # of another size: brought to that of the first, and rounded
    assert pairs[3][1][0].shape == (3, 8, 9) and (pairs[3][1][0] == 100).all()
    x = torch.stack([data.unit(pairs[i][1][0]) for i in range(3)])
    assert data.normalise(x, "custom2").mean().abs() < 0.5
    assert data.open_pairs("custom", (one, two), 8, rows=pairs.rows).rows is pairs.rows
    np.save(one / "1.npy", arrays[1][:1])
    with pytest.raises(BadInput, match="1.npy has 1 channels of float32; expected 2 of float32"):
        data.open_pairs("custom", (one, two), 8)
    np.save(one / "1.npy", arrays[1])
    (two / "3.PNG").unlink()
    with pytest.raises(BadInput, match="only one of the two folders .*3"):
        data.open_pairs("custom", (one, two), 8)
    with pytest.raises(BadInput, match="no image under"):
        data.open_pairs("custom", (one, tmp_path), 8)


def test_check_of_ones_own_pairs_shows_channels_and_finds_what_holds_nothing(
        tmp_path, monkeypatch, capsys):
    folders = [folder(tmp_path, name) for name in ("one", "two")]
    for i, fill in enumerate((0, 1, np.nan, 1j)):
        for root in folders:
            noise = np.random.default_rng(i).random((9, 8, 4)).astype(np.float32)
            np.save(root / f"{i}.npy", noise * fill if i > 1 else noise)
    (folders[0] / "._0.npy").write_bytes(b"of another system")
    monkeypatch.setattr(sys, "argv", f"data.py check --scenario custom --data1 {folders[0]} "
                        f"--data2 {folders[1]} --out {tmp_path} --workers 1 --size 16".split())
    (folders[0] / "3.npy").rename(tmp_path / "3.npy"), (folders[1] / "3.npy").unlink()
    with pytest.raises(SystemExit) as error:
        data.main()
    assert error.value.code == 1 and "3 samples read, 1 bad" in (out := capsys.readouterr().out)
    assert "float32 4x9x8" in out
    assert "not one finite value" in (tmp_path / "bad-ids.txt").read_text()
    with pytest.raises(BadInput, match="3.npy is complex64; expected real numbers"):
        data.read_image(tmp_path / "3.npy")


def test_what_is_seen_from_above_is_augmented_as_section_4_says():
    """SAR: no jitter, no solarize; DEM: crop, flips; 13 bands stay, in range; half upside down."""
    draws = data.Draws(0, 400, slice(None))
    for modality, C, values in (("sar", 2, 1), ("dem", 3, 1), ("ms", 13, 100)):
        draws.restart(1)
        x = data.augment(torch.full((400, C, 12, 12), 102, dtype=torch.uint8), modality, 8, draws)
        assert x.shape == (400, C, 8, 8) and x.min() >= 0 and x.max() <= 1
        assert len(torch.unique((x * 1000).round())) >= values
        assert values > 1 or (x - 0.4).abs().max() < 1e-5
    ramp = torch.arange(12.0).view(1, 1, 12, 1).expand(400, 3, 12, 12) / 11
    draws.restart(2)
    x = data.augment(ramp, "dem", 8, draws)
    assert 160 < (x[:, 0, 0, 0] > x[:, 0, -1, 0]).sum() < 240
    grey = data.augment(torch.rand(400, 13, 12, 12), "ms", 8, draws)
    assert 50 < ((grey - grey[:, :1]).abs().amax((1, 2, 3)) < 1e-5).sum() < 110  # p = 0.2
    sar = torch.rand(400, 2, 12, 12)
    grey = data.augment(sar, "sar", 8, draws)
    assert 50 < ((grey - grey[:, :1]).abs().amax((1, 2, 3)) < 1e-5).sum() < 110


def test_a_crop_is_the_same_on_a_device_as_on_a_cpu():
    """A device's matrix products against torch's own filter, image by image, that a CPU takes."""
    x = torch.rand(4, 5, 20, 24)
    boxes = torch.tensor([[0, 1, 20, 23], [3, 2, 7, 9], [5, 0, 15, 24], [1, 1, 4, 4.0]])
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    cpu = torch.cat([data.resized_box(image[None], 11, *map(int, box), *map(int, flip))
                     for image, box, flip in zip(x, boxes, flips)])
    top, left, h, w = boxes.split(1, 1)
    Wy, Wx = data.triangle_filter(top, h, 20, 11), data.triangle_filter(left, w, 24, 11)
    Wy = torch.where(flips[:, :1, None] > 0, Wy.flip(1), Wy)
    Wx = torch.where(flips[:, 1:, None] > 0, Wx.flip(1), Wx)
    assert (data.separable(x, Wy, Wx) - cpu).abs().max() < 1e-5


@pytest.mark.parametrize("scene", [data.indoor_scene, data.satellite_scene, data.aerial_scene])
def test_an_object_of_one_sensor_alone_is_not_seen_by_the_other(scene):
    """Each sensor in each object against the ground, in its std: the median of 15 scenes."""
    contrast = np.full((2, 3, 15), np.nan)
    for seed in range(15):
        *sensors, label, classes = scene(np.random.default_rng(seed))
        rng, indoors = np.random.default_rng(seed), scene is data.indoor_scene
        masks, _, _ = data.place_three(rng, 48, 64) if indoors else data.scatter_three(rng, 48)
        if scene is data.satellite_scene:
            sensors = sensors[0][seed % 4]["VV"], sensors[0][seed % 4]["B4"].astype(float)
        ground = label == 1
        for which, shape in enumerate(classes):
            inside = (masks[which] > 0.9) & (sum(masks) - masks[which] < 0.1)  # and in no other
            assert (label[inside] == 2 + which * len(data.SHAPES) + shape).all()
            for k, x in enumerate(sensors if inside.any() else ()):
                x = x.reshape(*label.shape, -1).mean(-1).astype(float)
                difference = np.median(x[inside]) - np.median(x[ground])
                contrast[k, which, seed] = difference / x[ground].std()
    contrast = np.nanmedian(contrast, 2)
    assert (np.abs(contrast) > 1.5).tolist() == [[True, True, False], [True, False, True]], contrast
    assert np.abs(contrast[[0, 1], [2, 1]]).max() < 1, contrast


def test_where_a_sensor_s_own_objects_stand_does_not_tell_where_the_other_s_do():
    """Else the modalities could agree on that.  Indoors: columns of the centres.  From above: the
    same third of the cells in half of the scenes."""
    columns, same = [], []
    for seed in range(200):
        own = data.place_three(np.random.default_rng(seed), 48, 64)[0][1:]
        columns.append([mask.sum(0) @ np.arange(64) / mask.sum() for mask in own])
        own = data.scatter_three(np.random.default_rng(seed), 48)[0][1:]
        same.append((own[0] * own[1]).sum() > 0.3 * own[0].sum())
    assert abs(np.corrcoef(np.array(columns).T)[0, 1]) < 0.2  # 0.07 is its standard error
    assert 0.4 < np.mean(same) < 0.6


@pytest.mark.parametrize("scenario, shapes", [("sar-optical", [2, 2, 13, 13]), ("rgb-dem", [3, 3])])
def test_made_up_scenes_lie_in_the_layout_of_their_scenario(scenario, shapes, tmp_path):
    """Written once, whole or not at all, packed or cropped, beside lists, masks and factors.csv."""
    root = tmp_path / "toy"
    data.make_toy(scenario, root, 16, 16)
    train = data.open_pairs(scenario, root, 32, "train")
    assert len(train) == 16 and [len(x) for x in sum(train[0], [])] == shapes
    rows = {row["id"]: row for row in csv.DictReader(open(root / "factors.csv"))}
    assert len(rows) == 32 and set(train.ids) <= set(rows)
    name = train.ids[3]
    task = data.GeoNRW(root, "train", labels=True) if scenario == "rgb-dem" else None
    with pytest.raises(BadInput, match="val"):  # there is none, and it is not the training set
        data.open_pairs(scenario, root, 32, "val")
    label = task[3][2].numpy() if task else data.read_label(root / "Label" / f"{name}.png")
    for which, factor in enumerate(("common", "unique1", "unique2")):
        assert (label == 2 + which * len(data.SHAPES) + int(rows[name][factor])).any()


def test_check_counts_names_what_is_bad_and_draws_what_the_network_sees(
        tmp_path, monkeypatch, capsys):
    """Code 1 and bad-ids.txt: a truncated file, a missing partner; then 0 and the contact sheet."""
    root, out = tmp_path / "data", tmp_path / "out"
    list(data.write_satellite(root, [np.random.default_rng(i) for i in range(4)], 4, S=24))
    run = f"data.py check --scenario sar-optical --data {root} --out {out} --workers 1 --size 16"
    monkeypatch.setattr(sys, "argv", run.split())
    file = next((root / "s1" / "0000001").glob("*/VH.tif"))
    whole = file.read_bytes()
    file.write_bytes(whole[:500])
    os.rename(root / "s2c" / "0000003", tmp_path / "away")
    with pytest.raises(SystemExit) as error:
        data.main()
    assert error.value.code == 1
    bad = (out / "bad-ids.txt").read_text().splitlines()
    assert len(bad) == 2 and bad[0] == "0000003\tno partner"
    assert bad[1].startswith("0000001\t") and "VH.tif" in bad[1]
    assert "3 samples read, 2 bad, of which 1 without a partner" in capsys.readouterr().out
    file.write_bytes(whole)
    os.rename(tmp_path / "away", root / "s2c" / "0000003")
    with pytest.raises(SystemExit) as error:
        data.main()
    assert error.value.code == 0 and "B8A              16" in capsys.readouterr().out
    assert Image.open(out / "contact-sheet.png").size == (4 * 16, 4 * 16)


def test_pretraining_runs_on_ones_own_pairs_and_tells_what_its_encoders_expect(
        tmp_path, monkeypatch):
    """5 channels of 16 bits, 1 of 8; the statistics are in the checkpoint and beside encoders."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for i in range(8):
        one = rng.integers(0, 4000, (5, 20, 20)).astype(np.uint16)
        two = rng.integers(0, 256, (20, 24)).astype(np.uint8)
        tifffile.imwrite(tmp_path / "one" / f"{i}.tif", one)
        Image.fromarray(two).save(tmp_path / "two" / f"{i}.png")
    flags = f"--data1 {tmp_path}/one --data2 {tmp_path}/two --out {tmp_path}/out " \
        "--augment2 depth --size 16 --batch-size 4 --scenario custom --backbone resnet-toy " \
        "--projector 16-16-16 --epochs 1"
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags.split()])
    pretrain.main()
    checkpoint = pretrain.load_checkpoint(tmp_path / "out" / "checkpoint.pt")
    beside = [json.loads((tmp_path / "out" / f"encoder{k}.json").read_text()) for k in (1, 2)]
    for row, text in zip(checkpoint["settings"]["inputs"], beside):
        assert row.items() <= text.items()
    assert len(beside[0]["raw_mean"]) == 5 and abs(beside[0]["raw_mean"][0] - 2000) < 100
    assert beside[1]["mean"][0] > 0.4
    with pytest.raises(BadInput, match="expected --data1 and --data2"):
        pretrain.get_args(["--scenario", "custom", "--data1", "x"])


# ---- pretrain.py as a program ----

SMALL = "--scenario rgbd --split train --size 32 --backbone resnet-toy --projector 32-32-32 " \
    "--batch-size 16 --lr 2"


def pretrain_here(flags, monkeypatch):
    """pretrain.main() in this process, by its command line."""
    gc.collect()                                # a failed run's frames hold the lock of its folder
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *shlex.split(flags)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        pretrain.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def log_of(out):
    """log.jsonl without the speed, the only thing in it that two equal runs do not share."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pairs_per_s"} for row in rows]


def test_pretrain_runs_and_loss_falls(tmp_path):
    """By the command line: log, settings, checkpoint and encoders that torchvision's names fit."""
    root, out = toy(tmp_path / "scenes"), tmp_path / "out"
    flags = *SMALL.split(), "--epochs", "32", "--data", root, "--out", out
    command = [sys.executable, HERE / "pretrain.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "chance (independent embeddings)" in result.stdout
    assert "step 000096/000096" in result.stdout
    log = log_of(out)
    assert [row["step"] for row in log] == list(range(1, 97))
    first, last = (sum(row["loss"] for row in rows) for rows in (log[:6], log[-6:]))
    assert last < 0.8 * first
    for row in log:
        assert row["loss"] == pytest.approx(row["L1"] + row["L2"] + row["Lc"] + row["Lu"], rel=1e-5)
    assert json.loads((out / "args.json").read_text())["K"] == 32
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    for k, channels in ((1, 3), (2, 1)):
        encoder = decur.resnet("resnet-toy", channels)
        encoder.load_state_dict(torch.load(out / f"encoder{k}.pth", weights_only=True))
        assert torch.equal(encoder.conv1.weight, checkpoint["model"][f"f{k}.E.conv1.weight"])


def test_resume_equals_no_interruption(tmp_path, monkeypatch):
    """SIGTERM in mid-epoch, then --resume: weights and log of an unbroken run, bit for bit."""
    root, whole, broken = toy(tmp_path / "scenes"), tmp_path / "whole", tmp_path / "broken"
    flags = f"{SMALL} --epochs 16 --data {root}"  # 3 steps an epoch
    pretrain_here(f"{flags} --out {whole}", monkeypatch)
    command = [sys.executable, HERE / "pretrain.py", *shlex.split(f"{flags} --out {broken}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    while "step 000004" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "--resume" in process.communicate(timeout=60)[0] and process.returncode == 0
    step = torch.load(broken / "checkpoint.pt", weights_only=True)["step"]
    assert 4 <= step < 48
    with open(broken / "log.jsonl", "a") as file:  # as if killed later, after the checkpoint
        file.write(json.dumps(dict(step=step + 1)) + "\n" + '{"step": ')
    pretrain_here(f"{flags} --out {broken} --resume", monkeypatch)
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, broken))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert log_of(whole) == log_of(broken)


def test_the_benchmark_prints_a_table_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """With files, and where there are none; several processes are refused."""
    monkeypatch.setattr(pretrain, "benchmark", partial(pretrain.benchmark, seconds=0))
    flags = f"{SMALL} --benchmark --out {tmp_path}/out"
    pretrain_here(f"{flags} --data {toy(tmp_path / 'scenes')}", monkeypatch)
    pretrain_here(f"{flags} --data {tmp_path}/nowhere --method barlowtwins", monkeypatch)
    files, nothing = capsys.readouterr().out.split("barlowtwins")
    for part in ("wait for data", "augment", "forward", "loss", "backward", "optimizer"):
        assert re.search(rf"^  {part}( +[0-9.]+ +[0-9.]+%){{2}}$", files, re.M)
        assert re.search(rf"^  {part}( +[0-9.]+ +[0-9.]+%){{1}}$", nothing, re.M)
    assert re.search(r"^pairs/s( +[0-9.]+){2}$", files, re.M) and "peak memory" in files
    assert "as Algorithm 1 prints it" in files
    assert f"not measured: no files under {tmp_path}/nowhere" in nothing
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    monkeypatch.setattr(pretrain, "start_processes", lambda: (0, 2, torch.device("cpu")))
    with pytest.raises(BadInput, match="--benchmark on 2 processes; expected one"):
        pretrain_here(flags, monkeypatch)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, monkeypatch):
    """Both would write the same files."""
    root, out = toy(tmp_path / "scenes"), tmp_path / "out"
    lock = pretrain.open_folder(out, {}, 0)
    with pytest.raises(BadInput, match="another run is writing into --out"):
        pretrain_here(f"{SMALL} --epochs 1 --data {root} --out {out}", monkeypatch)
    lock.close()
    pretrain_here(f"{SMALL} --epochs 1 --data {root} --out {out}", monkeypatch)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    root, out = toy(tmp_path / "scenes"), tmp_path / "out"

    def diverges(x, modality, size, draws, calls=[]):
        calls.append(1)
        return data.augment(x, modality, size, draws) * (float("nan") if len(calls) > 20 else 1)
    monkeypatch.setattr(pretrain, "augment", diverges)
    with pytest.raises(SystemExit, match=r"the loss is nan at step 6 \(L1 nan"):
        pretrain_here(f"{SMALL} --epochs 4 --data {root} --out {out}", monkeypatch)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3 and all(p.isfinite().all() for p in checkpoint["model"].values())


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_bad_input_is_one_line_that_names_it_and_nothing_is_overwritten(tmp_path, monkeypatch):
    """Got, expected, remedy, for every kind of bad input that a run can meet."""
    root, out = toy(tmp_path / "scenes", 20, 4), tmp_path / "out"

    def refused(flags, pattern):
        finished = (out / "checkpoint.pt").exists()
        files = [path for path in out.rglob("*") if path.is_file()] if finished else []
        before = {path: path.read_bytes() for path in files}
        with pytest.raises(BadInput, match=pattern) as error:
            pretrain_here(flags, monkeypatch)
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
        assert all(path.read_bytes() == content for path, content in before.items())

    run = f"{SMALL} --epochs 1 --out {out}"
    refused(f"{run} --data {tmp_path}/nowhere", "no folder .*nowhere.*--toy")
    refused(f"{run} --data {tmp_path}", "no folder .*RGB")
    refused(f"{run} --data {root} --split val", "no .*val.txt")
    refused(f"{run} --data {root} --batch-size 21", "--batch-size 21 is more than the 20 pairs")
    refused(f"{run} --data {root} --projector 32-x", "--projector 32-x: expected widths")
    refused(f"{run} --data {root} --common 1.5", "--common 1.5")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(pretrain.dist, "init_process_group", lambda backend: None)
    refused(f"{run} --data {root}", "--batch-size 16 is not a multiple of 3 processes; try 15")
    monkeypatch.delenv("WORLD_SIZE")

    lonely, broken, hollow, picture = (write_frames(tmp_path / name, 16) for name in "abcd")
    (lonely / "Depth" / "3.png").unlink()
    refused(f"{run} --data {lonely} --split all", r"only one of RGB and Depth \(the first: 3\)")
    file = broken / "RGB" / "5.png"
    file.write_bytes(file.read_bytes()[:60])
    refused(f"{run} --data {broken} --split all", "5.png cannot be read")
    Image.fromarray(np.zeros((36, 48), np.uint16)).save(hollow / "Depth" / "2.png")
    refused(f"{run} --data {hollow} --split all", "2.png has no valid depth")
    Image.new("RGB", (48, 36)).save(picture / "Depth" / "0.png")
    refused(f"{run} --data {picture} --split all",
            "0.png is uint8 .*expected depth as one 16-bit channel")

    (tmp_path / "file").write_text("")
    run = f"{SMALL} --epochs 1 --data {root}"
    refused(f"{run} --out {tmp_path}/file/out", "--out .* cannot be written")
    out2 = tmp_path / "out2"
    pretrain_here(f"{run} --out {out2}", monkeypatch)
    out, again = out2, f"{SMALL} --data {root} --out {out2}"
    refused(f"{again} --epochs 1", "checkpoint.pt exists; expected a new --out, or --resume")
    refused(f"{again} --epochs 2 --resume", "--resume: epochs is 2, but 1 in")
    refused(f"{again} --epochs 1 --resume --common 0.5", "--resume: common is 0.5, but 0.75 in")
    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    refused(f"{again} --epochs 1 --resume", "checkpoint.pt cannot be used")
    with open(out / "checkpoint.pt", "wb") as file:
        pickle.dump(Evil(), file)
    refused(f"{again} --epochs 1 --resume", "checkpoint.pt cannot be used")


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    def full(part):
        part.write_bytes(b"half")
        raise RuntimeError("enforce fail at inline_container.cc")  # torch.save's words for it

    (tmp_path / "checkpoint.pt").write_bytes(b"whole")
    with pytest.raises(BadInput, match="is the disk full"):
        pretrain.write_atomically(tmp_path / "checkpoint.pt", full)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_bad_input_exits_with_code_2_and_one_line(tmp_path):
    """Also from a loader's worker, which wraps the message in its traceback."""
    root, out = write_frames(tmp_path / "d", 16), tmp_path / "out"
    (root / "Depth" / "7.png").write_bytes(b"not a picture")
    flags = *SMALL.replace("train", "all").split(), "--epochs", "1", "--workers", "1"
    command = [sys.executable, HERE / "pretrain.py", *flags, "--data", root, "--out", out]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    words = r"error: .*7\.png cannot be read as an image \(.*\); copy or download it again"
    assert re.fullmatch(words, result.stderr.splitlines()[-1])
    assert not list(out.glob("checkpoint*"))


def test_torchrun_trains_on_two_cpu_processes(tmp_path):
    """One code path; the warning about batch norm; the same data for any number of processes."""
    root, out = toy(tmp_path / "scenes"), tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               HERE / "pretrain.py", *SMALL.split(), "--epochs", "1", "--data", root, "--out", out]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "cannot synchronise batch normalisation" in result.stdout
    assert [row["step"] for row in log_of(out)] == [1, 2, 3]


# ---- pretrain.py: methods, ablations and weights ----

@pytest.mark.parametrize("flags, views", [
    ("--method decur", 4), ("--no-intra", 2), ("--common 0 --projector none", 4),
    ("--method barlowtwins", 2), ("--method vicreg", 2), ("--method simclr", 2),
    ("--method clip", 2), ("--method barlowtwins --modality 2", 2)])
def test_every_method_and_ablation_trains_on_the_views_it_uses(flags, views, tmp_path, monkeypatch):
    """Tables 1-4, Fig. 3: one trainer; an encoder's JSON says how it came to be, what it wants."""
    root, out, encoded = toy(tmp_path / "scenes", 16, 2), tmp_path / "out", []
    forward = decur.ResNet.forward
    spy = lambda E, x: (encoded.append(E.channels), forward(E, x))[1]
    monkeypatch.setattr(decur.ResNet, "forward", spy)
    pretrain_here(f"{SMALL} --epochs 2 {flags} --data {root} --out {out}", monkeypatch)
    assert len(encoded) == 2 * views            # two steps
    written = sorted(path.name for path in out.glob("encoder*"))
    both = ["encoder1.json", "encoder1.pth", "encoder2.json", "encoder2.pth"]
    assert written == (both[2:] if "--modality 2" in flags else both)
    assert set(encoded) == ({1} if "--modality 2" in flags else {3, 1})
    about = json.loads((out / "encoder2.json").read_text())
    assert (about["modality"], about["bands"], about["mean"]) == ("depth", ["depth"], [0.238])
    assert about["method"] == (flags.split()[1] if "--method" in flags else "decur")
    assert about["settings"]["no_intra"] == ("--no-intra" in flags) and about["epoch"] == 2
    assert about["sha256"] == hashlib.sha256((out / "encoder2.pth").read_bytes()).hexdigest()
    states = decur.read_weights(out / "encoder2.pth", "resnet-toy")
    decur.load_encoder(decur.resnet("resnet-toy", 1), *states)


def test_barlowtwins_is_decur_without_intra_and_decoupling(tmp_path, monkeypatch):
    """Table 4's row and Tables 1-2's are one run, to the last bit but rounding."""
    run = f"{SMALL} --epochs 2 --data {toy(tmp_path / 'scenes', 16, 2)}"
    for name, flags in (("a", "--method barlowtwins"), ("b", "--no-intra --common 1.0")):
        pretrain_here(f"{run} --out {tmp_path / name} {flags}", monkeypatch)
    a, b = (torch.load(tmp_path / name / "encoder1.pth", weights_only=True) for name in "ab")
    assert relative(list(a.values()), list(b.values())) < 1e-5


def test_methods_take_the_projector_and_the_rate_that_their_papers_ask_for():
    """SimCLR Sec. 2.3, CLIP Sec. 2.3 and Table 19; App. B for segformers; all others as DeCUR."""
    settings = lambda flags: pretrain.get_args(f"--scenario rgbd {flags}".split())[0]
    widths = {method: settings(f"--method {method}").widths for method in pretrain.METHODS}
    assert widths == {"decur": [8192] * 3, "barlowtwins": [8192] * 3, "vicreg": [8192] * 3,
                      "simclr": [2048, 128], "clip": [1024]}
    assert settings("--method clip --projector 64-64").widths == [64, 64]
    assert settings("--method clip").out == Path("runs/rgbd-clip")
    args = settings("--backbone mit_b5")
    assert (args.lr, args.lr_bias, args.weight_decay, args.common) == (1e-4, 1e-4, 0.01, 0.75)


def test_segformers_train_with_adamw_that_spares_biases_and_norms_and_resnets_with_lars(
        tmp_path, monkeypatch):
    """App. B: "AdamW optimizer and a learning rate of 1e-4" for SegFormer's; LARS otherwise."""
    root, states = toy(tmp_path / "scenes", 16, 2), {}
    for backbone in ("mit_b0", "resnet-toy"):
        flags = re.sub(" --lr [0-9]+", "", SMALL).replace("resnet-toy", backbone)
        out = tmp_path / backbone
        pretrain_here(f"{flags} --epochs 1 --data {root} --out {out}", monkeypatch)
        states[backbone] = torch.load(out / "checkpoint.pt", weights_only=True)["optimizer"]
        assert json.loads((out / "encoder1.json").read_text())["backbone"] == backbone
    assert "exp_avg_sq" in states["mit_b0"]["state"][0]
    assert list(states["resnet-toy"]["state"][0]) == ["momentum"]
    decayed, spared = states["mit_b0"]["param_groups"]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0)
    net = DeCUR("mit_b0", 3, 1, [32, 32, 32])
    spared_names = [name for name, p in net.named_parameters() if p.ndim < 2]
    assert len(spared["params"]) == len(spared_names)
    assert all(name.endswith("bias") or "norm" in name or ".P." in name for name in spared_names)


def test_weights_start_a_run_or_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    """A file with both encoders, or one for each; what fits only in part does not start."""
    root, first = toy(tmp_path / "scenes", 16, 2), tmp_path / "first"
    run = f"{SMALL} --epochs 1 --data {root}"
    pretrain_here(f"{run} --out {first}", monkeypatch)
    both, one, two = (first / name for name in ("checkpoint.pt", "encoder1.pth", "encoder2.pth"))
    monkeypatch.setattr(pretrain, "cosine", lambda step, steps: 0)  # a rate of 0: weights stay
    for n, (files, flags) in enumerate(((f"{both}", ""), (f"{one} {two}", ""),
                                        (f"{both}", "--method barlowtwins --modality 2"))):
        out = tmp_path / str(n)
        pretrain_here(f"{run} --out {out} --weights {files} {flags}", monkeypatch)
        assert "72 of 72 keys matched" in capsys.readouterr().out
        a, b = (torch.load(folder / "encoder2.pth", weights_only=True) for folder in (first, out))
        keys = [key for key in a if "running" not in key and "num_batches" not in key]
        assert all(torch.equal(a[key], b[key]) for key in keys)
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    for files, words in (
            (f"{one}", "1 encoder, expected 2"),
            (f"{two} {one}", "1 input channels, this encoder 3"),
            (f"{tmp_path}/nowhere.pth", "No such file"),
            (f"{tmp_path}/code.pth", "could run code"),
            ("imagenet", "no ImageNet weights")):
        with pytest.raises(BadInput, match=words) as error:
            pretrain_here(f"{run} --out {tmp_path}/refused --weights {files}", monkeypatch)
        assert "\n" not in str(error.value) and not (tmp_path / "refused").exists()
    for flags in ("--bgr", "--modality 1", "--method clip --no-intra",
                  "--method clip --common 0.5"):
        with pytest.raises(BadInput, match="expected"):
            pretrain.get_args(f"--scenario rgbd {flags}".split())


# ---- finetune.py: metrics ----

def slow_average_precision(scores, labels):
    """Precision and recall at every threshold, one by one."""
    area, before, positive = 0, 0, sum(labels)
    for threshold in sorted(set(scores), reverse=True):
        taken = [label for score, label in zip(scores, labels) if score >= threshold]
        area += (sum(taken) / positive - before) * sum(taken) / len(taken)
        before = sum(taken) / positive
    return area


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_is_the_area_under_the_curve(seed):
    """Ties and an absent class; micro is the ranking of all decisions, macro the mean over classes
    with a positive.
    """
    g = torch.Generator().manual_seed(seed)
    # odd seeds: many ties
    scores = torch.randint(6 if seed % 2 else 10**6, (20, 4), generator=g).float()
    labels = (torch.rand(20, 4, generator=g) < 0.3).float()
    labels[:, 3] = 0
    micro = slow_average_precision(scores.flatten().tolist(), labels.flatten().tolist())
    assert finetune.average_precision(scores, labels) == pytest.approx(micro, rel=1e-12)
    each = [slow_average_precision(scores[:, c].tolist(), labels[:, c].tolist()) for c in range(3)]
    assert finetune.macro_average_precision(scores, labels) == pytest.approx(sum(each) / 3,
                                                                             rel=1e-12)
    assert finetune.average_precision(scores, torch.zeros(20, 4)) is None
    assert finetune.macro_average_precision(scores, torch.zeros(20, 4)) is None


@pytest.mark.parametrize("seed", range(4))
def test_iou_and_accuracy_are_counts_of_pixels(seed):
    """Ignored pixels count nowhere; a class that is neither predicted nor labelled is not in the
    mean.
    """
    g = torch.Generator().manual_seed(seed)
    pred = torch.randint(4, (2, 9, 9), generator=g)
    gt = torch.randint(-1, 4, (2, 9, 9), generator=g)
    ious, right, valid = [], 0, 0
    for c in range(6):                          # classes 4 and 5 do not occur
        pairs = [(p == c, t == c) for p, t in zip(pred.flatten().tolist(), gt.flatten().tolist())
                 if t != -1]
        if union := sum(p or t for p, t in pairs):
            ious.append(sum(p and t for p, t in pairs) / union)
        right, valid = right + sum(p and t for p, t in pairs), len(pairs)
    expected = sum(ious) / len(ious), right / valid
    assert len(ious) == 4
    assert finetune.iou_and_accuracy(pred, gt, 6, -1) == pytest.approx(expected, rel=1e-12)
    assert finetune.iou_and_accuracy(pred, torch.full_like(gt, -1), 6, -1) == (None, None)


def metrics_of(rank, world):
    """Both kinds of metrics from this process's samples of 5: two processes have 2 and 3."""
    g = torch.Generator().manual_seed(0)
    rows = slice(rank * 5 // world, (rank + 1) * 5 // world)
    s, y = torch.randn(5, 3, generator=g), torch.randint(2, (5, 3), generator=g).float()
    maps, gt = torch.randn(5, 3, 4, 4, generator=g), torch.randint(4, (5, 4, 4), generator=g)
    samples = range(rows.start, rows.stop)
    return [finetune.evaluate(lambda i: (a[i:i + 1], b[i:i + 1]), samples, 3, rows, 5, "cpu")
            for a, b in ((s, y), (maps, gt))]


def test_metrics_count_every_sample_once_on_any_number_of_processes(tmp_path):
    one = metrics_of(0, 1)
    assert set(one[0]) == {"mAP micro", "mAP macro"} and set(one[1]) == {"mIoU", "accuracy"}
    assert in_processes(2, tmp_path / "two", metrics_of) == [one, one]


def folder(root, name):
    (root / name).mkdir()
    return root / name


# ---- finetune.py: heads ----

def test_the_fcn_is_the_papers_convolution_after_upsampling():
    """App. B in its own words: concatenate, upsample, 1x1 convolutions, add; the order of the first
    two is free.
    """
    torch.manual_seed(0)
    net = finetune.FCN([decur.resnet("resnet-toy", c) for c in (3, 1)], 5).double().eval()
    x = [torch.randn(2, c, 40, 56, dtype=torch.float64) for c in (3, 1)]
    maps = zip(*(E.stages(x_)[1:] for E, x_ in zip(net.encoders, x)))
    literal = sum(score(F.interpolate(torch.cat(m, 1), (40, 56), mode="bilinear"))
                  for score, m in zip(net.score, maps))
    assert torch.allclose(net(*x), literal, rtol=0, atol=1e-12)


def test_late_fusion_is_one_linear_layer_on_both_features():
    encoders = [decur.resnet("resnet-toy", c) for c in (3, 1)]
    net = finetune.LateFusion(encoders, [128, 128], 12).eval()
    x = [torch.randn(2, c, 32, 32) for c in (3, 1)]
    assert torch.equal(net(*x), net.fc(torch.cat([E(x_) for E, x_ in zip(encoders, x)], 1)))
    assert not net.fc.bias.any()


@pytest.mark.parametrize("name, count", [("mit_b0", 12_130_544), ("mit_b2", 66_581_424)])
def test_cmx_has_the_published_size_and_names(name, count):
    net = finetune.CMX(name, 40)
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == count
    stream = re.compile(r"backbone\.(extra_)?(patch_embed|block|norm)")
    streams = {key for key in state if stream.match(key)}
    mit_keys = decur.mit(name, 3).state_dict().keys()
    assert streams == {f"backbone.{extra}{key}" for extra in ("", "extra_") for key in mit_keys}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    wb, names = ("weight", "bias"), set()
    for s in range(4):
        names |= {f"FRMs.{s}.{kind}_weights.mlp.{i}.{p}" for kind in ("channel", "spatial")
                  for i in (0, 2) for p in wb}
        names |= {f"FFMs.{s}.cross.{part}{i}.{p}" for part in ("channel_proj", "end_proj", "norm")
                  for i in (1, 2) for p in wb}
        names |= {f"FFMs.{s}.cross.cross_attn.kv{i}.weight" for i in (1, 2)}
        names |= {f"FFMs.{s}.channel_emb.residual.weight"}
        names |= {f"FFMs.{s}.channel_emb.channel_embed.{i}.{p}" for i in (0, 1, 3) for p in wb}
        names |= {f"FFMs.{s}.channel_emb.{bn}.{p}" for bn in ("channel_embed.4", "norm")
                  for p in norm}
    head = {f"linear_c{s}.proj.{p}" for s in (1, 2, 3, 4) for p in wb}
    head |= {f"linear_fuse.1.{p}" for p in norm}
    head |= {f"{part}.{p}" for part in ("linear_fuse.0", "linear_pred") for p in wb}
    expected = {f"backbone.{name}" for name in names} | {f"decode_head.{name}" for name in head}
    assert state.keys() - streams == expected


def test_rectification_and_fusion_of_cmx_by_hand():
    """Head by head and stream by stream, from the weights."""
    torch.manual_seed(0)
    C, heads = 8, 2
    a, b = torch.randn(2, 1, C, 3, 5, dtype=torch.float64)
    frm = finetune.FRM(C).double()
    ab = torch.cat((a, b), 1)[0]                                    # 2Cx3x5
    pooled = torch.cat((ab.flatten(1).mean(1), ab.flatten(1).max(1)[0]))
    w = torch.sigmoid(frm.channel_weights["mlp"](pooled))
    m = torch.sigmoid(frm.spatial_weights["mlp"](ab[None]))[0]
    assert torch.allclose(frm(a, b)[0], a + 0.5 * w[C:, None, None] * b + 0.5 * m[1] * b)
    assert torch.allclose(frm(a, b)[1], b + 0.5 * w[:C, None, None] * a + 0.5 * m[0] * a)

    ffm = finetune.FFM(C, heads).double().eval()
    tokens = [t[0].flatten(1).T for t in (a, b)]                    # 15xC
    y, u, G = [], [], []
    for i, t in enumerate(tokens, 1):
        p = torch.relu(ffm.cross[f"channel_proj{i}"](t))
        y.append(p[:, :C]), u.append(p[:, C:])
        kv = ffm.cross["cross_attn"][f"kv{i}"](u[-1])
        parts = [(kv[:, c:c + 4], kv[:, C + c:C + c + 4]) for c in range(0, C, C // heads)]
        G.append([torch.softmax(k.T @ v / 2, 0) for k, v in parts])
    out = []
    for i in (0, 1):
        t = torch.cat([u[i][:, h * 4:h * 4 + 4] @ G[1 - i][h] for h in range(heads)], 1)
        yt = ffm.cross[f"end_proj{i + 1}"](torch.cat((y[i], t), 1))
        out.append(ffm.cross[f"norm{i + 1}"](tokens[i] + yt))
    fused = torch.cat(out, 1).T.view(1, 2 * C, 3, 5)
    emb = ffm.channel_emb
    assert torch.allclose(ffm(a, b),
                          emb["norm"](emb["residual"](fused) + emb["channel_embed"](fused)))


def test_a_pair_of_encoders_and_a_whole_cmx_load_into_cmx(tmp_path):
    """Modality 2 goes to the extra_ stream; what a run of CMX saved is what it loads; BGR turns
    both inputs around.
    """
    E = [decur.mit("mit_b0", 3) for _ in range(2)]
    for k, e in enumerate(E, 1):
        torch.save(e.state_dict(), tmp_path / f"encoder{k}.pth")
    args = finetune.get_args(f"--task nyuv2 --model cmx --backbone mit_b0 --weights "
                             f"{tmp_path}/encoder1.pth {tmp_path}/encoder2.pth".split())[0]
    net = finetune.build(args, [3, 3], 40)[0]
    for key, value in E[1].state_dict().items():
        assert torch.equal(net.state_dict()[f"backbone.extra_{key}"], value)
    torch.save(net.state_dict(), tmp_path / "cmx.pth")
    args.weights = [str(tmp_path / "cmx.pth")]
    again, _, lines = finetune.build(args, [3, 3], 40)
    assert same_weights(net, again) and "all" in lines[0]
    args.bgr = True
    turned = finetune.build(args, [3, 3], 40)[0]
    assert torch.equal(turned.encoders[1].patch_embed1.proj.weight,
                       E[1].patch_embed1.proj.weight.flip(1))
    with pytest.raises(BadInput, match="size mismatch"):
        finetune.build(args, [3, 3], 37)


# ---- finetune.py: samples, augmentation, schedule ----

def test_a_box_takes_image_and_mask_along():
    """Images by the triangle filter, masks by the nearest pixel, mirrored together, outside
    unlabelled and 0.
    """
    mask = torch.arange(1, 49).view(1, 6, 8)
    image = mask[:, None].double().float()
    boxes = [torch.full((1, 1), float(v)) for v in (1, 2, 4, 4, 1)]
    assert torch.equal(finetune.resample(mask, boxes, (4, 4)), mask[:, 1:5, 2:6].flip(2))
    assert torch.allclose(finetune.resample(image, boxes, (4, 4))[:, 0],
                          mask[:, 1:5, 2:6].flip(2).float())
    # CMX's scale 0.5: the frame in the middle
    outside = [torch.full((1, 1), float(v)) for v in (-3, -4, 12, 16, 0)]
    small = finetune.resample(mask, outside, (6, 8))
    assert small[0, 1:4, 2:6].all() and small[0, [0, -1]].sum() == 0
    assert small[0, :, [0, 1, -1]].sum() == 0
    assert finetune.resample(image, outside, (6, 8))[0, 0, 0].sum() == 0
    # CMX's scale 1.75 begins within a pixel: no row of the crop is left without one
    within = [torch.tensor([[v]]) for v in (2 / 1.75, 9 / 1.75, 6 / 1.75, 8 / 1.75, 0)]
    assert torch.allclose(finetune.resample(torch.ones(1, 1, 12, 16), within, (6, 8)),
                          torch.ones(1, 1, 6, 8))


def test_the_boxes_of_cmx_are_its_six_scales():
    draws = data.Draws(0, 400, slice(None))
    draws.restart(0)
    top, left, h, w, mirrored = finetune.cmx_boxes(400, 48, 64, draws)
    assert {round(48 / v, 4) for v in h[:, 0].tolist()} == {0.5, 0.75, 1, 1.25, 1.5, 1.75}
    inside = h <= 48
    assert (top[inside] >= 0).all() and ((top + h)[inside] <= 48 + 1e-9).all()
    assert (left[w <= 64] >= 0).all() and 150 < mirrored.sum() < 250
    assert torch.allclose(top[h == 96], torch.tensor(-24.0).double())


def test_subsets_are_without_replacement_and_lie_in_one_another():
    small, large = finetune.subset(1000, 0.01, 3), finetune.subset(1000, 0.5, 3)
    assert len(set(small)) == 10 and set(small) < set(large) and len(set(large)) == 500
    assert set(finetune.subset(1000, 0.01, 4)) != set(small)
    assert len(finetune.subset(10, 0.01, 0)) == 1


def test_scales_and_mirror_images_are_added_as_probabilities_that_cannot_overflow():
    """CMX's evaluation by its formula; with large logits the largest still wins."""
    net = torch.nn.Conv2d(3, 4, 3, padding=1)
    x, scales = torch.rand(2, 3, 12, 16), (0.75, 1, 1.25)
    expected = 0
    for size in ((9, 12), (12, 16), (15, 20)):
        y = F.interpolate(x, size, mode="bilinear")
        both = (net(y) + net(y.flip(3)).flip(3)).exp()
        expected = expected + F.interpolate(both, (12, 16), mode="bilinear")
    assert torch.allclose(finetune.scores(net, [x], scales), expected)
    large = finetune.scores(lambda x: 100 * (x > 0.5).float() - 20, [x], scales)
    assert large.isfinite().all()
    certain = torch.tensor([45.0, 0, 60]).view(1, 3, 1, 1)
    assert (finetune.scores(lambda x: certain.expand(2, 3, *x.shape[2:]), [x],
                            scales).argmax(1) == 2).all()


def test_random_encoders_get_the_statistics_of_their_batch_norms():
    """The mean over the batches, before they are frozen."""
    E = decur.resnet("resnet-toy", 3)
    net, x = finetune.LateFusion([E], E.dims[-1:], 5), torch.rand(2, 8, 3, 32, 32)
    pretrain.measure_statistics(net, ([x_] for x_ in x))
    assert torch.allclose(E.bn1.running_mean, E.conv1(x.flatten(0, 1)).mean((0, 2, 3)), atol=1e-6)


def test_schedules_are_those_of_app_B_and_of_cmx():
    def rates(name, at, steps):
        return [finetune.schedule(name, step, steps) for step in at]

    assert rates("steps", (0, 59, 60, 79, 80, 99), 100) == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates("warm poly", (0, 500, 1000, 25000), 50000) == pytest.approx(
        [0, 0.5, 0.98 ** 0.9, 0.5 ** 0.9])
    assert rates("poly", [20000], 40000) == pytest.approx([0.5 ** 0.9])
    assert rates("constant", [9], 9) == [1]


def test_transfer_defaults_are_the_papers():
    """App. B, Transfer learning."""
    wanted = {
        "bigearthnet": dict(model="late", batch_size=256, epochs=100, lr=0.05, weight_decay=0,
                            optimizer="sgd", scale=(0.8, 1)),
        "bigearthnet --linear": dict(lr=0.5, backbone="resnet50", modality=0, size=224),
        "geonrw --linear": dict(model="fcn", batch_size=256, epochs=30, lr=1e-4, weight_decay=0.01,
                                optimizer="adamw", scale=(0.2, 1)),
        "sunrgbd": dict(model="fcn", batch_size=8, steps=40000, epochs=None, lr=0.01,
                        weight_decay=1e-5, optimizer="sgd", modality=1),
        "sunrgbd --model cmx": dict(backbone="mit_b2", batch_size=8, epochs=500, steps=None,
                                    lr=6e-5, modality=0),
        "nyuv2 --model cmx": dict(backbone="mit_b5", steps=50000, weight_decay=0.01,
                                  test_scales=(0.75, 1, 1.25))}
    for flags, settings in wanted.items():
        args = finetune.get_args(["--task", *flags.split(), "--weights", "none"])[0]
        for name, value in settings.items():
            assert getattr(args, name) == value, (flags, name)
    for flags in ("--part common", "--cached", "--model cmx", "--labels 0", "--model late",
                  "--size 15", "--size 31 --backbone mit_b0", "--seed -1", "--epochs -1"):
        with pytest.raises(BadInput, match="expected"):
            finetune.get_args(f"--task geonrw --weights none {flags}".split())


# ---- finetune.py as a program ----

FINE = "--task sunrgbd --toy --size 48 --batch-size 16 --epochs 2"


def finetune_here(flags, monkeypatch):
    """finetune.main() in this process, by its command line.  Returns the results."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", *shlex.split(str(flags))])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        finetune.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out = shlex.split(str(flags))
    file = Path(out[out.index("--out") + 1]) / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_every_head_trains_frozen_and_fine_tuned(tmp_path, monkeypatch, capsys):
    """Frozen encoders keep every bit and are evaluated once; pictures, results and the table line
    are there.
    """
    root = toy(tmp_path / "scenes")
    for model, more in (("late", "--linear"), ("late", "--linear --cached"), ("fcn", ""),
                        ("fcn", "--linear --modality 1"),
                        ("cmx", "--linear --batch-size 8 --epochs 1")):
        out = tmp_path / f"{model}{len(more)}"
        result = finetune_here(f"{FINE} --data {root} --model {model} {more} --weights none "
                               f"--labels 0.7 --save-images 2 --out {out}", monkeypatch)
        assert result["samples"] == 34 and result["test_samples"] == 16
        assert list(result["metrics"]) == (["mAP micro", "mAP macro"] if model == "late"
                                           else ["mIoU", "accuracy"])
        assert all(0 < value < 1 for value in result["metrics"].values())
        ids = (out / "ids.txt").read_text().split()
        assert len(set(ids)) == 34 and set(ids) < set((root / "train.txt").read_text().split())
        assert len(list((out / "images").glob("*.png"))) == 2 and len(log_of(out)) == 4
        assert ("not changed by one bit" in capsys.readouterr().out) == ("--linear" in more)


def test_pictures_have_the_data_sets_colours_and_a_class_a_line(tmp_path):
    """GeoNRW: its own colormap in label, prediction and legend.  BigEarthNet: no colours, names."""
    target = torch.tensor([0, 1, 3, 10]).repeat(1, 4, 1)            # unlabelled, forest, ...
    s = torch.zeros(1, 10, 4, 4)
    s[:, 1] = 1                                                     # water everywhere
    x = [torch.rand(1, 3, 4, 4)]
    finetune.save_pictures(tmp_path, ["map"], target, x, ["aerial"], s, finetune.GEONRW)
    seen = np.array(Image.open(tmp_path / "map.png"))
    side, M, line = 256, 8, 20                                      # a panel's, in pixels
    middle = range(32, side, 64)
    label, pred = (seen[M + line + 128, [k * (side + M) + M + m for m in middle]].tolist()
                   for k in (1, 2))
    colours = [[0, 0, 0], [44, 160, 44], [140, 86, 75], [214, 39, 40]]
    water = [31, 119, 180]
    assert label == colours and pred == 4 * [water]
    legend = [seen[side + line * (j + 1) + 2 * M + 8, M + 6].tolist() for j in range(5)]
    assert legend == [colours[0], colours[1], water, *colours[2:]]

    classes, y = tuple(data.CLASSES19), torch.eye(19)[:1]
    finetune.save_pictures(tmp_path, ["classes"], y, x, ["aerial"], 9 * y - 4, classes)
    sheet = np.array(Image.open(tmp_path / "classes.png"))
    assert len(sheet) == side + 21 * line + 3 * M                   # title, head, 19 classes
    assert (sheet[side + line + M:, -M:] == 255).all()              # no name is cut off


def test_a_frozen_encoder_that_moves_voids_the_run(tmp_path, monkeypatch):
    forward = decur.ResNet.forward

    def moves(self, x):
        self.bn1.running_mean += 1
        return forward(self, x)

    monkeypatch.setattr(decur.ResNet, "forward", moves)
    with pytest.raises(SystemExit, match="frozen encoder has changed"):
        finetune_here(f"{FINE} --data {toy(tmp_path / 'd')} --model late --linear --weights none "
                      f"--out {tmp_path / 'o'}", monkeypatch)
    assert not (tmp_path / "o" / "results.json").exists()


def test_transfer_from_a_checkpoint_its_embedding_and_the_table(tmp_path, monkeypatch, capsys):
    """Weights of pretraining, the parts of the embedding, refused ones; and the table marks what
    was not run.
    """
    root, pre = toy(tmp_path / "scenes", 16, 4), tmp_path / "pre"
    pretrain_here(f"{SMALL} --epochs 1 --data {root} --out {pre}", monkeypatch)
    flags = f"{FINE} --data {root} --model late --linear --cached --weights {pre / 'checkpoint.pt'}"
    whole = finetune_here(f"{flags} --out {tmp_path / 'a'}", monkeypatch)
    sha256 = hashlib.sha256((pre / "checkpoint.pt").read_bytes()).hexdigest()
    assert whole["weights_sha256"] == [sha256]
    assert whole["pretraining"]["method"] == "decur" and whole["settings"]["seed"] == 0
    assert whole["pretraining"]["stopped"] is None
    checkpoint = torch.load(pre / "checkpoint.pt", weights_only=True)
    torch.save(dict(checkpoint, step=0), tmp_path / "cut.pt")
    assert finetune.origin([tmp_path / "cut.pt"])[1]["stopped"] == "at step 0 of 1"
    for part, dims in (("common", 24), ("unique", 8), ("all", 32)):
        finetune_here(f"{flags} --part {part} --out {tmp_path / part}", monkeypatch)
        assert torch.load(tmp_path / part / "checkpoint.pt",
                          weights_only=True)["model"]["fc.weight"].shape == (12, 2 * dims)
    line = ("all dimensions made-up scenes cached epochs 2 batch_size 16 pretraining epochs 1 "
            "pretraining batch_size 16, 100% labels")
    assert line in capsys.readouterr().out      # what is not the default of --toy, and no more
    for name, value, flags, other in (          # the last eight are not the paper's
            ("seed0", 0.79, "", ""), ("seed1", 0.81, "--seed 1", "--seed 1"),
            ("vicreg", 0.7, "", "--method vicreg"), ("kept", 0.1, "--cached", ""),
            ("val", 0.2, "--test-split val", ""), ("short", 0.3, "", "--epochs 5"),
            ("tenth", 0.4, "--labels 0.1", ""), ("slow", 0.5, "", "--lr-bias 0.0004"),
            ("started", 0.6, "", "--weights imagenet"), ("cut", 0.62, "", ""),
            ("narrow", 0.65, "", "--method vicreg --projector 512-512-512")):
        args, _ = finetune.get_args(shlex.split(
            f"--task bigearthnet --linear --labels 0.01 --weights x {flags}"))
        result = dict(whole, **{key: getattr(args, key) for key in (
            "task", "model", "toy", "part", "labels", "modality", "test_split", "seed")},
            metrics={"mAP micro": value},
            pretraining=dict(
                vars(pretrain.get_args(shlex.split(f"--scenario sar-optical {other}"))[0]),
                stopped="at step 1 of 9" if name == "cut" else None),
            settings={key: value for key, value in vars(args).items() if key != "out"})
        (folder(tmp_path, name) / "results.json").write_text(json.dumps(result, default=str))
    names = "seed0 seed1 vicreg kept val short tenth slow started cut narrow common".split()
    finetune_here(f"--table {' '.join(f'{tmp_path}/{name}' for name in names)} --out {tmp_path}",
                  monkeypatch)
    out = capsys.readouterr().out
    assert re.search(r"^DeCUR +80\.0 \+- 1\.4 \(n 2\) \| 79\.4 +not run \| 81\.7", out, re.M)
    assert re.search(r"^VICReg +70\.0 \| 74\.5", out, re.M)
    assert "SimCLR-cross *" in out and "quoted | 49.4" in out and "common dimensions" in out
    others = out[out.index("\nOther runs"):]
    assert all(re.search(line, others) for line in (
        r"cached.* 10\.0", r"test_split val.* 20\.0", r"pretraining epochs 5.* 30\.0",
        r"10% labels.* 40\.0", r"pretraining lr_bias 0\.0004.* 50\.0",
        r"pretraining weights \['imagenet'\].* 60\.0",
        r"pretraining projector 512-512-512.* 65\.0", r"stopped at step 1 of 9.* 62\.0"))
    for weights, reason in ((f"{pre}/encoder1.pth", "1 encoder, expected 2"),
                            (f"{pre}/encoder2.pth {pre}/encoder1.pth",
                             "conv1.weight takes 1 input channels"),
                            (f"{pre}/checkpoint.pt --backbone resnet18",
                             "another shape|unexpected")):
        with pytest.raises(BadInput, match=reason):
            finetune_here(f"{FINE} --data {root} --model late --weights {weights} "
                          f"--out {tmp_path / 'x'}", monkeypatch)


def test_a_stopped_transfer_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    root, whole, broken = toy(tmp_path / "scenes"), tmp_path / "whole", tmp_path / "broken"
    flags = f"{FINE} --data {root} --model fcn --weights none"
    a = finetune_here(f"{flags} --out {whole}", monkeypatch)
    with monkeypatch.context() as patch:        # SIGTERM during the third step
        calls, loss_of = [], finetune.loss_of
        patch.setattr(finetune, "loss_of", lambda *x: (calls.append(1), len(calls) == 3 and os.kill(
            os.getpid(), signal.SIGTERM), loss_of(*x))[-1])
        assert finetune_here(f"{flags} --out {broken}", patch) is None
    assert torch.load(broken / "checkpoint.pt", weights_only=True)["step"] == 3
    b = finetune_here(f"{flags} --out {broken} --resume", monkeypatch)
    assert a["metrics"] == b["metrics"] and log_of(whole) == log_of(broken)
    with pytest.raises(BadInput, match="exists; expected a new --out, or --resume"):
        finetune_here(f"{flags} --out {broken}", monkeypatch)


def test_bad_labels_and_splits_are_named(tmp_path, monkeypatch):
    root = toy(tmp_path / "scenes")

    def refused(flags, reason):
        with pytest.raises(BadInput, match=reason):
            finetune_here(f"{FINE} --data {root} --model fcn --weights none "
                          f"--out {tmp_path / 'o'} {flags}", monkeypatch)

    (root / "none.txt").write_text("")
    refused("--split none", "none.txt is empty")
    refused("--test-split val", "no .*val.txt")
    first = root / "Label" / f"{(root / 'test.txt').read_text().split()[0]}.png"
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(first)
    refused("--epochs 0", rf"{first.name} has the label 77; expected 0 \(unlabelled\) to 13")
    Image.fromarray(np.ones((24, 64), np.uint8)).save(first)
    refused("--epochs 0 --resume",
            rf"{first.name} is a mask of \(24, 64\) pixels for an image of \(48, 64\)")
    for path in (root / "Label").glob("*.png"):
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(path)
    result = finetune_here(f"{FINE} --data {root} --model fcn --weights none "
                           f"--out {tmp_path / 'u'} --epochs 0", monkeypatch)
    assert result["metrics"] == {"mIoU": None, "accuracy": None}
    assert "mIoU undefined" in finetune.line_of(result)


def transfer(rank, world, flags):
    """finetune.main() in the environment that torchrun gives a process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    sys.argv = ["finetune.py", *shlex.split(flags)]
    finetune.main()


def test_two_processes_transfer_as_one(tmp_path, monkeypatch):
    """A frozen probe gives the one-process metric though 2 processes do not divide the 15 test
    samples.
    """
    root = toy(tmp_path / "scenes", held_out=15)
    flags = f"{FINE} --data {root} --model fcn --linear --weights none"
    one = finetune_here(f"{flags} --out {tmp_path / 'one'}", monkeypatch)
    in_processes(2, tmp_path / "results", transfer,
                 f"{flags} --save-images 12 --out {tmp_path / 'two'}")
    assert len(list((tmp_path / "two" / "images").iterdir())) == 12  # 7 are the first process's
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], abs=2e-3)
    assert [row["loss"] for row in log_of(tmp_path / "two")] == pytest.approx(
        [row["loss"] for row in log_of(tmp_path / "one")], rel=1e-4)


# ---- explain.py: Algorithm 2 ----

def tiny_branch(seed=0, channels=2, K=6):
    """An encoder with batch norm and ReLU, and a projector, in evaluation mode."""
    torch.manual_seed(seed)
    f = nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(True),
                      nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(inplace=True),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, K))
    f(torch.randn(32, channels, 8, 8))
    return f.eval().requires_grad_(False).double()


def explained_branch(n=10):
    """Images, a branch, and its outputs as Sec. 7 prepares them."""
    f, x = tiny_branch(), torch.randn(n, 2, 8, 8, dtype=torch.float64)
    z, parts = f(x), dict(common=slice(0, 4), unique=slice(4, 6))
    return x, f, explain.part_means(f, z.mean(0), z.var(0, unbiased=False), parts), parts


def test_alignment_losses_by_hand():
    """Eq. 7 of C_ii = 1, 0, -1; Algorithm 2's range (0, 1) leaves the third out; 4 is the most."""
    a, b = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    z1, z2 = torch.stack((a, a, a), 1), torch.stack((a, b, -a), 1)
    losses, counts = explain.alignment_histogram(z1, z2, bins=2)
    assert torch.allclose(losses, torch.tensor([0.0, 1, 4]), atol=1e-4)
    assert counts.tolist() == [1, 1]
    assert explain.alignment_histogram(z1, z2, bins=4, top=4)[1].tolist() == [1, 1, 0, 1]


def test_alignment_is_the_diagonal_of_C():
    """Algorithm 2 (1) has (on_diag(C) - 1)^2 of Algorithm 1's C."""
    z1, z2 = embeddings(16, 5)[:2]
    C = BN(z1).T @ BN(z2) / 16
    assert torch.allclose(explain.alignment_histogram(z1, z2)[0], (on_diag(C) - 1).pow(2))


def test_affinities_of_equidistant_points_are_equal():
    """t-SNE's P is symmetric with sum 1; at a simplex's corners nobody is nearer than others."""
    P = explain.affinities(3 * torch.eye(12), 4.0)
    assert torch.allclose(P, (1 - torch.eye(12)) / (12 * 11))


def test_affinities_have_the_perplexity_asked_for():
    """Two far groups of 10 points: a perplexity of 5 sees one's own alone, 15 has to see both."""
    x = torch.cat((torch.randn(10, 3), torch.randn(10, 3) + 40))
    near, far = explain.affinities(x, 5.0), explain.affinities(x, 15.0)
    assert near[:10, 10:].sum() < 1e-6 < 1e-2 < far[:10, 10:].sum()
    assert near.isfinite().all() and far.isfinite().all()
    assert explain.affinities(torch.ones(8, 3), 2.0).isfinite().all()


def test_tsne_lays_aligned_dimensions_together_and_unique_ones_apart():
    """Fig. 1: a common dimension lies nearest to its partner, unique ones to their modality's."""
    torch.manual_seed(0)
    common, shared1, shared2 = torch.randn(64, 12), torch.randn(64, 1), torch.randn(64, 1)
    z1, z2 = (torch.cat((common + 0.05 * torch.randn(64, 12), shared + 0.5 * torch.randn(64, 8)), 1)
              for shared in (shared1, shared2))
    y, kl = explain.tsne_vis(z1, z2)
    nearest = explain.distances(y).fill_diagonal_(torch.inf).argmin(1)
    assert y.shape == (40, 2) and 0 < kl < 1
    assert nearest[:12].tolist() == list(range(20, 32))
    assert nearest[20:32].tolist() == list(range(12))
    assert all(12 <= i < 20 for i in nearest[12:20]) and all(32 <= i < 40 for i in nearest[32:])


@pytest.mark.parametrize("channels_last", (False, True))
def test_gradcam_by_hand(channels_last):
    """A head w . mean(A) has the gradient w / hw: sum_k w_k A_k / hw; SegFormer's A is NxhxwxC."""
    w = torch.tensor([[2.0, -1, 0], [0, 1, 1]])
    layer = nn.LayerNorm(3) if channels_last else nn.Conv2d(3, 3, 1)
    x = torch.randn(4, 5, 6, 3) if channels_last else torch.randn(4, 3, 5, 6)
    net = lambda x: layer(x).mean((1, 2) if channels_last else (2, 3)) @ w.T
    A = layer(x).permute(0, 3, 1, 2) if channels_last else layer(x)
    for target in (0, 1):
        expected = torch.einsum("k,nkhw->nhw", w[target], A)[:, None] / 30
        own = explain.gradcam(net, layer, x, target)
        assert torch.allclose(own, expected, atol=1e-6)
        assert torch.equal(explain.gradcam(net, layer, x, target, relu=True), own.relu())
    assert not layer._forward_hooks


def test_batch_statistics_kill_saliency():
    """Why `part_means` holds them constant: features normalised by their own batch sum to 0."""
    x, f, net, _ = explained_branch()
    dead = lambda x: torch.stack([part.mean(1) for part in BN(f(x)).split((4, 2), 1)], 1)
    for saliency in (lambda net: explain.gradcam(net, f[3], x, 0),
                     lambda net: explain.integrated_gradients(net, x)):
        assert saliency(dead).abs().max() < 1e-12 < 1e-4 < saliency(net).abs().max()


def test_saliency_does_not_depend_on_the_batch():
    """Maps of one image at a time are those of all ten; mean and variance are those of all, too."""
    x, f, net, parts = explained_branch()
    for vis in (partial(explain.gradcam_vis, net, f[3], parts),
                partial(explain.IG_vis, net, parts, 3)):
        whole, single = vis(x), [vis(x_) for x_ in x.split(1)]
        for part in parts:
            assert torch.allclose(whole[part], torch.cat([s[part] for s in single]))
    pair = nn.Module()
    pair.f1 = pair.f2 = f
    for B in (3, 10):
        z, ((mean, var), _) = explain.embed(pair, ([x_, x_] for x_ in x.split(B)), 4, 8)
        assert [len(z1) for z1, _ in z] == [4, 4]
        assert torch.allclose(torch.cat([z1 for z1, _ in z]), f(x)[:8])
        assert torch.allclose(mean, f(x).mean(0).float())
        assert torch.allclose(var, f(x).var(0, unbiased=False).float())


def test_integrated_gradients_by_hand():
    """Of w.x they are w (x - x0), of the sum of squares x^2 - x0^2: the midpoint rule is exact."""
    x, w = torch.randn(3, 2, 4, 4), torch.randn(2, 4, 4)
    net = lambda x: torch.stack(((w * x).sum((1, 2, 3)), x.pow(2).sum((1, 2, 3))), 1)
    assert torch.allclose(explain.integrated_gradients(net, x, None, 0, 5), w * x, atol=1e-6)
    assert torch.allclose(explain.integrated_gradients(net, x, None, 1, 5), x.pow(2), atol=1e-5)
    x0 = torch.ones_like(x)
    assert torch.allclose(explain.integrated_gradients(net, x, x0, 0, 1), w * (x - 1), atol=1e-6)
    assert torch.allclose(explain.integrated_gradients(net, x, x0, 1, 1), x.pow(2) - 1, atol=1e-5)


def test_integrated_gradients_are_complete():
    """They sum to net(x) - net(x0), with ReLU's kinks up to an error that steps make smaller."""
    x, _, net, _ = explained_branch()
    gain = (net(x) - net(torch.zeros_like(x)))[:, 1]
    total = [explain.integrated_gradients(net, x, None, 1, steps).sum((1, 2, 3))
             for steps in (4, 256)]
    coarse, fine = ((a - gain).abs().mean() / gain.abs().mean() for a in total)
    assert fine < 1e-3 and fine < coarse / 4
    att = explain.IG_vis(net, dict(common=slice(0, 4), unique=slice(4, 6)), 4, x)
    assert torch.allclose(explain.IG_stat(att)["unique"], att["unique"].mean((2, 3)))  # Nx2


def test_overlap_scores_by_hand():
    """Algorithm 2 (4): min-max of positive parts, product, mean over pixels, log of it + 1e-8."""
    left, right = torch.tensor([[[-3.0, 0], [2, 4]]]), torch.tensor([[[5.0, 0], [5, 10]]])
    assert explain.norm(left).tolist() == [[[0, 0], [0.5, 1]]]
    scores = explain.gradcam_stat(dict(common=left, unique=left), dict(common=right, unique=-right))
    assert torch.allclose(scores["common"], torch.tensor([(0.25 + 1) / 4 + 1e-8]).log())
    assert torch.allclose(scores["unique"], torch.tensor([1e-8]).log())  # no positive part: not NaN


def test_gradcam_looks_after_the_last_convolution():
    """Algorithm 2's last_conv2, never a shortcut; for SegFormer the end of its last stage."""
    for backbone, name in (("resnet-toy", "layer4.0.conv2"), ("resnet18", "layer4.1.conv2"),
                           ("resnet50", "layer4.2.conv3"), ("mit_b0", "norm4")):
        with torch.device("meta"):
            found = explain.layers(decur.branch(backbone, 3, ()).E)
        assert list(found)[-1] == name and not any("downsample" in name for name in found)


def test_retrieval_counts_partners_that_are_nearest():
    """Both directions; the scale of a dimension does not count; unrelated ones are at chance."""
    torch.manual_seed(0)
    z1, z2 = torch.randn(40, 8), torch.randn(40, 8)
    assert explain.retrieval(z1, 3 * z1 + 1) == 1
    assert explain.retrieval(z1, z2) < 0.2
    swapped = z1[[1, 0, *range(2, 40)]]
    assert explain.retrieval(z1, swapped) == pytest.approx(38 / 40)


def test_a_linear_probe_reads_what_is_linear_and_nothing_else():
    """Four classes along two features are read; classes drawn at random, at chance, unseen."""
    torch.manual_seed(0)
    x, noise = torch.randn(400, 6), torch.randint(4, (400,))
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0)
    assert explain.linear_probe(x[:300], y[:300], x[300:], y[300:]) > 0.9
    assert explain.linear_probe(x[:300], noise[:300], x[300:], noise[300:]) < 0.45


def test_the_plain_view_is_the_whole_image_normalised():
    """Any number of channels, uint8 and float: constants stay, the size is S, the mean is kept."""
    x = torch.full((2, 3, 48, 64), 51, dtype=torch.uint8)
    expected = data.normalise(torch.full((2, 3, 32, 32), 0.2), "rgb")
    assert torch.allclose(data.plain(x, "rgb", 32), expected, atol=1e-6)
    z = torch.rand(2, 1, 48, 64)
    expected = data.normalise(z, "depth").mean()
    assert torch.allclose(data.plain(z, "depth", 16).mean(), expected, atol=1e-2)


def test_images_are_shown_as_one_sees_them():
    """Colour and depth as they are; one channel is grey; the normaliser is undone."""
    rgb, depth = torch.rand(1, 3, 4, 5), torch.rand(1, 1, 4, 5)
    for x, name in ((rgb, "rgb"), (depth, "depth")):
        expected = x[0].permute(1, 2, 0).expand(4, 5, 3)
        assert np.allclose(explain.visible(data.normalise(x, name)[0], name), expected, atol=1e-6)


def test_ticks_are_round_and_few():
    """At most six, within the axis."""
    assert explain.ticks(0, 1.5) == [0, 0.5, 1, 1.5]
    assert explain.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    for high in (0.03, 0.7, 9, 64, 130, 5000):
        assert 2 <= len(explain.ticks(0, high)) <= 6 and max(explain.ticks(0, high)) <= high


def explain_here(flags, monkeypatch):
    """explain.main() in this process, by its command line."""
    monkeypatch.setattr(sys, "argv", ["explain.py", *shlex.split(flags)])
    explain.main()


def test_explain_makes_every_picture_and_its_numbers(tmp_path, monkeypatch, capsys):
    """One command; --compare; the same whatever the batch size; without unique dimensions too."""
    root, a, b = toy(tmp_path / "scenes", 32, 8), tmp_path / "a", tmp_path / "b"
    pretrain_here(f"{SMALL} --epochs 1 --data {root} --out {a}", monkeypatch)
    pretrain_here(f"{SMALL} --epochs 1 --data {root} --out {b} --common 1 --no-intra", monkeypatch)
    few = "--steps 2 --tsne-dims 8 --pairs 2"
    explain_here(f"--checkpoint {a}/checkpoint.pt --compare {b}/checkpoint.pt {few}", monkeypatch)
    printed = capsys.readouterr().out
    for name in explain.PICTURES:
        assert f"{a}/explain/{name}.png and .npz" in printed
        with Image.open(a / "explain" / f"{name}.png") as image:
            page = np.array(image)
        page[8:-8, 8:-8] = 255
        assert page.shape[1] <= 1000 and (page == 255).all()  # nothing runs over the page
    numbers = {name: np.load(a / "explain" / f"{name}.npz") for name in explain.PICTURES}
    assert numbers["alignment"]["common"].shape == (2, 24)
    assert numbers["alignment"]["compared"].shape == (2, 32)
    assert numbers["tsne"]["points"].shape == (2, 16, 2)
    assert numbers["gradcam"]["modality2_unique"].shape == (2, 32, 32)
    assert numbers["spatial"]["common"].shape == (32,)
    assert numbers["spectral"]["modality1_common"].shape == (32, 3)
    assert numbers["factors"]["accuracy"].shape == (10, 3)
    drawn = np.load(a / "explain" / "curves.npz")
    assert drawn["step"].tolist() == list(range(1, len(drawn["Lu"]) + 1))
    few += " --only tsne alignment gradcam spatial spectral"
    again = f"--checkpoint {a}/checkpoint.pt {few} --batch-size 5 --out {tmp_path}/c"
    explain_here(again, monkeypatch)
    for name in ("alignment", "gradcam", "spatial", "spectral"):
        again = np.load(tmp_path / "c" / f"{name}.npz")
        assert all(np.allclose(again[key], numbers[name][key], atol=1e-3) for key in again)
    explain_here(f"--checkpoint {b}/checkpoint.pt {few}", monkeypatch)
    assert list(np.load(b / "explain" / "spatial.npz")) == ["common"]


def test_curves_are_drawn_where_the_floor_is_0():
    """N - 1 >= K: all dimensions can be decorrelated, and a logarithmic axis has no place for 0."""
    log = dict(step=[1, 2], loss=[90.0, 0.0], L1=[80.0, 0.0], Lc=[10.0, 0.0], C1=[0, 1], Cc=[0, 1])
    drawn = []
    explain.picture_curves(lambda name, *_, **numbers: drawn.append(name), log, 128, 64, 48, True)
    assert drawn == ["curves"]


def test_a_sweep_is_over_seeds_and_settings(tmp_path, monkeypatch, capsys):
    """One command for runs that differ in a number; a row for each, seeds counted; the picture."""
    root, runs = toy(tmp_path / "scenes", 32, 8), []
    for common, seed in ((0.5, 0), (0.5, 1), (1, 0)):
        runs.append(tmp_path / f"{common}-{seed}")
        pretrain_here(f"{SMALL} --epochs 1 --data {root} --out {runs[-1]} --common {common} "
                      f"--seed {seed}", monkeypatch)
    capsys.readouterr()
    explain_here(f"--sweep {' '.join(map(str, runs))} --out {tmp_path}/sweep", monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed if line.startswith("| ")] == [
        "| run (seeds)", "| common 0.5 (2)", "| common 1.0 (1)", "| random encoder (2)",
        "| supervised encoder (2)"]
    assert re.search(r"\| 0\.\d\d±0\.\d\d / 0\.\d\d±0\.\d\d / 0\.\d\d±0\.\d\d \|", printed[2])
    assert re.search(r"\| 0\.\d\d / - / 0\.\d\d \|", printed[3])
    numbers = np.load(tmp_path / "sweep" / "sweep.npz")
    assert numbers["0.5 rgb unique"].shape == (2, 3) and "1.0 rgb unique" not in numbers
    explain_here(f"--sweep {runs[0]} {runs[1]} --out {tmp_path}/same", monkeypatch)  # but for seeds
    assert capsys.readouterr().out.splitlines()[2].startswith("| decur (2) | ")
    assert not (tmp_path / "same" / "sweep.png").exists()
    explain_here(f"--checkpoint {runs[0]}/checkpoint.pt --only factors", monkeypatch)
    alone = np.load(runs[0] / "explain" / "factors.npz")
    rows = [str(row) for row in alone["rows"]]
    for name in ("rgb, common", "depth, backbone"):             # the same as of one run
        assert np.allclose(alone["accuracy"][rows.index(name)],
                           numbers[f"0.5 {name.replace(',', '')}"][0])
    other = tmp_path / "other"                  # Fig. 3b: settings that are no numbers
    pretrain_here(f"{SMALL} --epochs 1 --data {root} --out {other} --projector 16-32", monkeypatch)
    capsys.readouterr()
    explain_here(f"--sweep {runs[2]} {other} --out {tmp_path}/projector", monkeypatch)
    assert "projector 16-32 common 0.75 (1)" in capsys.readouterr().out
    longer = tmp_path / "longer"                # no unique dimensions in either
    pretrain_here(f"{SMALL} --epochs 2 --data {root} --out {longer} --common 1", monkeypatch)
    explain_here(f"--sweep {runs[2]} {longer} --out {tmp_path}/epochs", monkeypatch)
    assert (tmp_path / "epochs" / "sweep.png").exists()
    capsys.readouterr()
    checkpoint = torch.load(other / "checkpoint.pt", weights_only=True)
    torch.save(dict(checkpoint, step=1), other / "checkpoint.pt")
    explain_here(f"--checkpoint {other}/checkpoint.pt --only alignment", monkeypatch)
    assert "is of a run that was stopped at step 1 of 2" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no factors.csv"):
        explain_here(f"--sweep {runs[0]} --data {write_frames(tmp_path / 'frames', 16)}",
                     monkeypatch)


def test_explain_knows_ones_own_pairs(tmp_path, monkeypatch):
    """The statistics come from the checkpoint, the folders from the run; no factors are known."""
    rng = np.random.default_rng(0)
    for name, shape in (("one", (20, 20, 3)), ("two", (24, 20))):
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    flags = "--scenario custom --backbone resnet-toy --projector 16-16-16 --epochs 1 --size 16"
    pretrain_here(f"{flags} --batch-size 4 --data1 {tmp_path}/one --data2 {tmp_path}/two "
                  f"--out {tmp_path}/out", monkeypatch)
    few = f"--checkpoint {tmp_path}/out/checkpoint.pt --steps 2 --pairs 2"
    explain_here(few, monkeypatch)
    numbers = np.load(tmp_path / "out" / "explain" / "spectral.npz")
    assert numbers["modality1_common"].shape == (8, 3)
    assert numbers["modality2_unique"].shape == (8, 1)
    assert not (tmp_path / "out" / "explain" / "factors.png").exists()
    with pytest.raises(BadInput, match="expected two folders for custom"):
        explain_here(f"{few} --data {tmp_path}/one", monkeypatch)


def test_explain_refuses_what_it_cannot_explain(tmp_path, monkeypatch, capsys):
    """One line each: one encoder, other data, few samples, a layer that is not, those that are."""
    root, out = toy(tmp_path / "scenes", 16, 8), tmp_path / "out"
    pretrain_here(f"{SMALL} --epochs 1 --data {root} --out {out}", monkeypatch)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    one = {name: value for name, value in checkpoint["model"].items() if name.startswith("f1.")}
    torch.save(dict(checkpoint, model=one), tmp_path / "one.pt")  # as of barlowtwins --modality 1
    torch.save(dict(checkpoint, settings=dict(checkpoint["settings"], size=16)), tmp_path / "16.pt")
    (tmp_path / "empty.pt").touch()
    hha = write_frames(tmp_path / "hha", 16)
    (hha / "HHA").symlink_to(hha / "RGB")
    run = f"--checkpoint {out}/checkpoint.pt"
    for flags, words in (
            (f"--checkpoint {tmp_path}/one.pt", "one.pt holds one encoder alone"),
            (f"--checkpoint {tmp_path}/nowhere.pt", "nowhere.pt cannot be used"),
            (f"--checkpoint {tmp_path}/empty.pt", "empty.pt cannot be used"),
            (f"{run} --data {out}", "the checkpoint is of rgbd; no folder"),
            (f"{run} --data {hha} --split all", r"rgb \(3 channels\) and hha .* knows .* depth"),
            (f"{run} --samples 17", "--samples 17 is more than the 16 pairs .* at most 16"),
            (f"{run} --layer layer5", "--layer layer5: .*; there are conv1 .* layer4.0.conv2"),
            (f"{run} --steps 0", "--steps 0: expected 1 or more"),
            (f"{run} --compare {tmp_path}/16.pt", "--compare: size is 16 in"),
            (f"{run} --out {tmp_path}/16.pt/out", "--out .* cannot be written")):
        with pytest.raises(BadInput, match=words) as error:
            explain_here(flags, monkeypatch)
        assert "\n" not in str(error.value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        pretrain.run(partial(explain_here, f"--checkpoint {tmp_path}/nowhere.pt", monkeypatch))
    assert end.value.code == 2
    assert re.fullmatch(r"error: .*nowhere\.pt cannot be used.*\n", capsys.readouterr().err)


def test_readme_commands_parse(monkeypatch):
    """Every `python script.py ...` and torchrun line in the README names flags that exist."""
    readme = (HERE / "README.md").read_text()
    for line in re.findall(r"^ *(?:python|torchrun [^\n]*?)(?= )(.*)$", readme, re.M):
        words = shlex.split(re.sub(r"\$\w+", "0", line.split("#")[0]))  # in a loop
        if words[0] == "pretrain.py":
            pretrain.get_args(words[1:])
        elif words[0] == "finetune.py":
            finetune.get_args(words[1:])
        elif words[0] == "data.py":
            data.get_args(words[1:])
        elif words[0] == "explain.py":
            explain.get_args(words[1:])


def test_readme_names_what_exists():
    """Every `file.name` that the README's map of the paper gives is there."""
    readme = (HERE / "README.md").read_text()
    names = re.findall(r"`(decur|data|pretrain|finetune|explain)\.(\w+)", readme)
    names = [(module, name) for module, name in names if name != "py"]
    assert len(names) > 30
    for module, name in names:
        assert hasattr(globals()[module], name), f"{module}.{name}"
