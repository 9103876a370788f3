"""Pretrains DeCUR: Algorithm 1, with the settings of Sec. 4 and App. B as defaults.

    python pretrain.py --scenario rgbd --toy                     made-up scenes, minutes on a CPU
    python pretrain.py --scenario rgbd                           CPU, MPS or one GPU; data/rgbd
    torchrun --nproc_per_node=4 pretrain.py --scenario rgbd      many GPUs (paper: 4 A100, 6 hours)
    python pretrain.py --scenario rgbd --method barlowtwins      what DeCUR is compared with
    python pretrain.py --scenario rgbd --benchmark               how fast, in how much memory

Writes into --out: checkpoint.pt (all that --resume needs), encoder1.pth and encoder2.pth (names of
torchvision or SegFormer, no classifier) with a .json beside each that says what it wants to see,
log.jsonl, args.json (the settings).
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:                             # Windows
    fcntl = None

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (AUGMENTATIONS, MODALITIES, BadInput, Draws, augment, both_views, collate,
                  epoch_batches, make_toy, mixed, open_pairs)
from decur import (MITS, RESNETS, DeCUR, barlow_twins_loss, chance_and_floor, clip_loss,
                   decur_loss, decur_loss_gram, load_encoder, peak, read_weights, simclr_loss,
                   vicreg_loss)

PAPER = dict(                                   # for all scenarios:
    size=224,                                   # Sec. 4, Data augmentations
    backbone="resnet50",                        # Sec. 4, Model architecture
    projector="8192-8192-8192",                 # Sec. 4, Model architecture
    lr=0.2, lr_bias=0.0048,                     # App. B; not scaled with the batch
    weight_decay=1e-6,                          # App. B
)
SCENARIOS = {                                   # Sec. 4, Model architecture | Optimization
    "sar-optical": dict(common=0.875, epochs=100, batch_size=256),
    "rgb-dem": dict(common=0.75, epochs=100, batch_size=256, split="train"),
    "rgbd": dict(common=0.75, epochs=200, batch_size=128),
    "custom": dict(common=0.8, epochs=100, batch_size=256),  # the paper's "general percentage"
}
# Tables 1-3: the loss, and what it changes of the above.  None but DeCUR has unique dimensions.
METHODS = {
    "decur": (decur_loss_gram, dict()),
    "barlowtwins": (barlow_twins_loss, dict(common=1.0)),  # -SAR and -RGB with --modality
    "vicreg": (vicreg_loss, dict(common=1.0)),
    "simclr": (simclr_loss, dict(common=1.0, projector="2048-128")),  # SimCLR, Sec. 2.3
    "clip": (clip_loss, dict(common=1.0, projector="1024")),  # CLIP, Sec. 2.3 and Table 19
}
# App. B, segformers: AdamW at 1e-4, for all parameters.  The weight decay is not said there: it is
# the 0.01 of App. B's other AdamW (RGB-DEM transfer) and of CMX; none on biases and norms, as CMX.
SEGFORMER = dict(lr=1e-4, lr_bias=1e-4, weight_decay=0.01)
# --toy: small enough for two CPU cores.  LARS moves a weight by about lr / 100 of its norm a step
# (eta / (1 - momentum) is 1 / 100): a thousand steps want more than the paper's tens of thousands.
# K is above N, as in the paper, but not far: the scenes share few features, and k dimensions that
# agree on r of them end at a diagonal of 1 / (1 + lambda (k / r - 1)).
TOY = dict(size=32, backbone="resnet-toy", projector="256-256-512", epochs=60, batch_size=128,
           lr=2.0, split="train")
TOY_SAR = TOY | dict(epochs=120)                # of half as many scenes
REST = dict(split="all", depth_unit=1000.0)     # what the paper does not say
# may differ at --resume:
RUN_ONLY = ("data", "data1", "data2", "out", "resume", "save_every", "workers", "toy", "benchmark")


# ---- optimisation, App. B ----

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017) with momentum, as in Barlow Twins.

    groups: parameters, or groups of them that may have an lr of their own.  Those of fewer than two
    dimensions (biases, batch norm) take a plain momentum step: no weight decay, no adaptation.
    """

    def __init__(self, groups, lr=0.2, weight_decay=1e-6, momentum=0.9, eta=0.001):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.ndim > 1:
                    g = g.add(p, alpha=group["weight_decay"])
                    p_norm, g_norm = p.norm(), g.norm()
                    trust = group["eta"] * p_norm / g_norm
                    g = g * torch.where((p_norm > 0) & (g_norm > 0), trust, 1)  # norm 0 moves, too
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                m = self.state[p]["momentum"].mul_(group["momentum"]).add_(g)
                p.sub_(m, alpha=group["lr"])


def cosine(step, steps):
    """Decay from 1 at step 0 to 0 at step `steps`, no warm-up (App. B)."""
    return (1 + math.cos(math.pi * step / steps)) / 2


# ---- processes ----

class Gather(torch.autograd.Function):
    """nxK of each process -> NxK on each, in the order of ranks; the gradient comes back summed.

    Each process computes the whole loss from all N rows.  DistributedDataParallel averages the
    parameters' gradients over the W processes, and the sum here is W times the gradient of one's
    own rows: together exactly the gradient of one process with the joint batch.  (An in-place
    all_reduce of C, outside autograd, gives 1/W of it.)  The gathering itself is a sum, of rows
    that are zero elsewhere: gloo documents no all_gather for CUDA tensors.
    """

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
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.rows]


def gather(z):
    """The global batch of embeddings, NxK, from the processes' nxK; differentiable.  Of one: z."""
    return Gather.apply(z) if dist.is_initialized() and dist.get_world_size() > 1 else z


def start_processes():
    """What torchrun's environment says, or one process.  Returns rank, world size, device."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.device_count()
    device = torch.device("cuda", local % cuda) if cuda else \
        torch.device("mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        own_gpu = cuda >= int(os.environ.get("LOCAL_WORLD_SIZE", world))
        dist.init_process_group("nccl" if own_gpu else "gloo")  # gloo: CPU, or a GPU for several
    return rank, world, device


def processes(world):
    return f"{world} processes ({dist.get_backend()})" if world > 1 else "1 process"


def mixed_precision(device):
    """Autocast to bf16 on GPUs that have it (Ampere and later); elsewhere nothing is cast."""
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast("cuda", torch.bfloat16) if ampere else nullcontext()


def leave_group(worker):
    """For a loader's worker: Ctrl-C and torchrun signal whole process groups, but the main process
    wants to end its step and save."""
    if os.name == "posix":
        os.setpgrp()


def agreed(value, device):
    """The largest integer that a process gives, on all of them; True if it is True on one."""
    if dist.is_initialized():
        value = torch.tensor(int(value), device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


# ---- checkpoints ----

def write_atomically(path, write):
    """write(name) beside the path, flush, rename: killed, it leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:    # a full disk; torch.save says RuntimeError
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise BadInput(f"{path} cannot be written; is the disk full? What was there before is "
                       f"whole: make room, then go on with --resume") from None
    os.replace(part, path)


def save_checkpoint(path, net, optimizer, step, settings):
    if not all(p.isfinite().all() for p in net.parameters()):
        sys.exit(f"a weight is not finite after step {step}; what was saved before stays; "
                 f"a smaller --lr or --lr-bias may help")
    checkpoint = dict(model=net.state_dict(), optimizer=optimizer.state_dict(), step=step,
                      settings=settings, torch=str(torch.__version__))
    write_atomically(path, partial(torch.save, checkpoint))


def export(path, E, about):
    """The encoder alone, as plain tensors, and a .json: what it wants to see, how it came to be."""
    state = {name: t.cpu().contiguous() for name, t in E.state_dict().items()}
    write_atomically(path, partial(torch.save, state))
    about = dict(about, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    write_atomically(path.with_suffix(".json"),
                     lambda part: part.write_text(json.dumps(about, indent=1)))


def start_from(files, encoders, args):
    """Load --weights into the encoders, one or both modalities'; yields a line for each.

    Raises BadInput unless they fit to the last key.
    """
    try:
        found = [(file, state) for file in files for state in read_weights(file, args.backbone)]
        if args.modality and len(found) == 2:
            found = [found[args.modality - 1]]
        if files == ["imagenet"]:
            found *= len(encoders)
        if len(found) != len(encoders):
            raise ValueError(f"{len(found)} encoder{'s' * (len(found) != 1)}, expected "
                             f"{len(encoders)}; give a file with both, or one for each modality")
        for E, (file, state) in zip(encoders, found):
            yield f"{file}: {load_encoder(E, state, bgr=args.bgr and E.channels == 3)}"
    except (OSError, ValueError) as error:
        raise BadInput(f"--weights {' '.join(files)}: {error}") from None


@torch.no_grad()
def measure_statistics(net, batches):
    """Of the batch norms of a random network that is not to be trained: the mean over the batches.

    batches: lists of the network's inputs.  The mean 0 and variance 1 that they start with are
    nobody's: a ResNet-50's features would be in the thousands.
    """
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.momentum = None              # no moving average
    net.train()
    for x in batches:
        net(*x)


def load_checkpoint(path):
    """Raises BadInput for a file that is truncated, or holds more than tensors and plain values."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if {"model", "settings", "step"} <= checkpoint.keys():
            return checkpoint
        reason = "it is no checkpoint of this project"
    except Exception as error:                  # torch raises half a dozen kinds for bad files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    raise BadInput(f"{path} cannot be used ({reason}); expected a whole checkpoint.pt of tensors "
                   f"and plain values; give another, or delete it to begin anew")


def settings_of(checkpoint):
    """The settings of a pretraining, and whether it was `stopped` before its end, or None."""
    settings, step = checkpoint["settings"], checkpoint["step"]
    steps = settings["epochs"] * (settings["pairs"] // settings["batch_size"])
    return settings | dict(stopped=f"at step {step} of {steps}" if step < steps else None)


def go_on(path, settings, net, optimizer, resume, device):
    """Load the checkpoint of an earlier run with these settings, if there is one.

    Returns the step it had reached, or 0.  Raises BadInput without --resume, so that nothing is
    overwritten, and where the settings, or the processes among themselves, differ.
    """
    step = load_into(path, settings, net, optimizer, resume) if path.exists() else 0
    most, least = agreed(step, device), -agreed(-step, device)
    if most != least:
        raise BadInput(f"{path} is at step {most} for one process, at {least} for another; "
                       f"expected an --out that all of them see")
    return step


def load_into(path, settings, net, optimizer, resume):
    if not resume:
        raise BadInput(f"{path} exists; expected a new --out, or --resume to go on from it")
    checkpoint = load_checkpoint(path)
    for name, value in settings.items():
        before = checkpoint["settings"].get(name)
        if before != value:
            values = f"{value}, but {before}"
            values = values if len(values) < 200 else "not what it is"  # statistics of the images
            raise BadInput(f"--resume: {name} is {values} in {path}; "
                           f"give the settings of that run, or a new --out")
    net.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"]


def open_folder(out, record, step):
    """The run's folder: args.json, and log.jsonl without what an earlier run wrote after `step`.

    Returns an open file: its lock keeps a second run out of the folder, until the process ends.
    """
    record = dict(record, torch=str(torch.__version__), torchvision=torchvision.__version__)
    log_file = out / "log.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "w")
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_atomically(out / "args.json",
                         lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
        kept = log_file.read_text().splitlines(True) if step and log_file.exists() else []
        kept = [line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(log_file, lambda path: path.write_text("".join(kept)))
        return lock
    except BlockingIOError:
        raise BadInput(f"another run is writing into --out {out}; give another folder") from None
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written ({error.strerror}); "
                       f"give a folder that can") from None


def signals_to_come():
    """A list that SIGTERM and Ctrl-C append to: a run ends its step and saves; a second kills."""
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: (stopped.append(n), signal.signal(n, signal.SIG_DFL)))
    return stopped


# ---- python pretrain.py --benchmark ----

class NoFiles:
    """In place of --data: blank pairs of the sizes and dtypes that the scenario's files have."""

    def __init__(self, scenario, size):
        self.modalities, *canvas = {"sar-optical": (("sar", "ms"), 264, 264),
                                    "rgb-dem": (("aerial", "dem"), 250, 250),
                                    "rgbd": (("rgb", "hha"), size * 3 // 2, size * 2)}[scenario]
        shapes = [(len(MODALITIES[modality]["bands"]), *canvas) for modality in self.modalities]
        dtypes = torch.uint8, torch.float32 if scenario == "rgb-dem" else torch.uint8
        self.pair = [[torch.zeros(shape, dtype=dtype)] for shape, dtype in zip(shapes, dtypes)]

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, i):
        return self.pair


def benchmark(args, data, load, augment1, augment2, draws, net, optimizer, Kc, device, seconds=20):
    """Prints what a step takes, part by part, with made-up tensors on the device and with files.

    The calls are those of Algorithm 1 in `main`, and after each the device is waited for.  3 steps
    warm up, then come some for `seconds`, at least 2.
    """
    N, cuda = args.batch_size, device.type == "cuda"
    sync = dict(cuda=torch.cuda.synchronize, mps=torch.mps.synchronize).get(device.type,
                                                                            lambda: None)

    def loss_of(z, form=decur_loss_gram):
        if args.method == "decur":
            return form(*z, Kc, intra=not args.no_intra)[0]
        return METHODS[args.method][0](*(z_ for z_ in z if z_ is not None))

    def run(batches):                           # seconds a step by part, and the last embeddings
        def lap(part):
            sync()
            laps.append((part, time.perf_counter()))
        laps = [("", time.perf_counter())]
        for step, (x1, x2) in enumerate(batches):
            x1, x2 = both_views(x1, device), both_views(x2, device)
            lap("wait for data")
            draws.restart(step)
            x = augment1(x1[0]), augment1(x1[1]), augment2(x2[0]), augment2(x2[1])
            lap("augment")
            with mixed_precision(device):
                z = net(*x)
            lap("forward")
            z = [z_ if z_ is None else z_.float() for z_ in z]
            loss = loss_of(z)
            lap("loss")
            optimizer.zero_grad()
            loss.backward()
            lap("backward")
            optimizer.step()
            lap("optimizer")
            laps = laps[-1:] if step == 2 else laps
            if step >= 4 and laps[-1][1] - laps[0][1] >= seconds:
                parts = defaultdict(float)
                for (_, before), (part, now) in itertools.pairwise(laps):
                    parts[part] += (now - before) / (step - 2)
                return parts, z

    def noise(views):                           # like a file's, CxHxW -> NxCxHxW
        x = torch.randint(256, (N, *views[0].shape), dtype=torch.uint8, device=device)
        return [x if views[0].dtype == torch.uint8 else x / 255]

    def alone(form):                            # seconds of the loss, forward and backward
        leaves = [z_.detach().requires_grad_() for z_ in z]
        sync(), (start := time.perf_counter())
        loss_of(leaves, form).backward()
        sync()
        return time.perf_counter() - start

    parts, z = run(itertools.repeat([noise(views) for views in data[0]]))
    columns, memory = {"made-up tensors": parts}, peak(device.type)
    if not isinstance(data, NoFiles):
        epochs = (epoch_batches(len(data), N, args.seed, e).tolist() for e in itertools.count())
        columns["files"] = run(load(batch_sampler=itertools.chain.from_iterable(epochs)))[0]
    where = torch.cuda.get_device_name() if cuda else f"CPU threads: {torch.get_num_threads()}"
    print(f"{args.scenario}  {args.method}  {args.backbone}  {args.projector}  {args.size} px  "
          f"N {N}  {where}  torch {torch.__version__}")
    print(f"{'ms a step':15s}" + "".join(f"{name:>22s}" for name in columns))
    for part in parts:
        cells = (f"{1e3 * c[part]:14.1f}{c[part] / sum(c.values()):8.1%}" for c in columns.values())
        print(f"  {part:13s}" + "".join(cells))
    print(f"{'pairs/s':15s}" + "".join(f"{N / sum(c.values()):14.1f}{'':8s}"
                                       for c in columns.values()).rstrip())
    if isinstance(data, NoFiles):
        print(f"files: not measured: no files under {args.data}")
    print(f"peak memory {memory / 2**30:.2f} GiB{'' if cuda else ' (of the process)'}")
    if args.method == "decur" and not args.no_intra:
        gram, KxK = (min(alone(form) for _ in range(3)) for form in (decur_loss_gram, decur_loss))
        print(f"loss, forward and backward: {1e3 * gram:.1f} ms; as Algorithm 1 prints it "
              f"{1e3 * KxK:.1f} ms, {KxK / (sum(parts.values()) - gram + KxK):.1%} of such a step")


# ---- command line ----

def defaults(scenario, method, backbone, toy):
    """[(settings, their source)]: the first that names a setting is its default."""
    return [(METHODS[method][1], f"--method {method}"),
            (SEGFORMER if backbone in MITS else {}, "paper, App. B; see SEGFORMER"),
            ((TOY_SAR if scenario == "sar-optical" else TOY) if toy else {}, "--toy"),
            (SCENARIOS[scenario], "paper, Sec. 4"), (PAPER, "paper, Sec. 4 and App. B"),
            (REST, "default")]


def get_args(argv=None):
    """The settings, each resolved to a value and its source.  Returns (args, {name: source})."""
    parser = argparse.ArgumentParser(
        description="DeCUR pretraining (Algorithm 1). A setting that is not given is the paper's "
                    "for the scenario; --batch-size is that of all processes together.",
        allow_abbrev=False)
    add = parser.add_argument
    add("--scenario", required=True, choices=SCENARIOS,
        help="which two modalities, and their settings")
    add("--toy", action="store_true",
        help="made-up scenes, made under data/toy-SCENARIO at first use, and small settings")
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="default: data/SCENARIO")
    for k in (1, 2):
        add(f"--data{k}", metavar="DIR", help=f"with custom: images of modality {k}")
        add(f"--augment{k}", choices=AUGMENTATIONS, metavar="MODALITY",
            help=f"with custom: augment modality {k} as this: {', '.join(AUGMENTATIONS)}")
    add("--split",
        help="frames to use: all, train or test; default: all, rgb-dem and --toy train (Sec. 4)")
    add("--depth-unit", type=float,
        help="steps of a depth file a metre; default: 1000, millimetres")
    add("--size", type=int, help="crop in pixels; default: 224")
    add("--workers", type=int, help="processes that read files; default: on CUDA up to 8, else 0")
    add = parser.add_argument_group("model").add_argument
    add("--method", choices=METHODS, default="decur", help="Tables 1-3; default: decur")
    add("--modality", type=int, choices=(1, 2),
        help="barlowtwins of two views of this one (Tables 1-2)")
    add("--backbone", choices=[*RESNETS, *MITS], help="default: resnet50; a mit trains with AdamW")
    add("--weights", nargs="+", metavar="FILE",
        help="start from a file with both encoders, from one for each, or from imagenet")
    add("--bgr", action="store_true", help="--weights saw BGR images, as the DeCUR authors' did")
    add("--projector", metavar="WIDTHS", help="widths like 8192-8192-8192, or none (Fig. 3b)")
    add("--common", type=float,
        help="fraction of common dimensions, 0 to 1; 1: w/o decoup. (Table 4)")
    add("--no-intra", action="store_true", help="without L1 and L2: w/o intra (Table 4)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, help="default: 100, rgbd 200")
    add("--batch-size", type=int, help="the global one; default: 256, rgbd 128")
    add("--lr", type=float, help="of the weights; default: 0.2, mit 1e-4")
    add("--lr-bias", type=float, help="of biases and norms; default: 0.0048, mit 1e-4")
    add("--weight-decay", type=float, help="of the weights; default: 1e-6, mit 0.01")
    add("--seed", type=int, default=0, help="of everything random; default: 0")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path,
        help="default: runs/SCENARIO-METHOD, with --toy runs/toy-SCENARIO-METHOD")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--save-every", type=float, default=30, metavar="MINUTES",
        help="between checkpoints, besides one an epoch; default: 30")
    add("--benchmark", action="store_true",
        help="time steps with these settings for about a minute; writes nothing into --out")
    args = parser.parse_args(argv)
    sources = {name: "default" if value == parser.get_default(name) else "command line"
               for name, value in vars(args).items() if value is not None and value is not False}
    for table, source in defaults(args.scenario, args.method, args.backbone, args.toy):
        for name, value in table.items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
                sources[name] = source
    toy = "toy-" if args.toy else ""
    if args.scenario == "custom":
        if args.toy or not (args.data1 and args.data2):
            raise BadInput("--scenario custom: expected --data1 and --data2, a folder each, and "
                           "neither --data nor --toy")
        args.data = [args.data1, args.data2]
    args.data = args.data or f"data/{toy}{args.scenario}"
    args.out = args.out or Path(f"runs/{toy}{args.scenario}-{args.method}{args.modality or ''}")
    widths = args.projector.split("-") if args.projector != "none" else []
    checks = (
        (all(w.isdecimal() and int(w) > 0 for w in widths), "--projector",
         "widths like 8192-8192-8192, or none"),
        (0 <= args.common <= 1, "--common", "a fraction from 0 to 1"),
        (args.method == "decur" or args.common == 1, "--common",
         f"nothing else for --method {args.method} than 1"),
        (args.method == "decur" or not args.no_intra, "--no-intra", "--method decur"),
        (args.method == "barlowtwins" or not args.modality, "--modality",
         "it with --method barlowtwins alone"),
        (not args.bgr or args.weights and args.scenario != "sar-optical", "--bgr",
         "it with --weights for RGB images"),
        *((args.scenario == "custom" or not getattr(args, name), f"--{name}",
           "it with --scenario custom") for name in ("data1", "data2", "augment1", "augment2")),
        (args.size >= 16, "--size", "16 or more"),
        (args.size >= 32 or args.backbone not in MITS, "--size", "32 or more for a mit"),
        (args.epochs > 0, "--epochs", "1 or more"),
        (args.batch_size > 1, "--batch-size", "2 or more"),
        (0 <= args.seed < 2 ** 63, "--seed", "0 or more, of 63 bits"),
        ((args.workers or 0) >= 0, "--workers", "0 or more"),
        (args.lr > 0, "--lr", "more than 0"), (args.lr_bias > 0, "--lr-bias", "more than 0"),
        (args.weight_decay >= 0, "--weight-decay", "0 or more"),
        (args.depth_unit > 0, "--depth-unit", "more than 0"),
        (args.save_every > 0, "--save-every", "more than 0 minutes"))
    for fine, flag, expected in checks:
        if not fine:
            value = getattr(args, flag[2:].replace("-", "_"))
            raise BadInput(f"{flag}{'' if value is True else f' {value}'}: expected {expected}")
    args.widths = [int(w) for w in widths]
    return args, sources


def main():
    args, sources = get_args()
    rank, world, device = start_processes()
    say = print if rank == 0 else lambda *_: None
    N = args.batch_size
    if args.benchmark and world > 1:
        raise BadInput(f"--benchmark on {world} processes; expected one: python, not torchrun")
    if N % world:
        raise BadInput(f"--batch-size {N} is not a multiple of {world} processes; "
                       f"try {max(2, N // world) * world}")
    if N // world < 2:
        raise BadInput(f"--batch-size {N} leaves {N // world} sample to each of {world} processes, "
                       f"too few for batch normalisation; at least {2 * world}")

    # ---- data ----
    if args.toy and rank == 0:
        make_toy(args.scenario, args.data)
    agreed(False, device)                       # the others wait until the scenes are there
    if args.benchmark and args.scenario != "custom" and not Path(args.data).is_dir():
        data = NoFiles(args.scenario, args.size)
    else:
        data = open_pairs(args.scenario, args.data, args.size, args.split, args.depth_unit,
                          args.seed, augment_as=(args.augment1, args.augment2))
    if N > len(data):
        raise BadInput(f"--batch-size {N} is more than the {len(data)} pairs; at most {len(data)}")
    steps_per_epoch = len(data) // N
    steps = args.epochs * steps_per_epoch
    rows = slice(rank * N // world, (rank + 1) * N // world)  # of the global batch, this process's
    draws = Draws(args.seed, N, rows)
    augment1, augment2 = (partial(augment, modality=modality, size=args.size, draws=draws)
                          for modality in data.modalities)
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(8, cores) if device.type == "cuda" else 0
    workers = workers if args.workers is None else args.workers
    load = partial(DataLoader, data, collate_fn=collate, num_workers=workers,
                   worker_init_fn=leave_group, pin_memory=device.type == "cuda")

    # ---- model and optimiser ----
    torch.manual_seed(args.seed)
    channels1, channels2 = (views[0].shape[0] for views in data[0])
    # What is encoded; made are all four views, so that every method sees the same pixels.
    if args.modality:                           # two views of one modality
        encoded = [args.modality == m for m in (1, 1, 2, 2)]
    else:                                       # x12 and x22 stand in intra-modal terms alone
        encoded = [True, args.method == "decur" and not args.no_intra] * 2
    net = DeCUR(args.backbone, channels1, channels2, args.widths, encoded)
    K = args.widths[-1] if args.widths else next(net.children()).E.dims[-1]
    Kc = round(args.common * K)
    if device.type == "cuda" and world > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif world > 1:
        say(f"warning: on {world} CPU processes torch cannot synchronise batch normalisation; each "
            f"uses its {N // world} samples in encoders and projectors (the loss is of all {N})")
    net.to(device)
    if device.type == "cpu":                    # convolutions are faster so; elsewhere not measured
        net.to(memory_format=torch.channels_last)
    model = DistributedDataParallel(net) if world > 1 else net
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [dict(params=weights, lr=args.lr, weight_decay=args.weight_decay),
              dict(params=others, lr=args.lr_bias, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups) if args.backbone in MITS else LARS(groups)
    base_lr = [group["lr"] for group in optimizer.param_groups]

    if args.benchmark:
        return benchmark(args, data, load, augment1, augment2, draws, net, optimizer, Kc, device)

    # ---- the run's folder ----
    settings = {name: value for name, value in vars(args).items() if name not in RUN_ONLY}
    settings |= dict(K=K, Kc=Kc, pairs=len(data), modalities=list(data.modalities),
                     channels=[channels1, channels2],
                     inputs=[MODALITIES[m] for m in data.modalities])
    checkpoint_file, log_file = args.out / "checkpoint.pt", args.out / "log.jsonl"
    step = go_on(checkpoint_file, settings, net, optimizer, args.resume, device)
    if not step and args.weights:
        for line in start_from(args.weights, [f.E for f in net.children()], args):
            say(line)
    save = partial(save_checkpoint, checkpoint_file, net, optimizer, settings=settings)
    if rank == 0:
        lock = open_folder(args.out, dict(settings, argv=sys.argv, data=args.data, processes=world,
                                          device=str(device)), step)  # noqa: F841, held to the end
        introduce(args, sources, data, net, steps, K, Kc, device, world)
        if step:
            print(f"resumed from {checkpoint_file} at step {step} of {steps}")

    # ---- Algorithm 1 ----
    stopped = signals_to_come()
    bar = tqdm(total=steps, initial=step, unit="step", disable=rank > 0 or None, dynamic_ncols=True)
    every = 1 if steps < 500 else 50
    saved, logged, logged_step = time.time(), time.time(), step
    for epoch in range(step // steps_per_epoch, args.epochs):
        data.epoch = epoch
        batches = epoch_batches(len(data), N, args.seed, epoch)[step % steps_per_epoch:, rows]
        loader = load(batch_sampler=batches.tolist())
        for x1, x2 in loader:                                           # load a batch of pairs
            draws.restart(step)
            torch.manual_seed(mixed(args.seed, step, 1 + rank))         # for drop path
            x1, x2 = both_views(x1, device), both_views(x2, device)
            # two augmented views for each modality
            x11, x12 = augment1(x1[0]), augment1(x1[1])                 # NxCxSxS
            x21, x22 = augment2(x2[0]), augment2(x2[1])                 # NxCxSxS
            # compute embeddings: f1(x11), f1(x12), f2(x21), f2(x22)
            with mixed_precision(device):
                z = model(x11, x12, x21, x22)
            z = [z_ if z_ is None else gather(z_.float()) for z_ in z]  # NxK, N the global batch
            z11, z12, z21, z22 = z                                      # None: not of this method
            # calculate losses: Eq. 6, or those of Tables 1-3
            if args.method == "decur":
                loss, parts = decur_loss_gram(z11, z12, z21, z22, Kc, intra=not args.no_intra)
            else:
                loss, parts = METHODS[args.method][0](*(z_ for z_ in z if z_ is not None)), {}
            if not loss.isfinite():
                parts = " ".join(f"{name} {part:.4g}" for name, part in parts.items())
                sys.exit(f"the loss is {loss.item()} at step {step + 1} ({parts}); what was saved "
                         f"before stays; look at the data, or take a smaller --lr or --lr-bias")
            # optimization
            for group, lr in zip(optimizer.param_groups, base_lr):
                group["lr"] = lr * cosine(step, steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            step += 1
            bar.update()
            if rank == 0 and (step % every == 0 or step in (1, steps)):
                now = time.time()
                log = dict(epoch=epoch + 1, step=step, loss=loss.item(),
                           **{name: part.item() for name, part in parts.items()},
                           **{f"std{m}": z_.std(0).mean().item()
                              for m, z_ in ((1, z11), (2, z21)) if z_ is not None},
                           lr=optimizer.param_groups[0]["lr"],
                           pairs_per_s=N * (step - logged_step) / (now - logged))
                logged, logged_step = now, step
                tqdm.write(log_line(log, args.epochs, steps))
                with open(log_file, "a") as file:
                    file.write(json.dumps(log) + "\n")
            stop = agreed(bool(stopped), device)
            due = step % steps_per_epoch == 0 or time.time() - saved > 60 * args.save_every
            if rank == 0 and (stop or due):
                save(step=step)
                saved = time.time()
            if stop:
                bar.close()
                say(f"stopped after step {step} of {steps} and saved {checkpoint_file}; "
                    f"to go on, give the same command with --resume")
                return
    bar.close()
    if rank == 0:
        for m, modality, f in zip((1, 2), data.modalities, (net.f1, net.f2)):
            if f is not None:
                export(args.out / f"encoder{m}.pth", f.E, dict(
                    modality=modality, input="values in [0, 1], then (x - mean) / std",
                    **MODALITIES[modality], backbone=args.backbone, method=args.method,
                    epoch=args.epochs, settings=settings))
        print(f"wrote checkpoint.pt, the encoders, log.jsonl and args.json into {args.out}")


def introduce(args, sources, data, net, steps, K, Kc, device, world):
    """What runs, each setting with its source, and the loss by chance and at the least (README)."""
    print(" ".join(sys.argv))
    root = " and ".join(args.data) if isinstance(args.data, list) else args.data
    print(f"{len(data)} pairs of {data.modalities[0]} and {data.modalities[1]} from {root}; "
          f"{steps} steps on {processes(world)}, {device.type}; "
          f"torch {torch.__version__}")
    for name, source in sources.items():
        print(f"  {name.replace('_', '-'):14s} {str(getattr(args, name)):16s} {source}")
    count = [f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
             for f in net.children() for part in (f.E, f.P)]
    print(f"parameters: encoders {' + '.join(count[::2])}, projectors {' + '.join(count[1::2])}")
    N = args.batch_size
    terms = {} if args.no_intra else dict(L1=chance_and_floor(N, K), L2=chance_and_floor(N, K))
    terms |= dict(Lc=chance_and_floor(N, Kc)) if Kc else {}
    terms |= dict(Lu=chance_and_floor(N, K - Kc, unique=True)) if Kc < K else {}
    print(f"N {N}  K {K}  Kc {Kc}")
    if args.method != "decur":
        return
    for i, what in enumerate(("chance (independent embeddings)", "floor (no batch goes below)")):
        parts = " + ".join(f"{name} {term[i]:.1f}" for name, term in terms.items())
        print(f"  {what:32s} loss {sum(term[i] for term in terms.values()):.1f} = {parts}")


def log_line(log, epochs, steps):
    terms = " + ".join(f"{L} {log[L]:.1f}" for L in ("L1", "L2", "Lc", "Lu") if L in log)
    diagonals = " ".join(f"{C} {log[C]:.2f}" for C in ("C1", "C2", "Cc", "Cu") if C in log)
    terms = f"{log['loss']:.1f} = {terms}  diag {diagonals}" if terms else \
        f"{log['loss']:.4f}"                    # SimCLR's are below 7
    stds = " ".join(f"{log[name]:.2f}" for name in ("std1", "std2") if name in log)
    return (f"epoch {log['epoch']:03d}/{epochs} step {log['step']:06d}/{steps:06d}  loss {terms}  "
            f"std {stds}  lr {log['lr']:.4g}  {log['pairs_per_s']:.0f} pairs/s")


def run(main):
    """main(), with bad input as one line on stderr and exit code 2."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    try:
        main()
    except (BadInput, OSError) as error:        # a loader's worker puts its traceback before it
        line = str(error).strip().splitlines()[-1].removeprefix("data.BadInput: ")
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)                           # as a shell has it
    if dist.is_initialized():                   # after an error it could wait for the others
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
