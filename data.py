"""From files to batches: readers, normalisers, HHA, data sets, augmentations, made-up scenes.

    python data.py prepare --scenario X     turns what was downloaded into one form, once
    python data.py check --scenario X       reads that form and says what the network will see
    python data.py toy --scenario X         writes made-up scenes

The other scripts read that form:

    data/sar-optical/packed/ids.txt season0.npy .. season3.npy      one record per location
    data/bigearthnet/packed/<split>/ids.txt season0.npy labels.npy  one record per patch
    data/rgb-dem/cropped/rgb/ dem/ seg/ train.txt test.txt  equal names; masks: 0 unlabelled, 1..10
    data/rgbd/RGB/ HHA/ Label/ train.txt test.txt           equal names; masks: 0 unlabelled, 1..37
    data/rgbd/RGB/ Depth/                   if there is no HHA/; 16 bits, --depth-unit steps a metre
    tiles/1/ 2/ label/ train.txt test.txt   --scenario custom --data1 tiles/1 --data2 tiles/2

`prepare` starts from what is published:

    SSL4EO-S12 v1.0 (v1.1 does not work: it is zarr and has other values); one GeoTIFF per band:
    data/sar-optical/s1/<id>/<season>/VV.tif VH.tif             float32 dB, S x S pixels, S = 264
    data/sar-optical/s2c/<id>/<season>/B1.tif ... B12.tif       uint16, x 10000; S, S/2 or S/6 wide

    BigEarthNet-MM v1.0, --task bigearthnet; a line of a csv is `S2 name,S1 name`, or an S2 name:
    data/bigearthnet/BigEarthNet-S1-v1.0/<S1 name>/<S1 name>_VV.tif _VH.tif _labels_metadata.json
    data/bigearthnet/BigEarthNet-v1.0/<S2 name>/<S2 name>_B01.tif ... _B12.tif _labels_metadata.json
    data/bigearthnet/train.csv val.csv test.csv

    GeoNRW:
    data/rgb-dem/<city>/<x>_<y>_rgb.jp2 _dem.tif _seg.tif       uint8; float32, metres; classes

    SUN RGB-D's raw tree.  labels/ is optional.  Its file img-000001.png is the mask of the first
    frame of test.txt; the frames of train.txt follow those of test.txt:
    data/rgbd/SUNRGBD/<sensor>/.../<frame>/image/ depth/ depth_bfx/ intrinsics.txt
    data/rgbd/labels/img-000001.png ...
    data/rgbd/train.txt test.txt    optional: one frame per line

    RGB-depth frames in folders, as CMX has them (NYUv2: --task nyuv2, data/nyuv2):
    data/rgbd/RGB/<name>.jpg Depth/<name>.png Label/<name>.png train.txt test.txt
    data/rgbd/RawDepth/<name>.png   optional: the depth before its holes were filled
    data/rgbd/intrinsics.txt        the camera; write this file yourself: fx 0 cx  0 fy cy  0 0 1

    Your own scenes of any size (png, jpg, tif, npy): two folders with equal file names, or two
    patterns in quotes, such as --data1 'chips/*_S1.tif' --data2 'chips/*_S2.tif'.  The stars stand
    for the name of the scene.  Images that all have one size need no `prepare`.  TIFFs that are
    compressed with LZW need the package imagecodecs.

A data set gives (views1, views2) for an index.  Each of the two is a list of one CxHxW tensor (both
augmented views are made from this tensor) or of two tensors (one for each view).  Tensors are
uint8, or float32 in [0, 1].  A transfer task gives (x1, x2, target).  SSL4EO-S12 may also be read
without `prepare`, but its raw tree is slower to read.
"""
import argparse
import contextlib
import errno
import functools
import glob
import json
import logging
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

try:
    import fcntl
except ImportError:                             # Windows has no fcntl: prepare then takes no lock
    fcntl = None

Image.MAX_IMAGE_PIXELS = 10 ** 9                # scenes may be large
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # tifffile logs errors that it raises, too

TREE = "the first lines of data.py show the tree"
IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".npy")


class BadInput(Exception):
    """Reports input that cannot be used, in one line: what is wrong, where, and what to do."""


def need(condition, message):
    """Raises BadInput with the message unless the condition holds.  The message says what is wrong,
    where, and what to do."""
    if not condition:
        raise BadInput(message)


# ---- normalisers: one per modality, the same in all scripts ----

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
UNCHANGED = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
S1 = ("VV", "VH")
S2 = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
# One row per modality.  range: the values of the files that become 0 to 1 in x.  mean, std: the
# normaliser returns (x - mean) / std.
MODALITIES = {
    # The authors do not normalise images from above.  Mean 0 and std 1 change nothing.
    "sar": dict(name="sar", bands=S1, mean=(0.0,) * 2, std=(1.0,) * 2,
                range="dB, clipped to the 1st and 99th percentile of each image and band, "
                "then to mean -+ 2 std of the data set "
                "(-12.55 -+ 2 x 5.26, -20.19 -+ 2 x 5.91; BigEarthNet: -12.59 -+ 2 x 5.04, "
                "-19.22 -+ 2 x 5.42)"),
    "ms": dict(name="ms", bands=S2, mean=(0.0,) * 13, std=(1.0,) * 13,
               range="reflectance 0 to 1 (files: x 10000), clipped"),
    "aerial": dict(name="aerial", bands=("red", "green", "blue"), **UNCHANGED, range="0 to 255"),
    "dem": dict(name="dem", bands=("height",) * 3, **UNCHANGED,
                range="1st to 99th percentile of the patch"),
    "rgb": dict(name="rgb", bands=("red", "green", "blue"), range="0 to 255", **IMAGENET),
    # HHA has three channels of 8 bits.  The authors use ImageNet's mean and std for HHA as well.
    "hha": dict(name="hha", bands=("disparity", "height", "angle"), range="0 to 255", **IMAGENET),
    # Mean and std are SUN RGB-D's: 2.38 m and 1.24 m.  A pixel without a reading gets the mean, so
    # this pixel is 0 after normalisation.
    "depth": dict(name="depth", bands=("depth",), range="0 to 10 m, clipped", mean=(0.238,),
                  std=(0.124,)),
}
MAX_DEPTH = 10.0                                # in metres; x = 1 of "depth" means this depth


def to_unit_range(x):
    """Returns x as floats in [0, 1].  x: uint8, or float in [0, 1] already.

    Raises BadInput if x has another type or other values.  On a GPU only the type is checked,
    because a check of the values would wait for the GPU."""
    if x.dtype == torch.uint8:
        return x.float() / 255
    need(x.is_floating_point(), f"the images are {x.dtype}. Give uint8, or float in [0, 1]")
    if x.device.type == "cpu" and x.numel():
        low, high = x.aminmax()                 # NaN if any value is NaN
        need(low >= -0.001 and high <= 1.001,
             f"the images have values from {low:g} to {high:g}. Give uint8, or float in [0, 1]")
    return x


def normalise(x, row):
    """Returns (x - mean) / std, channel by channel.

    x     BxCxHxW   uint8 or float in [0, 1]
    row             a row of MODALITIES, or a dict of the same form"""
    x = to_unit_range(x)
    mean = torch.tensor(row["mean"]).view(-1, 1, 1)                     # Cx1x1
    std = torch.tensor(row["std"]).view(-1, 1, 1)                       # Cx1x1
    if not mean.any() and (std == 1).all():
        return x
    # Computes -mean / std + x / std in one pass over x, because memory limits the speed.
    return torch.addcmul(move_to(-mean / std, x.device), x, move_to(1 / std, x.device))


# ---- augmentations, Sec. 4: for a batch, on any device; each image has its own random numbers ----

# The paper follows BYOL (Grill et al., 2020, App. B).  BYOL augments its two views differently, but
# Algorithm 1 has one augment1 for both views.  So solarize gets 0.1, the mean of BYOL's 0 and 0.2,
# and blur gets the authors' 0.5.
BYOL = dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5, solarize_p=0.1)
# Paper: BYOL's crops, 0.08 to 1 of the area; flips both ways for SAR and DEM.  Here: 0.2 to 1 of
# the area, as in the authors' code; flips both ways for all four modalities, because images from
# above have no upper side.
ABOVE = dict(scale=(0.2, 1.0), vflip=True)
# These are the authors' crops for indoor images.  Smaller crops of the two modalities would often
# show different objects.
INDOORS = dict(scale=(0.5, 1.0))
AUGMENTATIONS = {
    "sar": dict(**ABOVE, gray_p=0.2, blur_p=0.5),  # Sec. 4: crop, grayscale, blur, flips
    # Paper: brightness, contrast, saturation, hue.  Here: brightness and contrast only, because 13
    # bands have no hue.
    "ms": dict(**ABOVE, **BYOL | dict(jitter=(0.4, 0.4, 0, 0))),
    "aerial": dict(**ABOVE, **BYOL),
    "dem": ABOVE,                               # Sec. 4: crop and flips
    "rgb": dict(**INDOORS, **BYOL),
    "hha": INDOORS,                             # Sec. 4: crop and horizontal flip only
    "depth": INDOORS,                           # not in the paper: the same as HHA
    # The last two are for your own images of any other kind, with any number of channels.
    "photo": dict(**INDOORS, **BYOL),           # images that have an upper side
    "overhead": ABOVE,                          # images from above
}


class Draws:
    """Draws uniform random numbers for all images of the global batch, and returns the numbers of
    the images of this process, which `own` selects.

    One CPU generator is seeded anew at each step.  So the augmentation of an image depends only on
    the seed, the step and the image's place in the global batch.  It does not depend on the number
    of processes or workers, on the device, or on a restart."""

    def __init__(self, seed, batch_size, own):
        self.seed, self.batch_size, self.own = seed, batch_size, own

    def restart(self, step):
        self.generator = torch.Generator().manual_seed(mix_seeds(self.seed, step))

    def __call__(self, n):
        """Returns n numbers in [0, 1) for each image of this process, Bxn."""
        return torch.rand(self.batch_size, n, generator=self.generator)[self.own]


def mix_seeds(*numbers):
    """Returns one seed of 63 bits that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def augment(x, row, size, draws):
    """Returns one augmented view of each image, BxCxSxS, normalised.  This function is augment1 and
    augment2 of Algorithm 1.

    x     BxCxHxW   uint8 or float in [0, 1]
    row             a row of MODALITIES"""
    settings = AUGMENTATIONS[row["name"]]
    x = random_resized_crop(x, size, settings["scale"], draws, settings.get("vflip"))
    if "gray_p" in settings:
        x = random_colour(x, settings.get("jitter", (0, 0, 0, 0)), settings.get("jitter_p", 0),
                          settings["gray_p"], draws)
        x = random_blur(x, settings["blur_p"], draws)
    if "solarize_p" in settings:
        x = random_solarize(x, settings["solarize_p"], draws)
    return normalise(x, row)


def resize_and_normalise(x, row, size):
    """Returns whole images, BxCxHxW -> BxCxSxS, as an encoder sees them without augmentation."""
    return normalise(resize(to_unit_range(x), (size, size)), row)


def draw_boxes(B, H, W, scale, draws):
    """Draws one box per image.  The area of a box is a uniform share in `scale` of the image's
    area, and its aspect ratio is log-uniform in [3/4, 4/3].  Like torchvision, this function draws
    ten boxes and takes the first one that fits into the image.  If none of the ten fits, it takes
    the largest centred box.  Returns top, left, height, width and mirrored, each Bx1."""
    u, ratio = draws(23).double(), (3 / 4, 4 / 3)                       # Bx23
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[:, :10])       # Bx10
    log_ratio = np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * u[:, 10:20]
    w = (area * log_ratio.exp()).sqrt().round().clamp(min=1)            # Bx10
    h = (area / log_ratio.exp()).sqrt().round().clamp(min=1)            # Bx10
    fits = torch.cat([(w <= W) & (h <= H), torch.ones(B, 1, dtype=bool)], 1)
    first = fits.int().argmax(1, keepdim=True)                          # Bx1
    w = torch.cat([w, torch.full((B, 1), min(W, round(H * ratio[1])))], 1).gather(1, first)  # Bx1
    h = torch.cat([h, torch.full((B, 1), min(H, round(W / ratio[0])))], 1).gather(1, first)  # Bx1
    centred = first == 10
    left = torch.where(centred, (W - w) // 2, (u[:, 20:21] * (W - w + 1)).floor())
    top = torch.where(centred, (H - h) // 2, (u[:, 21:22] * (H - h + 1)).floor())
    return top, left, h, w, u[:, 22:23] < 0.5


def random_resized_crop(x, size, scale, draws, vflip=False):
    """Returns a random box of each image, resized to SxS.  Half of the boxes are mirrored; with
    vflip, half are turned upside down."""
    B, _, H, W = x.shape
    top, left, h, w, mirrored = draw_boxes(B, H, W, scale, draws)       # Bx1 each
    upside_down = draws(1) < 0.5 if vflip else torch.zeros(B, 1, dtype=bool)
    boxes = torch.cat((top, left, h, w, upside_down, mirrored), 1)      # Bx6
    if x.device.type == "cpu":
        return crop_in_turn(x, size, boxes)
    return crop_at_once(x, size, boxes)


def crop_in_turn(x, size, boxes):
    """Crops, resizes and flips image by image.  A CPU uses this function, because F.interpolate
    skips the zeros of the filters and so is faster there than the products of crop_at_once."""
    crops = torch.empty(*x.shape[:2], size, size)                       # BxCxSxS
    for i, box in enumerate(boxes.long().tolist()):
        top, left, h, w, upside_down, mirrored = box
        crop = to_unit_range(x[i:i + 1, :, top:top + h, left:left + w])
        crop = resize(crop, (size, size))                               # 1xCxSxS
        if upside_down:
            crop = crop.flip(2)
        if mirrored:
            crop = crop.flip(3)
        crops[i] = crop[0]
    return crops


def crop_at_once(x, size, boxes):
    """Returns the same crops as crop_in_turn, by two matrix products per batch.  A GPU uses this
    function, because crop_in_turn would launch many small kernels per image."""
    H, W = x.shape[2:]
    top, left, h, w, upside_down, mirrored = move_to(boxes.float(), x.device).split(1, 1)
    Wy = make_triangle_filter(top, h, H, size)                          # BxSxH
    Wx = make_triangle_filter(left, w, W, size)                         # BxSxW
    Wy = torch.where(upside_down[..., None] > 0, Wy.flip(1), Wy)
    Wx = torch.where(mirrored[..., None] > 0, Wx.flip(1), Wx)
    return filter_separably(to_unit_range(x), Wy, Wx)                   # BxCxSxS


def resize(x, canvas):
    """Returns x, BxCxHxW, resized to `canvas` = (height, width), bilinear and antialiased."""
    return F.interpolate(x, canvas, mode="bilinear", antialias=True)


def make_triangle_filter(start, length, n_in, n_out):
    """Returns the weights, Bxn_outxn_in, that resize the pixels [start, start + length) of an axis
    of n_in pixels to n_out pixels, as `resize` does.  start, length: Bx1."""
    pixel, step = torch.arange(n_in, device=start.device), length / n_out  # n_in, Bx1
    centre = start + (torch.arange(n_out, device=start.device) + 0.5) * step  # Bxn_out
    distance = (pixel + 0.5 - centre[..., None]).abs() / step.clamp(min=1)[..., None]
    weight = (1 - distance).clamp(min=0)
    # A pixel that lies only partly inside [start, start + length) counts as well.
    weight = weight * ((pixel > start - 1) & (pixel < start + length))[:, None]
    return (weight / weight.sum(-1, keepdim=True)).float()


def filter_separably(x, Wy, Wx):
    """Filters the columns of x, BxCxHxW, with Wy, BxS'xH, and its rows with Wx, BxSxW.  Returns
    BxCxS'xS."""
    return Wy[:, None] @ x @ Wx[:, None].mT


def random_colour(x, jitter, jitter_p, gray_p, draws):
    """Jitters brightness, contrast, saturation and hue, then makes some images grey.  Images may
    have any number of channels.

    All these steps together are one affine map per image.  Brightness b and contrast c map x to
    c b x + (1 - c) b m, where m is the mean luma of the image.  Saturation s blends x with its
    luma.  Hue turns colours about the grey axis; this map is linear, but HSV's hue is not.
    Grayscale is s = 0.  Paper: BYOL jitters in a random order.  Here: always in this order, because
    only in a fixed order the steps are one affine map."""
    C, shape = x.shape[1], x.shape
    u = draws(6)                                                        # Bx6
    jittered = (u[:, :1] < jitter_p).float()
    b, c, s, turn = (jittered * (2 * u[:, 1:5] - 1) * torch.tensor(jitter)).unbind(1)  # B
    b, c, s = (1 + v.view(-1, 1, 1) for v in (b, c, s))                 # Bx1x1, around 1
    s = torch.where(u[:, 5].view(-1, 1, 1) < gray_p, 0, s)
    luma = torch.tensor([0.299, 0.587, 0.114]) if C == 3 else torch.full((C,), 1 / C)
    A = s * torch.eye(C) + (1 - s) * luma.expand(C, C)                  # BxCxC
    if C == 3:
        A = make_hue_rotation(2 * np.pi * turn) @ A
    luma, b, c, A = (move_to(v, x.device) for v in (luma, b, c, A))
    mean = (x.mean((2, 3)) @ luma).view(-1, 1, 1)                       # Bx1x1
    x = torch.baddbmm((1 - c) * b * mean, c * b * A, x.flatten(2))      # BxCxHW
    return x.clamp_(0, 1).view(shape)


def make_hue_rotation(angle):
    """Returns Bx3x3 matrices that turn colours by `angle` (B, radians) about the grey axis
    (1, 1, 1), from red to green."""
    grey = torch.full((3, 3), 1 / 3)                                    # projects on the axis
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3 ** 0.5  # a quarter turn
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return grey + cos * (torch.eye(3) - grey) + sin * turn


def random_blur(x, blur_p, draws):
    """Blurs each image of x with the probability blur_p, in place.

    In crops of 224 pixels, the sigma of the Gaussian is 0.1 to 2 pixels.  Smaller crops get a
    proportionally smaller sigma."""
    u, S, (low, high) = draws(2), x.shape[-1], (0.1, 2.0)
    chosen = (u[:, 0] < blur_p).nonzero()[:, 0]                         # b indices
    width = (low + (high - low) * u[chosen, 1]) * S / 224
    chosen, width = move_to(chosen, x.device), move_to(width, x.device)
    pixel = torch.arange(S, dtype=x.dtype, device=x.device)
    distance = (pixel[:, None] - pixel).abs() / width.view(-1, 1, 1)    # bxSxS, in sigmas
    # Beyond 5 sigmas the weights would be denormal numbers, which are slow on a CPU.
    G = torch.exp(-0.5 * distance ** 2) * (distance < 5)
    G = G / G.sum(-1, keepdim=True)             # per pixel, because the border cuts some filters
    x[chosen] = filter_separably(x[chosen], G, G)
    return x


def random_solarize(x, solarize_p, draws):
    """Inverts the bright values of each image of x with the probability solarize_p, in place."""
    chosen = (draws(1)[:, 0] < solarize_p).nonzero()[:, 0]              # b indices
    chosen = move_to(chosen, x.device)
    drawn = x[chosen]                                                   # bxCxSxS
    x[chosen] = torch.where(drawn >= 0.5, 1 - drawn, drawn)
    return x


# ---- SSL4EO-S12 and BigEarthNet-MM: Sentinel-1 and Sentinel-2 ----

BLOCKS = {1: ("VV", "VH", "B2", "B3", "B4", "B8"), 2: ("B5", "B6", "B7", "B8A", "B11", "B12"),
          6: ("B1", "B9", "B10")}               # by pixel size, in units of 10 m
SSL4EO_S1 = {"VV": (-12.54847273, 5.25697717), "VH": (-20.19237134, 5.91150917)}
BIGEARTHNET_S1 = {"VV": (-12.59, 5.04), "VH": (-19.22, 5.42)}


def to_8bit(band, x, s1):
    """Returns the pixels of one band in 8 bits, clipped.

    S2   x is reflectance x 10000.  Reflectance 0 to 1 becomes 0 to 255.
    S1   x is in dB.  The lowest and the highest 1 % of the values are clipped.  Then mean -+ 2
         standard deviations of the data set, from `s1`, become 0 to 255.

    Paper: SAR images are normalised by mean and standard deviation.  Here: the same, but in 8 bits,
    as in the authors' code."""
    if band not in s1:
        x = np.nan_to_num(x)                    # pixels without data become 0
        return (np.clip(x, 0, 10000) * np.float32(255 / 10000) + np.float32(0.5)).astype(np.uint8)
    mean, std = s1[band]
    x = np.where(np.isfinite(x), x, np.float32(mean - 2 * std))  # the dB of an empty pixel is -inf
    x = np.clip(x, *np.quantile(x, (0.01, 0.99)))
    return (np.clip((x - mean) / (4 * std) + 0.5, 0, 1) * 255 + 0.5).astype(np.uint8)


def upsample(x, r):
    """Enlarges CxHxW uint8 to CxrHxrW: bilinear, with aligned pixel areas, rounded half up.

    0.501 is added instead of 0.5, because in float32 some ties lie just below one half."""
    x = F.interpolate(torch.tensor(x)[None].float(), scale_factor=r, mode="bilinear")[0]
    return x.add_(0.501).byte().numpy()


def stack_bands(record):
    """Splits a packed record into its bands.  Returns S1 2xSxS and S2 13xSxS, uint8, all bands
    resampled to 10 m."""
    S = round((len(record) * 12 / 91) ** 0.5)   # a record has S^2 (6 + 6/4 + 3/36) bytes
    parts = np.split(record, (6 * S ** 2, 6 * S ** 2 + 6 * (S // 2) ** 2))
    at10, at20, at60 = (part.reshape(-1, S // r, S // r) for part, r in zip(parts, BLOCKS))
    ms = np.empty((13, S, S), np.uint8)
    ms[[1, 2, 3, 7]] = at10[2:]
    ms[[4, 5, 6, 8, 11, 12]] = upsample(at20, 2)
    ms[[0, 9, 10]] = upsample(at60, 6)
    return torch.tensor(at10[:2]), torch.from_numpy(ms)


def pack_bands(bands, name, s1):
    """Packs {band: 1xHxW with the values of its file} into a record of bytes: first the bands with
    pixels of 10 m, then those of 20 m, then those of 60 m."""
    S, parts = bands["VV"].shape[1], []
    for r, group in BLOCKS.items():
        for band in group:
            shape, expected = bands[band].shape[1:], (S // r, S // r)
            need(shape == expected, f"{name}: {band} has {shape} pixels, but {expected} are "
                 f"expected. Download the file again")
            parts.append(to_8bit(band, bands[band], s1).ravel())
    return np.concatenate(parts)


class Packed:
    """Holds samples of Sentinel-1 and Sentinel-2.  A sample is two views of each modality, of
    random seasons: ([2xSxS, 2xSxS], [13xSxS, 13xSxS]) uint8.  With labels, a sample is (2xSxS,
    13xSxS, 19 float32).

    ids        the names of the samples
    read       a function of (name, season 0 to 3) that returns a record of bytes.  It reads a
               packed file, or it reads SSL4EO-S12's raw tree and packs the bands as `prepare` does
    s1         {band: its mean and standard deviation in dB}, as for `to_8bit`
    unpaired   the names that only one of the two sensors has
    labels     {name: 19 zeros and ones}, or None"""
    modalities = ("sar", "ms")
    inputs = MODALITIES["sar"], MODALITIES["ms"]
    notes = ()

    def __init__(self, ids, read, s1, unpaired=(), seed=0, labels=None):
        self.ids, self.read, self.s1, self.unpaired = ids, read, s1, list(unpaired)
        self.seed, self.epoch, self.labels = seed, 0, labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        name = self.ids[i]
        if self.labels:
            return *stack_bands(self.read(name, 0)), torch.from_numpy(self.labels[name]).float()
        # Paper: "one random season is selected to generate each augmented view".  Here: a season is
        # drawn for each view, and both modalities show this season, so that the pair in Cm shows
        # one moment.  The authors' code draws a season for each modality.
        seasons = np.random.default_rng((self.seed, self.epoch, i)).integers(4, size=2).tolist()
        pairs = {season: stack_bands(self.read(name, season)) for season in set(seasons)}
        x1, x2 = zip(*(pairs[season] for season in seasons))
        return list(x1), list(x2)

    def read_raw(self, i):
        """Reads the first season, and turns its 8 bits back into dB and reflectance x 10000."""
        sar, ms = (x.numpy() / 255 for x in stack_bands(self.read(self.ids[i], 0)))
        mean, std = np.array(list(self.s1.values())).T[..., None, None]  # 2x1x1 each
        return mean + (4 * sar - 2) * std, ms * 10000


def open_ssl4eo(root, list_file, seed, strict):
    """Opens SSL4EO-S12: the files that `prepare` packed or, if there are none, the raw tree."""
    packed = root if (root / "ids.txt").is_file() else root / "packed"
    if (packed / "ids.txt").is_file():
        found, unpaired = find_records(packed, [f"season{season}.npy" for season in range(4)]), []
        read = functools.partial(read_packed, packed, found)
    else:
        found, unpaired = find_locations(root)
        need(not (strict and unpaired), f"locations without a partner, in only one of s1/ and s2c/ "
             f"under {root}: {join_names(unpaired)}. Complete the download, or remove these "
             f"locations. `data.py check` lists them")
        read = functools.partial(read_season, root)
    ids = read_list(root / list_file, found, read_skipped(packed)) if list_file else list(found)
    return Packed(ids, read, SSL4EO_S1, unpaired, seed)


def open_bigearthnet(root, split):
    """Opens a split of BigEarthNet-MM as `prepare` packed it."""
    packed = root / "packed" / split
    need((packed / "ids.txt").is_file(), f"no {packed}/ids.txt. Give --split train, val or "
         f"test. If {root}/{split}.csv exists, run `python data.py prepare --task bigearthnet "
         f"--data {root}` first")
    found = find_records(packed, ["season0.npy", "labels.npy"])
    array = np.load(packed / "labels.npy")
    labels = {name: array[k] for name, k in found.items()}
    read = functools.partial(read_packed, packed, found)
    return Packed(list(found), read, BIGEARTHNET_S1, labels=labels)


def find_records(packed, files):
    """Reads ids.txt.  Returns {name: the number of its record}.  Lines that begin with # are
    damaged samples, and are left out."""
    lines = read_lines(packed / "ids.txt")
    for path in [packed / file for file in files]:
        with reading(path, "packed bytes", f"delete {packed} and prepare it again"):
            n = len(np.load(path, mmap_mode="r"))
        need(n == len(lines), f"{path} has {n} records, but ids.txt has {len(lines)} lines. Delete "
             f"{packed} and prepare it again")
    return {name: k for k, name in enumerate(lines) if not name.startswith("# ")}


def read_packed(packed, numbers, name, season):
    """Reads a record of S^2 91/12 bytes.  The file is opened for each record, because a memory map
    that stays open would be copied whole into each worker.  numbers: from `find_records`"""
    return np.load(packed / f"season{season}.npy", mmap_mode="r")[numbers[name]]


def find_locations(root):
    """Finds the locations of SSL4EO-S12.  Returns {name: name} of the locations that both sensors
    have, and a list of the other locations.  The first is a dict, because `pack` and `read_list`
    need one.  Names are not computed from numbers, because 97 of the 251,079 numbers have no folder
    and some names have fewer digits."""
    need((root / "s1").is_dir() or not any(root.glob("**/*.zarr.zip")),
         f"{root} holds SSL4EO-S12 v1.1, which has other values. Download v1.0 instead; {TREE}")
    s1, s2 = set(list_folders(root / "s1")), set(list_folders(root / "s2c"))
    return {name: name for name in sorted(s1 & s2)}, sorted(s1 ^ s2)


def read_season(root, name, season):
    """Reads a season of a location of SSL4EO-S12 from the raw tree.  Returns a record of bytes.

    season    0 to 3, in the order of the dates"""
    bands = {}
    for folder, group in (("s1", S1), ("s2c", S2)):
        where = root / folder / name
        # The dates are the key, because the names of S1 folders begin with the satellite.
        dates = sorted(list_folders(where), key=lambda name: re.search(r"\d{8}T\d{6}|$", name)[0])
        need(len(dates) == 4, f"{where} holds {len(dates)} seasons instead of 4. Download "
             f"this location again")
        for band in group:
            bands[band] = read_band(where / dates[season] / f"{band}.tif")
    return pack_bands(bands, name, SSL4EO_S1)


def read_seasons(root, name):
    """Reads the four seasons of a location of SSL4EO-S12.  Returns four records of bytes."""
    return [read_season(root, name, season) for season in range(4)]


# The official 19 classes.  Each class unites some of the 43 classes in the json files.  An empty
# tuple means that the class unites only the json class of the same name.
CLASSES19 = {
    "Urban fabric": ("Continuous urban fabric", "Discontinuous urban fabric"),
    "Industrial or commercial units": (),
    "Arable land": ("Non-irrigated arable land", "Permanently irrigated land", "Rice fields"),
    "Permanent crops": ("Vineyards", "Fruit trees and berry plantations", "Olive groves",
                        "Annual crops associated with permanent crops"),
    "Pastures": (), "Complex cultivation patterns": (),
    "Land principally occupied by agriculture, with significant areas of natural vegetation": (),
    "Agro-forestry areas": (), "Broad-leaved forest": (), "Coniferous forest": (),
    "Mixed forest": (), "Natural grassland and sparsely vegetated areas": (
        "Natural grassland", "Sparsely vegetated areas"),
    "Moors, heathland and sclerophyllous vegetation": (
        "Moors and heathland", "Sclerophyllous vegetation"),
    "Transitional woodland, shrub": ("Transitional woodland/shrub",), "Beaches, dunes, sands": (),
    "Inland wetlands": ("Inland marshes", "Peatbogs"),
    "Coastal wetlands": ("Salt marshes", "Salines"),
    "Inland waters": ("Water courses", "Water bodies"),
    "Marine waters": ("Coastal lagoons", "Estuaries", "Sea and ocean"),
}
CLASSES43 = {}                                  # class of the json -> index of its class of 19
for k, (name, united) in enumerate(CLASSES19.items()):
    CLASSES43 |= dict.fromkeys(united or (name,), k)
# These classes of the json belong to none of the 19 classes.
DROPPED43 = ("Road and rail networks and associated land", "Port areas", "Airports",
             "Mineral extraction sites", "Dump sites", "Construction sites", "Green urban areas",
             "Sport and leisure facilities", "Bare rock", "Burnt areas", "Intertidal flats")


def find_partners(folder):
    """Reads the json of each S1 patch, which names its S2 patch.  Returns {S2 name: S1 name}."""
    partner = {}
    for s1 in show_progress(list_folders(folder), "S1 patches"):
        with contextlib.suppress(BadInput):     # the S2 patch will then be listed as damaged
            about = read_json(folder / s1 / f"{s1}_labels_metadata.json", "labels")
            partner[str(about.get("corresponding_s2_patch"))] = s1
    return partner


def read_patch(folders, pair):
    """Reads a patch of BigEarthNet-MM.  Returns a record of bytes, and 19 labels, each 0 or 1."""
    (s2, s1), bands = pair, {}
    need(s1, f"no json under {folders[0]} names {s2} as its S2 patch. Complete the download of "
         f"this folder")
    for band in S1:
        bands[band] = read_band(folders[0] / s1 / f"{s1}_{band}.tif")
    for band in S2:
        if band != "B10":                       # products of level 2A have no cirrus band
            bands[band] = read_band(folders[1] / s2 / f"{s2}_B{band[1:]:0>2}.tif")
    bands["B10"] = np.zeros_like(bands["B1"])   # encoders of SSL4EO-S12 expect 13 bands
    path = folders[1] / s2 / f"{s2}_labels_metadata.json"
    target = np.zeros(len(CLASSES19), np.uint8)
    with reading(path, "labels"):
        for name in read_json(path, "labels")["labels"]:
            need(name in (*CLASSES43, *DROPPED43), f"{path}: {name!r} is none of the 43 classes. "
                 f"Download BigEarthNet-MM v1.0")
            if name in CLASSES43:
                target[CLASSES43[name]] = 1
    return [pack_bands(bands, s2, BIGEARTHNET_S1), target]


# ---- images in folders: RGB-DEM, RGB-depth, your own images ----

class Folders:
    """Holds pairs of images.  The two images of a pair have equal names in two folders.  A sample
    is ([x1], [x2]).  With masks in a third folder, a sample is (x1, x2, HxW int64), where 0 is
    unlabelled.  Each x is CxHxW, uint8 or float in [0, 1].

    files      {name: path} of modality 1, of modality 2, and of the masks if there are any
    ids        the names of the samples
    unpaired   the names for which at least one of the files is missing
    inputs     two rows of MODALITIES, which say how `read_input` and `encode` treat the images
    canvases   for each modality, the size (H, W) to which images are resized; None: no resizing
    classes    the largest class that a mask may hold; None: there are no masks
    notes      lines to print, which name the kind of image that each modality was guessed to be"""

    def __init__(self, files, ids, unpaired, inputs, canvases=(None, None), classes=None,
                 depth_unit=1000.0, notes=()):
        self.files, self.ids, self.unpaired, self.inputs = files, ids, unpaired, inputs
        self.canvases, self.classes, self.depth_unit = canvases, classes, depth_unit
        self.notes, self.modalities = notes, tuple(row["name"] for row in inputs)

    def __len__(self):
        return len(self.ids)

    def read_raw(self, i):
        """Reads both images in the units of their files: CxHxW, NaN where a value is missing."""
        name = self.ids[i]
        return [read_input(files[name], row) for files, row in zip(self.files, self.inputs)]

    def __getitem__(self, i):
        raw = self.read_raw(i)
        x1, x2 = (encode(a, row, canvas, self.depth_unit)
                  for a, row, canvas in zip(raw, self.inputs, self.canvases))
        if not self.classes:
            return [x1], [x2]
        path = self.files[2][self.ids[i]]
        mask = np.maximum(read_mask(path), 0)
        check_mask(path, mask, raw[0].shape[1:], self.classes)
        if self.canvases[0]:
            mask = resize_array(mask[None], self.canvases[0])[0]
        return x1, x2, torch.from_numpy(mask)


COLOUR_KINDS = ("aerial", "rgb", "hha")         # images with 8 bits and three channels
# Images that have an upper side.  Their crops have at least half of the area.
CAMERA_KINDS = ("rgb", "hha", "depth", "photo")


def read_input(path, row):
    """Reads an image as its row of MODALITIES says.  Returns CxHxW in the units of the file, with
    NaN where a value is missing.  Raises BadInput if the image is of another kind."""
    a, name = read_image(path), row["name"]
    C, stored = len(a), stored_type(path, a)
    if name in COLOUR_KINDS:
        fits, expected = stored == np.uint8 and C in (1, 3), "3 channels of uint8, or 1 if grey"
        if C == 1:
            a = np.repeat(a, 3, 0)
    elif name == "depth":
        fits = stored.kind in "uif" and stored.itemsize > 1 and C == 1
        expected = "1 channel of 16 bits or of floats, in --depth-unit steps per metre"
        a = np.where((a > 0) & (a != 65535) & np.isfinite(a), a.astype(float), np.nan)
    elif name == "dem":                         # no land is below -500 m or above 9000 m
        fits, expected = C == 1, "1 channel, heights in metres"
        a = np.where((a > -500) & (a < 9000), a, np.array([np.nan], np.float32))
    else:
        fits = C == len(row["bands"]) and row.get("dtype", str(stored)) == str(stored)
        expected = f"{len(row['bands'])} channels of {row.get('dtype', 'any type')}"
        if "dtype" in row:
            expected += ", like the other images"
    need(fits, f"{path} has {C} channels of {stored}, but {name} needs {expected}. Replace the "
         f"file. With --scenario custom: if --data1 and --data2 are swapped, swap them; otherwise "
         f"give another --as1 or --as2")
    need(a.dtype.kind != "f" or np.isfinite(a).any(),
         f"{path} has no valid value for {name}. Remove this sample")
    return a


def stored_type(path, a):
    """Returns the type of the numbers in a file.  `a`, the array that was read, may hold floats
    although the file holds integers, because missing values became NaN."""
    if a.dtype.kind == "f" and str(path).lower().endswith((".tif", ".tiff")):
        with reading(path, "a TIFF"), tifffile.TiffFile(path) as tif:
            return tif.series[0].dtype.newbyteorder("=")
    return a.dtype


def encode(a, row, canvas, depth_unit):
    """Turns an array of `read_input` into a tensor CxHxW, uint8 or float32 in [0, 1].  A missing
    value becomes the normaliser's mean, so this value is 0 after normalisation (in 8 bits: 0 within
    half a step).  All images of a modality get the same type."""
    name = row["name"]
    if name == "dem":
        return torch.from_numpy(stretch(a)).expand(3, -1, -1)
    if name in ("sar", "ms"):
        a = np.stack([to_8bit(band, x, SSL4EO_S1) for band, x in zip(row["bands"], a)])
        return torch.from_numpy(a)
    if name == "depth":
        a = a / depth_unit                      # metres
    elif row.get("raw_mean"):
        mean, std = (np.array(row[key])[:, None, None] for key in ("raw_mean", "raw_std"))
        x = ((a - mean) / (6 * std) + 0.5).clip(0, 1)
        a = np.where(np.isfinite(a), x, np.nan)
    elif a.dtype != np.uint8:                   # the file has 8 bits and a no-data tag
        a = a / 255
    if canvas:
        a = resize_array(a, canvas)
    if name == "depth":
        a = a / MAX_DEPTH
    if a.dtype != np.uint8:
        a = np.where(np.isfinite(a), a, np.array(row["mean"])[:, None, None])
        a = a.clip(0, 1).astype(np.float32)
        if name != "depth" and not row.get("raw_mean"):
            # Files of 8 bits become 8 bits again, because all images of a batch must have one type.
            a = (a * 255 + 0.5).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(a))


def resize_array(a, canvas, stored=None):
    """Resizes CxHxW, which may be NaN where values are missing.

    stored    the type of the file; default: the type of the array
    Values of 8 bits and floats are interpolated, bilinear and antialiased.  Only valid values are
    averaged, so that holes do not spread.  Other integers take the value of the nearest pixel,
    because a value between two classes, or between two steps of depth, may mean nothing."""
    stored = stored or a.dtype
    if stored.kind != "f" and stored != np.uint8:
        y, x = (((np.arange(n) + 0.5) * old / n).astype(int)
                for n, old in zip(canvas, a.shape[1:]))
        return a[:, y[:, None], x]
    if a.dtype == np.uint8:
        return resize_channels(a, canvas)
    valid = np.isfinite(a)
    weight = resize_channels(valid.astype(np.float32), canvas)
    a = resize_channels(np.where(valid, a, 0).astype(np.float32), canvas)
    a = np.where(weight > 0, a / np.maximum(weight, 1e-6), np.nan)
    return np.floor(a + 0.5) if stored == np.uint8 else a


def resize_channels(a, canvas):
    return np.stack([Image.fromarray(x).resize(canvas[::-1], Image.Resampling.BILINEAR) for x in a])


def stretch(dem):
    """Stretches heights 1xHxW, so that their 1st and 99th percentiles become 0 and 1.  Holes (NaN)
    become the mean of the stretched heights.  Returns float32."""
    valid = np.isfinite(dem)
    low, high = np.percentile(dem[valid], (1, 99))
    x = ((np.where(valid, dem, low) - low) / max(high - low, 1e-3)).clip(0, 1)
    return np.where(valid, x, x[valid].mean()).astype(np.float32)


def open_geonrw(root, list_file, classes, strict):
    """Opens GeoNRW, which `prepare` has cut into patches of 250x250 pixels, 16 per tile.

    Paper: trains on 6,942 scenes.  Here: trains on the 40 training cities of the data set's makers,
    because the paper does not list its scenes."""
    cropped = root / "cropped"
    where = [cropped / "rgb", cropped / "dem", cropped / "seg"]
    found = find_samples(where if classes else where[:2], list_file and cropped / list_file, strict)
    return Folders(*found, (MODALITIES["aerial"], MODALITIES["dem"]), classes=classes)


def open_rgbd(root, list_file, size, depth_unit, classes, strict):
    """Opens RGB-depth frames: RGB/, then HHA/ or, if there is no HHA/, Depth/; Label/ for a task.

    Frames of any size are resized to one canvas of 3/2 S x 2 S pixels for crops of S pixels (336 x
    448 for 224).  The canvas has the shape 4:3, because the frames of all sensors have this shape
    within 4 %.  A crop covers at least half of the canvas, which is 1.5 S^2 pixels, so no crop is
    enlarged.  The paper pretrains on all 10,335 frames of SUN RGB-D."""
    plain = (root / "Depth").is_dir() and not (root / "HHA").is_dir()
    second = "Depth" if plain else "HHA"
    where = [root / "RGB", root / second, root / "Label"]
    found = find_samples(where if classes else where[:2], list_file and root / list_file, strict,
                         read_skipped(root / second))
    inputs, canvas = (MODALITIES["rgb"], MODALITIES[second.lower()]), (size * 3 // 2, size * 2)
    return Folders(*found, inputs, (canvas, canvas), classes, depth_unit)


def open_own(where, list_file, inputs, declared, size, depth_unit, strict, reduce):
    """Opens your own pairs of images in two folders, or in two patterns with stars.

    where      the two folders or patterns
    list_file  the file of a list, or None for all pairs
    inputs     the two rows that a checkpoint keeps, or None.  They say what the modalities are
    declared   the values of --as1 and --as2.  Without `inputs`, they say what the modalities are;
               None: the first image of a modality shows what it is"""
    where = [os.path.normpath(path) for path in where]
    need(where[0] != where[1], f"--data1 and --data2 are both {where[0]}. Give the images of two "
         f"modalities")
    files, ids, unpaired = find_samples(where, list_file, strict)
    rows, notes, canvases = [], [], []
    for m, (pattern, side) in enumerate(zip(where, files)):
        paths, given = [side[name] for name in ids], declared[m]
        first, a = read_first(paths)
        if inputs:
            need(given in (None, inputs[m]["name"]), f"--as{m + 1} {given} does not fit, because "
                 f"the checkpoint was trained on {inputs[m]['name']}. Leave --as{m + 1} out")
            rows.append(inputs[m])
        else:
            rows.append(describe_own(given, first, a, paths))
        if not inputs and not given:
            notes.append(f"{pattern}: {len(a)} channels of {stored_type(first, a)}, treated as "
                         f"{rows[m]['name']}. If they are something else, give --as{m + 1}, one "
                         f"of {', '.join(AS)}")
        H, W = a.shape[1:]
        # Large frames become smaller, as in `open_rgbd`.  Images from above do not, because their
        # crops may have only a fifth of the area.
        large = reduce and rows[m]["name"] in CAMERA_KINDS and min(H, W) > 2 * size
        scale = size * 3 // 2 / min(H, W)
        canvases.append((round(scale * H), round(scale * W)) if large else None)
    return Folders(files, ids, unpaired, rows, canvases, None, depth_unit, notes)


AS = (*MODALITIES, "photo", "overhead")         # the possible values of --as1 and --as2


def read_first(paths):
    """Reads the first image that is not damaged, which shows what its folder holds.  Returns the
    path of the image, and the image."""
    for path in paths:
        with contextlib.suppress(BadInput):     # a damaged image is reported when samples are read
            return path, read_image(path)
    return paths[0], read_image(paths[0])       # raises BadInput, because all images are damaged


def describe_own(kind, first, a, paths):
    """Returns a row of MODALITIES for your own images.

    kind     the value of --as1 or --as2, or None
    first    the path of the image `a`, by which the kind is guessed
    paths    the paths of all images, by which mean and std are measured if necessary"""
    C, stored = len(a), stored_type(first, a)
    if kind is None:
        kind = "aerial" if C == 3 and stored == np.uint8 else "overhead"
    bands = [f"channel {c + 1}" for c in range(C)]
    if kind == "ms" and C != len(S2):
        return MODALITIES["ms"] | dict(bands=bands, mean=(0.0,) * C, std=(1.0,) * C)
    if kind in MODALITIES:
        return MODALITIES[kind]
    return measure_inputs(dict(name=kind, bands=bands, dtype=str(stored)), paths)


def measure_inputs(row, paths):
    """Measures mean and std of images for which MODALITIES has none, on at most 200 images.
    Returns the row with these entries:

    mean, std          of x in [0, 1], per channel
    raw_mean, raw_std  in the units of the files; None for 8 bits, where x is the value / 255"""
    numbers, C = [], len(row["bands"])
    for path in show_progress(spread_evenly(paths, 200), "measuring"):
        with contextlib.suppress(BadInput):     # a damaged image is reported when samples are read
            x = np.ma.masked_invalid(read_input(path, row).reshape(C, -1).astype(float))
            numbers.append([x.count(1), x.mean(1).filled(0), x.var(1).filled(0),
                            x.min(1).filled(np.inf), x.max(1).filled(-np.inf)])
    need(numbers, f"{os.path.dirname(paths[0])} has no image with a valid value. {paths[0]} is "
         f"the first of {len(paths)} images. Give other images")
    n, means, variances, low, high = np.array(numbers).swapaxes(0, 1)   # images x C each
    total = np.maximum(n.sum(0), 1)
    mean = (n * means).sum(0) / total
    std = np.sqrt((n * (variances + (means - mean) ** 2)).sum(0) / total)
    std[low.min(0) >= high.max(0)] = 1          # the channel is constant, or has no valid value
    if row["dtype"] == "uint8":
        return row | dict(range="0 to 255", mean=(mean / 255).tolist(), std=(std / 255).tolist(),
                          raw_mean=None, raw_std=None)
    return row | dict(range="the channel's mean -+ 3 standard deviations, clipped",
                      mean=[0.5] * C, std=[1 / 6] * C, raw_mean=mean.tolist(), raw_std=std.tolist())


# ---- files of depth and of cameras ----

def read_metres(path, depth_unit):
    """Reads a depth file.  Returns HxW in metres, with 0 where there is no reading.

    depth_unit    steps of the file per metre; None: the file has the encoding of SUN RGB-D"""
    steps, = read_band(path)
    need(steps.dtype.kind in "ui" and steps.dtype.itemsize > 1, f"{path} has values of "
         f"{steps.dtype}. Give a depth image of 16 bits")
    if depth_unit is None:
        return decode_sunrgbd_depth(steps)
    return np.where(steps < 65535, steps / depth_unit, 0)


def find_only_file(folder):
    files = glob.glob(os.path.join(glob.escape(folder), "*.*"))         # hidden files do not count
    need(len(files) == 1, f"{folder} holds {len(files)} files instead of one. Unpack SUNRGBD.zip "
         f"again")
    return files[0]


def decode_sunrgbd_depth(raw):
    """Decodes the 16 bits of SUN RGB-D, which are millimetres rotated left by three bits.  Returns
    metres, at most 8, as the data set's toolbox does."""
    raw = raw.astype(np.uint16)                 # Pillow before 10.3 gives 32 bits: no overflow
    return np.minimum((raw >> 3 | raw << 13) / 1000, 8.0)


def read_intrinsics(path):
    """Reads a 3x3 camera matrix from a text file of nine numbers, in one line or in three."""
    form = "the nine numbers fx 0 cx  0 fy cy  0 0 1 of a camera, in pixels"
    with reading(path, form):
        camera = np.array(Path(path).read_text("utf-8-sig").split(), float).reshape(3, 3)
    need(np.isfinite(camera).all() and camera[0, 0] > 0 and camera[1, 1] > 0,
         f"{path} holds {camera.ravel().tolist()}. Give {form}, with fx and fy above 0")
    return camera


# ---- HHA: depth as disparity, height and angle with gravity ----

def hha(depth_m, raw_m, camera):
    """Encodes depth as HHA (Gupta et al., 2014).  The result equals that of Gupta's MATLAB code.

    depth_m   HxW   metres, holes filled
    raw_m     HxW   the measured depth, with holes: a pixel of 0 or NaN is not used in the fits
    camera    3x3   camera matrix, in pixels

    Returns HxWx3 uint8: the disparity (31000 / cm, saturates below 1.2 m), the height above the
    lowest point (cm, saturates at 2.55 m) and the angle between the surface's normal and gravity
    (38..218 for 0..180 degrees).  Raises BadInput if the depth cannot be in metres, or if no pixel
    has a depth."""
    z = 100 * np.nan_to_num(np.asarray(depth_m, float))                # HxW, cm from here on
    need(0 <= z.min() <= z.max() < 1e4, f"the depth runs from {z.min() / 100:g} to "
         f"{z.max() / 100:g} m, but must be within 0 and 100 m. Set --depth-unit to the steps per "
         f"metre of the file (1000 if the file has millimetres)")
    fx, fy, cx, cy = np.asarray(camera, float)[[0, 1, 0, 1], [0, 1, 2, 2]]
    H, W = z.shape
    u = (np.arange(1, W + 1)[None] - cx) / fx                          # 1xW, X/Z; 1-based pixels
    v = (np.arange(1, H + 1)[:, None] - cy) / fy                       # Hx1, Y/Z
    m = ((np.asarray(raw_m) > 0) & (z > 0)).astype(float)              # HxW, 1: used in the fits
    need(m.any(), "no pixel has both depth_m and raw_m above 0. Remove this frame")
    q = m / np.where(m > 0, z, 1)                                      # HxW, 1/Z
    # These are the integral images of the nine products in the plane fits, padded for windows of 21
    # pixels.
    sums = [np.pad(a.cumsum(0).cumsum(1), ((11, 10), (11, 10)), "edge")
            for a in (u * u * m, u * v * m, u * m, v * v * m, v * m, m, u * q, v * q, q)]
    for a in sums:
        a[:11] = a[:, :11] = 0
    normals = fit_normals(sums, u, v, z, 10).reshape(3, -1)            # 3xHW, of large windows
    g = find_gravity(normals.compress(~np.isnan(normals[0]), 1))
    if np.degrees(np.arccos(min(g[1], 1))) <= 0.1:
        up = -z * v                             # as in Gupta's code: the camera's y axis
    else:
        up = -z * (g[0] * u + g[1] * v + g[2])
    lowest = up.min()
    # If the lowest point is less than 90 cm below the camera, the floor is out of sight.  The
    # camera then counts as 130 cm high.
    height = up - (lowest if lowest <= -90 else -130)
    cosine = np.einsum("c,chw->hw", g, fit_normals(sums, u, v, z, 3)).clip(-1, 1)
    angle = np.where(np.isnan(cosine), 180, np.degrees(np.arccos(cosine)))
    out = np.stack([31000 / np.maximum(z, 100), height, angle + 128 - 90], -1)  # HxWx3
    return np.floor(out + 0.5).clip(0, 255).astype(np.uint8)


def sum_windows(integral, radius):
    """Returns HxW sums over square windows of 2 radius + 1 pixels.  integral: (H+21)x(W+21), an
    integral image with the padding of `hha`."""
    lo, hi = 10 - radius, 11 + radius
    H, W = integral.shape[0] - 21, integral.shape[1] - 21
    strips = integral[hi:hi + H] - integral[lo:lo + H]
    return strips[:, hi:hi + W] - strips[:, lo:lo + W]


def fit_normals(sums, u, v, z, radius):
    """Fits a plane a u + b v + c = 1/z to the window around each pixel.  Returns the unit normals,
    3xHxW, with NaN where no pixel of the window is used.

    sums      the nine integral images of `hha`
    radius    a window has 2 radius + 1 pixels per axis"""
    uu, uv, u1, vv, v1, n, uq, vq, q1 = (sum_windows(a, radius) for a in sums)
    # Least squares by the adjugate of the normal matrix.  Its determinant is left out, because the
    # determinant would only scale a, b and c.
    A, B, C = vv * n - v1 * v1, u1 * v1 - uv * n, uv * v1 - u1 * vv
    D, E, G = uu * n - u1 * u1, uv * u1 - uu * v1, uu * vv - uv * uv
    normals = np.stack([A * uq + B * vq + C * q1, B * uq + D * vq + E * q1,
                        C * uq + E * vq + G * q1])
    length = np.sqrt(np.einsum("chw,chw->hw", normals, normals))       # HxW
    length[(n < 0.5) | (length == 0)] = np.nan
    # The point of the pixel itself decides the sign of the normal.  If this pixel has no depth, the
    # sign is such that N_z >= 0.
    side = (normals[0] * u + normals[1] * v + normals[2]) * z
    length[np.where(side == 0, normals[2], side) < 0] *= -1
    normals /= length
    return normals


def find_gravity(normals):
    """Returns the unit vector of gravity, estimated from normals, 3xP.  Normals of floors are
    parallel to gravity, normals of walls are perpendicular to gravity.  The estimate starts from
    the camera's y axis and takes ten steps."""
    g = np.array([0.0, 1.0, 0.0])
    i, j = np.triu_indices(3)
    products, A = normals[i] * normals[j], np.empty((3, 3))             # 6xP, the same in all steps
    for limit in np.radians([45] * 5 + [15] * 5):
        s = np.abs(g @ normals)
        weight = (s < np.sin(limit)) * 1.0 - (s > np.cos(limit))        # P: +1 wall, -1 floor
        A[i, j] = A[j, i] = products @ weight                           # the sum of weight n n^T
        # The eigenvector of the smallest eigenvalue is nearly perpendicular to the normals of
        # walls, and nearly parallel to the normals of floors.
        axis = np.linalg.eigh(A)[1][:, 0]
        g = axis if g @ axis >= 0 else -axis
    return g


# ---- files by their names ----

def find_images(where, suffixes=IMAGES):
    """Finds the images of a folder, or of a pattern with stars.  Returns {name: path}, sorted.

    The name of an image is the text for which the stars stand, joined by _.  A folder counts as the
    pattern folder/*.  If a star is at the end of the pattern, the name is without the suffix.
    Hidden files are left out.  Names that a list or a hidden file could not have are refused."""
    files, where = {}, Path(where).as_posix()
    parts = where.split("*")
    if len(parts) == 1 or os.path.isdir(where):
        parts = [f"{where}/", ""]
    form = re.compile("([^/]*)".join(map(re.escape, parts)), re.DOTALL)
    for path in sorted(glob.glob("*".join(map(glob.escape, parts)))):
        stem, suffix = os.path.splitext(path.replace(os.sep, "/"))
        if suffix.lower() not in suffixes:
            continue
        name = "_".join(form.fullmatch(stem if not parts[-1] else stem + suffix).groups())
        name = unicodedata.normalize("NFC", name)  # Unicode can write an accent in two ways
        need(name.strip() == name and name[:1] not in ("", "."), f"{path} would have the name "
             f"{name!r}. Names cannot be empty, or begin with a dot, or have spaces at an end. "
             f"Rename the file, or give a pattern such as 'rgb.*.png' instead of 'rgb*.png'")
        need(name not in files, f"{path} and {files.get(name)} have the same name {name}. Remove "
             f"one of these two files")
        files[name] = path
    need(files, f"no image ({', '.join(suffixes)}) under {where}. {list_contents(where)}. Give a "
         f"folder with images, or a pattern in quotes. A data set that was downloaded needs "
         f"`python data.py prepare` first; {TREE}")
    return dict(sorted(files.items()))


def list_contents(path):
    """Says what is in a folder.  If the folder does not exist, says what is in the nearest folder
    above it that exists."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return f"{folder} has {join_names(sorted(os.listdir(folder)), 6) or 'nothing'}"


def find_samples(where, list_file=None, strict=True, skipped=frozenset()):
    """Finds images with equal names in two folders or patterns, and in a third folder of masks.

    where      the two or three folders or patterns
    list_file  the file of a list: only the names in this list count
    strict     True: raise BadInput if a file is missing for any name.  False: raise BadInput only
               if no name has all files
    Returns a list of {name: path} for each of `where`, the names for which no file is missing, and
    the other names."""
    files = [find_images(folder) for folder in where]
    found = sorted(set().union(*files) - skipped)
    if list_file:
        found = read_list(list_file, dict.fromkeys(found), skipped)
    whole = set.intersection(*map(set, files))
    ids = [name for name in found if name in whole]
    unpaired = [name for name in found if name not in whole]
    if unpaired and (strict or not ids):
        have = ""
        for folder, side in zip(where, files):
            some = [name for name in unpaired if name in side][:2]
            have += f"  Of these names, {folder} has {some}."
        raise BadInput(f"images without a partner: {len(unpaired)} of {len(found)} names are not "
                       f"in all folders.{have}  Give the images of a sample equal names, or remove "
                       f"images without a partner. If the names differ by a fixed part, give "
                       f"patterns in which a star stands for the equal part, such as --data1 "
                       f"'chips/*_A.tif' --data2 'chips/*_B.tif'")
    return files, ids, unpaired


# ---- readers ----

@contextlib.contextmanager
def reading(path, what, remedy="copy or download it again, or remove it"):
    """Turns every error inside the `with` block into a BadInput, which names the file, the reason
    and the remedy.  what: what the file should hold."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:                  # a damaged file can raise errors of any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, FileNotFoundError):
            raise BadInput(f"no file {path}. {list_contents(Path(path).parent)}") from None
        if "weights_only" in reason:            # torch's advice would run code of the file
            reason = "it is damaged, or holds more than tensors and plain values"
        if "imagecodecs" in reason:             # the TIFF has LZW, zstd, JPEG or predictor 3
            remedy = "pip install imagecodecs, or save the file without compression"
        raise BadInput(f"{path} cannot be read as {what} ({reason}); {remedy}") from None


def open_image(path):
    """Opens an image with Pillow, turns it upright and reads its pixels.

    Only these four formats are tried, because other formats (EPS) start a program."""
    with reading(path, "an image"):
        image = Image.open(path, formats=("PNG", "JPEG", "JPEG2000", "TIFF"))
        rawmode = str(image.tile[0][3]) if image.tile else ""  # how the file stores its pixels
        need(not re.fullmatch("(RGBA?|LA);16B", rawmode), f"{path} has several channels of 16 "
             f"bits, of which Pillow reads only 8. Save it as TIFF or npy")
        image.info["rawmode"] = rawmode         # `load` forgets it
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image


def read_image(path, indices=False):
    """Reads a png, jpg, jp2, tif or npy file as a CxHxW array in the type of the file.  An alpha
    channel is left out.

    indices    True for masks: an image with a palette then gives its indices, not its colours"""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".tif", ".tiff"):
        a = read_tiff(path, indices)
    elif suffix == ".npy":
        with reading(path, "a numpy array"), open(path, "rb") as file:
            a = np.lib.format.read_array(file, allow_pickle=False)
            a = a.astype(a.dtype.newbyteorder("="), copy=False)
    else:
        image = open_image(path)
        need(image.format == "PNG" or not indices, f"{path} is a {image.format} image, which has "
             f"wrong indices where two classes meet. Make the mask again as PNG, TIFF or npy")
        if image.mode in ("RGBA", "P", "CMYK", "YCbCr") and not indices:
            image = image.convert("RGB")        # alpha, or GeoNRW's near infrared, is left out
        if image.mode == "LA":
            image = image.convert("L")
        a = np.array(image)
        if indices:                             # Pillow has multiplied grey values of 2 or 4 bits
            a = a // {"L;2": 85, "L;4": 17}.get(image.info["rawmode"], 1)
    if a.dtype == bool:
        a = a.astype(np.uint8) * (1 if indices else 255)
    need(a.dtype.kind in "uif" and a.ndim in (2, 3) and a.size, f"{path} holds {a.dtype} of the "
         f"shape {a.shape}. Give real numbers of the shape HxW, HxWxC or CxHxW")
    if suffix not in (".tif", ".tiff") and a.ndim == 3 and a.shape[2] < min(a.shape[:2]):
        a = a.transpose(2, 0, 1)                # HxWxC -> CxHxW; `read_tiff` orders axes itself
    a = a.reshape(-1, *a.shape[-2:])
    # 64x64x100 (HxWxC) looks like 64 channels of 64x100 (CxHxW).  If there are fewer than 16, they
    # are channels, because no image is so small.
    need(len(a) < 16 or len(a) != a.shape[1] or a.shape[1] == a.shape[2], f"{path} has the shape "
         f"{a.shape}, which could be HxWxC or CxHxW. Save it as CxHxW")
    return a


def read_tiff(path, indices):
    """Reads a TIFF as HxW or CxHxW in the type of the file, and skips overviews.  Pixels with the
    no-data value of the header become NaN, so the array is then float."""
    allowed = ("MINISBLACK", "PALETTE") if indices else ("MINISBLACK", "RGB", "YCBCR")
    with reading(path, "a TIFF"), tifffile.TiffFile(path) as tif:
        image, *others = [series for series in tif.series if not series.keyframe.is_reduced]
        page, axes, shape = image.keyframe, image.axes, image.shape
        photometric = page.photometric.name
        need(not others, f"{path} holds {1 + len(others)} images. Save each image in its own file")
        need(photometric in allowed, f"{path} is of the photometric kind {photometric}. Convert "
             f"the file to {' or '.join(allowed)}")
        # If HxWxC was written by tifffile.imwrite, it can look like many bands with few rows.
        need(axes[-1] != "X" or len(shape) < 3 or shape[-1] >= min(shape[:-1]), f"{path} has the "
             f"shape {shape}, which could be HxWxC or CxHxW. Save it as CxHxW")
        need(274 not in page.tags or page.tags[274].value == 1, f"{path} has the tag Orientation, "
             f"which turns the image. Save it upright, without this tag")
        a = np.moveaxis(image.asarray(), (axes.index("Y"), axes.index("X")), (-2, -1))
        a = a.astype(a.dtype.newbyteorder("="), copy=False)
        if a.ndim == 3 and len(a) == page.samplesperpixel:
            # extrasamples says what each of the last channels is: 1 and 2 mean alpha.  As for a
            # png, alpha is left out.
            usual = (0,) * (len(a) - len(page.extrasamples))
            a = a[[sample not in (1, 2) for sample in (*usual, *page.extrasamples)]]
        if 42113 in page.tags:                  # GDAL_NODATA
            nodata = float(str(page.tags[42113].value).strip("\0 "))
            a = np.where(is_nodata(a, nodata), np.nan, a.astype(np.result_type(a, np.float32)))
        return a


def is_nodata(a, value):
    """Returns where an array has a no-data value.  Floats may differ from it by rounding."""
    return np.isclose(a.astype(float), value, rtol=1e-6 if a.dtype.kind == "f" else 0, atol=0)


def read_band(path, indices=False):
    """Reads an image that has one channel, as 1xHxW."""
    a = read_image(path, indices)
    need(len(a) == 1, f"{path} has {len(a)} channels, but must have one. Save each band in its own "
         f"file, and a mask as class indices instead of colours")
    return a


def read_mask(path):
    """Reads a mask as HxW int64.  An image with a palette gives its indices.

    A pixel without a label becomes -1.  Such pixels have the no-data value of the header, NaN, or a
    negative value."""
    a, = read_band(path, indices=True)
    if a.dtype.kind == "f":
        a = np.where(np.isfinite(a), a, -1)
    odd = a[(np.rint(a) != a) | (a >= 2 ** 31)]
    need(len(odd) == 0, f"{path} holds {odd[:1]}, which is not a class index. Make the mask "
         f"again from its source, with whole numbers")
    return np.maximum(a.astype(np.int64), -1)


def read_palette(path):
    """Returns the palette of an image as a list of (red, green, blue).  The list is empty if the
    image has no palette."""
    with contextlib.suppress(OSError), Image.open(path, formats=("PNG", "TIFF")) as image:
        if image.mode == "P":
            return list(map(tuple, np.reshape(image.getpalette(), (-1, 3)).tolist()))
    return []                                   # Pillow cannot open npy files and some TIFFs


def count_mask_values(files):
    """Returns {value: (number of its pixels, number of masks that hold it)} of masks {name: path}.

    Raises BadInput if an index has different colours in two palettes.  If each mask was saved with
    a palette of its own, the same index may mean different classes."""
    counts, first_use = {}, {}                  # first_use: index -> (its colour, its first file)
    for path in show_progress(files.values(), "masks"):
        palette = read_palette(path)
        values, numbers = np.unique(read_mask(path), return_counts=True)
        for value, more in zip(values.tolist(), numbers.tolist()):
            pixels, masks = counts.get(value, (0, 0))
            counts[value] = pixels + more, masks + 1
            if 0 <= value < len(palette):
                colour, file = first_use.setdefault(value, (palette[value], path))
                need(colour == palette[value], f"index {value} has the colour {colour} in {file}, "
                     f"but {palette[value]} in {path}, so it may mean two classes. Save all masks "
                     f"with one palette, or as grey images of class indices")
    return dict(sorted(counts.items()))


def find_mask_warnings(counts):
    """Returns a list: one warning if many values of the masks are rare, otherwise nothing.

    counts: from `count_mask_values`.  Many rare values are a sign that the masks were resized
    bilinearly or saved as JPEG, because both blend the indices of two classes into other indices,
    with a few pixels each."""
    total = sum(pixels for pixels, _ in counts.values())
    mask_size = total / max((masks for _, masks in counts.values()), default=1)
    rare = [value for value, (pixels, masks) in counts.items()
            if pixels / masks < max(10, mask_size / 1000)]
    if len(rare) < 3 or 2 * len(rare) <= len(counts):
        return []
    return [f"{len(rare)} of the {len(counts)} values in the masks, such as {rare[:3]}, have only "
            f"a few pixels per mask. Were the masks resized bilinearly, or saved as JPEG?  If so, "
            f"make the masks again from their source, and resize them by the nearest pixel"]


def read_lines(path):
    """Reads the lines of a list.  Empty lines and spaces around a line are left out."""
    with reading(path, "a list in utf-8"):
        lines = unicodedata.normalize("NFC", Path(path).read_text("utf-8-sig")).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    need(lines, f"{path} is empty. Write one name per line")
    return lines


def read_skipped(folder):
    """Returns the names of the samples that `prepare --skip-bad` has left out of a folder."""
    file = Path(folder) / "bad-ids.txt"
    return {line.split("\t")[0] for line in read_lines(file)} if file.is_file() else set()


def read_list(path, names, skipped=()):
    """Reads a list of images.  Returns their names, in the order of the lines.

    path     the file of the list.  A line, or its first column, is a name or the path of an image
             with this name, such as `RGB/7.jpg` or `SUNRGBD/kv1/a/b//image/x.jpg`
    names    the names that exist"""
    found = {}                                  # name -> its line
    for line in read_lines(path):
        first = re.split(r"[\s,]", line)[0]
        if match_name(line, skipped) or match_name(first, skipped):
            continue
        name = match_name(line, names) or match_name(first, names)
        need(name, f"{path}: no image has the name in the line {line!r}. Write one name per line, "
             f"such as {next(iter(names), '')!r}")
        need(name not in found, f"{path} names {name} twice. Remove one of the two lines")
        found[name] = line
    return list(found)


def match_name(text, names):
    """Returns the name that a line of a list means.  The line is the name itself, or a path of the
    image or of the SUN RGB-D frame.  Returns None if `names` does not have this name."""
    frame = re.sub("^.*SUNRGBD/|/image/.*$|/$", "", re.sub("/+", "/", text))
    forms = text, frame, frame.replace("/", "-"), os.path.splitext(os.path.basename(text))[0]
    return next((name for name in forms if name in names), None)


def list_folders(folder):
    """Returns the names of the folders in a folder, sorted."""
    need(os.path.isdir(folder), f"no folder {folder}. {list_contents(folder)}; {TREE}")
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


# ---- from data sets to batches ----

NUM_CLASSES = dict(bigearthnet=19, geonrw=10, sunrgbd=37, nyuv2=40)  # the classes of each task
# These tasks use the data folder of a scenario.
SHARED_ROOTS = dict(geonrw="data/rgb-dem", sunrgbd="data/rgbd")


def open_dataset(name, root, size, split="all", depth_unit=1000.0, seed=0, strict=True,
                 classes=None, inputs=None, declared=(None, None), reduce=False):
    """Opens the data set of a scenario, or of a transfer task, which gives (x1, x2, target).

    root       the folder of the data set; for custom, two folders or patterns
    split      "all", or the name of a list such as "train"; for custom, the file of a list
    strict     True: raise BadInput if a file of a sample is missing; False: .unpaired lists such
               samples
    classes    how many classes the masks may have; None: the number of the task

    For custom only:
    inputs     the two rows of MODALITIES that a checkpoint keeps
    declared   the values of --as1 and --as2
    reduce     True: photos that are much larger than the crop become smaller, as for rgbd"""
    depth_unit, list_file = depth_unit or 1000.0, None
    if split != "all":
        list_file = Path(split) if name == "custom" else f"{split}.txt"
    if name == "custom":
        return open_own(root, list_file, inputs, declared, size, depth_unit, strict, reduce)
    root, classes = Path(root), classes or NUM_CLASSES.get(name)
    need(root.is_dir(), f"no folder {root}. Give the folder of the data with --data, or try "
         f"--toy; {TREE}")
    if name == "sar-optical":
        return open_ssl4eo(root, list_file, seed, strict)
    if name == "bigearthnet":
        return open_bigearthnet(root, split)
    if name in ("rgb-dem", "geonrw"):
        return open_geonrw(root, list_file, classes, strict)
    return open_rgbd(root, list_file, size, depth_unit, classes, strict)


class Samples:
    """Wraps a data set so that its index is (epoch, i).  Then one loader serves all epochs.

    keep    True: up to 1 GB of decoded samples stay in memory.  Samples of SSL4EO-S12 never stay,
            because they change with the epoch: their seasons are random"""

    def __init__(self, data, keep=False):
        self.data, self.decoded = data, {}
        changes = isinstance(getattr(data, "data", data), Packed)       # finetune wraps data sets
        self.room = 2 ** 30 if keep and not changes else 0

    def __getitem__(self, index):
        self.data.epoch, i = index
        if i in self.decoded:
            return self.decoded[i]
        sample = self.data[i]
        if self.room > 0:
            self.decoded[i] = sample
            for views in sample:
                self.room -= sum(x.nbytes for x in (views if isinstance(views, list) else [views]))
        return sample


def move_views(views, device):
    """Moves the images of both views to the device.  If both views are made from the same images,
    these images move once and are returned twice."""
    views = [move_to(x, device) for x in views]
    return views if len(views) == 2 else [views[0], views[0]]


def move_to(x, device):
    """Copies x to the device.  The program waits for copies to MPS, because such a copy could be
    incomplete otherwise.  It does not wait for copies to CUDA."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


def epoch_batches(n, batch_size, seed, epoch):
    """Returns the indices of all batches of an epoch, (n // batch_size) x batch_size.  The order is
    a permutation of 0..n-1 that depends only on seed and epoch.  A last batch with fewer samples is
    left out."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[:n // batch_size * batch_size].reshape(-1, batch_size)


def check_mask(path, mask, image_size, num_classes):
    """Raises BadInput if a mask HxW has another size than its image, or has labels outside 0 to
    num_classes.

    Some data sets have a class 0, and 255 for no label.  The remedy is in two steps, because class
    0 would be lost if 255 simply became 0."""
    mask_size, low, high = tuple(mask.shape[-2:]), int(mask.min()), int(mask.max())
    need(mask_size == tuple(image_size), f"{path} is a mask of {mask_size} pixels, but its image "
         f"has {tuple(image_size)} pixels. Make the mask again for this image")
    need(0 <= low <= high <= num_classes, f"{path} has the label {low if low < 0 else high}, but "
         f"labels must be 1 to {num_classes}, or 0 for no label. If classes begin at 0 here, add "
         f"1 to each class. Then write 0 for every value that is no class, such as 255")


# ---- what the network sees ----

def choose_visible(row):
    """Returns the indices of the channels that make_visible shows: of B4, B3 and B2 if there are
    such bands, otherwise of the first three channels, or of one channel."""
    bands = row["bands"]
    if "B4" in bands:
        return [bands.index(band) for band in ("B4", "B3", "B2")]
    return [0] if row["name"] in ("sar", "dem") or len(bands) < 3 else [0, 1, 2]


def name_composite(row):
    """Returns which bands `make_visible` shows, such as ": B4 B3 B2", or "" if it shows all."""
    channels = choose_visible(row)
    if len(channels) == len(row["bands"]):
        return ""
    return ": " + " ".join(row["bands"][c] for c in channels)


def make_visible(x, row):
    """Turns a normalised image CxHxW into an image to look at, HxWx3 in [0, 1].

    Colours and HHA are shown as they are.  All other images are stretched, so that the 2nd and the
    98th percentiles become 0 and 1."""
    mean, std = (torch.tensor(row[key]).view(-1, 1, 1) for key in ("mean", "std"))
    channels = choose_visible(row)
    x = (x.cpu() * std + mean).numpy()[channels].transpose(1, 2, 0)     # HxWx3, or 1
    if len(channels) == 1 or len(row["bands"]) > 3:
        low, high = np.percentile(x, (2, 98), axis=(0, 1))
        x = (x - low) / np.maximum(high - low, 1e-6)
    return np.broadcast_to(x.clip(0, 1), (*x.shape[:2], 3))


# Each row has five entries: the unit of the files; the values of x that are the result of clipping;
# the largest share of clipped values that is normal; the smallest distance between the quartiles of
# x that is normal; and a question, which is asked if one of these two limits is not met.
LIMITS = {
    "sar": ("dB", (0, 1), 0.25, 0.002, "are the files in dB?"),
    "ms": ("reflectance x 10000", (1,), 0.05, 0.002, "are the files reflectance x 10000?"),
    "depth": ("m", (1,), 0.05, 0.002, "is --depth-unit right?"),
    "dem": ("m", (), 0, 0.002, "is most of the ground flat, or are most heights missing?"),
    "8 bits": ("of 255", (), 0, 0.002, "does each image have only one colour, or more than 8 "
               "bits?"),
    "measured": ("", (0, 1), 0.05, 0.045, "are a few values far from all others?  Remove these "
                 "values, or take the logarithm of all values")}


def find_limits(row):
    """Returns the entries of LIMITS for a row of MODALITIES."""
    return LIMITS.get("measured" if row.get("raw_mean") else row["name"], LIMITS["8 bits"])


def look_at(data, i):
    """Reads a sample.  Returns for each modality:

    x        CxP   some values of x, in [0, 1]
    raw      CxP   some values in the unit that LIMITS names, NaN where missing
    ratio          the image's width / height"""
    looks, raws = [], data.read_raw(i)
    for views, raw, row in zip(data[i], raws, data.inputs):
        views = views if isinstance(views, list) else [views]
        x = np.concatenate([take_pixels(to_unit_range(view).numpy()) for view in views], 1)
        H, W = raw.shape[1:]
        raw = take_pixels(raw) / (data.depth_unit if row["name"] == "depth" else 1)
        looks.append((x, raw, W / H))
    return looks


def take_pixels(a):
    """Takes about 2,000 evenly spaced pixels of CxHxW.  Returns CxP, with NaN for values that are
    not finite."""
    # The step and the width have no common divisor, so that the pixels are of all columns.  A step
    # of 32 in a width of 256 would meet only 8 columns.
    step = a[0].size // 2000 | 1
    while math.gcd(step, a.shape[-1]) > 1:
        step += 1
    a = a.reshape(len(a), -1)[:, ::step].astype(float)
    return np.where(np.isfinite(a), a, np.nan)


def describe_inputs(data, indices, workers=0):
    """Describes what the network will see, on some samples.  Returns two lists of lines.

    table       one line per band: percentiles in the unit of the files; the shares of missing and
                of clipped values; mean and std of x in [0, 1], beside the mean and std of the
                normaliser
    warnings    one line for each thing that looks wrong"""
    look = functools.partial(look_at, data)
    # Without workers there is no DataLoader, because a DataLoader would draw a random number and so
    # change the run that calls this function.
    looks = list(in_processes(look, indices, workers, "statistics") if workers
                 else map(look, indices))
    table = [f"{'band':22s}       1 %    median      99 %  missing  clipped   mean   std "
             f"(normaliser's)  unit"]
    warnings = []
    for m, row in enumerate(data.inputs):
        xs, raws, _ = zip(*(pair[m] for pair in looks))
        xs, raws = np.concatenate(xs, 1), np.concatenate(raws, 1)
        title = row["name"]
        if data.inputs[0]["name"] == data.inputs[1]["name"]:
            title += f" {m + 1}"
        faults = {}                             # what is wrong -> the bands with this fault
        for c, band in enumerate(dict.fromkeys(row["bands"])):  # three channels repeat the height
            table.append(f"{title + ' ' + band:22s} {describe_band(row, c, xs[c], raws[c])}")
            fault = find_fault(row, c, xs[c], raws[c])
            if fault:
                faults.setdefault(fault, []).append(band)
        warnings += [f"{title}, {join_names(bands)}: {fault}" for fault, bands in faults.items()]
    uneven = [data.ids[i] for i, ((_, _, ratio1), (_, _, ratio2)) in zip(indices, looks)
              if abs(math.log(ratio1 / ratio2)) > 0.05]
    if uneven:
        warnings.append(f"{len(uneven)} of {len(indices)} pairs, such as {uneven[0]}, have two "
                        f"images of different width / height. Both images are resized to one "
                        f"shape, so one of them is distorted. Cut both images to the same scene")
    # All photos of a side get the shape of the first photo.
    for m, canvas in enumerate(getattr(data, "canvases", ())):
        bent = [data.ids[i] for i, pair in zip(indices, looks)
                if canvas and abs(math.log(pair[m][2] * canvas[0] / canvas[1])) > 0.05]
        if bent:
            warnings.append(f"{len(bent)} of {len(indices)} images of modality {m + 1}, such as "
                            f"{bent[0]}, are distorted, because all are resized to the shape "
                            f"{canvas}. Cut all images to one width / height")
    return table, warnings


def describe_band(row, c, x, raw):
    """Returns the line of the table for one band.  c: the channel; x, raw: from `look_at`."""
    unit, ends, *_ = find_limits(row)
    values = raw[np.isfinite(raw)]
    low, half, high = np.percentile(values, (1, 50, 99)) if len(values) else [0.0] * 3
    spread = high - low or abs(half) or 1
    numbers = " ".join(f"{format_value(value, spread):>9s}" for value in (low, half, high))
    shares = f"{np.isnan(raw).mean():8.1%} {np.isin(x, ends).mean():8.1%}"
    return (f"{numbers} {shares}  {x.mean():5.3f} {x.std():5.3f} ({row['mean'][c]:.3f} "
            f"{row['std'][c]:.3f})  {unit}")


def format_value(value, spread):
    """Writes a number, rounded to a hundredth of the spread of its band or finer.  So a value near
    0 is written as 0 instead of -0.00018."""
    return f"{round(value, 2 - math.floor(math.log10(spread))) + 0.0:.10g}"


def find_fault(row, c, x, raw):
    """Returns what looks wrong in a band, or None.  Four things can look wrong: most values are
    missing; one value is far from all others; the unit or scale is wrong; the values are so near to
    each other that the network can hardly tell them apart."""
    _, ends, normal, least, question = find_limits(row)
    if np.isnan(raw).mean() > 0.5:
        return "more than half of the values are missing"
    value = find_far_value(raw[np.isfinite(raw)]) if row.get("raw_mean") else None
    if value is not None:
        return (f"the value {value:.10g} occurs many times and is far from all other values. If "
                f"it means that there is no data, give --nodata1={value:.10g} (for modality 2, "
                f"--nodata2=...) to `data.py prepare`, or set the tag GDAL_NODATA, or replace the "
                f"value by NaN")
    if np.isin(x, ends).mean() > normal:
        return f"more than {normal:.0%} of the values are clipped: {question}"
    # B10 (cirrus) is 0 in products of level 2A, and nearly 0 in products of level 1C.
    if x.min() == x.max() and row["bands"][c] != "B10":
        return f"all values look equal to the network: {question}"
    low, half, high = np.percentile(x, (25, 50, 75))
    if row["name"] == "depth" and half < 0.03:
        return f"half of the values are below {0.03 * MAX_DEPTH:.1f} m: {question}"
    if high - low < least and row["bands"][c] != "B10":
        return f"half of the values look equal to the network: {question}"
    return None


def find_far_value(values):
    """Returns the smallest or the largest value if this value repeats and is far from the others;
    otherwise None.  Far means farther than the quartiles of the other values are from each other.
    """
    for end in (values.min(), values.max()):
        others = values[values != end]
        repeats = len(values) - len(others)
        if len(others) and repeats >= max(3, 0.0005 * len(values)):
            quartile1, quartile3 = np.percentile(others, (25, 75))
            if np.abs(others - end).min() > quartile3 - quartile1 > 0:
                return end
    return None


def join_names(names, most=3):
    """Joins at most `most` names by commas, and says how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def find_warnings(data):
    """Returns one line for each thing that looks wrong in 16 samples, as the network will see them.
    """
    return describe_inputs(data, spread_evenly(range(len(data)), 16))[1]


def spread_evenly(indices, n):
    """Returns n of the indices, evenly spread, or all indices if there are fewer than n."""
    return [indices[i] for i in np.linspace(0, len(indices) - 1, min(n, len(indices))).astype(int)]


# ---- what the four scripts share: files, processes, the command line ----

def write_atomically(path, write):
    """Calls write(file) with the new binary file PATH.part, then renames this file to PATH.  If the
    run is killed or the disk is full, PATH keeps its old content.

    If a symbolic link has the name PATH.part, it is deleted and not followed."""
    part = Path(f"{path}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        # If the disk is full, torch.save raises a RuntimeError, whose context is the OSError.
        for reason in (error, error.__context__):
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, str(path)) from None
        raise


# A pattern for the text of a RuntimeError -> what to do about this error.
REMEDIES = {
    "out of memory|can't allocate memory":
        "Give a smaller --batch-size or, in pretraining, a narrower --projector",
    "DataLoader worker|shared memory|</?torch_":
        "If the memory or /dev/shm is full, give fewer --workers, or enlarge /dev/shm (docker "
        "--shm-size)",
    "stack expects each tensor":
        "The images have different sizes. Cut them into tiles of one size with `data.py prepare "
        "--scenario custom`",
    "more than 1 value per channel":
        "Batch normalisation needs more values. Give a larger --batch-size or --size"}


def write_text(path, text):
    """Writes text as UTF-8.  Characters that UTF-8 cannot encode (they can occur in file names) are
    written as backslash escapes."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def read_json(path, what):
    """Returns the dict in a json file.

    what    what the file holds.  The message says so if the file is damaged"""
    with reading(path, what):
        value = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} instead of a json object")
        return value


def number(convert, low, high=math.inf):
    """Returns a function for argparse's type=, which reads a finite int or float from low to high.
    """
    def parse(text):
        with contextlib.suppress(ValueError):
            value = convert(text)
            if low <= value <= high and value != math.inf:
                return value
        limits = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
        noun = "a whole number" if convert is int else "a number"
        raise argparse.ArgumentTypeError(f"{text} cannot be used. Give {noun} {limits}")
    return parse


def expand_path(text):
    """Returns the name of a file or folder, or a pattern, for argparse's type=.  At the beginning,
    ~ stands for the home folder."""
    if not text:                                # for example from a shell variable that is not set
        raise argparse.ArgumentTypeError("the name is empty. Give a file, a folder or a pattern")
    return os.path.expanduser(text)


class OnePattern(argparse.Action):
    """Stores one folder or pattern, for argparse's action= with nargs="+".  If there are several
    values, the shell has replaced a pattern without quotes by the files that match it."""

    def __call__(self, parser, args, values, option=None):
        if len(values) > 1:
            parser.error(f"{option} got {len(values)} files, such as {values[0]}. Give one "
                         f"folder, or a pattern in quotes, such as '*.tif'")
        setattr(args, self.dest, values[0])


def count_cores():
    """Returns how many cores this process may use.  A cgroup or Slurm may allow fewer cores than
    the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_workers():
    """Returns the default of --workers.  With CUDA it is the number of cores per process, at most
    8.  Without CUDA it is 0, because workers would take cores from the training."""
    if not torch.cuda.is_available():
        return 0
    return min(8, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def leave_group(worker):
    """Moves a DataLoader worker to its own process group.  Then a signal to the main group, such as
    Ctrl-C, does not stop the worker, so the main process has time to save."""
    if os.name == "posix":
        os.setpgrp()


def show_progress(*args, **settings):
    """Returns tqdm's bar, which disappears at the end.  If stderr is not a terminal (it can
    be a log file), the bar is printed only every 30 s."""
    if sys.stderr is None or not sys.stderr.isatty():
        settings |= dict(delay=30, mininterval=30, miniters=1, disable=sys.stderr is None)
    return tqdm(*args, **dict(leave=False, dynamic_ncols=True) | settings)


def run_main(main):
    """Calls main() and exits with the code that main() returns.  If input cannot be used, prints
    one line on stderr and exits with code 2."""
    with contextlib.suppress(AttributeError):   # a notebook's stdout, or None if stdout is closed
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)                           # shells use this code for Ctrl-C
    except BrokenPipeError:                     # the reader of stdout, such as `| head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError, RuntimeError, ValueError) as error:
        line = describe_error(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def describe_error(error):
    """Returns the line to print for an error, or None if the cause is an error in the code."""
    text = str(error).strip()
    if "Traceback" in text:                     # from a worker: the message is in the last line
        text = text.splitlines()[-1]
    text = re.sub(r"^(\w+\.)?(BadInput|\w+Error): ", "", " ".join(text.splitlines()))
    if not isinstance(error, (RuntimeError, ValueError)):
        return text
    for pattern, remedy in REMEDIES.items():
        if re.search(pattern, text):
            return f"{text}. {remedy}"
    return None


# ---- made-up scenes with three known factors: one common factor, and two unique factors ----

# A factor is the shape of one kind of object.  Both sensors see the first kind, only sensor 1 sees
# the second kind, and only sensor 2 sees the third kind.  Only the objects may identify a scene,
# because an encoder would learn any shortcut instead of the shapes (a tint of 5 % was enough).  So
# all shapes have the same area; position, size and rotation are random; clutter is weak.
SHAPES = ("disk", "ring", "cross", "triangle")
SCENE_CLASSES = ("background", *(f"{which} {shape}" for which in ("common", "unique1", "unique2")
                                 for shape in SHAPES))


def draw_shape(shape, u, v):
    """Returns which points are inside a shape of area 4, as booleans.  u, v: arrays of equal size,
    the coordinates of the points on the shape's own axes."""
    r, a, b = np.hypot(u, v), np.abs(u), np.abs(v)
    return {"disk": r < 1.128, "ring": (r < 1.38) & (r > 0.795),
            "cross": (np.minimum(a, b) < 0.36) & (np.maximum(a, b) < 1.57),
            "triangle": (v < 0.877) & (3 ** 0.5 * a - v < 2 * 0.877)}[shape]  # equilateral


def draw_object(rng, H, W, y_range, x_range, shape=None, radii=(0.15, 0.19)):
    """Draws an object.  Returns the index of its shape and its mask, HxW in [0, 1].

    y_range, x_range    two limits each for the centre, as shares of H and of W
    shape               an index of SHAPES; default: random
    radii               two limits for the scale: the pixels per unit of draw_shape, divided by H"""
    shape = int(rng.integers(len(SHAPES))) if shape is None else shape
    y, x = rng.uniform(*y_range) * H, rng.uniform(*x_range) * W
    r, turn = rng.uniform(*radii) * H, rng.uniform(0, 2 * np.pi)
    fine = (np.mgrid[0:2 * H, 0:2 * W] + 0.5) / 2  # 2x2 samples per pixel make smooth edges
    dy, dx = (fine[0] - y) / r, (fine[1] - x) / r
    u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    mask = draw_shape(SHAPES[shape], u, v)
    return shape, mask.reshape(H, 2, W, 2).mean((1, 3))


def place_three(rng, H, W):
    """Draws the three objects of a room: common, unique1 and unique2.  Returns what make_label
    returns."""
    # With radii of 0.13 to 0.17 and the clutter doubled, one of five toy runs learned neither
    # sensor's own object.
    common = draw_object(rng, H, W, (0.62, 0.76), (0.25, 0.75))
    unique = [draw_object(rng, H, W, (0.24, 0.38), (0.25, 0.75)) for _ in range(2)]
    return make_label(*zip(common, *unique))


def scatter_three(rng, S):
    """Draws the three kinds of objects of a scene from above.  Returns what make_label returns.

    Each object occurs three times, because two random crops seldom share an object that occurs only
    once.  The objects are in the cells of a 3x3 grid, which is shifted at random."""
    masks = np.zeros((3, S, S))
    classes = [int(shape) for shape in rng.integers(len(SHAPES), size=3)]
    square = np.add.outer(rng.permutation(3), rng.permutation(3)) % 3   # 3x3, a Latin square
    for which, cells in enumerate((0, *rng.integers(1, 3, size=2))):
        for cell in np.argwhere(square == cells):
            ranges = [(i / 3 + 0.147, i / 3 + 0.187) for i in cell]
            masks[which] += draw_object(rng, S, S, *ranges, classes[which], (0.095, 0.115))[1]
    return make_label(classes, np.roll(masks, rng.integers(S, size=2), (1, 2)).clip(0, 1))


def make_label(classes, masks):
    """Puts the first of three masks HxW in front of the other two.  Returns the visible parts of
    the masks, the label HxW uint8 (1 + index of SCENE_CLASSES), and the classes (indices of
    SHAPES)."""
    front, *behind = masks
    masks = [front, *(mask * (1 - front) for mask in behind)]
    label = np.ones(front.shape, np.uint8)
    for which in (2, 1, 0):
        label[masks[which] > 0.5] = 2 + which * len(SHAPES) + classes[which]
    return masks, label, tuple(classes)


def make_clutter(rng, H, W, cells):
    """Returns smooth noise HxW in about [-1, 1]: random values on a coarse grid of cells x cells,
    with bicubic interpolation between them."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.array(coarse.resize((W, H), Image.Resampling.BICUBIC))


def draw_room(rng, H=48, W=64):
    """Draws an object in front of a wall, a painting on the wall (which only RGB sees) and a
    recess in the wall (which only depth sees).  Returns rgb HxWx3 uint8, depth HxW uint16 in mm,
    label HxW uint8 and the three classes."""
    (m_common, m_paint, m_recess), label, classes = place_three(rng, H, W)
    rgb = photograph(rng, m_common, m_paint, 0.06)
    z = 3 + 0.03 * make_clutter(rng, H, W, 6) - 0.8 * m_common + 1.1 * m_recess  # in metres
    z = z + rng.normal(0, 0.03, z.shape)
    z[rng.random(z.shape) < 0.01] = 0           # a pixel without a reading
    return rgb, (z * 1000).astype(np.uint16), label, classes


def photograph(rng, m_common, m_paint, clutter):
    """Returns a photograph, HxWx3 uint8, of two objects, whose masks are HxW.  The common object is
    bright, the painted object is dark, and the ground is grey with noise of strength `clutter`."""
    rgb = 0.5 + clutter * np.stack([make_clutter(rng, *m_common.shape, 6) for _ in range(3)], -1)
    rgb = rgb + (0.9 - rgb) * m_common[..., None] + (0.1 - rgb) * m_paint[..., None]
    return ((rgb + rng.normal(0, 0.04, rgb.shape)).clip(0, 1) * 255).astype(np.uint8)


def draw_satellite_scene(rng, S=48):
    """Draws villages (bright in both modalities), oil slicks (dark, only in SAR) and algae (dark,
    only in optical bands).  Returns a list of four seasons, each {band: array} with the values of
    the files, the label SxS uint8 and the three classes."""
    (m_common, m_slick, m_bloom), label, classes = scatter_three(rng, S)
    clutter1, optical, infrared = (make_clutter(rng, S, S, 6) for _ in range(3))
    # These are the means of the bands of S2, about as in real images.
    levels = (1600, 1400, 1300, 1350, 1550, 2100, 2400, 2300, 2550, 830, 20, 2200, 1500)
    seasons = []
    for _ in range(4):
        light, bands = rng.normal(1, 0.05), {}
        for band, level in zip(S1, (-14, -21)):
            speckle = 10 * np.log10(rng.gamma(8, 1 / 8, (S, S)))  # eight looks
            bands[band] = (level + clutter1 + 6 * (m_common - m_slick) + speckle).astype(np.float32)
        for band, level in zip(S2, levels):
            r = next(r for r, group in BLOCKS.items() if band in group)
            clutter2 = optical if band in ("B1", "B2", "B3", "B4") else infrared
            x = level * light * (1 + 0.02 * clutter2) * (1 + 0.8 * m_common) * (1 - 0.9 * m_bloom)
            x = x.reshape(S // r, r, S // r, r).mean((1, 3))
            bands[band] = (x * rng.normal(1, 0.03, x.shape)).clip(0).astype(np.uint16)
        seasons.append(bands)
    return seasons, label, classes


def draw_aerial_scene(rng, S=48):
    """Draws buildings (bright and high), painted areas (dark, only in RGB) and pits (low, only in
    heights).  Returns rgb SxSx3 uint8, heights SxS float32 in m, label SxS uint8 and the three
    classes."""
    (m_common, m_paint, m_pit), label, classes = scatter_three(rng, S)
    rgb = photograph(rng, m_common, m_paint, 0.04)
    dem = rng.uniform(50, 300) + 0.8 * make_clutter(rng, S, S, 6) + rng.normal(0, 0.3, (S, S))
    dem = dem + 7 * (m_common - m_pit)
    return rgb, dem.astype(np.float32), label, classes


def write_indoor(root, rngs, scenes):
    """Writes one room per generator in rngs, into folders.  Yields (id, classes) for each scene, as
    the next two functions do."""
    for i, rng in enumerate(rngs):
        *images, classes = draw_room(rng)
        for folder, image in zip(("RGB", "Depth", "Label"), images):
            save_new(root / folder / f"{i:04d}.png", image, compress_level=1)
        yield f"{i:04d}", classes


def write_satellite(root, rngs, scenes, S=48):
    """Writes satellite scenes as SSL4EO-S12's raw tree, and their labels into Label/."""
    for i, rng in enumerate(rngs):
        seasons, label, classes = draw_satellite_scene(rng, S)
        for month, bands in zip(("03", "06", "09", "12"), seasons):
            for band, x in bands.items():
                sensor = "s1" if band in S1 else "s2c"
                folder = root / sensor / f"{i:07d}" / f"2020{month}20T101112"
                save_new(folder / f"{band}.tif", x)
        save_new(root / "Label" / f"{i:07d}.png", label)
        yield f"{i:07d}", classes


def write_aerial(root, rngs, scenes, S=48):
    """Writes aerial scenes as GeoNRW's tree, where 16 scenes make one tile.  The first `scenes`
    scenes are in a training city, the other scenes are in a test city."""
    for start in range(0, len(rngs), 16):
        *images, classes = zip(*(draw_aerial_scene(rng, S) for rng in rngs[start:start + 16]))
        rgb, dem, seg = (np.stack(patches).reshape(4, 4, S, S, -1).swapaxes(1, 2)
                         .reshape(4 * S, 4 * S, -1) for patches in images)
        stem = f"{'aachen' if start < scenes else 'herne'}/{280 + start // 16}_5600"
        save_new(root / f"{stem}_rgb.jp2", rgb)
        tifffile.imwrite(root / f"{stem}_dem.tif", dem[..., 0])
        tifffile.imwrite(root / f"{stem}_seg.tif", seg[..., 0])
        for k in range(16):
            yield f"{stem.replace('/', '_')}_{k // 4}_{k % 4}", classes[k]


def save_new(path, image, **settings):
    """Saves an image, and makes its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **settings)


# For each scenario: its writer, the number of training scenes and the number of test scenes.
TOY_WRITERS = {"sar-optical": (write_satellite, 1024, 256), "rgb-dem": (write_aerial, 2048, 512),
               "rgbd": (write_indoor, 2048, 512)}


def make_toy(scenario, root, scenes=None, held_out=None, rank=0):
    """Writes made-up scenes of a scenario under root, and prepares them.  If root exists, nothing
    is written.  An incomplete root never exists.  Of several processes, the first writes and the
    others wait.

    The lists train.txt and test.txt are written, too, and factors.csv, which holds the three
    classes of each scene as indices of SHAPES."""
    root = Path(root)
    while rank > 0 and not root.is_dir():
        time.sleep(0.5)
    if root.is_dir():
        return
    write, *default = TOY_WRITERS[scenario]
    scenes, held_out = scenes or default[0], held_out or default[1]
    rngs = [np.random.default_rng((0, i)) for i in range(scenes + held_out)]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.part-", dir=root.parent) as folder:
        part = Path(folder) / root.name
        written = list(show_progress(write(part, rngs, scenes), f"making {root}", len(rngs)))
        for split, these in (("train", written[:scenes]), ("test", written[scenes:])):
            (part / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in these))
        lines = "".join(f"{name},{a},{b},{c}\n" for name, (a, b, c) in written)
        (part / "factors.csv").write_text(f"id,common,unique1,unique2\n{lines}")
        args = argparse.Namespace(workers=1, skip_bad=False)
        with contextlib.redirect_stdout(None):  # prepare prints how much disk it needs
            if scenario == "sar-optical":
                prepare_ssl4eo(part, part / "packed", args)
            if scenario == "rgb-dem":
                prepare_geonrw(part, part / "cropped", args)
        if not root.is_dir():                   # another run may have been faster
            os.replace(part, root)


def read_factors(root):
    """Returns {scene: its three classes} of made-up scenes.  The classes are indices of SHAPES."""
    factors, path = {}, Path(root) / "factors.csv"
    with reading(path, "the classes of made-up scenes"):
        for line in read_lines(path)[1:]:
            scene, *classes = line.split(",")
            factors[scene] = [int(k) for k in classes]
    return factors


# ---- commands: check, prepare, toy ----

def in_processes(function, jobs, workers, text):
    """Yields function(job) for each job, in order, and shows a bar with this text.  A DataLoader
    does the work, because its processes never run far ahead."""
    loader = DataLoader(jobs, batch_size=None, collate_fn=function, worker_init_fn=leave_group,
                        num_workers=workers if workers > 1 else 0)
    return show_progress(loader, text)


def attempt(work, job):
    """Returns the value of work(job), and None.  If work(job) fails, returns None and the reason.
    If the disk is full, raises the error, because the reason is not in the sample."""
    try:
        return work(job), None
    except Exception as error:                  # a damaged file can raise errors of any type
        # If the disk is full, numpy raises `100 requested and 50 written`, without a number.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "requested and" in str(error):
            raise OSError(errno.ENOSPC, f"the disk is full, or a quota is used up ({error})")
        prefix = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
        return None, prefix + " ".join(str(error).split())


def report_bad(bad, file):
    """Writes {name: reason} to a file.  Prints each kind of reason once, with the number of its
    samples and an example."""
    write_text(file, "".join(f"{name}\t{reason}\n" for name, reason in bad.items()))
    similar = {}                                # reason without names and numbers -> its lines
    for name, reason in bad.items():
        pattern = re.sub(r"\S*[/\d]\S*", "", reason)
        similar.setdefault(pattern, []).append(f"{name}: {reason}")
    for lines in similar.values():
        print(f"{len(lines):6d} such as {lines[0]}")


def read_shapes(dataset, i):
    """Reads a sample, of SSL4EO-S12 all four seasons.  Returns the shapes of its tensors."""
    if isinstance(dataset, Packed) and not dataset.labels:
        for season in range(4):
            dataset.read(dataset.ids[i], season)
    return tuple(tuple(x[0].shape if isinstance(x, list) else x.shape) for x in dataset[i])


def check(args):
    """Reads every sample.  Prints a table, warnings and the kinds of bad samples, draws a contact
    sheet and writes bad-ids.txt.  Returns the number of bad samples."""
    source, root = choose_source(args)
    split, size = args.split or ("train" if args.task else "all"), args.size or 224
    dataset = open_dataset(source, root, size, split, args.depth_unit, strict=False,
                           declared=(args.as1, args.as2), reduce=True)
    need(args.depth_unit is None or "depth" in dataset.modalities,
         f"--depth-unit works only with depth, but {root} has {' and '.join(dataset.modalities)}. "
         f"Leave --depth-unit out")
    out = Path(args.out or "runs/check-" + re.sub(r"\W+", "-", str(root)).strip("-")[-100:])
    out.mkdir(parents=True, exist_ok=True)      # before hours of reading, in case it cannot be made
    for note in dataset.notes:
        print(note)
    good, bad = [], dict.fromkeys(dataset.unpaired, "has no partner")
    read = functools.partial(attempt, functools.partial(read_shapes, dataset))
    results = list(in_processes(read, range(len(dataset)), args.workers, "check"))
    usual = statistics.mode([shapes for shapes, _ in results if shapes] or [None])
    for i, (shapes, reason) in enumerate(results):
        if not reason and shapes != usual:
            reason = (f"has the shapes {shapes}, but the most frequent shapes are {usual}. Cut all "
                      f"images into tiles of one size with `data.py prepare --scenario custom`")
        if reason:
            bad[dataset.ids[i]] = reason
        else:
            good.append(i)
    if good:
        few = spread_evenly(good, 200)
        table, warnings = describe_inputs(dataset, few, args.workers)
        print(*table, f"samples in this table: {len(few)} of {len(dataset)}", sep="\n")
        for line in warnings:
            print(f"warning: {line}")
        drawn = spread_evenly(good, 8)
        draw_contact_sheet(dataset, drawn, out / "contact-sheet.png", size)
        shown = [row["name"] + name_composite(row) for row in dataset.inputs]
        print(f"{out / 'contact-sheet.png'} shows what the network will see, in crops of {size} "
              f"pixels (--size). Each row is a pair: two augmented views of "
              f"{' and two of '.join(shown)}. The contrast of images without three colours is "
              f"stretched. The rows are {join_names([dataset.ids[i] for i in drawn], 8)}")
    print(f"samples that were read: {len(dataset)}; bad samples: {len(bad)}, of which "
          f"{len(dataset.unpaired)} have no partner. {out / 'bad-ids.txt'} lists the bad samples")
    report_bad(bad, out / "bad-ids.txt")
    if good and getattr(dataset, "classes", None):
        masks = {dataset.ids[i]: dataset.files[2][dataset.ids[i]] for i in good}
        report_masks(count_mask_values(masks), dataset.classes)
    return len(bad)


def report_masks(counts, num_classes):
    """Prints the share of pixels without a label, the classes that never occur, and what looks
    wrong.  counts: from `count_mask_values`."""
    pixels = sum(n for n, _ in counts.values())
    unlabelled = counts.get(-1, (0, 0))[0] + counts.get(0, (0, 0))[0]
    never = [str(value) for value in range(1, num_classes + 1) if value not in counts]
    print(f"masks: {unlabelled / pixels:.1%} of the pixels have no label. Classes from 1 to "
          f"{num_classes} that never occur: {join_names(never, 20) or 'none'}")
    for line in find_mask_warnings(counts):
        print(f"warning: {line}")


def draw_contact_sheet(dataset, indices, path, size):
    """Draws one row per pair: two augmented views of modality 1, then two of modality 2."""
    batches = default_collate([dataset[i][:2] for i in indices])
    draws, columns = Draws(0, len(indices), slice(None)), []
    draws.restart(0)
    for row, batch in zip(dataset.inputs, batches):
        for x in move_views(batch if isinstance(batch, list) else [batch], "cpu"):
            views = augment(x, row, size, draws)
            columns.append(np.concatenate([make_visible(view, row) for view in views], 0))
    sheet = (255 * np.concatenate(columns, 1)).astype(np.uint8)         # BSx4Sx3
    write_atomically(path, lambda file: Image.fromarray(sheet).save(file, "png"))


# ---- prepare: turns what was downloaded into the one form that the other scripts read ----

@contextlib.contextmanager
def fill_folder(out, settings, n_bytes):
    """Yields the folder OUT.part for the caller to fill.  When the caller is done, the folder is
    renamed to `out`.  If a run was stopped, a later run with the same settings goes on with the
    same folder.

    settings   a text that holds every setting on which the content of the files depends
    n_bytes    about how many bytes will be written"""
    out = Path(out)                             # without a slash at the end
    part, settings_file = Path(f"{out}.part"), Path(f"{out}.part/settings.txt")
    need(not out.exists(), f"{out} exists, so it is prepared already. Delete it to prepare "
         f"it again, or give another --out")
    part.mkdir(parents=True, exist_ok=True)
    with open(part / "lock", "w") as lock:
        if fcntl:                               # the lock ends with this process in any case
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:            # some file systems have no locks: then go on
                need(error.errno not in (errno.EACCES, errno.EAGAIN), f"another `data.py prepare` "
                     f"is writing {part}. Wait until it ends")
        need(not settings_file.is_file() or settings_file.read_text("utf-8") == settings, f"{part} "
             f"was begun with other samples or settings. Give the settings of that run, or delete "
             f"{part}")
        write_text(settings_file, settings)
        free = shutil.disk_usage(part).free
        print(f"{out} needs about {n_bytes / 1e9:.3f} GB of disk; {free / 1e9:.1f} GB are free")
        yield part
    os.replace(part, out)
    for name in ("lock", "settings.txt", "done.jsonl"):
        (out / name).unlink(missing_ok=True)


def work_through(part, jobs, work, args):
    """Calls work(job) for each job in {name: job} that no earlier run has done.  If a job fails,
    the other jobs are done nevertheless.  work writes files, and may return numbers.

    Returns {name: result} of all jobs that are done.  Raises BadInput if a job fails, unless
    --skip-bad is given."""
    log, bad_file, bad = part / "done.jsonl", part / "bad-ids.txt", {}
    log.touch()
    text = log.read_text("utf-8")
    text = text[:text.rfind("\n") + 1]          # a killed run may leave half a line at the end
    write_text(log, text)
    done = dict(map(json.loads, text.splitlines()))
    left = [name for name in jobs if name not in done]
    results = in_processes(functools.partial(attempt, work), [jobs[name] for name in left],
                           args.workers, "prepare")
    with open(log, "a", 1, "utf-8") as file:    # 1: each line is written at once
        for name, (result, reason) in zip(left, results):
            if reason:
                bad[name] = reason
            else:
                done[name] = result
                file.write(f"{json.dumps((name, result))}\n")
    bad_file.unlink(missing_ok=True)
    if bad:
        report_bad(bad, bad_file)
        need(args.skip_bad and done, f"samples that cannot be prepared: {len(bad)}. {bad_file} "
             f"lists these samples with the reasons. Repair the files and give the same command "
             f"again, or leave these samples out with --skip-bad")
    return done


def pack(out, jobs, read, files, args):
    """Packs samples into `files`, arrays of bytes with one record per sample, and writes ids.txt.
    read(job) returns one record for each file.  If a sample is damaged, its record is 0, and its
    line in ids.txt begins with `# `."""
    records, reason = None, f"nothing to prepare; {TREE}"
    for job in jobs.values():
        records, reason = attempt(read, job)
        if records:                             # they show the size of all records
            break
    need(records, f"none of {len(jobs)} samples for {out} can be read. The last reason: "
         f"{reason}")
    with fill_folder(out, "\n".join(jobs) + "\n", len(jobs) * sum(map(len, records))) as part:
        for file, record in zip(files, records):
            if not (part / file).is_file():
                np.lib.format.open_memmap(part / file, "w+", np.uint8, (len(jobs), len(record)))
        numbered = {name: (k, job) for k, (name, job) in enumerate(jobs.items())}
        write = functools.partial(write_records, part, files, read)
        done = work_through(part, numbered, write, args)
        write_text(part / "ids.txt", "".join(f"{name}\n" if name in done else f"# {name}\n"
                                             for name in jobs))


def write_records(part, files, read, job):
    """Reads a sample and writes its records.  job: the number of the records, and the job for
    read."""
    k, sample = job
    for name, record in zip(files, read(sample)):
        array = np.load(part / name, mmap_mode="r")
        need(len(record) == array.shape[1], f"its images have another size than those of the first "
             f"sample: {len(record)} bytes in {name} instead of {array.shape[1]}")
        # A write to a memory map would be a bus error if the disk is full.
        with open(part / name, "rb+") as file:
            file.seek(array.offset + k * len(record))
            file.write(record)


def prepare_ssl4eo(root, out, args):
    """Packs SSL4EO-S12 into season0.npy to season3.npy.  A location has 60 files; its four
    records have 0.5 MB each."""
    paired, unpaired = find_locations(root)
    jobs = {name: name for name in sorted([*paired, *unpaired])}    # unpaired names fail in `read`
    files = [f"season{k}.npy" for k in range(4)]
    pack(out, jobs, functools.partial(read_seasons, root), files, args)


def prepare_bigearthnet(root, out, args):
    """Packs each split of BigEarthNet-MM that has a list into season0.npy and labels.npy.  The
    official lists have no patches with snow or clouds."""
    folders = root / "BigEarthNet-S1-v1.0", root / "BigEarthNet-v1.0"
    for folder in folders:
        need(folder.is_dir(), f"no folder {folder}. {list_contents(folder)}; {TREE}")
    splits = [name for name in ("train", "val", "test") if (root / f"{name}.csv").is_file()]
    need(splits, f"no train.csv, val.csv or test.csv under {root}. Download these lists; {TREE}")
    partners, problems = {}, []
    for split in splits:
        if (out / split).exists():
            print(f"{out / split} exists, so it is prepared already")
            continue
        jobs = {}
        for line in read_lines(root / f"{split}.csv"):  # `S2 name,S1 name`, or only the S2 name
            s2, s1 = [cell.strip() for cell in f"{line},".split(",")][:2]
            if not s1:
                partners = partners or find_partners(folders[0])
            jobs[s2] = s2, s1 or partners.get(s2)
        read = functools.partial(read_patch, folders)
        try:
            pack(out / split, jobs, read, ["season0.npy", "labels.npy"], args)
        except BadInput as problem:             # reported after the other splits are packed
            problems.append(str(problem))
    need(not problems, "  ".join(problems))


TEST_CITIES = ("duesseldorf", "herne", "neuss")


def prepare_geonrw(root, out, args):
    """Cuts each tile of GeoNRW into 4x4 patches, whose names are equal in rgb/, dem/ and seg/.
    test.txt lists the patches of the three test cities of the data set's makers.  train.txt lists
    the patches of the other cities."""
    jobs = {}
    for path in sorted(root.glob("*/*")):
        match = re.fullmatch(r"(\d+_\d+)_(rgb\.jp2|dem\.tif)", path.name)
        if match:
            jobs[f"{path.parent.name}_{match[1]}"] = path.with_name(match[1])
    need(jobs, f"no tile (<city>/<x>_<y>_rgb.jp2 and _dem.tif) under {root}. Give the folder of "
         f"GeoNRW with --data; {TREE}")
    # A tile has 1000 x 1000 pixels, each of 8 bytes: 3 of rgb, 4 of dem and 1 of seg.
    with fill_folder(out, json.dumps(list(jobs)), len(jobs) * 8e6) as part:
        work_through(part, jobs, functools.partial(cut_geonrw, part), args)
        tiles = sorted(path.stem for path in (part / "rgb").iterdir())
        tested = {name for name in jobs if name.split("_")[0] in TEST_CITIES}
        write_lists(part, tiles, tested)


def cut_geonrw(part, stem):
    """Cuts one tile of GeoNRW into its 16 patches."""
    images = {"rgb": read_image(f"{stem}_rgb.jp2"), "dem": read_band(f"{stem}_dem.tif")}
    if os.path.isfile(f"{stem}_seg.tif"):
        images["seg"] = read_small_mask(f"{stem}_seg.tif")
    name = f"{stem.parent.name}_{stem.name}"
    return write_tiles(part, name, images, {}, images["rgb"].shape[1] // 4)


def write_lists(part, tiles, test_scenes):
    """Writes test.txt with the tiles of test_scenes, and train.txt with the other tiles."""
    for split, wanted in (("train", False), ("test", True)):
        these = [name for name in tiles if (name.rsplit("_", 2)[0] in test_scenes) == wanted]
        write_text(part / f"{split}.txt", "".join(f"{name}\n" for name in these))


def read_small_mask(path):
    """Reads a mask as 1xHxW, in 8 bits if its values fit, otherwise in 32 bits."""
    mask = read_mask(path)[None]
    return mask.astype(np.uint8 if 0 <= mask.min() and mask.max() < 256 else np.int32)


def write_tiles(part, scene, images, types, size):
    """Cuts a scene into tiles of size x size pixels with the names <scene>_<row>_<column>.

    The remaining pixels at the right and the lower border are left out.  A tile is left out if more
    than half of the values of one of its images are missing.  Returns how many tiles are left out.

    images     {folder: CxHxW, with NaN where values are missing}
    types      {folder: the type in which its images are written}; default: the type of the array"""
    sizes = {a.shape[1:] for a in images.values()}
    need(len(sizes) == 1, f"{scene}: the images and the mask have different sizes: {sizes}. Give "
         f"a mask of the size of the first image")
    H, W = sizes.pop()
    need(min(H, W) >= size, f"{scene} has only {H}x{W} pixels. Give a smaller --size than {size}, "
         f"or remove this scene")
    digits, left_out = len(str(max(H, W) // size - 1)), 0
    for folder in images:
        (part / folder).mkdir(exist_ok=True)
    for i in range(H // size):
        for j in range(W // size):
            box = np.s_[:, i * size:(i + 1) * size, j * size:(j + 1) * size]
            if any(np.isnan(a[box]).mean() > 0.5 for a in images.values()):
                left_out += 1
                continue
            name = f"{scene}_{i:0{digits}d}_{j:0{digits}d}"
            for folder, a in images.items():
                write_tile(part / folder / name, a[box], types.get(folder, a.dtype))
    return left_out


def write_tile(path, a, dtype):
    """Writes CxHxW in the type `dtype`: 8 bits as png, other types as tif.

    Missing values stay missing, and the file is then always a tif.  Floats keep NaN.  Integers get
    a value that no valid pixel has (0 if there is no such value), and GDAL's tag names this value.
    """
    settings, missing = {}, np.isnan(a)
    if dtype.kind != "f" and missing.any():
        values = range(min(np.iinfo(dtype).max, 2 ** 53), np.iinfo(dtype).min - 1, -1)
        nodata = next((value for value in values if not (a == value).any()), None)
        if nodata is None:                      # all 256 values occur: 0 becomes 1, not a hole
            a, nodata = np.where(a == 0, 1, a), 0
        a = np.where(missing, nodata, a)
        settings["extratags"] = [(42113, "s", 0, str(nodata), True)]
    a = a.astype(dtype)
    if dtype == np.uint8 and len(a) in (1, 3) and not settings:
        image = np.moveaxis(a, 0, -1) if len(a) == 3 else a[0]
        Image.fromarray(np.ascontiguousarray(image)).save(f"{path}.png", compress_level=1)
        return
    if len(a) > 1:
        settings |= dict(photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(f"{path}.tif", a if len(a) > 1 else a[0], **settings)


def prepare_tiles(where, args):
    """Cuts your own scenes into tiles: <out>/1/, 2/ and label/.  train.txt and test.txt never share
    a scene, because tiles of one scene are similar, so a test on them would be too easy."""
    need(args.out and args.size, "prepare --scenario custom needs --size and --out")
    declared, nodata = (args.as1, args.as2), (args.nodata1, args.nodata2)
    for flag, kind in zip(("--as1", "--as2"), declared):
        need(kind in (None, "depth", "dem"), f"prepare: {flag} {kind} has no effect, because only "
             f"depth and dem have values that mean no reading. Leave {flag} out")
    seed, share = args.seed or 0, args.test_share or 0.2
    patterns = [*where, args.target] if args.target else where
    files, ids, unpaired = find_samples(patterns, strict=False)
    if args.target:                             # masks whose palettes are not equal end the run
        readable = {}                           # damaged masks are listed later
        for name, path in show_progress(files[2].items(), "masks"):
            if attempt(read_mask, path)[1] is None:
                readable[name] = path
        count_mask_values(readable)
    jobs = {name: (name, [side.get(name) for side in files]) for name in sorted(ids + unpaired)}
    masks = sorted(files[2]) if args.target else []
    settings = json.dumps([*patterns, args.size, nodata, declared, seed, share, masks, *jobs])
    scene_bytes = sum(read_first([side[name] for name in ids])[1].nbytes for side in files)
    with fill_folder(args.out, settings, len(jobs) * scene_bytes) as part:
        cut = functools.partial(cut_own, part, args.size, nodata, declared)
        counts = list(work_through(part, jobs, cut, args).values())
        tiles = sorted(path.stem for path in (part / "1").iterdir())
        need(tiles, f"every tile for {args.out} is left out, because more than half of its values "
             f"are missing. Check --nodata1 and --nodata2")
        scenes = sorted({name.rsplit("_", 2)[0] for name in tiles})
        tested = [name for name in scenes if not args.target or name in files[2]]  # with labels
        n = min(max(1, round(share * len(tested))), len(tested) - 1)
        order = np.random.default_rng((seed, len(tested))).permutation(len(tested))
        write_lists(part, tiles, {tested[k] for k in order[:n]})
    left_out, resized, unmasked, uncovered, area = np.sum(counts, 0)
    print(f"tiles: {len(tiles)}, of {len(scenes)} scenes; scenes in test.txt: {n}",
          f"tiles that are left out, because more than half of their values are missing: "
          f"{left_out:.0f}",
          f"area at the right and lower borders that no tile covers: {uncovered / area:.0%}",
          f"scenes whose second image was resized to the size of the first: {resized:.0f}",
          sep="\n")
    if unmasked:
        print(f"scenes without a mask: {unmasked:.0f}. Their tiles have no label, so only "
              f"pretraining uses them")
    if n == 0:
        print("warning: there is only one scene (with a mask), so test.txt is empty. Cut the scene "
              "into two images to test on one of them")


def cut_own(part, size, nodata, declared, job):
    """Reads the images and the mask of a scene, resizes the second image to the size of the first,
    and cuts all of them into tiles.  A scene may lack a mask.  job: the name of the scene, and its
    files.

    Returns five numbers: how many tiles are left out; 1 if the second image was resized; 1 if there
    is no mask; how many pixels no tile covers; how many pixels the scene has."""
    name, paths = job
    need(paths[0] and paths[1], f"{name} has no partner. Add the file, or remove the others")
    images, types = {}, {}
    for folder, path, value, kind in zip("12", paths, nodata, declared):
        a = read_image(path)
        types[folder] = stored_type(path, a)
        missing = ~np.isfinite(a)
        if value is not None:                   # in all channels, because black can be a colour
            missing = missing | is_nodata(a, value).all(0)
        if kind:                                # values of depth or dem can mean no reading
            missing = missing | ~np.isfinite(read_input(path, MODALITIES[kind]))
        if missing.any():
            a = np.where(missing, np.nan, a.astype(np.result_type(a, np.float32)))
        images[folder] = a
    (H, W), (H2, W2) = (a.shape[1:] for a in images.values())
    # The two images have one aspect ratio, except for one pixel of the coarser image.
    need(abs(H * W2 - W * H2) <= max(H, W, H2, W2), f"{name}: the images have {H}x{W} and "
         f"{H2}x{W2} pixels. Images of different shapes cannot show the same area. Crop both "
         f"images to the same area")
    if (H, W) != (H2, W2):
        images["2"] = resize_array(images["2"], (H, W), types["2"])
    if paths[2:] and paths[2]:
        images["label"] = read_small_mask(paths[2])
    left_out = write_tiles(part, name, images, types, size)
    covered = (H // size * size) * (W // size * size)
    return left_out, (H, W) != (H2, W2), None in paths, H * W - covered, H * W


def prepare_rgbd(root, out, args):
    """Makes HHA/ from Depth/, RawDepth/ (if it exists) and intrinsics.txt or, from SUN RGB-D's raw
    tree, makes RGB/, HHA/ and Label/."""
    frames, masks = {}, {}
    if (root / "Depth").is_dir():
        unit, camera = args.depth_unit or 1000.0, read_intrinsics(root / "intrinsics.txt")
        depth = find_images(root / "Depth")
        raw = find_images(root / "RawDepth") if (root / "RawDepth").is_dir() else depth
        jobs = {name: (name, path, raw.get(name), unit, camera) for name, path in depth.items()}
        settings, work = f"{unit} {camera.tolist()}", write_hha
    else:
        frames = find_frames(root)
        need(frames, f"{root} has no Depth/ and no frame of SUN RGB-D in SUNRGBD/. "
             f"{list_contents(root)}; {TREE}")
        masks = find_sunrgbd_masks(root, frames)
        jobs = {name: (name, folder) for name, folder in frames.items()}
        settings, work = "SUN RGB-D", write_sunrgbd_hha
    with fill_folder(out, settings, 3 * 640 * 480 * len(jobs)) as part:
        done = work_through(part, jobs, functools.partial(work, part), args)
        # The links come before HHA/ has its name, because HHA/ means that all is done.
        for name in done.keys() & frames.keys():
            link(find_only_file(f"{frames[name]}/image"), root / "RGB", name)
            if name in masks:
                link(masks[name], root / "Label", name)


def write_hha(part, job):
    """Writes the HHA image of one frame."""
    name, depth, raw, unit, camera = job
    need(raw, f"{name} has no file in RawDepth/. Add it, or remove RawDepth/")
    filled, raw_m = fill_holes(read_metres(depth, unit)), read_metres(raw, unit)
    need(filled.shape == raw_m.shape, f"{name}: Depth/ has {filled.shape} pixels, but RawDepth/ "
         f"has {raw_m.shape}. Give images of one size, or remove RawDepth/")
    image = Image.fromarray(hha(filled, raw_m, camera))
    write_atomically(part / f"{name}.png", lambda file: image.save(file, "png"))


def write_sunrgbd_hha(part, job):
    """Writes the HHA image of one frame of SUN RGB-D's raw tree.  Raises BadInput if the image or
    another file of the frame is damaged."""
    name, folder = job
    image, depth, raw = (find_only_file(f"{folder}/{subfolder}")
                         for subfolder in ("image", "depth_bfx", "depth"))
    open_image(image)                           # raises BadInput if the image is damaged
    write_hha(part, (name, depth, raw, None, read_intrinsics(f"{folder}/intrinsics.txt")))


def link(source, folder, name):
    """Makes a hard link, which needs no disk space, or a copy if the file system has no links."""
    folder.mkdir(exist_ok=True)
    target = folder / (name + os.path.splitext(source)[1])
    target.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def find_frames(root):
    """Finds the frames of SUN RGB-D's raw tree.  Returns {name: folder}, with names such as
    kv1-b3dodata-img_0063."""
    tree, frames = root / "SUNRGBD", {}
    for folder, subfolders, _ in os.walk(tree, followlinks=True):
        if "image" in subfolders:
            subfolders.clear()
            frames["-".join(Path(folder).relative_to(tree).parts)] = folder
    return dict(sorted(frames.items()))


def find_sunrgbd_masks(root, frames):
    """Returns {frame: path of its mask}.  The file img-000001.png in labels/ is the mask of the
    first frame of test.txt.  The frames of train.txt follow those of test.txt."""
    if not (root / "labels").is_dir():
        return {}
    order = read_list(root / "test.txt", frames) + read_list(root / "train.txt", frames)
    n = len(list((root / "labels").glob("img-*.png")))
    need(n <= len(order), f"{root}/labels has {n} masks, but test.txt and train.txt have "
         f"{len(order)} frames, so the numbers of the masks belong to other lists. Give the whole "
         f"lists")
    files = {frame: root / f"labels/img-{k:06d}.png" for k, frame in enumerate(order, 1)}
    return {frame: path for frame, path in files.items() if path.is_file()}


def fill_holes(z):
    """Fills the holes (0) of a depth image HxW.

    A hole gets the nearest reading to its left or to its right, whichever is farther away from the
    camera, because holes are mostly behind objects.  A row without a reading gets the median of the
    image."""
    valid, column = z > 0, np.arange(z.shape[1])
    left = np.maximum.accumulate(np.where(valid, column, 0), 1)
    right = np.minimum.accumulate(np.where(valid, column, z.shape[1] - 1)[:, ::-1], 1)[:, ::-1]
    z = np.maximum(np.take_along_axis(z, left, 1), np.take_along_axis(z, right, 1))
    return np.where(z > 0, z, np.median(z[z > 0]) if (z > 0).any() else 0)


def choose_source(args):
    """Returns the scenario or the task of `check` and `prepare`, and its folder or two folders.
    Raises BadInput if flags contradict each other, or if a flag would have no effect."""
    name, own = args.task or args.scenario, [args.data1, args.data2]
    need(bool(args.task) != bool(args.scenario), f"{args.command} needs --scenario or --task. Give "
         f"one of the two")
    if name == "custom":
        need(all(own), "--scenario custom needs --data1 and --data2. Give both")
        need(not args.data, "--data does not work with --scenario custom. Leave --data out")
        return name, own
    for flag in COMMANDS[args.command][1].split():
        need(getattr(args, flag.replace("-", "_")) is None,
             f"--{flag} works only with --scenario custom. Leave --{flag} out")
    return name, Path(args.data or SHARED_ROOTS.get(name, f"data/{name}"))


# For each scenario or task: the function that prepares it, and the folder for the result.
PREPARERS = {
    "sar-optical": (prepare_ssl4eo, "packed"), "bigearthnet": (prepare_bigearthnet, "packed"),
    "rgb-dem": (prepare_geonrw, "cropped"), "geonrw": (prepare_geonrw, "cropped"),
    **dict.fromkeys(("rgbd", "sunrgbd", "nyuv2"), (prepare_rgbd, "HHA"))}


def prepare(args):
    """Turns what was downloaded into the one form that the other scripts read."""
    name, root = choose_source(args)
    has_depth = name != "custom" and (root / "Depth").is_dir()
    need(has_depth or args.depth_unit is None, "prepare: --depth-unit works only with a folder "
         "Depth/, because SUN RGB-D has its own unit. Leave --depth-unit out")
    if name == "custom":
        return prepare_tiles(root, args)
    function, folder = PREPARERS[name]
    need(folder != "HHA" or not args.out, f"--out does not work with {name}, because HHA/ must be "
         f"beside RGB/. Do not give --out")
    function(root, Path(args.out or root / folder), args)


OWN_IMAGES = dict(type=expand_path, metavar="FILES", nargs="+", action=OnePattern)
DECLARED = dict(choices=AS, metavar="KIND")
KINDS = f"one of {', '.join(AS)}; default: aerial for 3 channels of 8 bits, otherwise overhead"
# These are the settings of argparse for the flags that scripts share.  If a flag is not given, its
# value is None.
DATA_FLAGS = {
    "data": dict(type=expand_path, metavar="DIR", help="the folder of the data; default: "
                 "data/NAME, where NAME is the scenario or task; data/rgb-dem for geonrw, "
                 "data/rgbd for sunrgbd"),
    "data1": OWN_IMAGES | dict(help="with custom: the images of modality 1, a folder or a pattern "
                               "in quotes such as 'chips/*_S1Hand.tif'; no default"),
    "data2": OWN_IMAGES | dict(help="with custom: the images of modality 2, a folder or a pattern "
                               "in quotes such as 'chips/*_S2Hand.tif'; no default"),
    "as1": DECLARED | dict(help=f"with custom: the kind of the images of --data1, {KINDS}"),
    "as2": DECLARED | dict(help=f"with custom: the kind of the images of --data2, {KINDS}"),
    "depth-unit": dict(type=number(float, 1e-3, 1e9), metavar="STEPS",
                       help="the number of steps per metre in depth files; default: 1000"),
    "split": dict(type=expand_path, help="the samples to use: all, or the name of a list such as "
                  "train or test; with custom, the file of a list; default: train for rgb-dem, "
                  "--toy and tasks, otherwise all"),
    "size": dict(type=number(int, 16, 4096), help="the width of the crops in pixels; default: 224"),
    "workers": dict(type=number(int, 0), help="the number of processes that read files; default: "
                    "up to 8 per GPU with CUDA, otherwise 0"),
}


def add_flags(group, flags, chosen):
    """Adds flags to a parser or to a group of it.  chosen: the names of the flags, with spaces
    between them."""
    for name in chosen.split():
        group.add_argument(f"--{name}", **flags[name])


COMMAND_FLAGS = DATA_FLAGS | {
    "size": dict(type=number(int, 8, 4096), help="with check: the width in pixels of the crops in "
                 "the contact sheet; default: 224. With prepare and custom: the width in pixels "
                 "of the tiles; no default"),
    "scenario": dict(choices=[*TOY_WRITERS, "custom"], help="the scenario of the data; custom: "
                     "your own images; no default"),
    "task": dict(choices=NUM_CLASSES, help="a transfer task, to be given instead of --scenario; no "
                 "default"),
    "out": dict(type=expand_path, metavar="DIR", help="the folder to write; default: "
                "with check runs/check-..., with toy data/toy-SCENARIO, with prepare the folder "
                "that the other scripts read (with custom: no default)"),
    "split": DATA_FLAGS["split"] | dict(help="the samples to read: all, or the name of a list such "
                                        "as train or test; with custom, the file of a list; "
                                        "default: train with --task, otherwise all"),
    "workers": dict(type=number(int, 0), default=count_cores(),
                    help="the number of processes that read files; default: one per core"),
    "target": OWN_IMAGES | dict(help="with custom: masks to cut as well, a folder or a pattern in "
                                "quotes; some scenes may lack a mask; default: none"),
    "nodata1": dict(type=float, metavar="VALUE", help="with custom: a pixel of --data1 has no data "
                    "if all its channels have this value; default: none. Write a negative "
                    "value with =, such as --nodata1=-9999. NaN and the no-data value of a TIFF "
                    "always mean no data"),
    "nodata2": dict(type=float, metavar="VALUE", help="with custom: a pixel of --data2 has no data "
                    "if all its channels have this value; default: none"),
    "test-share": dict(type=number(float, 0.01, 0.99), metavar="SHARE", help="with custom: the "
                       "share of the scenes that test.txt gets; default: 0.2"),
    "seed": dict(type=number(int, 0), help="with custom: the seed that decides which scenes "
                 "test.txt gets; default: 0"),
    "skip-bad": dict(action="store_true", help="leave damaged samples out; default: stop at the "
                     "end with a list of the damaged samples"),
}
# For each command: its flags, the flags that work only with --scenario custom, and what it does.
COMMANDS = {
    "prepare": ("scenario task data depth-unit out skip-bad workers",
                "data1 data2 as1 as2 target size nodata1 nodata2 test-share seed",
                "turn what was downloaded into the form that the other scripts read; if a run was "
                "stopped, the same command goes on with it"),
    "check": ("scenario task data split size depth-unit out workers", "data1 data2 as1 as2",
              "read all samples and say what the network will see; the exit code is 1 if a sample "
              "is bad"),
    "toy": ("scenario out", "", "write the made-up scenes of a scenario")}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepares, checks and makes data sets.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (usual, custom, text) in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        add_flags(sub, COMMAND_FLAGS, f"{usual} {custom}")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    if args.command == "check":
        sys.exit(1 if check(args) else 0)
    if args.command == "prepare":
        prepare(args)
    if args.command == "toy":
        need(args.scenario in TOY_WRITERS, f"toy needs a scenario with made-up scenes. Give "
             f"--scenario {' or '.join(TOY_WRITERS)}")
        out = Path(args.out or f"data/toy-{args.scenario}")
        need(not out.exists(), f"{out} exists. Give another --out, or delete {out}")
        make_toy(args.scenario, out)


if __name__ == "__main__":
    run_main(main)
