"""python -m pytest -q: a few minutes on two CPU cores, no data.  Each name is a true sentence."""
import argparse
import csv
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
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
from PIL import Image, ImageColor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as TF

import data
import decur
import explain
import finetune
import pretrain
from data import MODALITIES, BadInput, augment, find_images, hha, open_dataset, read_image
from decur import BN, DeCUR, decur_loss, decur_loss_gram, loss_c, on_diag

HERE = Path(__file__).parent


def embeddings(N, K, dtype=torch.float64, seed=0):
    """Four correlated NxK embeddings that need gradients."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, N, K, generator=g, dtype=dtype)
    shared = draw()
    return [(shared + draw()).requires_grad_() for _ in range(4)]


def plain_views(N, K, scale=1):
    """The same without gradients.  On a scale of 1000 the eps of BN does not matter."""
    return [scale * z.detach() for z in embeddings(N, K)]


def relative(a, b):
    """The norm of the difference of two lists of tensors, relative to the norm of the second."""
    a, b = (torch.cat(list(map(torch.flatten, tensors))).double() for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


def is_refused(words, function, *args, error=BadInput, **settings):
    """The call raises one line with these words."""
    with pytest.raises(error, match=words) as raised:
        function(*args, **settings)
    assert "\n" not in str(raised.value)


def watched(monkeypatch, owner, name, n=0, action=None):
    """Patches owner.name.  Returns a list of the arguments of its calls.  Before the n-th call,
    action() runs."""
    calls, function = [], getattr(owner, name)

    def counted(*args, **settings):
        calls.append(args)
        if len(calls) == n:
            action()
        return function(*args, **settings)

    monkeypatch.setattr(owner, name, counted)
    return calls


# ---- decur.py: Eq. 1-6 and Algorithm 1 ----

def test_the_loss_offered_for_copying_is_the_loss():
    """The block between decur.py's markers, with torch alone; the README's 20 lines as they are."""
    block, readme = {"torch": torch}, {}
    source = (HERE / "decur.py").read_text().split("# ---- Algorithm 1: copy from here")[1]
    exec("#" + source.split("# ---- to here")[0], block)
    exec((HERE / "README.md").read_text().split("```python\n")[1].split("```")[0], readme)
    z = embeddings(8, 6)
    loss = decur_loss(*z, 4)[0]
    assert block["decur_loss"](*z, 4)[0] == loss
    assert readme["decur_loss"](*z, 4).item() == pytest.approx(loss.item(), rel=1e-12)


def slow_loss(zA, zB, lmb, target=1):
    """Eq. 2-5 of the correlation matrix C of Eq. 1, by element; target: of its diagonal."""
    K, loss = zA.shape[1], 0
    C = torch.corrcoef(torch.cat((zA, zB), 1).T)[:K, K:]
    for i, j in np.ndindex(K, K):
        loss += (C[i, j] - target) ** 2 if i == j else lmb * C[i, j] ** 2
    return loss.item()


def test_algorithm_1_is_equations_1_to_6():
    """C is a correlation only because BN's variance is biased.  Common-by-unique blocks are in no
    term."""
    z11, z12, z21, z22 = plain_views(16, 6, scale=1000)
    loss, terms = decur_loss(z11, z12, z21, z22, 4, 0.01, 0.02, 0.03, 0.04)
    expected = dict(L1=slow_loss(z11, z12, 0.01), L2=slow_loss(z21, z22, 0.02),
                    Lc=slow_loss(z11[:, :4], z21[:, :4], 0.03),
                    Lu=slow_loss(z11[:, 4:], z21[:, 4:], 0.04, target=0))
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    assert loss.item() == pytest.approx(sum(expected.values()), rel=1e-9)


def test_BN_is_batch_norm_in_training_mode():
    z = embeddings(16, 5)[0]
    assert torch.allclose(BN(z), F.batch_norm(z, None, None, training=True), rtol=0, atol=1e-12)


def test_chance_loss_matches_theory():
    N, K, Kc = 24, 40, 30
    sums = torch.zeros(4)
    for seed in range(800):
        g = torch.Generator().manual_seed(seed)
        _, parts = decur_loss(*(torch.randn(N, K, generator=g) for _ in range(4)), Kc)
        sums += torch.tensor(list(parts.values()))
    chance = decur.bounds(N, K, Kc)[0]
    assert list(chance) == list(parts)
    assert torch.allclose(sums / 800, torch.tensor(list(chance.values())), rtol=0.01)


def test_no_loss_beats_the_rank_floor():
    """8 samples cannot decorrelate K = 64 dimensions; loss_c's optimum over z meets the bound."""
    N, K = 8, 64
    floor = decur.chance_and_floor(N, K)[1]
    z = embeddings(N, K)[0]
    optimizer = torch.optim.LBFGS([z], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_c(BN(z).T @ BN(z) / N, 0.0051)
        loss.backward()
        return loss
    optimizer.step(closure)
    assert floor <= closure() < 1.2 * floor
    values = [decur.chance_and_floor(256, k)[i] for k in (8192, 7168) for i in (0, 1)]
    assert [round(value) for value in values] == [9566, 1122, 8224, 871]


@pytest.mark.parametrize("N", [9, 4])           # by a KxK matrix, and by Gram matrices
def test_barlow_twins_is_its_equation_and_what_table_4_leaves_of_decur(N):
    """Zbontar et al. 2021, Eq. 1-2; "w/o intra&decoup.": Eq. 2 alone, over all dimensions."""
    z = plain_views(N, 7, scale=1000)
    expected = pytest.approx(slow_loss(z[0], z[2], 0.0051), rel=1e-9)
    assert decur.barlow_twins_loss(z[0], z[2]).item() == expected
    loss, terms = decur_loss(*z, 7, intra=False)
    assert loss.item() == expected
    assert terms == dict(L1=0, L2=0, Lc=loss, Lu=0)


@pytest.mark.parametrize("N, K, Kc, intra", [
    (16, 64, 48, True), (7, 13, 5, False), (16, 32, 0, True), (16, 32, 32, False), (33, 8, 6, True),
    (5, 1, 1, True)])
def test_the_gram_form_is_algorithm_1(N, K, Kc, intra):
    """Same value, parts, gradients in float64: N below, above K, empty blocks, unequal lambdas."""
    z, results = embeddings(N, K), []
    for form in (decur_loss, decur_loss_gram):
        loss, parts = form(*z, Kc, 0.01, 0.02, 0.03, 0.04, intra=intra)
        gradient = torch.autograd.grad(loss, z, allow_unused=True)
        results.append((loss, parts, [g for g in gradient if g is not None]))
    (loss_a, parts_a, gradient_a), (loss_b, parts_b, gradient_b) = results
    assert list(parts_a) == list(parts_b) == ["L1", "L2", "Lc", "Lu"]
    assert relative([loss_a], [sum(parts_a.values())]) < 1e-12  # Eq. 6, the plain sum
    for part in (*parts_a.values(), *parts_b.values()):
        assert part.isfinite() and not part.requires_grad           # they are for the log
    assert relative([loss_b, *parts_b.values()], [loss_a, *parts_a.values()]) < 1e-12
    assert relative(gradient_b, gradient_a) < 1e-12


def test_the_gram_form_keeps_no_KxK_matrix():
    sizes = []
    saved = lambda t: (sizes.append(t.numel()), t)[1]
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
        decur_loss_gram(*embeddings(8, 512), 384)
    assert max(sizes) <= 8 * 512


@pytest.mark.parametrize("form", [decur_loss, decur_loss_gram])
def test_more_common_dimensions_than_dimensions_are_an_error(form):
    words = "Kc = 9 .*K = 8"
    is_refused(words, form, *embeddings(4, 8), 9, error=ValueError)


# ---- decur.py: Fig. 2 ----

def test_projectors_share_no_parameter():
    """P1 and P2, E1 and E2: two of each (the authors' code wrapped one list of layers twice)."""
    net = DeCUR("resnet-toy", 3, 1, [16, 16, 16])
    assert not set(net.f1.parameters()) & set(net.f2.parameters())


def test_the_projector_is_that_of_section_4():
    names = [type(layer).__name__ for layer in decur.projector(8, [4, 4, 6])]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    with torch.device("meta"):
        projector = decur.projector(2048, [8192] * 3)
    assert sum(p.numel() for p in projector.parameters()) == 151_027_712
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


# ---- Tables 1-3: the methods that DeCUR is compared with ----

def test_vicreg_is_its_equations_1_to_6():
    """Bardes et al. 2022, Eq. 1-6, by element; Eq. 5 a mean of dimensions, as its Algorithm 1."""
    zA, zB = plain_views(6, 5, scale=0.7)[:2]
    N, K = zA.shape
    s = sum((zA[n, i] - zB[n, i]) ** 2 for n, i in np.ndindex(N, K)) / (N * K)
    v = c = 0
    for z in (zA, zB):
        cov = torch.cov(z.T)                    # KxK, unbiased
        v += sum(max(0, 1 - math.sqrt(cov[i, i] + 1e-4)) for i in range(K)) / K
        c += sum(cov[i, j] ** 2 for i, j in np.ndindex(K, K) if i != j) / K
    assert v > 0.1                              # the hinge takes part
    assert math.isclose(decur.vicreg_loss(zA, zB), 25 * s + 25 * v + 1 * c, rel_tol=1e-12)


def similarities(a, b, tau):
    """exp(cosine / tau) of each row of a with each of b."""
    return (torch.cosine_similarity(a[:, None], b[None], dim=2) / tau).exp()


def test_simclr_is_its_equation_1():
    """Chen et al. 2020, Eq. 1: of the other 2N - 1 embeddings the partner is the right one."""
    zA, zB = plain_views(6, 5)[:2]
    z, N, loss = torch.cat((zA, zB)), len(zA), 0
    e = similarities(z, z, 0.1)
    for i in range(2 * N):
        loss -= math.log(e[i, (i + N) % (2 * N)] / (e[i].sum() - e[i, i])) / (2 * N)
    assert math.isclose(decur.simclr_loss(zA, zB), loss, rel_tol=1e-12)


def test_clip_is_its_figure_3():
    """Radford et al. 2021, Fig. 3: of the other modality's N the partner is right, both ways."""
    zA, zB = plain_views(6, 5)[:2]
    e, N, loss = similarities(zA, zB, 0.07), len(zA), 0
    for i in range(N):
        loss -= math.log(e[i, i] / e[i].sum()) + math.log(e[i, i] / e[:, i].sum())
    assert math.isclose(decur.clip_loss(zA, zB), loss / 2 / N, rel_tol=1e-12)


# ---- Sec. 4: SegFormer's encoders ----

def mit_keys(depths):
    """The names in a published mit_b*.pth but its classifier's, from their grammar."""
    keys = []
    for S, depth in enumerate(depths, 1):
        keys += [f"patch_embed{S}.proj", f"patch_embed{S}.norm", f"norm{S}"]
        names = "norm1 norm2 attn.q attn.kv attn.proj mlp.fc1 mlp.fc2 mlp.dwconv.dwconv".split()
        names += ["attn.sr", "attn.norm"] * (S < 4)
        keys += [f"block{S}.{n}.{name}" for n in range(depth) for name in names]
    return {f"{key}.{kind}" for key in keys for kind in ("weight", "bias")}


def test_mit_has_the_published_names_and_number_of_parameters():
    """Without the classifier; only with these names do mit_b*.pth load here, and ours in CMX."""
    published = {"mit_b0": 3319392, "mit_b1": 13151424, "mit_b2": 24196288,
                 "mit_b3": 44072128, "mit_b4": 60842688, "mit_b5": 81443008}
    assert decur.MITS.keys() == published.keys()
    for name, (_, depths) in decur.MITS.items():
        with torch.device("meta"):              # no memory, no time
            E = decur.mit(name, 3)
        assert sum(p.numel() for p in E.parameters()) == published[name]
        assert E.state_dict().keys() == mit_keys(depths)


def test_mit_starts_as_published():
    """Linear weights of std 0.02, convolutions' sqrt(2 / fan_out), biases 0."""
    torch.manual_seed(0)
    E = decur.mit("mit_b0", 3)
    assert E.block4[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    conv, depthwise = E.patch_embed4.proj, E.block4[0].mlp.dwconv.dwconv
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    assert all(p.abs().max() == 0 for name, p in E.named_parameters() if name.endswith("bias"))


def test_mit_has_four_stages_at_any_size():
    """Strides 4, 2, 2, 2: a side n becomes (n - 1) // stride + 1, equal, divisible or not."""
    E = decur.mit("mit_b0", 5).eval()
    x = torch.randn(2, 5, 70, 50)
    maps = E.stages(x)
    shapes = [(2, 32, 18, 13), (2, 64, 9, 7), (2, 160, 5, 4), (2, 256, 3, 2)]
    assert [tuple(m.shape) for m in maps] == shapes
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
        weight = (q[:, head] @ k.T / math.sqrt(2)).exp()  # 24x6
        out[:, head] = weight / weight.sum(1, keepdim=True) @ v
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
        cases = torch.stack([x, 3 * x, attended, 3 * attended])
        equal = torch.isclose(out, cases, atol=1e-5).flatten(2).all(2)  # 4x64: case, sample
        assert (equal.sum(0) == 1).all() and equal.any(1).all()  # by sample, and by branch
        assert torch.allclose(block.eval()(x), 2 * (x + block.attn(block.norm1(x))), atol=1e-5)


# ---- weights in and out ----

def backbone_1_and_2(E1, E2, module="module."):
    """A file of the authors: two backbones, projectors, the loss's batch norm, one prefix."""
    state = {"projector1.0.weight": torch.zeros(4, 4), "projector2.0.weight": torch.zeros(4, 4),
             "bn.running_mean": torch.zeros(4), "bn.num_batches_tracked": torch.tensor(3)}
    for name, E in (("backbone_1", E1), ("backbone_2", E2)):
        state |= {f"{name}.{k}": v for k, v in E.state_dict().items()}
    return {module + k: v for k, v in state.items()}


def save_and_load(state, encoders, tmp_path):
    """Saves a file and loads it into fresh encoders: each parameter is that of `encoders`."""
    torch.save(state, tmp_path / "file.pth")
    name = "mit_b0" if isinstance(encoders[0], decur.MiT) else "resnet-toy"
    states = decur.read_weights(tmp_path / "file.pth", name)
    assert len(states) == len(encoders)
    for state, E in zip(states, encoders):
        fresh = type(E)(name, E.channels)
        count = len(fresh.state_dict())
        assert decur.load_encoder(fresh, state) == f"{count} of {count} keys matched"
        assert all(torch.equal(fresh.state_dict()[key], t) for key, t in E.state_dict().items())


@pytest.mark.parametrize("wrap", [
    dict, lambda state: dict(model=state, epoch=3, args=dict(method="decur")),
    lambda state: dict(state_dict=state), lambda state: dict(model_state_dict=state),
    lambda state: {f"_orig_mod.{key}": t for key, t in state.items()},      # torch.compile
    lambda state: {f"model.backbone.{key}": t for key, t in state.items()},
    lambda state: state | {"fc.weight": torch.zeros(9, 8), "fc.bias": torch.zeros(9)},
    lambda state: {key: t for key, t in state.items() if "num_batches" not in key}])    # old files
def test_an_encoder_is_found_in_every_form_of_file(wrap, tmp_path):
    E = decur.resnet("resnet-toy", 2)
    save_and_load(wrap(E.state_dict()), [E], tmp_path)


def test_a_checkpoint_gives_both_encoders_without_projectors(tmp_path):
    net = decur.DeCUR("resnet-toy", 2, 13, (8, 8))
    save_and_load(dict(model=net.state_dict(), step=3, settings={}), [net.f1.E, net.f2.E], tmp_path)


@pytest.mark.parametrize("module", ["module.", ""])
def test_a_file_of_the_authors_gives_both_encoders(module, tmp_path):
    encoders = decur.resnet("resnet-toy", 2), decur.resnet("resnet-toy", 13)
    state = dict(model=backbone_1_and_2(*encoders, module), epoch=99, optimizer=dict(state={}))
    save_and_load(state, encoders, tmp_path)


def test_weights_that_do_not_fit_are_refused():
    """By torch's own message, with the first keys of the file."""
    E = decur.resnet("resnet-toy", 3)
    other = {f"encoder.{key}": t for key, t in E.state_dict().items()}
    for state, words in ((decur.resnet("resnet-toy", 13).state_dict(), "conv1.weight.*16, 13, 3"),
                         (other, "encoder.conv1.weight")):
        is_refused(words, decur.load_encoder, E, state, error=ValueError)


@pytest.mark.parametrize("content, words", [
    (b"not weights at all", "file.pth"), ({1: torch.zeros(2)}, "file.pth"),
    ({"model": {}, "args": argparse.Namespace(lr=0.2)}, "file.pth .*could run code"),
    ({"net": {}, "epoch": 3}, "file.pth: .* net epoch"),
    ({"conv1.weight": torch.tensor([math.nan])}, "file.pth: conv1.weight")])
def test_files_without_weights_or_with_code_are_refused(content, words, tmp_path):
    file = tmp_path / "file.pth"
    write = file.write_bytes if isinstance(content, bytes) else partial(torch.save, f=file)
    write(content)
    is_refused(words, decur.read_weights, file, "resnet-toy", error=ValueError)


def test_of_a_safetensors_file_it_is_said_how_to_convert_it():
    is_refused("python -c .*load_file\\('x.safetensors'", decur.read_weights, "x.safetensors",
               "resnet-toy", error=ValueError)


def test_bgr_weights_are_turned_around():
    """With OpenCV the authors' first channel is blue; only the first convolution cares."""
    for make, name in ((decur.resnet, "resnet-toy"), (decur.mit, "mit_b0")):
        theirs, ours = make(name, 3).eval(), make(name, 3).eval()
        decur.load_encoder(ours, theirs.state_dict(), bgr=True)
        rgb = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.allclose(ours(rgb), theirs(rgb.flip(1)), atol=1e-5)
            assert not torch.allclose(ours(rgb), theirs(rgb), atol=1e-3)


# ---- processes: the loss and its gradient are those of one process with the joint batch ----

def process(rank, world, folder, function, *args):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    torch.save(function(rank, world, *args), f"{folder}/{rank}.pt")
    pretrain.leave()


def in_processes(world, folder, function, *args):
    """What function(rank, world, *args) returns in each of `world` gloo processes."""
    folder.mkdir()
    multiprocessing.set_forkserver_preload([__name__])  # one server imports what all of them need
    torch.multiprocessing.start_processes(process, (world, folder, function, *args), nprocs=world,
                                          start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def losses_and_gradients(rank, world):
    """Of DeCUR and of all that it is compared with: {name: [loss, gradient of each view]}."""
    assert pretrain.max_over_processes(rank, torch.device("cpu")) == world - 1
    results = {}
    for name in pretrain.METHODS:
        joint = embeddings(16, 24, torch.float32)
        z = [view.detach().chunk(world)[rank].requires_grad_() for view in joint]
        args = argparse.Namespace(method=name, no_intra=False)
        views = z if name == "decur" else [z[0], None, z[2], None]
        loss = pretrain.compute_loss(args, 18, *map(pretrain.gather, views))[0]
        loss.backward()
        gradients = [view.grad / world for view in views if view is not None]  # DDP averages
        results[name] = [loss.detach(), *gradients]
    return results


def three_steps(rank, world):
    """Two branches' parameters after three LARS steps and before, batch norm in evaluation mode."""
    torch.manual_seed(0)
    net = DeCUR("resnet-toy", 3, 1, [16, 16]).eval()
    before = [p.detach().clone() for p in net.parameters()]
    model = pretrain.distribute(net, world, torch.device("cpu"))
    optimizer = pretrain.make_optimizer(net, pretrain.get_args(["--scenario", "rgbd"])[0])
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(3):
        draws = drawn(8, step, rows)
        g = torch.Generator().manual_seed(step)
        x1, x2 = (torch.rand(8, C, 36, 48, generator=g)[rows] for C in (3, 1))
        views = (x1, "rgb"), (x1, "rgb"), (x2, "depth"), (x2, "depth")
        x = [data.augment(x_, MODALITIES[name], 32, draws) for x_, name in views]
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
            moved = []
            for after in (rank, one):
                moved.append([p - p0 for p, p0 in zip(after, before) if p.ndim == ndim])
            assert relative(*moved) < 1e-4


@pytest.mark.parametrize("device, gpus, local_world, backend", [
    ("cuda", 4, "4", "nccl"), ("cuda", 1, "2", "gloo"), ("cpu", 0, "2", "gloo"),
    ("cuda", 1, None, "nccl")])                 # srun, with one visible GPU for each process
def test_processes_with_a_gpu_each_use_nccl(device, gpus, local_world, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world)
    assert pretrain.choose_backend(torch.device(device)) == backend


# ---- pretrain.py: App. B ----

@pytest.mark.parametrize("p, g, lr, decay, steps, moved", [
    ([[3, 4]], [[6, 8]], 2, 0, 1, [[0.006, 0.008]]),    # |p| = 5, |g| = 10: trust = 0.001 * 5 / 10
    ([[3, 4]], [[60, 80]], 2, 0, 1, [[0.006, 0.008]]),  # the scale of the loss does nothing ...
    ([3, 4], [6, 8], 2, 0, 1, [12, 16]),                # ... but for a bias: no trust
    ([[2, 2], [2, 2]], [[0, 0], [0, 0]], 1, 0.5, 1, [[0.002, 0.002], [0.002, 0.002]]),
    ([2, 2], [0, 0], 1, 0.5, 1, [0, 0]),                # a bias does not decay
    ([[0, 0], [0, 0]], [[1, 1], [1, 1]], 0.1, 1e-6, 1, [[0.1, 0.1], [0.1, 0.1]]),  # norm 0 moves
    # then |p| = 4.99: 2 (0.9 (0.003, 0.004) + (0.002994, 0.003992)) beside the first step
    ([[3, 4]], [[6, 8]], 2, 0, 2, [[0.006 + 0.011388, 0.008 + 0.015184]])])
def test_lars_steps_by_hand(p, g, lr, decay, steps, moved):
    """With decay 0.5 and gradient 0 the direction is 0.5 p, trust 0.001 |p| / |0.5 p| = 0.002."""
    after = nn.Parameter(torch.tensor(p).double())
    optimizer = pretrain.LARS([after], lr=lr, weight_decay=decay)
    for _ in range(steps):
        after.grad = torch.tensor(g).double()
        optimizer.step()
    difference = torch.tensor(p) - after
    assert torch.allclose(difference, torch.tensor(moved).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("flags, settings", [
    ("sar-optical", dict(common=0.875, epochs=100, batch_size=256)),
    ("rgb-dem", dict(common=0.75, epochs=100, batch_size=256)),
    ("rgbd", dict(common=0.75, epochs=200, batch_size=128, size=224, backbone="resnet50", lr=0.2,
                  lr_bias=0.0048, weight_decay=1e-6, widths=[8192] * 3)),
    ("rgbd --backbone mit_b5", dict(lr=1e-4, lr_bias=1e-4, weight_decay=0.01, common=0.75)),
    ("rgbd --method barlowtwins", dict(common=1, widths=[8192] * 3)),
    ("rgbd --method simclr", dict(common=1, widths=[2048, 128])),
    ("rgbd --method clip", dict(common=1, widths=[1024]))])
def test_pretraining_defaults_are_the_papers(flags, settings):
    """Sec. 4 and App. B; SimCLR Sec. 2.3, CLIP Sec. 2.3 and Table 19."""
    args = vars(pretrain.get_args(f"--scenario {flags}".split())[0])
    assert {name: args[name] for name in settings} == settings


# ---- pretrain.py as a program ----

SMALL = ("--scenario rgbd --split train --size 32 --backbone resnet-toy --projector 32-32-32 "
         "--batch-size 16 --lr 2 --epochs 1")


def call(program, flags):
    program.main(shlex.split(flags))


def flags_of(scenes, out, more=""):
    """A later flag of the same name counts."""
    return f"{SMALL} --data {scenes} --out {out} {more}"


def command(flags, launcher=()):
    return dict(args=[sys.executable, *launcher, HERE / "pretrain.py", *flags.split()], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """48 made-up rooms for training, 16 for tests."""
    root = tmp_path_factory.mktemp("scenes") / "toy-rgbd"
    data.make_toy("rgbd", root, scenes=48, held_out=16)
    return root


@pytest.fixture(scope="session")
def pretrained(scenes, tmp_path_factory):
    """A run of 16 epochs, 3 steps each, by the command line: its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "decur-0"
    result = subprocess.run(**command(flags_of(scenes, out, "--epochs 16")))
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.fixture(scope="session")
def runs(pretrained, scenes):
    """The folder of three runs: `pretrained`, one without unique dimensions and intra terms, one on
    own pairs."""
    folder = pretrained[0].parent
    flags = "--seed 1 --common 1 --no-intra"
    call(pretrain, flags_of(scenes, folder / "nodecoup-1", flags))
    call(pretrain, own_pairs(scenes, folder / "own"))
    return folder


def own_pairs(scenes, out):
    return (f"--scenario custom --backbone resnet-toy --size 48 --projector 8-16 --batch-size 16 "
            f"--epochs 1 --data1 {scenes}/RGB --data2 {scenes}/Depth --out {out}")


def log_of(out):
    """The last line of each step, without speed and waiting, which equal runs do not share."""
    lines = {}
    for text in (out / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines[line["step"]] = line
    for line in lines.values():
        del line["pairs_per_s"], line["data"]
    return list(lines.values())


def test_the_loss_of_a_pretraining_falls(pretrained):
    log = log_of(pretrained[0])
    assert [line["step"] for line in log] == list(range(1, 49))
    losses = [line["loss"] for line in log]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_a_pretraining_saves_each_encoder_alone_and_what_it_sees(pretrained):
    out, _ = pretrained
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    for k, bands in ((1, ["red", "green", "blue"]), (2, ["depth"])):
        encoder = torch.load(out / f"encoder{k}.pth", weights_only=True)
        assert torch.equal(encoder["conv1.weight"], checkpoint["model"][f"f{k}.E.conv1.weight"])
        assert json.loads((out / f"encoder{k}.json").read_text())["sees"]["bands"] == bands


@pytest.mark.parametrize("signalled", [True, False])
def test_resume_equals_no_interruption(signalled, pretrained, scenes, tmp_path):
    """SIGTERM or a closed pipe in mid-epoch, then --resume: the weights and log, bit for bit."""
    whole, broken = pretrained[0], tmp_path / "broken"
    flags = flags_of(scenes, broken, "--epochs 16")
    process = subprocess.Popen(**command(flags))
    while "step 000004" not in process.stdout.readline():
        assert process.poll() is None
    if signalled:
        process.send_signal(signal.SIGTERM)
        assert "--resume" in process.stdout.read()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=60) == (143 if signalled else 141)  # 128 + the signal's number
    step = torch.load(broken / "checkpoint.pt", weights_only=True)["step"]
    assert 4 <= step < 48
    later = dict(log_of(broken)[-1], step=step + 1, pairs_per_s=0, data=0)
    with open(broken / "log.jsonl", "a") as file:  # as if killed later, after the checkpoint
        file.write(json.dumps(later) + "\n" + json.dumps(later)[:20])
    call(pretrain, f"{flags} --resume")
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, broken))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert log_of(whole) == log_of(broken)


def test_resume_without_a_checkpoint_begins_anew_and_says_so(scenes, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 9}\n')  # of a run that died before its first save
    call(pretrain, flags_of(scenes, tmp_path, "--resume"))
    printed = capsys.readouterr().out
    assert "resumed from" not in printed and re.search(f"checkpoint.pt .*{tmp_path}", printed)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3]


def test_workers_of_any_number_and_start_method_give_the_same_batches(scenes, tmp_path):
    """One loader for the whole run; forkserver is Python 3.14's default."""
    call(pretrain, flags_of(scenes, tmp_path / "a", "--epochs 2"))
    program = ("import multiprocessing, sys; multiprocessing.set_start_method('forkserver'); "
               "sys.path.insert(0, sys.argv.pop(1)); import pretrain; pretrain.main()")
    script = tmp_path / "script.py"
    script.write_text(f"if __name__ == '__main__':\n    {program}\n")
    flags = flags_of(scenes, tmp_path / "b", "--epochs 2 --workers 2").split()
    subprocess.run([sys.executable, script, HERE, *flags], check=True, capture_output=True)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_resuming_ones_own_pairs_keeps_what_was_measured(runs, scenes, tmp_path, monkeypatch):
    """Else the statistics, measured on another machine, could differ in the last digit."""
    shutil.copytree(runs / "own", tmp_path / "own")
    monkeypatch.setattr(data, "measure_inputs", None)
    call(pretrain, f"{own_pairs(scenes, tmp_path / 'own')} --resume")
    a, b = (pretrain.load_checkpoint(folder / "own/checkpoint.pt") for folder in (runs, tmp_path))
    assert a["settings"]["inputs"] == b["settings"]["inputs"]


def test_the_order_of_batches_goes_on_where_it_stood_and_ranks_share_it():
    """The order depends only on seed and epoch.  An epoch has each index once or never, in whole
    batches."""
    order = partial(pretrain.order_batches, np.arange(10, 20), 4)
    whole = list(order(0, slice(0, 4), 0, 5))
    assert [epoch for batch in whole for epoch, _ in batch] == [0] * 8 + [1] * 8 + [2] * 4
    first, second = (set(sum(whole[k:k + 2], [])) for k in (0, 2))
    assert len(first) == len(second) == 8
    assert list(order(0, slice(0, 4), 3, 5)) == whole[3:]
    assert [a + b for a, b in zip(order(0, slice(2), 0, 5), order(0, slice(2, 4), 0, 5))] == whole
    others = [data.epoch_batches(50, 8, *at).tolist() for at in ((3, 1), (3, 1), (3, 2), (4, 1))]
    assert [other == others[0] for other in others] == [True, True, False, False]


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(scenes, tmp_path, monkeypatch):
    calls = []

    def diverges(x, row, size, draws):
        calls.append(1)
        return data.augment(x, row, size, draws) * (math.nan if len(calls) > 20 else 1)

    monkeypatch.setattr(pretrain, "augment", diverges)
    is_refused("nan .*step 6 ", call, pretrain,
               flags_of(scenes, tmp_path, "--epochs 4 --save-every 1e-6"), error=SystemExit)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 5 and all(p.isfinite().all() for p in checkpoint["model"].values())


@pytest.mark.parametrize("flags, words", [
    ("--data nowhere", "nowhere"), ("--split val", "val.txt"), ("--batch-size 49", "-size 49"),
    ("--projector 32-x", "--projector 32-x"), ("--out {scenes}/train.txt/out", "--out .*/out"),
    ("--bgr --weights {run}/checkpoint.pt", "--bgr .*checkpoint.pt"),
    ("--weights {run}/encoder1.pth", "encoder1.pth"), ("--weights nowhere.pth", "nowhere.pth"),
    ("--weights {run}", "Is a directory.* Give a checkpoint.pt"),
    ("--out {run}", "--out .*--resume"),
    ("--out {run} --resume --epochs 20", "epochs is 20, .*--weights .*/checkpoint.pt")])
def test_bad_input_is_refused_in_one_line(flags, words, scenes, pretrained, tmp_path):
    """Nothing is left behind, and no earlier run is overwritten."""
    run = pretrained[0]
    before = {path: path.read_bytes() for path in run.iterdir()}
    flags = flags_of(scenes, tmp_path / "out", flags.format(scenes=scenes, run=run))
    is_refused(words, call, pretrain, flags)
    assert not (tmp_path / "out").exists()
    assert before == {path: path.read_bytes() for path in run.iterdir()}


def test_a_damaged_checkpoint_is_named_and_left_alone(pretrained, scenes, tmp_path):
    half = (pretrained[0] / "checkpoint.pt").read_bytes()[:99999]
    (tmp_path / "checkpoint.pt").write_bytes(half)
    is_refused("checkpoint.pt .*--out", call, pretrain, flags_of(scenes, tmp_path, "--resume"))
    assert (tmp_path / "checkpoint.pt").read_bytes() == half


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_a_worker_that_is_killed_loses_nothing(scenes, tmp_path):
    process = subprocess.Popen(**command(flags_of(scenes, tmp_path, "--epochs 64 --workers 1")))
    while "step 000003" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in error
    step, = re.findall(r"Step (\d+) is saved", error)
    assert pretrain.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == int(step)


def test_a_damaged_file_of_the_second_process_loses_nothing(scenes, tmp_path):
    root, out = shutil.copytree(scenes, tmp_path / "scenes"), tmp_path / "out"
    name = f"{data.epoch_batches(48, 16, 0, 0)[2][12]:04d}.png"     # 8 to 15 are of process 1
    (root / "Depth" / name).write_bytes(b"not a picture")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    result = subprocess.run(**command(flags_of(root, out, "--epochs 2"), torchrun))
    assert re.search(rf"error: .*{name} .*Step 2 is saved", result.stderr)
    assert pretrain.load_checkpoint(out / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("batch, workers", [(0, 1), (2, 0), (2, 1)])
def test_a_damaged_file_ends_the_run_in_one_line_and_loses_nothing(batch, workers, scenes,
                                                                   pretrained, tmp_path):
    """Also from a loader's worker, which wraps the message in its traceback."""
    root, out = shutil.copytree(scenes, tmp_path / "scenes"), tmp_path / "out"
    name = f"{data.epoch_batches(48, 16, 0, 0)[batch][0]:04d}.png"
    (root / "Depth" / name).write_bytes(b"not a picture")
    flags = flags_of(root, out, f"--epochs 16 --workers {workers}")
    result = subprocess.run(**command(flags))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.fullmatch(rf"error: .*{name} .*", result.stderr.splitlines()[-1])
    assert out.exists() == (batch > 0)          # the first batch is read before --out is made
    steps = [pretrain.load_checkpoint(path)["step"] for path in out.glob("checkpoint.pt")]
    assert steps == [batch] * (batch > 0)
    shutil.copy(scenes / "Depth" / name, root / "Depth")
    call(pretrain, f"{flags} --resume")
    assert log_of(out) == log_of(pretrained[0])


def test_of_two_runs_that_begin_at_once_in_a_folder_one_is_refused(tmp_path):
    """Both find the folder empty; the second to make its log is refused."""
    begin = partial(pretrain.make_run_folder, process=(0, 1, torch.device("cpu")))
    args = [argparse.Namespace(out=tmp_path, resume=False, data=name) for name in "ab"]
    assert pretrain.find_checkpoint(tmp_path, resume=False) is None
    begin(args[0], {})
    is_refused(f"--out {tmp_path}: another run", begin, args[1], {})
    assert json.loads((tmp_path / "args.json").read_text())["data"] == "a"


def test_torchrun_trains_on_two_cpu_processes(scenes, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    result = subprocess.run(**command(flags_of(scenes, tmp_path), torchrun))
    assert result.returncode == 0, result.stderr
    assert "gloo" in result.stdout
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3]


def signalled_at_step_1(rank, world, flags):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    if rank == 1:
        pretrain.measure_embeddings = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or {}
    call(pretrain, flags)


def test_a_signal_to_one_process_stops_all_after_the_same_step(scenes, tmp_path):
    in_processes(2, tmp_path / "w", signalled_at_step_1, flags_of(scenes, tmp_path / "out"))
    assert pretrain.load_checkpoint(tmp_path / "out" / "checkpoint.pt")["step"] == 1


@pytest.mark.parametrize("N, n, world, words", [
    (16, 48, 3, "--batch-size 16 .* Give 15"), (16, 47, 2, None), (64, 47, 2, "Give 46"),
    (63, 13, 2, "--batch-size 63 .* Give 12"), (4, 3, 2, "too few samples, 3.* 4 or more")])
def test_a_batch_is_divided_evenly_among_the_processes(N, n, world, words):
    """The batch size of the message is not refused."""
    if words is None:
        return pretrain.check_batch(N, n, world, least=2)
    is_refused(words, pretrain.check_batch, N, n, world, least=2)


@pytest.mark.parametrize("name, value, words", [
    ("RANK", "", "RANK= .*unset RANK"), ("RANK", "1", "RANK=1 and WORLD_SIZE=1"),
    ("WORLD_SIZE", "2", "MASTER_ADDR")])
def test_an_environment_that_torchrun_has_not_set_is_one_line(name, value, words, monkeypatch):
    for other in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    is_refused(words, lambda: pretrain.join(Path("x"), 0, pretrain.read_environment()))


# ---- pretrain.py: methods, ablations and weights ----

@pytest.mark.parametrize("flags, views", [
    ("--no-intra", 2), ("--common 0 --projector none", 4), ("--method barlowtwins", 2),
    ("--method vicreg", 2), ("--method simclr", 2), ("--method clip", 2),
    ("--method barlowtwins --modality 2", 2)])
def test_every_method_and_ablation_trains_on_the_views_it_uses(flags, views, scenes, tmp_path,
                                                               monkeypatch):
    """Tables 1-4, Fig. 3: one trainer; a modality that is not encoded has no encoder."""
    calls = watched(monkeypatch, decur.ResNet, "forward")
    call(pretrain, flags_of(scenes, tmp_path, flags))
    channels = {"encoder1.pth": 3, "encoder2.pth": 1}
    if "--modality 2" in flags:
        del channels["encoder1.pth"]
    assert len(calls) == 3 * views              # three steps
    assert {E.channels for E, _ in calls} == set(channels.values())
    assert {path.name for path in tmp_path.glob("encoder*.pth")} == channels.keys()


def test_segformers_train_with_adamw_that_spares_biases_and_norms_and_resnets_with_lars():
    """App. B: "AdamW optimizer and a learning rate of 1e-4" for SegFormer's; LARS otherwise."""
    net = DeCUR("mit_b0", 3, 1, [32, 32, 32])
    args = argparse.Namespace(backbone="mit_b0", lr=1e-4, lr_bias=1e-4, weight_decay=0.01)
    adamw = pretrain.make_optimizer(net, args)
    assert isinstance(adamw, torch.optim.AdamW)
    decayed, spared = adamw.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0)
    assert len(spared["params"]) == sum(p.ndim < 2 for p in net.parameters())
    args.backbone = "resnet50"
    assert isinstance(pretrain.make_optimizer(net, args), pretrain.LARS)


@pytest.mark.parametrize("files, more", [
    ("checkpoint.pt", ""), ("encoder1.pth encoder2.pth", ""),
    ("checkpoint.pt", "--method barlowtwins --modality 2")])
def test_weights_start_a_run(files, more, pretrained, scenes, tmp_path, monkeypatch, capsys):
    """A file with both encoders, or a file for each; the file's own pretraining is printed."""
    first = pretrained[0]
    monkeypatch.setattr(pretrain, "cosine", lambda step, steps: 0)  # a rate of 0: weights stay
    files = " ".join(f"{first}/{file}" for file in files.split())
    call(pretrain, flags_of(scenes, tmp_path, f"--weights {files} {more}"))
    assert "decur on rgbd, common 0.75, 16 epochs, seed 0" in capsys.readouterr().out
    a, b = (torch.load(folder / "encoder2.pth", weights_only=True) for folder in (first, tmp_path))
    keys = [key for key in a if "running" not in key and "num_batches" not in key]
    assert all(torch.equal(a[key], b[key]) for key in keys)


RGB = data.MODALITIES["rgb"]
MEASURED = dict(RGB, range="raw_mean -+ 3 x raw_std", raw_mean=[9.0] * 3, raw_std=[2.0] * 3)


@pytest.mark.parametrize("change, words", [
    (lambda about: about.pop("sees"), None), (lambda about: about.pop("settings"), "settings"),
    (lambda about: about["settings"].pop("no_intra"), "no_intra"),
    (lambda about: about["sees"].pop("std"), "encoder1.json .* lacks std")])
def test_a_json_beside_weights_is_whole_or_of_another_project(change, words, pretrained, tmp_path):
    about = json.loads((pretrained[0] / "encoder1.json").read_text())
    change(about)
    (tmp_path / "encoder1.json").write_text(json.dumps(about))
    if words is None:
        assert pretrain.read_pretraining(tmp_path / "encoder1.pth") == ({}, [])
    else:
        is_refused(words, pretrain.read_pretraining, tmp_path / "encoder1.pth")


def test_a_checkpoint_that_lacks_settings_is_weights_without_a_record(pretrained, tmp_path):
    checkpoint = torch.load(pretrained[0] / "checkpoint.pt", weights_only=True)
    del checkpoint["settings"]["backbone"]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert pretrain.read_pretraining(tmp_path / "checkpoint.pt") == ({}, [])


@pytest.mark.parametrize("seen, differs", [
    (RGB, False), (dict(RGB, bands=["channel 1", "channel 2", "channel 3"]), False),
    (json.loads(json.dumps(RGB)), False), (data.MODALITIES["hha"], True), (MEASURED, True)])
def test_a_warning_compares_what_an_encoder_sees_and_not_only_names(seen, differs):
    assert pretrain.differ(seen, RGB) == differs


def test_a_warning_names_the_numbers_of_a_measured_normaliser():
    text = pretrain.describe_input(MEASURED)
    assert "9 9 9 -+ 3 x 2 2 2" in text and "raw_mean" not in text


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


def tiff(a, **settings):
    return lambda path: tifffile.imwrite(path, a, **settings)


def npy(a):
    return lambda path: np.save(path, a)


# ---- the data order and the augmentations ----

def test_the_crop_is_an_antialiased_resize_of_a_box():
    x = torch.rand(1, 5, 20, 24, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[3, 2, 7, 9, 1, 0]])  # top, left, height, width, upside down, mirrored
    inside = x[:, :, 3:10, 2:11]
    expected = F.interpolate(inside, (11, 11), mode="bilinear", antialias=True).flip(2)
    assert torch.equal(data.crop_in_turn(x, 11, boxes), expected)


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_a_gpu_s_crops_equal_a_cpu_s(name):
    """The batched filters, here run on a CPU: random boxes of the modality's scale and flips, and
    boxes that touch each border or are one pixel, to more and to fewer pixels."""
    row, settings = MODALITIES.get(name, dict(bands="any")), data.AUGMENTATIONS[name]
    B, H, W = 16, 40, 52
    x = torch.randint(0, 256, (B, len(row["bands"]), H, W), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(0))
    draws = drawn(B)
    *box, mirrored = data.draw_boxes(B, H, W, settings["scale"], draws)
    upside_down = draws(1) < (0.5 if settings.get("vflip") else 0)
    boxes = torch.cat((*box, upside_down, mirrored), 1)
    boxes[:4] = torch.tensor([[0, 0, H, W, 0, 0], [H - 1, W - 1, 1, 1, 1, 1],
                              [H - 7, 0, 7, W, 0, 1], [0, W - 9, H, 9, 1, 0]])
    assert boxes[:, 4].any() and boxes[:, 5].any()
    for size in (24, 96):
        crops = data.crop_in_turn(x, size, boxes)
        assert (data.crop_at_once(x, size, boxes) - crops).abs().max() < 1e-4


def test_crops_cover_the_areas_and_ratios_asked_for_and_half_are_flipped():
    """Ramps in x and y show each box: a slope gives the length of a side, its sign the flip."""
    ramps = torch.meshgrid(torch.arange(80), torch.arange(60), indexing="xy")
    ramps, draws = torch.stack(ramps).expand(400, 2, 60, 80) / 100, drawn(400)
    y = 100 * data.random_resized_crop(ramps, 10, (0.25, 0.5), draws)
    w = (y[:, 0, 5, 7] - y[:, 0, 5, 2]) * 2     # 5 of 10 pixels apart
    h = (y[:, 1, 7, 5] - y[:, 1, 2, 5]) * 2
    area, ratio = (w.abs() * h) / (60 * 80), w.abs() / h
    assert 0.24 < area.min() < 0.27 and 0.48 < area.max() < 0.51
    assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.37
    assert 0.4 < (w < 0).float().mean() < 0.6
    second_view = 100 * data.random_resized_crop(ramps, 10, (0.25, 0.5), draws)
    assert (second_view - y).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_box_that_never_fits_becomes_the_largest_centred_one():
    """A strip of 8 x 100 has no box of its whole area within 3/4 and 4/3: 8 x 11 in the middle."""
    x = torch.arange(100.0).expand(1, 1, 8, 100) / 100
    y = data.random_resized_crop(x, 11, (1.0, 1.0), drawn(1))
    assert sorted((100 * y[0, 0, 0]).round().int().tolist()) == list(range(44, 55))


def test_brightness_contrast_and_saturation_are_torchvisions_and_never_wrap():
    """The authors' uint8 arithmetic wrapped 230 * 1.4 to 66: half of the images are so bright."""
    x = torch.rand(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[:32] = 230 / 255
    for k, function in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)):
        factors = 1 + 0.4 * (2 * drawn(64, k)(6)[:, 1 + k] - 1)
        y = data.random_colour(x, (0.4 * torch.eye(4)[k]).tolist(), 1.0, 0.0, drawn(64, k))
        expected = [function(image, factor) for image, factor in zip(x, factors.tolist())]
        assert torch.allclose(y, torch.stack(expected), atol=2e-3) and y.max() == 1


@pytest.mark.parametrize("C", [2, 3, 13])
def test_grayscale_makes_channels_equal_for_any_number_of_them(C):
    x = torch.rand(4, C, 5, 5)
    y = data.random_colour(x, (0.0,) * 4, 0.0, 1.0, drawn(4))
    assert torch.allclose(y, y[:, :1].expand_as(y), atol=1e-6)
    assert C == 3 or torch.allclose(y[:, 0], x.mean(1), atol=1e-6)


def test_hue_turns_red_into_green_into_blue_and_keeps_grey():
    third = data.make_hue_rotation(torch.tensor([2 * np.pi / 3]))[0]
    assert torch.allclose(third @ torch.eye(3), torch.eye(3).roll(1, 0), atol=1e-6)
    grey = data.make_hue_rotation(torch.tensor([0.7]))[0] @ torch.ones(3)
    assert torch.allclose(grey, torch.ones(3), atol=1e-6)


def test_blur_keeps_constants_and_touches_only_the_images_that_draw_it():
    x = torch.rand(40, 1, 56, 56, generator=torch.Generator().manual_seed(0))
    x[:, :, :28] = 0.5
    y = data.random_blur(x.clone(), 0.5, drawn(40))
    assert torch.allclose(y[:, :, :24], x[:, :, :24], atol=1e-5)  # 8 sigma of <= 0.5 pixels away
    unchanged = (y == x).flatten(1).all(1)
    assert 10 < unchanged.sum() < 30
    assert torch.equal(data.random_blur(x.clone(), 0.0, drawn(40)), x)


def test_solarize_inverts_what_is_bright():
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 1, 3)
    solarized = data.random_solarize(x.clone(), 1.1, drawn(1)).flatten()
    assert torch.allclose(solarized, torch.tensor([0.2, 0.5, 0.1]))
    assert torch.equal(data.random_solarize(x.clone(), 0.0, drawn(1)), x)
    x = torch.full((40, 1, 2, 2), 0.75)
    inverted = (data.random_solarize(x, 0.5, drawn(40)) == 0.25).flatten(1).all(1)
    assert 10 < inverted.sum() < 30             # whole images, and about half of them


@pytest.mark.parametrize("name, C", [("sar", 2), ("dem", 3), ("ms", 13)])
def test_what_is_seen_from_above_is_augmented_as_section_4_says(name, C):
    """SAR: no jitter, no solarize.  DEM: only crops and flips.  13 bands stay within [0, 1]."""
    row = MODALITIES[name]
    flat = augment(torch.full((400, C, 12, 12), 102, dtype=torch.uint8), row, 8, drawn(400, 1))
    assert flat.shape == (400, C, 8, 8) and flat.min() >= 0 and flat.max() <= 1
    assert ((flat - 0.4).abs().max() > 1e-5) == (name == "ms")
    noise = augment(torch.rand(400, C, 12, 12), row, 8, drawn(400, 2))
    grey = (noise - noise[:, :1]).abs().amax((1, 2, 3)) < 1e-5          # p = 0.2
    assert grey.sum() == 0 if name == "dem" else 50 < grey.sum() < 110
    ramp = torch.arange(12.0).view(1, 1, 12, 1).expand(400, C, 12, 12) / 11
    ramp = augment(ramp, row, 8, drawn(400, 2))
    assert 160 < (ramp[:, 0, 0, 0] > ramp[:, 0, -1, 0]).sum() < 240     # upside down


@pytest.mark.parametrize("value, dtype, words", [
    (7500, torch.float32, "7500"), (np.nan, torch.float32, "nan"), (-0.1, torch.float32, "-0.1"),
    (0, torch.int32, "int32")])
def test_images_are_uint8_or_float_from_0_to_1(value, dtype, words):
    """Images are checked wherever they enter.  Depth in metres gave a loss of 60481 once."""
    x, row = torch.full((1, 1, 4, 4), value, dtype=dtype), MODALITIES["depth"]
    is_refused(words, data.resize_and_normalise, x, row, 4)
    is_refused(words, data.normalise, x, row)
    is_refused(words, augment, x, row, 4, drawn(1))


@pytest.mark.parametrize("keep, reads", [(True, 5), (False, 10)])
def test_unchanging_samples_are_decoded_once(keep, reads, scenes, monkeypatch):
    samples = data.Samples(open_dataset("rgbd", scenes, 32), keep)
    calls = watched(monkeypatch, data.Folders, "__getitem__")
    first, again = ([samples[epoch, i] for i in range(5)] for epoch in (0, 1))
    assert len(calls) == reads
    for (a, _), (b, _) in zip(first, again):
        assert torch.equal(a[0], b[0])


# ---- RGB-depth ----

def write_frames(root, n=4):
    for i in range(n):
        save(root / "RGB" / f"{i}.png", Image.new("RGB", (48, 36), (10 * i, 20, 30)))
        depth = np.full((36, 48), 2000 + 100 * i, np.uint16)
        depth[0, 0], depth[0, 1] = 0, 65535
        save(root / "Depth" / f"{i}.png", depth)
    (root / "intrinsics.txt").write_text("48 0 24 0 48 18 0 0 1")
    return root


def test_frames_of_any_size_are_read_as_colour_and_metres_and_holes_do_not_bleed(tmp_path):
    """Canvas 36 x 48 for crops of 24; 2000 mm / 10 m = 0.2; no reading: the data set's mean."""
    rgb = np.full((160, 200, 3), (10, 20, 30), np.uint8)
    depth = np.full((160, 200), 2000, np.uint16)
    depth[:80] = 0
    save(tmp_path / "RGB" / "x.jpg", rgb)
    save(tmp_path / "Depth" / "x.png", depth)
    (x1,), (x2,) = open_dataset("rgbd", tmp_path, 24)[0]
    assert x1.shape == (3, 36, 48) and x1[:, 5, 5].tolist() == [10, 20, 30]
    assert x2.shape == (1, 36, 48)
    assert set(x2.unique().mul(1000).round().int().tolist()) == {200, 238}


def test_lists_name_the_frames_of_a_split(tmp_path):
    """Names, paths, suffixes, CRLF, second columns, spaces, a BOM, two forms of accents."""
    names = dict.fromkeys(["frame", "frame 1", "frame 2", "0", "2", "caf\u00e9", "a.b"])
    file = tmp_path / "train.txt"
    file.write_bytes("\ufeff2\r\nRGB/0.png\tLabel/0.png\r\n\r\nframe 1\nframe 2\na.b\n"
                     "cafe\u0301.jpg".encode())
    assert data.read_list(file, names) == ["2", "0", "frame 1", "frame 2", "a.b", "caf\u00e9"]


@pytest.mark.parametrize("reader, text, words", [
    (data.read_intrinsics, b"0 0 1 0 1 1 0 0 1", "it "),
    (partial(data.read_list, names=dict.fromkeys("01")), b"0\n1\n0\n", "it .*0 twice"),
    (partial(data.read_list, names=dict.fromkeys("01")), b"0\n9\n", "it: .*'9'"),
    (partial(data.read_json, what="settings"), b"[1]", "it ")])
def test_lists_cameras_and_json_that_make_no_sense_are_refused(reader, text, words, tmp_path):
    (tmp_path / "it").write_bytes(text)
    is_refused(words, reader, tmp_path / "it")


CAMERA = np.array([[80, 0, 80], [0, 80, 60], [0, 0, 1.0]])


def tilted_room():
    """120 x 160 of a turned camera's room: depth in m, planes (floor, ceiling, wall), heights."""
    (cp, cr), (sp, sr) = np.cos(np.radians((12, 7))), np.sin(np.radians((12, 7)))  # pitch, roll
    turn = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    turn = turn @ np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    y, x = np.mgrid[1:121, 1:161]
    rays = np.stack([(x - 80) / 80, (y - 60) / 80, np.ones((120, 160))]).reshape(3, -1)
    rays = turn @ rays                          # x right, y down, z forward
    sides = np.where(rays > 0, [[1.4], [1.5], [3.0]], [[1.4], [1.0], [np.inf]])
    sides /= np.maximum(np.abs(rays), 1e-9)
    z, axis = sides.min(0), sides.argmin(0)
    plane, height = np.where(axis == 1, rays[1] < 0, 2), 100 * (1.5 - rays[1] * z)
    return [a.reshape(120, 160) for a in (z, plane, height)]


def test_hha_of_a_tilted_room_is_known():
    """Disparity 31000 / cm; height in cm; angle + 38: floors 38, walls 128, ceilings 218."""
    z, plane, height = tilted_room()
    inside = np.ones(plane.shape, bool)         # windows that lie in one plane
    for shift in ((-4, -4), (-4, 4), (4, -4), (4, 4), (0, 4), (0, -4), (4, 0), (-4, 0)):
        inside &= np.roll(plane, shift, (0, 1)) == plane
    inside[:4] = inside[-4:] = inside[:, :4] = inside[:, -4:] = False
    out = hha(z, z, CAMERA).astype(float)
    disparity = np.minimum(np.floor(310 / np.maximum(z, 1) + 0.5), 255)
    assert np.abs(out[..., 0] - disparity).max() == 0
    assert np.abs(out[..., 1] - np.minimum(height, 255)).max() < 3
    for kind, angle in enumerate((0, 180, 90)):
        wrong = np.abs(out[..., 2] - (angle + 38))[inside & (plane == kind)]
        assert len(wrong) > 200 and np.median(wrong) <= 1 and (wrong > 2).mean() < 0.05
    integral = np.pad(np.ones((9, 8)), ((11, 10), (11, 10))).cumsum(0).cumsum(1)
    sums = data.sum_windows(integral, 3)[[0, 4, 4], [0, 4, 7]].tolist()
    assert sums == [16, 49, 28]                 # 4x4, 7x7, 7x4 at the border


def test_missing_depth_takes_no_part_in_hha():
    """Where the whole window is missing the angle is 180 degrees; millimetres are an error."""
    z, _, _ = tilted_room()
    raw = z.copy()
    raw[40:70, 40:90] = 0
    filled, masked = hha(z, z, CAMERA).astype(int), hha(z, raw, CAMERA).astype(int)
    assert (masked[45:65, 45:85, 2] == 218).all() and (masked[..., 0] == filled[..., 0]).all()
    far = np.ones(z.shape, bool)
    far[30:80, 30:100] = False
    assert (np.abs(masked - filled)[..., 2][far] > 1).mean() < 0.01
    is_refused("--depth-unit", hha, z * 1000, z, CAMERA)


def write_sunrgbd(root):
    """Two frames of different sensors, sizes, depth in the tree; image's stem is not depth's."""
    frames = ("xtion/sun3ddata/hotel/hotel/0000110-1", 44, 59), ("kv1/b3dodata/img_0063", 42, 56)
    for k, (frame, H, W) in enumerate(frames, 1):
        place = root / "SUNRGBD" / frame
        save(place / "image" / "a.JPG", Image.new("RGB", (W, H)))
        (place / "intrinsics.txt").write_text(f"60 0 {W // 2}\n0 60 {H // 2}\n0 0 1\n")
        mm = (2000 + 5 * np.mgrid[:H, :W].sum(0)).astype(np.uint16)
        raw = (mm << 3 | mm >> 13).astype(np.uint16)  # rotated left by three bits, as published
        save(place / "depth_bfx" / "b_abs.png", raw)
        raw[:4] = 0
        save(place / "depth" / "b_abs.png", raw)
        save(root / "labels" / f"img-{k:06d}.png", np.full((H, W), k, np.uint8))
    # the numbers of the labels run through the test list first
    (root / "test.txt").write_text("SUNRGBD/xtion/sun3ddata/hotel/hotel/0000110-1//image/a.JPG\n")
    (root / "train.txt").write_text("/n/fs/sun3d/data/SUNRGBD/kv1/b3dodata/img_0063/\r\n")
    return root


def prepare(flags):
    call(data, f"prepare --workers 1 {flags}")


SUNRGBD_NAMES = ["kv1-b3dodata-img_0063", "xtion-sun3ddata-hotel-hotel-0000110-1"]


def test_depth_of_sun_rgbd_is_metres_whatever_pillow_gives():
    """Millimetres rotated left by three bits, cut at 8 m; Pillow before 10.3 gives 32 bits."""
    raw = np.array([8 * 2378, 0, 8 * 8100, 1 << 3 | 2], np.uint16)
    for dtype in (np.uint16, np.int32):
        assert data.decode_sunrgbd_depth(raw.astype(dtype)).tolist() == [2.378, 0.0, 8.0, 8.0]


@pytest.fixture
def sunrgbd(tmp_path):
    prepare(f"--scenario rgbd --data {write_sunrgbd(tmp_path)}")
    return tmp_path


def test_masks_of_sun_rgbd_that_are_numbered_by_other_lists_are_refused(tmp_path):
    write_sunrgbd(tmp_path)
    save(tmp_path / "labels" / "img-000003.png", np.eye(8) > 0)
    is_refused("3 masks, .* 2 frames", prepare, f"--scenario rgbd --data {tmp_path}")


def test_raw_depth_of_another_size_is_named(tmp_path):
    for folder, size in (("Depth", (24, 32)), ("RawDepth", (12, 16))):
        save(tmp_path / folder / "7.png", np.full(size, 2000, np.uint16))
    (tmp_path / "intrinsics.txt").write_text("30 0 16  0 30 12  0 0 1")
    is_refused("cannot be prepared: 1", prepare, f"--scenario rgbd --data {tmp_path}")
    assert "RawDepth/" in (tmp_path / "HHA.part" / "bad-ids.txt").read_text()


def test_prepare_of_sun_rgbd_gives_folders_of_equal_names(sunrgbd):
    for folder, suffix in (("RGB", ".JPG"), ("HHA", ".png"), ("Label", ".png")):
        assert sorted(os.listdir(sunrgbd / folder)) == [name + suffix for name in SUNRGBD_NAMES]
    image = sunrgbd / "SUNRGBD" / "kv1" / "b3dodata" / "img_0063" / "image" / "a.JPG"
    assert os.path.samefile(image, sunrgbd / "RGB" / f"{SUNRGBD_NAMES[0]}.JPG")  # takes no disk
    assert open_dataset("rgbd", sunrgbd, 16).ids == SUNRGBD_NAMES


def test_prepare_of_sun_rgbd_encodes_the_filled_depth_by_what_the_sensor_saw(sunrgbd):
    _, encoded = open_dataset("rgbd", sunrgbd, 16).read_raw(0)
    mm = 2000 + 5 * np.mgrid[:42, :56].sum(0)
    seen = np.where(np.arange(42)[:, None] < 4, 0, mm)
    camera = [[60, 0, 28], [0, 60, 21], [0, 0, 1]]
    assert (encoded.transpose(1, 2, 0) == hha(mm / 1000, seen / 1000, camera)).all()


@pytest.mark.parametrize("split, label", [("test", 1), ("train", 2)])
def test_lists_and_masks_of_sun_rgbd_keep_working_once_it_is_prepared(split, label, sunrgbd):
    """Lists name frames by their SUNRGBD paths; masks are numbered through test.txt, then train."""
    (_, _, target), = open_dataset("sunrgbd", sunrgbd, 16, split)
    assert (target == label).all() and target.shape == (24, 32)


def test_holes_are_filled_from_the_background():
    """A hole gets the farther reading beside it."""
    row, full = [0, 2, 0, 0, 3, 0.0], [2, 2, 3, 3, 3, 3]
    assert data.fill_holes(np.array([row, [0] * 6])).tolist() == [full, [3] * 6]


def test_frames_that_prepare_left_out_are_left_out_of_lists_and_folders(tmp_path):
    root = write_frames(tmp_path, 3)
    (root / "train.txt").write_text("0\n1\n2\n")
    save(root / "Depth" / "1.png", np.full((36, 48), 7, np.uint8))
    prepare(f"--scenario rgbd --data {root} --skip-bad")
    for split in ("all", "train"):
        assert open_dataset("rgbd", root, 16, split).ids == ["0", "2"]


def test_prepare_makes_hha_beside_depth_once_all_frames_are_fine(tmp_path):
    root = write_frames(tmp_path, 3)
    save(root / "Depth" / "2.png", np.full((36, 48), 7, np.uint8))
    is_refused("bad-ids.txt", prepare, f"--scenario rgbd --data {root}")
    assert open_dataset("rgbd", root, 16).modalities == ("rgb", "depth")
    write_frames(root, 3)
    prepare(f"--scenario rgbd --data {root}")
    assert open_dataset("rgbd", root, 16).modalities == ("rgb", "hha")
    assert sorted(os.listdir(root)) == ["Depth", "HHA", "RGB", "intrinsics.txt"]


@pytest.mark.parametrize("write, name, words", [
    (lambda root: write_sunrgbd(root), "rgbd", "/RGB.* has .*SUNRGBD.* prepare"),
    (lambda root: write_geonrw(root), "rgb-dem", "/cropped/.* has aachen.* prepare"),
    (lambda root: write_bigearthnet(root), "bigearthnet", "/packed/.* prepare"),
    (lambda root: (write_frames(root) / "RGB").rename(root / "rgb"), "rgbd", "/RGB.* has .*rgb")])
def test_a_tree_that_is_not_prepared_is_refused_with_what_is_there(write, name, words, tmp_path):
    write(tmp_path)
    is_refused(words, open_dataset, name, tmp_path, 16, "train")


# ---- Sentinel-1 and Sentinel-2 ----

def bands_of(date, S=12):
    """A season of SSL4EO-S12: S1 in dB, S2 x 10000, of native size, the date in every pixel."""
    side = {band: S // r for r, names in data.BLOCKS.items() for band in names}
    bands = {band: np.full((S, S), date - 21, np.float32) for band in data.S1}
    for k, band in enumerate(data.S2, 2):
        bands[band] = np.full((side[band], side[band]), 100 * date + k, np.uint16)
    return bands


def write_ssl4eo(root, ids=("0000000", "000001", "0000007"), S=12):
    """Four seasons per location.  S1's names do not sort by date; one folder has six digits; some
    ids are void."""
    for name in ids:
        for date, satellite in ((3, "B"), (6, "A"), (9, "B"), (12, "A")):
            stamp = f"2020{date:02d}20T001515"
            s1 = f"s1/{name}/S1{satellite}_IW_GRDH_1SDV_{stamp}_{stamp}_031883_03AE27_9BAF"
            s2 = f"s2c/{name}/{stamp}_{stamp}_T15QXA"
            for band, x in bands_of(date, S).items():
                folder = s1 if band in data.S1 else s2
                save(root / folder / f"{band}.tif", x)
    return root


def test_ssl4eo_reads_four_seasons_in_the_order_of_their_dates(tmp_path):
    """Directories are listed (void ids, six digits); S1A is before S1B by name, not by date."""
    pairs = open_dataset("sar-optical", write_ssl4eo(tmp_path), 8)
    assert pairs.ids == ["0000000", "0000007", "000001"]
    for season, date in enumerate((3, 6, 9, 12)):
        x1, x2 = data.stack_bands(pairs.read("0000000", season))
        assert x1.shape == (2, 12, 12) and x2.dtype == torch.uint8
        expected = [[round((100 * date + k) / 10000 * 255)] for k in range(2, 15)]
        assert [band.unique().tolist() for band in x2] == expected


def test_both_modalities_of_a_view_show_the_same_season(tmp_path):
    """Seasons are functions of (seed, epoch, index), drawn for each view; two need not agree."""
    pairs = open_dataset("sar-optical", write_ssl4eo(tmp_path, ["0000000"]), 8, seed=3)
    seen = []
    for epoch in range(12):
        pairs.epoch = epoch
        x1, x2 = pairs[0]
        assert all((a == b).all() for a, b in zip(x1 + x2, sum(pairs[0], [])))
        change1, change2 = (x[1][-1].float().mean() - x[0][-1].float().mean() for x in (x1, x2))
        assert change1.sign() == change2.sign()
        seen.append(change2 == 0)
    assert 0 < sum(seen) < 12


def test_samples_of_several_seasons_are_not_kept(tmp_path):
    """They change with the epoch."""
    pairs = open_dataset("sar-optical", write_ssl4eo(tmp_path, ["0000000"]), 8)
    assert data.Samples(pairs, keep=True).room == 0


def test_eight_bits_are_clipped_and_never_wrap():
    """S2: x / 10000 * 255.  S1: without 2 % of outliers, the data set's mean -+ 2 std to 0..255."""
    s2 = np.array([0, 5000, 10000, 10040, 65535], np.uint16)
    assert data.to_8bit("B2", s2, {}).tolist() == [0, 128, 255, 255, 255]
    x = np.linspace(-15, -10, 101, dtype=np.float32)
    x[0], x[-1], stats = -60, np.inf, {"VV": (-12.0, 2.0)}
    y = data.to_8bit("VV", x, stats)
    assert y[50] == round(255 * (-12.5 + 16) / 8) and y.dtype == np.uint8
    assert y[0] == y[-1] == 0 and y[99] == y[98] > y[97]  # empty is -16 dB; 1 % is cut each way
    y = data.to_8bit("VV", np.full(3, -10, np.float32), stats)
    assert y.tolist() == [round(255 * 6 / 8)] * 3


@pytest.mark.parametrize("r", [1, 2, 6])
def test_bands_are_brought_to_10_m_bilinearly(r):
    """Against float64, rounded half up."""
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    y = F.interpolate(torch.from_numpy(x).double()[None], scale_factor=r, mode="bilinear")[0]
    z = data.upsample(x, r)
    assert z.dtype == np.uint8 and (z == (y + 0.5 + 1e-9).floor().numpy()).all()


def write_satellites(root, n=5):
    list(data.write_satellite(root, [np.random.default_rng(i) for i in range(n)], n, S=24))
    return root


def test_prepared_and_raw_give_the_same_samples_bit_for_bit(tmp_path):
    raw = open_dataset("sar-optical", write_satellites(tmp_path), 8)
    prepare(f"--scenario sar-optical --data {tmp_path}")
    packed = open_dataset("sar-optical", tmp_path, 8)
    assert sorted(os.listdir(tmp_path / "packed")) == ["ids.txt", *(f"season{k}.npy"
                                                                    for k in range(4))]
    assert raw.read.func is data.read_season and packed.read.func is data.read_packed
    for epoch in range(2):
        raw.epoch = packed.epoch = epoch
        for i in range(5):
            for a, b in zip(sum(raw[i], []), sum(packed[i], [])):
                assert a.dtype == b.dtype == torch.uint8 and (a == b).all()


def packed_bytes(root):
    return {path.name: path.read_bytes() for path in (root / "packed").iterdir()}


def test_prepare_goes_on_where_it_was_killed_and_gives_the_same_bytes(tmp_path):
    """SIGKILL, as soon as a part of the locations is noted as done."""
    whole, killed = write_satellites(tmp_path / "a", 24), tmp_path / "b"
    shutil.copytree(whole, killed)
    flags = "prepare --workers 1 --scenario sar-optical --data"
    program = (f"import data, time\nread = data.read_seasons\n"
               f"def slow(*job):\n    time.sleep(0.05)\n    return read(*job)\n"
               f"data.read_seasons = slow\ndata.main({[*flags.split(), str(killed)]!r})")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=HERE)
    log = killed / "packed.part" / "done.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= 4):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed / "packed").exists()
    noted = len(log.read_text().splitlines())
    with open(log, "a") as file:
        file.write('["00000')                   # a line that was being written
    call(data, f"{flags} {whole}")
    call(data, f"{flags} {killed}")
    assert 4 <= noted < 24 and packed_bytes(whole) == packed_bytes(killed)


def test_skip_bad_leaves_damaged_locations_out_and_lists_them(tmp_path):
    """One without a season, one of another size, one that only S2 has."""
    root = write_ssl4eo(tmp_path, ["0000000", "0000001", "0000003"])
    write_ssl4eo(root, ["0000002"], S=24)
    shutil.rmtree(next((root / "s2c" / "0000001").iterdir()))
    shutil.rmtree(root / "s1" / "0000003")
    flags = f"--scenario sar-optical --data {root}"
    is_refused("prepared: 3.*packed.part/bad-ids.txt .*--skip-bad", prepare, flags)
    assert not (root / "packed").exists()
    prepare(f"{flags} --skip-bad")
    bad = (root / "packed" / "bad-ids.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in bad) == ["0000001", "0000002", "0000003"]
    pairs = open_dataset("sar-optical", root, 8)
    assert pairs.ids == ["0000000"] and pairs[0][0][0].shape == (2, 12, 12)


def test_of_two_prepares_at_once_the_second_is_refused(tmp_path):
    """The lock ends with its process, even if this is killed."""
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    program = (f"import data, time\nwith data.fill_folder({str(out)!r}, 'a', 1):\n"
               f"    time.sleep(100)")
    first = subprocess.Popen([sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE)
    assert b"out needs about" in first.stdout.readline()
    is_refused("out.part", data.fill_folder(out, "a", 1).__enter__)
    first.kill()
    first.communicate()
    with data.fill_folder(f"{out}/", "a", 1):   # as a shell completes the name
        pass
    assert os.listdir(out) == []


def test_prepare_says_how_much_disk_it_will_need(tmp_path, capsys):
    """Two locations of 264 pixels: 2 x 4 seasons x 264^2 x 91 / 12 bytes are 4.2 MB."""
    prepare(f"--scenario sar-optical --data {write_ssl4eo(tmp_path, ['0000000', '0000001'], 264)}")
    text = capsys.readouterr().out
    assert re.search(r"packed .* 0\.004 GB", text)


def write_bigearthnet(root):
    """Three patches of 12 pixels; five-digit times, CRLF lists of 1 and of 2 columns."""
    pairs = [(f"S2B_MSIL2A_20170924T9302{k}_69_{k}",
              f"S1A_IW_GRDH_1SDV_20170925T04325{k}_35VPK_69_{k}") for k in range(3)]
    for k, (s2, s1) in enumerate(pairs):
        patch1, patch2 = root / "BigEarthNet-S1-v1.0" / s1, root / "BigEarthNet-v1.0" / s2
        for band, x in bands_of(k + 1).items():
            if band in data.S1:
                save(patch1 / f"{s1}_{band}.tif", x)
            elif band != "B10":
                save(patch2 / f"{s2}_B{band[1:]:0>2}.tif", x)
        labels = ["Bare rock"] if k else ["Discontinuous urban fabric", "Airports", "Sea and ocean"]
        about = json.dumps({"labels": labels, "corresponding_s2_patch": s2})
        for patch in (patch1, patch2):
            (patch / f"{patch.name}_labels_metadata.json").write_text(about)
    for name, lines in (("train", list(map(",".join, pairs[:2]))),
                        ("val", [s2 for s2, _ in pairs[::-1]])):
        (root / f"{name}.csv").write_bytes("\r\n".join([*lines, ""]).encode())
    return pairs


def test_bigearthnet_gives_both_sensors_an_empty_B10_and_19_classes(tmp_path):
    pairs = write_bigearthnet(tmp_path)
    prepare(f"--task bigearthnet --data {tmp_path}")
    task = open_dataset("bigearthnet", tmp_path, 8, "train")
    assert task.ids == [s2 for s2, _ in pairs[:2]]
    x1, x2, target = task[0]
    assert x1.shape == (2, 12, 12) and x2.shape == (13, 12, 12)
    assert (x2[10] == 0).all() and data.S2[10] == "B10"
    assert (x2[11] == round((100 + 13) / 10000 * 255)).all()            # B11, after the empty band
    assert target.nonzero()[:, 0].tolist() == [0, 18] and task[1][2].sum() == 0
    assert len(data.CLASSES19) == 19 and len(data.CLASSES43) + len(data.DROPPED43) == 43
    labelled = finetune.Labelled(task, data.CLASSES19, "multi-label", task.labels.get)
    assert data.Samples(labelled, keep=True).room == 0  # seasons would not change with the epoch


def test_s2_names_are_paired_by_the_json_of_the_s1_patches(tmp_path):
    pairs = write_bigearthnet(tmp_path)
    prepare(f"--task bigearthnet --data {tmp_path}")
    assert open_dataset("bigearthnet", tmp_path, 8, "val").ids == [s2 for s2, _ in pairs[::-1]]


def test_s1_names_in_a_list_count(tmp_path):
    (s2, _), *_ = write_bigearthnet(tmp_path)
    (tmp_path / "train.csv").write_text(f"{s2},nowhere\n")
    is_refused("nowhere_VV.tif", prepare, f"--task bigearthnet --data {tmp_path}")


def test_a_patch_whose_labels_are_unknown_is_bad(tmp_path):
    (s2, _), *_ = write_bigearthnet(tmp_path)
    (tmp_path / f"BigEarthNet-v1.0/{s2}/{s2}_labels_metadata.json").write_text('{"labels": ["x"]}')
    is_refused("bad-ids.txt", prepare, f"--task bigearthnet --data {tmp_path}")
    bad = (tmp_path / "packed" / "train.part" / "bad-ids.txt").read_text()
    assert bad.startswith(s2) and "labels_metadata.json" in bad


# ---- GeoNRW ----

def write_geonrw(root):
    """A tile of 32 pixels, near infrared its fourth band, in a city to train and one to test."""
    rng = np.random.default_rng(0)
    rgbi = rng.integers(0, 256, (32, 32, 4)).astype(np.uint8)
    for city in ("aachen", "herne"):
        save(root / city / "371_5712_rgb.jp2", rgbi)
        save(root / city / "371_5712_dem.tif", rng.random((32, 32), np.float32) * 50)
        save(root / city / "371_5712_seg.tif", rng.integers(0, 11, (32, 32)).astype(np.uint8))
    return rgbi


@pytest.fixture
def geonrw(tmp_path):
    write_geonrw(tmp_path)
    prepare(f"--scenario rgb-dem --data {tmp_path}")
    return tmp_path


def test_geonrw_is_cut_into_4_x_4_patches_row_by_row(geonrw):
    """Three of four bands; masks keep label 0.  The 7th patch: second row, third column."""
    task = open_dataset("geonrw", geonrw, 8, "train")
    assert task.ids == [f"aachen_371_5712_{k // 4}_{k % 4}" for k in range(16)]
    rgb, dem, seg = task[6]
    rgbi = read_image(geonrw / "aachen" / "371_5712_rgb.jp2")
    assert (rgb.numpy() == rgbi[:3, 8:16, 16:24]).all()
    mask = tifffile.imread(geonrw / "aachen" / "371_5712_seg.tif")
    assert (seg.numpy() == mask[8:16, 16:24]).all() and (mask == 0).any()
    heights = tifffile.imread(geonrw / "aachen" / "371_5712_dem.tif")[None, 8:16, 16:24]
    assert (dem.numpy() == data.stretch(heights)).all() and dem.shape == (3, 8, 8)


def test_geonrw_is_split_by_city(geonrw):
    for split, city in (("train", "aachen"), ("test", "herne")):
        for name in ("rgb-dem", "geonrw"):
            ids = open_dataset(name, geonrw, 8, split).ids
            assert len(ids) == 16 and {id.split("_")[0] for id in ids} == {city}
    assert len(open_dataset("rgb-dem", geonrw, 8)) == 32


def test_holes_of_a_height_model_take_no_part(tmp_path):
    """NaN, -9999, 65535 and -1.7e308 are holes; they become the mean of the stretched heights."""
    holes = [np.nan, -9999, 65535, -1.7e308, np.inf]
    np.save(tmp_path / "a.npy", np.concatenate([np.linspace(100, 200, 101), holes])[None])
    dem = data.read_input(tmp_path / "a.npy", MODALITIES["dem"])
    assert np.isnan(dem[0, 0]).tolist() == [False] * 101 + [True] * 5
    x = data.stretch(dem)[0, 0]
    assert x[0] == 0 and x[100] == 1 and abs(x[50] - 0.5) < 1e-6  # 1st, 99th percentile: 101, 199
    assert abs(x[75] - (175 - 101) / 98) < 1e-6
    assert (x[101:] == x[101]).all() and abs(x[101] - 0.5) < 1e-6


def test_flat_ground_is_no_division_by_zero_and_a_tile_of_holes_is_refused(tmp_path):
    assert (data.stretch(np.full((1, 4, 4), 70.0)) == 0).all()
    np.save(tmp_path / "a.npy", np.full((4, 4), -9999.0))
    is_refused("a.npy", data.read_input, tmp_path / "a.npy", MODALITIES["dem"])


# ---- files that would be misread ----

@pytest.mark.parametrize("axes, settings", [
    ((1, 2, 0), dict(planarconfig="contig")), ((0, 1, 2), dict(byteorder=">")),
    ((0, 1, 2), dict(planarconfig="separate", compression="zlib"))])
def test_tiff_of_any_layout_is_read_as_CxHxW(axes, settings, tmp_path):
    x = np.random.default_rng(0).integers(0, 60000, (13, 6, 7)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", x.transpose(axes), photometric="minisblack", **settings)
    y = read_image(tmp_path / "a.tif")
    assert (y == x).all() and y.dtype == np.uint16


def declared(x, nodata):
    """Writes an array as a TIFF with GDAL's tag for no data."""
    return tiff(x, extratags=[(42113, "s", 0, str(nodata), True)])


@pytest.mark.parametrize("dtype, value, nodata, is_nan", [
    (np.float32, -9999, "-9999", True), (np.uint16, 0, "0", True),
    (np.float32, 7, "-1.7976931348623157e+308", False)])
def test_what_a_tiff_declares_as_no_data_is_nan(dtype, value, nodata, is_nan, tmp_path):
    """A value that the type cannot hold marks nothing."""
    declared(np.array([[1, value], [3, 4]], dtype), nodata)(tmp_path / "a.tif")
    y = read_image(tmp_path / "a.tif")
    assert y.dtype == np.float32 and np.isnan(y[0]).tolist() == [[False, is_nan], [False, False]]


def png_header(W, H, bits=8):
    """The bytes of a PNG of W x H pixels of RGB that has no pixels yet."""
    header = b"IHDR" + struct.pack(">IIBBBBB", W, H, bits, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + crc + b"\0\0\0\0IDAT" + b"5\xaf\x06\x1e"


@pytest.mark.parametrize("name, write", [
    ("a.png", lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n")),
    ("a.png", lambda path: path.write_bytes(save(path, np.eye(99) > 0).read_bytes()[:70])),
    ("a.png", lambda path: path.write_bytes(png_header(60000, 60000))),     # a bomb
    ("a.png", lambda path: path.write_bytes(png_header(8, 8, bits=16))),    # 3 channels of 16 bits
    ("a.npy", npy(np.zeros((2, 2), complex))), ("a.npy", npy(np.zeros((0, 3)))),
    ("a.tif", tiff(np.zeros((2, 3, 8, 8), np.uint16), photometric="minisblack")),
    ("a.tif", tiff(np.zeros((32, 32, 13), np.uint16))),                     # HxWxC or CxHxW
    ("a.npy", npy(np.zeros((32, 32, 50)))),                                 # HxWxC or CxHxW
    ("a.tif", tiff(np.eye(8, dtype=np.uint8), extratags=[(274, "H", 1, 3, True)])),  # upside down
    ("a.tif", tiff(np.eye(8, dtype=np.uint8), photometric="miniswhite")),
    ("a.tif", lambda path: Image.new("L", (8, 8)).save(
        path, save_all=True, append_images=[Image.new("L", (9, 9))])),      # two images
    ("a.tif", declared(np.eye(8), "none")),
    ("a.tif", lambda path: None)])                                          # no such file
def test_an_image_that_would_be_misread_is_refused_by_name(name, write, tmp_path):
    write(tmp_path / name)
    is_refused(name, read_image, tmp_path / name)


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="it is installed")
def test_what_only_imagecodecs_can_decode_names_it(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.tif", compression="tiff_lzw")
    is_refused("pip install imagecodecs", read_image, tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_an_image_is_read_without_its_alpha(name, tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (6, 7, 4)).astype(np.uint8)
    assert (read_image(save(tmp_path / name, rgba)) == rgba[..., :3].transpose(2, 0, 1)).all()


@pytest.mark.parametrize("C, kept, settings", [
    (5, 4, dict(photometric="rgb", extrasamples=(0, 2))),           # near infrared, then alpha
    (2, 1, dict(photometric="minisblack", planarconfig="contig", extrasamples=(2,)))])
def test_bands_beside_an_alpha_are_kept(C, kept, settings, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 7, C)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", x, **settings)
    assert (read_image(tmp_path / "a.tif") == x[..., :kept].transpose(2, 0, 1)).all()


def test_arrays_of_either_byte_order_have_one_type(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(4).astype(">u2"))
    a = read_image(tmp_path / "a.npy")
    assert a.dtype == data.stored_type(tmp_path / "a.npy", a) == np.dtype("=u2")


def test_integers_near_a_no_data_value_are_data():
    assert data.is_nodata(np.array([9999998, 9999999], np.int32), 9999999).tolist() == [False, True]
    assert data.is_nodata(np.array([0.1], np.float32), 0.1).all()


def test_patterns_that_give_odd_names_are_refused(tmp_path):
    save(tmp_path / "rgb.000.png", np.eye(8) > 0)
    is_refused(r"'\.000'.* 'rgb\.\*\.png'", find_images, f"{tmp_path}/rgb*.png")


def test_a_jpeg_that_says_it_lies_on_its_side_is_turned_upright(tmp_path):
    image, exif = Image.new("RGB", (8, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 8, 4)


# ---- masks ----

INDICES = np.array([[0, 1], [5, 255]])


@pytest.mark.parametrize("bits, row", [(2, [0, 1, 2, 3]), (4, [3, 2])])
def test_grey_masks_of_few_bits_keep_their_indices(bits, row, tmp_path):
    """Pillow stretches grey values of 2 or 4 bits to 8 bits."""
    byte = sum(value << 8 - bits * (k + 1) for k, value in enumerate(row))
    header = struct.pack(">IIBBBBB", len(row), 1, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes([0, byte])), b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(png)
    assert data.read_mask(tmp_path / "a.png").tolist() == [row]


def with_palette(indices, colours=range(768)):
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(list(np.array(colours) % 256))
    return image


@pytest.mark.parametrize("name, write", [
    ("a.tif", tiff(INDICES.astype(np.int64))), ("a.tif", tiff(INDICES.astype(float))),
    ("a.npy", npy(INDICES)), ("a.png", lambda path: save(path, INDICES.astype(np.uint8))),
    ("a.png", lambda path: save(path, with_palette(INDICES)))])
def test_a_mask_of_any_type_is_read_as_the_indices_it_stores(name, write, tmp_path):
    write(tmp_path / name)
    mask = data.read_mask(tmp_path / name)
    assert mask.dtype == np.int64 and mask.tolist() == INDICES.tolist()


@pytest.mark.parametrize("write", [
    declared(np.array([[-9999, 3]], np.int16), -9999), declared(np.array([[7, 3]], np.uint8), 7),
    tiff(np.array([[-2, 3]], np.int8)), tiff(np.array([[np.nan, 3]], np.float32))])
def test_no_data_and_negative_values_of_a_mask_are_no_label(write, tmp_path):
    write(tmp_path / "a.tif")
    assert data.read_mask(tmp_path / "a.tif").tolist() == [[-1, 3]]


@pytest.mark.parametrize("name, write", [
    ("a.jpg", lambda path: Image.new("L", (8, 8)).save(path)),
    ("a.png", lambda path: Image.new("L", (8, 8)).save(path, "jpeg")),
    ("a.png", lambda path: Image.new("RGB", (8, 8)).save(path)),
    ("a.tif", tiff(np.array([[0, 1.5]])))])
def test_a_mask_without_whole_numbers_or_saved_as_jpeg_is_refused(name, write, tmp_path):
    write(tmp_path / name)
    is_refused(name, data.read_mask, tmp_path / name)


def test_palettes_of_masks_may_differ_only_in_colours_that_no_pixel_has(tmp_path):
    """Index 5 is another colour in the second mask, which does not use it, and in the third."""
    other = list(range(768))
    other[15] = 99
    masks = (5, range(768)), (0, other), (5, other)
    files = {str(k): str(save(tmp_path / f"{k}.png", with_palette(np.full((4, 4), index), colours)))
             for k, (index, colours) in enumerate(masks)}
    third = files.pop("2")
    assert data.count_mask_values(files) == {0: (16, 1), 5: (16, 1)}
    is_refused("0.png.*2.png", data.count_mask_values, files | {"2": third})


@pytest.mark.parametrize("way, told", [("NEAREST", 0), ("BILINEAR", 1)])
def test_masks_that_were_resized_bilinearly_are_told(way, told, tmp_path):
    """Objects 40 and 200; between them and 0, bilinear leaves all the values between."""
    y, x = np.mgrid[:120, :160]
    mask = 40 * (np.hypot(x - 50, y - 50) < 30) + 160 * (np.hypot(x - 120, y - 80) < 25)
    small = Image.fromarray(mask.astype(np.uint8)).resize((77, 55), Image.Resampling[way])
    counts = data.count_mask_values({"0": str(save(tmp_path / "0.png", small))})
    assert len(data.find_mask_warnings(counts)) == told


@pytest.mark.parametrize("values", [[0, 1, 40, 255], [0, 41], [-1, 0]])
def test_the_remedy_for_values_that_are_no_class_keeps_class_0(values):
    """Where 0 is a class, to write 0 for 255 alone would take that class away."""
    is_refused("a.png .* add 1 to each class", data.check_mask, "a.png",
               torch.tensor([values]), (1, len(values)), 40)


# ---- names and one's own pairs ----

def write_pairs(root, names):
    for name in names.split():
        save(root / f"{name}.png", np.random.default_rng(0).integers(0, 256, (8, 9), np.uint8))


def save_arrays(folder, *arrays):
    """0.npy, 1.npy and so on.  Returns the folder."""
    folder.mkdir(parents=True)
    for i, a in enumerate(arrays):
        np.save(folder / f"{i}.npy", a)
    return folder


@pytest.mark.parametrize("names1, names2, patterns", [
    ("1_rgb 2_rgb", "1_depth 2_depth", "a/*_rgb b/*_depth"),
    ("Ghana_1_S1Hand Peru_2_S1Hand", "Ghana_1_S2Hand Peru_2_S2Hand", "a/*_S1Hand a/*_S2Hand"),
    ("R_s1_9_p1 R_s1_9_p2", "R_s2_9_p1 R_s2_9_p2", "a/*_s1_* b/*_s2_*"),
    ("f-1.color f-2.color", "f-1.depth f-2.depth", "a/*.color b/*.depth"),
    ("1 2", "1_d 2_d", "a/* b/*_d")])
def test_names_that_differ_by_a_fixed_part_pair_by_patterns(names1, names2, patterns, tmp_path):
    """The five forms of real paired sets."""
    where = [f"{tmp_path}/{pattern}.png" for pattern in patterns.split()]
    for pattern, names in zip(where, (names1, names2)):
        write_pairs(Path(pattern).parent, names)
    assert len(open_dataset("custom", where, 8)) == 2


def test_stars_also_stand_for_folders_and_names_may_be_written_in_two_ways(tmp_path):
    accents = [unicodedata.normalize(form, "\u00e9") for form in ("NFC", "NFD")]
    write_pairs(tmp_path, f"s/x1/rgb s/x2/rgb c/{accents[0]} d/{accents[1]}")
    files = find_images(f"{tmp_path}/s/*/rgb.png")
    assert list(files) == ["x1", "x2"] and files["x2"] == f"{tmp_path}/s/x2/rgb.png"
    assert open_dataset("custom", (tmp_path / "c", tmp_path / "d"), 8).ids == ["\u00e9"]


@pytest.mark.parametrize("where, words", [
    ("a/ b/../a", "both .*/a"), ("a/*.png b/*_*.png", "b/.*png"), ("a nowhere", "nowhere"),
    ("twice a", "1.png .*1.jpg"), ("a b", "a .*1.*b .*1_x.*--data1"), ("flat two", "flat/1.npy")])
def test_folders_that_do_not_pair_or_hold_images_of_two_forms_are_refused(where, words, tmp_path):
    write_pairs(tmp_path, "a/1 a/2 a/3 b/1_x twice/1 two/0 two/1")
    shutil.copy(tmp_path / "twice" / "1.png", tmp_path / "twice" / "1.jpg")
    first = np.ones((2, 8, 9), np.float32)
    save_arrays(tmp_path / "flat", first, first[:1])
    folders = [f"{tmp_path}/{folder}" for folder in where.split()]
    is_refused(words, lambda: open_dataset("custom", folders, 8)[1])


def test_ones_own_pairs_are_measured_and_brought_to_0_to_1(tmp_path):
    """Two channels, of which one is constant; a pixel without value becomes the mean."""
    x = np.random.default_rng(0).normal(1000, 50, (4, 2, 8, 9)).astype(np.float32)
    x[:, 1], x[2, 0, 0, 0] = 7, np.nan
    pairs = open_dataset("custom", [save_arrays(tmp_path / name, *x) for name in "ab"], 8)
    row, ((y,), _) = pairs.inputs[0], pairs[2]
    mean, std = np.nanmean(x[:, 0]), np.nanstd(x[:, 0])
    assert row["raw_mean"] == pytest.approx([mean, 7]) and row["raw_std"][0] == pytest.approx(std)
    expected = ((x[2, 0] - mean) / std / 6 + 0.5).clip(0, 1)
    expected[0, 0] = 0.5
    assert np.abs(y[0].numpy() - expected).max() < 1e-5 and (y[1] == 0.5).all()


@pytest.mark.parametrize("mean", [1.6e9, 1.6e15])
def test_a_small_spread_about_a_large_mean_is_measured(mean, tmp_path):
    """float64 at 1.6e9 +- 1000: sums of squares would lose all digits."""
    x = np.random.default_rng(0).normal(mean, 1000, (3, 40, 40))
    pairs = open_dataset("custom", [save_arrays(tmp_path / name, *x) for name in "ab"], 8)
    row = pairs.inputs[0]
    assert row["raw_mean"][0] == pytest.approx(x.mean(), abs=0.5)
    assert row["raw_std"][0] == pytest.approx(x.std(), rel=1e-5)
    assert 0.15 < torch.cat([pairs[i][0][0] for i in range(3)]).std() < 0.18


def test_images_of_8_bits_keep_their_scale_with_a_no_data_tag(tmp_path):
    """One file of two has a tag: both become uint8, and what the tag marks becomes the mean."""
    x = np.random.default_rng(0).integers(1, 256, (2, 8, 9)).astype(np.uint8)
    x[1, 0, 0] = 0
    for name in "ab":
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "0.tif", x[0])
        declared(x[1], 0)(tmp_path / name / "1.tif")
    pairs = open_dataset("custom", (tmp_path / "a", tmp_path / "b"), 8)
    (x0,), _ = pairs[0]
    (y,), _ = pairs[1]
    assert x0.dtype == y.dtype == torch.uint8 and (y[0].numpy() == x[1])[1:].all()
    assert y[0, 0, 0].item() == pytest.approx(255 * pairs.inputs[0]["mean"][0], abs=0.5)


# ---- declared modalities ----

def write_kinds(root):
    """Three images of each kind in a folder of its own, 12 x 16."""
    rng = np.random.default_rng(0)
    depth = rng.integers(500, 3000, (3, 12, 16)).astype(np.uint16)
    depth[:, 0, 0], depth[:, 0, 1] = 0, 65535
    save_arrays(root / "colour", *rng.integers(0, 256, (3, 12, 16, 3)).astype(np.uint8))
    save_arrays(root / "grey", *rng.integers(0, 256, (3, 12, 16)).astype(np.uint8))
    save_arrays(root / "depth", *depth)
    save_arrays(root / "sar", *rng.normal(-15, 5, (3, 2, 12, 16)).astype(np.float32))
    save_arrays(root / "height", *rng.random((3, 12, 16), np.float32))
    save_arrays(root / "bands", *rng.integers(0, 9000, (3, 4, 12, 16)).astype(np.uint16))
    return root


def open_kinds(root, one, two, declared=(None, None), **settings):
    return open_dataset("custom", (root / one, root / two), 8, declared=declared, **settings)


@pytest.mark.parametrize("folder, kind, C", [
    ("colour", "rgb", 3), ("colour", "aerial", 3), ("grey", "rgb", 3), ("colour", "hha", 3),
    ("depth", "depth", 1), ("sar", "sar", 2), ("height", "dem", 3), ("bands", "ms", 4),
    ("colour", "photo", 3), ("bands", "overhead", 4)])
def test_declared_images_are_read_as_that_modality(folder, kind, C, tmp_path):
    """The modality's own row, so its normaliser, and its augmentations."""
    other = "height" if folder == "grey" else "grey"  # `photo` may be that of both sides
    pairs = open_kinds(write_kinds(tmp_path), folder, other, (kind, "photo"))
    row, (x, *_) = pairs.inputs[0], pairs[0][0]
    assert row["name"] == kind and len(x) == C == len(row["bands"]) and pairs.notes == []
    assert row is MODALITIES.get(kind) or kind in ("ms", "photo", "overhead")
    assert augment(x[None], row, 8, drawn(1)).shape == (1, C, 8, 8)


def test_own_depth_is_read_as_rgbd_reads_it(tmp_path):
    """--depth-unit counts; 0 and 65535 are no reading and become the mean."""
    pairs = open_kinds(write_kinds(tmp_path), "colour", "depth", ("rgb", "depth"), depth_unit=500)
    _, (x,) = pairs[0]
    steps = np.load(tmp_path / "depth" / "0.npy")
    assert np.allclose(x[0, 1:], steps[1:] / 500 / 10, atol=1e-6)
    assert x[0, 0, :2].tolist() == pytest.approx([0.238, 0.238])
    np.save(tmp_path / "depth" / "0.npy", (steps / 500).astype(np.float32))
    in_metres = open_kinds(tmp_path, "colour", "depth", ("rgb", "depth"), depth_unit=1)
    assert torch.allclose(in_metres[0][1][0][0, 1:], x[0, 1:], atol=1e-6)


def test_own_sentinel_chips_are_those_of_ssl4eo(tmp_path):
    pairs = open_kinds(write_kinds(tmp_path), "sar", "bands", ("sar", "ms"))
    (x1,), (x2,) = pairs[0]
    sar, ms = np.load(tmp_path / "sar" / "0.npy"), np.load(tmp_path / "bands" / "0.npy")
    assert (x1[1].numpy() == data.to_8bit("VH", sar[1], data.SSL4EO_S1)).all()
    assert (x2[3].numpy() == data.to_8bit("B4", ms[3], {})).all()


@pytest.mark.parametrize("folder, kind", [("depth", "rgb"), ("colour", "depth"), ("colour", "sar"),
                                          ("bands", "dem")])
def test_images_that_are_not_what_was_declared_are_refused_by_name(folder, kind, tmp_path):
    pairs = open_kinds(write_kinds(tmp_path), folder, "grey", (kind, "rgb"))
    is_refused(f"{folder}/1", pairs.__getitem__, 1)


@pytest.mark.parametrize("folder, kind", [("colour", "aerial"), ("grey", "overhead"),
                                          ("bands", "overhead")])
def test_without_as_the_run_says_what_it_took_images_for(folder, kind, tmp_path):
    pairs = open_kinds(write_kinds(tmp_path), "depth", folder, ("depth", None))
    assert pairs.modalities[1] == kind and len(pairs.notes) == 1
    assert f"{tmp_path}/{folder}: " in pairs.notes[0] and "--as2" in pairs.notes[0]


def test_depth_beyond_the_range_is_far_and_not_missing(tmp_path):
    """70 m in floats or 32 bits of mm: x is 1.  65535, infinite values and NaN mean no reading."""
    steps = np.array([[[70000, 65535, np.inf, np.nan, 5000]]]).repeat(8, 1)
    where = save_arrays(tmp_path / "a", steps), save_arrays(tmp_path / "b", steps)
    pairs = open_dataset("custom", where, 8, declared=("depth", "depth"))
    assert pairs[0][0][0][0, 0].tolist() == pytest.approx([1, 0.238, 0.238, 0.238, 0.5])


def test_photos_of_another_shape_than_the_first_are_told(tmp_path):
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((60, 80), (80, 60))]
    where = save_arrays(tmp_path / "a", *photos), save_arrays(tmp_path / "b", *photos)
    pairs = open_dataset("custom", where, 16, declared=("rgb", "rgb"), reduce=True)
    warnings = [line for line in data.find_warnings(pairs) if "distorted" in line]
    assert len(warnings) == 2 and "1 of 2 images of modality 1, such as 1," in warnings[0]


def test_frames_much_larger_than_the_crop_are_reduced_as_those_of_rgbd(tmp_path):
    """480 x 640 for crops of 64: 96 x 128, the same values; but not what is seen from above."""
    rng = np.random.default_rng(0)
    save(tmp_path / "RGB" / "0.png", rng.integers(0, 250, (480, 640, 3)).astype(np.uint8))
    save(tmp_path / "Depth" / "0.png", rng.integers(0, 250, (480, 640)).astype(np.uint16))
    where = tmp_path / "RGB", tmp_path / "Depth"
    own = open_dataset("custom", where, 64, declared=("rgb", "depth"), reduce=True)
    for (a,), (b,) in zip(own[0], open_dataset("rgbd", tmp_path, 64)[0]):
        assert a.shape[1:] == (96, 128) and torch.equal(a, b)
    above = open_dataset("custom", where, 64, declared=("aerial", "overhead"), reduce=True)
    assert above[0][0][0].shape == (3, 480, 640)


# ---- tiles ----

def write_large(root, n=4):
    """Scenes of 20 x 26 pixels in colours, of heights at half the size, and masks."""
    rng = np.random.default_rng(0)
    for k in range(n):
        save(root / "a" / f"s{k}.png", rng.integers(0, 256, (20, 26, 3)).astype(np.uint8))
        heights = rng.random((10, 13)).astype(np.float32)
        heights[:4, :4] = -9999                 # all of the first tile
        (root / "b").mkdir(exist_ok=True)
        tifffile.imwrite(root / "b" / f"s{k}.tif", heights)
        save(root / "m" / f"s{k}.png", rng.integers(0, 9, (20, 26)).astype(np.uint8))
    return f"--scenario custom --data1 {root}/a --data2 {root}/b --size 8 --out {root}/tiles"


def test_scenes_of_any_size_become_tiles_of_equal_names(tmp_path):
    """2 x 3 tiles of 8 pixels a scene; the second image is as large as the first; masks as well."""
    prepare(f"{write_large(tmp_path)} --target {tmp_path}/m")
    tiles = tmp_path / "tiles"
    places = [f"{row}_{column}" for row in range(2) for column in range(3)]
    names = [f"s{k}_{place}" for k in range(4) for place in places]
    for folder in ("1", "2", "label"):
        assert sorted(path.stem for path in (tiles / folder).iterdir()) == names
    image = read_image(tmp_path / "a" / "s1.png")
    assert (read_image(tiles / "1" / "s1_1_2.png") == image[:, 8:16, 16:24]).all()
    mask = data.read_mask(tmp_path / "m" / "s1.png")
    assert (data.read_mask(tiles / "label" / "s1_1_2.png") == mask[8:16, 16:24]).all()
    assert read_image(tiles / "2" / "s1_1_2.tif").shape == (1, 8, 8)
    assert len(open_dataset("custom", (tiles / "1", tiles / "2"), 8)) == 24


def test_tiles_that_are_mostly_no_data_are_left_out_and_counted(tmp_path, capsys):
    """So are borders that no tile covers (26 %) and images that are resized."""
    prepare(f"{write_large(tmp_path)} --nodata2 -9999")
    tiles = tmp_path / "tiles"
    assert not (tiles / "2" / "s0_0_0.tif").exists() and (tiles / "2" / "s0_0_1.tif").exists()
    *_, tiles, left_out, border, resized = capsys.readouterr().out.splitlines()
    assert "tiles: 20, of 4 scenes" in tiles
    assert [line.split(": ")[1] for line in (left_out, border, resized)] == ["4", "26%", "4"]


@pytest.mark.parametrize("size, fits", [((51, 41), True), ((50, 41), True), ((51, 40), True),
                                        ((50, 40), True), ((33, 27), True),
                                        ((100, 40), False), ((48, 41), False), ((202, 162), True)])
def test_images_of_different_shapes_are_not_stretched_onto_each_other(size, fits, tmp_path):
    one = save_arrays(tmp_path / "a", np.random.default_rng(0).random((1, 101, 81)))
    two = save_arrays(tmp_path / "b", np.random.default_rng(1).random((1, *size)))
    flags = f"--scenario custom --data1 {one} --data2 {two} --size 8 --out {tmp_path}/t"
    if fits:
        prepare(flags)
    else:
        is_refused("cannot be prepared", prepare, flags)
        bad = (tmp_path / "t.part" / "bad-ids.txt").read_text()
        assert f"101x81 and {size[0]}x{size[1]} pixels" in bad


def test_scenes_without_a_mask_become_tiles_without_a_label(tmp_path, capsys):
    flags = f"{write_large(tmp_path)} --target {tmp_path}/m"
    (tmp_path / "m" / "s1.png").unlink()
    prepare(flags)
    assert "without a mask: 1." in capsys.readouterr().out
    images, labels = ({path.stem for path in (tmp_path / "tiles" / folder).iterdir()}
                      for folder in ("1", "label"))
    assert len(images) == 24 and {name[:2] for name in images - labels} == {"s1"}
    assert (tmp_path / "tiles" / "train.txt").read_text().count("s1_") in (0, 6)


@pytest.mark.parametrize("dtype, C", [(np.float32, 2), (np.uint16, 1), (np.uint8, 3)])
def test_missing_values_stay_missing_in_tiles_and_the_type_stays(dtype, C, tmp_path):
    x = np.random.default_rng(0).integers(10, 100, (C, 16, 16)).astype(dtype)
    x[:, 3, 5] = 7
    one, two = (save_arrays(tmp_path / name, x) for name in "ab")
    prepare(f"--scenario custom --data1 {one} --data2 {two} --size 8 --nodata1 7 "
            f"--out {tmp_path}/t")
    y = read_image(tmp_path / "t" / "1" / "0_0_0.tif")
    assert np.isnan(y[:, 3, 5]).all() and np.isnan(y).sum() == C
    assert data.stored_type(tmp_path / "t" / "1" / "0_0_0.tif", y) == dtype


def test_tiles_are_split_by_scene_with_a_seed(tmp_path):
    flags, lists = f"{write_large(tmp_path)} --test-share 0.5", []
    for folder, more in (("tiles", ""), ("again", ""), ("other", "--seed 3")):
        prepare(f"{flags} --out {tmp_path}/{folder} {more}")
        files = [tmp_path / folder / f"{split}.txt" for split in ("train", "test")]
        lists.append([file.read_text().split() for file in files])
    assert lists[0] == lists[1] != lists[2]
    train, test = ({name.split("_")[0] for name in names} for names in lists[0])
    assert len(train) == len(test) == 2 and not train & test and len(sum(lists[0], [])) == 24


@pytest.mark.parametrize("dtype, missing", [(np.uint16, 18), (np.float32, 8)])
def test_holes_do_not_bleed_where_an_image_is_resized(dtype, missing):
    """2x2 become 6x6 pixels: integers by the nearest pixel, others where a pixel has a share."""
    y = data.resize_array(np.array([[[5, np.nan], [np.nan, 5]]]), (6, 6), np.dtype(dtype))
    assert np.isnan(y).sum() == missing and np.allclose(y[np.isfinite(y)], 5)


def test_images_of_1_bit_are_black_and_white_and_masks_of_1_bit_have_two_classes(tmp_path):
    path = save(tmp_path / "a.png", np.eye(8) > 0)
    assert np.unique(read_image(path)).tolist() == [0, 255]
    assert np.unique(data.read_mask(path)).tolist() == [0, 1]


def test_a_scene_without_a_partner_can_be_completed_and_prepared_by_the_same_command(tmp_path):
    flags = write_large(tmp_path)
    other = next((tmp_path / "b").iterdir())
    away = other.rename(tmp_path / other.name)
    is_refused("cannot be prepared: 1", prepare, flags)
    away.rename(other)
    prepare(flags)
    assert (tmp_path / "tiles" / "train.txt").is_file()


def test_test_scenes_have_masks_if_some_scenes_have(tmp_path, capsys):
    flags = f"{write_large(tmp_path)} --target {tmp_path}/m --test-share 0.5"
    for name in ("s0", "s3"):
        (tmp_path / "m" / f"{name}.png").unlink()
    for seed in range(3):
        prepare(f"{flags} --seed {seed} --out {tmp_path}/{seed}")
        tested = (tmp_path / str(seed) / "test.txt").read_text().split()
        assert {name[:2] for name in tested} in ({"s1"}, {"s2"})


def test_palettes_that_contradict_each_other_end_prepare(tmp_path):
    flags = f"{write_large(tmp_path)} --target {tmp_path}/m"
    for name, colours in (("s0", "red green"), ("s1", "green red")):
        image = Image.fromarray(np.eye(20, 26, dtype=np.uint8)).convert("P")
        image.putpalette([v for colour in colours.split() for v in ImageColor.getrgb(colour)])
        image.save(tmp_path / "m" / f"{name}.png")
    is_refused("index 0 has the colour", prepare, flags)
    (tmp_path / "m" / "s1.png").write_bytes(b"damaged")
    is_refused("cannot be prepared: 1", prepare, flags)


@pytest.mark.parametrize("dtype, low", [(np.int64, -2 ** 40), (np.uint64, 0), (np.uint8, 0)])
def test_no_valid_value_of_a_tile_becomes_missing(dtype, low, tmp_path):
    """float64 has no 2^63 - 1, and 8 bits may have no value left for the holes."""
    x = np.resize(np.arange(256), (1, 64, 64)).astype(float)
    x[0, 0] = np.nan
    data.write_tile(tmp_path / "t", x + low, np.dtype(dtype))
    y = read_image(tmp_path / "t.tif")
    assert (np.isnan(y) == np.isnan(x)).all() and np.nanmax(np.abs(y - x - low)) <= 1


def test_a_mask_that_is_added_to_a_scene_that_is_done_is_not_missed(tmp_path):
    flags = f"{write_large(tmp_path)} --target {tmp_path}/m"
    mask = (tmp_path / "m" / "s0.png").rename(tmp_path / "s0.png")
    (tmp_path / "b" / "s1.tif").rename(tmp_path / "s1.tif")         # so the first run stops
    is_refused("cannot be prepared: 1", prepare, flags)
    mask.rename(tmp_path / "m" / "s0.png")
    is_refused("begun with other samples", prepare, flags)


def test_a_full_disk_is_no_damaged_sample():
    """numpy's words; the error has no number."""
    def work(job):
        raise OSError("4096 requested and 2432 written")
    with pytest.raises(OSError, match="disk is full"):
        data.attempt(work, 0)


# ---- made-up scenes ----

def classes_of(row):
    """The classes in the label of a scene that a row of factors.csv stands for."""
    factors = enumerate(("common", "unique1", "unique2"))
    return [2 + which * len(data.SHAPES) + int(row[factor]) for which, factor in factors]


def test_made_up_scenes_are_seeded(scenes, tmp_path):
    data.make_toy("rgbd", tmp_path / "again", 48, 16)
    files = [path.relative_to(scenes) for path in scenes.rglob("*") if path.is_file()]
    assert len(files) == 64 * 3 + 3
    for file in files:
        assert (scenes / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("shape", data.SHAPES)
def test_shapes_have_the_same_area(shape):
    """Otherwise the mean brightness would give the factor away.  The area is 4, in squares of the
    shape's radius."""
    v, u = (np.mgrid[0:600, 0:600] - 299.5) / 100
    assert data.draw_shape(shape, u, v).sum() / 1e4 == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("scene, place, signs", [
    (data.draw_room, lambda rng: data.place_three(rng, 48, 64), [[1, -1, 0], [-1, 0, 1]]),
    (data.draw_satellite_scene, lambda rng: data.scatter_three(rng, 48), [[1, -1, 0], [1, 0, -1]]),
    (data.draw_aerial_scene, lambda rng: data.scatter_three(rng, 48), [[1, -1, 0], [1, 0, -1]])])
def test_an_object_of_one_sensor_alone_is_not_seen_by_the_other(scene, place, signs):
    """signs: whether a sensor sees an object above the ground (1), below (-1) or like it (0).
    Contrast is measured in standard deviations of the ground."""
    for seed in range(15):
        *sensors, label, _ = scene(np.random.default_rng(seed))
        masks, _, _ = place(np.random.default_rng(seed))
        if scene is data.draw_satellite_scene:
            sensors = sensors[0][seed % 4]["VV"], sensors[0][seed % 4]["B4"]
        for sensor, object_ in np.ndindex(2, 3):
            inside = (masks[object_] > 0.9) & (sum(masks) - masks[object_] < 0.1)
            if not inside.any():                # it lies behind others
                continue
            x, sign = sensors[sensor].reshape(*label.shape, -1).mean(-1), signs[sensor][object_]
            ground = x[label == 1]
            contrast = (np.median(x[inside]) - np.median(ground)) / ground.std()
            assert sign * contrast > 1.5 or sign == 0 and abs(contrast) < 1


@pytest.mark.parametrize("scenario, shapes", [
    ("rgbd", [3, 1]), ("sar-optical", [2, 2, 13, 13]), ("rgb-dem", [3, 3])])
def test_made_up_scenes_have_their_scenario_s_layout_and_look_right(scenario, shapes, tmp_path):
    """Written once, whole; packed or cropped; beside lists and factors.csv."""
    root = tmp_path / "toy"
    data.make_toy(scenario, root, 16, 16)
    train = open_dataset(scenario, root, 32, "train")
    assert len(train) == 16 and [len(x) for x in sum(train[0], [])] == shapes
    assert data.find_warnings(open_dataset(scenario, root, 32)) == []
    rows = {row["id"]: row for row in csv.DictReader(open(root / "factors.csv"))}
    assert len(rows) == 32 and set(train.ids) <= set(rows)
    if scenario != "rgb-dem":                   # whose masks are cropped
        for name in train.ids:
            label = data.read_mask(root / "Label" / f"{name}.png")
            assert set(classes_of(rows[name])) <= set(np.unique(label))


# ---- what the network sees, and the commands ----

def own_arrays(root, change, dtype=np.float32):
    """Eight pairs of N(300, 30), 2x40x40, after change(x, uniform numbers of its shape)."""
    rng = np.random.default_rng(0)
    x = rng.normal(300, 30, (8, 2, 40, 40))
    x = np.array(change(x, rng.random(x.shape))).astype(dtype)
    return open_dataset("custom", [str(save_arrays(root / name, *x)) for name in "ab"], 8)


def replaced(share, value):
    return partial(own_arrays, change=lambda x, u: np.where(u < share, value, x))


@pytest.mark.parametrize("write, words", [
    (lambda root: open_dataset("rgbd", write_frames(root), 16, "all", 10000.0),
     "depth, depth: .*--depth-unit"),
    (replaced(0.002, -9999), "overhead 1, channel 1, channel 2: .*-9999 .*--nodata1"),
    (replaced(0.04, -9999), "overhead 1, channel 1, channel 2: .*-9999 .*--nodata1"),
    (replaced(0.6, np.nan), "overhead 1, channel 1, channel 2: .*missing"),
    (partial(own_arrays, change=lambda x, u: [[a, 0 * a + 7] for a, _ in x]),
     "overhead 1, channel 2: ")])
def test_inputs_that_look_wrong_are_told_and_the_remedy_is_named(write, words, tmp_path):
    """A wrong unit; -9999 in 0.2 and 4 % of the pixels, undeclared; no values; a constant band."""
    lines = data.find_warnings(write(tmp_path))
    assert any(re.match(words, line) for line in lines), lines


@pytest.mark.parametrize("change, dtype", [
    (lambda x, u: x, np.float32), (lambda x, u: np.round(10 * x).clip(0, 3300), np.uint16),
    (lambda x, u: np.exp((x - 300) / 30), np.float32), (lambda x, u: u > 0.5, np.uint8),
    (lambda x, u: np.round(4 * u), np.uint16), (lambda x, u: np.where(u < 0.2, np.nan, x), float)])
def test_inputs_that_are_right_draw_no_warning(change, dtype, tmp_path):
    """Noise, a sensor that saturates, a long tail, two values, few values, a fifth missing."""
    assert data.find_warnings(own_arrays(tmp_path, change, dtype)) == []


@pytest.mark.parametrize("value, spread, text", [
    (-0.00018, 60000, "0"), (0.123456, 0.8, "0.123"), (-14.1234, 20, "-14.1"),
    (1e-7, 3e-8, "1e-07"), (1600000003.2, 500, "1600000003"), (7, 7, "7")])
def test_numbers_are_written_to_a_hundredth_of_their_spread(value, spread, text):
    assert data.format_value(value, spread) == text


def checked(flags, folder, capsys):
    """`data.py check` in this process -> its exit code, what it printed, and bad-ids.txt."""
    with pytest.raises(SystemExit) as error:
        call(data, f"check --workers 2 --size 16 --out {folder}/out {flags}")
    return error.value.code, capsys.readouterr().out, (folder / "out/bad-ids.txt").read_text()


def test_check_prints_what_the_network_sees(tmp_path, capsys):
    root = write_frames(tmp_path / "d", 4)
    code, text, bad = checked(f"--scenario rgbd --data {root}", tmp_path, capsys)
    assert code == 0 and bad == "" and "4 of 4" in text
    assert re.search(r"\ndepth depth +2 +2\.15 .* 0\.1% .* m\n", text)  # two pixels of 1728
    assert Image.open(tmp_path / "out" / "contact-sheet.png").size == (4 * 16, 4 * 16)


def test_check_lists_what_is_damaged_or_lacks_its_partner(tmp_path, capsys):
    """Each kind of reason is printed once."""
    root = write_ssl4eo(tmp_path / "d", ["0000000", "0000001", "0000002", "0000003"])
    for file in root.glob("s1/000000[12]/*/VH.tif"):
        file.write_bytes(file.read_bytes()[:200])
    shutil.rmtree(root / "s2c" / "0000003")
    code, text, bad = checked(f"--scenario sar-optical --data {root}", tmp_path, capsys)
    names = [line.split("\t")[0] for line in bad.splitlines()]
    assert code == 1 and names == ["0000003", "0000001", "0000002"]
    assert "1 of 3" in text
    assert re.search("2 .*0000001.*VH.tif", text)


def test_check_of_a_task_says_which_classes_never_occur(tmp_path, capsys):
    """37 classes, of which masks hold 1 to 30; half of the pixels have no label."""
    mask = np.zeros((36, 48), np.uint8)
    mask[:18] = 1 + np.arange(18)[:, None] % 15
    root = write_frames(tmp_path / "d", 2)
    save(root / "Label" / "0.png", mask)
    save(root / "Label" / "1.png", np.where(mask, mask + 15, 0))
    code, text, _ = checked(f"--task sunrgbd --split all --data {root}", tmp_path, capsys)
    assert code == 0 and "50.0%" in text and ": 31, 32, 33, 34, 35, 36, 37\n" in text


def test_check_tells_of_pairs_of_unequal_shape(tmp_path, capsys):
    """9x16 and 9x12; the third first image has not one finite value."""
    noise = np.random.default_rng(0).random((3, 4, 9, 16)).astype(np.float32)
    noise[2] = np.nan
    one, two = save_arrays(tmp_path / "1", *noise), save_arrays(tmp_path / "2", *noise[..., :12])
    code, text, bad = checked(f"--scenario custom --data1 {one} --data2 {two}", tmp_path, capsys)
    assert code == 1 and re.fullmatch("2\t.*1/2.npy .*\n", bad) and "warning: 2 of 2 pairs" in text


def last_words(capsys, function, *args):
    """Runs function(*args) as a script does, which has to end with code 2.  Returns its stderr."""
    with pytest.raises(SystemExit) as error:
        data.run_main(lambda: function(*args))
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("program, flags, words", [
    (data, "check", "--scenario"), (data, "check --scenario rgbd --data1 x --data2 y", "--data1"),
    (data, "check --scenario rgb-dem --data ~/nowhere", "/.*/nowhere"),
    (data, "prepare --scenario rgbd --data .", "Depth/.*SUNRGBD/"),
    (data, "prepare --scenario rgb-dem --size 64", "--size"),
    (data, "prepare --scenario rgb-dem --depth-unit 1000", "--depth-unit"),
    (data, "check --scenario rgb-dem --as1 rgb", "--as1"),
    (pretrain, "--scenario rgbd --method clip --no-intra", "--no-intra"),
    (pretrain, "--scenario rgbd --bgr", "--bgr .*--weights"),
    (explain, "--sweep x --layer y", "--layer"), (explain, "--sweep x --samples 9", "--samples"),
    (finetune, "--task geonrw --weights none --cached --linear", "--cached"),
    (finetune, "--task geonrw --weights none --model late", "--model fcn"),
    (finetune, "--task custom --weights none --data1 a", "--data2"),
    (finetune, "--task custom --weights none --data1 a --data2 b --target c.csv --ignore 3",
     "--ignore"),
    (finetune, "--table runs --lr 1", "--lr"), (finetune, "--table nowhere", "nowhere"),
    (finetune, "--task nyuv2 --weights none --bgr", "--bgr"),
    (finetune, "--task bigearthnet --weights none --linear --part all", "--part"),
    (pretrain, "--scenario rgbd --depth-unit nan", "--depth-unit: nan"),
    (pretrain, "--scenario rgbd --lr 0", "--lr: 0"),
    (explain, "--checkpoint x --steps 0", "--steps: 0"),
    (pretrain, "--scenario rgbd --common 1.5", "--common: 1.5"),
    (pretrain, "--scenario rgbd --seed -1", "--seed: -1"),
    (data, "prepare --scenario rgbd --depth-unit x", "--depth-unit: x")])
def test_flags_that_do_not_go_together_are_refused(program, flags, words, capsys):
    assert re.search(words, last_words(capsys, call, program, flags))


# ---- what the scripts share ----

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_is_one_line_and_not_a_wait(number, capsys):
    """The kernel ends a worker by SIGKILL where memory is full, by SIGBUS where /dev/shm is."""
    jobs = data.in_processes(signal.raise_signal, [number] * 8, 2, "test")
    assert re.fullmatch("error: .*/dev/shm.*--workers.*\n", last_words(capsys, list, jobs))


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total"),
     "--batch-size.*--projector"),
    (RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)"),
     "/dev/shm.*--workers"),
    (RuntimeError("stack expects each tensor to be equal size, but got [3, 8, 8] at entry 0 and"),
     "prepare --scenario custom")])
def test_errors_of_torch_that_flags_avoid_are_one_line_with_them(error, words, capsys):
    def fails():
        raise error

    assert re.fullmatch(f"error: .*{words}.*\n", last_words(capsys, fails))


def test_a_full_disk_is_one_line_with_the_file_which_stays_whole(tmp_path, capsys):
    """A limit on the size of files is as a full disk.  torch.save hides the OSError."""
    resource = pytest.importorskip("resource")
    path, write = tmp_path / "checkpoint.pt", partial(torch.save, torch.zeros(10000))
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, limits[1]))
    try:
        assert str(path) in last_words(capsys, data.write_atomically, path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["checkpoint.pt"]


FINE = "--task sunrgbd --toy --size 48 --batch-size 16 --epochs 2"


def fine(flags):
    """finetune.main() by its command line.  Returns the results, if there are any."""
    call(finetune, flags)
    words = shlex.split(flags)
    file = Path(words[words.index("--out") + 1]) / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_depth_has_the_unit_that_the_checkpoint_was_trained_on():
    args = argparse.Namespace(task="sunrgbd", toy=True, model="late", epochs=None, linear=False)
    args.pretraining = [dict(modalities=["rgb", "depth"], depth_unit=5000.0)]
    assert dict(depth_unit=5000.0) in [table for table, _ in finetune.list_settings(args)]


def losses_of(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def transfer(rank, world, flags):
    """The processes measure statistics that differ in their last digits, as GPUs may do."""
    measure = finetune.measure_statistics

    def measure_inexactly(net, batches):
        measure(net, batches)
        for E in net.encoders:
            E.bn1.running_mean += 1e-6 * rank

    finetune.measure_statistics = measure_inexactly
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    call(finetune, flags)


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
    each = [slow_average_precision(scores[:, c].tolist(), labels[:, c].tolist()) for c in range(3)]
    metrics, classes = finetune.compute_ranking_metrics(scores, labels)
    assert metrics == pytest.approx({"mAP micro": micro, "mAP macro": sum(each) / 3}, rel=1e-12)
    assert classes == [*[pytest.approx(value, rel=1e-12) for value in each], None]
    undefined = finetune.compute_ranking_metrics(scores, torch.zeros(20, 4))[0]
    assert undefined == {"mAP micro": None, "mAP macro": None}


@pytest.mark.parametrize("seed", range(4))
def test_iou_and_accuracy_are_counts_of_pixels(seed):
    """Ignored ones count nowhere, a class neither predicted nor labelled is not in the mean."""
    g = torch.Generator().manual_seed(seed)
    pred = torch.randint(4, (2, 9, 9), generator=g)
    gt = torch.randint(-1, 4, (2, 9, 9), generator=g)
    pairs = [(p, t) for p, t in zip(pred.flatten().tolist(), gt.flatten().tolist()) if t != -1]
    ious, recalls = [None] * 6, [None] * 6      # classes 4 and 5 do not occur
    for c in range(4):
        both = sum(p == c and t == c for p, t in pairs)
        ious[c] = both / sum(p == c or t == c for p, t in pairs)
        recalls[c] = both / sum(t == c for _, t in pairs)
    right = sum(p == t for p, t in pairs) / len(pairs)
    assert finetune.iou_and_accuracy(pred, gt, 6, -1) == pytest.approx((sum(ious[:4]) / 4, right))
    counts = finetune.count_confusions(pred, gt, 6, -1)
    assert finetune.compute_counting_metrics(counts, "segmentation")[1] == pytest.approx(ious)
    metrics, each = finetune.compute_counting_metrics(counts, "single-label")
    assert metrics == pytest.approx({"accuracy": right, "mean accuracy": sum(recalls[:4]) / 4})
    assert each == pytest.approx(recalls)
    mask = torch.where(gt == -1, 255, gt + 36).byte()               # as files hold masks
    assert finetune.iou_and_accuracy(pred + 36, mask, 40, 255)[1] == pytest.approx(right)


def test_the_guess_of_masks_and_single_labels_is_the_most_frequent_training_class():
    task = argparse.Namespace(classes=["a", "b"], kind="segmentation")
    matrix = torch.tensor([[30, 10], [20, 40]])                     # row: label
    result = finetune.summarise(task, matrix, torch.tensor([5, 4]))
    assert result["guess"] == pytest.approx({"mIoU": 0.2, "accuracy": 0.4})  # a: 40 of 100
    assert result["train_labels"] == dict(a=5, b=4) and result["test_labels"] == dict(a=40, b=60)
    task.kind = "single-label"
    result = finetune.summarise(task, matrix, torch.tensor([4, 5]))
    assert result["guess"] == pytest.approx({"mean accuracy": 0.5, "accuracy": 0.6})


def test_the_guess_of_multi_label_ranks_every_image_by_the_training_frequencies():
    """2 images, 2 classes; b is the more frequent.  Ranked are b b, of which one is positive, then
    a a, of which both are: 0.5 at recall 1/3, then 3/4 at recall 1."""
    task = argparse.Namespace(classes=["a", "b"], kind="multi-label")
    labels = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    result = finetune.summarise(task, torch.stack((labels, labels)), torch.tensor([3, 9]))
    assert result["metrics"] == {"mAP micro": 1, "mAP macro": 1}
    expected = {"mAP micro": 0.5 / 3 + 0.75 * 2 / 3, "mAP macro": 0.75}
    assert result["guess"] == pytest.approx(expected)


# ---- heads ----

def test_the_fcn_is_the_papers_convolution_after_upsampling():
    """App. B in its own words: concatenate, upsample, 1x1 convolutions, add."""
    torch.manual_seed(0)
    net = finetune.FCN([decur.resnet("resnet-toy", c) for c in (3, 1)], 5).double().eval()
    x = [torch.randn(2, c, 40, 56, dtype=torch.float64) for c in (3, 1)]
    stages = [E.stages(images)[1:] for E, images in zip(net.encoders, x)]
    literal = 0
    for score, *maps in zip(net.score, *stages):
        joint = F.interpolate(torch.cat(maps, 1), (40, 56), mode="bilinear")
        literal = literal + score(joint)
    assert torch.allclose(net(*x), literal, rtol=0, atol=1e-12)


def test_late_fusion_is_one_linear_layer_on_both_features():
    encoders = [decur.resnet("resnet-toy", c).eval() for c in (3, 1)]
    x = [torch.randn(2, c, 32, 32) for c in (3, 1)]
    for part, dim in ((slice(None), 128), (slice(10, 20), 10)):
        net = finetune.LateFusion(encoders, [dim, dim], 12, part)
        features = torch.cat([E(images)[:, part] for E, images in zip(encoders, x)], 1)
        assert torch.equal(net(*x), net.fc(features)) and not net.fc.bias.any()
        assert 0.008 < net.fc.weight.std() < 0.012


def test_cmx_has_the_published_size_and_names():
    """models.md, section 2: two streams, FRMs, FFMs and the decoder, and nothing else."""
    net = finetune.CMX("mit_b2", 40)
    assert sum(p.numel() for p in net.parameters()) == 66_581_424
    keys = set(net.state_dict())
    streams = {f"backbone.{extra}{key}" for extra in ("", "extra_")
               for key in decur.mit("mit_b2", 3).state_dict()}
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
    y, u, G, out = [], [], [], []
    for i, t in enumerate(tokens, 1):
        p = torch.relu(ffm.cross[f"channel_proj{i}"](t))
        y.append(p[:, :C])
        u.append(p[:, C:])
        k, v = ffm.cross["cross_attn"][f"kv{i}"](u[-1]).split(C, 1)
        parts = [torch.softmax(k[:, c:c + 4].T @ v[:, c:c + 4] / 2, 0) for c in (0, 4)]
        G.append(torch.block_diag(*parts))      # CxC, head by head
    for i in (0, 1):
        yt = ffm.cross[f"end_proj{i + 1}"](torch.cat((y[i], u[i] @ G[1 - i]), 1))
        out.append(ffm.cross[f"norm{i + 1}"](tokens[i] + yt))
    fused = torch.cat(out, 1).T.view(1, 2 * C, 3, 5)
    emb = ffm.channel_emb
    assert torch.allclose(ffm(a, b),
                          emb["norm"](emb["residual"](fused) + emb["channel_embed"](fused)))


def test_the_encoder_of_modality_2_goes_to_the_extra_stream_of_cmx(tmp_path):
    encoders = [decur.mit("mit_b0", 3) for _ in range(2)]
    for k, E in enumerate(encoders, 1):
        torch.save(E.state_dict(), tmp_path / f"{k}.pth")
    net = finetune.CMX("mit_b0", 40, (3, 3), 32)
    args = argparse.Namespace(backbone="mit_b0", modality=None, bgr=False)
    files = [str(tmp_path / f"{k}.pth") for k in (1, 2)]
    pretrain.start_from(files, net.encoders, args, [MODALITIES["rgb"], MODALITIES["hha"]])
    for key, value in encoders[1].state_dict().items():
        assert torch.equal(net.state_dict()[f"backbone.extra_{key}"], value)


# ---- samples, augmentation, schedule ----

def test_a_box_takes_image_and_mask_along():
    def cut(x, box, size):
        return finetune.resample_boxes(x, torch.tensor([box]).float(), size)

    mask = torch.arange(48).view(1, 6, 8)
    image, expected = mask[:, None].float(), mask[:, 1:5, 2:6].flip(2)
    assert torch.equal(cut(mask, (1, 2, 4, 4, 1), (4, 4)), expected)
    assert torch.allclose(cut(image, (1, 2, 4, 4, 1), (4, 4))[:, 0], expected.float())
    outside = (-3, -4, 12, 16, 0)               # CMX's scale 0.5
    small = cut(mask, outside, (6, 8)) >= 0
    assert small[0, 1:4, 2:6].all() and not small[0, [0, -1]].any()
    assert not small[0, :, [0, 1, -1]].any()
    assert cut(image, outside, (6, 8))[0, 0, 0].sum() == 0
    # CMX's scale 1.75 begins within a pixel: no row of the crop is left without one
    whole = cut(torch.ones(1, 1, 12, 16), (2 / 1.75, 9 / 1.75, 6 / 1.75, 8 / 1.75, 0), (6, 8))
    assert torch.allclose(whole, torch.ones(1, 1, 6, 8))


def test_the_boxes_of_cmx_are_its_six_scales():
    top, left, h, w, mirrored = finetune.draw_cmx_boxes(400, 48, 64, drawn(400))
    assert {round(48 / v, 4) for v in h[:, 0].tolist()} == {0.5, 0.75, 1, 1.25, 1.5, 1.75}
    inside = h <= 48
    assert (top[inside] >= 0).all() and ((top + h)[inside] <= 48 + 1e-9).all()
    assert (left[w <= 64] >= 0).all() and 150 < mirrored.sum() < 250
    assert torch.allclose(top[h == 96], torch.tensor(-24.0).double())


def test_subsets_are_without_replacement_and_lie_in_one_another():
    small, large = finetune.choose_subset(1000, 0.01, 3), finetune.choose_subset(1000, 0.5, 3)
    assert len(set(small)) == 10 and set(small) < set(large) and len(set(large)) == 500
    assert set(finetune.choose_subset(1000, 0.01, 4)) != set(small)
    assert len(finetune.choose_subset(10, 0.01, 0)) == 1


def test_scales_and_mirror_images_are_added_as_probabilities_that_cannot_overflow():
    """CMX's evaluation by its formula; with large logits the largest still wins."""
    net = nn.Conv2d(3, 4, 3, padding=1)
    x, scales = torch.rand(2, 3, 12, 16), (0.75, 1, 1.25)
    expected = 0
    for size in ((9, 12), (12, 16), (15, 20)):
        y = F.interpolate(x, size, mode="bilinear")
        both = (net(y) + net(y.flip(3)).flip(3)).exp()
        expected = expected + F.interpolate(both, (12, 16), mode="bilinear")
    assert torch.allclose(finetune.compute_scores(net, [x], scales), expected)
    certain = torch.tensor([45.0, 0, 60]).view(1, 3, 1, 1)
    large = finetune.compute_scores(lambda x: certain.expand(2, 3, *x.shape[2:]), [x], scales)
    assert (large.argmax(1) == 2).all()


@pytest.mark.parametrize("name, at, steps, rates", [
    ("cosine", (0, 1, 5, 10), 10, [1, 0.9755283, 0.5, 0]),
    ("steps", (0, 59, 60, 79, 80, 99), 100, [1, 1, 0.1, 0.1, 0.01, 0.01]),
    ("warm poly", (0, 500, 1000, 25000), 50000, [0, 0.5, 0.98 ** 0.9, 0.5 ** 0.9]),
    ("poly", [20000], 40000, [0.5 ** 0.9]), ("constant", [9], 9, [1])])
def test_schedules_are_those_of_app_B_and_of_cmx(name, at, steps, rates):
    """Pretraining has a cosine without warm-up, which ends at zero."""
    schedule = pretrain.cosine if name == "cosine" else partial(finetune.scale_rate, name)
    assert [schedule(step, steps) for step in at] == pytest.approx(rates)


@pytest.mark.parametrize("flags, settings, sources", [
    ("bigearthnet", dict(model="late", batch_size=256, epochs=100, lr=0.05, weight_decay=0,
                         optimizer="sgd"), dict(lr="paper, App. B")),
    ("bigearthnet --linear", dict(lr=0.5, backbone="resnet50", size=224),
     dict(lr="paper, App. B", size="authors")),
    ("geonrw --linear", dict(model="fcn", batch_size=256, epochs=30, lr=1e-4, weight_decay=0.01,
                             optimizer="adamw"), dict(schedule="authors")),
    ("sunrgbd", dict(model="fcn", batch_size=8, steps=40000, epochs=None, lr=0.01, modality=1,
                     weight_decay=1e-5), dict(lr="paper, App. B", momentum="MMSegmentation, 40k")),
    ("nyuv2 --model cmx", dict(backbone="mit_b5", steps=50000, lr=6e-5, weight_decay=0.01,
                               test_scales=(0.75, 1, 1.25)), dict(lr="CMX, NYUv2"))])
def test_transfer_defaults_are_the_papers_and_say_where_they_come_from(flags, settings, sources):
    args, printed = finetune.get_args(f"--task {flags} --weights none".split())
    assert {name: getattr(args, name) for name in settings} == settings
    assert {name: printed[name] for name in sources} == sources


@pytest.mark.parametrize("flags, kind, counts, decays, momentum", [
    ("--task nyuv2 --model cmx --backbone mit_b2", "AdamW", (288, 522), (0.01, 0), None),
    ("--task sunrgbd", "SGD", (56, 109), (1e-5, 1e-5), 0.9)])
def test_transfer_optimizers_are_those_of_app_B_and_of_cmx(flags, kind, counts, decays, momentum):
    """CMX spares biases and norms from weight decay: 522 of the 810 tensors of CMX-B2."""
    args = finetune.get_args(f"{flags} --weights none".split())[0]
    with torch.device("meta"):
        net = finetune.FCN([decur.resnet("resnet50", 3)], 37)
        if args.model == "cmx":
            net = finetune.CMX(args.backbone, 40)
    optimizer = finetune.make_transfer_optimizer(net, args)
    groups = optimizer.param_groups
    assert type(optimizer).__name__ == kind and groups[0].get("momentum") == momentum
    assert tuple(len(group["params"]) for group in groups) == counts
    assert tuple(group["weight_decay"] for group in groups) == decays


def test_tests_of_bigearthnet_see_the_middle_224_of_256():
    """Of frames of 32 pixels, 28; here without resizing."""
    args = finetune.get_args("--task bigearthnet --weights none --size 28".split())[0]
    x = torch.rand(2, 3, 32, 32)
    rows = [MODALITIES["sar"]] * 2
    seen, _ = finetune.prepare_batch([x, x, torch.zeros(2, 9)], args, rows, torch.device("cpu"))
    assert torch.allclose(seen[0], x[:, :, 2:30, 2:30], atol=1e-6)


def test_a_picture_of_a_prediction_has_inputs_label_and_prediction_from_left_to_right(tmp_path):
    """The label is class 0 everywhere, the prediction is class 1."""
    task = argparse.Namespace(ids=["a_b"], classes=["sky", "sea"], inputs=[MODALITIES["rgb"]] * 2)
    args = argparse.Namespace(modality=0, out=tmp_path)
    scores = torch.stack((torch.zeros(256, 256), torch.ones(256, 256)))
    finetune.save_prediction(args, task, 0, [torch.zeros(3, 256, 256)] * 2,
                             torch.zeros(256, 256, dtype=torch.int64), scores)
    page = read_image(tmp_path / "images" / "a_b.png")
    assert page.shape == (3, 256 + 3 * 20, 4 * 256)
    label, prediction = (page[:, 100, 256 * k + 100].tolist() for k in (2, 3))
    legend = [page[:, 256 + 20 * k:276 + 20 * k].reshape(3, -1).T.tolist() for k in (1, 2)]
    assert label in legend[0] and prediction in legend[1] and label != prediction


# ---- the program ----

@pytest.mark.parametrize("flags", [
    "--model late --linear", "--model late --linear --cached", "--model fcn",
    "--model fcn --linear --modality 1",
    "--model cmx --linear --batch-size 8 --epochs 1 --size 64"])
def test_every_head_trains_frozen_and_fine_tuned(flags, scenes, tmp_path):
    """Sizes that are no multiple of 3 have a canvas, too."""
    result = fine(f"{FINE} --data {scenes} {flags} --weights none --labels 0.7 --out {tmp_path}")
    assert result["samples"] == 34 and result["test_samples"] == 16
    late = "late" in flags
    assert list(result["metrics"]) == (["mAP micro", "mAP macro"] if late else ["mIoU", "accuracy"])
    ids = (tmp_path / "ids.txt").read_text().split()
    assert len(set(ids)) == 34 and set(ids) < set((scenes / "train.txt").read_text().split())
    assert len(losses_of(tmp_path)) == 4
    settings = finetune.get_args(f"{FINE} --data {scenes} {flags} --weights none".split())[0]
    torch.manual_seed(0)
    net, _ = finetune.build_model(settings, finetune.open_task(settings, 0)[0][0])
    name, start = next(iter(net.state_dict().items()))              # the first convolution
    end = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"][name]
    assert torch.equal(start, end) == ("--linear" in flags)


def test_random_frozen_encoders_have_the_statistics_of_what_they_see(scenes):
    args = finetune.get_args(f"{FINE} --data {scenes} --model late --linear --weights none "
                             f"--workers 0".split())[0]
    (samples, _), _ = finetune.open_task(args, 0)
    net, _ = finetune.build_model(args, samples)
    finetune.freeze(net, samples, np.arange(48), args, torch.device("cpu"), resumed=False)
    x = torch.stack([samples[i][0] for i in range(48)])
    E = net.encoders[0]
    seen = E.conv1(data.resize_and_normalise(x, MODALITIES["rgb"], 48)).mean((0, 2, 3))
    assert torch.allclose(E.bn1.running_mean, seen, atol=0.01) and seen.abs().max() > 0.1
    assert not any(p.requires_grad for p in net.encoders.parameters())


def test_a_frozen_encoder_that_moves_voids_the_run(scenes, tmp_path, monkeypatch):
    forward = decur.ResNet.forward

    def moves(self, x):
        self.bn1.running_mean += 1
        return forward(self, x)

    monkeypatch.setattr(decur.ResNet, "forward", moves)
    flags = f"{FINE} --data {scenes} --model late --linear --weights none"
    is_refused("frozen", fine, f"{flags} --out {tmp_path / 'o'}", error=SystemExit)
    assert not (tmp_path / "o" / "results.json").exists()


@pytest.mark.parametrize("head", ["--model fcn", "--model late --linear"])
def test_a_stopped_transfer_goes_on_as_if_nothing_had_been(head, scenes, tmp_path, monkeypatch):
    """Statistics of frozen encoders are not measured again: on a GPU their last bits may differ."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = f"{FINE} --data {scenes} {head} --weights none"
    a = fine(f"{flags} --out {whole}")
    with monkeypatch.context() as patch:        # in the third step
        watched(patch, finetune, "compute_transfer_loss", 3,
                lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert fine(f"{flags} --out {broken}") is None
    assert torch.load(broken / "checkpoint.pt", weights_only=True)["step"] == 3
    measured = watched(monkeypatch, finetune, "measure_statistics")
    b = fine(f"{flags} --out {broken} --resume")
    assert a["metrics"] == b["metrics"] and losses_of(whole) == losses_of(broken) and not measured


def test_two_processes_transfer_as_one(scenes, tmp_path):
    """15 test samples do not divide by 2 processes, but each sample counts once."""
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    tests = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join(tests[:15]))
    flags = f"{FINE} --data {folder} --model fcn --linear --weights none --save-images 12"
    one = fine(f"{flags} --out {tmp_path / 'one'}")
    in_processes(2, tmp_path / "w", transfer, f"{flags} --out {tmp_path / 'two'}")
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], abs=2e-3)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    assert len(list((tmp_path / "two" / "images").iterdir())) == 12  # 7 are the first process's


@pytest.fixture(scope="session")
def probed(pretrained, scenes, tmp_path_factory):
    """The flags of a linear probe on cached features without --weights, and what it gives."""
    flags = f"{FINE} --data {scenes} --model late --linear --cached"
    out = tmp_path_factory.mktemp("probed") / "out"
    return flags, fine(f"{flags} --weights {pretrained[0]}/checkpoint.pt --out {out}")


def test_both_encoders_are_their_checkpoint(probed, pretrained, tmp_path):
    """And each file says what its encoder was pretrained on."""
    flags, result = probed
    run = pretrained[0]
    same = fine(f"{flags} --weights {run}/encoder1.pth {run}/encoder2.pth --out {tmp_path / 'o'}")
    assert same["metrics"] == result["metrics"] and same["run"] == result["run"]
    assert [source["sees"]["name"] for source in same["pretraining"]] == ["rgb", "depth"]


@pytest.mark.parametrize("part, dims", [
    ("common", slice(0, 24)), ("unique", slice(24, 32)), ("all", slice(0, 32))])
def test_parts_of_the_embedding_are_classified(part, dims, probed, pretrained):
    weights = pretrained[0] / "checkpoint.pt"
    args = finetune.get_args(f"{probed[0]} --weights {weights} --part {part}".split())[0]
    (samples, _), _ = finetune.open_task(args, 0)
    net, _ = finetune.build_model(args, samples)
    whole, _ = explain.open_net(weights, torch.device("cpu"))
    x = [torch.randn(2, C, 48, 48) for C in (3, 1)]
    z = [f(images)[:, dims] for f, images in zip((whole.f1, whole.f2), x)]
    assert torch.allclose(net.eval().encode(*x), torch.cat(z, 1), atol=1e-5)
    samples.inputs = (MODALITIES["aerial"], MODALITIES["depth"])
    warnings = [line for line in finetune.build_model(args, samples)[1] if "warning" in line]
    assert len(warnings) == 1 and "0.485" in warnings[0] and "mean 0 0 0" in warnings[0]


def test_barlow_twins_of_one_modality_has_a_name_of_its_own():
    sources = [dict(method="barlowtwins", modality=m, no_intra=False, common=1) for m in (None, 1)]
    names = [finetune.name_weights(source) for source in sources]
    assert names == ["Barlow Twins (w/o intra&decoup.)", "barlowtwins of modality 1"]


def test_the_default_out_names_task_model_weights_and_seed():
    flags = "--task bigearthnet --toy --seed 2 --weights runs/a/encoder1.pth runs/b/encoder2.pth"
    args, _ = finetune.get_args(flags.split())
    assert str(args.out) == "runs/toy-bigearthnet-late-a-b-seed2"


# ---- one's own labels ----

DECLARED = "--as1 rgb --as2 depth"
OWN = "--task custom --data1 './*_rgb.png' --data2 './*_depth.png' --batch-size 8 --epochs 2"


@pytest.fixture(scope="session")
def own_folder(scenes, tmp_path_factory):
    """40 pairs of the made-up frames whose names differ by a suffix, with masks and tables."""
    root = tmp_path_factory.mktemp("own")
    factors = data.read_factors(scenes)
    names, lines = sorted(factors)[:40], []
    (root / "signed").mkdir()
    for name in names:
        shutil.copy(scenes / "RGB" / f"{name}.png", root / f"{name}_rgb.png")
        shutil.copy(scenes / "Depth" / f"{name}.png", root / f"{name}_depth.png")
        mask = data.read_mask(scenes / "Label" / f"{name}.png")
        mask = np.where(mask > 1, 7, 0).astype(np.uint8)            # object, and class 0 counts
        mask[:12] = 255                         # a quarter of the pixels
        save(root / "masks" / f"{name}.png", mask)
        save(root / "binary" / f"{name}.png", np.where(mask == 7, 255, 0).astype(np.uint8))
        tifffile.imwrite(root / "signed" / f"{name}.tif", np.where(mask == 255, -5, mask + 1.0))
        lines.append(f"{name},{data.SHAPES[factors[name][0]]}")
    files = {"single.csv": ["\ufeffname,label", *lines], "blank.csv": [*lines[:-1], "0039,"],
             "tree.csv": [*lines[:29], "0029,tree"], "train": names[:24], "test": names[24:30]}
    for file, text in files.items():
        (root / file).write_text("\n".join(text) + "\n", "utf-8")
    return root


@pytest.fixture
def own(own_folder, monkeypatch):
    monkeypatch.chdir(own_folder)
    return own_folder


SHAPE_NAMES = sorted(data.SHAPES)


@pytest.mark.parametrize("target, more, metrics, classes, samples", [
    ("masks", "", ["mIoU", "accuracy"], ["0", "7"], (32, 8)),
    ("signed", "--modality 2 --ignore -1", ["mIoU", "accuracy"], ["1", "8"], (32, 8)),
    ("single.csv", "--linear", ["mean accuracy", "accuracy"], SHAPE_NAMES, (32, 8)),
    ("blank.csv", "--linear --cached --labels 0.5", ["mAP micro", "mAP macro"], SHAPE_NAMES,
     (16, 8))])
def test_own_labels_train_and_are_scored_by_class(target, more, metrics, classes, samples, own,
                                                  pretrained, tmp_path):
    """Class 0 counts; 255 and negative values do not."""
    weights = pretrained[0] / "checkpoint.pt"
    result = fine(f"{OWN} {DECLARED} --target {target} {more} --weights {weights} --out {tmp_path}")
    assert list(result["metrics"]) == list(result["guess"]) == metrics
    assert list(result["classes"]) == classes
    assert (result["samples"], result["test_samples"]) == samples


def test_resume_refuses_labels_with_other_classes(own, tmp_path):
    """Index 0 of the old classes would get the name of another class."""
    table = (own / "single.csv").read_text()
    (own / "renamed.csv").write_text(table)
    flags = f"{OWN} --target renamed.csv --linear --cached --weights none --out {tmp_path}"
    fine(f"{flags} --backbone resnet-toy")
    (own / "renamed.csv").write_text(table.replace("cross", "zebra"))
    is_refused("class_names", fine, f"{flags} --backbone resnet-toy --resume")


def test_training_without_any_label_is_refused(own, tmp_path):
    shutil.copytree(own / "masks", tmp_path / "masks")
    for name in (own / "train").read_text().split():
        save(tmp_path / "masks" / f"{name}.png", np.full((48, 64), 255, np.uint8))
    flags = f"{OWN} --target {tmp_path}/masks --split train --test-split test --weights none"
    is_refused("no training sample has a label", fine,
               f"{flags} --backbone resnet-toy --out {tmp_path}/o")


def test_second_images_of_any_size_stay_8_bits(tmp_path):
    """So a batch has one type, also if only some of its images are resized."""
    rng = np.random.default_rng(0)
    one, two = ([rng.integers(0, 256, (size, size, 3)).astype(np.uint8) for size in sizes]
                for sizes in ((8, 8), (8, 16)))
    where = save_arrays(tmp_path / "a", *one), save_arrays(tmp_path / "b", *two)
    pairs = open_dataset("custom", where, 8, declared=("rgb", "rgb"))
    samples = finetune.Labelled(pairs, ("x", "y"), "single-label", lambda name: torch.tensor(1))
    assert [(x2.dtype, x2.shape) for _, x2, _ in map(samples.__getitem__, range(2))] == 2 * [
        (torch.uint8, (3, 8, 8))]


def own_task(target, more="", weights="none"):
    """The settings, the training samples and the lines of a task with one's own labels."""
    flags = f"{OWN} --target {target} --weights {weights} {more}"
    args = finetune.get_args(shlex.split(flags))[0]
    (samples, _), lines = finetune.open_task(args, 0)
    return args, samples, lines


def test_the_shares_of_the_classes_and_of_what_has_no_label_are_told(own):
    """A quarter of each mask is 255; the rest is the classes 0 and 7."""
    lines = "\n".join(own_task("masks")[2])
    zero, seven = (float(re.search(rf"\b{value} \(([\d.]+)%\)", lines)[1]) for value in (0, 7))
    assert zero + seven == pytest.approx(75, abs=0.02) and "25.00% of the pixels" in lines


def test_one_forgotten_label_makes_a_task_multi_label_and_is_told(own):
    _, samples, lines = own_task("blank.csv")
    assert samples.kind == "multi-label" and re.search("1 of 40 .*--target", "\n".join(lines))


def test_a_table_of_labels_may_have_300_classes():
    classes, _, label_of, _ = finetune.describe_labels(None, {k: {f"{k:03}"} for k in range(300)})
    assert len(classes) == 300 and label_of(299) == 300


@pytest.mark.parametrize("name, joined", [
    ("forest|water", True), ("forest, water", True), ("forest water", True),
    ("forest fire", False), ("water/ice", False)])
def test_a_label_that_joins_others_is_told(name, joined):
    labels = dict(a={"forest"}, b={"water"}, c={name})
    *_, lines = finetune.describe_labels(None, labels)
    assert bool(lines) == joined and all(repr(name) in line for line in lines)


def test_classes_that_are_not_trained_on_are_told(own):
    """After --labels: of 24 training samples 2 remain, and neither has the class tree."""
    args, samples, _ = own_task("tree.csv", "--split train --test-split test --labels 0.1")
    chosen = finetune.choose_subset(len(samples), args.labels, 0)
    counts = finetune.count_classes(samples, chosen, 0).tolist()
    missing = [name for name, n in zip(samples.classes, counts) if not n]
    lines = finetune.describe_training(args, samples, counts, 2)
    assert "tree" in missing and sum(counts) == 2 and lines[1].endswith(", ".join(missing))


def test_names_in_lists_without_a_label_are_left_out(own):
    """So that tiles of scenes without a mask can be in train.txt, for pretraining."""
    table = [line.split(",") for line in (own / "single.csv").read_text().splitlines()]
    labelled = [name for name, _ in table[::2]]
    (own / "few.csv").write_text("".join(f"{name},{label}\n" for name, label in table[::2]))
    _, samples, _ = own_task("few.csv", "--split train --test-split test")
    train = (own / "train").read_text().split()
    assert samples.ids == [name for name in train if name in labelled] != train


def test_a_pretraining_of_ones_own_pairs_knows_how_to_normalise(own, runs):
    weights = runs / "own" / "checkpoint.pt"
    args, samples, _ = own_task("single.csv", weights=weights)
    settings, rows = pretrain.read_pretraining(weights)
    assert args.size == settings["size"] == 48
    assert json.loads(json.dumps(samples.inputs)) == json.loads(json.dumps(rows))


def test_declared_images_are_normalised_as_in_pretraining_and_others_are_told(own, pretrained):
    weights = pretrained[0] / "checkpoint.pt"
    _, samples, lines = own_task("single.csv", DECLARED, weights)
    assert list(samples.inputs) == [MODALITIES["rgb"], MODALITIES["depth"]]
    assert "warning" not in " ".join(lines)
    *_, lines = own_task("single.csv", "", weights)
    warnings = [line for line in lines if line.startswith("warning")]
    assert [line.split("give ")[1] for line in warnings] == ["--as1 rgb", "--as2 depth"]


@pytest.mark.parametrize("target, text, more, words", [
    ("unknown.csv", "nobody,disk\n0000,ring\n", "", "unknown.csv .*nobody"),
    ("one.csv", "0000,disk\n0001,disk\n", "", "one.csv .*disk"),
    ("binary", None, "", "binary has only the class '0'.* give --ignore -1"),
    ("split.csv", "0000,disk,train\n", "", "split.csv .*name,label"),
    ("head.csv", "file,class\n0000,disk\n", "", "head.csv .*'file'.*header"),
    ("half.csv", "0000,disk\n0001,ring\n", "--split train --test-split test",
     "half.csv labels none of the pairs of one split"),
    ("labels.tsv", "0000\tdisk\n", "", "labels.tsv"), ("nowhere.csv", None, "", "nowhere.csv"),
    ("masks", None, "--split train", "--test-split")])
def test_own_labels_that_cannot_be_used_are_named(target, text, more, words, own, tmp_path):
    if text:
        (own / target).write_text(text)
    flags = f"{OWN} --target {target} {more} --weights none --backbone resnet-toy"
    is_refused(words, fine, f"{flags} --out {tmp_path / 'o'}")


# ---- --table ----

def list_runs(folder, capsys, *runs):
    """What --table prints for runs (flags, flags of the pretraining of each encoder, score)."""
    for i, (flags, pretrainings, score) in enumerate(runs):
        args, _ = finetune.get_args(shlex.split(f"--weights x.pth {flags}"))
        if pretrainings:
            args.pretraining = []
        for words in pretrainings:
            args.pretraining.append(pretrain.collect_settings(pretrain.get_args(words.split())[0]))
        settings = pretrain.collect_settings(args)
        result = dict(settings, run=finetune.identify_run(args, settings), test_samples=10,
                      metrics={"mIoU": score}, guess={"mIoU": 0.1},
                      pretraining=args.pretraining)
        (folder / f"run{i}").mkdir()
        (folder / f"run{i}" / "results.json").write_text(json.dumps(result, default=str))
    call(finetune, f"--table {' '.join(str(folder / f'run{i}') for i in range(len(runs)))}")
    return capsys.readouterr().out.splitlines()


RGB_DEM = "--scenario rgb-dem"
HALF = f"{RGB_DEM} --common 0.5"


def test_runs_that_differ_only_by_their_seeds_are_one_line(tmp_path, capsys):
    lines = list_runs(
        tmp_path, capsys, ("--task geonrw", [RGB_DEM] * 2, 0.3),
        ("--task geonrw", [RGB_DEM] * 2, 0.3),  # again: it counts once
        ("--task geonrw --seed 1", [f"{RGB_DEM} --seed 1"] * 2, 0.4),
        ("--task geonrw --labels 0.01 --linear", [RGB_DEM] * 2, None))
    assert len(lines) == 2
    words = (r"geonrw  fcn  DeCUR  fine-tuned  100% of .*mIoU 35.0 \+- 7.1 .*10.0.*seeds: 2 .*: 10"
             r"  in .*run1, .*run2")
    assert re.fullmatch(words, lines[0])
    assert re.fullmatch("geonrw  fcn  DeCUR  linear  1% of .*mIoU nan .*seeds: 1 .*", lines[1])


@pytest.mark.parametrize("flags, others, words", [
    ("", [RGB_DEM] * 2, "pretraining 1 common 0.5"), ("", [f"{HALF} --no-intra"] * 2, "w/o intra "),
    ("", [f"{RGB_DEM} --common 1"] * 2, "w/o decoup."),
    ("", [f"{RGB_DEM} --common 1 --no-intra"] * 2, r"Barlow Twins \(w/o intra&decoup.\)"),
    ("", [HALF, f"{RGB_DEM} --method barlowtwins"], "DeCUR and Barlow Twins"),
    ("", [], r"x\.pth"), ("--epochs 5", [HALF] * 2, " epochs 5")])
def test_what_makes_runs_differ_stands_in_their_lines(flags, others, words, tmp_path, capsys):
    lines = list_runs(tmp_path, capsys, ("--task geonrw", [HALF] * 2, 0.3),
                      (f"--task geonrw --seed 1 {flags}", others, 0.4))
    assert len(lines) == 2 and sum(bool(re.search(words, line)) for line in lines) == 1


def test_tables_of_labels_count_by_their_content(own, tmp_path, capsys):
    """Two files of one name are not averaged; a copy of a file is the same."""
    for folder in ("same", "other"):
        (tmp_path / folder).mkdir()
        shutil.copy(own / "single.csv", tmp_path / folder)
    with open(tmp_path / "other" / "single.csv", "a") as file:
        file.write("0000,tree\n")
    flags = f"{OWN} --target"
    lines = list_runs(tmp_path, capsys, (f"{flags} single.csv", [], 0.3),
                      (f"{flags} {tmp_path}/same/single.csv --seed 1", [], 0.4),
                      (f"{flags} {tmp_path}/other/single.csv --seed 1", [], 0.9))
    assert len(lines) == 2 and sum("seeds: 2" in line for line in lines) == 1
    assert all("single.csv (" in line for line in lines)


def test_a_table_names_what_it_cannot_read(tmp_path):
    (tmp_path / "results.json").write_text("{")
    is_refused(str(tmp_path), call, finetune, f"--table {tmp_path}")


FEW = "--steps 2 --tsne-dims 8 --pairs 2"
def explained(run, flags):
    call(explain, f"--checkpoint {run}/checkpoint.pt {flags}")


@pytest.fixture(scope="session")
def explanation(runs, tmp_path_factory):
    """The folder of all pictures of the first run, beside the one without unique dimensions."""
    out = tmp_path_factory.mktemp("explained")
    other = runs / "nodecoup-1" / "checkpoint.pt"
    explained(runs / "decur-0", f"--compare {other} {FEW} --out {out}")
    return out


def altered(runs, folder, parts={}, **settings):
    """A copy of the first run's checkpoint in the folder, with other parts or settings."""
    checkpoint = torch.load(runs / "decur-0" / "checkpoint.pt", weights_only=True)
    checkpoint["settings"].update(settings)
    torch.save(checkpoint | parts, folder / "checkpoint.pt")
    return folder


def explained_branch():
    """Ten images, a branch in evaluation mode, and its two values as Sec. 7 prepares them."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(True),
                      nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(inplace=True),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 6))
    f(torch.randn(32, 2, 8, 8))
    f = f.eval().requires_grad_(False).double()
    x = torch.randn(10, 2, 8, 8, dtype=torch.float64)
    return x, f, explain.TwoValues(f, f(x), 4, f[3])


# ---- Algorithm 2 ----

def test_alignment_losses_are_those_of_the_diagonal_of_C():
    """(on_diag(C) - 1)^2 of Algorithm 1's C.  By hand, Eq. 7 of C_ii = 1, 0, -1: 4 is the most."""
    z1, z2 = plain_views(16, 5)[:2]
    C = BN(z1).T @ BN(z2) / 16
    assert torch.allclose(explain.alignment_histogram(z1, z2)[0], (on_diag(C) - 1).pow(2))
    a, b = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    z1, z2 = torch.stack((a, a, a), 1), torch.stack((a, b, -a), 1)
    losses, counts = explain.alignment_histogram(z1, z2, bins=2)        # Algorithm 2's: up to 1
    assert torch.allclose(losses, torch.tensor([0.0, 1, 4]), atol=1e-4)
    assert counts.tolist() == [1, 1]
    assert explain.alignment_histogram(z1, z2, bins=4, top=4)[1].tolist() == [1, 1, 0, 1]


def test_tsne_lays_aligned_dimensions_together_and_unique_ones_apart():
    torch.manual_seed(0)
    common, shared1, shared2 = torch.randn(64, 12), torch.randn(64, 1), torch.randn(64, 1)
    z1, z2 = (torch.cat((common + 0.05 * torch.randn(64, 12), shared + 0.5 * torch.randn(64, 8)), 1)
              for shared in (shared1, shared2))
    y, kl = explain.tsne_vis(z1, z2)
    nearest = explain.square_distances(y).fill_diagonal_(torch.inf).argmin(1)
    assert y.shape == (40, 2) and 0 < kl < 1
    assert nearest[:12].tolist() == list(range(20, 32))
    assert nearest[20:32].tolist() == list(range(12))
    assert all(12 <= i < 20 for i in nearest[12:20])
    assert all(32 <= i < 40 for i in nearest[32:])


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
    dead = lambda x: torch.stack([half.mean(1) for half in BN(f(x)).split((4, 2), 1)], 1)
    for saliency in (lambda net: explain.gradcam(net, f[3], x, 0),
                     lambda net: explain.integrated_gradients(net, x)):
        assert saliency(dead).abs().max() < 1e-12 < 1e-4 < saliency(net).abs().max()


def test_gradcam_looks_after_the_last_convolution():
    """Algorithm 2's last_conv2, never a shortcut; for SegFormer the end of its last stage."""
    for backbone, name in (("resnet-toy", "layer4.0.conv2"), ("resnet18", "layer4.1.conv2"),
                           ("resnet50", "layer4.2.conv3"), ("mit_b0", "norm4")):
        with torch.device("meta"):
            modules = explain.find_layers(decur.branch(backbone, 3, ()).E)
        assert list(modules)[-1] == name and not any("downsample" in name for name in modules)


def test_signs_cancel_in_the_mean_but_not_in_the_mean_square():
    """Two dimensions that are x and -x: their mean is 0 whatever x is, the mean square is x^2."""
    f, z = nn.Flatten(), torch.tensor([[1.0], [-1.0]]).expand(2, 4)     # mean 0, biased variance 1
    x = torch.tensor([[3.0, -3, 1, 2]]).view(1, 1, 2, 2)
    means, squares = (explain.TwoValues(f, z, 2, f, square)(x) for square in (False, True))
    assert torch.allclose(means, torch.tensor([[0, 1.5]]), atol=1e-4)
    assert torch.allclose(squares, torch.tensor([[9, 2.5]]), atol=1e-3)


def test_density_by_hand():
    """The map's share on the object over the object's share of the area; NaN if there is none."""
    att = torch.tensor([[[3.0, 0], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]])
    mask = torch.tensor([[[1.0, 0], [0, 0]], [[1, 0.5], [0, 0]], [[1, 0], [0, 0]], [[0, 0.0]] * 2])
    density = explain.measure_density(att, mask)
    assert torch.allclose(density[:2], torch.tensor([0.75 / 0.25, 1]))
    assert density[2:].isnan().all()


def test_overlap_scores_by_hand(monkeypatch):
    """log10 of the positive parts, min-max of each, mean of the product; of maps that are x, -x."""
    monkeypatch.setattr(explain, "gradcam_vis",
                        lambda net, x, relu: (x[:, 0].relu(), (-x[:, 0]).relu()))
    stat = partial(explain.gradcam_stat, None, None)
    left = torch.tensor([[[[-3.0, 0], [1, 100]]], [[[-1.0, -1], [-1, -1]]], [[[5.0, 5], [5, 5]]]])
    right = torch.tensor([[[[1.0, 10], [10, 1000]]]]).expand(3, 1, 2, 2)
    a = (0 + 20) / 22                           # left: log10 is -20, -20, 0, 2; right: 0, 1, 1, 3
    assert torch.allclose(explain.norm(left[:1, 0].relu()), torch.tensor([[[0, 0], [a, 1]]]))
    assert torch.allclose(explain.norm(right[:1, 0]), torch.tensor([[[0, 1 / 3], [1 / 3, 1]]]))
    mul_c, mul_u = stat(left, right)
    assert torch.allclose(mul_c, torch.tensor([(a / 3 + 1) / 4, 0, 0]))
    assert mul_u.tolist() == [0, 0, 0]          # -right is nowhere positive
    assert torch.equal(stat(-left, -right)[1], mul_c)
    assert torch.equal(stat(left[:1], right[:1])[0], mul_c[:1])  # other pairs do not count


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

def test_a_share_of_variance_is_what_lies_between_classes_less_chance():
    """By hand, 4 samples of 2 classes, chance 1/3: of 0 0 1 1 all, of 0 1 0 1 nothing.  0 2 2 4 has
    the mean 2 and a total of 8; the classes' means are 1 and 3, so 4 of it lie between them."""
    z = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1], [0, 2, 2, 4], [5, 5, 5, 5]]).T
    shares = explain.variance_shares(z, torch.tensor([3, 3, 7, 7]))
    assert torch.allclose(shares, torch.tensor([2 / 3, 0, 1 / 2 - 1 / 3, 0]).double())


@pytest.mark.parametrize("share, agrees", [(0.2, "yes"), (0.003, "no"), (np.nan, "no")])
def test_an_object_that_no_dimension_holds_is_not_said_to_be_held(share, agrees, capsys):
    # both see, only rgb sees, only depth sees
    common, unique = np.array([0.3, 0.002, 0.002]), np.array([0.01, share, 0.002])
    found = {("run", 0, "common"): common[None], ("run", 1, "common"): common[None],
             ("run", 0, "unique"): unique[None], ("run", 1, "unique"): unique[[0, 2, 1]][None]}
    line, = explain.compare_objects("shares", found, ("rgb", "depth"), limit=2)
    assert line.endswith(f"Agrees: {agrees}.")
    assert "| run, unique | 0.010 |" in capsys.readouterr().out


def test_retrieval_counts_the_partners_among_the_1_and_5_nearest():
    """Near is a large cosine after BN, so scales do not count; a tie is lost."""
    z1, z2 = plain_views(20, 4)[:2]
    shares = torch.zeros(2)
    for i, row in enumerate(torch.cosine_similarity(BN(z1)[:, None], BN(z2)[None], dim=2)):
        rank = sorted(row.tolist(), reverse=True).index(row[i])
        shares += torch.tensor([rank < 1, rank < 5]) / 20
    assert 0.1 < shares[0] < shares[1] < 0.9
    assert explain.retrieve(z1, 7 * z2 + 5) == pytest.approx(shares.tolist())
    assert explain.retrieve(z1, torch.ones_like(z2)) == [0, 0]


def test_a_linear_probe_reads_what_is_linear_and_nothing_else():
    torch.manual_seed(0)
    x, noise = torch.randn(400, 6), torch.randint(4, (400,))
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0)
    assert explain.linear_probe(x[:300], y[:300], x[300:], y[300:]) > 0.9
    assert explain.linear_probe(x[:300], noise[:300], x[300:], noise[300:]) < 0.45


# ---- explain.py as a program ----

def test_explain_makes_every_picture_and_its_numbers(explanation):
    shapes = {"alignment common": (3, 24), "alignment compared": (3, 32), "tsne points": (3, 16, 2),
              "gradcam modality2_unique": (2, 32, 32), "spatial common": (48,),
              "gradcam modality1_common_density": (48, 3), "spectral modality1_common": (48, 3),
              "factors this run rgb unique": (1, 3), "factors random encoder rgb backbone": (1, 3),
              "curves step": (48,)}
    assert {words.split()[0] for words in shapes} == set(explain.PICTURES) - {"embeddings"}
    for words, shape in shapes.items():
        picture, key = words.split(maxsplit=1)
        assert np.load(explanation / f"{picture}.npz")[key].shape == shape, words
        page = np.array(Image.open(explanation / f"{picture}.png"))
        page[8:-8, 8:-8] = 255
        assert page.shape[1] <= 1000 and (page == 255).all()            # nothing runs over the page


def test_explain_leaves_out_unique_dimensions_that_a_run_does_not_have(runs, tmp_path,
                                                                       monkeypatch):
    pages = watched(monkeypatch, explain, "start_page")
    explained(runs / "nodecoup-1", f"--steps 2 --tsne-dims 8 --only spatial spectral tsne "
                                   f"--out {tmp_path}")
    assert list(np.load(tmp_path / "spatial.npz")) == ["common"]
    assert len(pages) == 3 and not re.search("unique'|, unique", str([page[5] for page in pages]))
    common = np.load(tmp_path / "spectral.npz")["modality1_common"]
    assert np.isfinite(common).all() and common.any()


def test_what_explain_measures_is_the_same_whatever_the_batch_size(explanation, runs, tmp_path):
    names = "alignment gradcam spatial spectral"
    explained(runs / "decur-0", f"--steps 2 --pairs 2 --only {names} --batch-size 5 "
                                f"--out {tmp_path}")
    for name in names.split():
        a, b = (np.load(folder / f"{name}.npz") for folder in (explanation, tmp_path))
        assert all(np.allclose(a[key], b[key], atol=1e-3, equal_nan=True) for key in b)


@pytest.mark.parametrize("N, batches", [(4, 4), (16, 3)])
def test_by_default_there_are_four_batches_if_the_data_allow(N, batches, runs, tmp_path, capsys):
    """Fig. 8 and 9 have four: of 48 pairs with N 4, with N 16 there are but three.  A checkpoint
    that was moved alone knows its data, and lacks its log."""
    explained(altered(runs, tmp_path, batch_size=N), "--only curves alignment")
    assert "curves.png is left out" in capsys.readouterr().out
    assert np.load(tmp_path / "explain" / "alignment.npz")["common"].shape == (batches, 24)


def test_embeddings_are_for_programs_of_ones_own(runs, scenes, tmp_path, capsys):
    """In one order, with no picture; retrieval is printed beside chance."""
    explained(runs / "decur-0", f"--only embeddings --batch-size 5 --out {tmp_path}")
    e = np.load(tmp_path / "embeddings.npz")
    assert os.listdir(tmp_path) == ["embeddings.npz"] and e["Kc"] == 24
    net, settings = explain.open_net(runs / "decur-0" / "checkpoint.pt", torch.device("cpu"))
    rooms = explain.open_explained_data(settings, [str(scenes)], "train")
    i = rooms.ids.index(e["names"][5])
    x = data.resize_and_normalise(rooms[i][1][0][None], rooms.inputs[1], 32)
    assert np.allclose(net.f2(x).numpy()[0], e["z2"][5], atol=1e-4)
    assert np.allclose(net.f2.E(x).numpy()[0], e["features2"][5], atol=1e-4)
    R1, R5 = explain.retrieve(*(torch.from_numpy(e[name][:, :24]) for name in ("z1", "z2")))
    printed = capsys.readouterr().out
    assert f"R@1 {R1:.4f}, R@5 {R5:.4f}" in printed
    assert f"R@1 {1 / 48:.4f}, R@5 {5 / 48:.4f}" in printed


def test_without_common_dimensions_retrieval_is_by_unique_dimensions(runs, tmp_path, capsys):
    explained(altered(runs, tmp_path, Kc=0), f"--only embeddings --out {tmp_path}")
    e, printed = np.load(tmp_path / "embeddings.npz"), capsys.readouterr().out
    R1, R5 = explain.retrieve(*(torch.from_numpy(e[name]) for name in ("z1", "z2")))
    assert "by unique dimensions" in printed and f"R@1 {R1:.4f}, R@5 {R5:.4f}" in printed


def test_shares_of_factors_are_means_over_common_and_unique_dimensions_of_test_scenes(
        runs, scenes, tmp_path, capsys):
    for flags in ("--only factors --seed 7", "--only embeddings --split test"):
        explained(runs / "decur-0", f"{flags} --out {tmp_path}")
    assert "this run, seed 0" in capsys.readouterr().out
    numbers, e = (np.load(tmp_path / f"{name}.npz") for name in ("factors", "embeddings"))
    factors = data.read_factors(scenes)
    classes = torch.tensor([factors[name][2] for name in e["names"]])   # what depth alone sees
    shares = explain.variance_shares(torch.from_numpy(e["z2"]), classes)
    assert len(classes) == 16
    assert np.isclose(numbers["this run depth common"][0, 2], shares[:24].mean(), atol=1e-5)
    assert np.isclose(numbers["this run depth unique"][0, 2], shares[24:].mean(), atol=1e-5)


def write_stripes(root, n=256, S=16):
    """Pairs of 2 bands: band 1 has the same texture in both sensors, band 2 each sensor's own.
    Returns the three textures of each pair, nx3.  All textures have the same values."""
    rng = np.random.default_rng(0)
    textures = rng.integers(4, size=(n, 3))
    for m in (1, 2):
        (root / str(m)).mkdir()
        for i, (common, *own) in enumerate(textures):
            y, x = np.mgrid[:S, :S] + rng.integers(4, size=(2, 1, 1))
            waves = np.stack([y, x, y + x, (y // 2 * 2) ^ (x // 2 * 2)], -1) % 4 < 2
            bands = np.where(waves[..., [common, own[m - 1]]], 1, -1) * (40, 80)
            bands = 128 + bands + rng.normal(0, 20, bands.shape)
            np.save(root / str(m) / f"{i:03d}.npy", bands.clip(0, 255).astype(np.uint8))
    return torch.from_numpy(textures)


def test_decur_keeps_what_one_sensor_alone_sees_and_barlow_twins_loses_it(tmp_path):
    """The paper's point, by the command lines.  Over four seeds, the mean share was 0.17 to 0.27
    with DeCUR, and 0.03 or less with Barlow Twins and without intra-modal terms.  DeCUR's unique
    dimensions had 2 to 10 times the share of its common ones."""
    textures, kept = write_stripes(tmp_path), {}
    for method, flags in (("decur", "--common 0.5"), ("barlowtwins", "")):
        out = tmp_path / method
        call(pretrain, f"--scenario custom --data1 {tmp_path}/1 --data2 {tmp_path}/2 --as1 overhead"
                       f" --as2 overhead --backbone resnet-toy --size 16 --projector 64-64 {flags}"
                       f" --batch-size 32 --lr 1 --epochs 20 --method {method} --out {out}")
        explained(out, f"--only embeddings --out {out}")
        e = np.load(out / "embeddings.npz")
        classes = textures[e["names"].astype(int)]
        shares = [explain.variance_shares(torch.from_numpy(e[f"z{m}"]), classes[:, m])
                  for m in (1, 2)]
        kept[method] = sum(shares) / 2                                  # K
    common, unique = kept["decur"].split(32)
    assert kept["decur"].mean() > max(0.1, 4 * kept["barlowtwins"].mean())
    assert unique.mean() > 1.5 * common.mean()


def test_a_caption_names_the_bands_of_a_composite():
    own = dict(name="photo", bands=[f"channel {c}" for c in (1, 2, 3, 4)])
    composites = [(MODALITIES["ms"], "B4 B3 B2"), (own, "channel 1 channel 2 channel 3")]
    assert all(bands in data.name_composite(row) for row, bands in composites)
    assert data.name_composite(MODALITIES["rgb"]) == ""


@pytest.mark.parametrize("lower, other, agrees", [
    (0.99, 1, "yes"), (1, 1, "no"), (1, 0.99, "no"), (math.nan, 1, "no"), (1, math.nan, "no")])
def test_a_claim_agrees_if_the_number_that_should_be_lower_is_lower(lower, other, agrees):
    line = explain.claim("a is below b", dict(b=other, a=lower), "a")
    assert line.endswith(f"Measured: b {other:.3g}, a {lower:.3g}. Agrees: {agrees}.")


def test_the_last_line_of_a_step_counts(tmp_path):
    """A run that was stopped after its last save has logged steps that it repeats."""
    lines = [{"step": 1, "loss": 9}, {"step": 2, "loss": 8}, {"step": 2, "loss": 7},
             {"step": 3, "loss": 6}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert explain.read_log(tmp_path / "log.jsonl") == dict(step=[1, 2, 3], loss=[9, 7, 6])


def test_a_sweep_is_over_seeds_and_folders(runs, scenes, tmp_path, capsys):
    names = [runs / "decur-0", runs / "decur-s1", runs / "nodecoup-1"]
    call(pretrain, flags_of(scenes, names[1], "--seed 1 --epochs 16"))
    capsys.readouterr()
    call(explain, f"--sweep {' '.join(map(str, names))} --out {tmp_path}")
    lines = re.findall(r"^\| .*\|$", capsys.readouterr().out, re.M)
    assert [line.split(" | ")[0] for line in lines[1:]] == [
        "| decur, common", "| decur, unique", "| decur, backbone", "| nodecoup, common",
        "| nodecoup, backbone", "| random encoder, backbone"]
    assert re.search(r"(\| 0\.\d{3}±0\.\d{3} ){6}\|$", lines[1])
    numbers = np.load(tmp_path / "sweep.npz")
    assert numbers["decur rgb unique"].shape == (2, 3) and "nodecoup rgb unique" not in numbers


def test_a_sweep_takes_no_mean_over_runs_that_differ_in_more_than_their_seeds(runs, tmp_path):
    shutil.copytree(runs / "nodecoup-1", tmp_path / "decur-1")
    is_refused("/decur-1: common is 1.0, but 0.75 in .*/decur-0.* Rename", call, explain,
               f"--sweep {runs}/decur-0 {tmp_path}/decur-1 --out {tmp_path}/out")
    altered(runs, tmp_path / "decur-1", batch_size=8, seed=1)
    is_refused("batch_size is 8, but 16", call, explain,
               f"--sweep {runs}/decur-0 {tmp_path}/decur-1 --out {tmp_path}/out")
    is_refused("Give each run once", call, explain, f"--sweep {runs}/decur-0 {runs}/decur-0")


def test_explain_knows_ones_own_pairs_by_folder_or_pattern(runs, own, tmp_path, monkeypatch):
    bars = watched(monkeypatch, explain, "draw_grouped_bars")
    explained(runs / "own", f"--only spectral --steps 2 --out {tmp_path}")
    assert bars[1][3] == ["1"]                  # "channel 1" is too wide if there are many bands
    numbers = np.load(tmp_path / "spectral.npz")
    assert numbers["modality1_common"].shape == (64, 3)
    explained(runs / "own", f"--data './*1_rgb.png' './*1_depth.png' --only embeddings "
                            f"--out {tmp_path}")
    names = np.load(tmp_path / "embeddings.npz")["names"]
    assert sorted(names) == ["000", "001", "002", "003"]            # of 0001, 0011, 0021, 0031
    checkpoint = torch.load(runs / "own" / "checkpoint.pt", weights_only=True)
    checkpoint["settings"]["split"] = "train"   # a list that does not name these images
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    four = "--data './*1_rgb.png' './*1_depth.png'"
    explained(tmp_path, f"{four} --only embeddings")
    is_refused("4 pairs.* 8 or more", explained, tmp_path, f"{four} --only tsne")


def test_photos_of_several_sizes_become_one_size_in_every_script(tmp_path):
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (H, 60, 3)).astype(np.uint8) for H in (40, 48)]
    where = [str(save_arrays(tmp_path / name, *photos)) for name in "ab"]
    settings = dict(scenario="custom", size=16, depth_unit=None, seed=0, modalities=["rgb", "rgb"],
                    channels=[3, 3], inputs=[MODALITIES["rgb"], MODALITIES["rgb"]])
    (tmp_path / "table.csv").write_text("0,a\n1,b\n")
    args, _ = finetune.get_args(f"--task custom --data1 {where[0]} --data2 {where[1]} --as1 rgb "
                                f"--as2 rgb --target {tmp_path}/table.csv --size 16 "
                                f"--weights none".split())
    for opened in (explain.open_explained_data(settings, where, "all"),
                   finetune.open_own_pairs(args)[0]):
        assert opened[0][0][0].shape == opened[1][0][0].shape


@pytest.mark.parametrize("flags", ["--sweep {run} --seed 1", "--sweep {run} --only alignment",
                                   "--checkpoint {run}/checkpoint.pt --only tsne --pairs 2"])
def test_explain_refuses_flags_without_effect(flags, runs):
    is_refused("no effect", call, explain, flags.format(run=runs / "decur-0"))


@pytest.mark.parametrize("changes, flags, words", (
    (dict(parts=dict(settings=dict(task="sunrgbd", lr=1.0))), "", "checkpoint.pt"),  # finetune.py's
    (dict(widths=[64, 64]), "", "checkpoint.pt"),
    (dict(modality=2), "", "checkpoint.pt is a run with --modality 2"),
    (dict(size=16), "--compare {run}/checkpoint.pt", "checkpoint.pt: size is 32, but 16"),
    (dict(inputs=[MEASURED, MODALITIES["depth"]]),
     "--checkpoint {run}/checkpoint.pt --compare {here}/checkpoint.pt", "--compare .* 2 2 2"),
    (dict(), "--checkpoint {run}/nowhere.pt", "nowhere.pt"),
    (dict(), "--samples 49", "--samples 49 .* 48"),
    (dict(), "--layer layer5", "--layer layer5: .* conv1 .* layer4.0.conv2")))
def test_explain_refuses_what_it_cannot_explain(changes, flags, words, runs, tmp_path):
    altered(runs, tmp_path, **changes)
    flags = flags.format(run=runs / "decur-0", here=tmp_path)
    is_refused(words, explained, tmp_path, flags)


# ---- README.md ----

def test_readme_commands_parse():
    readme = (HERE / "README.md").read_text()
    commands = re.findall(r"(?:^|`)(?:python|torchrun(?: --\S+)*) ([^`\n]+)", readme, re.M)
    assert len(commands) >= 20
    programs = {f"{module.__name__}.py": module for module in (data, explain, finetune, pretrain)}
    for line in commands:
        script, *flags = shlex.split(line.split("#")[0])
        assert script in programs or script in ("-m", "decur.py"), line
        if script in programs and flags:
            programs[script].get_args(flags)


def test_readme_names_what_exists():
    readme = (HERE / "README.md").read_text()
    names = re.findall(r"`(decur|data|pretrain|finetune|explain)\.(?!py\b)(\w+)", readme)
    assert len(names) > 30
    for module, name in names:
        assert hasattr(globals()[module], name), f"{module}.{name}"


# ---- GPUs, without one ----

class NoWaits(TorchDispatchMode):
    """Refuses what would make the CPU wait for the GPU.  Works within a FakeTensorMode, where
    tensors on "cuda" are fake: they have a shape, a type and a device, but no values.

    Torch itself raises where devices are mixed, and where the values of a fake tensor are asked
    for, as by .item().  Added here: blocking copies, and masks as indices (their size is a value).
    Tensors on the CPU stay real."""

    def __torch_dispatch__(self, function, types, args=(), settings=None):
        settings = settings or {}
        leaves = tree_leaves((args, settings))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        devices |= {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        if "cuda" not in devices:
            with unset_fake_temporarily():
                return function(*args, **settings)
        name = str(function)
        if len(devices) > 1 and "copy" in name:
            to_gpu = tensors[-1].device.type == "cpu"
            assert to_gpu and (settings.get("non_blocking") or args[2:]), f"{name} waits"
        if "index_put" in name:
            assert all(tensor.dtype != torch.bool for tensor in tensors[1:]), f"{name} waits"
        return function(*args, **settings)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that has bf16, and no values."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **settings: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    try:
        with fake, NoWaits(), torch.autocast("cuda", torch.bfloat16):
            x = torch.ones(2, 2).to("cuda", non_blocking=True)
            assert (x @ x).dtype == torch.bfloat16
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"torch {torch.__version__} has no fake tensors on cuda: {error}")
    with fake, NoWaits():
        yield torch.device("cuda", 0)


def one_step(gpu, monkeypatch, args, net, make_optimizer, batch):
    """Returns a stand-in for pretrain.Run that gives one batch.  Its log is Run's own, at a step
    that prints nothing.  The gradients are made up, because autograd needs a driver."""
    run = argparse.Namespace(args=args, device=gpu, world=1, rank=0, draws=drawn(4), losses=[],
                             step=1, steps=10 ** 6,
                             optimizer=make_optimizer(net, args), batches=lambda: [batch])

    def log(loss, *others):
        run.losses.append((loss.dtype, loss.device))
        pretrain.Run.log(run, loss, *others)

    def backward(loss):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)

    run.log = log
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return run


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_augmentations_on_a_gpu_never_wait(name, gpu):
    row = MODALITIES.get(name, MODALITIES["rgb"] | dict(name=name))
    x = data.move_to(torch.zeros(4, len(row["bands"]), 60, 72, dtype=torch.uint8), gpu)
    view = augment(x, row, 48, drawn(4))
    assert (view.device, view.dtype, view.shape[2:]) == (gpu, torch.float32, (48, 48))


@pytest.mark.parametrize("flags", ["", "--backbone mit_b0", "--method simclr"])
def test_a_pretraining_step_on_a_gpu_never_waits(flags, gpu, monkeypatch):
    """A ResNet with LARS, a MiT with AdamW, another method: embeddings in bf16, losses float32."""
    args = pretrain.get_args(shlex.split(f"--scenario rgbd --toy --size 48 {flags}"))[0]
    net, _ = pretrain.make_network(args, (3, 1))
    net.to(gpu, non_blocking=True)
    first = next(net.f1.parameters())
    assert first.is_contiguous(memory_format=torch.channels_last)
    batch = [[torch.zeros(4, C, 60, 72, dtype=torch.uint8)] for C in (3, 1)]
    run = one_step(gpu, monkeypatch, args, net, pretrain.make_optimizer, batch)

    def model(*views):
        z = net(*views)
        assert {z_.dtype for z_ in z if z_ is not None} == {torch.bfloat16}
        return z

    augment1, augment2 = [partial(augment, row=MODALITIES[name], size=48, draws=run.draws)
                          for name in ("rgb", "depth")]
    pretrain.pretrain(run, model, augment1, augment2, 24)
    assert run.losses == [(torch.float32, gpu)]


@pytest.mark.parametrize("model", ["late", "fcn", "cmx"])
def test_a_transfer_step_on_a_gpu_never_waits(model, gpu, monkeypatch):
    args = finetune.get_args(shlex.split(f"--task sunrgbd --toy --model {model} --weights none"))[0]
    encoders = [decur.resnet("resnet-toy", 3) for _ in range(2)]
    target = torch.zeros(4, 64, 80, dtype=torch.int64)
    net = finetune.FCN(encoders, 5)
    if model == "late":
        net = finetune.LateFusion(encoders, [E.dims[-1] for E in encoders], 5)
        target = torch.zeros(4, 5)
    if model == "cmx":
        net = finetune.CMX("mit_b0", 5, (3, 3), 32)
    batch = [torch.zeros(4, 3, 64, 80, dtype=torch.uint8)] * 2 + [target]
    finetune.move_net(net, gpu)
    first = next(net.encoders[0].parameters())
    assert first.is_contiguous(memory_format=torch.channels_last)
    run = one_step(gpu, monkeypatch, args, net, finetune.make_transfer_optimizer, batch)

    def classify(*x):
        assert torch.is_autocast_enabled("cuda") == (model != "cmx")
        return net(*x)

    finetune.train(run, net, classify, args, [MODALITIES["rgb"], MODALITIES["hha"]])
    assert run.losses == [(torch.float32, gpu)]
