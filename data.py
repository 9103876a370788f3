"""From files to batches: readers, one normaliser per modality, data sets, augmentations and made-up scenes.

RGB-depth, the folder form of CMX and its relatives (`--scenario rgbd`):

    data/rgbd/RGB/<stem>.jpg        colour, jpg or png
    data/rgbd/Depth/<stem>.png      16 bit, --depth-unit steps a metre (1000: millimetres); 0 and 65535 are no reading
    data/rgbd/HHA/<stem>.png        or, in its place, depth encoded as HHA (Gupta et al., 2014), jpg or png: the paper's
    data/rgbd/Label/<stem>.png      optional: classes for finetune.py, 0 is unlabelled
    data/rgbd/train.txt test.txt    optional: a stem a line (a path or a suffix around it is taken off)

Frames may differ in size: the loader brings all of them to one canvas of 3/2 S x 2 S pixels for crops of S (336 x 448
for 224), antialiased.  The aspect ratios of the sensors lie within 4 % of that 4:3, and the smallest crop that Sec. 4's
augmentation draws, half the area, still covers S x S pixels of it.

A data set gives (views1, views2) for an index: lists of one CxHxW tensor, of which both augmented views are made, or of
two, one for each view.  uint8, or float32 in [0, 1].  `python data.py toy --scenario rgbd` writes the made-up scenes.
"""
import argparse
import csv
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


class BadInput(Exception):
    """What the user gave cannot be used: one line that says what was got, what was expected, and what to do."""


# ---- one normaliser per modality: what an encoder sees, in pretraining, transfer and explanation ----

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
MODALITIES = {                                  # mean and std of x in [0, 1]
    "rgb": dict(bands=("red", "green", "blue"), **IMAGENET),
    # Three channels in [0, 1], so the statistics of the authors, who used ImageNet's for HHA too.
    "hha": dict(bands=("disparity", "height", "angle"), **IMAGENET),
    # Metres / 10, clipped; mean and std of SUN RGB-D (2.38 m, 1.24 m).  No reading stands at the mean: 0 once normalised.
    "depth": dict(bands=("depth",), mean=(0.238,), std=(0.124,)),
}
MAX_DEPTH = 10.0                                # m


def unit(x):
    """uint8 -> float32 in [0, 1]; float tensors are there already."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def normalise(x, modality):
    """x: BxCxHxW in [0, 1] -> mean 0 and standard deviation 1 over the data set, band by band."""
    mean, std = (torch.tensor(MODALITIES[modality][key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (x - mean.to(x.device)) / std.to(x.device)


# ---- readers ----

def opened(path):
    """A Pillow image with its pixels read, or BadInput that names the file."""
    try:
        image = Image.open(path)
        image.load()
        return image
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a truncated or foreign file
        raise BadInput(f"{path} cannot be read ({error}); copy or download it again") from None


def read_rgb(path, canvas):
    """An image file -> 3xHxW uint8 on the canvas (H, W)."""
    image = opened(path).convert("RGB").resize(canvas[::-1], Image.Resampling.BILINEAR)  # antialiased where it shrinks
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_depth(path, canvas, depth_unit):
    """A 16-bit depth file -> 1xHxW float32, metres / MAX_DEPTH in [0, 1]; pixels without a reading have the mean."""
    raw = np.array(opened(path))
    if raw.ndim != 2 or raw.dtype == np.uint8:
        raise BadInput(f"{path} is {raw.dtype} {raw.shape}; expected depth as one 16-bit channel, not a picture of it")
    valid = (raw > 0) & (raw < 65535)
    if not valid.any():
        raise BadInput(f"{path} has no valid depth (every pixel is 0 or 65535); take the frame out")
    z, seen = resized(np.where(valid, raw / depth_unit, 0), canvas), resized(valid, canvas)
    z = np.where(seen > 0, z / np.maximum(seen, 1e-6) / MAX_DEPTH, MODALITIES["depth"]["mean"])  # mean of valid pixels
    return torch.from_numpy(z.clip(0, 1).astype(np.float32))[None]


def resized(a, canvas):
    return np.array(Image.fromarray(a.astype(np.float32)).resize(canvas[::-1], Image.Resampling.BILINEAR))


# ---- data sets ----

class RGBD:
    """Frames in folder form.  Gives ([3xHxW uint8], [1xHxW float32 depth or 3xHxW uint8 HHA]), HxW the canvas.

    split: "all" (the paper pretrains on all 10,335 frames of SUN RGB-D), or the name of a list: "train", "test".
    Raises BadInput for a folder that is not the layout, an image without its partner, an unknown name in a list.
    """

    def __init__(self, root, size, split="all", depth_unit=1000.0):
        root = Path(root)
        self.canvas, self.depth_unit = (size * 3 // 2, size * 2), depth_unit
        self.files1 = stems(root / "RGB")
        self.modalities = ("rgb", "hha" if (root / "HHA").is_dir() else "depth")
        folder = root / ("HHA" if self.modalities[1] == "hha" else "Depth")
        self.files2 = stems(folder)
        if lonely := sorted(self.files1.keys() ^ self.files2.keys()):
            raise BadInput(f"{len(lonely)} of the frames under {root} stand in only one of RGB and {folder.name} "
                           f"(the first: {lonely[0]}); take them out or add their partners")
        self.ids = sorted(self.files1) if split == "all" else read_list(root / f"{split}.txt", self.files1)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        path1, path2 = self.files1[self.ids[i]], self.files2[self.ids[i]]
        hha = self.modalities[1] == "hha"
        return [read_rgb(path1, self.canvas)], \
            [read_rgb(path2, self.canvas) if hha else read_depth(path2, self.canvas, self.depth_unit)]


def stems(folder):
    """The image files of a folder as {stem: path}; BadInput where there is none."""
    files = {path.stem: path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")}
    if not files:
        raise BadInput(f"no jpg or png under {folder}; expected RGB/, and Depth/ or HHA/, with equal stems there: the "
                       f"first lines of data.py show the tree; or try the made-up scenes: --toy")
    return files


def read_list(path, files):
    """train.txt or test.txt -> its stems, in its order; lines like `RGB/7.jpg<TAB>Label/7.png` are understood."""
    if not path.is_file():
        raise BadInput(f"no {path}; expected a list with a stem a line, or use --split all")
    ids = [Path(line.split()[0]).stem for line in path.read_text().splitlines() if line.strip()]
    if not ids:
        raise BadInput(f"{path} is empty; expected a stem a line")
    if unknown := [i for i in ids if i not in files]:
        raise BadInput(f"{path} names {unknown[0]}, which has no image (and {len(unknown) - 1} more); mend the list")
    return ids


def open_pairs(scenario, root, size, split="all", depth_unit=1000.0, seed=0):
    """The data set of a scenario.  Raises BadInput with the path, the layout and the remedy where there is none."""
    if not Path(root).is_dir():
        raise BadInput(f"no folder {root}; expected RGB/, and Depth/ or HHA/, in it (the first lines of data.py show the "
                       f"tree); give --data DIR, or try the made-up scenes: --toy")
    return RGBD(root, size, split, depth_unit)


def collate(samples):
    """Samples -> (x1, x2), each a pair of BxCxHxW batches: of two views, or twice the same where there is but one."""
    batches = [[torch.stack(view) for view in zip(*modality)] for modality in zip(*samples)]
    return tuple((views[0], views[-1]) for views in batches)


def epoch_batches(n, batch_size, seed, epoch):
    """The data order: a permutation of 0..n-1, a function of (seed, epoch) alone, cut into global batches.

    Returns n // batch_size x batch_size indices; the last incomplete batch is dropped.  A rank takes its columns.
    """
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[:n // batch_size * batch_size].reshape(-1, batch_size)


# ---- augmentations, Sec. 4: batched, on any device, each image with parameters of its own ----

# The paper follows BYOL (Grill et al., 2020, App. B).  BYOL treats its two views unequally; Algorithm 1 has one augment1
# for both, so the probabilities of blur (1 and 0.1) and solarize (0 and 0.2) are BYOL's mean, near what the authors ran.
# Their crops are kept too, (0.5, 1) of the area indoors where BYOL has (0.08, 1): two modalities are cropped
# independently, and small crops of one scene would show different things.
BYOL = dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.1)
AUGMENTATIONS = {
    "rgb": dict(scale=(0.5, 1.0), **BYOL),
    "hha": dict(scale=(0.5, 1.0)),              # Sec. 4: crop and horizontal flip only
    "depth": dict(scale=(0.5, 1.0)),            # not in the paper: as HHA
}


class Draws:
    """Uniform random numbers for the images of the global batch, of which this process takes its rows.

    One CPU generator, seeded anew at each step: what a sample looks like depends on (seed, step) and on its place in the
    global batch, never on the number of processes or workers, the device, or a restart.
    """

    def __init__(self, seed, batch_size, rows):
        self.seed, self.batch_size, self.rows = seed, batch_size, rows

    def restart(self, step):
        self.generator = torch.Generator().manual_seed(mixed(self.seed, step))

    def __call__(self, n):
        return torch.rand(self.batch_size, n, generator=self.generator)[self.rows]  # Bxn in [0, 1)


def mixed(*numbers):
    """One seed out of several integers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def augment(x, modality, size, draws):
    """augment1 or augment2 of Algorithm 1.  x: BxCxHxW, uint8 or float in [0, 1].  Returns BxCxSxS, normalised."""
    has = AUGMENTATIONS[modality]
    x = random_resized_crop(unit(x), size, has["scale"], draws)
    if "jitter" in has:
        x = random_colour(x, has["jitter"], has["jitter_p"], has["gray_p"], draws)
        x = random_blur(x, has["blur_p"], draws)
        x = random_solarize(x, has["solarize_p"], draws)
    return normalise(x, modality)


def random_resized_crop(x, size, scale, draws, ratio=(3 / 4, 4 / 3)):
    """A box of `scale` of the area and of an aspect ratio drawn log-uniformly, resized, flipped with probability 1/2.

    Ten tries for a box that fits, as torchvision; then the largest centred one.  Resizing with a triangle filter is two
    matrix products, with rows of weights for each image; it equals F.interpolate(antialias=True) of the crop.
    """
    B, C, H, W = x.shape
    u = draws(23).double()                                              # Bx23
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[:, :10])       # Bx10
    log_ratio = np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * u[:, 10:20]
    w = (area * log_ratio.exp()).sqrt().round()                         # Bx10
    h = (area / log_ratio.exp()).sqrt().round()                         # Bx10
    fits = torch.cat([(w <= W) & (h <= H), torch.ones(B, 1, dtype=bool)], 1)
    first = fits.int().argmax(1, keepdim=True)                          # Bx1
    w = torch.cat([w, torch.full((B, 1), min(W, round(H * ratio[1])))], 1).gather(1, first)  # Bx1
    h = torch.cat([h, torch.full((B, 1), min(H, round(W / ratio[0])))], 1).gather(1, first)  # Bx1
    centred = first == 10
    left = torch.where(centred, (W - w) // 2, (u[:, 20:21] * (W - w + 1)).floor())
    top = torch.where(centred, (H - h) // 2, (u[:, 21:22] * (H - h + 1)).floor())
    Wx, Wy = triangle_filter(left, w, W, size), triangle_filter(top, h, H, size)  # BxSxW, BxSxH
    Wx = torch.where(u[:, 22].view(-1, 1, 1) < 0.5, Wx.flip(1), Wx)     # horizontal flip
    return separable(x, Wy, Wx)                                         # BxCxSxS


def triangle_filter(start, length, n_in, n_out):
    """Rows of weights that resize n_in pixels, of which [start, start + length) are used, to n_out.  -> Bxn_outxn_in."""
    step = length / n_out                                               # Bx1
    centre = start + (torch.arange(n_out) + 0.5) * step                 # Bxn_out
    pixel = torch.arange(n_in)
    distance = (pixel + 0.5 - centre[..., None]) / step.clamp(min=1)[..., None]
    weight = (1 - distance.abs()).clamp(min=0)
    weight = weight * ((pixel >= start) & (pixel < start + length))[:, None]
    return (weight / weight.sum(-1, keepdim=True)).float()


def separable(x, Wy, Wx):
    """Filter the columns with Wy: BxSyxH and the rows with Wx: BxSxxW.  x: BxCxHxW -> BxCxSyxSx."""
    return Wy.to(x.device)[:, None] @ x @ Wx.to(x.device)[:, None].mT


def random_colour(x, jitter, jitter_p, gray_p, draws):
    """Brightness, contrast, saturation and hue jitter, then grayscale, for any number of channels: one affine map each.

    Brightness b and contrast c are x -> c b x + (1 - c) b m with m the image's mean luma; saturation s blends with the
    luma; hue turns the colour about the grey axis, which is linear, unlike a shift of HSV's hue (they differ little up to
    0.1 of a turn); grayscale is s = 0.  Paper: BYOL draws the order of the four.  Here: this order, so that they fold.
    """
    B, C, shape = *x.shape[:2], x.shape
    u = draws(6)                                                        # Bx6
    jittered = (u[:, :1] < jitter_p).float()
    b, c, s, turn = (jittered * (2 * u[:, 1:5] - 1) * torch.tensor(jitter)).unbind(1)  # B each, around 0
    b, c, s = (1 + v.view(-1, 1, 1) for v in (b, c, s))                 # Bx1x1, around 1
    s = torch.where(u[:, 5].view(-1, 1, 1) < gray_p, 0, s)
    luma = torch.tensor([0.299, 0.587, 0.114]) if C == 3 else torch.full((C,), 1 / C)
    A = s * torch.eye(C) + (1 - s) * luma.expand(C, C)                  # BxCxC, rows of ones map to ones
    if C == 3:
        A = hue_rotation(2 * np.pi * turn) @ A
    luma, b, c, A = (v.to(x.device) for v in (luma, b, c, A))
    mean = (x.mean((2, 3)) @ luma).view(-1, 1, 1)                       # Bx1x1
    x = (c * b * A) @ x.flatten(2) + (1 - c) * b * mean                 # BxCxHW
    return x.clamp(0, 1).view(shape)


def hue_rotation(angle):
    """Bx3x3: turns colours by `angle` (B, radians) about the grey axis (1, 1, 1), red towards green."""
    grey = torch.full((3, 3), 1 / 3)                                    # projects on the axis
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3 ** 0.5  # a quarter turn about it
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return grey + cos * (torch.eye(3) - grey) + sin * turn


def random_blur(x, blur_p, draws, sigma=(0.1, 2.0)):
    """Gaussian blur of the images that draw it; sigma in pixels of a 224-pixel crop, scaled with the crop."""
    u, S = draws(2), x.shape[-1]
    chosen = (u[:, 0] < blur_p).nonzero()[:, 0]
    width = (sigma[0] + (sigma[1] - sigma[0]) * u[chosen, 1]) * S / 224
    pixel = torch.arange(S, dtype=torch.float32)
    G = torch.exp(-0.5 * ((pixel[:, None] - pixel) / width.view(-1, 1, 1)) ** 2)  # bxSxS
    G = G / G.sum(-1, keepdim=True)                                     # cut off at the border and normalised
    chosen_here = chosen.to(x.device)
    return x.index_copy(0, chosen_here, separable(x[chosen_here], G, G))


def random_solarize(x, solarize_p, draws):
    chosen = (draws(1) < solarize_p).view(-1, 1, 1, 1).to(x.device)
    return torch.where(chosen & (x >= 0.5), 1 - x, x)


# ---- made-up scenes: known factors, one in both modalities and one in each alone, in the scenario's own layout ----

# Each scene holds three objects: one that both sensors see, one that only sensor 1 sees, one that only sensor 2 sees.
# A factor is the shape of one of them.  All shapes have the same area, and position, size and rotation are drawn at
# random over clutter and noise, so that a randomly initialised encoder reads a factor near chance.
SHAPES = ("disk", "ring", "cross", "triangle")
SCENE_CLASSES = ("background", *(f"{which} {shape}" for which in ("common", "unique1", "unique2") for shape in SHAPES))


def draw_shape(shape, u, v):
    """Coverage of the shape of area 4, 0 or 1, at the coordinates u, v (any equal shapes) of its own axes."""
    r, a, b = np.hypot(u, v), np.abs(u), np.abs(v)
    if shape == "disk":
        return r < 1.128
    if shape == "ring":
        return (r < 1.38) & (r > 0.795)
    if shape == "cross":
        return (np.minimum(a, b) < 0.36) & (np.maximum(a, b) < 1.57)
    return (v < 0.877) & (3 ** 0.5 * a - v < 2 * 0.877)  # triangle, equilateral


def place(rng, H, W, rows, columns):
    """A random shape, its centre within rows and columns (fractions of H and W).  Returns its class and mask, HxW."""
    shape = int(rng.integers(len(SHAPES)))
    y, x = rng.uniform(*rows) * H, rng.uniform(*columns) * W
    r, turn = rng.uniform(0.13, 0.17) * H, rng.uniform(0, 2 * np.pi)
    fine = (np.mgrid[0:2 * H, 0:2 * W] + 0.5) / 2                       # two samples a pixel each way: antialiased
    dy, dx = (fine[0] - y) / r, (fine[1] - x) / r
    mask = draw_shape(SHAPES[shape], np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx)
    return shape, mask.reshape(H, 2, W, 2).mean((1, 3))


def smooth_noise(rng, H, W, cells):
    """Clutter: HxW, bilinear between random values in [-1, 1] on a coarse grid."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.array(coarse.resize((W, H), Image.Resampling.BICUBIC))


def indoor_scene(rng, H=48, W=64):
    """A room: an object before the wall, a painting on it (RGB alone), a glass pane in it (depth alone).

    Returns rgb HxWx3 uint8, depth HxW uint16 mm, label HxW uint8 (0 none, then SCENE_CLASSES + 1), the three classes.
    """
    sides = rng.permutation([(0.2, 0.35), (0.65, 0.8)])
    common, m_common = place(rng, H, W, (0.6, 0.76), (0.25, 0.75))
    unique1, m_paint = place(rng, H, W, (0.24, 0.4), sides[0])
    unique2, m_pane = place(rng, H, W, (0.24, 0.4), sides[1])
    m_paint, m_pane = (m * (1 - m_common) for m in (m_paint, m_pane))
    wall, thing, paint = (grey + rng.uniform(-0.05, 0.05, 3) for grey in (0.5, 0.9, 0.1))
    rgb = wall + 0.3 * np.stack([smooth_noise(rng, H, W, 16) for _ in range(3)], -1)
    rgb = rgb + (thing - rgb) * m_common[..., None] + (paint - rgb) * m_paint[..., None]
    rgb = rgb + rng.normal(0, 0.04, rgb.shape)
    z = 3 + 0.25 * smooth_noise(rng, H, W, 16) + 0.8 * (m_pane - m_common)  # m
    z = z + rng.normal(0, 0.03, z.shape)
    z[rng.random(z.shape) < 0.01] = 0           # no reading
    label = np.ones((H, W), np.uint8)
    for which, (shape, mask) in enumerate(((unique2, m_pane), (unique1, m_paint), (common, m_common))):
        label[mask > 0.5] = 2 + (2 - which) * len(SHAPES) + shape
    return (rgb.clip(0, 1) * 255).astype(np.uint8), (z * 1000).astype(np.uint16), label, (common, unique1, unique2)


def make_toy(scenario, root, scenes=2048, held_out=512, seed=0):
    """Writes the scenario's made-up scenes under root, once: they appear as a whole or not at all.

    Beside the layout stands factors.csv: id, common, unique1, unique2, the classes as indices of SHAPES.
    """
    root = Path(root)
    if root.is_dir():
        return
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for folder in ("RGB", "Depth", "Label"):
        (part / folder).mkdir(parents=True)
    factors = [("id", "common", "unique1", "unique2")]
    for i in tqdm(range(scenes + held_out), desc=f"making {root}", unit="scene"):
        rgb, depth, label, classes = indoor_scene(np.random.default_rng((seed, i)))
        for folder, image in (("RGB", rgb), ("Depth", depth), ("Label", label)):
            Image.fromarray(image).save(part / folder / f"{i:04d}.png", compress_level=1)
        factors.append((f"{i:04d}", *classes))
    for split, rows in (("train", factors[1:scenes + 1]), ("test", factors[scenes + 1:])):
        (part / f"{split}.txt").write_text("".join(f"{row[0]}\n" for row in rows))
    with open(part / "factors.csv", "w", newline="") as file:
        csv.writer(file).writerows(factors)
    os.replace(part, root)


def main():
    parser = argparse.ArgumentParser(description="Data set commands.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="write the made-up scenes of a scenario, as --toy does", allow_abbrev=False)
    toy.add_argument("--scenario", required=True, choices=["rgbd"])
    toy.add_argument("--out", help="default: data/toy-SCENARIO")
    args = parser.parse_args()
    out = args.out or f"data/toy-{args.scenario}"
    if Path(out).exists():
        raise BadInput(f"{out} exists; expected a new --out, or delete it to make the scenes anew")
    make_toy(args.scenario, out)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
