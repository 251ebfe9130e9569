"""Train a network of resfuse.models, fused or stock, on a folder of images or on digits or textures that packages ship.

    python examples/train.py --dataset digits --model cifar_resnet20 --epochs 3
    python examples/train.py --data-path DIR --model resnet50 --amp bfloat16      # DIR/train/CLASS/*, DIR/val/CLASS/*
    torchrun --nproc-per-node 8 examples/train.py --data-path DIR --model resnet50

Ctrl-C or SIGTERM saves and stops; --resume continues as if nothing had happened: the order of images, augmentation and
dropout depend on the seed and the step alone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments keep the group, and Gloo's threads, for ever
import torch.nn.functional as F
from resumable import Stop, TrainingError, device_of, one_line, positive, read_run, restore, write
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import resfuse
from resfuse.bench.peers import import_torchvision

# what decides the course of a run: a checkpoint continues only the run it belongs to
COURSE = ("dataset", "model", "model_option", "batch_size", "epochs", "lr", "momentum", "weight_decay", "warmup_epochs",
          "label_smoothing", "ema_decay", "amp", "train_crop_size", "seed")  # fmt: skip


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python reads it, or else as a word."""
    name, _, value = text.partition("=")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return name.replace("-", "_"), value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", choices=("folder", "digits", "textures"), default="folder")
    add("--data-path", type=Path, help="for folder: holds train/ and val/, with one folder per class")
    add("--model", default="resnet50", help="one of resfuse.models.list_models()")
    add("--model-option", type=option, action="append", default=[], metavar="NAME=VALUE", help="as shortcut=A")
    add("--weights", help="start from this .pth or .safetensors file")
    add("--batch-size", type=positive, default=32, help="images per process and step")
    add("--epochs", type=positive, default=90)
    add("--lr", type=float, default=0.1)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--warmup-epochs", type=float, default=1.0, help="the rate rises linearly, then falls as a cosine")
    add("--label-smoothing", type=float, default=0.0)
    add("--ema-decay", type=float, help="also keep an exponential moving average of the weights")
    add("--amp", choices=("bfloat16", "float16"), help="autocast to this dtype")
    add("--fuse", action=on_off, default=True)
    add("--channels-last", action=on_off, default=True)
    add("--train-crop-size", type=positive, default=224)
    add("--val-resize-size", type=positive, default=256)
    add("--val-crop-size", type=positive, default=224)
    add("--workers", type=int, default=4)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add(
        "--output-dir",
        type=Path,
        default=Path("train-out"),
        help="for checkpoint.pt and model.pth; a new run takes one that holds no checkpoint",
    )
    add("--resume", type=Path, help="a checkpoint.pt to continue from")
    add("--save-freq", type=positive, default=1000, help="steps between checkpoints, besides one per epoch")
    add("--print-freq", type=positive, default=20, help="steps between lines")
    add("--tensorboard", type=Path, help="write curves into this folder")
    add("--test-only", action="store_true")
    args = parser.parse_args(argv)
    if args.dataset == "folder" and args.data_path is None:
        parser.error("--dataset folder needs --data-path")
    return args


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Seeded(Dataset):
    """A dataset whose augmentation is a function of seed, epoch and index, whoever loads the image."""

    def __init__(self, images: Dataset, transform: Any, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, index)))
            return self.transform(image), int(label)


class Shard(Sampler):
    """This process's (epoch, index) keys: shuffled and of equal number for training, all of them for validation."""

    def __init__(self, count: int, batch_size: int | None, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank_and_size()
        self.epoch = self.first_step = 0
        self.steps = 0 if batch_size is None else count // (self.world_size * batch_size)
        if batch_size is not None and self.steps == 0:
            raise TrainingError(f"--batch-size {batch_size} x {self.world_size} processes is more than {count} images")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.batch_size is None:
            return iter([(0, i) for i in range(self.rank, self.count, self.world_size)])
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(hash((self.seed, self.epoch))))
        mine = order[self.rank :: self.world_size][self.first_step * self.batch_size : self.steps * self.batch_size]
        return iter([(self.epoch, int(i)) for i in mine])


def load_image(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # damaged bytes surface as almost any type
        raise TrainingError(f"image {path} cannot be read: {error}") from error


def folder(args: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    import_torchvision()  # also where its compiled operators are for another torch
    from torchvision import datasets, transforms

    finish = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augment = [transforms.RandomResizedCrop(args.train_crop_size), transforms.RandomHorizontalFlip()]
    crop = [transforms.Resize(args.val_resize_size), transforms.CenterCrop(args.val_crop_size)]
    train, val = (datasets.ImageFolder(args.data_path / part, loader=load_image) for part in ("train", "val"))
    if train.classes != val.classes:
        raise TrainingError(f"{args.data_path}: train/ and val/ must have the same classes")
    parts = ((train, augment), (val, crop))
    return *(Seeded(images, transforms.Compose(t + finish), args.seed) for images, t in parts), len(train.classes)


def shifted(image: Tensor) -> Tensor:
    return torch.roll(image, torch.randint(-2, 3, (2,)).tolist(), dims=(1, 2))


def shipped(args: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    from resfuse.demo import data

    load = {"digits": data.load_digits, "textures": data.load_textures}[args.dataset]
    train_images, train_labels, val_images, val_labels = load(4000, 1000)
    train = TensorDataset(train_images.expand(-1, 3, -1, -1), train_labels)  # as networks for photographs read them
    val = TensorDataset(val_images.expand(-1, 3, -1, -1), val_labels)
    return Seeded(train, shifted, args.seed), Seeded(val, torch.clone, args.seed), 10


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    torch.manual_seed(args.seed)
    options = {**dict(args.model_option), "weights": args.weights, "num_classes": classes}
    try:
        return resfuse.models.get_model(args.model, **options)
    except (TypeError, ValueError, NotImplementedError, OSError) as error:
        raise TrainingError(f"--model {args.model}: {error}") from error


class Run:
    """The model, what trains it, and how many steps have been taken: all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, classes: int, images: int, steps_per_epoch: int) -> None:
        self.args, self.steps_per_epoch, self.step = args, steps_per_epoch, 0
        self.checkpoint = args.output_dir / "checkpoint.pt"
        self.course = {key: getattr(args, key) for key in COURSE}
        self.course |= {"world_size": rank_and_size()[1], "training_images": images}
        self.device = torch.device(args.device)
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = build(args, classes).to(self.device, memory_format=self.layout)
        if args.fuse:
            resfuse.fuse(self.model)
        self.parallel = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        average = None if args.ema_decay is None else get_ema_multi_avg_fn(args.ema_decay)
        self.ema = average and AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        weights, decay = self.model.parameters(), args.weight_decay
        self.optimizer = torch.optim.SGD(weights, args.lr, args.momentum, weight_decay=decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "float16")

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self) -> None:
        if rank_and_size()[0] == 0:
            state = {name: part.state_dict() for name, part in self.parts().items()}
            write({**state, "step": self.step, "course": self.course}, self.checkpoint)

    def export(self) -> None:
        """The weights alone, as get_model(weights=...) reads them."""
        for name, model in {"model": self.model, "ema": self.ema and self.ema.module}.items():
            if model is not None and rank_and_size()[0] == 0:
                write(model.state_dict(), self.checkpoint.with_name(f"{name}.pth"))

    def resume(self, path: Path) -> None:
        state = read_run(path, {*self.parts(), "step"}, self.course)
        restore(self.parts(), state, path)
        self.step = state["step"]

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        warm, total = self.args.warmup_epochs * self.steps_per_epoch, self.args.epochs * self.steps_per_epoch
        if self.step < warm:
            return self.args.lr * (self.step + 1) / (warm + 1)
        return self.args.lr * (0.5 + 0.5 * math.cos(math.pi * (self.step - warm) / max(1, total - warm)))

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=self.layout)
        with torch.autocast(self.device.type, getattr(torch, self.args.amp or "bfloat16"), enabled=bool(self.args.amp)):
            return model(images)

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        torch.manual_seed(hash((self.args.seed, self.step, rank_and_size()[0])))  # for dropout
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.model.train()
        out = self.forward(self.parallel, images)
        loss = F.cross_entropy(out.float(), labels.to(self.device), label_smoothing=self.args.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    @torch.inference_mode()
    def evaluate(self, name: str, model: nn.Module, loader: DataLoader) -> dict[str, float]:
        """Accuracy in percent: the right class is first, or among the first five."""
        model.eval()
        counts = torch.zeros(3, device=self.device)
        for images, labels in loader:
            out = self.forward(model, images)
            hits = out.topk(min(5, out.shape[1])).indices == labels.to(self.device)[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), hits.new_ones(len(labels)).sum()])
        if dist.is_initialized():
            dist.all_reduce(counts)
        top1, top5, _ = (100 * counts / counts[2]).tolist()
        return {f"{name}/top1": top1, f"{name}/top5": top5}


def asked_to_stop(stop: Stop) -> bool:
    """Whether any process has been asked to: all stop after the same step."""
    asked = torch.tensor(float(stop.asked))
    if dist.is_initialized():
        dist.all_reduce(asked)
    return asked.item() > 0


class Log:
    """What the first process prints, and what TensorBoard draws."""

    def __init__(self, folder: Path | None) -> None:
        self.first, self.curves = rank_and_size()[0] == 0, None
        if folder is not None and self.first:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise TrainingError(
                    f'--tensorboard needs a package: pip install "resfuse[examples]" ({error})'
                ) from error
            self.curves = SummaryWriter(folder)

    def __call__(self, text: str, step: int = 0, **numbers: float) -> None:
        if self.first:
            print(text, *(f"{name} {number:.4g}" for name, number in numbers.items()), flush=True)
        if self.curves is not None:
            for name, number in numbers.items():
                self.curves.add_scalar(name, number, step)
            self.curves.flush()


def train_epoch(run: Run, loader: DataLoader, stop: Stop, log: Log) -> bool:
    """One epoch, or what is left of it; False if it was stopped."""
    losses, start = [], time.perf_counter()
    for images, labels in loader:
        losses.append(run.train_step(images, labels))
        if run.step % run.args.print_freq == 0:
            seconds, loss = time.perf_counter() - start, torch.stack(losses).mean().item()
            speed = len(losses) * len(labels) * rank_and_size()[1] / seconds
            where = f"epoch {run.step / run.steps_per_epoch:.2f}"
            log(where, run.step, loss=loss, lr=run.rate, images_per_second=speed)
            losses, start = [], time.perf_counter()
        if run.step % run.args.save_freq == 0:
            run.save()
        if asked_to_stop(stop):
            return False
    return True


def validate(run: Run, loader: DataLoader, log: Log) -> None:
    for name, model in (("val", run.model), ("ema", run.ema)):
        if model is not None:
            log(f"step {run.step}", run.step, **run.evaluate(name, model, loader))


def main(argv: list[str] | None = None) -> Run:
    args = parse(argv)
    device_of(args.device)
    if "RANK" in os.environ:  # torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # gloo for the CPU, NCCL for CUDA
    train, val, classes = (folder if args.dataset == "folder" else shipped)(args)
    shards = Shard(len(train), args.batch_size, args.seed), Shard(len(val), None, args.seed)
    loading = {"batch_size": args.batch_size, "num_workers": args.workers, "pin_memory": args.device != "cpu"}
    loaders = [DataLoader(part, sampler=shard, **loading) for part, shard in zip((train, val), shards, strict=True)]
    log, run = Log(args.tensorboard), Run(args, classes, len(train), shards[0].steps)
    log(str(resfuse.explain(run.model)).splitlines()[0])
    if args.resume is not None:
        run.resume(args.resume)
    elif run.checkpoint.exists() and not args.test_only:
        raise TrainingError(f"{run.checkpoint} is another run's: --resume it, or choose another --output-dir")
    if args.test_only:
        validate(run, loaders[1], log)
        return run
    with Stop() as stop:
        while run.step < args.epochs * run.steps_per_epoch:
            shards[0].epoch, shards[0].first_step = divmod(run.step, run.steps_per_epoch)
            finished = train_epoch(run, loaders[0], stop, log)
            run.save()
            if not finished:
                log(f"stopped after step {run.step}; continue with --resume {run.checkpoint}")
                return run
            validate(run, loaders[1], log)
    run.export()
    return run


if __name__ == "__main__":
    try:
        main()
    except (TrainingError, FileNotFoundError) as error:
        raise SystemExit(f"train.py: {one_line(error)}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
