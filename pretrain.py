"""Pretrains DeCUR by Algorithm 1.  The defaults are the settings of Sec. 4 and App. B.

    python pretrain.py --scenario rgbd --toy                     made-up scenes, minutes on a CPU
    python pretrain.py --scenario rgbd                           CPU, MPS or one GPU; data/rgbd
    torchrun --nproc_per_node=4 pretrain.py --scenario rgbd      many GPUs (paper: 4 A100, 6 hours)
    python pretrain.py --scenario rgbd --method barlowtwins      a method of Tables 1-3

Writes into --out:
    checkpoint.pt                   all that --resume needs
    encoder1.pth, encoder2.pth      the encoders without projectors; parameters have the names of
                                    torchvision's ResNet or of SegFormer
    encoder1.json, encoder2.json    what each encoder was trained on, and the settings of the run
    log.jsonl                       one line per logged step; if a step has two lines, the later one
                                    counts
    args.json                       the settings, the command line, the machine
"""
import argparse
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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (AUGMENTATIONS, DATA_FLAGS, BadInput, Draws, Samples, add_flags, augment,
                  choose_workers, describe_error, epoch_batches, expand_path, find_warnings,
                  leave_group, make_toy, mix_seeds, move_views, need, number, open_dataset,
                  read_json, reading, run_main, write_atomically, write_text)
from decur import (MITS, RESNETS, DeCUR, barlow_twins_loss, bounds, clip_loss, decur_loss,
                   decur_loss_gram, diagonals, load_encoder, read_weights, simclr_loss, vicreg_loss)

SCENARIOS = {                                   # Sec. 4, Model architecture | Optimization
    "sar-optical": dict(common=0.875, epochs=100, batch_size=256),
    "rgb-dem": dict(common=0.75, epochs=100, batch_size=256, split="train"),
    "rgbd": dict(common=0.75, epochs=200, batch_size=128),
    # Sec. 8: "a general percentage of around 80%"
    "custom": dict(common=0.8, epochs=100, batch_size=256),
}
NETWORK = dict(size=224, backbone="resnet50", projector="8192-8192-8192")  # Sec. 4
LARS_RATES = dict(lr=0.2, lr_bias=0.0048, weight_decay=1e-6)  # App. B; not scaled by batch size
# SegFormers train with AdamW.  App. B gives AdamW's learning rate, but no weight decay.  So the
# weight decay here is CMX's.  Biases and norms have no weight decay.
ADAMW_RATES = [(dict(lr=1e-4, lr_bias=1e-4), "paper, App. B"), (dict(weight_decay=0.01), "as CMX")]
# The methods that Tables 1-3 compare DeCUR with.  They have no unique dimensions.
LOSSES = dict(barlowtwins=barlow_twins_loss, vicreg=vicreg_loss, simclr=simclr_loss, clip=clip_loss)
METHODS = {
    "decur": dict(),
    "barlowtwins": dict(common=1.0),            # with --modality: Barlow Twins-SAR and -RGB
    "vicreg": dict(common=1.0),
    "simclr": dict(common=1.0, projector="2048-128"),  # SimCLR, Sec. 2.3
    "clip": dict(common=1.0, projector="1024"),  # CLIP, Sec. 2.3 and Table 19
}
# --toy is small enough for two CPU cores.  LARS moves a weight by about lr / 100 of its norm per
# step, because eta / (1 - momentum) is 1 / 100.  A toy run has 480 to 960 steps, but the paper's
# runs have tens of thousands.  So a toy run needs a higher rate.  As in the paper, K is above N.
# But K is not far above N, because both modalities of a scene share few features.  If k dimensions
# agree on only r features, the diagonal ends at 1 / (1 + lambda (k / r - 1)).
TOY = dict(size=32, backbone="resnet-toy", projector="256-256-512", batch_size=128, lr=2.0,
           split="train")
# After fewer epochs, linear probes miss some of the factors of the scenes.
TOY_EPOCHS = {"rgbd": 30, "rgb-dem": 60, "sar-optical": 120}
OTHER_DEFAULTS = dict(split="all", depth_unit=1000.0, seed=0, save_every=10.0)


def pretrain(run, model, augment1, augment2, Kc):
    """Trains by Algorithm 1.  `Run`, below, sets learning rates, writes the log and saves."""
    for x1, x2 in run.batches():                                    # load a batch of pairs
        # x1 holds two batches, one for each view: images of two seasons, or the same images twice
        x1, x2 = move_views(x1, run.device), move_views(x2, run.device)
        # two augmented views for each modality
        x11, x12 = augment1(x1[0]), augment1(x1[1])                 # nxC1xSxS, n of this process
        x21, x22 = augment2(x2[0]), augment2(x2[1])                 # nxC2xSxS
        # compute embeddings and normalize (DeCUR's loss begins with BN)
        with mixed_precision(run.device):
            z11, z12, z21, z22 = model(x11, x12, x21, x22)          # nxK
        z11, z12, z21, z22 = map(gather, (z11, z12, z21, z22))      # NxK, the global batch, float32
        # cross-correlation matrices, calculate losses (as in Algorithm 1: see decur.decur_loss)
        loss, terms = compute_loss(run.args, Kc, z11, z12, z21, z22)
        # optimization
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.log(loss.detach(), terms, partial(measure_embeddings, run.args, Kc, z11, z12, z21, z22))


def compute_loss(args, Kc, z11, z12, z21, z22):
    """Returns the loss of --method, and the terms of DeCUR's loss (Eq. 6).

    z11, z12, z21, z22    NxK, or None for a view that is not encoded

    With the paper's sizes (N 256, K 8192) `decur_loss_gram` computes DeCUR's loss.  It equals
    `decur_loss` and costs a twentieth or less, because it makes no cross-correlation matrix."""
    if args.method == "decur":
        N, K = z11.shape
        form = decur_loss_gram if 3 * N <= 2 * K else decur_loss    # the cheaper of two equal forms
        return form(z11, z12, z21, z22, Kc, intra=not args.no_intra)
    zA, zB = [z for z in (z11, z12, z21, z22) if z is not None]     # NxK, the two encoded views
    return LOSSES[args.method](zA, zB), {}


def measure_embeddings(args, Kc, z11, z12, z21, z22):
    """Returns numbers for the log: the mean standard deviation of the embeddings of each modality
    and, for DeCUR, the mean diagonals of its correlation matrices."""
    numbers = diagonals(z11, z12, z21, z22, Kc) if args.method == "decur" else {}
    for name, z in (("std1", z11), ("std2", z21)):
        if z is not None:
            numbers[name] = z.std(0).mean()
    return numbers


def choose_views(args):
    """Returns four booleans: whether x11, x12, x21 and x22 are encoded.  All four views are made in
    any case, so that every method sees the same augmented views."""
    if args.modality:                           # two views of one modality
        return [args.modality == 1, args.modality == 1, args.modality == 2, args.modality == 2]
    if args.method == "decur" and not args.no_intra:
        return [True, True, True, True]
    return [True, False, True, False]           # only intra-modal terms need the second views


# ---- optimization, App. B ----

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017) with momentum, as in Barlow Twins.

    groups    parameters, or groups of parameters with a learning rate for each group

    Parameters of fewer than two dimensions (biases, batch norm) take a plain momentum step, without
    weight decay and adaptation.  step() overwrites the gradients, so nothing may use them later."""

    def __init__(self, groups, lr=0.2, weight_decay=1e-6, momentum=0.9, eta=0.001):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.ndim > 1:                  # in place, because new memory takes time
                    g.add_(p, alpha=group["weight_decay"])
                    p_norm, g_norm = p.norm(), g.norm()
                    trust = group["eta"] * p_norm / g_norm
                    # a weight of norm 0 takes a plain step, because trust 0 would never move it
                    g.mul_(torch.where((p_norm > 0) & (g_norm > 0), trust, 1))
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                m = self.state[p]["momentum"].mul_(group["momentum"]).add_(g)
                p.sub_(m, alpha=group["lr"])


def cosine(step, steps):
    """Returns the factor of the learning rate: 1 at step 0, 0 after the last step, no warm-up."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def make_optimizer(net, args):
    """Returns LARS for a ResNet, AdamW for a SegFormer.  Biases and norms have their own learning
    rate and no weight decay."""
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

    # ---- data; the loader's workers start before the processes are connected ----
    if args.toy:
        make_toy(args.scenario, args.data, rank=rank)
    data = open_pretraining_data(args, sources, checkpoint)
    check_batch(args.batch_size, len(data), world, least=2)
    steps_per_epoch = len(data) // args.batch_size
    steps = args.epochs * steps_per_epoch
    loader = make_loader(args, data, np.arange(len(data)), step, steps, process)
    join(args.out, step, process)

    # ---- model and optimizer ----
    channels = [views[0].shape[0] for views in data[0]]
    net, encoders = make_network(args, channels)
    inputs = {m: data.inputs[m - 1] for m in encoders}              # what each encoder sees
    K = args.widths[-1] if args.widths else max(E.dims[-1] for E in encoders.values())
    Kc = round(args.common * K)
    lines = describe_run(args, data, net, Kc, K)
    if args.weights and not checkpoint:
        lines += start_from(args.weights, list(encoders.values()), args, list(inputs.values()))
    model = distribute(net, world, device)
    optimizer = make_optimizer(net, args)
    settings = collect_settings(
        args, K=K, Kc=Kc, pairs=len(data), modalities=list(data.modalities), channels=channels,
        inputs=list(data.inputs))
    if checkpoint:
        restore(checkpoint, args.out, net, optimizer, settings,
                f". With --weights {args.out / 'checkpoint.pt'} a new run starts from its encoders")

    # ---- run ----
    warnings = find_warnings(data)              # reads images, so before --out is made
    if rank == 0:
        make_run_folder(args, settings, process)
    run = Run(args, settings, net, optimizer, loader, step, steps, steps_per_epoch, cosine, process)
    run.print_start(sources, lines, warnings)
    augment1, augment2 = [partial(augment, row=row, size=args.size, draws=run.draws)
                          for row in data.inputs]
    pretrain(run, model, augment1, augment2, Kc)
    if rank == 0 and not run.stopped:
        for m, E in encoders.items():
            export(args.out / f"encoder{m}.pth", E, inputs[m], settings | dict(data=args.data))
        run.print(f"wrote checkpoint.pt, the encoders, log.jsonl and args.json into {args.out}")
    if device.type == "cuda":
        run.print(f"peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    leave()
    return 128 + run.stopped if run.stopped else 0  # a shell's exit code for a signal


def make_network(args, channels):
    """Returns the network of --method, and {number of the modality: encoder}."""
    torch.manual_seed(args.seed)
    net = DeCUR(args.backbone, *channels, args.widths, choose_views(args))
    net.to(memory_format=torch.channels_last)
    return net, {m: f.E for m, f in ((1, net.f1), (2, net.f2)) if f is not None}


# ---- what this script and finetune.py do before the loop ----

# These settings may differ at --resume.
RUN_ONLY = ("data", "data1", "data2", "target", "out", "resume", "save_every", "workers", "toy",
            "save_images", "table", "pretraining")


def find_checkpoint(out, resume):
    """Loads checkpoint.pt from the folder `out`.  Returns None if there is no such file.

    Raises BadInput if `out` holds a run and `resume` is false."""
    file = out / "checkpoint.pt"
    holds_run = file.exists() or (out / "log.jsonl").exists()
    need(resume or not holds_run, f"--out {out} already holds a run. Give another folder as --out, "
         f"or go on from that run with --resume")
    return load_checkpoint(file) if file.exists() else None


def make_loader(args, data, indices, step, steps, process):
    """Starts the workers.  Returns an iterator of this process's batches, from `step` to `steps`.

    Reads the first batch before --out is made, so that a run that cannot read leaves no folder."""
    rank, world, device = process
    rows = choose_rows(args.batch_size, rank, world)
    loader = iter(DataLoader(
        Samples(data, keep=args.workers == 0), num_workers=args.workers,
        batch_sampler=order_batches(indices, args.batch_size, args.seed, rows, step, steps),
        worker_init_fn=leave_group, pin_memory=device.type == "cuda"))
    if args.workers and hasattr(signal, "SIGCHLD"):
        # If a worker is killed, torch's handler would raise an error anywhere.  Without this
        # handler, next(loader) raises the error, and the run can save.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    first = next(loader, None)                  # None if all steps are done
    # chain([first], loader) would keep the first batch in memory until the end
    return chain(iter([first]), loader)


def choose_rows(N, rank, world):
    """Returns the slice of a global batch of N samples that process `rank` takes."""
    return slice(rank * N // world, (rank + 1) * N // world)


def order_batches(indices, N, seed, rows, step, steps):
    """Yields a list of (epoch, index) for each batch from `step` on.  rows: the slice of a global
    batch that this process takes."""
    while step < steps:
        epoch, done = divmod(step, len(indices) // N)
        batches = epoch_batches(len(indices), N, seed, epoch)[done:done + steps - step, rows]
        for batch in batches:
            yield [(epoch, i) for i in indices[batch].tolist()]
        step += len(batches)


def collect_settings(args, **about):
    """Returns the settings that a checkpoint keeps; `about` adds facts about data and model."""
    settings = {name: value for name, value in vars(args).items() if name not in RUN_ONLY}
    return settings | about


def restore(checkpoint, out, net, optimizer, settings, hint=""):
    """Loads the states of the checkpoint that find_checkpoint(out) returned.

    Raises BadInput if the checkpoint's settings differ.  `hint` is added to that message."""
    file = out / "checkpoint.pt"
    check_equal(settings, checkpoint["settings"], settings, "--resume",
                f"{file}. Give the settings of that run, or a new --out{hint}")
    net.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])


def check_equal(settings, others, names, flag, where):
    """Raises BadInput if one of the named settings differs from `others`.

    where    the end of the message: where the other settings are, and what to do"""
    for name in names:
        need(others.get(name) == settings[name],
             f"{flag}: {name} is {settings[name]}, but {others.get(name)} in {where}")


def make_run_folder(args, settings, process):
    """Makes --out with args.json and, unless --resume finds a checkpoint, an empty log.jsonl."""
    make_folder(args.out)
    mode = "x"                                  # of two runs that begin at once, one is refused
    if args.resume:                             # without a checkpoint, the run begins anew
        mode = "a" if (args.out / "checkpoint.pt").exists() else "w"
    log = args.out / "log.jsonl"
    try:
        open(log, mode).close()                 # --out is in use now
        text = log.read_text("utf-8")           # a full disk may have cut the last line
        write_text(log, text[:text.rfind("\n") + 1])
    except FileExistsError:
        raise BadInput(f"--out {args.out}: another run has just begun in this folder. Give a new "
                       f"--out") from None
    _, world, device = process
    started = dict(settings, data=args.data, argv=sys.argv, processes=world, device=str(device),
                   torch=str(torch.__version__))
    write_text(args.out / "args.json", json.dumps(started, indent=1) + "\n")


def make_folder(out):
    """Makes the folder --out.  Raises BadInput if that is impossible."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out} cannot be made ({error.strerror}). Give another "
                       f"folder") from None


# ---- what this script and finetune.py do around each step ----

class Run:
    """Yields batches, sets learning rates, writes the log, saves checkpoints, handles signals.

    args               seed, batch_size (of all processes), out, resume, save_every (minutes)
    settings           the settings that checkpoints keep, from `collect_settings`
    loader             an iterator of batches from `step` on, from `make_loader`
    step, steps        the number of steps that are done, and the number of all steps
    steps_per_epoch    for the number of the epoch in the log
    rate               a function: the learning rate of a step is rate(step, steps) * initial_lr
    process            rank, world and device, from `read_environment`

    Saves a checkpoint every save_every minutes, at a signal, and at the end."""

    def __init__(self, args, settings, net, optimizer, loader, step, steps, steps_per_epoch, rate,
                 process):
        self.args, self.settings, self.net, self.optimizer = args, settings, net, optimizer
        self.loader, self.step, self.steps, self.rate = loader, step, steps, rate
        self.steps_per_epoch = steps_per_epoch
        self.rank, self.world, self.device = process
        if step == 0:                           # a resumed run has initial_lr from its checkpoint
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.draws = Draws(args.seed, args.batch_size,
                           choose_rows(args.batch_size, self.rank, self.world))
        # Two numbers of a signal, or 0.  `signalled`: a signal has reached this process.
        # `stopped`: a signal has reached any process.  It is set in all processes at the same step,
        # and makes them stop.
        self.signalled = self.stopped = 0
        self.waited = 0.0                       # seconds of waiting for batches since the last line

    def print_start(self, sources, lines, warnings):
        """Prints the command, each setting with its source, `lines`, and the warnings."""
        self.print(" ".join(sys.argv))
        for name, source in sources.items():
            self.print(f"  {name.replace('_', '-'):14s} {getattr(self.args, name)!s:16s} {source}")
        backend = f" ({dist.get_backend()})" if dist.is_initialized() else ""
        self.print(f"{self.steps} steps on {self.world} x {self.device.type}{backend}; torch "
                   f"{torch.__version__}", *lines)
        self.print(*(f"warning: {warning}" for warning in warnings))
        if self.step > 0:
            self.print(f"resumed from {self.args.out} at step {self.step} of {self.steps}")
        elif self.args.resume:
            self.print(f"--resume: no checkpoint.pt in {self.args.out}, so this run begins anew")

    def batches(self):
        """Yields every batch of this process.  The caller takes one step with each batch."""
        self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True,
                        disable=self.rank > 0 or None)
        self.saved = self.logged = time.time()
        self.logged_step = self.step
        self.listen(self.stop)
        while self.step < self.steps and not self.stopped:
            start = time.time()
            batch = self.load_batch()
            self.waited += time.time() - start
            self.draws.restart(self.step)       # seeds the augmentations
            # seeds drop path and dropout
            torch.manual_seed(mix_seeds(self.args.seed, self.step, 1 + self.rank))
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.rate(self.step, self.steps)
            yield batch
            self.step += 1
            self.bar.update()
            # All processes stop after the same step.  On CPUs they ask each other at every step,
            # because torchrun kills them 30 s after SIGTERM.  On GPUs they ask at every tenth step,
            # because waiting for the answer takes time.
            if self.world == 1 or self.device.type == "cpu" or self.step % 10 == 0:
                self.stopped = max_over_processes(self.signalled, self.device)
            minutes = (time.time() - self.saved) / 60
            if self.stopped or self.step == self.steps or minutes > self.args.save_every:
                self.save()
        self.bar.close()
        self.listen(signal.SIG_DFL)             # all is saved, so a signal may end the run
        if self.stopped:
            self.print(f"stopped after step {self.step} of {self.steps} and saved. To go on, give "
                       f"the same command with --resume")

    def load_batch(self):
        """Returns the next batch.  If that is impossible, the run saves and ends."""
        try:
            return next(self.loader)
        except Exception as error:              # such as a damaged file, or a worker was killed
            reason = describe_error(error)
            if reason is None:                  # the cause is an error in the code
                raise
            self.save(from_any=True)            # the other processes wait for this one
            raise BadInput(f"{reason}. Step {self.step} is saved. Mend the cause (`data.py check` "
                           f"lists damaged files), then give the same command with --resume"
                           ) from None

    def log(self, loss, terms=None, measure=dict):
        """Logs every 50th step.  A run of fewer than 2,500 steps logs 50 to 100 steps; a run of
        fewer than 50 steps logs every step.

        terms        the scalars whose sum is the loss
        measure()    returns further values by name

        Values are copied from the GPU only for lines that are logged.  If a logged loss is not
        finite, the run ends.  A loss between two logged steps is not checked.  This is enough,
        because a loss that is not finite makes the weights not finite, and then the next logged
        loss is not finite either."""
        step, every = self.step + 1, min(50, max(1, self.steps // 50))
        if step % every and step not in (1, self.steps):
            return
        line = dict(epoch=self.step // self.steps_per_epoch + 1, step=step, loss=loss.item())
        for name, value in {**(terms or {}), **measure()}.items():
            line[name] = value.item()
        if not math.isfinite(line["loss"]):
            sys.exit(f"the loss is {line['loss']} at step {step} ({format_losses(line)}). A "
                     f"checkpoint that was saved before stays as it is. Check the data with "
                     f"`data.py check`, or give a smaller --lr (in pretrain.py also --lr-bias)")
        if self.rank > 0:
            return
        seconds = max(time.time() - self.logged, 1e-9)
        pairs = (step - self.logged_step) * self.args.batch_size
        line |= dict(lr=self.optimizer.param_groups[0]["lr"], pairs_per_s=pairs / seconds,
                     data=self.waited / seconds)
        self.logged, self.logged_step, self.waited = time.time(), step, 0.0
        self.print(f"epoch {line['epoch']:03d} step {step:06d}/{self.steps:06d}  "
                   f"{format_losses(line)}  lr {line['lr']:.4g}  "
                   f"{line['pairs_per_s']:.0f} pairs/s  waiting for data {line['data']:.0%}")
        with open(self.args.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, from_any=False):
        """Writes checkpoint.pt.  Ends the run if a weight is not finite.

        from_any    True: any process writes; False: only the first process writes"""
        if self.rank > 0 and not from_any:
            return
        if not all(p.isfinite().all() for p in self.net.parameters()):
            sys.exit(f"a weight is not finite after step {self.step}. A checkpoint that was saved "
                     f"before stays as it is. Give a smaller --lr (in pretrain.py also --lr-bias)")
        checkpoint = dict(model=self.net.state_dict(), optimizer=self.optimizer.state_dict(),
                          step=self.step, settings=self.settings, data=self.args.data)
        write_atomically(self.args.out / "checkpoint.pt", partial(torch.save, checkpoint))
        self.saved = time.time()

    def print(self, *lines):
        """Prints lines above the progress bar, on the first process.  If the reader of stdout (such
        as `| head`) has ended, the run saves and stops."""
        if self.rank > 0:
            return
        try:
            for line in lines:
                tqdm.write(line, file=sys.stdout)
        except BrokenPipeError:                 # the run saves and ends, as after a signal
            sys.stdout = open(os.devnull, "w")
            self.signalled = 13                 # SIGPIPE; Windows does not have this name

    def listen(self, handler):
        """Sets the handler of SIGTERM, Ctrl-C, a closed terminal, and SIGUSR1 (Slurm's warning)."""
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            if hasattr(signal, name):           # Windows has only the first two
                signal.signal(getattr(signal, name), handler)

    def stop(self, signum, frame):
        """Notes the signal, so that the run saves and ends after this step."""
        self.signalled = signum
        signal.signal(signum, signal.SIG_DFL)   # the same signal again ends the process at once


def format_losses(line):
    """Returns the loss as text, with the terms, diagonals and deviations that `line` has."""
    terms = [f"{name} {line[name]:.1f}" for name in ("L1", "L2", "Lc", "Lu") if name in line]
    means = [f"{name} {line[name]:.2f}" for name in ("C1", "C2", "Cc", "Cu") if name in line]
    stds = [f"{line[name]:.2f}" for name in ("std1", "std2") if name in line]
    text = f"loss {line['loss']:.4f}"           # four digits, because SimCLR's loss is below 7
    if terms:
        text = f"loss {line['loss']:.1f} = {' + '.join(terms)}"
    if means:
        text += f"  diag {' '.join(means)}"
    if stds:
        text += f"  std {' '.join(stds)}"
    return text


# ---- processes ----

class Gather(torch.autograd.Function):
    """Joins the embeddings of W processes, nxK each, to the global batch, NxK, in order of rank.

    Every process computes the loss of all N rows, and DistributedDataParallel divides gradients by
    W.  So `backward` returns the gradient of this process's rows times W.  The average over the
    processes is then the gradient that one process would compute.  (If C were summed by an in-place
    all_reduce, outside autograd, the average would be 1/W of that gradient.)

    Each process writes its rows into zeros, and the sum over the processes is the global batch.
    all_gather would be shorter, but gloo does not document it for CUDA tensors."""

    @staticmethod
    def forward(ctx, z):
        n = len(z)
        ctx.own = slice(dist.get_rank() * n, (dist.get_rank() + 1) * n)
        joint = z.new_zeros(dist.get_world_size() * n, *z.shape[1:])  # NxK
        joint[ctx.own] = z
        dist.all_reduce(joint)
        return joint

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.own] * dist.get_world_size()


def gather(z):
    """Returns the global batch, NxK in float32 or float64.  z: nxK of this process, or None."""
    if z is None:
        return None
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if dist.is_initialized() and dist.get_world_size() > 1:
        return Gather.apply(z)
    return z


def read_environment():
    """Returns rank, world size and device of this process.  Without torchrun there is only one
    process."""
    defaults = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    texts = {name: os.environ.get(name, text) for name, text in defaults.items()}
    for name, text in texts.items():
        need(text.isdecimal(), f"{name}={text} in the environment is not a number. Start with "
                               f"torchrun, or unset {name}")
    rank, world, local = map(int, texts.values())
    need(rank < world, f"RANK={rank} and WORLD_SIZE={world} in the environment contradict each "
         f"other. Start with torchrun, or unset both variables")
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True   # faster, because all shapes of a run are fixed
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    return rank, world, device


def join(out, step, process):
    """Connects the processes.  Raises BadInput unless all processes go on from the same step."""
    _, world, device = process
    if world > 1 and not dist.is_initialized():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            need(os.environ.get(name), f"WORLD_SIZE={world} is in the environment, but {name} is "
                 f"missing, so the processes cannot connect. Start with torchrun, or unset "
                 f"WORLD_SIZE and RANK")
        dist.init_process_group(choose_backend(device))
    most, least = max_over_processes(step, device), -max_over_processes(-step, device)
    need(most == least, f"--out {out} is at step {most} for one process and at step {least} for "
         f"another. Give an --out that all processes see, such as one on a shared disk")


def choose_backend(device):
    """Returns "nccl" if each process has a GPU to itself, otherwise "gloo"."""
    # torchrun sets LOCAL_WORLD_SIZE.  Slurm does not, but it gives each process its own GPU.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda" and local_world <= torch.cuda.device_count():
        return "nccl"
    return "gloo"


def leave():
    """Disconnects the processes."""
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            # Without a barrier, torch 2.6 can wait forever in the next line: gloo's thread needs
            # Python's lock to free the last tensor, and the thread with the lock waits for it.
            dist.barrier()
        dist.destroy_process_group()


def distribute(net, world, device):
    """Moves net to the device.  Returns the model that averages gradients over the processes."""
    net.to(device)
    if world == 1:
        return net
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif dist.get_rank() == 0:
        print(f"warning: torch cannot synchronise batch normalisation over {world} CPU processes, "
              f"so each process normalises its own samples. The loss is still of all samples")
    # Batch statistics that were measured on a random network may differ between the processes, and
    # buffers are not broadcast later.
    for buffer in net.buffers():
        dist.broadcast(buffer, 0)
    return DistributedDataParallel(net, gradient_as_bucket_view=True, broadcast_buffers=False)


def mixed_precision(device):
    """Returns autocast to bf16 on GPUs that have bf16 (Ampere and later), otherwise no cast."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def max_over_processes(value, device):
    """Returns the largest of the processes' integers, on all processes."""
    if not dist.is_initialized():
        return int(value)
    value = torch.tensor(int(value), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def check_batch(N, n, world, least=1):
    """Raises BadInput unless N, the --batch-size of all processes, divides evenly among them, gives
    each at least `least` samples, and is at most n, the number of samples."""
    need(n >= least * world, f"the data have too few samples, {n}. A step needs {least * world} or "
         f"more, {least} for each process. Give more data")
    need(N % world == 0 and N >= least * world, f"--batch-size {N} does not give each of {world} "
         f"processes the same number of samples, {least} or more. Give "
         f"{max(least, min(N, n) // world) * world}")
    need(N <= n, f"--batch-size {N} is more than the number of samples, {n}. Give "
         f"{n // world * world}")


# ---- checkpoints and weights ----

def load_checkpoint(path):
    """Loads a checkpoint.pt.  Raises BadInput if the file is damaged or not of this project."""
    need(not Path(path).is_dir(), f"{path} is a folder. Give its file checkpoint.pt")
    with reading(path, "a checkpoint.pt of this project",
                 "give another file, or with --resume a new --out"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        wanted = "model", "optimizer", "step", "settings", "data"
        missing = [name for name in wanted if name not in checkpoint]
        need(not missing, f"{path} is not a checkpoint.pt of this project, because it lacks "
             f"{', '.join(missing)}. Give another file")
        return {name: checkpoint[name] for name in wanted}


def read_settings(checkpoint):
    """Returns the settings of a pretraining.  `stopped` says at which step it was stopped, or None.

    Raises KeyError if the checkpoint is not of a pretraining."""
    settings, step = checkpoint["settings"], checkpoint["step"]
    steps = settings["epochs"] * (settings["pairs"] // settings["batch_size"])
    return settings | dict(stopped=f"at step {step} of {steps}" if step < steps else None,
                           data=checkpoint["data"])


def export(path, E, row, settings):
    """Writes the encoder as plain tensors and, beside it, a .json: what the encoder was trained on
    (a row of data.MODALITIES), and the settings of the run."""
    state = {name: t.cpu().contiguous() for name, t in E.state_dict().items()}
    write_atomically(path, partial(torch.save, state))
    about = dict(input="values in [0, 1], then (x - mean) / std", sees=row, settings=settings)
    write_text(path.with_suffix(".json"), json.dumps(about, indent=1))


def start_from(files, encoders, args, inputs):
    """Loads --weights into the encoders.  Returns lines to print: for each encoder its file, with
    the pretraining behind the file, and a warning if the encoder was trained on other inputs.

    inputs    what each encoder sees in this run: rows of data.MODALITIES
    Raises BadInput unless there are weights for each encoder and every key fits."""
    need(not args.bgr or any(E.channels == 3 for E in encoders), "--bgr has no effect, because no "
         "encoder sees images of 3 channels. Leave --bgr out")
    try:
        states = []                             # for each encoder: source, weights, and input
        for file in files:
            settings, trained_on = read_pretraining(file)
            need(not (settings and args.bgr), f"--bgr is for weights trained on BGR images. {file} "
                 f"was trained by this project, on RGB images. Leave --bgr out")
            source = f"{file} ({describe_pretraining(settings)})" if settings else file
            for m, state in enumerate(read_weights(file, args.backbone)):
                states.append((source, state, trained_on[m] if trained_on else None))
        if args.modality and len(states) == 2:
            states = [states[args.modality - 1]]
        if files == ["imagenet"]:
            states = states * len(encoders)
        if len(states) != len(encoders):
            raise ValueError(f"the number of encoders in these files is {len(states)}, but must be "
                             f"{len(encoders)}. Give the checkpoint.pt of a run of both "
                             f"modalities, or a file for each encoder")
        lines = []
        for E, row, (source, state, seen) in zip(encoders, inputs, states):
            lines.append(f"{source}: {load_encoder(E, state, bgr=args.bgr and E.channels == 3)}")
            if seen:
                lines += warn_of_other_input(source, seen, row)
        return lines
    except (OSError, ValueError) as error:
        raise BadInput(f"--weights {' '.join(files)}: {error}") from None


def warn_of_other_input(source, seen, row):
    """Returns a list: one warning if an encoder was trained on other inputs, otherwise nothing.

    source      a text that names the encoder
    seen, row   what the encoder was trained on, and what it sees here: rows of data.MODALITIES"""
    if not differ(seen, row):
        return []
    return [f"warning: {source} was trained on {describe_input(seen)}. Here it sees "
            f"{describe_input(row)}, which may make its features worse"]


def describe_pretraining(settings):
    """Returns the settings by which pretrainings usually differ, as text."""
    without = ", without intra-modal terms" if settings["no_intra"] else ""
    return (f"{settings['method']} on {settings['scenario']}, common {settings['common']}{without},"
            f" {settings['epochs']} epochs, seed {settings['seed']}")


def read_pretraining(file):
    """Returns the settings behind a weights file of this project and, for each encoder in it, the
    row of MODALITIES that the encoder was trained on; ({}, []) for a file of another project.

    Raises BadInput if the json file beside an encoder is damaged."""
    path, beside = Path(file), Path(file).with_suffix(".json")
    if path.suffix == ".pth" and beside.is_file():
        written = "the json file that pretrain.py writes beside an encoder"
        about = read_json(beside, written)
        if "sees" not in about:                 # the file is of another project
            return {}, []
        with reading(beside, written):
            return check_pretraining(about["settings"], [about["sees"]])
    try:
        settings = read_settings(load_checkpoint(path))
        m = settings["modality"]                # of a pretraining of one modality, or None
        rows = settings["inputs"][m - 1:m] if m else settings["inputs"]
        return check_pretraining(settings, rows)
    except (BadInput, KeyError, TypeError, ValueError):
        return {}, []                           # if it is damaged, `read_weights` says so later


def check_pretraining(settings, rows):
    """Returns the arguments.  Raises ValueError if an entry is missing that is read later, here or
    in finetune.py."""
    names = ("method", "scenario", "common", "no_intra", "epochs", "seed", "backbone", "size",
             "depth_unit", "modalities", "inputs")
    missing = [name for name in names if name not in settings]
    for row in rows:
        missing += [name for name in ("name", "bands", "range", "mean", "std") if name not in row]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return settings, rows


def differ(seen, row):
    """Returns whether two rows of MODALITIES describe different inputs.  Bands whose names are not
    known (`channel 1`) count as equal to bands of any names."""
    named = not any(bands[0].startswith("channel") for bands in (seen["bands"], row["bands"]))
    if named and list(seen["bands"]) != list(row["bands"]):
        return True
    return describe_scale(seen) != describe_scale(row)


def describe_input(row):
    """Returns the bands of a row of MODALITIES and how they are scaled, as text."""
    return f"{' '.join(row['bands'])} ({describe_scale(row)})"


def describe_scale(row):
    """Returns a text: which values of the files become x = 0 and x = 1, and the mean and std of the
    normaliser."""
    scale = row["range"]
    if row.get("raw_mean"):                     # these were measured on own images, for each band
        scale = f"{join_numbers(row['raw_mean'])} -+ 3 x {join_numbers(row['raw_std'])}, clipped"
    return f"{scale}; mean {join_numbers(row['mean'])}, std {join_numbers(row['std'])}"


def join_numbers(values):
    return " ".join(f"{value:.4g}" for value in values)


@torch.no_grad()
def measure_statistics(net, batches):
    """Measures the statistics of the batch norms in a random network, as averages over batches.
    With the initial statistics (mean 0, variance 1), the features of a random ResNet-50 would be in
    the thousands.

    batches    an iterable of lists; a list holds the inputs of one call of net"""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.momentum = None              # a plain mean instead of a moving average
    net.train()
    for x in batches:
        net(*x)


# ---- data and command line ----

# The flags of this script.  finetune.py has most of these flags, too.  If no default is given here,
# `list_defaults` has the default.
LEARNING_RATE = dict(type=number(float, 1e-12, 1e6))
FLAGS = DATA_FLAGS | {
    "scenario": dict(required=True, choices=SCENARIOS, help="the two modalities, with the paper's "
                     "settings for them; custom: your own images"),
    "toy": dict(action="store_true", help="use made-up scenes, which are written into --data, and "
                "small settings instead of the defaults below; default: real data"),
    "workers": DATA_FLAGS["workers"] | dict(default=choose_workers()),
    "method": dict(choices=METHODS, default="decur", help="a method of Tables 1-3; default: decur"),
    "modality": dict(type=int, choices=(1, 2), help="with barlowtwins: take two views of this "
                     "modality; default: one view of each modality"),
    "backbone": dict(choices=[*RESNETS, *MITS], help="network of the encoders; default: resnet50"),
    "weights": dict(type=expand_path, nargs="+", metavar="FILE", help="weights to start from: one "
                    "file for both encoders, a file for each, or imagenet; default: random"),
    "bgr": dict(action="store_true", help="say that --weights were trained on BGR images, like the "
                "weights of the DeCUR authors; default: RGB"),
    "projector": dict(metavar="WIDTHS", help="widths of the projector's layers, joined by -, or "
                      "none for no projector; default: 8192-8192-8192, simclr 2048-128, clip "
                      "1024"),
    "common": dict(type=number(float, 0, 1), help="share of the dimensions that are common, 0 to "
                   "1; default: 0.75, sar-optical 0.875, custom 0.8, other methods than decur 1"),
    "no-intra": dict(action="store_true", help="leave the terms L1 and L2 out of the loss (Table "
                     "4, w/o intra); default: keep them"),
    "epochs": dict(type=number(int, 1), help="number of passes over the data; default: 100, rgbd "
                   "200"),
    "batch-size": dict(type=number(int, 2), help="samples per step, in all processes together; "
                       "default: 256, rgbd 128"),
    "lr": LEARNING_RATE | dict(help="learning rate of the weights; default: 0.2, with a mit "
                               "backbone 1e-4"),
    "lr-bias": LEARNING_RATE | dict(help="learning rate of biases and norms; default: 0.0048, with "
                                    "a mit backbone 1e-4"),
    "weight-decay": dict(type=number(float, 0, 1), help="weight decay of the weights, not of "
                         "biases and norms; default: 1e-6, with a mit backbone 0.01"),
    "seed": dict(type=number(int, 0, 2 ** 63 - 1), help="seed of all random numbers; default: 0"),
    "out": dict(type=expand_path, metavar="DIR",
                help="folder of the run; default: runs/SCENARIO-METHOD"),
    "resume": dict(action="store_true", help="go on from the checkpoint in --out, if there is "
                   "one; default: start a new run"),
    "save-every": dict(type=number(float, 1e-6), metavar="MINUTES",
                       help="minutes between two checkpoints; default: 10"),
}


def open_pretraining_data(args, sources, checkpoint):
    """Opens the data set.  A resumed run keeps the image statistics that its start has measured."""
    inputs = None
    if checkpoint and args.scenario == "custom":
        inputs = checkpoint["settings"].get("inputs")
    data = open_dataset(args.scenario, args.data, args.size, args.split, args.depth_unit, args.seed,
                        inputs=inputs, declared=(args.as1, args.as2), reduce=True)
    if "depth" not in data.modalities:
        need(sources.pop("depth_unit") == "default",
             f"--depth-unit has no effect on {' and '.join(data.modalities)}. Leave --depth-unit "
             f"out")
    return data


def describe_run(args, data, net, Kc, K):
    """Returns lines about the data, the augmentations and the size of the networks.  For DeCUR, two
    more lines have the loss of independent embeddings and the least possible loss."""
    root = " and ".join(args.data) if isinstance(args.data, list) else args.data
    lines = [f"{len(data)} pairs of {' and '.join(data.modalities)} from {root}"]
    lines += data.notes
    for name in dict.fromkeys(data.modalities):  # both may be the same modality
        lines.append(f"augmentations of {name}: {AUGMENTATIONS[name]}")
    for title, f in net.named_children():       # f1 and f2
        encoder = sum(p.numel() for p in f.E.parameters()) / 1e6
        projector = sum(p.numel() for p in f.P.parameters()) / 1e6
        lines.append(f"parameters of {title}: encoder {encoder:.2f} M, projector "
                     f"{projector:.2f} M")
    if args.method == "decur":
        lines.append(f"N {args.batch_size}  K {K}  Kc {Kc}")
        chance, floor = bounds(args.batch_size, K, Kc, not args.no_intra)
        for name, terms in (("chance (independent embeddings)", chance),
                            ("floor (no batch goes below)", floor)):
            lines.append(f"  {name:32s} {format_losses(dict(loss=sum(terms.values()), **terms))}")
    return lines


def list_defaults(scenario, method, backbone, toy):
    """Returns [(settings, their source)].  The default of a setting is in the first pair that has
    the setting."""
    tables = [(METHODS[method], f"--method {method}")]
    if backbone in MITS:
        tables += ADAMW_RATES
    if toy:
        tables += [(TOY | dict(epochs=TOY_EPOCHS.get(scenario)), "--toy")]
    tables += [(SCENARIOS[scenario], "this project" if scenario == "custom" else "paper, Sec. 4")]
    return tables + [(NETWORK, "paper, Sec. 4"), (LARS_RATES, "paper, App. B"),
                     (OTHER_DEFAULTS, "default")]


def fill_in(args, tables):
    """Gives each setting that the command line lacks its default: the value in the first table that
    has this setting.  Returns {name: source} of all settings."""
    sources = {}
    for table, source in tables:
        for name, value in table.items():
            if name in sources:
                continue
            sources[name] = "command line"
            if getattr(args, name, None) is None:
                sources[name] = source
                setattr(args, name, value)
    return sources


def get_args(argv=None):
    """Returns the settings, and {name: source} of the settings that have a default."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="DeCUR pretraining (Algorithm "
                                     "1). The defaults are the paper's settings.")
    add_flags(parser, FLAGS, "scenario toy")
    for title, names in (
            ("data", "data data1 data2 as1 as2 split depth-unit size workers"),
            ("model", "method modality backbone weights bgr projector common no-intra"),
            ("optimization and run", "epochs batch-size lr lr-bias weight-decay seed out resume "
                                     "save-every")):
        add_flags(parser.add_argument_group(title), FLAGS, names)
    args = parser.parse_args(argv)
    sources = fill_in(args, list_defaults(args.scenario, args.method, args.backbone, args.toy))
    check_flags(args)
    widths = [] if args.projector == "none" else args.projector.split("-")
    need(all(width.isdecimal() and 0 < int(width) < 10 ** 6 for width in widths),
         f"--projector {args.projector} is not a list of widths. Give widths such as "
         f"8192-8192-8192, or none")
    args.widths = [int(width) for width in widths]
    toy = "toy-" if args.toy else ""
    if args.scenario == "custom":
        args.data = [args.data1, args.data2]
    args.data = args.data or f"data/{toy}{args.scenario}"
    args.out = Path(args.out or f"runs/{toy}{args.scenario}-{args.method}{args.modality or ''}")
    return args, sources


def check_flags(args):
    """Raises BadInput for flags that do not go together, or that would have no effect."""
    custom, decur, mit = args.scenario == "custom", args.method == "decur", args.backbone in MITS
    need(not custom or args.data1 and args.data2 and not args.data and not args.toy,
         "--scenario custom needs --data1 and --data2. It does not work with --data or --toy")
    for name in ("data1", "data2", "as1", "as2"):
        need(custom or not getattr(args, name), f"--{name} works only with --scenario custom")
    need(decur or args.common == 1 and not args.no_intra, f"--common and --no-intra work only with "
         f"--method decur, because {args.method} has no unique dimensions and no intra-modal terms")
    need(args.method == "barlowtwins" or not args.modality,
         f"--modality {args.modality} works only with --method barlowtwins")
    need(args.weights or not args.bgr, "--bgr works only with --weights")
    need(args.size >= 32 or not mit, f"--size {args.size} is too small for {args.backbone}. Give "
         f"32 or more")


if __name__ == "__main__":
    run_main(main)
