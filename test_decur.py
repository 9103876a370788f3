"""python -m pytest -q: a few minutes on two CPU cores, no data.  Each name is a true sentence."""
import argparse
import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import urllib.error
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
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

import data
import decur
import explain
import finetune
import pretrain
from data import (augment, BadInput, check_label, hha, named_files, need, open_pairs, read_image,
                  unit)
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


@pytest.mark.parametrize("K", [0, 1, 2, 5])
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
    assert (parts["L1"], parts["L2"], parts["Lc"], parts["Lu"]) == (0, 0, loss, 0)


def test_affine_change_of_z_changes_nothing():
    """BN inside the loss: a dimension's scale (of any sign, one for all) and shift do nothing."""
    z = [view.detach() * 10 for view in embeddings(16, 6)]  # large, so that eps does not matter
    scale, shift = torch.tensor([3.0, -2, 5, 1, 7, -4]), torch.arange(6.0)
    changed = decur_loss(*(view * scale + shift for view in z), 4)[0]
    assert changed.item() == pytest.approx(decur_loss(*z, 4)[0].item(), rel=1e-5)


def test_common_by_unique_blocks_are_free():
    """A unique dimension of modality 1 equal to a common one of 2 costs nothing across the two."""
    z11, _, z21, _ = (view.detach() for view in embeddings(16, 6))
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
        assert "keys matched" in report
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
        assert report == "176 of 176 keys matched"
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
            (decur.mit("mit_b0", 3).state_dict(), "keys missing: conv1.weight"),
            (missing, "1 of 72 keys missing: layer4.0.bn2.bias"),
            (good | {"da1.weight": torch.zeros(2)}, "1 of 72 keys unexpected: da1.weight")):
        with pytest.raises(ValueError, match=words):
            decur.load_encoder(E, state)
    assert all(torch.equal(v, before[k]) for k, v in E.state_dict().items())
    joint = backbone_1_and_2(E, E)
    joint["module.da1_l3.proj.weight"] = torch.zeros(2)  # the authors' deformable attention
    torch.save({"model": joint}, tmp_path / "rda.pth")
    for state in decur.read_weights(tmp_path / "rda.pth", "resnet-toy"):
        with pytest.raises(ValueError, match="1 of 72 keys unexpected: da1_l3.proj.weight"):
            decur.load_encoder(E, state)


@pytest.mark.parametrize("content, words", [
    ({"model": {}, "args": argparse.Namespace(lr=0.2)}, "could run code"),
    ([1, 2], "no state dict"), ({1: torch.zeros(2)}, "no state dict"),
    ({"conv1.weight": "text"}, "conv1.weight is not a tensor of finite numbers"),
    ({"conv1.weight": torch.tensor([math.nan])}, "conv1.weight is not a tensor of finite numbers")])
def test_files_without_weights_or_with_code_are_refused(content, words, tmp_path):
    """weights_only=True: tensors and plain values, no other objects; the message is one line."""
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=words) as error:
        decur.read_weights(tmp_path / "file.pth", "resnet-toy")
    assert "\n" not in str(error.value) and "file.pth" in str(error.value)


def test_what_is_no_file_of_weights_at_all_is_refused(tmp_path):
    (tmp_path / "text.pth").write_text("not weights at all")
    with pytest.raises(ValueError, match="text.pth is damaged"):
        decur.read_weights(tmp_path / "text.pth", "resnet-toy")
    with pytest.raises(ValueError, match="no ImageNet weights for mit_b2"):
        decur.read_weights("imagenet", "mit_b2")
    E = decur.resnet("resnet-toy", 3)
    with pytest.raises(ValueError, match="of another shape: conv1.weight"):
        decur.load_encoder(E, E.state_dict() | {"conv1.weight": torch.tensor(1.0)})


def test_imagenet_weights_are_torchvisions_own_download(monkeypatch):
    """As tensors alone, with its checksum; without a network the message says where it is."""
    def download(url, **kwargs):
        assert kwargs["weights_only"] and kwargs["check_hash"] and "resnet18" in url
        return torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    states = decur.read_weights("imagenet", "resnet18")
    report = decur.load_encoder(decur.resnet("resnet18", 3), *states)
    assert report == "120 of 120 keys matched"

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
        assert report.endswith("BGR turned to RGB")
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
    multiprocessing.set_forkserver_preload([__name__])
    servers = "forkserver" in multiprocessing.get_all_start_methods()
    torch.multiprocessing.start_processes(process, (world, folder, function, *args), nprocs=world,
                                          start_method="forkserver" if servers else "spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def losses_and_gradients(rank, world):
    """Of DeCUR and of all that it is compared with: {name: [loss, gradient of each view]}."""
    results = {}
    for name in pretrain.METHODS:
        joint = embeddings(16, 24, torch.float32)
        z = [view.detach().chunk(world)[rank].requires_grad_() for view in joint]
        gathered = list(map(pretrain.gather, z))
        if name == "decur":
            loss = decur_loss_gram(*gathered, 18)[0]
        else:
            z = z[:2]
            loss = pretrain.COMPARED[name](*gathered[:2])
        loss.backward()
        results[name] = [loss.detach(), *(view.grad / world for view in z)]  # DDP averages: / world
    return results


def three_steps(rank, world):
    """Two branches' parameters after three LARS steps and before, batch norm in evaluation mode."""
    torch.manual_seed(0)
    net = DeCUR("resnet-toy", 3, 1, [16, 16])
    net.eval()
    before = [p.detach().clone() for p in net.parameters()]
    model = pretrain.distributed(net, world, torch.device("cpu"))
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


def step_of_a_checkpoint(rank, world, folders):
    """The line with which a process refuses to go on where the others stand elsewhere."""
    args = pretrain.get_args(["--scenario", "rgbd", "--toy", "--resume", "--workers", "0",
                              "--out", str(folders[rank])])[0]
    run = pretrain.Run(args, [], np.arange(128), 4, pretrain.cosine,
                       (rank, world, torch.device("cpu")))
    net = nn.Linear(2, 2)
    run.checkpoint = None
    with pytest.raises(BadInput, match="is at step 3 for one process, at 0 for another"):
        run.begin(net, pretrain.LARS(net.parameters()), {})
    return torch.ones(1)


def test_processes_that_do_not_see_one_checkpoint_are_refused(tmp_path):
    """As where --out lies on each node's own disk."""
    folders = [tmp_path / "a", tmp_path / "b"]
    folders[0].mkdir()
    torch.save(dict(model={}, settings={}, step=3), folders[0] / "checkpoint.pt")
    assert len(in_processes(2, tmp_path / "w", step_of_a_checkpoint, folders)) == 2


@pytest.mark.parametrize("environment, words", [
    ({"RANK": "7"}, "RANK=7 and WORLD_SIZE=1"), ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x")])
def test_half_an_environment_of_torchrun_is_refused(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=words):
        pretrain.processes()


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



# ---- pretrain.py as a program ----

SMALL = ("--scenario rgbd --split train --size 32 --backbone resnet-toy --projector 32-32-32 "
         "--batch-size 16 --lr 2").split()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """48 made-up rooms for training, 16 for tests."""
    root = tmp_path_factory.mktemp("scenes") / "toy-rgbd"
    data.make_toy("rgbd", root, scenes=48, held_out=16)
    return root


@pytest.fixture(scope="session")
def pretrained(scenes, tmp_path_factory):
    """A run of 16 epochs, 3 steps each, by the command line: its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    flags = [*SMALL, "--epochs", "16", "--data", scenes, "--out", out]
    result = subprocess.run([sys.executable, HERE / "pretrain.py", *flags], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def log_of(out):
    """log.jsonl without speed and waiting, which two equal runs do not share."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("pairs_per_s", "data")} for row in rows]


def flags_of(*more):
    return [str(flag) for flag in (*SMALL, *more)]


def test_pretrain_runs_and_loss_falls(pretrained):
    """Log, settings, checkpoint, encoders that torchvision's names fit; each setting's source."""
    out, printed = pretrained
    for words in ("chance (independent embeddings)", "step 000048/000048", "data ",
                  "lr-bias        0.0048           paper, App. B", "augmentations of depth"):
        assert words in printed
    log = log_of(out)
    assert [row["step"] for row in log] == list(range(1, 49))
    first, last = (sum(row["loss"] for row in rows) for rows in (log[:6], log[-6:]))
    assert last < 0.9 * first
    for row in log:
        assert row["loss"] == pytest.approx(row["L1"] + row["L2"] + row["Lc"] + row["Lu"], rel=1e-5)
    assert json.loads((out / "args.json").read_text())["K"] == 32
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    for k, channels in ((1, 3), (2, 1)):
        encoder = decur.resnet("resnet-toy", channels)
        encoder.load_state_dict(torch.load(out / f"encoder{k}.pth", weights_only=True))
        assert torch.equal(encoder.conv1.weight, checkpoint["model"][f"f{k}.E.conv1.weight"])
        about = json.loads((out / f"encoder{k}.json").read_text())
        assert about["sees"]["bands"] == (["depth"] if k == 2 else ["red", "green", "blue"])
        assert about["sha256"] == pretrain.sha256_of(out / f"encoder{k}.pth")


def test_resume_equals_no_interruption(pretrained, scenes, tmp_path):
    """SIGTERM in mid-epoch, then --resume: weights and log of an unbroken run, bit for bit."""
    whole, broken = pretrained[0], tmp_path / "broken"
    flags = flags_of("--epochs", 16, "--data", scenes, "--out", broken)
    process = subprocess.Popen([sys.executable, HERE / "pretrain.py", *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while "step 000004" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "--resume" in process.communicate(timeout=60)[0] and process.returncode == 0
    step = torch.load(broken / "checkpoint.pt", weights_only=True)["step"]
    assert 4 <= step < 48
    with open(broken / "log.jsonl", "a") as file:  # as if killed later, after the checkpoint
        file.write(json.dumps(dict(step=step + 1)) + "\n" + 'garbage\n{"step": ')
    pretrain.main([*flags, "--resume"])
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, broken))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert log_of(whole) == log_of(broken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_heard_once_and_the_second_kills(number):
    run = pretrain.Run.__new__(pretrain.Run)
    run.signalled = False
    run.listen(run.stop)
    os.kill(os.getpid(), number)
    assert run.signalled and signal.getsignal(number) == signal.SIG_DFL
    run.listen(signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_closed_pipe_ends_the_run_saved(scenes, tmp_path):
    """`python pretrain.py ... | head`."""
    flags = flags_of("--epochs", 16, "--data", scenes, "--out", tmp_path / "out")
    process = subprocess.Popen([sys.executable, HERE / "pretrain.py", *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "step 000002" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 0 and "Traceback" not in errors
    assert 2 <= torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["step"] < 48


def test_workers_of_any_number_and_start_method_give_the_same_batches(pretrained, scenes, tmp_path):
    """One loader for the whole run; forkserver is Python 3.14's default."""
    flags = flags_of("--epochs", 2, "--data", scenes, "--out", tmp_path / "a")
    pretrain.main(flags)
    program = ("import multiprocessing, sys; multiprocessing.set_start_method('forkserver'); "
               "sys.path.insert(0, sys.argv.pop(1)); import pretrain; pretrain.main()")
    flags = flags_of("--epochs", 2, "--data", scenes, "--out", tmp_path / "b", "--workers", 2)
    script = tmp_path / "script.py"
    script.write_text(f"if __name__ == '__main__':\n    {program}\n")
    subprocess.run([sys.executable, script, HERE, *flags], check=True, capture_output=True)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_resuming_ones_own_pairs_keeps_what_was_measured(scenes, tmp_path, monkeypatch):
    """Else the statistics, measured on another machine, could differ in the last digit."""
    flags = [flag for flag in flags_of("--epochs", 1, "--data1", scenes / "RGB", "--data2",
                                       scenes / "Label", "--out", tmp_path) if flag != "train"]
    flags = ["custom" if flag == "rgbd" else flag for flag in flags if flag != "--split"]
    pretrain.main(flags)
    inputs = pretrain.load_checkpoint(tmp_path / "checkpoint.pt")["settings"]["inputs"]
    monkeypatch.setattr(data, "measured", None)
    pretrain.main([*flags, "--resume"])
    assert pretrain.load_checkpoint(tmp_path / "checkpoint.pt")["settings"]["inputs"] == inputs


def test_a_batch_order_goes_on_where_it_stood_and_ranks_share_it():
    indices = np.arange(10, 20)
    whole = list(pretrain.batch_order(indices, 4, 0, slice(0, 4), 0, 5))
    assert [[epoch for epoch, _ in batch] for batch in whole] == [[0] * 4, [0] * 4, [1] * 4,
                                                                  [1] * 4, [2] * 4]
    assert list(pretrain.batch_order(indices, 4, 0, slice(0, 4), 3, 5)) == whole[3:]
    halves = [pretrain.batch_order(indices, 4, 0, rows, 0, 5) for rows in (slice(2), slice(2, 4))]
    assert [a + b for a, b in zip(*halves)] == whole


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(scenes, tmp_path, monkeypatch):
    calls = []

    def diverges(x, modality, size, draws):
        calls.append(1)
        return data.augment(x, modality, size, draws) * (math.nan if len(calls) > 20 else 1)

    monkeypatch.setattr(pretrain, "augment", diverges)
    flags = flags_of("--epochs", 4, "--data", scenes, "--out", tmp_path / "out",
                     "--save-every", "1e-6")
    with pytest.raises(SystemExit, match=r"the loss is nan by step 6 \(loss nan = L1 nan"):
        pretrain.main(flags)
    checkpoint = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 5 and all(p.isfinite().all() for p in checkpoint["model"].values())


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("flags, words", [
    ("--data nowhere", "no folder nowhere.*--toy"),
    ("--data {scenes} --split val", "no .*val.txt"),
    ("--data {scenes} --batch-size 49", "--batch-size 49 is more than the 48 samples"),
    ("--data {scenes} --projector 32-x", "--projector 32-x: expected widths"),
    ("--data1 x", "--data1: expected it with --scenario custom"),
    ("--bgr", "--bgr: expected it with --weights"),
    ("--modality 1", "--modality 1: expected it with --method barlowtwins"),
    ("--method clip --no-intra", "--no-intra: expected it with --method decur"),
    ("--method clip --common 0.5", "--common 0.5: expected 1 with --method clip"),
    ("--backbone mit_b0 --size 24", "--size 24: expected 32 or more for a mit"),
    ("--data {scenes} --out {scenes}/train.txt/out", "--out .* cannot be written"),
    ("--data {scenes} --weights {one}", "encoders: 1, expected 2"),
    ("--data {scenes} --weights {two} {one}", "1 input channels, this encoder 3"),
    ("--data {scenes} --weights nowhere.pth", "No such file"),
    ("--data {scenes} --weights imagenet", "no ImageNet weights")])
def test_bad_input_is_refused_in_one_line(flags, words, scenes, pretrained, tmp_path):
    """Got, expected, remedy; and nothing is left behind."""
    places = dict(scenes=scenes, one=pretrained[0] / "encoder1.pth",
                  two=pretrained[0] / "encoder2.pth")
    with pytest.raises(BadInput, match=words) as error:
        pretrain.main([*flags_of("--epochs", 1, "--out", tmp_path / "out"),
                       *flags.format(**places).split()])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    ("", "holds a run; expected a new --out, or --resume"),
    ("--resume --epochs 2", "--resume: epochs is 2, but 16 in"),
    ("--resume --epochs 16 --common 0.5", "--resume: common is 0.5, but 0.75 in")])
def test_a_run_is_never_overwritten_unasked(flags, words, scenes, pretrained):
    out = pretrained[0]
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(BadInput, match=words):
        pretrain.main([*flags_of("--data", scenes, "--out", out), *flags.split()])
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:len(whole) // 2], lambda whole: b"", lambda whole: b"text",
    lambda whole: pickle.dumps(Evil()), lambda whole: pickle.dumps([1, 2])])
def test_a_damaged_checkpoint_is_named_and_left_alone(damage, pretrained, scenes, tmp_path):
    content = damage((pretrained[0] / "checkpoint.pt").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(BadInput, match="checkpoint.pt cannot be used .*delete it to begin anew"):
        pretrain.main(flags_of("--data", scenes, "--out", tmp_path, "--resume"))
    assert (tmp_path / "checkpoint.pt").read_bytes() == content


def test_a_flag_out_of_range_is_argparses_error(capsys):
    for flags in ("--common 1.5", "--epochs 0", "--lr 0", "--depth-unit nan", "--depth-unit inf",
                  "--batch-size 1", "--weight-decay 1e300", "--seed -1"):
        with pytest.raises(SystemExit) as error:
            pretrain.get_args([*SMALL, *flags.split()])
        assert error.value.code == 2 and "expected" in capsys.readouterr().err


def test_bad_input_exits_with_code_2_and_one_line(scenes, tmp_path):
    """Also from a loader's worker, which wraps the message in its traceback."""
    root, out = tmp_path / "d", tmp_path / "out"
    for folder in ("RGB", "Depth"):
        (root / folder).mkdir(parents=True)
        for path in sorted((scenes / folder).iterdir())[:32]:
            (root / folder / path.name).write_bytes(path.read_bytes())
    (root / "Depth" / "0007.png").write_bytes(b"not a picture")
    flags = flags_of("--split", "all", "--epochs", 1, "--workers", 1, "--data", root, "--out", out)
    result = subprocess.run([sys.executable, HERE / "pretrain.py", *flags], capture_output=True,
                            text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    words = r"error: .*0007\.png cannot be read as an image \(.*\); copy or download it again"
    assert re.fullmatch(words, result.stderr.splitlines()[-1])
    assert not list(out.glob("checkpoint*"))


def test_torchrun_trains_on_two_cpu_processes(scenes, tmp_path):
    """One code path; the warning about batch norm; the same data for any number of processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               HERE / "pretrain.py"]
    flags = flags_of("--epochs", 1, "--data", scenes, "--out", tmp_path)
    result = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "cannot synchronise batch normalisation" in result.stdout
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3]
    with pytest.raises(BadInput, match="--batch-size 16 is not a multiple of 3 processes; try 15"):
        pretrain.check_batch(16, 48, 3)
    with pytest.raises(BadInput, match="leaves 1 sample to each of 16 processes"):
        pretrain.check_batch(16, 48, 16, least=2)


# ---- pretrain.py: methods, ablations and weights ----

@pytest.mark.parametrize("flags, views", [
    ("--no-intra", 2), ("--common 0 --projector none", 4), ("--method barlowtwins", 2),
    ("--method vicreg", 2), ("--method simclr", 2), ("--method clip", 2),
    ("--method barlowtwins --modality 2", 2)])
def test_every_method_and_ablation_trains_on_the_views_it_uses(flags, views, scenes, tmp_path,
                                                               monkeypatch):
    """Tables 1-4, Fig. 3: one trainer; a modality that is not encoded has no encoder."""
    encoded = []
    forward = decur.ResNet.forward

    def counted(E, x):
        encoded.append(E.channels)
        return forward(E, x)

    monkeypatch.setattr(decur.ResNet, "forward", counted)
    pretrain.main([*flags_of("--epochs", 1, "--data", scenes, "--out", tmp_path), *flags.split()])
    assert len(encoded) == 3 * views            # three steps
    one = "--modality 2" in flags
    assert set(encoded) == ({1} if one else {3, 1})
    written = sorted(path.name for path in tmp_path.glob("encoder*.pth"))
    assert written == (["encoder2.pth"] if one else ["encoder1.pth", "encoder2.pth"])
    settings = json.loads((tmp_path / "encoder2.json").read_text())["settings"]
    assert settings["no_intra"] == ("--no-intra" in flags)


def test_methods_take_the_projector_and_the_rate_that_their_papers_ask_for():
    """SimCLR Sec. 2.3, CLIP Sec. 2.3 and Table 19; App. B for segformers; all others as DeCUR."""
    def settings(flags):
        return pretrain.get_args(f"--scenario rgbd {flags}".split())[0]

    widths = {method: settings(f"--method {method}").widths for method in pretrain.METHODS}
    assert widths == {"decur": [8192] * 3, "barlowtwins": [8192] * 3, "vicreg": [8192] * 3,
                      "simclr": [2048, 128], "clip": [1024]}
    assert settings("--method clip --projector 64-64").widths == [64, 64]
    assert settings("--method clip").out == Path("runs/rgbd-clip")
    args = settings("--backbone mit_b5")
    assert (args.lr, args.lr_bias, args.weight_decay, args.common) == (1e-4, 1e-4, 0.01, 0.75)


def test_segformers_train_with_adamw_that_spares_biases_and_norms_and_resnets_with_lars():
    """App. B: "AdamW optimizer and a learning rate of 1e-4" for SegFormer's; LARS otherwise."""
    net = DeCUR("mit_b0", 3, 1, [32, 32, 32])
    args = pretrain.get_args(["--scenario", "rgbd", "--backbone", "mit_b0"])[0]
    optimizer = pretrain.make_optimizer(net, args)
    decayed, spared = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0)
    names = [name for name, p in net.named_parameters() if p.ndim < 2]
    assert len(spared["params"]) == len(names)
    assert all(name.endswith("bias") or "norm" in name or ".P." in name for name in names)
    args = pretrain.get_args(["--scenario", "rgbd"])[0]
    assert isinstance(pretrain.make_optimizer(net, args), pretrain.LARS)


def test_weights_start_a_run(pretrained, scenes, tmp_path, monkeypatch, capsys):
    """A file with both encoders, or one for each; of another normaliser they say so (faults U4)."""
    first = pretrained[0]
    both, one, two = (first / name for name in ("checkpoint.pt", "encoder1.pth", "encoder2.pth"))
    monkeypatch.setattr(pretrain, "cosine", lambda step, steps: 0)  # a rate of 0: weights stay
    for n, more in enumerate(([both], [one, two], [both, "--method", "barlowtwins",
                                                   "--modality", 2])):
        out = tmp_path / str(n)
        pretrain.main(flags_of("--epochs", 1, "--data", scenes, "--out", out, "--weights", *more))
        printed = capsys.readouterr().out
        assert "72 of 72 keys matched" in printed and "was trained on" not in printed
        a, b = (torch.load(folder / "encoder2.pth", weights_only=True) for folder in (first, out))
        keys = [key for key in a if "running" not in key and "num_batches" not in key]
        assert all(torch.equal(a[key], b[key]) for key in keys)
    args = argparse.Namespace(backbone="resnet-toy", modality=None, bgr=False)
    lines = pretrain.start_from([str(one)], [decur.resnet("resnet-toy", 3)], args, ["hha"])
    assert re.search("was trained on red green blue .* here it sees disparity height angle",
                     lines[1])
    content = bytearray(one.read_bytes())
    content[len(content) // 2] ^= 1             # one flipped bit
    (tmp_path / "encoder1.pth").write_bytes(content)
    (tmp_path / "encoder1.json").write_bytes(one.with_suffix(".json").read_bytes())
    with pytest.raises(BadInput, match="another sha256"):
        pretrain.start_from([str(tmp_path / "encoder1.pth")], [], args, [])


PROGRAM = Path(data.__file__)
_npz = io.BytesIO()
np.savez(_npz, a=np.zeros(3))
NPZ = _npz.getvalue()


def drawn(B, seed=0, rows=slice(None)):
    """Draws of a batch of B at the step `seed`."""
    draws = data.Draws(0, B, rows)
    draws.restart(seed)
    return draws


def save(path, image):
    """An array or a Pillow image as a file whose folder is made first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path)
    return path


# ---- the data order and the augmentations ----

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
        draws = drawn(8, 5, rows)
        views.append([augment(x[rows], "rgb", 24, draws) for _ in range(2)])
    for view in range(2):
        joined = torch.cat([views[1][view], views[2][view]])
        assert torch.allclose(joined, views[0][view], atol=1e-5)
    assert not torch.allclose(views[0][0], views[0][1], atol=0.1)  # two views differ


def test_the_crop_is_an_antialiased_resize_of_a_box_on_a_cpu_and_on_a_device():
    """A device's matrix products against F.interpolate, which a CPU takes; boxes of all sizes."""
    x = torch.rand(4, 5, 20, 24, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0, 1, 20, 23], [3, 2, 7, 9], [5, 0, 15, 24], [1, 1, 4, 4.0]])
    flips = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    cpu = torch.cat([data.resized_box(image[None], 11, *map(int, box), *map(int, flip))
                     for image, box, flip in zip(x, boxes, flips)])
    expected = F.interpolate(x[2:3, :, 5:, :], (11, 11), mode="bilinear", antialias=True).flip(3)
    assert torch.equal(cpu[2:3], expected)
    top, left, h, w = boxes.split(1, 1)
    Wy, Wx = data.triangle_filter(top, h, 20, 11), data.triangle_filter(left, w, 24, 11)
    Wy = torch.where(flips[:, :1, None] > 0, Wy.flip(1), Wy)
    Wx = torch.where(flips[:, 1:, None] > 0, Wx.flip(1), Wx)
    assert (data.separable(x, Wy, Wx) - cpu).abs().max() < 1e-5


def test_crops_cover_the_areas_and_ratios_asked_for_and_half_are_flipped():
    """Ramps in x and y show each box: its sides from the slope, its flip from the sign."""
    B, H, W = 400, 60, 80
    ramp = torch.stack([torch.arange(W).expand(H, W), torch.arange(H)[:, None].expand(H, W)])
    ramp = ramp.expand(B, 2, H, W) / 100
    y = 100 * data.random_resized_crop(ramp, 10, (0.25, 0.5), drawn(B))
    w = (y[:, 0, 5, 7] - y[:, 0, 5, 2]) * 2     # 5 of 10 pixels apart
    h = (y[:, 1, 7, 5] - y[:, 1, 2, 5]) * 2
    area, ratio = (w.abs() * h) / (H * W), w.abs() / h
    assert 0.24 < area.min() < 0.27 and 0.48 < area.max() < 0.51
    assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.37
    assert 0.4 < (w < 0).float().mean() < 0.6


def test_a_box_that_never_fits_becomes_the_largest_centred_one():
    """A strip of 8 x 100 has no box of its whole area within 3/4 and 4/3: 8 x 11 in the middle."""
    x = torch.arange(100.0).expand(1, 1, 8, 100) / 100
    y = data.random_resized_crop(x, 11, (1.0, 1.0), drawn(1))
    assert sorted((100 * y[0, 0, 0]).round().int().tolist()) == list(range(44, 55))


def test_colours_never_wrap():
    """The authors' uint8 arithmetic wrapped bright pixels to dark: 230 * 1.4 -> 66."""
    y = data.random_colour(torch.full((64, 3, 4, 4), 230 / 255), (0.4, 0, 0, 0), 1, 0, drawn(64))
    assert y.min() > 0.5 and y.max() == 1


def test_brightness_contrast_and_saturation_are_torchvisions():
    """One at a time, factors read off a probe image, away from the clamp; float32."""
    x = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    for k, function in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)):
        jitter = [0.0] * 4
        jitter[k] = 0.4
        factors = 1 + 0.4 * (2 * drawn(8, k)(6)[:, 1 + k] - 1)
        y = data.random_colour(x, jitter, 1.0, 0.0, drawn(8, k))
        pairs = zip(x, factors.tolist())
        expected = torch.stack([function(image, factor) for image, factor in pairs])
        assert torch.allclose(y, expected, atol=2e-3)


@pytest.mark.parametrize("C", [2, 3, 13])
def test_grayscale_makes_channels_equal_for_any_number_of_them(C):
    x = torch.rand(4, C, 5, 5)
    y = data.random_colour(x, (0.0,) * 4, 0.0, 1.0, drawn(4))
    assert torch.allclose(y, y[:, :1].expand_as(y), atol=1e-6)
    assert C == 3 or torch.allclose(y[:, 0], x.mean(1), atol=1e-6)


def test_hue_turns_red_into_green_into_blue_and_keeps_grey():
    third = data.hue_rotation(torch.tensor([2 * np.pi / 3]))[0]
    assert torch.allclose(third @ torch.eye(3), torch.eye(3).roll(1, 0), atol=1e-6)
    grey = data.hue_rotation(torch.tensor([0.7]))[0] @ torch.ones(3)
    assert torch.allclose(grey, torch.ones(3), atol=1e-6)


def test_blur_keeps_constants_and_touches_only_the_images_that_draw_it():
    draws = drawn(40)
    x = torch.rand(40, 1, 56, 56, generator=torch.Generator().manual_seed(0))
    x[:, :, :28] = 0.5
    y = data.random_blur(x, 0.5, draws)
    assert torch.allclose(y[:, :, :24], x[:, :, :24], atol=1e-5)  # 8 sigma of <= 0.5 pixels away
    unchanged = (y == x).flatten(1).all(1)
    assert 10 < unchanged.sum() < 30 and data.random_blur(x, 0.0, draws) is x


def test_solarize_inverts_what_is_bright():
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 1, 3)
    solarized = data.random_solarize(x, 1.1, drawn(1)).flatten()
    assert torch.allclose(solarized, torch.tensor([0.2, 0.5, 0.1]))
    assert torch.equal(data.random_solarize(x, 0.0, drawn(1)), x)


def test_what_is_seen_from_above_is_augmented_as_section_4_says():
    """SAR: no jitter, no solarize; DEM: crop, flips; 13 bands stay, in range; half upside down."""
    draws = drawn(400)
    for modality, C, values in (("sar", 2, 1), ("dem", 3, 1), ("ms", 13, 100)):
        draws.restart(1)
        x = augment(torch.full((400, C, 12, 12), 102, dtype=torch.uint8), modality, 8, draws)
        assert x.shape == (400, C, 8, 8) and x.min() >= 0 and x.max() <= 1
        assert len(torch.unique((x * 1000).round())) >= values
        assert values > 1 or (x - 0.4).abs().max() < 1e-5
    ramp = torch.arange(12.0).view(1, 1, 12, 1).expand(400, 3, 12, 12) / 11
    draws.restart(2)
    x = augment(ramp, "dem", 8, draws)
    assert 160 < (x[:, 0, 0, 0] > x[:, 0, -1, 0]).sum() < 240
    grey = augment(torch.rand(400, 13, 12, 12), "ms", 8, draws)
    assert 50 < ((grey - grey[:, :1]).abs().amax((1, 2, 3)) < 1e-5).sum() < 110  # p = 0.2
    sar = torch.rand(400, 2, 12, 12)
    grey = augment(sar, "sar", 8, draws)
    assert 50 < ((grey - grey[:, :1]).abs().amax((1, 2, 3)) < 1e-5).sum() < 110


@pytest.mark.parametrize("x, words", [
    (torch.full((1, 1, 4, 4), 7500.0), "holds 7500 to 7500"),
    (torch.full((1, 1, 4, 4), float("nan")), "holds nan to nan"),
    (torch.full((1, 1, 4, 4), -0.1), "holds -0.1 to -0.1"),
    (torch.zeros(1, 1, 4, 4, dtype=torch.int32), "is of torch.int32"),
    (torch.zeros(1, 1, 4, 4, dtype=torch.uint16), "is of torch.uint16")])
def test_images_are_uint8_or_float_from_0_to_1(x, words):
    """Depth in metres as x gave 60481 once; wherever images enter."""
    for enter in (lambda: data.plain(x, "depth", 4), lambda: data.normalise(x, "depth"),
                  lambda: augment(x, "depth", 4, drawn(1))):
        with pytest.raises(BadInput, match=words):
            enter()


def test_collate_gives_two_views_of_each_modality():
    one, two = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    x1, x2 = (data.both_views(views, "cpu")
              for views in data.collate([([one], [one, two]), ([two], [two, one])]))
    assert x1[0] is x1[1] and x1[0].shape == (2, 1, 2, 2)
    assert torch.equal(x2[0], torch.stack([one, two]))
    assert torch.equal(x2[1], torch.stack([two, one]))


class Epochs(torch.utils.data.Dataset):
    epoch = None

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return self.epoch, i


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_one_loader_serves_all_epochs_of_a_run(context):
    batches = [[(0, 3), (0, 1)], [(1, 2), (1, 9)]]
    loader = DataLoader(data.Samples(Epochs()), batch_sampler=batches, num_workers=1,
                        multiprocessing_context=context, worker_init_fn=data.leave_group)
    assert [torch.stack(batch, 1).tolist() for batch in loader] == [
        [[0, 3], [0, 1]], [[1, 2], [1, 9]]]


class Scenes(Epochs):
    def __init__(self, modalities):
        self.modalities, self.reads = modalities, 0

    def __getitem__(self, i):
        self.reads += 1
        return [torch.full((1, 4, 4), i)], [torch.full((1, 4, 4), self.epoch)]


@pytest.mark.parametrize("modalities, keep, reads", [
    (("rgb", "depth"), True, 5), (("rgb", "depth"), False, 10), (("sar", "ms"), True, 10)])
def test_samples_are_decoded_once_where_seasons_do_not_change(modalities, keep, reads):
    scenes = Scenes(modalities)
    samples = data.Samples(scenes, keep)
    for epoch in (0, 1):
        for i in range(5):
            x1, x2 = samples[epoch, i]
            assert (x1[0] == i).all() and (x2[0] == (0 if reads == 5 else epoch)).all()
    assert scenes.reads == reads
    samples = data.Samples(Scenes(("rgb", "depth")), keep=True)
    samples.room = 2 * 4 * 4 * 8                # of one sample
    assert [samples[0, i][0][0][0, 0, 0] for i in (0, 1, 0, 1)] == [0, 1, 0, 1]
    assert list(samples.decoded) == [0]


# ---- RGB-depth ----

def write_frames(root, n=4, size=(48, 36)):
    """A small folder-form data set: colours and depths that are known."""
    for i in range(n):
        save(root / "RGB" / f"{i}.png", Image.new("RGB", size, (10 * i, 20, 30)))
        depth = np.full(size[::-1], 2000 + 100 * i, np.uint16)
        depth[0, 0], depth[0, 1] = 0, 65535
        save(root / "Depth" / f"{i}.png", depth)
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
    """Names, paths, suffixes, CRLF, second columns, spaces, a BOM, two forms of accents."""
    names = dict.fromkeys(["frame", "frame 1", "frame 2", "0", "2", "caf\u00e9", "a.b"])
    file = tmp_path / "train.txt"
    file.write_bytes("\ufeff2\r\nRGB/0.png\tLabel/0.png\r\n\r\nframe 1\nframe 2\na.b\n"
                     "cafe\u0301.jpg".encode())
    ids = data.read_list(file, names)
    assert ids == ["2", "0", "frame 1", "frame 2", "a.b", "caf\u00e9"]


@pytest.mark.parametrize("text, words", [
    (b"", "is empty"), (b"\xe9\n", "utf-8"), (b"0\n# more\n", "the line '# more'; expected a name"),
    (b"0\n1\n0\n", "names 0 twice"), (b"a\\0\n", "the line"), (None, "no .*train.txt")])
def test_lists_that_name_no_image_show_the_line(text, words, tmp_path):
    if text is not None:
        (tmp_path / "train.txt").write_bytes(text)
    with pytest.raises(BadInput, match=words):
        data.read_list(tmp_path / "train.txt", {"0": 0, "1": 1})


def camera(W=160, H=120):
    return np.array([[W / 2, 0, W / 2], [0, W / 2, H / 2], [0, 0, 1.0]])


def tilted_room(W=160, H=120):
    """Depth in m of a turned camera's room; gravity; planes (floor, ceiling, wall); heights."""
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
        out = hha(z, z, K).astype(float)
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
    filled, masked = hha(z, z, camera()).astype(int), hha(z, raw, camera()).astype(int)
    assert (masked[45:65, 45:85, 2] == 218).all() and (masked[..., 0] == filled[..., 0]).all()
    far = np.ones(z.shape, bool)
    far[30:80, 30:100] = False
    assert (np.abs(masked - filled)[..., 2][far] > 1).mean() < 0.01
    with pytest.raises(ValueError, match="expected metres"):
        hha(z * 1000, z, camera())
    with pytest.raises(ValueError, match="some valid depth"):
        hha(z, np.zeros_like(z), camera())


def write_sunrgbd(root):
    """Two frames of different sensors, sizes, depth in the tree; image's stem is not depth's."""
    rng = np.random.default_rng(0)
    for frame, (H, W), intrinsics in (
            ("kv1/b3dodata/img_0063", (42, 56), "60 0 28\n0 60 21\n0 0 1\n"),
            ("xtion/sun3ddata/hotel/hotel/0000110-1", (44, 59), "60 0 29 0 60 22 0 0 1")):
        place = root / "SUNRGBD" / frame
        rgb = rng.integers(0, 256, (H, W, 3)).astype(np.uint8)
        save(place / "image" / "a.JPG", rgb)
        (place / "intrinsics.txt").write_text(intrinsics)
        mm = (2000 + 5 * np.mgrid[:H, :W].sum(0)).astype(np.uint16)
        raw = (mm << 3 | mm >> 13).astype(np.uint16)  # rotated left by three bits, as published
        save(place / "depth_bfx" / "b_abs.png", raw)
        raw[:4] = 0
        save(place / "depth" / "b_abs.png", raw)
    (root / "train.txt").write_text("/n/fs/sun3d/data/SUNRGBD/kv1/b3dodata/img_0063/\r\n")
    (root / "test.txt").write_text("SUNRGBD/xtion/sun3ddata/hotel/hotel/0000110-1//image/a.JPG\n")
    for k, (H, W) in ((1, (44, 59)), (2, (42, 56))):  # the numbers run through the test list first
        save(root / "labels" / f"img-{k:06d}.png", np.full((H, W), k, np.uint8))


def test_the_raw_sun_rgbd_tree_is_read_once_hha_has_been_there(tmp_path):
    """`hha` goes on where it was stopped.  A sensor's folder may be a link."""
    write_sunrgbd(tmp_path)
    (tmp_path / "SUNRGBD" / "xtion").rename(tmp_path / "away")
    (tmp_path / "SUNRGBD" / "xtion").symlink_to(tmp_path / "away", target_is_directory=True)
    raw = np.array([8 * 2378, 0, 8 * 8100, 1 << 3 | 2], np.uint16)
    for dtype in (np.uint16, np.int32):         # as Pillow before 10.3 gives it
        assert data.sunrgbd_depth(raw.astype(dtype)).tolist() == [2.378, 0.0, 8.0, 8.0]
    assert data.sunrgbd_depth(np.array([2378 << 3 & 65535 | 2378 >> 13], np.int32))[0] == 2.378
    words = "2 names .* its hha/, which `python data.py hha` writes"
    with pytest.raises(BadInput, match=words):
        open_pairs("rgbd", tmp_path, 16)
    data.write_hha(tmp_path, 1, 1000.0)
    frames = data.sunrgbd_frames(tmp_path)
    assert list(frames) == ["kv1/b3dodata/img_0063", "xtion/sun3ddata/hotel/hotel/0000110-1"]
    files = [data.hha_file(image) for image, *_ in frames.values()]
    written = {path: path.stat().st_mtime_ns for path in map(Path, files)}
    data.write_hha(tmp_path, 1, 1000.0)
    again = {path: path.stat().st_mtime_ns for path in map(Path, files)}
    assert written == again and len(written) == 2
    pairs = open_pairs("rgbd", tmp_path, 16)
    assert pairs.modalities == ("rgb", "hha")
    assert [x.shape for x in sum(pairs[1], [])] == [(3, 24, 32)] * 2
    mm = 2000 + 5 * np.mgrid[:42, :56].sum(0)
    raw = np.where(np.arange(42)[:, None] < 4, 0, mm)
    _, (_, written) = pairs.raw(0)
    assert (written.transpose(1, 2, 0) == hha(mm / 1000, raw / 1000, (60, 60, 28, 21))).all()
    for split, label in (("test", 1), ("train", 2)):
        task = open_pairs("sunrgbd", tmp_path, 16, split)
        assert len(task) == 1 and (task[0][2] == label).all() and task[0][2].shape == (24, 32)


def test_hha_of_the_folder_form_fills_holes_from_the_background(tmp_path):
    """A hole gets the farther reading beside it; HHA/ is there once all of it is."""
    row, full = [0, 2, 0, 0, 3, 0.0], [2, 2, 3, 3, 3, 3]
    assert data.filled(np.array([row, [0] * 6])).tolist() == [full, [3] * 6]
    root = write_frames(tmp_path, 3)
    (root / "intrinsics.txt").write_text("48 0 24 0 48 18 0 0 1")
    whole = (root / "Depth" / "2.png").read_bytes()
    save(root / "Depth" / "2.png", np.full((36, 48), 7, np.uint8))
    with pytest.raises(BadInput, match="2.png is uint8 .*16-bit"):
        data.write_hha(root, 1, 1000.0)
    assert not (root / "HHA").exists() and len(os.listdir(root / "HHA.part")) == 2
    assert open_pairs("rgbd", root, 16).modalities == ("rgb", "depth")
    (root / "Depth" / "2.png").write_bytes(whole)
    data.write_hha(root, 1, 1000.0)
    assert open_pairs("rgbd", root, 16).modalities == ("rgb", "hha")
    assert sorted(os.listdir(root)) == ["Depth", "HHA", "RGB", "intrinsics.txt"]
    save(root / "RawDepth" / "0.png", np.full((36, 48), 700, np.uint16))
    shutil.rmtree(root / "HHA")
    with pytest.raises(BadInput, match="2 frames .* not in RawDepth"):
        data.write_hha(root, 1, 1000.0)


@pytest.mark.parametrize("text, words", [
    (None, "write it by hand: the nine numbers fx 0 cx"), ("1 2 3", "cannot be read as the nine"),
    ("inf 0 1 0 1 1 0 0 1", "expected the nine"), ("0 0 1 0 1 1 0 0 1", "fx and fy above 0"),
    ("5 0 nan 0 5 1 0 0 1", "fx and fy above 0")])
def test_a_camera_is_nine_numbers_that_make_sense(text, words, tmp_path):
    if text:
        (tmp_path / "intrinsics.txt").write_text(text)
    with pytest.raises(BadInput, match=words):
        data.read_intrinsics(tmp_path / "intrinsics.txt")


def test_labels_are_indices_within_the_task_and_of_the_size_of_their_image(tmp_path):
    """A palette's index, never its colour; JPEG would make 3 classes 20; 255 has a remedy."""
    indices = np.arange(36 * 48, dtype=np.uint8).reshape(36, 48) % 41
    image = Image.fromarray(indices, "P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    assert (data.read_label(save(tmp_path / "0.png", image)) == indices).all()
    with pytest.raises(BadInput, match="1.png is a RGB PNG; expected class indices"):
        data.read_label(save(tmp_path / "1.png", image.convert("RGB")))
    with pytest.raises(BadInput, match="2.jpg is a L JPEG; expected class indices"):
        data.read_label(save(tmp_path / "2.jpg", indices))
    check_label("m.png", indices, (36, 48), 40)
    with pytest.raises(BadInput, match=r"m.png is a mask of \(36, 48\) pixels for .*\(18, 24\)"):
        check_label("m.png", indices, (18, 24), 40)
    with pytest.raises(BadInput, match=r"label 40; expected 0 \(unlabelled\) to 37"):
        check_label("m.png", torch.from_numpy(indices), (36, 48), 37)
    with pytest.raises(BadInput, match="label 255; .*for 255 write 0"):
        check_label("m.png", np.full((2, 2), 255), (2, 2), 37)


# ---- Sentinel-1 and Sentinel-2 ----

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
    pairs = open_pairs("sar-optical", write_ssl4eo(tmp_path), 8)
    assert pairs.ids == ["0000000", "0000007", "000001"]
    for season, date in enumerate((3, 6, 9, 12)):
        bands = dict(list(pairs.raw(0))[15 * season:15 * season + 15])
        assert tuple(bands) == data.S1 + data.S2
        assert bands["B2"].shape == (1, 12, 12) and bands["B9"].shape == (1, 2, 2)
        assert (bands["B12"] == 100 * date + 14).all()
        x1, x2 = data.stack_bands(pairs.season(0, season))
        assert x1.shape == (2, 12, 12) and x2.dtype == torch.uint8
        expected = [[round((100 * date + k) / 10000 * 255)] for k in range(2, 15)]
        assert [band.unique().tolist() for band in x2] == expected


def test_both_modalities_of_a_view_show_the_same_season(tmp_path):
    """Seasons are functions of (seed, epoch, index), drawn for each view; two need not agree."""
    pairs = open_pairs("sar-optical", write_ssl4eo(tmp_path, ["0000000"]), 8, seed=3)
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
    """Against float64, rounded half up."""
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    y = F.interpolate(torch.from_numpy(x).double()[None], scale_factor=r, mode="bilinear")[0]
    z = data.upsample(x, r)
    assert z.dtype == np.uint8 and (z == (y + 0.5 + 1e-9).floor().numpy()).all()


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
        data.pack(root, root / "packed", 1, flush_every=2)
    assert not (root / "packed").exists()
    data.pack(root, root / "packed", 1, flush_every=2)
    assert calls == [0, 0, 1, 2, 0, 2, 3, 4] and sorted(os.listdir(root / "packed")) == [
        "ids.txt", "season0.npy", "season1.npy", "season2.npy", "season3.npy"]
    packed = data.SSL4EO(root)
    assert packed.packed and not raw.packed
    for epoch in range(2):
        raw.epoch = packed.epoch = epoch
        for i in range(5):
            for a, b in zip(sum(raw[i], []), sum(packed[i], [])):
                assert a.dtype == b.dtype == torch.uint8 and (a == b).all()


@pytest.mark.parametrize("array, words", [
    (np.zeros((2, 4368), np.float32), r"float32 \(2, 4368\); expected bytes"),
    (np.zeros((1, 4368), np.uint8), "a row for each of the 2 ids"),
    (np.zeros((2, 4367), np.uint8), "expected bytes"), (np.zeros(9, np.uint8), "cannot be read"),
    (None, "cannot be read as a packed season")])
def test_packed_seasons_are_checked_when_they_are_opened(array, words, tmp_path):
    """S = 24: 24^2 x 91 / 12 = 4368 bytes a location."""
    (tmp_path / "ids.txt").write_text("0000001\n0000002\n")
    for season in range(4):
        np.save(tmp_path / f"season{season}.npy", np.zeros((2, 4368), np.uint8))
    assert len(data.SSL4EO(tmp_path)) == 2
    data.open_season.cache_clear()
    file = tmp_path / "season3.npy"
    if array is None:
        file.write_bytes(file.read_bytes()[:-1])
    else:
        np.save(file, array)
    with pytest.raises(BadInput, match=words):
        data.SSL4EO(tmp_path)


def test_locations_of_different_sizes_are_not_packed(tmp_path):
    for start, S in ((0, 24), (1, 12)):
        rngs = [np.random.default_rng(0)] * (start + 1)
        list(data.write_satellite(tmp_path / str(S), rngs, 1, S=S))
    for folder in ("s1", "s2c"):
        os.rename(tmp_path / "12" / folder / "0000001", tmp_path / "24" / folder / "0000001")
    with pytest.raises(BadInput, match="0000001 is of another size than 0000000"):
        data.pack(tmp_path / "24", tmp_path / "packed", 1)
    assert not (tmp_path / "packed").exists()


def test_a_damaged_ssl4eo_tree_is_refused_by_name(tmp_path):
    """A missing band, a band of another size, a missing season, a missing partner, v1.1."""
    root = write_ssl4eo(tmp_path / "v1")
    band = next((root / "s2c" / "0000000").glob("*/B9.tif"))
    tifffile.imwrite(band, np.zeros((3, 3), np.uint16))
    with pytest.raises(BadInput, match=r"0000000: B9 has \(3, 3\) pixels, expected \(2, 2\)"):
        [data.SSL4EO(root).season(0, season) for season in range(4)]
    band.unlink()
    with pytest.raises(BadInput, match="B9.tif"):
        [data.SSL4EO(root).season(0, season) for season in range(4)]
    shutil.rmtree(band.parent)
    with pytest.raises(BadInput, match="holds 3 seasons, expected 4"):
        data.SSL4EO(root).season(0, 0)
    shutil.rmtree(root / "s1" / "000001")
    with pytest.raises(BadInput, match="1 samples .* only one of s1 and s2c .*000001"):
        data.SSL4EO(root)
    (tmp_path / "train" / "S1GRD").mkdir(parents=True)
    (tmp_path / "train" / "S1GRD" / "ssl4eos12_train_seasonal_data_000001.zarr.zip").write_text("")
    with pytest.raises(BadInput, match="v1.1"):
        open_pairs("sar-optical", tmp_path, 8)


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


def test_bigearthnet_gives_both_sensors_an_empty_B10_and_19_classes(tmp_path):
    """Two columns name the pair, one is completed from the S1 patches' json; snow is left out."""
    pairs = write_bigearthnet(tmp_path)
    task = open_pairs("bigearthnet", tmp_path, 8, "train")
    assert task.ids == [s2 for s2, _ in pairs[:2]]
    assert open_pairs("bigearthnet", tmp_path, 8, "val").ids == task.ids[::-1]
    x1, x2, target = task[0]
    assert x1.shape == (2, 12, 12) and x2.shape == (13, 12, 12)
    assert (x2[data.S2.index("B10")] == 0).all() and data.S2.index("B10") == 10
    assert (x2[11] == round((100 + 13) / 10000 * 255)).all()            # B11, after the empty band
    assert target.nonzero()[:, 0].tolist() == [0, 18] and task[1][2].sum() == 0
    assert len(data.CLASSES19) == 19 and len(data.CLASSES43) + len(data.DROPPED43) == 43
    s1, there, away = pairs[0][1], tmp_path / "BigEarthNet-S1-v1.0", tmp_path / "away"
    shutil.move(there / s1, away)               # pairs.csv follows what is unpacked
    with pytest.raises(BadInput, match="1 samples"):
        open_pairs("bigearthnet", tmp_path, 8, "val")
    shutil.move(away, there / s1)
    assert open_pairs("bigearthnet", tmp_path, 8, "val").ids == task.ids[::-1]
    shutil.rmtree(tmp_path / "BigEarthNet-v1.0" / pairs[1][0])
    with pytest.raises(BadInput, match=f"1 samples .*{pairs[1][0]}"):
        open_pairs("bigearthnet", tmp_path, 8, "train")


@pytest.mark.parametrize("file, text, words", [
    ("json", '{"labels": null}', "the labels None; expected a list"), ("json", "5", "holds a int"),
    ("json", '{"labels": ["Moon"]}', "'Moon' is none of"), ("json", "{}", "the labels None"),
    ("json", '{"labels": [3]}', "3 is none of"), ("csv", "a\nb,c\n", "in all lines"),
    ("csv", "a,b\na,c\n", "each once"), ("csv", "a,b,c\n", "expected S2 names")])
def test_lists_and_labels_of_bigearthnet_that_are_none_are_refused(file, text, words, tmp_path):
    (s2, s1), *_ = write_bigearthnet(tmp_path)
    (tmp_path / "train.csv").write_text(f"{s2}, {s1}\n")               # a space does no harm
    if file == "json":
        (tmp_path / "BigEarthNet-v1.0" / s2 / f"{s2}_labels_metadata.json").write_text(text)
    else:
        (tmp_path / "train.csv").write_text(text)
    with pytest.raises(BadInput, match=words):
        open_pairs("bigearthnet", tmp_path, 8, "train")[0]


# ---- GeoNRW ----

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
    both = lambda: [open_pairs(name, tmp_path, 8, "train") for name in ("geonrw", "rgb-dem")]
    tasks = both()
    assert tasks[0].ids == [f"aachen/371_5712_{k}" for k in range(1, 17)]
    assert open_pairs("geonrw", tmp_path, 8, "test").ids[0] == "herne/371_5712_1"
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
        open_pairs("geonrw", tmp_path, 8, "train")


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


def test_a_height_model_of_another_size_is_not_cropped(tmp_path):
    write_geonrw(tmp_path, np.zeros((4, 4), np.float32))
    with pytest.raises(BadInput, match=r"371_5712: .*\(4, 4\).* expected equal sizes"):
        data.crop(tmp_path, tmp_path / "cropped", 1)


# ---- files that would be misread ----

def test_tiff_of_any_layout_is_read_as_CxHxW(tmp_path):
    """Bands last, planes, big-endian, deflate; not LZW."""
    path, rng = tmp_path / "a.tif", np.random.default_rng(0)
    x = rng.integers(0, 60000, (13, 6, 7)).astype(np.uint16)
    tifffile.imwrite(path, x.transpose(1, 2, 0), planarconfig="contig", photometric="minisblack")
    assert (data.read_tiff(path) == x).all()
    tifffile.imwrite(path, x, planarconfig="separate", photometric="minisblack", compression="zlib")
    assert (data.read_tiff(path) == x).all()
    tifffile.imwrite(path, x, byteorder=">", photometric="minisblack")
    assert (data.read_tiff(path) == x).all() and data.read_tiff(path).dtype == np.uint16
    Image.fromarray(x[0]).save(path, compression="tiff_lzw")
    with pytest.raises(BadInput, match="a.tif cannot be read .*pip install imagecodecs"):
        data.read_tiff(path)
    tifffile.imwrite(path, x)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BadInput, match="a.tif cannot be read as a TIFF"):
        data.read_tiff(path)


def test_what_a_tiff_declares_as_no_data_is_nan(tmp_path):
    """GDAL's tag 42113; integers become floats, and a label does not."""
    for x in (np.array([[1, -9999], [3, 4]], np.float32), np.array([[1, 0], [3, 4]], np.uint16)):
        tag = (42113, "s", 0, str(x[0, 1]), True)
        tifffile.imwrite(tmp_path / "a.tif", x, extratags=[tag])
        y = read_image(tmp_path / "a.tif")
        assert y.dtype == np.float32 and np.isnan(y[0]).tolist() == [[False, True], [False, False]]
    assert (data.read_label(tmp_path / "a.tif") == x).all()


def tiff(a, **settings):
    return lambda path: tifffile.imwrite(path, a, **settings)


def npy(a):
    return lambda path: np.save(path, a)


def pages(path):
    with tifffile.TiffWriter(path) as writer:
        for side in (8, 9):
            writer.write(np.zeros((side, side), np.uint8), contiguous=False)


@pytest.mark.parametrize("name, write, words", [
    ("a.png", lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n"), "as an image"),
    ("a.npy", lambda path: path.write_bytes(NPZ), "holds NpzFile"),
    ("a.npy", npy(np.zeros((2, 2), complex)), "complex128 .*expected real"),
    ("a.npy", npy(np.zeros((0, 3))), r"of \(0, 3\)"), ("a.npy", npy(np.zeros(())), r"of \(\)"),
    ("a.npy", npy(np.zeros((2, 2), "S3")), "holds .S3 .*expected real"),
    ("a.npy", npy(np.zeros((2, 2), [("a", int)])), "expected real"),
    ("a.tif", tiff(np.zeros((8, 8), np.complex64)), "complex64 .*expected real"),
    ("a.tif", tiff(np.zeros((32, 32, 13), np.uint16)), "could be HxWxC or CxHxW"),
    ("a.tif", tiff(np.eye(8, dtype=np.uint8), photometric="miniswhite"), "MINISWHITE"),
    ("a.tif", tiff(np.eye(8, dtype=np.uint8), photometric="palette",
                   colormap=np.zeros((3, 256), np.uint16)), "1 PALETTE images"),
    ("a.tif", pages, "2 MINISBLACK images; expected one")])
def test_images_that_would_be_misread_are_refused(name, write, words, tmp_path):
    write(tmp_path / name)
    with pytest.raises(BadInput, match=f"{name} .*{words}"):
        read_image(tmp_path / name)


def test_images_are_read_as_they_are_meant(tmp_path):
    """No alpha; a JPEG turned upright; grey of 16 bits is no colour; too large for Pillow."""
    rgba = np.random.default_rng(0).integers(0, 256, (6, 7, 4)).astype(np.uint8)
    for name in ("a.tif", "a.png"):
        assert (read_image(save(tmp_path / name, rgba)) == rgba[..., :3].transpose(2, 0, 1)).all()
    image, exif = Image.new("RGB", (8, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").shape == (3, 8, 4)
    root = write_frames(tmp_path / "d", 1)
    save(root / "RGB" / "0.png", np.full((36, 48), 8000, np.uint16))
    with pytest.raises(BadInput, match="0.png is a I;16 image; expected colours or grey of 8 bits"):
        data.RGBD(root, 16)[0]
    Image.new("1", (30000, 12000)).save(tmp_path / "c.png")
    with pytest.raises(BadInput, match="exceeds limit.*cut it into tiles"):
        read_image(tmp_path / "c.png")


# ---- names and one's own pairs ----

def write_pairs(root, *names):
    for name in names:
        save(root / name, np.random.default_rng(len(name)).integers(0, 256, (8, 9), np.uint8))


@pytest.mark.parametrize("names1, names2, patterns", [
    (["a/1_rgb.png", "a/2_rgb.png"], ["b/1_depth.png", "b/2_depth.png"], "a/*_rgb b/*_depth"),
    (["a/Ghana_1_S1Hand.png", "a/Peru_2_S1Hand.png"],
     ["a/Ghana_1_S2Hand.png", "a/Peru_2_S2Hand.png"], "a/*_S1Hand a/*_S2Hand"),
    (["a/R_s1_9_p1.png", "a/R_s1_9_p2.png"], ["b/R_s2_9_p1.png", "b/R_s2_9_p2.png"],
     "a/*_s1_* b/*_s2_*"),
    (["a/f-1.color.png", "a/f-2.color.png"], ["b/f-1.depth.png", "b/f-2.depth.png"],
     "a/*.color b/*.depth"),
    (["a/1.png", "a/2.png"], ["b/1_d.png", "b/2_d.png"], "a/* b/*_d")])
def test_names_that_differ_by_a_fixed_part_pair_by_patterns(names1, names2, patterns, tmp_path):
    """The five forms of real paired sets; without patterns the error gives them."""
    write_pairs(tmp_path, *names1, *names2)
    where = [f"{tmp_path}/{pattern}.png" for pattern in patterns.split()]
    pairs = open_pairs("custom", where, 8)
    assert len(pairs) == 2 and pairs[1][0][0].shape == (1, 8, 9)
    folders = [os.path.dirname(pattern) for pattern in where]
    if folders[0] != folders[1]:
        stems = [re.escape(Path(names[0]).stem) for names in (names1, names2)]
        words = rf"a \['{stems[0]}', .*b \['{stems[1]}', .*patterns like --data1 '.*/a/\*_A.tif'"
        with pytest.raises(BadInput, match=words):
            open_pairs("custom", folders, 8)


def test_stars_also_stand_for_folders_and_names_may_be_written_in_two_ways(tmp_path):
    write_pairs(tmp_path, "s/x1/rgb.png", "s/x2/rgb.png", "s/x1/d.png", "s/x2/d.png")
    files = named_files(f"{tmp_path}/s/*/rgb.png")
    assert list(files) == ["x1", "x2"] and files["x2"] == f"{tmp_path}/s/x2/rgb.png"
    accents = [unicodedata.normalize(form, "\u00e9") for form in ("NFC", "NFD")]
    write_pairs(tmp_path, f"c/{accents[0]}.png", f"d/{accents[1]}.png")
    assert open_pairs("custom", (tmp_path / "c", tmp_path / "d"), 8).ids == ["\u00e9"]


@pytest.mark.parametrize("where, words", [
    (("a/", "b/../a"), "two different folders"), (("a/*.png", "b/*_*.png"), "as many stars"),
    (("a", "nowhere"), "no image .*nowhere"), (("a", "b/*.tif"), "no image .*b/.*tif"),
    (("twice", "a"), "1.png, .*1.jpg: one name"), (("a", "c"), r"1 names .*\[\].*3 in both")])
def test_folders_that_do_not_pair_are_refused(where, words, tmp_path):
    write_pairs(tmp_path, "a/1.png", "a/2.png", "a/3.png", "b/1_x.png", "twice/1.png",
                "twice/1.jpg", "c/1.png", "c/2.png", "c/3.png", "c/4.png")
    with pytest.raises(BadInput, match=words):
        open_pairs("custom", [str(tmp_path / folder) for folder in where], 8)


def test_a_hundred_thousand_names_are_opened_in_a_second(tmp_path):
    for folder in ("RGB", "Depth"):
        (tmp_path / folder).mkdir()
        for i in range(10000):
            (tmp_path / folder / f"{i}.png").touch()
    start = time.process_time()
    assert len(data.RGBD(tmp_path, 16)) == 10000
    assert time.process_time() - start < 0.2    # 0.05 here


def test_ones_own_pairs_are_measured_and_brought_to_0_to_1(tmp_path):
    """npy of 2 channels, one constant, a NaN; PNG and TIFF of 8 bits; a list; kept statistics."""
    rng, (one, two) = np.random.default_rng(0), (tmp_path / "one", tmp_path / "two")
    one.mkdir()
    arrays = [np.stack([rng.normal(1000, 50, (8, 9)), np.full((8, 9), 7)]).astype(np.float32)
              for _ in range(4)]
    arrays[2][0, 0, 0] = np.nan
    for i, a in enumerate(arrays):
        np.save(one / f"{i}.npy", a if i else a.transpose(1, 2, 0))
        save(two / f"{i}.{'PNG' if i % 2 else 'TIF'}", rng.integers(0, 256, (8, 9, 3), np.uint8))
    pairs = open_pairs("custom", (one, two), 8)
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
    x = torch.stack([unit(pairs[i][1][0]) for i in range(4)])
    assert data.normalise(x, "custom2").mean().abs() < 0.5
    (tmp_path / "list.txt").write_text("3\n0\n")
    rows = [dict(row1, raw_mean=[900.0, 7.0]), row2]
    kept = open_pairs("custom", (one, two), 8, tmp_path / "list.txt", rows=rows)
    assert kept.ids == ["3", "0"] and kept.rows == rows


@pytest.mark.parametrize("a, words", [
    (np.zeros((1, 8, 9), np.float32), r"\(.float32., 1, 8, 9\).*expected \(.float32., 2, 8, 9\)"),
    (np.zeros((2, 8, 8), np.float32), r"\(.float32., 2, 8, 8\)"),
    (np.zeros((2, 8, 9), np.float64), r"\(.float64., 2")])
def test_ones_own_images_are_like_the_first_of_their_folder(a, words, tmp_path):
    write_pairs(tmp_path, "two/0.png", "two/1.png")
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "0.npy", np.ones((2, 8, 9), np.float32))
    np.save(tmp_path / "one" / "1.npy", a)
    with pytest.raises(BadInput, match=f"1.npy .*{words}"):
        open_pairs("custom", (tmp_path / "one", tmp_path / "two"), 8)


# ---- made-up scenes ----

def test_made_up_scenes_are_seeded_and_hold_what_factors_csv_says(tmp_path):
    """The common object is nearer than the wall, bright; no painting in depth, no pane in RGB."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        data.make_toy("rgbd", folder, 6, 2)
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


@pytest.mark.parametrize("shape", data.SHAPES)
def test_shapes_have_the_same_area(shape):
    """Otherwise mean brightness would give the factor away; 4 in units of the shape's radius."""
    v, u = (np.mgrid[0:600, 0:600] - 299.5) / 100
    assert data.draw_shape(shape, u, v).sum() / 1e4 == pytest.approx(4, rel=0.01)


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
    """Else the modalities could agree on that: columns of centres; the same third of the cells."""
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
    data.make_toy(scenario, root, rank=1)       # another process waits until it is there
    train = open_pairs(scenario, root, 32, "train")
    assert len(train) == 16 and [len(x) for x in sum(train[0], [])] == shapes
    rows = {row["id"]: row for row in csv.DictReader(open(root / "factors.csv"))}
    assert len(rows) == 32 and set(train.ids) <= set(rows)
    name = train.ids[3]
    task = data.GeoNRW(root, "train", classes=13) if scenario == "rgb-dem" else None
    with pytest.raises(BadInput, match="val"):  # there is none, and it is not the training set
        open_pairs(scenario, root, 32, "val")
    label = task[3][2].numpy() if task else data.read_label(root / "Label" / f"{name}.png")
    for which, factor in enumerate(("common", "unique1", "unique2")):
        assert (label == 2 + which * len(data.SHAPES) + int(rows[name][factor])).any()


def test_made_up_scenes_do_not_replace_a_file(tmp_path):
    (tmp_path / "toy").touch()
    with pytest.raises(BadInput, match="toy is a file"):
        data.make_toy("rgbd", tmp_path / "toy")


# ---- what the network sees, and the commands ----

def test_images_are_shown_as_one_sees_them():
    """Colours as they are; depth is stretched and grey, 13 bands are not white."""
    rgb, depth = torch.rand(1, 3, 4, 5), torch.rand(1, 1, 9, 9) * 0.1
    x = data.visible(data.normalise(rgb, "rgb")[0], "rgb")
    assert np.allclose(x, rgb[0].permute(1, 2, 0), atol=1e-6)
    x = data.visible(data.normalise(depth, "depth")[0], "depth")
    assert x.shape == (9, 9, 3) and x.min() == 0 and x.max() == 1 and (x[..., 0] == x[..., 2]).all()
    x = data.visible(torch.rand(13, 9, 9) * 0.1 + 0.9, "ms")
    assert 0.3 < x.mean() < 0.7


def wrong_depth_unit(root):
    """5000 steps a metre, read at 1000: 1.5 m looks like 7.5 m, 2.5 m like 12.5 m."""
    z = np.linspace(0.5, 2.5, 36)[:, None].repeat(48, 1)
    for i in range(3):
        rgb = np.random.default_rng(i).integers(0, 256, (36, 48, 3), np.uint8)
        save(root / "RGB" / f"{i}.png", rgb)
        save(root / "Depth" / f"{i}.png", (5000 * z).astype(np.uint16))
    return open_pairs("rgbd", root, 16)


def linear_s1(root):
    """S1 in linear power: all of it is beyond the range in dB."""
    write_ssl4eo(root, ["0000000"])
    for path in root.glob("s1/*/*/*.tif"):
        tifffile.imwrite(path, np.full((12, 12), 0.1, np.float32))
    return open_pairs("sar-optical", root, 8)


def undeclared_no_data(root):
    """-9999 in a tenth of the pixels, which a declaration would turn to NaN."""
    x = np.random.default_rng(0).normal(5, 1, (8, 40, 40)).astype(np.float32)
    x[:, :4] = -9999
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(8):
            np.save(root / name / f"{i}.npy", x[i])
    return open_pairs("custom", (root / "a", root / "b"), 8)


@pytest.mark.parametrize("write, words", [
    (wrong_depth_unit, r"depth: 2\d % beyond 10 m: is --depth-unit 1000 right\?"),
    (lambda root: data.RGBD(write_frames(root), 16, depth_unit=10000.0),
     "depth: half of the values lie from 0.02"),
    (linear_s1, "sar: 100 % beyond .*in dB"),
    (undeclared_no_data, "custom1: half of the values .*: is a `no data` value")])
def test_inputs_that_look_wrong_are_told(write, words, tmp_path):
    lines = data.input_warnings(write(tmp_path))
    assert re.match(words, lines[0]), lines


@pytest.mark.parametrize("scenario", ["rgbd", "rgb-dem", "sar-optical"])
def test_made_up_scenes_look_right(scenario, tmp_path):
    data.make_toy(scenario, tmp_path / "toy", 16, 16)
    assert data.input_warnings(open_pairs(scenario, tmp_path / "toy", 32)) == []


def checked(flags, capsys):
    """`data.py check` in this process -> its exit code and what it printed."""
    with pytest.raises(SystemExit) as error:
        data.main(["check", "--workers", "1", "--size", "16", *map(str, flags)])
    return error.value.code, capsys.readouterr().out


def test_check_counts_names_what_is_bad_and_draws_what_the_network_sees(tmp_path, capsys):
    """Code 1 and bad-ids.txt: a truncated file, a missing partner; then 0 and the contact sheet."""
    root, out = tmp_path / "data", tmp_path / "out"
    list(data.write_satellite(root, [np.random.default_rng(i) for i in range(4)], 4, S=24))
    flags = "--scenario", "sar-optical", "--data", root, "--out", out
    file = next((root / "s1" / "0000001").glob("*/VH.tif"))
    whole = file.read_bytes()
    file.write_bytes(whole[:500])
    os.rename(root / "s2c" / "0000003", tmp_path / "away")
    code, text = checked(flags, capsys)
    bad = (out / "bad-ids.txt").read_text().splitlines()
    assert code == 1 and len(bad) == 2 and bad[0] == "0000003\tno partner"
    assert bad[1].startswith("0000001\t") and "VH.tif" in bad[1]
    assert "3 samples read, 2 bad, of which 1 without a partner" in text
    assert "1 such as 0000003: no partner" in text and "1 such as 0000001: " in text
    file.write_bytes(whole)
    os.rename(tmp_path / "away", root / "s2c" / "0000003")
    code, text = checked(flags, capsys)
    assert code == 0 and "missing: VV 0.0%, VH 0.0%, B1 0.0%" in text and "bad-ids" not in text
    assert re.search(r"sar VV +-2\d\.\d+ +-1\d\.\d+ .* dB\n", text)  # the villages stand at -14
    assert re.search(r"\nms B8A +0\.\d+ .* reflectance\n", text)
    assert Image.open(out / "contact-sheet.png").size == (4 * 16, 4 * 16)


def test_check_reads_labels_as_transfer_will(tmp_path, capsys):
    """A class beyond the task's, a mask of another size, no label, a name that is no utf-8."""
    root = write_frames(tmp_path / "d")
    for name, value, size in (("0", 37, (48, 36)), ("1", 38, (48, 36)), ("2", 1, (24, 18))):
        save(root / "Label" / f"{name}.png", Image.new("L", size, value))
    for folder in ("RGB", "Depth", "Label"):
        path = os.fsencode(root / folder / "0.png")
        shutil.copy(path, path.replace(b"0.png", b"\xff.png"))
    flags = "--task", "sunrgbd", "--split", "all", "--data", root, "--out", tmp_path / "out"
    code, text = checked(flags, capsys)
    bad = (tmp_path / "out" / "bad-ids.txt").read_text()
    assert code == 1 and bad.count("\n") == 3 and "3\tno partner" in bad
    assert "1.png has the label 38; expected 0 (unlabelled) to 37" in bad and "is a mask of" in bad


def test_check_of_ones_own_pairs_finds_what_holds_nothing_and_what_is_squeezed(tmp_path, capsys):
    for i, fill in enumerate((1, 1, np.nan)):
        for name, width in (("one", 16), ("two", 12)):
            (tmp_path / name).mkdir(exist_ok=True)
            noise = np.random.default_rng(i).random((9, width, 4)).astype(np.float32)
            np.save(tmp_path / name / f"{i}.npy", noise * fill)
    (tmp_path / "one" / "._0.npy").write_bytes(b"of another system")
    flags = ("--scenario", "custom", "--data1", tmp_path / "one", "--data2", tmp_path / "two")
    code, text = checked((*flags, "--out", tmp_path / "out"), capsys)
    assert code == 1 and "3 samples read, 1 bad" in text and text.count("custom1 channel") == 4
    assert "2 pairs differ in width / height" in text and "1.78 and 1.33" in text
    assert "not one finite value" in (tmp_path / "out" / "bad-ids.txt").read_text()


@pytest.mark.parametrize("flags, words", [
    ("check", "--scenario or --task"), ("check --scenario custom --data1 x", "--data1 and --data2"),
    ("check --scenario custom --data1 x --data2 y --data z", "--data1 and --data2"),
    ("check --scenario rgbd --data1 x --data2 y", "--data1 and --data2"),
    ("toy --scenario rgbd --out .", "exists; expected a new --out"),
    ("pack --data nowhere", "no folder nowhere"), ("crop --data nowhere", "no folder nowhere"),
    ("check --scenario rgb-dem --data ~/nowhere", "no folder /.*/nowhere")])
def test_flags_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(BadInput, match=words):
        data.main(flags.split())


@pytest.mark.parametrize("unit", ["0", "-1", "inf", "nan", "1e-300", "x"])
def test_a_depth_unit_is_a_finite_number_above_0(unit, capsys):
    with pytest.raises(SystemExit):
        data.main(["hha", "--depth-unit", unit])
    assert f"{unit}: expected 0.001 to" in capsys.readouterr().err


# ---- what the scripts share ----

def kill_me(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_line_and_not_a_wait(capsys):
    with pytest.raises(SystemExit) as error:
        data.guarded(lambda: list(data.in_processes(kill_me, range(8), 2, "test")))
    assert error.value.code == 2 and "was killed: out of memory?" in capsys.readouterr().err


def leave_a_file(folder, job):
    (folder / str(job)).touch()
    return job


def test_processes_do_not_run_ahead_of_who_takes_their_results(tmp_path):
    results = iter(data.in_processes(partial(leave_a_file, tmp_path), range(100), 2, "test"))
    assert next(results) == 0
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) < 10
    assert list(results) == list(range(1, 100)) and len(list(tmp_path.iterdir())) == 100


def test_processes_end_with_their_parent(tmp_path):
    """`pack` killed: its workers notice within seconds."""
    program = ("import data, functools, test_data\n"
               "list(data.in_processes(test_data.leave_its_number, range(1000), 2, 'test'))")
    folder = os.pathsep.join([str(PROGRAM.parent), str(Path(__file__).parent)])
    program = program.replace("test_data", Path(__file__).stem)
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": folder})
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    for _ in range(150):
        if not any(is_running(worker) for worker in workers):
            break
        time.sleep(0.1)
    assert not any(is_running(worker) for worker in workers)


def leave_its_number(job):
    Path(str(os.getpid())).touch()
    time.sleep(0.2)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_files_are_replaced_whole_and_never_through_a_link(tmp_path):
    path, victim = tmp_path / "a.txt", tmp_path / "victim"
    victim.write_text("mine")
    path.write_bytes(b"old")
    (tmp_path / "a.txt.part").symlink_to(victim)
    data.write_text(path, "caf\u00e9 \udcff")
    assert path.read_bytes() == b"caf\xc3\xa9 \\udcff" and victim.read_text() == "mine"

    def full(file):
        file.write(b"half")
        raise RuntimeError("enforce fail at inline_container.cc")  # torch.save's words for it

    def dead(file):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    with pytest.raises(BadInput, match="is the disk full"):
        data.write_atomically(path, full)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        data.write_atomically(path, dead)
    assert path.read_bytes().startswith(b"caf") and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_json_that_is_no_object_is_named(text, tmp_path):
    (tmp_path / "args.json").write_text(text, "latin-1")
    with pytest.raises(BadInput, match="args.json cannot be read as the settings of a run"):
        data.read_json(tmp_path / "args.json", "the settings of a run")


def test_bad_input_is_one_line_and_code_2_also_without_a_proper_stdout(monkeypatch, capsys):
    for stdout in (None, object(), sys.stdout):
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as error:
            data.guarded(lambda: need(False, "got, expected, remedy"))
        assert error.value.code == 2
    assert capsys.readouterr().err == "error: got, expected, remedy\n" * 3


def test_workers_share_the_cores_that_a_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert [data.default_workers(device) for device in ("cpu", "mps", "cuda")] == [0, 0, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert data.default_workers("cuda") == 3


def test_bad_input_in_a_worker_is_one_line(tmp_path, capsys):
    save(tmp_path / "Depth" / "1.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "intrinsics.txt").write_text("4 0 2 0 4 2 0 0 1")
    with pytest.raises(SystemExit):
        data.guarded(lambda: data.main(["hha", "--data", str(tmp_path), "--workers", "2"]))
    assert re.fullmatch(r"error: \S+1.png is uint8 .*16-bit channel\n", capsys.readouterr().err)


def test_where_there_is_no_terminal_progress_is_a_line_every_30_s(capsys):
    with data.progress(total=4, desc="test") as bar:
        for _ in range(4):
            bar.start_t -= 40                   # as if so much time had passed
            bar.last_print_t -= 40
            bar.update()
    lines = capsys.readouterr().err.split()
    assert lines.count("test:") == 4
    list(data.progress(range(4), "test"))
    assert capsys.readouterr().err.strip() == ""


FINE = "--task sunrgbd --toy --size 48 --batch-size 16 --epochs 2"


def fine(flags):
    """finetune.main() by its command line.  Returns the results, if there are any."""
    flags = shlex.split(flags)
    finetune.main(flags)
    file = Path(flags[flags.index("--out") + 1]) / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def losses_of(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_weights(scenes, tmp_path_factory):
    """The checkpoint of a pretraining of three steps; the encoders beside it."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain.main(shlex.split(f"--scenario rgbd --toy --data {scenes} --epochs 1 "
                              f"--batch-size 16 --projector 16-32 --out {out}"))
    return out / "checkpoint.pt"


def transfer_process(rank, world, folder, flags):
    """finetune.main() as one of torchrun's processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=world)
    finetune.main(shlex.split(flags))


# ---- metrics ----

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
    """Micro ranks all decisions; macro is the mean over classes with a positive."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(6 if seed % 2 else 10**6, (20, 4), generator=g).float()  # odd: many ties
    labels = (torch.rand(20, 4, generator=g) < 0.3).float()
    labels[:, 3] = 0
    micro = slow_average_precision(scores.flatten().tolist(), labels.flatten().tolist())
    assert finetune.average_precision(scores, labels) == pytest.approx(micro, rel=1e-12)
    each = [slow_average_precision(scores[:, c].tolist(), labels[:, c].tolist()) for c in range(3)]
    metrics, classes = finetune.ranking_metrics(scores, labels)
    assert metrics == pytest.approx({"mAP micro": micro, "mAP macro": sum(each) / 3}, rel=1e-12)
    assert classes == [*[pytest.approx(value, rel=1e-12) for value in each], None]
    undefined, _ = finetune.ranking_metrics(scores, torch.zeros(20, 4))
    assert undefined == {"mAP micro": None, "mAP macro": None}


@pytest.mark.parametrize("seed", range(4))
def test_iou_and_accuracy_are_counts_of_pixels(seed):
    """Ignored ones count nowhere, a class neither predicted nor labelled is not in the mean."""
    g = torch.Generator().manual_seed(seed)
    pred = torch.randint(4, (2, 9, 9), generator=g)
    gt = torch.randint(-1, 4, (2, 9, 9), generator=g)
    pairs = [(p, t) for p, t in zip(pred.flatten().tolist(), gt.flatten().tolist()) if t != -1]
    ious, recalls = [], []
    for c in range(4):                          # classes 4 and 5 do not occur
        both = sum(p == c and t == c for p, t in pairs)
        ious.append(both / sum(p == c or t == c for p, t in pairs))
        recalls.append(both / sum(t == c for _, t in pairs))
    right = sum(p == t for p, t in pairs) / len(pairs)
    expected = sum(ious) / 4, right
    assert finetune.iou_and_accuracy(pred, gt, 6, -1) == pytest.approx(expected, rel=1e-12)
    assert finetune.iou_and_accuracy(pred, torch.full_like(gt, -1), 6, -1) == (None, None)
    counts = finetune.confusion(pred, gt, 6, -1)
    _, each = finetune.counting_metrics(counts, "segmentation")
    assert each == pytest.approx([*ious, None, None])
    metrics, each = finetune.counting_metrics(counts, "single-label")
    assert metrics == pytest.approx({"accuracy": right, "mean accuracy": sum(recalls) / 4})
    assert each == pytest.approx([*recalls, None, None])


# ---- heads ----

def test_the_fcn_is_the_papers_convolution_after_upsampling():
    """App. B in its own words: concatenate, upsample, 1x1 convolutions, add."""
    torch.manual_seed(0)
    net = finetune.FCN([decur.resnet("resnet-toy", c) for c in (3, 1)], 5).double().eval()
    x = [torch.randn(2, c, 40, 56, dtype=torch.float64) for c in (3, 1)]
    stages = zip(*[E.stages(images)[1:] for E, images in zip(net.encoders, x)])
    literal = 0
    for score, maps in zip(net.score, stages):
        joint = F.interpolate(torch.cat(maps, 1), (40, 56), mode="bilinear")
        literal = literal + score(joint)
    assert torch.allclose(net(*x), literal, rtol=0, atol=1e-12)


def test_late_fusion_is_one_linear_layer_on_both_features():
    encoders = [decur.resnet("resnet-toy", c) for c in (3, 1)]
    net = finetune.LateFusion(encoders, [128, 128], 12).eval()
    x = [torch.randn(2, c, 32, 32) for c in (3, 1)]
    features = torch.cat([E(images) for E, images in zip(encoders, x)], 1)
    assert torch.equal(net(*x), net.fc(features)) and not net.fc.bias.any()
    part = finetune.LateFusion(encoders, [10, 10], 12, slice(10, 20)).eval()
    sliced = torch.cat([features[:, 10:20], features[:, 138:148]], 1)
    assert torch.equal(part(*x), part.fc(sliced))


@pytest.mark.parametrize("name, count", [("mit_b0", 12_130_544), ("mit_b2", 66_581_424)])
def test_cmx_has_the_published_size_and_names(name, count):
    """models.md, section 2: two streams, FRMs, FFMs and the decoder, and nothing else."""
    net = finetune.CMX(name, 40)
    assert sum(p.numel() for p in net.parameters()) == count
    keys = set(net.state_dict())
    streams = {f"backbone.{extra}{key}" for extra in ("", "extra_")
               for key in decur.mit(name, 3).state_dict()}
    wb = r"(weight|bias)"
    norm = rf"({wb}|running_mean|running_var|num_batches_tracked)"
    published = re.compile(rf"""
        backbone\.FRMs\.[0-3]\.(channel|spatial)_weights\.mlp\.[02]\.{wb} |
        backbone\.FFMs\.[0-3]\.cross\.(channel_proj|end_proj|norm)[12]\.{wb} |
        backbone\.FFMs\.[0-3]\.cross\.cross_attn\.kv[12]\.weight |
        backbone\.FFMs\.[0-3]\.channel_emb\.residual\.weight |
        backbone\.FFMs\.[0-3]\.channel_emb\.channel_embed\.[013]\.{wb} |
        backbone\.FFMs\.[0-3]\.channel_emb\.(channel_embed\.4|norm)\.{norm} |
        decode_head\.(linear_c[1-4]\.proj|linear_fuse\.0|linear_pred)\.{wb} |
        decode_head\.linear_fuse\.1\.{norm}""", re.VERBOSE)
    rest = keys - streams
    assert streams < keys and all(published.fullmatch(key) for key in rest)
    assert len(rest) == 4 * (8 + 12 + 2 + 1 + 6 + 10) + 12 + 5


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
        y.append(p[:, :C])
        u.append(p[:, C:])
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
    """Modality 2 goes to the extra_ stream; what CMX saved is what it loads; BGR turns inputs."""
    E = [decur.mit("mit_b0", 3) for _ in range(2)]
    for k, e in enumerate(E, 1):
        torch.save(e.state_dict(), tmp_path / f"{k}.pth")
    args = finetune.get_args(f"--task nyuv2 --model cmx --backbone mit_b0 --weights "
                             f"{tmp_path}/1.pth {tmp_path}/2.pth".split())[0]
    net = finetune.build(args, [3, 3], 40, ("rgb", "hha"))[0]
    for key, value in E[1].state_dict().items():
        assert torch.equal(net.state_dict()[f"backbone.extra_{key}"], value)
    torch.save(net.state_dict(), tmp_path / "cmx.pth")
    args.weights = [str(tmp_path / "cmx.pth")]
    again, lines = finetune.build(args, [3, 3], 40, ("rgb", "hha"))
    assert "all keys" in lines[0]
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in net.state_dict().items())
    args.bgr = True
    turned = finetune.build(args, [3, 3], 40, ("rgb", "hha"))[0].encoders[1].patch_embed1.proj
    assert torch.equal(turned.weight, E[1].patch_embed1.proj.weight.flip(1))
    with pytest.raises(BadInput, match="size mismatch"):
        finetune.build(args, [3, 3], 37, ("rgb", "hha"))


# ---- samples, augmentation, schedule ----

def test_a_box_takes_image_and_mask_along():
    """Mirrored together; outside is 0 and unlabelled."""
    mask = torch.arange(48).view(1, 6, 8)
    image = mask[:, None].float()
    boxes = [torch.full((1, 1), float(v)) for v in (1, 2, 4, 4, 1)]
    assert torch.equal(finetune.resample(mask, boxes, (4, 4)), mask[:, 1:5, 2:6].flip(2))
    assert torch.allclose(finetune.resample(image, boxes, (4, 4))[:, 0],
                          mask[:, 1:5, 2:6].flip(2).float())
    outside = [torch.full((1, 1), float(v)) for v in (-3, -4, 12, 16, 0)]  # CMX's scale 0.5
    small = finetune.resample(mask, outside, (6, 8)) >= 0
    assert small[0, 1:4, 2:6].all() and not small[0, [0, -1]].any()
    assert not small[0, :, [0, 1, -1]].any()
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
    net = nn.Conv2d(3, 4, 3, padding=1)
    x, scales = torch.rand(2, 3, 12, 16), (0.75, 1, 1.25)
    expected = 0
    for size in ((9, 12), (12, 16), (15, 20)):
        y = F.interpolate(x, size, mode="bilinear")
        both = (net(y) + net(y.flip(3)).flip(3)).exp()
        expected = expected + F.interpolate(both, (12, 16), mode="bilinear")
    assert torch.allclose(finetune.scores(net, [x], scales), expected)
    assert finetune.scores(lambda x: 100 * (x > 0.5).float() - 20, [x], scales).isfinite().all()
    certain = torch.tensor([45.0, 0, 60]).view(1, 3, 1, 1)
    large = finetune.scores(lambda x: certain.expand(2, 3, *x.shape[2:]), [x], scales)
    assert (large.argmax(1) == 2).all()


@pytest.mark.parametrize("name, at, steps, rates", [
    ("steps", (0, 59, 60, 79, 80, 99), 100, [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ("warm poly", (0, 500, 1000, 25000), 50000, [0, 0.5, 0.98 ** 0.9, 0.5 ** 0.9]),
    ("poly", [20000], 40000, [0.5 ** 0.9]), ("constant", [9], 9, [1])])
def test_schedules_are_those_of_app_B_and_of_cmx(name, at, steps, rates):
    assert [finetune.schedule(name, step, steps) for step in at] == pytest.approx(rates)


@pytest.mark.parametrize("flags, settings, sources", [
    ("bigearthnet", dict(model="late", batch_size=256, epochs=100, lr=0.05, weight_decay=0,
                         optimizer="sgd", scale=(0.8, 1)), dict(lr="paper, App. B")),
    ("bigearthnet --linear", dict(lr=0.5, backbone="resnet50", modality=0, size=224),
     dict(lr="paper, App. B", size="authors", test_crop="authors")),
    ("geonrw --linear", dict(model="fcn", batch_size=256, epochs=30, lr=1e-4, weight_decay=0.01,
                             optimizer="adamw", scale=(0.2, 1)), dict(schedule="authors")),
    ("sunrgbd", dict(model="fcn", batch_size=8, steps=40000, epochs=None, lr=0.01, modality=1,
                     weight_decay=1e-5, optimizer="sgd"),
     dict(lr="paper, App. B", scale="here: as pretraining", momentum="MMSegmentation, 40k")),
    ("sunrgbd --model cmx", dict(backbone="mit_b2", batch_size=8, epochs=500, steps=None, lr=6e-5,
                                 modality=0), dict(lr="as CMX, NYUv2")),
    ("nyuv2 --model cmx", dict(backbone="mit_b5", steps=50000, weight_decay=0.01,
                               test_scales=(0.75, 1, 1.25)), dict(lr="CMX, NYUv2"))])
def test_transfer_defaults_are_the_papers_and_say_where_they_come_from(flags, settings, sources):
    """App. B, Transfer learning."""
    args, printed, changed = finetune.get_args(f"--task {flags} --weights none".split())
    assert {name: getattr(args, name) for name in settings} == settings and changed == {}
    assert {name: printed[name] for name in sources} == sources


@pytest.mark.parametrize("flags, words", [
    ("--part common", "--linear and late"),
    ("--cached --linear", "late fusion alone"), ("--model cmx", "as fcn"),
    ("--model late", "as fcn"), ("--size 47 --backbone mit_b0", "48 or more"),
    ("--target masks", "--task custom"), ("--task bigearthnet --toy --model fcn", "as late"),
    ("--task custom --data1 a", "--data2 and --target"),
    ("--task sunrgbd --model cmx --backbone resnet50", "expected a mit")])
def test_flags_of_transfer_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(BadInput, match=words):      # the last --task counts
        finetune.get_args(f"--task geonrw --weights none {flags}".split())


# ---- the program ----

@pytest.mark.parametrize("flags", [
    "--model late --linear", "--model late --linear --cached", "--model fcn --save-images 2",
    "--model fcn --linear --modality 1",
    "--model cmx --linear --batch-size 8 --epochs 1 --size 64"])
def test_every_head_trains_frozen_and_fine_tuned(flags, scenes, tmp_path, capsys):
    """Frozen encoders keep every bit.  Sizes that are no multiple of 3 have a canvas, too."""
    out = tmp_path / "out"
    result = fine(f"{FINE} --data {scenes} {flags} --weights none --labels 0.7 --out {out}")
    assert result["samples"] == 34 and result["test_samples"] == 16
    late = "late" in flags
    assert list(result["metrics"]) == (["mAP micro", "mAP macro"] if late else ["mIoU", "accuracy"])
    assert all(0 < value < 1 for value in result["metrics"].values())
    assert len(result["classes"]) == 13 - late
    ids = (out / "ids.txt").read_text().split()
    assert len(set(ids)) == 34 and set(ids) < set((scenes / "train.txt").read_text().split())
    assert len(losses_of(out)) == 4
    assert ("not changed by one bit" in capsys.readouterr().out) == ("--linear" in flags)
    pictures = [np.array(Image.open(path)) for path in out.glob("images/*.png")]
    assert len(pictures) == (2 if "save" in flags else 0)
    for picture in pictures:                    # two inputs, label and prediction, 5 times as large
        assert picture.shape[1] == 5 * 4 * 64 and len(picture) >= 5 * 48 + 2 * 20
        assert len(np.unique(picture[:240, 640:960].reshape(-1, 3), axis=0)) > 2


def test_random_frozen_encoders_have_the_statistics_of_what_they_see(scenes):
    """Of their batch norms, as the mean over the batches."""
    args = finetune.get_args(f"{FINE} --data {scenes} --model late --linear --weights none "
                             f"--workers 0".split())[0]
    (samples, _), _ = finetune.open_task(args, 0)
    net, _ = finetune.build(args, [3, 1], 12, samples.modalities)
    finetune.freeze(net, samples, np.arange(48), args, torch.device("cpu"))
    x = torch.stack([samples[i][0] for i in range(48)])
    E = net.encoders[0]
    seen = E.conv1(data.plain(x, "rgb", 48)).mean((0, 2, 3))
    assert torch.allclose(E.bn1.running_mean, seen, atol=0.01) and seen.abs().max() > 0.1
    assert not any(p.requires_grad for p in net.encoders.parameters())


def test_a_frozen_encoder_that_moves_voids_the_run(scenes, tmp_path, monkeypatch):
    forward = decur.ResNet.forward

    def moves(self, x):
        self.bn1.running_mean += 1
        return forward(self, x)

    monkeypatch.setattr(decur.ResNet, "forward", moves)
    with pytest.raises(SystemExit, match="frozen encoder has changed"):
        fine(f"{FINE} --data {scenes} --model late --linear --weights none --epochs 0 "
             f"--out {tmp_path / 'o'}")
    assert not (tmp_path / "o" / "results.json").exists()


def test_a_stopped_transfer_goes_on_as_if_nothing_had_been(scenes, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = f"{FINE} --data {scenes} --model fcn --weights none"
    a = fine(f"{flags} --out {whole}")
    calls, loss_of = [], finetune.loss_of

    def stopped_in_the_third_step(*x):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_of(*x)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "loss_of", stopped_in_the_third_step)
        assert fine(f"{flags} --out {broken}") is None
    assert torch.load(broken / "checkpoint.pt", weights_only=True)["step"] == 3
    b = fine(f"{flags} --out {broken} --resume")
    assert a["metrics"] == b["metrics"] and losses_of(whole) == losses_of(broken)
    with pytest.raises(BadInput, match="expected a new --out, or --resume"):
        fine(f"{flags} --out {broken}")


def test_two_processes_transfer_as_one(scenes, tmp_path):
    """A frozen probe gives the one-process metric though 2 processes do not divide the 15 test
    samples; every sample counts once.
    """
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    tests = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join(tests[:15]))
    flags = f"{FINE} --data {folder} --model fcn --linear --weights none --save-images 12"
    one = fine(f"{flags} --out {tmp_path / 'one'}")
    multiprocessing.set_forkserver_preload([__name__])
    arguments = 2, tmp_path, f"{flags} --out {tmp_path / 'two'}"
    torch.multiprocessing.start_processes(transfer_process, arguments, 2, start_method="forkserver")
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], abs=2e-3)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    assert len(list((tmp_path / "two" / "images").iterdir())) == 12  # 7 are the first process's


@pytest.mark.parametrize("label, flags, words", [
    (np.full((48, 64), 77), "", r"has the label 77; expected 0 \(unlabelled\) to 13"),
    (np.ones((24, 64)), "", r"is a mask of \(24, 64\) pixels for an image of \(48, 64\)"),
    (np.zeros((48, 64)), "--test-split val", "no .*val.txt"),
    (np.zeros((48, 64)), "", None)])
def test_bad_labels_and_splits_are_named(label, flags, words, scenes, tmp_path):
    """Without any label the metrics are undefined."""
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    for path in (folder / "Label").glob("*.png"):
        Image.fromarray(label.astype(np.uint8)).save(path)
    flags = f"{FINE} --data {folder} --model fcn --weights none --epochs 0 {flags}"
    if words:
        with pytest.raises(BadInput, match=words):
            fine(f"{flags} --out {tmp_path / 'o'}")
    else:
        assert fine(f"{flags} --out {tmp_path / 'o'}")["metrics"] == dict(mIoU=None, accuracy=None)


def test_weights_and_parts_of_the_embedding(tiny_weights, scenes, tmp_path):
    flags = f"{FINE} --data {scenes} --model late --linear --cached --weights"
    whole = fine(f"{flags} {tiny_weights} --out {tmp_path / 'a'}")
    assert whole["weights_sha256"] == [pretrain.sha256_of(tiny_weights)]
    assert whole["pretraining"]["method"] == "decur" and whole["pretraining"]["stopped"] is None
    assert whole["row"] == "late, DeCUR" and whole["changed"] == {
        "batch_size": 16, "epochs": 2, "cached": True, "pretraining epochs": 1,
        "pretraining batch_size": 16, "pretraining projector": "16-32"}
    pair = [tiny_weights.with_name(f"encoder{m}.pth") for m in (1, 2)]
    same = fine(f"{flags} {pair[0]} {pair[1]} --out {tmp_path / 'b'}")
    assert same["metrics"] == whole["metrics"]
    for part, dims in (("common", 24), ("unique", 8), ("all", 32)):
        fine(f"{flags} {tiny_weights} --part {part} --out {tmp_path / part}")
        state = torch.load(tmp_path / part / "checkpoint.pt", weights_only=True)["model"]
        assert state["fc.weight"].shape == (12, 2 * dims)
    for files, reason in ((f"{pair[0]}", "encoders: 1, expected 2"),
                          (f"{pair[1]} {pair[0]}", "conv1.weight takes 1 input channels"),
                          (f"{pair[0]} --part all", "expected a whole checkpoint.pt"),
                          ("results.json", "results.json")):
        with pytest.raises(BadInput, match=reason):
            fine(f"{flags} {files} --out {tmp_path / 'x'}")


# ---- one's own labels ----

@pytest.fixture(scope="session")
def own(scenes, tmp_path_factory):
    """40 pairs of the made-up frames whose names differ by a suffix, with masks and tables."""
    root = tmp_path_factory.mktemp("own")
    names = sorted(path.stem for path in (scenes / "RGB").iterdir())[:40]
    (root / "masks").mkdir()
    factors = dict(line.split(",", 1) for line in (scenes / "factors.csv").read_text().split())
    single, several = ["name,label"], []
    for name in names:
        shutil.copy(scenes / "RGB" / f"{name}.png", root / f"{name}_rgb.png")
        shutil.copy(scenes / "Depth" / f"{name}.png", root / f"{name}_depth.png")
        mask = np.array(Image.open(scenes / "Label" / f"{name}.png"))
        mask = np.where(mask > 1, 7, 0).astype(np.uint8)            # object, and class 0 counts
        mask[:4] = 255
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        shapes = [data.SHAPES[int(factor)] for factor in factors[name].split(",")]
        single.append(f"{name},{shapes[0]}")
        several.append(f"{name},{shapes[1]}, far {shapes[2]}")
    (root / "single.csv").write_text("\ufeff" + "\n".join(single), "utf-8")
    (root / "several.csv").write_text("\n".join(several[:30]) + "\n")
    (root / "tree.csv").write_text("\n".join([*single[1:30], f"{names[29]},tree"]))
    (root / "train").write_text("\n".join(names[:24]))
    (root / "test").write_text("\n".join(names[24:30]))
    (root / "names").write_text("\n".join(f"class {k}" for k in range(8)))
    (root / "two").write_text("road\nring\n")
    return root


def own_flags(root, target, more=""):
    more = more.replace("ROOT", str(root))
    return (f"--task custom --data1 '{root}/*_rgb.png' --data2 '{root}/*_depth.png' "
            f"--target {root / target} --batch-size 8 --epochs 2 {more}")


@pytest.mark.parametrize("target, more, metrics, classes, samples", [
    ("masks", "", ["mIoU", "accuracy"], ["0", "7"], (32, 8)),
    ("masks", "--linear --modality 2 --classes ROOT/names", ["mIoU", "accuracy"],
     [f"class {k}" for k in range(8)], (32, 8)),
    ("single.csv", "--linear", ["mean accuracy", "accuracy"], sorted(data.SHAPES), (32, 8)),
    ("tree.csv", "--linear --split ROOT/train --test-split ROOT/test",
     ["mean accuracy", "accuracy"], sorted([*data.SHAPES, "tree"]), (24, 6)),
    ("several.csv", "--linear --cached --labels 0.5", ["mAP micro", "mAP macro"], None, (12, 6))])
def test_own_labels_train_and_are_scored_by_class(target, more, metrics, classes, samples, own,
                                                  tiny_weights, tmp_path, capsys):
    """Masks: class 0 counts, 255 does not; a csv: one label each, or several.  A class that only
    the test has is scored.  Images of 8 bits are normalised as the pretraining's.
    """
    result = fine(own_flags(own, target, f"{more} --weights {tiny_weights} --out {tmp_path / 'o'}"))
    assert list(result["metrics"]) == metrics and result["backbone"] == "resnet-toy"
    assert classes is None or list(result["classes"]) == classes
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    assert (result["samples"], result["test_samples"]) == samples
    text = capsys.readouterr().out
    assert "modality 1 are normalised as rgb of rgbd" in text
    assert "modality 2 are normalised by their own" in text
    assert result["row"] is None and all(name in text for name in result["classes"])
    assert result["classes"].get("tree", 0) == 0
    assert ("no training sample has the class tree" in text) == (target == "tree.csv")
    assert "have no label" not in text


def test_a_line_without_a_label_is_told(own, tmp_path):
    """Else one forgotten label would turn the whole task multi-label in silence."""
    lines = (own / "single.csv").read_text().splitlines()
    (own / "blank.csv").write_text("\n".join([*lines[:-1], lines[-1].split(",")[0] + ","]))
    args = finetune.get_args(shlex.split(own_flags(own, "blank.csv", "--weights none")))[0]
    samples, words = finetune.open_own(args)
    assert samples[0].kind == "multi-label"
    assert any("1 names of --target have no label" in line for line in words)


def test_a_pretraining_of_ones_own_pairs_knows_how_to_normalise(own, tmp_path, capsys):
    pairs = f"--data1 '{own}/*_rgb.png' --data2 '{own}/*_depth.png' --epochs 1 --batch-size 16"
    pretrain.main(shlex.split(f"--scenario custom {pairs} --backbone resnet-toy --size 48 "
                              f"--projector 8-16 --out {tmp_path / 'pre'}"))
    result = fine(own_flags(own, "single.csv", f"--weights {tmp_path / 'pre' / 'checkpoint.pt'} "
                                               f"--out {tmp_path / 'own'}"))
    assert result["size"] == 48 and "normalised as" not in capsys.readouterr().out


@pytest.mark.parametrize("target, text, more, words", [
    ("unknown.csv", "nobody,disk\n0000,ring\n", "", r"names \['nobody'\], which has no pair"),
    ("one.csv", "0000,disk\n0001,disk\n", "", "has one class"),
    ("twice.csv", "0000,disk\n0000,ring\n", "", "has 0000 twice"),
    ("single.csv", None, "--classes ROOT/two", "segmentation alone"),
    ("masks", None, "--classes ROOT/two", r"masks have other values than 0 to 1"),
    ("masks", None, "--split ROOT/train", "expected two files"),
    ("masks", None, "--test-share 0", "nothing to train or to test"),
    ("small", None, "", r"a mask of \(24, 64\) pixels for an image of \(48, 64\)")])
def test_own_labels_that_cannot_be_used_are_named(target, text, more, words, own, tmp_path):
    if text:
        (own / target).write_text(text)
    if target == "small":
        shutil.copytree(own / "masks", own / "small")
        for path in (own / "small").iterdir():
            Image.open(path).resize((64, 24), 0).save(path)
    with pytest.raises(BadInput, match=words):
        fine(own_flags(own, target, f"{more} --weights none --backbone resnet-toy "
                                    f"--out {tmp_path / 'o'}"))


# ---- the paper's tables ----

def result_of(folder, name, flags, pretraining=None, metrics=None, hashes=()):
    """results.json as a run with these settings writes it, behind it a pretraining with others."""
    args, _, changed = finetune.get_args(shlex.split(f"{flags} --weights x"))
    if "none" in flags:
        args.weights = ["none"]
    if pretraining is not None:
        args.pretraining = dict(vars(pretrain.get_args(shlex.split(pretraining))[0]), stopped=None)
        args.pretraining.pop("out")
    result = {key: getattr(args, key) for key in (
        "task", "model", "toy", "linear", "labels", "modality", "weights", "seed")}
    result.update(row=finetune.row_of(args, list(hashes)), pretraining=args.pretraining,
                  changed=finetune.not_the_papers(args, changed), metrics=metrics)
    (folder / name).mkdir()
    (folder / name / "results.json").write_text(json.dumps(result, default=str))


def test_the_tables_show_what_is_the_papers_and_name_what_is_not(tmp_path, capsys):
    ben, sar = "--task bigearthnet --linear --labels 0.01", "--scenario sar-optical"
    for name, value, flags, pretraining in (    # all but the first three are not the paper's
            ("seed0", 0.79, "", ""), ("seed1", 0.81, "--seed 1", "--seed 1"),
            ("vicreg", 0.7, "", "--method vicreg"), ("kept", 0.1, "--cached", ""),
            ("val", 0.2, "--test-split val", ""), ("short", 0.3, "", "--epochs 5"),
            ("tenth", 0.4, "--labels 0.1", ""), ("slow", 0.5, "", "--lr-bias 0.0004"),
            ("started", 0.6, "", "--weights imagenet"), ("half", 0.61, "", "--common 0.5"),
            ("narrow", 0.65, "", "--method vicreg --projector 512-512-512")):
        result_of(tmp_path, name, f"{ben} {flags}", f"{sar} {pretraining}", {"mAP micro": value})
    scores, cmx = {"mIoU": 0.5, "accuracy": 0.8}, "--task sunrgbd --model cmx"
    b2 = "--scenario rgbd --backbone mit_b2"
    result_of(tmp_path, "cmx", cmx, None, scores, ("same", "same"))
    result_of(tmp_path, "decur", cmx, f"{b2} --weights b2.pth b2.pth", dict(scores, mIoU=0.51))
    result_of(tmp_path, "fcn", "--task nyuv2 --weights none", None, dict(scores, mIoU=0.29))
    finetune.main(["--table", *[str(path) for path in sorted(tmp_path.iterdir())]])
    out = capsys.readouterr().out
    for words in (r"DeCUR +80\.0 \+- 1\.4 \(n 2\) \| 79\.4 +not run \| 81\.7",
                  r"VICReg +70\.0 \| 74\.5", r"cmx, DeCUR +51\.0 \| 50\.6",
                  r"cmx, ImageNet +50\.0 \| 49\.7 +80\.0 \| 82\.8",
                  r"fcn, Supervised +not run \| 27\.4 +not run \| 68\.2 +29\.0 \| 29\.2"):
        assert re.search(f"^{words}", out, re.M), words
    others = out[out.index("\nOther runs"):]
    for words in (r"cached.* 10\.0", r"test_split val.* 20\.0", r"pretraining epochs 5.* 30\.0",
                  r"labels 0\.1.* 40\.0", r"pretraining lr_bias 0\.0004.* 50\.0",
                  r"pretraining weights \['imagenet'\].* 60\.0", r"common 0\.5.* 61\.0",
                  r"pretraining projector 512-512-512.* 65\.0"):
        assert re.search(words, others), words
    (tmp_path / "seed0" / "results.json").write_text("{")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text("{}")
    finetune.main(["--table", *[str(path) for path in sorted(tmp_path.iterdir())]])
    out = capsys.readouterr().out
    assert re.search("left out: .*seed0", out) and re.search("left out: .*old", out)
    assert "SA-Gate, quoted" in out and "cmx, ImageNet" in out
    with pytest.raises(BadInput, match="expected folders with a results.json"):
        finetune.main(["--table", str(tmp_path / "old")])


TINY = "--scenario rgbd --split train --size 32 --backbone resnet-toy --projector 32-32-32 " \
    "--batch-size 16 --lr 2 --epochs 1"
FEW = "--steps 2 --tsne-dims 8 --pairs 2"


def call(main, flags):
    main(shlex.split(flags))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two tiny runs on made-up scenes: DeCUR, and without unique dimensions and intra terms."""
    folder = tmp_path_factory.mktemp("runs")
    data.make_toy("rgbd", folder / "scenes", scenes=32, held_out=8)
    flags = f"{TINY} --data {folder}/scenes"
    call(pretrain.main, f"{flags} --out {folder}/decur-0")
    call(pretrain.main, f"{flags} --out {folder}/nodecoup-1 --seed 1 --common 1 --no-intra")
    return folder


def tiny_branch(seed=0, channels=2, K=6):
    """An encoder with batch norm and ReLU, and a projector, in evaluation mode."""
    torch.manual_seed(seed)
    f = nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(True),
                      nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(inplace=True),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, K))
    f(torch.randn(32, channels, 8, 8))
    return f.eval().requires_grad_(False).double()


def explained_branch(n=10, Kc=4):
    """Images, a branch, and its two values as Sec. 7 prepares them."""
    f, x = tiny_branch(), torch.randn(n, 2, 8, 8, dtype=torch.float64)
    z = f(x)
    return x, f, explain.TwoValues(f, z.mean(0), z.var(0, unbiased=False), Kc, f[3])


# ---- 1: alignment ----

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
    torch.manual_seed(0)
    z1 = torch.randn(16, 5, dtype=torch.float64)
    z2 = z1 + torch.randn(16, 5, dtype=torch.float64)
    C = BN(z1).T @ BN(z2) / 16
    assert torch.allclose(explain.alignment_histogram(z1, z2)[0], (on_diag(C) - 1).pow(2))


# ---- 2: t-SNE ----

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


def test_the_kernel_of_the_map_is_that_of_the_differences():
    """1 / (1 + |y_i - y_j|^2), though digits cancel in the product that makes it."""
    torch.manual_seed(0)
    y = 40 * torch.randn(300, 2)
    y[1] = y[0]
    expected = 1 / (1 + explain.distances(y.double()))
    near = explain.student(y, torch.empty(300, 300))
    assert torch.allclose(near.double(), expected.fill_diagonal_(0), atol=2e-3)


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


# ---- 3: GradCAM ----

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
    """Why `TwoValues` holds them constant: features normalised by their own batch sum to 0."""
    x, f, net = explained_branch()
    dead = lambda x: torch.stack([part.mean(1) for part in BN(f(x)).split((4, 2), 1)], 1)
    for saliency in (lambda net: explain.gradcam(net, f[3], x, 0),
                     lambda net: explain.integrated_gradients(net, x)):
        assert saliency(dead).abs().max() < 1e-12 < 1e-4 < saliency(net).abs().max()


def test_saliency_does_not_depend_on_the_batch():
    """Maps of one image at a time are those of all ten; mean and variance are those of all, too."""
    x, f, net = explained_branch()
    for vis in (explain.gradcam_vis, lambda net, x: explain.IG_vis(net, x, 3)):
        for part in (0, 1):
            single = torch.cat([vis(net, image)[part] for image in x.split(1)])
            assert torch.allclose(vis(net, x)[part], single)
    pair = nn.Module()
    pair.f1 = pair.f2 = f
    for B in (3, 10):
        z1, _, moments = explain.embed(pair, ([chunk, chunk] for chunk in x.split(B)), 8)
        assert torch.allclose(z1, f(x)[:8])
        assert torch.allclose(moments[1][0], f(x).mean(0).float())
        assert torch.allclose(moments[1][1], f(x).var(0, unbiased=False).float())


def test_an_empty_slice_of_dimensions_gives_maps_of_0():
    """Barlow Twins has no unique dimensions, and its common ones are not disturbed by that."""
    x, _, net = explained_branch(Kc=6)
    common, unique = explain.gradcam_vis(net, x)
    assert (unique == 0).all() and common.isfinite().all() and (common != 0).any()
    importance = explain.IG_stat(net, x, 2)
    assert (importance[1] == 0).all() and importance[0].isfinite().all()
    assert explain.gradcam_stat(net, net, x, x)[1].tolist() == [0] * 10


def test_gradcam_looks_after_the_last_convolution():
    """Algorithm 2's last_conv2, never a shortcut; for SegFormer the end of its last stage."""
    for backbone, name in (("resnet-toy", "layer4.0.conv2"), ("resnet18", "layer4.1.conv2"),
                           ("resnet50", "layer4.2.conv3"), ("mit_b0", "norm4")):
        with torch.device("meta"):
            modules = explain.layers(decur.branch(backbone, 3, ()).E)
        assert list(modules)[-1] == name and not any("downsample" in name for name in modules)


# ---- 4: overlap ----

class OneMap:
    """A stand-in for `TwoValues` whose GradCAM maps are x itself, and -x for the unique value."""
    def __init__(self):
        self.layer = nn.Identity()

    def __call__(self, x):
        A = self.layer(x)
        return torch.stack((A.sum((1, 2, 3)), -A.sum((1, 2, 3))), 1)


def test_overlap_scores_by_hand():
    """Sec. 7: log10 of the positive parts + 1e-20, min-max of each, mean of the product: a pair's
    own number.  A map without a positive pixel, and a flat one, give 0."""
    left = torch.tensor([[[[-3.0, 0], [1, 100]]], [[[-1.0, -1], [-1, -1]]], [[[5.0, 5], [5, 5]]]])
    right = torch.tensor([[[[1.0, 10], [10, 1000]]]]).expand(3, 1, 2, 2)
    a = (0 + 20) / 22                           # left: log10 is -20, -20, 0, 2; right: 0, 1, 1, 3
    assert torch.allclose(explain.norm(left[:1, 0]), torch.tensor([[[0, 0], [a, 1]]]))
    assert torch.allclose(explain.norm(right[:1, 0]), torch.tensor([[[0, 1 / 3], [1 / 3, 1]]]))
    mul_c, mul_u = explain.gradcam_stat(OneMap(), OneMap(), left, right)
    assert torch.allclose(mul_c, torch.tensor([(a / 3 + 1) / 4, 0, 0]))
    assert mul_u.tolist() == [0, 0, 0]          # -right is nowhere positive
    alone = explain.gradcam_stat(OneMap(), OneMap(), left[:1], right[:1])[0]
    assert torch.equal(alone, mul_c[:1])        # other pairs do not count
    assert explain.gradcam_stat(OneMap(), OneMap(), right, 7 * right)[0].max() <= 1


# ---- 5: integrated gradients ----

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
    x, _, net = explained_branch()
    gain = (net(x) - net(torch.zeros_like(x)))[:, 1]
    total = [explain.integrated_gradients(net, x, None, 1, steps).sum((1, 2, 3))
             for steps in (4, 256)]
    coarse, fine = ((a - gain).abs().mean() / gain.abs().mean() for a in total)
    assert fine < 1e-3 and fine < coarse / 4
    att1_c, att1_u = explain.IG_vis(net, x, 4)
    imp_c, imp_u = explain.IG_stat(net, x, 4)
    assert torch.allclose(imp_c, att1_c.mean((2, 3))) and torch.allclose(imp_u, att1_u.mean((2, 3)))


# ---- probes, plots ----

def test_a_linear_probe_reads_what_is_linear_and_nothing_else():
    """Four classes along two features are read; classes drawn at random, at chance, unseen."""
    torch.manual_seed(0)
    x, noise = torch.randn(400, 6), torch.randint(4, (400,))
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0)
    assert explain.linear_probe(x[:300], y[:300], x[300:], y[300:]) > 0.9
    assert explain.linear_probe(x[:300], noise[:300], x[300:], noise[300:]) < 0.45


def test_ticks_are_round_and_few():
    """At most six, within the axis."""
    assert explain.ticks(0, 1.5) == [0, 0.5, 1, 1.5]
    assert explain.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    for high in (0.03, 0.7, 9, 64, 130, 5000):
        assert 2 <= len(explain.ticks(0, high)) <= 6 and max(explain.ticks(0, high)) <= high


def test_a_sentence_says_what_was_measured_and_whether_it_is_so():
    """0.74 against 0.90 further left is so; the other way round, and equal, it is not."""
    claim = explain.claim
    assert claim("further left", dict(common=0.9, unique=0.74), "unique") == \
        "further left: common 0.9, unique 0.74: unique is lower"
    assert claim("a", dict(common=0.74, unique=0.9), "unique").endswith(": unique is not lower")
    assert claim("a", dict(common=0.5, unique=0.5), "unique").endswith(": unique is not lower")
    assert claim("a", dict(common=0.5), "unique") == "a: common 0.5"


@pytest.mark.parametrize("matrix", (
    [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],   # protanopia
    [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]))   # deuteranopia
def test_colours_differ_to_colour_blind_readers(matrix):
    """Machado et al. (2009), of linear RGB: every two of a picture's colours stay apart."""
    for colours in (explain.COLOURS.values(), explain.TERMS.values(), (explain.RED, explain.BLUE)):
        rgb = np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in colours]) / 255
        seen = (rgb ** 2.2 @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen, axis=-1) + np.eye(len(seen))
        assert apart.min() > 0.2


# ---- explain.py as a program ----

def test_explain_makes_every_picture_and_its_numbers(runs, tmp_path, capsys):
    """One command; --compare; run and step are on each; the same whatever the batch size."""
    a, b, out = runs / "decur-0", runs / "nodecoup-1", tmp_path / "a"
    call(explain.main, f"--checkpoint {a}/checkpoint.pt --compare {b}/checkpoint.pt {FEW} "
                       f"--out {out}")
    printed, names = capsys.readouterr().out, list(explain.PICTURES)[:-1]
    for name in names:
        assert f"{out}/{name}.png and .npz" in printed
        with Image.open(out / f"{name}.png") as image:
            page = np.array(image)
        page[8:-8, 8:-8] = 255
        assert page.shape[1] <= 1000 and (page == 255).all()            # nothing runs over the page
    assert len(re.findall(r": \w+ is (not )?lower$", printed, re.M)) == 10
    numbers = {name: np.load(out / f"{name}.npz") for name in names}
    assert numbers["alignment"]["common"].shape == (2, 24)
    assert numbers["alignment"]["compared"].shape == (2, 32)
    assert numbers["tsne"]["points"].shape == (2, 16, 2)
    assert numbers["gradcam"]["modality2_unique"].shape == (2, 32, 32)
    assert numbers["spatial"]["common"].shape == (32,)
    assert 0 <= min(a.min() for a in numbers["spatial"].values())
    assert numbers["spectral"]["modality1_common"].shape == (32, 3)
    assert numbers["factors"]["accuracy"].shape == (10, 3)
    assert len(numbers["factors"]["rows"]) == 10
    assert numbers["curves"]["step"].tolist() == [1, 2]
    some = "alignment gradcam spatial spectral"
    call(explain.main, f"--checkpoint {a}/checkpoint.pt {FEW} --only {some} --batch-size 5 "
                       f"--out {tmp_path}/b")
    for name in some.split():
        again = np.load(tmp_path / "b" / f"{name}.npz")
        assert all(np.allclose(again[key], numbers[name][key], atol=1e-3) for key in again)
    call(explain.main, f"--checkpoint {b}/checkpoint.pt {FEW} --only {some} tsne curves "
                       f"--out {tmp_path}/c")   # no unique dimensions
    assert list(np.load(tmp_path / "c" / "spatial.npz")) == ["common"]
    assert "nan" not in capsys.readouterr().out.split("curves.png")[0]


def test_pictures_name_run_and_step(runs, tmp_path, monkeypatch):
    """The caption is drawn beneath each, and says where a run was stopped."""
    captions = []
    monkeypatch.setattr(explain, "save_picture", lambda *args: captions.append(args[-1]))
    call(explain.main, f"--checkpoint {runs}/decur-0/checkpoint.pt --only curves --out {tmp_path}")
    assert captions == ["decur-0 at step 2"]
    checkpoint = torch.load(runs / "decur-0" / "checkpoint.pt", weights_only=True)
    torch.save(dict(checkpoint, step=1), tmp_path / "checkpoint.pt")
    call(explain.main, f"--checkpoint {tmp_path}/checkpoint.pt --only curves --data {runs}/scenes")
    assert captions[1].endswith(" at step 1 of 2")
    blank = explain.page(300, 200, "")[0]
    monkeypatch.undo()
    explain.save_picture(tmp_path, "blank", blank, {}, "", captions[0])
    assert np.array(Image.open(tmp_path / "blank.png")).min() < 200


def test_by_default_there_are_four_batches_if_the_data_allow(runs, tmp_path, capsys):
    """Fig. 8 and 9 have four: of 32 pairs with N 4, with N 16 there are but two."""
    checkpoint = torch.load(runs / "decur-0" / "checkpoint.pt", weights_only=True)
    for N, batches in ((4, 4), (16, 2)):
        checkpoint["settings"]["batch_size"] = N
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        call(explain.main, f"--checkpoint {tmp_path}/checkpoint.pt --data {runs}/scenes "
                           f"--only alignment")
        assert np.load(tmp_path / "explain" / "alignment.npz")["common"].shape == (batches, 24)
    assert "warning" not in capsys.readouterr().out
    few = explain.Explained(explain.get_args(["--checkpoint", f"{tmp_path}/checkpoint.pt", "--data",
                                              f"{runs}/scenes"]), torch.device("cpu"))
    assert len(few.samples) == 32               # all, as 512 and 4 N are more


def test_a_map_without_a_positive_pixel_says_so(runs, tmp_path, monkeypatch, capsys):
    """And maps of 2x2 pixels come with a warning."""
    notes, text = [], explain.ImageDraw.ImageDraw.text
    monkeypatch.setattr(explain.ImageDraw.ImageDraw, "text",
                        lambda pen, at, words, *rest, **more:
                        (notes.append(words), text(pen, at, words, *rest, **more)))
    negative = lambda net, x, relu=False: (-torch.ones(len(x), 32, 32), torch.ones(len(x), 32, 32))
    monkeypatch.setattr(explain, "gradcam_vis", negative)
    monkeypatch.setattr(explain, "gradcam", lambda *args: torch.ones(1, 1, 2, 2))
    call(explain.main, f"--checkpoint {runs}/decur-0/checkpoint.pt --only gradcam --pairs 2 "
                       f"--out {tmp_path}")
    assert notes.count("no positive pixel") == 4                        # common maps of 2 pairs
    printed = capsys.readouterr().out
    assert "4 maps have no positive pixel" in printed
    assert "warning: GradCAM's maps are 2x2 pixels" in printed


def test_curves_are_drawn_where_the_floor_is_0(runs, tmp_path):
    """N - 1 >= K: all dimensions can be decorrelated, and a logarithmic axis has no place for 0."""
    shutil.copy(runs / "decur-0" / "checkpoint.pt", tmp_path)
    log = [dict(step=1, loss=90.0, L1=80.0, Lc=10.0, C1=0, Cc=0),
           dict(step=2, loss=0.0, L1=0.0, Lc=0.0, C1=1, Cc=1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    call(explain.main, f"--checkpoint {tmp_path}/checkpoint.pt --data {runs}/scenes --only curves")
    assert (tmp_path / "explain" / "curves.png").exists()


def test_embeddings_are_for_programs_of_ones_own(runs, tmp_path):
    """names, z1, z2, features1, features2 in one order, with no picture; not among the defaults."""
    call(explain.main, f"--checkpoint {runs}/decur-0/checkpoint.pt --only embeddings "
                       f"--out {tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings.npz"]
    e = np.load(tmp_path / "embeddings.npz")
    assert e["z1"].shape == e["z2"].shape == (32, 32) and e["Kc"] == 24
    assert len(e["features1"]) == len(e["features2"]) == len(set(e["names"])) == 32
    net, settings = explain.open_net(runs / "decur-0" / "checkpoint.pt", "cpu")
    scenes = explain.open_data(settings, [str(runs / "scenes")], "train")
    i = scenes.ids.index(e["names"][5])
    x = data.plain(scenes[i][1][0][None], "depth", 32)
    assert np.allclose(net.f2(x).numpy()[0], e["z2"][5], atol=1e-4)
    assert np.allclose(net.f2.E(x).numpy()[0], e["features2"][5], atol=1e-4)


def test_a_sweep_is_over_seeds_and_folders(runs, tmp_path, capsys):
    """A line for each name without its seed; seeds counted; the same numbers as of one run."""
    names = [runs / "decur-0", runs / "decur-s1", runs / "nodecoup-1"]
    call(pretrain.main, f"{TINY} --data {runs}/scenes --out {names[1]} --seed 1")
    capsys.readouterr()
    call(explain.main, f"--sweep {' '.join(map(str, names))} --out {tmp_path}")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == [
        "| common / unique / backbone (seeds)", "| decur (2)", "| nodecoup (1)",
        "| random encoder (2)", "| supervised encoder (2)"]
    assert re.search(r"\| 0\.\d\d±0\.\d\d / 0\.\d\d±0\.\d\d / 0\.\d\d±0\.\d\d \|", lines[1])
    assert re.search(r"\| [01]\.\d\d / - / [01]\.\d\d \|", lines[2])
    assert re.search(r"\| - / - / [01]\.\d\d±", lines[3])
    numbers = np.load(tmp_path / "sweep.npz")
    assert numbers["decur rgb unique"].shape == (2, 3) and "nodecoup rgb unique" not in numbers
    assert (tmp_path / "sweep.png").exists()
    call(explain.main, f"--checkpoint {names[0]}/checkpoint.pt --only factors --out {tmp_path}")
    alone = np.load(tmp_path / "factors.npz")
    index = list(alone["rows"]).index("depth, backbone")
    assert np.allclose(alone["accuracy"][index], numbers["decur depth backbone"][0])


def test_explain_knows_ones_own_pairs_by_folder_or_pattern(tmp_path):
    """The statistics come from the checkpoint, the folders from the run; no factors are known."""
    rng = np.random.default_rng(0)
    for name, shape in (("one", (20, 20, 3)), ("two", (20, 20)), ("both", (20, 20, 3))):
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
            if name == "both":
                Image.fromarray(pixels).save(tmp_path / name / f"{i}_rgb.png")
                Image.fromarray(pixels[..., 0]).save(tmp_path / name / f"{i}_ir.png")
                (tmp_path / name / f"{i}.png").unlink()
    call(pretrain.main, "--scenario custom --backbone resnet-toy --projector 16-16-16 --epochs 1 "
         f"--size 16 --batch-size 4 --data1 {tmp_path}/one --data2 {tmp_path}/two "
         f"--out {tmp_path}/out")
    flags = f"--checkpoint {tmp_path}/out/checkpoint.pt --steps 2 --pairs 2"
    call(explain.main, flags)
    numbers = np.load(tmp_path / "out" / "explain" / "spectral.npz")
    assert numbers["modality1_common"].shape == (8, 3)
    assert numbers["modality2_unique"].shape == (8, 1)
    assert not (tmp_path / "out" / "explain" / "factors.png").exists()
    call(explain.main, f"{flags} --data '{tmp_path}/both/*_rgb.png' '{tmp_path}/both/*_ir.png' "
                       f"--only embeddings")
    assert set(np.load(tmp_path / "out" / "explain" / "embeddings.npz")["names"]) == set("01234567")
    with pytest.raises(BadInput, match="expected two folders"):
        call(explain.main, f"{flags} --data {tmp_path}/one")


def test_explain_refuses_what_it_cannot_explain(runs, tmp_path, capsys):
    """One line each, with the file's name, what was expected, and the remedy."""
    whole = torch.load(runs / "decur-0" / "checkpoint.pt", weights_only=True)
    model, settings = whole["model"], whole["settings"]
    one = {name: value for name, value in model.items() if name.startswith("f1.")}
    torch.save(dict(whole, model=one), tmp_path / "one.pt")             # barlowtwins --modality 1
    torch.save(dict(whole, settings=dict(settings, size=16)), tmp_path / "16.pt")
    torch.save(dict(whole, settings=dict(settings, widths=[64, 64])), tmp_path / "widths.pt")
    torch.save(dict(whole, settings=dict(task="sunrgbd", lr=1.0)), tmp_path / "finetune.pt")
    torch.save(dict(whole, model={"head": torch.ones(1)}), tmp_path / "keys.pt")
    torch.save(dict(whole, settings=dict(settings, size="32")), tmp_path / "kind.pt")
    (tmp_path / "empty.pt").touch()
    run = f"--checkpoint {runs}/decur-0/checkpoint.pt --out {tmp_path}/out"
    for flags, words in (
            (f"--checkpoint {tmp_path}/one.pt", "one.pt .* expected .* with both encoders; give"),
            (f"--checkpoint {tmp_path}/nowhere.pt", "nowhere.pt cannot be used"),
            (f"--checkpoint {tmp_path}/empty.pt", "empty.pt cannot be used"),
            (f"--checkpoint {tmp_path}/widths.pt", "widths.pt cannot be explained"),
            (f"--checkpoint {tmp_path}/finetune.pt", "finetune.pt cannot be explained .* expected"),
            (f"--checkpoint {tmp_path}/kind.pt", "kind.pt cannot be explained .*size is 32"),
            (f"--checkpoint {tmp_path}/keys.pt", "keys.pt cannot be explained .* expected"),
            (f"{run} --data {runs}/nowhere", "no folder"),
            (f"{run} --samples 33", "--samples 33: expected at most the 32 pairs"),
            (f"{run} --layer layer5", "--layer layer5: .*; there are conv1 .* layer4.0.conv2"),
            (f"{run} --compare {tmp_path}/16.pt", "16.pt: size is 16, but 32"),
            (f"--sweep {runs}/decur-0 --data {tmp_path} --out {tmp_path}/out",
             "--sweep: no factors.csv under .* expected runs of made-up scenes"),
            (f"{run}/../16.pt/out", "--out .* cannot be made")):
        with pytest.raises(BadInput, match=words) as error:
            call(explain.main, flags)
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit) as end:      # argparse's own line names the range
        call(explain.main, f"{run} --steps 0")
    assert end.value.code == 2 and "0: expected 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("name, text, only", (
    ("args.json", "{", "alignment"), ("args.json", '{"data": 7}', "alignment"),
    ("log.jsonl", '{"step": 1, "loss": 2}\ngarbage\n', "curves"), ("log.jsonl", "", "curves"),
    ("log.jsonl", '{"step": 1, "loss": "x"}\n', "curves"),
    ("factors.csv", "id,common\n0000,x\n", "factors"), ("factors.csv", "", "factors")))
def test_damaged_files_beside_a_checkpoint_are_named(name, text, only, runs, tmp_path):
    """args.json, log.jsonl and factors.csv are files of the project's own, but may be damaged."""
    shutil.copytree(runs / "decur-0", tmp_path / "run")
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for path in (runs / "scenes").iterdir():
        (scenes / path.name).symlink_to(path)
    where = scenes if name == "factors.csv" else tmp_path / "run"
    (where / name).unlink()
    (where / name).write_text(text)
    flags = f"--checkpoint {tmp_path}/run/checkpoint.pt --only {only}"
    with pytest.raises(BadInput, match=f"{name}.*(expected|cannot be read as)") as error:
        call(explain.main, flags if name == "args.json" else f"{flags} --data {scenes}")
    assert "\n" not in str(error.value)


# ---- README.md ----

def test_readme_commands_parse():
    """Every `python script.py ...` and torchrun line in the README names flags that exist."""
    readme = (HERE / "README.md").read_text()
    commands = re.findall(r"^ *(?:python|torchrun [^\n]*?)(?= )(.*)$", readme, re.M)
    assert len(commands) >= 12
    programs = {"pretrain.py": pretrain, "finetune.py": finetune, "data.py": data,
                "explain.py": explain}
    for line in commands:
        script, *flags = shlex.split(re.sub(r"\$\w+", "0", line.split("#")[0]))  # in a loop
        if script in programs:
            programs[script].get_args(flags)


def test_readme_names_what_exists():
    """Every `file.name` that the README's map of the paper gives is there."""
    readme = (HERE / "README.md").read_text()
    names = re.findall(r"`(decur|data|pretrain|finetune|explain)\.(\w+)", readme)
    names = [(module, name) for module, name in names if name != "py"]
    assert len(names) > 30
    for module, name in names:
        assert hasattr(globals()[module], name), f"{module}.{name}"
