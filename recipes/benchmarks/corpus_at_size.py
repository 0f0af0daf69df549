"""Seconds and memory of every stage from a corpus of a given size to the first steps of training.

    python recipes/benchmarks/corpus_at_size.py --pairs 4500000 --folder FOLDER --output corpus_at_size.csv

The corpus is made on the fly, in the schema of `wmt/wmt14` (`translation: {de, en}`, parquet): words drawn by Zipf's
law from 2,000,000, lengths from a log-normal distribution with a mean of 25 words, and after every 1,000 pairs some
that a corpus from the web has: 20,000 words in a line, control characters, an empty, a blank or a missing side, a
repetition. Each stage is a process of its own that finds the results of those before in the cache, and then repeats
what every process of a run does up to that stage; its seconds are those of the stage alone.

Memory, in MiB: `peak` is the largest resident set size (`ru_maxrss`), which counts the pages of memory-mapped files as
long as the kernel keeps them; `private` is the largest part of it that is not of files. With `--processes`, that is of
the main process.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

STAGES = ("make", "load", "clean", "tokenizer", "tokenize", "plan", "train", "read")


def make(folder: Path, pairs: int) -> dict:
    """Writes the corpus."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    count = 2_000_000
    letters = np.array(list("etaonrishdlfcmugypwbvkjxzqäöüß"))
    letters = rng.choice(letters, (count, 16), p=(weights := 1 / np.arange(1, len(letters) + 1)) / weights.sum())
    sizes = (1 + 1.6 * np.log10(np.arange(1, count + 1)) * rng.uniform(0.5, 1.4, count)).astype(int).clip(1, 16)
    words = np.array([row[:size].tobytes().decode("utf-32-le") for row, size in zip(letters, sizes, strict=True)])
    probabilities = np.cumsum(1 / np.arange(1, count + 1) ** 1.1)
    probabilities /= probabilities[-1]

    def sentences(lengths):
        drawn = words[np.searchsorted(probabilities, rng.random(lengths.sum()))]
        return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]

    schema = pa.schema([("translation", pa.struct([("de", pa.string()), ("en", pa.string())]))])
    long = " ".join(words[:20_000])
    bad = [(long, "a b"), ("a\x00b", "a b"), ("a\x92b", "a b"), ("", "a b"), ("a b", " \t "), ("a b", None)]
    folder = folder / "data"
    folder.mkdir(exist_ok=True)
    for start in range(0, pairs, 50_000):
        size = min(50_000, pairs - start)
        lengths = np.exp(rng.normal(3, 0.65, size))
        english = sentences((lengths * np.exp(rng.normal(0, 0.15, size))).astype(int).clip(1))
        german = sentences(lengths.astype(int).clip(1))
        rows = [{"de": a, "en": b} for a, b in zip(german, english, strict=True)]
        for row in range(0, size - 7, 1000):
            rows[row : row + 6] = [{"de": a, "en": b} for a, b in bad]
            rows[row + 6] = rows[row + 7]
        pq.write_table(pa.table({"translation": rows}, schema=schema), folder / f"train-{start:09}.parquet")
    for split in ("validation", "test"):
        pq.write_table(pa.table({"translation": rows[100:200]}, schema=schema), folder / f"{split}.parquet")
    return {"MiB on disk": sum(file.stat().st_size for file in folder.iterdir()) >> 20}


def run_stage(stage: str, folder: Path, values: dict) -> dict:
    """Runs the stages up to `stage`, as `hf_rskip.training.translation.Translation` does, and times the last one."""
    from transformers import DataCollatorForSeq2Seq

    from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
    from hf_rskip.data.text.arguments import DataArguments
    from hf_rskip.data.text.cleaning import clean_corpus
    from hf_rskip.data.text.corpora import iterate_sentences, load_translation_dataset
    from hf_rskip.data.text.preprocessing import describe_dropped, filter_by_length, tokenize_corpus
    from hf_rskip.data.text.tokenizer import load_tokenizer, train_tokenizer
    from hf_rskip.recipe.translation import RSkipTrainingArguments
    from hf_rskip.training.trainer import RSkipTrainer

    data = DataArguments(
        dataset_name=str(folder / "data"),
        source_lang="en",
        target_lang="de",
        remove_duplicates=True,
        max_length_ratio=3,
        preprocessing_num_workers=values["processes"],
        tokenizer_train_samples=values["tokenizer_train_samples"],
    )
    start = time.perf_counter()

    def finish(**about):
        return {"seconds": time.perf_counter() - start} | about

    train_set = load_translation_dataset(data)["train"]
    if stage == "load":
        return finish(pairs=len(train_set))
    start = time.perf_counter()
    train_set, unclean = clean_corpus(train_set, data)
    if stage == "clean":
        return finish(kept=describe_dropped(unclean, len(train_set)))
    start = time.perf_counter()
    if stage == "tokenizer":
        sentences = iterate_sentences(train_set, data, data.tokenizer_train_samples)
        tokenizer = train_tokenizer(sentences, values["vocab_size"])
        tokenizer.save_pretrained(folder / "tokenizer")
        return finish(tokens=len(tokenizer))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    train_set, dropped = filter_by_length(tokenize_corpus(train_set, tokenizer, data), data)
    if stage == "tokenize":
        return finish(kept=describe_dropped(dropped, len(train_set)))
    width = {f"{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    width |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32}
    model = RSkipForConditionalGeneration(RSkipConfig(vocab_size=len(tokenizer), **width))
    trainer = RSkipTrainer(
        model=model,
        args=RSkipTrainingArguments(
            output_dir=str(folder / "output"),
            max_steps=20,
            per_device_train_batch_tokens=1024 if stage == "train" else 25_000,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=train_set,
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    if stage == "train":
        trainer.train()
        return finish(steps=20)
    if stage == "plan":
        sampler = trainer.make_sampler()
        batches = sum(1 for _ in sampler)
        seconds = finish()
        return seconds | {"batches": batches, "padding": round(sampler.padding_fraction(), 4)}
    tokens = sum(batch["attention_mask"].sum().item() for batch in trainer.get_train_dataloader())
    return finish(source_tokens=tokens)


def watch_private_memory(peak: list[int]) -> None:
    while True:
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.05)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the corpus and its cache go: 3 KB a pair")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--vocab_size", type=int, default=37_000)
    parser.add_argument("--tokenizer_train_samples", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, help="processes that clean and tokenize")
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder.absolute() / f"corpus-{args.pairs}"
    values = {name: getattr(args, name) for name in ("pairs", "vocab_size", "tokenizer_train_samples", "processes")}

    if args.child:
        peak = [0]
        threading.Thread(target=watch_private_memory, args=(peak,), daemon=True).start()
        start = time.perf_counter()
        result = make(folder, args.pairs) if args.child == "make" else run_stage(args.child, folder, values)
        seconds = result.pop("seconds", time.perf_counter() - start)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = {"peak_mib": resident >> 10, "private_mib": peak[0] >> 10}
        print(json.dumps({"stage": args.child, "seconds": round(seconds, 1), **memory, "about": result}))
        return

    from report import append_csv  # with torch, which is not to count in the memory of a stage

    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for stage in args.stages:
        words = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
        command = [sys.executable, __file__, "--folder", str(args.folder), "--child", stage, *words]
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = values | json.loads(output.splitlines()[-1]) | {"date": datetime.date.today().isoformat()}
        row["about"] = ", ".join(f"{name}: {value}" for name, value in row["about"].items())
        print(
            f"{stage:<10} {row['seconds']:>8.1f} s {row['peak_mib']:>6} MiB peak {row['private_mib']:>6} private  "
            f"{row['about']}",
            flush=True,
        )
        append_csv([row], args.output)


if __name__ == "__main__":
    main()
