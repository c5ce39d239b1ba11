"""
What the training recipes of AutoFormer (DeiT's) and once-for-all do to a batch of images, on the device, each by a key of train.py.

change_pixels() comes before the images are normalised, change_batch() after; both draw everything from the generator that they are
given. Every image draws for itself, but for mixup and cutmix, which mix a whole batch with itself, the order of color_jitter, and
the resolution. The colour operations are those of kornia.enhance, which are Pillow's to a grey level; only rand_augment and
color_jitter import it.
"""
import math

import numpy as np
import torch
from torch.nn import functional as F

from configurator import as_list

RANGES = {"label_smoothing": (0, 1), "mixup": (0, math.inf), "cutmix": (0, math.inf), "mix_prob": (0, 1), "mix_switch": (0, 1),
          "rand_augment": (0, 10), "random_erasing": (0, 1), "color_jitter": (0, 1), "resized_crop": (0, 1)}


def check_recipe(config):
    """SystemExit unless the keys can be, and what they need is installed."""
    for key, (low, high) in RANGES.items():
        if not low <= getattr(config, key) <= high:
            raise SystemExit(f"{key}={getattr(config, key)} must be {low} to {high}, 0 for off." if high < math.inf else
                             f"{key}={getattr(config, key)} must be above 0, or 0 for off.")
    copies = config.repeated_augmentation
    if copies < 1 or config.batch_size % copies:
        raise SystemExit(f"repeated_augmentation={copies} must be 1 or more and divide batch_size={config.batch_size}.")
    if not all(type(side) is int and side >= 0 for side in sides(config)):
        raise SystemExit(f"resolutions={config.resolutions} must be whole numbers of pixels, 0 for the data's own.")
    if config.rand_augment or config.color_jitter:
        try:
            import kornia.enhance  # noqa: F401 (fails now and not in the first step)
        except ImportError:
            raise SystemExit("rand_augment and color_jitter need kornia: pip install kornia, or leave both 0.") from None


def sides(config):
    return as_list(config.resolutions)


def change_pixels(x, mean, config, generator):
    """x: (B, C, H, W) of 0 to 1 -> the same, cropped and in other colours. mean: (C, 1, 1), what comes in at the borders."""
    if config.resized_crop:
        x = resized_crop(x, config.resized_crop, generator)
    if config.rand_augment:
        x = rand_augment(x, mean, config.rand_augment, generator)
    if config.color_jitter:
        x = color_jitter(x, config.color_jitter, generator)
    return x


def change_batch(x, y, num_classes, config, generator):
    """x: (B, C, H, W), normalised, y: (B,) classes -> x, erased, mixed and resized; y as it is, or (B, num_classes), probabilities."""
    if config.random_erasing:
        x = erase(x, config.random_erasing, generator)
    if config.label_smoothing or config.mixup or config.cutmix:
        y = (1 - config.label_smoothing) * F.one_hot(y, num_classes).float() + config.label_smoothing / num_classes
    if (config.mixup or config.cutmix) and uniform(generator) < config.mix_prob:
        x, y = mix(x, y, config, generator)
    if any(sides(config)):
        side = sides(config)[torch.randint(len(sides(config)), (), generator=generator)] or x.shape[-1]
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return x, y


def uniform(generator, *shape, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(shape, generator=generator)


def boxes(B, area, ratio, generator):
    """Heights, widths, and places down and across, (B,) each: sides in shares of the image's, of the first of ten draws that fits, with
    area uniform in (low, high) and width / height log-uniform; places in shares of what the sides leave over."""
    area = uniform(generator, 10, B, low=area[0], high=area[1])
    ratio = uniform(generator, 10, B, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
    h, w = (area / ratio).sqrt(), (area * ratio).sqrt()
    fits = ((h <= 1) & (w <= 1)).int().argmax(0, keepdim=True) # (1, B)
    return *(side.gather(0, fits).squeeze(0).clamp(max=1) for side in (h, w)), *uniform(generator, 2, B)


def warp(x, matrix, padding_mode="zeros"):
    """x: (B, C, H, W), whose pixel at (column, row), from -1 to 1, comes from matrix @ (column, row, 1); matrix: two rows of three
    numbers or (B,) tensors."""
    rows = torch.stack([torch.as_tensor(v, dtype=x.dtype).expand(len(x)) for row in matrix for v in row], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(rows.to(x.device), x.shape, align_corners=False), padding_mode=padding_mode, align_corners=False)


def resized_crop(x, smallest, generator):
    """A random box of every image, of so much of its area or more and of sides 3/4 to 4/3, in the image's own size (Szegedy et al. 2015,
    Going Deeper with Convolutions)."""
    h, w, down, across = boxes(len(x), (smallest, 1), (3 / 4, 4 / 3), generator)
    return warp(x, [[w, 0, (1 - w) * (2 * across - 1)], [0, h, (1 - h) * (2 * down - 1)]], "border")


def operations(mean):
    """RandAugment's, name -> function of x: (n, C, H, W), level: (n,) of 0 to 1, and sign: (n,) of -1 and 1: timm's "increasing" ones,
    which change the more the higher the level."""
    from kornia import enhance

    def moved(matrix):
        return lambda x, *args: mean + warp(x - mean, matrix(*args))

    def enhanced(function):
        return lambda x, level, sign: function(x, (1 + 0.9 * level * sign).to(x.device))

    def rotation(level, sign):
        angle = math.radians(30) * level * sign
        return [[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]]

    def column(level, x):
        return level.to(x.device).view(-1, 1, 1, 1)

    return {"auto_contrast": lambda x, *_: enhance.normalize_min_max(x),
            "equalize": lambda x, *_: enhance.equalize(x),
            "invert": lambda x, *_: 1 - x,
            "posterize": lambda x, level, _: enhance.posterize(x, (4 - (4 * level).int()).to(x.device)), # bits that stay
            "solarize": lambda x, level, _: torch.where(x < 1 - column(level, x), x, 1 - x),
            "solarize_add": lambda x, level, _: torch.where(x < 0.5, (x + 110 / 255 * column(level, x)).clamp(max=1), x),
            "color": enhanced(enhance.adjust_saturation_with_gray_subtraction),
            "contrast": enhanced(enhance.adjust_contrast_with_mean_subtraction),
            "brightness": enhanced(enhance.adjust_brightness_accumulative),
            "sharpness": enhanced(enhance.sharpness),
            "rotate": moved(rotation),
            "shear_x": moved(lambda level, sign: [[1, 0.3 * level * sign, 0], [0, 1, 0]]),
            "shear_y": moved(lambda level, sign: [[1, 0, 0], [0.3 * level * sign, 1, 0]]),
            "translate_x": moved(lambda level, sign: [[1, 0, 0.9 * level * sign], [0, 1, 0]]), # 0.45 of the side, which is 2 long
            "translate_y": moved(lambda level, sign: [[1, 0, 0], [0, 1, 0.9 * level * sign]])}


def rand_augment(x, mean, magnitude, generator):
    """Two operations an image, each left out with probability 1/2, of magnitude N(magnitude, 0.5) within 0 to 10 (Cubuk et al. 2020,
    RandAugment, as DeiT has it)."""
    x, changes = x.clone(), list(operations(mean).values())
    for _ in range(2):
        drawn = torch.randint(2 * len(changes), (len(x),), generator=generator)
        level = (magnitude + 0.5 * torch.randn(len(x), generator=generator)).clamp(0, 10) / 10
        sign = 2 * torch.randint(2, (len(x),), generator=generator) - 1
        for i, change in enumerate(changes):
            rows = (drawn == i).nonzero().squeeze(1)
            if len(rows):
                x[rows.to(x.device)] = change(x[rows.to(x.device)], level[rows], sign[rows])
    return x


def color_jitter(x, strength, generator):
    """Brightness, contrast and saturation, in random order, each by a factor of 1 - strength to 1 + strength."""
    from kornia import enhance
    changes = (enhance.adjust_brightness_accumulative, enhance.adjust_contrast_with_mean_subtraction,
               enhance.adjust_saturation_with_gray_subtraction)
    for i in torch.randperm(3, generator=generator).tolist():
        x = changes[i](x, uniform(generator, len(x), low=1 - strength, high=1 + strength).to(x.device))
    return x


def erase(x, p, generator):
    """With probability p a box of every image becomes noise, N(0, 1) a pixel and channel, of area 0.02 to 1/3 and of sides 0.3 to 1/0.3
    (Zhong et al. 2020, Random Erasing Data Augmentation)."""
    H, W = x.shape[2:]
    h, w, down, across = boxes(len(x), (0.02, 1 / 3), (0.3, 1 / 0.3), generator)
    h, w = (h * H).round(), (w * W).round()
    h[uniform(generator, len(x)) >= p] = 0 # these have no box
    top, left = (down * (H - h + 1)).floor(), (across * (W - w + 1)).floor()
    rows, columns = inside(top, h, H).view(-1, 1, H, 1), inside(left, w, W).view(-1, 1, 1, W)
    there = torch.Generator(x.device).manual_seed(seed_of(generator)) # so much noise is drawn where x is: a GPU's differs from a CPU's
    return torch.where((rows & columns).to(x.device), torch.randn(x.shape, device=x.device, generator=there), x)


def inside(start, length, n):
    """(B, n): which of n rows or columns are the `length` ones from start: (B,) on."""
    return (torch.arange(n) >= start[:, None]) & (torch.arange(n) < (start + length)[:, None])


def seed_of(generator):
    return int(torch.randint(2**62, (), generator=generator))


def mix(x, y, config, generator):
    """The batch with itself in reverse, images and probabilities alike, as timm does: the whole image with weight lam, 1 - lam ~
    Beta(alpha, alpha) (Zhang et al. 2018, mixup), or a box of the other's pixels, of about 1 - lam of the area (Yun et al. 2019,
    CutMix). With both keys on, a batch is cut with probability mix_switch."""
    cut = config.cutmix and (not config.mixup or uniform(generator) < config.mix_switch)
    alpha, (H, W) = config.cutmix if cut else config.mixup, x.shape[2:]
    lam = np.random.default_rng(seed_of(generator)).beta(alpha, alpha) # PyTorch's Beta takes no generator
    if not cut:
        return lam * x + (1 - lam) * x.flip(0), lam * y + (1 - lam) * y.flip(0)
    h, w = (int(side * math.sqrt(1 - lam)) for side in (H, W))
    row, column = (int(torch.randint(side, (), generator=generator)) for side in (H, W)) # the centre
    rows, columns = slice(max(0, row - h // 2), row - h // 2 + h), slice(max(0, column - w // 2), column - w // 2 + w)
    out = x.clone()
    out[:, :, rows, columns] = x.flip(0)[:, :, rows, columns]
    share = out[0, 0, rows, columns].numel() / (H * W) # the box may be cut off at the border
    return out, (1 - share) * y + share * y.flip(0)
