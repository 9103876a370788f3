"""Pretrains DeCUR: Algorithm 1, with the settings of Sec. 4 and App. B as defaults.

    python pretrain.py --scenario rgbd --toy                     made-up scenes, minutes on a CPU
    python pretrain.py --scenario rgbd                           CPU, MPS or one GPU; data/rgbd
    torchrun --nproc_per_node=4 pretrain.py --scenario rgbd      many GPUs (paper: 4 A100, 6 hours)
    python pretrain.py --scenario rgbd --method barlowtwins      what DeCUR is compared with

Writes into --out: checkpoint.pt (all that --resume needs), encoder1.pth and encoder2.pth (names of
torchvision or SegFormer, no classifier) with a .json beside each that says what it wants to see,
log.jsonl, args.json (the settings).
"""
import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (AUGMENTATIONS, BadInput, Draws, OnePattern, Samples, augment,
                  move_views, choose_workers, epoch_batches, expand_path, run_main, find_warnings,
                  leave_group, make_toy, mix_seeds, need, number, open_dataset, read_json, reading,
                  write_atomically, write_text)
from decur import (MITS, RESNETS, DeCUR, barlow_twins_loss, bounds, clip_loss, decur_loss,
                   decur_loss_gram, diagonals, load_encoder, read_weights, simclr_loss, vicreg_loss)

SCENARIOS = {                                   # Sec. 4, Model architecture | Optimization
    "sar-optical": dict(common=0.875, epochs=100, batch_size=256),
    "rgb-dem": dict(common=0.75, epochs=100, batch_size=256, split="train"),
    "rgbd": dict(common=0.75, epochs=200, batch_size=128),
    "custom": dict(common=0.8, epochs=100, batch_size=256),  # 80 %: Sec. 6's "general percentage"
}
ALL = dict(size=224, backbone="resnet50", projector="8192-8192-8192")  # Sec. 4
LARS_RATES = dict(lr=0.2, lr_bias=0.0048, weight_decay=1e-6)  # App. B; not scaled with the batch
# Of segformers; App. B does not say the decay.  None on biases and norms.
ADAMW = [(dict(lr=1e-4, lr_bias=1e-4), "paper, App. B"), (dict(weight_decay=0.01), "as CMX")]
# Tables 1-3, what DeCUR is compared with: none has unique dimensions; projectors of their own.
LOSSES = dict(barlowtwins=barlow_twins_loss, vicreg=vicreg_loss, simclr=simclr_loss, clip=clip_loss)
METHODS = {
    "decur": dict(),
    "barlowtwins": dict(common=1.0),            # -SAR and -RGB with --modality
    "vicreg": dict(common=1.0),
    "simclr": dict(common=1.0, projector="2048-128"),  # SimCLR, Sec. 2.3
    "clip": dict(common=1.0, projector="1024"),  # CLIP, Sec. 2.3 and Table 19
}
# --toy: small enough for two CPU cores.  LARS moves a weight by about lr / 100 of its norm a step
# (eta / (1 - momentum) is 1 / 100): a thousand steps want more than the paper's tens of thousands.
# K is above N, as in the paper, but not far: the scenes share few features, and k dimensions that
# agree on r of them end at a diagonal of 1 / (1 + lambda (k / r - 1)).
TOY = dict(size=32, backbone="resnet-toy", projector="256-256-512", batch_size=128, lr=2.0,
           split="train")
TOY_EPOCHS = {"rgbd": 30, "rgb-dem": 60, "sar-optical": 120}  # with fewer, probes miss factors
REST = dict(split="all", depth_unit=1000.0, seed=0, save_every=10.0)


def pretrain(run, model, augment1, augment2, Kc):
    """Algorithm 1.  Learning rates, log, checkpoints and --resume are `Run`'s, below."""
    for x1, x2 in run.batches():                                    # load a batch of pairs
        # a batch for each view: two seasons, or the same twice
        x1, x2 = move_views(x1, run.device), move_views(x2, run.device)
        # two augmented views for each modality
        x11, x12 = augment1(x1[0]), augment1(x1[1])                 # nxC1xSxS, n of this process
        x21, x22 = augment2(x2[0]), augment2(x2[1])                 # nxC2xSxS
        # compute embeddings and normalize: BN is in the losses
        with mixed_precision(run.device):
            z11, z12, z21, z22 = model(x11, x12, x21, x22)          # nxK
        z11, z12, z21, z22 = map(gather, (z11, z12, z21, z22))      # NxK, the global batch, float32
        # cross-correlation matrices, calculate losses: Eq. 1-6, or a row of Tables 1-3
        loss, terms = compute_loss(run.args, Kc, z11, z12, z21, z22)
        # optimization
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.log(loss.detach(), terms, partial(measure_embeddings, run.args, Kc, z11, z12, z21, z22))


def compute_loss(args, Kc, z11, z12, z21, z22):
    """The loss of --method, and DeCUR's terms.  z: NxK; None for a view that is not encoded."""
    if args.method == "decur":
        N, K = z11.shape
        form = decur_loss_gram if 3 * N <= 2 * K else decur_loss    # equal; the cheaper of the two
        return form(z11, z12, z21, z22, Kc, intra=not args.no_intra)
    zA, zB = [z for z in (z11, z12, z21, z22) if z is not None]     # z11, z21; one modality: both
    return LOSSES[args.method](zA, zB), {}


def measure_embeddings(args, Kc, z11, z12, z21, z22):
    """For the log: DeCUR's mean diagonals, and the mean standard deviation of each embedding."""
    numbers = diagonals(z11, z12, z21, z22, Kc) if args.method == "decur" else {}
    for name, z in (("std1", z11), ("std2", z21)):
        if z is not None:
            numbers[name] = z.std(0).mean()
    return numbers


def choose_views(args):
    """Which of x11 x12 x21 x22 are encoded.  All four are made: each method sees the same."""
    if args.modality:                           # two views of one modality
        return [args.modality == 1, args.modality == 1, args.modality == 2, args.modality == 2]
    if args.method == "decur" and not args.no_intra:
        return [True, True, True, True]
    return [True, False, True, False]           # the second views stand in intra-modal terms alone


# ---- optimisation, App. B ----

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017) with momentum, as in Barlow Twins.

    groups: parameters, or groups of them that may have an lr of their own.  Those of fewer than two
    dimensions (biases, batch norm) take a plain momentum step: no weight decay, no adaptation.  A
    step uses the gradients up: they are scaled in place."""

    def __init__(self, groups, lr=0.2, weight_decay=1e-6, momentum=0.9, eta=0.001):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.ndim > 1:                  # in place: memory bounds the speed
                    g.add_(p, alpha=group["weight_decay"])
                    p_norm, g_norm = p.norm(), g.norm()
                    trust = group["eta"] * p_norm / g_norm
                    g.mul_(torch.where((p_norm > 0) & (g_norm > 0), trust, 1))  # norm 0 moves, too
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                m = self.state[p]["momentum"].mul_(group["momentum"]).add_(g)
                p.sub_(m, alpha=group["lr"])


def cosine(step, steps):
    """Decay from 1 at step 0 to 0 at step `steps`, no warm-up (App. B)."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def make_optimizer(net, args):
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]           # biases and norms
    groups = [dict(params=weights, lr=args.lr, weight_decay=args.weight_decay),
              dict(params=others, lr=args.lr_bias, weight_decay=0)]
    if args.backbone in MITS:
        return torch.optim.AdamW(groups)
    return LARS(groups)


def main(argv=None):
    args, sources = get_args(argv)
    rank, world, device = process = read_environment()
    checkpoint = find_checkpoint(args.out, args.resume)             # or None
    step = checkpoint["step"] if checkpoint else 0

    # ---- data; the loader's workers start before the processes meet ----
    if args.toy:
        make_toy(args.scenario, args.data, rank=rank)
    data = open_pretraining_data(args, checkpoint)
    check_batch(args.batch_size, len(data), world, least=2)
    steps_per_epoch = len(data) // args.batch_size
    steps = args.epochs * steps_per_epoch
    loader = make_loader(args, data, np.arange(len(data)), step, steps, process)
    join(args.out, step, process)

    # ---- model and optimizer ----
    channels = [views[0].shape[0] for views in data[0]]
    torch.manual_seed(args.seed)
    net = DeCUR(args.backbone, *channels, args.widths, choose_views(args))
    net.to(memory_format=torch.channels_last)
    branches = [f for f in (net.f1, net.f2) if f is not None]
    encoded = [row for row, f in zip(data.inputs, (net.f1, net.f2)) if f is not None]
    K = args.widths[-1] if args.widths else branches[0].E.dims[-1]
    Kc = round(args.common * K)
    lines = describe_run(args, data, net, Kc, K)
    if args.weights and not checkpoint:
        lines += start_from(args.weights, [f.E for f in branches], args, encoded)
    model = distribute(net, world, device)
    optimizer = make_optimizer(net, args)
    settings = collect_settings(
        args, K=K, Kc=Kc, pairs=len(data), modalities=list(data.modalities), channels=channels,
        inputs=list(data.inputs))
    if checkpoint:
        restore(checkpoint, args.out, net, optimizer, settings, MORE_EPOCHS)

    # ---- run ----
    if rank == 0:
        make_run_folder(args, settings, process)
    run = Run(args, settings, net, optimizer, loader, step, steps, steps_per_epoch, cosine, process)
    run.introduce(sources, lines, find_warnings(data))
    augment1, augment2 = [partial(augment, row=row, size=args.size, draws=run.draws)
                          for row in data.inputs]
    pretrain(run, model, augment1, augment2, Kc)
    if rank == 0 and not run.stopped:
        for m, (row, f) in enumerate(zip(encoded, branches), args.modality or 1):
            export(args.out / f"encoder{m}.pth", f.E, row, settings)
        run.print(f"wrote checkpoint.pt, the encoders, log.jsonl and args.json into {args.out}")
    if device.type == "cuda":
        run.print(f"peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    leave()
    return 128 + run.stopped if run.stopped else 0  # the exit code of a signal


# ---- a run, here and in finetune.py: what is done before the loop, and what stands around it ----

def find_checkpoint(out, resume):
    """Loads the checkpoint.pt of a run to go on from; returns None if there is none.  Raises
    BadInput if `out` holds a run and `resume` is false."""
    file = out / "checkpoint.pt"
    holds_run = file.exists() or (out / "log.jsonl").exists()
    need(resume or not holds_run, f"--out {out} holds a run. Give a new --out, or go on from that "
         f"run with --resume")
    return load_checkpoint(file) if file.exists() else None


def make_loader(args, data, indices, step, steps, process):
    """Starts the workers.  Returns an iterator of this process's batches, from `step` to `steps`.

    Reads the first batch before --out is made, so that a run that cannot read leaves no folder."""
    rank, world, device = process
    rows = choose_rows(args.batch_size, rank, world)
    loader = iter(DataLoader(
        Samples(data, keep=args.workers == 0), num_workers=args.workers,
        batch_sampler=batch_order(indices, args.batch_size, args.seed, rows, step, steps),
        worker_init_fn=leave_group, pin_memory=device.type == "cuda"))
    first = next(loader, None)                  # None where `step` is the last one
    return chain(iter([first]), loader)         # chain would hold a list to its end


def choose_rows(N, rank, world):
    """Returns the rows of the global batch of N that this process takes, as a slice."""
    return slice(rank * N // world, (rank + 1) * N // world)


def collect_settings(args, **about):
    """Returns what defines a run, for checkpoints: the settings, and `about` its data and model."""
    settings = {name: value for name, value in vars(args).items() if name not in RUN_ONLY}
    return settings | about


def restore(checkpoint, out, net, optimizer, settings, remedy=""):
    """Loads the states of a checkpoint that find_checkpoint(out) found.  Raises BadInput if its
    settings differ from `settings`; remedy: a further thing to do then."""
    file = out / "checkpoint.pt"
    check_equal(settings, checkpoint["settings"], settings, "--resume", f"{file}; give the "
                f"settings of that run, or a new --out{remedy.format(file=file)}")
    base_lr = [group["lr"] for group in optimizer.param_groups]
    with reading(file, "a checkpoint of this run"):
        net.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    for group, lr in zip(optimizer.param_groups, base_lr):
        group["lr"] = lr                        # the checkpoint has that of its last step


def make_run_folder(args, settings, process):
    """Makes --out, with args.json and, unless it is there, log.jsonl."""
    make_folder(args.out)
    try:
        open(args.out / "log.jsonl", "a" if args.resume else "x").close()
    except FileExistsError:
        raise BadInput(f"--out {args.out}: another run has just begun there. Give a new --out")
    _, world, device = process
    record = dict(settings, data=args.data, argv=sys.argv, processes=world, device=str(device),
                  torch=str(torch.__version__))
    write_text(args.out / "args.json", json.dumps(record, indent=1, default=str) + "\n")


class Run:
    """Yields batches, and does around each step what is not Algorithm 1: learning rates, the log,
    checkpoints (every --save-every minutes, at a signal, at the end).

    args               seed, batch_size (the global one), out, resume, save_every
    settings           what checkpoints keep of the run, see `collect_settings`
    loader             an iterator of batches from `step` on, see `make_loader`
    step, steps        the next step, counted from 0; the number of steps of the whole run
    steps_per_epoch    for the log
    rate               rate(step, steps) is the learning rate as a fraction of its base
    process            rank, world and device, see `read_environment`"""

    def __init__(self, args, settings, net, optimizer, loader, step, steps, steps_per_epoch, rate,
                 process):
        self.args, self.settings, self.net, self.optimizer = args, settings, net, optimizer
        self.loader, self.step, self.steps, self.rate = loader, step, steps, rate
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.rank, self.world, self.device = process
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        self.draws = Draws(args.seed, args.batch_size,
                           choose_rows(args.batch_size, self.rank, self.world))
        self.signalled = self.stopped = 0       # or the signal's number
        self.waited = 0.0                       # seconds for batches, since the last line
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    def batches(self):
        """Every batch of this process.  After `yield` stands what follows the caller's step."""
        self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True,
                        disable=self.rank > 0 or None)
        self.saved = self.logged = time.time()
        self.logged_step = self.step
        self.listen(self.stop)
        while self.step < self.steps and not self.stopped:
            start = time.time()
            batch = next(self.loader)
            self.waited += time.time() - start
            self.draws.restart(self.step)                           # the augmentations'
            torch.manual_seed(mix_seeds(self.args.seed, self.step, 1 + self.rank))  # drop path, dropout
            for group, lr in zip(self.optimizer.param_groups, self.base_lr):
                group["lr"] = lr * self.rate(self.step, self.steps)
            yield batch
            self.step += 1
            self.bar.update()
            if self.world == 1 or self.step % 10 == 0:              # all leave at the same step
                self.stopped = max_over_processes(self.signalled, self.device)
            minutes = (time.time() - self.saved) / 60
            if self.stopped or self.step == self.steps or minutes > self.args.save_every:
                self.save()
        self.bar.close()
        self.listen(signal.SIG_DFL)             # all is saved: a signal may end it at once
        if self.stopped:
            self.print(f"stopped after step {self.step} of {self.steps} and saved; "
                       f"to go on, give the same command with --resume")

    def log(self, loss, terms=None, numbers_of=dict):
        """A line every 50 steps; of a short run, about 50.  terms: scalars, the loss is their sum;
        numbers_of(): more.  They, and whether each loss was finite, are looked at only then."""
        self.finite &= loss.isfinite()
        step, every = self.step + 1, min(50, max(1, self.steps // 50))
        if step % every and step not in (1, self.steps):
            return
        line = dict(epoch=self.step // self.steps_per_epoch + 1, step=step, loss=loss.item())
        for name, value in {**(terms or {}), **numbers_of()}.items():
            line[name] = value.item()
        if not self.finite:
            sys.exit(f"the loss is {loss.item()} by step {step} ({format_losses(line)}); what was "
                     f"saved before stays; look at the data, or take a smaller --lr or --lr-bias")
        if self.rank > 0:
            return
        seconds = max(time.time() - self.logged, 1e-9)
        pairs = (step - self.logged_step) * self.args.batch_size
        line |= dict(lr=self.optimizer.param_groups[0]["lr"], pairs_per_s=pairs / seconds,
                     data=self.waited / seconds)
        self.logged, self.logged_step, self.waited = time.time(), step, 0.0
        self.print(f"epoch {line['epoch']:03d} step {step:06d}/{self.steps:06d}  "
                   f"{format_losses(line)}  lr {line['lr']:.4g}  {line['pairs_per_s']:.0f} pairs/s  "
                   f"data {line['data']:.0%}")
        with open(self.args.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def introduce(self, sources, lines, warnings):
        """Prints what runs: the command, each setting with its source, `lines`, the warnings."""
        self.print(" ".join(sys.argv))
        for name, source in sources.items():
            self.print(f"  {name.replace('_', '-'):14s} {getattr(self.args, name)!s:16s} {source}")
        self.print(f"{self.steps} steps on {self.world} x {self.device.type}; torch "
                   f"{torch.__version__}", *lines)
        for warning in warnings:
            self.print(f"warning: {warning}")
        if self.step:
            self.print(f"resumed from {self.args.out} at step {self.step} of {self.steps}")

    def save(self):
        if self.rank > 0:
            return
        if not all(p.isfinite().all() for p in self.net.parameters()):
            sys.exit(f"a weight is not finite after step {self.step}; what was saved before stays; "
                     f"a smaller --lr or --lr-bias may help")
        checkpoint = dict(model=self.net.state_dict(), optimizer=self.optimizer.state_dict(),
                          step=self.step, settings=self.settings, torch=str(torch.__version__))
        write_atomically(self.args.out / "checkpoint.pt", partial(torch.save, checkpoint))
        self.saved = time.time()

    def print(self, *lines):
        """Print on the first process, above the bar.  Where nobody reads any more, stop."""
        if self.rank > 0:
            return
        try:
            for line in lines:
                tqdm.write(line, file=sys.stdout)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")
            self.signalled = 13                 # SIGPIPE, which Windows lacks

    def listen(self, handler):
        """SIGTERM, Ctrl-C, a closed terminal and Slurm's warning end the step and save."""
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            if hasattr(signal, name):           # Windows has two of them
                signal.signal(getattr(signal, name), handler)

    def stop(self, signum, frame):
        self.signalled = signum
        signal.signal(signum, signal.SIG_DFL)   # a second one kills


def batch_order(indices, N, seed, rows, step, steps):
    """This process's `rows` of each batch from `step` on: lists of (epoch, index)."""
    while step < steps:
        epoch, done = divmod(step, len(indices) // N)
        batches = epoch_batches(len(indices), N, seed, epoch)[done:done + steps - step, rows]
        for batch in batches:
            yield [(epoch, i) for i in indices[batch].tolist()]
        step += len(batches)


def check_equal(settings, before, names, flag, where):
    """where: what has the other settings, and the remedy."""
    for name in names:
        words = f"{settings[name]}, but {before.get(name)}"
        if len(words) > 200:                    # statistics of the images
            words = "not what it is"
        need(before.get(name) == settings[name], f"{flag}: {name} is {words} in {where}")


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out} cannot be made ({error.strerror}); give another") from None


def format_losses(line):
    """The loss with its terms, diagonals and standard deviations: what of them a line has."""
    terms = [f"{name} {line[name]:.1f}" for name in ("L1", "L2", "Lc", "Lu") if name in line]
    means = [f"{name} {line[name]:.2f}" for name in ("C1", "C2", "Cc", "Cu") if name in line]
    stds = [f"{line[name]:.2f}" for name in ("std1", "std2") if name in line]
    words = f"loss {line['loss']:.4f}"          # of other methods: SimCLR's is below 7
    if terms:
        words = f"loss {line['loss']:.1f} = {' + '.join(terms)}"
    if means:
        words += f"  diag {' '.join(means)}"
    if stds:
        words += f"  std {' '.join(stds)}"
    return words


# ---- processes ----

class Gather(torch.autograd.Function):
    """nxK of each of W processes -> NxK on each, in the order of ranks; differentiable.

    Each computes the whole loss, so each has the gradient of all N rows; DDP averages over the W:
    one's own rows W times make it exactly that of one process.  (An in-place all_reduce of C,
    outside autograd, gives 1/W of it.)  A sum of rows that are zero elsewhere: gloo documents no
    all_gather for CUDA tensors."""

    @staticmethod
    def forward(ctx, z):
        n = len(z)
        ctx.rows = slice(dist.get_rank() * n, (dist.get_rank() + 1) * n)
        joint = z.new_zeros(dist.get_world_size() * n, *z.shape[1:])  # NxK
        joint[ctx.rows] = z
        dist.all_reduce(joint)
        return joint

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.rows] * dist.get_world_size()


def gather(z):
    """The global batch, NxK, from the processes' nxK, in float32 or float64.  None stays None."""
    if z is None:
        return None
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if dist.is_initialized() and dist.get_world_size() > 1:
        return Gather.apply(z)
    return z


def read_environment():
    """Rank, world size and device of this process, by torchrun's environment; without it, one."""
    numbers = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        need(text.isdecimal(), f"{name}={text} in the environment; expected a number: torchrun's")
        numbers.append(int(text))
    rank, world, local = numbers
    need(rank < world, f"RANK={rank} and WORLD_SIZE={world} in the environment; expected those of "
         f"torchrun, or neither")
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True   # all shapes of a run are fixed
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    return rank, world, device


def join(out, step, process):
    """Connects the processes.  Raises BadInput unless all go on from the same step."""
    rank, world, device = process
    if world > 1 and not dist.is_initialized():
        need("MASTER_ADDR" in os.environ, f"WORLD_SIZE={world}, but there is no MASTER_ADDR in the "
             f"environment. Set all that torchrun sets, or nothing")
        store, _, _ = next(rendezvous("env://"))
        store.set(f"device{rank}", name_device(device))
        devices = [store.get(f"device{other}").decode() for other in range(world)]
        dist.init_process_group(choose_backend(devices), store=store, rank=rank, world_size=world)
    most, least = max_over_processes(step, device), -max_over_processes(-step, device)
    need(most == least, f"--out {out} is at step {most} for one process and at step {least} for "
         f"another. Give an --out that all processes see, such as a shared disk")


def name_device(device):
    """Returns the same name for two processes only if they share a GPU, or have none."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return device.type


def choose_backend(devices):
    """Returns "nccl" if each of the processes' devices is a GPU of its own, otherwise "gloo"."""
    shared = len(set(devices)) < len(devices)
    return "gloo" if shared or "cpu" in devices else "nccl"


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def distribute(net, world, device):
    """net on its device, with synchronised batch norms, and the model that averages gradients."""
    net.to(device)
    if world == 1:
        return net
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif dist.get_rank() == 0:
        print(f"warning: on {world} CPU processes torch cannot synchronise batch normalisation; "
              f"each uses its own samples there (the loss is of all)")
    return DistributedDataParallel(net, gradient_as_bucket_view=True, broadcast_buffers=False)


def mixed_precision(device):
    """Autocast to bf16 on GPUs that have it (Ampere and later); elsewhere nothing is cast."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def max_over_processes(value, device):
    """The largest integer that a process gives, on all of them; 1 if it is True on one."""
    if not dist.is_initialized():
        return int(value)
    value = torch.tensor(int(value), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def sum_over_processes(t):
    """Over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def check_batch(N, n, world, least=1):
    """N: --batch-size, the global one; n: samples; least: that each process has to have."""
    need(N % world == 0, f"--batch-size {N} is not a multiple of {world} processes; "
         f"try {max(least, N // world) * world}")
    need(N // world >= least, f"--batch-size {N} leaves {N // world} sample to each of {world} "
         f"processes, too few for batch normalisation; at least {least * world}")
    need(N <= n, f"--batch-size {N} is more than the {n} samples; at most {n}")


# ---- checkpoints and weights ----

def load_checkpoint(path):
    """Raises BadInput for a file that is truncated, or holds more than tensors and plain values."""
    with reading(path, "a whole checkpoint.pt of tensors and plain values",
                 "give another, or at --resume a new --out"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = [type(checkpoint.get(name)) for name in ("settings", "step")]
        need(kinds == [dict, int], f"{path} is no checkpoint of this project; expected a "
             f"checkpoint.pt that pretrain.py or finetune.py wrote; give another")
        return checkpoint


def read_settings(checkpoint):
    """The settings of a pretraining, and whether it was `stopped` before its end, or None."""
    settings, step = complete(checkpoint["settings"]), checkpoint["step"]
    steps = settings["epochs"] * (settings["pairs"] // settings["batch_size"])
    return settings | dict(stopped=f"at step {step} of {steps}" if step < steps else None)


def complete(settings):
    """The settings of a pretraining, or ValueError: what they lack, or what is of another type."""
    kinds = dict(scenario=str, method=str, backbone=str, widths=list, K=int, Kc=int,
                 modalities=list, channels=list, inputs=list, epochs=int, pairs=int, batch_size=int,
                 size=int, split=str, depth_unit=(int, float), seed=int, common=(int, float),
                 no_intra=bool)
    for name, kind in kinds.items():
        if not isinstance(settings.get(name), kind):
            raise ValueError(f"{name} is {settings.get(name)}")
    return settings


def export(path, E, row, settings):
    """The encoder alone, as plain tensors, and a .json: what it wants to see, how it came to be."""
    state = {name: t.cpu().contiguous() for name, t in E.state_dict().items()}
    write_atomically(path, partial(torch.save, state))
    about = dict(modality=row["name"], input="values in [0, 1], then (x - mean) / std",
                 sees=row, backbone=settings["backbone"],
                 method=settings["method"], sha256=hash_file(path), settings=settings)
    write_text(path.with_suffix(".json"), json.dumps(about, indent=1, default=str))


def hash_file(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def start_from(files, encoders, args, inputs):
    """Load --weights into the encoders, or raise BadInput unless each key fits.  Returns lines."""
    states = []
    try:
        for file in files:
            _, seen = read_pretraining(file)
            need(not (seen and args.bgr), f"--bgr: expected it with weights of others; {file} saw "
                 f"{inputs[0]['bands'][0]} first")
            for m, state in enumerate(read_weights(file, args.backbone)):
                states.append((file, state, seen[m] if m < len(seen) else None))
        if args.modality and len(states) == 2:
            states = [states[args.modality - 1]]
        if files == ["imagenet"]:
            states = states * len(encoders)
        if len(states) != len(encoders):
            raise ValueError(f"encoders: {len(states)}, expected {len(encoders)}; give a file with "
                             f"both, or one for each modality")
        lines = []
        for E, sees, (file, state, seen) in zip(encoders, inputs, states):
            lines.append(f"{file}: {load_encoder(E, state, bgr=args.bgr and E.channels == 3)}")
            if seen and any(seen.get(name) != plain_values(sees[name]) for name in sees):
                lines.append(f"warning: {file} was trained on {describe_input(seen)}; here it sees "
                             f"{describe_input(sees)}")
        return lines
    except (OSError, ValueError) as error:
        raise BadInput(f"--weights {' '.join(files)}: {error}") from None


def read_pretraining(file):
    """Of a weights file of this project: the settings behind it, and a row of MODALITIES for each
    encoder in it, what that was trained on.  {} and [] where they are not known."""
    path, beside = Path(file), Path(file).with_suffix(".json")
    if path.suffix == ".pth" and beside.is_file():
        about = read_json(beside, "what pretrain.py wrote beside an encoder")
        need(about.get("sha256") in (None, hash_file(path)), f"{path} is not the file that "
             f"{beside.name} was written for (another sha256); copy both again")
        with reading(beside, "what pretrain.py wrote beside an encoder"):
            describe_input(about["sees"])
            return complete(about["settings"]), [about["sees"]]
    try:
        settings = read_settings(load_checkpoint(path))
    except (BadInput, ValueError):              # of others; `read_weights` refuses what is damaged
        return {}, []
    return settings, plain_values(settings["inputs"])


def plain_values(value):
    return json.loads(json.dumps(value))        # tuples as lists, as a file has them


def describe_input(row):
    mean = " ".join(f"{x:.4g}" for x in row["mean"])
    std = " ".join(f"{x:.4g}" for x in row["std"])
    return f"{' '.join(row['bands'])} ({row['range']}; mean {mean}, std {std})"


@torch.no_grad()
def measure_statistics(net, batches):
    """Of a random network's batch norms: the mean over the batches, lists of its inputs.  With the
    mean 0 and variance 1 that they start with a ResNet-50's features would be in the thousands."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.momentum = None              # no moving average
    net.train()
    for x in batches:
        net(*x)


# ---- data and command line ----

# N12: what to do instead of --resume with more --epochs.
MORE_EPOCHS = "; to train on from its encoders, give --weights {file} and a new --out"
# May differ at --resume, here and in finetune.py.
RUN_ONLY = ("data", "data1", "data2", "target", "classes", "out", "resume", "save_every", "workers",
            "toy", "save_images", "table", "pretraining")


def open_pretraining_data(args, checkpoint):
    """Opens the data set; a run that goes on keeps the statistics that it measured at its start."""
    custom = {}
    if args.scenario == "custom":
        custom = dict(augment_as=(args.augment1, args.augment2),
                      inputs=checkpoint["settings"]["inputs"] if checkpoint else None)
    return open_dataset(args.scenario, args.data, args.size, args.split, args.depth_unit, args.seed,
                        **custom)


def describe_run(args, data, net, Kc, K):
    """Lines: data, how they are augmented, sizes, the loss by chance and at the least."""
    root = " and ".join(args.data) if isinstance(args.data, list) else args.data
    lines = [f"{len(data)} pairs of {' and '.join(data.modalities)} from {root}"]
    for modality in data.modalities:
        lines.append(f"augmentations of {modality}: {AUGMENTATIONS[modality]}")
    for f in net.children():
        encoder = sum(p.numel() for p in f.E.parameters()) / 1e6
        projector = sum(p.numel() for p in f.P.parameters()) / 1e6
        lines.append(f"parameters: encoder {encoder:.2f} M, projector {projector:.2f} M")
    if args.method == "decur":
        lines.append(f"N {args.batch_size}  K {K}  Kc {Kc}")
        names = "chance (independent embeddings)", "floor (no batch goes below)"
        for words, terms in zip(names, bounds(args.batch_size, K, Kc, not args.no_intra)):
            lines.append(f"  {words:32s} {format_losses(dict(loss=sum(terms.values()), **terms))}")
    return lines


def defaults(scenario, method, backbone, toy):
    """[(settings, their source)]: the first that names a setting is its default."""
    tables = [(METHODS[method], f"--method {method}")]
    if backbone in MITS:
        tables += ADAMW
    if toy:
        tables += [(TOY | dict(epochs=TOY_EPOCHS.get(scenario)), "--toy")]
    return tables + [(SCENARIOS[scenario], "here" if scenario == "custom" else "paper, Sec. 4"),
                     (ALL, "paper, Sec. 4"), (LARS_RATES, "paper, App. B"), (REST, "default")]


def fill_in(args, tables):
    """The first table that names a setting gives its default.  Returns {name: source} to print, and
    {name: value} of what was given otherwise."""
    sources, changed = {}, {}
    for table, source in tables:
        for name, value in table.items():
            if name in sources:
                continue
            given = getattr(args, name, None)
            sources[name] = source if given is None else "command line"
            if given is None:
                setattr(args, name, value)
            elif given != value:
                changed[name] = given
    return sources, changed


def get_args(argv=None):
    """The settings, each resolved to a value and its source.  Returns (args, {name: source})."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="DeCUR pretraining (Algorithm "
                                     "1). A setting that is not given is the paper's.")
    add = parser.add_argument
    add("--scenario", required=True, choices=SCENARIOS, help="two modalities, their settings")
    add("--toy", action="store_true", help="small settings, made-up scenes in data/toy-SCENARIO")
    add = parser.add_argument_group("data").add_argument
    add("--data", type=expand_path, metavar="DIR", help="default: data/SCENARIO")
    for m in (1, 2):
        add(f"--data{m}", metavar="FILES", type=expand_path, nargs="+", action=OnePattern,
            help="with custom: a folder, or a pattern 'chips/*_S1.tif', whose * is a pair's name")
        add(f"--augment{m}", choices=AUGMENTATIONS, help="with custom: augment as this modality")
    add("--split", type=expand_path, help="pairs to use: all, train, test, of custom a file of names; "
        "default: all, rgb-dem and --toy train")
    add("--depth-unit", type=number(float, 1e-3, 1e9), help="depth steps a metre; default: 1000")
    add("--size", type=number(int, 16, 4096), help="crop in pixels; default: 224")
    add("--workers", type=number(int, 0), default=choose_workers(),
        help="that read files; default: on CUDA up to 8, else 0")
    add = parser.add_argument_group("model").add_argument
    add("--method", choices=METHODS, default="decur", help="Tables 1-3; default: decur")
    add("--modality", type=int, choices=(1, 2), help="barlowtwins of two views of this one alone")
    add("--backbone", choices=[*RESNETS, *MITS], help="default: resnet50; a mit trains with AdamW")
    add("--weights", type=expand_path, nargs="+", metavar="FILE", help="of both, of each, or imagenet")
    add("--bgr", action="store_true", help="--weights saw BGR images, as the DeCUR authors' did")
    add("--projector", metavar="WIDTHS", help="widths like 8192-8192-8192, or none (Fig. 3b)")
    add("--common", type=number(float, 0, 1), help="fraction of common dimensions; 1: w/o decoup.")
    add("--no-intra", action="store_true", help="without L1 and L2: w/o intra (Table 4)")
    add = parser.add_argument_group("optimisation and run").add_argument
    add("--epochs", type=number(int, 1), help="default: 100, rgbd 200")
    add("--batch-size", type=number(int, 2), help="the global one; default: 256, rgbd 128")
    add("--lr", type=number(float, 1e-12, 1e6), help="of the weights; default: 0.2, mit 1e-4")
    add("--lr-bias", type=number(float, 1e-12, 1e6), help="of the rest; default: 0.0048, mit 1e-4")
    add("--weight-decay", type=number(float, 0, 1), help="of the weights; default: 1e-6, mit 0.01")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), help="of everything random; default: 0")
    add("--out", type=expand_path, help="default: runs/SCENARIO-METHOD, with --toy runs/toy-...")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--save-every", type=number(float, 1e-6), metavar="MINUTES", help="default: 10")
    args = parser.parse_args(argv)
    sources, _ = fill_in(args, defaults(args.scenario, args.method, args.backbone, args.toy))
    check_flags(args)
    return args, sources


def check_flags(args):
    """What no single flag can tell; and the places."""
    custom, decur, mit = args.scenario == "custom", args.method == "decur", args.backbone in MITS
    need(not custom or args.data1 and args.data2 and not args.data and not args.toy,
         "--scenario custom: expected --data1 and --data2, and neither --data nor --toy")
    for name in ("data1", "data2", "augment1", "augment2"):
        need(custom or not getattr(args, name), f"--{name}: expected it with --scenario custom")
    need(decur or args.common == 1, f"--common {args.common}: expected 1 with --method "
         f"{args.method}, which has no unique dimensions")
    need(decur or not args.no_intra, "--no-intra: expected it with --method decur")
    need(args.method == "barlowtwins" or not args.modality,
         f"--modality {args.modality}: expected it with --method barlowtwins alone")
    need(not args.bgr or args.weights and args.scenario != "sar-optical",
         "--bgr: expected it with --weights for RGB images")
    need(args.size >= 32 or not mit, f"--size {args.size}: expected 32 or more for a mit")
    widths = [] if args.projector == "none" else args.projector.split("-")
    need(all(width.isdecimal() and 0 < int(width) < 10 ** 6 for width in widths),
         f"--projector {args.projector}: expected widths like 8192-8192-8192, or none")
    args.widths = [int(width) for width in widths]
    toy = "toy-" if args.toy else ""
    args.data = [args.data1, args.data2] if custom else args.data or f"data/{toy}{args.scenario}"
    args.out = Path(args.out or f"runs/{toy}{args.scenario}-{args.method}{args.modality or ''}")


if __name__ == "__main__":
    run_main(main)
