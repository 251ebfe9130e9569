"""The degradation of plain networks, and what residual units do about it: the papers' experiments on real images.

    python examples/degradation.py --quick                    # minutes on two cores
    python examples/degradation.py --device cuda              # depths 20 and 56, for a GPU

Plain and residual networks of two depths and the deep one with every order of its units learn digits and textures, with
fused blocks. Drawn are training and test error, the gradient of every layer, and the loss around what was learned.

Ctrl-C or SIGTERM saves and stops; the same command continues, and what is finished is not done again. On a CPU, with as
many threads as before, it continues to the same bits.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from degradation_pages import Result, draw, print_table, publish
from loss_surface import coordinates, directions, gradient_norms, surface_row
from resumable import Stop, TrainingError, device_of, read_run, restore, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from resfuse import fuse
from resfuse.demo.data import ImageSet, load_digits, load_textures
from resfuse.models import CifarResNet
from resfuse.models.units import ORDERS

DATASETS = {"digits": load_digits, "textures": load_textures}


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
        depths: of the shallow and the deep networks, 6n+2.
        widths: channels of the three stages.
        size: side of the images in pixels, of which 32 are there.
        train_images, test_images: of each data set.
        batch_size, steps, rate: of the training; the learning rate rises to `rate`, then falls to 0 as a cosine.
        points: how often errors are measured, and the state is saved.
        surface_points, surface_images: points along each side of the loss surface, and images for each point.
    """

    depths: tuple[int, int] = (20, 56)
    widths: tuple[int, int, int] = (16, 32, 64)
    size: int = 32
    train_images: int = 4000
    test_images: int = 1000
    batch_size: int = 128
    steps: int = 6000
    rate: float = 0.1
    points: int = 60
    surface_points: int = 51
    surface_images: int = 1000


FULL = Settings()
QUICK = Settings(
    depths=(8, 26), widths=(16, 16, 16), size=14, train_images=2000, test_images=500, batch_size=32, steps=350,
    points=10, surface_points=11, surface_images=200,
)  # fmt: skip


class StoppedError(Exception):
    """The user asked to stop, and everything is saved."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller networks and images, fewer steps")
    add("--dataset", choices=tuple(DATASETS), nargs="+", default=list(DATASETS))
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output-dir", type=Path, default=Path("degradation-out"), help="for checkpoints and figures")
    add("--publish", type=Path, metavar="PAGE", help="write table and figures into this page, which has the markers")
    return parser.parse_args(argv)


def networks(settings: Settings) -> dict[str, dict[str, Any]]:
    """Options of CifarResNet by name: plain and residual networks of both depths, and the deep one of other units."""
    kinds = {"plain": {"shortcut": None}, "residual": {"shortcut": "A"}}
    pairs = {f"{kind}-{depth}": {"depth": depth, **kinds[kind]} for kind in kinds for depth in settings.depths}
    deep = settings.depths[1]
    return pairs | {f"{order}-{deep}": {"depth": deep, "shortcut": "A", "unit": order} for order in ORDERS}


def load(dataset: str, settings: Settings, device: str) -> ImageSet:
    """The data set at the wanted size, in channels_last."""
    images = DATASETS[dataset](settings.train_images, settings.test_images)

    def placed(tensor: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(tensor, settings.size).to(device, memory_format=torch.channels_last)

    return ImageSet(placed(images[0]), images[1].to(device), placed(images[2]), images[3].to(device))


class Training:
    """A network, what trains it, and what has been seen on the way: all that a checkpoint holds."""

    def __init__(self, name: str, images: ImageSet, course: dict[str, Any], settings: Settings, path: Path) -> None:
        self.name, self.images, self.settings, self.path = name, images, settings, path
        options = networks(settings)[name]
        self.course = {**course, "network": options}
        torch.manual_seed(course["seed"])
        model = CifarResNet(**options, in_channels=1, widths=settings.widths)
        model = fuse(model.to(images.train_images.device, memory_format=torch.channels_last))
        optimizer = torch.optim.SGD(model.parameters(), settings.rate, 0.9, weight_decay=1e-4)
        self.parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        self.model, self.optimizer = model, optimizer
        self.seen: dict[str, Any] = {"losses": [], "points": [], "gradients": {}, "cpu_seconds": 0.0}
        self.step = 0

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        write({**state, "step": self.step, "seen": self.seen, "course": self.course}, self.path)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.path.exists():
            state = read_run(self.path, {*self.parts, "step", "seen"}, self.course)
            restore(self.parts, state, self.path)
            self.step, self.seen = state["step"], state["seen"]

    def batch(self) -> Tensor:
        """Which images the next step takes: every epoch has an order of its own that the seed decides."""
        count, size = len(self.images.train_labels), self.settings.batch_size
        epoch, first = divmod(self.step, count // size)
        generator = torch.Generator().manual_seed(hash((self.course["seed"], epoch)))
        return torch.randperm(count, generator=generator)[first * size : (first + 1) * size]

    def take_step(self) -> None:
        steps, start = self.settings.steps, time.process_time()
        warm = max(1, steps // 20)
        rise, fall = (self.step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * self.step / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * min(rise, fall)
        rows = self.batch().to(self.images.train_labels.device)
        x = self.images.train_images[rows].contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(self.model.train()(x), self.images.train_labels[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.seen["losses"].append(loss.item())
        self.seen["cpu_seconds"] += time.process_time() - start

    def measure(self) -> None:
        """Error in percent, in evaluation mode: on as many training images as there are test images, and on those."""
        count = len(self.images.test_labels)
        train = error(self.model, self.images.train_images[:count], self.images.train_labels[:count])
        self.seen["points"].append([self.step, train, error(self.model, *self.images[2:])])

    def measure_gradients(self, when: str) -> None:
        """Of one batch, always the same."""
        size = self.settings.batch_size
        batch = self.images.train_images[:size], self.images.train_labels[:size]
        self.seen["gradients"][when] = gradient_norms(self.model, *batch)


@torch.no_grad()
def error(model: CifarResNet, images: Tensor, labels: Tensor) -> float:
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * (found != labels).float().mean().item()


def train(training: Training, stop: Stop, tick: Callable[[int], object]) -> None:
    """Stage 1: train a network, from where it is; it is saved at every point and when the user asks to stop."""
    training.resume()
    steps, points = training.settings.steps, training.settings.points
    if training.step == 0 and not training.seen["gradients"]:
        training.measure_gradients("start")
        training.measure()
    tick(training.step)
    while training.step < steps:
        training.take_step()
        at_point = training.step * points // steps > (training.step - 1) * points // steps
        if at_point:
            training.measure()
        if training.step == steps:
            training.measure_gradients("end")
        if at_point or stop.asked:
            training.save()
        tick(training.step)
        if stop.asked:
            raise StoppedError


def surface(training: Training, stop: Stop, tick: Callable[[int], object]) -> list[list[float]]:
    """Stage 2: the loss around a trained network, row by row; what is finished is saved when the user asks to stop."""
    settings, path = training.settings, training.path.with_suffix(".surface.pt")
    rows = read_run(path, {"rows"}, training.course)["rows"] if path.exists() else []
    along = coordinates(settings.surface_points)
    frame = directions(training.model, training.course["seed"])
    images, labels = (part[: settings.surface_images] for part in training.images[:2])
    tick(len(rows))
    while len(rows) < len(along):
        rows.append(surface_row(training.model, frame, along[len(rows)], along, images, labels))
        tick(len(rows))
        if stop.asked or len(rows) == len(along):
            write({"rows": rows, "course": training.course}, path)
        if stop.asked:
            raise StoppedError
    return rows


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Bars: a function that adds one, and returns what sets it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:

        def add(title: str, total: int) -> Callable[[int], object]:
            task = bars.add_task(title, total=total)
            return lambda done: bars.update(task, completed=done)

        yield add


def run(args: argparse.Namespace, settings: Settings, console: Console) -> list[Result]:
    """Both stages for every network of every data set, and what they found."""
    results = []
    surfaces = [f"{kind}-{settings.depths[1]}" for kind in ("plain", "residual")]
    with Stop() as stop, progress(console) as bar:
        for dataset in args.dataset:
            images = load(dataset, settings, args.device)
            course = {"dataset": dataset, "seed": args.seed, "settings": asdict(settings)}
            for name in networks(settings):
                path = args.output_dir / f"{dataset}-{name}.pt"
                training = Training(name, images, course, settings, path)
                train(training, stop, bar(f"{dataset}: {name}", settings.steps))
                rows = None
                if name in surfaces:
                    rows = surface(training, stop, bar(f"{dataset}: surface of {name}", settings.surface_points))
                results.append(Result(dataset, name, training.seen, rows))
    return results


def main(argv: list[str] | None = None, settings: Settings | None = None) -> list[Result]:
    args, console = parse(argv), Console()
    settings = settings or (QUICK if args.quick else FULL)
    device_of(args.device)
    try:
        results = run(args, settings, console)
    except StoppedError:
        console.print("stopped; the same command continues")
        return []
    draw(results, settings.depths, args.output_dir)
    print_table(results, settings.depths, settings.test_images, console)
    console.print(f"Figures: {args.output_dir}/*.png", highlight=False)
    if args.publish is not None:
        shown = "--quick " if settings == QUICK else ""
        command = f"python examples/degradation.py {shown}--dataset {' '.join(args.dataset)} --seed {args.seed}"
        publish(results, settings.depths, settings.test_images, args.output_dir, args.publish, command, args.device)
    return results


if __name__ == "__main__":
    try:
        main()
    except TrainingError as problem:
        raise SystemExit(f"degradation.py: {problem}") from None
