"""From files to batches: readers, normalisers, HHA, data sets, augmentations, made-up scenes.

SAR-optical, SSL4EO-S12 v1.0 (not v1.1, which is zarr and has other values); one GeoTIFF a band:

    data/sar-optical/s1/<id>/<season>/VV.tif VH.tif             float32 dB, S x S pixels, S = 264
    data/sar-optical/s2c/<id>/<season>/B1.tif ... B12.tif       uint16, x 10000; S, S/2 or S/6 wide
    data/sar-optical/packed/ids.txt season?.npy                 made by `data.py pack`: read instead

RGB-DEM, GeoNRW, and with the masks its transfer task:

    data/rgb-dem/<city>/<x>_<y>_rgb.jp2 _dem.tif _seg.tif       uint8; float32 m; 0 none, 1..10
    data/rgb-dem/cropped/<city>/<x>_<y>_<k>_rgb.png ...         made by `data.py crop`: read instead

RGB-depth, the raw SUN RGB-D tree (any depth of folders above a frame) with hha/ from `data.py hha`:

    data/rgbd/SUNRGBD/<sensor>/.../<frame>/image/ depth/ depth_bfx/ intrinsics.txt hha/
    data/rgbd/train.txt test.txt    optional: a frame a line
    data/rgbd/labels/img-000001.png ...     optional: labels of test.txt's frames, then train.txt's

or the folder form of CMX and its relatives:

    data/rgbd/RGB/<stem>.jpg        colour, jpg or png
    data/rgbd/Depth/<stem>.png      16 bit, --depth-unit steps a metre; 0 and 65535 are no reading
    data/rgbd/HHA/<stem>.png        or, in its place, HHA (Gupta et al., 2014), jpg or png
    data/rgbd/Label/<stem>.png      optional: classes for finetune.py, 0 is unlabelled
    data/rgbd/train.txt test.txt    optional: a stem a line (path and suffix are taken off)
    data/rgbd/intrinsics.txt        for `data.py hha`: the nine numbers of a 3x3 camera matrix
    data/rgbd/RawDepth/<stem>.png   for `data.py hha`, optional: Depth/ with the holes it had

Frames of any size are brought to one canvas of 3/2 S x 2 S pixels for crops of S (336 x 448 for
224): all sensors lie within 4 % of that 4:3, and the smallest crop, half the area, still has S x S.

Transfer, BigEarthNet-MM v1.0:

    data/bigearthnet/BigEarthNet-S1-v1.0/<S1 name>/<S1 name>_VV.tif _VH.tif _labels_metadata.json
    data/bigearthnet/BigEarthNet-v1.0/<S2 name>/<S2 name>_B01.tif ... _B12.tif _labels_metadata.json
    data/bigearthnet/train.csv val.csv test.csv     S2 name,S1 name a line, or S2 names alone

One's own pairs (--scenario custom --data1 DIR --data2 DIR): png, jpg, tif or npy, equal stems.

A data set gives (views1, views2) for an index: lists of one CxHxW tensor, of which both augmented
views are made, or of two, one for each view.  uint8, or float32 in [0, 1].  A transfer task gives
(x1, x2, target).  `python data.py` alone lists the commands: check, pack, crop, hha, toy, bench.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it also raises

TREE = "the first lines of data.py show the tree"
SCENES = "or try made-up scenes: pretrain.py --toy"


class BadInput(Exception):
    """The input cannot be used: one line with what was got, what was expected, and the remedy."""


# ---- one normaliser per modality: what an encoder sees, in whatever it is used for ----

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
S1 = ("VV", "VH")
S2 = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
MODALITIES = {                                  # range: what x in [0, 1] is; mean and std of that x
    # The authors used no statistics for what is seen from above: 0 and 1 change nothing.
    "sar": dict(bands=S1, mean=(0.0,) * 2, std=(1.0,) * 2,
                range="dB, 2 % cut in each image and band, mean -+ 2 std of the data set "
                "(-12.55 -+ 2 x 5.26, -20.19 -+ 2 x 5.91; BigEarthNet: -12.59 -+ 2 x 5.04, "
                "-19.22 -+ 2 x 5.42)"),
    "ms": dict(bands=S2, mean=(0.0,) * 13, std=(1.0,) * 13,
               range="reflectance 0 to 1 (files: x 10000), clipped"),
    "aerial": dict(bands=("red", "green", "blue"), mean=(0.0,) * 3, std=(1.0,) * 3,
                   range="0 to 255"),
    "dem": dict(bands=("height",) * 3, mean=(0.0,) * 3, std=(1.0,) * 3,
                range="1st to 99th percentile of the patch"),
    "rgb": dict(bands=("red", "green", "blue"), range="0 to 255", **IMAGENET),
    # Three channels in [0, 1], so the statistics of the authors, who used ImageNet's for HHA too.
    "hha": dict(bands=("disparity", "height", "angle"), range="0 to 255", **IMAGENET),
    # Mean and std of SUN RGB-D (2.38 m, 1.24 m).  No reading stands at the mean: 0 once normalised.
    "depth": dict(bands=("depth",), range="0 to 10 m, clipped", mean=(0.238,), std=(0.124,)),
}
MAX_DEPTH = 10.0                                # m


def unit(x):
    """uint8 -> float32 in [0, 1]; float tensors are there already."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def normalise(x, modality):
    """x: BxCxHxW in [0, 1] -> mean 0 and standard deviation 1 over the data set, band by band."""
    mean, std = (torch.tensor(MODALITIES[modality][key]).view(-1, 1, 1) for key in ("mean", "std"))
    if not mean.any() and (std == 1).all():
        return x
    return torch.addcmul((-mean / std).to(x), x, (1 / std).to(x))  # (x - mean) / std in one pass


# ---- readers ----

@contextlib.contextmanager
def reading(path, kind):
    """What fails inside becomes a BadInput that names the file."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:                  # a damaged file raises nearly anything
        raise BadInput(f"{path} cannot be read as {kind} ({error}); "
                       "copy or download it again") from None


def opened(path):
    """A Pillow image with its pixels read."""
    with reading(path, "an image"):
        image = Image.open(path)
        if image.format == "PNG" and len(image.getbands()) > 1 and ";16" in str(image.tile):
            raise BadInput(f"{path} has colours of 16 bits, of which Pillow reads 8; expected "
                           f"8 bits, or save it as tif or npy")
        image.load()
        return image


def read_rgb(path, canvas):
    """An image file -> 3xHxW uint8 on the canvas (H, W)."""
    image = opened(path).convert("RGB").resize(canvas[::-1], Image.Resampling.BILINEAR)  # antialias
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_depth(path, canvas, depth_unit):
    """A 16-bit depth file -> 1xHxW float32, metres / MAX_DEPTH in [0, 1]; holes have the mean."""
    raw = np.array(opened(path))
    if raw.ndim != 2 or raw.dtype == np.uint8:
        raise BadInput(f"{path} is {raw.dtype} {raw.shape}; expected depth as one 16-bit channel")
    valid = (raw > 0) & (raw < 65535)
    if not valid.any():
        raise BadInput(f"{path} has no valid depth (every pixel is 0 or 65535); take the frame out")
    z, seen = (np.array(Image.fromarray(a.astype(np.float32))
                        .resize(canvas[::-1], Image.Resampling.BILINEAR))
               for a in (np.where(valid, raw / depth_unit, 0), valid))
    z = z / np.maximum(seen, 1e-6) / MAX_DEPTH  # the mean of the valid pixels
    z = np.where(seen > 0, z, MODALITIES["depth"]["mean"])
    return torch.from_numpy(z.clip(0, 1).astype(np.float32))[None]


def read_image(path):
    """png, jpg, jp2, tif or npy -> CxHxW array in its own dtype; of RGBA, the RGB."""
    if not path.is_file():
        raise BadInput(f"no file {path}; `python data.py check` lists what is missing")
    if path.suffix.lower() in (".tif", ".tiff"):
        return read_tiff(path)
    if path.suffix.lower() == ".npy":
        with reading(path, "a numpy array"):
            a = np.load(path, allow_pickle=False)
    else:
        image = opened(path)
        # Pillow takes GeoNRW's fourth band, near infrared, for alpha: dropped, never blended in
        colour = {"RGBA": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "L", "1": "L"}
        a = np.array(image.convert(colour.get(image.mode, image.mode)))
    if a.ndim == 3 and a.shape[2] < min(a.shape[:2]):
        a = a.transpose(2, 0, 1)                # HxWxC
    if np.iscomplexobj(a):
        raise BadInput(f"{path} is {a.dtype}; expected real numbers: its amplitude, or real and "
                       f"imaginary part as two channels")
    if a.ndim not in (2, 3):
        raise BadInput(f"{path} has the shape {a.shape}; expected HxW, HxWxC or CxHxW")
    return a.reshape(-1, *a.shape[-2:])


def read_tiff(path):
    """A TIFF of any number of bands, without overviews -> CxHxW in its own dtype, native order.

    tifffile reads it; where tifffile lacks the codec (LZW, zstd, JPEG, predictor 3), Pillow does if
    there is one band or an RGB triple.  Never otherwise: of several bands in separate planes Pillow
    returns the first and says nothing.
    """
    with reading(path, "a TIFF"), tifffile.TiffFile(path) as tif:
        series = tif.series[0]
        page, axes = series.keyframe, series.axes
        try:
            a = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            a = read_with_pillow(path, page, axes)
    a = np.moveaxis(a, (axes.index("Y"), axes.index("X")), (-2, -1))
    return a.reshape(-1, *a.shape[-2:]).astype(a.dtype.newbyteorder("="), copy=False)


def read_with_pillow(path, page, axes):
    rgb = axes == "YXS" and page.samplesperpixel == 3 and page.dtype == np.uint8
    with contextlib.suppress(OSError):
        if (axes == "YX" or rgb) and (a := np.array(Image.open(path))).shape == page.shape:
            return a.astype(page.dtype)         # Pillow widens int16 to int32
    raise BadInput(f"{path} is compressed with {page.compression.name} (predictor "
                   f"{page.predictor}, {page.dtype}, {page.samplesperpixel} bands), "
                   "which tifffile cannot decode by itself; pip install imagecodecs") from None


def read_list(path, files):
    """train.txt or test.txt -> its ids, in its order.  Lines like `RGB/7.jpg<TAB>Label/7.png` are
    understood, and SUN RGB-D's `SUNRGBD/kv1/b3dodata/img_0063//image/x.jpg`.
    """
    if not path.is_file():
        raise BadInput(f"no {path}; expected a list with a stem a line, or use --split all")
    lines = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"{path} is empty; expected a stem a line")
    frames = [re.sub("^.*SUNRGBD/|/image/.*$|/$", "", re.sub("/+", "/", line)) for line in lines]
    ids = [frame if frame in files else Path(line).stem for frame, line in zip(frames, lines)]
    if unknown := [i for i in ids if i not in files]:
        raise BadInput(f"{path} names {len(unknown)} that have no image (the first: {unknown[0]})")
    return ids


def first_folder(root, *patterns):
    found = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_dir()]
    return found[0] if found else root / patterns[0]


def refuse(strict, lonely, root, where):
    if strict and lonely:
        raise BadInput(f"{len(lonely)} samples under {root} stand in {where} (the first: "
                       f"{lonely[0]}); `python data.py check` lists them; complete or remove them")


def read_json(path):
    with reading(path, "json"):
        return json.loads(path.read_text())


def listed(folder):
    """The folders in a folder."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        raise BadInput(f"no folder {folder}; {TREE}; {SCENES}") from None


def atomically(path, write):
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # torchrun's processes may all write
    write(part)
    os.replace(part, path)


def write_text(path, text):
    atomically(path, lambda part: part.write_text(text))


# ---- HHA: depth as disparity, height and angle with gravity ----

def hha(depth_m, raw_m, K):
    """Depth encoded as HHA (Gupta et al., 2014): equal to the authors' MATLAB code.

    depth_m   HxW   metres, holes filled
    raw_m     HxW   what the sensor saw: 0 or NaN takes no part in the fits; or depth_m again
    K               3x3 camera matrix, or (fx, fy, cx, cy), in pixels

    Returns HxWx3 uint8: disparity (31000 / cm, saturates below 1.2 m), height above the lowest
    point (cm, saturates at 2.55 m) and angle of the surface with gravity (38..218 for 0..180
    degrees).  Raises ValueError for depth not in metres.
    """
    z = 100 * np.nan_to_num(np.asarray(depth_m, float))                # HxW, cm from here on
    if not 0 <= z.min() <= z.max() < 1e4:
        raise ValueError(f"depth from {z.min() / 100:g} to {z.max() / 100:g}; expected metres "
                         "from 0 to 100: divide by the units of a metre")
    K = np.asarray(K, float)
    fx, fy, cx, cy = K if K.size == 4 else (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
    H, W = z.shape
    u = (np.arange(1, W + 1)[None] - cx) / fx                          # 1xW, X/Z; 1-based pixels
    v = (np.arange(1, H + 1)[:, None] - cy) / fy                       # Hx1, Y/Z
    m = ((np.asarray(raw_m) > 0) & (z > 0)).astype(float)
    if not m.any():
        raise ValueError("no pixel has both depth_m and raw_m above 0; expected some valid depth")
    q = m / np.where(m > 0, z, 1)
    # integral images, padded for windows of 21
    sums = [np.pad(a.cumsum(0).cumsum(1), ((11, 10), (11, 10)), "edge")
            for a in (u * u * m, u * v * m, u * m, v * v * m, v * m, m, u * q, v * q, q)]
    for a in sums:
        a[:11] = a[:, :11] = 0
    N = normals(sums, u, v, z, 10).reshape(3, -1)                          # smooth ones for gravity
    g = gravity(N[:, ~np.isnan(N[0])])
    # Within 0.1 degrees of the camera's y axis gravity counts as that axis.
    up = -z * (g[0] * u + g[1] * v + g[2] if np.degrees(np.arccos(min(g[1], 1))) > 0.1 else v)
    height = up - (up.min() if up.min() <= -90 else -130)  # no floor in sight: camera 130 cm high
    cosine = np.einsum("c,chw->hw", g, normals(sums, u, v, z, 3)).clip(-1, 1)
    angle = np.where(np.isnan(cosine), 180, np.degrees(np.arccos(cosine)))
    out = np.stack([31000 / np.maximum(z, 100), height, angle + 128 - 90], -1)  # HxWx3
    return np.floor(out + 0.5).clip(0, 255).astype(np.uint8)


def window_sums(integral, radius):
    """Sums over square windows from an integral image padded by 10: (H+21)x(W+21).  Returns HxW."""
    lo, hi = 10 - radius, 11 + radius
    H, W = integral.shape[0] - 21, integral.shape[1] - 21
    rows = integral[hi:hi + H] - integral[lo:lo + H]
    return rows[:, hi:hi + W] - rows[:, lo:lo + W]


def normals(sums, u, v, z, radius):
    """Unit normals 3xHxW of planes a u + b v + c = 1/z fitted to windows; NaN without any pixel."""
    uu, uv, u1, vv, v1, n, uq, vq, q1 = (window_sums(a, radius) for a in sums)
    # Least squares by the adjugate of the normal matrix: its determinant would only scale a, b, c.
    A, B, C = vv * n - v1 * v1, u1 * v1 - uv * n, uv * v1 - u1 * vv
    D, E, G = uu * n - u1 * u1, uv * u1 - uu * v1, uu * vv - uv * uv
    N = np.stack([A * uq + B * vq + C * q1, B * uq + D * vq + E * q1, C * uq + E * vq + G * q1])
    length = np.sqrt((N * N).sum(0))                                   # HxW
    length[(n < 0.5) | (length == 0)] = np.nan
    side = (N[0] * u + N[1] * v + N[2]) * z     # its own point's; without a point, N_z >= 0
    length[np.where(side == 0, N[2], side) < 0] *= -1
    return N / length


def gravity(N):
    """Gravity's direction: floors face it, walls stand along it; ten steps from down.  N: 3xP."""
    g = np.array([0.0, 1.0, 0.0])
    for limit in np.radians([45] * 5 + [15] * 5):
        s = np.abs(g @ N)
        weight = (s < np.sin(limit)) * 1.0 - (s > np.cos(limit))        # +1 wall, -1 floor
        axis = np.linalg.eigh((N * weight) @ N.T)[1][:, 0]  # least along walls, most along floors
        g = axis if g @ axis >= 0 else -axis
    return g


# ---- SSL4EO-S12 and BigEarthNet-MM: Sentinel-1 and Sentinel-2 ----

BLOCKS = {1: ("VV", "VH", "B2", "B3", "B4", "B8"), 2: ("B5", "B6", "B7", "B8A", "B11", "B12"),
          6: ("B1", "B9", "B10")}               # by pixel size, in units of 10 m
SSL4EO_S1 = {"VV": (-12.54847273, 5.25697717), "VH": (-20.19237134, 5.91150917)}
BIGEARTHNET_S1 = {"VV": (-12.59, 5.04), "VH": (-19.22, 5.42)}


def to_8bit(band, x, s1):
    """Raw pixels of one band -> uint8, clipped, never wrapped.  S2: reflectance x 10000.  S1: dB,
    2 % of outliers cut in this image and band, then mean +- 2 standard deviations of the data set.
    Paper: "normalize by mean and standard deviation".  Here: so, mapped to 8 bits, as the authors.
    """
    if band not in s1:
        return (np.clip(x, 0, 10000) * np.float32(255 / 10000) + np.float32(0.5)).astype(np.uint8)
    mean, std = s1[band]
    x = np.where(np.isfinite(x), x, np.float32(mean - 2 * std))  # the dB of an empty pixel is -inf
    x = np.clip(x, *np.quantile(x, (0.01, 0.99)))
    return (np.clip((x - mean) / (4 * std) + 0.5, 0, 1) * 255 + 0.5).astype(np.uint8)


def upsample(x, r):
    """CxHxW uint8 -> CxrHxrW, bilinear, pixel areas aligned, rounded: exact in 16 bits to r = 8."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), "edge").astype(np.uint16)
    C, H, W = x.shape
    for axis, shape in ((2, (C, H, r * (W - 2))), (1, (C, r * (H - 2), r * (W - 2)))):
        old, x = np.moveaxis(x, axis, 0), np.empty(shape, np.uint16)
        new = np.moveaxis(x, axis, 0)
        for k in range(r):                      # the k-th of r new pixels in an old one
            d = 2 * k + 1 - r                   # lies d / 2r off its centre
            near = (2 * r - abs(d)) * old[1:-1]
            near += abs(d) * (old[2:] if d > 0 else old[:-2])
            new[k::r] = near
    x += 2 * r * r                              # half of the divisor: rounds half up
    return (x // (4 * r * r)).astype(np.uint8)


def stack_bands(blocks):
    """8-bit bands at 10, 20 and 60 m -> S1 2xSxS and S2 13xSxS in band order, all at 10 m."""
    ms = np.empty((13, *blocks[0].shape[1:]), np.uint8)
    ms[[1, 2, 3, 7]] = blocks[0][2:]
    ms[[4, 5, 6, 8, 11, 12]] = upsample(blocks[1], 2)
    ms[[0, 9, 10]] = upsample(blocks[2], 6)
    return torch.from_numpy(blocks[0][:2].copy()), torch.from_numpy(ms)


class SSL4EO:
    """SSL4EO-S12 v1.0, raw or packed.  Gives two views of each modality, of a random season each:
    ([2xSxS, 2xSxS], [13xSxS, 13xSxS]), uint8, S = 264.  split: "all", or the name of a list of ids.
    """
    modalities = ("sar", "ms")

    def __init__(self, root, split="all", seed=0, strict=True):
        root = Path(root)
        self.root, self.seed, self.epoch, self.lonely = root, seed, 0, []
        places = (folder for folder in (root, root / "packed") if (folder / "ids.txt").is_file())
        self.packed = next(places, None)
        if self.packed:
            self.ids = (self.packed / "ids.txt").read_text().split()
        elif not (root / "s1").is_dir() and any(root.glob("**/*.zarr.zip")):
            raise BadInput(f"{root} holds .zarr.zip files: SSL4EO-S12 v1.1, which is not read, for "
                           f"its values differ; expected v1.0; {TREE}")
        else:                                   # 97 ids have no folder; some copies' are shorter
            s1, s2 = ({name for name in listed(root / folder) if re.fullmatch(r"\d{6,7}", name)}
                      for folder in ("s1", "s2c"))
            self.ids, self.lonely = sorted(s1 & s2), sorted(s1 ^ s2)
            refuse(strict, self.lonely, root, "only one of s1 and s2c")
        self.row = {name: row for row, name in enumerate(self.ids)}
        if split != "all":
            self.ids = read_list(root / f"{split}.txt", self.row)

    def __len__(self):
        return len(self.ids)

    def raw(self, i, seasons=range(4)):
        """(name, 1xHxW) of every band of the seasons as it lies on disk; packed, in 8 bits."""
        for season in seasons:
            if self.packed:
                for names, block in zip(BLOCKS.values(), self.blocks(i, season)):
                    yield from zip(names, block[:, None])
                continue
            for folder, bands in (("s1", S1), ("s2c", S2)):
                place = self.root / folder / self.ids[i]
                # in the order of their dates: by name, S1's would be sorted by satellite first
                names = sorted(listed(place), key=lambda name: re.search(r"\d{8}T\d{6}|$", name)[0])
                if len(names) != 4:
                    raise BadInput(f"{place} holds {len(names)} seasons, expected 4; download them")
                for band in bands:
                    yield band, read_tiff(place / names[season] / f"{band}.tif")

    def blocks(self, i, season):
        """A season in 8 bits at native size: 6xSxS (10 m), 6xS/2xS/2 (20 m), 3xS/6xS/6 (60 m)."""
        if self.packed:
            return unpacked(open_map(self.packed / f"season{season}.npy")[self.row[self.ids[i]]])
        bands = {band: to_8bit(band, x[0], SSL4EO_S1) for band, x in self.raw(i, [season])}
        return in_blocks(bands, self.ids[i])

    def __getitem__(self, i):
        # Paper: "one random season is selected to generate each augmented view".  Here: drawn for
        # each view and shared by the modalities, so that the pair in Cm shows one moment; the
        # authors drew them independently.
        seasons = np.random.default_rng((self.seed, self.epoch, i)).integers(4, size=2).tolist()
        pairs = {season: stack_bands(self.blocks(i, season)) for season in set(seasons)}
        return tuple([pairs[season][modality] for season in seasons] for modality in (0, 1))


def in_blocks(bands, name):
    """Bands by name -> the three blocks; the size of each has to be that of its resolution."""
    S = len(bands["VV"])
    for r, names in BLOCKS.items():
        for band in names:
            if (shape := bands[band].shape) != (S // r, S // r):
                raise BadInput(f"{name}: {band} has {shape} pixels where VV has "
                               f"{bands['VV'].shape}; expected {(S // r, S // r)}; download again")
    return [np.stack([bands[band] for band in names]) for names in BLOCKS.values()]


def unpacked(record):
    """A row of a packed season, S^2 (6 + 6/4 + 3/36) bytes -> the three blocks, as views."""
    S = round((len(record) * 12 / 91) ** 0.5)
    parts = np.split(record, (6 * S ** 2, 6 * S ** 2 + 6 * (S // 2) ** 2))
    return [part.reshape(-1, S // r, S // r) for part, r in zip(parts, BLOCKS)]


@functools.lru_cache                            # once a process: pickling it would copy the file
def open_map(path):
    return np.load(path, mmap_mode="r")


# the official 19 classes, and which of the 43 of the json they unite (none: that of the same name)
CLASSES19 = {
    "Urban fabric": ("Continuous urban fabric", "Discontinuous urban fabric"),
    "Industrial or commercial units": (),
    "Arable land": ("Non-irrigated arable land", "Permanently irrigated land", "Rice fields"),
    "Permanent crops": ("Vineyards", "Fruit trees and berry plantations", "Olive groves",
                        "Annual crops associated with permanent crops"),
    "Pastures": (), "Complex cultivation patterns": (),
    "Land principally occupied by agriculture, with significant areas of natural vegetation": (),
    "Agro-forestry areas": (), "Broad-leaved forest": (), "Coniferous forest": (),
    "Mixed forest": (),
    "Natural grassland and sparsely vegetated areas": (
        "Natural grassland", "Sparsely vegetated areas"),
    "Moors, heathland and sclerophyllous vegetation": (
        "Moors and heathland", "Sclerophyllous vegetation"),
    "Transitional woodland, shrub": ("Transitional woodland/shrub",), "Beaches, dunes, sands": (),
    "Inland wetlands": ("Inland marshes", "Peatbogs"),
    "Coastal wetlands": ("Salt marshes", "Salines"),
    "Inland waters": ("Water courses", "Water bodies"),
    "Marine waters": ("Coastal lagoons", "Estuaries", "Sea and ocean"),
}
CLASSES43 = {name: k for k, (same, names) in enumerate(CLASSES19.items())
             for name in names or (same,)}
DROPPED43 = ("Road and rail networks and associated land", "Port areas", "Airports",
             "Mineral extraction sites", "Dump sites", "Construction sites", "Green urban areas",
             "Sport and leisure facilities", "Bare rock", "Burnt areas", "Intertidal flats")


class BigEarthNet:
    """BigEarthNet-MM v1.0.  Gives (2x120x120 uint8 S1, 13x120x120 uint8 S2, 19 float32 0 or 1).

    split: "train", "val" or "test" by the list <split>.csv, bigearthnet-<split>.csv or .txt: an S2
    name a line, then its S1 name; lists without S1 names are completed from the json of every S1
    patch.  "all": every S1 patch.  The patches of two lists, snow and cloud, are left out.
    """
    modalities = ("sar", "ms")

    def __init__(self, root, split, strict=True):
        root = Path(root)
        self.root = root
        self.folders = (first_folder(root, "BigEarthNet-S1*"),
                        first_folder(root, "BigEarthNet-v1.0", "BigEarthNet-S2*"))
        present = [set(listed(folder)) for folder in self.folders]
        if split == "all":
            pairs = self.linked(present[0])
        else:
            names = (f"{split}.csv", f"bigearthnet-{split}.csv", f"bigearthnet-{split}.txt")
            lists = [root / name for name in names if (root / name).is_file()]
            if not lists:
                raise BadInput(f"none of {', '.join(names)} under {root}; {TREE}")
            pairs = [line.split(",") for line in lists[0].read_text().split()]
            if pairs and len(pairs[0]) == 1:
                link = dict(self.linked(present[0]))
                pairs = [(s2, link.get(s2, "?")) for s2, in pairs]
        for name in ("patches_with_seasonal_snow.csv", "patches_with_cloud_and_shadow.csv"):
            if (root / name).is_file():
                bad = set((root / name).read_text().split())
                pairs = [pair for pair in pairs if pair[0] not in bad]
        self.ids = [s2 for s2, s1 in pairs if s2 in present[1] and s1 in present[0]]
        self.s1 = dict(pairs)
        self.lonely = sorted(self.s1.keys() - set(self.ids))
        refuse(strict, self.lonely, root, f"the list of {split} without both of their folders")

    def linked(self, s1_names):
        """(S2 name, S1 name) of every S1 patch: its json alone has the link; kept in pairs.csv."""
        kept = self.root / "pairs.csv"
        pairs = [line.split(",") for line in kept.read_text().split()] if kept.is_file() else []
        if {s1 for _, s1 in pairs} != s1_names:  # not yet written, or patches came or went since
            pairs = []
            for s1 in tqdm(sorted(s1_names), "S1 patches", leave=False, disable=None):
                about = read_json(self.folders[0] / s1 / f"{s1}_labels_metadata.json")
                pairs.append((about["corresponding_s2_patch"], s1))
            with contextlib.suppress(OSError):  # a folder that is only to be read
                write_text(kept, "".join(f"{s2},{s1}\n" for s2, s1 in pairs))
        return pairs

    def __len__(self):
        return len(self.ids)

    def raw(self, i):
        s1, s2 = self.s1[self.ids[i]], self.ids[i]
        for band in S1:
            yield band, read_tiff(self.folders[0] / s1 / f"{s1}_{band}.tif")
        for band in S2:
            if band != "B10":                   # Level 2A has no cirrus band
                yield band, read_tiff(self.folders[1] / s2 / f"{s2}_B{band[1:]:0>2}.tif")

    def __getitem__(self, i):
        bands = {band: to_8bit(band, x[0], BIGEARTHNET_S1) for band, x in self.raw(i)}
        # an empty band where the encoders of SSL4EO-S12, of 13 bands, expect B10
        blocks = in_blocks(bands | {"B10": np.zeros_like(bands["B1"])}, self.ids[i])
        path = self.folders[1] / self.ids[i] / f"{self.ids[i]}_labels_metadata.json"
        target = torch.zeros(len(CLASSES19))
        for name in read_json(path)["labels"]:
            if name in CLASSES43:
                target[CLASSES43[name]] = 1
            elif name not in DROPPED43:
                raise BadInput(f"{path} has the label {name!r}, which is none of the 43 classes")
        return *stack_bands(blocks), target


# ---- GeoNRW ----

class GeoNRW:
    """GeoNRW, whole tiles (each gives 16 patches) or what `data.py crop` has cut.

    Gives ([3xHxW uint8], [3xHxW float32]), 250x250; with labels (3xHxW, 3xHxW, HxW int64: 0
    unlabelled, 1..10). split: "train" or "test" by city, or "all".
    Paper: 6,942 training scenes.  Here: the makers' 40 cities, for those were never listed.
    """
    modalities = ("aerial", "dem")
    test_cities = ("duesseldorf", "herne", "neuss")

    def __init__(self, root, split="train", labels=False, strict=True):
        root = Path(root)
        if split not in ("all", "train", "test"):
            raise BadInput(f"--split {split}: expected all, train or test for GeoNRW")
        self.root, self.labels = root / "cropped" if (root / "cropped").is_dir() else root, labels
        self.ids, self.lonely, parts = [], [], {"rgb", "dem", "seg"} if labels else {"rgb", "dem"}
        for city in listed(self.root):
            if split != "all" and (city in self.test_cities) != (split == "test"):
                continue
            tiles = {}
            for name in os.listdir(self.root / city):
                tile, _, part = name.split(".")[0].rpartition("_")
                tiles.setdefault(tile, set()).add(part)
            for tile in sorted(tiles, key=lambda tile: [int(n) for n in re.findall(r"\d+", tile)]):
                if tiles[tile] >= parts:
                    patches = [f"_{k}" for k in range(1, 17)] if tile.count("_") == 1 else [""]
                    self.ids += [f"{city}/{tile}{k}" for k in patches]
                elif tiles[tile] & {"rgb", "dem"}:
                    self.lonely.append(f"{city}/{tile}")
        refuse(strict, self.lonely, root, f"less than all of {', '.join(sorted(parts))}")

    def __len__(self):
        return len(self.ids)

    def raw(self, i):
        """rgb 3xHxW uint8, dem 1xHxW metres and seg 1xHxW of a patch."""
        tile, _, k = self.ids[i].rpartition("_")
        whole = (self.root / f"{tile}_dem.tif").is_file()
        for part in ("rgb", "dem", "seg")[:2 + self.labels]:
            suffix = "tif" if part != "rgb" else "jp2" if whole else "png"
            a = read_image(self.root / f"{tile if whole else self.ids[i]}_{part}.{suffix}")
            yield part, patch(a, int(k)) if whole else a

    def __getitem__(self, i):
        rgb, dem, *seg = (a for _, a in self.raw(i))
        if len(rgb) != 3 or len({a.shape[1:] for a in (rgb, dem, *seg)}) > 1:
            raise BadInput(f"{self.ids[i]}: rgb, dem and seg have the shapes "
                           f"{[a.shape for a in (rgb, dem, *seg)]}; expected 3 bands, equal sizes")
        rgb = torch.from_numpy(rgb.copy())
        dem = torch.from_numpy(stretch(dem, self.ids[i])).expand(3, -1, -1)
        return (rgb, dem, torch.from_numpy(seg[0][0].astype(np.int64))) if seg else ([rgb], [dem])


def patch(a, k):
    """The k-th of 4x4 patches, 1..16, row by row: the authors' numbering.  a: CxHxW."""
    H, W = a.shape[1] // 4, a.shape[2] // 4
    row, column = divmod(k - 1, 4)
    return a[:, row * H:(row + 1) * H, column * W:(column + 1) * W]


def stretch(dem, name):
    """Heights 1xHxW, metres -> float32, [0, 1] from the 1st to the 99th percentile of this patch; a
    flat patch is 0.  Holes (NaN, and sentinels: nothing on Earth is below -500 m or above 9000 m)
    take no part, and become the mean.
    """
    valid = np.isfinite(dem) & (dem > -500) & (dem < 9000)
    if not valid.any():
        raise BadInput(f"{name} has no valid height; take the tile out")
    low, high = np.percentile(dem[valid], (1, 99))
    x = ((np.where(valid, dem, low) - low) / max(high - low, 1e-3)).clip(0, 1)
    return np.where(valid, x, x[valid].mean()).astype(np.float32)


# ---- RGB-depth: SUN RGB-D, NYUv2 and the folder form ----

class RGBD:
    """RGB-depth frames in folder form, or the raw SUN RGB-D tree once `data.py hha` has been there.

    Gives ([3xHxW uint8], [1xHxW float32 depth or 3xHxW uint8 HHA]), HxW the canvas; with labels
    (x1, x2, HxW int64: 0 is unlabelled, then the classes).  split: "all" (the paper pretrains on
    all 10,335 frames of SUN RGB-D), or the name of a list: "train", "test".
    """

    def __init__(self, root, size, split="all", depth_unit=1000.0, labels=False, strict=True):
        root = Path(root)
        self.canvas, self.depth_unit = (size * 3 // 2, size * 2), depth_unit
        depth = (root / "Depth").is_dir() and not (root / "HHA").is_dir()
        self.modalities = ("rgb", "depth" if depth else "hha")
        frames = {} if (root / "RGB").is_dir() else sunrgbd_frames(root)
        if frames:
            self.files1 = {frame: image for frame, (image, *_) in frames.items()}
            self.files2 = {frame: hha_file(image) for frame, image in self.files1.items()
                           if hha_file(image).is_file()}
            where = "image/ alone, without hha/, which `python data.py hha` writes"
        else:
            folder = root / ("Depth" if depth else "HHA")
            self.files1, self.files2 = stems(root / "RGB"), stems(folder)
            where = f"only one of RGB and {folder.name}"
        self.lonely = sorted(self.files1.keys() ^ self.files2.keys())
        refuse(strict, self.lonely, root, where)
        known = self.files1.keys() & self.files2.keys()
        self.ids = sorted(known) if split == "all" else read_list(root / f"{split}.txt", known)
        self.labels = label_files(root, frames) if labels else None
        if labels and (missing := [i for i in self.ids if i not in self.labels]):
            if strict:
                raise BadInput(f"{len(missing)} frames under {root} have no label (the first: "
                               f"{missing[0]}); {TREE}")
            self.lonely += missing
            self.ids = [i for i in self.ids if i in self.labels]

    def __len__(self):
        return len(self.ids)

    def raw(self, i):
        yield "rgb", read_image(self.files1[self.ids[i]])
        yield self.modalities[1], read_image(self.files2[self.ids[i]])
        if self.labels:
            yield "label", read_label(self.labels[self.ids[i]])[None]

    def __getitem__(self, i):
        name = self.ids[i]
        x1, path2 = read_rgb(self.files1[name], self.canvas), self.files2[name]
        x2 = (read_rgb(path2, self.canvas) if self.modalities[1] == "hha" else
              read_depth(path2, self.canvas, self.depth_unit))
        if not self.labels:
            return [x1], [x2]
        return x1, x2, torch.from_numpy(read_label(self.labels[name], self.canvas))


def stems(folder, suffixes=(".jpg", ".jpeg", ".png")):
    """The image files of a folder as {stem: path}; BadInput where there is none."""
    files = {}
    for path in sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in suffixes):
        if path.stem in files:
            raise BadInput(f"{files[path.stem]} and {path} have one stem; expected one file for "
                           f"each; remove the other")
        files[path.stem] = path
    if not files:
        raise BadInput(f"no {'image under' if folder.is_dir() else 'folder'} {folder}; expected "
                       f"{', '.join(suffixes)}, with the stems of the other modality; {TREE}")
    return files


def sunrgbd_frames(root):
    """SUN RGB-D's raw tree -> {frame: files (image, hole-filled depth, raw depth, camera)}.  A
    frame is a folder with image/ and intrinsics.txt, at any depth; the stems in it may differ.
    """
    tree, frames = root / "SUNRGBD" if (root / "SUNRGBD").is_dir() else root, {}
    for folder, subfolders, files in os.walk(tree):
        if "image" in subfolders and "intrinsics.txt" in files:
            subfolders.clear()
            frame = Path(folder)
            frames[frame.relative_to(tree).as_posix()] = (
                *(only_file(frame / name) for name in ("image", "depth_bfx", "depth")),
                frame / "intrinsics.txt")
    return dict(sorted(frames.items()))


def only_file(folder):
    files = sorted(folder.glob("[!.]*.*"))
    if len(files) != 1:
        raise BadInput(f"{folder} holds {len(files)} files, expected 1; unpack SUNRGBD.zip again")
    return files[0]


def sunrgbd_depth(raw):
    """SUN RGB-D's 16 bits, mm rotated left by three bits -> metres, cut at 8 as in the toolbox."""
    raw = raw.astype(np.uint16)                 # Pillow before 10.3 has 32 bits, which do not wrap
    return np.minimum((raw >> 3 | raw << 13) / 1000, 8.0)


def read_intrinsics(path):
    """3x3 camera matrix from nine numbers, on three lines or on one."""
    with reading(path, "the nine numbers of a 3x3 matrix"):
        return np.array(path.read_text().split(), float).reshape(3, 3)


def label_files(root, frames):
    """{id: label file}: Label/ or labels/ of the folder form; labels/img-000001.png ... of SUN
    RGB-D, which number the frames of test.txt and then those of train.txt.
    """
    if not frames:
        return stems(root / ("Label" if (root / "Label").is_dir() else "labels"))
    order = read_list(root / "test.txt", frames) + read_list(root / "train.txt", frames)
    files = {frame: root / "labels" / f"img-{k:06d}.png" for k, frame in enumerate(order, 1)}
    return {frame: path for frame, path in files.items() if path.is_file()}


def read_label(path, canvas=None):
    """A label image, grey or with a palette -> HxW int64 class indices, nearest on the canvas."""
    image = opened(path)
    if len(image.getbands()) > 1:
        raise BadInput(f"{path} is a {image.mode} image; expected class indices, not colours")
    if canvas:
        image = image.resize(canvas[::-1], Image.Resampling.NEAREST)
    return np.array(image).astype(np.int64)


# ---- one's own pairs ----

class Pairs:
    """Two folders of images with equal stems.  Gives ([C1xHxW], [C2xHxW]) of the size of their
    folder's first: uint8, or float32, mapped from mean +- 3 standard deviations to 0..1.

    rows: what `measured` gave for the two folders, kept in the checkpoint; measured at first use.
    augment_as: the modality that each is augmented as; by default it goes by the channels.
    """
    modalities = ("custom1", "custom2")
    suffixes = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")

    def __init__(self, root1, root2, augment_as=(None, None), rows=None, strict=True):
        self.files = [stems(Path(root), self.suffixes) for root in (root1, root2)]
        self.ids = sorted(self.files[0].keys() & self.files[1].keys())
        self.lonely = sorted(self.files[0].keys() ^ self.files[1].keys())
        if not self.ids:
            raise BadInput(f"no stem is both in {root1} and in {root2}; expected equal stems")
        refuse(strict, self.lonely, f"{root1} and {root2}", "only one of the two folders")
        self.rows = rows or [measured([files[i] for i in self.ids], strict) for files in self.files]
        for name, row, kind in zip(self.modalities, self.rows, augment_as):
            MODALITIES[name] = row
            kind = kind or {1: "dem", 2: "sar", 3: "aerial"}.get(len(row["bands"]), "ms")
            AUGMENTATIONS[name] = AUGMENTATIONS[kind]

    def __len__(self):
        return len(self.ids)

    def raw(self, i):
        for name, files in zip(self.modalities, self.files):
            yield name, read_image(files[self.ids[i]])

    def __getitem__(self, i):
        return tuple([read_custom(files[self.ids[i]], row)]
                     for files, row in zip(self.files, self.rows))


def read_custom(path, row):
    a = read_like(path, row)
    if row["raw_mean"]:
        mean, std = (np.array(row[key])[:, None, None] for key in ("raw_mean", "raw_std"))
        a = np.where(np.isfinite(a), (a - mean) / (6 * std) + 0.5, 0.5)
        a = a.clip(0, 1).astype(np.float32)
    x = torch.from_numpy(np.ascontiguousarray(a))
    if list(x.shape[1:]) == row["size"]:
        return x
    resized = resize(x[None].float(), row["size"])[0]
    return resized if x.is_floating_point() else resized.round().to(x.dtype)


def read_like(path, row):
    """read_image, of which channels and dtype have to be those of the row."""
    a = read_image(path)
    if (len(a), str(a.dtype)) != (len(row["bands"]), row["dtype"]):
        raise BadInput(f"{path} has {len(a)} channels of {a.dtype}; expected {len(row['bands'])} "
                       f"of {row['dtype']}, as in the first of its folder; convert or remove it")
    return a


def measured(paths, strict=True, most=1000):
    """The row of MODALITIES for one's own images, from at most 1000 of them, evenly chosen: mean
    and std of x in [0, 1]; raw_mean and raw_std in the units of the files, None for 8 bits.
    """
    for path in paths:
        try:
            first = read_image(path)
            break
        except BadInput:
            if strict or path == paths[-1]:
                raise
    row = dict(bands=[f"channel {c + 1}" for c in range(len(first))], size=list(first.shape[1:]),
               dtype=str(first.dtype))
    sums = np.zeros((3, len(first)))
    for path in tqdm(paths[::-(-len(paths) // most)], "measuring", leave=False, disable=None):
        try:
            a = read_like(path, row).reshape(len(first), -1).astype(float)
        except BadInput:
            if strict:
                raise
            continue                            # `check` will name it
        seen = np.isfinite(a)
        a = np.where(seen, a, 0)
        sums += np.stack([seen.sum(1), a.sum(1), (a * a).sum(1)])
    n = np.maximum(sums[0], 1)
    mean = sums[1] / n
    std = np.sqrt(np.maximum(sums[2] / n - mean ** 2, 0))
    std[std <= 1e-6 * np.abs(mean)] = 1         # a constant channel
    if first.dtype == np.uint8:
        return row | dict(range="0 to 255", mean=(mean / 255).tolist(), std=(std / 255).tolist(),
                          raw_mean=None, raw_std=None)
    return row | dict(range="raw_mean -+ 3 x raw_std of the channel, clipped",
                      mean=[0.5] * len(first), std=[1 / 6] * len(first),
                      raw_mean=mean.tolist(), raw_std=std.tolist())


# ---- from data sets to batches ----

TASKS = dict(bigearthnet=19, geonrw=10, sunrgbd=37, nyuv2=40)  # and their number of classes


def open_pairs(name, root, size, split="all", depth_unit=1000.0, seed=0, strict=True, **custom):
    """The data set of a scenario, or of a transfer task, which gives (x1, x2, target).  For custom,
    root is two folders.  strict=False, for `check`: samples without a partner go into .lonely.
    """
    if name == "custom":
        if split != "all":
            raise BadInput(f"--split {split}: one's own pairs have no lists; expected all")
        return Pairs(*root, strict=strict, **custom)
    if not Path(root).is_dir():
        raise BadInput(f"no folder {root}; {TREE}; give --data; {SCENES}")
    if name == "sar-optical":
        data = SSL4EO(root, split, seed, strict)
    elif name == "bigearthnet":
        data = BigEarthNet(root, split, strict)
    elif name in ("rgb-dem", "geonrw"):
        data = GeoNRW(root, split, name in TASKS, strict)
    else:
        data = RGBD(root, size, split, depth_unit, name in TASKS, strict)
    if not data.ids and not data.lonely:
        raise BadInput(f"no sample of {name}, split {split}, under {root}; {TREE}")
    return data


def collate(samples):
    """Samples -> (x1, x2), each a list of BxCxHxW batches: one for each view that a sample has."""
    return [[torch.stack(view) for view in zip(*modality)] for modality in zip(*samples)]


def both_views(views, device):
    """A batch for each of two views, on the device; a single one stands twice, and moves once."""
    return ([moved(x, device) for x in views] * 2)[:2]


def moved(x, device):                           # on MPS, a copy not waited for may be torn
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


def epoch_batches(n, batch_size, seed, epoch):
    """The data order, n // batch_size x batch_size indices: a permutation of 0..n-1, a function of
    (seed, epoch) alone, without its last incomplete batch.  A rank takes its columns.
    """
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[:n // batch_size * batch_size].reshape(-1, batch_size)


# ---- augmentations, Sec. 4: batched, on any device, each image with parameters of its own ----

# The paper follows BYOL (Grill et al., 2020, App. B).  BYOL treats its two views unequally (blur 1
# and 0.1, solarize 0 and 0.2); Algorithm 1 has one augment1 for both: solarize has the mean of the
# two, blur the authors' 0.5.  Their crops are kept too, (0.5, 1) of the area indoors where BYOL has
# (0.08, 1): two modalities are cropped independently, and small crops would show different things.
BYOL = dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.1)
# Seen from above no side is up: all four flip both ways (the paper names both for SAR and DEM).
ABOVE = dict(scale=(0.2, 1.0), vflip=True)
AUGMENTATIONS = {
    "sar": dict(**ABOVE, gray_p=0.2, blur_p=0.5),  # Sec. 4: crop, grayscale, blur, flips
    # Paper: brightness, contrast, saturation, hue.  Here: the first two; 13 bands have no hue.
    "ms": dict(**ABOVE, **BYOL | dict(jitter=(0.4, 0.4, 0, 0))),
    "aerial": dict(**ABOVE, **BYOL),
    "dem": ABOVE,                               # Sec. 4: crop and flips
    "rgb": dict(scale=(0.5, 1.0), **BYOL),
    "hha": dict(scale=(0.5, 1.0)),              # Sec. 4: crop and horizontal flip only
    "depth": dict(scale=(0.5, 1.0)),            # not in the paper: as HHA
}


class Draws:
    """Uniform random numbers for the images of the global batch, of which a process takes its rows.

    One CPU generator, seeded anew at each step: what a sample looks like depends on (seed, step)
    and on its place in the global batch, never on processes, workers, device or restarts.
    """

    def __init__(self, seed, batch_size, rows):
        self.seed, self.batch_size, self.rows = seed, batch_size, rows

    def restart(self, step):
        self.generator = torch.Generator().manual_seed(mixed(self.seed, step))

    def __call__(self, n):
        return torch.rand(self.batch_size, n, generator=self.generator)[self.rows]  # Bxn in [0, 1)


def mixed(*numbers):
    """One seed out of several integers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def augment(x, modality, size, draws):
    """augment1, augment2 of Alg. 1: BxCxHxW, uint8 or float in [0, 1] -> BxCxSxS, normalised."""
    has = AUGMENTATIONS[modality]
    x = random_resized_crop(x, size, has["scale"], draws, vflip=has.get("vflip"))
    if "gray_p" in has:
        x = random_colour(x, has.get("jitter", (0, 0, 0, 0)), has.get("jitter_p", 0),
                          has["gray_p"], draws)
    if "blur_p" in has:
        x = random_blur(x, has["blur_p"], draws)
    if "solarize_p" in has:
        x = random_solarize(x, has["solarize_p"], draws)
    return normalise(x, modality)


def plain(x, modality, size):
    """What an encoder sees without augmentation: all of BxCxHxW -> BxCxSxS, normalised."""
    return normalise(resize(unit(x), (size, size)), modality)


def random_boxes(B, H, W, scale, draws, ratio=(3 / 4, 4 / 3)):
    """Boxes of `scale` of the area and a log-uniform aspect ratio, half of them mirrored: ten tries
    for one that fits, as torchvision; then the largest centred one.

    Returns top, left, height, width and mirrored: Bx1 each.
    """
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
    return top, left, h, w, u[:, 22:23] < 0.5


def random_resized_crop(x, size, scale, draws, ratio=(3 / 4, 4 / 3), vflip=False):
    """The box of `random_boxes` of each image, resized; with vflip half of them upside down.

    Resizing with a triangle filter is two matrix products, with weights for each image: `resize`.
    """
    B, C, H, W = x.shape
    top, left, h, w, mirrored = random_boxes(B, H, W, scale, draws, ratio)  # Bx1 each
    upside_down = draws(1) < 0.5 if vflip else torch.zeros(B, 1, dtype=bool)
    parameters = top, left, h, w, upside_down, mirrored
    if x.device.type == "cpu":                  # here a loop over torch's sparse filter is faster
        numbers = torch.cat(parameters, 1).long().tolist()
        return torch.cat([resized_box(image[None], size, *n) for image, n in zip(x, numbers)])
    top, left, h, w, upside_down, mirrored = (v.float().to(x.device) for v in parameters)
    Wx, Wy = triangle_filter(left, w, W, size), triangle_filter(top, h, H, size)  # BxSxW, BxSxH
    Wx = torch.where(mirrored[..., None] > 0, Wx.flip(1), Wx)
    Wy = torch.where(upside_down[..., None] > 0, Wy.flip(1), Wy)
    return separable(unit(x), Wy, Wx)                                   # BxCxSxS


def resized_box(image, size, top, left, h, w, upside_down, mirrored):
    box = resize(unit(image[:, :, top:top + h, left:left + w]), (size, size))
    return box.flip([2] * upside_down + [3] * mirrored)


def resize(x, size):
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def triangle_filter(start, length, n_in, n_out):
    """Weights Bxn_outxn_in that resize pixels [start, start + length) of n_in to n_out."""
    pixel, step = torch.arange(n_in, device=start.device), length / n_out  # n_in, Bx1
    centre = start + (torch.arange(n_out, device=start.device) + 0.5) * step  # Bxn_out
    distance = (pixel + 0.5 - centre[..., None]).abs() / step.clamp(min=1)[..., None]
    weight = (1 - distance).clamp(min=0)
    weight = weight * ((pixel > start - 1) & (pixel < start + length))[:, None]  # in part, too
    return (weight / weight.sum(-1, keepdim=True)).float()


def separable(x, Wy, Wx):
    """Filter the columns with Wy: BxSyxH and the rows with Wx: BxSxxW.  x: BxCxHxW -> BxCxSyxSx."""
    return Wy.unsqueeze(-3) @ x @ Wx.unsqueeze(-3).mT


def random_colour(x, jitter, jitter_p, gray_p, draws):
    """Brightness, contrast, saturation and hue jitter, then grayscale, for any number of channels.

    They fold into one affine map of each image.  Brightness b and contrast c are x -> c b x +
    (1 - c) b m with m the image's mean luma; saturation s blends with the luma; hue turns the
    colour about the grey axis, which is linear, where HSV's hue is not; grayscale is s = 0.
    Paper: BYOL draws the order of the four, gray last.  Here: this order, so that they fold.
    """
    C, shape = x.shape[1], x.shape
    u = draws(6)                                                        # Bx6
    jittered = (u[:, :1] < jitter_p).float()
    b, c, s, turn = (jittered * (2 * u[:, 1:5] - 1) * torch.tensor(jitter)).unbind(1)  # B
    b, c, s = (1 + v.view(-1, 1, 1) for v in (b, c, s))                 # Bx1x1, around 1
    s = torch.where(u[:, 5].view(-1, 1, 1) < gray_p, 0, s)
    luma = torch.tensor([0.299, 0.587, 0.114]) if C == 3 else torch.full((C,), 1 / C)
    A = s * torch.eye(C) + (1 - s) * luma.expand(C, C)                  # BxCxC, grey stays grey
    if C == 3:
        A = hue_rotation(2 * np.pi * turn) @ A
    luma, b, c, A = (v.to(x.device) for v in (luma, b, c, A))
    mean = (x.mean((2, 3)) @ luma).view(-1, 1, 1)                       # Bx1x1
    x = torch.baddbmm((1 - c) * b * mean, c * b * A, x.flatten(2))      # BxCxHW, a multiply-add
    return x.clamp_(0, 1).view(shape)


def hue_rotation(angle):
    """Bx3x3: turns colours by `angle` (B, radians) about the grey axis (1, 1, 1), red to green."""
    grey = torch.full((3, 3), 1 / 3)                                    # projects on the axis
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3 ** 0.5  # a quarter turn
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return grey + cos * (torch.eye(3) - grey) + sin * turn


def random_blur(x, blur_p, draws, sigma=(0.1, 2.0)):
    """Gaussian blur of the images that draw it; sigma in pixels of a 224-pixel crop, scaled so."""
    u, S = draws(2), x.shape[-1]
    chosen = (u[:, 0] < blur_p).nonzero()[:, 0]
    width = (sigma[0] + (sigma[1] - sigma[0]) * u[chosen, 1]) * S / 224
    pixel, chosen, width = torch.arange(S).to(x), chosen.to(x.device), width.to(x)
    distance = (pixel[:, None] - pixel).abs() / width.view(-1, 1, 1)    # bxSxS, in sigmas
    G = torch.exp(-0.5 * distance ** 2) * (distance < 5)  # denormals beyond are slow on a CPU
    G = G / G.sum(-1, keepdim=True)             # cut off at the border and normalised
    return x.index_copy(0, chosen, separable(x[chosen], G, G))


def random_solarize(x, solarize_p, draws):
    chosen = (draws(1) < solarize_p)[:, 0].nonzero()[:, 0].to(x.device)
    bright = x[chosen]
    return x.index_copy(0, chosen, torch.where(bright < 0.5, bright, 1 - bright))


# ---- made-up scenes: known factors, one in both modalities and one in each alone ----

# Each scene holds objects of three kinds, for both sensors, sensor 1 and sensor 2.  A factor is the
# shape of one kind.  All shapes have the same area; position, size and rotation are random over
# clutter and noise, lest a random encoder read them.  Nothing else may tell one scene from another,
# or views agree on that instead of on shapes: clutter is kept small (0.1 m of relief, and depth's
# own object was not learned) and the ground has one colour (a tint of 5 %, and the encoder of RGB
# from the air learned the tint).  Where a sensor's own objects stand does not tell where the
# other's do: they may lie on each other.  Linear probes on held-out scenes, chance 0.25: supervised
# encoders 0.98 and more, random ones 0.32 to 0.47 (means of three).
SHAPES = ("disk", "ring", "cross", "triangle")
SCENE_CLASSES = ("background", *(f"{which} {shape}" for which in ("common", "unique1", "unique2")
                                 for shape in SHAPES))


def draw_shape(shape, u, v):
    """Whether the points u, v (any equal shapes) on a shape's own axes lie in it; its area is 4."""
    r, a, b = np.hypot(u, v), np.abs(u), np.abs(v)
    return {"disk": r < 1.128, "ring": (r < 1.38) & (r > 0.795),
            "cross": (np.minimum(a, b) < 0.36) & (np.maximum(a, b) < 1.57),
            "triangle": (v < 0.877) & (3 ** 0.5 * a - v < 2 * 0.877)}[shape]  # equilateral


def place(rng, H, W, rows, columns, shape=None, radii=(0.13, 0.17)):
    """A shape, or a random one, centred within rows and columns (fractions).  Returns class and
    mask HxW.
    """
    shape = int(rng.integers(len(SHAPES))) if shape is None else shape
    y, x = rng.uniform(*rows) * H, rng.uniform(*columns) * W
    r, turn = rng.uniform(*radii) * H, rng.uniform(0, 2 * np.pi)
    fine = (np.mgrid[0:2 * H, 0:2 * W] + 0.5) / 2  # two samples a pixel each way: antialiased
    dy, dx = (fine[0] - y) / r, (fine[1] - x) / r
    u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    mask = draw_shape(SHAPES[shape], u, v)
    return shape, mask.reshape(H, 2, W, 2).mean((1, 3))


def place_three(rng, H, W):
    """The objects of a scene: common, in front, unique1 and unique2.  Returns their masks HxW, the
    label HxW uint8 (0 none, then SCENE_CLASSES + 1) and their classes.
    """
    common = place(rng, H, W, (0.6, 0.76), (0.25, 0.75))
    unique = [place(rng, H, W, (0.24, 0.4), (0.2, 0.8)) for _ in range(2)]
    return labelled(*zip(common, *unique))


def scatter_three(rng, S):
    """The same seen from above, each three times, in cells of a 3x3 grid that begins anywhere.

    Crops may be as small as a fifth of the image there; objects that stand once were seldom in both
    views, and no modality's own object was learned.
    """
    masks = np.zeros((3, S, S))
    classes = [int(shape) for shape in rng.integers(len(SHAPES), size=3)]
    square = np.add.outer(rng.permutation(3), rng.permutation(3)) % 3   # 3x3, a Latin square
    for kind, cells in enumerate((0, *rng.integers(1, 3, size=2))):
        for cell in np.argwhere(square == cells):
            rows, columns = ((i / 3 + 0.147, i / 3 + 0.187) for i in cell)
            masks[kind] += place(rng, S, S, rows, columns, classes[kind], (0.095, 0.115))[1]
    return labelled(classes, np.roll(masks, rng.integers(S, size=2), (1, 2)).clip(0, 1))


def labelled(classes, masks):
    """The first of three masks HxW in front; with them the label HxW and the classes."""
    front, *behind = masks
    masks = [front, *(mask * (1 - front) for mask in behind)]
    label = np.ones(front.shape, np.uint8)
    for which in (2, 1, 0):
        label[masks[which] > 0.5] = 2 + which * len(SHAPES) + classes[which]
    return masks, label, tuple(classes)


def smooth_noise(rng, H, W, cells):
    """Clutter: HxW, bicubic between random values in [-1, 1] on a coarse grid."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.array(coarse.resize((W, H), Image.Resampling.BICUBIC))


def indoor_scene(rng, H=48, W=64):
    """A room: an object before the wall, a painting on it (RGB alone), a pane in it (depth alone).

    Returns rgb HxWx3 uint8, depth HxW uint16 mm, label HxW uint8 and the three classes.
    """
    (m_common, m_paint, m_pane), label, classes = place_three(rng, H, W)
    rgb = camera(rng, m_common, m_paint, 0.12)
    z = 3 + 0.03 * smooth_noise(rng, H, W, 6) + 0.8 * (m_pane - m_common)  # m
    z = z + rng.normal(0, 0.03, z.shape)
    z[rng.random(z.shape) < 0.01] = 0           # no reading
    return rgb, (z * 1000).astype(np.uint16), label, classes


def camera(rng, m_common, m_paint, clutter):
    """What a camera sees of two masks HxW: a bright and a dark object on grey.  HxWx3 uint8."""
    rgb = 0.5 + clutter * np.stack([smooth_noise(rng, *m_common.shape, 6) for _ in range(3)], -1)
    rgb = rgb + (0.9 - rgb) * m_common[..., None] + (0.1 - rgb) * m_paint[..., None]
    return ((rgb + rng.normal(0, 0.04, rgb.shape)).clip(0, 1) * 255).astype(np.uint8)


def satellite_scene(rng, S=48):
    """From orbit: a village (bright in both), an oil slick (dark in SAR), algae (dark in optical).

    Returns four seasons of {band: array} as in the files, label SxS uint8 and the three classes.
    """
    (m_common, m_slick, m_bloom), label, classes = scatter_three(rng, S)
    clutter1, visible, infrared = (smooth_noise(rng, S, S, 6) for _ in range(3))
    levels = (1600, 1400, 1300, 1350, 1550, 2100, 2400, 2300, 2550, 830, 20, 2200, 1500)  # as real
    seasons = []
    for _ in range(4):
        light, bands = rng.normal(1, 0.05), {}
        for band, level in zip(S1, (-14, -21)):
            speckle = 10 * np.log10(rng.gamma(8, 1 / 8, (S, S)))  # eight looks
            bands[band] = (level + clutter1 + 6 * (m_common - m_slick) + speckle).astype(np.float32)
        for band, level in zip(S2, levels):
            r = next(r for r, names in BLOCKS.items() if band in names)
            clutter2 = visible if band in ("B1", "B2", "B3", "B4") else infrared
            x = level * light * (1 + 0.02 * clutter2) * (1 + 0.8 * m_common) * (1 - 0.9 * m_bloom)
            x = x.reshape(S // r, r, S // r, r).mean((1, 3))
            bands[band] = (x * rng.normal(1, 0.03, x.shape)).clip(0).astype(np.uint16)
        seasons.append(bands)
    return seasons, label, classes


def aerial_scene(rng, S=48):
    """From the air: a building (bright, high), a painted square (dark), a pit of no colour (low).

    Returns rgb SxSx3 uint8, heights SxS float32 m, label SxS uint8 and the three classes.
    """
    (m_common, m_paint, m_pit), label, classes = scatter_three(rng, S)
    rgb = camera(rng, m_common, m_paint, 0.04)
    dem = rng.uniform(50, 300) + 0.8 * smooth_noise(rng, S, S, 6) + rng.normal(0, 0.3, (S, S))
    dem = dem + 7 * (m_common - m_pit)
    return rgb, dem.astype(np.float32), label, classes


def write_indoor(root, rngs, scenes):
    """The folder form; `scenes` are for training.  Yields (id, classes), as do the next two."""
    for folder in ("RGB", "Depth", "Label"):
        (root / folder).mkdir(parents=True)
    for i, rng in enumerate(rngs):
        *images, classes = indoor_scene(rng)
        for folder, image in zip(("RGB", "Depth", "Label"), images):
            Image.fromarray(image).save(root / folder / f"{i:04d}.png", compress_level=1)
        yield f"{i:04d}", classes


def write_satellite(root, rngs, scenes, S=48):
    """SSL4EO-S12's raw tree, and Label/."""
    (root / "Label").mkdir(parents=True)
    for i, rng in enumerate(rngs):
        seasons, label, classes = satellite_scene(rng, S)
        for day, bands in zip(("0320T101", "0621T102", "0922T103", "1221T104"), seasons):
            date = f"2020{day}{i % 1000:03d}"
            s1 = f"s1/{i:07d}/S1{'AB'[i % 2]}_IW_GRDH_1SDV_{date}_{date}_030000_037000_ABCD"
            for place, names in ((s1, S1), (f"s2c/{i:07d}/{date}_{date}_T32ULC", S2)):
                place = root / place
                place.mkdir(parents=True)
                for band in names:
                    Image.fromarray(bands[band]).save(place / f"{band}.tif")
        Image.fromarray(label).save(root / "Label" / f"{i:07d}.png")
        yield f"{i:07d}", classes


def write_aerial(root, rngs, scenes, S=48):
    """GeoNRW's tree: 16 scenes make a tile; those that are not for training lie in a test city."""
    for number, tile in enumerate(zip(*[iter(rngs)] * 16)):
        city = root / ("aachen" if 16 * number < scenes else "herne")
        city.mkdir(parents=True, exist_ok=True)
        parts = list(zip(*(aerial_scene(rng, S) for rng in tile)))
        rgb, dem, seg = (np.stack(images).reshape(4, 4, S, S, -1).swapaxes(1, 2)
                         .reshape(4 * S, 4 * S, -1) for images in parts[:3])
        stem = f"{280 + number}_5600"
        Image.fromarray(rgb).save(city / f"{stem}_rgb.jp2")
        tifffile.imwrite(city / f"{stem}_dem.tif", dem[..., 0])
        tifffile.imwrite(city / f"{stem}_seg.tif", seg[..., 0])
        yield from ((f"{city.name}/{stem}_{k}", classes) for k, classes in enumerate(parts[3], 1))


TOYS = {"sar-optical": (write_satellite, 1024, 256), "rgb-dem": (write_aerial, 2048, 512),
        "rgbd": (write_indoor, 2048, 512)}      # scenes for training and for tests


def make_toy(scenario, root, scenes=None, held_out=None, seed=0):
    """Writes the scenario's made-up scenes under root, once: they appear as a whole or not at all.

    Beside the layout stand train.txt, test.txt and factors.csv, with the classes as indices of
    SHAPES.  Satellite scenes are packed and aerial ones cropped at once: fast to read.
    """
    root = Path(root)
    if root.is_dir():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.part-", dir=root.parent) as part:
        write_toy(scenario, Path(part) / root.name, root, scenes, held_out, seed)
        if not root.is_dir():                   # another run may have been faster
            os.replace(Path(part) / root.name, root)


def write_toy(scenario, part, root, scenes, held_out, seed):
    write, *default = TOYS[scenario]
    scenes, held_out = scenes or default[0], held_out or default[1]
    rngs = (np.random.default_rng((seed, i)) for i in range(scenes + held_out))
    rows = list(tqdm(write(part, rngs, scenes), f"making {root}", scenes + held_out, disable=None))
    for split, ids in (("train", rows[:scenes]), ("test", rows[scenes:])):
        (part / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in ids))
    with open(part / "factors.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "common", "unique1", "unique2"),
                                    *((name, *classes) for name, classes in rows)])
    if scenario == "sar-optical":
        pack(part, part / "packed", 1)
    if scenario == "rgb-dem":
        crop(part, part / "cropped", 1)


# ---- commands: check, pack, crop, hha, toy, bench ----

def in_processes(function, jobs, workers, text):
    """function of each of the jobs, in order, from several processes, under a progress bar."""
    bar = functools.partial(tqdm, desc=text, total=len(jobs), disable=None)
    if workers < 2:
        yield from bar(map(function, jobs))
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, initializer=remember,
                                                  initargs=(function,))
    size = min(16, len(jobs) // (4 * workers) + 1)  # of a chunk

    def results():
        waiting = collections.deque()           # no more of them than are kept up with
        for start in range(0, len(jobs), size):
            waiting.append(pool.submit(remembered, jobs[start:start + size]))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        for chunk in waiting:
            yield from chunk.result()

    try:
        yield from bar(results())
    except concurrent.futures.process.BrokenProcessPool:
        raise BadInput(f"one of {workers} processes was killed: out of memory? Try a smaller "
                       f"--workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def remember(function):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    remembered.function = function              # sent once to a process, not with every job


def remembered(jobs):
    return [remembered.function(job) for job in jobs]


def inspect(dataset, classes, i):
    """One sample as `check` sees it: (band, kind, range, holes) of its files, and what is wrong."""
    rows, shapes = [], {}
    try:
        for name, a in dataset.raw(i):
            x = a[np.isfinite(a)].astype(float)
            shape = a.shape if a.ndim > 2 and len(a) > 1 else a.shape[-2:]
            kind = f"{a.dtype} {'x'.join(map(str, shape))}"             # CxHxW, of one channel HxW
            low, high = x.min(initial=np.inf), x.max(initial=-np.inf)
            rows.append((name, kind, low, high, a.size - x.size))
            if not x.size:
                raise BadInput(f"{name} has not one finite value")
            shapes[name] = a.shape[-2:]
            if name in ("label", "seg") and (low < 0 or high > classes):
                raise BadInput(f"the label {low if low < 0 else high:g}; expected 0 (unlabelled) "
                               f"to {classes}")
        if "label" in shapes and shapes["label"] != shapes["rgb"]:
            raise BadInput(f"a mask of {shapes['label']} pixels for an image of {shapes['rgb']}; "
                           f"expected equal sizes")
        dataset[i]
    except BadInput as error:
        return rows, f"{dataset.ids[i]}\t{error}"
    return rows, None


def check(dataset, out, workers, size, classes=None):
    """Reads every file: table, bad-ids.txt, contact sheet.  Returns how many samples are bad."""
    out.mkdir(parents=True, exist_ok=True)
    table, good, bad = {}, [], [f"{name}\tno partner" for name in dataset.lonely]
    look, jobs = functools.partial(inspect, dataset, classes), range(len(dataset))
    for i, (rows, error) in enumerate(in_processes(look, jobs, workers, "check")):
        for name, kind, low, high, holes in rows:
            kinds, *old = table.get(name, (collections.Counter(), low, high, 0))
            kinds[kind] += 1
            table[name] = kinds, min(old[0], low), max(old[1], high), old[2] + holes
        (bad if error else good).append(error or i)
    print("band          files        min        max not finite  dtype and size, the commonest")
    for name, (kinds, low, high, holes) in table.items():
        print(f"{name:10s} {kinds.total():8d} {low:10.4g} {high:10.4g} {holes:10d}  "
              f"{', '.join(kind for kind, _ in kinds.most_common(4))}{', ...' * (len(kinds) > 4)}")
    print(f"{len(dataset)} samples read, {len(bad)} bad, "
          f"of which {len(dataset.lonely)} without a partner")
    (out / "bad-ids.txt").write_text("".join(f"{line}\n" for line in bad))
    print(f"the bad ones and what is wrong with them: {out / 'bad-ids.txt'}")
    if good:
        contact_sheet(dataset, good, out / "contact-sheet.png", size)
        print(f"random pairs as the network will see them: {out / 'contact-sheet.png'}")
    return len(bad)


def contact_sheet(dataset, good, path, size, pairs=8, seed=0):
    """A row a pair: the two augmented views of modality 1, then those of modality 2."""
    chosen = np.random.default_rng(seed).choice(good, min(pairs, len(good)), replace=False)
    samples = [[views if isinstance(views, list) else [views] for views in dataset[i][:2]]
               for i in chosen]
    draws = Draws(seed, len(chosen), slice(None))
    draws.restart(0)
    views = [picture(augment(x, modality, size, draws), modality)
             for modality, batches in zip(dataset.modalities, collate(samples))
             for x in both_views(batches, "cpu")]
    sheet = np.concatenate([np.concatenate(list(view), 0) for view in views], 1)  # BSx4Sx3
    Image.fromarray(sheet).save(path)


def picture(x, modality):
    """Normalised BxCxHxW -> BxHxWx3 uint8 to look at; of 13 bands B4 B3 B2, thrice as bright."""
    mean, std = (torch.tensor(MODALITIES[modality][key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = x.cpu() * std + mean
    channels = {1: [0, 0, 0], 2: [0, 1, 0], 13: [3, 2, 1]}.get(x.shape[1], [0, 1, 2])
    x = (x[:, channels] * (3 if x.shape[1] == 13 else 1)).clamp(0, 1)
    return (255 * x).byte().permute(0, 2, 3, 1).numpy()


def pack(root, out, workers, every=256):
    """SSL4EO-S12's 60 files a location -> ids.txt and four arrays, season0.npy to season3.npy, with
    a row a location: its 15 bands in 8 bits at native size, 0.5 MB.
    """
    data = SSL4EO(root)
    part = unfinished(out)
    ids, done = part / "ids.txt", part / "done"
    if ids.is_file() and ids.read_text().split() != data.ids:
        raise BadInput(f"{part} was begun with other locations than {root} has now; delete it")
    write_text(ids, "\n".join(data.ids) + "\n")
    start = int(done.read_text()) if done.is_file() else 0
    shape = len(data), len(packed_rows(data, 0)[0])
    maps = [np.lib.format.open_memmap(part / f"season{k}.npy", "r+" if start else "w+", np.uint8,
                                      shape) for k in range(4)]
    make, jobs = functools.partial(packed_rows, data), range(start, len(data))
    for rows, i in zip(in_processes(make, jobs, workers, "pack"), jobs):
        for array, row in zip(maps, rows):
            array[i] = row
        if (i + 1) % every == 0 or i + 1 == len(data):
            for array in maps:
                array.flush()
            write_text(done, str(i + 1))
    done.unlink()
    os.replace(part, out)


def refuse_existing(out):
    if Path(out).exists():
        raise BadInput(f"{out} exists; expected a new --out, or delete it to make it anew")


def unfinished(out):
    """The folder that becomes `out` once it is complete; a run that was stopped goes on with it."""
    refuse_existing(out)
    part = Path(f"{out}.part")
    part.mkdir(parents=True, exist_ok=True)
    return part


def packed_rows(data, i):
    return [np.concatenate([block.ravel() for block in data.blocks(i, season)])
            for season in range(4)]


def crop(root, out, workers):
    """GeoNRW's tiles -> 16 patches each, <city>/<tile>_<k>_rgb.png, _dem.tif and _seg.tif."""
    tiles = sorted({i.rpartition("_")[0] for i in GeoNRW(root, "all").ids})
    part = unfinished(out)
    tiles = [tile for tile in tiles if (Path(root) / f"{tile}_rgb.jp2").is_file()]
    if not tiles:
        raise BadInput(f"no whole tile (<city>/<x>_<y>_rgb.jp2) under {root}; {TREE}")
    jobs = [tile for tile in tiles if not (part / f"{tile}_16_rgb.png").is_file()]
    list(in_processes(functools.partial(crop_tile, Path(root), part), jobs, workers, "crop"))
    os.replace(part, out)


def crop_tile(root, out, tile):
    rgb = read_image(root / f"{tile}_rgb.jp2")
    rest = {name: read_image(root / f"{tile}_{name}.tif") for name in ("dem", "seg")
            if (root / f"{tile}_{name}.tif").is_file()}
    (out / tile).parent.mkdir(parents=True, exist_ok=True)
    for k in range(1, 17):
        for name, a in rest.items():
            tifffile.imwrite(out / f"{tile}_{k}_{name}.tif", patch(a, k)[0])
        image = Image.fromarray(patch(rgb, k).transpose(1, 2, 0))
        atomically(out / f"{tile}_{k}_rgb.png",  # the last one says that the tile is done
                   lambda path: image.save(path, "png", compress_level=1))


def write_hha(root, workers, depth_unit, intrinsics=None):
    """HHA for every frame that has none: HHA/ in folder form, <frame>/hha/ in SUN RGB-D's tree."""
    root = Path(root)
    if (root / "Depth").is_dir():
        camera = read_intrinsics(Path(intrinsics or root / "intrinsics.txt"))
        (root / "HHA").mkdir(exist_ok=True)
        raw = stems(root / "RawDepth") if (root / "RawDepth").is_dir() else {}
        jobs = [(path, raw.get(stem, path), depth_unit, camera, root / "HHA" / f"{stem}.png")
                for stem, path in stems(root / "Depth").items()]
    else:
        jobs = [(depth, raw, None, read_intrinsics(K), hha_file(image))
                for image, depth, raw, K in sunrgbd_frames(root).values()]
    if not jobs:
        raise BadInput(f"no Depth/ and no SUN RGB-D frame under {root}; {TREE}")
    jobs = [job for job in jobs if not job[-1].is_file()]
    list(in_processes(write_one_hha, jobs, workers, "hha"))


def hha_file(image):
    return image.parent.parent / "hha" / f"{image.stem}.png"


def write_one_hha(job):
    depth, raw, depth_unit, camera, out = job
    try:
        depth_m, raw_m = metres(depth, depth_unit), metres(raw, depth_unit)
        image = Image.fromarray(hha(filled(depth_m), raw_m, camera))
    except ValueError as error:
        raise BadInput(f"{depth}: {error}") from None
    out.parent.mkdir(exist_ok=True)
    atomically(out, lambda path: image.save(path, "png"))


def metres(path, depth_unit):
    """A depth file -> HxW metres, 0 where there is no reading; depth_unit None: SUN RGB-D's way."""
    a = np.array(opened(path))
    return sunrgbd_depth(a) if depth_unit is None else np.where(a < 65535, a / depth_unit, 0)


def filled(z):
    """HxW depth, each hole (0) filled with the farther of the next readings to its left and right,
    for an object hides its background from the sensor.  A row without any gets the median.
    """
    valid, column = z > 0, np.arange(z.shape[1])
    left = np.maximum.accumulate(np.where(valid, column, 0), 1)
    right = np.minimum.accumulate(np.where(valid, column, z.shape[1] - 1)[:, ::-1], 1)[:, ::-1]
    z = np.maximum(np.take_along_axis(z, left, 1), np.take_along_axis(z, right, 1))
    return np.where(z > 0, z, np.median(z[z > 0]) if (z > 0).any() else 0)


def bench(device, size=224, seconds=3.0):
    """Pairs a second and worker, raw and packed; views a second of the batched augmentations on the
    device, and of torchvision's on the CPU, image by image.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        list(write_satellite(root, [np.random.default_rng(i) for i in range(16)], 16, S=264))
        raw = SSL4EO(root)
        pack(root, root / "packed", 1)
        packed = SSL4EO(root)
        rates = [rate(lambda i: data[i % 16], seconds) for data in (raw, packed)]
        x = {"sar": packed[0][0][0], "ms": packed[0][1][0]}
    print(f"reading, one worker, files in memory: raw {rates[0]:.0f} pairs/s, packed "
          f"{rates[1]:.0f} pairs/s, {rates[1] / rates[0]:.1f} times; below, "
          f"{torch.get_num_threads()} CPU threads")
    x |= {"aerial": x["ms"][1:4], "dem": x["ms"][:3].float() / 255}
    for modality, image in x.items():
        batch, draws = image.expand(32, -1, -1, -1).to(device), Draws(0, 32, slice(None))

        def batched(step):
            draws.restart(step)
            augment(batch, modality, size, draws)[0, 0, 0, 0].item()  # waits for the device

        one_by_one = torchvision_pipeline(modality, size)
        fast, slow = 32 * rate(batched, seconds), rate(lambda i: one_by_one(image), seconds)
        print(f"{modality:6s} {len(image):2d} x 264 x 264 -> {size}: batched on {device} "
              f"{fast:.0f} views/s, torchvision one by one {slow:.0f}, {fast / slow:.1f} times")


def rate(work, seconds):
    """Calls a second."""
    work(0)
    start, n = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        work(n)
        n += 1
    return n / (time.perf_counter() - start)


def torchvision_pipeline(modality, size):
    """The same by torchvision v2, of which jitter and grayscale are replaced at 2 and 13 bands."""
    has, row = AUGMENTATIONS[modality], MODALITIES[modality]
    if len(row["bands"]) == 3:
        jitter, gray = v2.ColorJitter(*BYOL["jitter"]), v2.Grayscale(3)
    else:
        factor = torch.distributions.Uniform(0.6, 1.4).sample
        jitter = v2.Compose([
            v2.Lambda(lambda x: (x * factor()).clamp(0, 1)),
            v2.Lambda(lambda x: x.lerp(x.mean(), 1 - factor()).clamp(0, 1))])
        gray = v2.Lambda(lambda x: x.mean(-3, keepdim=True).expand_as(x))
    drawn = (("jitter_p", jitter), ("gray_p", gray), ("blur_p", v2.GaussianBlur(23, (0.1, 2.0))),
             ("solarize_p", v2.RandomSolarize(0.5, 1)))
    return v2.Compose([
        v2.ToDtype(torch.float32, scale=True), v2.RandomResizedCrop(size, has["scale"]),
        v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
        *(v2.RandomApply([step], has[name]) for name, step in drawn if name in has),
        v2.Normalize(row["mean"], row["std"])])


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Data set commands.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text, **flags):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for flag, options in flags.items():
            sub.add_argument(f"--{flag.replace('_', '-')}", **options)

    data = dict(metavar="DIR", help="default: the scenario's or the task's, under data/")
    out = dict(metavar="DIR", type=Path, help="default: in DIR, where it is looked for")
    unit = dict(type=float, default=1000.0, help="steps of a depth file a metre; default: 1000")
    own = dict(metavar="DIR", help="of custom")
    workers = dict(type=int, default=os.cpu_count(), help="processes; default: one a core")
    command("check", "read every file: table, bad ids, contact sheet; exit code 1 if any is bad",
            scenario=dict(choices=[*TOYS, "custom"]),
            task=dict(choices=TASKS, help="a transfer task instead of a scenario"),
            data=data, data1=own, data2=own,
            split=dict(help="default: all; of a task train"), depth_unit=unit, workers=workers,
            size=dict(type=int, default=224, help="crop of the contact sheet; default: 224"),
            out=dict(metavar="DIR", type=Path, help="default: runs/check-NAME"))
    command("pack", "SSL4EO-S12 into four arrays, once; pretraining then reads those",
            data=data, out=out, workers=workers)
    command("crop", "GeoNRW's tiles into patches, once; pretraining then reads those",
            data=data, out=out, workers=workers)
    command("hha", "RGB-depth: HHA for every frame that has none", data=data, depth_unit=unit,
            workers=workers, intrinsics=dict(
                metavar="FILE", help="3x3 camera of the folder form; default: DIR/intrinsics.txt"))
    command("toy", "the made-up scenes of a scenario, as --toy makes them",
            scenario=dict(required=True, choices=TOYS), out=dict(help="default: data/toy-SCENARIO"))
    command("bench", "how fast files are read and views are made here",
            device=dict(default="cuda" if torch.cuda.is_available() else "cpu"))
    return parser.parse_args(argv)


def main():
    args = get_args()
    if args.command == "check":
        name = args.task or args.scenario
        whole = name != "custom" or (args.data1 and args.data2)
        if bool(args.task) == bool(args.scenario) or not whole:
            raise BadInput("check: expected --scenario or --task; with custom, --data1 and --data2")
        root = (args.data1, args.data2) if name == "custom" else args.data or f"data/{name}"
        split = args.split or ("train" if args.task else "all")
        dataset = open_pairs(name, root, args.size, split, args.depth_unit, strict=False)
        out = args.out or Path(f"runs/check-{name}")
        sys.exit(check(dataset, out, args.workers, args.size, TASKS.get(args.task)) > 0)
    elif args.command == "pack":
        root = Path(args.data or "data/sar-optical")
        pack(root, args.out or root / "packed", args.workers)
    elif args.command == "crop":
        root = Path(args.data or "data/rgb-dem")
        crop(root, args.out or root / "cropped", args.workers)
    elif args.command == "hha":
        write_hha(args.data or "data/rgbd", args.workers, args.depth_unit, args.intrinsics)
    elif args.command == "bench":
        bench(args.device)
    else:
        refuse_existing(out := args.out or f"data/toy-{args.scenario}")
        make_toy(args.scenario, out)


if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped; pack, crop and hha go on with the same command")
