"""Seconds an epoch of CIFAR-10 takes with the Trainer, with a plain loop over data on the device, and to read alone.

    python recipes/benchmarks/image_epoch.py --architecture preact_resnet110_cifar --bf16 --channels_last --compile

The images are random bytes of the shapes of CIFAR-10. `plain loop` keeps them on the device and does what any training
must: crop, flip, normalise, forward, backward, SGD. `trainer` is what `hf-rskip train` runs. `input` is the Trainer's
input alone: batches on the device, augmented and normalised. They take turns for `--rounds` rounds of `--steps` steps;
reported are medians, as seconds for the 390 full batches of an epoch, and their ratio to the plain loop.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from report import append_csv, describe_run, print_table
from transformers import TrainerCallback

from hf_rskip import RSkipResNetConfig, RSkipResNetForImageClassification
from hf_rskip.data.images.arguments import ImageDataArguments
from hf_rskip.data.images.augmentation import normalize, random_crop, random_flip
from hf_rskip.data.images.pixels import ImageTensors
from hf_rskip.recipe.images import ImageTrainingArguments
from hf_rskip.training.image_trainer import ImageTrainer

EPOCH = 390


class Clock(TrainerCallback):
    """The times at the ends of some steps."""

    def __init__(self, steps: tuple[int, ...], synchronize):
        self.steps, self.synchronize, self.times = steps, synchronize, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.synchronize()
            self.times.append(time.perf_counter())


def create_model(args):
    torch.manual_seed(0)
    config = RSkipResNetConfig.from_name(args.architecture, skip_type="rskip", skip_recursions=args.skip_recursions)
    return RSkipResNetForImageClassification(config)


def create_trainer(args, images, folder, callbacks=()):
    return ImageTrainer(
        data_args=ImageDataArguments(dataset_name="random"),
        model=create_model(args),
        args=ImageTrainingArguments(
            output_dir=folder,
            max_steps=args.warmup + args.steps,
            per_device_train_batch_size=args.batch_size,
            lr_scheduler_type="constant",
            bf16=args.bf16,
            channels_last=args.channels_last,
            torch_compile=args.compile,
            eval_strategy="no",
            save_strategy="no",
            logging_steps=1000,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=images,
        callbacks=list(callbacks),
    )


def time_trainer(args, images, synchronize):
    clock = Clock((args.warmup, args.warmup + args.steps), synchronize)
    with tempfile.TemporaryDirectory() as folder:
        trainer = create_trainer(args, images, folder, [clock])
        if args.channels_last:
            trainer.model.to(memory_format=torch.channels_last)
        trainer.train()
    start, end = clock.times
    return end - start


def time_input(args, images, synchronize):
    with tempfile.TemporaryDirectory() as folder:
        trainer = create_trainer(args, images, folder)
        trainer.model.train()
        batches = iter(trainer.get_train_dataloader())
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                synchronize()
                start = time.perf_counter()
            trainer._prepare_inputs(next(batches))
        synchronize()
    return time.perf_counter() - start


def time_plain_loop(args, images, synchronize):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model = create_model(args).to(device, memory_format=memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    data = ImageDataArguments(dataset_name="random")
    pixel_values, labels = images.pixel_values.to(device), images.labels.to(device)
    forward = torch.compile(model) if args.compile else model
    order = torch.randperm(len(images), device=device)
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            synchronize()
            start = time.perf_counter()
        chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
        batch = normalize(random_flip(random_crop(pixel_values[chosen], 4)), data.image_mean, data.image_std)
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            loss = forward(batch.contiguous(memory_format=memory_format), labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start


WAYS = {"plain loop": time_plain_loop, "trainer": time_trainer, "input": time_input}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="resnet20_cifar")
    parser.add_argument("--skip_recursions", type=int, default=2, help="K of rSkip+LN")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="measured steps a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels_last", action="store_true", help="memory order of images and weights")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    cuda = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    count = args.batch_size * (args.warmup + args.steps)
    images = ImageTensors(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (count,)))
    seconds = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, measure in WAYS.items():
            seconds[way].append(measure(args, images, synchronize) / args.steps * EPOCH)

    plain = seconds["plain loop"]
    about = {
        **{name: value for name, value in vars(args).items() if name not in ("output", "threads")},
        **describe_run("cuda" if cuda else "cpu"),
    }
    rows = [
        {
            "way": way,
            "seconds_an_epoch": f"{statistics.median(times):.2f}",
            "images_per_s": f"{EPOCH * args.batch_size / statistics.median(times):.0f}",
            "ratio": f"{statistics.median(own / peer for own, peer in zip(times, plain, strict=True)):.3f}",
        }
        for way, times in seconds.items()
    ]
    print_table(rows, about)
    append_csv([row | about for row in rows], args.output)


if __name__ == "__main__":
    main()
