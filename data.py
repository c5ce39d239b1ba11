"""
Reads what prepare.py wrote, and hands out batches of it: text, images, and pairs of images.

A kind of data is a class: Tokens, Images or Pairs. A space names its kind (DATA, a key of KINDS).
Each kind offers the same names:

    keys                                   a class with the kind's own keys of train.py
    metric, metric_unit                    what is measured besides the loss: "acc", "psnr" or None
    units, unit, sample                    for progress lines: "tokens", "tok", "a sequence"
    units_per_sample(config)               tokens of a sequence; 1
    test_name, default_dataset             words of the result's line; a set that needs no network
    load(config) -> {"train", "val"}, facts     facts: what the network must know of the data
    data.part(start, stop)                 a view of a part
    data.check(config, name)               SystemExit unless it holds a batch; of "val" and "test",
                                           which are only evaluated, unless it holds anything
    data.batch(config, name, step, micro, device) -> x, y      the arguments alone decide which
    data.n_eval_batches(config), data.eval_batch(config, name, i, device) -> x, y
    data.sweep(config, device)             yields x, y: everything once, in order
    data.score(x, y, logits) -> n, total   how many answers, and the sum of their metric
"""
import hashlib
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from configurator import as_list, at_least, between
from run import (check_same_data, content_hash, is_pretrained, is_resuming, read_json, read_run,
                 rng)

# sets of text and their usual tokenizers; of images and their numbers of classes (0: as many as
# there are); of pairs of images
TOKENIZER = {"pydocs": "char", "this_python": "char", "shakespeare_char": "char",
             "tinystories": "gpt2", "openwebtext": "gpt2", "text": "char"}
IMAGE_SETS = {"digits": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100,
              "imagenet16_120": 120, "imagenet": 1000, "images": 0}
PAIR_SETS = ("sr_samples", "div2k", "set5", "set14", "pairs")
# what tokenizers of Hugging Face call the token that ends a document; the first that one has counts
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")
# pydocs: its source in meta.json, and the sha256 of its train.bin as prepare.py makes it by default
PYDOCS_SOURCE = "documentation of Python 3.11.7"
PYDOCS_TRAIN = "b3daf1666d09abe39f42950bf22292d50fbc3073833dd14d12980fccb7b6c26f"

# -----------------------------------------------------------------------------
# the folder data_dir/dataset

def data_dir_option(data_dir):
    return "" if data_dir == "data" else " " + shlex.quote(f"--data_dir={data_dir}")


def prepare_command(data_dir, dataset, kind):
    """The command that prepares a data set."""
    if kind == "pairs":
        name, _, scale = dataset.rpartition("_x")
        path = ""
        if name != "sr_samples":
            path = " --path=FOLDER" if name in PAIR_SETS else f" --path=FOLDER --name={name}"
        known = name if name in PAIR_SETS else "pairs"
        command = f"python prepare.py --dataset={known} --scale={scale}{path}"
    else:
        known = dataset in TOKENIZER | IMAGE_SETS
        command = f"python prepare.py --dataset={dataset if known else kind or 'text'}"
        if not known or dataset in ("text", "images", "imagenet16_120"):
            command += f" --path=FILE_OR_FOLDER --name={dataset}"
    return command + data_dir_option(data_dir)


def load_meta(data_dir, dataset, kind=""):
    """meta.json of the folder data_dir/dataset. Its "kind" is "images" or "pairs", or missing for
    text.

    SystemExit if it is not prepared, or not whole, or not of the kind "text", "images" or "pairs"
    where one is asked for.
    """
    folder, meta = Path(data_dir) / dataset, read_meta(data_dir, dataset, kind)
    if "kind" not in meta:
        check_token_files(folder, meta, prepare_command(data_dir, dataset, kind))
        return meta
    try:
        (check_image_files if meta["kind"] == "images" else check_pair_files)(folder, meta)
    except (AssertionError, KeyError, OSError, TypeError, ValueError):
        raise SystemExit(f"{folder} is damaged, its files are not those of its meta.json: delete "
                         "it and prepare it again") from None
    return meta


def read_meta(data_dir, dataset, kind=""):
    """load_meta() without a look at the data themselves."""
    folder, command = Path(data_dir) / dataset, prepare_command(data_dir, dataset, kind)
    if not (folder / "meta.json").exists():
        raise SystemExit(f"{folder} is not prepared: run {command}")
    meta = read_json(folder / "meta.json")
    found = meta.get("kind", "text")
    if kind and found != kind:
        raise SystemExit(f"{folder} holds {found}, where {kind} should be: choose another "
                         "--dataset")
    return meta


def check_token_files(folder, meta, command):
    for split in ("train", "val"):
        try:
            size = meta[f"{split}_tokens"] * np.dtype(meta["dtype"]).itemsize
            assert meta[f"{split}_sha256"] and meta["vocab_size"] and meta["tokenizer"]
        except (AssertionError, KeyError, TypeError):
            raise SystemExit(f"{folder / 'meta.json'} is damaged: delete {folder} and run "
                             f"{command}") from None
        file = folder / f"{split}.bin"
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise SystemExit(f"{file} has {found:,} bytes and not the {size:,} of meta.json: "
                             f"delete {folder} and run {command}")


def check_image_files(folder, meta):
    side, channels = meta["img_size"], meta["in_channels"]
    for split in ("train", "val"):
        shape = (meta[f"{split}_images"], side, side, channels)
        assert np.load(folder / f"{split}.npy", mmap_mode="r").shape == shape
        assert np.load(folder / f"{split}_labels.npy", mmap_mode="r").shape == shape[:1]


def check_pair_files(folder, meta):
    for split in ("train", "val"):
        shapes, offsets = meta[f"{split}_shapes"], meta[f"{split}_offsets"]
        size = sum(3 * h * w * (1 + meta["scale"] ** 2) for h, w in shapes)
        assert (folder / f"{split}.bin").stat().st_size == size and len(offsets) == len(shapes)


def bytes_hash(data):
    return hashlib.sha256(data).hexdigest() # about a second a gigabyte


def check_hash(data, file, sha256):
    if bytes_hash(data) != sha256:
        raise SystemExit(f"{file} is damaged, its bytes are not those that were written: delete "
                         f"{file.parent} and prepare it again")


def identity(data_dir, dataset):
    """What tells a prepared data set from others, {"meaning", "content"}, a dict each that
    run.different_data() compares.

    meaning: what ids or labels stand for. content: the bytes of train and val, as meta.json has
    them. A run keeps both: two sets of as many characters give networks of one shape.
    """
    folder = Path(data_dir) / dataset
    meta = read_json(folder / "meta.json")
    kind, hashes = meta.get("kind", "text"), [meta["train_sha256"], meta["val_sha256"]]
    if kind == "images":
        hashes += [meta["train_labels_sha256"], meta["val_labels_sha256"]]
        meaning = {"classes": content_hash(meta.get("classes") or meta["num_classes"]),
                   "image size": [meta["img_size"], meta["in_channels"]]}
    elif kind == "pairs":
        meaning = {"scale": meta["scale"]}
    else:
        meaning = {"tokenizer": meta["tokenizer"].partition(":")[0], # an hf: may lie elsewhere
                   "characters": content_hash(meta["chars"]),
                   **{file.name: bytes_hash(file.read_bytes())
                      for file in sorted(folder.glob("tokenizer.*"))}}
    return {"meaning": meaning,
            "content": {"text" if kind == "text" else "images": content_hash(hashes)}}

# -----------------------------------------------------------------------------
# text

@dataclass(frozen=True)
class Codec:
    """A tokenizer. encode: list of texts -> list of arrays of ids; decode: ids -> text.

    joint: the ids between two documents. eot: the id that ends a document, or None. joins: whether
    the tokens of a text are those of its parts, where it is cut before a space.
    """
    encode: Callable
    decode: Callable
    vocab_size: int
    joint: list
    eot: int | None = None
    joins: bool = True


def codec(tokenizer, chars, folder, num_proc=1):
    """The Codec of a tokenizer. folder: where its file tokenizer.model or tokenizer.json lies.
    chars: the characters of 'char'. num_proc: threads that encode."""
    if tokenizer == "gpt2":
        return gpt2_codec(num_proc)
    if tokenizer == "sentencepiece":
        import sentencepiece
        model = read_tokenizer(folder, "tokenizer.model")
        bpe = sentencepiece.SentencePieceProcessor(model_proto=model)
        encode = partial(bpe.encode, num_threads=num_proc)
        return Codec(encode, bpe.decode, bpe.vocab_size(), [bpe.eos_id()], bpe.eos_id())
    if tokenizer.startswith("hf:"):
        return hf_codec(Path(folder) / "tokenizer.json")
    return char_codec(chars)


def read_tokenizer(folder, name):
    try:
        return (Path(folder) / name).read_bytes()
    except OSError as error:
        raise SystemExit(f"{Path(folder) / name}, the tokenizer of the data, cannot be read "
                         f"({error.strerror}): prepare the data again") from None


def gpt2_codec(num_proc):
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise SystemExit("tiktoken could not fetch GPT-2's vocabulary "
                         f"({type(error).__name__}): connect to the network once, or set "
                         "TIKTOKEN_CACHE_DIR to a folder that holds it, or use another "
                         "--tokenizer") from None
    encode = partial(bpe.encode_ordinary_batch, num_threads=num_proc)
    return Codec(encode, bpe.decode, bpe.n_vocab, [bpe.eot_token], bpe.eot_token)


def hf_codec(file):
    """A tokenizer.json of Hugging Face's tokenizers. Its own <|endoftext|> in a text is plain."""
    from tokenizers import Tokenizer
    bpe = Tokenizer.from_str(read_tokenizer(file.parent, file.name).decode())
    bpe.encode_special_tokens = True
    bpe.no_truncation() # else long documents are cut, and short ones filled up
    bpe.no_padding()
    eot = next((i for i in map(bpe.token_to_id, END_TOKENS) if i is not None), None)
    if eot is None:
        raise SystemExit(f"{file} has no token that ends a document (one of "
                         f"{', '.join(END_TOKENS)}): add one to it, or use another --tokenizer")

    def encode(texts):
        try:
            return [found.ids for found in bpe.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error: # the library raises Exception itself
            raise SystemExit(f"{file} cannot tokenize a text ({str(error).splitlines()[0]}): use "
                             "another --tokenizer") from None

    def decode(ids):
        return bpe.decode(list(ids), skip_special_tokens=False)

    try:
        whole, first, second = encode(["a sea", "a", " sea"])
    except SystemExit: # it lacks these words
        whole, first, second = [], [], [eot]
    size = max(bpe.get_vocab().values()) + 1 # there may be gaps
    return Codec(encode, decode, size, [eot], eot, whole == first + second)


def char_codec(chars):
    ids = np.full(0x110000, -1, np.int32) # of every code point
    ids[[ord(c) for c in chars]] = np.arange(len(chars))

    def encode(texts):
        found = [ids[code_points(text)] for text in texts]
        for text, tokens in zip(texts, found, strict=True):
            if (tokens < 0).any():
                character = text[int((tokens < 0).argmax())]
                raise SystemExit(f"the character {character!r} is not among the {len(chars)} of "
                                 "this data set: leave it out, or prepare the data with "
                                 "--tokenizer=gpt2")
        return found

    def decode(tokens):
        return "".join(chars[i] for i in tokens)

    return Codec(encode, decode, len(chars), [int(ids[ord(c)]) for c in "\n\n" if c in chars])


def code_points(text):
    """The characters of a text as numbers: uint32 (n,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def codec_of(trained):
    """The Codec with which a run has learned. trained: its config. SystemExit if the data set has
    another one by now, or is gone."""
    tokens = load_codec(trained.data_dir, trained.dataset)
    now = identity(trained.data_dir, trained.dataset)
    check_same_data(SimpleNamespace(**vars(trained) | {"identity": now}), vars(trained),
                    f"out_dir={trained.out_dir}", ("meaning",), "prepare the data as they were")
    return tokens


def load_codec(data_dir, dataset):
    """The Codec of a data set of text; of its files, meta.json and the tokenizer are enough."""
    folder = Path(data_dir) / dataset
    meta = read_meta(data_dir, dataset, "text")
    return codec(meta["tokenizer"], meta["chars"], folder)


def load_tokens(data_dir, dataset, split):
    """Token ids of "train" or "val", left on the disk: np.memmap (tokens,) of uint16 or uint32.

    SystemExit if they are not the bytes that were written.
    """
    meta = load_meta(data_dir, dataset, "text")
    file = Path(data_dir) / dataset / f"{split}.bin"
    tokens = np.memmap(file, dtype=meta["dtype"], mode="r")
    check_hash(tokens, file, meta[f"{split}_sha256"])
    return tokens


def check_pydocs(data_dir, dataset):
    """SystemExit if dataset is pydocs, or a shard of it, and an older version of this code made it
    from the Python that ran.

    One that was split with another seed or share, or tokenized otherwise, is only told by its
    source; text of one's own may have the name.
    """
    name = dataset.split("/")[0]
    if name != "pydocs":
        return
    meta = read_json(Path(data_dir) / name / "meta.json")
    settings = {"tokenizer": "char", "val_fraction": 0.1, "seed": 1337}
    usual = all(meta.get(key) == value for key, value in settings.items())
    right = meta.get("source") == PYDOCS_SOURCE
    if usual:
        right = right and meta["train_sha256"] == PYDOCS_TRAIN
    if meta.get("dataset") == "pydocs" and not right:
        raise SystemExit(f"{Path(data_dir) / name} holds the {meta.get('source')}, which an older "
                         "version of this code put there, and pydocs is now the "
                         f"{PYDOCS_SOURCE} as this repository has it: delete that folder, or "
                         "train on your Python's documentation by --dataset=this_python")


def load_shards(data_dir, dataset, shards, mode=0):
    """[{"dataset", "entries", "mode"}] of data_dir/dataset/<shards>, by size; mode=0: all of them.

    SystemExit if they are not prepared.
    """
    file = Path(data_dir) / dataset / str(shards) / "shards.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing: run python prepare.py --dataset={dataset} "
                         f"--shards={shards}{data_dir_option(data_dir)}")
    if mode not in (0, 1, 2):
        raise SystemExit(f"mode={mode} is not 1 or 2, the two halves of the shards, or 0 for all.")
    return [shard for shard in read_json(file)["shards"] if mode in (0, shard["mode"])]


def check_length(tokens, block_size, what):
    """SystemExit unless tokens hold a block and the token after it. what: their name."""
    if len(tokens) < block_size + 1:
        raise SystemExit(f"{what} has {len(tokens):,} tokens, and block_size={block_size} needs "
                         f"{block_size + 1:,}: give more text or a smaller block_size")


def get_batch(tokens, batch_size, block_size, generator, device="cpu"):
    """A random batch: x, y of int64, both (batch_size, block_size), y one token further than x.

    Every window of block_size + 1 tokens is equally likely. generator: one on the CPU.
    """
    n = len(tokens) - block_size
    offsets = torch.randint(n, (batch_size, 1), generator=generator)
    window = tokens[offsets.numpy() + np.arange(block_size + 1)] # (batch_size, block_size + 1)
    x, y = (torch.from_numpy(w.astype(np.int64)) for w in (window[:, :-1], window[:, 1:]))
    if "cuda" in str(device):
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def sequential_batches(tokens, batch_size, block_size, device="cpu"):
    """All tokens once, in order: yields x, y of int64, both (up to batch_size, block_size).

    Each of the len(tokens) - 1 predictions counts once; the rest of the last block is x = 0,
    y = -1, which the loss ignores.
    """
    step = batch_size * block_size
    for i in range(0, len(tokens) - 1, step):
        part = torch.from_numpy(tokens[i:i + step + 1].astype(np.int64))
        n = len(part) - 1
        rows = -(-n // block_size)
        x = torch.zeros(rows * block_size, dtype=torch.int64)
        y = torch.full((rows * block_size,), -1)
        x[:n], y[:n] = part[:-1], part[1:]
        yield x.view(rows, block_size).to(device), y.view(rows, block_size).to(device)


class TokenKeys:
    """Text has no keys besides the GPT's block_size."""
    LIMITS = {"block_size": at_least(1)}

    @staticmethod
    def check(config):
        """Nothing to check."""


@dataclass(frozen=True)
class Tokens:
    """A split of text. ids: (n,) of uint16 or uint32."""
    ids: np.ndarray
    keys, metric, metric_unit = TokenKeys, None, ""
    units, unit, sample = "tokens", "tok", "a sequence"
    test_name, default_dataset = "tokens of val.bin", "pydocs"

    def __len__(self):
        return len(self.ids)

    @staticmethod
    def units_per_sample(config):
        return config.block_size

    @classmethod
    def load(cls, config):
        splits = {split: cls(load_tokens(config.data_dir, config.dataset, split))
                  for split in ("train", "val")}
        if not is_resuming(config): # else its identity tells
            check_pydocs(config.data_dir, config.dataset)
        size = load_meta(config.data_dir, config.dataset)["vocab_size"]
        return splits, {"vocab_size": padded_vocab_size(size, config),
                        "identity": identity(config.data_dir, config.dataset)}

    def part(self, start, stop):
        return Tokens(self.ids[start:stop])

    def check(self, config, name):
        check_length(self.ids, config.block_size, f"the {name} split of {config.dataset}")

    def batch(self, config, name, step, micro=0, device="cpu", augment=True):
        generator = rng(config.seed, name, step, micro)
        return get_batch(self.ids, config.batch_size, config.block_size, generator, device)

    def n_eval_batches(self, config, own_norms=False):
        return config.eval_iters

    def eval_batch(self, config, name, i, device="cpu"):
        return self.batch(config, "eval", name, i, device)

    def sweep(self, config, device="cpu"):
        return sequential_batches(self.ids, config.batch_size, config.block_size, device)

    def n_sweep_batches(self, config):
        return -(-len(self) // (config.batch_size * config.block_size))

    @staticmethod
    def score(x, y, logits):
        """Tokens with y < 0 are not predicted, and do not count."""
        return (y >= 0).sum(), 0.0


def padded_vocab_size(size, config):
    """The network's vocab_size for so many tokens: large ones in multiples of 64, for speed.

    A network with the weights of another has that one's.
    """
    padded = size if size < 1000 else -(-size // 64) * 64
    path = Path(config.out_dir if is_resuming(config) else config.init_from) / "run.json"
    if path.exists(): # of the run that is resumed, or that the weights are from
        return size if read_run(path.parent)["config"].get("vocab_size") == size else padded
    return size if is_pretrained(config.init_from) else padded

# -----------------------------------------------------------------------------
# images

class ImageKeys:
    """The keys of train.py for images. What changes a batch draws from generators of its own."""
    crop = 0 # a random crop after padding with so many pixels of zeros
    flip = False # left and right at random
    cutout = 0 # the side of a square of zeros at a random place (DeVries & Taylor 2017)
    resized_crop = 0.0 # a random box of at least this share of the area, in full size; 0: off
    rand_augment = 0 # magnitude, to 10, of two random operations (RandAugment, Cubuk et al. 2020)
    color_jitter = 0.0 # how far brightness, contrast and saturation are changed; needs kornia
    random_erasing = 0.0 # the probability that a box becomes noise (Zhong et al. 2020)
    repeated_augmentation = 1 # how often each image is in a batch (Hoffer et al. 2020)
    label_smoothing = 0.0 # the share of a label that goes to all classes
    mixup = 0.0 # alpha of Beta(alpha, alpha), the weights of two images (Zhang et al. 2018)
    cutmix = 0.0 # alpha of the area that one image gets from another (Yun et al. 2019)
    mix_prob = 1.0 # share of batches that are mixed, where mixup or cutmix is on
    mix_switch = 0.5 # share of cutmix, where both are on
    resolutions = [0] # sizes to which training batches are resized at random; 0: the data's own
    bn_batches = 20 # batches that measure the statistics of BatchNorms before every evaluation
    LIMITS = {**dict.fromkeys(("crop", "cutout", "bn_batches", "mixup", "cutmix"), at_least(0)),
              **dict.fromkeys(("label_smoothing", "mix_prob", "mix_switch", "random_erasing",
                               "color_jitter", "resized_crop"), between(0, 1)),
              "rand_augment": between(0, 10), "repeated_augmentation": at_least(1)}

    @staticmethod
    def check(config):
        """SystemExit for keys that do not go together, or need what is not installed."""
        copies = config.repeated_augmentation
        if config.batch_size % copies:
            raise SystemExit(f"repeated_augmentation={copies} must divide "
                             f"batch_size={config.batch_size}.")
        if not all(type(side) is int and side >= 0 for side in as_list(config.resolutions)):
            raise SystemExit(f"resolutions={config.resolutions} must be whole numbers of pixels, 0 "
                             "for the data's own.")
        if config.rand_augment or config.color_jitter:
            try:
                import kornia.enhance  # noqa: F401 (fails now and not in the first step)
            except ImportError:
                raise SystemExit("rand_augment and color_jitter need kornia: pip install kornia, "
                                 "or leave both 0.") from None


@dataclass(frozen=True)
class Images:
    """A split of images with labels.

    pixels: uint8 (N, H, W, C). labels: int64 (N,). mean, std: float32 (C,), of the pixels of the
    train split, 0 to 255.
    """
    pixels: np.ndarray
    labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    num_classes: int
    keys, metric, metric_unit = ImageKeys, "acc", "%"
    units, unit, sample = "images", "img", "an image"
    test_name, default_dataset = "images of val", "digits"

    def __len__(self):
        return len(self.labels)

    @staticmethod
    def units_per_sample(config):
        return 1

    @classmethod
    def load(cls, config):
        splits = {split: load_images(config.data_dir, config.dataset, split)
                  for split in ("train", "val")}
        _, side, _, channels = splits["train"].pixels.shape
        return splits, {"img_size": side, "in_channels": channels,
                        "num_classes": splits["train"].num_classes,
                        "identity": identity(config.data_dir, config.dataset)}

    def part(self, start, stop):
        return replace(self, pixels=self.pixels[start:stop], labels=self.labels[start:stop])

    def check(self, config, name):
        needed = 1 if name in ("val", "test") else config.batch_size
        if len(self) < needed:
            fix = f"choose --batch_size={len(self)} or less" if len(self) else (
                "prepare more images, or change the portions of the splits")
            raise SystemExit(f"The {name} split of {config.dataset} has {len(self):,} images and "
                             f"needs {needed:,} for batch_size={config.batch_size}: {fix}.")

    def batch(self, config, name, step, micro=0, device="cpu", augment=True):
        """Images in random order; those of the train split are cropped, flipped and cut out, and
        with augment changed by the recipe's keys."""
        copies = config.repeated_augmentation if name == "train" and augment else 1
        number = step * config.gradient_accumulation_steps + micro
        index = batch_indices(len(self), config.batch_size // copies, number, config.seed, name)
        index = index.repeat_interleave(copies)
        if name != "train":
            return get_images(self, index, device)
        change = dict(generator=rng(config.seed, "augment", step, micro), crop=config.crop,
                      flip=config.flip, cutout=config.cutout)
        if not augment:
            return get_images(self, index, device, **change)
        generator = rng(config.seed, "recipe", step, micro)
        if config.resized_crop or config.rand_augment or config.color_jitter:
            change["change_pixels"] = lambda x, mean: change_pixels(x, mean, config, generator)
        x, y = get_images(self, index, device, **change)
        return change_batch(x, y, self.num_classes, config, generator)

    def n_eval_batches(self, config, own_norms=False):
        """own_norms: BatchNorms take each batch's statistics; one image alone has none."""
        rest = len(self) - own_norms
        return min(config.eval_iters, max(1, -(-rest // config.batch_size)))

    def eval_batch(self, config, name, i, device="cpu"):
        """The i-th of the first batches, without augmentation."""
        start, stop = i * config.batch_size, (i + 1) * config.batch_size
        return get_images(self, torch.arange(start, min(stop, len(self))), device)

    def sweep(self, config, device="cpu"):
        return image_batches(self, config.batch_size, device)

    def n_sweep_batches(self, config):
        return -(-len(self) // config.batch_size)

    @staticmethod
    def score(x, y, logits):
        """The metric is the share of right answers, in %. y: classes, or probabilities (B, K)."""
        right = 0 if y.dim() > 1 else (logits.argmax(-1) == y).sum()
        return (y >= 0).sum(), 100 * right


def load_images(data_dir, dataset, split):
    """Images of "train" or "val", their pixels left on the disk.

    SystemExit if they are not prepared, or not the bytes that were written.
    """
    meta, arrays = load_meta(data_dir, dataset, "images"), []
    for part in (split, f"{split}_labels"):
        file = Path(data_dir) / dataset / f"{part}.npy"
        check_hash(np.memmap(file, mode="r"), file, meta[f"{part}_sha256"])
        arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
    mean, std = np.float32(meta["mean"]), np.float32(meta["std"])
    return Images(*arrays, mean, std, meta["num_classes"])


@lru_cache(maxsize=4, typed=True) # a search walks through two parts at a time
def permutation(n, *keys):
    return torch.randperm(n, generator=rng(*keys))


def batch_indices(n, batch_size, number, *keys):
    """The number-th batch of an endless walk through n images: int64 (batch_size,).

    Every epoch is a new permutation, of which n // batch_size batches are used. The arguments
    alone decide. SystemExit if batch_size is larger than n.
    """
    if batch_size > n:
        raise SystemExit(f"batch_size={batch_size} is more than the {n:,} images to draw from: "
                         "choose a smaller batch_size")
    epoch, i = divmod(number, n // batch_size)
    return permutation(n, *keys, epoch)[i * batch_size:(i + 1) * batch_size].clone()


def image_batches(images, batch_size, device="cpu"):
    """All images once, in order, without augmentation: yields x, y as get_images() does."""
    for i in range(0, len(images), batch_size):
        yield get_images(images, torch.arange(i, min(i + batch_size, len(images))), device)


def get_images(images, index, device="cpu", generator=None, crop=0, flip=False, cutout=0,
               change_pixels=None):
    """x float32 (B, C, H, W), (pixel - mean) / std, and y int64 (B,). index: int64 (B,).

    With a generator (on the CPU) each image is augmented on its own: shifted by up to crop pixels
    in both directions, zeros coming in; mirrored with probability 1/2 if flip; and a square of
    side cutout around a random pixel, clipped at the border, set to zero. change_pixels(x, mean)
    -> x comes before all this, both of 0 to 1.
    """
    index = index.numpy()
    x, y = torch.from_numpy(images.pixels[index]), torch.from_numpy(images.labels[index])
    if "cuda" in str(device):
        x, y = x.pin_memory(), y.pin_memory()
    x = x.to(device, non_blocking=True).permute(0, 3, 1, 2)
    mean, std = (torch.from_numpy(a).to(device, non_blocking=True).view(-1, 1, 1)
                 for a in (images.mean, images.std))
    if change_pixels:
        x = 255 * change_pixels(x / 255, mean / 255)
    x = (x - mean).div_(std).contiguous()
    if generator is not None:
        x = crop_flip_cut(x, generator, crop, flip, cutout)
    return x, y.to(device, non_blocking=True)


def crop_flip_cut(x, generator, crop, flip, cutout):
    """x (B, C, H, W) cropped, flipped and cut out, as get_images() says."""
    B, C, H, W = x.shape

    def draw(n, *shape):
        return torch.randint(n, (*shape, B, 1), generator=generator).to(x.device, non_blocking=True)

    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    if crop:
        top, left = draw(2 * crop + 1, 2) # (B, 1)
        batch = torch.arange(B, device=x.device).view(-1, 1, 1, 1)
        channel = torch.arange(C, device=x.device).view(-1, 1, 1)
        row, column = (top + rows).view(B, 1, H, 1), (left + columns).view(B, 1, 1, W)
        x = F.pad(x, [crop] * 4)[batch, channel, row, column]
    if flip:
        x = torch.where(draw(2).view(B, 1, 1, 1) == 1, x.flip(3), x)
    if cutout:
        top, left = draw(H) - cutout // 2, draw(W) - cutout // 2 # (B, 1)
        in_rows = ((rows >= top) & (rows < top + cutout)).view(B, 1, H, 1)
        in_columns = ((columns >= left) & (columns < left + cutout)).view(B, 1, 1, W)
        x = x.masked_fill(in_rows & in_columns, 0)
    return x

# -----------------------------------------------------------------------------
# images: the training recipes of DeiT (AutoFormer's) and once-for-all. All act on whole batches, on
# the device. Every image draws for itself, but mixup and cutmix mix a whole batch with itself, and
# the order of color_jitter and the resolution are the batch's. The colour operations are kornia's,
# which are Pillow's to a grey level.

def change_pixels(x, mean, config, generator):
    """x: (B, C, H, W) of 0 to 1 -> the same, cropped and in other colours, before it is normalised.
    mean: (C, 1, 1), what comes in at the borders."""
    if config.resized_crop:
        x = resized_crop(x, config.resized_crop, generator)
    if config.rand_augment:
        x = rand_augment(x, mean, config.rand_augment, generator)
    if config.color_jitter:
        x = color_jitter(x, config.color_jitter, generator)
    return x


def change_batch(x, y, num_classes, config, generator):
    """x: (B, C, H, W), normalised, y: (B,) classes -> x, erased, mixed and resized; y as it is, or
    probabilities (B, num_classes)."""
    if config.random_erasing:
        x = erase(x, config.random_erasing, generator)
    smooth, sides = config.label_smoothing, as_list(config.resolutions)
    if smooth or config.mixup or config.cutmix:
        y = (1 - smooth) * F.one_hot(y, num_classes).float() + smooth / num_classes
    if (config.mixup or config.cutmix) and uniform(generator) < config.mix_prob:
        x, y = mix(x, y, config, generator)
    if any(sides):
        side = sides[torch.randint(len(sides), (), generator=generator)] or x.shape[-1]
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return x, y


def uniform(generator, *shape, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(shape, generator=generator)


def boxes(B, area, ratio, generator):
    """Heights, widths, and places down and across of B random boxes, (B,) each.

    Sides are in shares of the image's: area uniform and width / height log-uniform between the two
    bounds of each, the first of ten draws that fits. Places are shares of what the sides leave.
    """
    area = uniform(generator, 10, B, low=area[0], high=area[1])
    ratio = uniform(generator, 10, B, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
    h, w = (area / ratio).sqrt(), (area * ratio).sqrt()
    fits = ((h <= 1) & (w <= 1)).int().argmax(0, keepdim=True) # (1, B)
    h, w = (side.gather(0, fits).squeeze(0).clamp(max=1) for side in (h, w))
    return h, w, *uniform(generator, 2, B)


def warp(x, matrix, padding_mode="zeros"):
    """x: (B, C, H, W), whose pixel at (column, row), from -1 to 1, comes from
    matrix @ (column, row, 1). matrix: two rows of three numbers or (B,) tensors."""
    rows = [torch.as_tensor(v, dtype=x.dtype).expand(len(x)) for row in matrix for v in row]
    rows = torch.stack(rows, 1).view(-1, 2, 3).to(x.device)
    grid = F.affine_grid(rows, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode=padding_mode, align_corners=False)


def resized_crop(x, smallest, generator):
    """A random box of every image, of at least this share of its area and of sides 3/4 to 4/3, in
    the image's own size (Szegedy et al. 2015, Going Deeper with Convolutions)."""
    h, w, down, across = boxes(len(x), (smallest, 1), (3 / 4, 4 / 3), generator)
    matrix = [[w, 0, (1 - w) * (2 * across - 1)], [0, h, (1 - h) * (2 * down - 1)]]
    return warp(x, matrix, "border")


def operations(mean):
    """RandAugment's operations, name -> function of x (n, C, H, W), level (n,) of 0 to 1 and sign
    (n,) of -1 and 1: timm's "increasing" ones, which change more at a higher level."""
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

    def posterize(x, level, _):
        return enhance.posterize(x, (4 - (4 * level).int()).to(x.device)) # bits that stay

    def solarize(x, level, _):
        return torch.where(x < 1 - column(level, x), x, 1 - x)

    def solarize_add(x, level, _):
        return torch.where(x < 0.5, (x + 110 / 255 * column(level, x)).clamp(max=1), x)

    return {"auto_contrast": lambda x, *_: enhance.normalize_min_max(x),
            "equalize": lambda x, *_: enhance.equalize(x),
            "invert": lambda x, *_: 1 - x,
            "posterize": posterize,
            "solarize": solarize,
            "solarize_add": solarize_add,
            "color": enhanced(enhance.adjust_saturation_with_gray_subtraction),
            "contrast": enhanced(enhance.adjust_contrast_with_mean_subtraction),
            "brightness": enhanced(enhance.adjust_brightness_accumulative),
            "sharpness": enhanced(enhance.sharpness),
            "rotate": moved(rotation),
            "shear_x": moved(lambda level, sign: [[1, 0.3 * level * sign, 0], [0, 1, 0]]),
            "shear_y": moved(lambda level, sign: [[1, 0, 0], [0.3 * level * sign, 1, 0]]),
            # by up to 0.45 of the side, which is 2 long
            "translate_x": moved(lambda level, sign: [[1, 0, 0.9 * level * sign], [0, 1, 0]]),
            "translate_y": moved(lambda level, sign: [[1, 0, 0], [0, 1, 0.9 * level * sign]])}


def rand_augment(x, mean, magnitude, generator):
    """Two operations an image, each left out with probability 1/2, of magnitude N(magnitude, 0.5)
    within 0 to 10 (Cubuk et al. 2020, RandAugment, as DeiT has it)."""
    x, changes = x.clone(), list(operations(mean).values())
    for _ in range(2):
        drawn = torch.randint(2 * len(changes), (len(x),), generator=generator)
        level = (magnitude + 0.5 * torch.randn(len(x), generator=generator)).clamp(0, 10) / 10
        sign = 2 * torch.randint(2, (len(x),), generator=generator) - 1
        for i, change in enumerate(changes):
            rows = (drawn == i).nonzero().squeeze(1)
            if len(rows):
                there = rows.to(x.device)
                x[there] = change(x[there], level[rows], sign[rows])
    return x


def color_jitter(x, strength, generator):
    """Brightness, contrast and saturation in random order, each by 1 - strength to 1 + strength."""
    from kornia import enhance
    changes = (enhance.adjust_brightness_accumulative,
               enhance.adjust_contrast_with_mean_subtraction,
               enhance.adjust_saturation_with_gray_subtraction)
    for i in torch.randperm(3, generator=generator).tolist():
        factor = uniform(generator, len(x), low=1 - strength, high=1 + strength)
        x = changes[i](x, factor.to(x.device))
    return x


def erase(x, p, generator):
    """With probability p a box of every image becomes noise, N(0, 1) a pixel and channel, of area
    0.02 to 1/3 and of sides 0.3 to 1/0.3 (Zhong et al. 2020, Random Erasing Data Augmentation)."""
    H, W = x.shape[2:]
    h, w, down, across = boxes(len(x), (0.02, 1 / 3), (0.3, 1 / 0.3), generator)
    h, w = (h * H).round(), (w * W).round()
    h[uniform(generator, len(x)) >= p] = 0 # these have no box
    top, left = (down * (H - h + 1)).floor(), (across * (W - w + 1)).floor()
    box = inside(top, h, H).view(-1, 1, H, 1) & inside(left, w, W).view(-1, 1, 1, W)
    # so much noise is drawn where x is: a GPU's differs from a CPU's
    there = torch.Generator(x.device).manual_seed(seed_of(generator))
    noise = torch.randn(x.shape, device=x.device, generator=there)
    return torch.where(box.to(x.device), noise, x)


def inside(start, length, n):
    """(B, n): which of n rows or columns are the `length` ones from start: (B,) on."""
    return (torch.arange(n) >= start[:, None]) & (torch.arange(n) < (start + length)[:, None])


def seed_of(generator):
    return int(torch.randint(2**62, (), generator=generator))


def mix(x, y, config, generator):
    """The batch mixed with itself in reverse, images and probabilities alike, as timm does.

    mixup (Zhang et al. 2018): the whole image with weight lam ~ Beta(alpha, alpha). CutMix (Yun et
    al. 2019): a box of the other's pixels, of about 1 - lam of the area. With both keys on, a batch
    is cut with probability mix_switch.
    """
    cut = config.cutmix and (not config.mixup or uniform(generator) < config.mix_switch)
    alpha, (H, W) = config.cutmix if cut else config.mixup, x.shape[2:]
    # PyTorch's Beta takes no generator
    lam = np.random.default_rng(seed_of(generator)).beta(alpha, alpha)
    if not cut:
        return lam * x + (1 - lam) * x.flip(0), lam * y + (1 - lam) * y.flip(0)
    h, w = (int(side * math.sqrt(1 - lam)) for side in (H, W))
    row, column = (int(torch.randint(side, (), generator=generator)) for side in (H, W)) # centre
    rows = slice(max(0, row - h // 2), row - h // 2 + h)
    columns = slice(max(0, column - w // 2), column - w // 2 + w)
    out = x.clone()
    out[:, :, rows, columns] = x.flip(0)[:, :, rows, columns]
    share = out[0, 0, rows, columns].numel() / (H * W) # the box may be cut off at the border
    return out, (1 - share) * y + share * y.flip(0)

# -----------------------------------------------------------------------------
# pairs of images in low and in high resolution

class PairKeys:
    """The keys of train.py for pairs of images."""
    flip = False # each pair turned and mirrored in one of 8 ways at random
    LIMITS = {}

    @staticmethod
    def check(config):
        """Nothing to check."""


@dataclass(frozen=True)
class Pairs:
    """A split of pairs of images for super-resolution.

    pixels: uint8, of pair after pair the low resolution and the high. shapes: int64 (N, 2), the low
    resolutions' (h, w). offsets: int64 (N,), where each pair begins.
    """
    pixels: np.ndarray
    shapes: np.ndarray
    offsets: np.ndarray
    scale: int
    keys, metric, metric_unit = PairKeys, "psnr", " dB"
    units, unit, sample = "images", "img", "an image"
    test_name, default_dataset = "images of val", "sr_samples"

    def __len__(self):
        return len(self.shapes)

    @staticmethod
    def units_per_sample(config):
        return 1

    @classmethod
    def load(cls, config):
        folder = f"{config.dataset}_x{config.scale}"
        return {split: load_pairs(config.data_dir, config.dataset, split, config.scale)
                for split in ("train", "val")}, {"identity": identity(config.data_dir, folder)}

    def part(self, start, stop):
        return replace(self, shapes=self.shapes[start:stop], offsets=self.offsets[start:stop])

    def pair(self, i):
        """low (h, w, 3), high (scale h, scale w, 3)"""
        (h, w), start, s = self.shapes[i].tolist(), int(self.offsets[i]), self.scale
        both = self.pixels[start:start + 3 * h * w * (1 + s * s)]
        low, high = np.split(both, [3 * h * w])
        return low.reshape(h, w, 3), high.reshape(s * h, s * w, 3)

    def check(self, config, name):
        least = min(self.shapes.min(1).tolist(), default=0)
        needed = 3 if name in ("val", "test") else config.patch # PSNR leaves out one pixel a side
        if least < needed:
            smaller = f"patch={config.patch}: choose a smaller patch, or "
            raise SystemExit(f"The {name} split of {config.dataset} has {len(self)} images or "
                             f"regions, the smallest of {least} pixels, and "
                             f"{smaller if needed > 3 else f'{needed} are needed: '}prepare more "
                             "images, or larger regions by --img_size.")

    def batch(self, config, name, step, micro=0, device="cpu", augment=True):
        """Crops at random places."""
        generator = rng(config.seed, name, step, micro)
        return get_patches(self, config.batch_size, config.patch, generator, device, config.flip)

    def n_eval_batches(self, config, own_norms=False):
        return min(config.eval_iters, max(1, len(self)))

    def eval_batch(self, config, name, i, device="cpu"):
        """The i-th image, whole."""
        return next(pair_batches(self, [i], device))

    def sweep(self, config, device="cpu"):
        return pair_batches(self, range(len(self)), device)

    def n_sweep_batches(self, config):
        return len(self)

    @staticmethod
    def score(x, y, logits):
        """The metric is the PSNR of Y of YCbCr, in dB."""
        scale = y.shape[3] // x.shape[3]
        return len(y), image_quality(logits, y, scale)["psnr_y"] * len(y)


def load_pairs(data_dir, dataset, split, scale):
    """Pairs of "train" or "val", left on the disk.

    SystemExit if they are not prepared, none, or not the bytes that were written.
    """
    folder = Path(data_dir) / f"{dataset}_x{scale}"
    meta = load_meta(data_dir, folder.name, "pairs")
    if not meta[f"{split}_shapes"]:
        raise SystemExit(f"{folder} holds no images of {split}: choose another --dataset")
    pixels = np.memmap(folder / f"{split}.bin", np.uint8, "r")
    check_hash(pixels, folder / f"{split}.bin", meta[f"{split}_sha256"])
    shapes, offsets = (np.array(meta[f"{split}_{name}"]) for name in ("shapes", "offsets"))
    return Pairs(pixels, shapes, offsets, meta["scale"])


def as_batch(images, device="cpu"):
    """uint8 (H, W, 3) each, of one shape -> float32 (B, 3, H, W) of 0 to 1."""
    batch = torch.from_numpy(np.stack(images)).to(device, non_blocking=True)
    return batch.permute(0, 3, 1, 2).float().div_(255)


def pair_batches(pairs, index, device="cpu"):
    """Whole images, one at a time: yields x (1, 3, h, w), y (1, 3, scale h, scale w)."""
    for i in index:
        yield tuple(as_batch([image], device) for image in pairs.pair(i))


def get_patches(pairs, batch_size, patch, generator, device="cpu", flip=False):
    """Crops at random places, every pixel about as likely: x (batch_size, 3, patch, patch),
    y (batch_size, 3, scale patch, scale patch).

    flip: each is turned and mirrored, one of the 8 ways at random. generator: one on the CPU.
    """
    s, lows, highs = pairs.scale, [], []
    areas = torch.from_numpy(pairs.shapes.prod(1)).double()
    index = torch.multinomial(areas, batch_size, replacement=True, generator=generator)
    for i in index.tolist():
        top, left = (torch.randint(int(n) - patch + 1, (), generator=generator).item()
                     for n in pairs.shapes[i])
        turns = torch.randint(8, (), generator=generator).item() if flip else 0
        for images, image, k in zip((lows, highs), pairs.pair(i), (1, s), strict=True):
            rows = slice(k * top, k * (top + patch))
            columns = slice(k * left, k * (left + patch))
            image = np.rot90(image[rows, columns], turns % 4)
            images.append(image[:, ::-1] if turns > 3 else image)
    return as_batch(lows, device), as_batch(highs, device)


def luma(image):
    """Y of YCbCr as in ITU-R BT.601: (B, 3, H, W) of 0 to 255 -> (B, 1, H, W) of 16 to 235."""
    weights = image.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return 16 + (image * weights).sum(1, keepdim=True) / 255


def psnr(a, b):
    """10 log10(255^2 / mean squared error) of images of 0 to 255, in dB; at most 148."""
    error = (a - b).square().mean().clamp_min(1e-10)
    return (20 * math.log10(255) - 10 * error.log10()).item()


def ssim(a, b):
    """Structural similarity of images (B, C, H, W) of 0 to 255, the mean over windows: eq. 13 of
    Wang et al. 2004 in windows of 11 x 11 inside the image, weighted by a Gaussian of deviation
    1.5."""
    t = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    window = torch.exp(-t.square() / 4.5)
    window = (window / window.sum()).view(1, 1, 11, 1)

    def blur(x):
        return torch.conv2d(torch.conv2d(x, window), window.mT)

    a, b = (x.flatten(0, 1).unsqueeze(1) for x in (a, b)) # (B * C, 1, H, W)
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    same = (2 * mean_a * mean_b + c_1) * (2 * covariance + c_2)
    all_ = (mean_a ** 2 + mean_b ** 2 + c_1) * (var_a + var_b + c_2)
    return (same / all_).mean().item()


def image_quality(image, target, border, structure=False):
    """{"psnr_y", "psnr_rgb"} of images (B, 3, H, W) of 0 to 1, in dB, and with structure also
    {"ssim_y", "ssim_rgb"}, as papers of super-resolution measure it: rounded to 8 bits, without
    `border` pixels at the edges."""
    inner = slice(border, -border)
    a, b = ((255 * t.cpu().double()).round().clamp(0, 255)[:, :, inner, inner]
            for t in (image, target))
    found = {}
    for channels, (c, d) in {"y": (luma(a), luma(b)), "rgb": (a, b)}.items():
        found[f"psnr_{channels}"] = psnr(c, d)
        if structure:
            found[f"ssim_{channels}"] = ssim(c, d)
    return found


KINDS = {"tokens": Tokens, "images": Images, "pairs": Pairs}
