"""Batches of tokens, images and pairs; augmentation; the metric of each kind."""
import torch
from torch.nn import functional as F
from pathlib import Path
from dataclasses import dataclass
import hashlib
from functools import lru_cache
import math
import numpy as np
import os
from functools import partial
from dataclasses import replace
from configurator import as_list
from run import pretrained, read_json, resumes, rng


def codec(tokenizer, chars, model, num_proc=1):
    """-> encode (texts -> lists of ids), decode (ids -> text), size of the vocabulary, ids that stand between two documents"""
    if tokenizer == "gpt2":
        import tiktoken
        try:
            bpe = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise SystemExit(f"tiktoken could not fetch GPT-2's vocabulary ({type(error).__name__}): connect to the network "
                             "once, or set TIKTOKEN_CACHE_DIR to a folder that holds it, or use another --tokenizer") from None
        return partial(bpe.encode_ordinary_batch, num_threads=num_proc), bpe.decode, bpe.n_vocab, [bpe.eot_token]
    if tokenizer == "sentencepiece":
        import sentencepiece
        bpe = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
        return partial(bpe.encode, num_threads=num_proc), bpe.decode, bpe.vocab_size(), [bpe.eos_id()]
    ids = {c: i for i, c in enumerate(chars)}

    def encode(texts):
        try:
            return [[ids[c] for c in text] for text in texts]
        except KeyError as error:
            raise SystemExit(f"the character {error} is not among the {len(chars)} of this data set: leave it out, "
                             "or prepare the data with --tokenizer=gpt2") from None

    return encode, lambda tokens: "".join(chars[i] for i in tokens), len(chars), [ids[c] for c in "\n\n" if c in ids]


def load_meta(data_dir, dataset, kind=""):
    """
    meta.json of the folder data_dir/dataset; its "kind" is "images" or "pairs", or missing for text. SystemExit if it is not prepared,
    or not whole, or of another kind than "text", "images" or "pairs" where one is asked for.
    """
    folder = Path(data_dir) / dataset
    known = dataset in TOKENIZER | IMAGE_SETS
    command = f"python prepare.py --dataset={dataset if known else kind or 'text'}"
    if not known or dataset in ("text", "images", "imagenet16_120"):
        command += f" --path=FILE_OR_FOLDER --name={dataset}"
    if kind == "pairs":
        name, _, scale = dataset.rpartition("_x")
        path = "" if name == "sr_samples" else f" --path=FOLDER{'' if name in PAIR_SETS else f' --name={name}'}"
        command = f"python prepare.py --dataset={name if name in PAIR_SETS else 'pairs'} --scale={scale}{path}"
    command += data_dir_option(data_dir)
    if not (folder / "meta.json").exists():
        raise SystemExit(f"{folder} is not prepared: run {command}")
    meta = read_json(folder / "meta.json")
    found = meta.get("kind", "text")
    if kind and found != kind:
        raise SystemExit(f"{folder} holds {found}, where {kind} should be: choose another --dataset")
    if found == "images":
        try:
            for split in ("train", "val"):
                shape = (meta[f"{split}_images"], meta["img_size"], meta["img_size"], meta["in_channels"])
                assert np.load(folder / f"{split}.npy", mmap_mode="r").shape == shape
                assert np.load(folder / f"{split}_labels.npy", mmap_mode="r").shape == shape[:1]
        except (AssertionError, KeyError, OSError, ValueError):
            raise SystemExit(f"{folder} is damaged, its files are not those of its meta.json: delete it and prepare it again") from None
        return meta
    if found == "pairs":
        try:
            for split in ("train", "val"):
                size = sum(3 * h * w * (1 + meta["scale"] ** 2) for h, w in meta[f"{split}_shapes"])
                assert (folder / f"{split}.bin").stat().st_size == size and len(meta[f"{split}_offsets"]) == len(meta[f"{split}_shapes"])
        except (AssertionError, KeyError, OSError, TypeError, ValueError):
            raise SystemExit(f"{folder} is damaged, its files are not those of its meta.json: delete it and prepare it again") from None
        return meta
    for split in ("train", "val"):
        try:
            size = meta[f"{split}_tokens"] * np.dtype(meta["dtype"]).itemsize
            assert meta[f"{split}_sha256"] and meta["vocab_size"] and meta["tokenizer"]
        except (AssertionError, KeyError, TypeError):
            raise SystemExit(f"{folder / 'meta.json'} is damaged: delete {folder} and run {command}") from None
        file = folder / f"{split}.bin"
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise SystemExit(f"{file} has {found:,} bytes and not the {size:,} of meta.json: delete {folder} and run {command}")
    return meta


def load_shards(data_dir, dataset, shards, mode=0):
    """[{"dataset", "entries", "mode"}] of data_dir/dataset/<shards>, in order of size; mode=0: all. SystemExit if they are not prepared."""
    file = Path(data_dir) / dataset / str(shards) / "shards.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing: run python prepare.py --dataset={dataset} --shards={shards}{data_dir_option(data_dir)}")
    if mode not in (0, 1, 2):
        raise SystemExit(f"mode={mode} is not 1 or 2, the two halves of the shards, or 0 for all.")
    return [shard for shard in read_json(file)["shards"] if mode in (0, shard["mode"])]


def bytes_hash(tokens):
    return hashlib.sha256(tokens).hexdigest()  # about a second a gigabyte


def check_hash(data, file, sha256):
    if bytes_hash(data) != sha256:
        raise SystemExit(f"{file} is damaged, its bytes are not those that were written: delete {file.parent} and prepare it again")


def load_tokens(data_dir, dataset, split):
    """Token ids of "train" or "val", read-only and left on the disk: np.memmap (tokens,) of uint16 or uint32. SystemExit if they
    are not the bytes that were written."""
    meta, file = load_meta(data_dir, dataset, "text"), Path(data_dir) / dataset / f"{split}.bin"
    tokens = np.memmap(file, dtype=meta["dtype"], mode="r")
    check_hash(tokens, file, meta[f"{split}_sha256"])
    return tokens


def load_tokenizer(data_dir, dataset):
    """-> encode (text -> list of ids), decode (list of ids -> text); decode skips ids beyond the vocabulary."""
    meta = load_meta(data_dir, dataset, "text")
    encode, decode, n, _ = codec(meta["tokenizer"], meta["chars"], Path(data_dir) / dataset / "tokenizer.model")
    return lambda text: encode([text])[0], lambda ids: decode([i for i in ids if i < n])


def check_length(tokens, block_size, what):
    """SystemExit unless tokens hold at least one block and the token after it; what names them in the message."""
    if len(tokens) < block_size + 1:
        raise SystemExit(f"{what} has {len(tokens):,} tokens, and block_size={block_size} needs {block_size + 1:,}: "
                         "give more text or a smaller block_size")


def get_batch(tokens, batch_size, block_size, generator, device="cpu"):
    """
    A random batch: x, y of int64, both (batch_size, block_size), y one token further than x.

    Every window of block_size + 1 tokens is equally likely; generator, a torch.Generator on the CPU, draws them.
    """
    offsets = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    window = tokens[offsets.numpy() + np.arange(block_size + 1)]  # (batch_size, block_size + 1)
    x, y = (torch.from_numpy(w.astype(np.int64)) for w in (window[:, :-1], window[:, 1:]))
    if "cuda" in str(device):
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def sequential_batches(tokens, batch_size, block_size, device="cpu"):
    """
    Walks all tokens once, in order: yields x, y of int64, both (up to batch_size, block_size).

    Each of the len(tokens) - 1 predictions counts once; the rest of the last block is x = 0, y = -1 (ignore_index).
    """
    step = batch_size * block_size
    for i in range(0, len(tokens) - 1, step):
        part = torch.from_numpy(tokens[i:i + step + 1].astype(np.int64))
        n = len(part) - 1
        rows = -(-n // block_size)
        x, y = torch.zeros(rows * block_size, dtype=torch.int64), torch.full((rows * block_size,), -1)
        x[:n], y[:n] = part[:-1], part[1:]
        yield x.view(rows, block_size).to(device), y.view(rows, block_size).to(device)


@dataclass(frozen=True)
class Images:
    """A split of images: pixels uint8 (N, H, W, C), labels int64 (N,), mean and std float32 (C,) of the pixels of train, 0 to 255."""
    pixels: np.ndarray
    labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    num_classes: int

    def __len__(self):
        return len(self.labels)

    def part(self, start, stop):
        """Images start to stop as a view of these."""
        return replace(self, pixels=self.pixels[start:stop], labels=self.labels[start:stop])


def load_images(data_dir, dataset, split):
    """Images of "train" or "val", their pixels read-only and left on the disk. SystemExit if they are not prepared, or not the bytes
    that were written."""
    meta, arrays = load_meta(data_dir, dataset, "images"), []
    for part in (split, f"{split}_labels"):
        file = Path(data_dir) / dataset / f"{part}.npy"
        check_hash(np.memmap(file, mode="r"), file, meta[f"{part}_sha256"])
        arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
    return Images(*arrays, np.float32(meta["mean"]), np.float32(meta["std"]), meta["num_classes"])


def get_images(images, index, device="cpu", generator=None, crop=0, flip=False, cutout=0, change_pixels=None):
    """
    The images of these numbers: x float32 (B, C, H, W), (pixel - mean) / std, and y int64 (B,). index: int64 (B,).

    With a generator, a torch.Generator on the CPU, each image is augmented on its own: shifted by up to crop pixels in both
    directions, zeros coming in; mirrored with probability 1/2 if flip; and a square of side cutout around a random pixel, clipped at
    the border, set to zero (DeVries and Taylor 2017, Improved Regularization of Convolutional Neural Networks with Cutout).
    change_pixels: what is done before all this, a function (x of 0 to 1, mean of 0 to 1) -> x.
    """
    index = index.numpy()
    x, y = torch.from_numpy(images.pixels[index]), torch.from_numpy(images.labels[index])
    if "cuda" in str(device):
        x, y = x.pin_memory(), y.pin_memory()
    x = x.to(device, non_blocking=True).permute(0, 3, 1, 2)
    mean, std = (torch.from_numpy(a).to(device, non_blocking=True).view(-1, 1, 1) for a in (images.mean, images.std))
    if change_pixels:
        x = 255 * change_pixels(x / 255, mean / 255)
    x = (x - mean).div_(std).contiguous()
    if generator is not None:
        x = augment(x, generator, crop, flip, cutout)
    return x, y.to(device, non_blocking=True)


def augment(x, generator, crop, flip, cutout):
    """x (B, C, H, W) cropped, flipped and cut out; see get_images."""
    B, C, H, W = x.shape

    def draw(n, *shape):
        return torch.randint(n, (*shape, B, 1), generator=generator).to(x.device, non_blocking=True)

    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    if crop:
        top, left = draw(2 * crop + 1, 2)  # (B, 1)
        batch, channel = torch.arange(B, device=x.device).view(-1, 1, 1, 1), torch.arange(C, device=x.device).view(-1, 1, 1)
        x = F.pad(x, [crop] * 4)[batch, channel, (top + rows).view(B, 1, H, 1), (left + columns).view(B, 1, 1, W)]
    if flip:
        x = torch.where(draw(2).view(B, 1, 1, 1) == 1, x.flip(3), x)
    if cutout:
        top, left = draw(H) - cutout // 2, draw(W) - cutout // 2  # (B, 1)
        hidden = ((rows >= top) & (rows < top + cutout)).view(B, 1, H, 1) & ((columns >= left) & (columns < left + cutout)).view(B, 1, 1, W)
        x = x.masked_fill(hidden, 0)
    return x


@lru_cache(maxsize=4, typed=True)  # a search walks through two parts at a time
def permutation(n, *keys):
    return torch.randperm(n, generator=rng(*keys))


def batch_indices(n, batch_size, number, *keys):
    """
    The number-th batch of an endless walk through n images: int64 (batch_size,), which the arguments alone decide.

    Every epoch is a new permutation, of which n // batch_size batches are used. SystemExit if batch_size is larger than n.
    """
    if batch_size > n:
        raise SystemExit(f"batch_size={batch_size} is more than the {n:,} images to draw from: choose a smaller batch_size")
    epoch, i = divmod(number, n // batch_size)
    return permutation(n, *keys, epoch)[i * batch_size:(i + 1) * batch_size].clone()


def image_batches(images, batch_size, device="cpu"):
    """Walks all images once, in order and as they are: yields x, y as get_images() does, up to batch_size at a time."""
    for i in range(0, len(images), batch_size):
        yield get_images(images, torch.arange(i, min(i + batch_size, len(images))), device)


@dataclass(frozen=True)
class Pairs:
    """A split of images in low and high resolution: their bytes, uint8, the low shapes (h, w), int64 (N, 2), and offsets, int64 (N,)."""
    pixels: np.ndarray
    shapes: np.ndarray
    offsets: np.ndarray
    scale: int

    def __len__(self):
        return len(self.shapes)

    def part(self, start, stop):
        """Pairs start to stop as a view of these."""
        return replace(self, shapes=self.shapes[start:stop], offsets=self.offsets[start:stop])

    def pair(self, i):
        """low (h, w, 3), high (scale h, scale w, 3)"""
        (h, w), start, s = self.shapes[i].tolist(), int(self.offsets[i]), self.scale
        low, high = np.split(self.pixels[start:start + 3 * h * w * (1 + s * s)], [3 * h * w])
        return low.reshape(h, w, 3), high.reshape(s * h, s * w, 3)


def load_pairs(data_dir, dataset, split, scale):
    """Pairs of "train" or "val", left on the disk. SystemExit if they are not prepared, none, or not the bytes that were written."""
    folder = Path(data_dir) / f"{dataset}_x{scale}"
    meta = load_meta(data_dir, folder.name, "pairs")
    if not meta[f"{split}_shapes"]:
        raise SystemExit(f"{folder} holds no images of {split}: choose another --dataset")
    pixels = np.memmap(folder / f"{split}.bin", np.uint8, "r")
    check_hash(pixels, folder / f"{split}.bin", meta[f"{split}_sha256"])
    return Pairs(pixels, np.array(meta[f"{split}_shapes"]), np.array(meta[f"{split}_offsets"]), meta["scale"])


def as_batch(images, device="cpu"):
    """uint8 (H, W, 3) each, of one shape -> float32 (B, 3, H, W) of 0 to 1."""
    return torch.from_numpy(np.stack(images)).to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def pair_batches(pairs, index, device="cpu"):
    """Whole images, one at a time: yields x (1, 3, h, w), y (1, 3, scale h, scale w)."""
    for i in index:
        yield tuple(as_batch([image], device) for image in pairs.pair(i))


def get_patches(pairs, batch_size, patch, generator, device="cpu", flip=False):
    """
    Crops at random places, every pixel about as likely: x (batch_size, 3, patch, patch), y (batch_size, 3, scale patch, scale patch).

    flip: each is turned and mirrored, one of the 8 ways at random. generator: a torch.Generator on the CPU.
    """
    s, lows, highs = pairs.scale, [], []
    index = torch.multinomial(torch.from_numpy(pairs.shapes.prod(1)).double(), batch_size, replacement=True, generator=generator)
    for i in index.tolist():
        top, left = (torch.randint(int(n) - patch + 1, (), generator=generator).item() for n in pairs.shapes[i])
        turns = torch.randint(8, (), generator=generator).item() if flip else 0
        for images, image, k in zip((lows, highs), pairs.pair(i), (1, s), strict=True):
            image = np.rot90(image[k * top:k * (top + patch), k * left:k * (left + patch)], turns % 4)
            images.append(image[:, ::-1] if turns > 3 else image)
    return as_batch(lows, device), as_batch(highs, device)


def data_dir_option(data_dir):
    return "" if data_dir == "data" else f" --data_dir={data_dir}"


def load_data(config, run):
    """The data of train and of val, and what the network must know of it: {"vocab_size"} of tokens, or of images {"img_size",
    "in_channels", "num_classes"}. A space with a scale has pairs of images."""
    scale = vars(config).get("scale")
    if scale:
        return *(load_pairs(config.data_dir, config.dataset, split, scale) for split in ("train", "val")), {}
    if config.space != "gpt":
        train, val = (load_images(config.data_dir, config.dataset, split) for split in ("train", "val"))
        return train, val, {"img_size": train.pixels.shape[1], "in_channels": train.pixels.shape[3], "num_classes": train.num_classes}
    train, val = (load_tokens(config.data_dir, config.dataset, split) for split in ("train", "val"))
    return train, val, {"vocab_size": vocabulary(load_meta(config.data_dir, config.dataset)["vocab_size"], config)}


def vocabulary(size, config):
    """The vocab_size of the network for so many tokens: large ones in multiples of 64, for speed, but where it began as a pretrained
    one, whose logits are those of its tokens."""
    padded = size if size < 1000 else -(-size // 64) * 64
    path = os.path.join(config.out_dir if resumes(config) else config.init_from, "run.json")
    if os.path.exists(path): # of the run that goes on, or that the weights are from
        return size if read_json(path)["config"].get("vocab_size") == size else padded
    return size if pretrained(config.init_from) else padded


def cut(data, start, stop):
    """A part of the tokens or of the images of a split."""
    return data.part(start, stop) if isinstance(data, Images | Pairs) else data[start:stop]


def check_split(data, config, name):
    """SystemExit unless the data holds a batch."""
    if isinstance(data, Images):
        batch_indices(len(data), config.batch_size, 0)
    elif isinstance(data, Pairs):
        least = min(data.shapes.min(1).tolist(), default=0)
        if least < (3 if name in ("val", "test") else config.patch): # PSNR leaves out a border of one pixel
            raise SystemExit(f"The {name} split of {config.dataset} has {len(data)} images or regions, the smallest of {least} pixels, and "
                             f"patch={config.patch}: choose a smaller patch, or prepare more images, or larger regions by --img_size.")
    else:
        check_length(data, config.block_size, f"the {name} split of {config.dataset}")


def draw(data, config, run, name, step, micro=0, recipe=True):
    """x, y of a micro-batch: random windows of tokens; images in random order, those of the train split augmented, and changed by the
    keys of recipes.py if recipe; crops of pairs."""
    if isinstance(data, Pairs):
        return get_patches(data, config.batch_size, config.patch, rng(config.seed, name, step, micro), run.device, config.flip)
    if not isinstance(data, Images):
        return get_batch(data, config.batch_size, config.block_size, rng(config.seed, name, step, micro), run.device)
    copies = config.repeated_augmentation if name == "train" and recipe else 1
    number = step * config.gradient_accumulation_steps + micro
    index = batch_indices(len(data), config.batch_size // copies, number, config.seed, name).repeat_interleave(copies)
    if name != "train":
        return get_images(data, index, run.device)
    change = dict(generator=rng(config.seed, "augment", step, micro), crop=config.crop, flip=config.flip, cutout=config.cutout)
    if not recipe:
        return get_images(data, index, run.device, **change)
    generator = rng(config.seed, "recipe", step, micro)
    if config.resized_crop or config.rand_augment or config.color_jitter:
        change["change_pixels"] = lambda x, mean: change_pixels(x, mean, config, generator)
    x, y = get_images(data, index, run.device, **change)
    return change_batch(x, y, data.num_classes, config, generator)


def micro_batches(data, config, run, name, step):
    """This process's (x, y) of the step's gradient_accumulation_steps micro-batches; the same data for any world."""
    for micro in range(run.rank, config.gradient_accumulation_steps, run.world):
        yield draw(data, config, run, name, step, micro)


def luma(image):
    """Y of YCbCr as in ITU-R BT.601: (B, 3, H, W) of 0 to 255 -> (B, 1, H, W) of 16 to 235."""
    weights = image.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return 16 + (image * weights).sum(1, keepdim=True) / 255


def psnr(a, b):
    """10 log10(255^2 / mean squared error) of images of 0 to 255, in dB; at most 148, for no error."""
    return (20 * math.log10(255) - 10 * (a - b).square().mean().clamp_min(1e-10).log10()).item()


def ssim(a, b):
    """Structural similarity of images (B, C, H, W) of 0 to 255: eq. 13 of Wang et al. 2004 in windows of 11 x 11 that lie inside the
    image, weighted by a Gaussian of deviation 1.5, averaged."""
    t = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    window = torch.exp(-t.square() / 4.5)
    window = (window / window.sum()).view(1, 1, 11, 1)
    a, b = (x.flatten(0, 1).unsqueeze(1) for x in (a, b)) # (B * C, 1, H, W)
    mean_a, mean_b, aa, bb, ab = (torch.conv2d(torch.conv2d(x, window), window.mT) for x in (a, b, a * a, b * b, a * b))
    c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c_1) * (2 * (ab - mean_a * mean_b) + c_2)
    return (likeness / ((mean_a ** 2 + mean_b ** 2 + c_1) * (aa - mean_a ** 2 + bb - mean_b ** 2 + c_2))).mean().item()


def fidelity(image, target, border, structure=False):
    """{"psnr_y", "psnr_rgb"} of images (B, 3, H, W) of 0 to 1, in dB, as papers of super-resolution measure it: rounded to 8 bits, without
    `border` pixels at the edges; with structure also {"ssim_y", "ssim_rgb"}."""
    a, b = ((255 * t.cpu().double()).round().clamp(0, 255)[:, :, border:-border, border:-border] for t in (image, target))
    found = {}
    for kind, (c, d) in {"y": (luma(a), luma(b)), "rgb": (a, b)}.items():
        found |= {f"psnr_{kind}": psnr(c, d)} | ({f"ssim_{kind}": ssim(c, d)} if structure else {})
    return found


def quality(data, right):
    """What estimates say besides the loss, from the right answers, or summed PSNR, of one answer in the mean."""
    return {"acc": 100 * right} if isinstance(data, Images) else {"psnr": right} if isinstance(data, Pairs) else {}


# ---- the published training recipes

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


TOKENIZER = {"pydocs": "char", "this_python": "char", "shakespeare_char": "char",
             "tinystories": "gpt2", "openwebtext": "gpt2", "text": "char"}
IMAGE_SETS = {"digits": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100, "imagenet16_120": 120, "imagenet": 1000,
              "images": 0}  # number of classes; 0 = as many as there are
PAIR_SETS = ("sr_samples", "div2k", "set5", "set14", "pairs")  # of images in low and in high resolution
